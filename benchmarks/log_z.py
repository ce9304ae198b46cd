"""Cost against error of the methods for log Z, with the AIS of rbms and ebmkit in the same run.

From the root of a checkout, where ``.[bench]`` and ``.[test]`` are installed::

    python -m benchmarks.log_z --output log_z.json --plot docs/images/log_z.png
    python -m benchmarks.log_z --torus      annealing on the torus at T = 2, T_c and 3
    python -m benchmarks.log_z --contract   every method on every target, 100 seeds
    python -m benchmarks.log_z --quick      a minute, to see that it runs

All contenders run in one process of one thread, on the same energies in double precision, which
count how often they are asked. Seeds run in a batch where a library can have it so; the seconds
are those of one of them alone. Annealers have the same numbers of particles and of temperatures;
the other methods get sizes of about the same cost. A peer that is not installed has a row that
says so.
"""

import argparse
import importlib
import json
import math
import platform
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch

import pyro_ebm as ebm
from benchmarks import log_z_peers as peers
from pyro_ebm.partition import MBAR, SMC, Annealed, Bridge, Importance, Laplace, Table
from pyro_ebm.partition.base import MIN_ESS, from_weights
from tests.partition_targets import LAYERS, RBM_JOINT, TARGETS, checkerboard, heat_bath
from tests.test_partition_targets import trial

TABLE = ("ising16_Tc", "rbm", "gaussian20", "bimodal")
TORUS = ("ising16_2", "ising16_Tc", "ising16_3")
STEPS = (30, 100, 300)  # the sizes: temperatures of an annealer of 100 particles
PARTICLES = 100
LIBRARIES = ("torch", "pyro-ppl", "rbms", "ebmkit", "numpy")


class Counted:
    """An energy that counts its points, and those whose gradient is asked for."""

    def __init__(self, energy):
        self.energy, self.energies, self.gradients = energy, 0, 0

    def __call__(self, x):
        value = self.energy(x)
        self.add(**{"gradients" if x.requires_grad else "energies": value.numel()})
        return value

    def __deepcopy__(self, memo):
        return self

    def add(self, energies=0, gradients=0):
        self.energies += energies
        self.gradients += gradients


class Job(NamedTuple):
    """The estimates that are asked for: a target by name, a size, and how many."""

    name: str
    energy: Counted
    steps: int
    seeds: int

    @property
    def target(self):
        return target_of(self.name)

    @property
    def blocks(self):
        """Which spins are independent given the rest; None where there are no spins."""
        if self.name == "rbm_joint":
            return LAYERS
        return checkerboard(16) if self.name.startswith("ising16") else None


class Contender(NamedTuple):
    """Maps a job to values, standard errors and effective sample sizes, each ``(seeds,)``."""

    run: Callable[[Job], Any]
    targets: tuple[str, ...]
    package: str = "pyro-ebm"
    batched: bool = True


def target_of(name):
    return RBM_JOINT if name == "rbm_joint" else TARGETS[name]


# Contenders --------------------------------------------------------------------------------------


def ours(make, job):
    """Run a method of ours on equal temperatures, for each of which it draws anew."""
    target = job.target
    beta = target.beta if job.seeds == 1 else torch.full((job.seeds,), target.beta)
    d = ebm.GibbsBoltzmann(job.energy, target.base(), beta)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore", ebm.UnnormalizedWarning)  # the table says it
        return [part.reshape(-1) for part in ebm.log_partition(d, make(job))]


def kernel(job):
    return None if job.blocks is None else partial(heat_bath, blocks=job.blocks)


def annealed(job, **options):
    return Annealed(kernel(job), PARTICLES, job.steps, **options)


def table(job):
    """Make a table of 25 nodes and 8 ladders; its energies are vmapped, so count by formula."""
    made = Table(0.0, 1.0, 25, num_chains=8, num_samples=job.steps)
    job.energy.add(gradients=25 * 8 * (made.warmup + job.steps) * 4)  # leapfrog steps of a move
    return made


