"""Contrast with noise: to learn an energy, and its log Z, by telling data from draws of a law."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from pyro_ebm.energy import Energy, describe
from pyro_ebm.losses.base import energies, frozen


def noise_contrastive(
    energy: Energy,
    x: Tensor,
    negatives: Tensor,
    noise: Any,
    log_partition: float | Tensor = 0.0,
) -> Tensor:
    r"""Tell data from noise by the model's density: it learns the energy and log Z.

    .. math:: \mathcal{L} = -\mathbb{E}_x[\log s(G(x) - \log \nu)]
        - \nu \, \mathbb{E}_{x^-}[\log s(\log \nu - G(x^-))], \quad
        G(x) = -E(x) - \log Z - \log q(x)

    :math:`s` is the logistic function, :math:`q` the noise, :math:`\nu = m / n` its draws per
    point. Give log Z as a parameter of its own: at the optimum it is the true one; without it the
    energy learns to be normalised. The noise must have mass wherever the data have. The nearer it
    is to them and the larger :math:`\nu`, the smaller the error, down to that of maximum
    likelihood. ``n + m`` energies, no derivatives in the points.

    Args:
        energy: Maps points ``(*batch, *event)`` to energies ``(*batch,)``.
        x: Data, of shape ``(*n, *event)``.
        negatives: Draws of the noise, ``(*m, *event)``; no gradient flows into them.
        noise: The law :math:`q`: a distribution with a ``log_prob``; it gets no gradient.
        log_partition: The model's log Z, a number or a parameter that learns; for conditions
            in rows, one each, which broadcasts to the energies.

    Returns:
        A scalar.

    Raises:
        ValueError: If there are no points, the noise is not normalised, it and the energy do not
            have one number per point each, or log Z does not broadcast to these.

    References:
        | Noise-Contrastive Estimation of Unnormalized Statistical Models, with Applications to
          Natural Image Statistics (Gutmann and Hyvärinen, 2012)
        | https://jmlr.org/papers/v13/gutmann12a.html

    Example:
        >>> energy = lambda x: 0.5 * x.square().sum(-1)
        >>> noise = dist.Normal(torch.zeros(2), 2.0).to_event(1)
        >>> x, negatives = torch.randn(100, 2), noise.sample((500,))
        >>> log_z = torch.zeros((), requires_grad=True)
        >>> noise_contrastive(energy, x, negatives, noise, log_z).backward()
        >>> log_z.grad < 0                    # the true one is log 2 pi
        tensor(True)
    """
    _check_normalized(noise)
    data = _log_ratio(energy, x, noise)
    return _classify(data, _log_ratio(energy, negatives.detach(), noise), log_partition)


def flow_contrastive(
    energy: Energy,
    x: Tensor,
    negatives: Tensor,
    noise: Any,
    log_partition: float | Tensor = 0.0,
) -> Tensor:
    r"""Let the noise of :func:`noise_contrastive` learn to be taken for data.

    .. math:: \mathcal{L}(q) = \mathbb{E}_x[\log s(G(x) - \log \nu)]
        + \nu \, \mathbb{E}_{x^- \sim q}[\log s(\log \nu - G(x^-))]

    It is minus that loss, with a gradient in the parameters of the noise only, through the draws
    too, while that of :func:`noise_contrastive` is in the energy's and log Z: step with their
    sum, or with each in turn. ``n + m`` energies, and gradients in ``m`` points.

    Args:
        energy: Maps points ``(*batch, *event)`` to energies ``(*batch,)``.
        x: Data, of shape ``(*n, *event)``.
        negatives: Draws of the noise by ``rsample``, of shape ``(*m, *event)``.
        noise: The law of the negatives, such as a normalising flow.
        log_partition: The model's log Z, a number or a tensor; it gets no gradient.

    Returns:
        A scalar.

    Raises:
        ValueError: As :func:`noise_contrastive`; and if gradients are on and the negatives
            carry none.

    References:
        | Flow Contrastive Estimation of Energy-Based Models (Gao et al., 2020)
        | https://arxiv.org/abs/1912.00589

    Example:
        >>> loc = torch.zeros(2, requires_grad=True)
        >>> noise = dist.Normal(loc, 1.0).to_event(1)
        >>> energy = lambda x: 0.5 * (x - 1).square().sum(-1)
        >>> x, negatives = torch.randn(100, 2) + 1, noise.rsample((100,))
        >>> flow_contrastive(energy, x, negatives, noise, 1.8379).backward()
        >>> loc.grad < 0                                  # the noise moves towards the data
        tensor([True, True])
    """
    _check_normalized(noise)
    if torch.is_grad_enabled() and not negatives.requires_grad:
        raise ValueError("negatives must carry the gradient of the noise: draw them by rsample")
    if isinstance(log_partition, Tensor):
        log_partition = log_partition.detach()
    data = _log_ratio(frozen(energy), x, noise, learn=True)
    drawn = _log_ratio(frozen(energy), negatives, noise, learn=True)
    return -_classify(data, drawn, log_partition)


def ranking_noise_contrastive(energy: Energy, x: Tensor, negatives: Tensor, noise: Any) -> Tensor:
    r"""Tell each data point from K draws of the noise, by the ratio of model to noise.

    .. math:: \mathcal{L} = -\mathbb{E}_x \log \frac{e^{G(x)}}
        {e^{G(x)} + \sum_{k=1}^K e^{G(x^-_k)}}, \quad G(x) = -E(x) - \log q(x)

    No log Z is needed, for conditional energies neither: ``ebm.Given(E, y)`` with points ``x`` of
    ``y`` and draws of :math:`q(x \mid y)`. It is right for every K, and tends to maximum
    likelihood as K grows. ``n (K + 1)`` energies, or ``n + K`` where all points share their
    negatives.

    Args:
        energy: Maps points ``(*batch, *event)`` to energies ``(*batch,)``.
        x: Data, of shape ``(*n, *event)``.
        negatives: Draws of the noise, of shape ``(K, *n, *event)``, or with ones for ``n``; no
            gradient flows into them.
        noise: The law :math:`q`: a distribution with a ``log_prob``; it gets no gradient.

    Returns:
        A scalar.

    Raises:
        ValueError: If there are no points, the negatives do not fit the points, or the energy and
            the noise do not have one number per point each.

    References:
        | Noise Contrastive Estimation and Negative Sampling for Conditional Models: Consistency
          and Statistical Efficiency (Ma and Collins, 2018)
        | https://arxiv.org/abs/1809.01812

    Example:
        >>> noise = dist.Normal(torch.zeros(1), 1.0).to_event(1)
        >>> x, negatives = torch.zeros(3, 1), torch.zeros(7, 3, 1)
        >>> ranking_noise_contrastive(lambda x: x.sum(-1), x, negatives, noise)  # log 8
        tensor(2.0794)
    """
    _check_rank("negatives", negatives, x.shape, torch.Size((1, *x.shape[1:])))  # or for all
    drawn = _log_ratio(energy, negatives.detach(), noise)
    return _rank(drawn - _log_ratio(energy, x, noise), 0.0)


def energy_discrepancy(
    energy: Energy, x: Tensor, perturbed: Tensor, *, weight: float = 1.0
) -> Tensor:
    r"""Tell each data point from points around it: a contrast without sampler or log Z.

    .. math:: \mathcal{L} = \mathbb{E}_x \log \Big( \frac{w}{M} + \frac{1}{M} \sum_{j=1}^M
        e^{E(x) - E(x'_j)} \Big), \quad x \to y \to x'_1, \dots, x'_M

    Perturb each point once, to ``y``, and that one M times, all by the same symmetric move: on
    :math:`\mathbb{R}^d` add :math:`\sqrt{t}` times standard normal noise, on a finite support
    move from state to state. With :math:`w = 1` it is, up to ``log M``, the
    :func:`ranking_noise_contrastive` of the posterior of ``x`` given ``y``, whose noise is the
    move from ``y``: least at the truth for every M. With another :math:`w` that holds for
    :math:`M \to \infty` only, and with none the loss runs away where M is small. It does not see
    what lies farther from the data than the moves reach: low energies that grow there show in an
    exact likelihood only. ``n (M + 1)`` energies, no derivatives in the points.

    Args:
        energy: Maps points ``(*batch, *event)`` to energies ``(*batch,)``.
        x: Data, of shape ``(*n, *event)``.
        perturbed: The points :math:`x'`, ``(M, *n, *event)``; no gradient flows into them.
        weight: The weight :math:`w` of the point itself, not negative.

    Returns:
        A scalar.

    Raises:
        ValueError: If there are no points, the perturbed ones do not fit them, or ``weight`` is
            negative.

    References:
        | Energy Discrepancies: A Score-Independent Loss for Energy-Based Models (Schröder et al.,
          2023)
        | https://arxiv.org/abs/2307.06431

    Example:
        >>> x = torch.randn(100, 2)
        >>> y = x + 0.5 * torch.randn(100, 2)
        >>> perturbed = y + 0.5 * torch.randn(16, 100, 2)
        >>> energy_discrepancy(lambda x: 0.5 * x.square().sum(-1), x, perturbed).shape
        torch.Size([])
    """
    if not weight >= 0:
        raise ValueError(f"weight must not be negative, got {weight}")
    _check_rank("perturbed", perturbed, x.shape)
    difference = energies(energy, x) - energies(energy, perturbed.detach())
    log_weight = math.log(weight) if weight else -math.inf
    return _rank(difference, log_weight) - math.log(len(perturbed))


def _check_normalized(noise: Any) -> None:
    """Refuse noise without a log Z of its own, which the model's would take in."""
    if not getattr(noise, "is_normalized", True) or getattr(noise, "log_volume", 0) != 0:
        raise ValueError(
            f"noise must be normalised, got {type(noise).__name__} without a log Z of its own"
        )


def _check_rank(name: str, value: Tensor, *shapes: torch.Size) -> None:
    """Refuse points without a first dimension that counts those of each point."""
    if value.shape[1:] not in shapes or not value.dim() or not value.numel():
        raise ValueError(
            f"{name} must have a dimension of their own, not empty, and then the shape of x, "
            f"{tuple(shapes[0])}, got {tuple(value.shape)}"
        )


def _log_ratio(energy: Energy, x: Tensor, noise: Any, *, learn: bool = False) -> Tensor:
    """Return the log of the model's density, but for log Z, over that of the noise."""
    value = energies(energy, x)
    with torch.set_grad_enabled(learn and torch.is_grad_enabled()):
        log_noise = noise.log_prob(x)
    if value.shape != log_noise.shape:
        raise ValueError(
            f"{describe(energy)} and the noise must give one number per point each, got the "
            f"shapes {tuple(value.shape)} and {tuple(log_noise.shape)} for points of shape "
            f"{tuple(x.shape)}"
        )
    return -value - log_noise


def _classify(data: Tensor, drawn: Tensor, log_partition: float | Tensor) -> Tensor:
    """Return the loss of telling data from draws by their log ratios, per point of the data."""
    for ratio in (data, drawn):
        shape = getattr(log_partition, "shape", ())[::-1]
        sizes = zip(shape, ratio.shape[::-1], strict=False)
        if len(shape) > ratio.dim() or any(size not in (1, most) for size, most in sizes):
            raise ValueError(
                f"log_partition must be one number, or broadcast to the energies "
                f"{tuple(ratio.shape)}, got the shape {tuple(shape[::-1])}"
            )
    nu = drawn.numel() / data.numel()
    shift = log_partition + math.log(nu)
    return -logsigmoid(data - shift).mean() - nu * logsigmoid(shift - drawn).mean()


def _rank(difference: Tensor, log_weight: float) -> Tensor:
    """Return the mean of log(w + sum of exp(difference)), the sum over the first dimension."""
    rest = torch.full_like(difference[:1], log_weight)
    # In one sum, which stays finite where all negatives are impossible.
    return torch.cat([difference, rest]).logsumexp(0).mean()
