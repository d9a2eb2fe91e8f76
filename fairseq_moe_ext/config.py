"""Every flag of the model, once: type, default, choices, help; and all checks across flags.

The moe_* flags have the names and meanings of fairseq's `moe` branch, the others those of
stock `transformer_lm` (fairseq/models/transformer_lm.py@0.12.2), unless the help says otherwise.
"""

import math
from dataclasses import dataclass, field, fields
from typing import Any, Mapping, Optional

from fairseq import utils
from fairseq.dataclass import ChoiceEnum, FairseqDataclass
from omegaconf import II

from . import ranges
from .errors import UserError

SECOND_EXPERT_POLICIES = ChoiceEnum(["sampling", "all", "random"])
ROUTING_SCOPES = ChoiceEnum(["process", "world"])
EXPERT_GRAD_SCALES = ChoiceEnum(["world_size", "sqrt_world_size", "sqrt_num_experts"])
PAD_RULES = ChoiceEnum(["real", "counted", "branch"])
FROZEN_PARTS = ChoiceEnum(["none", "gate", "experts", "gate_and_experts"])


@dataclass
class MoETransformerLMConfig(FairseqDataclass):
    """Decoder-only Transformer language model, dense or with Mixture-of-Experts layers."""

    activation_fn: ChoiceEnum(utils.get_available_activation_fns()) = field(
        default="gelu", metadata={"help": "activation function to use"}
    )
    dropout: float = field(default=0.1, metadata={"help": "dropout probability"})
    attention_dropout: float = field(
        default=0.0, metadata={"help": "dropout probability for attention weights"}
    )
    activation_dropout: float = field(
        default=0.0, metadata={"help": "dropout probability after activation in FFN"}
    )
    decoder_embed_dim: int = field(default=512, metadata={"help": "width of the model"})
    decoder_ffn_embed_dim: int = field(
        default=2048, metadata={"help": "hidden width of the dense feed-forward layers"}
    )
    decoder_layers: int = field(default=6, metadata={"help": "number of layers"})
    decoder_attention_heads: int = field(default=8, metadata={"help": "number of attention heads"})
    no_decoder_final_norm: bool = field(
        default=False,
        metadata={"help": "don't add an extra layernorm after the last decoder block"},
    )
    share_decoder_input_output_embed: bool = field(
        default=False, metadata={"help": "share decoder input and output embeddings"}
    )
    decoder_learned_pos: bool = field(
        default=False, metadata={"help": "use learned positional embeddings in the decoder"}
    )
    no_token_positional_embeddings: bool = field(
        default=False, metadata={"help": "if set, disables positional embeddings"}
    )
    no_scale_embedding: bool = field(
        default=False, metadata={"help": "if set, don't multiply embeddings by sqrt(dimension)"}
    )
    layernorm_embedding: bool = field(
        default=False, metadata={"help": "add layernorm to embedding"}
    )
    checkpoint_activations: bool = field(
        default=False, metadata={"help": "recompute each layer's activations in the backward pass"}
    )
    compile: bool = field(
        default=False,
        metadata={
            "help": "apply torch.compile to dense layers and to the attention of MoE layers, in "
            "training; numbers change only by rounding. Needs a C++ compiler (CPU) or Triton (GPU)"
        },
    )

    moe_freq: int = field(
        default=0,
        metadata={
            "help": "make every moe_freq-th layer MoE: layer i, counted from 0, if "
            "(i + 1) %% moe_freq is 0; 0: a dense model"
        },
    )
    moe_expert_count: int = field(
        default=0, metadata={"help": "experts in each MoE layer, over all processes"}
    )
    moe_expert_ffn_dim: Optional[int] = field(
        default=None,
        metadata={"help": "hidden width of an expert (default: decoder_ffn_embed_dim)"},
    )
    moe_router: str = field(
        default="topk",
        metadata={"help": "how tokens choose experts: topk, or the name that a plugin registers"},
    )
    moe_top_k: Optional[int] = field(
        default=None, metadata={"help": "experts per token (default: 2)"}
    )
    moe_top1_expert: bool = field(
        default=False, metadata={"help": "one expert per token; the same as --moe-top-k 1"}
    )
    moe_gating_use_fp32: bool = field(
        default=False, metadata={"help": "compute the softmax and weights of the gate in float32"}
    )
    moe_second_expert_policy: SECOND_EXPERT_POLICIES = field(
        default="sampling",
        metadata={
            "help": "how to choose the second expert: the runner-up (all), the runner-up under "
            "Gumbel noise (sampling), or the runner-up, kept only if twice its weight exceeds a "
            "uniform random number (random). Evaluation always takes the runner-up"
        },
    )
    moe_normalize_gate_prob_before_dropping: bool = field(
        default=False,
        metadata={"help": "divide a token's weights by their sum before dropping, not after"},
    )
    moe_batch_prioritized_routing: bool = field(
        default=False,
        metadata={
            "help": "fill experts in the order of gate probability; not with one expert per token"
        },
    )
    use_moe_pad_mask: bool = field(
        default=False, metadata={"help": "do not route padding to any expert"}
    )
    moe_pad_rule: Optional[PAD_RULES] = field(
        default=None,
        metadata={
            "help": "where padding counts that --use-moe-pad-mask keeps from experts: nowhere "
            "(real), or in capacity, gate losses and metrics (counted); branch: as in the moe "
            "branch, where it counts, no position attends to padding, and the gates treat a batch "
            "of fewer than --batch-size rows as a full one. Default: real; for a checkpoint, the "
            "rule it was trained with, which is branch for those of the branch"
        },
    )
    moe_capacity_factor: Optional[float] = field(
        default=None,
        metadata={
            "help": "in training an expert takes int(factor * ceil(tokens / experts)) tokens of a "
            "batch (default: the number of experts per token)"
        },
    )
    moe_eval_capacity_token_fraction: float = field(
        default=0.25,
        metadata={
            "help": "at evaluation an expert takes ceil(fraction * tokens) tokens of a batch; "
            "1.0 drops none; negative: use the rule of training. Range (0, 1]. Token-by-token "
            "generation never drops"
        },
    )
    moe_dropless: bool = field(
        default=False,
        metadata={
            "help": "no capacity: every token reaches its experts, in training and at evaluation"
        },
    )
    moe_routing_scope: ROUTING_SCOPES = field(
        default="process",
        metadata={
            "help": "compute capacity, balancing loss and metrics over the batch of each process "
            "(process, as in the branch) or over those of all processes (world). world gives the "
            "same numbers on any number of processes"
        },
    )
    moe_normalize_expert_grad: EXPERT_GRAD_SCALES = field(
        default="world_size",
        metadata={
            "help": "divide the experts' gradients, summed over processes, by the world size (like "
            "all gradients), by its square root, or by the world size times the square root of "
            "the number of experts (the paper)"
        },
    )
    moe_expert_dropout: Optional[float] = field(
        default=None,
        metadata={
            "help": "dropout probability after the activation inside experts (default: "
            "activation_dropout, as in dense layers)"
        },
    )
    moe_freeze: FROZEN_PARTS = field(
        default="none",
        metadata={
            "help": "do not train this part of the MoE layers: the gates, the experts, or both"
        },
    )
    moe_experts_on_disk: bool = field(
        default=False,
        metadata={
            "help": "evaluation only, by --model-overrides \"{'moe_experts_on_disk': True}\": "
            "leave the experts in the checkpoint's files, in their precision, and read an expert "
            "when a token needs it"
        },
    )
    record_a2a_perf_stats: bool = field(
        default=False,
        metadata={
            "help": "log what the exchanges between processes cost per update: all_to_all_mb, the "
            "megabytes each process sends, and on CPU all_to_all_cpu_time_ms, including waiting"
        },
    )
    alternate_decoder_ffn_embed_dim: int = field(
        default=0,
        metadata={
            "help": "if > 0, make every MoE layer a dense one of this hidden width. This gives the "
            "dense twin of an MoE model, with equal FLOPs per token"
        },
    )

    min_params_to_wrap: int = field(
        default=int(1e8),
        metadata={
            "help": "with --ddp-backend fully_sharded, shard layers with at least this many "
            "parameters one by one (with --checkpoint-activations, all layers)"
        },
    )

    # Settings of other groups that the model reads.
    tokens_per_sample: int = II("task.tokens_per_sample")
    max_target_positions: Optional[int] = II("task.max_target_positions")
    max_tokens: Optional[int] = II("dataset.max_tokens")
    batch_size: Optional[int] = II("dataset.batch_size")
    ddp_backend: str = II("distributed_training.ddp_backend")
    fp16: bool = II("common.fp16")
    memory_efficient_fp16: bool = II("common.memory_efficient_fp16")
    fp16_no_flatten_grads: bool = II("common.fp16_no_flatten_grads")
    bf16: bool = II("common.bf16")


