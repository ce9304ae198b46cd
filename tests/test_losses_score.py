"""Score matching: exact, sliced, denoising, at many levels."""

import itertools
import math

import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_ebm as ebm
from pyro_ebm.losses import (
    denoising_score_matching,
    multi_level_denoising_score_matching,
    score_matching,
    sliced_score_matching,
)
from tests.common import EXACT, FAR, NUMERIC, Line, gaussian

SIGMA = 0.5


def signs(dim, n):
    """Return all vectors of signs for each of n points: E[v] = 0 and E[v v'] = 1, exactly."""
    rows = torch.tensor([*itertools.product([-1.0, 1.0], repeat=dim)])
    return rows[:, None].expand(-1, n, -1)


# Each as a loss of an energy and points, whose random part has its exact moments.
METHODS = {
    "exact": score_matching,
    "sliced": lambda e, x: sliced_score_matching(e, x, signs(x.shape[-1], len(x))),
    "sliced, plain": lambda e, x: sliced_score_matching(
        e, x, signs(x.shape[-1], len(x)), variance_reduced=False
    ),
    "denoising": lambda e, x: denoising_score_matching(e, x, signs(x.shape[-1], len(x)), SIGMA),
}
every_method = pytest.mark.parametrize("name", METHODS)


def minimum(loss, start):
    """Return where a quadratic loss of a vector is least: one Newton step."""
    start = start.clone().requires_grad_()
    (grad,) = torch.autograd.grad(loss(start), start, create_graph=True)
    hessian = torch.stack([torch.autograd.grad(g, start, retain_graph=True)[0] for g in grad])
    return (start - torch.linalg.solve(hessian, grad)).detach()


def slope(loss, at):
    at = torch.as_tensor(at).requires_grad_()
    return torch.autograd.grad(loss(at), at)[0]


def quartic(x):
    """Return an energy of points of any event of 4 numbers, with a full Hessian."""
    flat = x.reshape(*x.shape[: x.dim() - 1], -1)
    return flat.pow(4).sum(-1) + flat.cos().prod(-1) + flat.sum(-1).square()


def square_event(x):
    return quartic(x.flatten(-2))


@pytest.mark.parametrize("chunk_size", [1, 3, 100])
@pytest.mark.parametrize(
    ("energy", "event"),
    [(lambda x: x.pow(4) + x.cos(), ()), (quartic, (4,)), (square_event, (2, 2))],
    ids=["number", "vector", "image"],
)
def test_it_is_the_formula_of_gradient_and_hessian(energy, event, chunk_size):
    x = torch.randn(3, 2, *event)
    want = []
    for point in x.flatten(0, 1):
        grad = torch.autograd.functional.jacobian(energy, point).flatten()
        hessian = torch.autograd.functional.hessian(energy, point).reshape(len(grad), len(grad))
        want.append(0.5 * grad.square().sum() - hessian.trace())
    loss = score_matching(energy, x, chunk_size=chunk_size)
    torch.testing.assert_close(loss, torch.stack(want).mean(), **EXACT)


def whitened(n, dim):
    """Return points whose mean is zero and whose covariance is one, exactly."""
    x = torch.randn(n, dim)
    x = x - x.mean(0)
    return x @ torch.linalg.inv(torch.linalg.cholesky(x.T @ x / n)).T


def test_the_precision_of_a_gaussian_in_ten_dimensions_is_one():
    """A trace divided by the number of dimensions would give a tenth."""
    x = whitened(50, 10)
    loss = lambda k, scale=1.0: (
        score_matching(lambda x: 0.5 * k * x.square().sum(-1), x) + ((1 - scale) * 10 * k.sum())
    )
    torch.testing.assert_close(minimum(loss, torch.zeros(1)), torch.ones(1), **EXACT)
    faulty = minimum(lambda k: loss(k, scale=0.1), torch.zeros(1))
    torch.testing.assert_close(faulty, torch.full((1,), 0.1), **EXACT)


