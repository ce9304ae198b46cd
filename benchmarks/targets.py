"""Six targets, each as a torch energy of a batch and as a JAX energy of one point.

Both hold the same numbers, which NumPy generates once from fixed seeds. Every energy is free of
control flow that depends on the data. The truth is in closed form or by quadrature; only that of
`logistic` comes from a long run: `python benchmarks/samplers.py truth` writes it to `truth.json`.
"""

import json
import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional

TRUTH = Path(__file__).with_name("truth.json")

EFFECTS = np.array([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
ERRORS = np.array([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
VARIANCES = np.logspace(0, 4, 100)
RADIUS, SPREAD, MODES = 5.0, 0.5, 8
NECK = 3.0


class Target(NamedTuple):
    """A distribution with what is known of it.

    `smallest` is a length that every direction has at least, about; a sampler without adaptation
    is set by it. Errors are judged on the first `judged` coordinates. `modes`, if any, are places
    that carry equal mass.
    """

    name: str
    dim: int
    energy: Callable[[torch.Tensor], torch.Tensor]  # (chains, dim) -> (chains,)
    jax_energy: Callable[[], Callable]  # makes (dim,) -> ()
    truth: Callable[[], tuple[np.ndarray, np.ndarray]]  # means and standard deviations
    smallest: float
    judged: int
    modes: np.ndarray | None = None


def tensor(x):
    return torch.as_tensor(x, dtype=torch.float32)


def moments_on_grid(energy, first, second):
    """Return the normalised weights of a two-dimensional density on a grid, and the grid."""
    a, b = np.meshgrid(first, second, indexing="ij")
    u = energy(a, b)
    weights = np.exp(u.min() - u)
    return weights / weights.sum(), a, b


# Eight schools, non-centred: x = (mu, log tau, theta_raw) ---------------------------------------


def schools():
    y, s = tensor(EFFECTS), tensor(ERRORS)

    def energy(x):
        mu, log_tau, raw = x[..., :1], x[..., 1], x[..., 2:]
        tau = log_tau.exp()
        z = (y - mu - tau[..., None] * raw) / s
        quadratic = (z.square() + raw.square()).sum(-1) + (mu[..., 0] / 5.0).square()
        return 0.5 * quadratic + torch.log1p((tau / 5.0).square()) - log_tau

    return energy


def schools_jax():
    import jax.numpy as jnp

    def energy(x):
        mu, log_tau, raw = x[0], x[1], x[2:]
        tau = jnp.exp(log_tau)
        z = (EFFECTS - mu - tau * raw) / ERRORS
        quadratic = jnp.sum(z**2) + jnp.sum(raw**2) + (mu / 5.0) ** 2
        return 0.5 * quadratic + jnp.log1p((tau / 5.0) ** 2) - log_tau

    return energy


@cache
def schools_truth():
    """Integrate the Gaussian raw effects out by hand, the other two on a grid."""

    def marginal(mu, log_tau):
        variance = ERRORS**2 + np.exp(2 * log_tau)[..., None]
        fit = ((EFFECTS - mu[..., None]) ** 2 / variance + np.log(variance)).sum(-1)
        prior = np.log1p((np.exp(log_tau) / 5.0) ** 2) - log_tau
        return 0.5 * fit + 0.5 * (mu / 5.0) ** 2 + prior

    w, mu, log_tau = moments_on_grid(
        marginal, np.linspace(-25, 30, 801), np.linspace(-20, 7, 2001)
    )
    tau = np.exp(log_tau)
    mean, square = [(w * mu).sum(), (w * log_tau).sum()], [(w * mu**2).sum(), 0.0]
    square[1] = (w * log_tau**2).sum()
    for y, s in zip(EFFECTS, ERRORS, strict=True):
        variance = 1.0 / (1.0 + (tau / s) ** 2)
        centre = variance * tau * (y - mu) / s**2
        mean.append((w * centre).sum())
        square.append((w * (variance + centre**2)).sum())
    mean = np.array(mean)
    return mean, np.sqrt(np.array(square) - mean**2)


# A Gaussian of a hundred scales ------------------------------------------------------------------


def gauss100():
    half_precision = tensor(0.5 / VARIANCES)
    return lambda x: (half_precision * x.square()).sum(-1)


def gauss100_jax():
    import jax.numpy as jnp

    return lambda x: jnp.sum(0.5 / VARIANCES * x**2)


# Logistic regression -----------------------------------------------------------------------------


@cache
def signed_features():
    """Return features times their labels, -1 or 1: 1000 rows, 25 correlated columns."""
    rng = np.random.default_rng(20240501)
    correlation = 0.7 ** np.abs(np.subtract.outer(np.arange(25), np.arange(25)))
    features = rng.standard_normal((1000, 25)) @ np.linalg.cholesky(correlation).T
    chance = 1.0 / (1.0 + np.exp(-features @ (0.5 * rng.standard_normal(25))))
    return features * np.where(rng.random(1000) < chance, 1.0, -1.0)[:, None]


def logistic():
    rows = tensor(signed_features()).T.contiguous()
    return lambda x: functional.softplus(-(x @ rows)).sum(-1) + 0.5 * x.square().sum(-1)


def logistic_jax():
    import jax
    import jax.numpy as jnp

    rows = signed_features()
    return lambda x: jnp.sum(jax.nn.softplus(-(rows @ x))) + 0.5 * jnp.sum(x**2)


def logistic_truth():
    stored = json.loads(TRUTH.read_text())["logistic"]
    return np.array(stored["mean"]), np.array(stored["sd"])


# A network ---------------------------------------------------------------------------------------


@cache
def layers():
    """Return weights and biases of a 2-128-128-1 network."""
    rng = np.random.default_rng(7)
    sizes = (2, 128, 128, 1)
    return [
        (rng.standard_normal((m, n)) / math.sqrt(n), 0.5 * rng.standard_normal(m))
        for n, m in zip(sizes[:-1], sizes[1:], strict=True)
    ]


def mlp():
    (a, b), (c, d), (e, f) = [(tensor(w), tensor(v)) for w, v in layers()]

    def energy(x):
        h = functional.silu(functional.linear(x, a, b))
        h = functional.silu(functional.linear(h, c, d))
        return functional.linear(h, e, f)[..., 0] + 0.25 * x.square().sum(-1)

    return energy


def mlp_jax():
    import jax
    import jax.numpy as jnp

    (a, b), (c, d), (e, f) = layers()

    def energy(x):
        h = jax.nn.silu(a @ x + b)
        h = jax.nn.silu(c @ h + d)
        return (e @ h + f)[0] + 0.25 * jnp.sum(x**2)

    return energy


@cache
def mlp_truth():
    energy = mlp()

    def on_grid(a, b):
        points = tensor(np.stack([a, b], -1))
        return torch.stack([energy(row) for row in points]).double().numpy()

    axis = np.linspace(-10, 10, 801)
    w, a, b = moments_on_grid(on_grid, axis, axis)
    mean = np.array([(w * a).sum(), (w * b).sum()])
    return mean, np.sqrt(np.array([(w * a**2).sum(), (w * b**2).sum()]) - mean**2)


# A ring of eight modes ---------------------------------------------------------------------------


def ring_modes():
    angle = 2 * np.pi * np.arange(MODES) / MODES
    return RADIUS * np.stack([np.cos(angle), np.sin(angle)], -1)


def ring8():
    modes = tensor(ring_modes())

    def energy(x):
        squares = (x[..., None, :] - modes).square().sum(-1)
        return -torch.logsumexp(-squares / (2 * SPREAD**2), -1)

    return energy


def ring8_jax():
    import jax
    import jax.numpy as jnp

    modes = ring_modes()

    def energy(x):
        squares = jnp.sum((x - modes) ** 2, -1)
        return -jax.scipy.special.logsumexp(-squares / (2 * SPREAD**2))

    return energy


def ring8_truth():
    return np.zeros(2), np.full(2, math.sqrt(RADIUS**2 / 2 + SPREAD**2))


# Neal's funnel: the neck first -------------------------------------------------------------------


def funnel10():
    def energy(x):
        v, rest = x[..., 0], x[..., 1:]
        return (
            0.5 * (v / NECK).square()
            + 0.5 * rest.square().sum(-1) * (-v).exp()
            + 0.5 * rest.shape[-1] * v
        )

    return energy


def funnel10_jax():
    import jax.numpy as jnp

    def energy(x):
        v, rest = x[0], x[1:]
        return 0.5 * (v / NECK) ** 2 + 0.5 * jnp.sum(rest**2) * jnp.exp(-v) + 0.5 * rest.size * v

    return energy


def funnel10_truth():
    return np.zeros(10), np.array([NECK] + [math.exp(NECK**2 / 4)] * 9)


def zero_mean(sd):
    return lambda: (np.zeros_like(sd), sd)


@cache
def targets():
    """Return all targets by name.

    Of the funnel the neck alone is judged: the standard deviation of the others comes from draws
    that are too rare to be seen.
    """
    made = [
        Target("schools", 10, schools(), schools_jax, schools_truth, 0.7, 10),
        Target("gauss100", 100, gauss100(), gauss100_jax, zero_mean(VARIANCES**0.5), 1.0, 100),
        Target("logistic", 25, logistic(), logistic_jax, logistic_truth, 0.07, 25),
        Target("mlp", 2, mlp(), mlp_jax, mlp_truth, 0.7, 2),
        Target("ring8", 2, ring8(), ring8_jax, ring8_truth, SPREAD, 2, ring_modes()),
        Target("funnel10", 10, funnel10(), funnel10_jax, funnel10_truth, 0.3, 1),
    ]
    return {target.name: target for target in made}