# The model's own numbers and the length of its inputs, but not the size of batches.
_NUMBERS = sorted(
    {field.name for field in fields(MoETransformerLMConfig)}
    & ranges.RANGES.keys() - {"max_tokens", "batch_size"}
)

# Backends that leave the experts' gradients to us.
_DDP_BACKENDS = ("legacy_ddp", "no_c10d", "pytorch_ddp", "c10d", "fully_sharded")

_CHOICES = {
    "moe_second_expert_policy": SECOND_EXPERT_POLICIES.__members__,
    "moe_routing_scope": ROUTING_SCOPES.__members__,
    "moe_normalize_expert_grad": EXPERT_GRAD_SCALES.__members__,
    "moe_freeze": FROZEN_PARTS.__members__,
    "moe_pad_rule": ["None", *PAD_RULES.__members__],
}


def top_k(cfg: Any) -> int:
    """Experts per token by a model's settings, an object or a mapping; 2 by default."""
    settings = cfg if isinstance(cfg, Mapping) else vars(cfg)
    if settings.get("moe_top_k") is not None:
        return settings["moe_top_k"]
    return 1 if settings.get("moe_top1_expert") else 2


def is_moe_layer(cfg: MoETransformerLMConfig, layer: int) -> bool:
    """Whether moe_freq makes this layer, counted from 0, a sparse one."""
    return cfg.moe_freq > 0 and (layer + 1) % cfg.moe_freq == 0


