"""A training that diverges ends in one line that names the last good checkpoint, which stays.

No weights that are NaN or infinite are saved (`check_weights`), so the newest checkpoint of a run
is good. Wrappers of stock's functions, put in place by `apply()`; each names the place in fairseq
0.12.2.
"""

import functools
import os
from pathlib import Path
from typing import Any, Iterable, Tuple

from fairseq.trainer import Trainer
from torch import Tensor

from .errors import NotFinite, UserError

_REMEDY = "training diverged; lower --lr or --clip-norm, or lengthen --warmup-updates"


def apply() -> None:
    """fairseq/trainer.py:947 and fairseq/optim/fp16_optimizer.py:211 end a training with a
    traceback, and :1100 goes on with a validation loss that is no number."""
    if hasattr(Trainer.train_step, "names_the_last_good"):
        return
    for name in ("train_step", "valid_step"):
        setattr(Trainer, name, _naming_the_last_good(getattr(Trainer, name)))


def _naming_the_last_good(stock):
    @functools.wraps(stock)
    def step(self, *args, **kwargs):
        try:
            return stock(self, *args, **kwargs)
        except NotFinite as error:
            what = str(error).replace(", from the last good checkpoint", "")
            reason: BaseException = error
        except FloatingPointError as error:
            what = _first_sentence(str(error))
            reason = error
        if not isinstance(reason, NotFinite):
            what += f": {_REMEDY}"
        raise UserError(f"{what}; {last_good(self.cfg.checkpoint.save_dir)}") from reason

    step.names_the_last_good = True
    return step


def _first_sentence(text: str) -> str:
    return text.strip().splitlines()[0].rstrip(":. ")


def last_good(folder: str) -> str:
    """Which checkpoint of a run there is to go on from."""
    found = [path for path in Path(folder).glob("checkpoint*.pt") if path.is_file()]
    if not found:
        return f"there is no checkpoint in {folder} yet"
    return f"the last good checkpoint is {max(found, key=lambda path: path.stat().st_mtime_ns)}"


def check_weights(weights: Iterable[Tuple[str, Any]], filename: str, saving: bool) -> None:
    """Raise UserError for weights, by name, that are NaN or infinite.

    Args:
        filename: where they are to be saved, or come from.
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
            f"{name} holds NaN or infinity, so {filename} is not written: {_REMEDY}; "
            f"{last_good(os.path.dirname(filename) or '.')}"
        )
