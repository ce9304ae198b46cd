"""Finding, before inference, the sites whose missing log Z would make it silently wrong."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.ops.provenance import ProvenanceTensor, detach_provenance, get_provenance
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pyro_ebm._binding import modules_of, registered_name
from pyro_ebm._guard import UnnormalizedError, UnnormalizedWarning, walk
from pyro_ebm._known import Known
from pyro_ebm.distribution import GibbsBoltzmann

REMEDY = (
    "Pass log_partition=ebm.partition.Exact(), Quadrature(low, high, num_points), "
    "Importance(...) or, for SVI, Contrastive(...). For MCMC without log Z there is ebm.Exchange, "
    "and ebm.partition.Table where it depends on one number. log_partition='constant' declares "
    "that log Z does not depend on it."
)


class Finding(NamedTuple):
    """What an audit found at a ``site``: a ``kind``, the ``names`` involved and a ``message``.

    ``kind`` is ``"random"`` (log Z depends on a latent site), ``"learned"`` (on a parameter),
    ``"control"`` (Python code read the value of a latent site, perhaps to choose the energy),
    ``"unregistered"`` (an observed energy would never learn), ``"gradient"`` (log Z has a
    gradient only: SVI is right, MCMC and evidence are refused) or ``"evidence"`` (inferring the
    site is right, evidence and the ELBO's value lack a constant).
    """

    site: str
    kind: str
    names: tuple[str, ...]
    message: str


class _Provenance(poutine.messenger.Messenger):
    """Marks the value of every random site with its name; constants and data stay unmarked."""

    def _pyro_post_sample(self, msg: Any) -> None:
        if not msg["is_observed"] and isinstance(msg["value"], Tensor):
            value = detach_provenance(msg["value"])
            msg["value"] = ProvenanceTensor(value, frozenset({msg["name"]}))


class _Reads(TorchFunctionMode):
    """Notes whose values Python code reads: ``if k:``, ``energies[k]``, ``k.item()``."""

    FUNCTIONS = frozenset(
        getattr(Tensor, name)
        for name in ("item", "tolist", "__bool__", "__int__", "__index__", "__float__")
    )

    def __init__(self) -> None:
        super().__init__()
        self.names: frozenset[str] = frozenset()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self.FUNCTIONS:
            self.names |= get_provenance(args)
        return func(*args, **(kwargs or {}))


def _sites(trace: poutine.Trace) -> Iterator[tuple[str, Any, GibbsBoltzmann]]:
    for name, node in trace.nodes.items():
        fn = node.get("fn") if node["type"] == "sample" else None
        while fn is not None and not isinstance(fn, GibbsBoltzmann):
            fn = getattr(fn, "base_dist", None)
        if fn is not None:
            yield name, node, fn


def _unregistered(d: GibbsBoltzmann, params: frozenset[str]) -> tuple[str, ...]:
    """Return the trainable parameters of an energy that are not among the model's."""
    bound = {(id(module), name) for module, name, _ in d._binding.values}
    return tuple(
        f"{top}.{name}"
        for top, module in modules_of(d.energy).items()
        for name, leaf in module.named_parameters()
        if leaf.requires_grad and registered_name(leaf) not in params
        if (id(module.get_submodule(name.rpartition(".")[0])), name.rpartition(".")[2])
        not in bound
    )


def _log_z_depends_on(
    d: GibbsBoltzmann, value: Tensor, reads: frozenset[str], params: frozenset[str]
) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """Return the random sites, the parameters and the read sites that log Z depends on."""
    mode = _Reads()
    with torch.enable_grad(), mode:
        potential = d.potential(detach_provenance(value).detach())
    random = get_provenance(potential)
    leaves = walk(detach_provenance(potential))[0].values()
    learned = {n for leaf in leaves if (n := registered_name(leaf)) in params}
    return (
        tuple(sorted(random)),
        tuple(sorted(map(str, learned))),
        tuple(sorted(reads | mode.names)),
    )


def _unknown_to_table(
    name: str, d: GibbsBoltzmann, value: Tensor, params: frozenset[str]
) -> Iterator[Finding]:
    """Find random sites that log Z depends on beyond the one number of its table."""
    random, *_ = _log_z_depends_on(d, value, frozenset(), params)
    known = get_provenance(d.log_partition.parameter(d))
    if names := tuple(n for n in random if n not in known):
        yield Finding(name, "random", names, _MESSAGES["table"].format(name, ", ".join(names)))


def _findings(
    name: str, node: Any, d: GibbsBoltzmann, reads: frozenset[str], params: frozenset[str]
) -> Iterator[Finding]:
    known = isinstance(d.log_partition, Known)
    if d.log_partition is None or known:
        own = frozenset({name})
        random, learned, control = _log_z_depends_on(d, node["value"], reads - own, params)
        control = () if known else control  # the fixed log Z is that of what was chosen
        for kind, names in (("random", random), ("learned", learned), ("control", control)):
            if names and not (kind == "control" and set(names) <= set(random)):
                yield Finding(name, kind, names, _MESSAGES[kind].format(name, ", ".join(names)))
        if not random and not learned and not control and not known:
            yield Finding(name, "evidence", (), _MESSAGES["evidence"].format(name))
    elif hasattr(d.log_partition, "parameter"):  # a table, of one number
        yield from _unknown_to_table(name, d, node["value"], params)
    elif getattr(d.log_partition, "value", "") == "none":
        yield Finding(name, "gradient", (), _MESSAGES["gradient"].format(name))
    if node["is_observed"] and (names := _unregistered(d, params)):
        listed = ", ".join(names)
        yield Finding(name, "unregistered", names, _MESSAGES["unregistered"].format(name, listed))


_MESSAGES = {
    "random": "site {!r}: log Z depends on the random {}, and there is no log_partition, or a "
    "fixed one. " + REMEDY,
    "learned": "site {!r}: log Z depends on the learned {}, and there is no log_partition, or a "
    "fixed one. " + REMEDY,
    "control": "site {!r}: the model reads the value of {} in Python; if that chooses the energy, "
    "log Z depends on it, and there is no log_partition. " + REMEDY,
    "evidence": "site {!r}: log Z is constant; inference of the latent sites is right, evidence "
    "(Importance) and the value of an ELBO lack it.",
    "table": "site {!r}: log Z depends on the random {}, of which its table knows nothing. "
    + REMEDY,
    "gradient": "site {!r}: log Z has its gradient only; SVI is right, MCMC and evidence are "
    "refused.",
    "unregistered": "site {!r}: the observed energy's {} require gradients but are not registered "
    "with Pyro in the model, so that SVI would never train them; call pyro.module(name, energy) "
    "there (construct the GibbsBoltzmann of a PyroModule there), or energy.requires_grad_(False).",
}


def inspect_sites(model: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Finding]:
    """Run a model once and return what an audit finds, without raising or warning."""
    devices = list(range(torch.cuda.device_count()))
    with (
        torch.random.fork_rng(devices=devices),
        pyro.validation_enabled(False),
        torch.enable_grad(),
        _Reads() as mode,
        _Provenance(),
    ):
        trace = poutine.trace(model).get_trace(*args, **kwargs)
    params = frozenset(name for name, node in trace.nodes.items() if node["type"] == "param")
    return [f for site in _sites(trace) for f in _findings(*site, mode.names, params)]


def audit(model: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Finding]:
    r"""Name every site whose missing log Z would make inference silently wrong.

    .. math:: \log p(x \mid \theta) = \log b(x) - \beta E_\theta(x) - \log Z(\beta, \theta)

    The model is run once under provenance tracking, so that dependences are found that no
    gradient shows: a discrete parent, an engine without gradients. Seven uses of an energy are
    silently wrong without log Z: (1) SVI of a parameter, (2) a prior on a parameter, (3) the
    same without data, (4) a discrete choice of the energy, (5) an energy as a guide, (6)
    evidence by importance sampling, (7) a learned :math:`\beta`. An audit raises on all but the
    sixth, which is a finding of kind ``"evidence"`` (and refused by Pyro's ``Importance`` when it
    runs): with a fixed energy, inferring :math:`x` is right.

    Args:
        model: A Pyro model, or a guide.
        args: Its arguments.
        kwargs: Its keyword arguments.

    Returns:
        All findings, the harmless ones too.

    Raises:
        UnnormalizedError: If a log Z is missing that depends on a random or learned variable.

    Warns:
        UnnormalizedWarning: If Python code reads a random value that may choose the energy, or
            an observed energy's parameters are not registered with Pyro.

    Example:
        >>> def model(x):
        ...     k = pyro.sample("k", dist.Gamma(2.0, 1.0))
        ...     pyro.sample("x", ebm.GibbsBoltzmann(lambda x: k * x**2, ebm.Flat()), obs=x)
        >>> try:
        ...     audit(model, torch.tensor(1.0))
        ... except ebm.UnnormalizedError as error:
        ...     print(str(error)[:37])
        site 'x': log Z depends on the random
    """
    findings = inspect_sites(model, *args, **kwargs)
    for finding in findings:
        if finding.kind in ("control", "unregistered"):
            warnings.warn(finding.message, UnnormalizedWarning, stacklevel=2)
    wrong = [f.message for f in findings if f.kind in ("random", "learned")]
    if wrong:
        raise UnnormalizedError("\n".join(wrong))
    return findings
