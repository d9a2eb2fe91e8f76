"""All that is to be measured and tested on a GPU, in at most eight minutes on one.

    python benchmarks/gpu.py [--parts layer step statistics tests] [--minutes 8]
    python benchmarks/gpu.py --device cpu --tiny      try this script, without a GPU

Each part is a process with a time limit, which keeps its results as it goes, so that a part that is
stopped leaves what it measured: results/DEVICE/{layer,peers,gpu_statistics}.json and .md. gpu.md
says what came of each part, and which peers were left out, as they do not work here.
BENCHMARK_RESULTS names another folder for the results; --tiny uses a temporary one.

layer        a layer at the widths of the 15B, 52B and 207B models against a dense one, and against
             MegaBlocks, ScatterMoE, SonicMoE, transformers and plain grouped products
step         a training step against plain PyTorch, Hugging Face's models and the product's rate
statistics   what routing statistics take, and how often a layer waits for the device with and
             without them
tests        those marked gpu
"""

from __future__ import annotations

import argparse
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Callable, Dict, List, NamedTuple, Sequence

ROOT = Path(__file__).resolve().parents[1]
PARTS = {"layer": 140, "step": 170, "statistics": 50, "tests": 120}  # seconds, at least


def layer(like, tiny: bool) -> None:
    import layer

    shapes = [layer.Shape(64, 4, 16, 32)] if tiny else layer.GPU_SHAPES
    for peers in (False, True):  # ours first, as an error on the device may end all that follows
        layer.run(shapes, 1 if tiny else 5, peers, like)


def step(like, tiny: bool) -> None:
    import peers
    import torch

    like = torch.empty(0, device=like.device)
    shapes = {"125m": peers.Shape(1, 48, 2, 96, 40, 2, 8)} if tiny else peers.GPU_SHAPES
    peers.run(shapes, peers.GPU_CASES, 1 if tiny else 5, like)


def statistics(like, tiny: bool) -> None:
    import layer
    import measure
    import torch

    shape = layer.Shape(64, 4, 16, 32) if tiny else layer.Shape(16384, 64, 768, 3072)
    with like.device:
        module = layer.ours(shape, dropless=False)
    module = module.to(like).train()
    x = torch.randn(shape.tokens, shape.dim).to(like).requires_grad_()
    plain = layer.step(module, x, torch.randn_like(x))
    cases = {"with": plain, "without": layer.without_statistics(plain)}
    seconds = measure.in_turn(cases, 2 if tiny else 30)
    rows = {
        name: {
            "ms": round(1e3 * measure.median(seconds[name]), 4),
            "synchronisations": synchronisations(case, like.is_cuda),
        }
        for name, case in cases.items()
    }
    measure.keep("gpu_statistics", rows, like.device.type)
    measure.keep_table(
        "gpu_statistics",
        f"A step of one MoE layer ({', '.join(map(str, shape[:4]))}: tokens, experts, width, "
        "hidden) with and without routing statistics. Synchronisations: how often the process "
        "waits for the device.",
        ["statistics", "ms", "synchronisations"],
        [[n, f"{row['ms']:g}", str(row["synchronisations"])] for n, row in rows.items()],
        like.device.type,
    )
    if rows["with"]["synchronisations"] != rows["without"]["synchronisations"]:
        raise SystemExit("routing statistics synchronise the device")


def synchronisations(work: Callable[[], None], cuda: bool) -> int:
    """How often `work` waits for the device, as PyTorch notices."""
    import torch

    if not cuda:
        return 0
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        work()
        torch.cuda.set_sync_debug_mode("default")
    # not PyTorch's notice that this mode does not detect all synchronizing operations
    return sum("called a synchronizing" in str(each.message) for each in found)


def tests(like, tiny: bool) -> None:
    import pytest

    import fairseq_moe_ext  # noqa: F401, for today's Python: fairseq is imported after it

    paths = sorted((ROOT / "tests").rglob("test_*.py"))
    files = [str(path) for path in paths if "mark.gpu" in path.read_text()]
    files = [path for path in files if path.endswith("test_expert_ffn.py")] if tiny else files
    flags = ["-q", "-m", "gpu", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    raise SystemExit(pytest.main([*flags, *files]))


class Outcome(NamedTuple):
    """What came of a part."""

    outcome: str  # done, stopped, failed
    seconds: float
    output: str = ""  # the end of it
    left_out: str = ""  # which peers, and why


def attempt(command: Sequence[str], limit: float) -> Outcome:
    """Run a command, and end it and its children after `limit` seconds."""
    start = time.monotonic()
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            outcome = "failed" if process.wait(limit) else "done"
        except subprocess.TimeoutExpired:
            outcome = "stopped"
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        output.seek(0)
        text = output.read()
    left_out = dict.fromkeys(line for line in text.splitlines() if ": left out: " in line)
    return Outcome(outcome, time.monotonic() - start, text[-4000:], "; ".join(left_out))


def run(parts: Sequence[str], minutes: float, device: str, tiny: bool) -> List[Outcome]:
    """Run the parts one after the other, and keep what came of them. A part may also take the time
    that those before it left."""
    import measure

    end = time.monotonic() + 60 * minutes
    command = [sys.executable, __file__, "--device", device, *(["--tiny"] if tiny else [])]
    outcomes = []
    rows: Dict[str, Dict] = {}
    for place, part in enumerate(parts):
        rest = end - time.monotonic()
        later = sum(PARTS[each] for each in parts[place + 1 :])
        limit = max(min(PARTS[part], rest), rest - later)
        outcome = Outcome("not begun", 0) if limit < 1 else attempt(
            [*command, "--inside", part], limit
        )  # fmt: skip
        print(f"{outcome.output}\n{part}: {outcome.outcome}, {outcome.seconds:.0f} s", flush=True)
        outcomes.append(outcome)
        row = {"seconds": round(outcome.seconds, 1), "left out": outcome.left_out}
        rows = measure.keep("gpu", {part: {"outcome": outcome.outcome, **row}}, device)
    measure.keep_table(
        "gpu",
        "What came of each part of benchmarks/gpu.py.",
        ["part", "outcome", "seconds", "left out"],
        [
            [part, row["outcome"], f"{row['seconds']:g}"]
            + [row.get("left out", "").replace("|", "/") or "-"]  # an older file's rows lack it
            for part, row in rows.items()
        ],
        device,
    )
    return outcomes


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.split("\n\n")[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--minutes", type=float, default=8, help="most of all parts together")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="sizes that try the script alone")
    parser.add_argument("--inside", choices=PARTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not 0 < args.minutes < math.inf:
        parser.error(f"--minutes {args.minutes:g}: use a number above 0")
    if args.device == "cpu" and not args.tiny:
        parser.error("--device cpu: add --tiny; the sizes are a GPU's")
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        parser.exit(1, "this machine has no CUDA device\n")
    if args.inside:
        dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
        like = torch.empty(0, dtype=dtype, device=args.device)
        {"layer": layer, "step": step, "statistics": statistics, "tests": tests}[args.inside](
            like, args.tiny
        )
        return
    with tempfile.TemporaryDirectory() as folder:
        if args.tiny:
            os.environ.setdefault("BENCHMARK_RESULTS", folder)
        outcomes = run(args.parts, args.minutes, args.device, args.tiny)
    raise SystemExit(any(outcome.outcome != "done" for outcome in outcomes))


if __name__ == "__main__":
    main()
