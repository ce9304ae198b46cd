"""Targets as one potential over flat unconstrained vectors, batched over chains."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.distributions import MaskedDistribution
from pyro.infer.autoguide.initialization import init_to_uniform
from pyro.infer.mcmc.util import initialize_model
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import biject_to
from torch.distributions.transforms import Transform
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_ebm._short_run import unconstrained
from pyro_ebm.distribution import GibbsBoltzmann, unvalidated
from pyro_ebm.energy import Energy, describe, differentiable
from pyro_ebm.flat import Flat


class SamplingError(RuntimeError):
    """An energy failed; what was drawn until then is kept."""


class Site(NamedTuple):
    """A latent site: its ``shape``, and the ``transform`` from unconstrained ``free_shape``."""

    shape: torch.Size
    free_shape: torch.Size
    transform: Transform


class Potential(NamedTuple):
    """A target in unconstrained space: ``energy`` maps ``(C, D)`` to ``(C,)``.

    ``like`` is an empty tensor with the type and device of points; ``model`` and its arguments
    are what Pyro's strategies for starting points run. ``tempered`` maps points and inverse
    temperatures to energies; ``name`` names the energy in messages. ``check`` refuses a target
    that is wrong, or random, at points: all checks are made there, and none later.
    """

    energy: Energy
    sites: dict[str, Site]
    like: Tensor
    model: Callable[[], Any]
    tempered: Callable[[Tensor, Tensor], Tensor]
    name: str
    owner: Any
    check: Callable[[Tensor], None] = lambda z: None

    @property
    def num_dims(self) -> int:
        """The length D of a flat point."""
        return sum(site.free_shape.numel() for site in self.sites.values())

    def constrain(self, z: Tensor) -> dict[str, Tensor]:
        """Split flat points ``(*batch, D)`` into the values of sites, ``(*batch, *shape)``."""
        return {n: self.sites[n].transform(v) for n, v in split(self.sites, z).items()}

    def flatten(self, values: Mapping[str, Tensor], num_chains: int) -> Tensor:
        """Join unconstrained values of sites, ``(num_chains, *free_shape)``, to flat points.

        They are of the widest type among those of the values and that of the target.

        Raises:
            KeyError: If a site is missing or unknown.
            TypeError: If a value is not of real floating point.
            ValueError: If a value has another shape or device, or is not finite.
        """
        if set(values) != set(self.sites):
            known, got = sorted(self.sites), sorted(values)
            raise KeyError(f"initial_params must have the sites {known}, got {got}")
        parts = []
        for name, site in self.sites.items():
            value = _checked(name, values[name], site, num_chains, self.like)
            parts.append(value.reshape(num_chains, -1))
        return torch.cat(parts, -1)


def split(sites: Mapping[str, Site], z: Tensor) -> dict[str, Tensor]:
    """Split flat points ``(*batch, D)`` by site, in unconstrained space."""
    sizes = [site.free_shape.numel() for site in sites.values()]
    pieces = z.split(sizes, -1) if sizes else []
    return {
        name: piece.reshape((*z.shape[:-1], *site.free_shape))
        for (name, site), piece in zip(sites.items(), pieces, strict=True)
    }


def _checked(name: str, value: Tensor, site: Site, num_chains: int, like: Tensor) -> Tensor:
    """Check starting values of a site and return them in the type of the target."""
    what = f"initial_params[{name!r}]"
    if not isinstance(value, Tensor):
        raise TypeError(f"{what} must be a tensor, got {type(value).__name__}")
    if not value.dtype.is_floating_point:
        raise TypeError(f"{what} must be of real floating point, got {value.dtype}")
    if value.device != like.device:
        raise ValueError(f"{what} must be on the device {like.device}, got {value.device}")
    value = value.detach().to(torch.promote_types(like.dtype, _promoted(value.dtype)))
    expected = (num_chains, *site.free_shape)
    if num_chains == 1 and value.shape == site.free_shape:
        value = value.unsqueeze(0)
    if value.shape != expected:
        raise ValueError(f"{what} must have the shape {expected}, got {tuple(value.shape)}")
    if not value.isfinite().all():
        bad = int((~value.isfinite()).flatten(1).any(-1).nonzero()[0])
        raise ValueError(f"{what} must be finite, got {value[bad].tolist()} for chain {bad}")
    return value


def potential_of(target: Any, args: tuple, kwargs: dict[str, Any]) -> Potential:
    """Make the potential of a :class:`GibbsBoltzmann` or of a Pyro model with its arguments.

    Raises:
        TypeError: If the target is neither.
        ValueError: If it has no continuous latent site.
        NotImplementedError: If it subsamples its data.
    """
    if isinstance(target, GibbsBoltzmann):
        return _of_distribution(target)
    if not callable(target):
        got = type(target).__name__
        raise TypeError(f"target must be a GibbsBoltzmann or a Pyro model, got {got}")
    return _of_model(target, args, kwargs)


def _of_distribution(d: GibbsBoltzmann) -> Potential:
    shape = d.shape()
    transform = biject_to(d.support)
    free = torch.Size(transform.inverse_shape(shape))
    like = d.floating().to(_promoted(d.floating().dtype))
    sites = {"x": Site(shape, free, transform)}
    if shape.numel() == 0:
        raise ValueError(f"target must have at least one component, got the shape {tuple(shape)}")
    if d.has_enumerate_support or not like.dtype.is_floating_point:
        raise ValueError(f"target must be continuous, got the support {d.support}")
    lean = _lean(d)

    def pulled(part: Energy) -> Energy:
        inner = unconstrained(part, transform, len(shape))
        return lambda z: inner(z.reshape((*z.shape[:-1], *free)))

    def total(x: Tensor) -> Tensor:
        value = lean(x)
        return value.flatten(x.dim() - len(shape)).sum(-1) if d.batch_shape else value

    def tempered(z: Tensor, beta: Tensor) -> Tensor:
        def at(x: Tensor) -> Tensor:
            e = d.beta * d._energy_at(x)
            e = beta.reshape(*beta.shape, *[1] * (e.dim() - beta.dim())) * e
            e = e - d._measure.log_prob(x)
            return e.flatten(x.dim() - len(shape)).sum(-1) if d.batch_shape else e

        return pulled(at)(z)

    def check(z: Tensor) -> None:
        _check_distribution(d, transform(z.reshape((-1, *free))))

    model = lambda: pyro.sample("x", d)
    name, owner = describe(d.energy), d.energy
    return Potential(pulled(total), sites, like, model, tempered, name, owner, check)


def _check_distribution(d: GibbsBoltzmann, x: Tensor) -> None:
    """Evaluate an energy with all checks, and again: it must be one real number per point."""
    name, strict = describe(d.energy), copy.copy(d)
    strict._validate_args = True
    with differentiable():
        try:
            with d._binding.active():
                d.energy(x.detach().clone())
        except torch.linalg.LinAlgError:  # as outside of the region where a matrix has a factor
            for half in x.chunk(2) if len(x) > 1 else ():
                _check_distribution(d, half)
            return
        except Exception as error:
            kind = type(error).__name__
            raise SamplingError(f"{name} raised {kind} at its first call: {error}") from error
        first, again = (strict.potential(x.detach().clone()).detach() for _ in range(2))
    _check_same(name, first, again)


def _check_same(name: str, first: Tensor, again: Tensor) -> None:
    if not torch.allclose(first, again, rtol=1e-4, atol=1e-4, equal_nan=True):
        raise ValueError(
            f"{name} must give a point the same energy at each call, got {first.flatten()[0]} and "
            f"{again.flatten()[0]}: it is random (dropout, noise)"
        )


def _lean(d: GibbsBoltzmann) -> Energy:
    """The potential of a distribution without its checks, which the start makes."""
    if d.batch_shape or d._binding.values:
        return d.potential
    flat = isinstance(d.base, Flat)
    plain = not isinstance(d.beta, Tensor) and d.beta == 1.0

    def energy(x: Tensor) -> Tensor:
        value = d.energy(x)
        value = value if plain else d.beta * value
        return value if flat else value - d._measure.log_prob(x)

    return energy


def _promoted(dtype: torch.dtype) -> torch.dtype:
    """Half precision runs in single."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


