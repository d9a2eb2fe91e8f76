"""What a ladder's file cannot have: flags that the ladder sets, text where costs need a number, or
another vocabulary than the data's."""

from pathlib import Path
from typing import Any, Mapping

from fairseq.data import Dictionary

from ... import ranges
from ...errors import UserError

_SET_ELSEWHERE = {
    **{"lr": "learning-rate", "warmup-updates": "warmup", "updates": "stages: tokens"},
    **{"moe-expert-count": "experts", "moe-expert-ffn-dim": "granularity"},
    "moe-top-k": "granularity",
}


def check_vocabulary(vocabulary: int, dictionary: Path, path: Path) -> None:
    """Raise UserError unless the ladder's file, `path`, has the size of the dictionary, if that is
    there yet: half of a small model's FLOPs are the vocabulary's."""
    if dictionary.is_file():
        entries = len(Dictionary.load(str(dictionary)))
        if entries != vocabulary:
            raise UserError(
                f"{path}: vocabulary {vocabulary}: {dictionary} has {entries} entries, with "
                f"fairseq's own; write {entries}"
            )


def check_whole(flags: Mapping[str, Any], where: str) -> None:
    """Raise UserError for a whole number in quotes: costs are computed from the flags as they are
    in the file."""
    for flag, value in flags.items():
        allowed = ranges.RANGES.get(flag.replace("-", "_"), ranges.FINITE)
        if isinstance(value, str) and allowed.whole:
            raise UserError(f"{where}: {flag} {value!r}: write it without quotes")


def check_set_here(flags: Mapping[str, Any], where: str) -> None:
    """Raise UserError for a flag that the ladder sets."""
    for flag in flags:
        if flag in _SET_ELSEWHERE:
            key = _SET_ELSEWHERE[flag]
            raise UserError(f"{where}: {flag}: remove it; the ladder's key '{key}' sets it")
