"""Causal self-attention on a CPU, by products of some heads and 128 positions at a time.

On Zen 5 PyTorch's scaled_dot_product_attention does not reach the speed of its matrix products, in
bfloat16 least of all (benchmarks/attention.py); and with dropout it draws a random number of 32
bits for each weight, on one thread. As there, the weights of a part stay in the cache, and the
backward pass computes them again (Dao et al., arXiv 2205.14135). Scores, weights and their
gradients are float32 at least.
"""

from __future__ import annotations

import math
from typing import Any, Iterator, List, Optional, Tuple

import torch
from torch import Tensor

from .dropout import keep
from .dtypes import at_least_float32, autocast_dtype
from .first_order import once_differentiable
from .matmul import faster_products, products_by_onednn, watched

_ROWS = 128  # positions whose weights are computed together
# Weights of a part, 4 MB in float32; not by the number of threads, so that a seed draws the same
# dropout with any.
_HELD = 2**20


def serves(q: Tensor, dropout: float) -> bool:
    """Whether causal_attention is faster for these queries (B, H, S, d): on a CPU, of S positions
    that the parts divide, because oneDNN keeps a program for each shape. In float32 without
    dropout, where oneDNN is not used, PyTorch's takes 0.7 to 1.3 times as long as ours."""
    return (
        q.device.type == "cpu"
        and q.numel() > 0
        and q.size(2) % _ROWS == 0
        and autocast_dtype(q) is None
        and not watched()  # who counts FLOPs wants none of weights that are computed again
        and _pays(q, dropout)
    )


def _pays(q: Tensor, dropout: float) -> bool:
    if q.dtype == torch.bfloat16:  # PyTorch's own products of bfloat16 are slow
        avx512 = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
        return avx512 and products_by_onednn(q)
    return q.dtype in (torch.float32, torch.float64) and (dropout > 0 or products_by_onednn(q))


def causal_attention(q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0) -> Tensor:
    """(B, H, S, d) each, of one precision -> (B, H, S, d), once differentiable.

    As F.scaled_dot_product_attention with is_causal; dropout is rounded to a multiple of 1 / 65536.
    """
    return _CausalAttention.apply(q, k, v, dropout)


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
        shape = q.shape
        q, k, v = (each.reshape(-1, *shape[2:]) for each in (q, k, v))  # (N, S, d), N = B H
        out = torch.empty_like(q)
        wide_q, wide_k = _scaled(q), _wide(k)
        kept: List[Tensor] = []
        factor = 1.0
        with faster_products(wide_q):
            for heads, rows, keys in _parts(*q.shape[:2]):
                weights = _weights(wide_q[heads, rows], wide_k[heads, keys])
                if dropout > 0:
                    chosen, factor = keep(weights.shape, dropout)
                    weights.mul_(chosen)
                    kept.append(chosen)
                out[heads, rows] = torch.bmm(weights.to(v), v[heads, keys])
        if factor != 1:
            out.mul_(factor)
        ctx.save_for_backward(q, k, v, out, *kept)
        ctx.factor = factor
        return out.view(shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tuple[Optional[Tensor], ...]:
        q, k, v, out, *kept = ctx.saved_tensors
        shape, scale = grad.shape, 1 / math.sqrt(q.size(2))
        wide_q, wide_k, wide_v = _scaled(q), _wide(k), _wide(v)
        wide_grad = _wide(grad.reshape(q.shape))
        # Of a query: the sum over keys of each weight times its gradient.
        mean = (wide_grad * _wide(out)).sum(dim=2, keepdim=True)  # (N, S, 1)
        if ctx.factor != 1:
            wide_grad = wide_grad * ctx.factor
        grad = wide_grad.to(q)
        grad_q = torch.empty_like(q)
        grad_k, grad_v = torch.zeros_like(wide_k), torch.zeros_like(wide_v)
        with faster_products(wide_q):
            for i, (heads, rows, keys) in enumerate(_parts(*q.shape[:2])):
                weights = _weights(wide_q[heads, rows], wide_k[heads, keys])
                chosen = kept[i] if kept else None
                used = weights if chosen is None else weights * chosen
                grad_v[heads, keys] += torch.bmm(used.to(q).mT, grad[heads, rows])
                of_scores = torch.bmm(wide_grad[heads, rows], wide_v[heads, keys].mT)
                if chosen is not None:
                    of_scores.mul_(chosen)
                of_scores = of_scores.sub_(mean[heads, rows]).mul_(weights).to(q)
                torch.bmm(of_scores, k[heads, keys], out=grad_q[heads, rows])
                grad_k[heads, keys] += torch.bmm(of_scores.mT, q[heads, rows])
        grads = grad_q.mul_(scale), grad_k.mul_(scale), grad_v
        return (*(each.to(q).view(shape) for each in grads), None)


def _wide(x: Tensor) -> Tensor:
    return x.to(at_least_float32(x))


def _scaled(q: Tensor) -> Tensor:
    return _wide(q) / math.sqrt(q.size(2))


def _parts(heads: int, positions: int) -> Iterator[Tuple[slice, slice, slice]]:
    """Some heads, _ROWS positions, and the positions that these look at, of each part. The number
    of heads is a power of two, so that oneDNN needs few programs."""
    most = max(1, _HELD // (_ROWS * positions))
    done = 0
    while done < heads:
        number = 2 ** (min(most, heads - done).bit_length() - 1)
        for first in range(0, positions, _ROWS):
            end = first + _ROWS
            yield slice(done, done + number), slice(first, end), slice(end)
        done += number


def _weights(q: Tensor, k: Tensor) -> Tensor:
    """Of the last queries (n, R, d), scaled, over all keys up to them (n, K, d) -> (n, R, K)"""
    scores = torch.bmm(q, k.mT)
    later = scores.new_full((q.size(1), q.size(1)), -math.inf).triu_(1)
    scores[:, :, -q.size(1) :] += later
    return scores.softmax(dim=2)
