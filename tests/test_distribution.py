"""The contract of Flat and GibbsBoltzmann."""

import copy
import math
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from torch import nn
from torch.distributions import biject_to

import pyro_ebm as ebm
from pyro_ebm.flat import states_of
from pyro_ebm.partition import Exact, Quadrature
from tests.common import EXACT, FALSE_ALARM, NUMERIC, Line


def sum_of_squares(event_dim):
    def energy(x):
        squares = 0.5 * x.to(torch.get_default_dtype()).square()
        return squares.sum(tuple(range(-event_dim, 0))) if event_dim else squares

    return energy


SUPPORTS = {
    "scalar": ((), constraints.real),
    "vector": ((2,), constraints.real),
    "image": ((3, 4, 4), constraints.real),
    "positive": ((), constraints.positive),
    "positive vector": ((3,), constraints.positive),
    "interval": ((2,), constraints.interval(-1.0, 3.0)),
    "unit interval": ((), constraints.unit_interval),
    "simplex": ((3,), constraints.simplex),
    "simplices": ((2, 3), constraints.simplex),
    "lower Cholesky": ((2, 2), constraints.lower_cholesky),
    "correlation Cholesky": ((3, 3), constraints.corr_cholesky),
    "ordered": ((3,), constraints.ordered_vector),
    "boolean": ((), constraints.boolean),
    "boolean vector": ((4,), constraints.boolean),
    "integers": ((), constraints.integer_interval(1, 3)),
    "integer image": ((2, 2), constraints.integer_interval(0, 2)),
    "one-hot": ((4,), constraints.one_hot),
    "spins beyond a table": ((40,), constraints.boolean),
}
FINITE = {k for k in SUPPORTS if k.startswith(("bool", "integer", "one"))}
parametrize = pytest.mark.parametrize(("event", "support"), SUPPORTS.values(), ids=SUPPORTS)
BATCHES = pytest.mark.parametrize("batch", [(), (3,), (2, 3)], ids=str)


def make(event, support, batch=(), device=None, beta=1.0):
    base = ebm.Flat(event, support, device=device).expand(batch)
    return ebm.GibbsBoltzmann(sum_of_squares(len(event)), base, beta)


@parametrize
@BATCHES
@pytest.mark.parametrize("sample", [(), (5,)], ids=str)
def test_samples_have_their_shape_lie_in_the_support_and_are_scored(
    event, support, batch, sample, device
):
    d = make(event, support, batch, device)
    x = d.sample(sample)
    assert x.shape == d.shape(sample) == (*sample, *batch, *event)
    assert x.device.type == device.type
    assert d.support.check(x).all()
    assert d.log_prob(x).shape == (*sample, *batch)
    assert d.log_prob(x).isfinite().all()


@parametrize
@BATCHES
def test_flat_samples_lie_in_the_support_at_density_one(event, support, batch, device):
    d = ebm.Flat(event, support, device=device).expand(batch)
    x = d.sample((7,))
    assert x.shape == (7, *batch, *event)
    assert d.support.check(x).all()
    assert (d.log_prob(x) == 0).all()
    assert d.log_prob(x).shape == (7, *batch)


@parametrize
def test_log_prob_is_minus_beta_times_the_energy(event, support, device):
    d = make(event, support, (), device, beta=1.7)
    x = ebm.Flat(event, support, device=device).sample((6,))
    torch.testing.assert_close(d.log_prob(x), -1.7 * d.energy(x), **EXACT)
    torch.testing.assert_close(d.potential(x), 1.7 * d.energy(x), **EXACT)


@pytest.mark.parametrize("name", sorted(set(SUPPORTS) - FINITE - {"spins beyond a table"}))
def test_every_support_has_a_bijection(name):
    event, support = SUPPORTS[name]
    flat = ebm.Flat(event, support)
    transform = biject_to(flat.support)
    x = flat.sample((4,))
    torch.testing.assert_close(transform(transform.inv(x)), x, **NUMERIC)


def test_the_jacobian_of_the_cholesky_bijection_is_that_of_autograd():
    transform = biject_to(ebm.Flat((3, 3), constraints.lower_cholesky).support)
    z = torch.randn(6)
    jacobian = torch.autograd.functional.jacobian(
        lambda z: transform(z)[tuple(torch.tril_indices(3, 3))], z
    )
    expected = torch.linalg.slogdet(jacobian).logabsdet
    torch.testing.assert_close(transform.log_abs_det_jacobian(z, transform(z)), expected, **EXACT)
    assert transform.forward_shape((5, 6)) == (5, 3, 3)
    assert transform.inverse_shape((5, 3, 3)) == (5, 6)
    with pytest.raises(ValueError, match="triangular number"):
        transform.forward_shape((5,))


