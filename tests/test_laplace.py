"""log Z by Laplace's method: where it is exact, how far it is off, and what it refuses."""

import math
import warnings

import pyro.distributions as dist
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pyro.distributions import constraints
from torch import nn

import pyro_ebm as ebm
from pyro_ebm.partition import Laplace, Quadrature, laplace, log_partition
from tests.common import EXACT

BETAS = [0.25, 1.0, 8.0]


class Quadratic(nn.Module):
    """An energy of vectors with a full precision and a mean."""

    def __init__(self, dim, device=None):
        super().__init__()
        root = torch.randn(dim, dim, device=device)
        self.precision = nn.Parameter(root @ root.mT + torch.eye(dim, device=device))
        self.mean = nn.Parameter(3.0 * torch.randn(dim, device=device))

    def forward(self, x):
        r = x - self.mean
        return 0.5 * ((r @ self.precision) * r).sum(-1)

    def log_z(self, beta, s=None):
        """log of the integral, on a normal base of scale ``s`` if given."""
        dim = len(self.mean)
        if s is None:
            return 0.5 * (dim * (2 * math.pi / beta).log() - self.precision.logdet())
        cover = (beta * self.precision).inverse() + s**2 * torch.eye(dim)
        normal = torch.distributions.MultivariateNormal(self.mean, cover)
        flat = 0.5 * (dim * (2 * math.pi / beta).log() - self.precision.logdet())
        return flat + normal.log_prob(torch.zeros(dim))


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("scale", [None, 2.0], ids=["flat", "normal base"])
@pytest.mark.parametrize("dim", [1, 4, 30])
def test_it_is_exact_for_a_gaussian_with_all_its_derivatives(dim, scale, beta):
    energy, beta = Quadratic(dim), torch.tensor(beta, requires_grad=True)
    zero = torch.zeros(dim)
    base = ebm.Flat((dim,)) if scale is None else dist.Normal(zero, scale).to_event(1)
    value, std_error, ess = log_partition(ebm.GibbsBoltzmann(energy, base, beta), Laplace())
    truth = energy.log_z(beta, scale)
    torch.testing.assert_close(value, truth, **EXACT)
    inputs = [beta, *energy.parameters()]
    got, want = (
        torch.autograd.grad(v, inputs, materialize_grads=True, retain_graph=True)
        for v in (value, truth)
    )
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)  # through two solves
    assert std_error < 0.2
    assert ess > 100


def test_it_is_on_the_device_of_the_base(device):
    energy, base = Quadratic(3, device), ebm.Flat((3,), device=device)
    value, std_error, ess = log_partition(ebm.GibbsBoltzmann(energy, base), Laplace())
    truth = energy.log_z(torch.ones((), device=device))
    torch.testing.assert_close(value, truth, **EXACT)
    assert std_error.device == ess.device == value.device


def quartic(a, b, beta):
    """U(x) = beta (a x^2 / 2 + b x^4 / 4 - (a + b) x), whose mode is at one."""
    energy = lambda x: 0.5 * a * x**2 + 0.25 * b * x**4 - (a + b) * x
    return ebm.GibbsBoltzmann(energy, ebm.Flat(), beta)


def quartic_value(a, b, beta):
    """Laplace's value of it, by hand: U'' at one is beta (a + 3 b)."""
    least = -0.5 * a - 0.75 * b
    return -beta * least + 0.5 * (2 * math.pi / (beta * (a + 3 * b))).log()


@pytest.mark.parametrize("beta", BETAS)
def test_value_and_mode_of_a_quartic_are_those_by_hand(beta):
    a, b = torch.tensor(0.7), torch.tensor(0.4)
    value = Laplace().log_z(quartic(a, b, beta))
    torch.testing.assert_close(value, quartic_value(a, b, torch.tensor(beta)), **EXACT)


def tilted(*parameters):
    """An energy whose mode moves with all of its parameters."""
    a, b, c, beta = parameters
    energy = lambda x: 0.5 * a * x**2 + 0.25 * b * x**4 - c * x
    d = ebm.GibbsBoltzmann(energy, dist.Normal(0.3, 3.0), beta)
    return Laplace().log_z(d)


@pytest.mark.parametrize("beta", BETAS)
def test_the_gradient_is_that_of_the_value_as_the_mode_moves(beta):
    at = [torch.tensor(v, requires_grad=True) for v in (0.7, 0.4, 1.3, beta)]
    got = torch.autograd.grad(tilted(*at), at)
    for i, slope in enumerate(got):
        step = [1e-5 * (i == j) for j in range(len(at))]
        up, down = (
            tilted(*(p.detach() + sign * s for p, s in zip(at, step, strict=True)))
            for sign in (1, -1)
        )
        torch.testing.assert_close(slope, (up - down) / 2e-5, rtol=1e-6, atol=1e-8)


