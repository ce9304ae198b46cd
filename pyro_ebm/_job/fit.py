"""Learn the energy of a table: contrastive learning through Pyro's SVI, stopped in time."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import pyro
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from pyro_ebm._job.base import (
    JobError,
    Run,
    Table,
    Whitened,
    build_energy,
    gaussian,
    progress,
    repeatable,
    standard_normal,
)
from pyro_ebm.distribution import GibbsBoltzmann
from pyro_ebm.partition import Contrastive

CHECKS = 40  # how often in a run the validation rows are looked at
PARTICLES = 1 << 14  # for log Z at each look, the same ones every time
MEMORY = 100  # steps over which the weights are averaged


class Settings(NamedTuple):
    """How to learn."""

    hidden: list[int]
    steps: int
    lr: float
    weight_decay: float
    batch: int
    chains: int
    moves: int
    held_out: float
    validation: float
    seed: int


class Rows(NamedTuple):
    """Standardised rows, and what standardised them."""

    train: Tensor
    held_out: Tensor
    mean: Tensor
    scale: Tensor


class Learned(NamedTuple):
    """Averaged weights after a number of steps."""

    energy: Whitened
    steps: int
    gain: float | None  # on the validation rows over the Gaussian, in nats a row
    history: list[list[float]]  # step, loss, gain
    interrupted: bool


def fit(table: Table, settings: Settings, say: Any = print) -> Run:
    """Learn an energy of a table.

    A fifth of the training rows (``validation``) first finds the number of steps after which the
    energy is best on rows that it does not learn from; then the energy is learned anew, for as
    many steps, from all training rows. Held-out rows play no part. A keyboard interrupt ends
    learning, not the run.

    Args:
        table: The rows.
        settings: How to learn.
        say: Takes lines about what is going on.

    Returns:
        The run.

    Raises:
        JobError: If a column is constant in the training rows.
    """
    with repeatable(settings.seed):
        rows = split(table, settings)
        count = round(settings.validation * len(rows.train))
        n = len(rows.train)
        say(
            f"Data: {table.source}, {len(table.values)} rows, {len(table.names)} columns; "
            f"{len(rows.held_out)} rows are held out, {n} are there to learn from."
        )
        chosen = None
        if settings.validation > 0:
            count = max(1, count)
            say(f"Learning from {n - count} rows, to find on {count} others when to stop ...")
            chosen = _learn(rows.train[count:], rows.train[:count], settings, settings.steps)
            say(_about(chosen, settings))
        learned = _again(rows, settings, chosen, say)
    return _run(table, settings, rows, learned, chosen)


def _again(rows: Rows, settings: Settings, chosen: Learned | None, say: Any) -> Learned:
    """Learn from all training rows, for as many steps as were found to be best."""
    steps = settings.steps if chosen is None else chosen.steps
    if chosen is not None and chosen.interrupted:
        return chosen
    say(f"Learning from all {len(rows.train)} training rows, {steps} steps ...")
    learned = _learn(rows.train, None, settings, steps)
    if not learned.interrupted or chosen is None:
        return learned
    say(f"Interrupted: what was learned from {len(rows.train)} rows is not finished ...")
    return chosen._replace(interrupted=True)


def _about(chosen: Learned, settings: Settings) -> str:
    if chosen.interrupted:
        return f"Interrupted: the best so far, after {chosen.steps} steps, is kept."
    if chosen.steps == 0:
        return "  no step made the Gaussian better on them: the energy stays zero"
    return (
        f"  best after {chosen.steps} of {settings.steps} steps: {chosen.gain:+.2f} nats per row "
        "over the Gaussian, on those others"
    )


def split(table: Table, settings: Settings) -> Rows:
    """Hold rows out, and standardise all by mean and standard deviation of the others."""
    n = len(table.values)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(settings.seed))
    count = min(max(1, round(settings.held_out * n)), n - 5)  # what is left is split again
    values = table.values[order]
    mean, scale = values[count:].mean(0), values[count:].std(0, correction=0)
    for name, m, s in zip(table.names, mean.tolist(), scale.tolist(), strict=True):
        if not s > 1e-12 * abs(m):
            raise JobError(
                f"{table.source}: column {name!r} is constant, {m:g}, in the {n - count} training "
                "rows: leave it out with --columns, or take another --seed"
            )
    values = (values - mean) / scale
    return Rows(values[count:], values[:count], mean, scale)


def _average(energy: Whitened) -> Any:
    """Begin the running average of an energy's weights: at zero, which is the Gaussian."""

    def mean(average: Tensor, now: Tensor, num: Tensor | int) -> Tensor:
        return average.lerp(now, max(1 / MEMORY, 10 / (float(num) + 10)))  # of few steps, most

    return AveragedModel(_zero(energy), avg_fn=mean)


