"""The yardsticks measure: a law accepts its own draws and sees a wrong one."""

import pytest
import torch

from tests.common import EXACT, FALSE_ALARM, NUMERIC, Line


def gaussian(x):
    return 0.5 * x.square().sum(-1)


def double_well(x):
    return 2 * (x.square() - 1).square().sum(-1)


@pytest.mark.parametrize("energy", [gaussian, double_well])
def test_a_law_accepts_its_own_draws(energy, device):
    law = Line(energy, device=device)
    assert law.p_value(law.sample(20_000)) > FALSE_ALARM


def test_a_law_accepts_draws_made_elsewhere(device):
    assert Line(gaussian, device=device).p_value(torch.randn(20_000, 1)) > FALSE_ALARM


@pytest.mark.parametrize("fault", [lambda x: 1.1 * x, lambda x: x + 0.1], ids=["wide", "shifted"])
def test_a_law_sees_a_wrong_law(fault, device):
    law = Line(gaussian, device=device)
    assert law.p_value(fault(law.sample(20_000))) < FALSE_ALARM


def test_a_law_knows_its_moments(device):
    # The Gaussian has 2e-9 of its mass outside the grid.
    variance = Line(gaussian, device=device).mean(torch.square)
    torch.testing.assert_close(variance.cpu(), torch.tensor(1.0), **NUMERIC)


def test_tests_run_in_double_precision_with_validation():
    assert torch.get_default_dtype() == torch.float64
    with pytest.raises(ValueError, match="scale"):
        torch.distributions.Normal(0.0, -1.0)
    torch.testing.assert_close(torch.tensor(1.0) + 1e-13, torch.tensor(1.0), **EXACT)
