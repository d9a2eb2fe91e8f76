"""Checks of what a trainer is built from, before the first update; patches/trainer.py calls
`check_trainer`."""

import logging
from typing import Any, Dict, List, Mapping

import torch
from fairseq.criterions import CRITERION_REGISTRY

from .balance_flags import has_loss
from .errors import UserError
from .moe.router import ROUTERS, TopKRouter
from .starting import name_of

logger = logging.getLogger(__name__)


def check_trainer(cfg: Any, task: Any, model: Any) -> None:
    """Raise UserError for settings with which no trainer can be built."""
    getattr(task, "check_training", lambda: None)()
    sharding = str(cfg.distributed_training.zero_sharding)
    if sharding != "none" and not torch.distributed.is_initialized():
        raise UserError(
            f"--zero-sharding {sharding} needs several processes, but there is only one: remove it"
        )
    together = torch.distributed.is_initialized()  # under torchrun also a process alone
    if cfg.common.amp and together and torch.distributed.get_world_size() > 1:
        _check_amp(cfg, model)
    if getattr(model, "has_experts", False):
        _check_losses(cfg)
    over = str(getattr(cfg.model, "moe_balance_over", None))
    transform = str(getattr(cfg.criterion, "moe_gate_loss_transform", "none"))
    if over == "global_batch" and transform != "none":
        raise UserError(
            f"--moe-gate-loss-transform {transform} with --moe-balance-over {over}: the "
            "transformed loss is not a sum over micro-batches: use none, or another "
            "--moe-balance-over"
        )
    if not cfg.dataset.disable_validation:
        _check_metric(cfg, task, model)


def _check_losses(cfg: Any) -> None:
    """Stock's criterions leave out the losses of MoE layers. Raise UserError where a router cannot
    do without; otherwise warn."""
    name, router = name_of(cfg.criterion), ROUTERS[cfg.model.moe_router]
    kind = CRITERION_REGISTRY.get(name)
    if kind is None or not kind.__module__.startswith("fairseq."):
        return
    if router.loss is not TopKRouter.loss:
        raise UserError(
            f"--criterion {name} leaves out the loss that --moe-router {cfg.model.moe_router} "
            "adds to the cross-entropy, which makes it sparse or balances it: use --criterion "
            "moe_cross_entropy"
        )
    if router.learned and has_loss(cfg.model):
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


def _check_metric(cfg: Any, task: Any, model: Any) -> None:
    metric = cfg.checkpoint.best_checkpoint_metric
    logged = _logged(cfg.criterion, bool(getattr(model, "has_experts", False)))
    for subset in cfg.dataset.valid_subset.split(",") if logged else ():
        given = logged + getattr(task, "validation_metrics", lambda subset: [])(subset)
        if metric not in given:
            raise UserError(
                f"--best-checkpoint-metric {metric}: validation on {subset} does not report it; "
                f"it reports {', '.join(given)}"
            )


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
    return kind.logged(criterion, sparse) if hasattr(kind, "logged") else []
