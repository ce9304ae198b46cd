"""Chains and guides that run until their moments and gradients can be compared to the truth."""

import math
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from pyro.infer import (
    HMC,
    NUTS,
    SVI,
    JitTrace_ELBO,
    Predictive,
    RandomWalkKernel,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
)
from pyro.optim import ClippedAdam

import pyro_ebm as ebm
from tests.common import FAR, standard_errors
from tests.test_pyro_matrix import AUTOGUIDES, MEAN, ROLES, SD, in_guide, latent, run, with_neutra

LONG = {
    "NUTS": (NUTS, 800, 200),
    "HMC": (partial(HMC, trajectory_length=2.0), 800, 200),
    "RandomWalkKernel": (RandomWalkKernel, 6000, 1000),
}


def far_from_the_posterior(p, make, num_samples, warmup_steps):
    """Distances of a chain's mean and of its variance from the truth."""
    z = run(make(p.model), num_samples, warmup_steps).get_samples()["z"]
    deviation = (z - MEAN) ** 2  # its standard deviation is sqrt(2) times the variance
    return standard_errors(z, MEAN, SD), standard_errors(deviation, SD**2, 2**0.5 * SD**2)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", LONG)
@pytest.mark.parametrize("role", ["latent", "observed"])
def test_long_chains_have_the_mean_and_variance_of_the_posterior(kernel, role, device):
    assert max(far_from_the_posterior(ROLES[role]((), device), *LONG[kernel])) < FAR


@pytest.mark.slow
def test_a_long_chain_on_a_wrong_energy_is_far(device):
    wrong = latent((), device, precision=lambda: 4.0)
    assert max(far_from_the_posterior(wrong, *LONG["NUTS"])) > FAR


FULL = "covariance"  # the guide has all entries of the covariance
DIAGONAL = "inverse diagonal of the precision"  # the best independent components
FITTED = {
    "AutoDelta": None,
    "AutoNormal": DIAGONAL,
    "AutoDiagonalNormal": DIAGONAL,
    "AutoMultivariateNormal": FULL,
    "AutoLowRankMultivariateNormal": FULL,
    "AutoIAFNormal": FULL,
    "AutoLaplaceApproximation": FULL,
    "AutoStructured": FULL,
    "AutoGaussian": FULL,
    "AutoNormalMessenger": DIAGONAL,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FITTED)
def test_a_guide_is_fitted_to_the_gaussian_posterior(name, device):
    precision = torch.tensor([[2.0, 0.8], [0.8, 1.0]], device=device)
    data = torch.tensor([1.0, -1.0], device=device)

    def model():
        energy = lambda x: 0.5 * (x @ precision * x).sum(-1)
        z = pyro.sample("z", ebm.GibbsBoltzmann(energy, ebm.Flat((2,), device=device)))
        pyro.sample("y", dist.Normal(z, 1.0).to_event(1), obs=data)

    posterior = precision + torch.eye(2, device=device)
    cov = posterior.inverse()
    guide = AUTOGUIDES[name](model)
    elbo = Trace_ELBO(100, vectorize_particles=True, max_plate_nesting=0)
    svi = SVI(model, guide, ClippedAdam({"lr": 0.1, "lrd": 0.01 ** (1 / 500)}), elbo)
    for _ in range(500):
        svi.step()
    if name == "AutoLaplaceApproximation":
        guide = guide.laplace_approximation()
    draws = Predictive(guide, num_samples=40_000, parallel=True, return_sites=["z"])()["z"]
    # In standard deviations; what the last steps of training leave is about 0.02.
    scale = cov.diagonal().sqrt()
    assert ((draws.mean(0) - cov @ data) / scale).abs().max() < 0.05
    if FITTED[name] is not None:
        best = cov if FITTED[name] == FULL else posterior.diagonal().reciprocal().diag()
        assert ((draws.T.cov() - best) / torch.outer(scale, scale)).abs().max() < 0.05


GRADIENTS = {
    name: partial(make, 500, vectorize_particles=True, max_plate_nesting=0, **kwargs)
    for name, make, kwargs in (
        ("Trace", Trace_ELBO, {}),
        ("TraceGraph", TraceGraph_ELBO, {}),
        ("TraceEnum", TraceEnum_ELBO, {"strict_enumeration_warning": False}),
        ("JitTrace", JitTrace_ELBO, {"ignore_jit_warnings": True}),
    )
}


