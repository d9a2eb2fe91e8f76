"""What would make the CPU wait for a GPU, counted on a CPU."""

from collections import Counter

import torch
from torch import Tensor
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
            name = "mask" if masks else None
        if name:
            self.counts[name] += 1
        return function(*args, **kwargs)
