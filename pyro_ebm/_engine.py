"""Back ends: one algorithm, computed eagerly, from a trace, or compiled."""

from __future__ import annotations

import functools
import shutil
import time
import types
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_ebm._binding import python_state
from pyro_ebm.energy import Energy, value_and_grad
from pyro_ebm.kernels.base import Metric, State, jittered, leapfrog
from pyro_ebm.kernels.hmc import Chance, move, settle, trajectory
from pyro_ebm.kernels.nuts import Tree, advance, begin, harvest

Phase = tuple[Tensor, Tensor, Tensor]
Tables = tuple[Tensor, ...]
Row = Callable[[Tensor, Any], Tensor]


class Luck(NamedTuple):
    """Random numbers for trees, and which of them start.

    ``ready`` ones begin with ``noise`` ``(C, D)`` and uniform ``jitter`` and ``coin`` ``(C,)``;
    ``u`` ``(n, 3, C)`` is for steps, from row ``first`` on. ``step_size`` is jittered by a
    ``share``.
    """

    any_ready: bool
    ready: Tensor
    noise: Tensor
    jitter: Tensor
    coin: Tensor
    u: Tensor
    first: int
    step_size: Tensor
    share: float


def renewed(tree: Tree, metric: Metric, luck: Luck) -> Tree:
    """Start trees anew where they are ready."""
    size = jittered(luck.step_size, luck.share, luck.jitter)
    return begin(tree, luck.ready, metric, metric.of_noise(luck.noise), size, luck.coin)


