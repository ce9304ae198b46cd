"""Traced negatives: the same chains as eager ones, whatever changes between steps."""

import pytest
import torch
from pyro.distributions import constraints
from torch import nn

import pyro_ebm as ebm
from pyro_ebm import _traced
from pyro_ebm.kernels import hmc, mala, nuts, ula, underdamped
from pyro_ebm.losses import contrastive_divergence
from tests.common import EXACT

KERNELS = {
    "mala": {},
    "mala, a step": {"kernel": mala, "step_size": 0.1},
    "ula": {"kernel": ula, "step_size": 0.1},
    "hmc": {"kernel": lambda u, eps: hmc(u, eps, 3)},
    "underdamped": {"kernel": underdamped},
    "weighted": {"weighted": True},
    "restarted": {"restart": 0.2},
}


class Wrapped(nn.Module):
    """A network in a well, which counts its calls."""

    def __init__(self, net):
        super().__init__()
        self.net, self.calls = net, 0

    def forward(self, x):
        self.calls += 1
        return self.net(x).flatten() + x.flatten(1).square().sum(-1)


class Drifting(Wrapped):
    """An energy with a number that changes from call to call."""

    def forward(self, x):
        return (1 + 0.1 * self.calls) * super().forward(x)


class Branching(Wrapped):
    """An energy that looks at its points."""

    def forward(self, x):
        return super().forward(x) * (2 if x.sum() > 0 else 1)


class Noisy(Wrapped):
    def forward(self, x):
        return super().forward(x) + torch.randn(len(x))


def perceptron():
    return nn.Sequential(nn.Linear(4, 8), nn.SiLU(), nn.Linear(8, 1))


def convolution():
    image, features = nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 3, 2)
    return nn.Sequential(image, features, nn.Flatten(), nn.Softplus(), nn.Linear(3, 1))


def learned(backend, make=lambda: Wrapped(perceptron()), num=4, change=None, **options):
    """Return chains at the end of a few steps of learning, and the energy."""
    torch.manual_seed(0)
    energy, x = make(), torch.randn(16, 4)
    optimizer = torch.optim.Adam(energy.parameters(), 0.1)
    base = ebm.Flat((4,), constraints.interval(-3.0, 3.0))
    negatives = ebm.Negatives(energy, base, **{"num_steps": 5, "backend": backend} | options)
    chains = negatives.init(8)
    for i in range(num):
        if change is not None:
            change(energy, i)
        chains, moved = negatives.step(chains)
        optimizer.zero_grad()
        contrastive_divergence(energy, x, moved.x, log_weight=moved.log_weight).backward()
        optimizer.step()
    return chains, energy


def assert_same(a, b):
    torch.testing.assert_close(a.position, b.position, **EXACT)
    torch.testing.assert_close(a.energy, b.energy, **EXACT)


@pytest.mark.parametrize("options", KERNELS.values(), ids=KERNELS)
def test_chains_are_those_of_the_eager_back_end(options):
    eager, _ = learned("eager", **options)
    assert_same(learned("traced", **options)[0], eager)


def test_a_convolution_is_traced():
    make = lambda: Wrapped(convolution())
    eager, slow = learned("eager", make)
    traced, fast = learned("traced", make)
    assert_same(traced, eager)
    assert slow.calls == 4 * (6 + 2)


def test_python_runs_once_a_step():
    calls = [learned("traced", num=num)[1].calls for num in (3, 4, 5)]
    assert [calls[1] - calls[0], calls[2] - calls[1]] == [3, 3]  # the comparison and the loss


def new_weights(energy, i):
    with torch.no_grad():
        if i == 2:
            energy.net[0].weight = nn.Parameter(2 * energy.net[0].weight)


def test_parameters_that_are_new_are_seen():
    assert_same(learned("traced", change=new_weights)[0], learned("eager", change=new_weights)[0])


def test_a_stale_trace_would_be_seen(monkeypatch):
    eager, _ = learned("eager", change=new_weights)
    monkeypatch.setattr(_traced, "_same", lambda *_: True)
    stale, _ = learned("traced", change=new_weights)
    assert not torch.allclose(stale.energy, eager.energy)


def weaker(energy, i):
    energy.net[2].weight = nn.Parameter(energy.net[2].weight.detach() * 0.5**i)


UNFIT = {
    "changed again and again": ({"change": weaker}, "its energies change by more"),
    "branching": ({"make": lambda: Branching(perceptron())}, "RuntimeError"),
    "nuts": ({"kernel": nuts, "num_steps": 1}, "RuntimeError"),
}


@pytest.mark.parametrize(("options", "reason"), UNFIT.values(), ids=UNFIT)
def test_what_cannot_be_traced_is_eager_and_says_why(options, reason):
    eager, _ = learned("eager", **options)
    with pytest.warns(UserWarning, match=reason):
        traced, _ = learned("traced", **options)
    assert_same(traced, eager)


@pytest.mark.parametrize("kind", [Drifting, Noisy])
def test_what_is_no_function_of_points_is_refused(kind):
    with pytest.warns(UserWarning, match=r"runs eagerly: its (trace|energies)"):
        learned("traced", lambda: kind(perceptron()))


def test_a_back_end_must_exist():
    with pytest.raises(ValueError, match="backend must be 'eager' or 'traced', got 'fast'"):
        learned("fast")
