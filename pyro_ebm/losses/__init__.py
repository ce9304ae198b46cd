"""Losses: pure functions of an energy and points, each a way to shape the energy."""

from pyro_ebm.losses.adversarial import adversarial_generator
from pyro_ebm.losses.answers import (
    energy_loss,
    minimum_empirical_error,
    negative_log_likelihood,
    perceptron,
)
from pyro_ebm.losses.base import nearest_neighbor_entropy
from pyro_ebm.losses.contrastive import (
    contrastive_divergence,
    energy_l2,
    improved_contrastive_divergence,
    maximum_likelihood,
    two_phase,
)
from pyro_ebm.losses.discrete import (
    concrete_score_matching,
    minimum_probability_flow,
    pseudo_likelihood,
    ratio_matching,
)
from pyro_ebm.losses.embedding import (
    barlow_twins,
    info_nce,
    nca,
    nt_xent,
    siamese,
    triplet,
)
from pyro_ebm.losses.margin import (
    hinge,
    log_loss,
    lvq2,
    minimum_classification_error,
    square_exponential,
    square_square,
)
from pyro_ebm.losses.noise import (
    energy_discrepancy,
    flow_contrastive,
    noise_contrastive,
    ranking_noise_contrastive,
)
from pyro_ebm.losses.reconstruction import denoising_autoencoder, masked_autoencoder
from pyro_ebm.losses.score import (
    denoising_score_matching,
    multi_level_denoising_score_matching,
    score_matching,
    sliced_score_matching,
)

__all__ = [
    "adversarial_generator",
    "barlow_twins",
    "concrete_score_matching",
    "contrastive_divergence",
    "denoising_autoencoder",
    "denoising_score_matching",
    "energy_discrepancy",
    "energy_l2",
    "energy_loss",
    "flow_contrastive",
    "hinge",
    "improved_contrastive_divergence",
    "info_nce",
    "log_loss",
    "lvq2",
    "masked_autoencoder",
    "maximum_likelihood",
    "minimum_classification_error",
    "minimum_empirical_error",
    "minimum_probability_flow",
    "multi_level_denoising_score_matching",
    "nca",
    "nearest_neighbor_entropy",
    "negative_log_likelihood",
    "noise_contrastive",
    "nt_xent",
    "perceptron",
    "pseudo_likelihood",
    "ranking_noise_contrastive",
    "ratio_matching",
    "score_matching",
    "siamese",
    "sliced_score_matching",
    "square_exponential",
    "square_square",
    "triplet",
    "two_phase",
]
