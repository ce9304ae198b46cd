"""All chains at once: Pyro's ``MCMC``, with every chain a row of one batch."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch
from pyro.infer.mcmc.util import select_samples
from torch import Tensor
from tqdm.auto import tqdm

from pyro_ebm import checkpoint as files
from pyro_ebm._arviz import convergence_warnings
from pyro_ebm._audit import inspect_sites
from pyro_ebm._binding import evaluating
from pyro_ebm._engine import make_engine
from pyro_ebm._guard import UnnormalizedError, UnnormalizedWarning
from pyro_ebm._keep import Memory, Progress, Reduced, Stream
from pyro_ebm._potential import Potential, find_starts, potential_of
from pyro_ebm.diagnostics import ConvergenceWarning, to_arviz
from pyro_ebm.distribution import GibbsBoltzmann
from pyro_ebm.infer.base import Sampler
from pyro_ebm.kernels.base import Kernel
from pyro_ebm.sampling import ROWS, STATS, Block, Chains
from pyro_ebm.sampling import Stream as RandomStream

SAVING = 0.05
"""The share of a run's time that may go into checkpoints."""


class SamplingError(RuntimeError):
    """An energy failed in the middle of a run; the draws until then are kept."""


class MCMC:
    """Markov chain Monte Carlo with all chains as one batch.

    A drop-in for :class:`pyro.infer.MCMC`: the same ``run``, ``get_samples``, ``summary`` and
    ``diagnostics``. Adaptation is shared by the chains. ``pyro.set_rng_seed`` repeats a run bit
    for bit; so does resuming from a ``checkpoint`` after the process was killed.

    Args:
        kernel: ``ebm.NUTS``, ``ebm.HMC``, ``ebm.ChEES``, ``ebm.MALA`` or ``ebm.Tempered`` of a
            target.
        num_samples: The draws to keep of each chain.
        warmup_steps: The moves of warm-up; by default as many as draws.
        initial_params: Starting points in unconstrained space, by site, as in Pyro: of shape
            ``(num_chains, *shape)``. By default they are drawn by the kernel's ``init_strategy``.
        num_chains: The number of chains.
        disable_progbar: Whether to show no progress.
        thin: Of every ``thin`` draws one is kept.
        stream: A Zarr store to which draws are appended as they come, instead of into memory.
        reduce: A function that gets draws as they come, ``{site: (chains, n, *shape)}``, instead
            of keeping them.
        checkpoint: A file from which a run that was killed goes on, and to which it is saved.
        block_size: Cuts the chains into blocks of this many, which run one after the other, each
            with a random stream of its own by its index.
        blocks: Which of the blocks to run; by default all.
        warm: The :attr:`adapted` state of an earlier run, to sample with ``warmup_steps=0``.
        backend: ``"eager"``, ``"traced"``, ``"compiled"``, or ``"auto"``: traced where the energy
            allows.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument is out of its range.

    Example:
        >>> def model(y):
        ...     mean = pyro.sample("mean", dist.Normal(0.0, 10.0))
        ...     with pyro.plate("n", len(y)):
        ...         pyro.sample("y", dist.Normal(mean, 1.0), obs=y)
        >>> mcmc = ebm.MCMC(ebm.NUTS(model), 500, num_chains=8, disable_progbar=True)
        >>> mcmc.run(torch.tensor([1.0, 2.0, 3.0]))
        >>> bool((mcmc.get_samples()["mean"].mean() - 2.0).abs() < 0.1)
        True
    """

    def __init__(
        self,
        kernel: Sampler,
        num_samples: int,
        warmup_steps: int | None = None,
        initial_params: Mapping[str, Tensor] | None = None,
        num_chains: int = 1,
        *,
        disable_progbar: bool = False,
        thin: int = 1,
        stream: str | Path | None = None,
        reduce: Callable[[dict[str, Tensor]], None] | None = None,
        checkpoint: str | Path | None = None,
        block_size: int | None = None,
        blocks: list[int] | None = None,
        warm: Any = None,
        backend: str = "auto",
    ) -> None:
        if not isinstance(kernel, Sampler):
            got = type(kernel).__name__
            raise TypeError(f"kernel must be ebm.NUTS, HMC, ChEES, MALA or Tempered, got {got}")
        warmup_steps = num_samples if warmup_steps is None else warmup_steps
        _check_counts(num_samples, warmup_steps, num_chains, thin, block_size or 1)
        if backend not in ("auto", "eager", "traced", "compiled"):
            raise ValueError(
                f"backend must be 'auto', 'eager', 'traced' or 'compiled', got {backend!r}"
            )
        if stream is not None and reduce is not None:
            raise ValueError("stream and reduce must not both be given, got both")
        self.kernel, self.num_samples, self.warmup_steps = kernel, num_samples, warmup_steps
        self.initial_params, self.num_chains = initial_params, num_chains
        self.disable_progbar, self.thin = disable_progbar, thin
        self.stream, self.reduce = stream, reduce
        self.checkpoint = Path(checkpoint) if checkpoint is not None else None
        size = block_size or num_chains
        self.sizes = {i: min(size, num_chains - i * size) for i in range(-(-num_chains // size))}
        if blocks is not None:
            if not set(blocks) <= set(self.sizes):
                raise ValueError(f"blocks must be among {list(self.sizes)}, got {blocks}")
            self.sizes = {i: self.sizes[i] for i in blocks}
        self.warm, self.backend = warm, backend
        self.transforms: dict[str, Any] | None = None
        self._args: tuple = ()
        self._kwargs: dict[str, Any] = {}
        self._sink: Memory | None = None

    # Running ------------------------------------------------------------------------------------

    def run(self, *args: Any, **kwargs: Any) -> None:
        """Warm up and draw.

        Args:
            *args: The model's arguments.
            **kwargs: Its keyword arguments.

        Raises:
            UnnormalizedError: If a missing log Z would make the result wrong.
            SamplingError: If the energy raises in the middle; what was drawn is kept.
            ValueError: If a chain's starting point has no finite energy, or an energy is minus
                infinity.
        """
        self._args, self._kwargs = args, kwargs
        self._seed = int(torch.randint(2**62, ()).item())
        self._audit()
        potential = potential_of(self.kernel.target, args, kwargs)
        self._potential = potential
        self.transforms = {n: site.transform.inv for n, site in potential.sites.items()}
        with evaluating(potential.owner):
            self._prepare(potential)
            if self.checkpoint is not None and self.checkpoint.exists():
                self._resume()
            self._go()

    def extend(self, num_samples: int) -> None:
        """Draw more, going on where the run ended: the same bits as in one run.

        Args:
            num_samples: The further draws to keep of each chain.

        Raises:
            ValueError: If there is no run to go on with.
        """
        if self._sink is None:
            raise ValueError("mcmc must have run before it is extended: call mcmc.run(...)")
        _check_counts(num_samples, 0, 1, 1, 1)
        self.num_samples = self._sink.count + num_samples
        self._sink.room(self.num_samples)
        with evaluating(self._potential.owner):
            self._go()

    @property
    def model(self) -> Callable[..., Any] | None:
        """The Pyro model of the run, if its target is one."""
        target = self.kernel.target
        return None if isinstance(target, GibbsBoltzmann) else target

    def _audit(self) -> None:
        """Refuse what would be silently wrong; learned parameters are constants here."""
        if self.model is None:
            return
        for finding in inspect_sites(self.model, *self._args, **self._kwargs):
            if finding.kind in ("random", "gradient"):
                raise UnnormalizedError(finding.message)
            if finding.kind == "control":
                warnings.warn(finding.message, UnnormalizedWarning, stacklevel=3)

    def _prepare(self, potential: Potential) -> None:
        """Find starting points and set up chains."""
        clock = time.perf_counter()
        num = sum(self.sizes.values())
        streams = [RandomStream(self._seed, i, potential.like.device) for i in self.sizes]
        self._engine = make_engine(potential, self.backend, list(self.sizes.values()))
        points = []
        given = None
        if self.initial_params is not None:
            given = potential.flatten(self.initial_params, num).split(list(self.sizes.values()))
        first = 0
        for k, (size, stream) in enumerate(zip(self.sizes.values(), streams, strict=True)):
            with stream.active():
                z = given[k] if given else None
                strategy = self.kernel.init_strategy
                points.append(find_starts(potential, self._engine, size, strategy, z, first))
            first += size
        like = points[0][0]
        warmup = self.kernel.warmup(self.warmup_steps, like)
        if self.warm is not None:
            warmup.hand_on(self.warm)
        move = self.kernel.move
        self._engine.prepare(move, points[0], warmup)
        width = potential.num_dims + len(STATS) + len(move.extra)
        blocks = [
            Block(stream, move.start(self._engine, z), width)
            for stream, z in zip(streams, points, strict=True)
        ]
        self._chains = Chains(move, self._engine, warmup, blocks)
        self._stats = (*STATS, *move.extra)
        keep = set(self._stats)
        if self.stream is not None:
            self._sink = Stream(self.num_samples, Path(self.stream), keep)
        elif self.reduce is not None:
            self._sink = Reduced(self.num_samples, self.reduce, keep)
        else:
            self._sink = Memory(self.num_samples)
        self._progress, self._skip = Progress(), 0
        self._times = {
            "compile_s": time.perf_counter() - clock,
            "warmup_s": 0.0,
            "sampling_s": 0.0,
        }
        self._spent = {"warmup": 0, "sampling": 0}
        self._saved_at, self._save_cost = time.perf_counter(), 0.0

    def _go(self) -> None:
        """Warm up and draw until there is what was asked for; keep what there is at a stop."""
        chains, sink = self._chains, self._sink
        assert sink is not None
        total = self.warmup_steps + self.num_samples
        bar = tqdm(
            total=total, disable=self.disable_progbar, initial=chains.warmup.count + sink.count
        )
        warned: BaseException | None = None
        try:
            with bar:
                self._warm(bar)
                self._draw(bar)
        except KeyboardInterrupt as stop:
            warned = stop
        except Exception as error:
            where = self._where()
            self._collect_rest()
            raise SamplingError(
                f"{self._potential.name} raised {type(error).__name__} at {where}; the "
                f"{sink.count} finished draws of each chain are kept: {error}"
            ) from error
        if warned is not None:
            where = self._where()
            self._collect_rest()
            warnings.warn(
                f"interrupted at {where}; {sink.count} draws of each chain are kept",
                ConvergenceWarning,
                stacklevel=3,
            )
            return
        self._save(force=True)
        self._say_warnings()

    def _where(self) -> str:
        warmup = self._chains.warmup
        if warmup.count < warmup.num:
            return f"move {warmup.count + 1} of {warmup.num} of warm-up"
        assert self._sink is not None
        waiting = min(int(b.counts.min()) for b in self._chains.blocks)
        draw = self._sink.count * self.thin + waiting + 1
        return f"draw {draw} of {self.num_samples * self.thin}"

    def _warm(self, bar: tqdm) -> None:
        chains, clock = self._chains, time.perf_counter()
        before = self._engine.executed
        while chains.warmup.count < chains.warmup.num:
            info = chains.warm()
            self._spent["warmup"] += int(info.num_steps.sum())
            bar.update()
            if chains.warmup.count % 10 == 0:
                self._check(bool(info.unbounded.any()))
                step = float(chains.warmup.adapted.step_size.mean())
                accept = float(info.accept_prob.mean())
                bar.set_postfix_str(f"warm-up, acceptance {accept:.2f}, step {step:.3g}", False)
                self._save()
        self._times["warmup_s"] += time.perf_counter() - clock
        self._executed_before = self._engine.executed
        self._warmup_executed = self._engine.executed - before

    def _draw(self, bar: tqdm) -> None:
        sink, clock = self._sink, time.perf_counter()
        assert sink is not None
        while sink.count < self.num_samples:
            left = (self.num_samples - sink.count) * self.thin - self._skip
            chunk = min(ROWS, left)
            rows = self._chains.draw(chunk)
            kept = self._take(rows)
            bar.update(kept)
            self._times["sampling_s"] += time.perf_counter() - clock
            clock = time.perf_counter()
            bar.set_postfix_str(self._status(), False)
            self._save()

    def _take(self, rows: Tensor) -> int:
        """Keep what thinning leaves of rows ``(chains, n, D + stats)``."""
        potential, sink = self._potential, self._sink
        assert sink is not None
        d = potential.num_dims
        stats = dict(zip(self._stats, rows[..., d:].unbind(-1), strict=True))
        self._count_stats(stats)
        at = (self.thin - 1 - self._skip) % self.thin
        self._skip = (self._skip + rows.shape[1]) % self.thin
        rows = rows[:, at :: self.thin]
        if not rows.shape[1]:
            return 0
        stats = dict(zip(self._stats, rows[..., d:].unbind(-1), strict=True))
        z = rows[..., :d]
        self._progress.add(z)
        with torch.no_grad(), pyro.validation_enabled(False):
            draws = potential.constrain(z)
        whole = ("n_steps", "tree_depth")
        flags = ("diverging", "invalid", "reached_max_treedepth", "unbounded")
        for name, value in stats.items():
            kind = torch.long if name in whole else torch.bool if name in flags else value.dtype
            draws[name] = value.to(kind)
        sink.add(draws)
        return rows.shape[1]

    def _count_stats(self, stats: dict[str, Tensor]) -> None:
        self._spent["sampling"] += int(stats["n_steps"].sum())
        self._check(bool(stats["unbounded"].any()))

    def _check(self, unbounded: bool) -> None:
        if unbounded:
            raise ValueError(
                f"{self._potential.name} must be bounded below, got -inf: that is no density"
            )

    def _collect_rest(self) -> None:
        """Keep rows that were drawn and not yet handed on."""
        blocks = self._chains.blocks
        sink = self._sink
        assert sink is not None
        waiting = min(int(block.counts.min()) for block in blocks)
        waiting = min(waiting, (self.num_samples - sink.count) * self.thin - self._skip)
        if waiting > 0:
            self._take(torch.cat([block.take(waiting) for block in blocks]))

    def _status(self) -> str:
        assert self._sink is not None
        records = self._sink.draws()
        accept = float(records["acceptance_rate"][:, -ROWS:].mean())
        diverging = int(records["diverging"].sum())
        r_hat = self._progress.r_hat()
        step = float(records["step_size"][:, -1].mean())
        return (
            f"acceptance {accept:.2f}, step {step:.3g}, divergences {diverging}, "
            f"R-hat so far {r_hat:.3f}"
        )

    # Checkpoints --------------------------------------------------------------------------------

    def _settings(self) -> dict[str, Any]:
        sites = {n: list(site.shape) for n, site in self._potential.sites.items()}
        return {
            **self.kernel.settings(),
            "sites": sites,
            "dtype": str(self._potential.like.dtype),
            "warmup_steps": self.warmup_steps,
            "blocks": {str(i): n for i, n in self.sizes.items()},
            "thin": self.thin,
        }

    def _save(self, force: bool = False) -> None:
        if self.checkpoint is None:
            return
        now = time.perf_counter()
        if not force and now - self._saved_at < self._save_cost / SAVING:
            return
        assert self._sink is not None
        state = {
            "settings": self._settings(),
            "seed": self._seed,
            "chains": self._chains.state(),
            "sink": self._sink.state(),
            "skip": self._skip,
            "times": dict(self._times),
            "spent": dict(self._spent),
        }
        files.save(self.checkpoint, state)
        self._saved_at = time.perf_counter()
        self._save_cost = self._saved_at - now

    def _resume(self) -> None:
        assert self.checkpoint is not None
        assert self._sink is not None
        state = files.load(self.checkpoint)
        ours, theirs = self._settings(), state["settings"]
        different = [name for name in ours if ours[name] != theirs.get(name)]
        if different:
            name = different[0]
            raise files.CheckpointError(
                f"checkpoint {self.checkpoint} must be of the same run: its {name} is "
                f"{theirs.get(name)!r}, this run's is {ours[name]!r}; choose another file"
            )
        self._seed, self._skip = state["seed"], state["skip"]
        self._chains.restore(state["chains"])
        self._sink.restore(state["sink"])
        self._times, self._spent = state["times"], state["spent"]
        if self._sink.count > self.num_samples:
            self._sink.count = self.num_samples

    # Results ------------------------------------------------------------------------------------

    @property
    def _samples(self) -> dict[str, Tensor] | None:
        if self._sink is None:
            return None
        draws = self._sink.draws()
        return {n: draws[n] for n in self._potential.sites if n in draws}

    def _finished(self) -> dict[str, Tensor]:
        if self._samples is None:
            raise ValueError("mcmc must have run: call mcmc.run(...) first")
        return self._samples

    def get_samples(
        self, num_samples: int | None = None, group_by_chain: bool = False
    ) -> dict[str, Tensor]:
        """Return the draws by site.

        Args:
            num_samples: How many to resample, with replacement; by default all as they are.
            group_by_chain: Whether chains and draws are two dimensions or one.

        Returns:
            Draws of shape ``(chains, draws, *shape)`` or ``(chains * draws, *shape)``.

        Raises:
            ValueError: If the run has not begun.
        """
        return select_samples(self._finished(), num_samples, group_by_chain)

    @property
    def sample_stats(self) -> dict[str, Tensor]:
        """The records of the sampler by name, ``(chains, draws)``."""
        self._finished()
        assert self._sink is not None
        draws = self._sink.draws()
        hidden = ("unbounded",)
        return {n: draws[n] for n in self._stats if n in draws and n not in hidden}

    @property
    def adapted(self) -> Any:
        """What warm-up found: step size, metric, number of steps; for ``warm=`` of other runs."""
        self._finished()
        return self._chains.warmup.adapted

    @property
    def cost(self) -> dict[str, float]:
        """Seconds of each phase, and gradients: needed by the draws, and executed."""
        self._finished()
        executed = self._engine.executed - getattr(self, "_executed_before", 0)
        return {
            **self._times,
            "warmup_gradients": self._spent["warmup"],
            "sampling_gradients": self._spent["sampling"],
            "executed_gradients": executed,
        }

    def make_kernel(self, energy: Callable[..., Tensor]) -> Kernel:
        """Return the kernel with what warm-up found, for another energy of flat points.

        It drives persistent chains during learning without warming up again.
        """
        return self.kernel.make_kernel(energy, self.adapted)

    def to_arviz(self, **kwargs: Any) -> Any:
        """Hand the chains to ArviZ; see :func:`pyro_ebm.to_arviz`."""
        return to_arviz(self, **kwargs)

    def diagnostics(self) -> dict[str, Any]:
        """Return ``n_eff`` and ``r_hat`` by site, divergences and acceptance rates by chain."""
        import arviz as az  # noqa: PLC0415 - slower to import than torch

        found: dict[str, Any] = {}
        for name, value in self._finished().items():
            x = (
                value.detach().cpu().double().flatten(2).numpy()
                if value.dim() > 2
                else (value.detach().cpu().double().unsqueeze(-1).numpy())
            )
            shape = value.shape[2:]
            ess = torch.tensor([float(az.ess(x[..., i])) for i in range(x.shape[-1])])
            r_hat = torch.tensor([float(az.rhat(x[..., i])) for i in range(x.shape[-1])])
            found[name] = {"n_eff": ess.reshape(shape), "r_hat": r_hat.reshape(shape)}
        stats = self.sample_stats
        found["divergences"] = {
            f"chain {i}": chain.nonzero()[:, 0].tolist()
            for i, chain in enumerate(stats["diverging"])
        }
        found["acceptance rate"] = {
            f"chain {i}": float(chain.mean()) for i, chain in enumerate(stats["acceptance_rate"])
        }
        return found

    def summary(self, prob: float = 0.9) -> Any:
        """Print and return ArviZ's table of the posterior.

        Args:
            prob: The mass of the highest-density interval.
        """
        import arviz as az  # noqa: PLC0415

        table = az.summary(
            {n: v.cpu().numpy() for n, v in self._finished().items()}, hdi_prob=prob
        )
        print(table)
        print(f"Number of divergences: {int(self.sample_stats['diverging'].sum())}")
        return table

    def _say_warnings(self) -> None:
        """Warn by name of what makes the draws unfit for use."""
        sink = self._sink
        assert sink is not None
        draws = {n: v for n, v in self._finished().items()}
        stats = self.sample_stats
        invalid = stats["invalid"].sum(-1)
        if bool(invalid.any()):
            worst = int(invalid.argmax())
            warnings.warn(
                f"NaN energies ended {int(invalid.sum())} trajectories, most of them "
                f"({int(invalid[worst])}) in chain {worst}; they were rejected",
                ConvergenceWarning,
                stacklevel=4,
            )
        groups = {
            "posterior": {n: _for_warnings(v) for n, v in draws.items()},
            "sample_stats": {n: v.cpu().numpy() for n, v in stats.items()},
        }
        if not groups["posterior"]:
            return
        from pyro_ebm._arviz import to_inference_data  # noqa: PLC0415

        for message in convergence_warnings(to_inference_data(groups)):
            warnings.warn(message, ConvergenceWarning, stacklevel=4)


def _for_warnings(value: Tensor) -> np.ndarray:
    """Look at 1,000 components at most."""
    flat = value.detach().flatten(2) if value.dim() > 3 else value.detach()
    if flat.dim() > 2 and flat.shape[-1] > 1000:
        flat = flat[..., :: -(-flat.shape[-1] // 1000)]
    return flat.cpu().numpy()


def _check_counts(num_samples: int, warmup: int, num_chains: int, thin: int, size: int) -> None:
    least = (
        ("num_samples", num_samples, 1),
        ("warmup_steps", warmup, 0),
        ("num_chains", num_chains, 1),
        ("thin", thin, 1),
        ("block_size", size, 1),
    )
    for name, value, low in least:
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be a whole number, got {value!r}")
        if value < low:
            raise ValueError(f"{name} must be at least {low}, got {value}")
