"""Causal attention on a CPU, forward and backward, against PyTorch's own, in turn.

    python benchmarks/attention.py [--threads 2] [--rounds 7]

With oneDNN as it is used, and with PyTorch's choice of products; with and without dropout on the
weights. Results: benchmarks/results/PROCESSOR/attention.json, .md.
"""

from __future__ import annotations

import argparse
import functools
from typing import Callable, Dict, NamedTuple
from unittest import mock

import measure
import torch
import torch.nn.functional as F
from ablation import IN_BFLOAT16, PRECISIONS
from torch import Tensor

from fairseq_moe_ext.kernels import matmul
from fairseq_moe_ext.kernels.causal_attention import causal_attention


class Shape(NamedTuple):
    sequences: int
    heads: int
    positions: int
    width: int  # of a head


SHAPES = [
    Shape(32, 3, 256, 32),
    Shape(32, 8, 256, 32),
    Shape(4, 12, 512, 64),
    Shape(1, 12, 2048, 64),
]


def pytorchs(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)


@functools.cache
def _rate(dtype: torch.dtype, threads: int) -> float:
    return measure.matrix_rate(9, dtype, threads)


def measured(
    shape: Shape, dtype: torch.dtype, onednn: bool, dropout: float, rounds: int
) -> Dict[str, float]:
    """Milliseconds of both, PyTorch's as a multiple of ours, and ours as a multiple of the time
    that the products of the weights up to the diagonal take at the best product's rate."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(shape, dtype=dtype, requires_grad=True) for _ in range(3))
    grad = torch.randn(shape, dtype=dtype)

    def step(attention: Callable[..., Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(attention(q, k, v, dropout), (q, k, v), grad)

    cases = {"ours": step(causal_attention), "PyTorch": step(pytorchs)}
    faster = matmul.onednn_is_faster() and onednn
    with mock.patch.object(matmul, "onednn_is_faster", lambda: faster):
        seconds = measure.in_turn(cases, rounds)
    # two products forward, four backward; half of their weights are above the diagonal
    flops = 6 * shape.sequences * shape.heads * shape.positions**2 * shape.width
    floor = flops / _rate(dtype, torch.get_num_threads())
    return {
        "ms": 1e3 * measure.median(seconds["ours"]),
        "PyTorch, ms": 1e3 * measure.median(seconds["PyTorch"]),
        "PyTorch : ours": measure.ratio(seconds, "PyTorch", "ours"),
        "ours : floor": measure.median(seconds["ours"]) / floor,
    }


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.split("\n\n")[0])
    parser.add_argument("--threads", type=measure.count, default=2)
    parser.add_argument("--rounds", type=measure.count, default=7)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    names = measure.worthwhile(IN_BFLOAT16)
    rows: Dict[str, Dict[str, float]] = {}
    for shape in SHAPES:
        for name in names:
            dtype, onednn = PRECISIONS[name]
            for dropout in (0.0, 0.1):
                key = f"{', '.join(map(str, shape))}; {name}; dropout {dropout:g}"
                key += "" if args.threads == 2 else f"; {args.threads} threads"
                print(key, flush=True)
                row = measured(shape, dtype, onednn, dropout, args.rounds)
                rows = measure.keep("attention", {key: row})
    title = (
        "Causal attention, forward and backward, of sequences, heads, positions, width of a head "
        "(`python benchmarks/attention.py`), two threads. Floor: the products up to the diagonal."
    )
    heads = ["shape", "ms", "PyTorch, ms", "PyTorch : ours", "ours : floor"]
    lines = [
        [
            key,
            f"{row['ms']:.3g}",
            f"{row['PyTorch, ms']:.3g}",
            f"{row['PyTorch : ours']:.2f}",
            f"{row['ours : floor']:.1f}",
        ]
        for key, row in rows.items()
    ]
    measure.keep_table("attention", title, heads, lines)


if __name__ == "__main__":
    main()
