"""Three back ends of one algorithm: they agree, and fall back with a reason."""

import itertools
import shutil
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_ebm as ebm
from pyro_ebm import _engine
from pyro_ebm._binding import python_state
from pyro_ebm._engine import Compiled, Eager, Traced, make_engine, why_not
from pyro_ebm._potential import potential_of
from pyro_ebm.kernels import Dense, Diagonal, State
from pyro_ebm.kernels.hmc import Chance
from tests.common import NUMERIC

pytestmark = pytest.mark.filterwarnings("ignore::pyro_ebm.ConvergenceWarning")

SCALES = torch.tensor([1.0, 2.0, 0.5]).double()
NET = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.SiLU(), torch.nn.Linear(8, 1)).double()


def banana(x):
    return 0.5 * (x / SCALES).square().sum(-1) + 0.3 * (x[..., 1] - x[..., 0].square()).square()


def network(x):
    return NET(x).squeeze(-1) + 0.5 * x.square().sum(-1)


def schools():
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    y = torch.tensor([28.0, 8.0, -3.0])
    with pyro.plate("schools", 3):
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu + tau * theta, 10.0), obs=y)


TARGETS = {
    "energy": lambda: ebm.GibbsBoltzmann(banana, ebm.Flat((3,))),
    "network": lambda: ebm.GibbsBoltzmann(network, ebm.Flat((3,))),
    "model": lambda: schools,
}
METRICS = {
    "diagonal": lambda d: Diagonal(torch.linspace(0.5, 2.0, d)),
    "dense": lambda d: Dense.of(torch.eye(d) + 0.3),
}
KERNELS = {
    "nuts": lambda target: ebm.NUTS(target),
    "hmc": lambda target: ebm.HMC(target, num_steps=3),
    "chees": lambda target: ebm.ChEES(target),
}
BACKENDS = {"traced": Traced, "compiled": Compiled}


def draws(kernel, target, backend, warmup=8):
    pyro.set_rng_seed(4)
    mcmc = ebm.MCMC(
        KERNELS[kernel](TARGETS[target]()),
        4,
        warmup,
        num_chains=3,
        backend=backend,
        disable_progbar=True,
    )
    mcmc.run()
    samples = {**mcmc.get_samples(group_by_chain=True), **mcmc.sample_stats}
    return torch.cat(
        [v.flatten(2) if v.dim() > 2 else v.unsqueeze(-1) for v in samples.values()], -1
    )


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_traced_chains_are_the_eager_ones_to_rounding(kernel, target):
    eager, traced = (draws(kernel, target, backend) for backend in ("eager", "traced"))
    torch.testing.assert_close(traced, eager, **NUMERIC)


@pytest.mark.slow
@pytest.mark.parametrize(("kernel", "target"), [("nuts", "model"), ("chees", "network")])
def test_compiled_chains_are_the_eager_ones_to_rounding(kernel, target):
    eager, compiled = (draws(kernel, target, backend, 2) for backend in ("eager", "compiled"))
    torch.testing.assert_close(compiled, eager, **NUMERIC)


@pytest.mark.slow
@pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)
@pytest.mark.parametrize("kind", BACKENDS.values(), ids=BACKENDS)
def test_trajectories_agree_and_are_counted(kind, metric):
    x, p = torch.randn(5, 3), torch.randn(5, 3)
    step = torch.linspace(0.05, 0.2, 5).unsqueeze(-1)
    engines = Eager(banana), kind(banana)
    phase = x, p, engines[0].gradient(x)[1]
    for num in (1, 4):
        ends = [engine.integrate(metric(3), phase, step, num) for engine in engines]
        torch.testing.assert_close(ends[1], ends[0], **NUMERIC)
    assert engines[1].executed == engines[0].executed - 5  # the gradient above


@pytest.mark.parametrize("kind", [Eager, Traced])
def test_settings_that_change_reach_the_graph(kind):
    engine, x = kind(banana), torch.randn(4, 3)
    state = State(x, *engine.gradient(x))
    for step, num in ((0.1, 3), (0.2, 2)):
        chance = Chance(torch.randn(4, 3), torch.full((4,), 0.5), torch.rand(4))
        setting = torch.tensor(step), 0.2, num
        row = lambda q, info: torch.stack([info.step_size, info.num_steps.to(q)], -1)
        _, rows = engine.draw(row, Diagonal(torch.ones(3)), state, chance, setting)
        torch.testing.assert_close(rows, torch.tensor([[step, float(num)]] * 4), **NUMERIC)


