"""Factor graphs against enumeration, textbook recursions and transfer matrices."""

import copy
import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyro.distributions import constraints
from pyro.ops.contract import einsum
from torch import nn

import pyro_ebm as ebm
from pyro_ebm._contraction import Least, LogSumExp, MinSum, contract, record
from tests.common import EXACT, FALSE_ALARM, FAR, NUMERIC


class Enumeration:
    """All assignments of a graph, with the batch of graphs last."""

    def __init__(self, g, beta=1.0):
        self.g, self.batch = g, g.batch_shape
        ranges = [range(k) for k in g.cardinalities.values()]
        self.x = torch.tensor(list(itertools.product(*ranges)))
        self.x = self.x.reshape(-1, *[1] * len(self.batch), len(ranges))
        self.energy = g(self.x)
        tilted = torch.where(self.energy < torch.inf, -beta * self.energy, -torch.inf)
        self.log_z = tilted.logsumexp(0)
        self.p = (tilted - self.log_z).exp()

    def marginal(self, scope):
        names = list(self.g.cardinalities)
        at = torch.zeros(len(self.x), dtype=torch.long)
        cards = [self.g.cardinalities[name] for name in scope]
        for name, k in zip(scope, cards, strict=True):
            at = at * k + self.x.reshape(len(self.x), -1)[:, names.index(name)]
        table = self.p.new_zeros(math.prod(cards), *self.batch).index_add(0, at, self.p)
        return table.movedim(0, -1).reshape(*self.batch, *cards)

    def p_value(self, draws):
        """Chi-squared test of draws by name; states of little mass are put together."""
        at = torch.zeros_like(next(iter(draws.values())))
        for name, k in self.g.cardinalities.items():
            at = at * k + draws[name]
        order = self.p.argsort(descending=True)
        common = int((self.p * len(at) >= 5).sum())
        counts = torch.bincount(at, minlength=len(self.p))[order].to(self.p)
        expected = self.p[order] * len(at)
        counts = torch.cat([counts[:common], counts[common:].sum(0, keepdim=True)])
        expected = torch.cat([expected[:common], expected[common:].sum(0, keepdim=True)])
        kept = expected > 0
        assert not counts[~kept].any()
        chi2 = ((counts - expected).square() / expected)[kept].sum()
        return torch.special.gammaincc((kept.sum() - 1) / 2, chi2 / 2).item()


def graph(scopes, cards, *batch, walls=0.0, seed=0, **options):
    """A graph with random tables, some of whose energies are infinite."""
    make = torch.Generator().manual_seed(seed)
    pairs = []
    for scope in scopes:
        shape = (*batch, *[cards[v] for v in scope])
        table = torch.randn(shape, generator=make)
        wall = torch.rand(shape, generator=make) < walls
        pairs.append((scope, torch.where(wall, torch.inf, table)))
    return ebm.FactorGraph(pairs, cards, **options)


def binary(n):
    return dict.fromkeys(range(n), 2)


def edges_of_tree(n, seed=0):
    make = torch.Generator().manual_seed(seed)
    return [(int(torch.randint(i, (), generator=make)), i) for i in range(1, n)]


def grid(rows, columns, periodic=False):
    """Edges of a lattice, perhaps periodic along its columns."""
    along = [((i, j), (i, j + 1)) for i in range(rows) for j in range(columns - 1)]
    across = [((i, j), (i + 1, j)) for i in range(rows - 1) for j in range(columns)]
    around = [((rows - 1, j), (0, j)) for j in range(columns)] if periodic else []
    return along + across + around


def names_of(edges):
    return dict.fromkeys(sorted({v for edge in edges for v in edge}), 2)


MIXED = {"a": 2, "b": 3, "c": 1, "d": 4, "e": 2}
GRAPHS = {
    "chain": lambda: graph([(i, i + 1) for i in range(10)], binary(11)),
    "chain of mixed variables": lambda: graph(
        [("a", "b"), ("c", "b"), ("c", "d"), ("e", "d"), ("a",), ("d",)], MIXED
    ),
    "tree": lambda: graph([*edges_of_tree(12), (3,), (11,)], binary(12)),
    "star": lambda: graph([(i, 0) for i in range(1, 10)], binary(10)),
    "ring": lambda: graph([(i, (i + 1) % 9) for i in range(9)], binary(9)),
    "grid": lambda: graph(grid(3, 4), names_of(grid(3, 4))),
    "complete": lambda: graph(list(itertools.combinations(MIXED, 2)), MIXED),
    "third order": lambda: graph([("a", "b", "d"), ("d", "e"), ("e", "c", "a"), ("b",)], MIXED),
    "in pieces": lambda: graph([("a", "b"), ("d",), ()], MIXED),
    "parallel factors": lambda: graph([("a", "b"), ("b", "a"), ("a", "b"), ("b",)], MIXED),
    "no factors": lambda: ebm.FactorGraph({}, MIXED),
    "wide chain": lambda: graph([(0, 1), (1, 2), (2, 3)], {0: 11, 1: 11, 2: 11, 3: 2}),
    "forbidden states": lambda: graph(edges_of_tree(10), binary(10), walls=0.15, seed=3),
    "batch": lambda: graph([("a", "b"), ("b", "d"), ("d", "a"), ("e",)], MIXED, 2, 3),
    "given": lambda: graph([*edges_of_tree(9), (2,)], binary(9)).condition({0: 1, 4: 0}),
    "given in a batch": lambda: graph(
        [("a", "b"), ("b", "d"), ("d", "a"), ("e", "d"), ("b",)], MIXED
    ).condition({"d": torch.tensor([3, 0, 1]), "a": 1}),
}


