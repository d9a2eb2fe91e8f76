"""The tokens that a gate looks at together."""

from __future__ import annotations

from typing import Tuple

import torch
from torch import Tensor


class Pool:
    """The tokens over which capacity, balancing loss and figures are taken: those of one process.

    expert_parallel.WorldPool is the same over those of all processes.
    """

    def tokens(self, here: int) -> int:
        """Tokens of the pool, of which `here` are this process's."""
        return here

    def total(self, x: Tensor) -> Tensor:
        """Sum over the pool's processes, differentiable; x of any shape, the same everywhere."""
        return x

    def ranks(self, counts: Tensor) -> Tuple[Tensor, Tensor]:
        """Sums of counts over the processes before this one, and over all."""
        return torch.zeros_like(counts), counts


PROCESS = Pool()
