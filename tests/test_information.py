"""Entropies, divergences, Bayes factors and fixed log Z, against enumeration and closed forms."""

import copy
import math
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pyro.distributions import constraints
from torch import nn

import pyro_ebm as ebm
from pyro_ebm.partition import (
    MBAR,
    SMC,
    Annealed,
    Bridge,
    Contrastive,
    Exact,
    Importance,
    Laplace,
    Quadrature,
    Variational,
    log_partition,
)
from pyro_ebm.partition.base import Weighted
from tests.common import EXACT, FAR, NUMERIC
from tests.partition_targets import TARGETS

SEEDS = 100


def ising(beta):
    target = TARGETS["ising3"]
    return ebm.GibbsBoltzmann(target.energy, target.base(), beta)


def table(d):
    """The probabilities of all states of an unbatched distribution."""
    return torch.softmax(-d.potential(d.enumerate_support()), 0)


def test_finite_distributions_by_enumeration():
    p, q = ising(torch.tensor(0.4)), ising(torch.tensor(0.7))
    a, b = table(p), table(q)
    h, kl = ebm.entropy(p, Exact()), ebm.kl_divergence(p, q, Exact())
    torch.testing.assert_close(h.value, -(a * a.log()).sum(), **EXACT)
    torch.testing.assert_close(kl.value, (a * (a / b).log()).sum(), **EXACT)
    factor = ebm.log_bayes_factor(p, q, Exact())
    want = log_partition(p, Exact()).value - log_partition(q, Exact()).value
    torch.testing.assert_close(factor.value, want, **EXACT)
    for est in (h, kl, factor):
        assert est.std_error == 0
        assert est.ess == math.inf


def gauss(k, mean=0.0):
    return ebm.GibbsBoltzmann(lambda x: 0.5 * k * (x - mean) ** 2, ebm.Flat())


def test_gaussians_by_their_closed_forms():
    p, q = dist.Normal(0.0, 2.0**-0.5), dist.Normal(0.5, 1.0)
    method = Quadrature(-9.0, 9.0, 200)
    entropy = ebm.entropy(gauss(2.0), method).value
    torch.testing.assert_close(entropy, p.entropy(), **NUMERIC)
    kl = ebm.kl_divergence(gauss(2.0), gauss(1.0, 0.5), method).value
    torch.testing.assert_close(kl, torch.distributions.kl_divergence(p, q), **NUMERIC)


def test_gradients_are_those_of_the_enumeration():
    beta, other = (torch.tensor(b, requires_grad=True) for b in (0.4, 0.7))
    a, b = table(ising(beta)), table(ising(other))
    for est, truth in (
        (ebm.entropy(ising(beta), Exact()), -(a * a.log()).sum()),
        (ebm.kl_divergence(ising(beta), ising(other), Exact()), (a * (a / b).log()).sum()),
    ):
        inputs = [beta, other]
        options = {"materialize_grads": True, "retain_graph": True}
        got = torch.autograd.grad(est.value, inputs, **options)
        want = torch.autograd.grad(truth, inputs, **options)
        torch.testing.assert_close(got, want, **EXACT)


def test_the_gradient_of_an_estimate_has_the_change_of_the_law():
    k = torch.tensor(1.5, requires_grad=True)
    base = dist.Normal(torch.zeros(1), 2.0).to_event(1)
    d = ebm.GibbsBoltzmann(lambda x: 0.5 * k * x.square().sum(-1), base)
    x = torch.randn(200_000, 1) / (k.detach() + 0.25).sqrt()
    (got,) = torch.autograd.grad(ebm.entropy(d, Bridge(samples=x)).value, k)
    (want,) = torch.autograd.grad(-0.5 * (k + 0.25).log(), k)
    # a covariance of squares from 2e5 draws, five standard errors
    torch.testing.assert_close(got, want, rtol=0.05, atol=0.0)


METHODS = {
    "importance": lambda: Importance(num_particles=1000),
    "annealed": lambda: Annealed(num_particles=200, num_steps=10),
    "smc": lambda: SMC(num_particles=500),
    "bridge": lambda: Bridge(num_samples=200),
    "mbar": lambda: MBAR(3, 16, 40, warmup=80),
}


