"""Losses: pure functions of an energy and points, each a way to shape the energy."""

from pyro_ebm.losses.contrastive import contrastive_divergence
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
    "contrastive_divergence",
    "denoising_autoencoder",
    "denoising_score_matching",
    "energy_discrepancy",
    "flow_contrastive",
    "masked_autoencoder",
    "multi_level_denoising_score_matching",
    "noise_contrastive",
    "ranking_noise_contrastive",
    "score_matching",
    "sliced_score_matching",
]
