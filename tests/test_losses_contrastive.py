"""Likelihood and contrast: gradients against closed forms and enumeration."""

import itertools
import math

import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from torch import nn

import pyro_ebm as ebm
from pyro_ebm.kernels import mala
from pyro_ebm.losses import contrastive as module
from pyro_ebm.losses import (
    contrastive_divergence,
    energy_l2,
    improved_contrastive_divergence,
    maximum_likelihood,
    nearest_neighbor_entropy,
    two_phase,
)
from pyro_ebm.partition import Exact, Quadrature
from tests.common import EXACT, FAR, NUMERIC


def bits():
    return ebm.Flat((3,), constraints.boolean)


def ising():
    return ebm.zoo.Ising(3, torch.randn(3, 3), torch.randn(3))


def states():
    return bits().enumerate_support()


def gradient(value, energy):
    return torch.autograd.grad(value, [*energy.parameters()])


def log_z(d, method):
    return ebm.log_partition(d, method).value


# Maximum likelihood ------------------------------------------------------------------------------


def test_the_likelihood_of_a_finite_law_is_that_of_its_table():
    energy, rows = ising(), torch.tensor([0, 3, 3, 7, 5])
    value = maximum_likelihood(
        energy, states()[rows], log_z(ebm.GibbsBoltzmann(energy, bits()), Exact())
    )
    table = -torch.log_softmax(-energy(states()), 0)[rows].mean()
    torch.testing.assert_close(value, table, **EXACT)
    torch.testing.assert_close(gradient(value, energy), gradient(table, energy), **EXACT)


def test_the_likelihood_of_a_gaussian_is_least_at_its_closed_form():
    x = torch.randn(50) * 1.7 + 0.3
    m = x.mean().requires_grad_()
    k = (1 / x.var(correction=0)).requires_grad_()
    energy = lambda x: 0.5 * k * (x - m) ** 2
    d = ebm.GibbsBoltzmann(energy, ebm.Flat())
    value = maximum_likelihood(energy, x, log_z(d, Quadrature()))
    truth = -dist.Normal(m, k**-0.5).log_prob(x).mean()
    torch.testing.assert_close(value, truth, **NUMERIC)
    slopes = torch.autograd.grad(value, [m, k])
    torch.testing.assert_close(slopes, (torch.zeros(()), torch.zeros(())), **NUMERIC)


def test_base_and_beta_enter_by_the_potential():
    k = torch.tensor(0.7, requires_grad=True)
    d = ebm.GibbsBoltzmann(lambda x: k * x**2, dist.Normal(0.5, 2.0), 1.5)
    x, z = torch.randn(9), log_z(d, Quadrature())
    scored = ebm.GibbsBoltzmann(d.energy, d.base, d.beta, log_partition=Quadrature())
    value, truth = maximum_likelihood(d.potential, x, z), -scored.log_prob(x).mean()
    torch.testing.assert_close(value, truth, **NUMERIC)
    slopes = [torch.autograd.grad(v, k)[0] for v in (value, truth)]
    torch.testing.assert_close(*slopes, **NUMERIC)


def test_a_conditional_energy_has_a_log_partition_per_point():
    table = torch.randn(6, 4, requires_grad=True)
    y = torch.tensor([0, 3, 1, 1, 2, 0])
    energy = ebm.Given(lambda y, i: table[i, y], torch.arange(6))
    d = ebm.GibbsBoltzmann(energy, ebm.Flat((), constraints.integer_interval(0, 3)))
    value = maximum_likelihood(energy, y, log_z(d, Exact()))
    torch.testing.assert_close(value, nn.functional.cross_entropy(-table, y), **EXACT)


def test_a_log_partition_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"log_partition must be a scalar or .* got \(3,\)"):
        maximum_likelihood(ising(), states(), torch.zeros(3))


def test_a_log_partition_may_be_a_number():
    got = maximum_likelihood(ising(), states(), 1.5)
    torch.testing.assert_close(got, ising()(states()).mean() + 1.5, **EXACT)


# Contrastive divergence --------------------------------------------------------------------------


