"""What the losses share."""

from __future__ import annotations

from torch import Tensor

from pyro_ebm.energy import Energy, describe


def energies(energy: Energy, *parts: Tensor) -> Tensor:
    """Return the energies of points, of one or several parts.

    Raises:
        ValueError: If there are no points.
    """
    for part in parts:
        if not part.numel():
            raise ValueError(f"points must not be empty, got the shape {tuple(part.shape)}")
    return energy(*parts)


def mean_energy(energy: Energy, x: Tensor, log_weight: Tensor | None = None) -> Tensor:
    """Return the mean energy of points, or their mean under weights that sum to one.

    Raises:
        ValueError: If there are no points.
    """
    if not x.numel():
        raise ValueError(f"points must not be empty, got the shape {tuple(x.shape)}")
    value = energy(x)
    if log_weight is None:
        return value.mean()
    if log_weight.shape != value.shape:
        raise ValueError(
            f"log_weight must have one number per energy of {describe(energy)}, "
            f"{tuple(value.shape)}, got {tuple(log_weight.shape)}"
        )
    return (log_weight.detach().flatten().softmax(0) * value.flatten()).sum()


def check_like(name: str, value: Tensor, x: Tensor) -> None:
    """Refuse what should have the shape of points, perhaps after dimensions of its own."""
    if not x.numel() or value.shape[max(value.dim() - x.dim(), 0) :] != x.shape:
        raise ValueError(
            f"{name} must have the shape of the points, not empty, after dimensions of its own, "
            f"got {tuple(value.shape)} for points of shape {tuple(x.shape)}"
        )
