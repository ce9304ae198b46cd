"""Chains on their way to ArviZ: what of a run is known, and what its model says of each draw."""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import pyro
import torch
from pyro import distributions as dist
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.infer.mcmc import MCMC, StreamingMCMC
from pyro.infer.mcmc.util import initialize_model
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_ebm._arviz import (
    DATA_GROUPS,
    PRIOR_GROUPS,
    convergence_warnings,
    to_inference_data,
)

__all__ = ["ConvergenceWarning", "convergence_warnings", "to_arviz"]


class ConvergenceWarning(UserWarning):
    """What makes draws unfit for use, or not yet fit."""


Groups = dict[str, dict[str, np.ndarray]]

# Draws that go through a model at once, and the most log-likelihoods that are computed unasked.
_AT_ONCE = 100
_MOST = 10**8


def to_arviz(
    mcmc_or_chains: MCMC | Mapping[str, Tensor],
    *,
    log_likelihood: bool | Mapping[str, Tensor] | None = None,
    dims: Mapping[str, list[str]] | None = None,
    coords: Mapping[str, Any] | None = None,
    **groups: Mapping[str, Tensor],
) -> Any:
    r"""Hand chains to ArviZ, with all that is known of the run.

    A run gives ``posterior``, ``sample_stats``, and, if its kernel has a model, ``observed_data``
    and ``log_likelihood``: for each observed site, :math:`\log p(y_i \mid \theta)` of each point
    :math:`i` of its batch shape, without the site's scale, and 0 where it is masked out.

    ``sample_stats`` holds what the kernel has, and nothing made up. With
    :class:`pyro_ebm.infer.RecordedNUTS` and :class:`~pyro_ebm.infer.RecordedHMC` that is all of
    it. Pyro's stock kernels keep no energies (``az.plot_energy`` and ``az.bfmi`` need them),
    acceptance rates or tree depths; with them there are

    * ``lp``: minus the potential of the run's kernel at the draw, computed again: the log joint
      density in unconstrained coordinates (with :math:`\log|\det|` of the Jacobian, scales and
      masks as in the run, enumerated sites summed out, and without the :math:`\log Z` of an
      unnormalised site). It is left out where ``save_params`` kept a part of the sites only;
    * ``diverging``, where the kernel looks for divergences;
    * ``step_size`` of a single chain, read from the kernel: that of the kernel's latest run.

    Args:
        mcmc_or_chains: A :class:`pyro.infer.MCMC` that has run, or draws by name, of shape
            ``(chains, draws, *event)``.
        log_likelihood: ``None`` computes it where the model allows and warns where not, ``True``
            insists, ``False`` leaves it out; or the values, by name.
        dims: Maps sites to the names of their event dimensions.
        coords: Maps dimensions to the labels along them.
        **groups: Further groups by ArviZ's names, such as ``posterior_predictive``, ``prior``,
            ``constant_data``. Draws may come as from :class:`~pyro.infer.Predictive`, with one
            leading dimension. Sites of ``prior`` that are observed go to ``prior_predictive``.

    Returns:
        An ``arviz.InferenceData`` with ArviZ 0.2x, an ``xarray.DataTree`` from 1.0 on.

    Raises:
        TypeError: If there are no draws in what is given, as in a ``StreamingMCMC``.
        ValueError: If the run has not run, a group is unknown or does not fit, or
            ``log_likelihood=True`` cannot be had.

    Example:
        >>> from pyro_ebm.infer import RecordedNUTS
        >>> def model(y):
        ...     mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("n", len(y)):
        ...         pyro.sample("y", dist.Normal(mean, 1.0), obs=y)
        >>> kernel = RecordedNUTS(model)
        >>> mcmc = pyro.infer.MCMC(kernel, 20, warmup_steps=20, disable_progbar=True)
        >>> mcmc.run(torch.tensor([0.3, 0.9]))
        >>> data = to_arviz(mcmc, dims={"y": ["day"]})
        >>> data["log_likelihood"]["y"].sizes
        Frozen({'chain': 1, 'draw': 20, 'day': 2})
    """
    if isinstance(mcmc_or_chains, MCMC):
        found = _groups_of_run(mcmc_or_chains, log_likelihood)
    elif hasattr(mcmc_or_chains, "sample_stats"):
        found = _groups_of_batch(mcmc_or_chains, log_likelihood)
    elif isinstance(mcmc_or_chains, Mapping):
        found = {"posterior": {n: _array(v) for n, v in mcmc_or_chains.items()}}
        if log_likelihood is True:
            raise ValueError("log_likelihood=True needs a run of a model, got draws by name")
    elif isinstance(mcmc_or_chains, StreamingMCMC):
        raise TypeError("a StreamingMCMC keeps no draws, only statistics: use pyro.infer.MCMC")
    else:
        got = type(mcmc_or_chains).__name__
        raise TypeError(f"mcmc_or_chains must be a pyro.infer.MCMC or a mapping, got {got}")
    if isinstance(log_likelihood, Mapping):
        groups["log_likelihood"] = log_likelihood
    _add_given(found, groups)
    return to_inference_data(found, dims=dims, coords=coords)


