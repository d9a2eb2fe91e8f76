"""The Mixture-of-Experts layer: route, dispatch, compute, combine."""

from __future__ import annotations

from typing import Dict, NamedTuple, Optional

from torch import Tensor, nn

from .balance import balance_loss, z_loss
from .dispatch import lay_out, permute, unpermute
from .experts import Experts
from .gate import Gate, GateSettings
from .stats import routing_stats


class MoEOutput(NamedTuple):
    """All that a layer yields. Losses are outputs, not attributes: activation checkpointing runs
    `forward` twice, and a loss kept aside would have no gradient."""

    out: Tensor  # as the input
    balance_loss: Tensor  # (), differentiable
    z_loss: Tensor  # (), differentiable
    stats: Dict[str, Tensor]  # see stats.py
    expert_counts: Tensor  # (K, E) int64: choices routed to each expert, before dropping


class MoELayer(nn.Module):
    """A feed-forward layer of which each token uses only the experts that its gate chooses."""

    def __init__(
        self, dim: int, ffn_dim: int, num_experts: int, settings: GateSettings, **expert_options
    ) -> None:
        """expert_options go to `Experts`."""
        super().__init__()
        self.gate = Gate(dim, num_experts, settings)
        self.experts = Experts(num_experts, dim, ffn_dim, **expert_options)

    def forward(
        self, x: Tensor, padding_mask: Optional[Tensor] = None, dropless: bool = False
    ) -> MoEOutput:
        """
        Args:
            x: (..., D).
            padding_mask: (...) bool, True where x is padding and is to be routed nowhere.
            dropless: set the capacity aside for this call.
        """
        tokens = x.reshape(-1, x.size(-1))  # (T, D)
        if padding_mask is not None:
            padding_mask = padding_mask.reshape(-1)
        capacity = None if dropless else self.gate.capacity(tokens.size(0))
        logits, routing = self.gate(tokens, capacity, padding_mask)
        rows = lay_out(routing, capacity)
        y = self.experts(permute(tokens, rows), rows.counts)  # (N, D)
        out = unpermute(y, routing.weights.to(y.dtype), rows)  # (T, D)
        return MoEOutput(
            out.view_as(x),
            balance_loss(routing),
            z_loss(logits),
            routing_stats(routing),
            routing.counts,
        )
