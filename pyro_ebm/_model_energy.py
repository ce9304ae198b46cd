"""Free energies of Pyro models: named sites are summed out by Pyro's own enumeration."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.distributions import Categorical
from pyro.infer.discrete import infer_discrete
from pyro.ops import packed
from pyro.ops.contract import contract_to_tensor
from pyro.ops.rings import LogRing
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn

from pyro_ebm._math import Minimum, check_positive_beta


class ModelFreeEnergy(nn.Module):
    r"""The free energy of a Pyro model, its finite sites summed out per data point.

    .. math:: F_\beta(x) = -\frac{1}{\beta} \log \sum_z p(x, z)^\beta ,
        \quad F_\infty(x) = \min_z -\log p(x, z)

    Pyro's tensor variable elimination does the sum, plates and ``pyro.markov`` included. A data
    point is a row of the plates that all latents are in; everything that is observed must be in
    them too. At :math:`\beta = 1` the free energy is minus the log-likelihood. A latent that is
    masked out counts as uniform, and not at all where what depends on it is masked out too. A
    scale that all sites share, as that of a subsample, is left out: a data point counts once.

    Args:
        model: The model; its arguments are those of the free energy.
        latents: The finite sites that are summed out; by default all that are not observed.
        beta: The inverse temperature of the joint energy, positive, or ``math.inf``.

    Raises:
        TypeError: If the model is not callable.
        ValueError: If beta is not positive; when called, if a latent is missing or not finite,
            another site is random, an observed one lies outside of the plates, or sites differ
            in their scales.

    References:
        | Tensor Variable Elimination for Plated Factor Graphs (Obermeyer et al., 2019)
        | https://arxiv.org/abs/1902.03210

    Example:
        >>> def model(x):
        ...     with pyro.plate("n", len(x)):
        ...         k = pyro.sample("k", dist.Categorical(torch.ones(2)))
        ...         pyro.sample("x", dist.Normal(torch.tensor([-1.0, 1.0])[k], 1.0), obs=x)
        >>> F = ebm.FreeEnergy.from_model(model, latents=["k"])
        >>> F(torch.tensor([0.0, 2.0]))
        tensor([1.4189, 2.0939])
    """

    def __init__(
        self,
        model: Callable[..., Any],
        latents: Sequence[str] | None = None,
        beta: float | Tensor = 1.0,
    ) -> None:
        super().__init__()
        if not callable(model):
            raise TypeError(f"model must be callable, got {type(model).__name__}")
        check_positive_beta(beta)
        self.model, self.beta = model, beta
        self.latents = None if latents is None else tuple(latents)

    @property
    def cold(self) -> bool:
        """Whether beta is infinite."""
        return not isinstance(self.beta, Tensor) and self.beta == math.inf

    def _trace(self, *args: Any, **kwargs: Any) -> _Joint:
        """Run the model with its latents enumerated; return its joint energy as factors."""
        with torch.random.fork_rng(devices=[]), torch.no_grad(), pyro.poutine.block():
            plain = poutine.trace(self.model).get_trace(*args, **kwargs)
        names = _latents(plain, self.latents)
        depth = max((-f.dim for name in _sites(plain) for f in _plates(plain, name)), default=0)
        model = poutine.infer_config(self.model, lambda site: _enumerate(site, names))
        with pyro.validation_enabled(False):
            trace = poutine.trace(poutine.enum(model, -1 - depth)).get_trace(*args, **kwargs)
            trace.compute_log_prob()
        trace.pack_tensors()
        return _Joint.of(trace, names, 1.0 if self.cold else self.beta)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the free energies of data points, in the shape of their plates.

        Args:
            *args: The model's arguments.
            **kwargs: Its keyword arguments.
        """
        if self.cold:  # by the envelope theorem: the energy at the minimum
            return self.minimum(*args, **kwargs).energy
        return -self._trace(*args, **kwargs).total() / self.beta

    def posterior(self, *args: Any, **kwargs: Any) -> dict[str, Categorical]:
        r"""Return the marginal of each latent given data points, :math:`\propto p(x, z)^\beta`.

        Args:
            *args: The model's arguments.
            **kwargs: Its keyword arguments.

        Raises:
            ValueError: If beta is infinite: ask for :meth:`minimum`.
        """
        if self.cold:
            raise ValueError("beta must be finite for a posterior, got inf: call minimum(x)")
        with torch.enable_grad():
            joint = self._trace(*args, **kwargs)
            leaves = [_leaf(joint.terms[name]) for name in joint.latents]
            joint.terms.update(zip(joint.latents, leaves, strict=True))
            shares = torch.autograd.grad(joint.total().sum(), leaves)
        pairs = zip(joint.latents, shares, strict=True)
        return {name: joint.marginal(name, share) for name, share in pairs}

    def minimum(self, *args: Any, **kwargs: Any) -> Minimum:
        """Return the latents of least energy given data points, by Pyro's ``infer_discrete``.

        Args:
            *args: The model's arguments.
            **kwargs: Its keyword arguments.

        Returns:
            A minimum whose ``x`` has the values of the latents by name.

        Raises:
            NotImplementedError: If a latent is a vector, which ``infer_discrete`` cannot index.
        """
        joint = self._trace(*args, **kwargs)
        vectors = [n for n in joint.latents if joint.trace.nodes[n]["fn"].event_shape]
        if vectors:
            raise NotImplementedError(
                f"the minimum needs latents that are scalars, got the vectors {vectors}: declare "
                "a Categorical and index with it in the place of a OneHotCategorical"
            )
        model = poutine.infer_config(self.model, lambda site: _enumerate(site, joint.latents))
        best = infer_discrete(model, first_available_dim=joint.first_dim, temperature=0)
        found = poutine.trace(best).get_trace(*args, **kwargs)
        in_plates = {name: _value(found, joint.trace, name) for name in joint.latents}
        at = poutine.trace(poutine.condition(self.model, in_plates)).get_trace(*args, **kwargs)
        at.compute_log_prob()
        at.pack_tensors()
        energy = -_Joint.of(at, joint.latents, 1.0).total()
        ones = torch.ones_like(energy.detach())
        sizes = {name: [f.size for f in _plates(joint.trace, name)] for name in in_plates}
        x = {name: value.reshape(torch.Size(sizes[name])) for name, value in in_plates.items()}
        return Minimum(x, energy, ones.bool(), ones.long(), 0 * ones)