def rbms(job):
    name = "rbm" if job.name == "rbm_joint" else job.name
    value = peers.rbms_ais(name, job.target, PARTICLES, job.steps, job.energy.add)
    return torch.tensor([value]), torch.tensor([math.nan]), torch.tensor([math.nan])


def ebmkit(job, **options):
    """Run ebmkit once with the particles of all seeds, and part them."""
    particles = PARTICLES * job.seeds
    weights = peers.ebmkit_weights(job.target, job.energy, particles, job.steps, **options)
    return from_weights(weights.reshape(PARTICLES, job.seeds))


SPINS, SMOOTH = (*TORUS, "rbm_joint"), ("gaussian20", "bimodal")

CONTENDERS = {
    "importance": Contender(
        partial(ours, lambda job: Importance(num_particles=4 * PARTICLES * job.steps)),
        ("rbm", *SMOOTH),
    ),
    "annealed": Contender(partial(ours, annealed), (*SPINS, "rbm", *SMOOTH)),
    "annealed, reverse": Contender(
        partial(ours, partial(annealed, reverse=True)), ("rbm_joint", *SMOOTH)
    ),
    "smc": Contender(
        partial(ours, lambda job: SMC(kernel(job), 3 * job.steps)), (*SPINS, *SMOOTH)
    ),
    "bridge": Contender(partial(ours, lambda job: Bridge(num_samples=3 * job.steps)), SMOOTH),
    "mbar": Contender(
        partial(ours, lambda job: MBAR(8, 16, job.steps, warmup=100)),
        SMOOTH,
    ),
    "table": Contender(partial(ours, table), SMOOTH, batched=False),
    "laplace": Contender(partial(ours, lambda job: Laplace(3 * job.steps)), SMOOTH),
    "rbms AIS": Contender(rbms, SPINS, "rbms", batched=False),
    "ebmkit AIS, heat bath": Contender(
        lambda job: ebmkit(job, blocks=job.blocks), SPINS, "ebmkit"
    ),
    "ebmkit AIS, Gibbs with gradients": Contender(
        lambda job: ebmkit(job, gradients=1), ("ising16_Tc", "rbm"), "ebmkit"
    ),
    "ebmkit AIS, HMC": Contender(ebmkit, SMOOTH, "ebmkit"),
}


def absent(package):
    """Whether a package is not installed."""
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return True
    return False


# Measuring ---------------------------------------------------------------------------------------


def once(contender, name, steps, seed, seeds=1):
    """Run seeds at once; return errors, their claims, effective sample sizes, counts, seconds."""
    torch.manual_seed(seed)
    energy = Counted(target_of(name).energy)
    clock = time.perf_counter()
    value, std_error, ess = contender.run(Job(name, energy, steps, seeds))
    seconds = time.perf_counter() - clock
    cost = torch.tensor([energy.energies, energy.gradients]) / seeds
    return (value - target_of(name).log_z(), std_error, ess), cost, seconds


def row_of(contender, name, steps, args):
    """Run one seed for its time, then all, and sum them up."""
    parts, cost, seconds = once(contender, name, steps, args.seeds)
    if contender.batched:
        parts, cost, _ = once(contender, name, steps, 0, args.seeds)
    else:
        most = max(args.least, min(args.seeds, int(args.limit / seconds)))
        runs = [parts, *(once(contender, name, steps, seed)[0] for seed in range(1, most))]
        parts = [torch.cat(part) for part in zip(*runs, strict=True)]
    off, error, ess = parts
    doubted = ess < MIN_ESS if contender.batched else torch.zeros_like(ess, dtype=torch.bool)
    return {
        "steps": steps, "seeds": len(off),
        "rmse": float(off.square().mean().sqrt()), "bias": float(off.mean()),
        "largest": float(off.abs().max()), "std_error": float(error.median()),
        "doubted": int(doubted.sum()),
        "kept": int(((off.abs() <= 3 * error + 1e-9) | doubted).sum()),
        "energies": float(cost[0]), "gradients": float(cost[1]), "seconds": seconds,
    }  # fmt: skip


