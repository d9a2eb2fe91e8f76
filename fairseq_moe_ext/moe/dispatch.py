"""Copy tokens to rows in expert order, and sum them back, by index.

A row is a kept choice, or spare: N rows, expert 0's first or in chunks of experts, each expert's in
slot order. Moving a token is one read and one write of its D numbers; there is no tensor over
tokens x experts x slots.
"""

from __future__ import annotations

from typing import Any, Callable, List, NamedTuple, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.chunks import Chunk, first_rows, rows_of_each
from ..kernels.first_order import once_differentiable
from .routing import Routing


class Rows(NamedTuple):
    """Where the choices of T tokens are among the N rows. K is the routing's, or less if no token
    has that many choices."""

    row: Tensor  # (T, K) int64: the row of a kept choice; of a dropped one, the token's first, or 0
    kept: Tensor  # (T, K) bool
    idle: Optional[Tensor]  # (T, 1) bool: tokens without a row; None: all choices are kept
    token: Tensor  # (N,) int64: the token of a row; of a spare row, the first
    counts: List[int]  # rows of each expert, spare ones too, summing to N
    chunks: Optional[List[Chunk]]  # where the experts' rows are; None: in expert order


def lay_out(routing: Routing, chunked: Optional[Callable[[List[int]], List[Chunk]]] = None) -> Rows:
    """Lay the kept choices out in expert order; or, on a CPU, in the chunks that `chunked` makes of
    the experts' numbers of rows, with spare rows whose results go nowhere."""
    tokens, k = routing.experts.shape
    # Kept choices occupy the first slots of their expert, without gaps.
    counts = torch.zeros_like(routing.counts[0])  # (E,)
    counts.scatter_add_(0, routing.experts.reshape(-1), routing.kept.reshape(-1).to(counts.dtype))
    wanted = [counts]
    if routing.variable_width:  # most tokens take few of their K choices
        used = routing.kept.any(dim=0) * torch.arange(1, k + 1, device=counts.device)  # (K,)
        wanted.append(used.amax(dim=0, keepdim=True))
    rows_of = torch.cat(wanted).tolist()  # the only wait for a GPU here
    widest = max(1, rows_of.pop()) if len(wanted) > 1 else k
    dropped = sum(rows_of) < tokens * widest
    first, chunks = counts.cumsum(0) - counts, None
    if chunked is not None:
        chunks = chunked(rows_of)
        first, rows_of = first_rows(chunks, len(counts)), rows_of_each(chunks, len(counts))
    row = first[routing.experts] + routing.local_slots
    behind = sum(rows_of)  # dropped choices write here
    token = row.new_zeros(behind + 1)
    index = torch.arange(tokens, device=row.device).unsqueeze(1).expand(tokens, k)
    token.scatter_(0, row.where(routing.kept, behind).reshape(-1), index.reshape(-1))
    row, kept = row[:, :widest], routing.kept[:, :widest]
    idle = None
    if dropped:  # of no other token's row: it is multiplied by 0, but may be infinite
        idle = ~kept.any(dim=1, keepdim=True)
        own = row.gather(1, kept.to(torch.int8).argmax(dim=1, keepdim=True)).masked_fill(idle, 0)
        row = row.where(kept, own)
    return Rows(row, kept, idle, token[:behind], rows_of, chunks)


def permute(x: Tensor, rows: Rows) -> Tensor:
    """Copy each token to its rows: x (T, D) -> (N, D)."""
    return _Permute.apply(x, rows)


def unpermute(y: Tensor, weights: Tensor, rows: Rows) -> Tensor:
    """Sum each token's rows by weight: y (N, D), weights (T, K) -> (T, D).

    A token without rows gets zeros; only the residual connection carries it on."""
    return _Unpermute.apply(y, weights[:, : rows.row.size(1)], rows)


def _weighted_sum(y: Tensor, weights: Tensor, row: Tensor, idle: Optional[Tensor]) -> Tensor:
    """sum_k weights[:, k] * y[row[:, k]]: (N, D), (T, K), (T, K) -> (T, D); idle tokens get 0."""
    if y.size(0) == 0:  # every choice was dropped
        return y.new_zeros(row.size(0), y.size(1))
    out = F.embedding_bag(row, y, mode="sum", per_sample_weights=weights)
    return out if idle is None else out.masked_fill_(idle, 0)


class _Permute(torch.autograd.Function):
    # Autograd's backward pass of index_select adds row by row; gathering is faster and, on a GPU,
    # deterministic.
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Rows) -> Tensor:
        ctx.save_for_backward(rows.row, rows.kept, rows.idle)
        return x.index_select(0, rows.token)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tuple[Tensor, None]:
        row, kept, idle = ctx.saved_tensors
        return _weighted_sum(grad, kept.to(grad.dtype), row, idle), None


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, weights: Tensor, rows: Rows) -> Tensor:
        ctx.save_for_backward(y, weights, rows.row, rows.kept, rows.token)
        return _weighted_sum(y, weights, rows.row, rows.idle)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tuple[Optional[Tensor], ...]:
        y, weights, row, kept, token = ctx.saved_tensors
        grad_weights = None
        grad_y = grad.index_select(0, token)  # (N, D)
        if ctx.needs_input_grad[1]:
            grad_weights = torch.zeros_like(weights)
            if y.size(0) > 0:
                grad_weights = (y * grad_y).sum(dim=1)[row].where(kept, 0)
        # Scatter instead of a mask, whose size a GPU would have to be waited for.
        behind = token.numel()  # dropped choices write here
        weight = weights.new_zeros(behind + 1)
        weight.scatter_(0, row.where(kept, behind).reshape(-1), weights.reshape(-1))
        grad_y.mul_(weight[:behind].unsqueeze(1))
        return grad_y, grad_weights, None
