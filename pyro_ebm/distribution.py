"""The Gibbs-Boltzmann distribution: an energy as a citizen of Pyro."""

from __future__ import annotations

import contextlib
import copy
import math
import sys
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from pyro.distributions import Categorical, TorchDistribution, constraints
from pyro.distributions.torch_distribution import TorchDistributionMixin
from pyro.distributions.util import broadcast_shape
from pyro.infer.traceenum_elbo import BackwardSampleMessenger
from pyro.poutine.runtime import _PYRO_STACK
from torch import Tensor
from torch.distributions import biject_to
from torch.distributions.constraints import Constraint

from pyro_ebm._binding import Binding, evaluating
from pyro_ebm._guard import (
    UnnormalizedError,
    allocated_dims,
    check,
    check_drawn_inside,
    check_not_transformed,
    engine,
    enumerated_dims,
    is_tracing,
    plate_dims,
    plate_rows,
)
from pyro_ebm._known import Known
from pyro_ebm._short_run import short_run, unconstrained
from pyro_ebm.energy import Energy, check_batch, check_value, describe, is_conditional
from pyro_ebm.flat import MAX_STATES, Flat, num_states, states_of, values_of
from pyro_ebm.kernels import gibbs

__all__ = ["Flat", "GibbsBoltzmann"]

_CHECKED: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()