@BATCHES
def test_the_batches_of_beta_base_and_given_parts_broadcast(batch, device):
    beta = torch.rand(batch, device=device) + 0.5
    base = dist.Normal(torch.zeros(2, 1, 2, device=device), 1.0).to_event(1)
    y = torch.randn(1, 2, device=device)
    energy = ebm.Given(lambda x, y: (x - y).square().sum(-1), y)
    d = ebm.GibbsBoltzmann(energy, base, beta)
    x = torch.randn(2, device=device)
    expected = base.log_prob(x) - beta * (x - y).square().sum(-1)
    assert d.batch_shape == expected.shape
    torch.testing.assert_close(d.log_prob(x), expected, **EXACT)
    assert d.sample((4,)).shape == (4, *d.batch_shape, 2)


def test_a_conditional_energy_brings_its_batch():
    y = torch.randn(5, 2)
    d = ebm.GibbsBoltzmann(ebm.Given(lambda x, y: (x - y).square().sum(-1), y), ebm.Flat((2,)))
    assert d.batch_shape == (5,)
    assert d.log_prob(torch.zeros(2)).shape == (5,)
    assert d.log_prob(torch.zeros(7, 1, 2)).shape == (7, 5)


@parametrize
@BATCHES
def test_expand_repeats_the_distribution(event, support, batch):
    d = make(event, support)
    wide = d.expand(batch)
    x = ebm.Flat(event, support).sample((4, *batch))
    assert wide.batch_shape == batch
    assert wide.event_shape == event
    torch.testing.assert_close(wide.log_prob(x), d.log_prob(x), **EXACT)
    assert wide.sample((2,)).shape == (2, *batch, *event)


def test_log_z_is_computed_once_for_what_expand_repeats():
    seen = []

    def energy(x):
        seen.append(x.shape)
        return 0.5 * x**2

    d = ebm.GibbsBoltzmann(energy, ebm.Flat(), log_partition=Quadrature(-9.0, 9.0, 50))
    value = d.expand((1000,)).log_prob(torch.zeros(1000))
    torch.testing.assert_close(value, torch.full((1000,), -0.5 * math.log(2 * math.pi)), **NUMERIC)
    assert max(shape.numel() for shape in seen) == 1000


def test_to_event_and_mask_do_what_they_do_elsewhere():
    d = ebm.GibbsBoltzmann(lambda x: 0.5 * x**2, ebm.Flat().expand((3,)))
    x = torch.randn(5, 3)
    event = d.to_event(1)
    assert event.event_shape == (3,)
    torch.testing.assert_close(event.log_prob(x), d.log_prob(x).sum(-1), **EXACT)
    mask = torch.tensor([True, False, True])
    torch.testing.assert_close(d.mask(mask).log_prob(x), d.log_prob(x) * mask, **EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_base_gives_the_type(dtype, device):
    base = dist.Normal(torch.zeros(2, dtype=dtype, device=device), 1.0).to_event(1)
    for measure in (base, ebm.Flat((2,), dtype=dtype, device=device)):
        d = ebm.GibbsBoltzmann(lambda x: x.square().sum(-1), measure, beta=2.0)
        assert d.sample().dtype == d.log_prob(d.sample()).dtype == dtype


class Quadratic(nn.Module):
    def __init__(self):
        super().__init__()
        self.k = nn.Parameter(torch.tensor([1.0, 2.0]))

    def forward(self, x):
        return 0.5 * (self.k * x.square()).sum(-1)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda d: pickle.loads(pickle.dumps(d))])
@pytest.mark.parametrize("expanded", [False, True])
def test_copies_are_the_same_distribution(copied, expanded):
    d = ebm.GibbsBoltzmann(
        Quadratic(), ebm.Flat((2,)), torch.tensor(2.0), log_partition=Quadrature(-9.0, 9.0, 60)
    )
    d = d.expand((3,)) if expanded else d
    other, x = copied(d), torch.randn(3, 2)
    torch.testing.assert_close(other.log_prob(x), d.log_prob(x), **EXACT)
    assert other.batch_shape == d.batch_shape
    with torch.no_grad():
        d.energy.k.add_(1.0)
    assert not torch.equal(other.log_prob(x), d.log_prob(x))


