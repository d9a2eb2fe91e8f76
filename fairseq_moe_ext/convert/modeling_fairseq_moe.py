"""A decoder-only Transformer, dense or with Mixture-of-Experts layers, for transformers.

`fairseq-moe convert CKPT DIR --to hf` copies it and experts_fairseq_moe.py, which need only torch
and transformers, into DIR, where config.json refers to it:

    AutoModelForCausalLM.from_pretrained(DIR, trust_remote_code=True)

It computes what fairseq_moe_ext computes at evaluation with nothing dropped for capacity, and has
its parameter names: `decoder.` is `model.` here, and `decoder.output_projection` is `lm_head`.
Text begins with </s>, which is a newline everywhere else (see the tokenizer).
"""

from __future__ import annotations

import math
from typing import Any, Dict, List, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast

from .experts_fairseq_moe import ACTIVATIONS, MoELayer, init_weights, inner_width

# transformers 5.20 and later say `cache` where earlier ones say `past_key_values`
CACHE = "cache" if "cache" in MoeModelOutputWithPast.__dataclass_fields__ else "past_key_values"


class FairseqMoeConfig(PretrainedConfig):
    """Settings of the model.

    Args:
        intermediate_sizes: width of the feed-forward network of each layer, or of its experts.
        sparse_layers: layers, counted from 0, with experts.
        num_experts, num_experts_per_tok: of each of them.
        router, router_settings: of ROUTERS, and what differs from ROUTER_DEFAULTS.
        shared_size: width of the experts that every token uses, together; 0: there are none.
        latent_size: width of the vectors that experts compute on; 0: hidden_size.
        router_aux_loss_coef: weight in training of the balancing loss, the mean of sparse layers.
        positions: "sinusoidal", "learned" or "none".
        embedding_norm, final_norm: whether there is a LayerNorm on the embedding, and at the end.
        fairseq: the settings of the checkpoint that this came from, to go back by.
    """

    model_type = "fairseq_moe"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]

    def __init__(
        self,
        vocab_size: int = 32,
        hidden_size: int = 16,
        intermediate_sizes: Tuple[int, ...] = (),
        num_hidden_layers: int = 0,
        num_attention_heads: int = 1,
        max_position_embeddings: int = 1024,
        activation: str = "gelu",
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        activation_dropout: float = 0.0,
        expert_dropout: float = 0.0,
        scale_embedding: bool = True,
        positions: str = "sinusoidal",
        embedding_norm: bool = False,
        final_norm: bool = True,
        sparse_layers: Tuple[int, ...] = (),
        num_experts: int = 0,
        num_experts_per_tok: int = 2,
        router: str = "topk",
        router_settings: Optional[Dict[str, Any]] = None,
        shared_size: int = 0,
        latent_size: int = 0,
        router_aux_loss_coef: float = 0.0,
        use_cache: bool = True,
        fairseq: Optional[Dict[str, Any]] = None,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_sizes = list(intermediate_sizes)
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.max_position_embeddings = max_position_embeddings
        self.activation = activation
        self.dropout = dropout
        self.attention_dropout = attention_dropout
        self.activation_dropout = activation_dropout
        self.expert_dropout = expert_dropout
        self.scale_embedding = scale_embedding
        self.positions = positions
        self.embedding_norm = embedding_norm
        self.final_norm = final_norm
        self.sparse_layers = list(sparse_layers)
        self.num_experts = num_experts
        self.num_experts_per_tok = num_experts_per_tok
        self.router = router
        self.router_settings = dict(router_settings or {})
        self.shared_size = shared_size
        self.latent_size = latent_size
        self.router_aux_loss_coef = router_aux_loss_coef
        self.use_cache = use_cache
        self.fairseq = fairseq
        super().__init__(**kwargs)


class Attention(nn.Module):
    """Causal self-attention."""

    def __init__(self, config: FairseqMoeConfig, index: int) -> None:
        super().__init__()
        dim = config.hidden_size
        self.index = index
        self.heads = config.num_attention_heads
        self.dropout = config.attention_dropout
        self.k_proj = nn.Linear(dim, dim)
        self.v_proj = nn.Linear(dim, dim)
        self.q_proj = nn.Linear(dim, dim)
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, mask: Optional[Tensor], cache: Any) -> Tensor:
        """x (B, T, D), mask (B, 1, T, keys) bool, True where a query may look; None: causal."""
        q, k, v = (
            projection(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, H, T, D / H)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if cache is not None:
            k, v = cache.update(k, v, self.index)
        dropout = self.dropout if self.training else 0.0
        causal = mask is None and q.size(2) > 1
        out = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=causal)
        return self.out_proj(out.transpose(1, 2).reshape(x.shape))


