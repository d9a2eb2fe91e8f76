"""Dropout on a CPU, where drawing the random numbers costs more than all the rest of it.

PyTorch draws a number of 32 bits or more for each element, on one thread. Sixteen bits decide as
well: here four elements share a number of 64.
"""

import math
from typing import Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

_VALUES = 2**16


def dropout(x: Tensor, p: float, training: bool = True) -> Tensor:
    """As F.dropout; on a CPU p is rounded to a multiple of 1 / 65536."""
    if not training:
        return x
    return x * mask(x, p) if _ours(x, p) else F.dropout(x, p)


def add_dropout(x: Tensor, y: Tensor, p: float, training: bool = True) -> Tensor:
    """x + dropout(y), of one shape."""
    if not training:
        return x + y
    if _ours(y, p):
        return torch.addcmul(x, y, mask(y, p))
    return x + F.dropout(y, p)


def mask(x: Tensor, p: float) -> Tensor:
    """Like x: 0 with probability p, else the factor that keeps the mean."""
    if x.device.type != "cpu" or round(p * _VALUES) in (0, _VALUES):
        return F.dropout(torch.ones_like(x), p)
    kept, factor = keep(x.shape, p)
    return kept.to(x.dtype).mul_(factor)


def keep(shape: Sequence[int], p: float) -> Tuple[Tensor, float]:
    """Bool of this shape, on the CPU, False with probability p; and the factor that keeps the mean
    (1 if nothing is kept)."""
    drop, number = round(p * _VALUES), math.prod(shape)
    if drop == _VALUES:
        return torch.zeros(*shape, dtype=torch.bool), 1.0
    bits = torch.empty(-(-number // 4), dtype=torch.int64).random_(-(2**63), None)
    drawn = bits.view(torch.int16)[:number].view(*shape)
    return drawn.ge(drop - _VALUES // 2), _VALUES / (_VALUES - drop)


def _ours(x: Tensor, p: float) -> bool:
    return p > 0 and x.device.type == "cpu"
