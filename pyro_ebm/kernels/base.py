"""Kernels are two pure functions on an immutable state; one acceptance step serves them all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_ebm.energy import Energy, value_and_grad


class Kernel(NamedTuple):
    """How to start a chain and how to move it.

    ``init`` maps positions ``(*chains, *event)`` to a state; ``step`` maps a state to the next
    state and to a record of the move. Neither changes its argument.
    """

    init: Callable[[Tensor], Any]
    step: Callable[[Any], tuple[Any, Any]]


class State(NamedTuple):
    """Chains: their ``position``, ``energy`` ``(*chains,)`` and ``grad`` of the energy."""

    position: Tensor
    energy: Tensor
    grad: Tensor


class MoveInfo(NamedTuple):
    """The record of a move, each of shape ``(*chains,)``.

    ``energy`` is that after the move, ``accept_prob`` the probability of taking the proposal and
    ``accepted`` whether it was. ``invalid`` marks proposals whose energy was NaN or minus
    infinity; they are rejected.
    """

    energy: Tensor
    accept_prob: Tensor
    accepted: Tensor
    invalid: Tensor


def start(energy: Energy, position: Tensor) -> State:
    """Evaluate chains at their positions.

    Where the energy is not finite the gradient is zero, so that a chain behind a wall can
    still propose a way out; the acceptance step stays exact.
    """
    value, grad = value_and_grad(energy, position)
    finite = expand_like(value.isfinite(), grad) & grad.isfinite()
    return State(position.detach(), value, torch.where(finite, grad, 0.0))


def expand_like(value: Tensor, x: Tensor) -> Tensor:
    """Give a number per chain the dimensions of the event of ``x``."""
    return value.reshape(value.shape + (1,) * (x.dim() - value.dim()))


def sum_event(x: Tensor, like: Tensor) -> Tensor:
    """Sum over the event: the dimensions beyond those of a number per chain."""
    return x.flatten(like.dim()).sum(-1) if x.dim() > like.dim() else x


def metropolis(old: State, new: State, log_proposal_ratio: Tensor) -> tuple[State, MoveInfo]:
    r"""Accept each chain's proposal with the probability that keeps the law invariant.

    .. math:: \min\left(1, \exp(U(x) - U(x')) \frac{q(x \mid x')}{q(x' \mid x)}\right)

    Energy differences enter, not energies. A proposal of infinite energy is an exact wall; one
    of NaN or minus infinity is rejected and marked ``invalid``.

    Args:
        old: The chains.
        new: Their proposals.
        log_proposal_ratio: The log of the proposal ratio, of shape ``(*chains,)``.

    Returns:
        The next state and the record of the move.

    References:
        | Monte Carlo Sampling Methods Using Markov Chains and Their Applications (Hastings, 1970)
        | https://doi.org/10.1093/biomet/57.1.97
    """
    invalid = new.energy.isnan() | (new.energy == -torch.inf)
    log_ratio = old.energy - new.energy + log_proposal_ratio
    possible = new.energy.isfinite() & ~log_ratio.isnan()
    accept_prob = torch.where(possible, log_ratio.clamp(max=0.0).exp(), 0.0)
    accepted = torch.rand_like(accept_prob) < accept_prob
    parts = [torch.where(expand_like(accepted, n), n, o) for n, o in zip(new, old, strict=True)]
    kept = State(*parts)
    return kept, MoveInfo(kept.energy, accept_prob, accepted, invalid)
