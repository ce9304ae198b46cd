"""The coupling of an Ising picture: a posterior whose log Z depends on what is inferred.

A picture of 7 x 7 spins is drawn with p(x | J) = exp(J sum x_i x_j) / Z(J), and J is inferred
from it. Three ways: exchange, which needs no Z; NUTS with a table of log Z along J; and, as the
truth, a fine grid with the exact Z of a factor graph. Without Z the posterior is far off.

    python examples/ising_coupling.py --plot coupling.png
"""

import argparse
import warnings

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints

import pyro_ebm as ebm

HIGH = 1.2


def lattice(coupling, n):
    """Return the energy of bits on an open square lattice, as a factor graph."""
    unlike = coupling * torch.tensor([[-1.0, 1.0], [1.0, -1.0]])
    places = [(i, j) for i in range(n) for j in range(n)]
    pairs = [((i, j), (i, j + 1)) for i, j in places if j + 1 < n]
    pairs += [((i, j), (i + 1, j)) for i, j in places if i + 1 < n]
    return ebm.FactorGraph(dict.fromkeys(pairs, unlike), dict.fromkeys(places, 2))


def picture(coupling, n, log_partition=None):
    """Return the distribution of pictures."""
    base = ebm.Flat((n * n,), constraints.boolean)
    return ebm.GibbsBoltzmann(lattice(coupling, n), base, log_partition=log_partition)


def model(x, n, table=None):
    coupling = pyro.sample("J", dist.Uniform(0.0, HIGH))
    method = None if table is None else table.at(coupling)
    pyro.sample("x", picture(coupling, n, method), obs=x)


def exact(x, n, grid):
    """Return the posterior density on a grid, with its log Z and without."""
    energy = lattice(torch.tensor(1.0), n)(x)
    log_z = torch.stack([lattice(j, n).log_partition() for j in grid])
    step = grid[1] - grid[0]
    right, naive = -grid * energy - log_z, -grid * energy
    return torch.softmax(right, 0) / step, torch.softmax(naive, 0) / step


def sample(kernel, args, *given):
    mcmc = ebm.MCMC(kernel, args.draws, args.warmup, num_chains=args.chains, disable_progbar=True)
    mcmc.run(*given)
    return mcmc.get_samples()["J"]


def plot(path, draws, grid, densities):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for (name, j), color in zip(draws.items(), ["#9ecae1", "#fdae6b"], strict=True):
        options = {"bins": 60, "range": (0, HIGH), "density": True, "alpha": 0.7}
        axes.hist(j, **options, color=color, label=name)
    right, naive = densities
    axes.plot(grid, right, color="#08519c", label="posterior, by exact log Z on a grid")
    axes.plot(grid, naive, color="0.5", linestyle="--", label="without log Z: wrong")
    axes.set(xlabel="J", ylabel="density", ylim=(0, 1.6 * float(right.max())))
    axes.set_title("The coupling of one Ising picture")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


def main(args):
    warnings.simplefilter("ignore", ebm.ConvergenceWarning)  # of runs as short as the tests'
    torch.set_default_dtype(torch.float64)
    pyro.set_rng_seed(args.seed)
    n, grid = args.side, torch.linspace(0.0, HIGH, 241)
    graph = lattice(torch.tensor(args.coupling), n)
    x = graph.to_tensor(graph.sample(1))[0].double()
    densities = exact(x, n, grid)
    table = ebm.partition.Table(
        0.0,
        HIGH,
        args.nodes,
        make=lambda j: picture(j, n),
        num_chains=16,
        num_samples=args.sweeps,
        warmup=args.sweeps // 4,
    )
    draws = {
        "exchange": sample(ebm.Exchange(model), args, x, n),
        "NUTS and a table of log Z": sample(ebm.NUTS(model), args, x, n, table.build()),
    }
    mean = (densities[0] * grid).sum() * (grid[1] - grid[0])
    print(f"J by exact log Z on a grid: {mean:.3f}")
    for name, j in draws.items():
        print(f"J by {name}: {j.mean():.3f} +- {j.std():.3f}")
    if args.plot:
        plot(args.plot, draws, grid, densities)
        print(f"plot in {args.plot}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--side", type=int, default=7, help="the side of the picture")
    parser.add_argument("--coupling", type=float, default=0.35, help="the true coupling")
    parser.add_argument("--draws", type=int, default=300)
    parser.add_argument("--warmup", type=int, default=150)
    parser.add_argument("--chains", type=int, default=32)
    parser.add_argument("--nodes", type=int, default=13, help="those of the table")
    parser.add_argument("--sweeps", type=int, default=80, help="draws at each node of the table")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", metavar="PATH", help="write a picture")
    main(parser.parse_args())
