"""A ring of eight modes: chains alone against replica exchange.

HMC finds its way inside a mode and never leaves it; each chain tells a story of its own, and only
R-hat over many chains shows it. Replica exchange lets hot replicas cross and hands what they find
down to the target.

    python examples/ring.py --plot docs/images/ring.png
"""

import argparse
import math
import warnings

import pyro
import torch

import pyro_ebm as ebm

ANGLES = torch.arange(8) * (2 * math.pi / 8)
MODES = 5.0 * torch.stack([ANGLES.cos(), ANGLES.sin()], -1)


def energy(x):
    """Eight Gaussians of standard deviation one half, at equal distances on a circle."""
    distance = (x.unsqueeze(-2) - MODES).square().sum(-1)
    return -torch.logsumexp(-distance / (2 * 0.5**2), -1)


def sample(kernel, args):
    pyro.set_rng_seed(args.seed)
    mcmc = ebm.MCMC(
        kernel(ebm.GibbsBoltzmann(energy, ebm.Flat((2,)))),
        num_samples=args.draws,
        warmup_steps=args.warmup,
        num_chains=args.chains,
        disable_progbar=True,
    )
    with warnings.catch_warnings():  # that one of the two does not mix is what is shown
        warnings.simplefilter("ignore", ebm.ConvergenceWarning)
        mcmc.run()
    return mcmc


def describe(name, mcmc):
    x = mcmc.get_samples(group_by_chain=True)["x"]
    nearest = torch.cdist(x, MODES).argmin(-1)
    seen = torch.tensor([len(chain.unique()) for chain in nearest]).float().mean()
    shares = torch.bincount(nearest.flatten(), minlength=8) / nearest.numel()
    distance = 0.5 * (shares - 1 / 8).abs().sum()
    r_hat = mcmc.diagnostics()["x"]["r_hat"].max()
    seconds = mcmc.cost["warmup_s"] + mcmc.cost["sampling_s"]
    print(f"{name:10}{seen:18.1f}{distance:22.3f}{r_hat:9.2f}{seconds:10.1f}")


def plot(path, runs, args):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(8, 4), sharey=True, layout="constrained")
    for axes, (name, mcmc) in zip(panels, runs.items(), strict=True):
        x = mcmc.get_samples(group_by_chain=True)["x"]
        for chain, color in zip(x[:4], ("#08519c", "#e6550d", "#31a354", "#756bb1"), strict=False):
            axes.plot(*chain.T, ".", color=color, markersize=3, alpha=0.5)
        title = f"{name}: {min(4, args.chains)} of {args.chains} chains, one color each"
        axes.set(title=title, aspect="equal", xlabel="x₁", xlim=(-7, 7), ylim=(-7, 7))
    panels[0].set(ylabel="x₂")
    figure.savefig(path, dpi=120)


def main(args):
    runs = {"ChEES": sample(ebm.ChEES, args), "Tempered": sample(ebm.Tempered, args)}
    print(f"{'':10}{'modes per chain':>18}{'error of the shares':>22}{'R-hat':>9}{'seconds':>10}")
    for name, mcmc in runs.items():
        describe(name, mcmc)
    trips = runs["Tempered"].sample_stats["round_trips"][:, -1].float().mean()
    print(f"each chain's replicas went from hot to cold and back {trips:.0f} times")
    if args.plot:
        plot(args.plot, runs, args)
        print(f"plot in {args.plot}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chains", type=int, default=64)
    parser.add_argument("--draws", type=int, default=500)
    parser.add_argument("--warmup", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", metavar="PATH")
    main(parser.parse_args())
