"""Importance sampling by guides, and how far its log Z is below the truth on average."""

import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from pyro.infer.autoguide import AutoMultivariateNormal
from pyro.infer.mcmc.util import initialize_model

import pyro_ebm as ebm
from pyro_ebm.partition import Importance, Variational, log_partition
from tests.common import EXACT, FAR

Y = torch.linspace(-2.0, 2.0, 5, dtype=torch.float64)


def pair(y, z):
    return 0.5 * (y - z) ** 2


def joint(y):
    return ebm.GibbsBoltzmann(ebm.Given(pair, y, ...), dist.Normal(0.0, 1.0))


def joint_log_z(y):
    return -0.5 * math.log(2) - y**2 / 4


def encoder(y, scale=0.9):
    pyro.sample("z", dist.Normal(y / 2, scale))


# Guides ------------------------------------------------------------------------------------------


def test_an_amortised_guide_proposes_for_each_element():
    for y in (Y, Y[:3], torch.tensor([3.0])):
        value, std_error, ess = log_partition(joint(y), Importance(encoder, 2000, site="z"))
        assert value.shape == std_error.shape == ess.shape == y.shape
        assert ((value - joint_log_z(y)).abs() < FAR * std_error).all()
        assert (ess > 1500).all()
    # where the base, which knows nothing of y, has few particles
    assert log_partition(joint(torch.tensor([3.0])), Importance(None, 2000)).ess < 500


def test_the_exact_posterior_as_a_guide_has_no_error():
    method = Importance(lambda y: encoder(y, 0.5**0.5), 16, site="z")
    value, std_error, ess = log_partition(joint(Y), method)
    torch.testing.assert_close(value, joint_log_z(Y), **EXACT)
    assert (std_error < 1e-7).all()  # the root of the rounding of ess
    torch.testing.assert_close(ess, torch.full((5,), 16.0), **EXACT)
    torch.testing.assert_close(method.gap(joint(Y)).value, torch.zeros(5), **EXACT)


def test_an_autoguide_proposes_by_all_of_its_sites():
    d = ebm.GibbsBoltzmann(lambda x: x.square().sum(-1), ebm.Flat((3,)))
    guide = AutoMultivariateNormal(lambda: pyro.sample("x", d), init_scale=0.9)
    guide()
    with torch.no_grad():
        guide.loc.zero_()
    value, std_error, _ = log_partition(d, Importance(guide, 4000))
    assert abs(value - 1.5 * math.log(math.pi)) < FAR * std_error


def test_a_guide_of_finite_values_and_one_that_knows_no_batch():
    w = torch.tensor([1.0, -2.0, 0.5])
    d = ebm.GibbsBoltzmann(lambda x: (w * x).sum(-1), ebm.Flat((3,), constraints.boolean))
    beta = torch.tensor([0.5, 1.0])
    many = ebm.GibbsBoltzmann(d.energy, d.base, beta)

    def guide():
        pyro.sample("x", dist.Bernoulli(torch.full((3,), 0.5)).to_event(1))

    for law, b in ((d, torch.tensor(1.0)), (many, beta)):
        value, std_error, _ = log_partition(law, Importance(guide, 4000))
        truth = torch.nn.functional.softplus(-b.unsqueeze(-1) * w).sum(-1)
        assert ((value - truth).abs() < FAR * std_error).all()


def test_the_gradient_is_that_of_log_z_and_leaves_the_guide_alone():
    y, scale = Y.clone().requires_grad_(), torch.tensor(0.9, requires_grad=True)
    method = Importance(lambda y: encoder(y, scale), 20_000, site="z")
    value = method.log_z(joint(y))
    (got,) = torch.autograd.grad(value.sum(), y, retain_graph=True)
    # E[z - y] under the posterior; five standard errors of 2e4 draws of sd .7: .025.
    torch.testing.assert_close(got, -Y / 2, rtol=0.0, atol=0.03)
    assert torch.autograd.grad(value.sum(), scale, allow_unused=True) == (None,)


def model(method):
    k = pyro.sample("k", dist.Normal(0.0, 1.0))
    d = ebm.GibbsBoltzmann(ebm.Given(pair, k, ...), dist.Normal(0.0, 1.0), log_partition=method)
    with pyro.plate("n", 4):
        pyro.sample("z", d, obs=torch.linspace(-1.0, 1.0, 4))


