"""How a training step grows: in tokens, in experts at fixed tokens, in layers, in processes.

    python benchmarks/growth.py
    python benchmarks/growth.py --draw    draw docs/growth_*.svg from this machine's growth.json

Forward and backward of a model whose every second layer is sparse (top-2, dropless), width 256,
context 256, a vocabulary of 8,000, float32; one thread, seconds of the processor. Memory is the
peak of what a step allocates, gradients included. The processes are Gloo's, of one thread each, and
share one batch; their seconds are the clock's.
Writes results/PROCESSOR/growth.json and .md.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any, Callable, Dict, List

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from measure import in_turn, keep, keep_table, language_model, median, own_folder, peak_memory

from fairseq_moe_ext.evaluation.figures import Series, line_chart
from fairseq_moe_ext.files import read_json
from fairseq_moe_ext.models.language_model import MoETransformerLanguageModel

DOCS = Path(__file__).resolve().parents[1] / "docs"
CONTEXT, VOCABULARY = 256, 8000
BASE = {"tokens": 1024, "experts": 8, "layers": 4}
SWEEPS = {"tokens": [512, 1024, 2048, 4096], "experts": [8, 16, 32, 64], "layers": [2, 4, 8, 16]}
PROCESSES, SHARED_TOKENS = [1, 2, 4], 2048
ROUNDS = 3


def build(experts: int, layers: int) -> MoETransformerLanguageModel:
    torch.manual_seed(0)
    return language_model(
        VOCABULARY,
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
    words = torch.randint(4, VOCABULARY, (tokens // CONTEXT, CONTEXT + 1))

    def run() -> None:
        model.zero_grad(set_to_none=True)
        loss, extra = model(words[:, :-1], target=words[:, 1:])
        (loss + sum(record.balance_loss for record in extra["moe"])).backward()

    return run


def sweep(kind: str, values: List[int]) -> Dict[int, Dict[str, float]]:
    """Seconds (median, least and most over the rounds) and MB of a step for each value."""
    steps = {}
    for value in values:
        size = {**BASE, kind: value}
        model = build(size["experts"], size["layers"])
        steps[str(value)] = step(model, size["tokens"])
    seconds = in_turn(steps, ROUNDS, warmup=1, clock=time.process_time)
    return {
        int(value): {**over_rounds(seconds[value]), "mb": round(peak_memory(run) / 1e6, 1)}
        for value, run in steps.items()
    }


def over_rounds(seconds: List[float]) -> Dict[str, float]:
    ends = {"least": min(seconds), "most": max(seconds)}
    return {k: round(v, 4) for k, v in {"seconds": median(seconds), **ends}.items()}


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
        share = round(sum(exchanges) / sum(steps), 3)
        results.put({**over_rounds(steps), "exchanges": share})
    dist.destroy_process_group()


def divided(processes: int) -> Dict[str, float]:
    """Seconds of a step as in `sweep`, and the share of them in exchanges, waiting for others
    included."""
    results = mp.get_context("spawn").SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_process, (processes, f"{folder}/store", results), nprocs=processes)
    return results.get()


def draw(rows: Dict[str, Dict[str, Any]]) -> None:
    """docs/growth_*.svg, from the rows of results/growth.json. Error bars: least and most over the
    rounds, where the file has them."""
    for kind in (*SWEEPS, "processes"):
        measured = {
            int(name.split()[0]): row for name, row in rows.items() if name.endswith(f" {kind}")
        }
        title = f"{SHARED_TOKENS} tokens over processes"
        if kind in SWEEPS:
            title = f"time ~ {kind}^{next(iter(measured.values()))['time_exponent']:.2f}"
        points = [(value, row["seconds"]) for value, row in measured.items()]
        ends = [
            (row["least"], row["most"]) if "least" in row else None for row in measured.values()
        ]
        line = Series("", points, 0, ends)
        chart = line_chart(title, [line], kind, "seconds a step", zero_line=True)
        chart.write_svg(DOCS / f"growth_{kind}.svg")


def measure() -> Dict[str, Dict[str, Any]]:
    rows: Dict[str, Dict[str, float]] = {}
    for kind, values in SWEEPS.items():
        measured = sweep(kind, values)
        slopes = {
            "time_exponent": exponent({value: row["seconds"] for value, row in measured.items()}),
            "memory_exponent": exponent({value: row["mb"] for value, row in measured.items()}),
        }
        for value, row in measured.items():
            rows[f"{value} {kind}"] = {**row, **{k: round(v, 3) for k, v in slopes.items()}}
            print(kind, value, rows[f"{value} {kind}"], flush=True)
    for processes in PROCESSES:
        rows[f"{processes} processes"] = divided(processes)
    return keep("growth", rows)


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.splitlines()[0])
    parser.add_argument(
        "--draw", action="store_true", help="measure nothing; draw the figures of docs/ again"
    )
    if parser.parse_args().draw:
        file = own_folder("growth") / "growth.json"
        if not file.exists():
            parser.exit(1, f"--draw: {file} does not exist; run `python benchmarks/growth.py`\n")
        draw(read_json(file)["rows"])
        return
    torch.set_num_threads(1)
    rows = measure()
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
