"""L-BFGS for rows."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyro_ebm._descent.base import Point, Search, dot, evaluate, rounding
from pyro_ebm.energy import Energy
from pyro_ebm.kernels.base import choose

ARMIJO, WOLFE = 1e-4, 0.9  # Nocedal and Wright (2006), section 3.1
MEMORY = 10  # pairs that are kept
TRIALS = 20  # points of one line search


class LbfgsState(NamedTuple):
    """Rows with their memory, ``s`` and ``y`` ``(n, MEMORY, D)``, and their line search.

    That is at ``t`` along ``direction``, within ``low`` and ``high``, after so many ``trials``.
    """

    position: Tensor
    energy: Tensor
    grad: Tensor
    stuck: Tensor
    s: Tensor
    y: Tensor
    direction: Tensor
    t: Tensor
    low: Tensor
    high: Tensor
    trials: Tensor


def lbfgs(energy: Energy) -> Search:
    """L-BFGS with a weak Wolfe line search for each row.

    Each step tries one point per row. A row whose trial is good takes it and turns at once into
    its next direction while others still search along theirs, so that a batch needs as many
    gradients as its slowest row does alone.
    """

    def init(z: Tensor) -> LbfgsState:
        value, grad = evaluate(energy, z)
        memory = z.new_zeros(len(z), MEMORY, z.shape[-1])
        return _turn(Point(z, value, grad, torch.zeros_like(value).bool()), memory, memory)

    def step(state: LbfgsState) -> LbfgsState:
        trial = state.position + state.t.unsqueeze(-1) * state.direction
        value, grad = evaluate(energy, trial)
        lower, steep = _wolfe(state, value, dot(grad, state.direction))
        last = state.trials + 1 >= TRIALS
        s, y = _remember(state, trial, grad)
        still = (trial == state.position).all(-1)
        moved = _turn(Point(trial, value, grad, still), s, y)
        rest = _bracket(state, value, lower)
        if last.any():  # their lines have no lower point: forget what may mislead, or give up
            known = (state.s != 0).flatten(1).any(-1)
            here = Point(state.position, state.energy, state.grad, ~known)
            rest = choose(last, _turn(here, torch.zeros_like(s), torch.zeros_like(y)), rest)
        return choose(lower & (~steep | last), moved, rest)

    return Search(init, step)


def _turn(at: Point, s: Tensor, y: Tensor) -> LbfgsState:
    """Start a line search along the direction that the memory gives."""
    direction = _two_loops(at.grad, s, y)
    down = dot(direction, at.grad) < 0
    if not down.all():  # by rounding only: the pairs that are kept have positive curvature
        steepest = _two_loops(at.grad, torch.zeros_like(s), torch.zeros_like(y))
        direction = torch.where(down.unsqueeze(-1), direction, steepest)
    zero = torch.zeros_like(at.energy)
    one = torch.ones_like(zero)
    return LbfgsState(*at, s, y, direction, one, zero, one * torch.inf, zero)


def _two_loops(grad: Tensor, s: Tensor, y: Tensor) -> Tensor:
    """Apply the inverse Hessian of L-BFGS: Nocedal and Wright (2006), algorithm 7.4."""
    sy = dot(s, y)
    rho = torch.where(sy > 0, 1 / sy, 0.0).unsqueeze(-1)  # zero where nothing is remembered
    q, shares = grad, []
    for i in reversed(range(s.shape[1])):
        shares.append(rho[:, i] * dot(s[:, i], q).unsqueeze(-1))
        q = q - shares[-1] * y[:, i]
    first = 1 / grad.norm(dim=-1).clamp(min=1.0)  # a first step of at most length one
    q = q * torch.where(sy[:, -1] > 0, sy[:, -1] / dot(y[:, -1], y[:, -1]), first).unsqueeze(-1)
    for i in range(s.shape[1]):
        q = q + s[:, i] * (shares.pop() - rho[:, i] * dot(y[:, i], q).unsqueeze(-1))
    return -q


def _wolfe(state: LbfgsState, value: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
    """Say whether trials are low enough, and whether the line still falls too steeply there."""
    first = dot(state.grad, state.direction)
    armijo = value <= state.energy + ARMIJO * state.t * first
    # Where rounding hides the fall, slopes decide: Hager and Zhang (2005), equation 4.1.
    level = value <= state.energy + rounding(state.energy)
    lower = armijo | (level & (slope <= (2 * ARMIJO - 1) * first))
    return lower & value.isfinite(), slope < WOLFE * first


def _remember(state: LbfgsState, trial: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Add the latest pair to the memory, if the curvature along it is positive."""
    s, y = trial - state.position, grad - state.grad
    good = (dot(s, y) > torch.finfo(s.dtype).eps * dot(y, y))[:, None, None]
    return (
        torch.where(good, torch.cat([state.s[:, 1:], s.unsqueeze(1)], 1), state.s),
        torch.where(good, torch.cat([state.y[:, 1:], y.unsqueeze(1)], 1), state.y),
    )


def _bracket(state: LbfgsState, value: Tensor, lower: Tensor) -> LbfgsState:
    """Choose the next trial: farther out while the line falls, else by a parabola."""
    low, high = torch.where(lower, state.t, state.low), torch.where(lower, state.high, state.t)
    first = dot(state.grad, state.direction)
    rise = value - state.energy - state.t * first
    parabola = -0.5 * first * state.t.square() / rise
    width = high - low
    inside = torch.where(lower, low + 0.5 * width, parabola)
    inside = torch.minimum(torch.maximum(inside, low + 0.1 * width), low + 0.6 * width)
    t = torch.where(high.isfinite(), inside, 4.0 * state.t)
    return state._replace(t=t, low=low, high=high, trials=state.trials + 1)
