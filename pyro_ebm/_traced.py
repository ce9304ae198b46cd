"""Kernels as tensor operations that are traced once, while the parameters go on changing."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from pyro_ebm._engine import operations
from pyro_ebm.energy import Energy
from pyro_ebm.kernels.base import Kernel


class Traced:
    """Traced kernels, one per shape of points and step: no Python between their operations.

    They read parameters where these are, as optimisers write them. Energies are compared with
    eager ones whenever chains start; where they differ, for another reason than tensors changed
    in place, the kernel is traced again, once. ``reason`` says why kernels are eager, if so.
    """

    def __init__(self) -> None:
        self.reason = ""
        self._kernels: dict[Any, Kernel] = {}
        self._steps: dict[Any, Tensor] = {}
        self._again: set[Any] = set()

    def kernel(self, make: Callable[[Tensor], Kernel], energy: Energy, step: Tensor) -> Kernel:
        """Return the kernel that ``make`` makes of a step."""
        eager, own = make(step), _kind(step)
        # Kernels look at their step as they are made, so that it cannot be an input of a trace.
        buffer = self._steps.setdefault(own, step.clone()).copy_(step)

        def init(x: Tensor) -> Any:
            key = (own, _kind(x))
            while not self.reason:
                if key in self._kernels:
                    state = self._kernels[key].init(x)
                    if _same(state.energy, energy(x)):
                        return state
                    if key in self._again:
                        self._refuse("its energies change by more than tensors in place")
                        break
                    self._again.add(key)
                self._trace(key, make, buffer, x)
            return eager.init(x)

        def move(state: Any) -> Any:
            found = None if self.reason else self._kernels.get((own, _kind(state.position)))
            return (found or eager).step(state)

        return Kernel(init, move)

    def _trace(
        self, key: Any, make: Callable[[Tensor], Kernel], buffer: Tensor, x: Tensor
    ) -> None:
        """Trace a kernel, and compare a move with an eager one, at two steps."""
        before, kernel = buffer.clone(), make(buffer)
        devices = [x.device] if x.is_cuda else []
        try:
            with torch.random.fork_rng(devices):
                traced = Kernel(_graph(kernel.init, x), _graph(kernel.step, kernel.init(x)))
            for share in (1.0, 0.5):
                fresh, moved = make(buffer.mul_(share).clone()), []
                for each in (traced, fresh):
                    with torch.random.fork_rng(devices):
                        moved.append(tree_flatten(each.step(each.init(x)))[0])
                if not all(map(_same, *moved)):
                    self._refuse("its trace does not move chains as it does")
                    return
            self._kernels[key] = traced
        except Exception as error:
            self._refuse(f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
        finally:
            buffer.copy_(before)

    def _refuse(self, reason: str) -> None:
        self.reason = reason
        warnings.warn(f"backend='traced' runs eagerly: {reason}", stacklevel=8)


def traced(backend: str) -> Traced | None:
    """Return what a back end needs.

    Raises:
        ValueError: If there is no such back end.
    """
    if backend not in ("eager", "traced"):
        raise ValueError(f"backend must be 'eager' or 'traced', got {backend!r}")
    return Traced() if backend == "traced" else None


def _kind(x: Tensor) -> tuple[Any, ...]:
    return x.shape, x.dtype, x.device


def _graph(function: Callable[[Any], Any], part: Any) -> Callable[[Any], Any]:
    """Trace a function of a record of tensors to one; parameters stay where they are."""
    flat, given = tree_flatten(part)
    _, made = tree_flatten(function(part))

    def plain(*flat: Tensor) -> tuple[Any, ...]:
        return tuple(tree_flatten(function(tree_unflatten(flat, given)))[0])

    graph: Callable[..., Any] = operations(plain, flat)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated, and the only interpreter
        with contextlib.suppress(RuntimeError):  # of operations that it lacks, as conv backward
            graph = torch.jit.trace(graph, tuple(flat), check_trace=False)

    def run(part: Any) -> Any:
        return tree_unflatten(graph(*tree_flatten(part)[0]), made)

    return run


def _same(a: Any, b: Any) -> bool:
    """Whether tensors agree up to rounding."""
    if not (isinstance(a, Tensor) and a.is_floating_point()):
        return bool(torch.as_tensor(a == b).all())
    small = 1e3 * torch.finfo(a.dtype).eps
    scale = b.masked_fill(~b.isfinite(), 0.0).abs().max() if b.numel() else 0.0
    return torch.allclose(a, b, small, small * float(scale), equal_nan=True)
