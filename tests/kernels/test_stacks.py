"""The gradient of many experts' parameters is scaled, without a copy where it stays as it is."""

import pytest
import torch

from fairseq_moe_ext.kernels.stacks import scale_gradient


def gradient(scale, unused=()):
    """What comes in and what goes out."""
    x = torch.zeros(4, 3, 2, dtype=torch.float64, requires_grad=True)
    grad = torch.arange(24.0, dtype=torch.float64).view_as(x)
    (scaled,) = torch.autograd.grad(scale_gradient(x, scale, unused), x, grad)
    return grad, scaled


@pytest.mark.parametrize("unused", [[], [0, 2]])
def test_a_factor_of_one_copies_nothing(unused):
    grad, scaled = gradient(1.0, unused)
    assert scaled.data_ptr() == grad.data_ptr()


@pytest.mark.parametrize("unused", [[], [0, 2]])
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_as_a_plain_loop(scale, unused):
    _, scaled = gradient(scale, unused)
    for e in range(4):
        true = torch.arange(6.0, dtype=torch.float64).view(3, 2) + 6 * e
        assert torch.equal(scaled[e], true * (0 if e in unused else scale))
