"""log Z: values, errors and gradients against closed forms and enumeration."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from pyro.optim import Adam
from torch import nn

import pyro_ebm as ebm
from pyro_ebm.kernels import mala, ula
from pyro_ebm.partition import (
    Annealed,
    Bridge,
    Contrastive,
    Exact,
    Importance,
    Quadrature,
    log_partition,
)
from pyro_ebm.partition.base import from_weights
from tests.common import EXACT, NUMERIC


class Quadratic(nn.Module):
    """An energy of vectors with a precision and a mean per component."""

    def __init__(self, dim, device):
        super().__init__()
        self.k = nn.Parameter(torch.linspace(0.5, 2.0, dim, device=device))
        self.m = nn.Parameter(torch.linspace(-1.0, 1.0, dim, device=device))

    def forward(self, x):
        return 0.5 * (self.k * (x - self.m).square()).sum(-1)

    def log_z(self, beta):
        return 0.5 * (2 * math.pi / (beta * self.k)).log().sum()

    def log_z_with_a_normal_base(self, beta, s):
        """log of the integral of N(x; 0, s^2) exp(-beta E(x))."""
        a = beta * self.k * s**2
        return (-0.5 * (1 + a).log() - 0.5 * beta * self.k * self.m**2 / (1 + a)).sum()


class Ising(nn.Module):
    """The energy of a 3 x 3 lattice of spins, as zeros and ones."""

    def __init__(self, device):
        super().__init__()
        self.coupling = nn.Parameter(torch.tensor(0.4, device=device))
        self.field = nn.Parameter(torch.linspace(-0.5, 0.5, 9, device=device).reshape(3, 3))

    def forward(self, x):
        s = 2 * x - 1
        pairs = (s[..., 1:, :] * s[..., :-1, :]).sum((-2, -1))
        pairs = pairs + (s[..., :, 1:] * s[..., :, :-1]).sum((-2, -1))
        return -self.coupling * pairs - (self.field * s).sum((-2, -1))


def spins(device):
    return ebm.Flat((3, 3), constraints.boolean, device=device)


def gradients(value, energy, beta):
    inputs = [beta, *energy.parameters()]
    return torch.autograd.grad(value, inputs, retain_graph=True, materialize_grads=True)


def assert_close(got, want, **tolerance):
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, **tolerance)


def test_exact_equals_the_enumeration_of_an_ising_model(device):
    energy, beta = Ising(device), torch.tensor(0.8, device=device, requires_grad=True)
    d = ebm.GibbsBoltzmann(energy, spins(device), beta)
    states = torch.cartesian_prod(*[torch.tensor([0.0, 1.0], device=device)] * 9)
    states = states.reshape(512, 3, 3)
    p = torch.softmax(-beta.detach() * energy(states).detach(), 0)
    truth = torch.logsumexp(-beta * energy(states), 0)
    mean = (p * energy(states)).sum()  # dlogZ/dbeta = -<E>, dlogZ/dtheta = -beta <dE/dtheta>
    value, std_error, ess = log_partition(d, Exact())
    torch.testing.assert_close(value, truth, **EXACT)
    assert std_error == 0
    assert ess == math.inf
    got = gradients(value, energy, beta)
    torch.testing.assert_close(got[0], -mean.detach(), **EXACT)
    by_hand = torch.autograd.grad(-beta.detach() * mean, list(energy.parameters()))
    assert_close(got[1:], by_hand, **EXACT)


@pytest.mark.parametrize("dim", [1, 2, 3])
def test_quadrature_equals_the_gaussian_integral(dim, device):
    energy, beta = Quadratic(dim, device), torch.tensor(1.3, device=device, requires_grad=True)
    d = ebm.GibbsBoltzmann(energy, ebm.Flat((dim,), device=device), beta)
    value, std_error, _ = log_partition(d, Quadrature(-9.0, 9.0, 90))
    truth = energy.log_z(beta)
    torch.testing.assert_close(value, truth, **NUMERIC)
    assert std_error < 0.01
    assert_close(gradients(value, energy, beta), gradients(truth, energy, beta), **NUMERIC)


def test_quadrature_keeps_the_base_and_the_batch(device):
    energy = Quadratic(2, device)
    beta = torch.tensor([0.5, 1.0, 4.0], device=device, requires_grad=True)
    base = dist.Normal(torch.zeros(2, device=device), 2.0).to_event(1)
    d = ebm.GibbsBoltzmann(energy, base, beta)
    value = log_partition(d, Quadrature([-12.0, -11.0], 12.0, 140)).value
    truth = torch.stack([energy.log_z_with_a_normal_base(b, 2.0) for b in beta])
    assert value.shape == (3,)
    torch.testing.assert_close(value, truth, **NUMERIC)
    expanded = log_partition(d.expand((5, 3)), Quadrature(-12.0, 12.0, 80))
    assert all(part.shape == (5, 3) for part in expanded)


def test_the_error_of_quadrature_tells_a_coarse_rule():
    d = ebm.GibbsBoltzmann(lambda x: 500 * x**2, ebm.Flat())
    coarse = log_partition(d, Quadrature(-10.0, 10.0, 20))
    truth = 0.5 * math.log(math.pi / 500)
    assert coarse.std_error > 0.3
    assert abs(coarse.value - truth) < 10 * coarse.std_error
    fine = log_partition(d, Quadrature(-1.0, 1.0, 400))
    assert fine.std_error < 1e-9
    torch.testing.assert_close(fine.value, torch.tensor(truth), **NUMERIC)


@pytest.mark.parametrize(
    ("low", "high", "support", "energy", "truth"),
    [
        (0.0, 60.0, constraints.positive, lambda x: x, 0.0),
        (-1.0, 3.0, constraints.interval(-1.0, 3.0), lambda x: 0 * x, math.log(4.0)),
        (0.0, 1.0, constraints.unit_interval, lambda x: -x.log(), math.log(0.5)),
    ],
)
def test_quadrature_covers_half_lines_and_intervals(low, high, support, energy, truth):
    d = ebm.GibbsBoltzmann(energy, ebm.Flat((), support))
    value = log_partition(d, Quadrature(low, high, 100)).value
    torch.testing.assert_close(value, torch.tensor(truth), **NUMERIC)


def test_importance_is_within_its_own_error_in_nearly_all_seeds(device):
    energy, beta = Quadratic(2, device), torch.tensor(1.0, device=device)
    base = dist.Normal(torch.zeros(2, device=device), 2.0).to_event(1)
    d = ebm.GibbsBoltzmann(energy, base, beta)
    truth = energy.log_z_with_a_normal_base(beta, 2.0).detach()
    errors = []
    for seed in range(100):
        torch.manual_seed(seed)
        value, std_error, ess = log_partition(d, Importance(num_particles=2000))
        assert 100 < ess < 2000
        errors.append((value.detach() - truth) / std_error)
    z = torch.stack(errors)
    # Standard normal by the central limit theorem: P(|z| > 3) = .0027; 5 in 100 is p < 1e-5.
    assert (z.abs() > 3).sum() < 5
    assert 0.7 < z.std() < 1.4


@pytest.mark.parametrize("proposal", [None, "normal", "wide"])
def test_the_gradient_of_importance_is_that_of_the_closed_form(proposal, device):
    energy, beta = Quadratic(2, device), torch.tensor(1.3, device=device, requires_grad=True)
    zero = torch.zeros(2, device=device)
    proposals = {"normal": dist.Normal(zero, 2.0), "wide": dist.StudentT(5.0, zero, 1.5)}
    q = proposals[proposal].to_event(1) if proposal else None
    base = dist.Normal(zero, 1.5).to_event(1)
    d = ebm.GibbsBoltzmann(energy, base, beta)
    value = log_partition(d, Importance(q, 200_000)).value
    truth = gradients(energy.log_z_with_a_normal_base(beta, 1.5), energy, beta)
    # A tenth of a per cent: five standard errors of 2e5 particles at these effective sizes.
    assert_close(gradients(value, energy, beta), truth, rtol=0.02, atol=0.01)


def test_importance_samples_finite_and_bounded_flat_bases_uniformly(device):
    d = ebm.GibbsBoltzmann(Ising(device), spins(device), 0.3)
    exact, estimate = log_partition(d, Exact()).value, log_partition(d, Importance(None, 20_000))
    assert abs(estimate.value - exact) < 5 * estimate.std_error
    box = ebm.Flat((), constraints.interval(0.0, 4.0), device=device)
    d = ebm.GibbsBoltzmann(lambda x: x, box)
    estimate = log_partition(d, Importance(None, 20_000))
    assert abs(estimate.value - math.log(1 - math.exp(-4.0))) < 5 * estimate.std_error


def test_particles_outside_the_support_weigh_nothing():
    d = ebm.GibbsBoltzmann(lambda x: x, ebm.Flat((), constraints.positive))
    estimate = log_partition(d, Importance(dist.Normal(0.0, 3.0), 50_000))
    assert abs(estimate.value) < 5 * estimate.std_error


def test_a_flat_proposal_is_uniform():
    d = ebm.GibbsBoltzmann(lambda x: x, ebm.Flat((), constraints.positive))
    estimate = log_partition(d, Importance(ebm.Flat((), constraints.interval(0.0, 40.0)), 50_000))
    assert abs(estimate.value) < 5 * estimate.std_error
    with pytest.raises(ValueError, match="proposal must be given.*got such a one"):
        log_partition(d, Importance(ebm.Flat((), constraints.positive)))


def test_a_flat_base_of_components_counts_its_volume():
    base = ebm.Flat((), constraints.interval(-6.0, 6.0)).expand([2]).to_event(1)
    d = ebm.GibbsBoltzmann(lambda x: 0.5 * x.square().sum(-1), base)
    estimate = Importance(num_particles=20_000)(d)
    assert abs(estimate.value - math.log(2 * math.pi)) < 5 * estimate.std_error


def test_a_proposal_must_be_normalised():
    d = ebm.GibbsBoltzmann(lambda x: 0.5 * x.square(), ebm.Flat())
    q = ebm.GibbsBoltzmann(lambda x: 0.4 * x.square(), ebm.Flat())
    with pytest.raises(ValueError, match="proposal must be normalised, got a distribution"):
        Importance(q)(d)
    flat = ebm.GibbsBoltzmann(lambda x: x.square().sum(-1), ebm.Flat((2,)))
    for method in (Importance, Annealed, Bridge):
        with pytest.raises(ValueError, match="proposal.* must be normalised"):
            method(proposal=q.expand([2]).to_event(1))(flat)
    estimate = Importance(q.normalized(Quadrature()))(d)
    assert abs(estimate.value - 0.5 * math.log(2 * math.pi)) < 5 * estimate.std_error


@pytest.mark.parametrize("of", ["flat", "energy"])
def test_a_guide_must_draw_from_normalised_distributions(of):
    flat = ebm.Flat((), constraints.interval(0.0, 2.0))
    q = {"flat": flat, "energy": ebm.GibbsBoltzmann(lambda x: x, flat)}[of]
    d = ebm.GibbsBoltzmann(lambda x: x, flat)
    with pytest.raises(ValueError, match=r"guide must draw from normalised .* at \['x'\]"):
        Importance(lambda: pyro.sample("x", q))(d)


def test_importance_on_an_infinite_volume_needs_a_proposal():
    with pytest.raises(ValueError, match="proposal must be given"):
        log_partition(ebm.GibbsBoltzmann(lambda x: x**2, ebm.Flat()), Importance())


def test_a_small_effective_sample_size_is_said():
    d = ebm.GibbsBoltzmann(lambda x: 1e6 * (x - 3) ** 2, dist.Normal(0.0, 1.0))
    with pytest.warns(ebm.UnnormalizedWarning, match="cannot be trusted: its effective sample"):
        log_partition(d, Importance(num_particles=100))


def test_common_random_numbers_make_log_z_a_function_and_leave_the_generator_alone():
    k = torch.tensor(1.0, requires_grad=True)
    d = ebm.GibbsBoltzmann(lambda x: k * x**2, dist.Normal(0.0, 1.0))
    method = Importance(num_particles=500, common_random_numbers=True)
    first = method.log_z(d)
    state = torch.get_rng_state()
    second = method.log_z(d)
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), state)
    fresh = Importance(num_particles=500)
    assert not torch.equal(fresh.log_z(d), fresh.log_z(d))


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_energies_that_no_density_has_are_named(bad):
    states = ebm.Flat((3,), constraints.boolean)
    d = ebm.GibbsBoltzmann(lambda x: torch.where(x.sum(-1) > 2, bad, x.sum(-1)), states)
    with pytest.raises(ValueError, match="must be a number above minus infinity, got log Z = "):
        log_partition(d, Exact())
    d = ebm.GibbsBoltzmann(lambda x: torch.where(x > 0.5, bad, x), ebm.Flat())
    with pytest.raises(ValueError, match="at points of Quadrature"):
        log_partition(d, Quadrature(-1.0, 1.0, 20))


def test_weights_give_the_mean_its_error_and_the_effective_sample_size():
    w = torch.tensor([[1.0, 2.0], [3.0, 2.0], [2.0, 2.0]])
    value, std_error, ess = from_weights(w.log())
    torch.testing.assert_close(value.exp(), torch.tensor([2.0, 2.0]), **EXACT)
    torch.testing.assert_close(ess, torch.tensor([36 / 14, 3.0]), **EXACT)
    relative = w[:, 0].std() / 3**0.5 / w[:, 0].mean()
    torch.testing.assert_close(std_error, torch.tensor([relative, 0.0]), rtol=1e-6, atol=1e-7)


# Contrastive ----------------------------------------------------------------------------------

NEGATIVES = {
    "weighted": lambda: Contrastive(num_chains=4000, num_steps=20),
    "restarted": lambda: Contrastive(num_chains=4000, num_steps=20, restart=0.05),
    "unweighted": lambda: Contrastive(num_chains=4000, num_steps=100, persistent=False),
    "ula": lambda: Contrastive(ula, 4000, 100, step_size=0.02),
    "from data": lambda: Contrastive(mala, 4000, 100, start="data"),
}


@pytest.mark.parametrize("make", NEGATIVES.values(), ids=NEGATIVES)
def test_the_gradient_of_negatives_is_that_of_the_closed_form(make, device):
    torch.manual_seed(0)
    energy, beta = Quadratic(2, device), torch.tensor(1.3, device=device, requires_grad=True)
    base = dist.Normal(torch.zeros(2, device=device), 2.0).to_event(1)
    d, method = ebm.GibbsBoltzmann(energy, base, beta), make()
    data = base.sample((100,))
    value = sum(method.log_z(d, data) for _ in range(10)) / 10
    truth = gradients(energy.log_z_with_a_normal_base(beta, 2.0), energy, beta)
    # Five standard errors of a mean over 4,000 chains, of which ten evaluations share much;
    # ULA's bias at this step is a hundredth.
    assert_close(gradients(value, energy, beta), truth, rtol=0.06, atol=0.04)


def test_the_comparison_sees_chains_that_have_not_moved(device):
    energy, beta = Quadratic(2, device), torch.tensor(1.3, device=device, requires_grad=True)
    base = dist.Normal(torch.zeros(2, device=device), 2.0).to_event(1)
    method = Contrastive(num_chains=4000, num_steps=1, persistent=False, step_size=1e-9)
    value = method.log_z(ebm.GibbsBoltzmann(energy, base, beta))
    truth = gradients(energy.log_z_with_a_normal_base(beta, 2.0), energy, beta)
    with pytest.raises(AssertionError):
        assert_close(gradients(value, energy, beta), truth, rtol=0.06, atol=0.04)


def test_weighted_chains_estimate_log_z_while_the_parameters_move(device):
    energy = Quadratic(2, device)
    base = dist.Normal(torch.zeros(2, device=device), 2.0).to_event(1)
    method = Contrastive(num_chains=20_000, num_steps=5)
    assert method.value == "estimated"
    for scale in torch.linspace(0.1, 3.0, 30):
        with torch.no_grad():
            energy.k.copy_(scale * torch.tensor([1.0, 2.0]))
        value = method.log_z(ebm.GibbsBoltzmann(energy, base))
        truth = energy.log_z_with_a_normal_base(1.0, 2.0)
        assert abs(value - truth) < 0.1  # resampled 2e4 chains: a few hundredths
    assert value.requires_grad


def test_without_weights_the_lag_of_the_chains_is_seen(device, monkeypatch):
    """The planted fault of the test above: weights that stay one."""
    energy = Quadratic(2, device)
    base = dist.Normal(torch.zeros(2, device=device), 2.0).to_event(1)
    method = Contrastive(num_chains=20_000, num_steps=5)
    monkeypatch.setattr(ebm.Negatives, "_reweigh", lambda self, chains, state: (chains, state))
    value = method.log_z(ebm.GibbsBoltzmann(energy, base))
    assert abs(value - energy.log_z_with_a_normal_base(1.0, 2.0)) > 0.3


def test_negatives_keep_to_the_support(device):
    base = ebm.Flat((3,), constraints.simplex, device=device)
    d = ebm.GibbsBoltzmann(lambda x: -(2 * x.log()).sum(-1), base)  # Dirichlet(3, 3, 3)
    method = Contrastive(num_chains=5000, num_steps=50)
    for _ in range(4):
        value = method.log_z(d)
    truth = 3 * math.lgamma(3.0) - math.lgamma(9.0)
    assert abs(value - truth) < 0.15
    x = method.moved.x[:, 0]
    assert d.support.check(x).all()
    expected = dist.Dirichlet(torch.full((3,), 3.0, device=device))
    assert (x.mean(0) - expected.mean).abs().max() < 0.02


def test_persistent_chains_go_on_and_advance_once_per_evaluation():
    d = ebm.GibbsBoltzmann(lambda x: x**2, dist.Normal(0.0, 1.0))
    method = Contrastive(num_chains=10, num_steps=7)
    assert method.chains is None
    method.log_z(d)
    first = method.chains
    assert (first.age == 7).all()
    method.log_z(d)
    assert method.chains.num_moves == 14
    assert (method.chains.position - first.position).abs().max() > 0


def test_chains_follow_the_batch_of_the_distribution():
    beta = torch.tensor([1.0, 2.0, 4.0])
    d = ebm.GibbsBoltzmann(lambda x: x**2, dist.Normal(0.0, 1.0), beta)
    method = Contrastive(num_chains=2000, num_steps=10)
    value = method.log_z(d)
    truth = -0.5 * (1 + 2 * beta).log()
    assert value.shape == (3,)
    assert (value - truth).abs().max() < 0.1
    assert method.log_z(ebm.GibbsBoltzmann(lambda x: x**2, dist.Normal(0.0, 1.0))).shape == ()


def test_a_number_that_is_no_log_z_is_said_to_be_none():
    d = ebm.GibbsBoltzmann(lambda x: x**2, ebm.Flat(), log_partition=Contrastive(num_chains=10))
    d.log_prob(torch.zeros(3))
    assert not d.is_normalized
    with pytest.warns(ebm.UnnormalizedWarning, match="not a log-likelihood"), torch.no_grad():
        d.log_prob(torch.zeros(3))
    with pytest.raises(ebm.UnnormalizedError, match="gives only its gradient"):
        log_partition(d, Contrastive(persistent=False))


def test_a_traced_model_would_freeze_the_chains():
    d = ebm.GibbsBoltzmann(lambda x: x**2, dist.Normal(0.0, 1.0), validate_args=False)
    with pytest.raises(NotImplementedError, match="which a traced model cannot repeat"):
        torch.func.vmap(lambda x: Contrastive(num_chains=4).log_z(d, x))(torch.zeros(2))


def test_minus_infinity_is_refused():
    low = ebm.GibbsBoltzmann(
        lambda x: torch.where(x > -9, -torch.inf, x), dist.Normal(0.0, 1.0), validate_args=False
    )
    with pytest.raises(ValueError, match="must not be minus infinity"):
        Contrastive(num_chains=4).log_z(low)


WRONG = {
    "no finite corner": (lambda: Quadrature(-math.inf, 1.0, 8), "must be finite"),
    "low above high": (lambda: Quadrature(1.0, 0.0, 8), "low must be below high"),
    "one point": (lambda: Quadrature(0.0, 1.0, 1), "num_points must be at least 2, got 1"),
    "one particle": (lambda: Importance(num_particles=1), "num_particles must be at least 2"),
    "no chain": (
        lambda: Contrastive(num_chains=0),
        "num_chains must be a whole number of at least 1, got 0",
    ),
    "no move": (
        lambda: Contrastive(num_steps=0),
        "num_steps must be a whole number of at least 1, got 0",
    ),
    "start": (lambda: Contrastive(start="noise"), "start must be 'base' or 'data'"),
    "restart": (lambda: Contrastive(restart=1.5), "restart must be between 0 and 1, got 1.5"),
    "step": (lambda: Contrastive(step_size=0.0), "step_size must be positive"),
    "step of ula": (lambda: Contrastive(ula), "step_size must be given for ula"),
    "four dimensions": (
        lambda: log_partition(
            ebm.GibbsBoltzmann(lambda x: x.sum(-1), ebm.Flat((4,))), Quadrature(-1.0, 1.0, 4)
        ),
        "one to three dimensions",
    ),
    "entries": (
        lambda: log_partition(
            ebm.GibbsBoltzmann(lambda x: x.sum(-1), ebm.Flat((3,))), Quadrature([-1.0] * 2, 1.0, 4)
        ),
        "have 3 entries",
    ),
    "outside the support": (
        lambda: log_partition(
            ebm.GibbsBoltzmann(lambda x: x, ebm.Flat((), constraints.positive)),
            Quadrature(-1.0, 1.0, 4),
        ),
        "must lie within the support",
    ),
    "not finite": (
        lambda: log_partition(ebm.GibbsBoltzmann(lambda x: x, ebm.Flat()), Exact()),
        "has inf states",
    ),
    "no data": (
        lambda: Contrastive(start="data").log_z(ebm.GibbsBoltzmann(lambda x: x, ebm.Flat())),
        "needs observed points",
    ),
}


@pytest.mark.parametrize(("wrong", "message"), WRONG.values(), ids=WRONG)
def test_a_wrong_argument_is_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        wrong()


ELBOS = [
    Trace_ELBO(),
    TraceGraph_ELBO(),
    TraceMeanField_ELBO(),
    TraceEnum_ELBO(strict_enumeration_warning=False),
]


@pytest.mark.slow
@pytest.mark.parametrize("elbo", ELBOS, ids=lambda elbo: type(elbo).__name__)
def test_stock_elbos_learn_by_contrastive_divergence(elbo, device):
    torch.manual_seed(0)
    x = 0.5 * torch.randn(400, device=device)
    mle = 1 / x.square().mean()
    method = Contrastive(num_chains=400, num_steps=5)

    def model():
        k = pyro.param("k", torch.tensor(1.0, device=device), constraint=constraints.positive)
        with pyro.plate("n", 400, subsample_size=100, device=device) as i:
            base = dist.Normal(torch.zeros((), device=device), 1e3)
            d = ebm.GibbsBoltzmann(lambda x: 0.5 * k * x**2, base, log_partition=method)
            pyro.sample("x", d, obs=x[i])

    svi = SVI(model, lambda: None, Adam({"lr": 0.03}), elbo)
    values = []
    for _ in range(500):
        svi.step()
        values.append(pyro.param("k").item())
    # The mean over the last 250 steps: minibatch and chain noise of about two per cent.
    assert abs(sum(values[-250:]) / 250 / mle.item() - 1) < 0.1


def learn_a_ring(steps, device):
    """Learn by SVI and compare the chains' log Z with the grid's on the way."""
    energy = ebm.zoo.MLPEnergy(2, (32, 32)).to(device)
    base = dist.Normal(torch.zeros(2, device=device), 2.0).to_event(1)
    method = Contrastive(num_chains=1000, num_steps=5)

    def model():
        pyro.module("energy", energy)
        angle = 2 * math.pi * torch.rand(200, device=device)
        x = 2 * torch.stack([angle.cos(), angle.sin()], -1) + 0.3 * torch.randn(
            200, 2, device=device
        )
        with pyro.plate("n", 200):
            d = ebm.GibbsBoltzmann(energy, base, log_partition=method)
            pyro.sample("x", d, obs=x)

    svi = SVI(model, lambda: None, Adam({"lr": 0.01}), Trace_ELBO())
    apart, shared = [], []
    for step in range(steps):
        svi.step()
        if step % 50 == 49:
            d = ebm.GibbsBoltzmann(energy, base)
            truth = log_partition(d, Quadrature(-7.0, 7.0, 90)).value.detach()
            estimate = log_partition(d, method)
            apart.append((estimate.value.detach() - truth) / estimate.std_error)
            weights = from_weights(method.chains.log_weight).value[0]
            shared.append((method.chains.offset[0] + weights - truth) / estimate.std_error)
    return torch.stack(apart), torch.stack(shared)


@pytest.mark.slow
def test_the_chains_track_log_z_while_a_network_learns(device):
    torch.manual_seed(0)
    apart, shared = learn_a_ring(500, device)
    assert apart.abs().max() < 5
    # The planted fault: chains that fed the gradient take what it pushed up for a fall of log Z.
    assert shared[-1] < -5
