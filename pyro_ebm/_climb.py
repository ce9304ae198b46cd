"""Particles that choose their own temperatures on the way from a proposal to a distribution."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_ebm._guard import UnnormalizedError
from pyro_ebm._math import systematic
from pyro_ebm._path import Ladder, Particles, Path, Tuning, increment
from pyro_ebm._short_run import adapt
from pyro_ebm.energy import describe
from pyro_ebm.kernels.base import expand_like

MAX_TEMPERATURES = 5000


def spread(z: Tensor, log_weight: Tensor, before: Tensor) -> Tensor:
    """Return the standard deviation of weighted particles, the one before where they agree."""
    share = expand_like(torch.softmax(log_weight, 0), z)
    mean = (share * z).sum(0)
    scale = (share * (z - mean).square()).sum(0).sqrt()
    return torch.where((scale > 0) & scale.isfinite(), scale, before)


def log_conditional_ess(log_weight: Tensor, step: Tensor) -> Tensor:
    r"""Return the log of the conditional effective sample size, as a share.

    .. math:: \frac{(\sum_i W_i w_i)^2}{\sum_i W_i w_i^2}

    References:
        | Toward Automatic Model Comparison: An Adaptive Sequential Monte Carlo Approach (Zhou,
          Johansen and Aston, 2016)
        | https://doi.org/10.1080/10618600.2015.1060885
    """
    log_share = torch.log_softmax(log_weight, 0)
    return 2 * (log_share + step).logsumexp(0) - (log_share + 2 * step).logsumexp(0)


def next_temperature(log_weight: Tensor, tilt: Tensor, t: Tensor, least: float) -> Tensor:
    """Return the next temperature, at which the conditional ESS falls to a share ``least``.

    Particles behind a wall are lost at any temperature, so those left are counted alone.
    """
    wall = tilt == torch.inf
    alive, tilt = torch.where(wall, -torch.inf, log_weight), torch.where(wall, 0.0, tilt)

    def fine(dt: Tensor) -> Tensor:
        return log_conditional_ess(alive, -dt * tilt) >= math.log(least)

    low, high = torch.full_like(t, -60.0), torch.zeros_like(t)  # logs, as shares of what is left
    for _ in range(30):
        middle = (low + high) / 2
        ok = fine(middle.exp() * (1.0 - t))
        low, high = torch.where(ok, middle, low), torch.where(ok, high, middle)
    return torch.where(fine(1.0 - t), 1.0, t + low.exp() * (1.0 - t))


def resample(particles: Particles, least: float) -> Particles:
    """Resample the batch elements whose effective sample size is below a share ``least``."""
    z, log_weight, offset, ancestor = particles
    n = len(log_weight)
    log_ess = 2 * log_weight.logsumexp(0) - (2 * log_weight).logsumexp(0)
    low = log_ess < math.log(least * n)
    rows = systematic(torch.softmax(log_weight, 0))
    drawn = z.gather(0, expand_like(rows, z).expand_as(z))
    total = log_weight.logsumexp(0) - math.log(n)
    return Particles(
        torch.where(expand_like(low, z[0]), drawn, z),
        torch.where(low, 0.0, log_weight),
        torch.where(low, offset + total, offset),
        torch.where(low, ancestor.gather(0, rows), ancestor),
    )


class Climb(NamedTuple):
    """How to climb: moves per temperature, the shares of CESS and of ESS to keep."""

    num_moves: int
    conditional: float
    threshold: float


def climb(path: Path, num: int, how: Climb) -> tuple[Particles, Ladder, Tensor]:
    """Move particles from the proposal to the distribution by steps that they choose themselves.

    Returns:
        The particles, the ladder that they climbed and the mean rate of acceptance.

    Raises:
        UnnormalizedError: If a temperature is not to be passed.
    """
    particles = path.draw(num)
    t = torch.zeros_like(particles.offset)
    scale = torch.ones_like(t) if path.free.finite else torch.ones_like(particles.z[0])
    tuning, length, rates = Tuning(scale, t - 0.7), t, []
    rungs: list[tuple[Tensor, Tensor, Tuning]] = []
    while bool((t < 1).any()):
        tilt = path.tilt(particles.z)
        after = next_temperature(particles.log_weight, tilt, t, how.conditional)
        step = increment(tilt, after - t)
        lost = log_conditional_ess(particles.log_weight, step)
        particles = particles._replace(log_weight=particles.log_weight + step)
        _check_progress(path, particles, (t, after), len(rungs))
        if not path.free.finite:
            scale = spread(particles.z, particles.log_weight, tuning.scale)
            tuning = tuning._replace(scale=scale)
        if not rungs:
            rungs.append((t, length, tuning))
        length, t = length + (-lost).clamp(min=0.0).sqrt(), after
        particles = resample(particles, how.threshold)
        z, rate = path.move(particles.z, t, tuning, how.num_moves)
        rates.append(rate)
        particles = particles._replace(z=z)
        tuning = tuning._replace(log_step=adapt(tuning.log_step, rate, min(len(rungs) - 1, 10)))
        rungs.append((t, length, tuning))
    ts, lengths, tunings = zip(*rungs, strict=True)
    stacked = Tuning(*map(torch.stack, zip(*tunings, strict=True)))
    return particles, Ladder(torch.stack(ts), torch.stack(lengths), stacked), torch.stack(rates)


def _check_progress(path: Path, particles: Particles, t: tuple[Tensor, Tensor], num: int) -> None:
    before, after = t
    if (particles.log_weight == -torch.inf).all(0).any():
        path.report("annealing")
        raise ValueError(
            f"{describe(path.d.energy)} must be finite where the proposal draws, got no point of "
            f"the support with a finite energy in {len(particles.z)} draws; choose a proposal "
            "that reaches the distribution"
        )
    if bool(((after <= before) & (before < 1)).any()) or num >= MAX_TEMPERATURES:
        raise UnnormalizedError(
            f"annealing came to a halt at t = {float(after.min()):.3g} after {num} temperatures: "
            "the proposal is too far from the distribution. Pass a proposal closer to it"
        )


def refined(ladder: Ladder, num_steps: int) -> Ladder:
    """Return a ladder of ``num_steps`` steps of equal length along another."""
    length = ladder.length
    share = torch.linspace(0.0, 1.0, num_steps + 1).to(length)
    want = share.reshape(-1, *[1] * (length.dim() - 1)) * length[-1]
    knots, places = (a.movedim(0, -1).contiguous() for a in (length, want))
    rows = torch.searchsorted(knots, places).movedim(-1, 0).clamp(1, len(length) - 1)
    low, high = length.gather(0, rows - 1), length.gather(0, rows)
    part = torch.where(high > low, (want - low) / (high - low), 0.0).clamp(0.0, 1.0)

    def between(a: Tensor) -> Tensor:
        index = expand_like(rows, a).expand(num_steps + 1, *a.shape[1:])
        weight = expand_like(part, a).to(a)
        return torch.lerp(a.gather(0, index - 1), a.gather(0, index), weight)

    t = between(ladder.t)
    t[0], t[-1] = 0.0, 1.0
    return Ladder(t, want, Tuning(*map(between, ladder.tuning)))
