"""Checks when a trainer resumes from a checkpoint."""

from __future__ import annotations

import contextlib
import logging
import os
from argparse import Namespace
from typing import Any, Dict, Iterator, Mapping, Optional

from fairseq.trainer import Trainer
from omegaconf import OmegaConf
from torch import Tensor

from fairseq_today.errors import Unreadable

from .. import context, data_bin, fully_sharded, ours
from ..diverging import check_weights
from ..errors import ModelMisfit, UserError
from ..expert_parallel import all_gather, process_count, process_rank
from ..wording import did_you_mean, flag
from .collective import check_code_versions, same_error_on_all_ranks
from .experts import has_sharded_experts, saves_together
from .loading import refuse_folder
from .starting import flag_of, is_last, with_flag

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def reading(
    trainer: Trainer,
    filename: str,
    optimizer: bool,
    shapes: Optional[Dict[str, Any]],
    everywhere: bool,
) -> Iterator[None]:
    """The context in which a trainer loads a checkpoint. Stock loads on rank 0 and broadcasts the
    state (fairseq/trainer.py:497@0.12.2), but experts differ between processes.

    Args:
        optimizer: its state is wanted.
        shapes: of the parameters, for an optimizer state of the branch.
        everywhere: all ranks read, even if none has its own experts.

    Raises:
        UserError: for a checkpoint that this run cannot go on from.
    """
    refuse_folder(filename)
    settings = trainer.cfg.checkpoint
    on_all_ranks = settings.load_checkpoint_on_all_dp_ranks
    if fully_sharded.is_sharded(trainer.get_model()):
        _refuse_optimizers_that_join_numbers(trainer)
    if process_count() > 1:
        check_code_versions()
    if saves_together(trainer):
        _refuse_what_cannot_be_saved(trainer)
        _check_that_all_see(filename)
        everywhere = True
    settings.load_checkpoint_on_all_dp_ranks = on_all_ranks or everywhere
    try:
        with context.during(context.loading, context.Loading(trainer, optimizer, shapes)):
            yield
    except Unreadable as error:
        named_by = flag_of(settings, filename) or "--restore-file"
        raise UserError(f"{error} with {named_by}") from error
    except (AssertionError, ValueError) as error:
        text = str(error)
        if "please reset the optimizer" in text:  # fairseq/trainer.py:595,598@0.12.2
            raise UserError(f"{filename}: {text}") from error
        if "optimizer" in text and "parameter group" in text:  # torch.optim.Optimizer
            raise UserError(
                f"{filename}: its optimizer state does not fit ({text}): use the precision flags "
                "(--fp16 and the like) and the --moe-freeze that it was saved with, or add "
                "--reset-optimizer"
            ) from error
        raise
    except Exception as error:
        # "Cannot load model parameters" hides it (fairseq/trainer.py:581@0.12.2)
        if isinstance(error.__context__, ModelMisfit):
            where = with_flag(settings, filename)
            other = "--save-dir" if where.endswith("(--save-dir)") else "checkpoint"
            raise error.__context__.of(where, f", or another {other}") from error
        raise
    finally:
        settings.load_checkpoint_on_all_dp_ranks = on_all_ranks


def check(trainer: Trainer, filename: str, optimizer: bool) -> None:
    """Raise UserError for a loaded state that training cannot continue from."""
    with same_error_on_all_ranks() if process_count() > 1 else contextlib.nullcontext():
        check_weights(trainer.get_model().named_parameters(), filename, saving=False)
    if optimizer:
        _check_optimizer_state(trainer, filename)


def _check_optimizer_state(trainer: Trainer, filename: str) -> None:
    """Raises UserError, on all ranks, if the optimizer state of a parameter has another shape than
    the parameter, which PyTorch would find only at the first update, or is NaN, which would spread
    to the weights."""
    with same_error_on_all_ranks() if process_count() > 1 else contextlib.nullcontext():
        for parameter, state in getattr(trainer.optimizer.optimizer, "state", {}).items():
            for key in _OF_EACH_NUMBER & state.keys():
                if not isinstance(state[key], Tensor):
                    continue
                check_weights([(f"its optimizer state ({key})", state[key])], filename, False)
                if state[key].shape != parameter.shape:
                    raise UserError(
                        f"{filename}: its optimizer state does not fit: {key} has shape "
                        f"{tuple(state[key].shape)}, its parameter {tuple(parameter.shape)}; "
                        "copy the checkpoint again, or add --reset-optimizer"
                    )


