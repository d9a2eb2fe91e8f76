"""Linear, activation, linear: narrow experts with few rows each, some at a time.

A call of a product costs some 25 us, as much as the product of a narrow expert's few rows. So
chunks of experts with about as many rows each (chunks.py) share the calls of batched products.
"""

from __future__ import annotations

from typing import Callable, List, Optional, Sequence

import torch
from torch import Tensor

from .chunks import Chunk, laid_out, spread, total_rows
from .matmul import faster_products
from .stacks import Stack, Weights
from .two_layers import two_layers, write_gradients


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
    place, x, mask = spread(counts, chunks, x, mask)
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
    batches = [_Batch(*chunk) for chunk in chunks]
    return two_layers(x, batches, weights, activation, mask, grad_scale, _in_turn)


def _in_turn(work: Callable[[int], None], chunks: Sequence[Chunk], size: int, x: Tensor) -> None:
    with faster_products(x, total_rows(chunks) * size):
        for i in range(len(chunks)):
            work(i)


class _Batch(Chunk):
    """Its B experts share each product: a Part of two_layers.py."""

    def multiply(self, x: Tensor, w: Stack, b: Stack, out: Tensor) -> None:
        bias = self._of(b, x).unsqueeze(1)
        torch.baddbmm(bias, self._apart(x), self._of(w, x).mT, out=self._apart(out))

    def multiply_back(self, grad: Tensor, w: Stack, out: Tensor) -> None:
        torch.bmm(self._apart(grad), self._of(w, grad), out=self._apart(out))

    def write_gradients(
        self, w: Tensor, b: Tensor, grad: Tensor, given: Tensor, scale: float
    ) -> None:
        if len(self.experts) == 1:
            write_gradients(w[self.experts[0]], b[self.experts[0]], grad, given, scale)
            return
        grad = self._apart(grad)
        products = torch.bmm(grad.mT, self._apart(given)).to(w.dtype)  # (B, M, K)
        place = torch.tensor(self.experts, device=w.device)
        w.index_copy_(0, place, products if scale == 1 else products.mul_(scale))
        b.index_copy_(0, place, grad.sum(dim=1, dtype=b.dtype).mul_(scale))

    def _apart(self, x: Tensor) -> Tensor:
        """(n, M) -> (B, n / B, M), a view."""
        return x.unflatten(0, (len(self.experts), self.rows))

    def _of(self, stack: Stack, x: Tensor) -> Tensor:
        """Its experts' weights or biases, as precise as x and where it is: (B, ...)."""
        if len(self.experts) == 1:
            return stack[self.experts[0]].unsqueeze(0).to(x)
        if isinstance(stack, Tensor):  # a list as the index would be copied number by number
            return stack.index_select(0, torch.tensor(self.experts, device=stack.device)).to(x)
        return torch.stack([stack[e] for e in self.experts]).to(x)
