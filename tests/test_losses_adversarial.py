"""The adversarial generator: its gradient, the game with the energy, and the same by SVI."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from pyro.infer import SVI, Trace_ELBO
from torch import nn

import pyro_ebm as ebm
from pyro_ebm.losses import (
    adversarial_generator,
    contrastive_divergence,
    nearest_neighbor_entropy,
)
from pyro_ebm.partition import Variational
from tests.common import EXACT, FAR, NUMERIC

NOISE = [[-1.0], [1.0]]  # with the moments of normal draws, as far as a parabola sees


def generator(loc, scale):
    """Draws of a normal law and its entropy, with their graphs."""
    x = loc + scale * torch.tensor(NOISE)
    return x, 0.5 * math.log(2 * math.pi * math.e) + scale.log()


def parabola(k, m):
    return lambda x: 0.5 * k * (x - m).square().sum(-1)


def test_it_is_the_divergence_from_the_model_less_log_z():
    loc, scale = torch.tensor(0.6, requires_grad=True), torch.tensor(1.4, requires_grad=True)
    value = adversarial_generator(parabola(2.0, 1.0), *generator(loc, scale))
    q, p = torch.distributions.Normal(loc, scale), torch.distributions.Normal(1.0, 0.5**0.5)
    truth = torch.distributions.kl_divergence(q, p) - 0.5 * math.log(2 * math.pi / 2.0)
    torch.testing.assert_close(value, truth, **EXACT)
    slopes = [torch.autograd.grad(v, [loc, scale]) for v in (value, truth)]
    torch.testing.assert_close(*slopes, **EXACT)


def test_no_gradient_goes_into_the_energy_whatever_it_closes_over():
    k, m = torch.tensor(2.0, requires_grad=True), torch.tensor(1.0, requires_grad=True)
    loc, scale = torch.tensor(0.6, requires_grad=True), torch.tensor(1.4, requires_grad=True)
    adversarial_generator(parabola(k, m), *generator(loc, scale)).backward()
    assert k.grad is None
    assert m.grad is None
    assert loc.grad != 0


def test_an_entropy_by_the_density_has_the_same_gradient_in_the_mean():
    theta, found = torch.tensor([0.6, 1.4], requires_grad=True), []
    truth = adversarial_generator(parabola(2.0, 1.0), *generator(*theta))
    (truth,) = torch.autograd.grad(truth, theta)
    for _ in range(100):
        q = dist.Normal(*theta).expand((1,)).to_event(1)
        x = q.rsample((100,))
        value = adversarial_generator(parabola(2.0, 1.0), x, -q.log_prob(x).mean())
        found.append(torch.autograd.grad(value, theta)[0])
    found = torch.stack(found)
    error = found.std(0) / 10
    assert ((found.mean(0) - truth).abs() < FAR * error).all()
    assert (FAR * error < 0.5 * truth.abs()).all()


def test_a_generator_without_a_density_takes_the_entropy_of_its_draws():
    """Its entropy follows the logarithm of the volume that the map takes a unit of noise to."""
    weight = torch.tensor([[1.0, 0.5], [-0.3, 2.0]], requires_grad=True)
    scale = torch.tensor(1.3, requires_grad=True)
    x = scale * (torch.randn(200, 2) @ weight.T)
    value = adversarial_generator(parabola(1.0, 0.0), x, nearest_neighbor_entropy(x))
    (slope,) = torch.autograd.grad(value, scale)
    truth = x.detach().square().sum(-1).mean() / scale - 2 / scale
    torch.testing.assert_close(slope, truth.detach(), **EXACT)


def played(entropy_counts=True, rate=0.2, num_steps=400):
    """The game of an energy k (x - m)^2 / 2 against a normal generator, on data by their moments.

    Returns k, m and the generator's loc and scale.
    """
    data = 0.5 + 0.7 * torch.tensor(NOISE)
    log_k, m, loc, log_scale = (torch.zeros((), requires_grad=True) for _ in range(4))
    for _ in range(num_steps):
        energy = parabola(log_k.exp(), m)
        negatives, entropy = generator(loc, log_scale.exp())
        lower = contrastive_divergence(energy, data, negatives)
        higher = adversarial_generator(energy, negatives, entropy_counts * entropy)
        slopes = torch.autograd.grad(lower, [log_k, m])
        slopes += torch.autograd.grad(higher, [loc, log_scale])
        with torch.no_grad():
            for theta, slope in zip([log_k, m, loc, log_scale], slopes, strict=True):
                theta.sub_(rate * slope)
    return torch.stack([log_k.exp(), m, loc, log_scale.exp()]).detach()


def test_the_game_ends_at_the_likeliest_energy_and_its_law():
    torch.testing.assert_close(played(), torch.tensor([1 / 0.49, 0.5, 0.5, 0.7]), **NUMERIC)


def test_without_the_entropy_the_generator_shrinks_and_the_energy_becomes_flat():
    """The planted fault of the test above."""
    k, _, _, scale = played(False)
    assert scale < 0.5 * 0.7
    assert k < 0.1 / 0.49


# As SVI in both directions -----------------------------------------------------------------------


class Bowl(nn.Module):
    def __init__(self):
        super().__init__()
        self.log_k = nn.Parameter(torch.tensor(0.3))
        self.m = nn.Parameter(torch.tensor(-0.2))

    def forward(self, x):
        return 0.5 * self.log_k.exp() * (x - self.m).square()


class Replayed(dist.Normal):
    """A normal law whose draws are the same every time, so that two ways can be compared."""

    def rsample(self, sample_shape=torch.Size()):
        shape = self._extended_shape(sample_shape)
        return self.loc + self.scale * torch.linspace(-1.0, 1.3, shape.numel()).reshape(shape)


def guide():
    loc = pyro.param("loc", torch.tensor(0.6))
    scale = pyro.param("scale", torch.tensor(1.1), constraint=constraints.positive)
    pyro.sample("x", Replayed(loc, scale))


def by_svi(base, data, num_rounds, rate):
    """Alternate stock SVI of the energy with the fit of the guide; return all parameters."""
    energy, bound = Bowl(), Variational(guide)
    guide()

    def model():
        pyro.module("energy", energy)
        with pyro.plate("n", len(data)):
            pyro.sample("x", ebm.GibbsBoltzmann(energy, base, log_partition=bound), obs=data)

    svi = SVI(model, lambda: None, pyro.optim.SGD({"lr": rate / len(data)}), Trace_ELBO())
    slow = pyro.optim.SGD({"lr": rate})
    for _ in range(num_rounds):
        svi.step()
        bound.fit(ebm.GibbsBoltzmann(energy, base), 1, slow)
    store = pyro.get_param_store()
    return torch.stack([energy.log_k, energy.m, store["loc"], store["scale"].log()]).detach()


def by_losses(base, data, num_rounds, rate):
    """The same by the two losses, with the same draws."""
    energy = Bowl()
    d = ebm.GibbsBoltzmann(energy, base)
    loc, log_scale = torch.tensor(0.6), torch.tensor(1.1).log()
    for _ in range(num_rounds):
        loc.requires_grad_(), log_scale.requires_grad_()
        q = Replayed(loc, log_scale.exp())
        # The bound of the site averages 64 draws, the fit has one for its step.
        lower = contrastive_divergence(d.potential, data, q.rsample((64,)))
        slopes = torch.autograd.grad(lower, [energy.log_k, energy.m])
        with torch.no_grad():
            for theta, slope in zip([energy.log_k, energy.m], slopes, strict=True):
                theta.sub_(rate * slope)
        x = q.rsample()
        higher = adversarial_generator(d.potential, x, -q.log_prob(x))
        slopes = torch.autograd.grad(higher, [loc, log_scale])
        loc, log_scale = (
            (t - rate * s).detach() for t, s in zip([loc, log_scale], slopes, strict=True)
        )
    return torch.stack([energy.log_k, energy.m, loc, log_scale]).detach()


BASES = {"flat": lambda: ebm.Flat(), "normal": lambda: dist.Normal(0.0, 2.0)}


@pytest.mark.parametrize("base", BASES.values(), ids=BASES)
def test_stock_svi_in_both_directions_is_the_game_of_the_losses(base):
    data, start = 0.5 + 0.7 * torch.randn(20), torch.tensor([0.3, -0.2, 0.6, math.log(1.1)])
    results = [way(base(), data, 5, 0.05) for way in (by_svi, by_losses)]
    torch.testing.assert_close(*results, **EXACT)
    assert (results[0] - start).abs().min() > 1e-3
