"""How rows reach their experts, and how the results come back."""

from __future__ import annotations

from typing import Any, List, NamedTuple, Protocol, Tuple

from torch import Tensor, nn


class Arrival(NamedTuple):
    """Rows as `send` left them."""

    counts: List[int]  # of each of this process's experts
    way: Any = None  # what `send_back` needs


class Exchange(Protocol):
    """What a layer needs of an exchange. Every process joins every call, even without rows."""

    def held(self, num_experts: int) -> range:
        """The experts that this process holds."""

    def send(self, x: Tensor, counts: List[int]) -> Tuple[Tensor, Arrival]:
        """Send rows to the processes that hold their experts.

        Args:
            x: (N, D), in the order of all experts.
            counts: rows of each of the E experts, summing to N.

        Returns:
            rows (N', D) in the order of this process's experts, each expert's in the order of the
            ranks that they come from; and what `send_back` needs.
        """

    def compute(self, experts: nn.Module, x: Tensor, counts: List[int]) -> Tensor:
        """experts(x, counts) for the rows that `send` brought. The experts' gradients are the sum
        over the rows of all processes."""

    def send_back(self, y: Tensor, arrival: Arrival) -> Tensor:
        """Rows (N', D) that `send` brought here -> the rows (N, D) that it sent, in that order."""


class Here:
    """The exchange of one process, which holds all experts."""

    def held(self, num_experts: int) -> range:
        return range(num_experts)

    def send(self, x: Tensor, counts: List[int]) -> Tuple[Tensor, Arrival]:
        return x, Arrival(counts)

    def compute(self, experts: nn.Module, x: Tensor, counts: List[int]) -> Tensor:
        return experts(x, counts)

    def send_back(self, y: Tensor, arrival: Arrival) -> Tensor:
        return y


HERE = Here()