@every_method
def test_a_gaussian_learns_the_covariance_of_the_data(name):
    x = torch.randn(200, 3) @ torch.randn(3, 3) + torch.tensor([1.0, -2.0, 0.5])
    mean, covariance = x.mean(0), torch.cov(x.T, correction=0)
    if name == "denoising":  # the law of the noisy data
        covariance = covariance + SIGMA**2 * torch.eye(3)
    upper = torch.triu_indices(3, 3)

    def matrix(theta):
        p = torch.zeros(3, 3).index_put((upper[0], upper[1]), theta[:6])
        return p + p.T

    def loss(theta):
        energy = lambda x: 0.5 * ((x @ matrix(theta)) * x).sum(-1) - x @ theta[6:]
        return METHODS[name](energy, x)

    theta = minimum(loss, torch.ones(9))
    torch.testing.assert_close(matrix(theta), torch.linalg.inv(covariance), **EXACT)
    torch.testing.assert_close(torch.linalg.solve(matrix(theta), theta[6:]), mean, **EXACT)


@every_method
def test_of_a_distribution_it_takes_the_potential(name):
    """With base and temperature: beta E - log b."""
    k = torch.tensor(0.3, requires_grad=True)
    d = ebm.GibbsBoltzmann(
        lambda x: k * gaussian(x), dist.Normal(torch.zeros(2), 0.5).to_event(1), beta=2.0
    )
    x = torch.randn(5, 2)
    found = METHODS[name](d.potential, x)
    want = METHODS[name](lambda x: (2.0 * k + 4.0) * gaussian(x), x)
    torch.testing.assert_close(found, want, **EXACT)
    slopes = [torch.autograd.grad(loss, k)[0] for loss in (found, want)]
    torch.testing.assert_close(*slopes, **EXACT)


def features(x):
    a, b = x.unbind(-1)
    return torch.stack([a**2, a * b, b**4, a**4, (a + b).cos()], -1)


def slopes(x):
    """Return the gradients of the features, of shape (*n, 5, 2)."""
    a, b = x.unbind(-1)
    zero, s = torch.zeros_like(a), -(a + b).sin()
    in_a = torch.stack([2 * a, b, zero, 4 * a**3, s], -1)
    in_b = torch.stack([zero, a, 4 * b**3, zero, s], -1)
    return torch.stack([in_a, in_b], -1)


def laplacians(x):
    a, b = x.unbind(-1)
    two = torch.full_like(a, 2.0)
    return torch.stack([two, 0 * a, 12 * b**2, 12 * a**2, -2 * (a + b).cos()], -1)


@every_method
def test_an_exponential_family_learns_the_solution_of_its_linear_system(name):
    x = torch.randn(300, 2) * torch.tensor([1.0, 0.7])
    if name == "denoising":
        noise = signs(2, len(x))
        j = slopes(x + SIGMA * noise)
        right = (j @ (noise / SIGMA).unsqueeze(-1)).squeeze(-1).mean((0, 1))
    else:
        j = slopes(x).unsqueeze(0)
        right = laplacians(x).mean(0)
    want = torch.linalg.solve((j @ j.mT).mean((0, 1)), right)
    found = minimum(lambda t: METHODS[name](lambda x: features(x) @ t, x), torch.zeros(5))
    torch.testing.assert_close(found, want, **NUMERIC)


def test_the_slope_is_zero_at_the_truth():
    """Quadrature over a double well, a x^4 - b x^2."""
    line = Line(lambda x: (x**4 - 2 * x**2).sum(-1), -4.0, 4.0, 801)

    def loss(theta):
        energy = lambda x: (theta[0] * x**4 - theta[1] * x**2).sum(-1)
        parts = [score_matching(energy, x.reshape(1, 1)) for x in line.x]
        return (line.mass * torch.stack(parts)).sum()

    torch.testing.assert_close(slope(loss, [1.0, 2.0]), torch.zeros(2), **NUMERIC)
    assert (slope(loss, [1.1, 2.0]).abs() > 0.1).all()


def test_without_gradients_it_gives_its_value():
    x, energy = torch.randn(5, 4), quartic
    for loss in METHODS.values():
        want = loss(energy, x).detach()
        with torch.inference_mode():
            value = loss(energy, x.clone())
        torch.testing.assert_close(value.clone(), want, **EXACT)


