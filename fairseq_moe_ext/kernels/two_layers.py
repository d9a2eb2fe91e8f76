"""Linear, activation, linear of many experts, one part of the experts after the other.

Weights are read once in each direction, hidden values are used while they are in the cache, and
gradients are written in place: under autograd each w1[e] would make a gradient of all experts'
size. The backward pass recomputes the activation, which costs less than keeping it.
"""

from __future__ import annotations

from typing import Any, Callable, Optional, Protocol, Sequence, Tuple

import torch
from torch import Tensor

from .first_order import once_differentiable
from .stacks import Stack, Weights, set_to_zero


class Part(Protocol):
    """Some experts, with n rows together that lie side by side; how to multiply them."""

    @property
    def experts(self) -> Sequence[int]: ...

    @property
    def place(self) -> slice:
        """Of its rows."""

    def multiply(self, x: Tensor, w: Stack, b: Stack, out: Tensor) -> None:
        """Each row by the layer of its expert e, w[e] (M, K), b[e] (M,): x (n, K), out (n, M)."""

    def multiply_back(self, grad: Tensor, w: Stack, out: Tensor) -> None:
        """Each row by w[e] (M, K), transposed: grad (n, M), out (n, K)."""

    def write_gradients(
        self, w: Tensor, b: Tensor, grad: Tensor, given: Tensor, scale: float
    ) -> None:
        """Those of its experts' layers, scaled, into w (E, M, K) and b (E, M), in their precision:
        grad (n, M), given (n, K)."""


# Calls work(i) for each part i, given also the parts, the multiplications for a row, and the rows,
# for their precision and device.
Run = Callable[[Callable[[int], None], Sequence[Any], int, Tensor], None]
Activation = Callable[[Tensor], Tensor]  # elementwise, or gated: (n, 2 F) -> (n, F)


def two_layers(
    x: Tensor,
    parts: Sequence[Part],
    weights: Weights,
    activation: Activation,
    mask: Optional[Tensor],
    grad_scale: float,
    run: Run,
) -> Tensor:
    """x (N, D) -> (N, D), once differentiable. The other arguments as by_expert has them in
    expert_ffn.py; rows are as the parts say."""
    in_files = not all(isinstance(each, Tensor) for each in weights)  # read part by part
    if in_files or not torch.is_grad_enabled():
        return _compute(x, parts, weights, activation, mask, run)
    return _TwoLayers.apply(x, *weights, mask, parts, activation, grad_scale, run)


def _compute(
    x: Tensor,
    parts: Sequence[Part],
    weights: Weights,
    activation: Activation,
    mask: Optional[Tensor],
    run: Run,
    hidden: Optional[Tensor] = None,
) -> Tensor:
    """-> (N, D); hidden (N, F), where given, gets what the activation is applied to."""
    w1, b1, w2, b2 = weights
    out = x.new_empty(x.size(0), len(b2[0]))

    def compute(index: int) -> None:
        part, rows = parts[index], parts[index].place
        given = x[rows]
        h = x.new_empty(len(given), len(b1[0])) if hidden is None else hidden[rows]
        part.multiply(given, w1, b1, h)
        h = _activated(activation, h, None if mask is None else mask[rows])
        part.multiply(h, w2, b2, out[rows])

    run(compute, parts, 2 * w1[0].numel(), x)
    return out


def _activated(activation: Activation, h: Tensor, mask: Optional[Tensor]) -> Tensor:
    """h (n, F), or (n, 2 F) for a gated activation, and mask (n, F) -> (n, F)"""
    h = activation(h)
    return h if mask is None else h * mask


class _TwoLayers(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w1: Tensor,
        b1: Tensor,
        w2: Tensor,
        b2: Tensor,
        mask: Optional[Tensor],
        parts: Sequence[Part],
        activation: Activation,
        grad_scale: float,
        run: Run,
    ) -> Tensor:
        hidden = x.new_empty(x.size(0), w1.size(1)) if any(ctx.needs_input_grad) else None
        out = _compute(x, parts, Weights(w1, b1, w2, b2), activation, mask, run, hidden)
        ctx.save_for_backward(x, w1, b1, w2, b2, mask, hidden)
        ctx.parts, ctx.activation, ctx.grad_scale, ctx.run = parts, activation, grad_scale, run
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tuple[Optional[Tensor], ...]:
        x, w1, b1, w2, b2, mask, hidden = ctx.saved_tensors
        parts, scale = ctx.parts, ctx.grad_scale
        grad_x = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        grads: Optional[Tuple[Tensor, ...]] = None
        if any(ctx.needs_input_grad[1:5]):
            # The small ones first: later, they take memory that malloc kept for a large one.
            small = torch.empty_like(b1), torch.empty_like(b2)
            grads = torch.empty_like(w1), small[0], torch.empty_like(w2), small[1]
            used = {e for part in parts for e in part.experts}
            unused = [e for e in range(len(w1)) if e not in used]
            for each in grads:
                set_to_zero(each, unused)

        def compute(index: int) -> None:
            part, rows = parts[index], parts[index].place
            with torch.enable_grad():
                before = hidden[rows].detach().requires_grad_()
                after = _activated(ctx.activation, before, None if mask is None else mask[rows])
            if grads is not None:
                part.write_gradients(grads[2], grads[3], grad[rows], after.detach(), scale)
            grad_after = torch.empty_like(after)
            part.multiply_back(grad[rows], w2, grad_after)
            (grad_h,) = torch.autograd.grad(after, before, grad_after)
            if grads is not None:
                part.write_gradients(grads[0], grads[1], grad_h, x[rows], scale)
            if grad_x is not None:
                part.multiply_back(grad_h, w1, grad_x[rows])

        ctx.run(compute, parts, 4 * w1[0].numel(), x)
        return grad_x, *(grads or [None] * 4), None, None, None, None, None


def write_gradients(w: Tensor, b: Tensor, grad: Tensor, given: Tensor, scale: float) -> None:
    """Of one expert's layer, scaled, in the weights' precision, while the products are in the
    cache: w (M, K), b (M,), grad (n, M), given (n, K)."""
    if w.dtype == given.dtype:
        torch.addmm(w, grad.t(), given, beta=0, alpha=scale, out=w)  # w is not read
    else:
        w.copy_(torch.mm(grad.t(), given))
        if scale != 1:
            w.mul_(scale)
    torch.sum(grad, dim=0, dtype=b.dtype, out=b)
    if scale != 1:
        b.mul_(scale)
