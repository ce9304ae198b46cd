"""The pictures of a report. Arrays and ArviZ's container come in, PNG files go out."""

from __future__ import annotations

import contextlib
import textwrap
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pyro_ebm._arviz import _import_arviz

DATA, HELD_OUT, DRAWS = "#0072b2", "#009e73", "#d55e00"  # told apart by the colour-blind
DPI = 120
MOST = 1500  # points of a cloud


def energies(path: Path, values: Mapping[str, np.ndarray], beta: float) -> None:
    """Draw histograms of the energies of training rows, held-out rows and draws."""
    figure, ((axes,),) = _figure(1, 1, (8.0, 4.5))
    low, high = _limits(np.concatenate(list(values.values())))
    for (name, energy), colour in zip(values.items(), (DATA, HELD_OUT, DRAWS), strict=True):
        bins = np.linspace(low, high, 1 + int(np.clip(1.5 * len(energy) ** 0.5, 10, 60)))
        filled = name == "draws"
        axes.hist(
            energy,
            bins,
            density=True,
            label=f"{name} ({len(energy):,})",
            color=colour,
            histtype="stepfilled" if filled else "step",
            alpha=0.35 if filled else 1.0,
            linewidth=1.8,
        )
    axes.set_xlabel("energy in nats: beta E(x) - log b(x), with b the Gaussian")
    axes.set_ylabel("density")
    axes.set_title(f"Energies of data and of draws at beta = {beta:g}")
    axes.legend()
    figure.savefig(path, dpi=DPI)


def pairs(
    path: Path, data: np.ndarray, draws: np.ndarray, names: Sequence[str], beta: float
) -> None:
    """Draw columns against each other: data below the diagonal, draws above it."""
    n = len(names)
    size = max(2.3 * n, 5.0)
    figure, grid = _figure(n, n, (size, size + 0.4))
    data, draws = _thin(data), _thin(draws)
    limits = [_limits(np.concatenate([data[:, i], draws[:, i]])) for i in range(n)]
    for i in range(n):
        for j in range(n):
            axes, points, colour = grid[i][j], data, DATA
            if i == j:
                _marginals(axes, data[:, i], draws[:, i], limits[i])
            else:
                if i < j:
                    points, colour = draws, DRAWS
                axes.scatter(points[:, j], points[:, i], 7, colour, alpha=0.45, linewidths=0)
                axes.set_ylim(limits[i])
            axes.set_xlim(limits[j])
            axes.tick_params(labelsize=8, labelbottom=i == n - 1, labelleft=j == 0 and i != j)
            if i < j == n - 1:
                axes.tick_params(right=True, labelright=True)
            axes.locator_params(nbins=4)
        grid[n - 1][i].set_xlabel(_label(names[i]))
        grid[i][0].set_ylabel(_label(names[i]) if n > 1 else "density")
    below, above = (" (below)", " (above)") if n > 1 else ("", "")
    labels = f"data{below}", f"draws at beta = {beta:g}{above}"
    handles = [
        figure.axes[0].scatter([], [], 30, colour, label=label)
        for colour, label in zip((DATA, DRAWS), labels, strict=True)
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=2)
    figure.savefig(path, dpi=DPI)


def _marginals(
    axes: Any, data: np.ndarray, draws: np.ndarray, limits: tuple[float, float]
) -> None:
    bins = np.linspace(*limits, 25)
    axes.hist(draws, bins, density=True, color=DRAWS, alpha=0.35)
    axes.hist(data, bins, density=True, color=DATA, histtype="step", linewidth=1.5)
    axes.set_yticks([])


def learning(path: Path, first: list[list[float]] | None, second: list[list[float]]) -> None:
    """Draw the loss of learning, and the gain on the rows that say when to stop."""
    figure, ((left, right),) = _figure(1, 2, (10.0, 4.0))
    for history, colour, name in (
        (first, HELD_OUT, "without the stopping rows"),
        (second, DATA, "all training rows"),
    ):
        if history:
            steps, loss = np.array([entry[:2] for entry in history]).T
            left.plot(steps, loss, color=colour, label=name)
    left.set_ylabel("loss: minus log-likelihood, nats per row")
    left.legend()
    if first:
        steps, _, gain = np.array(first).T
        right.plot(steps, gain, color=HELD_OUT)
        right.axvline(steps[gain.argmax()], color="grey", linestyle=":", label="best")
        right.legend()
    right.axhline(0.0, color="black", linewidth=0.8)
    right.set_ylabel("gain on the stopping rows over the Gaussian,\nnats per row")
    for axes in (left, right):
        axes.set_xlabel("step")
    figure.savefig(path, dpi=DPI)


def traces(path: Path, draws: Any, names: Sequence[str]) -> None:
    """Draw the traces of some columns, by ArviZ."""
    options: dict[str, Any] = {"var_names": ["x"], "coords": {"column": list(names)}}
    if _is_arviz_0():
        options |= {"compact": False, "figsize": (11, 2.2 * len(names))}
    with _arviz_plot("plot_trace", draws, options) as plot:
        for i, axes in enumerate(getattr(plot, "flat", ())):  # version 0 leaves them bare
            axes.set_title(_label(axes.get_title().partition("\n")[2]).replace("\n", " "))
            axes.set_xlabel("draw" if i % 2 else "")
        _save(plot, path)


def energy(path: Path, draws: Any) -> None:
    """Draw the energies of the chains beside the energies' changes, by ArviZ."""
    with _arviz_plot("plot_energy", draws, {}) as plot:
        if hasattr(plot, "set_xlabel"):
            plot.set_xlabel("Hamiltonian energy in nats, centred")
        _save(plot, path)


def _is_arviz_0() -> bool:
    return hasattr(_import_arviz(), "from_datatree")


@contextlib.contextmanager
def _arviz_plot(name: str, draws: Any, options: Mapping[str, Any]) -> Iterator[Any]:
    """Let ArviZ draw, and close what it leaves open."""
    import matplotlib.pyplot as plt

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ArviZ's own, of its and matplotlib's next versions
        before = set(plt.get_fignums())
        try:
            yield getattr(_import_arviz(), name)(draws, **options)
        finally:
            for number in set(plt.get_fignums()) - before:
                plt.close(number)


def _save(plot: Any, path: Path) -> None:
    """Save a plot: axes from version 0 of ArviZ, a collection of plots from version 1."""
    if hasattr(plot, "savefig"):
        plot.savefig(path, dpi=DPI, bbox_inches="tight")
    else:
        figure = np.ravel(plot)[0].figure
        figure.set_layout_engine("constrained")
        figure.savefig(path, dpi=DPI)


def _figure(rows: int, columns: int, size: tuple[float, float]) -> tuple[Any, Any]:
    """Return a figure that pyplot knows nothing of, and its axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def _thin(rows: np.ndarray) -> np.ndarray:
    return rows[:: -(-len(rows) // MOST)]


def _limits(values: np.ndarray) -> tuple[float, float]:
    low, high = values.min(), values.max()
    room = 0.05 * (high - low) or 1.0
    return low - room, high + room


def _label(name: str) -> str:
    """Break a long name into lines, and keep matplotlib from reading mathematics into it."""
    lines = textwrap.wrap(name.replace("_", " "), 18, max_lines=3, placeholder=" ...")
    return "\n".join(lines).replace("$", r"\$") or " "
