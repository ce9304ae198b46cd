"""The way to ArviZ, the kernels that keep records, and the warnings about chains."""

import re
import warnings
from contextlib import contextmanager

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import HMC, MCMC, NUTS, Predictive, RandomWalkKernel
from pyro.infer.mcmc import StreamingMCMC, hmc, nuts
from pyro.infer.mcmc.mcmc_kernel import MCMCKernel
from pyro.infer.reparam import LocScaleReparam

import pyro_ebm as ebm
from pyro_ebm._arviz import to_inference_data
from pyro_ebm.diagnostics import convergence_warnings, to_arviz
from pyro_ebm.infer import RecordedHMC, RecordedNUTS

from .common import EXACT

Y = torch.tensor([0.3, -1.2, 0.8, 2.1, 0.4], dtype=torch.float64)

KERNELS = {
    "NUTS": (NUTS, RecordedNUTS, {}),
    "NUTS with slices": (NUTS, RecordedNUTS, {"use_multinomial_sampling": False}),
    "NUTS with a dense mass": (NUTS, RecordedNUTS, {"full_mass": True}),
    "HMC": (HMC, RecordedHMC, {"num_steps": 4}),
    "HMC that rejects": (HMC, RecordedHMC, {"num_steps": 2, "target_accept_prob": 0.3}),
}
kernels = pytest.mark.parametrize(("stock", "recorded", "options"), KERNELS.values(), ids=KERNELS)


def normal(y):
    """A mean and a positive scale, data in a plate."""
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    with pyro.plate("n", len(y)):
        pyro.sample("y", dist.Normal(mean, scale), obs=y)


def bowl(z):
    """The potential of a standard normal law."""
    return 0.5 * z["x"].square().sum()


def run(kernel, *args, num_samples=20, warmup=60, **options):
    mcmc = MCMC(kernel, num_samples, warmup, disable_progbar=True, **options)
    mcmc.run(*args)
    return mcmc


