"""Losses of joint embeddings: against torch's, closed forms and scikit-learn's."""

import math

import pytest
import torch
from torch.nn import functional

from pyro_ebm.losses import barlow_twins, info_nce, nca, nt_xent, siamese, triplet
from tests.common import EXACT, FAR

N, D = 7, 3


def embeddings(count, n=N, dim=D):
    return [torch.randn(n, dim, requires_grad=True) for _ in range(count)]


def same_with_gradients(ours, theirs, inputs):
    """Compare two losses of the same embeddings, and their gradients."""
    torch.testing.assert_close(ours, theirs, **EXACT)
    got, want = torch.autograd.grad(ours, inputs), torch.autograd.grad(theirs, inputs)
    torch.testing.assert_close(got, want, **EXACT)


def dot(x, y):
    return -(x * y).sum(-1)


# InfoNCE -------------------------------------------------------------------------------------


@pytest.mark.parametrize("symmetric", [False, True])
def test_info_nce_is_the_cross_entropy_of_the_energies_of_all_pairs(symmetric):
    a, b = embeddings(2)
    partner = torch.arange(N)
    want = functional.cross_entropy(a @ b.T, partner)
    if symmetric:
        want = 0.5 * (want + functional.cross_entropy(b @ a.T, partner))
    same_with_gradients(info_nce(dot, a, b, symmetric=symmetric), want, [a, b])


@pytest.mark.parametrize("symmetric", [False, True])
def test_a_large_constant_takes_no_digits_from_info_nce(symmetric):
    x = torch.randint(5, (6, 1)).float().requires_grad_()
    losses = [
        info_nce(
            lambda x, y, c=c: (x - y).abs().sum(-1) + c, x, x.detach() + 1, symmetric=symmetric
        )
        for c in (0.0, 2.0**23)
    ]
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*(torch.autograd.grad(v, x) for v in losses))


def test_info_nce_takes_parts_of_different_shapes():
    x, y = torch.randn(N, 2, 2), torch.randn(N)
    value = info_nce(lambda x, y: x.sum((-1, -2)) * y, x, y)
    want = functional.cross_entropy(-x.sum((-1, -2)).unsqueeze(1) * y, torch.arange(N))
    torch.testing.assert_close(value, want, **EXACT)


@pytest.mark.parametrize("scale", [0.0, 1.0, 1e4])
def test_no_energy_claims_more_information_than_log_n(scale):
    x = torch.randn(N, D)
    for y in (x, torch.randn(N, D)):
        for symmetric in (False, True):
            value = info_nce(
                lambda x, y: scale * (x - y).square().sum(-1), x, y, symmetric=symmetric
            )
            assert math.log(N) - value <= math.log(N)
    assert math.log(N) - info_nce(lambda x, y: 1e4 * (x - y).square().sum(-1), x, x) == math.log(N)


def test_without_the_partner_among_its_rivals_the_claim_would_be_larger():
    x = torch.randn(N, D)
    logits = -1e4 * torch.cdist(x, x).square()
    rivals = logits.clone().fill_diagonal_(-torch.inf)
    wrong = (rivals.logsumexp(1) - logits.diagonal()).mean()
    assert math.log(N) - wrong > 2 * math.log(N)


def bound(energy, rho, n, repeats):
    """Return the mean and the standard error of log n minus the loss, for correlated normals."""
    x = torch.randn(repeats, n, 1)
    y = rho * x + math.sqrt(1 - rho**2) * torch.randn_like(x)
    values = torch.stack(
        [math.log(n) - info_nce(energy, *pair) for pair in zip(x, y, strict=True)]
    )
    return values.mean(), values.std() / math.sqrt(repeats)


def ratio(rho):
    """Return the energy -log p(y | x) / p(y) of two correlated normals."""

    def energy(x, y):
        given = (y - rho * x).square().sum(-1) / (2 * (1 - rho**2))
        return given - y.square().sum(-1) / 2 + 0.5 * math.log(1 - rho**2)

    return energy