@pytest.fixture(params=GRAPHS.values(), ids=GRAPHS)
def g(request):
    return request.param()


def check_sums(g, beta):
    """Compare everything that is no draw with enumeration."""
    law = Enumeration(g, beta)
    torch.testing.assert_close(g.log_partition(beta), law.log_z, **EXACT)
    least = law.energy.sort(0).values
    found = g.minimum()
    torch.testing.assert_close(found.energy, least[0], **EXACT)
    torch.testing.assert_close(g(found.x), found.energy)
    k = min(5, int((least < torch.inf).sum(0).min()))
    torch.testing.assert_close(g.minima(k).energy, least[:k], **EXACT)
    marginals = g.marginals(beta)
    assert list(marginals) == list(g.cardinalities)
    for name, table in marginals.items():
        torch.testing.assert_close(table, law.marginal((name,)), **EXACT)


@pytest.mark.parametrize("beta", [0.0, 0.7, 3.0])
def test_it_equals_enumeration(g, beta):
    check_sums(g, beta)


@st.composite
def random_graphs(draw):
    cards = dict(enumerate(draw(st.lists(st.integers(1, 3), min_size=1, max_size=7))))
    subsets = st.lists(st.sampled_from(list(cards)), max_size=3, unique=True).map(tuple)
    scopes = draw(st.lists(subsets, max_size=10))
    batch = draw(st.sampled_from([(), (2,), (1, 2)]))
    seed = draw(st.integers(0, 1000))
    return graph(scopes, cards, *batch, walls=draw(st.sampled_from([0.0, 0.1])), seed=seed)


@settings(max_examples=60)
@given(random_graphs(), st.floats(0.01, 10.0))
def test_random_graphs_equal_enumeration(g, beta):
    if (Enumeration(g).energy == torch.inf).all(0).any():
        with pytest.raises(ValueError, match="Z = 0"):
            g.log_partition(beta)
    else:
        check_sums(g, beta)


@pytest.mark.parametrize(
    ("semiring", "method", "wrong"),
    [
        (LogSumExp, "reduce", lambda self, table: table.amax(1)),
        (MinSum, "reduce", lambda self, table: table.amax(1)),
        (LogSumExp, "join", lambda self, a, b: torch.maximum(a, b)),
        (Least, "_trim", lambda self, lists: lists[..., : self.k, :]),
    ],
    ids=["no sum", "no minimum", "no product", "no order"],
)
def test_enumeration_sees_a_fault(monkeypatch, semiring, method, wrong):
    monkeypatch.setattr(semiring, method, wrong)
    with pytest.raises(AssertionError):
        check_sums(GRAPHS["tree"](), 1.0)


def test_minima_are_different_assignments(g):
    k = min(6, int((Enumeration(g).energy < torch.inf).sum(0).min()))
    found = g.minima(k)
    x = g.to_tensor(found.x)
    torch.testing.assert_close(g(x), found.energy)
    for one in x.reshape(k, -1, x.shape[-1]).unbind(1):
        assert len({tuple(row) for row in one.tolist()}) == k


def test_all_assignments_come_in_order():
    g = GRAPHS["chain of mixed variables"]()
    law = Enumeration(g)
    torch.testing.assert_close(g.minima(48).energy, law.energy.sort().values, **EXACT)
    with pytest.raises(ValueError, match="48, the number of assignments, got 49"):
        g.minima(49)


def test_ties_give_real_assignments():
    table = torch.zeros(2, 2)
    g = ebm.FactorGraph({(0, 1): table, (1, 2): table, (2, 0): 1 - torch.eye(2)}, binary(3))
    found = g.minima(8)
    assert torch.equal(found.energy, g(found.x))
    assert found.energy.tolist() == [0.0] * 4 + [1.0] * 4
    assert len({tuple(row) for row in g.to_tensor(found.x).tolist()}) == 8
    assert g(g.minimum().x) == 0.0


@pytest.mark.parametrize("scopes", [[(0, 1)], [(0, 1), (2,), (1, 0)], [(0, 2, 1), (8, 1, 5)]])
def test_joint_marginals_equal_enumeration(scopes):
    g = GRAPHS["tree"]()
    law, found = Enumeration(g, 0.8), g.marginals(0.8, scopes=scopes)
    assert list(found) == scopes
    for scope in scopes:
        torch.testing.assert_close(found[scope], law.marginal(scope), **EXACT)


def test_joint_marginals_of_a_batch_equal_enumeration():
    g = GRAPHS["batch"]()
    law, found = Enumeration(g), g.marginals(scopes=[("e", "b"), ("a", "d")])
    for scope, table in found.items():
        torch.testing.assert_close(table, law.marginal(scope), **EXACT)


# Draws ----------------------------------------------------------------------------------------

FEW = {name: GRAPHS[name] for name in ("chain of mixed variables", "grid", "forbidden states")}
FEW["given"] = GRAPHS["given"]


