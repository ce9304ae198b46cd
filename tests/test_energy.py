"""Energies and their algebra."""

import copy
import pickle

import pytest
import torch
from torch import nn

import pyro_ebm as ebm
from pyro_ebm.energy import value_and_grad
from tests.common import EXACT, NUMERIC


def square(x):
    return 0.5 * x.square().sum(-1)


def distance(x, y):
    return (x - y).square().sum(-1)


ALGEBRA = {
    "Sum": lambda: ebm.Sum(square, ebm.zoo.MLPEnergy(2, (8,))),
    "Scaled": lambda: ebm.Scaled(ebm.zoo.MLPEnergy(2, (8,)), 3.0),
    "Scaled by a parameter": lambda: ebm.Scaled(square, nn.Parameter(torch.tensor(2.0))),
    "Given": lambda: ebm.Given(distance, torch.ones(2)),
    "Given first": lambda: ebm.Given(distance, torch.ones(2), ...),
    "Given by name": lambda: ebm.Given(distance, y=torch.ones(2)),
    "nested": lambda: ebm.Sum(ebm.Scaled(ebm.Given(distance, torch.ones(2)), 2.0), square),
    "MLPEnergy": lambda: ebm.zoo.MLPEnergy(2, (8, 8)),
}
parametrize = pytest.mark.parametrize("make", ALGEBRA.values(), ids=ALGEBRA)


@parametrize
@pytest.mark.parametrize("batch", [(), (3,), (2, 3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_it_gives_one_energy_per_point(make, batch, dtype, device):
    torch.set_default_dtype(dtype)
    with device:  # parts that are made without a device
        energy = make().to(device)
    x = torch.randn(*batch, 2, device=device)
    value = energy(x)
    assert value.shape == batch
    assert value.dtype == dtype
    assert value.isfinite().all()


@parametrize
def test_a_batch_gives_what_its_points_give(make):
    energy, x = make(), torch.randn(2, 3, 2)
    alone = torch.stack([energy(point) for point in x.flatten(0, 1)]).reshape(2, 3)
    torch.testing.assert_close(energy(x), alone, **EXACT)


@parametrize
def test_force_is_minus_the_finite_difference(make):
    energy, x, h = make(), torch.randn(4, 2), 1e-5
    difference = [(energy(x + h * e) - energy(x - h * e)) / (2 * h) for e in torch.eye(2)]
    torch.testing.assert_close(
        ebm.force(energy, x), -torch.stack(difference, -1).detach(), **NUMERIC
    )


@parametrize
def test_every_parameter_is_found_and_gets_a_gradient(make):
    energy = make()
    energy(torch.randn(4, 2)).sum().backward() if list(energy.parameters()) else None
    assert all(p.grad is not None for p in energy.parameters())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda e: pickle.loads(pickle.dumps(e))])
def test_copies_give_the_same_energies(copied):
    energy = ebm.Sum(ebm.zoo.MLPEnergy(2, (8,)), ebm.Given(distance, torch.ones(2)))
    x = torch.randn(5, 2)
    other = copied(energy)
    torch.testing.assert_close(other(x), energy(x), **EXACT)
    with torch.no_grad():
        next(other.parameters()).add_(1.0)
    assert not torch.equal(other(x), energy(x))


def test_sum_and_scaled_follow_their_formulas():
    x, y = torch.randn(7, 2), torch.randn(2)
    expected = 2.0 * distance(x, y) + square(x)
    total = ebm.Sum(ebm.Scaled(ebm.Given(distance, y), 2.0), square)
    torch.testing.assert_close(total(x), expected, **EXACT)


def test_given_holds_any_part():
    x, y = torch.randn(7, 2), torch.randn(2)

    def joint(a, b):
        return (a - 2 * b).square().sum(-1)

    torch.testing.assert_close(ebm.Given(joint, y)(x), joint(x, y), **EXACT)
    torch.testing.assert_close(ebm.Given(joint, y, ...)(x), joint(y, x), **EXACT)
    torch.testing.assert_close(ebm.Given(joint, b=y)(x), joint(x, y), **EXACT)


def test_given_refuses_two_free_places():
    with pytest.raises(ValueError, match="at most one"):
        ebm.Given(distance, ..., ...)


def test_sum_refuses_nothing_and_what_is_not_callable():
    with pytest.raises(TypeError, match="at least one energy"):
        ebm.Sum()
    with pytest.raises(TypeError, match="callable, got Tensor"):
        ebm.Sum(torch.zeros(2))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=str)
def test_force_leaves_no_trace_and_works_without_gradients(mode, device):
    energy, x = ebm.zoo.MLPEnergy(2, (8,)).to(device), torch.randn(3, 2, device=device)
    expected = ebm.force(energy, x)
    with mode():
        torch.testing.assert_close(ebm.force(energy, x), expected, **EXACT)
    assert all(p.grad is None for p in energy.parameters())
    assert not x.requires_grad


def test_an_energy_without_a_graph_is_named():
    with pytest.raises(ValueError, match="must depend differentiably on its points"):
        value_and_grad(lambda x: x.detach().sum(-1), torch.zeros(3, 2))


def test_mlp_energy_starts_near_the_base_at_a_small_scale():
    small = ebm.zoo.MLPEnergy(2, scale=1e-9)
    assert small(torch.randn(100, 2)).abs().max() < 1e-6


def test_mlp_energy_refuses_empty_layers():
    with pytest.raises(ValueError, match="must be positive, got 0"):
        ebm.zoo.MLPEnergy(0)
