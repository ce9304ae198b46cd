"""Kernels on finite supports whose proposals follow the gradient."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, pad

from pyro_ebm._sites import check_sites, check_values, codes_of, draw, flat_sites, flip, moved_on
from pyro_ebm.energy import Energy, value_and_grad
from pyro_ebm.kernels.base import (
    Kernel,
    MoveInfo,
    State,
    check_count,
    check_positive,
    expand_like,
    metropolis,
    placed,
)

BALANCES: dict[str, Callable[[Tensor], Tensor]] = {
    "sqrt": lambda log_ratio: 0.5 * log_ratio,
    "barker": logsigmoid,
}
r"""The logs of Zanella's functions with :math:`g(t) = t \, g(1/t)`, of :math:`\log t`."""


def gibbs_with_gradients(
    energy: Energy, values: Tensor, *, num_flips: int = 1, balance: str = "sqrt"
) -> Kernel:
    r"""Gibbs with gradients: change the components that the gradient says will move.

    .. math:: q(x' \mid x) \propto g(e^{-\nabla U(x)^\top (x' - x)})

    over the points that differ from x in one component; Metropolis corrects for what the first
    order misses. With more flips it is the path-auxiliary sampler: r components one after the
    other, none twice, with weights from the gradient at x. The number r is uniform from 1 to
    ``2 * num_flips - 1``, anew for each chain and step. A step costs one gradient.

    The energy must take points between the values, though only those at the values count. Points
    of whole numbers are handed to it in torch's default floating-point type.

    Args:
        energy: The potential :math:`U`, ``(*chains, *event)`` to ``(*chains,)``, differentiable.
        values: The values that each component can take: ``(K,)``, or ``(K, *atom)`` where
            components are vectors, such as ``torch.eye(K)`` for one-hot points ``(n, K)``.
        num_flips: The mean number of components that are changed.
        balance: The function g: ``"sqrt"``, or ``"barker"`` for :math:`t / (1 + t)`, which is
            bolder about flips downhill.

    Returns:
        The kernel.

    Raises:
        TypeError: If ``values`` is not a tensor.
        ValueError: If there are less than two values, ``num_flips`` is no whole number from 1 on
            or ``balance`` is unknown; from ``init``, if a component has none of the values.

    References:
        | Oops I Took a Gradient: Scalable Sampling for Discrete Distributions (Grathwohl, Swersky,
          Hashemi, Duvenaud, Maddison, 2021)
        | https://arxiv.org/abs/2102.04509
        | Path Auxiliary Proposal for MCMC in Discrete Space (Sun, Dai, Xia, Ramamurthy, 2022)
        | https://openreview.net/forum?id=JSR-YDImK95
        | Informed Proposals for Local MCMC in Discrete Spaces (Zanella, 2020)
        | https://arxiv.org/abs/1711.07424

    Example:
        >>> kernel = gibbs_with_gradients(ebm.zoo.Ising(9), torch.tensor([0.0, 1.0]), num_flips=3)
        >>> state, info = kernel.step(kernel.init(torch.zeros(5, 9)))
        >>> info.accept_prob
        tensor([1., 1., 1., 1., 1.])
    """
    check_values(values)
    check_count("num_flips", num_flips, 1)
    log_g = _log_balance(balance)

    def step(state: State) -> tuple[State, MoveInfo]:
        flat = flat_sites(state.position, values, state.energy.dim())
        scores = log_g(_gains(state, values))  # shape: (*chains, n, K - 1)
        at, used = _path(scores, min(2 * num_flips - 1, scores.shape[-2]))
        code = _value(scores, at)
        new = flip(flat, values, at, (code + 1) * used)
        proposal = _start(energy, new.reshape(state.position.shape))
        back = log_g(_gains(proposal, values))
        # Back from the k-th next value in the cycle is forth by K - k.
        ratio = _log_path(back, at, len(values) - 2 - code, used)
        return metropolis(state, proposal, ratio - _log_path(scores, at, code, used))

    return Kernel(_init(energy, values), step)


