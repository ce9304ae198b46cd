"""Targets whose laws are known exactly, and whether a kernel that starts there stays there.

Independent chains start in exact draws and move a few times. The Dvoretzky-Kiefer-Wolfowitz
inequality, with Massart's constant, bounds how far an empirical distribution function is from the
true one, for any number of chains: no warm-up, no autocorrelation and no asymptotics.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.distributions import Dirichlet, Gamma, biject_to, constraints
from torch.special import gammainc, ndtr

from pyro_ebm._short_run import unconstrained
from pyro_ebm.kernels import (
    Dense,
    Diagonal,
    Kernel,
    hmc,
    mala,
    nuts,
    tempered,
    underdamped,
)
from tests.common import FALSE_ALARM, Line

STARTS = 50_000
MOVES = 5
CHUNK = 5_000  # chains at once: a tree of NUTS then fits into the cache


class Target(NamedTuple):
    """A potential on unconstrained points, with its law.

    ``sample`` maps a number n and an inverse temperature to independent points ``(n, d)``.
    ``uniforms`` maps points to K numbers each, ``(n, K)``, every one of them uniform on the unit
    interval if the points have the law. ``step`` is a leapfrog step so long that errors matter:
    of trajectories of four such steps some 60 to 80 percent are accepted.
    """

    energy: Callable
    sample: Callable
    uniforms: Callable
    step: float


def gaussian():
    """Three correlated components."""
    factor = torch.tensor([[1.0, 0.0, 0.0], [0.5, 1.0, 0.0], [-0.3, 0.8, 0.6]])
    weights = torch.tensor([0.6, -1.0, 0.5])

    def whiten(x):
        return torch.linalg.solve_triangular(factor, x.mT, upper=False).mT

    def uniforms(x):
        mixed = (whiten(x) * weights).sum(-1) / weights.norm()
        radius = gammainc(torch.tensor(1.5), 0.5 * whiten(x).square().sum(-1))
        return torch.stack([ndtr(x[:, 0]), ndtr(mixed), radius], -1)

    return Target(
        lambda x: 0.5 * whiten(x.reshape(-1, 3)).square().sum(-1).reshape(x.shape[:-1]),
        lambda n, beta=1.0: torch.randn(n, 3) @ factor.mT / beta**0.5,
        uniforms,
        step=0.6,
    )


def well(x):
    return 1.5 * (x.square() - 1.0).square()


def distribution_function(law, x):
    """The exact distribution function of a :class:`Line`, linear within a cell of its grid."""
    below = torch.cat([law.mass.new_zeros(1), law.mass.cumsum(0)])
    cells = (x - law.x[0]) / (law.x[1] - law.x[0]) + 0.5  # of which there are len(law.mass)
    left = cells.nan_to_num().floor().clamp(0, len(law.mass) - 1).long()
    return torch.lerp(below[left], below[left + 1], (cells - left).clamp(0, 1))


def well_law(beta=1.0):
    return Line(lambda x: beta * well(x[..., 0]), low=-4.0, high=4.0)


def sides(law, x):
    """Two uniforms of a component of a symmetric law: where it is, and how far out."""
    u = distribution_function(law, x)
    return [u, (2 * u - 1).abs()]


def double_well():
    """One component with two wells."""
    law = well_law()
    return Target(
        lambda x: well(x[..., 0]),
        lambda n, beta=1.0: well_law(beta).sample(n),
        lambda x: torch.stack(sides(law, x[:, 0]), -1),
        step=0.4,
    )


def half_line():
    """An exponential law on the half line, with a wall at its end."""
    return Target(
        lambda x: torch.where(x[..., 0] > 0, x[..., 0], torch.inf),
        lambda n, beta=1.0: torch.empty(n, 1).exponential_(beta),
        lambda x: -torch.expm1(-x),
        step=0.2,
    )


def positive(jacobian=1.0):
    """A gamma law on the half line, of shape 2 and rate 1, by its logarithm."""
    transform = biject_to(constraints.positive)
    pulled = unconstrained(lambda x: (x - x.log()).sum(-1), transform, 1)
    return Target(
        lambda z: pulled(z) + (1 - jacobian) * z.sum(-1),
        lambda n, beta=1.0: transform.inv(Gamma(torch.tensor(2 * beta), beta).sample((n, 1))),
        lambda z: gammainc(torch.tensor(2.0), transform(z)),
        step=0.9,
    )


def beta_function(a, b, x):
    """The distribution function of a beta law with whole numbers as parameters."""
    n = a + b - 1
    return sum(math.comb(n, j) * x**j * (1 - x) ** (n - j) for j in range(a, n + 1))


def simplex(jacobian=1.0):
    """A Dirichlet law of three components, by stick-breaking."""
    a, transform = (2, 3, 1), biject_to(constraints.simplex)
    weights = torch.tensor(a, dtype=torch.get_default_dtype())

    def potential(x):
        return -((weights - 1) * x.log()).sum(-1)

    pulled = unconstrained(potential, transform, 1)

    def energy(z):
        part = potential(transform(z))
        return part + jacobian * (pulled(z) - part)

    def uniforms(z):
        x = transform(z).unbind(-1)
        return torch.stack([beta_function(k, 6 - k, p) for k, p in zip(a, x, strict=True)], -1)

    def sample(n, beta=1.0):
        return transform.inv(Dirichlet(beta * weights).sample((n,)))

    return Target(energy, sample, uniforms, step=1.4)


def funnel():
    """Neal's funnel: the logarithm v of a variance, and two components with that variance."""

    def energy(z):
        v, x = z[..., 0], z[..., 1:]
        return 0.5 * v.square() + 0.5 * torch.exp(-v) * x.square().sum(-1) + v

    def sample(n, beta=1.0):  # v is normal at every temperature, and x given v
        v = (1 / beta - 1) + torch.randn(n, 1) / beta**0.5
        return torch.cat([v, torch.exp(0.5 * v) * torch.randn(n, 2) / beta**0.5], -1)

    def uniforms(z):
        scaled = z[:, 1:] * torch.exp(-0.5 * z[:, :1])
        radius = -torch.expm1(-0.5 * scaled.square().sum(-1))
        return torch.stack([ndtr(z[:, 0]), ndtr(scaled[:, 0]), radius], -1)

    return Target(energy, sample, uniforms, step=0.75)


