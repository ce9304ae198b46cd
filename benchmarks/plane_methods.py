"""How to learn a density on the plane: our methods, and one loop for them and for peers.

Rates, noise levels and numbers of chains of ours were chosen on the moons, by some fifty runs of 8
CPU seconds and seed 0; the loop (Adam, its cosine, the mean over the last steps) too. Peers get
this loop with a rate of 1e-2 and have their own defaults for all else.
"""

import math
import time
from collections.abc import Callable
from typing import NamedTuple

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import pyro_ebm as ebm
from benchmarks.densities import DENSITIES
from pyro_ebm import losses
from pyro_ebm.kernels import hmc, mala
from pyro_ebm.partition import Contrastive

BASE = dist.Normal(torch.zeros(2), 2.0).to_event(1)


class Confined(nn.Module):
    """The network's energy and that of the base: normalisable whatever the network says."""

    def __init__(self):
        super().__init__()
        self.network = ebm.zoo.MLPEnergy(2)

    def forward(self, x):
        return self.network(x) + x.square().sum(-1) / 8


class Method(NamedTuple):
    """``make(model)`` gives a loss of data, and what else there is to learn."""

    make: Callable[[Confined], tuple[Callable[[Tensor], Tensor], list[Tensor]]]
    lr: float = 1e-2
    batch: int = 256


class Smoothed:
    """Points with Gaussian noise, and a share of the base: a proposal that covers."""

    event_shape, batch_shape = torch.Size((2,)), torch.Size()

    def __init__(self, points, sd=0.25, share=0.25):
        self.points, self.sd, self.share = points, sd, share

    def sample(self, shape):
        (n,) = shape
        wide = round(self.share * n)
        near = self.points[torch.randint(len(self.points), (n - wide,))]
        return torch.cat([BASE.sample((wide,)), near + self.sd * torch.randn_like(near)])

    def log_prob(self, x):
        square = torch.cdist(x, self.points).square() / (2 * self.sd**2)
        kernel = (-square).logsumexp(-1) - math.log(2 * math.pi * self.sd**2 * len(self.points))
        wide = math.log(self.share) + BASE.log_prob(x)
        return torch.logaddexp(wide, math.log1p(-self.share) + kernel)


def flat(model):
    return ebm.GibbsBoltzmann(model, ebm.Flat((2,)))


# Our methods ---------------------------------------------------------------------------------


def importance(model, num=2, sd=0.5, share=0.25):
    def loss(x):
        noise = Smoothed(x, sd, share)
        points = noise.sample((num * len(x),))
        value = model(torch.cat([x, points]))
        log_z = (-value[len(x) :] - noise.log_prob(points)).logsumexp(0) - math.log(len(points))
        return value[: len(x)].mean() + log_z

    return loss, []


def quadrature(model, low=-4.5, high=4.5, num=32):
    """Contrast with a grid of one random point per cell: a fixed one is learned around."""
    width = (high - low) / num
    corners = torch.cartesian_prod(*[low + width * torch.arange(num)] * 2)

    def loss(x):
        points = corners + width * torch.rand_like(corners)
        log_z = (-model(points)).logsumexp(0) + 2 * math.log(width)
        return losses.maximum_likelihood(model, x, log_z)

    return loss, []


def contrastive(model, num_steps=5, step_size=0.02):
    kernel = mala(model, step_size)

    def loss(x):
        state = kernel.init(x)
        for _ in range(num_steps):
            state, _ = kernel.step(state)
        return losses.contrastive_divergence(model, x, state.position)

    return loss, []


def persistent(model, num_chains=256, num_steps=5, kernel=mala):
    """Chains that start at data, and one in twenty anew: they need not find the modes."""
    negatives = ebm.Negatives(flat(model), kernel=kernel, num_steps=num_steps, restart=0.05)
    chains = None

    def loss(x):
        nonlocal chains
        chains = chains or negatives.init(x[:num_chains])
        chains, moved = negatives.step(chains, x=x)
        return losses.contrastive_divergence(model, x, moved.x)

    return loss, []


def hamiltonian(model):
    return persistent(model, num_steps=1, kernel=lambda u, step: hmc(u, step, 5))


def jarzynski(model, num_chains=512, num_steps=1):
    log_z = Contrastive(num_chains=num_chains, num_steps=num_steps)
    d = ebm.GibbsBoltzmann(model.network, BASE, log_partition=log_z)
    return lambda x: -d.log_prob(x).mean(), []


def score(model):
    return lambda x: losses.score_matching(model, x), []


def sliced(model, num=1):
    return lambda x: losses.sliced_score_matching(model, x, torch.randn(num, *x.shape)), []


def denoising(model, sigma=0.05):
    def loss(x):
        half = torch.randn_like(x)
        noise = torch.stack([half, -half])  # takes most of the variance away
        return losses.denoising_score_matching(model, x, noise, sigma)

    return loss, []


def noise_contrast(model):
    log_z = nn.Parameter(torch.zeros(()))

    def loss(x):
        x, centres = x.chunk(2)  # noise that knew the points would be told from them
        noise = Smoothed(centres)
        points = noise.sample((2 * len(x),))
        return losses.noise_contrastive(model, x, points, noise, log_z)

    return loss, [log_z]


def discrepancy(model, num=4, sd=0.3):
    def loss(x):
        perturbed = x + sd * torch.randn_like(x) + sd * torch.randn(num, *x.shape)
        return losses.energy_discrepancy(model, x, perturbed)

    return loss, []


METHODS = {
    "maximum likelihood, importance": Method(importance),
    "maximum likelihood, quadrature": Method(quadrature, lr=3e-2),
    "CD-5, MALA": Method(contrastive, lr=2e-2),
    "PCD-5, MALA": Method(persistent, lr=5e-3),
    "PCD, HMC of 5 leapfrogs": Method(hamiltonian),
    "PCD-1, Jarzynski weights": Method(jarzynski, lr=2e-2),
    "score matching": Method(score),
    "sliced score matching": Method(sliced),
    "denoising score matching": Method(denoising),
    "noise contrast": Method(noise_contrast, lr=2e-2, batch=512),
    "energy discrepancy": Method(discrepancy, lr=2e-2),
}


# The loop --------------------------------------------------------------------------------------


def rate(done, lr):
    """Return the learning rate: a short warm-up, then a cosine, as far as the time is spent."""
    return lr * min(1.0, 0.05 + 50 * done) * (0.02 + 0.49 * (1 + math.cos(math.pi * done)))


def learn(name, method, seconds, seed=0, tail=0.15):
    """Return the mean model of the last steps after some CPU seconds, and the number of steps."""
    pyro.set_rng_seed(seed)
    data, model = DENSITIES[name](), Confined()
    loss, extra = method.make(model)
    optim = torch.optim.Adam([*model.parameters(), *extra], betas=(0.9, 0.99))
    averaged = AveragedModel(model)
    begin, steps = time.process_time(), 0
    while (done := (time.process_time() - begin) / seconds) < 1.0:
        optim.param_groups[0]["lr"] = rate(done, method.lr)
        optim.zero_grad()
        loss(data.sample(method.batch)).backward()
        optim.step()
        if done > 1 - tail:
            averaged.update_parameters(model)
        steps += 1
    return averaged.module, steps
