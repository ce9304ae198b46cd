"""Pyro's features for discrete sites: energies with finite supports, against enumeration."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer import (
    NUTS,
    SVI,
    TraceEnum_ELBO,
    autoguide,
    config_enumerate,
    infer_discrete,
)
from pyro.optim import Adam

import pyro_ebm as ebm
from tests.common import FALSE_ALARM, FAR, NUMERIC, standard_errors
from tests.test_pyro_matrix import (
    ALL,
    ANY,
    MODEL,
    Cannot,
    assert_all_are_cells,
    cells,
    run,
    works_or_says_why,
)


class Table(NamedTuple):
    """An energy with a finite support in one role, and the truth by enumeration."""

    model: Callable[[], Any]  # returns the value of z
    guide: Callable[[], Any]
    site: str
    states: torch.Tensor  # all values of z
    posterior: torch.Tensor  # their probabilities given the data
    loss: float  # minus the best bound of this guide
    log_z: float  # what the loss lacks


def nothing():
    """The guide of a model whose sites are all enumerated."""


def booleans(n):
    return torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * n)


SUPPORTS = {
    "integers": ((), constraints.integer_interval(1, 3), torch.tensor([1, 2, 3])),
    "boolean": ((), constraints.boolean, booleans(1)),
    "booleans": ((2,), constraints.boolean, booleans(2)),
    "one-hot": ((3,), constraints.one_hot, torch.eye(3)),
}


def read(x, event):
    """A number that tells the states apart."""
    x = x.to(torch.get_default_dtype())
    weight = torch.tensor([1.0, -0.5, 2.0], device=x.device)
    return (x * weight[: event[0]]).sum(-1) if event else x


def shallow(x, event):
    return 0.3 * read(x, event) - 0.2 * read(x, event) ** 2


def finite_latent(event, support, states):
    datum = torch.tensor(0.7, device=states.device)

    def model():
        flat = ebm.Flat(event, support, device=states.device)
        z = pyro.sample("z", ebm.GibbsBoltzmann(lambda x: shallow(x, event), flat))
        pyro.sample("y", dist.Normal(read(z, event), 1.0), obs=datum)
        return z

    joint = dist.Normal(read(states, event), 1.0).log_prob(datum) - shallow(states, event)
    log_z = (-shallow(states, event)).logsumexp(0).item()
    loss = -joint.logsumexp(0).item()
    return Table(model, nothing, "z", states, joint.softmax(0), loss, log_z)


def finite_observed(event, support, states):
    prior = torch.tensor([0.2, 0.3, 0.5], device=states.device)
    scales = torch.tensor([0.5, 1.0, 2.0], device=states.device)
    exact = ebm.partition.Exact()

    def model():
        z = pyro.sample("z", dist.Categorical(prior))
        energy = ebm.Given(lambda x, s: s * shallow(x, event), scales[z])
        flat = ebm.Flat(event, support, device=states.device)
        d = ebm.GibbsBoltzmann(energy, flat, log_partition=exact)
        pyro.sample("x", d, obs=states[1])
        return z

    table = -scales * shallow(states, event).unsqueeze(-1)  # shape: (K, 3)
    joint = prior.log() + table[1] - table.logsumexp(0)
    loss = -joint.logsumexp(0).item()
    labels = torch.arange(3, device=states.device)
    return Table(model, nothing, "x", labels, joint.softmax(0), loss, 0.0)


def finite_guide(event, support, states):
    flat = ebm.Flat(event, support, device=states.device)
    exact = ebm.partition.Exact()

    def model():
        d = ebm.GibbsBoltzmann(lambda x: 0.0 * read(x, event), flat, log_partition=exact)
        z = pyro.sample("z", d)
        pyro.sample("y", dist.Normal(read(z, event), 1.0), obs=torch.ones_like(read(z, event)))
        return z

    def guide():
        k = pyro.param("k", torch.tensor(1.5, device=states.device))
        d = ebm.GibbsBoltzmann(lambda x: k * shallow(x, event), flat, log_partition=exact)
        pyro.sample("z", d)

    q = (-1.5 * shallow(states, event)).log_softmax(0)
    p = dist.Normal(read(states, event), 1.0).log_prob(torch.ones((), device=states.device))
    loss = (q.exp() * (q - p + math.log(len(states)))).sum().item()
    return Table(model, guide, "z", states, q.exp(), loss, 0.0)


TABLES = {"latent": finite_latent, "observed": finite_observed, "guide": finite_guide}


def with_enumeration(t, elbo=TraceEnum_ELBO, how="parallel"):
    model, guide = t.model, config_enumerate(t.guide, how)
    if t.guide is nothing:
        model = config_enumerate(model)
    loss = elbo(max_plate_nesting=0).loss(model, guide)
    torch.testing.assert_close(loss, t.loss, **NUMERIC)


def with_marginals(t, name="z"):
    model = config_enumerate(t.model)
    found = TraceEnum_ELBO(max_plate_nesting=0).compute_marginals(model, config_enumerate(t.guide))
    torch.testing.assert_close(found[name].probs, t.posterior, **NUMERIC)


def is_state(x, states):
    """Whether points ``(n, *event)`` are the states ``(K, *event)``: shape (n, K)."""
    return (
        (x.unsqueeze(1) == states).flatten(2).all(-1) if states.dim() > 1 else x[:, None] == states
    )


def with_discrete_samples(t, n=4000):
    def model():
        with pyro.plate("draws", n):
            return t.model()

    draws = infer_discrete(config_enumerate(model), first_available_dim=-2)()
    counts = is_state(draws, t.states).sum(0)
    assert counts.sum() == n
    chi2 = ((counts - n * t.posterior) ** 2 / (n * t.posterior)).sum()
    p_value = torch.special.gammaincc(chi2.new_tensor((len(counts) - 1) / 2), chi2 / 2)
    assert p_value > FALSE_ALARM


def with_discrete_mode(t):
    best = infer_discrete(config_enumerate(t.model), first_available_dim=-1, temperature=0)()
    torch.testing.assert_close(best, t.states[t.posterior.argmax()])


def with_sample_posterior(t):
    elbo = TraceEnum_ELBO(max_plate_nesting=0)
    z = elbo.sample_posterior(config_enumerate(t.model), t.guide)
    assert z.shape == t.states.shape[1:]
    assert is_state(z[None], t.states).any()


def with_discrete_guide(t):
    guide = autoguide.AutoDiscreteParallel(t.model)
    elbo = TraceEnum_ELBO(max_plate_nesting=0)
    svi = SVI(t.model, config_enumerate(guide), Adam({"lr": 0.1}), elbo)
    losses = [svi.step() for _ in range(100)]
    torch.testing.assert_close(losses[-1], t.loss, rtol=0, atol=1e-3)  # trained, not exact


def with_discrete_gradient(t):
    """Of the bound in the guide's parameter, against a difference of exact losses."""
    elbo = TraceEnum_ELBO(max_plate_nesting=0)
    elbo.loss_and_grads(t.model, config_enumerate(t.guide))
    (leaf,) = (leaf for _, leaf in pyro.get_param_store().named_parameters())

    def loss(step):
        with torch.no_grad():
            leaf.add_(step)
            value = elbo.loss(t.model, config_enumerate(t.guide))
            leaf.sub_(step)
        return value

    torch.testing.assert_close(leaf.grad.item(), (loss(1e-5) - loss(-1e-5)) / 2e-5, **NUMERIC)


