"""Which dictionary a checkpoint's token ids are of: a fingerprint, saved with it and compared.

The state of a task with one dictionary gets, in every checkpoint,

    dictionary_fingerprint  {sha256, types}: of the symbols in the order of their ids, each with a
                            newline behind it, and how many those are

Only the order of symbols gives ids their meaning: the counts in dict.txt are no part of it, nor is
the filling at its end (madeupword0000, ...), in whose place symbols may come later. A checkpoint
without a fingerprint, of before there were any, is judged by its number of types alone.

Wrappers of stock's functions, put in place by `apply()`; each names the place in fairseq 0.12.2.
"""

import functools
import hashlib
import os
import re
from typing import Any, Dict, Optional

from fairseq import checkpoint_utils, utils
from fairseq.data import Dictionary
from fairseq.tasks import FairseqTask
from fairseq.trainer import Trainer

from .data_bin import DICTIONARY
from .errors import UserError

KEY = "dictionary_fingerprint"
_FILLING = re.compile(r"madeupword\d+")  # fairseq/data/dictionary.py:177
_restoring: Optional[FairseqTask] = None  # the task of the trainer that loads a checkpoint


def apply() -> None:
    """Put the wrappers in place, once."""
    if hasattr(FairseqTask.state_dict, "has_fingerprint"):
        return
    _save_it()
    _compare_where_models_are_loaded()
    _compare_where_training_goes_on()


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


def _save_it() -> None:
    """fairseq/trainer.py:410 saves the state of the task."""
    stock = FairseqTask.state_dict

    @functools.wraps(stock)
    def state_dict(self):
        state = stock(self)
        dictionary = getattr(self, "dictionary", None)
        if isinstance(dictionary, Dictionary):
            state = {**state, KEY: fingerprint(dictionary)}
        return state

    state_dict.has_fingerprint = True
    FairseqTask.state_dict = state_dict


def _compare_where_models_are_loaded() -> None:
    """fairseq/checkpoint_utils.py:439 gives the state to the task, before the model is built; and
    :281, through which all checkpoints come, knows the file."""
    stock, stock_read = FairseqTask.load_state_dict, checkpoint_utils.load_checkpoint_to_cpu

    @functools.wraps(stock)
    def load_state_dict(self, state_dict):
        rest = dict(state_dict)
        saved = rest.pop(KEY, None)
        check(self, saved, (saved or {}).get("of", "the checkpoint"))
        stock(self, rest)

    @functools.wraps(stock_read)
    def load_checkpoint_to_cpu(path, *args, **kwargs):
        state = stock_read(path, *args, **kwargs)
        task_state = state.get("task_state") or {}
        saved = task_state.get(KEY)
        if saved is not None:
            if _restoring is not None:
                check(_restoring, saved, path)
            state["task_state"] = {**task_state, KEY: {**saved, "of": str(path)}}
        return state

    FairseqTask.load_state_dict = load_state_dict
    checkpoint_utils.load_checkpoint_to_cpu = load_checkpoint_to_cpu


def _compare_where_training_goes_on() -> None:
    """fairseq/trainer.py:449 (--restore-file, --finetune-from-model, a run that goes on) leaves the
    task's state alone."""
    stock = Trainer.load_checkpoint

    @functools.wraps(stock)
    def load_checkpoint(self, *args, **kwargs):
        global _restoring
        _restoring = self.task
        try:
            return stock(self, *args, **kwargs)
        finally:
            _restoring = None

    Trainer.load_checkpoint = load_checkpoint
