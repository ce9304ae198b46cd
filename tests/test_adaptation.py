"""What warm-up learns, against formulas, and with a stuck chain or one of NaN among others."""

import io
import math

import pytest
import torch

import pyro_ebm as ebm
from pyro_ebm.adaptation import (
    GRID,
    Covariance,
    DualAveraging,
    Length,
    Preconditioner,
    Warmup,
    geometric_mean,
    rescue,
)
from pyro_ebm.kernels.base import Dense, Diagonal, State
from tests.common import EXACT, NUMERIC

OPTIONS = {"target": 0.8, "step_size": None, "adapt_step_size": True}


def correlated(num_dims=5, rho=0.95, scale=1000.0):
    """A covariance of equal correlations and unequal scales."""
    scales = torch.logspace(0, math.log10(scale), num_dims)
    corr = torch.full((num_dims, num_dims), rho) + (1 - rho) * torch.eye(num_dims)
    return corr * torch.outer(scales, scales)


# Step size -------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [0.6, 0.8, 0.95])
@pytest.mark.parametrize("first", [1e-2, 1.0, 1e2])
def test_the_step_size_has_the_wanted_acceptance(target, first):
    accept = lambda step: torch.exp(-step)
    adaptation = DualAveraging(torch.tensor(first), target)
    for _ in range(1500):
        adaptation.update(accept(adaptation.step_size))
    torch.testing.assert_close(accept(adaptation.best), torch.tensor(target), rtol=0, atol=0.02)


def test_step_sizes_of_levels_are_adapted_each_on_its_own():
    both = DualAveraging(torch.tensor([1.0, 100.0]), 0.8)
    one = DualAveraging(torch.tensor(100.0), 0.8)
    for _ in range(100):
        both.update(torch.exp(-both.step_size))
        one.update(torch.exp(-one.step_size))
    torch.testing.assert_close(both.best[1], one.best, **EXACT)


def test_a_nan_acceptance_counts_as_none():
    first, second = (DualAveraging(torch.tensor(1.0), 0.8) for _ in range(2))
    first.update(torch.tensor(torch.nan))
    second.update(torch.tensor(0.0))
    assert first.step_size == second.step_size < 1


# Covariances -----------------------------------------------------------------------------------


def weighted(x, growth):
    """The weighted mean and covariance of ``(moves, chains, D)``, directly."""
    weights = torch.ones(len(x))
    for t in range(2, len(x) + 1):
        weight = (1.0 + growth) / (t + growth)
        weights[: t - 1] *= 1.0 - weight
        weights[t - 1] = weight
    weights = (weights / weights.sum() / x.shape[1])[:, None, None]
    mean = (weights * x).sum((0, 1))
    return mean, torch.einsum("tci,tcj->ij", weights * (x - mean), x - mean)


@pytest.mark.parametrize("moves", [1, 2, 30])
def test_covariances_are_those_of_the_weighted_formula(moves):
    x = torch.randn(moves, 7, 3) @ torch.randn(3, 3) + 10.0 * torch.randn(moves, 1, 3)
    full, diagonal = Covariance(True), Covariance()
    for points in x:
        full.update(points)
        diagonal.update(points)
    mean, covariance = weighted(x, Covariance.growth)
    torch.testing.assert_close(full.mean, mean, **EXACT)
    torch.testing.assert_close(full.moment, covariance, **EXACT)
    torch.testing.assert_close(diagonal.moment, covariance.diagonal(), **EXACT)
    if moves > 2:  # the planted fault: equal weights
        equal = weighted(x, 0.0)[1]
        assert not torch.allclose(full.moment, equal, rtol=1e-3)


# Metrics ---------------------------------------------------------------------------------------


def out_of_equilibrium(precision, num):
    """Independent points far from the mode, which drift."""
    num_dims = len(precision)
    x = 100.0 + 5.0 * torch.randn(num_dims) + torch.randn(num, num_dims)
    return x * precision.diagonal().rsqrt()


def metric_of(kind, precision, moves=30, num=400):
    metric = Preconditioner(kind, len(precision))
    for _ in range(moves):
        x = out_of_equilibrium(precision, num)
        metric.update(x, x @ precision)
    return metric.metric()


def test_a_diagonal_metric_is_exact_for_a_gaussian_out_of_equilibrium():
    variances = torch.logspace(-6, 6, 5)
    metric = metric_of("diagonal", (1 / variances).diag(), num=2, moves=3)
    assert isinstance(metric, Diagonal)
    torch.testing.assert_close(metric.inverse_mass, variances, **NUMERIC)


@pytest.mark.parametrize(("rho", "scale"), [(0.5, 1.0), (0.99, 1e3), (0.9999, 1e6)])
def test_a_dense_metric_is_exact_for_a_gaussian_out_of_equilibrium(rho, scale):
    covariance = correlated(4, rho, scale)
    metric = metric_of("dense", torch.linalg.inv(covariance))
    assert isinstance(metric, Dense)
    scales = covariance.diagonal().sqrt()
    found = metric.inverse_mass / torch.outer(scales, scales)
    torch.testing.assert_close(found, covariance / torch.outer(scales, scales), rtol=1e-4, atol=0)
    eye = metric.inverse_factor @ metric.inverse_mass @ metric.inverse_factor.T
    torch.testing.assert_close(eye, torch.eye(4), **NUMERIC)


