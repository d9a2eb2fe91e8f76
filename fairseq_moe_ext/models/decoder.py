"""A decoder-only Transformer, pre-norm, whose feed-forward layers are dense or MoE.

Leaner than stock's decoder (batch first throughout, no cross-attention), with its parameter names,
so that dense checkpoints of `transformer_lm` load here and ours there.
"""

import math
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple, cast

import torch
import torch.nn.functional as F
from fairseq import utils
from fairseq.data import Dictionary
from fairseq.models import FairseqIncrementalDecoder
from fairseq.models.transformer import Embedding
from fairseq.modules import LayerNorm, PositionalEmbedding, SinusoidalPositionalEmbedding
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..balance_flags import has_loss
from ..config import MoETransformerLMConfig
from ..errors import DAMAGED, NotFinite, UserError, not_finite
from ..expert_parallel import ExpertParallel, WorldScope, expert_grad_scale, process_count
from ..fully_sharded import wrap_layer
from ..kernels.dropout import add_dropout, dropout
from ..kernels.matmul import Linear
from ..moe.activations import inner_width
from ..moe.balance import Balance
from ..moe.exchange import HERE
from ..moe.layer import MoELayer, MoEOutput
from ..moe.scope import PROCESS
from ..router_flags import gate_settings
from ..shape import context_length, shape_of
from .activation import activation_named
from .attention import CausalSelfAttention, IncrementalState
from .compiled import compiled
from .padding import PadRule
from .precision import rounded
from .router_updates import RouterUpdates


class LayerRecord(NamedTuple):
    """What an MoE layer reports in addition to its output."""

    layer: int  # from 0
    balance_loss: Tensor  # (), differentiable
    z_loss: Tensor  # (), differentiable
    stats: Dict[str, Tensor]  # moe/stats.py
    expert_counts: Tensor  # (K, E) int64: choices of each expert, null ones too, before dropping
    router_loss: Optional[Tensor]  # (), differentiable: a loss of the router's own, weighted
    observed: Dict[str, Tensor]  # sums over tokens, for TopKRouter.after_update


