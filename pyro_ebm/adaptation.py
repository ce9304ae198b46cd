"""Adaptation of step size, metric and trajectory length, pooled over chains."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_ebm.kernels.base import Dense, Diagonal, Metric, State

__all__ = ["Adapted", "Covariance", "DualAveraging", "Length", "Preconditioner", "Warmup"]


class Adapted(NamedTuple):
    """What warm-up finds: ``step_size``, ``metric``, ``num_steps`` of a trajectory, ``betas``.

    ``moved`` records which chains were lost: the number of the move and that of the chain, for
    each that :func:`rescue` let go on from where another was.
    """

    step_size: Tensor
    metric: Metric
    num_steps: int
    moved: tuple[tuple[int, int], ...] = ()
    betas: Tensor | None = None


class DualAveraging:
    r"""The step size at which the mean acceptance probability is as wanted.

    .. math:: \log \epsilon_{t+1} = \mu - \frac{\sqrt t}{\gamma (t + t_0)} \sum_{i \le t}
        (\delta - \alpha_i)

    The mean over chains is what enters, so that one stuck chain moves it by its share only.

    Args:
        step_size: The first step, a tensor: a number, or one per level of temperature.
        target: The acceptance probability :math:`\delta` to reach.

    References:
        | The No-U-Turn Sampler (Hoffman and Gelman, 2014), section 3.2
        | https://arxiv.org/abs/1111.4246

    Example:
        >>> adaptation = DualAveraging(torch.tensor(1.0), 0.8)
        >>> adaptation.update(torch.tensor(0.2))
        >>> bool(adaptation.step_size < 1.0)
        True
    """

    gamma, offset, decay = 0.05, 10.0, 0.75

    def __init__(self, step_size: Tensor, target: float) -> None:
        self.target = target
        self.restart(step_size)

    def restart(self, step_size: Tensor) -> None:
        """Begin anew at a step size, without a drift away from it."""
        self.center = step_size.log()
        self.log_step = self.center
        self.log_mean = torch.zeros_like(self.center)
        self.total = torch.zeros_like(self.center)
        self.count = 0

    def update(self, accept_prob: Tensor) -> None:
        """Take in the mean acceptance probability of a move."""
        self.count += 1
        t = self.count
        # What is not a number was not accepted.
        self.total = self.total + (self.target - accept_prob.nan_to_num(0.0))
        self.log_step = self.center - self.total * math.sqrt(t) / (self.gamma * (t + self.offset))
        weight = t**-self.decay
        self.log_mean = weight * self.log_step + (1.0 - weight) * self.log_mean

    @property
    def step_size(self) -> Tensor:
        """The step to explore with."""
        return self.log_step.exp()

    @property
    def best(self) -> Tensor:
        """The average of the steps, to sample with."""
        return self.log_mean.exp() if self.count else self.step_size


class Covariance:
    r"""Running mean and covariance over all chains, the recent draws weighing more.

    Welford's update with weights that grow as :math:`t^2`: a window that grows with the run, so
    that the way in from the starting points is forgotten and nothing starts anew.

    Args:
        dense: Whether to keep all of the covariance, or its diagonal.

    References:
        | Note on a Method for Calculating Corrected Sums of Squares and Products (Welford, 1962)
        | https://doi.org/10.1080/00401706.1962.10490022

    Example:
        >>> covariance = Covariance()
        >>> for _ in range(50):
        ...     covariance.update(torch.tensor([1.0, 10.0]) * torch.randn(64, 2))
        >>> covariance.moment.shape
        torch.Size([2])
    """

    growth = 2.0

    def __init__(self, dense: bool = False) -> None:
        self.dense = dense
        self.count = 0
        self.mean: Tensor | None = None
        self.moment: Tensor | None = None  # variance or covariance

    def update(self, x: Tensor) -> None:
        """Take in points ``(*groups, chains, D)``."""
        self.count += 1
        weight = min(1.0, (1.0 + self.growth) / (self.count + self.growth))
        mean = x.mean(-2)
        if self.mean is None or self.moment is None:
            self.mean, self.moment = mean, self._spread(x - mean.unsqueeze(-2))
            return
        new = self.mean + weight * (mean - self.mean)
        spread = self._spread(x - new.unsqueeze(-2))
        old = self._spread((self.mean - new).unsqueeze(-2))
        self.moment = (1.0 - weight) * (self.moment + old) + weight * spread
        self.mean = new

    def _spread(self, x: Tensor) -> Tensor:
        return x.mT @ x / x.shape[-2] if self.dense else x.square().mean(-2)


class Window:
    """The covariances of positions and of gradients since some move."""

    def __init__(self, dense: bool) -> None:
        self.x, self.grad = Covariance(dense), Covariance(dense)
        self.size = 0

    def update(self, x: Tensor, grad: Tensor) -> None:
        """Take in positions and gradients, ``(*groups, chains, D)``."""
        self.x.update(x)
        self.grad.update(grad)
        self.size += x.shape[-2]

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"size": self.size, "x": dict(vars(self.x)), "grad": dict(vars(self.grad))}

    def restore(self, state: dict[str, Any]) -> None:
        """From a checkpoint."""
        self.size = state["size"]
        vars(self.x).update(state["x"])
        vars(self.grad).update(state["grad"])


class Preconditioner:
    r"""The metric, from the positions and the gradients of all chains.

    .. math:: M^{-1} = \sqrt{\mathrm{var}(x) / \mathrm{var}(\nabla U)}

    or, of full covariances, their geometric mean :math:`\mathrm{cov}(x) \,\#\,
    \mathrm{cov}(\nabla U)^{-1}`: the metric of least Fisher divergence. It is exact for a Gaussian
    from the first moves on, long before the chains have spread over it. Elsewhere the gradients
    far out say little about those near the mode: what is older than the last but one call of
    :meth:`renew` is forgotten entirely, however large it was.

    Args:
        kind: ``"diagonal"``, ``"dense"``, or ``"auto"``: dense in up to 128 dimensions where the
            correlations that remain matter more than the noise of estimating them.
        num_dims: The number of dimensions.

    References:
        | Preconditioning for Hamiltonian Monte Carlo by minimizing Fisher divergence (Seyboldt,
          Carlson and Carpenter, 2026)
        | https://arxiv.org/abs/2603.18845

    Example:
        >>> metric = Preconditioner("diagonal", 2)
        >>> x = torch.tensor([1.0, 10.0]) * torch.randn(64, 2)
        >>> metric.update(x, x / torch.tensor([1.0, 100.0]))
        >>> metric.metric().inverse_mass.round()
        tensor([  1., 100.])
    """

    most = 128

    def __init__(self, kind: str, num_dims: int) -> None:
        self.kind = kind
        self.full = kind == "dense" or (kind == "auto" and num_dims <= self.most)
        self.window, self.next = Window(self.full), Window(self.full)

    def update(self, x: Tensor, grad: Tensor) -> None:
        """Take in positions and gradients, ``(*groups, chains, D)``."""
        good = (x.isfinite() & grad.isfinite()).all(-1)
        if not good.all():  # a chain without a gradient has nothing to say
            if x.dim() > 2 or int(good.sum()) < 2:
                return
            x, grad = x[good], grad[good]
        self.window.update(x, grad)
        self.next.update(x, grad)

    def renew(self) -> None:
        """Forget all that was taken in before the last call."""
        if self.next.size:
            self.window, self.next = self.next, Window(self.full)

    @property
    def mean(self) -> Tensor | None:
        """The mean of the positions."""
        return self.window.x.mean

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"window": self.window.state(), "next": self.next.state()}

    def restore(self, state: dict[str, Any]) -> None:
        """From a checkpoint."""
        self.window.restore(state["window"])
        self.next.restore(state["next"])

    def metric(self) -> Metric:
        """Return the metric."""
        a, b = self.window.x.moment, self.window.grad.moment
        assert a is not None
        assert b is not None
        if self.full:
            dense = self._dense(a, b)
            if dense is not None:
                return dense
            a, b = a.diagonal(), b.diagonal()
        ratio = (a / b).sqrt()
        usable = ratio.isfinite() & (ratio > 0)
        return Diagonal(torch.where(usable, ratio, torch.where(a > 0, a, 1.0)))

    def _dense(self, a: Tensor, b: Tensor) -> Dense | None:
        d = len(a)
        if self.window.size < 20 * d:  # draws are correlated: far fewer are independent
            return None
        scale = (a.diagonal() / b.diagonal()).sqrt().sqrt()
        if not (scale.isfinite() & (scale > 0)).all():
            return None
        mean = geometric_mean(a / torch.outer(scale, scale), b * torch.outer(scale, scale))
        if mean is None:
            return None
        values = torch.linalg.eigvalsh(mean)
        noise = (10.0 * d / self.window.size) ** 0.5
        beyond = ((1.0 + noise) / max(1.0 - noise, 0.1)) ** 2
        if self.kind == "auto" and float(values[-1] / values[0]) < 2.0 * beyond:
            return None
        return Dense.of(mean * torch.outer(scale, scale))


def geometric_mean(a: Tensor, b: Tensor) -> Tensor | None:
    r"""Return the positive definite solution of :math:`M b M = a`, if there is one.

    .. math:: M = b^{-1/2} (b^{1/2} a b^{1/2})^{1/2} b^{-1/2}
    """
    dtype, a, b = a.dtype, a.double(), b.double()
    try:
        values, vectors = torch.linalg.eigh(b)
        values = values.clamp(min=float(values[-1]) * 1e-10)
        root = vectors * values.sqrt() @ vectors.mT
        inverse = vectors * values.rsqrt() @ vectors.mT
        inner, basis = torch.linalg.eigh(root @ a @ root)
    except torch.linalg.LinAlgError:
        return None
    inner = inner.clamp(min=float(inner[-1]) * 1e-10).sqrt()
    mean = inverse @ (basis * inner @ basis.mT) @ inverse
    return (0.5 * (mean + mean.mT)).to(dtype) if mean.isfinite().all() else None


def rescue(energy: Tensor, num_dims: int) -> Tensor | None:
    r"""Return from which chain each is to go on, if some are lost.

    A chain is lost where its energy exceeds the lower quartile of all by more than

    .. math:: 20 + 10 D .

    Within one mode energies spread by about :math:`\sqrt{D / 2}`. For a mode that lies higher by
    that much to hold as much mass, it would have to be :math:`e^{10}` times wider in each
    dimension: what is given up is stuck, or in a mode of no mass.

    Args:
        energy: The energies of the chains, ``(C,)``.
        num_dims: The number of dimensions D.

    Example:
        >>> rescue(torch.tensor([1.0, 2.0, 500.0, 1.5]), 2)
        tensor([0, 1, 0, 3])
        >>> rescue(torch.tensor([1.0, 2.0, 30.0, 1.5]), 2) is None
        True
    """
    good = energy.sort().values[(len(energy) - 1) // 4]
    lost = ~(energy <= good + 20.0 + 10.0 * num_dims)  # NaN is lost too
    if not (bool(lost.any()) and bool(good.isfinite())):
        return None
    source = torch.arange(len(energy), device=energy.device)
    kept = source[~lost]
    source[lost] = kept[source[: int(lost.sum())] % len(kept)]
    return source


GRID = tuple(sorted({round(1.25**k) for k in range(32)}))
"""The numbers of leapfrog steps that are compared: 1, 2, 3, 4, 5, 6, 7, 9, ..., 1011."""


class Length:
    r"""The number of leapfrog steps with the most effective draws per gradient.

    ChEES asks how much a trajectory changes the squares of centred positions; here each
    trajectory of warm-up is asked at all its stages :math:`l`, in every dimension, for positions
    and squares alike. With :math:`\rho(l)` the correlation between the start and where a chain
    would be if it stopped and was accepted or not at stage l, pooled over chains,

    .. math:: \frac{1}{l} \left(
        \min_d \frac{1 - \rho_d(l)}{1 + \rho_d(l)} \,
        \min_d \frac{1 - \rho^{(2)}_d(l)}{1 + \rho^{(2)}_d(l)} \right)^{1/2}

    is maximised, where :math:`1 - \rho` counts as 1.2 at most: at half a period positions are
    as good as mirrored, and their squares never change. There is no step size of a stochastic
    ascent, and one stuck chain weighs one chain.

    References:
        | An Adaptive-MCMC Scheme for Setting Trajectory Lengths in Hamiltonian Monte Carlo
          (Hoffman, Radul and Sountsov, 2021)
        | http://proceedings.mlr.press/v130/hoffman21a.html

    Example:
        >>> Length().best
        3
    """

    memory = 0.95
    large = 1 << 14
    start = 3
    most = 1.2
    patience = 5

    def __init__(self) -> None:
        self.best = self.start
        self.forget()

    def forget(self) -> None:
        """Forget what was seen with another metric; keep the number of steps for now."""
        self.sums: dict[int, Tensor] = {}
        self.count = 0

    def share(self, x: Tensor) -> int:
        """How many chains are looked at: all of them, unless points are large."""
        return min(len(x), max(16, self.large // x.shape[-1]))

    @property
    def stages(self) -> list[int]:
        """The numbers of steps at which the next trajectory is to be looked at."""
        reach = 2 * self.best + 1
        return [n for n in GRID if n <= reach]

    def update(
        self, center: Tensor, start: Tensor, ends: list[tuple[int, Tensor, Tensor]]
    ) -> None:
        """Take in trajectories.

        Args:
            center: The mean of the target, so far, ``(D,)``.
            start: Where chains started, ``(C, D)``.
            ends: For each stage the number of steps, the positions and the acceptance
                probabilities.
        """
        x = start - center
        spread = x.square().mean(0)
        x = torch.stack([x, x.square() - spread])
        for num, q, accept in ends:
            y = q - center
            y = torch.stack([y, y.square() - spread])
            a = torch.where(y.isfinite().all(-1).all(0), accept, 0.0)[:, None]
            y = torch.where(a > 0, y, 0.0)
            # How far a chain is moved, and how far it could be: (1 - rho) is their ratio.
            moved = (a * x * (x - y)).mean(-2)
            new = torch.stack([moved, x.square().mean(-2)])
            old = self.sums.get(num)
            self.sums[num] = new if old is None else self.memory * old + new
        self.count += 1
        if self.count >= self.patience:
            self.best = self._argmax()

    def _argmax(self) -> int:
        def rate(num: int) -> float:
            moved, spread = self.sums[num]
            # At least a little: noise may say that a trajectory goes backwards.
            gap = (moved / spread.clamp(min=torch.finfo(spread.dtype).tiny)).clamp(1e-3, self.most)
            mean, square = (gap / (2.0 - gap)).min(-1).values.tolist()
            return math.sqrt(mean * square) / num

        return max(self.sums, key=rate)


class Warmup:
    r"""Finds step size, metric and number of steps together, from all chains.

    The first moves look back for a window of 8 moves only; windows grow twofold from where the
    energies no longer fall, that is, where their lower quartile is not lower by
    :math:`2 \sqrt D` than a window before. At the end of each, step size and number of steps
    are learned anew. After a tenth of warm-up (a fifth, while energies fall) chains that are
    lost go on from where others are; see :func:`rescue`. In the last sixth, but at least for 50
    moves or a third, the metric stands and the step size settles. The number of steps follows it
    to the end: at half a period energy errors cancel, and a number that stood would lure the
    step size to where it is half a period.

    Args:
        num: The number of moves.
        like: A tensor with the type, device and shape ``(D,)`` of points.
        target: The mean acceptance probability to reach.
        step_size: The first step.
        adapt_step_size: Whether to adapt it.
        metric: ``"diagonal"``, ``"dense"``, ``"auto"`` or ``None``.
        chees: Whether to adapt the number of steps.

    Example:
        >>> energy = lambda x: 0.5 * (x / torch.tensor([1.0, 1000.0])).square().sum(-1)
        >>> mcmc = ebm.MCMC(
        ...     ebm.ChEES(energy, ebm.Flat((2,))), 500, 200, num_chains=64, disable_progbar=True
        ... )
        >>> mcmc.run()
        >>> mcmc.adapted.metric.inverse_mass.sqrt().log10().round()
        tensor([0., 3.])
    """

    window = 8
    early, falling = 0.1, 0.2

    def __init__(
        self,
        num: int,
        like: Tensor,
        *,
        target: float,
        step_size: float | None,
        adapt_step_size: bool,
        metric: str | None,
        chees: bool,
    ) -> None:
        first = torch.as_tensor(0.1 if step_size is None else step_size).to(like)
        self.num, self.count = num, 0
        self.step = DualAveraging(first, target)
        self.adapts_step = adapt_step_size
        self.preconditioner = Preconditioner(metric, len(like)) if metric else None
        self.metric: Any = Diagonal(torch.ones_like(like))
        self.length = Length() if chees else None
        self.next_metric, self.end, self.level = 0, self.window, math.inf
        self.moved: list[tuple[int, int]] = []
        self.source: Tensor | None = None

    @property
    def late(self) -> int:
        """From which move on the metric stands."""
        return self.num - max(self.num // 6, min(50, self.num // 3))

    @property
    def adapted(self) -> Adapted:
        """What the next move uses."""
        num = self.length.best if self.length else 1
        step = self.step.best if self.count >= self.num else self.step.step_size
        step = step if self.adapts_step else self.step.center.exp()
        return Adapted(step, self.metric, num, tuple(self.moved))

    def hand_on(self, adapted: Adapted) -> None:
        """Begin with what another warm-up has found."""
        self.step.restart(adapted.step_size)
        self.metric = adapted.metric
        if self.length is not None:
            self.length.best = adapted.num_steps

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        conditioner = self.preconditioner
        return {
            "count": self.count,
            "step": dict(vars(self.step)),
            "preconditioner": conditioner and conditioner.state(),
            "metric": list(self.metric),
            "length": self.length and dict(vars(self.length)),
            "next_metric": self.next_metric,
            "window": (self.window, self.end, self.level),
            "moved": self.moved,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """From a checkpoint."""
        self.count, self.next_metric = state["count"], state["next_metric"]
        self.window, self.end, self.level = state["window"]
        self.moved = state["moved"]
        vars(self.step).update(state["step"])
        if self.preconditioner is not None:
            self.preconditioner.restore(state["preconditioner"])
        kind = Dense if len(state["metric"]) == len(Dense._fields) else Diagonal
        self.metric = kind(*state["metric"])
        if self.length is not None:
            vars(self.length).update(state["length"])

    def update(self, before: State, state: State, info: Any, seen: list) -> None:
        """Take in a move of all chains, and what was seen on the way."""
        self.count += 1
        late = self.late
        if self.adapts_step:
            self.step.update(info.accept_prob.mean())
        if self.preconditioner is not None and self.count < late:
            self._condition(state)
        if self.length is not None and seen:
            center = before.position.mean(0)
            if self.preconditioner is not None and self.preconditioner.mean is not None:
                center = self.preconditioner.mean
            self.length.update(center, seen[0][1], seen[1:])
        if self.count == self.end and self.count < late:
            self._renew(state)
        if self.count == late and self.adapts_step:
            self.step.restart(self.step.step_size)

    def _condition(self, state: State) -> None:
        """Let the metric follow the chains."""
        assert self.preconditioner is not None
        self.preconditioner.update(state.position, state.grad)
        if self.count < self.next_metric:
            return
        old, self.metric = type(self.metric), self.preconditioner.metric()
        self.next_metric = max(self.count + 1, math.ceil(1.05 * self.count))
        if type(self.metric) is not old:
            self._learn_anew()

    def _learn_anew(self) -> None:
        """Forget what was learned with another metric."""
        if self.length is not None:
            self.length.forget()
        if self.adapts_step:
            self.step.restart(self.step.step_size)

    def _renew(self, state: State) -> None:
        """Forget what is older than a window, and look for chains that are lost."""
        num_dims, num_chains = state.position.shape[-1], state.energy.shape[-1]
        level = float(state.energy.sort(-1).values[..., (num_chains - 1) // 4].mean())
        falling = level < self.level - 2.0 * math.sqrt(num_dims)
        self.level = level
        if not falling:
            self.window *= 2
        self.end = self.count + self.window
        if self.preconditioner is not None:
            self.preconditioner.renew()
        self._learn_anew()
        if falling and self.length is not None:
            self.length.best = self.length.start
        first = self.falling if falling else self.early
        if self.count >= first * self.num and state.energy.dim() == 1:
            self.source = rescue(state.energy, num_dims)
            if self.source is not None:
                same = torch.arange(num_chains, device=self.source.device)
                lost = (self.source != same).nonzero()[:, 0].tolist()
                self.moved += [(self.count, chain) for chain in lost]

    def moves(self) -> Tensor | None:
        """Return from which chain each is to go on after the last update, if from another."""
        source, self.source = self.source, None
        return source
