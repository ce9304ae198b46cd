"""Every exact kernel keeps laws that are known exactly, and planted bugs do not."""

import importlib
import math

import pytest
import torch

from pyro_ebm.energy import value_and_grad
from pyro_ebm.kernels import Dense, Diagonal, base, hmc, langevin, tempering
from tests.common import EXACT
from tests.invariance import (
    KERNELS,
    STARTS,
    TARGETS,
    bound,
    dense,
    diagonal,
    distances,
    excess,
    positive,
    simplex,
    well,
)

# The package's names hmc and nuts are the kernels; these are their modules.
hmc_module = importlib.import_module("pyro_ebm.kernels.hmc")
nuts_module = importlib.import_module("pyro_ebm.kernels.nuts")

SOME = 20_000  # chains that are enough to see a bug
FEW = 1_000  # where there are 200 seeds, which are also moved less often: for time


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize("make", KERNELS.values(), ids=KERNELS)
def test_a_kernel_keeps_a_law_in_which_it_starts(make, target, device):
    with device:
        assert excess(make, target()) < 1


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_exact_draws_have_the_law_that_their_target_says(target, device):
    with device:
        law = target()
        u = law.uniforms(law.sample(STARTS))
    assert ((u >= 0) & (u <= 1)).all()
    assert (distances(u) < bound(*u.shape)).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", KERNELS)
def test_there_is_no_false_alarm_in_200_seeds(name, device):
    with device:
        targets = [target() for target in TARGETS.values()]
        for seed in range(200):
            torch.manual_seed(seed)
            assert excess(KERNELS[name], targets[seed % len(targets)], n=FEW, moves=2) < 1


def test_a_shift_of_0_024_is_seen():
    statistics, shift = 4, 0.024
    spare = shift - bound(STARTS, statistics)
    assert math.exp(-2 * STARTS * spare**2) < 1e-5  # Hoeffding: the chance not to see it
    for seed in range(20):
        torch.manual_seed(seed)
        u = torch.rand(STARTS, statistics)
        u[:, 0] += shift * (1 - (2 * u[:, 0] - 1).abs())
        assert distances(u).max() > bound(STARTS, statistics)


# Bugs -------------------------------------------------------------------------------------------


def ratio_of(module, change):
    """Metropolis with another log ratio of the proposals."""

    def plant(patch):
        right = base.metropolis
        patch(module, "metropolis", lambda old, new, r, *u: right(old, new, change(r), *u))

    return plant


def stale(module, name):
    """A field of the state that an acceptance does not bring up to date."""

    def plant(patch):
        def metropolis(old, *rest):
            kept, info = base.metropolis(old, *rest)
            return kept._replace(**{name: getattr(old, name)}), info

        patch(module, "metropolis", metropolis)

    return plant


def upside_down(patch):
    right = base.accept
    patch(base, "accept", lambda ratio, *rest: right(-ratio, *rest))


def always(patch):
    def accept(ratio, *_):
        return torch.ones_like(ratio), torch.ones_like(ratio, dtype=torch.bool)

    patch(base, "accept", accept)


def momentum_of(metric, draw):
    def plant(patch):
        patch(metric, "momentum", draw)

    return plant


def frozen(patch):
    """Momenta that are drawn once, and not for every move."""

    def momentum(metric, like):
        seeded = torch.Generator(like.device).manual_seed(1)
        return torch.randn(like.shape, generator=seeded, device=like.device)

    patch(Diagonal, "momentum", momentum)


def kicked(first, last):
    """Trajectories with other shares of a step in their first and last kick."""

    def trajectory(gradient):
        def integrate(metric, phase, step, num_steps):
            q, p, grad = phase
            p = p - first * step * grad
            for i in range(num_steps):
                q = q + step * metric.velocity(p)
                energy, grad = gradient(q)
                p = p - (1.0 if i + 1 < num_steps else last) * step * grad
            return q, p, grad, energy

        return integrate

    return trajectory


def kicks(first, last):
    return lambda patch: patch(hmc_module, "trajectory", kicked(first, last))


def noise_of(scale):
    """Langevin proposals with too much noise, and a ratio that does not know."""

    def plant(patch):
        right = langevin._propose

        def propose(energy, state, wide, sigma, noise):
            return right(energy, state, wide, sigma, noise.mul_(scale))

        patch(langevin, "_propose", propose)

    return plant


def not_turned(patch):
    """A rejection that lets the momentum go on."""

    def metropolis(old, *rest):
        return base.metropolis(old._replace(momentum=-old.momentum), *rest)

    patch(langevin, "metropolis", metropolis)


