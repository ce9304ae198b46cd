"""log Z by quadrature, over a box or around the mode."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyro_ebm._guard import UnnormalizedWarning
from pyro_ebm._mode import Modes, Space, find_modes, space_of, symmetric
from pyro_ebm.distribution import GibbsBoltzmann
from pyro_ebm.energy import Energy
from pyro_ebm.partition.base import LogPartition, Points, Weighted, deterministic, weigh

MAX_NODES = {1: 1024, 2: 512, 3: 64}  # per dimension, for at most 2^18 points in all
DROP = 2.0  # in nats: how far below the mode the width of a distribution is measured
IN_REACH = 20.0  # nats: modes farther below the best one weigh nothing

_gauss_legendre = functools.lru_cache(np.polynomial.legendre.leggauss)


@functools.lru_cache
def _gauss_hermite(n: int) -> tuple[np.ndarray, np.ndarray]:
    r"""Return nodes and the logs of their weights times :math:`\exp(\xi^2)`.

    With the normalised Hermite functions these weights are :math:`1 / (n \psi_{n-1}(\xi)^2)`,
    here in logs, unlike NumPy's, which underflow from some 370 nodes on.
    """
    off = np.sqrt(np.arange(1, n) / 2)
    x = np.linalg.eigvalsh(np.diag(off, 1) + np.diag(off, -1))
    below, at, _ = _hermite_functions(x, n)
    x = x - at / (math.sqrt(2 * n) * below - x * at)  # Newton, for the last digits
    below, _, log_scale = _hermite_functions(x, n)
    return x, -math.log(n) - 2 * (np.log(np.abs(below)) + log_scale)


def _hermite_functions(x: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the normalised Hermite functions of orders n - 1 and n, and their log scale."""
    below, at = np.zeros_like(x), np.ones_like(x)
    log_scale = -(x**2) / 2 - math.log(math.pi) / 4
    for k in range(n):
        below, at = at, math.sqrt(2 / (k + 1)) * x * at - math.sqrt(k / (k + 1)) * below
        size = np.maximum(np.abs(below), np.abs(at))
        below, at, log_scale = below / size, at / size, log_scale + np.log(size)
    return below, at, log_scale


class _Frame(NamedTuple):
    """Where a Hermite rule stands: its centre, its axes, the standard deviation along each.

    ``local`` is that of the best mode alone.
    """

    space: Space
    centre: Tensor  # shape: (*batch, D)
    axes: Tensor  # columns; shape: (*batch, D, D)
    scale: Tensor  # shape: (*batch, D)
    local: Tensor  # shape: (*batch, D)


class _Rule(NamedTuple):
    """Points of a rule by their number per dimension, its limit, and the frame of Hermite."""

    points: Callable[[int], Points]
    limit: int
    frame: _Frame | None = None


