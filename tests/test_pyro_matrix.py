"""Every feature of Pyro, with an energy as latent, as observation and in a guide.

In each role the posterior of the site ``z`` is the normal law of mean 1/2 and variance 1/2 in
every component, and the evidence is known, so that a cell asks for the right number. A new
feature is one line of ``FEATURES``. Cells that cannot work stand in ``CANNOT`` with their reason,
and must raise the error that is written there. Features for discrete sites are in
``test_pyro_finite.py``, chains and guides that run for longer in ``test_pyro_long.py``.
"""

import contextlib
import itertools
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
    HMC,
    MCMC,
    NUTS,
    SVI,
    Importance,
    JitTrace_ELBO,
    JitTraceGraph_ELBO,
    Predictive,
    RandomWalkKernel,
    RenyiELBO,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
    autoguide,
)
from pyro.infer.importance import vectorized_importance_weights
from pyro.infer.inspect import get_dependencies, render_model
from pyro.infer.mcmc.api import StreamingMCMC
from pyro.infer.reparam import NeuTraReparam
from pyro.optim import Adam

import pyro_ebm as ebm
from tests.common import FAR, NUMERIC, standard_errors

EVENTS = {"scalar": (), "vector": (2,)}
MEAN, SD = 0.5, math.sqrt(0.5)

# The roles ---------------------------------------------------------------------------------------


class Problem(NamedTuple):
    """An energy in one role, and the truth."""

    model: Callable[[], Any]
    guide: Callable[[], Any]  # it can learn, and starts at the exact posterior
    home: Callable[[], Any]  # the one of the two that has the energy's site; returns its value
    site: str
    score: Callable[[dict], torch.Tensor]  # log-density of the energy's site, from all values
    log_evidence: float  # without what a missing log Z takes away
    event: tuple[int, ...]
    device: torch.device
    change: Callable[..., "Problem"]  # the same with other options


def over_event(x, event_dim):
    return x.sum(tuple(range(-event_dim, 0))) if event_dim else x


def log_normal(x, mean, precision, event_dim):
    precision = torch.as_tensor(precision)
    terms = (precision / (2 * math.pi)).log() - precision * (x - mean) ** 2
    return over_event(0.5 * terms, event_dim)


def quadrature():
    return ebm.partition.Quadrature(-9.0, 10.0, 64)


def normal_model(event, device):
    """The prior N(0, 1) and the datum 1 with noise N(0, 1): the posterior is N(1/2, 1/2)."""

    def model():
        z = pyro.sample("z", dist.Normal(torch.zeros(event, device=device), 1.0).to_event())
        pyro.sample("y", dist.Normal(z, 1.0).to_event(len(event)), obs=torch.ones_like(z))

    return model


def normal_guide(event, device):
    def guide():
        loc = pyro.param("loc", lambda: torch.full(event, MEAN, device=device))
        scale = pyro.param(
            "scale", lambda: torch.full(event, SD, device=device), constraint=constraints.positive
        )
        pyro.sample("z", dist.Normal(loc, scale).to_event(len(event)))

    return guide


def log_evidence(event):
    return log_normal(torch.ones(event), 0.0, 0.5, len(event)).item()


def options(event, precision=lambda: 1.0, log_partition=None, decorate=lambda d: d, extra=0):
    """The options of all roles: a factor of the energy, a method for log Z, and what is done to
    the distribution, with the event dimensions that this adds."""
    return precision, log_partition, decorate, len(event) + extra


def latent(event, device, **opts):
    precision, log_partition, decorate, n = options(event, **opts)

    def model():
        k = precision()
        energy = lambda x: over_event(0.5 * k * x**2, len(event))
        flat = ebm.Flat(event, device=device)
        d = decorate(ebm.GibbsBoltzmann(energy, flat, log_partition=log_partition))
        z = pyro.sample("z", d)
        ones = torch.ones(d.event_shape, device=device)
        pyro.sample("y", dist.Normal(z, 1.0).to_event(d.event_dim), obs=ones)
        return z

    def score(values):
        if log_partition is None:
            return over_event(-0.5 * values["z"] ** 2, n)
        return log_normal(values["z"], 0.0, values.get("k", 1.0), n)

    missing = 0.5 * math.prod(event) * math.log(2 * math.pi) if log_partition is None else 0.0
    evidence = log_evidence(event) + missing
    change = partial(latent, event, device)
    guide = normal_guide(event, device)
    return Problem(model, guide, model, "z", score, evidence, event, device, change)


