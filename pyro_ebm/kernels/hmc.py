"""Hamiltonian Monte Carlo with jittered trajectories."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_ebm.energy import Energy, value_and_grad
from pyro_ebm.kernels.base import (
    MAX_ERROR,
    Diagonal,
    Kernel,
    Metric,
    State,
    ValueAndGrad,
    check_count,
    check_positive,
    check_share,
    expand_like,
    jittered,
    kinetic,
    metropolis,
    start,
)


class TrajectoryInfo(NamedTuple):
    """The record of a trajectory, each of shape ``(*chains,)`` unless said otherwise.

    ``energy``, ``accept_prob``, ``accepted`` and ``invalid`` are as in
    :class:`~pyro_ebm.kernels.MoveInfo`. ``hamiltonian`` is the total energy after the move,
    ``diverging`` whether the energy error exceeded 1000 nats or was NaN, ``num_steps`` the
    gradients spent, ``step_size`` the step used. ``proposal`` is the end of the trajectory and
    ``momentum`` its momentum, of the shape of the position. ``unbounded`` marks energies of minus
    infinity, which no density has.
    """

    energy: Tensor
    accept_prob: Tensor
    accepted: Tensor
    invalid: Tensor
    hamiltonian: Tensor
    diverging: Tensor
    num_steps: Tensor
    step_size: Tensor
    proposal: State
    momentum: Tensor
    unbounded: Tensor


Trajectory = Callable[
    [Metric, tuple[Tensor, Tensor, Tensor], Tensor, int], tuple[Tensor, Tensor, Tensor, Tensor]
]
"""``(metric, (q, p, grad), step, num_steps)`` to ``(q, p, grad, energy)`` at the end."""


def trajectory(gradient: ValueAndGrad) -> Trajectory:
    """Make leapfrog trajectories of a potential: half kicks in the middle are joined."""

    def integrate(
        metric: Metric, phase: tuple[Tensor, Tensor, Tensor], step: Tensor, num_steps: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        q, p, grad = phase
        p = torch.addcmul(p, step, grad, value=-0.5)
        diagonal = isinstance(metric, Diagonal)
        scale = step * metric.inverse_mass if diagonal else step
        for i in range(num_steps):
            q = torch.addcmul(q, scale, p if diagonal else metric.velocity(p))
            energy, grad = gradient(q)
            p = torch.addcmul(p, step, grad, value=-1.0 if i + 1 < num_steps else -0.5)
        return q, p, grad, energy

    return integrate


def hmc(
    energy: Energy,
    step_size: float | Tensor,
    num_steps: int,
    *,
    metric: Metric | None = None,
    jitter: float = 0.0,
    step_jitter: float = 0.0,
    integrate: Trajectory | None = None,
) -> Kernel:
    r"""Hamiltonian Monte Carlo.

    A fresh momentum :math:`p \sim N(0, M)`, a leapfrog trajectory of

    .. math:: H(q, p) = U(q) + \tfrac{1}{2} p^\top M^{-1} p ,

    and a Metropolis step on the error of :math:`H`. With one leapfrog step it is MALA.

    Args:
        energy: The potential :math:`U`, ``(*chains, *event)`` to ``(*chains,)``.
        step_size: The leapfrog step :math:`\epsilon`: a number, or one per chain.
        num_steps: The leapfrog steps of a trajectory, at least 1.
        metric: ``Diagonal(inverse_mass)`` or ``Dense.of(inverse_mass)``; by default the identity.
        jitter: The share, from 0 to 1, of the trajectory whose length is drawn anew at each
            move, for all chains alike: :math:`\lceil L (1 - j u) \rceil` steps, u uniform. It
            breaks periodic orbits.
        step_jitter: Each chain's step at each move is :math:`\epsilon (1 + j v)`, v uniform
            between -1 and 1, so that no chain freezes at a step that is too large for it.
        integrate: Replaces the leapfrog integrator; it must be reversible and keep volume.

    Returns:
        The kernel; its records are :class:`~pyro_ebm.kernels.TrajectoryInfo`.

    Raises:
        ValueError: If an argument is out of its range.

    References:
        | MCMC Using Hamiltonian Dynamics (Neal, 2011)
        | https://arxiv.org/abs/1206.1901

    Example:
        >>> kernel = hmc(lambda x: 0.5 * x.square().sum(-1), 0.3, 5)
        >>> state, info = kernel.step(kernel.init(torch.zeros(4, 2)))
        >>> info.num_steps
        tensor([5, 5, 5, 5])
    """
    check_positive("step_size", step_size)
    check_count("num_steps", num_steps, 1)
    check_share("jitter", jitter)
    check_share("step_jitter", step_jitter)
    follow = integrate or trajectory(functools.partial(value_and_grad, energy))

    def step(state: State) -> tuple[State, TrajectoryInfo]:
        like = state.energy
        shape = metric or Diagonal(torch.ones((), dtype=like.dtype, device=like.device))
        momentum = shape.momentum(state.position)
        size = torch.as_tensor(step_size, dtype=like.dtype, device=like.device).expand(like.shape)
        size = jittered(size, step_jitter)
        length = num_steps
        if jitter:
            length = max(1, math.ceil(num_steps * (1.0 - jitter * torch.rand(()).item())))
        wide = expand_like(size, state.position)
        q, p, grad, value = follow(shape, (state.position, momentum, state.grad), wide, length)
        return settle(shape, state, momentum, State(q, value, grad), p, (size, length))

    return Kernel(functools.partial(start, energy), step)


class Chance(NamedTuple):
    """The random numbers of a move.

    ``noise`` is standard normal, of the shape of the position, ``jitter`` and ``accept`` are
    uniform, ``(*chains,)``.
    """

    noise: Tensor
    jitter: Tensor
    accept: Tensor


def move(
    integrate: Callable[..., Any], metric: Metric, state: State, chance: Chance, setting: tuple
) -> tuple[State, TrajectoryInfo]:
    """Make one move of HMC of given random numbers: a function without randomness.

    Args:
        integrate: A :data:`Trajectory`.
        metric: The metric.
        state: The chains.
        chance: The random numbers.
        setting: Step size, step jitter and number of steps.
    """
    step_size, step_jitter, num = setting
    momentum = metric.of_noise(chance.noise)
    size = jittered(step_size, step_jitter, chance.jitter)
    phase = (state.position, momentum, state.grad)
    q, p, grad, value = integrate(metric, phase, expand_like(size, state.position), num)
    return settle(metric, state, momentum, State(q, value, grad), p, (size, num), chance.accept)


def settle(
    metric: Metric,
    old: State,
    momentum: Tensor,
    new: State,
    new_momentum: Tensor,
    spent: tuple[Tensor, int | Tensor],
    u: Tensor | None = None,
) -> tuple[State, TrajectoryInfo]:
    """Accept the ends of trajectories or not, and record the moves."""
    before = kinetic(metric, momentum, old.energy)
    after = kinetic(metric, new_momentum, old.energy)
    kept, info = metropolis(old, new, before - after, u)
    error = new.energy - old.energy + (after - before)
    record = TrajectoryInfo(
        *info,
        hamiltonian=kept.energy + torch.where(info.accepted, after, before),
        # An infinite wall rejects and is no fault of the integrator; infinite momenta are.
        diverging=(error > MAX_ERROR) & (new.energy.isfinite() | after.isinf()) | error.isnan(),
        num_steps=torch.zeros_like(old.energy, dtype=torch.long) + spent[1],
        step_size=spent[0],
        proposal=new,
        momentum=new_momentum,
        unbounded=new.energy == -torch.inf,
    )
    return kept, record
