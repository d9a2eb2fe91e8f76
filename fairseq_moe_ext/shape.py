"""Derives from a model's settings which layers are sparse, and how wide each network is.

Numbers only. The decoder and the computation of costs use it.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any, List, Mapping, NamedTuple, Optional, Tuple

from .balance_flags import mapping
from .errors import UserError
from .moe.activations import GATED
from .moe.router import ROUTERS
from .router_flags import top_k


class Shape(NamedTuple):
    """What the cost of a decoder-only language model depends on."""

    layers: int
    dim: int
    ffn_dim: int
    vocabulary: int  # size
    moe_freq: int = 0  # layer i (from 0) is picked if (i + 1) % moe_freq == 0; 0: none
    experts: int = 0
    top_k: int = 2
    expert_ffn_dim: Optional[int] = None  # default: ffn_dim
    alternate_ffn_dim: int = 0  # > 0: picked layers are dense, of this width
    tied: bool = True  # input and output embeddings are one
    learned_positions: int = 0  # rows of a table of positions; 0: sinusoidal, or none
    norms: int = 1  # LayerNorms outside the layers: after the last one, on the embedding
    listed: Optional[Tuple[int, ...]] = None  # the picked layers, instead of moe_freq
    first_dense: int = 0  # layers before this one are not picked
    shared_ffn_dim: int = 0  # of all shared experts of a layer together
    null_experts: int = 0
    latent_dim: int = 0  # width of what experts compute on; 0: dim
    gated: bool = False  # three matrices a network instead of two
    experts_per_token: Optional[float] = None  # as measured; None: as a balanced router uses them
    gates: bool = True  # routers have a linear layer that is trained
    dense_twin: bool = False  # picked layers are dense, with the FLOPs that they would have sparse

    @property
    def picked(self) -> Tuple[int, ...]:
        """Indices of the layers that are sparse, or would be without alternate_ffn_dim or
        dense_twin."""
        if self.listed is not None:
            return self.listed
        if self.moe_freq <= 0:
            return ()
        return tuple(
            i for i in range(self.first_dense, self.layers) if (i + 1) % self.moe_freq == 0
        )

    @property
    def sparse(self) -> Tuple[int, ...]:
        """Indices of the layers that have experts."""
        return () if self.alternate_ffn_dim > 0 or self.dense_twin else self.picked

    @property
    def dense_widths(self) -> List[Optional[int]]:
        """Hidden width of each layer's network; None for a sparse layer."""
        widths: List[Optional[int]] = [self.ffn_dim] * self.layers
        replaced: List[Optional[int]] = [None] * len(self.picked)
        if self.alternate_ffn_dim > 0:
            replaced = [self.alternate_ffn_dim] * len(self.picked)
        elif self.dense_twin:
            # Rounding cumulative widths keeps their sum as close as possible to the sparse model's.
            half = Fraction(1, 2)
            ends = [int(i * self.twin_width + half) for i in range(len(self.picked) + 1)]
            replaced = [end - start for start, end in zip(ends, ends[1:])]
        for layer, width in zip(self.picked, replaced):
            widths[layer] = width
        return widths

    @property
    def expert_dim(self) -> int:
        """Width of an expert's input and output."""
        return self.latent_dim or self.dim

    @property
    def expert_width(self) -> int:
        """Hidden width of an expert."""
        return self.expert_ffn_dim or self.ffn_dim

    @property
    def used_experts(self) -> Fraction:
        """Experts that compute for a token: as measured, otherwise top_k without the share of null
        experts, which a balanced router uses as often as other experts."""
        if self.experts_per_token is not None:
            return Fraction(self.experts_per_token)
        if not self.null_experts:
            return Fraction(self.top_k)
        return Fraction(self.top_k * self.experts, self.experts + self.null_experts)

    @property
    def twin_width(self) -> Fraction:
        """Hidden width of a dense layer with a sparse layer's FLOPs."""
        matrices = 3 if self.gated else 2
        routed = matrices * self.used_experts * self.expert_dim * self.expert_width
        latent = 2 * self.dim * self.latent_dim
        return self.shared_ffn_dim + (routed + latent) / (matrices * self.dim)


def shape_of(settings: Any, vocabulary: int = 0) -> Shape:
    """The shape of a model with these settings: an object or a mapping with the names of config.py.
    Settings that stock models, the branch or older checkpoints lack count as off."""
    s = mapping(settings)
    ffn_dim = s["decoder_ffn_embed_dim"]
    expert_ffn_dim = s.get("moe_expert_ffn_dim") or None
    shared_width = s.get("moe_shared_expert_ffn_dim") or expert_ffn_dim or ffn_dim
    return Shape(
        layers=s["decoder_layers"],
        dim=s["decoder_embed_dim"],
        ffn_dim=ffn_dim,
        vocabulary=vocabulary,
        moe_freq=s.get("moe_freq") or 0,
        experts=s.get("moe_expert_count") or 0,
        top_k=top_k(s),
        expert_ffn_dim=expert_ffn_dim,
        alternate_ffn_dim=s.get("alternate_decoder_ffn_embed_dim") or 0,
        tied=bool(s.get("share_decoder_input_output_embed")),
        learned_positions=_learned_positions(s),
        norms=(not s.get("no_decoder_final_norm")) + bool(s.get("layernorm_embedding")),
        listed=_listed(s.get("moe_layers"), s["decoder_layers"]),
        first_dense=s.get("moe_first_dense") or 0,
        shared_ffn_dim=(s.get("moe_shared_experts") or 0) * shared_width,
        null_experts=s.get("moe_null_experts") or 0,
        latent_dim=s.get("moe_latent_dim") or 0,
        gated=str(s.get("activation_fn")) in GATED,
        gates=has_gate(s.get("moe_router") or "topk"),
        dense_twin=bool(s.get("moe_dense_twin")),
    )


def context_length(settings: Any) -> int:
    """Tokens that a model takes at most; settings as for shape_of."""
    s = mapping(settings)
    return s.get("max_target_positions") or s["tokens_per_sample"]


def has_gate(router: str) -> bool:
    """Whether a router has a gate that is trained."""
    known = ROUTERS.get(router)
    return known is None or known.learned


def _learned_positions(settings: Mapping[str, Any]) -> int:
    if not settings.get("decoder_learned_pos") or settings.get("no_token_positional_embeddings"):
        return 0
    # the first two rows are those of padding (fairseq/modules/positional_embedding.py:24@0.12.2)
    return context_length(settings) + 2


def _listed(text: Optional[str], layers: int) -> Optional[Tuple[int, ...]]:
    """The layers of --moe-layers, "1,3,5"."""
    if text is None:
        return None
    parts = [part.strip() for part in str(text).split(",")]
    if not all(part.isascii() and part.isdigit() and len(part) < 6 for part in parts):
        raise UserError(f"--moe-layers {text}: give layer numbers, counted from 0, such as 1,3,5")
    numbers = sorted(map(int, parts))
    if len(set(numbers)) < len(numbers):
        raise UserError(f"--moe-layers {text}: names a layer twice; remove one")
    if numbers[-1] >= layers:
        raise UserError(
            f"--moe-layers {text}: there is no layer {numbers[-1]}; --decoder-layers {layers} has "
            f"0 to {layers - 1}"
        )
    return tuple(numbers)
