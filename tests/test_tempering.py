"""Replica exchange: every level keeps its law, all pairs swap, and replicas travel."""

import math

import pytest
import torch

from pyro_ebm.kernels import (
    Kernel,
    MoveInfo,
    adapt_ladder,
    communication_barrier,
    gibbs,
    hmc,
    mala,
    tempered,
    tempering,
    underdamped,
)
from tests.common import EXACT, FALSE_ALARM, FAR, NUMERIC, Line, double_well, gaussian, walled

BETAS = torch.tensor([0.15, 0.4, 1.0], dtype=torch.float64)
INNER = {
    "mala": lambda u: mala(u, 0.3),
    "underdamped": lambda u: underdamped(u, 0.5),
    "hmc": lambda u: hmc(u, 0.3, 4),
}


def place(kernel, make, levels, energy, betas, base=None):
    """Return a state whose levels are at given points, of shape ``(K, n, *event)``."""

    def potential(x):
        tempered_part = betas.unsqueeze(-1) * energy(x)
        return tempered_part if base is None else tempered_part + base(x)

    return kernel.init(levels[-1])._replace(inner=make(potential).init(levels))


def laws_after(make, energy, betas, device, base=None, **grid):
    """Start every level at its law, move a while, and ask each whether its law is still there."""
    betas = betas.to(device)
    full = [lambda x, b=b: b * energy(x) + (0.0 if base is None else base(x)) for b in betas]
    laws = [Line(u, device=device, **grid) for u in full]
    kernel = tempered(make, energy, betas, base_energy=base)
    levels = torch.stack([law.sample(20_000) for law in laws])
    state = place(kernel, make, levels, energy, betas, base)
    for _ in range(20):
        state, _ = kernel.step(state)
    return [law.p_value(x) for law, x in zip(laws, state.inner.position, strict=True)]


@pytest.mark.parametrize("make", INNER.values(), ids=INNER)
def test_every_level_keeps_its_law(make, device):
    assert min(laws_after(make, double_well, BETAS, device)) > FALSE_ALARM


@pytest.mark.parametrize("make", INNER.values(), ids=INNER)
def test_every_level_keeps_its_law_behind_a_wall(make, device):
    grid = {"low": 0.0, "high": 100.0, "n": 400_001}  # the hot level reaches far
    assert min(laws_after(make, walled, BETAS, device, **grid)) > FALSE_ALARM


@pytest.mark.parametrize("make", INNER.values(), ids=INNER)
def test_every_level_keeps_its_law_with_a_base(make, device):
    betas = torch.tensor([0.0, 0.5, 2.0], dtype=torch.float64)
    assert min(laws_after(make, double_well, betas, device, gaussian)) > FALSE_ALARM


def keep(inner, *_):
    return inner


def mixed(swaps, change):
    """Return the swaps of neighbours, with changed temperatures or energies."""
    return lambda ladder, part, odd: swaps(*change(ladder, part), odd)


def share_momentum(exchange):
    def shared(inner, source):
        moved = exchange(inner, source)
        return moved._replace(momentum=moved.momentum[:1].expand_as(moved.momentum))

    return shared


def leave_momentum(exchange):
    return lambda inner, source: exchange(inner, source)._replace(momentum=inner.momentum)


SWAP_FAULTS = {
    "temperatures upside down": lambda ladder, part: (-ladder, part),
    "the next pair's temperatures": lambda ladder, part: (ladder.roll(1, 0), part),
    "one temperature for the difference": lambda ladder, part: (1 + ladder.cumsum(0), part),
    "full energies": lambda ladder, part: (ladder, ladder * part),
    "energies alone": lambda ladder, part: (torch.arange(3.0).unsqueeze(-1).to(part), part),
}


@pytest.mark.parametrize("change", SWAP_FAULTS.values(), ids=SWAP_FAULTS)
def test_the_laws_see_a_wrong_swap(change, device, monkeypatch):
    monkeypatch.setattr(tempering, "_swaps", mixed(tempering._swaps, change))
    assert min(laws_after(INNER["mala"], double_well, BETAS, device)) < FALSE_ALARM


def test_the_laws_see_swaps_that_include_the_base(device, monkeypatch):
    seen = []  # the points of the latest evaluation: when swaps are due, those of the states

    def energy(x):
        seen[:] = [x.detach()]
        return double_well(x)

    change = lambda ladder, part: (ladder, part + 2.0 * gaussian(seen[0]))
    monkeypatch.setattr(tempering, "_swaps", mixed(tempering._swaps, change))
    betas = torch.tensor([0.0, 0.5, 2.0], dtype=torch.float64)
    base = lambda x: 2.0 * gaussian(x)
    assert min(laws_after(INNER["mala"], energy, betas, device, base)) < FALSE_ALARM