# Models ----------------------------------------------------------------------------------------


class _Tempering(Messenger):
    """Scales the energies of a model: observations, factors and the energies of energy sites.

    Ordinary priors keep their density, so that the law at 0 is the prior, and proper.
    """

    def __init__(self, beta: Tensor, latent: Collection[str]) -> None:
        super().__init__()
        self.beta, self.latent = beta, latent

    def _pyro_post_sample(self, msg: Any) -> None:
        fn = msg["fn"]
        if site_is_subsample(msg):
            return
        if msg["name"] not in self.latent:  # those are conditioned on, and look observed
            if msg["is_observed"]:
                msg["fn"] = _powered(fn, self.beta)
        elif isinstance(fn, GibbsBoltzmann):
            msg["fn"] = _powered(fn, self.beta, fn._measure.log_prob)


def _powered(fn: Any, beta: Tensor, base: Callable[[Tensor], Tensor] | None = None) -> Any:
    """Return a copy of a distribution, its density (beyond that of a base) to the power beta."""
    new = copy.copy(fn)

    def log_prob(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        total = fn.log_prob(x, *args, **kwargs)
        start = 0.0 if base is None else base(x)
        return start + beta * (total - start)

    new.log_prob = log_prob
    return new


def _of_model(model: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Potential:
    """Make the batched potential of a model, by tracing that of one chain and batching it."""
    bound = lambda: model(*args, **kwargs)
    try:
        with quiet():  # of no matter which strategy: starting points are drawn by `starts`
            _, potential, inverses, trace = initialize_model(
                bound, init_strategy=init_to_uniform, initial_params={}
            )
    except NotImplementedError as error:
        if "subsample" not in str(error):
            raise
        raise NotImplementedError(
            "target must use all of its data: a plate subsamples, and a Markov chain on a "
            "changing subset does not have the posterior as its law; leave subsample_size out"
        ) from error
    _check_data(trace)
    sites = _sites(trace, inverses)
    like = torch.cat([trace.nodes[n]["value"].detach().flatten() for n in sites])[:0]
    like = like.to(_promoted(like.dtype))

    def single(z: Tensor) -> Tensor:
        return potential(split(sites, z)).reshape(())

    def tempered_single(z: Tensor, beta: Tensor) -> Tensor:
        with _Tempering(beta, sites):
            return single(z)

    name = f"model {getattr(model, '__name__', type(model).__name__)!r}"
    energy, tempered = Batched(single), Batched(tempered_single)

    def check(z: Tensor) -> None:
        for chain in {0, len(z) - 1}:
            with contextlib.suppress(torch.linalg.LinAlgError), quiet(), torch.no_grad():
                _check_same(name, single(z[chain]), single(z[chain]))

    return Potential(energy, sites, like, bound, tempered, name, model, check)


def _sites(trace: poutine.Trace, inverses: Mapping[str, Transform]) -> dict[str, Site]:
    """Return the latent sites of a model, which are to be neither missing nor empty."""
    sites = {}
    for name, inverse in inverses.items():
        value = trace.nodes[name]["value"]
        free = torch.Size(inverse.inv.inverse_shape(value.shape))
        sites[name] = Site(value.shape, free, inverse.inv)
    if not sites:
        raise ValueError("target must have at least one continuous latent site, got none")
    empty = [name for name, site in sites.items() if not site.shape.numel()]
    if empty:
        raise ValueError(f"target must have components at every site, got none at {empty}")
    return sites


def _check_data(trace: poutine.Trace) -> None:
    """Refuse data outside of their distribution's support, such as NaN."""
    for name, node in trace.nodes.items():
        if node["type"] != "sample" or not node["is_observed"] or node["mask"] is not None:
            continue
        fn = node["fn"]
        if isinstance(fn, MaskedDistribution) or not hasattr(fn, "_validate_sample"):
            continue
        try:
            fn._validate_sample(node["value"])
        except NotImplementedError:  # no support is declared
            continue
        except ValueError as error:
            raise ValueError(f"site {name!r} must have data that are possible: {error}") from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No argument checks, no outer handlers, no warnings of tracers."""
    with warnings.catch_warnings(), pyro.validation_enabled(False), poutine.block():
        warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)
        with _Unchecked():
            yield


class _Unchecked(Messenger):
    """Switches off the argument checks of distributions that were made outside the model."""

    def _pyro_sample(self, msg: Any) -> None:
        fn = msg["fn"]
        if getattr(fn, "_validate_args", False) and not site_is_subsample(msg):
            msg["fn"] = unvalidated(fn)


def _pruned(graph: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """Drop what no result needs, such as the point at which a distribution probes its energy.

    It may be random, which vmap refuses; torch's own pruning keeps it for its side effect.
    """
    for node in reversed(list(graph.graph.nodes)):
        schema = getattr(node.target, "_schema", None)
        if not node.users and schema is not None and not schema.is_mutable:
            graph.graph.erase_node(node)
    graph.recompile()
    return graph


class Batched:
    """The energy of many chains, from a function of one chain.

    The function is traced once to a graph of tensor operations, which ``torch.func.vmap`` can
    batch (models with enumerated sites too, whose custom derivatives it cannot), and the
    batch is traced again, so that neither Python nor vmap remains in what is run. Where that
    fails, chains are evaluated one by one, with a warning that says why.
    """

    def __init__(self, single: Callable[..., Tensor]) -> None:
        self.single = single
        self.graphs: dict[tuple, Callable[..., Tensor] | None] = {}

    def __call__(self, *parts: Tensor) -> Tensor:
        key = tuple((p.shape, p.dtype, p.device) for p in parts)
        if key not in self.graphs:
            self.graphs[key] = self._trace(parts)
        graph = self.graphs[key]
        if graph is not None:
            return graph(*parts)
        with quiet():
            return torch.stack([self.single(*part) for part in zip(*parts, strict=True)])

    def _trace(self, parts: tuple[Tensor, ...]) -> Callable[..., Tensor] | None:
        plain = tuple(p.detach().clone() for p in parts)
        devices = {p.device for p in parts if p.is_cuda}
        try:  # random numbers are left as they are: a run that is resumed traces at another time
            with quiet(), torch.no_grad(), torch.random.fork_rng(devices):
                first = tuple(p[0] for p in plain)
                one = make_fx(self.single)(*first)
                try:
                    graph = make_fx(torch.func.vmap(one))(*plain)
                except RuntimeError:  # vmap refuses writes in place: turn them into values first
                    one = _pruned(make_fx(torch.func.functionalize(one))(*first))
                    graph = make_fx(torch.func.vmap(one))(*plain)
                for chain in (0, -1):
                    want = self.single(*(p[chain] for p in plain))
                    torch.testing.assert_close(
                        graph(*plain)[chain], want, rtol=1e-3, atol=1e-3, equal_nan=True
                    )
                return graph
        except Exception as error:
            reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            warnings.warn(
                f"chains of this model are evaluated one by one, since it cannot be traced and "
                f"batched ({reason})",
                stacklevel=2,
            )
            return None
