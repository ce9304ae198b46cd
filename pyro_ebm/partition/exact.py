"""log Z without sampling: by enumeration and by quadrature."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pyro_ebm.distribution import GibbsBoltzmann
from pyro_ebm.partition.base import LogPartition, Points, Weighted, deterministic, weigh


class Exact:
    r"""log Z by enumeration of a finite support.

    .. math:: \log Z = \log \sum_x b(x) \exp(-\beta E(x))

    Value and gradient are exact, at the cost of one energy per state (at most about a million).

    Raises:
        ValueError: When used, if the support is not finite or too large.

    Example:
        >>> d = ebm.GibbsBoltzmann(lambda x: -x.sum(-1), ebm.Flat((3,), constraints.boolean))
        >>> Exact()(d).value                               # 3 log(1 + e)
        tensor(3.9398)
    """

    value = "exact"
    gradient = "exact"

    def points(self, d: GibbsBoltzmann) -> Points:
        """Return all states, with the measure of the base."""
        x = d.enumerate_support(expand=False)
        return Points(x, d._measure.log_prob(x))

    def weighted(self, d: GibbsBoltzmann) -> Weighted:
        """Return all states with their weights."""
        return weigh(d, self.points(d))

    def log_z(self, d: GibbsBoltzmann, x: Tensor | None = None) -> Tensor:
        """Return log Z."""
        return self.weighted(d).log_weight.logsumexp(0)

    def __call__(self, d: GibbsBoltzmann) -> LogPartition:
        """Return log Z with a standard error of zero."""
        return deterministic(self.log_z(d))


_gauss_legendre = functools.lru_cache(np.polynomial.legendre.leggauss)


class Quadrature:
    r"""log Z by Gauss-Legendre quadrature over a box, in one to three dimensions.

    .. math:: \log Z \approx \log \sum_i w_i \, b(x_i) \exp(-\beta E(x_i))

    The mass outside the box is left out, so choose it wide. The ``std_error`` is the difference
    to half the number of points.

    Args:
        low: The lower corner: a number, or one per dimension.
        high: The upper corner.
        num_points: The number of points per dimension.

    Raises:
        ValueError: If a corner is not finite, ``low`` is not below ``high``, or there are fewer
            than two points; when used, if the event has more than three dimensions or the box
            leaves the support.

    Example:
        >>> d = ebm.GibbsBoltzmann(lambda x: x.square().sum(-1), ebm.Flat((2,)))
        >>> Quadrature(-6.0, 6.0, 40)(d).value             # log of pi
        tensor(1.1447)
    """

    value = "exact"
    gradient = "exact"

    def __init__(
        self, low: float | Sequence[float], high: float | Sequence[float], num_points: int
    ) -> None:
        self.low, self.high = np.atleast_1d(np.asarray(low, float)), np.atleast_1d(high)
        self.high = np.asarray(self.high, float)
        if not (np.isfinite(self.low).all() and np.isfinite(self.high).all()):
            raise ValueError(f"low and high must be finite, got {low} and {high}")
        if not (self.low < self.high).all():
            raise ValueError(f"low must be below high, got {low} and {high}")
        if num_points < 2:
            raise ValueError(f"num_points must be at least 2, got {num_points}")
        self.num_points = num_points

    def _nodes(self, d: GibbsBoltzmann, n: int) -> tuple[Tensor, Tensor]:
        """Return the points ``(m, *event)`` and the logs of their weights ``(m,)``."""
        dims = math.prod(d.event_shape)
        if not 1 <= dims <= 3:
            raise ValueError(
                f"Quadrature needs an event of one to three dimensions, got {tuple(d.event_shape)}"
            )
        if max(len(self.low), len(self.high)) not in (1, dims):
            raise ValueError(
                f"low and high must be numbers or have {dims} entries, one per dimension, got "
                f"{len(self.low)} and {len(self.high)}"
            )
        unit, weight = _gauss_legendre(n)
        low, high = np.broadcast_to(self.low, dims), np.broadcast_to(self.high, dims)
        half = (high - low) / 2
        axes = [torch.as_tensor(h * (unit + 1) + lo) for h, lo in zip(half, low, strict=True)]
        grid = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(-1, *d.event_shape)
        logs = [torch.as_tensor(np.log(h * weight)) for h in half]
        log_weight = torch.stack(torch.meshgrid(*logs, indexing="ij"), -1).sum(-1).flatten()
        like = d.floating()
        return grid.to(like), log_weight.to(like)

    def _points(self, d: GibbsBoltzmann, n: int) -> Points:
        grid, log_weight = self._nodes(d, n)
        if d._validate_args and not d.support.check(grid).all():
            raise ValueError(
                f"low and high must lie within the support {d.support}, got {self.low} and "
                f"{self.high}"
            )
        ones = (1,) * len(d.batch_shape)
        grid = grid.reshape(len(grid), *ones, *d.event_shape)
        return Points(grid, log_weight.reshape(-1, *ones) + d._measure.log_prob(grid))

    def points(self, d: GibbsBoltzmann) -> Points:
        """Return the grid, with the weights of the rule times the base."""
        return self._points(d, self.num_points)

    def weighted(self, d: GibbsBoltzmann) -> Weighted:
        """Return the grid with its weights."""
        return weigh(d, self.points(d))

    def log_z(self, d: GibbsBoltzmann, x: Tensor | None = None) -> Tensor:
        """Return log Z."""
        return self.weighted(d).log_weight.logsumexp(0)

    def __call__(self, d: GibbsBoltzmann) -> LogPartition:
        """Return log Z, with the difference to half the points as its error."""
        value = self.log_z(d)
        with torch.no_grad():
            return deterministic(value, (value - self._coarse(d)).abs())

    def _coarse(self, d: GibbsBoltzmann) -> Tensor:
        return weigh(d, self._points(d, self.num_points // 2)).log_weight.logsumexp(0)
