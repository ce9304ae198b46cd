"""Auxiliary data for sites whose log Z is unknown: which they are, their densities and draws."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from pyro import poutine
from pyro.distributions import Independent, MaskedDistribution
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_ebm._free import Free
from pyro_ebm._potential import Batched, Potential, quiet, split
from pyro_ebm._short_run import first_step
from pyro_ebm.distribution import GibbsBoltzmann
from pyro_ebm.energy import Energy
from pyro_ebm.factor_graph import FactorGraph
from pyro_ebm.flat import Flat, num_states, values_of
from pyro_ebm.kernels import hmc

LEAPS = 5
"""The leapfrog steps of an inner move."""

ACCEPT = 0.8
"""The acceptance of inner moves: in few dimensions less would mean steps near instability."""

TABLE = 1 << 22
"""The most energies of states, over all chains, that are computed at once."""


class _Mark(str):
    """What stands for the log Z of a site that is exchanged."""


EXCHANGED = _Mark("constant")


def _inside(fn: Any) -> Any:
    """Return the distribution within masks and reinterpreted dimensions."""
    while isinstance(fn, (Independent, MaskedDistribution)):
        fn = fn.base_dist
    return fn


def _marked(fn: Any) -> Any:
    new = copy.copy(fn)
    if isinstance(fn, GibbsBoltzmann):
        new.log_partition = EXCHANGED
    else:
        new.base_dist = _marked(fn.base_dist)
    return new


class _Declare(Messenger):
    """Marks the observed sites without log Z."""

    def _pyro_sample(self, msg: Any) -> None:
        # Entered inside of what conditions on latents: those do not look observed yet.
        if msg["is_observed"] and not site_is_subsample(msg):
            d = _inside(msg["fn"])
            if isinstance(d, GibbsBoltzmann) and d.log_partition is None:
                msg["fn"] = _marked(msg["fn"])


class Declared:
    """A model whose observed sites without log Z are marked: to audits Z is taken care of."""

    def __init__(self, model: Callable[..., Any]) -> None:
        self.model = model
        self.__name__ = getattr(model, "__name__", type(model).__name__)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with _Declare():
            return self.model(*args, **kwargs)


class _Node(NamedTuple):
    """An exchanged site: its distribution, the energy's within, mask and data."""

    fn: Any
    d: GibbsBoltzmann
    mask: Any
    value: Tensor

    @property
    def shape(self) -> torch.Size:
        """The shape of the data."""
        return torch.broadcast_shapes(self.fn.shape(), self.value.shape)