@parametrize
def test_it_works_in_inference_mode(event, support, device):
    d = make(event, support, (), device)
    with torch.inference_mode():
        x = d.sample((3,))
        inside = make(event, support, (), device)
        assert inside.log_prob(inside.sample((3,))).shape == (3,)
    assert torch.isfinite(d.log_prob(x)).all()


def test_sampling_leaves_no_trace():
    torch.manual_seed(1)
    energy = nn.Sequential(
        nn.Linear(2, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 1), nn.Flatten(0)
    )
    before = copy.deepcopy(energy.state_dict())
    d = ebm.GibbsBoltzmann(energy, dist.Normal(torch.zeros(2), 1.0).to_event(1))
    d.sample((16,))
    assert energy.training
    assert all(m.training for m in energy.modules())
    assert all(torch.equal(v, before[k]) for k, v in energy.state_dict().items())
    assert all(p.grad is None for p in energy.parameters())


def test_a_seed_repeats_the_samples():
    d = make((2,), constraints.real)
    pyro.set_rng_seed(5)
    first = d.sample((10,))
    pyro.set_rng_seed(5)
    assert torch.equal(d.sample((10,)), first)


def test_a_conditional_energy_draws_nothing_when_it_is_made():
    state = torch.get_rng_state()
    ebm.GibbsBoltzmann(ebm.Given(lambda x, y: (x - y) ** 2, torch.zeros(3)), dist.Normal(0.0, 1.0))
    assert torch.equal(torch.get_rng_state(), state)


def test_chains_draw_from_a_gaussian(device):
    d = ebm.GibbsBoltzmann(
        sum_of_squares(1), dist.Normal(torch.zeros(1, device=device), 10.0).to_event(1), beta=4.0
    )
    law = Line(lambda x: 4 * d.energy(x) + x[..., 0] ** 2 / 200, device=device)
    x = d.sample((5000,))
    # Chains only approximate: the test is on moments, at five standard errors.
    assert abs(x.mean()) < 5 * 0.5 / 5000**0.5
    truth = law.mean(torch.square)
    assert abs(x.square().mean() - truth) < 5 * truth * (2 / 5000) ** 0.5


@pytest.mark.parametrize("name", sorted(FINITE))
def test_finite_supports_are_sampled_exactly(name, device):
    event, support = SUPPORTS[name]
    d = make(event, support, (), device, beta=0.7)
    states = d.enumerate_support()
    expected = 20_000 * torch.softmax(-d.potential(states), 0)
    x = d.sample((20_000,))
    same = (x.unsqueeze(1) == states).reshape(20_000, len(states), -1).all(-1)
    assert (same.sum(1) == 1).all()
    chi2 = ((same.sum(0) - expected).square() / expected).sum()
    dof = torch.tensor((len(states) - 1) / 2, device=device)
    assert torch.special.gammaincc(dof, chi2 / 2) > FALSE_ALARM


def test_spins_beyond_a_table_are_sampled_by_sweeps():
    d = ebm.GibbsBoltzmann(lambda x: -x.sum(-1), ebm.Flat((40,), constraints.boolean))
    x = d.sample((500,))  # independent spins: each is one with probability sigmoid(1)
    p = torch.sigmoid(torch.tensor(1.0)).item()
    assert abs(x.mean().item() - p) < 5 * (p * (1 - p) / x.numel()) ** 0.5


def test_a_sampler_replaces_the_chains_and_its_shape_is_checked():
    d = ebm.GibbsBoltzmann(
        lambda x: 0.5 * x**2, ebm.Flat(), sampler=lambda d, shape: torch.ones(d.shape(shape))
    )
    assert (d.sample((3,)) == 1).all()
    d = ebm.GibbsBoltzmann(lambda x: x, ebm.Flat(), sampler=lambda d, shape: torch.ones(7))
    with pytest.raises(ValueError, match=r"shape \(3,\), got \(7,\)"):
        d.sample((3,))


def test_enumerate_support_has_pyros_shapes():
    d = ebm.GibbsBoltzmann(
        lambda x: x.sum(-1), ebm.Flat((3,), constraints.boolean), beta=torch.ones(2, 1)
    )
    assert d.has_enumerate_support
    assert d.enumerate_support().shape == (8, 2, 1, 3)
    assert d.enumerate_support(expand=False).shape == (8, 1, 1, 3)
    assert d.expand((2, 5)).enumerate_support().shape == (8, 2, 5, 3)
    assert not make((2,), constraints.real).has_enumerate_support
    assert not make((40,), constraints.boolean).has_enumerate_support


