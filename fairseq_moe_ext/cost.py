"""What a model costs: parameters, training FLOPs, memory. Numbers in, numbers out.

The count of FLOPs is that of the paper's appendix (Artetxe et al. 2021; after Narayanan et al.
2021, arXiv 2104.04473): matrix products only, a multiply-add as two, attention as if not causal,
the router left out.
"""

import math
from typing import Dict, NamedTuple, Optional

from .kernels.linear_cross_entropy import LOGITS_AT_A_TIME
from .shape import Shape


class Parameters(NamedTuple):
    """Numbers of parameters."""

    shared: int  # everything except experts; gates and shared experts included
    expert: int  # of all experts
    active: int  # that one token uses: shared ones and those of its experts

    @property
    def total(self) -> int:
        return self.shared + self.expert


def parameters(shape: Shape) -> Parameters:
    """Parameters of a model with biases, as all of ours have.

    With null experts `active` is a mean, of a balanced router.
    """
    s, sparse = shape, len(shape.sparse)
    norm = 2 * s.dim
    attention = 4 * (s.dim * s.dim + s.dim)
    embeddings = (s.vocabulary * (1 if s.tied else 2) + s.learned_positions) * s.dim
    ffns = sum(_ffn_parameters(s, width) for width in s.dense_widths if width is not None)
    if s.shared_ffn_dim:
        ffns += sparse * _ffn_parameters(s, s.shared_ffn_dim)
    # null experts share a logit
    gates = sparse * s.dim * (s.experts + (s.null_experts > 0)) if s.gates else 0
    latent = sparse * 2 * s.dim * s.latent_dim
    layers = s.layers * (attention + 2 * norm) + ffns + gates + latent
    shared = embeddings + layers + s.norms * norm
    one_expert = _ffn_parameters(s, s.expert_width, s.expert_dim)
    active = shared + round(sparse * s.used_experts * one_expert)
    return Parameters(shared, sparse * s.experts * one_expert, active)


def training_flops_per_token(shape: Shape, context: int, recompute: bool = False) -> float:
    """FLOPs to train on one token in sequences of `context` tokens.

    Layers are computed three times, once forward and twice in the backward pass, or four times with
    activation recomputation (recompute); the output projection three times. With recompute, a
    vocabulary of 50,000 and context 2048 this is the paper's
    96 l h^2 (1 + s / 6h + V / 16lh), plus 64 (l / 2) h^2 for MoE.
    """
    s = shape
    attention = s.layers * (8 * s.dim**2 + 4 * s.dim * context)
    width = sum(s.twin_width if width is None else width for width in s.dense_widths)
    layers = attention + 2 * (3 if s.gated else 2) * s.dim * width
    output = 2 * s.dim * s.vocabulary
    return float((4 if recompute else 3) * layers + 3 * output)


def twin_difference(shape: Shape, context: int) -> float:
    """Training FLOPs per token of a dense twin beyond those of its sparse model: 0 where widths are
    whole numbers in all, else less than those of half a unit of width."""
    sparse = shape._replace(dense_twin=False)
    return training_flops_per_token(shape, context) - training_flops_per_token(sparse, context)


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


def stored(precision: str, sharding: str) -> Precision:
    """With full sharding, --fp16 and --bf16 keep one copy, in float32: FSDP casts what it gathers
    (fairseq/trainer.py:298@0.12.2, fully_sharded.py)."""
    kept = PRECISIONS[precision]
    in_float32 = sharding == "full" and kept.master > 0
    return kept._replace(parameter=4, master=0, gradient=4) if in_float32 else kept