def by_index(feature, **kwargs):
    """The same with the energy's site reparametrised, and so normalised."""

    def with_index(t):
        config = {t.site: ebm.infer.IndexReparam()}
        t = t._replace(model=poutine.reparam(t.model, config=config), loss=t.loss + t.log_z)
        feature(t, **kwargs)

    return with_index


LATENT = ("latent",)
FINITE = {
    "TraceEnum_ELBO": (with_enumeration, ALL),
    "TraceEnum_ELBO, sequential": (partial(with_enumeration, how="sequential"), ("guide",)),
    "TraceEnum_ELBO, gradient": (with_discrete_gradient, ("guide",)),
    "TraceEnum_ELBO, index": (by_index(with_enumeration), MODEL),
    "compute_marginals": (with_marginals, ALL),
    "compute_marginals, index": (by_index(with_marginals, name="z_index"), LATENT),
    "infer_discrete": (with_discrete_samples, MODEL),
    "infer_discrete, index": (by_index(with_discrete_samples), MODEL),
    "infer_discrete, mode": (with_discrete_mode, MODEL),
    "infer_discrete, mode, index": (by_index(with_discrete_mode), MODEL),
    "sample_posterior": (with_sample_posterior, MODEL),
    "sample_posterior, index": (by_index(with_sample_posterior), LATENT),
    "AutoDiscreteParallel": (with_discrete_guide, MODEL),
    "AutoDiscreteParallel, index": (by_index(with_discrete_guide), LATENT),
}

NOT_A_SCALAR = Cannot(NotImplementedError, "infer_discrete needs scalar sites.*IndexReparam")
ROWS = Cannot(NotImplementedError, "draws rows of a table.*IndexReparam")
UNKNOWN = Cannot(NotImplementedError, "GibbsBoltzmann is not supported")
CANNOT = {
    ("compute_marginals", "guide", ANY): Cannot(NotImplementedError, "with guide enumeration"),
    ("infer_discrete", "latent", "booleans"): NOT_A_SCALAR,
    ("infer_discrete", "latent", "one-hot"): NOT_A_SCALAR,
    ("infer_discrete, mode", "latent", "booleans"): NOT_A_SCALAR,
    ("infer_discrete, mode", "latent", "one-hot"): NOT_A_SCALAR,
    ("sample_posterior", "latent", ANY): ROWS,
    ("AutoDiscreteParallel", "latent", ANY): UNKNOWN,
}


