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
from pathlib import Path
from typing import Any, Dict, Mapping, Optional

from fairseq.data import Dictionary
from fairseq.tasks import FairseqTask
from torch import Tensor

from . import context, tokenizer_files
from .data_bin import DICTIONARY, FILLING
from .errors import UserError

KEY = "dictionary_fingerprint"


def fingerprint(dictionary: Dictionary, size: Optional[int] = None) -> Dict[str, Any]:
    """The fingerprint of the first `size` symbols, or of all without the padding."""
    symbols = dictionary.symbols
    if size is None:
        size = len(symbols)
        while size and FILLING.fullmatch(symbols[size - 1]):
            size -= 1
    text = "".join(f"{symbol}\n" for symbol in symbols[:size])
    return {
        "sha256": hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest(),
        "types": size,
    }


def check(task: FairseqTask, saved: Optional[Dict[str, Any]]) -> None:
    """Raise UserError if the task's dictionary is not the one that a checkpoint was trained with.

    Args:
        saved: what `note` found in the checkpoint.
    """
    dictionary = getattr(task, "dictionary", None)
    if saved is None or not isinstance(dictionary, Dictionary):
        return
    check_symbols(dictionary, _file(task), saved)
    lacking = saved.get("vocabulary", len(dictionary)) - len(dictionary)
    if lacking:
        remedy = f"use the {DICTIONARY} that it was trained with"
        if lacking > 0:
            remedy += (
                ", or" if saved.get("types") is not None else "; if it is the same one, padded,"
            )
            remedy += f" append {lacking} lines: madeupword1000 0, madeupword1001 0, ..."
        raise UserError(
            f"{_checkpoint(saved)}: has a vocabulary of {saved['vocabulary']}, but {_file(task)} "
            f"one of {len(dictionary)}: {remedy}"
        )


def check_symbols(dictionary: Dictionary, file: str, saved: Dict[str, Any]) -> None:
    """Raise UserError if the order of a dictionary's symbols is not the saved one."""
    types: Any = saved.get("types")
    own = saved if types is None else fingerprint(dictionary, types)
    if own.get("sha256") != saved.get("sha256"):
        differ = f"sha256 of its {types:,} symbols {own['sha256'][:12]}, the checkpoint's "
        differ += saved["sha256"][:12]
        if len(dictionary) < types:
            differ = f"it has {len(dictionary):,} symbols, the checkpoint's {types:,}"
        raise UserError(
            f"{file}: not the dictionary of {_checkpoint(saved)} ({differ}), so its ids "
            f"mean other tokens: use the {DICTIONARY} that the checkpoint was trained with"
        )


def check_folder(path: str, state: Dict[str, Any], data: Path) -> None:
    """Raise UserError if the tokenizer in a folder is not the one that a checkpoint's state has the
    fingerprint and the digests of."""
    saved = (state.get("task_state") or {}).get(KEY)
    file = data / DICTIONARY
    if isinstance(saved, dict):
        check_symbols(Dictionary.load(str(file)), str(file), {**saved, "of": path})
    tokenizer_files.check_digests(Path(path), tokenizer_files.digests_in(state), data)


def check_tokenizer(task: FairseqTask, saved: Dict[str, Any]) -> None:
    """Raise UserError if the BPE in a task's data folder is not the checkpoint's. All BPEs of one
    size have the same symbols, so a folder of another one may have the model's dict.txt."""
    data = tokenizer_files.data_of(task)
    if data is not None:
        digests = saved.get(tokenizer_files.KEY) or {}
        tokenizer_files.check_digests(Path(_checkpoint(saved)), digests, data)


def check_bpe(given: Mapping[str, Any], saved: Dict[str, Any]) -> None:
    """Raise UserError if files of a BPE that settings name are not the checkpoint's."""
    digests = saved.get(tokenizer_files.KEY) or {}
    tokenizer_files.check_given(Path(_checkpoint(saved)), digests, given)


def _checkpoint(saved: Dict[str, Any]) -> str:
    return str(saved.get("of", "the checkpoint"))


def _file(task: FairseqTask) -> str:
    """The file of a task's dictionary."""
    data = tokenizer_files.data_of(task)
    return str(data / DICTIONARY) if data else "the dictionary"


def note(state: Dict[str, Any], path: str) -> None:
    """After a checkpoint is loaded: compare at once if a trainer resumes from it, because a trainer
    ignores the task's state (fairseq/trainer.py:497@0.12.2). Otherwise store the file's name for
    the task."""
    task_state = state.get("task_state") or {}
    saved = {**(task_state.get(KEY) or {}), "of": str(path)}
    saved[tokenizer_files.KEY] = tokenizer_files.digests_in(state)
    embedding = (state.get("model") or {}).get("decoder.embed_tokens.weight")
    if isinstance(embedding, Tensor):
        saved["vocabulary"] = len(embedding)
    under_way = context.loading.get()
    if under_way is not None:
        check(under_way.trainer.task, saved)
        check_tokenizer(under_way.trainer.task, saved)
    state["task_state"] = {**task_state, KEY: saved}
