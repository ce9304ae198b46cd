"""Contrast with noise: binary, ranking, of a noise that learns; energy discrepancy."""

import importlib
import itertools
import math

import pyro.distributions as dist
import pytest
import torch

import pyro_ebm as ebm
from pyro_ebm.losses import (
    energy_discrepancy,
    flow_contrastive,
    noise_contrastive,
    ranking_noise_contrastive,
)
from tests.common import EXACT, FAR, NUMERIC, gaussian, walled

# A law on three states, and noise, as lists in which each state stands in proportion: means over
# the lists are population means, without error.
DATA = torch.tensor([0] * 7 + [1] * 2 + [2])
NOISE = torch.tensor([0, 0, 1, 2])
P = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
TRUTH = 3.0 - P.log()  # energies of the law, whose log Z is then -3
OFF = torch.tensor([0.0, 0.3, -0.2], dtype=torch.float64)


def uneven():
    return dist.Categorical(torch.tensor([0.5, 0.25, 0.25]))


def slope(loss, at):
    """Return the gradient of the loss of a table of energies."""
    at = at.clone().requires_grad_()
    return torch.autograd.grad(loss(lambda x: at[x]), at)[0]


def tuples(states, k):
    """Return all k-tuples from a list, along the first dimension."""
    return torch.tensor([*itertools.product(states.tolist(), repeat=k)]).T


def ranking(k):
    """Return the population loss: every point of the data with every tuple of negatives."""
    negatives = tuples(NOISE, k)
    x, rows = DATA.repeat_interleave(negatives.shape[1]), negatives.repeat(1, len(DATA))
    return lambda energy: ranking_noise_contrastive(energy, x, rows, uneven())


def moves(of):
    """Return where a symmetric move may lead from a state: nowhere, or to another state."""
    return torch.tensor([of, of, *({0, 1, 2} - {of})])


def discrepancy(k, w):
    """Return the population loss: all paths x -> y -> k points, or the whole law of the points."""
    paths = [(x, y) for x in DATA.tolist() for y in moves(x).tolist()]
    listed = [moves(y)[:, None] if k is None else tuples(moves(y), k) for _, y in paths]
    x = torch.tensor([x for x, _ in paths]).repeat_interleave(listed[0].shape[1])
    return lambda energy: energy_discrepancy(energy, x, torch.cat(listed, 1), weight=w)


def binary(log_z=-3.0):
    return lambda energy: noise_contrastive(energy, DATA, NOISE.repeat(5), uneven(), log_z)


POPULATION = {
    "binary": binary(),
    "ranking, one": ranking(1),
    "ranking, three": ranking(3),
    "discrepancy, one": discrepancy(1, 1.0),
    "discrepancy, three": discrepancy(3, 1.0),
    "discrepancy, all": discrepancy(None, 0.0),
}


@pytest.mark.parametrize("loss", POPULATION.values(), ids=POPULATION)
def test_the_population_loss_is_least_at_the_truth(loss):
    torch.testing.assert_close(slope(loss, TRUTH), torch.zeros(3), **EXACT)
    assert slope(loss, TRUTH + OFF).norm() > 1e-3
    assert loss(lambda x: (TRUTH + OFF)[x]) > loss(lambda x: TRUTH[x])


def unshared(energy):
    """A fault: perturb the point for each negative, and not once for all."""
    x = DATA.repeat_interleave(16)
    twice = torch.cat([torch.cat([*map(moves, moves(i).tolist())]) for i in DATA.tolist()])
    return energy_discrepancy(
        energy, x, twice.reshape(-1, 16).T.repeat_interleave(16, 1), weight=0.0
    )


FAULTS = {
    "a wrong log Z": binary(-2.9),
    "draws of another law": lambda e: noise_contrastive(e, DATA, DATA, uneven(), -3.0),
    "ranking of draws of another law": lambda e: ranking_noise_contrastive(
        e, DATA, DATA[:, None], uneven()
    ),
    "few points without their own": discrepancy(2, 0.0),
    "no common point": unshared,
}


