"""Hash layers: a token's id alone selects its experts (Roller et al., arXiv 2106.04426)."""

from __future__ import annotations

import heapq
from typing import List, Optional, Sequence, Tuple

import torch
from torch import Tensor

from ..router import TopKRouter, register_router
from ..routing import Routing, counted_tokens, not_padding, send


def balanced_table(counts: Sequence[int], num_experts: int, k: int) -> List[List[int]]:
    """Experts of each token id, (V, K). From the most frequent id to the least, each takes the k
    experts with the least load so far (the paper's balanced assignment); of equally loaded experts
    the one with the lower number.

    With k > 1 each load grows by up to 1 % more than the id's count, at random: the k experts of an
    id would otherwise stay equal for ever, and act as one of k times the width."""
    table: List[List[int]] = [[] for _ in counts]
    loads: List[Tuple[float, int]] = [(0, expert) for expert in range(num_experts)]
    drawn = _drawn(len(counts), k)
    for token in sorted(range(len(counts)), key=lambda t: (-counts[t], t)):
        taken = [heapq.heappop(loads) for _ in range(k)]
        table[token] = [expert for _, expert in taken]
        for (load, expert), part in zip(taken, drawn[token]):
            more = 1 if k == 1 else 1 + 0.01 * part
            heapq.heappush(loads, (load + max(counts[token], 1) * more, expert))
    return table


def _drawn(vocabulary: int, k: int) -> List[List[float]]:
    """Numbers between 0 and 1, (V, K), always the same."""
    generator = torch.Generator("cpu").manual_seed(0)
    size = (vocabulary, k)
    return torch.rand(size, generator=generator, device="cpu", dtype=torch.float32).tolist()


def plain_table(vocabulary: int, num_experts: int, k: int) -> List[List[int]]:
    """Experts of each token id, (V, K), by Fibonacci hashing, for unknown frequencies; with a
    multiplier of its own for each of k. An expert that an id has already gives way to the next."""
    table: List[List[int]] = [[] for _ in range(vocabulary)]
    for i in range(k):
        factor = 2654435769 ** (i + 1)
        for token, taken in enumerate(table):
            expert = (token * factor % 2**32) * num_experts >> 32
            while expert in taken:
                expert = (expert + 1) % num_experts
            taken.append(expert)
    return table


@register_router("hash")
class HashRouter(TopKRouter):
    """Each of a token's top_k experts has the weight 1 / top_k. Nothing is learned, so losses
    on the gate have no gradient. Checkpoints save the table."""

    heeds = frozenset(["route_scale"])
    learned = False
    table: Tensor

    def add_gate(self) -> None:
        """No gate: there are no logits."""
        self.register_buffer("table", torch.zeros(0, self.settings.top_k, dtype=torch.long))

    def expert_vectors(self) -> Tensor:
        return torch.zeros(self.num_experts, self.dim, device=self.table.device)

    def set_token_counts(self, counts: Sequence[int]) -> None:
        known = len(set(counts)) > 1
        size = self.num_experts, self.settings.top_k
        table = balanced_table(counts, *size) if known else plain_table(len(counts), *size)
        self.table = torch.tensor(table, dtype=torch.long, device=self.table.device)

    def logits(self, x: Tensor) -> Tensor:
        """Zeros (T, E)."""
        return x.new_zeros(len(x), self.num_experts)

    def route_tokens(
        self,
        logits: Tensor,
        capacity: Optional[int],
        padding_mask: Optional[Tensor],
        token_ids: Optional[Tensor],
    ) -> Routing:
        """Raises ValueError without token_ids."""
        if token_ids is None:
            raise ValueError("the router hash needs token_ids")
        s = self.settings
        experts = self.table[token_ids]  # (T, K)
        weights = torch.full_like(logits[:, : s.top_k], 1 / s.top_k)
        return send(
            torch.zeros_like(logits).scatter(1, experts, weights),
            experts,
            weights,
            not_padding(experts, padding_mask),
            scale=s.route_scale,
            capacity=capacity,
            counted=counted_tokens(padding_mask, s.count_padding),
            scope=self.scope,
        )
