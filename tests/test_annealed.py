"""Annealed importance sampling: both bounds, their errors, their gradient and their refusals."""

import math
import warnings

import hypothesis.strategies as st
import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given, settings
from pyro.distributions import constraints
from pyro.infer import MCMC, NUTS
from torch import nn

import pyro_ebm as ebm
from pyro_ebm import _path
from pyro_ebm.kernels import hmc, mala
from pyro_ebm.partition import SMC, Annealed, Exact, Quadrature, log_partition
from pyro_ebm.partition.base import MIN_ESS
from tests.common import EXACT, FAR, NUMERIC
from tests.partition_targets import TARGETS, checkerboard, heat_bath, normal

SEEDS = 100  # a batch of equal temperatures: each element has particles of its own
MOST = 5  # P(|z| > 3) = .0027: more than 5 of 100 has a chance of 1e-6


class Wide(nn.Module):
    """A Gaussian energy with precisions and means, and its log Z under a base N(0, s^2)."""

    def __init__(self, dim):
        super().__init__()
        self.k = nn.Parameter(torch.linspace(0.5, 2.0, dim))
        self.m = nn.Parameter(torch.linspace(-1.0, 1.0, dim))

    def forward(self, x):
        return 0.5 * (self.k * (x - self.m).square()).sum(-1)

    def log_z(self, beta, s):
        a = beta * self.k * s**2
        return (-0.5 * (1 + a).log() - 0.5 * beta * self.k * self.m**2 / (1 + a)).sum()


