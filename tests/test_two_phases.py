"""Two phases by chains: free ones of (x, z) beside clamped ones of z given each x."""

import math

import pytest
import scipy.stats
import torch
from pyro.distributions import constraints
from torch import nn

import pyro_ebm as ebm
from pyro_ebm.kernels import gibbs, mala, mixed
from pyro_ebm.losses import maximum_likelihood, two_phase
from pyro_ebm.partition import Quadrature
from tests.common import FALSE_ALARM


class Clusters(nn.Module):
    """Two clusters on a line: a point x, and the cluster z that it belongs to."""

    def __init__(self):
        super().__init__()
        self.mean = nn.Parameter(torch.tensor([-1.0, 0.5]))
        self.tilt = nn.Parameter(torch.tensor(0.3))

    def forward(self, x, z):
        return 0.5 * (x[..., 0] - self.mean[z[..., 0]]).square() + self.tilt * z[..., 0]


def data():
    side = (torch.rand(200, 1) < 0.3).double()
    return torch.randn(200, 1) + 2.5 * (2 * side - 1)


LATENT = ebm.Flat((1,), constraints.integer_interval(0, 1))


def exact(energy, x):
    """The negative log-likelihood by the free energy and a quadrature."""
    free = ebm.FreeEnergy(energy, LATENT)
    d = ebm.GibbsBoltzmann(free, ebm.Flat((1,)))
    return maximum_likelihood(free, x, ebm.log_partition(d, Quadrature(-12.0, 12.0, 200)).value)


class Phases:
    """Both kinds of chains, which go on from step to step."""

    def __init__(self, energy, x, num=1000, clamped=True):
        self.energy, self.x = energy, x
        self.posterior = ebm.Negatives(ebm.FreeEnergy(energy, LATENT).posterior(x), num_steps=1)
        self.given = self.posterior.init(10)  # ten for each x
        parts = {
            "x": lambda u: mala(u, 0.8),
            "z": lambda u: gibbs(u, torch.arange(2), check=False),
        }
        self.kernel, self.clamped = mixed(energy, parts), clamped
        start = {"x": 2 * torch.randn(num, 1), "z": LATENT.sample((num,))}
        self.free = self.kernel.init(start)

    def loss(self, num_steps):
        if self.clamped:
            self.given, moved = self.posterior.step(self.given)
        for _ in range(num_steps):
            self.free, _ = self.kernel.step(self.free)
        z = moved.x if self.clamped else self.given.position
        return two_phase(self.energy, self.x, z, **self.negatives())

    def negatives(self):
        return {"negatives": self.free.position["x"], "z_negatives": self.free.position["z"]}


def gradients(value, energy):
    return torch.cat([g.flatten() for g in torch.autograd.grad(value, [*energy.parameters()])])


@pytest.mark.parametrize("fault", [None, "latents of the prior", "chains of few moves"])
def test_the_gradient_is_that_of_the_free_energy_on_average(fault):
    energy, x = Clusters(), data()
    truth = gradients(exact(energy, x), energy)
    num = 1 if fault == "chains of few moves" else 30
    found = torch.stack(
        [
            gradients(Phases(energy, x, clamped=fault != "latents of the prior").loss(num), energy)
            for _ in range(20)
        ]
    )
    t = (found.mean(0) - truth).abs() / (found.std(0) / math.sqrt(20))
    p_value = 2 * scipy.stats.t.sf(t.numpy(), 19).min()
    assert (p_value > FALSE_ALARM) == (fault is None)


def likeliest(energy, x):
    optimizer = torch.optim.LBFGS(energy.parameters(), max_iter=100)

    def closure():
        optimizer.zero_grad()
        loss = exact(energy, x)
        loss.backward()
        return loss

    optimizer.step(closure)
    return energy


@pytest.mark.slow
def test_learning_ends_at_the_maximum_of_the_likelihood():
    energy, x = Clusters(), data()
    phases = Phases(energy, x)
    optimizer = torch.optim.Adam(energy.parameters(), 0.05)
    tail = []
    for step in range(200):
        optimizer.zero_grad()
        phases.loss(3).backward()
        optimizer.step()
        if step >= 100:
            tail.append(nn.utils.parameters_to_vector(energy.parameters()).detach())
    best = likeliest(Clusters(), x)
    mean = torch.stack(tail).mean(0)
    # Chains of 1,000 over 100 steps: some hundredths, most in the rare changes of cluster.
    assert (mean - nn.utils.parameters_to_vector(best.parameters())).abs().max() < 0.15
    nn.utils.vector_to_parameters(mean, energy.parameters())
    assert exact(energy, x) - exact(best, x) < 0.002
