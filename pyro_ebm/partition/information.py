"""Entropies, divergences and Bayes factors of distributions with a method for log Z."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_ebm._bennett import error_of_mean
from pyro_ebm.distribution import GibbsBoltzmann
from pyro_ebm.partition.base import Method, Weighted, log_partition, warn_low_ess


class Estimate(NamedTuple):
    """A number with its error: ``value``, ``std_error`` and ``ess``, of the batch's shape.

    ``ess`` is the effective number of points that it rests on, infinite where all are counted.
    """

    value: Tensor
    std_error: Tensor
    ess: Tensor


class _Sample(NamedTuple):
    """Points of a distribution, and how its log Z and its means depend on each.

    ``x`` is ``(n, *batch, *event)``, ``share`` ``(n, *batch)`` sums to one and has its gradient
    in the parameters, as has ``log_z`` ``(*batch,)``. ``rows`` ``(T, C)`` is how the points were
    drawn, None if they were not; ``log_z_rows`` ``(n, *batch)`` what each adds to log Z, and
    ``spare`` ``(*batch,)`` the variance of log Z beyond that.
    """

    x: Tensor
    potential: Tensor
    share: Tensor
    log_z: Tensor
    rows: tuple[int, int] | None
    log_z_rows: Tensor
    spare: Tensor
    ess: Tensor


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

    References:
        | Elements of Information Theory, chapter 8 (Cover and Thomas, 2006)
        | https://doi.org/10.1002/047174882X

    Example:
        >>> d = ebm.GibbsBoltzmann(lambda x: -x.sum(-1), ebm.Flat((3,), constraints.boolean))
        >>> entropy(d, ebm.partition.Exact()).value
        tensor(1.7466)
    """
    sample = _sample(d, method)
    return _mean_plus_log_z(sample, sample.potential)


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
        The divergence in nats, differentiable, with its standard error and effective sample size.

    Raises:
        TypeError: If the method gives no weighted points.
        ValueError: If the distributions have other event shapes, or one of them is discrete and
            the other continuous.

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
    sample, other = _sample(p, method), log_partition(q, method_q or method)
    there = _potential(q, sample.x)
    found = _mean_plus_log_z(sample, there - sample.potential, -1.0)
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
    a, b = log_partition(p, method), log_partition(q, method_q or method)
    error = (a.std_error.square() + b.std_error.square()).sqrt()
    return Estimate(a.value - b.value, error, torch.minimum(a.ess, b.ess))


def _potential(d: GibbsBoltzmann, x: Tensor) -> Tensor:
    """Return potentials, infinite outside of the support."""
    inside = d.support.check(x)
    if bool(inside.all()):
        return d.potential(x)
    wide = inside.reshape(inside.shape + (1,) * d.event_dim)
    with torch.no_grad():
        like = d.base.sample()
    return torch.where(inside, d.potential(torch.where(wide, x, like)), torch.inf)


def _sample(d: GibbsBoltzmann, method: Any) -> _Sample:
    """Return points of a distribution by a method, and what they say of its log Z."""
    name = type(method).__name__
    if hasattr(method, "influence"):
        found = method.influence(d)
        x, rows = found.x.flatten(0, 1), tuple(found.x.shape[:2])
        even = (found.log_z - math.log(len(x))).expand(len(x), *found.log_z.shape)
        log_z_rows, ess = found.log_z_rows.flatten(0, 1), found.ess
        particles, spare = Weighted(x, even), torch.zeros_like(found.log_z)
    elif hasattr(method, "weighted"):
        particles, rows = method.weighted(d), (1, 0)
        weight = particles.log_weight.detach()
        share, n = torch.softmax(weight, 0), len(weight)
        log_z_rows, ess = n * share - 1.0, 1.0 / share.square().sum(0)
        if method.value == "exact":
            rows, spare = None, method(d).std_error.square()
            ess = torch.full_like(ess, torch.inf)
        else:
            rows, spare = (1, n), torch.zeros_like(ess)
            warn_low_ess(ess, name)
    else:
        raise TypeError(f"method must give weighted points, got {name}, which gives none")
    return _tilted(d, particles, rows, log_z_rows, spare, ess)


def _tilted(  # noqa: PLR0913 - the parts of one record
    d: GibbsBoltzmann,
    particles: Weighted,
    rows: tuple[int, int] | None,
    log_z_rows: Tensor,
    spare: Tensor,
    ess: Tensor,
) -> _Sample:
    """Give the weights of points the gradients that those of the density have."""
    x, weight = particles.x.detach(), particles.log_weight.detach()
    batch = weight.shape
    none = weight == -torch.inf
    # points of no weight have any energy, and no part in any mean
    potential = torch.where(none, 0.0, _potential(d, x).expand(batch))
    weight = weight - (potential - potential.detach())
    share = torch.softmax(weight, 0)
    return _Sample(x, potential, share, weight.logsumexp(0), rows, log_z_rows, spare, ess)


def _mean_plus_log_z(sample: _Sample, f: Tensor, sign: float = 1.0) -> Estimate:
    """Return the mean of a function plus (or minus) log Z, with the error of both together."""
    none = sample.share == 0
    f = torch.where(none, 0.0, f)
    mean = (sample.share * f).sum(0)
    value = mean + sign * sample.log_z
    with torch.no_grad():
        variance = sample.spare.expand(value.shape).clone()
        if sample.rows is not None:
            away = torch.where(none | ~f.isfinite(), 0.0, f - mean)
            influence = sign * sample.log_z_rows + len(f) * sample.share * away
            variance += error_of_mean(influence.unflatten(0, sample.rows)).square()
    return Estimate(value, variance.sqrt(), sample.ess.expand(value.shape))
