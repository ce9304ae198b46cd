"""An adversarial generator: the ring of eight, modes found and draws within three sd of one.

The generator is a Pyro guide, a mixture of Gaussians with a pathwise gradient, and learns by stock
SVI, whose ELBO holds its entropy. The energy is contrasted with the generator's draws; half of the
negatives are from the base and all are weighted by the model over this mixture, without which
the energy runs away from a generator that lags.
"""

import math
import time

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import ClippedAdam

import pyro_ebm as ebm
from benchmarks.densities import divergence
from benchmarks.plane_methods import BASE, Method, learn
from pyro_ebm.losses import contrastive_divergence

SD = 0.15


def generator(num_components=24):
    locs = pyro.param("locs", lambda: BASE.sample((num_components,)))
    scales = torch.full((num_components, 2), 0.5)
    scales = pyro.param("scales", scales, constraint=dist.constraints.positive)
    logits = pyro.param("logits", torch.zeros(num_components))
    return dist.MixtureOfDiagNormals(locs, scales, logits)


@torch.no_grad()
def covering(num):
    """Draw negatives, half of them from the base; return also the log of their density."""
    q = generator()
    points = torch.cat([BASE.sample((num // 2,)), q.sample((num // 2,))])
    return points, torch.logaddexp(BASE.log_prob(points), q.log_prob(points)) - math.log(2)


def adversarial(model, lr=2e-2, num=128):
    """Learn the generator, too, a step for each evaluation of the energy's loss."""
    pyro.clear_param_store()
    d = ebm.GibbsBoltzmann(model, ebm.Flat((2,)), log_partition="constant")

    def of_energy():
        with pyro.plate("n", num):
            pyro.sample("x", d)

    def guide():
        with pyro.plate("n", num):
            pyro.sample("x", generator())

    svi = SVI(of_energy, guide, ClippedAdam({"lr": lr, "lrd": 0.999}), Trace_ELBO())

    def loss(x):
        svi.step()
        model.zero_grad()  # the ELBO has a gradient in the energy, which is not its to change
        points, log_q = covering(len(x))
        with torch.no_grad():
            log_weight = -model(points) - log_q
        return contrastive_divergence(model, x, points, log_weight=log_weight)

    return loss, []


METHOD = Method(adversarial)


def row(seconds, seed):
    begin = time.process_time()
    model, steps = learn("8 Gaussians", METHOD, seconds, seed)
    spent = time.process_time() - begin
    angle = torch.arange(8) * math.pi / 4
    modes = 2.0 * torch.stack([angle.cos(), angle.sin()], -1)
    with torch.no_grad():
        distance, nearest = torch.cdist(generator().sample((20_000,)), modes).min(-1)
    within = distance < 3 * SD
    share = torch.bincount(nearest[within], minlength=8) / len(within)
    return {
        "density": "8 Gaussians",
        "method": "adversarial",
        "seed": seed,
        "modes": int((share > 0.01).sum()),
        "least share": share.min().item(),
        "within 3 sd": within.float().mean().item(),
        "gap of the energy": divergence("8 Gaussians", model)[0],
        "steps": steps,
        "CPU s": spent,
    }
