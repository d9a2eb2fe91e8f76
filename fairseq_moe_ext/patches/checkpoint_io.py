"""fairseq/checkpoint_utils.py: checkpoints in and out, of any number of processes and of the
branch."""

import contextlib
import logging
import os
import shutil
import sys
from pathlib import Path
from typing import Any, Dict, Optional, Sequence, Tuple

import torch.distributed as dist
from fairseq.file_io import PathManager
from fairseq.trainer import Trainer

from fairseq_today.errors import UserError
from fairseq_today.registry import View

from .. import context, fingerprint, ours, tokenizer_files
from ..branch import pad_rule
from ..branch.files import check_name, find
from ..branch.reading import read
from ..checkpoint import folder_lock, loading, model_flags, resuming, saving, starting
from ..checkpoint.cleanup import remove_unused_files
from ..checkpoint.collective import same_error_on_all_ranks
from ..checkpoint.experts import has_sharded_experts, saves_together
from ..checkpoint.settings import take_overrides
from ..checkpoint.writing import cannot_write, temporarily, write
from ..context import during
from ..diverging import check_weights
from ..errors import ModelMisfit
from ..expert_parallel import process_count, process_rank
from ..models.precision import has_own_bfloat16
from ..moe.layer import MoELayer
from .ema import begin_from_the_model

logger = logging.getLogger(__name__)


# ---- In


def get_maybe_sharded_checkpoint_filename(stock, filename, *args, **kwargs):
    """Stock wants the file that it is given to exist; the branch's checkpoints are several."""
    files = find(filename)
    return stock(filename, *args, **kwargs) if files is None else files.shared


def reading_checked(torch: Any) -> Any:
    """Stock trusts everything in a checkpoint. This checks its bytes and its settings before
    anything is built from them."""
    return View(torch, load=loading.read_mapped)


def load_checkpoint_to_cpu(stock, path, arg_overrides=None, *args, **kwargs):
    """The one way to all checkpoints, of trainers, fairseq-eval-lm, from_pretrained, reads one
    file. What comes back has this process's experts, whoever wrote them, the branch too."""
    files, under_way = find(path), context.loading.get()
    if files is None:
        state = loading.load(stock, path, arg_overrides, *args, **kwargs)
    else:
        state = read(files, arg_overrides, under_way and under_way.shapes)
    if under_way is not None and under_way.optimizer:
        resuming.forget_other_validations(state, under_way.trainer, path)
        if state.get("last_optimizer_state") is not None:
            _fit_optimizer(state, under_way.trainer, path)
            model_flags.warn_of_other_gradients(state, under_way.trainer, path)
        elif process_rank() == 0:
            resuming.warn_of_a_new_optimizer(state, path)
    if under_way is not None:
        resuming.check_questions(state, under_way.trainer, path)
        resuming.note_corpora(state, under_way.trainer)
        model_flags.warn_of_changed(state, under_way.trainer, path)
        begin_from_the_model(under_way.trainer, state, path)
    if arg_overrides:
        take_overrides(arg_overrides, state.get("cfg") or {})
    pad_rule.note(state)
    fingerprint.note(state, path)
    return state


def _fit_optimizer(state: Dict[str, Any], trainer: Trainer, path: str) -> None:
    """Let this run's optimizer and schedule take the saved state. This builds the optimizer, whose
    float32 copies (--fp16) are of the weights before those of the file. Stock builds another one
    after these, but only from a file with a state of it (fairseq/trainer.py:587@0.12.2)."""
    loading.name_the_optimizer_as_here(state, trainer)
    loading.count_updates_as_here(state, trainer)
    resuming.fit_schedule(state, trainer, path)


