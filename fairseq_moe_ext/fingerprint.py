"""Which dictionary a checkpoint's token ids are of: a fingerprint, saved with it and compared.

The state of a task with one dictionary gets, in every checkpoint,

    dictionary_fingerprint  {sha256, types}: of the symbols in the order of their ids, each with a
                            newline behind it, and how many those are

Only the order of symbols gives ids their meaning: the counts in dict.txt are no part of it, nor is
the filling at its end (madeupword0000, ...), in whose place symbols may come later. A checkpoint
without a fingerprint, of before there were any, is judged by its number of types alone.

The wrappers that ask for it are in patches/ (checkpoint_io.py, tasks.py).
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
_FILLING = re.compile(r"madeupword\d+")  # fairseq/data/dictionary.py:195@0.12.2


def fingerprint(dictionary: Dictionary, types: Optional[int] = None) -> Dict[str, Any]:
    """Of the first `types` symbols, or of all but the filling."""
    symbols = dictionary.symbols
    if types is None:
        types = len(symbols)
        while types and _FILLING.fullmatch(symbols[types - 1]):
            types -= 1
    text = "".join(f"{symbol}\n" for symbol in symbols[:types])
    return {
        "sha256": hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest(),
        "types": types,
    }


def check(task: FairseqTask, saved: Optional[Dict[str, Any]], checkpoint: str) -> None:
    """Raise UserError if the task's dictionary is another than the one that a checkpoint was
    trained with. One of fewer types is told of by the model, which does not fit."""
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
            f"{own['sha256'][:12]}, the checkpoint's {saved['sha256'][:12]}), so that the same "
            f"numbers are other tokens: use the {DICTIONARY} that the checkpoint was trained with"
        )


def note(state: Dict[str, Any], path: str) -> None:
    """A checkpoint was loaded: compare, if a trainer is to go on from it, which leaves the task's
    state alone (fairseq/trainer.py:497@0.12.2); else leave the file's name for the task."""
    task_state = state.get("task_state") or {}
    saved = task_state.get(KEY)
    if saved is not None:
        under_way = context.loading.get()
        if under_way is not None:
            check(under_way.trainer.task, saved, path)
        state["task_state"] = {**task_state, KEY: {**saved, "of": str(path)}}
