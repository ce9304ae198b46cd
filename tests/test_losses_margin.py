"""The losses of right answers: values and gradients on tables of energies, minima, collapse."""

import math

import pytest
import torch
from torch import nn

from pyro_ebm.losses import (
    energy_loss,
    hinge,
    log_loss,
    lvq2,
    margin,
    minimum_classification_error,
    minimum_empirical_error,
    negative_log_likelihood,
    perceptron,
    square_exponential,
    square_square,
)
from tests.common import EXACT, NUMERIC

N, K = 40, 5


def sigmoid(t):
    return 1 / (1 + math.exp(-t))


def hump(t):
    return sigmoid(t) * sigmoid(-t)


def between(low, t, high):
    return float(low < t < high)


OFFENDED = {  # a loss, its options, and its value at two energies, with its slopes in them
    "hinge": (
        hinge,
        {"margin": 0.7},
        lambda e, o: (max(0.0, 0.7 + e - o), float(0.7 + e > o), -float(0.7 + e > o)),
    ),
    "log": (
        log_loss,
        {},
        lambda e, o: (math.log1p(math.exp(e - o)), sigmoid(e - o), -sigmoid(e - o)),
    ),
    "lvq2": (
        lvq2,
        {"ceiling": 0.9},
        lambda e, o: (
            min(0.9, max(0.0, e - o)),
            between(0.0, e - o, 0.9),
            -between(0.0, e - o, 0.9),
        ),
    ),
    "minimum classification error": (
        minimum_classification_error,
        {},
        lambda e, o: (sigmoid(e - o), hump(e - o), -hump(e - o)),
    ),
    "square-square": (
        square_square,
        {"margin": 0.7},
        lambda e, o: (e**2 + max(0.0, 0.7 - o) ** 2, 2 * e, -2 * max(0.0, 0.7 - o)),
    ),
    "square-exponential": (
        square_exponential,
        {"weight": 0.7},
        lambda e, o: (e**2 + 0.7 * math.exp(-o), 2 * e, -0.7 * math.exp(-o)),
    ),
}
FLAT_IS_LEAST = {  # does a flat energy do as well as one that separates the answers?
    "perceptron": (perceptron, True),
    "lvq2": (lvq2, True),
    "hinge": (hinge, False),
    "log": (log_loss, False),
    "minimum classification error": (minimum_classification_error, False),
    "negative log-likelihood": (negative_log_likelihood, False),
    "minimum empirical error": (minimum_empirical_error, False),
}
of_an_offence = pytest.mark.parametrize(
    ("loss", "options", "truth"), OFFENDED.values(), ids=OFFENDED
)


def table_of(energies):
    """Return the energy of a table ``(N, K)``, and points, right answers and all answers."""
    x, y = torch.arange(len(energies)), torch.arange(len(energies)) * 7 % energies.shape[1]
    return (lambda x, a: energies[x, a]), x, y, torch.arange(energies.shape[1])


def value_and_slopes(loss, energies, **options):
    energies = energies.clone().requires_grad_()
    value = loss(*table_of(energies), **options)
    return value.detach(), torch.autograd.grad(value, energies)[0]


def by_hand(truth, energies):
    """The mean of the values at each point, and the slopes in all entries of the table."""
    total, slopes = 0.0, torch.zeros_like(energies)
    for i, y in enumerate(table_of(energies)[2].tolist()):
        offending = min((energies[i, a].item(), a) for a in range(K) if a != y)
        value, up, down = truth(energies[i, y].item(), offending[0])
        total += value / N
        slopes[i, y] += up / N
        slopes[i, offending[1]] += down / N
    return torch.tensor(total), slopes


@of_an_offence
def test_values_and_gradients_are_those_of_the_formula(loss, options, truth):
    energies = torch.randn(N, K)
    torch.testing.assert_close(
        value_and_slopes(loss, energies, **options), by_hand(truth, energies), **EXACT
    )


@of_an_offence
def test_energies_that_are_of_other_answers_are_seen(loss, options, truth, monkeypatch):
    """The planted fault of the test above."""
    right = margin.energies_of_answers

    def confused(energy, x, y, *rest):
        return right(energy, x, (y + 1) % K, *rest)

    monkeypatch.setattr(margin, "energies_of_answers", confused)
    energies = torch.randn(N, K)
    value, expected = loss(*table_of(energies), **options), by_hand(truth, energies)[0]
    assert abs(value - expected) > 0.01