def test_a_network_of_relus_has_no_second_derivatives():
    """What the docstring warns of: only the slope is left, and flattening is all it learns."""
    net = nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 1))
    energy = lambda x: net(x).squeeze(-1)
    x = torch.randn(20, 2)
    want = 0.5 * ebm.force(energy, x).square().sum(-1).mean()
    for chunk_size in (1, 2):
        loss = score_matching(energy, x, chunk_size=chunk_size)
        torch.testing.assert_close(loss, want, **EXACT)


def test_a_linear_energy_has_no_curvature():
    x = torch.randn(4, 3)
    torch.testing.assert_close(score_matching(lambda x: x.sum(-1), x), torch.tensor(1.5), **EXACT)


def test_on_a_half_line_it_is_wrong_and_in_free_coordinates_right():
    """Rate 2 on x > 0, where the density does not vanish at the edge: its optimum is rate 0."""
    x = torch.rand(10, 1)
    rate = minimum(lambda k: score_matching(lambda x: k * x.sum(-1), x), torch.tensor([2.0]))
    torch.testing.assert_close(rate, torch.zeros(1), **EXACT)

    law = Line(lambda y: (2 * y.exp() - y).sum(-1), -16.0, 4.0, 801)  # of y = log x

    def loss(rate):
        energy = lambda y: (rate * y.exp() - y).sum(-1)
        parts = [score_matching(energy, y.reshape(1, 1)) for y in law.x]
        return (law.mass * torch.stack(parts)).sum()

    torch.testing.assert_close(minimum(loss, torch.ones(1)), torch.tensor([2.0]), **NUMERIC)


# Sliced -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_size", [1, 3])
@pytest.mark.parametrize("variance_reduced", [True, False])
def test_along_an_orthonormal_basis_it_is_exact(variance_reduced, chunk_size):
    x = torch.randn(6, 4)
    basis = torch.linalg.qr(torch.randn(4, 4)).Q * math.sqrt(4)
    sliced = sliced_score_matching(
        quartic,
        x,
        basis[:, None].expand(4, *x.shape),
        variance_reduced=variance_reduced,
        chunk_size=chunk_size,
    )
    torch.testing.assert_close(sliced, score_matching(quartic, x), **EXACT)


DIRECTIONS = {
    "normal": (torch.randn, True),
    "signs": (lambda *shape: torch.randn(shape).sign(), True),
    "a fault: a variance of a third": (lambda *shape: 2 * torch.rand(shape) - 1, False),
}


@pytest.mark.parametrize("variance_reduced", [True, False])
@pytest.mark.parametrize(("draw", "right"), DIRECTIONS.values(), ids=DIRECTIONS)
def test_the_mean_over_random_directions_is_exact(draw, right, variance_reduced):
    x = torch.randn(6, 4)
    with torch.no_grad():
        exact = score_matching(quartic, x)
        means = torch.stack(
            [
                sliced_score_matching(
                    quartic, x, draw(50, 6, 4), variance_reduced=variance_reduced, chunk_size=50
                )
                for _ in range(100)
            ]
        )
    off = (means.mean() - exact).abs() / (means.std() / math.sqrt(len(means)))
    assert (off < FAR) == right


# Denoising --------------------------------------------------------------------------------------


def test_it_learns_the_precision_of_the_noisy_law():
    x, noise = 1.5 * whitened(40, 2), signs(2, 40)
    energy = lambda k: lambda x: 0.5 * k * x.square().sum(-1)
    loss = lambda k: denoising_score_matching(energy(k), x, noise, SIGMA)
    want = torch.tensor([1 / (1.5**2 + SIGMA**2)])
    torch.testing.assert_close(minimum(loss, torch.zeros(1)), want, **EXACT)
    faulty = lambda k: denoising_score_matching(energy(k), x, SIGMA * noise, 1.0)
    assert not torch.allclose(minimum(faulty, torch.zeros(1)), want, **NUMERIC)


def test_noise_levels_may_differ_by_point():
    x, noise = torch.randn(5, 2), torch.randn(7, 5, 2)
    sigma = torch.rand(5) + 0.1
    whole = denoising_score_matching(gaussian, x, noise, sigma)
    parts = [
        denoising_score_matching(gaussian, x[i], noise[:, i], sigma[i].item()) for i in range(5)
    ]
    torch.testing.assert_close(whole, torch.stack(parts).mean(), **EXACT)


