"""Replica exchange along a ladder of potentials, for methods for log Z."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyro_ebm._free import Free
from pyro_ebm._short_run import adapt
from pyro_ebm.energy import Energy
from pyro_ebm.kernels import Diagonal, Kernel, adapt_ladder, tempered
from pyro_ebm.kernels.base import expand_like


class Replicas:
    """Chains at all levels of a ladder, whose neighbours swap, and what their warm-up has found.

    Args:
        free: The coordinates in which they move, and their kernel.
        energy: The potential of coordinates, and of levels that broadcast to its shape.
        betas: The levels, increasing from 0, ``(K,)``.
        x: Where all levels start, ``(C, *batch, *event)``.
        renew: Gives the coordinates at the first level after each move, of those that are there.
    """

    def __init__(
        self,
        free: Free,
        energy: Callable[[Tensor, Tensor], Tensor],
        betas: Tensor,
        x: Tensor,
        renew: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.free, self.energy, self.betas, self.renew = free, energy, betas, renew
        ones = (1,) * (x.dim() - free.d.event_dim)
        self.log_step = torch.full((len(betas), *ones), -1.0).to(betas)
        self.scale: Tensor | None = None
        self.state = self._tempered().init(free.encode(x))

    @property
    def position(self) -> Tensor:
        """The coordinates at all levels, ``(K, C, *batch, *free)``."""
        return self.state.inner.position

    def _kernel(self, potential: Energy, num: int | None = None) -> Kernel:
        """Make the kernel of the first ``num`` levels."""
        metric = None if self.scale is None else Diagonal(self.scale[:num])
        return self.free.kernel(potential, self.log_step[:num].exp(), metric)

    def _tempered(self) -> Kernel:
        return tempered(self._kernel, None, self.betas, path=self.energy)

    def step(self) -> Any:
        """Move and swap, and return the record."""
        self.state, info = self._tempered().step(self.state)
        if self.renew is not None:
            self._place(self.renew(self.position[:1]))
        return info

    def _place(self, z: Tensor) -> None:
        """Put chains at the first levels."""
        num, old = len(z), self.state.inner
        levels = expand_like(self.betas, self.log_step)[:num]
        new = self._kernel(lambda z: self.energy(z, levels), num).init(z)
        joined = (torch.cat([a, b[num:]]) for a, b in zip(new, old, strict=True))
        self.state = self.state._replace(inner=old._make(joined))

    def warm(self, num: int, respace: bool = False) -> None:
        """Find a step size and a scale for each level, and perhaps the levels in between."""
        for length in (num // 8, num // 8, num // 4):
            if length < 2:
                continue
            variance, rejection = self._round(length)
            if not self.free.finite and self.free.own is None:  # others have units of their own
                self._rescale(variance)
            if respace:
                self.betas = adapt_ladder(self.betas, rejection.to(self.betas))
                self._place(self.position)
        if num // 2:
            self._round(num // 2)

    def _round(self, length: int) -> tuple[Tensor, Tensor]:
        """Adapt the steps; return variances over chains and time, and the rejected swaps."""
        positions, swaps = [], []
        for i in range(length):
            info = self.step()
            positions.append(self.position)
            swaps.append(info.swap_prob.flatten(1))
            accept = info.inner.accept_prob.mean(1, keepdim=True)
            self.log_step = adapt(self.log_step, accept, i)
        # a pair is tried at every second move; of the first moves most are forgotten
        joined = torch.cat(positions[length // 2 :], 1).to(self.betas)
        rejection = 1.0 - torch.cat(swaps, 1).nanmean(1).clamp(0.0, 1.0 - 1e-6)
        return joined.to(rejection).var(1, keepdim=True, correction=0), rejection

    def _rescale(self, variance: Tensor) -> None:
        """Take steps in units of the spread of each component, shrunk towards the mean."""
        typical = variance.flatten(1).mean(1).reshape(-1, *[1] * (variance.dim() - 1))
        tiny = torch.finfo(variance.dtype).tiny
        self.scale = (0.9 * variance + 0.1 * typical).clamp(min=tiny)
        self.log_step = torch.full_like(self.log_step, -0.5)
