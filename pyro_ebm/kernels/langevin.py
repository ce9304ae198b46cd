"""Langevin kernels: uncorrected (ULA) and Metropolis-corrected (MALA)."""

from __future__ import annotations

import functools
from numbers import Real

import torch
from torch import Tensor

from pyro_ebm.energy import Energy
from pyro_ebm.kernels.base import (
    Kernel,
    MoveInfo,
    State,
    expand_like,
    metropolis,
    start,
    sum_event,
)


def _check_step(step_size: float | Tensor) -> None:
    if isinstance(step_size, Real) and not 0.0 < step_size < float("inf"):
        raise ValueError(f"step_size must be positive and finite, got {step_size}")


def _propose(energy: Energy, state: State, step_size: float | Tensor) -> tuple[State, Tensor]:
    """Return the Euler step of the Langevin equation, and the step per event."""
    step = torch.as_tensor(step_size, dtype=state.energy.dtype, device=state.energy.device)
    wide = expand_like(step.expand(state.energy.shape), state.position)
    noise = torch.randn_like(state.position)
    return start(energy, state.position - wide * state.grad + (2 * wide).sqrt() * noise), wide


def ula(energy: Energy, step_size: float | Tensor) -> Kernel:
    r"""The unadjusted Langevin algorithm.

    .. math:: x' = x - \epsilon \nabla U(x) + \sqrt{2 \epsilon} \, \xi, \quad \xi \sim N(0, I)

    It does not leave the law invariant: on :math:`U = k x^2 / 2` its stationary variance is
    :math:`1 / (k (1 - \epsilon k / 2))`. Moves to NaN or infinite energies are not made.

    Args:
        energy: The potential :math:`U`, ``(*chains, *event)`` to ``(*chains,)``.
        step_size: The step :math:`\epsilon`: a number, or one per chain.

    Returns:
        The kernel.

    Raises:
        ValueError: If ``step_size`` is not positive and finite.

    References:
        | Exponential Convergence of Langevin Distributions (Roberts and Tweedie, 1996)
        | https://doi.org/10.2307/3318418

    Example:
        >>> kernel = ula(lambda x: 0.5 * x.square().sum(-1), 0.1)
        >>> state, info = kernel.step(kernel.init(torch.zeros(4, 2)))
        >>> state.position.shape
        torch.Size([4, 2])
    """
    _check_step(step_size)

    def step(state: State) -> tuple[State, MoveInfo]:
        new, _ = _propose(energy, state, step_size)
        moved = new.energy.isfinite()
        parts = [torch.where(expand_like(moved, n), n, o) for n, o in zip(new, state, strict=True)]
        kept = State(*parts)
        invalid = new.energy.isnan() | (new.energy == -torch.inf)
        return kept, MoveInfo(kept.energy, moved.to(kept.energy.dtype), moved, invalid)

    return Kernel(functools.partial(start, energy), step)


def mala(energy: Energy, step_size: float | Tensor) -> Kernel:
    r"""The Metropolis-adjusted Langevin algorithm.

    The proposal is that of :func:`ula`; the acceptance step makes the law invariant.

    Args:
        energy: The potential :math:`U`, ``(*chains, *event)`` to ``(*chains,)``.
        step_size: The step :math:`\epsilon`: a number, or one per chain.

    Returns:
        The kernel.

    Raises:
        ValueError: If ``step_size`` is not positive and finite.

    References:
        | Exponential Convergence of Langevin Distributions (Roberts and Tweedie, 1996)
        | https://doi.org/10.2307/3318418

    Example:
        >>> kernel = mala(lambda x: 0.5 * x.square().sum(-1), 0.1)
        >>> state, info = kernel.step(kernel.init(torch.zeros(4, 2)))
        >>> info.accept_prob.shape
        torch.Size([4])
    """
    _check_step(step_size)

    def step(state: State) -> tuple[State, MoveInfo]:
        new, wide = _propose(energy, state, step_size)

        def log_forward(a: State, b: State) -> Tensor:
            drift = b.position - a.position + wide * a.grad
            return -sum_event(drift.square() / (4 * wide), state.energy)

        return metropolis(state, new, log_forward(new, state) - log_forward(state, new))

    return Kernel(functools.partial(start, energy), step)
