"""Every method for log Z on every target that suits it: within its own error, or it says so.

One call on a batch of 100 equal temperatures is 100 seeds, since methods draw for each element of
a batch on its own. ``python benchmarks/log_z.py`` runs more of it, longer.
"""

import math
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pyro.distributions as dist
import pytest
import torch

from pyro_ebm import UnnormalizedWarning
from pyro_ebm.partition import (
    MBAR,
    SMC,
    Annealed,
    Bridge,
    Exact,
    Importance,
    Laplace,
    Quadrature,
    Variational,
    log_partition,
)
from pyro_ebm.partition.base import MIN_ESS, LogPartition
from tests.common import EXACT, FALSE_ALARM
from tests.partition_targets import (
    CRITICAL,
    LAYERS,
    MODES,
    RBM_JOINT,
    TARGETS,
    WIDTHS,
    bits,
    checkerboard,
    enumerated_log_z,
    heat_bath,
    kaufman,
    normal,
    rbm_energy,
    rbm_joint_energy,
    torus_energy,
)

SEEDS = 100

# The oracles -------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 3), (3, 4), (4, 3), (4, 4)], ids=str)
@pytest.mark.parametrize("beta", [0.05, 0.3, 1 / CRITICAL, 0.5, 2.0])
def test_kaufman_equals_enumeration(shape, beta):
    torch.testing.assert_close(kaufman(*shape, beta), enumerated_log_z(*shape, beta), **EXACT)


def test_kaufman_sees_a_positive_gamma_above_the_critical_temperature(monkeypatch):
    monkeypatch.setattr("tests.partition_targets.hyperbolic", _unsigned)
    assert abs(kaufman(4, 4, 0.3) - enumerated_log_z(4, 4, 0.3)) > 1e-3


def _unsigned(x):
    return (1.0, math.log(2 * math.cosh(x))), (1.0, math.log(2 * math.sinh(abs(x))))


def test_kaufman_tends_to_onsager_with_the_correction_of_a_torus():
    """log Z = N f + log(2^(1/4) + 2^(-1/2)) + O(1/N) at T_c, Ferdinand and Fisher (1969)."""
    catalan = 0.915965594177219
    f = math.log(2) / 2 + 2 * catalan / math.pi
    off = kaufman(200, 200, 1 / CRITICAL) - 200**2 * f
    # 1/N = 2.5e-5, and what 4e4 terms of order one lose to rounding
    assert abs(off - math.log(2**0.25 + 2**-0.5)) < 1e-5


def test_the_joint_energy_of_the_machine_has_the_free_energy_of_its_visible_units():
    x = RBM_JOINT.base().sample((5,))[:, :20]
    hidden = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 12)
    pairs = torch.cat([x[:, None].expand(-1, len(hidden), -1), hidden.expand(5, -1, -1)], -1)
    free = -torch.logsumexp(-rbm_joint_energy(pairs), -1)
    torch.testing.assert_close(rbm_energy(x), free, **EXACT)


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_a_target_is_a_distribution_in_double_precision_with_a_finite_log_z(target):
    d = target.make(3)
    x = d.base.sample((4,))
    assert d.potential(x).shape == (4, 3)
    assert d.potential(x).dtype == torch.float64
    assert d.potential(x).isfinite().all()
    assert math.isfinite(target.log_z())


def law_after_heat_bath(blocks):
    """Start 8 spins in their law, move, and ask by chi-squared whether they still have it."""
    states = torch.tensor(bits(8), dtype=torch.float64).reshape(-1, 2, 4)
    p = torch.softmax(-0.3 * torus_energy(states), 0)
    x = states[torch.multinomial(p, 100_000, replacement=True)]
    kernel = heat_bath(lambda y: 0.3 * torus_energy(y), blocks)
    state = kernel.init(x)
    for _ in range(5):
        state, _ = kernel.step(state)
    rows = (state.position.flatten(1) @ 2.0 ** torch.arange(8)).long()
    counts = torch.bincount(rows, minlength=256)
    chi2 = ((counts - 1e5 * p).square() / (1e5 * p)).sum()
    return float(torch.special.gammaincc(torch.tensor(255 / 2), chi2 / 2))


def test_a_heat_bath_in_blocks_leaves_the_law_invariant():
    black, white = (block[:2] for block in checkerboard(4))
    assert law_after_heat_bath((black, white)) > FALSE_ALARM
    assert law_after_heat_bath((black | white,)) < FALSE_ALARM  # neighbours at once


# The contract ------------------------------------------------------------------------------------


