"""Margin losses: the right answer against the most offending incorrect one."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_ebm.energy import Energy
from pyro_ebm.losses.base import check_positive, energies_of_answers


def _offence(
    energy: Energy, x: Tensor, y: Tensor, answers: Tensor, radius: float
) -> tuple[Tensor, Tensor]:
    """Return the energies of the right answers and of the most offending incorrect ones."""
    right, wrong = energies_of_answers(energy, x, y, answers, radius)
    return right, wrong.amin(0)


def hinge(
    energy: Energy,
    x: Tensor,
    y: Tensor,
    answers: Tensor,
    *,
    margin: float = 1.0,
    radius: float = 0.0,
) -> Tensor:
    r"""Ask for a margin between the right answer and the most offending one.

    .. math:: \mathcal{L} = \mathbb{E}[\max(0, m + F(x, y) - F(x, \bar{y}))]

    :math:`\bar{y}` is the incorrect answer of least energy.
    Costs n (1 + K) energies.

    Args:
        energy: Maps points and answers, whose batches broadcast, to energies.
        x: Points, of shape ``(*n, *event)``.
        y: Their right answers, ``(*n, *event_y)``.
        answers: All answers, or those that may offend: ``(K, *event_y)``, or for each point its
            own, ``(K, *n, *event_y)``.
        margin: The margin :math:`m`, positive.
        radius: How far from the right answer an incorrect one is, in the Euclidean norm; at zero
            all that are not equal to it are.

    Returns:
        A scalar.

    Raises:
        ValueError: If there are no points, a shape does not fit, ``margin`` is not positive, or
            ``radius`` is negative.

    References:
        | A Tutorial on Energy-Based Learning (LeCun et al., 2006), section 2.2
        | http://yann.lecun.com/exdb/publis/pdf/lecun-06.pdf

    Example:
        >>> F = torch.tensor([[1.0, 2.0], [2.0, 1.0]])
        >>> energy = lambda x, y: F[x, y]
        >>> x, y, answers = torch.arange(2), torch.tensor([0, 0]), torch.arange(2)
        >>> hinge(energy, x, y, answers)
        tensor(1.)
    """
    check_positive(margin=margin)
    right, wrong = _offence(energy, x, y, answers, radius)
    return (margin + right - wrong).relu().mean()


def log_loss(
    energy: Energy, x: Tensor, y: Tensor, answers: Tensor, *, radius: float = 0.0
) -> Tensor:
    r"""A soft hinge, with a margin that is never enough.

    .. math:: \mathcal{L} = \mathbb{E}[\log(1 + e^{F(x, y) - F(x, \bar{y})})]

    :math:`\bar{y}` is the incorrect answer of least energy.
    Costs n (1 + K) energies.

    Args:
        energy: Maps points and answers, whose batches broadcast, to energies.
        x: Points, of shape ``(*n, *event)``.
        y: Their right answers, ``(*n, *event_y)``.
        answers: All answers, or those that may offend: ``(K, *event_y)``, or for each point its
            own, ``(K, *n, *event_y)``.
        radius: How far from the right answer an incorrect one is, in the Euclidean norm; at zero
            all that are not equal to it are.

    Returns:
        A scalar.

    Raises:
        ValueError: If there are no points, a shape does not fit, or ``radius`` is negative.

    References:
        | A Tutorial on Energy-Based Learning (LeCun et al., 2006), section 2.2
        | http://yann.lecun.com/exdb/publis/pdf/lecun-06.pdf

    Example:
        >>> F = torch.tensor([[1.0, 2.0], [2.0, 1.0]])
        >>> energy = lambda x, y: F[x, y]
        >>> x, y, answers = torch.arange(2), torch.tensor([0, 0]), torch.arange(2)
        >>> log_loss(energy, x, y, answers)
        tensor(0.8133)
    """
    right, wrong = _offence(energy, x, y, answers, radius)
    return torch.logaddexp(right - wrong, torch.zeros_like(right)).mean()


def lvq2(
    energy: Energy,
    x: Tensor,
    y: Tensor,
    answers: Tensor,
    *,
    ceiling: float = 1.0,
    radius: float = 0.0,
) -> Tensor:
    r"""The error in energy, with a ceiling against outliers.

    .. math:: \mathcal{L} = \mathbb{E}[\min(M, \max(0, F(x, y) - F(x, \bar{y})))]

    :math:`\bar{y}` is the incorrect answer of least energy. This is the form of the tutorial's
    table 1; that of its text divides by :math:`F(x, \bar{y})` and so needs positive energies.
    There is no margin: a flat energy is a minimum.
    Costs n (1 + K) energies.

    Args:
        energy: Maps points and answers, whose batches broadcast, to energies.
        x: Points, of shape ``(*n, *event)``.
        y: Their right answers, ``(*n, *event_y)``.
        answers: All answers, or those that may offend: ``(K, *event_y)``, or for each point its
            own, ``(K, *n, *event_y)``.
        ceiling: The most, :math:`M`, that a point may cost, positive.
        radius: How far from the right answer an incorrect one is, in the Euclidean norm; at zero
            all that are not equal to it are.

    Returns:
        A scalar.

    Raises:
        ValueError: If there are no points, a shape does not fit, ``ceiling`` is not positive, or
            ``radius`` is negative.

    References:
        | A Tutorial on Energy-Based Learning (LeCun et al., 2006), section 2.2
        | http://yann.lecun.com/exdb/publis/pdf/lecun-06.pdf

    Example:
        >>> F = torch.tensor([[1.0, 2.0], [2.0, 1.0]])
        >>> energy = lambda x, y: F[x, y]
        >>> x, y, answers = torch.arange(2), torch.tensor([0, 0]), torch.arange(2)
        >>> lvq2(energy, x, y, answers)
        tensor(0.5000)
    """
    check_positive(ceiling=ceiling)
    right, wrong = _offence(energy, x, y, answers, radius)
    return (right - wrong).relu().clamp(max=ceiling).mean()


def minimum_classification_error(
    energy: Energy, x: Tensor, y: Tensor, answers: Tensor, *, radius: float = 0.0
) -> Tensor:
    r"""A smooth count of the points whose right answer is not the least.

    .. math:: \mathcal{L} = \mathbb{E}[\sigma(F(x, y) - F(x, \bar{y}))]

    :math:`\bar{y}` is the incorrect answer of least energy.
    Costs n (1 + K) energies.

    Args:
        energy: Maps points and answers, whose batches broadcast, to energies.
        x: Points, of shape ``(*n, *event)``.
        y: Their right answers, ``(*n, *event_y)``.
        answers: All answers, or those that may offend: ``(K, *event_y)``, or for each point its
            own, ``(K, *n, *event_y)``.
        radius: How far from the right answer an incorrect one is, in the Euclidean norm; at zero
            all that are not equal to it are.

    Returns:
        A scalar.

    Raises:
        ValueError: If there are no points, a shape does not fit, or ``radius`` is negative.

    References:
        | A Tutorial on Energy-Based Learning (LeCun et al., 2006), section 2.2
        | http://yann.lecun.com/exdb/publis/pdf/lecun-06.pdf

    Example:
        >>> F = torch.tensor([[1.0, 2.0], [2.0, 1.0]])
        >>> energy = lambda x, y: F[x, y]
        >>> x, y, answers = torch.arange(2), torch.tensor([0, 0]), torch.arange(2)
        >>> minimum_classification_error(energy, x, y, answers)
        tensor(0.5000)
    """
    right, wrong = _offence(energy, x, y, answers, radius)
    return (right - wrong).sigmoid().mean()


def square_square(
    energy: Energy,
    x: Tensor,
    y: Tensor,
    answers: Tensor,
    *,
    margin: float = 1.0,
    radius: float = 0.0,
) -> Tensor:
    r"""Pull the right energy to zero and push the most offending one above a margin.

    .. math:: \mathcal{L} = \mathbb{E}[F(x, y)^2 + \max(0, m - F(x, \bar{y}))^2]

    :math:`\bar{y}` is the incorrect answer of least energy. It is for energies that are not
    negative, and depends on their constant.
    Costs n (1 + K) energies.

    Args:
        energy: Maps points and answers, whose batches broadcast, to energies.
        x: Points, of shape ``(*n, *event)``.
        y: Their right answers, ``(*n, *event_y)``.
        answers: All answers, or those that may offend: ``(K, *event_y)``, or for each point its
            own, ``(K, *n, *event_y)``.
        margin: The margin :math:`m`, positive.
        radius: How far from the right answer an incorrect one is, in the Euclidean norm; at zero
            all that are not equal to it are.

    Returns:
        A scalar.

    Raises:
        ValueError: If there are no points, a shape does not fit, ``margin`` is not positive, or
            ``radius`` is negative.

    References:
        | A Tutorial on Energy-Based Learning (LeCun et al., 2006), section 2.2
        | http://yann.lecun.com/exdb/publis/pdf/lecun-06.pdf

    Example:
        >>> F = torch.tensor([[1.0, 2.0], [2.0, 1.0]])
        >>> energy = lambda x, y: F[x, y]
        >>> x, y, answers = torch.arange(2), torch.tensor([0, 0]), torch.arange(2)
        >>> square_square(energy, x, y, answers)
        tensor(2.5000)
    """
    check_positive(margin=margin)
    right, wrong = _offence(energy, x, y, answers, radius)
    return (right.square() + (margin - wrong).relu().square()).mean()


def square_exponential(
    energy: Energy,
    x: Tensor,
    y: Tensor,
    answers: Tensor,
    *,
    weight: float = 1.0,
    radius: float = 0.0,
) -> Tensor:
    r"""Pull the right energy to zero and push the most offending one without end.

    .. math:: \mathcal{L} = \mathbb{E}[F(x, y)^2 + \gamma e^{-F(x, \bar{y})}]

    :math:`\bar{y}` is the incorrect answer of least energy. It is for energies that are not
    negative, and depends on their constant.
    Costs n (1 + K) energies.

    Args:
        energy: Maps points and answers, whose batches broadcast, to energies.
        x: Points, of shape ``(*n, *event)``.
        y: Their right answers, ``(*n, *event_y)``.
        answers: All answers, or those that may offend: ``(K, *event_y)``, or for each point its
            own, ``(K, *n, *event_y)``.
        weight: The weight :math:`\gamma` of the push, positive.
        radius: How far from the right answer an incorrect one is, in the Euclidean norm; at zero
            all that are not equal to it are.

    Returns:
        A scalar.

    Raises:
        ValueError: If there are no points, a shape does not fit, ``weight`` is not positive, or
            ``radius`` is negative.

    References:
        | A Tutorial on Energy-Based Learning (LeCun et al., 2006), section 2.2
        | http://yann.lecun.com/exdb/publis/pdf/lecun-06.pdf

    Example:
        >>> F = torch.tensor([[1.0, 2.0], [2.0, 1.0]])
        >>> energy = lambda x, y: F[x, y]
        >>> x, y, answers = torch.arange(2), torch.tensor([0, 0]), torch.arange(2)
        >>> square_exponential(energy, x, y, answers)
        tensor(2.7516)
    """
    check_positive(weight=weight)
    right, wrong = _offence(energy, x, y, answers, radius)
    return (right.square() + weight * (-wrong).exp()).mean()
