"""Linear, activation, linear: each row through its own expert.

Two ways that give the numbers of the plain loop in moe/experts.py: expert by expert, and with
PyTorch's grouped matrix products. `kernel_for` chooses; a third is in batched_ffn.py.
"""

from __future__ import annotations

from typing import Any, Callable, List, NamedTuple, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .batched_ffn import batched
from .chunks import in_order, is_narrow, places, spread
from .matmul import faster_products, program_rows
from .stacks import Weights, activated, write_gradients
from .threads import side_by_side
from .transfer import to_device

_HIDDEN_AT_A_TIME = 2**17  # numbers, 512 KB in float32: half of a core's cache of the second level
Kernel = Callable[..., Tensor]  # with the parameters of by_expert


def kernel_for(x: Tensor, weights: Weights) -> Optional[Kernel]:
    """The fast way to compute experts on these rows; None: use the plain loop."""
    if grouped_serves(x, weights):
        return grouped
    if x.device.type == "cpu" and is_narrow(x.size(-1), len(weights.b1[0])):
        return batched
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
    rounded = program_rows(x, counts)
    if rounded != counts:
        return _spaced(rounded, x, counts, weights, activation, mask, grad_scale)
    in_files = not all(isinstance(each, Tensor) for each in weights)  # read expert by expert
    if in_files or not torch.is_grad_enabled():
        return _compute(x, _blocks(counts, len(weights.b1[0])), weights, activation, mask)
    return _ByExpert.apply(x, *weights, mask, counts, activation, grad_scale)


def _spaced(
    spaced: List[int],
    x: Tensor,
    counts: List[int],
    weights: Weights,
    activation: Callable[[Tensor], Tensor],
    mask: Optional[Tensor],
    grad_scale: float,
) -> Tensor:
    """by_expert with spare rows of zeros behind those of each expert, up to spaced[e]."""
    chunks = in_order(spaced)
    place = places(counts, chunks)
    x = spread(x, place, chunks)
    mask = None if mask is None else spread(mask, place, chunks)
    return by_expert(x, spaced, weights, activation, mask, grad_scale).index_select(0, place)


def grouped(
    x: Tensor,
    counts: List[int],
    weights: Weights,
    activation: Callable[[Tensor], Tensor],
    mask: Optional[Tensor] = None,
    grad_scale: float = 1.0,
) -> Tensor:
    """Like by_expert, with few kernel launches for any number of experts."""
    stacks = (each.to(x.dtype) for each in weights if isinstance(each, Tensor))
    # On Blackwell, grouped_mm leaves gradients of experts without rows unwritten (pytorch #172439).
    unused = [e for e, count in enumerate(counts) if count == 0]
    w1, b1, w2, b2 = (scale_gradient(each, grad_scale, unused) for each in stacks)
    rows = to_device(counts, x.device)
    ends = rows.cumsum(0, dtype=torch.int32)
    expert = torch.arange(len(counts), device=x.device)
    expert = expert.repeat_interleave(rows, output_size=x.size(0))  # (N,)
    hidden = activation(_AddBias.apply(F.grouped_mm(x, w1.mT, offs=ends), b1, expert, ends))
    if mask is not None:  # (N, F)
        hidden = hidden * mask
    return _AddBias.apply(F.grouped_mm(hidden, w2.mT, offs=ends), b2, expert, ends)


class _AddBias(torch.autograd.Function):
    # Indexing's backward pass would add the rows' gradients one by one in bfloat16, on a GPU slowly
    # (pytorch #171381); a product adds them in float32.
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor, expert: Tensor, ends: Tensor) -> Tensor:
        """x (N, M) + bias (E, M) of each row's expert (N,); ends (E,): of the experts' rows."""
        ctx.save_for_backward(ends)
        return x + bias[expert]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tuple[Optional[Tensor], ...]:
        (ends,), grad_bias = ctx.saved_tensors, None
        grad = grad.contiguous()
        if ctx.needs_input_grad[1]:
            ones = grad.new_ones(len(grad), 8)  # rows of 16 bytes, as grouped_mm requires
            grad_bias = F.grouped_mm(grad.mT, ones, offs=ends)[..., 0]  # (E, M)
        return grad, grad_bias, None, None


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


