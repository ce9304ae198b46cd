"""Sample the 17 reference posteriors with ``ebm.NUTS`` and ``ebm.ChEES`` and compare the draws.

From the root of a checkout that has ``../shared/reference``::

    python -m benchmarks.posteriors [--samplers NUTS ChEES] [--seed 0] [NAME ...]

A row passes where every mean is within 0.1 posterior standard deviations of the reference's and
every standard deviation within 10 %, means agree within 5 Monte Carlo standard errors of both
sides, R-hat is below 1.01, and no trajectory diverged. Settings are the defaults but for what
``OPTIONS`` says.
"""

import argparse
import math
import time
import warnings
from typing import NamedTuple

import arviz as az
import pyro
import torch

import pyro_ebm as ebm
from tests.posteriors import POSTERIORS, columns, load

SCHOOLS = "eight_schools-eight_schools_noncentered"
WARMUP = 300
SIZES = {"NUTS": (8, 600), "ChEES": (64, 400)}  # chains and draws
OPTIONS = {
    # The half-Cauchy tail of tau: at the default of .8 about 1 draw in 1500 diverges, out where
    # tau is far larger than the errors and the effects' curvature with it.
    SCHOOLS: {"target_accept_prob": 0.95},
}


class Row(NamedTuple):
    """How draws compare with the reference: the worst over its columns."""

    mean_error: float  # in posterior standard deviations
    sd_error: float  # relative
    z: float
    r_hat: float
    divergences: int
    gradients_per_draw: float  # an effective one
    seconds: float

    @property
    def passes(self):
        """Whether the rule is kept."""
        near = self.mean_error < 0.1 and self.sd_error < 0.1 and self.z < 5.0
        return near and self.r_hat < 1.01 and self.divergences == 0


def compare(name, samples, divergences=0, gradients=0, seconds=0.0):
    """Compare draws of the sites, ``(chains, draws, ...)``, with the reference's."""
    _, names, reference, _ = load(name)
    worst, least = [0.0] * 4, math.inf
    found = columns(name, samples)
    for column, truth in zip(names, reference.double().unbind(-1), strict=True):
        x = found[column].double()
        ess, true_ess = (min(az.ess(d.numpy()), d.numel()) for d in (x, truth))
        least = min(least, float(az.ess(x.numpy())))
        off = float((x.mean() - truth.mean()).abs() / truth.std())
        sd = float((x.std() / truth.std() - 1).abs())
        z = off / math.sqrt(1 / ess + 1 / true_ess)
        worst = [max(*pair) for pair in zip(worst, (off, sd, z, az.rhat(x.numpy())), strict=True)]
    return Row(*map(float, worst), divergences, gradients / least, seconds)


def sample(name, sampler, seed=0, model=None, size=None, **options):
    """Run a sampler on a posterior; return the run and how its draws compare."""
    pyro.set_rng_seed(seed)
    num_chains, num_samples = size or SIZES[sampler]
    model = model or POSTERIORS[name](load(name)[0])
    kernel = getattr(ebm, sampler)(model, **{**OPTIONS.get(name, {}), **options})
    options = {"num_chains": num_chains, "disable_progbar": True, "backend": "eager"}
    mcmc = ebm.MCMC(kernel, num_samples, WARMUP, **options)
    clock = time.perf_counter()
    mcmc.run()
    clock = time.perf_counter() - clock
    divergences = int(mcmc.sample_stats["diverging"].sum())
    gradients = mcmc.cost["sampling_gradients"]
    samples = mcmc.get_samples(group_by_chain=True)
    return mcmc, compare(name, samples, divergences, gradients, clock)


def main():
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=list(POSTERIORS), metavar="NAME")
    parser.add_argument("--samplers", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--defaults", action="store_true", help="leave OPTIONS out")
    args = parser.parse_args()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)  # the graphs are small: threads only wait for each other
    if args.defaults:
        OPTIONS.clear()
    head = "posterior", "sampler", "mean error / sd", "sd error", "z", "R-hat", "divergences"
    head = *head, "gradients / effective draw", "seconds", "chains moved", "passes"
    print("|", " | ".join(head), "|\n|", " | ".join("--" for _ in head), "|")
    for name in args.names:
        for sampler in args.samplers:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ebm.ConvergenceWarning)  # the table says it
                mcmc, row = sample(name, sampler, args.seed)
            cells = (
                f"{name} | {sampler} | {row.mean_error:.3f} | {row.sd_error:.3f} | {row.z:.1f} | "
                f"{row.r_hat:.4f} | {row.divergences} | {row.gradients_per_draw:.1f} | "
                f"{row.seconds:.1f} | {len({c for _, c in mcmc.adapted.moved})} | "
                f"{'yes' if row.passes else 'no'}"
            )
            print("|", cells, "|", flush=True)


if __name__ == "__main__":
    main()
