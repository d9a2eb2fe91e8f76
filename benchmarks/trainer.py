"""What `fairseq-train` adds to a training step, and what experts add to one of its updates: its
updates against the same in a bare loop, and sparse ones against dense ones of equal FLOPs.

    python benchmarks/trainer.py [--shapes 96 128 ...] [--cases NAME ...] [--rounds 5]

The trainer is the real one, in a process of its own: mixture task, moe_cross_entropy, clipping,
metrics and their file, a log line every 10 updates, data loading in the process or by workers. The
bare loop is the same model: loss, backward, torch's clip_grad_norm_, the optimizer, on batches that
lie ready. Beside a sparse model, the trainer also trains the dense one. Ten updates of each in
turn; the others wait. Parts are measured by the clock in the same updates. Results:
benchmarks/results/PROCESSOR/trainer.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple

import measure
import torch
from train_step import THREADS, Clocks, make_data

import fairseq_moe_ext
from fairseq_moe_ext.errors import UserError
from fairseq_moe_ext.study.plan import matching

TURN = 10  # updates, and the interval of the log
WAITS = "waits, CPU s:"  # what a process says between turns


class Shape(NamedTuple):
    dim: int
    heads: int
    rows: int
    context: int
    layers: int = 4
    vocabulary: int = 4104


class Case(NamedTuple):
    experts: int = 0
    every: int = 1  # of how many layers one is sparse
    optimizer: str = "fused_adam"
    workers: int = 0
    bf16: bool = False


SHAPES = {
    "96": Shape(96, 3, 32, 256),
    "128": Shape(128, 4, 8, 256),
    "256": Shape(256, 4, 32, 256, layers=6),
    "wide": Shape(768, 12, 4, 512, vocabulary=50_000),
}
CASES = {
    "dense": Case(),
    "dense, a worker": Case(workers=1),
    "dense, adam": Case(optimizer="adam"),
    "8 experts": Case(8),
    "8 experts, adam": Case(8, optimizer="adam"),
    "8 experts, every other layer": Case(8, every=2),
    "64 experts, every other layer": Case(64, every=2),
    "bf16: dense": Case(bf16=True),
    "bf16: 8 experts, every other layer": Case(8, every=2, bf16=True),
    "bf16: 64 experts, every other layer": Case(64, every=2, bf16=True),
}
BARE = ("loss", "backward", "clipping", "optimizer")
PARTS = (*BARE, "data", "gradients", "metrics", "log", "rest")


def flags(data: Path, shape: Shape, case: Case, updates: int) -> List[str]:
    hidden = 4 * shape.dim
    experts = f"""--arch moe_lm_tiny --moe-freq {case.every} --moe-expert-count {case.experts}
        --moe-dropless --moe-expert-ffn-dim {hidden // 2}"""
    return f"""{data} --user-dir {Path(fairseq_moe_ext.__file__).parent}
        --task mixture_language_modeling --tokens-per-sample {shape.context}
        {experts if case.experts else "--arch dense_lm_tiny"}
        --decoder-layers {shape.layers} --decoder-embed-dim {shape.dim}
        --decoder-ffn-embed-dim {hidden} --decoder-attention-heads {shape.heads}
        --dropout 0.1 --attention-dropout 0 --criterion moe_cross_entropy --moe-gate-loss-wt 0.01
        --optimizer {case.optimizer} --adam-betas (0.9,0.98) --weight-decay 0.01 --lr 1e-3
        --clip-norm 1.0 --batch-size {shape.rows} --max-update {updates} --cpu
        {"--bf16" if case.bf16 else ""} --num-workers {case.workers}
        --save-dir {data / f"saved-{case.experts}"} --no-epoch-checkpoints
        --data-buffer-size 1 --disable-validation --log-format json --log-interval {TURN}""".split()


class Program:
    """A process of this file that makes ten updates when told to, and else waits."""

    def __init__(self, kind: str, line: List[str]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__, kind, *line],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.lines: List[str] = []
        self.cpu: List[float] = []  # seconds of all threads until the end of each turn
        self._wait()  # for start-up and the first turn, which are not counted

    def turn(self) -> None:
        self._go_on()
        self._wait()

    def finish(self) -> Dict[str, float]:
        """To its end; seconds an update of each part."""
        self._go_on()
        self.lines += self.process.stdout
        if self.process.wait() != 0:
            raise SystemExit("failed:\n" + "".join(self.lines[-30:]))
        return json.loads(self.lines[-1])

    def _go_on(self) -> None:
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def _wait(self) -> None:
        for line in self.process.stdout:
            self.lines.append(line)
            if line.startswith(WAITS):
                self.cpu.append(float(line.split()[-1]))
                return
        self.process.stdin.close()
        raise SystemExit("ended too soon:\n" + "".join(self.lines[-30:]))


def wait() -> float:
    """In such a process; how long it took, in seconds."""
    started = time.perf_counter()
    print(WAITS, time.process_time(), flush=True)
    sys.stdin.readline()
    return time.perf_counter() - started


def bare(line: List[str]) -> None:
    """A loop without a trainer."""
    from fairseq import options, tasks
    from fairseq.dataclass.utils import convert_namespace_to_omegaconf
    from fairseq.optim.adam import Adam

    from fairseq_moe_ext.models import precision

    sys.argv = ["fairseq-train", *line]  # the first, partial parse reads these
    args = options.parse_args_and_arch(options.get_training_parser(), line)
    task = tasks.setup_task(convert_namespace_to_omegaconf(args).task)
    torch.manual_seed(1)
    model = task.build_model(convert_namespace_to_omegaconf(args).model).train()
    model.decoder.bfloat16_on_cpu = args.bf16 and precision.bfloat16_pays()  # as the trainer's
    parameters = [p for p in model.parameters() if p.requires_grad]
    settings: Any = dict(lr=1e-3, betas=(0.9, 0.98), eps=1e-8, weight_decay=0.01)
    fused = args.optimizer == "fused_adam"
    optimizer: Any = (
        torch.optim.AdamW(parameters, fused=True, **settings)
        if fused
        else Adam(parameters, **settings)
    )
    task.load_dataset("train")
    dataset = task.dataset("train")
    batches = [
        dataset.collater([dataset[first + row] for row in range(args.batch_size)])
        for first in range(0, TURN * args.batch_size, args.batch_size)
    ]
    seconds = dict.fromkeys(BARE, 0.0)
    turns = args.max_update // TURN
    for turn in range(turns):
        for batch in batches:
            tokens, target = batch["net_input"]["src_tokens"], batch["target"]
            times = [time.perf_counter()]
            optimizer.zero_grad(set_to_none=True)
            loss, extra = model(tokens, target=target)
            if extra["moe"]:
                balance = torch.stack([record.balance_loss for record in extra["moe"]]).mean()
                loss = loss + 0.01 * tokens.numel() * balance
            times.append(time.perf_counter())
            (loss / tokens.numel()).backward()
            times.append(time.perf_counter())
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            times.append(time.perf_counter())
            optimizer.step()
            times.append(time.perf_counter())
            for part, start, end in zip(BARE, times, times[1:]):
                seconds[part] += end - start
        if turn == 0:
            seconds = dict.fromkeys(BARE, 0.0)
        wait()
    print(json.dumps({part: spent / (turns - 1) / TURN for part, spent in seconds.items()}))


def trainer(line: List[str]) -> None:
    """fairseq-train."""
    from fairseq.criterions import FairseqCriterion
    from fairseq.data.iterators import GroupedIterator
    from fairseq.logging.progress_bar import JsonProgressBar
    from fairseq.optim import FairseqOptimizer
    from fairseq.tasks import FairseqTask
    from fairseq.trainer import Trainer
    from fairseq_cli import train

    from fairseq_moe_ext.patches.progress import Watched

    clocks = Clocks()
    clocks.watch(FairseqCriterion, "__call__", "loss")
    clocks.watch(FairseqOptimizer, "backward", "backward")
    clocks.watch(Trainer, "clip_grad_norm", "clipping")
    clocks.watch(FairseqTask, "optimizer_step", "optimizer")
    clocks.watch(GroupedIterator, "__next__", "data")
    clocks.watch(Trainer, "_prepare_sample", "data")
    clocks.watch(Trainer, "zero_grad", "gradients")
    clocks.watch(FairseqOptimizer, "multiply_grads", "gradients")
    clocks.watch(Trainer, "_reduce_and_log_stats", "metrics")
    clocks.watch(Watched, "log", "log")
    turns = 0
    stock = JsonProgressBar.log

    def log(*args: Any, **kwargs: Any) -> None:
        nonlocal turns
        stock(*args, **kwargs)
        if turns == 0:
            clocks.seconds.clear()
        turns += 1
        clocks.seconds["log"] -= wait()

    JsonProgressBar.log = log
    sys.argv = ["fairseq-train", *line]
    train.cli_main()
    print(json.dumps({part: s / (turns - 1) / TURN for part, s in clocks.seconds.items()}))


PROGRAMS = {"bare": bare, "trainer": trainer}
DENSE = "dense trainer"


def compare(shape: Shape, case: Case, rounds: int) -> Dict[str, Any]:
    """One row."""
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder)
        tokens = shape.rows * shape.context * TURN * (rounds + 3)
        for corpus in ("one", "two"):
            (data / corpus).mkdir()
            make_data(data / corpus, max(2, tokens // 2048) * 1024, shape.vocabulary)
        (data / "dict.txt").write_text((data / "one" / "dict.txt").read_text())
        updates = TURN * (rounds + 1)
        line = flags(data, shape, case, updates)
        programs = {kind: Program(kind, line) for kind in PROGRAMS}
        if case.experts:
            line = flags(data, shape, case._replace(experts=0), updates)
            programs[DENSE] = Program("trainer", line)
        try:
            turns: Dict[str, Callable[[], None]] = {
                kind: program.turn for kind, program in programs.items()
            }
            seconds = measure.in_turn(turns, rounds, warmup=0)
            parts = {kind: program.finish() for kind, program in programs.items()}
        finally:
            for program in programs.values():
                program.process.kill()
    cpu = {
        kind: [after - before for before, after in zip(program.cpu, program.cpu[1:])]
        for kind, program in programs.items()
    }
    ms = {kind: 1000 * measure.median(values) / TURN for kind, values in seconds.items()}
    more = {
        part: 1000 * (parts["trainer"].get(part, 0.0) - parts["bare"].get(part, 0.0))
        for part in PARTS
    }
    difference = sum(seconds["trainer"]) - sum(seconds["bare"])
    more["rest"] = 1000 * difference / rounds / TURN - sum(more.values())
    return {
        "speed": round(1 / measure.ratio(seconds, "trainer", "bare"), 3),
        "cpu_speed": round(1 / measure.ratio(cpu, "trainer", "bare"), 3),
        "bare_ms": round(ms["bare"], 2),
        "trainer_ms": round(ms["trainer"], 2),
        "tokens_per_second": round(1000 * shape.rows * shape.context / ms["trainer"]),
        "to_dense": round(measure.ratio(seconds, "trainer", DENSE), 3) if case.experts else None,
        "more_ms": {part: round(value, 2) for part, value in more.items()},
    }


def described(name: str, shape: Shape) -> str:
    return (
        f"{name}: {shape.layers} x {shape.dim}, vocabulary {shape.vocabulary}, "
        f"{shape.rows} x {shape.context} tokens"
    )


def show(rows: Dict[str, Dict[str, Any]]) -> None:
    """Write the table of all rows, and print it."""
    order = [f"{name}: {case}" for name in SHAPES for case in CASES]
    measure.keep_table(
        "trainer",
        "An update of `fairseq-train` against the same in a bare loop "
        f"({'; '.join(described(*item) for item in SHAPES.items())}). Speed: of the bare loop's, "
        "by the clock and by the processor's time of all threads. To dense: time, against an "
        "update of the dense model of equal FLOPs by `fairseq-train`. The other columns: "
        "milliseconds that the trainer's part takes more than the bare loop's, a mean over all "
        "updates.",
        ["case", "speed", "by CPU", "to dense", "tokens/s", "trainer, ms", "bare, ms", *PARTS],
        [
            [key, f"{row['speed']:.3f}", f"{row['cpu_speed']:.3f}"]
            + [f"{row['to_dense']:.2f}" if row.get("to_dense") else "-"]
            + [f"{row['tokens_per_second']:,}", f"{row['trainer_ms']:.1f}", f"{row['bare_ms']:.1f}"]
            + [f"{row['more_ms'][part]:.2f}" for part in PARTS]
            for key in order
            if (row := rows.get(key))
        ],
    )


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.split("\n\n")[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument(
        "--cases", nargs="+", default=["*"], metavar="NAME", help="* stands for any text"
    )
    parser.add_argument("--rounds", type=measure.count, default=5)
    args = parser.parse_args()
    try:
        cases = matching(list(CASES), args.cases, "--cases", "case")
    except UserError as error:
        parser.error(str(error))
    cases = measure.worthwhile({case: CASES[case].bf16 for case in cases})
    if not cases:
        parser.exit(1, "nothing was measured\n")
    torch.set_num_threads(2)
    os.environ.update(THREADS)
    for name in args.shapes:
        for case in cases:
            found = compare(SHAPES[name], CASES[case], args.rounds)
            show(measure.keep("trainer", {f"{name}: {case}": found}))


if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1] in PROGRAMS:
        PROGRAMS[sys.argv[1]](sys.argv[2:])
    else:
        main()