def z_scores(method, d, truth):
    """How far the estimates of a batch are from the truth, in their own standard errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ebm.UnnormalizedWarning)  # some of a hundred may be heavy
        estimate = log_partition(d, method)
    silent = estimate.ess >= MIN_ESS  # the others are warned of
    assert silent.sum() >= 0.9 * silent.numel()
    return ((estimate.value - truth) / estimate.std_error)[silent].detach()


def assert_covers(z):
    assert z.numel() >= 0.9 * SEEDS
    assert (z.abs() > 3).sum() <= MOST
    assert 0.7 < z.std() < 1.4
    assert (
        abs(z.mean()) < FAR / math.sqrt(len(z)) + 0.3
    )  # log Z-hat is biased by half its variance


# On the twelve targets see test_partition_targets.py.
COVERED = {
    "double_well": Annealed(num_particles=150, num_steps=60),
    "simplex": Annealed(num_particles=100, num_steps=40),
    "mala": Annealed(mala, 100, 40),
    "hmc": Annealed(lambda u, step: hmc(u, step, 3), 100, 30),
}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "method"), COVERED.items(), ids=COVERED)
def test_the_truth_is_within_three_errors_in_nearly_all_seeds(name, method):
    target = TARGETS[name] if name in TARGETS else TARGETS["simplex"]
    assert_covers(z_scores(method, target.make(SEEDS), target.log_z()))


@pytest.mark.parametrize(("dim", "num_steps"), [(1, 20), (10, 200)])
def test_gaussians_in_a_wide_base(dim, num_steps):
    energy = Wide(dim)
    d = ebm.GibbsBoltzmann(energy, normal(dim, 3.0), torch.ones(SEEDS))
    assert_covers(z_scores(Annealed(None, 50, num_steps), d, energy.log_z(1.0, 3.0)))


@pytest.mark.slow
def test_fifty_dimensions():
    energy = Wide(50)
    d = ebm.GibbsBoltzmann(energy, normal(50, 3.0), torch.ones(4))
    z = z_scores(Annealed(None, 64, 800), d, energy.log_z(1.0, 3.0))
    assert z.abs().max() < FAR


# Planted faults ----------------------------------------------------------------------------------


def weighed_after(path, z, log_weight, ladder, *, reverse=False):
    """Weights after each move, which are no weights of the path."""
    assert not reverse
    for k in range(len(ladder.t) - 1):
        there = ladder.t[k + 1]
        z, rate = path.move(z, there, _path.Tuning(*(a[k + 1] for a in ladder.tuning)))
        log_weight = log_weight + _path.increment(path.tilt(z), there - ladder.t[k])
    return z, log_weight, rate


def swapped(path, z, log_weight, ladder, *, reverse=False):
    """The way down, from draws of the proposal."""
    return _path.anneal(path, z, log_weight, ladder, reverse=True)


def without_jacobian(potential, transform, event_dim):
    return lambda z: potential(transform(z))


FAULTS = {
    "weights after the move": ("pyro_ebm.partition.annealed.anneal", weighed_after, "gaussian2"),
    "swapped path": ("pyro_ebm.partition.annealed.anneal", swapped, "gaussian2"),
    "no jacobian": ("pyro_ebm._free.unconstrained", without_jacobian, "truncated"),
}


@pytest.mark.parametrize(("where", "fault", "name"), FAULTS.values(), ids=FAULTS)
def test_the_coverage_sees_a_fault(where, fault, name, monkeypatch):
    monkeypatch.setattr(where, fault)
    target, method = TARGETS[name], Annealed(num_particles=300, num_steps=10)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ebm.UnnormalizedWarning)
        estimate = method(target.make(SEEDS))
    z = (estimate.value - target.log_z()) / estimate.std_error
    with pytest.raises(AssertionError):
        assert_covers(z)


# Both bounds -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gaussian2", "ising3", "truncated", "simplex"])
def test_few_steps_bracket_log_z_on_average(name):
    target = TARGETS[name]
    d = target.make(SEEDS)
    d.sampler = exact_draws.get(name)
    method = Annealed(num_particles=16, num_steps=8)
    with warnings.catch_warnings():  # sixteen particles are few
        warnings.simplefilter("ignore", ebm.UnnormalizedWarning)
        lower, upper = method.bracket(d)
    truth = target.log_z()
    assert lower.value.mean() < truth + 3 * lower.value.std() / 10
    assert upper.value.mean() > truth - 3 * upper.value.std() / 10
    assert lower.value.mean() < upper.value.mean()


def gaussian2(d, shape):
    """Draws of a product of normal densities."""
    mean, covariance = torch.tensor([1.0, -0.5]), torch.tensor([[1.0, 0.6], [0.6, 0.5]])
    precision = covariance.inverse() + torch.eye(2) / 4
    law = dist.MultivariateNormal(
        precision.inverse() @ covariance.inverse() @ mean, precision_matrix=precision
    )
    return law.sample(shape + d.batch_shape)


exact_draws = {"gaussian2": gaussian2}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "num"), [("gaussian2", 100), ("ising3", 30)])
def test_the_upper_bound_covers(name, num):
    target = TARGETS[name]
    d = target.make(SEEDS)
    d.sampler = exact_draws.get(name)
    method = Annealed(None, num, num // 2, reverse=True)
    assert_covers(z_scores(method, d, target.log_z()))


def two_modes(x):
    """Two normal densities, a third and two thirds of the mass, twelve deviations apart."""
    near, far = ((x - m).square().sum(-1) for m in (-3.0, 3.0))
    return -torch.logaddexp(-2.0 * near, math.log(2.0) - 2.0 * far)


def bimodal():
    return ebm.GibbsBoltzmann(two_modes, normal(1, 4.0))


def one_mode(num):
    """Draws of the mode on the left."""
    return -3.0 * 16 / 16.25 + torch.randn(num, 1) * math.sqrt(1 / 4.0625)


@pytest.mark.parametrize("call", ["reverse", "bracket"])
def test_starts_in_one_mode_are_noticed(call):
    method = Annealed(None, 400, 100, start=one_mode(400), reverse=call == "reverse")
    ask = method.bracket if call == "bracket" else method
    with pytest.warns(ebm.UnnormalizedWarning, match="reverse starts miss modes"):
        ask(bimodal())


def test_starts_in_both_modes_are_right():
    d = bimodal()
    grid = torch.linspace(-8.0, 8.0, 8001).unsqueeze(-1)
    row = torch.multinomial(torch.softmax(-d.potential(grid), 0), 400, replacement=True)
    lower, upper = Annealed(None, 400, 100, start=grid[row]).bracket(d)
    truth = Quadrature(-12.0, 12.0, 400)(d).value
    for bound in (lower, upper):
        assert abs(bound.value - truth) < FAR * bound.std_error
        assert bound.std_error < 0.1


def test_a_proposal_that_misses_a_mode_leaves_the_bracket_open():
    d = bimodal()
    left = dist.Normal(-3.0, 0.6).expand((1,)).to_event(1)
    both = torch.cat([one_mode(100), -one_mode(200)])
    method = Annealed(None, 300, 20, proposal=left, start=both)
    with pytest.warns(ebm.UnnormalizedWarning):
        method.bracket(d)


# The gradient ------------------------------------------------------------------------------------


@pytest.mark.parametrize("reverse", [False, True])
def test_the_gradient_of_log_z_is_that_of_the_closed_form(reverse):
    energy, beta = Wide(2), torch.tensor(1.3, requires_grad=True)
    d = ebm.GibbsBoltzmann(energy, normal(2, 2.0), beta)
    value = log_partition(d, Annealed(None, 4000, 30, reverse=reverse)).value
    inputs = [beta, *energy.parameters()]
    got = torch.autograd.grad(value, inputs)
    want = torch.autograd.grad(energy.log_z(beta, 2.0), inputs)
    for g, w in zip(got, want, strict=True):
        # Five standard errors of 4,000 particles for integrands with deviations of about a half.
        torch.testing.assert_close(g, w, rtol=0.03, atol=0.04)
    assert not method_value_without_grad(d).requires_grad


def method_value_without_grad(d):
    with torch.no_grad():
        return Annealed(None, 64, 10).log_z(d)


def test_weighted_particles_stand_for_the_density():
    energy = Wide(2)
    d = ebm.GibbsBoltzmann(energy, normal(2, 2.0))
    x, log_weight = Annealed(None, 4000, 30).weighted(d)
    a = 1 / (energy.k + 1 / 4)
    mean = (torch.softmax(log_weight, 0)[:, None] * x).sum(0)
    assert ((mean - a * energy.k * energy.m).abs() < FAR * (a / 3000).sqrt()).all()
    assert abs(log_weight.logsumexp(0) - energy.log_z(1.0, 2.0)) < 0.1


# Supports and shapes -----------------------------------------------------------------------------


def test_one_hot_supports_are_swept_place_by_place():
    logits = torch.tensor([0.3, -1.0, 2.0, 0.5])
    pair = torch.randn(4, 4)

    def energy(x):
        x = x.double()  # Exact has whole numbers
        return -(x @ logits).sum(-1) - torch.einsum(
            "...i,ij,...j", x[..., 0, :], pair, x[..., 1, :]
        )

    d = ebm.GibbsBoltzmann(energy, ebm.Flat((2, 4), constraints.one_hot), torch.ones(SEEDS))
    method = Annealed(None, 64, 20)
    assert_covers(z_scores(method, d, Exact()(d).value))
    x = method.weighted(ebm.GibbsBoltzmann(energy, d.base.expand(()))).x
    assert x.shape == (64, 2, 4)
    assert (x.sum(-1) == 1).all()


def test_integers_and_bases_with_probabilities():
    base = dist.Categorical(torch.tensor([0.1, 0.2, 0.7])).expand((3,)).to_event(1)
    d = ebm.GibbsBoltzmann(lambda x: (x[..., 0] * x[..., 1] - x[..., 2]).double(), base)
    estimate = Annealed(None, 300, 20)(d)
    states = torch.cartesian_prod(*[torch.arange(3)] * 3)
    truth = (-d.potential(states)).logsumexp(0)
    assert abs(estimate.value - truth) < FAR * estimate.std_error


def test_a_lattice_too_large_to_enumerate_with_a_kernel_of_its_own():
    target = TARGETS["ising16_3"]
    method = Annealed(lambda u: heat_bath(u, checkerboard(16)), 64, 200)
    estimate = method(target.make())
    assert abs(estimate.value - target.log_z()) < FAR * estimate.std_error
    assert estimate.std_error < 0.3


def test_a_half_line_needs_a_proposal_and_points_outside_weigh_nothing():
    d = ebm.GibbsBoltzmann(lambda x: x, ebm.Flat((), constraints.positive))
    with pytest.raises(ValueError, match="proposal must be given"):
        Annealed()(d)
    for proposal in (dist.Exponential(0.3), dist.Normal(0.0, 3.0)):
        estimate = Annealed(None, 2000, 20, proposal=proposal)(d)
        assert abs(estimate.value) < FAR * estimate.std_error
    with pytest.raises(ValueError, match="that reaches the distribution"):
        Annealed(None, 64, 20, proposal=dist.Normal(-100.0, 1.0))(d)


def test_walls_are_walls():
    """exp(-x) beyond .5 on a base U(-1, 2): a sixth of the particles never counts."""
    d = ebm.GibbsBoltzmann(
        lambda x: torch.where(x > 0.5, x, torch.inf),
        ebm.Flat((), constraints.interval(-1.0, 2.0)),
    )
    estimate = Annealed(None, 2000, 20)(d)
    truth = math.log(math.exp(-0.5) - math.exp(-2.0))
    assert abs(estimate.value - truth) < FAR * estimate.std_error


@settings(max_examples=15)
@given(
    st.lists(st.integers(1, 3), max_size=2),
    st.lists(st.integers(1, 3), max_size=2),
    st.booleans(),
)
def test_shapes_follow_batch_and_event(batch, event, reverse):
    base = dist.Normal(0.0, 1.0).expand(event).to_event(len(event))
    d = ebm.GibbsBoltzmann(
        lambda x: 0 * x.flatten(x.dim() - len(event)).sum(-1) if event else 0 * x,
        base,
        torch.ones(batch),
    )
    method = Annealed(None, 5, 2, reverse=reverse)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ebm.UnnormalizedWarning)  # five particles
        value, std_error, ess = method(d)
        x, log_weight = method.weighted(d)
    assert value.shape == std_error.shape == ess.shape == torch.Size(batch)
    torch.testing.assert_close(value, torch.zeros(batch), **EXACT)  # no energy: each weight is 1
    torch.testing.assert_close(std_error, torch.zeros(batch), **NUMERIC)
    assert x.shape == (5, *batch, *event)
    assert log_weight.shape == (5, *batch)


ON_DEVICES = {
    "real": lambda device: dist.Normal(torch.zeros(3, device=device), 2.0).to_event(1),
    "interval": lambda device: ebm.Flat((3,), constraints.interval(-1.0, 1.0), device=device),
    "boolean": lambda device: ebm.Flat((3,), constraints.boolean, device=device),
    "one-hot": lambda device: ebm.Flat((3,), constraints.one_hot, device=device),
}


@pytest.mark.parametrize("method", [Annealed(None, 200, 60), SMC(num_particles=200)])
@pytest.mark.parametrize("make", ON_DEVICES.values(), ids=ON_DEVICES)
def test_it_stays_on_its_device(make, method, device):
    # Enumerated one-hot states are whole numbers.
    d = ebm.GibbsBoltzmann(lambda x: (1.0 * x).square().sum(-1), make(device))
    for part in (*log_partition(d, method), *method.weighted(d)):
        assert part.device.type == device.type
    if isinstance(method, Annealed):
        assert method.bracket(d).upper.value.device.type == device.type


def test_single_precision_and_given_parts():
    y = torch.tensor([-1.0, 0.0, 2.0], dtype=torch.float32)
    base = dist.Normal(torch.zeros((), dtype=torch.float32), 2.0)
    d = ebm.GibbsBoltzmann(ebm.Given(lambda x, y: 0.5 * (x - y) ** 2, y), base)
    value, std_error, _ = Annealed(None, 1000, 20)(d)
    assert value.dtype == std_error.dtype == torch.float32
    truth = -0.5 * math.log(5.0) - y**2 / 10
    assert ((value - truth).abs() < FAR * std_error).all()


# What is said and refused ------------------------------------------------------------------------


def test_nan_energies_are_counted_and_weigh_nothing():
    d = ebm.GibbsBoltzmann(
        lambda x: torch.where(x < 1.0, x, torch.nan), ebm.Flat((), constraints.interval(0.0, 2.0))
    )
    with pytest.warns(ebm.UnnormalizedWarning, match=r"was NaN at \d+ of \d+ points"):
        estimate = Annealed(None, 2000, 10)(d)
    assert abs(estimate.value - math.log(1 - math.exp(-1.0))) < FAR * estimate.std_error


def test_energies_at_infinity_are_no_news():
    """Where trajectories diverge."""
    path = _path.Path(ebm.GibbsBoltzmann(lambda x: -x, dist.Normal(0.0, 1.0)))
    u = path.at(torch.tensor(0.5))(torch.tensor([1.0, torch.inf, torch.nan]))
    assert (u == torch.inf).tolist() == [False, True, True]
    path.report("annealing")
    inner = _path.Path(ebm.GibbsBoltzmann(lambda x: x * torch.nan, dist.Normal(0.0, 1.0)))
    inner.excess(torch.tensor([1.0]))
    with pytest.warns(ebm.UnnormalizedWarning, match="was NaN at 1 of 1 points"):
        inner.report("annealing")


def test_minus_infinity_is_refused():
    energy = lambda x: torch.where(x < 0.1, -torch.inf, x)
    d = ebm.GibbsBoltzmann(energy, ebm.Flat((), constraints.interval(0.0, 2.0)))
    with pytest.raises(ValueError, match="must not be minus infinity"):
        Annealed(None, 100, 5)(d)


def test_no_finite_energy_is_refused():
    d = ebm.GibbsBoltzmann(lambda x: x + torch.inf, dist.Normal(0.0, 1.0))
    with pytest.raises(ValueError, match="must be finite where the proposal draws"):
        Annealed(None, 100, 5)(d)


WRONG = {
    "particles": ({"num_particles": 1}, "num_particles must be a whole number"),
    "steps": ({"num_steps": 0}, "num_steps must be a whole number"),
    "reverse": ({"reverse": True, "common_random_numbers": True}, "must be False for reverse"),
}


@pytest.mark.parametrize(("options", "message"), WRONG.values(), ids=WRONG)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Annealed(**options)


UNFIT = {
    "event": ({"proposal": dist.Normal(0.0, 1.0)}, "must have the event shape"),
    "outside": ({"reverse": True, "start": -torch.ones(5, 2)}, "start must hold points of"),
    "one": ({"reverse": True, "start": torch.ones(1, 2)}, "at least two points"),
}


@pytest.mark.parametrize(("options", "message"), UNFIT.values(), ids=UNFIT)
def test_what_does_not_fit_the_distribution_is_refused(options, message):
    base = dist.Exponential(torch.ones(2)).to_event(1)
    d = ebm.GibbsBoltzmann(lambda x: x.sum(-1), base)
    with pytest.raises(ValueError, match=message):
        Annealed(None, 64, 5, **options)(d)


def test_heavy_weights_are_said():
    d = ebm.GibbsBoltzmann(lambda x: -(1.8 * x).sum(-1), normal(1, 1.0))
    with pytest.warns(ebm.UnnormalizedWarning, match="cannot be trusted"):
        Annealed(lambda u, step: mala(u, 1e-9), 1000, 2)(d)


def test_the_cost_is_counted():
    calls = {"points": 0, "gradients": 0}

    def energy(x):
        calls["points"] += x.numel()
        calls["gradients"] += x.numel() if x.requires_grad else 0
        return x**2

    method = Annealed(None, 50, 10)
    method(ebm.GibbsBoltzmann(energy, dist.Normal(0.0, 1.0), validate_args=False))
    assert calls["gradients"] == method.cost.gradients > 0
    assert method.cost.energies > 0
    # What is left are the gradient of the value, by the particles at the end.
    assert calls["points"] - sum(method.cost) in (0, 50)
    assert 0.3 < method.accept_rate <= 1.0


# Common particles --------------------------------------------------------------------------------


def precision_model(method, data):
    k = pyro.sample("k", dist.Gamma(2.0, 2.0))
    d = ebm.GibbsBoltzmann(lambda x: 0.5 * k * x**2, dist.Normal(0.0, 3.0), log_partition=method)
    with pyro.plate("data", len(data)):
        pyro.sample("x", d, obs=data)


def energy_of(k):
    return ebm.GibbsBoltzmann(lambda x: 0.5 * k * x**2, dist.Normal(0.0, 3.0))


def test_common_particles_make_log_z_a_smooth_function_with_its_gradient():
    method = Annealed(None, 2000, 20, common_random_numbers=True)
    method(energy_of(1.0))
    k = torch.tensor(1.4, requires_grad=True)
    value = method.log_z(energy_of(k))
    assert torch.equal(value, method.log_z(energy_of(k)))
    (got,) = torch.autograd.grad(value, k)
    step = 1e-5
    up, down = (method.log_z(energy_of(1.4 + s)) for s in (step, -step))
    torch.testing.assert_close(got, (up - down) / (2 * step), **NUMERIC)
    truth = torch.tensor(-0.5 * math.log(1 + 9 * 1.4))
    assert abs(value - truth) < 0.1


def test_common_particles_of_one_element_serve_a_batch():
    method = Annealed(None, 2000, 20, common_random_numbers=True)
    one = method(energy_of(1.0)).value
    base = dist.Normal(0.0, 3.0)
    d = ebm.GibbsBoltzmann(lambda x: 0.5 * x**2, base, torch.tensor([[1.0], [1.4]]))
    value = method(d).value
    assert value.shape == (2, 1)
    torch.testing.assert_close(value[0, 0], one, **EXACT)


def test_common_particles_that_no_longer_cover_are_refused():
    method = Annealed(None, 200, 20, common_random_numbers=True)
    method(energy_of(1.0))
    with pytest.raises(ebm.UnnormalizedError, match="no longer stand for the distribution"):
        method(energy_of(1e5))


@pytest.mark.slow
def test_the_posterior_of_a_precision_under_nuts_is_that_of_quadrature():
    data = torch.randn(30) * 0.8
    method = Annealed(None, 4000, 20, common_random_numbers=True)
    method(energy_of(1.5))
    mcmc = MCMC(NUTS(precision_model), num_samples=400, warmup_steps=200, disable_progbar=True)
    mcmc.run(method, data)
    k = torch.linspace(1e-3, 12.0, 20_000)
    log_z = -0.5 * (1 + 9 * k).log()
    log_p = dist.Gamma(2.0, 2.0).log_prob(k) - 0.5 * k * data.square().sum() - 30 * log_z
    p = torch.softmax(log_p, 0)
    mean, sd = (p * k).sum(), ((p * k.square()).sum() - (p * k).sum().square()).sqrt()
    # About 150 effective draws, and the error of log Z, a hundredth per datum.
    assert abs(mcmc.get_samples()["k"].mean() - mean) < 0.4 * sd


def test_mcmc_without_common_particles_is_refused():
    data = torch.randn(5)
    mcmc = MCMC(NUTS(precision_model), num_samples=5, warmup_steps=5, disable_progbar=True)
    with pytest.raises(ebm.UnnormalizedError, match="draws fresh particles"):
        mcmc.run(Annealed(None, 64, 5), data)