def dice(index, value):
    """A tree whose random numbers of one kind are all the same."""

    def plant(patch):
        right = nuts_module.advance

        def advance(gradient, metric, tables, tree, u):
            u = u.clone()
            u[index] = value
            return right(gradient, metric, tables, tree, u)

        patch(nuts_module, "advance", advance)

    return plant


def begun(**change):
    """A tree that begins with something else."""

    def plant(patch):
        right = nuts_module.begin

        def begin(*args):
            tree = right(*args)
            return tree._replace(**{k: f(tree) for k, f in change.items()})

        patch(nuts_module, "begin", begin)

    return plant


def no_first_half_kick(patch):
    def leapfrog(gradient, metric, phase, step):
        q, p, _ = phase
        return base.leapfrog(gradient, metric, (q, p, torch.zeros_like(q)), step)

    patch(nuts_module, "leapfrog", leapfrog)


def whole_trees_only(patch):
    """Turns inside subtrees that nobody looks for."""
    right = nuts_module.levels
    patch(
        nuts_module, "levels", lambda depth: (right(depth)[0], torch.zeros_like(right(depth)[1]))
    )


def turned_where_it_stands(patch):
    """A tree that ends early takes in the half that made it end."""
    right = nuts_module.harvest

    def harvest(tree, old):
        cut = tree.leaf > 0
        wide = cut.unsqueeze(-1)
        return right(
            tree._replace(
                proposal=torch.where(wide, tree.sub_proposal, tree.proposal),
                proposal_energy=torch.where(cut, tree.sub_energy, tree.proposal_energy),
            ),
            old,
        )

    patch(nuts_module, "harvest", harvest)


def swapped_by(change):
    """Swaps with another ladder of temperatures in their ratio."""

    def plant(patch):
        right = tempering._swaps
        patch(tempering, "_swaps", lambda ladder, part, odd: right(change(ladder), part, odd))

    return plant


def not_rescaled(patch):
    patch(tempering, "_rescale", lambda inner, ladder, source: inner)


BUGS = {
    "hmc: whole first kick": ("hmc", "double well", kicks(1.0, 0.5)),
    "hmc: no last kick": ("hmc", "simplex", kicks(0.5, 0.0)),
    "hmc: sign of the kinetic energy": ("hmc", "gaussian", ratio_of(hmc_module, lambda r: -r)),
    "hmc: no kinetic energy": ("hmc", "gaussian", ratio_of(hmc_module, lambda r: 0 * r)),
    "hmc: acceptance ratio upside down": ("hmc", "gaussian", upside_down),
    "hmc: accepts always": ("hmc", "wells in the plane", always),
    "hmc: stale gradient": ("hmc", "gaussian", stale(hmc_module, "grad")),
    "hmc: stale energy": ("hmc", "gaussian", stale(hmc_module, "energy")),
    "hmc: no momentum refresh": ("hmc", "gaussian", frozen),
    "hmc: mass for inverse mass": (
        "hmc, a diagonal metric",
        "gaussian",
        momentum_of(Diagonal, lambda m, x: torch.randn_like(x) * m.inverse_mass.sqrt()),
    ),
    "hmc: factor not transposed": (
        "hmc, a dense metric",
        "gaussian",
        momentum_of(Dense, lambda m, x: torch.randn_like(x) @ m.inverse_factor.mT),
    ),
    "mala: no proposal ratio": ("mala", "gaussian", ratio_of(langevin, lambda r: 0 * r)),
    "mala: proposal ratio upside down": ("mala", "gaussian", ratio_of(langevin, lambda r: -r)),
    "mala: stale gradient": ("mala", "gaussian", stale(langevin, "grad")),
    "mala: wrong noise": ("mala", "gaussian", noise_of(1.2)),
    "underdamped: not turned": ("underdamped", "half line, a wall", not_turned),
    "nuts: no first half kick": ("nuts, shallow trees", "gaussian", no_first_half_kick),
    "nuts: last leaf always": ("nuts, shallow trees", "gaussian", dice(0, 0.0)),
    "nuts: last half always": ("nuts, shallow trees", "gaussian", dice(1, 0.0)),
    "nuts: forwards only": ("nuts", "half line, a wall", dice(2, 0.0)),
    "nuts: first point left out": (
        "nuts, shallow trees",
        "gaussian",
        begun(weight=lambda tree: tree.weight - torch.inf),
    ),
    "nuts: no kinetic energy at first": (
        "nuts, shallow trees",
        "gaussian",
        begun(start_energy=lambda tree: tree.proposal_energy),
    ),
    "nuts: turns in subtrees": ("nuts", "half line, a wall", whole_trees_only),
    "nuts: takes in the half that turned": ("nuts", "half line, a wall", turned_where_it_stands),
    "tempered: swap with the wrong beta": (
        "tempered",
        "half line, a wall",
        swapped_by(lambda ladder: ladder.roll(1, 0)),
    ),
    "tempered: swap ratio upside down": (
        "tempered",
        "gaussian",
        swapped_by(lambda ladder: -ladder),
    ),
    "tempered: swaps always": ("tempered", "gaussian", swapped_by(lambda ladder: 0 * ladder)),
    "tempered: not rescaled": ("tempered", "simplex", not_rescaled),
}


