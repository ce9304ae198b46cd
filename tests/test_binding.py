"""The parameters of an energy are bound where the model constructs its distribution.

The energy is k x^2 / 2 throughout: log Z is log(2 pi / k) / 2, the likelihood of data has its
maximum at k = n / sum(x^2), and a prior Gamma(a, b) on k becomes Gamma(a + n/2, b + sum(x^2)/2).
"""

import copy
import math
import pickle
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO, autoguide
from pyro.nn import PyroModule, PyroParam, PyroSample
from pyro.nn.module import to_pyro_module_
from pyro.optim import Adam, ClippedAdam
from torch import nn

import pyro_ebm as ebm
from pyro_ebm._binding import modules_of
from tests.common import EXACT, FAR, NUMERIC, standard_errors


class Plain(nn.Module):
    def __init__(self, k=1.0):
        super().__init__()
        self.k = nn.Parameter(torch.as_tensor(k))

    def forward(self, x):
        return 0.5 * self.k * x**2


class Pyro(PyroModule):
    def __init__(self, k):
        super().__init__()
        self.k = k

    def forward(self, x):
        return 0.5 * self.k * x**2


class Outer(nn.Module):
    """A plain module with a module of any kind inside."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


def converted(device):
    module = Outer(Plain(torch.tensor(1.0, device=device)))
    to_pyro_module_(module)
    return module


def converted_sample(device):
    module = converted(device)
    module.inner.k = PyroSample(prior(device))
    return module


def prior(device):
    return dist.Gamma(torch.tensor(2.0, device=device), torch.tensor(1.0, device=device))


def positive(device):
    return PyroParam(torch.tensor(1.0, device=device), constraints.positive)


# name -> (how it is made on a device, the type and the name of the statement of k)
MODULES = {
    "Parameter": (lambda d: Pyro(nn.Parameter(torch.tensor(1.0, device=d))), "param", "k"),
    "PyroParam": (lambda d: Pyro(positive(d)), "param", "k"),
    "lazy PyroParam": (
        lambda d: Pyro(PyroParam(lambda: torch.tensor(1.0, device=d), constraints.positive)),
        "param",
        "k",
    ),
    "PyroSample": (lambda d: Pyro(PyroSample(prior(d))), "sample", "k"),
    "dependent PyroSample": (lambda d: Pyro(PyroSample(lambda self: prior(d))), "sample", "k"),
    "PyroSample in a plain module": (
        lambda d: Outer(Pyro(PyroSample(prior(d)))),
        "sample",
        "k",
    ),
    "to_pyro_module_": (converted, "param", "inner.k"),
    "to_pyro_module_ with PyroSample": (converted_sample, "sample", "inner.k"),
}
SAMPLES = [name for name, (_, kind, _) in MODULES.items() if kind == "sample"]
GLOBAL = []

WRAPPERS = {
    "itself": lambda m: m,
    "lambda": lambda m: lambda x: m(x),
    "lambda in a lambda": lambda m: lambda x: (lambda y: m(y))(x),
    "default": lambda m: lambda x, energy=m: energy(x),
    "partial": lambda m: partial(lambda energy, x: energy(x), m),
    "method": lambda m: m.forward,
    "list": lambda m: (lambda parts: lambda x: sum(part(x) for part in parts))([m]),
    "global list": lambda m: lambda x: sum(part(x) for part in GLOBAL),
    "Given": lambda m: ebm.Given(lambda x, y: m(x) + 0.0 * y, torch.zeros(())),
    "Sum": lambda m: ebm.Sum(m, lambda x: 0.0 * x),
    "Sum of lambdas": lambda m: ebm.Sum(lambda x: 0.0 * x, lambda x: m(x)),
    "Scaled": lambda m: ebm.Scaled(m, 1.0),
}


def quadrature():
    return ebm.partition.Quadrature(-10.0, 10.0, 200)


def program(energy, device, plain=()):
    """A model of one datum at 1, which returns its distribution."""

    def model():
        for i, module in enumerate(plain):
            pyro.module(f"energy_{i}", module)
        d = ebm.GibbsBoltzmann(energy, ebm.Flat(device=device), log_partition=quadrature())
        pyro.sample("x", d, obs=torch.ones((), device=device))
        return d

    return model


def constructed(model):
    """Run a model and return its distribution."""
    return poutine.trace(model).get_trace().nodes["_RETURN"]["value"]


def bound_k(d):
    """The k that a distribution has, from its potential at 1."""
    return 2.0 * d.potential(torch.ones((), device=d.floating().device))


# One value per trace -----------------------------------------------------------------------------


@pytest.fixture
def module(request, device):
    GLOBAL[:] = [MODULES[request.param][0](device)]
    yield GLOBAL[0]
    GLOBAL.clear()


@pytest.mark.parametrize("module", MODULES, indirect=True)
@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_an_energy_has_one_value_of_its_parameters_per_trace(module, wrap, device, request):
    _, kind, name = MODULES[request.node.callspec.params["module"]]
    trace = poutine.trace(program(wrap(module), device)).get_trace()
    node, d = trace.nodes[name], trace.nodes["_RETURN"]["value"]
    assert node["type"] == kind
    torch.testing.assert_close(bound_k(d), node["value"], **EXACT)
    x = torch.tensor(2.0, device=device)
    truth = -2.0 * node["value"] + 0.5 * (node["value"] / (2 * math.pi)).log()
    for _ in range(3):
        torch.testing.assert_close(d.log_prob(x), truth, **NUMERIC)


@pytest.mark.parametrize("module", SAMPLES, indirect=True)
def test_traces_draw_anew_and_replay_the_same(module, device, request):
    name = MODULES[request.node.callspec.params["module"]][2]
    model = program(module, device)
    first, other = (poutine.trace(model).get_trace() for _ in range(2))
    again = poutine.trace(poutine.replay(model, trace=first)).get_trace()
    k = [bound_k(trace.nodes["_RETURN"]["value"]).item() for trace in (first, other, again)]
    assert k[0] == k[2] != k[1]
    conditioned = poutine.condition(model, {name: torch.tensor(3.0, device=device)})
    torch.testing.assert_close(bound_k(constructed(conditioned)).item(), 3.0, **EXACT)


@pytest.mark.parametrize("module", MODULES, indirect=True)
def test_the_modules_are_as_before_after_each_evaluation(module, device):
    before = {id(m): dict(m.__dict__) for m in module.modules()}

    def broken(x):
        module(x)
        raise ZeroDivisionError

    d = constructed(program(module, device))
    d.log_prob(torch.zeros((), device=device))
    with pytest.raises(ZeroDivisionError):
        constructed(program(broken, device)).log_prob(torch.zeros((), device=device))
    assert all(m.__dict__.keys() == before[id(m)].keys() for m in module.modules())


def test_an_energy_may_evaluate_another_distribution_of_the_same_module():
    module = Pyro(PyroSample(prior("cpu")))
    inner = ebm.GibbsBoltzmann(module, ebm.Flat())
    outer = ebm.GibbsBoltzmann(lambda x: module(x) + inner.potential(x) + module(x), ebm.Flat())
    x = torch.tensor(1.0)
    own = module.k  # drawn now, of neither
    total = [outer.potential(x).item() for _ in range(3)]
    assert total[0] == total[1] == total[2]
    k = torch.tensor(2 * total[0]) - bound_k(inner)
    assert k.item() != 2 * own.item()
    torch.testing.assert_close(outer._binding.values[0][2] * 2, k, **EXACT)


def test_networks_of_the_same_name_are_all_found():
    nets = [Plain(1.0), Plain(2.0)]
    closures = [lambda x, net=net: net(x) for net in nets]
    found = modules_of(ebm.Sum(*closures))
    assert {id(m) for m in found.values()} >= {id(net) for net in nets}


# Learning ----------------------------------------------------------------------------------------


def plain(device):
    energy = Plain(torch.tensor(1.0, device=device))
    return lambda x: energy(x), [energy]


LEARNED = {
    "plain module": plain,
    **{
        name: partial(lambda make, device: (make(device), []), MODULES[name][0])
        for name in ("Parameter", "PyroParam", "to_pyro_module_")
    },
}


@pytest.fixture
def data(device):
    return torch.randn(20, device=device) / 1.5


def model_of(energy, registered=()):
    def model(x):
        for i, module in enumerate(registered):
            pyro.module(f"energy_{i}", module)
        flat = ebm.Flat(device=x.device)
        d = ebm.GibbsBoltzmann(energy, flat, log_partition=quadrature())
        with pyro.plate("n", len(x)):
            pyro.sample("x", d, obs=x)

    return model


@pytest.mark.parametrize("make", LEARNED.values(), ids=LEARNED)
def test_svi_learns_the_maximum_of_the_likelihood(make, data, device):
    energy, registered = make(device)
    optim = ClippedAdam({"lr": 0.2, "lrd": 0.98})
    svi = SVI(model_of(energy, registered), lambda x: None, optim, Trace_ELBO())
    for _ in range(250):
        svi.step(data)
    (k,) = pyro.get_param_store().values()
    best = len(data) / data.square().sum()
    torch.testing.assert_close(k.detach().squeeze(), best, rtol=1e-3, atol=0)  # Adam's last steps


# Posteriors --------------------------------------------------------------------------------------


def captured(x):
    k = pyro.sample("k", prior(x.device))
    with pyro.plate("n", len(x)):
        d = ebm.GibbsBoltzmann(
            lambda x: 0.5 * k * x**2, ebm.Flat(device=x.device), log_partition=quadrature()
        )
        pyro.sample("x", d, obs=x)


def captured_closed_form(x):
    """A normal with log Z written out: what the others must agree with."""
    k = pyro.sample("k", prior(x.device))
    with pyro.plate("n", len(x)):
        pyro.sample("x", dist.Normal(0.0, k.rsqrt()), obs=x)


def lifted(device):
    energy = Plain(torch.tensor(1.0, device=device))
    return poutine.lift(model_of(energy, [energy]), prior={"k": prior(device)})


BAYESIAN = {
    "captured tensor": (lambda d: captured, "k"),
    "PyroSample": (lambda d: model_of(MODULES["PyroSample"][0](d)), "k"),
    "to_pyro_module_": (lambda d: model_of(converted_sample(d)), "inner.k"),
    "lifted module": (lifted, "energy_0$$$k"),
}
bayesian = pytest.mark.parametrize(("make", "name"), BAYESIAN.values(), ids=BAYESIAN)


def exact_posterior(x):
    return 2.0 + len(x) / 2, 1.0 + x.square().sum() / 2


@pytest.mark.slow
@bayesian
def test_nuts_samples_the_exact_posterior(make, name, data, device):
    mcmc = MCMC(NUTS(make(device)), 500, warmup_steps=200, disable_progbar=True)
    mcmc.run(data)
    a, b = exact_posterior(data)
    k = mcmc.get_samples()[name]
    assert standard_errors(k, a / b, a**0.5 / b) < FAR
    # The fourth central moment of a Gamma law is 3 a (a + 2) / b^4.
    spread = (3 * a * (a + 2) - a**2) ** 0.5 / b**2
    assert standard_errors((k - a / b) ** 2, a / b**2, spread) < FAR


@bayesian
def test_the_laplace_approximation_is_that_of_the_exact_posterior(make, name, data, device):
    model = make(device)
    guide = autoguide.AutoLaplaceApproximation(model)
    svi = SVI(model, guide, ClippedAdam({"lr": 0.2, "lrd": 0.97}), Trace_ELBO())
    for _ in range(200):
        svi.step(data)
    a, b = exact_posterior(data)
    # The Laplace approximation is in log k, where the density is k^a exp(-b k).
    normal = guide.laplace_approximation(data)
    torch.testing.assert_close(normal.loc.exp()[0], a / b, rtol=1e-4, atol=0)  # training
    torch.testing.assert_close(normal.scale.item(), a**-0.5, rtol=1e-4, atol=0)


@pytest.mark.slow
@bayesian
def test_svi_fits_the_exact_posterior(make, name, data, device):
    model = make(device)

    def guide(x):
        one = torch.ones((), device=device)
        a = pyro.param("a", 5.0 * one, constraint=constraints.positive)
        mean = pyro.param("mean", one, constraint=constraints.positive)
        pyro.sample(name, dist.Gamma(a, a / mean))

    elbo = Trace_ELBO(20, vectorize_particles=True, max_plate_nesting=1)
    svi = SVI(model, guide, ClippedAdam({"lr": 0.05, "lrd": 0.01 ** (1 / 500)}), elbo)
    for _ in range(500):
        svi.step(data)
    # At the exact posterior the loss has no variance; training comes within a percent or two.
    a, b = exact_posterior(data)
    torch.testing.assert_close(pyro.param("a").item(), a, rtol=0.03, atol=0)
    torch.testing.assert_close(pyro.param("mean").detach(), a / b, rtol=0.03, atol=0)
    losses = torch.tensor([svi.evaluate_loss(data) for _ in range(10)])
    k = a / b  # log p(x) = log p(x | k) + log p(k) - log p(k | x)
    evidence = dist.Normal(0.0, k.rsqrt()).log_prob(data).sum()
    evidence = evidence + prior(device).log_prob(k) - dist.Gamma(a, b).log_prob(k)
    torch.testing.assert_close(losses.mean(), -evidence.cpu(), rtol=0, atol=1e-2)


# Batches of values -------------------------------------------------------------------------------


@bayesian
def test_vectorised_particles_have_a_value_each(make, name, data, device):
    """With the exact posterior for a guide each particle's loss is minus the log-evidence."""
    model = make(device)
    a, b = exact_posterior(data)
    guide = lambda x: pyro.sample(name, dist.Gamma(a, b))
    one, many = (
        Trace_ELBO(n, vectorize_particles=n > 1, max_plate_nesting=1).loss(model, guide, data)
        for n in (1, 7)
    )
    reference = Trace_ELBO().loss(
        captured_closed_form, lambda x: pyro.sample("k", dist.Gamma(a, b)), data
    )
    torch.testing.assert_close(one, reference, **NUMERIC)
    torch.testing.assert_close(many, reference, **NUMERIC)


