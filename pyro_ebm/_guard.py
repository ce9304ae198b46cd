"""Who asks for a log-density, on what its missing log Z depends, and when to refuse."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any, NoReturn

import torch
from pyro.poutine.enum_messenger import EnumMessenger
from pyro.poutine.indep_messenger import IndepMessenger
from pyro.poutine.runtime import _ENUM_ALLOCATOR, _PYRO_STACK
from pyro.poutine.trace_messenger import TraceMessenger
from pyro.poutine.trace_struct import Trace
from torch import Tensor, nn

from pyro_ebm._binding import modules_of, referenced, registered_name
from pyro_ebm.energy import describe

ENGINES = {
    "pyro.infer.discrete": "discrete",
    "pyro.infer.mcmc": "mcmc",
    "pyro.infer.importance": "importance",
    "pyro.infer.svi": "svi",
    "pyro.infer.elbo": "svi",
    "pyro.infer.trace_elbo": "svi",
    "pyro.infer.traceenum_elbo": "svi",
    "pyro.infer.tracegraph_elbo": "svi",
    "pyro.infer.trace_mean_field_elbo": "svi",
    "pyro.infer.renyi_elbo": "svi",
}
"""Engines of Pyro by the module whose frames show them at work."""


class UnnormalizedError(RuntimeError):
    """A log Z is missing without which the result would be silently wrong."""


class UnnormalizedWarning(UserWarning):
    """A number is printed that lacks its log Z."""


def engine() -> str | None:
    """Return which of Pyro's engines is running: it cannot ask what we give, so we ask for it."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if name.startswith("pyro.infer."):
            for module, kind in ENGINES.items():
                if name.startswith(module):
                    return kind
        frame = frame.f_back  # type: ignore[assignment]
    return None


