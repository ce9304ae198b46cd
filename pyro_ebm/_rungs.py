"""Slopes of log Z at many values of one parameter, by chains at all of them at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributions import biject_to

from pyro_ebm._potential import Batched
from pyro_ebm._short_run import first_step, unconstrained
from pyro_ebm.distribution import GibbsBoltzmann
from pyro_ebm.energy import Energy, differentiable
from pyro_ebm.flat import states_of, values_of
from pyro_ebm.kernels import Diagonal, Kernel, gibbs, hmc, tempered

NUM_STEPS = 4
"""The leapfrog steps of a move."""

ACCEPT = 0.8
"""The acceptance of moves."""


class Family:
    r"""Potentials :math:`U_\theta(x)` of one parameter, for any batch of parameters and points.

    Args:
        single: The potential of one parameter and one point.
        like: A distribution with the support and the event of all of them.
    """

    def __init__(self, single: Callable[[Tensor, Tensor], Tensor], like: GibbsBoltzmann) -> None:
        self.like, self.batched = like, Batched(single)

    def __call__(self, theta: Tensor, x: Tensor) -> Tensor:
        """Return potentials ``(*batch,)`` at ``(*batch, *event)``; parameters broadcast."""
        batch = x.shape[: x.dim() - self.like.event_dim]
        flat = x.reshape(-1, *self.like.event_shape)
        return self.batched(theta.expand(batch).reshape(-1), flat).reshape(batch)

    def slopes(self, theta: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        r"""Return :math:`\partial U / \partial\theta` and the second derivative."""
        with differentiable():
            theta = theta.expand(x.shape[: x.dim() - self.like.event_dim]).clone().requires_grad_()
            (first,) = torch.autograd.grad(self(theta, x).sum(), theta, create_graph=True)
            second = None
            if first.requires_grad:
                (second,) = torch.autograd.grad(first.sum(), theta, allow_unused=True)
        return first.detach(), torch.zeros_like(first) if second is None else second.detach()


class Rungs(NamedTuple):
    r"""What is known at nodes :math:`\theta_k`, each ``(K,)`` but the first.

    ``chains`` ``(K, C)`` are estimates of :math:`d \log Z / d\theta` by independent ladders,
    ``slope`` is their mean and ``curvature`` the second derivative. ``drift`` is by how many of
    its standard errors the slope changed from the first half of the draws to the second.
    ``value`` is log Z, where it is exact. ``x`` are some points, ``(n, *event)``.
    """

    chains: Tensor
    slope: Tensor
    curvature: Tensor
    drift: Tensor
    value: Tensor | None
    x: Tensor


def enumerate_rungs(family: Family, nodes: Tensor) -> Rungs:
    """Sum over all states at each node."""
    like = family.like
    states = states_of(like.support, like.event_shape).to(like.floating().device)
    values, slopes, curves = [], [], []
    for theta in nodes:
        log_weight = -family(theta, states)
        share = torch.softmax(log_weight, 0)
        first, second = family.slopes(theta, states)
        mean = (share * first).sum()
        values.append(log_weight.logsumexp(0))
        slopes.append(-mean)
        curves.append((share * ((first - mean).square() - second)).sum())
    slope, none = torch.stack(slopes), torch.zeros_like(nodes)
    some = states[:: max(1, len(states) // 4)]
    return Rungs(slope[:, None], slope, torch.stack(curves), none, torch.stack(values), some)


def draw_rungs(family: Family, nodes: Tensor, start: Tensor, warmup: int, num: int) -> Rungs:
    """Run ladders of chains from points ``(C, *event)``: moves at all nodes, and swaps.

    Raises:
        ValueError: If slopes are not finite, or no start is of finite energy.
    """
    ladders = _Ladders(family, nodes, start)
    ladders.warm(warmup)
    wide = nodes.unsqueeze(-1)
    first, second, x = [], [], start
    for _ in range(num):
        x = ladders.step()
        a, b = family.slopes(wide, x)
        first.append(a)
        second.append(b)
    u, v = torch.stack(first), torch.stack(second)  # shape: (T, K, C)
    bad = ~(u.isfinite() & v.isfinite())
    if bool(bad.any()):
        at = nodes[bad.flatten(2).any(-1).any(0).nonzero()[0, 0]]
        raise ValueError(
            f"energy must have finite derivatives in the parameter, got {int(bad.sum())} of "
            f"{bad.numel()} that are not, the first at {at.item():.6g}"
        )
    mean = u.mean((0, 2))
    curvature = (u - mean[:, None]).square().mean((0, 2)) - v.mean((0, 2))
    early, late = (half.mean(0) for half in u.tensor_split(2))
    change = late - early
    error = change.std(1) / change.shape[1] ** 0.5
    drift = (change.mean(1).abs() / error.clamp(min=torch.finfo(u.dtype).tiny)).nan_to_num(0.0)
    middle = x[len(nodes) // 2, :4]
    return Rungs(-u.mean(0), -mean, curvature, drift, None, middle)


class _Ladders:
    """Chains at all nodes; neighbours swap. Steps and scales are adapted at each node."""

    def __init__(self, family: Family, nodes: Tensor, start: Tensor) -> None:
        self.family, self.nodes = family, nodes
        like = family.like
        self.values = values_of(like.support)
        self.transform: Any = None if self.values is not None else biject_to(like.support)
        self.log_step = torch.zeros(len(nodes), 1).to(nodes)
        self.scale: Tensor | None = None
        z = start if self.transform is None else self.transform.inv(start)
        self.state = self._kernel().init(z)
        energy = self.state.inner.energy
        if not bool(energy.isfinite().all()):
            raise ValueError(
                "start must have finite energies at all values of the parameter, got "
                f"{int((~energy.isfinite()).sum())} of {energy.numel()} that are not"
            )
        if self.transform is not None:
            steps = first_step(self._levels, self.state.inner)
            self.log_step = steps.median(1, keepdim=True).values

    def _path(self, z: Tensor, shift: Tensor) -> Tensor:
        """The potential of the ladder: its temperatures are distances from the first node."""
        theta = self.nodes[0] + shift
        if self.transform is None:
            return self.family(theta, z)
        like = self.family.like
        return unconstrained(lambda x: self.family(theta, x), self.transform, like.event_dim)(z)

    def _levels(self, z: Tensor) -> Tensor:
        return self._path(z, (self.nodes - self.nodes[0]).unsqueeze(-1))

    def _kernel(self) -> Kernel:
        def make(energy: Energy) -> Kernel:
            if self.values is not None:
                return gibbs(energy, self.values.to(self.nodes), 2)
            metric = None if self.scale is None else Diagonal(self.scale)
            step = self.log_step.exp()
            return hmc(energy, step, NUM_STEPS, metric=metric, jitter=0.5, step_jitter=0.2)

        return tempered(make, None, self.nodes - self.nodes[0], path=self._path)

    def step(self) -> Tensor:
        """Move and swap; return the points at all nodes, ``(K, C, *event)``."""
        self.state, self.info = self._kernel().step(self.state)
        z = self.state.inner.position
        return z if self.transform is None else self.transform(z)

    def warm(self, num: int) -> None:
        """Let the chains spread out, and find their steps and scales."""
        for length in (num // 4, num // 4, num - 2 * (num // 4)):
            seen = []
            for i in range(length):
                self.step()
                seen.append(self.state.inner.position)
                accept = self.info.inner.accept_prob.mean(1, keepdim=True)
                if self.transform is not None:
                    self.log_step = self.log_step + (accept - ACCEPT) / (1.0 + i) ** 0.6
            if self.transform is not None and length == num // 4 > 1:
                self._rescale(torch.cat(seen[length // 2 :], 1))

    def _rescale(self, z: Tensor) -> None:
        """Take steps in units of the spread of each component."""
        variance = z.var(1, keepdim=True)
        usable = variance.isfinite() & (variance > 0)
        self.scale = torch.where(usable, variance, 1.0)
        self.log_step = torch.full_like(self.log_step, -0.5)
