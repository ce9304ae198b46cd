"""Free energies against enumeration and closed forms, and wherever an energy may go."""

import argparse
import math
import re

import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pyro.distributions import constraints
from pyro.infer import MCMC, NUTS, SVI, Trace_ELBO
from pyro.optim import Adam
from sklearn.cluster import KMeans
from sklearn.datasets import load_digits, load_iris
from sklearn.mixture import GaussianMixture
from torch import nn

import pyro_ebm as ebm
from examples import kmeans
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
    importance,
)
from tests.common import EXACT, FAR, NUMERIC, standard_errors

COUNT = ebm.Flat((), constraints.integer_interval(0, 2))
BETAS = [1e-6, 0.25, 1.0, 8.0, 1e8, math.inf]


class Components(nn.Module):
    """The energies of three Gaussian components in the plane."""

    def __init__(self, device="cpu"):
        super().__init__()
        means = torch.tensor([[0.0, 0.0], [2.0, 1.0], [-1.0, 3.0]], device=device)
        self.means = nn.Parameter(means.to(torch.get_default_dtype()))

    def forward(self, x, k):
        return 0.5 * (x - self.means[k]).square().sum(-1)

    def by_hand(self, x, beta):
        e = torch.stack([self(x, torch.tensor(k, device=x.device)) for k in range(3)])
        return e.amin(0) if beta == math.inf else -(-beta * e).logsumexp(0) / beta


class Linear(nn.Module):
    """E(x, z) = (x - w z)^2 / 2 with a normal latent: all is Gaussian."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(1.5))

    def forward(self, x, z):
        return 0.5 * (x - self.w * z).square()

    def by_hand(self, x, beta):
        if beta == math.inf:
            return 0.0 * x * self.w
        a = 1 + beta * self.w**2
        return 0.5 * x.square() / a + 0.5 * a.log() / beta


# Exact methods ----------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("batch", [(), (3,), (2, 3)], ids=str)
def test_enumeration_equals_the_sum_by_hand(batch, beta, device):
    E, x = Components(device), torch.randn(*batch, 2, device=device, requires_grad=True)
    F = ebm.FreeEnergy(E, ebm.Flat((), constraints.integer_interval(0, 2), device=device), beta)
    value, truth = F(x), E.by_hand(x, beta)
    assert value.shape == batch
    # At 1e-6 both lose digits to log(3) / beta, a million.
    torch.testing.assert_close(value, truth, rtol=1e-10, atol=1e-9)
    got, want = (torch.autograd.grad(v.sum(), [x, E.means]) for v in (value, truth))
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("beta", [0.25, 1.0, 8.0])
def test_quadrature_equals_the_gaussian_integral(beta):
    E, x = Linear(), torch.linspace(-2.0, 2.0, 5, requires_grad=True)
    b = torch.tensor(beta, requires_grad=True)
    F = ebm.FreeEnergy(E, dist.Normal(0.0, 1.0), b)
    assert isinstance(F.method, Quadrature)
    value, truth = F(x), E.by_hand(x, b)
    torch.testing.assert_close(value, truth, **NUMERIC)
    got, want = (torch.autograd.grad(v.sum(), [x, b, E.w]) for v in (value, truth))
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, **NUMERIC)


def test_the_derivative_in_beta_of_a_batch_of_temperatures():
    E, x = Components(), torch.randn(4, 2)
    beta = torch.tensor([0.3, 1.0, 4.0, 30.0], requires_grad=True)
    value = ebm.FreeEnergy(E, COUNT, beta)(x)
    truth = torch.stack([E.by_hand(x[i], b) for i, b in enumerate(beta)])
    torch.testing.assert_close(value, truth, **EXACT)
    got, want = (torch.autograd.grad(v.sum(), beta)[0] for v in (value, truth))
    torch.testing.assert_close(got, want, **NUMERIC)


@given(st.floats(1e-4, 1e3), st.floats(1.0, 50.0))
def test_it_is_monotone_in_beta(beta, factor):
    E, x = Components(), torch.tensor([[0.3, -0.4], [5.0, 1.0]])
    with torch.no_grad():
        counts = [ebm.FreeEnergy(E, COUNT, b)(x) for b in (beta, beta * factor)]
        shares = [
            ebm.FreeEnergy(E, dist.Categorical(torch.ones(3)), b)(x) for b in (beta, beta * factor)
        ]
        least = ebm.FreeEnergy(E, COUNT, math.inf)(x)
    slack = 1e-9
    assert (counts[1] >= counts[0] - slack).all()
    assert (least >= counts[1] - slack).all()
    assert (shares[1] <= shares[0] + slack).all()
    assert (least <= shares[1] + slack).all()


def test_the_cold_gradient_is_that_at_the_minimum():
    E, x = Components(), torch.randn(6, 2, requires_grad=True)
    F = ebm.FreeEnergy(E, COUNT, math.inf)
    (got,) = torch.autograd.grad(F(x).sum(), x)
    best = torch.stack([E(x, torch.tensor(k)) for k in range(3)]).argmin(0)
    torch.testing.assert_close(got, (x - E.means[best]).detach(), **EXACT)
    assert torch.equal(F.minimum(x).x, best)


def test_a_continuous_latent_is_minimised():
    def E(x, z):
        return (x - z).square().sum(-1) + 0.5 * z.square().sum(-1)

    x = torch.randn(5, 3, requires_grad=True)
    F = ebm.FreeEnergy(E, ebm.Flat((3,)), math.inf)
    value = F(x)
    torch.testing.assert_close(F.minimum(x).x, (x * 2 / 3).detach(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(value, x.square().sum(-1) / 3, **NUMERIC)
    (grad,) = torch.autograd.grad(value.sum(), x)
    torch.testing.assert_close(grad, (2 * x / 3).detach(), rtol=1e-6, atol=1e-6)


def test_a_hot_free_energy_is_the_mean_energy_in_single_precision_too():
    def E(x, z):
        return 0.5 * (x - z).square()

    x = torch.tensor([0.0, 3.0], dtype=torch.float32)
    zero = torch.zeros((), dtype=torch.float32)
    F = ebm.FreeEnergy(E, dist.Normal(zero, zero + 1), 1e-6)
    # Gauss' nodes and weights in float32 are some 1e-6 off.
    torch.testing.assert_close(F(x), 0.5 * (x.square() + 1), rtol=1e-4, atol=0.0)


def test_tempering_comes_before_the_sum():
    E, x, beta = Components(), torch.randn(4, 2), 3.0
    F, F1 = (ebm.FreeEnergy(E, COUNT, b) for b in (beta, 1.0))
    table = torch.stack([E(x, torch.tensor(k)) for k in range(3)])
    joint = (-beta * table).logsumexp(0)  # the marginal of exp(-beta E(x, z))
    torch.testing.assert_close(-beta * F(x), joint, **EXACT)
    assert ((-beta * F1(x)) - joint).abs().max() > 1.0  # beta F_1 is another law


# Methods with errors --------------------------------------------------------------------------


def test_importance_reports_its_error():
    E, x = Linear(), torch.linspace(-2.0, 2.0, 5)
    noisy = ebm.FreeEnergy(E, dist.Normal(0.0, 1.0), 2.0, Importance(num_particles=4000))
    value, std_error, ess, bound = noisy.estimate(x)
    assert ((value - E.by_hand(x, 2.0)).abs() < FAR * std_error).all()
    assert ((ess > 100) & (ess < 4000)).all()
    assert bound == "upper"
    assert not torch.equal(noisy(x), noisy(x))


def amortised(x):
    """The exact posterior of Linear's latent at beta = 2, but for a scale that is too large."""
    precision = 1 + 2.0 * 1.5**2
    mean = 2.0 * 1.5 * x / precision
    pyro.sample("x", dist.Normal(mean, 1.2 * precision**-0.5))


