"""A run under way: it warms up, draws, keeps, saves, and loses nothing when it is stopped."""

from __future__ import annotations

import contextlib
import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import pyro
import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyro_ebm import checkpoint as files
from pyro_ebm._keep import Draws, Memory, Progress
from pyro_ebm._potential import Potential, SamplingError
from pyro_ebm.diagnostics import ConvergenceWarning
from pyro_ebm.sampling import ROWS, STATS, Chains

SAVING = 0.05
"""The share of a run's time that may go into checkpoints."""

OFTEN = 10
"""In warm-up, what waits for the device is done after this many moves."""

WHOLE = ("n_steps", "tree_depth")
FLAGS = ("diverging", "invalid", "reached_max_treedepth", "unbounded")


class Plan(NamedTuple):
    """What a run is asked for; ``settings`` are what a checkpoint must agree with."""

    num_samples: int
    warmup_steps: int
    thin: int
    checkpoint: Path | None
    settings: dict[str, Any]


class Unbounded(ValueError):
    """An energy of minus infinity."""


class Run:
    """Chains, where their draws go, and what they have cost."""

    def __init__(self, potential: Potential, chains: Chains, plan: Plan) -> None:
        self.potential, self.chains, self.plan = potential, chains, plan
        self.stats = (*STATS, *chains.move.extra)
        self.progress, self.drawn = Progress(), 0
        self.times = {"warmup_s": 0.0, "sampling_s": 0.0}
        self.needed = {"warmup": 0, "sampling": 0}
        self.executed = {"warmup": 0, "sampling": 0}
        self.keeping = False
        self._saved_at, self._save_cost = time.perf_counter(), 0.0
        rows = chains.blocks[0].rows
        num = sum(len(block.counts) for block in chains.blocks)
        self.none = self._named(rows.new_empty(num, 0, rows.shape[-1]))
        self.sink = Memory(plan.num_samples, self.none)

    def extend(self, num_samples: int) -> None:
        """Ask for more draws."""
        self.plan = self.plan._replace(num_samples=self.sink.count + num_samples)
        self.sink.extend(self.plan.num_samples)

    def go(self, quiet: bool) -> bool:
        """Warm up and draw until there is what was asked for; keep what there is at a stop.

        Returns:
            Whether it got there.

        Raises:
            SamplingError: If something fails; what was drawn is kept.
            ValueError: If an energy is minus infinity; what was drawn is kept.
        """
        total = self.chains.warmup.num + self.plan.num_samples
        done = self.chains.warmup.count + self.sink.count
        self.save(force=True)
        try:
            with tqdm(total=total, disable=quiet, initial=done) as bar:
                self._warm(bar)
                self._draw(bar)
        except KeyboardInterrupt:
            where, kept = self._stop()
            message = f"interrupted at {where}; {kept}"
            warnings.warn(message, ConvergenceWarning, stacklevel=4)
            return False
        except Unbounded:
            where, kept = self._stop()
            raise ValueError(
                f"{self.potential.name} must be bounded below, got -inf at {where}: that is no "
                f"density; {kept}"
            ) from None
        except Exception as error:
            who = "where draws go (stream or reduce)" if self.keeping else self.potential.name
            where, kept = self._stop()
            kind = type(error).__name__
            raise SamplingError(f"{who} raised {kind} at {where}; {kept}: {error}") from error
        self.save(force=True)
        return True

    def _stop(self) -> tuple[str, str]:
        """Keep rows that wait to be handed on; say where that was, and what is kept."""
        warmup, blocks = self.chains.warmup, self.chains.blocks
        waiting = min(int(block.counts.min()) for block in blocks)
        where = f"draw {self.drawn + waiting + 1} of {self.plan.num_samples * self.plan.thin}"
        if warmup.count < warmup.num:
            where = f"move {warmup.count + 1} of {warmup.num} of warm-up"
        waiting = min(waiting, self._left())
        if waiting > 0 and not self.keeping:
            with contextlib.suppress(Unbounded):
                self._take(torch.cat([block.take(waiting) for block in blocks]))
        self.keeping = False
        return where, f"the {self.sink.count} finished draws of each chain are kept"

    def _left(self) -> int:
        """Return how many draws are to be made, with those that thinning drops."""
        done = self.sink.count * self.plan.thin + self.drawn % self.plan.thin
        return self.plan.num_samples * self.plan.thin - done

    def _clock(self) -> float:
        """Seconds, without those of tracing and compiling."""
        return time.perf_counter() - self.chains.engine.compile_s

    def _warm(self, bar: tqdm) -> None:
        warmup, engine = self.chains.warmup, self.chains.engine
        clock, before = self._clock(), engine.executed
        spent: Any = 0
        unbounded: Any = False
        while warmup.count < warmup.num:
            info = self.chains.warm()
            spent, unbounded = spent + info.num_steps.sum(), unbounded | info.unbounded.any()
            bar.update()
            if warmup.count % OFTEN == 0 or warmup.count == warmup.num:
                self.needed["warmup"] += int(spent)
                spent = 0
                if bool(unbounded):
                    raise Unbounded
                step, accept = warmup.adapted.step_size.mean(), info.accept_prob.mean()
                bar.set_postfix_str(
                    f"warm-up, acceptance {float(accept):.2f}, step {float(step):.3g}", False
                )
                self.save()
        self.times["warmup_s"] += self._clock() - clock
        self.executed["warmup"] += engine.executed - before

    def _draw(self, bar: tqdm) -> None:
        engine = self.chains.engine
        while self.sink.count < self.plan.num_samples:
            clock, before = self._clock(), engine.executed
            kept = self._take(self.chains.draw(min(self.chains.chunk, self._left())))
            bar.update(kept)
            self.times["sampling_s"] += self._clock() - clock
            self.executed["sampling"] += engine.executed - before
            if not bar.disable:
                bar.set_postfix_str(self._status(), False)
            self.save()

    def _take(self, rows: Tensor) -> int:
        """Keep what thinning leaves of rows ``(chains, n, D + stats)``."""
        d, thin = self.potential.num_dims, self.plan.thin
        pits = rows[..., d + self.stats.index("unbounded")].any(0)
        if bool(pits.any()):
            rows = rows[:, : int(pits.nonzero()[0])]
        self.needed["sampling"] += int(rows[..., d + self.stats.index("n_steps")].sum())
        kept = rows[:, (thin - 1 - self.drawn) % thin :: thin]
        self.drawn += rows.shape[1]
        if kept.shape[1]:
            self.progress.add(kept[..., :d])
            draws = self._named(kept)
            self.keeping = True
            self.sink.add(draws)
            self.keeping = False
        if bool(pits.any()):
            raise Unbounded
        return kept.shape[1]

    def _named(self, rows: Tensor) -> Draws:
        """Return the values of sites and the records of the sampler of rows, by name."""
        d = self.potential.num_dims
        with torch.no_grad(), pyro.validation_enabled(False):
            draws = self.potential.constrain(rows[..., :d])
        for name, value in zip(self.stats, rows[..., d:].unbind(-1), strict=True):
            kind = (name in WHOLE and torch.long) or (name in FLAGS and torch.bool)
            draws[name] = value.to(kind or value.dtype)
        return draws

    def _status(self) -> str:
        records = self.sink.draws()
        accept = float(records["acceptance_rate"][:, -ROWS:].mean())
        step = float(records["step_size"][:, -1:].mean())
        return (
            f"acceptance {accept:.2f}, step {step:.3g}, divergences "
            f"{int(records['diverging'].sum())}, R-hat so far {self.progress.r_hat():.3f}"
        )

    # Checkpoints --------------------------------------------------------------------------------

    def save(self, force: bool = False) -> None:
        """Save the run, if that does not take too large a share of its time."""
        now = time.perf_counter()
        path = self.plan.checkpoint
        if path is None or not (force or now - self._saved_at > self._save_cost / SAVING):
            return
        state = {
            "settings": self.plan.settings,
            "chains": self.chains.state(),
            "draws": self.sink.state(),
            "drawn": self.drawn,
            "progress": vars(self.progress),
            "costs": [dict(d) for d in (self.times, self.needed, self.executed)],
        }
        files.save(path, state)
        self._saved_at = time.perf_counter()
        self._save_cost = self._saved_at - now

    def resume(self, path: Path) -> None:
        """Go on with a run that was saved.

        Raises:
            CheckpointError: If the file is damaged, or of another run.
        """
        state = files.load(path)
        ours, theirs = self.plan.settings, state.get("settings")
        if not isinstance(theirs, dict):
            raise files.CheckpointError(f"checkpoint {path} must be of a run, got another state")
        for name in ours:
            if ours[name] != theirs.get(name):
                raise files.CheckpointError(
                    f"checkpoint {path} must be of the same run: its {name} is "
                    f"{theirs.get(name)!r}, this run's is {ours[name]!r}; choose another file"
                )
        self.chains.restore(state["chains"])
        self._check_target(path)
        self.sink.restore(state["draws"])
        self.drawn = state["drawn"]
        vars(self.progress).update(state["progress"])
        self.times, self.needed, self.executed = state["costs"]
        most = max(self.plan.num_samples, self.sink.count)
        self.plan = self.plan._replace(num_samples=most)

    def _check_target(self, path: Path) -> None:
        """Refuse a checkpoint of another energy, or of other data."""
        for block in self.chains.blocks:
            position, energy = block.state.position, block.state.energy
            now = self.chains.engine.gradient(position)[0]
            if not torch.allclose(now, energy, rtol=1e-3, atol=1e-3, equal_nan=True):
                raise files.CheckpointError(
                    f"checkpoint {path} must be of the same target: {self.potential.name} is "
                    f"{now[0].item():.6g} where it was {energy[0].item():.6g}; other data?"
                )
