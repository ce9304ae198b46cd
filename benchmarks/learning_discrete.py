"""Effective samples per second and per evaluation of kernels on finite supports, with peers.

Targets: the Ising model on a 30 x 30 torus at temperatures of 2.4 (critical: 2.27) and 3, and a
restricted Boltzmann machine with 64 visible and 32 hidden units that has learned digits. All
methods start from the same points, which block Gibbs has brought to equilibrium, run in one thread
in float32, and get the same CPU time. ESS is the bulk ESS of ArviZ, of the energy and the least
over all statistics (also magnetisation and its square, or projections). Less than three per chain
are not resolved: chains are shorter than their correlation times and the number is too large,
which flatters the slow. A gradient is one evaluation, and so is what random-scan Gibbs asks of
the neighbours of a spin. Steps and flips are chosen by a pilot run, which is not timed.
"""

import argparse
import importlib
import math
import time
from functools import partial
from typing import NamedTuple

import arviz as az
import torch

from pyro_ebm.kernels import (
    augmented,
    discrete_mala,
    gibbs,
    gibbs_with_gradients,
    metropolis_flips,
)
from pyro_ebm.losses import contrastive_divergence
from pyro_ebm.zoo import RBM

BITS = torch.tensor([0.0, 1.0])
CHAINS, VISIBLE, HIDDEN, MACHINE_CHAINS = 16, 64, 32, 100


class Torus(NamedTuple):
    """The Ising model of points ``(*batch, size ** 2)``; it counts those it is asked for."""

    size: int
    temperature: float
    asked: list[int]

    def __call__(self, x):
        self.asked[0] += x.numel() // x.shape[-1]
        s = (2 * x - 1).unflatten(-1, (self.size, self.size))
        return -(s * (s.roll(1, -1) + s.roll(1, -2))).sum((-2, -1)) / self.temperature

    def block_kernel(self):
        place = torch.arange(self.size)
        black = ((place[:, None] + place) % 2 == 0).flatten()
        return gibbs(self, BITS, blocks=[black, ~black], conditionals="affine")

    def random_scan(self):
        """Return the same law as that from energies, in much less time."""
        place = torch.arange(self.size**2).reshape(self.size, self.size)
        near = torch.stack([place.roll(by, dim) for dim in (0, 1) for by in (1, -1)], -1)
        near = near.reshape(-1, 4)

        def odds(x, around):
            self.asked[0] += len(x)
            return (2 * x[:, around].sum(-1, keepdim=True) - 4) * (2 / self.temperature)

        own = [partial(odds, around=row) for row in near]
        blocks = list(torch.arange(len(near))[:, None])
        return gibbs(self, BITS, blocks=blocks, conditionals=own, random_scan=True)


class Machine(NamedTuple):
    """The free energy of a Boltzmann machine; it counts the points it is asked for."""

    rbm: RBM
    asked: list[int]

    def __call__(self, v):
        self.asked[0] += v.numel() // v.shape[-1]
        return self.rbm(v)


# Methods: a map from points to the next points ---------------------------------------------------


class Ours:
    """A kernel of ours."""

    def __init__(self, kernel, start):
        self.kernel, self.state = kernel, kernel.init(start)
        self.accept = []

    def __call__(self):
        self.state, info = self.kernel.step(self.state)
        self.accept.append(info.accept_prob)
        return self.state.position


class Peer:
    """A function from points to points."""

    def __init__(self, step, start):
        self.step, self.x = step, start.clone()
        self.accept = []

    def __call__(self):
        self.x = self.step(self.x)
        return self.x


def tuned_step(energy, start):
    """Return the step of discrete MALA whose acceptance is near the 57 % of MALA."""
    log_step, x = torch.tensor(-1.0), start
    for i in range(200):
        kernel = discrete_mala(energy, BITS, float(log_step.exp()))
        state, info = kernel.step(kernel.init(x))
        log_step = log_step + (info.accept_prob.mean() - 0.57) / (1 + i) ** 0.6
        x = state.position
    return float(log_step.exp())


def tuned_flips(energy, start):
    """Return the number of flips by which most components change per step."""
    moves = {}
    for num in (2, 4, 8, 16, 32, 64):
        kernel, total = gibbs_with_gradients(energy, BITS, num_flips=num), 0.0
        state = kernel.init(start)
        for _ in range(100):
            new, _ = kernel.step(state)
            total += float((new.position != state.position).sum())
            state = new
        moves[num] = total
    return max(moves, key=moves.get)