@pytest.mark.parametrize("kind", [Importance, Variational])
def test_mcmc_has_the_derivative_of_the_value_through_the_draws(kind):
    guide = lambda y: pyro.sample("z", dist.Normal(y / 3, 0.9))
    method = kind(guide, 32, site="z", common_random_numbers=True)
    potential = initialize_model(model, (method,))[1]
    k = torch.tensor(0.7, requires_grad=True)
    # Pyro's own watch for NaN does not bear undefined gradients.
    torch.autograd.gradcheck(lambda k: potential({"k": k}), [k], check_undefined_grad=False)
    store = torch.tensor(0.9, requires_grad=True)  # SVI must not train the guide by such points
    d = ebm.GibbsBoltzmann(
        ebm.Given(pair, Y, ...),
        dist.Normal(0.0, 1.0),
        log_partition=kind(lambda y: encoder(y, store), 32, site="z", common_random_numbers=True),
    )
    assert not d.log_prob(Y).requires_grad


def test_single_precision_stays():
    one = torch.ones((), dtype=torch.float32)
    d = ebm.GibbsBoltzmann(lambda x: (x - 1) ** 2, ebm.Flat(dtype=torch.float32))
    method = Importance(lambda: pyro.sample("x", dist.Normal(one, one)), 64)
    parts = (*log_partition(d, method), *method.gap(d))
    assert {part.dtype for part in parts} == {torch.float32}


# The gap -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def replicates():
    """2000 estimates by 32 particles of a wide proposal, and how far they are below log Z.

    The estimate of Z has no bias, so Zhat / Z - 1 is added to the logs as a control variate: the
    mean of 2000 is then known to .002.
    """
    torch.set_default_dtype(torch.float64)
    d = ebm.GibbsBoltzmann(lambda x: 0.5 * x**2, ebm.Flat().expand([2000]))
    method = Importance(dist.Normal(torch.zeros(2000), 6.0), 32)
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore", ebm.UnnormalizedWarning)  # of about seven each
        torch.manual_seed(0)
        above = method(d).value - 0.5 * math.log(2 * math.pi)
        return above, above.exp() - 1 - above, method.gap(d)


def mean_and_error(values):
    return values.mean(), values.std() / len(values) ** 0.5


def far_apart(a, b):
    return abs(a[0] - b[0]) / torch.hypot(a[1], b[1])


def test_the_estimate_is_a_lower_bound_on_average(replicates):
    above, gap, _ = replicates
    assert Importance.bound == "lower"
    assert -above.mean() > FAR * mean_and_error(above)[1]
    assert abs(gap.mean() - 0.056) < 0.01


def test_the_gap_is_half_the_squared_error(replicates):
    _, truth, gap = replicates
    assert far_apart(mean_and_error(gap.value), mean_and_error(truth)) < FAR
    # Its error is of first order too: a tenth less than the spread of such skewed numbers.
    torch.testing.assert_close(gap.std_error.mean(), gap.value.std(), rtol=0.2, atol=0.0)


def test_a_gap_of_the_whole_squared_error_is_seen(replicates):
    """The planted fault of the test above."""
    _, truth, gap = replicates
    assert far_apart(mean_and_error(2 * gap.value), mean_and_error(truth)) > 4 * FAR


def test_a_gap_by_few_particles_is_not_trusted():
    d = ebm.GibbsBoltzmann(lambda x: 1e6 * (x - 3) ** 2, dist.Normal(0.0, 1.0))
    with pytest.warns(ebm.UnnormalizedWarning, match="cannot be trusted"):
        Importance(num_particles=100).gap(d)


def test_a_bound_on_average_may_stand_for_log_z():
    d = ebm.GibbsBoltzmann(lambda x: 0.5 * x**2, dist.Normal(0.0, 2.0))
    normalized = d.normalized(Importance(num_particles=2000))
    assert abs(normalized.log_z.value + 0.5 * math.log(5)) < FAR * normalized.log_z.std_error
    assert ebm.entropy(d, Importance(num_particles=2000)).std_error > 0


# Refusals ----------------------------------------------------------------------------------------

WRONG = {
    "no proposal": (lambda: Importance(3.0), TypeError, "a distribution or a guide, got 3.0"),
    "another site": (
        lambda: Importance(encoder)(joint(Y)),
        ValueError,
        r"site must be one of the guide's, \['z'\], got 'x'",
    ),
    "another batch": (
        lambda: Importance(lambda y: encoder(Y[:3]), site="z")(joint(Y)),
        ValueError,
        r"broadcasts to \(5,\), got sites of batch shapes {'z': \(3,\)}",
    ),
    "another event": (
        lambda: Importance(dist.Normal(torch.zeros(5), 1.0).to_event(1))(joint(Y)),
        ValueError,
        r"event shape \(\) and a batch that broadcasts to \(5,\), got \(5,\) and \(\)",
    ),
}


@pytest.mark.parametrize(("wrong", "error", "message"), WRONG.values(), ids=WRONG)
def test_a_wrong_proposal_is_named(wrong, error, message):
    with pytest.raises(error, match=message):
        wrong()