@pytest.mark.parametrize("rho", [0.5, 0.9, 0.999])
def test_info_nce_bounds_the_mutual_information(rho):
    truth = -0.5 * math.log(1 - rho**2)
    value, error = bound(ratio(rho), rho, 64, 200)
    assert value < truth + FAR * error
    if rho < 0.9:
        assert value > truth - 0.01  # with 64 pairs it is nearly tight where there is little
    worse, _ = bound(ratio(0.3), rho, 64, 200)
    assert worse < value


def test_a_function_of_x_does_not_matter_to_info_nce_but_to_the_symmetric_one():
    a, b = embeddings(2)
    for symmetric in (False, True):
        plain = info_nce(dot, a, b, symmetric=symmetric)
        of_x = info_nce(lambda x, y: dot(x, y) + x.sum(-1), a, b, symmetric=symmetric)
        of_y = info_nce(lambda x, y: dot(x, y) + y.sum(-1), a, b, symmetric=symmetric)
        assert torch.allclose(plain, of_x, **EXACT) != symmetric
        assert not torch.allclose(plain, of_y, **EXACT)


# NT-Xent -------------------------------------------------------------------------------------


def test_nt_xent_is_its_formula():
    a, b = embeddings(2)
    z, temperature = torch.cat([a, b]), 0.3
    total = 0.0
    for i in range(2 * N):
        similar = torch.cosine_similarity(z[i].expand_as(z), z) / temperature
        others = torch.cat([similar[:i], similar[i + 1 :]])
        total = total - similar[(i + N) % (2 * N)] + others.logsumexp(0)
    same_with_gradients(nt_xent(a, b, temperature=temperature), total / (2 * N), [a, b])


def test_nt_xent_does_not_see_the_lengths():
    a, b = (e.detach() for e in embeddings(2))
    torch.testing.assert_close(nt_xent(3 * a, 0.1 * b), nt_xent(a, b), **EXACT)


# Siamese, triplet ----------------------------------------------------------------------------


def test_siamese_gradients_are_those_of_the_paper():
    a, b = embeddings(2)
    same = torch.tensor([True, False, True, False, False, True, False])
    margin = 2.5
    value = siamese(a, b, same, margin=margin)
    away = a - b
    distance = away.norm(dim=1, keepdim=True)
    assert (distance > margin).any()
    assert (distance[~same] < margin).any()
    push = -(margin - distance).clamp(min=0) / distance * away
    want = torch.where(same.unsqueeze(1), away, push) / N
    got = torch.autograd.grad(value, [a, b])
    torch.testing.assert_close(got, (want.detach(), -want.detach()), **EXACT)


def test_triplet_is_torchs():
    inputs = embeddings(3)
    theirs = functional.triplet_margin_loss(*inputs, margin=0.7, eps=0.0)
    same_with_gradients(triplet(*inputs, margin=0.7, squared=False), theirs, inputs)
    theirs = functional.triplet_margin_with_distance_loss(
        *inputs, margin=0.7, distance_function=lambda a, b: (a - b).square().sum(-1)
    )
    same_with_gradients(triplet(*inputs, margin=0.7), theirs, inputs)


# NCA -----------------------------------------------------------------------------------------


def test_nca_is_its_formula():
    (a,) = embeddings(1)
    labels = torch.tensor([0, 1, 0, 2, 1, 0, 3])
    total = 0.0
    for i in range(N):
        weights = [(-(a[i] - a[j]).square().sum()).exp() for j in range(N)]
        right = sum(w for j, w in enumerate(weights) if j != i and labels[j] == labels[i])
        total = total + right / sum(w for j, w in enumerate(weights) if j != i)
    same_with_gradients(nca(a, labels), 1 - total / N, [a])


def test_nca_keeps_small_distances_beside_large_ones():
    a = torch.tensor([[1e6, 0.0], [1e6 + 1, 0.0], [1e6 + 3, 0.0]], requires_grad=True)
    value = nca(a, torch.tensor([0, 0, 1]))
    shifted = nca(a.detach() - torch.tensor([1e6, 0.0]), torch.tensor([0, 0, 1]))
    torch.testing.assert_close(value, shifted, **EXACT)


