"""Linear, activation, linear: each row through its own expert.

`kernel_for` chooses between the ways that give the numbers of the plain loop in moe/experts.py:
expert by expert, here; narrow experts several at a time, in batched_ffn.py; and by grouped
products, in grouped_ffn.py.
"""

from __future__ import annotations

from typing import Callable, List, NamedTuple, Optional, Sequence

import torch
from torch import Tensor

from .batched_ffn import batched
from .chunks import in_order, is_narrow, spread
from .grouped_ffn import grouped, grouped_serves
from .matmul import faster_products, program_rows
from .stacks import Stack, Weights
from .threads import side_by_side
from .two_layers import two_layers, write_gradients

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
    blocks = _blocks(counts, len(weights.b1[0]))
    return two_layers(x, blocks, weights, activation, mask, grad_scale, _each_by_a_core)


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
    place, x, mask = spread(counts, chunks, x, mask)
    return by_expert(x, spaced, weights, activation, mask, grad_scale).index_select(0, place)


class _Block(NamedTuple):
    """Experts that are computed together, each by products of its own: a Part of two_layers.py."""

    experts: List[int]  # that have rows
    counts: List[int]  # of each
    start: int  # row of the first

    @property
    def place(self) -> slice:
        return slice(self.start, self.start + sum(self.counts))

    def multiply(self, x: Tensor, w: Stack, b: Stack, out: Tensor) -> None:
        for e, given, room in zip(self.experts, x.split(self.counts), out.split(self.counts)):
            torch.addmm(b[e].to(x), given, w[e].to(x).t(), out=room)

    def multiply_back(self, grad: Tensor, w: Stack, out: Tensor) -> None:
        for e, given, room in zip(self.experts, grad.split(self.counts), out.split(self.counts)):
            torch.mm(given, w[e].to(grad), out=room)

    def write_gradients(
        self, w: Tensor, b: Tensor, grad: Tensor, given: Tensor, scale: float
    ) -> None:
        for e, its, rows in zip(self.experts, grad.split(self.counts), given.split(self.counts)):
            write_gradients(w[e], b[e], its, rows, scale)


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


def _each_by_a_core(
    work: Callable[[int], None], blocks: Sequence[_Block], size: int, x: Tensor
) -> None:
    rows = [sum(block.counts) for block in blocks]
    with faster_products(x):
        side_by_side(work, rows, size, x.device.type == "cpu")
