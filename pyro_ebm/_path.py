"""The path from a proposal to a distribution: particles that go along it, and replicas."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_ebm._free import Free, MakeKernel, inside
from pyro_ebm._guard import UnnormalizedWarning
from pyro_ebm._replicas import Replicas
from pyro_ebm.distribution import GibbsBoltzmann, unvalidated
from pyro_ebm.energy import Energy, describe
from pyro_ebm.flat import Flat, is_normalized
from pyro_ebm.kernels.base import expand_like, impossible


class Cost(NamedTuple):
    """What a run has spent: points at which the ``energies`` or their ``gradients`` were taken."""

    energies: int
    gradients: int


class Tuning(NamedTuple):
    """How particles move at a temperature: in coordinates divided by ``scale``.

    ``scale`` is ``(*batch, *free)``, ``log_step`` the log of the kernel's step, ``(*batch,)``.
    """

    scale: Tensor
    log_step: Tensor


class Ladder(NamedTuple):
    """Temperatures ``t``, the ``length`` of the path up to each, and tuning, stacked."""

    t: Tensor
    length: Tensor
    tuning: Tuning


class Particles(NamedTuple):
    """Particles ``z``, ``(n, *batch, *free)``, weights, log Z put aside, and first ancestors."""

    z: Tensor
    log_weight: Tensor  # shape: (n, *batch)
    offset: Tensor  # shape: (*batch,)
    ancestor: Tensor  # shape: (n, *batch)


class Drawn(NamedTuple):
    """Draws along a path: ``excess`` V ``(K, T, C, *batch)`` at the levels ``betas`` ``(K,)``.

    ``x`` ``(T, C, *batch, *event)`` are those of the last level.
    """

    betas: Tensor
    excess: Tensor
    x: Tensor


class Path:
    r"""The geometric path from a law that can be drawn, q, to a Gibbs-Boltzmann distribution.

    .. math:: U_t(x) = -(1 - t) \log q(x) + t \, (\beta E(x) - \log b(x))

    Particles live in free coordinates, and ``log_mass`` is the log of the mass of q, nothing
    unless it is flat. NaN energies are counted and taken for walls.

    Args:
        d: The distribution.
        proposal: The law q; the base if None.
        kernel: Makes a kernel of a potential, on continuous supports also of a step.

    Raises:
        ValueError: If the law is not normalised, or of another event shape.
    """

    def __init__(
        self, d: GibbsBoltzmann, proposal: Any = None, kernel: MakeKernel | None = None
    ) -> None:
        q = d.base if proposal is None else proposal
        _check_proposal(d, q)
        self.d, self.free = d, Free(d, kernel)
        self.log_mass = q.log_volume if isinstance(q, Flat) else 0.0
        self._proposal = unvalidated(q.expand(d.batch_shape))
        # points of chains are of the support of the distribution, but for rounding
        self._within = repr(q.support) == repr(d.support)
        self._evaluations, self._gradients = 0, 0
        self._num_nan: Any = 0
        self._num_low: Any = 0

    @property
    def cost(self) -> Cost:
        """What has been spent so far."""
        return Cost(self._evaluations - self._gradients, self._gradients)

    def report(self, what: str) -> None:
        """Refuse energies of minus infinity, and name NaN ones."""
        name = describe(self.d.energy)
        if self._num_low:
            raise ValueError(
                f"{name} must not be minus infinity, which is no density; it was at "
                f"{int(self._num_low)} of {self._evaluations} points"
            )
        if self._num_nan:
            warnings.warn(
                f"{name} was NaN at {int(self._num_nan)} of {self._evaluations} points that "
                f"{what} visited; they weigh nothing",
                UnnormalizedWarning,
                stacklevel=4,
            )

    def sample(self, shape: Sequence[int]) -> Tensor:
        """Draw points ``(*shape, *batch, *event)`` of q, which may lie outside the support."""
        return self._proposal.sample(torch.Size(shape))

    def draw(self, num: int) -> Particles:
        """Draw particles, whose weights have the mass of q; those outside weigh nothing."""
        x, fine = inside(self.d.base, self.sample((num,)))
        mass = torch.full(fine.shape, self.log_mass).to(self.d.floating())
        rows = torch.arange(num, device=x.device).reshape(-1, *[1] * (fine.dim() - 1))
        log_weight = torch.where(fine, mass, -torch.inf)
        zero = torch.zeros_like(mass[0])
        return Particles(self.free.encode(x), log_weight, zero, rows.expand(fine.shape))

    def _ends(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the potentials of q and of the distribution at points of the support."""
        if self._within:
            start = -self._proposal.log_prob(x)
        else:
            y, fine = inside(self._proposal, x)
            start = torch.where(fine, -self._proposal.log_prob(y), torch.inf)
        end = self.d.potential(x)
        self._evaluations += end.numel()
        self._gradients += end.numel() if x.requires_grad else 0
        # trajectories that diverge end at infinity, where an energy may be anything
        real = x.isfinite().flatten(end.dim()).all(-1) if x.dim() > end.dim() else x.isfinite()
        self._num_nan = self._num_nan + (end.isnan() & real).sum()
        self._num_low = self._num_low + ((end == -torch.inf) & real).sum()
        return start, torch.where(impossible(end), torch.inf, end)

    def excess(self, x: Tensor) -> Tensor:
        """Return what the potential gains from one end to the other at any points."""
        x, fine = inside(self.d.base, x)
        start, end = self._ends(x)
        return torch.where(fine & (end < torch.inf), end - start, torch.inf)

    def tilt(self, z: Tensor) -> Tensor:
        """Return the same at free coordinates, which are of the support but for rounding."""
        start, end = self._ends(self.free.decode(z))
        return torch.where(end == torch.inf, torch.inf, end - start)

    def at(self, t: Tensor) -> Energy:
        """Return the potential of the free coordinates at a temperature; walls are at all."""

        def mixed(x: Tensor) -> Tensor:
            start, end = self._ends(x)
            part = (1.0 - t) * torch.where(t < 1, start, 0.0)
            return torch.where(end == torch.inf, torch.inf, part + t * end)

        return self.free.pull(mixed)

    def move(
        self, z: Tensor, t: Tensor, tuning: Tuning, num_moves: int = 1
    ) -> tuple[Tensor, Tensor]:
        """Move particles at a temperature; return them and the rates of acceptance."""
        potential, scale = self.at(t), tuning.scale
        step = tuning.log_step.exp().expand(z.shape[: 1 + tuning.log_step.dim()])
        if self.free.finite:
            kernel = self.free.kernel(potential, step)
        else:
            kernel, z = self.free.kernel(lambda y: potential(y * scale), step), z / scale
        state, rate = kernel.init(z), torch.zeros_like(tuning.log_step)
        for _ in range(num_moves):
            state, info = kernel.step(state)
            rate = rate + info.accept_prob.mean(0) / num_moves
        return (state.position if self.free.finite else state.position * scale), rate


