"""Flags of a training that contradict each other, or would waste it; see command_checks.py."""

from typing import Any, Callable, Mapping

from . import ours
from .config import MoETransformerLMConfig
from .errors import UserError
from .moe.router import ROUTERS
from .optim import check_precision

Spell = Callable[[str], str]


def _check_precisions(given: Mapping[str, Any], spell: Spell) -> None:
    """With two precisions, fairseq takes the weights of one and the optimizer of the other, without
    its loss scale or its float32 copy (fairseq/trainer.py:95,305@0.12.2,
    fairseq/optim/fp16_optimizer.py:274@0.12.2). Its command line refuses only some."""
    chosen = [spell(name) for name in ("fp16", "bf16", "amp") if given.get(name)]
    if len(chosen) > 1:
        raise UserError(f"{' and '.join(chosen)} are different precisions: turn on only one")
    for half in ("fp16", "bf16"):
        efficient = f"memory_efficient_{half}"
        if given.get(efficient) and not given.get(half):  # on the command line it sets both
            raise UserError(
                f"{spell(efficient)} is on, but {spell(half)} is off: turn both on, or both off"
            )


def _check_validation(given: Mapping[str, Any], spell: Spell) -> None:
    if not given.get("disable_validation"):
        _check_subsets(given, spell)
        return
    for name in ("patience", "keep_best_checkpoints"):
        if (given.get(name) or 0) > 0:
            raise UserError(
                f"{spell(name)} {given[name]} needs validation, which "
                f"{spell('disable_validation')} turns off: remove one of them"
            )


def _check_subsets(given: Mapping[str, Any], spell: Spell) -> None:
    """One dataset has one iterator (fairseq/tasks/fairseq_task.py:275@0.12.2). Validation on the
    one that training reads would move it an epoch on, and cut it to --max-valid-steps. Of
    --combine-valid-subsets, stock loads "valid" only (fairseq_cli/train.py:130@0.12.2)."""
    subsets = given.get("valid_subset") or ""
    trained = given.get("train_subset")
    if trained in subsets.split(",") and ours.are_named(given):
        raise UserError(
            f"{spell('valid_subset')} {subsets}: training would skip data, as {trained} is also "
            f"{spell('train_subset')}: name others, or set {spell('disable_validation')}, and "
            f"use fairseq-validate --valid-subset {trained} afterwards"
        )
    if given.get("combine_valid_subsets") and subsets not in ("", "valid"):
        raise UserError(
            f"{spell('combine_valid_subsets')} reads valid, valid1, ... as one subset, valid, and "
            f"{spell('valid_subset')} is {subsets}: remove one of them"
        )


def _check_schedule(given: Mapping[str, Any], spell: Spell) -> None:
    """What the schedules assert (fairseq/optim/lr_scheduler/polynomial_decay_schedule.py:46@0.12.2,
    fairseq/optim/lr_scheduler/inverse_square_root_schedule.py:63@0.12.2), or divide by in the last
    update (fairseq/optim/lr_scheduler/cosine_lr_scheduler.py:134@0.12.2)."""
    schedule, floor, rates = (given.get(k) for k in ("lr_scheduler", "stop_min_lr", "lr"))
    if floor is not None and rates and floor >= max(rates):
        raise UserError(
            f"{spell('stop_min_lr')} {floor} is not below {spell('lr')} {max(rates)}, so nothing "
            "would be trained: lower it"
        )
    if schedule == "polynomial_decay" and given.get("total_num_update") is None:
        # fairseq's parser drops a default that refers to another flag, and cannot do without
        raise UserError(
            f"{spell('lr_scheduler')} polynomial_decay needs {spell('total_num_update')}: add it, "
            "with the number of updates of the training"
        )
    last, warmup = given.get("max_update"), given.get("warmup_updates")
    by_max_update = schedule == "cosine" and (given.get("lr_period_updates") or -1) <= 0
    if by_max_update and last and last == warmup:
        raise UserError(
            f"{spell('warmup_updates')} {warmup} leaves {spell('lr_scheduler')} cosine nothing of "
            f"{spell('max_update')} {last}: lower it"
        )
    if schedule == "inverse_sqrt" and given.get("warmup_updates") == 0:
        raise UserError(
            f"{spell('warmup_updates')} 0: {spell('lr_scheduler')} inverse_sqrt needs 1 or more"
        )


def _check_capacity(given: Mapping[str, Any], spell: Spell) -> None:
    """Flags of a capacity, of a model that has none. Only in training: checkpoints with such flags
    load, and evaluation may override them."""
    router, share = ROUTERS.get(str(given.get("moe_router"))), "moe_eval_capacity_token_fraction"
    if given.get("moe_dropless"):
        free = spell("moe_dropless")
    elif router is not None and router.capacity_free:
        free = f"{spell('moe_router')} {given['moe_router']}"
    else:
        return
    value = given.get(share)
    useless = {"moe_batch_prioritized_routing": given.get("moe_batch_prioritized_routing")}
    # 1 and a negative number drop nothing either
    if value != MoETransformerLMConfig.moe_eval_capacity_token_fraction:
        useless[share] = value is not None and 0 < value < 1 and value
    for name, value in useless.items():
        if value:
            spelled = spell(name) + ("" if value is True else f" {value}")
            raise UserError(f"{spelled} has no effect with {free}: no capacity; remove it")


CHECKS = (check_precision, _check_precisions, _check_validation, _check_schedule, _check_capacity)
