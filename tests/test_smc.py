"""Sequential Monte Carlo: its error under resampling, its temperatures and its particles."""

import math
import warnings

import pyro.distributions as dist
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyro.distributions import constraints

import pyro_ebm as ebm
from pyro_ebm import _climb
from pyro_ebm._climb import log_conditional_ess, next_temperature, refined
from pyro_ebm._math import tail_index
from pyro_ebm._path import Ladder, Particles, Tuning
from pyro_ebm.kernels import mala
from pyro_ebm.partition import SMC, Exact, log_partition
from pyro_ebm.partition.smc import _by_ancestors
from tests.common import EXACT, FAR, NUMERIC
from tests.partition_targets import TARGETS, checkerboard, heat_bath, normal

SEEDS = 100  # a batch of equal temperatures: each element has particles of its own
MOST = 5  # P(|z| > 3) = .0027: more than 5 of 100 has a chance of 1e-6


def z_scores(method, target):
    estimate = log_partition(target.make(SEEDS), method)
    return (estimate.value - target.log_z()) / estimate.std_error


def assert_covers(z):
    assert (z.abs() > 3).sum() <= MOST
    assert 0.7 < z.std() < 1.4
    assert abs(z.mean()) < FAR / 10 + 0.3  # log Z-hat is biased by half its variance, and by 1/n


# On the twelve targets see test_partition_targets.py.
COVERED = {
    "gaussian2": SMC(num_particles=200),
    "bimodal": SMC(num_particles=300),
    "mala": SMC(mala, 200, 5),
}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "method"), COVERED.items(), ids=COVERED)
def test_the_truth_is_within_three_errors_in_nearly_all_seeds(name, method):
    assert_covers(z_scores(method, TARGETS[name if name in TARGETS else "truncated"]))


# Planted faults ----------------------------------------------------------------------------------


def without_reset(particles, least):
    """Resample, and keep the weights that resampling has used up."""
    after = _climb_resample(particles, least)
    return after._replace(log_weight=particles.log_weight)


def without_families(particles):
    """Count particles as if resampling had made independent ones."""
    n = len(particles.log_weight)
    rows = torch.arange(n).reshape(-1, *[1] * (particles.log_weight.dim() - 1))
    return _by_ancestors(particles._replace(ancestor=rows.expand_as(particles.log_weight)))


_climb_resample = _climb.resample

FAULTS = {
    "weights are kept": ("pyro_ebm._climb.resample", without_reset, "gaussian2"),
    "no families": ("pyro_ebm.partition.smc._by_ancestors", without_families, "gaussian2"),
    "no jacobian": (
        "pyro_ebm._free.unconstrained",
        lambda u, t, n: lambda z: u(t(z)),
        "simplex",
    ),
}


@pytest.mark.parametrize(("where", "fault", "name"), FAULTS.values(), ids=FAULTS)
def test_the_coverage_sees_a_fault(where, fault, name, monkeypatch):
    monkeypatch.setattr(where, fault)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ebm.UnnormalizedWarning)
        z = z_scores(SMC(num_particles=400), TARGETS[name])
    with pytest.raises(AssertionError):
        assert_covers(z)


# Parts -------------------------------------------------------------------------------------------


def test_families_have_the_variance_of_weights_where_nothing_was_resampled():
    log_weight = torch.randn(50, 3)
    rows = torch.arange(50).unsqueeze(-1).expand(50, 3)
    got = _by_ancestors(Particles(log_weight, log_weight, torch.zeros(3), rows))
    want = ebm.partition.base.from_weights(log_weight)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, **EXACT)


def test_a_single_family_has_one_effective_particle():
    zero = torch.zeros(50)
    estimate = _by_ancestors(Particles(zero, zero, zero[0], torch.zeros(50, dtype=torch.long)))
    torch.testing.assert_close(estimate.ess, torch.ones(()), **EXACT)
    torch.testing.assert_close(estimate.std_error, torch.ones(()), **EXACT)


@given(st.floats(0.1, 0.99), st.floats(-3.0, 6.0))
def test_a_temperature_keeps_its_share_of_the_sample_size(least, log_scale):
    tilt, log_weight = math.exp(log_scale) * torch.randn(200, 3), torch.randn(200, 3)
    t = torch.tensor([0.0, 0.2, 1.0])
    after = next_temperature(log_weight, tilt, t, least)
    kept = log_conditional_ess(log_weight, -(after - t) * tilt)
    assert ((after >= t) & (after <= 1)).all()
    assert (kept >= math.log(least) - 1e-9).all()
    short = after < 1
    torch.testing.assert_close(kept[short].exp(), torch.full_like(kept[short], least), **NUMERIC)


def test_a_ladder_of_as_many_steps_is_itself_and_a_finer_one_lies_between():
    t = torch.tensor([[0.0, 0.0], [0.1, 1.0], [1.0, 1.0]])
    length = torch.tensor([[0.0, 0.0], [1.0, 2.0], [2.0, 2.0]])
    ladder = Ladder(t, length, Tuning(t.unsqueeze(-1), t))
    same, fine = refined(ladder, 2), refined(ladder, 4)
    torch.testing.assert_close(same.t[:, 0], t[:, 0], **EXACT)
    torch.testing.assert_close(fine.t[:, 0], torch.tensor([0.0, 0.05, 0.1, 0.55, 1.0]), **EXACT)
    torch.testing.assert_close(fine.t[:, 1], torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0]), **EXACT)
    torch.testing.assert_close(fine.tuning.log_step, fine.t, **EXACT)


