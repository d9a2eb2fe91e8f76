"""The activation of feed-forward networks and experts, by the name that --activation-fn takes."""

from __future__ import annotations

from typing import Callable

import torch
import torch.nn.functional as F
from fairseq import modules, utils
from torch import Tensor

from ..moe.activations import GATED


def activation_named(name: str) -> Callable[[Tensor], Tensor]:
    """Ours, or else stock's. Raises RuntimeError for a name that stock does not know."""
    return {**GATED, "gelu": gelu}.get(name) or utils.get_activation_fn(name)


def gelu(x: Tensor) -> Tensor:
    """Stock's (fairseq/modules/gelu.py:25@0.12.2) without its copies in float32, in which PyTorch's
    computes anyway; float64 is rounded to float32, as there."""
    return modules.gelu(x) if x.dtype == torch.float64 else F.gelu(x)
