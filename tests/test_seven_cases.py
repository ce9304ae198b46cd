"""Seven uses of an energy that are silently wrong without log Z: refused, and right with it."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer import (
    MCMC,
    NUTS,
    SVI,
    Importance,
    RandomWalkKernel,
    Trace_ELBO,
    TraceEnum_ELBO,
    config_enumerate,
    infer_discrete,
)

import pyro_ebm as ebm
from pyro_ebm.partition import Contrastive, Quadrature
from pyro_ebm.partition import Importance as ImportanceZ
from tests.common import NUMERIC

THREE_DIGITS = {"rtol": 5e-4, "atol": 5e-4}
WIDE = Quadrature(-40.0, 40.0, 1200)
METHODS = {"unnormalized": None, "constant": "constant", "quadrature": WIDE}


def gaussian(k, log_partition, **options):
    """The energy k x^2 / 2 as a distribution of numbers."""
    return ebm.GibbsBoltzmann(
        lambda x: 0.5 * k * x**2, ebm.Flat(), log_partition=log_partition, **options
    )


def fit(model, guide=lambda *_: None, steps=400, lr=0.05, tail=100):
    """Run SVI; return each parameter averaged over the tail, and the last loss."""
    svi = SVI(model, guide, pyro.optim.ClippedAdam({"lr": lr, "lrd": 0.99}), Trace_ELBO())
    history = []
    for _ in range(steps):
        loss = svi.step()
        history.append({name: value.detach().clone() for name, value in _params()})
    names = history[-1]
    return {n: torch.stack([h[n] for h in history[-tail:]]).mean(0) for n in names}, loss


def _params():
    store = pyro.get_param_store()
    return [(name, store[name]) for name in store]


def posterior_mean(model, name, grid, *args):
    """Integrate the posterior of one scalar site of a model over a grid."""

    def log_joint(value):
        conditioned = poutine.condition(model, {name: value})
        return poutine.trace(conditioned).get_trace(*args).log_prob_sum().detach()

    p = torch.softmax(torch.stack([log_joint(value) for value in grid]), 0)
    return (p * grid).sum()


DATA = torch.linspace(-1.8, 1.8, 40, dtype=torch.float64)


# 1. SVI on a learnable precision ---------------------------------------------------------------


def learnable_precision(log_partition):
    k = pyro.param("k", torch.tensor(3.0), constraint=constraints.positive)
    with pyro.plate("n", len(DATA)):
        pyro.sample("x", gaussian(k, log_partition), obs=DATA)


def test_svi_of_a_precision_is_refused_without_log_z():
    message = "site 'x' has no log_partition, but log Z depends on the learned 'k'"
    with pytest.raises(ebm.UnnormalizedError, match=message):
        fit(lambda: learnable_precision(None))
    with pytest.raises(ebm.UnnormalizedError, match="site 'x': log Z depends on the learned k"):
        ebm.audit(learnable_precision, None)


def test_svi_of_a_precision_finds_the_maximum_of_the_likelihood():
    params, _ = fit(lambda: learnable_precision(WIDE))
    torch.testing.assert_close(params["k"], 1 / DATA.square().mean(), **THREE_DIGITS)


def test_the_same_without_log_z_runs_away():
    """The planted fault: what declaring a false constant gives."""
    params, _ = fit(lambda: learnable_precision("constant"))
    assert params["k"] < 0.1


def test_svi_of_a_precision_by_negatives_comes_within_their_error():
    torch.manual_seed(0)
    method = Contrastive(num_chains=2000, num_steps=5)
    params, _ = fit(lambda: learnable_precision(method), tail=200)
    # 2,000 chains know E[x^2] to three per cent; persistent over 200 steps, to about one.
    assert abs(params["k"] * DATA.square().mean() - 1) < 0.05


# 2. A prior on the parameter -------------------------------------------------------------------


def random_precision(log_partition):
    k = pyro.sample("k", dist.Gamma(2.0, 1.0))
    with pyro.plate("n", len(DATA)):
        pyro.sample("x", gaussian(k, log_partition), obs=DATA)


# Conjugate: Gamma(2 + n / 2, 1 + sum x^2 / 2).
POSTERIOR = dist.Gamma(2.0 + len(DATA) / 2, 1.0 + 0.5 * DATA.square().sum())
GRID = torch.linspace(0.01, 4.0, 400, dtype=torch.float64)


def nuts(model, *args, draws=300, warmup=200):
    mcmc = MCMC(NUTS(model), num_samples=draws, warmup_steps=warmup, disable_progbar=True)
    mcmc.run(*args)
    return mcmc.get_samples()


@pytest.mark.parametrize("kernel", [NUTS, RandomWalkKernel])
@pytest.mark.parametrize(
    ("method", "message"),
    [
        (Contrastive(), "log_partition=Contrastive gives a new estimate at every evaluation"),
        (ImportanceZ(dist.Normal(0.0, 3.0)), "log_partition=Importance draws fresh particles"),
    ],
    ids=["contrastive", "importance"],
)
def test_mcmc_refuses_a_log_z_without_a_repeatable_value(kernel, method, message):
    with pytest.raises(
        ebm.UnnormalizedError, match=f"site 'x': MCMC needs the value of log Z, and {message}"
    ):
        MCMC(kernel(random_precision), 5, 5, disable_progbar=True).run(method)


def test_a_prior_on_the_parameter_is_refused_without_log_z():
    message = "site 'x' has no log_partition, but log Z depends on the random 'k'"
    with pytest.raises(ebm.UnnormalizedError, match=message):
        nuts(random_precision, None)
    with pytest.raises(ebm.UnnormalizedError, match="site 'x': log Z depends on the random k"):
        ebm.audit(random_precision, None)


def test_a_prior_on_the_parameter_gives_the_conjugate_posterior():
    mean = posterior_mean(random_precision, "k", GRID, WIDE)
    torch.testing.assert_close(mean, POSTERIOR.mean, **THREE_DIGITS)
    wrong = posterior_mean(random_precision, "k", GRID, "constant")
    assert abs(wrong - POSTERIOR.mean) > 0.5


@pytest.mark.slow
# Warm-up steps to precisions of which no particle knows anything; the warning is right.
@pytest.mark.filterwarnings("ignore:log Z by Importance cannot be trusted")
@pytest.mark.parametrize(
    "method",
    [WIDE, ImportanceZ(dist.Normal(0.0, 2.0), 4000, common_random_numbers=True)],
    ids=["quadrature", "importance"],
)
def test_nuts_samples_the_conjugate_posterior(method):
    k = nuts(random_precision, method)["k"]
    # 300 draws of NUTS in one dimension: an effective sample size of 100 at the least.
    assert abs(k.mean() - POSTERIOR.mean) < 5 * POSTERIOR.stddev / 10
    assert abs(k.std() / POSTERIOR.stddev - 1) < 0.3


# 3. The same without data ----------------------------------------------------------------------


def no_data(log_partition):
    k = pyro.sample("k", dist.Gamma(2.0, 0.5))
    pyro.sample("x", gaussian(k, log_partition))


def marginal_of_k(log_partition):
    """The mean of k when x is integrated out, as any sampler of both would find it."""
    x = torch.linspace(-80.0, 80.0, 8001)
    k = torch.linspace(0.005, 40.0, 2000)
    prior = dist.Gamma(2.0, 0.5).log_prob(k)
    scores = [gaussian(value, log_partition).log_prob(x).logsumexp(0) for value in k]
    return (torch.softmax(prior + torch.stack(scores), 0) * k).sum()


def test_an_energy_below_a_random_parameter_is_refused_without_data_too():
    message = "site 'x' has no log_partition, but log Z depends on the random 'k'"
    with pytest.raises(ebm.UnnormalizedError, match=message):
        nuts(no_data, None)
    with pytest.raises(ebm.UnnormalizedError, match="log Z depends on the random k"):
        ebm.audit(no_data, None)


def test_without_data_the_prior_stays_what_it_is():
    mean = marginal_of_k(Quadrature(-80.0, 80.0, 3000))
    torch.testing.assert_close(mean, torch.tensor(4.0), rtol=5e-4, atol=2e-3)
    assert abs(marginal_of_k("constant") - 3.0) < 0.1  # tilted by k^(-1/2)


# 4. A discrete choice of the energy ------------------------------------------------------------

TRUTH = torch.tensor([0.364, 0.636], dtype=torch.float64)
X = torch.tensor(0.3, dtype=torch.float64)
EVEN = torch.full((2,), 0.5, dtype=torch.float64)


@config_enumerate
def choice_by_index(log_partition):
    k = pyro.sample("k", dist.Categorical(EVEN))
    precision = torch.tensor([1.0, 4.0])[k]
    pyro.sample("x", gaussian(precision, log_partition), obs=X)
    return k


@config_enumerate
def choice_by_given(log_partition):
    k = pyro.sample("k", dist.Categorical(EVEN))
    energy = ebm.Given(lambda x, k: 0.5 * torch.tensor([1.0, 4.0])[k] * x**2, k)
    pyro.sample("x", ebm.GibbsBoltzmann(energy, ebm.Flat(), log_partition=log_partition), obs=X)
    return k


@config_enumerate
def choice_by_beta(log_partition):
    k = pyro.sample("k", dist.Categorical(EVEN))
    beta = torch.tensor([1.0, 4.0])[k]
    d = ebm.GibbsBoltzmann(lambda x: 0.5 * x**2, ebm.Flat(), beta, log_partition=log_partition)
    pyro.sample("x", d, obs=X)
    return k


def choice_by_python(log_partition):
    k = pyro.sample("k", dist.Categorical(EVEN))
    energies = [lambda x: 0.5 * x**2, lambda x: 2.0 * x**2]
    d = ebm.GibbsBoltzmann(energies[int(k)], ebm.Flat(), log_partition=log_partition)
    pyro.sample("x", d, obs=X)


CHOICES = {"index": choice_by_index, "given": choice_by_given, "beta": choice_by_beta}
choices = pytest.mark.parametrize("model", CHOICES.values(), ids=CHOICES)


def marginal(model, log_partition):
    elbo = TraceEnum_ELBO(max_plate_nesting=0)
    return elbo.compute_marginals(model, lambda *_: None, log_partition)["k"].probs


@choices
def test_a_choice_of_energies_is_refused_without_log_z(model):
    message = "site 'x' has no log_partition, but log Z depends on the enumerated 'k'"
    with pytest.raises(ebm.UnnormalizedError, match=message):
        marginal(model, None)
    with pytest.raises(ebm.UnnormalizedError, match=message):
        infer_discrete(model, first_available_dim=-1)(None)
    with pytest.raises(ebm.UnnormalizedError, match="site 'x': log Z depends on the random k"):
        ebm.audit(model, None)


def test_a_choice_by_python_code_is_reported():
    with pytest.warns(ebm.UnnormalizedWarning, match="reads the value of k in Python"):
        findings = ebm.audit(choice_by_python, None)
    assert [f.kind for f in findings] == ["control"]
    assert [f.names for f in findings] == [("k",)]


@choices
def test_a_choice_of_energies_has_its_posterior(model):
    torch.testing.assert_close(marginal(model, WIDE), TRUTH, rtol=0, atol=5e-4)
    draws = torch.stack([infer_discrete(model, first_available_dim=-1)(WIDE) for _ in range(300)])
    mean = draws.double().mean()
    assert abs(mean - TRUTH[1]) < 5 * (0.25 / 300) ** 0.5


@choices
def test_a_false_constant_tilts_the_choice(model):
    with pytest.raises(AssertionError):
        torch.testing.assert_close(marginal(model, "constant"), TRUTH, rtol=0, atol=5e-4)


def test_negatives_refuse_an_enumerated_choice():
    with pytest.raises(ebm.UnnormalizedError, match="enumeration needs the value of log Z"):
        marginal(choice_by_index, Contrastive())


# 5. An energy as a guide -----------------------------------------------------------------------


def target():
    pyro.sample("x", dist.Normal(0.0, 0.5))


def exact_sampler(d, shape):
    return dist.Normal(0.0, d.energy.k.rsqrt()).sample(shape)


class Precision(torch.nn.Module):
    def __init__(self, k):
        super().__init__()
        self.k = k

    def forward(self, x):
        return 0.5 * self.k * x**2


def energy_guide(log_partition, sampler=exact_sampler):
    k = pyro.param("k", torch.tensor(2.0), constraint=constraints.positive)
    energy = Precision(None)
    energy.k = k
    d = ebm.GibbsBoltzmann(energy, ebm.Flat(), log_partition=log_partition, sampler=sampler)
    pyro.sample("x", d)


def fit_guide(log_partition, **options):
    elbo = Trace_ELBO(num_particles=20, vectorize_particles=False)
    optim = pyro.optim.ClippedAdam({"lr": 0.2, "lrd": 0.97})
    svi = SVI(target, lambda: energy_guide(log_partition), optim, elbo)
    for _ in range(options.get("steps", 150)):
        loss = svi.step()
    return pyro.param("k").detach(), loss


def test_a_guide_with_a_learned_energy_is_refused_without_log_z():
    message = "site 'x' has no log_partition, but log Z depends on the learned 'k'"
    with pytest.raises(ebm.UnnormalizedError, match=message):
        fit_guide(None, steps=1)
    with pytest.raises(ebm.UnnormalizedError, match="log Z depends on the learned k"):
        ebm.audit(energy_guide, None)


@pytest.mark.slow
def test_a_guide_with_an_energy_finds_its_target_and_a_loss_of_zero():
    k, loss = fit_guide(WIDE)
    # At the target log p - log q vanishes point by point, and with it the gradient's variance.
    torch.testing.assert_close(k, torch.tensor(4.0), rtol=2e-3, atol=0)
    assert abs(loss) < 1e-3


# 6. Evidence by importance sampling ------------------------------------------------------------


def latent_energy(log_partition):
    x = pyro.sample("x", gaussian(1.0, log_partition))
    pyro.sample("y", dist.Normal(x, 1.0), obs=torch.tensor(0.5))


def proposal(log_partition):
    pyro.sample("x", dist.Normal(0.25, 0.75))


def evidence(log_partition, n=3000):
    engine = Importance(latent_energy, proposal, num_samples=n).run(log_partition)
    weights = torch.stack(engine.log_weights)
    return weights.logsumexp(0) - math.log(n)


def test_evidence_is_refused_without_log_z():
    message = "site 'x' has no log_partition, but importance sampling estimates evidence"
    with pytest.raises(ebm.UnnormalizedError, match=message):
        evidence(None, 10)
    assert [f.kind for f in ebm.audit(latent_energy, None)] == ["evidence"]
    with pytest.raises(ebm.UnnormalizedError, match="importance sampling needs the value"):
        evidence(Contrastive(), 10)


def test_evidence_has_its_closed_form():
    # The proposal is nearly the posterior N(.25, .5): the weights vary by a few per cent.
    truth = dist.Normal(0.0, 2**0.5).log_prob(torch.tensor(0.5))
    torch.testing.assert_close(truth, torch.tensor(-1.328), **THREE_DIGITS)
    torch.testing.assert_close(evidence(Quadrature(-12.0, 12.0, 200)), truth, rtol=0, atol=0.02)
    exact = poutine.trace(poutine.condition(latent_energy, {"x": torch.tensor(0.25)}))
    posterior = dist.Normal(0.25, 0.5**0.5).log_prob(torch.tensor(0.25))
    joint = exact.get_trace(WIDE).log_prob_sum()
    torch.testing.assert_close(joint - posterior, truth, **NUMERIC)


# 7. A learnable inverse temperature ------------------------------------------------------------


def learnable_beta(log_partition):
    beta = pyro.param("beta", torch.tensor(3.0), constraint=constraints.positive)
    with pyro.plate("n", len(DATA)):
        d = ebm.GibbsBoltzmann(lambda x: x**2, ebm.Flat(), beta, log_partition=log_partition)
        pyro.sample("x", d, obs=DATA)


def test_a_learned_beta_is_refused_without_log_z():
    message = "site 'x' has no log_partition, but log Z depends on the learned 'beta'"
    with pytest.raises(ebm.UnnormalizedError, match=message):
        fit(lambda: learnable_beta(None))
    with pytest.raises(ebm.UnnormalizedError, match="log Z depends on the learned beta"):
        ebm.audit(learnable_beta, None)


def test_a_learned_beta_finds_the_maximum_of_the_likelihood():
    params, _ = fit(lambda: learnable_beta(WIDE))
    torch.testing.assert_close(params["beta"], 0.5 / DATA.square().mean(), **THREE_DIGITS)


def test_a_beta_learned_by_negatives_comes_within_their_error():
    torch.manual_seed(0)
    method = Contrastive(num_chains=2000, num_steps=5)
    params, _ = fit(lambda: learnable_beta(method), tail=200)
    assert abs(2 * params["beta"] * DATA.square().mean() - 1) < 0.05