def measure(args):
    """Give a row for each target, contender and size."""
    for name in args.targets:
        names = (name, "rbm_joint") if name == "rbm" else (name,)
        for label, contender in CONTENDERS.items():
            for at in (n for n in names if n in contender.targets):
                swept = label == "annealed" and at == "rbm"  # visible units one by one
                shown = label + ", sweeps" * swept
                if absent(contender.package):
                    why = f"{contender.package} is not installed: pip install pyro-ebm[bench]"
                    yield {"target": name, "contender": shown, "missing": why}
                    continue
                for steps in args.steps:
                    row = row_of(contender, at, steps, args)
                    yield {"target": name, "contender": shown, **row}


def blocks_of(name):
    """The heat bath of a target of spins, None elsewhere."""
    if name == "rbm_joint":
        return partial(heat_bath, blocks=LAYERS)
    size = {"ising8": 8, "ising1": 16}.get(name[:6])
    return partial(heat_bath, blocks=checkerboard(size)) if size else None


LOW = ("gaussian2", "double_well", "ring", "truncated", "simplex", "bimodal")
TORI = tuple(name for name in TARGETS if name.startswith(("ising8", "ising16")))
FULL = (
    ("importance", lambda _: Importance(num_particles=20_000), (*LOW, "glass", "ising3", "rbm")),
    (
        "annealed",
        lambda name: Annealed(blocks_of(name), 100, 300),
        (*LOW, "gaussian20", "glass", "ising3", "rbm", "rbm_joint", *TORI),
    ),
    (
        "reverse",
        lambda name: Annealed(blocks_of(name), 100, 300, reverse=True),
        (*LOW, "glass", "ising3", "rbm_joint"),
    ),
    (
        "smc",
        lambda name: SMC(blocks_of(name), 500, 3),
        (*LOW, "gaussian20", "glass", "ising3", "rbm", "rbm_joint", *TORI),
    ),
    ("bridge", lambda _: Bridge(num_samples=500), (*LOW, "glass", "ising3")),
    ("mbar", lambda _: MBAR(6, 16, 100), (*LOW, "gaussian20", "ising3")),
    ("laplace", lambda _: Laplace(), (*LOW, "gaussian20")),
)


def contract(args):
    """Run the contract of the tests on every target, in larger sizes and one batch of seeds."""
    for label, make, names in FULL:
        for name in names:
            clock = time.perf_counter()
            torch.manual_seed(0)
            result = trial(make(name), target_of(name), args.seeds)
            yield {
                "target": name, "contender": label, "seeds": args.seeds, "kept": result.kept,
                "trusted": int(result.trusted.sum()),
                "rmse": float(result.off.square().mean().sqrt()),
                "rms z": float(result.z.square().mean().sqrt()),
                "seconds": time.perf_counter() - clock,
            }  # fmt: skip


# Output ------------------------------------------------------------------------------------------


HEAD = ("target", "method", "error", "bias", "claimed", "kept", "doubted", "evaluations", "s")


def compact(rows):
    """Give one line for each target and contender, with its sizes in order."""
    for key in dict.fromkeys((row["target"], row["contender"]) for row in rows):
        sizes = [row for row in rows if (row["target"], row["contender"]) == key]
        if "missing" in sizes[0]:
            yield *key, sizes[0]["missing"]
            continue
        join = lambda form, sizes=sizes: "; ".join(form(row) for row in sizes)
        yield (
            *key,
            join(lambda r: f"{r['rmse']:.2g}"),
            join(lambda r: f"{r['bias']:+.2g}"),
            join(lambda r: f"{r['std_error']:.2g}".replace("nan", "–")),
            join(lambda r: f"{r['kept']}/{r['seeds']}" if r["std_error"] >= 0 else "–"),
            join(lambda r: str(r["doubted"])),
            join(lambda r: f"{(r['energies'] + r['gradients']) / 1000:,.0f}k"),
            join(lambda r: f"{r['seconds']:.2g}"),
        )


