"""Small models, ours and stock's, built without a command line."""

from types import SimpleNamespace

import torch
from fairseq.data import Dictionary
from fairseq.models.transformer_lm import (
    TransformerLanguageModel,
    TransformerLanguageModelConfig,
    base_lm_architecture,
)

import fairseq_moe_ext  # noqa: F401 - registers the model
from fairseq_moe_ext.config import MoETransformerLMConfig
from fairseq_moe_ext.models.language_model import MoETransformerLanguageModel

VOCABULARY = 40
PAD = 1
SMALL = dict(
    decoder_layers=4,
    decoder_embed_dim=16,
    decoder_ffn_embed_dim=32,
    decoder_attention_heads=2,
    dropout=0.0,
    tokens_per_sample=64,
    max_target_positions=None,
)
TRAINING = dict(batch_size=None, ddp_backend="legacy_ddp")
MOE = dict(moe_freq=2, moe_expert_count=6, moe_second_expert_policy="all")

# kinds of experts, to add to MOE
KINDS = {
    "gated": {"activation_fn": "swiglu"},
    "shared": {"moe_shared_experts": 2, "moe_shared_expert_ffn_dim": 12},
    "latent": {"moe_latent_dim": 5, "moe_expert_ffn_dim": 9, "moe_top_k": 3},
    "null": {"moe_null_experts": 4, "moe_top_k": 3},
    "listed": {"moe_layers": "0,3"},
    "first dense": {"moe_freq": 1, "moe_first_dense": 2},
    "all": {
        "activation_fn": "geglu",
        "moe_shared_experts": 1,
        "moe_latent_dim": 6,
        "moe_freq": 1,
        "moe_first_dense": 1,
        "moe_top_k": 3,
        "moe_null_experts": 2,
    },
    "twin": {"moe_dense_twin": True, "activation_fn": "swiglu", "moe_latent_dim": 5},
}


def make_task(vocabulary=VOCABULARY):
    """All of a task that building a model asks for."""
    dictionary = Dictionary()
    for i in range(vocabulary - len(dictionary)):
        dictionary.add_symbol(f"w{i}")
    return SimpleNamespace(source_dictionary=dictionary, target_dictionary=dictionary)


def make_config(**flags):
    return MoETransformerLMConfig(**{**SMALL, **TRAINING, **flags})


def build_model(seed=0, vocabulary=VOCABULARY, **flags):
    torch.manual_seed(seed)
    return MoETransformerLanguageModel.build_model(make_config(**flags), make_task(vocabulary))


def build_stock_model(seed=0, **flags):
    """Stock's transformer_lm of the same shape, in float64 for comparison."""
    torch.manual_seed(seed)
    cfg = TransformerLanguageModelConfig(
        **{
            **SMALL,
            "decoder_input_dim": SMALL["decoder_embed_dim"],
            "decoder_output_dim": SMALL["decoder_embed_dim"],
            "add_bos_token": False,
            "tpu": False,
            **flags,
        }
    )
    base_lm_architecture(cfg)
    return TransformerLanguageModel.build_model(cfg, make_task()).double().eval()


def random_tokens(rows=3, length=12):
    torch.manual_seed(1)
    return torch.randint(4, VOCABULARY, (rows, length))
