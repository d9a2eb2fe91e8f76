"""Linear, activation, linear: narrow experts with few rows each, some at a time.

A call of a product costs some 25 us, as much as the product of a narrow expert's few rows. So
chunks of experts with about as many rows each (chunks.py) share the calls of batched products.
"""

from __future__ import annotations

from typing import Any, Callable, ContextManager, List, Optional, Tuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .chunks import Chunk, laid_out, places, spread, total_rows
from .matmul import faster_products
from .stacks import Stack, Weights, activated, write_gradients


def batched(
    x: Tensor,
    counts: List[int],
    weights: Weights,
    activation: Callable[[Tensor], Tensor],
    mask: Optional[Tensor] = None,
    grad_scale: float = 1.0,
) -> Tensor:
    """Like by_expert of expert_ffn.py."""
    chunks = laid_out(counts, x, len(weights.b1[0]))
    place = places(counts, chunks)
    x = spread(x, place, chunks)
    mask = None if mask is None else spread(mask, place, chunks)
    return by_chunk(x, chunks, weights, activation, mask, grad_scale).index_select(0, place)


def by_chunk(
    x: Tensor,
    chunks: List[Chunk],
    weights: Weights,
    activation: Callable[[Tensor], Tensor],
    mask: Optional[Tensor] = None,
    grad_scale: float = 1.0,
) -> Tensor:
    """Like batched, of rows that lie as the chunks say, spare ones included."""
    in_files = not all(isinstance(each, Tensor) for each in weights)  # read chunk by chunk
    if in_files or not torch.is_grad_enabled():
        with _products(x, chunks, weights.w1):
            return _compute(x, chunks, weights, activation, mask)
    return _ByChunk.apply(x, *weights, mask, chunks, activation, grad_scale)


def _products(x: Tensor, chunks: List[Chunk], w1: Stack) -> ContextManager[None]:
    return faster_products(x, total_rows(chunks) * w1[0].numel())


def _apart(x: Tensor, chunk: Chunk) -> Tensor:
    """The rows of the chunk's B experts: (N, M) -> (B, n, M), a view."""
    return x[chunk.place].unflatten(0, (len(chunk.experts), chunk.rows))


def _of(stack: Stack, chunk: Chunk, x: Tensor) -> Tensor:
    """The chunk's experts' weights or biases, as precise as x and where it is: (B, ...)."""
    if len(chunk.experts) == 1:
        return stack[chunk.experts[0]].unsqueeze(0).to(x)
    if isinstance(stack, Tensor):
        return stack[chunk.experts].to(x)
    return torch.stack([stack[e] for e in chunk.experts]).to(x)


def _compute(
    x: Tensor,
    chunks: List[Chunk],
    weights: Weights,
    activation: Callable[[Tensor], Tensor],
    mask: Optional[Tensor],
    hidden: Optional[Tensor] = None,
) -> Tensor:
    """-> (N, D); hidden (N, F), where given, gets what the activation is applied to."""
    w1, b1, w2, b2 = weights
    out = x.new_empty(x.size(0), len(b2[0]))
    for chunk in chunks:
        size = len(chunk.experts), chunk.rows, len(b1[0])
        h = x.new_empty(size) if hidden is None else _apart(hidden, chunk)
        bias = _of(b1, chunk, x).unsqueeze(1)
        torch.baddbmm(bias, _apart(x, chunk), _of(w1, chunk, x).mT, out=h)
        h = activated(activation, h, None if mask is None else _apart(mask, chunk))
        bias = _of(b2, chunk, x).unsqueeze(1)
        torch.baddbmm(bias, h, _of(w2, chunk, x).mT, out=_apart(out, chunk))
    return out


class _ByChunk(torch.autograd.Function):
    # Weights are read once in each direction, hidden values are used while they are in the cache,
    # and gradients are written in place: under autograd each w1[e] would make a gradient of all
    # experts' size. The backward pass recomputes the activation, which costs less than keeping it.
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w1: Tensor,
        b1: Tensor,
        w2: Tensor,
        b2: Tensor,
        mask: Optional[Tensor],
        chunks: List[Chunk],
        activation: Callable[[Tensor], Tensor],
        grad_scale: float,
    ) -> Tensor:
        hidden = x.new_empty(x.size(0), w1.size(1)) if any(ctx.needs_input_grad) else None
        with _products(x, chunks, w1):
            out = _compute(x, chunks, Weights(w1, b1, w2, b2), activation, mask, hidden)
        ctx.save_for_backward(x, w1, b1, w2, b2, mask, hidden)
        ctx.chunks, ctx.activation, ctx.grad_scale = chunks, activation, grad_scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tuple[Optional[Tensor], ...]:
        x, w1, b1, w2, b2, mask, hidden = ctx.saved_tensors
        scale = ctx.grad_scale
        grad_x = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        grads: Optional[Tuple[Tensor, ...]] = None
        if any(ctx.needs_input_grad[1:5]):
            grads = tuple(torch.empty_like(each) for each in (w1, b1, w2, b2))
            used = {e for chunk in ctx.chunks for e in chunk.experts}
            unused = [e for e in range(len(w1)) if e not in used]
            for each in grads:
                each[unused] = 0
        with _products(x, ctx.chunks, w1):
            for chunk in ctx.chunks:
                with torch.enable_grad():
                    before = _apart(hidden, chunk).detach().requires_grad_()
                    its_mask = None if mask is None else _apart(mask, chunk)
                    after = activated(ctx.activation, before, its_mask)
                grad_out = _apart(grad, chunk)
                if grads is not None:
                    _write(grads[2], grads[3], chunk, grad_out, after.detach(), scale)
                grad_after = torch.bmm(grad_out, _of(w2, chunk, x))
                (grad_h,) = torch.autograd.grad(after, before, grad_after)
                if grads is not None:
                    _write(grads[0], grads[1], chunk, grad_h, _apart(x, chunk), scale)
                if grad_x is not None:
                    torch.bmm(grad_h, _of(w1, chunk, x), out=_apart(grad_x, chunk))
        return grad_x, *(grads or [None] * 4), None, None, None, None


def _write(w: Tensor, b: Tensor, chunk: Chunk, grad: Tensor, given: Tensor, scale: float) -> None:
    """Gradients of the chunk's B linear layers, scaled, in the weights' precision: w (E, M, K),
    b (E, M), grad (B, n, M), given (B, n, K)."""
    experts = chunk.experts
    if len(experts) == 1:
        write_gradients(w[experts[0]], b[experts[0]], grad[0], given[0], scale)
        return
    products = torch.bmm(grad.mT, given).to(w.dtype)  # (B, M, K)
    place = torch.tensor(experts, device=w.device)
    w.index_copy_(0, place, products if scale == 1 else products.mul_(scale))
    b.index_copy_(0, place, grad.sum(dim=1, dtype=b.dtype).mul_(scale))
