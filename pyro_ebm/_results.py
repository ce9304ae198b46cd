"""What is said of draws at the end of a run: warnings by name, diagnostics, a table."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_ebm._arviz import _import_arviz, to_inference_data
from pyro_ebm._keep import Draws
from pyro_ebm.diagnostics import ConvergenceWarning, convergence_warnings

CLIMB = 4.0
"""From its first quarter to its last a chain that runs away gains this many times its spread."""

LOOKED_AT = 10**7
"""Warnings look at this many numbers of a site at most, spread over its components."""


def end_warnings(name: str, draws: Draws, stats: Draws) -> Iterator[str]:
    """Say what makes draws unfit for use.

    Args:
        name: The name of the energy.
        draws: Draws by site, ``(chains, draws, *shape)``; none if they were not kept.
        stats: The records of the sampler, ``(chains, draws)``.
    """
    invalid = stats["invalid"].sum(-1)
    if bool(invalid.any()):
        worst = int(invalid.argmax())
        yield (
            f"NaN energies ended {int(invalid.sum())} trajectories, most of them "
            f"({int(invalid[worst])}) in chain {worst}: {name} is not a number there, or its "
            "linear algebra fails. They were rejected; the draws are right if the density is "
            "zero there."
        )
    size = float(stats["lp"].abs().nanmedian())
    step = torch.finfo(stats["lp"].dtype).eps * size
    if step > 0.1:
        kind = str(stats["lp"].dtype).removeprefix("torch.")
        yield (
            f"Precision: {name} is near {size:.1e}, where {kind} has steps of {step:.1e}, too "
            "coarse to accept or reject by. Leave out the large constant, or use float64."
        )
    yield from _growth(name, draws, stats["lp"])
    groups = {
        "posterior": {n: _some(v) for n, v in draws.items()},
        "sample_stats": {n: v.cpu().numpy() for n, v in stats.items()},
    }
    if groups["posterior"]:
        yield from convergence_warnings(to_inference_data(groups))


def _growth(name: str, draws: Draws, lp: Tensor) -> Iterator[str]:
    """Look for chains that go ever farther out, to ever higher densities."""
    if lp.shape[1] < 20:
        return
    quarters = torch.stack([q.mean(1) for q in lp.tensor_split(4, 1)])
    noise = torch.stack([q.std(1) for q in lp.tensor_split(4, 1)]).mean(0)
    uphill = (quarters.diff(dim=0) > 0).all(0) & (quarters[3] - quarters[0] > CLIMB * noise)
    for site, value in draws.items():
        far = value.abs().flatten(2).mean(-1) if value.dim() > 2 else value.abs()
        outwards = torch.stack([q.mean(1) for q in far.tensor_split(4, 1)]).diff(dim=0) > 0
        if float((outwards.all(0) & uphill).double().mean()) > 0.5:
            yield (
                f"Runaway: {site!r} went ever farther out, and the density up, as most chains "
                f"were sampled. {name} may have no finite integral: check its sign, or give it a "
                "base that decays. If it has one, warm up longer."
            )


def warn(messages: Iterator[str], stacklevel: int) -> None:
    """Issue warnings about convergence."""
    for message in messages:
        warnings.warn(message, ConvergenceWarning, stacklevel=stacklevel + 1)


def _some(value: Tensor) -> np.ndarray:
    flat = value.detach().flatten(2) if value.dim() > 3 else value.detach()
    if flat.dim() > 2 and flat.numel() > LOOKED_AT:
        most = max(1, LOOKED_AT // (flat.shape[0] * flat.shape[1]))
        flat = flat[..., :: -(-flat.shape[-1] // most)]
    return flat.cpu().numpy()


def diagnose(draws: Draws, stats: Draws) -> dict[str, Any]:
    """Return ``n_eff`` and ``r_hat`` by site, divergences and acceptance rates by chain."""
    arviz = _import_arviz()
    found: dict[str, Any] = {}
    for name, value in draws.items():
        half = value.shape[1] // 2  # a single chain is compared with itself
        chains = value if len(value) > 1 else value[0, : 2 * half].unflatten(0, (2, half))
        data = to_inference_data({"posterior": {"a": chains.detach().cpu().double().numpy()}})
        measures = {"n_eff": arviz.ess, "r_hat": arviz.rhat}
        with np.errstate(all="ignore"):  # of a constant they are NaN
            found[name] = {k: torch.as_tensor(f(data)["a"].values) for k, f in measures.items()}
    found["divergences"] = {
        f"chain {i}": chain.nonzero()[:, 0].tolist() for i, chain in enumerate(stats["diverging"])
    }
    found["acceptance rate"] = {
        f"chain {i}": float(chain.mean()) for i, chain in enumerate(stats["acceptance_rate"])
    }
    return found


def table(draws: Draws, prob: float) -> Any:
    """Return ArviZ's table of draws, with highest-density intervals of mass ``prob``."""
    arviz = _import_arviz()
    data = to_inference_data({"posterior": {n: v.cpu().numpy() for n, v in draws.items()}})
    if hasattr(arviz, "from_datatree"):  # before version 1
        return arviz.summary(data, hdi_prob=prob)
    return arviz.summary(data, ci_prob=prob, ci_kind="hdi")
