"""log Z by sequential Monte Carlo with temperatures that it chooses itself."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pyro_ebm._binding import evaluating
from pyro_ebm._climb import Climb, climb
from pyro_ebm._free import MakeKernel
from pyro_ebm._guard import is_tracing
from pyro_ebm._path import Cost, Particles, Path
from pyro_ebm.distribution import GibbsBoltzmann
from pyro_ebm.kernels.base import check_count, check_share
from pyro_ebm.partition.base import (
    LogPartition,
    Weighted,
    needs_value,
    surrogate,
    warn_low_ess,
    warn_unseen,
)

CONDITIONAL = 0.9  # the share of the effective sample size that a step of the temperature keeps


class SMC:
    r"""log Z by sequential Monte Carlo: annealing with resampling.

    .. math:: Z \approx \prod_k \sum_i W_i^{(k)} \exp(-(t_{k + 1} - t_k)
        (U_1 - U_0)(x_i^{(k)})) , \quad U_t = -(1 - t) \log q + t (\beta E - \log b)

    Each batch element takes steps of the temperature that keep nine tenths of the conditional
    effective sample size. Moves are scaled to the present spread of the particles and their step
    follows the rate of acceptance. Since particles adapt to themselves, the estimate of Z has a
    bias of the order 1/n, below its error. That error counts particles by their first ancestors,
    as resampling leaves families of one origin; so does the effective sample size. After a run
    ``cost``, ``accept_rate`` and ``num_temperatures`` say what it took.

    Args:
        kernel: Makes an exact kernel, as for :class:`Annealed`.
        num_particles: The number of particles.
        num_moves: The number of moves at each temperature.
        ess_threshold: Particles are resampled, systematically, where their effective sample size
            falls below this share of their number.
        proposal: The proposal :math:`q`, a normalised distribution; the base if None. A mode
            that its particles do not reach is left out, which :meth:`Annealed.bracket` shows.

    Raises:
        ValueError: If an argument is out of its range; when used, if there is no proposal and
            the base has an infinite volume, or an energy is minus infinity.

    References:
        | Sequential Monte Carlo Samplers (Del Moral, Doucet and Jasra, 2006)
        | https://doi.org/10.1111/j.1467-9868.2006.00553.x
        | Variance Estimation in the Particle Filter (Lee and Whiteley, 2018)
        | https://arxiv.org/abs/1509.00394

    Example:
        >>> base = dist.Normal(torch.zeros(2), 2.0).to_event(1)
        >>> d = ebm.GibbsBoltzmann(lambda x: 0.375 * x.square().sum(-1), base)
        >>> est = SMC(num_particles=512)(d)                # the truth is -log 4
        >>> abs(est.value + 1.386) < 4 * est.std_error
        tensor(True)
    """

    value = "estimated"
    gradient = "estimated"

    def __init__(
        self,
        kernel: MakeKernel | None = None,
        num_particles: int = 1024,
        num_moves: int = 3,
        *,
        ess_threshold: float = 0.5,
        proposal: Any = None,
    ) -> None:
        check_count("num_particles", num_particles, 2)
        check_count("num_moves", num_moves, 1)
        check_share("ess_threshold", ess_threshold)
        self.kernel, self.num_particles, self.num_moves = kernel, num_particles, num_moves
        self.ess_threshold, self.proposal = ess_threshold, proposal
        self.cost, self.accept_rate, self.num_temperatures = Cost(0, 0), math.nan, 0

    def __call__(self, d: GibbsBoltzmann) -> LogPartition:
        """Return the estimate of log Z with its standard error and effective sample size.

        Where there is a proposal, a few short chains from the base look for what it misses.
        """
        estimate, particles = self._run(d)
        warn_unseen(d, self.proposal, particles, "SMC")
        return estimate._replace(value=surrogate(d, estimate.value, particles))

    def log_z(self, d: GibbsBoltzmann, x: Tensor | None = None) -> Tensor:
        """Return the estimate of log Z.

        Raises:
            UnnormalizedError: If MCMC asks, which needs the same value every time.
            NotImplementedError: If the model is traced, which would freeze the particles.
        """
        if is_tracing():
            raise NotImplementedError(
                "SMC chooses its temperatures at every evaluation, which a traced model cannot "
                "repeat: use Trace_ELBO instead of JitTrace_ELBO"
            )
        needs_value(self, "draws fresh particles, so that it is never the same twice")
        estimate, particles = self._run(d)
        return surrogate(d, estimate.value, particles)

    def weighted(self, d: GibbsBoltzmann) -> Weighted:
        """Return particles of the distribution with their weights, of a run of their own."""
        return self._run(d)[1]

    def _run(self, d: GibbsBoltzmann) -> tuple[LogPartition, Weighted]:
        how = Climb(self.num_moves, CONDITIONAL, self.ess_threshold)
        with torch.inference_mode(False), torch.no_grad(), evaluating(d.energy):
            path = Path(d, self.proposal, self.kernel)
            particles, ladder, rates = climb(path, self.num_particles, how)
            path.report("SMC")
            estimate = _by_ancestors(particles)
            x = path.free.decode(particles.z)
        self.cost, self.num_temperatures = path.cost, len(ladder.t) - 1
        self.accept_rate = float(rates.mean())
        warn_low_ess(estimate.ess, "SMC")
        share = particles.log_weight.log_softmax(0)
        return estimate, Weighted(x, share + estimate.value)


def _by_ancestors(particles: Particles) -> LogPartition:
    r"""Estimate log Z, with the variance between families of one first ancestor.

    .. math:: \frac{n}{n - 1} \left( \sum_e \Big( \sum_{i: e_i = e} W_i \Big)^2 - \frac{1}{n}
        \right)
    """
    _, log_weight, offset, ancestor = particles
    n = len(log_weight)
    share = torch.softmax(log_weight, 0)
    square = torch.zeros_like(share).scatter_add(0, ancestor, share).square().sum(0)
    variance = ((square - 1 / n) * n / (n - 1)).clamp(min=0.0)
    value = offset + log_weight.logsumexp(0) - math.log(n)
    return LogPartition(value, variance.sqrt(), 1 / square)
