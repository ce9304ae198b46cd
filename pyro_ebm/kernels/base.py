"""Kernels are two pure functions on an immutable state; one acceptance step serves them all."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Real
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from pyro_ebm.energy import Energy, value_and_grad

S = TypeVar("S", bound=Any)  # a record of tensors, one of them the energy


MAX_ERROR = 1000.0
"""A trajectory whose energy is off by more than this diverges, as in Stan."""


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


class PointState(NamedTuple):
    """Chains without a gradient: their ``position`` and ``energy`` ``(*chains,)``."""

    position: Tensor
    energy: Tensor


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
    return placed(position.detach(), *value_and_grad(energy, position))


def placed(position: Tensor, value: Tensor, grad: Tensor) -> State:
    """Make the state that :func:`start` describes of energies and gradients."""
    wall = expand_like(value * 0.0, grad)  # NaN where the energy is not finite
    return State(position, value, (grad + wall).nan_to_num_(0.0, 0.0, 0.0))


def check_positive(name: str, value: float | Tensor) -> None:
    """Refuse what is not positive and finite: a number, or any element of a tensor.

    Tensors on an accelerator are not looked at, which would wait for it.
    """
    if isinstance(value, Tensor):
        fine = value.device.type != "cpu" or bool(((value > 0) & value.isfinite()).all())
    else:
        fine = not isinstance(value, Real) or 0.0 < value < float("inf")
    if not fine:
        raise ValueError(f"{name} must be positive and finite, got {value}")


def check_count(name: str, value: int, least: int, most: int | None = None) -> None:
    """Refuse what is no whole number of at least ``least`` (and at most ``most``)."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or value < least or (most is not None and value > most):
        rule = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"{name} must be a whole number {rule}, got {value}")


def check_share(name: str, value: float) -> None:
    """Refuse a number that is not from 0 to 1."""
    if not (isinstance(value, Real) and 0.0 <= value <= 1.0):
        raise ValueError(f"{name} must be between 0 and 1, got {value}")


def expand_like(value: Tensor, x: Tensor) -> Tensor:
    """Give a number per chain the dimensions of the event of ``x``."""
    return value.reshape(value.shape + (1,) * (x.dim() - value.dim()))


def sum_event(x: Tensor, like: Tensor) -> Tensor:
    """Sum over the event: the dimensions beyond those of a number per chain."""
    return x.flatten(like.dim()).sum(-1) if x.dim() > like.dim() else x


def impossible(energy: Tensor) -> Tensor:
    """Whether energies are NaN or minus infinity, which no density has."""
    return ~(energy > -torch.inf)


