"""Modes of a distribution in unconstrained space, for methods that build on them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyro_ebm._free import Free
from pyro_ebm.distribution import GibbsBoltzmann
from pyro_ebm.energy import Energy, differentiable

NUM_STARTS = 32


class Space(NamedTuple):
    r"""Unconstrained space as flat vectors :math:`z`, of which the points are :math:`T(z)`.

    ``potential`` is :math:`U(z) = \beta E(T(z)) - \log b(T(z)) - \log |\det T'(z)|`; ``measure``
    its part without the energy, :math:`-\log b - \log |\det T'|`.
    """

    potential: Energy
    measure: Energy
    transform: Energy
    dim: int


class Modes(NamedTuple):
    """Where searches ended: ``z`` of shape ``(n, *batch, D)``, with the derivatives there.

    ``decrement`` is half the squared length of the gradient in the metric of the Hessian, the
    fall of the potential that is left; a search has ``settled`` where that is nothing and where
    the Hessian stays the same, other than at a flat minimum.
    """

    z: Tensor
    potential: Tensor  # shape: (n, *batch)
    grad: Tensor  # shape: (n, *batch, D)
    hessian: Tensor  # shape: (n, *batch, D, D)
    decrement: Tensor  # shape: (n, *batch)
    settled: Tensor  # shape: (n, *batch)

    def first(self) -> Modes:
        """Return the first search alone."""
        return Modes(*(part[:1] for part in self))

    def best(self, fine: Tensor) -> Modes:
        """Return the one of least potential among those that are ``fine``, without ``n``."""
        row = torch.where(fine, self.potential, torch.inf).argmin(0)
        return Modes(*(_take(part, row) for part in self))


def _take(x: Tensor, row: Tensor) -> Tensor:
    index = row.reshape(1, *row.shape, *[1] * (x.dim() - 1 - row.dim()))
    return x.gather(0, index.expand(1, *x.shape[1:])).squeeze(0)


def space_of(d: GibbsBoltzmann) -> Space:
    """Return the unconstrained space of a distribution.

    Raises:
        ValueError: If the support is finite.
    """
    free = Free(d)
    if free.finite:
        raise ValueError(
            f"the support must be continuous, got the finite support {d.support}: use Exact()"
        )

    def of_vectors(function: Energy) -> Energy:
        return lambda z: function(z.reshape(z.shape[:-1] + free.shape))

    measure = free.pull(lambda x: -d._measure.log_prob(x))
    pulled = of_vectors(free.pull(d.potential))
    return Space(pulled, of_vectors(measure), of_vectors(free.decode), free.shape.numel())


def find_modes(d: GibbsBoltzmann, space: Space, num_steps: int = 100) -> Modes:
    """Search modes from a few draws of the base, the same ones every time, without a graph.

    Damped Newton steps in the absolute Hessian, so that saddles repel.
    """
    with differentiable(), torch.random.fork_rng(devices=_cuda(d)):
        torch.manual_seed(0)
        # After its move to unconstrained space a draw may be infinite, where the base is wide.
        x = d.base.sample((NUM_STARTS,)).detach()
        z = Free(d).encode(x).reshape(NUM_STARTS, *d.batch_shape, space.dim)
        state = _derive(space.potential, z.nan_to_num(0.0, 0.0, 0.0))
        for _ in range(num_steps):
            z = _descend(space.potential, state)
            moved = (z != state.z).any(-1)
            state = _derive(space.potential, z)
            if not (moved & (state.decrement > 1e-6)).any():
                break
        for _ in range(3):  # full steps, which rounding of the potential cannot hold up
            near = (state.decrement < 1e-3).unsqueeze(-1)
            step = _newton(state.grad, state.hessian, state.z)
            before = state
            state = _derive(space.potential, torch.where(near, state.z + step, state.z))
    return state._replace(settled=_settled(state, before))


def _settled(state: Modes, before: Modes) -> Tensor:
    """Whether a search is at a minimum whose curvature no longer changes as it is approached."""
    now, then = (torch.linalg.eigvalsh(symmetric(s.hessian)) for s in (state, before))
    same = ((now - then).abs() <= 0.1 * now.abs()).all(-1)
    return same & (state.decrement < 1e-4)


def _cuda(d: GibbsBoltzmann) -> list[torch.device]:
    device = d.floating().device
    return [device] if device.type == "cuda" else []


def hessian(potential: Energy, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return potentials, gradients and Hessians, with graphs to parameters and to ``z``."""
    value = potential(z)
    grad = gradient(value, z)
    rows = [gradient(grad[..., i], z) for i in range(z.shape[-1])]
    return value, grad, torch.stack(rows, -2)


def gradient(value: Tensor, z: Tensor) -> Tensor:
    """Return the gradients of potentials, with a graph."""
    if not value.requires_grad:
        return torch.zeros_like(z)
    (grad,) = torch.autograd.grad(
        value.sum(), z, create_graph=True, allow_unused=True, materialize_grads=True
    )
    return grad


def _derive(potential: Energy, z: Tensor) -> Modes:
    z = z.detach().requires_grad_()
    value, grad, hess = (part.detach() for part in hessian(potential, z))
    z, value = z.detach(), value.expand(z.shape[:-1])
    step = _newton(grad, hess, z)
    decrement = -0.5 * (step * grad).sum(-1)
    fine = value.isfinite() & grad.isfinite().all(-1) & hess.isfinite().all(-1).all(-1)
    return Modes(z, value, grad, hess, torch.where(fine, decrement, torch.inf), fine)


def symmetric(hess: Tensor) -> Tensor:
    """Return the symmetric part of a Hessian, finite as eigenvalues need it."""
    hess = hess.nan_to_num(0.0, 0.0, 0.0)
    return 0.5 * (hess + hess.mT)


def _newton(grad: Tensor, hess: Tensor, z: Tensor) -> Tensor:
    """Return Newton's step in the absolute Hessian, no longer than about the point itself."""
    value, axes = torch.linalg.eigh(symmetric(hess))
    along = (axes.mT @ grad.nan_to_num(0.0, 0.0, 0.0).unsqueeze(-1)).squeeze(-1)
    least = along.abs() / (1.0 + z.norm(dim=-1, keepdim=True))
    tiny = torch.finfo(z.dtype).tiny
    return -(axes @ (along / value.abs().maximum(least).clamp(min=tiny)).unsqueeze(-1)).squeeze(-1)


def _descend(potential: Energy, state: Modes) -> Tensor:
    """Return the best of ever shorter Newton steps, or the point itself."""
    step = _newton(state.grad, state.hessian, state.z)
    scale = 0.5 ** torch.arange(12.0, device=step.device, dtype=step.dtype)
    tried = state.z + scale.reshape(-1, *[1] * step.dim()) * step
    with torch.no_grad():
        value = potential(tried).expand(tried.shape[:-1])
    value, row = torch.where(value.isnan(), torch.inf, value).min(0)
    lower = (value < state.potential) | ~state.potential.isfinite()
    return torch.where(lower.unsqueeze(-1), _take(tried, row), state.z)
