"""NumPyro and blackjax: `prepare(target, job)` compiles and returns `run(seed)`.

Imports are lazy. Draws come in blocks, so that a time limit can interrupt between them; the
compilation is timed apart from everything else.
"""

import math
import time

import numpy as np
from contender import Clock, Peer, Record, need

BLOCK = 50


def block_size(*counts):
    """Return the largest common divisor of the counts that is at most `BLOCK`."""
    common = math.gcd(*counts)
    return max(d for d in range(1, BLOCK + 1) if common % d == 0)


def compiled(function, *arguments):
    """Compile for these arguments; return the program and the seconds it took."""
    import jax

    start = time.perf_counter()
    program = jax.jit(function).lower(*arguments).compile()
    return program, time.perf_counter() - start


def in_blocks(program, state, blocks):
    """Run blocks of draws; return the last state and the outputs, joined along the draws."""
    import jax

    outputs = []
    for _ in range(blocks):
        state, out = jax.block_until_ready(program(state))
        outputs.append(out)
    parts = zip(*outputs, strict=True)
    return state, [np.concatenate([np.asarray(block) for block in part]) for part in parts]


def lockstep(counts):
    """Return the gradients that vmap executes for counts of shape `(draws, chains)`."""
    return float(counts.max(-1).sum()) * counts.shape[-1]


def nuts_record(clock, compile_s, x, counts, adapted):
    """Make the record of a vmapped NUTS; `x` is `(draws, chains, dim)`, counts by phase."""
    clock.seconds["compile"] = compile_s
    gradients = {phase: float(count.sum()) for phase, count in counts.items()}
    gradients["executed"] = lockstep(counts["sampling"])
    return Record(x.swapaxes(0, 1), clock.seconds, clock.cpu(), gradients, adapted)


