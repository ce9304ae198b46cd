"""Boltzmann machines against the sum over all states."""

import math

import pytest
import torch
from pyro.distributions import constraints

import pyro_ebm as ebm
from pyro_ebm.kernels import gibbs
from pyro_ebm.zoo import RBM, Ising, Potts, boltzmann
from tests.common import EXACT, FAR


def machine(num_visible, num_hidden):
    rbm = RBM(num_visible, num_hidden, scale=1.0)
    torch.nn.init.normal_(rbm.visible_bias)
    torch.nn.init.normal_(rbm.hidden_bias)
    return rbm


def enumerated(rbm, beta):
    states = ebm.Flat((sum(rbm.weight.shape),), constraints.boolean).enumerate_support()
    v, h = states.split(list(rbm.weight.shape), -1)
    return (-beta * rbm(v, h)).logsumexp(0)


@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (1, 1)], ids=str)
@pytest.mark.parametrize("chunk", [1 << 14, 4], ids=["whole", "chunks"])
def test_the_log_partition_of_an_rbm_is_the_sum_over_all_states(shape, chunk, monkeypatch):
    monkeypatch.setattr(boltzmann, "CHUNK", chunk)
    rbm, beta = machine(*shape), torch.tensor(0.7, requires_grad=True)
    values = rbm.log_partition(beta), enumerated(rbm, beta)
    torch.testing.assert_close(*values, **EXACT)
    inputs = [beta, *rbm.parameters()]
    slopes = [torch.autograd.grad(value, inputs) for value in values]
    torch.testing.assert_close(*slopes, **EXACT)


def test_the_log_partition_at_one_is_that_of_the_free_energy():
    rbm = machine(4, 6)
    states = ebm.Flat((4,), constraints.boolean).enumerate_support()
    torch.testing.assert_close(rbm.log_partition(), (-rbm(states)).logsumexp(0), **EXACT)


def test_an_rbm_of_large_layers_is_not_summed():
    with pytest.raises(ValueError, match="must be at most 24 to sum .*, got 25, 30"):
        RBM(25, 30).log_partition()


def test_the_energy_of_potts_is_its_sum_over_pairs():
    n, k = 4, 3
    energy = Potts(n, k, torch.randn(n, n), torch.randn(n, k))
    states = torch.randint(k, (2, 5, n))
    expected = torch.zeros(2, 5)
    for i in range(n):
        expected -= energy.field[i, states[..., i]]
        for j in range(n):
            if i != j:
                expected -= 0.5 * energy.coupling[i, j] * (states[..., i] == states[..., j])
    got = energy(torch.nn.functional.one_hot(states, k).to(expected))
    torch.testing.assert_close(got, expected, **EXACT)


def test_couplings_and_fields_of_the_wrong_shape_are_refused():
    with pytest.raises(ValueError, match=r"coupling must have the shape \(3, 3\), got \(2, 2\)"):
        Potts(3, 2, torch.zeros(2, 2))
    with pytest.raises(ValueError, match=r"field must have the shape \(3, 2\), got \(3,\)"):
        Potts(3, 2, field=torch.zeros(3))
    with pytest.raises(ValueError, match="num_sites and num_states must be positive, got 0, 2"):
        Potts(0, 2)


def test_spins_without_couplings_follow_twice_their_fields():
    # The energies of s = -1 and 1 differ by 2 h: sigmoid(h) = .622 would be the fault.
    ising = Ising(1, field=torch.tensor([0.5]))
    d = ebm.GibbsBoltzmann(ising, ebm.Flat((1,), constraints.boolean), 1.0)
    share = d.sample((100_000,)).mean().item()
    kernel = gibbs(ising, torch.tensor([0.0, 1.0]), blocks=[torch.tensor([True])])
    swept = kernel.step(kernel.init(torch.zeros(100_000, 1)))[0].position.mean().item()
    exact = 1 / (1 + math.exp(-1.0))  # .731
    error = math.sqrt(exact * (1 - exact) / 100_000)
    assert abs(share - exact) < FAR * error
    assert abs(swept - exact) < FAR * error
    assert abs(1 / (1 + math.exp(-0.5)) - exact) > 10 * FAR * error  # it would be seen