@pytest.mark.parametrize("make", FEW.values(), ids=FEW)
def test_draws_follow_the_law(make):
    g = make()
    assert Enumeration(g, 0.7).p_value(g.sample(20_000, 0.7)) > FALSE_ALARM


@pytest.mark.parametrize("make", FEW.values(), ids=FEW)
def test_the_test_of_draws_sees_another_beta(make):
    g = make()
    assert Enumeration(g, 0.7).p_value(g.sample(20_000, 0.6)) < FALSE_ALARM


def test_the_test_of_draws_sees_lost_dependence():
    g = GRAPHS["chain of mixed variables"]()
    draws = {name: v[torch.randperm(20_000)] for name, v in g.sample(20_000, 0.7).items()}
    assert Enumeration(g, 0.7).p_value(draws) < FALSE_ALARM


def test_each_graph_of_a_batch_has_its_own_draws():
    energy = torch.tensor([[0.0, 1.0, 2.0], [2.0, 0.0, 0.0]])
    g = ebm.FactorGraph({("a",): energy, ("a", "b"): torch.eye(3)}, {"a": 3, "b": 3})
    draws = g.sample(20_000, torch.tensor([[1.0], [2.0]]))
    assert draws["a"].shape == (20_000, 2, 2)
    for i, j in itertools.product(range(2), range(2)):
        one = ebm.FactorGraph({("a",): energy[j], ("a", "b"): torch.eye(3)}, {"a": 3, "b": 3})
        law = Enumeration(one, [1.0, 2.0][i])
        assert law.p_value({n: v[:, i, j] for n, v in draws.items()}) > FALSE_ALARM


def test_no_draws_may_be_asked_for():
    g = ebm.FactorGraph({("a", "b"): torch.randn(4, 2, 3)}, {"a": 2, "b": 3})
    assert g.sample(0)["b"].shape == (0, 4)
    with pytest.raises(ValueError, match="n must be a whole number of at least 0, got -1"):
        g.sample(-1)


def test_draws_repeat_with_the_seed():
    g = GRAPHS["grid"]()
    first, second = (pyro.set_rng_seed(3) or g.to_tensor(g.sample(50)) for _ in range(2))
    assert torch.equal(first, second)


# Textbooks ------------------------------------------------------------------------------------


class Markov:
    """A hidden Markov chain with K states, and observations of M kinds."""

    def __init__(self, steps, K=4, M=3):
        self.steps, self.K, self.M = steps, K, M
        self.start = torch.randn(K).log_softmax(-1)
        self.move = torch.randn(K, K).log_softmax(-1)
        self.emit = torch.randn(K, M).log_softmax(-1)
        self.seen = torch.randint(M, (steps,))

    def joint(self):
        states = {f"z{t}": self.K for t in range(self.steps)}
        kinds = {f"y{t}": self.M for t in range(self.steps)}
        factors = {("z0",): -self.start}
        factors |= {(f"z{t}", f"z{t + 1}"): -self.move for t in range(self.steps - 1)}
        factors |= {(f"z{t}", f"y{t}"): -self.emit for t in range(self.steps)}
        return ebm.FactorGraph(factors, states | kinds)

    def graph(self):
        return self.joint().condition({f"y{t}": self.seen[t] for t in range(self.steps)})

    def viterbi(self):
        """The most probable path, by Viterbi's recursion."""
        score, back = self.start + self.emit[:, self.seen[0]], []
        for y in self.seen[1:]:
            best, at = (score[:, None] + self.move).max(0)
            score = best + self.emit[:, y]
            back.append(at)
        path = [int(score.argmax())]
        for at in reversed(back):
            path.append(int(at[path[-1]]))
        return score.max(), path[::-1]

    def forward_backward(self):
        """The log-likelihood and the marginals of the states."""
        forward = [self.start + self.emit[:, self.seen[0]]]
        for y in self.seen[1:]:
            step = forward[-1][:, None] + self.move
            forward.append(step.logsumexp(0) + self.emit[:, y])
        backward = [torch.zeros(self.K)]
        for y in self.seen.flip(0)[:-1]:
            backward.append((self.move + self.emit[:, y] + backward[-1]).logsumexp(1))
        total = forward[-1].logsumexp(0)
        pairs = zip(forward, reversed(backward), strict=True)
        return total, torch.stack([(a + b - total).exp() for a, b in pairs])


@pytest.fixture
def markov():
    return Markov(60)


def test_the_minimum_of_a_hidden_markov_chain_is_viterbis(markov):
    score, path = markov.viterbi()
    g = markov.graph()
    found = g.minimum()
    torch.testing.assert_close(found.energy, -score, **EXACT)
    torch.testing.assert_close(g(torch.tensor(path)), found.energy, **EXACT)  # it may be a tie
    torch.testing.assert_close(g(found.x), found.energy, **EXACT)
    assert found.converged
    assert found.grad_norm == 0


def test_a_hidden_markov_chain_agrees_with_forward_backward(markov):
    log_likelihood, states = markov.forward_backward()
    g = markov.graph()
    torch.testing.assert_close(g.log_partition(), log_likelihood, **EXACT)
    torch.testing.assert_close(torch.stack(list(g.marginals().values())), states, **EXACT)


