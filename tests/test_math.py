"""The soft minimum, on which free energies by weighted points rest."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pyro_ebm._math import soft_minimum
from tests.common import EXACT

ENERGIES = torch.tensor([1.0, 2.0, 5.0, 2.5], dtype=torch.float64)
SHARES = torch.tensor([0.2, 0.3, 0.1, 0.4], dtype=torch.float64)
BETAS = [1e-6, 1e-3, 0.09, 0.11, 0.25, 1.0, 8.0, 1e3, 1e8]

energies = st.lists(st.floats(-50.0, 50.0), min_size=1, max_size=6)


def reference(energy, share, beta):
    """The same by math.fsum, in Taylor's expansion where beta is small."""
    if beta < 1e-4:
        mean = sum(p * e for e, p in zip(energy, share, strict=True))
        square = sum(p * (e - mean) ** 2 for e, p in zip(energy, share, strict=True))
        return mean - beta * square / 2
    least = min(energy)
    total = math.fsum(
        p * math.exp(-beta * (e - least)) for e, p in zip(energy, share, strict=True)
    )
    return least - math.log(total) / beta


@pytest.mark.parametrize("beta", BETAS)
def test_it_is_precise_at_every_temperature(beta):
    truth = reference(ENERGIES.tolist(), SHARES.tolist(), beta)
    for beta_as in (beta, torch.tensor(beta)):
        value = soft_minimum(ENERGIES, SHARES.log(), beta_as)
        torch.testing.assert_close(value, torch.tensor(truth), **EXACT)
        single = soft_minimum(ENERGIES.float(), SHARES.log().float(), beta_as)
        assert abs(single - truth) < 1e-5  # a few roundings of numbers of order 1 in float32


def test_the_plain_formula_is_not():
    log_sum = (SHARES.log() - 1e-6 * ENERGIES).float().logsumexp(0)
    assert abs(-log_sum / 1e-6 - 2.3) > 1e-2


@given(energies, st.floats(1e-6, 1e4), st.floats(1.0, 100.0))
def test_it_falls_with_beta_for_shares_and_rises_for_counts(values, beta, factor):
    energy = torch.tensor(values)
    counts = torch.zeros(len(values))
    shares = counts - math.log(len(values))
    slack = 1e-9 * (1.0 + energy.abs().max())
    assert (
        soft_minimum(energy, shares, beta * factor) <= soft_minimum(energy, shares, beta) + slack
    )
    rise = soft_minimum(energy, counts, beta * factor) - soft_minimum(energy, counts, beta)
    assert rise >= -slack - 1e-15 * math.log(len(values) + 1) / beta


@given(energies, st.floats(-1e3, 1e3), st.sampled_from([*BETAS, math.inf]))
def test_a_shift_of_the_energy_is_a_shift(values, shift, beta):
    energy = torch.tensor(values)
    shares = torch.full((len(values),), -math.log(len(values)))
    moved = soft_minimum(energy + shift, shares, beta)
    # Rounding of the sum of energy and shift, of order 1e3.
    torch.testing.assert_close(
        moved, soft_minimum(energy, shares, beta) + shift, rtol=0, atol=1e-9
    )


@pytest.mark.parametrize("beta", [*BETAS, math.inf])
def test_walls_and_states_without_measure_play_no_part(beta):
    energy = torch.tensor([1.0, math.inf, 2.0, -7.0], requires_grad=True)
    log_measure = torch.tensor([0.5, 0.25, 0.25, 0.0]).log()
    value = soft_minimum(energy, log_measure, beta)
    (grad,) = torch.autograd.grad(value, energy)
    assert grad[1] == 0
    assert grad[3] == 0
    assert 0 <= grad[2] <= grad[0]
    if beta > 1e2:
        torch.testing.assert_close(value.detach(), torch.tensor(1.0), rtol=0, atol=1 / beta)


@pytest.mark.parametrize("beta", [0.01, 1.0, math.inf])
def test_a_nan_is_not_swallowed(beta):
    energy = torch.tensor([[1.0, 1.0], [math.nan, 2.0]])
    value = soft_minimum(energy, torch.zeros(2, 1), beta)
    assert value[0].isnan()
    assert value[1].isfinite()


@pytest.mark.parametrize("beta", [1e-3, 1.0, 30.0])
def test_its_derivatives_are_shares_and_minus_an_entropy(beta):
    energy, b = ENERGIES.clone().requires_grad_(), torch.tensor(beta, requires_grad=True)
    value = soft_minimum(energy, SHARES.log(), b)
    in_energy, in_beta = torch.autograd.grad(value, [energy, b])
    share = torch.softmax(SHARES.log() - beta * ENERGIES, 0)
    torch.testing.assert_close(in_energy, share, **EXACT)
    # dF/dbeta = (U - F) / beta; the difference of order beta loses digits where beta is small
    slope = -(share * (share / SHARES).log()).sum() / beta**2
    torch.testing.assert_close(in_beta, slope, rtol=1e-8, atol=1e-10)


def test_the_wider_type_holds():
    value = soft_minimum(ENERGIES, torch.zeros(4, dtype=torch.float32), 0.01)
    torch.testing.assert_close(value, soft_minimum(ENERGIES, torch.zeros(4), 0.01), **EXACT)


@pytest.mark.parametrize("constant", [0.0, 1e6, 1e7, 1e8])
def test_a_large_constant_costs_no_digits_of_the_shares(constant):
    energy = (torch.tensor([0.0, 1.0, 2.0]) * max(1.0, constant / 1e6) + constant).float()
    energy.requires_grad_()
    value = soft_minimum(energy, torch.zeros(3, dtype=torch.float32), 1.0)
    (share,) = torch.autograd.grad(value, energy)
    torch.testing.assert_close(share, torch.softmax(-energy.detach().double(), 0).float())
