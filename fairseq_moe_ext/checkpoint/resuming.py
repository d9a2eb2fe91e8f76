"""Trainers that load a checkpoint, and what they are refused."""

from __future__ import annotations

import contextlib
import functools
import os
from typing import Any

from fairseq import checkpoint_utils
from fairseq.optim.lr_scheduler.reduce_lr_on_plateau import ReduceLROnPlateauLRSchedule
from fairseq.trainer import Trainer
from torch import Tensor

from .. import fully_sharded
from ..diverging import check_weights
from ..errors import UserError
from ..expert_parallel import all_gather, process_count
from .experts import saves_together
from .loading import loading, refuse_folder
from .together import check_code_versions, same_error_on_all_ranks


def apply() -> None:
    """fairseq/trainer.py:449 loads on rank 0 and sends the state round; experts differ."""
    stock = Trainer.load_checkpoint

    @functools.wraps(stock)
    def load_checkpoint(self, filename, reset_optimizer=False, *args, **kwargs):
        refuse_folder(filename)
        settings = self.cfg.checkpoint
        on_all_ranks = settings.load_checkpoint_on_all_dp_ranks
        if fully_sharded.is_sharded(self.get_model()):
            _refuse_optimizers_that_join_numbers(self)
        if process_count() > 1:
            check_code_versions()
        if saves_together(self):
            _refuse_what_cannot_be_saved(self.cfg)
            _check_that_all_see(filename)
            settings.load_checkpoint_on_all_dp_ranks = True
        try:
            with loading(self, optimizer=not reset_optimizer):
                extra_state = stock(self, filename, reset_optimizer, *args, **kwargs)
            if extra_state is not None:
                with same_error_on_all_ranks() if process_count() > 1 else contextlib.nullcontext():
                    check_weights(self.get_model().named_parameters(), filename, saving=False)
                if not reset_optimizer:
                    _check_optimizer_state(self, filename)
            return extra_state
        except (AssertionError, ValueError) as error:
            text = str(error)
            if "please reset the optimizer" in text:  # fairseq/trainer.py:580
                raise UserError(f"{filename}: {text}") from error
            if "optimizer" in text and "parameter group" in text:  # torch.optim.Optimizer
                raise UserError(
                    f"{filename}: its optimizer state does not fit ({text}): use the flags of "
                    "precision (--fp16 and the like) and the --moe-freeze that wrote it, or add "
                    "--reset-optimizer"
                ) from error
            raise
        finally:
            settings.load_checkpoint_on_all_dp_ranks = on_all_ranks

    Trainer.load_checkpoint = load_checkpoint
    _tell_what_cannot_be_finetuned()
    _keep_the_patience_of_plateaus()


def _keep_the_patience_of_plateaus() -> None:
    """fairseq/optim/lr_scheduler/reduce_lr_on_plateau.py:88 keeps the best loss, and not for how
    many validations there was none better: a resumed run would lower the rate later."""
    stock_state = ReduceLROnPlateauLRSchedule.state_dict
    stock_load = ReduceLROnPlateauLRSchedule.load_state_dict

    @functools.wraps(stock_state)
    def state_dict(self):
        return {**stock_state(self), "bad_epochs": self.lr_scheduler.num_bad_epochs}

    @functools.wraps(stock_load)
    def load_state_dict(self, state):
        stock_load(self, state)
        self.lr_scheduler.num_bad_epochs = state.get("bad_epochs", 0)

    ReduceLROnPlateauLRSchedule.state_dict = state_dict
    ReduceLROnPlateauLRSchedule.load_state_dict = load_state_dict


def _check_optimizer_state(trainer: Trainer, filename: str) -> None:
    """Raises UserError, on all ranks, where what the optimizer remembers of each number of a
    parameter has not the parameter's shape, which PyTorch finds at the first update, or is NaN,
    which the weights would be after it."""
    with same_error_on_all_ranks() if process_count() > 1 else contextlib.nullcontext():
        for parameter, state in getattr(trainer.optimizer.optimizer, "state", {}).items():
            for key in _OF_EACH_NUMBER & state.keys():
                if not isinstance(state[key], Tensor):
                    continue
                check_weights([(f"its optimizer state ({key})", state[key])], filename, False)
                if state[key].shape != parameter.shape:
                    raise UserError(
                        f"{filename}: its optimizer state does not fit: {key} is of shape "
                        f"{tuple(state[key].shape)} for a parameter of {tuple(parameter.shape)}; "
                        "copy the checkpoint again, or add --reset-optimizer"
                    )


_OF_EACH_NUMBER = {"exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer"}


def _tell_what_cannot_be_finetuned() -> None:
    """fairseq/checkpoint_utils.py:206, :239 and :249 raise ValueError for --finetune-from-model of
    a file that is not there or with flags that contradict it, the last with all settings."""
    stock = checkpoint_utils.load_checkpoint

    @functools.wraps(stock)
    def load_checkpoint(cfg, *args, **kwargs):
        try:
            return stock(cfg, *args, **kwargs)
        except ValueError as error:
            text = str(error).split(": {")[0]
            if isinstance(error, UserError) or not text.startswith("--finetune-from-model"):
                raise
            if text.endswith("does not exist"):
                text = f"--finetune-from-model {cfg.finetune_from_model}: no such file"
            else:
                text += "; drop one of them"
            raise UserError(text) from error

    checkpoint_utils.load_checkpoint = load_checkpoint


def _refuse_what_cannot_be_saved(cfg: Any) -> None:
    """Raises UserError, when training starts, for settings under which experts of several processes
    would be saved or trained wrong."""
    refused = {
        "--store-ema": cfg.ema.store_ema,
        "--write-checkpoints-asynchronously": cfg.checkpoint.write_checkpoints_asynchronously,
        "--zero-sharding os": cfg.distributed_training.zero_sharding == "os",
        "--use-bmuf": cfg.optimization.use_bmuf,
        "--optimizer composite": getattr(cfg.optimizer, "_name", None) == "composite",
    }
    for flag, given in refused.items():
        if given:
            raise UserError(
                f"{flag}: not for experts on {process_count()} processes; drop it, or train on one"
            )


def _refuse_optimizers_that_join_numbers(trainer: Trainer) -> None:
    """Raises UserError for optimizers that need parameters whole (fairseq/trainer.py:336)."""
    try:
        trainer.optimizer  # noqa: B018 - is built now
    except AssertionError as error:
        raise UserError(
            f"--optimizer {trainer.cfg.optimizer._name}: --ddp-backend fully_sharded gives it "
            "pieces of parameters, and it needs them whole: use adam or sgd, or pytorch_ddp"
        ) from error


def _check_that_all_see(filename: str) -> None:
    """All ranks must see the same checkpoint."""
    seen = all_gather(os.path.isfile(filename))
    for rank, there in enumerate(seen):
        if there != seen[0]:
            seeing, blind = (0, rank) if seen[0] else (rank, 0)
            raise UserError(
                f"{filename}: process {seeing} sees it, process {blind} does not; --save-dir and "
                "--restore-file must be on a file system that all machines share"
            )
