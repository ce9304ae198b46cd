"""Annealed importance sampling of rbms and ebmkit, on our targets.

Both anneal from the base to the target by steps of equal size. rbms knows Boltzmann machines only:
the Ising torus is handed over as one, with a hidden unit for each bond. ebmkit takes any energy
and sampler: its own default for continuous points, and for spins its Gibbs with gradients or the
same heat bath in blocks that we use.
"""

import importlib
import math

import torch

from pyro_ebm import Flat
from tests.partition_targets import HIDDEN_BIAS, VISIBLE_BIAS, WEIGHT, heat_bath


def machine(weight, visible_bias, hidden_bias):
    """Return a restricted Boltzmann machine of rbms; an ImportError names what is missing."""
    classes = importlib.import_module("rbms.bernoulli_bernoulli.classes")
    return classes.BBRBM(weight, visible_bias, hidden_bias)


def torus_machine(size, beta):
    r"""Return the Ising torus as a Boltzmann machine, and its log Z less that of the torus.

    With :math:`\cosh 2a = e^{2\beta}`, :math:`2 \cosh a(s + s') = 2 e^\beta e^{\beta s s'}` is the
    sum over a hidden unit. The units of vertical bonds are mirrored, so that the visible ones need
    no field and the machine without weights is uniform.
    """
    a = math.acosh(math.exp(2 * beta)) / 2
    sites = torch.arange(size**2).reshape(size, size)
    weight = torch.zeros(size**2, 2 * size**2, dtype=torch.float64)
    for dim, sign in ((1, 1.0), (0, -1.0)):
        hidden = sites.flatten() + dim * size**2
        weight[sites.flatten(), hidden] = 4 * a * sign
        weight[sites.roll(1, dim).flatten(), hidden] = 4 * a * sign
    hidden_bias = -weight.sum(0) / 2
    off = size**2 * (2 * math.log(2) + 2 * beta)
    return machine(weight, weight.new_zeros(size**2), hidden_bias), off


def rbms_ais(name, target, particles, steps, count):
    """Return the estimate of rbms; it has no error."""
    ais = importlib.import_module("rbms.partition_function.ais")
    if name.startswith("ising"):
        size = target.base().event_shape[0]
        params, off = torus_machine(size, target.beta)
    else:
        params, off = machine(WEIGHT, VISIBLE_BIAS, HIDDEN_BIAS), 0.0
    value = ais.compute_partition_function_ais(particles, steps + 1, params)
    # at each step two energies, and the conditional means of both layers: as much as a gradient
    count(energies=2 * particles * steps, gradients=particles * steps)
    return value - off


class Uniform:
    """Independent fair coins, with a density whose gradient is zero."""

    def __init__(self, shape):
        self.shape = tuple(shape)

    def sample(self, sample_shape):
        return torch.randint(2, (*sample_shape, *self.shape)).to(torch.float64)

    def log_prob(self, x):
        return 0.0 * x.flatten(1).sum(1) - math.prod(self.shape) * math.log(2)


def block_sampler(blocks):
    """Return the heat bath as a sampler of ebmkit."""
    base = importlib.import_module("ebm.samplers.base")

    class Blocks(base.Sampler):
        def step(self, energy, x):
            kernel = heat_bath(energy, blocks)
            return kernel.step(kernel.init(x))[0].position

    return Blocks(1)


def ebmkit_weights(target, energy, particles, steps, **options):
    """Return the log weights of ebmkit's particles.

    ``options`` may hold ``blocks`` for the heat bath, or ``gradients``, the number of moves of its
    Gibbs with gradients at each temperature; else it is its default, HMC with five leapfrog steps.
    """
    ais = importlib.import_module("ebm.ais")
    base, beta = target.base(), target.beta
    if isinstance(base, Flat):
        start = Uniform(base.event_shape)
        potential = lambda x: beta * energy(x)
    else:
        start = base
        potential = lambda x: beta * energy(x) - base.log_prob(x)
    moves, sampler = 1, None
    if "blocks" in options:
        sampler = block_sampler(options["blocks"])
    elif "gradients" in options:
        moves = options["gradients"]
        sampler = importlib.import_module("ebm.samplers.discrete").GibbsWithGradients()
    return ais.ais_log_z(
        potential, tuple(base.event_shape), base=start, n_temps=steps, n_chains=particles,
        transitions=moves, sampler=sampler,
    ).log_weights  # fmt: skip