@pytest.mark.parametrize(("feature", "role", "support"), cells(FINITE, SUPPORTS))
def test_feature(feature, role, support, device):
    event, constraint, states = SUPPORTS[support]
    states = states if states.dtype == torch.long else states.to(torch.get_default_dtype())
    table = TABLES[role](event, constraint, states.to(device))
    with works_or_says_why(CANNOT, feature, role, support):
        FINITE[feature][0](table)


@pytest.mark.parametrize(
    "feature", ["compute_marginals", "infer_discrete", "infer_discrete, mode"]
)
@pytest.mark.parametrize("role", ["latent", "observed"])
def test_a_finite_cell_sees_a_wrong_table(feature, role, device):
    event, constraint, states = SUPPORTS["integers"]
    table = TABLES[role](event, constraint, states.to(device))
    with pytest.raises(AssertionError):
        FINITE[feature][0](table._replace(posterior=table.posterior.flip(0)))


def test_every_exception_is_of_a_cell():
    assert_all_are_cells(CANNOT, FINITE)


# The rest of a model with an enumerated energy ---------------------------------------------------


def mixed(event, support, states):
    """A model of an enumerated energy and a number; the mean and variance of the number."""
    one = torch.ones((), device=states.device)

    def model():
        w = pyro.sample("w", dist.Normal(0.0 * one, 1.0))
        flat = ebm.Flat(event, support, device=states.device)
        z = pyro.sample("z", ebm.GibbsBoltzmann(lambda x: shallow(x, event), flat))
        pyro.sample("y", dist.Normal(w + 3.0 * read(z, event), 1.0), obs=one)

    center = 1.0 - 3.0 * read(states, event)  # y less what z gives
    evidence = dist.Normal(0.0 * one, 2**0.5).log_prob(center)
    weight = (evidence - shallow(states, event)).softmax(0)
    mean = (weight * center / 2).sum()
    return model, mean, 0.5 + (weight * (center / 2 - mean) ** 2).sum()


@pytest.mark.slow
@pytest.mark.parametrize("support", SUPPORTS)
def test_chains_run_over_the_rest_of_an_enumerated_energy(support, device):
    event, constraint, states = SUPPORTS[support]
    model, mean, variance = mixed(event, constraint, states.to(device))
    kernel = NUTS(config_enumerate(model), max_plate_nesting=0)
    w = run(kernel, 300, 150).get_samples()["w"]
    assert standard_errors(w, mean, variance.sqrt()) < FAR


@pytest.mark.parametrize("support", SUPPORTS)
def test_a_guide_for_the_rest_sums_over_an_enumerated_energy(support, device):
    event, constraint, states = SUPPORTS[support]
    states = states.to(device)
    model, _, _ = mixed(event, constraint, states)
    guide = autoguide.AutoDelta(poutine.block(model, hide=["z"]))
    elbo = TraceEnum_ELBO(max_plate_nesting=0)
    svi = SVI(config_enumerate(model), guide, Adam({"lr": 0.1}), elbo)
    assert all(math.isfinite(svi.step()) for _ in range(3))
    w = guide.median()["w"].detach()
    likelihood = dist.Normal(w + 3.0 * read(states, event), 1.0).log_prob(torch.ones_like(w))
    truth = (likelihood - shallow(states, event)).logsumexp(0) + dist.Normal(0.0, 1.0).log_prob(w)
    torch.testing.assert_close(-svi.evaluate_loss(), truth.item(), **NUMERIC)


@pytest.mark.parametrize("make", [NUTS, autoguide.AutoNormal])
def test_an_index_does_not_go_with_starting_points(make, device):
    """Pyro starts chains and guides at a value of the site itself, before it is reparametrised."""
    event, constraint, states = SUPPORTS["booleans"]
    model, _, _ = mixed(event, constraint, states.to(device, torch.get_default_dtype()))
    model = poutine.reparam(config_enumerate(model), config={"z": ebm.infer.IndexReparam()})
    with pytest.raises(ValueError, match="cannot handle discrete sample site 'z'"):
        NUTS(model, max_plate_nesting=0).setup(0) if make is NUTS else make(model)()


def test_an_index_refuses_data_outside_the_support_by_the_name_of_the_site():
    flat = ebm.Flat((2,), constraints.boolean)
    config = {"spins": ebm.infer.IndexReparam()}

    @poutine.reparam(config=config)
    def model(x):
        pyro.sample("spins", ebm.GibbsBoltzmann(lambda x: x.sum(-1), flat), obs=x)

    poutine.trace(model).get_trace(torch.tensor([0.0, 1.0]))
    with pytest.raises(ValueError, match="'spins'"):
        poutine.trace(model).get_trace(torch.tensor([0.0, 2.0]))
