"""Effective samples per second of kernels on finite supports, with peers in the same run.

From the root of a checkout, where ``.[bench]`` is installed::

    python -m benchmarks.discrete                  a quarter of an hour
    python -m benchmarks.discrete --quick          a minute, to see that it runs

Targets: the Ising model on a 30 x 30 torus at temperatures of 2.4 (critical: 2.27) and 3, and a
restricted Boltzmann machine with 64 visible and 32 hidden units that has learned digits. All
methods start from the same points, which block Gibbs has brought to equilibrium, run in one thread
in float32, and get the same CPU time. ESS is the bulk ESS of ArviZ, the least over statistics
(magnetisation, its square, energy, projections). Where it is less than three per chain the chains
are shorter than their correlation times and the number is too large, which flatters the slow: such
rows say "at most". Steps and flips are chosen by a pilot run, which is not timed.
"""

import argparse
import importlib
import time
from functools import partial

import arviz as az
import torch

from benchmarks.learning import table
from pyro_ebm.kernels import (
    augmented,
    discrete_mala,
    gibbs,
    gibbs_with_gradients,
    metropolis_flips,
)
from pyro_ebm.zoo import RBM

SIZE, TEMPERATURES, CHAINS = 30, (2.4, 3.0), 16
BITS = torch.tensor([0.0, 1.0])
BLACK = ((torch.arange(SIZE)[:, None] + torch.arange(SIZE)) % 2 == 0).flatten()
VISIBLE, HIDDEN, MACHINE_CHAINS = 64, 32, 100


def torus(x, temperature):
    """The Ising model, of points ``(*batch, 900)``."""
    s = (2 * x - 1).unflatten(-1, (SIZE, SIZE))
    return -(s * (s.roll(1, -1) + s.roll(1, -2))).sum((-2, -1)) / temperature


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
        "ours: Metropolis flips": metropolis_flips(energy, BITS),
        "baseline: random-scan Gibbs": gibbs(energy, BITS, random_scan=True),
    }
    return {name: partial(Ours, kernel) for name, kernel in kernels.items()}


def peer(module, name):
    """Return a part of a peer, or None where it is not installed."""
    try:
        return getattr(importlib.import_module(module), name)
    except ImportError:
        return None


def ebmkit_gradients(energy):
    sampler = peer("ebm.samplers.discrete", "GibbsWithGradients")
    if sampler is None:
        return {}
    own = sampler(1)
    return {"ebmkit: Gibbs with gradients": partial(Peer, lambda x: own.step(energy, x))}


def checkerboard_kernel(energy):
    return gibbs(energy, BITS, blocks=[BLACK, ~BLACK], conditionals="affine")


def ising_methods(energy, start):
    return {
        "ours: block Gibbs": partial(Ours, checkerboard_kernel(energy)),
        **informed(energy, start),
        **ebmkit_gradients(energy),
    }


def block_kernel(rbm, energy=None, num_sweeps=1):
    draws = rbm.sample_hidden, rbm.sample_visible
    return augmented(energy or rbm, *draws, num_sweeps=num_sweeps)


def joint_kernel(rbm):
    """Return block Gibbs of both layers, from the machine's own logits."""
    num = len(rbm.visible_bias)
    visible = torch.arange(sum(rbm.weight.shape)) < num
    odds = [lambda x: rbm.visible_logits(x[..., num:]), lambda x: rbm.hidden_logits(x[..., :num])]
    joint = lambda x: rbm(x[..., :num], x[..., num:])
    return gibbs(joint, BITS, blocks=[visible, ~visible], conditionals=odds)


def machines(rbm):
    """Return the same machine of each peer, as a function from visible units to the next ones."""
    found = {}
    if (machine := peer("ebm.nets.lattice", "RBM")) is not None:
        own = machine(*rbm.weight.shape)
        state = {"W": rbm.weight.T, "b": rbm.visible_bias, "c": rbm.hidden_bias}
        own.load_state_dict(state)
        found["ebmkit: Gibbs of an RBM"] = own.gibbs_step
    if (machine := peer("rbms.bernoulli_bernoulli.classes", "BBRBM")) is not None:
        theirs = machine(rbm.weight.data, rbm.visible_bias.data, rbm.hidden_bias.data)
        chains = {}

        def step(v):
            if chains.get("visible") is not v:  # the first step
                chains.update(theirs.init_chains(len(v), start_v=v))
            chains.update(theirs.sample_state(n_steps=1, chains=chains))
            return chains["visible"]

        found["rbms: Gibbs"] = step
    return found


def machine_methods(rbm, energy, start):
    return {
        "ours: block Gibbs": partial(Ours, block_kernel(rbm, energy)),
        "ours: five sweeps a step": partial(Ours, block_kernel(rbm, energy, 5)),
        **informed(energy, start),
        **{name: partial(Peer, step) for name, step in machines(rbm).items()},
        **ebmkit_gradients(energy),
    }


# Measurements ------------------------------------------------------------------------------------


class Counted:
    """An energy that counts the points that it is asked for."""

    def __init__(self, energy):
        self.energy, self.points = energy, 0

    def __call__(self, x):
        value = self.energy(x)
        self.points += value.numel()
        return value


