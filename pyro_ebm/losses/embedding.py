"""Losses of joint embeddings: what belongs together is near, the rest far."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from pyro_ebm.energy import Energy, describe
from pyro_ebm.losses.base import check_points, check_positive, energies


def info_nce(energy: Energy, x: Tensor, y: Tensor, *, symmetric: bool = False) -> Tensor:
    r"""Pick out the partner of each point among the partners of all.

    .. math:: \mathcal{L} = \frac{1}{n} \sum_i -\log
        \frac{e^{-E(x_i, y_i)}}{\sum_{j=1}^{n} e^{-E(x_i, y_j)}}

    The negatives of :math:`x_i` are the partners of the others, so that gradients flow into all
    of ``y``. :math:`\log n - \mathcal{L}` is on average a lower bound of the mutual information
    of x and y, never above :math:`\log n`: with n pairs no more than that is seen. The best energy
    is :math:`-\log p(y \mid x) / p(y)` up to a function of x, or of neither where ``symmetric``. A
    temperature is a factor of the energy. It costs :math:`n^2` energies.

    Args:
        energy: An energy of two parts, whose batches broadcast.
        x: Points, of shape ``(n, *event)``.
        y: The partner of each, of shape ``(n, *event)``, with an event of its own.
        symmetric: Whether to add the loss with x and y exchanged, and to halve, as CLIP does.

    Returns:
        A scalar.

    Raises:
        ValueError: If there are no pairs, or the energy does not give one number for each.

    References:
        | Representation Learning with Contrastive Predictive Coding (van den Oord, Li and Vinyals,
          2018)
        | https://arxiv.org/abs/1807.03748

    Example:
        >>> energy = lambda x, y: (x - y).square().sum(-1)
        >>> x = torch.tensor([[0.0], [1.0]])
        >>> info_nce(energy, x, x)                         # log(1 + e^-1)
        tensor(0.3133)
    """
    if not x.dim():
        raise ValueError("x must have the shape (n, *event), got ()")
    _check_rows("y", y, (len(x), *y.shape[1:]))
    logits = -energies(energy, x.unsqueeze(1), y.unsqueeze(0))
    if logits.shape != (len(x), len(x)):
        raise ValueError(
            f"{describe(energy)} must broadcast the batches (n, 1) and (1, n) of its parts to "
            f"{(len(x), len(x))}, got {tuple(logits.shape)}"
        )
    own = torch.arange(len(x), device=logits.device)
    loss = functional.cross_entropy(logits, own)
    return 0.5 * (loss + functional.cross_entropy(logits.T, own)) if symmetric else loss


def nt_xent(a: Tensor, b: Tensor, *, temperature: float = 0.5) -> Tensor:
    r"""Pick out the other view of each point among all other views, as SimCLR does.

    .. math:: \mathcal{L} = \frac{1}{2n} \sum_{i=1}^{2n} -\log \frac{e^{s(z_i, z_{i'}) / \tau}}
        {\sum_{j \neq i} e^{s(z_i, z_j) / \tau}} , \quad
        s(u, v) = \frac{u^\top v}{\lVert u \rVert \lVert v \rVert}

    The z are the 2 n rows of ``a`` and ``b``, :math:`i'` is the other view of the same point. Half
    of the negatives are views of the same kind as the point itself, unlike in :func:`info_nce`.
    An embedding of length zero has no direction and gives NaN. It takes :math:`4 n^2` products.

    Args:
        a: Embeddings of one view of each point, ``(n, D)``.
        b: Embeddings of another view, ``(n, D)``.
        temperature: The :math:`\tau`, positive.

    Returns:
        A scalar.

    Raises:
        ValueError: If there are no points, a shape is not ``(n, D)``, or the temperature is not
            positive.

    References:
        | A Simple Framework for Contrastive Learning of Visual Representations (Chen, Kornblith,
          Norouzi and Hinton, 2020)
        | https://arxiv.org/abs/2002.05709

    Example:
        >>> a = torch.eye(2)
        >>> nt_xent(a, a)                                  # log(1 + 2 e^-2)
        tensor(0.2395)
    """
    _check_embeddings(a, b=b)
    check_positive(temperature=temperature)
    z = torch.cat([a, b])
    z = z / z.norm(dim=-1, keepdim=True)
    logits = (z @ z.T / temperature).fill_diagonal_(-torch.inf)
    partner = torch.arange(len(z), device=z.device).roll(len(a))
    return functional.cross_entropy(logits, partner)


def siamese(a: Tensor, b: Tensor, same: Tensor, *, margin: float = 1.0) -> Tensor:
    r"""Pull pairs of one kind together, and push others apart up to a margin.

    .. math:: \mathcal{L} = \frac{1}{2n} \sum_i t_i D_i^2 + (1 - t_i) \max(0, m - D_i)^2 ,
        \quad D_i = \lVert a_i - b_i \rVert

    Two equal embeddings of different kinds are not pushed: there the distance has no direction.

    Args:
        a: Embeddings, of shape ``(n, D)``.
        b: Embeddings to pair them with, ``(n, D)``.
        same: The :math:`t_i`, whether each pair is of one kind: booleans ``(n,)``.
        margin: The :math:`m`, positive.

    Returns:
        A scalar.

    Raises:
        TypeError: If ``same`` is not of booleans.
        ValueError: If there are no pairs, the shapes do not fit, or the margin is not positive.

    References:
        | Dimensionality Reduction by Learning an Invariant Mapping (Hadsell, Chopra and LeCun,
          2006)
        | https://doi.org/10.1109/CVPR.2006.100

    Example:
        >>> a, b = torch.zeros(2, 1), torch.tensor([[0.5], [0.25]])
        >>> siamese(a, b, torch.tensor([True, False]))     # (0.5^2 + 0.75^2) / 4
        tensor(0.2031)
    """
    if same.dtype != torch.bool:
        raise TypeError(f"same must be of booleans, got {same.dtype}")
    _check_embeddings(a, b=b)
    _check_rows("same", same, a.shape[:1])
    check_positive(margin=margin)
    apart = (margin - _distance(a, b)).clamp(min=0).square()
    return 0.5 * torch.where(same, _squared_distance(a, b), apart).mean()


def triplet(
    anchor: Tensor,
    positive: Tensor,
    negative: Tensor,
    *,
    margin: float = 1.0,
    squared: bool = True,
) -> Tensor:
    r"""Bring a point of the same kind nearer than one of another kind, by a margin.

    .. math:: \mathcal{L} = \frac{1}{n} \sum_i \max\big(0, \lVert a_i - p_i \rVert^2
        - \lVert a_i - n_i \rVert^2 + m\big)

    Gradients flow into all three, which are embeddings by the same map. Triplets beyond the
    margin count in the mean and add nothing.

    Args:
        anchor: Embeddings :math:`a`, of shape ``(n, D)``.
        positive: Embeddings :math:`p` of the same kind each, ``(n, D)``.
        negative: Embeddings :math:`n` of another kind each, ``(n, D)``.
        margin: The :math:`m`, positive.
        squared: Whether distances are squared, as in the paper, or not, as in torch.

    Returns:
        A scalar.

    Raises:
        ValueError: If there are no points, the shapes differ, or the margin is not positive.

    References:
        | FaceNet: A Unified Embedding for Face Recognition and Clustering (Schroff, Kalenichenko
          and Philbin, 2015)
        | https://arxiv.org/abs/1503.03832

    Example:
        >>> triplet(torch.zeros(1, 2), torch.ones(1, 2), torch.full((1, 2), 2.0), margin=7.0)
        tensor(1.)
    """
    _check_embeddings(anchor, positive=positive, negative=negative)
    check_positive(margin=margin)
    between = _squared_distance if squared else _distance
    excess = between(anchor, positive) - between(anchor, negative) + margin
    return excess.clamp(min=0).mean()


def nca(a: Tensor, labels: Tensor) -> Tensor:
    r"""Make the neighbours of a point, drawn by distance, be of its kind.

    .. math:: \mathcal{L} = 1 - \frac{1}{n} \sum_i \sum_{j : y_j = y_i} p_{ij} , \quad
        p_{ij} = \frac{e^{-\lVert a_i - a_j \rVert^2}}{\sum_{k \neq i}
        e^{-\lVert a_i - a_k \rVert^2}} , \quad p_{ii} = 0

    The expected leave-one-out error of a nearest-neighbour classifier that draws the neighbour.
    The scale of the embeddings is learned too, and says how many neighbours count. A point whose
    kind is far away has hardly a gradient: start at principal components. It takes :math:`n^2`
    distances.

    Args:
        a: Embeddings, of shape ``(n, D)``.
        labels: The kinds :math:`y`, integers of shape ``(n,)``.

    Returns:
        A scalar.

    Raises:
        ValueError: If there are less than two points, or not as many labels.

    References:
        | Neighbourhood Components Analysis (Goldberger, Roweis, Hinton and Salakhutdinov, 2004)
        | https://proceedings.neurips.cc/paper/2004/hash/42fe880812925e520249e808937738d2-Abstract.html

    Example:
        >>> a = torch.tensor([[0.0], [1.0], [2.0]])
        >>> nca(a, torch.tensor([0, 0, 1]))
        tensor(0.5158)
    """
    _check_embeddings(a)
    _check_rows("labels", labels, a.shape[:1])
    if len(a) < 2:
        raise ValueError(f"a must hold at least two points, got {len(a)}")
    # The quick form of cdist loses small distances; this one has the gradient zero at zero.
    distance = torch.cdist(a, a, compute_mode="donot_use_mm_for_euclid_dist")
    p = (-distance.square()).fill_diagonal_(-torch.inf).softmax(1)
    return (p * (labels.unsqueeze(1) != labels)).sum(1).mean()


def barlow_twins(a: Tensor, b: Tensor, *, redundancy: float = 0.005) -> Tensor:
    r"""Make two views agree in each feature, and the features tell different things.

    .. math:: \mathcal{L} = \sum_i (1 - C_{ii})^2 + \lambda \sum_{i \neq j} C_{ij}^2 , \quad
        C = \frac{1}{n} \sum_k \hat a_k \hat b_k^\top

    The features of each view are centred and scaled to variance one over the points, so that C
    holds correlations. There are no negatives. A feature that is constant gives NaN.

    Args:
        a: Embeddings of one view of each point, ``(n, D)``.
        b: Embeddings of another view, ``(n, D)``.
        redundancy: The :math:`\lambda`, by default that of the paper for thousands of features.
            A few features repeat one another unless it is about one.

    Returns:
        A scalar.

    Raises:
        ValueError: If there are no points, or the shapes differ.

    References:
        | Barlow Twins: Self-Supervised Learning via Redundancy Reduction (Zbontar, Jing, Misra,
          LeCun and Deny, 2021)
        | https://arxiv.org/abs/2103.03230

    Example:
        >>> a = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
        >>> barlow_twins(a, a.flip(1), redundancy=1.0)
        tensor(4.)
    """
    _check_embeddings(a, b=b)
    a, b = ((z - z.mean(0)) / z.std(0, correction=0) for z in (a, b))
    c = a.T @ b / len(a)
    diagonal = c.diagonal()
    off = c.square().sum() - diagonal.square().sum()
    return (1.0 - diagonal).square().sum() + redundancy * off


def _check_embeddings(a: Tensor, **others: Tensor) -> None:
    """Refuse no points, what is no rows of numbers, and others of another shape."""
    check_points(a)
    if a.dim() != 2:
        raise ValueError(f"embeddings must have the shape (n, D), got {tuple(a.shape)}")
    for name, other in others.items():
        _check_rows(name, other, a.shape)


def _check_rows(name: str, value: Tensor, shape: tuple[int, ...]) -> None:
    if value.shape != shape:
        raise ValueError(f"{name} must have the shape {tuple(shape)}, got {tuple(value.shape)}")


def _distance(a: Tensor, b: Tensor) -> Tensor:
    """Return distances by rows; where they are zero, so is the gradient."""
    return torch.linalg.vector_norm(a - b, dim=-1)


def _squared_distance(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).square().sum(-1)
