"""The one loop: blocks of chains, each with a random stream of its own, warmed up and sampled."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_ebm._engine import Eager as Engine
from pyro_ebm._engine import Luck
from pyro_ebm._ladder import Ladder
from pyro_ebm.adaptation import Adapted, Length, Warmup
from pyro_ebm.energy import Energy
from pyro_ebm.kernels.base import Kernel, State, jittered, kinetic, placed, start
from pyro_ebm.kernels.exchange import ExchangeState
from pyro_ebm.kernels.hmc import Chance, hmc, settle
from pyro_ebm.kernels.nuts import Tree, harvest, levels, plant
from pyro_ebm.kernels.tempering import TemperedState, tempered

__all__ = ["Stream"]

ROWS = 64
"""Draws are handed on in chunks of this many at most, of fewer where they are large."""

LARGE = 1 << 20
"""The most numbers of a chunk, if it has more than one draw."""

LOOKAHEAD = 16
"""Uniform random numbers for this many leapfrog steps of NUTS are drawn at once."""

STATS = (
    "lp",
    "energy",
    "acceptance_rate",
    "step_size",
    "n_steps",
    "diverging",
    "invalid",
    "unbounded",
)


TREE_STATS = ("tree_depth", "reached_max_treedepth")


class Stream:
    """A stream of random numbers, in the place of torch's own while it is entered.

    Args:
        seed: The seed of the run.
        index: The number of the stream.
        device: A device whose generator is replaced beside the CPU's.
    """

    def __init__(self, seed: int, index: int, device: torch.device) -> None:
        self.devices = [device] if device.type == "cuda" else []
        mixed = (seed ^ (index * 0x9E3779B97F4A7C15)) & (2**63 - 1)
        self.states = [torch.Generator(d).manual_seed(mixed).get_state() for d in self._all()]

    def _all(self) -> list[torch.device]:
        return [torch.device("cpu"), *self.devices]

    def _read(self) -> list[Tensor]:
        return [torch.get_rng_state(), *(torch.cuda.get_rng_state(d) for d in self.devices)]

    def _write(self, states: list[Tensor]) -> None:
        torch.set_rng_state(states[0])
        for device, state in zip(self.devices, states[1:], strict=True):
            torch.cuda.set_rng_state(state, device)

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Draw from this stream."""
        outside = self._read()
        self._write(self.states)
        try:
            yield
        finally:
            self.states = self._read()
            self._write(outside)