@pytest.mark.parametrize("loss", FAULTS.values(), ids=FAULTS)
def test_it_sees_what_is_not_least_at_the_truth(loss):
    assert slope(loss, TRUTH).abs().max() > 1e-3


def test_log_z_learns_the_true_one():
    log_z = torch.tensor(-3.0, requires_grad=True)
    binary(log_z)(lambda x: TRUTH[x]).backward()
    torch.testing.assert_close(log_z.grad, torch.zeros(()), **EXACT)


def test_it_is_the_log_loss_of_a_classifier():
    """Far out too, where a softplus with a threshold would round to 1e-9."""
    x, negatives = torch.randn(7, 2) * 5, torch.randn(21, 2) * 5
    noise = dist.Normal(torch.zeros(2), 5.0).to_event(1)
    model, other = (lambda z: (-gaussian(z) - 0.7).exp()), (lambda z: 3 * noise.log_prob(z).exp())
    of_data = -(model(x) / (model(x) + other(x))).log().mean()
    of_noise = -(other(negatives) / (model(negatives) + other(negatives))).log().mean()
    loss = noise_contrastive(gaussian, x, negatives, noise, 0.7)
    torch.testing.assert_close(loss, of_data + 3 * of_noise, **EXACT)


def test_ranking_is_the_log_loss_of_a_choice():
    x, negatives = torch.randn(7, 2), torch.randn(5, 7, 2)
    noise = dist.Normal(torch.zeros(2), 2.0).to_event(1)
    ratio = lambda z: (-gaussian(z) - noise.log_prob(z)).exp()
    want = -(ratio(x) / (ratio(x) + ratio(negatives).sum(0))).log().mean()
    loss = ranking_noise_contrastive(gaussian, x, negatives, noise)
    torch.testing.assert_close(loss, want, **EXACT)
    shared = ranking_noise_contrastive(gaussian, x, negatives[:, :1], noise)
    repeated = negatives[:, :1].expand_as(negatives)
    torch.testing.assert_close(
        shared, ranking_noise_contrastive(gaussian, x, repeated, noise), **EXACT
    )


def test_ranking_needs_no_log_z_of_a_conditional_energy():
    """What is added to the energies of one condition changes neither value nor gradient."""
    y, x = torch.tensor([0, 0, 1, 1]), torch.randn(4, 1)
    negatives = y.unsqueeze(-1) + torch.randn(6, 4, 1)
    noise = dist.Normal(y.unsqueeze(-1).to(x), 1.0).to_event(1)
    k = torch.tensor(0.5, requires_grad=True)

    def loss(shift):
        energy = lambda x, y: k * (x.squeeze(-1) - y).square() + shift[y]
        value = ranking_noise_contrastive(ebm.Given(energy, y), x, negatives, noise)
        return value, *torch.autograd.grad(value, k)

    far, none = loss(torch.tensor([5.0, -3.0])), loss(torch.zeros(2))
    torch.testing.assert_close(far, none, **EXACT)


def test_noise_gets_no_gradient():
    scale = torch.ones(2, requires_grad=True)
    noise = dist.Normal(torch.zeros(2), scale).to_event(1)
    x, negatives = torch.randn(5, 2), noise.rsample((5,))
    log_z = torch.zeros((), requires_grad=True)
    noise_contrastive(gaussian, x, negatives, noise, log_z).backward()
    assert log_z.grad is not None
    assert scale.grad is None
    assert not ranking_noise_contrastive(gaussian, x, negatives[:, None], noise).requires_grad


# Its error, against the theory ------------------------------------------------------------------


