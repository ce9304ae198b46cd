"""What a training step shows: numbers from its points and moves, left on their device."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.linalg import vector_norm

from pyro_ebm.energy import Energy, differentiable

TAILS = 1e2, 1e3  # so many times the data's distance from their centre
POWER_STEPS = 2  # a lower bound of the largest curvature, near enough to see a canyon
Numbers = dict[str, Tensor]


class Seen(NamedTuple):
    """What a loop shows: parts of data and of negatives, all chains and the record of moves.

    ``log_weight`` is that of the negatives, where they are weighted.
    """

    x: tuple[Tensor, ...]
    negatives: tuple[Tensor, ...] | None
    chains: Tensor | None
    info: Any
    log_weight: Tensor | None = None

    @classmethod
    def of(cls, x: Any, negatives: Any, info: Any, state: Any) -> Seen:
        """Take points as tensors, tuples of parts, or with what moved them."""
        if hasattr(negatives, "moved"):  # a Contrastive; its first group feeds the gradient
            group = negatives.weighted
            negatives = negatives.moved
            if group:
                first = {name: getattr(negatives, name)[:, 0] for name in ("x", "log_weight")}
                negatives = negatives._replace(**first)
        log_weight = None
        if hasattr(negatives, "accept_prob"):  # of ebm.Negatives
            info, log_weight = negatives if info is None else info, negatives.log_weight
            negatives = negatives.x if negatives.label is None else (negatives.x, negatives.label)
        parts = None if negatives is None else _parts(negatives)
        chains = parts[0] if parts and state is None else getattr(state, "position", None)
        chains = None if chains is None else chains.detach()
        return cls(_parts(x), parts, chains, info, log_weight)

    def some(self, count: int) -> Seen:
        """Return the first points and chains."""
        few = [p and tuple(a[:count] for a in p) for p in (self.x, self.negatives)]
        chains, log_weight = (
            None if part is None else part[:count] for part in (self.chains, self.log_weight)
        )
        return Seen(few[0] or (), few[1], chains, self.info, log_weight)


def _parts(points: Any) -> tuple[Tensor, ...]:
    return tuple(part.detach() for part in (points if isinstance(points, tuple) else (points,)))


class Data(NamedTuple):
    """Data as rows ``(n, D)``, with the ``centre`` and ``variance`` of each component."""

    rows: Tensor
    centre: Tensor
    variance: Tensor

    @classmethod
    def of(cls, x: Tensor) -> Data:
        """Look at data of any event."""
        variance, centre = torch.var_mean(_rows(x), 0, correction=0)
        return cls(_rows(x), centre, variance)

    def numbers(self) -> Numbers:
        """Return their total variance and their reach, the largest distance from the centre."""
        reach = vector_norm(self.rows - self.centre, dim=1).max()
        return {"variance": self.variance.sum(), "reach": reach}


def _rows(x: Tensor) -> Tensor:
    x = x.reshape(len(x), -1)
    return x if x.is_floating_point() else x.to(torch.get_default_dtype())


def energies(
    whole: Tensor, plain: Tensor, num_data: int, log_weight: Tensor | None = None
) -> Numbers:
    """Compare energies of data, which come first, and of negatives; ``plain``: without base."""
    found = {"spread": plain.std(correction=0)}
    for name, part in (("data", whole[:num_data]), ("negatives", whole[num_data:])):
        if len(part):
            sd, mean = torch.std_mean(part, correction=0)
            if name == "negatives" and log_weight is not None:
                share = log_weight.softmax(0)
                mean = (share * part).sum()
                sd = (share * (part - mean).square()).sum().sqrt()
            found |= {f"energy_{name}": mean, f"sd_{name}": sd}
    return found


def places(data: Data, negatives: Tensor, walls: tuple[Any, Any] | None) -> Numbers:
    """Say where negatives are; ``walls`` is None where points are discrete."""
    points = _rows(negatives)
    found = {"distance": vector_norm(points - data.centre, dim=1).median()}
    varies = data.variance > 0
    stuck = (points.var(0, correction=0) <= 1e-6 * data.variance) & varies
    found |= {"stuck": stuck.sum() / varies.sum()}
    if walls is not None:
        found["bounded"] = _bounded(data.rows, points, *walls)
        if points.shape == data.rows.shape:  # chains that start at the data, all moves refused
            found["refused"] = (points == data.rows).all(1).to(points.dtype).mean()
    return found


def _bounded(x: Tensor, negatives: Tensor, low: Any, high: Any) -> Tensor:
    """Return the share of components at the walls of a box, beyond the data's own share.

    Where no walls are known, they are the extremes of the negatives: a clamp shows in that many
    components are equal to them.
    """
    if low is None or high is None:
        low, high = negatives.aminmax()
        near = [(a == low) | (a == high) for a in (negatives, x)]
    else:
        margin = 1e-3 * (high - low)
        near = [(a <= low + margin) | (a >= high - margin) for a in (negatives, x)]
    return near[0].to(x.dtype).mean() - near[1].to(x.dtype).mean()


def movement(data: Data, before: Tensor, now: Tensor) -> Numbers:
    """Say how far chains have moved in one update.

    Those that end where they began, at their data, have not been there for an update.
    """
    new = _rows(now)
    step = vector_norm(new - _rows(before), dim=1)
    still = step == 0
    if new.shape == data.rows.shape:
        still &= (new != data.rows).any(1)
    return {"step": step.square().mean().sqrt(), "still": still.to(step.dtype).mean()}


def moves(info: Any, sd_data: Tensor) -> Numbers:
    """Read records of moves: of one, of all in a list, or stacked by the loop."""
    infos = info if isinstance(info, list) else [info]
    found: Numbers = {}
    of_kernel = [getattr(i, "info", i) for i in infos]  # that of ebm.Negatives has it inside
    for name, field, records in (
        ("acceptance", "accept_prob", infos),
        ("temperature", "temperature", of_kernel),
    ):
        if hasattr(records[-1], field):
            found[name] = torch.stack([getattr(i, field) for i in records]).mean()
    ends = _ends(infos)
    if ends is not None:
        middle, end = (part.flatten() for part in ends)
        sd, found["change"] = torch.std_mean(end - middle, correction=0)
        found["change_error"] = sd / len(end) ** 0.5
        # A few stray chains would widen their own scale.
        found["sd_path"] = torch.minimum(end.std(correction=0), sd_data)
    return found


def _ends(infos: Sequence[Any]) -> tuple[Tensor, Tensor] | None:
    """Return the energies of chains after half of the moves and after all, where known."""
    last = infos[-1]
    if hasattr(last, "halfway"):  # of ebm.Negatives
        return last.halfway, last.info.energy
    path = torch.stack([i.energy for i in infos]) if len(infos) > 1 else last.energy
    return (path[(len(path) - 1) // 2], path[-1]) if path.dim() > 1 and len(path) > 3 else None


def tails(potential: Energy, x: Tensor, data: Data) -> Tensor:
    """Return the share of directions in which a density has no integral.

    They are those of the data from their centre, of D components: far out, a potential must grow
    by more than D log r.
    """
    away = (data.rows - data.centre).to(x).reshape(x.shape)
    near, far = (potential(x + r * away) for r in TAILS)
    return (far - near < data.rows.shape[1] * math.log(TAILS[1] / TAILS[0])).to(x.dtype).mean()


def curvature(potential: Energy, x: Tensor, scale: Tensor, probe: Tensor) -> Numbers:
    r"""Measure the Hessian at points, in units of a ``scale``, by products with vectors.

    The mean trace is Hutchinson's estimate :math:`v^\top H v` with signs ``probe``, of the shape
    of ``x``, and the largest eigenvalue is approached from below by the power method.
    """
    with differentiable():
        y = torch.zeros_like(x).requires_grad_()
        (grad,) = torch.autograd.grad(potential(x + scale * y).sum(), y, create_graph=True)
        found = {"force": grad.detach().flatten(1).norm(dim=1).mean()}
        v = probe
        for i in range(POWER_STEPS):
            product = _product(grad, y, v)
            if i == 0:
                found["trace"] = (product * probe).flatten(1).sum(1).mean()
            ratio = product.flatten(1).norm(dim=1) / v.flatten(1).norm(dim=1)
            v = product
        found["curvature"] = ratio.nan_to_num(0.0).median()
    return found


def _product(grad: Tensor, y: Tensor, v: Tensor) -> Tensor:
    """Multiply the Hessian with a vector; one of a linear energy has no graph."""
    if not grad.requires_grad:
        return torch.zeros_like(v)
    (product,) = torch.autograd.grad(grad, y, v, retain_graph=True, allow_unused=True)
    return torch.zeros_like(v) if product is None else product


def to_host(numbers: Numbers) -> dict[str, float]:
    """Fetch numbers, with one wait for their device, and put them in their units."""
    dtype = numbers["energy_data"].dtype
    values = torch.stack([v if v.dtype == dtype else v.to(dtype) for v in numbers.values()])
    known = dict(zip(numbers, values.tolist(), strict=True))
    for name, (above, below) in RATIOS.items():
        if above in known:
            known[name] = _ratio(known[above], known[below])
    if "sd_negatives" in known:
        pooled = ((known["sd_data"] ** 2 + known["sd_negatives"] ** 2) / 2) ** 0.5
        known["gap"] = _ratio(known["energy_negatives"] - known["energy_data"], pooled)
    if "step" in known:
        known["movement"] = _ratio(known.pop("step"), known["variance"] ** 0.5)
    return known


RATIOS: Mapping[str, tuple[str, str]] = {
    "radius": ("distance", "reach"),
    "drift": ("change", "sd_path"),
    "drift_error": ("change_error", "sd_path"),
}


def _ratio(a: float, b: float) -> float:
    return a / b if b else float("nan")
