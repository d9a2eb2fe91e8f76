"""Defines every flag of the model once: type, default, choices, help. config_checks.py checks them.

The moe_* flags have the names and meanings of fairseq's `moe` branch, the others those of
stock `transformer_lm` (fairseq/models/transformer_lm.py:31@0.12.2), unless the help says
otherwise.
"""

from dataclasses import dataclass, field, fields
from typing import Any, Dict, Mapping, Optional

from fairseq import utils
from fairseq.dataclass import ChoiceEnum
from omegaconf import II

from .balance_flags import BalanceFlags
from .moe.activations import GATED
from .moe.routing import RUNNER_UP_POLICIES
from .router_flags import RouterFlags

SECOND_EXPERT_POLICIES = ChoiceEnum([*RUNNER_UP_POLICIES])
ROUTING_SCOPES = ChoiceEnum(["process", "world"])
ACTIVATIONS = ChoiceEnum([*utils.get_available_activation_fns(), *GATED])
EXPERT_GRAD_SCALES = ChoiceEnum(["world_size", "sqrt_world_size", "sqrt_num_experts"])
PAD_RULES = ChoiceEnum(["real", "counted", "branch"])
FROZEN_PARTS = ChoiceEnum(["none", "gate", "experts", "gate_and_experts"])


@dataclass
class MoETransformerLMConfig(RouterFlags, BalanceFlags):
    """Decoder-only Transformer language model, dense or with Mixture-of-Experts layers."""

    activation_fn: ACTIVATIONS = field(
        default="gelu",
        metadata={
            "help": "activation function in dense layers and experts; swiglu and geglu are gated: "
            "a network has a third matrix, and so 1.5 times as many parameters"
        },
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
            "help": "make every N-th layer an MoE layer: layer i, counted from 0, if "
            "(i + 1) %% N is 0; 0: a dense model"
        },
    )
    moe_layers: Optional[str] = field(
        default=None,
        metadata={"help": "the MoE layers, counted from 0, such as 1,3,5; instead of --moe-freq"},
    )
    moe_first_dense: int = field(
        default=0,
        metadata={
            "help": "keep the first N layers of the model dense, whatever --moe-freq selects"
        },
    )
    moe_expert_count: int = field(
        default=0, metadata={"help": "experts in each MoE layer, over all processes"}
    )
    moe_expert_ffn_dim: Optional[int] = field(
        default=None,
        metadata={"help": "hidden width of an expert (default: --decoder-ffn-embed-dim)"},
    )
    moe_shared_experts: int = field(
        default=0,
        metadata={
            "help": "experts of each MoE layer that every token uses, besides the chosen ones; N "
            "of them are computed as one network of N times the width"
        },
    )
    moe_shared_expert_ffn_dim: Optional[int] = field(
        default=None,
        metadata={"help": "hidden width of a shared expert (default: that of the others)"},
    )
    moe_null_experts: int = field(
        default=0,
        metadata={
            "help": "experts besides --moe-expert-count that compute nothing: a token that chooses "
            "some uses fewer than --moe-top-k. A balanced router uses them as often as others"
        },
    )
    moe_latent_dim: Optional[int] = field(
        default=None,
        metadata={
            "help": "width of the vectors that experts compute on and processes exchange: one "
            "matrix of an MoE layer projects tokens to it, another back (default: none)"
        },
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
            "help": "how to choose the experts after the first: the runners-up (all), the "
            "runners-up under Gumbel noise (sampling), or, with two experts per token, the "
            "runner-up, kept only if twice its weight exceeds a uniform random number (random). "
            "Evaluation always takes the runners-up"
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
            "help": "whether padding that --use-moe-pad-mask keeps from experts counts: nowhere "
            "(real), or in capacity, gate losses and metrics (counted). branch: as in the moe "
            "branch, where it counts, no position attends to padding, and the gates treat a batch "
            "of fewer than --batch-size rows as full. Default: real; a checkpoint keeps the rule "
            "it was trained with, which is branch for the branch's"
        },
    )
    moe_capacity_factor: Optional[float] = field(
        default=None,
        metadata={
            "help": "in training an expert takes int(factor * ceil(tokens / experts)) tokens of a "
            "batch, at least 1, where null experts count too (default: the number of experts per "
            "token)"
        },
    )
    moe_eval_capacity_token_fraction: float = field(
        default=0.25,
        metadata={
            "help": "at evaluation an expert takes ceil(fraction * tokens) tokens of a batch, with "
            "a fraction in (0, 1]; 1.0 drops none; a negative number: the rule of training. "
            "Token-by-token generation, --moe-dropless, and routers without a capacity never drop"
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
            "all gradients), by its square root (the paper's models; replicas of an expert are "
            "averaged first), or by the world size times the square root of the number of experts"
        },
    )
    moe_expert_dropout: Optional[float] = field(
        default=None,
        metadata={
            "help": "dropout probability after the activation inside experts (default: "
            "--activation-dropout, as in dense layers)"
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
            "help": "log what the exchanges between processes cost per batch (an update has "
            "--update-freq of them): all_to_all_mb, the megabytes each process sends, and on CPU "
            "all_to_all_cpu_time_ms, including waiting"
        },
    )
    alternate_decoder_ffn_embed_dim: int = field(
        default=0,
        metadata={
            "help": "if > 0, make every MoE layer a dense one of this hidden width; see "
            "--moe-dense-twin, which computes the width"
        },
    )
    moe_dense_twin: bool = field(
        default=False,
        metadata={
            "help": "make every MoE layer a dense one with as many FLOPs per token: the dense twin "
            "of the MoE model that the other flags describe"
        },
    )

    min_params_to_wrap: int = field(
        default=int(1e8),
        metadata={
            "help": "with --ddp-backend fully_sharded, shard layers with at least this many "
            "parameters one by one (with --checkpoint-activations, all layers)"
        },
    )

    # Settings of other groups that the model reads, or that the branch's checkpoints have.
    tokens_per_sample: int = II("task.tokens_per_sample")
    max_target_positions: Optional[int] = II("task.max_target_positions")
    batch_size: Optional[int] = II("dataset.batch_size")
    ddp_backend: str = II("distributed_training.ddp_backend")
    fp16: bool = II("common.fp16")
    memory_efficient_fp16: bool = II("common.memory_efficient_fp16")
    fp16_no_flatten_grads: bool = II("common.fp16_no_flatten_grads")
    bf16: bool = II("common.bf16")


def defaults() -> Dict[str, Any]:
    """The default of every flag of the model; "${...}": the setting of another group."""
    return {f.name: f.default for f in fields(MoETransformerLMConfig) if f.name != "_name"}


def saved_pad_rule(settings: Mapping[str, Any]) -> Optional[str]:
    """moe_pad_rule of a checkpoint with these model settings; None: the default applies.
    Before the setting existed, padding counted."""
    if "moe_pad_rule" in settings:
        return settings["moe_pad_rule"]
    return "counted" if settings.get("use_moe_pad_mask") else None