def test_a_hidden_markov_chain_agrees_with_pyro(markov):
    hmm = dist.DiscreteHMM(markov.start, markov.move, dist.Categorical(logits=markov.emit))
    # Pyro's chain moves before its first observation.
    start = (markov.start[:, None] + markov.move).logsumexp(0)
    markov.start = start
    torch.testing.assert_close(markov.graph().log_partition(), hmm.log_prob(markov.seen), **EXACT)


def test_a_batch_of_observations_is_a_batch_of_graphs(markov):
    seen = torch.randint(markov.M, (5, markov.steps))
    many = markov.joint().condition({f"y{t}": seen[:, t] for t in range(markov.steps)})
    assert many.batch_shape == (5,)
    for i, value in enumerate(many.log_partition()):
        markov.seen = seen[i]
        torch.testing.assert_close(value, markov.forward_backward()[0], **EXACT)


@pytest.mark.parametrize("periodic", [False, True])
def test_an_ising_strip_agrees_with_its_transfer_matrix(periodic):
    rows, columns, coupling, field = 4, 200, 0.4, 0.1
    edges = grid(rows, columns, periodic)
    spin = torch.tensor([-1.0, 1.0])
    pair, single = -coupling * spin[:, None] * spin, -field * spin
    cards = names_of(edges)
    factors = dict.fromkeys(edges, pair) | {(v,): single for v in cards}
    g = ebm.FactorGraph(factors, cards)
    s = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=rows)))
    inner = coupling * (s[:, 1:] * s[:, :-1]).sum(-1) + field * s.sum(-1)
    inner = inner + (coupling * s[:, 0] * s[:, -1] if periodic else 0.0)
    log_v = inner
    for _ in range(columns - 1):
        log_v = (log_v[:, None] + coupling * s @ s.T + inner).logsumexp(0)
    torch.testing.assert_close(g.log_partition(), log_v.logsumexp(0), **EXACT)
    assert g.treewidth <= 2 * rows


def test_the_order_of_a_strip_is_as_narrow_as_it_can_be():
    assert graph(grid(4, 50), names_of(grid(4, 50))).treewidth == 4


@pytest.mark.parametrize("scopes", [[(i, i + 1) for i in range(9)], edges_of_tree(10), grid(3, 3)])
def test_it_agrees_with_pyros_einsum(scopes):
    g = graph(scopes, dict.fromkeys(sorted({v for s in scopes for v in s}), 2))
    letter = dict(zip(g.cardinalities, "abcdefghij", strict=False))
    terms = ",".join("".join(letter[v] for v in scope) for scope in scopes)
    tables = [-getattr(g.factors, f"factor{i}") for i in range(len(scopes))]
    backend = {"torch_log": g.log_partition(), "torch_map": -g.minimum().energy}
    for name, value in backend.items():
        (want,) = einsum(
            f"{terms}->", *tables, backend=f"pyro.ops.einsum.{name}", modulo_total=True
        )
        torch.testing.assert_close(value, want, **EXACT)


# Learning -------------------------------------------------------------------------------------


class Emission(nn.Module):
    """The energy of a tag of one word in each sentence of a batch."""

    def __init__(self, weight, words):
        super().__init__()
        self.weight, self.words = weight, words

    def forward(self, y):
        return self.weight[self.words][:, y]


def conditional_field(steps=5, K=3, sentences=4):
    words = torch.randint(10, (sentences, steps))
    weight, moves = nn.Parameter(torch.randn(10, K)), nn.Parameter(torch.randn(K, K))
    factors = {(t, t + 1): moves for t in range(steps - 1)}
    factors |= {(t,): Emission(weight, words[:, t]) for t in range(steps)}
    return ebm.FactorGraph(factors, dict.fromkeys(range(steps), K))


def gradients(value, inputs):
    return torch.autograd.grad(value, inputs, retain_graph=True)


def test_the_gradient_of_a_conditional_field_equals_that_of_enumeration():
    g = conditional_field()
    inputs = list(g.parameters())
    assert len(inputs) == 2
    y = torch.randint(3, (4, 5))
    loss = (g(y) + g.log_partition()).mean()
    want = (g(y) + Enumeration(g).log_z).mean()
    for one, other in zip(gradients(loss, inputs), gradients(want, inputs), strict=True):
        torch.testing.assert_close(one, other, **EXACT)


def test_the_perceptron_gradient_is_that_of_the_minimum():
    g = conditional_field()
    inputs = list(g.parameters())
    want = Enumeration(g).energy.amin(0).sum()
    pairs = zip(gradients(g.minimum().energy.sum(), inputs), gradients(want, inputs), strict=True)
    for one, other in pairs:
        torch.testing.assert_close(one, other, **EXACT)


def test_log_partition_is_differentiable_in_beta():
    g = GRAPHS["ring"]()
    beta = torch.tensor([0.3, 1.0, 2.0], requires_grad=True)
    law = [Enumeration(g, b) for b in beta.tolist()]
    (grad,) = torch.autograd.grad(g.log_partition(beta).sum(), beta)
    mean = torch.stack([-(one.p * one.energy).sum() for one in law])
    torch.testing.assert_close(grad, mean, **EXACT)