def plain(rows):
    """Give a line for each row."""
    for row in rows:
        yield [f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()]


def show(head, lines):
    print("|", " | ".join(head), "|\n|" + "---|" * len(head))
    for line in lines:
        print("|", " | ".join(line), "|")


def plot(rows, path):
    """Draw error against cost, a panel for each target."""
    plt = importlib.import_module("matplotlib.pyplot")
    names = list(dict.fromkeys(row["target"] for row in rows))
    labels = list(dict.fromkeys(row["contender"] for row in rows))
    figure, axes = plt.subplots(1, len(names), figsize=(4.2 * len(names), 4.6), squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        for i, label in enumerate(labels):
            mine = [r for r in rows if (r["target"], r["contender"]) == (name, label)]
            mine = [r for r in mine if r.get("rmse", 0.0) > 1e-6]  # the exact have no place here
            if not mine:
                continue
            cost = [r["energies"] + r["gradients"] for r in mine]
            style = "--" if "AIS" in label else "-"
            color, marker = f"C{i % 10}", "os^vDP*Xdh<>p8"[i % 14]
            error = [r["rmse"] for r in mine]
            axis.loglog(cost, error, style, color=color, marker=marker, label=label, markersize=5)
        axis.set(title=name, xlabel="energies and gradients per estimate")
        axis.xaxis.set_minor_formatter("")
        axis.yaxis.set_minor_formatter("")
        axis.grid(alpha=0.3, which="both")
    axes[0, 0].set_ylabel("root mean squared error of log Z (nats)")
    handles = {}
    for axis in axes[0]:
        handles |= dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles, loc="lower center", ncols=5, frameon=False)
    figure.tight_layout(rect=(0, 0.16, 1, 1))
    figure.savefig(path, dpi=110)


def main():
    """Print a table, and write it and its plot where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--targets", nargs="+", choices=(*TABLE, *TORUS), default=TABLE)
    parser.add_argument("--steps", nargs="+", type=int, default=STEPS)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--limit", type=float, default=30.0, help="seconds of seeds one by one")
    parser.add_argument("--least", type=int, default=5, help="seeds that run in any case")
    parser.add_argument("--contenders", nargs="+", choices=list(CONTENDERS))
    parser.add_argument("--torus", action="store_true", help="the torus at three temperatures")
    parser.add_argument("--contract", action="store_true", help="every target, batches of seeds")
    parser.add_argument("--quick", action="store_true", help="two small sizes, three seeds")
    parser.add_argument("--output", type=Path, help="write JSON")
    parser.add_argument("--plot", type=Path, help="draw error against cost")
    args = parser.parse_args()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    if args.torus:
        args.targets = TORUS
    if args.quick:
        args.steps, args.seeds = (10, 30), 3
    for name in set(CONTENDERS) - set(args.contenders or CONTENDERS):
        del CONTENDERS[name]
    versions = {name: None if absent(name) else metadata.version(name) for name in LIBRARIES}
    about = {"versions": versions, "machine": platform.machine(), "command": sys.argv[1:]}
    rows = []
    for row in contract(args) if args.contract else measure(args):
        rows.append(row)
        print(row["target"], row["contender"], row.get("steps", ""), file=sys.stderr)
        if args.output:  # also of a run that is cut off
            args.output.write_text(json.dumps({**about, "rows": rows}, indent=1))
    if args.contract:
        show(rows[0], plain(rows))
    else:
        show(HEAD, compact(rows))
    print("\n" + ", ".join(f"{name} {v or 'not installed'}" for name, v in versions.items()))
    if args.plot:
        plot(rows, args.plot)


if __name__ == "__main__":
    main()
