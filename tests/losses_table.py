"""All losses: how each is called, and what its docstring claims. One line a loss.

The contract in ``test_losses.py`` runs over ``LOSSES``. Add lines to your own section.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from pyro.distributions import Normal
from torch import Tensor, nn

from pyro_ebm import losses

N, M = 6, 8  # data and negatives: two numbers, so that a count says which points were looked at


class Smooth(nn.Module):
    """An energy of one or several parts, which are vectors, with all derivatives."""

    def __init__(self, dim=2):
        super().__init__()
        generator = torch.Generator().manual_seed(1)

        def draw(*shape):
            return nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64))

        self.inner, self.outer = draw(dim, 3), draw(3)

    def forward(self, *parts):
        batch = torch.broadcast_shapes(*(part.shape[:-1] for part in parts))
        x = torch.cat([part.expand(*batch, part.shape[-1]) for part in parts], -1)
        return (x @ self.inner).tanh() @ self.outer + 0.5 * (x @ self.inner).square().sum(-1)


class Case(NamedTuple):
    """A loss, its points, and what is claimed of it.

    ``rows`` has a letter per tensor: those with the same letter share their rows, which may be
    permuted together and must not be none; a tensor marked with a dot has none.
    ``cost`` counts the calls of the energy, and the energies that these return in all.
    ``blocked`` are the tensors, by their place, that no gradient may flow into.
    """

    loss: Callable[..., Tensor]  # (energy, *tensors) -> scalar
    tensors: Callable[[], tuple[Tensor, ...]]
    rows: str
    cost: tuple[int, int]
    blocked: tuple[int, ...] = ()
    invariant: bool = True  # to a constant that is added to the energy
    exact_gradient: bool = True  # whether the gradient is that of the value; else it alone counts
    energy: Callable[[], nn.Module] = Smooth


def points(*shapes, seed=0):
    """Return fixed normal draws of these shapes, in double precision."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)


def bits(*shapes, seed=0):
    """Return fixed zeros and ones of these shapes."""
    return tuple((x > 0).to(x) for x in points(*shapes, seed=seed))


def wide(x):
    """Return a law of noise for points."""
    return Normal(x.new_zeros(2), 2.0).to_event(1)


CONTRASTIVE = {
    "contrastive_divergence": Case(
        losses.contrastive_divergence,
        lambda: points((N, 2), (M, 2)),
        rows="ab",
        cost=(2, N + M),
        blocked=(1,),
    ),
    "contrastive_divergence, weighted": Case(
        lambda e, x, negatives, w: losses.contrastive_divergence(e, x, negatives, log_weight=w),
        lambda: points((N, 2), (M, 2), (M,)),
        rows="abb",
        cost=(2, N + M),
        blocked=(1, 2),
    ),
    "maximum_likelihood": Case(
        lambda e, x, s: losses.maximum_likelihood(e, x, torch.logsumexp(-e(s), 0)),
        lambda: points((N, 2), (M, 2)),  # the second as if they were all states
        rows="a.",
        cost=(2, N + M),
    ),
    "maximum_likelihood, conditional": Case(
        lambda e, x, s: losses.maximum_likelihood(e, x, torch.logsumexp(-e(s), 1)),
        lambda: points((N, 2), (N, M, 2)),
        rows="aa",
        cost=(2, N + M * N),
    ),
    "improved_contrastive_divergence": Case(
        lambda e, x, start: losses.improved_contrastive_divergence(e, x, *moved(e, start)),
        lambda: points((N, 2), (M, 2)),
        rows="ab",
        cost=(4, N + 3 * M),
        exact_gradient=False,
    ),
    "two_phase": Case(
        losses.two_phase,
        lambda: points((N, 2), (N, 3), (M, 2), (M, 3)),
        rows="aabb",
        cost=(2, N + M),
        blocked=(1, 2, 3),
        energy=lambda: Smooth(5),
    ),
    "two_phase, weighted": Case(
        lambda e, x, z, negatives, z_negatives, w, v: losses.two_phase(
            e, x, z.movedim(1, 0), negatives, z_negatives, z_log_weight=w.T, log_weight=v
        ),
        lambda: points((N, 2), (N, 4, 3), (M, 2), (M, 3), (N, 4), (M,)),
        rows="aabbab",
        cost=(2, 4 * N + M),
        blocked=(1, 2, 3, 4, 5),
        energy=lambda: Smooth(5),
    ),
    "energy_l2": Case(
        losses.energy_l2,
        lambda: points((N, 2), (M, 2)),
        rows="ab",
        cost=(2, N + M),
        blocked=(1,),
        invariant=False,
    ),
}


def moved(energy, start):
    """Return points after a step down the energy, with its graph, and a stand-in for entropy."""
    with torch.enable_grad():
        x = start if start.requires_grad else start.clone().requires_grad_()
        (slope,) = torch.autograd.grad(energy(x).sum(), x, create_graph=True)
        x = x - 0.1 * slope
        return x, losses.nearest_neighbor_entropy(x, 3)