def test_the_perceptron_is_the_energy_above_the_least():
    energies = torch.randn(N, K)
    y = table_of(energies)[2]
    value, slopes = value_and_slopes(perceptron, energies)
    torch.testing.assert_close(
        value, (energies.gather(1, y[:, None])[:, 0] - energies.amin(1)).mean(), **EXACT
    )
    one_hot = nn.functional.one_hot
    truth = (one_hot(y, K) - one_hot(energies.argmin(1), K)) / N
    at_the_least = y == energies.argmin(1)  # a kink, where both slopes cancel
    torch.testing.assert_close(slopes[~at_the_least], truth[~at_the_least], **EXACT)
    torch.testing.assert_close(slopes[at_the_least], 0 * truth[at_the_least], **EXACT)


@pytest.mark.parametrize("beta", [0.3, 1.0, 4.0])
def test_the_likelihood_is_the_cross_entropy_of_a_softmax(beta):
    energies = torch.randn(N, K)
    entropy = lambda f, x, y, _: nn.functional.cross_entropy(
        -beta * f(x[:, None], torch.arange(K)), y
    )
    value, slopes = value_and_slopes(negative_log_likelihood, energies, beta=beta)
    expected, expected_slopes = value_and_slopes(entropy, energies)
    torch.testing.assert_close(value, expected / beta, **EXACT)
    torch.testing.assert_close(slopes, expected_slopes / beta, **EXACT)


@pytest.mark.parametrize("beta", [0.3, 1.0, 4.0])
def test_the_chance_of_an_error_is_that_of_a_softmax(beta):
    energies = torch.randn(N, K)
    y = table_of(energies)[2]
    p = torch.softmax(-beta * energies, 1)
    right = p.gather(1, y[:, None])
    value, slopes = value_and_slopes(minimum_empirical_error, energies, beta=beta)
    torch.testing.assert_close(value, 1 - right.mean(), **EXACT)
    truth = beta * right * (nn.functional.one_hot(y, K) - p) / N
    torch.testing.assert_close(slopes, truth, **EXACT)


def test_the_cold_likelihood_is_the_perceptron():
    energies = torch.randn(N, K)
    parts = table_of(energies)
    cold = negative_log_likelihood(*parts, beta=math.inf)
    torch.testing.assert_close(cold, perceptron(*parts), **EXACT)
    near = negative_log_likelihood(*parts, beta=1e8)
    torch.testing.assert_close(near, perceptron(*parts), **NUMERIC)


# Minima ------------------------------------------------------------------------------------------


def at_scale(loss, scale):
    """The loss where right answers are below all others by a scale, all else alike."""
    energies = torch.zeros(N, K)
    energies[torch.arange(N), table_of(energies)[2]] = -scale
    return loss(*table_of(energies)).item()


@pytest.mark.parametrize(("loss", "collapses"), FLAT_IS_LEAST.values(), ids=FLAT_IS_LEAST)
def test_a_flat_energy_is_a_minimum_only_where_the_theory_says_so(loss, collapses):
    """Conditions of LeCun et al., table 1: a loss without a margin may collapse."""
    assert (at_scale(loss, 0.0) <= at_scale(loss, 3.0)) == collapses
    assert at_scale(loss, -3.0) > at_scale(loss, 0.0)


@pytest.mark.parametrize(
    ("loss", "collapses"), [(perceptron, True), (hinge, False)], ids=["perceptron", "hinge"]
)
def test_an_energy_that_may_be_flat_becomes_so_by_the_perceptron_and_not_by_the_hinge(
    loss, collapses
):
    """The energy is a free scale of a table in which the answers of some points are wrong."""
    table = torch.ones(4, 3)
    table[torch.arange(4), table_of(table)[2]] = torch.tensor([0.0, 0.0, 0.0, 3.0])
    scale = torch.tensor(1.0, requires_grad=True)
    optim = torch.optim.SGD([scale], lr=0.05)
    for _ in range(200):
        value = loss(*table_of(scale * table))
        optim.zero_grad()
        value.backward()
        optim.step()
    assert (abs(scale) < 0.06) == collapses  # a step of it at most beside the kink at zero
    if not collapses:
        assert value < loss(*table_of(0.0 * table))