@torch.no_grad()
def _zero(energy: Whitened) -> Whitened:
    """Return the energy with a last layer of zeros."""
    energy = copy.deepcopy(energy).requires_grad_(False)
    *_, last = energy.parameters()
    last.zero_()
    return energy


class _Watch:
    """Keeps the weights that are best on rows that are not learned from.

    The Gaussian, at step 0, takes part: an energy that does not gain on it is not kept.
    """

    def __init__(self, rows: Tensor, energy: Whitened) -> None:
        self.points = energy.whiten(rows)
        self.particles = torch.randn(PARTICLES, rows.shape[1])
        self.best = Learned(_zero(energy), 0, 0.0, [], False)

    @torch.no_grad()
    def look(self, average: Any) -> float:
        energy, steps = average.module, int(average.n_averaged)
        log_z = (-energy(self.particles)).logsumexp(0) - math.log(PARTICLES)
        gain = float(-energy(self.points).mean() - log_z)
        if gain > (self.best.gain or 0.0):
            self.best = Learned(copy.deepcopy(energy), steps, gain, [], False)
        return gain


def _learn(rows: Tensor, watched: Tensor | None, settings: Settings, steps: int) -> Learned:
    """Learn an energy of standardised rows; with watched ones, return the best on the way."""
    torch.manual_seed(settings.seed)
    pyro.clear_param_store()
    energy = build_energy(settings.hidden, *gaussian(rows))
    average = _average(energy)
    watch = None if watched is None else _Watch(watched, energy)
    history: list[list[float]] = []
    interrupted = False
    bar = progress(steps, "learning" if watch is None else "finding when to stop")
    try:
        for loss in _losses(energy, rows, settings, steps, average):
            gain = [] if watch is None else [watch.look(average)]
            step = int(average.n_averaged)
            history.append([step, loss, *gain])
            bar.set_postfix_str(f"loss {loss:.2f}" + "".join(f", gain {g:+.2f}" for g in gain))
            bar.update(step - bar.n)
    except KeyboardInterrupt:
        interrupted = True
    finally:
        bar.close()
    if watch is None:
        return Learned(average.module, int(average.n_averaged), None, history, interrupted)
    if interrupted:
        watch.look(average)
    return watch.best._replace(history=history, interrupted=interrupted)


def _losses(
    energy: Whitened, rows: Tensor, settings: Settings, steps: int, average: Any
) -> Iterator[float]:
    """Learn by contrastive divergence; yield mean losses, in nats a row, now and then."""
    points, base = energy.whiten(rows), standard_normal(rows.shape[1])
    negatives = Contrastive(num_chains=settings.chains, num_steps=settings.moves)
    batch = min(settings.batch, len(rows))

    def model(z: Tensor) -> None:
        pyro.module("energy", energy)
        with pyro.plate("rows", len(z), subsample_size=batch) as i:
            law = GibbsBoltzmann(energy, base, log_partition=negatives)
            pyro.sample("z", law, obs=z[i])

    # A prior on the weights counts as much as a fixed number of rows.
    decay = settings.weight_decay / len(rows)
    optimizer = pyro.optim.AdamW({"lr": settings.lr, "weight_decay": decay})
    svi = SVI(model, lambda z: None, optimizer, Trace_ELBO())
    log_det = energy.tril.diagonal().log().sum().item()  # the loss is that of standardised rows
    every, recent = max(1, settings.steps // CHECKS), []
    for step in range(1, steps + 1):
        with warnings.catch_warnings():  # Pyro's about NaN, which is an error below
            warnings.filterwarnings("ignore", "Encountered NaN", UserWarning)
            try:
                loss = svi.step(points) / len(rows) + log_det
            except ValueError as error:  # an energy of minus infinity
                raise JobError(f"learning broke down at step {step}: lower --lr") from error
        if not math.isfinite(loss):
            raise JobError(f"learning broke down at step {step}: the loss is {loss}; lower --lr")
        recent.append(loss)
        average.update_parameters(energy)
        if step % every == 0 or step == steps:
            mean, recent = sum(recent) / len(recent), []
            yield mean


def _run(
    table: Table, settings: Settings, rows: Rows, learned: Learned, chosen: Learned | None
) -> Run:
    """Gather what is needed to go on without the table."""
    tensors = {f"energy.{name}": t.clone() for name, t in learned.energy.state_dict().items()}
    first = None if chosen is None else chosen.history
    learning = {
        "interrupted": learned.interrupted,
        "steps": learned.steps,
        "validation": {"gain": chosen and chosen.gain, "history": first},
        "history": learned.history,
    }
    data = {
        "source": table.source,
        "columns": table.names,
        "training_rows": len(rows.train),
        "held_out_rows": len(rows.held_out),
    }
    info = {"data": data, "settings": settings._asdict(), "learning": learning}
    return Run({**tensors, **rows._asdict()}, info)
