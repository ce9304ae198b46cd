"""In which order a factor graph's variables are summed out, and what is added up on the way."""

from __future__ import annotations

import functools
import heapq
import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Scope = tuple[int, ...]

# Entries up to which a link of a chain goes in parallel with others. Ten states are three times
# as fast so, sixteen no faster than from the ends, in sixteen times the memory.
COMPRESS = 1024
MAX_FILL = 32  # neighbours up to which missing edges are counted
MAX_WORK = 5_000_000  # pairs of neighbours after which a search for an order is given up


class Structure(NamedTuple):
    """A graph without its numbers.

    Variable ``i`` has ``cards[i]`` states. The factor with ``scopes[j]`` has its table in row
    ``rows[j]`` of the stack of tables ``kinds[j]``.
    """

    cards: tuple[int, ...]
    scopes: tuple[Scope, ...]
    kinds: tuple[int, ...]
    rows: tuple[int, ...]


class Cost(NamedTuple):
    """What exact inference takes.

    ``treewidth`` is that of the order found (an upper bound on the least one), ``largest_table``
    the entries of the largest table, ``entries`` those of all tables and ``rounds`` the number
    of batched steps that follow each other. Where ``complete`` is false the search for an order
    was given up: the numbers are what a part of the graph takes.
    """

    treewidth: int
    largest_table: int
    entries: int
    rounds: int
    complete: bool


class Order(NamedTuple):
    """Rounds of variables of which no two are neighbours.

    ``near`` are the neighbours of each when it goes, ``widest`` the variables of the largest
    table.
    """

    rounds: list[list[int]]
    near: list[Scope]
    widest: Scope
    cost: Cost