def asymptotic_covariance(nu):
    """Return T times the covariance of (precision, -log Z): N(0, 1) against N(0, 4)."""
    x = torch.linspace(-14.0, 14.0, 20_001)
    p, q = (dist.Normal(0.0, s).log_prob(x).exp() * (x[1] - x[0]) for s in (1.0, 2.0))
    score = torch.stack([-0.5 * x.square(), torch.ones_like(x)])
    weighted = score * (p * nu * q / (p + nu * q))
    inverse, mean = torch.linalg.inv(weighted @ score.T), weighted.sum(1, keepdim=True)
    return inverse - (1 + 1 / nu) * inverse @ mean @ mean.T @ inverse


def estimates(n, nu, replicates):
    """Return precision and -log Z by Newton steps, one row per replicate."""
    noise = dist.Normal(0.0, 2.0)
    x, negatives = torch.randn(replicates, n), noise.sample((replicates, nu * n))
    theta = torch.tensor([[1.0], [-0.5 * math.log(2 * math.pi)]]).repeat(1, replicates)

    def loss(theta):  # the mean over replicates, each with parameters of its own
        precision, minus_log_z = theta.unsqueeze(-1)
        energy = lambda x: 0.5 * precision * x.square()
        return noise_contrastive(energy, x, negatives, noise, -minus_log_z)

    for _ in range(5):
        theta = theta.detach().requires_grad_()
        (grad,) = torch.autograd.grad(loss(theta), theta, create_graph=True)
        rows = [torch.autograd.grad(g.sum(), theta, retain_graph=True)[0] for g in grad]
        theta = theta - torch.linalg.solve(torch.stack(rows).movedim(-1, 0), grad.T).T
    return theta.detach().T


@pytest.mark.slow
def test_its_error_is_that_of_the_theory():
    want = asymptotic_covariance(5)
    torch.testing.assert_close(want.diagonal(), torch.tensor([2.236, 0.785]), rtol=0, atol=5e-4)
    n, found = 1000, estimates(1000, 5, 400)
    # The variance of 400 replicates is known to 7 %.
    torch.testing.assert_close(n * found.var(0), want.diagonal(), rtol=0.15, atol=0)
    truth = torch.tensor([1.0, -0.5 * math.log(2 * math.pi)])
    error = found - truth
    assert (error[:, 1].abs() < 3 * (want[1, 1] / n).sqrt()).double().mean() > 0.98  # of .997
    # A bias of the order 1 / n is a small part of the error of one replicate.
    assert (error.mean(0).abs() < 0.2 * (want.diagonal() / n).sqrt()).all()


# A noise that learns ----------------------------------------------------------------------------


def quantiles(law, n):
    """Return points in the middle of n parts of equal mass."""
    return law.icdf((torch.arange(n) + 0.5) / n)


def test_the_noise_learns_through_its_draws_too():
    """Against a quadrature of the loss, by differences in the parameters of the noise."""
    data, energy = dist.Normal(1.0, 0.5), (lambda x: 0.5 * (x - 0.5).square())
    log_z = torch.tensor(0.9, requires_grad=True)
    z = torch.linspace(-15.0, 15.0, 20_001)

    def value(loc, scale):
        q = dist.Normal(loc, scale).log_prob(z)
        ratio = -energy(z) - log_z - q - math.log(2)
        at_data = (data.log_prob(z).exp() * torch.nn.functional.logsigmoid(ratio)).sum()
        at_noise = (q.exp() * torch.nn.functional.logsigmoid(-ratio)).sum()
        return ((at_data + 2 * at_noise) * (z[1] - z[0])).detach()

    h, at = 1e-4, torch.tensor([0.2, 1.3])
    want = torch.stack(
        [(value(*(at + h * e)) - value(*(at - h * e))) / (2 * h) for e in torch.eye(2)]
    )

    def gradient(draws):
        theta = at.clone().requires_grad_()
        noise = dist.Normal(*theta)
        negatives = draws(noise)
        x = quantiles(data, 100_000)
        return torch.autograd.grad(flow_contrastive(energy, x, negatives, noise, log_z), theta)[0]

    right = gradient(lambda noise: quantiles(noise, 200_000))
    # The midpoints of 1e5 parts miss the tails, by about 1e-5.
    torch.testing.assert_close(right, want, rtol=1e-4, atol=1e-4)
    cut = gradient(lambda noise: quantiles(noise, 200_000).detach().requires_grad_())
    assert ((cut - want).abs() > 1e-2).all()


