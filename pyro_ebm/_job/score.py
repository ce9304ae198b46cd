"""Judge a learned energy on rows that it has not seen, beside the Gaussian."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor

from pyro_ebm._guard import UnnormalizedWarning
from pyro_ebm._job.base import Run, Whitened, energy_of, gaussian, law_of, repeatable
from pyro_ebm.partition import Contrastive, Importance, LogPartition, log_partition

PARTICLES = 1 << 17
REPEATS, CHAINS, RUNGS = 8, 256, 64  # of the second method


def score(run: Run) -> dict[str, Any]:
    """Return the held-out log-likelihoods of a run, in nats per standardised row.

    log Z is estimated by importance sampling from the Gaussian, and again by annealed chains
    with Jarzynski's weights, which share nothing with it but the energy.
    """
    with repeatable(run.info["settings"]["seed"]), torch.no_grad():
        energy = energy_of(run)
        log_z, ladder = _importance(energy), _annealed(energy)
        rows, train = run.tensors["held_out"], run.tensors["train"]
        log_det = energy.tril.diagonal().log().sum()
        learned = law_of(energy).log_prob(energy.whiten(rows)) - log_det - log_z.value
    shrunk = _gaussian_log_prob(rows, *gaussian(train))
    plain = _unshrunk(train, rows)
    best = shrunk if plain is None or shrunk.mean() >= plain.mean() else plain
    return {
        "energy": learned.mean().item(),
        "energy_row_error": _error(learned),
        "gaussian": shrunk.mean().item(),
        "gaussian_unshrunk": None if plain is None else plain.mean().item(),
        "gain": (learned - best).mean().item(),
        "gain_row_error": _error(learned - best),
        "log_z": _facts(log_z) | {"particles": PARTICLES},
        "log_z_second": _facts(ladder),
    }


def _importance(energy: Whitened) -> LogPartition:
    with warnings.catch_warnings():  # the report says it in its own words
        warnings.simplefilter("ignore", UnnormalizedWarning)
        return log_partition(law_of(energy), Importance(num_particles=PARTICLES))


def _annealed(energy: Whitened) -> LogPartition:
    """Estimate log Z by weighted chains that follow beta from 0 to 1, several times over."""
    method = Contrastive(num_chains=2 * CHAINS, num_steps=2)  # of which one half estimates
    for rung in range(1, RUNGS + 1):
        beta = torch.full((REPEATS,), rung / RUNGS)
        parts = log_partition(law_of(energy, beta, (REPEATS,)), method)
    value = parts.value.logsumexp(0) - math.log(REPEATS)
    spread = (parts.value - value).exp().std() / math.sqrt(REPEATS)  # of Z, relative
    return LogPartition(value, spread, parts.ess.sum())


def _facts(parts: LogPartition) -> dict[str, float]:
    return {name: float(part) for name, part in parts._asdict().items()}


def _error(values: Tensor) -> float | None:
    """The standard error of a mean over rows, where there are two or more."""
    return float(values.std() / math.sqrt(len(values))) if len(values) > 1 else None


def _gaussian_log_prob(rows: Tensor, loc: Tensor, covariance: Tensor) -> Tensor:
    return torch.distributions.MultivariateNormal(loc, covariance).log_prob(rows)


def _unshrunk(train: Tensor, rows: Tensor) -> Tensor | None:
    """The log-likelihood by maximum likelihood, where that exists."""
    loc, covariance = gaussian(train, shrink=False)
    scales = torch.linalg.eigvalsh(covariance)
    if scales[0] <= 1e-10 * scales[-1]:
        return None
    return _gaussian_log_prob(rows, loc, covariance)
