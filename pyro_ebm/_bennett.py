"""Bennett's acceptance ratio for any number of states: masses from draws, with their errors."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

SEGMENTS = 32
"""An error of correlated draws is taken from at least this many pieces of the chains."""

CHUNK = 1 << 24
"""The most numbers of a table of draws and states, if it is of more than one batch element."""

HUGE = 1e300
"""Stands for infinity where it is multiplied by zero."""


class Masses(NamedTuple):
    r"""The masses of the densities :math:`m(x) \exp(-s_k V(x))` by draws from all of them.

    ``log_mass`` ``(K, *batch)`` is relative to the first, ``covariance`` ``(K, K, *batch)`` that
    of these logs, with the autocorrelation of the chains. ``ess`` ``(*batch,)`` is the effective
    number of draws where the ladder overlaps least. ``influence`` ``(T, C, *batch)`` says what
    each row of draws adds to the last of ``log_mass``: their mean is zero, and the variance of
    that mean the error. ``converged`` ``(*batch,)`` is whether the equations were solved.
    """

    log_mass: Tensor
    covariance: Tensor
    ess: Tensor
    influence: Tensor
    converged: Tensor


class Influence(NamedTuple):
    """Draws of a distribution in their chains, and what they say of its log Z.

    ``x`` is ``(T, C, *batch, *event)``, ``log_z`` and ``ess`` ``(*batch,)``; ``log_z_rows``
    ``(T, C, *batch)`` is what each row of draws adds to log Z, of mean zero.
    """

    x: Tensor
    log_z: Tensor
    log_z_rows: Tensor
    ess: Tensor


def masses(excess: Tensor, betas: Tensor) -> Masses:
    r"""Solve the self-consistent equations of MBAR for a ladder, in double precision.

    .. math:: Z_k = \sum_n \frac{e^{-s_k V(x_n)}}{\sum_l N_l \, e^{-s_l V(x_n)} / Z_l}

    With two states they are those of Bennett, and of Meng and Wong's optimal bridge. The
    covariance is that of an M-estimator, :math:`H^{-1} A H^{-1}`, with :math:`A` from the sums of
    the scores over pieces of chains, so that correlated draws, also between levels, count for
    what they are worth.

    Args:
        excess: :math:`V` at the draws, ``(K, T, C, *batch)``: T times, C independent chains, at
            each level as many. Infinite where a density is zero.
        betas: The :math:`s_k`, increasing from 0, of shape ``(K,)``.

    References:
        | Statistically Optimal Analysis of Samples from Multiple Equilibrium States (Shirts and
          Chodera, 2008)
        | https://arxiv.org/abs/0801.1426
        | Estimating Normalizing Constants and Reweighting Mixtures in Markov Chain Monte Carlo
          (Geyer, 1994)
        | https://hdl.handle.net/11299/58433
    """
    batch = excess.shape[3:]
    flat = excess.detach().double().reshape(*excess.shape[:3], -1).movedim(-1, 0)
    size = max(1, CHUNK // (len(betas) * flat[0].numel()))
    parts = [_masses(part.clamp(-HUGE, HUGE), betas.to(flat)) for part in flat.split(size)]
    joined = (torch.cat(column, -1) for column in zip(*parts, strict=True))
    return Masses(*(part.reshape(part.shape[:-1] + batch) for part in joined))


def _masses(excess: Tensor, s: Tensor) -> Masses:  # shape: (B, K, T, C)
    v = excess.flatten(2)
    f, converged = _solve(v, s)
    share = _shares(v, s, f)  # shape: (B, K states, K levels, M)
    inverse = _inverse(share)
    # what a row of draws adds to the logs: its mean over rows is zero
    score = share.sum(2) - 1.0  # shape: (B, K, M)
    influence = (inverse @ score * score.shape[-1]).unflatten(-1, excess.shape[2:])
    covariance = _of_mean(influence)
    centred = share - share.mean(-1, keepdim=True)
    alone = (inverse[:, -1, :, None, None] * centred).sum(1).square().sum((1, 2))
    slow = (covariance[:, -1, -1] / alone).nan_to_num(1.0, posinf=1.0).clamp(min=1.0)
    below = share.cumsum(1)[:, :-1]
    ess = (below * (1.0 - below)).sum((2, 3)).amin(1) / slow
    parts = f[:, :1] - f, covariance, ess, influence[:, -1], converged
    return Masses(*(part.movedim(0, -1) for part in parts))


def _logits(v: Tensor, s: Tensor) -> Tensor:
    """Return :math:`-s_k V`, less the largest: ``(B, K states, K levels, M)``."""
    tilted = -s.reshape(-1, 1, 1) * v.unsqueeze(1)
    return tilted - tilted.amax(1, keepdim=True)


def _shares(v: Tensor, s: Tensor, f: Tensor) -> Tensor:
    """Return the probabilities that each draw comes from each state."""
    return torch.softmax(_logits(v, s) + f[..., None, None], 1)


def _information(share: Tensor) -> Tensor:
    """Return the curvature of the likelihood in the logs of the masses but the first."""
    flat = share.flatten(2)[:, 1:]
    return torch.diag_embed(flat.sum(-1)) - flat @ flat.mT


def _inverse(share: Tensor) -> Tensor:
    """Return its inverse, with a row and a column of zeros for the first state."""
    full = torch.linalg.pinv(_information(share), hermitian=True)
    return torch.nn.functional.pad(full, (1, 0, 1, 0))


def _solve(v: Tensor, s: Tensor, most: int = 500) -> tuple[Tensor, Tensor]:
    """Maximise the likelihood by damped Newton steps: ``f``, minus the logs of the masses."""
    logits, m = _logits(v, s), v.shape[-1]
    f = _guess(v, s)

    def loss(f: Tensor) -> Tensor:
        return (logits + f[..., None, None]).logsumexp(1).mean((1, 2)) - f.mean(1)

    value, damping = loss(f), torch.ones_like(f[:, :1])
    converged = torch.zeros_like(value, dtype=torch.bool)
    for _ in range(most):
        share = torch.softmax(logits + f[..., None, None], 1)
        excess = (m - share.sum((2, 3)))[:, 1:]
        curvature = _information(share)
        ridge = 1e-13 * m * torch.eye(len(s) - 1, dtype=v.dtype, device=v.device)
        newton = torch.linalg.solve(curvature + ridge, excess)
        step = torch.nn.functional.pad(damping * newton.clamp(-5.0, 5.0), (1, 0))
        new = f + step
        after = loss(new)
        better = after <= value + 1e-14 * value.abs().clamp(min=1.0)
        f = torch.where(better[:, None], new, f)
        value = torch.where(better, after, value)
        damping = torch.where(better[:, None], 1.0, 0.5 * damping)
        converged = newton.abs().amax(1) < 1e-9
        if bool(converged.all()):
            break
    return f, converged


def _guess(v: Tensor, s: Tensor) -> Tensor:
    """Start from the means of the averages of weights upwards and downwards."""
    step = s.diff()[:, None]
    log_m = math.log(v.shape[-1])
    up = (-step * v[:, :-1]).logsumexp(-1) - log_m
    down = log_m - (step * v[:, 1:]).logsumexp(-1)
    limit = 1e-100 * HUGE
    up, down = (torch.where(a.abs() < limit, a, b) for a, b in ((up, down), (down, up)))
    middle = torch.where(up.abs() < limit, 0.5 * (up + down), 0.0)
    return torch.nn.functional.pad(-middle.cumsum(1), (1, 0))


def segments(times: int, chains: int) -> int:
    """Return into how many pieces each chain is cut for its error."""
    return min(times, max(1, -(-SEGMENTS // chains)))


def _of_mean(influence: Tensor) -> Tensor:
    """Return the covariance of the means of rows ``(B, K, T, C)``, in pieces of chains."""
    times, chains = influence.shape[2:]
    pieces = influence.tensor_split(segments(times, chains), 2)
    sums = torch.stack([piece.sum(2) for piece in pieces], -1).flatten(2)
    count = sums.shape[-1]
    return sums @ sums.mT * (count / max(count - 1, 1) / (times * chains) ** 2)


def error_of_mean(influence: Tensor) -> Tensor:
    """Return the standard errors of the means of rows ``(T, C, *batch)`` that are zero."""
    flat = influence.flatten(2) if influence.dim() > 2 else influence.unsqueeze(-1)
    wide = flat.movedim(-1, 0).unsqueeze(1)
    return _of_mean(wide)[:, 0, 0].sqrt().reshape(influence.shape[2:])
