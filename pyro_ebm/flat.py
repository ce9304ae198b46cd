"""The flat measure on a support, and finite supports as tensors."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any

import torch
from pyro.distributions import TorchDistribution, constraints
from pyro.distributions.util import broadcast_shape
from torch import Tensor
from torch.distributions import biject_to
from torch.distributions.constraints import Constraint

from pyro_ebm._cholesky import lower_cholesky

MAX_STATES = 1 << 20
"""The largest finite support that is enumerated: a table of a million energies."""


def on_event(support: Constraint, event_shape: Sequence[int]) -> Constraint:
    """Make a support independent over the event dimensions that it does not cover itself."""
    if support is constraints.lower_cholesky:
        support = lower_cholesky
    more = len(event_shape) - support.event_dim
    return constraints.independent(support, more) if more > 0 else support


def atom(support: Constraint) -> Constraint:
    """Return the constraint of one component of an independent support."""
    inner = getattr(support, "base_constraint", None)
    return support if inner is None else atom(inner)


def values_of(support: Constraint) -> Tensor | None:
    """Return the values of a component with a finite support, in order, else None.

    Booleans are floating point, as in Pyro's Bernoulli; integers are ``long``, as in Categorical.
    """
    part = atom(support)
    if part is constraints.boolean:
        return torch.tensor([0.0, 1.0])
    if isinstance(part, type(constraints.integer_interval(0, 1))):
        return torch.arange(_end(part.lower_bound), _end(part.upper_bound) + 1)
    return None


def _end(bound: Any) -> int:
    """Return an end of an interval, which may have come with the batch of its distribution."""
    if not isinstance(bound, Tensor) or bound.numel() == 1:
        return int(bound)
    least, most = bound.aminmax()
    if least != most:
        raise ValueError(f"support must have the same ends for the whole batch, got {bound}")
    return int(least)


def sites_of(support: Constraint, event_shape: Sequence[int]) -> tuple[int, int] | None:
    """Return how many values a component of a finite support has, and how many there are."""
    values = values_of(support)
    if values is not None:
        return len(values), math.prod(event_shape)
    if atom(support) is constraints.one_hot:
        return event_shape[-1], math.prod(event_shape[:-1])
    return None


def num_states(support: Constraint, event_shape: Sequence[int]) -> float:
    """Return the number of states of a support: infinite unless it is finite, and a float."""
    sites = sites_of(support, event_shape)
    if sites is None or sites[1] * math.log(sites[0]) > math.log(sys.float_info.max):
        return math.inf
    return float(sites[0]) ** sites[1]


def states_of(support: Constraint, event_shape: Sequence[int]) -> Tensor:
    """Return all states of a finite support, of shape ``(K, *event)``.

    Raises:
        ValueError: If the support is not finite, or has too many states for a table.
    """
    count = num_states(support, event_shape)
    if not count <= MAX_STATES:
        raise ValueError(
            f"support {support} of event shape {tuple(event_shape)} has {count:.3g} states, "
            f"of which at most {MAX_STATES} are enumerated"
        )
    values, n = values_of(support), math.prod(event_shape)
    if values is None:
        n, values = math.prod(event_shape[:-1]), torch.arange(event_shape[-1])
    table = torch.cartesian_prod(*[values] * n) if n else values.new_empty(1, 0)
    if values_of(support) is None:
        table = torch.nn.functional.one_hot(table.long(), event_shape[-1])
        table = table.to(torch.get_default_dtype())  # as Pyro's OneHotCategorical has it
    return table.reshape(int(count), *event_shape)


def innermost(q: Any) -> Any:
    """Return the distribution within reinterpreted dimensions and transforms."""
    return innermost(q.base_dist) if hasattr(q, "base_dist") else q


def is_normalized(q: Any) -> bool:
    """Whether a distribution, or that within it, is none that lacks its log Z."""
    return getattr(innermost(q), "is_normalized", True)


class Flat(TorchDistribution):
    r"""The flat measure on a support: Lebesgue, or counting where it is finite.

    .. math:: b(x) = 1 \text{ for } x \text{ in the support}

    It is the default base of an energy, :math:`p(x) \propto \exp(-\beta E(x))`. It is not
    normalised (but on an interval of length one); :meth:`sample` gives dispersed starting
    points: uniform on finite supports, intervals and simplices, else uniform within
    :math:`\pm 2` of the unconstrained space.

    Args:
        event_shape: The shape of a point.
        support: The support; one of components is made independent over the event.
        dtype: The floating-point type of the points; torch's default if None.
        device: Their device; torch's default if None.
        validate_args: Whether :meth:`log_prob` refuses points outside the support.

    Raises:
        ValueError: If the event shape has fewer dimensions than the support needs, or is empty.

    Example:
        >>> d = Flat((3,), constraints.simplex)
        >>> x = d.sample((5,))
        >>> x.shape, d.log_prob(x)
        (torch.Size([5, 3]), tensor([0., 0., 0., 0., 0.]))
    """

    arg_constraints: dict[str, Constraint] = {}

    def __init__(
        self,
        event_shape: Sequence[int] = (),
        support: Constraint = constraints.real,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        validate_args: bool | None = None,
    ) -> None:
        event_shape = torch.Size(event_shape)
        if len(event_shape) < support.event_dim:
            raise ValueError(
                f"event_shape must have at least {support.event_dim} dimensions for the support "
                f"{support}, got {tuple(event_shape)}"
            )
        if 0 in event_shape:
            raise ValueError(f"event_shape must not be empty, got {tuple(event_shape)}")
        self._support = on_event(support, event_shape)
        self._like = torch.empty(0, dtype=dtype, device=device)
        super().__init__(torch.Size(), event_shape, validate_args=validate_args)

    @constraints.dependent_property
    def support(self) -> Constraint:
        """The support, independent over the event."""
        return self._support

    @property
    def has_enumerate_support(self) -> bool:
        """Whether the support is finite and small enough for a table."""
        return num_states(self._support, self.event_shape) <= MAX_STATES

    @property
    def log_volume(self) -> float:
        r"""The log of the measure of the whole support, infinite where it is."""
        part = atom(self._support)
        sites = sites_of(self._support, self.event_shape)
        if sites is not None:
            return sites[1] * math.log(sites[0])
        low, high = getattr(part, "lower_bound", None), getattr(part, "upper_bound", None)
        if low is not None and high is not None:
            width = torch.as_tensor(high) - torch.as_tensor(low)
            return float(width.double().log().expand(self.event_shape).sum())
        if part is constraints.unit_interval:
            return 0.0
        if part is constraints.simplex:
            per = -math.lgamma(self.event_shape[-1])
            return self.event_shape[:-1].numel() * per
        return math.inf

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> Flat:
        """Return the measure with another batch shape."""
        new = self._get_checked_instance(Flat, _instance)
        new._support, new._like = self._support, self._like
        super(Flat, new).__init__(torch.Size(batch_shape), self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def to_event(self, reinterpreted_batch_ndims: int | None = None) -> Flat:
        """Return the flat measure on points of more dimensions, which knows its volume."""
        num = len(self.batch_shape)
        num = num if reinterpreted_batch_ndims is None else reinterpreted_batch_ndims
        if not 0 < num <= len(self.batch_shape):
            return super().to_event(num)
        left = len(self.batch_shape) - num
        shape = self.batch_shape[left:] + self.event_shape
        new = Flat(shape, self._support, dtype=self._like.dtype, device=self._like.device)
        new._validate_args = self._validate_args
        return new.expand(self.batch_shape[:left])

    def log_prob(self, value: Tensor) -> Tensor:
        """Return zero for each point."""
        if self._validate_args:
            self._validate_sample(value)
        batch = value.shape[: value.dim() - self.event_dim]
        dtype = value.dtype if value.dtype.is_floating_point else self._like.dtype
        zero = torch.zeros((), dtype=dtype, device=value.device)
        return zero.expand(broadcast_shape(batch, self.batch_shape))

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """Return all states, of shape ``(K, *batch, *event)``, or with a batch of ones."""
        states = self._cast(states_of(self._support, self.event_shape))
        ones = (1,) * len(self.batch_shape)
        states = states.reshape(len(states), *ones, *self.event_shape)
        return states.expand(-1, *self.batch_shape, *self.event_shape) if expand else states

    def _cast(self, x: Tensor) -> Tensor:
        if x.dtype.is_floating_point:
            return x.to(self._like)
        return x.to(self._like.device)

    @torch.no_grad()
    def sample(self, sample_shape: Sequence[int] = torch.Size()) -> Tensor:
        """Return dispersed points of the support."""
        shape = self._extended_shape(torch.Size(sample_shape))
        values = values_of(self._support)
        if values is not None:
            draw = torch.randint(len(values), shape, device=self._like.device)
            return self._cast(values)[draw]
        part: Any = atom(self._support)
        if part is constraints.one_hot:
            draw = torch.randint(shape[-1], shape[:-1], device=self._like.device)
            return torch.nn.functional.one_hot(draw, shape[-1]).to(self._like)
        if part is constraints.simplex:
            gamma = self._like.new_empty(shape).exponential_()
            return gamma / gamma.sum(-1, keepdim=True)
        if math.isfinite(self.log_volume):
            low, high = torch.as_tensor(part.lower_bound), torch.as_tensor(part.upper_bound)
            low, high = low.to(self._like), high.to(self._like)
            return low + (high - low) * self._uniform(shape)
        transform = biject_to(self._support)
        return transform(4.0 * self._uniform(transform.inverse_shape(shape)) - 2.0)

    def _uniform(self, shape: Sequence[int]) -> Tensor:
        # Not in place, which vmap could not batch.
        return torch.rand(shape, dtype=self._like.dtype, device=self._like.device)