def load_model_ensemble_and_task(
    stock, filenames, arg_overrides=None, task=None, strict=True, *args, **kwargs
):
    """Stock builds a model and fills it from the files. With `strict` it accepts no missing
    parameter, so no parameter needs to be initialised first.

    The branch's eval_lm pads every block to its full length; fairseq-eval-lm does so only if the
    task's settings say so. Padding changes the capacity of the experts and takes a part of it, so
    blocks of the branch's models are padded here, too, for the same perplexity. `--model-overrides
    "{'pad_to_fixed_length': False}"` leaves them as they are.

    The settings that come back are those of the training, whose --bf16 says nothing about this use,
    but stock's hub gives them to our models as this use's.
    """
    with during(context.building, context.Building(task is None, strict)):
        try:
            models, cfg, task = stock(filenames, arg_overrides, task, strict, *args, **kwargs)
        except ModelMisfit as error:
            raise error.of(":".join(filenames)) from None
    common = getattr(cfg, "common", None)  # a file that others wrote may lack it
    if common is not None and has_own_bfloat16(models[-1]):
        common.bf16 = bool((arg_overrides or {}).get("bf16"))
    wanted = (arg_overrides or {}).get("pad_to_fixed_length", True)
    settings: Any = getattr(task, "args", None)
    pads = getattr(settings, "pad_to_fixed_length", True)
    if wanted and not pads and find(filenames[-1]) and cfg.model.moe_freq > 0:
        settings.pad_to_fixed_length = True
        logger.info("blocks are padded to their full length, as the branch evaluates")
    if process_rank() == 0:
        _warn_of_balanced(models, ":".join(filenames))
    return models, cfg, task


def _warn_of_balanced(models: Sequence[Any], path: str) -> None:
    """By a line on stderr, of a router that looks at later tokens."""
    layers = [m for model in models for m in model.modules() if isinstance(m, MoELayer)]
    if any(layer.gate.settings.balanced_evaluation for layer in layers):
        print(
            f"{path}: has --moe-base-evaluation balanced, so that a token's score depends on later "
            "tokens and on the rest of its batch: add --model-overrides "
            "\"{'moe_base_evaluation': 'greedy'}\"",
            file=sys.stderr,
        )


def load_checkpoint(stock, cfg, trainer, **kwargs):
    """All processes of a training call this before they use checkpoints. So here the folder is
    locked, and for our models and tasks the checkpoint to start from is checked.

    The best loss, and how many validations were no better, are kept on functions, so the second job
    of a process (`fairseq-hydra-train --multirun`) would compare with the first's, save no
    checkpoint_best.pt and might stop early. Here every job starts with an empty record.
    """
    from fairseq import checkpoint_utils

    suffix, checked = trainer.checkpoint_suffix or "", ours.is_run(trainer.cfg)
    if checked:
        check_inputs(cfg, suffix)
    with same_error_on_all_ranks() if process_count() > 1 else contextlib.nullcontext():
        if checked and not cfg.no_save:
            saved = os.path.join(cfg.save_dir, f"checkpoint_last{suffix}.pt")
            check_name(saved, f"--checkpoint-suffix {suffix}: ")
        if process_rank() == 0 and not cfg.no_save:
            folder_lock.hold(cfg.save_dir)
    if not cfg.no_save and saves_together(trainer):
        folder_lock.check_shared(cfg.save_dir)
    starting.warn_of_overwriting(cfg, suffix)
    vars(checkpoint_utils.save_checkpoint).pop("best", None)
    patience().clear()
    start = starting.named(cfg, suffix)
    extra_state, epoch_itr = stock(cfg, trainer, **kwargs)
    trainer.started_from = None if start is None else start[1]
    end = ended(trainer, epoch_itr) if checked else None
    if start is not None and end is not None:
        begun = " ".join(start)
        raise UserError(f"{end[0]}: nothing left to train of {begun}: raise it{end[1]}")
    if end is not None:  # the command of a run that has ended
        logger.info(
            f"nothing left to train: {trainer.get_num_updates():,} updates are done, {end[0]}; "
            "raise it to train on"
        )
    return extra_state, epoch_itr


def check_inputs(cfg: Any, suffix: str) -> None:
    """Give the checkpoints that a run may start from the names of their files, and check them."""
    with same_error_on_all_ranks() if process_count() > 1 else contextlib.nullcontext():
        for name in ("restore_file", "continue_once", "finetune_from_model"):
            named = getattr(cfg, name, None)
            files = None if named in (None, "checkpoint_last.pt") else find(named)
            if files is not None:
                setattr(cfg, name, files.shared)
        starting.check_inputs(cfg, suffix)