def test_too_many_states_are_refused_with_their_number():
    with pytest.raises(ValueError, match=r"has 1.1e\+12 states"):
        states_of(constraints.boolean, (40,))
    with pytest.raises(ValueError, match="has inf states"):
        make((2,), constraints.real).enumerate_support()


def test_a_normalised_base_of_a_finite_support_counts():
    base = dist.Bernoulli(torch.full((3,), 0.3)).to_event(1)
    d = ebm.GibbsBoltzmann(lambda x: -x.sum(-1), base, log_partition=Exact())
    total = d.log_prob(d.enumerate_support()).logsumexp(0)
    torch.testing.assert_close(total, torch.zeros(()), **EXACT)


def test_small_beta_gives_the_base_and_large_beta_the_minimum():
    base = dist.Normal(0.0, 1.0)
    x = torch.linspace(-3, 3, 7)
    quadrature = Quadrature(-12.0, 12.0, 400)
    hot = ebm.GibbsBoltzmann(lambda x: (x - 1) ** 2, base, 1e-9, log_partition=quadrature)
    torch.testing.assert_close(hot.log_prob(x), base.log_prob(x), **NUMERIC)
    cold = ebm.GibbsBoltzmann(lambda x: (x - 1) ** 2, base, 1e4)
    assert (cold.sample((100,)) - 1).abs().max() < 0.1


WRONG_OUTPUTS = {
    "forgot the sum": (lambda x: x**2, ValueError, r"expected \(5,\), got \(5, 2\)"),
    "summed over the batch": (lambda x: x.sum(), ValueError, r"expected \(5,\), got \(\)"),
    "kept a dimension": (
        lambda x: x.sum(-1, keepdim=True),
        ValueError,
        r"expected \(5,\), got \(5, 1\)",
    ),
    "a number": (lambda x: 1.0, TypeError, "must return a tensor, got float"),
    "integers": (lambda x: x.long().sum(-1), TypeError, "got torch.int64"),
    "complex": (lambda x: x.sum(-1) * 1j, TypeError, "got torch.complex128"),
    "in place": (lambda x: x.mul_(0.5).sum(-1), ValueError, "must not change its points"),
    "mean over the batch": (
        lambda x: (x - x.mean(0)).square().sum(-1),
        ValueError,
        "its own energy",
    ),
    "spread sum": (lambda x: x.square().sum().expand(len(x)), ValueError, "its own energy"),
}


@pytest.mark.parametrize(("energy", "error", "message"), WRONG_OUTPUTS.values(), ids=WRONG_OUTPUTS)
def test_a_wrong_output_is_refused_at_the_first_call(energy, error, message, device):
    d = ebm.GibbsBoltzmann(energy, ebm.Flat((2,), device=device))
    x = torch.randn(5, 2, device=device)
    with pytest.raises(error, match=f"energy '<lambda>'.*{message}"):
        d.log_prob(x)


def test_the_message_counts_the_points():
    d = ebm.GibbsBoltzmann(lambda x: x.square().sum().expand(20), ebm.Flat())
    with pytest.raises(ValueError, match=r"for point 0 of 20 in the batch .* alone"):
        d.log_prob(torch.ones(20))


def test_dropout_in_training_mode_is_found():
    torch.manual_seed(2)
    net = nn.Sequential(nn.Linear(2, 64), nn.Dropout(0.5), nn.Linear(64, 1), nn.Flatten(0))
    d = ebm.GibbsBoltzmann(lambda x: net(x.reshape(-1, 2)).reshape(x.shape[:-1]), ebm.Flat((2,)))
    with pytest.raises(ValueError, match="random .dropout"):
        d.log_prob(torch.randn(10, 2))
    net.eval()
    assert d.log_prob(torch.randn(10, 2)).shape == (10,)


def test_the_batch_is_compared_once():
    seen = []

    def energy(x):
        seen.append(x.shape)
        return x.square().sum(-1)

    x = torch.randn(10, 2)
    for _ in range(3):
        ebm.GibbsBoltzmann(energy, ebm.Flat((2,))).log_prob(x)
    assert [s.numel() for s in seen] == [20, 2, 2, 20, 20]
    ebm.GibbsBoltzmann(energy, ebm.Flat((2,)), validate_args=False).log_prob(x)
    assert len(seen) == 6


