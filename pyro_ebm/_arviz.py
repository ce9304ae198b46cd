"""The door to ArviZ, without torch: arrays go in as groups, warnings about chains come out."""

import warnings
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import Any

import numpy as np

__all__ = ["convergence_warnings", "to_inference_data"]

Arrays = Mapping[str, np.ndarray]

# The groups of ArviZ's schema that are understood; those of draws lead with (chain, draw).
POSTERIOR_GROUPS = (
    "posterior",
    "sample_stats",
    "log_likelihood",
    "log_prior",
    "posterior_predictive",
    "predictions",
)
PRIOR_GROUPS = ("prior", "prior_predictive", "sample_stats_prior")
DATA_GROUPS = ("observed_data", "constant_data", "predictions_constant_data")

# Vehtari et al. (2021) for R-hat and the sample size, Betancourt (2016) for E-BFMI.
_R_HAT = 1.01
_ESS_PER_CHAIN = 100
_E_BFMI = 0.3
# A random walk at its best accepts .234 of its moves, a sound HMC far more.
_MOVES = 0.05
_SPREAD = 0.01
_RUNAWAY = 1e8


def to_inference_data(
    groups: Mapping[str, Arrays],
    *,
    dims: Mapping[str, list[str]] | None = None,
    coords: Mapping[str, Any] | None = None,
) -> Any:
    """Put groups of arrays into the container of the ArviZ that is installed.

    A ``/`` in a name becomes a ``.``, as xarray and netCDF refuse it. Empty groups are left out.

    Args:
        groups: Maps names of ArviZ's groups to variables: arrays of shape
            ``(chains, draws, *event)``, in groups of data ``(*event,)``.
        dims: Maps variables to the names of their event dimensions.
        coords: Maps dimensions to the labels along them, by default 0, 1, ...

    Returns:
        An ``arviz.InferenceData`` with ArviZ 0.2x, an ``xarray.DataTree`` from 1.0 on.

    Raises:
        ValueError: If a group is unknown, a shape does not fit, or there is nothing to put in.

    Example:
        >>> data = to_inference_data({"posterior": {"x": np.zeros((4, 100, 2))}})
        >>> data["posterior"]["x"].dims
        ('chain', 'draw', 'x_dim_0')
    """
    import xarray

    known = (*POSTERIOR_GROUPS, *PRIOR_GROUPS, *DATA_GROUPS)
    for group in groups:
        if group not in known:
            raise ValueError(f"groups must be among {', '.join(known)}, got {group!r}")
    axes = {_label(name): list(names) for name, names in (dims or {}).items()}
    datasets = {g: _dataset(g, a, axes, coords or {}) for g, a in groups.items() if a}
    if not datasets:
        raise ValueError("groups must hold at least one variable, got none")
    _check_draws(datasets)
    tree = xarray.DataTree.from_dict(datasets)
    arviz = _import_arviz()
    return arviz.from_datatree(tree) if hasattr(arviz, "from_datatree") else tree


