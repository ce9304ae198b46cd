"""Maximum likelihood, and the contrast of data with samples of the model."""

from __future__ import annotations

from torch import Tensor

from pyro_ebm._math import weighted_mean
from pyro_ebm.energy import Energy, describe
from pyro_ebm.losses.base import (
    check_weights,
    energies,
    free_energy_of,
    mean_energy,
)


def maximum_likelihood(energy: Energy, x: Tensor, log_partition: float | Tensor) -> Tensor:
    r"""The negative log-likelihood, by a log Z that one can compute.

    .. math:: \mathcal{L} = \mathbb{E}_{x}[E(x) + \log Z]

    It learns what ``log_partition`` carries the graph of: take it from
    :func:`pyro_ebm.log_partition` by an exact method, of this very energy. With a base or a beta
    the energy is ``d.potential``. A conditional energy has a log Z per point. Costs n energies,
    and what log Z costs.

    Args:
        energy: Maps points ``(*n, *event)`` to energies ``(*n,)``.
        x: Data, of shape ``(*n, *event)``.
        log_partition: log Z, a scalar, or one per point ``(*n,)``.

    Returns:
        A scalar, in nats.

    Raises:
        ValueError: If there are no points, or log Z is neither one nor one per point.

    References:
        | A Tutorial on Energy-Based Learning (LeCun et al., 2006), section 2.2
        | http://yann.lecun.com/exdb/publis/pdf/lecun-06.pdf

    Example:
        >>> d = ebm.GibbsBoltzmann(lambda x: -2.0 * x, ebm.Flat((), constraints.boolean))
        >>> log_z = ebm.log_partition(d, ebm.partition.Exact()).value
        >>> maximum_likelihood(d.potential, torch.tensor([1.0, 1.0, 0.0]), log_z)
        tensor(0.7936)
    """
    value = energies(energy, x)
    if isinstance(log_partition, Tensor) and log_partition.shape not in ((), value.shape):
        raise ValueError(
            f"log_partition must be a scalar or one number per energy of {describe(energy)}, "
            f"{tuple(value.shape)}, got {tuple(log_partition.shape)}"
        )
    return (value + log_partition).mean()


def contrastive_divergence(
    energy: Energy, x: Tensor, negatives: Tensor, *, log_weight: Tensor | None = None
) -> Tensor:
    r"""Push the energy down on data and up on samples of the model.

    .. math:: \mathcal{L} = \mathbb{E}_{x}[E(x)] - \mathbb{E}_{x^-}[E(x^-)]

    With exact samples of the model its gradient in the parameters is that of the negative
    log-likelihood. From chains that start at the data it is contrastive divergence, from chains
    that go on from step to step its persistent form. The value says nothing about progress.
    Costs n + m energies.

    Args:
        energy: Maps points ``(*batch, *event)`` to energies ``(*batch,)``.
        x: Data, of shape ``(*n, *event)``.
        negatives: Samples of the model, ``(*m, *event)``; no gradient flows into them.
        log_weight: The logs of the weights of the negatives, ``(*m,)``, up to a constant, as of
            Jarzynski-weighted chains; equal ones if None.

    Returns:
        A scalar.

    Raises:
        ValueError: If there are no points, or the weights are not one per negative.

    References:
        | Training Products of Experts by Minimizing Contrastive Divergence (Hinton, 2002)
        | https://doi.org/10.1162/089976602760128018

    Example:
        >>> k = torch.tensor(1.0, requires_grad=True)
        >>> energy = lambda x: 0.5 * k * x.square().sum(-1)
        >>> x, negatives = torch.tensor([[1.0], [-1.0]]), torch.tensor([[2.0], [0.0]])
        >>> contrastive_divergence(energy, x, negatives)
        tensor(-0.5000, grad_fn=<SubBackward0>)
    """
    pushed_up = mean_energy(energy, negatives.detach(), log_weight=log_weight)
    return mean_energy(energy, x) - pushed_up


