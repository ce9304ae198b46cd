"""Maximum likelihood, and the contrast of data with samples of the model."""

from __future__ import annotations

from torch import Tensor

from pyro_ebm.energy import Energy
from pyro_ebm.losses.base import mean_energy


def contrastive_divergence(
    energy: Energy, x: Tensor, negatives: Tensor, *, log_weight: Tensor | None = None
) -> Tensor:
    r"""Push the energy down on data and up on samples of the model.

    .. math:: \mathcal{L} = \mathbb{E}_{x}[E(x)] - \mathbb{E}_{x^-}[E(x^-)]

    With exact samples of the model its gradient in the parameters is that of the negative
    log-likelihood. From chains that start at the data it is contrastive divergence, from chains
    that go on from step to step its persistent form. The value says nothing about progress.

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
    return mean_energy(energy, x) - mean_energy(energy, negatives.detach(), log_weight)
