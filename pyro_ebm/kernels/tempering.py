"""Replica exchange: chains at several temperatures that trade their states."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_ebm.energy import Energy
from pyro_ebm.kernels.base import Kernel, S, accept, expand_like, impossible


class TemperedState(NamedTuple):
    """Replicas on a ladder of K temperatures, the hottest first, the target last.

    ``inner`` is the inner kernel's state, whose tensors begin with ``(K, *chains)``; ``odd`` says
    which pairs are next. For each level, ``replica`` ``(K, *chains)`` is the index of the replica
    that is there and ``direction`` ``(K, *chains)`` where it goes: 1 from the hot end to the cold,
    -1 back, 0 before it has seen the hot end. ``round_trips`` ``(*chains,)`` counts the trips hot
    to cold to hot of all replicas. ``position``, ``energy`` and ``grad`` are those of the target.
    """

    inner: Any
    odd: Tensor
    replica: Tensor
    direction: Tensor
    round_trips: Tensor

    @property
    def position(self) -> Tensor:
        """The positions at the target, ``(*chains, *event)``."""
        return self.inner.position[-1]

    @property
    def energy(self) -> Tensor:
        """Their potentials, ``(*chains,)``."""
        return self.inner.energy[-1]

    @property
    def grad(self) -> Tensor:
        """The gradients of the potential, where the inner kernel has them."""
        return self.inner.grad[-1]


class TemperedInfo(NamedTuple):
    """The record of a move of all replicas, and of the swaps after it.

    ``energy``, ``accept_prob``, ``accepted`` and ``invalid``, ``(*chains,)``, are as in
    :class:`~pyro_ebm.kernels.MoveInfo`, at the target: the energy that after the swaps, the others
    those of the inner kernel's move; a chain that sits where ``energy`` is NaN or minus infinity
    cannot swap and is ``invalid`` too. ``swap_prob`` ``(K-1, *chains)`` is the probability of each
    swap of neighbours, NaN for the pairs that were not tried; ``inner`` the inner kernel's record
    of all levels; ``round_trips`` ``(*chains,)`` the trips so far.
    """

    energy: Tensor
    accept_prob: Tensor
    accepted: Tensor
    invalid: Tensor
    swap_prob: Tensor
    inner: Any
    round_trips: Tensor


def tempered(
    make: Callable[[Energy], Kernel],
    energy: Energy | None,
    betas: Tensor,
    *,
    base_energy: Energy | None = None,
    path: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Kernel:
    r"""Parallel tempering (replica exchange) around any kernel.

    .. math::
        U_k(x) = U_0(x) + \beta_k E(x), \quad
        \Pr(x_i \leftrightarrow x_j) = \min(1, e^{(\beta_i - \beta_j)(E(x_i) - E(x_j))})

    One step moves all replicas of all chains as one batch, then swaps neighbours, the even pairs
    at one step and the odd ones at the next, which carries replicas along the ladder without
    reversal. Whole states are swapped, momenta included, whose law must be that of all levels.
    Where ``energy`` is infinite is a wall at :math:`\beta = 0` too. Without a ``base_energy`` and
    with all betas positive a swap costs nothing; otherwise one more evaluation per step.

    Args:
        make: Makes the inner kernel of the potential of all levels, points
            ``(K, *chains, *event)`` to ``(K, *chains)``: a step size per level is ``(K, 1)`` for
            chains ``(n,)``.
        energy: The tempered part E, ``(*batch, *event)`` to ``(*batch,)``; None with a ``path``.
        betas: The inverse temperatures, increasing, of shape ``(K,)``; the last is the target's.
        base_energy: The part :math:`U_0` that is not tempered; by default zero.
        path: Instead of both, the potential as a function of points ``(*batch, *event)`` and of
            inverse temperatures that broadcast to ``(*batch,)``.

    Returns:
        The kernel, with :class:`~pyro_ebm.kernels.TemperedState` and
        :class:`~pyro_ebm.kernels.TemperedInfo`. All levels of a chain start at one point, so the
        hot ones must warm up even where the points are draws from the target.

    Raises:
        TypeError: If ``betas`` is not a floating-point tensor.
        ValueError: If ``betas`` is not a vector of two or more finite numbers that increase from
            0 or above.

    References:
        | Replica-Exchange Monte Carlo Method for the Isobaric-Isothermal Ensemble (Okabe et al.,
          2001)
        | https://doi.org/10.1016/S0009-2614(01)00055-0
        | Non-Reversible Parallel Tempering: a Scalable Highly Parallel MCMC Scheme (Syed,
          Bouchard-Cote, Deligiannidis, Doucet, 2021)
        | https://doi.org/10.1111/rssb.12464

    Example:
        >>> wells = lambda x: 4.0 * (x.square() - 1.0).square().sum(-1)
        >>> betas = torch.tensor([0.1, 0.3, 1.0])
        >>> step = 0.03 / betas.unsqueeze(-1)  # (K, 1): levels by chains
        >>> kernel = tempered(lambda potential: ebm.kernels.mala(potential, step), wells, betas)
        >>> state, info = kernel.step(kernel.init(torch.ones(5, 1)))
        >>> state.position.shape, info.swap_prob.shape
        (torch.Size([5, 1]), torch.Size([2, 5]))
    """
    _check_betas(betas)
    if (energy is None) == (path is None):
        raise ValueError("energy or path must be given, and not both")
    whole = path or _linear(energy, base_energy)
    # what E is follows from the potential
    free = path is None and base_energy is None and bool(betas[0] > 0)

    @functools.cache
    def inner(num_chain_dims: int) -> Kernel:
        """Make the inner kernel; its potential takes further batch dimensions on the left."""
        ladder = betas.reshape(-1, *[1] * num_chain_dims)
        return make(lambda x: whole(x, _cast(ladder, x)))

    def init(position: Tensor) -> TemperedState:
        with torch.no_grad():
            like = whole(position, _cast(betas[-1], position))
        state = inner(like.dim()).init(position.expand(len(betas), *position.shape).clone())
        replica = torch.arange(len(betas), device=like.device)
        replica = expand_like(replica, state.energy).expand(state.energy.shape).clone()
        odd = torch.zeros((), dtype=torch.bool, device=like.device)
        trips = torch.zeros_like(like, dtype=torch.long)
        return TemperedState(state, odd, replica, *_travel(torch.zeros_like(replica), trips))

    def step(state: TemperedState) -> tuple[TemperedState, TemperedInfo]:
        kernel = inner(state.round_trips.dim())
        moved, record = kernel.step(state.inner)
        ladder = _ladder(betas, moved.energy, state.round_trips.dim())
        with torch.no_grad():
            if energy is None:
                part = moved.energy
                prob, swapped = _crossings(whole, ladder, moved, state.odd)
            else:
                part = moved.energy / ladder if free else energy(moved.position)
                prob, swapped = _swaps(ladder, part, state.odd)
        source = _source(swapped)
        settled = _exchange(moved, source)
        if free:
            settled = _rescale(settled, ladder, source)
        else:
            settled = _refresh(settled, kernel.init(settled.position), source)
        travelled = _travel(_take(state.direction, source), state.round_trips)
        new = TemperedState(settled, ~state.odd, _take(state.replica, source), *travelled)
        invalid = record.invalid[-1] | impossible(part[-1])
        cold = (new.energy, record.accept_prob[-1], record.accepted[-1], invalid)
        return new, TemperedInfo(*cold, prob, record, new.round_trips)

    return Kernel(init, step)


def _linear(
    energy: Energy | None, base_energy: Energy | None
) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the potential of points and inverse temperatures; infinite E is always a wall."""
    assert energy is not None

    def whole(x: Tensor, beta: Tensor) -> Tensor:
        value = energy(x)
        total = torch.where(value == torch.inf, value, beta * value)
        return total if base_energy is None else total + base_energy(x)

    return whole