@bayesian
@pytest.mark.parametrize("parallel", [False, True])
def test_predictions_have_the_value_of_their_draw(make, name, parallel, data, device):
    model = poutine.uncondition(make(device))
    k = torch.tensor([1e-2, 1.0, 1e4], device=device)
    found = Predictive(model, {name: k[:, None]}, parallel=parallel, return_sites=["x"])(data)["x"]
    assert found.shape == (3, 20)
    # A mean of 20 squares, each of variance 1 / k: within a factor of 4 for certain.
    ratio = found.square().mean(1) * k
    assert ((ratio > 0.25) & (ratio < 4.0)).all()


def test_a_sample_read_in_a_plate_has_a_value_for_each_of_its_rows(device):
    energy = Pyro(PyroSample(prior(device)))
    x = torch.arange(1.0, 6.0, device=device)

    def model():
        with pyro.plate("n", 5):
            flat = ebm.Flat(device=device)
            d = ebm.GibbsBoltzmann(energy, flat, log_partition=quadrature())
            pyro.sample("x", d, obs=x)

    trace = poutine.trace(model).get_trace()
    trace.compute_log_prob()
    k = trace.nodes["k"]["value"]
    assert k.shape == (5,)
    truth = dist.Normal(0.0, k.rsqrt()).log_prob(x)
    torch.testing.assert_close(trace.nodes["x"]["log_prob"], truth, **NUMERIC)


