"""Negatives that last: Markov chains of the model that go on while it learns."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_ebm._binding import sampling
from pyro_ebm._free import Free, MakeKernel
from pyro_ebm._math import mean_weight, systematic
from pyro_ebm._short_run import TARGET_ACCEPT
from pyro_ebm._traced import traced
from pyro_ebm.distribution import Flat, GibbsBoltzmann
from pyro_ebm.energy import Energy
from pyro_ebm.kernels.base import Kernel, check_count, check_positive, check_share, expand_like
from pyro_ebm.kernels.langevin import mala, ula

__all__ = ["Chains", "Moved", "Negatives", "split_r_hat"]

WARM_UP = 200  # moves after each of which the step is adapted; later once per call


class Chains(NamedTuple):
    """Chains in their slots, the state of :class:`Negatives`: tensors and one number.

    ``position`` ``(n, *batch, *free)`` is in free coordinates (on the reals and on finite
    supports of numbers: the points), ``energy`` ``(n, *batch)`` the potential at the parameters
    of the last move, NaN before the first. ``age`` counts a chain's moves since it started;
    ``momentum`` and ``label`` ``(n, *label)`` go with the chains where there are any;
    ``log_step`` ``(*batch,)`` is what was adapted in ``num_moves`` moves; ``recent``
    ``(n, *batch, num_recent)`` has the last energies, the newest last.

    Weighted chains have ``log_weight`` ``(n, *batch)``, and the log Z and its variance that
    resampling has put aside, ``offset`` and ``variance`` ``(*batch,)``.
    """

    position: Tensor
    energy: Tensor
    age: Tensor
    recent: Tensor
    momentum: Tensor | None
    label: Tensor | None
    log_weight: Tensor | None
    log_step: Tensor
    offset: Tensor
    variance: Tensor
    num_moves: int


PER_CHAIN, SHARED = Chains._fields[:7], Chains._fields[7:10]


class Moved(NamedTuple):
    """What a step has moved: negatives, ready for a loss.

    The points ``x`` ``(m, *batch, *event)``, their ``label``, and ``log_weight`` where chains
    are weighted; ``slots`` ``(m,)`` says which chains these are, None all. ``info`` is the
    kernel's record of the last move, ``accept_prob`` ``(m, *batch)`` the mean over all moves and
    ``halfway`` ``(m, *batch)`` the energies after half of them.
    """

    x: Tensor
    label: Tensor | None
    log_weight: Tensor | None
    slots: Tensor | None
    info: Any
    accept_prob: Tensor
    halfway: Tensor


class Negatives:
    r"""Markov chains of a model that go on while it learns, as pure functions of their state.

    Chains keep their slots: a step moves all of them, or some, and writes these back to their
    places. It evaluates the energy anew, at the parameters of the moment, in evaluation mode,
    and records no gradient of parameters; the points have none. Nothing in it waits for the
    device. All randomness is torch's generator.

    ``weighted`` chains (Jarzynski) start at a normalised base and make up for their lag behind
    the moving parameters: with :math:`U_t` the potential at step t,

    .. math:: \log w \leftarrow \log w + U_{t-1}(x) - U_t(x), \quad
        \mathbb{E}[w f(x)] = Z_t \, \mathbb{E}_{p_t}[f(x)] ,

    for a kernel that leaves the law of the moment invariant. They are resampled as their
    effective number falls below one half.

    Args:
        target: A :class:`~pyro_ebm.GibbsBoltzmann`, or, with ``base``, an energy. Of the latter
            Pyro's parameters are read at each step; a distribution has those of its making.
        base: The base of a target that is a plain energy.
        kernel: Makes a kernel of a potential and a step, as ``lambda u, eps: hmc(u, eps, 5)``;
            for a finite support, of the potential alone. By default
            :func:`~pyro_ebm.kernels.mala`, or sweeps of :func:`~pyro_ebm.kernels.gibbs`.
        num_steps: The number of moves per step.
        step_size: The step; if None it is adapted to an acceptance of .574 of MALA, .8 of others.
        restart: The probability that a chain starts anew, per chain and step.
        weighted: Whether chains are weighted.
        num_recent: How many energies of each chain are remembered, for :meth:`r_hat`.
        backend: ``"eager"``, or ``"traced"``: moves run as tensor operations, traced once, which
            takes half the time where energies are small. Parameters are to change in place, as
            by optimisers. Each step waits for the device to compare energies with eager ones;
            where they differ, as of energies that are random, it goes on eagerly, and warns.

    Raises:
        TypeError: If the target is none.
        ValueError: If an argument is out of its range.

    References:
        | Training Restricted Boltzmann Machines using Approximations to the Likelihood Gradient
          (Tieleman, 2008)
        | https://doi.org/10.1145/1390156.1390290
        | Implicit Generation and Modeling with Energy Based Models (Du and Mordatch, 2019)
        | https://arxiv.org/abs/1903.08689
        | Efficient Training of Energy-Based Models Using Jarzynski Equality (Carbone, Hua, Coste
          and Vanden-Eijnden, 2023)
        | https://arxiv.org/abs/2305.19414

    Example:
        >>> k = torch.nn.Parameter(torch.tensor(1.0))
        >>> energy = lambda x: 0.5 * k * x.square().sum(-1)
        >>> negatives = Negatives(energy, ebm.Flat((2,)), num_steps=5)
        >>> chains = negatives.init(1000)
        >>> chains, moved = negatives.step(chains, 128)         # of a random 128 of them
        >>> loss = ebm.losses.contrastive_divergence(energy, torch.randn(64, 2), moved.x)
        >>> moved.x.shape, int((chains.age > 0).sum())
        (torch.Size([128, 2]), 128)
    """

    def __init__(  # noqa: PLR0913 - what chains are, and how they move
        self,
        target: GibbsBoltzmann | Energy,
        base: Any = None,
        kernel: MakeKernel | None = None,
        num_steps: int = 20,
        *,
        step_size: float | None = None,
        restart: float = 0.0,
        weighted: bool = False,
        num_recent: int = 0,
        backend: str = "eager",
    ) -> None:
        if base is not None:
            target = GibbsBoltzmann._conditional(target, base, 1.0, torch.Size())
        if not isinstance(target, GibbsBoltzmann):
            got = type(target).__name__
            raise TypeError(f"target must be a GibbsBoltzmann or an energy with a base, got {got}")
        check_count("num_steps", num_steps, 1)
        check_count("num_recent", num_recent, 0)
        self._traced = traced(backend)
        check_share("restart", restart)
        if step_size is not None:
            check_positive("step_size", step_size)
        elif kernel is ula:
            raise ValueError("step_size must be given for ula, which has no rate to adapt to")
        # Elements of a batch that differ in nothing, as groups, are chains like any others.
        origin = target._origin or target
        self._law = target if origin.batch_shape else origin
        self.d, self.num_steps, self.restart_prob = target, num_steps, restart
        self.step_size, self.weighted, self.num_recent = step_size, weighted, num_recent
        self.free = Free(self._law, kernel)
        if self.free.finite and kernel in (mala, ula):
            raise ValueError(
                f"kernel must be one for the finite support {target.support}, as gibbs, got "
                f"{kernel.__name__}"
            )
        if kernel is None and not self.free.finite:
            self.free.own = mala
        self.accept = TARGET_ACCEPT if self.free.own is mala else 0.8
        self._volume = target.base.log_volume if isinstance(target.base, Flat) else 0.0
        if weighted and not (math.isfinite(self._volume) and kernel is not ula):
            raise ValueError(
                "weighted chains need a base of finite volume and an exact kernel, got "
                f"{type(target.base).__name__} and {getattr(kernel, '__name__', kernel)}"
            )

    # How chains start ------------------------------------------------------------------------

    def init(self, start: int | Tensor, label: Tensor | None = None) -> Chains:
        """Place chains.

        Args:
            start: Their number, to start at draws from the base, or points
                ``(n, *batch, *event)``: from data it is contrastive divergence.
            label: What the energy is given beside each chain's point, ``(n, *label)``: it is
                then ``energy(x, label)``.

        Raises:
            ValueError: If weighted chains are to start at points, or to have labels; if there
                are none, or points have another shape or lie outside the support.
        """
        if self.weighted and (isinstance(start, Tensor) or label is not None):
            raise ValueError("weighted chains must start at the base, without label")
        d = self.d
        if isinstance(start, Tensor):
            _check_points(d, start)
        else:
            check_count("start", start, 1)
        with torch.inference_mode(False), torch.no_grad():
            x = d.base.sample(torch.Size((start,))) if isinstance(start, int) else start.detach()
            z = self.free.encode(x)
            shape, like = z.shape[: z.dim() - len(self.free.shape)], d.floating()
            step = torch.full(d.batch_shape, math.log(self.step_size or 0.1)).to(like)
            energy = self._base_energy(z) if self.weighted else like.new_full(shape, math.nan)
            return Chains(
                position=z,
                energy=energy,
                age=torch.zeros(shape, dtype=torch.long, device=like.device),
                recent=like.new_full((*shape, self.num_recent), math.nan),
                momentum=None,
                label=label,
                log_weight=torch.zeros_like(energy) if self.weighted else None,
                log_step=step,
                offset=torch.zeros_like(step),
                variance=torch.zeros_like(step),
                num_moves=0,
            )

    def _base_energy(self, z: Tensor) -> Tensor:
        """Return the potential of the base's law, in free coordinates."""
        return self.free.pull(lambda x: -self._law._measure.log_prob(x))(z) + self._volume

    def restart(
        self, chains: Chains, pick: Tensor, x: Tensor | None = None, label: Tensor | None = None
    ) -> Chains:
        """Start some chains anew, with what has been adapted.

        Args:
            chains: The chains.
            pick: Which of them, ``(n, *batch)``.
            x: Points ``(m, *batch, *event)`` to start at, each used about equally often; by
                default draws from the base.
            label: The labels of these points; by default chains keep theirs.
        """
        n = len(chains.position)
        if x is not None:
            rows = spread(len(x), n, x.device)
            x, label = x[rows], None if label is None else label[rows]
        new = self.init(n if x is None else x, chains.label if label is None else label)
        if new.log_weight is not None:  # resampling has put the offset aside
            new = new._replace(log_weight=new.log_weight - chains.offset)
        if chains.momentum is not None:
            new = new._replace(momentum=torch.randn_like(chains.momentum))
        parts = {name: (getattr(new, name), getattr(chains, name)) for name in PER_CHAIN}
        chosen: dict[str, Any] = {
            name: torch.where(expand_like(pick, a), a, b)
            for name, (a, b) in parts.items()
            if a is not None
        }
        return chains._replace(**chosen)

    # How they move ---------------------------------------------------------------------------

    def step(
        self,
        chains: Chains,
        slots: int | Tensor | None = None,
        *,
        x: Tensor | None = None,
        label: Tensor | None = None,
    ) -> tuple[Chains, Moved]:
        """Move chains to the present parameters.

        Args:
            chains: The chains; they are not changed.
            slots: Which move, ``(m,)``, without repetition, or how many random ones; by default
                all.
            x: Points from which chains restart; by default from the base.
            label: The labels of these points.

        Returns:
            All chains, and the negatives: those that have moved.

        Raises:
            ValueError: If only some weighted chains are to move, more than there are, or none;
                if the step of a kernel that accepts all moves is not given, or weights are asked
                of such a kernel.
        """
        if slots is not None and self.weighted:
            raise ValueError("weighted chains must all move, got slots")
        if isinstance(slots, int):
            check_count("slots", slots, 1, len(chains.age))
            slots = torch.randperm(len(chains.age), device=chains.age.device)[:slots]
        part = chains if slots is None else take(chains, slots)
        d = self.d
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            d._binding.active(),
            sampling(d.energy),
        ):
            if self.restart_prob:
                pick = torch.rand(part.age.shape, device=part.age.device) < self.restart_prob
                part = self.restart(part, pick, x, label)
            part, *record = self._move(part)
            points = self.free.decode(part.position)
            moved = Moved(points, part.label, part.log_weight, slots, *record)
        return (part if slots is None else put(chains, part, slots)), moved

    def _potential(self, chains: Chains) -> Energy:
        """Return the potential of flat chains ``(C, *free)``, without checks."""
        d, label = self._law, chains.label
        beta = None if isinstance(d.beta, float) and d.beta == 1.0 else d.beta
        measure = None if isinstance(d.base, Flat) else d._measure

        def potential(x: Tensor) -> Tensor:
            value = d.energy(x) if label is None else d.energy(x, label)
            value = value if beta is None else beta * value
            return value if measure is None else value - measure.log_prob(x)

        pulled, shape, free = self.free.pull(potential), chains.age.shape, self.free.shape
        if len(shape) == 1 or not (d.batch_shape or label is not None):
            return pulled

        def flat(z: Tensor) -> Tensor:
            lead = z.shape[: z.dim() - 1 - len(free)]  # a kernel may look at several points
            return pulled(z.reshape(*lead, *shape, *free)).reshape(*lead, -1)

        return flat

    def _kernel(self, potential: Energy, log_step: Tensor, shape: torch.Size) -> Kernel:
        step = log_step.exp()
        if step.dim() or self.free.finite:  # one number broadcasts faster
            step = step.expand(shape).reshape(-1)
        if self._traced is None:
            return self.free.kernel(potential, step)
        make = functools.partial(self.free.kernel, potential)
        return self._traced.kernel(make, potential, step)

    def _move(self, chains: Chains) -> tuple[Chains, Any, Tensor, Tensor]:
        """Make all moves of a step; return also what :class:`Moved` records of them."""
        shape, potential = chains.age.shape, self._potential(chains)
        adapts = self.step_size is None and not self.free.finite
        log_step, done = chains.log_step, 0
        kernel = self._kernel(potential, log_step, shape)
        state = kernel.init(chains.position.reshape(-1, *self.free.shape))
        if chains.momentum is not None:
            state = state._replace(momentum=chains.momentum.reshape_as(state.position))
        if self.weighted:
            chains, state = self._reweigh(chains, state)
        halfway = state.energy
        total = torch.zeros((), dtype=state.energy.dtype, device=state.energy.device)
        while done < self.num_steps:
            num = 1 if adapts and chains.num_moves + done < WARM_UP else self.num_steps - done
            left = (self.num_steps + 1) // 2 - done
            state, info, rate, energy = _run(kernel, state, num, left)
            halfway = energy if left > 0 else halfway
            self._check_exact(info)
            total, done = total + rate, done + num
            if adapts:
                i = min(chains.num_moves + done - num, WARM_UP)
                gain = min(num * 2.0 / (1.0 + i) ** 0.6, 2.0 if num == 1 else 1.0)
                mean = (rate / num).reshape(shape).mean(0)
                log_step = log_step + gain * (mean - self.accept)
                if done < self.num_steps:
                    kernel = self._kernel(potential, log_step, shape)
        energy = state.energy.reshape(shape)
        recent = torch.cat([chains.recent, energy.unsqueeze(-1)], -1)[..., 1:]
        momentum = getattr(state, "momentum", None)
        chains = chains._replace(
            position=state.position.reshape(chains.position.shape),
            energy=energy,
            age=chains.age + done,
            recent=recent,
            momentum=None if momentum is None else momentum.reshape(chains.position.shape),
            log_step=log_step,
            num_moves=chains.num_moves + done,
        )
        rate = (total / done).reshape(shape)
        return chains, _shaped(info, shape), rate, halfway.reshape(shape)

    def _check_exact(self, info: Any) -> None:
        """Refuse what kernels cannot do that accept all moves, as ULA."""
        if hasattr(info, "temperature"):
            if self.step_size is None:
                raise ValueError("step_size must be given for a kernel that accepts all moves")
            if self.weighted:
                raise ValueError("weighted must be False for a kernel that accepts all moves")

    def _reweigh(self, chains: Chains, state: Any) -> tuple[Chains, Any]:
        """Weigh chains by the change of their potential since their last move; resample."""
        shape = chains.age.shape
        assert chains.log_weight is not None
        log_weight = chains.log_weight + chains.energy - state.energy.reshape(shape)
        log_weight = torch.where(log_weight.isnan(), -torch.inf, log_weight)
        value, error, ess = mean_weight(log_weight)
        low = ess < len(log_weight) / 2
        stay = torch.arange(len(log_weight), device=low.device).reshape(-1, *[1] * low.dim())
        rows = torch.where(low, systematic(torch.softmax(log_weight, 0)), stay)  # (n, *batch)

        def drawn(part: Tensor) -> Tensor:
            return part.gather(0, expand_like(rows, part).expand_as(part))

        state = state._make(drawn(p.reshape(*shape, *p.shape[1:])).reshape_as(p) for p in state)
        return chains._replace(
            age=drawn(chains.age),
            recent=drawn(chains.recent),
            offset=torch.where(low, chains.offset + value, chains.offset),
            variance=torch.where(low, chains.variance + error.square(), chains.variance),
            log_weight=torch.where(low, 0.0, log_weight),
        ), state

    # What can be said of them ----------------------------------------------------------------

    def r_hat(self, chains: Chains) -> Tensor:
        """Return :func:`split_r_hat` of the chains' last energies, ``(*batch,)``.

        Chains that have not made ``num_recent`` steps are left out.
        """
        return split_r_hat(chains.recent.movedim(-1, 0))

    @staticmethod
    def state_dict(chains: Chains) -> dict[str, Any]:
        """Return the chains and the random state, for :func:`pyro_ebm.checkpoint.save`."""
        device = chains.position.device
        cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        return {**chains._asdict(), "random": torch.get_rng_state(), "random_cuda": cuda}

    @staticmethod
    def load_state_dict(state: dict[str, Any]) -> Chains:
        """Return the chains that were kept, and set the random state back to theirs."""
        torch.set_rng_state(state["random"])
        if state["random_cuda"] is not None:
            torch.cuda.set_rng_state(state["random_cuda"], state["position"].device)
        return Chains(**{name: state[name] for name in Chains._fields})


