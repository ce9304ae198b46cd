"""log Z as a table along the temperature or one parameter, by thermodynamic integration."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from pyro_ebm._binding import evaluating
from pyro_ebm._curve import Curve, Scale, integrate
from pyro_ebm._guard import UnnormalizedError, UnnormalizedWarning, engine, is_tracing, walk
from pyro_ebm._potential import quiet
from pyro_ebm._rungs import Family, Rungs, draw_rungs, enumerate_rungs
from pyro_ebm.distribution import Flat, GibbsBoltzmann
from pyro_ebm.kernels.base import check_count
from pyro_ebm.partition.base import LogPartition, Method

DRIFT = 6.0
"""Slopes that change by more standard errors than this within a run are not settled."""


class Table:
    r"""log Z as a smooth function of the temperature, or of one parameter.

    .. math:: \frac{d \log Z}{d \theta} = -\left\langle
        \frac{\partial U_\theta}{\partial \theta} \right\rangle_\theta , \quad
        \frac{d \log Z}{d \beta} = -\langle E \rangle_\beta

    The slopes at the nodes come from chains at all nodes at once, neighbours swapping along the
    ladder (from enumeration, where the support is small); their integral is interpolated by a
    cubic Hermite spline with these slopes. It is computed once, at the first use or by
    :meth:`build`, and is then a deterministic function: NUTS, ours and Pyro's, has the right
    posterior, but for the table's :attr:`std_error`.

    Give the parameter a prior within ``low`` and ``high``. Outside there is nothing to know: an
    error names the value; under MCMC a trajectory that leaves is rejected, so that the posterior
    is cut off there, and a warning says so once (none, where the model is traced).

    The constant of the integral is known where the support is enumerated, and along beta from
    ``low=0``, where Z is that of the base; elsewhere by ``anchor``. Without it log Z lacks a
    constant, which matters to evidence (refused), and not to inference of the parameter.

    Args:
        low: The least value of beta or of the parameter.
        high: The largest.
        num_points: The number of nodes: evenly spaced, in the logarithm where ``high`` is 4 times
            a positive ``low`` or more, and along beta from 0 as cubes.
        make: Maps a parameter to a :class:`~pyro_ebm.GibbsBoltzmann`; then a distribution in the
            model has ``log_partition=table.at(theta)``. If None the table is one along beta.
        anchor: log Z at ``low``: a number, or a method of :mod:`pyro_ebm.partition`.
        start: Where chains start, ``(n, *event)``, such as data; by default at draws of the base.
        num_chains: The number of independent ladders.
        num_samples: The draws of each.
        warmup: The moves before, in which steps are adapted at each node.

    Raises:
        ValueError: If an argument is out of its range, or a value of the parameter when used.
        UnnormalizedError: When used, if the energy is another than that of the table, or depends
            on other random or learned values.

    References:
        | Simulating Normalizing Constants: From Importance Sampling to Bridge Sampling to Path
          Sampling (Gelman and Meng, 1998)
        | https://doi.org/10.1214/ss/1028905934

    Example:
        >>> energy, base = lambda x: 0.5 * x.square().sum(-1), ebm.Flat((2,))
        >>> table = Table(0.5, 5.0, 9, anchor=ebm.partition.Quadrature(-9.0, 9.0, 40))
        >>> d = ebm.GibbsBoltzmann(energy, base, torch.tensor(2.0), log_partition=table)
        >>> bool((table(d).value - 1.1447).abs() < 5 * table(d).std_error)     # log of pi
        True
    """

    value = "estimated"
    gradient = "exact"

    def __init__(  # noqa: PLR0913 - what the table is of, and what its chains cost
        self,
        low: float,
        high: float,
        num_points: int = 25,
        *,
        make: Callable[[Tensor], GibbsBoltzmann] | None = None,
        anchor: Method | float | None = None,
        start: Tensor | None = None,
        num_chains: int = 32,
        num_samples: int = 400,
        warmup: int = 300,
    ) -> None:
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise ValueError(f"low must be below high, both finite, got {low} and {high}")
        if make is None and low < 0:
            raise ValueError(f"low must not be negative along beta, got {low}")
        check_count("num_points", num_points, 3)
        check_count("num_chains", num_chains, 4)
        check_count("num_samples", num_samples, 4)
        check_count("warmup", warmup, 0)
        self.low, self.high, self.num_points = float(low), float(high), num_points
        self.make, self.anchor, self.start = make, anchor, start
        self.num_chains, self.num_samples, self.warmup = num_chains, num_samples, warmup
        self.anchored = anchor is not None or (make is None and low == 0)
        # Built anew from the same seed it is the same, as a run that is resumed needs it.
        self._seed = int(torch.randint(1 << 62, ()))
        self._curve: Curve | None = None
        self._x = torch.empty(0)
        self._family: Family | None = None
        self._warned = False

    # Use ----------------------------------------------------------------------------------------

    def at(self, theta: Tensor) -> _At:
        """Return the method for log Z of the distribution ``make(theta)``.

        Args:
            theta: The parameter.
        """
        if self.make is None:
            raise ValueError("make must be given for a table of a parameter, got None")
        return _At(self, theta)

    def parameter(self, d: GibbsBoltzmann) -> Tensor:
        """Return what the table is read at for a distribution, which an audit asks for."""
        return torch.as_tensor(d.beta)

    def log_z(self, d: GibbsBoltzmann, x: Tensor | None = None) -> Tensor:
        """Return log Z.

        Raises:
            ValueError: If the parameter is outside the table.
            UnnormalizedError: If the distribution is not one of the table's.
        """
        if self.make is not None:
            raise ValueError("log_partition must be table.at(theta), since the table has a make")
        return self._log_z(d, self.parameter(d))

    def __call__(self, d: GibbsBoltzmann) -> LogPartition:
        """Return log Z with its standard error; the effective sample size is that of ladders.

        Raises:
            UnnormalizedError: If the table lacks its constant.
        """
        return self._estimate(d, self.parameter(d))

    def _estimate(self, d: GibbsBoltzmann, theta: Tensor) -> LogPartition:
        value = self._log_z(d, theta)
        self._check_anchored()
        with torch.no_grad():
            std_error = self._built().error(theta.to(value))
        return LogPartition(value, std_error, torch.full_like(std_error, self.num_chains))

    def _check_anchored(self) -> None:
        if not self.anchored:
            raise UnnormalizedError(
                "this Table knows log Z up to a constant only, which evidence needs: give anchor="
            )

    def _log_z(self, d: GibbsBoltzmann, theta: Tensor) -> Tensor:
        eager = not is_tracing() and get_proxy_mode() is None
        if self._curve is None:
            if not eager:
                raise RuntimeError("table must be built before it is traced: table.build(d)")
            self.build(d)
        if engine() == "importance":
            self._check_anchored()
        if eager:
            self._check_range(theta)
            self._check_energy(d, theta)
        curve = self._built()
        theta = theta.to(curve.nodes)
        inside = (theta >= self.low) & (theta <= self.high)
        # A trajectory that leaves is at a wall.
        return torch.where(inside, curve(theta), torch.inf)

    def _built(self) -> Curve:
        if self._curve is None:
            raise ValueError("table must be built first: use it, or call table.build(d)")
        return self._curve

    def _check_range(self, theta: Tensor) -> None:
        outside = ~((theta >= self.low) & (theta <= self.high))
        if not bool(outside.any()):
            return
        what = f"between {self.low} and {self.high}, got {theta[outside].flatten()[0].item():.6g}"
        if engine() != "mcmc":
            raise ValueError(f"the parameter of a Table must be {what}")
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"the parameter of a Table must be {what}: rejected, so that the posterior is cut "
                "off there. Give it a prior within, or make the table longer",
                UnnormalizedWarning,
                stacklevel=2,
            )

    def _check_energy(self, d: GibbsBoltzmann, theta: Tensor) -> None:
        """Refuse an energy that depends on more than its parameter, or is not the table's."""
        x = self._x
        ones = (1,) * len(d.batch_shape)
        x = x.reshape(len(x), *ones, *d.event_shape)
        with torch.enable_grad():
            value = d.potential(x)
        leaves = list(walk(value, without=theta)[0].values())
        if engine() == "mcmc":  # what was learned before is fixed
            leaves = [leaf for leaf in leaves if not isinstance(leaf, nn.Parameter)]
        if leaves:
            raise UnnormalizedError(
                "the energy of a Table must depend on nothing random or learned but the table's "
                "own parameter, got one that does; its log Z is no function of one number"
            )
        with torch.no_grad(), quiet():
            own = self._known()(theta.detach().to(value), x.expand(value.shape + d.event_shape))
        inside = ((theta >= self.low) & (theta <= self.high)).expand(value.shape)
        close = torch.isclose(own, value.detach(), rtol=1e-3, atol=1e-3)
        if not bool((close | ~inside).all()):
            raise UnnormalizedError(
                "the distribution must be the one that the Table was made for, got another "
                f"potential: {value.flatten()[0].item():.6g} at a point where the table's is "
                f"{own.flatten()[0].item():.6g}; make a Table for each energy"
            )

    def _known(self) -> Family:
        assert self._family is not None
        return self._family

    # Building -----------------------------------------------------------------------------------

    def build(self, d: GibbsBoltzmann | None = None) -> Table:
        """Compute the table.

        Args:
            d: The distribution, of any beta; none with ``make``.

        Returns:
            The table itself.

        Raises:
            ValueError: If the distribution has a batch of energies, or chains find no finite one.
        """
        if d is None and self.make is None:
            raise ValueError("d must be given to build a table along beta, got None")
        like = self._like(d)
        devices = [like.floating().device] if like.floating().is_cuda else []
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            quiet(),
            evaluating(like.energy),
            torch.random.fork_rng(devices=devices),
        ):
            torch.manual_seed(self._seed)
            self._family = self._make_family(like)
            scale = Scale.of(self.low, self.high, vanishing=self.make is None)
            nodes = scale.nodes(self.low, self.high, self.num_points, like.floating())
            self._curve = self._curve_of(like, scale, nodes)
        return self

    def _like(self, d: GibbsBoltzmann | None) -> GibbsBoltzmann:
        if self.make is not None:
            like = self.make(torch.as_tensor(0.5 * (self.low + self.high)))
            if like.batch_shape:
                raise ValueError(
                    f"make must give a distribution without a batch, got {tuple(like.batch_shape)}"
                )
            return like
        assert d is not None
        d = d._origin or d
        if d._energy_batch:
            raise ValueError(
                "the energy of a Table must have no batch of its own, got one of "
                f"{tuple(d._energy_batch)}"
            )
        if self.low == 0 and isinstance(d.base, Flat) and not math.isfinite(d.base.log_volume):
            raise ValueError(
                "low must be positive where the base is Flat on an infinite volume, got "
                f"{self.low}"
            )
        if self.low == 0 and not getattr(d.base, "is_normalized", True):
            raise ValueError(
                "low must be positive where the base is not normalised, and so its log Z unknown, "
                f"got {self.low}"
            )
        if not d.batch_shape:
            return d
        if not isinstance(d.base, Flat):
            raise ValueError(f"base must have no batch, got one of {tuple(d.batch_shape)}")
        return GibbsBoltzmann(d.energy, d.base.expand(torch.Size()))

    def _make_family(self, like: GibbsBoltzmann) -> Family:
        if self.make is not None:
            make = self.make
            return Family(lambda theta, x: make(theta).potential(x.unsqueeze(0))[0], like)

        def single(beta: Tensor, x: Tensor) -> Tensor:
            x = x.unsqueeze(0)
            return (beta * like._energy_at(x) - like._measure.log_prob(x))[0]

        return Family(single, like)

    def _rungs(self, like: GibbsBoltzmann, nodes: Tensor) -> Rungs:
        family = self._known()
        if like.has_enumerate_support:
            self.anchored = True
            return enumerate_rungs(family, nodes)
        if self.start is None:
            start = like.base.sample((self.num_chains,))
        else:
            start = self.start[torch.randint(len(self.start), (self.num_chains,))]
        rungs = draw_rungs(family, nodes, start, self.warmup, self.num_samples)
        worst = int(rungs.drift.argmax())
        if bool(rungs.drift[worst] > DRIFT):
            warnings.warn(
                f"Table cannot be trusted: at {nodes[worst].item():.4g} the slope of log Z still "
                f"drifts, by {rungs.drift[worst].item():.1f} standard errors within the run. "
                f"Raise warmup above {self.warmup}, or start at data",
                UnnormalizedWarning,
                stacklevel=4,
            )
        return rungs

    def _curve_of(self, like: GibbsBoltzmann, scale: Scale, nodes: Tensor) -> Curve:
        rungs = self._rungs(like, nodes)
        self._x = rungs.x
        if rungs.value is not None:
            slope = scale.derivatives(nodes)[0] * rungs.slope
            curve = Curve(scale, nodes, rungs.value, slope, torch.zeros_like(nodes))
            return curve._replace(std_error=self._missed(curve))
        curve = integrate(scale, nodes, rungs.chains, rungs.curvature)
        known, error = self._anchor(like)
        std_error = (curve.std_error.square() + error.square()).sqrt()
        return curve._replace(value=curve.value + known, std_error=std_error)

    def _missed(self, curve: Curve) -> Tensor:
        """Return how far a curve through exact values is off halfway to the next nodes."""
        fine = curve.scale.nodes(self.low, self.high, 2 * self.num_points - 1, curve.nodes)
        gap = (curve(fine[1::2]) - self._exact(fine[1::2])).abs()
        return torch.maximum(torch.cat([gap[:1], gap]), torch.cat([gap, gap[-1:]]))

    def _exact(self, theta: Tensor) -> Tensor:
        value = enumerate_rungs(self._known(), theta).value
        assert value is not None
        return value

    def _anchor(self, like: GibbsBoltzmann) -> tuple[Tensor, Tensor]:
        """Return log Z at the first node, and its error."""
        floating = like.floating()
        zero = torch.zeros((), dtype=floating.dtype, device=floating.device)
        if self.anchor is None:
            volume = like.base.log_volume if isinstance(like.base, Flat) else 0.0
            return zero + (volume if self.anchored else 0.0), zero
        if not callable(self.anchor):
            return zero + self.anchor, zero
        theta = zero + self.low
        make = self.make or (lambda beta: GibbsBoltzmann(like.energy, like.base, beta))
        value, error, _ = self.anchor(make(theta))
        return value.detach(), error.detach()

    # Results ------------------------------------------------------------------------------------

    @property
    def nodes(self) -> Tensor:
        """The nodes, ``(num_points,)``."""
        return self._built().nodes

    @property
    def values(self) -> Tensor:
        """The log Z at the nodes, up to a constant where there is no anchor."""
        return self._built().value

    @property
    def std_error(self) -> Tensor:
        """Its standard errors there: of the draws, the spacing of the nodes and the anchor."""
        return self._built().std_error


class _At:
    """The log Z of a table at a value of its parameter."""

    value, gradient = Table.value, Table.gradient

    def __init__(self, table: Table, theta: Tensor) -> None:
        self.table, self.theta = table, torch.as_tensor(theta)

    def parameter(self, d: GibbsBoltzmann) -> Tensor:
        """Return what the table is read at."""
        return self.theta

    def log_z(self, d: GibbsBoltzmann, x: Tensor | None = None) -> Tensor:
        """Return log Z."""
        return self.table._log_z(d, self.theta)

    def __call__(self, d: GibbsBoltzmann) -> LogPartition:
        """Return log Z with its standard error."""
        return self.table._estimate(d, self.theta)