def test_marginals_are_differentiable():
    table = torch.randn(3, 2, requires_grad=True)
    pull = torch.randn(2)

    def value(t):
        g = ebm.FactorGraph(
            {("a", "b"): t, ("b", "c"): t.T, ("c",): t[:, 0]}, {"a": 3, "b": 2, "c": 3}
        )
        return g, (g.marginals(0.9)["b"] * pull).sum()

    g, found = value(table)
    want = (Enumeration(g, 0.9).marginal(("b",)) * pull).sum()
    torch.testing.assert_close(gradients(found, [table]), gradients(want, [table]), **EXACT)
    assert not g.marginals()["a"].detach().requires_grad
    with torch.no_grad():
        assert not g.marginals()["a"].requires_grad


def test_gradients_pass_by_forbidden_states():
    table = torch.tensor([[0.0, math.inf], [math.inf, math.inf]], requires_grad=True)
    beta = torch.tensor(0.5, requires_grad=True)
    g = ebm.FactorGraph({(0, 1): table, (1, 2): torch.eye(2), (2, 3): table}, binary(4))
    value = g.log_partition(beta)
    torch.testing.assert_close(value, -beta * g.minimum().energy)
    for grad in torch.autograd.grad(value, [table, beta]):
        assert grad.isfinite().all()
    assert all(m.isfinite().all() for m in g.marginals(beta).values())


def test_a_field_learns_its_tags():
    g = conditional_field()
    y = torch.randint(3, (4, 5))
    optimizer = torch.optim.Adam(g.parameters(), 0.2)
    for _ in range(50):
        loss = (g(y) + g.log_partition()).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    found = g.to_tensor(g.minimum().x)
    assert (found == y).double().mean() > 0.9


# Size -----------------------------------------------------------------------------------------


def uniform(edges, K=3):
    """A graph whose edges share one table."""
    n = 1 + max(max(edge) for edge in edges)
    return ebm.FactorGraph(dict.fromkeys(edges, torch.randn(K, K)), dict.fromkeys(range(n), K))


SHAPES = {
    "chain": lambda n: [(i, i + 1) for i in range(n - 1)],
    "random tree": edges_of_tree,
    "star": lambda n: [(0, i) for i in range(1, n)],
    "star of chains": lambda n: [(0 if i % 10 == 1 else i - 1, i) for i in range(1, n)],
    "caterpillar": lambda n: [(max(i - 2 + i % 2, 0), i) for i in range(1, n)],
}


@pytest.mark.parametrize("make", SHAPES.values(), ids=SHAPES)
def test_the_cost_of_a_tree_is_linear_and_its_rounds_few(make):
    small, large = (uniform(make(n)).cost for n in (500, 4000))
    assert large.treewidth <= 2
    assert large.entries <= 27 * 4000
    assert large.entries <= 8.5 * small.entries
    assert large.rounds <= small.rounds + 10
    assert large.rounds <= 3 * math.log2(4000)


def test_the_cost_is_that_of_the_tables():
    g = GRAPHS["grid"]()
    trace = []
    inputs, _ = g._inputs(plan := g._plan(), 1.0)
    contract(plan, inputs, LogSumExp(), record(trace))
    assert sum(table.numel() for table in trace) == g.cost.entries
    assert max(table[0].numel() for table in trace) == g.cost.largest_table
    assert g.treewidth == 3


@pytest.mark.slow
def test_a_chain_of_100_000_spins_agrees_with_its_transfer_matrix():
    n, coupling = 100_000, 0.3
    spin = torch.tensor([-1.0, 1.0])
    pair = -coupling * spin[:, None] * spin
    cards = dict.fromkeys(range(n), 2)
    g = ebm.FactorGraph({(i, i + 1): pair for i in range(n - 1)}, cards)
    want = math.log(2.0) + (n - 1) * math.log(2 * math.cosh(coupling))
    torch.testing.assert_close(g.log_partition(), torch.tensor(want), **EXACT)
    torch.testing.assert_close(g.minimum().energy, torch.tensor(-coupling * (n - 1)), **EXACT)
    draws = g.to_tensor(g.sample(1))[0]
    agree = (draws[1:] == draws[:-1]).double().mean()
    p = 1 / (1 + math.exp(-2 * coupling))
    assert abs(agree - p) < 5 * math.sqrt(p * (1 - p) / n)


@pytest.mark.slow
def test_a_star_of_100_000_leaves_agrees_with_its_closed_form():
    n, coupling = 100_000, 0.3
    spin = torch.tensor([-1.0, 1.0])
    pair = -coupling * spin[:, None] * spin
    g = ebm.FactorGraph({(0, i): pair for i in range(1, n)}, dict.fromkeys(range(n), 2))
    want = math.log(2.0) + (n - 1) * math.log(2 * math.cosh(coupling))
    torch.testing.assert_close(g.log_partition(), torch.tensor(want), **EXACT)
    assert g.cost.rounds == 2


def test_a_graph_that_is_too_connected_is_refused_before_it_is_run():
    edges = list(itertools.combinations(range(30), 2))
    g = uniform(edges, K=2)
    assert g.treewidth == 29
    with pytest.raises(ValueError, match=r"treewidth 29 .* condition\(\)"):
        g.log_partition()
    with pytest.raises(ValueError, match=r"\(0, 1, 2, 3, 4, 5, 6, 7, \.\.\. \(30 in all\)\)"):
        g.minimum()
    few = g.condition(dict.fromkeys(range(20), 0))
    assert few.log_partition().isfinite()
    assert g(torch.zeros(30)).isfinite()


