"""Posteriors of parameters whose log Z nobody knows: the exchange algorithm against quadrature."""

import copy
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints

import pyro_ebm as ebm
from pyro_ebm.kernels import Dense, Diagonal, exchange
from tests import lattice
from tests.common import FALSE_ALARM, FAR
from tests.lattice import far, ising

QUIET = pytest.mark.filterwarnings("ignore::pyro_ebm.ConvergenceWarning")  # of short runs


# The kernel ------------------------------------------------------------------------------------
# Data x_i ~ N(0, 1 / k) with k ~ Gamma(2, 1); the kernel moves z = log k.

N = 5


def prior(z):
    """The potential of Gamma(2, 1) in log k, with its Jacobian."""
    return z.exp()[..., 0] - 2.0 * z[..., 0]


def likelihood(z, w):
    return 0.5 * z.exp()[..., 0] * w.square().sum(-1)


def draw(z):
    return (-0.5 * z).exp() * torch.randn(*z.shape[:-1], N)


def joint(x):
    return lambda z: prior(z) + likelihood(z, x)


def truth(n):
    """Parameters and their data, drawn together."""
    k = dist.Gamma(2.0, 1.0).sample((n, 1))
    return k.log(), draw(k.log())


def p_value(z, bins=40):
    """Chi-squared test of z = log k against the Gamma prior."""
    u = torch.special.gammainc(torch.tensor(2.0), z.exp().flatten())
    counts = torch.bincount((u * bins).long().clamp(0, bins - 1), minlength=bins)
    expected = len(u) / bins
    chi2 = ((counts - expected).square() / expected).sum()
    return torch.special.gammaincc(torch.tensor((bins - 1) / 2), chi2 / 2).item()


def after(make, n=20_000, num=15):
    """Draw parameters and data together, move the parameters given the data: the prior stays."""
    z, x = truth(n)
    kernel = make(x)
    state = kernel.init(z)
    for _ in range(num):
        state, _ = kernel.step(state)
    return p_value(state.position)


def right(x):
    return exchange(joint(x), likelihood, draw, 0.8)


def drawn_at_the_old(x):
    at = []

    def step(state):
        at[:] = [state.position]
        return kernel.step(state)

    kernel = exchange(joint(x), likelihood, lambda z: draw(at[0]), 0.8)
    return kernel._replace(step=step)


FAULTS = {
    "drawn at the old parameter": drawn_at_the_old,
    "ratio upside down": lambda x: exchange(joint(x), lambda z, w: -likelihood(z, w), draw, 0.8),
    "no auxiliary data": lambda x: exchange(joint(x), lambda z, w: 0.0 * z[..., 0], draw, 0.8),
    "fewer than the data": lambda x: exchange(
        joint(x), likelihood, lambda z: draw(z)[..., 1:], 0.8
    ),
}


def test_parameters_stay_with_their_prior_when_moved_given_their_data():
    assert after(right) > FALSE_ALARM


@pytest.mark.parametrize("make", FAULTS.values(), ids=FAULTS)
def test_the_test_of_the_prior_sees(make):
    assert after(make) < FALSE_ALARM


METRICS = {
    "diagonal": Diagonal(torch.tensor([4.0, 0.25], dtype=torch.float64)),
    "dense": Dense.of(torch.tensor([[2.0, 0.6], [0.6, 0.5]], dtype=torch.float64)),
}


@pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)
def test_steps_have_the_covariance_of_the_metric(metric):
    flat = lambda z, *w: torch.zeros(len(z))
    kernel = exchange(flat, flat, lambda z: z, 0.5, metric=metric)
    state, info = kernel.step(kernel.init(torch.zeros(100_000, 2)))
    assert bool(info.accepted.all())
    want = metric.inverse_mass if metric.inverse_mass.dim() > 1 else metric.inverse_mass.diag()
    # 100,000 draws know a covariance to half a per cent of the variances, 2.
    torch.testing.assert_close(state.position.T.cov() / 0.25, want, rtol=0.0, atol=0.05)


def test_a_step_leaves_its_argument_alone():
    z, x = truth(7)
    kernel = right(x)
    state = kernel.init(z)
    before = copy.deepcopy(state)
    kernel.step(state)
    assert all(torch.equal(a, b) for a, b in zip(state, before, strict=True))