def discrete_mala(
    energy: Energy, values: Tensor, step_size: float | Tensor, *, balance: str = "sqrt"
) -> Kernel:
    r"""The discrete Metropolis-adjusted Langevin algorithm: all components may move at once.

    .. math:: q(x' \mid x) = \prod_i q_i(x'_i \mid x), \quad q_i(v \mid x) \propto
        g(e^{-\nabla_i U(x)^\top (v - x_i)}) \exp\left(-\frac{\|v - x_i\|^2}{2 \epsilon}\right)

    With ``balance="sqrt"`` it is that of the paper. The smaller the step :math:`\epsilon`, the
    fewer components move; unlike a Langevin step it has no scale of its own, since the change of
    one component is at least that to the next value. A step costs one gradient.

    Args:
        energy: The potential :math:`U`, as in :func:`gibbs_with_gradients`.
        values: The values that each component can take, as there.
        step_size: The step :math:`\epsilon`: a number, or one per chain.
        balance: The function g, as there.

    Returns:
        The kernel.

    Raises:
        TypeError: If ``values`` is not a tensor.
        ValueError: If there are less than two values, ``step_size`` is not positive and finite or
            ``balance`` is unknown; from ``init``, if a component has none of the values.

    References:
        | A Langevin-like Sampler for Discrete Distributions (Zhang, Liu, Liu, 2022)
        | https://arxiv.org/abs/2206.09914

    Example:
        >>> kernel = discrete_mala(ebm.zoo.Ising(9), torch.tensor([0.0, 1.0]), 0.2)
        >>> state, info = kernel.step(kernel.init(torch.zeros(5, 9)))
        >>> info.accept_prob
        tensor([1., 1., 1., 1., 1.])
    """
    check_values(values)
    check_positive("step_size", step_size)
    log_g, num = _log_balance(balance), len(values)

    def table(state: State) -> Tensor:
        """Return the logits of the moves by 1 to K - 1 values, that of staying being zero."""
        gain = _gains(state, values)
        step = torch.as_tensor(step_size, dtype=gain.dtype, device=gain.device)
        step = expand_like(step.expand(state.energy.shape), gain)
        distance = _distances(state, values).to(gain)
        return log_g(gain) - log_g(gain.new_zeros(())) - distance / (2 * step)

    def step(state: State) -> tuple[State, MoveInfo]:
        logits = table(state)
        shift = _shift(logits)
        sites = flat_sites(state.position, values, state.energy.dim())
        new = values[moved_on(codes_of(sites, values), shift, num)].to(sites)
        proposal = _start(energy, new.reshape(state.position.shape))
        back = shift if num == 2 else -shift % num
        ratio = _log_shift(table(proposal), back) - _log_shift(logits, shift)
        return metropolis(state, proposal, ratio.sum(-1))

    return Kernel(_init(energy, values), step)


def _start(energy: Energy, position: Tensor) -> State:
    x = position if position.is_floating_point() else position.to(torch.get_default_dtype())
    return placed(position.detach(), *value_and_grad(energy, x))


def _init(energy: Energy, values: Tensor) -> Callable[[Tensor], State]:
    def init(position: Tensor) -> State:
        state = _start(energy, position)
        check_sites(flat_sites(position, values, state.energy.dim()), values)
        return state

    return init


def _log_balance(balance: str) -> Callable[[Tensor], Tensor]:
    if balance not in BALANCES:
        raise ValueError(f"balance must be one of {', '.join(BALANCES)}, got {balance!r}")
    return BALANCES[balance]


