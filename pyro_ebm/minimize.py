"""Inference is minimisation: the point of least energy."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor
from torch.distributions.constraints import Constraint

from pyro_ebm._binding import evaluating
from pyro_ebm._descent import Found
from pyro_ebm._math import Minimum
from pyro_ebm._search import Options, Task, run, task_of
from pyro_ebm.distribution import GibbsBoltzmann
from pyro_ebm.energy import Energy
from pyro_ebm.factor_graph import FactorGraph
from pyro_ebm.flat import sites_of
from pyro_ebm.kernels.base import check_count, check_positive, expand_like

__all__ = ["Minimum", "MinimumWarning", "minimize"]

NUM_STEPS = {
    "lbfgs": 2000,
    "annealed": 2000,
    "gd": 10_000,
    "adam": 10_000,
    "newton": 500,
    "ista": 10_000,
    "fista": 10_000,
}
CONTINUOUS = ("lbfgs", "newton", "gd", "adam", "ista", "fista", "annealed")
FINITE = ("enumerate", "icm", "annealed")


class MinimumWarning(UserWarning):
    """Searches ended before they had reached a minimum."""


def minimize(  # noqa: PLR0913 - one call for all kinds of minimum, with the names of each
    energy: Energy,
    start: Tensor | TorchDistributionMixin | None = None,
    *,
    method: str | None = None,
    support: Constraint | None = None,
    num_starts: int | None = None,
    num_steps: int | None = None,
    tolerance: float | None = None,
    step_size: float = 0.01,
    l1: float | Tensor | None = None,
    betas: Sequence[float] | Tensor | None = None,
) -> Minimum:
    r"""Find the point of least energy, from each of a batch of starts.

    .. math:: x^* = \operatorname*{argmin}_x E(x)

    Each row of a batch is a search of its own: it ends by its own rule, and one that diverges
    disturbs no other. The energy of a conditional (:class:`~pyro_ebm.Given`) brings its batch
    along, so that ``minimize(Given(F, x), start)`` searches :math:`y` for each :math:`x`.

    **Methods.** ``"lbfgs"`` (the default), ``"newton"`` (damped; D + 1 gradients a step), ``"gd"``
    and ``"adam"`` (of torch, with ``step_size``); with ``l1`` the minimum of
    :math:`E(x) + \lambda |x|_1` by ``"fista"`` (the default then) or ``"ista"``. On finite
    supports ``"enumerate"`` (the default up to about a million states), ``"icm"`` (one
    component at a time; the default above) and ``"annealed"``. ``"annealed"`` first samples at
    rising ``betas``, by MALA or Gibbs sampling, then goes on by the default method; use it, or
    many starts, where there are many minima. A :class:`~pyro_ebm.FactorGraph` finds its own,
    exact minimum where ``start`` and ``method`` are left out.

    **Supports.** A search runs in unconstrained space, :math:`x = T(z)`, but minimises the energy
    itself, without the Jacobian, which a density of :math:`z` would have: the minimum does
    not depend on coordinates. A minimum on the boundary is approached until the gradient in
    :math:`z` vanishes, :math:`T'(z)^\top \nabla E = 0`, up to the tolerance.

    **Convergence.** The largest component of the gradient (``grad_norm``; with ``l1`` that of the
    gradient mapping) must be at most ``tolerance``, since energies are in units of the
    temperature; where rounding of the gradient at the start is larger, that. And there must be
    no way down along the least curvature that Lanczos' method finds in 20 steps: a search does
    not end at a saddle, a maximum or a plateau, but steps off it. For ``"icm"`` no change
    of a single component lowers the energy. A warning tells of searches that have not converged;
    they end at their lowest point. So they do after an interrupt (Ctrl-C).

    **Derivatives.** The result is cut off from the graph. By the envelope theorem
    ``energy(m.x)`` has the derivative of the minimum :math:`\min_x E_\theta(x)` in
    :math:`\theta`.

    Args:
        energy: Maps points ``(*batch, *event)`` to energies ``(*batch,)``.
        start: Points ``(*batch, *event)``; or a :class:`~pyro_ebm.Flat` or another distribution
            from which they are drawn and which gives the support.
        method: A method, by name.
        support: The support of points given as a tensor, by default the reals.
        num_starts: The number of draws from ``start`` for each element of the batch, of which the
            best minimum is returned; by default one. To have all of them, pass
            ``start.sample((n,))`` with ``support=start.support``.
        num_steps: The most steps of a row: points tried (``"lbfgs"``: 2000), Hessians
            (``"newton"``: 500), steps (10,000), or sweeps (``"icm"``: 1000).
        tolerance: The largest component of the gradient at a minimum; by default the square root
            of the precision of the type, 1.5e-8 or 3.5e-4.
        step_size: The learning rate of ``"gd"`` and ``"adam"``.
        l1: The weight :math:`\lambda` of an l1 part, which broadcasts to the points.
        betas: Rising inverse temperatures to sample at first, by ten MALA moves or one sweep
            each; by default with ``"annealed"`` one hundred from 0.01 to 10. Given, they come
            before any method.

    Returns:
        A :class:`Minimum`: ``x``, ``energy`` (with the l1 part), ``converged``, ``num_steps`` and
        ``grad_norm``, batched.

    Raises:
        TypeError: If the energy is not callable, or points are not floating point.
        ValueError: If an option does not suit, the energy or its gradient is not finite at a
            start, or the energy is minus infinity anywhere.

    References:
        | Numerical Optimization (Nocedal and Wright, 2006)
        | https://doi.org/10.1007/978-0-387-40065-5
        | A Fast Iterative Shrinkage-Thresholding Algorithm (Beck and Teboulle, 2009)
        | https://doi.org/10.1137/080716542
        | On the Statistical Analysis of Dirty Pictures (Besag, 1986)
        | https://doi.org/10.1111/j.2517-6161.1986.tb01412.x

    Example:
        >>> m = minimize(lambda x: (x - 3.0).square().sum(-1), torch.zeros(5, 2))
        >>> m.x[0], m.energy[0], bool(m.converged.all())
        (tensor([3., 3.]), tensor(0.), True)
        >>> spins = ebm.Flat((3,), constraints.boolean)
        >>> F = lambda x, y: (x - y).square().sum(-1)
        >>> minimize(ebm.Given(F, torch.tensor([[0.9, 0.2, 0.6]]), ...), spins).x
        tensor([[1., 0., 1.]])
    """
    if not callable(energy):
        raise TypeError(f"energy must be callable, got {type(energy).__name__}")
    if isinstance(energy, FactorGraph) and start is None and method is None:
        return energy.minimum()
    if start is None:
        raise TypeError("start must be given but for a FactorGraph, and there for a method")
    with torch.inference_mode(False), torch.no_grad(), evaluating(energy):
        task = task_of(energy, start, support, num_starts)
        options = _options(task.d, method, num_steps, tolerance, betas, l1, step_size)
        x, found = run(task, options)
    _warn(found, options)
    return _result(x, found, task)


def _options(
    d: GibbsBoltzmann,
    method: str | None,
    num_steps: int | None,
    tolerance: float | None,
    betas: Sequence[float] | Tensor | None,
    l1: float | Tensor | None,
    step_size: float,
) -> Options:
    """Check the options, and fill in those that were left out."""
    method = _chosen(d, method, l1 is not None, betas is not None)
    num_steps = NUM_STEPS.get(method, 1000) if num_steps is None else num_steps
    check_count("num_steps", num_steps, 0)
    check_positive("step_size", step_size)
    if tolerance is not None:
        check_positive("tolerance", tolerance)
    if betas is None and method == "annealed":
        betas = torch.logspace(-2, 1, 100)
    if betas is not None:
        betas = torch.as_tensor(betas).tolist()
        check_positive("betas", torch.tensor(betas))
        if betas != sorted(betas):
            raise ValueError(f"betas must rise, got {betas}")
    return Options(method, num_steps, tolerance, betas, 0.0 if l1 is None else l1, step_size)


def _chosen(d: GibbsBoltzmann, method: str | None, l1: bool, betas: bool) -> str:
    """Check a method, or choose one."""
    finite = d.support.is_discrete
    if finite and sites_of(d.support, d.event_shape) is None:
        raise ValueError(f"start must have a finite or a continuous support, got {d.support}")
    if method is None and finite:
        method = "enumerate" if d.has_enumerate_support and not betas else "icm"
    elif method is None:
        method = "fista" if l1 else "lbfgs"
    known = FINITE if finite else CONTINUOUS
    if method not in known:
        raise ValueError(f"method must be one of {known} on {d.support}, got {method!r}")
    if l1 != (method in ("ista", "fista")):
        raise ValueError(f"l1 goes with the methods 'ista' and 'fista' alone, got {method!r}")
    if betas and method == "enumerate":
        raise ValueError("betas go with a search, got the method 'enumerate'")
    return method


def _warn(found: Found, options: Options) -> None:
    """Tell of searches that have not converged."""
    lost = ~found.converged
    if not lost.any():
        return
    why = "were interrupted" if found.interrupted else "have not converged"
    left = float(found.grad_norm[lost].max())
    warnings.warn(
        f"{int(lost.sum())} of {lost.numel()} searches by {options.method!r} {why} after "
        f"{int(found.num_steps[lost].max())} steps: the largest component of a gradient that is "
        f"left is {left:.3g}. Raise num_steps, scale the variables, or try another method; if "
        "the points run away the energy has no minimum",
        MinimumWarning,
        stacklevel=3,
    )


def _result(x: Tensor, found: Found, task: Task) -> Minimum:
    """Give searches the shape of the batch: of several starts the lowest for each element."""
    parts = [part.reshape(task.rows) for part in found[1:5]]
    if task.num is not None and task.num > 1:
        at = parts[0].min(0, keepdim=True)[1]
        parts = [part.gather(0, at)[0] for part in parts]
        x = x.gather(0, expand_like(at, x).expand(1, *x.shape[1:]))[0]
    energy, grad_norm, converged, num_steps = parts
    return Minimum(x, energy, converged, num_steps, grad_norm)