def test_a_mode_that_does_not_move_in_derivatives_is_seen():
    """The planted fault of the test above: only what is explicit in the parameters."""
    at = [torch.tensor(v, requires_grad=True) for v in (0.7, 0.4, 1.3)]
    a, b, c = at
    right = torch.autograd.grad(tilted(*at, 1.0), at)
    x = torch.tensor(0.0)
    for _ in range(50):
        grad = a * x + b * x**3 - c + (x - 0.3) / 9
        x = (x - grad / (a + 3 * b * x**2 + 1 / 9)).detach()
    wrong = torch.autograd.grad(-(a * x**2 / 2 + b * x**4 / 4 - c * x), at)
    curved = torch.autograd.grad(-0.5 * (a + 3 * b * x**2 + 1 / 9).log(), [a, b])
    fixed = [wrong[0] + curved[0], wrong[1] + curved[1], wrong[2]]
    assert max(abs(r - f) for r, f in zip(right, fixed, strict=True)) > 0.05


ODD = {
    "quartic": lambda beta: quartic(torch.tensor(0.7), torch.tensor(0.4), beta),
    "two wells": lambda beta: ebm.GibbsBoltzmann(lambda x: 2 * (x**2 - 1) ** 2, ebm.Flat(), beta),
    "Gamma": lambda beta: ebm.GibbsBoltzmann(
        lambda x: x - 1.5 * x.log(), ebm.Flat((), constraints.positive), beta
    ),
    "Dirichlet": lambda beta: ebm.GibbsBoltzmann(
        lambda x: -(2 * x.log()).sum(-1), ebm.Flat((3,), constraints.simplex), beta
    ),
    "a banana": lambda beta: ebm.GibbsBoltzmann(
        lambda x: x[..., 0] ** 2 + (x[..., 1] - 0.5 * x[..., 0] ** 2) ** 2, ebm.Flat((2,)), beta
    ),
    "heavy tails": lambda beta: ebm.GibbsBoltzmann(
        lambda x: 4.0 * (1 + x.square().sum(-1)).log(),
        dist.Normal(torch.zeros(2), 5.0).to_event(1),
        beta,
    ),
}


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("make", ODD.values(), ids=ODD)
def test_it_is_within_its_own_error_in_nearly_all_seeds_or_says_so(make, beta):
    d, method = make(beta), Laplace()
    truth = log_partition(d, Quadrature(tolerance=1e-4)).value
    far = 0
    for seed in range(20):
        torch.manual_seed(seed)
        with warnings.catch_warnings(record=True) as said:  # that it cannot be trusted
            warnings.simplefilter("always")
            value, std_error, _ = log_partition(d, method)
        far += int(not said and bool((value - truth).abs() > 3 * std_error))
    # At most .0027 by chance; two in 20 is p < .002, over 18 cases p < .03, and seeds are fixed.
    assert far < 2


def test_particles_stand_for_the_density():
    d = ODD["Gamma"](1.0)
    x, log_weight = Laplace(20_000).weighted(d)
    assert d.support.check(x).all()
    share = torch.softmax(log_weight, 0)
    assert abs(log_weight.logsumexp(0) - math.lgamma(2.5)) < 0.03
    assert abs((share * x).sum() - 2.5) < 0.1  # five standard errors of 2e4 particles: .07


@pytest.mark.parametrize("beta", BETAS)
def test_a_batch_of_conditionals_equals_them_one_by_one(beta):
    y = torch.linspace(-3.0, 3.0, 6).reshape(3, 2)
    energy = lambda y, z: 0.5 * (y - z) ** 2 + 0.1 * z**4
    base = dist.Normal(0.0, 2.0)
    many = Laplace().log_z(ebm.GibbsBoltzmann(ebm.Given(energy, y, ...), base, beta))
    assert many.shape == (3, 2)
    for i, one in enumerate(y.flatten()):
        alone = Laplace().log_z(ebm.GibbsBoltzmann(ebm.Given(energy, one, ...), base, beta))
        torch.testing.assert_close(many.flatten()[i], alone, **EXACT)


@given(shift=st.floats(-100, 100), move=st.floats(-100, 100), scale=st.floats(0.01, 100))
def test_shifts_moves_and_scales_of_an_energy_do_what_they_do_to_the_integral(shift, move, scale):
    plain = Laplace().log_z(quartic(torch.tensor(0.7), torch.tensor(0.4), 1.0))
    original = quartic(torch.tensor(0.7), torch.tensor(0.4), 1.0).energy
    d = ebm.GibbsBoltzmann(lambda x: original((x - move) / scale) + shift, ebm.Flat())
    value = Laplace().log_z(d)
    torch.testing.assert_close(value, plain + math.log(scale) - shift, rtol=1e-8, atol=1e-8)


