"""The precision of what float16 and bfloat16 are too coarse for, and that of torch.autocast."""

import contextlib
from typing import ContextManager, Optional

import torch
from torch import Tensor


def at_least_float32(x: Tensor) -> torch.dtype:
    """float32, or float64 if the tensor is."""
    return torch.promote_types(x.dtype, torch.float32)


def autocast_dtype(x: Tensor) -> Optional[torch.dtype]:
    """The precision that torch.autocast asks for x; None where it is off, and for float64, which it
    leaves alone."""
    device = x.device.type
    if device not in ("cpu", "cuda") or x.dtype == torch.float64:
        return None
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def without_autocast(x: Tensor) -> ContextManager[object]:
    """Within, products of x have the precision that they are called with."""
    if autocast_dtype(x) is None:
        return contextlib.nullcontext()
    return torch.autocast(x.device.type, enabled=False)