ESTIMATED = {
    "laplace": Laplace,
    "importance": lambda: Importance(num_particles=4000),
    "importance by a guide": lambda: Importance(amortised, 1000),
    "annealed": lambda: Annealed(num_particles=256, num_steps=30),
    "annealed, reverse": lambda: Annealed(num_particles=256, num_steps=30, reverse=True),
    "smc": lambda: SMC(num_particles=512),
    "bridge": lambda: Bridge(num_samples=2000),
    "mbar": lambda: MBAR(4, num_samples=50),
    "variational": lambda: Variational(amortised, num_particles=8, num_draws=256),
}


@pytest.mark.parametrize("make", ESTIMATED.values(), ids=ESTIMATED)
def test_a_method_is_within_its_own_error(make):
    E, x = Linear(), torch.linspace(-2.0, 2.0, 5)
    F = ebm.FreeEnergy(E, dist.Normal(0.0, 1.0), 2.0, make())
    value, std_error, ess, bound = F.estimate(x)
    truth = E.by_hand(x, 2.0)
    assert value.shape == std_error.shape == ess.shape == (5,)
    assert (std_error < 0.1).all()
    too_high, too_low = value - truth > FAR * std_error, truth - value > FAR * std_error
    # Laplace is exact here, up to rounding of its own check.
    exact = torch.isclose(value, truth, rtol=1e-8)
    assert not (too_low & ~exact).any()
    assert bound == "upper" if isinstance(F.method, Variational) else not (too_high & ~exact).any()


SHARED = {  # draws that all points have in common: one function of x, whatever the batch
    "importance": lambda **kw: Importance(num_particles=1000, **kw),
    "importance by a distribution": lambda **kw: Importance(dist.Normal(0.0, 2.0), 1000, **kw),
    "variational": lambda **kw: Variational(dist.Normal(0.0, 0.8), 8, num_draws=128, **kw),
}
APART = {  # draws of each element: a function for each shape of batch
    "importance by a guide": lambda **kw: Importance(amortised, 1000, **kw),
    "variational by a guide": lambda **kw: Variational(amortised, 8, num_draws=128, **kw),
    "annealed": lambda **kw: Annealed(None, 500, 20, **kw),
}
COMMON = {**SHARED, **APART}


