"""One MoE layer, forward and backward, against a dense FFN on as many tokens as are routed, a
floor of FLOPs or the weights' bytes, and other people's layers; at evaluation dropless or not.

    python benchmarks/layer.py [--rows 0 1 2]      the shapes of the table, by number
    python benchmarks/layer.py --gpu [--rows ...]  the paper's shapes, bfloat16, on a CUDA device

float32, 2 threads, top-2, gelu, biases. Results: benchmarks/results/PROCESSOR/layer.json, .md.
"""

from __future__ import annotations

import argparse
import functools
import os

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch: large tensors in pages of 2 MB

import tempfile  # noqa: E402
from typing import Callable, Dict, NamedTuple, Optional, Sequence  # noqa: E402
from unittest import mock  # noqa: E402

import gpu_layers  # noqa: E402
import measure  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from fairseq_moe_ext.kernels.matmul import Linear  # noqa: E402
from fairseq_moe_ext.moe import layer as layer_module  # noqa: E402
from fairseq_moe_ext.moe.layer import MoELayer  # noqa: E402
from fairseq_moe_ext.moe.router import GateSettings  # noqa: E402


class Shape(NamedTuple):
    tokens: int  # S
    experts: int  # E
    dim: int  # M
    hidden: int  # F
    target: Optional[float] = None  # times the dense FFN's time; None: 1.3 of the floor


SHAPES = [
    Shape(4096, 8, 512, 2048, 1.08),
    Shape(2048, 8, 256, 1024, 1.15),
    Shape(4096, 64, 512, 2048, 1.40),
    Shape(2048, 64, 256, 1024, 1.60),
    Shape(4096, 128, 256, 1024, 1.70),
    Shape(2048, 512, 256, 1024),
]
# Model and hidden widths of the 15B, 52B and 207B models (paper, table 1), with as many experts as
# one GPU may hold, and all 512 of the first. Not yet run: no GPU.
GPU_SHAPES = [
    Shape(16384, experts, dim, 4 * dim) for experts in (8, 64) for dim in (768, 1024, 2048)
] + [Shape(16384, 512, 768, 3072)]


def dense_ffn(shape: Shape, linear: Callable[..., nn.Module] = nn.Linear) -> nn.Sequential:
    """The dense layer that every time is a multiple of; with kernels.matmul.Linear, our models'."""
    return nn.Sequential(
        linear(shape.dim, shape.hidden), nn.GELU(), linear(shape.hidden, shape.dim)
    )


def ours(shape: Shape, dropless: bool) -> MoELayer:
    """Capacity factor 2, or dropless."""
    settings = GateSettings(second_expert_policy="all", dropless=dropless)
    return MoELayer.build(shape.dim, shape.hidden, shape.experts, settings)


class OneHotLayer(nn.Module):
    """GShard's formulation (arXiv 2006.16668, algorithm 1): dispatch and combine as products with
    a tensor of S x E x C. What this project avoids, written out to be measured."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.moe = ours(shape, dropless=False)  # its gate and weights

    def forward(self, x: Tensor) -> Tensor:
        gate, experts = self.moe.gate, self.moe.experts
        capacity = gate.capacity(len(x))
        _, routing = gate(x)
        chosen = F.one_hot(routing.experts, gate.wg.out_features).to(x)  # (S, K, E)
        slot = F.one_hot(routing.slots.clamp(max=capacity - 1), capacity).to(x)  # (S, K, C)
        combine = torch.einsum("ske,skc,sk->sec", chosen, slot, routing.weights)
        rows = torch.einsum("sec,sm->ecm", (combine > 0).to(x), x)
        fc1, fc2 = experts.fc1, experts.fc2
        hidden = F.gelu(torch.baddbmm(fc1.bias[:, None], rows, fc1.weight.mT))
        rows = torch.baddbmm(fc2.bias[:, None], hidden, fc2.weight.mT)
        return torch.einsum("sec,ecm->sm", combine, rows)


def fairscale_layer(shape: Shape) -> nn.Module:
    """fairscale's MOELayer; it wants a process group and an axis of groups."""
    from fairscale.nn.moe import MOELayer, Top2Gate

    experts = nn.ModuleList(dense_ffn(shape) for _ in range(shape.experts))
    layer = MOELayer(Top2Gate(shape.dim, shape.experts), experts)

    def grouped(layer: nn.Module, x: Tensor) -> Tensor:
        return layer(x.view(shape.experts, -1, shape.dim)).view_as(x)

    return measure.Wrapped(layer, grouped)