def test_the_geometric_mean_solves_its_equation():
    a, b = (torch.randn(2, 5, 8) @ torch.randn(2, 8, 5)) @ torch.randn(2, 5, 5)
    a, b = a @ a.T, b @ b.T
    mean = geometric_mean(a, b)
    torch.testing.assert_close(mean @ b @ mean, a, **NUMERIC)
    assert geometric_mean(a, torch.full_like(b, torch.nan)) is None


def test_what_is_older_than_a_window_is_forgotten_however_large():
    metric = Preconditioner("diagonal", 2)
    for _ in range(20):
        x = torch.randn(8, 2)
        metric.update(x, 1e13 * x)
    metric.renew()
    for _ in range(10):
        x = torch.randn(8, 2)
        metric.update(x, x)
    assert metric.metric().inverse_mass.max() < 1e-6  # still looks back
    metric.renew()
    torch.testing.assert_close(metric.metric().inverse_mass, torch.ones(2), **EXACT)


def test_auto_stays_diagonal_where_dimensions_are_independent():
    metric = Preconditioner("auto", 10)
    for _ in range(100):
        x = torch.randn(16, 10) * torch.logspace(0, 3, 10)
        metric.update(x, x / torch.logspace(0, 6, 10))
        assert isinstance(metric.metric(), Diagonal)


def test_auto_goes_dense_where_dimensions_are_correlated():
    metric = metric_of("auto", torch.linalg.inv(correlated(10, 0.9)), num=16)
    assert isinstance(metric, Dense)
    wide = Preconditioner("auto", Preconditioner.most + 1)
    assert not wide.full


def test_a_chain_of_nan_says_nothing_to_the_metric():
    first, second = Preconditioner("dense", 3), Preconditioner("dense", 3)
    for _ in range(20):
        x = torch.randn(64, 3)
        first.update(x[1:], x[1:])
        grad = x.clone()
        grad[0] = torch.nan
        second.update(x, grad)
    torch.testing.assert_close(first.metric(), second.metric(), **EXACT)


# The number of steps ---------------------------------------------------------------------------


def gaussian_orbits(step, scales, num, chains=1024):
    """Positions of exact orbits of a Gaussian at stages of ``num`` steps, always accepted."""
    x, p = torch.randn(2, chains, len(scales))
    turn = lambda n: (n * step / scales).cos() * x + (n * step / scales).sin() * p
    return x * scales, [(n, turn(n) * scales, torch.ones(chains)) for n in num]


def wanted(step, scales):
    """The optimum of the criterion, with the correlations of orbits in closed form."""

    def rate(n):
        cos = (n * step / scales).cos()
        terms = []
        for rho in (cos, cos.square()):
            gap = (1.0 - rho).clamp(1e-3, Length.most)
            terms.append(float((gap / (2.0 - gap)).min()))
        return math.sqrt(terms[0] * terms[1]) / n

    return max((n for n in GRID if n < 200), key=rate)


@pytest.mark.parametrize(
    ("step", "scales"), [(0.3, (1.0,)), (0.1, (1.0, 1.0)), (0.2, (1.0, 2.5)), (1.5, (1.0,))]
)
def test_the_number_of_steps_is_the_analytic_optimum_of_a_gaussian(step, scales):
    scales = torch.tensor(scales)
    length = Length()
    for _ in range(40):
        start, ends = gaussian_orbits(step, scales, length.stages)
        length.update(torch.zeros(len(scales)), start, ends)
    best = wanted(step, scales)
    at = GRID.index(best)
    assert length.best in GRID[max(at - 1, 0) : at + 2]  # optima are flat
    if len(scales) == 1:  # a little beyond a quarter of a period
        assert 0.8 < length.best * step / (math.pi / 2) < 1.3


def test_trajectories_with_an_old_metric_are_forgotten():
    length = Length()
    for step in (0.05, 0.8):
        length.forget()
        for _ in range(length.patience):
            length.update(torch.zeros(1), *gaussian_orbits(step, torch.ones(1), GRID[:16]))
    assert length.best == 2


def test_a_chain_of_nan_does_not_choose_the_number_of_steps():
    found = []
    for spoilt in (False, True):
        torch.manual_seed(0)
        length = Length()
        for _ in range(20):
            start, ends = gaussian_orbits(0.2, torch.ones(2), length.stages, 64)
            if spoilt:
                for _, end, _ in ends:
                    end[0] = torch.nan
            length.update(torch.zeros(2), start, ends)
        found.append(GRID.index(length.best))
    assert abs(found[0] - found[1]) <= 1


# Lost chains -----------------------------------------------------------------------------------


