"""Every flag of the model, once: type, default, choices, help; and the only checks across flags.

Names and meanings of the moe_* flags are those of fairseq's `moe` branch, of the others those of
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
    decoder_embed_dim: int = field(default=512, metadata={"help": "decoder embedding dimension"})
    decoder_ffn_embed_dim: int = field(
        default=2048, metadata={"help": "decoder embedding dimension for FFN"}
    )
    decoder_layers: int = field(default=6, metadata={"help": "num decoder layers"})
    decoder_attention_heads: int = field(
        default=8, metadata={"help": "num decoder attention heads"}
    )
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
            "help": "torch.compile dense layers and the attention of MoE layers, in training; no "
            "number changes beyond rounding. Needs a C++ compiler (CPU) or Triton (GPU)"
        },
    )

    moe_freq: int = field(
        default=0,
        metadata={
            "help": "every moe_freq-th layer is MoE: layer i (from 0) when (i + 1) %% moe_freq is "
            "0; 0: a dense model"
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
        default=None, metadata={"help": "experts a token goes to (default: 2)"}
    )
    moe_top1_expert: bool = field(
        default=False, metadata={"help": "each token to one expert: --moe-top-k 1"}
    )
    moe_gating_use_fp32: bool = field(
        default=False, metadata={"help": "softmax and weights of the gate in float32"}
    )
    moe_second_expert_policy: SECOND_EXPERT_POLICIES = field(
        default="sampling",
        metadata={
            "help": "the second expert is the runner-up (all), the runner-up under Gumbel noise "
            "(sampling), or the runner-up kept when twice its weight exceeds a uniform number "
            "(random); at evaluation always the runner-up"
        },
    )
    moe_normalize_gate_prob_before_dropping: bool = field(
        default=False,
        metadata={"help": "divide a token's two weights by their sum before, not after, dropping"},
    )
    moe_batch_prioritized_routing: bool = field(
        default=False,
        metadata={
            "help": "fill experts in the order of gate probability; not with one expert a token"
        },
    )
    use_moe_pad_mask: bool = field(
        default=False, metadata={"help": "don't route padding tokens to any expert"}
    )
    moe_pad_rule: Optional[PAD_RULES] = field(
        default=None,
        metadata={
            "help": "padding that --use-moe-pad-mask keeps from experts counts nowhere (real), or "
            "in capacity, gate losses and figures (counted); branch: as in the moe branch, where "
            "it counts, where no position looks at padding, and where the gates take a batch of "
            "fewer than --batch-size rows for a full one (default: real; for a checkpoint, the "
            "rule that it was trained by: branch for the branch's)"
        },
    )
    moe_capacity_factor: Optional[float] = field(
        default=None,
        metadata={
            "help": "in training an expert takes int(factor * ceil(tokens / experts)) tokens of a "
            "batch (default: the experts a token goes to)"
        },
    )
    moe_eval_capacity_token_fraction: float = field(
        default=0.25,
        metadata={
            "help": "at evaluation an expert takes ceil(fraction * tokens) tokens of a batch; "
            "1.0 drops none, negative: training's rule. Range (0, 1]. Token-by-token generation "
            "never drops"
        },
    )
    moe_dropless: bool = field(
        default=False,
        metadata={"help": "no capacity: every token reaches its experts, also at evaluation"},
    )
    moe_routing_scope: ROUTING_SCOPES = field(
        default="process",
        metadata={
            "help": "capacity, balancing loss and figures are taken over the batch of each process "
            "(process, as in the branch) or of all together (world), which gives the same numbers "
            "on any number of processes"
        },
    )
    moe_normalize_expert_grad: EXPERT_GRAD_SCALES = field(
        default="world_size",
        metadata={
            "help": "divide the experts' gradients, summed over processes, by the world size (as "
            "any gradient) or its square root, or by the world size and the square root of the "
            "number of experts (the paper)"
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
            "help": "train all but this part of the MoE layers: the gates, the experts, or both"
        },
    )
    moe_experts_on_disk: bool = field(
        default=False,
        metadata={
            "help": "evaluation only, by --model-overrides \"{'moe_experts_on_disk': True}\": "
            "experts stay in the checkpoint's files, in their precision, and are read from there "
            "when a token needs them"
        },
    )
    record_a2a_perf_stats: bool = field(
        default=False,
        metadata={
            "help": "log what the exchanges between processes cost an update: all_to_all_mb, the "
            "megabytes a process sends, and all_to_all_cpu_time_ms, waiting included (on CPU)"
        },
    )
    alternate_decoder_ffn_embed_dim: int = field(
        default=0,
        metadata={
            "help": "if > 0, every MoE layer becomes a dense FFN of this width: the twin of an MoE "
            "model in FLOPs a token"
        },
    )

    min_params_to_wrap: int = field(
        default=int(1e8),
        metadata={
            "help": "layers with at least so many parameters are sharded one by one under "
            "--ddp-backend fully_sharded (with --checkpoint-activations all of them)"
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


# The model's own numbers, and how long its inputs are; others' batches are no business of its.
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
    """Experts a token goes to, by settings of a model, in an object or a mapping; 2 where nothing
    is said."""
    settings = cfg if isinstance(cfg, Mapping) else vars(cfg)
    if settings.get("moe_top_k") is not None:
        return settings["moe_top_k"]
    return 1 if settings.get("moe_top1_expert") else 2


def is_moe_layer(cfg: MoETransformerLMConfig, layer: int) -> bool:
    """Whether the layer, counted from 0, is one of those that moe_freq picks."""
    return cfg.moe_freq > 0 and (layer + 1) % cfg.moe_freq == 0


def saved_pad_rule(settings: Mapping[str, Any]) -> Optional[str]:
    """moe_pad_rule of a checkpoint with these settings of its model; None: nothing is to be told.
    Before there was the setting, padding counted."""
    if "moe_pad_rule" in settings:
        return settings["moe_pad_rule"]
    return "counted" if settings.get("use_moe_pad_mask") else None


def validate(cfg: MoETransformerLMConfig) -> None:
    """Raise UserError for a setting that cannot work or would silently do something else."""
    _validate_shape(cfg)
    if str(cfg.moe_freeze) != "none" and (
        cfg.moe_freq == 0 or cfg.alternate_decoder_ffn_embed_dim != 0
    ):
        raise UserError(
            f"--moe-freeze {cfg.moe_freeze} in a dense model has nothing to freeze: drop it"
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
            f"--decoder-embed-dim {cfg.decoder_embed_dim} is no multiple of "
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
            f"--moe-top-k {cfg.moe_top_k} contradicts --moe-top1-expert, which is --moe-top-k 1: "
            "drop either"
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
        # the command line and hydra check it themselves, --model-overrides do not
        if str(getattr(cfg, name)) not in choices:
            raise UserError(
                f"{ranges.flag(name)} {getattr(cfg, name)} is unknown: use {', '.join(choices)}"
            )
    if cfg.moe_batch_prioritized_routing and top_k(cfg) == 1:
        raise UserError(
            "--moe-batch-prioritized-routing has no effect with one expert a token "
            "(--moe-top1-expert, --moe-top-k 1): drop either"
        )
    fraction = cfg.moe_eval_capacity_token_fraction
    if fraction == 0:
        raise UserError(
            f"--moe-eval-capacity-token-fraction {fraction} is out of range: use a share of the "
            "batch above 0 up to 1, or a negative number for training's rule"
        )
    _validate_capacity_factor(cfg)


def _validate_capacity_factor(cfg: MoETransformerLMConfig) -> None:
    factor = cfg.moe_capacity_factor
    if factor is None:
        return
    if cfg.moe_dropless:
        raise UserError(
            f"--moe-capacity-factor {factor} contradicts --moe-dropless, which knows no capacity: "
            "drop either"
        )
    tokens = max(cfg.max_tokens or 0, (cfg.batch_size or 0) * cfg.tokens_per_sample)
    if tokens > 0 and int(factor * math.ceil(tokens / cfg.moe_expert_count)) < 1:
        raise UserError(
            f"--moe-capacity-factor {factor} leaves {cfg.moe_expert_count} experts no slot in a "
            f"batch of {tokens} tokens, so every token would be dropped: raise it, --batch-size or "
            "--max-tokens"
        )


def validate_processes(cfg: MoETransformerLMConfig, processes: int) -> None:
    """Raise UserError for settings that cannot train experts right on several processes. How many
    they are no setting says: torchrun and SLURM tell when all settings are made."""
    if cfg.ddp_backend not in _DDP_BACKENDS:
        raise UserError(
            f"--ddp-backend {cfg.ddp_backend} does not train experts right: use legacy_ddp, "
            "pytorch_ddp or fully_sharded"
        )
    joins = not (cfg.memory_efficient_fp16 or cfg.fp16_no_flatten_grads)
    if cfg.fp16 and joins and cfg.ddp_backend != "fully_sharded":
        raise UserError(
            "--fp16 puts the gradients of experts and shared parameters into one tensor, which "
            f"{processes} processes cannot reduce apart: add "
            "--memory-efficient-fp16 or --fp16-no-flatten-grads"
        )
    if cfg.moe_routing_scope == "world" and cfg.moe_batch_prioritized_routing:
        raise UserError(
            "--moe-batch-prioritized-routing orders the tokens of one process: use "
            "--moe-routing-scope process"
        )
