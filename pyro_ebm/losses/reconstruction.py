"""Reconstruction: learning to undo what has been done to the data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyro_ebm.losses.base import check_like


def denoising_autoencoder(
    reconstruct: Callable[[Tensor], Tensor], x: Tensor, noisy: Tensor
) -> Tensor:
    r"""Reconstruct points from noisy ones.

    .. math:: \mathcal{L} = \mathbb{E}_{x, \tilde x} \lVert r(\tilde x) - x \rVert^2

    The best reconstruction is the mean of the points given the noisy one. Where the noise is
    normal it says the score of the noisy law, :math:`(r(x) - x) / \sigma^2`; of
    :math:`r(x) = x - \sigma^2 \nabla E(x)` the loss is :math:`2 \sigma^4` times
    :func:`denoising_score_matching`. One reconstruction per noisy point.

    Args:
        reconstruct: The function :math:`r`, from points to points.
        x: Data, of shape ``(n, *event)``.
        noisy: The same points with noise, of shape ``(*num, n, *event)``.

    Returns:
        A scalar: the squared error, summed over the event.

    Raises:
        ValueError: If there are no points, the shape of the noisy points does not end in that of
            the points, or the reconstructions do not have theirs.

    References:
        | What Regularized Auto-Encoders Learn from the Data-Generating Distribution (Alain and
          Bengio, 2014)
        | https://jmlr.org/papers/v15/alain14a.html

    Example:
        >>> x, noisy = torch.tensor([[1.0, 1.0]]), torch.tensor([[2.0, 0.0]])
        >>> denoising_autoencoder(lambda x: 0.5 * x, x, noisy)
        tensor(1.)
    """
    check_like("noisy", noisy, x)
    restored = reconstruct(noisy)
    if restored.shape != noisy.shape:
        raise ValueError(
            f"reconstruct must keep the shape of points, {tuple(noisy.shape)}, got "
            f"{tuple(restored.shape)}"
        )
    return (restored - x).square().sum() / (noisy.numel() / x[0].numel())


def masked_autoencoder(
    reconstruct: Callable[[Tensor, Tensor], Any], x: Tensor, mask: Tensor
) -> Tensor:
    r"""Reconstruct hidden units from the others.

    .. math:: \mathcal{L} = \mathbb{E}_{x, M} \, \frac{1}{|M|}
        \sum_{i \in M} \ell(r_i(x_{\setminus M}), x_i)

    Hidden units are set to zero before :math:`r` sees them. It gives numbers, with squared
    errors :math:`\ell`, whose best is the conditional mean; or a distribution of every unit, such
    as ``dist.Bernoulli`` or ``dist.Categorical``, with :math:`\ell = -\log p(x_i)`, whose best is
    the conditional law: pseudo-likelihood where single units are hidden. One reconstruction per
    point and mask. The mean is over all hidden units, and NaN where none is.

    Args:
        reconstruct: The function :math:`r` of the points and the mask.
        x: Data, of shape ``(n, *units)``: numbers, zeros and ones, or categories.
        mask: Which units are hidden: booleans of shape ``(*num, n, *units)``.

    Returns:
        A scalar: the error per hidden unit.

    Raises:
        TypeError: If the mask is not of booleans.
        ValueError: If there are no points, or the mask or the reconstructions do not fit them.

    References:
        | BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding (Devlin
          et al., 2019)
        | https://arxiv.org/abs/1810.04805

    Example:
        >>> x, mask = torch.tensor([[1.0, 0.0]]), torch.tensor([[False, True]])
        >>> masked_autoencoder(lambda x, mask: dist.Bernoulli(logits=x), x, mask)  # log 2
        tensor(0.6931)
    """
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be of booleans, got {mask.dtype}")
    check_like("mask", mask, x)
    restored = reconstruct(x.masked_fill(mask, 0), mask)
    shape = restored.shape if isinstance(restored, Tensor) else restored.batch_shape
    if shape != mask.shape:
        raise ValueError(
            f"reconstruct must give one number or law per unit, {tuple(mask.shape)}, got "
            f"{tuple(shape)}"
        )
    error = (restored - x).square() if isinstance(restored, Tensor) else -restored.log_prob(x)
    return torch.where(mask, error, 0.0).sum() / mask.sum()
