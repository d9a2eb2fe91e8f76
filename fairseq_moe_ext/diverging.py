"""Stops a training that diverges with one line that names the last good checkpoint.

Weights that are NaN or infinite are never saved (`check_weights`), so the newest checkpoint of a
run is good. patches/trainer.py reports it.
"""

import math
import os
import re
from pathlib import Path
from typing import Any, Iterable, Tuple

from torch import Tensor

from .errors import UserError

REMEDY = (
    "training diverged; lower --lr, clip gradients (--clip-norm 1 or less), or lengthen "
    "--warmup-updates"
)


def what_is_wrong(text: str) -> str:
    """What fairseq's FloatingPointError says, in one line. On several GPUs it calls gradients
    inconsistent also where all are NaN (fairseq/trainer.py:1460@0.12.2)."""
    first = text.strip().splitlines()[0].rstrip(":. ")
    norms = re.findall(r"^rank +(\d+) = (\S+)$", text, re.M)
    if not norms:
        return f"{first}: {REMEDY}"
    if not any(math.isfinite(float(norm)) for _, norm in norms):
        return f"the gradients are NaN or infinite: {REMEDY}"
    seen = ", ".join(f"{norm} on process {rank}" for rank, norm in norms)
    return f"{first} (their norm is {seen})"


def last_good(folder: str) -> str:
    """A clause that names the newest checkpoint of a run."""
    checkpoints = [path for path in Path(folder).glob("checkpoint*.pt") if path.is_file()]
    if not checkpoints:
        return f"there is no checkpoint in {folder} yet"
    return (
        f"the last good checkpoint is {max(checkpoints, key=lambda path: path.stat().st_mtime_ns)}"
    )


def check_weights(weights: Iterable[Tuple[str, Any]], filename: str, saving: bool) -> None:
    """Raise UserError for weights, by name, that are NaN or infinite.

    Args:
        filename: the file that they are saved to or loaded from.
    """
    for name, value in weights:
        # stock's SinusoidalPositionalEmbedding leaves this marker of precision uninitialised
        if name.endswith("_float_tensor") or not isinstance(value, Tensor):
            continue
        if not value.is_floating_point() or not value.numel() or value.is_meta:
            continue
        low, high = value.detach().aminmax()
        if low.isfinite() and high.isfinite():
            continue
        if not saving:
            raise UserError(
                f"{filename}: {name} holds NaN or infinity: the file is damaged or its training "
                "diverged; use an earlier one"
            )
        raise UserError(
            f"{name} holds NaN or infinity, so {filename} is not written: {REMEDY}; "
            f"{last_good(os.path.dirname(filename) or '.')}"
        )
