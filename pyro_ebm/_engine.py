"""Back ends: how the gradients of chains are computed."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from pyro_ebm.energy import Energy, value_and_grad
from pyro_ebm.kernels.hmc import trajectory
from pyro_ebm.kernels.nuts import Tree, advance


class Eager:
    """The reference: autograd at every leapfrog step; works for every energy."""

    name = "eager"

    def __init__(self, energy: Energy) -> None:
        self.energy = energy
        self.executed = 0

    def gradient(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return potentials and gradients; a chain whose energy fails numerically gets NaN."""
        self.executed += len(x)
        try:
            return value_and_grad(self.energy, x)
        except torch.linalg.LinAlgError:
            if len(x) == 1:
                return torch.full_like(x[:, 0], torch.nan), torch.zeros_like(x)
            halves = [self.gradient(h) for h in x.chunk(2)]
            self.executed -= len(x)
            return tuple(map(torch.cat, zip(*halves, strict=True)))  # type: ignore[return-value]

    @functools.cached_property
    def integrate(self) -> Any:
        """Leapfrog steps, one after the other."""
        return trajectory(self.gradient)

    def advance(
        self, metric: Any, tables: Any, tree: Tree, u: Tensor, paused: Tensor
    ) -> tuple[Tree, int]:
        """Grow trees until one is finished that is not paused."""
        for i in range(len(u)):
            tree = advance(self.gradient, metric, tables, tree, u[i])
            if bool((tree.finished & ~paused).any()):
                return tree, i + 1
        return tree, len(u)

    def prepare(self, move: Any, z: Tensor, warmup: Any) -> None:
        """Nothing needs to be prepared."""


def make_engine(potential: Any, backend: str, sizes: list[int]) -> Eager:
    """Make the engine of a back end."""
    return Eager(potential.energy)
