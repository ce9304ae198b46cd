"""Slopes of log Z at many values of one parameter, by chains at all of them at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_ebm._free import Free
from pyro_ebm._potential import Batched
from pyro_ebm._replicas import Replicas
from pyro_ebm.distribution import GibbsBoltzmann
from pyro_ebm.energy import differentiable
from pyro_ebm.flat import states_of


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
    free, wide = Free(family.like), nodes.unsqueeze(-1)

    def energy(z: Tensor, shift: Tensor) -> Tensor:  # levels are distances from the first node
        return free.pull(lambda x: family(nodes[0] + shift, x))(z)

    ladders = Replicas(free, energy, nodes - nodes[0], start)
    _refuse_start(ladders.state.inner.energy)
    ladders.warm(warmup)
    first, second, x = [], [], start
    for _ in range(num):
        ladders.step()
        x = free.decode(ladders.position)
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


def _refuse_start(energy: Tensor) -> None:
    bad = ~energy.isfinite()
    if bool(bad.any()):
        raise ValueError(
            "start must have finite energies at all values of the parameter, got "
            f"{int(bad.sum())} of {bad.numel()} that are not"
        )
