"""Langevin kernels: uncorrected (ULA, SGLD) and Metropolis-corrected (MALA, underdamped)."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_ebm.energy import Energy, value_and_grad
from pyro_ebm.kernels.base import (
    Kernel,
    MoveInfo,
    State,
    check_positive,
    choose,
    expand_like,
    impossible,
    metropolis,
    start,
    sum_event,
)


class LangevinInfo(NamedTuple):
    r"""The record of an uncorrected Langevin move, each of shape ``(*chains,)``.

    ``energy``, ``accept_prob``, ``accepted`` and ``invalid`` are as in
    :class:`~pyro_ebm.kernels.MoveInfo`: a move is made unless it leads to an energy that is not
    finite. ``temperature`` is the effective temperature :math:`\sigma^2 / (2 \epsilon)` of a
    step :math:`\epsilon` with noise :math:`\sigma`: as the step tends to 0, the chain samples
    from :math:`\exp(-U / T)`.
    """

    energy: Tensor
    accept_prob: Tensor
    accepted: Tensor
    invalid: Tensor
    temperature: Tensor


class PhaseState(NamedTuple):
    """Chains with a ``momentum``, of the shape of the ``position``.

    ``energy`` ``(*chains,)`` is the potential and ``grad`` its gradient, both without the
    kinetic energy.
    """

    position: Tensor
    energy: Tensor
    grad: Tensor
    momentum: Tensor


def _per_chain(value: float | Tensor, energy: Tensor) -> Tensor:
    """Return a number as such, which broadcasts fastest, or else one per chain."""
    value = torch.as_tensor(value, dtype=energy.dtype, device=energy.device)
    return value.expand(energy.shape) if value.dim() else value


def _propose(energy: Energy, state: State, wide: Tensor, sigma: Tensor, noise: Tensor) -> State:
    """Return the Euler step of the Langevin equation; ``wide`` are steps per component.

    Gradients at walls are not set to zero, as by :func:`start`: no chain moves there.
    """
    x = torch.addcmul(state.position, wide, state.grad, value=-1.0).addcmul_(sigma, noise)
    value, grad = value_and_grad(energy, x)
    return State(x, value, grad.nan_to_num(0.0, 0.0, 0.0))


def _clipped(state: State, size: Tensor, max_drift: float) -> State:
    """Shorten gradients whose drift, ``size`` times their norm, is longer than ``max_drift``."""
    norm = sum_event(state.grad.square(), state.energy).sqrt()
    factor = (max_drift / (size * norm)).clamp(max=1.0)
    return state._replace(grad=state.grad * expand_like(factor, state.grad))


def ula(
    energy: Energy,
    step_size: float | Tensor,
    noise_scale: float | Tensor | None = None,
    *,
    max_drift: float | None = None,
) -> Kernel:
    r"""The unadjusted Langevin algorithm.

    .. math:: x' = x - \epsilon \nabla U(x) + \sigma \xi, \quad \xi \sim N(0, I)

    It does not leave the law invariant: on :math:`U = k x^2 / 2` its stationary variance is
    :math:`T / (k (1 - \epsilon k / 2))` at the temperature :math:`T = \sigma^2 / (2 \epsilon)`,
    which is 1 by default. Moves to NaN or infinite energies are not made.

    Args:
        energy: The potential :math:`U`, ``(*chains, *event)`` to ``(*chains,)``.
        step_size: The step :math:`\epsilon`: a number, or one per chain.
        noise_scale: The noise :math:`\sigma`: a number, or one per chain; by default
            :math:`\sqrt{2 \epsilon}`. The short runs of deep energy-based models take it far
            below, which is a low temperature and not the law of the energy.
        max_drift: The length at which :math:`\epsilon \nabla U(x)` is cut. It keeps chains of a
            steep energy from overshooting, and costs the law: in one dimension, as the step
            tends to 0, it is that of the energy with no slope above ``max_drift`` over the step.

    Returns:
        The kernel; its records are :class:`~pyro_ebm.kernels.LangevinInfo` and report the
        temperature.

    Raises:
        ValueError: If ``step_size``, ``noise_scale`` or ``max_drift`` is not positive and finite.

    References:
        | Exponential Convergence of Langevin Distributions (Roberts and Tweedie, 1996)
        | https://doi.org/10.2307/3318418

    Example:
        >>> kernel = ula(lambda x: 0.5 * x.square().sum(-1), 0.5, noise_scale=0.1)
        >>> state, info = kernel.step(kernel.init(torch.zeros(3, 2)))
        >>> info.temperature
        tensor([0.0100, 0.0100, 0.0100])
    """
    check_positive("step_size", step_size)
    if noise_scale is not None:
        check_positive("noise_scale", noise_scale)
    if max_drift is not None:
        check_positive("max_drift", max_drift)

    def step(state: State) -> tuple[State, LangevinInfo]:
        like = state.energy
        size = _per_chain(step_size, like)
        sigma = (2 * size).sqrt() if noise_scale is None else _per_chain(noise_scale, like)
        own = torch.ones_like(size) if noise_scale is None else sigma**2 / (2 * size)
        temperature = own.expand(like.shape)
        wide, sigma = expand_like(size, state.position), expand_like(sigma, state.position)
        drift = state if max_drift is None else _clipped(state, size, max_drift)
        new = _propose(energy, drift, wide, sigma, torch.randn_like(state.position))
        moved = new.energy.isfinite()
        kept = choose(moved, new, state)
        made = moved.to(kept.energy.dtype)
        return kept, LangevinInfo(kept.energy, made, moved, impossible(new.energy), temperature)

    return Kernel(functools.partial(start, energy), step)


def sgld(
    energy: Energy,
    data: Tensor,
    batch_size: int,
    step_size: float | Tensor,
    noise_scale: float | Tensor | None = None,
) -> Kernel:
    r"""Stochastic-gradient Langevin dynamics: :func:`ula` on fresh mini-batches.

    .. math::
        U_B(x) = U_0(x) + \frac{N}{n} \sum_{i \in B} u(x, y_i), \quad
        x' = x - \epsilon \nabla U_B(x) + \sigma \xi

    A batch :math:`B` of n of the N rows is drawn without replacement for each step, by torch's
    generator; all chains see the same one. ``energy`` does the scaling :math:`N / n` itself, so
    that it is right on average. To ULA's bias the noise of the batch adds one of order
    :math:`\epsilon`; the temperature reported leaves that noise out.

    Args:
        energy: The potential :math:`U_B`: points ``(*chains, *event)`` and a batch
            ``(n, *datum)`` to ``(*chains,)``.
        data: The data, of shape ``(N, *datum)``.
        batch_size: The size n of a batch, from 1 to N.
        step_size: The step :math:`\epsilon`: a number, or one per chain.
        noise_scale: The noise :math:`\sigma`; by default :math:`\sqrt{2 \epsilon}`.

    Returns:
        The kernel; its states' energies are those of the batch that is next.

    Raises:
        ValueError: If ``batch_size`` is not a whole number from 1 to N, or ``step_size`` or
            ``noise_scale`` is not positive and finite.

    References:
        | Bayesian Learning via Stochastic Gradient Langevin Dynamics (Welling and Teh, 2011)
        | https://icml.cc/2011/papers/398_icmlpaper.pdf

    Example:
        >>> data = 2.0 + torch.randn(100)
        >>> def energy(x, batch):  # of a mean, with a flat prior
        ...     return 100 / len(batch) * 0.5 * (x - batch).square().sum(-1)
        >>> kernel = sgld(energy, data, 10, 1e-3)
        >>> state, info = kernel.step(kernel.init(torch.zeros(4, 1)))
        >>> state.position.shape
        torch.Size([4, 1])
    """
    whole = isinstance(batch_size, int) and not isinstance(batch_size, bool)
    if not (whole and 1 <= batch_size <= len(data)):
        raise ValueError(
            f"batch_size must be a whole number from 1 to the {len(data)} rows of data, "
            f"got {batch_size}"
        )

    def on_a_batch(x: Tensor) -> Tensor:
        rows = torch.randperm(len(data), device=data.device)[:batch_size]
        return energy(x, data[rows])

    return ula(on_a_batch, step_size, noise_scale)


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
    check_positive("step_size", step_size)

    def step(state: State) -> tuple[State, MoveInfo]:
        size, noise = _per_chain(step_size, state.energy), torch.randn_like(state.position)
        sigma = (2 * size).sqrt()
        wide = expand_like(sigma, noise)
        new = _propose(energy, state, expand_like(size, noise), wide, noise)
        # It is a leapfrog step of length sigma: the noise is the momentum, this its change.
        kick = state.grad + new.grad  # times sigma / 2
        lost = sum_event(noise.addcmul_(wide, kick, value=-0.25).mul_(kick), state.energy)
        return metropolis(state, new, lost * (0.5 * sigma))

    return Kernel(functools.partial(start, energy), step)


def underdamped(
    energy: Energy, step_size: float | Tensor, friction: float | Tensor = 1.0
) -> Kernel:
    r"""Underdamped Langevin dynamics, exact: generalised Hamiltonian Monte Carlo.

    .. math:: p \leftarrow c \, p + \sqrt{1 - c^2} \, \xi, \quad c = e^{-\gamma h / 2}

    One step refreshes the momentum in part, makes one leapfrog step of length h, which
    Metropolis accepts or rejects, and refreshes the momentum once more (OBABO). A rejection turns
    the momentum round. Momenta are standard normal. At high friction it is :func:`mala` with the
    step :math:`\epsilon = h^2 / 2`.

    Args:
        energy: The potential :math:`U`, ``(*chains, *event)`` to ``(*chains,)``.
        step_size: The leapfrog step h: a number, or one per chain.
        friction: The friction :math:`\gamma`: a number, or one per chain.

    Returns:
        The kernel; its states, :class:`~pyro_ebm.kernels.PhaseState`, carry the momentum.

    Raises:
        ValueError: If ``step_size`` or ``friction`` is not positive and finite.

    References:
        | A Generalized Guided Monte Carlo Algorithm (Horowitz, 1991)
        | https://doi.org/10.1016/0370-2693(91)90812-5
        | Accurate Sampling Using Langevin Dynamics (Bussi and Parrinello, 2007)
        | https://doi.org/10.1103/PhysRevE.75.056707

    Example:
        >>> kernel = underdamped(lambda x: 0.5 * x.square().sum(-1), 0.5)
        >>> state, info = kernel.step(kernel.init(torch.zeros(4, 2)))
        >>> state.momentum.shape
        torch.Size([4, 2])
    """
    check_positive("step_size", step_size)
    check_positive("friction", friction)

    def init(position: Tensor) -> PhaseState:
        return PhaseState(*start(energy, position), torch.randn_like(position))

    def refresh(momentum: Tensor, wide: Tensor, like: Tensor) -> Tensor:
        decay = expand_like(_per_chain(friction, like), momentum) * wide / 2
        noise = (-torch.expm1(-2 * decay)).sqrt() * torch.randn_like(momentum)
        return torch.exp(-decay) * momentum + noise

    def step(state: PhaseState) -> tuple[PhaseState, MoveInfo]:
        like = state.energy
        wide = expand_like(_per_chain(step_size, like), state.position)
        before = refresh(state.momentum, wide, like)
        half = before - 0.5 * wide * state.grad
        moved = start(energy, state.position + wide * half)
        after = half - 0.5 * wide * moved.grad
        kinetic = 0.5 * sum_event(before.square() - after.square(), like)
        turned = state._replace(momentum=-before)
        kept, info = metropolis(turned, PhaseState(*moved, after), kinetic)
        return kept._replace(momentum=refresh(kept.momentum, wide, like)), info

    return Kernel(init, step)
