"""The tokenizer that travels with a model: dict.txt and, for byte-level BPE, encoder.json and
vocab.bpe.

Training copies these files beside its checkpoints, and `fairseq-moe convert` beside what it writes.
Every checkpoint has their digests:

    task_state["tokenizer"]   {file: sha256}

so that files of another model are detected. For an older checkpoint, or one without these files
beside it, they are taken from the data folder that it was trained on, which its settings name.
"""

import filecmp
import logging
import os
import shutil
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional

from .data_bin import DICTIONARY, TOKENIZER, first_folder
from .errors import UserError
from .files import digest_of
from .outputs import temporary_name

KEY = "tokenizer"
NAMES = (DICTIONARY, *TOKENIZER)
GIVEN = ("gpt2_encoder_json", "gpt2_vocab_bpe")  # fairseq's settings that name these two

logger = logging.getLogger(__name__)


def files_of(data: Path) -> Dict[str, Path]:
    """The tokenizer's files by name: dict.txt of a data folder, and its BPE, in the folder or, for
    one of several corpora, in the one above with the same dictionary; {}: there is no dict.txt."""
    dictionary = data / DICTIONARY
    if not dictionary.is_file():
        return {}
    for folder in (data, data.resolve().parent):
        above = folder / DICTIONARY
        bpe_files = {name: folder / name for name in TOKENIZER}
        if not above.is_file() or not all(file.is_file() for file in bpe_files.values()):
            continue
        if above.read_bytes() == dictionary.read_bytes():
            return {DICTIONARY: dictionary, **bpe_files}
    return {DICTIONARY: dictionary}


def data_of(task: Any) -> Optional[Path]:
    """The data folder of a task of fairseq; None: it has none."""
    data = getattr(getattr(task, "args", None) or getattr(task, "cfg", None), "data", None)
    return first_folder(data) if isinstance(data, str) and data else None


def digests(data: Path) -> Dict[str, str]:
    """{file: sha256} of a data folder's tokenizer."""
    return {name: digest_of(file) for name, file in files_of(data).items()}


def copy(data: Path, folder: Path) -> None:
    """Copy a data folder's tokenizer to another folder; files of another model there are kept."""
    for name, file in files_of(data).items():
        target = folder / name
        if target.exists():
            if not filecmp.cmp(file, target, shallow=False):
                logger.warning(f"{target}: belongs to another model; this model's is {file}")
            continue
        temporary = temporary_name(target)
        shutil.copyfile(file, temporary)
        os.replace(temporary, target)


def of_checkpoint(path: Path) -> Optional[Path]:
    """The folder with a checkpoint's tokenizer; None: there is none beside it or with its training
    data. Raises UserError if the files there belong to another model."""
    state = _saved(path)
    wanted, other = digests_in(state), None
    for folder in [path.parent, *_trained_on(state)]:
        present = digests(folder)
        if present and all(present.get(name) == digest for name, digest in wanted.items()):
            return folder
        other = other or (folder if present else None)
    if other is not None:
        raise _misfit(other, path, wanted)
    return None


def folder_for(
    path: Path, data: Optional[Path], flag: str = "--data", check_bpe: bool = True
) -> Path:
    """The folder with a checkpoint's tokenizer: `data`, the value of a flag, or by default the
    tokenizer that travels with the checkpoint. Raises UserError if there is none, or another.

    Args:
        check_bpe: whether the files of the BPE in `data` must be the model's, too.
    """
    if data is not None:
        if not (data / DICTIONARY).is_file():
            raise UserError(
                f"{flag} {data}: contains no {DICTIONARY}; name the folder with the model's "
                "dictionary"
            )
        if check_bpe:
            check(path, data)
        return data
    folder = of_checkpoint(path)
    if folder is None:
        raise UserError(
            f"{path}: its tokenizer ({', '.join(NAMES)}) is neither beside it nor with its "
            f"training data: add {flag} FOLDER, or copy the files there"
        )
    return folder


def check(path: Path, *folders: Path) -> None:
    """Raise UserError if a folder's BPE is not the one that a checkpoint has digests of.
    fingerprint.py judges dict.txt, of which only the order matters."""
    recorded = digests_in(_saved(path))
    for data in folders:
        check_digests(path, recorded, data)


def check_digests(path: Path, recorded: Mapping[str, str], data: Path) -> None:
    """Like check, with the digests that the checkpoint has."""
    wanted = {n: digest for n, digest in recorded.items() if n in TOKENIZER}
    present = digests(data) if wanted else {}
    if any(name in present and present[name] != digest for name, digest in wanted.items()):
        raise _misfit(data, path, wanted)


def check_bpe(path: Path, given: Mapping[str, Any]) -> None:
    """Raise UserError if the files of a BPE that settings name are not those that a checkpoint has
    digests of."""
    check_given(path, digests_in(_saved(path)), given)


def check_given(path: Path, recorded: Mapping[str, str], given: Mapping[str, Any]) -> None:
    """Like check_bpe, with the digests that the checkpoint has."""
    for name, setting in zip(TOKENIZER, GIVEN):
        file = Path(str(given.get(setting)))
        if name in recorded and file.is_file() and digest_of(file) != recorded[name]:
            raise UserError(
                f"{file}: does not belong to the tokenizer of {path} (sha256 "
                f"{digest_of(file)[:12]}, but the checkpoint has {recorded[name][:12]}): give the "
                "model's own file, or leave out bpe and its files, so that those beside the "
                "checkpoint are taken"
            )


def _misfit(folder: Path, path: Path, wanted: Dict[str, str]) -> UserError:
    present = digests(folder)
    name = next(name for name, digest in wanted.items() if present.get(name) != digest)
    words = f"sha256 {present[name][:12]}" if name in present else "missing"
    file = files_of(folder).get(name, folder / name)
    return UserError(
        f"{file}: does not belong to the tokenizer of {path} ({words}, but the checkpoint has "
        f"{wanted[name][:12]}): name the folder with its {', '.join(wanted)}"
    )


def _saved(path: Path) -> Dict[str, Any]:
    """What a checkpoint holds, mapped; of one of the branch, its shared file."""
    from fairseq_today.torch_today import load_weights_only

    file = path if path.is_file() else path.with_name(f"{path.stem}-shared.pt")
    if not file.is_file():
        return {}
    state = load_weights_only(str(file), map_location="cpu", mmap=True)
    return state if isinstance(state, dict) else {}


def digests_in(state: Dict[str, Any]) -> Dict[str, str]:
    """The digests of tokenizer files that a checkpoint has, by file name."""
    task_state = state.get("task_state")
    recorded = task_state.get(KEY) if isinstance(task_state, dict) else None
    recorded = recorded if isinstance(recorded, dict) else {}
    return {name: digest for name, digest in recorded.items() if name in NAMES}


def _trained_on(state: Dict[str, Any]) -> List[Path]:
    """The data folder that a checkpoint's settings name."""
    task = (state.get("cfg") or {}).get("task") or {}
    data = task.get("data") if hasattr(task, "get") else getattr(task, "data", None)
    data = data or getattr(state.get("args"), "data", None)
    return [first_folder(data)] if isinstance(data, str) and data else []
