"""Components of finite points: their places, values and draws."""

from __future__ import annotations

import torch
from torch import Tensor

Place = slice | Tensor
"""Which components: consecutive ones as a slice, which is a view and so costs nothing."""


def check_values(values: Tensor) -> None:
    """Refuse values of a component that are not two or more along the first dimension."""
    if not isinstance(values, Tensor):
        raise TypeError(f"values must be a tensor, got {type(values).__name__}")
    if values.dim() == 0 or len(values) < 2:
        raise ValueError(
            f"values must hold two or more values along its first dimension, got {values}"
        )


def flat_sites(x: Tensor, values: Tensor, num_chain_dims: int) -> Tensor:
    """View points as ``(*chains, n, *atom)``, where values are ``(K, *atom)``."""
    return x.reshape(*x.shape[:num_chain_dims], -1, *values.shape[1:])


def place_of(block: Tensor) -> Place:
    """Turn a mask of components, or their numbers, into their place."""
    at = block.flatten().nonzero().squeeze(-1) if block.dtype == torch.bool else block.flatten()
    first = int(at[0]) if len(at) else 0
    consecutive = torch.equal(at, torch.arange(first, first + len(at), device=at.device))
    return slice(first, first + len(at)) if consecutive else at


def numbers_of(place: Place) -> Tensor:
    """Return the numbers of the components at a place."""
    return torch.arange(place.start, place.stop) if isinstance(place, slice) else place


def size_of(place: Place) -> int:
    """Return how many components a place has."""
    return place.stop - place.start if isinstance(place, slice) else len(place)


def take(flat: Tensor, place: Place, dim: int) -> Tensor:
    """Return the components at a place, along a dimension."""
    if isinstance(place, slice):
        return flat.narrow(dim, place.start, place.stop - place.start)
    return flat.index_select(dim, place)


def put(flat: Tensor, place: Place, dim: int, new: Tensor) -> None:
    """Write components at a place, along a dimension."""
    if isinstance(place, slice):
        take(flat, place, dim).copy_(new)
    else:
        flat.index_copy_(dim, place, new)


def codes_of(sites: Tensor, values: Tensor) -> Tensor:
    """Return which of the values components ``(..., *atom)`` have."""
    if values.dim() == 1 and len(values) == 2:
        return (sites == values[1]).long()
    return _same(sites, values).to(torch.int8).argmax(-1)


def check_sites(sites: Tensor, values: Tensor) -> None:
    """Refuse components that have none of the values."""
    known = _same(sites, values).any(-1)
    if not known.all():
        where = tuple((~known).nonzero()[0].tolist())
        raise ValueError(
            f"position must hold the given values only, got {sites[where].tolist()} at "
            f"component {where[-1]} of chain {where[:-1]}"
        )


def _same(sites: Tensor, values: Tensor) -> Tensor:
    if values.dim() == 1:
        return sites.unsqueeze(-1) == values
    same = sites.unsqueeze(-values.dim()) == values
    return same.flatten(1 - values.dim()).all(-1)


def moved_on(code: Tensor, shift: Tensor, num: int) -> Tensor:
    """Return the numbers of the values some places on in the cycle of all ``num``."""
    return code ^ shift if num == 2 else (code + shift) % num  # remainders are slow


def flip(flat: Tensor, values: Tensor, at: Tensor, shift: Tensor) -> Tensor:
    """Move components on by some places in the cycle of the values.

    Args:
        flat: Points ``(*chains, n, *atom)``.
        values: The values ``(K, *atom)``.
        at: The numbers of the components, ``(*chains, m)``, each once.
        shift: By how many places, ``(*chains, m)``.
    """
    index = at.reshape(*at.shape, *[1] * (values.dim() - 1)).expand(*at.shape, *values.shape[1:])
    code = codes_of(flat.gather(at.dim() - 1, index), values)
    return flat.scatter(at.dim() - 1, index, values[moved_on(code, shift, len(values))].to(flat))


def draw(weight: Tensor) -> Tensor:
    """Draw along the last dimension in proportion to finite weights, never one of zero."""
    edges = weight.cumsum(-1)
    total = edges[..., -1:]
    # A product that rounds up to the total would fall behind the last value.
    at = torch.minimum(torch.rand_like(total) * total, total.nextafter(torch.zeros_like(total)))
    return torch.searchsorted(edges, at, right=True).squeeze(-1)
