"""A double well as a prior inside a Pyro model: NUTS against quadrature.

The prior is an energy, p(x) = exp(-beta (x^2 - 1)^2) / Z, whose Z nobody needs as long as only x
is inferred. Pyro's NUTS samples the posterior given a noisy look at x; a sum over a fine grid
gives the truth.

    python examples/double_well.py --plot double_well.png
"""

import argparse

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import MCMC, NUTS

import pyro_ebm as ebm


def energy(x):
    return (x.square() - 1.0).square()


def model(y, beta):
    x = pyro.sample("x", ebm.GibbsBoltzmann(energy, ebm.Flat(), beta=beta))
    pyro.sample("y", dist.Normal(x, 1.5), obs=y)


def exact(y, beta, grid):
    """Return the posterior density on a grid."""
    log_density = -beta * energy(grid) + dist.Normal(grid, 1.5).log_prob(y)
    density = torch.softmax(log_density, 0)
    return density / (grid[1] - grid[0])


def plot(path, x, grid, density, prior):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.hist(x, bins=60, range=(-2, 2), density=True, color="#9ecae1", label="NUTS")
    axes.plot(grid, density, color="#08519c", label="posterior, by quadrature")
    axes.plot(grid, prior, color="0.5", linestyle="--", label="prior: the energy alone")
    axes.set(xlabel="x", ylabel="density", xlim=(-2, 2), title="A double well as a prior")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


def main(args):
    torch.set_default_dtype(torch.float64)
    pyro.set_rng_seed(args.seed)
    y = torch.tensor(args.y)
    mcmc = MCMC(
        NUTS(model),
        num_samples=args.draws,
        warmup_steps=args.warmup,
        disable_progbar=True,
    )
    mcmc.run(y, args.beta)
    x = mcmc.get_samples()["x"]

    grid = torch.linspace(-3.0, 3.0, 6001)
    density = exact(y, args.beta, grid)
    step = grid[1] - grid[0]
    truth = (density * grid).sum() * step, density[grid > 0].sum() * step
    found = x.mean(), (x > 0).double().mean()
    ess = mcmc.diagnostics()["x"]["n_eff"]
    print(f"{'':24}{'NUTS':>10}{'quadrature':>12}")
    for name, a, b in zip(("mean of x", "mass of the right well"), found, truth, strict=True):
        print(f"{name:24}{a.item():10.3f}{b.item():12.3f}")
    print(f"effective sample size {ess.item():.0f} of {args.draws} draws")
    if args.plot:
        prior = torch.softmax(-args.beta * energy(grid), 0) / step
        plot(args.plot, x.numpy(), grid.numpy(), density.numpy(), prior.numpy())
        print(f"plot in {args.plot}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--y", type=float, default=0.6, help="what was seen of x")
    parser.add_argument("--beta", type=float, default=2.0, help="inverse temperature")
    parser.add_argument("--draws", type=int, default=3000)
    parser.add_argument("--warmup", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", metavar="PATH", help="write a picture")
    main(parser.parse_args())
