"""Targets with a known log Z, in double precision: the proving ground of the methods.

``TARGETS`` holds twelve kinds, of which two are at three temperatures. Each oracle is another
formula than the one that the methods evaluate: a closed form, the sum over all states in NumPy,
SciPy's quadrature in other coordinates, or Kaufman's solution of the Ising model.
"""

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from scipy import integrate, special

import pyro_ebm as ebm
from pyro_ebm.kernels import gibbs

F64 = torch.float64
CRITICAL = 2 / math.log(1 + math.sqrt(2))  # the temperature of the infinite square lattice


class Target(NamedTuple):
    """An energy, a constructor of its base, its temperature, and the oracle of log Z."""

    energy: Callable[[torch.Tensor], torch.Tensor]
    base: Callable[[], Any]
    log_z: Callable[[], float]
    beta: float = 1.0

    def make(self, seeds=None):
        """Return the distribution, with a batch of ``seeds`` equal temperatures if given.

        Methods draw for each element of a batch on its own: one call is that many seeds.
        """
        beta = self.beta if seeds is None else torch.full((seeds,), self.beta, dtype=F64)
        return ebm.GibbsBoltzmann(self.energy, self.base(), beta)


def numbers(*shape, seed):
    """Standard normal numbers that no other generator disturbs."""
    return torch.as_tensor(np.random.default_rng(seed).standard_normal(shape))


def normal(dim, scale):
    return dist.Normal(torch.zeros(dim, dtype=F64), scale).to_event(1)


def spins(*shape):
    return ebm.Flat(shape, constraints.boolean, dtype=F64)


# Gaussians ---------------------------------------------------------------------------------------


def quadratic(mean, covariance):
    """The energy of a normal distribution, without its constant."""
    precision = covariance.inverse()

    def energy(x):
        r = x - mean
        return 0.5 * ((r @ precision) * r).sum(-1)

    return energy


def gaussian_log_z(mean, covariance, scale):
    """The integral of N(x; 0, scale^2) exp(-E): one normal density, convolved with the other."""
    n = len(mean)
    wide = dist.MultivariateNormal(mean.new_zeros(n), covariance + scale**2 * torch.eye(n))
    return float(wide.log_prob(mean) + 0.5 * (n * math.log(2 * math.pi) + covariance.logdet()))


def gaussian(mean, covariance, scale):
    mean, covariance = mean.to(F64), covariance.to(F64)
    oracle = functools.partial(gaussian_log_z, mean, covariance, scale)
    return Target(quadratic(mean, covariance), lambda: normal(len(mean), scale), oracle)


def correlated(dim):
    """Neighbours correlated by .8, scales from .5 to 1."""
    i, scale = torch.arange(dim, dtype=F64), torch.linspace(0.5, 1.0, dim, dtype=F64)
    return 0.8 ** (i - i[:, None]).abs() * scale * scale[:, None]


MODES = (torch.tensor([-4.0, 0, 0, 0], dtype=F64), torch.tensor([4.0, 0, 0, 0], dtype=F64))
WIDTHS = (0.5, 0.7)
BIMODAL_SCALE = 3.0


def bimodal_energy(x):
    """Two separate normal densities in four dimensions, of heights 1 and exp(1/2)."""
    near, far = ((x - m).square().sum(-1) for m in MODES)
    return -torch.logaddexp(-near / (2 * WIDTHS[0] ** 2), 0.5 - far / (2 * WIDTHS[1] ** 2))


def bimodal_log_z():
    parts = (
        gaussian_log_z(m, w**2 * torch.eye(4, dtype=F64), BIMODAL_SCALE)
        for m, w in zip(MODES, WIDTHS, strict=True)
    )
    return float(np.logaddexp(next(parts), 0.5 + next(parts)))


# Wells in the plane ------------------------------------------------------------------------------


def double_well_energy(x):
    a, b = x[..., 0], x[..., 1]
    return 4 * (a.square() - 1).square() + 0.5 * a + 2 * b.square()


def double_well_log_z():
    """The base is N(0, 2^2); the second component is Gaussian."""
    first = integrate.quad(
        lambda a: math.exp(-4 * (a * a - 1) ** 2 - 0.5 * a - a * a / 8), -5, 5, epsabs=1e-13
    )[0]
    return math.log(first / (2 * math.sqrt(2 * math.pi))) - 0.5 * math.log(1 + 4 * 4)


def ring_energy(x):
    """Four wells on a ring of radius two."""
    a, b = x[..., 0], x[..., 1]
    return 8 * (torch.hypot(a, b) - 2).square() - 2 * torch.cos(4 * torch.atan2(b, a))


