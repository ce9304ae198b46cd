"""Restricted Boltzmann machines learn what they should, by the exact likelihood of each."""

import math

import pytest
import torch

from benchmarks import learning_rbm as bench
from pyro_ebm import zoo
from pyro_ebm.losses import contrastive_divergence, maximum_likelihood
from tests.common import EXACT, FALSE_ALARM

BARS = bench.BARS_CD._replace(batch=14)
PLAIN = bench.BARS_PLAIN._replace(batch=14, num_steps=4000)
OPTIONS = {"lr": 0.1, "decay": 0.0, "scale": 0.1}


def states(n):
    """All points of n spins."""
    return torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * n)


def bound(x):
    """The sum of the log-probabilities of patterns that are all there is, and alike."""
    return -len(x) * math.log(len(x))


def total(rbm, x):
    return len(x) * bench.log_likelihood(rbm, x)


def tree_of(parent):
    """A Chow-Liu tree with other edges."""
    x = some_rows()
    tree = bench.ChowLiu(x, 0.0)
    cells = torch.stack([(x == 0).double(), (x == 1).double()])  # shape: (2, n, d)
    joint = torch.einsum("ani,bni->abi", cells, cells[:, :, parent])
    tree.parent, tree.table = parent, (joint / joint.sum(0)).log()
    return tree


def some_rows():
    """Points whose neighbours are alike."""
    torch.manual_seed(1)
    flips = torch.bernoulli(torch.linspace(0.1, 0.4, 8).expand(2000, 8))
    return flips.cumsum(1) % 2


def test_the_likelihood_of_an_rbm_is_that_of_all_visible_states():
    rbm = zoo.RBM(8, 5, scale=1.0)
    x = some_rows()
    want = -rbm(x).mean() - (-rbm(states(8))).logsumexp(0)
    torch.testing.assert_close(torch.tensor(bench.log_likelihood(rbm, x)), want.detach(), **EXACT)


@pytest.mark.parametrize("smoothing", [0.0, 0.5])
def test_a_tree_sums_to_one(smoothing):
    tree = bench.ChowLiu(some_rows(), smoothing)
    mass = tree.log_prob(states(8)).exp().sum()
    torch.testing.assert_close(mass, torch.tensor(1.0), **EXACT)


def test_the_tree_of_a_chain_is_the_chain():
    assert bench.ChowLiu(some_rows()).parent.tolist() == [0, *range(7)]


def test_no_other_tree_is_likelier():
    x = some_rows()
    best = bench.ChowLiu(x, 0.0).log_prob(x).mean()
    torch.testing.assert_close(tree_of(torch.tensor([0, *range(7)])).log_prob(x).mean(), best)
    for _ in range(20):
        parent = torch.tensor([0] + [int(torch.randint(i, ())) for i in range(1, 8)])
        other = tree_of(parent).log_prob(x).mean()
        assert other < best or parent.tolist() == [0, *range(7)]


def test_patterns_are_bars_or_stripes_each_once():
    assert len(bench.bars_and_stripes(4)) == 30
    assert len(bench.bars_and_stripes(4).unique(dim=0)) == 30
    square = bench.bars_and_stripes(3).unflatten(-1, (3, 3))
    rows, columns = (square == square[:, :, :1]).all((1, 2)), (square == square[:, :1]).all((1, 2))
    assert (rows | columns).all()


def test_centred_gradients_are_those_of_centred_units():
    rbm, x, negatives = zoo.RBM(6, 4, scale=1.0), *states(6)[torch.randperm(64)].chunk(2)
    contrastive_divergence(rbm, x, negatives).backward()
    with torch.no_grad():
        h, h_negative = (rbm.hidden_logits(v).sigmoid() for v in (x, negatives))
        v, mean = x.mean(0), h.mean(0)
        bench.centre(rbm, v, mean)
        weight = (negatives - v).T @ (h_negative - mean) / 32 - (x - v).T @ (h - mean) / 32
        visible = negatives.mean(0) - v - weight @ mean
        hidden = h_negative.mean(0) - mean - v @ weight
    for p, want in zip(rbm.parameters(), (weight, visible, hidden), strict=True):
        torch.testing.assert_close(p.grad, want, **EXACT)


def test_sweeps_leave_the_law_of_an_rbm():
    rbm, x = zoo.RBM(6, 4, scale=1.0), states(6)
    law = torch.softmax(-rbm(x), 0).detach()
    n = 100_000
    moved = bench.sweep(rbm, x[torch.multinomial(law, n, replacement=True)], 2)
    counts = torch.bincount((moved @ 2.0 ** torch.arange(5, -1, -1)).long(), minlength=64)
    p_value = chi_squared(counts, n * law)
    assert p_value > FALSE_ALARM
    rbm.weight.data[0, 0] += 1.0
    assert chi_squared(counts, n * torch.softmax(-rbm(x), 0).detach()) < FALSE_ALARM


def chi_squared(counts, expected):
    value = ((counts - expected).square() / expected).sum()
    return torch.special.gammaincc(torch.tensor((len(counts) - 1) / 2), value / 2).item()


@pytest.mark.slow
def test_the_exact_gradient_reaches_the_bound():
    x = bench.bars_and_stripes(3)
    rbm = bench.learn_exactly(x, 12, num_steps=600, **OPTIONS)
    assert bound(x) - 0.5 < total(rbm, x) < bound(x)  # a hundredth of the bound, from below


@pytest.mark.slow
def test_persistent_chains_come_near_the_bound_and_plain_short_ones_do_not():
    x = bench.bars_and_stripes(3)
    persistent = BARS._replace(num_chains=500, num_steps=2000, lr=0.3)
    near = total(bench.learn(x, 12, persistent, 0.1), x)
    far = total(bench.learn(x, 12, PLAIN, 0.1), x)
    assert bound(x) - 3.0 < near < bound(x)  # .2 nats a pattern: the noise of 500 chains
    assert far < near - 5.0  # the bias of CD-1 (Fischer and Igel, 2010)


def test_exact_learning_is_that_of_the_likelihood():
    rbm, x = zoo.RBM(6, 4, scale=1.0), states(6)[:20]
    maximum_likelihood(rbm, x, rbm.log_partition()).backward()
    law = torch.softmax(-rbm(states(6)), 0)
    (want,) = torch.autograd.grad(
        rbm(x).mean() - (law.detach() * rbm(states(6))).sum(), rbm.weight
    )
    torch.testing.assert_close(rbm.weight.grad, want, **EXACT)


@pytest.mark.slow
def test_the_monitor_sees_contrastive_divergence_diverge():
    (row,) = bench.of_divergence(3, 12, 4000)
    assert row["first"] < row["last"] < row["peak"] - 2.0  # .15 nats a pattern
    assert "falling" in row["the monitor"]
