"""Our batched samplers against those of Pyro, NumPyro, blackjax and torchebm.

    pip install -c constraints.txt -e ".[bench]"
    python benchmarks/samplers.py table --output table.json
    python benchmarks/samplers.py overhead --output overhead.json
    python benchmarks/samplers.py scaling --plot scaling.png
    python benchmarks/samplers.py truth

`table` runs all contenders in one process on the same targets, first points (uniform on (-2, 2))
and numbers of draws, in single precision, in the order A B A B. It prints Markdown: medians, and
the range of the speed over the repeats; R-hat and errors are the worst of the repeats. `README.md`
beside this file says what the columns mean.
"""

import argparse
import contextlib
import json
import os
import platform
import signal
import sys
from functools import partial
from importlib import metadata
from pathlib import Path

import jax_peers
import numpy as np
import torch
import torch_peers
from contender import Job
from quality import result
from targets import TRUTH, targets

PEERS = {**torch_peers.PEERS, **jax_peers.PEERS}
DRAWS = {4: 1000, 64: 500}  # by the most chains; beyond, MANY
MANY = 200
QUICK = {"draws": 40, "warmup": 40, "repeats": 1, "chains": [4]}
LIBRARIES = ("torch", "pyro-ppl", "jax", "numpyro", "blackjax", "torchebm", "arviz", "numpy")
COLUMNS = (
    "target", "chains", "contender", "ESS/s", "range", "tail ESS/s", "ESS/1000 grad.", "R-hat",
    "mean error", "sd ratio", "modes", "sampling s", "warm-up s", "compile s", "gradients",
    "executed/useful", "CPU s/wall s", "note",
)  # fmt: skip


class OutOfTime(Exception):  # noqa: N818, it is a result
    """A contender took longer than it may."""


