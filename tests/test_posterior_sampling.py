"""The reference posteriors, sampled: the rule of acceptance holds, and a wrong model breaks it.

``python -m benchmarks.posteriors`` makes the table of all posteriors and both samplers; here NUTS
has those that are hard to reach or to sample, so that the whole takes minutes.
"""

import pyro.distributions as dist
import pytest

from benchmarks.posteriors import SCHOOLS, compare, sample
from tests.posteriors import POSTERIORS, REFERENCE, load, sites
from tests.test_posteriordb import Instead

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not REFERENCE.is_dir(), reason="the reference posteriors are not beside this checkout"
    ),
]
GP, MIXTURE = "gp_pois_regr-gp_regr", "low_dim_gauss_mix-low_dim_gauss_mix"
NUTS = [SCHOOLS, GP, MIXTURE, "garch-garch11", "hmm_example-hmm_example", "mesquite-mesquite"]
RUNS = [("ChEES", name) for name in POSTERIORS] + [("NUTS", name) for name in NUTS]


@pytest.mark.parametrize(("sampler", "name"), RUNS)
def test_the_draws_are_those_of_the_posterior(sampler, name):
    _, row = sample(name, sampler)
    assert row.passes, row


def test_chains_in_a_spurious_mode_go_on_from_where_others_are():
    """About 3 % of uniform starts end 452 nats above the main mode, 5 dimensions or not."""
    mcmc, row = sample(MIXTURE, "ChEES", seed=1, size=(128, 250))
    assert mcmc.adapted.moved
    assert row.passes, row


def test_a_wrong_prior_is_seen():
    other = Instead(rho=lambda: dist.Gamma(25.0, 5.0))(POSTERIORS[GP](load(GP)[0]))
    _, row = sample(GP, "ChEES", model=other)
    assert row.mean_error > 0.1
    assert row.z > 5
    assert row.r_hat < 1.01


@pytest.mark.parametrize("name", [SCHOOLS, GP])
def test_the_reference_passes_against_itself_and_not_if_scaled(name):
    _, _, draws, _ = load(name)
    half = sites(name, draws[:5].double())
    assert compare(name, half).passes
    stretched = draws.mean((0, 1)) + 1.15 * (draws - draws.mean((0, 1)))
    assert not compare(name, sites(name, stretched.double().abs())).passes