def test_it_never_enters_a_wall_and_never_draws_there():
    def walled(z):
        return torch.where(z[..., 0] > 0, z[..., 0], torch.inf)

    def sample(z):
        assert bool((z > 0).all())
        return draw(z)

    kernel = exchange(walled, likelihood, sample, 3.0)
    state = kernel.init(torch.ones(500, 1))
    for _ in range(10):
        state, info = kernel.step(state)
        assert bool((state.position > 0).all())
        assert not bool(info.invalid.any())


BAD = {"joint": 0, "likelihood": 1}


@pytest.mark.parametrize("which", BAD.values(), ids=BAD)
def test_what_is_no_number_is_rejected_and_counted(which):
    nan = lambda z, value: torch.where(z[..., 0] > 0.0, torch.nan, value)
    parts = [lambda z: 0.5 * z[..., 0].square(), likelihood]
    clean = parts[which]
    parts[which] = lambda z, *w: nan(z, clean(z, *w))
    kernel = exchange(*parts, draw, 1.0)
    state, info = kernel.step(kernel.init(-torch.ones(400, 1)))
    assert 0 < int(info.invalid.sum()) < 400
    assert not bool((info.invalid & info.accepted).any())
    assert bool((state.position <= 0).all())


def test_it_keeps_single_precision():
    z, x = (t.float() for t in truth(9))
    draw_single = lambda z: (-0.5 * z).exp() * torch.randn(len(z), N, dtype=z.dtype)
    kernel = exchange(joint(x), likelihood, draw_single, 0.8, step_jitter=0.2)
    state, info = kernel.step(kernel.init(z))
    assert state.position.dtype == state.energy.dtype == info.accept_prob.dtype == torch.float32


def test_a_wrong_scale_is_refused():
    with pytest.raises(ValueError, match="step_size must be positive and finite, got -1"):
        exchange(prior, likelihood, draw, -1.0)


# In models: exact draws ------------------------------------------------------------------------


def run(model, *args, draws=200, warmup=100, chains=64, **kwargs):
    mcmc = ebm.MCMC(
        ebm.Exchange(model, **kwargs), draws, warmup, num_chains=chains, disable_progbar=True
    )
    mcmc.run(*args)
    return mcmc


def small(x, log_partition=None):
    """Several small lattices with one coupling: the table of states is exact."""
    coupling = pyro.sample("J", dist.Normal(0.0, 0.5))
    with pyro.plate("n", len(x)):
        d = ebm.GibbsBoltzmann(ising(coupling), lattice.bits(3), log_partition=log_partition)
        pyro.sample("x", d, obs=x)


def small_truth(x):
    grid = torch.linspace(-1.5, 3.0, 1801)
    energy, log_z = ising(1.0)(x).sum(), torch.stack([lattice.log_z(j, 3) for j in grid])
    log_prior = dist.Normal(0.0, 0.5).log_prob(grid)
    return lattice.posterior(log_prior, -grid * energy - len(x) * log_z, grid)


def small_data(n=4):
    return torch.stack([lattice.draw(torch.tensor(0.4), 3) for _ in range(n)])


def draws_of(mcmc, name):
    return mcmc.get_samples(group_by_chain=True)[name]


@QUIET
@pytest.mark.slow
def test_a_coupling_of_small_lattices_by_tables_of_states():
    x = small_data()
    mcmc = run(small, x)
    assert far(draws_of(mcmc, "J"), *small_truth(x)) < FAR


@QUIET
@pytest.mark.slow
def test_masked_data_count_neither_as_data_nor_as_auxiliary():
    x, mask = small_data(3), torch.tensor([True, False, True])

    def model():
        coupling = pyro.sample("J", dist.Normal(0.0, 0.5))
        with pyro.plate("n", len(x)), pyro.poutine.mask(mask=mask):
            pyro.sample("x", ebm.GibbsBoltzmann(ising(coupling), lattice.bits(3)), obs=x)

    assert far(draws_of(run(model), "J"), *small_truth(x[mask])) < FAR


def large(x, sampler=None):
    """One lattice of 7 x 7, far too large for a table."""
    coupling = pyro.sample("J", dist.Uniform(0.0, 1.0))
    draw = None if sampler is None else sampler(coupling)
    d = ebm.GibbsBoltzmann(ising(coupling), lattice.bits(), sampler=draw)
    pyro.sample("x", d, obs=x)


def large_truth(x):
    grid = torch.linspace(0.0, 1.0, 1001)
    log_z = torch.stack([lattice.log_z(j) for j in grid])
    return lattice.posterior(torch.zeros(()), -grid * ising(1.0)(x) - log_z, grid)