class Block:
    """Chains that run as one batch, with a stream of their own and rows not yet handed on."""

    def __init__(self, stream: Stream, state: Any, width: int) -> None:
        self.stream, self.state = stream, state
        like = state.energy
        # No chain is farther ahead of the slowest than a chunk.
        self.chunk = min(ROWS, max(1, LARGE // (len(like) * width)))
        self.rows = like.new_zeros(2 * self.chunk, len(like), width)
        self.counts = torch.zeros(len(like), dtype=torch.long, device=like.device)
        self.tree: Tree | None = None
        self.uniforms: Tensor | None = None
        self.used = 0

    def ahead(self, like: Tensor) -> Tensor:
        """Return uniform random numbers, ``(n, 3, chains)``; ``used`` of them are spent."""
        if self.uniforms is None or self.used == LOOKAHEAD:
            self.uniforms, self.used = torch.rand(LOOKAHEAD, 3, len(like)).to(like), 0
        return self.uniforms

    def parts(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {
            "stream": self.stream.states,
            "state": listed(self.state),
            "rows": self.rows,
            "counts": self.counts,
            "tree": None if self.tree is None else list(self.tree),
            "uniforms": self.uniforms,
            "used": self.used,
        }

    def restore(self, parts: dict[str, Any]) -> None:
        """From a checkpoint."""
        self.stream.states = parts["stream"]
        self.state = relisted(self.state, parts["state"])
        self.rows, self.counts = parts["rows"], parts["counts"]
        self.tree = None if parts["tree"] is None else Tree(*parts["tree"])
        self.uniforms, self.used = parts["uniforms"], parts["used"]

    def take(self, num: int) -> Tensor:
        """Hand on the first ``num`` rows of each chain."""
        taken = self.rows[:num].transpose(0, 1).contiguous()
        if int(self.counts.max()) > num:
            self.rows = torch.roll(self.rows, -num, 0)
        self.counts = self.counts - num
        return taken


def _row(q: Tensor, info: Any, extra: tuple[str, ...] = ()) -> Tensor:
    """Join positions and records: ``(C, D + stats)``."""
    stats = [
        -info.energy,
        info.hamiltonian,
        info.accept_prob,
        info.step_size,
        info.num_steps,
        info.diverging,
        info.invalid,
        info.unbounded,
        *(getattr(info, name) for name in extra),
    ]
    return torch.cat([q, torch.stack([s.to(q.dtype) for s in stats], -1)], -1)


def _tree_row(q: Tensor, info: Any) -> Tensor:
    return _row(q, info, TREE_STATS)


class Hamiltonian(NamedTuple):
    """Moves by HMC: all chains make the same number of steps, drawn anew at each move."""

    num_steps: int | None = None  # fixed, else adapted
    jitter: float = 0.2
    step_jitter: float = 0.2
    extra: tuple[str, ...] = ()

    def start(self, engine: Engine, z: Tensor, adapted: Adapted) -> State:
        """Evaluate chains at their positions."""
        return start_with(engine, z)

    def steps(self, adapted: Adapted) -> int:
        """Draw a number of leapfrog steps."""
        num = self.num_steps or adapted.num_steps
        if not self.jitter:
            return num
        share = 1.0 + self.jitter * (2.0 * torch.rand((), device="cpu").item() - 1.0)
        return max(1, round(num * share))

    def _throw(self, state: State, adapted: Adapted) -> tuple[Tensor, Tensor]:
        """Draw momenta and step sizes."""
        momentum = adapted.metric.momentum(state.position)
        size = adapted.step_size.to(state.energy).expand(state.energy.shape)
        return momentum, jittered(size, self.step_jitter)

    def step(self, engine: Engine, state: State, adapted: Adapted) -> tuple[State, Any]:
        """Move all chains once."""
        num, (momentum, size) = self.steps(adapted), self._throw(state, adapted)
        phase = (state.position, momentum, state.grad)
        q, p, grad, value = engine.integrate(adapted.metric, phase, size.unsqueeze(-1), num)
        return settle(adapted.metric, state, momentum, State(q, value, grad), p, (size, num))

    def explore(
        self, engine: Engine, state: State, adapted: Adapted, length: Length
    ) -> tuple[State, Any, list]:
        """Move all chains once, and look at their trajectories at several stages."""
        metric = adapted.metric
        momentum, size = self._throw(state, adapted)
        q, p, grad = state.position, momentum, state.grad
        before = state.energy + kinetic(metric, momentum, state.energy)
        at, num, some = 0, adapted.num_steps, length.share(q)
        new, end = state, momentum
        seen = [(0, q[:some], torch.ones_like(before[:some]))]
        for stage in length.stages:
            step = size.unsqueeze(-1)
            q, p, grad, value = engine.integrate(metric, (q, p, grad), step, stage - at)
            at = stage
            error = value + kinetic(metric, p, value) - before
            accept = (-error).nan_to_num(-torch.inf).clamp(max=0.0).exp()
            seen.append((stage, q[:some].clone(), accept[:some]))
            if stage == num:
                new, end = State(q, value, grad), p
        return *settle(metric, state, momentum, new, end, (size, num)), seen

    def fill(self, engine: Engine, block: Block, adapted: Adapted, num: int) -> None:
        """Draw until each chain has ``num`` rows."""
        size = adapted.step_size.to(block.state.energy)
        for i in range(int(block.counts[0]), num):
            setting = size, self.step_jitter, self.steps(adapted)
            noise = torch.randn_like(block.state.position)
            chance = Chance(noise, *torch.rand(2, len(noise), device=noise.device).to(noise))
            drawn = engine.draw(_row, adapted.metric, block.state, chance, setting)
            block.state, block.rows[i] = drawn
            block.counts = block.counts + 1


class NoUTurn(NamedTuple):
    """Moves by NUTS: in warm-up all chains draw together, later each on its own."""

    max_tree_depth: int = 10
    step_jitter: float = 0.1
    extra: tuple[str, ...] = TREE_STATS

    def start(self, engine: Engine, z: Tensor, adapted: Adapted) -> State:
        """Evaluate chains at their positions."""
        return start_with(engine, z)

    def _luck(self, tree: Tree, ready: Tensor, u: Tensor, first: int, adapted: Adapted) -> Luck:
        """Draw random numbers for trees that start."""
        like, size = tree.moving[0], adapted.step_size.to(tree.step)
        if not bool(ready.any()):
            none = tree.step
            return Luck(False, ready, like, none, none, u, first, size, self.step_jitter)
        noise = torch.randn_like(like)
        jitter, coin = torch.rand(2, len(like), device=like.device).to(like)
        return Luck(True, ready, noise, jitter, coin, u, first, size, self.step_jitter)

    def step(self, engine: Engine, state: State, adapted: Adapted) -> tuple[State, Any]:
        """Draw from all chains once; those with short trees wait."""
        tables = tuple(t.to(state.energy.device) for t in levels(self.max_tree_depth))
        tree = plant(state, self.max_tree_depth)
        ready, first, u = tree.finished, LOOKAHEAD, state.energy
        while bool(ready.any()) or not bool(tree.finished.all()):
            if first == LOOKAHEAD:
                u, first = torch.rand(LOOKAHEAD, 3, len(state.energy)).to(state.energy), 0
            luck = self._luck(tree, ready, u, first, adapted)
            tree, first, *_ = engine.grow(_tree_row, adapted.metric, tables, tree, luck)
            ready = torch.zeros_like(ready)
        return harvest(tree, state.position)

    def fill(self, engine: Engine, block: Block, adapted: Adapted, num: int) -> None:
        """Draw until each chain has ``num`` rows, each starting its next tree at once."""
        tables = tuple(t.to(block.counts.device) for t in levels(self.max_tree_depth))
        tree = block.tree if block.tree is not None else plant(block.state, self.max_tree_depth)
        try:
            while int(block.counts.min()) < num:
                u = block.ahead(tree.step)
                ready = tree.finished & (block.counts < block.counts.min() + block.chunk)
                luck = self._luck(tree, ready, u, block.used, adapted)
                grown = engine.grow(_tree_row, adapted.metric, tables, tree, luck)
                tree, block.used, done, rows = grown
                at = done.nonzero()[:, 0]
                block.rows[block.counts[at], at] = rows[at]
                block.counts = block.counts + done
        finally:  # an interrupted run keeps its trees
            block.tree = tree
            block.state = State(tree.proposal[0], tree.proposal_energy, tree.proposal[2])


class Record(NamedTuple):
    """The record of a move of the target's replica, each ``(C,)``; ``swap_prob`` ``(K-1, C)``."""

    energy: Tensor
    hamiltonian: Tensor
    accept_prob: Tensor
    step_size: Tensor
    num_steps: Tensor
    diverging: Tensor
    invalid: Tensor
    unbounded: Tensor
    round_trips: Tensor
    swap_prob: Tensor


class Replica(NamedTuple):
    """Moves by HMC at several temperatures, and swaps between them."""

    path: Any  # (z, beta) -> potential
    num_temperatures: int
    num_steps: int = 4
    jitter: float = 0.2
    step_jitter: float = 0.1
    keep_ladder: bool = False

    @property
    def extra(self) -> tuple[str, ...]:
        """The names of further records."""
        pairs = (f"swap_prob_{k}" for k in range(self.num_temperatures - 1))
        kept = range(self.num_temperatures if self.keep_ladder else 0)
        return ("round_trips", *pairs, *(f"ladder_{k}" for k in kept))

    def _kernel(self, adapted: Adapted) -> Kernel:
        def make(potential: Energy) -> Kernel:
            return hmc(
                potential,
                adapted.step_size.unsqueeze(-1),
                self.num_steps,
                metric=adapted.metric,
                jitter=self.jitter,
                step_jitter=self.step_jitter,
            )

        assert adapted.betas is not None
        return tempered(make, None, adapted.betas, path=self.path)

    def start(self, engine: Engine, z: Tensor, adapted: Adapted) -> TemperedState:
        """Put a replica of each chain at every temperature."""
        return self._kernel(adapted).init(z)

    def step(
        self, engine: Engine, state: TemperedState, adapted: Adapted
    ) -> tuple[TemperedState, Any]:
        """Move all replicas once and swap neighbours."""
        new, info = self._kernel(adapted).step(state)
        num = info.inner.num_steps[-1] + 1  # and one evaluation after the swaps
        engine.executed += int(num[0]) * info.inner.num_steps.numel()
        kinetic = info.inner.hamiltonian[-1] - info.inner.energy[-1]
        record = Record(
            energy=info.energy,
            hamiltonian=info.energy + kinetic,
            accept_prob=info.accept_prob,
            step_size=info.inner.step_size[-1],
            num_steps=num * self.num_temperatures,
            diverging=info.inner.diverging[-1],
            invalid=info.invalid,
            unbounded=info.inner.unbounded.any(0),
            round_trips=info.round_trips,
            swap_prob=info.swap_prob,
        )
        return new, (record, info.inner)

    def renewed(self, state: TemperedState, adapted: Adapted) -> TemperedState:
        """Evaluate the replicas at other temperatures."""
        assert adapted.betas is not None
        ladder = adapted.betas.unsqueeze(-1)
        return state._replace(inner=start(lambda z: self.path(z, ladder), state.inner.position))

    def fill(self, engine: Engine, block: Block, adapted: Adapted, num: int) -> None:
        """Draw until each chain has ``num`` rows."""
        for i in range(int(block.counts[0]), num):
            block.state, (record, _) = self.step(engine, block.state, adapted)
            row = _row(block.state.position, record, ("round_trips",))
            parts = [row, record.swap_prob.T.to(row)]
            if self.keep_ladder:
                parts.append(self._tempered_part(block.state.inner.position).T.to(row))
            block.rows[i] = torch.cat(parts, -1)
            block.counts = block.counts + 1

    def _tempered_part(self, z: Tensor) -> Tensor:
        """Return what is multiplied by the inverse temperature, at all levels ``(K, C)``."""
        with torch.no_grad():
            return self.path(z, torch.ones(())) - self.path(z, torch.zeros(()))


class Walked(NamedTuple):
    """The record of a move of :class:`Exchanging`, each ``(C,)``."""

    energy: Tensor
    hamiltonian: Tensor
    accept_prob: Tensor
    step_size: Tensor
    num_steps: Tensor
    diverging: Tensor
    invalid: Tensor
    unbounded: Tensor


class Exchanging(NamedTuple):
    """Moves by the exchange algorithm, which needs no gradient and knows no density."""

    make: Any  # Adapted -> Kernel
    extra: tuple[str, ...] = ()

    def start(self, engine: Engine, z: Tensor, adapted: Adapted) -> ExchangeState:
        """Evaluate chains at their positions."""
        return self.make(adapted).init(z)

    def step(
        self, engine: Engine, state: ExchangeState, adapted: Adapted
    ) -> tuple[ExchangeState, Walked]:
        """Move all chains once."""
        state, info = self.make(adapted).step(state)
        engine.executed += len(info.energy)
        # The joint lacks log Z, which varies: shown as log-density it would mislead.
        unknown = torch.full_like(info.energy, torch.nan)
        record = Walked(
            energy=unknown,
            hamiltonian=unknown,
            accept_prob=info.accept_prob,
            step_size=info.step_size,
            num_steps=torch.ones_like(info.invalid, dtype=torch.long),
            diverging=torch.zeros_like(info.invalid),
            invalid=info.invalid,
            unbounded=info.unbounded,
        )
        return state, record

    def fill(self, engine: Engine, block: Block, adapted: Adapted, num: int) -> None:
        """Draw until each chain has ``num`` rows."""
        for i in range(int(block.counts[0]), num):
            block.state, record = self.step(engine, block.state, adapted)
            block.rows[i] = _row(block.state.position, record)
            block.counts = block.counts + 1


def start_with(engine: Engine, z: Tensor) -> State:
    """Evaluate chains; where the energy is not finite the gradient is zero."""
    return placed(z, *engine.gradient(z))


Move = Hamiltonian | NoUTurn | Replica | Exchanging


class Chains:
    """All chains of a run: blocks of them, their engine, and what warm-up has found."""

    def __init__(self, move: Move, engine: Engine, warmup: Warmup, blocks: list[Block]) -> None:
        self.move, self.engine, self.warmup, self.blocks = move, engine, warmup, blocks

    def warm(self) -> Any:
        """Move all chains once and adapt."""
        moves = []
        adapted, length = self.warmup.adapted, self.warmup.length
        for block in self.blocks:
            before = block.state
            with block.stream.active():
                if length is not None and isinstance(self.move, Hamiltonian):
                    move = self.move.explore(self.engine, before, adapted, length)
                else:
                    move = *self.move.step(self.engine, before, adapted), []
            block.state = move[0]
            moves.append((before, *move))
        if isinstance(self.move, Replica):
            return self._warm_levels(self.move, moves)
        befores, states, infos, looks = zip(*moves, strict=True)
        info = _joined(infos)
        seen = [
            (look[0][0], torch.cat([q for _, q, _ in look]), torch.cat([a for *_, a in look]))
            for look in zip(*looks, strict=True)
        ]
        state = _joined(states)
        self.warmup.update(_joined(befores), state, info, seen)
        source = self.warmup.moves()
        if source is not None:
            sizes = [len(block.state.energy) for block in self.blocks]
            parts = zip(*(part[source].split(sizes) for part in state), strict=True)
            for block, part in zip(self.blocks, parts, strict=True):
                block.state = State(*part)
        return info

    def _warm_levels(self, move: Replica, moves: list) -> Any:
        records = [info[0] for _, _, info, _ in moves]
        positions = torch.cat([state.inner.position for _, state, _, _ in moves], 1)
        grads = torch.cat([state.inner.grad for _, state, _, _ in moves], 1)
        accept = torch.cat([info[1].accept_prob for _, _, info, _ in moves], 1)
        swaps = torch.cat([record.swap_prob for record in records], 1)
        assert isinstance(self.warmup, Ladder)
        before = self.warmup.betas
        self.warmup.update_levels(positions, grads, accept.mean(1), swaps)
        if self.warmup.betas is not before:  # energies are those of the old temperatures
            for block in self.blocks:
                block.state = move.renewed(block.state, self.warmup.adapted)
        return _joined([record._replace(swap_prob=record.swap_prob.T) for record in records])

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        blocks = [block.parts() for block in self.blocks]
        return {"warmup": self.warmup.state(), "blocks": blocks}

    def restore(self, state: dict[str, Any]) -> None:
        """From a checkpoint."""
        self.warmup.restore(state["warmup"])
        for block, parts in zip(self.blocks, state["blocks"], strict=True):
            block.restore(parts)

    @property
    def chunk(self) -> int:
        """The most draws that can be asked for at once."""
        return min(block.chunk for block in self.blocks)

    def draw(self, num: int) -> Tensor:
        """Draw ``num`` times from every chain: rows ``(C, num, D + stats)``."""
        for block in self.blocks:
            with block.stream.active():
                self.move.fill(self.engine, block, self.warmup.adapted, num)
        return torch.cat([block.take(num) for block in self.blocks])


def listed(record: Any) -> Any:
    """Turn nested records into nested lists, which need no code to be read."""
    return record if isinstance(record, Tensor) else [listed(part) for part in record]


def relisted(like: Any, parts: Any) -> Any:
    """Turn nested lists back into records."""
    if isinstance(like, Tensor):
        return parts
    return type(like)(*(relisted(a, b) for a, b in zip(like, parts, strict=True)))


def _joined(parts: Sequence[Any]) -> Any:
    """Join the records of blocks."""
    if len(parts) == 1:
        return parts[0]
    if isinstance(parts[0], Tensor):
        return torch.cat(list(parts))
    return type(parts[0])(*(_joined(list(column)) for column in zip(*parts, strict=True)))
