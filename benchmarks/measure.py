"""Measure things in turn in one run, and keep what was measured with the machine that did it."""

from __future__ import annotations

import json
import os
import platform
import re
import statistics
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, Sequence

import torch

from fairseq_moe_ext import outputs
from fairseq_moe_ext.kernels.matmul import product

# BENCHMARK_RESULTS: another folder, for a try
RESULTS = Path(os.environ.get("BENCHMARK_RESULTS", Path(__file__).resolve().parent / "results"))
_HARDWARE = ("cpu", "cores", "memory_gib", "system", "gpu")  # of `machine`: another is another's
_COPIED = 256 * 2**20  # bytes: far beyond any cache


def machine() -> Dict[str, Any]:
    """What the figures depend on."""
    huge_pages = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    described = {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "system": f"{platform.system()} {platform.machine()}",
        "huge_pages": huge_pages.read_text().strip() if huge_pages.exists() else None,
        "malloc": " ".join(f"{k}={v}" for k, v in os.environ.items() if k.startswith("MALLOC_")),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if torch.cuda.is_available():
        described["gpu"] = torch.cuda.get_device_name()
        described["cuda"] = torch.version.cuda
    return described


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()


def processor(device: str = "cpu") -> str:
    """A name for a folder: the GPU's, or the CPU's maker, family and model. Names of models that
    clouds show say less: AMD EPYC may be of any generation."""
    if device == "cuda":
        return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower())
    info = Path("/proc/cpuinfo")
    lines = info.read_text().split("\n\n")[0].splitlines() if info.exists() else []
    facts = dict((part.strip() for part in line.split(":", 1)) for line in lines if ":" in line)
    if "cpu family" not in facts:
        return re.sub(r"[^a-z0-9]+", "-", (_cpu_name() or platform.machine()).lower()).strip("-")
    maker = {"AuthenticAMD": "amd", "GenuineIntel": "intel"}.get(facts["vendor_id"], "x86")
    return f"{maker}-family{facts['cpu family']}-model{facts['model']}"


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def language_model(vocabulary: int, **flags: Any) -> Any:
    """A model built without a command line: size of the vocabulary, flags as in config.py."""
    from types import SimpleNamespace

    from fairseq.data import Dictionary

    from fairseq_moe_ext.config import MoETransformerLMConfig
    from fairseq_moe_ext.models.language_model import MoETransformerLanguageModel

    dictionary = Dictionary()
    for i in range(vocabulary - len(dictionary)):
        dictionary.add_symbol(f"w{i}")
    settings = {"max_target_positions": None, "max_tokens": None, "batch_size": None, **flags}
    cfg = MoETransformerLMConfig(ddp_backend="legacy_ddp", **settings)
    task = SimpleNamespace(source_dictionary=dictionary, target_dictionary=dictionary)
    return MoETransformerLanguageModel.build_model(cfg, task)


class Wrapped(torch.nn.Module):
    """A model whose forward pass is call(model, *inputs)."""

    def __init__(self, model: torch.nn.Module, call: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.model, self.call = model, call

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self.call(self.model, *inputs)


def in_turn(
    cases: Dict[str, Callable[[], object]],
    rounds: int,
    warmup: int = 2,
    clock: Callable[[], float] = time.perf_counter,
) -> Dict[str, List[float]]:
    """Seconds of each case in each round. A round runs every case once, in an order that turns
    from round to round, so that what disturbs the machine disturbs all alike. time.process_time as
    the clock is disturbed least by other users of the machine; for work of one thread."""
    seconds: Dict[str, List[float]] = {name: [] for name in cases}
    names = list(cases)
    for turn in range(-warmup, rounds):
        for name in names if turn % 2 == 0 else reversed(names):
            _wait()
            start = clock()
            cases[name]()
            _wait()
            if turn >= 0:
                seconds[name].append(clock() - start)
    return seconds


def clock() -> Callable[[], float]:
    """Of one thread the processor's time, which other users of the machine disturb less; of several
    the wall clock's."""
    return time.process_time if torch.get_num_threads() == 1 else time.perf_counter


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def ratio(seconds: Dict[str, List[float]], name: str, base: str) -> float:
    """How many times as long as `base` a case takes: the median over rounds."""
    return statistics.median(a / b for a, b in zip(seconds[name], seconds[base]))


def copy_bandwidth(device: str = "cpu") -> float:
    """Bytes a second, those read and those written together, of copying a large tensor into
    another that exists."""
    source = torch.ones(_COPIED, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    seconds = in_turn({"copy": lambda: target.copy_(source)}, 9)["copy"]
    return 2 * _COPIED / median(seconds)


def matrix_rate(
    rounds: int = 9, dtype: torch.dtype = torch.float32, threads: int = 1, device: str = "cpu"
) -> float:
    """FLOPs a second of a product of square matrices, the fastest of some, by PyTorch or by us:
    what no model's step can beat. On a CPU of 2048 rows; of one thread by the processor's time, of
    several by the clock."""
    rows = 2048 if device == "cpu" else 8192
    x, y = torch.ones(2, rows, rows, dtype=dtype, device=device)
    out = torch.empty_like(x)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    cases = {"torch": lambda: torch.mm(x, y, out=out), "ours": lambda: product(x, y)}
    clock = time.process_time if threads == 1 and device == "cpu" else time.perf_counter
    seconds = in_turn(cases, rounds, clock=clock)
    torch.set_num_threads(before)
    return 2 * rows**3 / min(map(min, seconds.values()))


def peak_memory(work: Callable[[], object]) -> int:
    """Most bytes of tensors that `work` has allocated at once, on top of those before it."""
    if torch.cuda.is_available():
        _wait()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        _wait()
        return torch.cuda.max_memory_allocated() - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        work()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def own_folder(name: str, device: str = "cpu") -> Path:
    """Where the results NAME of this machine go: results/PROCESSOR, or a folder of its own where a
    machine of the same processor but with other cores or memory has kept some there."""
    here = machine()
    first = RESULTS / processor(device)
    path = first / f"{name}.json"
    if path.exists():
        there = json.loads(path.read_text())["machine"]
        if any(there.get(key) != here.get(key) for key in _HARDWARE):
            return first.with_name(f"{first.name}-{here['cores']}-cores-{here['memory_gib']}-gib")
    return first


def keep(
    name: str, rows: Dict[str, Dict[str, Any]], device: str = "cpu"
) -> Dict[str, Dict[str, Any]]:
    """Write rows into NAME.json of this machine's folder, in place of those of the same names; rows
    that it made with other software go. Returns all rows that the file now has."""
    path = own_folder(name, device) / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    content = json.loads(path.read_text()) if path.exists() else {}
    if content.get("machine") != machine():
        content = {"machine": machine(), "rows": {}}
    content["rows"].update(rows)
    outputs.write_json(path, content)
    return content["rows"]


def keep_table(
    name: str, title: str, heads: Sequence[str], lines: Sequence[Sequence[str]], device: str = "cpu"
) -> None:
    """Write NAME.md beside NAME.json, a table in Markdown with the machine above it; print it."""
    described = ", ".join(f"{key} {value}" for key, value in machine().items() if value is not None)
    rows = [heads, ["---"] * len(heads), *lines]
    text = f"{title}\n\nMachine: {processor(device)}, {described}.\n\n"
    text += "".join("| " + " | ".join(row) + " |\n" for row in rows)
    outputs.write_text(own_folder(name, device) / f"{name}.md", text)
    print(text)
