"""The parameters of many experts."""

from __future__ import annotations

from typing import Any, NamedTuple, Sequence, Tuple, Union

import torch
from torch import Tensor

from .transfer import to_device

Stack = Union[Tensor, Sequence[Tensor]]


class Weights(NamedTuple):
    """Of E experts; stacked, or a sequence of each expert's, in any precision and place."""

    w1: Stack  # (E, F, D); (E, 2 F, D) with a gated activation
    b1: Stack  # (E, F), or (E, 2 F)
    w2: Stack  # (E, D, F)
    b2: Stack  # (E, D)


def set_to_zero(x: Tensor, experts: Sequence[int]) -> None:
    """Of x (E, ...), the numbers of these experts, in place. (x[experts] = 0 makes the CPU wait for
    a GPU.)"""
    if experts:
        x.index_fill_(0, to_device(experts, x.device), 0)


def scale_gradient(x: Tensor, scale: float, unused: Sequence[int] = ()) -> Tensor:
    """x (E, ...), whose gradient is multiplied by scale, and set to 0 for the unused experts. Name
    these only where nothing else reads that gradient: it may be written in place."""
    return _ScaleGradient.apply(x, scale, unused)


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float, unused: Sequence[int]) -> Tensor:
        ctx.scale, ctx.unused = scale, unused
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tuple[Tensor, None, None]:
        if ctx.scale != 1:  # otherwise a copy of all experts' gradients
            grad = grad * ctx.scale
        set_to_zero(grad, ctx.unused)
        return grad, None, None
