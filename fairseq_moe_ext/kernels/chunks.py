"""Where the rows of many experts lie, and which experts one batched matrix product computes.

Spare rows, whose results go nowhere, fill each expert's up to a number of rows that a product
wants.
"""

from __future__ import annotations

from typing import List, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor

from .matmul import program_rows, program_size, watched

_NARROW = 2**17  # numbers in an expert's first matrix, at most
# Numbers, 8 MB in float32: of a chunk's hidden values, which stay in the cache; and of its first
# matrices, which are copied side by side.
_HELD = 2**21
_NUMBERS = (64, 16, 4)  # of experts in a chunk; few, as oneDNN keeps a program for each shape
# At least seven eighths of a chunk's rows are real. Or the spare ones cost no more than a call, so
# many multiplications by the first matrix, and are no more than a sixteenth of the layer's rows.
_FULL, _FREE, _FEW = 7 / 8, 2**23, 1 / 16


class Chunk(NamedTuple):
    """Experts with as many rows each, one expert's after the other's."""

    experts: List[int]
    rows: int  # of each
    start: int  # the first row

    @property
    def place(self) -> slice:
        return slice(self.start, self.start + len(self.experts) * self.rows)


def is_narrow(dim: int, inner: int) -> bool:
    """Whether experts of so many inputs and so many hidden numbers gain by sharing products."""
    return dim * inner <= _NARROW


def laid_out(counts: List[int], x: Tensor, inner: int) -> List[Chunk]:
    """The chunks for counts[e] rows of each expert e. Narrow experts: those with most rows first,
    up to 64 in a chunk. Others: each by itself, in their order.

    Args:
        x: (..., D), for the rows' width and precision; on a CPU.
        inner: hidden width of an expert's first layer.
    """
    dim = x.size(-1)
    if not is_narrow(dim, inner) or watched():  # who counts FLOPs wants none of spare rows
        return in_order(program_rows(x, counts))
    # In any precision and with any library, so that a seed's dropout is the same.
    rows = [program_size(count) for count in counts]
    left = sorted((e for e, n in enumerate(rows) if n), key=rows.__getitem__, reverse=True)
    chunks, start, free = [], 0, min(_FREE // (dim * inner), int(_FEW * sum(rows)))
    while left:
        most = rows[left[0]]
        room = min(_HELD // (most * inner), _HELD // (dim * inner), len(left))
        fitting = (n for n in _NUMBERS if n <= room and _full([rows[e] for e in left[:n]], free))
        number = next(fitting, 1)
        chunks.append(Chunk(left[:number], most, start))
        left, start = left[number:], chunks[-1].place.stop
    return chunks


def _full(rows: List[int], free: int) -> bool:
    """Whether experts with so many rows may share a chunk; free: spare rows that do not count."""
    size = max(rows) * len(rows)
    return size - sum(rows) <= max(free, (1 - _FULL) * size)


def in_order(counts: List[int]) -> List[Chunk]:
    """Every expert with rows by itself, in the order of the experts."""
    chunks, start = [], 0
    for e, count in enumerate(counts):
        if count:
            chunks.append(Chunk([e], count, start))
        start += count
    return chunks


def total_rows(chunks: Sequence[Chunk]) -> int:
    return chunks[-1].place.stop if chunks else 0


def first_rows(chunks: List[Chunk], experts: int) -> Tensor:
    """The first row of each of so many experts. -> (E,) int64"""
    first = [0] * experts
    for chunk in chunks:
        for i, e in enumerate(chunk.experts):
            first[e] = chunk.start + i * chunk.rows
    return torch.tensor(first)


def rows_of_each(chunks: List[Chunk], experts: int) -> List[int]:
    """How many rows each of so many experts has."""
    rows = [0] * experts
    for chunk in chunks:
        for e in chunk.experts:
            rows[e] = chunk.rows
    return rows


def spread(
    counts: List[int], chunks: List[Chunk], x: Tensor, mask: Optional[Tensor]
) -> Tuple[Tensor, Tensor, Optional[Tensor]]:
    """Rows in expert order, counts[e] of expert e, x (N, D) and mask (N, F): which rows of the
    chunks they get, (N,) int64; and the rows of all chunks, (N', D) and (N', F), with zeros in
    spare ones."""
    rows = torch.tensor(counts)
    shift = first_rows(chunks, len(counts)) - (rows.cumsum(0) - rows)
    place = torch.arange(sum(counts)) + shift.repeat_interleave(rows)

    def spaced(each: Tensor) -> Tensor:
        return each.new_zeros(total_rows(chunks), each.size(1)).index_copy_(0, place, each)

    return place, spaced(x), None if mask is None else spaced(mask)
