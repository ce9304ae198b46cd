"""Energies that are sums of small tables, and exact inference in them."""

from __future__ import annotations

import copy
import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from pyro.distributions.util import broadcast_shape
from torch import Tensor, nn

from pyro_ebm._contraction import (
    Least,
    LogSumExp,
    MinSum,
    backtrack,
    contract,
    is_inside,
    joint,
    record,
    singles,
)
from pyro_ebm._elimination import Cost, Plan, Scope, Structure, find_order, make_plan
from pyro_ebm._factors import Factor, Factors, Pairs, clamp, show
from pyro_ebm._guard import is_tracing
from pyro_ebm._math import Minimum
from pyro_ebm.energy import differentiable
from pyro_ebm.kernels.base import check_count

__all__ = ["FactorGraph"]


class FactorGraph(nn.Module):
    r"""An energy of discrete variables that is a sum of factors, with exact inference.

    .. math:: E(x) = \sum_f E_f(x_f) , \quad \log Z(\beta) = \log \sum_x \exp(-\beta E(x))

    Variables are summed out one after the other: trees and chains at a cost linear in their
    number, in rounds of batched operations that grow with its log; loopy graphs at the
    :attr:`cost` of their treewidth, which is refused above ``max_table``. Called, it is an
    energy like any other. Leading dimensions of tables are a batch of graphs, which goes
    through :class:`~pyro_ebm.GibbsBoltzmann` as ``Given(g)``.

    Args:
        factors: Maps scopes, tuples of names, to tables of energies ``(*graphs, *states)``, or
            to callables that map states, long tensors of one shape, to energies. Pairs, too,
            where several factors share a scope. Parameters and modules are registered. Infinite
            energies forbid states.
        cardinalities: The number of states of each variable, by name.
        max_table: The most entries that one table may have (in each graph) before inference is
            refused.

    Raises:
        TypeError: If a scope is no tuple, or a factor no tensor of floats nor callable.
        ValueError: If a scope names an unknown variable or one twice, or a table does not fit;
            when used, if a table holds NaN or minus infinity, all energies are infinite, or a
            table would be too large.

    References:
        | Probabilistic Graphical Models (Koller and Friedman, 2009)
        | https://mitpress.mit.edu/9780262013192/probabilistic-graphical-models/
        | Parallel tree contraction and its application (Miller and Reif, 1985)
        | https://doi.org/10.1109/SFCS.1985.43

    Example:
        >>> differ = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
        >>> tables = {("a", "b"): differ, ("b", "c"): differ, ("a",): torch.tensor([2.0, 0.0])}
        >>> g = FactorGraph(tables, {"a": 2, "b": 2, "c": 2})
        >>> g({"a": 0, "b": 1, "c": 1})
        tensor(3.)
        >>> g.minimum().x
        {'a': tensor(1), 'b': tensor(1), 'c': tensor(1)}
        >>> g.log_partition()                          # log of (1 + e^-2) (1 + e^-1)^2
        tensor(0.7535)
    """

    def __init__(
        self,
        factors: Mapping[tuple[Hashable, ...], Factor] | Pairs,
        cardinalities: Mapping[Any, int],
        *,
        max_table: int = 2**24,
    ) -> None:
        super().__init__()
        for name, states in cardinalities.items():
            if isinstance(states, bool) or not isinstance(states, int) or states < 1:
                raise ValueError(
                    f"cardinalities must be whole numbers of at least 1, got {states!r} for "
                    f"{name!r}"
                )
        if not cardinalities:
            raise ValueError("cardinalities must name at least one variable, got none")
        pairs = list(factors.items() if isinstance(factors, Mapping) else factors)
        self.factors = Factors(pairs or [((), torch.zeros(()))], cardinalities)
        self.max_table = max_table
        self._given: dict[int, Tensor] = {}
        self._index()

    def _index(self) -> None:
        """Number the free variables, and the tables by their kind and the dimensions given."""
        names, cards = self.factors.names, self.factors.cards
        self._free = [v for v in range(len(names)) if v not in self._given]
        self.cardinalities = {names[v]: cards[v] for v in self._free}
        number = {v: i for i, v in enumerate(self._free)}
        self._number = {names[v]: i for v, i in number.items()}
        self._kinds: dict[tuple[int, Scope], int] = {}
        self._clamped: dict[int, list[int]] = {}
        scopes, kinds, rows = [], [], []
        parts = (self.factors.scopes, self.factors.kinds, self.factors.rows)
        for i, (scope, kind, row) in enumerate(zip(*parts, strict=True)):
            given = tuple([d for d, v in enumerate(scope) if v in self._given])
            kind = self._kinds.setdefault((kind, given), len(self._kinds))
            if given:
                clamped = self._clamped.setdefault(kind, [])
                row = len(clamped)
                clamped.append(i)
                scope = tuple([v for v in scope if v not in self._given])
            scopes.append(tuple([number[v] for v in scope]))
            kinds.append(kind)
            rows.append(row)
        states = tuple(self.cardinalities.values())
        self._structure = Structure(states, tuple(scopes), tuple(kinds), tuple(rows))

    # What it is -----------------------------------------------------------------------------

    @property
    def batch_shape(self) -> torch.Size:
        """The shape of the batch of graphs."""
        with torch.no_grad():
            return self._batch(self.factors.tables())

    def _batch(self, tables: Sequence[Tensor], *shapes: torch.Size) -> torch.Size:
        given = {value.shape for value in self._given.values()}
        return torch.Size(broadcast_shape(self.factors.batch(tables), *given, *shapes))

    @property
    def cost(self) -> Cost:
        """What exact inference takes: treewidth of the order found, table entries, rounds."""
        return find_order(self._structure.cards, self._structure.scopes).cost

    @property
    def treewidth(self) -> int:
        """The most neighbours that a variable has when it is summed out."""
        return self.cost.treewidth

    def to_tensor(self, assignment: Mapping[Any, Any]) -> Tensor:
        """Stack an assignment by names to ``(*batch, n)``, in the order of the cardinalities."""
        missing = [name for name in self.cardinalities if name not in assignment]
        unknown = [name for name in assignment if name not in self.cardinalities]
        if missing or unknown:
            raise ValueError(
                "assignment must have a value for each variable that is not given, got none for "
                f"{show(missing)} and some for {show(unknown)}, which are not"
            )
        values = [torch.as_tensor(assignment[name]) for name in self.cardinalities]
        return torch.stack(torch.broadcast_tensors(*values), -1)

    def forward(self, assignment: Mapping[Any, Any] | Tensor) -> Tensor:
        """Return the energies of assignments.

        Args:
            assignment: Values ``(*batch,)`` by name, or a tensor ``(*batch, n)`` with the
                variables in the order of the cardinalities. Whole numbers of any dtype; the
                energy of other values is infinite.

        Returns:
            The energies, of shape ``(*batch,)``, broadcast with the batch of graphs.
        """
        x = self.to_tensor(assignment) if isinstance(assignment, Mapping) else assignment
        if x.dim() == 0 or x.shape[-1] != len(self._free):
            raise ValueError(
                f"assignment must be (*batch, {len(self._free)}), a value for each variable, got "
                f"{tuple(x.shape)}"
            )
        tables = self.factors.tables()
        batch = self._batch(tables, x.shape[:-1])
        values = x.expand(*batch, -1).reshape(-1, len(self._free)).T
        if self._given:
            given = [v.to(values).expand(batch).reshape(-1) for v in self._given.values()]
            turn = torch.tensor([*self._free, *self._given], device=x.device).argsort()
            values = torch.cat([values, torch.stack(given)])[turn]
        return self.factors.energy(values, self.factors.stacks(tables, batch)).reshape(batch)

    def condition(self, values: Mapping[Any, Any]) -> FactorGraph:
        """Return the graph of the other variables, given the values of some.

        Args:
            values: Numbers of states by name, or tensors of them, whose shape is a batch of
                graphs.

        Returns:
            A graph that shares the factors, and so their parameters.

        Raises:
            ValueError: If a variable is unknown or given, a value no state of its own, or no
                variable is left.

        Example:
            >>> g = ebm.FactorGraph({("x", "y"): torch.eye(2)}, {"x": 2, "y": 2})
            >>> g.condition({"x": torch.tensor([0, 1])}).minimum().x
            {'y': tensor([1, 0])}
        """
        new = copy.copy(self)
        new._given = dict(self._given)
        for name, value in values.items():
            if name not in self.cardinalities:
                raise ValueError(
                    f"values must be of the variables {show(self.cardinalities)}, got {name!r}"
                )
            states, value = self.cardinalities[name], torch.as_tensor(value)
            whole = value.long()
            if not is_tracing() and ((whole != value) | (whole < 0) | (whole >= states)).any():
                raise ValueError(
                    f"values of {name!r} must be in 0, ..., {states - 1}, got {value}"
                )
            new._given[self.factors.numbers[name]] = whole
        if len(new._given) == len(self.factors.names):
            raise ValueError(
                f"values must leave a variable free, got one for each of "
                f"{show(self.cardinalities)}: their energy is g(values)"
            )
        new._index()
        return new

    # Inference ------------------------------------------------------------------------------

    def minimum(self) -> Minimum:
        r"""Return an assignment of least energy, exactly (Viterbi's algorithm on chains).

        .. math:: x^* = \arg\min_x E(x)

        Returns:
            The values by name, of shape ``(*graphs,)``, and the energy there, differentiable.
            Of several minima it is one of them.

        Raises:
            ValueError: If all assignments are forbidden.
        """
        trace: list[Tensor] = []
        plan = self._plan()
        with torch.no_grad():
            inputs, batch = self._inputs(plan)
            _check_possible(-contract(plan, inputs, MinSum(), record(trace)))
            values = backtrack(plan, trace, lambda table: table.argmin(1), 1)
        return self._minimum(values.reshape(-1, *batch))

    def minima(self, k: int) -> Minimum:
        """Return the ``k`` assignments of least energy, in order.

        Args:
            k: How many; the cost grows with its square.

        Returns:
            The values by name, of shape ``(k, *graphs)``, and the energies, differentiable.

        Raises:
            ValueError: If there are fewer assignments that are not forbidden.
        """
        total = math.prod(self.cardinalities.values())
        check_count("k", k, 1)
        if k > total:
            raise ValueError(f"k must be in 1, ..., {total}, the number of assignments, got {k}")
        trace: list[Tensor] = []
        plan = self._plan(lists=k * k)
        with differentiable():
            inputs, batch = self._inputs(plan)
            lists = [table.detach().unsqueeze(-2) for table in inputs]
            least = contract(plan, lists, Least(k), record(trace, grad=True))
            allowed = int((least < torch.inf).sum(0).min())
            if allowed < k:
                raise ValueError(f"k must be at most {allowed}, the assignments allowed, got {k}")
            # The derivative of a least energy in the tables is its assignment.
            values = torch.stack([_where(plan, energy.sum(), trace) for energy in least], 1)
        found = self._minimum(values.reshape(-1, k, *batch))
        return _sorted(found)  # rounding may have swapped some

    def log_partition(self, beta: float | Tensor = 1.0) -> Tensor:
        r"""Return log Z, differentiable in tables, parameters and beta.

        .. math:: \log Z(\beta) = \log \sum_x \exp(-\beta E(x)) = -\beta F(\beta)

        Args:
            beta: The inverse temperature; a tensor broadcasts with the batch of graphs.

        Returns:
            The value, of shape ``(*graphs,)``.

        Raises:
            ValueError: If all assignments are forbidden, or beta is negative or not finite.
        """
        plan = self._plan()
        inputs, batch = self._inputs(plan, beta)
        total = contract(plan, inputs, LogSumExp())
        _check_possible(total)
        return total.reshape(batch)

    def marginals(
        self, beta: float | Tensor = 1.0, *, scopes: Sequence[tuple[Any, ...]] | None = None
    ) -> dict[Any, Tensor]:
        """Return the probabilities of states, differentiable like :meth:`log_partition`.

        They are derivatives of log Z in the tables.

        Args:
            beta: The inverse temperature; a tensor broadcasts with the batch of graphs.
            scopes: Tuples of names for joint probabilities; the variables of one that have no
                factor in common raise the cost as if they had.

        Returns:
            Tensors ``(*graphs, K)`` by name; where ``scopes`` is given, tensors
            ``(*graphs, *states)`` by scope.

        Raises:
            ValueError: As :meth:`log_partition`, or if a scope names an unknown variable.
        """
        numbers = [self._scope(scope) for scope in scopes or ()]
        plan = self._plan()
        outside = tuple(scope for scope in numbers if not is_inside(plan, scope))
        plan = self._plan(outside) if outside else plan
        trace: list[Tensor] = []
        wanted = torch.is_grad_enabled()
        with differentiable():
            inputs, batch = self._inputs(plan, beta)
            wanted = wanted and any(table.requires_grad for table in inputs)
            total = contract(plan, inputs, LogSumExp(), record(trace, grad=True))
            _check_possible(total)
            cliques = torch.autograd.grad(total.sum(), trace, create_graph=wanted)
        if scopes is None:
            return self._margins(plan, cliques, batch)
        found = [joint(plan, cliques, scope) for scope in numbers]
        found = [table.reshape(batch + table.shape[1:]) for table in found]
        return dict(zip(scopes, found, strict=True))

    @torch.no_grad()
    def sample(self, n: int, beta: float | Tensor = 1.0) -> dict[Any, Tensor]:
        """Draw independent assignments, exactly.

        Args:
            n: How many for each graph.
            beta: The inverse temperature; a tensor broadcasts with the batch of graphs.

        Returns:
            Values ``(n, *graphs)`` by name.

        Raises:
            ValueError: As :meth:`log_partition`, or if ``n`` is no whole number of at least 0.
        """
        check_count("n", n, 0)
        trace: list[Tensor] = []
        plan = self._plan()
        inputs, batch = self._inputs(plan, beta)
        _check_possible(contract(plan, inputs, LogSumExp(), record(trace)))
        values = backtrack(plan, trace, _draw, n)
        return self._named(values.reshape(len(values), n, *batch))

    # Helpers --------------------------------------------------------------------------------

    def _scope(self, scope: tuple[Any, ...]) -> Scope:
        unknown = [name for name in scope if name not in self.cardinalities]
        if not scope or unknown or len(set(scope)) < len(scope):
            raise ValueError(
                f"scopes must name variables that are free, each once, got {scope!r} of "
                f"{show(self.cardinalities)}"
            )
        return tuple([self._number[name] for name in scope])

    def _plan(self, together: tuple[Scope, ...] = (), *, lists: int = 1) -> Plan:
        """Plan the elimination, where it is no larger than was allowed."""
        order = find_order(self._structure.cards, self._structure.scopes + together)
        cost = order.cost
        if cost.largest_table * lists > self.max_table:
            names = list(self.cardinalities)
            more = "" if cost.complete else " or more"
            times = f" of {lists} numbers" if lists > 1 else ""
            raise ValueError(
                f"max_table: one table may have {self.max_table} numbers, and exact inference "
                f"needs {cost.largest_table}{more} entries{times} over the variables "
                f"{show(names[v] for v in order.widest)}: the graph has treewidth "
                f"{cost.treewidth}{more} in the order found. Raise max_table, give variables "
                "with condition(), or go on without exact inference: GibbsBoltzmann with "
                "kernels.gibbs, a method of pyro_ebm.partition, minimize"
            )
        return make_plan(self._structure, together, self.factors.device)

    def _inputs(
        self, plan: Plan, beta: float | Tensor | None = None
    ) -> tuple[list[Tensor], torch.Size]:
        """Return the tables that a plan names, of energies or of -beta E, and the batch."""
        shape = beta.shape if isinstance(beta, Tensor) else torch.Size()
        tables = self.factors.tables()
        batch = self._batch(tables, shape)
        stacks = self.factors.stacks(tables, batch)
        if not is_tracing():
            self.factors.check_numbers(stacks)
        if beta is not None:
            _check_beta(beta)
            flat = beta.expand(batch).reshape(-1) if isinstance(beta, Tensor) else beta
            stacks = [_weight(stack, flat) for stack in stacks]
        kinds = [self._clamp(i, key, stacks, batch) for key, i in self._kinds.items()]
        turned = [(kinds[i], [d + 1 for d in turn]) for i, turn in plan.inputs]
        return [kind.permute(0, *turn, -1) for kind, turn in turned], batch

    def _clamp(
        self, i: int, key: tuple[int, Scope], stacks: list[Tensor], batch: torch.Size
    ) -> Tensor:
        """Return the tables of one kind with the given variables at their values."""
        kind, dims = key
        if not dims:
            return stacks[kind]
        device, factors = stacks[kind].device, self._clamped[i]
        scopes = [self.factors.scopes[f] for f in factors]
        values = {v: self._given[v] for scope in scopes for v in scope if v in self._given}
        row = {v: j for j, v in enumerate(values)}
        wide = [value.to(device).expand(batch).reshape(-1) for value in values.values()]
        at = torch.tensor([[row[scope[d]] for d in dims] for scope in scopes], device=device)
        rows = torch.tensor([self.factors.rows[f] for f in factors], device=device)
        return clamp(stacks[kind], rows, dims, torch.stack(wide)[at])

    def _margins(
        self, plan: Plan, cliques: Sequence[Tensor], batch: torch.Size
    ) -> dict[Any, Tensor]:
        """Return the margins ``(*batch, K)`` of all variables."""
        steps = [
            table.movedim(-1, 1).reshape(len(table), *batch, -1).unbind()
            for table in singles(cliques)
        ]
        return {
            name: steps[step][row]
            for name, (step, row) in zip(self.cardinalities, plan.place, strict=True)
        }

    def _named(self, values: Tensor) -> dict[Any, Tensor]:
        return dict(zip(self.cardinalities, values.unbind(), strict=True))

    def _minimum(self, values: Tensor) -> Minimum:
        """Describe assignments ``(n, *batch)``, with energies that carry a graph."""
        energy = self(values.movedim(0, -1))
        whole = torch.zeros_like(energy, dtype=torch.long)
        converged, grad_norm = torch.ones_like(whole, dtype=torch.bool), energy.detach() * 0
        return Minimum(self._named(values), energy, converged, whole, grad_norm)


