"""Which tokens are routed together (--moe-routing-scope)."""

from __future__ import annotations

from typing import Tuple

import torch
from torch import Tensor


class RoutingScope:
    """The tokens over which capacity, balancing loss and metrics are taken: those of one process.

    expert_parallel.WorldScope takes those of all processes.
    """

    def tokens(self, here: int) -> int:
        """The number of tokens in scope, given the number on this process."""
        return here

    def total(self, x: Tensor) -> Tensor:
        """Sum over the processes in scope, differentiable; x has the same shape on each."""
        return x

    def gather(self, x: Tensor) -> Tuple[Tensor, slice]:
        """Rows x (T, ...) of all processes in scope, and where this one's are among them; not
        differentiable. The number of rows may differ."""
        return x, slice(0, len(x))

    def before_and_total(self, counts: Tensor) -> Tuple[Tensor, Tensor]:
        """Sums of counts over the processes of lower rank, and over all in scope."""
        return torch.zeros_like(counts), counts


PROCESS = RoutingScope()
