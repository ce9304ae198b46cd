"""Integrals of noisy slopes at nodes, and the cubic Hermite spline through them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

RATIO = 4.0
"""From this ratio of the ends on, nodes are spaced by the logarithm."""


class Scale(NamedTuple):
    r"""A coordinate u of a parameter, in which nodes are even: itself, its log or cube root."""

    kind: str

    @classmethod
    def of(cls, low: float, high: float, vanishing: bool) -> Scale:
        """Choose one; ``vanishing`` says that log Z changes fast near ``low=0``."""
        if low > 0 and high >= RATIO * low:
            return cls("log")
        return cls("cubes" if vanishing and low == 0 else "even")

    def place(self, theta: Tensor) -> Tensor:
        """Return u."""
        if self.kind == "log":
            return theta.log()
        # The root has no derivative at 0; the least positive number does as well.
        tiny = torch.finfo(theta.dtype).tiny
        return theta.clamp(min=tiny) ** (1 / 3) if self.kind == "cubes" else theta

    def nodes(self, low: float, high: float, num: int, like: Tensor) -> Tensor:
        """Return parameters at even places."""
        ends = torch.tensor([low, high]).to(like)
        first, last = self.place(ends)
        place = first + torch.linspace(0.0, 1.0, num).to(like) * (last - first)
        nodes = {"log": place.exp(), "cubes": place**3, "even": place}[self.kind]
        nodes[0], nodes[-1] = ends
        return nodes

    def derivatives(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """Return the first and the second derivative of the parameter by u."""
        if self.kind == "log":
            return theta, theta
        if self.kind == "cubes":
            place = self.place(theta)
            return 3 * place.square(), 6 * place
        return torch.ones_like(theta), torch.zeros_like(theta)


class Curve(NamedTuple):
    """A function at ``nodes``: ``value``, ``slope`` by the place, ``std_error``, each ``(K,)``."""

    scale: Scale
    nodes: Tensor
    value: Tensor
    slope: Tensor
    std_error: Tensor

    def _find(self, theta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the interval of each parameter, its width, and how far into it that is."""
        place = self.scale.place(self.nodes)
        u = self.scale.place(theta.clamp(self.nodes[0], self.nodes[-1]))
        at = (u.unsqueeze(-1) >= place[1:-1]).sum(-1)
        left = _pick(place, at)
        width = _pick(place, at + 1) - left
        return at, width, (u - left) / width

    def __call__(self, theta: Tensor) -> Tensor:
        """Return the value of the spline."""
        at, h, t = self._find(theta)
        left = _pick(self.value, at)
        rise = _pick(self.value, at + 1) - left
        a, b = h * _pick(self.slope, at), h * _pick(self.slope, at + 1)
        return left + t * (a + t * (3 * rise - 2 * a - b + t * (a + b - 2 * rise)))

    def error(self, theta: Tensor) -> Tensor:
        """Return the standard error, interpolated."""
        at, _, t = self._find(theta)
        return torch.lerp(_pick(self.std_error, at), _pick(self.std_error, at + 1), t)


def integrate(scale: Scale, nodes: Tensor, chains: Tensor, curvature: Tensor) -> Curve:
    r"""Integrate slopes from the first node on, from zero.

    .. math:: \int \approx \tfrac{h}{2} (s_0 + s_1) + \tfrac{h^2}{12} (s_0' - s_1')

    The standard error is that over independent estimates, and that of the rule: the difference to
    every other node; a fifteenth of it where the rule is seen to be of fourth order, as that
    difference is small beside the one to every fourth node.

    Args:
        scale: The coordinate.
        nodes: The nodes, ``(K,)``.
        chains: Independent estimates of the slopes by the parameter, ``(K, C)``.
        curvature: The second derivatives, ``(K,)``.
    """
    place, (first, second) = scale.place(nodes), scale.derivatives(nodes)
    mean = chains.mean(1)
    slope, curvature = first * mean, first.square() * curvature + second * mean
    value = _cumulated(place, slope, curvature)

    def gap(stride: int) -> Tensor:  # to the rule on fewer nodes, up to the next of these
        few = slice(None, None, stride)
        off = (value[few] - _cumulated(place[few], slope[few], curvature[few])).abs()
        rows = torch.arange(len(nodes), device=nodes.device)
        return off[(-(-rows // stride)).clamp(max=len(off) - 1)]

    rule = gap(2)
    if len(nodes) > 4:
        rule = torch.where(rule < gap(4) / 4, rule / 15, rule)
    each = _cumulated(place, first.unsqueeze(-1) * chains)
    noise = each.std(1) / each.shape[1] ** 0.5
    return Curve(scale, nodes, value, slope, (noise.square() + rule.square()).sqrt())


def _cumulated(place: Tensor, slope: Tensor, curvature: Tensor | None = None) -> Tensor:
    h = place.diff().reshape(-1, *[1] * (slope.dim() - 1))
    pieces = 0.5 * h * (slope[:-1] + slope[1:])
    if curvature is not None:
        pieces = pieces + h.square() / 12.0 * (curvature[:-1] - curvature[1:])
    return torch.cat([torch.zeros_like(pieces[:1]), pieces.cumsum(0)])


def _pick(values: Tensor, at: Tensor) -> Tensor:
    """Look up; a plain index without dimensions would be read by Python, and cut off a trace."""
    return values.gather(0, at.reshape(-1)).reshape(at.shape)
