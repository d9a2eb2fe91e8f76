"""The paper's model sizes as data, and two for a laptop; registered as architectures by name.

Artetxe et al. 2021 (arXiv 2112.10684), table 1. An architecture is a set of defaults: any of them
can be overridden by its flag.
"""

from typing import Any, Dict, Mapping

from fairseq.models import ARCH_MODEL_REGISTRY, register_model_architecture
from omegaconf import DictConfig

from ..config import defaults
from .language_model import MODEL_NAME, MoETransformerLanguageModel

# Pre-norm, GELU, sinusoidal positions, tied embeddings; dropout and the rest as the config's.
_COMMON: Dict[str, Any] = {
    "activation_fn": "gelu",
    "dropout": 0.1,
    "attention_dropout": 0.1,
    "share_decoder_input_output_embed": True,
}

# Every second layer sparse, 512 experts, top-2 without noise, gate in float32, capacity factor 2.
# The paper says that experts' gradients are scaled by 1 / sqrt(experts). The released models'
# settings say sqrt_world_size, with which the moe branch (under FSDP only) divides their sum over
# processes by the root of the number of processes.
_MOE: Dict[str, Any] = {
    "moe_freq": 2,
    "moe_expert_count": 512,
    "moe_gating_use_fp32": True,
    "moe_second_expert_policy": "all",
    "moe_normalize_expert_grad": "sqrt_world_size",
}


def _size(layers: int, dim: int, heads: int) -> Dict[str, Any]:
    return {
        **_COMMON,
        "decoder_layers": layers,
        "decoder_embed_dim": dim,
        "decoder_ffn_embed_dim": 4 * dim,
        "decoder_attention_heads": heads,
    }


ARCHITECTURES: Dict[str, Dict[str, Any]] = {
    "dense_lm_tiny": _size(4, 128, 4),
    "dense_lm_125m": _size(12, 768, 12),
    "dense_lm_355m": _size(24, 1024, 16),
    "dense_lm_1_3b": _size(24, 2048, 32),
    "dense_lm_2_7b": _size(32, 2560, 32),
    "dense_lm_6_7b": _size(32, 4096, 32),
    "dense_lm_13b": _size(40, 5120, 40),
    "moe_lm_tiny": {
        **_size(4, 128, 4),
        **_MOE,
        "moe_expert_count": 8,
        "moe_normalize_expert_grad": "world_size",  # the same on any number of processes
    },
    "moe_lm_15b": {**_size(12, 768, 12), **_MOE},
    "moe_lm_52b": {**_size(24, 1024, 16), **_MOE},
    "moe_lm_207b": {**_size(24, 2048, 32), **_MOE},
    "moe_lm_1_1t": {**_size(32, 4096, 32), **_MOE},
}


def name_of(settings: Mapping[str, Any]) -> str:
    """The architecture or model that a model's saved settings name."""
    return str(settings.get("_name") or settings.get("arch"))


def is_ours(settings: Mapping[str, Any]) -> bool:
    """Whether a model's saved settings are of our model, by an architecture that a plugin has
    registered for it, too."""
    return ARCH_MODEL_REGISTRY.get(name_of(settings)) is MoETransformerLanguageModel


def _register(name: str, sizes: Dict[str, Any]) -> None:
    # What neither the user nor the architecture sets has the config's default. That is written out
    # here for checkpoints of an earlier version, which lack the flags added since.
    values = {**defaults(), **sizes}.items()

    @register_model_architecture(MODEL_NAME, name)
    def architecture(args) -> None:
        for key, value in values:
            present = key in args if isinstance(args, DictConfig) else hasattr(args, key)
            if not present and not str(value).startswith("${"):
                setattr(args, key, value)


for _name, _sizes in ARCHITECTURES.items():
    _register(_name, _sizes)