def test_a_network_with_batch_norm_and_no_batch_of_its_own_goes_into_a_plate():
    net = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 1), nn.Flatten(0))

    def model(x):
        with pyro.plate("n", len(x)):
            base = dist.Normal(torch.zeros(2), 1.0).to_event(1)
            d = ebm.GibbsBoltzmann(net, base, validate_args=False)
            assert d.batch_shape == ()
            pyro.sample("x", d, obs=x)

    poutine.trace(model).get_trace(torch.randn(4, 2))
    assert net[0].num_batches_tracked == 0
    assert net.training


# Lift --------------------------------------------------------------------------------------------


LIFTED = {
    "itself": lambda m: (m, [m]),
    "lambda": lambda m: (lambda x: m(x), [m]),
    "Scaled, part registered": lambda m: (ebm.Scaled(m, 1.0), [m]),
    "Scaled, whole registered": lambda m: (lambda s: (s, [s]))(ebm.Scaled(m, 1.0)),
    "part of what is registered": lambda m: (m, [nn.Sequential(m)]),
    "PyroModule": lambda m: (Pyro(nn.Parameter(m.k.detach())), []),
}


@pytest.mark.parametrize("make", LIFTED.values(), ids=LIFTED)
@pytest.mark.parametrize("how", ["distribution", "dictionary"])
def test_lift_changes_the_weights_of_the_energy(make, how, device):
    energy, registered = make(Plain(torch.tensor(1.0, device=device)))
    priors = prior(device) if how == "distribution" else None
    if priors is None:
        name = "k" if not registered else [n for n, _ in registered[0].named_parameters()][0]
        priors = {name: prior(device)}
    model = poutine.lift(program(energy, device, registered), prior=priors)
    trace = poutine.trace(model).get_trace()
    (k,) = (n["value"] for s, n in trace.nodes.items() if n["type"] == "sample" and s != "x")
    assert k.item() != 1.0
    torch.testing.assert_close(bound_k(trace.nodes["_RETURN"]["value"]), k, **EXACT)


