"""What a training step shows: numbers from its points and moves, left on their device."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_ebm.energy import Energy, differentiable

POWER_STEPS = 3  # a lower bound of the largest curvature, near enough to see a canyon
Numbers = dict[str, Tensor]


def energies(x: Tensor, negatives: Tensor | None, plain: Tensor) -> Numbers:
    """Compare the energies of data ``(n,)`` and of negatives ``(m,)``.

    ``plain`` are the energies of both without the base.
    """
    found = {"energy_data": x.mean(), "sd_data": x.std(correction=0)}
    found["spread"] = plain.std(correction=0)
    if negatives is not None:
        found["energy_negatives"] = negatives.mean()
        found["sd_negatives"] = negatives.std(correction=0)
        pooled = ((found["sd_data"].square() + found["sd_negatives"].square()) / 2).sqrt()
        found["gap"] = (found["energy_negatives"] - found["energy_data"]) / pooled
    return found


def places(x: Tensor, negatives: Tensor, walls: tuple[Any, Any] | None) -> Numbers:
    """Say where negatives are, in units of the data's spread; ``walls`` None: points are discrete.

    From their coordinates: of several parts, of the first.
    """
    x, negatives = _flat(x), _flat(negatives)
    variance, centre = torch.var_mean(x, 0, correction=0)
    reach = (x - centre).norm(dim=1).max()
    found = {"radius": (negatives - centre).norm(dim=1).median() / reach}
    narrow = negatives.var(0, correction=0) <= 1e-6 * variance
    varies = variance > 0
    found["stuck"] = (narrow & varies).sum() / varies.sum()
    if walls is not None:
        found["bounded"] = _bounded(x, negatives, *walls)
        if x.shape == negatives.shape:  # chains that start at the data, all moves refused
            found["refused"] = (negatives == x).all(1).to(x.dtype).mean()
    return found


def spread(x: Tensor) -> Tensor:
    """Return the standard deviation of points over all components, a number for all of them."""
    return _flat(x).var(0, correction=0).mean().sqrt()


def movement(x: Tensor, before: Tensor, now: Tensor) -> Numbers:
    """Say how far chains have moved in one update, in units of the data's spread.

    Those that end where they began, at their data, have not been there for an update.
    """
    step = (_flat(now) - _flat(before)).norm(dim=1)
    still = step == 0
    if now.shape == x.shape:
        still &= (_flat(now) != _flat(x)).any(1)
    scale = spread(x) * _flat(x).shape[1] ** 0.5
    return {
        "movement": step.square().mean().sqrt() / scale,
        "still": still.to(step.dtype).mean(),
    }


def _flat(x: Tensor) -> Tensor:
    x = x.reshape(len(x), -1)
    return x if x.is_floating_point() else x.to(torch.get_default_dtype())


def _bounded(x: Tensor, negatives: Tensor, low: Any, high: Any) -> Tensor:
    """Return the share of components at the walls of a box, beyond the data's own share.

    Where no walls are known, they are the extremes of the negatives: a clamp shows in that many
    components are equal to them.
    """
    if low is None or high is None:
        low, high = negatives.min(), negatives.max()
        margin = 0.0
    else:
        margin = 1e-3 * (high - low)
    near = [
        ((a <= low + margin) | (a >= high - margin)).to(x.dtype).mean() for a in (negatives, x)
    ]
    return near[0] - near[1]


def moves(info: Any) -> Numbers:
    """Read records of moves: of the last one, of all in a list, or stacked by the loop."""
    infos = list(info) if isinstance(info, list) else [info]
    found: Numbers = {}
    for name, field in (("acceptance", "accept_prob"), ("temperature", "temperature")):
        values = [getattr(i, field).mean() for i in infos if hasattr(i, field)]
        if values:
            found[name] = torch.stack(values).mean()
    path = torch.stack([i.energy for i in infos]) if len(infos) > 1 else infos[0].energy
    if path.dim() > 1 and len(path) > 3:
        path = path.flatten(1)
        change = path[-1] - path[(len(path) - 1) // 2]
        found["drift"] = change.mean() / path[-1].std(correction=0)
        found["drift_error"] = found["drift"].abs() * change.std() / change.mean().abs()
        found["drift_error"] = found["drift_error"] / len(change) ** 0.5
    return found


def curvature(potential: Energy, x: Tensor, scale: Tensor, probe: Tensor) -> Numbers:
    r"""Measure the Hessian at points, in units of a ``scale``, by products with vectors.

    The mean trace is Hutchinson's estimate :math:`v^\top H v` with signs ``probe``, of the shape
    of ``x``, and the largest eigenvalue is approached from below by the power method.
    """
    with differentiable():
        y = torch.zeros_like(x).requires_grad_()
        value = potential(x + scale * y)
        (grad,) = torch.autograd.grad(value.sum(), y, create_graph=True)
        found = {"force": grad.detach().flatten(1).norm(dim=1).mean()}
        v = probe
        for i in range(POWER_STEPS):
            product = _product(grad, y, v)
            if i == 0:
                found["trace"] = (product * probe).flatten(1).sum(1).mean()
            norm = product.flatten(1).norm(dim=1)
            ratio = norm / v.flatten(1).norm(dim=1)
            v = product
        found["curvature"] = ratio.nan_to_num(0.0).median()
    return found


def _product(grad: Tensor, y: Tensor, v: Tensor) -> Tensor:
    """Multiply the Hessian with a vector; one of a linear energy has no graph."""
    if not grad.requires_grad:
        return torch.zeros_like(v)
    (product,) = torch.autograd.grad(grad, y, v, retain_graph=True, allow_unused=True)
    return torch.zeros_like(v) if product is None else product


class Seen(NamedTuple):
    """What a loop shows: parts of data and of negatives, all chains and the record of moves."""

    x: tuple[Tensor, ...]
    negatives: tuple[Tensor, ...] | None
    chains: Tensor | None
    info: Any

    @classmethod
    def of(cls, x: Any, negatives: Any, info: Any, state: Any) -> Seen:
        """Take points as tensors, tuples of parts, or with their kernel's or sampler's state."""
        if hasattr(negatives, "accept_rate"):  # a Contrastive, which keeps what it moved last
            negatives = negatives.moved
        if hasattr(negatives, "accept_prob"):
            info = negatives.info if info is None else info
            negatives = negatives.x if negatives.label is None else (negatives.x, negatives.label)
        parts, others = _parts(x), _parts(negatives)
        chains = others[0] if others and state is None else getattr(state, "position", None)
        return cls(parts or (), others, None if chains is None else chains.detach(), info)


def _parts(points: Any) -> tuple[Tensor, ...] | None:
    if points is None:
        return None
    parts = points if isinstance(points, tuple) else (points,)
    return tuple(part.detach() for part in parts)
