"""log Z by Laplace's method."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyro_ebm._guard import walk
from pyro_ebm._mode import Modes, Space, find_modes, gradient, hessian, space_of, symmetric
from pyro_ebm.distribution import GibbsBoltzmann
from pyro_ebm.energy import differentiable
from pyro_ebm.partition.base import LogPartition, Weighted, from_weights, warn_low_ess

DEGREES = 5.0  # of freedom, of Student's t: heavier tails than most densities
IN_REACH = 20.0  # nats: modes farther below the best one weigh nothing


class Laplace:
    r"""log Z by Laplace's method: a Gaussian around the best mode.

    .. math:: \log Z \approx -U(z^*) + \tfrac D2 \log 2\pi
        - \tfrac12 \log \det \nabla^2 U(z^*) , \quad
        U(z) = \beta E(T(z)) - \log b(T(z)) - \log |\det T'(z)|

    The mode is that of the density in the unconstrained space of the support, with the Jacobian
    of :math:`T`: exact where that density is Gaussian, and other than an expansion around the
    minimum of the energy where the support has an edge. The gradient is that of this value, with
    the motion of the mode (one derivative: not twice differentiable).

    The value is no average, so the ``std_error`` is its distance from a second estimate, by
    importance sampling around all modes that were found, with the error of that one; ``ess`` is
    that of its particles.

    Args:
        num_particles: The number of particles of the second estimate.

    Raises:
        ValueError: If ``num_particles`` is less than two; when used, if the support is finite, or
            no mode with a positive definite Hessian is found.

    References:
        | Accurate Approximations for Posterior Moments and Marginal Densities (Tierney and Kadane,
          1986)
        | https://doi.org/10.1080/01621459.1986.10478240

    Example:
        >>> d = ebm.GibbsBoltzmann(lambda x: x.square().sum(-1), ebm.Flat((20,)))
        >>> est = Laplace()(d)                             # the truth is 10 log(pi)
        >>> est.value
        tensor(11.4473)
        >>> est.std_error < 0.2
        tensor(True)
    """

    value = "estimated"
    gradient = "estimated"

    def __init__(self, num_particles: int = 512) -> None:
        if num_particles < 2:
            raise ValueError(f"num_particles must be at least 2, got {num_particles}")
        self.num_particles = num_particles

    def log_z(self, d: GibbsBoltzmann, x: Tensor | None = None) -> Tensor:
        """Return Laplace's value of log Z; nothing is drawn."""
        space = space_of(d)
        return _value(space, _search(d, space)[1])

    def __call__(self, d: GibbsBoltzmann) -> LogPartition:
        """Return Laplace's value, with its distance from importance sampling as its error."""
        space = space_of(d)
        modes, best = _search(d, space)
        value = _value(space, best)
        with torch.no_grad():
            particles = self._particles(space, modes)
            other = from_weights(particles.log_weight + math.log(self.num_particles))
            std_error = torch.hypot(value - other.value, other.std_error)
        warn_low_ess(other.ess, "the particles around Laplace's modes")
        return LogPartition(value, std_error, other.ess)

    def weighted(self, d: GibbsBoltzmann) -> Weighted:
        """Return particles from around the modes, with their importance weights."""
        space = space_of(d)
        return self._particles(space, _search(d, space)[0])

    def _particles(self, space: Space, modes: Modes) -> Weighted:
        with torch.no_grad():
            z, log_q = _draw(modes, self.num_particles)
            x = space.transform(z)
        return Weighted(x, -space.potential(z) - log_q - math.log(self.num_particles))