# Bytes of optimizer state per parameter. Adam's two moments are float32, or float16 with
# --fp16-adam-stats (fairseq/optim/adam.py:193@0.12.2).
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
                    the hidden layer before and behind the activation; gated, both factors, too: 4 F
        MoE layer   b T (8 D + K F + 2 K D) + 16 T E: K rows a token, in and out, and the hidden
                    layer before the activation (gated 2 F); with bfloat16, whose products on a GPU
                    are grouped, behind it, too: 2 K F (gated 4 K F); the gate in float32. Latent
                    experts: 2 K L in place of 2 K D, and 2 L; shared experts: as a dense layer's F
        dropout     2 T D bytes a layer, one a mask (four on a CPU)
        a CPU keeps the joined weights of q, k and v, too, which are not in it: 3 b D^2 a layer
        recompute   b T D a layer instead; the above is `working`, of one layer
        loss        2 b T D (final norm, gradient of its output) is kept; `working` has
                    4 min(T V, 2^24) and, in float32, the projection's gradient 4 V D

    "optimizer" sharding divides optimizer state and master copies by W, "full" also parameters and
    gradients; experts are divided by their replicas only. Neither the allocator's slack nor
    communication buffers nor the framework (0.5 to 1 GB on a GPU) are in it. Attention is taken to
    keep no T x context matrix, as fused kernels do; but a CPU's keeps a mask of its dropout, a
    byte for each weight, some H T S / 2 a layer for H heads and sequences of S positions.
    """
    s, p = shape, stored(precision, sharding)
    counts = parameters(s)
    held, experts_here, replicas = counts.shared, 0, 1
    if s.sparse:
        experts_here = -(-s.experts // world_size)
        replicas = max(1, world_size // s.experts)
    expert = counts.expert // s.experts * experts_here if s.sparse else 0

    def sharded(bytes_each: int, divide: bool) -> int:
        whole = bytes_each * (held + expert)
        if not divide:
            return whole
        return math.ceil(bytes_each * held / world_size) + math.ceil(bytes_each * expert / replicas)

    full = sharding == "full"
    state = full or sharding == "optimizer"
    mask = 2 * s.dim * tokens if dropout else 0
    grouped = "bf16" in precision
    layers = [tokens * _kept(s, width, p.width, grouped) + mask for width in s.dense_widths]
    kept = sum(layers)
    if recompute:
        kept = s.layers * p.width * tokens * s.dim
    loss = 4 * min(tokens * s.vocabulary, LOGITS_AT_A_TIME) + 4 * s.vocabulary * s.dim
    whole = [width or s.shared_ffn_dim for width in s.dense_widths]  # what FSDP gathers at a time
    one_layer = 4 * (s.dim**2 + s.dim) + _ffn_parameters(s, max(whole))
    return Memory(
        parameters=sharded(p.parameter, full),
        master=sharded(p.master, state),
        gradients=sharded(p.gradient, full),
        optimizer=sharded(OPTIMIZERS[optimizer], state),
        activations=kept + 2 * p.width * tokens * s.dim,
        working=max(loss, max(layers) if recompute else 0),
        gathered=2 * p.width * one_layer if full and world_size > 1 else 0,
    )


def _kept(shape: Shape, width: Optional[int], number: int, grouped: bool) -> int:
    """Bytes per token that a layer keeps for the backward pass.

    Args:
        width: of the network of a dense layer; None for a sparse one.
        number: bytes of a number.
        grouped: experts' products are PyTorch's grouped ones (kernels/expert_ffn.py).
    """
    s = shape
    dense = 4 if s.gated else 2  # numbers a unit of hidden width: both sides of the activation
    if width is not None:
        return number * (8 * s.dim + dense * width)
    of_expert = (dense if grouped else dense // 2) * s.expert_width
    rows = s.used_experts * (of_expert + 2 * s.expert_dim)
    numbers = 8 * s.dim + rows + 2 * s.latent_dim + dense * s.shared_ffn_dim
    return round(number * numbers) + 16 * (s.experts + s.null_experts)


def _ffn_parameters(shape: Shape, width: int, dim: Optional[int] = None) -> int:
    """Of a feed-forward network with that hidden width, on vectors of `dim` (default: the
    model's)."""
    dim = shape.dim if dim is None else dim
    inner = 2 if shape.gated else 1
    return (inner + 1) * dim * width + inner * width + dim
