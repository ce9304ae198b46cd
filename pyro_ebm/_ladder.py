"""Adaptation of a ladder of temperatures."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pyro_ebm.adaptation import Adapted, Warmup
from pyro_ebm.kernels.base import Diagonal
from pyro_ebm.kernels.tempering import adapt_ladder


class Ladder(Warmup):
    """Adapts a step size and a metric for each temperature, and the temperatures.

    Args:
        num: The moves of warm-up.
        like: A point, ``(D,)``.
        betas: The inverse temperatures to begin with, ``(K,)``.
        **options: Those of :class:`Warmup`.

    Example:
        >>> betas = torch.tensor([0.1, 1.0])
        >>> options = {"target": 0.8, "step_size": None, "adapt_step_size": True}
        >>> Ladder(100, torch.zeros(2), betas, **options, metric=None, chees=False).adapted.betas
        tensor([0.1000, 1.0000])
    """

    own = ("betas", "rejected", "tried", "next_ladder")

    def __init__(self, num: int, like: Tensor, betas: Tensor, **options: Any) -> None:
        super().__init__(num, like, **options)
        self.betas = betas.to(like)
        self.step.restart(self.step.step_size * self.betas.rsqrt())
        self.metric = Diagonal(torch.ones_like(like).expand(len(betas), 1, -1).clone())
        self.rejected = torch.zeros(len(betas) - 1, dtype=torch.double)
        self.tried = torch.zeros(len(betas) - 1, dtype=torch.double)
        self.next_ladder = max(10, num // 16)

    @property
    def adapted(self) -> Adapted:
        return super().adapted._replace(betas=self.betas)

    def hand_on(self, adapted: Adapted) -> None:
        super().hand_on(adapted)
        if adapted.betas is not None:
            self.betas = adapted.betas

    def state(self) -> dict[str, Any]:
        return {**super().state(), **{name: getattr(self, name) for name in self.own}}

    def restore(self, state: dict[str, Any]) -> None:
        super().restore(state)
        for name in self.own:
            setattr(self, name, state[name])

    def update_levels(self, position: Tensor, grad: Tensor, accept: Tensor, swap: Tensor) -> None:
        """Take in a move of all replicas.

        Args:
            position: Where they are, ``(K, C, D)``.
            grad: The gradients there.
            accept: The mean acceptance probabilities, ``(K,)``.
            swap: The probabilities of the swaps, ``(K-1, C)``, NaN where none was tried.
        """
        self.count += 1
        if self.adapts_step:
            self.step.update(accept)
        if self.preconditioner is not None and 5 <= self.count < self.late:
            self.preconditioner.update(position, grad)
            if self.count >= self.next_metric:
                metric = self.preconditioner.metric()
                self.metric = Diagonal(metric.inverse_mass.unsqueeze(-2))
                self.next_metric = max(self.count + 1, math.ceil(1.05 * self.count))
        self.rejected += (1.0 - swap).nansum(1).cpu()
        self.tried += (~swap.isnan()).sum(1).cpu()
        if self.next_ladder <= self.count < self.late:
            self._respace()
        if self.count == self.late and self.adapts_step:
            self.step.restart(self.step.step_size)

    def _respace(self) -> None:
        """Put the temperatures at equal steps of the communication barrier."""
        # A pair that was not tried counts as never rejected; rounding may leave the unit interval.
        rejection = (self.rejected / self.tried.clamp(min=1.0)).clamp(0.0, 1.0)
        self.betas = adapt_ladder(self.betas, rejection.to(self.betas))
        self.rejected.zero_()
        self.tried.zero_()
        self.next_ladder = math.ceil(1.5 * self.count)
