"""torch.compile of the decoder's layers (`--compile`)."""

import importlib.util
import os
import shutil
from typing import Iterable

import torch
from torch import nn

from ..errors import UserError

# The random numbers of dropout as without the compiler, so that it changes no result.
_OPTIONS = {"fallback_random": True}


def compile_layers(layers: Iterable[nn.Module]) -> None:
    """Compile in place, so that names of parameters stay. Of a layer with experts, the attention:
    the number of an expert's rows is known on the host at run time only.

    Raises UserError where there is no compiler.
    """
    if torch.cuda.is_available():
        there, needed = importlib.util.find_spec("triton") is not None, "Triton"
    else:
        compilers = (os.environ.get("CXX", ""), "g++", "clang++")
        there, needed = any(map(shutil.which, filter(None, compilers))), "a C++ compiler (g++)"
    if not there:
        raise UserError(
            f"--compile needs {needed}, which is not here: install it, or drop --compile (for a "
            "checkpoint trained with it: --model-overrides \"{'compile': False}\")"
        )
    for layer in layers:
        part = layer if layer.moe_layer is None else layer.self_attn
        part.compile(options=_OPTIONS)
