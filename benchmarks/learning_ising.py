"""Couplings of Ising models from samples, against exact asymptotics.

Sixteen spins: the errors of all methods that need no samples, and of persistent chains, against
the exact variance of each, by a sum over the 2^16 states, and the Cramer-Rao bound. A torus of
10 x 10 spins: -log RMSE of the couplings, as the papers on Gibbs with gradients (Grathwohl et al.,
2021) and on energy discrepancy (Schroeder et al., 2023) have it: log p = s' J s with J = 0.1 times
the adjacency, 2000 samples, the RMSE over all entries of J, and an l1 penalty. Where they try some
weights of the penalty, here the pseudo-likelihood of held-out samples chooses.

From the root of a checkout: ``python -m benchmarks.learning ising``.
"""

import argparse
import math
import time
from functools import partial

import torch
from torch.func import functional_call

import pyro_ebm as ebm
from pyro_ebm.kernels import colouring, gibbs
from pyro_ebm.losses import (
    contrastive_divergence,
    maximum_likelihood,
    minimum_probability_flow,
    pseudo_likelihood,
    ratio_matching,
)

LOSSES = {
    "pseudo-likelihood": pseudo_likelihood,
    "ratio matching": ratio_matching,
    "minimum probability flow": minimum_probability_flow,
}
BITS = torch.tensor([0.0, 1.0], dtype=torch.float64)

# The loss of a point is a sum over its components of a function of the rise D of the energy when
# the spin is turned. Its first and second derivatives in D, with s(D) = sigmoid(D):
SLOPES = {
    "pseudo-likelihood": lambda d: -torch.sigmoid(-d),
    "ratio matching": lambda d: -2 * torch.sigmoid(-d) ** 2 * torch.sigmoid(d),
    "minimum probability flow": lambda d: -0.5 * (-d / 2).exp(),
}
CURVATURES = {
    "pseudo-likelihood": lambda d: torch.sigmoid(d) * torch.sigmoid(-d),
    "ratio matching": lambda d: (
        2 * torch.sigmoid(-d) ** 2 * torch.sigmoid(d) * (2 * torch.sigmoid(d) - torch.sigmoid(-d))
    ),
    "minimum probability flow": lambda d: 0.25 * (-d / 2).exp(),
}


def states(num):
    """Return all states of ``num`` bits."""
    return (torch.arange(2**num).unsqueeze(-1) >> torch.arange(num) & 1).double()


def spin_glass(num, strength, field, seed=0):
    """Return couplings of standard deviation ``strength / sqrt(num)``, and fields."""
    generator = torch.Generator().manual_seed(seed)
    upper = torch.randn(num, num, generator=generator, dtype=torch.float64).triu(1)
    h = field * torch.randn(num, generator=generator, dtype=torch.float64)
    return strength / math.sqrt(num) * (upper + upper.T), h


def asymptotics(coupling, field):
    """Return n times the covariance of each estimator of the couplings, then the fields.

    The sandwich J^-1 K J^-1 of the mean Hessian J of a point's loss and the covariance K of its
    gradient, and the inverse Fisher information, by a sum over all states.
    """
    num = len(field)
    s = 2 * states(num) - 1
    p = (0.5 * ((s @ coupling) * s).sum(-1) + s @ field).softmax(0)
    i, j = torch.triu_indices(num, num, 1)
    total = len(i) + num
    statistics = torch.cat([s[:, i] * s[:, j], s], 1)
    statistics = statistics - p @ statistics
    found = {"maximum likelihood": torch.linalg.inv(statistics.T @ (p[:, None] * statistics))}
    rise = 2 * s * (s @ coupling + field)
    place = torch.zeros(num, num, dtype=torch.long)
    place[i, j] = place[j, i] = torch.arange(len(i))
    for name in LOSSES:
        pull = 2 * s * SLOPES[name](rise)
        grad = torch.cat([pull[:, i] * s[:, j] + pull[:, j] * s[:, i], pull], 1)
        hessian = torch.zeros(total, total, dtype=s.dtype)
        for k, curvature in enumerate(CURVATURES[name](rise).T):
            others = [m for m in range(num) if m != k]
            rows = torch.cat([place[k, others], torch.tensor([len(i) + k])])
            slope = 2 * s[:, [k]] * torch.cat([s[:, others], torch.ones_like(s[:, :1])], 1)
            hessian[rows[:, None], rows] += slope.T @ ((p * curvature)[:, None] * slope)
        bread = torch.linalg.inv(hessian)
        found[name] = bread @ (grad.T @ (p[:, None] * grad)) @ bread
    return found


