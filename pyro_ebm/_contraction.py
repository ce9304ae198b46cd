r"""Sums over all assignments of a factor graph, in a semiring: log-sum-exp, min, k least.

Tables are stacks ``(m, *states, B)``, of ``m`` factors in a batch of ``B`` graphs; in the
semiring of the k least they are ``(m, *states, L, B)``, with sorted lists of ``L`` up to ``k``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from pyro_ebm._elimination import Plan, Scope, Step

Rows = tuple[Tensor, Tensor]  # tables, and the place of each in the sum


class Semiring(Protocol):
    """How factors are joined and variables summed out; ``tail`` dimensions follow the states."""

    @property
    def tail(self) -> int: ...

    def join(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the product of two stacks of tables."""

    def gather(self, rows: Sequence[Rows], size: int) -> Tensor:
        """Return ``size`` tables, each the product of the rows that are placed there."""

    def reduce(self, table: Tensor) -> Tensor:
        """Sum the first variable out."""


class _Additive:
    """Joins by addition."""

    tail = 1

    def join(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b

    def gather(self, rows: Sequence[Rows], size: int) -> Tensor:
        first = rows[0][0]
        total = first.new_zeros((size, *first.shape[1:]))
        for table, places in rows:
            total = total.index_add(0, places, table)
        return total


class LogSumExp(_Additive):
    """Sums of exponentials, for log Z; tables hold minus beta times the energy."""

    def reduce(self, table: Tensor) -> Tensor:
        # Where nothing is allowed, the gradient of logsumexp is NaN.
        dead = (table.detach() == -torch.inf).all(1)
        alive = torch.where(dead.unsqueeze(1), 0.0, table).logsumexp(1)
        return torch.where(dead, -torch.inf, alive)


class MinSum(_Additive):
    """Minima of sums; tables hold the energy."""

    def reduce(self, table: Tensor) -> Tensor:
        return table.amin(1)


class Least(NamedTuple):
    """The ``k`` least sums; tables hold lists of energies."""

    k: int
    tail: int = 2

    def _trim(self, lists: Tensor) -> Tensor:
        if lists.shape[-2] == 1:
            return lists
        return lists.topk(min(self.k, lists.shape[-2]), dim=-2, largest=False).values

    def join(self, a: Tensor, b: Tensor) -> Tensor:
        return self._trim((a.unsqueeze(-2) + b.unsqueeze(-3)).flatten(-3, -2))

    def reduce(self, table: Tensor) -> Tensor:
        return self._trim(table.movedim(1, -3).flatten(-3, -2))

    def gather(self, rows: Sequence[Rows], size: int) -> Tensor:
        """Join neighbours in pairs until there is one table for each place."""
        longest = max(table.shape[-2] for table, _ in rows)
        tables = torch.cat([_lengthen(table, longest) for table, _ in rows])
        places = torch.cat([place for _, place in rows])
        places, turn = places.sort(stable=True)
        tables = tables[turn]
        while len(places) > 1 and bool((places[1:] == places[:-1]).any()):
            at = torch.arange(len(places), device=places.device)
            even = at[(at - torch.searchsorted(places, places)) % 2 == 0]
            after = (even + 1).clamp(max=len(places) - 1)
            paired = (after > even) & (places[after] == places[even])
            joined = self.join(tables[even[paired]], tables[after[paired]])
            alone = _lengthen(tables[even[~paired]], joined.shape[-2])
            turn = torch.cat([even[paired], even[~paired]]).argsort()
            tables, places = torch.cat([joined, alone])[turn], places[even]
        nothing = _lengthen(tables.new_zeros(size, *tables.shape[1:-2], 1, 1), tables.shape[-2])
        nothing = nothing.expand(size, *tables.shape[1:])
        return nothing.index_copy(0, places, tables)


def _lengthen(table: Tensor, length: int) -> Tensor:
    """Fill lists up with infinite energies."""
    missing = length - table.shape[-2]
    return torch.nn.functional.pad(table, (0, 0, 0, missing), value=torch.inf)


def _bucket(step: Step, chunks: Sequence[Tensor], nothing: Tensor, semiring: Semiring) -> Tensor:
    """Join all factors of a step's variables."""
    size, tail = len(step.variables), semiring.tail
    table = nothing.expand(size, *[1] * len(step.shape), *[1] * (tail - 1), -1)
    for dims, sources in step.parts.items():
        rows = [(chunks[source.chunk][source.rows], source.places) for source in sources]
        part = semiring.gather(rows, size)
        wide = [n if i in dims else 1 for i, n in enumerate(step.shape)]
        table = semiring.join(table, part.reshape(size, *wide, *part.shape[-tail:]))
    return table.expand(size, *step.shape, *table.shape[-tail:])


def contract(
    plan: Plan,
    inputs: Sequence[Tensor],
    semiring: Semiring,
    watch: Callable[[Tensor], Tensor] = lambda table: table,
) -> Tensor:
    """Sum all variables out.

    Args:
        plan: The plan.
        inputs: The stacks of tables that it names, at least one.
        semiring: The sum.
        watch: Sees the tables of each step, before its variables are summed out.

    Returns:
        The sum, of shape ``(B,)`` or ``(L, B)``.
    """
    chunks, nothing = list(inputs), inputs[0].new_zeros(inputs[0].shape[-1])
    for step in plan.steps:
        chunks.append(semiring.reduce(watch(_bucket(step, chunks, nothing, semiring))))
    rows = [chunks[i] if at is None else chunks[i][at] for i, at in plan.constants]
    first = [torch.zeros(len(r), dtype=torch.long, device=r.device) for r in rows]
    return semiring.gather(list(zip(rows, first, strict=True)), 1)[0]


def record(trace: list[Tensor], *, grad: bool = False) -> Callable[[Tensor], Tensor]:
    """Return a ``watch`` that keeps the tables of all steps, perhaps to differentiate in them."""

    def watch(table: Tensor) -> Tensor:
        trace.append(table.requires_grad_() if grad and not table.requires_grad else table)
        return trace[-1]

    return watch


def backtrack(
    plan: Plan, trace: Sequence[Tensor], choose: Callable[[Tensor], Tensor], num: int
) -> Tensor:
    """Give the variables values, last to first, each given its neighbours.

    Args:
        plan: The plan.
        trace: The tables of each step.
        choose: Maps tables ``(m, K, num, B)`` to values ``(m, num, B)``.
        num: The number of assignments.

    Returns:
        The values, of shape ``(n, num, B)``.
    """
    batch = trace[0].shape[-1]
    values = torch.zeros((len(plan.place), num, batch), dtype=torch.long, device=trace[0].device)
    for step, table in zip(reversed(plan.steps), reversed(trace), strict=True):
        near = values[step.near]  # shape: (m, neighbours, num, B)
        at = torch.zeros_like(values[step.variables])
        for i, states in enumerate(step.shape[1:]):
            at = at * states + near[:, i]
        rows = table.reshape(*table.shape[:2], -1, batch)
        at = at.unsqueeze(1).expand(-1, step.shape[0], -1, -1)
        values[step.variables] = choose(rows.gather(2, at))
    return values


def singles(cliques: Sequence[Tensor]) -> list[Tensor]:
    """Return the margins ``(m, K, B)`` of the variables of each step."""
    return [c.reshape(*c.shape[:2], -1, c.shape[-1]).sum(2) for c in cliques]


def is_inside(plan: Plan, scope: Scope) -> bool:
    """Whether some step has all variables of a scope in one table."""
    return any({v, *plan.near[v]}.issuperset(scope) for v in scope) or not scope


def joint(plan: Plan, cliques: Sequence[Tensor], scope: Scope) -> Tensor:
    """Return the margin ``(B, *states)`` of a scope that is inside."""
    v = next(v for v in scope if {v, *plan.near[v]}.issuperset(scope))
    step, row = plan.place[v]
    dims = [(v, *plan.near[v]).index(u) for u in scope]
    clique = cliques[step][row].movedim(-1, 0)
    rest = [d for d in range(clique.dim() - 1) if d not in dims]
    turned = clique.permute(0, *[d + 1 for d in dims], *[d + 1 for d in rest])
    return turned.reshape(*turned.shape[: len(dims) + 1], -1).sum(-1)