def mixtral_layer(shape: Shape) -> nn.Module:
    """transformers' block. Its experts have three matrices and no biases; F is two thirds of ours,
    which makes the same FLOPs."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = MixtralConfig(
        hidden_size=shape.dim,
        intermediate_size=2 * shape.hidden // 3 // 16 * 16,  # grouped_mm wants it aligned
        num_local_experts=shape.experts,
        num_experts_per_tok=2,
        hidden_act="gelu",
    )
    # As a whole model of theirs would choose; a block alone takes a loop that makes a gradient of
    # all experts' size for each.
    config._experts_implementation = "grouped_mm"
    block = MixtralSparseMoeBlock(config)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.02)

    def batched(block: nn.Module, x: Tensor) -> Tensor:
        out = block(x.unsqueeze(0))
        return (out[0] if isinstance(out, tuple) else out).view_as(x)

    return measure.Wrapped(block, batched)


def megablocks_layer(shape: Shape) -> nn.Module:
    """MegaBlocks' dropless layer. Not yet run: no GPU."""
    from megablocks.layers.arguments import Arguments
    from megablocks.layers.dmoe import dMoE

    arguments = Arguments(
        hidden_size=shape.dim,
        ffn_hidden_size=shape.hidden,
        moe_num_experts=shape.experts,
        moe_top_k=2,
        mlp_impl="grouped",
        bf16=True,
    )
    return measure.Wrapped(dMoE(arguments), lambda block, x: block(x.unsqueeze(0))[0].view_as(x))


def step(layer: nn.Module, x: Tensor, grad: Tensor) -> Callable[[], None]:
    """Forward and backward; the gradients are new each time, as in training."""

    def run() -> None:
        layer.zero_grad(set_to_none=True)
        x.grad = None
        out = layer(x)
        if isinstance(layer, MoELayer):
            torch.autograd.backward([out.out, out.balance_loss], [grad, None])
        else:
            out.backward(grad)

    return run


def there(make: Callable[[], nn.Module], like: Tensor) -> nn.Module:
    """A layer with the dtype and on the device of `like`, where it is also initialised."""
    with like.device:
        return make().to(like)


def weight_bytes(layer: nn.Module) -> int:
    """Bytes of a layer's parameters."""
    return sum(p.numel() * p.element_size() for p in layer.parameters())


def training(shape: Shape, rounds: int, peers: bool, like: Tensor) -> Dict[str, object]:
    """Forward and backward of everything on one shape, in turn. `like` gives dtype and device."""
    torch.manual_seed(0)
    options = {"dtype": like.dtype, "device": like.device}
    x = torch.randn(shape.tokens, shape.dim, **options).requires_grad_()
    many = torch.randn(2 * shape.tokens, shape.dim, **options).requires_grad_()
    grad = torch.randn(2 * shape.tokens, shape.dim, **options)
    makes: Dict[str, Callable[[], nn.Module]] = {
        "dense": functools.partial(dense_ffn, shape),
        "our dense": functools.partial(dense_ffn, shape, Linear),
        "capacity": functools.partial(ours, shape, dropless=False),
        "dropless": functools.partial(ours, shape, dropless=True),
    }
    others: Dict[str, Callable[[], nn.Module]] = {}
    if peers:
        others["transformers"] = functools.partial(mixtral_layer, shape)
        if like.is_cuda:
            others["megablocks"] = functools.partial(megablocks_layer, shape)
            for name, make in gpu_layers.LAYERS.items():
                others[name] = functools.partial(make, *shape[1:4])
        else:
            others["one-hot"] = functools.partial(OneHotLayer, shape)
            others["fairscale"] = functools.partial(fairscale_layer, shape)
    layers = {}
    for name, make in {**makes, **others}.items():
        layer = measure.attempted(name, functools.partial(there, make, like), name in others)
        if layer is not None:
            layers[name] = layer
    cases = {
        name: step(layer, *((many, grad) if "dense" in name else (x, grad[: shape.tokens])))
        for name, layer in layers.items()
    }
    bandwidth = measure.copy_bandwidth(like.device.type)
    seconds = measure.in_turn(cases, rounds, warmup=1, optional=others)
    dense = measure.median(seconds["dense"])
    memory = {}
    for name in ("dense", "capacity", "dropless"):
        for layer in layers.values():
            layer.zero_grad(set_to_none=True)
        peak = measure.peak_memory(cases[name], like.device.type)
        memory[name] = peak - weight_bytes(layers[name])
    times = {name: measure.ratio(seconds, name, "dense") for name in seconds}
    traffic = 3 * weight_bytes(layers["capacity"].experts) / bandwidth
    return {
        **shape._asdict(),
        "copy_gb_per_s": bandwidth / 1e9,
        "dense_ms": 1e3 * dense,
        "floor": max(min(times["dense"], times["our dense"]), traffic / dense),
        "times": times,
        "memory": {name: memory[name] / memory["dense"] for name in ("capacity", "dropless")},
        "dense_gflop_per_s": 12 * len(many) * shape.dim * shape.hidden / dense / 1e9,
    }


def without_statistics(work: Callable[[], None]) -> Callable[[], None]:
    """`work` without the layers' routing statistics."""

    def run() -> None:
        with mock.patch.object(layer_module, "routing_stats", lambda routing, scope: {}):
            work()

    return run