class DecoderLayer(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)), dense or with experts."""

    def __init__(self, config: FairseqMoeConfig, index: int) -> None:
        super().__init__()
        dim, width = config.hidden_size, config.intermediate_sizes[index]
        self.dropout = config.dropout
        self.activation_dropout = config.activation_dropout
        self.activation = ACTIVATIONS[config.activation]
        self.self_attn = Attention(config, index)
        self.self_attn_layer_norm = nn.LayerNorm(dim)
        self.final_layer_norm = nn.LayerNorm(dim)
        self.moe_layer = MoELayer(config, width) if index in config.sparse_layers else None
        if self.moe_layer is None:
            self.fc1 = nn.Linear(dim, inner_width(config, width))
            self.fc2 = nn.Linear(width, dim)

    def forward(
        self,
        x: Tensor,
        mask: Optional[Tensor],
        real: Optional[Tensor],
        token_ids: Optional[Tensor],
        cache: Any,
    ) -> Tuple[Tensor, Optional[Tensor]]:
        """x (B, T, D) -> the same shape, and the balancing loss of a sparse layer."""
        y = self.self_attn(self.self_attn_layer_norm(x), mask, cache)
        x = x + F.dropout(y, self.dropout, self.training)
        y = self.final_layer_norm(x)
        if self.moe_layer is not None:
            y, loss = self.moe_layer(y, real, token_ids)
            return x + y, loss
        y = F.dropout(self.activation(self.fc1(y)), self.activation_dropout, self.training)
        return x + F.dropout(self.fc2(y), self.dropout, self.training), None


class FairseqMoePreTrainedModel(PreTrainedModel):
    config_class = FairseqMoeConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DecoderLayer"]
    _supports_sdpa = True

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *model_args: Any, **kwargs: Any
    ) -> Any:
        """Routers have buffers, which transformers 4 otherwise does not load for layers on disk."""
        kwargs.setdefault("offload_buffers", True)
        return super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)

    def _init_weights(self, module: nn.Module) -> None:
        init_weights(module, self.config.hidden_size)


class FairseqMoeModel(FairseqMoePreTrainedModel):
    """Embedding, layers, final norm."""

    def __init__(self, config: FairseqMoeConfig) -> None:
        super().__init__(config)
        dim, self.pad = config.hidden_size, config.pad_token_id
        self.embed_scale = math.sqrt(dim) if config.scale_embedding else 1.0
        self.embed_tokens = nn.Embedding(config.vocab_size, dim, self.pad)
        self.embed_positions = None
        if config.positions == "learned":
            rows = config.max_position_embeddings + self.pad + 1
            self.embed_positions = nn.Embedding(rows, dim, self.pad)
        self.layernorm_embedding = nn.LayerNorm(dim) if config.embedding_norm else None
        self.layers = nn.ModuleList(
            DecoderLayer(config, i) for i in range(config.num_hidden_layers)
        )
        self.layer_norm = nn.LayerNorm(dim) if config.final_norm else None
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def set_input_embeddings(self, value: Any) -> None:
        self.embed_tokens = value

    def forward(
        self,
        input_ids: Optional[Tensor] = None,
        attention_mask: Optional[Tensor] = None,
        position_ids: Optional[Tensor] = None,
        inputs_embeds: Optional[Tensor] = None,
        use_cache: Optional[bool] = None,
        output_hidden_states: Optional[bool] = None,
        **kwargs: Any,
    ) -> Tuple[MoeModelOutputWithPast, Tensor]:
        """
        Args:
            input_ids: (B, T) int64.
            attention_mask: (B, all positions, those in the cache too), 0 for padding; by default
                what is not <pad>.
            position_ids: (B, T), from 0; by default counted from a row's first token.

        Returns:
            What transformers' models give, and the mean of the sparse layers' balancing losses ().
        """
        cache = kwargs.pop("cache", None)
        cache = kwargs.pop("past_key_values", None) if cache is None else cache
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if use_cache and cache is None and not self.training:
            cache = DynamicCache()
        past = 0 if cache is None else int(cache.get_seq_length())
        if attention_mask is None and input_ids is not None and past == 0:
            if input_ids.eq(self.pad).any():
                attention_mask = input_ids.ne(self.pad)
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        length = x.size(1)
        real = None if attention_mask is None else attention_mask.bool().to(x.device)
        x = self._embedded(self.embed_scale * x, real, position_ids, past)
        mask = _mask(real, past, length, x.device)
        real = None if real is None else real[:, past : past + length]

        wanted = output_hidden_states or self.config.output_hidden_states
        hidden: List[Tensor] = []
        losses: List[Tensor] = []
        for layer in self.layers:
            if wanted:
                hidden.append(x)
            if self.gradient_checkpointing and self.training:
                x, loss = self._gradient_checkpointing_func(
                    layer.__call__, x, mask, real, input_ids, None
                )
            else:
                x, loss = layer(x, mask, real, input_ids, cache)
            if loss is not None:
                losses.append(loss)
        x = x if self.layer_norm is None else self.layer_norm(x)
        output = MoeModelOutputWithPast(
            last_hidden_state=x,
            hidden_states=(*hidden, x) if wanted else None,
            **{CACHE: cache if use_cache else None},
        )
        if not losses:
            return output, x.new_zeros(())
        return output, torch.stack([loss.to(x.device) for loss in losses]).mean()

    def _embedded(
        self, x: Tensor, real: Optional[Tensor], position_ids: Optional[Tensor], past: int
    ) -> Tensor:
        """x (B, T, D) of tokens -> with positions, which in fairseq begin behind padding's."""
        length = x.size(1)
        if position_ids is None and real is not None:
            position_ids = (real.long().cumsum(1) - 1)[:, past : past + length]
        elif position_ids is None:
            position_ids = torch.arange(past, past + length, device=x.device)[None]
        places = position_ids.to(x.device) + self.pad + 1  # (B, T)
        if real is not None:
            places = places.where(real[:, past : past + length], self.pad)
        if self.embed_positions is not None:
            x = x + self.embed_positions(places)
        elif self.config.positions == "sinusoidal":
            x = x + sinusoids(places, x.size(-1), self.pad).to(x.dtype)
        x = x if self.layernorm_embedding is None else self.layernorm_embedding(x)
        return F.dropout(x, self.config.dropout, self.training)


