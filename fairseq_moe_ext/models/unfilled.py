"""No random numbers for a model that a checkpoint fills in the next moment.

Initialising a model takes longer than reading its file (benchmarks/start_up.py measures loading).
"""

import contextlib
import functools
from typing import Any, Iterator

from fairseq import checkpoint_utils
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_FILLS = (
    Tensor.normal_,
    Tensor.uniform_,
    nn.init.kaiming_uniform_,
    nn.init.normal_,
    nn.init.uniform_,
)

_loading_all = False  # a checkpoint that must have every parameter


class _Unfilled(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None) -> Any:
        if function in _FILLS:
            return args[0] if args else kwargs["tensor"]
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def unfilled_where_loaded() -> Iterator[None]:
    """What is built within has whatever memory held, if all its parameters are loaded next."""
    with _Unfilled() if _loading_all else contextlib.nullcontext():
        yield


def apply() -> None:
    """fairseq/checkpoint_utils.py:393 builds a model and loads it, for fairseq-eval-lm,
    from_pretrained and our commands; unless told otherwise (`strict`), it accepts no missing
    parameter."""
    stock = checkpoint_utils.load_model_ensemble_and_task
    if hasattr(stock, "leaves_unfilled"):
        return

    @functools.wraps(stock)
    def load_model_ensemble_and_task(
        filenames, arg_overrides=None, task=None, strict=True, *args, **kwargs
    ):
        global _loading_all
        _loading_all = strict
        try:
            return stock(filenames, arg_overrides, task, strict, *args, **kwargs)
        finally:
            _loading_all = False

    load_model_ensemble_and_task.leaves_unfilled = True
    checkpoint_utils.load_model_ensemble_and_task = load_model_ensemble_and_task
