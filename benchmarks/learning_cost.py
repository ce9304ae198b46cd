"""What a contrastive step costs, in the bare gradient evaluations that it needs.

Bare are k gradients of the energy in the chains' points, and one forward and backward pass each
of data and of negatives: k + 2 evaluations. Ours is a step of ``Negatives``, by either back end,
and the loss; it makes one gradient more, at the parameters of the moment, of ``evaluations``. They
take turns, A B A B; seconds are medians, of CPU time on a CPU. HMC makes k / 5 moves of 5 leapfrog
steps. Growth: the exponent of the seconds in the batch, the chains or k, by least squares over
doublings; one is linear, less is a fixed cost at the small end.
"""

import argparse
import statistics
import time

import torch
from torch import nn

import pyro_ebm as ebm
from pyro_ebm.kernels import hmc, mala, ula
from pyro_ebm.losses import contrastive_divergence

KERNELS = {"ULA": ula, "MALA": mala, "HMC": lambda u, eps: hmc(u, eps, 5)}


class Image(nn.Module):
    """The energy of a small convolutional network on pictures of 28 by 28."""

    def __init__(self):
        super().__init__()
        one, two = nn.Conv2d(1, 16, 3, 2, 1), nn.Conv2d(16, 32, 3, 2, 1)
        self.net = nn.Sequential(one, nn.SiLU(), two, nn.SiLU(), nn.Flatten(), nn.Linear(1568, 1))

    def forward(self, x):
        return self.net(x).squeeze(-1)


ENERGIES = {
    "MLP 128": (lambda: ebm.zoo.MLPEnergy(2, (128, 128)), (2,)),
    "MLP 512": (lambda: ebm.zoo.MLPEnergy(2, (512, 512)), (2,)),
    "conv": (Image, (1, 28, 28)),
}


def bare(model, x, points, num_steps):
    """Return a function that makes the evaluations and nothing else."""

    def evaluate():
        start = points.detach().requires_grad_()
        for _ in range(num_steps):
            torch.autograd.grad(model(start).sum(), start)
        model(x).mean().backward()
        model(points).mean().backward()

    return evaluate


def ours(model, x, points, num_steps, kernel="MALA", backend="eager"):
    """Return a contrastive step with persistent chains."""
    with torch.device(points.device):  # that of the flat base
        base = ebm.Flat(points.shape[1:])
    num = max(num_steps // 5, 1) if kernel == "HMC" else num_steps
    make = KERNELS[kernel]
    negatives = ebm.Negatives(model, base, make, num, step_size=0.01, backend=backend)
    chains = negatives.init(points)

    def step():
        nonlocal chains
        chains, moved = negatives.step(chains)
        contrastive_divergence(model, x, moved.x).backward()

    return step


def seconds(functions, repeats, device):
    """Return the median seconds of functions that take turns."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    taken = [[] for _ in functions]
    for i in range(repeats + 2):
        for function, times in zip(functions, taken, strict=True):
            begin = clock()
            function()
            if device != "cpu":
                torch.cuda.synchronize()
            if i > 1:  # the first ones make buffers, and traces
                times.append(clock() - begin)
    return [statistics.median(times) for times in taken]


def setting(device, name, batch, num_chains, num_steps):
    torch.manual_seed(0)
    make, shape = ENERGIES[name]
    x = torch.randn(batch, *shape, device=device)
    return make().to(device), x, torch.randn(num_chains, *shape, device=device), num_steps


def evaluations(kernel, num_steps):
    """Count the calls of an energy in an eager step."""
    model, *args = setting("cpu", "MLP 128", 8, 8, num_steps)
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    ours(model, *args, kernel=kernel)()
    return len(calls)


def against_bare(device, sizes, repeats):
    """Compare with the bare evaluations, for several energies and numbers of chains."""
    rows = []
    for name, num, k in sizes:
        args = setting(device, name, num, num, k)
        pairs = [(kernel, backend) for kernel in KERNELS for backend in ("eager", "traced")]
        steps = [bare(*args), *(ours(*args, *pair) for pair in pairs)]
        least, *taken = seconds(steps, repeats, device)
        row = {"device": device, "energy": name, "chains": num, "k": k, "bare ms": 1e3 * least}
        row |= {
            f"{kernel}, {backend}": time / least
            for (kernel, backend), time in zip(pairs, taken, strict=True)
        }
        rows.append(row | {"evaluations of MALA": evaluations("MALA", k)})
    return rows


def growth(device, repeats, backend="eager", smallest=(256, 256, 10), doublings=4):
    """Return the seconds of a step as one of its sizes doubles, and the exponent."""
    rows = []
    for i, name in enumerate(("batch", "chains", "k")):
        sizes = [
            [n << j if m == i else n for m, n in enumerate(smallest)] for j in range(doublings)
        ]
        steps = [ours(*setting(device, "MLP 128", *size), "MALA", backend) for size in sizes]
        taken = torch.tensor(seconds(steps, repeats, device))
        x = torch.arange(doublings) - (doublings - 1) / 2
        exponent = (x * taken.log2()).sum() / x.square().sum()
        rows.append(
            {"device": device, "backend": backend, "grows": name}
            | {"from": smallest[i], "to": sizes[-1][i]}
            | {"first ms": 1e3 * taken[0].item(), "last ms": 1e3 * taken[-1].item()}
            | {"exponent": exponent.item()}
        )
    return rows


def run(quick: bool) -> list[dict]:
    """Return the rows, of a GPU too where there is one."""
    sizes = [("MLP 128", num, k) for num in (256, 1024, 4096) for k in (5, 20, 60)]
    sizes += [("conv", 128, k) for k in (5, 20, 60)] + [("MLP 512", 512, 20)]
    rows = []
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        if quick:
            rows += against_bare(device, [("MLP 128", 128, 5)], 3)
            rows += growth(device, 3, smallest=(32, 32, 2), doublings=2)
            continue
        rows += against_bare(device, sizes, 7)
        rows += growth(device, 7) + growth(device, 7, "traced")
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it runs")
    torch.set_num_threads(1)
    print(*run(parser.parse_args().quick), sep="\n")