def smooth(make):
    method = make(common_random_numbers=True)
    return ebm.FreeEnergy(Linear(), dist.Normal(0.0, 1.0), 2.0, method)


@pytest.mark.parametrize("name", COMMON)
def test_common_random_numbers_make_a_function_of_points(name):
    F, x = smooth(COMMON[name]), torch.linspace(-1.0, 1.0, 5)
    parts = [x, x[:3], x[3], x[:, None], x]
    values = [F(part) for part in parts]
    assert [v.shape for v in values] == [p.shape for p in parts]
    assert torch.equal(values[0], values[-1])
    assert torch.equal(values[1], F(x[:3]))
    for part, value in zip(parts, values, strict=True):
        if name in SHARED:
            whole = F(x)[torch.searchsorted(x, part)]
            torch.testing.assert_close(value, whole, **EXACT)
        elif name != "variational by a guide":  # which is a bound
            truth, error = F.energy.by_hand(part, 2.0), F.estimate(part).std_error
            assert ((value - truth).abs() < FAR * error).all()


@pytest.mark.parametrize("make", COMMON.values(), ids=COMMON)
@pytest.mark.parametrize("shape", [(), (3,)], ids=str)
def test_common_random_numbers_make_it_smooth(make, shape):
    F, x = smooth(make), torch.linspace(-1.0, 1.0, 3).expand(3)
    x = x[0] if shape == () else x
    torch.autograd.gradcheck(F, [x.clone().requires_grad_()])


def test_a_gradient_that_leaves_the_draws_out_is_seen(monkeypatch):
    """The planted fault of the test above."""
    monkeypatch.setattr(importance, "learns", lambda x: False)
    F = smooth(APART["importance by a guide"])
    x = torch.linspace(-1.0, 1.0, 3).requires_grad_()
    assert not torch.autograd.gradcheck(F, [x], raise_exception=False)


def test_particles_that_are_made_again_are_seen():
    """The planted fault of the test of one function: to keep those of the last batch alone."""
    F, x = smooth(APART["annealed"]), torch.linspace(-1.0, 1.0, 5)
    first, _ = F(x), F(x[:3])
    del F.method._kept[0]
    assert not torch.isclose(F(x), first, **NUMERIC).any()


def test_what_cannot_be_one_function_of_points_is_refused():
    def jumps(x):
        pyro.sample("x", dist.Bernoulli(logits=x))

    latent = ebm.Flat((), constraints.boolean)
    E = lambda x, z: (x - z).square()
    for make in (Importance, Variational):
        guided = ebm.FreeEnergy(E, latent, method=make(jumps, 64, common_random_numbers=True))
        with pytest.raises(ValueError, match=r"needs reparametrised draws .* \['x'\] would jump"):
            guided(torch.zeros(3))
        fresh = ebm.FreeEnergy(E, latent, method=make(jumps, 64))
        assert fresh(torch.zeros(3)).shape == (3,)
        five = ebm.FreeEnergy(E, latent, method=make(dist.Bernoulli(torch.full((5,), 0.4)), 64))
        assert five(torch.zeros(5)).shape == (5,)
        with pytest.raises(ValueError, match=r"broadcasts to \(3,\), got \(\) and \(5,\)"):
            five(torch.zeros(3))
    F = smooth(APART["annealed"])
    F(torch.zeros(()))
    with pytest.raises(ebm.UnnormalizedError, match="no longer stand for the distribution"):
        F(torch.tensor([0.0, 40.0]))


def test_bounds_are_turned_round():
    E, x = Linear(), torch.linspace(-2.0, 2.0, 5)
    elbo, iwae = (
        ebm.FreeEnergy(E, dist.Normal(0.0, 1.0), 2.0, Variational(amortised, k, num_draws=4000))
        for k in (1, 8)
    )
    truth = E.by_hand(x, 2.0)
    assert elbo.bound == "upper"
    # The gap of the ELBO is KL(q || p) / beta = (1.2^2 - 1 - 2 log 1.2) / 2 / 2.
    gap = (1.2**2 - 1 - 2 * math.log(1.2)) / 4
    value, std_error, _, _ = elbo.estimate(x)
    assert ((value - truth - gap).abs() < FAR * std_error).all()
    assert (iwae(x) < value).all()
    forward = ebm.FreeEnergy(E, dist.Normal(0.0, 1.0), 2.0, Annealed())
    assert forward.bound == "upper"
    assert ebm.FreeEnergy(E, dist.Normal(0.0, 1.0), 2.0, Annealed(reverse=True)).bound == "lower"