def numpyro_nuts(target, job):
    """Prepare NumPyro's NUTS with its chains vectorised, as `chain_method="vectorized"` has them.

    Its kernel is driven directly: `MCMC.run` would compile again at every call.
    """
    hmc, jax = need("numpyro.infer.hmc"), need("jax")
    block = block_size(job.draws, job.warmup)
    kernel = hmc.NUTS(potential_fn=target.jax_energy())

    def start(seed):
        keys = jax.random.split(jax.random.key(seed), job.chains)
        return kernel.init(keys, job.warmup, jax.numpy.asarray(job.inits), (), {})

    def step(state, _):
        state = kernel.sample(state, (), {})
        return state, (state.z, state.num_steps)

    begin = time.perf_counter()
    example = start(0)
    setup_s = time.perf_counter() - begin
    program, compile_s = compiled(lambda s: jax.lax.scan(step, s, None, block), example)

    def run(seed):
        state = jax.block_until_ready(start(seed))
        clock, counts = Clock(), {}
        state, (_, counts["warmup"]) = in_blocks(program, state, job.warmup // block)
        clock.lap("warmup")
        state, (x, counts["sampling"]) = in_blocks(program, state, job.draws // block)
        clock.lap("sampling")
        adapted = {"step_size": float(np.mean(state.adapt_state.step_size))}
        return nuts_record(clock, setup_s + compile_s, x, counts, adapted)

    return run


def density(target):
    """Return the log-density of one point."""
    energy = target.jax_energy()
    return lambda x: -energy(x)


def blackjax_nuts(target, job):
    """Prepare blackjax's NUTS with its window adaptation, both vmapped over the chains."""
    blackjax, jax = need("blackjax"), need("jax")
    block, log_density = block_size(job.draws), density(target)
    warm = blackjax.window_adaptation(
        blackjax.nuts,
        log_density,
        adaptation_info_fn=lambda state, info, adaptation: info.num_integration_steps,
    )
    kernel = blackjax.nuts.build_kernel()

    def adapt(keys, inits):
        def one(key, init):
            (state, parameters), count = warm.run(key, init, num_steps=job.warmup)
            return state, parameters["step_size"], parameters["inverse_mass_matrix"], count

        return jax.vmap(one)(keys, inits)

    def step(carry, _):
        keys, state, step_size, mass = carry
        new, now = jax.numpy.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
        state, info = jax.vmap(lambda key, at, size, m: kernel(key, at, log_density, size, m))(
            now, state, step_size, mass
        )
        return (new, state, step_size, mass), (state.position, info.num_integration_steps)

    def sample(carry):
        return jax.lax.scan(step, carry, None, block)

    keys, inits = jax.random.split(jax.random.key(0), job.chains), jax.numpy.asarray(job.inits)
    adapt, first_s = compiled(adapt, keys, inits)
    shapes = jax.tree.map(jax.numpy.zeros_like, adapt(keys, inits)[:3])
    sample, second_s = compiled(sample, (keys, *shapes))

    def run(seed):
        warm_key, key = jax.random.split(jax.random.key(seed))
        keys = jax.random.split(key, job.chains)
        clock = Clock()
        *state, count = jax.block_until_ready(adapt(jax.random.split(warm_key, job.chains), inits))
        clock.lap("warmup")
        _, (x, counts) = in_blocks(sample, (keys, *state), job.draws // block)
        clock.lap("sampling")
        counts = {"warmup": np.asarray(count), "sampling": counts}
        adapted = {"step_size": float(np.mean(state[1]))}
        return nuts_record(clock, first_s + second_s, x, counts, adapted)

    return run


def blackjax_chees(target, job):
    """Prepare blackjax's ChEES with its diagonal mass matrix; all else as it comes.

    The optimiser is Adam with the learning rate .02, the first step size .1 of the smallest scale.
    """
    blackjax, jax, optax = need("blackjax"), need("jax"), need("optax")
    block, log_density, functions = block_size(job.draws), density(target), {}
    warm = blackjax.chees_adaptation(
        log_density,
        job.chains,
        mass_matrix_estimation="diagonal",
        adaptation_info_fn=lambda state, info, adaptation: info.num_integration_steps,
    )

    def adapt(key, inits):
        (state, parameters), info = warm.run(
            key,
            inits,
            0.1 * target.smallest,
            optax.adam(0.02),
            job.warmup,
            max_sampling_steps=job.draws,
        )
        functions["next"] = parameters["next_random_arg_fn"]
        functions["steps"] = parameters["integration_steps_fn"]
        (length,) = parameters["integration_steps_params"]
        settings = parameters["step_size"], parameters["inverse_mass_matrix"], length
        return state, settings, info._wrapped_info

    def step(carry, _):
        key, state, (step_size, mass, length) = carry
        key, now = jax.random.split(key)
        kernel = blackjax.dynamic_hmc.build_kernel(
            next_random_arg_fn=functions["next"], integration_steps_fn=functions["steps"]
        )
        state, info = jax.vmap(
            lambda k, at: kernel(k, at, log_density, step_size, mass, (length,))
        )(jax.random.split(now, job.chains), state)
        out = state.position, info.num_integration_steps, info.acceptance_rate.mean()
        return (key, state, (step_size, mass, length)), out

    key, inits = jax.random.key(0), jax.numpy.asarray(job.inits)
    adapt, first_s = compiled(adapt, key, inits)
    shapes = jax.tree.map(jax.numpy.zeros_like, adapt(key, inits)[:2])
    sample, second_s = compiled(
        lambda carry: jax.lax.scan(step, carry, None, block), (key, *shapes)
    )

    def run(seed):
        warm_key, key = jax.random.split(jax.random.key(seed))
        clock = Clock()
        state, settings, warm_counts = jax.block_until_ready(adapt(warm_key, inits))
        clock.lap("warmup")
        _, (x, counts, accept) = in_blocks(sample, (key, state, settings), job.draws // block)
        clock.lap("sampling")
        step_size, _, length = settings
        adapted = {
            "step_size": float(step_size),
            "trajectory": float(length * step_size),
            "steps": float(length),
            "acceptance": float(accept.mean()),
        }
        counts = {"warmup": np.asarray(warm_counts), "sampling": counts}
        return nuts_record(clock, first_s + second_s, x, counts, adapted)

    return run


PEERS = {
    "numpyro-nuts": Peer(numpyro_nuts, 1 << 30),
    "blackjax-nuts": Peer(blackjax_nuts, 64),
    "blackjax-chees": Peer(blackjax_chees, 1 << 30),
}
