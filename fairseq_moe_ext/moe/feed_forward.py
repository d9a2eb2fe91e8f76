"""Linear, activation, linear, each row through the expert that it belongs to.

Two ways, with the same numbers: expert by expert, and by PyTorch's grouped matrix products.
"""

from __future__ import annotations

from typing import Callable, List, NamedTuple, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .side_by_side import for_each_expert


class Weights(NamedTuple):
    """Of E experts; stacked, or a sequence of each expert's, in any precision and place."""

    w1: Sequence[Tensor]  # (E, F, D)
    b1: Sequence[Tensor]  # (E, F)
    w2: Sequence[Tensor]  # (E, D, F)
    b2: Sequence[Tensor]  # (E, D)


def by_expert(
    x: Tensor,
    counts: List[int],
    weights: Weights,
    activation: Callable[[Tensor], Tensor],
    mask: Optional[Tensor] = None,
    grad_scale: float = 1.0,
) -> Tensor:
    """
    Args:
        x: (N, D) in expert order, counts[e] rows of expert e.
        activation: elementwise.
        mask: (N, F), a factor on what the activation yields, for dropout.
        grad_scale: factor on the gradients of the weights, not on x's.

    Returns:
        (N, D)
    """
    if not isinstance(weights.w1, Tensor):
        return _compute(x, counts, weights, activation, mask, None)
    # Under FSDP with --fp16 experts stay in float32, as their optimizer wants them.
    same = (each.to(x.dtype) for each in weights)
    return _ByExpert.apply(x, *same, mask, counts, activation, grad_scale)


def grouped(
    x: Tensor,
    counts: List[int],
    weights: Weights,
    activation: Callable[[Tensor], Tensor],
    mask: Optional[Tensor] = None,
    grad_scale: float = 1.0,
) -> Tensor:
    """As by_expert, in few kernels whatever the number of experts."""
    w1, b1, w2, b2 = (_ScaleGradient.apply(each.to(x.dtype), grad_scale) for each in weights)
    rows = torch.tensor(counts, device=x.device)
    ends = rows.cumsum(0, dtype=torch.int32)
    expert = torch.arange(len(counts), device=x.device)
    expert = expert.repeat_interleave(rows, output_size=x.size(0))  # (N,)
    hidden = activation(F.grouped_mm(x, w1.mT, offs=ends) + b1[expert])  # (N, F)
    if mask is not None:
        hidden = hidden * mask
    return F.grouped_mm(hidden, w2.mT, offs=ends) + b2[expert]


def grouped_serves(x: Tensor, weights: Weights) -> bool:
    """Whether grouped products have a kernel of their own for these: bfloat16 on a GPU, rows of a
    multiple of 16 bytes."""
    return (
        x.is_cuda
        and x.dtype == torch.bfloat16
        and hasattr(F, "grouped_mm")
        and isinstance(weights.w1, Tensor)
        and x.size(0) > 0
        and all(size % 8 == 0 for size in weights.w1.shape[1:])
    )


def _compute(
    x: Tensor,
    counts: List[int],
    weights: Weights,
    activation: Callable[[Tensor], Tensor],
    mask: Optional[Tensor],
    hidden: Optional[Tensor],
) -> Tensor:
    """-> (N, D); hidden (N, F), where given, gets what the activation is applied to."""
    w1, b1, w2, b2 = weights
    out = x.new_empty(x.size(0), len(b2[0]))
    x_of, out_of = x.split(counts), out.split(counts)
    hidden_of = None if hidden is None else hidden.split(counts)
    mask_of = None if mask is None else mask.split(counts)

    def compute(e: int) -> None:
        if counts[e] == 0:
            return
        room = None if hidden_of is None else hidden_of[e]
        h = torch.addmm(b1[e].to(x), x_of[e], w1[e].to(x).t(), out=room)
        h = _activated(activation, h, mask_of, e)
        torch.addmm(b2[e].to(x), h, w2[e].to(x).t(), out=out_of[e])

    for_each_expert(compute, counts, 2 * w1[0].numel(), x.device.type == "cpu")
    return out


def _activated(
    activation: Callable[[Tensor], Tensor], h: Tensor, mask_of: Optional[Sequence[Tensor]], e: int
) -> Tensor:
    h = activation(h)
    return h if mask_of is None else h * mask_of[e]


class _ByExpert(torch.autograd.Function):
    # An expert's weights are read once each way, its hidden numbers are used while the processor
    # still has them at hand, and its gradients are written into place: under autograd each w1[e]
    # would make a gradient of all experts' size. The activation is computed anew in the backward
    # pass, which costs less than to keep it.
    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        w1: Tensor,
        b1: Tensor,
        w2: Tensor,
        b2: Tensor,
        mask: Optional[Tensor],
        counts: List[int],
        activation: Callable[[Tensor], Tensor],
        grad_scale: float,
    ) -> Tensor:
        hidden = x.new_empty(x.size(0), w1.size(1)) if any(ctx.needs_input_grad) else None
        out = _compute(x, counts, Weights(w1, b1, w2, b2), activation, mask, hidden)
        ctx.save_for_backward(x, w1, w2, mask, hidden)
        ctx.counts, ctx.activation, ctx.grad_scale = counts, activation, grad_scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> Tuple[Optional[Tensor], ...]:
        x, w1, w2, mask, hidden = ctx.saved_tensors
        counts, scale = ctx.counts, ctx.grad_scale
        for_x, for_weights = ctx.needs_input_grad[0], any(ctx.needs_input_grad[1:5])
        grad_x = torch.empty_like(x) if for_x else None
        grad_w1 = grad_b1 = grad_w2 = grad_b2 = None
        if for_weights:
            grad_w1, grad_w2 = torch.empty_like(w1), torch.empty_like(w2)
            grad_b1, grad_b2 = w1.new_empty(w1.shape[:2]), w2.new_empty(w2.shape[:2])
        grad_of, x_of, hidden_of = grad.split(counts), x.split(counts), hidden.split(counts)
        grad_x_of = None if grad_x is None else grad_x.split(counts)
        mask_of = None if mask is None else mask.split(counts)

        def compute(e: int) -> None:
            if counts[e] == 0:
                if for_weights:
                    for each in (grad_w1, grad_b1, grad_w2, grad_b2):
                        each[e].zero_()
                return
            with torch.enable_grad():
                before = hidden_of[e].detach().requires_grad_()
                after = _activated(ctx.activation, before, mask_of, e)
            if for_weights:
                write_gradients(grad_of[e], after.detach(), grad_w2[e], grad_b2[e])
            (grad_h,) = torch.autograd.grad(after, before, grad_of[e] @ w2[e])
            if for_weights:
                write_gradients(grad_h, x_of[e], grad_w1[e], grad_b1[e])
            if grad_x_of is not None:
                torch.mm(grad_h, w1[e], out=grad_x_of[e])

        def write_gradients(grad_out: Tensor, given: Tensor, w: Tensor, b: Tensor) -> None:
            torch.addmm(w, grad_out.t(), given, beta=0, alpha=scale, out=w)
            torch.sum(grad_out, dim=0, out=b)

        for_each_expert(compute, counts, 4 * w1[0].numel(), x.device.type == "cpu")
        if for_weights:
            grad_b1.mul_(scale)
            grad_b2.mul_(scale)
        return grad_x, grad_w1, grad_b1, grad_w2, grad_b2, None, None, None, None


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tuple[Tensor, None]:
        return grad * ctx.scale, None
