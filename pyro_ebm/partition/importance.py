"""log Z by importance sampling."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pyro_ebm.distribution import Flat, GibbsBoltzmann
from pyro_ebm.partition.base import (
    LogPartition,
    Points,
    Weighted,
    from_weights,
    needs_value,
    random_numbers,
    warn_low_ess,
    weigh,
)


class Importance:
    r"""log Z by importance sampling.

    .. math:: Z \approx \frac{1}{n} \sum_i \frac{b(x_i) \exp(-\beta E(x_i))}{q(x_i)} ,
        \quad x_i \sim q

    Value and gradient are estimated. Where the effective sample size falls below ten a warning
    says that the estimate cannot be trusted. The proposal must cover the distribution: an
    estimate from a proposal with lighter tails is too small and does not show it.

    Args:
        proposal: The proposal :math:`q`, a normalised distribution; the base if None.
        num_particles: The number of particles :math:`n`.
        common_random_numbers: Whether every evaluation draws the same particles, so that log Z
            is a smooth function of the parameters. HMC and NUTS need this.

    Raises:
        ValueError: If ``num_particles`` is less than two; when used, if there is no proposal and
            the base has an infinite volume.

    References:
        | Monte Carlo theory, methods and examples, chapter 9 (Owen, 2013)
        | https://artowen.su.domains/mc/

    Example:
        >>> base = dist.Normal(torch.zeros(2), 2.0).to_event(1)
        >>> d = ebm.GibbsBoltzmann(lambda x: 0.375 * x.square().sum(-1), base)
        >>> est = Importance(num_particles=20_000)(d)      # the truth is -log 4
        >>> abs(est.value + 1.386) < 4 * est.std_error
        tensor(True)
    """

    value = "estimated"
    gradient = "estimated"

    def __init__(
        self,
        proposal: Any = None,
        num_particles: int = 1024,
        *,
        common_random_numbers: bool = False,
    ) -> None:
        if num_particles < 2:
            raise ValueError(f"num_particles must be at least 2, got {num_particles}")
        self.proposal, self.num_particles = proposal, num_particles
        self.common_random_numbers = common_random_numbers
        self._seed: int | None = None

    def _draw(self, d: GibbsBoltzmann) -> Tensor:
        proposal = d.base if self.proposal is None else self.proposal
        with random_numbers(self, d):
            return proposal.sample((self.num_particles,))

    def points(self, d: GibbsBoltzmann) -> Points:
        """Return the particles, weighed by the base over the proposal."""
        with torch.no_grad():
            x = self._draw(d)
            ones = len(d.batch_shape) - (x.dim() - 1 - d.event_dim)
            x = x.reshape(len(x), *[1] * max(ones, 0), *x.shape[1:])
            log_q = self._log_proposal(d, x)
            inside = d.support.check(x)
        log_measure = d._measure.log_prob(x) - log_q - math.log(len(x))
        return Points(x, torch.where(inside, log_measure, -torch.inf))

    def weighted(self, d: GibbsBoltzmann) -> Weighted:
        """Return the particles with their weights."""
        return weigh(d, self.points(d))

    def _log_proposal(self, d: GibbsBoltzmann, x: Tensor) -> Tensor:
        q = d.base if self.proposal is None else self.proposal
        if not isinstance(q, Flat):
            return q.log_prob(x)
        if not math.isfinite(q.log_volume):
            raise ValueError(
                "proposal must be given where the base is Flat on an infinite volume, got "
                f"{'None' if self.proposal is None else 'such a one'}"
            )
        return torch.full(x.shape[: x.dim() - d.event_dim], -q.log_volume).to(d.floating())

    def log_z(self, d: GibbsBoltzmann, x: Tensor | None = None) -> Tensor:
        """Return the estimate of log Z.

        Raises:
            UnnormalizedError: If MCMC asks and the particles are not common.
        """
        if not self.common_random_numbers:
            needs_value(self, "draws fresh particles, so that it is never the same twice")
        return self(d).value

    def __call__(self, d: GibbsBoltzmann) -> LogPartition:
        """Return the estimate of log Z with its standard error and effective sample size."""
        estimate = from_weights(self.weighted(d).log_weight + math.log(self.num_particles))
        warn_low_ess(estimate.ess, "Importance")
        return estimate