@pytest.fixture(scope="module")
def picture():
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return lattice.draw(torch.tensor(0.35, dtype=torch.float64)).double()


@QUIET
@pytest.mark.slow
def test_a_coupling_of_a_lattice_by_an_exact_sampler(picture):
    mcmc = run(large, picture, lattice.sampler, draws=80, warmup=60, chains=32)
    assert far(draws_of(mcmc, "J"), *large_truth(picture)) < FAR


def graph(coupling):
    """The lattice as a factor graph; its last factor stands twice, and halves."""
    same = -coupling * torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    places = [(i, j) for i in range(lattice.N) for j in range(lattice.N)]
    right = [((i, j), (i, j + 1)) for i, j in places if j + 1 < lattice.N]
    down = [((i, j), (i + 1, j)) for i, j in places if i + 1 < lattice.N]
    pairs = [(scope, same) for scope in right + down[1:]]
    pairs += [(down[0], 0.5 * same), (down[0], 0.5 * same)]
    return ebm.FactorGraph(pairs, dict.fromkeys(places, 2))


@QUIET
@pytest.mark.slow
def test_a_coupling_of_a_lattice_by_its_factor_graph(picture):
    def model():
        coupling = pyro.sample("J", dist.Uniform(0.0, 1.0))
        base = ebm.Flat((lattice.N**2,), constraints.boolean)
        pyro.sample("x", ebm.GibbsBoltzmann(graph(coupling), base), obs=picture.flatten())

    mcmc = run(model, draws=50, warmup=40, chains=32)
    assert far(draws_of(mcmc, "J"), *large_truth(picture)) < FAR


@QUIET
def test_a_sampler_that_cannot_be_batched_is_called_chain_by_chain(picture):
    def stubborn(coupling):
        return lambda d, shape: lattice.draw(coupling.item()).expand(d.shape(shape))

    with pytest.warns(UserWarning, match="drawn chain by chain, since the sampler cannot be"):
        mcmc = run(large, picture, stubborn, draws=10, warmup=5, chains=2)
    assert bool(draws_of(mcmc, "J").isfinite().all())


@QUIET
@pytest.mark.slow
def test_sites_with_a_log_z_stay_in_the_joint():
    """Two sites with one precision, one exchanged: both are counted, each once."""
    x, y = torch.randn(6) * 1.5, small_data(2)

    def model():
        k = pyro.sample("k", dist.Gamma(2.0, 2.0))
        with pyro.plate("n", len(x)):
            known = ebm.partition.Quadrature(-30.0, 30.0, 200)
            e = lambda x: 0.5 * k * x.square()
            pyro.sample("x", ebm.GibbsBoltzmann(e, ebm.Flat(), log_partition=known), obs=x)
        with pyro.plate("m", len(y)):
            pyro.sample("y", ebm.GibbsBoltzmann(ising(k), lattice.bits(3)), obs=y)

    grid = torch.linspace(0.02, 3.0, 1500)
    log_z = torch.stack([lattice.log_z(k, 3) for k in grid])
    own = len(x) / 2 * grid.log() - 0.5 * grid * x.square().sum()
    theirs = -grid * ising(1.0)(y).sum() - len(y) * log_z
    want = lattice.posterior(dist.Gamma(2.0, 2.0).log_prob(grid), own + theirs, grid)
    assert far(draws_of(run(model), "k"), *want) < FAR


# In models: inner kernels ----------------------------------------------------------------------


def approximate(*args, **kwargs):
    with pytest.warns(ebm.ConvergenceWarning, match="Approximate: the auxiliary data of 'x'"):
        return run(*args, **kwargs)


def precision(x):
    k = pyro.sample("k", dist.Gamma(2.0, 1.0))
    with pyro.plate("n", len(x)):
        pyro.sample("x", ebm.GibbsBoltzmann(lambda x: 0.5 * k * x.square(), ebm.Flat()), obs=x)


def precision_truth(x):
    law = dist.Gamma(2.0 + len(x) / 2, 1.0 + 0.5 * x.square().sum())
    return law.mean, law.stddev


@QUIET
@pytest.mark.slow
@pytest.mark.parametrize("scale", [1.0, 50.0])
def test_a_precision_by_inner_chains(scale):
    x = scale * torch.randn(10)
    mcmc = approximate(precision, x, draws=50, warmup=40, chains=128)
    assert far(draws_of(mcmc, "k"), *precision_truth(x)) < FAR


