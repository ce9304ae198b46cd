"""An adversarial generator on the ring of eight: modes found, and draws within three sd of one.

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
from pyro.optim import Adam

import pyro_ebm as ebm
from benchmarks.densities import DENSITIES, divergence
from benchmarks.plane_methods import BASE, Confined, rate
from pyro_ebm.losses import contrastive_divergence

SD = 0.15


def generator(num_components=16):
    locs = pyro.param("locs", lambda: BASE.sample((num_components,)))
    scales = torch.full((num_components, 2), 0.5)
    scales = pyro.param("scales", scales, constraint=dist.constraints.positive)
    logits = pyro.param("logits", torch.zeros(num_components))
    return dist.MixtureOfDiagNormals(locs, scales, logits)


def covering(num):
    """Draw negatives, half of them from the base; return also the log of their density."""
    with torch.no_grad():
        q = generator()
        points = torch.cat([BASE.sample((num // 2,)), q.sample((num // 2,))])
        return points, torch.logaddexp(BASE.log_prob(points), q.log_prob(points)) - math.log(2)


def learn_both(data, seconds, batch, lr=(5e-3, 2e-2)):
    """Return the energy, and the number of steps of both."""
    model, steps = Confined(), 0
    d = ebm.GibbsBoltzmann(model, ebm.Flat((2,)), log_partition="constant")

    def of_energy():
        with pyro.plate("n", 128):
            pyro.sample("x", d)

    def guide():
        with pyro.plate("n", 128):
            pyro.sample("x", generator())

    svi = SVI(of_energy, guide, Adam({"lr": rate(0.0, lr[1])}), Trace_ELBO())
    optim = torch.optim.Adam(model.parameters(), betas=(0.9, 0.99))
    begin = time.process_time()
    while (done := (time.process_time() - begin) / seconds) < 1.0:
        optim.param_groups[0]["lr"] = rate(done, lr[0])
        for own in svi.optim.optim_objs.values():
            own.param_groups[0]["lr"] = rate(done, lr[1])
        points, log_q = covering(batch)
        with torch.no_grad():
            log_weight = -model(points) - log_q
        loss = contrastive_divergence(model, data.sample(batch), points, log_weight=log_weight)
        optim.zero_grad()
        loss.backward()
        optim.step()
        svi.step()
        steps += 1
    return model, steps


def row(seconds, seed, batch=256):
    pyro.set_rng_seed(seed)
    pyro.clear_param_store()
    begin = time.process_time()
    model, steps = learn_both(DENSITIES["8 Gaussians"](), seconds, batch)
    spent = time.process_time() - begin
    angle = torch.arange(8) * math.pi / 4
    modes = 2.0 * torch.stack([angle.cos(), angle.sin()], -1)
    with torch.no_grad():
        distance, nearest = torch.cdist(generator().sample((20_000,)), modes).min(-1)
    within = distance < 3 * SD
    share = torch.bincount(nearest[within], minlength=8) / len(within)
    gap, _ = divergence("8 Gaussians", model)
    return {
        "density": "8 Gaussians",
        "method": "adversarial",
        "seed": seed,
        "modes": int((share > 0.01).sum()),
        "least share": share.min().item(),
        "within 3 sd": within.float().mean().item(),
        "gap of the energy": gap,
        "steps": steps,
        "CPU s": spent,
    }
