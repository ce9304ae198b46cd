"""What the figures of a run say, in plain words."""

from __future__ import annotations

import math
import re
from typing import Any

AGREE = 4.0  # standard errors between two estimates of log Z
SURE = 2.0  # standard errors of a difference over rows
FEW = 100.0  # effective particles: below, the error of log Z cannot be trusted either
FIRM = 0.1  # nats: a larger error of log Z blurs the comparison


def held_out(info: dict[str, Any]) -> list[str]:
    """Say how likely the held-out rows are, and whether the energy beats the Gaussian."""
    found = info.get("held_out")
    if found is None:
        return ["The held-out rows were not judged: `pyro-ebm fit` was interrupted."]
    log_z = found["log_z"]
    rows = info["data"]["held_out_rows"]
    plain = found["gaussian_unshrunk"]
    exists = "does not exist (too few rows, or dependent columns)"
    return [
        f"Log-likelihood of the {rows} held-out rows, in nats per row of standardised columns:",
        f"  energy                    {found['energy']:9.3f} +/- {log_z['std_error']:.3f} "
        "(the error of log Z)",
        f"  full Gaussian, shrunk     {found['gaussian']:9.3f}",
        "  full Gaussian, unshrunk   " + (f"{plain:9.3f}" if plain is not None else exists),
        f"  log Z = {log_z['value']:.3f} +/- {log_z['std_error']:.3f} by importance sampling from "
        f"the Gaussian ({log_z['ess']:,.0f} effective of {log_z['particles']:,} particles)",
        *_doubts(found),
        verdict(info),
    ]


def _doubts(found: dict[str, Any]) -> list[str]:
    """Compare the two estimates of log Z."""
    first, second = found["log_z"], found["log_z_second"]
    error = math.hypot(first["std_error"], second["std_error"])
    apart = abs(first["value"] - second["value"])
    agree = apart <= AGREE * error
    lines = [
        f"  log Z = {second['value']:.3f} +/- {second['std_error']:.3f} by annealed chains with "
        "Jarzynski's weights: " + ("the two agree" if agree else "THE TWO DISAGREE")
    ]
    if not agree:
        lines.append(
            f"  They are {apart:.2f} nats apart, {apart / error:.0f} of their standard errors: "
            "the figure of the energy may be wrong by as much."
        )
    if first["ess"] < FEW:
        lines.append(
            "  Few particles carry the estimate by importance sampling: its error is not to be "
            "trusted."
        )
    return lines


def verdict(info: dict[str, Any]) -> str:
    """Say in one sentence whether the energy is better than the better of the Gaussians."""
    found = info["held_out"]
    gain, spread, blur = found["gain"], found["gain_row_error"], _blur(found)
    if info["learning"]["steps"] == 0:
        return "The energy is zero: the model is the Gaussian, and no better than it."
    if spread is None:
        return f"One held-out row, {gain:+.2f} nats, cannot tell the energy from the Gaussian."
    error = math.hypot(spread, blur)
    by = f"{gain:+.2f} +/- {error:.2f} nats per row (standard error over rows and log Z)"
    if gain > SURE * error:
        return f"The energy is BETTER than the Gaussian on rows it has not seen, by {by}."
    if gain < -SURE * error:
        return f"The energy is WORSE than the Gaussian on rows it has not seen, by {by}."
    return f"The energy is NOT clearly better than the Gaussian: {by}."


def _blur(found: dict[str, Any]) -> float:
    """The error of log Z: what is claimed of it, or how far the two estimates are apart."""
    first, second = found["log_z"], found["log_z_second"]
    apart = abs(first["value"] - second["value"])
    claimed = first["std_error"]
    agree = apart <= AGREE * math.hypot(claimed, second["std_error"])
    return claimed if agree else max(claimed, apart)


def about(info: dict[str, Any]) -> str:
    """Say what a run holds."""
    data, learning = info["data"], info["learning"]
    state = " (interrupted)" if learning["interrupted"] else ""
    return (
        f"An energy of {len(data['columns'])} columns of {data['source']}, learned from "
        f"{data['training_rows']} rows in {learning['steps']} steps{state}."
    )


def chains(facts: dict[str, Any]) -> str:
    """Say what was drawn."""
    state = ", interrupted" if facts["interrupted"] else ""
    count = "1 chain" if facts["chains"] == 1 else f"{facts['chains']} chains"
    return (
        f"{count} of {facts['draws']} draws after {facts['warmup']} of warm-up, by "
        f"{str(facts['kernel']).upper()} at beta = {facts['beta']:g}{state}."
    )


def trust(warnings: list[str], columns: list[str]) -> list[str]:
    """Say whether chains can be trusted, with the names of the columns."""
    if not warnings:
        return [
            "The chains can be trusted as far as chains can show it: no divergences, R-hat at "
            "most 1.01, at least 100 effective draws per chain in bulk and tails."
        ]
    named = [
        re.sub(r"\bx\[(\d+)\]", lambda m: f"x[{columns[int(m[1])]}]", warning)
        for warning in warnings
    ]
    return ["The chains cannot be fully trusted:", *(f"  - {warning}" for warning in named)]


def energies(values: dict[str, Any]) -> str:
    """Compare the energies of data and draws."""
    middle = ", ".join(f"{name} {sorted(v)[len(v) // 2]:.1f}" for name, v in values.items())
    return (
        f"Median energies in nats: {middle}. Where the model fits they are alike; training rows "
        "lower than held-out rows show overfitting."
    )


def story(info: dict[str, Any], facts: dict[str, Any]) -> list[str]:
    """Tell what the demo did."""
    data, found = info["data"], info["held_out"]
    rows = data["training_rows"] + data["held_out_rows"]
    factor = f"{math.exp(found['gain']):.2g} times as likely as"
    return [
        f"The data are {rows} wines with {len(data['columns'])} measurements each. "
        f"{data['held_out_rows']} wines were put aside; from the other {data['training_rows']} a "
        "small neural network learned an energy: a number for every conceivable wine, low where "
        "wines are common. It learned by contrastive learning through Pyro's SVI: energy down on "
        "data, up on the model's own samples, beginning at the Gaussian.",
        f"{verdict(info)} On average, a wine that it has not seen is {factor} under the Gaussian.",
        f"Pyro's {str(facts['kernel']).upper()} then drew {facts['chains'] * facts['draws']:,} "
        f"new wines from the energy, in {facts['chains']} chains.",
    ]


def files(pictures: list[Any]) -> list[str]:
    """Say what each file of a run is."""
    names = {
        "learning.png": "loss and gain while learning",
        "energies.png": "energies of data against draws: alike, if the model fits",
        "pairs.png": "data against draws, four columns",
        "traces.png": "the chains, four columns",
        "energy.png": "energies of the sampler, as ArviZ draws them",
    }
    return [
        "  run.json       settings and figures",
        "  weights-*.pt   the energy's weights (torch.load with weights_only=True)",
        "  draws.nc       the draws, for ArviZ and xarray",
        *(f"  {path.name:<14} {names[path.name]}" for path in pictures),
    ]
