"""Adaptation of step size, metric and trajectory length, pooled over chains."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_ebm.kernels.base import Dense, Diagonal, Metric, State
from pyro_ebm.kernels.tempering import adapt_ladder

__all__ = [
    "Adapted",
    "Covariance",
    "DualAveraging",
    "Ladder",
    "Length",
    "Preconditioner",
    "Warmup",
]


class Adapted(NamedTuple):
    """What warm-up finds: ``step_size``, ``metric``, ``num_steps`` of a trajectory, ``betas``."""

    step_size: Tensor
    metric: Metric
    num_steps: int
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
    from the first moves on, long before the chains have spread over it.

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
        """Forget all that was taken in before the last time that this was called."""
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
    a, b = a.double(), b.double()
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
    return (
        (0.5 * (mean + mean.mT)).to(torch.get_default_dtype()) if mean.isfinite().all() else None
    )


def rescue(energy: Tensor, num_dims: int) -> Tensor | None:
    """Return from which chain each is to go on, if some are lost."""
    good = energy.sort().values[(len(energy) - 1) // 4]
    lost = ~(energy <= good + 20.0 + 10.0 * num_dims)
    if not bool(lost.any()):
        return None
    source = torch.arange(len(energy), device=energy.device)
    others = source[~lost]
    source[lost] = others[torch.arange(int(lost.sum()), device=energy.device) * 7 % len(others)]
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
        \left(\min_d \frac{1 - \rho_d(l)}{1 + \rho_d(l)}\right)^2
        \min_d \frac{1 - \rho^{(2)}_d(l)}{1 + \rho^{(2)}_d(l)} \right)^{1/3}

    is maximised. There is no step size of a stochastic ascent, and one stuck chain weighs one
    chain.

    References:
        | An Adaptive-MCMC Scheme for Setting Trajectory Lengths in Hamiltonian Monte Carlo
          (Hoffman, Radul and Sountsov, 2021)
        | http://proceedings.mlr.press/v130/hoffman21a.html

    Example:
        >>> Length().best
        3
    """

    memory = 0.95
    start = 3
    cap = 1.2
    patience = 5

    def __init__(self) -> None:
        self.best = self.start
        self.forget()

    def forget(self) -> None:
        """Forget what was seen with another metric; keep the number of steps for now."""
        self.sums: dict[int, Tensor] = {}
        self.count = 0

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
        x = torch.stack([x, x.square() - x.square().mean(0)])
        for num, q, accept in ends:
            y = q - center
            y = torch.stack([y, y.square() - (start - center).square().mean(0)])
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
            gap = (moved / spread.clamp(min=torch.finfo(spread.dtype).tiny)).clamp(1e-3, self.cap)
            mean, square = (gap / (2.0 - gap)).min(-1).values.tolist()
            return (mean**2 * square) ** (1 / 3) / num

        return max(self.sums, key=rate)


