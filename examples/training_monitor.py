"""A sound training run and one that fails, side by side, with the monitor's words.

Both learn the energy of a ring by persistent Langevin chains. The first moves them as it should;
the second takes the noise of the deep energy-based models' tutorials, far below sqrt(2 eps), and
a single move a step. Both losses look fine. The monitor says which run learns a density, and the
exact log Z of a grid agrees.

    python examples/training_monitor.py --plot monitor.png
"""

import argparse
import math
import warnings

import pyro.distributions as dist
import torch

import pyro_ebm as ebm
from pyro_ebm.partition import Quadrature


def ring(n):
    """Draw points at a radius of N(2, 0.3^2) in all directions."""
    radius, angle = 2.0 + 0.3 * torch.randn(n), 2 * math.pi * torch.rand(n)
    return torch.stack([radius * angle.cos(), radius * angle.sin()], -1)


def learn(args, noise_scale, moves):
    """Learn by persistent chains under a monitor, which is returned."""
    torch.manual_seed(args.seed)
    base = dist.Normal(torch.zeros(2), 2.0).to_event(1)
    energy = ebm.zoo.MLPEnergy(2, (args.hidden, args.hidden))
    optimizer = torch.optim.Adam(energy.parameters(), args.lr)
    kernel = lambda potential, step: ebm.kernels.ula(potential, step, noise_scale)
    sampler = ebm.Negatives(energy, base, kernel, moves, step_size=args.step_size)
    chains = sampler.init(args.chains)
    grid = Quadrature(-7.0, 7.0, 100)
    monitor = ebm.Monitor(energy, base, held_out=ring(500), log_partition=grid)
    for _ in range(args.steps):
        x = ring(args.batch)
        chains, moved = sampler.step(chains)
        loss = ebm.losses.contrastive_divergence(energy, x, moved.x)
        optimizer.zero_grad()
        loss.backward()
        if monitor.update(x, moved, loss=loss):
            optimizer.step()
    return monitor


PANELS = {  # title, unit, and between what a sound run stays
    "loss": ("the loss, which tells nothing", "nats", None),
    "gap": ("energies of negatives less the data's", "sd", (-3.0, 3.0)),
    "movement": ("movement of a chain in one step", "spreads of the data", None),
    "held_out": ("exact held-out log-likelihood", "nats", None),
}


def compare(monitors, path):
    """Draw both runs in one picture, with a line where a warning was first given."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, grid = plt.subplots(2, 2, figsize=(10, 6), layout="constrained", sharex=True)
    colours = dict(zip(monitors, ("#0072b2", "#d55e00"), strict=True))
    for axes, (number, (title, unit, sound)) in zip(grid.flat, PANELS.items(), strict=True):
        for name, monitor in monitors.items():
            steps, values = monitor.history["step"], monitor.history[number]
            known = [(s, v) for s, v in zip(steps, values, strict=True) if v == v]
            axes.plot(*zip(*known, strict=True), ".-", color=colours[name], label=name)
        if sound:
            axes.axhspan(*sound, color="0.93", zorder=0)
        axes.set(title=title, ylabel=unit)
    for name, monitor in monitors.items():
        first = {w.kind: w.step for w in reversed(monitor.warnings)}
        for kind, step in first.items():
            for axes in grid.flat:
                axes.axvline(step, color=colours[name], linestyle="--", linewidth=1)
            grid[0, 1].text(step, -2.7, f' "{kind}"', color=colours[name], rotation=90)
    grid[1, 0].set_ylim(bottom=0.0)
    grid[0, 0].legend(frameon=False)
    for axes in grid[1]:
        axes.set_xlabel("step")
    figure.savefig(path, dpi=110)


def main(args):
    warnings.simplefilter("ignore", ebm.TrainingWarning)  # they are printed below
    runs = {
        "sound": learn(args, None, args.moves),
        "cold, one move a step": learn(args, 0.01, 1),
    }
    for name, monitor in runs.items():
        print(f"--- {name} ---")
        monitor.summary()
        print()
    for name, monitor in runs.items():
        kinds = sorted({warning.kind for warning in monitor.warnings}) or ["none"]
        reached = max(v for v in monitor.history["held_out"] if v == v)
        print(f"{name}: warnings {', '.join(kinds)}; held-out log-likelihood {reached:.3f}")
    if args.plot:
        compare(runs, args.plot)
        print(f"plot in {args.plot}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--chains", type=int, default=256)
    parser.add_argument("--moves", type=int, default=20)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--step-size", type=float, default=0.03)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", metavar="PATH", help="write a picture")
    main(parser.parse_args())
