"""Records and sums that several modules share."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Minimum(NamedTuple):
    """Where an energy is least: ``x``, and its ``energy`` there.

    ``converged`` says whether each search has reached a minimum by its own rule, ``num_steps``
    what it took and ``grad_norm`` the largest component of the gradient that is left, in the
    space that was searched (zero for discrete variables).
    """

    x: Any
    energy: Tensor
    converged: Tensor
    num_steps: Tensor
    grad_norm: Tensor


def check_positive_beta(beta: float | Tensor) -> None:
    """Refuse an inverse temperature that is not positive; only a number may be infinite."""
    if not isinstance(beta, Tensor):
        if not beta > 0:
            raise ValueError(f"beta must be positive, got {beta}")
    elif not ((beta > 0) & beta.isfinite()).all():
        raise ValueError(f"beta must be positive, and finite where it is a tensor, got {beta}")


def soft_minimum(
    energy: Tensor, log_measure: Tensor, beta: float | Tensor, dim: int = 0
) -> Tensor:
    r"""Return the free energy of weighted states, their minimum at :math:`\beta = \infty`.

    .. math:: F = -\tfrac{1}{\beta} \log \sum_i m_i \exp(-\beta E_i)

    Precise from :math:`\beta` of 1e-6 to 1e8. Infinite energies and states without measure are
    left out; NaN goes through.

    Args:
        energy: The energies :math:`E_i`, along ``dim``.
        log_measure: The logs of the weights :math:`m_i`; broadcasts to the energies.
        beta: The inverse temperature: a number, perhaps infinite, or a tensor that broadcasts to
            the result.
        dim: The dimension that is summed.
    """
    dtype = torch.promote_types(energy.dtype, log_measure.dtype)
    energy, log_measure = torch.broadcast_tensors(energy.to(dtype), log_measure.to(dtype))
    wall = (energy == torch.inf) | (log_measure == -torch.inf)
    if not isinstance(beta, Tensor) and beta == math.inf:
        return torch.where(wall, torch.inf, energy).amin(dim)
    # From the least energy on, so that a large constant costs no digits of the differences.
    least = torch.where(wall, torch.inf, energy.detach()).amin(dim, keepdim=True)
    least = torch.where(least.isfinite(), least, 0.0)
    gap = torch.where(wall, 0.0, energy - least)
    wide = beta.unsqueeze(dim) if isinstance(beta, Tensor) and beta.dim() > 0 else beta
    logits = torch.where(wall, -torch.inf, log_measure - wide * gap)
    least = least.squeeze(dim)
    direct = least - logits.logsumexp(dim) / beta
    if not isinstance(beta, Tensor) and beta >= 0.1:
        return direct
    # At small beta the sum is one but for rounding: add up what it lacks.
    share = torch.softmax(log_measure, dim)
    tilt = (share * torch.where(wall, -1.0, torch.expm1(-wide * gap))).sum(dim)
    small = tilt > -0.5
    total = log_measure.logsumexp(dim)
    series = least - (total + torch.where(small, tilt, 0.0).log1p()) / beta
    return torch.where(small, series, direct)


def weighted_mean(value: Tensor, log_weight: Tensor) -> Tensor:
    """Return the mean over the first dimension, under weights that are made to sum to one.

    What has no weight is left out, also where it is infinite.
    """
    weight = log_weight.detach().softmax(0)
    return (weight * torch.where(weight == 0, 0.0, value)).sum(0)


def mean_weight(log_weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    r"""Average importance weights, stacked in the first dimension.

    Returns:
        The log of the mean, its standard error by the delta method, and the effective sample size
        :math:`(\sum w)^2 / \sum w^2`.
    """
    n = len(log_weights)
    value = log_weights.logsumexp(0) - math.log(n)
    with torch.no_grad():
        ess = (2 * log_weights.logsumexp(0) - (2 * log_weights).logsumexp(0)).exp()
        std_error = ((1 / ess - 1 / n).clamp(min=0.0) * n / max(n - 1, 1)).sqrt()
    return value, std_error, ess


def systematic(weight: Tensor) -> Tensor:
    """Return rows drawn in proportion to weights, with one uniform number per batch element."""
    n = len(weight)
    at = (
        torch.arange(n, device=weight.device).reshape(-1, *[1] * (weight.dim() - 1))
        + torch.rand_like(weight[:1])
    ) / n
    edges = weight.cumsum(0).movedim(0, -1).contiguous()
    places = at.expand_as(weight).movedim(0, -1).contiguous().to(edges)
    return torch.searchsorted(edges, places).clamp(max=n - 1).movedim(-1, 0)


def tail_index(log_weight: Tensor) -> Tensor:
    r"""Return the index k of the upper tail of weights, along the first dimension.

    The generalised Pareto distribution of the largest :math:`\min(n / 5, 3 \sqrt n)` weights, by
    the estimator of Zhang and Stephens (2009) with the prior of Vehtari et al. (2024). Weights
    whose k is above one half have no finite variance.
    """
    n = len(log_weight)
    m = max(5, min(n // 5, math.ceil(3 * math.sqrt(n))))
    top = log_weight.topk(min(m + 1, n), 0).values
    x = (top - top[:1]).exp()
    x = (x[:-1] - x[-1:]).flip(0).clamp(min=torch.finfo(x.dtype).tiny)
    m, num = len(x), 30 + math.isqrt(len(x))
    at = 1.0 - (num / (torch.arange(1, num + 1).to(x) - 0.5)).sqrt()
    theta = at.reshape(-1, *[1] * (x.dim() - 1)) / (3 * x[max(m // 4, 1) - 1]) + 1 / x[-1]
    k = torch.log1p(-theta.unsqueeze(1) * x).mean(1)
    share = torch.softmax(m * ((-theta / k).log() - k - 1.0), 0)
    k = torch.log1p(-(share * theta).sum(0) * x).mean(0)
    return ((k * m + 5.0) / (m + 10.0)).nan_to_num(0.0)
