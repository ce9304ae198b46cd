"""A bijection onto lower-triangular matrices with a positive diagonal."""

from __future__ import annotations

import math

import torch
from pyro.distributions import constraints
from torch import Tensor
from torch.distributions import biject_to
from torch.distributions.transforms import Transform


class _LowerCholesky(type(constraints.lower_cholesky)):  # type: ignore[misc]
    """The support of torch's ``lower_cholesky``, which has no bijection of its own."""


lower_cholesky = _LowerCholesky()


class VectorToCholesky(Transform):
    r"""Fill the lower triangle row by row, with the diagonal through the exponential.

    .. math:: L_{ij} = z_{ij} \; (i > j), \quad L_{ii} = \exp(z_{ii}), \quad
        \log |\det \partial L / \partial z| = \sum_i z_{ii}
    """

    domain = constraints.real_vector
    codomain = constraints.lower_cholesky
    bijective = True

    def __eq__(self, other: object) -> bool:
        return isinstance(other, VectorToCholesky)

    def __hash__(self) -> int:
        return hash(VectorToCholesky)

    def forward_shape(self, shape: torch.Size) -> torch.Size:
        """Return ``(*batch, n, n)`` for ``(*batch, n (n + 1) / 2)``."""
        n = (math.isqrt(8 * shape[-1] + 1) - 1) // 2
        if n * (n + 1) // 2 != shape[-1]:
            raise ValueError(f"shape must end in a triangular number, got {tuple(shape)}")
        return torch.Size((*shape[:-1], n, n))

    def inverse_shape(self, shape: torch.Size) -> torch.Size:
        """Return ``(*batch, n (n + 1) / 2)`` for ``(*batch, n, n)``."""
        return torch.Size((*shape[:-2], shape[-1] * (shape[-1] + 1) // 2))

    def _call(self, x: Tensor) -> Tensor:
        n = self.forward_shape(x.shape)[-1]
        row, col = torch.tril_indices(n, n, device=x.device)
        filled = torch.where(row == col, x.exp(), x)
        place = torch.nn.functional.one_hot(row * n + col, n * n).to(x)  # shape: (m, n * n)
        return (filled @ place).unflatten(-1, (n, n))

    def _inverse(self, y: Tensor) -> Tensor:
        row, col = torch.tril_indices(y.shape[-1], y.shape[-1], device=y.device)
        x = y[..., row, col]
        return torch.where(row == col, torch.where(row == col, x, 1.0).log(), x)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the log of the Jacobian's determinant."""
        row, col = torch.tril_indices(y.shape[-1], y.shape[-1], device=y.device)
        return torch.where(row == col, x, 0.0).sum(-1)


@biject_to.register(_LowerCholesky)
def _biject_to_lower_cholesky(constraint: _LowerCholesky) -> VectorToCholesky:
    return VectorToCholesky()