def test_pairs_of_opposite_noise_take_the_growth_of_the_variance_away():
    """Over the levels .1 and .01 the variance grows a hundredfold, or not at all."""
    x, k = torch.randn(10, 2), torch.ones(1)

    def variance(sigma, paired):
        def slope_of(_):
            first, second = torch.randn(2, 10, 2)
            noise = torch.stack([first, -first if paired else second])
            energy = lambda k: lambda x: 0.5 * k * x.square().sum(-1)
            return slope(lambda k: denoising_score_matching(energy(k), x, noise, sigma), k)

        return torch.cat([*map(slope_of, range(300))]).var()

    # A variance of 300 draws is known to 8 %: four of them, for each of the two.
    assert variance(0.01, False) / variance(0.1, False) > 100 / 1.5
    assert variance(0.01, True) / variance(0.1, True) < 1.5


def conditional(s2):
    return lambda x, sigma: 0.5 * x.square().sum(-1) / (s2 + sigma.square())


def test_many_levels_are_a_weighted_mean_of_each():
    x, noise, sigma = torch.randn(5, 2), torch.randn(3, 5, 2), torch.rand(5) + 0.1
    energy = conditional(2.0)
    parts = [
        s**2 * denoising_score_matching(ebm.Given(energy, s), x[i], noise[:, i], s)
        for i, s in enumerate(sigma)
    ]
    whole = multi_level_denoising_score_matching(energy, x, noise, sigma)
    torch.testing.assert_close(whole, torch.stack(parts).mean(), **EXACT)


def test_one_level_for_all_may_be_a_number():
    x, noise = torch.randn(2, 5, 3).unbind()
    of_many = multi_level_denoising_score_matching(CONDITIONAL, x, noise, 0.5)
    given = lambda x: CONDITIONAL(x, 0.5)
    of_one = denoising_score_matching(given, x, noise, 0.5)
    torch.testing.assert_close(of_many, 0.25 * of_one, **EXACT)


def test_many_levels_are_least_at_the_truth():
    x, noise = 1.5 * whitened(20, 2).repeat(3, 1), signs(2, 60)
    sigma = torch.tensor([0.1, 1.0, 3.0]).repeat_interleave(20)
    loss = lambda s2: multi_level_denoising_score_matching(conditional(s2), x, noise, sigma)
    torch.testing.assert_close(slope(loss, [1.5**2]), torch.zeros(1), **EXACT)
    assert slope(loss, [2.0]) < -1e-3


# What is refused --------------------------------------------------------------------------------

X = (4, 2)
CONDITIONAL = lambda x, sigma: gaussian(x) / (1 + sigma**2)
REFUSED = {
    "chunk_size": lambda: score_matching(gaussian, torch.ones(X), chunk_size=0),
    "one energy per point": lambda: score_matching(lambda x: x[..., :1], torch.ones(X)),
    "differentiably": lambda: score_matching(lambda x: x.detach().sum(-1), torch.ones(X)),
    "projections": lambda: sliced_score_matching(gaussian, torch.ones(X), torch.ones(2)),
    "noise": lambda: denoising_score_matching(gaussian, torch.ones(X), torch.ones(3, 2), 1.0),
    "floating point": lambda: score_matching(gaussian, torch.ones(X, dtype=torch.long)),
    "sigma": lambda: denoising_score_matching(gaussian, torch.ones(X), torch.ones(X), 0.0),
    "got nan": lambda: denoising_score_matching(gaussian, torch.ones(X), torch.ones(X), math.nan),
    r"sigma must .* got the shape \(2,\)": lambda: denoising_score_matching(
        gaussian, torch.ones(X), torch.ones(X), torch.ones(2)
    ),
    "positive, got -1": lambda: multi_level_denoising_score_matching(
        CONDITIONAL, torch.ones(X), torch.ones(X), -1.0
    ),
}


@pytest.mark.parametrize("word", REFUSED)
def test_it_refuses(word):
    with pytest.raises(ValueError, match=word):
        REFUSED[word]()