class Warmup:
    """Finds step size, metric and number of steps together, from all chains.

    In the first tenth the chains find their way with the identity metric; then the metric
    follows the running covariance; in the last sixth it stands and the step size settles.
    """

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
        self.next_metric, self.window_end = 0, 5
        self.source: Tensor | None = None

    @property
    def adapted(self) -> Adapted:
        """What the next move uses."""
        num = self.length.best if self.length else 1
        if not self.adapts_step:
            return Adapted(self.step.center.exp(), self.metric, num)
        done = self.count >= self.num
        return Adapted(self.step.best if done else self.step.step_size, self.metric, num)

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
            "window_end": self.window_end,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """From a checkpoint."""
        self.count, self.next_metric = state["count"], state["next_metric"]
        self.window_end = state["window_end"]
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
        late = self.num - max(self.num // 6, min(50, self.num // 3))
        if self.adapts_step:
            self.step.update(info.accept_prob.mean())
        if self.count < late:
            if self.preconditioner is not None:
                self._condition(state)
            if self.length is not None and seen:
                center = before.position.mean(0)
                if self.preconditioner is not None and self.preconditioner.mean is not None:
                    center = self.preconditioner.mean
                self.length.update(center, before.position, seen)
        if self.count == self.window_end and self.count < late:
            self._renew(state)
        if self.count == late and self.adapts_step:
            self.step.restart(self.step.step_size)

    def _condition(self, state: State) -> None:
        """Let the metric follow the chains."""
        assert self.preconditioner is not None
        self.preconditioner.update(state.position, state.grad)
        if self.count >= self.next_metric:
            self.metric = self.preconditioner.metric()
            self.next_metric = max(self.count + 1, math.ceil(1.05 * self.count))

    def _renew(self, state: State) -> None:
        """Forget the first half, and move chains that are lost."""
        self.window_end *= 2
        if self.preconditioner is not None:
            self.preconditioner.renew()
        if self.length is not None:
            self.length.forget()
        if self.adapts_step:
            self.step.restart(self.step.step_size)
        if self.count >= self.num // 10 and state.energy.dim() == 1:
            self.source = rescue(state.energy, state.position.shape[-1])

    def moves(self) -> Tensor | None:
        """Return from which chain each is to go on after the last update, if from another."""
        source, self.source = self.source, None
        return source


class Ladder(Warmup):
    """Adapts a step size and a metric for each temperature, and the temperatures.

    Args:
        num: The moves of warm-up.
        like: A point, ``(D,)``.
        betas: The inverse temperatures to begin with, ``(K,)``.
        **options: Those of :class:`Warmup`.

    Example:
        >>> betas = torch.tensor([0.1, 1.0])
        >>> options = {"target": 0.8, "step_size": None, "adapt_step_size": True}
        >>> Ladder(100, torch.zeros(2), betas, **options, metric=None, chees=False).adapted.betas
        tensor([0.1000, 1.0000])
    """

    def __init__(self, num: int, like: Tensor, betas: Tensor, **options: Any) -> None:
        super().__init__(num, like, **options)
        self.betas = betas.to(like)
        self.step.restart(self.step.step_size * self.betas.rsqrt())
        self.metric = Diagonal(torch.ones_like(like).expand(len(betas), 1, -1).clone())
        self.rejected = torch.zeros(len(betas) - 1, dtype=torch.double)
        self.tried = torch.zeros(len(betas) - 1, dtype=torch.double)
        self.next_ladder = max(10, num // 16)

    @property
    def adapted(self) -> Adapted:
        return super().adapted._replace(betas=self.betas)

    def hand_on(self, adapted: Adapted) -> None:
        super().hand_on(adapted)
        if adapted.betas is not None:
            self.betas = adapted.betas

    def state(self) -> dict[str, Any]:
        own = ("betas", "rejected", "tried", "next_ladder")
        return {**super().state(), **{name: getattr(self, name) for name in own}}

    def restore(self, state: dict[str, Any]) -> None:
        super().restore(state)
        for name in ("betas", "rejected", "tried", "next_ladder"):
            setattr(self, name, state[name])

    def update_levels(self, position: Tensor, grad: Tensor, accept: Tensor, swap: Tensor) -> None:
        """Take in a move of all replicas.

        Args:
            position: Where they are, ``(K, C, D)``.
            grad: The gradients there.
            accept: The mean acceptance probabilities, ``(K,)``.
            swap: The probabilities of the swaps, ``(K-1, C)``, NaN where none was tried.
        """
        self.count += 1
        late = self.num - max(self.num // 6, min(50, self.num // 3))
        if self.adapts_step:
            self.step.update(accept)
        if self.preconditioner is not None and 5 <= self.count < late:
            self.preconditioner.update(position, grad)
            if self.count >= self.next_metric:
                metric = self.preconditioner.metric()
                self.metric = Diagonal(metric.inverse_mass.unsqueeze(-2))
                self.next_metric = max(self.count + 1, math.ceil(1.05 * self.count))
        self.rejected += (1.0 - swap).nansum(1).cpu()
        self.tried += (~swap.isnan()).sum(1).cpu()
        if self.next_ladder <= self.count < late:
            self._respace()
        if self.count == late and self.adapts_step:
            self.step.restart(self.step.step_size)

    def _respace(self) -> None:
        """Put the temperatures at equal steps of the communication barrier."""
        rejection = (self.rejected / self.tried.clamp(min=1.0)).clamp(0.0, 1.0)
        self.betas = adapt_ladder(self.betas, rejection.to(self.betas))
        self.rejected.zero_()
        self.tried.zero_()
        self.next_ladder = math.ceil(1.5 * self.count)
