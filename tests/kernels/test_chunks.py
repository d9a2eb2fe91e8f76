"""Where rows of many experts lie: each expert once, enough rows, few spare ones."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fairseq_moe_ext.kernels import chunks, matmul
from fairseq_moe_ext.kernels.chunks import Chunk, first_rows, in_order, laid_out, rows_of_each

NARROW = torch.ones(1, 96, dtype=torch.float64)


def test_those_with_most_rows_first():
    """64 together if seven eighths of their rows are real, else 16, four or one."""
    assert laid_out([3, 0, 8], NARROW, 96) == [Chunk([2], 8, 0), Chunk([0], 4, 8)]
    assert laid_out([1200, 3000, 1100, 800, 1200], NARROW, 96) == [
        Chunk([1], 3072, 0),
        Chunk([0, 4, 2, 3], 1280, 3072),
    ]
    assert laid_out([4] * 17, NARROW, 96) == [Chunk([*range(16)], 4, 0), Chunk([16], 4, 64)]
    assert laid_out([4] * 65, NARROW, 96) == [Chunk([*range(64)], 4, 0), Chunk([64], 4, 256)]
    assert len(laid_out([1280, *[1152] * 3], NARROW, 96)) == 1  # 384 of 5120
    assert len(laid_out([1280, *[1024] * 3], NARROW, 96)) == 4  # not 768
    assert laid_out([0, 0], NARROW, 96) == []


def test_few_spare_rows_do_not_count():
    """They cost no more than a call, and are few beside the rows of all experts."""
    free = chunks._FREE // 96**2
    for rows, together in ((280, True), (300, False)):
        found = laid_out([20_000, rows, 4, 4, 4], NARROW, 96)
        spare = 3 * (found[1].rows - 4)
        assert (len(found) == 2) == (spare <= free) == together
    assert len(laid_out([280, 4, 4, 4], NARROW, 96)) == 4


@pytest.mark.parametrize(
    "dim, inner, rows", [(96, 192, 700), (96, 192, 3000), (256, 512, 300), (64, 2048, 300)]
)
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


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_narrow_experts_lie_as_the_library_wants_that_autocast_may_take(dtype, monkeypatch):
    """oneDNN computes bfloat16 on every CPU, and makes a program for each new number of rows; and
    the same dropout falls on the same rows in every precision."""
    monkeypatch.setattr(matmul, "onednn_is_faster", lambda: False)
    found = laid_out([37, 11, 50, 2], NARROW.to(dtype), 1024)
    assert [chunk.rows for chunk in found] == [52, 40, 12, 2]