@pytest.mark.parametrize("make", INNER.values(), ids=INNER)
def test_the_laws_see_stale_energies_and_gradients(make, device, monkeypatch):
    monkeypatch.setattr(tempering, "_rescale", keep)
    assert min(laws_after(make, double_well, BETAS, device)) < FALSE_ALARM


@pytest.mark.parametrize("make", INNER.values(), ids=INNER)
def test_the_laws_see_stale_energies_and_gradients_with_a_base(make, device, monkeypatch):
    monkeypatch.setattr(tempering, "_refresh", keep)
    betas = torch.tensor([0.0, 0.5, 2.0], dtype=torch.float64)
    assert min(laws_after(make, double_well, betas, device, gaussian)) < FALSE_ALARM


def test_the_laws_see_one_momentum_for_all_replicas(device, monkeypatch):
    monkeypatch.setattr(tempering, "_exchange", share_momentum(tempering._exchange))
    assert min(laws_after(INNER["underdamped"], gaussian, BETAS, device)) < FALSE_ALARM


def still(potential):
    """Make a kernel with momenta that never moves: what happens are the swaps alone."""
    right = underdamped(potential, 0.1)

    def step(state):
        ones = torch.ones_like(state.energy)
        return state, MoveInfo(state.energy, ones, ones.bool(), ~ones.bool())

    return Kernel(right.init, step)


CASES = {
    "rescaled": (BETAS, None),
    "evaluated anew": (BETAS, lambda x: 0.3 * x.sum(-1)),
    "from beta 0": (torch.tensor([0.0, 0.4, 1.0], dtype=torch.float64), gaussian),
}


def swapped_apart(betas, base, device, n=200):
    """Swap a while without moves; return the state before, after, and a fresh evaluation."""
    betas = betas.to(device)
    kernel = tempered(still, double_well, betas, base_energy=base)
    levels = torch.randn(3, n, 2, device=device)
    before = place(kernel, still, levels, double_well, betas, base)
    after = before
    for _ in range(7):
        after, _ = kernel.step(after)
    fresh = place(kernel, still, after.inner.position, double_well, betas, base)
    return before, after, fresh


@pytest.mark.parametrize(("betas", "base"), CASES.values(), ids=CASES)
def test_a_swapped_state_has_the_energy_and_gradient_of_its_level(betas, base, device):
    before, after, fresh = swapped_apart(betas, base, device)
    assert (after.replica != before.replica).any()
    torch.testing.assert_close(after.inner.energy, fresh.inner.energy, **EXACT)
    torch.testing.assert_close(after.inner.grad, fresh.inner.grad, **EXACT)
    torch.testing.assert_close(after.energy, after.inner.energy[-1], **EXACT)
    torch.testing.assert_close(after.grad, after.inner.grad[-1], **EXACT)


def travels_whole(device):
    """Whether positions and momenta are where the labels say."""
    before, after, _ = swapped_apart(BETAS, None, device)
    source = after.replica.unsqueeze(-1)
    parts = zip(before.inner, after.inner, strict=True)
    position, _, _, momentum = (old.equal(new) for old, new in parts)
    assert not position
    assert not momentum
    return all(
        torch.equal(
            getattr(before.inner, name).take_along_dim(source, 0), getattr(after.inner, name)
        )
        for name in ("position", "momentum")
    )


def test_the_whole_state_travels(device):
    assert travels_whole(device)


def test_it_sees_momenta_that_stay_behind(device, monkeypatch):
    monkeypatch.setattr(tempering, "_exchange", leave_momentum(tempering._exchange))
    with pytest.raises(AssertionError):
        assert travels_whole(device)


def trips(num_levels, num_steps, device):
    """Return the counts of round trips where every swap is made, and the replicas at the end."""
    betas = torch.linspace(0.5, 1.0, num_levels, device=device)
    kernel = tempered(still, lambda x: 0.0 * x.sum(-1), betas)
    state, counts = kernel.init(torch.zeros(2, 1, device=device)), []
    for _ in range(num_steps):
        state, info = kernel.step(state)
        counts.append(info.round_trips[0].item())
    assert torch.equal(info.round_trips, state.round_trips)
    return counts, state.replica[:, 0].tolist()


def test_round_trips_are_counted(device):
    # Replicas by level: 012, 102, 120, 210, 201, 021, 012, 102, ...: number 0 starts at the hot
    # end, is at the cold one after 2 steps and back after 5; then each of the three in turn.
    counts, replicas = trips(3, 13, device)
    assert counts == [0, 0, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5]
    assert replicas == [1, 0, 2]


def test_only_even_pairs_make_no_round_trip(device, monkeypatch):
    tried = lambda num_pairs, odd: torch.arange(num_pairs, device=odd.device) % 2 == 0
    monkeypatch.setattr(tempering, "_tried", tried)
    assert trips(3, 13, device)[0][-1] == 0