class Exchanged:
    """The exchanged sites of a model: their densities and draws for all chains."""

    def __init__(self, potential: Potential, inner_steps: int) -> None:
        self.potential = potential
        with quiet(), torch.no_grad():
            nodes = self._nodes(torch.zeros(potential.num_dims).to(potential.like))
        if not nodes:
            raise ValueError(
                f"{potential.name} must have an observed GibbsBoltzmann site without "
                "log_partition, got none: use ebm.NUTS"
            )
        self.likelihood_of = Batched(self._likelihood)
        exact = [name for name, node in nodes.items() if _is_exact(node.d)]
        self.exact = _Draws(self._draw, exact, sum(_num_energies(nodes[n].d) for n in exact))
        graphs = [n for n, node in nodes.items() if n not in exact and _is_graph(node.d)]
        rest = [name for name in nodes if name not in exact + graphs]
        self.own = {name: self._by_graph(name, nodes[name]) for name in graphs}
        self.own |= {name: self._inner(name, nodes[name], inner_steps) for name in rest}
        self.names, self.approximate = list(nodes), rest

    def _nodes(self, z: Tensor) -> dict[str, _Node]:
        """Run the model at the parameters of one chain, ``(D,)``."""
        sites = self.potential.sites
        values = {n: sites[n].transform(v) for n, v in split(sites, z).items()}
        trace = poutine.trace(poutine.condition(self.potential.model, data=values)).get_trace()
        found = {}
        for name, node in trace.nodes.items():
            if node["type"] != "sample" or site_is_subsample(node):
                continue
            if not node["is_observed"]:
                raise NotImplementedError(
                    f"{self.potential.name} must have continuous latent sites only, got the "
                    f"discrete {name!r}"
                )
            d = _inside(node["fn"])
            if getattr(d, "log_partition", None) is EXCHANGED:
                found[name] = self._checked(name, node, d)
        return found

    def _checked(self, name: str, node: Any, d: GibbsBoltzmann) -> _Node:
        if isinstance(node["scale"], Tensor) or node["scale"] != 1.0:
            raise NotImplementedError(
                f"site {name!r} must not be scaled, got the scale {node['scale']}: a power of a "
                "density has another log Z"
            )
        return _Node(node["fn"], d, node["mask"], node["value"])

    # Functions of one chain ---------------------------------------------------------------------

    def _likelihood(self, z: Tensor, *auxiliary: Tensor) -> Tensor:
        total = z.new_zeros(())
        for node, w in zip(self._nodes(z).values(), auxiliary, strict=True):
            total = total - scale_and_mask(node.fn.log_prob(w), mask=node.mask).sum()
        return total

    def _draw(self, z: Tensor, names: list[str]) -> tuple[Tensor, ...]:
        nodes = self._nodes(z)
        return tuple(_exact(nodes[name]) for name in names)

    # Functions of all chains --------------------------------------------------------------------

    def likelihood(self, z: Tensor, auxiliary: tuple[Tensor, ...]) -> Tensor:
        """Return the potentials of auxiliary data, ``(C,)``."""
        return self.likelihood_of(z, *auxiliary)

    def sample(self, z: Tensor) -> tuple[Tensor, ...]:
        """Draw auxiliary data for the parameters of all chains, by site."""
        found = dict(zip(self.exact.names, self.exact(z), strict=True))
        for name, draw in self.own.items():
            found[name] = draw(z)
        return tuple(found[name] for name in self.names)

    def _by_graph(self, name: str, node: _Node) -> Callable[[Tensor], Tensor]:
        """Make the exact draws of a site whose energy is a factor graph, all chains in a batch."""
        num = node.shape[: len(node.shape) - node.d.event_dim].numel()
        first: Any = node.d.energy

        def single(z: Tensor) -> tuple[Tensor, ...]:
            d = self._nodes(z)[name].d
            graph: Any = d.energy
            return (torch.as_tensor(d.beta).to(z), *graph.factors.tables())

        def draw(z: Tensor) -> Tensor:
            with quiet(), torch.no_grad():
                beta, *tables = torch.func.vmap(single, randomness="different")(z)
                graph = _with_tables(first, tables)
                x = graph.to_tensor(graph.sample(num, beta))  # shape: (num, C, n)
            return x.movedim(1, 0).reshape(len(z), *node.shape).to(node.value)

        return draw

    def _inner(self, name: str, node: _Node, num: int) -> Callable[[Tensor], Tensor]:
        """Make the inner kernel of a site: ``num`` moves from its data."""
        free, data = Free(node.d), node.value.expand(node.shape)
        potential = Batched(lambda z, w: self._nodes(z)[name].d.potential(w))
        start = free.encode(data)

        def draw(z: Tensor) -> Tensor:
            energy = free.pull(_at(potential, z, data.dim()))
            position = start.expand(len(z), *start.shape).clone()
            end = (
                _sweeps(free, energy, position, num)
                if free.finite
                else _follow(energy, position, num)
            )
            return free.decode(end).to(data)

        return draw


def _is_exact(d: GibbsBoltzmann) -> bool:
    return d.sampler is not None or d.has_enumerate_support


def _is_graph(d: GibbsBoltzmann) -> bool:
    """Whether a factor graph can draw: of the states of the support, under a flat base."""
    graph, values = d.energy, values_of(d.support)
    if not isinstance(graph, FactorGraph) or not isinstance(d.base, Flat) or values is None:
        return False
    same = values.tolist() == list(range(len(values)))
    whole = len(graph.cardinalities) == len(graph.factors.names) and not graph.batch_shape
    fits = whole and graph.cost.largest_table <= graph.max_table
    return same and fits and set(graph.cardinalities.values()) == {len(values)}


