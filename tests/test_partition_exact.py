"""log Z by enumeration: in chunks, by components, and by an energy that sums itself."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pyro.distributions import constraints
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import pyro_ebm as ebm
from pyro_ebm.partition import Exact, exact, log_partition
from tests.common import EXACT

BETAS = [0.25, 1.0, 8.0]


def field(x):
    """An energy that couples all components."""
    w = torch.linspace(-1.0, 1.0, x.shape[-1], device=x.device)
    s = (x * w).sum(-1)
    return s + 0.3 * s.square()


def on_matrices(x):
    return field(x.flatten(-2).to(torch.get_default_dtype()))


def chain(coupling):
    """Free spins in a row: log Z is log 2 + (n - 1) log(2 cosh(beta J))."""
    return lambda x: -coupling * ((2 * x[..., 1:] - 1) * (2 * x[..., :-1] - 1)).sum(-1)


def chain_log_z(n, coupling):
    return math.log(2) + (n - 1) * (2 * coupling.cosh()).log()


SUPPORTS = {
    "booleans": lambda: (field, ebm.Flat((7,), constraints.boolean)),
    "a matrix": lambda: (on_matrices, ebm.Flat((2, 3), constraints.boolean)),
    "integers": lambda: (
        lambda x: field(x.to(torch.get_default_dtype())),
        ebm.Flat((3,), constraints.integer_interval(-2, 2)),
    ),
    "one-hot": lambda: (on_matrices, ebm.Flat((3, 4), constraints.one_hot)),
    "a normalised base": lambda: (
        field,
        dist.Bernoulli(torch.linspace(0.1, 0.8, 6)).to_event(1),
    ),
    "categorical": lambda: (
        lambda x: field(x.to(torch.get_default_dtype())),
        dist.Categorical(torch.tensor([0.2, 0.5, 0.3])).expand((4,)).to_event(1),
    ),
}


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("make", SUPPORTS.values(), ids=SUPPORTS)
@pytest.mark.parametrize("chunk_size", [1, 10, 1000])
def test_chunks_add_up_to_the_table(make, beta, chunk_size):
    energy, base = make()
    d = ebm.GibbsBoltzmann(energy, base, beta)
    got, want = (log_partition(d, m) for m in (Exact(chunk_size), Exact()))
    torch.testing.assert_close(got.value, want.value, **EXACT)
    assert got.std_error == 0


@given(chunk_size=st.integers(1, 40), n=st.integers(1, 5), shift=st.floats(-50.0, 50.0))
def test_any_chunks_give_the_table_and_a_shift_of_the_energy_is_one_of_log_z(chunk_size, n, shift):
    base = ebm.Flat((n,), constraints.boolean)
    plain = log_partition(ebm.GibbsBoltzmann(field, base, 2.0), Exact()).value
    shifted = ebm.GibbsBoltzmann(lambda x: field(x) + shift, base, 2.0)
    got = log_partition(shifted, Exact(chunk_size)).value
    torch.testing.assert_close(got, plain - 2.0 * shift, rtol=1e-10, atol=1e-10)


@pytest.mark.slow
def test_four_million_states_in_chunks_equal_the_closed_form(device):
    n, coupling = 22, torch.tensor(0.3, device=device, requires_grad=True)
    base = ebm.Flat((n,), constraints.boolean, device=device)
    d = ebm.GibbsBoltzmann(chain(coupling), base)
    with pytest.raises(ValueError, match=r"has 4.19e\+06 states, of which at most"):
        log_partition(d, Exact())
    value, truth = log_partition(d, Exact(1 << 16)).value, chain_log_z(n, coupling)
    torch.testing.assert_close(value, truth, **EXACT)
    slopes = [torch.autograd.grad(v, coupling)[0] for v in (value, truth)]
    torch.testing.assert_close(*slopes, **EXACT)


class Largest(TorchDispatchMode):
    """Remembers the size of the largest tensor that was made."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for part in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(part, torch.Tensor):
                self.numel = max(self.numel, part.numel())
        return out