@pytest.mark.parametrize("bug", BUGS.values(), ids=BUGS)
def test_a_planted_bug_is_seen(bug, monkeypatch, device):
    name, target, plant = bug
    plant(monkeypatch.setattr)
    with device:
        assert excess(KERNELS[name], TARGETS[target](), n=SOME) > 1


@pytest.mark.parametrize("jacobian", [0.0, -1.0], ids=["missing", "of the wrong sign"])
@pytest.mark.parametrize("target", [positive, simplex])
@pytest.mark.parametrize("name", ["mala", "hmc", "nuts, shallow trees"])
def test_a_jacobian_that_is_wrong_is_seen(name, target, jacobian, device):
    with device:
        wrong, right = target(jacobian), target()
        mixed = right._replace(energy=wrong.energy)
        assert excess(KERNELS[name], mixed, n=SOME) > 1


COPIES = {
    "kicks": ("hmc", kicks(0.5, 0.5)),
    "ratio": ("hmc", ratio_of(hmc_module, lambda r: r)),
    "noise": ("mala", noise_of(1.0)),
    "momentum": (
        "hmc, a diagonal metric",
        momentum_of(Diagonal, lambda m, x: torch.randn_like(x) / m.inverse_mass.sqrt()),
    ),
    "swaps": ("tempered", swapped_by(lambda ladder: ladder)),
    "dice": ("nuts, shallow trees", dice([], 0.0)),
    "begun": ("nuts, shallow trees", begun(weight=lambda tree: tree.weight)),
}


@pytest.mark.parametrize("copy", COPIES.values(), ids=COPIES)
def test_the_copies_without_a_bug_are_right(copy, monkeypatch, device):
    name, plant = copy
    plant(monkeypatch.setattr)
    with device:
        assert excess(KERNELS[name], TARGETS["gaussian"](), n=SOME) < 1


# The leapfrog integrator ------------------------------------------------------------------------


def leapfrogs(gradient):
    """Trajectories of single leapfrog steps."""

    def integrate(metric, phase, step, num_steps):
        for _ in range(num_steps):
            *phase, energy = base.leapfrog(gradient, metric, tuple(phase), step)
        return *phase, energy

    return integrate


INTEGRATORS = {"trajectory": hmc_module.trajectory, "leapfrog": leapfrogs}
METRICS = {"identity": lambda dim: Diagonal(torch.ones(())), "diagonal": diagonal, "dense": dense}
SMOOTH = ["gaussian", "simplex", "funnel", "wells in the plane"]
every_integrator = pytest.mark.parametrize("make", INTEGRATORS.values(), ids=INTEGRATORS)
every_metric = pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)
every_smooth = pytest.mark.parametrize("name", SMOOTH)


def launch(name, metric, n=500):
    """A target, a metric and phases in which to start: position, momentum and gradient."""
    target = TARGETS[name]()
    x = target.sample(n)
    metric = metric(x.shape[-1])
    return target, metric, (x, metric.momentum(x), value_and_grad(target.energy, x)[1])


def gradient_of(target):
    return lambda x: value_and_grad(target.energy, x)


def slope(make, name, metric, time=1.0):
    """The slope of the energy error against the step, both by their logarithms."""
    target, metric, phase = launch(name, metric)
    before = target.energy(phase[0]) + base.kinetic(metric, phase[1], phase[1][:, 0])
    steps, errors = [], []
    for num_steps in (64, 128, 256, 512):
        step = torch.full_like(phase[0], time / num_steps)
        _, p, _, energy = make(gradient_of(target))(metric, phase, step, num_steps)
        error = energy + base.kinetic(metric, p, energy) - before
        steps.append(math.log(time / num_steps))
        errors.append(error.square().mean().sqrt().log().item())
    x, y = torch.tensor(steps), torch.tensor(errors)
    return torch.dot(x - x.mean(), y).item() / (x - x.mean()).square().sum().item()


@every_smooth
@every_metric
@every_integrator
def test_the_error_of_the_energy_is_of_second_order(make, metric, name):
    assert abs(slope(make, name, metric) - 2.0) < 0.05


