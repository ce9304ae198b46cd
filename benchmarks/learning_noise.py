"""The error of noise contrast against its theory; energy discrepancy on a grid of Gaussians.

Run by ``python -m benchmarks.learning noise``. Noise contrast learns the precision of N(0, 1) and
its log Z from N(0, 4), in many replicates at once; the variances are times the number of data,
and those of the theory a quadrature. The densities are 25 Gaussians, 1.5 apart: with the standard
deviation .0375 they are the field's data set of this name, scaled. The error of log p is a mean
over the truth, with log Z by a sum on a grid.
"""

import argparse
import itertools
import math
import time

import pyro.distributions as dist
import torch
from torch import nn

import pyro_ebm as ebm
from pyro_ebm.losses import energy_discrepancy, noise_contrastive
from tests.test_losses_noise import asymptotic_covariance, estimates

CENTERS = 1.5 * torch.tensor([*itertools.product((-2.0, -1.0, 0.0, 1.0, 2.0), repeat=2)])


class Waves(nn.Module):
    """An energy of learned waves: many modes at once, which a plain network learns slowly."""

    def __init__(self):
        super().__init__()
        self.wave = nn.Parameter(2.0 * torch.randn(2, 64))
        self.net = ebm.zoo.MLPEnergy(128, (64,))

    def forward(self, x):
        angle = x @ self.wave
        return self.net(torch.cat([angle.sin(), angle.cos()], -1)) + 0.005 * x.square().sum(-1)


def sample(n, sd):
    return CENTERS[torch.randint(25, (n,))] + sd * torch.randn(n, 2)


def log_prob(x, sd):
    each = -(x.unsqueeze(-2) - CENTERS).square().sum(-1) / (2 * sd**2)
    return each.logsumexp(-1) - math.log(25 * 2 * math.pi * sd**2)


@torch.no_grad()
def errors(energy, sd):
    """Return the mean squared error of log p, and the divergence, over the truth."""
    side = torch.linspace(-6.0, 6.0, 481)
    grid = torch.cartesian_prod(side, side).split(1 << 16)
    log_z = torch.cat([-energy(part) for part in grid]).logsumexp(0) + 2 * math.log(12 / 480)
    x = sample(20_000, sd)
    gap = log_prob(x, sd) + energy(x) + log_z
    return gap.square().mean().item(), gap.mean().item()


def discrepancy(num, w):
    def loss(energy, x):
        y = x + torch.randn_like(x)
        return energy_discrepancy(energy, x, y + torch.randn(num, *x.shape), weight=w)

    return loss


def contrast(num):
    noise = dist.Normal(torch.zeros(2), 2.5).to_event(1)

    def loss(energy, x):  # without a log Z of its own: the network takes it in
        return noise_contrastive(energy, x, noise.sample((num * len(x),)), noise)

    return loss


LOSSES = {
    "energy discrepancy, M = 1": discrepancy(1, 1.0),
    "energy discrepancy, M = 4": discrepancy(4, 1.0),
    "energy discrepancy, M = 4, w = 0": discrepancy(4, 0.0),
    "noise contrast, nu = 4": contrast(4),
}


def train(loss, energy, sd, steps):
    optimizer = torch.optim.Adam(energy.parameters(), 5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        value = loss(energy, sample(256, sd))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        schedule.step()


def density_row(name, sd, steps):
    torch.manual_seed(0)
    energy, start = Waves(), time.process_time()
    train(LOSSES[name], energy, sd, steps)
    seconds = time.process_time() - start
    square, divergence = errors(energy, sd)
    return {
        "loss": name,
        "sd": sd,
        "steps": steps,
        "mse of log p": square,
        "KL": divergence,
        "cpu s": seconds,
    }


def contrast_rows(nu, replicates, n=1000):
    start = time.process_time()
    found, theory = estimates(n, nu, replicates), asymptotic_covariance(nu).diagonal()
    seconds = time.process_time() - start
    truth = torch.tensor([1.0, -0.5 * math.log(2 * math.pi)])
    spread = (found - truth).abs() / (theory / n).sqrt()
    return [
        {
            "noise contrast": name,
            "nu": nu,
            "replicates": replicates,
            "T var": n * found[:, i].var().item(),
            "theory": theory[i].item(),
            "within 3 se": (spread[:, i] < 3).double().mean().item(),
            "cpu s": seconds,
        }
        for i, name in enumerate(["precision", "log Z"])
    ]


def run(quick):
    rows = [row for nu in (1, 5, 20) for row in contrast_rows(nu, 50 if quick else 400)]
    for sd in (0.25,) if quick else (0.25, 0.0375):
        rows += [density_row(name, sd, 50 if quick else 2000) for name in LOSSES]
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it runs")
    for row in run(parser.parse_args().quick):
        print(row)