def hidden(seeds):
    """A Gaussian energy over a normal base, repeated, and the law that they make together."""
    base = dist.Normal(torch.zeros(1), 2.0).to_event(1)
    beta = torch.ones(seeds)
    d = ebm.GibbsBoltzmann(lambda x: 0.5 * (x - 1.0).square().sum(-1), base, beta)
    return d, dist.Normal(0.8, 0.8**0.5)


@pytest.mark.slow
@pytest.mark.parametrize("make", METHODS.values(), ids=METHODS)
def test_estimates_are_within_their_own_error_in_nearly_all_seeds(make):
    p, law = hidden(SEEDS)
    base = dist.Normal(torch.zeros(1), 1.5).to_event(1)
    q = ebm.GibbsBoltzmann(lambda x: 0.1 * x.square().sum(-1), base, torch.ones(SEEDS))
    other = dist.Normal(0.0, (1 / 1.5**2 + 0.2) ** -0.5)
    entropy = ebm.entropy(p, make())
    kl = ebm.kl_divergence(p, q, make())
    factor = ebm.log_bayes_factor(p, q, make())
    log_p = dist.Normal(1.0, 5.0**0.5).log_prob(torch.tensor(0.0)) + 0.5 * math.log(2 * math.pi)
    truths = (
        law.entropy(),
        torch.distributions.kl_divergence(law, other),
        log_p + 0.5 * math.log(1 + 0.2 * 1.5**2),
    )
    for est, truth in zip((entropy, kl, factor), truths, strict=True):
        z = (est.value - truth) / est.std_error
        # standard normal, or Student's t with 31 degrees: 6 beyond 3 in 100 is p < 1e-4
        assert (z.abs() > 3).sum() < 6
        assert z.std() < 1.4


def test_the_error_has_the_correlation_of_log_z_and_the_mean():
    # Where the energy is U = c + V with a large mean, log Z and <U> go against each other.
    d, law = hidden(SEEDS)
    method = Importance(num_particles=500)
    est = ebm.entropy(d, method)
    z = (est.value - law.entropy()) / est.std_error
    assert 0.7 < z.std() < 1.4
    parts = torch.stack([log_partition(d, method).std_error for _ in range(3)]).mean()
    x = method.weighted(d)
    share = torch.softmax(x.log_weight, 0)
    u = d.potential(x.x)
    mean = (share * u).sum(0)
    alone = (share.square() * (u - mean).square()).sum(0).sqrt()
    apart = (est.value - law.entropy()) / (parts.square() + alone.square()).sqrt()
    assert abs(apart.std() - 1) > abs(z.std() - 1)  # the planted fault: added as independent


class Families:
    """Particles of which each is there ten times, and whose reported error knows it."""

    value, gradient = "estimated", "estimated"

    def __init__(self):
        self.plain = Importance(num_particles=200)

    def weighted(self, d):
        x, log_weight = self.plain.weighted(d)
        again = torch.arange(200).repeat_interleave(10)
        return Weighted(x[again], log_weight[again] - math.log(10))

    def __call__(self, d):
        return self.plain(d)


def test_relations_between_particles_count_where_a_method_reports_them():
    d, law = hidden(SEEDS)
    est = ebm.entropy(d, Families())
    z = (est.value - law.entropy()) / est.std_error
    assert 0.7 < z.std() < 1.4


def test_batches_of_the_two_distributions_broadcast():
    base = ebm.Flat((2,), constraints.boolean)
    make = lambda beta: ebm.GibbsBoltzmann(lambda x: -x.sum(-1), base, beta)
    q = torch.tensor([0.5, 2.0])
    got = ebm.kl_divergence(make(1.0), make(q), Exact()).value
    want = ebm.kl_divergence(make(torch.ones(2)), make(q), Exact()).value
    torch.testing.assert_close(got, want, **EXACT)
    table = ebm.kl_divergence(make(q), make(q[:, None]), Exact()).value
    assert (table.shape, table.diagonal().abs().max() < 1e-12) == ((2, 2), True)