def _import_arviz() -> ModuleType:
    """Import ArviZ, which takes seconds, without its daily announcement of version 1."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"\s*ArviZ is undergoing", FutureWarning)
        import arviz
    return arviz


def _label(name: str) -> str:
    return name.replace("/", ".")


def _dataset(group: str, arrays: Arrays, dims: Mapping[str, list], coords: Mapping) -> Any:
    import xarray

    variables: dict[str, tuple] = {}
    sizes: dict[str, int] = {}
    for name, array in arrays.items():
        label = _label(name)
        if label in variables:
            raise ValueError(f"{group}: names must differ in more than '/' and '.', got {name!r}")
        axes = _dimensions(group, name, array, dims.get(label))
        for axis, size in zip(axes, array.shape, strict=True):
            if sizes.setdefault(axis, size) != size:
                raise ValueError(
                    f"{group}: dimension {axis!r} must have one size, "
                    f"got {sizes[axis]} and, in {name!r}, {size}"
                )
        variables[label] = axes, array
    for axis, size in sizes.items():
        if axis in variables:
            raise ValueError(f"{group}: a variable must not be called {axis!r}, as a dimension is")
        if axis in coords and len(coords[axis]) != size:
            raise ValueError(f"coords[{axis!r}] must have {size} labels, got {len(coords[axis])}")
    labels = {axis: coords.get(axis, np.arange(size)) for axis, size in sizes.items()}
    return xarray.Dataset(variables, coords=labels)


def _dimensions(group: str, name: str, array: np.ndarray, given: list | None) -> list[str]:
    """The names of all dimensions of a variable."""
    lead = [] if group in DATA_GROUPS else ["chain", "draw"]
    rank = array.ndim - len(lead)
    if rank < 0:
        raise ValueError(
            f"{group}[{name!r}] must have shape (chains, draws, *event), got {array.shape}"
        )
    if given is None:
        given = [f"{_label(name)}_dim_{i}" for i in range(rank)]
    elif group == "log_likelihood":
        given = given[:rank]  # the variable's event dimensions are summed out
    if len(given) != rank:
        raise ValueError(f"dims[{name!r}] must name {rank} dimensions in {group}, got {given}")
    return [*lead, *given]


def _check_draws(datasets: Mapping[str, Any]) -> None:
    """What belongs to draws of the posterior has as many of them."""
    if "posterior" not in datasets:
        return
    want = {axis: datasets["posterior"].sizes[axis] for axis in ("chain", "draw")}
    for group in set(datasets) & {"sample_stats", "log_likelihood", "log_prior"}:
        got = {axis: datasets[group].sizes[axis] for axis in ("chain", "draw")}
        if got != want:
            raise ValueError(f"{group} must have the posterior's sizes {want}, got {got}")


# Warnings -------------------------------------------------------------------------------------


def convergence_warnings(idata: Any) -> list[str]:
    r"""Say in plain words why chains should not be trusted yet.

    It looks for draws that diverged or reached the maximum tree depth, a low energy fraction
    (E-BFMI below 0.3), :math:`\hat R` above 1.01, fewer than 100 effective draws per chain (in
    the bulk or in the tails), chains that run away (not finite, or beyond :math:`10^8`), and
    frozen chains (moved in fewer than one draw of twenty, or spread a hundredth of the others'),
    which :math:`\hat R` does not see among many. A single chain is compared with itself, first
    half against second. What needs a statistic that was not recorded is left out.

    Args:
        idata: An ``InferenceData`` or ``DataTree`` with a group ``posterior`` and, for the
            warnings of the sampler, ``sample_stats``.

    Returns:
        One sentence or two for each finding, with variable or chain, value and a next step; none
        for chains in order.

    Raises:
        ValueError: If there is no group ``posterior`` of chains and draws.

    References:
        | Rank-normalization, folding, and localization: an improved R-hat (Vehtari et al., 2021)
        | https://arxiv.org/abs/1903.08008
        | Diagnosing Suboptimal Cotangent Disintegrations in HMC (Betancourt, 2016)
        | https://arxiv.org/abs/1604.00695

    Example:
        >>> x = np.random.default_rng(0).normal(size=(4, 500))
        >>> convergence_warnings(to_inference_data({"posterior": {"x": x}}))
        []
        >>> x[2] = x[2, 0]
        >>> convergence_warnings(to_inference_data({"posterior": {"x": x}}))[0]
        'Frozen: chain 2 hardly moves (0 of 499 moves changed anything). Take other starting ...'
    """
    position = _variables(idata, "posterior")
    if not position:
        raise ValueError("idata must have a group 'posterior' of chains and draws")
    stats = _variables(idata, "sample_stats")
    finite = {name: a for name, a in position.items() if a.size and np.isfinite(a).all()}
    return [
        *_divergences(stats),
        *_tree_depths(stats),
        *_energy_fractions(stats),
        *_runaways(position),
        *_frozen_chains(position, finite),
        *_mixing(finite),
    ]


def _variables(idata: Any, group: str) -> dict[str, np.ndarray]:
    """The variables of a group that have chains and draws, which come first."""
    if group not in idata:
        return {}
    found = {str(name): a for name, a in idata[group].data_vars.items()}
    return {
        name: a.transpose("chain", "draw", ...).values
        for name, a in found.items()
        if {"chain", "draw"} <= set(a.dims)
    }


def _list(chains: np.ndarray, what: Any = None) -> str:
    """Chains, and what there is to say of each, at most five of them."""
    shown = [f"chain {c}" + ("" if what is None else f": {what[c]}") for c in chains[:5]]
    more = [] if len(chains) <= 5 else [f"and {len(chains) - 5} more"]
    return ", ".join(shown + more)


def _divergences(stats: Arrays) -> Iterator[str]:
    diverging = stats.get("diverging", np.zeros((0, 0))).astype(bool)
    if diverging.any():
        count = diverging.sum(1)
        yield (
            f"Divergences: {count.sum()} of {diverging.size} draws "
            f"({_list(np.flatnonzero(count), count)}). The chains miss part of the target: raise "
            "target_accept_prob towards 0.99, or choose coordinates in which the scales are alike."
        )


def _tree_depths(stats: Arrays) -> Iterator[str]:
    reached = stats.get("reached_max_treedepth", np.zeros((0, 0))).astype(bool)
    if reached.any():
        count = reached.sum(1)
        yield (
            f"Maximum tree depth: reached in {count.sum()} of {reached.size} draws "
            f"({_list(np.flatnonzero(count), count)}). The moves are cut short: warm up longer, "
            "rescale the variables, or raise max_tree_depth."
        )


def _energy_fractions(stats: Arrays) -> Iterator[str]:
    energy = stats.get("energy", np.zeros((1, 1))).astype(float)
    with np.errstate(all="ignore"):  # a frozen chain has no variance, and its own warning
        moves = np.square(np.diff(energy, axis=1)).sum(1)
        fraction = moves / np.square(energy - energy.mean(1, keepdims=True)).sum(1)
    low = np.flatnonzero(fraction < _E_BFMI)
    if low.size:
        yield (
            f"E-BFMI below {_E_BFMI}: {_list(low, fraction.round(2))}. The tails are explored "
            "slowly: warm up longer, or choose coordinates in which the tails are lighter."
        )


def _runaways(position: Arrays) -> Iterator[str]:
    for name, a in position.items():
        finite = np.isfinite(a)
        event = tuple(range(1, a.ndim))
        if not finite.all():
            count = (~finite).sum(event)
            yield (
                f"Runaway: {count.sum()} of {a.size} values of {name!r} are not finite "
                f"({_list(np.flatnonzero(count), count)}). Check that the energy is finite, has "
                "the right sign and grows far out, or give it a base that decays."
            )
            continue
        far = np.abs(a).max(event, initial=0)
        if (far > _RUNAWAY).any():
            yield (
                f"Runaway: {name!r} reaches {far.max():.1e} in chain {far.argmax()}. The density "
                "may have no finite integral: check the energy's sign, or give it a base that "
                "decays. If the variable is of that scale, measure it in larger units."
            )


def _frozen_chains(position: Arrays, finite: Arrays) -> Iterator[str]:
    """Chains whose position, all variables together, stays or all but stays."""
    num_chains, num_draws = next(iter(position.values())).shape[:2]
    if num_draws < 2:
        return
    moved = np.zeros((num_chains, num_draws - 1), bool)
    for a in position.values():
        moved |= (a[:, 1:] != a[:, :-1]).any(tuple(range(2, a.ndim)))
    stuck = moved.mean(1) < _MOVES
    step = "Take other starting points, a smaller step size, or one that varies between draws."
    if stuck.any():
        count = [f"{n} of {num_draws - 1} moves changed anything" for n in moved.sum(1)]
        if stuck.sum() == 1:
            chain = stuck.argmax()
            yield f"Frozen: chain {chain} hardly moves ({count[chain]}). {step}"
        else:
            who = _list(np.flatnonzero(stuck), count)
            yield f"Frozen: {stuck.sum()} of {num_chains} chains hardly move ({who}). {step}"
    ratio = _spread(finite, num_chains)
    narrow = (ratio < _SPREAD) & ~stuck
    if narrow.any():
        value = [f"spread {r:.1e} of the others'" for r in ratio]
        yield f"Frozen: {_list(np.flatnonzero(narrow), value)}. {step}"


def _spread(finite: Arrays, num_chains: int) -> np.ndarray:
    """Each chain's standard deviation over that of the median chain, in its widest direction."""
    ratio = np.zeros(num_chains)
    for a in finite.values():
        spread = a.reshape(*a.shape[:2], -1).astype(float).std(1)
        usual = np.median(spread, axis=0)
        if (usual > 0).any():
            ratio = np.maximum(ratio, (spread / np.where(usual > 0, usual, np.inf)).max(1))
    return ratio if ratio.any() else np.ones(num_chains)


def _mixing(finite: Arrays) -> Iterator[str]:
    """R-hat and effective sample sizes, for each variable where they are worst."""
    arviz = _import_arviz()
    for name, a in finite.items():
        num_chains, num_draws = a.shape[:2]
        if num_draws < 8:
            yield (
                f"Too short: {name!r} has {num_draws} draws in a chain; R-hat and effective "
                "sample sizes need at least 8. Draw more."
            )
            continue
        half = num_draws // 2
        chains = a if num_chains > 1 else a[0, : 2 * half].reshape(2, half, *a.shape[2:])
        data = _dataset("posterior", {"a": chains.astype(float)}, {}, {})
        with np.errstate(all="ignore"):  # of a constant R-hat is NaN; the frozen are named above
            r_hat = arviz.rhat(data)["a"].values
            ess = {m: arviz.ess(data, method=m)["a"].values / num_chains for m in ("bulk", "tail")}
        if (r_hat > _R_HAT).any():
            yield (
                f"R-hat: {_worst(name, r_hat, np.nanargmax)} is above {_R_HAT}. The chains do "
                "not agree yet: run longer; if they sit in different modes, temper."
            )
        for method, size in ess.items():
            if (size < _ESS_PER_CHAIN).any():
                yield (
                    f"Effective sample size ({method}): {_worst(name, size, np.nanargmin)} per "
                    f"chain is below {_ESS_PER_CHAIN}. Draw more, or thin less."
                )


def _worst(name: str, values: np.ndarray, find: Callable[[np.ndarray], Any]) -> str:
    """A variable, the place in it that ``find`` gives, and the value there."""
    place = np.unravel_index(find(values), values.shape)
    index = f"[{', '.join(map(str, place))}]" if place else ""
    return f"{name}{index} with {values[place]:.4g}"
