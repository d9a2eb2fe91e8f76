"""Training through the real `fairseq-train`: a dense model against stock's transformer_lm with the
same flags, an MoE model against its dense twin, and what --optimizer fused_adam and --compile gain.

    python benchmarks/train_step.py [--groups dense sparse] [--context 512 2048] [--updates 4]
    python benchmarks/train_step.py --groups dense --context 512 --tokens 8192    memory, mainly
    python benchmarks/train_step.py --shares       where the time goes

The 125M shape cut to 4 layers, vocabulary 50,000, float32, two CPU threads. Each case is a process
of its own; those of a group take turns to make an update, and wait in between. Times are
medians over the updates but the first: by the clock, and of the processor (all threads, which sleep
where they wait), which other users of the machine disturb less. Memory is the process's largest
resident set, start-up and libraries included.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any, Dict, List, Sequence, Tuple

import numpy as np
import torch
from measure import count, keep, keep_table, matrix_rate, median

import fairseq_moe_ext
from fairseq_moe_ext.cost import Shape, training_flops_per_token

VOCABULARY, DIM, HIDDEN = 50_000, 768, 3072
TOKENS = 2048  # an update, unless told otherwise
# Of the processes: a thread that waits sleeps, and takes no seconds of the processor.
THREADS = {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive"}
SHAPE = f"""--decoder-layers 4 --decoder-embed-dim {DIM} --decoder-ffn-embed-dim {HIDDEN}
    --decoder-attention-heads 12 --activation-fn gelu --share-decoder-input-output-embed
    --dropout 0.1 --attention-dropout 0.0"""
COMMON = f"""--user-dir {Path(fairseq_moe_ext.__file__).parent} --task language_modeling
    --sample-break-mode none --weight-decay 0.01 --adam-betas (0.9,0.98) --lr 1e-4 --clip-norm 1.0
    --cpu --num-workers 1 --no-save --disable-validation --log-format json --log-interval 1"""
STOCK = f"""--arch transformer_lm --decoder-input-dim {DIM} --decoder-output-dim {DIM}
    --criterion cross_entropy --optimizer adam"""
OURS = "--arch dense_lm_125m --criterion moe_cross_entropy --optimizer"
# Nothing dropped: a dropped choice is not computed, and the FLOPs would not be those of the twin.
MOE = """--arch moe_lm_15b --moe-expert-count 8 --moe-dropless --criterion moe_cross_entropy
    --moe-gate-loss-wt 0.01 --optimizer fused_adam"""
TWIN = f"{MOE} --alternate-decoder-ffn-embed-dim {2 * HIDDEN}"
# The first of each group is what the others are measured against.
GROUPS = {
    "dense": {
        "stock": STOCK,
        "ours": f"{OURS} adam",
        "ours, fused_adam": f"{OURS} fused_adam",
        "ours, fused_adam, --compile": f"{OURS} fused_adam --compile",
    },
    "sparse": {"dense twin": TWIN, "8 experts": MOE, "8 experts, --compile": f"{MOE} --compile"},
}
FLOPS = {
    "dense": Shape(4, DIM, HIDDEN, VOCABULARY),
    "sparse": Shape(4, DIM, HIDDEN, VOCABULARY, moe_freq=2, experts=8),
}


def make_data(folder: Path, tokens: int, vocabulary: int = VOCABULARY) -> None:
    """A data-bin of random words, as frequent as Zipf has it."""
    from fairseq.data import Dictionary
    from fairseq.data.indexed_dataset import MMapIndexedDatasetBuilder

    dictionary = Dictionary()
    for i in range(vocabulary - len(dictionary)):
        dictionary.add_symbol(f"w{i}", n=vocabulary - i)
    dictionary.save(str(folder / "dict.txt"))
    rng = np.random.default_rng(0)
    builder = MMapIndexedDatasetBuilder(str(folder / "train.bin"), dtype=np.uint16)
    words = 4 + np.minimum(rng.zipf(1.1, tokens) - 1, vocabulary - 5)
    for line in np.split(words, range(1024, tokens, 1024)):
        builder.add_item(torch.from_numpy(line))
    builder.finalize(str(folder / "train.idx"))
    for ending in (".bin", ".idx"):  # never read, but fairseq-train asks for it
        shutil.copy(folder / f"train{ending}", folder / f"valid{ending}")


def flags(data: Path, case: str, context: int, tokens: int, updates: int) -> List[str]:
    line = f"{data} {COMMON} {SHAPE} {case} --tokens-per-sample {context}"
    return f"{line} --batch-size {tokens // context} --max-update {updates}".split()


class Training:
    """A process of fairseq-train that stands still but for the updates that it is told to make."""

    def __init__(self, command: Sequence[str]) -> None:
        pipe = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self.process = subprocess.Popen(command, **pipe)
        self.lines: List[str] = []
        self.updates: List[Tuple[float, float]] = []  # seconds by the clock, of the processor
        self.peak_mib = 0.0
        self._go_on()  # start-up and a first update, which are not counted
        self._stop()

    def update(self) -> None:
        """One update more."""
        before, start = self._cpu_seconds(), time.perf_counter()
        self.process.send_signal(signal.SIGCONT)
        self._go_on()
        took = time.perf_counter() - start
        self._stop()
        self.updates.append((took, self._cpu_seconds() - before))

    def finish(self) -> str:
        """To its end; returns the last line that it prints."""
        self.process.send_signal(signal.SIGCONT)
        self.lines += self.process.stdout
        _, self.process.returncode, usage = os.wait4(self.process.pid, 0)
        if self.process.returncode != 0:
            raise SystemExit("fairseq-train failed:\n" + "".join(self.lines[-30:]))
        self.peak_mib = usage.ru_maxrss / 1024
        return self.lines[-1]

    def _go_on(self) -> None:
        for line in self.process.stdout:
            self.lines.append(line)
            if "train_inner | {" in line:
                return
        self.finish()

    def _stop(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def _cpu_seconds(self) -> float:
        """Of all threads until now."""
        stat = Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(stat[11]) + int(stat[12])) / os.sysconf("SC_CLK_TCK")


def speeds(
    data: Path,
    groups: Sequence[str],
    cases: Sequence[str],
    contexts: Sequence[int],
    tokens: int,
    updates: int,
) -> None:
    """Measure and keep those cases of the groups, and the first of each."""
    program = [sys.executable, str(Path(sys.executable).parent / "fairseq-train")]
    rate = matrix_rate()
    for group, context in [(g, c) for g in groups for c in contexts]:
        runs: Dict[str, Training] = {}
        try:
            for name, case in GROUPS[group].items():
                if runs and name not in cases:
                    continue
                runs[name] = Training(program + flags(data, case, context, tokens, updates + 1))
            for turn in range(updates):
                for name in runs if turn % 2 == 0 else reversed(runs):
                    runs[name].update()
                    print(context, name, runs[name].updates[-1], flush=True)
            for run in runs.values():
                run.finish()
        finally:
            for run in runs.values():
                run.process.kill()
        base, *_ = runs.values()
        flops = tokens * training_flops_per_token(FLOPS[group], context)
        size = f"context {context}" + (f", {tokens} tokens" if tokens != TOKENS else "")
        rows = keep("train_step", {f"{name}, {size}": {
            "against": next(iter(runs)),
            "speed": round(median([b / a for (a, _), (b, _) in zip(run.updates, base.updates)]), 3),
            "cpu_speed": round(
                median([b / a for (_, a), (_, b) in zip(run.updates, base.updates)]), 3
            ),
            "memory": round(run.peak_mib / base.peak_mib, 3),
            "seconds": round(median([seconds for seconds, _ in run.updates]), 2),
            "cpu_seconds": round(median([cpu for _, cpu in run.updates]), 2),
            "floor_cpu_seconds": round(flops / rate, 2),
            "peak_mib": round(run.peak_mib),
        } for name, run in runs.items()})  # fmt: skip
    keep_table(
        "train_step",
        f"`fairseq-train`, {TOKENS} tokens an update where nothing else is said "
        f"({' '.join(SHAPE.split())}, a vocabulary of {VOCABULARY}; "
        "sparse: every second layer). Seconds of an update by the clock and of the processor, and "
        "how many times as fast by either, and of how much memory, than the case named. Floor: "
        "the model's FLOPs at the rate of a matrix product alone, one thread, in the same run.",
        ["case", "against", "speed", "by CPU", "memory", "s", "CPU s", "floor, CPU s", "peak MiB"],
        [
            [name, row["against"]]
            + [f"{row[figure]:.2f}" for figure in ("speed", "cpu_speed", "memory")]
            + [f"{row[figure]:g}" for figure in ("seconds", "cpu_seconds", "floor_cpu_seconds")]
            + [str(row["peak_mib"])]
            for name, row in rows.items()
        ],
    )


def shares(data: Path, contexts: Sequence[int], updates: int) -> None:
    """Have a process of each kind say where its time goes, and keep that."""
    cases = {"dense": GROUPS["dense"]["ours, fused_adam"], "8 experts": MOE}
    for case, context in [(case, context) for case in cases for context in contexts]:
        inside = [sys.executable, __file__, "--inside"]
        run = Training(inside + flags(data, cases[case], context, TOKENS, updates + 1))
        rows = keep("train_step_shares", {f"{case}, context {context}": json.loads(run.finish())})
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    keep_table(
        "train_step_shares",
        "Shares of an update's time (`benchmarks/train_step.py --shares`, fused_adam), the first "
        "left out: of operators by torch.profiler (dense only: it does not see the threads that "
        "compute experts), of data loading, logging and routing statistics by the clock.",
        ["share of"] + list(rows),
        [[n] + [f"{row[n]:.2%}" if n in row else "-" for row in rows.values()] for n in names],
    )


class Clocks:
    """Seconds in functions of fairseq and ours, by kind."""

    def __init__(self) -> None:
        self.seconds: Dict[str, float] = defaultdict(float)

    def watch(self, owner: Any, name: str, kind: str) -> None:
        stock = getattr(owner, name)

        @functools.wraps(stock)
        def timed(*args, **kwargs):
            start = time.perf_counter()
            try:
                return stock(*args, **kwargs)
            finally:
                self.seconds[kind] += time.perf_counter() - start

        setattr(owner, name, timed)


def inside(arguments: List[str]) -> None:
    """fairseq-train in this process; the last line that it prints has the shares, as JSON."""
    from fairseq.data.iterators import GroupedIterator
    from fairseq.logging.progress_bar import JsonProgressBar
    from fairseq.trainer import Trainer
    from fairseq_cli import train as fairseq_train

    from fairseq_moe_ext.criterions.moe_cross_entropy import MoECrossEntropyCriterion
    from fairseq_moe_ext.moe import layer

    clocks = Clocks()
    profile = torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True
    )
    clocks.watch(GroupedIterator, "__next__", "data loading")
    clocks.watch(Trainer, "_prepare_sample", "data loading")
    clocks.watch(Trainer, "_reduce_and_log_stats", "logging")
    clocks.watch(JsonProgressBar, "log", "logging")
    clocks.watch(layer, "routing_stats", "routing statistics")
    clocks.watch(MoECrossEntropyCriterion, "_averaged", "routing statistics")
    log, started = JsonProgressBar.log, []

    def after_an_update(*args, **kwargs):
        log(*args, **kwargs)
        if not started:
            started.append(time.perf_counter())
            clocks.seconds.clear()
            profile.start()

    JsonProgressBar.log = after_an_update
    sys.argv = ["fairseq-train", *arguments]
    fairseq_train.cli_main()
    whole = time.perf_counter() - started[0]
    profile.stop()
    found = {name: seconds / whole for name, seconds in clocks.seconds.items()}
    if "moe_lm_15b" not in arguments:
        found = {**by_kind(profile), **found}
    print(json.dumps({name: round(share, 4) for name, share in found.items()}), flush=True)


def by_kind(profile: torch.profiler.profile) -> Dict[str, float]:
    """The share of the operators' time that each kind of them takes, the largest first."""
    spent: Dict[str, float] = defaultdict(float)
    for event in profile.events():
        spent[kind(event)] += event.self_cpu_time_total
    every = sum(spent.values())
    return {name: spent[name] / every for name in sorted(spent, key=lambda name: -spent[name])}


