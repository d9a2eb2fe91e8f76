"""Training through the real `fairseq-train`: ours against stock's transformer_lm, same flags.

    python benchmarks/train_step.py [--context 512 2048] [--cases stock ours ...] [--updates 6]

The 125M shape cut to 4 layers, 50,000 types, float32, on the CPU. Each case is a process of its
own; one after the other, twice, in turning order. Tokens a second is the median over the updates
behind the first two; memory is the process's largest resident set, start-up and libraries
included.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Dict, List, NamedTuple

import numpy as np
from measure import keep, keep_table, median

BIN = Path(sys.executable).parent
TYPES = 50_000
TOKENS = 4096  # a batch
SHAPE = """--decoder-layers 4 --decoder-embed-dim 768 --decoder-ffn-embed-dim 3072
    --decoder-attention-heads 12 --activation-fn gelu --share-decoder-input-output-embed
    --dropout 0.1 --attention-dropout 0.0"""
COMMON = """--task language_modeling --sample-break-mode none --weight-decay 0.01
    --adam-betas (0.9,0.98) --lr 1e-4 --clip-norm 1.0 --cpu --num-workers 1
    --no-save --disable-validation --log-format json --log-interval 1 --seed 1"""
OURS = "--arch dense_lm_125m --criterion moe_cross_entropy"
MOE = "--arch moe_lm_15b --moe-expert-count 8 --criterion moe_cross_entropy --moe-gate-loss-wt 0.01"
CASES = {
    "stock": "--arch transformer_lm --decoder-input-dim 768 --decoder-output-dim 768"
    " --criterion cross_entropy --optimizer adam",
    "ours": f"{OURS} --optimizer adam",
    "ours, fused_adam": f"{OURS} --optimizer fused_adam",
    "MoE": f"{MOE} --optimizer fused_adam",
    "MoE's dense twin": f"{MOE} --alternate-decoder-ffn-embed-dim 6144 --optimizer fused_adam",
}


class Run(NamedTuple):
    """What one process of fairseq-train did."""

    tokens_a_second: float
    peak_mib: float


def make_data(folder: Path, tokens: int) -> None:
    """A data-bin of random words, as frequent as Zipf has it."""
    import torch
    from fairseq.data import Dictionary
    from fairseq.data.indexed_dataset import MMapIndexedDatasetBuilder

    import fairseq_moe_ext  # noqa: F401 - prepares fairseq

    dictionary = Dictionary()
    for i in range(TYPES - len(dictionary)):
        dictionary.add_symbol(f"w{i}", n=TYPES - i)
    dictionary.save(str(folder / "dict.txt"))
    rng = np.random.default_rng(0)
    builder = MMapIndexedDatasetBuilder(str(folder / "train.bin"), dtype=np.uint16)
    words = 4 + np.minimum(rng.zipf(1.1, tokens) - 1, TYPES - 5)
    for line in np.split(words, range(1024, tokens, 1024)):
        builder.add_item(torch.from_numpy(line))
    builder.finalize(str(folder / "train.idx"))
    for ending in (".bin", ".idx"):  # never read, but fairseq-train asks for it
        shutil.copy(folder / f"train{ending}", folder / f"valid{ending}")


def train(data: Path, case: str, context: int, updates: int) -> Run:
    """One process of fairseq-train, to its end."""
    import fairseq_moe_ext

    flags = f"""{data} --user-dir {Path(fairseq_moe_ext.__file__).parent} {COMMON} {SHAPE}
        {CASES[case]} --tokens-per-sample {context} --batch-size {TOKENS // context}
        --max-update {updates}"""
    command = [sys.executable, str(BIN / "fairseq-train"), *flags.split()]
    log = data / "log"
    with log.open("w") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
    text = log.read_text()
    if status != 0:
        raise SystemExit(f"{case}: fairseq-train failed:\n{text[-3000:]}")
    rates = [
        float(json.loads(line)["wps"]) for line in re.findall(r"train_inner \| (\{.*\})", text)
    ]
    return Run(median(rates[2:]), usage.ru_maxrss / 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--context", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES)[:3])
    parser.add_argument("--updates", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    rows: Dict[str, Dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        make_data(Path(folder), TOKENS * (args.updates + 2))
        for context in args.context:
            runs: Dict[str, List[Run]] = {case: [] for case in args.cases}
            for turn in range(args.rounds):
                for case in args.cases if turn % 2 == 0 else reversed(args.cases):
                    runs[case].append(train(Path(folder), case, context, args.updates))
                    print(context, case, runs[case][-1], flush=True)
            base = runs[args.cases[0]]
            for case, done in runs.items():
                rows[f"context {context}, {case}, against {args.cases[0]}"] = {
                    "context": context,
                    "tokens_a_second": round(median([run.tokens_a_second for run in done]), 1),
                    "peak_mib": round(max(run.peak_mib for run in done)),
                    "speed_ratio": round(
                        median([a.tokens_a_second / b.tokens_a_second for a, b in zip(done, base)]),
                        3,
                    ),
                    "memory_ratio": round(
                        max(a.peak_mib for a in done) / max(b.peak_mib for b in base), 3
                    ),
                }
    rows = keep("train_step", rows)
    keep_table(
        "train_step",
        f"`fairseq-train` on {TOKENS} tokens an update ({' '.join(SHAPE.split())})",
        ["case", "tokens/s", "peak MiB", "speed", "memory"],
        [
            [name]
            + [f"{row[k]:g}" for k in ("tokens_a_second", "peak_mib")]
            + [f"{row[k]:.2f}" for k in ("speed_ratio", "memory_ratio")]
            for name, row in rows.items()
        ],
    )


if __name__ == "__main__":
    main()
