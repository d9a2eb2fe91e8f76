"""The precision of what float16 and bfloat16 are too coarse for."""

import torch
from torch import Tensor


def at_least_float32(x: Tensor) -> torch.dtype:
    """float32, or float64 if the tensor is."""
    return torch.promote_types(x.dtype, torch.float32)
