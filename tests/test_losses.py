"""The contract of all losses; what is special to one is in the file of its family."""

import math

import pytest
import torch
from pyro.distributions import Normal

from pyro_ebm import losses
from tests.common import EXACT, NUMERIC
from tests.losses_table import LOSSES, NOT_OF_AN_ENERGY, Case, Smooth, points

HONEST = {name: case for name, case in LOSSES.items() if case.exact_gradient}
every_loss = pytest.mark.parametrize("case", LOSSES.values(), ids=LOSSES)


def gradients(case, energy, tensors, shift=0.0):
    """Return the loss of an energy plus a constant, and its gradients in the parameters."""
    value = case.loss(lambda *parts: energy(*parts) + shift, *tensors)
    return value.detach(), torch.autograd.grad(value, [*energy.parameters()])


def as_dtype(tensors, dtype):
    return tuple(t.to(dtype) if t.is_floating_point() else t for t in tensors)


def test_every_loss_is_in_the_table():
    assert {name.partition(",")[0] for name in LOSSES} | NOT_OF_AN_ENERGY == set(losses.__all__)


@every_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_is_a_finite_scalar_of_the_dtype_of_its_points(case, dtype, device):
    tensors = tuple(t.to(device) for t in as_dtype(case.tensors(), dtype))
    value = case.loss(case.energy().to(device, dtype), *tensors)
    assert value.shape == ()
    assert value.dtype == dtype
    assert value.device.type == device.type
    assert value.isfinite()


@every_loss
def test_single_precision_gives_the_same_number(case):
    double = case.loss(case.energy(), *case.tensors()).item()
    single = case.loss(case.energy().float(), *as_dtype(case.tensors(), torch.float32)).item()
    assert math.isclose(single, double, rel_tol=1e-4, abs_tol=1e-4)  # float32, a few dozen terms


@every_loss
def test_its_gradient_reaches_every_parameter(case):
    _, grads = gradients(case, case.energy(), case.tensors())
    assert all(g.isfinite().all() for g in grads)
    assert all((g != 0).any() for g in grads)


@every_loss
def test_it_has_a_value_without_gradients(case):
    value = case.loss(case.energy(), *case.tensors())
    with torch.no_grad():
        alone = case.loss(case.energy(), *case.tensors())
    torch.testing.assert_close(alone, value.detach(), **EXACT)
    assert not alone.requires_grad


def flows_into(case):
    """Return the places of the tensors that get a gradient, where all of them could."""
    tensors = [t.requires_grad_(t.is_floating_point()) for t in case.tensors()]
    energy = case.energy()
    case.loss(energy, *tensors).backward()
    return {i for i, t in enumerate(tensors) if t.grad is not None}


@every_loss
def test_no_gradient_flows_into_negatives_and_noise(case):
    assert not flows_into(case) & set(case.blocked)