_OF_EACH_NUMBER = {"exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer"}


def check_overrides(trainer: Trainer, overrides: Mapping[str, Any]) -> None:
    """Raise UserError for an unknown name in --optimizer-overrides, which stock ignores
    (fairseq/optim/fairseq_optimizer.py:86@0.12.2)."""
    defaults = getattr(getattr(trainer.optimizer, "optimizer", None), "defaults", None)
    if defaults is None or not ours.is_run(trainer.cfg):
        return
    known = {**defaults, **trainer.optimizer.optimizer_config}
    for name in overrides:
        if name not in known:
            raise UserError(
                f"--optimizer-overrides '{name}': the optimizer has no such setting; use "
                + ", ".join(known)
                + did_you_mean(name, known)
            )


def warn_of_kept_settings(trainer: Trainer, filename: str, overrides: Mapping[str, Any]) -> None:
    """Stock keeps the optimizer's settings of the checkpoint, except --lr, without saying so
    (fairseq/optim/fairseq_optimizer.py:86@0.12.2)."""
    flags = trainer.cfg.optimizer
    if process_rank() > 0 or getattr(flags, "_name", None) == "composite":
        return
    group = trainer.optimizer.param_groups[0]
    names = vars(flags) if isinstance(flags, Namespace) else flags
    for key, value in trainer.optimizer.optimizer_config.items():
        wanted, kept = (tuple(v) if isinstance(v, list) else v for v in (value, group.get(key)))
        if key in {"lr", *overrides} or key not in group or kept == wanted:
            continue
        given = next((name for name in names if name == key or name.endswith(f"_{key}")), key)
        logger.warning(
            f"{flag(given)} {wanted}: {filename} continues with {kept}; add "
            f'--optimizer-overrides "{ {key: wanted} }" to change it'
        )


def forget_other_validations(state: Dict[str, Any], trainer: Trainer, filename: str) -> None:
    """Remove what a state says of the validations so far if this run compares another quantity:
    checkpoint_best.pt, --patience and reduce_lr_on_plateau would compare a perplexity with a
    loss."""
    saved, here = _compared(state.get("cfg")), _compared(trainer.cfg)
    changed = [flag for flag in saved if saved[flag] != here[flag]]
    if not changed:
        return
    state["extra_state"] = {**state["extra_state"], "val_loss": None}
    history = state["optimizer_history"]
    schedule = history[-1].get("lr_scheduler_state") if history else None
    for record in (state["extra_state"], schedule or {}):
        for key in ("best", "should_stop_early", "bad_epochs"):
            record.pop(key, None)
    if process_rank() == 0:
        flags = " and ".join(f"{flag} {here[flag]} (it has {saved[flag]})" for flag in changed)
        logger.warning(
            f"{flags}: the validations before {filename} measured something else: this run finds "
            "its best checkpoint among its own, and counts --patience and --lr-patience anew"
        )


def fit_schedule(state: Dict[str, Any], trainer: Trainer, filename: str) -> None:
    """Let this run's schedule take the state of another, and say so. All are functions of the count
    of updates or of validations, but most want a key that fairseq's default does not write
    (fairseq/optim/lr_scheduler/fixed_schedule.py:45@0.12.2,
    fairseq/optim/lr_scheduler/fairseq_lr_scheduler.py:34@0.12.2)."""
    history = state.get("optimizer_history")
    if trainer.cfg.checkpoint.reset_lr_scheduler or not history:
        return
    if not isinstance(history[-1].get("lr_scheduler_state"), dict):
        return
    merged = {**trainer.lr_scheduler.state_dict(), **history[-1]["lr_scheduler_state"]}
    history[-1] = {**history[-1], "lr_scheduler_state": merged}
    before, now = (
        ours.name_of((cfg or {}).get("lr_scheduler")) for cfg in (state.get("cfg"), trainer.cfg)
    )
    if before not in (None, now) and process_rank() == 0:
        logger.warning(
            f"--lr-scheduler {now}: {filename} was trained with {before}: from update "
            f"{history[-1].get('num_updates', 0):,} on the learning rate is the new schedule's; to "
            f"keep the old one, use --lr-scheduler {before}"
        )