@pytest.mark.slow
def test_a_compiled_graph_serves_trajectories_of_all_lengths():
    engine = Compiled(banana)
    x = torch.randn(5, 3)
    phase, step = (x, torch.randn(5, 3), torch.zeros(5, 3)), torch.full((5, 1), 0.1)
    metric = Diagonal(torch.ones(3))
    engine.integrate(metric, phase, step, 3)
    spent = engine.compile_s
    for num in (1, 7, 50):
        engine.integrate(metric, phase, step, num)
    assert engine.compile_s == spent > 0
    assert len(engine._graphs) == 1


def potential(energy):
    return potential_of(ebm.GibbsBoltzmann(energy, ebm.Flat((3,))), (), {})


def counting():
    calls = 0

    def energy(x):
        nonlocal calls
        calls += 1
        return banana(x)

    return energy


def listing(calls=None):
    calls = [] if calls is None else calls

    def energy(x):
        calls.append(1)
        return banana(x)

    return energy


def iterating():
    calls = itertools.count()

    def energy(x):
        next(calls)
        return banana(x)

    return energy


def keyed():
    calls = {"n": 0}

    def energy(x):
        calls["n"] += 1
        return banana(x)

    return energy


class Counter:
    def __init__(self):
        self.calls = 0

    def __call__(self, x):
        self.calls += 1
        return banana(x)


TOTAL = 0


def counted_by_a_global():
    def energy(x):
        global TOTAL  # noqa: PLW0603 - what is tested
        TOTAL += 1
        return banana(x)

    return energy


IMPURE = {
    "nonlocal": counting,
    "list": listing,
    "iterator": iterating,
    "dictionary": keyed,
    "attribute": Counter,
    "global": counted_by_a_global,
}


@pytest.mark.parametrize("make", IMPURE.values(), ids=IMPURE)
def test_an_energy_that_changes_python_variables_is_not_traced(make):
    energy = make()
    assert python_state(energy) == python_state(energy)
    assert "changes Python variables" in why_not(potential(energy), torch.randn(4, 3))
    assert type(make_engine(potential(energy), "auto", torch.randn(4, 3))) is Eager


def branching(x):
    return banana(x) if (x > 0).all() else 2.0 * banana(x)


def random(x):
    return banana(x) * (1.0 + torch.rand(()))


NOT_TRACED = {"branching": branching, "random": random}


@pytest.mark.parametrize("energy", NOT_TRACED.values(), ids=NOT_TRACED)
def test_a_back_end_that_cannot_be_had_says_why(energy):
    z = torch.randn(4, 3)
    with pytest.warns(UserWarning, match="backend='traced' runs eagerly: "):
        engine = make_engine(potential(energy), "traced", z)
    assert type(engine) is Eager
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert type(make_engine(potential(energy), "auto", z)) is Eager


def test_without_a_compiler_a_run_is_traced(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.warns(UserWarning, match="backend='compiled' runs traced: there is no C"):
        engine = make_engine(potential(banana), "compiled", torch.randn(4, 3))
    assert type(engine) is Traced


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_ordinary_targets_are_traced_by_default(target):
    found = potential_of(target(), (), {})
    engine = make_engine(found, "auto", torch.randn(4, found.num_dims))
    assert type(engine) is Traced


def test_a_wrong_trace_is_noticed(monkeypatch):
    real = _engine.frozen
    wrong = lambda function, parts: lambda x: tuple(1.01 * v for v in real(function, parts)(x))
    monkeypatch.setattr(_engine, "frozen", wrong)
    assert "does not give" in why_not(potential(banana), torch.randn(4, 3))


def walled_by_linear_algebra(x):
    matrix = torch.diag_embed(x)
    return torch.linalg.cholesky(matrix).square().sum((-2, -1))  # fails where some x <= 0


@pytest.mark.parametrize("kind", [Eager, Traced])
def test_a_chain_whose_linear_algebra_fails_gets_nan_alone(kind):
    engine = kind(walled_by_linear_algebra)
    x = torch.rand(6, 3) + 0.1
    engine.gradient(x)
    x[2] = -1.0
    value, grad = engine.gradient(x)
    assert value.isnan().tolist() == [i == 2 for i in range(6)]
    assert grad.isfinite().all()


def test_parameters_that_change_between_runs_are_seen():
    scale = torch.nn.Parameter(torch.ones(()))
    energy = lambda x: scale * banana(x)
    first = Traced(energy).gradient(torch.ones(2, 3))[0]
    with torch.no_grad():
        scale.mul_(3.0)
    torch.testing.assert_close(Traced(energy).gradient(torch.ones(2, 3))[0], 3.0 * first)
