"""Newton's method for rows."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyro_ebm._descent.base import Search, largest, refuse_bottomless, rounding
from pyro_ebm.energy import Energy, differentiable
from pyro_ebm.kernels.base import choose


class NewtonState(NamedTuple):
    """Rows with the ``values`` and ``vectors`` of their Hessians, and a ``damping`` of steps."""

    position: Tensor
    energy: Tensor
    grad: Tensor
    stuck: Tensor
    values: Tensor
    vectors: Tensor
    damping: Tensor


def newton(energy: Energy) -> Search:
    r"""Damped Newton steps, :math:`-(|H| + \lambda)^{-1} \nabla E`, which never go up.

    The absolute values of the curvatures turn away from saddles. A step costs D + 1 gradients.
    """

    def init(z: Tensor) -> NewtonState:
        value, grad, hessian = _second_order(energy, z)
        values, vectors = torch.linalg.eigh(hessian)
        damping = 1e-6 * values.abs().amax(-1)
        stuck = torch.zeros_like(value, dtype=torch.bool)
        return NewtonState(z, value, grad, stuck, values, vectors, damping)

    def step(state: NewtonState) -> NewtonState:
        most = state.values.abs().amax(-1, keepdim=True)
        floor = (torch.finfo(most.dtype).eps * most).clamp(min=torch.finfo(most.dtype).tiny)
        scale = state.values.abs().maximum(floor) + state.damping.unsqueeze(-1)
        along = (state.vectors.mT @ state.grad.unsqueeze(-1)).squeeze(-1) / scale
        new = init(state.position - (state.vectors @ along.unsqueeze(-1)).squeeze(-1))
        level = new.energy <= state.energy + rounding(state.energy)
        lower = (new.energy < state.energy) | (level & (largest(new.grad) < largest(state.grad)))
        more = (4 * state.damping).maximum(1e-3 * most.squeeze(-1).maximum(largest(state.grad)))
        stay = state._replace(damping=more, stuck=(new.position == state.position).all(-1))
        return choose(lower, new._replace(damping=0.3 * state.damping), stay)

    return Search(init, step)


def _second_order(energy: Energy, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return energies, gradients and Hessians ``(n, D, D)``, one of their rows at a time."""
    with differentiable():
        z = z.detach().clone().requires_grad_()
        value = energy(z)
        (grad,) = torch.autograd.grad(value.sum(), z, create_graph=True)
        rows = [torch.zeros_like(z)] * z.shape[-1]
        if grad.requires_grad:  # else the energy is linear
            rows = [
                torch.autograd.grad(part.sum(), z, retain_graph=True, materialize_grads=True)[0]
                for part in grad.unbind(-1)
            ]
    refuse_bottomless(value)
    hessian = torch.stack(rows, 1)
    fine = value.isfinite() & grad.isfinite().all(-1) & hessian.isfinite().flatten(1).all(-1)
    value = torch.where(fine, value.detach(), torch.inf)
    grad = torch.where(fine.unsqueeze(-1), grad.detach(), 0.0)
    return value, grad, torch.where(fine[:, None, None], (hessian + hessian.mT) / 2, 0.0)