@QUIET
@pytest.mark.slow
def test_without_auxiliary_data_the_precision_is_seen_to_be_wrong(monkeypatch):
    """The naive posterior of PITFALLS: the density without its log Z runs to zero."""
    none = lambda self, z, auxiliary: torch.zeros(len(z))
    monkeypatch.setattr("pyro_ebm._auxiliary.Exchanged.likelihood", none)
    x = torch.randn(60)
    mcmc = approximate(precision, x, draws=150, warmup=100, inner_steps=1)
    assert far(draws_of(mcmc, "k"), *precision_truth(x)) > 2 * FAR
    assert draws_of(mcmc, "k").mean() < 0.1 < precision_truth(x)[0]


def wells(x):
    return (x.square() - 1.0).square().sum(-1)


def cold(x):
    """A learned beta of a double well, cut to where its wells are."""
    beta = pyro.sample("beta", dist.Gamma(2.0, 1.0))
    base = ebm.Flat((1,), constraints.interval(-3.0, 3.0))
    with pyro.plate("n", len(x)):
        pyro.sample("x", ebm.GibbsBoltzmann(wells, base, beta), obs=x)


def cold_truth(x):
    grid, line = torch.linspace(0.01, 12.0, 1200), torch.linspace(-3.0, 3.0, 2001)
    log_z = torch.trapezoid((-grid[:, None] * wells(line[:, None])).exp(), line).log()
    log_prior = dist.Gamma(2.0, 1.0).log_prob(grid)
    return lattice.posterior(log_prior, -grid * wells(x).sum() - len(x) * log_z, grid)


@QUIET
@pytest.mark.slow
def test_a_learned_beta_by_inner_chains():
    base = ebm.Flat((1,), constraints.interval(-3.0, 3.0))
    x = ebm.GibbsBoltzmann(wells, base, 2.0).sample((25,))
    mcmc = approximate(cold, x, draws=40, warmup=40, chains=128)
    assert far(draws_of(mcmc, "beta"), *cold_truth(x)) < FAR


@QUIET
@pytest.mark.slow
def test_a_coupling_by_inner_sweeps():
    """A lattice beyond tables of this test: the table is hidden behind 5 x 5 bits."""
    x = lattice.draw(torch.tensor(0.3), 5)

    def model():
        coupling = pyro.sample("J", dist.Uniform(0.0, 0.8))
        pyro.sample("x", ebm.GibbsBoltzmann(ising(coupling), lattice.bits(5)), obs=x)

    mcmc = approximate(model, draws=50, warmup=30, chains=48, inner_steps=8)
    grid = torch.linspace(0.0, 0.8, 801)
    log_z = torch.stack([lattice.log_z(j, 5) for j in grid])
    want = lattice.posterior(torch.zeros(()), -grid * ising(1.0)(x) - log_z, grid)
    assert far(draws_of(mcmc, "J"), *want) < FAR


@QUIET
@pytest.mark.slow
def test_a_preference_by_inner_sweeps_of_places():
    """Eight places of eight: more states than a table takes."""
    x = torch.eye(8)

    def model():
        k = pyro.sample("k", dist.Uniform(-3.0, 3.0))
        base = ebm.Flat((8, 8), constraints.one_hot)
        pyro.sample("x", ebm.GibbsBoltzmann(lambda x: k * x[..., 0].sum(-1), base), obs=x)

    mcmc = approximate(model, draws=50, warmup=30, chains=48, inner_steps=4)
    grid = torch.linspace(-3.0, 3.0, 1201)
    log_z = 8 * (7.0 + grid.neg().exp()).log()
    want = lattice.posterior(torch.zeros(()), -grid - log_z, grid)
    assert far(draws_of(mcmc, "k"), *want) < FAR


# The run ---------------------------------------------------------------------------------------


def test_nuts_is_refused_where_exchange_passes():
    x = small_data(2)
    with pytest.raises(ebm.UnnormalizedError, match="without log Z there is ebm.Exchange"):
        ebm.MCMC(ebm.NUTS(small), 5, disable_progbar=True).run(x)
    with pytest.raises(ebm.UnnormalizedError, match="Exchange"):
        pyro.infer.MCMC(pyro.infer.NUTS(small), 5, disable_progbar=True).run(x)
    with pytest.raises(ebm.UnnormalizedError, match=r"ebm.Exchange, and ebm.partition.Table"):
        ebm.audit(small, x)


