"""Gradient descent and Adam for rows, by torch."""

from __future__ import annotations

from torch import Tensor

from pyro_ebm._descent.base import Point, Search, evaluate
from pyro_ebm.energy import Energy


def by_torch(energy: Energy, optimizer: type, step_size: float, z: Tensor) -> Search:
    """Make a search of one of torch's optimisers that keep components apart."""
    point = z.clone().requires_grad_()
    tool = optimizer([point], lr=step_size)

    def init(z: Tensor) -> Point:
        value, grad = evaluate(energy, z)
        return Point(z, value, grad, ~value.isfinite())  # one that diverged comes back no more

    def step(state: Point) -> Point:
        point.data.copy_(state.position)
        point.grad = state.grad.clone()
        tool.step()
        new = init(point.detach().clone())
        return new._replace(stuck=new.stuck | (new.position == state.position).all(-1))

    return Search(init, step)
