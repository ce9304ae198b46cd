"""The optimal bridge and MBAR: against pymbar, closed forms and enumeration, with their errors."""

import math
from statistics import NormalDist

import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pyro.distributions import constraints

import pyro_ebm as ebm
from pyro_ebm._bennett import error_of_mean, masses
from pyro_ebm.kernels import mala
from pyro_ebm.partition import MBAR, SMC, Annealed, Bridge, Exact, Quadrature, log_partition
from tests.common import EXACT, FAR
from tests.partition_targets import LAYERS, RBM_JOINT, TARGETS, heat_bath

LEVELS = (0.0, 0.1, 0.4, 1.0)
SEEDS = 100


def harmonic(num=400):
    """Squares of normal quantiles at four levels, each in an order of its own: ``(4, num)``."""
    rows = []
    for s, prime in zip(LEVELS, (2, 3, 5, 7), strict=True):
        u = (torch.arange(1, num + 1) * math.sqrt(prime)) % 1.0
        x = torch.tensor([NormalDist().inv_cdf(t) for t in u.tolist()])
        rows.append(x.square() / (0.25 + 2.0 * s))
    return torch.stack(rows)


# What pymbar 4.0.3 gives for these draws.
PYMBAR_LOG_Z = [0.0, -0.2900735323714807, -0.7128257858513924, -1.0938924486703323]
PYMBAR_ERROR = [0.0, 0.013374484999714518, 0.025230539578727135, 0.03264037133861983]


def pymbar_reference(excess):
    try:
        import pymbar
    except ImportError:
        return torch.tensor(PYMBAR_LOG_Z), torch.tensor(PYMBAR_ERROR)
    u = (torch.tensor(LEVELS)[:, None] * excess.reshape(1, -1)).numpy()
    found = pymbar.MBAR(u, [excess.shape[1]] * len(LEVELS)).compute_free_energy_differences()
    return -torch.tensor(found["Delta_f"][0]), torch.tensor(found["dDelta_f"][0])


def test_the_solver_gives_what_pymbar_gives():
    excess = harmonic()
    found = masses(excess.unsqueeze(1), torch.tensor(LEVELS))  # independent draws: a chain each
    log_z, error = pymbar_reference(excess)
    assert found.converged
    # pymbar stops at a relative 1e-6 or better
    torch.testing.assert_close(found.log_mass, log_z, rtol=1e-6, atol=1e-9)
    # two estimates of one variance from 1,600 draws
    torch.testing.assert_close(found.covariance.diagonal().sqrt(), error, rtol=0.04, atol=1e-12)


def test_a_ladder_in_the_wrong_order_is_seen():
    # With as many draws of each level it does not matter which is of which, but the levels do.
    flipped = masses(harmonic().flip(0).unsqueeze(1), torch.tensor(LEVELS)).log_mass
    torch.testing.assert_close(flipped, torch.tensor(PYMBAR_LOG_Z), rtol=1e-6, atol=1e-9)
    wrong = masses(harmonic().unsqueeze(1), 1.0 - torch.tensor(LEVELS).flip(0)).log_mass
    assert (wrong - torch.tensor(PYMBAR_LOG_Z))[1:].abs().min() > 0.1


def test_two_levels_are_bennetts_equation():
    excess = harmonic()[[0, 3]]
    found = masses(excess.unsqueeze(1), torch.tensor([0.0, 1.0]))
    z = found.log_mass[1].exp()
    # Meng and Wong (1996), equation 4.1, with the optimal bridge function and equal numbers
    up = (excess[0].neg().exp() / (excess[0].neg().exp() / z + 1)).mean()
    down = (1 / (excess[1].neg().exp() / z + 1)).mean()
    torch.testing.assert_close(up / down, z, rtol=1e-9, atol=0.0)
    # the variance of independent draws: 1 / ess - 2 / n
    variance = 1 / found.ess - 2 / excess.shape[1]
    torch.testing.assert_close(found.covariance[1, 1], variance, rtol=0.05, atol=0.0)


