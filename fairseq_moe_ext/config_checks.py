"""Checks across the flags of the model: what cannot work is refused before any work starts."""

from __future__ import annotations

from dataclasses import fields
from typing import Optional, Sequence

from . import ranges
from .balance_flags import BALANCE_CHOICES, BalanceFlags, validate_balance
from .config import (
    EXPERT_GRAD_SCALES,
    FROZEN_PARTS,
    PAD_RULES,
    ROUTING_SCOPES,
    SECOND_EXPERT_POLICIES,
    MoETransformerLMConfig,
    defaults,
)
from .errors import UserError
from .router_flags import CHOICES, RouterFlags, top_k, validate_router
from .shape import shape_of
from .wording import did_you_mean, flag

# The model's own numbers and the length of its inputs, without the size of batches.
_NUMBERS = sorted(defaults().keys() & ranges.RANGES.keys() - {"batch_size"})

# Backends that leave the experts' gradients to us.
_DDP_BACKENDS = ("legacy_ddp", "no_c10d", "pytorch_ddp", "c10d", "fully_sharded")

_CHOICES = {
    "moe_second_expert_policy": SECOND_EXPERT_POLICIES.__members__,
    "moe_routing_scope": ROUTING_SCOPES.__members__,
    "moe_normalize_expert_grad": EXPERT_GRAD_SCALES.__members__,
    "moe_freeze": FROZEN_PARTS.__members__,
    "moe_pad_rule": ["None", *PAD_RULES.__members__],
    **CHOICES,
    **BALANCE_CHOICES,
}


def refuse_both_of_layers(freq: object, layers: Optional[str]) -> None:
    """Raise UserError if --moe-freq and --moe-layers are both on a command line. In settings, which
    have a moe_freq always, moe_layers counts instead of it."""
    if freq is not None and layers is not None:
        raise UserError(
            f"--moe-freq {freq} with --moe-layers {layers}, which names all MoE layers: remove one "
            "of them"
        )


def validate(cfg: MoETransformerLMConfig) -> None:
    """Raise UserError for a setting that cannot work, or would silently have another effect."""
    _validate_shape(cfg)
    shape = shape_of(cfg)
    if str(cfg.moe_freeze) != "none" and not shape.sparse:
        raise UserError(
            f"--moe-freeze {cfg.moe_freeze}: a dense model has nothing to freeze; remove the flag"
        )
    if cfg.moe_freq == 0 and cfg.moe_layers is None:
        _validate_dense(cfg)
        return
    if cfg.moe_layers is None and not 0 < cfg.moe_freq <= cfg.decoder_layers:
        raise UserError(
            f"--moe-freq {cfg.moe_freq} picks no layer of --decoder-layers {cfg.decoder_layers}: "
            f"use 1 (all) to {cfg.decoder_layers} (the last), or 0 for a dense model"
        )
    if cfg.moe_layers is not None and cfg.moe_first_dense:
        raise UserError(
            f"--moe-first-dense {cfg.moe_first_dense} with --moe-layers {cfg.moe_layers}, which "
            "names all MoE layers: remove one of them"
        )
    if not shape.picked:
        raise UserError(
            f"--moe-first-dense {cfg.moe_first_dense} leaves no layer of --moe-freq {cfg.moe_freq} "
            f"and --decoder-layers {cfg.decoder_layers}: lower it"
        )
    width = cfg.alternate_decoder_ffn_embed_dim
    if width and cfg.moe_dense_twin:
        raise UserError(
            f"--moe-dense-twin with --alternate-decoder-ffn-embed-dim {width}: both set the "
            "width of the dense layers; remove one of them"
        )
    if width and cfg.moe_expert_count == 0:
        _refuse_flags_of_moe_layers(
            cfg,
            f"with --alternate-decoder-ffn-embed-dim {width} and no --moe-expert-count has no "
            "experts to act on: remove one of them",
            but=("moe_first_dense",),
        )
    else:  # the dense model may have the flags of a sparse one, which are those of its twin
        _validate_experts(cfg)
        _validate_kinds_of_experts(cfg)


# Flags that say nothing about a model without MoE layers, and their value when off.
OF_MOE_LAYERS = {
    "moe_first_dense": 0,
    "moe_shared_experts": 0,
    "moe_shared_expert_ffn_dim": None,
    "moe_null_experts": 0,
    "moe_latent_dim": None,
    "moe_dense_twin": False,
    **{
        field.name: field.default
        for field in (*fields(RouterFlags), *fields(BalanceFlags))
        if field.name != "_name"  # that of the model
    },
}


def _validate_dense(cfg: MoETransformerLMConfig) -> None:
    if cfg.moe_expert_count != 0:
        raise UserError(
            f"--moe-expert-count {cfg.moe_expert_count} with --moe-freq 0 would give a dense "
            "model: set --moe-freq (2: every other layer), or --moe-expert-count 0"
        )
    if cfg.alternate_decoder_ffn_embed_dim != 0:
        raise UserError(
            f"--alternate-decoder-ffn-embed-dim {cfg.alternate_decoder_ffn_embed_dim} with "
            "--moe-freq 0 has no layer to act on: set --moe-freq"
        )
    _refuse_flags_of_moe_layers(
        cfg, "with --moe-freq 0 has no layer to act on: set --moe-freq or --moe-layers"
    )


def _refuse_flags_of_moe_layers(
    cfg: MoETransformerLMConfig, reason: str, but: Sequence[str] = ()
) -> None:
    for name, off in OF_MOE_LAYERS.items():
        value = getattr(cfg, name)
        if name not in but and str(value) != str(off):
            raise UserError(flag(name) + ("" if value is True else f" {value}") + f" {reason}")