def _check_betas(betas: Tensor) -> None:
    if not (isinstance(betas, Tensor) and betas.is_floating_point()):
        got = betas.dtype if isinstance(betas, Tensor) else type(betas).__name__
        raise TypeError(f"betas must be a floating-point tensor, got {got}")
    right = betas.dim() == 1 and len(betas) > 1 and betas.isfinite().all() and betas[0] >= 0
    if not (right and (betas.diff() > 0).all()):
        raise ValueError(
            "betas must be a vector of at least 2 finite numbers that increase from 0 or above, "
            f"got {betas.tolist()}"
        )


def _ladder(betas: Tensor, like: Tensor, num_chain_dims: int) -> Tensor:
    """Return the inverse temperatures with a dimension for each of the chains'."""
    return betas.to(like).reshape(-1, *[1] * num_chain_dims)


def _cast(betas: Tensor, x: Tensor) -> Tensor:
    """Give inverse temperatures the type of points, unless those are whole numbers."""
    return betas.to(x) if x.is_floating_point() else betas.to(x.device)


def _swaps(ladder: Tensor, part: Tensor, odd: Tensor) -> tuple[Tensor, Tensor]:
    """Return the probabilities of the swaps of neighbours, and which are made.

    ``part`` is the tempered part E alone: what is not tempered cancels.
    """
    return _offer((ladder[:-1] - ladder[1:]) * (part[:-1] - part[1:]), impossible(part), odd)


