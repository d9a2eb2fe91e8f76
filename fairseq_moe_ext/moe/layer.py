"""The Mixture-of-Experts layer: route, dispatch, exchange, compute, exchange back, combine."""

from __future__ import annotations

from typing import Dict, NamedTuple, Optional

from torch import Tensor, nn

from ..expert_parallel import ExpertParallel
from .balance import balance_loss, z_loss
from .dispatch import lay_out, permute, unpermute
from .experts import Experts
from .gate import Gate, GateSettings
from .pool import PROCESS, Pool
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
        self,
        dim: int,
        ffn_dim: int,
        num_experts: int,
        settings: GateSettings,
        parallel: Optional[ExpertParallel] = None,
        pool: Pool = PROCESS,
        **expert_options,
    ) -> None:
        """
        Args:
            parallel: the processes that share the experts; None: all are here.
            pool: the processes whose tokens are routed together.
            expert_options: go to `Experts`.
        """
        super().__init__()
        self.gate = Gate(dim, num_experts, settings, pool)
        self.parallel = parallel
        self.pool = pool
        local, first = num_experts, 0
        if parallel is not None:
            local, first = parallel.place.local, parallel.place.first
        self.experts = Experts(local, dim, ffn_dim, first=first, **expert_options)
        if parallel is not None:
            parallel.join_gradients(self.experts)

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
        capacity = None if dropless else self.gate.capacity(len(tokens), padding_mask)
        logits, routing = self.gate(tokens, capacity, padding_mask)
        rows = lay_out(routing)
        y = permute(tokens, rows)  # (N, D)
        if self.parallel is None:
            y = self.experts(y, rows.counts)
        else:
            y, arrival = self.parallel.send(y, rows.counts)  # (N', D)
            y = self.parallel.send_back(self.experts(y, arrival.counts), arrival)  # (N, D)
        out = unpermute(y, routing.weights.to(y.dtype), rows)  # (T, D)
        return MoEOutput(
            out.view_as(x),
            balance_loss(routing, self.pool),
            z_loss(logits, routing.counted, self.pool),
            routing_stats(routing, self.pool),
            routing.counts,
        )
