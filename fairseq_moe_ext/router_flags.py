"""The flags of routers, but for those of fairseq's `moe` branch (config.py), and what goes with
which router."""

from dataclasses import dataclass, field
from typing import Any, Dict, Optional, Tuple

from fairseq.dataclass import ChoiceEnum, FairseqDataclass

from .balance_flags import bias_update_rate, mapping
from .errors import UnknownRouter, UserError
from .moe import routers, routing  # noqa: F401 - routers registers them
from .moe.router import ROUTERS, GateSettings
from .moe.routing import check_groups
from .wording import did_you_mean, flag

SCORES = ChoiceEnum([*routing.SCORES])
NORMALIZED = ChoiceEnum(["before", "after", "none"])
BASE_EVALUATION = ChoiceEnum(["greedy", "balanced"])


@dataclass
class RouterFlags(FairseqDataclass):
    """Which experts a token takes, and with what weights."""

    moe_router: str = field(
        default="topk",
        metadata={
            "help": "how tokens choose experts: topk, sinkhorn, base, hash, threshold, relu, "
            "random, or the name that a plugin registers"
        },
    )
    moe_top_k: Optional[int] = field(
        default=None,
        metadata={
            "help": "experts per token; with threshold and relu the average (default: 2; base: 1)"
        },
    )
    moe_score: SCORES = field(
        default="softmax",
        metadata={
            "help": "the score that chooses and weights an expert: the softmax of all logits, or "
            "the sigmoid of the expert's logit"
        },
    )
    moe_normalize_weights: Optional[NORMALIZED] = field(
        default=None,
        metadata={
            "help": "divide a token's weights by their sum before choices are dropped, after, or "
            "not at all (none). Default: after; before with "
            "--moe-normalize-gate-prob-before-dropping; none with one expert per token"
        },
    )
    moe_route_scale: float = field(
        default=1.0, metadata={"help": "factor on the weights of a token's experts"}
    )
    moe_groups: int = field(
        default=1,
        metadata={
            "help": "divide the experts into this many equal groups; a token chooses among the "
            "experts of its best --moe-top-groups groups (DeepSeek-V3)"
        },
    )
    moe_top_groups: int = field(
        default=1, metadata={"help": "number of groups from which a token may take experts"}
    )
    moe_gating_fp32_product: bool = field(
        default=False,
        metadata={
            "help": "compute the whole gate in float32, including the matrix product; without it, "
            "--moe-gating-use-fp32 starts at the logits, as in the branch"
        },
    )
    moe_input_jitter: float = field(
        default=0.0,
        metadata={"help": "in training, multiply the gate's input by U(1 - jitter, 1 + jitter)"},
    )
    moe_eom: float = field(
        default=0.0,
        metadata={
            "help": "expert output masking (NLLB): dropout probability p of an expert's output for "
            "a token. Training divides what is kept by 1 - p; NLLB's code instead multiplies all "
            "by 1 - p at evaluation"
        },
    )
    moe_fom: float = field(
        default=0.0,
        metadata={
            "help": "final output masking (NLLB): dropout probability of the sum of the outputs of "
            "a token's experts, scaled as with --moe-eom"
        },
    )
    moe_threshold_decay: float = field(
        default=0.99,
        metadata={
            "help": "with --moe-router threshold: decay per update of the moving average of an "
            "expert's quantile"
        },
    )
    moe_base_evaluation: BASE_EVALUATION = field(
        default="greedy",
        metadata={
            "help": "with --moe-router base: at evaluation a token takes its best expert (greedy), "
            "or the batch is assigned evenly as in training (balanced); then a row depends on the "
            "others of its batch and on later tokens"
        },
    )


# Flags that only some routers use, and the name of each in GateSettings.
_OF_SOME = {
    "moe_score": "score",
    "moe_normalize_weights": "normalize_weights",
    "moe_normalize_gate_prob_before_dropping": "normalize_before_dropping",
    "moe_route_scale": "route_scale",
    "moe_groups": "groups",
    "moe_top_groups": "groups",
    "moe_batch_prioritized_routing": "batch_prioritized",
    "moe_gating_fp32_product": "fp32_product",
    "moe_input_jitter": "input_jitter",
    "moe_threshold_decay": "threshold_decay",
    "moe_null_experts": "null_experts",
    "moe_base_evaluation": "balanced_evaluation",
    "moe_second_expert_policy": "second_expert_policy",
}
DEFAULTS: Dict[str, Any] = {
    **{name: kind.default for name, kind in RouterFlags.__dataclass_fields__.items()},
    "moe_normalize_gate_prob_before_dropping": False,
    "moe_batch_prioritized_routing": False,
    "moe_null_experts": 0,
}
CHOICES = {
    "moe_score": SCORES.__members__,
    "moe_normalize_weights": ["None", *NORMALIZED.__members__],
    "moe_base_evaluation": BASE_EVALUATION.__members__,
}


def top_k(cfg: Any) -> int:
    """Experts per token by a model's settings, an object or a mapping."""
    settings = mapping(cfg)
    if settings.get("moe_top_k") is not None:
        return settings["moe_top_k"]
    if settings.get("moe_top1_expert"):
        return 1
    router = ROUTERS.get(settings.get("moe_router", "topk"))
    return 2 if router is None else router.default_top_k