def memory(method, d, parameter):
    """Return the largest tensor of both passes, and what the first saves for the second."""
    saved = []
    hooks = torch.autograd.graph.saved_tensors_hooks(
        lambda x: saved.append(x.numel()) or x, lambda x: x
    )
    with Largest() as mode:
        with hooks:
            value = method.log_z(d)
        torch.autograd.grad(value, parameter)
    return mode.numel, sum(saved)


def test_the_memory_of_both_passes_is_that_of_a_chunk(monkeypatch):
    n, chunk, coupling = 14, 256, torch.tensor(0.3, requires_grad=True)
    d = ebm.GibbsBoltzmann(chain(coupling), ebm.Flat((n,), constraints.boolean))
    num_chunks = 2**n // chunk
    largest, saved = memory(Exact(chunk), d, coupling)
    assert largest <= chunk * n
    assert saved <= 4 * num_chunks
    assert memory(Exact(), d, coupling)[0] >= 2**n * n
    # The planted fault: what is not computed anew is kept.
    monkeypatch.setattr(exact, "checkpoint", lambda f, start, **_: f(start))
    assert memory(Exact(chunk), d, coupling)[1] > 2**n


def test_chunks_of_nothing_but_walls_leave_value_and_gradient_alone():
    k = torch.tensor(1.3, requires_grad=True)
    walled = lambda x: torch.where(x[..., 0] > 0, torch.inf, k * x.sum(-1))
    d = ebm.GibbsBoltzmann(walled, ebm.Flat((4,), constraints.boolean))
    values = [log_partition(d, m).value for m in (Exact(2), Exact())]
    truth = 3 * (1 + (-k).exp()).log()
    for value in values:
        torch.testing.assert_close(value, truth, **EXACT)
        slopes = [torch.autograd.grad(v, k, retain_graph=True)[0] for v in (value, truth)]
        torch.testing.assert_close(*slopes, **EXACT)


# By components -----------------------------------------------------------------------------------


def hidden(w):
    """The energy of hidden units given visible ones, of which ``w`` are the inputs."""
    return ebm.Given(lambda w, h: -(w * h).sum(-1), w, ...)


SEPARABLE = {
    "booleans": lambda: ebm.Flat((5,), constraints.boolean),
    "a normalised base": lambda: dist.Bernoulli(torch.linspace(0.1, 0.8, 5)).to_event(1),
    "integers": lambda: ebm.Flat((5,), constraints.integer_interval(-1, 2)),
    "categorical": lambda: (
        dist.Categorical(torch.tensor([0.2, 0.5, 0.3])).expand((5,)).to_event(1)
    ),
}


def test_chunks_and_components_are_on_the_device_of_the_base(device):
    w = torch.randn(3, 5, device=device)
    d = ebm.GibbsBoltzmann(hidden(w), ebm.Flat((5,), constraints.boolean, device=device))
    truth = torch.nn.functional.softplus(w).sum(-1)
    for method in (Exact(), Exact(7), Exact(separable=True)):
        torch.testing.assert_close(log_partition(d, method).value, truth, **EXACT)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("make", SEPARABLE.values(), ids=SEPARABLE)
def test_components_give_the_table_of_each_element_of_the_batch(make, beta):
    w = torch.randn(3, 2, 5, requires_grad=True)
    d = ebm.GibbsBoltzmann(hidden(w), make(), beta)
    got, want = (log_partition(d, m).value for m in (Exact(separable=True), Exact()))
    assert got.shape == (3, 2)
    torch.testing.assert_close(got, want, **EXACT)
    slopes = [torch.autograd.grad(v.sum(), w)[0] for v in (got, want)]
    torch.testing.assert_close(*slopes, **EXACT)


