"""Entropies, divergences and Bayes factors of distributions with a method for log Z."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from pyro.distributions.util import broadcast_shape
from torch import Tensor

from pyro_ebm._bennett import error_of_mean
from pyro_ebm._free import inside
from pyro_ebm.distribution import GibbsBoltzmann
from pyro_ebm.partition.base import Method, Weighted, log_partition


class Estimate(NamedTuple):
    """A number with its error: ``value``, ``std_error`` and ``ess``, of the batch's shape.

    ``ess`` is the effective number of points that it rests on, infinite where all are counted.
    """

    value: Tensor
    std_error: Tensor
    ess: Tensor


class _Points(NamedTuple):
    """Points of a distribution, and what each says of its log Z.

    ``rows`` ``(T, C)`` is how the points were drawn, in C independent chains; ``log_z_rows``
    ``(n, *batch)`` what each adds to log Z. All errors are ``slow`` ``(*batch,)`` times those of
    independent rows. Points that were not drawn have no rows, and log Z the error ``fixed``.
    """

    particles: Weighted
    rows: tuple[int, int] | None
    log_z_rows: Tensor
    ess: Tensor
    slow: Tensor | float = 1.0
    fixed: Tensor | float = 0.0


class _Tilted(NamedTuple):
    """Potentials ``(n, *batch)`` and shares of points, and log Z, with gradients."""

    potential: Tensor
    share: Tensor
    log_z: Tensor


def entropy(d: GibbsBoltzmann, method: Method) -> Estimate:
    r"""Return the entropy of a Gibbs-Boltzmann distribution.

    .. math:: H = \log Z + \langle \beta E - \log b \rangle

    It is a differential entropy on continuous supports. The error takes into account that log Z
    and the mean come from the same points.

    Args:
        d: The distribution.
        method: A method of :mod:`pyro_ebm.partition` that gives weighted points.

    Returns:
        The entropy in nats, of shape ``d.batch_shape``, differentiable in beta and in the
        parameters of the energy, with its standard error and effective sample size.

    Raises:
        TypeError: If the method gives no weighted points.
        ValueError: If it gives a bound of log Z.

    References:
        | Elements of Information Theory, chapter 8 (Cover and Thomas, 2006)
        | https://doi.org/10.1002/047174882X

    Example:
        >>> d = ebm.GibbsBoltzmann(lambda x: -x.sum(-1), ebm.Flat((3,), constraints.boolean))
        >>> entropy(d, ebm.partition.Exact()).value
        tensor(1.7466)
    """
    _refuse_bounds(method)
    points = _points(d, method)
    tilted = _tilt(d, points.particles)
    return _mean_plus_log_z(points, tilted, tilted.potential)


def kl_divergence(
    p: GibbsBoltzmann, q: GibbsBoltzmann, method: Method, method_q: Method | None = None
) -> Estimate:
    r"""Return the Kullback-Leibler divergence between two Gibbs-Boltzmann distributions.

    .. math:: KL(p \Vert q) = \langle U_q - U_p \rangle_p + \log Z_q - \log Z_p , \quad
        U = \beta E - \log b

    It is infinite where q has no density at points of p.

    Args:
        p: The distribution over whose points is averaged.
        q: The other.
        method: A method of :mod:`pyro_ebm.partition` that gives weighted points of ``p``.
        method_q: The method for log Z of ``q``; by default the same.

    Returns:
        The divergence in nats, of the batch shapes of both, broadcast, differentiable, with its
        standard error and effective sample size.

    Raises:
        TypeError: If the method gives no weighted points.
        ValueError: If a method gives a bound of log Z, the distributions have other event
            shapes, or one of them is discrete and the other continuous.

    References:
        | On Information and Sufficiency (Kullback and Leibler, 1951)
        | https://doi.org/10.1214/aoms/1177729694

    Example:
        >>> base = ebm.Flat((), constraints.boolean)
        >>> p = ebm.GibbsBoltzmann(lambda x: 0.0 * x, base)
        >>> q = ebm.GibbsBoltzmann(lambda x: -x, base)
        >>> kl_divergence(p, q, ebm.partition.Exact()).value
        tensor(0.1201)
    """
    if p.event_shape != q.event_shape:
        raise ValueError(
            f"p and q must have one event shape, got {tuple(p.event_shape)} and "
            f"{tuple(q.event_shape)}"
        )
    if p.support.is_discrete != q.support.is_discrete:
        raise ValueError(
            f"p and q must both be discrete or both continuous, got the supports {p.support} and "
            f"{q.support}"
        )
    _refuse_bounds(method, method_q)
    batch = broadcast_shape(p.batch_shape, q.batch_shape)
    p = p if p.batch_shape == batch else p.expand(batch)
    points, other = _points(p, method), log_partition(q, method_q or method)
    tilted = _tilt(p, points.particles)
    there = _potential(q, points.particles.x.detach())
    found = _mean_plus_log_z(points, tilted, there - tilted.potential, -1.0)
    error = (found.std_error.square() + other.std_error.square()).sqrt()
    return Estimate(found.value + other.value, error, torch.minimum(found.ess, other.ess))


def log_bayes_factor(
    p: GibbsBoltzmann, q: GibbsBoltzmann, method: Method, method_q: Method | None = None
) -> Estimate:
    r"""Return the log of the ratio of two evidences.

    .. math:: \log \frac{Z_p}{Z_q} , \quad Z = \int b(x) \exp(-\beta E(x)) \, dx

    With the prior as the base and minus the log-likelihood of data as the energy (with its
    constants), Z is the evidence for a model.

    Args:
        p: The model that the factor speaks for.
        q: The model that it speaks against.
        method: A method of :mod:`pyro_ebm.partition`.
        method_q: That for ``q``; by default the same. The errors add up as independent ones.

    Returns:
        The log of the factor in nats, with its standard error and effective sample size.

    Raises:
        ValueError: If a method gives a bound of log Z.

    References:
        | Bayes Factors (Kass and Raftery, 1995)
        | https://doi.org/10.1080/01621459.1995.10476572

    Example:
        >>> prior, y = dist.Normal(0.0, 2.0), torch.tensor(1.0)
        >>> near = ebm.GibbsBoltzmann(lambda x: -dist.Normal(x, 1.0).log_prob(y), prior)
        >>> far = ebm.GibbsBoltzmann(lambda x: -dist.Normal(x, 9.0).log_prob(y), prior)
        >>> log_bayes_factor(near, far, ebm.partition.Quadrature(-20.0, 20.0, 200)).value
        tensor(1.3225)
    """
    _refuse_bounds(method, method_q)
    a, b = log_partition(p, method), log_partition(q, method_q or method)
    error = (a.std_error.square() + b.std_error.square()).sqrt()
    return Estimate(a.value - b.value, error, torch.minimum(a.ess, b.ess))


def _refuse_bounds(*methods: Any) -> None:
    bounds = [type(m).__name__ for m in methods if getattr(m, "value", None) == "bound"]
    if bounds:
        raise ValueError(f"method must give log Z and not a bound, got {bounds[0]}")


def _potential(d: GibbsBoltzmann, x: Tensor) -> Tensor:
    """Return potentials, infinite outside of the support."""
    x, fine = inside(d.base, x)
    return torch.where(fine, d.potential(x), torch.inf)


def _points(d: GibbsBoltzmann, method: Any) -> _Points:
    """Return points of a distribution by a method, and what they say of its log Z."""
    if callable(getattr(method, "influence", None)):
        found = method.influence(d)
        x, rows = found.x.flatten(0, 1), tuple(found.x.shape[:2])
        even = (found.log_z - math.log(len(x))).expand(len(x), *found.log_z.shape)
        return _Points(Weighted(x, even), rows, found.log_z_rows.flatten(0, 1), found.ess)
    if not callable(getattr(method, "weighted", None)):
        name = type(method).__name__
        raise TypeError(f"method must give weighted points, got {name}, which gives none")
    particles = method.weighted(d)
    share = torch.softmax(particles.log_weight.detach(), 0)
    ess, n = 1.0 / share.square().sum(0), len(share)
    with torch.no_grad():
        reported = method(d)
    log_z_rows = n * share - 1.0
    if method.value == "exact":
        ess = torch.full_like(ess, torch.inf)
        return _Points(particles, None, log_z_rows, ess, fixed=reported.std_error)
    # relations between particles that their weights do not show, as of one ancestor
    alone = (1.0 / ess - 1.0 / n).clamp(min=0.0)
    slow = (reported.std_error.square() / alone).nan_to_num(1.0).clamp(min=1.0).sqrt()
    return _Points(particles, (1, n), log_z_rows, torch.minimum(ess, reported.ess), slow)


def _tilt(d: GibbsBoltzmann, particles: Weighted) -> _Tilted:
    """Give the weights of points the gradients that those of the density have."""
    x, weight = particles.x.detach(), particles.log_weight.detach()
    # points of no weight have any energy, and no part in any mean
    potential = torch.where(weight == -torch.inf, 0.0, _potential(d, x).expand(weight.shape))
    weight = weight - (potential - potential.detach())
    return _Tilted(potential, torch.softmax(weight, 0), weight.logsumexp(0))


def _mean_plus_log_z(points: _Points, tilted: _Tilted, f: Tensor, sign: float = 1.0) -> Estimate:
    """Return the mean of a function plus (or minus) log Z, with the error of both together."""
    none = tilted.share == 0
    f = torch.where(none, 0.0, f)
    mean = (tilted.share * f).sum(0)
    value = mean + sign * tilted.log_z
    with torch.no_grad():
        error = torch.as_tensor(points.fixed).to(value).expand(value.shape)
        if points.rows is not None:
            away = torch.where(none | ~(f - mean).isfinite(), 0.0, f - mean)
            rows = sign * points.log_z_rows + len(f) * tilted.share * away
            error = points.slow * error_of_mean(rows.unflatten(0, points.rows))
    return Estimate(value, error, points.ess.expand(value.shape))