def evaluation(shape: Shape, rounds: int) -> Dict[str, float]:
    """Forward without gradients: dropless against capacity evaluation, and the share of a training
    step that the routing statistics take."""
    torch.manual_seed(0)
    x = torch.randn(shape.tokens, shape.dim)
    capacity, dropless = ours(shape, False).eval(), ours(shape, True).eval()
    with torch.no_grad():
        seconds = measure.in_turn(
            {"capacity": lambda: capacity(x), "dropless": lambda: dropless(x)}, rounds, warmup=1
        )
    plain = step(capacity.train(), x, torch.randn_like(x))
    both = measure.in_turn({"with": plain, "without": without_statistics(plain)}, 3 * rounds)
    return {
        "dropless_to_capacity": measure.ratio(seconds, "dropless", "capacity"),
        "statistics_share": 1 - measure.ratio(both, "without", "with"),
    }


def table(rows: Dict[str, Dict], device: str) -> None:
    """Write and print what has been measured so far."""
    peers = ["fairscale", "one-hot", "transformers", "megablocks", *gpu_layers.LAYERS]
    peers = [peer for peer in peers if any(peer in row["times"] for row in rows.values())]
    heads = ["S, E, M, F", "dense, ms", "dense TFLOP/s", "our dense", "floor", "at most"]
    heads += ["capacity", "dropless", "x floor", *peers, "memory"]
    heads += ["eval dropless/capacity", "statistics"]
    lines = []
    for key, row in rows.items():
        times, eval_row = row["times"], row.get("evaluation", {})
        worst = max(times["capacity"], times["dropless"])
        limit = row["target"] or 1.3 * row["floor"]
        lines.append(
            [key, f"{row['dense_ms']:.3g}", f"{row['dense_gflop_per_s'] / 1e3:.3g}"]
            + [f"{times['our dense']:.2f}"]
            + [f"{row['floor']:.2f}", f"{limit:.2f}"]
            + [f"{times[ours]:.2f}" for ours in ("capacity", "dropless")]
            + [f"{worst / row['floor']:.2f}"]
            + [f"{times[peer]:.2f}" if peer in times else "-" for peer in peers]
            + [f"{max(row['memory'].values()):.2f}"]
            + [f"{eval_row['dropless_to_capacity']:.2f}" if eval_row else "-"]
            + [f"{eval_row['statistics_share']:.1%}" if eval_row else "-"]
        )
    title = (
        "One MoE layer, forward and backward, as multiples of the time of a dense FFN of "
        "torch.nn.Linear on as many tokens as are routed (`make benchmark`). Our dense: the same "
        "of our models' linear layers. Floor: the faster of these two, or reading the experts' "
        "weights twice and writing their gradients once, at the copy bandwidth (bytes read and "
        "written) of the same run, whichever takes longer. Memory: peak of new tensors beyond the "
        "gradients, over the dense FFN's. statistics: their share of this layer's step alone."
    )
    measure.keep_table("layer", title, heads, lines, device)


def run(shapes: Sequence[Shape], rounds: int, peers: bool, like: Tensor) -> None:
    """Measure all of `shapes`; the table has what was measured before, too."""
    with tempfile.NamedTemporaryFile() as store:
        dist.init_process_group("gloo", init_method=f"file://{store.name}.d", rank=0, world_size=1)
        try:
            for shape in shapes:
                key = ", ".join(map(str, shape[:4]))
                print(f"S, E, M, F = {key}", flush=True)
                row = training(shape, rounds, peers, like)
                if not like.is_cuda:
                    row["evaluation"] = evaluation(shape, min(rounds, 3))
                rows = measure.keep("layer", {key: row}, like.device.type)
                table(rows, like.device.type)  # now, as the next may not come to its end
        finally:
            dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.split("\n\n")[0])
    parser.add_argument("--rows", type=int, nargs="+", help="numbers of shapes; default: all")
    parser.add_argument("--rounds", type=measure.count, default=5)
    parser.add_argument("--no-peers", action="store_true", help="only our layer and the dense one")
    parser.add_argument("--gpu", action="store_true", help="the paper's shapes on a CUDA device")
    args = parser.parse_args()
    device = measure.device_of(parser, args.gpu)
    torch.set_num_threads(2)
    shapes = GPU_SHAPES if args.gpu else SHAPES
    for number in args.rows or ():
        if not 0 <= number < len(shapes):
            parser.error(f"--rows {number}: the shapes are 0 to {len(shapes) - 1}; name some")
    dtype = torch.bfloat16 if args.gpu else torch.float32
    run(
        [shapes[number] for number in args.rows] if args.rows is not None else shapes,
        args.rounds,
        not args.no_peers,
        torch.empty(0, dtype=dtype, device=device),
    )


if __name__ == "__main__":
    main()
