"""What a contrastive step costs, in the bare gradient evaluations that it needs.

Bare are k gradients of the energy in the chains' points, and one forward and backward pass each
of data and of negatives: k + 2 evaluations. Ours is a step of ``Negatives`` and the loss; it makes
one gradient more, at the parameters of the moment. They take turns, A B A B; seconds are medians,
of CPU time on a CPU. Growth: the exponent of the seconds in the batch, the chains or k, by least
squares over doublings; one is linear, less is a fixed cost at the small end.
"""

import argparse
import statistics
import time

import torch

import pyro_ebm as ebm
from pyro_ebm.kernels import mala, ula
from pyro_ebm.losses import contrastive_divergence


def bare(model, x, points, num_steps):
    """Return a function that makes the evaluations and nothing else."""

    def evaluate():
        start = points.detach().requires_grad_()
        for _ in range(num_steps):
            torch.autograd.grad(model(start).sum(), start)
        model(x).mean().backward()
        model(points).mean().backward()

    return evaluate


def ours(model, x, points, num_steps, kernel=mala):
    """Return a contrastive step with persistent chains."""
    with torch.device(points.device):  # that of the flat base
        negatives = ebm.Negatives(model, ebm.Flat((2,)), kernel, num_steps, step_size=0.01)
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
            if i > 1:  # the first ones make buffers
                times.append(clock() - begin)
    return [statistics.median(times) for times in taken]


def setting(device, hidden, batch, num_chains, num_steps):
    torch.manual_seed(0)
    model = ebm.zoo.MLPEnergy(2, (hidden, hidden)).to(device)
    x, points = torch.randn(batch, 2, device=device), torch.randn(num_chains, 2, device=device)
    return model, x, points, num_steps


def against_bare(device, sizes, repeats):
    """Compare with the bare evaluations, for several sizes of network and chains."""
    rows = []
    for hidden, num, k in sizes:
        args = setting(device, hidden, num, num, k)
        steps = bare(*args), ours(*args), ours(*args, kernel=ula)
        least, exact, unadjusted = seconds(steps, repeats, device)
        rows.append(
            {"device": device, "hidden": hidden, "chains": num, "k": k, "bare ms": 1e3 * least}
            | {"MALA / bare": exact / least, "ULA / bare": unadjusted / least}
        )
    return rows


def growth(device, repeats, smallest=(256, 256, 10), doublings=4):
    """Return the seconds of a step as one of its sizes doubles, and the exponent."""
    rows = []
    for i, name in enumerate(("batch", "chains", "k")):
        sizes = [
            [n << j if m == i else n for m, n in enumerate(smallest)] for j in range(doublings)
        ]
        steps = [ours(*setting(device, 128, *size)) for size in sizes]
        taken = torch.tensor(seconds(steps, repeats, device))
        x = torch.arange(doublings) - (doublings - 1) / 2
        exponent = (x * taken.log2()).sum() / x.square().sum()
        rows.append(
            {"device": device, "grows": name, "from": smallest[i], "to": sizes[-1][i]}
            | {"first ms": 1e3 * taken[0].item(), "last ms": 1e3 * taken[-1].item()}
            | {"exponent": exponent.item()}
        )
    return rows


def run(quick: bool) -> list[dict]:
    """Return the rows, of a GPU too where there is one."""
    sizes = [(128, 512, 20), (128, 2048, 20), (512, 512, 20), (512, 2048, 20)]
    rows = []
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        if quick:
            rows += against_bare(device, [(128, 128, 5)], 3)
            rows += growth(device, 3, (32, 32, 2), doublings=2)
        else:
            rows += against_bare(device, sizes, 7) + growth(device, 7)
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it runs")
    torch.set_num_threads(1)
    print(*run(parser.parse_args().quick), sep="\n")
