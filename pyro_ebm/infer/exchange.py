"""Posteriors of parameters whose normaliser is unknown, by auxiliary data."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from pyro_ebm._auxiliary import Declared, Exchanged
from pyro_ebm._potential import Potential
from pyro_ebm.adaptation import Adapted, Preconditioner, Warmup
from pyro_ebm.diagnostics import ConvergenceWarning
from pyro_ebm.distribution import GibbsBoltzmann
from pyro_ebm.energy import Energy
from pyro_ebm.infer.base import Sampler
from pyro_ebm.kernels import Dense, Diagonal, Kernel, State, exchange
from pyro_ebm.kernels.base import Metric, check_count
from pyro_ebm.sampling import Exchanging, Move


class Exchange(Sampler):
    r"""The exchange algorithm: parameters of an energy whose log Z is unknown.

    .. math:: p(\theta \mid x) \propto \pi(\theta) \prod_i
        \frac{b(x_i) \exp(-\beta E_\theta(x_i))}{Z(\theta)}

    Observed :class:`~pyro_ebm.GibbsBoltzmann` sites without ``log_partition`` are exchanged: at
    each proposal of a random walk auxiliary data are drawn for them, in whose ratio of densities
    the unknown Z cancel; see :func:`pyro_ebm.kernels.exchange`. All other sites stay as they are.

    The draws are exact, and so is the posterior, on finite supports small enough for a table, for
    a :class:`~pyro_ebm.FactorGraph`, and where the distribution has a ``sampler``, which is
    trusted. Elsewhere they are the ends of ``inner_steps`` moves from the observed data: sweeps
    of Gibbs sampling on finite supports, else HMC with steps adapted at each proposal. That is
    approximate, and a warning says so: run again with twice the ``inner_steps``, and trust what
    stays.

    ``lp`` and ``energy`` of the records are NaN: the density of the posterior remains unknown.

    Args:
        target: A Pyro model with continuous latent sites.
        inner_steps: The moves of the inner kernel, where draws are not exact.
        **kwargs: Those of every sampler: ``step_size``, here the scale of the random walk,
            ``target_accept_prob`` (.3), ``metric``, ``init_strategy``; see :class:`NUTS`.

    Raises:
        TypeError: If the target is no model.
        ValueError: If an argument is out of its range; when run, if no site lacks its log Z.
        NotImplementedError: When run, if the model has discrete latent sites, or scales a site
            that is exchanged.

    References:
        | MCMC for Doubly-Intractable Distributions (Murray, Ghahramani and MacKay, 2006)
        | https://arxiv.org/abs/1206.6848
        | A Double Metropolis-Hastings Sampler for Spatial Models with Intractable Normalizing
          Constants (Liang, 2010)
        | https://doi.org/10.1080/00949650902882162

    Example:
        >>> bits = ebm.Flat((4,), constraints.boolean)
        >>> def model(x):
        ...     k = pyro.sample("k", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("n", len(x)):
        ...         pyro.sample("x", ebm.GibbsBoltzmann(lambda x: -k * x.sum(-1), bits), obs=x)
        >>> mcmc = ebm.MCMC(ebm.Exchange(model), 1200, 200, num_chains=8, disable_progbar=True)
        >>> mcmc.run(torch.tensor([[1.0, 1.0, 0.0, 1.0], [1.0, 1.0, 0.0, 1.0]]))
        >>> bool((mcmc.get_samples()["k"].mean() - 0.66).abs() < 0.1)
        True
    """

    default_accept = 0.3

    def __init__(self, target: Any, *, inner_steps: int = 20, **kwargs: Any) -> None:
        if isinstance(target, GibbsBoltzmann) or not callable(target):
            raise TypeError(f"target must be a Pyro model, got {type(target).__name__}")
        check_count("inner_steps", inner_steps, 1)
        super().__init__(Declared(target), **kwargs)
        self.inner_steps = inner_steps

    @property
    def move(self) -> Move:
        return Exchanging(None)

    def move_on(self, potential: Potential) -> Move:
        sites = Exchanged(potential, self.inner_steps)
        if sites.approximate:
            names, num = ", ".join(map(repr, sites.approximate)), self.inner_steps
            warnings.warn(
                f"Approximate: the auxiliary data of {names} are the ends of {num} inner moves "
                f"from the observed data. Run again with inner_steps={2 * num}, and trust what "
                "stays; or give the distribution a sampler",
                ConvergenceWarning,
                stacklevel=4,
            )

        def make(adapted: Adapted) -> Kernel:
            return exchange(
                potential.energy,
                sites.likelihood,
                sites.sample,
                adapted.step_size,
                metric=adapted.metric,
                step_jitter=self.step_jitter,
            )

        return Exchanging(make)

    def make_kernel(self, energy: Energy, adapted: Adapted) -> Kernel:
        raise NotImplementedError(
            "Exchange makes no kernel of an energy alone: it needs auxiliary data, see "
            "ebm.kernels.exchange"
        )

    def warmup(self, num: int, like: Tensor) -> Warmup:
        return _Walk(num, like, **self._adaptation())

    def _adaptation(self) -> dict[str, Any]:
        return {**super()._adaptation(), "step_size": self.step_size or 1.0}

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "inner_steps": self.inner_steps}


class _Spread(Preconditioner):
    """The metric of a random walk: the covariance of the positions."""

    def metric(self) -> Metric:
        moment = self.window.x.moment
        assert moment is not None
        if self.full:
            variance = moment.diagonal()
            if self.window.size >= 100 * len(variance):  # of correlated draws
                ridged = moment + 1e-6 * variance.diag()
                if int(torch.linalg.cholesky_ex(ridged).info) == 0:
                    return Dense.of(ridged)
            moment = variance
        return Diagonal(torch.where(moment.isfinite() & (moment > 0), moment, 1.0))


class _Walk(Warmup):
    """Adapts the scale and the metric of a random walk.

    What :class:`Warmup` reads from energies is left out: they lack log Z, and so do not say
    whether chains have arrived, nor which are lost.
    """

    def __init__(self, num: int, like: Tensor, **options: Any) -> None:
        super().__init__(num, like, **options)
        if self.preconditioner is not None:
            self.preconditioner = _Spread(options["metric"], len(like))

    def update(self, before: Any, state: Any, info: Any, seen: list) -> None:
        position, none = state.position, torch.zeros_like(state.energy)
        at = State(position, none, torch.zeros_like(position))
        super().update(at, at, info, seen)