def test_the_bound_on_tables_is_an_argument():
    g = graph(grid(3, 4), names_of(grid(3, 4)), max_table=8)
    with pytest.raises(ValueError, match="max_table: one table may have 8 numbers"):
        g.marginals()
    chain = graph([(0, 1), (1, 2)], binary(3), max_table=8)
    assert chain.log_partition().isfinite()
    with pytest.raises(ValueError, match="entries of 9 numbers"):
        chain.minima(3)


@pytest.mark.slow
def test_the_search_for_an_order_is_given_up_on_a_large_random_graph():
    make = torch.Generator().manual_seed(0)
    ends = torch.randint(3000, (15_000, 2), generator=make).tolist()
    g = uniform([(a, b) for a, b in ends if a != b], K=2)
    assert not g.cost.complete
    with pytest.raises(ValueError, match="or more"):
        g.log_partition()


# As an energy ---------------------------------------------------------------------------------


def test_it_is_an_energy_for_gibbs_boltzmann():
    g = graph([(0, 1), (1, 2), (2, 0), (1,)], dict.fromkeys(range(3), 3))
    base = ebm.Flat((3,), constraints.integer_interval(0, 2))
    d = ebm.GibbsBoltzmann(g, base, 0.6, log_partition=ebm.partition.Exact())
    torch.testing.assert_close(ebm.log_partition(d, d.log_partition).value, g.log_partition(0.6))
    x = d.sample((100,))
    torch.testing.assert_close(d.log_prob(x), -0.6 * g(x) - g.log_partition(0.6))


def test_a_density_whose_states_no_table_holds_is_normalized():
    weight = nn.Parameter(torch.randn(2, 2))
    g = ebm.FactorGraph({(i, i + 1): weight for i in range(199)}, binary(200))
    base = ebm.Flat((200,), constraints.boolean)
    d = ebm.GibbsBoltzmann(g, base, 0.7, log_partition=ebm.partition.Exact())
    x = g.to_tensor(g.sample(3, 0.7)).to(weight)
    want = -0.7 * g(x) - g.log_partition(0.7)
    torch.testing.assert_close(d.log_prob(x), want, **EXACT)
    found = gradients(d.log_prob(x).sum(), [weight])
    torch.testing.assert_close(found, gradients(want.sum(), [weight]), **EXACT)


def test_a_batch_of_graphs_is_a_batch_of_distributions():
    g = graph([("a", "b"), ("b",)], {"a": 3, "b": 3}, 4)
    base = ebm.Flat((2,), constraints.integer_interval(0, 2))
    d = ebm.GibbsBoltzmann(ebm.Given(g), base, log_partition=ebm.partition.Exact())
    assert d.batch_shape == (4,)
    torch.testing.assert_close(ebm.log_partition(d, d.log_partition).value, g.log_partition())


def test_spins_may_be_booleans_and_floats():
    g = GRAPHS["chain"]()
    d = ebm.GibbsBoltzmann(g, ebm.Flat((11,), constraints.boolean), 2.0)
    x = d.sample((7,))
    assert x.is_floating_point()
    torch.testing.assert_close(g(x), g(x.bool()))
    torch.testing.assert_close(g(x), g(dict(enumerate(x.long().unbind(-1)))))


def test_what_is_no_state_has_infinite_energy():
    g = ebm.FactorGraph({("a", "b"): torch.zeros(2, 3)}, {"a": 2, "b": 3})
    x = torch.tensor([[0.0, 2.0], [2.0, 0.0], [0.5, 0.0], [-1.0, 0.0], [0.0, 3.0]])
    assert g(x).tolist() == [0.0] + [math.inf] * 4
    d = ebm.GibbsBoltzmann(
        g, ebm.Flat((2,), constraints.integer_interval(0, 2)), log_partition=ebm.partition.Exact()
    )
    torch.testing.assert_close(ebm.log_partition(d, d.log_partition).value, g.log_partition())


def test_prediction_given_a_part():
    g = graph([("x", "y"), ("y", "z"), ("z", "x")], {"x": 3, "y": 4, "z": 2})
    x = torch.tensor([2, 0, 1, 1])
    found = g.condition({"x": x}).minimum()
    law = Enumeration(g)
    for i, value in enumerate(x):
        kept = law.x[:, 0] == value
        best = law.x[kept][law.energy[kept].argmin()]
        assert [int(found.x[n][i]) for n in ("y", "z")] == best[1:].tolist()
    torch.testing.assert_close(found.energy, g({"x": x, **found.x}), **EXACT)


def test_a_given_graph_shares_its_parameters():
    table = nn.Parameter(torch.randn(2, 2))
    given = ebm.FactorGraph({("x", "y"): table}, {"x": 2, "y": 2}).condition({"x": 1})
    assert [p is table for p in given.parameters()] == [True]
    assert given.cardinalities == {"y": 2}
    torch.testing.assert_close(given.log_partition(), (-table[1]).logsumexp(0))


