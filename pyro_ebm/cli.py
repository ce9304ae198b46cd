"""The command line: learn an energy of a table, draw from it, report on both."""

from __future__ import annotations

import argparse
import math
import os
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyro_ebm as ebm
from pyro_ebm._job import draw, fit, plots, report, score, table, text
from pyro_ebm._job.base import JobError, Run, load_run, need, save_run, write_whole

__all__ = ["main"]

INTERRUPTED = 130
DEMO = Path("runs") / "demo"
PICTURES = ("learning.png", "energies.png", "pairs.png", "traces.png", "energy.png")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: The arguments; those of the process if None.

    Returns:
        The exit code: 0, 2 for what the user can mend, 130 when interrupted.
    """
    try:
        given = _parser().parse_args(argv)
        return given.command(given)
    except SystemExit as done:  # argparse's, for --help and wrong arguments
        return int(done.code or 0)
    except JobError as error:
        print(f"pyro-ebm: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("pyro-ebm: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output, `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:  # no permission, no space
        print(f"pyro-ebm: error: {error}", file=sys.stderr)
        return 2


# Commands -------------------------------------------------------------------------------------


def _fit(given: argparse.Namespace) -> int:
    rows = table.read_table(given.data, given.columns, given.array)
    folder = given.out or Path("runs") / Path(rows.source).stem
    _free(folder, given.overwrite)
    names = fit.Settings._fields
    run = _learn(rows, fit.Settings(**{name: getattr(given, name) for name in names}), folder)
    return INTERRUPTED if run.info["learning"]["interrupted"] else 0


def _free(folder: Path, overwrite: bool) -> None:
    """Make a folder for a run."""
    if folder.exists() and not folder.is_dir():
        raise JobError(f"{folder} must be a folder, it is a file")
    if (folder / "run.json").exists() and not overwrite:
        raise JobError(f"{folder} holds a run: choose another --out, or add --overwrite")
    folder.mkdir(parents=True, exist_ok=True)  # where that fails, better before the work


def _learn(rows: Any, settings: fit.Settings, folder: Path) -> Run:
    """Learn, save, judge, and save what was found."""
    run = fit.fit(rows, settings, _say)
    run = save_run(folder, run)
    for old in ("draws.nc", *PICTURES):  # of a run that was here before
        (folder / old).unlink(missing_ok=True)
    _say(f"The energy is kept in {folder}.")
    run = save_run(folder, run._replace(info=run.info | {"held_out": score.score(run)}))
    _say(*text.held_out(run.info))
    return run


def _sample(given: argparse.Namespace) -> int:
    need("h5netcdf", "writing draws")
    run = load_run(given.run)
    names = draw.Draws._fields
    draws = _draw(given.run, run, draw.Draws(**{name: getattr(given, name) for name in names}))
    return INTERRUPTED if draws["posterior"].attrs["interrupted"] else 0


def _draw(folder: Path, run: Run, wanted: draw.Draws) -> Any:
    count = "1 chain" if wanted.chains == 1 else f"{wanted.chains} chains"
    _say(f"Drawing {count} by {wanted.kernel.upper()}, one after the other ...")
    draws = draw.sample(run, wanted, _say)
    draw.write_draws(folder / "draws.nc", draws)
    _say(text.chains(draws["posterior"].attrs), f"The draws are kept in {folder / 'draws.nc'}.")
    return draws


def _report(given: argparse.Namespace) -> int:
    need("matplotlib", "drawing pictures")
    run = load_run(given.run)
    _say(text.about(run.info), "", *text.held_out(run.info), "")
    draws = draw.read_draws(given.run / "draws.nc", run)
    _say(text.chains(draws["posterior"].attrs), "", report.summary(draws), "", *_trust(run, draws))
    energies = report.energies(run, draws)
    pictures = _draw_pictures(given.run, run, draws, energies)
    _say("", text.energies(energies), "", "Pictures:", *(f"  {path}" for path in pictures))
    return 0


def _trust(run: Run, draws: Any) -> list[str]:
    return text.trust(ebm.diagnostics.convergence_warnings(draws), run.info["data"]["columns"])


def _draw_pictures(folder: Path, run: Run, draws: Any, energies: dict[str, Any]) -> list[Path]:
    """Draw all pictures of a run and return where they are."""
    places = report.telling_columns(run)
    names = [run.info["data"]["columns"][i] for i in places]
    beta = float(draws["posterior"].attrs["beta"])
    data, drawn = report.table_rows(run), report.drawn_rows(draws)
    learning = run.info["learning"]
    histories = learning["validation"]["history"], learning["history"]
    painters: dict[str, Callable[[Path], None]] = {
        "learning.png": lambda p: plots.learning(p, *histories),
        "energies.png": lambda p: plots.energies(p, energies, beta),
        "pairs.png": lambda p: plots.pairs(
            p, data[:, places].numpy(), drawn[:, places].numpy(), names, beta
        ),
        "traces.png": lambda p: plots.traces(p, draws, names),
        "energy.png": lambda p: plots.energy(p, draws),
    }
    for name in PICTURES:
        write_whole(folder / name, painters[name])
    return [folder / name for name in PICTURES]


def _demo(given: argparse.Namespace) -> int:
    for module in ("sklearn.datasets", "h5netcdf", "matplotlib"):
        need(module, "the demo")
    folder = given.out or DEMO
    _free(folder, given.overwrite or given.out is None)
    rows = table.read_table(None)
    _say("== 1. Learn an energy: pyro-ebm fit ==")
    defaults = _parser().parse_args(["fit"])
    settings = {name: getattr(defaults, name) for name in fit.Settings._fields}
    settings |= {"steps": given.steps, "seed": given.seed}
    run = _learn(rows, fit.Settings(**settings), folder)
    if run.info["learning"]["interrupted"]:
        _say(f"The demo stops here. To go on: pyro-ebm sample {folder}")
        return INTERRUPTED
    _say("", f"== 2. Draw from it: pyro-ebm sample {folder} ==")
    wanted = draw.Draws(1.0, given.draws, given.warmup, given.chains, "nuts", given.seed)
    draws = _draw(folder, run, wanted)
    _say("", f"== 3. Report: pyro-ebm report {folder} ==", report.summary(draws), "")
    energies = report.energies(run, draws)
    pictures = _draw_pictures(folder, run, draws, energies)
    _say(text.energies(energies), "", "== In plain words ==")
    _say(*text.story(run.info, draws["posterior"].attrs), *_trust(run, draws), "")
    _say(f"Everything is in {folder}:", *text.files(pictures))
    return INTERRUPTED if draws["posterior"].attrs["interrupted"] else 0


def _say(*lines: str) -> None:
    """Print lines; break the long ones, which are prose."""
    for line in lines:
        prose = "\n" not in line  # a summary is none
        indent = " " * (len(line) - len(line.lstrip(" -")))
        wrap = textwrap.TextWrapper(100, subsequent_indent=indent, break_long_words=False)
        print(wrap.fill(line) if prose else line, flush=True)


# Arguments ------------------------------------------------------------------------------------


def _number(
    kind: type, low: float, high: float = math.inf, *, closed: bool = False
) -> Callable[[str], Any]:
    """Return a reader of numbers within bounds: above ``low``, or from it on if ``closed``."""

    def read(given: str) -> Any:
        value = kind(given)
        if not (low <= value if closed else low < value) or not value < high:
            bound = f"at least {low:g}" if closed else f"above {low:g}"
            limit = "finite" if high == math.inf else f"below {high:g}"
            raise argparse.ArgumentTypeError(f"must be {bound} and {limit}, got {given}")
        return value

    read.__name__ = {int: "whole number", float: "number"}[kind]  # in argparse's messages
    return read


_count = _number(int, 1, closed=True)
_positive = _number(float, 0.0)


def _widths(given: str) -> list[int]:
    return [_count(width) for width in given.split(",")]


_widths.__name__ = "list of whole numbers"


def _names(given: str) -> list[str]:
    return [name.strip() for name in given.split(",")]


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults where there are any."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        bare = action.default is None or action.default is False
        return action.help if bare else super()._get_help_string(action)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pyro-ebm",
        description="Learn an energy of a table of numbers, draw from it, and report on both.",
    )
    parser.add_argument("--version", action="version", version=f"pyro-ebm {ebm.__version__}")
    commands = parser.add_subparsers(required=True, metavar="{fit,sample,report,demo}")
    for name, about, add, command in (
        ("fit", "learn an energy of a table", _fit_arguments, _fit),
        ("sample", "draw from a learned energy", _sample_arguments, _sample),
        ("report", "summarise draws and draw pictures", _report_arguments, _report),
        ("demo", "all three on the wine data, in about two minutes", _demo_arguments, _demo),
    ):
        part = commands.add_parser(name, help=about, description=about, formatter_class=_Help)
        add(part.add_argument)
        part.set_defaults(command=command)
    return parser


def _out_arguments(add: Callable[..., Any], default: str) -> None:
    add("--out", type=Path, metavar="RUN", help=f"the folder to write (default: {default})")
    add("--overwrite", action="store_true", help="replace the run that is in the folder")


def _fit_arguments(add: Callable[..., Any]) -> None:
    add("data", nargs="?", metavar="DATA", help="a CSV, NPY or NPZ file; without one, wine data")
    _out_arguments(add, "runs/ and the name of DATA")
    add("--columns", type=_names, metavar="A,B,...", help="columns by name or number from 1")
    add("--array", metavar="NAME", help="the array to take from an NPZ file")
    add("--steps", type=_count, default=1000, help="the most steps of learning")
    add("--hidden", type=_widths, default="64,64", metavar="N,N,...", help="hidden layers")
    add("--lr", type=_positive, default=3e-3, help="learning rate")
    decay = _number(float, 0.0, closed=True)
    add("--weight-decay", type=decay, default=150.0, help="of AdamW, times the number of rows")
    add("--batch", type=_count, default=64, help="rows per step")
    add("--chains", type=_count, default=512, help="Markov chains for the negatives")
    add("--moves", type=_count, default=5, help="moves of each chain per step")
    add("--held-out", type=_number(float, 0.0, 1.0), default=0.2, help="fraction of the rows")
    validation = _number(float, 0.0, 1.0, closed=True)
    about = "fraction of the training rows that says when to stop; 0 makes all steps"
    add("--validation", type=validation, default=0.2, help=about)
    _seed_argument(add)


def _sample_arguments(add: Callable[..., Any]) -> None:
    add("run", type=Path, metavar="RUN", help="a folder that fit wrote")
    about = "inverse temperature: 1 is the learned law, towards 0 the Gaussian"
    add("--beta", type=_positive, default=1.0, help=about)
    _chain_arguments(add, 500)
    add("--kernel", choices=sorted(draw.KERNELS), default="nuts", help="Markov kernel")
    _seed_argument(add)


def _chain_arguments(add: Callable[..., Any], draws: int) -> None:
    add("--draws", type=_number(int, draw.FEWEST, closed=True), default=draws, help="per chain")
    add("--warmup", type=_number(int, 0, closed=True), default=300, help="draws to adapt in")
    add("--chains", type=_count, default=4, help="chains, one after the other")


def _report_arguments(add: Callable[..., Any]) -> None:
    add("run", type=Path, metavar="RUN", help="a folder that fit and sample wrote")


def _demo_arguments(add: Callable[..., Any]) -> None:
    _out_arguments(add, str(DEMO))
    add("--steps", type=_count, default=1000, help="the most steps of learning")
    _chain_arguments(add, 2000)
    _seed_argument(add)


def _seed_argument(add: Callable[..., Any]) -> None:
    add("--seed", type=_number(int, 0, closed=True), default=0, help="repeats a run exactly")