def test_a_latent_site_without_log_z_is_still_refused():
    def model(y):
        k = pyro.sample("k", dist.Gamma(2.0, 1.0))
        pyro.sample("z", ebm.GibbsBoltzmann(lambda z: k * z.square(), ebm.Flat()))
        small(y)

    with pytest.raises(ebm.UnnormalizedError, match="site 'z': log Z depends on the random k"):
        run(model, small_data(2), draws=5, chains=2)


@QUIET
def test_acceptance_is_as_asked_and_there_is_no_density():
    mcmc = run(small, small_data(2), draws=150, warmup=150, chains=16)
    stats = mcmc.sample_stats
    assert 0.2 < stats["acceptance_rate"].mean() < 0.4
    assert bool(stats["lp"].isnan().all())
    assert not bool(stats["diverging"].any())
    with pytest.warns(UserWarning, match="leaves out log_likelihood.* has no log Z"):
        found = mcmc.to_arviz()
    assert found["posterior"]["J"].shape == (16, 150)


@QUIET
def test_a_scale_that_is_not_adapted_stays():
    mcmc = run(small, small_data(2), draws=10, step_size=0.7, adapt_step_size=False, step_jitter=0)
    assert bool((mcmc.sample_stats["step_size"] == 0.7).all())


@QUIET
def test_an_extended_run_and_a_resumed_one_are_one_run(tmp_path):
    x, file = small_data(2), tmp_path / "run"

    def begun(num, checkpoint=None):
        pyro.set_rng_seed(3)
        mcmc = ebm.MCMC(
            ebm.Exchange(small), num, 20, num_chains=4, disable_progbar=True, checkpoint=checkpoint
        )
        mcmc.run(x)
        return mcmc

    whole = draws_of(begun(30), "J")
    parts = begun(20)
    parts.extend(10)
    assert torch.equal(draws_of(parts, "J"), whole)
    begun(20, file)
    assert torch.equal(draws_of(begun(30, file), "J"), whole)


def test_a_checkpoint_of_other_inner_steps_is_refused(tmp_path):
    x = small_data(2)
    for inner_steps in (5, 6):
        mcmc = ebm.MCMC(
            ebm.Exchange(small, inner_steps=inner_steps),
            8,
            4,
            num_chains=2,
            disable_progbar=True,
            checkpoint=tmp_path / "run",
        )
        if inner_steps == 5:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                mcmc.run(x)
    with pytest.raises(ValueError, match="its inner_steps is 5, this run's is 6"):
        mcmc.run(x)


FIXED = torch.tensor([[[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 1.0, 1.0]]], dtype=torch.float64)


def scaled():
    with pyro.poutine.scale(scale=0.5):
        small(FIXED)


def discrete():
    choice = pyro.sample("c", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
    pyro.sample("y", dist.Normal(choice, 1.0), obs=torch.tensor(0.3))
    small(FIXED)


REFUSED = {
    "no site": (
        lambda: small(FIXED, ebm.partition.Exact()),
        ValueError,
        "an observed GibbsBoltzmann site without log_partition, got none: use ebm.NUTS",
    ),
    "a scale": (scaled, NotImplementedError, "site 'x' must not be scaled, got the scale 0.5"),
    "a discrete latent": (
        discrete,
        NotImplementedError,
        "must have continuous latent sites only, got the discrete 'c'",
    ),
}


@pytest.mark.parametrize(("model", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_models_beyond_it_are_refused(model, error, message):
    with pytest.raises(error, match=message):
        run(model, draws=5, chains=2)


ARGUMENTS = {
    "target": (lambda: ebm.Exchange(3), TypeError, "target must be a Pyro model, got int"),
    "distribution": (
        lambda: ebm.Exchange(ebm.GibbsBoltzmann(wells, ebm.Flat((1,)))),
        TypeError,
        "target must be a Pyro model, got GibbsBoltzmann",
    ),
    "inner_steps": (
        lambda: ebm.Exchange(small, inner_steps=0),
        ValueError,
        "inner_steps must be a whole number of at least 1, got 0",
    ),
    "kernel": (
        lambda: ebm.Exchange(small).make_kernel(wells, None),
        NotImplementedError,
        "Exchange makes no kernel of an energy alone",
    ),
}


@pytest.mark.parametrize(("make", "error", "message"), ARGUMENTS.values(), ids=ARGUMENTS)
def test_wrong_arguments_are_named(make, error, message):
    with pytest.raises(error, match=message):
        make()