def improved_contrastive_divergence(
    energy: Energy, x: Tensor, negatives: Tensor, entropy: Tensor, *, weight: float = 1.0
) -> Tensor:
    r"""Contrastive divergence with the gradient through the sampler, which it leaves out.

    .. math:: \mathcal{L} = \mathbb{E}_{x}[E(x)] - \mathbb{E}_{x^-}[E(x^-)]
        + w \, (\mathbb{E}_{x^-}[\bar{E}(x^-)] - H(q)), \quad x^- \sim q_\theta

    In the first two terms the negatives are fixed. In the third the energy's parameters are: its
    gradient goes through the moves that made the negatives, and is that of
    :math:`KL(q_\theta \Vert p)` in q alone. At :math:`w = 1`, as Du et al. have it, the moves
    learn to sample better. Mind the sign: Hinton's own objective
    :math:`KL(p_{data} \Vert p) - KL(q_\theta \Vert p)` has the whole gradient at :math:`w = -1`.

    Kernels cut their graphs, so make the last move by hand, as below. Costs n + 2 m energies and
    m gradients of the energy, and in the backward pass the second derivatives of the moves.

    Args:
        energy: Maps points ``(*batch, *event)`` to energies ``(*batch,)``.
        x: Data, of shape ``(*n, *event)``.
        negatives: Samples of the model, ``(*m, *event)``, with the graph of their last moves.
        entropy: The entropy of the law q of the negatives, with their graph: a closed form, or
            :func:`~pyro_ebm.losses.nearest_neighbor_entropy`.
        weight: The weight :math:`w`.

    Returns:
        A scalar.

    Raises:
        ValueError: If there are no points, the negatives carry no graph, or the entropy is not a
            scalar.

    References:
        | Improved Contrastive Divergence Training of Energy Based Models (Du, Li, Tenenbaum and
          Mordatch, 2021)
        | https://arxiv.org/abs/2012.01316

    Example:
        >>> energy, x = ebm.zoo.MLPEnergy(2), torch.randn(50, 2)
        >>> start = x.clone().requires_grad_()
        >>> (slope,) = torch.autograd.grad(energy(start).sum(), start, create_graph=True)
        >>> negatives = x - 0.1 * slope + 0.2**0.5 * torch.randn_like(x)
        >>> entropy = ebm.losses.nearest_neighbor_entropy(negatives, 5)
        >>> improved_contrastive_divergence(energy, x, negatives, entropy).backward()
    """
    through = free_energy_of(energy, negatives, entropy)
    return contrastive_divergence(energy, x, negatives) + weight * through


def two_phase(
    energy: Energy,
    x: Tensor,
    z: Tensor,
    negatives: Tensor,
    z_negatives: Tensor,
    *,
    z_log_weight: Tensor | None = None,
    log_weight: Tensor | None = None,
) -> Tensor:
    r"""Contrastive divergence with latents: clamped chains against free ones.

    .. math:: \mathcal{L} = \mathbb{E}_{x} \mathbb{E}_{z \mid x}[E(x, z)]
        - \mathbb{E}_{x^-, z^-}[E(x^-, z^-)]

    With samples of the posterior and of the joint model its gradient is that of the negative
    log-likelihood of :class:`~pyro_ebm.FreeEnergy`. Costs s n + m energies.

    Args:
        energy: Maps points and latents, whose batches broadcast, to energies.
        x: Data, of shape ``(*n, *event)``.
        z: Latents of the posterior given ``x``, ``(*n, *event_z)`` or ``(s, *n, *event_z)`` for
            several each; no gradient flows into them.
        negatives: Points of the joint model, ``(*m, *event)``; no gradient flows into them.
        z_negatives: Their latents, ``(*m, *event_z)``; no gradient flows into them.
        z_log_weight: The logs of the weights of ``z``, ``(s, *n)``, up to a constant per point,
            as where all states of the latent are listed; equal ones if None.
        log_weight: Those of the negatives, ``(*m,)``, up to a constant.

    Returns:
        A scalar.

    Raises:
        ValueError: If there are no points, or the weights are not one per energy.

    References:
        | A Learning Algorithm for Boltzmann Machines (Ackley, Hinton and Sejnowski, 1985)
        | https://doi.org/10.1207/s15516709cog0901_7

    Example:
        >>> rbm, v, negatives = ebm.zoo.RBM(3, 2), torch.ones(4, 3), torch.zeros(5, 3)
        >>> h, h_negatives = torch.ones(4, 2), torch.zeros(5, 2)
        >>> two_phase(rbm, v, h, negatives, h_negatives).backward()
        >>> rbm.visible_bias.grad
        tensor([-1., -1., -1.])
    """
    clamped = energies(energy, x, z.detach())
    if z_log_weight is not None:
        check_weights(energy, clamped, z_log_weight)
        clamped = weighted_mean(clamped, z_log_weight)
    free = mean_energy(energy, negatives.detach(), z_negatives.detach(), log_weight=log_weight)
    return clamped.mean() - free


def energy_l2(energy: Energy, x: Tensor, negatives: Tensor) -> Tensor:
    r"""The mean squared energies of data and negatives, a regulariser.

    .. math:: R = \mathbb{E}_{x}[E(x)^2] + \mathbb{E}_{x^-}[E(x^-)^2]

    It keeps energies near zero and so biases what is learned: a small multiple steadies the
    training of a deep energy, and no loss here adds it by itself. It depends on the constant of
    the energy. Costs n + m energies.

    Args:
        energy: Maps points ``(*batch, *event)`` to energies ``(*batch,)``.
        x: Data, of shape ``(*n, *event)``.
        negatives: Samples of the model, ``(*m, *event)``; no gradient flows into them.

    Returns:
        A scalar.

    Raises:
        ValueError: If there are no points.

    References:
        | Implicit Generation and Modeling with Energy-Based Models (Du and Mordatch, 2019)
        | https://arxiv.org/abs/1903.08689

    Example:
        >>> x, negatives = torch.tensor([[1.0], [-1.0]]), torch.tensor([[2.0], [0.0]])
        >>> energy_l2(lambda x: x.square().sum(-1), x, negatives)
        tensor(9.)
    """
    squared = energies(energy, x).square().mean()
    return squared + energies(energy, negatives.detach()).square().mean()
