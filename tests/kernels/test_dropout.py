"""Dropout of sixteen random bits an element: its share, its scale, its gradient."""

import math

import pytest
import torch

from fairseq_moe_ext.kernels.dropout import add_dropout, dropout, mask


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.999])
def test_share_and_scale(p, dtype):
    torch.manual_seed(0)
    n = 401 * 499  # no multiple of four
    found = mask(torch.empty(401, 499, dtype=dtype), p)
    assert found.dtype == dtype and found.shape == (401, 499)
    dropped = found.eq(0).double().mean().item()
    assert abs(dropped - p) < 5 * math.sqrt(p * (1 - p) / n) + 2**-17
    rounded = round(p * 2**16) / 2**16
    assert set(found.unique().tolist()) == {
        0.0,
        float(torch.tensor(1 / (1 - rounded), dtype=dtype)),
    }


def test_elements_are_independent():
    torch.manual_seed(0)
    kept = mask(torch.empty(2**18), 0.5).gt(0).double() - 0.5
    for distance in (1, 2, 3, 4, 5, 64):
        together = (kept[distance:] * kept[:-distance]).mean().item() * 4
        assert abs(together) < 5 / math.sqrt(2**18)


def test_gradient_is_the_mask():
    x, y = torch.randn(2, 33, 7, requires_grad=True).unbind()
    torch.manual_seed(1)
    factor = mask(y, 0.3)
    torch.manual_seed(1)
    out = add_dropout(x, y, 0.3)
    torch.testing.assert_close(out, x + y * factor)
    grad_x, grad_y = torch.autograd.grad(out, [x, y], torch.ones_like(out))
    assert torch.equal(grad_x, torch.ones_like(x)) and torch.equal(grad_y, factor)
    torch.manual_seed(1)
    assert torch.equal(dropout(y, 0.3), y * factor)


@pytest.mark.parametrize("p, training", [(0.0, True), (0.4, False)])
def test_nothing_is_dropped_nor_drawn(p, training):
    x = torch.randn(5)
    state = torch.get_rng_state()
    assert torch.equal(dropout(x, p, training), x)
    assert torch.equal(add_dropout(x, x, p, training), x + x)
    assert torch.equal(torch.get_rng_state(), state)


def test_all_is_dropped():
    assert not dropout(torch.ones(5), 1.0).any()