def digits():
    """Return the digits as the figures have them: scaled, halves, and their labels."""
    datasets = pytest.importorskip("sklearn.datasets")
    from sklearn.model_selection import train_test_split
    from sklearn.preprocessing import StandardScaler

    x, y = datasets.load_digits(return_X_y=True)
    halves = train_test_split(x, y, test_size=0.5, stratify=y, random_state=0)
    scaler = StandardScaler().fit(halves[0])
    train, test = (torch.tensor(scaler.transform(part)) for part in halves[:2])
    return train, test, halves[2], halves[3]


def accuracy(map_, train, test, y_train, y_test):
    """Return how often the three nearest neighbours in the plane are right."""
    from sklearn.neighbors import KNeighborsClassifier

    near = KNeighborsClassifier(3).fit((train @ map_).numpy(), y_train)
    return near.score((test @ map_).numpy(), y_test)


@pytest.mark.slow
def test_nca_separates_the_digits_in_the_plane():
    data = digits()
    train, labels = data[0], torch.tensor(data[2])
    start = torch.linalg.svd(train, full_matrices=False).Vh[:2].T
    # Principal components, as scikit-learn's are scored; its own NCA from there has .695.
    assert accuracy(start, *data) == pytest.approx(0.523, abs=5e-4)
    weight = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([weight], max_iter=100, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        value = nca(train @ weight, labels)
        value.backward()
        return value

    optimizer.step(closure)
    assert accuracy(weight.detach(), *data) >= 0.70


# Barlow twins --------------------------------------------------------------------------------


def correlations(a, b):
    both = torch.corrcoef(torch.cat([a, b], 1).T)
    return both[: a.shape[1], a.shape[1] :]


def test_barlow_twins_is_its_formula():
    a, b = embeddings(2)
    c = correlations(a, b)
    eye = torch.eye(D)
    want = ((eye - c) * eye).square().sum() + 0.3 * (c * (1 - eye)).square().sum()
    same_with_gradients(barlow_twins(a, b, redundancy=0.3), want, [a, b])
    scaled = barlow_twins(2 * a + 1, b * torch.tensor([1.0, 3.0, 0.2]), redundancy=0.3)
    torch.testing.assert_close(scaled, want, **EXACT)


@pytest.mark.parametrize(("redundancy", "tells"), [(1.0, True), (0.0, False)])
def test_barlow_twins_finds_what_two_views_share(redundancy, tells):
    n, wide, shared = 2000, 8, 4
    mix = torch.linalg.qr(torch.randn(wide, wide)).Q[:, :shared]
    signal = torch.randn(n, shared) @ mix.T
    views = [signal + 0.3 * torch.randn(n, wide) for _ in range(2)]
    weights = [torch.randn(wide, shared, requires_grad=True) for _ in range(2)]
    optimizer = torch.optim.LBFGS(weights, max_iter=300, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        a, b = (v @ w for v, w in zip(views, weights, strict=True))
        value = barlow_twins(a, b, redundancy=redundancy)
        value.backward()
        return value

    optimizer.step(closure)
    bases = [torch.linalg.qr(v - v.mean(0)).Q for v in views]
    canonical = torch.linalg.svdvals(bases[0].T @ bases[1])[:shared]
    c = correlations(*(v @ w.detach() for v, w in zip(views, weights, strict=True)))
    ratio = c.diagonal().sort(descending=True).values / canonical
    off = (c - c.diagonal().diag()).abs().max()
    assert (ratio > 0.98).all()
    assert (off < 0.02) == tells  # without the second term the features may repeat one another


# All of them ---------------------------------------------------------------------------------

LABELS = torch.tensor([0, 0, 1, 1, 2, 2, 2])
OF_EMBEDDINGS = {
    "info_nce": lambda a, b: info_nce(lambda x, y: (x - y).norm(dim=-1), a, b),
    "nt_xent": nt_xent,
    "siamese": lambda a, b: siamese(a, b, LABELS > 0),
    "triplet": lambda a, b: triplet(a, b, a.detach()),
    "triplet, not squared": lambda a, b: triplet(a, b, a.detach(), squared=False),
    "nca": lambda a, b: nca(torch.cat([a, b]), torch.cat([LABELS, LABELS])),
    "barlow_twins": barlow_twins,
}
every_loss = pytest.mark.parametrize("loss", OF_EMBEDDINGS.values(), ids=OF_EMBEDDINGS)


@every_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_embeddings_have_finite_gradients(loss, dtype, device):
    a = torch.randn(N, D, dtype=dtype, device=device).requires_grad_()
    b = a.detach().clone().requires_grad_()
    value = loss(a, b)
    assert value.dtype == dtype
    assert value.isfinite()
    assert all(g.isfinite().all() for g in torch.autograd.grad(value, [a, b], allow_unused=True))


def test_the_root_of_a_sum_of_squares_would_not():
    a = torch.randn(N, D, requires_grad=True)
    value = (a - a.detach()).square().sum(-1).sqrt().sum()
    assert torch.autograd.grad(value, a)[0].isnan().any()


@every_loss
def test_a_nan_goes_through(loss):
    a, b = (e.detach() for e in embeddings(2))
    a[2, 1] = math.nan
    assert loss(a, b).isnan()


WRONG = {
    "none": (lambda: nt_xent(torch.ones(0, 2), torch.ones(0, 2)), "must not be empty"),
    "two sizes": (
        lambda: nt_xent(torch.ones(3, 2), torch.ones(4, 2)),
        r"b must .*\(3, 2\), got \(4",
    ),
    "pairs": (lambda: info_nce(dot, torch.ones(3, 2), torch.ones(4, 2)), r"y must .*\(3, 2\)"),
    "batch": (
        lambda: info_nce(lambda x, y: (x * y).sum(), torch.ones(3, 2), torch.ones(3, 2)),
        r"must broadcast .* to \(3, 3\), got \(\)",
    ),
    "temperature": (
        lambda: nt_xent(torch.ones(3, 2), torch.ones(3, 2), temperature=0.0),
        "temperature must be positive, got 0.0",
    ),
    "margin": (
        lambda: siamese(torch.ones(3, 2), torch.ones(3, 2), torch.ones(3) > 0, margin=-1.0),
        "margin must be positive, got -1.0",
    ),
    "same": (
        lambda: siamese(torch.ones(3, 2), torch.ones(3, 2), torch.ones(3, 1) > 0),
        r"same must have the shape \(3,\), got \(3, 1\)",
    ),
    "negative": (
        lambda: triplet(torch.ones(3, 2), torch.ones(3, 2), torch.ones(3, 1)),
        r"negative must have the shape \(3, 2\), got \(3, 1\)",
    ),
    "images": (
        lambda: siamese(torch.ones(3, 4, 3), torch.ones(3, 4, 3), torch.ones(3) > 0),
        r"embeddings must have the shape \(n, D\), got \(3, 4, 3\)",
    ),
    "numbers": (lambda: barlow_twins(torch.ones(3), torch.ones(3)), r"\(n, D\), got \(3,\)"),
    "no batch": (lambda: info_nce(dot, torch.ones(()), torch.ones(())), r"\(n, .*got \(\)"),
    "labels": (lambda: nca(torch.ones(3, 2), torch.ones(2)), r"labels must .*\(3,\), got \(2,\)"),
    "one point": (lambda: nca(torch.ones(1, 2), torch.ones(1)), "at least two points, got 1"),
    "views": (lambda: barlow_twins(torch.ones(3, 2), torch.ones(3, 1)), r"b must .*\(3, 2\)"),
}


@pytest.mark.parametrize(("call", "message"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_signs_are_not_taken_for_truths():
    with pytest.raises(TypeError, match="same must be of booleans, got torch.float64"):
        siamese(torch.ones(2, 2), torch.zeros(2, 2), torch.tensor([1.0, -1.0]))


def test_nt_xent_of_no_direction_is_nan():
    a = torch.ones(3, 2)
    assert nt_xent(a, a * torch.tensor([[1.0], [0.0], [1.0]])).isnan()