def _array(value: Any) -> np.ndarray:
    return value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)


def _add_given(found: Groups, given: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Add the caller's groups, which win over what was found."""
    if "posterior" in given:
        raise ValueError("the group 'posterior' is the first argument")
    shape = next((a.shape[:2] for a in found["posterior"].values()), (1, 0))
    for group, variables in given.items():
        arrays = {name: _array(value) for name, value in variables.items()}
        if group in PRIOR_GROUPS:
            arrays = {name: a[None] for name, a in arrays.items()}
        elif group not in DATA_GROUPS:
            arrays = {
                name: _by_chain(f"{group}[{name!r}]", a, shape) for name, a in arrays.items()
            }
        found[group] = found.get(group, {}) | arrays
    if "prior" in found and "prior_predictive" not in found:
        observed = found.get("observed_data", {}) | found.get("posterior_predictive", {})
        prior = found["prior"]
        found["prior"] = {n: a for n, a in prior.items() if n not in observed}
        found["prior_predictive"] = {n: a for n, a in prior.items() if n in observed}


def _by_chain(what: str, a: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Split the draws of all chains, one after the other, by chain."""
    if a.shape[:2] == shape:
        return a
    if a.ndim and a.shape[0] == shape[0] * shape[1]:
        return a.reshape(*shape, *a.shape[1:])
    raise ValueError(
        f"{what} must lead with chains and draws, {shape}, or with {shape[0] * shape[1]} draws, "
        f"got shape {a.shape}"
    )


# What a run knows ------------------------------------------------------------------------------


class _Run(NamedTuple):
    """A model with the arguments of its run, and the draws of all chains, one after the other."""

    model: Callable[..., Any]
    args: tuple
    kwargs: dict[str, Any]
    draws: dict[str, Tensor]
    shape: tuple[int, int]

    def trace(self, draw: dict[str, Tensor]) -> poutine.Trace:
        conditioned = poutine.condition(self.model, data=draw)
        return poutine.trace(conditioned).get_trace(*self.args, **self.kwargs)


def _groups_of_run(mcmc: MCMC, log_likelihood: bool | Mapping[str, Tensor] | None) -> Groups:
    if mcmc._samples is None:
        raise ValueError("mcmc must have run: call mcmc.run(...) first")
    samples = mcmc.get_samples(group_by_chain=True)
    found = {"posterior": {name: _array(value) for name, value in samples.items()}}
    with _as_in_the_run(samples):
        found["sample_stats"] = _sample_stats(mcmc, samples)
        model = getattr(mcmc.kernel, "model", None)
        if model is None and log_likelihood is True:
            raise ValueError("log_likelihood=True needs a model, the kernel has a potential_fn")
        if model is not None:
            draws = {name: value.flatten(0, 1) for name, value in samples.items()}
            shape = mcmc.num_chains, mcmc.num_samples
            run = _Run(model, mcmc._args, mcmc._kwargs, draws, shape)
            with _left_out("observed_data and log_likelihood", log_likelihood is True):
                found |= _groups_of_model(run, log_likelihood)
    return found


def _groups_of_batch(mcmc: Any, log_likelihood: bool | Mapping[str, Tensor] | None) -> Groups:
    """What a run of :class:`pyro_ebm.MCMC` knows."""
    samples = mcmc.get_samples(group_by_chain=True)
    found = {"posterior": {name: _array(value) for name, value in samples.items()}}
    found["sample_stats"] = {name: _array(value) for name, value in mcmc.sample_stats.items()}
    model = mcmc.model
    if model is None and log_likelihood is True:
        raise ValueError("log_likelihood=True needs a model, the target is a distribution")
    if model is not None and samples:
        first = next(iter(samples.values()))
        draws = {name: value.flatten(0, 1) for name, value in samples.items()}
        shape = first.shape[0], first.shape[1]
        run = _Run(model, mcmc._args, mcmc._kwargs, draws, shape)
        insist = log_likelihood is True
        with _as_in_the_run(samples), _left_out("observed_data and log_likelihood", insist):
            found |= _groups_of_model(run, log_likelihood)
    return found


@contextmanager
def _as_in_the_run(samples: Mapping[str, Tensor]) -> Iterator[None]:
    """No gradients, no outer handlers, no argument checks, and the random state as it was."""
    devices = {value.device.index for value in samples.values() if value.is_cuda}
    with (
        torch.no_grad(),
        torch.random.fork_rng(devices),
        poutine.block(),
        pyro.validation_enabled(False),
    ):
        yield


@contextmanager
def _left_out(what: str, insist: bool = False) -> Iterator[None]:
    """Turn a failure into a warning that ``what`` is left out, unless one insists."""
    try:
        yield
    except Exception as error:
        if insist:
            raise
        reason = f"{type(error).__name__}: {error}"
        warnings.warn(f"to_arviz leaves out {what}: {reason}", stacklevel=6)


def _sample_stats(mcmc: MCMC, samples: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    # In the order of the chains, and without the R-hats that `mcmc.diagnostics()` computes.
    by_chain = mcmc._diagnostics
    if all("sample_stats" in chain for chain in by_chain):
        recorded = [chain["sample_stats"] for chain in by_chain]
        return {name: np.stack([stats[name] for stats in recorded]) for name in recorded[0]}
    shape = mcmc.num_chains, mcmc.num_samples
    stats: dict[str, np.ndarray] = {}
    with _left_out("lp"):
        stats |= _lp(mcmc, samples)
    if all("divergences" in chain for chain in by_chain):
        stats["diverging"] = np.zeros(shape, bool)
        for diverging, chain in zip(stats["diverging"], by_chain, strict=True):
            diverging[chain["divergences"]] = True
    step_size = getattr(mcmc.kernel, "step_size", None)
    if mcmc.num_chains == 1 and step_size is not None:
        stats["step_size"] = np.full(shape, step_size)
    return stats


def _lp(mcmc: MCMC, samples: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """Minus the potential of each draw, in the coordinates in which the kernel moves."""
    kernel = mcmc.kernel
    transforms = mcmc.transforms
    z = {n: transforms[n](x) if n in transforms else x for n, x in samples.items()}
    draws = {name: value.flatten(0, 1) for name, value in z.items()}
    potential = getattr(kernel, "potential_fn", None)
    if getattr(kernel, "model", None) is not None:
        # Built again: a kernel that has run again since has another run's arguments in its own.
        _, potential, sites, _ = initialize_model(
            kernel.model,
            mcmc._args,
            mcmc._kwargs,
            transforms=getattr(kernel, "transforms", None),
            max_plate_nesting=getattr(kernel, "_max_plate_nesting", None),
            initial_params={name: value[0] for name, value in draws.items()},
        )
        if set(sites) != set(draws):
            return {}
    if potential is None or not draws:
        return {}
    lp = _each_draw(lambda draw: {"lp": -potential(draw)}, draws)["lp"]
    return {"lp": _array(lp).reshape(mcmc.num_chains, mcmc.num_samples)}


def _each_draw(
    function: Callable[[dict[str, Tensor]], dict[str, Tensor]], draws: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Apply ``function`` to each draw, many at once where that is possible."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)
            return torch.func.vmap(function, chunk_size=_AT_ONCE)(draws)
    except Exception:  # whatever stands in the way of all at once; one by one is the reference
        num_draws = len(next(iter(draws.values())))
        each = [function({n: v[i] for n, v in draws.items()}) for i in range(num_draws)]
        return {name: torch.stack([values[name] for values in each]) for name in each[0]}


# What the model knows --------------------------------------------------------------------------


def _groups_of_model(run: _Run, log_likelihood: bool | Mapping[str, Tensor] | None) -> Groups:
    trace = run.trace({name: value[0] for name, value in run.draws.items()})
    sites = {n: s for n, s in trace.nodes.items() if n not in run.draws and _is_data(s)}
    found = {"observed_data": {name: _array(site["value"]) for name, site in sites.items()}}
    if log_likelihood is True and not sites:
        raise ValueError("log_likelihood=True needs an observed site, the model has none")
    if log_likelihood in (None, True) and sites:
        with _left_out("log_likelihood", log_likelihood is True):
            found["log_likelihood"] = _log_likelihood(run, trace, sites, bool(log_likelihood))
    return found


def _is_data(site: Mapping[str, Any]) -> bool:
    """Whether a site is observed, and not a factor, a deterministic one or a plate's."""
    if site["type"] != "sample" or not site["is_observed"]:
        return False
    return not isinstance(_inmost(site["fn"]), dist.Delta | dist.Unit)


def _inmost(fn: Any) -> Any:
    """What is left of a distribution without masks, plates and dimensions of the event."""
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return fn


def _log_likelihood(
    run: _Run, trace: poutine.Trace, sites: Mapping[str, Any], insist: bool
) -> dict[str, np.ndarray]:
    free = [name for name, site in trace.iter_stochastic_nodes() if not site_is_subsample(site)]
    if free or not run.draws:
        raise ValueError(f"the sites {free} are neither observed nor among the draws")
    for name, site in sites.items():
        if not getattr(_inmost(site["fn"]), "is_normalized", True):
            raise ValueError(f"the site {name!r} has no log Z: give it a log_partition")

    def pointwise(draw: dict[str, Tensor]) -> dict[str, Tensor]:
        nodes = run.trace(draw).nodes
        return {name: _log_prob(nodes[name]) for name in sites}

    num_draws = run.shape[0] * run.shape[1]
    size = num_draws * sum(_log_prob(site).numel() for site in sites.values())
    if size > _MOST and not insist:
        raise ValueError(f"it has {size:.1e} values; log_likelihood=True computes them")
    values = _each_draw(pointwise, run.draws)
    return {n: _array(v).reshape(*run.shape, *v.shape[1:]) for n, v in values.items()}


def _log_prob(site: Mapping[str, Any]) -> Tensor:
    log_prob = site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])
    return scale_and_mask(log_prob, mask=site["mask"])
