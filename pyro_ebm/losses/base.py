"""What the losses share."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.distributions import Distribution

from pyro_ebm._math import weighted_mean
from pyro_ebm.energy import Energy, describe, value_and_grad


def check_points(*parts: Tensor) -> None:
    """Refuse a batch without points: a mean over it would be NaN."""
    for part in parts:
        if not part.numel():
            raise ValueError(f"points must not be empty, got the shape {tuple(part.shape)}")


def check_positive(**options: float) -> None:
    """Refuse numbers that are not above zero, such as NaN."""
    for name, value in options.items():
        if not value > 0:
            raise ValueError(f"{name} must be positive, got {value}")


def energies(energy: Energy, *parts: Tensor) -> Tensor:
    """Return the energies of points, of one or several parts.

    Raises:
        TypeError: If the energy is a distribution; to call one is to draw from it.
        ValueError: If there are no points.
    """
    if isinstance(energy, Distribution):
        name = type(energy).__name__
        raise TypeError(f"energy must be a function of points, such as d.potential, got {name}")
    check_points(*parts)
    return energy(*parts)


def differentiate(energy: Energy, x: Tensor, with_graph: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return a copy of points, their energies and the gradients there, perhaps with a graph.

    Raises:
        ValueError: If there are no points, they are not of floating point, or the energy is not
            differentiable or not one number per point.
    """
    if not x.is_floating_point():
        raise ValueError(f"x must be of floating point for a gradient, got {x.dtype}")
    x = x.detach().clone().requires_grad_()
    value = energies(energy, x)
    if value.shape != x.shape[: value.dim()]:
        raise ValueError(
            f"{describe(energy)} must return one energy per point: for points of shape "
            f"{tuple(x.shape)} expected its first dimensions, got {tuple(value.shape)}"
        )
    if not value.requires_grad:
        raise ValueError(f"{describe(energy)} must depend differentiably on its points")
    (grad,) = torch.autograd.grad(value.sum(), x, create_graph=with_graph, materialize_grads=True)
    return x, value, grad


def mean_energy(energy: Energy, *parts: Tensor, log_weight: Tensor | None = None) -> Tensor:
    """Return the mean energy of points, or that under weights."""
    return mean_of(energy, energies(energy, *parts), log_weight)


def mean_of(energy: Energy, value: Tensor, log_weight: Tensor | None) -> Tensor:
    """Return the mean of numbers, one per energy, or that under weights that sum to one.

    Numbers without weight are left out, also where they are infinite.

    Raises:
        ValueError: If the weights are not one per energy.
    """
    if log_weight is None:
        return value.mean()
    check_weights(energy, value, log_weight)
    return weighted_mean(value.flatten(), log_weight.flatten())


def check_weights(energy: Energy, value: Tensor, log_weight: Tensor) -> None:
    """Refuse weights that are not one per energy."""
    if log_weight.shape != value.shape:
        raise ValueError(
            f"log_weight must have one number per energy of {describe(energy)}, "
            f"{tuple(value.shape)}, got {tuple(log_weight.shape)}"
        )


