"""The exchange algorithm: parameters of a density whose normaliser nobody knows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_ebm.energy import Energy
from pyro_ebm.kernels.base import (
    Diagonal,
    Kernel,
    Metric,
    accept,
    check_positive,
    check_share,
    choose,
    impossible,
    jittered,
)


class ExchangeState(NamedTuple):
    """Chains: ``position`` ``(C, D)`` and ``energy`` ``(C,)``, that of the joint without log Z."""

    position: Tensor
    energy: Tensor


class ExchangeInfo(NamedTuple):
    """The record of a move, each of shape ``(C,)``.

    ``energy``, ``accept_prob``, ``accepted`` and ``invalid`` are as in
    :class:`~pyro_ebm.kernels.MoveInfo`, the energy that of the joint, without log Z.
    ``step_size`` is the step used and ``unbounded`` marks energies of minus infinity.
    """

    energy: Tensor
    accept_prob: Tensor
    accepted: Tensor
    invalid: Tensor
    step_size: Tensor
    unbounded: Tensor


def exchange(
    joint: Energy,
    likelihood: Callable[[Tensor, Any], Tensor],
    sample: Callable[[Tensor], Any],
    step_size: float | Tensor,
    *,
    metric: Metric | None = None,
    step_jitter: float = 0.0,
) -> Kernel:
    r"""The exchange algorithm for a posterior with an unknown :math:`Z(\theta)`.

    .. math:: p(\theta \mid x) \propto \pi(\theta) \, \frac{f_\theta(x)}{Z(\theta)} , \quad
        \Pr(\theta \to \theta') = \min\left(1, \frac{\pi(\theta') f_{\theta'}(x)}
        {\pi(\theta) f_\theta(x)} \, \frac{f_\theta(w)}{f_{\theta'}(w)}\right) , \quad
        w \sim \frac{f_{\theta'}}{Z(\theta')}

    The proposal :math:`\theta'` is that of a random walk. Auxiliary data w, drawn anew from the
    density at the proposal, stand in for the ratio of the unknown normalisers: the posterior is
    invariant, exactly. Draws w that only approximate that density leave a bias.

    Args:
        joint: The potential :math:`-\log \pi(\theta) f_\theta(x)`, ``(C, D)`` to ``(C,)``.
        likelihood: Maps parameters and auxiliary data to :math:`-\log f_\theta(w)`, ``(C,)``.
        sample: Draws auxiliary data w, of any form, for the parameters ``(C, D)``: as many as
            there are data, a set of its own for each chain.
        step_size: The scale of the random walk: a number, or one per chain.
        metric: ``Diagonal(inverse_mass)`` or ``Dense.of(inverse_mass)``: steps have that
            covariance, times the square of the scale; by default the identity.
        step_jitter: The share by which each chain's scale is drawn anew at each move.

    Returns:
        The kernel, with :class:`~pyro_ebm.kernels.ExchangeState` and
        :class:`~pyro_ebm.kernels.ExchangeInfo`.

    Raises:
        ValueError: If an argument is out of its range.

    References:
        | MCMC for Doubly-Intractable Distributions (Murray, Ghahramani and MacKay, 2006)
        | https://arxiv.org/abs/1206.6848

    Example:
        >>> x = torch.tensor([0.5, -1.0, 2.0])           # N(0, 1 / k), and its precision k = e^z
        >>> likelihood = lambda z, w: 0.5 * z.exp()[..., 0] * w.square().sum(-1)
        >>> joint = lambda z: likelihood(z, x) + 0.5 * z.square().sum(-1)
        >>> sample = lambda z: (-0.5 * z).exp() * torch.randn(len(z), 3)
        >>> kernel = exchange(joint, likelihood, sample, 1.0)
        >>> state, info = kernel.step(kernel.init(torch.zeros(100, 1)))
        >>> state.position.shape, info.accept_prob.shape
        (torch.Size([100, 1]), torch.Size([100]))
    """
    check_positive("step_size", step_size)
    check_share("step_jitter", step_jitter)

    @torch.no_grad()
    def init(position: Tensor) -> ExchangeState:
        return ExchangeState(position.detach(), joint(position))

    @torch.no_grad()
    def step(state: ExchangeState) -> tuple[ExchangeState, ExchangeInfo]:
        like = state.energy
        size = torch.as_tensor(step_size, dtype=like.dtype, device=like.device).expand(like.shape)
        size = jittered(size, step_jitter)
        shape = metric or Diagonal(torch.ones((), dtype=like.dtype, device=like.device))
        noise = shape.velocity(shape.of_noise(torch.randn_like(state.position)))
        new = init(state.position + size.unsqueeze(-1) * noise)
        # Behind a wall nothing can be drawn, and nothing is needed: that is rejected anyway.
        inside = new.energy.isfinite().unsqueeze(-1)
        there = torch.where(inside, new.position, state.position)
        auxiliary = sample(there)
        own, other = likelihood(there, auxiliary), likelihood(state.position, auxiliary)
        log_ratio = state.energy - new.energy + own - other
        invalid = impossible(new.energy) | ~own.isfinite() | impossible(other)
        accept_prob, accepted = accept(log_ratio, invalid)
        kept = choose(accepted, new, state)
        pit = new.energy == -torch.inf
        return kept, ExchangeInfo(kept.energy, accept_prob, accepted, invalid, size, pit)

    return Kernel(init, step)