def observed(event, device, **opts):
    precision, _, decorate, n = options(event, **opts)

    def model():
        z = pyro.sample("z", dist.Normal(torch.zeros(event, device=device), 1.0).to_event())
        k = precision()
        energy = ebm.Given(lambda x, z: over_event(0.5 * k * (x - z) ** 2, len(event)), z)
        flat = ebm.Flat(event, device=device)
        d = decorate(ebm.GibbsBoltzmann(energy, flat, log_partition=quadrature()))
        return pyro.sample("x", d, obs=torch.ones(d.event_shape, device=device))

    def score(values):
        return log_normal(values["x"], values["z"], values.get("k", 1.0), n)

    evidence = log_evidence(event)
    change = partial(observed, event, device)
    guide = normal_guide(event, device)
    return Problem(model, guide, model, "x", score, evidence, event, device, change)


def in_guide(event, device, **opts):
    precision, _, decorate, n = options(event, **opts)

    def guide():
        loc = pyro.param("loc", lambda: torch.full(event, MEAN, device=device))
        start = lambda: torch.full(event, SD**-2, device=device)
        k = precision() * pyro.param("precision", start, constraint=constraints.positive)
        energy = lambda x: over_event(0.5 * k * (x - loc) ** 2, len(event))

        def sampler(d, sample_shape):
            noise = torch.randn(d.shape(sample_shape), device=device)
            return (loc + noise / k.sqrt()).detach()

        flat = ebm.Flat(event, device=device)
        method = quadrature()
        d = ebm.GibbsBoltzmann(energy, flat, log_partition=method, sampler=sampler)
        return pyro.sample("z", decorate(d))

    def score(values):
        return log_normal(values["z"], MEAN, values.get("k", 1.0) / SD**2, n)

    evidence = log_evidence(event)
    change = partial(in_guide, event, device)
    model = normal_model(event, device)
    return Problem(model, guide, guide, "z", score, evidence, event, device, change)


ROLES = {"latent": latent, "observed": observed, "guide": in_guide}

# Handlers and plates -----------------------------------------------------------------------------


def is_right(program, p, scale=1.0):
    """Run a program; the energy's site must be scored by the formula."""
    trace = poutine.trace(program).get_trace()
    trace.compute_log_prob()
    sites = {n: node["value"] for n, node in trace.nodes.items() if node["type"] == "sample"}
    found = trace.nodes[p.site]["log_prob"]
    torch.testing.assert_close(found, (scale * p.score(sites)).expand_as(found), **NUMERIC)
    return trace


def point(p):
    return torch.full(p.event, 0.3, device=p.device)


def with_condition(p):
    node = is_right(poutine.condition(p.home, {p.site: point(p)}), p).nodes[p.site]
    assert node["is_observed"]
    torch.testing.assert_close(node["value"], point(p))


def with_replay(p):
    first = poutine.trace(p.home).get_trace()
    second = is_right(poutine.replay(p.home, trace=first), p)
    torch.testing.assert_close(second.nodes[p.site]["value"], first.nodes[p.site]["value"])


def with_block(p):
    trace = poutine.trace(poutine.block(p.home, hide=[p.site])).get_trace()
    assert p.site not in trace.nodes


def with_do(p):
    other = point(p)
    trace = is_right(poutine.do(p.home, {p.site: other}), p)
    assert (trace.nodes[p.site]["value"] != other).all()
    torch.testing.assert_close(trace.nodes["_RETURN"]["value"], other)


def with_lift(p):
    one = torch.ones((), device=p.device)
    p = p.change(precision=lambda: pyro.param("k", one), log_partition=quadrature())
    trace = is_right(poutine.lift(p.home, prior={"k": dist.Uniform(0.7 * one, 1.4 * one)}), p)
    assert trace.nodes["k"]["type"] == "sample"
    assert trace.nodes["k"]["value"] != 1


def with_scale(p):
    is_right(poutine.scale(p.home, scale=2.5), p, 2.5)


def with_mask(p):
    is_right(poutine.mask(p.home, mask=False), p, 0.0)


def with_infer_config(p):
    trace = is_right(poutine.infer_config(p.home, lambda site: {"tag": site["name"]}), p)
    assert trace.nodes[p.site]["infer"]["tag"] == p.site


