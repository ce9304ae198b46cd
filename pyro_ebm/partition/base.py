"""What all methods for log Z share."""

from __future__ import annotations

import math
import warnings
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from pyro_ebm._free import inside
from pyro_ebm._guard import UnnormalizedError, UnnormalizedWarning, engine, scoring
from pyro_ebm._guide import Draws
from pyro_ebm._math import mean_weight, weighted_mean
from pyro_ebm.distribution import GibbsBoltzmann, unvalidated
from pyro_ebm.energy import describe

MIN_ESS = 10.0  # below this an estimate and its own error are not to be trusted
NUM_WITNESSES, FAR_OFF = 32, 10.0


class LogPartition(NamedTuple):
    """A log Z: ``value``, ``std_error`` and effective sample size ``ess``, of the batch's shape.

    Deterministic methods have an infinite ``ess``.
    """

    value: Tensor
    std_error: Tensor
    ess: Tensor


class Points(NamedTuple):
    r"""Points that stand for a measure: :math:`\int f(x) \, b(x) \, dx \approx \sum_i m_i f(x_i)`.

    ``x`` is ``(n, *batch, *event)``, its batch perhaps of ones, ``log_measure`` the logs of the
    :math:`m_i`, which broadcast to ``(n, *batch)``. Neither depends on beta or on parameters of
    the energy.
    """

    x: Tensor
    log_measure: Tensor


class Weighted(NamedTuple):
    r"""Points that stand for a density: :math:`\int f b e^{-\beta E} \approx \sum_i w_i f(x_i)`.

    ``x`` is ``(n, *batch, *event)``, its batch perhaps of ones, ``log_weight`` ``(n, *batch)``
    the logs of the :math:`w_i`, whose sum is Z.
    """

    x: Tensor
    log_weight: Tensor


class Method(Protocol):
    """What a method for log Z gives.

    ``value`` is ``"exact"``, ``"estimated"``, ``"bound"`` or ``"none"``; ``gradient`` is
    ``"exact"`` or ``"estimated"``. Engines that need what a method lacks are refused. A method
    whose value is one, or an estimate that is one on average, has the ``bound``, ``"lower"`` or
    ``"upper"``. Methods that have them give ``points(d)``, :class:`Points`, and ``weighted(d)``,
    :class:`Weighted`; one that is ``tabular`` computes all it gives from its points.
    """

    @property
    def value(self) -> str: ...

    @property
    def gradient(self) -> str: ...

    def log_z(self, d: GibbsBoltzmann, x: Tensor | None = None) -> Tensor:
        """Return log Z of the batch's shape, differentiable in beta and in all parameters."""

    def __call__(self, d: GibbsBoltzmann) -> LogPartition:
        """Return log Z with its error."""


def log_partition(d: GibbsBoltzmann, method: Method) -> LogPartition:
    r"""Return log Z of a Gibbs-Boltzmann distribution, with its error.

    .. math:: \log Z(\beta) = \log \int b(x) \exp(-\beta E(x)) \, dx

    Args:
        d: The distribution; a ``log_partition`` of its own plays no part.
        method: A method of :mod:`pyro_ebm.partition`.

    Returns:
        The value, its standard error and the effective sample size, of shape ``d.batch_shape``,
        in natural units (nats). The value is differentiable.

    Raises:
        UnnormalizedError: If the method gives no value.
        ValueError: If the method does not suit the distribution, or energies are NaN or minus
            infinity.

    Example:
        >>> d = ebm.GibbsBoltzmann(lambda x: 0.5 * x**2, ebm.Flat())
        >>> value, std_error, ess = log_partition(d, ebm.partition.Quadrature(-10.0, 10.0, 64))
        >>> value                                           # log of sqrt(2 pi)
        tensor(0.9189)
    """
    if method.value == "none":
        raise UnnormalizedError(
            f"method must give a value of log Z, got {type(method).__name__}, which gives only "
            "its gradient"
        )
    parts = method(getattr(d, "_origin", None) or d)
    bad = parts[0].detach().isnan() | (parts[0].detach() == torch.inf)
    if bad.any():
        raise ValueError(
            f"{describe(d.energy)} must be a number above minus infinity, got log Z = "
            f"{float(parts[0][bad][0])} by its values at points of {type(method).__name__}"
        )
    return LogPartition(*(part.expand(d.batch_shape) for part in parts))


def from_weights(log_weights: Tensor) -> LogPartition:
    """Average importance weights, stacked in the first dimension, as in :func:`mean_weight`."""
    return LogPartition(*mean_weight(log_weights))


