"""The factors of a factor graph: where their tables come from and what they add up to."""

from __future__ import annotations

import functools
import itertools
import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

import torch
from pyro.distributions.util import broadcast_shape
from torch import Tensor, nn

from pyro_ebm._elimination import Scope
from pyro_ebm.energy import describe

Factor = Tensor | Callable[..., Tensor]
Pairs = Iterable[tuple[tuple[Hashable, ...], Factor]]
Cards = tuple[int, ...]


class Factors(nn.Module):
    """Tables and callables with their scopes, each evaluated once and stacked by its shape.

    Factor ``i`` has ``scopes[i]``, numbers of variables, and its table in row ``rows[i]`` of the
    stack ``kinds[i]``, of tables with the numbers of states ``shapes[kinds[i]]``. Factors that
    share a tensor or callable share a table; ``owners`` are the first factors of each.

    Args:
        pairs: Scopes and tables or callables, at least one.
        cardinalities: The number of states of each variable.
    """

    _states: Tensor

    def __init__(self, pairs: Pairs, cardinalities: Mapping[Any, int]) -> None:
        super().__init__()
        self.names, self.cards = list(cardinalities), list(cardinalities.values())
        scopes: list[Scope] = []
        kinds: list[int] = []
        rows: list[int] = []
        self.owners: list[int] = []
        self.numbers = {name: v for v, name in enumerate(self.names)}
        kind_of: dict[Cards, int] = {}
        known: dict[tuple[int, int], int] = {}
        count: Counter[int] = Counter()
        factors = []
        for i, (scope, factor) in enumerate(pairs):
            numbers = _numbers(scope, self.numbers)
            kind = kind_of.setdefault(tuple([self.cards[v] for v in numbers]), len(kind_of))
            row = known.setdefault((id(factor), kind), count[kind])
            if row == count[kind]:
                count[kind] += 1
                self.owners.append(i)
                factors.append(factor)
            scopes.append(numbers)
            kinds.append(kind)
            rows.append(row)
        self.scopes, self.kinds, self.rows, self.shapes = scopes, kinds, rows, list(kind_of)
        for table, factor in enumerate(factors):
            self._register(table, factor)
        self._index()

    def _register(self, table: int, factor: Factor) -> None:
        name = f"factor{table}"
        if isinstance(factor, Tensor):
            self._check(table, factor)
            if not isinstance(factor, nn.Parameter):
                self.register_buffer(name, factor)
                return
        elif not callable(factor):
            raise TypeError(
                f"{self._describe(table)} must be a tensor of energies or a callable, got "
                f"{type(factor).__name__}"
            )
        setattr(self, name, factor)

    def _index(self) -> None:
        """Note each kind's scopes and rows as tensors, for look-ups of energies."""
        states = torch.tensor(self.cards).unsqueeze(-1)
        self.register_buffer("_states", states, persistent=False)
        found: list[list[int]] = [[] for _ in self.shapes]
        for i, kind in enumerate(self.kinds):
            found[kind].append(i)
        for kind, factors in enumerate(found):
            scopes = torch.tensor([self.scopes[i] for i in factors], dtype=torch.long)
            rows = torch.tensor([self.rows[i] for i in factors])
            self.register_buffer(f"_scopes{kind}", scopes, persistent=False)
            self.register_buffer(f"_rows{kind}", rows, persistent=False)

    def _describe(self, table: int) -> str:
        """Name a table in messages."""
        return f"the factor of {show(self.names[v] for v in self.scopes[self.owners[table]])}"

    def _shape(self, table: int) -> Cards:
        return self.shapes[self.kinds[self.owners[table]]]

    def _check(self, table: int, value: object, maker: str = "") -> None:
        """Refuse what is no table for its scope."""
        what = f"{maker}{self._describe(table)}"
        cards = self._shape(table)
        if not isinstance(value, Tensor):
            raise TypeError(f"{what} must give a tensor, got {type(value).__name__}")
        if not value.dtype.is_floating_point:
            raise TypeError(f"{what} must hold real floating-point energies, got {value.dtype}")
        if value.shape[max(value.dim() - len(cards), 0) :] != cards:
            shape = ", ".join(["*graphs", *map(str, cards)])
            raise ValueError(
                f"{what} must have the shape ({shape}), an energy for each combination of "
                f"states, got {tuple(value.shape)}"
            )

    @property
    def device(self) -> torch.device:
        """Where the tables are."""
        tables = (b for name, b in self.named_buffers() if not name.startswith("_"))
        found = next(itertools.chain(self.parameters(), tables), None)
        return torch.empty(0).device if found is None else found.device

    def tables(self) -> list[Tensor]:
        """Evaluate all tables, each of shape ``(*graphs, *states)``."""
        return [self._table(table) for table in range(len(self.owners))]

    def _table(self, table: int) -> Tensor:
        factor = getattr(self, f"factor{table}")
        if isinstance(factor, Tensor):
            return factor
        axes = [torch.arange(k, device=self.device) for k in self._shape(table)]
        value = factor(*(torch.meshgrid(*axes, indexing="ij") if axes else ()))
        self._check(table, value, f"{describe(factor)}, ")
        return value

    def batch(self, tables: Sequence[Tensor]) -> torch.Size:
        """Return the batch shape of tables, that of the graphs."""
        dims = [len(cards) for cards in self.shapes]
        pairs = zip(tables, self.owners, strict=True)
        shapes = {table.shape[: table.dim() - dims[self.kinds[i]]] for table, i in pairs}
        return torch.Size(broadcast_shape((), *shapes))

    def stacks(self, tables: Sequence[Tensor], batch: torch.Size) -> list[Tensor]:
        """Stack the tables of each kind to ``(m, *states, B)``."""
        found: list[list[Tensor]] = [[] for _ in self.shapes]
        full = [batch + cards for cards in self.shapes]
        for table, i in zip(tables, self.owners, strict=True):
            kind = self.kinds[i]
            found[kind].append(table if table.shape == full[kind] else table.expand(full[kind]))
        size = math.prod(batch)
        dtype = functools.reduce(torch.promote_types, {table.dtype for table in tables})
        return [
            torch.stack(stack).to(dtype).reshape(-1, size, *cards).movedim(1, -1)
            for stack, cards in zip(found, self.shapes, strict=True)
        ]

    def check_numbers(self, stacks: Sequence[Tensor]) -> None:
        """Refuse energies that are NaN or minus infinity.

        Raises:
            ValueError: If there is one, naming its factor.
        """
        for kind, stack in enumerate(stacks):
            bad = stack.isnan() | (stack == -torch.inf)
            if bad.any():
                row = int(bad.flatten(1).any(1).nonzero()[0])
                places = [(self.kinds[i], self.rows[i]) for i in self.owners]
                raise ValueError(
                    f"{self._describe(places.index((kind, row)))} must hold energies that are "
                    f"finite or +inf, got {int(bad[row].sum())} of {bad[row].numel()} that are "
                    "NaN or -inf"
                )

    def energy(self, values: Tensor, stacks: Sequence[Tensor]) -> Tensor:
        """Add up the energies at values ``(n, B)``; infinite where one is no state."""
        states = self._states.to(values.device)
        whole = values.long()
        outside = ((whole != values) | (whole < 0) | (whole >= states)).any(0)
        whole = torch.where(outside, 0, whole)
        parts = [self._energies(kind, whole, stack) for kind, stack in enumerate(stacks)]
        return torch.where(outside, torch.inf, torch.stack(parts).sum(0))

    def _energies(self, kind: int, values: Tensor, stack: Tensor) -> Tensor:
        scopes = getattr(self, f"_scopes{kind}").to(values.device)
        at = getattr(self, f"_rows{kind}").to(values.device).unsqueeze(-1)
        for d, states in enumerate(self.shapes[kind]):
            at = at * states + values[scopes[:, d]]
        flat = stack.reshape(-1, stack.shape[-1])
        return flat.gather(0, at.expand(-1, flat.shape[-1])).sum(0)


