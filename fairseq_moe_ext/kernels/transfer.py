"""Numbers from the CPU to where a kernel runs."""

from __future__ import annotations

from typing import Sequence

import torch
from torch import Tensor


def to_device(numbers: Sequence[int], device: torch.device) -> Tensor:
    """(N,) int64. On a GPU the copy joins the queue of its work; that of ordinary memory would wait
    until the queue is empty."""
    here = torch.tensor(numbers, dtype=torch.int64, pin_memory=device.type == "cuda")
    return here.to(device, non_blocking=True)