def with_plate(p, *shape, subsample=None, scale=1.0, **opts):
    def program():
        with contextlib.ExitStack() as stack:
            for i, n in enumerate(reversed(shape)):
                stack.enter_context(pyro.plate(f"plate_{i}", n, subsample, dim=-1 - i))
            return p.change(**opts).home()

    trace = is_right(program, p, scale)
    assert trace.nodes[p.site]["log_prob"].shape == ((subsample,) if subsample else shape)


def with_to_event(p):
    p = p.change(decorate=lambda d: d.expand((3,)).to_event(1), extra=1)
    assert is_right(p.home, p).nodes[p.site]["fn"].event_shape == (3, *p.event)


def with_expand(p):
    with_plate(p, 3, decorate=lambda d: d.expand((3,)))


def with_masked_distribution(p):
    mask = torch.tensor([True, False, True], device=p.device)
    decorate = lambda d: d.expand((3,)).mask(mask)
    with_plate(p, 3, scale=mask.to(torch.get_default_dtype()), decorate=decorate)


# MCMC --------------------------------------------------------------------------------------------


def run(kernel, num_samples, warmup_steps, api=MCMC):
    mcmc = api(kernel, num_samples, warmup_steps=warmup_steps, disable_progbar=True)
    mcmc.run()
    return mcmc


def with_chain(p, make, num_samples=100, warmup_steps=100):
    mcmc = run(make(p.model), num_samples, warmup_steps)
    draws = mcmc.get_samples()["z"]
    assert draws.shape == (num_samples, *p.event)
    assert standard_errors(draws, MEAN, SD) < FAR


def with_streaming(p):
    stats = run(NUTS(p.model), 100, 100, StreamingMCMC).get_statistics()[0, "z"]
    # At most 100 effective draws, and hardly fewer than 10.
    torch.testing.assert_close(
        stats["mean"], torch.full_like(point(p), MEAN), rtol=0, atol=FAR * SD / 10**0.5
    )
    assert (stats["variance"] > 0).all()


INITS = {
    "feasible": (lambda p: autoguide.init_to_feasible, lambda z, p: (z == 0).all()),
    "median": (lambda p: autoguide.init_to_median, lambda z, p: (z.abs() < 3).all()),
    "mean": (lambda p: autoguide.init_to_mean, lambda z, p: (z.abs() < 3).all()),
    "uniform": (
        lambda p: autoguide.init_to_uniform(radius=0.1),
        lambda z, p: (z.abs() <= 0.1).all(),
    ),
    "sample": (lambda p: autoguide.init_to_sample, lambda z, p: z.isfinite().all()),
    "value": (
        lambda p: autoguide.init_to_value(values={"z": point(p)}),
        lambda z, p: (z == point(p)).all(),
    ),
    "generated": (
        lambda p: autoguide.initialization.init_to_generated(
            generate=lambda: autoguide.init_to_value(values={"z": point(p)})
        ),
        lambda z, p: (z == point(p)).all(),
    ),
}


def with_init(p, make, strategy):
    init, is_start = INITS[strategy]
    kernel = make(p.model, init_strategy=init(p))
    kernel.setup(0)
    assert is_start(kernel.initial_params["z"], p)
    # So few draws cannot adapt.
    fixed = {"step_size": 0.3, "adapt_step_size": False, "adapt_mass_matrix": False}
    draws = run(make(p.model, init_strategy=init(p), **fixed), 5, 0).get_samples()["z"]
    assert draws.isfinite().all()
    assert (draws != draws[0]).any()


# Guides and bounds -------------------------------------------------------------------------------


def with_autoguide(p, make):
    guide = make(p.model)
    svi = SVI(p.model, guide, Adam({"lr": 0.01}), Trace_ELBO())
    assert all(math.isfinite(svi.step()) for _ in range(3))
    assert poutine.trace(guide).get_trace().nodes["z"]["value"].shape == p.event
    if isinstance(guide, autoguide.AutoLaplaceApproximation):
        assert guide.laplace_approximation()()["z"].shape == p.event


