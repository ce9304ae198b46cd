"""Where draws go: into memory, to a file as they come, or through a function."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Draws = dict[str, Tensor]


class Memory:
    """Keeps all draws, one tensor a name, filled as they come.

    Args:
        num_draws: How many draws there will be.
        none: A chunk of no draws, ``(chains, 0, *shape)`` by name, from which the room is made.
    """

    def __init__(self, num_draws: int, none: Draws) -> None:
        self.num_draws, self.count = num_draws, 0
        self.parts = {name: self._room(value) for name, value in none.items()}

    def _room(self, like: Tensor) -> Tensor:
        return like.new_empty((like.shape[0], self.num_draws, *like.shape[2:]))

    def add(self, draws: Draws) -> None:
        """Take in draws ``(chains, n, *shape)``."""
        self.hand_on({name: v for name, v in draws.items() if name not in self.parts})
        n = 0
        for name, room in self.parts.items():
            n = draws[name].shape[1]
            room[:, self.count : self.count + n] = draws[name]
        self.count += n

    def hand_on(self, draws: Draws) -> None:
        """Do with draws what is done with those that are not kept in memory."""

    def draws(self) -> Draws:
        """Return what there is."""
        return {name: room[:, : self.count] for name, room in self.parts.items()}

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {name: value.clone() for name, value in self.draws().items()}

    def restore(self, state: Draws) -> None:
        """From a checkpoint."""
        self.parts, self.count = dict(state), next(iter(state.values())).shape[1]
        self.extend(max(self.num_draws, self.count))

    def extend(self, num_draws: int) -> None:
        """Make room for this many draws in all."""
        old, self.num_draws = self.draws(), num_draws
        self.parts = {name: self._room(value) for name, value in old.items()}
        for name, value in old.items():
            self.parts[name][:, : self.count] = value


class Reduced(Memory):
    """Hands draws to a function and keeps the records of the sampler only."""

    def __init__(
        self, num_draws: int, none: Draws, stats: set[str], reduce: Callable[[Draws], None]
    ) -> None:
        super().__init__(num_draws, {name: v for name, v in none.items() if name in stats})
        self.reduce = reduce

    def hand_on(self, draws: Draws) -> None:
        self.reduce(draws)


class Stream(Memory):
    """Appends draws to a Zarr store, with xarray; the records of the sampler stay in memory.

    Raises:
        ImportError: If zarr is not installed.
    """

    def __init__(self, num_draws: int, none: Draws, stats: set[str], path: Path) -> None:
        if importlib.util.find_spec("zarr") is None:
            raise ImportError("stream= needs zarr, an extra: pip install 'pyro-ebm[stream]'")
        super().__init__(num_draws, {name: v for name, v in none.items() if name in stats})
        self.path = path

    def hand_on(self, draws: Draws) -> None:
        import xarray as xr  # noqa: PLC0415 - slow, and only who streams needs it

        variables: dict[Any, Any] = {"draw": self.count + torch.arange(_length(draws)).numpy()}
        for name, value in draws.items():
            axes = ("chain", "draw", *(f"{name}_dim_{i}" for i in range(value.dim() - 2)))
            variables[name] = axes, value.cpu().numpy()
        data = xr.Dataset(variables)
        if self.count:
            data.to_zarr(self.path, consolidated=False, append_dim="draw")
        else:
            data.to_zarr(self.path, consolidated=False, mode="w")

    def restore(self, state: Draws) -> None:
        """From a checkpoint: what was appended after it was saved is cut off."""
        super().restore(state)
        if not self.count:
            return
        import zarr  # noqa: PLC0415 - an extra, for who streams

        for name, array in zarr.open_group(str(self.path), mode="r+").arrays():
            shape = array.shape
            cut = (self.count,) if name == "draw" else (shape[0], self.count, *shape[2:])
            array.resize(cut)


def _length(draws: Draws) -> int:
    return next(iter(draws.values())).shape[1]


class Progress:
    """Running R-hat of all dimensions, without keeping draws: means and variances of chains."""

    def __init__(self) -> None:
        self.count = 0
        self.mean: Tensor | None = None
        self.moment: Tensor | None = None

    def add(self, x: Tensor) -> None:
        """Take in points ``(chains, n, D)``."""
        n, mean = x.shape[1], x.mean(1)
        moment = (x - mean.unsqueeze(1)).square().sum(1)
        if self.mean is None or self.moment is None:
            self.count, self.mean, self.moment = n, mean, moment
            return
        total = self.count + n
        shift = mean - self.mean
        self.moment = self.moment + moment + shift.square() * (self.count * n / total)
        self.mean = self.mean + shift * (n / total)
        self.count = total

    def r_hat(self) -> float:
        """The largest potential scale reduction so far; NaN with one chain or draw."""
        if self.mean is None or self.moment is None or self.count < 2 or len(self.mean) < 2:
            return float("nan")
        within = (self.moment / (self.count - 1)).mean(0)
        between = self.mean.var(0)
        ratio = ((self.count - 1) / self.count + between / within).sqrt()
        return float(torch.nan_to_num(ratio, nan=0.0).max())