class _Graph:
    """Who shares a table with whom, while variables are taken out."""

    def __init__(self, cards: Sequence[int], scopes: Iterable[Scope]) -> None:
        self.cards = cards
        self.adjacent: list[set[int]] = [set() for _ in cards]
        for scope in scopes:
            if len(scope) > 1:
                for v in scope:
                    self.adjacent[v].update(scope)
        for v, near in enumerate(self.adjacent):
            near.discard(v)
        self.gone = [False] * len(cards)
        self.fill: list[tuple[int, int]] | None = None
        self.heap: list[tuple[tuple[int, int], int]] = []

    def entries(self, v: int) -> int:
        return self.cards[v] * math.prod([self.cards[a] for a in self.adjacent[v]])

    def is_narrow(self, v: int) -> bool:
        """Whether taking it out can neither widen the rest nor make a table large."""
        near = self.adjacent[v]
        if len(near) != 2:
            return len(near) < 2
        a, b = near
        return self.cards[v] * self.cards[a] * self.cards[b] <= COMPRESS

    def take(self, v: int) -> Scope:
        """Take a variable out and join its neighbours."""
        near = tuple(self.adjacent[v])
        changed = set(near)
        for a in near:
            self.adjacent[a].discard(v)
        for a, b in itertools.combinations(near, 2):
            one, other = self.adjacent[a], self.adjacent[b]
            if b not in one:
                one.add(b)
                other.add(a)
                if self.fill is not None and len(near) <= MAX_FILL:
                    changed |= one & other
        self.gone[v] = True
        if self.fill is not None:
            self._count_fill(changed)
        return near

    def _count_fill(self, variables: Iterable[int]) -> None:
        assert self.fill is not None
        for v in variables:
            near = self.adjacent[v]
            edges = len(near) * (len(near) - 1)
            if len(near) <= MAX_FILL:
                edges -= sum(len(self.adjacent[a] & near) for a in near)
            self.fill[v] = (edges // 2, self.entries(v))
            heapq.heappush(self.heap, (self.fill[v], v))

    def least_fill(self) -> int:
        """Return the variable whose neighbours lack the fewest edges between them."""
        if self.fill is None:
            self.fill = [(0, 0)] * len(self.cards)
            self._count_fill(v for v, gone in enumerate(self.gone) if not gone)
        while True:
            fill, v = heapq.heappop(self.heap)
            if not self.gone[v] and fill == self.fill[v]:
                return v

    def independent(self, waiting: Iterable[int]) -> tuple[list[int], list[int]]:
        """Choose narrow variables of which no two are neighbours; return those who wait, too."""
        chosen, kept, blocked = [], [], set()
        for v in waiting:
            if self.gone[v] or not self.is_narrow(v):
                continue
            if v in blocked:
                kept.append(v)
            else:
                chosen.append(v)
                blocked |= self.adjacent[v]
        return chosen, kept


@functools.lru_cache(maxsize=8)
def find_order(cards: tuple[int, ...], scopes: tuple[Scope, ...]) -> Order:
    """Order variables: leaves and links of chains in parallel, then by least fill.

    Variables with up to two neighbours go first, as many at a time as are no neighbours of each
    other (tree contraction: the rounds grow with the log of a tree's size). Where there are
    none, the variable goes whose neighbours lack the fewest edges.
    """
    graph = _Graph(cards, scopes)
    near: list[Scope] = [()] * len(cards)
    rounds: list[list[int]] = []
    waiting: list[int] = list(range(len(cards)))
    left, work = len(cards), 0
    while left and work <= MAX_WORK:
        chosen, waiting = graph.independent(waiting)
        chosen = chosen or [graph.least_fill()]
        for v in chosen:
            near[v] = graph.take(v)
            waiting += near[v]
            work += len(near[v]) ** 2
        waiting = list(dict.fromkeys(waiting))
        left -= len(chosen)
        rounds.append(chosen)
    return _summary(cards, rounds, near, left == 0)


def _summary(
    cards: Sequence[int], rounds: list[list[int]], near: list[Scope], complete: bool
) -> Order:
    sizes = {v: cards[v] * math.prod([cards[a] for a in near[v]]) for part in rounds for v in part}
    largest = max(sizes, key=sizes.__getitem__, default=None)
    widest = () if largest is None else (largest, *near[largest])
    width = max(map(len, near), default=0)
    total, most = sum(sizes.values()), max(sizes.values(), default=1)
    return Order(rounds, near, widest, Cost(width, most, total, len(rounds), complete))


class Source(NamedTuple):
    """Rows of a stack of tables that are added into the rows ``places`` of a step's tables."""

    chunk: int
    rows: Tensor
    places: Tensor


class Step(NamedTuple):
    """Variables that go together: the same number of states, and so have their neighbours.

    Their tables have the ``shape`` of the variable followed by its neighbours ``near``, in the
    order in which those go. ``parts`` maps dimensions of the table to what is added up there.
    """

    variables: Tensor
    near: Tensor
    shape: tuple[int, ...]
    parts: dict[Scope, list[Source]]


class Plan(NamedTuple):
    """Steps that sum a graph's variables out.

    The stacks of tables are numbered: first ``inputs``, each a kind of factors and the order of
    its dimensions, then what each step leaves. ``constants`` are rows without variables, None
    for all rows; ``place`` is each variable's step and row there, ``near`` its neighbours.
    """

    steps: list[Step]
    inputs: list[tuple[int, Scope]]
    constants: list[tuple[int, Tensor | None]]
    place: list[tuple[int, int]]
    near: list[Scope]


class _Compiler:
    """Collects which rows go where, in lists, and turns them into tensors of indices."""

    def __init__(self, structure: Structure, order: Order, device: torch.device) -> None:
        self.cards, self.device = structure.cards, device
        self.time = [0] * len(structure.cards)
        for t, v in enumerate(itertools.chain.from_iterable(order.rounds)):
            self.time[v] = t
        self.near = [tuple(sorted(scope, key=self.time.__getitem__)) for scope in order.near]
        self.inputs: dict[tuple[int, Scope], int] = {}
        self.held: list[list[tuple[int, int, Scope]]] = [[] for _ in structure.cards]
        self.loose: dict[int, list[int]] = defaultdict(list)
        self.constants: list[tuple[int, Tensor | None]] = []
        self.steps: list[Step] = []
        self.place = [(0, 0)] * len(structure.cards)

    def indices(self, rows: Sequence[object]) -> Tensor:
        return torch.tensor(rows, dtype=torch.long, device=self.device)

    def add_factors(self, structure: Structure) -> None:
        """Hand each factor to the first of its variables to go."""
        time = self.time
        for scope, kind, row in zip(*structure[1:], strict=True):
            ordered = tuple(sorted(scope, key=time.__getitem__))
            turn = tuple([scope.index(v) for v in ordered])
            chunk = self.inputs.setdefault((kind, turn), len(self.inputs))
            if ordered:
                self.held[ordered[0]].append((chunk, row, ordered))
            else:
                self.loose[chunk].append(row)
        self.constants = [(chunk, self.indices(rows)) for chunk, rows in self.loose.items()]

    def add_round(self, variables: list[int]) -> None:
        """Group a round's variables by the shapes of their tables."""
        groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for v in variables:
            scope = (v, *self.near[v])
            groups[tuple([self.cards[a] for a in scope])].append(v)
        for shape, group in groups.items():
            self._add_step(shape, group)

    def _add_step(self, shape: tuple[int, ...], group: list[int]) -> None:
        found: dict[tuple[Scope, int], tuple[list[int], list[int]]] = {}
        out = len(self.inputs) + len(self.steps)
        for place, v in enumerate(group):
            near = self.near[v]
            self.place[v] = len(self.steps), place
            for chunk, row, scope in self.held[v]:
                dims = (0, *[near.index(a) + 1 for a in scope[1:]])
                rows, places = found.setdefault((dims, chunk), ([], []))
                rows.append(row)
                places.append(place)
            if near:
                self.held[near[0]].append((out, place, near))
        if len(shape) == 1:
            self.constants.append((out, None))
        parts: dict[Scope, list[Source]] = defaultdict(list)
        for (dims, chunk), (rows, places) in found.items():
            parts[dims].append(Source(chunk, self.indices(rows), self.indices(places)))
        near_of = self.indices([self.near[v] for v in group]).reshape(len(group), -1)
        self.steps.append(Step(self.indices(group), near_of, shape, dict(parts)))


@functools.lru_cache(maxsize=8)
def make_plan(structure: Structure, together: tuple[Scope, ...], device: torch.device) -> Plan:
    """Plan the elimination, with the variables of each scope of ``together`` in one table."""
    order = find_order(structure.cards, structure.scopes + together)
    compiler = _Compiler(structure, order, device)
    compiler.add_factors(structure)
    for variables in order.rounds:
        compiler.add_round(variables)
    return Plan(
        compiler.steps,
        list(compiler.inputs),
        compiler.constants,
        compiler.place,
        compiler.near,
    )