def test_components_may_be_one_hot():
    w = torch.randn(4, 3)
    energy = lambda x: (w * x).sum((-2, -1))
    d = ebm.GibbsBoltzmann(energy, ebm.Flat((4, 3), constraints.one_hot))
    got, want = log_partition(d, Exact(separable=True)).value, (-w).logsumexp(-1).sum()
    torch.testing.assert_close(got, want, **EXACT)


def test_a_missing_base_is_seen():
    """The planted fault of the test above: the base counts in value."""
    w = torch.randn(5)
    base = SEPARABLE["a normalised base"]()
    values = [
        log_partition(ebm.GibbsBoltzmann(hidden(w), b), Exact(separable=True)).value
        for b in (base, ebm.Flat((5,), constraints.boolean))
    ]
    assert (values[0] - values[1]).abs() > 1


def test_thirty_units_take_a_hundred_energies_and_no_random_number():
    w, rows = torch.randn(200, 30), []

    def energy(w, h):
        rows.append(len(h))
        return -(w * h).sum(-1)

    d = ebm.GibbsBoltzmann(ebm.Given(energy, w, ...), ebm.Flat((30,), constraints.boolean))
    rows.clear()
    state = torch.get_rng_state()
    value = log_partition(d, Exact(separable=True)).value
    assert torch.equal(torch.get_rng_state(), state)
    assert sum(rows) < 100
    torch.testing.assert_close(value, torch.nn.functional.softplus(w).sum(-1), **EXACT)


def test_components_can_be_traced_for_many_chains_at_once():
    def log_z(k):
        d = ebm.GibbsBoltzmann(lambda x: k * x.sum(-1), ebm.Flat((4,), constraints.boolean))
        return Exact(separable=True).log_z(d)

    k = torch.tensor([0.5, 1.0, 2.0])
    with pyro.validation_enabled(False):
        batch = make_fx(torch.func.vmap(make_fx(log_z)(k[0])))(k)
    torch.testing.assert_close(batch(k), 4 * torch.nn.functional.softplus(-k), **EXACT)


def test_walls_in_single_components_are_separable():
    energy = lambda x: torch.where(x[..., 2] > 0, torch.inf, x.sum(-1))
    d = ebm.GibbsBoltzmann(energy, ebm.Flat((4,), constraints.boolean))
    value = log_partition(d, Exact(separable=True)).value
    torch.testing.assert_close(value, torch.tensor(3 * math.log(1 + math.exp(-1))), **EXACT)


def test_a_coupling_is_refused_also_one_that_is_learned_later():
    j = torch.tensor(0.0)
    method = Exact(separable=True)
    energy = lambda x: x.sum(-1) + j * (x[..., 0] * x[..., 1])
    d = ebm.GibbsBoltzmann(energy, ebm.Flat((6,), constraints.boolean))
    log_partition(d, method)
    j.fill_(0.01)
    with pytest.raises(ValueError, match=r"separable must be False .* a discrepancy of 0.01"):
        log_partition(d, method)


def test_an_energy_of_nan_is_no_sum():
    d = ebm.GibbsBoltzmann(lambda x: x.sum(-1) * torch.nan, ebm.Flat((3,), constraints.boolean))
    with pytest.raises(ValueError, match=r"to be finite, .* got nan"):
        log_partition(d, Exact(separable=True))


def test_parts_that_know_nothing_of_each_other_add():
    left, right = torch.randn(2, 4)
    both = ebm.GibbsBoltzmann(
        lambda x: field(x[..., :4] * left) + field(x[..., 4:] * right),
        ebm.Flat((8,), constraints.boolean),
    )
    alone = [
        ebm.GibbsBoltzmann(lambda x, w=w: field(x * w), ebm.Flat((4,), constraints.boolean))
        for w in (left, right)
    ]
    got = log_partition(both, Exact(100)).value
    torch.testing.assert_close(got, sum(log_partition(d, Exact()).value for d in alone), **EXACT)


METHODS = {
    "table": Exact,
    "chunks": lambda: Exact(100),
    "components": lambda: Exact(separable=True),
}


