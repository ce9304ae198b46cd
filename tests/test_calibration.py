"""Samplers on whole models: simulation-based calibration and Geweke's joint test.

A thousand simulations are a thousand chains of one batch, each with data of its own.
"""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch.nn.functional import softplus

import pyro_ebm as ebm
from pyro_ebm._engine import Eager
from pyro_ebm.kernels import hmc, mala, nuts, ula, underdamped
from pyro_ebm.sampling import STATS, Block, Chains, Stream
from tests.common import FALSE_ALARM, FAR

SIMULATIONS = 1_000
DRAWS = 15  # of each chain, so that ranks have 16 values and some 62 simulations each
WARMUP = 30
THIN = 3
CHAINS = 5_000  # of the joint test
ROUNDS = 10


class Model(NamedTuple):
    """A model of unconstrained parameters.

    ``prior`` maps a number n to parameters ``(n, d)``, ``data`` parameters to data ``(n, m)``, and
    ``energy`` both to the negative logarithm of their joint density, ``(n,)``. ``step`` and
    ``num_steps`` are good for HMC.
    """

    prior: Callable
    data: Callable
    energy: Callable
    step: float
    num_steps: int


def normal(scale=1.0, share=1.0):
    """A normal law of unknown mean and scale; ``scale`` and ``share`` are for faults."""
    spread = torch.tensor([1.0, 0.5])

    def data(theta):
        return theta[:, :1] + torch.exp(theta[:, 1:]) * torch.randn(len(theta), 5)

    def energy(theta, y):
        mean, log_sd = theta[..., :1], theta[..., 1:]
        misfit = 0.5 * ((y - mean) / torch.exp(log_sd)).square() + log_sd
        prior = 0.5 * (theta / (scale * spread)).square().sum(-1)
        return prior + share * misfit.sum(-1)

    return Model(lambda n: spread * torch.randn(n, 2), data, energy, 0.1, 12)


def schools(scale=1.0, share=1.0):
    """Eight groups whose effects share a mean and a spread, not centred."""
    noise = torch.tensor([1.5, 1.0, 1.6, 1.1, 0.9, 1.1, 1.0, 1.8])

    def effects(theta):
        return theta[..., :1] + torch.exp(0.5 * theta[..., 1:2]) * theta[..., 2:]

    def energy(theta, y):
        misfit = 0.5 * ((y - effects(theta)) / noise).square()
        return 0.5 * (theta / scale).square().sum(-1) + share * misfit.sum(-1)

    return Model(
        lambda n: torch.randn(n, 10),
        lambda theta: effects(theta) + noise * torch.randn(len(theta), 8),
        energy,
        0.2,
        8,
    )


def logistic(scale=1.0, share=1.0):
    """A regression of yes and no on two features."""
    angle = torch.linspace(0.0, 5.0, 20)
    features = torch.stack([angle.cos(), 0.5 + angle.sin()], -1)
    spread = 1.5

    def energy(theta, y):
        logits = theta @ features.mT
        misfit = softplus(logits) - y * logits
        return 0.5 * (theta / (scale * spread)).square().sum(-1) + share * misfit.sum(-1)

    return Model(
        lambda n: spread * torch.randn(n, 2),
        lambda theta: torch.bernoulli(torch.sigmoid(theta @ features.mT)),
        energy,
        0.4,
        5,
    )


MODELS = {"normal": normal, "schools": schools, "logistic": logistic}


KERNELS = {
    "nuts": lambda energy, model: nuts(energy, 1.5 * model.step, max_tree_depth=6),
    "hmc": lambda energy, model: hmc(
        energy, model.step, model.num_steps, jitter=0.5, step_jitter=0.2
    ),
    "hmc of all lengths": lambda energy, model: hmc(
        energy, model.step, 2 * model.num_steps, jitter=1.0
    ),
}
SHORT = {
    "mala": lambda energy, model: mala(energy, 0.5 * model.step**2),
    "underdamped": lambda energy, model: underdamped(energy, model.step),
}
every_kernel = pytest.mark.parametrize("make", KERNELS.values(), ids=KERNELS)

# Short steps, for they are the same in all simulations, whose posteriors are not.
SETTINGS = {"target_accept_prob": 0.95}
ADAPTED = {
    "NUTS": lambda target, base: ebm.NUTS(target, base, max_tree_depth=7, **SETTINGS),
    "HMC": lambda target, base: ebm.HMC(target, base, num_steps=8, **SETTINGS),
    "ChEES": lambda target, base: ebm.ChEES(target, base, **SETTINGS),
}


# Simulation-based calibration -------------------------------------------------------------------


def draw_from(make):
    """Draws of a kernel with fixed settings, ``(simulations, draws, d)``."""

    def draw(energy, start, model):
        kernel = make(energy, model)
        state, draws = kernel.init(start), []
        for _ in range(WARMUP + DRAWS * THIN):
            state, _ = kernel.step(state)
            draws.append(state.position)
        return torch.stack(draws[WARMUP + THIN - 1 :: THIN], 1)

    return draw


def adapt(make):
    """Draws of a sampler whose warm-up finds its settings, from all simulations together."""

    def draw(energy, start, _):
        sampler = make(energy, ebm.Flat(start.shape[1:]))
        move, warmup = sampler.move, sampler.warmup(2 * WARMUP, start[0])
        engine = Eager(energy)
        width = start.shape[-1] + len(STATS) + len(move.extra)
        block = Block(Stream(0, 0, start.device), move.start(engine, start, warmup.adapted), width)
        chains = Chains(move, engine, warmup, [block])
        for _ in range(2 * WARMUP):
            chains.warm()
        return chains.draw(DRAWS * THIN)[:, THIN - 1 :: THIN, : start.shape[-1]]

    return draw


