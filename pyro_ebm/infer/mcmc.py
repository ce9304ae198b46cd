"""All chains at once: Pyro's ``MCMC``, with every chain a row of one batch."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from pyro.infer.mcmc.util import select_samples
from torch import Tensor

from pyro_ebm._audit import inspect_sites
from pyro_ebm._binding import evaluating
from pyro_ebm._engine import Eager, make_engine
from pyro_ebm._guard import UnnormalizedError, UnnormalizedWarning
from pyro_ebm._keep import Reduced, Stream
from pyro_ebm._potential import Potential, SamplingError, potential_of
from pyro_ebm._results import diagnose, end_warnings, table, warn
from pyro_ebm._run import Plan, Run
from pyro_ebm._starts import find_starts
from pyro_ebm.diagnostics import to_arviz
from pyro_ebm.distribution import GibbsBoltzmann
from pyro_ebm.infer.base import Sampler
from pyro_ebm.kernels.base import Kernel
from pyro_ebm.sampling import STATS, Block, Chains
from pyro_ebm.sampling import Stream as RandomStream

__all__ = ["MCMC", "SamplingError"]

BACKENDS = ("auto", "eager", "traced", "compiled")


class MCMC:
    """Markov chain Monte Carlo with all chains as one batch.

    A drop-in for :class:`pyro.infer.MCMC`: the same ``run``, ``get_samples``, ``summary`` and
    ``diagnostics``. Adaptation is shared by the chains. ``pyro.set_rng_seed`` repeats a run bit
    for bit; so does resuming from a ``checkpoint`` after the process was killed.

    Args:
        kernel: ``ebm.NUTS``, ``ebm.HMC``, ``ebm.ChEES``, ``ebm.MALA``, ``ebm.Tempered`` or
            ``ebm.Exchange`` of a target.
        num_samples: The draws to keep of each chain.
        warmup_steps: The moves of warm-up; by default as many as draws.
        initial_params: Starting points in unconstrained space, by site, as in Pyro: of shape
            ``(num_chains, *shape)``. By default they are drawn by the kernel's ``init_strategy``.
            If they are of float64, so is the run.
        num_chains: The number of chains.
        disable_progbar: Whether to show no progress.
        thin: Of every ``thin`` draws one is kept.
        stream: A new Zarr store to which draws are appended as they come, instead of into memory.
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

    def __init__(  # noqa: PLR0913 - Pyro's arguments, and what Pyro leaves to the user
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
            raise TypeError(
                f"kernel must be ebm.NUTS, HMC, ChEES, MALA, Tempered or Exchange, got {got}"
            )
        warmup_steps = num_samples if warmup_steps is None else warmup_steps
        size = num_chains if block_size is None else block_size
        _check_counts(
            num_samples=(num_samples, 1),
            warmup_steps=(warmup_steps, 0),
            num_chains=(num_chains, 1),
            thin=(thin, 1),
            block_size=(size, 1),
        )
        if backend not in BACKENDS:
            raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}")
        if stream is not None and reduce is not None:
            raise ValueError("stream and reduce must not both be given, got both")
        self.kernel, self.num_samples, self.warmup_steps = kernel, num_samples, warmup_steps
        self.initial_params, self.num_chains = initial_params, num_chains
        self.disable_progbar, self.thin = disable_progbar, thin
        self.stream, self.reduce = stream, reduce
        self.checkpoint = Path(checkpoint) if checkpoint is not None else None
        self.blocks = _cut(num_chains, size, blocks)
        self.warm, self.backend = warm, backend
        self.transforms: dict[str, Any] | None = None
        self._args: tuple = ()
        self._kwargs: dict[str, Any] = {}
        self._state: Run | None = None

    # Running ------------------------------------------------------------------------------------

    def run(self, *args: Any, **kwargs: Any) -> None:
        """Warm up and draw.

        Args:
            *args: The model's arguments.
            **kwargs: Its keyword arguments.

        Raises:
            UnnormalizedError: If a missing log Z would make the result wrong.
            SamplingError: If the energy raises; what was drawn is kept.
            ValueError: If a chain's starting point has no finite energy, or an energy is minus
                infinity; what was drawn is kept.
            CheckpointError: If the checkpoint is damaged or of another run.
        """
        self._args, self._kwargs = args, kwargs
        seed = int(torch.randint(2**62, ()).item())
        with torch.inference_mode(False):
            self._audit()
            potential = potential_of(self.kernel.target, args, kwargs)
            self.transforms = {n: site.transform.inv for n, site in potential.sites.items()}
            with evaluating(potential.owner):
                self._state = self._prepare(potential, seed)
            self._go(self._state)

    def extend(self, num_samples: int) -> None:
        """Draw more, going on where the run ended: the same bits as in one run.

        Args:
            num_samples: The further draws to keep of each chain.

        Raises:
            ValueError: If there is no run to go on with.
        """
        _check_counts(num_samples=(num_samples, 1))
        run = self._finished()
        run.extend(num_samples)
        with torch.inference_mode(False):
            self._go(run)

    def _go(self, run: Run) -> None:
        try:
            with evaluating(run.potential.owner):
                done = run.go(self.disable_progbar)
        finally:
            self.num_samples = run.plan.num_samples
        if done:
            warn(end_warnings(run.potential.name, self._draws(), self.sample_stats), 3)

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

    def _prepare(self, potential: Potential, seed: int) -> Run:
        """Set up chains at their starting points, and where their draws go."""
        clock = time.perf_counter()
        streams = {i: RandomStream(seed, i, potential.like.device) for i in self.blocks}
        given = None
        if self.initial_params is not None:
            given = potential.flatten(self.initial_params, self.num_chains)
            potential = potential._replace(like=potential.like.to(given.dtype))
        eager, points = Eager(potential.energy), {}
        for i, chains in self.blocks.items():
            with streams[i].active():
                at = None if given is None else given[chains.start : chains.stop]
                strategy = self.kernel.init_strategy
                points[i] = find_starts(potential, eager, chains, strategy, at)
        engine = make_engine(potential, self.backend, next(iter(points.values())))
        warmup = self.kernel.warmup(self.warmup_steps, next(iter(points.values()))[0])
        if self.warm is not None:
            warmup.hand_on(self.warm)
        move = self.kernel.move_on(potential)
        width = potential.num_dims + len(STATS) + len(move.extra)
        blocks = [
            Block(streams[i], move.start(engine, z, warmup.adapted), width)
            for i, z in points.items()
        ]
        self._warn_flat(potential, blocks)
        settings = self._settings(potential)
        plan = Plan(self.num_samples, self.warmup_steps, self.thin, self.checkpoint, settings)
        run = Run(potential, Chains(move, engine, warmup, blocks), plan)
        self._direct(run)
        run.times = {"start_s": time.perf_counter() - clock - engine.compile_s, **run.times}
        if self.checkpoint is not None and self.checkpoint.exists():
            run.resume(self.checkpoint)
        return run

    def _warn_flat(self, potential: Potential, blocks: list[Block]) -> None:
        grads = [getattr(block.state, "grad", None) for block in blocks]
        if all(grad is not None and not bool(grad.any()) for grad in grads):
            message = (
                f"Zero gradient: that of {potential.name} is zero at the starting points of all "
                "chains. They diffuse without direction, and run away if it is zero everywhere."
            )
            warn(iter([message]), 4)

    def _direct(self, run: Run) -> None:
        """Choose where draws go, if not into memory."""
        num, stats = self.num_samples, set(run.stats)
        if self.stream is not None:
            path = Path(self.stream)
            if path.exists() and not (self.checkpoint is not None and self.checkpoint.exists()):
                raise FileExistsError(f"stream must be a new store, {path} is there already")
            run.sink = Stream(num, run.none, stats, path)
        elif self.reduce is not None:
            run.sink = Reduced(num, run.none, stats, self.reduce)

    def _settings(self, potential: Potential) -> dict[str, Any]:
        """What a checkpoint must agree with."""
        return {
            **self.kernel.settings(),
            "sites": {n: list(site.shape) for n, site in potential.sites.items()},
            "dtype": str(potential.like.dtype),
            "warmup_steps": self.warmup_steps,
            "blocks": {str(i): len(chains) for i, chains in self.blocks.items()},
            "thin": self.thin,
            "draws": "stream" if self.stream else "reduce" if self.reduce else "memory",
        }

    # Results ------------------------------------------------------------------------------------

    def _finished(self) -> Run:
        if self._state is None:
            raise ValueError("mcmc must have run: call mcmc.run(...) first")
        return self._state

    def _draws(self) -> dict[str, Tensor]:
        run = self._finished()
        return {n: v for n, v in run.sink.draws().items() if n in run.potential.sites}

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
        return select_samples(self._draws(), num_samples, group_by_chain)

    @property
    def sample_stats(self) -> dict[str, Tensor]:
        """The records of the sampler by name, ``(chains, draws)``."""
        run = self._finished()
        draws = run.sink.draws()
        return {n: draws[n] for n in run.stats if n != "unbounded"}

    @property
    def adapted(self) -> Any:
        """What warm-up found: step size, metric, number of steps; for ``warm=`` of other runs."""
        return self._finished().chains.warmup.adapted

    @property
    def cost(self) -> dict[str, float]:
        """Seconds of each phase, and gradients: needed by the draws, and executed."""
        run = self._finished()
        return {
            **run.times,
            "compile_s": run.chains.engine.compile_s,
            "warmup_gradients": run.needed["warmup"],
            "sampling_gradients": run.needed["sampling"],
            "executed_gradients": run.executed["sampling"],
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
        return diagnose(self._draws(), self.sample_stats)

    def summary(self, prob: float = 0.9) -> Any:
        """Print and return ArviZ's table of the posterior.

        Args:
            prob: The mass of the highest-density interval.
        """
        found = table(self._draws(), prob)
        print(found)
        print(f"Number of divergences: {int(self.sample_stats['diverging'].sum())}")
        return found


def _cut(num_chains: int, size: int, chosen: list[int] | None) -> dict[int, range]:
    """Return the chains of each block that is to run."""
    starts = range(0, num_chains, size)
    cut = {i: range(first, min(first + size, num_chains)) for i, first in enumerate(starts)}
    if chosen is None:
        return cut
    if not chosen or not set(chosen) <= set(cut):
        raise ValueError(f"blocks must be among {list(cut)}, got {chosen}")
    return {i: cut[i] for i in chosen}


def _check_counts(**least: tuple[int, int]) -> None:
    """Refuse numbers that are not whole, or less than they must be."""
    for name, (value, low) in least.items():
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be a whole number, got {value!r}")
        if value < low:
            raise ValueError(f"{name} must be at least {low}, got {value}")