class Trial(NamedTuple):
    """How the seeds of one method and one target came out."""

    z: torch.Tensor  # errors in standard errors
    trusted: torch.Tensor  # those that the method does not warn of
    off: torch.Tensor  # errors in nats

    @property
    def kept(self):
        """How many seeds keep the rule: within 3 standard errors, or not to be trusted."""
        return int((~self.trusted | (self.z.abs() <= 3)).sum())

    def p_value(self):
        """Whether the trusted seeds scatter more than their errors say: chi-squared."""
        z = self.z[self.trusted]
        return float(torch.special.gammaincc(z.new_tensor(len(z) / 2), z.square().sum() / 2))


def trial(method, target, seeds=SEEDS):
    """Run a method on a target; the warning must be there if a seed is not to be trusted."""
    with warnings.catch_warnings(record=True) as said, torch.no_grad():
        warnings.simplefilter("always")
        value, std_error, ess = log_partition(target.make(seeds), method)
    truth = target.log_z()
    trusted = ess >= getattr(method, "min_ess", MIN_ESS)
    warned = [w for w in said if issubclass(w.category, UnnormalizedWarning)]
    # a method may doubt more than its effective sample size does, of which nothing is forgiven
    assert warned or trusted.all()
    off = value - truth
    rounding = EXACT["rtol"] * max(abs(truth), 1.0)  # of deterministic methods, whose error is 0
    return Trial(off / (std_error + rounding), trusted, off)


PLANE = ("gaussian2", "double_well", "ring")
SUPPORTS = ("truncated", "simplex")
EASY = (*PLANE, *SUPPORTS, "ising3")
LARGE_SPINS = tuple(name for name in TARGETS if name.startswith(("ising8", "ising16")))
KNOWN = {**TARGETS, "rbm_joint": RBM_JOINT}
BLOCKS = {"rbm_joint": LAYERS} | {n: checkerboard(8) for n in TARGETS if n.startswith("ising8")}


def kernel(name):
    """The heat bath in blocks where there are any, else the method's own kernel."""
    return partial(heat_bath, blocks=BLOCKS[name]) if name in BLOCKS else None


def quadrature(name):
    return Quadrature(-1.0, 2.0, 40) if name == "truncated" else Quadrature(-9.0, 9.0, 160)


def normal_guide(name):
    """A normal distribution without correlations around the middle, which cannot be exact."""
    return Variational(normal(2 if name in PLANE else 4, 1.0).expand((SEEDS,)), 4)


class Pairs(NamedTuple):
    """A method, the targets on which it is to be trusted, and those on which it must say no."""

    make: Callable[[str], Any]  # of the target's name
    good: tuple[str, ...]
    doubted: tuple[str, ...] = ()


PAIRS = {
    "exact": Pairs(lambda _: Exact(), ("glass", "ising3")),
    "quadrature": Pairs(quadrature, (*PLANE, "truncated")),
    "laplace": Pairs(lambda _: Laplace(), (*PLANE, "gaussian20", *SUPPORTS)),
    "importance": Pairs(
        lambda name: Importance(num_particles=WEIGHTS.get(name, 4000)),
        (*EASY, "bimodal", "rbm"),
        ("gaussian20", "ising16_Tc"),
    ),
    "annealed": Pairs(
        lambda name: Annealed(kernel(name), *SIZES.get(name, (50, 30))),
        (*EASY, "bimodal", "rbm_joint", "ising8_3"),
        ("gaussian20",),
    ),
    "reverse": Pairs(
        lambda name: Annealed(kernel(name), 100, 100, reverse=True), ("gaussian2", "truncated")
    ),
    "smc": Pairs(lambda name: SMC(kernel(name), 200, 2), (*EASY, "bimodal", "rbm_joint")),
    "bridge": Pairs(lambda _: Bridge(num_samples=100), ("ring", "ising3", "truncated")),
    "mbar": Pairs(
        lambda _: MBAR(5, 16, 15, warmup=40),
        ("double_well", "simplex", "bimodal"),
    ),
}
WEIGHTS = dict.fromkeys(LARGE_SPINS, 500) | dict.fromkeys(("ising3", "bimodal"), 20_000)
SIZES = {
    "bimodal": (100, 50),
    "rbm_joint": (100, 50),
    "ising8_3": (50, 50),
    "gaussian20": (20, 20),
}
GOOD = [(m, t) for m, pairs in PAIRS.items() for t in pairs.good]
DOUBTED = [(m, t) for m, pairs in PAIRS.items() for t in pairs.doubted]


def run_pair(method, name, seeds=SEEDS):
    return trial(PAIRS[method].make(name), KNOWN[name], seeds)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "name"), GOOD)
def test_a_method_is_within_its_own_error_in_95_of_100_seeds(method, name):
    result = run_pair(method, name)
    assert result.kept >= 0.95 * SEEDS
    assert result.trusted.sum() >= 0.9 * SEEDS  # to doubt everything is no way out