def test_lift_binds_every_weight_of_a_network_to_its_own_value(device):
    net = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1))
    net.to(device)
    energy = lambda x: net(x).squeeze(-1)
    base = dist.Normal(torch.zeros(2, device=device), 1.0).to_event(1)

    def model():
        pyro.module("net", net)
        return ebm.GibbsBoltzmann(energy, base)

    def priors(name, value):
        return dist.Normal(torch.zeros_like(value), 1.0).to_event(value.dim())

    normal = {n: priors(n, p) for n, p in net.named_parameters()}
    trace = poutine.trace(poutine.lift(model, prior=normal)).get_trace()
    drawn = {n.split("$$$")[1]: node["value"] for n, node in trace.nodes.items() if "$$$" in n}
    x = torch.randn(5, 2, device=device)
    truth = torch.func.functional_call(net, drawn, x).squeeze(-1) - base.log_prob(x)
    torch.testing.assert_close(trace.nodes["_RETURN"]["value"].potential(x), truth, **EXACT)


def test_lift_refuses_to_guess_between_two_modules():
    one, two = Plain(1.0), Plain(2.0)
    model = program(ebm.Sum(one, two), "cpu", [one, two])
    with pytest.raises(ValueError, match="must match one lifted parameter"):
        constructed(poutine.lift(model, prior=prior("cpu")))


