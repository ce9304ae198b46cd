"""Ways down from where a gradient has vanished, and the search that takes them."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_ebm._descent.base import (
    Found,
    Search,
    descend,
    evaluate,
    refuse_bottomless,
    rounding,
)
from pyro_ebm.energy import Energy

ROUNDS = 10  # how often a search goes on from below a saddle
LANCZOS = 20  # curvatures that are looked at for a way down
LENGTHS = [2.0**k for k in range(-14, 7)]  # of the steps along the least curvature


def to_minimum(energy: Energy, search: Search, z: Tensor, tolerance: float, num: int) -> Found:
    """Descend, and go on wherever there is a way down from where the gradient has vanished."""
    budget = torch.full(z.shape[:1], num, device=z.device)
    found = descend(search, z, tolerance, budget)
    left = torch.zeros_like(found.converged)
    for _ in range(ROUNDS):
        try:
            lower, left = way_down(energy, found, tolerance)
        except KeyboardInterrupt:
            found = found._replace(interrupted=True)
        if found.interrupted or not left.any():
            break
        more = descend(search, lower, tolerance, torch.where(left, budget - found.num_steps, 0))
        more = more._replace(num_steps=more.num_steps + found.num_steps)
        found = _merge(left, more, found)
    lost = left | found.interrupted  # what arrived last has not been looked at
    return found._replace(converged=found.converged & ~lost)


def _merge(left: Tensor, new: Found, old: Found) -> Found:
    """Take rows from the search that went on where they were ``left`` at a saddle."""
    position = torch.where(left.unsqueeze(-1), new.position, old.position)
    rest = (torch.where(left, n, o) for n, o in zip(new[1:5], old[1:5], strict=True))
    return Found._make([position, *rest, new.interrupted])


def way_down(energy: Energy, found: Found, tolerance: float) -> tuple[Tensor, Tensor]:
    """Look for lower points near those with a vanishing gradient, along the least curvature.

    A saddle, a maximum and a plateau have a way down that a gradient does not show. Returns the
    points and whether they are lower, by more than the gradient that is left explains.
    """
    z, none = found.position, torch.zeros_like(found.converged)
    if not found.converged.any():
        return z, none
    direction, least, most = least_curvature(energy, z)
    noise = torch.finfo(z.dtype).eps ** (1 / 3) * most.clamp(min=1.0)
    doubtful = found.converged & (least <= noise)
    if not doubtful.any():
        return z, none
    best, lowest = z, found.energy
    for sign in (-1.0, 1.0):
        last, walking = found.energy, doubtful
        for length in LENGTHS:
            trial = z + sign * length * direction
            value = energy(trial)
            refuse_bottomless(value)
            walking = walking & (value <= last + rounding(last))
            fall = found.energy - value
            lower = walking & (fall > tolerance * length + rounding(last)) & (value < lowest)
            best = torch.where(lower.unsqueeze(-1), trial, best)
            lowest = torch.where(lower, value, lowest)
            last = value
    return best, lowest < found.energy


def least_curvature(energy: Energy, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    r"""Return unit vectors of least curvature, the curvature, and the largest in size.

    By Lanczos' method, on products of the Hessian from differences of gradients,
    :math:`H v \approx (\nabla E(z + h v) - \nabla E(z - h v)) / (2 h)`: exact in few dimensions.
    """
    h = torch.finfo(z.dtype).eps ** (1 / 3) * z.abs().amax(-1, keepdim=True).clamp(min=1.0)
    v = torch.randn_like(z)
    basis, images = z.new_empty(len(z), 0, z.shape[-1]), []
    for _ in range(min(z.shape[-1], LANCZOS)):
        v = _orthogonal(v, basis)
        images.append((evaluate(energy, z + h * v)[1] - evaluate(energy, z - h * v)[1]) / (2 * h))
        basis, v = torch.cat([basis, v.unsqueeze(1)], 1), images[-1]
    small = basis @ torch.stack(images, -1)  # shape: (n, k, k)
    values, vectors = torch.linalg.eigh((small + small.mT) / 2)
    direction = (vectors[..., :1].mT @ basis).squeeze(1)
    return direction, values[:, 0], values.abs().amax(-1)


def _orthogonal(v: Tensor, basis: Tensor) -> Tensor:
    """Return unit vectors orthogonal to a basis: what is left of ``v``, or random ones."""
    rest = _without(_unit(v), basis)
    lost = rest.norm(dim=-1, keepdim=True) < 1e-4
    rest = torch.where(lost, _without(torch.randn_like(v), basis), rest)
    return _unit(_without(_unit(rest), basis))  # twice is enough against rounding


def _without(v: Tensor, basis: Tensor) -> Tensor:
    return v - (basis.mT @ (basis @ v.unsqueeze(-1))).squeeze(-1)


def _unit(v: Tensor) -> Tensor:
    return v / v.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(v.dtype).tiny)