def is_tracing() -> bool:
    """Whether values are symbolic, so that Python cannot look at them."""
    return (
        torch.jit.is_tracing()
        or torch.compiler.is_compiling()
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


def allocated_dims() -> set[int]:
    """Return the batch dimensions that Pyro's parallel enumeration has given to sites so far."""
    if any(isinstance(m, EnumMessenger) for m in _PYRO_STACK):
        return set(_ENUM_ALLOCATOR.dim_to_id)
    return set()


def plate_dims() -> dict[int, int]:
    """Return the batch dimensions of the plates in force, with their sizes."""
    plates = [m for m in _PYRO_STACK if isinstance(m, IndepMessenger) and m.dim is not None]
    return {m.dim: getattr(m, "subsample_size", m.size) for m in plates}


def plate_rows() -> dict[int, tuple[Tensor, int]]:
    """Return, by batch dimension, the rows that subsampling plates have drawn, and of how many."""
    plates = [m for m in _PYRO_STACK if isinstance(m, IndepMessenger) and m.dim is not None]
    drawn = {m.dim: (getattr(m, "_indices", None), m.size) for m in plates}
    return {
        dim: (rows, size)
        for dim, (rows, size) in drawn.items()
        if isinstance(rows, Tensor) and len(rows) < size
    }


def enumerated_dims(shape: torch.Size) -> set[int]:
    """Return the dimensions of a batch shape that belong to enumerated sites."""
    return {dim for dim in allocated_dims() if -dim <= len(shape) and shape[dim] > 1}


def _node(x: Tensor) -> Any:
    return torch.autograd.graph.get_gradient_edge(x).node


def walk(value: Tensor, without: Tensor | None = None) -> tuple[dict[Any, Tensor], set[Any]]:
    """Return the leaves that a value depends on other than through a tensor, and all nodes.

    Leaves are keyed by the nodes of the graph that accumulate their gradients.
    """
    if not value.requires_grad:
        return {}, set()
    seen = {_node(without)} if without is not None and without.requires_grad else set()
    queue, found = [_node(value)], {}
    while queue:
        node = queue.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found[node] = node.variable
        queue += [before for before, _ in node.next_functions]
    return found, seen


def _will_run(node: Any) -> bool:
    """Whether the backward pass that is running will reach a node."""
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # the node is itself an input of autograd.grad
        return True


def _running(name: str) -> FrameType | None:
    """Return the frame of a function of some name that is being executed, if there is one."""
    frame = sys._getframe(1)
    while frame is not None and frame.f_code.co_name != name:
        frame = frame.f_back  # type: ignore[assignment]
    return frame


def scoring() -> tuple[str, dict[str, Any]]:
    """Return the site that Pyro is scoring, in words, and the nodes of its trace, by name."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name in ("log_prob_sum", "compute_log_prob", "compute_score_parts"):
            trace = frame.f_locals.get("self")
            if isinstance(trace, Trace):
                return f"site {frame.f_locals['name']!r}", dict(trace.nodes)
        frame = frame.f_back  # type: ignore[assignment]
    return "a GibbsBoltzmann distribution", {}


def scored_latents(in_plates: bool = False) -> list[str]:
    """Name the latents, of plates or all, whose guide learns by the score function."""
    frame = _running("get_importance_trace")
    nodes = {} if frame is None else frame.f_locals["guide_trace"].nodes
    return [
        name
        for name, node in nodes.items()
        if node["type"] == "sample" and not node["is_observed"]
        if not (getattr(node["fn"], "has_rsample", False) or "_enumerate_dim" in node["infer"])
        if node["cond_indep_stack"] or not in_plates
        if node["fn"].log_prob(node["value"]).requires_grad
    ]


def needs_all_values() -> str:
    """Say which part of Pyro compares log-densities of different latents, if one does: ``""``.

    Its weights, or its gradients by the score function, would lack what log Z changes.
    """
    frame = _running("get_importance_trace")
    if frame is None:
        return ""
    nodes = frame.f_locals["guide_trace"].nodes.values()
    caller = frame.f_back.f_globals["__name__"] if frame.f_back else ""
    weighs = caller in ("pyro.infer.renyi_elbo", "pyro.infer.rws")
    if weighs and any(n["type"] == "sample" and not n["is_observed"] for n in nodes):
        return f"{caller}, which weighs draws,"
    scored = scored_latents()
    return f"the score function of the guide's {_list(scored)}" if scored else ""


def _random(nodes: dict[str, Any], seen: set[Any]) -> list[str]:
    """Name the sites through whose values a graph runs."""
    values = {n: node.get("value") for n, node in nodes.items() if node["type"] == "sample"}
    return [
        name
        for name, value in values.items()
        if isinstance(value, Tensor) and value.requires_grad and _node(value) in seen
    ]


def leaf_name(leaf: Tensor, energy: Any) -> str:
    """Name a leaf tensor as the parameter store, the energy's modules or its closure do."""
    if (name := registered_name(leaf)) is not None:
        return name
    for top, module in modules_of(energy).items():
        for name, parameter in module.named_parameters():
            if parameter is leaf:
                return f"{top}.{name}"
    names = [name for name, thing in referenced(energy) if thing is leaf]
    return names[0] if names else f"a tensor of shape {tuple(leaf.shape)}"


def refuse(because: str, wrong: str, site: str | None = None, *, known: bool = False) -> NoReturn:
    """Raise the error that names the site, what log Z depends on, and the remedies.

    ``known`` says that there is a log Z, but a fixed one.
    """
    has, lacking = "no log_partition", "without log Z"
    if known:
        has, lacking = "a log Z that was computed once, by normalized()", "with that"
    raise UnnormalizedError(
        f"{site or scoring()[0]} has {has}, but {because}: {lacking} {wrong} would be silently "
        "wrong. Pass log_partition=ebm.partition.Exact() (finite supports), "
        "Quadrature(low, high, num_points) (up to 3 dimensions), Importance(...), Table(...) "
        "(beta, or one parameter), or Contrastive(...) (learning by SVI), or sample posteriors "
        "by ebm.MCMC(ebm.Exchange(model), ...); log_partition='constant' declares that log Z "
        "depends on nothing that is learned, random or compared"
    )


def _is_learned(leaf: Tensor) -> bool:
    """Whether a leaf is in Pyro's parameter store and, under SVI, a parameter of this step."""
    name = registered_name(leaf)
    steps = [m for m in _PYRO_STACK if isinstance(m, TraceMessenger) and m.param_only]
    return name is not None and all(name in m.trace for m in steps)


def check_drawn_inside(names: tuple[str, ...], energy: Any) -> None:
    """Refuse inference with an energy whose random parameters were drawn outside the model.

    Raises:
        ValueError: If one of Pyro's engines is at work and there are such parameters.
    """
    if names and engine() is not None:
        raise ValueError(
            f"{scoring()[0]}: the GibbsBoltzmann of {describe(energy)} was constructed outside "
            f"the model, where its PyroSample {_list([*names])} was drawn once for all. Construct "
            "it inside the model"
        )


def check_not_transformed(caller: FrameType) -> None:
    """Refuse a guide that transforms draws by learned parameters, as AutoRegressiveMessenger does.

    The draws carry no graph to the parameters, and torch's cached transforms cut them off from
    the log-density, too: their gradients would be silently missing.

    Raises:
        NotImplementedError: If this is so.
    """
    if caller.f_globals.get("__name__") != "torch.distributions.transformed_distribution":
        return
    transforms = caller.f_locals["self"].transforms
    parts = [part for t in transforms for part in (t, *vars(t).values())]
    learned = (isinstance(p, nn.Module) or getattr(p, "requires_grad", False) for p in parts)
    if any(learned) and _running("compute_score_parts"):
        raise NotImplementedError(
            "a guide cannot learn to transform draws of a GibbsBoltzmann, which are not "
            "reparametrised. Instead of AutoRegressiveMessenger use AutoNormalMessenger, or "
            "override its get_posterior for the site"
        )


def check(
    value: Tensor, x: Tensor, energy: Any, enumerated: set[int], *, known: bool = False
) -> None:
    """Refuse a log-density without log Z, where that is seen to make a result wrong.

    With ``known``, one of a fixed log Z: evidence and enumerated alternatives have theirs.

    Pyro's engines do not ask what a log-density lacks. Which one is at work is read from the
    running stack, and what it will differentiate from the graph of the value. Outside the
    engines, a backward pass into parameters is refused when it comes.

    Raises:
        UnnormalizedError: If log Z depends on a learned parameter or a random variable, or the
            engine estimates evidence.
    """
    kind = engine()
    if kind == "importance" and not known:
        refuse("importance sampling estimates evidence", "the weights")
    if enumerated and not known:
        nodes = scoring()[1].items()
        names = [n for n, m in nodes if m.get("infer", {}).get("_enumerate_dim") in enumerated]
        refuse(f"log Z depends on the enumerated {_list(names)}", "their posterior")
    if is_tracing():
        return
    found, seen = walk(value, without=x)
    stored = {n: leaf for n, leaf in found.items() if _is_learned(leaf)}
    if kind == "mcmc":
        fixed = {n for n, leaf in found.items() if isinstance(leaf, nn.Parameter)}
        if any(node not in stored and node not in fixed for node in found):
            names = _random(scoring()[1], seen)
            because = f"log Z depends on the random {_list(names)}"
            refuse(because, "the posterior", known=known)
    elif kind == "svi" and stored:
        names = [leaf_name(leaf, energy) for leaf in stored.values()]
        because = f"log Z depends on the learned {_list(names)}"
        refuse(because, "every gradient", known=known)
    elif watched := stored if x.requires_grad else found:
        _watch(value, watched, energy, known)


def _watch(value: Tensor, leaves: dict[Any, Tensor], energy: Any, known: bool) -> None:
    """Refuse in the backward pass, where it turns out to be one that learns."""
    site = scoring()[0]

    def hook(grad: Tensor) -> None:
        names = [leaf_name(leaf, energy) for node, leaf in leaves.items() if _will_run(node)]
        if names:
            because = f"log Z depends on the learned {_list(names)}"
            refuse(because, "its gradient", site, known=known)

    value.register_hook(hook)


def _list(names: list[str]) -> str:
    return ", ".join(map(repr, names)) if names else "variables"
