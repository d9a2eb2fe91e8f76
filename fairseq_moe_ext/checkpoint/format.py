"""The format of checkpoints with separate expert files: every key and every name.

    checkpoint_last.pt                  all but the experts, and under MANIFEST a Manifest
    experts/<save>-<first>-<count>.pt   a Piece: count experts from `first` on

The fields of these classes are the keys in the files. Nothing else names them.
"""

from __future__ import annotations

import os
import re
import secrets
from dataclasses import dataclass, fields
from typing import Any, Dict, List, Mapping, Optional, Tuple, Type, TypeVar

from ..errors import UserError
from ..files import digest_of

VERSION = 1
FOLDER = "experts"  # beside the checkpoints
MANIFEST = "experts"  # key of the manifest in a checkpoint
FILE_NAME = re.compile(r"\d+-\d+-[0-9a-f]{16}-\d+-\d+\.pt(\.tmp)?")  # .tmp: being written

_VERSION_KEY = "format"
_IDENTITY = ("save", "first", "count")  # keys by which a file of experts is known

_T = TypeVar("_T")


@dataclass(frozen=True)
class ExpertFile:
    """A file of experts, as the manifest lists it."""

    name: str  # from the checkpoint's folder, with slashes
    first: int
    count: int
    bytes: int
    sha256: Optional[str] = None  # older manifests have none

    @property
    def end(self) -> int:
        return self.first + self.count

    def path(self, checkpoint: str) -> str:
        """Its path beside its checkpoint, which may be a link."""
        return os.path.join(os.path.dirname(os.path.realpath(checkpoint)), *self.name.split("/"))


@dataclass(frozen=True)
class Manifest:
    """The expert files of a checkpoint."""

    save: str  # one name for every save, so that files of two saves never mix
    num_experts: int
    indices: Dict[str, int]  # an experts' parameter -> its number in the optimizer
    files: List[ExpertFile]  # in the order of their experts
    world_size: int = 0  # of those who wrote it
    code: str = ""

    def write(self) -> Dict[str, Any]:
        files = [{k: v for k, v in vars(file).items() if v is not None} for file in self.files]
        return {_VERSION_KEY: VERSION, **vars(self), "files": files}

    @staticmethod
    def read(path: str, state: Mapping[str, Any]) -> Optional[Manifest]:
        """The manifest in a checkpoint's state; None if all is in the one file. UserError for one
        of a newer version, or a damaged one."""
        if not isinstance(state, Mapping) or MANIFEST not in state:
            return None
        try:
            saved = state[MANIFEST]
            if saved[_VERSION_KEY] > VERSION:
                raise UserError(
                    f"{path}: has format {saved[_VERSION_KEY]}, but this fairseq_moe_ext reads "
                    f"formats up to {VERSION}: install the version that wrote it"
                )
            files = [_read(ExpertFile, file) for file in saved["files"]]
            return _read(Manifest, {**saved, "files": files})
        except (AttributeError, KeyError, TypeError) as error:
            raise UserError(
                f"{path}: its list of expert files cannot be read ({error!r}): it is damaged; copy "
                "it again, or use another checkpoint"
            ) from error


@dataclass(frozen=True)
class Piece:
    """Some experts, as one file has them."""

    save: str
    first: int
    count: int
    model: Dict[str, Any]  # by parameter, tensors (count, ...)
    optimizer: Dict[str, Dict[str, Any]]  # by parameter; {} where none was saved

    def write(self) -> Dict[str, Any]:
        return dict(vars(self))

    @staticmethod
    def read(state: Mapping[str, Any]) -> Piece:
        return _read(Piece, state)


def is_piece(state: Mapping[str, Any]) -> bool:
    return set(_IDENTITY) <= state.keys()


def check_kind(path: str, state: Any) -> None:
    """Raise UserError for a state that is not a checkpoint, or only a part of one."""
    if not isinstance(state, dict) or not isinstance(state.get("model"), dict):
        raise UserError(
            f"{path}: not a fairseq checkpoint: it contains no model; name another file"
        )
    if is_piece(state):
        raise UserError(
            f"{path}: contains only experts; name the checkpoint beside the folder {FOLDER}"
        )


def new_save(state: Mapping[str, Any]) -> str:
    """A name for a save of a state of fairseq's, which no other save has."""
    position = (state.get("extra_state") or {}).get("train_iterator") or {}
    updates = last_history(state).get("num_updates", 0)
    return f"{position.get('epoch', 1)}-{updates}-{secrets.token_hex(8)}"


def save_of(state: Mapping[str, Any]) -> Tuple[Optional[str], int, float]:
    """What tells a save from the others of its training: the name, updates, seconds of training."""
    seconds = (state.get("extra_state") or {}).get("previous_training_time") or 0  # or a tensor
    name = (state.get(MANIFEST) or {}).get("save")
    return name, last_history(state).get("num_updates", 0), float(seconds)


def last_history(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a checkpoint says of the optimizer of its last run. Its num_updates are 0 where the file
    was made without training, or has only weights: then its settings of training may be
    nobody's."""
    return (state.get("optimizer_history") or [{}])[-1] or {}


def file_name(save: str, first: int, count: int) -> str:
    return f"{FOLDER}/{save}-{first}-{count}.pt"


def describe(name: str, first: int, count: int, path: str) -> ExpertFile:
    """The manifest's entry for a file, which is now at `path`."""
    return ExpertFile(name, first, count, os.path.getsize(path), digest_of(path))


def _read(kind: Type[_T], saved: Mapping[str, Any]) -> _T:
    """Raises TypeError for a missing field. Ignores unknown fields."""
    known = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    return kind(**{key: value for key, value in saved.items() if key in known})
