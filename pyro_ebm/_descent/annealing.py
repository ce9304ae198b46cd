"""Annealing: chains at a rising inverse temperature."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_ebm._descent.base import refuse_bottomless
from pyro_ebm._short_run import adapt
from pyro_ebm.energy import Energy
from pyro_ebm.kernels import gibbs, mala
from pyro_ebm.kernels.base import expand_like

MOVES = 10  # at each inverse temperature


def anneal(
    energy: Energy, potential: Callable[[float], Energy], z: Tensor, betas: Sequence[float]
) -> tuple[Tensor, bool]:
    """Move a chain per row through rising inverse temperatures, by MALA with adapted steps.

    Args:
        energy: The energy that is to be low.
        potential: Gives the potential of the chains at an inverse temperature.
        z: The starts, ``(n, D)``.
        betas: The inverse temperatures.

    Returns:
        The lowest point that each row has met, and whether the user interrupted.
    """
    best = (z, energy(z))
    log_step = torch.full_like(best[1], -2.0)
    try:
        for beta in betas:
            state = mala(potential(beta), 1.0).init(z)
            for i in range(MOVES):
                state, info = mala(potential(beta), log_step.exp()).step(state)
                log_step = adapt(log_step, info.accept_prob, i)
                z = state.position
                best = lower(best, z, energy(z))
    except KeyboardInterrupt:
        return best[0], True
    return best[0], False


def anneal_states(
    energy: Energy, state: Tensor, num_values: int, betas: Sequence[float]
) -> tuple[Tensor, bool]:
    """Do the same with states of whole numbers ``(*rows, sites)``, by sweeps of Gibbs sampling."""
    best = (state, energy(state))
    values = torch.arange(num_values, device=state.device)
    try:
        for beta in betas:
            kernel = gibbs(lambda s, b=beta: b * energy(s), values, state.dim() - 1)
            moved: Any = kernel.step(kernel.init(state))[0]
            state = moved.position
            best = lower(best, state, moved.energy / beta)
    except KeyboardInterrupt:
        return best[0], True
    return best[0], False


def lower(best: tuple[Tensor, Tensor], x: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Keep the lower of two points of each row."""
    refuse_bottomless(value)
    less = value < best[1]
    return torch.where(expand_like(less, x), x, best[0]), torch.where(less, value, best[1])
