"""log Z by importance sampling."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pyro_ebm._guide import Proposal
from pyro_ebm.distribution import GibbsBoltzmann
from pyro_ebm.partition.base import (
    LogPartition,
    Points,
    Weighted,
    from_weights,
    learns,
    needs_value,
    points_of,
    warn_low_ess,
    warn_unseen,
    weigh,
)


class Importance:
    r"""log Z by importance sampling.

    .. math:: Z \approx \frac{1}{n} \sum_i \frac{b(x_i) \exp(-\beta E(x_i))}{q(x_i)} ,
        \quad x_i \sim q

    The estimate of Z is unbiased, so that of log Z a lower bound on average; :meth:`gap` says how
    far below. Where the effective sample size falls below fifty a warning says that it cannot be
    trusted. The proposal must cover the distribution: an estimate from a proposal with lighter
    tails is too small and does not show it.

    A guide draws the site ``site`` as for :class:`~pyro_ebm.partition.Variational`, which trains
    it; here it only serves.

    Args:
        proposal: The proposal :math:`q`: a normalised distribution, or a Pyro guide, called with
            the given parts of the energy; the base if None.
        num_particles: The number of particles :math:`n`.
        site: The name of the guide's site.
        common_random_numbers: Whether every evaluation draws the same numbers, so that log Z is a
            smooth function of the parameters, as HMC and NUTS need; its gradient then goes through
            the draws. A proposal that draws for each batch element apart, by reparametrised
            draws if it is a guide, has a function for each shape of batch.

    Raises:
        TypeError: If the proposal is neither a distribution nor a guide.
        ValueError: If ``num_particles`` is less than two; when used, if the proposal does not
            fit, or there is none and the base has an infinite volume.

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
    bound = "lower"
    gradient = "estimated"

    def __init__(
        self,
        proposal: Any = None,
        num_particles: int = 1024,
        *,
        site: str = "x",
        common_random_numbers: bool = False,
    ) -> None:
        if num_particles < 2:
            raise ValueError(f"num_particles must be at least 2, got {num_particles}")
        self.proposal, self.num_particles = proposal, num_particles
        self.site, self.common_random_numbers = site, common_random_numbers
        self._proposal = Proposal(proposal, site, common_random_numbers)

    @property
    def min_ess(self) -> float:
        """The effective sample size below which there is a warning.

        Weights of independent particles may have heavy tails, of which ten show too little.
        """
        return min(50.0, self.num_particles / 2)

    def log_z(self, d: GibbsBoltzmann, x: Tensor | None = None) -> Tensor:
        """Return the estimate of log Z.

        Raises:
            UnnormalizedError: If MCMC asks and the particles are not common.
        """
        if not self.common_random_numbers:
            needs_value(self, "draws fresh particles, so that it is never the same twice")
        return self._estimate(d, learns(x))[0].value

    def __call__(self, d: GibbsBoltzmann) -> LogPartition:
        """Return the estimate of log Z with its standard error and effective sample size.

        Where there is a proposal, a few short chains from the base look for what it misses.
        """
        estimate, particles = self._estimate(d, True)
        warn_unseen(d, self.proposal, particles, "Importance")
        return estimate

    def _estimate(self, d: GibbsBoltzmann, through: bool) -> tuple[LogPartition, Weighted]:
        # fresh draws need no gradient: that of the weights is unbiased
        particles = weigh(d, self._draw(d, through and self.common_random_numbers))
        estimate = from_weights(particles.log_weight + math.log(self.num_particles))
        warn_low_ess(estimate.ess, "Importance", self.min_ess)
        return estimate, particles

    def _draw(self, d: GibbsBoltzmann, through: bool) -> Points:
        with torch.set_grad_enabled(through and torch.is_grad_enabled()):
            draws = self._proposal.draw(d, self.num_particles)
        return points_of(d, draws)

    def points(self, d: GibbsBoltzmann) -> Points:
        """Return the particles, weighed by the base over the proposal."""
        return self._draw(d, False)

    def weighted(self, d: GibbsBoltzmann) -> Weighted:
        """Return the particles with their weights."""
        return weigh(d, self.points(d))

    def gap(self, d: GibbsBoltzmann) -> LogPartition:
        r"""Return how far the estimate is below log Z on average, to the first order in 1 / n.

        .. math:: \log Z - \mathbb{E} \log \hat Z
            \approx \frac{\mathrm{var}(w)}{2 n \, \mathbb{E}(w)^2}

        It is half the squared standard error, and like that too small where few particles weigh.

        Args:
            d: The distribution.

        Returns:
            The gap, its error, and the effective sample size of what it is measured with.
        """
        with torch.no_grad():
            n, log_weight = self.num_particles, self.weighted(d).log_weight
            estimate = from_weights(log_weight)
            warn_low_ess(estimate.ess, "Importance", self.min_ess)
            w = n * torch.softmax(log_weight, 0)  # over their mean
            influence = w.square() - 2 * w.square().mean(0) * w  # of each on the variance
            error = influence.std(0) / (2 * n**1.5)
            return LogPartition(estimate.std_error.square() / 2, error, estimate.ess)
