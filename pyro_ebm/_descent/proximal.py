"""Proximal gradient descent for rows: ISTA and FISTA."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyro_ebm._descent.base import Search, dot, evaluate, refuse_bottomless, rounding
from pyro_ebm.energy import Energy
from pyro_ebm.kernels.base import choose


class ProximalState(NamedTuple):
    """Rows and the points ``y`` from which they step, with energy and gradient there.

    ``energy`` has the l1 part; ``grad`` is the gradient mapping, which vanishes at the minimum.
    """

    position: Tensor
    energy: Tensor
    grad: Tensor
    stuck: Tensor
    y: Tensor
    y_energy: Tensor
    y_grad: Tensor
    lipschitz: Tensor
    momentum: Tensor


def proximal(energy: Energy, l1: Tensor, accelerated: bool) -> Search:
    r"""ISTA, or FISTA with restarts: proximal steps for :math:`E(x) + \lambda |x|_1`.

    The step :math:`1 / L` is found by backtracking. A step costs an energy and a gradient.
    """

    def shrink(state: ProximalState) -> Tensor:
        rate = 1 / state.lipschitz.unsqueeze(-1)
        moved = state.y - rate * state.y_grad
        return moved.sign() * (moved.abs() - rate * l1).clamp(min=0.0)

    def mapping(state: ProximalState, x: Tensor) -> Tensor:
        return state.lipschitz.unsqueeze(-1) * (state.y - x)

    def init(z: Tensor) -> ProximalState:
        value, grad = evaluate(energy, z)
        one = torch.ones_like(value)
        lipschitz = _secant(energy, z, grad)
        total = value + dot(l1, z.abs())
        state = ProximalState(
            z, total, grad, torch.zeros_like(one).bool(), z, value, grad, lipschitz, one
        )
        return state._replace(grad=mapping(state, shrink(state)))

    def step(state: ProximalState) -> ProximalState:
        x = shrink(state)
        value = energy(x)
        refuse_bottomless(value)
        y, momentum = _ahead(state, x) if accelerated else (x, state.momentum)
        y_energy, y_grad = evaluate(energy, y)
        d = x - state.y
        bound = state.y_energy + dot(state.y_grad, d) + 0.5 * state.lipschitz * dot(d, d)
        fine = (value <= bound + rounding(bound)) & y_energy.isfinite()
        new = ProximalState(
            x, value + dot(l1, x.abs()), mapping(state, x), state.stuck, y, y_energy, y_grad,
            state.lipschitz, momentum,
        )  # fmt: skip
        shorter = 2 * state.lipschitz
        return choose(fine, new, state._replace(lipschitz=shorter, stuck=~shorter.isfinite()))

    return Search(init, step)


def _secant(energy: Energy, z: Tensor, grad: Tensor) -> Tensor:
    """Return a first, low estimate of the Lipschitz constant of the gradient."""
    h = torch.finfo(z.dtype).eps ** (1 / 3) * z.abs().amax(-1, keepdim=True).clamp(min=1.0)
    along = torch.where(grad.abs().amax(-1, keepdim=True) > 0, grad, 1.0)
    along = along / along.norm(dim=-1, keepdim=True)
    slope = ((evaluate(energy, z - h * along)[1] - grad) / h).norm(dim=-1)
    return torch.where(slope > 0, slope, 1.0)


def _ahead(state: ProximalState, x: Tensor) -> tuple[Tensor, Tensor]:
    """Extrapolate; momentum starts anew where it points uphill: O'Donoghue and Candes (2015)."""
    uphill = dot(state.y - x, x - state.position) > 0
    t = torch.where(uphill, 1.0, state.momentum)
    longer = 0.5 * (1 + (1 + 4 * t.square()).sqrt())
    return x + ((t - 1) / longer).unsqueeze(-1) * (x - state.position), longer
