"""Cost against error of the methods for log Z, with the AIS of rbms and ebmkit in the same run.

From the root of a checkout, where ``.[bench]`` and ``.[test]`` are installed::

    python -m benchmarks.log_z --output log_z.json --plot docs/images/log_z.png
    python -m benchmarks.log_z --torus      annealing on the torus at T = 2, T_c and 3
    python -m benchmarks.log_z --contract   every method on every target, 100 seeds
    python -m benchmarks.log_z --quick      a minute, to see that it runs

All contenders run in one process of one thread, seed by seed, on the same energies in double
precision, which count how often they are asked. Annealers have the same numbers of particles and
of temperatures; the other methods get sizes of about the same cost. A peer that is not installed
has a row that says so.
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
    """One estimate that is asked for: a target by name, and a size."""

    name: str
    energy: Counted
    steps: int

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
    """Maps a job to value, standard error and whether it is doubted; its targets and package."""

    run: Callable[[Job], Any]
    targets: tuple[str, ...]
    package: str = "pyro-ebm"


class Outcome(NamedTuple):
    """One seed of a contender."""

    off: float
    std_error: float
    doubted: bool
    energies: int
    gradients: int
    seconds: float


def target_of(name):
    return RBM_JOINT if name == "rbm_joint" else TARGETS[name]


# Contenders --------------------------------------------------------------------------------------


def ours(make, job):
    """Run a method of ours, which may say that it cannot be trusted."""
    target = job.target
    d = ebm.GibbsBoltzmann(job.energy, target.base(), target.beta)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        value, std_error, _ = ebm.log_partition(d, make(job))
    doubted = any(issubclass(w.category, ebm.UnnormalizedWarning) for w in said)
    return float(value), float(std_error), doubted


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
    target = job.target
    name = "rbm" if job.name == "rbm_joint" else job.name
    value = peers.rbms_ais(name, target, PARTICLES, job.steps, job.energy.add)
    return *value[:2], False


def ebmkit(job, **options):
    """Run ebmkit; it says to watch its effective sample size, of which we ask ten as of ours."""
    found = peers.ebmkit_ais(job.target, job.energy, PARTICLES, job.steps, **options)
    return *found[:2], found[2] < 10


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
    "table": Contender(partial(ours, table), SMOOTH),
    "laplace": Contender(partial(ours, lambda job: Laplace(3 * job.steps)), SMOOTH),
    "rbms AIS": Contender(rbms, SPINS, "rbms"),
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


def once(contender, name, steps, seed):
    """Run one seed."""
    torch.manual_seed(seed)
    energy = Counted(target_of(name).energy)
    clock = time.perf_counter()
    value, std_error, doubted = contender.run(Job(name, energy, steps))
    seconds = time.perf_counter() - clock
    off = value - target_of(name).log_z()
    return Outcome(off, std_error, doubted, energy.energies, energy.gradients, seconds)


def seeds(contender, name, steps, args):
    """Run the seeds, after the first few only while there is time."""
    outcomes, clock = [], time.perf_counter()
    for seed in range(args.seeds):
        if seed >= args.least and time.perf_counter() - clock > args.limit:
            break
        outcomes.append(once(contender, name, steps, seed))
    return outcomes


def row_of(target, contender, steps, outcomes):
    """Sum up the seeds of a contender."""
    off, error = (torch.tensor([getattr(o, k) for o in outcomes]) for k in ("off", "std_error"))
    doubted = torch.tensor([o.doubted for o in outcomes])
    mean = lambda key: sum(getattr(o, key) for o in outcomes) / len(outcomes)
    return {
        "target": target, "contender": contender, "steps": steps, "seeds": len(outcomes),
        "rmse": float(off.square().mean().sqrt()), "bias": float(off.mean()),
        "largest": float(off.abs().max()), "std_error": float(error.median()),
        "within": int((off.abs() <= 3 * error + 1e-9).sum()), "doubted": int(doubted.sum()),
        "kept": int(((off.abs() <= 3 * error + 1e-9) | doubted).sum()),
        "energies": mean("energies"), "gradients": mean("gradients"), "seconds": mean("seconds"),
    }  # fmt: skip


def measure(args):
    """Return a row for each target, contender and size."""
    rows = []
    for name in args.targets:
        names = (name, "rbm_joint") if name == "rbm" else (name,)
        for label, contender in CONTENDERS.items():
            for at in (n for n in names if n in contender.targets):
                swept = label == "annealed" and at == "rbm"  # visible units one by one
                shown = label + ", sweeps" * swept
                if absent(contender.package):
                    why = f"{contender.package} is not installed: pip install pyro-ebm[bench]"
                    rows.append({"target": name, "contender": shown, "missing": why})
                    continue
                for steps in args.steps:
                    rows.append(row_of(name, shown, steps, seeds(contender, at, steps, args)))
                    print(name, shown, steps, f"{rows[-1]['rmse']:.3g}", file=sys.stderr)
    return rows


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
    rows = []
    for label, make, names in FULL:
        for name in names:
            clock = time.perf_counter()
            torch.manual_seed(0)
            result = trial(make(name), target_of(name), args.seeds)
            rows.append({
                "target": name, "contender": label, "seeds": args.seeds, "kept": result.kept,
                "trusted": int(result.trusted.sum()),
                "rmse": float(result.off.square().mean().sqrt()),
                "rms z": float(result.z.square().mean().sqrt()),
                "seconds": time.perf_counter() - clock,
            })  # fmt: skip
            print(rows[-1], file=sys.stderr)
    return rows


# Output ------------------------------------------------------------------------------------------


def cells(row):
    if "missing" in row:
        return row["target"], row["contender"], row["missing"]
    cost = row["energies"] + row["gradients"]
    claimed = f"{row['std_error']:.2g}" if math.isfinite(row["std_error"]) else "–"
    kept = f"{row['kept']}" if math.isfinite(row["std_error"]) else "–"
    share = row["gradients"] / cost
    return (
        row["target"], row["contender"], str(row["steps"]), str(row["seeds"]),
        f"{row['rmse']:.2g}", f"{row['bias']:+.2g}", f"{row['largest']:.2g}", claimed, kept,
        str(row["doubted"]), f"{cost:.2g}", f"{share:.0%}", f"{row['seconds']:.2g}",
    )  # fmt: skip


HEAD = (
    "target", "method", "size", "seeds", "error", "bias", "largest", "claimed", "kept", "doubted",
    "evaluations", "gradients", "s",
)  # fmt: skip


def show(rows, head, cells):
    print("|", " | ".join(head), "|\n|" + "---|" * len(head))
    for row in rows:
        print("|", " | ".join(cells(row)), "|")


def plot(rows, path):
    """Draw error against cost, a panel for each target."""
    plt = importlib.import_module("matplotlib.pyplot")
    names = list(dict.fromkeys(row["target"] for row in rows))
    labels = list(dict.fromkeys(row["contender"] for row in rows))
    figure, axes = plt.subplots(1, len(names), figsize=(4.2 * len(names), 4.6), squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        for i, label in enumerate(labels):
            mine = [r for r in rows if (r["target"], r["contender"]) == (name, label)]
            mine = [r for r in mine if "rmse" in r]
            cost = [r["energies"] + r["gradients"] for r in mine]
            style = "--" if "AIS" in label else "-"
            color, marker = f"C{i % 10}", "os^vDP*Xdh<>p8"[i % 14]
            axis.loglog(cost, [max(r["rmse"], 1e-4) for r in mine], style, color=color,
                        marker=marker, label=label, markersize=5)  # fmt: skip
        axis.set(title=name, xlabel="energies and gradients per estimate")
        axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("root mean squared error of log Z (nats)")
    handles = {}
    for axis in axes[0]:
        handles |= dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    drawn = {k: h for k, h in handles.items() if len(h.get_xdata())}
    figure.legend(drawn.values(), drawn, loc="lower center", ncols=4, frameon=False)
    figure.tight_layout(rect=(0, 0.16, 1, 1))
    figure.savefig(path, dpi=110)


def main():
    """Print a table, and write it and its plot where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--targets", nargs="+", choices=(*TABLE, *TORUS), default=TABLE)
    parser.add_argument("--steps", nargs="+", type=int, default=STEPS)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--limit", type=float, default=30.0, help="seconds for a row, after which")
    parser.add_argument("--least", type=int, default=5, help="so many seeds are enough")
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
    rows = contract(args) if args.contract else measure(args)
    versions = {name: None if absent(name) else metadata.version(name) for name in LIBRARIES}
    if args.contract:
        show(rows, list(rows[0]), lambda row: [
            f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()
        ])  # fmt: skip
    else:
        show(rows, HEAD, cells)
    print("\n" + ", ".join(f"{name} {v or 'not installed'}" for name, v in versions.items()))
    if args.output:
        about = {"versions": versions, "machine": platform.machine(), "command": sys.argv[1:]}
        args.output.write_text(json.dumps({**about, "rows": rows}, indent=1))
    if args.plot:
        plot(rows, args.plot)


if __name__ == "__main__":
    main()