def ring_log_z():
    """The base is N(0, 2^2); in polar coordinates the angle gives a Bessel function."""
    radial = integrate.quad(
        lambda r: r * math.exp(-8 * (r - 2) ** 2 - r * r / 8), 0, 8, points=[2.0], epsabs=1e-13
    )[0]
    return math.log(radial / 4 * special.i0(2.0))


# Spins -------------------------------------------------------------------------------------------


def bits(n):
    """All rows of n bits."""
    return (np.arange(2**n)[:, None] >> np.arange(n)) & 1


COUPLING = numbers(16, 16, seed=16).triu(1) / 4
FIELD = 0.2 * numbers(16, seed=17)


def glass_energy(x):
    s = 2 * x - 1
    return -((s @ COUPLING) * s).sum(-1) - s @ FIELD


def glass_log_z(beta):
    s = 2.0 * bits(16) - 1
    energy = -np.einsum("ni,ij,nj->n", s, COUPLING.numpy(), s, optimize=True) - s @ FIELD.numpy()
    return float(special.logsumexp(-beta * energy))


def torus_energy(x):
    """The Ising model on a torus, without a field."""
    s = 2 * x - 1
    return -(s * (s.roll(1, -1) + s.roll(1, -2))).sum((-2, -1))


LOCAL = 0.3 * numbers(3, 3, seed=9)


def ising3_energy(x):
    return torus_energy(x) - ((2 * x - 1) * LOCAL).sum((-2, -1))


def enumerated_log_z(rows, columns, beta, field=None):
    """log Z of a torus bond by bond, over all states."""
    s = (2.0 * bits(rows * columns) - 1).reshape(-1, rows, columns)
    energy = np.zeros(len(s)) if field is None else -(s * field).sum((1, 2))
    for i, j in itertools.product(range(rows), range(columns)):
        energy -= s[:, i, j] * (s[:, (i + 1) % rows, j] + s[:, i, (j + 1) % columns])
    return float(special.logsumexp(-beta * energy))


def log_product(signs_and_logs):
    """The sign and the log of a product."""
    signs, logs = zip(*signs_and_logs, strict=True)
    return math.prod(signs), math.fsum(logs)


def hyperbolic(x):
    """The signs and logs of 2 cosh(x) and 2 sinh(x)."""
    log_sinh = abs(x) + math.log(-math.expm1(-2 * abs(x))) if x else -math.inf
    cosh = 1.0, abs(x) + math.log1p(math.exp(-2 * abs(x)))
    return cosh, (math.copysign(1.0, x), log_sinh)


def kaufman(rows, columns, beta):
    r"""log Z of the Ising model on a torus, with couplings of one (Kaufman, 1949).

    .. math:: Z = \tfrac12 (2 \sinh 2 \beta)^{mn/2} \Big(
        \prod_q 2 \cosh \tfrac m2 \gamma_{2q+1} + \prod_q 2 \sinh \tfrac m2 \gamma_{2q+1} +
        \prod_q 2 \cosh \tfrac m2 \gamma_{2q} + \prod_q 2 \sinh \tfrac m2 \gamma_{2q} \Big)

    with :math:`\cosh \gamma_l = \cosh 2\beta \coth 2\beta - \cos(\pi l / n)`, q from 0 to n - 1,
    positive gammas, but :math:`\gamma_0 = 2 \beta + \log \tanh \beta`: negative above the
    critical temperature.

    References:
        | Crystal Statistics. II. Partition Function Evaluated by Spinor Analysis (Kaufman, 1949)
        | https://doi.org/10.1103/PhysRev.76.1232
    """

    def gamma(l):
        if l == 0:
            return 2 * beta + math.log(math.tanh(beta))
        cosh = math.cosh(2 * beta) / math.tanh(2 * beta) - math.cos(math.pi * l / columns)
        return math.acosh(cosh)

    odd = [hyperbolic(rows / 2 * gamma(2 * q + 1)) for q in range(columns)]
    even = [hyperbolic(rows / 2 * gamma(2 * q)) for q in range(columns)]
    products = [log_product(f) for pairs in (odd, even) for f in zip(*pairs, strict=True)]
    signs, logs = zip(*products, strict=True)
    front = 0.5 * rows * columns * math.log(2 * math.sinh(2 * beta)) - math.log(2)
    return front + float(special.logsumexp(logs, b=signs))


def torus(size, temperature):
    oracle = functools.partial(kaufman, size, size, 1 / temperature)
    return Target(torus_energy, lambda: spins(size, size), oracle, 1 / temperature)


def checkerboard(size):
    """The black and the white sites of a torus."""
    black = (torch.arange(size)[:, None] + torch.arange(size)) % 2 == 0
    return black, ~black


