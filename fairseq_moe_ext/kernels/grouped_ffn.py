"""Linear, activation, linear of many experts by PyTorch's grouped matrix products, on a GPU."""

from __future__ import annotations

from typing import Any, Callable, List, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .first_order import once_differentiable
from .stacks import Weights, scale_gradient
from .transfer import to_device


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
    """Whether grouped products have a kernel of their own for these: bfloat16, rows of a multiple
    of 16 bytes, and a GPU of the kind of H100 or B200 (compute capability 9 or 10). On others
    PyTorch copies the offsets to the CPU and multiplies expert by expert."""
    return (
        x.is_cuda
        and x.dtype == torch.bfloat16
        and hasattr(F, "grouped_mm")
        and torch.cuda.get_device_capability(x.device)[0] in (9, 10)
        and isinstance(weights.w1, Tensor)
        and x.size(0) > 0
        and isinstance(weights.w2, Tensor)
        and all(size % 8 == 0 for size in (*weights.w1.shape[1:], *weights.w2.shape[1:]))
    )
