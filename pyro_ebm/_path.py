"""Particles on the path from a proposal to a distribution, for annealed and sequential methods."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from pyro.distributions import constraints
from torch import Tensor
from torch.distributions import biject_to
from torch.distributions.transforms import Transform

from pyro_ebm._guard import UnnormalizedWarning
from pyro_ebm._short_run import unconstrained
from pyro_ebm.distribution import GibbsBoltzmann, unvalidated
from pyro_ebm.energy import Energy, describe
from pyro_ebm.flat import Flat, atom, values_of
from pyro_ebm.kernels.base import Kernel, expand_like, impossible
from pyro_ebm.kernels.discrete import gibbs
from pyro_ebm.kernels.hmc import hmc

QUARTER, MAX_STEPS = 1.4, 8  # leapfrog steps run ahead of time, so less than pi / 2

MakeKernel = Callable[..., Kernel]


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


class Path:
    r"""The geometric path from a normalised proposal q to a Gibbs-Boltzmann distribution.

    .. math:: U_t(x) = -(1 - t) \log q(x) + t \, (\beta E(x) - \log b(x))

    Particles live in free coordinates: unconstrained ones with the Jacobian of the support's
    transform, the components themselves on finite supports, and the places of the ones on
    one-hot supports. NaN energies are counted and taken for walls.

    Args:
        d: The distribution.
        proposal: The proposal; the base if None.
        kernel: Makes a kernel of a potential, on continuous supports also of a step.
    """

    def __init__(
        self, d: GibbsBoltzmann, proposal: Any = None, kernel: MakeKernel | None = None
    ) -> None:
        q = d.base if proposal is None else proposal
        _check_proposal(d, q)
        self.d, self._log_volume = d, q.log_volume if isinstance(q, Flat) else 0.0
        self._proposal = unvalidated(q.expand(d.batch_shape))
        self._one_hot = atom(d.support) is constraints.one_hot
        self.finite = self._one_hot or values_of(d.support) is not None
        self._transform = None if self.finite else _transform(d)
        self._make: MakeKernel = kernel or (_sweeps(d) if self.finite else _trajectories)
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

    def encode(self, x: Tensor) -> Tensor:
        """Return the free coordinates of points."""
        if self._one_hot:
            return x.argmax(-1)
        return x if self._transform is None else self._transform.inv(x)

    def decode(self, z: Tensor) -> Tensor:
        """Return the points of free coordinates."""
        if self._one_hot:
            return torch.nn.functional.one_hot(z, self.d.event_shape[-1]).to(self.d.floating())
        return z if self._transform is None else self._transform(z)

    def draw(self, num: int) -> Particles:
        """Draw particles from the proposal; those outside the support weigh nothing."""
        x = self._proposal.sample((num,))
        inside = self.d.support.check(x)
        if not inside.any(0).all():
            raise ValueError(
                f"proposal must reach the support {self.d.support}, got {num} draws outside it"
            )
        first = expand_like(inside.long().argmax(0, keepdim=True), x).expand_as(x[:1])
        x = torch.where(expand_like(inside, x), x, x.gather(0, first))
        zero = torch.zeros(inside.shape).to(self.d.floating())
        rows = torch.arange(num, device=x.device).reshape(-1, *[1] * (inside.dim() - 1))
        log_weight = torch.where(inside, zero, -torch.inf)
        return Particles(self.encode(x), log_weight, zero[0], rows.expand(inside.shape))

    def _ends(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the potentials of proposal and distribution at points."""
        start, end = self._log_volume - self._proposal.log_prob(x), self.d.potential(x)
        self._evaluations += end.numel()
        self._gradients += end.numel() if x.requires_grad else 0
        self._num_nan = self._num_nan + end.isnan().sum()
        self._num_low = self._num_low + (end == -torch.inf).sum()
        return start, torch.where(impossible(end), torch.inf, end)

    def tilt(self, z: Tensor) -> Tensor:
        """Return what the potential gains from one end of the path to the other."""
        start, end = self._ends(self.decode(z))
        return torch.where(end == torch.inf, torch.inf, end - start)

    def at(self, t: Tensor) -> Energy:
        """Return the potential of the free coordinates at a temperature above 0."""

        def mixed(x: Tensor) -> Tensor:
            start, end = self._ends(x)
            return (1.0 - t) * torch.where(t < 1, start, 0.0) + t * end

        if self._transform is None:
            return lambda z: mixed(self.decode(z))
        return unconstrained(mixed, self._transform, self.d.event_dim)

    def move(
        self, z: Tensor, t: Tensor, tuning: Tuning, num_moves: int = 1
    ) -> tuple[Tensor, Tensor]:
        """Move particles at a temperature; return them and the rates of acceptance."""
        potential, scale = self.at(t), tuning.scale
        if self.finite:
            kernel = self._make(potential)
        else:
            step = tuning.log_step.exp().expand(z.shape[: 1 + tuning.log_step.dim()])
            kernel = self._make(lambda y: potential(y * scale), step)
            z = z / scale
        state, rate = kernel.init(z), torch.zeros_like(tuning.log_step)
        for _ in range(num_moves):
            state, info = kernel.step(state)
            rate = rate + info.accept_prob.mean(0) / num_moves
        return (state.position if self.finite else state.position * scale), rate


def _trajectories(potential: Energy, step_size: Tensor) -> Kernel:
    """Make the kernel of continuous supports: trajectories of about a quarter of a period.

    Scaled particles have a period of about 2 pi; after half of one they are back at the energy
    that they came from.
    """
    num_steps = round(QUARTER / float(step_size.log().mean().exp()))
    return hmc(potential, step_size, min(max(num_steps, 1), MAX_STEPS), step_jitter=0.3)


def _sweeps(d: GibbsBoltzmann) -> MakeKernel:
    """Make the kernel of finite supports: sweeps of Gibbs sampling."""
    values = values_of(d.support)
    if values is None:  # the places of the ones
        values = torch.arange(d.event_shape[-1])
    like = d.floating()
    values = values.to(like) if values.is_floating_point() else values.to(like.device)
    return lambda potential: gibbs(potential, values, 1 + len(d.batch_shape))


def _transform(d: GibbsBoltzmann) -> Transform:
    try:
        return biject_to(d.support)
    except NotImplementedError:
        raise ValueError(
            f"the support must be finite or map to the reals to anneal on it, got {d.support}"
        ) from None


def _check_proposal(d: GibbsBoltzmann, q: Any) -> None:
    if q.event_shape != d.event_shape:
        raise ValueError(
            f"proposal must have the event shape {tuple(d.event_shape)}, got "
            f"{tuple(q.event_shape)}"
        )
    if isinstance(q, Flat) and not math.isfinite(q.log_volume):
        raise ValueError(
            "proposal must be given where the base is Flat on an infinite volume, got None"
        )
    if not getattr(q, "is_normalized", True):
        raise ValueError("proposal must be normalised, got a distribution without log_partition")


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
