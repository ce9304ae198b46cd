"""Starting points of chains, where the energy and its gradient are finite."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from pyro import poutine
from pyro.infer.autoguide.initialization import InitMessenger, init_to_uniform
from torch import Tensor

from pyro_ebm._potential import Potential, quiet

TRIES = 100
"""How often a starting point is drawn anew where the energy or its gradient is not finite."""

RADIUS = 2.0
"""Pyro's ``init_to_uniform`` starts within this distance of 0, in unconstrained space."""


def starts(target: Potential, num_chains: int, strategy: Callable[..., Any] | None) -> Tensor:
    """Draw starting points, ``(num_chains, D)``, by one of Pyro's strategies."""
    if strategy is None or strategy is init_to_uniform:
        z = torch.rand(num_chains, target.num_dims, dtype=target.like.dtype)
        return (RADIUS * (2.0 * z - 1.0)).to(target.like.device)
    points = []
    with quiet():
        model = InitMessenger(strategy)(target.model)
        for _ in range(num_chains):
            trace = poutine.trace(model).get_trace()
            values = {n: trace.nodes[n]["value"].detach()[None] for n in target.sites}
            parts = [s.transform.inv(values[n]).reshape(-1) for n, s in target.sites.items()]
            points.append(torch.cat(parts).to(target.like))
    return torch.stack(points)


def find_starts(
    target: Potential,
    engine: Any,
    chains: range,
    strategy: Callable[..., Any] | None,
    given: Tensor | None,
) -> Tensor:
    """Return starting points of finite energy and gradient, drawn anew where they are not.

    Raises:
        ValueError: If a given point, or after many tries a drawn one, has no finite energy, or
            one of minus infinity; the chain is named.
    """
    z = starts(target, len(chains), strategy) if given is None else given
    target.check(z)
    for attempt in range(TRIES):
        value, grad = engine.gradient(z)
        bad = ~(value.isfinite() & grad.isfinite().all(-1))
        pit = value == -torch.inf
        if not bool(bad.any()):
            return z
        if given is not None or bool(pit.any()) or attempt == TRIES - 1:
            break
        z = torch.where(bad.unsqueeze(-1), starts(target, len(chains), strategy), z)
    which = pit if bool(pit.any()) else bad
    chain = int(which.nonzero()[0])
    got, x = value[chain].item(), target.constrain(z[chain])
    at = ", ".join(f"{name} = {_short(v)}" for name, v in x.items())
    rule = "bounded below" if got == -torch.inf else "finite"
    what = (
        f"its gradient is {_short(grad[chain])}"
        if which[chain] and value[chain].isfinite()
        else (f"got {got}")
    )
    tries = "" if given is not None or bool(pit.any()) else f" after {TRIES} tries"
    raise ValueError(
        f"{target.name} must be {rule} at the initial point of every chain, {what} for chain "
        f"{chains[chain]}{tries}, at {at}{_culprits(target, x)}"
    )


def _culprits(target: Potential, values: dict[str, Tensor]) -> str:
    """Name the sites of a model that have no finite density at a point."""
    if not target.name.startswith("model"):
        return ""
    with quiet(), torch.no_grad(), contextlib.suppress(Exception):
        trace = poutine.trace(poutine.condition(target.model, data=values)).get_trace()
        trace.compute_log_prob()
        sites = {n: node for n, node in trace.nodes.items() if "log_prob_sum" in node}
        bad = [n for n, node in sites.items() if not node["log_prob_sum"].isfinite()]
        return f"; the density is not finite at {', '.join(map(repr, bad))}" if bad else ""
    return ""


def _short(x: Tensor) -> str:
    flat = x.detach().flatten()
    text = ", ".join(f"{v:.4g}" for v in flat[:4].tolist()) + (", ..." if len(flat) > 4 else "")
    return text if x.dim() == 0 else f"[{text}]"