def test_parts_that_know_nothing_of_each_other_add():
    parts = [quartic(torch.tensor(k), torch.tensor(0.4), 2.0) for k in (0.7, 2.0)]
    energy = lambda x: sum(p.energy(x[..., i]) for i, p in enumerate(parts))
    value = Laplace().log_z(ebm.GibbsBoltzmann(energy, ebm.Flat((2,)), 2.0))
    torch.testing.assert_close(value, sum(Laplace().log_z(p) for p in parts), **EXACT)


def test_nothing_is_drawn_for_the_value_and_no_graph_is_made_without_need():
    energy = Quadratic(3)
    d = ebm.GibbsBoltzmann(energy, ebm.Flat((3,)))
    state = torch.get_rng_state()
    value = Laplace().log_z(d)
    assert torch.equal(torch.get_rng_state(), state)
    assert value.requires_grad
    assert all(p.grad is None for p in energy.parameters())
    with torch.no_grad():
        assert torch.equal(Laplace().log_z(d), value)
    energy.requires_grad_(False)
    assert not Laplace().log_z(d).requires_grad


def test_single_precision_stays_and_is_right_to_its_digits():
    base = ebm.Flat((5,), dtype=torch.float32)
    d = ebm.GibbsBoltzmann(lambda x: 0.5 * (x - 2).square().sum(-1), base)
    value, std_error, _ = log_partition(d, Laplace())
    assert value.dtype == std_error.dtype == torch.float32
    assert abs(value - 2.5 * math.log(2 * math.pi)) < 1e-5  # a hundred roundings


REFUSED = {
    "a saddle": (lambda x: x[..., 0] ** 2 - x[..., 1] ** 2, (2,)),
    "a maximum": (lambda x: -(x**2), ()),
    "a flat direction": (lambda x: x[..., 0] ** 2, (2,)),
    "a flat minimum": (lambda x: x**4, ()),
    "a kink": (lambda x: x.abs(), ()),
    "a constant": (lambda x: 0.0 * x, ()),
}


@pytest.mark.parametrize(("energy", "shape"), REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_what_has_no_regular_mode_is_refused(energy, shape, dtype):
    d = ebm.GibbsBoltzmann(energy, ebm.Flat(shape, dtype=dtype))
    with pytest.raises(ValueError, match="Laplace needs a mode with a positive definite Hessian"):
        Laplace().log_z(d)


def test_a_second_estimate_that_fails_is_said():
    d = ebm.GibbsBoltzmann(lambda x: -(-(x**2)).exp(), ebm.Flat())  # a dent, no normaliser
    with pytest.warns(ebm.UnnormalizedWarning, match="around Laplace's modes cannot be trusted"):
        assert log_partition(d, Laplace()).std_error > 1


# Planted faults ----------------------------------------------------------------------------------


def test_a_missing_jacobian_is_seen(monkeypatch):
    """That of T(z) = exp(z) for a Gamma law with k = 3.5 moves the mode from 2.5 to 3.5."""
    d = ebm.GibbsBoltzmann(lambda x: x - 2.5 * x.log(), ebm.Flat((), constraints.positive))
    stirling = 3.5 * math.log(3.5) - 3.5 + 0.5 * math.log(2 * math.pi / 3.5)
    assert abs(Laplace().log_z(d) - stirling) < 1e-10
    without = lambda potential, transform, _: lambda z: potential(transform(z))
    monkeypatch.setattr("pyro_ebm._free.unconstrained", without)
    assert abs(Laplace().log_z(d) - stirling) > 0.1


def test_a_wrong_sign_of_the_determinant_is_seen(monkeypatch):
    energy, beta = Quadratic(4), torch.tensor(1.0)
    d = ebm.GibbsBoltzmann(energy, ebm.Flat((4,)), beta)
    right = laplace.hessian

    def inverted(potential, z):
        value, grad, hess = right(potential, z)
        return value, grad, torch.linalg.inv(hess)

    monkeypatch.setattr(laplace, "hessian", inverted)
    assert abs(Laplace().log_z(d) - energy.log_z(beta)) > 1


WRONG = {
    "one particle": (lambda: Laplace(1), "num_particles must be at least 2, got 1"),
    "finite": (
        lambda: Laplace().log_z(
            ebm.GibbsBoltzmann(lambda x: x.sum(-1), ebm.Flat((2,), constraints.boolean))
        ),
        "the support must be continuous",
    ),
}


@pytest.mark.parametrize(("wrong", "message"), WRONG.values(), ids=WRONG)
def test_a_wrong_argument_is_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        wrong()
