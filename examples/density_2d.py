"""Contrastive learning of a two-dimensional density, with its exact negative log-likelihood.

An MLP learns the energy of a ring by Pyro's stock SVI: the log_partition of the observed site is
Contrastive, persistent MALA chains whose weights follow log Z. In two dimensions log Z is also a
sum over a grid, so every number printed can be trusted: the true negative log-likelihood (2.0500),
that of the learned energy on fresh data, and log Z by the grid and by the chains.

    python examples/density_2d.py --plot density_2d.png
"""

import argparse
import math

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import ClippedAdam

import pyro_ebm as ebm
from pyro_ebm.partition import Contrastive, Quadrature

RADIUS, WIDTH = 2.0, 0.15


def ring(n):
    """Draw points at a radius of N(2, 0.15^2) in all directions."""
    radius = RADIUS + WIDTH * torch.randn(n)
    angle = 2 * math.pi * torch.rand(n)
    return torch.stack([radius * angle.cos(), radius * angle.sin()], -1)


def true_log_prob(x):
    radius = x.norm(dim=-1)
    return dist.Normal(RADIUS, WIDTH).log_prob(radius) - (2 * math.pi * radius).log()


def entropy():
    """Return the negative log-likelihood of the true density itself, by a grid."""
    axis = torch.linspace(-4.0, 4.0, 800, dtype=torch.float64)
    log_prob = true_log_prob(torch.cartesian_prod(axis, axis))
    mass = log_prob.exp() * (axis[1] - axis[0]) ** 2
    return -(mass * log_prob).sum().item()


def learn(energy, base, args):
    """Learn by SVI; return the averaged energy, the chains and what was seen on the way."""
    negatives = Contrastive(num_chains=args.chains, num_steps=args.moves)

    def model():
        pyro.module("energy", energy)
        with pyro.plate("n", args.batch):
            d = ebm.GibbsBoltzmann(energy, base, log_partition=negatives)
            pyro.sample("x", d, obs=ring(args.batch))

    decay = 0.05 ** (1 / args.steps)
    svi = SVI(model, lambda: None, ClippedAdam({"lr": args.lr, "lrd": decay}), Trace_ELBO())
    averaged = torch.optim.swa_utils.AveragedModel(
        energy, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.995)
    )
    history = []
    for step in range(1, args.steps + 1):
        loss = svi.step() / args.batch
        averaged.update_parameters(energy)
        if step % max(args.steps // 10, 1) == 0:
            history.append((step, loss, *evaluate(averaged.module, base)))
            print("step {:5d}   loss {:6.3f}   exact {:6.3f}   log Z {:6.3f}".format(*history[-1]))
    return averaged.module, negatives, history


@torch.no_grad()
def evaluate(energy, base, n=20_000):
    """Return the negative log-likelihood of fresh data, and log Z, both by the grid."""
    grid = Quadrature(-5.0, 5.0, 150)
    d = ebm.GibbsBoltzmann(energy, base, log_partition=grid)
    return -d.log_prob(ring(n)).mean().item(), ebm.log_partition(d, grid).value.item()


def plot(path, energy, base, history):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    axis = torch.linspace(-3.2, 3.2, 200)
    points = torch.cartesian_prod(axis, axis)
    with torch.no_grad():
        d = ebm.GibbsBoltzmann(energy, base, log_partition=Quadrature(-5.0, 5.0, 150))
        log_probs = true_log_prob(points), d.log_prob(points)
        densities = [log_prob.exp().reshape(200, 200).T.numpy() for log_prob in log_probs]
        samples = d.sample((2000,))
    figure, axes = plt.subplots(1, 4, figsize=(15, 3.8), layout="constrained")
    extent = (-3.2, 3.2, -3.2, 3.2)
    for panel, density, title in zip(axes, densities, ("true density", "learned"), strict=False):
        panel.imshow(
            density, origin="lower", extent=extent, vmin=0, vmax=densities[0].max(), cmap="magma"
        )
        panel.set(title=title, xlabel="$x_1$", ylabel="$x_2$")
    axes[2].scatter(*samples.T.numpy(), s=2, color="#08519c")
    axes[2].set(title="samples by d.sample", aspect="equal", xlim=extent[:2], ylim=extent[2:])
    axes[2].set(xlabel="$x_1$", ylabel="$x_2$")
    steps, loss, exact, _ = zip(*history, strict=True)
    axes[3].plot(steps, loss, ".-", color="0.6", label="loss, log Z by the chains")
    axes[3].plot(steps, exact, ".-", color="#08519c", label="fresh data, log Z by the grid")
    axes[3].axhline(entropy(), color="k", linestyle="--", label="the truth")
    axes[3].set(title="negative log-likelihood in nats", xlabel="step", ylim=(1.6, 3.6))
    axes[3].legend(frameon=False)
    figure.savefig(path, dpi=110)


def main(args):
    pyro.set_rng_seed(args.seed)
    base = dist.Normal(torch.zeros(2), 2.0).to_event(1)
    energy = ebm.zoo.MLPEnergy(2, (args.hidden, args.hidden))
    learned, negatives, history = learn(energy, base, args)
    nll, log_z = evaluate(learned, base, 100_000)
    truth = entropy()
    print(f"negative log-likelihood {nll:.4f} nats, of the true density {truth:.4f}: ", end="")
    print(f"gap {nll - truth:.4f}")
    print(f"log Z of it by the grid {log_z:.3f}; the chains accepted {negatives.accept_rate:.0%}")
    last = ebm.GibbsBoltzmann(energy, base)  # the chains follow this one, not the average
    by_chains, error, _ = ebm.log_partition(last, negatives)
    by_grid = ebm.log_partition(last, Quadrature(-5.0, 5.0, 150)).value
    print(f"log Z of the last energy by the grid {by_grid:.3f}, ", end="")
    print(f"by the weighted chains {by_chains:.3f} +- {error:.3f}")
    if args.plot:
        plot(args.plot, learned, base, history)
        print(f"plot in {args.plot}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--chains", type=int, default=512)
    parser.add_argument("--moves", type=int, default=5)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", metavar="PATH", help="write a picture")
    main(parser.parse_args())