def test_the_contrast_of_gaussians_is_the_difference_of_their_moments():
    k = torch.tensor(2.0, requires_grad=True)
    x, negatives = torch.randn(7, 2), 3.0 * torch.randn(9, 2)
    value = contrastive_divergence(lambda x: 0.5 * k * x.square().sum(-1), x, negatives)
    (slope,) = torch.autograd.grad(value, k)
    truth = 0.5 * (x.square().sum(-1).mean() - negatives.square().sum(-1).mean())
    torch.testing.assert_close(slope, truth, **EXACT)
    torch.testing.assert_close(value.detach(), 2.0 * truth, **EXACT)


def contrast_of_states(energy, log_weight):
    """The gradient of the contrast of three points with all states, and that of the likelihood."""
    x = states()[torch.tensor([0, 3, 7])]
    contrast = contrastive_divergence(energy, x, states(), log_weight=log_weight)
    likelihood = maximum_likelihood(energy, x, torch.logsumexp(-energy(states()), 0))
    return torch.cat([g.flatten() for g in gradient(contrast, energy)]), torch.cat(
        [g.flatten() for g in gradient(likelihood, energy)]
    )


def test_with_all_states_by_their_weights_the_gradient_is_that_of_the_likelihood():
    energy = ising()
    torch.testing.assert_close(*contrast_of_states(energy, 5.0 - energy(states())), **EXACT)


def test_equal_weights_are_seen_to_be_wrong():
    """The planted fault of the test above."""
    contrast, likelihood = contrast_of_states(ising(), None)
    assert (contrast - likelihood).abs().max() > 0.05


def test_a_negative_without_weight_is_left_out_also_behind_a_wall():
    wall = lambda x: torch.where(x > 0, x, math.inf)
    x, negatives = torch.ones(2), torch.tensor([-1.0, 2.0])
    log_weight = torch.tensor([-math.inf, 0.0])
    assert contrastive_divergence(wall, x, negatives, log_weight=log_weight) == -1.0
    assert contrastive_divergence(wall, x, negatives) == -math.inf


def test_weights_are_one_per_negative():
    with pytest.raises(ValueError, match=r"log_weight must have .* \(8,\), got \(3,\)"):
        contrastive_divergence(ising(), states(), states(), log_weight=torch.zeros(3))


def slope_at_the_truth(start, num_steps=5, n=20_000):
    """The gradient of CD-k in the precision of data from N(0, 1), in standard errors."""
    k = torch.tensor(1.0, requires_grad=True)
    energy = lambda x: 0.5 * k * x.square().sum(-1)
    x = torch.randn(n, 1)
    kernel = mala(energy, 0.2)
    state = kernel.init(start(x))
    for _ in range(num_steps):
        state, _ = kernel.step(state)
    (slope,) = torch.autograd.grad(contrastive_divergence(energy, x, state.position), k)
    return abs(slope) * n**0.5  # each of the two means of x^2 / 2 has a standard error of .7


def test_contrast_with_chains_from_the_data_is_at_rest_at_the_truth():
    assert slope_at_the_truth(lambda x: x) < FAR


def test_contrast_with_short_chains_from_noise_is_not():
    """What others call CD-k; the planted fault of the test above."""
    assert slope_at_the_truth(lambda x: 4.0 * torch.randn_like(x)) > 20 * FAR


# The regulariser ---------------------------------------------------------------------------------


def learned_precision(weight, d=200):
    """The precision that data from N(0, I) teach, with exact negatives and regularised energies.

    All points have the two moments of the law that count: half of them each on two shells.
    """
    a, b = d + (2.0 * d) ** 0.5, d - (2.0 * d) ** 0.5  # of squared length; mean d, square d^2 + 2d
    x = torch.zeros(2, d)
    x[:, 0] = torch.tensor([a, b]).sqrt()
    low, high = torch.tensor(0.1), torch.tensor(3.0)
    for _ in range(60):
        k = (0.5 * (low + high)).requires_grad_()
        energy = lambda x, k=k: 0.5 * k * x.square().sum(-1)
        negatives = x * k**-0.5
        loss = contrastive_divergence(energy, x, negatives)
        loss = loss + weight * energy_l2(energy, x, negatives)
        (slope,) = torch.autograd.grad(loss, k)
        low, high = (low, k.detach()) if slope > 0 else (k.detach(), high)
    return low


