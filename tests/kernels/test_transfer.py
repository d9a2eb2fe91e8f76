"""Numbers arrive as torch.tensor has them."""

import pytest
import torch

from fairseq_moe_ext.kernels.transfer import to_device

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, needs_gpu])]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("numbers", [[], [3], [0, 5, 2**40]])
def test_as_torch_tensor(numbers, device):
    there = to_device(numbers, torch.device(device))
    assert there.dtype == torch.int64 and there.device.type == device
    assert there.tolist() == numbers