def test_lift_leaves_frozen_weights_alone():
    frozen, other = Plain(3.0).requires_grad_(False), Plain(1.0)
    d = constructed(poutine.lift(program(frozen, "cpu", [other]), prior=prior("cpu")))
    assert bound_k(d) == 3.0


# Copies ------------------------------------------------------------------------------------------

NET = Pyro(PyroSample(lambda self: prior("cpu")))


def through_a_global(x):
    return NET(x)


def pickled(d):
    return pickle.loads(pickle.dumps(d))


@pytest.mark.parametrize("module", MODULES, indirect=True)
@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_a_deep_copy_has_the_values_of_the_original(module, wrap, device):
    d = constructed(program(wrap(module), device))
    other = copy.deepcopy(d)
    x = torch.linspace(-1.0, 1.0, 5, device=device)
    for _ in range(2):
        torch.testing.assert_close(other.log_prob(x), d.log_prob(x), **EXACT)


# A prior that is a lambda cannot be pickled.
@pytest.mark.parametrize(
    "module", sorted(set(MODULES) - {"dependent PyroSample", "lazy PyroParam"}), indirect=True
)
@pytest.mark.parametrize("wrap", ["itself", "Scaled", "method"])
def test_a_pickle_has_the_values_of_the_original(module, wrap, device):
    d = constructed(program(WRAPPERS[wrap](module), device))
    other = pickled(d)
    x = torch.linspace(-1.0, 1.0, 5, device=device)
    for _ in range(2):
        torch.testing.assert_close(other.log_prob(x), d.log_prob(x), **EXACT)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_copies_share_the_modules_that_a_function_reaches_and_not_their_values(copied):
    first, second = (ebm.GibbsBoltzmann(through_a_global, ebm.Flat()) for _ in range(2))
    copies = copied(first), copied(second)
    x = torch.tensor(1.0)
    assert first.potential(x) != second.potential(x)
    assert copies[0].potential(x) == first.potential(x)
    assert copies[1].potential(x) == second.potential(x)


def test_a_copy_has_no_graph_to_the_values_of_the_original():
    d = constructed(program(Pyro(positive("cpu")), "cpu"))
    assert bound_k(d).requires_grad
    value = copy.deepcopy(d)._binding.values[0][2]
    assert not value.requires_grad


# Where it is constructed -------------------------------------------------------------------------


def test_a_sample_drawn_outside_the_model_is_refused_by_the_engines(data):
    flat = ebm.Flat(device=data.device)
    energy = MODULES["PyroSample"][0](data.device)
    d = ebm.GibbsBoltzmann(energy, flat, log_partition=quadrature())

    def model(x):
        z = pyro.sample("z", dist.Normal(torch.zeros((), device=x.device), 1.0))
        with pyro.plate("n", len(x)):
            pyro.sample("x", d, obs=x + z)

    d.log_prob(data)  # it is a distribution like others
    with pytest.raises(ValueError, match="'x'.*outside the model.*'k'"):
        SVI(model, autoguide.AutoNormal(model), Adam({}), Trace_ELBO()).step(data)
    with pytest.raises(ValueError, match="outside the model"):
        MCMC(NUTS(model), 1, warmup_steps=1, disable_progbar=True).run(data)