class _Ring(LogRing):
    """Pyro's ring of log-sum-exp, without underflow."""

    _backend = "pyro_ebm._log_einsum"


class _Joint(NamedTuple):
    """The factors of a joint energy by site, packed: ``terms`` are the log-factors times beta.

    ``plates`` are those of each site, by symbol, ``point`` those of a data point.
    """

    trace: poutine.Trace
    latents: tuple[str, ...]
    terms: dict[str, Tensor]
    plates: dict[str, frozenset[str]]
    point: frozenset[str]

    @classmethod
    def of(cls, trace: poutine.Trace, latents: tuple[str, ...], beta: float | Tensor) -> _Joint:
        """Read the factors off a trace."""
        plates = {
            name: frozenset(trace.plate_to_symbol[f.name] for f in _plates(trace, name))
            for name in _sites(trace)
        }
        _check_scales(trace)
        point = frozenset.intersection(*(plates[name] for name in latents))
        terms = {}
        for name in plates:
            if not point <= plates[name]:
                raise ValueError(
                    f"site {name!r} must lie in all plates of the latents {list(latents)}: it is "
                    "no part of a single data point. If it was conditioned on, hide it "
                    "(pyro.poutine.block)"
                )
            part = trace.nodes[name]["packed"]
            log_prob = packed.scale_and_mask(part["unscaled_log_prob"], mask=part["mask"])
            term = _named(beta * log_prob, _dims(log_prob))
            own = trace.nodes[name]["infer"].get("_enumerate_symbol") if name in latents else None
            terms[name] = term if own is None else _uniform_where_masked(term, part["mask"], own)
        return cls(trace, latents, terms, plates, point)

    @property
    def first_dim(self) -> int:
        """The first dimension to the left of all plates."""
        return max(self.trace.nodes[name]["infer"]["_enumerate_dim"] for name in self.latents)

    def total(self) -> Tensor:
        """Sum out what is enumerated; return the log of the sum for each data point."""
        tree: OrderedDict[frozenset[str], list[Tensor]] = OrderedDict()
        sizes: dict[str, int] = {}
        for name, term in self.terms.items():
            tree.setdefault(self.plates[name], []).append(term)
            sizes.update(zip(_dims(term), term.shape, strict=True))
        for frame in self._frames():  # packing drops dimensions of size one
            sizes[self.trace.plate_to_symbol[frame.name]] = frame.size
        nodes = [self.trace.nodes[name] for name in self.latents]
        summed = {n["infer"]["_enumerate_symbol"] for n in nodes if not n["is_observed"]}
        ring = _Ring(dim_to_size=sizes)
        total = contract_to_tensor(tree, summed, self.point, ring=ring)
        order = [self.trace.plate_to_symbol[frame.name] for frame in self._frames()]
        return total.permute([_dims(total).index(symbol) for symbol in order])

    def _frames(self) -> list[Any]:
        """Return the plates of a data point, from the left."""
        symbols = self.trace.plate_to_symbol
        first = self.latents[0]
        return [f for f in _plates(self.trace, first) if symbols[f.name] in self.point]

    def marginal(self, name: str, share: Tensor) -> Categorical:
        """Return the marginal of a latent, from the joint marginal of its factor."""
        dims = _dims(self.terms[name])
        own = self.trace.nodes[name]["infer"]["_enumerate_symbol"]
        symbols = [self.trace.plate_to_symbol[f.name] for f in _plates(self.trace, name)]
        keep = [s for s in symbols if s in dims] + [own]
        spare = [i for i, symbol in enumerate(dims) if symbol not in keep]
        left = [s for s in dims if s in keep]
        probs = share.sum(spare) if spare else share
        probs = probs.permute([left.index(s) for s in keep])
        return Categorical(probs.reshape(*(f.size for f in _plates(self.trace, name)), -1))