def test_a_noise_that_learns_leaves_the_energy_alone():
    k, log_z = torch.ones(2, requires_grad=True), torch.ones((), requires_grad=True)
    loc = torch.zeros(2, requires_grad=True)
    noise = dist.Normal(loc, 1.0).to_event(1)
    x, negatives, energy = torch.randn(5, 2), noise.rsample((6,)), (lambda x: (k * x**2).sum(-1))
    learn = flow_contrastive(energy, x, negatives, noise, log_z)
    contrast = noise_contrastive(energy, x, negatives, noise, log_z)
    torch.testing.assert_close(learn, -contrast, **EXACT)
    learn.backward()
    assert k.grad is None
    assert log_z.grad is None
    assert loc.grad is not None


@pytest.mark.slow
def test_energy_and_flow_learn_together():
    data = dist.MixtureSameFamily(
        dist.Categorical(torch.tensor([0.3, 0.7])), dist.Normal(torch.tensor([-2.0, 1.5]), 0.5)
    )
    flow = dist.transforms.Spline(1, count_bins=24, bound=5.0)
    base = dist.Normal(torch.zeros(1), 2.0).to_event(1)
    noise = dist.TransformedDistribution(base, [flow])
    net, log_z = ebm.zoo.MLPEnergy(1, (32, 32)), torch.nn.Parameter(torch.zeros(()))
    parameters = [*flow.parameters(), *net.parameters(), log_z]
    optimizer = torch.optim.Adam(parameters, 0.05)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, 300)
    for _ in range(300):
        x, negatives = data.sample((256, 1)), noise.rsample((256,))
        loss = noise_contrastive(net, x, negatives, noise, log_z)
        loss = loss + flow_contrastive(net, x, negatives, noise, log_z)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        flow.clear_cache()
    z = torch.linspace(-6.0, 6.0, 2001).unsqueeze(-1)
    truth = data.log_prob(z.squeeze(-1))
    with torch.no_grad():
        models = {"energy": -net(z) - log_z, "noise": noise.log_prob(z)}
    # Half the distance between densities, .48 at the start; 24 bins leave a few hundredths.
    far = {n: (m.exp() - truth.exp()).abs().sum() * 0.006 / 2 for n, m in models.items()}
    assert max(far.values()) < 0.1, far


# Energy discrepancy -----------------------------------------------------------------------------


def test_it_is_a_ranking_of_the_posterior_of_the_point():
    x, y, t = torch.randn(7, 2), torch.randn(7, 2), 0.3
    move = dist.Normal(y, math.sqrt(t)).to_event(1)
    perturbed = move.sample((5,))
    posterior = lambda z: gaussian(z) - move.log_prob(z)
    rank = ranking_noise_contrastive(posterior, x, perturbed, move)
    found = energy_discrepancy(gaussian, x, perturbed)
    torch.testing.assert_close(found, rank - math.log(5), **EXACT)


def test_of_a_gaussian_it_is_the_difference_of_energies_before_and_after_the_move():
    n, s2, t, k = 200, 1.7, 0.6, 0.8
    x, y = s2**0.5 * torch.randn(n, 1), None
    y = x + t**0.5 * torch.randn(n, 1)
    after = 0.5 * k * y.square().sum(-1) / (1 + k * t) + 0.5 * math.log(1 + k * t)
    want = (0.5 * k * x.square().sum(-1) - after).mean()
    values = torch.stack(
        [
            energy_discrepancy(
                lambda x: k * gaussian(x), x, y + t**0.5 * torch.randn(2000, n, 1), weight=0.0
            )
            for _ in range(30)
        ]
    )
    # The bias of a logarithm of a mean of 2000 is far below the spread of 30 such.
    assert (values.mean() - want).abs() < FAR * values.std() / math.sqrt(30)
    assert (values.mean() - want - 0.01).abs() > FAR * values.std() / math.sqrt(30)


