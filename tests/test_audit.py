"""What the audit and the guard see, and that they raise no false alarm."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.optim import Adam
from torch import nn

import pyro_ebm as ebm
from pyro_ebm.partition import Contrastive, Quadrature

BASE = dist.Normal(torch.zeros(2, dtype=torch.float64), 1.0).to_event(1)


def network():
    torch.manual_seed(0)
    return ebm.zoo.MLPEnergy(2, (8,))


def prior(energy, y=1.0):
    x = pyro.sample("x", ebm.GibbsBoltzmann(energy, BASE))
    pyro.sample("y", dist.Normal(x.sum(-1), 1.0), obs=torch.tensor(y))


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_fixed_network_as_a_prior_raises_no_alarm(wrapped):
    net = network()
    energy = (lambda x: net(x)) if wrapped else net
    assert [f.kind for f in ebm.audit(prior, energy)] == ["evidence"]
    MCMC(NUTS(prior), 5, 5, disable_progbar=True).run(energy)
    svi = SVI(prior, AutoNormal(prior), Adam({"lr": 0.01}), Trace_ELBO())
    assert all(isinstance(svi.step(energy), float) for _ in range(3))


def test_a_network_learned_before_is_fixed_under_nuts():
    energy = network()

    def model():
        pyro.module("energy", energy)
        prior(energy)

    pyro.module("energy", energy)
    MCMC(NUTS(model), 5, 5, disable_progbar=True).run()


def test_a_network_learned_before_is_fixed_where_svi_does_not_learn_it():
    energy = network()
    pyro.module("energy", energy)  # as an earlier run of SVI left it
    svi = SVI(prior, AutoNormal(prior), Adam({"lr": 0.01}), Trace_ELBO())
    assert all(isinstance(svi.step(energy), float) for _ in range(3))


def test_learning_by_hand_is_refused_in_its_backward_pass():
    d, x = ebm.GibbsBoltzmann(network(), BASE), torch.randn(5, 2)
    loss = -d.log_prob(x).mean()  # its value is that of an unnormalised density: right so far
    with pytest.raises(ebm.UnnormalizedError, match=r"learned '.*energy.layers.0.weight'"):
        loss.backward()


def test_the_score_is_no_alarm():
    d, x = ebm.GibbsBoltzmann(network(), BASE), torch.randn(5, 2, requires_grad=True)
    (score,) = torch.autograd.grad(d.log_prob(x).sum(), x)
    torch.testing.assert_close(score, ebm.force(d.potential, x))
    d.log_prob(x).sum().backward()
    assert x.grad is not None


def test_a_learned_parameter_by_hand_is_refused_in_its_gradient():
    k = pyro.param("k", torch.tensor(1.0))
    x = torch.randn(3, requires_grad=True)
    d = ebm.GibbsBoltzmann(lambda x: k * x**2, ebm.Flat())
    torch.autograd.grad(d.log_prob(x).sum(), x)
    with pytest.raises(ebm.UnnormalizedError, match="learned 'k'"):
        torch.autograd.grad(d.log_prob(x).sum(), pyro.get_param_store()._params["k"])


def test_a_base_that_is_learned_counts_as_well():
    def model():
        loc = pyro.param("loc", torch.tensor(0.5))
        d = ebm.GibbsBoltzmann(lambda x: x**2, dist.Normal(loc, 1.0))
        pyro.sample("x", d, obs=torch.tensor(1.0))

    with pytest.raises(ebm.UnnormalizedError, match="learned 'loc'"):
        SVI(model, lambda: None, Adam({"lr": 0.1}), Trace_ELBO()).step()


def test_a_given_part_that_is_random_counts_as_well():
    def model():
        y = pyro.sample("y", dist.Normal(0.0, 1.0))
        energy = ebm.Given(lambda x, y: (x - y) ** 4, y)
        pyro.sample("x", ebm.GibbsBoltzmann(energy, ebm.Flat()), obs=torch.tensor(1.0))

    with pytest.raises(ebm.UnnormalizedError, match="random 'y'"):
        MCMC(NUTS(model), 5, 5, disable_progbar=True).run()
    with pytest.raises(ebm.UnnormalizedError, match="site 'x': log Z depends on the random y"):
        ebm.audit(model)


def test_an_observed_module_that_is_not_registered_is_reported():
    energy, negatives = network(), Contrastive(num_chains=8, num_steps=1)

    def model(register):
        if register:
            pyro.module("energy", energy)
        d = ebm.GibbsBoltzmann(lambda x: 2 * energy(x), BASE, log_partition=negatives)
        pyro.sample("x", d, obs=torch.zeros(2))

    with pytest.warns(ebm.UnnormalizedWarning, match=r"energy\.layers\..* not registered"):
        findings = ebm.audit(model, False)
    assert [f.kind for f in findings] == ["unregistered"]
    assert ebm.audit(model, True) == []
    energy.requires_grad_(False)
    pyro.clear_param_store()
    assert ebm.audit(model, False) == []


def test_a_method_without_a_value_is_a_finding():
    negatives = Contrastive(num_chains=8, num_steps=1, persistent=False)

    def model():
        d = ebm.GibbsBoltzmann(lambda x: x**2, ebm.Flat(), log_partition=negatives)
        pyro.sample("x", d, obs=torch.zeros(()))

    assert [f.kind for f in ebm.audit(model)] == ["gradient"]


def test_a_normalised_and_a_declared_site_have_no_findings():
    def model(log_partition):
        k = pyro.sample("k", dist.Gamma(1.0, 1.0))
        d = ebm.GibbsBoltzmann(lambda x: k * x**2, ebm.Flat(), log_partition=log_partition)
        pyro.sample("x", d, obs=torch.zeros(()))

    assert ebm.audit(model, "constant") == []
    assert ebm.audit(model, Quadrature(-9.0, 9.0, 50)) == []


def test_masked_expanded_and_wrapped_sites_are_found():
    def model():
        k = pyro.sample("k", dist.Gamma(1.0, 1.0))
        d = ebm.GibbsBoltzmann(lambda x: k * x**2, ebm.Flat().expand((3,)))
        pyro.sample("a", d.to_event(1), obs=torch.zeros(3))
        with pyro.plate("n", 3):
            pyro.sample("b", d.mask(torch.ones(3).bool()), obs=torch.zeros(3))

    with pytest.raises(ebm.UnnormalizedError, match=r"(?s)site 'a'.*site 'b'"):
        ebm.audit(model)


def test_the_audit_leaves_the_random_stream_alone():
    energy, state = network(), torch.get_rng_state()
    ebm.audit(prior, energy)
    assert torch.equal(torch.get_rng_state(), state)


def test_prior_prediction_and_nuts_without_data_agree_on_a_normalised_model():
    """A test of normalisation: without log Z the two means differ by more than a half."""

    def model():
        k = pyro.sample("k", dist.Gamma(4.0, 1.0))
        quadrature = Quadrature(-15.0, 15.0, 300)
        d = ebm.GibbsBoltzmann(lambda x: k * x**2, ebm.Flat(), log_partition=quadrature)
        pyro.sample("x", d)

    forward = Predictive(model, num_samples=50)()["k"]
    assert forward.shape == (50,)
    mcmc = MCMC(NUTS(model), 200, 100, disable_progbar=True)
    mcmc.run()
    k = mcmc.get_samples()["k"]
    assert abs(k.mean() - 4.0) < 5 * 2.0 / 50**0.5  # sd 2, effective size 50 at the least


def test_modules_are_the_energys_own_after_an_audit():
    energy = network()

    def model():
        pyro.module("energy", energy)
        prior(energy)

    with pytest.raises(ebm.UnnormalizedError):
        ebm.audit(model)
    assert all(type(p) is nn.Parameter for p in energy.parameters())
