"""Samplers as what they are made of: a target, a kind of move, and what warm-up adapts."""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Real
from typing import Any

import torch
from pyro.infer.autoguide.initialization import init_to_uniform
from torch import Tensor

from pyro_ebm._ladder import Ladder
from pyro_ebm._potential import Potential
from pyro_ebm.adaptation import Adapted, Warmup
from pyro_ebm.distribution import GibbsBoltzmann
from pyro_ebm.energy import Energy
from pyro_ebm.kernels import Kernel, hmc, nuts
from pyro_ebm.kernels.base import check_count, check_positive, check_share
from pyro_ebm.sampling import Exchanging, Hamiltonian, Move, NoUTurn, Replica

METRICS = ("auto", "diagonal", "dense", None)


class Sampler:
    """What all samplers share; make one of its kinds.

    Args:
        target: A Pyro model, a :class:`~pyro_ebm.GibbsBoltzmann`, or, with ``base``, an energy.
        base: The base of a target that is a plain energy.
        step_size: The leapfrog step to start from; by default warm-up finds it.
        adapt_step_size: Whether warm-up adapts it.
        target_accept_prob: The mean acceptance probability to adapt it to.
        metric: What warm-up adapts: ``"diagonal"``, ``"dense"``, ``"auto"`` (dense in up to 128
            dimensions where correlations matter) or ``None`` for the identity.
        step_jitter: The share by which each chain's step is drawn anew at each move.
        init_strategy: One of Pyro's, for the starting points.
    """

    default_accept = 0.8

    def __init__(  # noqa: PLR0913 - the names that Pyro's kernels have
        self,
        target: Any,
        base: Any = None,
        *,
        step_size: float | None = None,
        adapt_step_size: bool = True,
        target_accept_prob: float | None = None,
        metric: str | None = "auto",
        step_jitter: float = 0.1,
        init_strategy: Callable[..., Any] = init_to_uniform,
    ) -> None:
        if base is not None:
            target = GibbsBoltzmann(target, base)
        if not callable(target) and not isinstance(target, GibbsBoltzmann):
            got = type(target).__name__
            raise TypeError(
                "target must be a Pyro model, a GibbsBoltzmann or an energy with a base, got "
                f"{got}"
            )
        if step_size is not None:
            if not isinstance(step_size, Real):
                got = type(step_size).__name__
                raise TypeError(f"step_size must be a number, got {got}")
            check_positive("step_size", step_size)
        accept = self.default_accept if target_accept_prob is None else target_accept_prob
        if not 0.0 < accept < 1.0:
            raise ValueError(f"target_accept_prob must be between 0 and 1, got {accept}")
        if metric not in METRICS:
            raise ValueError(f"metric must be one of {METRICS}, got {metric!r}")
        if step_size is None and not adapt_step_size:
            raise ValueError("adapt_step_size=False needs a step_size, got None")
        check_share("step_jitter", step_jitter)
        self.target, self.step_size, self.adapt_step_size = target, step_size, adapt_step_size
        self.target_accept_prob, self.metric = accept, metric
        self.step_jitter, self.init_strategy = step_jitter, init_strategy

    chees = False

    def move_on(self, potential: Potential) -> Move:
        """The kind of move on a potential."""
        return self.move

    @property
    def move(self) -> Move:
        """The kind of move."""
        raise NotImplementedError

    def warmup(self, num: int, like: Tensor) -> Warmup:
        """Return the adaptation of ``num`` moves, for points like ``like`` of shape ``(D,)``."""
        return Warmup(num, like, **self._adaptation())

    def _adaptation(self) -> dict[str, Any]:
        return {
            "target": self.target_accept_prob,
            "step_size": self.step_size,
            "adapt_step_size": self.adapt_step_size,
            "metric": self.metric,
            "chees": self.chees,
        }

    def make_kernel(self, energy: Energy, adapted: Adapted) -> Kernel:
        """Return a kernel with what a warm-up found."""
        move, size = self.move, float(adapted.step_size)
        if isinstance(move, NoUTurn):
            depth, jitter = move.max_tree_depth, move.step_jitter
            return nuts(
                energy, size, metric=adapted.metric, max_tree_depth=depth, step_jitter=jitter
            )
        assert not isinstance(move, Exchanging)
        num = move.num_steps or adapted.num_steps
        return hmc(energy, size, num, metric=adapted.metric, step_jitter=move.step_jitter)

    def settings(self) -> dict[str, Any]:
        """What a checkpoint must agree with."""
        return {
            "kernel": type(self).__name__,
            "move": repr(self.move),
            "step_size": self.step_size,
            "adapt_step_size": self.adapt_step_size,
            "target_accept_prob": self.target_accept_prob,
            "metric": self.metric,
        }