def measure(method, energy, statistics, budget):
    """Run a method for its CPU time and return what it has reached."""
    begin = time.process_time()
    for _ in range(3):
        method()
    each = (time.process_time() - begin) / 3
    every = max(1, int(budget / 4000 / each))  # at most 4000 draws are kept
    draws, wall, cpu, steps = [], 0.0, 0.0, 0
    energy.points = 0
    method.accept.clear()
    while cpu < budget or len(draws) < 20:
        begin = time.perf_counter(), time.process_time()
        for _ in range(every):
            x = method()
        wall, cpu = wall + time.perf_counter() - begin[0], cpu + time.process_time() - begin[1]
        steps += every
        with torch.no_grad():
            draws.append(statistics(x))
    values = torch.stack(draws, 1).double().numpy()  # shape: (chains, draws, statistics)
    ess = min(float(az.ess(values[..., k])) for k in range(values.shape[-1]))
    return {
        "steps": steps,
        "accepted": float(torch.stack(method.accept).mean()) if method.accept else float("nan"),
        "ESS": ess,
        "": "at most" if ess < 3 * len(values) else "",
        "wall s": wall,
        "CPU s": cpu,
        "ESS / CPU s": ess / cpu,
        "ESS / 1000 energies": 1000 * ess / energy.points if energy.points else float("nan"),
    }


def compared(target, methods, start, energy, statistics, budget):
    """Return a row per method."""
    rows = []
    for name, make in methods.items():
        torch.manual_seed(0)
        found = measure(make(start), energy, statistics, budget)
        rows.append({"target": target, "method": name, **found})
    return rows


def ising_rows(temperature, quick):
    """All methods on the torus."""
    torch.manual_seed(0)
    energy = Counted(partial(torus, temperature=temperature))
    kernel = checkerboard_kernel(energy)
    state = kernel.init(torch.randint(2, (CHAINS, SIZE**2)).float())
    for _ in range(300 if quick else 5000):
        state, _ = kernel.step(state)

    def statistics(x):
        m = (2 * x - 1).mean(-1)
        return torch.stack([m, m.square(), torus(x, temperature)], -1)

    methods = ising_methods(energy, state.position)
    name, budget = f"Ising, T = {temperature}", 0.5 if quick else 15.0
    return compared(name, methods, state.position, energy, statistics, budget)


def learned(quick):
    """Return a machine that has learned digits by persistent chains, and the chains."""
    datasets = importlib.import_module("sklearn.datasets")
    x = (torch.tensor(datasets.load_digits().data).float() > 7).float()
    rbm = RBM(VISIBLE, HIDDEN)
    with torch.no_grad():
        mean = x.mean(0).clamp(0.01, 0.99)
        rbm.visible_bias.copy_(mean.logit())
    adam, v = torch.optim.Adam(rbm.parameters(), 0.005), x[:500]
    for _ in range(100 if quick else 4000):
        v = rbm.sample_visible(rbm.sample_hidden(v))
        data = x[torch.randint(len(x), (500,))]
        adam.zero_grad()
        (rbm(data).mean() - rbm(v).mean()).backward()
        adam.step()
    return rbm.requires_grad_(False), v


def machine_rows(quick):
    """All methods on the machine."""
    torch.manual_seed(0)
    rbm, v = learned(quick)
    for _ in range(100 if quick else 5000):
        v = rbm.sample_visible(rbm.sample_hidden(v))
    start, energy = v[:MACHINE_CHAINS].clone(), Counted(rbm)
    directions = torch.randn(VISIBLE, 6) / VISIBLE**0.5

    def statistics(x):
        return torch.cat([x @ directions, rbm(x).unsqueeze(-1), x.mean(-1, keepdim=True)], -1)

    methods = machine_methods(rbm, energy, start)
    return compared("RBM", methods, start, energy, statistics, 0.5 if quick else 8.0)


def sweep_rows(quick):
    """The time of a sweep of both layers, of all libraries by turns: the best of several."""
    rows = []
    for shape, chains in (((64, 32), 100), ((64, 32), 1000), ((784, 500), 1000)):
        torch.manual_seed(0)
        rbm = RBM(*shape, scale=0.1).requires_grad_(False)
        v = torch.randint(2, (chains, shape[0])).float()
        x = torch.cat([v, rbm.sample_hidden(v)], -1)
        makers = {
            "ours, joint": partial(Ours, joint_kernel(rbm)),
            "ours, visible": partial(Ours, block_kernel(rbm)),
            **{name: partial(Peer, step) for name, step in machines(rbm).items()},
        }
        methods = {name: make(x if "joint" in name else v) for name, make in makers.items()}
        best = dict.fromkeys(methods, (float("inf"), float("inf")))
        for _ in range(2 if quick else 10):
            for name, method in methods.items():
                best[name] = tuple(map(min, best[name], timed(method, 3 if quick else 30)))
        for name, (wall, cpu) in best.items():
            size = f"{shape[0]} x {shape[1]}"
            rows.append(
                {
                    "units": size,
                    "chains": chains,
                    "method": name,
                    "wall ms / sweep": 1e3 * wall,
                    "CPU ms / sweep": 1e3 * cpu,
                }
            )
    return rows


def timed(method, num):
    """Return the wall and CPU seconds of a step."""
    method()
    begin = time.perf_counter(), time.process_time()
    for _ in range(num):
        method()
    return (time.perf_counter() - begin[0]) / num, (time.process_time() - begin[1]) / num


def run(quick):
    """Return all rows."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        ising = [row for t in TEMPERATURES for row in ising_rows(t, quick)]
        return [*ising, *machine_rows(quick), *sweep_rows(quick)]
    finally:
        torch.set_num_threads(before)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="short runs, to see that it works")
    print(table(run(parser.parse_args().quick)))
