"""The signs of failing training, each a rule on the numbers of the last looks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

NONE = [float("nan")] * 3
History = Mapping[str, Sequence[float]]
LOOKS = 2  # a sign must show itself in so many looks in a row, unless one is proof


def find(history: History) -> dict[str, str]:
    """Return what is wrong at the last look: kind -> what was seen and what to do.

    The symptoms of what is found are left out: they would mislead. What a look has not measured
    is "".
    """
    found: dict[str, str] = {}
    hidden: set[str] = set()
    for kind, rule in RULES.items():  # causes come first, and what is hidden hides nothing
        text = None if kind in hidden else rule(history)
        if text is not None:
            found[kind] = text
        if text:
            hidden |= set(SYMPTOMS.get(kind, ()))
    return found


def _last(history: History, name: str, count: int = LOOKS) -> list[float]:
    """Return the last numbers; where one is missing, NaN, which no comparison holds for."""
    values = history[name][-count:]
    return list(values) if len(values) == count and sum(values) == sum(values) else NONE[:count]


def _grows(values: Sequence[float], factor: float) -> bool:
    return len(values) > 2 and all(
        b > factor * a for a, b in zip(values, values[1:], strict=False)
    )


def _blow_up(history: History) -> str | None:
    """Energies of data, which stay where they are, far beyond those of any sound run.

    Those of negatives grow also where these run away, which is another kind.
    """
    dim = history["dim"][-1]
    for name, most in (("sd_data", 100 * (1 + dim**0.5)), ("energy_data", 100 * (1 + dim))):
        size = [abs(value) for value in history[name]]
        lasts = min(size[-LOOKS:]) > most or _grows(size[-3:], 2.0)
        if lasts and size[-1] > max(most, 10 * min(size)):
            what = "spread" if name == "sd_data" else "mean"
            return (
                f"energies blow up: their {what} over the data is {_list(size[-3:])} at the last "
                f"looks, from {min(size):.3g}. Lower the learning rate, clip gradients, or hold "
                "the energies down by losses.energy_l2 or spectral_norm"
            )
    return None


def _frozen(history: History) -> str | None:
    rate, move = _last(history, "acceptance", 2), _last(history, "movement")
    still, refused = _last(history, "still"), _last(history, "refused")
    if max(rate) < 0.01:
        seen = f"moves are accepted with a probability of {rate[-1]:.2g}"
    elif min(still) > 0.98:
        seen = f"{still[-1]:.0%} of them did not move at all in an update"
    elif min(refused) > 0.98:
        seen = f"{refused[-1]:.0%} of them end where they start, at their data"
    elif max(move) < 1e-3:
        seen = f"they move by {move[-1]:.2g} of the data's spread in an update"
    else:
        return None
    return (
        f"the chains are frozen: {seen}. Change their step (smaller where moves are rejected, "
        "larger where they are made), or start them anew"
    )


def _saturated(history: History) -> str | None:
    bounded, stuck = _last(history, "bounded"), _last(history, "stuck")
    if max(_last(history, "acceptance")) < 0.01:  # where they stand is not of their choice
        return None
    if min(bounded) > 0.5:
        seen = f"{bounded[-1]:.0%} more of their components than of the data's are at the walls"
    elif min(stuck) > 0.9:
        seen = f"all chains have the same value in {stuck[-1]:.0%} of the components"
    else:
        return None
    return (
        f"the chains are saturated: {seen}. The energy is too steep for its parameters' learning "
        "rate: lower it, use weight decay, and start the chains anew"
    )


def _runaway(history: History) -> str | None:
    """Negatives beyond the data, at lower energies: the mass of the model is out there."""
    radius, energy = _last(history, "radius", 3), _last(history, "energy_negatives", 3)
    falls, out = energy[0] > energy[1] > energy[2], f"at {radius[-1]:.3g} times the data's reach"
    if falls and _grows(radius, 1.1) and radius[-1] > 3:
        seen = f"the negatives run away while their energy falls: {_list(energy)}, {out}"
    elif min(_last(history, "radius")) > 3 and max(_last(history, "gap")) < -1:
        below = -history["gap"][-1]
        seen = f"the negatives are {out}, and their energies {below:.3g} sd below the data's"
    else:
        tails = max((v for v in history["tails"][-LOOKS:] if v == v), default=0.0)
        if tails < 0.02:
            return None
        seen = f"in {tails:.0%} of the directions the energy grows less than D log r"
    return (
        f"the energy has no normaliser: {seen}. Give it a proper base, or a term that grows in "
        "all directions"
    )


def _far(history: History) -> str | None:
    radius = _last(history, "radius")
    if min(radius) > 3:
        return (
            f"the negatives are far outside the data: half of them beyond {radius[-1]:.3g} times "
            "the data's reach, where they teach nothing. Start the chains at the data or a base "
            "like it, and let them make more or larger moves"
        )
    return None


def _flat(history: History) -> str | None:
    spread = _last(history, "spread")
    if max(spread) < 1e-3 and spread[-1] <= 1.5 * spread[0]:
        return (
            f"the energy is flat: it varies by {spread[-1]:.2g} nats over data and negatives and "
            "does not grow. Look for dead units, too strong a penalty or too low a learning rate"
        )
    return None


def _gap(history: History) -> str | None:
    gap = _last(history, "gap")
    if min(map(abs, gap)) > 3:
        above = "above" if gap[-1] > 0 else "below"
        return (
            f"the energies of the negatives are {abs(gap[-1]):.3g} sd {above} those of the data: "
            "learning tells them apart and no longer compares densities. Make more moves a step, "
            "or lower the learning rate"
        )
    return None


def _short(history: History) -> str | None:
    move, drift, error = (_last(history, n) for n in ("movement", "drift", "drift_error"))
    if history["radius"][-1] > 3:  # one more look tells whether they are lost
        return None
    if all(abs(d) > max(0.3, 5 * e) for d, e in zip(drift, error, strict=True)):
        seen = f"in the second half of their moves their energy changes by {drift[-1]:+.2g} sd"
    elif max(move) < 0.04:
        turnover = 2 / move[-1] ** 2 if move[-1] else float("inf")
        seen = f"at their pace they need about {turnover:.0f} updates to cross the data's spread"
    else:
        return None
    return (
        f"the chains are too short for their mixing time: {seen}. What is learned is a "
        "short-run sampler, not the density. Make more or larger moves"
    )


def _temperature(history: History) -> str | None:
    (value,) = _last(history, "temperature", 1)
    if value < 0.5 or value > 2:
        return (
            f"the negatives are samples at the temperature {value:.3g}, not 1: noise^2 over twice "
            "the step. What is learned is that sampler, not a density. Leave noise_scale out"
        )
    return None


def _curvature(history: History) -> str | None:
    value = history["curvature"][-1]
    if value != value:
        return ""
    if value > 1e4:
        return (
            f"the data lie in canyons: the largest curvature is {value:.3g} in units of their "
            f"spread, a width of {value**-0.5:.2g} of it. Add noise to the data, and learn the "
            "law of both, or a penalty"
        )
    again = any(v < 1e-6 for v in history["curvature"][:-1][-2:])
    if value < 1e-6 and again and history["gap"][-1] != history["gap"][-1]:
        return (
            f"the curvature on the data vanishes: {value:.2g} in units of their spread, so that "
            "score matching learns nothing. Use smooth units (SiLU, not ReLU)"
        )
    return None


def _fallen(history: History, name: str) -> tuple[int, float]:
    """Return since which look a likelihood has fallen, and by how much; 0.0 if it has not."""
    known = [(i, v) for i, v in enumerate(history[name]) if v == v]
    best, value = max(known, key=lambda pair: pair[1])
    drop, errors = value - history[name][-1], history["log_z_error"]
    noise = 3 * (errors[best] ** 2 + errors[-1] ** 2) ** 0.5
    return best, drop if drop > max(0.05, noise, 0.05 * (value - known[0][1])) else 0.0


def _overfitting(history: History) -> str | None:
    rows, held_out = history["likelihood"], history["held_out"]
    if held_out[-1] != held_out[-1]:
        return ""
    best, drop = _fallen(history, "held_out")
    if drop and rows[-1] > rows[best] - 0.5 * drop:
        return (
            f"overfitting: the held-out log-likelihood is {drop:.3g} nats below its best, at step "
            f"{history['step'][best]:.0f}, and that of the training rows is not. Stop there, or "
            "use weight decay, fewer parameters or more data"
        )
    return None


def _falling(history: History) -> str | None:
    if history["likelihood"][-1] != history["likelihood"][-1]:
        return ""
    for name, rows in (("held_out", "held-out rows"), ("likelihood", "training rows")):
        best, drop = _fallen(history, name) if history[name][-1] == history[name][-1] else (0, 0)
        if drop:
            return (
                f"the log-likelihood of the {rows} is {drop:.3g} nats below its best, at step "
                f"{history['step'][best]:.0f}: the negatives no longer follow the model. Use "
                "persistent chains, more moves a step or a lower learning rate"
            )
    return None


def _list(values: Sequence[float]) -> str:
    return ", ".join(f"{v:.3g}" for v in values)


RULES: dict[str, Callable[[History], str | None]] = {
    "blow-up": _blow_up,
    "temperature": _temperature,
    "saturated": _saturated,
    "runaway": _runaway,
    "frozen": _frozen,
    "flat": _flat,
    "far": _far,
    "short": _short,
    "gap": _gap,
    "curvature": _curvature,
    "overfitting": _overfitting,
    "falling": _falling,
}
# What follows from a cause, and would mislead beside it; causes come first in RULES.
SYMPTOMS = {
    "blow-up": ("runaway", "saturated", "frozen", "far", "short", "gap", "curvature", "falling"),
    "temperature": ("saturated", "short", "gap"),
    "saturated": ("runaway", "frozen", "far", "short", "gap"),
    "runaway": ("frozen", "far", "short", "gap", "falling"),
    "frozen": ("flat", "far", "short", "gap"),
    "flat": ("short", "curvature"),
    "far": ("short", "gap"),
    "short": ("gap",),
    "overfitting": ("falling",),
}
