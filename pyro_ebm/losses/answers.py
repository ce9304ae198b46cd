"""Losses of the right answer among all: energy, perceptron, likelihood, chance of an error."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyro_ebm._math import check_positive_beta, soft_minimum
from pyro_ebm.energy import Energy
from pyro_ebm.losses.base import energies, energies_of_answers


def energy_loss(energy: Energy, x: Tensor, y: Tensor) -> Tensor:
    r"""The mean energy of the right answers.

    .. math:: \mathcal{L} = \mathbb{E}_{x, y}[F(x, y)]

    It works only where pulling down some energies pushes up the others, as in regression with
    :math:`F = \Vert y - g(x) \Vert^2`; elsewhere the energy collapses. Costs n energies.

    Args:
        energy: Maps points and answers, whose batches broadcast, to energies.
        x: Points, of shape ``(*n, *event)``.
        y: Their right answers, ``(*n, *event_y)``.

    Returns:
        A scalar.

    Raises:
        ValueError: If there are no points.

    References:
        | A Tutorial on Energy-Based Learning (LeCun et al., 2006), section 2.2
        | http://yann.lecun.com/exdb/publis/pdf/lecun-06.pdf

    Example:
        >>> x, y = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 0.0])
        >>> energy_loss(lambda x, y: (x - y).square(), x, y)
        tensor(2.)
    """
    return energies(energy, x, y).mean()


def perceptron(energy: Energy, x: Tensor, y: Tensor, answers: Tensor) -> Tensor:
    r"""The energy of the right answer above the least.

    .. math:: \mathcal{L} = \mathbb{E}[F(x, y) - \min_a F(x, a)]

    It is never negative. A flat energy is a minimum too, and it may collapse to one.
    Costs n (1 + K) energies.

    Args:
        energy: Maps points and answers, whose batches broadcast, to energies.
        x: Points, of shape ``(*n, *event)``.
        y: Their right answers, ``(*n, *event_y)``.
        answers: All answers, or those that may offend: ``(K, *event_y)``, or for each point its
            own, ``(K, *n, *event_y)``.

    Returns:
        A scalar.

    Raises:
        ValueError: If there are no points, or a shape does not fit.

    References:
        | A Tutorial on Energy-Based Learning (LeCun et al., 2006), section 2.2
        | http://yann.lecun.com/exdb/publis/pdf/lecun-06.pdf

    Example:
        >>> F = torch.tensor([[1.0, 2.0], [2.0, 1.0]])
        >>> energy = lambda x, y: F[x, y]
        >>> x, y, answers = torch.arange(2), torch.tensor([0, 0]), torch.arange(2)
        >>> perceptron(energy, x, y, answers)
        tensor(0.5000)
    """
    right, wrong = energies_of_answers(energy, x, y, answers)
    return (right - torch.minimum(right, wrong.amin(0))).mean()


def negative_log_likelihood(
    energy: Energy, x: Tensor, y: Tensor, answers: Tensor, *, beta: float = 1.0
) -> Tensor:
    r"""The negative log-likelihood of the right answer among all.

    .. math::
        \mathcal{L} = \mathbb{E}\Big[F(x, y) + \frac{1}{\beta} \log \sum_a e^{-\beta F(x, a)}\Big]

    Over :math:`\beta`, as the tutorial has it. At :math:`\beta = 1` with energies :math:`-f_a(x)`
    it is the cross-entropy of a softmax; at infinity it is the :func:`perceptron`.
    Costs n (1 + K) energies.

    Args:
        energy: Maps points and answers, whose batches broadcast, to energies.
        x: Points, of shape ``(*n, *event)``.
        y: Their right answers, ``(*n, *event_y)``.
        answers: All answers, each once, where the right ones may be left out: ``(K, *event_y)``,
            or for each point its own, ``(K, *n, *event_y)``.
        beta: The inverse temperature :math:`\beta` over the answers, positive.

    Returns:
        A scalar.

    Raises:
        ValueError: If there are no points, a shape does not fit, or ``beta`` is not positive.

    References:
        | A Tutorial on Energy-Based Learning (LeCun et al., 2006), section 2.2
        | http://yann.lecun.com/exdb/publis/pdf/lecun-06.pdf

    Example:
        >>> F = torch.tensor([[1.0, 2.0], [2.0, 1.0]])
        >>> energy = lambda x, y: F[x, y]
        >>> x, y, answers = torch.arange(2), torch.tensor([0, 0]), torch.arange(2)
        >>> negative_log_likelihood(energy, x, y, answers)
        tensor(0.8133)
    """
    right, free = _free_energies(energy, x, y, answers, beta)
    return (right - free).mean()


def minimum_empirical_error(
    energy: Energy, x: Tensor, y: Tensor, answers: Tensor, *, beta: float = 1.0
) -> Tensor:
    r"""The probability that an answer drawn from the model is wrong.

    .. math:: \mathcal{L} = \mathbb{E}[1 - p_\beta(y \mid x)], \quad
        p_\beta(y \mid x) = e^{-\beta F(x, y)} \Big/ \sum_a e^{-\beta F(x, a)}

    Costs n (1 + K) energies.

    Args:
        energy: Maps points and answers, whose batches broadcast, to energies.
        x: Points, of shape ``(*n, *event)``.
        y: Their right answers, ``(*n, *event_y)``.
        answers: All answers, each once, where the right ones may be left out: ``(K, *event_y)``,
            or for each point its own, ``(K, *n, *event_y)``.
        beta: The inverse temperature :math:`\beta` over the answers, positive.

    Returns:
        A scalar.

    Raises:
        ValueError: If there are no points, a shape does not fit, or ``beta`` is not positive and
            finite.

    References:
        | A Tutorial on Energy-Based Learning (LeCun et al., 2006), section 2.2
        | http://yann.lecun.com/exdb/publis/pdf/lecun-06.pdf

    Example:
        >>> F = torch.tensor([[1.0, 2.0], [2.0, 1.0]])
        >>> energy = lambda x, y: F[x, y]
        >>> x, y, answers = torch.arange(2), torch.tensor([0, 0]), torch.arange(2)
        >>> minimum_empirical_error(energy, x, y, answers)
        tensor(0.5000)
    """
    if beta == math.inf:
        raise ValueError("beta must be finite, got inf")
    right, free = _free_energies(energy, x, y, answers, beta)
    return -torch.expm1(beta * (free - right)).mean()


def _free_energies(
    energy: Energy, x: Tensor, y: Tensor, answers: Tensor, beta: float
) -> tuple[Tensor, Tensor]:
    """Return the energies of the right answers, and those of these and all others together.

    Both are above the least of each point, so that a large constant takes no digits from them.
    """
    check_positive_beta(beta)
    right, wrong = energies_of_answers(energy, x, y, answers)
    value = torch.cat([right.unsqueeze(0), wrong])
    least = value.detach().amin(0)
    least = torch.where(least.isfinite(), least, 0.0)
    return right - least, soft_minimum(value - least, torch.zeros_like(value), beta)