def test_hidden_units_of_a_large_machine_are_summed_one_by_one():
    W, b = torch.randn(6, 30), torch.randn(30)
    E = lambda v, h: -((v @ W + b) * h).sum(-1)
    F = ebm.FreeEnergy(E, ebm.Flat((30,), constraints.boolean), 1.5, Exact(separable=True))
    v = torch.randint(2, (4, 6)).double()
    truth = -torch.nn.functional.softplus(1.5 * (v @ W + b)).sum(-1) / 1.5
    torch.testing.assert_close(F(v), truth, **EXACT)
    F.energy = lambda v, h: E(v, h) + h[..., 0] * h[..., 1]
    with pytest.raises(ValueError, match="separable"):
        F(v)


# What it is for -------------------------------------------------------------------------------


def test_the_posterior_of_the_latent_is_a_distribution():
    E, x = Components(), torch.randn(4, 2)
    posterior = ebm.FreeEnergy(E, COUNT, 2.0).posterior(x)
    table = torch.stack([E(x, torch.tensor(k)) for k in range(3)])
    log_prob = posterior.log_prob(torch.arange(3)[:, None])
    torch.testing.assert_close(log_prob, torch.log_softmax(-2.0 * table, 0), **EXACT)
    assert posterior.sample((7,)).shape == (7, 4)


def test_any_part_may_be_given():
    def E(x, y, z):
        return (x - y * z).square() + (y - 1).square() + 0.1 * z

    latent = ebm.Flat((), constraints.boolean)
    F = ebm.FreeEnergy(E, latent)
    x, y = torch.randn(3, 1), torch.randn(4)
    truth = -torch.logsumexp(torch.stack([-E(x, y, 0.0), -E(x, y, 1.0)]), 0)
    torch.testing.assert_close(F(x, y), truth, **EXACT)
    torch.testing.assert_close(ebm.Given(F, y)(x), truth, **EXACT)
    torch.testing.assert_close(ebm.Given(F, x, ...)(y), truth, **EXACT)
    assert F.posterior(x, y).batch_shape == (3, 4)


def test_it_is_an_energy_for_chains_and_for_learning():
    E = Components()
    E.means.requires_grad_(False)
    F = ebm.FreeEnergy(E, COUNT)
    d = ebm.GibbsBoltzmann(F, ebm.Flat((2,)))
    mcmc = ebm.MCMC(ebm.NUTS(d), 400, num_chains=32, disable_progbar=True)
    mcmc.run()
    draws = mcmc.get_samples(group_by_chain=True)["x"]
    error = draws.mean((0, 1)) - E.means.mean(0)
    # An independent draw of the mixture has a standard deviation of about 1.7; the chains'
    # effective sample size is some thousands.
    assert error.abs().max() < FAR * 1.7 / 1000**0.5


@pytest.mark.slow
def test_stock_pyro_learns_and_samples_a_free_energy():
    E = Components()
    data = torch.cat([E.means.detach() + 0.1 * torch.randn(3, 2) for _ in range(20)])
    pyro.set_rng_seed(1)

    def model():
        pyro.module("E", E)
        F = ebm.FreeEnergy(E, COUNT)
        grid = Quadrature(-9.0, 11.0, 60)
        with pyro.plate("n", len(data)):
            pyro.sample("x", ebm.GibbsBoltzmann(F, ebm.Flat((2,)), log_partition=grid), obs=data)

    with torch.no_grad():
        E.means += 0.3 * torch.randn(3, 2)
    svi = SVI(model, lambda: None, Adam({"lr": 0.05}), Trace_ELBO())
    losses = [svi.step() / len(data) for _ in range(80)]
    p = torch.softmax(-torch.stack([E(data, torch.tensor(k)) for k in range(3)]).detach(), 0)
    at_fixed_point = (p @ data) / p.sum(1, keepdim=True)
    # EM's fixed point is the optimum of the likelihood; Adam is within a few hundredths of it.
    assert (E.means.detach() - at_fixed_point).abs().max() < 0.05
    assert losses[-1] < losses[0]

    method = Quadrature(-8.0, 8.0, 60)  # without looking for the mode at each gradient
    F = ebm.FreeEnergy(Linear(), dist.Normal(0.0, 1.0), method=method)
    kernel = NUTS(lambda: pyro.sample("x", ebm.GibbsBoltzmann(F, ebm.Flat())))
    mcmc = MCMC(kernel, 200, 100, disable_progbar=True)
    mcmc.run()
    x = mcmc.get_samples()["x"]
    assert standard_errors(x, 0.0, (1 + 1.5**2) ** 0.5) < FAR


# Choosing and refusing ------------------------------------------------------------------------