def _gains(state: State, values: Tensor) -> Tensor:
    """Return by how much the energy falls, to first order, when one component moves on.

    The last dimension is by how many places it moves in the cycle of the values, from 1 on:
    ``(*chains, n, K - 1)``.
    """
    dim = state.energy.dim()
    sites, grad = (flat_sites(x, values, dim) for x in (state.position, state.grad))
    if values.dim() == 1 and len(values) == 2:
        return (grad * (2 * sites - values.sum())).unsqueeze(-1)
    if values.dim() == 1:
        slope = -grad.unsqueeze(-1) * values
    else:
        slope = -grad.flatten(dim + 1) @ values.to(grad).flatten(1).T
    code = codes_of(sites, values).unsqueeze(-1)
    shift = torch.arange(1, len(values), device=code.device)
    return slope.gather(-1, (code + shift) % len(values)) - slope.gather(-1, code)


def _distances(state: State, values: Tensor) -> Tensor:
    """Return the squared distances of the same moves."""
    num = len(values)
    points = values.reshape(num, -1)
    shift = torch.arange(1, num, device=values.device)
    ends = points[(torch.arange(num, device=values.device)[:, None] + shift) % num]
    table = (ends - points[:, None]).square().sum(-1)  # shape: (K, K - 1)
    if num == 2:
        return table[0]
    return table[codes_of(flat_sites(state.position, values, state.energy.dim()), values)]


def _shift(logits: Tensor) -> Tensor:
    """Draw by how many values each component moves, from logits ``(*chains, n, K - 1)``."""
    if logits.shape[-1] == 1:
        return (torch.rand_like(logits) < logits.sigmoid()).squeeze(-1).long()
    return draw(pad(logits, (1, 0)).softmax(-1))


def _log_shift(logits: Tensor, shift: Tensor) -> Tensor:
    """Return the log-probabilities of these moves."""
    if logits.shape[-1] == 1:  # as below, where a softmax over two is slow
        return logsigmoid(logits.squeeze(-1) * (2 * shift - 1))
    table = pad(logits, (1, 0)).log_softmax(-1)
    return table.gather(-1, shift.unsqueeze(-1)).squeeze(-1)


def _sites(scores: Tensor) -> Tensor:
    """Return the scores of components, whichever value they take, ``(*chains, n)``."""
    return scores.squeeze(-1) if scores.shape[-1] == 1 else scores.logsumexp(-1)


def _path(scores: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Draw components one by one, none twice: their numbers, and which of them are to move."""
    site = _sites(scores)
    if most == 1:
        at = draw(site.softmax(-1)).unsqueeze(-1)
        return at, torch.ones_like(at, dtype=torch.bool)
    gumbel = -(-torch.rand_like(site).log()).log()
    at = (site + gumbel).topk(most, -1).indices  # shape: (*chains, most)
    num = torch.randint(1, most + 1, (*at.shape[:-1], 1), device=at.device)
    return at, torch.arange(most, device=at.device) < num


def _value(scores: Tensor, at: Tensor) -> Tensor:
    """Draw by how many places less one those components move."""
    if scores.shape[-1] == 1:
        return torch.zeros_like(at)
    rows = scores.gather(-2, at.unsqueeze(-1).expand(*at.shape, scores.shape[-1]))
    return draw(rows.softmax(-1))


def _log_path(scores: Tensor, at: Tensor, code: Tensor, used: Tensor) -> Tensor:
    """Return the log-probability of a path of moves.

    Each move has its share of what is left: the weights of all components but those that moved
    before. The way back has the same order: that takes each path to one path, and back.
    """
    site, num = _sites(scores), scores.shape[-1]
    move = scores.flatten(-2).gather(-1, at * num + code)
    if at.shape[-1] == 1:
        return (move - site.logsumexp(-1, keepdim=True)).sum(-1)
    picked = site.gather(-1, at)
    own = torch.where(used, picked, -torch.inf)
    rest = site.scatter(-1, at, torch.where(used, -torch.inf, picked)).logsumexp(-1, keepdim=True)
    later = own.flip(-1).logcumsumexp(-1).flip(-1)
    return torch.where(used, move - torch.logaddexp(rest, later), 0.0).sum(-1)