@contextlib.contextmanager
def limit(seconds):
    """Raise `OutOfTime` in the main thread after that many seconds of wall time."""

    def late(*_):
        raise OutOfTime(f"none in {seconds:g} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# The table ---------------------------------------------------------------------------------------


def contenders(names):
    """Return the named contenders; ours are imported only if one of them is named."""
    known = dict(PEERS)
    if any(name.startswith("ebm-") for name in names):
        from ours import OURS

        known |= OURS
    unknown = [name for name in names if name not in known]
    if unknown:
        raise SystemExit(f"unknown contenders {unknown}; there are {', '.join(known)}")
    return {name: known[name] for name in names}


def attempt(step, seconds):
    """Return `(value, "")`, or None and the reason why there is none."""
    try:
        with limit(seconds):
            return step(), ""
    except OutOfTime as late:
        return None, str(late)
    except ImportError as error:
        raise SystemExit(str(error)) from error
    except Exception as error:
        return None, f"failed: {type(error).__name__}: {str(error).splitlines()[0][:80]}"


def run_once(target, job, contender, ready, seed):
    """Run a contender, which is prepared before its first run and kept in `ready`."""
    if contender not in ready:
        ready[contender] = contender.prepare(target, job)
    return ready[contender](seed)


def measure(target, job, chosen, args):
    """Run all contenders on one target; return the runs and the failures by name.

    Who has failed once is not asked again.
    """
    runs, failed, ready = {name: [] for name in chosen}, {}, {}
    for repeat in range(args.repeats):
        for name, contender in chosen.items():
            if name in failed:
                continue
            call = partial(run_once, target, job, contender, ready, args.seed + repeat)
            record, reason = attempt(call, args.limit)
            if reason:
                failed[name] = reason
            else:
                runs[name].append(result(record, target))
            print(target.name, job.chains, name, reason, file=sys.stderr)
    return runs, failed


def table(args):
    """Return one row for each target, number of chains and contender."""
    rng, rows, chosen = np.random.default_rng(args.seed), [], contenders(args.contenders)
    for name in args.targets:
        target = targets()[name]
        for chains in args.chains:
            draws = args.draws or next((DRAWS[n] for n in DRAWS if chains <= n), MANY)
            inits = rng.uniform(-2, 2, (chains, target.dim)).astype(np.float32)
            job = Job(chains, draws, args.warmup, inits)
            fitting = {n: c for n, c in chosen.items() if chains <= c.most_chains}
            runs, failed = measure(target, job, fitting, args)
            for contender in fitting:
                row = {"target": name, "chains": chains, "draws": draws, "contender": contender}
                reason = failed.get(contender, "")
                rows.append({**row, "runs": runs[contender], "failed": reason})
            if args.output:
                save(args, rows)
    return rows


def cells(row):
    """Return one row of the table as text."""
    head = [row["target"], str(row["chains"]), row["contender"]]
    runs = row["runs"]
    if not runs:
        return [*head, *["–"] * (len(COLUMNS) - 4), row["failed"]]

    def middle(get):
        return float(np.median([get(run) for run in runs]))

    def worst(key):
        return max((run[key] for run in runs), key=lambda v: (np.isnan(v), v))

    speeds = [run["bulk_per_s"] for run in runs]
    ratio = max((run["sd_ratio"] for run in runs), key=lambda v: abs(np.log(v)))
    useful = middle(lambda run: run["gradients"]["sampling"])
    wall = middle(lambda run: run["seconds"]["warmup"] + run["seconds"]["sampling"])
    return [
        *head,
        f"{np.median(speeds):,.0f}",
        f"{min(speeds):,.0f}–{max(speeds):,.0f}",
        f"{middle(lambda run: run['tail_per_s']):,.0f}",
        f"{middle(lambda run: run['bulk_per_1000']):.3g}",
        f"{worst('rhat'):.3f}",
        f"{worst('mean_error'):.3f}",
        f"{ratio:.3f}",
        f"{worst('modes'):.3f}" if "modes" in runs[0] else "",
        f"{middle(lambda run: run['seconds']['sampling']):.3g}",
        f"{middle(lambda run: run['seconds']['warmup']):.3g}",
        f"{max(run['seconds']['compile'] for run in runs):.3g}",
        f"{useful:.3g}",
        f"{middle(lambda run: run['gradients']['executed']) / useful:.2f}",
        f"{middle(lambda run: run['cpu_seconds']):.3g}/{wall:.3g}",
        "; ".join(filter(None, [runs[0]["note"], row["failed"]])),
    ]


def markdown(columns, rows):
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def plain(rows):
    """Return any list of flat rows as Markdown."""
    text = [[f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows]
    return markdown(list(rows[0]), text)


# Truth -------------------------------------------------------------------------------------------


def truth(args):
    """Compute the moments of `logistic` by a long run in double precision; keep them.

    64 chains of NumPyro's NUTS, 4000 draws each.
    """
    import jax

    jax.config.update("jax_enable_x64", True)
    target, chains = targets()["logistic"], 64
    inits = np.random.default_rng(args.seed).uniform(-2, 2, (chains, target.dim))
    job = Job(chains, 400 if args.quick else 4000, 1000, inits)
    x = PEERS["numpyro-nuts"].prepare(target, job)(args.seed).x
    flat = x.reshape(-1, target.dim)
    mean, sd = flat.mean(0).round(6).tolist(), flat.std(0).round(6).tolist()
    TRUTH.write_text(json.dumps({"logistic": {"mean": mean, "sd": sd}}, indent=1) + "\n")
    pairs = zip(mean, sd, strict=True)
    return [{"coordinate": i, "mean": m, "sd": s} for i, (m, s) in enumerate(pairs)]


# Command line ------------------------------------------------------------------------------------


def versions():
    found = {}
    for library in LIBRARIES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[library] = metadata.version(library)
    return found


def save(args, rows):
    """Write rows, settings and versions."""
    kept = {k: v for k, v in vars(args).items() if k not in ("output", "plot")}
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    machine = {"cores": args.threads, "machine": platform.machine(), "load": load}
    whole = {"settings": kept, "machine": machine, "versions": versions(), "rows": rows}
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    Path(args.output).write_text(json.dumps(whole, indent=1) + "\n")


def use_cores(count):
    """Confine this process, and so every library's threads, to that many cores."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:count])
    torch.set_num_threads(count)


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("command", choices=("table", "overhead", "scaling", "truth"))
    parser.add_argument("--targets", nargs="+", choices=list(targets()), metavar="NAME")
    parser.add_argument("--chains", nargs="+", type=int, metavar="N")
    parser.add_argument("--contenders", nargs="+", metavar="NAME")
    parser.add_argument("--backends", nargs="+", default=["eager", "compiled"], metavar="NAME")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--draws", type=int, help="if left out, 1000 to 200 by the chains")
    parser.add_argument("--warmup", type=int, default=500)
    parser.add_argument("--limit", type=float, default=240.0, help="seconds a contender may take")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="let few draws be the default")
    parser.add_argument("--output", metavar="PATH", help="write JSON")
    parser.add_argument("--plot", metavar="PATH", help="write a picture (scaling)")
    if parser.parse_args(argv).quick:
        parser.set_defaults(**QUICK)
    return with_defaults(parser.parse_args(argv))


def with_defaults(args):
    """Fill in what depends on the command."""
    few = args.command == "overhead"
    args.targets = args.targets or (["schools", "logistic", "mlp"] if few else list(targets()))
    args.chains = args.chains or ([64, 1024] if few else [4, 64, 1024])
    args.contenders = args.contenders or [
        *("ebm-chees-compiled", "ebm-chees-eager", "ebm-nuts-compiled", "ebm-tempered-eager"),
        *PEERS,
    ]
    return args


def main(args):
    use_cores(args.threads)
    if args.command == "table":
        rows = table(args)
        print(markdown(COLUMNS, [cells(row) for row in rows]))
    elif args.command == "truth":
        rows = truth(args)
        print(plain(rows))
    else:
        import ours

        rows = getattr(ours, args.command)(args)
        print(plain(rows))
        if args.plot:
            ours.plot_scaling(args.plot, rows)
    if args.output:
        save(args, rows)


if __name__ == "__main__":
    main(parse())
