"""What would make the CPU wait for a GPU, counted on a CPU."""

from collections import Counter
from unittest.mock import patch

import torch
from torch import Tensor
from torch.autograd import _engine_run_backward
from torch.overrides import TorchFunctionMode

# They bring numbers of a tensor, or sizes that depend on them, to the CPU.
READS = {
    getattr(owner, name): name
    for owner, names in {
        Tensor: "item tolist cpu numpy __bool__ __int__ __float__ __index__ nonzero masked_select"
        " unique bincount",
        torch: "nonzero masked_select unique bincount",
    }.items()
    for name in names.split()
}
# They copy numbers of Python's to the tensor's device: a GPU finishes its work first.
COPIES = {torch.tensor, torch.as_tensor}
BACKWARD = {Tensor.backward, torch.autograd.backward, torch.autograd.grad}


class Waits(TorchFunctionMode):
    """Counts calls by name while it is entered, in `counts`."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = READS.get(function)
        if function in COPIES and kwargs.get("device") is not None:
            name = "tensor"
        elif function is Tensor.new_tensor:
            name = "new_tensor"
        elif function in (torch.repeat_interleave, Tensor.repeat_interleave):
            name = None if "output_size" in kwargs or isinstance(args[1], int) else "interleave"
        elif function in (Tensor.__getitem__, Tensor.__setitem__):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            masks = [i for i in index if isinstance(i, Tensor) and i.dtype == torch.bool]
            lists = [i for i in index if isinstance(i, list)]  # a copy
            name = "mask" if masks else "list" if lists else None
        if name:
            self.counts[name] += 1
        if function in BACKWARD:
            with patch("torch.autograd._engine_run_backward", self._counted):
                return function(*args, **kwargs)
        return function(*args, **kwargs)

    def _counted(self, *args, **kwargs):
        """PyTorch leaves a mode while it calls its __torch_function__, and so for all of a backward
        pass."""
        with self:
            return _engine_run_backward(*args, **kwargs)
