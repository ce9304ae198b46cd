"""log Z by annealed importance sampling, from below and from above."""

from __future__ import annotations

import math
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_ebm._binding import evaluating
from pyro_ebm._climb import Climb, climb, refined
from pyro_ebm._free import MakeKernel
from pyro_ebm._guard import UnnormalizedError, UnnormalizedWarning, is_tracing
from pyro_ebm._math import tail_index
from pyro_ebm._path import Cost, Ladder, Path, anneal
from pyro_ebm.distribution import GibbsBoltzmann
from pyro_ebm.kernels.base import check_count
from pyro_ebm.partition.base import (
    MIN_ESS,
    LogPartition,
    Weighted,
    from_weights,
    needs_value,
    surrogate,
    warn_low_ess,
    warn_unseen,
)

PILOT = 64  # particles that choose temperatures, scales and steps: a scale to 9 per cent
HEAVY = 0.6  # weights whose tail has a larger index lie within 3 errors in less than 95 per cent


class Bracket(NamedTuple):
    """Two estimates of log Z: ``lower`` is below and ``upper`` above it, each on average."""

    lower: LogPartition
    upper: LogPartition


class Kept(NamedTuple):
    """Particles ``x`` with their weights, and what the ``potential`` was when they were made."""

    x: Tensor
    log_weight: Tensor
    potential: Tensor