def fit(loss, num):
    """Return the Ising model of least loss, by L-BFGS from nothing."""
    energy = ebm.zoo.Ising(num).double()
    optimizer = torch.optim.LBFGS(
        energy.parameters(),
        max_iter=200,
        tolerance_grad=1e-7,  # the errors are of 1e-2
        tolerance_change=1e-14,
        line_search_fn="strong_wolfe",
    )

    def closure():
        optimizer.zero_grad()
        value = loss(energy)
        value.backward()
        return value

    optimizer.step(closure)
    return energy


def fit_by_chains(x, num_chains, num_steps, rate):
    """Return an Ising model by persistent chains: plain gradient steps, the last half averaged."""
    num = x.shape[-1]
    energy = ebm.zoo.Ising(num).double()
    optimizer = torch.optim.SGD(energy.parameters(), lr=rate)
    average = torch.optim.swa_utils.AveragedModel(energy)
    kernel = gibbs(energy, BITS, conditionals="affine", check=False)
    state = kernel.init(x[torch.randint(len(x), (num_chains,))])
    for step in range(num_steps):
        state, _ = kernel.step(state)
        optimizer.zero_grad()
        contrastive_divergence(energy, x, state.position).backward()
        optimizer.step()
        if step >= num_steps // 2:
            average.update_parameters(energy)
    return average.module


def pairs(coupling):
    """Return the couplings of pairs, once each."""
    upper = tuple(torch.triu_indices(*coupling.shape, 1))
    return 0.5 * (coupling + coupling.T)[upper]


