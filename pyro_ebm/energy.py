"""Energies: callables, the algebra that makes energies from energies, and their derivatives."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Clamped", "Energy", "Given", "Scaled", "Sum", "force"]

Energy = Callable[..., Tensor]
"""A map from points ``(*batch, *event)`` to energies ``(*batch,)``; low energy is likely."""


class _Algebra(nn.Module):
    """Holds energies, so that torch finds the parameters of those that are modules."""

    def __init__(self, *energies: Energy) -> None:
        super().__init__()
        for energy in energies:
            if not callable(energy):
                raise TypeError(f"energy must be callable, got {type(energy).__name__}")
        self.energies = energies
        self.parts = nn.ModuleList([e for e in energies if isinstance(e, nn.Module)])


class Sum(_Algebra):
    r"""The sum of energies: a product of experts.

    .. math:: E(x) = \sum_i E_i(x)

    Args:
        energies: Energies of the same points.

    Raises:
        TypeError: If one of them is not callable, or there is none.

    References:
        | Training Products of Experts by Minimizing Contrastive Divergence (Hinton, 2002)
        | https://doi.org/10.1162/089976602760128018

    Example:
        >>> E = Sum(lambda x: x.square().sum(-1), lambda x: x.sum(-1))
        >>> E(torch.tensor([1.0, 2.0]))
        tensor(8.)
    """

    def __init__(self, *energies: Energy) -> None:
        if not energies:
            raise TypeError("energies must hold at least one energy, got none")
        super().__init__(*energies)

    def forward(self, *parts: Any, **named: Any) -> Tensor:
        """Return the sum of the energies at a point."""
        total = self.energies[0](*parts, **named)
        for energy in self.energies[1:]:
            total = total + energy(*parts, **named)
        return total


class Scaled(_Algebra):
    r"""An energy times a factor.

    .. math:: E(x) = s \, E_1(x)

    The inverse temperature of a distribution is the ``beta`` of
    :class:`~pyro_ebm.GibbsBoltzmann`; this is for weights inside a :class:`Sum`.

    Args:
        energy: The energy :math:`E_1`.
        scale: The factor :math:`s`; a parameter where it is an ``nn.Parameter``.

    Example:
        >>> Scaled(lambda x: x.square().sum(-1), 0.5)(torch.tensor([1.0, 2.0]))
        tensor(2.5000)
    """

    def __init__(self, energy: Energy, scale: float | Tensor) -> None:
        super().__init__(energy)
        self.scale = scale

    def forward(self, *parts: Any, **named: Any) -> Tensor:
        """Return the scaled energy at a point."""
        return self.scale * self.energies[0](*parts, **named)


class Given(_Algebra):
    r"""A conditional energy: an energy of several parts with some of them given.

    .. math:: E(x \mid y) = E(x, y)

    The batch of the given parts becomes batch of the distribution that is made of it.

    Args:
        energy: An energy of several parts, whose batches broadcast.
        parts: The given parts, in the order of the energy's arguments, after the free one;
            where one of them is ``...`` it marks the place of the free one.
        named: Given parts by name.

    Example:
        >>> E = lambda x, y: (x - y).square().sum(-1)
        >>> y = torch.tensor([[0.0, 0.0], [1.0, 1.0], [2.0, 2.0]])
        >>> Given(E, y)(torch.zeros(2))
        tensor([0., 2., 8.])
        >>> Given(E, torch.zeros(2), ...)(y)
        tensor([0., 2., 8.])
    """

    def __init__(self, energy: Energy, *parts: Any, **named: Any) -> None:
        super().__init__(energy)
        if sum(part is ... for part in parts) > 1:
            raise ValueError("parts must hold at most one '...', the place of the free part")
        self.given = parts if any(part is ... for part in parts) else (..., *parts)
        self.named = named

    def forward(self, *free: Any, **named: Any) -> Tensor:
        """Return the energy at the free part (or parts, which stand where ``...`` does)."""
        at = next(i for i, part in enumerate(self.given) if part is ...)
        parts = (*self.given[:at], *free, *self.given[at + 1 :])
        return self.energies[0](*parts, **self.named, **named)


class Clamped(_Algebra):
    r"""An energy with some components of its points given: conditioning and completion.

    .. math:: E(z \mid y) = E(x), \quad x_i = y_i \text{ where observed, else the next of } z

    Its points are the components that are free, in their order: any kernel moves them, and a
    :class:`~pyro_ebm.GibbsBoltzmann` over them is the conditional law. The batch of ``x`` becomes
    batch of that distribution. For parts that are arguments of the energy there is :class:`Given`.

    Args:
        energy: Maps points ``(*batch, *event)`` to energies ``(*batch,)``.
        x: Points ``(*batch, *event)``, of which the observed components count.
        observed: Which components are given: booleans of the shape of the event; ``(n, 1)`` for
            one-hot points ``(n, K)``, whose rows are observed as a whole, and so on.

    Raises:
        TypeError: If the energy is not callable, or ``observed`` not boolean.
        ValueError: If ``observed`` has not the shape of the event.

    Example:
        >>> E = lambda x: (x[..., 0] - x[..., 1]).square() + x[..., 2].square()
        >>> x, observed = torch.tensor([1.0, 0.0, 2.0]), torch.tensor([True, False, True])
        >>> energy = Clamped(E, x, observed)
        >>> energy(torch.tensor([0.5])), energy.complete(torch.tensor([0.5]))
        (tensor(4.2500), tensor([1.0000, 0.5000, 2.0000]))
    """

    def __init__(self, energy: Energy, x: Tensor, observed: Tensor) -> None:
        super().__init__(energy)
        if observed.dtype != torch.bool:
            raise TypeError(f"observed must be boolean, got {observed.dtype}")
        own, event = list(observed.shape), x.shape[x.dim() - observed.dim() :]
        num = len(own)
        while num and own[num - 1] == 1 != event[num - 1]:
            num -= 1  # a dimension of vectors
        if own[:num] != list(event[:num]):
            raise ValueError(
                "observed must have the shape of the event, with ones for that of vectors, got "
                f"{tuple(own)} for points of shape {tuple(x.shape)}"
            )
        self.shape, self.atom = event, event[num:]
        order = observed.flatten().to(torch.int8).argsort(stable=True)  # the free ones first
        self.place, self.num_free = order.argsort(), int((~observed).sum())
        self.kept = self._flat(x).index_select(-1 - len(self.atom), order[self.num_free :])
        self.order = order[: self.num_free]

    def _flat(self, x: Tensor) -> Tensor:
        batch = x.shape[: x.dim() - len(self.shape)]
        return x.reshape(*batch, -1, *self.atom)

    def free(self, x: Tensor) -> Tensor:
        """Return the free components ``(*batch, num_free)`` of points."""
        return self._flat(x).index_select(-1 - len(self.atom), self.order)

    def complete(self, z: Tensor) -> Tensor:
        """Return whole points ``(*batch, *event)`` of their free components."""
        dim = -1 - len(self.atom)
        batch = torch.broadcast_shapes(z.shape[:dim], self.kept.shape[:dim])
        parts = (part.expand(*batch, *part.shape[dim:]) for part in (z, self.kept))
        return (
            torch.cat(list(parts), dim).index_select(dim, self.place).reshape(*batch, *self.shape)
        )

    def forward(self, z: Tensor) -> Tensor:
        """Return the energy of points with these free components."""
        return self.energies[0](self.complete(z))


def is_conditional(energy: object) -> bool:
    """Whether an energy has given parts, whose batch it brings along."""
    if isinstance(energy, Given | Clamped):
        return True
    return isinstance(energy, _Algebra) and any(map(is_conditional, energy.energies))


@contextlib.contextmanager
def differentiable() -> Iterator[None]:
    """Switch gradients on, also inside ``torch.no_grad`` and ``torch.inference_mode``."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


