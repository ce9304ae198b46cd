"""Searches over finite supports: all states, or one component at a time."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions.constraints import Constraint
from torch.nn.functional import one_hot

from pyro_ebm._descent.base import Found, refuse_bottomless
from pyro_ebm.energy import Energy
from pyro_ebm.flat import sites_of, states_of, values_of
from pyro_ebm.kernels.base import expand_like

CHUNK = 1 << 18  # energies at a time


class Code(NamedTuple):
    """A finite support as whole numbers: ``num_sites`` of them, each below ``num_values``.

    ``values`` are those of a component, and None where a component is one-hot.
    """

    values: Tensor | None
    num_values: int
    num_sites: int
    event_shape: torch.Size

    @classmethod
    def of(cls, support: Constraint, event_shape: torch.Size, like: Tensor) -> Code:
        """Make the code of a support, for points of the type and on the device of ``like``."""
        num_values, num_sites = sites_of(support, event_shape) or (0, 0)
        values = values_of(support)
        values = None if values is None else values.to(like)
        return cls(values, num_values, num_sites, event_shape)

    def encode(self, x: Tensor) -> Tensor:
        """Turn points ``(*rows, *event)`` into whole numbers ``(*rows, sites)``."""
        rows = x.shape[: x.dim() - len(self.event_shape)]
        if self.values is None:
            return x.argmax(-1).reshape(*rows, -1)
        return (x.unsqueeze(-1) == self.values).long().argmax(-1).reshape(*rows, -1)

    def decode(self, state: Tensor, like: Tensor) -> Tensor:
        """Turn whole numbers into points of the type of ``like``."""
        shape = state.shape[:-1] + self.event_shape
        if self.values is None:
            return one_hot(state, self.num_values).to(like).reshape(shape)
        return self.values[state].reshape(shape)


def enumerate_states(
    energy: Energy, support: Constraint, event_shape: torch.Size, like: Tensor
) -> tuple[Tensor, Tensor, int]:
    """Return the states of least energy, in the shape of ``like``, their energies, and the count.

    Raises:
        ValueError: If an energy is NaN or minus infinity, or no state of a row has a finite one.
    """
    states = states_of(support, event_shape).to(like)
    rows = like.shape[: like.dim() - len(event_shape)]
    ones, parts = (1,) * len(rows), []
    for part in states.split(max(1, CHUNK // max(1, rows.numel()))):
        value = energy(part.reshape(len(part), *ones, *event_shape))
        _refuse_nan(value)
        refuse_bottomless(value)
        low, i = value.min(0)
        parts.append((low, part[i]))
    lows, points = map(torch.stack, zip(*parts, strict=True))
    least, i = lows.min(0)
    if (least == torch.inf).any():
        raise ValueError(
            f"energy must be finite at some state, got inf at all {len(states)} states of "
            f"{int((least == torch.inf).sum())} of {least.numel()} searches"
        )
    index = expand_like(i, points[0]).expand_as(points[0])
    x = points.gather(0, index.unsqueeze(0)).squeeze(0)
    return x.expand(rows + event_shape), least.expand(rows), len(states)


def _refuse_nan(value: Tensor) -> None:
    if value.isnan().any():
        raise ValueError(
            f"energy must be a number at every state, got NaN at {int(value.isnan().sum())} of "
            f"{value.numel()}"
        )


def coordinate_descent(energy: Energy, state: Tensor, num_values: int, num_steps: int) -> Found:
    """Set one component after the other to its best value, until a sweep changes none.

    Args:
        energy: Maps whole numbers ``(*rows, sites)`` to energies ``(*rows,)``.
        state: The starts, ``(*rows, sites)``.
        num_values: How many values a component has.
        num_steps: The most sweeps.
    """
    least, state = energy(state), state.clone()
    values = torch.arange(num_values, device=state.device).reshape(-1, *[1] * (state.dim() - 1))
    done, interrupted = torch.zeros_like(least, dtype=torch.bool), False
    steps = torch.zeros_like(done, dtype=torch.long)
    try:
        while not done.all() and num_steps > 0:
            steps, num_steps = steps + ~done, num_steps - 1
            before = least
            for i in range(state.shape[-1]):
                trial = state.expand(num_values, *state.shape).clone()
                trial[..., i] = values
                value = energy(trial)  # shape: (K, *rows)
                refuse_bottomless(value)
                low, at = torch.where(value.isnan(), torch.inf, value).min(0)
                better = low < least
                state[..., i] = torch.where(better, at, state[..., i])
                least = torch.where(better, low, least)
            done = done | (least == before)
    except KeyboardInterrupt:
        done, interrupted = torch.zeros_like(done), True
    return Found(state, least, torch.zeros_like(least), done, steps, interrupted)