def _validate_kinds_of_experts(cfg: MoETransformerLMConfig) -> None:
    if cfg.moe_shared_expert_ffn_dim is not None and cfg.moe_shared_experts == 0:
        raise UserError(
            f"--moe-shared-expert-ffn-dim {cfg.moe_shared_expert_ffn_dim} without shared experts: "
            "set --moe-shared-experts, or remove it"
        )
    if cfg.moe_latent_dim is not None and cfg.moe_latent_dim > cfg.decoder_embed_dim:
        raise UserError(
            f"--moe-latent-dim {cfg.moe_latent_dim} is wider than the model, --decoder-embed-dim "
            f"{cfg.decoder_embed_dim}: use less"
        )


def _validate_shape(cfg: MoETransformerLMConfig) -> None:
    ranges.check({name: getattr(cfg, name) for name in _NUMBERS})
    if cfg.decoder_embed_dim % cfg.decoder_attention_heads != 0:
        raise UserError(
            f"--decoder-embed-dim {cfg.decoder_embed_dim} is not a multiple of "
            f"--decoder-attention-heads {cfg.decoder_attention_heads}: change one of them"
        )
    sinusoidal = not (cfg.decoder_learned_pos or cfg.no_token_positional_embeddings)
    # fairseq/modules/sinusoidal_positional_embedding.py:46@0.12.2 divides by half of it, less 1
    if sinusoidal and cfg.decoder_embed_dim // 2 == 1:
        raise UserError(
            f"--decoder-embed-dim {cfg.decoder_embed_dim} is too narrow for sinusoidal positions: "
            "use 4 or more, or --decoder-learned-pos"
        )


def _validate_experts(cfg: MoETransformerLMConfig) -> None:
    if cfg.moe_expert_count < 1:
        raise UserError(
            f"--moe-expert-count {cfg.moe_expert_count} with --moe-freq {cfg.moe_freq}: use 1 or "
            "more experts, or --moe-freq 0 for a dense model"
        )
    if cfg.moe_top1_expert and cfg.moe_top_k not in (None, 1):
        raise UserError(
            f"--moe-top-k {cfg.moe_top_k} conflicts with --moe-top1-expert, which is --moe-top-k "
            "1: remove one of them"
        )
    if cfg.moe_expert_count < top_k(cfg):
        raise UserError(
            f"--moe-expert-count {cfg.moe_expert_count} is too few for top-{top_k(cfg)} "
            f"routing: use {top_k(cfg)} or more, or a lower --moe-top-k"
        )
    if top_k(cfg) > 2 and str(cfg.moe_second_expert_policy) == "random":
        raise UserError(
            "--moe-second-expert-policy random applies only to two experts per token: use all "
            f"or sampling with --moe-top-k {cfg.moe_top_k}"
        )
    for name, choices in _CHOICES.items():
        # The command line and Hydra check it themselves; --model-overrides does not.
        if str(getattr(cfg, name)) not in choices:
            raise UserError(
                f"{flag(name)} {getattr(cfg, name)} is unknown: use {', '.join(choices)}"
                + did_you_mean(getattr(cfg, name), choices)
            )
    validate_router(cfg)
    validate_balance(cfg, top_k(cfg))
    if cfg.moe_batch_prioritized_routing and top_k(cfg) == 1:
        raise UserError(
            "--moe-batch-prioritized-routing has no effect with one expert per token "
            "(--moe-top1-expert, --moe-top-k 1): remove one of them"
        )
    fraction = cfg.moe_eval_capacity_token_fraction
    if fraction == 0:
        raise UserError(
            f"--moe-eval-capacity-token-fraction {fraction} is out of range: use a share of the "
            "batch above 0 up to 1, or a negative number for the rule of training"
        )
    if cfg.moe_capacity_factor is not None and cfg.moe_dropless:
        raise UserError(
            f"--moe-capacity-factor {cfg.moe_capacity_factor} conflicts with --moe-dropless, which "
            "has no capacity: remove one of them"
        )


def validate_processes(cfg: MoETransformerLMConfig, processes: int) -> None:
    """Raise UserError for settings that cannot train experts correctly on several processes. The
    number of processes is not a setting: torchrun and SLURM set it after all settings are read."""
    if cfg.ddp_backend not in _DDP_BACKENDS:
        raise UserError(
            f"--ddp-backend {cfg.ddp_backend} does not train experts correctly: use legacy_ddp, "
            "pytorch_ddp or fully_sharded"
        )
    joins = not (cfg.memory_efficient_fp16 or cfg.fp16_no_flatten_grads)
    if cfg.fp16 and joins and cfg.ddp_backend != "fully_sharded":
        raise UserError(
            "--fp16 puts the gradients of experts and shared parameters into one tensor, which "
            f"{processes} processes cannot reduce separately: add "
            "--memory-efficient-fp16 or --fp16-no-flatten-grads"
        )


def validate_scope(cfg: MoETransformerLMConfig) -> None:
    """Raise UserError for settings with which several processes cannot route together, in training
    or at evaluation."""
    if cfg.moe_routing_scope == "world" and cfg.moe_batch_prioritized_routing:
        raise UserError(
            "--moe-batch-prioritized-routing orders the tokens of one process: train with "
            "--moe-routing-scope process; to evaluate on several processes, add --model-overrides "
            "\"{'moe_routing_scope': 'process'}\""
        )