@pytest.mark.parametrize("num_levels", [2, 3, 6])
def test_all_pairs_swap(num_levels, device):
    betas = torch.linspace(0.2, 1.0, num_levels, device=device)
    kernel = tempered(INNER["mala"], gaussian, betas)
    state, tried = kernel.init(torch.randn(4, 1, device=device)), []
    for _ in range(4):
        state, info = kernel.step(state)
        assert info.swap_prob.shape == (num_levels - 1, 4)
        tried.append(~info.swap_prob[:, 0].isnan())
    even = torch.arange(num_levels - 1, device=device) % 2 == 0
    assert torch.equal(torch.stack(tried), torch.stack([even, ~even, even, ~even]))


def test_swaps_are_as_likely_as_the_closed_form_says(device):
    """E is exponential with rate beta: neighbours a < b swap with probability 2 a / (a + b)."""
    n, betas = 20_000, BETAS.to(device)
    kernel = tempered(still, gaussian, betas)
    levels = torch.randn(3, n, 2, device=device) / betas.sqrt().reshape(3, 1, 1)
    state = place(kernel, still, levels, gaussian, betas)
    truth = 2 * betas[:-1] / (betas[:-1] + betas[1:])
    _, even = kernel.step(state)
    _, odd = kernel.step(state._replace(odd=~state.odd))
    measured = torch.stack([even.swap_prob[0].mean(), odd.swap_prob[1].mean()])
    assert ((measured - truth).abs() < FAR * 0.5 / n**0.5).all()


def test_without_a_base_a_move_costs_one_evaluation(device):
    calls = []

    def counted(x):
        calls.append(x.shape)
        return double_well(x)

    kernel = tempered(INNER["mala"], counted, BETAS.to(device))
    state = kernel.init(torch.zeros(5, 1, device=device))
    calls.clear()
    for _ in range(4):
        state, _ = kernel.step(state)
    assert calls == [(3, 5, 1)] * 4


def test_both_ways_to_the_new_energies_give_the_same_chain(device):
    ends = []
    for base in (None, lambda x: 0.0 * x.sum(-1)):
        torch.manual_seed(3)
        kernel = tempered(INNER["mala"], double_well, BETAS.to(device), base_energy=base)
        state = kernel.init(torch.randn(50, 2, device=device))
        for _ in range(10):
            state, _ = kernel.step(state)
        ends.append(state)
    assert torch.equal(ends[0].replica, ends[1].replica)
    torch.testing.assert_close(ends[0].position, ends[1].position, **NUMERIC)


def angles(k=8, device=None):
    return torch.arange(k, device=device) * (2 * math.pi / k)


def ring(x):
    """Eight modes of standard deviation 0.5 on a circle of radius 5."""
    a = angles(device=x.device).to(x)
    modes = 5.0 * torch.stack([a.cos(), a.sin()], -1)
    return -torch.logsumexp(-2.0 * (x.unsqueeze(-2) - modes).square().sum(-1), -1)


def test_a_ring_of_modes_is_visited_in_proportion(device):
    betas = torch.logspace(math.log10(0.05), 0.0, 6, device=device)
    step = (0.12 / betas).clamp(max=2.0).unsqueeze(-1)
    kernel = tempered(lambda u: mala(u, step), ring, betas)
    state = kernel.init(torch.tensor([5.0, 0.0], device=device).repeat(64, 1))  # all in one mode
    counts = torch.zeros(8, device=device)
    for i in range(2000):
        state, _ = kernel.step(state)
        if i >= 500:
            mode = (torch.atan2(*state.position.T.flip(0)) / (math.pi / 4)).round().long() % 8
            counts += torch.bincount(mode, minlength=8)
    distance = 0.5 * (counts / counts.sum() - 1 / 8).abs().sum()
    assert distance < 0.05
    assert (state.round_trips > 100).all()


def test_one_temperature_does_not_leave_its_mode(device):
    kernel = mala(ring, 0.12)
    state = kernel.init(torch.tensor([5.0, 0.0], device=device).repeat(64, 1))
    for _ in range(500):
        state, _ = kernel.step(state)
    assert (state.position[:, 0] > 0).all()


def couplings(x):
    """The energy of a ring of four spins with values -1, 0 and 2, in a field."""
    return -0.4 * (x * x.roll(1, -1)).sum(-1) + 0.3 * x.sum(-1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.long])
