"""The models of peers.py, each with its loss of tokens and targets: ours, one of plain PyTorch,
Hugging Face's, stock fairseq's."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple

import measure
from plain_gpt import PlainGPT
from torch import Tensor, nn

from fairseq_moe_ext import cost

DROPOUT = 0.1


class Shape(NamedTuple):
    layers: int
    dim: int
    heads: int
    hidden: int
    vocabulary: int
    rows: int
    context: int

    @property
    def flops(self) -> float:
        """Of a training step."""
        shape = cost.Shape(self.layers, self.dim, self.hidden, self.vocabulary)
        tokens = self.rows * self.context
        return tokens * cost.training_flops_per_token(shape, self.context)


def plain(shape: Shape, experts: int = 0) -> nn.Module:
    return PlainGPT(
        shape.vocabulary,
        shape.layers,
        shape.dim,
        shape.heads,
        shape.hidden,
        shape.context,
        DROPOUT,
        experts,
    )


def ours(
    shape: Shape, experts: int = 0, every: int = 1, bf16: bool = False, **flags: Any
) -> nn.Module:
    """Dense; or one of `every` layers sparse, two experts of half the hidden width a token, none
    dropped: equal FLOPs."""
    if experts:
        flags.update(
            moe_freq=every,
            moe_expert_count=experts,
            moe_expert_ffn_dim=shape.hidden // 2,
            moe_second_expert_policy="all",
            moe_dropless=True,
        )
    model = measure.language_model(
        shape.vocabulary,
        decoder_layers=shape.layers,
        decoder_embed_dim=shape.dim,
        decoder_ffn_embed_dim=shape.hidden,
        decoder_attention_heads=shape.heads,
        share_decoder_input_output_embed=True,
        activation_fn="gelu",
        dropout=DROPOUT,
        tokens_per_sample=shape.context,
        **flags,
    )
    model.decoder.bfloat16_on_cpu = bf16  # as `fairseq-train --bf16` does where it pays

    def loss_of(model: Any, tokens: Tensor, target: Tensor) -> Tensor:
        loss, extra = model(tokens, target=target)
        balance = sum(record.balance_loss for record in extra["moe"])
        return loss + 0.01 * tokens.numel() * balance if extra["moe"] else loss

    return measure.Wrapped(model, loss_of)


def hugging_face(shape: Shape, experts: int = 0) -> nn.Module:
    """GPT-2; or OLMoE, whose experts have three matrices: a third of the hidden width makes the
    FLOPs of two of ours of half of it."""
    import transformers

    if experts:
        config = transformers.OlmoeConfig(
            vocab_size=shape.vocabulary,
            hidden_size=shape.dim,
            intermediate_size=shape.hidden // 3 // 16 * 16,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.heads,
            max_position_embeddings=shape.context,
            num_experts=experts,
            num_experts_per_tok=2,
            tie_word_embeddings=True,
        )
        model: nn.Module = transformers.OlmoeForCausalLM(config)
    else:
        config = transformers.GPT2Config(
            vocab_size=shape.vocabulary,
            n_positions=shape.context,
            n_embd=shape.dim,
            n_layer=shape.layers,
            n_head=shape.heads,
            n_inner=shape.hidden,
            attn_pdrop=0.0,
        )
        model = transformers.GPT2LMHeadModel(config)

    def loss_of(model: Any, tokens: Tensor, target: Tensor) -> Tensor:
        logits = model(tokens).logits
        flat = logits.flatten(0, 1).float()
        return nn.functional.cross_entropy(flat, target.flatten(), reduction="sum")

    return measure.Wrapped(model, loss_of)


def stock(shape: Shape) -> nn.Module:
    """fairseq's transformer_lm and cross_entropy."""
    from fairseq.data import Dictionary
    from fairseq.models.transformer_lm import (
        TransformerLanguageModel,
        TransformerLanguageModelConfig,
    )

    dictionary = Dictionary()
    for i in range(shape.vocabulary - len(dictionary)):
        dictionary.add_symbol(f"w{i}")
    cfg = TransformerLanguageModelConfig(
        activation_fn="gelu",
        dropout=DROPOUT,
        decoder_embed_dim=shape.dim,
        decoder_input_dim=shape.dim,
        decoder_output_dim=shape.dim,
        decoder_ffn_embed_dim=shape.hidden,
        decoder_layers=shape.layers,
        decoder_attention_heads=shape.heads,
        share_decoder_input_output_embed=True,
        tokens_per_sample=shape.context,
        max_target_positions=shape.context,
    )
    cfg.tie_adaptive_weights = cfg.tie_adaptive_proj = False
    cfg.tpu = False
    task = SimpleNamespace(source_dictionary=dictionary, target_dictionary=dictionary)
    model = TransformerLanguageModel.build_model(cfg, task)

    def loss_of(model: Any, tokens: Tensor, target: Tensor) -> Tensor:
        net_output = model(tokens)
        lprobs = model.get_normalized_probs(net_output, log_probs=True)
        return nn.functional.nll_loss(
            lprobs.flatten(0, 1), target.flatten(), ignore_index=1, reduction="sum"
        )

    return measure.Wrapped(model, loss_of)