def test_a_precision_is_learned_right_and_a_regularised_energy_wrong():
    torch.testing.assert_close(learned_precision(0.0), torch.tensor(1.0), **NUMERIC)
    # 100 (1 - 1/k) + 20.2 (k + 1/k) = 0 at torchebm's default weight, where it gives .705.
    biased = (-100 + (100**2 + 4 * 20.2 * 79.8) ** 0.5) / 40.4
    torch.testing.assert_close(learned_precision(1e-3), torch.tensor(biased), **NUMERIC)
    assert biased < 0.71


# Improved contrastive divergence -----------------------------------------------------------------

K, START, STEP = 1.0, 2.0, 0.3  # the precision, the data's standard deviation, the step


def moves(energy, k, num_steps):
    """All Langevin paths from two points by two noises a step, with the moments of normal laws.

    Returns points and the entropy of the normal law of their variance, with their graphs.
    """
    design = torch.tensor([*itertools.product([-1.0, 1.0], repeat=1 + num_steps)])
    x = START * design[:, :1].clone()
    for noise in design[:, 1:].unbind(1):
        x = x.requires_grad_()
        (slope,) = torch.autograd.grad(energy(x).sum(), x, create_graph=True)
        x = x - STEP * slope + (2 * STEP) ** 0.5 * noise[:, None]
    return x, 0.5 * (2 * math.pi * math.e * x.square().mean()).log()


def law_after(k, num_steps):
    """The normal law after the moves, in closed form."""
    variance = torch.tensor(START**2)
    for _ in range(num_steps):
        variance = (1 - STEP * k) ** 2 * variance + 2 * STEP
    return dist.Normal(0.0, variance.sqrt())


def divergence(q, k):
    return torch.distributions.kl_divergence(q, dist.Normal(0.0, k**-0.5))


def slopes(num_steps, weight):
    """The gradient of improved CD-k in the precision, and that of plain CD-k."""
    k = torch.tensor(K, requires_grad=True)
    energy = lambda x: 0.5 * k * x.square().sum(-1)
    x = START * torch.tensor([[-1.0], [1.0]])
    negatives, entropy = moves(energy, k, num_steps)
    value = improved_contrastive_divergence(energy, x, negatives, entropy, weight=weight)
    plain = contrastive_divergence(energy, x, negatives)
    return [torch.autograd.grad(v, k, retain_graph=True)[0] for v in (value, plain)]


def closed_form(num_steps, weight):
    k, fixed = (torch.tensor(K, requires_grad=True) for _ in range(2))
    data = dist.Normal(0.0, START)
    if weight == -1.0:  # Hinton's objective, all of it
        value = divergence(data, k) - divergence(law_after(k, num_steps), k)
    else:  # contrast with a fixed law, and the divergence of the sampler from a fixed model
        still = law_after(k.detach(), num_steps)
        value = divergence(data, k) - divergence(still, k)
        value = value + weight * divergence(law_after(k, num_steps), fixed)
    return torch.autograd.grad(value, k)[0]


@pytest.mark.parametrize("weight", [-1.0, 1.0, 0.3])
@pytest.mark.parametrize("num_steps", [1, 3])
def test_the_gradient_through_the_sampler_is_that_of_its_divergence(num_steps, weight):
    improved, plain = slopes(num_steps, weight)
    truth = closed_form(num_steps, weight)
    torch.testing.assert_close(improved, truth, **EXACT)
    assert (plain - truth).abs() > 0.05 * truth.abs()


def test_parameters_that_are_not_stopped_are_seen(monkeypatch):
    """A planted fault of the test above, and the entropy left out another."""
    truth = closed_form(1, 1.0)
    monkeypatch.setattr(module, "free_energy_of", lambda e, x, entropy: e(x).mean() - entropy)
    assert (slopes(1, 1.0)[0] - truth).abs() > 0.01
    monkeypatch.undo()
    right = module.free_energy_of
    monkeypatch.setattr(module, "free_energy_of", lambda e, x, _: right(e, x, torch.zeros(())))
    assert (slopes(1, 1.0)[0] - truth).abs() > 0.01


