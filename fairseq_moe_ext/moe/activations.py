"""Gated linear units (Shazeer 2020, arXiv 2002.05202): the first linear layer is twice as wide as
the hidden layer, and one half of it gates the other."""

from __future__ import annotations

from typing import Callable, Dict

import torch.nn.functional as F
from torch import Tensor

Activation = Callable[[Tensor], Tensor]


def swiglu(h: Tensor) -> Tensor:
    """(..., 2 F) -> (..., F): silu of the first half times the second."""
    gate, linear = h.chunk(2, dim=-1)
    return F.silu(gate) * linear


def geglu(h: Tensor) -> Tensor:
    """(..., 2 F) -> (..., F): gelu of the first half times the second."""
    gate, linear = h.chunk(2, dim=-1)
    return F.gelu(gate) * linear


GATED: Dict[str, Activation] = {"swiglu": swiglu, "geglu": geglu}


def inner_width(activation: Activation, ffn_dim: int) -> int:
    """Outputs of the linear layer before the activation, for a hidden layer of that width."""
    return 2 * ffn_dim if activation in GATED.values() else ffn_dim