class GibbsBoltzmann(TorchDistribution):
    r"""The Gibbs-Boltzmann distribution of an energy.

    The density of a point :math:`x` is

    .. math:: p_\beta(x) = \frac{1}{Z(\beta)} \, b(x) \exp(-\beta E(x)) ,
        \quad Z(\beta) = \int b(x) \exp(-\beta E(x)) \, dx .

    Without ``log_partition``, :meth:`log_prob` leaves out :math:`\log Z(\beta)`: right for
    inferring :math:`x`, wrong for learning :math:`\beta` or the parameters of :math:`E`. Where
    such a use is seen, :class:`~pyro_ebm.UnnormalizedError` is raised; see
    :func:`pyro_ebm.audit`. With :math:`\beta \to 0` the distribution tends to the base, with
    :math:`\beta \to \infty` to the minima of the energy.

    The Pyro parameters of the energy (``PyroParam``, ``PyroSample``, lifted ones) are read once,
    here, so that a model that constructs the distribution has one value of each per trace. Those
    that are read in a plate, and latents from one that the energy refers to, have a value per row;
    so does the distribution.

    Args:
        energy: Maps points ``(*batch, *event)`` to energies ``(*batch,)``.
        base: The base :math:`b`. It gives the shape, the support and the first points of chains.
        beta: The inverse temperature :math:`\beta`, positive; a tensor adds to the batch.
        log_partition: A method of :mod:`pyro_ebm.partition` that supplies :math:`\log Z`;
            ``"constant"`` declares that :math:`Z` depends on nothing that is inferred.
        sampler: Replaces the built-in :meth:`sample`: maps the distribution and a sample shape
            to points.
        validate_args: Whether to check arguments and, at the first batch, that each point of
            a batch has an energy of its own.

    Raises:
        TypeError: If the energy is not callable, or the base no Pyro distribution.
        ValueError: If beta is not positive and finite, or ``log_partition`` no method.

    References:
        | A Tutorial on Energy-Based Learning (LeCun et al., 2006)
        | http://yann.lecun.com/exdb/publis/pdf/lecun-06.pdf

    Example:
        >>> energy = lambda x: 0.5 * x.square().sum(-1)
        >>> base = dist.Normal(torch.zeros(2), 10.0).to_event(1)
        >>> d = GibbsBoltzmann(energy, base, beta=2.0)
        >>> d.event_shape
        torch.Size([2])
        >>> x = torch.tensor([1.0, 1.0])
        >>> d.log_prob(x) - base.log_prob(x)
        tensor(-2.)
    """

    arg_constraints: dict[str, Constraint] = {}

    def __new__(cls, *args: Any, logits: Tensor | None = None, **kwargs: Any) -> Any:
        """Let Pyro's ``compute_marginals`` make a marginal over the rows of the support."""
        # It calls type(fn)(logits=...) on every enumerated site; so does sample_posterior.
        if logits is None:
            return super().__new__(cls)
        if any(isinstance(m, BackwardSampleMessenger) for m in _PYRO_STACK):
            raise NotImplementedError(
                "TraceEnum_ELBO.sample_posterior draws rows of a table, not points of a "
                "GibbsBoltzmann: apply pyro_ebm.infer.IndexReparam to the site"
            )
        return Categorical(logits=logits)

    def __init__(
        self,
        energy: Energy,
        base: TorchDistributionMixin,
        beta: float | Tensor = 1.0,
        *,
        log_partition: Any = None,
        sampler: Callable[[GibbsBoltzmann, torch.Size], Tensor] | None = None,
        validate_args: bool | None = None,
    ) -> None:
        _check_arguments(energy, base, log_partition)
        self.energy, self.beta, self.sampler = energy, beta, sampler
        self.log_partition = log_partition
        self._binding = Binding(energy)
        self._origin: GibbsBoltzmann | None = None
        self._energy_batch = self._probe(base)
        beta_shape = beta.shape if isinstance(beta, Tensor) else torch.Size()
        batch = torch.Size(broadcast_shape(base.batch_shape, beta_shape, self._energy_batch))
        self.base = base if base.batch_shape == batch else base.expand(batch)
        self._own_base = base  # of its own batch, for draws that all elements share
        self._measure = unvalidated(self.base)
        super().__init__(batch, base.event_shape, validate_args=validate_args)
        self._enumerated, self._rows = enumerated_dims(batch), plate_rows()
        if not isinstance(beta, Tensor) or (self._validate_args and not is_tracing()):
            _check_beta(beta)

    @classmethod
    def _conditional(
        cls, energy: Energy, base: TorchDistributionMixin, beta: float | Tensor, batch: torch.Size
    ) -> GibbsBoltzmann:
        """Make the law of a part given others, of a known batch, without looking or binding.

        A free energy makes one at each evaluation, inside of a distribution that binds.
        """
        new = cls.__new__(cls)
        new.energy, new.beta, new.sampler, new.log_partition = energy, beta, None, None
        new._binding, new._origin, new._enumerated = Binding(None), None, set()
        new._rows = {}
        new._energy_batch = batch
        beta_shape = beta.shape if isinstance(beta, Tensor) else torch.Size()
        batch = torch.Size(broadcast_shape(base.batch_shape, beta_shape, batch))
        new.base = base if base.batch_shape == batch else base.expand(batch)
        new._own_base = base
        new._measure = unvalidated(new.base)
        super(GibbsBoltzmann, new).__init__(batch, base.event_shape, validate_args=False)
        return new

    def _probe(self, base: TorchDistributionMixin) -> torch.Size:
        """Find the batch that an energy brings along, by its value at one point.

        It is that of given parts, or of what the energy refers to and Pyro has drawn in plates
        or enumerated.
        """
        conditional = is_conditional(self.energy)
        plates = plate_dims()
        dims = allocated_dims() | set(plates)
        if not conditional and not dims:
            return torch.Size()
        with (
            torch.random.fork_rng(devices=[]),
            torch.no_grad(),
            evaluating(self.energy),
            self._binding.active(),
        ):
            point = base.sample().reshape(-1, *base.event_shape)[0]
            if not conditional:  # a network may need the dimensions of a batch
                point = point.reshape((1,) * -min(dims) + point.shape)
            value = self.energy(point)
        shape = value.shape if isinstance(value, Tensor) else torch.Size()
        if conditional:
            return shape
        sizes = {dim: n for dim, n in zip(range(-len(shape), 0), shape, strict=True) if n > 1}
        enumerated = enumerated_dims(shape)
        if any(dim not in enumerated and plates.get(dim) != n for dim, n in sizes.items()):
            return torch.Size()  # the check of the shape will say so
        return shape[min(sizes) :] if sizes else torch.Size()

    @constraints.dependent_property
    def support(self) -> Constraint:
        """The support of the base."""
        return self.base.support

    @property
    def mean(self) -> Tensor:
        """There is none in closed form, which Pyro's ``init_to_mean`` takes into account."""
        raise NotImplementedError(
            f"GibbsBoltzmann of {describe(self.energy)} has no mean in closed form: average draws"
        )

    @property
    def is_normalized(self) -> bool:
        """Whether :meth:`log_prob` has its log Z, exact or estimated."""
        return getattr(self.log_partition, "value", "none") != "none"

    @property
    def has_enumerate_support(self) -> bool:
        """Whether the support is finite and small enough for a table."""
        return num_states(self.support, self.event_shape) <= MAX_STATES

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """Return all states, of shape ``(K, *batch, *event)``, or with a batch of ones.

        Raises:
            ValueError: If the support is not finite, or too large for a table.
            NotImplementedError: If Pyro's ``infer_discrete`` asks for points that are no scalars.
        """
        asks = sys._getframe(1).f_code.co_name
        if self.event_dim and asks == "enumerate_site" and engine() == "discrete":
            raise NotImplementedError(
                f"infer_discrete needs scalar sites, got the event shape {tuple(self.event_shape)}"
                ": apply pyro_ebm.infer.IndexReparam to the site"
            )
        states, like = states_of(self.support, self.event_shape), self.floating()
        states = states.to(like if states.is_floating_point() else like.device)
        ones = (1,) * len(self.batch_shape)
        states = states.reshape(len(states), *ones, *self.event_shape)
        return states.expand(-1, *self.batch_shape, *self.event_shape) if expand else states

    def floating(self) -> Tensor:
        """Return an empty tensor with the floating-point type and device of the base."""
        if isinstance(self.base, Flat):
            return self.base._like
        try:
            like = self.base.mean
        except NotImplementedError:
            with torch.random.fork_rng(devices=[]):
                like = self.base.sample()
        floats = like.dtype.is_floating_point
        return like.new_empty(0) if floats else torch.empty(0, device=like.device)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> GibbsBoltzmann:
        """Return the distribution with another batch shape; log Z is still computed once."""
        new = self._get_checked_instance(GibbsBoltzmann, _instance)
        shared = ("energy", "beta", "sampler", "log_partition", "_binding", "_enumerated")
        for name in (*shared, "_energy_batch", "_own_base", "_rows"):
            setattr(new, name, getattr(self, name))
        new._origin = self._origin or self
        new.base = self.base.expand(torch.Size(batch_shape))
        new._measure = unvalidated(new.base)
        super(GibbsBoltzmann, new).__init__(
            torch.Size(batch_shape), self.event_shape, validate_args=False
        )
        new._validate_args = self._validate_args
        return new

    def _energy_at(self, x: Tensor) -> Tensor:
        """Evaluate and check the energy."""
        num_batch = x.dim() - self.event_dim
        expected = broadcast_shape(x.shape[:num_batch], self._energy_batch)
        version = None if x.is_inference() or is_tracing() else x._version
        with self._binding.active():
            value = self.energy(x)
            check_value(self.energy, value, x, expected)
            if version is not None and x._version != version:
                raise ValueError(f"{describe(self.energy)} must not change its points in place")
            if self._validate_args and value.numel() > 1 and not self._energy_batch:
                self._check_batch_once(value, x, num_batch)
        return value

    def _check_batch_once(self, value: Tensor, x: Tensor, num_batch: int) -> None:
        mode = getattr(self.energy, "training", True)
        try:
            done = _CHECKED.get(self.energy) == mode
        except TypeError:  # not hashable, or no weak references
            done = False
        if not done and not is_tracing():
            check_batch(self.energy, value, x, num_batch)
            with contextlib.suppress(TypeError):
                _CHECKED[self.energy] = mode

    def potential(self, x: Tensor) -> Tensor:
        r"""Return the potential, :math:`\beta E(x) - \log b(x)`, always without log Z.

        Args:
            x: Points, of shape ``(*sample, *batch, *event)``.

        Returns:
            The potentials, of shape ``(*sample, *batch)``.
        """
        batch = broadcast_shape(x.shape[: x.dim() - self.event_dim], self.batch_shape)
        return (self.beta * self._energy_at(x) - self._measure.log_prob(x)).expand(batch)

    def log_prob(self, value: Tensor) -> Tensor:
        r"""Return :math:`\log b(x) - \beta E(x)`, less log Z where there is a ``log_partition``.

        Args:
            value: Points, of shape ``(*sample, *batch, *event)``.

        Returns:
            The log-densities, of shape ``(*sample, *batch)``.

        Raises:
            UnnormalizedError: If the missing log Z is seen to make a result wrong.
            TypeError: If the energy returns no real tensor.
            ValueError: If it returns another shape than that of the batch, depends on the rest
                of the batch, or a point lies outside the support.
        """
        if self._validate_args:
            self._validate_sample(value)
        check_drawn_inside(self._binding.drawn_outside, self.energy)
        check_not_transformed(sys._getframe(1))
        log_density = -self.potential(value)
        if self.log_partition is None:
            check(log_density, value, self.energy, self._enumerated)
        elif isinstance(self.log_partition, Known):
            self.log_partition.check_unchanged(self.beta)
            check(log_density, value, self.energy, self._enumerated, known=True)
            log_density = log_density - self._log_z(value)
        elif self.log_partition != "constant":
            log_density = log_density - self._log_z(value)
        return log_density

    def normalized(self, method: Any) -> GibbsBoltzmann:
        r"""Return the distribution with its log Z, computed here once for all.

        It is a fixed number, so :meth:`log_prob` refuses to be used where log Z would change:
        where beta or a parameter of the energy is learned or random, as without log Z, and where
        one of them has been changed since. Then pass ``log_partition=method`` instead.

        Args:
            method: A method of :mod:`pyro_ebm.partition`.

        Returns:
            The distribution; its :attr:`log_z` has the value, its error and effective sample size.

        Raises:
            TypeError: If it is no method.
            UnnormalizedError: If the method gives no value.
            ValueError: If it gives a bound only, or log Z is not finite.

        Example:
            >>> d = ebm.GibbsBoltzmann(lambda x: x**2, ebm.Flat())
            >>> d = d.normalized(ebm.partition.Quadrature(-6.0, 6.0, 40))
            >>> d.log_prob(torch.tensor(0.0))                   # minus the log of sqrt(pi)
            tensor(-0.5724)
        """
        if isinstance(method, type) or not hasattr(method, "log_z"):
            raise TypeError(f"method must be a method of pyro_ebm.partition, got {method!r}")
        if method.value == "none":
            raise UnnormalizedError(
                f"method must give a value of log Z, got {type(method).__name__}, which gives "
                "only its gradient"
            )
        if method.value == "bound":
            raise ValueError(f"method must not be a bound, got {type(method).__name__}")
        origin = self._origin or self
        with torch.no_grad():
            log_z = method(origin)
        if not bool(log_z.value.isfinite().all()):
            raise ValueError(f"log Z must be finite, got {log_z.value.tolist()}")
        new = self.expand(self.batch_shape)
        new.log_partition = Known(origin, log_z, method.value)
        return new

    @property
    def log_z(self) -> Any:
        """What :meth:`normalized` has computed: log Z, its standard error, its sample size."""
        if not isinstance(self.log_partition, Known):
            return None
        parts = self.log_partition.parts
        return type(parts)(*(part.expand(self.batch_shape) for part in parts))

    def _log_z(self, x: Tensor) -> Tensor:
        """Compute log Z once for what an expanded distribution repeats."""
        return self.log_partition.log_z(self._origin or self, x)

    def sample(self, sample_shape: Sequence[int] = torch.Size()) -> Tensor:
        """Draw points: exactly on small finite supports and factor graphs, else by short chains.

        The chains, one per point, start from the base and make 200 adapted MALA moves in
        unconstrained space (on finite supports: 50 sweeps of Gibbs sampling). They are independent
        of each other but only approximate the distribution where it has several modes or is
        badly scaled. Pyro calls ``sample`` to start nearly every algorithm; for results use a
        chain, or pass ``sampler``.

        Args:
            sample_shape: How many points.

        Returns:
            Points, of shape ``(*sample, *batch, *event)``.

        Raises:
            ValueError: If the energy is nowhere finite near the base's samples.
        """
        shape = torch.Size(sample_shape)
        if self.sampler is not None:
            with torch.no_grad():
                points = self.sampler(self, shape)
            if points.shape != self.shape(shape):
                raise ValueError(
                    f"sampler must return points of shape {tuple(self.shape(shape))}, got "
                    f"{tuple(points.shape)}"
                )
            return points
        with torch.inference_mode(False), torch.no_grad(), evaluating(self.energy):
            if self.has_enumerate_support:
                return self._sample_table(shape)
            graph = self._graph()
            if graph is not None and graph.cost.largest_table <= graph.max_table:
                return self._sample_graph(graph, shape)
            if values_of(self.support) is not None:
                return self._sample_sweeps(shape)
            transform = biject_to(self.support)
            potential = unconstrained(self.potential, transform, self.event_dim)
            end = short_run(potential, lambda: transform.inv(self.base.sample(shape)))
            return transform(end)

    def _graph(self) -> Any:
        """Return the energy if it sums and draws by itself, as a factor graph; else None.

        Such an energy has ``log_partition``, ``sample`` and the ``cardinalities`` of the
        components of its points; the support must hold all its states, those beyond have an
        infinite energy.
        """
        cards, values = getattr(self.energy, "cardinalities", None), values_of(self.support)
        if cards is None or values is None or not isinstance(self.base, Flat):
            return None
        whole = torch.equal(values.long(), torch.arange(len(values)))
        fits = self.event_shape == (len(cards),) and max(cards.values()) <= len(values)
        return self.energy if whole and fits else None

    def _sample_graph(self, graph: Any, shape: torch.Size) -> Tensor:
        beta = torch.as_tensor(self.beta).to(self.floating()).expand(self.batch_shape)
        with self._binding.active():
            x = graph.to_tensor(graph.sample(shape.numel(), beta)).reshape(self.shape(shape))
        values = values_of(self.support)
        return values.to(self.floating())[x] if values.is_floating_point() else x  # type: ignore[union-attr]

    def _sample_table(self, shape: torch.Size) -> Tensor:
        states = self.enumerate_support()
        logits = -self.potential(states)  # shape: (K, *batch)
        row = Categorical(logits=logits.movedim(0, -1)).sample(shape)
        flat = self.enumerate_support(expand=False).reshape(len(states), *self.event_shape)
        return flat[row]

    def _sample_sweeps(self, shape: torch.Size) -> Tensor:
        position = self.base.sample(shape)
        values = values_of(self.support).to(position)  # type: ignore[union-attr]
        kernel = gibbs(self.potential, values, len(shape) + len(self.batch_shape))
        state = kernel.init(position)
        for _ in range(50):
            state, _ = kernel.step(state)
        return state.position


