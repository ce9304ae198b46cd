"""Tables of log Z: against closed forms and quadrature, and the posteriors that they give."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pyro.distributions import constraints
from pyro.infer import MCMC, NUTS, SVI, Importance, Trace_ELBO

import pyro_ebm as ebm
from pyro_ebm._curve import Curve, Scale, integrate
from pyro_ebm.partition import Annealed, Exact, Quadrature, Table
from tests import lattice
from tests.common import EXACT, FAR, gaussian
from tests.lattice import far, ising

QUIET = pytest.mark.filterwarnings("ignore::pyro_ebm.ConvergenceWarning")  # of short runs

D = 3
NORMAL = dist.Normal(torch.zeros(D, dtype=torch.float64), 3.0).to_event(1)
BOX = ebm.Flat((1,), constraints.interval(-3.0, 3.0), dtype=torch.float64)
FAST = {"num_points": 13, "num_chains": 24, "num_samples": 150, "warmup": 120}


def wells(x):
    return 2.0 * (x.square() - 1.0).square().sum(-1)


LINE = torch.linspace(-3.0, 3.0, 4001, dtype=torch.float64)


def log_z_wells(beta):
    return torch.trapezoid((-beta[:, None] * wells(LINE[:, None])).exp(), LINE).log()


# The curve -------------------------------------------------------------------------------------

SCALES = {"even": (-1.0, 2.0), "log": (0.5, 6.0), "cubes": (0.0, 3.0)}
CUBIC = st.lists(st.floats(-3.0, 3.0), min_size=4, max_size=4)


@pytest.mark.parametrize("kind", SCALES)
@given(CUBIC)
def test_a_cubic_in_the_coordinate_is_found_from_its_slopes(kind, coefficients):
    low, high = SCALES[kind]
    scale = Scale.of(low, high, vanishing=True)
    assert scale.kind == kind
    nodes = scale.nodes(low, high, 7, torch.empty(0, dtype=torch.float64))
    a, b, c, e = coefficients

    def value(theta):
        u = scale.place(theta)
        return a + u * (b + u * (c + u * e))

    inner = nodes.clone()
    if kind == "cubes":
        inner[0] = 1e-9  # the root has no slope at 0
    inner.requires_grad_()
    (slope,) = torch.autograd.grad(value(inner).sum(), inner, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), inner) if slope.requires_grad else (0 * nodes,)
    curve = integrate(scale, inner.detach(), slope.detach()[:, None].expand(-1, 2), curvature)
    at = torch.linspace(low + 0.01, high, 50, dtype=torch.float64)
    gap = curve(at) - (value(at) - value(inner[:1]))
    assert gap.abs().max() < 1e-6  # of a root of 1e-9
    assert curve.std_error.max() < 1e-6


def test_its_gradient_is_that_of_its_value():
    nodes = Scale("log").nodes(0.5, 6.0, 9, torch.empty(0))
    curve = Curve(Scale("log"), nodes, torch.randn(9), torch.randn(9), torch.zeros(9))
    theta = torch.tensor([0.5, 0.9, 2.0, 5.99], requires_grad=True)
    assert torch.autograd.gradcheck(curve, theta[1:].detach().requires_grad_())
    assert torch.autograd.gradcheck(curve.error, theta[1:].detach().requires_grad_())
    torch.testing.assert_close(curve(nodes), curve.value, **EXACT)


# Values ----------------------------------------------------------------------------------------


def behind(table, truth):
    """How many standard errors the values are off at most, beyond the quadrature's rounding."""
    return ((table.values - truth).abs() / (table.std_error + 1e-6)).max()


def built(energy, base, *ends, **options):
    return Table(*ends, **{**FAST, **options}).build(ebm.GibbsBoltzmann(energy, base))