def saved_pad_rule(settings: Mapping[str, Any]) -> Optional[str]:
    """moe_pad_rule of a checkpoint with these model settings; None: the default applies.
    Before the setting existed, padding counted."""
    if "moe_pad_rule" in settings:
        return settings["moe_pad_rule"]
    return "counted" if settings.get("use_moe_pad_mask") else None


def validate(cfg: MoETransformerLMConfig) -> None:
    """Raise UserError for a setting that cannot work, or would silently do something else."""
    _validate_shape(cfg)
    if str(cfg.moe_freeze) != "none" and (
        cfg.moe_freq == 0 or cfg.alternate_decoder_ffn_embed_dim != 0
    ):
        raise UserError(
            f"--moe-freeze {cfg.moe_freeze}: a dense model has nothing to freeze; remove the flag"
        )
    if cfg.moe_freq == 0:
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
        return
    if not 0 < cfg.moe_freq <= cfg.decoder_layers:
        raise UserError(
            f"--moe-freq {cfg.moe_freq} picks no layer of --decoder-layers {cfg.decoder_layers}: "
            f"use 1 (all) to {cfg.decoder_layers} (the last), or 0 for a dense model"
        )
    if cfg.alternate_decoder_ffn_embed_dim == 0:
        _validate_experts(cfg)


def _validate_shape(cfg: MoETransformerLMConfig) -> None:
    ranges.check({name: getattr(cfg, name) for name in _NUMBERS})
    if cfg.decoder_embed_dim % cfg.decoder_attention_heads != 0:
        raise UserError(
            f"--decoder-embed-dim {cfg.decoder_embed_dim} is not a multiple of "
            f"--decoder-attention-heads {cfg.decoder_attention_heads}: change either"
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
            f"--moe-second-expert-policy random is a rule for the second of two experts: use all "
            f"or sampling with --moe-top-k {cfg.moe_top_k}"
        )
    for name, choices in _CHOICES.items():
        # the command line and Hydra check it themselves; --model-overrides does not
        if str(getattr(cfg, name)) not in choices:
            raise UserError(
                f"{ranges.flag(name)} {getattr(cfg, name)} is unknown: use {', '.join(choices)}"
            )
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
    _validate_capacity_factor(cfg)


def _validate_capacity_factor(cfg: MoETransformerLMConfig) -> None:
    factor = cfg.moe_capacity_factor
    if factor is None:
        return
    if cfg.moe_dropless:
        raise UserError(
            f"--moe-capacity-factor {factor} conflicts with --moe-dropless, which has no capacity: "
            "remove one of them"
        )
    tokens = max(cfg.max_tokens or 0, (cfg.batch_size or 0) * cfg.tokens_per_sample)
    if tokens > 0 and int(factor * math.ceil(tokens / cfg.moe_expert_count)) < 1:
        raise UserError(
            f"--moe-capacity-factor {factor} leaves {cfg.moe_expert_count} experts no slot in a "
            f"batch of {tokens} tokens, so every token would be dropped: raise it, --batch-size or "
            "--max-tokens"
        )


def validate_processes(cfg: MoETransformerLMConfig, processes: int) -> None:
    """Raise UserError for settings that cannot train experts correctly on several processes. Their
    number is not a setting: torchrun and SLURM define it after all settings are read."""
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
    if cfg.moe_routing_scope == "world" and cfg.moe_batch_prioritized_routing:
        raise UserError(
            "--moe-batch-prioritized-routing orders the tokens of one process: use "
            "--moe-routing-scope process"
        )