def test_a_divergence_is_infinite_where_the_other_has_no_density():
    p = ebm.GibbsBoltzmann(lambda x: x**2, dist.Normal(0.0, 1.0))
    half = ebm.GibbsBoltzmann(lambda x: x, ebm.Flat((), constraints.positive))
    box, line = Quadrature(-9.0, 9.0, 200), Quadrature(0.0, 40.0, 200)
    assert ebm.kl_divergence(p, half, box, line).value == math.inf
    inside = ebm.kl_divergence(half, p, line, box)
    # <x> = 1, <x^2> = 2: 2 + 2 / 2 + log(2 pi) / 2 - 1 + log Z, with log Z = -log(3) / 2
    want = 2.0 + 0.5 * math.log(2 * math.pi) - 0.5 * math.log(3.0)
    torch.testing.assert_close(inside.value, torch.tensor(want), **NUMERIC)
    drawn = ebm.kl_divergence(p, half, Importance(num_particles=100), line)
    assert drawn.value == math.inf
    assert not drawn.std_error.isnan()


@given(st.floats(0.1, 2.0), st.floats(0.1, 2.0))
def test_divergences_are_not_negative_and_entropies_at_most_the_volume(a, b):
    assert ebm.kl_divergence(ising(a), ising(b), Exact()).value >= -1e-12
    assert ebm.kl_divergence(ising(a), ising(a), Exact()).value.abs() < 1e-12
    assert ebm.entropy(ising(a), Exact()).value <= 9 * math.log(2)


def test_the_evidence_of_a_conjugate_model():
    y = torch.tensor([0.3, 1.1, -0.4])

    def model(scale):
        likelihood = lambda x: -dist.Normal(x.unsqueeze(-1), 1.0).log_prob(y).sum(-1)
        return ebm.GibbsBoltzmann(likelihood, dist.Normal(0.0, scale))

    def evidence(scale):
        cov = torch.eye(3) + scale**2
        return dist.MultivariateNormal(torch.zeros(3), cov).log_prob(y)

    want = evidence(1.0) - evidence(3.0)
    exact = ebm.log_bayes_factor(model(1.0), model(3.0), Quadrature(-20.0, 20.0, 400))
    torch.testing.assert_close(exact.value, want, **NUMERIC)
    drawn = ebm.log_bayes_factor(model(1.0), model(3.0), Bridge(num_samples=2000))
    assert (drawn.value - want).abs() < FAR * drawn.std_error