def _where(plan: Plan, least: Tensor, trace: Sequence[Tensor]) -> Tensor:
    """Return the states ``(n, B)`` whose energies a sum of minima, one a graph, depends on."""
    picked = torch.autograd.grad(least, trace, retain_graph=True)
    parts = [margin.argmax(1) for margin in singles([table.sum(-2) for table in picked])]
    values = parts[0].new_empty(len(plan.place), parts[0].shape[-1])
    for step, part in zip(plan.steps, parts, strict=True):
        values[step.variables] = part
    return values


def _sorted(found: Minimum) -> Minimum:
    """Order minima by their energies."""
    order = found.energy.detach().argsort(dim=0, stable=True)
    x = {name: value.gather(0, order) for name, value in found.x.items()}
    return found._replace(x=x, energy=found.energy.gather(0, order))


def _draw(log_weight: Tensor) -> Tensor:
    """Draw states in proportion to weights ``(m, K, n, B)``, never one without weight."""
    noise = torch.empty_like(log_weight).exponential_()
    tiny = torch.finfo(noise.dtype).tiny  # a zero would turn no weight into NaN
    return (log_weight - noise.clamp(min=tiny).log()).argmax(1)


def _weight(energy: Tensor, beta: float | Tensor) -> Tensor:
    r"""Return :math:`-\beta E`, also where a forbidden state meets a beta of zero."""
    wall = energy == torch.inf
    return torch.where(wall, -torch.inf, -beta * torch.where(wall, 0.0, energy))


def _check_beta(beta: float | Tensor) -> None:
    if isinstance(beta, Tensor):
        right = is_tracing() or bool(((beta >= 0) & (beta < torch.inf)).all())
    else:
        right = 0 <= beta < math.inf
    if not right:
        raise ValueError(
            f"beta must be finite and not negative, got {beta}; at beta = inf ask for minimum()"
        )


def _check_possible(total: Tensor) -> None:
    """Refuse graphs whose Z is zero."""
    if is_tracing():
        return
    dead = int((total == -torch.inf).sum())
    if dead:
        raise ValueError(
            "some assignment must have a finite energy: Z = 0, every one is forbidden, in "
            f"{dead} of {total.numel()} graphs"
        )
