"""The generator's side of adversarial learning."""

from __future__ import annotations

from torch import Tensor

from pyro_ebm.energy import Energy
from pyro_ebm.losses.base import free_energy_of


def adversarial_generator(energy: Energy, negatives: Tensor, entropy: Tensor) -> Tensor:
    r"""Bring a generator to the model: low energy and high entropy of its draws.

    .. math:: \mathcal{L} = \mathbb{E}_q[E(x^-)] - H(q) = KL(q \Vert p) - \log Z

    It is the negative ELBO of the generator as a guide. The energy's own side is
    :func:`contrastive_divergence` with the same draws: together they play
    :math:`\min_E \max_q \, \mathbb{E}_x[E] - \mathbb{E}_q[E] + H(q)`, where the best q makes the
    value the negative log-likelihood. Without the entropy q would collapse to the least energy.

    Draws must be reparametrised. For others, or as stock SVI in both directions, the generator is
    the guide of :class:`~pyro_ebm.partition.Variational`. Costs m energies and their gradients in
    the points; no gradient goes into the energy's parameters.

    Args:
        energy: Maps points ``(*batch, *event)`` to energies ``(*batch,)``; with a base or a beta
            it is ``d.potential``.
        negatives: Draws of the generator, ``(*m, *event)``, with their graph.
        entropy: The entropy of the generator, with its graph: for one with a density
            ``-q.log_prob(negatives).mean()`` or ``q.entropy()``, for others
            :func:`nearest_neighbor_entropy`.

    Returns:
        A scalar.

    Raises:
        ValueError: If there are no draws, they carry no graph, or the entropy is not a scalar.

    References:
        | Deep Directed Generative Models with Energy-Based Probability Estimation (Kim and
          Bengio, 2016)
        | https://arxiv.org/abs/1606.03439
        | Calibrating Energy-based Generative Adversarial Networks (Dai et al., 2017)
        | https://arxiv.org/abs/1702.01691
        | Maximum Entropy Generators for Energy-Based Models (Kumar et al., 2019)
        | https://arxiv.org/abs/1901.08508
        | No MCMC for Me: Amortized Sampling for Fast and Stable Training of Energy-Based Models
          (Grathwohl et al., 2021)
        | https://arxiv.org/abs/2010.04230

    Example:
        >>> loc = torch.tensor([3.0], requires_grad=True)
        >>> q = dist.Normal(loc, 1.0).to_event(1)
        >>> negatives = q.rsample((100,))
        >>> entropy = -q.log_prob(negatives).mean()
        >>> adversarial_generator(lambda x: (x - 3.0).square().sum(-1), negatives, entropy) > -1.5
        tensor(True)
    """
    return free_energy_of(energy, negatives, entropy)