@pytest.mark.parametrize("elbo", GRADIENTS)
def test_the_gradient_of_the_bound_in_a_guide_is_the_closed_form(elbo, device):
    p, elbo = in_guide((), device), GRADIENTS[elbo]()
    pyro.param("loc", torch.zeros((), device=device))
    pyro.param("precision", torch.ones((), device=device), constraint=constraints.positive)
    leaves = dict(pyro.get_param_store().named_parameters())
    losses, grads = [], []
    for _ in range(40):
        losses.append(elbo.loss_and_grads(p.model, p.guide))
        grads.append(torch.stack([leaves["loc"].grad, leaves["precision"].grad]))
        for leaf in leaves.values():
            leaf.grad = None
    # Loss (m^2 + 1/k + (1 - m)^2 + 1/k + log k) / 2 + log(2 pi) - log(2 pi e) / 2 at m = 0, k = 1,
    # and its derivatives in m and in log k.
    truth = torch.tensor([1.0 + 0.5 * math.log(2 * math.pi), -1.0, -0.5])
    found = torch.cat([torch.tensor(losses)[:, None], torch.stack(grads).cpu()], 1)
    error = (found.mean(0) - truth) / (found.std(0) / len(found) ** 0.5)
    assert error.abs().max() < FAR


@pytest.mark.slow
def test_an_energy_in_the_guide_learns_the_posterior(device):
    p = in_guide((), device)
    pyro.param("loc", torch.tensor(-1.0, device=device))
    pyro.param("precision", torch.tensor(0.5, device=device), constraint=constraints.positive)
    elbo = Trace_ELBO(400, vectorize_particles=True, max_plate_nesting=0)
    svi = SVI(p.model, p.guide, ClippedAdam({"lr": 0.05, "lrd": 0.01 ** (1 / 400)}), elbo)
    for _ in range(400):
        svi.step()
    # Other seeds end within 0.003 of the mean and within 1 % of the precision.
    torch.testing.assert_close(pyro.param("loc").item(), MEAN, rtol=0, atol=0.02)
    torch.testing.assert_close(pyro.param("precision").item(), SD**-2, rtol=0.05, atol=0)


@pytest.mark.slow
def test_neural_transport_has_the_moments_of_the_posterior(device):
    z = with_neutra(latent((2,), device), num_steps=200, num_samples=400, warmup_steps=150)
    assert standard_errors(z, MEAN * torch.ones(2), SD * torch.ones(2)) < FAR
    variance = SD**2 * torch.ones(2)
    assert standard_errors((z - MEAN) ** 2, variance, 2**0.5 * variance) < FAR


def half_line(n=200_000):
    x = (torch.arange(n) + 0.5) * (20.0 / n)
    return x, lambda x: 0.5 * (x - 1.0) ** 2 - (1.0 + x).log()


def triangle(n=600):
    grid = (torch.arange(n) + 0.5) / n
    u, v = torch.meshgrid(grid, grid, indexing="ij")
    x = torch.stack([u, v, 1.0 - u - v], -1)[u + v < 1.0]
    return x, lambda x: 6.0 * (x[..., 0] - 0.6) ** 2 + 4.0 * x[..., 1] * x[..., 2] - x[..., 2]


CONSTRAINED = {
    "half line": ((), constraints.positive, half_line),
    "simplex": ((3,), constraints.simplex, triangle),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CONSTRAINED)
def test_chains_on_a_constrained_support_have_the_moments_of_quadrature(name, device):
    event, support, grid = CONSTRAINED[name]
    x, energy = grid()
    flat = ebm.Flat(event, support, device=device)
    model = lambda: pyro.sample("x", ebm.GibbsBoltzmann(energy, flat, beta=1.5))
    draws = run(NUTS(model), 800, 200).get_samples()["x"].cpu()
    mass = (-1.5 * energy(x)).softmax(0).reshape(-1, *[1] * len(event))
    mean = (mass * x).sum(0)
    variance = (mass * (x - mean) ** 2).sum(0)
    spread = ((mass * (x - mean) ** 4).sum(0) - variance**2).sqrt()
    assert standard_errors(draws, mean, variance.sqrt()) < FAR
    assert standard_errors((draws - mean) ** 2, variance, spread) < FAR