@every_loss
def test_it_leaves_its_points_and_the_gradients_of_parameters_alone(case):
    energy, tensors, before = case.energy(), case.tensors(), case.tensors()
    for t in tensors:
        t.requires_grad_(t.is_floating_point())
    case.loss(energy, *tensors)
    assert all(t.grad is None for t in [*tensors, *energy.parameters()])
    plain = case.tensors()
    case.loss(energy, *plain).backward()
    assert not any(t.requires_grad or t.grad is not None for t in plain)
    assert all(torch.equal(a, b) for a, b in zip(plain, before, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


@every_loss
def test_it_draws_no_random_numbers(case):
    before = torch.get_rng_state()
    case.loss(case.energy(), *case.tensors()).backward()
    assert torch.equal(before, torch.get_rng_state())


@every_loss
def test_a_constant_in_the_energy_matters_only_where_it_should(case):
    energy, tensors = case.energy(), case.tensors()
    plain, shifted = (gradients(case, energy, tensors, shift) for shift in (0.0, 3.7))
    same = [torch.allclose(a, b, **EXACT) for a, b in zip(plain[1], shifted[1], strict=True)]
    if case.exact_gradient:
        same.append(torch.allclose(plain[0], shifted[0], **EXACT))
    assert all(same) == case.invariant


def with_nan_in(call, energy):
    """Return the energy, with NaN as the first value of one of its calls."""
    calls = 0

    def faulty(*parts):
        nonlocal calls
        value = energy(*parts)
        calls += 1
        if calls != call + 1:
            return value
        factor = torch.ones_like(value.detach())
        factor.flatten()[0] = math.nan
        return value * factor

    return faulty


@every_loss
def test_one_energy_that_is_nan_makes_the_loss_nan(case):
    for call in range(case.cost[0]):
        value = case.loss(with_nan_in(call, case.energy()), *case.tensors())
        assert value.isnan(), f"call {call}"


@every_loss
def test_no_points_are_an_error(case):
    for letter in sorted(set(case.rows) - {"."}):
        tensors = [
            t[:0] if row == letter else t for row, t in zip(case.rows, case.tensors(), strict=True)
        ]
        with pytest.raises(ValueError, match="must|empty"):
            case.loss(case.energy(), *tensors)


CALLED_BY_THE_CASE = ("maximum_likelihood", "improved", "adversarial", "multi_level")


@pytest.mark.parametrize("name", [n for n in LOSSES if not n.startswith(CALLED_BY_THE_CASE)])
def test_a_distribution_is_no_energy(name):
    """To call a distribution is to draw from it."""
    case = LOSSES[name]
    with pytest.raises(TypeError, match="energy must be .* got Normal"):
        case.loss(Normal(torch.zeros(2), 1.0), *case.tensors())


@every_loss
def test_it_costs_the_evaluations_that_it_claims(case):
    energy, sizes = case.energy(), []

    def counted(*parts):
        value = energy(*parts)
        sizes.append(value.numel())
        return value

    case.loss(counted, *case.tensors()).backward()
    assert (len(sizes), sum(sizes)) == case.cost


@every_loss
def test_the_order_of_the_rows_does_not_matter(case):
    tensors, energy = case.tensors(), case.energy()
    sizes = {row: len(t) for row, t in zip(case.rows, tensors, strict=True)}
    order = {row: torch.randperm(size) for row, size in sizes.items() if row != "."}
    mixed = [t[order[r]] if r in order else t for r, t in zip(case.rows, tensors, strict=True)]
    plain, other = gradients(case, energy, tensors), gradients(case, energy, mixed)
    torch.testing.assert_close(other, plain, **EXACT)


@pytest.mark.parametrize("case", HONEST.values(), ids=HONEST)
def test_its_gradient_is_that_of_its_value_along_a_direction(case):
    energy, tensors, h = case.energy(), case.tensors(), 1e-5
    _, grads = gradients(case, energy, tensors)
    directions = points(*(p.shape for p in energy.parameters()), seed=3)

    def at(step):
        moved = case.energy()
        with torch.no_grad():
            for p, v in zip(moved.parameters(), directions, strict=True):
                p.add_(step * v)
        return case.loss(moved, *tensors).detach()

    slope = sum((g * v).sum() for g, v in zip(grads, directions, strict=True))
    torch.testing.assert_close((at(h) - at(-h)) / (2 * h), slope, **NUMERIC)


# Losses with a fault each, to show that the tests above see it -------------------------------


def faulty_case(loss, **claims):
    return Case(loss, lambda: points((6, 2), (8, 2)), "ab", (2, 14), (1,))._replace(**claims)


def clamped(energy, x, negatives):
    return losses.contrastive_divergence(energy, x, negatives).nan_to_num(0.1)


def leaky(energy, x, negatives):
    return energy(x).mean() - energy(negatives).mean()


def unbalanced(energy, x, negatives):
    return energy(x).mean() - 0.9 * energy(negatives.detach()).mean()


def of_the_first(energy, x, negatives):
    return energy(x)[0] - energy(negatives.detach()).mean()


def writes(energy, x, negatives):
    energy(x.requires_grad_()).mean().backward()
    return leaky(energy, x, negatives)


def noisy(energy, x, negatives):
    return leaky(energy, x, negatives + torch.randn_like(negatives))


def thrice(energy, x, negatives):
    return energy(x).mean() - 0.5 * energy(negatives).mean() - 0.5 * energy(negatives).mean()


def half_stopped(energy, x, negatives):
    return energy(x).mean() - energy(negatives.detach()).mean().detach()


FAULTS = {
    "a made-up number": (clamped, test_one_energy_that_is_nan_makes_the_loss_nan),
    "a leak": (leaky, test_no_gradient_flows_into_negatives_and_noise),
    "a constant": (unbalanced, test_a_constant_in_the_energy_matters_only_where_it_should),
    "an order": (of_the_first, test_the_order_of_the_rows_does_not_matter),
    "a trace": (writes, test_it_leaves_its_points_and_the_gradients_of_parameters_alone),
    "noise": (noisy, test_it_draws_no_random_numbers),
    "a cost": (thrice, test_it_costs_the_evaluations_that_it_claims),
    "a stop": (half_stopped, test_its_gradient_is_that_of_its_value_along_a_direction),
}


@pytest.mark.parametrize(("loss", "check"), FAULTS.values(), ids=FAULTS)
def test_the_contract_sees(loss, check):
    with pytest.raises(AssertionError):
        check(faulty_case(loss))


def test_a_right_loss_passes_where_faulty_ones_fail():
    for _, check in FAULTS.values():
        check(faulty_case(losses.contrastive_divergence))


def test_the_energy_of_the_table_takes_parts():
    x, y = points((5, 1, 2), (4, 1))
    assert Smooth(3)(x, y).shape == (5, 4)