def informed(energy, start):
    """The kernels that any differentiable energy has, and the baselines."""
    flips, step = tuned_flips(energy, start), tuned_step(energy, start)
    kernels = {
        "ours: Gibbs with gradients": gibbs_with_gradients(energy, BITS),
        f"ours: the same, {flips} flips": gibbs_with_gradients(energy, BITS, num_flips=flips),
        f"ours: discrete MALA, {step:.2f}": discrete_mala(energy, BITS, step),
        "baseline: Metropolis flips": metropolis_flips(energy, BITS),
        "baseline: random-scan Gibbs": gibbs(energy, BITS, random_scan=True),
    }
    return {name: partial(Ours, kernel) for name, kernel in kernels.items()}


def ebmkit_gradients(energy):
    sampler = importlib.import_module("ebm.samplers.discrete").GibbsWithGradients(1)
    return partial(sampler.step, energy)


def ebmkit_machine(rbm):
    machine = importlib.import_module("ebm.nets.lattice").RBM(*rbm.weight.shape)
    state = {"W": rbm.weight.T, "b": rbm.visible_bias, "c": rbm.hidden_bias}
    machine.load_state_dict(state)
    return machine.gibbs_step


def rbms_machine(rbm):
    module = importlib.import_module("rbms.bernoulli_bernoulli.classes")
    machine, chains = module.BBRBM(*(p.data for p in rbm.parameters())), {}

    def step(v):
        if chains.get("visible") is not v:  # the first step
            chains.update(machine.init_chains(len(v), start_v=v))
        chains.update(machine.sample_state(n_steps=1, chains=chains))
        return chains["visible"]

    return step


def machines(rbm):
    """The same machine of each peer: maps from visible units to the next ones."""
    makers = {"ebmkit: block Gibbs": ebmkit_machine, "rbms: block Gibbs": rbms_machine}
    return {name: peer(make, rbm) for name, make in makers.items()}


def peer(make, *args):
    """Return what makes the method, or why there is none."""
    try:
        return partial(Peer, make(*args))
    except ImportError as error:
        return f"not installed: {error.name}"


def ising_methods(energy, start):
    return {
        "ours: block Gibbs": partial(Ours, energy.block_kernel()),
        **informed(energy, start),
        "baseline: the same, from neighbours": partial(Ours, energy.random_scan()),
        "ebmkit: Gibbs with gradients": peer(ebmkit_gradients, energy),
    }


def block_kernel(rbm, energy, num_sweeps=1):
    return augmented(energy, rbm.sample_hidden, rbm.sample_visible, num_sweeps=num_sweeps)


def joint_kernel(rbm):
    """Return block Gibbs of both layers, from the machine's own logits."""
    num = len(rbm.visible_bias)
    visible = torch.arange(sum(rbm.weight.shape)) < num
    odds = [lambda x: rbm.visible_logits(x[..., num:]), lambda x: rbm.hidden_logits(x[..., :num])]
    joint = lambda x: rbm(x[..., :num], x[..., num:])
    return gibbs(joint, BITS, blocks=[visible, ~visible], conditionals=odds)


def machine_methods(energy, start):
    rbm = energy.rbm
    return {
        "ours: block Gibbs": partial(Ours, block_kernel(rbm, energy)),
        "ours: five sweeps a step": partial(Ours, block_kernel(rbm, energy, 5)),
        **machines(rbm),
        **informed(energy, start),
        "ebmkit: Gibbs with gradients": peer(ebmkit_gradients, energy),
    }


# Measurements ------------------------------------------------------------------------------------


COLUMNS = (
    "target",
    "method",
    "steps",
    "accepted",
    "R-hat",
    "energy: ESS / CPU s",
    "energy: ESS / 1000 evaluations",
    "least: ESS / CPU s",
    "least: ESS / 1000 evaluations",
    "resolved",
    "missing",
)


def compared(target, methods, start, energy, statistics, budget):
    """Return a row per method."""
    rows = []
    for name, make in methods.items():
        torch.manual_seed(0)
        fine = not isinstance(make, str)
        found = measure(make(start), energy, statistics, budget) if fine else [math.nan] * 8
        rows.append([target, name, *found, "" if fine else make])
    return [dict(zip(COLUMNS, row, strict=True)) for row in rows]


def measure(method, energy, statistics, budget):
    """Run a method for its CPU time and return what it has reached."""
    begin = time.process_time()
    for _ in range(3):
        method()
    each = (time.process_time() - begin) / 3
    every = max(1, int(budget / 4000 / each))  # at most 4000 draws are kept
    draws, spent, steps, asked = [], 0.0, 0, 0
    method.accept.clear()
    while spent < budget or len(draws) < 20:
        begin, energy.asked[0] = time.process_time(), 0
        for _ in range(every):
            x = method()
        spent += time.process_time() - begin
        steps, asked = steps + every, asked + energy.asked[0]
        with torch.no_grad():
            draws.append(statistics(x))
    rate = float(torch.stack(method.accept).mean()) if method.accept else ""
    return steps, rate, *reached(torch.stack(draws, 1).double().numpy(), spent, asked)