def test_tables_and_modules_are_registered():
    table, net = nn.Parameter(torch.randn(2, 2)), Squeeze(nn.Embedding(2, 1))
    plain = torch.randn(2)
    factors = {("a", "b"): table, ("b", "c"): table, ("c",): net, ("a",): net, ("b",): plain}
    g = ebm.FactorGraph(factors, {"a": 2, "b": 2, "c": 2})
    assert {id(p) for p in g.parameters()} == {id(table), id(net.net.weight)}
    assert len(g.state_dict()) == 3
    torch.testing.assert_close(copy.deepcopy(g).log_partition(), g.log_partition())
    assert g.float().log_partition().dtype == torch.float32


class Squeeze(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x).squeeze(-1)


def test_weights_may_be_latent_in_pyro():
    """A Bayesian coupling, read once per trace and seen by log Z."""

    class Coupling(pyro.nn.PyroModule):
        def __init__(self):
            super().__init__()
            self.weight = pyro.nn.PyroSample(dist.Normal(0.0, 1.0))

        def forward(self, a, b):
            return self.weight * (a != b).to(self.weight)

    energy = Coupling()

    def model():
        g = ebm.FactorGraph({(0, 1): energy, (1, 2): energy}, binary(3))
        pyro.factor("minus log Z", -g.log_partition())

    trace = pyro.poutine.trace(pyro.poutine.condition(model, {"weight": torch.tensor(0.7)}))
    factor = trace.get_trace().nodes["minus log Z"]["fn"].log_factor
    torch.testing.assert_close(factor, -torch.tensor(2 * (1 + math.exp(-0.7)) ** 2).log())


def test_modes_of_torch():
    g = conditional_field()
    want = g.log_partition()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            torch.testing.assert_close(g.log_partition(), want.detach())
            assert g.marginals()[0].sum() == pytest.approx(4.0)
            assert g.minima(2).energy.shape == (2, 4)
            assert g.sample(3)[0].shape == (3, 4)


def test_log_partition_maps_over_a_batch():
    tables = torch.randn(5, 2, 2)

    def log_z(table):
        return ebm.FactorGraph({(0, 1): table, (1, 2): table}, binary(3)).log_partition()

    batch = ebm.FactorGraph({(0, 1): tables, (1, 2): tables}, binary(3)).log_partition()
    torch.testing.assert_close(torch.func.vmap(log_z)(tables), batch)


@pytest.mark.parametrize("name", ["chain", "given"])
def test_the_energy_maps_over_a_batch(name):
    g = GRAPHS[name]()
    x = torch.randint(2, (6, len(g.cardinalities))).double()
    torch.testing.assert_close(torch.func.vmap(g)(x), g(x))


def test_tables_of_two_types_are_promoted():
    g = ebm.FactorGraph({("a",): torch.ones(2).float(), ("a", "b"): torch.ones(2, 2)}, AB)
    torch.testing.assert_close(g.log_partition(), torch.tensor(math.log(4.0) - 2.0))


@pytest.mark.parametrize("beta", [1e-8, 1e8])
def test_extreme_temperatures_do_not_overflow(beta):
    g = GRAPHS["ring"]()
    value = g.log_partition(beta)
    want = {1e-8: torch.tensor(9 * math.log(2.0)), 1e8: -beta * g.minimum().energy}[beta]
    torch.testing.assert_close(value, want, **NUMERIC)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_devices_and_types(device, dtype):
    table = torch.randn(3, 3, dtype=dtype, device=device)
    g = ebm.FactorGraph({(0, 1): table, (1, 2): table, (2, 0): table}, dict.fromkeys(range(3), 3))
    given = g.condition({1: torch.tensor([0, 2])})
    results = [
        g.log_partition(0.5), g.minimum().energy, g.minima(2).energy, *g.marginals().values(),
        given.log_partition(), given.minimum().energy,
    ]  # fmt: skip
    for value in results:
        assert value.dtype == dtype
        assert value.device.type == device.type
    assert g.sample(2)[0].device.type == device.type


# Refusals -------------------------------------------------------------------------------------

