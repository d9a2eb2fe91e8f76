"""What a model costs: parameters, training FLOPs, memory. Numbers in, numbers out.

The count of FLOPs is that of the paper's appendix (Artetxe et al. 2021; after Narayanan et al.
2021, arXiv 2104.04473): matrix products only, a multiply-add as two, attention as if not causal,
the router left out.
"""

import math
from typing import Dict, NamedTuple, Optional

from .kernels.linear_cross_entropy import LOGITS_AT_A_TIME


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
    learned_positions: int = 0  # rows of a table of positions; 0: sinusoidal, or none
    norms: int = 1  # LayerNorms outside the layers: after the last one, on the embedding

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

    shared: int  # everything except experts, gates included
    expert: int  # of all experts
    active: int  # that one token uses: shared ones and those of its top_k experts

    @property
    def total(self) -> int:
        return self.shared + self.expert


def parameters(shape: Shape) -> Parameters:
    """Parameters of a model with biases, as all of ours have."""
    s = shape
    norm = 2 * s.dim
    attention = 4 * (s.dim * s.dim + s.dim)
    embeddings = (s.types * (1 if s.tied else 2) + s.learned_positions) * s.dim
    dense_ffns = (s.layers - s.picked_layers) * _ffn_parameters(s.dim, s.ffn_dim)
    if s.alternate_ffn_dim > 0:
        dense_ffns += s.picked_layers * _ffn_parameters(s.dim, s.alternate_ffn_dim)
    gates = s.moe_layers * s.dim * s.experts
    shared = embeddings + s.layers * (attention + 2 * norm) + s.norms * norm + dense_ffns + gates
    one_expert = _ffn_parameters(s.dim, s.expert_ffn_dim or s.ffn_dim)
    expert = s.moe_layers * s.experts * one_expert
    return Parameters(shared, expert, shared + s.moe_layers * s.top_k * one_expert)


