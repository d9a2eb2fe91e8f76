"""Checks of what a trainer is built from: `check_task` before the model is built, called by
patches/tasks.py; `check_trainer`, which needs the model, and `check_first_rate`, which needs the
schedule, by patches/trainer.py; `warn_of_decay`, which needs the number of updates, by
patches/progress.py; `warn_of_drops` also by what evaluates, patches/eval_lm.py and
patches/tasks.py."""

import logging
import re
from typing import Any, Dict, Iterable, List, Mapping

import torch
from fairseq.criterions import CRITERION_REGISTRY
from fairseq.tasks import FairseqTask

from .balance_flags import has_loss
from .errors import UserError
from .expert_parallel import process_rank
from .moe.router import ROUTERS, TopKRouter
from .moe.stats import METRICS, NULL_SHARE
from .ours import is_stocks, name_of
from .router_flags import check_known
from .shape import shape_of
from .wording import count, did_you_mean

logger = logging.getLogger(__name__)

_AT_EVALUATION = "add --model-overrides \"{'moe_eval_capacity_token_fraction': 1.0}\""


def check_task(cfg: Any, task: Any) -> None:
    """Raise UserError for data that the task lacks, a metric that its validation does not report,
    or settings with which no trainer can be built."""
    getattr(task, "check_training", lambda: None)()
    sharding = str(cfg.distributed_training.zero_sharding)
    if sharding != "none" and not torch.distributed.is_initialized():
        raise UserError(
            f"--zero-sharding {sharding} needs several processes, but there is only one: remove it"
        )
    over = str(getattr(cfg.model, "moe_balance_over", None))
    transform = str(getattr(cfg.criterion, "moe_gate_loss_transform", "none"))
    if over == "global_batch" and transform != "none":
        raise UserError(
            f"--moe-gate-loss-transform {transform} with --moe-balance-over {over}: the "
            "transformed loss is not a sum over micro-batches: use none, or another "
            "--moe-balance-over"
        )
    if not cfg.dataset.disable_validation:
        _check_metric(cfg, task)
    if process_rank() == 0:
        _warn_of_schedule(cfg)


def check_trainer(cfg: Any, model: Any) -> None:
    """Raise UserError for settings with which the model cannot be trained."""
    together = torch.distributed.is_initialized()  # under torchrun also a process alone
    if cfg.common.amp and together and torch.distributed.get_world_size() > 1:
        _check_amp(cfg, model)
    if getattr(model, "has_experts", False):
        _check_losses(cfg)
        if not cfg.dataset.disable_validation and process_rank() == 0:
            warn_of_drops(model, "validation", "add --moe-dropless, or set it to 1.0")


def check_first_rate(trainer: Any) -> None:
    """Raise UserError for a training that would end before its first update, with status 0
    (fairseq_cli/train.py:182@0.12.2): --stop-min-lr is for the decay, but a warm-up may begin as
    low."""
    lowest = trainer.cfg.optimization.stop_min_lr
    if lowest >= 0 and trainer.get_num_updates() == 0 and trainer.get_lr() <= lowest:
        raise UserError(
            f"--stop-min-lr {lowest:g}: the learning rate begins at {trainer.get_lr():g}, so "
            "nothing would be trained: remove it, or raise --warmup-init-lr, if the schedule has it"
        )


def warn_of_drops(model: Any, what: str = "this command", remedy: str = _AT_EVALUATION) -> None:
    """Where experts have no room for more than their mean load at evaluation: with the branch's
    default, which is for hundreds of them, as many as four for each choice of a token. Once for
    each model."""
    for gate in model.modules():
        if not isinstance(gate, TopKRouter) or gate.capacity_free or gate.settings.dropless:
            continue
        if getattr(gate, "warned_of_drops", False):
            return
        gate.warned_of_drops = True
        settings = gate.settings
        share, mean = settings.eval_token_fraction, settings.top_k / gate.num_experts
        if 0 < share <= mean and share < 1:
            logger.warning(
                f"--moe-eval-capacity-token-fraction {share:g}: {what} computes at most "
                f"{100 * share:g} % of the tokens for each expert, and drops what is above; the "
                f"mean load of {count(gate.num_experts, 'expert')} is {100 * mean:.3g} %: {remedy}"
            )
        return


def _warn_of_schedule(cfg: Any) -> None:
    """Of a warm-up that does not end before the training or the decay, and of a rate that is never
    lowered, which fairseq accepts."""
    schedule = cfg.lr_scheduler if isinstance(cfg.lr_scheduler, Mapping) else {}
    if name_of(schedule) == "reduce_lr_on_plateau" and cfg.dataset.disable_validation:
        logger.warning(
            "--lr-scheduler reduce_lr_on_plateau lowers the learning rate by validation, which "
            "--disable-validation turns off: the rate is never lowered"
        )
    warmup, last = schedule.get("warmup_updates") or 0, cfg.optimization.max_update or 0
    decay = schedule.get("total_num_update") or 0
    if 0 < decay <= warmup:
        logger.warning(
            f"--warmup-updates {warmup} is not less than --total-num-update {decay:g}: after the "
            f"warm-up the learning rate is {schedule.get('end_learning_rate', 0):g} at once"
        )
    elif 0 < last < warmup:
        logger.warning(
            f"--warmup-updates {warmup} is more than --max-update {last}: the learning rate never "
            "reaches --lr"
        )