class Annealed:
    r"""log Z by annealed importance sampling.

    .. math:: Z \approx \frac{1}{n} \sum_i \prod_k \exp(-(t_{k + 1} - t_k)
        (U_1 - U_0)(x_i^{(k)})) , \quad U_t = -(1 - t) \log q + t (\beta E - \log b)

    Particles from the proposal q move along the path :math:`U_t`, each one weighed before it
    moves. The estimate of Z is unbiased, so that of log Z a lower bound on average. With
    ``reverse`` the particles start from the distribution itself and the bound is an upper one;
    since it is wrong, and does not show it, where the starts miss a mode, a forward run of the
    same size goes with it, and a warning says where the two contradict: twice the cost. See
    :meth:`bracket`.

    Temperatures, scales and steps of the moves are chosen by a pilot run of 64 other particles
    and then fixed, so that they bias nothing. NaN energies weigh nothing, with a warning. After
    a run ``cost`` has the evaluations of it all, and ``accept_rate`` the share of moves accepted.

    Args:
        kernel: Makes an exact kernel: of a potential and the step of each chain, as
            :func:`~pyro_ebm.kernels.mala`, and on finite supports of a potential alone. By
            default trajectories of HMC and sweeps of Gibbs sampling.
        num_particles: The number of particles :math:`n`.
        num_steps: The number of temperatures, with one move at each.
        reverse: Whether to estimate from above.
        proposal: The proposal :math:`q`, a normalised distribution; the base if None. A mode
            that its particles do not reach is left out, which :meth:`bracket` shows.
        start: Points of the distribution, ``(m, *event)`` or ``(m, *batch, *event)``, at which
            reverse runs start, each at another; by default draws of :meth:`GibbsBoltzmann.sample`:
            exact where the support is small and finite or there is a ``sampler``, else ends of
            short chains from the base.
        common_random_numbers: Whether particles are made once, at the first evaluation of each
            shape of batch, and reweighted at other parameters: log Z is then a smooth function
            for that shape, as HMC and NUTS need. Particles of one element serve all shapes that
            come later. Where too few particles are left to stand for it, that is refused.
            Evaluate once near the middle of the posterior first, and remember that a likelihood
            of N data has N times the error of log Z.

    Raises:
        ValueError: If an argument is out of its range; when used, if there is no proposal and
            the base has an infinite volume, or an energy is minus infinity.

    References:
        | Annealed Importance Sampling (Neal, 2001)
        | https://doi.org/10.1023/A:1008923215028
        | Sandwiching the Marginal Likelihood Using Bidirectional Monte Carlo (Grosse, Ghahramani
          and Adams, 2015)
        | https://arxiv.org/abs/1511.02543

    Example:
        >>> base = dist.Normal(torch.zeros(2), 2.0).to_event(1)
        >>> d = ebm.GibbsBoltzmann(lambda x: 0.375 * x.square().sum(-1), base)
        >>> est = Annealed(num_particles=256, num_steps=20)(d)   # the truth is -log 4
        >>> abs(est.value + 1.386) < 4 * est.std_error
        tensor(True)
    """

    value = "estimated"
    gradient = "estimated"

    def __init__(
        self,
        kernel: MakeKernel | None = None,
        num_particles: int = 512,
        num_steps: int = 128,
        *,
        reverse: bool = False,
        proposal: Any = None,
        start: Tensor | None = None,
        common_random_numbers: bool = False,
    ) -> None:
        check_count("num_particles", num_particles, 2)
        check_count("num_steps", num_steps, 1)
        if reverse and common_random_numbers:
            raise ValueError("common_random_numbers must be False for reverse runs, got True")
        self.kernel, self.num_particles, self.num_steps = kernel, num_particles, num_steps
        self.reverse, self.proposal, self.start = reverse, proposal, start
        self.common_random_numbers = common_random_numbers
        self.cost, self.accept_rate = Cost(0, 0), math.nan
        self._kept: list[Kept] = []

    @property
    def bound(self) -> str:
        """On which side of log Z the estimate is on average."""
        return "upper" if self.reverse else "lower"

    def __call__(self, d: GibbsBoltzmann) -> LogPartition:
        """Return the estimate of log Z with its standard error and effective sample size.

        Where there is a proposal, a few short chains from the base look for what it misses.
        """
        estimate, particles = self._estimate(d)
        warn_unseen(d, self.proposal, particles, "Annealed")
        return estimate

    def log_z(self, d: GibbsBoltzmann, x: Tensor | None = None) -> Tensor:
        """Return the estimate of log Z.

        Raises:
            UnnormalizedError: If MCMC asks and the particles are not common, or they no longer
                stand for the distribution.
            NotImplementedError: If the model is traced, which would freeze the particles.
        """
        if is_tracing():
            raise NotImplementedError(
                "Annealed looks at its particles at every evaluation, which a traced model cannot "
                "repeat: use Trace_ELBO instead of JitTrace_ELBO, or MCMC without tracing"
            )
        if not self.common_random_numbers:
            needs_value(self, "draws fresh particles, so that it is never the same twice")
        return self._estimate(d)[0].value

    def weighted(self, d: GibbsBoltzmann) -> Weighted:
        """Return particles of the distribution with their weights, of a run of their own."""
        return self._estimate(d)[1]

    def bracket(self, d: GibbsBoltzmann) -> Bracket:
        r"""Estimate log Z from below and from above.

        Each bound holds on average over runs and where its starts are right. A warning says
        where the two contradict each other: then the reverse starts lie in some of the modes
        only, or forward particles do not reach where the distribution is.

        Args:
            d: The distribution.

        Returns:
            The lower and the upper estimate, each with its error.

        Example:
            >>> d = ebm.GibbsBoltzmann(lambda x: -x.sum(-1), ebm.Flat((9,), constraints.boolean))
            >>> lower, upper = Annealed(num_steps=50).bracket(d)
            >>> (upper.value - lower.value).abs() < 0.1     # 9 log(1 + e)
            tensor(True)
        """
        with torch.inference_mode(False), torch.no_grad(), evaluating(d.energy):
            path, ladder = self._pilot(d)
            lower, _ = self._forward(path, ladder)
            upper, _ = self._backward(path, ladder)
            self._finish(path)
        _check_bracket(lower, upper)
        return Bracket(lower, upper)

    def _estimate(self, d: GibbsBoltzmann) -> tuple[LogPartition, Weighted]:
        """Make a run, and give its value the gradient of its particles."""
        if self.common_random_numbers:
            return self._reweighted(d)
        with torch.inference_mode(False), torch.no_grad(), evaluating(d.energy):
            path, ladder = self._pilot(d)
            estimate, particles = self._forward(path, ladder)
            if self.reverse:
                lower, (estimate, particles) = estimate, self._backward(path, ladder)
                _check_bracket(lower, estimate)
            self._finish(path)
        return estimate._replace(value=surrogate(d, estimate.value, particles)), particles

    def _pilot(self, d: GibbsBoltzmann) -> tuple[Path, Ladder]:
        """Let a few particles choose the temperatures and how to move at them."""
        path = Path(d, self.proposal, self.kernel)
        _, ladder, _ = climb(path, PILOT, Climb(2, 0.8, 0.5))
        return path, refined(ladder, self.num_steps)

    def _finish(self, path: Path) -> None:
        path.report("annealing")
        self.cost = path.cost

    def _forward(self, path: Path, ladder: Ladder) -> tuple[LogPartition, Weighted]:
        """Anneal from the proposal to the distribution."""
        start = path.draw(self.num_particles)
        z, log_weight, rate = anneal(path, start.z, start.log_weight, ladder)
        self.accept_rate = float(rate.mean())
        estimate = from_weights(log_weight)
        _warn(estimate, log_weight, "Annealed")
        return estimate, Weighted(path.free.decode(z), log_weight - math.log(len(z)))

    def _backward(self, path: Path, ladder: Ladder) -> tuple[LogPartition, Weighted]:
        """Anneal from the distribution to the proposal."""
        x = self._starts(path.d)
        zero = torch.zeros(x.shape[: x.dim() - path.d.event_dim]).to(ladder.t)
        _, log_weight, _ = anneal(path, path.free.encode(x), zero, ladder, reverse=True)
        inverse = from_weights(log_weight)
        _warn(inverse, log_weight, "Annealed(reverse=True)")
        estimate = inverse._replace(value=path.log_mass - inverse.value)
        return estimate, Weighted(x, zero + estimate.value - math.log(len(x)))

    def _starts(self, d: GibbsBoltzmann) -> Tensor:
        """Return points of the distribution."""
        if self.start is None:
            return d.sample(torch.Size((self.num_particles,)))
        x, event_dim = self.start.detach(), d.event_dim
        if not d.support.check(x).all():
            raise ValueError(f"start must hold points of the support {d.support}")
        if x.dim() == 1 + event_dim:
            x = x.reshape(len(x), *[1] * len(d.batch_shape), *d.event_shape)
        x = x[torch.randperm(len(x), device=x.device)[: self.num_particles]]
        x = x.expand(len(x), *d.batch_shape, *d.event_shape)
        energy = d.potential(x)
        if len(x) < 2 or not energy.isfinite().all():
            raise ValueError(
                "start must hold at least two points of finite energy, got "
                f"{int(energy.isfinite().sum())} of {energy.numel()}"
            )
        return x

    def _reweighted(self, d: GibbsBoltzmann) -> tuple[LogPartition, Weighted]:
        """Let the particles of the first evaluation stand for another distribution near it."""
        x, before, old = self._keep(d)
        new = d.potential(x)
        wall = (before == -torch.inf) | (new == torch.inf)
        change = torch.where(wall, 0.0, old) - torch.where(wall, 0.0, new)
        log_weight = torch.where(wall, -torch.inf, before + change)
        estimate = from_weights(log_weight + math.log(len(log_weight)))
        low = float(estimate.ess.min())
        if not low >= MIN_ESS:
            raise UnnormalizedError(
                "the common particles of Annealed no longer stand for the distribution: their "
                f"effective sample size is {low:.1f} here, below {MIN_ESS:.0f}. Evaluate the "
                "method once near the middle of the posterior before inference, use more "
                "particles, or Table or Exchange, which need no particles in common"
            )
        return estimate, Weighted(x, log_weight)

    def _keep(self, d: GibbsBoltzmann) -> Kept:
        """Return the first particles in common that fit, made now if there are none."""
        kept = next((kept for kept in self._kept if _fits(kept, d)), None)
        if kept is None:
            with torch.inference_mode(False), torch.no_grad(), evaluating(d.energy):
                path, ladder = self._pilot(d)
                particles = self._forward(path, ladder)[1]
                self._finish(path)
                kept = Kept(*particles, d.potential(particles.x))
            self._kept.append(kept)
        x, log_weight, potential = kept
        ones = [1] * (len(d.batch_shape) + 1 - log_weight.dim())
        wide = (a.reshape(len(a), *ones, *a.shape[1:]) for a in (x, log_weight, potential))
        return Kept(*wide)