def with_elbo(p, make, num_losses=10):
    """At the exact posterior the loss is minus the log-evidence, up to the estimator's noise."""
    elbo = make()
    losses = torch.tensor([elbo.loss_and_grads(p.model, p.guide) for _ in range(num_losses)])
    noise = FAR * losses.std().item() / num_losses**0.5
    torch.testing.assert_close(losses.mean().item(), -p.log_evidence, rtol=1e-6, atol=noise)
    grads = [leaf.grad for _, leaf in pyro.get_param_store().named_parameters()]
    assert len(grads) == 2
    assert all(grad is not None and grad.isfinite().all() for grad in grads)


def with_predictive(p, parallel=False, num_samples=3, **kwargs):
    """Draws of all sites: of the prior, or of the posterior where there is a guide."""
    model = poutine.uncondition(p.model) if p.site == "x" else p.model
    found = Predictive(model, num_samples=num_samples, parallel=parallel, **kwargs)()
    assert found["z"].shape == (num_samples, *p.event)
    assert all(value.isfinite().all() for value in found.values())
    mean, sd = (MEAN, SD) if "guide" in kwargs else (0.0, 1.0)
    error = (found["z"].mean(0) - mean) * math.sqrt(num_samples) / sd
    assert error.abs().max() < FAR
    if p.site == "x":  # x is z with noise of variance 1
        error = (found["x"] - found["z"]).mean(0) * math.sqrt(num_samples)
        assert error.abs().max() < FAR


def with_posterior_samples(p, parallel):
    draws = torch.randn(7, *p.event, device=p.device)
    model = poutine.uncondition(p.model)
    found = Predictive(model, {"z": draws}, parallel=parallel)()
    (name,) = found
    assert found[name].shape == draws.shape
    assert ((found[name] - draws).abs() < 2 * FAR).all()


def with_importance(p, **opts):
    p = p.change(**opts) if opts else p
    weights = Importance(p.model, p.guide, num_samples=5).run()
    expected = torch.tensor(p.log_evidence, device=p.device)
    torch.testing.assert_close(weights.get_log_normalizer(), expected, **NUMERIC)


def with_vectorized_importance(p):
    p = p.change(log_partition=quadrature())
    found = vectorized_importance_weights(p.model, p.guide, num_samples=5, max_plate_nesting=0)[0]
    torch.testing.assert_close(found, torch.full_like(found, p.log_evidence), **NUMERIC)


def with_render(p):
    source = render_model(p.home, render_distributions=True).source
    assert f"{p.site} [label" in source
    assert f"{p.site} ~ GibbsBoltzmann" in source
    assert ("z -> x" in source) == (p.site == "x")


def with_dependencies(p):
    found = get_dependencies(p.home)
    parents = {"z", p.site}
    assert set(found["prior_dependencies"][p.site]) == parents
    assert set(found["posterior_dependencies"]["z"]) >= parents


def with_neutra(p, num_steps=3, num_samples=10, warmup_steps=30):
    guide = autoguide.AutoIAFNormal(p.model, hidden_dim=[8])
    svi = SVI(p.model, guide, Adam({"lr": 0.02}), Trace_ELBO())
    assert all(math.isfinite(svi.step()) for _ in range(num_steps))
    neutra = NeuTraReparam(guide.requires_grad_(False))
    mcmc = run(NUTS(neutra.reparam(p.model)), num_samples, warmup_steps)
    z = neutra.transform_sample(mcmc.get_samples()["z_shared_latent"])["z"]
    assert z.shape == (num_samples, *p.event)
    assert z.isfinite().all()
    return z


# The matrix --------------------------------------------------------------------------------------

ALL = ("latent", "observed", "guide")
MODEL = ("latent", "observed")  # takes a model alone, or makes its guide itself