def _check_proposal(d: GibbsBoltzmann, q: Any) -> None:
    if q.event_shape != d.event_shape:
        raise ValueError(
            f"proposal must have the event shape {tuple(d.event_shape)}, got "
            f"{tuple(q.event_shape)}"
        )
    if isinstance(q, Flat) and not math.isfinite(q.log_volume):
        got = "None" if q is d.base else "such a one"
        raise ValueError(
            f"proposal must be given where the base is Flat on an infinite volume, got {got}"
        )
    if not is_normalized(q):
        raise ValueError(
            "proposal (or base) must be normalised, got a GibbsBoltzmann without log_partition"
        )


def increment(tilt: Tensor, dt: Tensor) -> Tensor:
    """Return what the log weights gain from a step of the temperature, which walls survive."""
    return torch.where(dt == 0, 0.0, -dt * tilt)


def anneal(
    path: Path, z: Tensor, log_weight: Tensor, ladder: Ladder, *, reverse: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Move particles along a ladder, up or down, and weigh them before each move.

    .. math:: \log w = -\sum_k (t_{k + 1} - t_k) (U_1 - U_0)(x_k)

    Returns:
        The particles, their log weights and the rate of acceptance, ``(*batch,)``.

    References:
        | Annealed Importance Sampling (Neal, 2001)
        | https://doi.org/10.1023/A:1008923215028
    """
    rungs = range(len(ladder.t) - 1)
    rate = torch.zeros_like(ladder.t[0])
    for k in reversed(rungs) if reverse else rungs:
        here, there = (k + 1, k) if reverse else (k, k + 1)
        dt = ladder.t[there] - ladder.t[here]
        log_weight = log_weight + increment(path.tilt(z), dt)
        if there:  # the proposal itself is drawn from, not moved in
            z, accepted = path.move(z, ladder.t[there], Tuning(*(a[there] for a in ladder.tuning)))
            rate = rate + accepted / len(rungs)
    return z, log_weight, rate


def replicate(
    path: Path, betas: Tensor, num_chains: int, num: int, warmup: int, respace: bool = False
) -> Drawn:
    """Draw from all levels by replica exchange, from the first of them exactly."""

    def renew(z: Tensor) -> Tensor:
        x = path.sample(z.shape[:2])
        return torch.where(expand_like(path.excess(x).isfinite(), z), path.free.encode(x), z)

    x, levels = _starts(path, num_chains), betas.to(path.d.floating())
    replicas = Replicas(path.free, lambda z, t: path.at(t)(z), levels, x, renew)
    replicas.warm(warmup, respace)
    rows, points = [], []
    for _ in range(num):
        replicas.step()
        first = path.excess(path.sample((1, num_chains)))
        rows.append(torch.cat([first, path.tilt(replicas.position[1:])]))
        points.append(path.free.decode(replicas.position[-1]))
    return Drawn(replicas.betas, torch.stack(rows, 1), torch.stack(points))


def _starts(path: Path, num: int) -> Tensor:
    """Draw points of finite energy to start from."""
    x = path.sample((num,))
    for _ in range(20):
        bad = ~path.excess(x).isfinite()
        if not bool(bad.any()):
            return x
        x = torch.where(expand_like(bad, x), path.sample((num,)), x)
    path.report("MBAR")
    raise ValueError(
        f"{describe(path.d.energy)} must be finite at draws of the base (or proposal), got "
        f"infinity or NaN 20 times in a row at {int(bad.sum())} of {bad.numel()} chains; pass a "
        "proposal that covers the region of finite energy"
    )