@pytest.mark.parametrize("beta", [0.0, -1.0, math.nan, math.inf, torch.tensor([1.0, -2.0])])
def test_beta_out_of_range_is_refused(beta):
    with pytest.raises(ValueError, match="beta must be positive and finite, got"):
        ebm.GibbsBoltzmann(lambda x: x, ebm.Flat(), beta)


def test_wrong_arguments_are_named():
    with pytest.raises(TypeError, match="energy must be callable, got float"):
        ebm.GibbsBoltzmann(1.0, ebm.Flat())
    with pytest.raises(TypeError, match="base must be a Pyro distribution, got int"):
        ebm.GibbsBoltzmann(lambda x: x, 3)
    with pytest.raises(ValueError, match="log_partition must be a method"):
        ebm.GibbsBoltzmann(lambda x: x, ebm.Flat(), log_partition="exact")
    with pytest.raises(ValueError, match="at least 1 dimensions"):
        ebm.Flat((), constraints.simplex)
    with pytest.raises(ValueError, match="must not be empty"):
        ebm.Flat((0,))


def test_points_outside_the_support_are_refused():
    d = ebm.GibbsBoltzmann(lambda x: x, ebm.Flat((), constraints.positive))
    with pytest.raises(ValueError, match="within the support"):
        d.log_prob(torch.tensor(-1.0))
    with pytest.raises(ValueError, match="within the support"):
        ebm.Flat((), constraints.positive).log_prob(torch.tensor(-1.0))


@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
def test_an_energy_that_is_nowhere_finite_is_named(value):
    d = ebm.GibbsBoltzmann(lambda x: 0 * x + value, ebm.Flat())
    with pytest.raises(ValueError, match=f"must be finite .* got {value} at the end of 4 of 4"):
        d.sample((4,))


def test_chains_start_inside_a_wall():
    d = ebm.GibbsBoltzmann(lambda x: torch.where(x > 1.5, x, torch.inf), dist.Normal(0.0, 1.0))
    assert (d.sample((200,)) > 1.5).all()


@pytest.mark.parametrize(
    ("event", "support", "truth"),
    [
        ((2,), constraints.interval(-1.0, 3.0), 2 * math.log(4.0)),
        ((), constraints.unit_interval, 0.0),
        ((3,), constraints.simplex, -math.log(2.0)),
        ((3,), constraints.boolean, 3 * math.log(2.0)),
        ((2,), constraints.integer_interval(0, 2), 2 * math.log(3.0)),
        ((4,), constraints.one_hot, math.log(4.0)),
        ((2,), constraints.real, math.inf),
        ((), constraints.positive, math.inf),
        ((2, 2), constraints.lower_cholesky, math.inf),
    ],
)
def test_the_volume_of_a_support(event, support, truth):
    assert ebm.Flat(event, support).log_volume == pytest.approx(truth)


def test_flat_components_are_one_flat_measure_with_its_volume():
    d = ebm.Flat((), constraints.interval(0.0, 3.0)).expand([4, 2]).to_event(1)
    assert isinstance(d, ebm.Flat)
    assert (d.batch_shape, d.event_shape) == ((4,), (2,))
    assert d.log_volume == pytest.approx(2 * math.log(3.0))
    assert d.to_event().event_shape == (4, 2)
    assert ebm.Flat((3,), constraints.simplex).to_event(0).batch_shape == ()
    ends = constraints.interval(torch.zeros(2), torch.tensor([2.0, 5.0]))
    assert ebm.Flat((2,), ends).log_volume == pytest.approx(math.log(10.0))


def test_flat_samples_simplices_uniformly():
    x = ebm.Flat((3,), constraints.simplex).sample((20_000,))
    expected = dist.Dirichlet(torch.ones(3))
    assert (x.mean(0) - expected.mean).abs().max() < 5 * (1 / 18 / 20_000) ** 0.5
    assert (x.var(0) - 1 / 18).abs().max() < 0.003


@pytest.mark.parametrize(
    ("log_partition", "expected"), [(None, False), ("constant", False), (Exact(), True)]
)
def test_is_normalized_says_whether_log_z_is_there(log_partition, expected):
    base = ebm.Flat((2,), constraints.boolean)
    d = ebm.GibbsBoltzmann(lambda x: x.sum(-1), base, log_partition=log_partition)
    assert d.is_normalized is expected