def points_of(d: GibbsBoltzmann, draws: Draws) -> Points:
    """Weigh draws by the base over their density."""
    log_measure = d._measure.log_prob(draws.x) - draws.log_q - math.log(len(draws.x))
    inside = d.support.check(draws.x.detach())
    return Points(draws.x, torch.where(inside, log_measure, -torch.inf))


def learns(x: Tensor | None) -> bool:
    """Whether log Z, asked for with the points ``x`` that are scored, is to train its guide.

    A log-density has minus log Z: what raises it would push a lower bound down, away from log Z.
    MCMC trains nothing, and needs the derivative of the value in all that it depends on.
    """
    return x is None or engine() == "mcmc"


def weigh(d: GibbsBoltzmann, points: Points) -> Weighted:
    r"""Weigh the points of a measure by :math:`\exp(-\beta E)`, differentiably."""
    energy, log_measure = torch.broadcast_tensors(d._energy_at(points.x), points.log_measure)
    wall = (energy == torch.inf) | (log_measure == -torch.inf)
    tilted = log_measure - d.beta * torch.where(wall, 0.0, energy)
    return Weighted(points.x, torch.where(wall, -torch.inf, tilted))


def surrogate(d: GibbsBoltzmann, value: Tensor, particles: Weighted) -> Tensor:
    r"""Give an estimate of log Z the gradient :math:`-\sum_i \bar w_i \nabla_\theta U(x_i)`."""
    value = value.detach()
    if not torch.is_grad_enabled():
        return value
    mean = weighted_mean(d.potential(particles.x.detach()), particles.log_weight)
    return value - (mean - mean.detach())


def deterministic(value: Tensor, error: Tensor | None = None) -> LogPartition:
    """Wrap a log Z that is not estimated from samples."""
    detached = value.detach()
    std_error = torch.zeros_like(detached) if error is None else error
    return LogPartition(value, std_error, torch.full_like(detached, torch.inf))


def warn_low_ess(ess: Tensor, what: str, least: float = MIN_ESS) -> None:
    """Say so when an estimate rests on a handful of particles."""
    low = float(ess.min())
    if not low >= least:
        warnings.warn(
            f"log Z by {what} cannot be trusted: its effective sample size is {low:.1f}, below "
            f"{least:.0f}. Use more particles, or a proposal closer to the distribution",
            UnnormalizedWarning,
            stacklevel=3,
        )


@torch.no_grad()
def warn_unseen(d: GibbsBoltzmann, proposal: Any, particles: Weighted, what: str) -> None:
    """Say so when short chains from the base end where no particle of a proposal has come.

    That is where the energy is as low as at the particles, and the proposal's density, over that
    of the distribution, by many orders of magnitude lower than at any of them. What the base does
    not reach either remains unseen.
    """
    if proposal is None or not hasattr(proposal, "log_prob") or d.support.is_discrete:
        return
    try:
        x = d.sample(torch.Size((NUM_WITNESSES,)))
    except ValueError:  # nowhere a finite energy near the base's draws
        return
    law = unvalidated(proposal)

    def at(points: Tensor) -> tuple[Tensor, Tensor]:
        y, fine = inside(law, points)
        potential = d.potential(points)
        return potential, potential + torch.where(fine, law.log_prob(y), -torch.inf)

    share = torch.softmax(particles.log_weight, 0)
    high, low = (_beyond(share, part) for part in at(particles.x))
    potential, ratio = at(x)
    unseen = (potential < high[1]) & (ratio < low[0])
    if unseen.any():
        warnings.warn(
            f"log Z by {what} cannot be trusted: {int(unseen.sum())} of {unseen.numel()} short "
            "chains from the base end where the proposal has no particles. Use a proposal that "
            "covers them, or none",
            UnnormalizedWarning,
            stacklevel=4,
        )


def _beyond(share: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Return bounds far below and far above a weighted number."""
    value = torch.where(share > 0, value, 0.0)
    mean = (share * value).sum(0)
    margin = FAR_OFF * (1.0 + (share * (value - mean).square()).sum(0).sqrt())
    return mean - margin, mean + 0.5 * margin


def needs_value(method: Any, why: str, enumerated: bool = False) -> None:
    """Refuse engines that need the value itself of log Z, and the same one every time."""
    kind = engine()
    if kind in ("mcmc", "importance") or enumerated:
        who = {"mcmc": "MCMC", "importance": "importance sampling"}.get(kind or "", "enumeration")
        raise UnnormalizedError(
            f"{scoring()[0]}: {who} needs the value of log Z, and log_partition="
            f"{type(method).__name__} {why}. Use Exact(), Quadrature(...), or "
            "Importance or Annealed(..., common_random_numbers=True)"
        )
