"""Stein's identity: the score of a posterior's density under the reference draws.

For a density ``p`` on the unconstrained space, draws ``x`` from it and a constant ``c``,
``E[score(x)] = 0`` and ``E[score(x) (x - c)^T] = -I``, whatever the normalisation. This tests
a model's density without any sampler.
"""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch.distributions import biject_to
from torch.fx.experimental.proxy_tensor import make_fx

from tests.common import EXACT, FAR, NUMERIC
from tests.posteriors import POSTERIORS, REFERENCE, columns, load, sites

pytestmark = pytest.mark.skipif(
    not REFERENCE.is_dir(), reason="the reference posteriors are not beside this checkout"
)
CHUNK = 1000
BATCHES = 10  # in each chain; the reference draws are thinned, with next to no autocorrelation


class Unconstrained:
    """The log density of a model's sites on the unconstrained space, as one flat vector."""

    def __init__(self, model, jacobian=True):
        self.model, self.jacobian = model, jacobian
        trace = poutine.trace(model).get_trace()
        latent = {name: trace.nodes[name] for name in trace.stochastic_nodes}
        self.transforms = {k: biject_to(node["fn"].support) for k, node in latent.items()}
        self.shapes = {
            k: transform.inverse_shape(latent[k]["value"].shape)
            for k, transform in self.transforms.items()
        }

    def inverse(self, values):
        """From values ``(*batch, *event)`` of the sites to points ``(*batch, d)``."""
        parts = []
        for k, transform in self.transforms.items():
            x = transform.inv(values[k])
            parts.append(x.reshape(*x.shape[: x.dim() - len(self.shapes[k])], -1))
        return torch.cat(parts, -1)

    def log_density(self, x):
        """The log density at one point ``(d,)``."""
        parts = x.split([math.prod(shape) for shape in self.shapes.values()])
        values, total = {}, 0.0
        for (k, shape), part in zip(self.shapes.items(), parts, strict=True):
            transform, u = self.transforms[k], part.reshape(shape)
            values[k] = transform(u)
            if self.jacobian:
                total = total + transform.log_abs_det_jacobian(u, values[k]).sum()
        with pyro.validation_enabled(False):  # its branches on values cannot be batched or traced
            trace = poutine.trace(poutine.condition(self.model, data=values)).get_trace()
            return total + trace.log_prob_sum()

    def score(self, x):
        """The gradients at points ``(n, d)``."""
        return torch.func.vmap(torch.func.grad(self.log_density))(x)


def reference(name, posterior):
    """The reference draws and their scores on the unconstrained space: ``(chains, draws, d)``."""
    x = posterior.inverse(sites(name, load(name)[2]))
    score = torch.cat([posterior.score(part) for part in x.flatten(0, 1).split(CHUNK)])
    return x, score.unflatten(0, x.shape[:2])


def whitened(x, score):
    """The same in coordinates of identity covariance, where no direction hides another."""
    factor = torch.linalg.cholesky(x.flatten(0, 1).T.cov())
    return torch.linalg.solve_triangular(factor, x.mT, upper=False).mT, score @ factor


def z_values(f):
    """Means of ``(chains, draws, ...)`` in standard errors, which are those of batch means."""
    means = f.unflatten(1, (BATCHES, -1)).mean(2).flatten(0, 1)
    return means.mean(0) / (means.std(0) / len(means) ** 0.5)


def far(x, score):
    """How far Stein's identity is from true, in standard errors: the largest component."""
    deviation = x - x.mean((0, 1))  # about the mean, where the error is least
    product = score.unsqueeze(-1) * deviation.unsqueeze(-2) + torch.eye(x.shape[-1])
    return torch.cat((z_values(score).flatten(), z_values(product).flatten())).abs().max()


def make(name, **changes):
    """The model of a posterior, with these entries of the data changed."""
    return POSTERIORS[name](load(name)[0] | changes)


@pytest.mark.parametrize("name", POSTERIORS)
def test_the_reference_draws_satisfy_steins_identity_and_no_power_of_the_density_does(name):
    x, score = reference(name, Unconstrained(make(name)))
    assert far(x, score) < FAR
    assert far(*whitened(x, score)) < FAR
    assert far(*whitened(x, 1.1 * score)) > FAR  # the planted fault: an inverse temperature


class Instead(poutine.messenger.Messenger):
    """A handler that gives sites the distributions that these functions make."""

    def __init__(self, **others):
        super().__init__()
        self.others = others

    def _pyro_sample(self, msg):
        if msg["name"] in self.others:
            msg["fn"] = self.others[msg["name"]]()


def missing_jacobian(name):
    return lambda: Unconstrained(make(name), jacobian=False)


def other_prior(name, **others):
    return lambda: Unconstrained(Instead(**others)(make(name)))