def gate_settings(cfg: Any) -> GateSettings:
    """A router's settings from those of a model."""
    normalize = cfg.moe_normalize_weights
    return GateSettings(
        top_k=top_k(cfg),
        use_fp32=cfg.moe_gating_use_fp32 or cfg.moe_gating_fp32_product,
        second_expert_policy=str(cfg.moe_second_expert_policy),
        normalize_before_dropping=cfg.moe_normalize_gate_prob_before_dropping,
        batch_prioritized=cfg.moe_batch_prioritized_routing,
        capacity_factor=cfg.moe_capacity_factor,
        eval_token_fraction=cfg.moe_eval_capacity_token_fraction,
        dropless=cfg.moe_dropless,
        count_padding=cfg.moe_pad_rule not in (None, "real"),
        score=str(cfg.moe_score),
        normalize_weights=None if normalize is None else str(normalize),
        route_scale=cfg.moe_route_scale,
        groups=cfg.moe_groups,
        top_groups=cfg.moe_top_groups,
        fp32_product=cfg.moe_gating_fp32_product,
        input_jitter=cfg.moe_input_jitter,
        eom=cfg.moe_eom,
        fom=cfg.moe_fom,
        threshold_decay=cfg.moe_threshold_decay,
        balanced_evaluation=str(cfg.moe_base_evaluation) == "balanced",
        null_experts=cfg.moe_null_experts,
        bias_update_rate=bias_update_rate(cfg),
    )


def check_known(router: str) -> None:
    """Raise UnknownRouter for the name of none."""
    if router not in ROUTERS:
        raise UnknownRouter(
            f"--moe-router {router} is unknown: use {', '.join(ROUTERS)}, or pass the "
            f"plugin that registers it (--user-dir){did_you_mean(router, ROUTERS)}"
        )


def validate_router(cfg: Any) -> None:
    """Raise UserError for flags that do not go together, or with the router."""
    check_known(cfg.moe_router)
    router = ROUTERS[cfg.moe_router]
    for name, setting in _OF_SOME.items():
        value = getattr(cfg, name)
        if setting not in router.heeds and str(value) not in _without_effect(name):
            heeding = [n for n, kind in ROUTERS.items() if setting in kind.heeds]
            raise UserError(
                f"{flag(name)}{'' if value is True else f' {value}'} has no effect with "
                f"--moe-router {cfg.moe_router}: remove it, or use {' or '.join(heeding)}"
            )
    if cfg.moe_router == "base" and top_k(cfg) != 1:
        raise UserError(
            f"--moe-top-k {cfg.moe_top_k}: --moe-router base gives a token one expert; remove it"
        )
    if router.capacity_free and cfg.moe_capacity_factor is not None:
        raise UserError(
            f"--moe-capacity-factor {cfg.moe_capacity_factor}: --moe-router {cfg.moe_router} has "
            "no capacity; remove it"
        )
    if not router.learned and str(cfg.moe_freeze) in ("gate", "gate_and_experts"):
        raise UserError(
            f"--moe-freeze {cfg.moe_freeze}: --moe-router {cfg.moe_router} has no gate that is "
            "trained; remove the flag"
            + ("" if str(cfg.moe_freeze) == "gate" else ", or use --moe-freeze experts")
        )
    _validate_weights(cfg)
    _validate_groups(cfg)


def _without_effect(name: str) -> Tuple[str, ...]:
    """Values of a flag that a router may be given which does not heed it."""
    # "all" asks for no noise, and other routers have none
    return ("sampling", "all") if name == "moe_second_expert_policy" else (str(DEFAULTS[name]),)


def _validate_weights(cfg: Any) -> None:
    normalize = str(cfg.moe_normalize_weights)
    if normalize != "None" and cfg.moe_normalize_gate_prob_before_dropping:
        raise UserError(
            f"--moe-normalize-weights {normalize} and --moe-normalize-gate-prob-before-dropping "
            "set the same thing: remove the second"
        )
    if normalize in ("before", "after") and top_k(cfg) == 1:
        raise UserError(
            f"--moe-normalize-weights {normalize} with one expert per token would make every "
            "weight 1, and the gate would learn nothing: use none"
        )


def _validate_groups(cfg: Any) -> None:
    groups, top = cfg.moe_groups, cfg.moe_top_groups
    if groups > 1 and cfg.moe_null_experts:
        raise UserError(
            f"--moe-groups {groups} with --moe-null-experts {cfg.moe_null_experts}: null experts "
            "belong to no group; remove one of them"
        )
    try:
        check_groups(top_k(cfg), cfg.moe_expert_count, groups, top)
    except ValueError as error:
        raise UserError(f"--moe-groups {groups} --moe-top-groups {top}: {error}") from error
    if groups > 1 and top == groups:
        raise UserError(
            f"--moe-top-groups {top} of --moe-groups {groups} excludes no expert: use fewer, or "
            "remove both"
        )