T = torch.zeros(2, 2)
AB = {"a": 2, "b": 2}
REFUSED = {
    "a name for a scope": (TypeError, "tuple of names", lambda: ebm.FactorGraph({"ab": T}, AB)),
    "an unknown variable": (ValueError, "'c'", lambda: ebm.FactorGraph({("a", "c"): T}, AB)),
    "a variable twice": (ValueError, "once", lambda: ebm.FactorGraph({("a", "a"): T}, AB)),
    "no states": (ValueError, "at least 1, got 0 for 'a'", lambda: ebm.FactorGraph({}, {"a": 0})),
    "a table of another shape": (
        ValueError,
        r"factor of \('a', 'b'\) must have the shape \(\*graphs, 2, 2\)",
        lambda: ebm.FactorGraph({("a", "b"): torch.zeros(2, 3)}, AB),
    ),
    "a table of integers": (
        TypeError,
        "floating-point",
        lambda: ebm.FactorGraph({("a", "b"): T.long()}, AB),
    ),
    "a list": (TypeError, "or a callable, got list", lambda: ebm.FactorGraph({("a",): [0.0]}, AB)),
    "a callable of another shape": (
        ValueError,
        "energy '<lambda>', the factor of",
        lambda: ebm.FactorGraph({("a", "b"): lambda a, b: a.sum() * 1.0}, AB).minimum(),
    ),
    "a callable that gives a number": (
        TypeError,
        "must give a tensor, got float",
        lambda: ebm.FactorGraph({("a",): lambda a: 1.0}, AB).minimum(),
    ),
    "a callable of integers": (
        TypeError,
        "floating-point energies, got torch.int64",
        lambda: ebm.FactorGraph({("a",): lambda a: a}, AB)({"a": 0, "b": 0}),
    ),
    "NaN": (
        ValueError,
        r"factor of \('b'\) must hold energies .* 1 of 2 that are NaN",
        lambda: ebm.FactorGraph(
            {("a",): torch.zeros(2), ("b",): torch.tensor([0.0, math.nan])}, AB
        ).log_partition(),
    ),
    "minus infinity": (
        ValueError,
        "NaN or -inf",
        lambda: ebm.FactorGraph({("b",): torch.tensor([0.0, -math.inf])}, AB).minimum(),
    ),
    "nothing allowed": (
        ValueError,
        "Z = 0, every one is forbidden, in 1 of 2 graphs",
        lambda: ebm.FactorGraph({("a",): torch.tensor([[0.0] * 2, [math.inf] * 2])}, AB).sample(1),
    ),
    "no minimum": (
        ValueError,
        "Z = 0",
        lambda: ebm.FactorGraph({("a",): torch.full((2,), math.inf)}, AB).minimum(),
    ),
    "more minima than are allowed": (
        ValueError,
        "at most 2, the assignments allowed, got 3",
        lambda: ebm.FactorGraph({("a",): torch.tensor([0.0, math.inf])}, AB).minima(3),
    ),
    "infinite beta": (
        ValueError,
        r"ask for minimum\(\)",
        lambda: ebm.FactorGraph({}, AB).log_partition(math.inf),
    ),
    "negative beta": (
        ValueError,
        "not negative",
        lambda: ebm.FactorGraph({}, AB).log_partition(torch.tensor([1.0, -1.0])),
    ),
    "a missing value": (
        ValueError,
        r"none for \('b'\) and some for \('c'\)",
        lambda: ebm.FactorGraph({}, AB)({"a": 0, "c": 1}),
    ),
    "a vector of another length": (
        ValueError,
        r"assignment must be \(\*batch, 2\)",
        lambda: ebm.FactorGraph({}, AB)(torch.zeros(3)),
    ),
    "an unknown variable given": (
        ValueError,
        "got 'c'",
        lambda: ebm.FactorGraph({}, AB).condition({"c": 0}),
    ),
    "a value that is no state": (
        ValueError,
        r"values of 'a' must be in 0, \.\.\., 1",
        lambda: ebm.FactorGraph({}, AB).condition({"a": torch.tensor([0, 2])}),
    ),
    "no variables": (ValueError, "at least one variable", lambda: ebm.FactorGraph({}, {})),
    "all variables given": (
        ValueError,
        "must leave a variable free",
        lambda: ebm.FactorGraph({}, AB).condition({"a": 0, "b": 1}),
    ),
    "marginals of nothing": (
        ValueError,
        r"got \(\)",
        lambda: ebm.FactorGraph({}, AB).marginals(scopes=[()]),
    ),
    "marginals of unknown variables": (
        ValueError,
        r"got \('a', 'c'\)",
        lambda: ebm.FactorGraph({}, AB).marginals(scopes=[("a", "c")]),
    ),
}


@pytest.mark.parametrize(("kind", "message", "call"), REFUSED.values(), ids=REFUSED)
def test_it_refuses(kind, message, call):
    with pytest.raises(kind, match=message):
        call()


def test_a_distribution_of_a_graph_draws_exactly():
    n, J = 40, torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    g = ebm.FactorGraph([((i, i + 1), J) for i in range(n - 1)], dict.fromkeys(range(n), 2))
    beta = torch.tensor([0.3, 2.0])
    d = ebm.GibbsBoltzmann(g, ebm.Flat((n,), constraints.boolean), beta)
    x = d.sample((3000,))
    assert x.shape == (3000, 2, n)
    assert x.dtype == torch.get_default_dtype()
    differ = (x[..., 1:] != x[..., :-1]).double().sum((0, -1))  # independent along a chain
    p = torch.sigmoid(-beta)
    error = (differ - 3000 * (n - 1) * p) / (3000 * (n - 1) * p * (1 - p)).sqrt()
    assert (error.abs() < FAR).all()
    wide = ebm.GibbsBoltzmann(g, ebm.Flat((n,), constraints.boolean)).expand((2,)).sample((4,))
    assert not torch.equal(wide[:, 0], wide[:, 1])


def test_a_distribution_of_a_graph_that_is_too_large_still_draws():
    side = 4
    at = {(r, c): (r, c) for r in range(side) for c in range(side)}
    J = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    pairs = [((p, (p[0], p[1] + 1)), J) for p in at if p[1] + 1 < side]
    pairs += [((p, (p[0] + 1, p[1])), J) for p in at if p[0] + 1 < side]
    pairs += [((i, i + 1), J) for i in range(9)]  # so that there is no small table
    cards = dict.fromkeys([*at, *range(10)], 2)
    g = ebm.FactorGraph(pairs, cards, max_table=8)
    with pytest.raises(ValueError, match="treewidth"):
        g.sample(1)
    d = ebm.GibbsBoltzmann(g, ebm.Flat((26,), constraints.boolean))
    assert d.sample((2,)).shape == (2, 26)