def _fits(kept: Kept, d: GibbsBoltzmann) -> bool:
    """Whether kept particles have the event of a distribution, and a batch that broadcasts."""
    batch = kept.log_weight.shape[1:]
    if kept.x.shape[1 + len(batch) :] != d.event_shape or len(batch) > len(d.batch_shape):
        return False
    pairs = zip(reversed(batch), reversed(d.batch_shape), strict=False)
    return all(n in (1, m) for n, m in pairs)


def _warn(estimate: LogPartition, log_weight: Tensor, what: str) -> None:
    """Say so when weights are few, or too heavy-tailed for the error that they show."""
    warn_low_ess(estimate.ess, what)
    k = tail_index(log_weight)
    heavy = (k > HEAVY) & (estimate.ess < len(log_weight) / 2)
    if heavy.any() and float(estimate.ess.min()) >= MIN_ESS:
        warnings.warn(
            f"the error of log Z by {what} cannot be trusted: its weights are heavy-tailed, with "
            f"an index above {HEAVY} in {int(heavy.sum())} of {heavy.numel()} batch elements. Use "
            "more steps, or a proposal closer to the distribution",
            UnnormalizedWarning,
            stacklevel=4,
        )


def _check_bracket(lower: LogPartition, upper: LogPartition) -> None:
    """Say so when the estimates from both sides are farther apart than their errors."""
    gap = upper.value - lower.value
    rounding = torch.finfo(gap.dtype).eps ** 0.5 * (1.0 + lower.value.abs())
    error = (lower.std_error.square() + upper.std_error.square()).sqrt()
    far = ~(gap.abs() <= 3 * error + rounding)
    if not far.any():
        return
    i = int(far.flatten().nonzero()[0])
    low, high = (float(part.value.flatten()[i]) for part in (lower, upper))
    which = (
        "the bound from above lies below that from below, so the reverse starts miss modes of "
        "the distribution: pass start= or a sampler that has them all"
        if high < low
        else "log Z lies between them, but neither error is to be trusted: use more steps"
    )
    warnings.warn(
        f"log Z by Annealed contradicts itself: {low:.4g} from below and {high:.4g} from above, "
        f"farther apart than 3 of their errors; {which}",
        UnnormalizedWarning,
        stacklevel=4,
    )
