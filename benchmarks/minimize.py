"""Minima of many starts: our batched L-BFGS and Newton against SciPy's L-BFGS-B, start by start.

    python benchmarks/minimize.py

One process, double precision, the same starts and tolerance (the largest component of the
gradient at most 1.5e-8). ``gradients`` counts calls: of ours, each of a whole batch; of SciPy's,
of one row.
"""

import argparse
import time
import warnings

import numpy as np
import scipy.optimize
import torch

import pyro_ebm as ebm


def rosenbrock(x):
    return (1 - x[..., :-1]).square().sum(-1) + 100 * (
        x[..., 1:] - x[..., :-1].square()
    ).square().sum(-1)


def quadratic(condition, dim):
    scale = torch.logspace(0, np.log10(condition), dim)
    return lambda x: 0.5 * (scale * x.square()).sum(-1)


def ours(energy, start, method):
    calls = [0]

    def counted(x):
        calls[0] += 1
        return energy(x)

    clock = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ebm.MinimumWarning)
        m = ebm.minimize(counted, start, method=method, num_steps=10_000)
    return calls[0], m.num_steps.max().item(), m.converged, time.process_time() - clock


def scipys(energy, start):
    def f(x):
        x = torch.tensor(x, requires_grad=True)
        value = energy(x)
        return value.item(), torch.autograd.grad(value, x)[0].numpy()

    options = {"gtol": 1.5e-8, "ftol": 0.0, "maxiter": 20_000, "maxfun": 30_000}
    clock = time.process_time()
    rows = [
        scipy.optimize.minimize(f, row.numpy(), jac=True, method="L-BFGS-B", options=options)
        for row in start
    ]
    steps = [row.nfev for row in rows]
    done = torch.tensor([np.abs(row.jac).max() <= 1e-7 for row in rows])
    return sum(steps), max(steps), done, time.process_time() - clock


def report(name, who, result):
    calls, worst, done, seconds = result
    share = f"{int(done.sum())}/{done.numel()}"
    print(f"{name:28}{who:16}{calls:>10}{worst:>12}{share:>12}{seconds:>10.2f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--starts", type=int, default=1000)
    args = parser.parse_args()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    cases = {f"Rosenbrock, {args.starts} starts": (rosenbrock, 1.5 * torch.randn(args.starts, 2))}
    for condition in (1e4, 1e6):
        name = f"quadratic, condition {condition:.0e}"
        cases[name] = (quadratic(condition, 100), torch.randn(1, 100))
    print(f"{'':28}{'':16}{'gradients':>10}{'worst row':>12}{'converged':>12}{'CPU s':>10}")
    for name, (energy, start) in cases.items():
        for method in ("lbfgs", "newton"):
            report(name, f"ours, {method}", ours(energy, start, method))
        report(name, "SciPy L-BFGS-B", scipys(energy, start))


if __name__ == "__main__":
    main()