class Eager:
    """The reference: autograd at every leapfrog step; works for every energy.

    ``executed`` counts gradients, one for each chain; ``compile_s`` the seconds of preparation.
    """

    name = "eager"

    def __init__(self, energy: Energy) -> None:
        self.energy = energy
        self.executed = 0
        self.compile_s = 0.0

    def gradient(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return potentials and gradients; a chain whose linear algebra fails gets NaN."""
        self.executed += len(x)
        return self._gradient(x)

    def _gradient(self, x: Tensor) -> tuple[Tensor, Tensor]:
        try:
            return value_and_grad(self.energy, x)
        except torch.linalg.LinAlgError:
            if len(x) == 1:
                return torch.full_like(x[:, 0], torch.nan), torch.zeros_like(x)
            values, grads = zip(*map(self._gradient, x.chunk(2)), strict=True)
            return torch.cat(values), torch.cat(grads)

    @functools.cached_property
    def _eager_trajectory(self) -> Any:
        return trajectory(self._gradient)

    def integrate(
        self, metric: Metric, phase: Phase, step: Tensor, num: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Make ``num`` leapfrog steps and return position, momentum, gradient and potential."""
        self.executed += num * len(step)
        return self._eager_trajectory(metric, phase, step, num)

    def draw(
        self, row: Row, metric: Metric, state: State, chance: Chance, setting: tuple
    ) -> tuple[State, Tensor]:
        """Make a move of HMC; return the chains and their rows of records."""
        state, info = move(self.integrate, metric, state, chance, setting)
        return state, row(state.position, info)

    def grow(
        self, row: Row, metric: Metric, tables: Tables, tree: Tree, luck: Luck
    ) -> tuple[Tree, int, Tensor, Tensor]:
        """Start trees anew where wanted, and grow all until one is finished.

        Args:
            row: Makes rows of records of positions and infos.
            metric: The metric.
            tables: The masks of :func:`pyro_ebm.kernels.nuts.levels`.
            tree: The trees; those that are finished and not started anew wait.
            luck: Which to start, and the random numbers.

        Returns:
            The trees, the row of ``luck.u`` to go on with, which are newly finished, their rows.
        """
        paused = tree.finished & ~luck.ready
        if luck.any_ready:
            tree = renewed(tree, metric, luck)
        i = luck.first
        while i < len(luck.u):
            tree = self._step(metric, tables, tree, luck.u[i])
            self.executed += len(paused)
            i += 1
            if bool((tree.finished & ~paused).any()):
                break
        state, info = harvest(tree, tree.proposal[0])
        return tree, i, tree.finished & ~paused, row(state.position, info)

    def _step(self, metric: Metric, tables: Tables, tree: Tree, u: Tensor) -> Tree:
        return advance(self._gradient, metric, tables, tree, u)


class Traced(Eager):
    """The tensor operations of a leapfrog step, traced once: no Python, no autograd, no compiler.

    A call that fails is made again by the reference, which knows what to do with it.
    """

    name = "traced"

    def __init__(self, energy: Energy) -> None:
        super().__init__(energy)
        self._graphs: dict[Any, Callable[..., Any]] = {}

    def _graph(self, key: Any, function: Callable[..., Any], parts: tuple) -> Callable[..., Any]:
        key = (key, *((p.shape, p.dtype) for p in parts))
        if key not in self._graphs:
            clock = time.perf_counter()
            self._graphs[key] = frozen(function, parts)
            self.compile_s += time.perf_counter() - clock
        return self._graphs[key]

    def _plain(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return value_and_grad(self.energy, x)

    def _gradient(self, x: Tensor) -> tuple[Tensor, Tensor]:
        try:
            graph = self._graph("gradient", self._plain, (x,))
            with torch.no_grad():
                return graph(x)
        except Exception:  # the interpreter of traces has no types of errors
            return super()._gradient(x)

    def integrate(
        self, metric: Metric, phase: Phase, step: Tensor, num: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        def kick(
            q: Tensor, p: Tensor, step: Tensor, weight: Tensor, *shape: Tensor
        ) -> tuple[Tensor, ...]:
            q = torch.addcmul(q, step, type(metric)(*shape).velocity(p))
            value, grad = self._plain(q)
            return q, torch.addcmul(p, weight, grad, value=-1.0), grad, value

        (q, p, grad), weight = phase, 0.5 * step
        try:
            graph = self._graph(("kick", type(metric)), kick, (q, p, step, weight, *metric))
            with torch.no_grad():
                p = torch.addcmul(p, weight, grad, value=-1.0)
                for i in range(num):
                    last = weight if i + 1 == num else step
                    q, p, grad, value = graph(q, p, step, last, *metric)
        except Exception:  # as above
            return super().integrate(metric, phase, step, num)
        self.executed += num * len(step)
        return q, p, grad, value

    def draw(
        self, row: Row, metric: Metric, state: State, chance: Chance, setting: tuple
    ) -> tuple[State, Tensor]:
        step_size, share, num = setting
        kind, n = type(metric), len(metric)

        def throw(step_size: Tensor, noise: Tensor, jitter: Tensor, *shape: Tensor) -> tuple:
            return kind(*shape).of_noise(noise), jittered(step_size, share, jitter)

        def finish(
            count: Tensor, accept: Tensor, size: Tensor, p0: Tensor, *rest: Tensor
        ) -> tuple:
            metric, old = kind(*rest[:n]), State(*rest[n : n + 3])
            q, p, grad, value = rest[n + 3 :]
            new = State(q, value, grad)
            state, info = settle(metric, old, p0, new, p, (size, count), accept)
            return *state, row(state.position, info)

        parts = (step_size, chance.noise, chance.jitter, *metric)
        with torch.no_grad():
            momentum, size = self._graph(("throw", kind), throw, parts)(*parts)
            end = self.integrate(
                metric, (state.position, momentum, state.grad), size.unsqueeze(-1), num
            )
            count = torch.tensor(num, device=size.device)
            parts = (count, chance.accept, size, momentum, *metric, *state, *end)
            *state, rows = self._graph(("finish", kind), finish, parts)(*parts)
        return State(*state), rows

    def _step(self, metric: Metric, tables: Tables, tree: Tree, u: Tensor) -> Tree:
        def grow(u: Tensor, *parts: Tensor) -> tuple[Tensor, ...]:
            n = len(metric)
            shape, tables, rest = parts[:n], parts[n : n + 2], parts[n + 2 :]
            return tuple(advance(self._plain, type(metric)(*shape), tables, Tree(*rest), u))

        parts = (u, *metric, *tables, *tree)
        try:
            graph = self._graph(("grow", type(metric)), grow, parts)
            with torch.no_grad():
                return Tree(*graph(*parts))
        except Exception:  # as above
            return super()._step(metric, tables, tree, u)


def operations(function: Callable[..., Any], parts: Sequence[Tensor]) -> torch.fx.GraphModule:
    """Trace a function of tensors down to their operations."""
    graph = make_fx(lambda *given: function(*given))(*parts)  # make_fx counts a method's self
    if any("_linalg_check_errors" in str(node.target) for node in graph.graph.nodes):
        raise ValueError("a trace would not see that its linear algebra fails")
    return graph


def frozen(function: Callable[..., Any], parts: tuple[Tensor, ...]) -> Callable[..., Any]:
    """Trace a function of tensors and let TorchScript interpret its operations."""
    plain = tuple(p.detach().clone() for p in parts)
    graph = operations(function, plain)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # torch.jit is deprecated, and the only interpreter
        return torch.jit.freeze(torch.jit.trace(graph, plain, check_trace=False).eval())


class Compiled(Traced):
    """Whole trajectories in one compiled graph: a loop that never comes back to Python."""

    name = "compiled"

    def _compiled(self, key: Any, make: Callable[[], Any], parts: tuple) -> Callable[..., Any]:
        key = ("compiled", key, *((p.shape, p.dtype) for p in parts))
        if key not in self._graphs:
            clock = time.perf_counter()
            cpp = parts[0].device.type == "cpu"
            function = torch.compile(
                own_code(make()), fullgraph=True, options={"cpp_wrapper": cpp}
            )
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                function(*(p.clone() for p in parts))
            self._graphs[key] = function
            self.compile_s += time.perf_counter() - clock
        return self._graphs[key]

    def _operations(self, x: Tensor) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        """The gradient as tensor operations that a compiler can take in."""
        return make_fx(lambda x: self._plain(x))(x.detach().clone())

    def integrate(
        self, metric: Metric, phase: Phase, step: Tensor, num: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        count = torch.tensor(num, device=step.device)
        parts = (count, *phase, step, *metric)
        graph = self._compiled(
            ("integrate", type(metric)),
            lambda: unpacked(looped_trajectory(self._operations(phase[0])), type(metric)),
            parts,
        )
        with torch.no_grad():
            end = graph(*parts)
        self.executed += num * len(step)
        return end

    def draw(
        self, row: Row, metric: Metric, state: State, chance: Chance, setting: tuple
    ) -> tuple[State, Tensor]:
        step_size, share, num = setting
        kind, n = type(metric), len(metric)

        def make() -> Callable[..., Any]:
            integrate = looped_trajectory(self._operations(state.position))

            def whole(num: Tensor, step_size: Tensor, *parts: Tensor) -> tuple[Tensor, ...]:
                metric, state = kind(*parts[:n]), State(*parts[n : n + 3])
                setting = step_size, share, num
                new, info = move(integrate, metric, state, Chance(*parts[n + 3 :]), setting)
                return *new, row(new.position, info)

            return whole

        count = torch.tensor(num, device=step_size.device)
        parts = (count, step_size, *metric, *state, *chance)
        graph = self._compiled(("draw", kind), make, parts)
        with torch.no_grad():
            *new, rows = graph(*parts)
        self.executed += num * len(rows)
        return State(*new), rows

    def grow(
        self, row: Row, metric: Metric, tables: Tables, tree: Tree, luck: Luck
    ) -> tuple[Tree, int, Tensor, Tensor]:
        kind, n, share = type(metric), len(metric), luck.share

        def make() -> Callable[..., Any]:
            loop = looped_advance(self._operations(tree.moving[0]), kind, n)

            def whole(first: Tensor, u: Tensor, *parts: Tensor) -> tuple[Tensor, ...]:
                ready, noise, jitter, coin, step_size = parts[:5]
                shape, tables = parts[5 : n + 5], parts[n + 5 : n + 7]
                old = Tree(*parts[n + 7 :])
                paused = old.finished & ~ready
                luck = Luck(True, ready, noise, jitter, coin, u, 0, step_size, share)
                begun = renewed(old, kind(*shape), luck)
                fresh = (t.clone(memory_format=torch.contiguous_format) for t in begun)
                i, *rest = loop(first, u, paused, *shape, *tables, *fresh)
                new = Tree(*rest)
                state, info = harvest(new, new.proposal[0])
                return i, new.finished & ~paused, row(state.position, info), *rest

            return whole

        first = torch.tensor(luck.first, device=luck.u.device)
        chances = (luck.ready, luck.noise, luck.jitter, luck.coin, luck.step_size)
        parts = distinct((first, luck.u, *chances, *metric, *tables, *tree))
        graph = self._compiled(("grow", kind), make, parts)
        with torch.no_grad():
            i, done, rows, *rest = graph(*parts)
        self.executed += (int(i) - luck.first) * len(done)
        return Tree(*rest), int(i), done, rows


def distinct(parts: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Copy tensors that occur twice or are strided: the loop takes no two names for one."""
    seen: set[int] = set()
    new = []
    for part in parts:
        copy = id(part) in seen or not part.is_contiguous() or part._is_view()
        seen.add(id(part))
        new.append(part.clone(memory_format=torch.contiguous_format) if copy else part)
    return tuple(new)


def own_code(function: Any) -> Any:
    """Give a function a code object of its own, as torch counts recompilations by it."""
    code = function.__code__.replace()
    return types.FunctionType(
        code, function.__globals__, function.__name__, None, function.__closure__
    )


def looped_trajectory(gradient: Any) -> Callable[..., Any]:
    """Make leapfrog trajectories, their number of steps a tensor, that are compiled as a loop."""
    from torch._higher_order_ops.while_loop import while_loop  # noqa: PLC0415 - private, new

    def integrate(
        metric: Metric, phase: Phase, step: Tensor, num: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        def unfinished(i: Tensor, *_: Tensor) -> Tensor:
            return i < num

        def once(i: Tensor, q: Tensor, p: Tensor, grad: Tensor, value: Tensor) -> tuple:
            q, p, grad, value = leapfrog(gradient, metric, (q, p, grad), step)
            return i + 1, q, p, grad.clone(), value.clone()

        begin = torch.zeros_like(num), *(part.clone() for part in phase), phase[0].sum(-1)
        _, q, p, grad, value = while_loop(unfinished, once, begin)
        return q, p, grad, value

    return integrate


def unpacked(integrate: Any, kind: type) -> Callable[..., Any]:
    """Let an integrator take tensors one by one."""

    def flat(num: Tensor, q: Tensor, p: Tensor, grad: Tensor, step: Tensor, *shape: Tensor) -> Any:
        return integrate(kind(*shape), (q, p, grad), step, num)

    return flat


def looped_advance(gradient: Any, kind: type, width: int) -> Callable[..., Any]:
    """Make a function that grows trees until one is finished, as one loop."""
    from torch._higher_order_ops.while_loop import while_loop  # noqa: PLC0415 - as above

    def grow(first: Tensor, u: Tensor, paused: Tensor, *parts: Tensor) -> tuple[Tensor, ...]:
        metric, tables = kind(*parts[:width]), parts[width : width + 2]

        def unfinished(i: Tensor, *tree: Tensor) -> Tensor:
            return (i < u.shape[0]) & ~(Tree(*tree).finished & ~paused).any()

        def once(i: Tensor, *tree: Tensor) -> tuple[Tensor, ...]:
            new = advance(gradient, metric, tables, Tree(*tree), u.index_select(0, i.view(1))[0])
            return i + 1, *(t.clone(memory_format=torch.contiguous_format) for t in new)

        return while_loop(unfinished, once, (first, *parts[width + 2 :]))

    return grow


def make_engine(potential: Any, backend: str, z: Tensor) -> Eager:
    """Make the engine of a back end; fall back, saying why, where the energy does not allow it.

    Args:
        potential: The potential.
        backend: ``"eager"``, ``"traced"``, ``"compiled"`` or ``"auto"``.
        z: Points to try it at, ``(C, D)``.
    """
    if backend == "eager":
        return Eager(potential.energy)
    reason = why_not(potential, z)
    if reason is None and backend == "compiled" and z.device.type == "cpu":
        found = shutil.which("g++") or shutil.which("clang++")
        reason = None if found else "there is no C++ compiler"
        if reason is not None:
            warnings.warn(f"backend='compiled' runs traced: {reason}", stacklevel=4)
            return Traced(potential.energy)
    if reason is None:
        return (Compiled if backend == "compiled" else Traced)(potential.energy)
    if backend != "auto":
        warnings.warn(f"backend={backend!r} runs eagerly: {reason}", stacklevel=4)
    return Eager(potential.energy)


def why_not(potential: Any, z: Tensor) -> str | None:
    """Say why an energy cannot be traced, if so: it must be a fixed function of tensors."""
    before = python_state(potential.owner)
    try:
        want = value_and_grad(potential.energy, z)
        if python_state(potential.owner) != before:
            return "the energy changes Python variables when it is called"
        graph = frozen(lambda x: value_and_grad(potential.energy, x), (z,))
        for x in (z, 0.5 * z.flip(0)):
            want = value_and_grad(potential.energy, x)
            with torch.no_grad():
                got = graph(x)
            if not all(map(_close, got, want)):
                return "its trace does not give the energy's values"
    except Exception as error:
        first = str(error).strip().splitlines()[:1]
        return f"{type(error).__name__}: {first[0] if first else ''}"
    return None


def _close(a: Tensor, b: Tensor) -> bool:
    scale = b[b.isfinite()].abs().max() if bool(b.isfinite().any()) else b.new_ones(())
    return torch.allclose(a, b, rtol=1e-3, atol=1e-4 * float(scale) + 1e-6, equal_nan=True)