BATCHES = [(), (2,), (2, 3)]


@given(st.integers(2, 5), st.integers(1, 4), st.integers(2, 9), st.sampled_from(BATCHES))
def test_shapes_and_shifts_of_the_energy(num, times, chains, batch):
    excess = torch.randn(num, times, chains, *batch).square()
    betas = torch.linspace(0, 1, num)
    found = masses(excess, betas)
    assert found.log_mass.shape == (num, *batch)
    assert found.covariance.shape == (num, num, *batch)
    assert found.ess.shape == found.converged.shape == batch
    assert found.influence.shape == (times, chains, *batch)
    shifted = masses(excess + 3.0, betas).log_mass
    want = found.log_mass - 3.0 * betas.reshape(-1, *[1] * len(batch))
    torch.testing.assert_close(shifted, want, rtol=1e-7, atol=1e-7)


def test_a_batch_in_pieces_is_the_same(monkeypatch):
    excess, betas = torch.randn(3, 20, 4, 6).square(), torch.tensor([0.0, 0.5, 1.0])
    whole = masses(excess, betas)
    monkeypatch.setattr("pyro_ebm._bennett.CHUNK", 1500)
    for a, b in zip(whole, masses(excess, betas), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_equal_laws_have_no_error():
    found = masses(torch.full((3, 10, 4), 2.0), torch.tensor([0.0, 0.5, 1.0]))
    torch.testing.assert_close(found.log_mass, torch.tensor([0.0, -1.0, -2.0]), **EXACT)
    assert found.covariance.abs().max() < 1e-20
    assert found.ess > 10


def autoregressive(num, chains, rho, batch):
    """Chains with a standard normal law from the start, correlated as ``rho`` to the lag."""
    x = [torch.randn(chains, batch)]
    for _ in range(num - 1):
        x.append(rho * x[-1] + math.sqrt(1 - rho**2) * torch.randn(chains, batch))
    return torch.stack(x)


@pytest.mark.parametrize(("num", "chains"), [(2000, 4), (250, 32)])
def test_the_error_counts_the_autocorrelation_of_slow_chains(num, chains):
    x = autoregressive(num, chains, 0.9, SEEDS)
    # the integrated autocorrelation time is (1 + rho) / (1 - rho) = 19
    z = x.mean((0, 1)) / error_of_mean(x - x.mean((0, 1)))
    # Student's t with 31 degrees of freedom: P(|t| > 3) = .0053; 6 in 100 is p < 1e-4
    assert (z.abs() > 3).sum() < 6
    independent = x.mean((0, 1)) * math.sqrt(num * chains) / x.std((0, 1))
    assert (independent.abs() > 3).sum() > 20  # the planted fault: autocorrelation left out


def wide():
    """Quadratic energies at three temperatures over a normal base, and their log Z."""
    beta = torch.tensor([0.5, 1.0, 4.0])
    d = ebm.GibbsBoltzmann(
        lambda x: 0.5 * x.square().sum(-1), dist.Normal(torch.zeros(2), 2.0).to_event(1), beta
    )
    return d, lambda s: -(1 + 4.0 * s * beta).log()


@pytest.mark.slow
def test_the_bridge_counts_the_autocorrelation_of_given_samples():
    base = dist.Normal(torch.zeros(1), 2.0).to_event(1)
    d = ebm.GibbsBoltzmann(lambda x: 0.375 * x.square().sum(-1), base).expand((SEEDS,))
    x = autoregressive(250, 32, 0.98, SEEDS)[..., None]
    est = Bridge(samples=x.transpose(0, 1))(d)
    z = (est.value + math.log(2)) / est.std_error
    assert (z.abs() > 3).sum() < 6
    alone = Bridge(samples=x.transpose(0, 1).flatten(0, 1)[torch.randperm(8000)])(d)
    z = (alone.value + math.log(2)) / alone.std_error
    assert (z.abs() > 3).sum() > 20  # the planted fault: the order of the chains forgotten
    assert (est.ess < alone.ess / 2).all()


def test_the_bridge_is_right_for_a_batch_and_for_proposals():
    d, truth = wide()
    normal = dist.Normal(torch.tensor([0.3, 0.0]), 1.5).to_event(1)
    for method in (Bridge(num_samples=2000), Bridge(normal, 2000)):
        est = method(d)
        assert est.value.shape == est.std_error.shape == est.ess.shape == (3,)
        assert ((est.value - truth(1.0)).abs() < FAR * est.std_error).all()
        assert est.std_error.max() < 0.1


def test_the_bridge_draws_finite_supports_exactly():
    target = TARGETS["ising3"]
    est = Bridge(num_samples=1000)(target.make(SEEDS))
    z = (est.value - target.log_z()) / est.std_error
    assert (z.abs() > 3).sum() < 5
    assert 0.7 < z.std() < 1.4


def test_a_proposal_may_reach_beyond_the_support_or_not_fill_it():
    d = ebm.GibbsBoltzmann(lambda x: x, ebm.Flat((), constraints.positive))
    x = torch.empty(5000).exponential_()
    box = ebm.Flat((), constraints.interval(0.0, 6.0))
    for q in (dist.Normal(0.5, 2.0), dist.Uniform(0.0, 2.0), box):
        est = Bridge(q, samples=x)(d)  # the truth is 0
        assert est.value.abs() < FAR * est.std_error


def test_the_gradient_is_that_of_the_closed_form():
    beta, k = torch.tensor(1.3, requires_grad=True), torch.tensor(0.7, requires_grad=True)
    base = dist.Normal(torch.zeros(1), 2.0).to_event(1)
    d = ebm.GibbsBoltzmann(lambda x: 0.5 * k * x.square().sum(-1), base, beta)
    truth = -0.5 * (1 + 4 * beta * k).log()
    x = torch.randn(200_000, 1) / (0.25 + beta * k).detach().sqrt()
    got = torch.autograd.grad(Bridge(samples=x).log_z(d), [beta, k])
    want = torch.autograd.grad(truth, [beta, k])
    # five standard errors of the mean of 2e5 squares
    torch.testing.assert_close(got, want, rtol=FAR * math.sqrt(2 / 2e5), atol=0.0)


def test_mcmc_is_refused():
    def model(method):
        k = pyro.sample("k", dist.Gamma(2.0, 1.0))
        d = ebm.GibbsBoltzmann(lambda x: k * x**2, dist.Normal(0.0, 1.0), log_partition=method)
        pyro.sample("x", d, obs=torch.tensor(0.3))

    for method in (Bridge(), MBAR(3, num_samples=5)):
        kernel = pyro.infer.NUTS(model)
        with pytest.raises(ebm.UnnormalizedError, match="draws anew"):
            pyro.infer.MCMC(kernel, 2, warmup_steps=1, disable_progbar=True).run(method)


# MBAR -----------------------------------------------------------------------------------------


def test_the_ladder_has_the_log_z_of_all_its_temperatures():
    d, truth = wide()
    levels = torch.tensor([0.0, 0.03, 0.2, 1.0])
    betas, est, covariance = MBAR(levels, 32, 200).ladder(d)
    assert torch.equal(betas, levels)
    assert est.value.shape == (4, 3)
    assert (est.value[0] == 0).all()
    want = torch.stack([truth(s) for s in levels])
    assert ((est.value - want).abs()[1:] < FAR * est.std_error[1:]).all()
    assert est.std_error.max() < 0.05
    assert covariance.shape == (4, 4, 3)
    torch.testing.assert_close(est.std_error[2].square(), covariance[2, 2], **EXACT)


def test_log_z_of_a_flat_base_is_its_volume():
    target = TARGETS["ising3"]
    levels, est, _ = MBAR(4, 16, 100).ladder(target.make())
    assert levels[0] == 0
    torch.testing.assert_close(est.value[0], torch.tensor(9 * math.log(2)), **EXACT)
    away = est.value[-1] - target.log_z()
    assert away.abs() < FAR * est.std_error[-1]
    # the planted fault: log Z of the base forgotten
    assert (away - 9 * math.log(2)).abs() > FAR * est.std_error[-1]


METHODS = {
    "gaussian2": lambda: MBAR(4, 16, 60, warmup=120),
    "double_well": lambda: MBAR(4, 16, 60, warmup=120),
    "bimodal": lambda: MBAR(6, 16, 60, warmup=120),
    "truncated": lambda: MBAR(3, 16, 60, warmup=120),
    "simplex": lambda: MBAR(4, 16, 60, warmup=120),
    "ising3": lambda: MBAR(3, 16, 60, warmup=40),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_mbar_is_within_its_own_error_in_nearly_all_seeds(name):
    target = TARGETS[name]
    est = METHODS[name]()(target.make(SEEDS))
    z = (est.value - target.log_z()) / est.std_error
    # Student's t with 31 degrees of freedom: P(|t| > 3) = .0053; 6 in 100 is p < 1e-4
    assert (z.abs() > 3).sum() < 6
    assert 0.7 < z.std() < 1.4
    assert z.mean().abs() < FAR / math.sqrt(SEEDS)


@pytest.mark.slow
def test_any_exact_kernel_moves_the_replicas():
    est = MBAR(6, 16, 100, kernel=lambda u: heat_bath(u, LAYERS), warmup=80)(RBM_JOINT.make())
    assert (est.value - RBM_JOINT.log_z()).abs() < FAR * est.std_error
    d, truth = wide()
    est = MBAR(4, 16, 100, kernel=mala)(d)
    assert ((est.value - truth(1.0)).abs() < FAR * est.std_error).all()


def test_mbar_starts_from_a_proposal():
    d = ebm.GibbsBoltzmann(lambda x: 0.5 * (x - 1.0).square(), ebm.Flat())
    est = MBAR(3, 32, 100, proposal=dist.Normal(0.0, 2.0))(d)
    assert (est.value - 0.5 * math.log(2 * math.pi)).abs() < FAR * est.std_error


NARROW = {  # with log Z of exp(-x^2 / 2) on their supports
    "half": (dist.Exponential(1.0), 0.5 * math.log(math.pi / 2)),
    "flat": (ebm.Flat((), constraints.interval(-1.0, 1.0)), math.log(1.7112487837842973)),
    "uniform": (dist.Uniform(-1.0, 1.0), math.log(1.7112487837842973)),
}


@pytest.mark.parametrize(("proposal", "part"), NARROW.values(), ids=NARROW)
def test_the_last_level_leaves_a_proposal_that_is_too_narrow(proposal, part):
    d = ebm.GibbsBoltzmann(lambda x: 0.5 * x.square(), ebm.Flat())
    for method in (
        Bridge(proposal, samples=torch.randn(4000)),
        MBAR(4, 16, 100, proposal=proposal),
    ):
        est = method(d)
        assert (est.value - 0.5 * math.log(2 * math.pi)).abs() < FAR * est.std_error
        assert (est.value - part).abs() > 2 * FAR * est.std_error  # chains that stay within


@pytest.mark.parametrize(("proposal", "part"), NARROW.values(), ids=NARROW)
def test_annealing_leaves_out_what_its_proposal_has_no_density_for(proposal, part):
    d = ebm.GibbsBoltzmann(lambda x: 0.5 * x.square(), ebm.Flat())
    for method in (Annealed(None, 512, 32, proposal=proposal), SMC(proposal=proposal)):
        est = method(d)
        assert (est.value - part).abs() < FAR * est.std_error


@pytest.mark.slow
def test_places_of_ones_are_swept():
    pair = torch.randn(4, 4)

    def energy(x):
        x = x.to(pair)  # Exact has whole numbers
        return torch.einsum("...i,ij,...j", x[..., 0, :], pair, x[..., 1, :])

    d = ebm.GibbsBoltzmann(energy, ebm.Flat((2, 4), constraints.one_hot), torch.ones(SEEDS))
    method = MBAR(3, 16, 60, warmup=16)
    est, truth = method(d), Exact()(d).value
    z = (est.value - truth) / est.std_error
    # Student's t with 31 degrees of freedom: P(|t| > 3) = .0053; 6 in 100 is p < 1e-4
    assert (z.abs() > 3).sum() < 6
    assert 0.7 < z.std() < 1.4
    x = method.weighted(d).x
    assert x.shape == (960, SEEDS, 2, 4)
    assert (x.sum(-1) == 1).all()


def test_walls_count_in_the_base():
    base = dist.Normal(torch.zeros(1), 1.0).to_event(1)
    half = ebm.GibbsBoltzmann(lambda x: torch.where(x[..., 0] > 0, 0.0, torch.inf), base)
    est = MBAR(3, 32, 100)(half)
    assert (est.value - math.log(0.5)).abs() < FAR * est.std_error
    assert est.std_error > 0


def wells(x):
    return 8.0 * (x.square() - 1.0).square().sum(-1)


def tempered():
    base = dist.Normal(torch.zeros(1), 1.5).to_event(1)
    scale = torch.tensor(1.0)
    d = ebm.GibbsBoltzmann(lambda x: scale * wells(x), base, 1.5)
    kernel = ebm.Tempered(d, num_temperatures=4, min_beta=0.05, num_steps=8, keep_ladder=True)
    mcmc = ebm.MCMC(kernel, 500, warmup_steps=200, num_chains=32, disable_progbar=True)
    mcmc.run()
    return d, mcmc, scale


# Slow passage between the wells is counted in the error.
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pyro_ebm.ConvergenceWarning")
def test_the_chains_of_tempered_are_used_again():
    d, mcmc, scale = tempered()
    energy = mcmc.sample_stats["ladder_3"]
    x = mcmc.get_samples(group_by_chain=True)["x"]
    torch.testing.assert_close(energy, 1.5 * wells(x), rtol=1e-8, atol=1e-10)
    method = MBAR.from_tempered(mcmc)
    betas, est, _ = method.ladder(d)
    torch.testing.assert_close(betas[1:], mcmc.adapted.betas, **EXACT)
    for s, value, error in zip(betas[1:], est.value[1:], est.std_error[1:], strict=True):
        truth = log_partition(
            ebm.GibbsBoltzmann(wells, d.base, 1.5 * s), Quadrature(-5.0, 5.0, 400)
        ).value
        assert (value - truth).abs() < FAR * error
    scale.mul_(1.1)
    with pytest.raises(ValueError, match="must be the target of the run"):
        method(d)


def test_a_run_that_kept_no_ladder_is_refused():
    class Run:
        class kernel:
            target = None

        sample_stats = {"lp": torch.zeros(2, 3)}

    with pytest.raises(ValueError, match="keep_ladder=True"):
        MBAR.from_tempered(Run())


# What cannot be trusted, and wrong input --------------------------------------------------------


def test_too_little_overlap_is_said():
    d = ebm.GibbsBoltzmann(lambda x: 1e4 * (x - 3.0).square(), dist.Normal(0.0, 1.0))
    x = dist.Normal(3.0, 1e-4**0.5).sample((100,))
    with pytest.warns(ebm.UnnormalizedWarning, match="Bridge cannot be trusted"):
        est = Bridge(samples=x)(d)
    assert est.std_error > 1
    apart = ebm.GibbsBoltzmann(
        lambda x: torch.where(x > 30.0, 0.0, torch.inf), dist.Normal(0.0, 1.0)
    )
    with pytest.warns(ebm.UnnormalizedWarning, match="Bridge cannot be trusted"):
        est = Bridge(samples=30.0 + torch.rand(100))(apart)
    assert est.std_error == torch.inf


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_keeps_the_type_and_works_without_gradients(dtype, device):
    base = dist.Normal(torch.zeros(2, dtype=dtype, device=device), 2.0).to_event(1)
    d = ebm.GibbsBoltzmann(lambda x: x.square().sum(-1), base)
    with torch.no_grad():
        for method in (Bridge(num_samples=100), MBAR(3, 16, 20, warmup=32)):
            est = method(d)
            assert {part.dtype for part in est} == {dtype}
            weighted = method.weighted(d)
            assert weighted.x.dtype == dtype
            assert weighted.log_weight.shape == weighted.x.shape[:1]


WRONG = {
    "one sample": (lambda d: Bridge(samples=torch.zeros(1, 2))(d), "samples must be two or more"),
    "shape": (lambda d: Bridge(samples=torch.zeros(9, 3))(d), "samples must be two or more"),
    "impossible samples": (lambda d: Bridge(samples=-torch.ones(9, 2))(d), "got 9 points of none"),
    "few": (lambda d: Bridge(num_samples=1), "num_samples must be"),
    "order": (lambda d: MBAR(torch.tensor([0.0, 1.0, 0.5])), "increase from 0 to 1"),
    "no base": (lambda d: MBAR(torch.tensor([0.1, 1.0])), "increase from 0 to 1"),
    "one level": (lambda d: MBAR(1), "betas must be a whole number"),
    "chains": (lambda d: MBAR(3, 0), "num_chains must be"),
    "event": (lambda d: Bridge(dist.Normal(0.0, 1.0))(d), "proposal must have the event shape"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input_is_named(name):
    base = dist.Normal(torch.zeros(2), 2.0).to_event(1)
    d = ebm.GibbsBoltzmann(lambda x: torch.where(x[..., 0] < 0, torch.inf, 0.0), base)
    call, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        call(d)


def test_impossible_energies_are_named():
    pit = ebm.GibbsBoltzmann(lambda x: torch.where(x > 1, -torch.inf, x), dist.Normal(0.0, 1.0))
    for q in (None, dist.Normal(0.0, 2.0)):
        for method in (Bridge(q, samples=torch.rand(500)), MBAR(3, 4, 5, proposal=q, warmup=8)):
            with pytest.raises(ValueError, match="must not be minus infinity"):
                method(pit)
    with pytest.raises(ValueError, match="must be normalised"):
        Bridge(pit)(pit)
    with pytest.raises(ValueError, match="proposal must be given"):
        MBAR()(ebm.GibbsBoltzmann(lambda x: x**2, ebm.Flat()))
    wall = ebm.GibbsBoltzmann(lambda x: torch.where(x > 40, x, torch.inf), dist.Normal(0.0, 1.0))
    with pytest.raises(ValueError, match="must be finite at draws of the base"):
        MBAR()(wall)


def test_nan_energies_are_counted_and_weigh_nothing():
    d = ebm.GibbsBoltzmann(
        lambda x: torch.where(x < 1.0, x, torch.nan), ebm.Flat((), constraints.interval(0.0, 2.0))
    )
    x = -torch.log1p(-torch.rand(1000) * (1 - math.exp(-1.0)))
    for method in (Bridge(samples=x), MBAR(3, 16, 60)):
        with pytest.warns(ebm.UnnormalizedWarning, match=r"was NaN at \d+ of \d+ points"):
            est = method(d)
        assert abs(est.value - math.log(1 - math.exp(-1.0))) < FAR * est.std_error
    with pytest.raises(ValueError, match="got 1 points of none"):
        Bridge(samples=torch.cat([x, x.new_tensor([1.5])]))(d)


@pytest.mark.parametrize("base", ["whole numbers", "categories"])
def test_levels_of_whole_numbers(base):
    flat = ebm.Flat((2,), constraints.integer_interval(1, 4))
    bases = {"whole numbers": flat, "categories": dist.Categorical(torch.ones(2, 4)).to_event(1)}
    d = ebm.GibbsBoltzmann(lambda x: 0.3 * (1.0 * x - 2.0).square().sum(-1), bases[base])
    found = MBAR(3, num_samples=100, warmup=50)(d)
    assert abs(found.value - Exact()(d).value) < FAR * found.std_error