AUTOGUIDES = {
    "AutoDelta": autoguide.AutoDelta,
    "AutoNormal": autoguide.AutoNormal,
    "AutoDiagonalNormal": autoguide.AutoDiagonalNormal,
    "AutoMultivariateNormal": autoguide.AutoMultivariateNormal,
    "AutoLowRankMultivariateNormal": autoguide.AutoLowRankMultivariateNormal,
    "AutoIAFNormal": partial(autoguide.AutoIAFNormal, hidden_dim=[8]),
    "AutoLaplaceApproximation": autoguide.AutoLaplaceApproximation,
    "AutoStructured": autoguide.AutoStructured,
    "AutoGaussian": partial(autoguide.AutoGaussian, backend="dense"),
    "AutoNormalMessenger": autoguide.AutoNormalMessenger,
    "AutoRegressiveMessenger": autoguide.AutoRegressiveMessenger,
    "AutoHierarchicalNormalMessenger": autoguide.AutoHierarchicalNormalMessenger,
}
ELBOS = {
    "Trace": Trace_ELBO,
    "vectorized Trace": partial(Trace_ELBO, 5, vectorize_particles=True, max_plate_nesting=0),
    "TraceGraph": TraceGraph_ELBO,
    "TraceMeanField": TraceMeanField_ELBO,
    "TraceEnum": partial(TraceEnum_ELBO, strict_enumeration_warning=False, max_plate_nesting=0),
    # At alpha = 0 Pyro gives no gradient to guide sites that are not reparametrised, ours or its.
    "Renyi": partial(RenyiELBO, alpha=0.5, num_particles=3),
    "JitTrace": partial(JitTrace_ELBO, ignore_jit_warnings=True),
    "JitTraceGraph": partial(JitTraceGraph_ELBO, ignore_jit_warnings=True),
}
KERNELS = {"NUTS": NUTS, "HMC": partial(HMC, num_steps=4)}

FEATURES = {
    "trace": (lambda p: is_right(p.home, p), ALL),
    "condition": (with_condition, ALL),
    "replay": (with_replay, ALL),
    "block": (with_block, ALL),
    "do": (with_do, ALL),
    "lift": (with_lift, ALL),
    "scale": (with_scale, ALL),
    "mask": (with_mask, ALL),
    "infer_config": (with_infer_config, ALL),
    "plate": (lambda p: with_plate(p, 4), ALL),
    "two plates": (lambda p: with_plate(p, 3, 4), ALL),
    "subsampled plate": (lambda p: with_plate(p, 10, subsample=4, scale=2.5), ALL),
    "Distribution.to_event": (with_to_event, ALL),
    "Distribution.expand": (with_expand, ALL),
    "Distribution.mask": (with_masked_distribution, ALL),
    "NUTS": (partial(with_chain, make=NUTS), MODEL),
    "NUTS, jit": (
        partial(with_chain, make=partial(NUTS, jit_compile=True, ignore_jit_warnings=True)),
        MODEL,
    ),
    "HMC": (partial(with_chain, make=HMC, num_samples=50, warmup_steps=50), MODEL),
    "RandomWalkKernel": (
        partial(with_chain, make=RandomWalkKernel, num_samples=400, warmup_steps=200),
        MODEL,
    ),
    "StreamingMCMC": (with_streaming, MODEL),
    **{
        f"{name}, init_to_{init}": (partial(with_init, make=make, strategy=init), MODEL)
        for name, make in KERNELS.items()
        for init in INITS
    },
    **{name: (partial(with_autoguide, make=make), MODEL) for name, make in AUTOGUIDES.items()},
    **{f"{name}_ELBO": (partial(with_elbo, make=make), ALL) for name, make in ELBOS.items()},
    "Predictive": (with_predictive, MODEL),
    "Predictive, parallel": (partial(with_predictive, parallel=True, num_samples=500), MODEL),
    "Predictive, guide": (lambda p: with_predictive(p, guide=p.guide), ALL),
    "Predictive, guide, parallel": (
        lambda p: with_predictive(p, guide=p.guide, parallel=True, num_samples=500),
        ALL,
    ),
    "Predictive, posterior": (partial(with_posterior_samples, parallel=False), MODEL),
    "Predictive, posterior, parallel": (partial(with_posterior_samples, parallel=True), MODEL),
    "Importance": (with_importance, ALL),
    "Importance, with log Z": (lambda p: with_importance(p, log_partition=quadrature()), ALL),
    "vectorized_importance_weights": (with_vectorized_importance, ALL),
    "render_model": (with_render, ALL),
    "get_dependencies": (with_dependencies, ALL),
    "NeuTraReparam": (with_neutra, MODEL),
}


class Cannot(NamedTuple):
    """An error that a cell must raise; its message says why."""

    error: type[Exception]
    match: str