def test_it_picks_the_exact_method_and_says_which():
    assert isinstance(ebm.FreeEnergy(Components(), COUNT).method, Exact)
    assert "method=Exact" in repr(ebm.FreeEnergy(Components(), COUNT))
    assert "method=minimum" in repr(ebm.FreeEnergy(Components(), COUNT, math.inf))
    with pytest.raises(ValueError, match="method must be given for a latent of shape"):
        ebm.FreeEnergy(Linear(), ebm.Flat((4,)))
    with pytest.raises(ValueError, match="method must be given"):
        ebm.FreeEnergy(Linear(), ebm.Flat((40,), constraints.boolean))


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ((1.0, COUNT), TypeError, "energy must be callable, got float"),
        ((Linear(), 3), TypeError, "latent must be a Pyro distribution, got int"),
        ((Linear(), COUNT, 0.0), ValueError, "beta must be positive, got 0.0"),
        ((Linear(), COUNT, -1.0), ValueError, "beta must be positive"),
        ((Linear(), COUNT, math.nan), ValueError, "beta must be positive, got nan"),
        ((Linear(), COUNT, torch.tensor([1.0, -1.0])), ValueError, "beta must be positive"),
        ((Linear(), COUNT, torch.tensor(math.inf)), ValueError, "finite where it is a tensor"),
        ((Linear(), COUNT, 1.0, "exact"), ValueError, "method must be a method of pyro_ebm"),
        ((Linear(), COUNT, math.inf, Exact()), ValueError, "options of minimize"),
    ],
)
def test_bad_arguments_are_named(args, error, message):
    with pytest.raises(error, match=message):
        ebm.FreeEnergy(*args)


def test_bad_energies_are_named():
    with pytest.raises(TypeError, match="energy must return a tensor, got float"):
        ebm.FreeEnergy(lambda x, k: 1.0, COUNT)(torch.zeros(2))
    with pytest.raises(ValueError, match="must return one energy per point"):
        ebm.FreeEnergy(lambda x, k: (x * k).sum(), COUNT)(torch.zeros(3))
    with pytest.raises(ValueError, match="beta must be finite for a posterior"):
        ebm.FreeEnergy(Components(), COUNT, math.inf).posterior(torch.zeros(2))


def test_an_energy_may_bring_a_batch_of_its_own():
    shift = torch.randn(3)
    E = lambda x, k: (x[..., 0] - k).square() + shift * x[..., 1]
    F = ebm.FreeEnergy(E, COUNT)
    for x in (torch.randn(3, 2), torch.randn(1, 2), torch.randn(2)):
        k = torch.arange(3.0)[:, None]
        truth = -(-(x[..., 0] - k).square() - shift * x[..., 1]).logsumexp(0)
        torch.testing.assert_close(F(x), truth, **EXACT)


def test_an_estimate_is_as_precise_as_a_call():
    x = torch.randn(3, 2, dtype=torch.float32)
    E = lambda x, k: (x - 2.0 * k.unsqueeze(-1)).square().sum(-1)
    F = ebm.FreeEnergy(E, dist.Categorical(torch.ones(3, dtype=torch.float32)), 1e-6)
    assert torch.equal(F.estimate(x).value, F(x))


def test_a_nan_is_not_swallowed():
    E = lambda x, k: torch.where(k == 1, torch.nan, x)
    assert ebm.FreeEnergy(E, COUNT)(torch.zeros(3)).isnan().all()


# Models -----------------------------------------------------------------------------------------

WEIGHTS = (0.2, 0.3, 0.5)


def mixture(x, means=None):
    means = torch.tensor([-1.0, 0.0, 2.0]) if means is None else means
    with pyro.plate("n", len(x)):
        k = pyro.sample("k", dist.Categorical(torch.tensor(WEIGHTS)))
        pyro.sample("x", dist.Normal(means[k], 1.0), obs=x)


def hidden_markov(y):
    move = torch.tensor([[0.9, 0.1], [0.3, 0.7]])
    with pyro.plate("n", len(y)):
        z = 0
        for t in pyro.markov(range(y.shape[1])):
            z = pyro.sample(f"z{t}", dist.Categorical(move[z]))
            pyro.sample(f"y{t}", dist.Normal(z * 1.0, 1.0), obs=y[:, t])


def sums_of_paths(y):
    """Return the log-joint of all paths of the hidden Markov model, and the paths."""
    move = torch.tensor([[0.9, 0.1], [0.3, 0.7]])
    paths = torch.cartesian_prod(*[torch.arange(2)] * y.shape[1])
    before = torch.cat([torch.zeros(len(paths), 1, dtype=torch.long), paths[:, :-1]], 1)
    prior = move[before, paths].log().sum(1, keepdim=True)
    return prior + dist.Normal(paths[:, None] * 1.0, 1.0).log_prob(y).sum(-1), paths


