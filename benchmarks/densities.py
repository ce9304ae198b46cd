"""Densities on the plane with exact likelihoods: samplers, log densities and the gap to the truth.

All live on (-4, 4)^2. The density of a curve with Gaussian noise is a sum along the curve; the
pinwheel's is that of its change of variables.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import pyro_ebm as ebm

SIDE, CELLS = 4.0, 256  # cell edges on the integers, where the checkerboard jumps


class Density(NamedTuple):
    """A density on the plane: ``sample(n)`` gives points ``(n, 2)``."""

    sample: Callable[[int], Tensor]
    log_prob: Callable[[Tensor], Tensor]


def normal(x: Tensor, mean: float, sd: float) -> Tensor:
    return -0.5 * ((x - mean) / sd).square() - math.log(sd * math.sqrt(2 * math.pi))


def polar(radius: Tensor, angle: Tensor) -> Tensor:
    return torch.stack([radius * angle.cos(), radius * angle.sin()], -1)


def ring() -> Density:
    """Radius N(2, .15^2), all directions."""

    def log_prob(x):
        r = x.norm(dim=-1)
        return normal(r, 2.0, 0.15) - (2 * math.pi * r).log()

    return Density(
        lambda n: polar(2.0 + 0.15 * torch.randn(n), 2 * math.pi * torch.rand(n)), log_prob
    )


def along(arms, low, high, sd, power=1) -> Density:
    """Make the density of points on curves with Gaussian noise.

    ``arms`` maps times ``(*n,)`` to points ``(*n, arms, 2)``; the time has a density that is
    proportional to ``t ** (power - 1)`` from ``low`` to ``high``.
    """
    unit, weight = map(torch.from_numpy, np.polynomial.legendre.leggauss(400))
    time = low + (high - low) * (unit + 1) / 2
    mass = weight * time ** (power - 1)
    log_mass = (mass / mass.sum()).log()

    def sample(n):
        u = low**power + (high**power - low**power) * torch.rand(n)
        points = arms(u ** (1 / power))
        pick = torch.randint(points.shape[1], (n,))
        return points[torch.arange(n), pick] + sd * torch.randn(n, 2)

    def log_prob(x):
        nodes = arms(time)  # shape: (nodes, arms, 2)
        log_weight = (log_mass - math.log(nodes.shape[1])).repeat_interleave(nodes.shape[1])
        rows = x.reshape(-1, 2).to(nodes).split(4096)
        square = [torch.cdist(row, nodes.reshape(-1, 2)).square() / (2 * sd**2) for row in rows]
        log_sum = torch.cat([(log_weight - part).logsumexp(1) for part in square])
        return (log_sum - math.log(2 * math.pi * sd**2)).reshape(x.shape[:-1]).to(x)

    return Density(sample, log_prob)


def moons() -> Density:
    """Draw scikit-learn's ``make_moons(noise=0.1)`` times 1.5."""

    def arms(t):
        outer = polar(torch.ones_like(t), t)
        return 1.5 * torch.stack([outer, outer.new_tensor([1.0, 0.5]) - outer], -2)

    return along(arms, 0.0, math.pi, 0.15)


def eight_gaussians() -> Density:
    def arms(t):
        return (
            polar(torch.full((8,), 2.0), torch.arange(8) * math.pi / 4)
            .to(t)
            .expand(*t.shape, 8, 2)
        )

    return along(arms, 0.0, 1.0, 0.15)


def swiss_roll() -> Density:
    """Draw scikit-learn's ``make_swiss_roll(noise=1.0)`` over 5, without its height."""
    return along(lambda t: polar(t, t).unsqueeze(-2) / 5, 1.5 * math.pi, 4.5 * math.pi, 0.2)


def spirals() -> Density:
    def arms(t):
        arm = polar(t, t) / (1.5 * math.pi)
        return torch.stack([arm, -arm], -2)

    return along(arms, 0.0, 3 * math.pi, 0.08, power=2)


def checkerboard() -> Density:
    """Uniform on every other unit square of (-2, 2)^2."""

    def sample(n):
        column, row = torch.randint(4, (n,)), 2 * torch.randint(2, (n,))
        return torch.stack([column, row + column % 2], -1) - 2 + torch.rand(n, 2)

    def log_prob(x):
        on = (x.floor().sum(-1) % 2 == 0) & (x.abs() < 2).all(-1)
        return torch.where(on, -math.log(8.0), -torch.inf).to(x)

    return Density(sample, log_prob)


def pinwheel(radial=0.3, tangential=0.1, blades=5, rate=0.25) -> Density:
    """Five blades: Gaussians at radius 1, turned by an angle that grows with it; times 1.5."""
    starts = torch.arange(blades) * 2 * math.pi / blades

    def turn(points, angle):
        a, b = points.unbind(-1)
        return torch.stack(
            [a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1
        )

    def sample(n):
        blade = torch.stack([1 + radial * torch.randn(n), tangential * torch.randn(n)], -1)
        angle = starts[torch.randint(blades, (n,))] + rate * blade[:, 0].exp()
        return 1.5 * turn(blade, angle)

    def log_prob(x):
        x = x.unsqueeze(-2) / 1.5
        a = x.norm(dim=-1).expand(*x.shape[:-2], blades)
        for _ in range(50):  # a contraction wherever there is mass
            back = turn(x, -(starts.to(x) + rate * a.exp()))
            moved, a = (back[..., 0] - a).abs(), back[..., 0]
        b = back[..., 1]
        jacobian = 1.5**2 * (1 - rate * a.exp() * b).abs()
        each = normal(a, 1.0, radial) + normal(b, 0.0, tangential) - jacobian.log()
        return torch.where(moved < 1e-6, each, -torch.inf).logsumexp(-1) - math.log(blades)

    return Density(sample, log_prob)


DENSITIES = {
    "ring": ring,
    "moons": moons,
    "8 Gaussians": eight_gaussians,
    "checkerboard": checkerboard,
    "pinwheel": pinwheel,
    "swiss roll": swiss_roll,
    "two spirals": spirals,
}


@functools.lru_cache
def table(name: str) -> tuple[Tensor, Tensor, float]:
    """Return the grid ``(n, 2)``, the mass of its cells, and the entropy of a density."""
    width = 2 * SIDE / CELLS
    axis = -SIDE + width * (torch.arange(CELLS, dtype=torch.float64) + 0.5)
    points = torch.cartesian_prod(axis, axis)
    log_prob = DENSITIES[name]().log_prob(points)
    mass = log_prob.exp() * width**2
    return points.float(), mass, -torch.special.xlogy(mass, mass / width**2).sum().item()


@torch.no_grad()
def divergence(
    name: str, potential: Callable[[Tensor], Tensor], num_points: int = 400
) -> tuple[float, float]:
    """Return the exact Kullback-Leibler divergence from a density, and the error of its log Z."""
    points, mass, entropy = table(name)
    d = ebm.GibbsBoltzmann(potential, ebm.Flat((2,)))
    log_z, error, _ = ebm.log_partition(d, ebm.partition.Quadrature(-8.0, 8.0, num_points))
    return ((mass * potential(points)).sum() + log_z - entropy).item(), error.item()
