"""Where draws go: into memory, to a file as they come, or through a function."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Draws = dict[str, Tensor]


class Memory:
    """Keeps all draws, one tensor a name, filled as they come."""

    def __init__(self, num_draws: int) -> None:
        self.num_draws, self.count = num_draws, 0
        self.parts: Draws = {}

    def add(self, draws: Draws) -> None:
        """Take in draws ``(chains, n, *shape)``."""
        n = 0
        for name, value in draws.items():
            n = value.shape[1]
            if name not in self.parts:
                shape = (value.shape[0], self.num_draws, *value.shape[2:])
                self.parts[name] = value.new_empty(shape)
            self.parts[name][:, self.count : self.count + n] = value
        self.count += n

    def draws(self) -> Draws:
        """Return what there is."""
        return {name: value[:, : self.count] for name, value in self.parts.items()}

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"count": self.count, "parts": {n: v.clone() for n, v in self.draws().items()}}

    def restore(self, state: Mapping[str, Any]) -> None:
        """From a checkpoint."""
        self.count = 0
        self.add(state["parts"])
        self.count = state["count"]

    def room(self, num_draws: int) -> None:
        """Make room for more draws."""
        parts, self.parts = self.draws(), {}
        self.num_draws, self.count = num_draws, 0
        if parts:
            self.add(parts)


class Reduced(Memory):
    """Hands draws to a function and keeps the records of the sampler only."""

    def __init__(self, num_draws: int, reduce: Callable[[Draws], None], stats: set[str]) -> None:
        super().__init__(num_draws)
        self.reduce, self.stats = reduce, stats

    def add(self, draws: Draws) -> None:
        """Take in draws ``(chains, n, *shape)``."""
        self.reduce({name: v for name, v in draws.items() if name not in self.stats})
        super().add({name: v for name, v in draws.items() if name in self.stats})

    def restore(self, state: Mapping[str, Any]) -> None:
        Memory.add(self, state["parts"])


class Stream(Reduced):
    """Appends draws to a Zarr store, with xarray; the records of the sampler stay in memory."""

    def __init__(self, num_draws: int, path: Path, stats: set[str]) -> None:
        try:
            import zarr  # noqa: F401, PLC0415 - only who streams needs it
        except ImportError as error:
            raise ImportError(
                "stream= needs zarr, an extra: pip install 'pyro-ebm[stream]'"
            ) from error
        super().__init__(num_draws, self._append, stats)
        self.path = path
        self.written = 0

    def _append(self, draws: Draws) -> None:
        import xarray as xr  # noqa: PLC0415

        n = next(iter(draws.values())).shape[1]
        start = self.written
        variables = {
            name: (("chain", "draw", *(f"{name}_dim_{i}" for i in range(v.dim() - 2))), v.cpu())
            for name, v in draws.items()
        }
        data = xr.Dataset(variables, coords={"draw": range(start, start + n)})
        kind = {"mode": "w"} if start == 0 else {"append_dim": "draw"}
        data.to_zarr(self.path, consolidated=False, **kind)
        self.written += n


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
