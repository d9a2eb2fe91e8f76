"""How a training step grows: in tokens, in experts at fixed tokens, in layers, in processes.

    python benchmarks/growth.py

Forward and backward of a model whose every second layer is sparse (top-2, dropless), width 256,
context 256, 8,000 types, float32; one thread, seconds of the processor. Memory is the peak of what
a step allocates, gradients included. Processes are Gloo's, of one thread each, and share one batch;
their seconds are the clock's.
Writes results/growth.json and .md, and docs/growth_*.svg with the fitted exponents.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Callable, Dict, List, Tuple

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from measure import in_turn, keep, keep_table, language_model, median, peak_memory

from fairseq_moe_ext.evaluation.figures import Series, line_chart
from fairseq_moe_ext.models.language_model import MoETransformerLanguageModel

DOCS = Path(__file__).resolve().parents[1] / "docs"
CONTEXT, TYPES = 256, 8000
BASE = {"tokens": 1024, "experts": 8, "layers": 4}
SWEEPS = {
    "tokens": [512, 1024, 2048, 4096],
    "experts": [8, 16, 32, 64],
    "layers": [2, 4, 8, 16],
}
PROCESSES, SHARED_TOKENS = [1, 2, 4], 2048
ROUNDS = 3


def build(experts: int, layers: int) -> MoETransformerLanguageModel:
    torch.manual_seed(0)
    return language_model(
        TYPES,
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
    ).train()


def step(model: MoETransformerLanguageModel, tokens: int) -> Callable[[], None]:
    """Forward and backward of a batch of random tokens."""
    words = torch.randint(4, TYPES, (tokens // CONTEXT, CONTEXT + 1))

    def run() -> None:
        model.zero_grad(set_to_none=True)
        loss, extra = model(words[:, :-1], target=words[:, 1:])
        (loss + sum(record.balance_loss for record in extra["moe"])).backward()

    return run


def sweep(kind: str, values: List[int]) -> Dict[int, Tuple[float, float]]:
    """Seconds and MB of a step for each value."""
    steps = {}
    for value in values:
        size = {**BASE, kind: value}
        model = build(size["experts"], size["layers"])
        steps[str(value)] = step(model, size["tokens"])
    seconds = in_turn(steps, ROUNDS, warmup=1, clock=time.process_time)
    return {int(v): (median(seconds[v]), peak_memory(run) / 1e6) for v, run in steps.items()}


def exponent(points: Dict[int, float]) -> float:
    """The slope of log y over log x, by least squares: 1 is linear."""
    x, y = np.log(list(points)), np.log(list(points.values()))
    return float(np.polyfit(x, y, 1)[0])


def _process(rank: int, processes: int, store: str, results) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=processes)
    model = build(BASE["experts"], BASE["layers"])
    run = step(model, SHARED_TOKENS // processes)
    steps, exchanges = [], []
    for turn in range(-1, ROUNDS):
        dist.barrier()
        model.decoder.take_traffic()
        start = time.perf_counter()
        run()
        dist.barrier()
        if turn >= 0:
            steps.append(time.perf_counter() - start)
            exchanges.append(model.decoder.take_traffic()["all_to_all_cpu_time_ms"] / 1e3)
    if rank == 0:
        results.put((median(steps), sum(exchanges) / sum(steps)))
    dist.destroy_process_group()


def spread(processes: int) -> Tuple[float, float]:
    """Seconds of a step, and the share of them in exchanges, waiting for others included."""
    results = mp.get_context("spawn").SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_process, (processes, f"{folder}/store", results), nprocs=processes)
    return results.get()


def draw(kind: str, title: str, y_label: str, points: Dict[int, float]) -> None:
    chart = line_chart(title, [Series("", list(points.items()), 0)], kind, y_label, zero_line=True)
    chart.write_svg(DOCS / f"growth_{kind}.svg")


def main() -> None:
    torch.set_num_threads(1)
    rows: Dict[str, Dict[str, float]] = {}
    for kind, values in SWEEPS.items():
        found = sweep(kind, values)
        seconds = {value: took for value, (took, _) in found.items()}
        memory = {value: mb for value, (_, mb) in found.items()}
        time_slope, memory_slope = exponent(seconds), exponent(memory)
        for value in values:
            rows[f"{value} {kind}"] = {
                "seconds": round(seconds[value], 4),
                "mb": round(memory[value], 1),
                "time_exponent": round(time_slope, 3),
                "memory_exponent": round(memory_slope, 3),
            }
            print(kind, value, rows[f"{value} {kind}"], flush=True)
        draw(kind, f"time ~ {kind}^{time_slope:.2f}", "seconds a step", seconds)
    found = {processes: spread(processes) for processes in PROCESSES}
    for processes, (took, share) in found.items():
        rows[f"{processes} processes"] = {"seconds": round(took, 4), "exchanges": round(share, 3)}
    draw(
        "processes",
        f"{SHARED_TOKENS} tokens over processes",
        "seconds a step",
        {processes: took for processes, (took, _) in found.items()},
    )
    rows = keep("growth", rows)
    names = ["seconds", "mb", "time_exponent", "memory_exponent", "exchanges"]
    keep_table(
        "growth",
        f"Growth of a training step. Other sizes: {BASE}; {SHARED_TOKENS} tokens over processes. "
        "exchanges: share of the step's time, waiting for others included.",
        ["size", *(name.replace("_", " ") for name in names)],
        [[key] + [f"{row[n]:g}" if n in row else "-" for n in names] for key, row in rows.items()],
    )


if __name__ == "__main__":
    main()
