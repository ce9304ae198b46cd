"""Bounds of log Z by a guide: that they bound, what is left, gradients and training."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pyro.distributions import constraints
from pyro.infer import MCMC, NUTS, SVI, Trace_ELBO
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal, AutoNormal
from pyro.optim import Adam
from torch import nn

import pyro_ebm as ebm
from pyro_ebm.partition import Exact, Quadrature, Variational, log_partition, variational
from tests.common import EXACT, FAR

BETAS = [0.25, 1.0, 8.0]


def normal(beta=1.0, k=2.0, m=1.0):
    """The energy k (x - m)^2 / 2, which a normal guide can match."""
    return ebm.GibbsBoltzmann(lambda x: 0.5 * k * (x - m) ** 2, ebm.Flat(), beta)


def normal_log_z(beta=1.0, k=2.0):
    return 0.5 * math.log(2 * math.pi / (beta * k))


def divergence(loc, scale, beta=1.0, k=2.0, m=1.0):
    """KL(N(loc, scale^2) | p), the gap of the ELBO."""
    p = torch.distributions.Normal(m, (beta * k) ** -0.5)
    return torch.distributions.kl_divergence(torch.distributions.Normal(loc, scale), p)


def ratio(difference, *errors):
    return (difference / torch.stack([e.square() for e in errors]).sum(0).sqrt()).abs()


def function():
    loc = pyro.param("loc", torch.tensor(0.6))
    scale = pyro.param("scale", torch.tensor(1.1), constraint=constraints.positive)
    return pyro.sample("x", dist.Normal(loc, scale))


def auto(beta):
    guide = AutoNormal(lambda: pyro.sample("x", normal(beta)), init_scale=1.1)
    guide()
    with torch.no_grad():
        guide.locs.x.fill_(0.6)
    return guide


GUIDES = {
    "a distribution": lambda beta: dist.Normal(torch.tensor(0.6), torch.tensor(1.1)),
    "a function": lambda beta: function,
    "an autoguide": auto,
}


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("make", GUIDES.values(), ids=GUIDES)
def test_the_elbo_is_log_z_less_the_divergence(make, beta):
    d, guide = normal(beta), make(beta)
    value, std_error, ess = log_partition(d, Variational(guide, num_draws=20_000))
    truth = normal_log_z(beta) - divergence(0.6, 1.1, beta)
    assert ratio(value - truth, std_error) < FAR
    assert 0 < ess < 20_000
    assert value < normal_log_z(beta)


def test_a_guide_that_is_exact_has_no_gap_and_no_error(device):
    one = torch.ones((), device=device)
    d = ebm.GibbsBoltzmann(lambda x: (x - 1) ** 2, ebm.Flat(device=device), 2.0)
    for guide in (dist.Normal(one, 0.5), lambda: pyro.sample("x", dist.Normal(one, 0.5))):
        for common in (False, True):
            method = Variational(guide, common_random_numbers=common)
            value, std_error, ess = log_partition(d, method)
            torch.testing.assert_close(value, normal_log_z(2.0) * one, **EXACT)
            assert std_error < 1e-12
            assert abs(ess - 64) < 1e-6


def test_the_density_of_the_guide_left_out_is_seen(monkeypatch):
    """The planted fault of the tests above."""
    right = variational.points_of

    def without(d, draws):
        return right(d, draws._replace(log_q=torch.zeros_like(draws.log_q)))

    monkeypatch.setattr(variational, "points_of", without)
    value, std_error, _ = log_partition(
        normal(), Variational(dist.Normal(0.6, 1.1), num_draws=999)
    )
    assert ratio(value - normal_log_z() + divergence(0.6, 1.1), std_error) > 2 * FAR


def test_an_autoguide_on_a_bounded_support_counts_its_jacobian():
    """A log-normal guide of a Gamma law: the gap is a KL that quadrature gives."""
    d = ebm.GibbsBoltzmann(lambda x: x - 1.5 * x.log(), ebm.Flat((), constraints.positive))
    guide = AutoNormal(lambda: pyro.sample("x", d), init_scale=0.7)
    guide()
    with torch.no_grad():
        guide.locs.x.fill_(0.8)
    value, std_error, _ = log_partition(d, Variational(guide, num_draws=20_000))
    # E[x] and E[log x] of a log-normal, and its entropy.
    truth = -math.exp(0.8 + 0.5 * 0.49) + 1.5 * 0.8
    truth += 0.8 + 0.5 * math.log(2 * math.pi * math.e * 0.49)
    assert ratio(value - truth, std_error) < FAR
    assert truth < math.lgamma(2.5)


def test_all_sites_of_an_autoguide_count_once():
    base = ebm.Flat((3,))
    d = ebm.GibbsBoltzmann(lambda x: x.square().sum(-1), base)
    guide = AutoMultivariateNormal(lambda: pyro.sample("x", d), init_scale=0.7)
    guide()
    with torch.no_grad():
        guide.loc.zero_()
    q = dist.MultivariateNormal(guide.loc.detach(), scale_tril=guide.get_posterior().scale_tril)
    both = [log_partition(d, Variational(g, num_draws=4000)) for g in (guide, q)]
    assert ratio(both[0].value - both[1].value, both[0].std_error, both[1].std_error) < FAR


@pytest.mark.slow
def test_more_particles_tighten_the_bound():
    d, guide = normal(), dist.Normal(0.0, 1.5)
    bounds = [log_partition(d, Variational(guide, k, num_draws=20_000)) for k in (1, 2, 5, 30)]
    for a, b in zip(bounds, bounds[1:], strict=False):
        assert (b.value - a.value) / torch.hypot(a.std_error, b.std_error) > FAR
    assert bounds[-1].value < normal_log_z() + FAR * bounds[-1].std_error
    assert abs(bounds[-1].value - normal_log_z()) < 0.05


def test_the_gap_is_the_divergence():
    d, method = normal(), Variational(dist.Normal(0.6, 1.1), num_draws=4000)
    for gap in (method.gap(d, num_particles=20_000), method.gap(d, Quadrature())):
        assert ratio(gap.value - divergence(0.6, 1.1), gap.std_error) < FAR
        assert gap.value > FAR * gap.std_error
    with pytest.warns(ebm.UnnormalizedWarning, match="particles of the guide cannot be trusted"):
        Variational(dist.Normal(-9.0, 0.3)).gap(d)


def gradient_errors(make, k, num=200, **options):
    """Return the gradients of bounds in two parameters, averaged, with their standard errors."""
    grads = []
    for _ in range(num):
        theta = torch.tensor([0.6, 1.1], requires_grad=True)
        value = Variational(make(theta), k, **options).log_z(normal())
        grads.append(torch.autograd.grad(value, theta)[0])
    grads = torch.stack(grads)
    return grads.mean(0), grads.std(0) / num**0.5


class Scored(dist.Normal):
    """A normal distribution that keeps how to differentiate its draws to itself."""

    has_rsample = False


@pytest.mark.parametrize("kind", [dist.Normal, Scored], ids=["reparametrised", "by its score"])
def test_the_gradient_in_the_guide_is_minus_that_of_the_divergence(kind):
    theta = torch.tensor([0.6, 1.1], requires_grad=True)
    (truth,) = torch.autograd.grad(-divergence(*theta), theta)
    mean, error = gradient_errors(lambda t: kind(t[0], t[1]), 1)
    assert ((mean - truth).abs() < FAR * error).all()
    assert (error < 0.1 * truth.abs()).all()


@pytest.mark.slow
def test_the_score_gives_the_gradient_of_tight_bounds_too():
    (a, e), (b, f) = (
        gradient_errors(lambda t, kind=kind: kind(t[0], t[1]), 5, 400)
        for kind in (dist.Normal, Scored)
    )
    assert ((a - b).abs() < FAR * torch.hypot(e, f)).all()


def test_without_the_score_the_gradient_is_wrong(monkeypatch):
    """The planted fault of the two tests above."""
    monkeypatch.setattr(Variational, "_score", lambda self, each, log_q: 0.0)
    theta = torch.tensor([0.6, 1.1], requires_grad=True)
    (truth,) = torch.autograd.grad(-divergence(*theta), theta)
    mean, error = gradient_errors(lambda t: Scored(t[0], t[1]), 1)
    assert ((mean - truth).abs() > FAR * error).any()


@pytest.mark.parametrize("beta", BETAS)
def test_the_gradient_in_energy_and_beta_is_that_of_the_potential_under_the_guide(beta):
    k = torch.tensor(2.0, requires_grad=True)
    b = torch.tensor(beta, requires_grad=True)
    d = ebm.GibbsBoltzmann(lambda x: 0.5 * k * (x - 1) ** 2, ebm.Flat(), b)
    bound = Variational(dist.Normal(0.6, 1.1), num_draws=50_000).log_z(d)
    got = torch.autograd.grad(bound, [k, b])
    second = 1.1**2 + 0.4**2  # E_q (x - 1)^2
    # Five standard errors of 5e4 squares of normals: 3 per cent.
    torch.testing.assert_close(got[0], torch.tensor(-0.5 * beta * second), rtol=0.04, atol=0.0)
    torch.testing.assert_close(got[1], torch.tensor(-second), rtol=0.04, atol=0.0)


@pytest.mark.slow
def test_a_guide_of_finite_values_is_trained_by_its_score():
    w = torch.tensor([1.0, -2.0, 0.5])
    d = ebm.GibbsBoltzmann(lambda x: (w * x).sum(-1), ebm.Flat((3,), constraints.boolean))
    logits = torch.zeros(3, requires_grad=True)
    optim = torch.optim.Adam([logits], lr=0.05)
    for _ in range(200):
        q = dist.Bernoulli(logits=logits, validate_args=False).to_event(1)
        loss = -Variational(q).log_z(d)
        optim.zero_grad()
        loss.backward()
        optim.step()
    bound, truth = (log_partition(d, m).value for m in (Variational(q), Exact()))
    assert abs(bound - truth) < 0.02


# Guides of conditional laws ----------------------------------------------------------------------

Y = torch.linspace(-2.0, 2.0, 5, dtype=torch.float64)


def pair(y, z):
    return 0.5 * (y - z) ** 2


def joint(y=None):
    return ebm.GibbsBoltzmann(ebm.Given(pair, Y if y is None else y, ...), dist.Normal(0.0, 1.0))


def joint_log_z(y):
    return -0.5 * math.log(2) - y**2 / 4


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(1, 2)

    def forward(self, y):
        pyro.module("encoder", self)
        loc, log_scale = self.net(y.unsqueeze(-1)).unbind(-1)
        with pyro.plate("rows", len(y)):
            pyro.sample("z", dist.Normal(loc, log_scale.exp()))


@pytest.mark.slow
def test_an_amortised_guide_is_trained_by_svi_and_bounds_each_element():
    method = Variational(Encoder(), site="z")
    losses = method.fit(joint(), 1000, Adam({"lr": 0.02}))
    assert losses.shape == (1000,)
    assert losses[-1] < losses[0]
    fine = Variational(method.guide, site="z", num_draws=20_000)
    value, std_error, ess = log_partition(joint(), fine)
    assert value.shape == std_error.shape == ess.shape == (5,)
    # A linear guide can be exact; Adam's steps of 0.02 leave it that far from the best, and the
    # divergence goes with the square.
    assert (value - joint_log_z(Y)).abs().max() < 0.01
    other = torch.tensor([0.3, -1.7])  # points that it has not seen
    assert (fine.log_z(joint(other)) - joint_log_z(other)).abs().max() < 0.01


def test_a_batch_equals_its_elements_one_by_one():
    y = torch.tensor([-1.0, 0.5, 2.0])
    many = log_partition(joint(y), Variational(dist.Normal(y / 2, 0.8), 3, num_draws=4000))
    for i in range(3):
        d, q = joint(y[i]), dist.Normal(y[i] / 2, 0.8)
        one = log_partition(d, Variational(q, 3, num_draws=4000))
        assert ratio(one.value - many.value[i], one.std_error, many.std_error[i]) < FAR


def test_one_guide_may_serve_several_temperatures():
    beta = torch.tensor([0.5, 1.0, 2.0])
    for guide in (dist.Normal(0.6, 1.1), function):
        value, std_error, _ = log_partition(normal(beta), Variational(guide, num_draws=4000))
        truth = torch.stack([normal_log_z(b) - divergence(0.6, 1.1, b) for b in beta.tolist()])
        assert (ratio(value - truth, std_error) < FAR).all()


def test_fit_leaves_the_energy_alone():
    energy = nn.Linear(1, 1)
    d = ebm.GibbsBoltzmann(
        lambda x: energy(x).square().sum(-1) + x.square().sum(-1), ebm.Flat((1,))
    )

    def guide():
        pyro.sample("x", dist.Normal(pyro.param("loc", torch.zeros(1)), 1.0).to_event(1))

    before = [p.clone() for p in energy.parameters()]
    Variational(guide).fit(d, 3)
    assert all(p.grad is None and p.requires_grad for p in energy.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, energy.parameters(), strict=True))
    assert [*pyro.get_param_store()] == ["loc"]


@pytest.mark.slow
def test_the_user_trains_a_guide_by_stock_svi():
    d = normal()
    scored = ebm.GibbsBoltzmann(d.energy, d.base, log_partition="constant")
    svi = SVI(lambda: pyro.sample("x", scored), function, Adam({"lr": 0.05}), Trace_ELBO(10))
    for _ in range(300):
        svi.step()
    gap = Variational(function, num_draws=1000).gap(d, Quadrature())
    assert gap.value < 0.02


# In Pyro's engines -------------------------------------------------------------------------------


def test_a_guide_is_not_trained_by_the_points_that_are_scored():
    """What raises a log-density lowers this log Z: the guide would run away from it."""
    k = torch.tensor(2.0, requires_grad=True)
    energy = lambda x: 0.5 * k * (x - 1) ** 2
    method = Variational(function)
    d = ebm.GibbsBoltzmann(energy, ebm.Flat(), log_partition=method)
    assert d.is_normalized
    d.log_prob(torch.zeros(3)).sum().backward()
    assert k.grad != 0
    store = pyro.get_param_store()
    assert store["loc"].grad is None
    assert store._params["scale"].grad is None
    method.log_z(d).backward()
    assert store["loc"].grad != 0


def test_the_parameters_of_a_guide_inside_a_model_are_seen_by_svi_and_its_sites_are_not():
    def model():
        with pyro.plate("rows", 2):
            d = ebm.GibbsBoltzmann(lambda x: (x - 1) ** 2, ebm.Flat())
            pyro.factor("bound", Variational(function).log_z(d).expand(2))

    trace = pyro.poutine.trace(model).get_trace()
    sites = {n for n, s in trace.nodes.items() if s["type"] in ("param", "sample")}
    assert sites == {"rows", "loc", "scale", "bound"}


def posterior(method):
    k = pyro.sample("k", dist.Gamma(3.0, 2.0))
    d = ebm.GibbsBoltzmann(lambda x: k * x**2, dist.Normal(0.0, 1.0), log_partition=method)
    with pyro.plate("n", 20):
        pyro.sample("x", d, obs=torch.linspace(-1.0, 1.0, 20))


def test_mcmc_needs_common_random_numbers():
    q = dist.Normal(0.0, 0.6)
    fresh = MCMC(NUTS(posterior), num_samples=1, warmup_steps=1, disable_progbar=True)
    with pytest.raises(ebm.UnnormalizedError, match="log_partition=Variational draws fresh"):
        fresh.run(Variational(q))
    method = Variational(q, common_random_numbers=True)
    MCMC(NUTS(posterior), num_samples=2, warmup_steps=2, disable_progbar=True).run(method)


@pytest.mark.parametrize("guide", [dist.Normal(0.6, 1.1), function], ids=["given", "function"])
def test_common_random_numbers_make_the_bound_a_function(guide):
    method = Variational(guide, common_random_numbers=True)
    first, state = method.log_z(normal()), torch.get_rng_state()
    assert torch.equal(first, method.log_z(normal()))
    assert torch.equal(torch.get_rng_state(), state)
    fresh = Variational(guide)
    assert not torch.equal(fresh.log_z(normal()), fresh.log_z(normal()))


# Identities --------------------------------------------------------------------------------------


@given(shift=st.floats(-100, 100), beta=st.floats(0.1, 10.0), k=st.integers(1, 4))
def test_a_shift_of_the_energy_is_one_of_the_bound(shift, beta, k):
    method = Variational(dist.Normal(0.6, 1.1), k, common_random_numbers=True)
    plain = normal(beta)
    shifted = ebm.GibbsBoltzmann(lambda x: plain.energy(x) + shift, ebm.Flat(), beta)
    got, want = method.log_z(shifted), method.log_z(plain) - beta * shift
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_particles_stand_for_the_density_whatever_the_guide():
    d = normal()
    for guide in (dist.Normal(0.6, 1.1), function):
        method = Variational(guide, 4, num_draws=5000)
        x, log_weight = method.weighted(d)
        assert abs(log_weight.logsumexp(0) - normal_log_z()) < 0.05
        mean = (torch.softmax(log_weight, 0) * x).sum()
        assert abs(mean - 1.0) < 0.05  # five standard errors of 2e4 particles: .04


def test_draws_outside_the_support_weigh_nothing():
    d = ebm.GibbsBoltzmann(lambda x: x, ebm.Flat((), constraints.positive))
    elbo, tight = (
        log_partition(d, Variational(dist.Normal(1.0, 1.0), k)).value for k in (1, 2000)
    )
    assert elbo == -math.inf
    assert abs(tight) < 0.2


def test_single_precision_stays():
    q = dist.Normal(torch.tensor(0.6, dtype=torch.float32), 1.1)
    d = ebm.GibbsBoltzmann(lambda x: (x - 1) ** 2, ebm.Flat(dtype=torch.float32))
    value, std_error, _ = log_partition(d, Variational(q))
    assert value.dtype == std_error.dtype == torch.float32


def with_extra():
    pyro.sample("a", dist.Normal(0.0, 1.0))
    function()


def with_shared():
    a = pyro.sample("a", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
    with pyro.plate("rows", 5):
        pyro.sample("x", dist.Normal(a, torch.ones(5)))


WRONG = {
    "no particle": (lambda: Variational(function, 0), "num_particles must be at least 1, got 0"),
    "one draw": (
        lambda: Variational(function, num_draws=1),
        "num_draws must be at least 2, got 1",
    ),
    "another site": (
        lambda: Variational(function, site="z").log_z(normal()),
        r"site must be one of the guide's, \['x'\], got 'z'",
    ),
    "a second site": (
        lambda: Variational(with_extra).log_z(normal()),
        r"must draw nothing but 'x' and its auxiliary sites, got \['a'\]",
    ),
    "a point": (
        lambda: Variational(AutoDelta(lambda: pyro.sample("x", normal()))).log_z(normal()),
        "guide must have a density, got a point",
    ),
    "elements that share": (
        lambda: Variational(with_shared).log_z(normal(torch.linspace(1.0, 2.0, 5))),
        r"on their own, .* got sites of batch shapes {'a': \(1,\), 'x': \(5,\)}",
    ),
}


@pytest.mark.parametrize(("wrong", "message"), WRONG.values(), ids=WRONG)
def test_a_wrong_argument_is_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        wrong()


def test_a_distribution_is_trained_by_hand():
    with pytest.raises(TypeError, match=r"minimise -log_z\(d\) in its parameters"):
        Variational(dist.Normal(0.0, 1.0)).fit(normal(), 1)
