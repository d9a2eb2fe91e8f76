"""A fingerprint of the dictionary, saved in checkpoints and compared when they are loaded.

In every checkpoint, the state of a task with one dictionary contains

    dictionary_fingerprint  {sha256, types}: the digest of the symbols in the order of their ids,
                            each followed by a newline, and their number

Only the order of the symbols gives ids their meaning. The counts in dict.txt do not matter, nor
does the padding at its end (madeupword0000, ...), which later symbols may replace. For an older
checkpoint without a fingerprint only the size of the vocabulary is checked.

The wrappers in patches/ (checkpoint_io.py, tasks.py) call this module.
"""

import hashlib
import os
import re
from typing import Any, Dict, Optional

from fairseq import utils
from fairseq.data import Dictionary
from fairseq.tasks import FairseqTask

from . import context
from .data_bin import DICTIONARY
from .errors import UserError

KEY = "dictionary_fingerprint"
_PADDING = re.compile(r"madeupword\d+")  # fairseq/data/dictionary.py:195@0.12.2


def fingerprint(dictionary: Dictionary, size: Optional[int] = None) -> Dict[str, Any]:
    """The fingerprint of the first `size` symbols, or of all without the padding."""
    symbols = dictionary.symbols
    if size is None:
        size = len(symbols)
        while size and _PADDING.fullmatch(symbols[size - 1]):
            size -= 1
    text = "".join(f"{symbol}\n" for symbol in symbols[:size])
    return {
        "sha256": hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest(),
        "types": size,
    }


def check(task: FairseqTask, saved: Optional[Dict[str, Any]], checkpoint: str) -> None:
    """Raise UserError if the task's dictionary is not the one that a checkpoint was trained with. A
    smaller dictionary is left to the model, which then does not fit."""
    dictionary = getattr(task, "dictionary", None)
    if saved is None or not isinstance(dictionary, Dictionary):
        return
    if len(dictionary) < saved["types"]:
        return
    own = fingerprint(dictionary, saved["types"])
    if own["sha256"] != saved["sha256"]:
        data = getattr(getattr(task, "args", None) or task.cfg, "data", None)
        file = os.path.join(utils.split_paths(data)[0], DICTIONARY) if data else "the dictionary"
        raise UserError(
            f"{file}: not the dictionary of {checkpoint} (sha256 of its {saved['types']:,} symbols "
            f"{own['sha256'][:12]}, the checkpoint's {saved['sha256'][:12]}), so its "
            f"ids mean other tokens: use the {DICTIONARY} that the checkpoint was trained with"
        )


def note(state: Dict[str, Any], path: str) -> None:
    """After a checkpoint is loaded: compare at once if a trainer resumes from it, because a trainer
    ignores the task's state (fairseq/trainer.py:497@0.12.2). Otherwise store the file's name for
    the task."""
    task_state = state.get("task_state") or {}
    saved = task_state.get(KEY)
    if saved is not None:
        under_way = context.loading.get()
        if under_way is not None:
            check(under_way.trainer.task, saved, path)
        state["task_state"] = {**task_state, KEY: {**saved, "of": str(path)}}