ONE_DIMENSION = Cannot(UserWarning, "input_dim = 1. Consider using an affine transformation")
NO_PATHS = Cannot(NotImplementedError, "must be fully reparameterized")  # a chain has no rsample
NO_GRAPH = Cannot(NotImplementedError, "cannot learn to transform draws")
NO_MEAN = Cannot(NotImplementedError, "has no mean in closed form")  # it centers at the prior's
NO_EVIDENCE = Cannot(ebm.UnnormalizedError, "importance sampling estimates evidence")
ANY = "*"
CANNOT = {
    ("AutoIAFNormal", ANY, "scalar"): ONE_DIMENSION,
    ("NeuTraReparam", ANY, "scalar"): ONE_DIMENSION,
    ("AutoRegressiveMessenger", "latent", ANY): NO_GRAPH,
    ("AutoHierarchicalNormalMessenger", "latent", ANY): NO_MEAN,
    ("TraceMeanField_ELBO", "guide", ANY): NO_PATHS,
    ("Importance", "latent", ANY): NO_EVIDENCE,
}


def cells(features, kinds):
    """All cells of a matrix, each with its name."""
    return [
        pytest.param(feature, role, kind, id=f"{feature}-{role}-{kind}")
        for feature, (_, roles) in features.items()
        for role in roles
        for kind in kinds
    ]


def works_or_says_why(cannot, feature, role, kind):
    """Expect the error of a cell that cannot work."""
    keys = itertools.product((feature,), (role, ANY), (kind, ANY))
    found = next((cannot[key] for key in keys if key in cannot), None)
    return pytest.raises(found.error, match=found.match) if found else contextlib.nullcontext()


@pytest.mark.parametrize(("feature", "role", "event"), cells(FEATURES, EVENTS))
def test_feature(feature, role, event, device):
    problem = ROLES[role](EVENTS[event], device)
    with works_or_says_why(CANNOT, feature, role, event):
        FEATURES[feature][0](problem)


NUMBERS = [
    "trace",
    "two plates",
    "subsampled plate",
    "Distribution.to_event",
    "vectorized_importance_weights",
    "Importance, with log Z",
]


@pytest.mark.parametrize("feature", NUMBERS)
@pytest.mark.parametrize("role", ROLES)
def test_a_cell_sees_a_wrong_energy(feature, role, device):
    right = ROLES[role]((2,), device)
    two = lambda: 2.0
    wrong = right.change(precision=two)._replace(change=partial(right.change, precision=two))
    with pytest.raises(AssertionError):
        FEATURES[feature][0](wrong)


def assert_all_are_cells(cannot, features):
    assert {feature for feature, _, _ in cannot} <= set(features)
    assert {role for _, role, _ in cannot} <= {*ROLES, ANY}


def test_every_exception_is_of_a_cell():
    assert_all_are_cells(CANNOT, FEATURES)


# Data that cannot be -----------------------------------------------------------------------------

OUTSIDE = {
    "NaN": ((), constraints.real, math.nan),
    "NaN in a vector": ((2,), constraints.real, [0.0, math.nan]),
    "negative": ((), constraints.positive, -1.0),
    "NaN on the half line": ((), constraints.positive, math.nan),
    "beyond an interval": ((2,), constraints.interval(0.0, 1.0), [0.5, 1.5]),
    "off the simplex": ((3,), constraints.simplex, [0.5, 0.5, 0.5]),
    "not in order": ((2,), constraints.ordered_vector, [1.0, 0.0]),
    "above the diagonal": ((2, 2), constraints.lower_cholesky, [[1.0, 1.0], [0.0, 1.0]]),
    "half a spin": ((), constraints.boolean, 0.5),
    "NaN for a spin": ((), constraints.boolean, math.nan),
    "no such integer": ((), constraints.integer_interval(1, 3), 4),
    "two hot": ((3,), constraints.one_hot, [1, 1, 0]),
}


@pytest.mark.parametrize(("event", "support", "value"), OUTSIDE.values(), ids=OUTSIDE)
def test_data_outside_the_support_are_refused_by_the_name_of_the_site(
    event, support, value, device
):
    flat = ebm.Flat(event, support, device=device)
    energy = lambda x: x.to(torch.get_default_dtype()).flatten(x.dim() - len(event)).sum(-1)
    if not event:
        energy = lambda x: x.to(torch.get_default_dtype())

    def model(x):
        pyro.sample("spectrum", ebm.GibbsBoltzmann(energy, flat), obs=x)

    svi = SVI(model, lambda x: None, Adam({}), Trace_ELBO())
    assert math.isfinite(svi.step(flat.sample()))
    with pytest.raises(ValueError, match="'spectrum'"):
        svi.step(torch.tensor(value, device=device))
