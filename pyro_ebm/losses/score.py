"""Score matching: the slope of the energy against that of the data's density."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_ebm.energy import Energy, differentiable
from pyro_ebm.losses.base import check_like, check_positive, differentiate


def score_matching(energy: Energy, x: Tensor, *, chunk_size: int = 1) -> Tensor:
    r"""Match the force of the energy to the score of the data, without knowing that score.

    .. math:: \mathcal{L} = \mathbb{E}_x \left[
        \tfrac{1}{2} \lVert \nabla E(x) \rVert^2 - \mathrm{tr} \, \nabla^2 E(x) \right]

    Needs no samples and no log Z. It comes from an integration by parts, so it is right for
    points of :math:`\mathbb{R}^d`: on a support with an edge at which the density does not vanish
    it is wrong without a word (map the support to :math:`\mathbb{R}^d` first). The energy must
    be smooth: of a network of ReLUs the second derivatives are zero almost everywhere, and the
    loss only flattens it. One energy, one gradient and d gradients of that gradient per point;
    the graph holds all of them.

    Args:
        energy: Maps points ``(*batch, *event)`` to energies ``(*batch,)``.
        x: Data, of shape ``(*n, *event)``; they get no ``.grad``.
        chunk_size: How many of the d gradients to take at once, by ``torch.vmap``: all is four
            times as fast for 16 points, and eight a quarter faster for 256. One at a time takes
            the least memory without a graph.

    Returns:
        A scalar.

    Raises:
        ValueError: If there are no points, or the energy is not differentiable or not one number
            per point.

    References:
        | Estimation of Non-Normalized Statistical Models by Score Matching (Hyvärinen, 2005)
        | https://jmlr.org/papers/v6/hyvarinen05a.html

    Example:
        >>> k = torch.tensor(2.0, requires_grad=True)
        >>> energy = lambda x: 0.5 * k * x.square().sum(-1)
        >>> score_matching(energy, torch.tensor([[1.0, -1.0], [0.0, 2.0]]))  # (k^2 3 - 2 k 2) / 2
        tensor(2., grad_fn=<DivBackward0>)
    """
    with_graph = torch.is_grad_enabled()
    with differentiable():
        x, value, grad = differentiate(energy, x, True)
        event = x.shape[value.dim() :]
        size = event.numel()
        basis = torch.eye(size, dtype=x.dtype, device=x.device)
        basis = basis.reshape(size, *[1] * (x.dim() - len(event)), *event).expand(-1, *x.shape)
        trace = _curvature(x, grad, basis, chunk_size, with_graph)
    grad = grad if with_graph else grad.detach()
    return (0.5 * grad.square().sum() - trace) / (x.numel() / size)


def sliced_score_matching(
    energy: Energy,
    x: Tensor,
    projections: Tensor,
    *,
    variance_reduced: bool = True,
    chunk_size: int = 1,
) -> Tensor:
    r"""Match scores along random directions: score matching at a cost that does not grow with d.

    .. math:: \mathcal{L} = \mathbb{E}_x \mathbb{E}_v \left[
        \tfrac{1}{2} \lVert \nabla E(x) \rVert^2 - v^\top \nabla^2 E(x) \, v \right]

    Its mean over directions with :math:`\mathbb{E}[v v^\top] = I`, such as random signs or
    standard normal ones, is that of :func:`score_matching`, with the same conditions. One energy,
    one gradient and one gradient of that gradient per point and direction.

    Args:
        energy: Maps points ``(*batch, *event)`` to energies ``(*batch,)``.
        x: Data, of shape ``(*n, *event)``; they get no ``.grad``.
        projections: The directions :math:`v`, of shape ``(*num, *n, *event)``.
        variance_reduced: Whether to take the first term whole, as above, or along the directions
            too: :math:`\tfrac{1}{2} (v^\top \nabla E)^2`.
        chunk_size: How many directions of a point to take at once; see :func:`score_matching`.

    Returns:
        A scalar.

    Raises:
        ValueError: If there are no points, the shape of the directions does not end in that of
            the points, or the energy is not differentiable or not one number per point.

    References:
        | Sliced Score Matching: A Scalable Approach to Density and Score Estimation (Song, Garg,
          Shi and Ermon, 2019)
        | https://arxiv.org/abs/1905.07088

    Example:
        >>> energy = lambda x: x.square().sum(-1)
        >>> x = torch.tensor([[1.0, -1.0], [0.0, 2.0]])
        >>> signs = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
        >>> sliced_score_matching(energy, x, signs) == score_matching(energy, x)
        tensor(True)
    """
    check_like("projections", projections, x)
    with_graph = torch.is_grad_enabled()
    with differentiable():
        x, value, grad = differentiate(energy, x, True)
        size = x.shape[value.dim() :].numel()
        directions = projections.detach().clone().reshape(-1, *x.shape)
        curvature = _curvature(x, grad, directions, chunk_size, with_graph)
    grad = grad if with_graph else grad.detach()
    if variance_reduced:
        square = grad.square().sum() * len(directions)
    else:
        square = (grad * directions).reshape(-1, size).sum(-1).square().sum()
    return (0.5 * square - curvature) / (directions.numel() / size)


def denoising_score_matching(
    energy: Energy, x: Tensor, noise: Tensor, sigma: float | Tensor
) -> Tensor:
    r"""Match the force to the direction in which a noisy point came from the data.

    .. math:: \mathcal{L} = \mathbb{E}_x \mathbb{E}_\varepsilon \, \tfrac{1}{2} \left\lVert
        \nabla E(x + \sigma \varepsilon) - \varepsilon / \sigma \right\rVert^2

    It is least at the law of the *noisy* data: Gaussian data of variance :math:`s^2` give the
    precision :math:`1 / (s^2 + \sigma^2)`. The smaller :math:`\sigma`, the larger the variance,
    as :math:`1 / \sigma^2`; pairs ``torch.stack([noise, -noise])`` take that growth away. There
    are no second derivatives, so data may lie on a surface or an edge. Times
    :math:`2 \sigma^4` it is the loss of :func:`denoising_autoencoder` of
    :math:`r(x) = x - \sigma^2 \nabla E(x)`. One energy and one gradient per noisy point.

    Args:
        energy: Maps points ``(*batch, *event)`` to energies ``(*batch,)``.
        x: Data, of shape ``(*n, *event)``.
        noise: Standard normal draws :math:`\varepsilon`, of shape ``(*num, *n, *event)``.
        sigma: The noise level: a number, or one per point ``(*n,)``; positive. It does not learn.

    Returns:
        A scalar.

    Raises:
        ValueError: If there are no points, ``sigma`` is a number that is not positive, the shape
            of it or of the noise does not fit the points, or the energy is not differentiable
            or not one number per point.

    References:
        | A Connection Between Score Matching and Denoising Autoencoders (Vincent, 2011)
        | https://doi.org/10.1162/NECO_a_00142

    Example:
        >>> energy = lambda x: 0.5 * x.square().sum(-1)
        >>> x, noise = torch.tensor([[1.0], [0.0]]), torch.tensor([[0.0], [2.0]])
        >>> denoising_score_matching(energy, x, noise, 0.5)  # (1^2 + (1 - 4)^2) / 4
        tensor(2.5000, grad_fn=<DivBackward0>)
    """
    residual, level, num = _residual(energy, x, noise, sigma)
    return 0.5 * (residual / level).square().sum() / num


def multi_level_denoising_score_matching(
    energy: Energy, x: Tensor, noise: Tensor, sigma: float | Tensor
) -> Tensor:
    r"""Match the forces of an energy of points and noise levels at all levels at once.

    .. math:: \mathcal{L} = \mathbb{E}_{x, \varepsilon, \sigma} \, \sigma^2 \, \tfrac{1}{2}
        \left\lVert \nabla_x E(x + \sigma \varepsilon, \sigma) - \varepsilon / \sigma
        \right\rVert^2

    :func:`denoising_score_matching` of ``ebm.Given(energy, sigma)`` with weights
    :math:`\sigma^2`, under which all levels count alike. Draw the levels anew at each step, as
    from a geometric sequence; annealed Langevin sampling then follows them down. One energy and
    one gradient per noisy point.

    Args:
        energy: Maps points ``(*batch, *event)`` and levels ``(*batch,)`` to energies.
        x: Data, of shape ``(*n, *event)``.
        noise: Standard normal draws, of shape ``(*num, *n, *event)``.
        sigma: The noise level of each point, of shape ``(*n,)``, or one for all; positive.

    Returns:
        A scalar.

    Raises:
        ValueError: As :func:`denoising_score_matching`.

    References:
        | Generative Modeling by Estimating Gradients of the Data Distribution (Song and Ermon,
          2019)
        | https://arxiv.org/abs/1907.05600

    Example:
        >>> energy = lambda x, sigma: 0.5 * x.square().sum(-1) / (1 + sigma**2)
        >>> x, noise = torch.tensor([[1.0], [0.0]]), torch.tensor([[0.0], [2.0]])
        >>> multi_level_denoising_score_matching(energy, x, noise, torch.tensor([0.5, 1.0]))
        tensor(0.2900, grad_fn=<DivBackward0>)
    """
    sigma = sigma.detach() if isinstance(sigma, Tensor) else sigma
    residual, _, num = _residual(lambda y: energy(y, sigma), x, noise, sigma)
    return 0.5 * residual.square().sum() / num


def _residual(
    energy: Energy, x: Tensor, noise: Tensor, sigma: float | Tensor
) -> tuple[Tensor, float | Tensor, int]:
    """Return sigma times the gradient less the noise, the level, and the number of noisy points.

    The level has the dimensions of the points.
    """
    check_like("noise", noise, x)
    noise = noise.detach()
    if not isinstance(sigma, Tensor):
        check_positive(sigma=sigma)
    elif sigma.shape not in ((), (1,), x.shape[: sigma.dim()]):
        raise ValueError(
            f"sigma must be one number or one per point of {tuple(x.shape)}, got the shape "
            f"{tuple(sigma.shape)}"
        )
    else:
        sigma = sigma.detach().reshape(*sigma.shape, *[1] * (x.dim() - sigma.dim()))
    with_graph = torch.is_grad_enabled()
    with differentiable():
        _, value, grad = differentiate(energy, x + sigma * noise, with_graph)
    return sigma * grad - noise, sigma, value.numel()


def _curvature(
    x: Tensor, grad: Tensor, directions: Tensor, chunk_size: int, with_graph: bool
) -> Tensor:
    """Return the sum of v^T H v over points and their directions (the first dimension)."""
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be positive, got {chunk_size}")
    total = x.new_zeros(())
    if not grad.requires_grad:  # a linear energy
        return total
    for v in directions.split(chunk_size):
        (product,) = torch.autograd.grad(
            grad,
            x,
            v if len(v) > 1 else v[0],
            retain_graph=True,
            create_graph=with_graph,
            is_grads_batched=len(v) > 1,
            materialize_grads=True,
        )
        total = total + (product * v).sum()
    return total