class NUTS(Sampler):
    r"""The no-U-turn sampler, for all chains at once; the default for a few chains.

    Args:
        target: A Pyro model, a :class:`~pyro_ebm.GibbsBoltzmann`, or, with ``base``, an energy.
        *args: The base of a target that is an energy.
        max_tree_depth: The most doublings of a trajectory.
        **kwargs: Those of every sampler: ``step_size``, ``adapt_step_size``,
            ``target_accept_prob`` (.8), ``metric`` (``"auto"``, ``"diagonal"``, ``"dense"`` or
            ``None``), ``step_jitter``, ``init_strategy``.

    Raises:
        TypeError: If the target is none.
        ValueError: If an argument is out of its range.

    References:
        | The No-U-Turn Sampler (Hoffman and Gelman, 2014)
        | https://arxiv.org/abs/1111.4246

    Example:
        >>> def model(y):
        ...     mean = pyro.sample("mean", dist.Normal(0.0, 10.0))
        ...     with pyro.plate("n", len(y)):
        ...         pyro.sample("y", dist.Normal(mean, 1.0), obs=y)
        >>> mcmc = ebm.MCMC(ebm.NUTS(model), 1000, num_chains=4, disable_progbar=True)
        >>> mcmc.run(torch.tensor([-1.0, 0.5, 2.0]))
        >>> mcmc.get_samples(group_by_chain=True)["mean"].shape
        torch.Size([4, 1000])
    """

    def __init__(self, target: Any, *args: Any, max_tree_depth: int = 10, **kwargs: Any) -> None:
        super().__init__(target, *args, **kwargs)
        check_count("max_tree_depth", max_tree_depth, 1, 20)
        self.max_tree_depth = max_tree_depth

    @property
    def move(self) -> Move:
        return NoUTurn(self.max_tree_depth, self.step_jitter)


class HMC(Sampler):
    r"""Hamiltonian Monte Carlo with a fixed mean number of leapfrog steps.

    Args:
        target: A Pyro model, a :class:`~pyro_ebm.GibbsBoltzmann`, or, with ``base``, an energy.
        *args: The base of a target that is an energy.
        num_steps: The mean number of leapfrog steps.
        jitter: The share by which that number is drawn anew at each move.
        **kwargs: Those of every sampler; see :class:`NUTS`.

    Raises:
        TypeError: If the target is none.
        ValueError: If an argument is out of its range.

    References:
        | MCMC Using Hamiltonian Dynamics (Neal, 2011)
        | https://arxiv.org/abs/1206.1901

    Example:
        >>> energy = lambda x: 0.5 * x.square().sum(-1)
        >>> kernel = ebm.HMC(energy, ebm.Flat((2,)), num_steps=4)
        >>> mcmc = ebm.MCMC(kernel, 200, num_chains=16, disable_progbar=True)
        >>> mcmc.run()
        >>> mcmc.get_samples()["x"].shape
        torch.Size([3200, 2])
    """

    def __init__(
        self, target: Any, *args: Any, num_steps: int = 8, jitter: float = 0.2, **kwargs: Any
    ) -> None:
        super().__init__(target, *args, **kwargs)
        check_count("num_steps", num_steps, 1)
        check_share("jitter", jitter)
        self.num_steps, self.jitter = num_steps, jitter

    @property
    def move(self) -> Move:
        return Hamiltonian(self.num_steps, self.jitter, self.step_jitter)


class ChEES(Sampler):
    r"""Hamiltonian Monte Carlo whose trajectory length all chains find together.

    The default for many chains: each draw costs all chains the same. The number of leapfrog
    steps is that with the most effective draws per gradient, for positions and their squares
    alike; see :class:`pyro_ebm.adaptation.Length`.

    Args:
        target: A Pyro model, a :class:`~pyro_ebm.GibbsBoltzmann`, or, with ``base``, an energy.
        *args: The base of a target that is an energy.
        jitter: The share by which the number of steps is drawn anew at each move.
        **kwargs: Those of every sampler; see :class:`NUTS`. ``step_jitter`` is .2.

    Raises:
        TypeError: If the target is none.
        ValueError: If an argument is out of its range.

    References:
        | An Adaptive-MCMC Scheme for Setting Trajectory Lengths in Hamiltonian Monte Carlo
          (Hoffman, Radul and Sountsov, 2021)
        | http://proceedings.mlr.press/v130/hoffman21a.html

    Example:
        >>> d = ebm.GibbsBoltzmann(lambda x: 0.5 * x.square().sum(-1), ebm.Flat((2,)))
        >>> mcmc = ebm.MCMC(ebm.ChEES(d), 500, num_chains=64, disable_progbar=True)
        >>> mcmc.run()
        >>> mcmc.get_samples()["x"].shape
        torch.Size([32000, 2])
    """

    chees = True

    def __init__(self, target: Any, *args: Any, jitter: float = 0.2, **kwargs: Any) -> None:
        super().__init__(target, *args, **{"step_jitter": 0.2, **kwargs})
        check_share("jitter", jitter)
        self.jitter = jitter

    @property
    def move(self) -> Move:
        return Hamiltonian(None, self.jitter, self.step_jitter)