@pytest.mark.parametrize("beta", [0.5, 1.0, 8.0, math.inf])
@pytest.mark.parametrize("n", [1, 4])
def test_a_model_of_a_mixture_equals_enumeration(n, beta):
    x, means = torch.randn(n) * 2, torch.tensor([-1.0, 0.0, 2.0], requires_grad=True)
    F = ebm.FreeEnergy.from_model(mixture, ["k"], beta)
    joint = torch.tensor(WEIGHTS).log() + dist.Normal(means, 1.0).log_prob(x[:, None])
    truth = -joint.amax(-1) if beta == math.inf else -(beta * joint).logsumexp(-1) / beta
    value = F(x, means)
    torch.testing.assert_close(value, truth, **EXACT)
    got, want = (torch.autograd.grad(v.sum(), means)[0] for v in (value, truth))
    torch.testing.assert_close(got, want, **EXACT)
    assert torch.equal(F.minimum(x).x["k"], joint.argmax(-1))
    if beta < math.inf:
        share = torch.softmax(beta * joint.detach(), -1)
        torch.testing.assert_close(F.posterior(x)["k"].probs, share, **EXACT)


@pytest.mark.parametrize("beta", [1.0, 3.0, math.inf])
def test_a_hidden_markov_model_equals_all_its_paths(beta):
    y = torch.randn(3, 5)
    joint, paths = sums_of_paths(y)
    F = ebm.FreeEnergy.from_model(hidden_markov, beta=beta)
    truth = -joint.amax(0) if beta == math.inf else -(beta * joint).logsumexp(0) / beta
    torch.testing.assert_close(F(y), truth, **EXACT)
    best = F.minimum(y).x
    assert torch.equal(torch.stack([best[f"z{t}"] for t in range(5)], 1), paths[joint.argmax(0)])
    if beta < math.inf:
        share = torch.softmax(beta * joint, 0)
        on = (share.unsqueeze(-1) * paths.unsqueeze(1)).sum(0)  # (n, 5): chance of state 1
        found = F.posterior(y)
        got = torch.stack([found[f"z{t}"].probs[:, 1] for t in range(5)], 1)
        torch.testing.assert_close(got, on, **EXACT)


def test_inner_plates_are_summed_into_their_data_point():
    def model(x):
        with pyro.plate("n", x.shape[0], dim=-2):
            k = pyro.sample("k", dist.Categorical(torch.tensor(WEIGHTS)))
            with pyro.plate("d", x.shape[1], dim=-1):
                pyro.sample("x", dist.Normal(k * 1.0, 1.0), obs=x)

    x = torch.randn(3, 4)
    normal = dist.Normal(torch.arange(3.0)[:, None, None], 1.0)
    joint = torch.tensor(WEIGHTS).log()[:, None] + normal.log_prob(x).sum(-1)
    F = ebm.FreeEnergy.from_model(model)
    torch.testing.assert_close(F(x), -joint.logsumexp(0), **EXACT)


# Factors that contradict each other by more nats than exponentials of a type have room for.
def at_odds(x, y):
    with pyro.plate("n", len(x)):
        k = pyro.sample("k", dist.Bernoulli(0.25))
        pyro.sample("x", dist.Normal(k * 60.0, 1.0), obs=x)
        pyro.sample("y", dist.Normal(k * 60.0, 1.0), obs=y)


def at_odds_by_hand(x, y, beta=1.0):
    k = torch.tensor([0.0, 1.0])[:, None]
    prior = torch.tensor([0.75, 0.25]).log()[:, None]
    joint = prior + dist.Normal(k * 60.0, 1.0).log_prob(x) + dist.Normal(k * 60.0, 1.0).log_prob(y)
    return -(beta * joint).logsumexp(0) / beta


def test_contradicting_observations_do_not_underflow():
    x = torch.tensor([0.0, 1.0, 60.0])
    y = torch.tensor([60.1, 59.0, 59.0], requires_grad=True)
    got, want = ebm.FreeEnergy.from_model(at_odds)(x, y), at_odds_by_hand(x, y)
    torch.testing.assert_close(got, want, **EXACT)
    torch.testing.assert_close(*(torch.autograd.grad(v.sum(), y)[0] for v in (got, want)), **EXACT)


@pytest.mark.parametrize("beta", [1e-6, 1e4, 1e8])
def test_a_model_has_a_free_energy_at_any_beta(beta):
    x, y = torch.randn(4), torch.randn(4) + 60.0
    value = ebm.FreeEnergy.from_model(at_odds, beta=beta)(x, y)
    # At 1e-6 both lose digits to log(2) / beta.
    torch.testing.assert_close(value, at_odds_by_hand(x, y, beta), rtol=1e-9, atol=1e-8)


def test_pyros_own_contraction_of_contradicting_observations_is_seen(monkeypatch):
    monkeypatch.setattr("pyro_ebm._model_energy._Ring._backend", "pyro.ops.einsum.torch_log")
    x, y = torch.zeros(1), torch.full((1,), 60.0)
    assert ebm.FreeEnergy.from_model(at_odds)(x, y).isinf().all()


