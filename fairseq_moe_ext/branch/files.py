"""Finds the files of a checkpoint of the branch."""

import functools
import glob
import os
import re
import stat
from argparse import Namespace
from typing import Any, Dict, List, NamedTuple, Optional

from fairseq_today.torch_today import load_weights_only

from ..checkpoint.format import MANIFEST, check_kind
from ..checkpoint.settings import check_settings
from ..errors import UserError
from ..expert_parallel import is_expert
from ..models.architectures import name_of

State = Dict[str, Any]

_PART = re.compile(r"(?P<base>.+?)-(shared|rank-(?P<rank>\d+))(-shard(?P<shard>\d+))?\.pt")


class BranchFiles(NamedTuple):
    """The files of one checkpoint."""

    base: str  # the name by which it goes, X.pt
    shared: str
    ranks: Dict[int, str]
    shards: Dict[int, str]  # FSDP's shared files, one of each process

    @property
    def all(self) -> List[str]:
        return sorted({self.shared, *self.ranks.values(), *self.shards.values()})


def find(path: str) -> Optional[BranchFiles]:
    """The files of the checkpoint that `path` names: X.pt, or one of its parts. A dense X.pt is a
    single file. None if it is not a checkpoint of the branch; an X.pt that contains experts is not.
    UserError if the shared file is missing."""
    if not path.endswith(".pt"):
        return None
    part = _PART.fullmatch(path)
    base = part["base"] if part else path[: -len(".pt")]
    shared, ranks, shards = None, {}, {}
    for file in sorted(glob.glob(glob.escape(base) + "-*.pt"), key=len, reverse=True):
        match = _PART.fullmatch(file)
        if match is None or match["base"] != base:
            continue
        if match["rank"] is not None:
            ranks[int(match["rank"])] = file  # the shortest name last: one without a shard
        elif match["shard"] is not None:
            shards[int(match["shard"])] = file
        else:
            shared = file
    if not ranks:
        return BranchFiles(path, path, {0: path}, {}) if _is_dense(path) else None
    whole = base + ".pt"
    if part is None and os.path.exists(whole):
        state = load(whole)
        if _has_experts(state) or not _is_of_branch(state):
            return None  # one of ours, beside the branch's from which its run began
        shared = whole  # the shared file under another name, as some guides advise
    if shared is None and not shards:
        raise UserError(
            f"{base}-shared.pt: missing, although {ranks[min(ranks)]} is there; a checkpoint of "
            "fairseq's moe branch needs both, with one -rank- file per process: copy it again"
        )
    return BranchFiles(whole, shared or shards[min(shards)], ranks, shards)


def is_part(path: str, base: str) -> bool:
    """Whether a file is the shared one or one of the ranks' of BASE.pt."""
    match = _PART.fullmatch(path)
    return match is not None and match["base"] == base


def check_name(path: str, flag: str = "") -> None:
    """Raise UserError if a file, which is to be written, would be taken for a part of a checkpoint
    of the branch. `flag`: what names it, with a space."""
    part = _PART.fullmatch(path)
    if part is None:
        return
    others = glob.glob(glob.escape(part["base"]) + "-rank-*.pt")
    if part["rank"] is not None or any(is_part(file, part["base"]) for file in others):
        raise UserError(
            f"{flag}{path}: would be read as a part of {part['base']}.pt, a checkpoint of "
            "fairseq's moe branch; choose a name without -rank- and -shared"
        )


def load(path: str) -> State:
    """A part, mapped into memory. UserError if it is not a checkpoint."""
    state = load_weights_only(path, map_location="cpu", mmap=True)
    check_kind(path, state)
    check_settings(path, state)
    return state


def _has_experts(state: State) -> bool:
    """Whether a checkpoint has experts or, as checkpoint/'s, names of their files."""
    return MANIFEST in state or any(is_expert(name) for name in state["model"])


def _is_of_branch(state: State) -> bool:
    """Whether a checkpoint has the branch's settings, which stock fairseq lacks."""
    settings = flat_settings(state)
    task = (state.get("cfg") or {}).get("task") or {}
    extended = "moe_freq" in settings or "max_source_positions" in task
    return name_of(settings).startswith("transformer_lm") and extended


def _is_dense(path: str) -> bool:
    """Whether a file contains a dense model with the branch's settings, which stock fairseq lacks.
    Unreadable files are left to the reader, which reports why."""
    try:
        status = os.stat(path)
    except OSError:
        return False
    return stat.S_ISREG(status.st_mode) and _has_dense(path, status.st_mtime_ns, status.st_size)


@functools.lru_cache(maxsize=16)
def _has_dense(path: str, changed: int, size: int) -> bool:
    """Cached for each state of a file, because files of torch before 1.6 must be read
    completely."""
    try:
        state = load(path)
    except UserError:
        return False
    return _is_of_branch(state) and not _has_experts(state)


def flat_settings(state: State) -> Dict[str, Any]:
    """The model's settings as the branch saved them: `args`, or the part `model` of `cfg`; nothing
    if neither is there."""
    settings = state.get("args") or (state.get("cfg") or {}).get("model") or {}
    return dict(vars(settings) if isinstance(settings, Namespace) else settings)


def saved_settings(path: str, state: State) -> Dict[str, Any]:
    """flat_settings of a file. Raises UserError if there are none."""
    settings = flat_settings(state)
    if not settings:
        raise UserError(
            f"{path}: contains no settings, neither args nor cfg; use another checkpoint"
        )
    return settings
