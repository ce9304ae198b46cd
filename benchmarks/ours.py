"""Our contenders, and the measurements of our own code alone: overhead and scaling."""

import time

import numpy as np
import pyro
import torch
from contender import Clock, Job, Peer, Record
from targets import targets

import pyro_ebm as ebm

TEMPERATURES = 6
UNROLLED = 8

KERNELS = {
    "nuts": lambda d: ebm.NUTS(d),
    "chees": lambda d: ebm.ChEES(d),
    "hmc": lambda d: ebm.HMC(d),
    "tempered": lambda d: ebm.Tempered(d, num_temperatures=TEMPERATURES),
}


def make_mcmc(kernel, energy, job, backend):
    """Return a run of ours that has not started; `kernel` is one of `KERNELS`."""
    distribution = ebm.GibbsBoltzmann(energy, ebm.Flat((job.inits.shape[-1],)))
    return ebm.MCMC(
        KERNELS[kernel](distribution),
        num_samples=job.draws,
        warmup_steps=job.warmup,
        num_chains=job.chains,
        backend=backend,
        initial_params={"x": torch.tensor(job.inits)},
        disable_progbar=True,
    )


def phases(cost):
    return {phase: float(cost[f"{phase}_s"]) for phase in ("compile", "warmup", "sampling")}


def contender(kernel, backend):
    """Return `prepare(target, job)` for one of our kernels with one of our backends."""

    def prepare(target, job):
        def run(seed):
            pyro.set_rng_seed(seed)
            mcmc, clock = make_mcmc(kernel, target.energy, job, backend), Clock()
            mcmc.run()
            cost = mcmc.cost
            gradients = {k: float(cost[f"{k}_gradients"]) for k in ("warmup", "sampling")}
            gradients["executed"] = float(cost["executed_gradients"])
            x = mcmc.get_samples(group_by_chain=True)["x"].numpy()
            return Record(x, phases(cost), clock.cpu(), gradients)

        return run

    return prepare


BACKENDS = ("eager", "traced", "compiled")
OURS = {
    f"ebm-{kernel}-{backend}": Peer(contender(kernel, backend), 1 << 30)
    for kernel in KERNELS
    for backend in BACKENDS
}


# Overhead ----------------------------------------------------------------------------------------


def uniform_inits(rng, chains, dim):
    return rng.uniform(-2, 2, (chains, dim)).astype(np.float32)


def best_time(function, repeats=5, at_least=0.2):
    """Return the seconds of one call: the best mean of some rounds."""
    function()
    start, calls = time.perf_counter(), 0
    while time.perf_counter() - start < at_least:
        function()
        calls += 1
    rounds = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(calls):
            function()
        rounds.append((time.perf_counter() - start) / calls)
    return min(rounds)


def gradient(energy, x):
    x = x.detach().requires_grad_(True)
    return torch.autograd.grad(energy(x).sum(), x)[0]


def bare_gradient(target, x):
    """Return the seconds of one batched gradient, eager."""
    return best_time(lambda: gradient(target.energy, x))


def bare_leapfrog(target, x):
    """Return the seconds of one compiled leapfrog step, of several in one program."""
    force = torch.func.grad(lambda at: target.energy(at).sum())
    step_size = 0.1 * target.smallest

    @torch.compile(fullgraph=True)
    def trajectory(x, p, g):
        for _ in range(UNROLLED):
            p = p - 0.5 * step_size * g
            x = x + step_size * p
            g = force(x)
            p = p - 0.5 * step_size * g
        return x, p, g

    start = x, torch.randn_like(x), gradient(target.energy, x)
    with torch.no_grad():
        return best_time(lambda: trajectory(*start)) / UNROLLED


def seconds_per_gradient(kernel, backend, energy, job):
    """Return the sampling seconds of one batched gradient inside a run of ours."""
    mcmc = make_mcmc(kernel, energy, job, backend)
    mcmc.run()
    return mcmc.cost["sampling_s"] / (mcmc.cost["executed_gradients"] / job.chains)


def overhead(args):
    """Compare our time per gradient with the bare gradient and with the bare compiled leapfrog."""
    rng, rows = np.random.default_rng(args.seed), []
    for name in args.targets:
        target = targets()[name]
        for chains in args.chains:
            inits = uniform_inits(rng, chains, target.dim)
            job, x = Job(chains, args.draws or 200, args.warmup, inits), torch.tensor(inits)
            for backend, bare in (("eager", bare_gradient), ("compiled", bare_leapfrog)):
                alone = bare(target, x)
                inside = seconds_per_gradient("hmc", backend, target.energy, job)
                rows.append(
                    {
                        "target": name,
                        "chains": chains,
                        "backend": backend,
                        "bare_us": 1e6 * alone,
                        "ours_us": 1e6 * inside,
                        "overhead": inside / alone - 1.0,
                    }
                )
    return rows


# Scaling -----------------------------------------------------------------------------------------


def gaussian(dim):
    half_precision = torch.linspace(0.5, 5.0, dim)
    return lambda x: (half_precision * x.square()).sum(-1)


def scaling(args):
    """Measure our ChEES on Gaussians against the number of chains and of dimensions."""
    rng, rows = np.random.default_rng(args.seed), []
    sizes = [("chains", n, 10) for n in (1, 10, 100, 1000, 10000)]
    sizes += [("dims", 100, n) for n in (10, 30, 100, 300, 1000)]
    for axis, chains, dim in sizes[:: 4 if args.quick else 1]:
        job = Job(chains, args.draws or 100, args.warmup, uniform_inits(rng, chains, dim))
        for backend in args.backends:
            seconds = seconds_per_gradient("chees", backend, gaussian(dim), job)
            rows.append(
                {
                    "axis": axis,
                    "chains": chains,
                    "dim": dim,
                    "backend": backend,
                    "us_per_batch": 1e6 * seconds,
                    "gradients_per_s": chains / seconds,
                }
            )
    return rows


def plot_scaling(path, rows):
    """Save the time of one batched gradient against chains and against dimensions."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(9, 4), sharey=True, layout="constrained")
    labels = {
        "chains": ("chains", "chains, 10 dimensions"),
        "dims": ("dim", "dimensions, 100 chains"),
    }
    for axes, (axis, (key, label)) in zip(panels, labels.items(), strict=True):
        for backend in dict.fromkeys(row["backend"] for row in rows):
            chosen = [r for r in rows if (r["axis"], r["backend"]) == (axis, backend)]
            axes.loglog(
                [r[key] for r in chosen], [r["us_per_batch"] for r in chosen], "o-", label=backend
            )
        axes.set(xlabel=label)
        axes.grid(alpha=0.3)
    panels[0].set(ylabel="µs for the gradient of all chains")
    panels[0].legend(frameon=False)
    figure.suptitle("Cost of ChEES on a Gaussian")
    figure.savefig(path, dpi=120)