def _search(d: GibbsBoltzmann, space: Space) -> tuple[Modes, Modes]:
    """Return the modes that have weight, and the best of them.

    Raises:
        ValueError: If what is lowest is no mode with a positive definite Hessian.
    """
    modes = find_modes(d, space)
    eigen = torch.linalg.eigvalsh(symmetric(modes.hessian))
    eps = torch.finfo(eigen.dtype).eps
    fine = modes.settled & (eigen[..., 0] > space.dim * eps * eigen[..., -1].abs())
    best = modes.best(fine)
    lowest = modes.potential.nan_to_num(torch.inf, torch.inf, -torch.inf).amin(0)
    good = fine.any(0) & (best.potential <= lowest + 1e-3)
    if not good.all():
        raise ValueError(
            "Laplace needs a mode with a positive definite Hessian in unconstrained space, and "
            f"found none that is lowest for {int((~good).sum())} of {good.numel()} batch "
            f"elements: the least eigenvalue is {eigen[..., 0].max(0).values[~good][0]:.3g} at a "
            f"potential of {lowest[~good][0]:.6g}. There the energy has a saddle or a flat "
            "direction, or no minimum"
        )
    keep = fine & (modes.potential < best.potential + IN_REACH)
    modes = Modes(*(_where(keep, part, other) for part, other in zip(modes, best, strict=True)))
    return (modes if _several(modes, best) else modes.first()), best


def _where(keep: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.where(keep.reshape(keep.shape + (1,) * (a.dim() - keep.dim())), a, b)


def _several(modes: Modes, best: Modes) -> bool:
    """Whether modes differ, by more than a thousandth of a standard deviation."""
    away = modes.z - best.z
    return bool((torch.einsum("...i,...ij,...j", away, best.hessian, away) > 1e-6).any())


def _value(space: Space, best: Modes) -> Tensor:
    """Return Laplace's value, differentiable as the implicit function theorem wants it.

    One Newton step from the detached mode, with the detached Hessian, goes nowhere and has the
    derivative of the mode.
    """
    graph = torch.is_grad_enabled()
    with differentiable():
        start = best.z.clone().requires_grad_()
        grad = gradient(space.potential(start), start).unsqueeze(-1)
        step = torch.linalg.solve(best.hessian, grad).squeeze(-1)
        z = (start - step).requires_grad_()
        potential, _, hess = hessian(space.potential, z)
        log_det = torch.linalg.cholesky(symmetric(hess)).diagonal(dim1=-2, dim2=-1).log()
        value = 0.5 * space.dim * math.log(2 * math.pi) - potential - log_det.sum(-1)
        learns = graph and walk(value, without=start)[0]
    return value if learns else value.detach()


def _draw(modes: Modes, num: int) -> tuple[Tensor, Tensor]:
    """Draw from Gaussians and Student's t around the modes in turn; return with log densities.

    All particles are scored by the mixture, whose weights are bounded for Gaussian tails and
    have a variance for heavier ones.
    """
    z, root = modes.z, torch.linalg.cholesky(symmetric(modes.hessian))  # shape: (m, *batch, D, D)
    m, dim = len(z), z.shape[-1]
    at = torch.arange(num, device=z.device)
    noise = torch.randn_like(z[:1].expand(num, *z.shape[1:]))
    chi2 = torch.distributions.Chi2(z.new_tensor(DEGREES)).sample(noise.shape[:-1])
    heavy = (at // m % 2 == 1).reshape(-1, *[1] * (chi2.dim() - 1))
    noise = noise * torch.where(heavy, (DEGREES / chi2).sqrt(), 1.0).unsqueeze(-1)
    solved = torch.linalg.solve_triangular(root[at % m].mT, noise.unsqueeze(-1), upper=True)
    points = z[at % m] + solved.squeeze(-1)
    log_det = root.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    away = (points.unsqueeze(1) - z).unsqueeze(-1)  # shape: (num, m, *batch, D, 1)
    square = (root.mT @ away).square().sum((-2, -1))
    normal = -0.5 * square - 0.5 * dim * math.log(2 * math.pi)
    half = (DEGREES + dim) / 2
    constant = math.lgamma(half) - math.lgamma(DEGREES / 2) - dim / 2 * math.log(DEGREES * math.pi)
    student = constant - half * (square / DEGREES).log1p()
    both = torch.logaddexp(normal, student) - math.log(2) + log_det
    return points, both.logsumexp(1) - math.log(m)
