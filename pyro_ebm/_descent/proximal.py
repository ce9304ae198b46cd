"""Proximal gradient descent for rows: ISTA and FISTA."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyro_ebm._descent.base import Search, dot, evaluate, rounding
from pyro_ebm.energy import Energy
from pyro_ebm.kernels.base import choose


class ProximalState(NamedTuple):
    """Rows and the points ``y`` from which they step, with energy and gradient there.

    ``energy`` has the l1 part; ``grad`` is ``x - shrink(x - gradient)``, which vanishes at the
    minimum and there alone.
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

    .. math:: x' = \operatorname{shrink}(y - \nabla E(y) / L, \lambda / L)

    The :math:`L` is found by backtracking. A step costs a gradient, of FISTA two.
    """

    def init(z: Tensor) -> ProximalState:
        value, grad = evaluate(energy, z)
        one = torch.ones_like(value)
        at = (value + dot(l1, z.abs()), z - _shrink(z - grad, l1), torch.zeros_like(one).bool())
        return ProximalState(z, *at, z, value, grad, _secant(energy, z, grad), one)

    def step(state: ProximalState) -> ProximalState:
        rate = 1 / state.lipschitz.unsqueeze(-1)
        x = _shrink(state.y - rate * state.y_grad, rate * l1)
        value, grad = evaluate(energy, x)
        total, residual = value + dot(l1, x.abs()), x - _shrink(x - grad, l1)
        stuck = (x == state.position).all(-1) & (x == state.y).all(-1)
        y, momentum, y_energy, y_grad = x, state.momentum, value, grad
        if accelerated:
            y, momentum = _ahead(state, x)
            y_energy, y_grad = evaluate(energy, y)
        fine = _majorised(state, x, value, grad) & y_energy.isfinite()
        found = (x, total, residual, stuck, y, y_energy, y_grad, state.lipschitz, momentum)
        return choose(fine, ProximalState(*found), _shorter(state))

    return Search(init, step)


def _shrink(x: Tensor, by: Tensor) -> Tensor:
    """Move components towards zero, and not beyond."""
    return x.sign() * (x.abs() - by).clamp(min=0.0)


def _shorter(state: ProximalState) -> ProximalState:
    """Stay, and step half as far next time."""
    lipschitz = 2 * state.lipschitz
    return state._replace(lipschitz=lipschitz, stuck=~lipschitz.isfinite())


def _majorised(state: ProximalState, x: Tensor, value: Tensor, grad: Tensor) -> Tensor:
    """Whether the parabola from ``y`` with the present L lies above the energy at ``x``."""
    d = x - state.y
    reach = state.lipschitz * dot(d, d)
    above = value <= state.y_energy + dot(state.y_grad, d) + 0.5 * reach
    # Where rounding hides differences of energies, the curvature decides, as it may for parabolas.
    close = (value - state.y_energy).abs() <= torch.finfo(d.dtype).eps ** 0.5 * value.abs()
    noise = rounding(dot(grad.abs(), d.abs()))
    return value.isfinite() & (above | (close & (dot(grad - state.y_grad, d) <= reach + noise)))


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