class MALA(Sampler):
    r"""The Metropolis-adjusted Langevin algorithm: HMC with one leapfrog step.

    A Langevin step of size :math:`\epsilon^2 / 2` is a leapfrog step of size :math:`\epsilon`.

    Args:
        target: A Pyro model, a :class:`~pyro_ebm.GibbsBoltzmann`, or, with ``base``, an energy.
        *args: The base of a target that is an energy.
        **kwargs: Those of every sampler; see :class:`NUTS`. ``target_accept_prob`` is .574.

    Raises:
        TypeError: If the target is none.
        ValueError: If an argument is out of its range.

    References:
        | Exponential Convergence of Langevin Distributions (Roberts and Tweedie, 1996)
        | https://doi.org/10.2307/3318418

    Example:
        >>> d = ebm.GibbsBoltzmann(lambda x: 0.5 * x.square().sum(-1), ebm.Flat((2,)))
        >>> mcmc = ebm.MCMC(ebm.MALA(d), 500, num_chains=64, disable_progbar=True)
        >>> mcmc.run()
        >>> mcmc.get_samples()["x"].shape
        torch.Size([32000, 2])
    """

    default_accept = 0.574

    def __init__(self, target: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(target, *args, **kwargs)

    @property
    def move(self) -> Move:
        return Hamiltonian(1, 0.0, self.step_jitter)


class Tempered(Sampler):
    r"""Replica exchange: HMC at several temperatures, for targets with several modes.

    .. math:: p_\beta(x) \propto b(x) \exp(-\beta E(x))

    Of a model, observations, factors and the energies of energy sites are tempered, its priors
    are not: the hot end tends to the prior. Discrete latents that are summed out are tempered
    jointly with the rest, before the sum. Warm-up adapts the temperatures between
    ``min_beta`` and 1 to equal rates of swaps; ``sample_stats`` counts round trips.

    Args:
        target: A Pyro model, a :class:`~pyro_ebm.GibbsBoltzmann`, or, with ``base``, an energy.
        *args: The base of a target that is an energy.
        num_temperatures: The number of temperatures, at least 2.
        min_beta: The hottest: modes must be connected there, and the law proper.
        num_steps: The mean number of leapfrog steps of a move.
        jitter: The share by which that number is drawn anew at each move.
        keep_ladder: Whether ``sample_stats`` has, as ``ladder_0`` to the coldest, the tempered
            energy of the replica at each temperature, for :meth:`.MBAR.from_tempered`.
        **kwargs: Those of every sampler; see :class:`NUTS`. The metric is diagonal.

    Raises:
        TypeError: If the target is none.
        ValueError: If an argument is out of its range.

    References:
        | Non-Reversible Parallel Tempering: a Scalable Highly Parallel MCMC Scheme (Syed,
          Bouchard-Cote, Deligiannidis, Doucet, 2021)
        | https://doi.org/10.1111/rssb.12464

    Example:
        >>> wells = lambda x: 8.0 * (x.square() - 1.0).square().sum(-1)
        >>> base = dist.Normal(torch.zeros(1), 1.0).to_event(1)
        >>> kernel = ebm.Tempered(wells, base, num_temperatures=5, target_accept_prob=0.95)
        >>> mcmc = ebm.MCMC(kernel, 500, num_chains=32, disable_progbar=True)
        >>> mcmc.run()
        >>> bool((mcmc.get_samples()["x"] > 0).float().mean().sub(0.5).abs() < 0.05)
        True
    """

    def __init__(
        self,
        target: Any,
        *args: Any,
        num_temperatures: int = 6,
        min_beta: float = 0.02,
        num_steps: int = 4,
        jitter: float = 0.2,
        keep_ladder: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(target, *args, **{"metric": "diagonal", **kwargs})
        self.keep_ladder = keep_ladder
        check_count("num_temperatures", num_temperatures, 2)
        check_count("num_steps", num_steps, 1)
        check_share("jitter", jitter)
        if not 0.0 < min_beta < 1.0:
            raise ValueError(f"min_beta must be between 0 and 1, got {min_beta}")
        if self.metric not in ("diagonal", None):
            raise ValueError(f"metric must be 'diagonal' or None, got {self.metric!r}")
        self.num_temperatures, self.min_beta = num_temperatures, min_beta
        self.num_steps, self.jitter = num_steps, jitter

    def _replica(self, path: Callable[[Tensor, Tensor], Tensor] | None) -> Replica:
        num = self.num_temperatures
        jitters = self.jitter, self.step_jitter
        return Replica(path, num, self.num_steps, *jitters, self.keep_ladder)

    @property
    def move(self) -> Move:
        return self._replica(None)

    def move_on(self, potential: Potential) -> Move:
        def path(z: Tensor, beta: Tensor) -> Tensor:
            beta = beta.to(z).expand(z.shape[:-1])
            flat = potential.tempered(z.reshape(-1, z.shape[-1]), beta.reshape(-1))
            return flat.reshape(beta.shape)

        return self._replica(path)

    def warmup(self, num: int, like: Tensor) -> Warmup:
        betas = torch.linspace(math.log(self.min_beta), 0.0, self.num_temperatures).exp()
        return Ladder(num, like, betas, **self._adaptation())

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "min_beta": self.min_beta}