class DecoderLayer(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)), dense or MoE."""

    def __init__(
        self, cfg: MoETransformerLMConfig, index: int, token_counts: Sequence[int]
    ) -> None:
        super().__init__()
        dim = cfg.decoder_embed_dim
        self.dropout = cfg.dropout
        self.activation_dropout = cfg.activation_dropout
        self.activation = activation_named(str(cfg.activation_fn))
        self.self_attn = CausalSelfAttention(
            dim, cfg.decoder_attention_heads, cfg.attention_dropout
        )
        self.self_attn_layer_norm = LayerNorm(dim)
        self.final_layer_norm = LayerNorm(dim)
        self.moe_layer: Optional[MoELayer] = None
        self.checkpoint_activations = cfg.checkpoint_activations
        self.compiled = cfg.compile
        ffn_dim = shape_of(cfg).dense_widths[index]
        if ffn_dim is None:
            self.moe_layer = self._build_moe_layer(cfg, token_counts)
            return
        self.fc1 = Linear(dim, inner_width(self.activation, ffn_dim))
        self.fc2 = Linear(ffn_dim, dim)

    def _build_moe_layer(
        self, cfg: MoETransformerLMConfig, token_counts: Sequence[int]
    ) -> MoELayer:
        distributed, over = process_count() > 1, str(cfg.moe_balance_over)
        together = distributed and (cfg.moe_routing_scope == "world" or over == "global_batch")
        shape = shape_of(cfg)
        return MoELayer.build(
            cfg.decoder_embed_dim,
            shape.expert_width,
            cfg.moe_expert_count,
            gate_settings(cfg),
            router=cfg.moe_router,
            exchange=ExpertParallel(cfg.moe_expert_count) if distributed else HERE,
            scope=WorldScope() if distributed and cfg.moe_routing_scope == "world" else PROCESS,
            shared_ffn_dim=shape.shared_ffn_dim,
            latent_dim=shape.latent_dim,
            token_counts=token_counts,
            balance=Balance(over, WorldScope() if together else PROCESS),
            activation=self.activation,
            activation_dropout=(
                cfg.activation_dropout if cfg.moe_expert_dropout is None else cfg.moe_expert_dropout
            ),
            dropout=cfg.dropout,
            grad_scale=expert_grad_scale(
                str(cfg.moe_normalize_expert_grad), cfg.moe_expert_count, process_count()
            ),
            in_files=cfg.moe_experts_on_disk,
        )

    def forward(
        self,
        x: Tensor,
        attn_mask: Optional[Tensor],
        unrouted: Optional[Tensor],
        tokens: Tensor,
        incremental_state: Optional[IncrementalState] = None,
    ) -> Tuple[Tensor, Optional[MoEOutput]]:
        """x (B, S, D), attn_mask as CausalSelfAttention's, unrouted as PadRule's, tokens (B, S)
        int64 -> the shape of x, and the output of the MoE layer (None from a dense one).

        Recomputation (checkpoint_activations) happens inside, because FSDP, which may wrap the
        layer, has gathered the parameters by then."""
        if self.checkpoint_activations and self.training and incremental_state is None:
            return checkpoint(self._forward, x, attn_mask, unrouted, tokens, use_reentrant=False)
        return self._forward(x, attn_mask, unrouted, tokens, incremental_state)

    def _forward(
        self,
        x: Tensor,
        attn_mask: Optional[Tensor],
        unrouted: Optional[Tensor],
        tokens: Tensor,
        incremental_state: Optional[IncrementalState] = None,
    ) -> Tuple[Tensor, Optional[MoEOutput]]:
        # Evaluation is not compiled, because its batches differ in shape; nor are experts, because
        # their numbers of rows do; nor a batch without rows, which may occur once per epoch.
        attend, dense = DecoderLayer._attend, DecoderLayer._dense
        if self.compiled and self.training and len(x):
            attend, dense = compiled(attend), compiled(dense)
        if self.moe_layer is None:
            return dense(self, x, attn_mask, incremental_state), None
        x, y = attend(self, x, attn_mask, incremental_state)
        # In token-by-token generation a batch is one position of unrelated sequences; a capacity
        # would let them push each other out of experts.
        y, token_ids, length = y.flatten(0, 1), tokens.flatten(), tokens.size(1)
        if unrouted is not None:
            missing = len(unrouted) - len(y)
            y, token_ids = F.pad(y, (0, 0, 0, missing)), F.pad(token_ids, (0, missing))
        alone = incremental_state is not None
        moe = self.moe_layer(y, unrouted, alone, token_ids, length, output_alone=alone)
        return x + moe.out[: tokens.numel()].view_as(x), moe

    def _attend(
        self, x: Tensor, attn_mask: Optional[Tensor], incremental_state: Optional[IncrementalState]
    ) -> Tuple[Tensor, Tensor]:
        """x (B, S, D) -> x + attention(norm(x)), and the norm of that, (B, S, D) each."""
        y = self.self_attn(self.self_attn_layer_norm(x), attn_mask, incremental_state)
        x = add_dropout(x, y, self.dropout, self.training)
        return x, self.final_layer_norm(x)

    def _dense(
        self, x: Tensor, attn_mask: Optional[Tensor], incremental_state: Optional[IncrementalState]
    ) -> Tensor:
        """A complete dense layer: x (B, S, D) -> (B, S, D)."""
        x, y = self._attend(x, attn_mask, incremental_state)
        y = self.activation(self.fc1(y))
        y = self.fc2(dropout(y, self.activation_dropout, self.training))
        return add_dropout(x, y, self.dropout, self.training)


class MoETransformerDecoder(FairseqIncrementalDecoder):
    """Embedding, layers, final norm, output projection."""

    def __init__(self, cfg: MoETransformerLMConfig, dictionary: Dictionary) -> None:
        super().__init__(dictionary)
        # Stock registers the version of its state; with it, each loads the other's.
        self.register_buffer("version", torch.tensor([3.0]))
        dim = cfg.decoder_embed_dim
        self.padding_idx = dictionary.pad()
        self.pad_rule = PadRule(cfg, self.padding_idx)
        self.dropout = cfg.dropout
        self.bfloat16_on_cpu = False  # precision.py says when
        self.record_traffic = cfg.record_a2a_perf_stats
        self.balanced_by_loss = has_loss(cfg)
        # Set while balancing losses are parts of that of a whole batch (patches/whole_batch.py).
        self.whole_sample_size: Optional[float] = None
        self.share_input_output_embed = cfg.share_decoder_input_output_embed
        self.max_target_positions = context_length(cfg)
        self.embed_scale = 1.0 if cfg.no_scale_embedding else math.sqrt(dim)

        self.embed_tokens = Embedding(len(dictionary), dim, self.padding_idx)
        self.embed_positions = None
        if not cfg.no_token_positional_embeddings:
            self.embed_positions = PositionalEmbedding(
                self.max_target_positions, dim, self.padding_idx, learned=cfg.decoder_learned_pos
            )
        if isinstance(self.embed_positions, SinusoidalPositionalEmbedding):
            # Stock leaves this marker of precision uninitialised, so that no two checkpoints of
            # one model are alike.
            self.embed_positions._float_tensor.zero_()
        self.layernorm_embedding = LayerNorm(dim) if cfg.layernorm_embedding else None
        self.layers = nn.ModuleList(
            _build_layer(cfg, i, dictionary.count) for i in range(cfg.decoder_layers)
        )
        self.router_updates = RouterUpdates(
            {
                index: layer.moe_layer.gate
                for index, layer in enumerate(cast(Sequence[DecoderLayer], self.layers))
                if layer.moe_layer is not None
            }
        )
        self.layer_norm = None if cfg.no_decoder_final_norm else LayerNorm(dim)
        self.output_projection = Linear(dim, len(dictionary), bias=False)
        if self.share_input_output_embed:
            self.output_projection.weight = self.embed_tokens.weight
        else:
            nn.init.normal_(self.output_projection.weight, mean=0, std=dim**-0.5)

    def forward(
        self,
        prev_output_tokens: Tensor,
        encoder_out: None = None,
        incremental_state: Optional[IncrementalState] = None,
        features_only: bool = False,
        **unused: Any,
    ) -> Tuple[Tensor, Dict[str, Any]]:
        """
        Args:
            prev_output_tokens: (B, S) int64; with incremental_state all positions so far, of which
                those that it does not have yet are computed: the last one when a search goes
                token by token, all of a prompt at its first call.

        Returns:
            logits (B, S, V), or features (B, S, D) with features_only (S counts the computed
            positions), and a dict with "moe": a LayerRecord for each MoE layer, but none with
            incremental_state; "share" as
            padding.Filled has it, "balanced_by_loss": whether the balancing losses are to train
            the gates, "whole_sample_size": where they are parts of the loss of a whole batch, its
            sample size; and on request "traffic": metrics of the exchanges since the last call,
            including those of the backward pass.
        """
        x, extra = self.extract_features(prev_output_tokens, incremental_state=incremental_state)
        return (x if features_only else self.output_layer(x)), extra

    def extract_features(
        self,
        prev_output_tokens: Tensor,
        encoder_out: None = None,
        incremental_state: Optional[IncrementalState] = None,
        **unused: Any,
    ) -> Tuple[Tensor, Dict[str, Any]]:
        """As `forward` with features_only."""
        tokens, missing, share = prev_output_tokens, 0, 1.0
        if incremental_state is None:
            tokens, missing, share = self.pad_rule.fill(tokens)
        new = tokens.size(1) - cast(DecoderLayer, self.layers[0]).self_attn.known(incremental_state)
        unrouted = self.pad_rule.unrouted(tokens[:, -new:], missing)
        attn_mask = self.pad_rule.attention_mask(tokens.eq(self.padding_idx), new)
        x = self._embed(tokens, new)

        records: List[LayerRecord] = []
        for index, layer in enumerate(self.layers):
            x, moe = layer(x, attn_mask, unrouted, tokens[:, -new:], incremental_state)
            if moe is not None and incremental_state is None:
                records.append(LayerRecord(index, *moe[1:]))
                # Here, as recomputation goes through layers alone, and would count twice.
                self.router_updates.add(index, moe.observed)
        self._check_routers(records)
        if self.layer_norm is not None:
            x = self.layer_norm(x)
        x = x[:, : prev_output_tokens.size(1)]
        extra = {"attn": [None], "moe": records, "share": share}
        extra["balanced_by_loss"] = self.balanced_by_loss
        extra["whole_sample_size"] = self.whole_sample_size
        if self.record_traffic:
            extra["traffic"] = self.take_traffic()
        return x, extra

    def take_traffic(self) -> Dict[str, float]:
        """What all layers' exchanges have cost since the last call."""
        exchanges = [module.exchange for module in self.modules() if isinstance(module, MoELayer)]
        costs = [e.traffic.take() for e in exchanges if isinstance(e, ExpertParallel)]
        return {
            "all_to_all_mb": sum(sent for sent, _ in costs) / 1e6,
            "all_to_all_cpu_time_ms": 1e3 * sum(seconds for _, seconds in costs),
        }

    def _check_routers(self, records: List[LayerRecord]) -> None:
        """Raise UserError if a router yields NaN, which makes any choice of experts meaningless.
        In training on a GPU this check would synchronise; there the criterion checks, one batch
        later."""
        if not records or (self.training and records[0].balance_loss.is_cuda):
            return
        finite = torch.stack([record.balance_loss.detach() for record in records]).isfinite()
        if not finite.all():
            raise not_finite(records[int((~finite).nonzero()[0])].layer, self.training)

    def _embed(self, tokens: Tensor, new: int) -> Tensor:
        """tokens (B, S) -> (B, new, D) of the last positions."""
        positions, length = None, tokens.size(1)
        if self.embed_positions is not None:
            # Padding has no position, so a row padded on the left counts from its first token.
            positions = utils.make_positions(tokens, self.padding_idx)[:, -new:]  # (B, new)
        tokens = tokens[:, -new:]
        try:
            x = self.embed_scale * self.embed_tokens(tokens)
        except IndexError as error:  # on a CPU; a GPU stops in its kernel
            raise UserError(
                f"token {int(tokens.max())} is outside the dictionary "
                f"({self.embed_tokens.num_embeddings} entries): use the dict.txt that the data-bin "
                "was built with, or rebuild the data-bin"
            ) from error
        if positions is not None:
            x = x + self._embed_positions(positions, length)
        if self.layernorm_embedding is not None:
            x = self.layernorm_embedding(x)
        x = rounded(x, self.bfloat16_on_cpu)
        return dropout(x, self.dropout, self.training)

    def _embed_positions(self, positions: Tensor, length: int) -> Tensor:
        """positions (B, S), of rows of `length` -> (B, S, D). Stock's modules take tokens and,
        in token-by-token generation, assume that no row is padded
        (fairseq/modules/sinusoidal_positional_embedding.py:80@0.12.2).

        --add-bos-token makes a row one longer than the limit; computed positions grow for it."""
        table = self.embed_positions
        assert table is not None
        if not isinstance(table, SinusoidalPositionalEmbedding):
            if length > self.max_target_positions and positions.numel():
                # Not so long without its padding? On a GPU this waits.
                length = int(positions.max()) - self.padding_idx
            if length > self.max_target_positions:
                raise too_few_positions(length, self.max_target_positions)
            return F.embedding(positions, table.weight, table.padding_idx)
        needed = self.padding_idx + 1 + max(length, self.max_target_positions)
        if table.weights.size(0) < needed:
            table.weights = table.get_embedding(needed, table.embedding_dim, self.padding_idx)
        table.weights = table.weights.to(table._float_tensor)
        return F.embedding(positions, table.weights)

    def output_layer(self, features: Tensor, **unused: Any) -> Tensor:
        """features (..., D) -> logits (..., V). Raises UserError at evaluation for NaN or infinity,
        which a search would not notice."""
        logits = self.output_projection(features)
        if not self.training and logits.numel():
            low, high = logits.aminmax()
            if not (low.isfinite() & high.isfinite()):
                raise NotFinite(f"the model yields NaN or infinity: {DAMAGED}")
        return logits

    def max_positions(self) -> int:
        """The longest sequence that the model accepts."""
        return self.max_target_positions

    def upgrade_state_dict_named(self, state_dict: Dict[str, Tensor], name: str) -> None:
        """Rename the keys of stock's decoder, current or old, to those of this one
        (fairseq/models/transformer/transformer_decoder.py:400@0.12.2)."""
        if isinstance(self.embed_positions, SinusoidalPositionalEmbedding):
            state_dict.pop(f"{name}.embed_positions.weights", None)
            state_dict.setdefault(f"{name}.embed_positions._float_tensor", torch.zeros(1))
        state_dict.setdefault(f"{name}.version", self.version)
        for index, router in self.router_updates.routers.items():  # trained without it so far
            if router.balance_bias is not None:
                key = f"{name}.layers.{index}.moe_layer.gate.balance_bias"
                state_dict.setdefault(key, router.balance_bias)
        projection = f"{name}.output_projection.weight"
        if projection not in state_dict:
            if self.share_input_output_embed and f"{name}.embed_tokens.weight" in state_dict:
                state_dict[projection] = state_dict[f"{name}.embed_tokens.weight"]
            elif f"{name}.embed_out" in state_dict:
                state_dict[projection] = state_dict.pop(f"{name}.embed_out")


def too_few_positions(length: int, learned: int) -> UserError:
    """The error for a row longer than the learned positions."""
    return UserError(
        f"a row of {length} tokens for --max-target-positions {learned} with "
        "--decoder-learned-pos: learned positions cannot be extended; train with "
        f"--max-target-positions {length}, or without --decoder-learned-pos (--add-bos-token makes "
        "rows one longer than --tokens-per-sample)"
    )


def _build_layer(cfg: MoETransformerLMConfig, index: int, token_counts: Sequence[int]) -> nn.Module:
    """A layer, wrapped in its own FSDP module where stock's would be
    (fairseq/models/transformer/transformer_decoder.py:174@0.12.2)."""
    layer = DecoderLayer(cfg, index, token_counts)
    experts = layer.moe_layer.experts if layer.moe_layer is not None else None
    return wrap_layer(layer, experts, 0 if cfg.checkpoint_activations else cfg.min_params_to_wrap)