def wells():
    """Four wells in the plane: two double wells, turned against the axes."""
    law = well_law()
    turn = torch.tensor([[0.8, -0.6], [0.6, 0.8]])

    def sample(n, beta=1.0):
        tempered_law = well_law(beta)
        return torch.cat([tempered_law.sample(n), tempered_law.sample(n)], -1) @ turn.mT

    def uniforms(x):
        return torch.stack([u for part in (x @ turn).unbind(-1) for u in sides(law, part)], -1)

    return Target(lambda x: well(x @ turn).sum(-1), sample, uniforms, step=0.35)


TARGETS = {
    "gaussian": gaussian,
    "double well": double_well,
    "half line, a wall": half_line,
    "half line, by the logarithm": positive,
    "simplex": simplex,
    "funnel": funnel,
    "wells in the plane": wells,
}


def dense(dim):
    """A metric with correlations that are not the target's."""
    return Dense.of(0.5 * torch.eye(dim) + 0.5)


def diagonal(dim):
    return Diagonal(torch.linspace(0.5, 1.5, dim))


def ladder(target, betas, base=None):
    """Parallel tempering whose replicas all start in their own exact laws."""
    share = 0.0 if base is None else base
    betas = torch.tensor(betas)
    shares = share + (1 - share) * betas  # the part of the whole potential that a level has
    made = []

    def make(potential):
        made.append(mala(potential, (0.5 * target.step**2 / shares).unsqueeze(-1)))
        return made[-1]

    def part(x):
        return (1 - share) * target.energy(x)

    base_energy = None if base is None else lambda x: base * target.energy(x)
    kernel = tempered(make, part, betas, base_energy=base_energy)

    def init(x):
        state = kernel.init(x)
        hot = [target.sample(len(x), beta.item()) for beta in shares[:-1]]
        return state._replace(inner=made[-1].init(torch.stack([*hot, x])))

    return Kernel(init, kernel.step)


KERNELS = {
    "mala": lambda t, dim: mala(t.energy, 0.5 * t.step**2),
    "hmc": lambda t, dim: hmc(t.energy, t.step, 4),
    "hmc, all jittered": lambda t, dim: hmc(t.energy, t.step, 6, jitter=1.0, step_jitter=0.5),
    "hmc, a diagonal metric": lambda t, dim: hmc(t.energy, t.step, 4, metric=diagonal(dim)),
    "hmc, a dense metric": lambda t, dim: hmc(t.energy, t.step, 4, metric=dense(dim)),
    "nuts": lambda t, dim: nuts(t.energy, t.step, max_tree_depth=4, step_jitter=0.2),
    "nuts, shallow trees": lambda t, dim: nuts(t.energy, t.step, max_tree_depth=2),
    "nuts, a dense metric": lambda t, dim: nuts(
        t.energy, t.step, max_tree_depth=3, metric=dense(dim)
    ),
    "underdamped": lambda t, dim: underdamped(t.energy, t.step, 1.0),
    "tempered": lambda t, dim: ladder(t, [0.4, 0.7, 1.0]),
    "tempered, beside a base": lambda t, dim: ladder(t, [0.0, 0.5, 1.0], base=0.4),
}


def distances(u):
    """The largest distances between empirical distribution functions and the diagonal.

    Columns are statistics; a NaN counts as the largest distance that there is.
    """
    n = len(u)
    u = u.nan_to_num(nan=2.0).sort(0).values
    after = torch.arange(1, n + 1).to(u).unsqueeze(-1) / n
    return torch.maximum(after - u, u - after + 1 / n).amax(0)


def bound(n, statistics, false_alarm=FALSE_ALARM):
    """The distance that n independent draws exceed in one of several statistics so rarely."""
    return math.sqrt(math.log(2 * statistics / false_alarm) / (2 * n))


def moved(make, target, n=STARTS, moves=MOVES):
    """Start chains in exact draws, move them, and return their uniforms."""
    parts = []
    for first in range(0, n, CHUNK):
        x = target.sample(min(CHUNK, n - first))
        kernel = make(target, x.shape[-1])
        state = kernel.init(x)
        for _ in range(moves):
            state, _ = kernel.step(state)
        parts.append(target.uniforms(state.position))
    return torch.cat(parts)


def excess(make, target, n=STARTS, moves=MOVES):
    """How far the law has moved, as a multiple of the bound: above 1 it is an alarm."""
    u = moved(make, target, n, moves)
    return distances(u).max().item() / bound(n, u.shape[-1])
