"""Linear, activation, linear: each row through its own expert.

Two ways that give the numbers of the plain loop in moe/experts.py: expert by expert, and with
PyTorch's grouped matrix products.
"""

from __future__ import annotations

from typing import Any, Callable, Iterable, List, NamedTuple, Optional, Sequence, Tuple, Union

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .matmul import autocast_dtype, product, write_outer, write_product
from .threads import side_by_side

Stack = Union[Tensor, Sequence[Tensor]]


class Weights(NamedTuple):
    """Of E experts; stacked, or a sequence of each expert's, in any precision and place."""

    w1: Stack  # (E, F, D); (E, 2 F, D) with a gated activation
    b1: Stack  # (E, F), or (E, 2 F)
    w2: Stack  # (E, D, F)
    b2: Stack  # (E, D)


Kernel = Callable[..., Tensor]  # with the parameters of by_expert


def kernel_for(x: Tensor, weights: Weights) -> Optional[Kernel]:
    """The fast way to compute experts on these rows; None: use the plain loop."""
    if grouped_serves(x, weights):
        return grouped
    return by_expert if x.device.type in ("cpu", "cuda", "meta") else None


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
        activation: elementwise, or gated: (n, 2 F) -> (n, F).
        mask: (N, F), a factor on what the activation yields, for dropout.
        grad_scale: factor on the gradients of the weights, not on x's.

    Returns:
        (N, D)
    """
    wanted = autocast_dtype(x)
    if wanted is not None:
        with torch.autocast(x.device.type, enabled=False):
            return by_expert(x.to(wanted), counts, weights, activation, mask, grad_scale)
    # Under FSDP with --fp16 experts stay in float32, which their optimizer needs.
    same = [each.to(x.dtype) for each in weights if isinstance(each, Tensor)]
    if len(same) < len(weights):  # a sequence, to be read expert by expert
        return _compute(x, _blocks(counts), weights, activation, mask)
    return _ByExpert.apply(x, *same, mask, counts, activation, grad_scale)


def grouped(
    x: Tensor,
    counts: List[int],
    weights: Weights,
    activation: Callable[[Tensor], Tensor],
    mask: Optional[Tensor] = None,
    grad_scale: float = 1.0,
) -> Tensor:
    """Like by_expert, with few kernel launches for any number of experts."""
    stacks = (each for each in weights if isinstance(each, Tensor))
    w1, b1, w2, b2 = (scale_gradient(each.to(x.dtype), grad_scale) for each in stacks)
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
        and isinstance(weights.w2, Tensor)
        and all(size % 8 == 0 for size in (*weights.w1.shape[1:], *weights.w2.shape[1:]))
    )


class _Block(NamedTuple):
    """Experts that are computed together."""

    experts: List[int]  # that have rows
    counts: List[int]  # of each
    start: int  # row of the first

    @property
    def rows(self) -> slice:
        return slice(self.start, self.start + sum(self.counts))


def _blocks(counts: List[int]) -> List[_Block]:
    # Experts in a block share its overhead of some 0.1 ms; its hidden
    # values stay in the processor's cache, and every thread has enough work.
    enough = min(64, sum(counts) // (4 * torch.get_num_threads()))
    blocks: List[_Block] = []
    start = 0
    for e, count in enumerate(counts):
        if count == 0:
            continue
        if not blocks or sum(blocks[-1].counts) >= enough:
            blocks.append(_Block([], [], start))
        blocks[-1].experts.append(e)
        blocks[-1].counts.append(count)
        start += count
    return blocks


def _compute(
    x: Tensor,
    blocks: List[_Block],
    weights: Weights,
    activation: Callable[[Tensor], Tensor],
    mask: Optional[Tensor],
    hidden: Optional[List[Optional[Tensor]]] = None,
) -> Tensor:
    """-> (N, D); hidden, where given, gets of each block what the activation is applied to."""
    w1, b1, w2, b2 = weights
    out = x.new_empty(x.size(0), len(b2[0]))

    def compute(index: int) -> None:
        (experts, counts, _), rows = blocks[index], blocks[index].rows
        h = _joined(
            product(x_of_e, w1[e].to(x).t(), b1[e].to(x))
            for e, x_of_e in zip(experts, x[rows].split(counts))
        )
        if hidden is not None:
            hidden[index] = h
        h = _activated(activation, h, mask, rows)
        for e, h_of_e, out_of_e in zip(experts, h.split(counts), out[rows].split(counts)):
            out_of_e.copy_(product(h_of_e, w2[e].to(x).t(), b2[e].to(x)))

    _for_each(blocks, compute, 2 * w1[0].numel(), x)
    return out


def _activated(
    activation: Callable[[Tensor], Tensor], h: Tensor, mask: Optional[Tensor], rows: slice
) -> Tensor:
    h = activation(h)
    return h if mask is None else h * mask[rows]


def _joined(parts: Iterable[Tensor]) -> Tensor:
    """Rows under each other."""
    parts = list(parts)
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _for_each(blocks: List[_Block], work: Callable[[int], None], size: int, x: Tensor) -> None:
    side_by_side(work, [sum(block.counts) for block in blocks], size, x.device.type == "cpu")


class _ByExpert(torch.autograd.Function):
    # An expert's weights are read once in each direction, its hidden values are used while they are
    # in the cache, and its gradients are written in place: under autograd each w1[e] would make a
    # gradient of all experts' size. The backward pass recomputes the activation, which costs less
    # than keeping it.
    @staticmethod
    def forward(
        ctx: Any,
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
        blocks = _blocks(counts)
        hidden: Optional[List[Optional[Tensor]]] = None
        if any(ctx.needs_input_grad):
            hidden = [None] * len(blocks)
        out = _compute(x, blocks, Weights(w1, b1, w2, b2), activation, mask, hidden)
        ctx.save_for_backward(x, w1, w2, mask, *(hidden or ()))
        ctx.blocks, ctx.activation, ctx.grad_scale = blocks, activation, grad_scale
        ctx.empty = [e for e, count in enumerate(counts) if count == 0]
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tuple[Optional[Tensor], ...]:
        x, w1, w2, mask, *hidden = ctx.saved_tensors
        blocks, scale = ctx.blocks, ctx.grad_scale
        for_x, for_weights = ctx.needs_input_grad[0], any(ctx.needs_input_grad[1:5])
        grad_x = torch.empty_like(x) if for_x else None
        grads: Optional[Tuple[Tensor, ...]] = None
        if for_weights:
            b1, b2 = w1.new_empty(w1.shape[:2]), w2.new_empty(w2.shape[:2])
            grads = torch.empty_like(w1), b1, torch.empty_like(w2), b2
            for e in ctx.empty:
                for each in grads:
                    each[e].zero_()

        def compute(index: int) -> None:
            (experts, counts, _), rows = blocks[index], blocks[index].rows
            with torch.enable_grad():
                before = hidden[index].detach().requires_grad_()
                after = _activated(ctx.activation, before, mask, rows)
            grad_out = grad[rows].split(counts)
            if grads is not None:
                for e, given, its_grad in zip(experts, after.detach().split(counts), grad_out):
                    write_gradients(its_grad, given, grads[2][e], grads[3][e])
            grad_after = _joined(product(each, w2[e]) for e, each in zip(experts, grad_out))
            (grad_h,) = torch.autograd.grad(after, before, grad_after)
            grad_h = grad_h.split(counts)
            if grads is not None:
                for e, given, its_grad in zip(experts, x[rows].split(counts), grad_h):
                    write_gradients(its_grad, given, grads[0][e], grads[1][e])
            if grad_x is not None:
                for e, its_grad, room in zip(experts, grad_h, grad_x[rows].split(counts)):
                    write_product(room, its_grad, w1[e])

        def write_gradients(grad_out: Tensor, given: Tensor, w: Tensor, b: Tensor) -> None:
            write_outer(w, grad_out, given, scale)
            torch.sum(grad_out, dim=0, out=b)

        _for_each(blocks, compute, 4 * w1[0].numel(), x)
        if grads is not None:
            for bias in (grads[1], grads[3]):
                bias.mul_(scale)
        return grad_x, *(grads or [None] * 4), None, None, None, None


def scale_gradient(x: Tensor, scale: float) -> Tensor:
    """x, whose gradient is multiplied by scale."""
    return _ScaleGradient.apply(x, scale)


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tuple[Tensor, None]:
        return grad * ctx.scale, None