def test_the_square_losses_are_least_where_the_formula_says():
    """Right energies at zero, others from the margin on: nothing is left to push."""
    energies = torch.full((N, K), 2.0)
    energies[torch.arange(N), table_of(energies)[2]] = 0.0
    value, slopes = value_and_slopes(square_square, energies)
    assert value == 0
    assert not slopes.any()
    value, _ = value_and_slopes(square_exponential, energies + 1.0)
    torch.testing.assert_close(value, torch.tensor(1 + math.exp(-3.0)), **EXACT)


def test_the_energy_loss_has_no_end_unless_the_energy_has():
    energies = torch.randn(N, K)
    lower = energy_loss(*table_of(energies - 100.0)[:3])
    torch.testing.assert_close(lower, energy_loss(*table_of(energies)[:3]) - 100.0, **EXACT)
    slope = torch.tensor(0.0, requires_grad=True)
    x = torch.randn(N)
    value = energy_loss(lambda x, y: (y - slope * x).square(), x, 2.0 * x)
    value.backward()
    torch.testing.assert_close(slope.grad, -4 * x.square().mean(), **EXACT)


# Answers of all kinds ----------------------------------------------------------------------------


def distance(x, y):
    return (x - y).square().sum(-1) + y.sin().sum(-1)


@of_an_offence
def test_continuous_answers_are_incorrect_beyond_a_radius(loss, options, truth):
    x, y, answers = torch.randn(6, 2), torch.randn(6, 2), torch.randn(30, 2)
    answers = torch.cat([answers, y + 0.01])
    values = []
    for a, b in zip(x, y, strict=True):
        far = [distance(a, c).item() for c in answers if (c - b).norm() > 0.8]
        values.append(truth(distance(a, b).item(), min(far))[0])
    got = loss(distance, x, y, answers, radius=0.8, **options)
    torch.testing.assert_close(got, torch.tensor(values).mean(), **EXACT)


@pytest.mark.parametrize("loss", [hinge, perceptron, negative_log_likelihood])
def test_each_point_may_have_its_own_answers(loss):
    x, y, answers = torch.randn(6, 2), torch.randn(6, 2), torch.randn(4, 6, 2)
    alone = [loss(distance, x[i : i + 1], y[i : i + 1], answers[:, i]) for i in range(6)]
    got = loss(distance, x, y, answers)
    torch.testing.assert_close(got, torch.stack(alone).mean(), **EXACT)
    common = loss(distance, x, y, answers[:, :1].expand(4, 6, 2))
    torch.testing.assert_close(common, loss(distance, x, y, answers[:, 0]), **EXACT)


def test_answers_may_be_numbers_bits_and_one_hot():
    energies = torch.randn(N, 2)
    f, x, y, answers = table_of(energies)
    value = hinge(f, x, y, answers)
    of_bits = lambda x, a: f(x, a.long())
    torch.testing.assert_close(hinge(of_bits, x, y > 0, answers > 0), value, **EXACT)
    one_hot = lambda a: nn.functional.one_hot(a, 2).to(energies.dtype)
    of_one_hot = lambda x, a: (energies[x] * a).sum(-1)
    torch.testing.assert_close(hinge(of_one_hot, x, one_hot(y), one_hot(answers)), value, **EXACT)


@of_an_offence
def test_without_an_incorrect_answer_there_is_nothing_to_push(loss, options, truth):
    energies = torch.randn(N, 1)
    value, slopes = value_and_slopes(loss, energies, **options)
    pulled = energies.square().mean() if "square" in loss.__name__ else torch.tensor(0.0)
    torch.testing.assert_close(value, pulled, **EXACT)
    factor = 2 / N if "square" in loss.__name__ else 0.0
    torch.testing.assert_close(slopes, factor * energies, **EXACT)


