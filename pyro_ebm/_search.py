"""What :func:`~pyro_ebm.minimize` searches, and how: in unconstrained space or among states."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from pyro.distributions import constraints
from pyro.distributions.torch_distribution import TorchDistributionMixin
from pyro.distributions.util import broadcast_shape
from torch import Tensor
from torch.distributions import biject_to
from torch.distributions.constraints import Constraint

from pyro_ebm._descent import (
    Code,
    Found,
    anneal,
    anneal_states,
    by_torch,
    coordinate_descent,
    descend,
    enumerate_states,
    lbfgs,
    newton,
    proximal,
    to_minimum,
)
from pyro_ebm._short_run import is_identity, unconstrained
from pyro_ebm.distribution import GibbsBoltzmann
from pyro_ebm.energy import Energy, describe, is_conditional, value_and_grad
from pyro_ebm.flat import Flat
from pyro_ebm.kernels.base import check_count, expand_like

TRIES = 20  # how often starts at which an energy is not finite are drawn anew


class Options(NamedTuple):
    """What :func:`~pyro_ebm.minimize` was asked for, checked."""

    method: str
    num_steps: int
    tolerance: float | None
    betas: Sequence[float] | None
    l1: float | Tensor
    step_size: float


class Task(NamedTuple):
    """The energy as a distribution, which checks it, and the starts ``(*rows, *event)``.

    The rows are the batch; of starts that are drawn, where there are several, ``(num, *batch)``.
    """

    d: GibbsBoltzmann
    start: Tensor
    num: int | None

    @property
    def rows(self) -> torch.Size:
        """The shape of the searches."""
        return self.start.shape[: self.start.dim() - self.d.event_dim]


def task_of(energy: Energy, start: Any, support: Constraint | None, num: int | None) -> Task:
    """Put starts and energy together: the batch is that of both."""
    if isinstance(start, TorchDistributionMixin):
        if support is not None:
            raise ValueError(f"support is that of the start {start}, got {support} besides")
        num = 1 if num is None else num
        check_count("num_starts", num, 1)
        d = GibbsBoltzmann(energy, start)
        return Task(d, _draw(d, num), num)
    if not isinstance(start, Tensor):
        raise TypeError(
            f"start must be a tensor or a Pyro distribution, got {type(start).__name__}"
        )
    if num is not None:
        raise ValueError(f"num_starts needs a distribution to draw from, got a tensor and {num}")
    support = constraints.real if support is None else support
    x = start.detach().clone()
    event_shape = x.shape[x.dim() - _event_dim(energy, x) :]
    dtype = x.dtype if x.dtype.is_floating_point else None
    d = GibbsBoltzmann(energy, Flat(event_shape, support, dtype=dtype, device=x.device))
    batch = broadcast_shape(x.shape[: x.dim() - d.event_dim], d.batch_shape)
    x = x.expand(torch.Size(batch) + event_shape)
    task = Task(d, x, None)
    outside = ~d.support.check(task.start)
    _refuse_starts(outside, f"start must lie within the support {support}", "others")
    return task


def _draw(d: GibbsBoltzmann, num: int) -> Tensor:
    return d.base.sample((num,) if num > 1 else ())


def _event_dim(energy: Energy, x: Tensor) -> int:
    """Return how many dimensions of points are the event: those that the energy takes away."""
    value = energy(x)
    if not isinstance(value, Tensor):
        raise TypeError(f"{describe(energy)} must return a tensor, got {type(value).__name__}")
    more = value.dim() if is_conditional(energy) else 0
    if more:  # given parts may bring more dimensions than the points take away: raise them above
        value = energy(x.reshape((1,) * more + x.shape))
    dims = more + x.dim() - value.dim()
    if not 0 <= dims <= x.dim():
        raise ValueError(
            f"{describe(energy)} must return one energy per point, got shape "
            f"{tuple(value.shape)} for points of shape {tuple(x.shape)}"
        )
    return dims


def run(task: Task, options: Options) -> tuple[Tensor, Found]:
    """Search; returns points ``(*rows, *event)``, and the rest of what was found."""
    if options.method == "enumerate":
        return _enumerated(task)
    return (_discrete if task.d.support.is_discrete else _continuous)(task, options)


def _fine(task: Task) -> Tensor:
    """Return starts of finite energy: those that were drawn are drawn anew where it is not."""
    x = task.start
    for _ in range(TRIES):
        value = task.d._energy_at(x)
        if value.isfinite().all():
            break
        if task.num is not None:
            x = torch.where(expand_like(~value.isfinite(), x), _draw(task.d, task.num), x)
    _refuse_starts(~value.isfinite(), "energy must be finite at the start", value)
    return x


def _refuse_starts(bad: Tensor, rule: str, got: Any) -> None:
    """Name the starts ``(*rows,)`` that break a rule, and what the first of them has."""
    if not bad.any():
        return
    where = bad.nonzero().tolist()
    rows = ", ".join(str(tuple(row)) for row in where[:5]) + ", ..." * (len(where) > 5)
    got = got[tuple(where[0])].item() if isinstance(got, Tensor) else got
    raise ValueError(f"{rule}, got {got} at {len(where)} of {bad.numel()} starts, rows {rows}")


def _continuous(task: Task, options: Options) -> tuple[Tensor, Found]:
    """Search in unconstrained space."""
    d, x = task.d, _fine(task)
    if not x.dtype.is_floating_point:
        raise TypeError(f"start must be of floating point, got {x.dtype}")
    transform = biject_to(d.support)
    wide = transform.inv(x)
    rows, shape = task.rows, wide.shape

    def back(flat: Tensor) -> Tensor:
        return transform(flat.reshape(shape))

    def energy(flat: Tensor) -> Tensor:
        return d._energy_at(back(flat)).reshape(-1)

    def potential(beta: float) -> Energy:
        pulled = unconstrained(lambda x: beta * d._energy_at(x), transform, d.event_dim)
        return lambda flat: pulled(flat.reshape(shape)).reshape(-1)

    z = wide.reshape(rows.numel(), -1)
    edge = ~z.isfinite().all(-1).reshape(rows)
    _refuse_starts(edge, f"start must lie inside the support {d.support}", "its edge")
    grad = value_and_grad(energy, z)[1].abs().sum(-1).reshape(rows)
    _refuse_starts(~grad.isfinite(), "the gradient must be finite at the start", grad)
    stopped = False
    if options.betas is not None:
        z, stopped = anneal(energy, potential, z, options.betas)
    if stopped:
        options = options._replace(num_steps=0)
    found = _descended(energy, z, options, _weights(task, options, shape))
    if stopped:
        found = found._replace(converged=torch.zeros_like(found.converged), interrupted=True)
    return back(found.position), found


def _weights(task: Task, options: Options, shape: torch.Size) -> Tensor:
    """Return the weights of the l1 part, one per component of each row."""
    l1 = torch.as_tensor(options.l1, dtype=task.start.dtype, device=task.start.device)
    if options.method in ("ista", "fista") and not is_identity(biject_to(task.d.support)):
        raise ValueError(f"l1 needs the support to be the reals, got {task.d.support}")
    if not ((l1 >= 0) & l1.isfinite()).all():
        raise ValueError(f"l1 must be at least 0 and finite, got {options.l1}")
    return l1.expand(shape).reshape(task.rows.numel(), -1)


def _descended(energy: Energy, z: Tensor, options: Options, l1: Tensor) -> Found:
    """Run the method from rows ``(n, D)``."""
    method, num = options.method, options.num_steps
    tolerance = options.tolerance or torch.finfo(z.dtype).eps ** 0.5
    if method in ("ista", "fista"):
        budget = torch.full(z.shape[:1], num, device=z.device)
        return descend(proximal(energy, l1, method == "fista"), z, tolerance, budget)
    if method in ("gd", "adam"):
        tool = torch.optim.SGD if method == "gd" else torch.optim.Adam
        search = by_torch(energy, tool, options.step_size, z)
    else:
        search = newton(energy) if method == "newton" else lbfgs(energy)
    return to_minimum(energy, search, z, tolerance, num)


def _enumerated(task: Task) -> tuple[Tensor, Found]:
    """Look at all states."""
    d, x = task.d, task.start
    best, energy, count = enumerate_states(d._energy_at, d.support, d.event_shape, x)
    zero = torch.zeros_like(energy)
    steps = torch.full_like(zero, count, dtype=torch.long)
    return best, Found(best, energy, zero, zero == 0, steps, False)


def _discrete(task: Task, options: Options) -> tuple[Tensor, Found]:
    """Search among whole numbers."""
    d, x = task.d, _fine(task)
    code = Code.of(d.support, d.event_shape, x)

    def energy(state: Tensor) -> Tensor:
        return d._energy_at(code.decode(state, x))

    state, num, stopped = code.encode(x), options.num_steps, False
    if options.betas is not None:
        state, stopped = anneal_states(energy, state, code.num_values, options.betas)
    found = coordinate_descent(energy, state, code.num_values, 0 if stopped else num)
    found = found._replace(interrupted=found.interrupted or stopped)
    return code.decode(found.position, x), found
