"""log Z from draws of the distribution and of laws on the way to it: the optimal bridge, MBAR."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pyro_ebm._bennett import Influence, Masses, masses
from pyro_ebm._binding import evaluating
from pyro_ebm._free import MakeKernel
from pyro_ebm._path import Drawn, Path, replicate
from pyro_ebm.distribution import GibbsBoltzmann
from pyro_ebm.kernels.base import check_count
from pyro_ebm.partition.base import (
    LogPartition,
    Weighted,
    needs_value,
    surrogate,
    warn_low_ess,
    warn_unseen,
)


class Bridge:
    r"""log Z by the optimal bridge between draws of the distribution and of the base.

    .. math:: \frac{\langle e^{-V} \alpha \rangle_q}{\langle \alpha \rangle_p} = Z , \quad
        \alpha(x) = \frac{1}{e^{-V(x)} / Z + 1} , \quad e^{-V} = b \, e^{-\beta E} / q

    Errors are far smaller than those of importance sampling, since the draws need only overlap.
    Without ``samples`` the points are ``d.sample((num_samples,))``: exact on finite supports,
    elsewhere by the distribution's sampler or one short chain a point, an approximation where
    there are several modes or scales: then pass draws of your own, or use :class:`MBAR`. The
    error takes the autocorrelation of chains into account; ``ess`` is the effective number of
    draws in the overlap. A mode that no draw has seen cannot be noticed. NaN energies weigh
    nothing, with a warning.

    Args:
        proposal: The law :math:`q` at the other end, normalised; the base if None.
        num_samples: How many points to draw of the distribution, where there are no ``samples``.
        samples: Draws of the distribution, ``(chains, draws, *batch, *event)``, or
            ``(draws, *batch, *event)`` of one chain. As many are drawn of the proposal.

    Raises:
        ValueError: If there are fewer than two draws; when used, if there is no proposal and the
            base has an infinite volume, the samples have another shape or no density, or an
            energy is minus infinity.

    References:
        | Simulating Ratios of Normalizing Constants via a Simple Identity (Meng and Wong, 1996)
        | https://www3.stat.sinica.edu.tw/statistica/oldpdf/A6n43.pdf
        | Estimating Marginal Likelihoods for Mixture and Markov Switching Models Using Bridge
          Sampling Techniques (Fruehwirth-Schnatter, 2004)
        | https://doi.org/10.1111/j.1368-423X.2004.00125.x

    Example:
        >>> base = dist.Normal(torch.zeros(2), 2.0).to_event(1)
        >>> d = ebm.GibbsBoltzmann(lambda x: 0.375 * x.square().sum(-1), base)
        >>> est = ebm.partition.Bridge(samples=torch.randn(4000, 2))(d)
        >>> abs(est.value + 1.386) < 4 * est.std_error              # the truth is -log 4
        tensor(True)
    """

    value = "estimated"
    gradient = "estimated"

    def __init__(
        self, proposal: Any = None, num_samples: int = 1000, *, samples: Tensor | None = None
    ) -> None:
        check_count("num_samples", num_samples, 2)
        self.proposal, self.num_samples, self.samples = proposal, num_samples, samples

    def _draw(self, d: GibbsBoltzmann) -> tuple[Path, Drawn]:
        path = Path(d, self.proposal)
        with torch.inference_mode(False), torch.no_grad(), evaluating(d.energy):
            x = _chains(d, self.samples, self.num_samples)
            first, last = path.excess(path.sample(x.shape[:2])), path.excess(x)
            path.report("Bridge")
        betas = torch.tensor([0.0, 1.0], dtype=first.dtype, device=first.device)
        return path, Drawn(betas, torch.stack([first, last]), x)

    def weighted(self, d: GibbsBoltzmann) -> Weighted:
        """Return the draws of the distribution, of equal weights without gradients."""
        return _weighted(self.influence(d))

    def influence(self, d: GibbsBoltzmann) -> Influence:
        """Return the draws, in their chains, and what each of them adds to log Z."""
        return _influence(d, *self._draw(d), "Bridge")

    def log_z(self, d: GibbsBoltzmann, x: Tensor | None = None) -> Tensor:
        """Return the estimate of log Z.

        Raises:
            UnnormalizedError: If MCMC or importance sampling asks.
        """
        needs_value(self, "draws anew, so that it is never the same twice")
        return self(d).value

    def __call__(self, d: GibbsBoltzmann) -> LogPartition:
        """Return the estimate of log Z with its standard error and effective sample size."""
        return _estimate(d, *self._draw(d), "Bridge")[0]


class MBAR:
    r"""log Z along a ladder of temperatures, by the multistate acceptance ratio.

    .. math:: Z_k = \sum_n \frac{e^{-s_k \beta E(x_n)}}
        {\sum_l N_l \, e^{-s_l \beta E(x_n)} / Z_l}

    Chains at all levels :math:`s_k \beta` exchange their states; the level 0, the base (or a
    proposal), is drawn exactly and anew at each move, so that chains pass between modes. With a
    proposal the way goes through :math:`q^{1-s} (b e^{-\beta E})^s`. The covariance accounts for
    the correlation of draws in time and between levels. ``ess`` is the effective number of
    draws where the ladder overlaps least. NaN energies weigh nothing, with a warning.

    Args:
        betas: The levels :math:`s_k`, as shares of ``d.beta``, increasing from 0 to 1, or how
            many there are: then warm-up adapts them to equal rates of swaps.
        num_chains: The number of independent chains; the error is measured between them.
        num_samples: The draws of each chain at each level.
        proposal: The law to start from, normalised; the base if None.
        kernel: Makes an exact kernel of a potential, and on continuous supports of a step size,
            of points with the dimensions ``(K, chains, *batch)`` before the event. By default it
            is HMC, or Gibbs sampling on finite supports.
        warmup: The moves before the first draw.

    Raises:
        TypeError: If ``betas`` is a tensor of whole numbers.
        ValueError: If a count is too small, or ``betas`` not as said; when used, if there is no
            proposal and the base has an infinite volume, or an energy is minus infinity.

    References:
        | Statistically Optimal Analysis of Samples from Multiple Equilibrium States (Shirts and
          Chodera, 2008)
        | https://arxiv.org/abs/0801.1426

    Example:
        >>> wells = lambda x: 8.0 * (x.square() - 1.0).square()
        >>> d = ebm.GibbsBoltzmann(wells, dist.Normal(0.0, 2.0))
        >>> truth = ebm.log_partition(d, ebm.partition.Quadrature(-5.0, 5.0, 200)).value
        >>> est = ebm.partition.MBAR(5, num_samples=100)(d)
        >>> abs(est.value - truth) < 4 * est.std_error
        tensor(True)
    """

    value = "estimated"
    gradient = "estimated"

    def __init__(
        self,
        betas: Tensor | int = 8,
        num_chains: int = 32,
        num_samples: int = 200,
        *,
        proposal: Any = None,
        kernel: MakeKernel | None = None,
        warmup: int = 200,
    ) -> None:
        check_count("num_chains", num_chains, 1)
        check_count("num_samples", num_samples, 1)
        check_count("warmup", warmup, 0)
        if num_chains * num_samples < 2:
            raise ValueError("num_chains * num_samples must be at least 2, got 1")
        _check_levels(betas)
        self.betas, self.proposal, self.kernel = betas, proposal, kernel
        self.counts = num_chains, num_samples, warmup
        self._kept: Drawn | None = None

    @classmethod
    def from_tempered(cls, mcmc: Any) -> MBAR:
        """Use the chains of a run of :class:`~pyro_ebm.Tempered` instead of new ones.

        Fresh draws of the base stand for the level 0, which the run does not have. The run's
        target must be a distribution without a batch, and the method is for that one.

        Args:
            mcmc: An :class:`~pyro_ebm.MCMC` of ``ebm.Tempered(d, ..., keep_ladder=True)`` that
                has run.

        Raises:
            ValueError: If the run has not kept its ladder, or its target has a batch.
        """
        target, stats = mcmc.kernel.target, mcmc.sample_stats
        names = sorted((n for n in stats if n.startswith("ladder_")), key=lambda n: int(n[7:]))
        if not names:
            raise ValueError("mcmc must be of Tempered(..., keep_ladder=True), got none kept")
        if not isinstance(target, GibbsBoltzmann) or target.batch_shape:
            shape = tuple(getattr(target, "batch_shape", ()))
            raise ValueError(
                "mcmc must have a GibbsBoltzmann without a batch as its target, got "
                f"{type(target).__name__} of batch shape {shape}"
            )
        excess = torch.stack([stats[n].T for n in names])  # shape: (K, T, C)
        x = mcmc.get_samples(group_by_chain=True)["x"].transpose(0, 1)
        new = cls(num_chains=excess.shape[2], num_samples=excess.shape[1])
        new._kept = Drawn(mcmc.adapted.betas, excess, x)
        return new

    def _draw(self, d: GibbsBoltzmann) -> tuple[Path, Drawn]:
        path = Path(d, self.proposal, self.kernel)
        with torch.inference_mode(False), torch.no_grad(), evaluating(d.energy):
            if self._kept is not None:
                drawn = _with_base(path, self._kept)
            elif isinstance(self.betas, Tensor):
                drawn = replicate(path, self.betas, *self.counts)
            else:
                betas = torch.linspace(0.0, 1.0, self.betas).pow(3)
                drawn = replicate(path, betas, *self.counts, respace=True)
            path.report("MBAR")
        return path, drawn

    def ladder(self, d: GibbsBoltzmann) -> tuple[Tensor, LogPartition, Tensor]:
        r"""Return log Z at all levels, from one run.

        Args:
            d: The distribution.

        Returns:
            The levels :math:`s_k` ``(K,)``, the log Z of :math:`b \exp(-s_k \beta E)` at each,
            of shape ``(K, *batch)``, without gradients, and its covariance
            ``(K, K, *batch)``. With a proposal they are those of the way from it.
        """
        path, drawn = self._draw(d)
        found = _solved(drawn, "MBAR")
        std_error = found.covariance.diagonal().movedim(-1, 0).sqrt()
        value, like = found.log_mass + path.log_mass, drawn.excess
        parts = value, std_error, found.ess.expand_as(value)
        estimate = LogPartition(*(part.to(like) for part in parts))
        return drawn.betas, estimate, found.covariance.to(like)

    def weighted(self, d: GibbsBoltzmann) -> Weighted:
        """Return the draws at the last level, of equal weights without gradients."""
        return _weighted(self.influence(d))

    def influence(self, d: GibbsBoltzmann) -> Influence:
        """Return the draws, in their chains, and what each of them adds to log Z."""
        return _influence(d, *self._draw(d), "MBAR")

    def log_z(self, d: GibbsBoltzmann, x: Tensor | None = None) -> Tensor:
        """Return the estimate of log Z.

        Raises:
            UnnormalizedError: If MCMC or importance sampling asks.
        """
        needs_value(self, "draws anew, so that it is never the same twice")
        return _estimate(d, *self._draw(d), "MBAR")[0].value

    def __call__(self, d: GibbsBoltzmann) -> LogPartition:
        """Return the estimate of log Z with its standard error and effective sample size.

        Where there is a proposal, a few short chains from the base look for what it misses.
        """
        estimate, particles = _estimate(d, *self._draw(d), "MBAR")
        warn_unseen(d, self.proposal, particles, "MBAR")
        return estimate


def _check_levels(betas: Any) -> None:
    if not isinstance(betas, Tensor):
        return check_count("betas", betas, 2)
    if not betas.is_floating_point():
        raise TypeError(f"betas must be of floating point, got {betas.dtype}")
    right = betas.dim() == 1 and len(betas) > 1 and betas[0] == 0 and betas[-1] == 1
    if not (right and bool((betas.diff() > 0).all())):
        raise ValueError(
            f"betas must be shares of d.beta that increase from 0 to 1, got {betas.tolist()}"
        )
    return None


def _chains(d: GibbsBoltzmann, samples: Tensor | None, num: int) -> Tensor:
    """Return draws of a distribution, ``(T, C, *batch, *event)``."""
    if samples is None:  # independent of each other: a chain each
        return d.sample(torch.Size((num,))).unsqueeze(0)
    shape, spare = d.shape(), samples.dim() - len(d.shape())
    fits = spare in (1, 2) and samples.shape[spare:] == shape
    if not fits or samples.shape[:spare].numel() < 2:
        raise ValueError(
            f"samples must be two or more points of shape (chains, draws, *{tuple(shape)}), got "
            f"{tuple(samples.shape)}"
        )
    grid = (samples.unsqueeze(0) if spare == 1 else samples).detach().transpose(0, 1)
    walls = int((~(d.potential(grid) < torch.inf)).sum())
    if walls:
        raise ValueError(f"samples must have positive densities, got {walls} points of none")
    return grid


def _with_base(path: Path, kept: Drawn) -> Drawn:
    """Put exact draws of the base before the levels of a run of the same distribution."""
    now, then = path.excess(kept.x), kept.excess[-1]
    scale = torch.finfo(then.dtype).eps ** 0.5
    if now.shape != then.shape or not torch.allclose(now, then, rtol=scale, atol=scale):
        raise ValueError(
            "d must be the target of the run of Tempered, with the parameters that it had then: "
            "its energies at the run's draws are others"
        )
    first = path.excess(path.sample((1, *then.shape[:2])))
    betas = torch.cat([torch.zeros_like(kept.betas[:1]), kept.betas]).to(then)
    return Drawn(betas, torch.cat([first, kept.excess]), kept.x)


def _solved(drawn: Drawn, what: str) -> Masses:
    found = masses(drawn.excess, drawn.betas)
    # equations that have no solution are those of levels without any overlap
    lost = torch.where(found.converged, found.ess.nan_to_num(0.0), 0.0)
    warn_low_ess(lost, what)
    return found._replace(ess=lost)


def _estimate(
    d: GibbsBoltzmann, path: Path, drawn: Drawn, what: str
) -> tuple[LogPartition, Weighted]:
    found, like = _solved(drawn, what), drawn.excess
    value = (found.log_mass[-1] + path.log_mass).to(like)
    # less than one draw in the overlap says nothing of its own error
    std_error = torch.where(found.ess >= 1, found.covariance[-1, -1].sqrt(), torch.inf)
    x = drawn.x.flatten(0, 1)
    particles = Weighted(x, torch.zeros(len(x), *value.shape).to(like))
    estimate = LogPartition(surrogate(d, value, particles), std_error.to(like), found.ess.to(like))
    return estimate, particles


def _influence(d: GibbsBoltzmann, path: Path, drawn: Drawn, what: str) -> Influence:
    found, like = _solved(drawn, what), drawn.excess
    log_z = found.log_mass[-1] + path.log_mass
    parts = (part.to(like) for part in (log_z, found.influence, found.ess))
    return Influence(drawn.x, *parts)


def _weighted(found: Influence) -> Weighted:
    x = found.x.flatten(0, 1)
    log_weight = found.log_z - math.log(len(x))
    return Weighted(x, log_weight.expand(len(x), *log_weight.shape))
