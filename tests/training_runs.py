"""Training runs of at most 200 steps under a monitor: sound ones, and ones that fail by script."""

import math

import pyro.distributions as dist
import torch
from torch import nn

import pyro_ebm as ebm
from pyro_ebm import kernels, losses
from pyro_ebm.partition import Exact, Quadrature

BASE = {"loc": 0.0, "scale": 2.0}


def normal(dim=2, scale=2.0):
    return dist.Normal(torch.zeros(dim), scale).to_event(1)


def ring(n):
    """Draw points at a radius of N(2, 0.3^2) in all directions."""
    radius, angle = 2.0 + 0.3 * torch.randn(n), 2 * math.pi * torch.rand(n)
    return torch.stack([radius * angle.cos(), radius * angle.sin()], -1)


def potential(energy, base):
    return lambda x: energy(x) - base.log_prob(x)


def langevin(energy, start, num_steps, step_size=0.05, noise_scale=None, make=kernels.ula):
    """Move chains; return where they end, and the records of all moves."""
    options = {} if noise_scale is None else {"noise_scale": noise_scale}
    kernel = make(energy, step_size, **options)
    state, infos = kernel.init(start), []
    for _ in range(num_steps):
        state, info = kernel.step(state)
        infos.append(info)
    return state.position, infos


def learn(monitor, energy, batch, negatives, steps, optimizer, loss=None):
    """Learn by contrast; ``negatives(x)`` returns chains and the records of their moves."""
    for _ in range(steps):
        x = batch()
        chains, info = negatives(x)
        value = (
            losses.contrastive_divergence(energy, x, chains) if loss is None else loss(x, chains)
        )
        optimizer.zero_grad()
        value.backward()
        if monitor.update(x, chains, loss=value, info=info):
            optimizer.step()
    return monitor


def adam(energy, lr=3e-3):
    return torch.optim.Adam(energy.parameters(), lr)


class Persistent:
    """Chains that go on from step to step, as a function of the batch."""

    def __init__(self, energy, start, num_steps, **options):
        self.energy, self.chains = energy, start
        self.num_steps, self.options = num_steps, options

    def __call__(self, x):
        self.chains, info = langevin(self.energy, self.chains, self.num_steps, **self.options)
        return self.chains, info


class Quadratic(nn.Module):
    """E = k |x|^2 / 2, of whatever sign k takes."""

    def __init__(self, k=1.0):
        super().__init__()
        self.k = nn.Parameter(torch.tensor(k))

    def forward(self, x):
        return 0.5 * self.k * x.square().sum(-1)


def stripes(side=3):
    """Return all bars and stripes: images whose rows, or columns, are each of one colour."""
    bits = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * side)
    rows = bits.unsqueeze(-1).expand(-1, side, side)
    return torch.cat([rows, rows.transpose(1, 2)]).reshape(-1, side * side).unique(dim=0)


def gibbs(rbm, v, num_steps):
    for _ in range(num_steps):
        h = torch.bernoulli(torch.sigmoid(rbm.hidden_logits(v)))
        v = torch.bernoulli(torch.sigmoid(rbm.visible_logits(h)))
    return v.detach()


# Sound runs ------------------------------------------------------------------------------------


def gaussian_exact():
    """A precision, with exact negatives and the exact log Z."""
    energy = Quadratic(0.5)
    d = ebm.GibbsBoltzmann(energy, normal(scale=2.0))
    method, held_out = Quadrature(-12.0, 12.0, 200), torch.randn(500, 2)
    monitor = ebm.Monitor(d, held_out=held_out, log_partition=method)

    def negatives(x):
        return torch.randn(256, 2) / (energy.k.detach() + 0.25).sqrt(), None

    return learn(monitor, energy, lambda: torch.randn(256, 2), negatives, 150, adam(energy, 0.02))


def ring_persistent():
    """An MLP by persistent MALA chains of ebm.Negatives."""
    energy, base = ebm.zoo.MLPEnergy(2, (32, 32)), normal()
    sampler = ebm.Negatives(energy, base, num_steps=10)
    chains, optimizer = sampler.init(256), adam(energy)
    monitor = ebm.Monitor(energy, base)
    for _ in range(150):
        x = ring(256)
        chains, moved = sampler.step(chains)
        loss = losses.contrastive_divergence(energy, x, moved.x)
        optimizer.zero_grad()
        loss.backward()
        monitor.update(x, moved, loss=loss)
        optimizer.step()
    return monitor


def ring_from_data():
    """An MLP by short ULA chains from the data."""
    energy, base = ebm.zoo.MLPEnergy(2, (32, 32)), normal()
    u = potential(energy, base)
    monitor = ebm.Monitor(energy, base)
    return learn(
        monitor, energy, lambda: ring(256), lambda x: langevin(u, x, 10), 150, adam(energy)
    )


def rbm_persistent():
    """An RBM of bars and stripes by persistent block Gibbs chains, its likelihood enumerated."""
    rbm, data = ebm.zoo.RBM(9, 8), stripes()
    base = ebm.Flat((9,), dist.constraints.boolean)
    monitor = ebm.Monitor(rbm, base, log_partition=Exact())
    chains = [torch.bernoulli(torch.full((100, 9), 0.5))]

    def negatives(x):
        chains[0] = gibbs(rbm, chains[0], 5)
        return chains[0], None

    optimizer = torch.optim.SGD(rbm.parameters(), 0.1)
    return learn(monitor, rbm, lambda: data.repeat(4, 1), negatives, 200, optimizer)


def score():
    """An MLP by sliced score matching, without negatives."""
    energy, base = ebm.zoo.MLPEnergy(2, (32, 32)), normal()
    u, monitor, optimizer = potential(energy, base), ebm.Monitor(energy, base), adam(energy)
    for _ in range(150):
        x = ring(256)
        loss = losses.sliced_score_matching(u, x, torch.randn(256, 2))
        optimizer.zero_grad()
        loss.backward()
        monitor.update(x, loss=loss)
        optimizer.step()
    return monitor


SOUND = {
    "gaussian, exact negatives": gaussian_exact,
    "ring, persistent chains": ring_persistent,
    "ring, chains from data": ring_from_data,
    "RBM, persistent Gibbs": rbm_persistent,
    "ring, score matching": score,
}
