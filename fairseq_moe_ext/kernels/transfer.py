"""Numbers from the CPU to where a kernel runs."""

from __future__ import annotations

from typing import Sequence

import torch
from torch import Tensor


def to_device(numbers: Sequence[int], device: torch.device) -> Tensor:
    """numbers -> (N,) int64 on the device. A copy from pinned memory is queued on a GPU; one from
    ordinary memory would make the CPU wait for all work queued before."""
    here = torch.tensor(numbers, dtype=torch.int64, pin_memory=device.type == "cuda")
    return here.to(device, non_blocking=True)