def swapped(name, first, second):
    data = load(name)[0]
    return Unconstrained(make(name, **{first: data[second], second: data[first]}))


SCHOOLS, GP = "eight_schools-eight_schools_noncentered", "gp_pois_regr-gp_regr"
LINE, TREES = "kilpisjarvi_mod-kilpisjarvi", "mesquite-mesquite"
LITTLE_DATA = SCHOOLS, GP, LINE, TREES, "garch-garch11", "hmm_example-hmm_example"
FAULTS = {f"{name}, no Jacobian": (name, missing_jacobian(name)) for name in LITTLE_DATA} | {
    "effects' scale": (SCHOOLS, other_prior(SCHOOLS, tau=lambda: dist.HalfCauchy(2.5))),
    "effects' tails": (SCHOOLS, other_prior(SCHOOLS, tau=lambda: dist.HalfNormal(5.0))),
    "effects' mean": (SCHOOLS, other_prior(SCHOOLS, mu=lambda: dist.Normal(0.0, 4.0))),
    "gamma's rate": (GP, other_prior(GP, rho=lambda: dist.Gamma(25.0, 5.0))),
    "slope's scale": (LINE, other_prior(LINE, beta=lambda: dist.Normal(0.0, 1 / 15))),
    "first volatility": ("garch-garch11", lambda: Unconstrained(make("garch-garch11", sigma1=1))),
    "predictors": (TREES, lambda: swapped(TREES, "diam1", "diam2")),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_steins_identity_sees_a_planted_fault(fault):
    name, make_posterior = FAULTS[fault]
    assert far(*whitened(*reference(name, make_posterior()))) > FAR


@pytest.mark.parametrize("name", POSTERIORS)
def test_values_of_sites_and_columns_of_the_reference_are_the_same_draws(name):
    _, names, draws, summaries = load(name)
    found = columns(name, sites(name, draws[:2, :50]))
    assert list(found) == names == list(summaries)
    torch.testing.assert_close(torch.stack(list(found.values()), -1), draws[:2, :50], **NUMERIC)


@pytest.mark.parametrize("name", POSTERIORS)
def test_a_traced_batched_gradient_equals_that_of_each_point(name):
    posterior = Unconstrained(make(name))
    x = posterior.inverse(sites(name, load(name)[2][0, :3]))
    traced = make_fx(lambda u: posterior.score(u))(torch.randn_like(x))
    each = torch.stack([torch.func.grad(posterior.log_density)(u) for u in x])
    torch.testing.assert_close(traced(x), each, **NUMERIC)


@pytest.mark.parametrize("name", POSTERIORS)
def test_the_score_in_float32_is_that_in_float64(name):
    wide = Unconstrained(make(name))
    x = wide.inverse(sites(name, load(name)[2][0]))
    torch.set_default_dtype(torch.float32)
    narrow = Unconstrained(make(name)).score(x[:20].float())
    assert narrow.dtype == torch.float32
    factor = torch.linalg.cholesky(x.T.cov())
    error = (narrow.to(x) - wide.score(x[:20])) @ factor  # in standard deviations of the draws
    assert error.abs().max() < 1e-3


def node(name, site):
    """A node of the model's trace at the first reference draw, and the draw."""
    values = sites(name, load(name)[2][0, 0])
    return poutine.trace(poutine.condition(make(name), values)).get_trace().nodes[site], values


def test_the_variance_of_garch_follows_its_recursion():
    found, values = node("garch-garch11", "y")
    data, (alpha1, beta1, _) = load("garch-garch11")[0], values["weights"]
    variance = [torch.tensor(data["sigma1"] ** 2)]
    for y in data["y"][:-1]:
        news = values["alpha0"] + alpha1 * (y - values["mu"]) ** 2
        variance.append(news + beta1 * variance[-1])
    torch.testing.assert_close(found["fn"].base_dist.scale ** 2, torch.stack(variance), **EXACT)


@pytest.mark.parametrize("length", [2, 3, 8, 100])
def test_the_likelihood_of_the_hidden_states_follows_the_forward_recursion(length):
    name = "hmm_example-hmm_example"
    y, values = load(name)[0]["y"][:length], sites(name, load(name)[2][0, 0])
    model = poutine.condition(make(name, y=y), values)
    found = poutine.trace(model).get_trace().nodes["y"]["fn"].log_factor
    rows, mu = torch.stack((values["theta1"], values["theta2"])), values["steps"].cumsum(-1)
    emission = dist.Normal(mu, 1.0).log_prob(torch.tensor(y)[:, None]).exp()
    forward = emission[0]
    for e in emission[1:]:
        forward = forward @ rows * e
    torch.testing.assert_close(found, forward.sum().log(), **EXACT)