@pytest.mark.slow
@pytest.mark.parametrize(("method", "name"), DOUBTED)
def test_a_method_that_cannot_do_a_target_says_so(method, name):
    result = run_pair(method, name)
    assert result.kept >= 0.95 * SEEDS
    assert result.trusted.sum() <= 0.05 * SEEDS


@pytest.mark.parametrize("name", [*PLANE, "bimodal"])
def test_a_bound_is_below_log_z(name):
    result = run_bound(normal_guide(name), name)
    assert (result.z <= 3).sum() >= 0.95 * SEEDS
    assert result.off.mean() < 0


def run_bound(method, name):
    """Run a method whose value is a bound: its effective sample size says how loose."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnnormalizedWarning)
        value, std_error, ess = log_partition(KNOWN[name].make(SEEDS), method)
    off = value.detach() - KNOWN[name].log_z()
    return Trial(off / std_error, ess >= MIN_ESS, off)


# Starts in one mode of two -----------------------------------------------------------------------


@pytest.mark.slow
def test_the_bracket_notices_starts_in_one_mode_of_two():
    start = MODES[0] + WIDTHS[0] * torch.randn(2000, 4)  # 14 per cent of the mass
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        lower, upper = Annealed(None, 1000, 100, start=start).bracket(TARGETS["bimodal"].make())
    assert any("contradicts itself" in str(w.message) for w in said)
    assert upper.value < lower.value


PROPOSED = {
    "importance": lambda q: Importance(q, 1000),
    "annealed": lambda q: Annealed(None, 100, 50, proposal=q),
    "smc": lambda q: SMC(None, 200, proposal=q),
    "mbar": lambda q: MBAR(4, 16, 30, proposal=q, warmup=40),
}


def doubts(method, name):
    """Whether a method says that its proposal misses something."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        log_partition(TARGETS[name].make(), method)
    return any("the proposal has no particles" in str(w.message) for w in said)


@pytest.mark.parametrize("mode", [0, 1], ids=["14 %", "86 %"])
@pytest.mark.parametrize("make", PROPOSED.values(), ids=PROPOSED)
def test_a_proposal_at_one_mode_of_two_is_noticed(make, mode):
    one = dist.Normal(MODES[mode], WIDTHS[mode]).to_event(1)
    assert sum(doubts(make(one), "bimodal") for _ in range(10)) == 10


@pytest.mark.slow
@pytest.mark.parametrize("make", PROPOSED.values(), ids=PROPOSED)
@pytest.mark.parametrize("name", [*PLANE, "simplex", "bimodal"])
def test_a_proposal_that_covers_is_not_doubted(name, make):
    wide = {"simplex": dist.Dirichlet(torch.ones(4)), "bimodal": normal(4, 3.5)}
    proposal = wide.get(name, normal(2, 2.5))
    assert not any(doubts(make(proposal), name) for _ in range(5))


def test_laplace_finds_both_modes():
    assert trial(Laplace(), TARGETS["bimodal"]).kept >= 0.95 * SEEDS


@pytest.mark.slow
@pytest.mark.parametrize("name", ["glass", "ising8_Tc", "ising8_3"])
def test_importance_sampling_of_many_spins_says_that_it_cannot_be_trusted(name):
    assert trial(Importance(num_particles=4000), TARGETS[name]).kept >= 0.95 * SEEDS


# The planted faults ------------------------------------------------------------------------------


class Faulty:
    """Importance sampling with a value and an error that are not its own."""

    value = "estimated"

    def __init__(self, shift=0.0, scale=1.0, ess=1.0):
        self.shift, self.scale, self.ess = shift, scale, ess

    def __call__(self, d):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UnnormalizedWarning)
            value, std_error, ess = Importance(num_particles=1000)(d)
        return LogPartition(value + self.shift * std_error, self.scale * std_error, self.ess * ess)


def test_the_contract_sees_a_value_that_is_five_errors_off():
    assert trial(Faulty(), TARGETS["ring"]).kept >= 0.95 * SEEDS
    assert trial(Faulty(shift=5.0), TARGETS["ring"]).kept < 0.1 * SEEDS


@pytest.mark.parametrize("name", ["gaussian2", "double_well", "ring"])
def test_the_contract_sees_half_an_error(name):
    """P(|z| > 1.5) = .13, more than twice of what the rule forgives."""
    honest, half = (trial(Faulty(scale=s), TARGETS[name], 10 * SEEDS) for s in (1.0, 0.5))
    assert honest.kept >= 0.95 * 10 * SEEDS
    assert half.kept < 0.95 * 10 * SEEDS
    assert honest.p_value() > FALSE_ALARM > half.p_value()


def test_the_contract_sees_a_warning_that_is_missing():
    with pytest.raises(AssertionError):
        trial(Faulty(ess=1e-3), TARGETS["ring"])