def test_the_tail_index_is_that_of_pareto_weights():
    """n^(1/4) = 18 for the tail of 3 sqrt(n) weights: a deviation of (1 + k) / sqrt(949)."""
    for k in (0.3, 0.5, 0.9):
        log_weight = -k * torch.rand(100_000, 20).log()
        assert abs(tail_index(log_weight).mean() - k) < 0.03
    bounded = -0.5 * torch.randn(10_000, 20).square()
    assert (tail_index(bounded) < 0).all()
    assert tail_index(torch.zeros(10)).isfinite()


# The method --------------------------------------------------------------------------------------


def test_the_gradient_of_log_z_is_that_of_the_closed_form():
    k, beta = torch.tensor([0.5, 2.0], requires_grad=True), torch.tensor(1.3, requires_grad=True)
    d = ebm.GibbsBoltzmann(lambda x: 0.5 * (k * x.square()).sum(-1), normal(2, 2.0), beta)
    got = torch.autograd.grad(log_partition(d, SMC(num_particles=4000)).value, [k, beta])
    want = torch.autograd.grad((-0.5 * (1 + 4 * beta * k).log()).sum(), [k, beta])
    for g, w in zip(got, want, strict=True):
        # Five standard errors of 4,000 particles for integrands with deviations of about a half.
        torch.testing.assert_close(g, w, rtol=0.03, atol=0.04)


def test_particles_stand_for_both_modes_and_the_walls():
    target = TARGETS["bimodal"]
    x, log_weight = SMC(num_particles=2000).weighted(target.make())
    share = (torch.softmax(log_weight, 0) * (x[:, 0] > 0)).sum()
    assert 0.5 < share < 0.95
    assert abs(log_weight.logsumexp(0) - target.log_z()) < 0.3
    d = ebm.GibbsBoltzmann(
        lambda x: torch.where(x > 0.9, x, torch.inf), ebm.Flat((), constraints.unit_interval)
    )
    estimate = SMC(num_particles=2000)(d)
    truth = math.log(math.exp(-0.9) - math.exp(-1.0))
    assert abs(estimate.value - truth) < FAR * estimate.std_error


def test_a_lattice_too_large_to_enumerate_with_a_kernel_of_its_own():
    target = TARGETS["ising16_3"]
    method = SMC(lambda u: heat_bath(u, checkerboard(16)), 200, 3)
    estimate = method(target.make())
    assert abs(estimate.value - target.log_z()) < FAR * estimate.std_error
    assert estimate.std_error < 0.5
    assert method.num_temperatures > 10


def test_one_hot_supports_are_swept_place_by_place():
    logits = torch.tensor([0.3, -1.0, 2.0, 0.5])
    d = ebm.GibbsBoltzmann(lambda x: -(x.double() @ logits), ebm.Flat((4,), constraints.one_hot))
    estimate = SMC(num_particles=500)(d)
    assert abs(estimate.value - Exact()(d).value) < FAR * estimate.std_error


@settings(max_examples=10)
@given(st.lists(st.integers(1, 3), max_size=2), st.lists(st.integers(1, 3), max_size=2))
def test_shapes_follow_batch_and_event(batch, event):
    base = dist.Normal(0.0, 1.0).expand(event).to_event(len(event))
    d = ebm.GibbsBoltzmann(lambda x: -base.log_prob(x), base, torch.ones(batch))
    method = SMC(num_particles=20, num_moves=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ebm.UnnormalizedWarning)  # twenty particles
        estimate, (x, log_weight) = method(d), method.weighted(d)
    assert all(part.shape == torch.Size(batch) for part in estimate)
    assert x.shape == (20, *batch, *event)
    assert log_weight.shape == (20, *batch)


def test_few_families_are_said():
    with pytest.warns(ebm.UnnormalizedWarning, match="effective sample size"):
        SMC(num_particles=20, num_moves=1)(TARGETS["gaussian20"].make())


def test_a_path_too_long_is_refused(monkeypatch):
    monkeypatch.setattr(_climb, "MAX_TEMPERATURES", 3)
    with pytest.raises(ebm.UnnormalizedError, match="came to a halt at t = "):
        SMC(num_particles=100)(TARGETS["gaussian2"].make())


def test_a_spike_that_all_particles_but_one_miss_is_said():
    d = ebm.GibbsBoltzmann(lambda x: 1e40 * x.square(), dist.Normal(torch.zeros(()), 1.0))
    with pytest.warns(ebm.UnnormalizedWarning, match="cannot be trusted"):
        SMC(num_particles=100)(d)


WRONG = {
    "particles": ({"num_particles": 1}, "num_particles must be a whole number"),
    "moves": ({"num_moves": 0}, "num_moves must be a whole number"),
    "threshold": ({"ess_threshold": 1.5}, "ess_threshold must be between"),
}


@pytest.mark.parametrize(("options", "message"), WRONG.values(), ids=WRONG)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SMC(**options)


def test_as_a_log_partition_it_has_the_gradient_of_its_particles():
    k = torch.tensor(1.5, requires_grad=True)
    d = ebm.GibbsBoltzmann(lambda x: 0.5 * k * x.square(), dist.Normal(0.0, 2.0))
    value = SMC(num_particles=4000).log_z(d)
    (grad,) = torch.autograd.grad(value, k)
    truth = -0.5 * torch.log(1 + 4 * k.detach())
    # Four thousand particles: errors of about a hundredth, so five of them.
    assert abs(value.detach() - truth) < 0.05
    assert abs(grad - -2.0 / (1 + 4 * k.detach())) < 0.05