def heat_bath(potential, blocks):
    """Gibbs sampling of zeros and ones, a block of independent components at a time."""
    values = torch.tensor([0.0, 1.0], dtype=F64)
    return gibbs(potential, values, blocks=blocks, conditionals="affine", check=False)


HIDDEN, VISIBLE = 12, 20
WEIGHT = numbers(VISIBLE, HIDDEN, seed=12)  # large enough for several modes
VISIBLE_BIAS = -0.5 * WEIGHT.sum(1) + 0.3 * numbers(VISIBLE, seed=13)
HIDDEN_BIAS = -0.5 * WEIGHT.sum(0) + 0.3 * numbers(HIDDEN, seed=14)


def rbm_energy(x):
    """The free energy of the visible units of a restricted Boltzmann machine."""
    inputs = HIDDEN_BIAS + x @ WEIGHT
    return -x @ VISIBLE_BIAS - torch.nn.functional.softplus(inputs).sum(-1)


def rbm_joint_energy(x):
    """The same machine's energy of visible and hidden units together: the same log Z."""
    v, h = x[..., :VISIBLE], x[..., VISIBLE:]
    return -v @ VISIBLE_BIAS - h @ HIDDEN_BIAS - ((v @ WEIGHT) * h).sum(-1)


def rbm_log_z():
    """The visible units summed in closed form, the hidden ones one by one."""
    h = bits(HIDDEN)
    inputs = VISIBLE_BIAS.numpy() + h @ WEIGHT.numpy().T
    return float(special.logsumexp(h @ HIDDEN_BIAS.numpy() + np.logaddexp(0, inputs).sum(1)))


# Supports ----------------------------------------------------------------------------------------

STIFF, CENTRE = (
    torch.tensor(v, dtype=F64) for v in ((0.5, 4.0, 2.0), (-2.0, 0.5, 3.0))
)  # two of three lie outside the box, so that its mass is at the walls
CONCENTRATION = torch.tensor([2.0, 3.0, 1.5, 4.0], dtype=F64)


def truncated_energy(x):
    return 0.5 * (STIFF * (x - CENTRE).square()).sum(-1)


def truncated_log_z():
    """Normal distributions between -1 and 2."""
    k, m = STIFF.numpy(), CENTRE.numpy()
    mass = special.ndtr((2 - m) * np.sqrt(k)) - special.ndtr((-1 - m) * np.sqrt(k))
    return float((0.5 * np.log(2 * np.pi / k) + np.log(mass)).sum())


def simplex_energy(x):
    return -((CONCENTRATION - 1) * x.log()).sum(-1)


def simplex_log_z():
    """Dirichlet's integral."""
    a = CONCENTRATION.numpy()
    return float(special.gammaln(a).sum() - special.gammaln(a.sum()))


# All ---------------------------------------------------------------------------------------------

TEMPERATURES = {"2": 2.0, "Tc": CRITICAL, "3": 3.0}

TARGETS = {
    "gaussian2": gaussian(torch.tensor([1.0, -0.5]), torch.tensor([[1.0, 0.6], [0.6, 0.5]]), 2.0),
    "gaussian20": gaussian(torch.linspace(-1, 1, 20), correlated(20), 3.0),
    "double_well": Target(double_well_energy, lambda: normal(2, 2.0), double_well_log_z),
    "ring": Target(ring_energy, lambda: normal(2, 2.0), ring_log_z),
    "glass": Target(glass_energy, lambda: spins(16), lambda: glass_log_z(1.5), 1.5),
    "ising3": Target(
        ising3_energy, lambda: spins(3, 3), lambda: enumerated_log_z(3, 3, 0.4, LOCAL.numpy()), 0.4
    ),
    **{f"ising8_{name}": torus(8, t) for name, t in TEMPERATURES.items()},
    **{f"ising16_{name}": torus(16, t) for name, t in TEMPERATURES.items()},
    "rbm": Target(rbm_energy, lambda: spins(VISIBLE), rbm_log_z),
    "truncated": Target(
        truncated_energy,
        lambda: ebm.Flat((3,), constraints.interval(-1.0, 2.0), dtype=F64),
        truncated_log_z,
    ),
    "simplex": Target(
        simplex_energy, lambda: ebm.Flat((4,), constraints.simplex, dtype=F64), simplex_log_z
    ),
    "bimodal": Target(bimodal_energy, lambda: normal(4, BIMODAL_SCALE), bimodal_log_z),
}

RBM_JOINT = Target(rbm_joint_energy, lambda: spins(VISIBLE + HIDDEN), rbm_log_z)
LAYERS = (torch.arange(VISIBLE + HIDDEN) < VISIBLE, torch.arange(VISIBLE + HIDDEN) >= VISIBLE)
