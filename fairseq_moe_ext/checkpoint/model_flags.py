"""A warning where a run starts from a checkpoint of other model flags.

Some change what the weights compute, but no tensor's shape (--moe-score, --activation-fn), so
nothing else notices them.
"""

from __future__ import annotations

import logging
import math
from typing import Any, Callable, Dict, List, Mapping, Optional, Tuple

from ..balance_flags import mapping
from ..config import EXPERT_GRAD_SCALES, defaults
from ..errors import UserError
from ..expert_parallel import expert_grad_scale, process_count, process_rank
from ..moe.router import GateSettings
from ..router_flags import top_k
from ..shape import shape_of
from ..wording import flag

logger = logging.getLogger(__name__)

# Flags that a run may change: the weights compute the same in evaluation, but for what has no room.
# All others are compared, a new one too.
FREE = frozenset(
    # dropout and noise, in training alone
    "dropout attention_dropout activation_dropout moe_expert_dropout moe_eom moe_fom"
    " moe_input_jitter moe_second_expert_policy"
    # capacity, which padding may take
    " moe_capacity_factor moe_eval_capacity_token_fraction moe_dropless moe_routing_scope"
    " moe_batch_prioritized_routing moe_base_evaluation use_moe_pad_mask moe_pad_rule"
    # what is trained, and by what
    " moe_balance moe_balance_over moe_bias_update_rate moe_threshold_decay moe_freeze"
    " moe_normalize_expert_grad"
    # precision, memory and time
    " moe_gating_use_fp32 moe_gating_fp32_product checkpoint_activations compile"
    " moe_experts_on_disk record_a2a_perf_stats min_params_to_wrap fp16 memory_efficient_fp16"
    " fp16_no_flatten_grads bf16"
    # of the run: its data, its processes
    " tokens_per_sample max_target_positions batch_size ddp_backend".split()
)


def _normalize(settings: Mapping[str, Any]) -> Optional[str]:
    given = settings.get("moe_normalize_weights")
    before = bool(settings.get("moe_normalize_gate_prob_before_dropping"))
    return GateSettings(
        top_k=top_k(settings),
        normalize_before_dropping=before,
        normalize_weights=None if given is None else str(given),
    ).normalize


def _widths(settings: Mapping[str, Any]) -> Any:
    """Of the networks of dense layers, and of experts."""
    shape = shape_of(settings)
    return shape.dense_widths, shape.expert_width if shape.sparse else None


def _positions(settings: Mapping[str, Any]) -> str:
    if settings.get("no_token_positional_embeddings"):
        return "none"
    return "learned" if settings.get("decoder_learned_pos") else "sinusoidal"


def _activation(settings: Mapping[str, Any]) -> str:
    name = str(settings.get("activation_fn"))
    return "gelu_accurate" if name == "gelu_fast" else name  # fairseq/utils.py:558@0.12.2


# Flags that say one thing in several ways, and what they say together.
_TOGETHER: Dict[Tuple[str, ...], Callable[[Mapping[str, Any]], Any]] = {
    ("moe_freq", "moe_layers", "moe_first_dense"): lambda s: shape_of(s).picked,
    ("decoder_ffn_embed_dim", "alternate_decoder_ffn_embed_dim", "moe_dense_twin"): _widths,
    ("decoder_learned_pos", "no_token_positional_embeddings"): _positions,
    ("activation_fn",): _activation,
    ("moe_top_k", "moe_top1_expert"): top_k,
    ("moe_expert_ffn_dim",): lambda s: shape_of(s).expert_width,
    ("moe_shared_experts", "moe_shared_expert_ffn_dim"): lambda s: shape_of(s).shared_ffn_dim,
    ("moe_normalize_weights", "moe_normalize_gate_prob_before_dropping"): _normalize,
}
_GRAD_SCALE = "moe_normalize_expert_grad"
_SIZES = {"decoder_layers", "decoder_embed_dim", "decoder_ffn_embed_dim"}


def warn_of_changed(state: Mapping[str, Any], trainer: Any, filename: str) -> None:
    """Of the model flags that a loaded state was trained with and this run changes, by one line."""
    saved, here = (mapping(s) for s in (_model_of(state.get("cfg")), trainer.cfg.model))
    if process_rank() > 0 or "moe_router" not in here or not _SIZES <= saved.keys():
        return
    try:
        names = changed(saved, here)
    except (TypeError, ValueError, UserError):  # a stranger's settings may hold anything
        return
    if names:
        told = ", ".join(
            f"{flag(name)} {_shown(saved[name])} (here {_shown(here[name])})" for name in names
        )
        logger.warning(
            f"{filename}: trained with other model flags: {told}: its weights become those of "
            "another model; use the flags that it was trained with, unless you mean the change"
        )


def warn_of_other_gradients(state: Mapping[str, Any], trainer: Any, filename: str) -> None:
    """By one line, if a resumed optimizer gets larger or smaller gradients of experts than before,
    by another --moe-normalize-expert-grad or another number of processes."""
    cfg = state.get("cfg") or {}
    saved, here = mapping(_model_of(cfg)), mapping(trainer.cfg.model)
    before = str(saved.get(_GRAD_SCALE))
    if process_rank() > 0 or before not in EXPERT_GRAD_SCALES.__members__:
        return
    if _GRAD_SCALE not in here or not shape_of(here).sparse:
        return
    world = mapping(cfg.get("distributed_training") or {}).get("distributed_world_size")
    now, experts, processes = str(here[_GRAD_SCALE]), here["moe_expert_count"], process_count()
    trained_on = world if isinstance(world, int) and world > 0 else processes

    def relative(choice: str, count: int) -> float:  # to the mean, as other parameters have it
        return expert_grad_scale(choice, experts, count) * count

    ratio = relative(now, processes) / relative(before, trained_on)
    if math.isclose(ratio, 1):
        return
    remedy = f"use {flag(_GRAD_SCALE)} {before}"
    on = "one process" if trained_on == 1 else f"{trained_on} processes"
    if not math.isclose(relative(before, processes), relative(before, trained_on)):
        remedy = f"resume on {on}" if now == before else f"{remedy} on {on}"
    logger.warning(
        f"{flag(_GRAD_SCALE)} {now}: {filename} was trained with {before} on {on}: the experts' "
        f"gradients are {ratio:.3g} times as large from here on; to keep them, {remedy}"
    )


def _shown(value: Any) -> str:
    return "not given" if value is None else str(value)


def _model_of(cfg: Optional[Mapping[str, Any]]) -> Any:
    return (cfg or {}).get("model") or {}


def changed(saved: Mapping[str, Any], here: Mapping[str, Any]) -> List[str]:
    """The names of the model's flags with which two settings describe different models. What the
    saved ones lack does not count: they are older."""
    same = set(FREE)
    for names, meaning in _TOGETHER.items():
        if meaning(saved) == meaning(here):
            same.update(names)
    if not shape_of(saved).sparse and not shape_of(here).sparse:  # flags of experts set widths only
        same.update(name for name in defaults() if name.startswith("moe_"))
    return [
        name
        for name in defaults()
        if name not in same
        and name in saved
        and saved[name] != here[name]
        and str(saved[name]) != str(here[name])  # choices are saved as text
    ]