@contextmanager
def arviz_speaks():
    """ArviZ may warn: its announcement, long tails of few draws, its plots' deprecations."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture
def in_turn(monkeypatch):
    """Chains run one after the other, however many processors there are."""
    monkeypatch.setattr(torch.multiprocessing, "cpu_count", lambda: 1)


@pytest.fixture
def side_by_side(monkeypatch):
    """Chains run in processes of their own."""
    monkeypatch.setattr(torch.multiprocessing, "cpu_count", lambda: 8)


# The kernels that keep records -----------------------------------------------------------------


@kernels
def test_recording_leaves_the_draws_alone(stock, recorded, options, in_turn):
    draws = []
    for kernel in (stock, recorded):
        pyro.set_rng_seed(1)
        mcmc = run(kernel(normal, **options), Y, num_chains=2)
        draws.append(mcmc.get_samples(group_by_chain=True))
    assert all(torch.equal(draws[0][name], draws[1][name]) for name in ("mean", "scale"))


class Spy:
    """Follows each move of a kernel: its points and their Hamiltonians, the start first."""

    def __init__(self, monkeypatch):
        self.points, self.moves = [], []
        for module in (hmc, nuts):
            monkeypatch.setattr(module, "velocity_verlet", self.following(module.velocity_verlet))

    def following(self, integrate):
        def velocity_verlet(z, r, potential_fn, kinetic_grad, *args, **kwargs):
            end = integrate(z, r, potential_fn, kinetic_grad, *args, **kwargs)
            for q, p in [(z, r)] * (not self.points) + [end[:2]]:
                velocity = kinetic_grad(p)
                kinetic = 0.5 * sum((p[name] * velocity[name]).sum() for name in p)
                self.points.append((q, (potential_fn(q) + kinetic).item()))
            return end

        return velocity_verlet

    def __call__(self, kernel, draw, stage, i):
        if stage == "Sample":
            self.moves.append((draw, self.points))
        self.points = []


def spied(recorded, options, monkeypatch):
    spy = Spy(monkeypatch)
    mcmc = run(recorded(normal, **options), Y, hook_fn=spy)
    return mcmc.diagnostics()["sample_stats"]["chain 0"], spy.moves


@kernels
def test_the_energy_is_that_of_the_draw_and_its_momentum(stock, recorded, options, monkeypatch):
    stats, moves = spied(recorded, options, monkeypatch)
    found = [
        next(h for z, h in points if all(torch.equal(z[name], draw[name]) for name in z))
        for draw, points in moves
    ]
    np.testing.assert_allclose(stats["energy"], found, **EXACT)
    assert (stats["energy"] + stats["lp"] >= 0).all()


@kernels
def test_the_acceptance_rate_is_the_mean_over_the_trajectory(
    stock, recorded, options, monkeypatch
):
    stats, moves = spied(recorded, options, monkeypatch)
    energies = [np.array([h for _, h in points]) for _, points in moves]
    found = [np.exp(np.minimum(0, h[0] - h[1:])).mean() for h in energies]
    np.testing.assert_allclose(stats["acceptance_rate"], found, **EXACT)


def test_the_steps_of_nuts_are_its_leapfrog_steps(monkeypatch):
    stats, moves = spied(RecordedNUTS, {}, monkeypatch)
    assert stats["n_steps"].tolist() == [len(points) - 1 for _, points in moves]
    assert (stats["n_steps"] <= 2 ** stats["tree_depth"] - 1).all()
    assert (stats["n_steps"] >= 2 ** (stats["tree_depth"] - 1)).all()


def test_the_steps_of_hmc_are_its_leapfrog_steps():
    kernel = RecordedHMC(normal, step_size=0.1, num_steps=7, adapt_step_size=False)
    stats = run(kernel, Y).diagnostics()["sample_stats"]["chain 0"]
    assert (stats["n_steps"] == 7).all()
    assert (stats["step_size"] == 0.1).all()
    assert "tree_depth" not in stats


def near(values, truth):
    """Whether the mean of a chain is what it should be, within five standard errors."""
    with arviz_speaks():
        import arviz as az

        ess = az.ess(values[None], method="mean")
    return abs(values.mean() - truth) < 5 * values.std() / np.sqrt(ess)


@pytest.mark.slow
def test_the_energy_of_a_normal_law_has_its_gamma_law():
    dim = 4
    kernel = RecordedNUTS(potential_fn=bowl)
    start = {"x": torch.zeros(dim)}
    mcmc = run(kernel, num_samples=1500, warmup=200, initial_params=start)
    stats = mcmc.diagnostics()["sample_stats"]["chain 0"]
    energy, potential = stats["energy"], -stats["lp"]
    assert near(energy, dim)
    assert near((energy - dim) ** 2, dim)
    assert not near(potential, dim), "without the kinetic energy it is another law"
    assert not near((potential - dim / 2) ** 2, dim)


def test_a_tree_that_is_cut_short_says_so():
    options = {"step_size": 1e-3, "adapt_step_size": False, "max_tree_depth": 3}
    stats = run(RecordedNUTS(normal, **options), Y).diagnostics()["sample_stats"]["chain 0"]
    assert stats["reached_max_treedepth"].all()
    assert (stats["tree_depth"] == 3).all()
    assert (stats["n_steps"] == 7).all()


def test_a_tree_that_turns_in_time_says_nothing():
    stats = run(RecordedNUTS(normal), Y).diagnostics()["sample_stats"]["chain 0"]
    assert not stats["reached_max_treedepth"].any()


def cliff(z):
    """The potential of a standard normal law, with a fall beyond 1."""
    return torch.where(z["x"] > 1.0, 1e6 * z["x"], 0.5 * z["x"].square()).sum()


def test_a_tree_that_diverges_is_not_cut_short():
    kernel = RecordedNUTS(potential_fn=cliff, step_size=0.7, max_tree_depth=1)
    mcmc = run(kernel, warmup=0, num_samples=40, initial_params={"x": torch.zeros(1)})
    stats = mcmc.diagnostics()["sample_stats"]["chain 0"]
    assert 0 < stats["diverging"].sum() < 40
    assert (stats["reached_max_treedepth"] == ~stats["diverging"]).all()


@pytest.mark.parametrize("recorded", [RecordedNUTS, RecordedHMC])
def test_the_divergences_are_pyros(recorded):
    kernel = recorded(potential_fn=cliff, step_size=0.7, adapt_step_size=False)
    mcmc = run(kernel, initial_params={"x": torch.zeros(1)})
    found = mcmc.diagnostics()
    where = np.flatnonzero(found["sample_stats"]["chain 0"]["diverging"])
    assert where.tolist() == found["divergences"]["chain 0"]
    assert len(where) > 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_records_come_back_from_other_processes(side_by_side):
    kernel = RecordedNUTS(normal)
    mcmc = run(kernel, Y, num_samples=8, warmup=5, num_chains=2, mp_context="fork")
    stats = to_arviz(mcmc)["sample_stats"]
    samples = mcmc.get_samples(group_by_chain=True)
    np.testing.assert_allclose(stats["lp"], log_joint(samples), **EXACT)
    assert stats["energy"].shape == (2, 8)


def test_pyros_summary_still_works(capsys):
    mcmc = run(RecordedNUTS(normal), Y)
    mcmc.summary()
    assert "Number of divergences: 0" in capsys.readouterr().out
    assert {"mean", "scale", "divergences", "acceptance rate"} <= set(mcmc.diagnostics())


def test_a_model_without_latent_sites_has_no_records():
    kernel = RecordedNUTS(lambda: pyro.sample("y", dist.Normal(0.0, 1.0), obs=torch.ones(())))
    assert "sample_stats" not in run(kernel).diagnostics()


# What a run hands over -------------------------------------------------------------------------


def log_joint(samples):
    """The log joint density of `normal`, in the coordinates mean and log scale."""
    mean, scale = samples["mean"], samples["scale"]
    log_prior = dist.Normal(0.0, 1.0).log_prob(mean) + dist.LogNormal(0.0, 1.0).log_prob(scale)
    log_data = dist.Normal(mean[..., None], scale[..., None]).log_prob(Y).sum(-1)
    return log_prior + log_data + scale.log()


RECORDED = {"lp", "energy", "acceptance_rate", "step_size", "diverging", "n_steps"}
STATS = {
    "NUTS": (NUTS, {"lp", "diverging", "step_size"}),
    "HMC": (lambda model: HMC(model, num_steps=3), {"lp", "diverging", "step_size"}),
    "random walk": (RandomWalkKernel, {"lp"}),
    "recorded NUTS": (RecordedNUTS, RECORDED | {"tree_depth", "reached_max_treedepth"}),
    "recorded HMC": (lambda model: RecordedHMC(model, num_steps=3), RECORDED),
}


@pytest.mark.parametrize(("make", "names"), STATS.values(), ids=STATS)
def test_a_run_gives_what_its_kernel_has(make, names):
    mcmc = run(make(normal), Y)
    idata = to_arviz(mcmc)
    assert set(idata["sample_stats"].data_vars) == names
    assert set(idata["posterior"].data_vars) == {"mean", "scale"}
    np.testing.assert_array_equal(idata["observed_data"]["y"], Y)
    assert idata["log_likelihood"]["y"].dims == ("chain", "draw", "y_dim_0")
    samples = mcmc.get_samples(group_by_chain=True)
    np.testing.assert_allclose(idata["sample_stats"]["lp"], log_joint(samples), **EXACT)


def test_the_chains_stay_in_order(in_turn):
    mcmc = run(NUTS(normal), Y, num_samples=5, warmup=2, num_chains=3)
    idata = to_arviz(mcmc)
    assert "step_size" not in idata["sample_stats"], "the kernel knows the last chain's only"
    samples = mcmc.get_samples(group_by_chain=True)
    np.testing.assert_array_equal(idata["posterior"]["mean"], samples["mean"])
    np.testing.assert_allclose(idata["sample_stats"]["lp"], log_joint(samples), **EXACT)


class Marked(MCMCKernel):
    """Chain number i diverges at its draw i."""

    model, transforms, chain, initial_params = None, {}, -1, {"x": torch.zeros(1)}

    def setup(self, warmup_steps):
        self.chain += 1

    def sample(self, params):
        return {"x": torch.randn(1)}

    def logging(self):
        return {}

    def diagnostics(self):
        return {"divergences": [self.chain]}


def test_more_than_ten_chains_keep_their_divergences(in_turn):
    diverging = to_arviz(run(Marked(), num_chains=12))["sample_stats"]["diverging"].values
    assert (diverging == np.eye(12, 20, dtype=bool)).all()
    by_name = sorted(f"chain {i}" for i in range(12))
    assert by_name[2] == "chain 10", "sorted as strings they would not"


def test_lp_of_a_potential_is_its_negative():
    mcmc = run(NUTS(potential_fn=bowl), initial_params={"x": torch.zeros(2)})
    idata = to_arviz(mcmc)
    x = mcmc.get_samples(group_by_chain=True)["x"]
    np.testing.assert_allclose(idata["sample_stats"]["lp"], -0.5 * x.square().sum(-1), **EXACT)
    assert "observed_data" not in idata
    assert "log_likelihood" not in idata


def test_a_kernel_that_ran_again_does_not_confuse_lp():
    kernel = NUTS(normal)
    mcmc = run(kernel, Y)
    run(kernel, Y + 10.0, initial_params={"mean": torch.zeros(()), "scale": torch.zeros(())})
    samples = mcmc.get_samples(group_by_chain=True)
    np.testing.assert_allclose(to_arviz(mcmc)["sample_stats"]["lp"], log_joint(samples), **EXACT)


def test_lp_sums_out_what_the_run_summed_out():
    def coin():
        p = pyro.sample("p", dist.Beta(2.0, 2.0))
        z = pyro.sample("z", dist.Bernoulli(p))
        pyro.sample("y", dist.Normal(z, 1.0), obs=torch.tensor(0.4))

    mcmc = run(NUTS(coin))
    with pytest.warns(UserWarning, match=r"leaves out log_likelihood.*sites \['z'\]"):
        idata = to_arviz(mcmc)
    p = mcmc.get_samples(group_by_chain=True)["p"]
    one, zero = (dist.Normal(z, 1.0).log_prob(torch.tensor(0.4)).exp() for z in (1.0, 0.0))
    truth = dist.Beta(2.0, 2.0).log_prob(p) + (p * one + (1 - p) * zero).log()
    truth = truth + p.log() + (1 - p).log()
    np.testing.assert_allclose(idata["sample_stats"]["lp"], truth, **EXACT)


@pytest.mark.filterwarnings("ignore:to_arviz leaves out log_likelihood")
def test_lp_is_left_out_where_draws_were():
    idata = to_arviz(run(NUTS(normal), Y, save_params=["mean"]))
    assert set(idata["posterior"].data_vars) == {"mean"}
    assert "lp" not in idata["sample_stats"]


def test_what_fails_is_left_out_with_a_warning():
    def fragile(z):
        if not torch.is_grad_enabled():
            raise RuntimeError("needs a gradient")
        return bowl(z)

    mcmc = run(NUTS(potential_fn=fragile), initial_params={"x": torch.zeros(1)})
    with pytest.warns(UserWarning, match="leaves out lp: RuntimeError: needs a gradient"):
        idata = to_arviz(mcmc)
    assert set(idata["sample_stats"].data_vars) == {"diverging", "step_size"}


def test_handing_over_changes_nothing():
    mcmc = run(NUTS(normal), Y)
    before = torch.get_rng_state()
    with poutine.trace() as outer:
        to_arviz(mcmc)
    assert torch.equal(before, torch.get_rng_state())
    assert not outer.trace.nodes
    assert torch.is_grad_enabled()
    assert torch.distributions.Distribution._validate_args


def test_a_run_on_any_device_comes_back(device):
    start = {"x": torch.zeros(2, device=device)}
    mcmc = run(RecordedNUTS(potential_fn=bowl), initial_params=start)
    idata = to_arviz(mcmc)
    x = mcmc.get_samples(group_by_chain=True)["x"].cpu()
    np.testing.assert_array_equal(idata["posterior"]["x"], x)
    np.testing.assert_allclose(idata["sample_stats"]["lp"], -0.5 * x.square().sum(-1), **EXACT)


def test_a_model_on_any_device_comes_back(device):
    data = Y.to(device)

    def model():
        x = pyro.sample("x", dist.Normal(torch.zeros((), device=device), 1.0))
        with pyro.plate("n", 5):
            pyro.sample("y", dist.Normal(x, 1.0), obs=data)

    idata, samples = log_likelihoods(model)
    x = samples["x"].cpu()
    data_terms = dist.Normal(x[..., None], 1.0).log_prob(Y)
    truth = dist.Normal(0.0, 1.0).log_prob(x) + data_terms.sum(-1)
    np.testing.assert_allclose(idata["log_likelihood"]["y"], data_terms, **EXACT)
    np.testing.assert_allclose(idata["sample_stats"]["lp"], truth, **EXACT)


def test_draws_by_name_will_do():
    idata = to_arviz(
        {"x": torch.randn(3, 50, 2)},
        sample_stats={"energy": torch.rand(3, 50)},
        log_likelihood={"y": np.zeros((150, 4))},
        dims={"x": ["side"]},
        coords={"side": ["left", "right"]},
    )
    assert idata["posterior"]["x"].sel(side="left").shape == (3, 50)
    assert idata["log_likelihood"]["y"].shape == (3, 50, 4)


def test_draws_of_predictive_find_their_groups():
    mcmc = run(NUTS(normal), Y, num_samples=6)
    unseen = poutine.uncondition(normal)
    after = Predictive(unseen, mcmc.get_samples())(Y)
    draws = Predictive(unseen, num_samples=9)(Y)
    idata = to_arviz(mcmc, prior=draws, posterior_predictive=after)
    assert set(idata["prior"].data_vars) == {"mean", "scale"}
    assert idata["prior_predictive"]["y"].shape == (1, 9, 5)
    assert idata["posterior_predictive"]["y"].shape == (1, 6, 5)


def test_a_prior_predictive_that_is_given_stays():
    x = torch.zeros(2, 10)
    given = {"prior": {"x": x[0], "y": x[0]}, "prior_predictive": {"y": x[0] + 1}}
    idata = to_arviz({"x": x}, observed_data={"y": x[0]}, **given)
    assert set(idata["prior"].data_vars) == {"x", "y"}
    assert (idata["prior_predictive"]["y"] == 1).all()


REFUSED = {
    "what has no draws": (lambda: to_arviz(3), TypeError, "got int"),
    "a streaming run": (
        lambda: to_arviz(StreamingMCMC(NUTS(normal), num_samples=3)),
        TypeError,
        "keeps no draws",
    ),
    "a run that has not run": (
        lambda: to_arviz(MCMC(NUTS(normal), num_samples=3)),
        ValueError,
        "must have run",
    ),
    "a second posterior": (
        lambda: to_arviz({"x": torch.zeros(2, 3)}, posterior={"y": torch.zeros(2, 3)}),
        ValueError,
        "the first argument",
    ),
    "an unknown group": (
        lambda: to_arviz({"x": torch.zeros(2, 3)}, posterios={"y": torch.zeros(2, 3)}),
        ValueError,
        "got 'posterios'",
    ),
    "draws that do not fit": (
        lambda: to_arviz({"x": torch.zeros(2, 3)}, posterior_predictive={"y": torch.zeros(5)}),
        ValueError,
        r"posterior_predictive\['y'\].*\(2, 3\).*6 draws.*\(5,\)",
    ),
    "likelihoods of no model": (
        lambda: to_arviz({"x": torch.zeros(2, 3)}, log_likelihood=True),
        ValueError,
        "log_likelihood=True",
    ),
}


@pytest.mark.parametrize(("call", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_it_refuses(call, error, message):
    with pytest.raises(error, match=message):
        call()


# Log-likelihoods -------------------------------------------------------------------------------


def log_likelihoods(model, *args, **options):
    mcmc = run(NUTS(model), *args, num_samples=7, warmup=3)
    return to_arviz(mcmc, **options), mcmc.get_samples(group_by_chain=True)


def located(sample):
    """A model of one location, whose data ``sample`` draws."""

    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        sample(x)

    return model


def in_plate(x):
    with pyro.plate("n", 5):
        pyro.sample("y", dist.Normal(x, 1.0), obs=Y)


def beside_plate(x):
    with pyro.plate("other", 3):
        pyro.sample("w", dist.Normal(x, 1.0), obs=torch.zeros(3))
    pyro.sample("y", dist.Normal(x, 1.0).expand([5]), obs=Y)


def without_plate(x):
    pyro.sample("y", dist.Normal(x, 1.0), obs=Y)


def weighted(x):
    with pyro.plate("n", 5), poutine.scale(scale=3.0):
        pyro.sample("y", dist.Normal(x, 1.0), obs=Y)


def branching(x):
    with pyro.plate("n", 5):
        pyro.sample("y", dist.Normal(x if x > -1e9 else -x, 1.0), obs=Y)


def itemised(x):
    pyro.sample("y", dist.Normal(torch.tensor(x.item()) + 0 * x, 1.0).expand([5]), obs=Y)


POINTWISE = [in_plate, beside_plate, without_plate, weighted, branching, itemised]


@pytest.mark.parametrize("sample", POINTWISE)
def test_log_likelihoods_are_those_of_each_point(sample):
    idata, samples = log_likelihoods(located(sample))
    truth = dist.Normal(samples["x"][..., None], 1.0).log_prob(Y)
    np.testing.assert_allclose(idata["log_likelihood"]["y"], truth, **EXACT)


def test_two_sites_have_each_their_own():
    idata, samples = log_likelihoods(located(beside_plate))
    truth = dist.Normal(samples["x"][..., None], 1.0).log_prob(torch.zeros(3))
    np.testing.assert_allclose(idata["log_likelihood"]["w"], truth, **EXACT)


def test_an_event_has_one_log_likelihood():
    def sample(x):
        with pyro.plate("n", 3):
            pyro.sample("y", dist.Normal(x, 1.0).expand([2]).to_event(1), obs=torch.zeros(3, 2))

    idata, _ = log_likelihoods(located(sample), dims={"y": ["row", "side"]})
    assert idata["log_likelihood"]["y"].dims == ("chain", "draw", "row")
    assert idata["observed_data"]["y"].dims == ("row", "side")


def test_nested_plates_give_all_their_dimensions():
    def sample(x):
        with pyro.plate("column", 3, dim=-1), pyro.plate("row", 2, dim=-2):
            pyro.sample("y", dist.Normal(x, 1.0), obs=torch.zeros(2, 3))

    idata, _ = log_likelihoods(located(sample))
    assert idata["log_likelihood"]["y"].shape == (1, 7, 2, 3)


def test_the_sites_of_a_loop_stand_alone():
    def sample(x):
        for i in pyro.plate("n", 3):
            pyro.sample(f"y_{i}", dist.Normal(x, 1.0), obs=Y[i])

    idata, samples = log_likelihoods(located(sample))
    truth = dist.Normal(samples["x"], 1.0).log_prob(Y[2])
    np.testing.assert_allclose(idata["log_likelihood"]["y_2"], truth, **EXACT)


MASK = torch.tensor([True, False, True, True, False])


def masked_by_handler(x):
    with pyro.plate("n", 5), poutine.mask(mask=MASK):
        pyro.sample("y", dist.Normal(x, 1.0), obs=Y)


def masked_by_distribution(x):
    with pyro.plate("n", 5):
        pyro.sample("y", dist.Normal(x, 1.0).mask(MASK), obs=Y)


@pytest.mark.parametrize("sample", [masked_by_handler, masked_by_distribution])
def test_masked_points_count_nothing(sample):
    idata, samples = log_likelihoods(located(sample))
    truth = dist.Normal(samples["x"][..., None], 1.0).log_prob(Y) * MASK
    np.testing.assert_allclose(idata["log_likelihood"]["y"], truth, **EXACT)


def test_many_draws_go_through_the_model_at_once():
    calls = []

    def counted(x):
        calls.append(x)
        in_plate(x)

    mcmc = run(RecordedNUTS(located(counted)), num_samples=150, warmup=5)
    calls.clear()
    to_arviz(mcmc)
    assert len(calls) == 1 + 2, "one for the sites, then a hundred draws at once"


def test_a_vector_that_is_indexed_is_not_mixed_up():
    def sample():
        x = pyro.sample("x", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        with pyro.plate("n", 5):
            pyro.sample("y", dist.Normal(x[0] - x[1], 1.0), obs=Y)

    idata, samples = log_likelihoods(sample)
    x = samples["x"]
    truth = dist.Normal((x[..., 0] - x[..., 1])[..., None], 1.0).log_prob(Y)
    np.testing.assert_allclose(idata["log_likelihood"]["y"], truth, **EXACT)


def test_factors_and_deterministic_sites_are_no_data():
    def sample(x):
        pyro.factor("energy", -x.square())
        pyro.deterministic("twice", 2 * x)
        in_plate(x)

    idata, _ = log_likelihoods(located(sample))
    assert set(idata["observed_data"].data_vars) == {"y"}
    assert set(idata["log_likelihood"].data_vars) == {"y"}


def test_a_site_in_other_coordinates_is_no_data():
    def shifted():
        x = pyro.sample("x", dist.Normal(3.0, 2.0))
        in_plate(x)

    idata, _ = log_likelihoods(poutine.reparam(shifted, {"x": LocScaleReparam(0.0)}))
    assert set(idata["posterior"].data_vars) == {"x_decentered"}
    assert set(idata["observed_data"].data_vars) == {"y"}


def test_a_model_without_data_gives_none():
    idata, _ = log_likelihoods(located(lambda x: None))
    assert "observed_data" not in idata
    assert "log_likelihood" not in idata


def test_false_leaves_them_out():
    idata, _ = log_likelihoods(located(in_plate), log_likelihood=False)
    assert "log_likelihood" not in idata
    assert "observed_data" in idata


def unnormalised(x):
    d = ebm.GibbsBoltzmann(lambda y: y.square() / 2, ebm.Flat())
    pyro.sample("y", d, obs=torch.tensor(0.3))


LACKING = {
    "no log Z": (located(unnormalised), "'y' has no log Z"),
    "no data": (located(lambda x: None), "needs an observed site"),
}


@pytest.mark.parametrize(("model", "message"), LACKING.values(), ids=LACKING)
def test_true_insists(model, message):
    with pytest.raises(ValueError, match=message):
        log_likelihoods(model, log_likelihood=True)


def test_true_needs_a_model():
    mcmc = run(NUTS(potential_fn=bowl), initial_params={"x": torch.zeros(1)})
    with pytest.raises(ValueError, match="potential_fn"):
        to_arviz(mcmc, log_likelihood=True)


def test_an_unnormalised_site_has_none_and_says_so():
    with pytest.warns(UserWarning, match="leaves out log_likelihood.*has no log Z"):
        idata, _ = log_likelihoods(located(unnormalised))
    assert "log_likelihood" not in idata
    assert "observed_data" in idata


def test_more_than_fits_is_computed_on_request_only(monkeypatch):
    monkeypatch.setattr("pyro_ebm.diagnostics._MOST", 30)
    with pytest.warns(UserWarning, match=r"it has 3.5e\+01 values"):
        idata, _ = log_likelihoods(located(in_plate))
    assert "log_likelihood" not in idata
    idata, _ = log_likelihoods(located(in_plate), log_likelihood=True)
    assert idata["log_likelihood"]["y"].shape == (1, 7, 5)


# ArviZ -----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("recorded", [RecordedNUTS, lambda m: RecordedHMC(m, num_steps=5)])
def test_arviz_runs_on_a_recorded_run(recorded, in_turn, tmp_path):
    idata = to_arviz(run(recorded(normal), Y, num_samples=60, num_chains=2))
    with arviz_speaks():
        import arviz as az
        from matplotlib import pyplot as plt

        assert {"mean", "scale"} <= set(az.summary(idata).index)
        az.plot_trace(idata)
        az.plot_energy(idata)
        plt.close("all")
        assert np.isfinite(az.bfmi(idata)).all()
        assert np.isfinite(az.loo(idata).elpd_loo)
        idata.to_netcdf(tmp_path / "run.nc", engine="h5netcdf")
        again = az.from_netcdf(tmp_path / "run.nc", engine="h5netcdf")
    for group in ("posterior", "sample_stats", "log_likelihood", "observed_data"):
        for name, values in idata[group].data_vars.items():
            np.testing.assert_array_equal(again[group][name], values)
    assert convergence_warnings(again) == convergence_warnings(idata)


def test_every_dimension_has_coordinates():
    x = np.zeros((2, 3, 4, 5))
    data = to_inference_data({"posterior": {"x": x}}, dims={"x": ["row", "column"]})
    coords = data["posterior"].coords
    assert {name: len(values) for name, values in coords.items()} == {
        "chain": 2,
        "draw": 3,
        "row": 4,
        "column": 5,
    }


def test_data_have_neither_chains_nor_draws():
    data = to_inference_data({"observed_data": {"y": np.zeros(4)}})
    assert data["observed_data"]["y"].dims == ("y_dim_0",)


def test_a_slash_in_a_name_becomes_a_dot():
    x = np.zeros((2, 3, 4))
    data = to_inference_data({"posterior": {"left/x": x}}, dims={"left/x": ["i"]})
    assert data["posterior"]["left.x"].dims == ("chain", "draw", "i")


X = np.zeros((2, 3, 4))
MISFITS = {
    "an unknown group": ({"posteriors": {"x": X}}, {}, "got 'posteriors'"),
    "nothing": ({"posterior": {}}, {}, "at least one variable"),
    "no draws": ({"posterior": {"x": X[0, 0]}}, {}, r"posterior\['x'\].*\(4,\)"),
    "another number of chains": (
        {"posterior": {"x": X, "y": X[:1]}},
        {},
        "dimension 'chain' must have one size, got 2 and, in 'y', 1",
    ),
    "another number of draws": (
        {"posterior": {"x": X, "y": X[:, :2]}},
        {},
        "dimension 'draw' must have one size, got 3 and, in 'y', 2",
    ),
    "stats of other draws": (
        {"posterior": {"x": X}, "sample_stats": {"lp": X[:, :2, 0]}},
        {},
        "sample_stats must have the posterior's sizes.*'draw': 3.*got.*'draw': 2",
    ),
    "too few dims": ({"posterior": {"x": X}}, {"dims": {"x": []}}, r"dims\['x'\] must name 1"),
    "too few labels": (
        {"posterior": {"x": X}},
        {"dims": {"x": ["i"]}, "coords": {"i": [1, 2]}},
        r"coords\['i'\] must have 4 labels, got 2",
    ),
    "a variable named as a dimension": (
        {"posterior": {"chain": X}},
        {},
        "must not be called 'chain'",
    ),
    "two names in one": ({"posterior": {"a/x": X, "a.x": X}}, {}, "got 'a.x'"),
}


@pytest.mark.parametrize(("groups", "options", "message"), MISFITS.values(), ids=MISFITS)
def test_it_names_what_does_not_fit(groups, options, message):
    with pytest.raises(ValueError, match=message):
        to_inference_data(groups, **options)


# Warnings about chains -------------------------------------------------------------------------


def chains(num_chains=4, num_draws=400, seed=0):
    return np.random.default_rng(seed).normal(size=(num_chains, num_draws, 2))


def warned(x, **stats):
    groups = {"posterior": {"x": x}}
    return convergence_warnings(
        to_inference_data(groups | ({"sample_stats": stats} if stats else {}))
    )


def flags(*places):
    """Booleans of four chains and 400 draws, true at the places."""
    found = np.zeros((4, 400), bool)
    for place in places:
        found[place] = True
    return found


@pytest.mark.parametrize("num_chains", [1, 2, 4, 20])
def test_sound_chains_raise_no_warning(num_chains):
    energy = np.random.default_rng(1).normal(size=(num_chains, 400))
    quiet = np.zeros((num_chains, 400), bool)
    stats = {"energy": energy, "diverging": quiet, "reached_max_treedepth": quiet}
    assert warned(chains(num_chains), **stats) == []


def test_constant_entries_raise_no_warning():
    x = chains()
    x[..., 0] = 1.0  # as the corner of a correlation matrix's Cholesky factor
    assert warned(x) == []


def stuck(x, chain, since=0):
    x = x.copy()
    x[chain, since:] = x[chain, since]
    return x


def walk(x):
    return np.cumsum(x, axis=1)


def at(x, place, value):
    x = x.copy()
    x[place] = value
    return x


FAULTS = {
    "divergences": (
        lambda: warned(chains(), diverging=flags((2, 7), (2, 9), (0, 1))),
        r"Divergences: 3 of 1600 draws \(chain 0: 1, chain 2: 2\)",
    ),
    "tree depth": (
        lambda: warned(chains(), reached_max_treedepth=flags((1, 7))),
        r"Maximum tree depth: reached in 1 of 1600 draws \(chain 1: 1\)",
    ),
    "energy": (
        lambda: warned(chains(), energy=walk(chains()[..., 0])),
        r"E-BFMI below 0.3: chain 0: 0.0\d?, chain 1: 0.0",
    ),
    "R-hat": (
        lambda: warned(chains() + np.array([0, 0, 0, 9.0])[:, None, None] * [0, 1]),
        r"R-hat: x\[1\] with \d",
    ),
    "R-hat of a single chain": (lambda: warned(walk(chains(1))), r"R-hat: x\["),
    "bulk of the draws": (
        lambda: warned(chains(num_draws=90)),
        r"Effective sample size \(bulk\): x\[\d\] with \d+\.\d+ per chain is below 100",
    ),
    "tails": (
        lambda: warned(np.repeat(chains(num_draws=90), 4, 1)),
        r"Effective sample size \(tail\): x\[\d\] with",
    ),
    "a frozen chain": (
        lambda: warned(stuck(chains(), 2)),
        r"Frozen: chain 2 hardly moves \(0 of 399 moves",
    ),
    "one of 256": (
        lambda: warned(stuck(chains(256, 120), 17)),
        r"Frozen: chain 17 hardly moves \(0 of 119 moves",
    ),
    "several": (
        lambda: warned(stuck(stuck(chains(9), 3), 8, since=5)),
        r"Frozen: 2 of 9 chains hardly move \(chain 3: 0 of.*chain 8: 5 of 399",
    ),
    "a narrow chain": (
        lambda: warned(chains() * np.array([1, 1e-4, 1, 1])[:, None, None]),
        r"Frozen: chain 1: spread \d.\de-0[45] of the others'",
    ),
    "no position": (
        lambda: warned(at(chains(), (3, 5), np.nan)),
        r"Runaway: 2 of 3200 values of 'x' are not finite \(chain 3: 2\)",
    ),
    "infinity": (lambda: warned(at(chains(), (3, 5, 0), np.inf)), "1 of 3200 values of 'x'"),
    "runaway": (
        lambda: warned(walk(chains()) * 1e31),
        r"Runaway: 'x' reaches \d.\de\+3\d in chain \d",
    ),
    "a short run": (lambda: warned(chains(num_draws=5)), "Too short: 'x' has 5 draws"),
    "one draw": (lambda: warned(chains(num_draws=1)), "Too short: 'x' has 1 draws"),
}


@pytest.mark.parametrize(("call", "message"), FAULTS.values(), ids=FAULTS)
def test_it_warns_of(call, message):
    found = call()
    assert any(re.search(message, line) for line in found), found


def test_a_long_list_of_chains_is_cut():
    x = chains(12)
    for chain in range(8):
        x = stuck(x, chain)
    assert "chain 4: 0 of 399 moves changed anything, and 3 more)" in warned(x)[0]


def test_the_energy_fraction_is_arvizs():
    energy = walk(chains()[..., 0])
    idata = to_inference_data({"posterior": {"x": chains()}, "sample_stats": {"energy": energy}})
    with arviz_speaks():
        import arviz as az

        truth = az.bfmi(idata)
    named = ", ".join(f"chain {c}: {v:.2g}" for c, v in enumerate(truth.round(2)))
    assert named in convergence_warnings(idata)[0]


def test_statistics_without_draws_are_no_matter():
    import xarray

    idata = to_inference_data(
        {"posterior": {"x": chains()}, "sample_stats": {"lp": chains()[..., 0]}}
    )
    idata["sample_stats"]["seed"] = xarray.DataArray(3)
    assert convergence_warnings(idata) == []


def test_a_variable_without_elements_is_no_matter():
    groups = {"posterior": {"x": chains(), "none": chains()[..., :0]}}
    assert convergence_warnings(to_inference_data(groups)) == []


def test_warnings_need_a_posterior():
    with pytest.raises(ValueError, match="group 'posterior'"):
        convergence_warnings(to_inference_data({"observed_data": {"y": np.zeros(2)}}))