def training_flops_per_token(shape: Shape, context: int, recompute: bool = False) -> float:
    """FLOPs to train on one token in sequences of `context` tokens.

    Layers are computed three times, once forward and twice in the backward pass, or four times with
    activation recomputation (recompute); the output projection three times. With recompute, a
    vocabulary of 50,000 and context 2048 this is the paper's
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


# Bytes of a parameter as stock fairseq 0.12.2 keeps it: the copy that the model computes with, the
# optimizer's float32 copy beside it, and the gradients of both. --fp16 and --bf16 keep a flat
# float32 copy of parameters and gradients (optim/fp16_optimizer.py), the memory-efficient kinds
# make them for one parameter at a time.
class Precision(NamedTuple):
    """Bytes a number."""

    width: int  # of an activation
    parameter: int
    master: int
    gradient: int


PRECISIONS: Dict[str, Precision] = {
    "fp32": Precision(4, 4, 0, 4),
    "fp16": Precision(2, 2, 4, 2 + 4),
    "bf16": Precision(2, 2, 4, 2 + 4),
    "memory-efficient-fp16": Precision(2, 2, 0, 2),
    "memory-efficient-bf16": Precision(2, 2, 0, 2),
}

# Bytes of optimizer state a parameter; Adam's two moments are float32 (optim/adam.py:193@0.12.2),
# or float16 with --fp16-adam-stats.
OPTIMIZERS = {"adam": 8, "adam-fp16-stats": 4, "sgd": 0}
SHARDINGS = ("none", "optimizer", "full")


class Memory(NamedTuple):
    """Bytes on one device, term by term."""

    parameters: int
    master: int  # float32 copy of parameters
    gradients: int
    optimizer: int
    activations: int  # kept for the backward pass
    working: int  # of the layer and the loss at work
    gathered: int  # full sharding: the whole of one layer's parameters and gradients

    @property
    def total(self) -> int:
        return sum(self)


def memory_per_device(
    shape: Shape,
    tokens: int,
    *,
    world_size: int = 1,
    precision: str = "fp32",
    optimizer: str = "adam",
    sharding: str = "none",
    recompute: bool = False,
    dropout: bool = False,
) -> Memory:
    """Memory of training on `tokens` tokens per device at a time.

    P parameters are on a device: the shared ones and E / W of the experts (one where there are more
    processes than experts). With b bytes a number, D, F, K, E, V as elsewhere, l layers, T tokens::

        parameters  P times the precision's bytes; master, gradients, optimizer likewise
        dense layer b T (8 D + 2 F): both norms' inputs and outputs, q, k, v, attention's output,
                    the hidden layer before and behind the activation
        MoE layer   b T (8 D + K F + 2 K D) + 16 T E: K rows a token, in and out, and the hidden
                    layer before the activation; with bfloat16, whose products on a GPU are grouped,
                    behind it, too: 2 K F; the gate in float32
        dropout     2 T D bytes a layer, one a mask (four on a CPU)
        recompute   b T D a layer instead; the above is `working`, of one layer
        loss        2 b T D (final norm, gradient of its output) is kept; `working` has
                    4 min(T V, 2^24) and, in float32, the projection's gradient 4 V D

    "optimizer" sharding divides optimizer state and master copies by W, "full" also parameters and
    gradients; experts are divided by their replicas only. Neither the allocator's slack nor
    communication buffers nor the framework (0.5 to 1 GB on a GPU) are in it. Attention is taken to
    keep no T x context matrix, as fused kernels do.
    """
    s, p = shape, PRECISIONS[precision]
    counts = parameters(s)
    held = counts.shared
    experts_here, replicas = 0, 1
    if s.moe_layers:
        experts_here = -(-s.experts // world_size)
        replicas = max(1, world_size // s.experts)
    expert = counts.expert // s.experts * experts_here if s.moe_layers else 0

    def sharded(bytes_each: int, divide: bool) -> int:
        whole = bytes_each * (held + expert)
        if not divide:
            return whole
        return math.ceil(bytes_each * held / world_size) + math.ceil(bytes_each * expert / replicas)

    full = sharding == "full"
    state = full or sharding == "optimizer"
    dense_layers = s.layers - s.picked_layers
    mask = 2 * s.dim * tokens if dropout else 0
    dense_layer = p.width * tokens * (8 * s.dim + 2 * s.ffn_dim) + mask
    picked_layer = 0
    if s.moe_layers:
        f = s.expert_ffn_dim or s.ffn_dim
        sides = 2 if "bf16" in precision else 1  # of the activation (kernels/expert_ffn.py)
        rows = s.top_k * (sides * f + 2 * s.dim)
        picked_layer = p.width * tokens * (8 * s.dim + rows) + 16 * tokens * s.experts + mask
    elif s.picked_layers:
        picked_layer = p.width * tokens * (8 * s.dim + 2 * s.alternate_ffn_dim) + mask
    largest = max(dense_layer if dense_layers else 0, picked_layer)
    kept = dense_layers * dense_layer + s.picked_layers * picked_layer
    if recompute:
        kept = s.layers * p.width * tokens * s.dim
    loss = 4 * min(tokens * s.types, LOGITS_AT_A_TIME) + 4 * s.types * s.dim
    one_layer = 4 * (s.dim**2 + s.dim) + _ffn_parameters(s.dim, max(s.ffn_dim, s.alternate_ffn_dim))
    return Memory(
        parameters=sharded(p.parameter, full),
        master=sharded(p.master, state),
        gradients=sharded(p.gradient, full),
        optimizer=sharded(OPTIMIZERS[optimizer], state),
        activations=kept + 2 * p.width * tokens * s.dim,
        working=max(loss, largest if recompute else 0),
        gathered=2 * p.width * one_layer if full and world_size > 1 else 0,
    )


def _ffn_parameters(dim: int, ffn_dim: int) -> int:
    return 2 * dim * ffn_dim + ffn_dim + dim