def _crossings(
    path: Callable[[Tensor, Tensor], Tensor], ladder: Tensor, state: Any, odd: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the same for a potential that is any function of beta: all four energies enter."""
    x, own = state.position, state.energy
    crossed = path(x[1:], ladder[:-1]) + path(x[:-1], ladder[1:])
    return _offer(own[:-1] + own[1:] - crossed, impossible(own), odd)


def _offer(log_ratio: Tensor, bad: Tensor, odd: Tensor) -> tuple[Tensor, Tensor]:
    prob, swapped = accept(log_ratio, bad[:-1] | bad[1:])
    tried = expand_like(_tried(len(log_ratio), odd), prob)
    return torch.where(tried, prob, torch.nan), swapped & tried


def _tried(num_pairs: int, odd: Tensor) -> Tensor:
    """Return the pairs whose turn it is: even and odd ones alternate."""
    return torch.arange(num_pairs, device=odd.device) % 2 == odd


def _source(swapped: Tensor) -> Tensor:  # shape: (K-1, *chains), no two neighbours
    """Return, for each level, the level that its state comes from."""
    up, down = (torch.zeros_like(swapped[:1], dtype=torch.long) for _ in range(2))
    shift = torch.cat([swapped.long(), down]) - torch.cat([up, swapped.long()])
    levels = torch.arange(len(shift), device=shift.device)
    return expand_like(levels, shift) + shift


def _take(part: Tensor, source: Tensor) -> Tensor:
    return part.take_along_dim(expand_like(source, part), 0)


def _exchange(inner: S, source: Tensor) -> S:
    """Move whole states between levels."""
    return inner._make(_take(part, source) for part in inner)


def _rescale(inner: S, ladder: Tensor, source: Tensor) -> S:
    """Give states that were moved the energies and gradients of their new temperature."""
    ratio = ladder / _take(ladder.expand(source.shape), source)  # exactly 1 if it was not moved
    new = {"energy": inner.energy * ratio}
    if hasattr(inner, "grad"):
        new["grad"] = inner.grad * expand_like(ratio, inner.grad)
    return inner._replace(**new)


def _refresh(inner: S, fresh: Any, source: Tensor) -> S:
    """Give states that were moved the energies and gradients of a fresh evaluation."""
    stay = source == expand_like(torch.arange(len(source), device=source.device), source)
    new = {}
    for name in {"energy", "grad"} & set(inner._fields):
        old = getattr(inner, name)
        new[name] = torch.where(expand_like(stay, old), old, getattr(fresh, name))
    return inner._replace(**new)


def _travel(direction: Tensor, round_trips: Tensor) -> tuple[Tensor, Tensor]:
    """Turn replicas round at the ends of the ladder and count those that are back at the hot."""
    cold = torch.where(direction[-1] == 1, -1, direction[-1])
    trips = round_trips + (direction[0] == -1)
    return torch.cat([torch.ones_like(cold)[None], direction[1:-1], cold[None]]), trips


def communication_barrier(betas: Tensor, rejection: Tensor) -> Tensor:
    r"""The communication barrier of a ladder of temperatures, up to each of its levels.

    .. math:: \Lambda(\beta_k) = \sum_{i < k} r_i

    Its last entry is the global barrier: the rejections that a replica meets on its way. It
    depends little on the ladder, and about twice as many levels as it are enough.

    Args:
        betas: The inverse temperatures, increasing, of shape ``(K,)``.
        rejection: The mean rejection rates of swaps of neighbours, of shape ``(K-1,)``:
            ``1 - swap_prob`` averaged over the steps and chains where it is not NaN.

    Returns:
        The barrier at each level, from 0, of shape ``(K,)``.

    Raises:
        TypeError: If ``betas`` is not a floating-point tensor.
        ValueError: If ``betas`` is not as :func:`tempered` takes them, or ``rejection`` not one
            number from 0 to 1 for each pair of neighbours.

    References:
        | Non-Reversible Parallel Tempering: a Scalable Highly Parallel MCMC Scheme (Syed,
          Bouchard-Cote, Deligiannidis, Doucet, 2021)
        | https://doi.org/10.1111/rssb.12464

    Example:
        >>> communication_barrier(torch.tensor([0.0, 0.1, 1.0]), torch.tensor([0.5, 0.25]))
        tensor([0.0000, 0.5000, 0.7500])
    """
    _check_betas(betas)
    shape = tuple(rejection.shape)
    if shape != (len(betas) - 1,):
        raise ValueError(f"rejection must have the shape ({len(betas) - 1},), got {shape}")
    if not ((rejection >= 0) & (rejection <= 1)).all():
        raise ValueError(f"rejection must be between 0 and 1, got {rejection.tolist()}")
    return torch.cat([rejection.new_zeros(1), rejection.cumsum(0)])


def adapt_ladder(betas: Tensor, mean_rejection: Tensor) -> Tensor:
    r"""A better ladder: as many temperatures, at equal steps of the communication barrier.

    .. math:: \Lambda(\beta'_k) = \frac{k}{K - 1} \Lambda(\beta_{K-1}), \quad k = 0, \dots, K - 1

    The barrier is interpolated linearly between the levels, so it is monotone; the ends stay.
    A few rounds, each with rates measured on the ladder of the last, make all rates equal.

    Args:
        betas: The inverse temperatures, increasing, of shape ``(K,)``.
        mean_rejection: Their mean rejection rates, of shape ``(K-1,)``, as
            :func:`communication_barrier` takes them.

    Returns:
        The new inverse temperatures, of shape ``(K,)``.

    Raises:
        TypeError: If ``betas`` is not a floating-point tensor.
        ValueError: As :func:`communication_barrier`.

    References:
        | Non-Reversible Parallel Tempering: a Scalable Highly Parallel MCMC Scheme (Syed,
          Bouchard-Cote, Deligiannidis, Doucet, 2021)
        | https://doi.org/10.1111/rssb.12464

    Example:
        >>> adapt_ladder(torch.tensor([0.0, 0.5, 1.0]), torch.tensor([0.6, 0.2]))
        tensor([0.0000, 0.3333, 1.0000])
    """
    communication_barrier(betas, mean_rejection)  # its checks
    # A stretch without rejections gets a share too small to see: the barrier must increase.
    barrier = communication_barrier(betas, mean_rejection.clamp(min=1e-6)).to(betas)
    wanted = torch.linspace(0.0, 1.0, len(betas)).to(betas)[1:-1] * barrier[-1]
    right = torch.searchsorted(barrier, wanted).clamp(1, len(betas) - 1)
    share = (wanted - barrier[right - 1]) / (barrier[right] - barrier[right - 1])
    inside = torch.lerp(betas[right - 1], betas[right], share)
    return torch.cat([betas[:1], inside, betas[-1:]])