@pytest.mark.parametrize("make", METHODS.values(), ids=METHODS)
def test_single_precision_stays_and_is_right_to_its_digits(make):
    w = torch.randn(7, dtype=torch.float32)
    base = ebm.Flat((7,), constraints.boolean, dtype=torch.float32)
    d = ebm.GibbsBoltzmann(lambda x: (w * x).sum(-1), base)
    value = log_partition(d, make()).value
    truth = torch.nn.functional.softplus(-w.double()).sum()
    assert value.dtype == torch.float32
    assert abs(value - truth) < 1e-5  # a hundred roundings


# An energy that sums itself ----------------------------------------------------------------------


def graph(n, table):
    names = [f"s{i}" for i in range(n)]
    factors = dict.fromkeys(zip(names, names[1:], strict=False), table)
    return ebm.FactorGraph(factors, dict.fromkeys(names, len(table)))


def test_a_factor_graph_sums_itself():
    coupling = torch.tensor(0.3, requires_grad=True)
    sign = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    d = ebm.GibbsBoltzmann(
        graph(200, -coupling * sign), ebm.Flat((200,), constraints.boolean), 2.0
    )
    value, truth = log_partition(d, Exact()).value, chain_log_z(200, 2.0 * coupling)
    torch.testing.assert_close(value, truth, **EXACT)
    slopes = [torch.autograd.grad(v, coupling)[0] for v in (value, truth)]
    torch.testing.assert_close(*slopes, **EXACT)


NOT_ITSELF = {
    "a base": lambda: dist.Bernoulli(0.3).expand((4,)).to_event(1),
    "other numbers": lambda: ebm.Flat((4,), constraints.integer_interval(1, 2)),
    "fewer states": lambda: ebm.Flat((4,), constraints.integer_interval(0, 0)),
}


@pytest.mark.parametrize("make", NOT_ITSELF.values(), ids=NOT_ITSELF)
def test_a_factor_graph_on_another_measure_is_summed_by_the_table(make):
    table = torch.randn(2, 2)
    d = ebm.GibbsBoltzmann(graph(4, table), make())
    states = d.enumerate_support()
    want = (-d.potential(states)).logsumexp(0)
    torch.testing.assert_close(log_partition(d, Exact()).value, want, **EXACT)


WRONG = {
    "no states": (lambda: Exact(0), "chunk_size must be at least 1, got 0"),
    "chunks of components": (lambda: Exact(8, separable=True), "chunk_size is for supports"),
    "too many for chunks": (
        lambda: log_partition(
            ebm.GibbsBoltzmann(field, ebm.Flat((40,), constraints.boolean)), Exact(1000)
        ),
        r"has 1.1e\+12 states, of which at most 1073741824 are enumerated in chunks",
    ),
    "real numbers in chunks": (
        lambda: log_partition(ebm.GibbsBoltzmann(field, ebm.Flat((2,))), Exact(8)),
        "the support must be finite",
    ),
    "real numbers by components": (
        lambda: log_partition(ebm.GibbsBoltzmann(field, ebm.Flat((2,))), Exact(separable=True)),
        "the support must be finite",
    ),
}


@pytest.mark.parametrize(("wrong", "message"), WRONG.values(), ids=WRONG)
def test_a_wrong_argument_is_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        wrong()


def test_a_support_that_comes_with_a_batch_has_the_same_ends_in_all_of_it():
    beta = torch.tensor([0.5, 2.0])
    d = ebm.GibbsBoltzmann(lambda x: 0.3 * x, dist.Binomial(5, torch.tensor(0.4)), beta)
    truth = 5 * (0.6 + 0.4 * (-0.3 * beta).exp()).log()
    torch.testing.assert_close(Exact()(d).value, truth, **EXACT)
    wide = dist.Binomial(torch.tensor([3.0, 5.0]), torch.tensor(0.4))
    with pytest.raises(ValueError, match="support must have the same ends"):
        Exact()(ebm.GibbsBoltzmann(lambda x: 0.3 * x, wide))
