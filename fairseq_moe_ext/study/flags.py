"""The flags of `fairseq-train` that a study's file gives."""

from typing import Any, Dict, List, Mapping, Tuple

from .. import ranges
from ..errors import UserError
from ..wording import short
from . import command_line

COUNTED = ("batch-size", "update-freq", "required-batch-size-multiple")  # for all runs alike

_OURS = (
    *("arch", "seed", "max-update", "total-num-update", "save-dir", "tokens-per-sample", "task"),
    *("user-dir", "distributed-world-size"),
)
# with which a run would train on other tokens than `context`, COUNTED and the updates say
_UNCOUNTED = (
    *("max-sentences", "max-tokens", "sample-break-mode", "max-epoch", "patience"),
    *("stop-time-hours", "stop-min-lr", "restore-file", "continue-once"),
)
# with which a run would have no readable log or checkpoint_best.pt, or would choose another
_UNREAD = (
    *("log-format", "no-save", "disable-validation", "best-checkpoint-metric"),
    *("maximize-best-checkpoint-metric", "checkpoint-suffix", "use-sharded-state"),
)
_REFUSED = {
    **dict.fromkeys(_OURS, "the study sets this itself (arch, seeds, updates, ...)"),
    **dict.fromkeys(
        _UNCOUNTED,
        "remove it: every run makes all of its updates, each on batch-size blocks of context "
        "tokens",
    ),
    **dict.fromkeys(
        _UNREAD,
        "remove it: the study reads each run's log as JSON and evaluates checkpoint_best.pt, the "
        "checkpoint with the lowest in-domain perplexity",
    ),
    "add-bos-token": "remove it: `fairseq-moe evaluate` starts no text with <s>",
}
_HARMLESS = [
    *(("log-format", "json"), ("best-checkpoint-metric", "in_domain_ppl")),
    *((flag, False) for flag in (*_UNREAD, "add-bos-token")),
]


def check_flag(flag: Any, value: Any, where: str) -> None:
    """Raise UserError for a flag that a study cannot have, or for no flag."""
    if not isinstance(flag, str) or flag.startswith("-") or "_" in flag:
        raise UserError(
            f"{where}: {flag!r}: write flags without leading dashes, such as batch-size"
        )
    if flag in _REFUSED and (flag, value) not in _HARMLESS:
        raise UserError(f"{where}: {flag}: {_REFUSED[flag]}")
    name = flag.replace("-", "_")
    kinds: Tuple[type, ...] = (str, int, float)
    if name in ranges.RANGES and ranges.RANGES[name].items != 0:
        kinds += (list,)
    if not isinstance(value, kinds):
        raise UserError(f"{where}: {flag} {short(repr(value))}: use a number, text, true or false")
    ranges.check({name: value}, lambda name: f"{where}: {flag}")


def blocks_per_update(train: Mapping[str, Any], where: str) -> int:
    """The blocks that an update has. Raises UserError for any invalid flag in `train`."""
    for flag, value in train.items():
        check_flag(flag, value, where)
    batch, freq = train.get("batch-size"), train.get("update-freq", 1)
    if batch is None:
        raise command_line.no_batch_size(train, where)
    if type(batch) is not int or batch < 1:
        raise UserError(f"{where}: batch-size {batch}: set the number of blocks per update")
    for flag in COUNTED[1:]:
        if type(train.get(flag, 1)) is not int:
            raise UserError(f"{where}: {flag} {train[flag]!r}: write a whole number")
    # fairseq lowers other batches to a multiple (fairseq/data/data_utils.py:306@0.12.2)
    multiple = train.get("required-batch-size-multiple", 8)
    if batch > multiple and batch % multiple:
        raise UserError(
            f"{where}: batch-size {batch}: fairseq would train on {batch // multiple * multiple} "
            f"blocks, a multiple of {multiple}; use one, or set required-batch-size-multiple"
        )
    return batch * freq


def as_words(flags: Dict[str, Any]) -> List[str]:
    """{"lr": 0.1, "cpu": True} -> --lr 0.1 --cpu; False leaves a flag out."""
    words = []
    for flag, value in flags.items():
        if value is not False:
            words += [f"--{flag}"] if value is True else [f"--{flag}", str(value)]
    return words