def _compared(cfg: Any) -> Dict[str, Any]:
    """The flags that say which quantity of a validation is compared, as far as a run has them. Of
    several subsets it is the first."""
    names = {
        "--valid-subset": "dataset.valid_subset",
        "--best-checkpoint-metric": "checkpoint.best_checkpoint_metric",
        "--maximize-best-checkpoint-metric": "checkpoint.maximize_best_checkpoint_metric",
    }
    found = {flag: cfg and OmegaConf.select(cfg, name) for flag, name in names.items()}
    return {
        f: v.split(",")[0] if isinstance(v, str) else v for f, v in found.items() if v is not None
    }


def check_questions(state: Mapping[str, Any], trainer: Trainer, filename: str) -> None:
    """Raise UserError where a fine-tuning would go on from another one's checkpoint, whose folder
    it was given (with Hydra without being asked); warn where it may be another one's."""
    settings, saved = trainer.cfg, state.get("cfg")
    if not hasattr(trainer.task, "scoring") or not saved:
        return
    if not is_last(settings.checkpoint, filename, trainer.checkpoint_suffix or ""):
        return
    for key in ("task.choice_task", "task.choice_data", "checkpoint.finetune_from_model"):
        before, now = (OmegaConf.select(cfg, key) for cfg in (saved, settings))
        if before == now:
            continue
        name, other = flag(key.split(".")[1]), "use another --save-dir (Hydra: hydra.run.dir)"
        had = "without it" if before is None else f"with {before}"
        if key == "task.choice_task":
            raise UserError(f"{name} {now}: {filename} is of a training {had}: {other}")
        if process_rank() == 0:
            logger.warning(
                f"{name} {now}: the run goes on from {filename}, of a training {had}; for a new "
                f"fine-tuning {other}"
            )


def note_corpora(state: Mapping[str, Any], trainer: Trainer) -> None:
    """Tell the task which corpora the model was trained on before, for this run's checkpoints."""
    recorded = (state.get("task_state") or {}).get(data_bin.TRAINED)
    if recorded and hasattr(trainer.task, "trained_before"):
        trainer.task.trained_before = recorded


def warn_of_a_new_optimizer(state: Mapping[str, Any], filename: str) -> None:
    """Stock starts anew without saying so where a file has no optimizer state."""
    place = (state.get("extra_state") or {}).get("train_iterator") or {}
    epoch, batches = place.get("epoch", 1), place.get("iterations_in_epoch", 0)
    data = f"in epoch {epoch}" if epoch > 1 or batches else "from their beginning"
    logger.warning(
        f"{filename}: has no optimizer state: the optimizer and the schedule start anew, at update "
        f"0, and the data go on {data}; to start a training from weights, use "
        "--finetune-from-model"
    )


def _refuse_what_cannot_be_saved(trainer: Trainer) -> None:
    """Raises UserError, when training starts, for settings with which experts on several
    processes, or the pieces of a sharded model, would be saved or trained wrongly."""
    cfg = trainer.cfg
    where, remedy = "with --ddp-backend fully_sharded", "use pytorch_ddp"
    if has_sharded_experts(trainer):
        where, remedy = f"for experts on {process_count()} processes", "train on one process"
    refused = {
        "--store-ema": cfg.ema.store_ema,
        "--write-checkpoints-asynchronously": cfg.checkpoint.write_checkpoints_asynchronously,
        "--zero-sharding os": cfg.distributed_training.zero_sharding == "os",
        "--use-bmuf": cfg.optimization.use_bmuf,
        "--optimizer composite": getattr(cfg.optimizer, "_name", None) == "composite",
        # each process divides its own rows by a number of its own
        "--fp16-adam-stats": getattr(cfg.optimizer, "fp16_adam_stats", False),
    }
    for refusal, given in refused.items():
        if given:
            raise UserError(f"{refusal}: not supported {where}; remove it, or {remedy}")


def _refuse_optimizers_that_join_numbers(trainer: Trainer) -> None:
    """Raises UserError for optimizers that need whole parameters
    (fairseq/trainer.py:336@0.12.2)."""
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