def test_negatives_without_a_graph_are_refused():
    with pytest.raises(ValueError, match="negatives must carry the graph"):
        improved_contrastive_divergence(ising(), states(), states(), torch.zeros(()))


def test_an_entropy_per_draw_is_refused():
    negatives = states().requires_grad_()
    with pytest.raises(ValueError, match=r"entropy must be a scalar, got the shape \(16,\)"):
        improved_contrastive_divergence(ising(), states(), negatives, torch.zeros(16))


# The entropy of draws ----------------------------------------------------------------------------


@pytest.mark.parametrize("num_neighbors", [1, 4])
@pytest.mark.parametrize("dim", [1, 2, 4])
def test_the_entropy_of_normal_draws_is_that_of_the_law(dim, num_neighbors):
    scale = torch.linspace(0.5, 2.0, dim)
    law = dist.Normal(torch.zeros(dim), scale).to_event(1)
    got = torch.stack(
        [nearest_neighbor_entropy(law.sample((500,)), num_neighbors) for _ in range(20)]
    )
    error = got.std() / 20**0.5
    # The bias goes with the square of the distance to a neighbour, (k / n)^(2 / d).
    bias = 0.5 * dim * (num_neighbors / 500) ** (2 / dim)
    assert abs(got.mean() - law.entropy()) < FAR * error + bias
    assert FAR * error + bias < 0.3  # squared distances, or no volume, are farther off


def test_the_entropy_follows_a_scale_exactly():
    x, scale = torch.randn(60, 2, 3), torch.tensor(1.7, requires_grad=True)
    plain, scaled = (nearest_neighbor_entropy(s * x, 2) for s in (1.0, scale))
    torch.testing.assert_close(scaled, plain + 6 * scale.log(), **EXACT)
    (slope,) = torch.autograd.grad(scaled, scale)
    torch.testing.assert_close(slope, 6 / scale.detach(), **EXACT)


def test_the_entropy_of_three_points_by_hand():
    """Distances 1, 1 and 2 on a line, balls of length 2, and 1 + 1/2 for psi(3) - psi(1)."""
    got = nearest_neighbor_entropy(torch.tensor([0.0, 1.0, 3.0]))
    torch.testing.assert_close(got, torch.tensor(math.log(2) / 3 + math.log(2) + 1.5), **EXACT)


def test_the_entropy_of_equal_draws_is_minus_infinity_and_of_nan_is_nan():
    assert nearest_neighbor_entropy(torch.zeros(4, 2)) == -math.inf
    assert nearest_neighbor_entropy(torch.tensor([0.0, 1.0, math.nan])).isnan()


@pytest.mark.parametrize("num_neighbors", [0, 4])
def test_there_must_be_that_many_neighbours(num_neighbors):
    with pytest.raises(ValueError, match=f"from 1 to the other 3 draws, got {num_neighbors}"):
        nearest_neighbor_entropy(torch.randn(4, 2), num_neighbors)
    with pytest.raises(ValueError, match=r"points must not be empty, got the shape \(4, 0\)"):
        nearest_neighbor_entropy(torch.randn(4, 0))
    with pytest.raises(ValueError, match="from 1 to the other 0 draws, got 1"):
        nearest_neighbor_entropy(torch.tensor(1.0))


def test_the_entropy_of_draws_serves_the_gradient_through_the_sampler():
    """As above, with normal draws and neighbours instead of closed forms."""
    k, n = torch.tensor(K, requires_grad=True), 1000
    energy = lambda x: 0.5 * k * x.square().sum(-1)
    found = []
    for _ in range(20):
        x = START * torch.randn(n, 2)
        negatives = (1 - STEP * k) * x + (2 * STEP) ** 0.5 * torch.randn(n, 2)
        entropy = nearest_neighbor_entropy(negatives, 20)
        value = improved_contrastive_divergence(energy, x, negatives, entropy)
        found.append(torch.autograd.grad(value, k)[0])
    found = torch.stack(found)
    mean, error = found.mean(), found.std() / 20**0.5
    truth = 2 * closed_form(1, 1.0)
    assert abs(mean - truth) < FAR * error
    assert FAR * error < 0.3 * abs(2 * slopes(1, 1.0)[1] - truth)  # plain contrast is farther off


