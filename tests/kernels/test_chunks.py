"""Where rows of many experts lie: each expert once, enough rows, few spare ones."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fairseq_moe_ext.kernels import chunks, matmul
from fairseq_moe_ext.kernels.chunks import Chunk, first_rows, in_order, laid_out, rows_of_each

NARROW = torch.ones(1, 96, dtype=torch.float64)  # no rounding to rows that oneDNN wants


def test_those_with_most_rows_first():
    """Sixteen together if three quarters of their rows are no spare ones, else four, else one."""
    assert laid_out([5, 0, 7], NARROW, 96) == [Chunk([2], 7, 0), Chunk([0], 5, 7)]
    assert laid_out([10, 30, 9, 10, 8], NARROW, 96) == [
        Chunk([1], 30, 0),
        Chunk([0, 3, 2, 4], 10, 30),
    ]
    assert laid_out([10, 2, 2, 2], NARROW, 96)[0] == Chunk([0], 10, 0)
    assert laid_out([4] * 17, NARROW, 96) == [Chunk([*range(16)], 4, 0), Chunk([16], 4, 64)]
    assert laid_out([0, 0], NARROW, 96) == []


@pytest.mark.parametrize("dim, inner, rows", [(96, 192, 700), (256, 512, 200), (64, 2048, 300)])
def test_a_chunk_s_numbers_stay_in_the_cache(dim, inner, rows):
    for chunk in laid_out([rows] * 64, torch.ones(1, dim).double(), inner):
        number = len(chunk.experts)
        assert number == 1 or number * max(chunk.rows, dim) * inner <= chunks._HELD


def test_wide_experts_keep_their_order():
    counts = [3, 0, 9, 3, 3, 3]
    assert laid_out(counts, torch.ones(1, 512).double(), 512) == in_order(counts)
    assert in_order(counts)[:2] == [Chunk([0], 3, 0), Chunk([2], 9, 3)]


@pytest.mark.parametrize("onednn", [False, True])
@pytest.mark.parametrize("inner", [32, 4096])
def test_each_expert_has_a_place_for_its_rows(inner, onednn, monkeypatch):
    monkeypatch.setattr(matmul, "onednn_is_faster", lambda: onednn)
    generator = torch.Generator().manual_seed(0)
    counts = (torch.rand(100, generator=generator) ** 3 * 80).long()
    found = laid_out(counts.tolist(), torch.ones(1, 64), inner)
    assert sorted(e for chunk in found for e in chunk.experts) == counts.nonzero()[:, 0].tolist()
    first, number = first_rows(found, 100), torch.tensor(rows_of_each(found, 100))
    assert (number >= counts).all() and (number[counts == 0] == 0).all()
    taken = torch.zeros(found[-1].place.stop, dtype=torch.int64)
    for start, rows in zip(first.tolist(), number.tolist()):
        taken[start : start + rows] += 1
    assert (taken == 1).all()


def test_who_counts_flops_counts_none_of_spare_rows():
    with FlopCounterMode(display=False):
        assert laid_out([5, 9, 5, 5, 5], NARROW, 96) == in_order([5, 9, 5, 5, 5])
