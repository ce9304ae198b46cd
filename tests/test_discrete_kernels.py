"""Kernels on finite supports, against the sum over all states."""

from functools import partial

import pytest
import torch
from pyro.distributions import constraints

import pyro_ebm as ebm
from pyro_ebm._sites import draw, place_of
from pyro_ebm.kernels import (
    Kernel,
    colouring,
    discrete_mala,
    gibbs,
    gibbs_with_gradients,
    informed,
    metropolis_flips,
)
from tests.common import EXACT, FALSE_ALARM, NUMERIC

BITS = torch.tensor([0.0, 1.0])


def numbers(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# Supports and energies ---------------------------------------------------------------------------


def glass(x):
    """A ring of twelve spins with couplings of both signs and fields: affine in each."""
    s, j, h = 2 * x - 1, numbers(12, seed=1).to(x), numbers(12, seed=2).to(x)
    return -(0.8 * j * s * s.roll(-1, -1) + 0.4 * h * s).sum(-1)


def curved(x):
    """The same with a term of all spins: not affine, and no two are independent."""
    return glass(x) + 0.15 * (2 * x - 1).sum(-1).square() * (0.5 + x[..., 0])


def rungs(x):
    """Whole numbers from 0 to 2 on a ring: no more affine than a spring is."""
    x = x.to(torch.get_default_dtype())
    return 0.4 * (x - x.roll(1, -1)).square().sum(-1) - 0.3 * x[..., :2].sum(-1)


def potts(x):
    coupling = 0.9 * (torch.eye(6).roll(1, 0) + torch.eye(6).roll(-1, 0))
    field = 0.5 * numbers(6, 3, seed=3)
    return ebm.zoo.Potts(6, 3, coupling, field).to(x)(x)


EVEN = torch.arange(12) % 2 == 0
SIX = torch.arange(6) % 2 == 0


class Case:
    """An energy with its values, all its states and their probabilities."""

    def __init__(self, energy, values, states, blocks=None):
        self.energy, self.values, self.states, self.blocks = energy, values, states, blocks
        with torch.no_grad():
            self.p = torch.softmax(-energy(states), 0)

    def sample(self, n):
        return self.states[torch.multinomial(self.p, n, replacement=True)]

    def rows(self, x):
        """Return the numbers of states."""
        one_hot = self.values.dim() > 1
        code = x.argmax(-1) if one_hot else (x.unsqueeze(-1) == self.values).long().argmax(-1)
        k = len(self.values)
        return (code * k ** torch.arange(code.shape[1] - 1, -1, -1)).sum(-1)

    def p_value(self, x):
        """Chi-squared of independent draws, states in 40 groups of like probability."""
        order = self.p.argsort()
        group = torch.empty_like(order)
        group[order] = (self.p[order].cumsum(0) * 39.999).long()
        group = group * 3 + (torch.arange(len(group)) % 3)  # neighbours in p are told apart
        expected = torch.zeros(120).index_add(0, group, self.p) * len(x)
        counts = torch.bincount(group[self.rows(x)], minlength=120)
        chi2 = ((counts - expected).square() / expected)[expected > 0].sum()
        dof = (expected > 0).sum() - 1
        return torch.special.gammaincc(dof / 2, chi2 / 2).item()


def spins(energy, blocks=None):
    states = torch.cartesian_prod(*[BITS.double()] * 12)
    return Case(energy, BITS.double(), states, blocks)


CASES = {
    "ring": lambda: spins(glass, [EVEN, ~EVEN]),
    "curved": lambda: spins(curved),
    "whole numbers": lambda: Case(
        rungs, torch.arange(3), torch.cartesian_prod(*[torch.arange(3)] * 6), [SIX, ~SIX]
    ),
    "potts": lambda: Case(
        potts,
        torch.eye(3),
        ebm.Flat((6, 3), constraints.one_hot).enumerate_support(),
        [SIX, ~SIX],
    ),
}
