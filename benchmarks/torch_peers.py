"""Pyro and torchebm: `prepare(target, job)` returns `run(seed)`, which gives a `Record`."""

import numpy as np
from contender import Clock, Peer, Record, need

NOT_ADAPTED_STEPS = 10


def pyro_nuts(target, job):
    """Prepare Pyro's NUTS: the chains one after another in this process, a quarter of the draws.

    With a process for each chain, as `num_chains=4` has it, 2 cores make it at most twice as fast.
    """
    import pyro
    import torch
    from pyro.infer import MCMC, NUTS

    draws = max(job.draws // 4, 1)

    def one_chain(init, count, clock):
        def potential(params):
            count["now"] += 1
            return target.energy(params["x"])

        def hook(kernel, samples, stage, i):
            if stage == "Warmup" and i == job.warmup - 1:
                clock.lap("warmup")
                count["warmup"] += count.pop("now")
                count["now"] = 0

        mcmc = MCMC(
            NUTS(potential_fn=potential),
            num_samples=draws,
            warmup_steps=job.warmup,
            initial_params={"x": torch.tensor(init)},
            hook_fn=hook,
            disable_progbar=True,
        )
        mcmc.run()
        clock.lap("sampling")
        count["sampling"] += count.pop("now")
        count["now"] = 0
        return mcmc.get_samples()["x"].numpy(), mcmc.kernel.step_size

    def run(seed):
        pyro.set_rng_seed(seed)
        clock, count = Clock(), {"now": 0, "warmup": 0, "sampling": 0}
        x, steps = zip(*[one_chain(init, count, clock) for init in job.inits], strict=True)
        gradients = {k: float(count[k]) for k in ("warmup", "sampling")}
        gradients["executed"] = gradients["sampling"]
        adapted = {"step_size": float(np.mean(steps))}
        note = f"{draws} draws, chains one after another"
        return Record(np.stack(x), clock.seconds, clock.cpu(), gradients, adapted, note)

    return run


def torchebm_hmc(target, job):
    """Prepare torchebm's HMC, which adapts nothing: ten leapfrog steps, set by the target's scale.

    Its integrator takes the gradient twice a step.
    """
    torch = need("torch")
    samplers, core = need("torchebm.samplers"), need("torchebm.core")

    class Model(core.BaseModel):
        def forward(self, x):
            return target.energy(x)

    step_size = target.smallest / target.dim**0.25
    sampler = samplers.HamiltonianMonteCarlo(
        Model(), step_size=step_size, n_leapfrog_steps=NOT_ADAPTED_STEPS
    )

    def run(seed):
        torch.manual_seed(seed)
        clock, start = Clock(), torch.tensor(job.inits)
        start = sampler.sample(start, n_steps=job.warmup)
        clock.lap("warmup")
        x = sampler.sample(start, n_steps=job.draws, return_trajectory=True)
        clock.lap("sampling")
        each = float(NOT_ADAPTED_STEPS * job.chains)
        gradients = {"warmup": 2 * each * job.warmup, "sampling": each * job.draws}
        gradients["executed"] = 2 * gradients["sampling"]
        adapted = {"step_size": step_size, "trajectory": step_size * NOT_ADAPTED_STEPS}
        return Record(x.numpy(), clock.seconds, clock.cpu(), gradients, adapted, "not adapted")

    return run


PEERS = {"pyro-nuts": Peer(pyro_nuts, 4), "torchebm-hmc": Peer(torchebm_hmc, 1 << 30)}