WRONG = {
    "points": (lambda p, q: ebm.entropy(p, Contrastive()), TypeError, "weighted points"),
    "shape": (
        lambda p, q: ebm.kl_divergence(p, gauss(1.0), Exact()),
        ValueError,
        "must have one event shape",
    ),
    "kind": (
        lambda p, q: ebm.kl_divergence(p, q, Exact()),
        ValueError,
        "both be discrete or both continuous",
    ),
    "bound": (
        lambda p, q: ebm.log_bayes_factor(p, p, Exact(), Variational(lambda: None)),
        ValueError,
        "not a bound, got Variational",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input_is_named(name):
    p = ising(1.0)
    q = ebm.GibbsBoltzmann(lambda x: x.square().sum((-2, -1)), ebm.Flat((3, 3)))
    call, error, message = WRONG[name]
    with pytest.raises(error, match=message):
        call(p, q)


# A fixed log Z ----------------------------------------------------------------------------------


def test_a_normalised_distribution_integrates_to_one_and_keeps_its_error():
    d = ebm.GibbsBoltzmann(lambda x: 0.5 * x**2, ebm.Flat(), torch.tensor([0.5, 2.0]))
    assert d.log_z is None
    done = d.normalized(Quadrature(-20.0, 20.0, 400))
    assert done.is_normalized
    assert not d.is_normalized
    x = torch.linspace(-20, 20, 4001)
    total = torch.trapezoid(done.log_prob(x.unsqueeze(-1)).exp(), x, dim=0)
    torch.testing.assert_close(total, torch.ones(2), **NUMERIC)
    assert done.log_z.value.shape == (2,)
    wide = done.expand((3, 2))
    assert wide.log_z.std_error.shape == (3, 2)
    torch.testing.assert_close(wide.log_prob(torch.zeros(3, 2))[1], done.log_prob(torch.zeros(2)))
    drawn = d.normalized(Bridge(dist.Normal(0.0, 2.0), 500))
    assert (drawn.log_z.std_error > 0).all()
    again = drawn.log_prob(torch.zeros(2))
    torch.testing.assert_close(drawn.log_prob(torch.zeros(2)), again, rtol=0.0, atol=0.0)


def test_a_normalised_distribution_is_computed_from_an_expanded_one():
    done = ising(0.4).expand((2, 3)).normalized(Exact())
    x = torch.zeros(2, 3, 3, 3)
    assert done.log_prob(x).shape == (2, 3)
    want = ising(0.4).normalized(Exact()).log_prob(x[0, 0])
    torch.testing.assert_close(done.log_prob(x), want.expand(2, 3), **EXACT)


@pytest.mark.slow
def test_it_gives_evidence_and_serves_in_plates_under_nuts():
    d = ebm.GibbsBoltzmann(lambda x: 0.5 * x**2, ebm.Flat()).normalized(Quadrature(-9.0, 9.0, 99))

    def model():
        with pyro.plate("n", 4):
            x = pyro.sample("x", d)
            pyro.sample("y", dist.Normal(x, 1.0), obs=torch.tensor([0.0, 1.0, -1.0, 2.0]))

    def guide():
        with pyro.plate("n", 4):
            pyro.sample("x", dist.Normal(torch.tensor([0.0, 0.5, -0.5, 1.0]), 0.5**0.5))

    posterior = pyro.infer.Importance(model, guide, num_samples=20).run()
    want = dist.Normal(0.0, 2**0.5).log_prob(torch.tensor([0.0, 1.0, -1.0, 2.0])).sum()
    # the guide is the posterior: every weight is the evidence, up to the quadrature
    torch.testing.assert_close(posterior.get_log_normalizer(), want, **NUMERIC)
    mcmc = ebm.MCMC(ebm.NUTS(model), 300, 200, num_chains=8, disable_progbar=True)
    mcmc.run()
    mean = mcmc.get_samples()["x"].mean(0)
    # 2,400 draws of standard deviation .7, nearly independent
    assert (mean - torch.tensor([0.0, 0.5, -0.5, 1.0])).abs().max() < 0.15


class Spring(nn.Module):
    def __init__(self):
        super().__init__()
        self.k = nn.Parameter(torch.tensor(1.0))

    def forward(self, x):
        return 0.5 * self.k * x**2


def spring(beta=1.0):
    energy = Spring()
    d = ebm.GibbsBoltzmann(energy, ebm.Flat(), beta)
    return energy, d.normalized(Quadrature(-9.0, 9.0, 99))


def test_learning_with_a_fixed_log_z_is_refused():
    energy, d = spring()
    with pytest.raises(ebm.UnnormalizedError, match="was computed once.*'energy.k'"):
        d.log_prob(torch.tensor(0.3)).backward()
    x = torch.tensor(0.3, requires_grad=True)
    (grad,) = torch.autograd.grad(d.log_prob(x), x)  # moving points is no learning
    torch.testing.assert_close(grad, torch.tensor(-0.3))


def test_a_fixed_log_z_of_replaced_parameters_is_refused():
    energy = torch.nn.Module()
    energy.k = torch.nn.Parameter(torch.tensor(2.0), requires_grad=False)
    energy.forward = lambda x: energy.k * x.square()
    d = ebm.GibbsBoltzmann(energy, ebm.Flat()).normalized(Quadrature(-9.0, 9.0, 80))
    d.log_prob(torch.zeros(()))
    d.beta = 3.0
    with pytest.raises(ebm.UnnormalizedError, match="'beta' has changed since"):
        d.log_prob(torch.zeros(()))
    d.beta = 1.0
    energy.k = torch.nn.Parameter(torch.tensor(5.0), requires_grad=False)
    with pytest.raises(ebm.UnnormalizedError, match="'k' has changed since"):
        d.log_prob(torch.zeros(()))


def test_a_fixed_log_z_of_parameters_that_have_changed_is_refused():
    energy, d = spring()
    d.log_prob(torch.tensor(0.3))
    with torch.no_grad():
        energy.k.mul_(2.0)
    with pytest.raises(ebm.UnnormalizedError, match="'k' has changed since"):
        d.log_prob(torch.tensor(0.3))
    beta = torch.tensor(1.0)
    _, d = spring(beta)
    beta.add_(1.0)
    with pytest.raises(ebm.UnnormalizedError, match="'beta' has changed since"):
        d.log_prob(torch.tensor(0.3))
    loc = torch.tensor(0.0)
    d = ebm.GibbsBoltzmann(lambda x: x**2, dist.Normal(loc, 1.0)).normalized(Bridge())
    loc.add_(1.0)
    with pytest.raises(ebm.UnnormalizedError, match="'loc' has changed since"):
        d.log_prob(torch.tensor(0.3))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda d: pickle.loads(pickle.dumps(d))])