def sinusoids(places: Tensor, dim: int, pad: int) -> Tensor:
    """places (B, T) -> (B, T, D) float32: sines, then cosines; zeros where there is padding."""
    half = dim // 2
    rates = torch.arange(half, dtype=torch.float32, device=places.device)
    rates = torch.exp(rates * -(math.log(10000) / (half - 1)))
    angles = places.float()[..., None] * rates
    waves = torch.cat([angles.sin(), angles.cos()], -1)
    return F.pad(waves, (0, dim - 2 * half)) * places.ne(pad)[..., None]


def _mask(real: Optional[Tensor], past: int, length: int, device: torch.device) -> Optional[Tensor]:
    """real (B, past + T) bool -> (B, 1, T, past + T) bool, True where a query may look; None:
    causal. A position may always look at itself, so that no row is without any."""
    if real is None and (past == 0 or length == 1):
        return None
    keys = torch.arange(past + length, device=device)
    queries = keys[past:, None]
    mask = (keys <= queries)[None, None]
    if real is not None:
        mask = mask & real[:, None, None] | (keys == queries)
    return mask


class FairseqMoeForCausalLM(FairseqMoePreTrainedModel, GenerationMixin):
    """The model with the output projection, for text."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: FairseqMoeConfig) -> None:
        super().__init__(config)
        self.model = FairseqMoeModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.embed_tokens = value

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.lm_head = value

    def forward(
        self,
        input_ids: Optional[Tensor] = None,
        attention_mask: Optional[Tensor] = None,
        position_ids: Optional[Tensor] = None,
        past_key_values: Any = None,
        inputs_embeds: Optional[Tensor] = None,
        labels: Optional[Tensor] = None,
        use_cache: Optional[bool] = None,
        output_hidden_states: Optional[bool] = None,
        return_dict: Optional[bool] = None,
        logits_to_keep: int = 0,
        cache: Any = None,
        num_items_in_batch: Any = None,
        **kwargs: Any,
    ) -> Any:
        """As transformers' causal language models.

        Args:
            labels: (B, T), the input tokens; -100 counts nowhere. In training, the loss
                includes `router_aux_loss_coef` times the balancing loss.
            num_items_in_batch: tokens that count in an update, of which this is one batch.
            past_key_values, cache: one thing by its names of earlier and later transformers.
        """
        output, aux_loss = self.model(
            input_ids,
            attention_mask,
            position_ids,
            inputs_embeds,
            use_cache,
            output_hidden_states,
            cache=past_key_values if cache is None else cache,
        )
        x = output.last_hidden_state
        logits = self.lm_head(x[:, -logits_to_keep:] if logits_to_keep else x)
        loss = None
        if labels is not None:
            labels = labels.to(logits.device)
            loss = _cross_entropy(logits, labels, num_items_in_batch)
            if self.training and self.config.sparse_layers:
                balancing = self.config.router_aux_loss_coef * aux_loss.to(loss)
                if num_items_in_batch is not None:
                    balancing = balancing * (labels[:, 1:].ne(-100).sum() / num_items_in_batch)
                loss = loss + balancing
        result = MoeCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            aux_loss=aux_loss if self.config.sparse_layers else None,
            hidden_states=output.hidden_states,
            **{CACHE: getattr(output, CACHE)},
        )
        return result.to_tuple() if return_dict is False else result


def _cross_entropy(logits: Tensor, labels: Tensor, items: Any) -> Tensor:
    """logits (B, T, V), labels (B, T) -> nats: the mean over tokens that count, or sum / items."""
    logits, labels = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    loss = F.cross_entropy(logits, labels, reduction="mean" if items is None else "sum")
    return loss if items is None else loss / items
