"""Every way to learn an energy, against exact likelihoods, with peers in the same run.

From the root of a checkout, where ``.[bench]`` and ``.[test]`` are installed::

    python -m benchmarks.learning                 all parts: an hour
    python -m benchmarks.learning rbm plane       some of them
    python -m benchmarks.learning --quick         minutes, to see that it runs
    python -m benchmarks.learning --output F      the rows as JSON, too

Each part runs in one thread of this process, prints its table and says what it took. A peer that
is not installed has a row that says so.
"""

import argparse
import importlib
import json
import platform
import time
from importlib import metadata
from pathlib import Path

import torch

PARTS = {
    "rbm": "restricted Boltzmann machines: digits, bars and stripes",
    "plane": "densities in the plane",
    "ising": "couplings of Ising models",
    "noise": "the variance of noise contrast; energy discrepancy",
    "discrete": "kernels on finite supports",
    "cost": "what a contrastive step costs",
}
LIBRARIES = ("torch", "pyro-ppl", "scikit-learn", "rbms", "torchebm", "ebmkit")


def versions():
    """Return the versions of the libraries that take part."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def table(rows):
    """Return rows as a table; those of other columns begin another one."""
    lines, columns = [], None
    for row in rows:
        if list(row) != columns:
            columns = list(row)
            lines += ["", f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
        lines.append(f"| {' | '.join(map(shown, row.values()))} |")
    return "\n".join(lines)


def shown(value):
    """Return a cell: numbers with four digits."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main(args):
    torch.set_num_threads(1)
    done = {"versions": versions(), "rows": {}}
    print(" ".join(f"{name} {version}" for name, version in done["versions"].items()))
    for part in args.parts or PARTS:
        wall, cpu = time.perf_counter(), time.process_time()
        torch.manual_seed(args.seed)
        rows = importlib.import_module(f"benchmarks.learning_{part}").run(args.quick)
        done["rows"][part] = rows
        print(f"\n## {part}: {PARTS[part]}\n{table(rows)}")
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        print(f"\n{wall:.0f} s, {cpu:.0f} s of CPU", flush=True)
        if args.output:
            Path(args.output).write_text(json.dumps(done, indent=1))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("parts", nargs="*", metavar="part", help=", ".join(PARTS))
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it runs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", metavar="FILE", help="write the rows as JSON")
    args = parser.parse_args()
    if set(args.parts) - set(PARTS):
        parser.error(f"part must be one of {', '.join(PARTS)}, got {args.parts}")
    main(args)