@pytest.mark.slow
def test_it_learns_25_gaussians():
    benchmark = importlib.import_module("benchmarks.learning_noise")  # which imports this module
    row = benchmark.density_row("energy discrepancy, M = 4", 0.25, 600)
    assert row["mse of log p"] < 0.1  # as METHODS asks
    assert benchmark.density_row("energy discrepancy, M = 4, w = 0", 0.25, 60)["mse of log p"] > 1


def test_impossible_negatives_do_no_harm():
    k = torch.ones((), requires_grad=True)
    x, perturbed = torch.ones(3, 1), -torch.ones(4, 3, 1)
    loss = energy_discrepancy(lambda x: walled(x) + k * x[..., 0], x, perturbed)
    loss.backward()
    torch.testing.assert_close(loss, torch.tensor(-math.log(4)), **EXACT)
    assert k.grad == 0
    noise = dist.Normal(torch.zeros(1), 1.0).to_event(1)
    for contrast in (noise_contrastive, ranking_noise_contrastive):
        assert contrast(walled, x, perturbed[:, :1], noise).isfinite()


# What is refused --------------------------------------------------------------------------------

POINTS = (4, 2)
WIDE = dist.Normal(torch.zeros(2), 1.0)
NO_LOG_Z = ebm.GibbsBoltzmann(gaussian, WIDE.to_event(1))
REFUSED = {
    "normalised": lambda x: noise_contrastive(gaussian, x, x, NO_LOG_Z),
    "be normalised": lambda x: flow_contrastive(gaussian, x, x, NO_LOG_Z),
    "one number per point": lambda x: noise_contrastive(gaussian, x, x, WIDE),
    "by rsample": lambda x: flow_contrastive(gaussian, x, x, WIDE.to_event(1)),
    "dimension of their own": lambda x: ranking_noise_contrastive(gaussian, x, x, WIDE),
    "not empty": lambda x: energy_discrepancy(gaussian, x, x.new_ones(0, *POINTS)),
    "perturbed must": lambda x: energy_discrepancy(gaussian, x, x[:, None]),
    "weight must not": lambda x: energy_discrepancy(gaussian, x, x[None], weight=-1.0),
    "got Flat": lambda x: noise_contrastive(
        gaussian, x > 0, x > 0, ebm.Flat((2,), dist.constraints.boolean)
    ),
    r"log_partition must .* got the shape \(4, 1\)": lambda x: noise_contrastive(
        gaussian, x, x, WIDE.to_event(1), torch.zeros(4, 1)
    ),
    r"broadcast .* \(5,\), got the shape \(4,\)": lambda x: noise_contrastive(
        gaussian, x, torch.ones(5, 2), WIDE.to_event(1), torch.zeros(4)
    ),
}


@pytest.mark.parametrize("words", REFUSED)
def test_it_refuses(words):
    with pytest.raises(ValueError, match=words):
        REFUSED[words](torch.ones(POINTS))


def test_log_z_of_each_condition_is_learned():
    """A log Z per row, of two laws at once."""
    x, negatives = torch.randn(2, 50), 2 * torch.randn(2, 250)
    log_z = torch.zeros(2, 1, requires_grad=True)
    noise = dist.Normal(0.0, 2.0)
    energy = lambda x: 0.5 * x.square()
    both = noise_contrastive(energy, x, negatives, noise, log_z)
    each = [noise_contrastive(energy, x[i], negatives[i], noise, log_z[i]) for i in range(2)]
    torch.testing.assert_close(both, torch.stack(each).mean(), **NUMERIC)