def _check_points(d: GibbsBoltzmann, x: Tensor) -> None:
    """Refuse points at which no chain can start; on an accelerator they are not looked at."""
    if not len(x) or x.shape[1:] != d.batch_shape + d.event_shape:
        shape = tuple(d.batch_shape + d.event_shape)
        raise ValueError(f"points must be some of shape {shape}, got {tuple(x.shape)}")
    if x.device.type == "cpu" and not bool(d.support.check(x).all()):
        raise ValueError(f"points must lie in the support {d.support}, got some outside")


def spread(num_rows: int, n: int, device: torch.device) -> Tensor:
    """Draw n rows of data, each about equally often."""
    return torch.randperm(num_rows, device=device).repeat(-(-n // num_rows))[:n]


def _axes(chains: Chains, axis: int) -> dict[str, int]:
    """Say where the slots (axis 0) or a dimension of the batch are in what chains have."""
    axes = {name: axis for name in PER_CHAIN if getattr(chains, name) is not None}
    return {**axes, **(dict.fromkeys(SHARED, axis - 1) if axis else {})}


def take(chains: Chains, index: Tensor, axis: int = 0) -> Chains:
    """Take some slots, or some rows of a dimension of the batch."""
    parts = {
        name: getattr(chains, name).index_select(at, index)
        for name, at in _axes(chains, axis).items()
    }
    return chains._replace(**parts)


def put(chains: Chains, part: Chains, index: Tensor, axis: int = 0) -> Chains:
    """Return chains with those that were taken back in their places."""
    if chains.momentum is None and part.momentum is not None:
        chains = chains._replace(momentum=torch.randn_like(chains.position))
    parts = {
        name: getattr(chains, name).index_copy(at, index, getattr(part, name))
        for name, at in _axes(chains, axis).items()
    }
    return part._replace(**parts)


def _run(kernel: Kernel, state: Any, num: int, at: int) -> tuple[Any, Any, Tensor, Tensor]:
    """Make some moves; return the last record, the sum of the rates and energies at a move."""
    state, info = kernel.step(state)
    rate, energy = info.accept_prob, info.energy
    for i in range(2, num + 1):
        state, info = kernel.step(state)
        rate = rate + info.accept_prob
        energy = info.energy if i == at else energy
    return state, info, rate, energy


def _shaped(info: Any, shape: torch.Size) -> Any:
    """Give the record of flat chains their shape."""
    if len(shape) == 1:
        return info
    tensors = (p.reshape(*shape, *p.shape[1:]) if isinstance(p, Tensor) else p for p in info)
    return info._make(tensors)


def split_r_hat(draws: Tensor) -> Tensor:
    r"""Return the split potential scale reduction of chains: near one where they agree.

    .. math:: \hat R = \sqrt{\frac{(h - 1) W / h + B}{W}}

    over the chains' halves of h draws: W is their mean variance and B the variance of their
    means. Chains with a NaN are left out. Of negatives it says little while the parameters move
    fast.

    Args:
        draws: A number per draw and chain, of shape ``(num, n, *batch)``.

    Returns:
        Of shape ``(*batch,)``.

    References:
        | Inference from Iterative Simulation Using Multiple Sequences (Gelman and Rubin, 1992)
        | https://doi.org/10.1214/ss/1177011136

    Example:
        >>> split_r_hat(torch.randn(1000, 4)) < 1.05
        tensor(True)
    """
    half = len(draws) // 2
    fine = ~draws.isnan().any(0)
    draws = torch.where(fine, draws, math.nan)
    halves = torch.stack([draws[:half], draws[len(draws) - half :]], 1)  # shape: (h, 2, n, ...)
    within = halves.var(0).flatten(0, 1).nanmean(0)
    means = halves.mean(0).flatten(0, 1)
    spread = (means - means.nanmean(0)).square().nansum(0) / (2 * fine.sum(0) - 1)
    return (((half - 1) / half * within + spread) / within).sqrt()
