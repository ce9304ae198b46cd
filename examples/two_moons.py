"""Learn a density from points alone, without a chain: energy discrepancy on two moons.

The loss compares the energy of data with that of perturbed data, so there are no negatives to
wait for and no log Z. In two dimensions a grid then gives log Z, the density, and its exact
negative log-likelihood on fresh data. The mean of the last weights is what is kept.

    python examples/two_moons.py --plot two_moons.png
"""

import argparse
import math

import pyro
import pyro.distributions as dist
import torch

import pyro_ebm as ebm
from pyro_ebm.losses import energy_discrepancy
from pyro_ebm.partition import Quadrature


def moons(n):
    """Draw points of two half circles of radius 1.5, with noise of 0.15."""
    angle = math.pi * torch.rand(n, 1)
    outer = torch.cat([angle.cos(), angle.sin()], -1)
    inner = torch.tensor([1.0, 0.5]) - outer
    return 1.5 * torch.where(torch.rand(n, 1) < 0.5, outer, inner) + 0.15 * torch.randn(n, 2)


def learn(energy, base, args):
    """Learn the energy of a density relative to the base; return the averaged energy."""
    d = ebm.GibbsBoltzmann(energy, base)
    optim = torch.optim.Adam(energy.parameters(), args.lr, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optim, args.lr, total_steps=args.steps)
    averaged = torch.optim.swa_utils.AveragedModel(energy)
    for step in range(args.steps):
        x = moons(args.batch)
        centre = x + args.sd * torch.randn_like(x)
        perturbed = centre + args.sd * torch.randn(4, *x.shape)
        loss = energy_discrepancy(d.potential, x, perturbed)
        optim.zero_grad()
        loss.backward()
        optim.step()
        schedule.step()
        if step > 0.85 * args.steps:
            averaged.update_parameters(energy)
        if (step + 1) % max(args.steps // 5, 1) == 0:
            print(f"step {step + 1:5d}   loss {loss.item():.3f}")
    return averaged.module


def plot(path, d, x):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    axis = torch.linspace(-3.5, 4.5, 200)
    with torch.no_grad():
        density = d.log_prob(torch.cartesian_prod(axis, axis)).exp().reshape(200, 200).T
    figure, axes = plt.subplots(1, 2, figsize=(8, 4), layout="constrained")
    axes[0].scatter(*x.T.numpy(), s=2, color="#08519c")
    extent = (-3.5, 4.5, -3.5, 4.5)
    axes[1].imshow(density.numpy(), origin="lower", extent=extent, cmap="magma")
    axes[0].set(title="data", aspect="equal", xlim=extent[:2], ylim=extent[2:])
    axes[1].set_title("learned density")
    figure.savefig(path, dpi=110)


def main(args):
    pyro.set_rng_seed(args.seed)
    energy = ebm.zoo.MLPEnergy(2, (args.hidden, args.hidden))
    base = dist.Normal(torch.zeros(2), 2.0).to_event(1)
    learned = learn(energy, base, args)
    d = ebm.GibbsBoltzmann(learned, base, log_partition=Quadrature(-8.0, 8.0, 300))
    x = moons(args.test)
    with torch.no_grad():
        surprise = -d.log_prob(x)
    error = surprise.std() / len(x) ** 0.5
    print(
        f"negative log-likelihood {surprise.mean():.3f} +- {error:.3f} nats on fresh data, ",
        end="",
    )
    print("1.8185 by the true density")
    if args.plot:
        plot(args.plot, d, x[:2000])
        print(f"plot in {args.plot}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--sd", type=float, default=0.3, help="of the perturbation")
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--test", type=int, default=50_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", metavar="PATH", help="write a picture")
    main(parser.parse_args())