def _with_tables(graph: FactorGraph, tables: list[Tensor]) -> FactorGraph:
    """Return a batch of graphs with other tables."""
    own = graph.factors
    at = {(own.kinds[i], own.rows[i]): table for table, i in enumerate(own.owners)}
    places = zip(own.scopes, own.kinds, own.rows, strict=True)
    pairs = [
        (tuple(own.names[v] for v in scope), tables[at[kind, row]]) for scope, kind, row in places
    ]
    return FactorGraph(pairs, graph.cardinalities, max_table=graph.max_table)


def _num_energies(d: GibbsBoltzmann) -> float:
    """How many energies a chain's draws take at once."""
    states = num_states(d.support, d.event_shape) if d.sampler is None else 1
    return states * max(1, (d._origin or d).batch_shape.numel())


def _exact(node: _Node) -> Tensor:
    """Draw auxiliary data of one site and chain exactly."""
    d = node.d
    if d.sampler is not None:
        extra = node.shape[: len(node.shape) - len(d.shape())]
        return d.sample(extra).reshape(node.shape)
    # A plate repeats one law: its table is computed once.
    single = d._origin or d
    single = d if single.batch_shape.numel() > 1 else single
    states = single.enumerate_support(expand=False).reshape(-1, *d.event_shape)
    logits = -single.potential(single.enumerate_support())  # shape: (K, *batch)
    share = torch.softmax(logits, 0).reshape(len(states), -1).T
    num = node.shape[: len(node.shape) - d.event_dim].numel() // len(share)
    rows = torch.multinomial(share, num, replacement=True)
    return states[rows.T].reshape(node.shape)


class _Draws:
    """Random draws for many chains from a function of one: by ``vmap`` where torch can."""

    def __init__(
        self,
        single: Callable[[Tensor, list[str]], tuple[Tensor, ...]],
        names: list[str],
        size: float,
    ) -> None:
        self.single, self.names = single, names
        self.chunk = max(1, int(TABLE // max(size, 1)))
        self.batched = bool(names)

    def __call__(self, z: Tensor) -> tuple[Tensor, ...]:
        if not self.names:
            return ()
        with quiet(), torch.no_grad():
            if self.batched:
                try:
                    return torch.func.vmap(
                        lambda z: self.single(z, self.names),
                        randomness="different",
                        chunk_size=self.chunk,
                    )(z)
                except Exception as error:
                    self.batched, reason = False, f"{type(error).__name__}: {error}"
            else:
                reason = None
            drawn = [self.single(row, self.names) for row in z]
        if reason:
            first = reason.splitlines()[0]
            warnings.warn(
                f"auxiliary data are drawn chain by chain, since the sampler cannot be batched "
                f"({first})",
                stacklevel=2,
            )
        return tuple(map(torch.stack, zip(*drawn, strict=True)))


# Inner kernels ---------------------------------------------------------------------------------


def _at(potential: Callable[..., Tensor], z: Tensor, num_dims: int) -> Energy:
    """The potential of points with leading dimensions of trials, as Gibbs sampling asks for."""

    def energy(x: Tensor) -> Tensor:
        trials = x.shape[: x.dim() - num_dims - 1]
        if not trials:
            return potential(z, x)
        value = potential(z, x.flatten(0, len(trials) - 1).movedim(0, 1)).movedim(1, 0)
        return value.reshape(*trials, *value.shape[1:])

    return energy


def _sweeps(free: Free, energy: Energy, position: Tensor, num: int) -> Tensor:
    dims = position.dim() - len(free.shape)
    kernel = free.kernel(energy, torch.ones((1,) * dims))  # steps have no part in sweeps
    state = kernel.init(position)
    for _ in range(num):
        state, _ = kernel.step(state)
    return state.position


def _follow(energy: Energy, position: Tensor, num: int) -> Tensor:
    """Make moves of HMC whose step sizes settle in the first half, one per chain and point."""
    state = hmc(energy, 1.0, LEAPS).init(position)
    log_step = first_step(energy, state)
    for i in range(num):
        state, info = hmc(energy, log_step.exp(), LEAPS, jitter=0.5, step_jitter=0.2).step(state)
        if i < num // 2:
            log_step = log_step + (info.accept_prob - ACCEPT) / (1.0 + i) ** 0.6
    return state.position