class Quadrature:
    r"""log Z by Gaussian quadrature, in one to three dimensions.

    .. math:: \log Z \approx \log \sum_i w_i \, b(x_i) \exp(-\beta E(x_i))

    Rule ``"legendre"`` covers a box; the mass outside is left out, so choose it wide. Rule
    ``"hermite"``, the default without a box, covers the unconstrained space of the support, for
    each batch element centred and scaled by where its density has fallen by two nats, along the
    principal axes of the Hessian at the mode: exact with two points for a Gaussian. It suits one
    mode, or several close ones. Its frame is held fixed in derivatives, which loses nothing: the
    integral does not depend on it. Under MCMC a box is faster: the search for the mode keeps
    chains from being traced as one batch.

    The ``std_error`` is the difference to rules of half the points or, for Hermite where it is
    larger, what the rule may have missed: what a rule of twice the width sees beyond its reach,
    and a mode too narrow for its nodes. With a ``tolerance`` the points are doubled until the
    error is below it (or below rounding); where that fails a warning says what is left.

    Args:
        low: The lower corner of the box: a number, or one per dimension.
        high: The upper corner.
        num_points: The number of points per dimension.
        rule: ``"legendre"`` or ``"hermite"``; by default the first with a box.
        tolerance: The difference, in nats, below which refinement ends; at most 2^18 points are
            tried. None for a fixed number of points.

    Raises:
        ValueError: If a corner is not finite, ``low`` is not below ``high``, there are fewer
            than two points, or a box does not go with the rule; when used, if the event has more
            than three dimensions, the box leaves the support, or the density has no mode.

    References:
        | A Note on Gauss-Hermite Quadrature (Liu and Pierce, 1994)
        | https://doi.org/10.1093/biomet/81.3.624
        | Applications of a Method for the Efficient Computation of Posterior Distributions
          (Naylor and Smith, 1982)
        | https://doi.org/10.2307/2347995

    Example:
        >>> d = ebm.GibbsBoltzmann(lambda x: x.square().sum(-1), ebm.Flat((2,)))
        >>> Quadrature(-6.0, 6.0, 40)(d).value             # log of pi
        tensor(1.1447)
        >>> Quadrature(tolerance=1e-4)(d).value
        tensor(1.1447)
    """

    value = "exact"
    gradient = "exact"
    tabular = True

    def __init__(
        self,
        low: float | Sequence[float] | None = None,
        high: float | Sequence[float] | None = None,
        num_points: int = 32,
        *,
        rule: str | None = None,
        tolerance: float | None = None,
    ) -> None:
        boxed = low is not None and high is not None
        self.rule = rule or ("legendre" if boxed else "hermite")
        if self.rule not in ("legendre", "hermite"):
            raise ValueError(f"rule must be 'legendre' or 'hermite', got {rule!r}")
        if (self.rule == "legendre") != boxed or (low is None) != (high is None):
            raise ValueError(
                "low and high must be given for rule 'legendre' and left out for 'hermite', got "
                f"{low} and {high} for {self.rule!r}"
            )
        if num_points < 2:
            raise ValueError(f"num_points must be at least 2, got {num_points}")
        if tolerance is not None and not tolerance > 0:
            raise ValueError(f"tolerance must be positive, got {tolerance}")
        self.low, self.high = _corners(low, high)
        self.num_points, self.tolerance = num_points, tolerance

    def points(self, d: GibbsBoltzmann) -> Points:
        """Return the points, with the weights of the rule times the base."""
        return self._refined(d)[0]

    def weighted(self, d: GibbsBoltzmann) -> Weighted:
        """Return the points with their weights."""
        return weigh(d, self.points(d))

    def log_z(self, d: GibbsBoltzmann, x: Tensor | None = None) -> Tensor:
        """Return log Z."""
        return _sum(d, self.points(d))

    def __call__(self, d: GibbsBoltzmann) -> LogPartition:
        """Return log Z, with the difference to other rules as its error."""
        points, error = self._refined(d, True)
        return deterministic(_sum(d, points), error)

    def _refined(self, d: GibbsBoltzmann, errors: bool = False) -> tuple[Points, Tensor | None]:
        """Return the points of the rule, refined where there is a tolerance, and the error."""
        rule, n = self._rule(d), self.num_points
        points = rule.points(n)
        if self.tolerance is None:
            return points, self._error(d, rule, n, points)[0] if errors else None
        while True:
            error, rounding = self._error(d, rule, n, points)
            reached = (error <= self.tolerance + rounding).all()
            if reached or 2 * n > rule.limit:
                break
            n *= 2
            points = rule.points(n)
        if not reached:
            warnings.warn(
                f"log Z by Quadrature still changes by {error.max():.2g} nats at {n} points per "
                f"dimension, more than the tolerance of {self.tolerance:g}",
                UnnormalizedWarning,
                stacklevel=4,
            )
        return points, error

    @torch.no_grad()
    def _error(
        self, d: GibbsBoltzmann, rule: _Rule, n: int, points: Points
    ) -> tuple[Tensor, Tensor]:
        """Return the difference to other rules, and that which rounding makes in any."""
        value = _sum(d, points)
        # Of two modes one or the other parity puts a node between them: the error alternates.
        coarse = [_sum(d, rule.points(m)) for m in (n // 2, n // 2 + 1)]
        error = (value - torch.stack(coarse)).abs().amax(0)
        if rule.frame is not None:
            error = error.maximum(_unseen(d, rule.frame, n, value))
        return error, 64 * torch.finfo(value.dtype).eps * (1 + value.abs())

    def _rule(self, d: GibbsBoltzmann) -> _Rule:
        if self.rule == "hermite":
            frame = _frame(d)
            limit = MAX_NODES[frame.space.dim]
            return _Rule(lambda n: _hermite_points(d, frame, n), limit, frame)
        dims = math.prod(d.event_shape)
        _check_dims(dims, d)
        return _Rule(lambda n: self._box(d, n), MAX_NODES[dims])

    def _box(self, d: GibbsBoltzmann, n: int) -> Points:
        grid, log_weight = self._nodes(d, n)
        if d._validate_args and not d.support.check(grid).all():
            raise ValueError(
                f"low and high must lie within the support {d.support}, got {self.low} and "
                f"{self.high}"
            )
        ones = (1,) * len(d.batch_shape)
        grid = grid.reshape(len(grid), *ones, *d.event_shape)
        return Points(grid, log_weight.reshape(-1, *ones) + d._measure.log_prob(grid))

    def _nodes(self, d: GibbsBoltzmann, n: int) -> tuple[Tensor, Tensor]:
        """Return the points ``(m, *event)`` and the logs of their weights ``(m,)``."""
        dims = math.prod(d.event_shape)
        assert self.low is not None
        assert self.high is not None
        if max(len(self.low), len(self.high)) not in (1, dims):
            raise ValueError(
                f"low and high must be numbers or have {dims} entries, one per dimension, got "
                f"{len(self.low)} and {len(self.high)}"
            )
        unit, weight = _gauss_legendre(n)
        low, high = np.broadcast_to(self.low, dims), np.broadcast_to(self.high, dims)
        half = (high - low) / 2
        axes = [torch.as_tensor(h * (unit + 1) + lo) for h, lo in zip(half, low, strict=True)]
        logs = [torch.as_tensor(np.log(h * weight)) for h in half]
        like = d.floating()
        return _grid(axes).reshape(-1, *d.event_shape).to(like), _grid(logs).sum(-1).to(like)


def _corners(
    low: float | Sequence[float] | None, high: float | Sequence[float] | None
) -> tuple[np.ndarray | None, np.ndarray | None]:
    if low is None or high is None:
        return None, None
    lower, upper = (np.atleast_1d(np.asarray(corner, float)) for corner in (low, high))
    if not (np.isfinite(lower).all() and np.isfinite(upper).all()):
        raise ValueError(f"low and high must be finite, got {low} and {high}")
    if not (lower < upper).all():
        raise ValueError(f"low must be below high, got {low} and {high}")
    return lower, upper


def _check_dims(dims: int, d: GibbsBoltzmann) -> None:
    if not 1 <= dims <= 3:
        raise ValueError(
            f"Quadrature needs an event of one to three dimensions, got {tuple(d.event_shape)}"
        )


def _grid(axes: list[Tensor]) -> Tensor:
    """Return all combinations of the entries of axes, as rows."""
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(-1, len(axes))


def _sum(d: GibbsBoltzmann, points: Points) -> Tensor:
    return weigh(d, points).log_weight.logsumexp(0)


def _frame(d: GibbsBoltzmann) -> _Frame:
    """Measure the distribution around its mode."""
    space = space_of(d)
    _check_dims(space.dim, d)
    modes = find_modes(d, space)
    fine = modes.potential.isfinite()
    if not fine.any(0).all():
        raise ValueError(
            "energy must be finite somewhere near the base's samples, got none for "
            f"{int((~fine.any(0)).sum())} of {fine[0].numel()} batch elements"
        )
    with torch.no_grad():
        return _measure(space, modes, modes.best(fine))


def _measure(space: Space, modes: Modes, best: Modes) -> _Frame:
    """Return the frame whose axes reach from side to side of all modes that have weight."""
    value, axes = torch.linalg.eigh(symmetric(best.hessian))
    signed = torch.cat([axes, -axes], -1).movedim(-1, 0)  # shape: (2 D, *batch, D)
    reach = _reach(space.potential, best, signed, value)
    offset = torch.einsum("s...i,r...i->rs...", modes.z - best.z, signed)
    weighs = modes.potential < best.potential + IN_REACH
    offset = torch.where(weighs, offset, 0.0).amax(1).clamp(min=0.0)
    right, left = (reach + offset).movedim(0, -1).chunk(2, -1)
    centre = best.z + (axes @ ((right - left) / 2).unsqueeze(-1)).squeeze(-1)
    near = reach.unflatten(0, (2, -1)).sum(0).movedim(0, -1)
    per_sd = 2 * math.sqrt(2 * DROP)
    return _Frame(space, centre, axes, (right + left) / per_sd, near / per_sd)


def _reach(potential: Energy, best: Modes, along: Tensor, curvature: Tensor) -> Tensor:
    """Return how far along rays ``(r, *batch, D)`` the potential has risen by ``DROP``."""
    unit = torch.where(curvature > 0, curvature, 1.0).rsqrt().movedim(-1, 0)
    unit = torch.cat([unit, unit])
    low, high = (torch.full_like(unit, bound) for bound in (-12.0, 12.0))  # logs
    for _ in range(30):
        middle = (low + high) / 2
        z = best.z + (unit * middle.exp()).unsqueeze(-1) * along
        below = potential(z) < best.potential + DROP
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return unit * high.exp()


def _hermite_points(d: GibbsBoltzmann, frame: _Frame, n: int, width: float = 1.0) -> Points:
    nodes, logs = (torch.as_tensor(part) for part in _gauss_hermite(n))
    dims, scale = frame.space.dim, width * math.sqrt(2) * frame.scale
    ones = (1,) * (frame.centre.dim() - 1)
    grid = _grid([nodes] * dims).to(scale).reshape(-1, *ones, dims)
    log_weight = _grid([logs] * dims).sum(-1).to(scale).reshape(-1, *ones)
    z = frame.centre + (frame.axes @ (scale * grid).unsqueeze(-1)).squeeze(-1)
    x = frame.space.transform(z)
    log_measure = log_weight + scale.log().sum(-1) - frame.space.measure(z)
    # Far out a transform may round to the edge of the support, or beyond.
    return Points(x, torch.where(d.support.check(x), log_measure, -torch.inf))


def _unseen(d: GibbsBoltzmann, frame: _Frame, n: int, value: Tensor) -> Tensor:
    r"""Estimate what a rule may have missed, beyond its reach and between its nodes.

    A rule twice as wide sees what lies beyond. Between nodes at a distance :math:`h` a mode of
    standard deviation :math:`s` is missed by :math:`2 \exp(-2 \pi^2 s^2 / h^2)`, the error of the
    trapezoidal rule for a Gaussian.
    """
    nodes = torch.as_tensor(_gauss_hermite(n)[0])
    beyond = (_grid([nodes] * frame.space.dim).abs() > nodes.max() / 2).any(-1)
    wide = weigh(d, _hermite_points(d, frame, n, 2.0)).log_weight
    outside = wide[beyond.to(wide.device)].logsumexp(0) - value
    spacing = math.sqrt(2) * math.pi / math.sqrt(2 * n + 1) * frame.scale
    between = 2 * torch.exp(-2 * (math.pi * frame.local / spacing).square()).sum(-1)
    return outside.exp().log1p() + between