def _check_scales(trace: poutine.Trace) -> None:
    """Refuse scales that sites do not share: a power of some factors is another model."""
    scales = {name: trace.nodes[name]["scale"] for name in _sites(trace)}
    if len({tuple(torch.as_tensor(scale).reshape(-1).tolist()) for scale in scales.values()}) > 1:
        raise ValueError(f"sites must share one scale, got {scales}")


def _uniform_where_masked(term: Any, mask: Any, own: str) -> Any:
    """Let a latent that is masked out count as one state, not as the number of its states."""
    if mask is None or mask is True or own not in _dims(term):
        return term
    away = -math.log(term.shape[_dims(term).index(own)])
    if mask is False:
        return _named(term + away, _dims(term))
    wide, kept = packed.broadcast_all(term, mask)
    return _named(torch.where(kept, wide, away), _dims(wide))


def _value(found: poutine.Trace, trace: poutine.Trace, name: str) -> Tensor:
    """Return a value whose plates have their dimensions, which Pyro may squeeze or forget."""
    sizes = {frame.dim: frame.size for frame in _plates(trace, name)}
    shape = [sizes.get(dim, 1) for dim in range(min(sizes, default=0), 0)]
    return found.nodes[name]["value"].detach().reshape(torch.Size(shape))


def _dims(term: Any) -> str:
    """Return the symbols of a packed tensor's dimensions."""
    return term._pyro_dims


def _named(x: Any, dims: str) -> Tensor:
    x._pyro_dims = dims
    return x


def _leaf(term: Tensor) -> Tensor:
    return _named(term.detach().clone().requires_grad_(), _dims(term))


def _sites(trace: poutine.Trace) -> list[str]:
    nodes = trace.nodes.items()
    return [n for n, s in nodes if s["type"] == "sample" and not site_is_subsample(s)]


def _plates(trace: poutine.Trace, name: str) -> list[Any]:
    """Return the vectorised plates of a site, from the left."""
    frames = [f for f in trace.nodes[name]["cond_indep_stack"] if f.vectorized]
    return sorted(frames, key=lambda frame: frame.dim)


def _enumerate(site: Any, names: Sequence[str]) -> dict[str, Any]:
    return {"enumerate": "parallel"} if site["name"] in names else {}


def _latents(trace: poutine.Trace, wanted: tuple[str, ...] | None) -> tuple[str, ...]:
    """Return the latents to sum out, all that are random, and refuse what cannot be."""
    random = [name for name in _sites(trace) if not trace.nodes[name]["is_observed"]]
    names = tuple(random) if wanted is None else wanted
    missing = [name for name in names if name not in random]
    if missing or not names:
        raise ValueError(f"latents must be among the latent sites {random}, got {list(names)}")
    other = [name for name in random if name not in names]
    if other:
        raise ValueError(
            f"model must have no latent sites but {list(names)}, got {other} too: condition on "
            "them (pyro.poutine.condition, and pyro.poutine.block where they lie outside of the "
            "plates of a data point)"
        )
    endless = [name for name in names if not trace.nodes[name]["fn"].has_enumerate_support]
    if endless:
        raise ValueError(f"latents must have finite supports, got {endless}")
    return names
