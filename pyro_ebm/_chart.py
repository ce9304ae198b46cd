"""How the numbers of a training run are shown: a table and a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

History = Mapping[str, Sequence[float]]

COLUMNS = {
    "loss": "mean since the last look",
    "energy_data": "mean of beta E - log b on data",
    "energy_negatives": "the same on negatives",
    "sd_data": "spread of the energies of data",
    "sd_negatives": "the same of negatives",
    "gap": "energy of negatives less that of data, in sd; sound: within 3",
    "spread": "sd of beta E, without the base, in nats; flat: below .001",
    "gradient": "norm of the gradient in the parameters",
    "acceptance": "probability of accepting a move",
    "temperature": "sigma^2 / 2 eps of Langevin moves; sound: 1",
    "movement": "of a chain in one update, in spreads of the data",
    "still": "share of chains that did not move in an update",
    "refused": "share of chains from data that are still there",
    "radius": "of the negatives, in reaches of the data; sound: below 3",
    "tails": "share of directions in which the energy grows too little for a normaliser",
    "bounded": "share of components at walls, beyond the data's",
    "stuck": "share of components that are equal in all chains",
    "drift": "of the energy in the second half of the moves, in sd",
    "drift_error": "its standard error",
    "force": "norm of the energy's gradient on data, in spreads",
    "trace": "of the Hessian on data, in spreads",
    "curvature": "largest, on data, in spreads^-2; canyon: above 1e4",
    "log_z": "log Z, or the middle of its bracket",
    "log_z_error": "its error, or half of its bracket",
    "likelihood": "mean log-likelihood of the first batch",
    "held_out": "mean log-likelihood of held-out rows",
}
PANELS = {
    "energies in nats": ("energy_data", "energy_negatives"),
    "gap in sd": ("gap",),
    "norm of the gradient": ("gradient",),
    "chains": ("acceptance", "movement", "still", "refused", "stuck"),
    "reach of the negatives": ("radius",),
    "largest curvature on data": ("curvature",),
    "log-likelihood in nats": ("likelihood", "held_out"),
    "loss": ("loss",),
}
LOGARITHMIC = ("gradient", "curvature")


def known(history: History, name: str) -> tuple[list[float], list[float]]:
    """Return the steps at which a number was measured, and its values."""
    pairs = [p for p in zip(history["step"], history[name], strict=True) if p[1] == p[1]]
    return [step for step, _ in pairs], [value for _, value in pairs]


def table(history: History) -> list[str]:
    """Return a line for each number: its name, course and meaning."""
    lines = [f"{'':<18}{'first':>10}{'last':>10}{'least':>10}{'most':>10}"]
    for name, about in COLUMNS.items():
        _, values = known(history, name)
        if values:
            four = values[0], values[-1], min(values), max(values)
            numbers = "".join(f"{v:>10.3g}" for v in four)
            lines.append(f"{name.replace('_', ' '):<18}{numbers}  {about}")
    return lines


def draw(history: History, marks: Mapping[int, str]) -> Any:
    """Draw a panel for each kind of number that there is, with marks at steps."""
    from matplotlib.figure import Figure

    found = {title: [n for n in names if known(history, n)[1]] for title, names in PANELS.items()}
    panels = [(title, names) for title, names in found.items() if names]
    rows = -(-len(panels) // 2)
    figure = Figure(figsize=(9.0, 2.3 * rows + 0.4), layout="constrained")
    grid = figure.subplots(rows, 2, sharex=True, squeeze=False).flatten()
    for axes, (title, names) in zip(grid, panels, strict=False):
        for name in names:
            axes.plot(*known(history, name), ".-", label=name.replace("_", " "))
        for step in marks:
            axes.axvline(step, color="#d55e00", linewidth=0.8, linestyle="--")
        axes.set(title=title, yscale="log" if names[0] in LOGARITHMIC else "linear")
        if len(names) > 1:
            axes.legend(frameon=False, fontsize="small")
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    for axes in grid[max(len(panels) - 2, 0) : len(panels)]:
        axes.tick_params(labelbottom=True)
        axes.set_xlabel("step")
    said = ", ".join(f"{kind} at step {step}" for step, kind in marks.items())
    figure.suptitle(f"warnings (dashed): {said}" if marks else "no warnings")
    return figure
