"""The no-U-turn sampler, iterative and batched: each chain at its own place in its own tree."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_ebm.energy import Energy, value_and_grad
from pyro_ebm.kernels.base import (
    MAX_ERROR,
    Kernel,
    Metric,
    State,
    ValueAndGrad,
    check_count,
    check_positive,
    check_share,
    flattened,
    jittered,
    leapfrog,
    start,
)


class NutsInfo(NamedTuple):
    r"""The record of a draw, each of shape ``(*chains,)``.

    ``accept_prob`` is the mean over the tree of :math:`\min(1, e^{H_0 - H})`, ``accepted``
    whether the chain moved, ``invalid`` whether NaN or minus infinity ended the tree,
    ``hamiltonian`` the total energy of the draw, ``diverging`` whether the energy error exceeded
    1000 nats, ``num_steps`` the leapfrog steps, ``tree_depth`` the doublings that were begun,
    ``reached_max_treedepth`` whether they were cut short, ``step_size`` the step used.
    ``unbounded`` marks energies of minus infinity, which no density has.
    """

    energy: Tensor
    accept_prob: Tensor
    accepted: Tensor
    invalid: Tensor
    hamiltonian: Tensor
    diverging: Tensor
    num_steps: Tensor
    tree_depth: Tensor
    reached_max_treedepth: Tensor
    step_size: Tensor
    unbounded: Tensor


class Tree(NamedTuple):
    """Chains in the middle of their trees; ``C`` chains of ``D`` components, ``M`` levels.

    Points are stacked as position, momentum and gradient, ``(3, C, D)``: the two ``ends`` of the
    trajectory ``(2, 3, C, D)`` and the ``moving`` one. ``proposal`` and ``sub_proposal`` are the
    draw so far of the tree and of the subtree that is being built, ``(3, C, D)``, with their
    ``*_energy`` and total energy error ``*_error``. ``*_weight`` are logs of summed weights,
    ``*_sum`` sums of momenta; ``saved`` are the momenta and their sums at the left ends of open
    subtrees, ``(2, M, C, D)``. ``leaf`` counts in the subtree, ``depth`` the doublings done.
    """

    ends: Tensor
    moving: Tensor
    proposal: Tensor
    proposal_energy: Tensor
    proposal_error: Tensor
    sub_proposal: Tensor
    sub_energy: Tensor
    sub_error: Tensor
    weight: Tensor
    sub_weight: Tensor
    momentum_sum: Tensor
    sub_sum: Tensor
    saved: Tensor
    depth: Tensor
    leaf: Tensor
    direction: Tensor
    start_energy: Tensor
    accept_sum: Tensor
    num_steps: Tensor
    step: Tensor
    finished: Tensor
    diverging: Tensor
    invalid: Tensor
    unbounded: Tensor


@functools.cache
def levels(max_tree_depth: int) -> tuple[Tensor, ...]:
    """Return where a leaf saves its momentum, and against which levels it is checked.

    An even leaf begins the subtrees at level ``popcount(leaf / 2)``; an odd one ends those from
    there down to one per trailing one-bit (Phan et al., 2019).

    Returns:
        Two masks of shape ``(depth, 2^depth)``: of saving, and of checking.
    """
    saving = torch.zeros(1 << max_tree_depth, max(max_tree_depth, 1), dtype=torch.bool)
    checking = saving.clone()
    for leaf in range(len(saving)):
        top = (leaf >> 1).bit_count()
        if leaf % 2 == 0:
            saving[leaf, min(top, saving.shape[1] - 1)] = True
        else:
            ending = (~leaf & (leaf + 1)).bit_length() - 1
            checking[leaf, top - ending + 1 : top + 1] = True
    return saving.T.contiguous(), checking.T.contiguous()


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1)


def turning(metric: Metric, left: Tensor, right: Tensor, total: Tensor) -> Tensor:
    """Whether a trajectory turns back: the generalised criterion, with half the ends left out."""
    velocity = metric.velocity(total - 0.5 * (left + right))
    return (_dot(left, velocity) <= 0) | (_dot(right, velocity) <= 0)


def begin(
    tree: Tree, which: Tensor, metric: Metric, fresh: Tensor, step: Tensor, u: Tensor
) -> Tree:
    """Start new trees where ``which``, from the proposals of the old.

    Args:
        tree: The trees.
        which: Which of the chains, ``(C,)``.
        metric: The metric.
        fresh: Momenta, ``(C, D)``.
        step: The leapfrog steps to use, ``(C,)``.
        u: Uniform random numbers, ``(C,)``, for the first directions.
    """
    q, _, grad = tree.proposal
    point = torch.stack([q, fresh, grad])
    energy = tree.proposal_energy
    zero = torch.zeros_like(energy)
    none = torch.zeros_like(which)
    new = tree._replace(
        ends=point.expand_as(tree.ends),
        moving=point,
        proposal=point,
        proposal_error=zero,
        sub_weight=zero - torch.inf,
        weight=zero,
        momentum_sum=fresh,
        sub_sum=torch.zeros_like(fresh),
        depth=torch.zeros_like(tree.depth),
        leaf=torch.zeros_like(tree.leaf),
        direction=torch.where(u < 0.5, 1.0, -1.0).to(fresh),
        start_energy=energy + 0.5 * _dot(fresh, metric.velocity(fresh)),
        accept_sum=zero,
        num_steps=torch.zeros_like(tree.num_steps),
        step=step,
        finished=none,
        diverging=none,
        invalid=none,
        unbounded=none,
    )
    return select(which, new, tree)


def select(which: Tensor, new: Any, old: Any) -> Any:
    """Take the parts of ``new`` where ``which``, those of ``old`` elsewhere."""

    def pick(a: Tensor, b: Tensor) -> Tensor:
        if a is b:
            return a
        return torch.where(which if a.dim() == 1 else which.unsqueeze(-1), a, b)

    return type(old)(*map(pick, new, old))


def advance(
    gradient: ValueAndGrad, metric: Metric, tables: tuple[Tensor, ...], tree: Tree, u: Tensor
) -> Tree:
    """Make one leapfrog step in every tree that is not finished.

    Args:
        gradient: Maps positions ``(C, D)`` to potentials and gradients.
        metric: The metric.
        tables: The masks of :func:`levels`.
        tree: The trees.
        u: Uniform random numbers, ``(3, C)``.
    """
    step = (tree.step * tree.direction).unsqueeze(-1)
    q, p, grad, energy = leapfrog(gradient, metric, tuple(tree.moving), step)
    moving = torch.stack([q, p, grad])
    motion = 0.5 * _dot(p, metric.velocity(p))
    error = energy + motion - tree.start_energy
    invalid = energy.isnan() | (energy == -torch.inf) | error.isnan()
    error = torch.where(invalid, torch.inf, error)

    # The subtree takes the new leaf in with the probability of its weight.
    sub_weight = torch.logaddexp(tree.sub_weight, -error)
    take = u[0].log() < -error - sub_weight
    wide = take.unsqueeze(-1)
    sub_proposal = torch.where(wide, moving, tree.sub_proposal)
    sub_energy = torch.where(take, energy, tree.sub_energy)
    sub_error = torch.where(take, error, tree.sub_error)
    sub_sum = tree.sub_sum + p

    # Subtrees that this leaf ends are checked for turns, those that it begins are remembered.
    saving, checking = (table[:, tree.leaf] for table in tables)  # shape: (M, C)
    here = torch.stack([p, sub_sum]).unsqueeze(1)
    saved = torch.where(saving.unsqueeze(-1), here, tree.saved)
    turned = turning(metric, saved[0], p, sub_sum - saved[1] + saved[0])
    turned = (turned & checking).any(0)

    wall = error == torch.inf
    stopped = turned | wall | (error > MAX_ERROR)
    size = torch.ones_like(tree.leaf) << tree.depth
    whole = (tree.leaf + 1 == size) & ~stopped

    # A whole subtree joins the tree, which then goes on at either end.
    forward = (tree.direction > 0).unsqueeze(-1)
    ends = torch.stack(
        [torch.where(forward, tree.ends[0], moving), torch.where(forward, moving, tree.ends[1])]
    )
    total = tree.momentum_sum + sub_sum
    done = whole & turning(metric, ends[0, 1], ends[1, 1], total)
    depth = tree.depth + whole
    done = done | (whole & (depth == saved.shape[1]))
    merge = whole & (u[1].log() < sub_weight - tree.weight)
    forward = torch.where(whole, u[2] < 0.5, tree.direction > 0)
    new_end = torch.where(forward.unsqueeze(-1), ends[1], ends[0])
    joined = whole.unsqueeze(-1)
    new = Tree(
        ends=torch.where(joined, ends, tree.ends),
        moving=torch.where(joined, new_end, moving),
        proposal=torch.where(merge.unsqueeze(-1), sub_proposal, tree.proposal),
        proposal_energy=torch.where(merge, sub_energy, tree.proposal_energy),
        proposal_error=torch.where(merge, sub_error, tree.proposal_error),
        sub_proposal=sub_proposal,
        sub_energy=sub_energy,
        sub_error=sub_error,
        weight=torch.where(whole, torch.logaddexp(tree.weight, sub_weight), tree.weight),
        sub_weight=torch.where(whole, -torch.inf, sub_weight),
        momentum_sum=torch.where(joined, total, tree.momentum_sum),
        sub_sum=torch.where(joined, 0.0, sub_sum),
        saved=saved,
        depth=depth,
        leaf=torch.where(whole, 0, tree.leaf + 1),
        direction=forward.to(p.dtype) * 2.0 - 1.0,
        start_energy=tree.start_energy,
        accept_sum=tree.accept_sum + (-error).clamp(max=0.0).exp(),
        num_steps=tree.num_steps + 1,
        step=tree.step,
        finished=stopped | done,
        diverging=invalid | ((error > MAX_ERROR) & ~(wall & motion.isfinite())),
        invalid=invalid,
        unbounded=energy == -torch.inf,
    )
    return select(~tree.finished, new, tree)


def plant(state: State, max_tree_depth: int) -> Tree:
    """Make finished trees of chains, whose proposals are where they stand."""
    q, energy, grad = state
    point = torch.stack([q, torch.zeros_like(q), grad])
    zero, none = torch.zeros_like(energy), torch.zeros_like(energy, dtype=torch.long)
    no = none.bool()
    saved = q.new_zeros(2, max(max_tree_depth, 1), *q.shape)
    return Tree(
        ends=torch.stack([point, point]),
        moving=point,
        proposal=point,
        proposal_energy=energy,
        proposal_error=zero,
        sub_proposal=point,
        sub_energy=energy,
        sub_error=zero,
        weight=zero,
        sub_weight=zero,
        momentum_sum=torch.zeros_like(q),
        sub_sum=torch.zeros_like(q),
        saved=saved,
        depth=none,
        leaf=none,
        direction=zero + 1.0,
        start_energy=energy,
        accept_sum=zero,
        num_steps=none,
        step=zero,
        finished=~no,
        diverging=no,
        invalid=no,
        unbounded=no,
    )


def harvest(tree: Tree, old: Tensor) -> tuple[State, NutsInfo]:
    """Read draws and records off trees, where they are finished.

    Args:
        tree: The trees.
        old: The positions from which they started.
    """
    moved = (tree.proposal[0] != old).any(-1)
    cut = ~tree.diverging & (tree.depth == tree.saved.shape[1])
    record = NutsInfo(
        energy=tree.proposal_energy,
        accept_prob=tree.accept_sum / tree.num_steps.clamp(min=1),
        accepted=moved,
        invalid=tree.invalid,
        hamiltonian=tree.start_energy + tree.proposal_error,
        diverging=tree.diverging,
        num_steps=tree.num_steps,
        tree_depth=torch.where(cut, tree.depth, tree.depth + (tree.leaf > 0)),
        reached_max_treedepth=cut,
        step_size=tree.step,
        unbounded=tree.unbounded,
    )
    return State(tree.proposal[0], tree.proposal_energy, tree.proposal[2]), record


def nuts(
    energy: Energy,
    step_size: float | Tensor,
    *,
    metric: Metric | None = None,
    max_tree_depth: int = 10,
    step_jitter: float = 0.0,
) -> Kernel:
    r"""The no-U-turn sampler, with multinomial sampling from its trajectories.

    A trajectory is doubled, forwards or backwards, until it turns back on itself; a draw is one
    of its points, with probability proportional to :math:`e^{-H}`, the last half preferred. All
    chains advance together, one leapfrog step at a time; a step of this kernel ends with the
    longest tree. :class:`pyro_ebm.MCMC` lets chains that are done start their next draw at once.

    Args:
        energy: The potential :math:`U`, ``(*chains, *event)`` to ``(*chains,)``.
        step_size: The leapfrog step :math:`\epsilon`: a number, or one per chain.
        metric: ``Diagonal(inverse_mass)`` or ``Dense.of(inverse_mass)``; by default the identity.
        max_tree_depth: The most doublings, at least 1.
        step_jitter: Each chain's step at each draw is :math:`\epsilon (1 + j v)`, v uniform
            between -1 and 1.

    Returns:
        The kernel; its records are :class:`~pyro_ebm.kernels.NutsInfo`.

    Raises:
        ValueError: If an argument is out of its range.

    References:
        | The No-U-Turn Sampler (Hoffman and Gelman, 2014)
        | https://arxiv.org/abs/1111.4246
        | A Conceptual Introduction to Hamiltonian Monte Carlo (Betancourt, 2017)
        | https://arxiv.org/abs/1701.02434
        | Composable Effects for Flexible and Accelerated Probabilistic Programming in NumPyro
          (Phan, Pradhan and Jankowiak, 2019): the iterative form
        | https://arxiv.org/abs/1912.11554

    Example:
        >>> kernel = nuts(lambda x: 0.5 * x.square().sum(-1), 0.5)
        >>> state, info = kernel.step(kernel.init(torch.zeros(4, 2)))
        >>> state.position.shape, bool((info.num_steps >= 1).all())
        (torch.Size([4, 2]), True)
    """
    check_positive("step_size", step_size)
    check_count("max_tree_depth", max_tree_depth, 1, 20)
    check_share("step_jitter", step_jitter)

    def step(state: State) -> tuple[State, NutsInfo]:
        chains, shape = state.energy.shape, state.position.shape
        num = state.energy.numel()

        def gradient(x: Tensor) -> tuple[Tensor, Tensor]:
            value, grad = value_and_grad(energy, x.reshape(shape))
            return value.reshape(num), grad.reshape(num, -1)

        flat = State(
            state.position.reshape(num, -1), state.energy.reshape(num), state.grad.reshape(num, -1)
        )
        size = torch.as_tensor(step_size, dtype=flat.energy.dtype, device=flat.energy.device)
        size = jittered(size.expand(chains).reshape(num), step_jitter)
        flat_metric = flattened(metric, flat.position)
        tables = tuple(t.to(size.device) for t in levels(max_tree_depth))
        tree = plant(flat, max_tree_depth)
        tree = begin(
            tree,
            tree.finished,
            flat_metric,
            flat_metric.momentum(flat.position),
            size,
            torch.rand_like(size),
        )
        while not tree.finished.all():
            u = torch.rand(3, num, dtype=size.dtype, device=size.device)
            tree = advance(gradient, flat_metric, tables, tree, u)
        new, info = harvest(tree, flat.position)
        new = State(
            new.position.reshape(shape), new.energy.reshape(chains), new.grad.reshape(shape)
        )
        return new, NutsInfo(*(part.reshape(chains) for part in info))

    return Kernel(functools.partial(start, energy), step)