def warn_of_decay(cfg: Any, updates: int) -> None:
    """Of a decay to 0 that ends before the training, of this many updates, does."""
    schedule = cfg.lr_scheduler if isinstance(cfg.lr_scheduler, Mapping) else {}
    decay = schedule.get("total_num_update") or 0
    if 0 < decay < updates and not schedule.get("end_learning_rate"):
        logger.warning(
            f"--total-num-update {decay:g}: from there on the learning rate is 0, but training has "
            f"{updates} updates: use --total-num-update {updates}"
        )


def _check_losses(cfg: Any) -> None:
    """Stock's criterions leave out the losses of MoE layers. Raise UserError where a router cannot
    do without; otherwise warn. Those of others may leave them out."""
    name, router = name_of(cfg.criterion), ROUTERS[cfg.model.moe_router]
    kind = CRITERION_REGISTRY.get(name)
    if kind is None or hasattr(kind, "with_gate_losses"):  # ours, and what is derived from ours
        return
    of_router = router.loss is not TopKRouter.loss
    if not of_router and not (router.learned and has_loss(cfg.model)):
        return
    if not is_stocks(kind):
        logger.warning(
            f"--criterion {name}: unless it adds the experts' losses itself, the experts are "
            "trained without them: derive it from MoECrossEntropyCriterion (docs/balancing.md)"
        )
    elif of_router:
        raise UserError(
            f"--criterion {name} leaves out the loss that --moe-router {cfg.model.moe_router} "
            "adds to the cross-entropy, which makes it sparse or balances it: use --criterion "
            "moe_cross_entropy"
        )
    else:
        logger.warning(
            f"--criterion {name} leaves out the balancing loss of the experts: use --criterion "
            "moe_cross_entropy, or add --moe-balance none to train without that loss"
        )


def _check_amp(cfg: Any, model: Any) -> None:
    """Raise UserError if processes hold different gradients. PyTorch's scaler skips an update where
    its own process's gradients are not finite; the other processes would still make it."""
    backend = cfg.distributed_training.ddp_backend
    if getattr(model, "has_experts", False) or backend == "fully_sharded":
        raise UserError(
            "--amp: each process would decide alone whether to skip an update, by its own "
            "experts or shards: use --bf16, or --fp16 with --fp16-no-flatten-grads"
        )


def _check_metric(cfg: Any, task: Any) -> None:
    """fairseq_cli/train.py:533@0.12.2 would fail only after the first validation, by a KeyError."""
    for method in (type(task).reduce_metrics, type(task).aggregate_logging_outputs):
        if not method.__module__.startswith((FairseqTask.__module__, f"{__package__}.")):
            return  # the task logs metrics of its own
    metric = cfg.checkpoint.best_checkpoint_metric
    _check_direction(metric, cfg.checkpoint.maximize_best_checkpoint_metric)
    ours = isinstance(cfg.model, Mapping) and "moe_freq" in cfg.model
    layers = shape_of(cfg.model).sparse if ours else ()
    logged = _logged(cfg.criterion, bool(layers))
    if "moe_gate_loss" in logged:
        of_router = _logged_by_router(cfg.model)
        if cfg.criterion.get("moe_log_per_layer") and metric in _by_layer(layers, of_router):
            return
        logged += of_router
    for subset in cfg.dataset.valid_subset.split(",") if logged else ():
        given = logged + getattr(task, "validation_metrics", lambda subset: [])(subset)
        if metric not in given:
            raise UserError(
                f"--best-checkpoint-metric {metric}: validation on {subset} does not report it; "
                f"it reports {', '.join(given)}{did_you_mean(metric, given)}"
            )


def _check_direction(metric: str, maximize: bool) -> None:
    """Raise UserError if checkpoint_best.pt would be the worst."""
    if maximize and re.search("(^|_)(loss|ppl)$", metric):
        remedy = "smallest: remove"
    elif not maximize and metric == "accuracy":
        remedy = "largest: add"
    else:
        return
    raise UserError(
        f"--best-checkpoint-metric {metric}: the best is the {remedy} "
        "--maximize-best-checkpoint-metric"
    )


def _logged_by_router(model: Any) -> List[str]:
    """Names of what only some routers log. Raises UserError for the name of no router."""
    check_known(model.moe_router)
    has_loss = ROUTERS[model.moe_router].loss is not TopKRouter.loss
    null = [NULL_SHARE] if model.moe_null_experts else []
    return [*(["moe_router_loss"] if has_loss else []), *null]


def _by_layer(layers: Iterable[int], of_router: List[str]) -> List[str]:
    """Names of what --moe-log-per-layer adds, too many for a message."""
    names = "gate_loss", *METRICS, *(name for name in of_router if name == NULL_SHARE)
    return [f"layer{i}_{name}" for i in layers for name in names]


def _logged(criterion: Any, sparse: bool) -> List[str]:
    """Names of what a criterion logs; none if that is not known here."""
    if not isinstance(criterion, Mapping):
        return []
    name = name_of(criterion)
    by_sentence = ["nll_loss"] if criterion.get("sentence_avg") else []
    stock: Dict[str, List[str]] = {
        "cross_entropy": ["loss", *by_sentence, "ppl"],
        "label_smoothed_cross_entropy": ["loss", "nll_loss", "ppl"],
    }
    if name in stock:
        report = name.startswith("label") and criterion.get("report_accuracy")
        return stock[name] + (["accuracy"] if report else [])
    kind = CRITERION_REGISTRY.get(name)
    if not hasattr(kind, "logged") or kind.logged.__module__ != kind.reduce_metrics.__module__:
        return []  # the latter is of a class derived from ours, and may log more
    return kind.logged(criterion, sparse)