# Two phases --------------------------------------------------------------------------------------


def test_an_rbm_learns_the_same_by_its_free_energy_and_by_two_phases():
    """Its energy is linear in the hidden units, so their means stand for all their states."""
    rbm = ebm.zoo.RBM(4, 3, scale=1.0)
    v, negatives = (torch.randint(0, 2, (n, 4)).to(torch.get_default_dtype()) for n in (5, 6))
    h, h_negatives = rbm.hidden_logits(v).sigmoid(), rbm.hidden_logits(negatives).sigmoid()
    phases = two_phase(rbm, v, h, negatives, h_negatives)
    free = contrastive_divergence(rbm, v, negatives)
    torch.testing.assert_close(gradient(phases, rbm), gradient(free, rbm), **EXACT)


class Joint(nn.Module):
    """An energy of three bits and a latent of four values, not linear in either."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, x, z):
        batch = torch.broadcast_shapes(x.shape[:-1], z.shape)
        z = z.to(x.dtype).unsqueeze(-1).expand(*batch, 1)
        return 5.0 * self.net(torch.cat([x.expand(*batch, 3), z], -1)).squeeze(-1)


LATENT = ebm.Flat((), constraints.integer_interval(0, 3))
PAIRS = torch.cartesian_prod(torch.arange(8), torch.arange(4))


def phases(energy, x, clamped):
    """The gradient of two phases with all states, those of the latent by the weights given."""
    z = torch.arange(4)[:, None].expand(4, len(x))
    negatives, z_negatives = states()[PAIRS[:, 0]], PAIRS[:, 1]
    weight = -energy(negatives, z_negatives)
    z_log_weight = -energy(x, z) if clamped else None
    value = two_phase(
        energy, x, z, negatives, z_negatives, z_log_weight=z_log_weight, log_weight=weight
    )
    return gradient(value, energy)


def test_two_phases_give_the_gradient_of_the_free_energy():
    energy, x = Joint(), states()[torch.tensor([1, 6, 6])]
    free = ebm.FreeEnergy(energy, LATENT)
    value = maximum_likelihood(free, x, log_z(ebm.GibbsBoltzmann(free, bits()), Exact()))
    truth = gradient(value, energy)
    torch.testing.assert_close(phases(energy, x, True), truth, **EXACT)
    far = max((a - b).abs().max() for a, b in zip(phases(energy, x, False), truth, strict=True))
    assert far > 0.05  # the planted fault: latents of no posterior


def test_two_phases_by_draws_of_the_posterior():
    energy, x = Joint(), states()[torch.tensor([1, 6, 6])]
    posterior = dist.Categorical(logits=-energy(x.unsqueeze(1), torch.arange(4)))
    negatives, z_negatives = states()[PAIRS[:, 0]], PAIRS[:, 1]
    weight = -energy(negatives, z_negatives)
    found = []
    for _ in range(30):
        z = posterior.sample((100,))
        value = two_phase(energy, x, z, negatives, z_negatives, log_weight=weight)
        found.append(torch.cat([g.flatten() for g in gradient(value, energy)]))
    exact, found = torch.cat([g.flatten() for g in phases(energy, x, True)]), torch.stack(found)
    # The last bias cancels: all its draws are equal, up to rounding.
    assert ((found.mean(0) - exact).abs() < FAR * found.std(0) / 30**0.5 + 1e-12).all()


def test_weights_of_latents_are_one_per_energy():
    x = states()[:3]
    with pytest.raises(ValueError, match=r"log_weight must have .* \(4, 3\), got \(4,\)"):
        two_phase(
            Joint(), x, torch.arange(4)[:, None], x, torch.arange(3), z_log_weight=torch.zeros(4)
        )
