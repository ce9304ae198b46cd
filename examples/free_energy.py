"""The free energy from hot to cold: a latent summed out, then minimised out.

Three parabolas E(x, k), and F_beta(x) = -1/beta log sum_k exp(-beta E(x, k)). It is a smooth
minimum that sharpens to the least parabola as beta grows; the density exp(-beta F_beta) / Z is
that of the joint energy with k summed out, at every beta.

    python examples/free_energy.py --plot docs/images/free_energy.png
"""

import argparse
import math

import torch
from pyro.distributions import constraints

import pyro_ebm as ebm

MEANS, OFFSETS = torch.tensor([-2.0, 0.0, 3.0]), torch.tensor([0.0, 0.6, 0.3])
BETAS = (0.25, 1.0, 4.0, math.inf)


def energy(x, k):
    return 0.5 * (x - MEANS[k]).square() + OFFSETS[k]


def free_energy(beta):
    return ebm.FreeEnergy(energy, ebm.Flat((), constraints.integer_interval(0, 2)), beta)


def density(beta, x):
    """The density of x; at beta = infinity it would sit on the minimum."""
    grid = ebm.partition.Quadrature(-12.0, 13.0, 300)
    return ebm.GibbsBoltzmann(free_energy(beta), ebm.Flat(), beta).normalized(grid).log_prob(x)


def report(x):
    least = free_energy(math.inf)(x)
    print(f"{'beta':>6}{'mean of least - F':>20}{'log(3) / beta':>16}{'mass':>8}")
    for beta in BETAS[:-1]:
        below = (least - free_energy(beta)(x)).mean()
        mass = torch.trapezoid(density(beta, x).exp(), x)
        print(f"{beta:6.2f}{below:20.4f}{math.log(3) / beta:16.4f}{mass:8.4f}")


def plot(path, x):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6))
    for k in range(3):
        axes[0].plot(x, energy(x, torch.tensor(k)), color="0.8", lw=1)
    for beta, shade in zip(BETAS, (0.2, 0.45, 0.7, 0.95), strict=True):
        label = r"$\beta = \infty$" if beta == math.inf else rf"$\beta = {beta:g}$"
        color = plt.cm.plasma_r(shade)
        axes[0].plot(x, free_energy(beta)(x), color=color, label=label)
        if beta < math.inf:
            axes[1].plot(x, density(beta, x).exp(), color=color, label=label)
    axes[0].set(xlabel="x", ylabel=r"$F_\beta(x)$", ylim=(-5, 4))
    axes[1].set(xlabel="x", ylabel=r"$e^{-\beta F_\beta(x)} / Z$", ylim=(0, None))
    axes[0].legend(frameon=False, ncols=2)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--points", type=int, default=1001)
    parser.add_argument("--plot")
    args = parser.parse_args()
    x = torch.linspace(-7.0, 8.0, args.points)
    report(x)
    if args.plot:
        plot(args.plot, x)


if __name__ == "__main__":
    main()
