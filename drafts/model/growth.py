"""How a training step grows: in tokens, experts at fixed tokens, layers, and processes.

    python benchmarks/growth.py

Forward and backward of a sparse model (every second layer, top-2, dropless) of width 256, context
256, 8,000 types, float32. Memory is the peak of tensors beyond parameters and gradients that were
there before. Processes are Gloo's, of one thread each, and share one batch among them.
Writes results/growth.json, .md and the figures docs/growth_*.svg with the fitted exponents.
"""

from __future__ import annotations

import math
import socket
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Callable, Dict, List, Tuple

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from fairseq.data import Dictionary
from measure import in_turn, keep, keep_table, median, peak_memory

import fairseq_moe_ext  # noqa: F401 - registers the model
from fairseq_moe_ext.config import MoETransformerLMConfig
from fairseq_moe_ext.evaluation.figures import Series, line_chart
from fairseq_moe_ext.expert_parallel import traffic
from fairseq_moe_ext.models.language_model import MoETransformerLanguageModel

DOCS = Path(__file__).resolve().parents[1] / "docs"
CONTEXT, TYPES = 256, 8000
BASE = {"tokens": 2048, "experts": 8, "layers": 4}
SWEEPS = {
    "tokens": [1024, 2048, 4096, 8192],
    "experts": [8, 16, 32, 64, 128],
    "layers": [2, 4, 8, 16],
}
PROCESSES = [1, 2, 4]
_STYLE = """<style>text{font:11px system-ui,sans-serif;fill:#5a6472}.t{font-weight:600;fill:#1d2430}
.e{text-anchor:end}.c{text-anchor:middle}.g{stroke:#d9dde3}.k{stroke:#5a6472}.z{stroke:#5a6472}
.l{fill:none;stroke-width:2}.l.s0{stroke:#0072b2}.l.s1{stroke:#d55e00}.m.s0{fill:#0072b2}
.m.s1{fill:#d55e00}svg{background:#fff}</style>"""


def build(experts: int, layers: int, processes: int = 1) -> MoETransformerLanguageModel:
    dictionary = Dictionary()
    for i in range(TYPES - len(dictionary)):
        dictionary.add_symbol(f"w{i}")
    torch.manual_seed(0)
    cfg = MoETransformerLMConfig(
        decoder_layers=layers,
        decoder_embed_dim=256,
        decoder_ffn_embed_dim=1024,
        decoder_attention_heads=4,
        share_decoder_input_output_embed=True,
        dropout=0.0,
        moe_freq=2,
        moe_expert_count=experts,
        moe_second_expert_policy="all",
        moe_dropless=True,
        tokens_per_sample=CONTEXT,
        max_target_positions=None,
        max_tokens=None,
        batch_size=None,
        ddp_backend="legacy_ddp",
        distributed_world_size=processes,
    )
    task = SimpleNamespace(source_dictionary=dictionary)
    return MoETransformerLanguageModel.build_model(cfg, task).train()


def step(model: MoETransformerLanguageModel, tokens: int) -> Callable[[], None]:
    words = torch.randint(4, TYPES, (tokens // CONTEXT, CONTEXT + 1))

    def run() -> None:
        loss, extra = model(words[:, :-1], target=words[:, 1:])
        (loss + sum(record.balance_loss for record in extra["moe"])).backward()

    return run


def sweep(kind: str, values: List[int]) -> Dict[int, Tuple[float, float]]:
    """Seconds and MB of a step for each value."""
    steps = {}
    for value in values:
        size = {**BASE, kind: value}
        steps[str(value)] = step(build(size["experts"], size["layers"]), size["tokens"])
    seconds = in_turn(steps, rounds=5)
    return {int(v): (median(seconds[v]), peak_memory(run) / 1e6) for v, run in steps.items()}


def exponent(points: Dict[int, float]) -> float:
    """The slope of log y over log x, by least squares: 1 is linear."""
    xs, ys = [math.log(x) for x in points], [math.log(y) for y in points.values()]
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    across = sum((x - mean_x) ** 2 for x in xs)
    return sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys)) / across


def _process(rank: int, processes: int, port: int, rounds: int, results) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=processes
    )
    run = step(build(BASE["experts"], BASE["layers"], processes), 4096 // processes)
    whole, exchanges = [], []
    for turn in range(-1, rounds):
        dist.barrier()
        traffic.take()
        start = time.perf_counter()
        run()
        dist.barrier()
        if turn >= 0:
            whole.append(time.perf_counter() - start)
            exchanges.append(traffic.take()[1])
    if rank == 0:
        results.put((median(whole), sum(exchanges) / sum(whole)))
    dist.destroy_process_group()


def processes_in_turn() -> Dict[int, Tuple[float, float]]:
    """Seconds of a step, and the share of them in exchanges, waiting for others included."""
    found = {}
    for processes in PROCESSES:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        results = mp.get_context("spawn").SimpleQueue()
        mp.spawn(_process, (processes, port, 5, results), nprocs=processes)
        found[processes] = results.get()
    return found


def draw(name: str, title: str, x: str, y: str, points: Dict[int, float]) -> None:
    svg = line_chart(title, [Series(y, list(points.items()), 0)], x, y, zero_line=True)
    svg = svg.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" width="360" ', 1)
    end = svg.index(">") + 1
    (DOCS / f"growth_{name}.svg").write_text(svg[:end] + _STYLE + svg[end:] + "\n", "utf-8")


def main() -> None:
    rows: Dict[str, Dict[str, float]] = {}
    for kind, values in SWEEPS.items():
        found = sweep(kind, values)
        seconds = {value: took for value, (took, _) in found.items()}
        memory = {value: mb for value, (_, mb) in found.items()}
        for value in values:
            rows[f"{value} {kind}"] = {
                "seconds": round(seconds[value], 4),
                "mb": round(memory[value], 1),
                "time_exponent": round(exponent(seconds), 3),
                "memory_exponent": round(exponent(memory), 3),
            }
        fitted = f"time ~ {kind}^{exponent(seconds):.2f}"
        draw(kind, fitted, kind, "seconds a step", seconds)
    found = processes_in_turn()
    for processes, (took, share) in found.items():
        rows[f"{processes} processes"] = {
            "seconds": round(took, 4),
            "exchange_share": round(share, 3),
        }
    draw(
        "processes",
        "4,096 tokens over processes",
        "processes",
        "seconds a step",
        {n: took for n, (took, _) in found.items()},
    )
    rows = keep("growth", rows)
    heads = ["seconds", "mb", "time_exponent", "memory_exponent", "exchange_share"]
    keep_table(
        "growth",
        "Growth of a training step; the base is 2,048 tokens, 8 experts, 4 layers",
        ["size", *(head.replace("_", " ") for head in heads)],
        [[name] + [f"{row[h]:g}" if h in row else "" for h in heads] for name, row in rows.items()],
    )


if __name__ == "__main__":
    main()