def value_and_grad(energy: Energy, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the energies of points and their gradients, both cut off from the graph.

    No ``.grad`` is written, neither to the points nor to parameters.

    Raises:
        ValueError: If the energies carry no graph to the points.
    """
    if torch.is_inference_mode_enabled():
        with torch.inference_mode(False):
            return value_and_grad(energy, x)
    with torch.enable_grad():
        x = x.detach().clone().requires_grad_()
        value = energy(x)
        if not value.requires_grad:
            raise ValueError(
                f"{describe(energy)} must depend differentiably on its points, got a value "
                "without a graph (detached, or constant)"
            )
        (grad,) = torch.autograd.grad(value, x, torch.ones_like(value), allow_unused=True)
    return value.detach(), torch.zeros_like(x) if grad is None else grad


def force(energy: Energy, x: Tensor) -> Tensor:
    r"""The force of an energy, minus its gradient in the point.

    .. math:: f(x) = -\nabla_x E(x)

    Times :math:`\beta` it is the score of a Gibbs-Boltzmann distribution with a flat base.

    Args:
        energy: Maps points ``(*batch, *event)`` to energies ``(*batch,)``.
        x: Points, of shape ``(*batch, *event)``; they get no ``.grad``.

    Returns:
        The forces, of the shape of ``x``.

    Example:
        >>> force(lambda x: 0.5 * x.square().sum(-1), torch.tensor([1.0, -2.0]))
        tensor([-1.,  2.])
    """
    return -value_and_grad(energy, x)[1]


def check_value(energy: Energy, value: object, x: Tensor, expected: torch.Size) -> None:
    """Refuse an output of an energy that is not one real number per point.

    Raises:
        TypeError: If it is no tensor, or not of real floating point.
        ValueError: If its shape is not ``expected``.
    """
    name = describe(energy)
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must return a tensor, got {type(value).__name__}")
    if not value.dtype.is_floating_point:
        raise TypeError(f"{name} must return real floating-point energies, got {value.dtype}")
    if value.shape != expected:
        raise ValueError(
            f"{name} must return one energy per point: for points of shape {tuple(x.shape)} "
            f"expected {tuple(expected)}, got {tuple(value.shape)}. Sum over the event, not over "
            "the batch; an energy with a batch of its own is Given(energy, its_part)"
        )


def check_batch(energy: Energy, value: Tensor, x: Tensor, num_batch: int) -> None:
    """Refuse an energy whose value at a point depends on the rest of the batch.

    The first and the last point of the batch are evaluated alone and compared.

    Raises:
        ValueError: If they differ from their energies in the batch.
    """
    with torch.no_grad():
        flat = x.detach().flatten(0, num_batch - 1)
        for i in (0, len(flat) - 1):
            alone = energy(flat[i].reshape(*[1] * num_batch, *x.shape[num_batch:]).clone())
            got, want = value.detach().flatten()[i], alone.flatten()[0]
            close = torch.isclose(got, want, rtol=1e-3, atol=1e-4, equal_nan=True)
            if not close:
                raise ValueError(
                    f"{describe(energy)} must give each point of a batch its own energy, got "
                    f"{got.item():.6g} for point {i} of {len(flat)} in the batch and "
                    f"{want.item():.6g} alone: it sums or averages over its batch, or it is "
                    "random (dropout, batch norm: call .eval())"
                )


def describe(energy: object) -> str:
    """Name an energy in messages."""
    name = getattr(energy, "__name__", None) or type(energy).__name__
    return f"energy {name!r}"