TABLES = {
    "from a normal base": (
        lambda: built(gaussian, NORMAL, 0.0, 10.0, num_points=25),
        lambda beta: -0.5 * D * (1.0 + 9.0 * beta).log(),
    ),
    "anchored by a number": (
        lambda: built(
            gaussian, ebm.Flat((D,)), 0.1, 10.0, anchor=0.5 * D * math.log(20.0 * math.pi)
        ),
        lambda beta: 0.5 * D * (2.0 * math.pi / beta).log(),
    ),
    "anchored by a method": (
        lambda: built(wells, BOX, 0.5, 6.0, anchor=Quadrature(-3.0, 3.0, 100)),
        log_z_wells,
    ),
    "from a box": (lambda: built(wells, BOX, 0.0, 5.0, num_points=25), log_z_wells),
    "of a parameter": (
        lambda: Table(
            0.5,
            3.0,
            **FAST,
            anchor=Quadrature(-3.0, 3.0, 100),
            make=lambda a: ebm.GibbsBoltzmann(lambda x: (a * x).square().sum(-1), BOX, 0.5),
        ).build(),
        lambda a: torch.trapezoid((-0.5 * (a[:, None] * LINE).square()).exp(), LINE).log(),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize(("make", "truth"), TABLES.values(), ids=TABLES)
def test_values_are_within_their_errors(make, truth):
    table = make()
    assert behind(table, truth(table.nodes)) < FAR
    assert 0 < table.std_error.max() < 0.1


@pytest.mark.slow
def test_a_wrong_slope_is_seen(monkeypatch):
    """As of chains that do not move along with beta."""
    honest = ebm.partition.table.draw_rungs

    def stale(family, nodes, *rest):
        rungs = honest(family, nodes, *rest)
        return rungs._replace(chains=rungs.chains[:1].expand_as(rungs.chains))

    monkeypatch.setattr("pyro_ebm.partition.table.draw_rungs", stale)
    table, truth = (part() for part in (TABLES["from a box"][0], lambda: log_z_wells))
    assert behind(table, truth(table.nodes)) > 2 * FAR


def small(coupling):
    return ebm.GibbsBoltzmann(ising(coupling), lattice.bits(3))


def test_small_supports_are_enumerated():
    table = Table(-0.5, 1.0, make=small)
    couplings = torch.linspace(-0.5, 1.0, 31)
    got = torch.stack([table.at(j).log_z(small(j)) for j in couplings])
    want = torch.stack([lattice.log_z(j, 3) for j in couplings])
    # A cubic over a step h = 1/16: h^4 / 384 times the fourth derivative, of about 400.
    torch.testing.assert_close(got, want, rtol=0.0, atol=2e-5)
    assert (table.std_error < 2e-5).all()
    assert table.at(torch.tensor(0.3))(small(0.3)).value.isfinite()


@pytest.mark.parametrize("num_points", [3, 5, 9])
def test_few_nodes_show_in_the_error_of_an_enumerated_table(num_points):
    make = lambda beta: ebm.GibbsBoltzmann(ising(1.0), lattice.bits(3), beta)
    betas = torch.linspace(0.05, 3.0, 40)
    found = Table(0.0, 3.0, num_points)(make(betas))
    # The error is that in the middle of an interval, near the largest of a cubic's.
    assert ((found.value - Exact()(make(betas)).value).abs() < 1.5 * found.std_error + 1e-12).all()
    assert found.std_error.max() > 1e-3


def test_a_table_from_zero_needs_a_base_that_is_normalised():
    base = ebm.GibbsBoltzmann(lambda x: 0.4 * x.square(), ebm.Flat())
    with pytest.raises(ValueError, match="low must be positive where the base is not normalised"):
        Table(0.0, 1.0).build(ebm.GibbsBoltzmann(lambda x: 0.1 * x.square(), base))


def test_states_that_are_whole_numbers_are_recognised():
    base = ebm.Flat((), constraints.integer_interval(1, 4))
    d = ebm.GibbsBoltzmann(lambda x: 0.3 * (1.0 * x - 2.0).square(), base, 1.5)
    torch.testing.assert_close(Table(0.0, 3.0)(d).value, Exact()(d).value, rtol=0.0, atol=1e-5)


@pytest.mark.slow
def test_a_lattice_by_sweeps_at_all_couplings():
    def make(coupling):
        return ebm.GibbsBoltzmann(ising(coupling), lattice.bits(5))

    options = {"num_points": 7, "num_chains": 16, "num_samples": 60, "warmup": 20}
    table = Table(0.0, 0.6, make=make, anchor=25 * math.log(2.0), **options).build()
    want = torch.stack([lattice.log_z(j, 5) for j in table.nodes])
    assert behind(table, want) < FAR
    assert table.std_error.max() < 0.3


def test_chains_that_have_not_arrived_are_named():
    d = ebm.GibbsBoltzmann(gaussian, ebm.Flat((D,)))
    far_out = torch.full((1, D), 300.0)
    table = Table(0.1, 10.0, 5, num_chains=8, num_samples=40, warmup=0, start=far_out)
    with pytest.warns(ebm.UnnormalizedWarning, match="Table cannot be trusted: at .* drifts"):
        table.build(d)


# As a log_partition ----------------------------------------------------------------------------


def cold(beta, table=None):
    return ebm.GibbsBoltzmann(wells, BOX, beta, log_partition=table)


@pytest.fixture(scope="module")
def table():
    """Along beta, up to a constant."""
    torch.set_default_dtype(torch.float64)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Table(0.2, 8.0, **FAST).build(cold(1.0))


def test_it_is_the_same_at_every_evaluation_and_built_again(table):
    beta = torch.tensor([0.3, 1.0, 7.0])
    d = cold(beta, table)
    first = d.log_prob(torch.zeros(3, 1))
    assert torch.equal(first, d.log_prob(torch.zeros(3, 1)))
    values = table.values
    state = torch.get_rng_state()
    table.build(cold(1.0))
    assert torch.equal(table.values, values)
    assert torch.equal(torch.get_rng_state(), state)


def test_plates_repeat_it(table):
    d = cold(torch.tensor(2.0), table)
    x = torch.linspace(-1.0, 1.0, 4)[:, None]
    torch.testing.assert_close(d.expand([4]).log_prob(x), d.log_prob(x), **EXACT)


def test_it_keeps_single_precision():
    base = ebm.Flat((1,), constraints.interval(-3.0, 3.0), dtype=torch.float32)
    d = ebm.GibbsBoltzmann(wells, base, torch.tensor(1.0, dtype=torch.float32))
    options = {**FAST, "num_points": 5, "num_samples": 20, "warmup": 20}
    assert Table(0.5, 4.0, **options).log_z(d).dtype == torch.float32


def test_evidence_without_an_anchor_is_refused(table):
    with pytest.raises(ebm.UnnormalizedError, match="up to a constant only.* give anchor="):
        ebm.log_partition(cold(1.0), table)

    def model():
        beta = pyro.sample("beta", dist.Uniform(0.2, 8.0))
        pyro.sample("x", cold(beta, table), obs=torch.zeros(1))

    with pytest.raises(ebm.UnnormalizedError, match="up to a constant only"):
        Importance(model, num_samples=2).run()


def test_a_value_outside_is_named(table):
    with pytest.raises(ValueError, match=r"must be between 0.2 and 8.0, got 9$"):
        cold(torch.tensor(9.0), table).log_prob(torch.zeros(1))


def test_another_energy_is_refused(table):
    d = ebm.GibbsBoltzmann(gaussian, BOX, 1.0, log_partition=table)
    with pytest.raises(ebm.UnnormalizedError, match="must be the one that the Table was made for"):
        d.log_prob(torch.zeros(1))


def two_unknowns(table):
    k = pyro.sample("k", dist.Normal(1.0, 0.1))
    beta = pyro.sample("beta", dist.Uniform(0.2, 8.0))
    d = ebm.GibbsBoltzmann(lambda x: k * wells(x), BOX, beta, log_partition=table)
    pyro.sample("x", d, obs=torch.zeros(1))


def test_an_energy_with_another_unknown_is_refused(table):
    with pytest.raises(ebm.UnnormalizedError, match="nothing random or learned but the table's"):
        MCMC(NUTS(two_unknowns), 5, 5, disable_progbar=True).run(table)
    message = "site 'x': log Z depends on the random k, of which its table knows nothing"
    with pytest.raises(ebm.UnnormalizedError, match=message):
        ebm.MCMC(ebm.NUTS(two_unknowns), 5, 5, disable_progbar=True).run(table)
    with pytest.raises(ebm.UnnormalizedError, match=message):
        ebm.audit(two_unknowns, table)


def test_a_table_of_a_product_of_unknowns_is_let_pass():
    table = Table(0.0, 1.0, make=small)

    def model():
        j = pyro.sample("a", dist.Uniform(0.0, 1.0)) * pyro.sample("b", dist.Uniform(0.0, 1.0))
        d = ebm.GibbsBoltzmann(ising(j), lattice.bits(3), log_partition=table.at(j))
        pyro.sample("x", d, obs=torch.ones(3, 3))

    assert ebm.audit(model) == []
    pyro.poutine.trace(model).get_trace().log_prob_sum()


def test_a_learned_energy_is_refused(table):
    def model():
        k = pyro.param("k", torch.tensor(1.0))
        d = ebm.GibbsBoltzmann(lambda x: k * wells(x), BOX, 1.0, log_partition=table)
        pyro.sample("x", d, obs=torch.zeros(1))

    svi = SVI(model, lambda: None, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
    with pytest.raises(ebm.UnnormalizedError, match="nothing random or learned"):
        svi.step()


def test_a_trajectory_that_leaves_is_rejected_and_said(table):
    def model():
        beta = pyro.sample("beta", dist.Exponential(0.05))
        pyro.sample("x", cold(beta, table), obs=torch.ones(1))

    table._warned = False
    mcmc = MCMC(NUTS(model), 30, 30, disable_progbar=True)
    with pytest.warns(ebm.UnnormalizedWarning, match="rejected, so that the posterior is cut"):
        mcmc.run()
    beta = mcmc.get_samples()["beta"]
    assert bool(((beta >= 0.2) & (beta <= 8.0)).all())


WRONG = {
    "ends": (lambda: Table(2.0, 1.0), "low must be below high, both finite, got 2.0 and 1.0"),
    "beta": (lambda: Table(-1.0, 1.0), "low must not be negative along beta, got -1.0"),
    "num_points": (lambda: Table(0.0, 1.0, 2), "num_points must be a whole number of at least 3"),
    "at": (lambda: Table(0.0, 1.0).at(torch.tensor(0.5)), "make must be given"),
    "build": (lambda: Table(0.0, 1.0).build(), "d must be given to build a table along beta"),
    "not at": (
        lambda: Table(0.0, 1.0, make=small).log_z(small(0.5)),
        r"log_partition must be table.at\(theta\)",
    ),
    "volume": (
        lambda: Table(0.0, 1.0, **FAST).build(ebm.GibbsBoltzmann(gaussian, ebm.Flat((1,)))),
        "low must be positive where the base is Flat on an infinite volume, got 0.0",
    ),
    "batch of energies": (
        lambda: Table(0.1, 1.0).build(
            ebm.GibbsBoltzmann(ebm.Given(lambda x, y: x * y, torch.ones(3)), ebm.Flat())
        ),
        r"no batch of its own, got one of \(3,\)",
    ),
    "walls": (
        lambda: Table(0.1, 1.0, **FAST).build(
            ebm.GibbsBoltzmann(lambda x: torch.where(x > 5, x, torch.inf), ebm.Flat())
        ),
        "start must have finite energies at all values of the parameter",
    ),
}


@pytest.mark.parametrize(("make", "message"), WRONG.values(), ids=WRONG)
def test_wrong_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# Posteriors ------------------------------------------------------------------------------------


def learned_beta(x, method):
    beta = pyro.sample("beta", dist.Uniform(0.2, 8.0))
    with pyro.plate("n", len(x)):
        pyro.sample("x", cold(beta, method), obs=x)


def beta_truth(x):
    grid = torch.linspace(0.2, 8.0, 1600)
    log_likelihood = -grid * wells(x).sum() - len(x) * log_z_wells(grid)
    return lattice.posterior(torch.zeros(()), log_likelihood, grid)


def coupled(x, table):
    coupling = pyro.sample("J", dist.Uniform(-0.5, 1.0))
    with pyro.plate("n", len(x)):
        d = ebm.GibbsBoltzmann(ising(coupling), lattice.bits(3), log_partition=table.at(coupling))
        pyro.sample("x", d, obs=x)


def coupling_truth(x):
    grid = torch.linspace(-0.5, 1.0, 1501)
    log_z = torch.stack([lattice.log_z(j, 3) for j in grid])
    return lattice.posterior(torch.zeros(()), -grid * ising(1.0)(x).sum() - len(x) * log_z, grid)


def of_stock(model, *args):
    mcmc = MCMC(NUTS(model), 300, 150, disable_progbar=True)
    mcmc.run(*args)
    return mcmc.get_samples(group_by_chain=True)


def of_ours(model, *args):
    mcmc = ebm.MCMC(ebm.NUTS(model), 120, 100, num_chains=16, disable_progbar=True)
    mcmc.run(*args)
    return mcmc.get_samples(group_by_chain=True)


@QUIET
@pytest.mark.slow
@pytest.mark.parametrize("sample", [of_stock, of_ours])
def test_nuts_has_the_posterior_of_a_learned_beta(sample, table):
    x = cold(2.0).sample((15,))
    assert far(sample(learned_beta, x, table)["beta"], *beta_truth(x)) < FAR


@pytest.mark.parametrize("num_points", [3, 4, 5, 9, 12])
def test_few_nodes_are_said_to_be_few(num_points):
    base = dist.Normal(torch.zeros(2), 2.0).to_event(1)
    table = Table(0.0, 20.0, num_points, num_chains=16, num_samples=100)
    beta = torch.tensor([1.0, 2.5, 5.0, 20.0])
    for b in beta:
        est = table(ebm.GibbsBoltzmann(lambda x: 0.5 * x.square().sum(-1), base, b))
        assert (est.value + torch.log(1 + 4 * b)).abs() < 3 * est.std_error


@QUIET
@pytest.mark.slow
def test_a_table_with_wrong_slopes_gives_a_posterior_seen_to_be_wrong(table):
    x = cold(2.0).sample((15,))
    faulty = Table(0.2, 8.0, **FAST).build(cold(1.0))
    curve = faulty._curve
    faulty._curve = curve._replace(value=0.7 * curve.value, slope=0.7 * curve.slope)
    assert far(of_ours(learned_beta, x, faulty)["beta"], *beta_truth(x)) > 2 * FAR


@QUIET
@pytest.mark.slow
@pytest.mark.parametrize("sample", [of_stock, of_ours])
def test_nuts_has_the_posterior_of_a_coupling(sample):
    x = torch.stack([lattice.draw(torch.tensor(0.4), 3) for _ in range(5)])
    table = Table(-0.5, 1.0, make=small).build()
    assert far(sample(coupled, x, table)["J"], *coupling_truth(x)) < FAR


@QUIET
@pytest.mark.slow
def test_nuts_has_the_posterior_of_a_precision():
    def make(k):
        return ebm.GibbsBoltzmann(lambda x: 0.5 * k * x.square(), ebm.Flat())

    def model(x, table):
        k = pyro.sample("k", dist.Uniform(0.05, 8.0))
        with pyro.plate("n", len(x)):
            energy = lambda x: 0.5 * k * x.square()
            d = ebm.GibbsBoltzmann(energy, ebm.Flat(), log_partition=table.at(k))
            pyro.sample("x", d, obs=x)

    x = torch.randn(12)
    table = Table(0.05, 8.0, **FAST, make=make).build()
    grid = torch.linspace(0.05, 8.0, 2000)
    log_likelihood = len(x) / 2 * grid.log() - 0.5 * grid * x.square().sum()
    want = lattice.posterior(torch.zeros(()), log_likelihood, grid)
    assert far(of_ours(model, x, table)["k"], *want) < FAR


@QUIET
@pytest.mark.slow
def test_nuts_has_the_posterior_with_common_annealed_particles():
    x = cold(2.0).sample((15,))
    method = Annealed(num_particles=2000, num_steps=64, common_random_numbers=True)
    cold(2.0, method).log_prob(torch.zeros(1))  # the particles are made here
    assert far(of_stock(learned_beta, x, method)["beta"], *beta_truth(x)) < FAR


def test_an_exact_method_and_a_table_agree():
    d = small(torch.tensor(0.37))
    table = Table(0.0, 1.0, 33, make=small)
    value = table.at(torch.tensor(0.37)).log_z(d)
    torch.testing.assert_close(value, Exact().log_z(d), rtol=1e-6, atol=0.0)  # of a step of 1/32
    slope = torch.func.grad(lambda j: table._curve(j))(torch.tensor(0.37))
    want = torch.func.grad(lambda j: lattice.log_z(j, 3))(torch.tensor(0.37))
    torch.testing.assert_close(slope, want, rtol=1e-4, atol=0.0)