def clamp(stack: Tensor, rows: Tensor, dims: Scope, values: Tensor) -> Tensor:
    """Return tables with some of their variables at given values.

    Args:
        stack: Tables, of shape ``(m, *states, B)``.
        rows: Which of them, of shape ``(f,)``.
        dims: The numbers of the variables in the tables' scopes.
        values: Their values, of shape ``(f, len(dims), B)``.

    Returns:
        The tables of the other variables, of shape ``(f, *states, B)``.
    """
    cards = stack.shape[1:-1]
    rest = [d for d in range(len(cards)) if d not in dims]
    free = [cards[d] for d in rest]
    front = stack.permute(0, *[d + 1 for d in dims], *[d + 1 for d in rest], -1)
    at = rows.unsqueeze(-1)
    for i, d in enumerate(dims):
        at = at * cards[d] + values[:, i]
    flat = front.reshape(-1, *free, stack.shape[-1])
    return flat.gather(0, at.reshape(len(at), *[1] * len(free), -1).expand(-1, *free, -1))


def _numbers(scope: object, index: Mapping[Any, int]) -> Scope:
    """Return the numbers of the variables of a scope."""
    if not isinstance(scope, tuple):
        raise TypeError(f"a scope must be a tuple of names, got {scope!r}: write ({scope!r},)")
    numbers = tuple([index.get(name, -1) for name in scope])
    if -1 in numbers:
        unknown = [name for name in scope if name not in index]
        raise ValueError(f"a scope must name variables with a cardinality, got {show(unknown)}")
    if len(set(numbers)) < len(numbers):
        raise ValueError(f"a scope must name each variable once, got {show(scope)}")
    return numbers


def show(names: Iterable[Any], most: int = 8) -> str:
    """List names in messages, the first of them where there are many."""
    listed = list(names)
    more = f", ... ({len(listed)} in all)" if len(listed) > most else ""
    return f"({', '.join(map(repr, listed[:most]))}{more})"
