"""torch.compile of the decoder's layers in training (`--compile`)."""

import functools
from typing import Any, Callable, Dict, Union

import torch

from ..errors import UserError
from . import attention

# Compiled dropout draws the same random numbers as dropout that is not compiled.
_OPTIONS: Dict[str, Union[str, int, bool, Callable[..., Any]]] = {"fallback_random": True}


@functools.cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, compiled at the first call with each kind of input. It is not kept in
    a module, which could then be neither copied nor saved. Layers of one shape share it."""
    _keep_out_of_attention()
    return torch.compile(function, options=_OPTIONS)


@functools.cache
def _keep_out_of_attention() -> None:
    """Call our attention between two compiled parts: it draws the same dropout with and without
    --compile. As a decorator this would import torch._dynamo, in 0.8 s, in every command."""
    attention.causal_attention = torch.compiler.disable(attention.causal_attention)


@functools.cache
def check(cpu: bool) -> None:
    """Compile a sum: the best test of whether everything that torch.compile needs is installed.

    Args:
        cpu: whether the model stays on the CPU, also beside a GPU.

    Raises:
        UserError: it fails. No C++ compiler, on a GPU no Triton, a Python that this PyTorch cannot
            compile.
    """
    # What an earlier process has compiled does not show that this one can.
    options = {**_OPTIONS, "fx_graph_cache": False}
    here = torch.ones(8, device="cuda" if torch.cuda.is_available() and not cpu else "cpu")
    try:
        torch.compile(lambda x: x + 1, options=options)(here)
    except Exception as error:  # of many kinds, from Python's version to the compiler's own
        lines = [line for line in str(error).splitlines() if line and "raised:" not in line]
        reason = lines[0].strip()[:200] if lines else type(error).__name__
        raise UserError(
            f"--compile: torch.compile does not work here ({reason}): install what is missing (a "
            "C++ compiler, g++ or that of CXX; on a GPU Triton), or remove --compile"
        ) from error
