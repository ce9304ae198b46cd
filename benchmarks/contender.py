"""What a contender is asked, what it hands back, and how its time is taken."""

import os
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

EXTRA = "pip install pyro-ebm[bench]"


class Job(NamedTuple):
    """What is asked of a contender; `inits` has shape `(chains, dim)`."""

    chains: int
    draws: int
    warmup: int
    inits: np.ndarray


class Record(NamedTuple):
    """What a contender hands back; `x` has shape `(chains, draws, dim)`.

    Gradients are summed over chains. Executed ones include those of chains that wait in lockstep.
    """

    x: np.ndarray
    seconds: dict[str, float]  # compile, warmup, sampling
    cpu_seconds: float  # of everything, compilation left out where it happened before
    gradients: dict[str, float]  # warmup, sampling, executed
    adapted: dict[str, float] = {}
    note: str = ""


class Clock:
    """Wall seconds of named phases, and CPU seconds of the process over all of them."""

    def __init__(self):
        self.seconds = {"compile": 0.0, "warmup": 0.0, "sampling": 0.0}
        self.cpu_start = time.process_time()
        self.start = time.perf_counter()

    def lap(self, phase):
        now = time.perf_counter()
        self.seconds[phase] += now - self.start
        self.start = now

    def cpu(self):
        return time.process_time() - self.cpu_start


def need(module):
    """Import a module by name, or say which extra brings it."""
    import importlib

    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{module} is missing: {EXTRA}") from error


class Peer(NamedTuple):
    """A contender and the numbers of chains that it is run with."""

    prepare: Callable[[Any, Job], Callable[[int], Record]]
    most_chains: int