def test_a_model_without_plates_is_one_data_point():
    def model(x):
        k = pyro.sample("k", dist.Categorical(torch.tensor(WEIGHTS)))
        pyro.sample("x", dist.Normal(k * 1.0, 1.0), obs=x)

    x = torch.tensor(1.8)
    joint = torch.tensor(WEIGHTS).log() + dist.Normal(torch.arange(3.0), 1.0).log_prob(x)
    F = ebm.FreeEnergy.from_model(model)
    torch.testing.assert_close(F(x), -joint.logsumexp(0), **EXACT)
    torch.testing.assert_close(F.posterior(x)["k"].probs, joint.softmax(0), **EXACT)
    assert F.minimum(x).x["k"] == joint.argmax()


def test_the_minimum_keeps_latents_of_inner_plates_apart():
    def model(x):
        with pyro.plate("n", x.shape[0], dim=-2):
            k = pyro.sample("k", dist.Categorical(torch.tensor(WEIGHTS)))
            with pyro.plate("d", x.shape[1], dim=-1):
                j = pyro.sample("j", dist.Bernoulli(0.3))
                pyro.sample("x", dist.Normal(k + 2.0 * j, 1.0), obs=x)

    x = 2 * torch.randn(3, 4)
    k, j = torch.arange(3.0)[:, None, None], torch.arange(2.0)[:, None, None, None]
    inner = dist.Bernoulli(0.3).log_prob(j) + dist.Normal(k + 2.0 * j, 1.0).log_prob(x)
    joint = torch.tensor(WEIGHTS).log()[:, None] + inner.amax(0).sum(-1)
    found = ebm.FreeEnergy.from_model(model).minimum(x)
    torch.testing.assert_close(found.energy, -joint.amax(0), **EXACT)
    assert torch.equal(found.x["k"], joint.argmax(0))
    best = inner.argmax(0)[found.x["k"], torch.arange(3)]
    assert torch.equal(found.x["j"], best.to(found.x["j"]))


@pytest.mark.parametrize("beta", [0.5, 1.0, 3.0, math.inf])
def test_what_is_masked_out_does_not_count(beta):
    lengths = torch.tensor([4, 2, 1])

    def model(y, lengths):
        with pyro.plate("n", len(y)):
            z = 0
            for t in pyro.markov(range(y.shape[1])):
                with pyro.poutine.mask(mask=t < lengths):
                    move = torch.tensor([[0.9, 0.1], [0.3, 0.7]])
                    z = pyro.sample(f"z{t}", dist.Categorical(move[z]))
                    pyro.sample(f"y{t}", dist.Normal(z * 1.0, 1.0), obs=y[:, t])

    y = torch.randn(3, 4)
    got = ebm.FreeEnergy.from_model(model, beta=beta)(y, lengths)
    F = ebm.FreeEnergy.from_model(hidden_markov, beta=beta)
    alone = [F(row[None, : int(num)]) for row, num in zip(y, lengths, strict=True)]
    torch.testing.assert_close(got, torch.cat(alone), **EXACT)


def test_a_scale_that_is_not_shared_is_refused():
    def model(x):
        with pyro.plate("n", len(x)):
            k = pyro.sample("k", dist.Bernoulli(0.5))
            with pyro.poutine.scale(scale=0.5):
                pyro.sample("x", dist.Normal(k, 1.0), obs=x)

    with pytest.raises(ValueError, match="sites must share one scale, got"):
        ebm.FreeEnergy.from_model(model)(torch.zeros(2))
    with pyro.poutine.scale(scale=2.0):  # a data point counts once
        value = ebm.FreeEnergy.from_model(mixture)(torch.zeros(2))
    torch.testing.assert_close(value, ebm.FreeEnergy.from_model(mixture)(torch.zeros(2)), **EXACT)


def test_a_vector_latent_has_no_minimum_and_says_so():
    def model(x):
        with pyro.plate("n", len(x)):
            k = pyro.sample("k", dist.OneHotCategorical(torch.tensor(WEIGHTS)))
            pyro.sample("x", dist.Normal((k * torch.tensor([-1.0, 0.0, 2.0])).sum(-1), 1.0), obs=x)

    F, same = (ebm.FreeEnergy.from_model(m) for m in (model, mixture))
    torch.testing.assert_close(F(torch.ones(2)), same(torch.ones(2)), **EXACT)
    with pytest.raises(NotImplementedError, match=r"scalars, got the vectors \['k'\]"):
        F.minimum(torch.ones(2))


