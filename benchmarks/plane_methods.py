"""How to learn a density on the plane: our methods, and one loop for them and for peers."""

import math
import time
from collections.abc import Callable
from typing import NamedTuple

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import pyro_ebm as ebm
from benchmarks.densities import DENSITIES
from pyro_ebm import losses
from pyro_ebm.kernels import hmc, mala
from pyro_ebm.partition import Contrastive, Quadrature

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


def quadrature(model):
    d = flat(model)
    rule = Quadrature(-4.5, 4.5, 48)
    return lambda x: losses.maximum_likelihood(model, x, rule.log_z(d)), []


def contrastive(model, num_steps=5, step_size=0.02):
    kernel = mala(model, step_size)

    def loss(x):
        state = kernel.init(x)
        for _ in range(num_steps):
            state, _ = kernel.step(state)
        return losses.contrastive_divergence(model, x, state.position)

    return loss, []


def persistent(model, num_chains=512, num_steps=5, kernel=mala):
    negatives = ebm.Negatives(flat(model), kernel=kernel, num_steps=num_steps)
    chains = negatives.init(BASE.sample((num_chains,)))

    def loss(x):
        nonlocal chains
        chains, moved = negatives.step(chains)
        return losses.contrastive_divergence(model, x, moved.x)

    return loss, []


def hamiltonian(model):
    return persistent(model, num_steps=1, kernel=lambda u, step: hmc(u, step, 5))


def jarzynski(model, num_chains=512, num_steps=5):
    log_z = Contrastive(num_chains=num_chains, num_steps=num_steps)
    d = ebm.GibbsBoltzmann(model.network, BASE, log_partition=log_z)
    return lambda x: -d.log_prob(x).mean(), []


def score(model):
    return lambda x: losses.score_matching(model, x), []


def sliced(model, num=1):
    return lambda x: losses.sliced_score_matching(model, x, torch.randn(num, *x.shape)), []


def denoising(model, sigma=0.03):
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
    "maximum likelihood, quadrature": Method(quadrature),
    "CD-5, MALA": Method(contrastive),
    "PCD-5, MALA": Method(persistent, lr=5e-3),
    "PCD, HMC of 5 leapfrogs": Method(hamiltonian, lr=5e-3),
    "PCD-5, Jarzynski weights": Method(jarzynski, lr=5e-3),
    "score matching": Method(score),
    "sliced score matching": Method(sliced),
    "denoising score matching": Method(denoising),
    "noise contrast": Method(noise_contrast, batch=512),
    "energy discrepancy": Method(discrepancy),
}


# The loop --------------------------------------------------------------------------------------


def rate(done, lr):
    """Return the learning rate: a short warm-up, then a cosine, as far as the time is spent."""
    return lr * min(1.0, 0.05 + 50 * done) * (0.02 + 0.49 * (1 + math.cos(math.pi * done)))


def learn(name, method, seconds, seed=0, decay=0.995):
    """Return the averaged model after some CPU seconds, and the number of steps."""
    pyro.set_rng_seed(seed)
    data, model = DENSITIES[name](), Confined()
    loss, extra = method.make(model)
    optim = torch.optim.Adam([*model.parameters(), *extra], betas=(0.9, 0.99))
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))
    begin, steps = time.process_time(), 0
    while (done := (time.process_time() - begin) / seconds) < 1.0:
        optim.param_groups[0]["lr"] = rate(done, method.lr)
        optim.zero_grad()
        loss(data.sample(method.batch)).backward()
        optim.step()
        averaged.update_parameters(model)
        steps += 1
    return averaged.module, steps