def reached(values, spent, asked):
    """Return R-hat, the ESS by time and by evaluation, and what of it is resolved.

    The values are of shape ``(chains, draws, statistics)``, the energy first.
    """
    each = [values[..., k] for k in range(values.shape[-1])]
    r_hat, ess = (list(map(float, map(of, each))) for of in (az.rhat, az.ess))
    rates = []
    for n in (ess[0], min(ess)):
        rates += [n / spent, 1e3 * n / asked if asked else ""]
    resolved = [n >= 3 * len(values) for n in (min(ess), ess[0], math.inf)].index(True)
    return max(r_hat), *rates, ("all", "energy", "none")[resolved]


def ising_rows(size, temperature, budget):
    """All methods on the torus."""
    torch.manual_seed(0)
    energy = Torus(size, temperature, [0])
    kernel = energy.block_kernel()
    state = kernel.init(torch.randint(2, (CHAINS, size**2)).to(torch.get_default_dtype()))
    for _ in range(int(400 * budget)):
        state, _ = kernel.step(state)

    def statistics(x):
        m = (2 * x - 1).mean(-1)
        return torch.stack([energy(x), m, m.square()], -1)

    methods = ising_methods(energy, state.position)
    name = f"Ising {size} x {size}, T = {temperature}"
    return compared(name, methods, state.position, energy, statistics, budget)


def learned(num_steps):
    """Return a machine that has learned digits by persistent chains, and the chains."""
    datasets = importlib.import_module("sklearn.datasets")
    x = (torch.tensor(datasets.load_digits().data) > 7).to(torch.get_default_dtype())
    rbm = RBM(VISIBLE, HIDDEN)
    with torch.no_grad():
        rbm.visible_bias.copy_(x.mean(0).clamp(0.01, 0.99).logit())
    adam, v = torch.optim.Adam(rbm.parameters(), 0.005), x[:500]
    for _ in range(num_steps):
        v = rbm.sample_visible(rbm.sample_hidden(v))
        data = x[torch.randint(len(x), (500,))]
        adam.zero_grad()
        contrastive_divergence(rbm, data, v).backward()
        adam.step()
    for _ in range(num_steps):
        v = rbm.sample_visible(rbm.sample_hidden(v))
    return rbm.requires_grad_(False), v


def machine_rows(num_steps, budget):
    """All methods on the machine."""
    torch.manual_seed(0)
    rbm, v = learned(num_steps)
    start, energy = v[:MACHINE_CHAINS].clone(), Machine(rbm, [0])
    directions = torch.randn(VISIBLE, 6) / VISIBLE**0.5

    def statistics(x):
        return torch.cat([rbm(x).unsqueeze(-1), x @ directions, x.mean(-1, keepdim=True)], -1)

    methods = machine_methods(energy, start)
    return compared("RBM, digits", methods, start, energy, statistics, budget)


def sweep_rows(quick):
    """The time of a sweep of both layers, of all libraries by turns: the best of several."""
    sizes, rounds, num = [((64, 32), 100), ((64, 32), 1000), ((784, 500), 1000)], 10, 30
    if quick:
        sizes, rounds, num = sizes[:1], 2, 3
    return [row for shape, chains in sizes for row in sweeps(shape, chains, rounds, num)]


def sweeps(shape, chains, rounds, num):
    torch.manual_seed(0)
    rbm = RBM(*shape, scale=0.1).requires_grad_(False)
    v = torch.randint(2, (chains, shape[0])).to(rbm.weight)
    x = torch.cat([v, rbm.sample_hidden(v)], -1)
    makers = {
        "ours, visible units": partial(Ours, block_kernel(rbm, rbm)),
        **machines(rbm),
        "ours, both layers": lambda _: Ours(joint_kernel(rbm), x),
    }
    methods = {who: make(v) for who, make in makers.items() if not isinstance(make, str)}
    best = dict.fromkeys(methods, math.inf)
    for _ in range(rounds):
        for who, method in methods.items():
            best[who] = min(best[who], timed(method, num))
    size = f"{shape[0]} x {shape[1]}, {chains} chains"
    return [{"units": size, "method": who, "CPU ms": 1e3 * t} for who, t in best.items()]


def timed(method, num):
    """Return the CPU seconds of a step."""
    method()
    begin = time.process_time()
    for _ in range(num):
        method()
    return (time.process_time() - begin) / num


def run(quick):
    """Return all rows."""
    near = () if quick else ising_rows(30, 2.4, 25.0)
    far = ising_rows(*((8, 3.0, 0.2) if quick else (30, 3.0, 8.0)))
    machine = machine_rows(*((100, 0.2) if quick else (4000, 5.0)))
    return [*near, *far, *machine, *sweep_rows(quick)]


if __name__ == "__main__":
    from benchmarks.learning import table

    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="short runs, to see that it works")
    print(table(run(parser.parse_args().quick)))