def energies_of_answers(
    energy: Energy, x: Tensor, y: Tensor, answers: Tensor, radius: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Return the energies of the right answers ``(*n,)`` and of the incorrect ones ``(K, *n)``.

    Of answers that are not farther than the radius from the right one it is infinite.
    """
    if not radius >= 0:
        raise ValueError(f"radius must not be negative, got {radius}")
    right = energies(energy, x, y)
    if y.shape[: right.dim()] != right.shape:
        raise ValueError(
            f"y must have one answer per energy, {tuple(right.shape)}, got {tuple(y.shape)}"
        )
    event = y.shape[right.dim() :]
    if answers.dim() == 1 + len(event):
        answers = answers.reshape(len(answers), *[1] * right.dim(), *event)
    if answers.dim() != 1 + y.dim() or answers.shape[1 + right.dim() :] != event:
        raise ValueError(
            f"answers must have the shape (K, *event) or (K, *batch, *event) where y has "
            f"{tuple(y.shape)} with the event {tuple(event)}, got {tuple(answers.shape)}"
        )
    value = energies(energy, x, answers)
    # First to floating point: integers without a sign wrap around, and booleans have no minus.
    apart = answers.to(value) - y.to(value) if radius else (answers != y).to(value)
    distance = apart.reshape(*apart.shape[: 1 + right.dim()], -1).norm(dim=-1)
    return right, torch.where(distance > radius, value, torch.inf)


def frozen(energy: Energy) -> Energy:
    """Return the energy with a graph to its points alone, and none to its parameters.

    Whatever kind of callable it is.
    """

    def without_parameters(x: Tensor) -> Tensor:
        if not x.requires_grad:
            with torch.no_grad():
                return energies(energy, x)
        value, grad = value_and_grad(lambda y: energies(energy, y), x)
        carried = grad * (x - x.detach())  # zero
        return value + carried.reshape(*value.shape, -1).sum(-1)

    return without_parameters


def free_energy_of(energy: Energy, negatives: Tensor, entropy: Tensor) -> Tensor:
    r"""Return the free energy of a law by its draws: its divergence from the model, less log Z.

    .. math:: \mathbb{E}_q[E(x^-)] - H(q) = KL(q \Vert p) - \log Z

    The gradient goes into what the draws and their entropy were made of, and not into the
    parameters of the energy, whatever kind of callable it is.

    Raises:
        ValueError: If there are no draws, gradients are on and they carry no graph, or the
            entropy is not a scalar.
    """
    if torch.is_grad_enabled() and not negatives.requires_grad:
        raise ValueError("negatives must carry the graph of how they were made, got none")
    if isinstance(entropy, Tensor) and entropy.dim():
        raise ValueError(f"entropy must be a scalar, got the shape {tuple(entropy.shape)}")
    return frozen(energy)(negatives).mean() - entropy


def nearest_neighbor_entropy(x: Tensor, num_neighbors: int = 1) -> Tensor:
    r"""Estimate the entropy of a law from its draws, by the distances of nearest neighbours.

    .. math:: H \approx \frac{d}{n} \sum_i \log r_i + \log V_d + \psi(n) - \psi(k)

    :math:`r_i` is the distance from a draw to its k-th neighbour and :math:`V_d` the volume of
    the unit ball. It is differentiable in the draws; equal draws have the entropy minus infinity.
    The bias falls with n, slowly in many dimensions. Its gradient is noisy for few neighbours,
    most in few dimensions: in one it has no variance below k of 3. It takes :math:`n^2` distances.

    Args:
        x: Draws, of shape ``(n, *event)``.
        num_neighbors: The number :math:`k`, less than n.

    Returns:
        A scalar, in nats.

    Raises:
        ValueError: If there are no points, or ``num_neighbors`` is not from 1 to n - 1.

    References:
        | On the Kozachenko-Leonenko Entropy Estimator (Delattre and Fournier, 2016)
        | https://arxiv.org/abs/1602.07440
        | Estimating Mutual Information (Kraskov, Stoegbauer and Grassberger, 2004)
        | https://doi.org/10.1103/PhysRevE.69.066138

    Example:
        >>> x = torch.randn(1000, 2)
        >>> abs(nearest_neighbor_entropy(x, 3) - dist.Normal(0.0, 1.0).entropy() * 2) < 0.2
        tensor(True)
    """
    check_points(x)
    n, k = x.shape[:1].numel(), num_neighbors  # a point without a batch is one
    if not 1 <= k < n:
        raise ValueError(f"num_neighbors must be from 1 to the other {n - 1} draws, got {k}")
    flat = x.reshape(n, -1)
    with torch.no_grad():  # the quick form of cdist loses small distances
        distance = torch.cdist(flat, flat, compute_mode="donot_use_mm_for_euclid_dist")
        nearest = distance.fill_diagonal_(torch.inf).kthvalue(k).indices
    radius = (flat - flat[nearest]).norm(dim=1)
    d = flat.shape[1]
    log_ball = 0.5 * d * math.log(math.pi) - math.lgamma(0.5 * d + 1)
    return d * radius.log().mean() + log_ball + sum(1 / i for i in range(k, n))


def check_like(name: str, value: Tensor, x: Tensor) -> None:
    """Refuse what should have the shape of points, perhaps after dimensions of its own."""
    if not x.numel() or value.shape[max(value.dim() - x.dim(), 0) :] != x.shape:
        raise ValueError(
            f"{name} must have the shape of the points, not empty, after dimensions of its own, "
            f"got {tuple(value.shape)} for points of shape {tuple(x.shape)}"
        )