@pytest.mark.parametrize("where", ["outside", "inside"])
def test_the_audit_reports_a_parameter_that_is_none_of_the_models(where, data):
    flat = ebm.Flat(device=data.device)
    energy = Pyro(positive(data.device))
    make = lambda: ebm.GibbsBoltzmann(energy, flat, log_partition=quadrature())
    fixed = make()

    def model(x):
        d = fixed if where == "outside" else make()
        with pyro.plate("n", len(x)):
            pyro.sample("x", d, obs=x)

    if where == "inside":
        assert not ebm.audit(model, data)
    else:
        with pytest.warns(ebm.UnnormalizedWarning, match="construct the GibbsBoltzmann"):
            ebm.audit(model, data)


# A network ---------------------------------------------------------------------------------------


class Network(PyroModule):
    """A Bayesian network as an energy, in a model that also reads it itself."""

    def __init__(self, x, method):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(1, 2), nn.Tanh(), nn.Linear(2, 1))
        to_pyro_module_(self.net)
        for module in self.net.modules():
            for name, value in list(module.named_parameters(recurse=False)):
                normal = dist.Normal(torch.zeros_like(value), 1.0).to_event(value.dim())
                setattr(module, name, PyroSample(normal))
        self.x, self.method = x, method

    def energy(self, x):
        return self.net(x).squeeze(-1)

    def forward(self):
        base = dist.Normal(torch.zeros_like(self.x[0]), 1.5).to_event(1)
        d = ebm.GibbsBoltzmann(self.energy, base, log_partition=self.method)
        with pyro.plate("n", len(self.x)):
            pyro.sample("x", d, obs=self.x)
        pyro.deterministic("bound", d.potential(self.x[0]) + base.log_prob(self.x[0]))
        return pyro.deterministic("read", self.energy(self.x[0]))


@pytest.fixture
def network(device):
    x = torch.tensor([[0.5], [1.0], [1.5], [2.0]], device=device)
    return Network(x, ebm.partition.Quadrature(-8.0, 8.0, 60))


def test_the_energy_has_the_values_that_the_rest_of_its_model_reads(network):
    trace = poutine.trace(network).get_trace()
    assert sum("weight" in name for name in trace.nodes) == 2
    torch.testing.assert_close(
        trace.nodes["bound"]["value"], trace.nodes["read"]["value"], **EXACT
    )


@pytest.mark.slow
def test_nuts_samples_the_weights_of_a_bayesian_network(network, device):
    """Against importance sampling from the prior."""
    mcmc = MCMC(NUTS(network), 200, warmup_steps=100, disable_progbar=True)
    mcmc.run()
    draws = mcmc.get_samples()
    shapes = {
        "net.0.weight": (2, 1),
        "net.0.bias": (2,),
        "net.2.weight": (1, 2),
        "net.2.bias": (1,),
    }
    assert {name: draws[name].shape[1:] for name in draws} == shapes

    def energies(x, w, b, v, c):  # shape: (n,) points, weights of (K,) networks
        hidden = (w * x[:, None, None, None] + b[:, :, None]).tanh()
        return (v.transpose(1, 2) * hidden).sum((2, 3)) + c.squeeze(-1)

    weights = [torch.randn(20_000, *shape, device=device) for shape in shapes.values()]
    grid = torch.linspace(-8.0, 8.0, 201, device=device)
    log_base = dist.Normal(torch.zeros((), device=device), 1.5).log_prob
    log_z = (log_base(grid)[:, None] - energies(grid, *weights)).logsumexp(0) + math.log(0.08)
    x = network.x.squeeze(-1)
    log_weight = (-energies(x, *weights)).sum(0) - len(x) * log_z
    weight = log_weight.softmax(0)

    def rise(w, b, v, c):
        ends = torch.tensor([2.0, -2.0], device=device)
        high, low = energies(ends, w, b, v, c)
        return high - low

    truth = rise(*weights)
    mean = (weight * truth).sum()
    sd = (weight * (truth - mean) ** 2).sum().sqrt()
    # The error of 20,000 weights is small beside that of 200 draws.
    assert 1.0 / weight.square().sum() > 5_000
    assert standard_errors(rise(*(draws[name] for name in shapes)), mean, sd) < FAR
    assert abs(mean) > 0.3 * sd  # the data say something