def unvalidated(base: Any) -> Any:
    """Return a base that does not check points again: chains touch the edge by rounding."""
    quiet = copy.copy(base)
    if hasattr(base, "base_dist"):  # first, since Pyro's Independent has the flag of its base
        quiet.base_dist = unvalidated(base.base_dist)
    quiet._validate_args = False
    return quiet


def _check_beta(beta: float | Tensor) -> None:
    if isinstance(beta, Tensor):
        fine = bool(((beta > 0) & beta.isfinite()).all())
    else:
        fine = 0.0 < beta < math.inf
    if not fine:
        raise ValueError(
            f"beta must be positive and finite, got {beta}; beta = 0 is the base and beta = inf "
            "the minimum of the energy"
        )


def _check_arguments(energy: Any, base: Any, log_partition: Any) -> None:
    if not callable(energy):
        raise TypeError(f"energy must be callable, got {type(energy).__name__}")
    if not isinstance(base, TorchDistributionMixin):
        raise TypeError(f"base must be a Pyro distribution, got {type(base).__name__}")
    if not (
        log_partition is None or log_partition == "constant" or hasattr(log_partition, "log_z")
    ):
        raise ValueError(
            "log_partition must be a method of pyro_ebm.partition, 'constant' or None, got "
            f"{log_partition!r}"
        )