def test_gibbs_sampling_is_tempered_too(dtype, device):
    values = torch.tensor([-1, 0, 2], dtype=dtype, device=device)
    kernel = tempered(lambda u: gibbs(u, values, num_chain_dims=2), couplings, BETAS.to(device))
    state = kernel.init(values[torch.randint(3, (8_000, 4), device=device)])
    for _ in range(15):
        state, info = kernel.step(state)
    assert (info.round_trips > 0).any()
    states = torch.cartesian_prod(*[values] * 4)
    for beta, position in zip(BETAS, state.inner.position, strict=True):
        expected = len(position) * torch.softmax(-beta * couplings(states), 0)
        counts = (position.unsqueeze(1) == states).all(-1).sum(0)
        chi2 = ((counts - expected).square() / expected).sum()
        dof = chi2.new_tensor((len(states) - 1) / 2)
        assert torch.special.gammaincc(dof, chi2 / 2) > FALSE_ALARM


def test_a_wall_holds_at_infinite_temperature(device):
    box = lambda x: torch.where(x.abs().amax(-1) < 1.0, gaussian(x), torch.inf)
    betas = torch.tensor([0.0, 0.5, 1.0], device=device)
    kernel = tempered(lambda u: mala(u, 0.3), box, betas)
    state = kernel.init(torch.zeros(200, 2, device=device))
    for _ in range(20):
        state, info = kernel.step(state)
        assert not info.inner.invalid.any()
    assert (state.inner.position.abs() < 1.0).all()
    assert state.inner.energy.isfinite().all()


def test_a_nan_energy_is_never_swapped(device):
    energy = lambda x: torch.where(x[..., 0] > 0, torch.nan, gaussian(x))
    kernel = tempered(still, energy, BETAS.to(device))
    levels = torch.tensor([-1.0, 1.0, 1.0], device=device).reshape(3, 1, 1).expand(3, 6, 1)
    state = place(kernel, still, levels, energy, BETAS.to(device))
    before = state.replica
    for _ in range(4):
        state, info = kernel.step(state)
        assert (info.swap_prob.nan_to_num(0.0) == 0).all()
        assert info.invalid.all()
    assert torch.equal(state.replica, before)


BAD = {
    "one": [1.0],
    "none": [],
    "equal": [0.5, 0.5, 1.0],
    "falling": [1.0, 0.5],
    "infinite": [0.5, math.inf],
    "nan": [0.5, math.nan],
    "negative": [-0.5, 1.0],
    "matrix": [[0.5, 1.0]],
}


@pytest.mark.parametrize("betas", BAD.values(), ids=BAD)
def test_a_ladder_out_of_order_is_refused(betas):
    with pytest.raises(ValueError, match="betas must be a vector of at least 2 finite .*got"):
        tempered(INNER["mala"], gaussian, torch.tensor(betas))


@pytest.mark.parametrize("betas", [[0.5, 1.0], torch.tensor([0, 1])], ids=["list", "integers"])
def test_a_ladder_of_another_type_is_refused(betas):
    with pytest.raises(TypeError, match="betas must be a floating-point tensor, got"):
        tempered(INNER["mala"], gaussian, betas)


def rates(betas):
    """The rejections of a Gaussian in two dimensions: the best ladder is geometric."""
    return (betas[1:] - betas[:-1]) / (betas[1:] + betas[:-1])


def test_the_adapted_ladder_tends_to_the_best(device):
    betas = torch.linspace(0.01, 1.0, 8, device=device)
    for _ in range(40):
        betas = adapt_ladder(betas, rates(betas))
    torch.testing.assert_close(betas, torch.logspace(-2, 0, 8, device=device), **NUMERIC)


def test_the_barrier_is_that_of_the_closed_form():
    betas = torch.logspace(-2, 0, 2001)
    barrier = communication_barrier(betas, rates(betas))
    torch.testing.assert_close(barrier, 0.5 * (betas / betas[0]).log(), rtol=1e-6, atol=1e-6)


def test_adaptation_keeps_the_ends_and_the_order():
    betas = torch.tensor([0.0, 0.3, 0.5, 1.0])
    for rejection in ([0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.2, 0.9, 0.1]):
        new = adapt_ladder(betas, torch.tensor(rejection))
        assert new[0] == betas[0]
        assert new[-1] == betas[-1]
        assert (new.diff() > 0).all()


@pytest.mark.parametrize("rejection", [[0.5, 1.5], [0.5, math.nan], [-0.1, 0.5]], ids=str)
@pytest.mark.parametrize("function", [adapt_ladder, communication_barrier])
def test_rejections_out_of_range_are_refused(function, rejection):
    with pytest.raises(ValueError, match="rejection must be between 0 and 1, got"):
        function(torch.tensor([0.1, 0.5, 1.0]), torch.tensor(rejection))


def test_rejections_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"rejection must have the shape \(2,\), got \(3,\)"):
        communication_barrier(torch.tensor([0.1, 0.5, 1.0]), torch.zeros(3))