CALIBRATED = {name: draw_from(make) for name, make in KERNELS.items()}
CALIBRATED.update({f"ebm.{name}": adapt(make) for name, make in ADAPTED.items()})
every_sampler = pytest.mark.parametrize("draw", CALIBRATED.values(), ids=CALIBRATED)


def ranks(draw, model, wrong=None):
    """The ranks of the truths among draws, ``(simulations, quantities)``, each from 0 to DRAWS.

    Quantities are the parameters and the joint density: the latter, which depends on the data,
    sees a sampler that forgets them. ``wrong`` is a model with a fault for the sampler.
    """
    truth = model.prior(SIMULATIONS)
    y = model.data(truth)
    sampled = wrong or model
    draws = draw(lambda theta: sampled.energy(theta, y), model.prior(SIMULATIONS), model)

    def quantities(theta):
        return torch.cat([theta, model.energy(theta, y).unsqueeze(-1)], -1)

    return sum((quantities(q) < quantities(truth)).long() for q in draws.unbind(1))


def p_values(ranks):
    """Chi-squared tests that ranks are uniform, one per quantity."""
    counts = torch.stack([(ranks == k).sum(0) for k in range(DRAWS + 1)])
    expected = len(ranks) / (DRAWS + 1)
    chi2 = ((counts - expected).square() / expected).sum(0)
    return torch.special.gammaincc(torch.full_like(chi2, DRAWS / 2), chi2 / 2)


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
@every_sampler
def test_ranks_of_the_truth_are_uniform(draw, model, device):
    with device:
        p = p_values(ranks(draw, model()))
    assert p.min() * len(p) > FALSE_ALARM


FAULTS = {
    "prior too wide": {"scale": 2.0},
    "prior too narrow": {"scale": 0.5},
    "data forgotten": {"share": 0.0},
    "data counted twice": {"share": 2.0},
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_calibration_sees_a_wrong_density(model, fault, device):
    with device:
        p = p_values(ranks(CALIBRATED["hmc"], model(), model(**fault)))
    assert p.min() * len(p) < FALSE_ALARM


BIASED = {
    "uncorrected": lambda energy, model: ula(energy, max(0.1, 2 * model.step**2)),
    "stuck": lambda energy, model: hmc(energy, 1e-3 * model.step, 1),
}


@pytest.mark.slow
@pytest.mark.parametrize("make", BIASED.values(), ids=BIASED)
@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_calibration_sees_a_biased_kernel(model, make, device):
    with device:
        p = p_values(ranks(draw_from(make), model()))
    assert p.min() * len(p) < FALSE_ALARM


@pytest.mark.slow
@every_sampler
def test_calibration_sees_a_wrong_density_with_each_sampler(draw, device):
    with device:
        p = p_values(ranks(draw, logistic(), logistic(scale=2.0)))
    assert p.min() * len(p) < FALSE_ALARM


# Geweke's joint test ----------------------------------------------------------------------------

JOINT = {"normal": normal, "logistic": logistic}


def moments(theta, y):
    """First and second moments of parameters and data, and their products."""
    mean, power = y.mean(-1, keepdim=True), y.square().mean(-1, keepdim=True)
    return torch.cat([theta, theta.square(), mean, power, theta * mean, theta * power], -1)


def z_scores(make, model, wrong=None):
    """How far the moments of two simulators of the joint law differ, in standard errors.

    One draws parameters and data afresh; the other, started there, draws in turn parameters given
    the data by the kernel and data given the parameters. Its moments are averages over a chain,
    and chains are independent. They are taken between the two turns: data that are always fresh
    would not show a kernel that forgets them.
    """
    sampled = wrong or model
    theta = model.prior(CHAINS)
    y, total = model.data(theta), 0.0
    for _ in range(ROUNDS):
        kernel = make(lambda t, y=y: sampled.energy(t, y), model)
        state, _ = kernel.step(kernel.init(theta))
        theta = state.position
        total = total + moments(theta, y) / ROUNDS
        y = model.data(theta)
    fresh = model.prior(10 * CHAINS)
    fresh = moments(fresh, model.data(fresh))
    variance = total.var(0) / len(total) + fresh.var(0) / len(fresh)
    return (total.mean(0) - fresh.mean(0)) / variance.sqrt()


@pytest.mark.slow
@pytest.mark.parametrize("model", JOINT.values(), ids=JOINT)
@pytest.mark.parametrize("make", {**KERNELS, **SHORT}.values(), ids={**KERNELS, **SHORT})
def test_two_simulators_of_the_joint_law_agree(make, model, device):
    with device:
        assert z_scores(make, model()).abs().max() < FAR


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
@pytest.mark.parametrize("model", JOINT.values(), ids=JOINT)
def test_the_joint_test_sees_a_wrong_density(model, fault, device):
    with device:
        assert z_scores(KERNELS["hmc"], model(), model(**fault)).abs().max() > FAR


@pytest.mark.slow
@every_kernel
def test_the_joint_test_sees_a_wrong_density_with_each_kernel(make, device):
    with device:
        assert z_scores(make, logistic(), logistic(scale=2.0)).abs().max() > FAR


@pytest.mark.slow
@pytest.mark.parametrize("model", JOINT.values(), ids=JOINT)
def test_the_joint_test_sees_a_biased_kernel(model, device):
    with device:
        assert z_scores(BIASED["uncorrected"], model()).abs().max() > FAR
