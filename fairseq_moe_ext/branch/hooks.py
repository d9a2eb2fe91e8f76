"""fairseq's functions through which checkpoints are read, wrapped to take the branch's."""

import functools
import logging
from typing import Any, Dict

import torch
from fairseq import checkpoint_utils, trainer

from ..config import check_overrides
from ..errors import UserError
from ..fully_sharded import is_sharded, places
from . import pad_rule
from .files import find
from .optimizer import unfit
from .reading import read

logger = logging.getLogger(__name__)


class PathForTraining(str):
    """The path of a checkpoint whose optimizer state is wanted, too."""

    parameters: Dict[str, Any]  # as `read` takes them


def apply() -> None:
    """Put the wrappers in place, once."""
    if hasattr(checkpoint_utils.load_checkpoint_to_cpu, "reads_branch"):
        return
    _name_an_existing_file()
    _read_the_branch()
    _measure_as_the_branch()
    _train_no_experts_on_disk()
    _restore_from_the_branch()
    _finetune_from_the_branch()
    pad_rule.apply()


def _name_an_existing_file() -> None:
    """fairseq/checkpoint_utils.py:422 wants the file that it is given to exist."""
    stock = checkpoint_utils.get_maybe_sharded_checkpoint_filename

    @functools.wraps(stock)
    def get_maybe_sharded_checkpoint_filename(filename, *args, **kwargs):
        files = find(filename)
        return stock(filename, *args, **kwargs) if files is None else files.shared

    checkpoint_utils.get_maybe_sharded_checkpoint_filename = get_maybe_sharded_checkpoint_filename


def _read_the_branch() -> None:
    """fairseq/checkpoint_utils.py:288 reads one file."""
    stock = checkpoint_utils.load_checkpoint_to_cpu

    @functools.wraps(stock)
    def load_checkpoint_to_cpu(path, arg_overrides=None, *args, **kwargs):
        files = find(path)
        if files is None:
            state = stock(path, arg_overrides, *args, **kwargs)
        else:
            state = read(files, arg_overrides, getattr(path, "parameters", None))
        pad_rule.note(state, arg_overrides or {})
        check_overrides(arg_overrides or {}, state.get("cfg") or {})
        return state

    load_checkpoint_to_cpu.reads_branch = True
    checkpoint_utils.load_checkpoint_to_cpu = load_checkpoint_to_cpu


def _measure_as_the_branch() -> None:
    """The branch's eval_lm pads every block to its full length; fairseq-eval-lm does by the task's
    settings on its own command line. That gives the experts more capacity, of which padding takes
    some, so blocks are padded here, too, for the same perplexity. `--model-overrides
    "{'pad_to_fixed_length': False}"` leaves them as they are. (fairseq/checkpoint_utils.py:393)"""
    stock = checkpoint_utils.load_model_ensemble_and_task

    @functools.wraps(stock)
    def load_model_ensemble_and_task(filenames, arg_overrides=None, *args, **kwargs):
        models, cfg, task = stock(filenames, arg_overrides, *args, **kwargs)
        wanted = (arg_overrides or {}).get("pad_to_fixed_length", True)
        settings = getattr(task, "args", None)
        pads = getattr(settings, "pad_to_fixed_length", True)
        if wanted and not pads and find(filenames[-1]) and cfg.model.moe_freq > 0:
            settings.pad_to_fixed_length = True
            logger.info("blocks are padded to their full length, as the branch evaluates")
        return models, cfg, task

    checkpoint_utils.load_model_ensemble_and_task = load_model_ensemble_and_task


def _train_no_experts_on_disk() -> None:
    """fairseq/trainer.py:47 would fail on parameters that are not there."""
    stock = trainer.Trainer.__init__

    @functools.wraps(stock)
    def __init__(self, cfg, *args, **kwargs):
        if getattr(cfg.model, "moe_experts_on_disk", False):
            raise UserError(
                "--moe-experts-on-disk: experts that stay in a checkpoint's files cannot be "
                "trained; drop it (it is for fairseq-eval-lm's --model-overrides)"
            )
        stock(self, cfg, *args, **kwargs)

    trainer.Trainer.__init__ = __init__


def _restore_from_the_branch() -> None:
    """fairseq/trainer.py:446 wants the file to exist, and has one process read it for all; here
    each reads its own experts."""
    stock = trainer.Trainer.load_checkpoint

    @functools.wraps(stock)
    def load_checkpoint(self, filename, reset_optimizer=False, *args, **kwargs):
        files = find(filename)
        if files is None:
            return stock(self, filename, reset_optimizer, *args, **kwargs)
        path = PathForTraining(files.shared)
        if not reset_optimizer:
            if _joins_parameters(self):
                raise unfit(
                    files,
                    "--fp16 keeps one flat tensor for all parameters unless "
                    "--fp16-no-flatten-grads is given; give it",
                )
            path.parameters = {  # shapes
                name: torch.empty(place.shape, device="meta")
                for name, place in places(self.get_model()).items()
                if place.parameter.requires_grad
            }
        settings = self.cfg.checkpoint
        before = settings.load_checkpoint_on_all_dp_ranks
        settings.load_checkpoint_on_all_dp_ranks = True
        try:
            return stock(self, path, reset_optimizer, *args, **kwargs)
        finally:
            settings.load_checkpoint_on_all_dp_ranks = before

    trainer.Trainer.load_checkpoint = load_checkpoint


def _joins_parameters(of: trainer.Trainer) -> bool:
    """Whether the optimizer has one tensor for all parameters (fairseq/optim/fp16_optimizer.py:293
    @0.12.2); with FSDP it never has (fairseq/trainer.py:298@0.12.2)."""
    common = of.cfg.common
    apart = common.memory_efficient_fp16 or common.fp16_no_flatten_grads or common.bf16
    return common.fp16 and not apart and not is_sharded(of.get_model())


def _finetune_from_the_branch() -> None:
    """fairseq/checkpoint_utils.py:229 wants --finetune-from-model to exist, and checkpoint/
    starting.py each file that is named."""
    stock = checkpoint_utils.load_checkpoint

    @functools.wraps(stock)
    def load_checkpoint(cfg, *args, **kwargs):
        for name in ("restore_file", "continue_once", "finetune_from_model"):
            named = getattr(cfg, name, None)
            files = None if named in (None, "checkpoint_last.pt") else find(named)
            if files is not None:
                setattr(cfg, name, files.shared)
        return stock(cfg, *args, **kwargs)

    checkpoint_utils.load_checkpoint = load_checkpoint
