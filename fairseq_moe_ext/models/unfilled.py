"""Skip the initialisation of a model that a checkpoint is about to fill.

Initialising a model takes longer than reading its file (benchmarks/start_up.py measures loading).
"""

import contextlib
from typing import Any, Iterator

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .. import context

_FILLS = (
    Tensor.normal_,
    Tensor.uniform_,
    nn.init.kaiming_uniform_,
    nn.init.normal_,
    nn.init.uniform_,
)


class _Unfilled(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None) -> Any:
        if function in _FILLS:
            return args[0] if args else kwargs["tensor"]
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def unfilled_where_loaded() -> Iterator[None]:
    """Parameters built in this context stay uninitialised if a checkpoint is about to fill all of
    them."""
    building = context.building.get()
    with _Unfilled() if building and building.whole else contextlib.nullcontext():
        yield
