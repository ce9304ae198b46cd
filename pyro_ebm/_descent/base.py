"""What all descents share: rows, and the one loop that moves them.

Rows are points ``(n, D)`` with energies ``(n,)``. They never meet, so that one that diverges or
has arrived leaves the others alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_ebm.energy import Energy, value_and_grad
from pyro_ebm.kernels.base import choose


class Search(NamedTuple):
    """How to start searches and how to move them, as a kernel does with chains.

    The states are records with ``position``, ``energy``, the ``grad`` that is to vanish and
    ``stuck``, which marks rows without a way on. A step evaluates one gradient per row.
    """

    init: Callable[[Tensor], Any]
    step: Callable[[Any], Any]


class Point(NamedTuple):
    """Where rows are; the state of searches that remember nothing."""

    position: Tensor
    energy: Tensor
    grad: Tensor
    stuck: Tensor


class Found(NamedTuple):
    """What a search has come to, ``(n, D)`` and ``(n,)``, and whether the user stopped it."""

    position: Tensor
    energy: Tensor
    grad_norm: Tensor
    converged: Tensor
    num_steps: Tensor
    interrupted: bool


def evaluate(energy: Energy, z: Tensor) -> tuple[Tensor, Tensor]:
    """Return energies and gradients; what is not finite becomes a wall: inf, and a gradient of 0.

    Raises:
        ValueError: If an energy is minus infinity.
    """
    value, grad = value_and_grad(energy, z)
    refuse_bottomless(value)
    fine = value.isfinite() & grad.isfinite().all(-1)
    return torch.where(fine, value, torch.inf), torch.where(fine.unsqueeze(-1), grad, 0.0)


def refuse_bottomless(value: Tensor) -> None:
    """Refuse energies of minus infinity."""
    if (value == -torch.inf).any():
        raise ValueError(
            f"energy must be bounded below to have a minimum, got -inf at "
            f"{int((value == -torch.inf).sum())} of {value.numel()} points"
        )


def rounding(value: Tensor) -> Tensor:
    """Return by how much energies may differ by rounding alone."""
    return 8 * torch.finfo(value.dtype).eps * value.abs()


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Return the products of rows."""
    return (a * b).sum(-1)


def largest(grad: Tensor) -> Tensor:
    """Return the largest component of each gradient."""
    return grad.abs().amax(-1)


def descend(search: Search, z: Tensor, tolerance: float, budget: Tensor) -> Found:
    """Move every row until its gradient has vanished, it is stuck, or its steps are used up.

    The gradient has vanished where its largest component is at most ``tolerance``; where a row
    is stuck, at most the rounding error of that at the start. A row that has not converged ends
    at its lowest point. So do all where the user interrupts.

    Args:
        search: What moves the rows.
        z: The starts, ``(n, D)``.
        tolerance: What counts as no gradient.
        budget: The most steps of each row, ``(n,)``.
    """
    state = search.init(z)
    best = Point(*state[:4])
    noise = 8 * torch.finfo(z.dtype).eps * largest(state.grad)
    steps, interrupted = torch.zeros_like(budget), False
    try:
        while (going := ~(_arrived(state, tolerance) | state.stuck | (steps >= budget))).any():
            state = choose(going, search.step(state), state)
            steps = steps + going
            best = choose(state.energy < best.energy, Point(*state[:4]), best)
    except KeyboardInterrupt:
        interrupted = True
    end = choose(_arrived(state, tolerance), Point(*state[:4]), best)
    arrived = _arrived(end, tolerance) | (state.stuck & _arrived(end, noise))
    found = arrived & (not interrupted)
    return Found(end.position, end.energy, largest(end.grad), found, steps, interrupted)


def _arrived(state: Any, limit: float | Tensor) -> Tensor:
    return state.energy.isfinite() & (largest(state.grad) <= limit)
