"""Put the figures and pictures of a run together."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyro_ebm._job.base import CHUNK, Run, energy_of, law_of, repeatable

MOST = 4  # columns in a picture


def summary(draws: Any) -> str:
    """Return ArviZ's summary as text."""
    from pyro_ebm._arviz import _import_arviz

    return _import_arviz().summary(draws).to_string()


def energies(run: Run, draws: Any) -> dict[str, Any]:
    """Return the energies of training rows, held-out rows and draws, at the draws' beta."""
    facts = draws["posterior"].attrs
    with repeatable(0), torch.no_grad():
        energy = energy_of(run)
        law = law_of(energy, float(facts["beta"]))

        def potential(rows: Tensor) -> Any:
            z = energy.whiten(rows)
            return torch.cat([law.potential(part) for part in z.split(CHUNK)]).numpy()

        standard = (drawn_rows(draws) - run.tensors["mean"]) / run.tensors["scale"]
        return {
            "training rows": potential(run.tensors["train"]),
            "held-out rows": potential(run.tensors["held_out"]),
            "draws": potential(standard),
        }


def drawn_rows(draws: Any) -> Tensor:
    """Return the draws of all chains, in the units of the table."""
    values = draws["posterior"]["x"].transpose("chain", "draw", "column").values
    return torch.from_numpy(values.reshape(-1, values.shape[-1]))


def table_rows(run: Run) -> Tensor:
    """Return training and held-out rows, in the units of the table."""
    rows = torch.cat([run.tensors["train"], run.tensors["held_out"]])
    return rows * run.tensors["scale"] + run.tensors["mean"]


def telling_columns(run: Run) -> list[int]:
    """Return the columns of which the first two principal components hold most."""
    rows = run.tensors["train"]
    if rows.shape[1] <= MOST:
        return list(range(rows.shape[1]))
    scales, axes = torch.linalg.eigh(rows.T @ rows / len(rows))
    share = (axes[:, -2:].square() * scales[-2:]).sum(1)
    return sorted(share.topk(MOST).indices.tolist())
