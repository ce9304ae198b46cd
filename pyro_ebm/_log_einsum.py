"""Sums of products in logs, without underflow: what contracts Pyro's factors in place of its own.

Pyro's ``pyro.ops.einsum.torch_log`` scales each factor by its own maximum and multiplies the
exponentials, which are all zero where factors contradict each other by more than 87 nats in
float32. Here the logs are added before their maximum is taken.
"""

from __future__ import annotations

import torch
from pyro.ops.einsum.util import Tensordot
from torch import Tensor


def transpose(a: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Permute dimensions, as a backend of opt_einsum."""
    return a.permute(axes)


def einsum(equation: str, *operands: Tensor) -> Tensor:
    """Add logs of factors, and sum over the dimensions that the output lacks, in logs."""
    inputs, output = equation.split("->")
    summed = sorted(set(inputs) - set(output) - {","})
    order = [*output, *summed]
    pairs = zip(inputs.split(","), operands, strict=True)
    aligned = [_align(operand, dims, order) for dims, operand in pairs]
    total = sum(aligned[1:], aligned[0].clone())
    if not summed:
        return total
    dims = list(range(len(output), len(order)))
    shift = total.detach().amax(dims, keepdim=True)
    shift = shift.clamp(min=torch.finfo(shift.dtype).min)  # no NaN from -inf - -inf
    share = (total - shift).exp().sum(dims)
    none = share == 0  # whose log has no gradient
    return torch.where(none, -torch.inf, torch.where(none, 1.0, share).log() + shift.squeeze(dims))


def _align(operand: Tensor, dims: str, order: list[str]) -> Tensor:
    """Return a factor with its dimensions in their order, and of one where it has none."""
    turned = operand.permute([dims.index(dim) for dim in order if dim in dims])
    sizes = iter(turned.shape)
    return turned.reshape([next(sizes) if dim in dims else 1 for dim in order])


tensordot = Tensordot(einsum)
