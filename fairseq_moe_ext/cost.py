"""What a model costs: parameters and training FLOPs. Numbers in, numbers out.

The count of FLOPs is that of the paper's appendix (Artetxe et al. 2021; after Narayanan et al.
2021, arXiv 2104.04473): matrix products only, a multiply-add as two, attention as if not causal,
the router left out.
"""

from typing import NamedTuple, Optional


class Shape(NamedTuple):
    """What the cost of a decoder-only language model depends on."""

    layers: int
    dim: int
    ffn_dim: int
    types: int  # vocabulary
    moe_freq: int = 0  # layer i (from 0) is MoE when (i + 1) % moe_freq == 0; 0: none
    experts: int = 0
    top_k: int = 2
    expert_ffn_dim: Optional[int] = None  # default: ffn_dim
    alternate_ffn_dim: int = 0  # > 0: MoE layers are dense, of this width
    tied: bool = True  # input and output embeddings are one

    @property
    def picked_layers(self) -> int:
        """Layers that moe_freq picks."""
        return self.layers // self.moe_freq if self.moe_freq > 0 else 0

    @property
    def moe_layers(self) -> int:
        """Layers that have experts."""
        return 0 if self.alternate_ffn_dim > 0 else self.picked_layers


class Parameters(NamedTuple):
    """Numbers of parameters."""

    shared: int  # all but the experts', the gates included
    expert: int  # of all experts
    active: int  # that one token meets: shared ones and those of its top_k experts

    @property
    def total(self) -> int:
        return self.shared + self.expert


def parameters(shape: Shape) -> Parameters:
    """Parameters of a model with sinusoidal positions, biases and a final norm."""
    s = shape
    norm = 2 * s.dim
    attention = 4 * (s.dim * s.dim + s.dim)
    embeddings = s.types * s.dim * (1 if s.tied else 2)
    dense_ffns = (s.layers - s.picked_layers) * _ffn_parameters(s.dim, s.ffn_dim)
    if s.alternate_ffn_dim > 0:
        dense_ffns += s.picked_layers * _ffn_parameters(s.dim, s.alternate_ffn_dim)
    gates = s.moe_layers * s.dim * s.experts
    shared = embeddings + s.layers * (attention + 2 * norm) + norm + dense_ffns + gates
    one_expert = _ffn_parameters(s.dim, s.expert_ffn_dim or s.ffn_dim)
    expert = s.moe_layers * s.experts * one_expert
    return Parameters(shared, expert, shared + s.moe_layers * s.top_k * one_expert)


def training_flops_per_token(shape: Shape, context: int, recompute: bool = False) -> float:
    """FLOPs to train on one token in sequences of `context` tokens.

    Layers are passed three times, forward and twice in the backward pass, or four times with
    activation recomputation (recompute); the output projection three times. With recompute, 50,000
    types and context 2048 this is the paper's
    96 l h^2 (1 + s / 6h + V / 16lh), plus 64 (l / 2) h^2 for MoE.
    """
    s = shape
    attention = s.layers * (8 * s.dim**2 + 4 * s.dim * context)
    ffn_width = (s.layers - s.picked_layers) * s.ffn_dim
    if s.alternate_ffn_dim > 0:
        ffn_width += s.picked_layers * s.alternate_ffn_dim
    ffn_width += s.moe_layers * s.top_k * (s.expert_ffn_dim or s.ffn_dim)
    layers = attention + 4 * s.dim * ffn_width
    output = 2 * s.dim * s.types
    return (4 if recompute else 3) * layers + 3 * output


def _ffn_parameters(dim: int, ffn_dim: int) -> int:
    return 2 * dim * ffn_dim + ffn_dim + dim