def test_an_error_of_first_order_is_seen():
    for first, last in [(1.0, 0.5), (0.5, 0.0), (1.0, 0.0)]:
        assert abs(slope(kicked(first, last), "wells in the plane", dense) - 2.0) > 0.5


def way_back(make, name, metric, num_steps=30):
    """How far from its start a trajectory ends that goes there and back."""
    target, metric, phase = launch(name, metric)
    step = torch.full_like(phase[0], 0.1)
    integrate = make(gradient_of(target))
    q, p, grad, _ = integrate(metric, phase, step, num_steps)
    assert (q - phase[0]).abs().max() > 0.5
    q, p, _, _ = integrate(metric, (q, -p, grad), step, num_steps)
    return max((q - phase[0]).abs().max().item(), (p + phase[1]).abs().max().item())


@every_smooth
@every_metric
@every_integrator
def test_a_trajectory_finds_its_way_back(make, metric, name):
    assert way_back(make, name, metric) < 1e-10


def test_a_trajectory_that_does_not_find_back_is_seen():
    for first, last in [(1.0, 0.5), (0.5, 0.0), (1.0, 0.0)]:
        assert way_back(kicked(first, last), "wells in the plane", dense) > 1e-3


@every_smooth
def test_a_trajectory_keeps_volume(name):
    target, metric, (q, p, _) = launch(name, dense, n=1)
    step, dim = torch.full_like(q, 0.2), q.shape[-1]

    def flow(z):  # differentiable: value_and_grad cuts the graph
        x, v = z[:dim], z[dim:]
        for _ in range(5):
            v = v - 0.5 * step[0] * slope_at(x)
            x = x + step[0] * metric.velocity(v)
            v = v - 0.5 * step[0] * slope_at(x)
        return torch.cat([x, v])

    slope_at = torch.func.grad(lambda x: target.energy(x[None])[0])
    z = torch.cat([q[0], p[0]])
    *end, _ = hmc_module.trajectory(gradient_of(target))(
        metric, (q, p, slope_at(q[0])[None]), step, 5
    )
    torch.testing.assert_close(torch.cat([end[0][0], end[1][0]]), flow(z), **EXACT)
    volume = torch.linalg.det(torch.func.jacrev(flow)(z)).abs()
    torch.testing.assert_close(volume, torch.ones(()), **EXACT)


@every_smooth
@every_metric
def test_joined_kicks_make_the_same_trajectory(metric, name):
    target, metric, phase = launch(name, metric)
    step = torch.full_like(phase[0], 0.1)
    ends = [make(gradient_of(target))(metric, phase, step, 7) for make in INTEGRATORS.values()]
    for joined, single in zip(*ends, strict=True):
        torch.testing.assert_close(joined, single, **EXACT)


# The acceptance ---------------------------------------------------------------------------------


def plane(x):
    return well(x).sum(-1)


def acceptance_error(dtype):
    """The largest difference between recorded acceptances and those by hand in float64.

    It is relative to the total energy where that is above 1, for so is the rounding of float32.
    """
    metric = Dense(*(part.to(dtype) for part in dense(2)))
    kernel = hmc(plane, 0.3, 4, metric=metric)
    x = TARGETS["wells in the plane"]().sample(1_000).to(dtype)
    state = kernel.init(x)
    torch.manual_seed(1)
    new, info = kernel.step(state)
    torch.manual_seed(1)
    momentum = metric.momentum(x)  # what the step draws first

    def hamiltonian(q, p):
        q, p = q.double(), p.double()
        return plane(q) + 0.5 * (p @ metric.inverse_mass.double() * p).sum(-1)

    before = hamiltonian(x, momentum)
    error = hamiltonian(info.proposal.position, info.momentum) - before
    moved_there = (new.position == info.proposal.position).all(-1)
    assert torch.equal(moved_there, info.accepted)
    assert 0.5 < info.accept_prob.mean() < 0.95
    by_hand = (-error).clamp(max=0.0).exp()
    return ((by_hand - info.accept_prob.double()).abs() / before.clamp(min=1.0)).max().item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_acceptance_is_that_by_hand_in_float64(dtype):
    assert acceptance_error(dtype) < 1e-6


@pytest.mark.parametrize("change", [lambda r: r + 1e-5, lambda r: -r], ids=["shift", "sign"])
def test_an_acceptance_that_is_not_that_by_hand_is_seen(change, monkeypatch):
    ratio_of(hmc_module, change)(monkeypatch.setattr)
    assert acceptance_error(torch.float64) > 1e-6