def test_copies_have_a_log_z_of_their_own(copied):
    energy, d = spring()
    with torch.no_grad():
        energy.k.mul_(2.0).mul_(0.5)  # its version is not that of a copy
    d = ebm.GibbsBoltzmann(energy, ebm.Flat()).normalized(Quadrature(-9.0, 9.0, 99))
    twin = copied(d)
    assert twin.log_prob(torch.tensor(0.3)) == d.log_prob(torch.tensor(0.3))
    with torch.no_grad():
        twin.energy.k.mul_(2.0)
    with pytest.raises(ebm.UnnormalizedError, match="has changed since"):
        twin.log_prob(torch.tensor(0.3))


def test_a_random_parameter_is_refused_under_mcmc():
    def model():
        k = pyro.sample("k", dist.Gamma(2.0, 1.0))
        d = ebm.GibbsBoltzmann(lambda x: 0.5 * k * x**2, ebm.Flat())
        d = d.normalized(Quadrature(-9.0, 9.0, 99))
        pyro.sample("x", d, obs=torch.tensor(0.3))

    with pytest.raises(ebm.UnnormalizedError, match="random k"):
        ebm.audit(model)
    with pytest.raises(ebm.UnnormalizedError, match="random k"):
        ebm.MCMC(ebm.NUTS(model), 2, disable_progbar=True).run()
    with pytest.raises(ebm.UnnormalizedError, match="computed once.*random 'k'"):
        pyro.infer.MCMC(pyro.infer.NUTS(model), 2, warmup_steps=1, disable_progbar=True).run()


def test_a_learned_parameter_is_refused_under_svi():
    def model():
        k = pyro.param("k", torch.tensor(1.0), constraint=constraints.positive)
        d = ebm.GibbsBoltzmann(lambda x: 0.5 * k * x**2, ebm.Flat())
        d = d.normalized(Quadrature(-9.0, 9.0, 99))
        pyro.sample("x", d, obs=torch.tensor(0.3))

    svi = pyro.infer.SVI(
        model, lambda: None, pyro.optim.Adam({"lr": 0.1}), pyro.infer.Trace_ELBO()
    )
    with pytest.raises(ebm.UnnormalizedError, match="computed once.*learned 'k'"):
        svi.step()


@pytest.mark.parametrize("method", ["exact", None, Exact])
def test_what_is_no_method_is_refused(method):
    d = ebm.GibbsBoltzmann(lambda x: x, ebm.Flat((), constraints.boolean))
    with pytest.raises(TypeError, match="method must be a method of pyro_ebm.partition, got"):
        d.normalized(method)


def test_methods_without_a_value_and_bounds_are_refused():
    d = ebm.GibbsBoltzmann(lambda x: x**2, dist.Normal(0.0, 1.0))
    with pytest.raises(ebm.UnnormalizedError, match="must give a value of log Z"):
        d.normalized(Contrastive(persistent=False))
    with pytest.raises(ValueError, match="must not be a bound"):
        d.normalized(Variational(lambda: None))
    wall = ebm.GibbsBoltzmann(lambda x: torch.full_like(x, torch.inf), dist.Normal(0.0, 1.0))
    with pytest.raises(ValueError, match="log Z must be finite"):
        wall.normalized(Quadrature(-9.0, 9.0, 99))
    assert Laplace().value != "none"