def of_answers(loss, invariant=True):
    """Return a loss of points, right answers and answers for all."""
    return Case(
        loss,
        lambda: points((N, 2), (N, 3), (M, 3)),
        rows="aab",
        cost=(2, N + N * M),
        invariant=invariant,
        energy=lambda: Smooth(5),
    )


MARGIN = {
    "energy_loss": Case(
        losses.energy_loss,
        lambda: points((N, 2), (N, 3)),
        rows="aa",
        cost=(1, N),
        invariant=False,
        energy=lambda: Smooth(5),
    ),
    "perceptron": of_answers(losses.perceptron),
    "hinge": of_answers(losses.hinge),
    "log_loss": of_answers(losses.log_loss),
    "lvq2": of_answers(lambda *parts: losses.lvq2(*parts, ceiling=5.0)),
    "minimum_classification_error": of_answers(losses.minimum_classification_error),
    "square_square": of_answers(losses.square_square, invariant=False),
    "square_exponential": of_answers(losses.square_exponential, invariant=False),
    "negative_log_likelihood": of_answers(losses.negative_log_likelihood),
    "negative_log_likelihood, cold": of_answers(
        lambda *parts: losses.negative_log_likelihood(*parts, beta=20.0)
    ),
    "minimum_empirical_error": of_answers(losses.minimum_empirical_error),
}
ADVERSARIAL = {
    "adversarial_generator": Case(
        lambda e, start: losses.adversarial_generator(e, *moved(e, start)),
        lambda: points((M, 2)),
        rows="a",
        cost=(2, 2 * M),
        exact_gradient=False,
    ),
}
SCORE = {
    "score_matching": Case(
        losses.score_matching, lambda: points((N, 2)), rows="a", cost=(1, N), blocked=(0,)
    ),
    "sliced_score_matching": Case(
        losses.sliced_score_matching,
        lambda: points((N, 2), (N, 2)),
        rows="aa",
        cost=(1, N),
        blocked=(0, 1),
    ),
    "denoising_score_matching": Case(
        lambda e, x, noise: losses.denoising_score_matching(e, x, noise, 0.5),
        lambda: points((N, 2), (N, 2)),
        rows="aa",
        cost=(1, N),
        blocked=(0, 1),
    ),
    "multi_level_denoising_score_matching": Case(
        lambda e, x, noise, s: losses.multi_level_denoising_score_matching(
            lambda y, level: e(y, level.unsqueeze(-1)), x, noise, s.square() + 0.1
        ),
        lambda: points((N, 2), (N, 2), (N,)),
        rows="aaa",
        cost=(1, N),
        blocked=(0, 1, 2),
        energy=lambda: Smooth(3),
    ),
}
NOISE = {
    "noise_contrastive": Case(
        lambda e, x, negatives: losses.noise_contrastive(e, x, negatives, wide(x), 1.0),
        lambda: points((N, 2), (M, 2)),
        rows="ab",
        cost=(2, N + M),
        blocked=(1,),
        invariant=False,  # log Z is given
    ),
    "ranking_noise_contrastive": Case(
        lambda e, x, negatives: losses.ranking_noise_contrastive(e, x, negatives, wide(x)),
        lambda: points((N, 2), (M, 1, 2)),
        rows="ab",
        cost=(2, N + M),
        blocked=(1,),
    ),
    "energy_discrepancy": Case(
        lambda e, x, p: losses.energy_discrepancy(e, x, p.movedim(1, 0)),
        lambda: points((N, 2), (N, 3, 2)),
        rows="aa",
        cost=(2, N + 3 * N),
        blocked=(1,),
    ),
}
RECONSTRUCTION = {}
DISCRETE = {
    name: Case(
        getattr(losses, name),
        lambda: bits((N, 2)),
        rows="a",
        cost=(2, N + 2 * N),
        blocked=(0,),
    )
    for name in (
        "concrete_score_matching",
        "minimum_probability_flow",
        "pseudo_likelihood",
        "ratio_matching",
    )
}
DISCRETE["pseudo_likelihood, weighted"] = Case(
    lambda e, x, w: losses.pseudo_likelihood(e, x, log_weight=w),
    lambda: (*bits((N, 2)), *points((N,))),
    rows="aa",
    cost=(2, N + 2 * N),
    blocked=(0, 1),
)
EMBEDDING = {
    "info_nce": Case(
        losses.info_nce,
        lambda: points((N, 2), (N, 1)),
        rows="aa",
        cost=(1, N * N),
        energy=lambda: Smooth(3),
    ),
}

LOSSES = {
    **CONTRASTIVE,
    **MARGIN,
    **ADVERSARIAL,
    **SCORE,
    **NOISE,
    **RECONSTRUCTION,
    **DISCRETE,
    **EMBEDDING,
}
# Names of ebm.losses that are tested elsewhere only.
NOT_OF_AN_ENERGY = {
    "barlow_twins",
    "denoising_autoencoder",
    "flow_contrastive",
    "masked_autoencoder",
    "nca",
    "nearest_neighbor_entropy",
    "nt_xent",
    "siamese",
    "triplet",
}
