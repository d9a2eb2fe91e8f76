"""The best experts of a token, against Python's stable sort."""

import math

import pytest
import torch

from fairseq_moe_ext.convert import experts_fairseq_moe
from fairseq_moe_ext.moe.routing import best


@pytest.mark.parametrize("choose", [best, experts_fairseq_moe.best], ids=["layer", "exported"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 2, 3, 7, 16])
def test_the_lower_of_equal_ones_comes_first(count, dtype, choose):
    torch.manual_seed(0)
    ties = torch.randint(-2, 3, (40, 16))  # five values, for 16 experts
    masked = torch.rand(40, 16).masked_fill(torch.rand(40, 16) < 0.9, -math.inf)
    for scores in (ties.to(dtype), masked.to(dtype), -ties.to(dtype) * 0, ties[:0].to(dtype)):
        before = scores.clone()
        found = choose(scores, count)
        assert torch.equal(scores, before)
        true = [sorted(range(16), key=lambda e: -row[e])[:count] for row in scores.tolist()]
        assert found.tolist() == true
