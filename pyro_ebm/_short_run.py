"""Short adapted chains on the tensor level, and potentials without constraints."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributions.transforms import ComposeTransform, IndependentTransform, Transform

from pyro_ebm.energy import Energy, value_and_grad
from pyro_ebm.kernels.base import State, expand_like, sum_event
from pyro_ebm.kernels.langevin import mala

TARGET_ACCEPT = 0.574  # optimal scaling of MALA: Roberts and Rosenthal (1998)


def unconstrained(potential: Energy, transform: Transform, event_dim: int) -> Energy:
    r"""Pull a potential back through a bijection from unconstrained space.

    .. math:: U(z) = U_x(T(z)) - \log |\det \partial T / \partial z|
    """
    if is_identity(transform):
        return potential

    def pulled(z: Tensor) -> Tensor:
        x = transform(z)
        jacobian = transform.log_abs_det_jacobian(z, x)
        spare = jacobian.dim() - (x.dim() - event_dim)
        return potential(x) - (jacobian.flatten(-spare).sum(-1) if spare > 0 else jacobian)

    return pulled


def is_identity(transform: Transform) -> bool:
    """Whether a transform changes nothing, as that of the reals."""
    while isinstance(transform, IndependentTransform):
        transform = transform.base_transform
    return isinstance(transform, ComposeTransform) and not transform.parts


def adapt(log_step: Tensor, accept_prob: Tensor, i: int) -> Tensor:
    """Move log step sizes towards the best acceptance rate: Robbins-Monro, for move ``i``."""
    return log_step + 2.0 * (accept_prob - TARGET_ACCEPT) / (1.0 + i) ** 0.6


def first_step(energy: Energy, state: State) -> Tensor:
    r"""Return the logs of steps :math:`\lambda^{-1/2}`, from the curvature along the gradient.

    So steps shrink as :math:`1 / \sqrt\beta` from the first move on.
    """
    x, grad = state.position, state.grad
    norm = sum_event(grad.square(), state.energy).sqrt()
    scale = 1.0 + sum_event(x.square(), state.energy).sqrt()
    shift = torch.finfo(x.dtype).eps ** 0.5 * scale
    ahead = x + expand_like(shift / norm.clamp(min=torch.finfo(x.dtype).tiny), grad) * grad
    change = sum_event((value_and_grad(energy, ahead)[1] - grad).square(), state.energy).sqrt()
    log_step = -0.5 * (change / shift).log()
    return torch.where(log_step.isfinite(), log_step, 0.0)


def short_run(
    potential: Energy, fresh: Callable[[], Tensor], num_steps: int = 200, tries: int = 20
) -> Tensor:
    """Run one adapted chain per starting point and return where it ends.

    Each chain has a step size of its own, adapted in the first half of the moves and fixed in
    the second, so that chains are independent of each other.

    Args:
        potential: The potential, without constraints.
        fresh: Draws starting points ``(*chains, *event)``.
        num_steps: The number of MALA moves.
        tries: How often chains that start at an infinite or NaN energy are drawn anew.

    Raises:
        ValueError: If chains found no point of finite energy.
    """
    position = fresh()
    state = mala(potential, 1.0).init(position)
    for _ in range(tries):
        bad = ~state.energy.isfinite()
        if not bad.any():
            break
        wide = bad.reshape(bad.shape + (1,) * (position.dim() - bad.dim()))
        position = torch.where(wide, fresh(), position)
        state = mala(potential, 1.0).init(position)
    log_step = torch.full_like(state.energy, -2.0)
    for i in range(num_steps):
        state, info = mala(potential, log_step.exp()).step(state)
        if i < num_steps // 2:  # a chain that is still behind a wall reaches farther out
            better = adapt(log_step, info.accept_prob, i)
            log_step = torch.where(state.energy.isfinite(), better, log_step + 0.1)
    _refuse_bad(state)
    return state.position


def _refuse_bad(state: State) -> None:
    bad = ~state.energy.isfinite()
    if bad.any():
        value = state.energy[bad][0].item()
        raise ValueError(
            f"energy must be finite somewhere near the base's samples, got {value} at the end of "
            f"{int(bad.sum())} of {bad.numel()} chains; choose a base that covers the region of "
            "finite energy, or pass sampler="
        )
