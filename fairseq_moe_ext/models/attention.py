"""Causal self-attention with the parameter names of fairseq's MultiheadAttention."""

import math
from typing import Callable, Dict, Iterable, Optional

import torch
import torch.nn.functional as F
from fairseq.incremental_decoding_utils import with_incremental_state
from torch import Tensor, nn

from ..kernels.causal_attention import causal_attention, serves
from ..kernels.matmul import Linear, linear

IncrementalState = Dict[str, Dict[str, Optional[Tensor]]]


@with_incremental_state
class CausalSelfAttention(nn.Module):
    """Multi-head attention of each position to itself and earlier ones."""

    # with_incremental_state adds these.
    get_incremental_state: Callable[[IncrementalState, str], Optional[Dict[str, Tensor]]]
    set_incremental_state: Callable[[IncrementalState, str, Dict[str, Tensor]], IncrementalState]

    def __init__(self, dim: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.k_proj = Linear(dim, dim)
        self.v_proj = Linear(dim, dim)
        self.q_proj = Linear(dim, dim)
        self.out_proj = Linear(dim, dim)
        # fairseq/modules/multihead_attention.py:167@0.12.2
        for proj in (self.k_proj, self.v_proj, self.q_proj):
            nn.init.xavier_uniform_(proj.weight, gain=1 / math.sqrt(2))
        nn.init.xavier_uniform_(self.out_proj.weight)
        nn.init.constant_(self.out_proj.bias, 0.0)

    def forward(
        self,
        x: Tensor,
        mask: Optional[Tensor] = None,
        incremental_state: Optional[IncrementalState] = None,
    ) -> Tensor:
        """
        Args:
            x: (B, S, D); with incremental_state only the positions that it does not hold yet.
            mask: None, or bool, True where a query may look, broadcast to (B, H, S, keys), and then
                causal by itself: for batches with padding on the left, and for several positions
                after earlier ones.
            incremental_state: keys and values of earlier positions; this call adds its own.
        """
        q, k, v = (self._split(part) for part in self._project(x))
        past = None
        if incremental_state is not None:
            past = self.get_incremental_state(incremental_state, "kv")
            if past is not None:
                k = torch.cat([past["k"], k], dim=2)
                v = torch.cat([past["v"], v], dim=2)
            self.set_incremental_state(incremental_state, "kv", {"k": k, "v": v})
        causal = mask is None and past is None
        dropout = self.dropout if self.training else 0.0
        if x.size(0) == 0:  # refused by flash attention before PyTorch 2.10
            out = q + (k + v)[:, :, : q.size(2)]
        elif causal and serves(q, dropout):
            out = causal_attention(q, k, v, dropout)
        else:
            out = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal
            )  # (B, H, S, D / H)
        return self.out_proj(out.transpose(1, 2).reshape(x.shape))

    def _project(self, x: Tensor) -> Iterable[Tensor]:
        """(..., D) -> queries, keys and values, (..., D) each."""
        projections = (self.q_proj, self.k_proj, self.v_proj)
        if x.device.type != "cpu" or not torch.is_grad_enabled():
            return [proj(x) for proj in projections]
        # One product of three: narrow ones gain by it. The backward pass keeps the joined weights,
        # which would take gigabytes of the large models that GPUs train; and to join them for each
        # generated token would take longer than the product.
        weight = torch.cat([proj.weight for proj in projections])  # (3 D, D)
        bias = torch.cat([proj.bias for proj in projections])
        return linear(x, weight, bias).chunk(3, dim=-1)

    def known(self, incremental_state: Optional[IncrementalState]) -> int:
        """The number of positions in an incremental state."""
        if incremental_state is None:
            return 0
        past = self.get_incremental_state(incremental_state, "kv")
        return 0 if past is None else past["k"].size(2)

    def _split(self, x: Tensor) -> Tensor:
        """(B, S, D) -> (B, H, S, D / H), a view."""
        return x.view(*x.shape[:2], self.heads, x.size(2) // self.heads).transpose(1, 2)

    def reorder_incremental_state(
        self, incremental_state: IncrementalState, new_order: Tensor
    ) -> IncrementalState:
        """Follow beam search as it reorders and drops sequences; new_order (B',) int64."""
        past = self.get_incremental_state(incremental_state, "kv")
        if past is not None:
            past = {name: cached.index_select(0, new_order) for name, cached in past.items()}
            self.set_incremental_state(incremental_state, "kv", past)
        return incremental_state
