"""The flags of balancing (--moe-balance), and the checks of their combinations."""

from dataclasses import dataclass, field
from typing import Any, Mapping, Optional

from fairseq.dataclass import ChoiceEnum, FairseqDataclass

from .errors import UserError
from .moe.router import ROUTERS

BALANCE = ChoiceEnum(["loss", "bias", "both", "none"])
BALANCE_OVER = ChoiceEnum(["micro_batch", "sequence", "global_batch"])
BIAS_UPDATE_RATE = 1e-3  # as in the paper, and in DeepSeek-V3

BALANCE_CHOICES = {"moe_balance": BALANCE.__members__, "moe_balance_over": BALANCE_OVER.__members__}


@dataclass
class BalanceFlags(FairseqDataclass):
    """How tokens are balanced over experts."""

    moe_balance: BALANCE = field(
        default="loss",
        metadata={
            "help": "what balances the experts: a loss on the gates, weighted by "
            "--moe-gate-loss-wt of the criterion; a bias on each expert's score, used only "
            "to choose experts, which rises after each update while the expert has fewer tokens "
            "than the mean (bias); both; or neither (none). bias and none only log the loss"
        },
    )
    moe_balance_over: BALANCE_OVER = field(
        default="micro_batch",
        metadata={
            "help": "what the balancing loss is computed over: the tokens that are routed together "
            "(micro_batch; --moe-routing-scope), each sequence by itself, or all tokens of an "
            "update, over processes and --update-freq (global_batch). With --update-freq above 1 "
            "global_batch needs a second forward pass and takes about a third longer"
        },
    )
    moe_bias_update_rate: Optional[float] = field(
        default=None,
        metadata={
            "help": "with --moe-balance bias or both: step of an expert's bias per update "
            f"(default: {BIAS_UPDATE_RATE})"
        },
    )


def has_bias(cfg: Any) -> bool:
    """Whether a bias balances (--moe-balance bias, both); cfg: an object or a mapping."""
    return _balance(cfg) in ("bias", "both")


def has_loss(cfg: Any) -> bool:
    """Whether a loss balances (--moe-balance loss, both); cfg: an object or a mapping."""
    return _balance(cfg) in ("loss", "both")


def mapping(cfg: Any) -> Mapping[str, Any]:
    """Settings by name; cfg: an object or a mapping."""
    return cfg if isinstance(cfg, Mapping) else vars(cfg)


def _balance(cfg: Any) -> str:
    return str(mapping(cfg).get("moe_balance", "loss"))


def bias_update_rate(cfg: Any) -> float:
    """Step of the balancing bias per update; 0: no bias."""
    if not has_bias(cfg):
        return 0.0
    return BIAS_UPDATE_RATE if cfg.moe_bias_update_rate is None else cfg.moe_bias_update_rate


def validate_balance(cfg: Any, top_k: int) -> None:
    """Raise UserError for flags that conflict with each other or with the router."""
    over = str(cfg.moe_balance_over)
    if over != "micro_batch" and not has_loss(cfg):
        raise UserError(
            f"--moe-balance-over {over} with --moe-balance {cfg.moe_balance}, which has no "
            "balancing loss: use --moe-balance loss or both, or remove it"
        )
    if over == "sequence" and cfg.moe_pad_rule == "branch":
        raise UserError(
            "--moe-balance-over sequence with --moe-pad-rule branch, which counts tokens that "
            "belong to no sequence: use another pad rule, or --moe-balance-over micro_batch"
        )
    untrained = not ROUTERS[cfg.moe_router].learned
    if untrained and (over != "micro_batch" or str(cfg.moe_balance) == "both"):
        raise UserError(
            f"--moe-balance {cfg.moe_balance} --moe-balance-over {over} with --moe-router "
            f"{cfg.moe_router}, whose gate is not trained, so no loss can balance it: remove "
            "them, or use --moe-balance bias or none"
        )
    if has_bias(cfg):
        _validate_bias(cfg, top_k)
    elif cfg.moe_bias_update_rate is not None:
        raise UserError(
            f"--moe-bias-update-rate {cfg.moe_bias_update_rate} with --moe-balance "
            f"{cfg.moe_balance}, which has no bias: use --moe-balance bias or both, or remove it"
        )


def _validate_bias(cfg: Any, top_k: int) -> None:
    flag = f"--moe-balance {cfg.moe_balance}"
    if "balance_bias" not in ROUTERS[cfg.moe_router].heeds:
        able = [name for name, router in ROUTERS.items() if "balance_bias" in router.heeds]
        raise UserError(
            f"{flag} with --moe-router {cfg.moe_router}, which does not choose by score, so a "
            f"bias has no effect: use --moe-router {' or '.join(able)}, or --moe-balance loss or "
            "none"
        )
    if top_k == cfg.moe_expert_count and not cfg.moe_null_experts:
        raise UserError(
            f"{flag}: a token uses every expert (--moe-top-k {top_k}), so a bias has no effect; "
            "lower --moe-top-k, or use --moe-balance none"
        )
    if top_k > 1 and str(cfg.moe_second_expert_policy) == "sampling":
        raise UserError(
            f"{flag} with --moe-second-expert-policy sampling, which samples from the logits "
            "without the bias: use --moe-second-expert-policy all"
        )
