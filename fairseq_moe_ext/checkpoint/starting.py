"""Checks the checkpoint that a training starts from."""

from __future__ import annotations

import logging
import os
from typing import Any, Optional, Tuple

from fairseq.file_io import PathManager

from .. import files
from ..errors import UserError
from ..expert_parallel import process_rank
from ..wording import flag

logger = logging.getLogger(__name__)

_DEFAULT = "checkpoint_last.pt"  # fairseq/dataclass/configs.py:647@0.12.2


def check_inputs(cfg: Any, suffix: str = "") -> None:
    """Raise UserError if a checkpoint to start from is named but is not one, where stock trains
    from scratch, because it looks for a regular file (fairseq/trainer.py:465@0.12.2); or for flags
    that contradict each other, which stock finds late (fairseq/checkpoint_utils.py:205@0.12.2)."""
    if cfg.finetune_from_model is not None:
        for name in ("optimizer", "lr_scheduler", "meters", "dataloader"):
            if getattr(cfg, f"reset_{name}"):
                raise UserError(
                    "--finetune-from-model resets everything itself: remove "
                    + flag(f"reset_{name}")
                )
        if cfg.restore_file != _DEFAULT:
            raise UserError(
                f"--finetune-from-model {cfg.finetune_from_model} and --restore-file "
                f"{cfg.restore_file} both name what to start from: remove one of them"
            )
    last, restored = _last(cfg, suffix), _restored(cfg, suffix)
    if cfg.restore_file != _DEFAULT:
        _check(f"--restore-file {cfg.restore_file}", restored)
    elif os.path.lexists(last):
        _check(last, last)
    else:  # a resumed run does not read these
        for name in ("continue_once", "finetune_from_model"):
            value = getattr(cfg, name, None)
            if value is not None:
                _check(f"{flag(name)} {value}", value)


def warn_of_overwriting(cfg: Any, suffix: str = "") -> None:
    """Of the run's own checkpoint, by one that goes on from another file."""
    last, restored = _last(cfg, suffix), _restored(cfg, suffix)
    saves = process_rank() == 0 and not cfg.no_save and cfg.restore_file != _DEFAULT
    if saves and os.path.exists(last) and os.path.realpath(restored) != os.path.realpath(last):
        # fairseq/checkpoint_utils.py:238@0.12.2
        logger.warning(
            f"--restore-file {cfg.restore_file}: the run starts from it and will overwrite "
            f"{last}; to resume that one, remove the flag, or use --continue-once "
            f"{cfg.restore_file}, which is read only where there is none"
        )


def named(cfg: Any, suffix: str = "") -> Optional[Tuple[str, str]]:
    """The flag and file that a run starts from; None if that is its own checkpoint_last.pt."""
    if cfg.restore_file != _DEFAULT:
        own = is_last(cfg, _restored(cfg, suffix), suffix)
        return None if own else ("--restore-file", cfg.restore_file)
    once = getattr(cfg, "continue_once", None)
    last = _last(cfg, suffix)
    return None if once is None or os.path.lexists(last) else ("--continue-once", once)


def is_last(cfg: Any, path: str, suffix: str = "") -> bool:
    """Whether a file is the run's own checkpoint_last.pt."""
    return os.path.realpath(path) == os.path.realpath(_last(cfg, suffix))


def with_flag(cfg: Any, filename: str) -> str:
    """A file that a run starts from, with the flag that names it."""
    return f"{filename} ({flag_of(cfg, filename) or '--save-dir'})"


def flag_of(cfg: Any, filename: str) -> Optional[str]:
    """The flag that names a file to start from; None for what lies in --save-dir."""
    names = ("restore_file", "finetune_from_model", "continue_once")
    flags = [flag(name) for name in names if getattr(cfg, name, None) == filename]
    return flags[0] if flags else None


def _last(cfg: Any, suffix: str) -> str:
    """The run's own checkpoint, of this shard."""
    return os.path.join(cfg.save_dir, f"checkpoint_last{suffix}.pt")


def _restored(cfg: Any, suffix: str) -> str:
    """The file of --restore-file, of this shard (fairseq/checkpoint_utils.py:238@0.12.2)."""
    return str(cfg.restore_file.replace(".pt", suffix + ".pt"))


def _check(where: str, path: str) -> None:
    if PathManager.path_requires_pathmanager(path):
        if not PathManager.isfile(path):
            raise UserError(f"{where}: no such file; check the name")
    elif not os.path.exists(path):
        raise UserError(f"{where}: no such file; check the name")
    else:
        files.refuse_folder(path, where)
        files.check(path, where)
