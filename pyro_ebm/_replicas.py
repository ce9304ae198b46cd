"""Replica exchange from a law that can be drawn to a distribution, for methods for log Z."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributions import biject_to

from pyro_ebm._binding import evaluating
from pyro_ebm._short_run import adapt, unconstrained
from pyro_ebm.distribution import GibbsBoltzmann, unvalidated
from pyro_ebm.energy import Energy
from pyro_ebm.flat import Flat, values_of
from pyro_ebm.kernels import Diagonal, Kernel, adapt_ladder, gibbs, hmc, tempered

NUM_STEPS = 3
"""Leapfrog steps of a move."""


class Path(NamedTuple):
    r"""The way to a distribution: densities :math:`m(x) \exp(-s V(x))`, s from 0 to 1.

    ``sample`` draws from :math:`m`, of log-density ``log_measure``, whose mass has the log
    ``log_mass``; ``excess`` is :math:`V`.
    """

    sample: Callable[[torch.Size], Tensor]
    log_measure: Energy
    excess: Energy
    log_mass: float


def path_of(d: GibbsBoltzmann, proposal: Any) -> Path:
    r"""Return the way from the base, or from a proposal, which is to be normalised.

    From the base :math:`V = \beta E`, so that s goes along :math:`\beta`.

    Raises:
        ValueError: If there is neither a base that can be drawn nor a proposal, or it is not
            normalised.
    """
    start = d.base if proposal is None else proposal
    if not getattr(start, "is_normalized", True):
        raise ValueError(
            "proposal (or base) must be normalised, got a GibbsBoltzmann without log_partition"
        )
    log_mass = start.log_volume if isinstance(start, Flat) else 0.0
    if not math.isfinite(log_mass):
        raise ValueError(
            "proposal must be given where the base is Flat on an infinite volume, got "
            f"{'None' if proposal is None else 'such a one'}"
        )
    if proposal is not None:
        if proposal.event_shape != d.event_shape:
            raise ValueError(
                f"proposal must have the event shape {tuple(d.event_shape)}, got "
                f"{tuple(proposal.event_shape)}"
            )
        wide = unvalidated(proposal.expand(d.batch_shape))
        return Path(wide.sample, wide.log_prob, _over(d, wide), log_mass)

    def excess(x: Tensor) -> Tensor:
        value = (d.beta * d._energy_at(x)).expand(x.shape[: x.dim() - d.event_dim])
        return torch.where(value == -torch.inf, torch.nan, value)

    return Path(d.base.sample, d._measure.log_prob, excess, log_mass)


def _over(d: GibbsBoltzmann, proposal: Any) -> Energy:
    def excess(x: Tensor) -> Tensor:
        inside = d.support.check(x)
        safe = x
        if not bool(inside.all()):  # energies are not asked for outside the support
            like = d.base.sample(x.shape[: x.dim() - d.event_dim - len(d.batch_shape)])
            safe = torch.where(inside.reshape(inside.shape + (1,) * d.event_dim), x, like)
        target = d.potential(safe)
        value = torch.where(target == -torch.inf, torch.nan, target) + proposal.log_prob(safe)
        return torch.where(inside, value, torch.inf)

    return excess


def check_excess(value: Tensor, what: str) -> Tensor:
    """Refuse energies that no density has."""
    bad = int(value.isnan().sum())
    if bad:
        raise ValueError(
            f"energy must be a number above minus infinity, got NaN or -inf at {bad} of "
            f"{value.numel()} {what}"
        )
    return value


class Drawn(NamedTuple):
    """Draws along a path: ``excess`` V ``(K, T, C, *batch)`` at the levels ``betas`` ``(K,)``.

    ``x`` ``(T, C, *batch, *event)`` are those of the last level.
    """

    betas: Tensor
    excess: Tensor
    x: Tensor


class _Space(NamedTuple):
    """How points are moved: in unconstrained space, or on a finite support."""

    to: Callable[[Tensor], Tensor]
    back: Callable[[Tensor], Tensor]
    base_energy: Energy
    excess: Energy
    make: Callable[[Tensor, Tensor | None], Callable[[Energy], Kernel]]


def _space(d: GibbsBoltzmann, path: Path, kernel: Callable[..., Kernel] | None) -> _Space:
    cold = lambda x: -path.log_measure(x)
    values = values_of(d.support)
    if values is not None:
        same, dims = (lambda x: x), 2 + len(d.batch_shape)
        sweep = kernel or (lambda u: gibbs(u, values.to(d.floating()), dims))
        return _Space(same, same, cold, path.excess, lambda *_: sweep)
    if d.has_enumerate_support:
        raise NotImplementedError(
            f"chains need a support of components, got {d.support}: use Exact()"
        )
    transform = biject_to(d.support)

    def make(step: Tensor, scale: Tensor | None) -> Callable[[Energy], Kernel]:
        if kernel is not None:
            return lambda u: kernel(u, step)
        metric = None if scale is None else Diagonal(scale)
        return lambda u: hmc(u, step, NUM_STEPS, metric=metric, jitter=0.5, step_jitter=0.2)

    pulled = lambda z: path.excess(transform(z))
    base_energy = unconstrained(cold, transform, d.event_dim)
    return _Space(transform.inv, transform, base_energy, pulled, make)


class Plan(NamedTuple):
    """How chains are run.

    ``betas`` are the levels; ``respace`` says whether warm-up adapts those in between. ``kernel``
    makes one of a potential, and on continuous supports of a step; None is HMC, or Gibbs sampling
    on finite supports.
    """

    betas: Tensor
    num_chains: int
    num_samples: int
    warmup: int
    respace: bool
    kernel: Callable[..., Kernel] | None = None


class _Replicas:
    """Chains at all levels, and what their warm-up has found."""

    def __init__(self, d: GibbsBoltzmann, path: Path, plan: Plan) -> None:
        self.d, self.path, self.betas = d, path, plan.betas
        self.space, self.respace = _space(d, path, plan.kernel), plan.respace
        # a kernel of the caller's has steps of its own units
        self.scales = plan.kernel is None and values_of(d.support) is None
        self.shape = torch.Size((plan.num_chains,))
        ones = (1,) * (1 + len(d.batch_shape))
        self.log_step = torch.full((len(self.betas), *ones), -1.0).to(self.betas)
        self.scale: Tensor | None = None
        self.state = self.kernel().init(self.space.to(self._start()))

    def kernel(self) -> Kernel:
        """Return the kernel of the moment."""
        make = self.space.make(self.log_step.exp(), self.scale)
        return tempered(make, self.space.excess, self.betas, base_energy=self.space.base_energy)

    def _start(self) -> Tensor:
        x = self.path.sample(self.shape)
        for _ in range(20):
            bad = ~self.path.excess(x).isfinite()
            if not bool(bad.any()):
                return x
            wide = bad.reshape(bad.shape + (1,) * self.d.event_dim)
            x = torch.where(wide, self.path.sample(self.shape), x)
        raise ValueError(
            f"energy must be finite at draws of the base (or proposal), got infinity or NaN 20 "
            f"times in a row at {int(bad.sum())} of {bad.numel()} chains; pass a proposal that "
            "covers the region of finite energy"
        )

    def step(self) -> tuple[Tensor, Any]:
        """Move and swap, then draw the first level afresh; return V there, and the record."""
        self.state, info = self.kernel().step(self.state)
        x = self.path.sample(self.shape)
        excess = check_excess(self.path.excess(x), "draws of the base")
        fine = excess.isfinite()
        inner = self.state.inner
        wide = fine.reshape(fine.shape + (1,) * self.d.event_dim)
        z = self.space.to(torch.where(wide, x, self.space.back(inner.position[0])))
        step, scale = self.log_step[:1].exp(), None if self.scale is None else self.scale[:1]
        hot = self.space.make(step, scale)(self.space.base_energy).init(z.unsqueeze(0))
        joined = (torch.cat([h, old[1:]]) for h, old in zip(hot, inner, strict=True))
        self.state = self.state._replace(inner=inner._make(joined))
        return excess, info

    def refresh(self) -> None:
        """Evaluate all levels at new temperatures."""
        ladder = self.betas.reshape(-1, *[1] * (1 + len(self.d.batch_shape)))
        whole = lambda z: self.space.base_energy(z) + ladder * self.space.excess(z)
        inner = self.space.make(self.log_step.exp(), self.scale)(whole)
        self.state = self.state._replace(inner=inner.init(self.state.inner.position))

    def warm(self, num: int) -> None:
        """Find a step size and a scale for each level, and perhaps the levels."""
        for length in (num // 8, num // 8, num // 4):
            if length < 2:
                continue
            variance, rejection = self._round(length)
            if self.scales:
                self._rescale(variance)
            if self.respace:
                self.betas = adapt_ladder(self.betas, rejection.to(self.betas))
            self.refresh()
        if num // 2:
            self._round(num // 2)

    def _round(self, length: int) -> tuple[Tensor, Tensor]:
        """Adapt the steps; return variances over chains and time, and the rejected swaps."""
        positions, swaps = [], []
        for i in range(length):
            _, info = self.step()
            positions.append(self.state.inner.position)
            swaps.append(info.swap_prob.flatten(1))
            accept = info.inner.accept_prob.mean(1, keepdim=True)
            self.log_step = adapt(self.log_step, accept, i)
        # a pair is tried at every second move; of the first moves most are forgotten
        joined = torch.cat(positions[length // 2 :], 1)
        rejection = 1.0 - torch.cat(swaps, 1).nanmean(1).clamp(0.0, 1.0 - 1e-6)
        return joined.to(rejection).var(1, keepdim=True, correction=0), rejection

    def _rescale(self, variance: Tensor) -> None:
        """Take steps in units of the spread of each component, shrunk towards the mean."""
        typical = variance.flatten(1).mean(1).reshape(-1, *[1] * (variance.dim() - 1))
        tiny = torch.finfo(variance.dtype).tiny
        self.scale = (0.9 * variance + 0.1 * typical).clamp(min=tiny)
        self.log_step = torch.full_like(self.log_step, -0.5)


def draw_along(d: GibbsBoltzmann, path: Path, plan: Plan) -> Drawn:
    """Draw from all levels of a path by replica exchange, the first of them exactly."""
    with torch.inference_mode(False), torch.no_grad(), evaluating(d.energy):
        replicas = _Replicas(d, path, plan)
        replicas.warm(plan.warmup)
        rows, points = [], []
        for _ in range(plan.num_samples):
            first, _ = replicas.step()
            x = replicas.space.back(replicas.state.inner.position[1:])
            rows.append(torch.cat([first[None], check_excess(path.excess(x), "draws")]))
            points.append(x[-1])
        return Drawn(replicas.betas, torch.stack(rows, 1), torch.stack(points))