def test_chains_far_above_the_others_are_lost_and_no_others():
    energy = torch.randn(64)
    assert rescue(energy, 5) is None
    assert rescue(torch.cat([energy[:32], energy[:32] + 60.0]), 5) is None  # another mode
    energy[3], energy[7], energy[60] = 452.0, torch.nan, torch.inf
    source = rescue(energy, 5)
    kept = [i for i in range(64) if i not in (3, 7, 60)]
    assert source[kept].tolist() == kept
    assert set(source[[3, 7, 60]].tolist()) <= set(kept)


def test_the_best_chain_alone_does_not_make_the_others_lost():
    energy = torch.randn(64)
    energy[0] = -1e6
    assert rescue(energy, 5) is None
    assert rescue(torch.full((4,), torch.nan), 5) is None


# All of it -------------------------------------------------------------------------------------

SPOT = torch.full((3,), 4.0, dtype=torch.double)


def pit(around):
    """A Gaussian, and a spot so deep that a chain does not leave it; ``around`` surrounds it."""

    def energy(x):
        distance = (x - SPOT).square().sum(-1)
        plain = 0.5 * (x / torch.tensor([1.0, 1.0, 10.0])).square().sum(-1)
        plain = torch.where(distance < 0.25, plain + around, plain)
        return torch.where(distance < 1e-20, -200.0, plain)

    return energy


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pyro_ebm.ConvergenceWarning")
@pytest.mark.parametrize("around", [0.0, torch.nan])
def test_one_chain_that_never_moves_does_not_spoil_the_others_warm_up(around):
    found = []
    for stuck in (False, True):
        torch.manual_seed(0)
        z = torch.randn(64, 3)
        if stuck:
            z[0] = SPOT
        sampler = ebm.ChEES(pit(around), ebm.Flat((3,)))
        options = {"num_chains": 64, "disable_progbar": True, "backend": "eager"}
        mcmc = ebm.MCMC(sampler, 50, 300, initial_params={"x": z}, **options)
        mcmc.run()
        accept = mcmc.sample_stats["acceptance_rate"]
        assert (float(accept[0].max()) < 1e-6) == stuck  # the planted fault is there
        assert 0.75 < accept[1:].mean() < 0.86
        found.append(mcmc.adapted)
    good, bad = found
    torch.testing.assert_close(bad.step_size, good.step_size, rtol=0.15, atol=0)
    mass = [(m / m[0]) for m in (good.metric.inverse_mass, bad.metric.inverse_mass)]
    torch.testing.assert_close(mass[1], mass[0], rtol=0.3, atol=0)
    assert abs(GRID.index(bad.num_steps) - GRID.index(good.num_steps)) <= 1


def feed(warmup, count):
    """Give a warm-up a move that depends on its number only; return all that it says then."""
    generator = torch.Generator().manual_seed(count)
    noise = lambda *shape: torch.randn(*shape, generator=generator)
    covariance = correlated(3, 0.99, 10.0)
    x, y = noise(2, 16, 3) @ torch.linalg.cholesky(covariance).T
    energy = noise(16) + 1000.0 * 0.8**count
    energy[3] += 100.0 if count % 2 else 0.0
    grad = y @ torch.linalg.inv(covariance) + 0.1 * noise(16, 3)
    info = type("Info", (), {"accept_prob": torch.rand(16, generator=generator)})
    seen = [(n, 0.9**n * x + (n > 0) * noise(16, 3), torch.ones(16)) for n in (0, 1, 2, 3)]
    warmup.update(State(x, energy, grad), State(y, energy, grad), info, seen)
    adapted, source = warmup.adapted, warmup.moves()
    parts = [adapted.step_size, *adapted.metric, adapted.num_steps, adapted.moved, source]
    return [p.tolist() if isinstance(p, torch.Tensor) else p for p in parts]


@pytest.mark.slow
def test_a_warm_up_goes_on_from_a_checkpoint_with_the_same_bits():
    make = lambda: Warmup(200, torch.zeros(3), **OPTIONS, metric="auto", chees=True)
    warmup = make()
    for count in range(63):
        feed(warmup, count)
    file = io.BytesIO()
    torch.save(warmup.state(), file)

    def saved():
        file.seek(0)
        return torch.load(file, weights_only=True)

    whole = [feed(warmup, count) for count in range(63, 130)]
    assert whole[0][-2]  # chains were moved
    again = make()
    again.restore(saved())
    assert [feed(again, count) for count in range(63, 130)] == whole
    for key in saved():  # the planted faults: a part that is not kept
        other = make()
        other.restore({**saved(), key: make().state()[key]})
        assert [feed(other, count) for count in range(63, 130)] != whole, key


def test_a_warm_up_of_one_chain_finds_the_scales():
    torch.manual_seed(0)
    energy = lambda x: 0.5 * (x / torch.tensor([1.0, 100.0])).square().sum(-1)
    mcmc = ebm.MCMC(ebm.NUTS(energy, ebm.Flat((2,))), 200, 300, disable_progbar=True)
    mcmc.run()
    metric = mcmc.adapted.metric
    mass = metric.inverse_mass if isinstance(metric, Diagonal) else metric.inverse_mass.diagonal()
    assert 0.5 < (mass[1] / mass[0]).log10() / 4 < 1.5