def kind(event: Any) -> str:
    """What an operator is for, by its name, its tensors' shapes and the operators around it."""
    around = event
    while around is not None:  # PyTorch's attention is one operator, ours is made of many
        if "attention" in around.name.lower():
            return "attention's core"
        around = around.cpu_parent
    operator, sizes = event.name, {size for shape in event.input_shapes for size in shape}
    if operator in ("aten::mm", "aten::addmm", "aten::addmm_", "mkldnn::_linear_pointwise"):
        if HIDDEN in sizes:
            return "feed-forward products"
        # of the vocabulary, in whole or a part at a time
        return (
            "attention's projections" if sizes <= {DIM, TOKENS} else "products with the vocabulary"
        )
    if "adam" in operator or "vector_norm" in operator or "foreach" in operator:
        return "optimizer and clipping"
    return "softmax and loss" if VOCABULARY in sizes else "all else"


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.split("\n\n")[0])
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=list(GROUPS))
    every = [name for cases in GROUPS.values() for name in cases]
    parser.add_argument("--cases", nargs="+", choices=every, default=every)
    parser.add_argument("--context", type=count, nargs="+", default=[512, 2048])
    parser.add_argument("--tokens", type=count, default=TOKENS, help="an update; not with --shares")
    parser.add_argument("--updates", type=count, default=4)
    parser.add_argument("--shares", action="store_true", help="where the time goes, in its place")
    args = parser.parse_args()
    torch.set_num_threads(2)
    os.environ.update(THREADS)
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder)
        make_data(data, args.tokens * (args.updates + 2))
        if args.shares:
            shares(data, args.context, args.updates)
        else:
            speeds(data, args.groups, args.cases, args.context, args.tokens, args.updates)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--inside"]:
        inside(sys.argv[2:])
    else:
        main()
