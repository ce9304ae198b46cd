"""Losses on discrete points: the energy of data against that of their neighbours."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pyro_ebm._sites import check_values
from pyro_ebm.energy import Energy, describe, differentiable
from pyro_ebm.losses.base import differentiate, energies, mean_of


def pseudo_likelihood(
    energy: Energy,
    x: Tensor,
    values: Tensor | None = None,
    *,
    log_weight: Tensor | None = None,
    affine: bool = False,
    chunk_size: int | None = None,
) -> Tensor:
    r"""Make each component of the data likely, given the others.

    .. math:: \mathcal{L} = \mathbb{E}_{x}\Big[\sum_{i=1}^{d} -\log p(x_i \mid x_{-i})\Big]
        = \mathbb{E}_{x}\Big[\sum_i \log \sum_{v} e^{E(x) - E(x_{i \to v})}\Big]

    It needs no samples. It costs :math:`d (K - 1) + 1` energies a point, where a component takes
    K values, or two energies and a gradient where the energy is ``affine``. A constant in the
    energy cancels, and the least expected loss is at the truth. Its value is a negative
    log-likelihood only where the components are independent.

    Args:
        energy: Maps points ``(*batch, *event)`` to energies ``(*batch,)``.
        x: Data, of shape ``(*n, *event)``.
        values: The values of a component, ``(K,)``; zero and one if None. Of one-hot components,
            vectors at the end of the event, they are the rows of ``torch.eye(K)``. A point with
            another value gives NaN.
        log_weight: The logs of the weights of the data, ``(*n,)``, up to a constant; equal ones
            if None.
        affine: Whether the energy is affine in each component, the others fixed: as that of an
            Ising or a Potts model, and as the free energy of an RBM is not. It is checked in one
            component of each point, which waits for the device.
        chunk_size: The number of components that are changed at once; all if None. The memory is
            that of one chunk, also in the backward pass, which evaluates the energies once more.

    Returns:
        A scalar.

    Raises:
        TypeError: If ``values`` is not a tensor.
        ValueError: If there are no points, ``values`` are less than two or not of the shape of a
            component, an energy or weight is not one per point, or the energy is not affine where
            it should be.

    References:
        | Statistical Analysis of Non-Lattice Data (Besag, 1975)
        | https://doi.org/10.2307/2987782

    Example:
        >>> b = torch.tensor([1.0, -1.0], requires_grad=True)
        >>> pseudo_likelihood(lambda x: -x @ b, torch.tensor([[1.0, 0.0], [1.0, 1.0]]))
        tensor(1.1265, grad_fn=<MeanBackward0>)
    """
    rise = _rises(energy, x, values, affine=affine, chunk_size=chunk_size)
    # With the point itself the sum is never empty, even where all its neighbours are walls.
    logits = torch.cat([torch.zeros_like(rise[:, :1]), -rise], 1)
    return mean_of(energy, logits.logsumexp(1).sum(0), log_weight)


def ratio_matching(
    energy: Energy,
    x: Tensor,
    values: Tensor | None = None,
    *,
    cycle: bool = False,
    log_weight: Tensor | None = None,
    affine: bool = False,
    chunk_size: int | None = None,
) -> Tensor:
    r"""Match the ratios of the probabilities of neighbours to those of the data.

    .. math:: \mathcal{L} = \mathbb{E}_{x}\Big[\sum_{x'} g\Big(\frac{p(x)}{p(x')}\Big)^2\Big] ,
        \quad g(u) = \frac{1}{1 + u} , \quad \frac{p(x)}{p(x')} = e^{E(x') - E(x)}

    The neighbours :math:`x'` differ in one component; for units of two values that is
    Hyvarinen's loss. It is bounded: a neighbour far below the point adds one and hardly a
    gradient. No samples, the cost of :func:`pseudo_likelihood`, invariant to a constant in the
    energy, and least at the truth.

    Args:
        energy: Maps points ``(*batch, *event)`` to energies ``(*batch,)``.
        x: Data, of shape ``(*n, *event)``.
        values: The values of a component, as in :func:`pseudo_likelihood`.
        cycle: Whether only the next and the previous of the ``values`` are neighbours, the last
            and the first among them, which takes :math:`2 d + 1` energies a point.
        log_weight: The logs of the weights of the data, ``(*n,)``; equal ones if None.
        affine: Whether the energy is affine in each component, as in :func:`pseudo_likelihood`.
        chunk_size: The number of components that are changed at once; all if None.

    Returns:
        A scalar.

    Raises:
        ValueError: As in :func:`pseudo_likelihood`.

    References:
        | Some Extensions of Score Matching (Hyvarinen, 2007)
        | https://doi.org/10.1016/j.csda.2006.09.003

    Example:
        >>> b = torch.tensor([1.0, -1.0], requires_grad=True)
        >>> ratio_matching(lambda x: -x @ b, torch.tensor([[1.0, 0.0], [1.0, 1.0]]))
        tensor(0.3757, grad_fn=<MeanBackward0>)
    """
    rise = _rises(energy, x, values, cycle=cycle, affine=affine, chunk_size=chunk_size)
    return mean_of(energy, torch.sigmoid(-rise).square().sum((0, 1)), log_weight)


def minimum_probability_flow(
    energy: Energy,
    x: Tensor,
    values: Tensor | None = None,
    *,
    cycle: bool = False,
    log_weight: Tensor | None = None,
    affine: bool = False,
    chunk_size: int | None = None,
) -> Tensor:
    r"""Keep probability from flowing from the data to their neighbours.

    .. math:: \mathcal{L} = \mathbb{E}_{x}\Big[\sum_{x'} e^{(E(x) - E(x')) / 2}\Big]

    The rate, per unit of time, at which dynamics that obey detailed balance would carry the data
    away, over neighbours :math:`x'` that differ in one component. All of them count, data or
    not, as many data need it: then the least expected loss is at the truth. A neighbour far below
    the point counts exponentially. No samples, the cost of :func:`pseudo_likelihood`, invariant
    to a constant in the energy.

    Args:
        energy: Maps points ``(*batch, *event)`` to energies ``(*batch,)``.
        x: Data, of shape ``(*n, *event)``.
        values: The values of a component, as in :func:`pseudo_likelihood`.
        cycle: Whether only the next and the previous value are neighbours, as in
            :func:`ratio_matching`.
        log_weight: The logs of the weights of the data, ``(*n,)``; equal ones if None.
        affine: Whether the energy is affine in each component, as in :func:`pseudo_likelihood`.
        chunk_size: The number of components that are changed at once; all if None.

    Returns:
        A scalar.

    Raises:
        ValueError: As in :func:`pseudo_likelihood`.

    References:
        | New Method for Parameter Estimation in Probabilistic Models: Minimum Probability Flow
          (Sohl-Dickstein, Battaglino and DeWeese, 2011)
        | https://doi.org/10.1103/PhysRevLett.107.220601

    Example:
        >>> b = torch.tensor([1.0, -1.0], requires_grad=True)
        >>> minimum_probability_flow(lambda x: -x @ b, torch.tensor([[1.0, 0.0], [1.0, 1.0]]))
        tensor(1.7342, grad_fn=<MeanBackward0>)
    """
    rise = _rises(energy, x, values, cycle=cycle, affine=affine, chunk_size=chunk_size)
    return mean_of(energy, (-0.5 * rise).exp().sum((0, 1)), log_weight)


def concrete_score_matching(
    energy: Energy,
    x: Tensor,
    values: Tensor | None = None,
    *,
    cycle: bool = False,
    log_weight: Tensor | None = None,
    affine: bool = False,
    chunk_size: int | None = None,
) -> Tensor:
    r"""Match the concrete score, the relative change of probability towards each neighbour.

    .. math:: \mathcal{L} = \mathbb{E}_{x}\Big[\sum_{x'} c(x, x')^2 + 2 c(x, x') - 2 c(x', x)
        \Big] , \quad c(x, x') = \frac{p(x')}{p(x)} - 1 = e^{E(x) - E(x')} - 1

    Up to a constant it is the expected squared error of the scores c. Each pair of neighbours is
    seen from both ends, which is why the change back, :math:`c(x', x)`, stands for the unknown
    score of the data. It weighs rare points and steep energies exponentially, and it has no least
    value where a neighbour is a wall of infinite energy: its variance is the largest of this
    family. No samples, the cost of :func:`pseudo_likelihood`, invariant to a constant in the
    energy, and least at the truth.

    Args:
        energy: Maps points ``(*batch, *event)`` to energies ``(*batch,)``.
        x: Data, of shape ``(*n, *event)``.
        values: The values of a component, as in :func:`pseudo_likelihood`.
        cycle: Whether only the next and the previous value are neighbours, as in
            :func:`ratio_matching`.
        log_weight: The logs of the weights of the data, ``(*n,)``; equal ones if None.
        affine: Whether the energy is affine in each component, as in :func:`pseudo_likelihood`.
        chunk_size: The number of components that are changed at once; all if None.

    Returns:
        A scalar.

    Raises:
        ValueError: As in :func:`pseudo_likelihood`.

    References:
        | Concrete Score Matching: Generalized Score Matching for Discrete Data (Meng, Choi, Song
          and Ermon, 2022)
        | https://arxiv.org/abs/2211.00802

    Example:
        >>> b = torch.tensor([0.5, 0.0, 0.0], requires_grad=True)
        >>> x = torch.tensor([[0], [0], [1], [2]])
        >>> concrete_score_matching(lambda x: -b[x].sum(-1), x, torch.arange(3))
        tensor(-0.6770, grad_fn=<MeanBackward0>)
    """
    rise = _rises(energy, x, values, cycle=cycle, affine=affine, chunk_size=chunk_size)
    return mean_of(energy, ((-2.0 * rise).exp() - 2.0 * rise.exp() + 1.0).sum((0, 1)), log_weight)


def _rises(
    energy: Energy,
    x: Tensor,
    values: Tensor | None,
    *,
    cycle: bool = False,
    affine: bool,
    chunk_size: int | None,
) -> Tensor:
    """Return the rises of energy from points to their neighbours, ``(d, m, *n)``.

    The m neighbours in each of the d components come in the order of ``values``, from the next
    one on. They are NaN in a component whose value is none of them.
    """
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be positive, got {chunk_size}")
    x = x.detach()
    values = torch.arange(2).to(x) if values is None else values
    check_values(values)
    if x.shape[x.dim() + 1 - values.dim() :] != values.shape[1:]:
        raise ValueError(
            f"x must end in the shape of one of the values, {tuple(values.shape[1:])}, got "
            f"{tuple(x.shape)}"
        )
    values = values.reshape(len(values), -1)  # shape: (K, p), a component has p numbers
    value, slope = _value_and_slope(energy, x) if affine else (energies(energy, x), None)
    sites = x.reshape(value.numel(), -1, values.shape[-1])  # shape: (n, d, p)
    others, known = _others(sites, values, cycle)
    if slope is None:
        rise = _neighbours(energy, x, sites, others, chunk_size) - value
    else:
        ways = others - sites.transpose(0, 1).unsqueeze(1)
        rise = (ways * slope.reshape(sites.shape).transpose(0, 1).unsqueeze(1)).sum(-1)
        rise = rise.reshape(*rise.shape[:2], *value.shape)
        _check_affine(energy, x, value, others[:, 0], rise[:, 0])
    hint = torch.where(known, 0.0, torch.nan).to(rise)
    return rise + hint.reshape(len(hint), 1, *value.shape)


def _others(sites: Tensor, values: Tensor, cycle: bool) -> tuple[Tensor, Tensor]:
    """Return the other values of components, ``(d, m, n, p)``, and whether theirs is known."""
    held = (sites.unsqueeze(-2) == values).all(-1)  # shape: (n, d, K)
    num, values = len(values), values.to(sites.dtype)
    if num == 2:  # as below, in a third of the time
        other = torch.where(held[..., :1], values[1], values[0])
        return other.transpose(0, 1).unsqueeze(1), held.any(-1).T
    steps = [1, num - 1] if cycle and num > 2 else list(range(1, num))
    index = held.long().argmax(-1).T.unsqueeze(1)
    index = index + torch.tensor(steps, device=index.device).unsqueeze(-1)
    return values[index % num], held.any(-1).T


def _neighbours(
    energy: Energy, x: Tensor, sites: Tensor, others: Tensor, chunk_size: int | None
) -> Tensor:
    """Return the energies of the neighbours, ``(d, m, *n)``, a chunk of components at a time."""
    num = len(others)

    def chunk(first: int, last: int) -> Tensor:
        each = torch.arange(last - first, device=x.device)
        moved = sites.repeat(last - first, others.shape[1], 1, 1, 1)
        moved[each, :, :, first + each] = others[first:last]
        value = energy(moved.reshape(*moved.shape[:2], *x.shape))
        if value.shape[:2] != moved.shape[:2] or value.numel() != moved.shape[:3].numel():
            raise ValueError(
                f"{describe(energy)} must return one energy per point, got {tuple(value.shape)} "
                f"for points of shape {(*moved.shape[:2], *x.shape)}"
            )
        return value

    if chunk_size is None or not torch.is_grad_enabled():
        size = chunk_size or num
        return torch.cat([chunk(i, min(i + size, num)) for i in range(0, num, size)])
    again: Any = {"use_reentrant": False}
    starts = range(0, num, chunk_size)
    return torch.cat([checkpoint(chunk, i, min(i + chunk_size, num), **again) for i in starts])


def _value_and_slope(energy: Energy, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the energies and their gradients in the points, with a graph to the parameters."""
    keep = torch.is_grad_enabled()
    with differentiable():
        _, value, slope = differentiate(energy, x, keep)
    return value if keep else value.detach(), slope


@torch.no_grad()
def _check_affine(energy: Energy, x: Tensor, value: Tensor, others: Tensor, rise: Tensor) -> None:
    """Compare a rise of each point, one component after the other, with the energy's own."""
    moved = x.reshape(value.numel(), len(others), -1).clone()
    each = torch.arange(len(moved), device=x.device)
    site = each % len(others)
    moved[each, site] = others[site, each]
    got = (energy(moved.reshape(x.shape)) - value).flatten()
    want = rise.flatten(1)[site, each] if value.dim() else rise[site]
    eps = torch.finfo(got.dtype).eps
    error, scale = (got - want).abs().max(), want.abs().max()
    if error > eps**0.5 * scale + 32 * eps * value.abs().max():
        raise ValueError(
            f"affine must be False for {describe(energy)}: where one component changes its energy "
            f"is off the straight line by up to {error:.3g}"
        )