def sixteen(quick):
    """Return a row per method: its RMSE of the couplings, and what that should be."""
    num, size, repeats = (8, 10_000, 2) if quick else (16, 10_000, 20)
    coupling, field = spin_glass(num, 0.9, 0.2)
    every = states(num)
    law = (-ebm.zoo.Ising(num, coupling, field)(every)).softmax(0).detach()
    data = [every[torch.multinomial(law, size, replacement=True)] for _ in range(repeats)]
    few = data[: max(1, repeats // 4)]
    steps = {"num_steps": 300, "rate": 0.2} if quick else {"num_steps": 2000, "rate": 0.1}

    def likelihood(energy, x):
        return maximum_likelihood(energy, x, (-energy(every)).logsumexp(0))

    methods = {
        name: (lambda x, loss=loss: fit(partial(loss, x=x, affine=True), num), data)
        for name, loss in LOSSES.items()
    }
    methods["maximum likelihood"] = (lambda x: fit(partial(likelihood, x=x), num), few)
    methods["persistent chains"] = (lambda x: fit_by_chains(x, 1000, **steps), few)
    variance = {name: v / size for name, v in asymptotics(coupling, field).items()}
    return [errors(name, *how, coupling, variance) for name, how in methods.items()]


def errors(name, method, data, coupling, variance):
    """Return a row: how far a method is from the truth, and how far it should be."""
    start = time.process_time()
    found = torch.stack([pairs(method(x).coupling.detach() - coupling) for x in data])
    seconds = (time.process_time() - start) / len(data)
    num = found.shape[1]
    best, own = (
        variance.get(key, variance["maximum likelihood"])[:num, :num]
        for key in ("maximum likelihood", name)
    )
    rmse = found.square().mean().sqrt()
    due = own.trace().div(num).sqrt()
    bound = best.trace().div(num).sqrt()
    # The sum of squares of normal errors has the variance 2 tr(V^2), their root a fourth of it.
    error = (own.square().sum() / (2 * len(data))).sqrt() / own.trace()
    return {
        f"{len(coupling)} spins": name,
        "data sets": len(data),
        "RMSE": rmse.item(),
        "exact": due.item() if name in variance else "",
        "over exact": (rmse / due).item() if name in variance else "",
        "over Cramer-Rao": (rmse / bound).item(),
        "+-": error.item(),
        "efficiency, exact": (bound / due).square().item() if name in variance else "",
        "CPU s each": seconds,
    }


def torus(quick):
    """Return a row per loss: -log RMSE of the couplings of a torus."""
    length, size = (4, 500) if quick else (10, 2000)
    num = length**2
    sites = torch.arange(num).reshape(length, length)
    adjacency = torch.zeros(num, num, dtype=torch.float64)
    for dim in (0, 1):
        adjacency[sites, sites.roll(1, dim)] = 1
    adjacency = adjacency + adjacency.T
    energy = ebm.zoo.Ising(num, 0.2 * adjacency).double()  # each pair is twice in s' J s
    kernel = gibbs(energy, BITS, blocks=colouring(adjacency), conditionals="affine")
    state = kernel.init(torch.bernoulli(torch.full((size, num), 0.5, dtype=torch.float64)))
    for _ in range(100 if quick else 1000):
        state, _ = kernel.step(state)
    x = state.position[torch.randperm(size)]
    return [row for name in LOSSES for row in fitted(name, x, 0.1 * adjacency)]


def fitted(name, x, truth):
    """Return the rows of a loss, without a penalty and with that which held-out samples prefer."""
    loss, num = LOSSES[name], len(truth)
    zero = ebm.zoo.Ising(num).double()
    (slope,) = torch.autograd.grad(loss(zero, x, affine=True), zero.coupling)
    largest = slope.abs().max().item()  # from there on all couplings are zero
    weights = [share * largest for share in (0.05, 0.1, 0.15, 0.2, 0.3)]
    held, rest = x.tensor_split([len(x) // 4])
    rows = []
    for penalty in ("none", "l1"):
        start, weight = time.process_time(), 0.0
        if penalty == "l1":
            scores = [score(held, sparse(loss, rest, w)) for w in weights]
            weight = weights[min(range(len(weights)), key=scores.__getitem__)]
        # In s' J s each pair is there twice, in the Ising model of the zoo once.
        rmse = (0.5 * sparse(loss, x, weight) - truth).square().mean().sqrt()
        rows.append(
            {
                f"torus of {num} spins": name,
                "samples": len(x),
                "penalty": penalty,
                "share of the largest": weight / largest,
                "-log RMSE": -rmse.log().item(),
                "CPU s": time.process_time() - start,
            }
        )
    return rows


def score(x, coupling):
    with torch.no_grad():
        return pseudo_likelihood(ebm.zoo.Ising(len(coupling), coupling).double(), x).item()


def sparse(loss, x, weight):
    """Return the couplings of least loss plus l1 norm, without fields."""
    model = ebm.zoo.Ising(x.shape[-1]).double()

    def objective(couplings):
        given = [{"coupling": j} for j in couplings]
        return torch.stack(
            [loss(partial(functional_call, model, j), x, affine=True) for j in given]
        )

    start = torch.zeros(1, x.shape[-1], x.shape[-1], dtype=x.dtype)
    return ebm.minimize(objective, start, l1=weight, tolerance=1e-5, num_steps=300).x[0]


def run(quick):
    return [*sixteen(quick), *torus(quick)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it runs")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for row in run(parser.parse_args().quick):
        print(row)