def _blocks(counts: List[int], inner: int) -> List[_Block]:
    # Experts in a block share its overhead of some 0.1 ms; its hidden values, `inner` a row,
    # stay in the processor's cache, and every thread has enough work.
    enough = min(_HIDDEN_AT_A_TIME // inner, sum(counts) // (4 * torch.get_num_threads()))
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
    hidden: Optional[Tensor] = None,
) -> Tensor:
    """-> (N, D); hidden (N, F), where given, gets what the activation is applied to."""
    w1, b1, w2, b2 = weights
    out = x.new_empty(x.size(0), len(b2[0]))

    def compute(index: int) -> None:
        (experts, counts, _), rows = blocks[index], blocks[index].rows
        h = x.new_empty(sum(counts), len(b1[0])) if hidden is None else hidden[rows]
        for e, given, room in zip(experts, x[rows].split(counts), h.split(counts)):
            torch.addmm(b1[e].to(x), given, w1[e].to(x).t(), out=room)
        h = activated(activation, h, None if mask is None else mask[rows])
        for e, given, room in zip(experts, h.split(counts), out[rows].split(counts)):
            torch.addmm(b2[e].to(x), given, w2[e].to(x).t(), out=room)

    _for_each(blocks, compute, 2, w1[0].numel(), x)
    return out


def _for_each(
    blocks: List[_Block], work: Callable[[int], None], products: int, size: int, x: Tensor
) -> None:
    """Call work(i) for every block i. It multiplies its rows of x by `products` matrices of `size`
    weights each."""
    rows = [sum(block.counts) for block in blocks]
    with faster_products(x):
        side_by_side(work, rows, products * size, x.device.type == "cpu")


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
        blocks = _blocks(counts, w1.size(1))
        hidden = x.new_empty(x.size(0), w1.size(1)) if any(ctx.needs_input_grad) else None
        out = _compute(x, blocks, Weights(w1, b1, w2, b2), activation, mask, hidden)
        ctx.save_for_backward(x, w1, w2, mask, hidden)
        ctx.blocks, ctx.activation, ctx.grad_scale = blocks, activation, grad_scale
        ctx.empty = [e for e, count in enumerate(counts) if count == 0]
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tuple[Optional[Tensor], ...]:
        x, w1, w2, mask, hidden = ctx.saved_tensors
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
                before = hidden[rows].detach().requires_grad_()
                after = activated(ctx.activation, before, None if mask is None else mask[rows])
            grad_out, grad_after = grad[rows].split(counts), torch.empty_like(after)
            parts = zip(experts, grad_out, after.detach().split(counts), grad_after.split(counts))
            for e, its_grad, given, room in parts:
                if grads is not None:
                    write_gradients(grads[2][e], grads[3][e], its_grad, given, scale)
                torch.mm(its_grad, w2[e].to(x), out=room)
            (grad_h,) = torch.autograd.grad(after, before, grad_after)
            grad_h = grad_h.split(counts)
            if grads is not None:
                for e, its_grad, given in zip(experts, grad_h, x[rows].split(counts)):
                    write_gradients(grads[0][e], grads[1][e], its_grad, given, scale)
            if grad_x is not None:
                for e, its_grad, room in zip(experts, grad_h, grad_x[rows].split(counts)):
                    torch.mm(its_grad, w1[e].to(x), out=room)

        _for_each(blocks, compute, 4, w1[0].numel(), x)
        return grad_x, *(grads or [None] * 4), None, None, None, None


def scale_gradient(x: Tensor, scale: float, unused: Sequence[int] = ()) -> Tensor:
    """x (E, ...), whose gradient is multiplied by scale, and set to 0 for the unused experts."""
    return _ScaleGradient.apply(x, scale, unused)


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float, unused: Sequence[int]) -> Tensor:
        ctx.scale, ctx.unused = scale, unused
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tuple[Tensor, None, None]:
        grad = grad * ctx.scale
        if ctx.unused:
            grad = grad.index_fill_(0, to_device(ctx.unused, grad.device), 0)
        return grad, None, None
