"""log Z of finite supports, without sampling: by enumeration."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.utils.checkpoint import checkpoint

from pyro_ebm._guard import is_tracing
from pyro_ebm.distribution import GibbsBoltzmann
from pyro_ebm.energy import describe
from pyro_ebm.flat import num_states, sites_of, values_of
from pyro_ebm.partition.base import LogPartition, Points, Weighted, deterministic, weigh

MAX_IN_CHUNKS = 1 << 30  # states; at a microsecond each some twenty minutes
NUM_CHECKED = 8  # states at which a sum over components is compared with the energy


class Exact:
    r"""log Z by enumeration of a finite support.

    .. math:: \log Z = \log \sum_x b(x) \exp(-\beta E(x))

    Value and gradient are exact, at the cost of one energy per state: of at most 2^20 states at
    once, or of at most 2^30 in chunks, whose memory is that of one chunk, also in the backward
    pass, which evaluates the energies a second time. With a cheap energy both passes take one or
    two microseconds per state on a processor: two minutes for 2^26.

    Where the energy and the log of the base are sums over the :math:`n` components of the
    support, as those of hidden units given visible ones, ``separable`` needs :math:`n K` energies
    in place of :math:`K^n`:

    .. math:: \log Z = -U(x^0) + \sum_i \log \sum_v \exp(U(x^0) - U(x^0_{i \to v})) ,
        \quad U = \beta E - \log b .

    That it is a sum is checked at random states, at every evaluation but traced ones. An energy
    that can sum itself up, a :class:`~pyro_ebm.FactorGraph` on a flat base, does so.

    Args:
        chunk_size: The number of states that are evaluated at once; all if None.
        separable: Whether the energy is a sum over the components.

    Raises:
        ValueError: If ``chunk_size`` is not positive, or given with ``separable``; when used, if
            the support is not finite or too large, or the energy is not separable.

    References:
        | Training Deep Nets with Sublinear Memory Cost (Chen, Xu, Zhang and Guestrin, 2016)
        | https://arxiv.org/abs/1604.06174

    Example:
        >>> d = ebm.GibbsBoltzmann(lambda x: -x.sum(-1), ebm.Flat((3,), constraints.boolean))
        >>> Exact()(d).value                               # 3 log(1 + e)
        tensor(3.9398)
        >>> d = ebm.GibbsBoltzmann(lambda x: -x.sum(-1), ebm.Flat((300,), constraints.boolean))
        >>> Exact(separable=True)(d).value
        tensor(393.9785)
    """

    value = "exact"
    gradient = "exact"

    def __init__(self, chunk_size: int | None = None, *, separable: bool = False) -> None:
        if chunk_size is not None and chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
        if chunk_size is not None and separable:
            raise ValueError(
                f"chunk_size is for supports that are enumerated, got {chunk_size} with "
                "separable=True, which enumerates components"
            )
        self.chunk_size, self.separable = chunk_size, separable
        self._num_calls = 0

    @property
    def tabular(self) -> bool:
        """Whether all is computed from the one table of :meth:`points`."""
        return self.chunk_size is None and not self.separable

    def points(self, d: GibbsBoltzmann) -> Points:
        """Return all states, with the measure of the base."""
        x = d.enumerate_support(expand=False)
        return Points(x, d._measure.log_prob(x))

    def weighted(self, d: GibbsBoltzmann) -> Weighted:
        """Return all states with their weights."""
        return weigh(d, self.points(d))

    def log_z(self, d: GibbsBoltzmann, x: Tensor | None = None) -> Tensor:
        """Return log Z."""
        own = _own_sum(d)
        if own is not None:
            return own
        if self.separable:
            self._num_calls += 1
            return _separable(d, self._num_calls)
        if self.chunk_size is not None:
            return _chunked(d, self.chunk_size)
        return self.weighted(d).log_weight.logsumexp(0)

    def __call__(self, d: GibbsBoltzmann) -> LogPartition:
        """Return log Z with a standard error of zero."""
        return deterministic(self.log_z(d))


def _own_sum(d: GibbsBoltzmann) -> Tensor | None:
    """Return the log Z of an energy that can sum over all its states itself, if this one can."""
    graph = d._graph()
    if graph is None:
        return None
    with d._binding.active():
        return graph.log_partition(d.beta)


class _Product:
    """A finite support as a product of components of ``size`` values each."""

    def __init__(self, d: GibbsBoltzmann) -> None:
        shape, values = d.event_shape, values_of(d.support)
        if sites_of(d.support, shape) is None:
            raise ValueError(f"the support must be finite, got {d.support}, which has inf states")
        self.one_hot = values is None
        self.num = math.prod(shape[:-1] if values is None else shape)
        values = torch.arange(shape[-1]) if values is None else values
        self.like = d.floating()
        whole = not values.is_floating_point()
        self.values, self.size = values.to(self.like.device if whole else self.like), len(values)
        self.shape = (*[1] * len(d.batch_shape), *shape)

    def states(self, digits: Tensor) -> Tensor:
        """Return the states whose components have the values of numbers ``(n, num)``."""
        x = self.values[digits]
        if self.one_hot:
            x = torch.nn.functional.one_hot(x, self.size).to(self.like)
        return x.reshape(len(digits), *self.shape)

    def digits(self, start: int, stop: int) -> Tensor:
        """Return the rows of the table of all states, without the table."""
        index = torch.arange(start, stop, device=self.values.device).unsqueeze(-1)
        powers = [self.size**i for i in reversed(range(self.num))]
        return index // torch.tensor(powers, device=index.device) % self.size


def _chunked(d: GibbsBoltzmann, chunk_size: int) -> Tensor:
    """Sum over chunks of states, each of which the backward pass computes anew."""
    product, count = _Product(d), num_states(d.support, d.event_shape)
    if count > MAX_IN_CHUNKS:
        raise ValueError(
            f"support {d.support} of event shape {tuple(d.event_shape)} has {count:.3g} states, "
            f"of which at most {MAX_IN_CHUNKS} are enumerated in chunks"
        )

    def chunk(start: int) -> Tensor:
        x = product.states(product.digits(start, min(start + chunk_size, int(count))))
        return weigh(d, Points(x, d._measure.log_prob(x))).log_weight.logsumexp(0)

    def parts() -> Iterator[Tensor]:
        again: Any = {"use_reentrant": False, "preserve_rng_state": False}
        plain = is_tracing() or not torch.is_grad_enabled()
        for start in range(0, int(count), chunk_size):
            yield chunk(start) if plain else checkpoint(chunk, start, **again)

    return torch.stack(list(parts())).logsumexp(0)


def _separable(d: GibbsBoltzmann, seed: int) -> Tensor:
    """Sum over components one by one, around a state of finite energy."""
    product = _Product(d)
    constant = torch.arange(product.size, device=product.values.device)
    constant = constant.unsqueeze(-1).expand(-1, product.num)
    with torch.no_grad():  # of the constant states that which suits the whole batch best
        worst = d.potential(product.states(constant)).reshape(product.size, -1).amax(1)
    best = torch.where(worst.isnan(), torch.inf, worst).argmin(0, keepdim=True)
    reference = constant.index_select(0, best).squeeze(0)  # indexing would wait, and break traces
    change = torch.eye(product.num, dtype=torch.bool, device=reference.device).unsqueeze(1)
    digits = torch.where(change, constant[:, :1], reference)  # shape: (num, size, num)
    rows = torch.cat([reference.unsqueeze(0), digits.flatten(0, 1)])
    potential = d.potential(product.states(rows))
    least, by_part = potential[0], potential[1:].unflatten(0, (product.num, product.size))
    gain = by_part - least  # shape: (num, size, *batch)
    _check_separable(d, product, least.detach(), gain.detach(), seed)
    return (-gain).logsumexp(1).sum(0) - least


@torch.no_grad()
def _check_separable(
    d: GibbsBoltzmann, product: _Product, least: Tensor, gain: Tensor, seed: int
) -> None:
    """Refuse an energy that is no sum over components, as seen at some random states."""
    if is_tracing() or get_proxy_mode() is not None:  # no values to look at
        return
    if not least.isfinite().all():
        raise ValueError(
            f"separable needs {describe(d.energy)} to be finite, for the whole batch, where all "
            f"components are equal, got {least.flatten()[(~least.isfinite()).flatten()][0]}"
        )
    generator = torch.Generator().manual_seed(seed)  # the global one is not ours to advance
    digits = torch.randint(product.size, (NUM_CHECKED, product.num), generator=generator)
    digits = digits.to(least.device)
    each = torch.arange(product.num, device=least.device)
    got, want = d.potential(product.states(digits)), least + gain[each, digits].sum(1)
    scale = product.num * least.abs() + gain.abs().amax(1).nan_to_num(posinf=0.0).sum(0)
    # A sum of n differences of rounded numbers, and the rounding inside the energy.
    close = (got == want) | ((got - want).abs() <= 32 * torch.finfo(scale.dtype).eps * scale)
    if not close.all():
        at = (~close).flatten().nonzero()[0, 0]
        a, b = got.expand_as(close).flatten()[at], want.expand_as(close).flatten()[at]
        raise ValueError(
            f"separable must be False for {describe(d.energy)}: at {int((~close).sum())} of "
            f"{close.numel()} random states beta E - log b is not the sum over its components, "
            f"at the first {a:.7g} in place of {b:.7g}, a discrepancy of {abs(a - b):.3g}"
        )