@pytest.mark.parametrize("loss", [negative_log_likelihood, minimum_empirical_error])
def test_the_right_answer_is_one_of_all_also_where_it_is_not_listed(loss):
    f, x, y, answers = table_of(torch.randn(N, K))
    others = torch.stack([answers[answers != right] for right in y], 1)
    torch.testing.assert_close(loss(f, x, y, others), loss(f, x, y, answers), **EXACT)
    assert loss(f, x, y, answers[:1]) >= 0


@pytest.mark.parametrize("beta", [0.01, 1.0, 100.0])
@pytest.mark.parametrize("loss", [negative_log_likelihood, minimum_empirical_error])
def test_a_large_constant_takes_no_digits(loss, beta):
    energies = torch.randint(5, (N, K)).float()  # whole numbers, which the sum keeps
    expected = value_and_slopes(loss, energies, beta=beta)
    torch.testing.assert_close(value_and_slopes(loss, energies + 2.0**23, beta=beta), expected)


def test_walls_are_no_likely_answers():
    energies = torch.randn(2, K)
    energies[0, 1:] = math.inf  # the right answers are 0 and 2
    assert minimum_empirical_error(*table_of(energies[:1])) == 0
    energies[1, 2] = math.inf
    value, slopes = value_and_slopes(minimum_empirical_error, energies)
    assert value == 0.5
    assert (slopes == 0).all()
    assert negative_log_likelihood(*table_of(energies)) == math.inf


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8])
def test_answers_without_a_sign_are_apart_on_both_sides(dtype):
    f = lambda x, a: x * a.to(x).sum(-1)
    x, y = torch.randn(2), torch.tensor([[0], [1]], dtype=dtype)
    assert hinge(f, x, y, y, radius=2.0) == 0  # none is incorrect
    torch.testing.assert_close(hinge(f, x, y, y, radius=0.5), hinge(f, x, y, y), **EXACT)


def test_the_perceptron_is_not_negative_where_the_right_answer_is_not_among_the_others():
    f, x, y, _ = table_of(torch.randn(N, K).abs())
    assert perceptron(f, x, y, torch.tensor([1, 2])) >= 0
    assert perceptron(lambda x, a: -1.0 * (a == y), x, y, torch.tensor([9])) == 0


WRONG = {
    "no answers": (lambda f, x, y, a: hinge(f, x, y, a[:0]), "points must not be empty"),
    "no points": (lambda f, x, y, a: log_loss(f, x[:0], y[:0], a), "points must not be empty"),
    "one right answer for all": (
        lambda f, x, y, a: perceptron(f, x, y[:1], a),
        r"y must have one answer per energy, \(40,\), got \(1,\)",
    ),
    "answers of another shape": (
        lambda f, x, y, a: perceptron(f, x, y, a[:, None, None]),
        r"answers must have the shape .* got \(5, 1, 1\)",
    ),
    "a negative radius": (
        lambda f, x, y, a: hinge(f, x, y, a, radius=-1.0),
        "radius must not be negative, got -1.0",
    ),
    "a radius that is no number": (
        lambda f, x, y, a: hinge(f, x, y, a, radius=math.nan),
        "radius must not be negative, got nan",
    ),
    "no margin": (
        lambda f, x, y, a: hinge(f, x, y, a, margin=0.0),
        "margin must be positive, got 0.0",
    ),
    "a margin that is no number": (
        lambda f, x, y, a: square_square(f, x, y, a, margin=math.nan),
        "margin must be positive, got nan",
    ),
    "a ceiling below zero": (
        lambda f, x, y, a: lvq2(f, x, y, a, ceiling=-1.0),
        "ceiling must be positive, got -1.0",
    ),
    "a pull instead of a push": (
        lambda f, x, y, a: square_exponential(f, x, y, a, weight=-1.0),
        "weight must be positive, got -1.0",
    ),
    "beta zero": (
        lambda f, x, y, a: negative_log_likelihood(f, x, y, a, beta=0.0),
        "beta must be positive, got 0.0",
    ),
    "beta infinite": (
        lambda f, x, y, a: minimum_empirical_error(f, x, y, a, beta=math.inf),
        "beta must be finite, got inf",
    ),
}


@pytest.mark.parametrize(("call", "message"), WRONG.values(), ids=WRONG)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(*table_of(torch.randn(N, K)))