def test_a_model_that_cannot_be_summed_says_why():
    def continuous(x):
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("n", len(x)):
            k = pyro.sample("k", dist.Bernoulli(0.5))
            pyro.sample("x", dist.Normal(mean + k, 1.0), obs=x)

    def outside(x):
        pyro.sample("y", dist.Normal(0.0, 1.0), obs=torch.tensor(0.3))
        mixture(x)

    x = torch.zeros(2)
    from_model = ebm.FreeEnergy.from_model
    with pytest.raises(ValueError, match=r"no latent sites but \['k'\], got \['mean'\] too"):
        from_model(continuous, ["k"])(x)
    with pytest.raises(ValueError, match=r"latents must have finite supports, got \['mean'\]"):
        from_model(continuous)(x)
    with pytest.raises(ValueError, match=r"latents must be among the latent sites \['k'\]"):
        from_model(mixture, ["z"])(x)
    with pytest.raises(ValueError, match="site 'y' must lie in all plates"):
        from_model(outside)(x)
    with pytest.raises(TypeError, match="model must be callable"):
        from_model(3)
    with pytest.raises(ValueError, match="beta must be positive"):
        from_model(mixture, beta=-1.0)
    with pytest.raises(ValueError, match="call minimum"):
        from_model(mixture, beta=math.inf).posterior(x)
    conditioned = pyro.poutine.condition(continuous, {"mean": torch.tensor(0.0)})
    assert from_model(conditioned, ["k"])


# K-means is the cold mixture --------------------------------------------------------------------


def clustering(name, num_components):
    """Return data, scikit-learn's K-means of them, and our energy at its centres."""
    loaded = {"iris": load_iris, "digits": load_digits}[name]().data
    x = torch.as_tensor(loaded / loaded.max()).double()
    theirs = KMeans(num_components, n_init=3, random_state=0).fit(x.numpy())
    E = kmeans.Centres(torch.as_tensor(theirs.cluster_centers_).to(x))
    return x, theirs, E


@pytest.mark.parametrize(("name", "k"), [("iris", 3), ("digits", 10)])
def test_the_cold_end_is_k_means(name, k):
    x, theirs, E = clustering(name, k)
    F = kmeans.free_energy(E, math.inf)
    torch.testing.assert_close(2 * F(x).sum(), torch.tensor(theirs.inertia_), **NUMERIC)
    assert torch.equal(F.minimum(x).x, torch.as_tensor(theirs.labels_).long())
    again = kmeans.learn_centres(x, E.means, math.inf, 50)  # a fixed point of Lloyd's steps
    assert 2 * kmeans.free_energy(kmeans.Centres(again), math.inf)(x).sum() <= 2 * F(x).sum()


@pytest.mark.parametrize(("name", "k"), [("iris", 3), ("digits", 10)])
@pytest.mark.parametrize("beta", [1.0, 1e2, 1e8])
def test_a_finite_beta_is_a_mixture_of_that_precision(name, k, beta):
    x, _, E = clustering(name, k)
    mixture = GaussianMixture(k, covariance_type="spherical")
    mixture.means_, mixture.weights_ = E.means.numpy(), torch.full((k,), 1 / k).double().numpy()
    mixture.precisions_cholesky_ = torch.full((k,), beta**0.5).double().numpy()
    dim = x.shape[1]
    log_z = 0.5 * dim * math.log(2 * math.pi / beta) + math.log(k)
    ours = -beta * kmeans.free_energy(E, beta)(x) - log_z
    theirs = torch.as_tensor(mixture.score_samples(x.numpy()))
    # scikit-learn expands the square, which loses digits at large beta
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8 * beta + 1e-8)
    share = kmeans.shares(kmeans.free_energy(E, beta), x)
    if beta < 1e8:
        want = torch.as_tensor(mixture.predict_proba(x.numpy()))
        torch.testing.assert_close(share, want, rtol=1e-5, atol=1e-7 * beta)


def test_assignments_lose_their_entropy_as_it_cools():
    x, _, E = clustering("iris", 3)
    entropy = torch.stack(
        [
            torch.special.entr(kmeans.shares(kmeans.free_energy(E, b), x)).sum(-1).mean()
            for b in (1e-6, 1.0, 10.0, 1e2, 1e3, 1e4, 1e8, math.inf)
        ]
    )
    assert (entropy.diff() <= 1e-12).all()
    torch.testing.assert_close(entropy[0], torch.tensor(math.log(3)), **NUMERIC)
    assert entropy[-1] == 0


@pytest.mark.slow
@pytest.mark.parametrize(("name", "k"), [("iris", 3), ("digits", 10)])
def test_annealing_ends_at_least_as_low_as_k_means(name, k):
    x, _, _ = clustering(name, k)
    best = KMeans(k, n_init=10, random_state=0).fit(x.numpy()).inertia_
    args = argparse.Namespace(temperatures=12, restarts=1)
    assert kmeans.polish(x, k, args)[0] <= 1.001 * best


def test_the_warm_end_is_the_mixture_that_em_finds(capsys):
    x = torch.as_tensor(load_iris().data)
    kmeans.warm_end(x)
    ours, theirs, at_theirs = (float(n) for n in re.findall(r"-\d+\.\d+", capsys.readouterr().out))
    assert ours >= theirs - 1e-4
    assert abs(at_theirs - theirs) < 2e-5  # printed to five places