def accept(log_ratio: Tensor, invalid: Tensor, u: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the probabilities of acceptance, and draws: the one rule of all exact kernels.

    What is ``invalid``, and a ratio that is NaN, is rejected. ``u`` are uniform random numbers.
    """
    accept_prob = log_ratio.clamp(max=0.0).exp_().nan_to_num_(0.0).masked_fill_(invalid, 0.0)
    return accept_prob, (torch.rand_like(accept_prob) if u is None else u) < accept_prob


def choose(accepted: Tensor, new: S, old: S) -> S:
    """Take each chain from the new record where ``accepted``, and from the old one elsewhere."""
    parts = zip(new, old, strict=True)
    return old._make(torch.where(expand_like(accepted, n), n, o) for n, o in parts)


def metropolis(
    old: S, new: S, log_proposal_ratio: Tensor, u: Tensor | None = None
) -> tuple[S, MoveInfo]:
    r"""Accept each chain's proposal with the probability that keeps the law invariant.

    .. math:: \min\left(1, \exp(U(x) - U(x')) \frac{q(x \mid x')}{q(x' \mid x)}\right)

    Energy differences enter, not energies. A proposal of infinite energy is an exact wall; one
    of NaN or minus infinity is rejected and marked ``invalid``.

    Args:
        old: The chains: any record of tensors with an ``energy``. Where there is a momentum it is
            the one to go on with after a rejection.
        new: Their proposals.
        log_proposal_ratio: The log of the proposal ratio, of shape ``(*chains,)``.
        u: Uniform random numbers, ``(*chains,)``; by default drawn here.

    Returns:
        The next state and the record of the move.

    References:
        | Monte Carlo Sampling Methods Using Markov Chains and Their Applications (Hastings, 1970)
        | https://doi.org/10.1093/biomet/57.1.97
    """
    invalid = impossible(new.energy)
    accept_prob, accepted = accept(old.energy - new.energy + log_proposal_ratio, invalid, u)
    kept = choose(accepted, new, old)
    return kept, MoveInfo(kept.energy, accept_prob, accepted, invalid)


class Diagonal(NamedTuple):
    r"""A metric: momenta :math:`p \sim N(0, M)`, with the diagonal of :math:`M^{-1}`.

    ``inverse_mass`` broadcasts to the event; the variances of the target are a good choice.
    """

    inverse_mass: Tensor

    def momentum(self, like: Tensor) -> Tensor:
        """Draw momenta for positions."""
        return self.of_noise(torch.randn_like(like))

    def of_noise(self, noise: Tensor) -> Tensor:
        """Turn standard normal numbers into momenta."""
        return noise * self.inverse_mass.rsqrt()

    def velocity(self, p: Tensor) -> Tensor:
        """Return :math:`M^{-1} p`."""
        return self.inverse_mass * p


class Dense(NamedTuple):
    r"""A metric with all of :math:`M^{-1}`, ``(D, D)``, for events of shape ``(D,)``.

    Make it by :meth:`of`. ``inverse_mass`` is the matrix, ``inverse_factor`` the inverse of its
    lower Cholesky factor.
    """

    inverse_mass: Tensor
    inverse_factor: Tensor

    @classmethod
    def of(cls, inverse_mass: Tensor) -> Dense:
        """Make the metric of a positive definite matrix."""
        factor = torch.linalg.cholesky(inverse_mass)
        eye = torch.eye(len(factor), dtype=factor.dtype, device=factor.device)
        return cls(inverse_mass, torch.linalg.solve_triangular(factor, eye, upper=False))

    def momentum(self, like: Tensor) -> Tensor:
        """Draw momenta for positions."""
        return self.of_noise(torch.randn_like(like))

    def of_noise(self, noise: Tensor) -> Tensor:
        """Turn standard normal numbers into momenta."""
        return noise @ self.inverse_factor

    def velocity(self, p: Tensor) -> Tensor:
        """Return :math:`M^{-1} p`."""
        return p @ self.inverse_mass


Metric = Diagonal | Dense
ValueAndGrad = Callable[[Tensor], tuple[Tensor, Tensor]]


def kinetic(metric: Metric, p: Tensor, like: Tensor) -> Tensor:
    r"""Return the kinetic energies :math:`\tfrac{1}{2} p^\top M^{-1} p`, ``(*chains,)``."""
    return 0.5 * sum_event(p * metric.velocity(p), like)


def leapfrog(
    value_and_grad: ValueAndGrad,
    metric: Metric,
    phase: tuple[Tensor, Tensor, Tensor],
    step: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    r"""Make one leapfrog step of Hamilton's equations.

    .. math:: p_{1/2} = p - \tfrac{\epsilon}{2} \nabla U(q), \quad
        q' = q + \epsilon M^{-1} p_{1/2}, \quad
        p' = p_{1/2} - \tfrac{\epsilon}{2} \nabla U(q')

    Args:
        value_and_grad: Maps positions to potentials ``(*chains,)`` and gradients.
        metric: The metric :math:`M^{-1}`.
        phase: Position, momentum and gradient.
        step: The step :math:`\epsilon`, of the dimensions of the position.

    Returns:
        Position, momentum, gradient and potential.
    """
    q, p, grad = phase
    half = torch.addcmul(p, step, grad, value=-0.5)
    q = torch.addcmul(q, step, metric.velocity(half))
    energy, grad = value_and_grad(q)
    return q, torch.addcmul(half, step, grad, value=-0.5), grad, energy


def flattened(metric: Metric | None, x: Tensor) -> Metric:
    """Return a metric for flat positions ``(chains, D)``: by default the identity."""
    if isinstance(metric, Dense):
        return metric
    if metric is None:
        return Diagonal(torch.ones((), dtype=x.dtype, device=x.device))
    return Diagonal(metric.inverse_mass.flatten()) if metric.inverse_mass.dim() else metric


def jittered(step: Tensor, jitter: float, u: Tensor | None = None) -> Tensor:
    """Draw a step size per chain, uniform within a share ``jitter`` of ``step``.

    ``u`` are uniform random numbers, ``(*chains,)``; by default they are drawn here, if needed.
    """
    if u is None:
        if not jitter:
            return step
        u = torch.rand_like(step)
    return step * (1.0 + jitter * (2.0 * u - 1.0))
