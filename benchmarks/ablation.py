"""What each special way of computing experts on a CPU is worth: a step of an MoE layer without it.

    python benchmarks/ablation.py [--rows 0 1]

Dropless, top-2, 2 threads, new tokens in every step, so that numbers of rows change as in training;
with oneDNN as it is used, with PyTorch's choice of products, and in bfloat16.
Results: benchmarks/results/PROCESSOR/ablation.json, .md.
"""

from __future__ import annotations

import argparse
import contextlib
from typing import Callable, ContextManager, Dict, Iterator, Sequence
from unittest import mock

import layer
import measure
import torch
from layer import Shape

from fairseq_moe_ext.kernels import chunks, expert_ffn, matmul
from fairseq_moe_ext.moe import experts

SHAPES = [
    Shape(4096, 8, 96, 384),
    Shape(4096, 64, 96, 384),
    Shape(16384, 256, 96, 96),
    Shape(4096, 64, 256, 1024),
    Shape(2048, 512, 256, 1024),
]


def _one_by_one(work: Callable[[int], None], counts: Sequence[int], size: int, cpu: bool) -> None:
    for i in range(len(counts)):
        work(i)


def _no_pool(shape: Shape) -> ContextManager:
    return mock.patch.object(expert_ffn, "side_by_side", _one_by_one)


def _no_batches(shape: Shape) -> ContextManager:
    """Expert by expert, as wide ones; in the order of the experts."""
    return mock.patch.object(chunks, "_NARROW", 0)


@contextlib.contextmanager
def _no_spare_rows(shape: Shape) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for module in (expert_ffn, chunks):
            stack.enter_context(mock.patch.object(module, "program_rows", lambda x, counts: counts))
        stack.enter_context(mock.patch.object(chunks, "program_size", lambda rows: rows))
        yield


@contextlib.contextmanager
def _autograd(shape: Shape) -> Iterator[None]:
    """The loop over experts with autograd's own backward pass, by the same library."""
    with mock.patch.object(experts, "kernel_for", lambda x, weights: None):
        with matmul.faster_products(torch.empty(1, 1)):
            yield


SPARE = "spare rows"
WITHOUT: Dict[str, Callable[[Shape], ContextManager]] = {
    "batched products": _no_batches,
    "one expert per core": _no_pool,
    SPARE: _no_spare_rows,
    "hand-written backward": _autograd,
}
PRECISIONS = {
    "float32": (torch.float32, True),
    "float32, PyTorch's choice of products": (torch.float32, False),
    "bfloat16": (torch.bfloat16, True),
}
IN_BFLOAT16 = {name: dtype == torch.bfloat16 for name, (dtype, _) in PRECISIONS.items()}


def measured(shape: Shape, dtype: torch.dtype, onednn: bool, rounds: int) -> Dict[str, float]:
    """name of what is left out -> time of a step without it over the time with all."""
    torch.manual_seed(0)
    model = layer.ours(shape, dropless=True)
    tokens, grad = torch.randn(2, shape.tokens, shape.dim).to(dtype)

    def step() -> None:
        layer.step(model, (tokens + torch.randn_like(tokens)).requires_grad_(), grad)()

    def without(change: Callable[[Shape], ContextManager]) -> Callable[[], None]:
        def changed() -> None:
            with change(shape):
                step()

        return changed

    cases = {name: without(change) for name, change in WITHOUT.items()}
    # Without spare rows, oneDNN's cache of primitives fills up and slows the others: it comes last.
    last = {SPARE: cases.pop(SPARE)}
    faster = matmul.onednn_is_faster() and onednn
    with mock.patch.object(matmul, "onednn_is_faster", lambda: faster):
        seconds = measure.in_turn({"all": step, **cases}, rounds, warmup=2)
        beside = measure.in_turn({"all": step, **last}, rounds, warmup=2)
    times = {name: measure.ratio(seconds, name, "all") for name in cases}
    times[SPARE] = measure.ratio(beside, SPARE, "all")
    return {"ms": 1e3 * measure.median(seconds["all"]), **times}


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.split("\n\n")[0])
    numbers = range(len(SHAPES))
    parser.add_argument(
        "--rows", type=int, nargs="+", choices=numbers, help="numbers of shapes; default: all"
    )
    parser.add_argument("--rounds", type=measure.count, default=7)
    args = parser.parse_args()
    torch.set_num_threads(2)
    shapes = SHAPES if args.rows is None else [SHAPES[number] for number in args.rows]
    names = measure.worthwhile(IN_BFLOAT16)
    rows: Dict[str, Dict[str, float]] = {}
    for shape in shapes:
        for name in names:
            dtype, onednn = PRECISIONS[name]
            key = f"{', '.join(map(str, shape[:4]))}; {name}"
            print(key, flush=True)
            rows = measure.keep("ablation", {key: measured(shape, dtype, onednn, args.rounds)})
    title = (
        "A step of one MoE layer, forward and backward, without one part of its kernels, as "
        "multiples of the time with all (`python benchmarks/ablation.py`). Above 1, the step is "
        "slower without it."
    )
    heads = ["S, E, M, F", "ms", *(f"without {name}" for name in WITHOUT)]
    lines = [
        [key, f"{row['ms']:.3g}", *(f"{row[name]:.2f}" for name in WITHOUT)]
        for key, row in rows.items()
    ]
    measure.keep_table("ablation", title, heads, lines)


if __name__ == "__main__":
    main()