def ended(trainer: Any, epoch_itr: Any) -> Optional[Tuple[str, str]]:
    """Why the run has ended that the trainer's checkpoint is of, and what else than a higher limit
    lets it go on; None if it has not. All processes say the same: all of it is in the
    checkpoint."""
    updates, limits = trainer.get_num_updates(), trainer.cfg.optimization
    waited = patience().get("num_runs", 0)
    if 0 < limits.max_epoch < epoch_itr.next_epoch_idx:
        return f"--max-epoch {limits.max_epoch}", ", or add --reset-dataloader"
    if updates == 0:
        return None
    if 0 < limits.max_update <= updates:
        return f"--max-update {limits.max_update}", ", or add --reset-optimizer"
    if 0 < limits.stop_time_hours < trainer._previous_training_time / 3600:
        return f"--stop-time-hours {limits.stop_time_hours:g} have passed", ""
    if 0 < trainer.cfg.checkpoint.patience <= waited:
        reason = (
            f"--patience {trainer.cfg.checkpoint.patience}: {waited} validations were no better"
        )
        return reason, ", or add --reset-meters"
    return None


def patience() -> dict:
    """What fairseq-train remembers for --patience (fairseq_cli/train.py:217@0.12.2)."""
    for name in ("fairseq_cli.train", "__main__"):
        stop = getattr(sys.modules.get(name), "should_stop_early", None)
        if stop is not None:
            return vars(stop)
    return {}


def convert_namespace_to_omegaconf(stock, args):
    """Stock replaces a value that an old checkpoint lacks by the string
    `${common.use_plasma_view}`, which counts as true; every command that reads its data would then
    need pyarrow."""
    args.use_plasma_view = getattr(args, "use_plasma_view", False)
    return stock(args)


# ---- Out


def save_checkpoint(stock, cfg, trainer, epoch_itr, val_loss):
    """Rank 0 alone decides whether and under which names to save. With experts sharded over
    processes, the others wait for its decision. Also copies the tokenizer's files beside the
    checkpoints."""

    def save():
        try:
            data = tokenizer_files.data_of(trainer.task)
            if trainer.is_data_parallel_master and not cfg.no_save and data is not None:
                tokenizer_files.copy(data, Path(cfg.save_dir))
            stock(cfg, trainer, epoch_itr, val_loss)
        except OSError as error:  # in copying or pruning
            raise cannot_write(error.filename2 or cfg.save_dir, error) from error
        finally:
            if trainer.is_data_parallel_master and not cfg.no_save:
                remove_unused_files(cfg.save_dir, trainer.checkpoint_suffix)

    if cfg.no_save or not saves_together(trainer):
        return save()
    with during(context.saving, trainer):
        if dist.get_rank() == 0:
            saving.lead(save)
        else:
            save()
            saving.follow(trainer, cfg.save_dir)


def torch_persistent_save(stock, obj, filename, async_write=False):
    """Stock renames the file, but does not sync it. Rank 0 also has the complete state here, from
    which the experts are removed."""
    if ours.is_run(obj.get("cfg") or {}):  # another's buffers may hold infinity
        check_weights(obj.get("model", {}).items(), filename, saving=True)
    if async_write or PathManager.path_requires_pathmanager(filename):
        return stock(obj, filename, async_write)
    trainer = context.saving.get()
    if trainer is not None and has_sharded_experts(trainer):
        obj = saving.with_experts_apart(trainer, obj, filename)
    write(obj, filename)


def verify_checkpoint_directory(stock, save_dir):
    """Stock creates --save-dir and writes a file there when training starts, and continues if it
    cannot."""
    try:
        stock(save_dir)
    except OSError as error:
        raise UserError(
            f"--save-dir {save_dir}: cannot be written to ({error.strerror or error}); choose "
            "another folder"
        ) from error


def copying_whole(manager: Any) -> Any:
    """A run that is killed while checkpoint_best.pt is copied leaves a truncated
    checkpoint_last.pt, which the next start fails to load.

    So it is copied under another name first, as the file that it is copied from is written.
    """

    def copy(source, target, overwrite=False):
        if manager.path_requires_pathmanager(target):  # not a file system's
            return manager.copy(source, target, overwrite=overwrite)
        with temporarily(target) as temporary:
            shutil.copyfile(source, temporary)
            with open(temporary, "rb+") as copied:
                os.fsync(copied.fileno())
        return True

    return type("PathManager", (manager,), {"copy": staticmethod(copy)})
