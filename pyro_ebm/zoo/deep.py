"""Neural networks as energies."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations


class MLPEnergy(nn.Module):
    r"""A multilayer perceptron as an energy of vectors.

    .. math:: E(x) = w^\top \sigma(W_L \cdots \sigma(W_1 x + b_1) \cdots + b_L)

    :math:`\sigma` is SiLU, smooth, so that forces are too. On :math:`\mathbb{R}^d` it has no
    finite integral of its own: give it a proper base.

    Args:
        dim: The number of components of a point.
        hidden: The widths of the hidden layers.
        scale: Multiplies the last layer's initial weights; small starts near the base.
        spectral_norm: Whether each layer is divided by its largest singular value (by torch's
            ``spectral_norm``, whose power iteration goes on in training mode only). Energies then
            rise by at most 1.1 per hidden layer and unit of length, and ``scale`` has no effect.

    Raises:
        ValueError: If ``dim`` or a width is not positive.

    References:
        | Spectral Normalization for Generative Adversarial Networks (Miyato, Kataoka, Koyama and
          Yoshida, 2018)
        | https://arxiv.org/abs/1802.05957

    Example:
        >>> MLPEnergy(2)(torch.zeros(5, 2)).shape
        torch.Size([5])
    """

    def __init__(
        self,
        dim: int,
        hidden: Sequence[int] = (128, 128),
        *,
        scale: float = 1.0,
        spectral_norm: bool = False,
    ) -> None:
        super().__init__()
        widths = [dim, *hidden]
        if min(widths) < 1:
            raise ValueError(f"dim and hidden must be positive, got {dim} and {tuple(hidden)}")
        layers: list[nn.Module] = []
        for before, after in zip(widths, hidden, strict=False):
            layers += [nn.Linear(before, after), nn.SiLU()]
        last = nn.Linear(widths[-1], 1, bias=False)
        with torch.no_grad():
            last.weight.mul_(scale)
        self.layers = nn.Sequential(*layers, last)
        if spectral_norm:
            for layer in (*layers[::2], last):
                parametrizations.spectral_norm(layer)

    def forward(self, x: Tensor) -> Tensor:
        """Return the energies of points ``(*batch, dim)``."""
        return self.layers(x).squeeze(-1)
