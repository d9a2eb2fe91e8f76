"""The parameters of many experts, and what the hand-written ways to compute them share."""

from typing import Callable, NamedTuple, Optional, Sequence, Union

import torch
from torch import Tensor

Stack = Union[Tensor, Sequence[Tensor]]


class Weights(NamedTuple):
    """Of E experts; stacked, or a sequence of each expert's, in any precision and place."""

    w1: Stack  # (E, F, D); (E, 2 F, D) with a gated activation
    b1: Stack  # (E, F), or (E, 2 F)
    w2: Stack  # (E, D, F)
    b2: Stack  # (E, D)


def activated(activation: Callable[[Tensor], Tensor], h: Tensor, mask: Optional[Tensor]) -> Tensor:
    """h (..., F), or (..., 2 F) for a gated activation, and mask (..., F) -> (..., F)"""
    h = activation(h)
    return h if mask is None else h * mask


def write_gradients(w: Tensor, b: Tensor, grad: Tensor, given: Tensor, scale: float) -> None:
    """Of one expert's linear layer, scaled, in the weights' precision, while the products are in
    the cache: w (M, K), b (M,), grad (n, M), given (n, K)."""
    if w.dtype == given.dtype:
        torch.addmm(w, grad.t(), given, beta=0, alpha=scale, out=w)  # w is not read
    else:
        w.copy_(torch.mm(grad.t(), given))
        if scale != 1:
            w.mul_(scale)
    torch.sum(grad, dim=0, dtype=b.dtype, out=b)
    if scale != 1:
        b.mul_(scale)
