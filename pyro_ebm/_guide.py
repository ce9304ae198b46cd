"""Draws of a distribution or of a Pyro guide, in rows, with their log-densities."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.poutine.runtime import _DIM_ALLOCATOR, _PYRO_STACK
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_ebm.distribution import Flat, GibbsBoltzmann
from pyro_ebm.energy import Given
from pyro_ebm.flat import innermost, is_normalized


class Draws(NamedTuple):
    """Draws in rows, and their log-densities."""

    x: Tensor  # shape: (n, *batch, *event), the batch perhaps of ones
    log_q: Tensor  # shape: (n, *batch)
    reparametrized: bool


class Proposal:
    """A normalised distribution or a Pyro guide to draw from; the base of what is asked, if None.

    A guide is called with the given parts of the energy. Common numbers are the same at every
    draw: those of a base and of a guide of no batch are shared by all batch elements too.
    """

    def __init__(self, q: Any, site: str, common: bool) -> None:
        if not (q is None or callable(q) or hasattr(q, "log_prob")):
            raise TypeError(f"a proposal must be a distribution or a guide, got {q!r}")
        self.q, self.site, self.common = q, site, common
        self._seed: int | None = None
        self._made = False  # autoguides look at their model when first run

    @property
    def is_distribution(self) -> bool:
        """Whether it has a density without being run."""
        return self.q is None or hasattr(self.q, "log_prob")

    def draw(self, d: GibbsBoltzmann, num: int) -> Draws:
        """Draw points for a distribution, differentiably where they are reparametrised."""
        if not self.is_distribution:
            return self._draw_traced(d, num)
        q = self.q
        if q is None:  # draws of each batch element, or in common
            q = d._own_base if self.common else d.base
        if q.event_shape != d.event_shape or not _broadcasts(q.batch_shape, d.batch_shape):
            raise ValueError(
                f"proposal must have the event shape {tuple(d.event_shape)} and a batch that "
                f"broadcasts to {tuple(d.batch_shape)}, got {tuple(q.event_shape)} and "
                f"{tuple(q.batch_shape)}"
            )
        if not is_normalized(q):
            raise ValueError(
                "proposal must be normalised, got a distribution without log_partition"
            )
        with self._numbers(d):
            x = (q.rsample if q.has_rsample else q.sample)((num,))
        ones = len(d.batch_shape) - (x.dim() - 1 - d.event_dim)
        x = x.reshape(len(x), *[1] * ones, *x.shape[1:])
        return Draws(x, self._log_prob(q, x, d), q.has_rsample)

    def _log_prob(self, q: Any, x: Tensor, d: GibbsBoltzmann) -> Tensor:
        if not isinstance(q, Flat):
            return q.log_prob(x)
        if not math.isfinite(q.log_volume):
            raise ValueError(
                "proposal must be given where the base is Flat on an infinite volume, got "
                f"{'None' if self.q is None else 'such a one'}"
            )
        return torch.full(x.shape[: x.dim() - d.event_dim], -q.log_volume).to(d.floating())

    def _draw_traced(self, d: GibbsBoltzmann, num: int) -> Draws:
        trace = self.trace(d, num)
        trace.compute_log_prob()
        sites = {
            name: site
            for name, site in trace.nodes.items()
            if site["type"] == "sample" and not site["is_observed"] and not site_is_subsample(site)
        }
        self._check_sites(sites, d)
        log_q = sum(site["unscaled_log_prob"] for site in sites.values())
        through = all(site["fn"].has_rsample for site in sites.values())
        if self.common and not through and any(given(d)):
            raise ValueError(
                "common_random_numbers needs reparametrised draws of a guide that is called with "
                f"given parts, with which those of {[*sites]} would jump: pass a distribution "
                "where they do not depend on them"
            )
        return Draws(sites[self.site]["value"], log_q, through)

    def trace(self, d: GibbsBoltzmann, num: int | None = None) -> Trace:
        """Run the guide, ``num`` times at once, out of sight of a model that is running."""
        parts, named = given(d)
        with contextlib.ExitStack() as stack:
            stack.enter_context(_apart())
            if not self._made:
                self.q(*parts, **named)
                self._made = True
            if num is not None:
                stack.enter_context(self._numbers(d))
                dim = -len(d.batch_shape) - 1
                stack.enter_context(pyro.plate("_particles", num, dim=dim))
            trace = poutine.trace(self.q).get_trace(*parts, **named)
        for name, site in trace.nodes.items():
            if site["type"] == "param" and _PYRO_STACK:
                pyro.param(name)  # so that the model's optimiser hears of it
        return trace

    def _check_sites(self, sites: dict[str, Any], d: GibbsBoltzmann) -> None:
        """Refuse a guide whose sites do not add up to a density of the one asked for."""
        if self.site not in sites:
            raise ValueError(f"site must be one of the guide's, {[*sites]}, got {self.site!r}")
        auxiliary = [n for n, s in sites.items() if s["infer"].get("is_auxiliary")]
        others = [n for n in sites if n not in auxiliary and n != self.site]
        if others:
            raise ValueError(
                f"guide must draw nothing but {self.site!r} and its auxiliary sites, got {others}"
            )
        if not auxiliary and type(sites[self.site]["fn"]).__name__ == "Delta":
            raise ValueError("guide must have a density, got a point (a Delta, as of AutoDelta)")
        free = [n for n, s in sites.items() if _is_flat(s["fn"]) or not is_normalized(s["fn"])]
        if free:
            raise ValueError(
                f"guide must draw from normalised distributions, got others at {free}"
            )
        x = sites[self.site]["value"]
        batch = x.shape[: x.dim() - d.event_dim]
        alone = all(s["unscaled_log_prob"].shape == batch for s in sites.values())
        fits = len(batch) == 1 + len(d.batch_shape) and _broadcasts(batch[1:], d.batch_shape)
        if not (alone and fits):
            shapes = {n: tuple(s["unscaled_log_prob"].shape[1:]) for n, s in sites.items()}
            raise ValueError(
                "guide must draw batch elements on their own, of a batch shape that broadcasts to "
                f"{tuple(d.batch_shape)}, got sites of batch shapes {shapes}"
            )

    @contextlib.contextmanager
    def _numbers(self, d: GibbsBoltzmann) -> Iterator[None]:
        """Draw the same numbers every time inside, where they are common."""
        if not self.common:
            yield
            return
        if self._seed is None:
            self._seed = int(torch.randint(1 << 62, ()))
        device = d.floating().device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(self._seed)
            yield


def given(d: GibbsBoltzmann) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the given parts of an energy, with which a guide is called."""
    if not isinstance(d.energy, Given):
        return (), {}
    return tuple(part for part in d.energy.given if part is not ...), d.energy.named


def _broadcasts(shape: torch.Size, whole: torch.Size) -> bool:
    pairs = zip(reversed(shape), reversed(whole), strict=False)
    return len(shape) <= len(whole) and all(n in (1, m) for n, m in pairs)


def _is_flat(q: Any) -> bool:
    """Whether a distribution is flat, of a density of one, on a volume that is another."""
    return isinstance(innermost(q), Flat) and innermost(q).log_volume != 0.0


@contextlib.contextmanager
def _apart() -> Iterator[None]:
    """Hide the handlers and plates of a model that is running from what runs inside."""
    handlers, dims = [*_PYRO_STACK], [*_DIM_ALLOCATOR._stack]
    _PYRO_STACK.clear()
    _DIM_ALLOCATOR._stack.clear()
    try:
        yield
    finally:
        _PYRO_STACK[:], _DIM_ALLOCATOR._stack[:] = handlers, dims
