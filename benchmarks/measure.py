"""Measure things in turn in one run, and keep what was measured with the machine and the day."""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import json
import os
import platform
import re
import statistics
import time
from datetime import date
from pathlib import Path
from typing import Any, Callable, Collection, Dict, List, Mapping, Optional, Sequence, TypeVar

import torch

from fairseq_moe_ext import outputs
from fairseq_moe_ext.kernels.matmul import product
from fairseq_moe_ext.models import precision

# BENCHMARK_RESULTS: another folder, for a try
RESULTS = Path(os.environ.get("BENCHMARK_RESULTS", Path(__file__).resolve().parent / "results"))
_HARDWARE = ("cpu", "cores", "memory_gib", "system", "gpu")  # of `machine`: another is another's
_MACHINE = (*_HARDWARE, "variables")
_VARIABLES = ("LD_PRELOAD", "MALLOC_", "MKL_", "OMP_", "ONEDNN_", "THP_")  # they change speeds
_COPIED = 256 * 2**20  # bytes: far beyond any cache
T = TypeVar("T")


def count(text: str) -> int:
    """A whole number from 1 on, for a flag. Raises argparse.ArgumentTypeError for other text."""
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text!r}: use a whole number from 1 on")
    return int(text)


def device_of(parser: argparse.ArgumentParser, gpu: bool) -> str:
    """ "cuda" if --gpu is given, else "cpu". Ends the program in one line where there is no GPU."""
    if gpu and not torch.cuda.is_available():
        parser.exit(1, "--gpu: this machine has no CUDA device; leave it out\n")
    return "cuda" if gpu else "cpu"


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
        "variables": " ".join(
            f"{name}={value}"
            for name, value in sorted(os.environ.items())
            if name.startswith(_VARIABLES)
        ),
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
    settings = {"max_target_positions": None, "batch_size": None, **flags}
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


def attempted(name: str, work: Callable[[], T], optional: bool) -> Optional[T]:
    """What `work` returns. If it is optional and raises: None, and one printed line."""
    if not optional:
        return work()
    try:
        return work()
    except Exception as error:
        said = (str(error).strip().splitlines() or [""])[0]
        print(f"{name}: left out: {type(error).__name__}: {said}", flush=True)
        return None


def worthwhile(in_bfloat16: Mapping[str, bool], device: str = "cpu") -> List[str]:
    """The names of the cases to measure; for each that is left out, a printed line. On a CPU that
    gains nothing from bfloat16, `--bf16` trains in float32; without instructions for it a product
    takes 25 to 42 times as long (Zen 3)."""
    wanted = []
    for name, bf16 in in_bfloat16.items():
        if bf16 and device == "cpu" and not precision.bfloat16_pays():
            print(f"{name}: left out: this CPU gains nothing from bfloat16", flush=True)
        else:
            wanted.append(name)
    return wanted


def in_turn(
    cases: Dict[str, Callable[[], object]],
    rounds: int,
    warmup: int = 2,
    clock: Callable[[], float] = time.perf_counter,
    optional: Collection[str] = (),
) -> Dict[str, List[float]]:
    """Seconds of each case in each round. A round runs every case once, in an order that turns
    from round to round, so that what disturbs the machine disturbs all alike. time.process_time as
    the clock is disturbed least by other users of the machine; for work of one thread. Cases that
    are optional are left out from the first time that they raise."""

    def timed(work: Callable[[], object]) -> float:
        _wait()
        start = clock()
        work()
        _wait()
        return clock() - start

    seconds: Dict[str, List[float]] = {name: [] for name in cases}
    for turn in range(-warmup, rounds):
        names = list(seconds)
        for name in names if turn % 2 == 0 else reversed(names):
            took = attempted(name, functools.partial(timed, cases[name]), name in optional)
            if took is None:
                del seconds[name]
            elif turn >= 0:
                seconds[name].append(took)
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
    another that exists. On a GPU so large that starting the copy takes little of its time."""
    copied = _COPIED if device == "cpu" else 16 * _COPIED
    source = torch.empty(copied // 8, dtype=torch.int64, device=device).random_()
    target = torch.zeros_like(source)
    seconds = in_turn({"copy": lambda: target.copy_(source)}, 9)["copy"]
    return 2 * copied / median(seconds)


def matrix_rate(
    rounds: int = 9,
    dtype: torch.dtype = torch.float32,
    threads: int = 1,
    device: str = "cpu",
    onednn: bool = True,
) -> float:
    """FLOPs a second of a product of square matrices, the fastest of some, by PyTorch or by us:
    what no model's step can beat; not by oneDNN without `onednn`. On a CPU of 2048 rows; of one
    thread by the processor's time, of several by the clock. Of random numbers: a GPU multiplies
    equal ones faster than a model's."""
    rows = 2048 if device == "cpu" else 8192
    x, y = torch.randn(2, rows, rows, dtype=dtype, device=device)
    out = torch.empty_like(x)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    cases = {"torch": lambda: torch.mm(x, y, out=out), "ours": lambda: product(x, y)}
    clock = time.process_time if threads == 1 and device == "cpu" else time.perf_counter
    with contextlib.nullcontext() if onednn else torch.backends.mkldnn.flags(enabled=False):
        seconds = in_turn(cases, rounds, clock=clock)
    torch.set_num_threads(before)
    return 2 * rows**3 / min(map(min, seconds.values()))


def peak_memory(work: Callable[[], object], device: str = "cpu") -> int:
    """Most bytes of tensors that `work` has allocated at once on the device, on top of those before
    it."""
    if device == "cuda":
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


def free_memory(device: str = "cpu") -> int:
    """Bytes that programs may still take; where the system does not say, all that it has."""
    if device == "cuda":
        kept = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()  # by PyTorch, unused
        return torch.cuda.mem_get_info()[0] + kept
    info = Path("/proc/meminfo")
    available = re.search(r"MemAvailable: +(\d+) kB", info.read_text()) if info.exists() else None
    if available:
        return 1024 * int(available[1])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def own_folder(name: str, device: str = "cpu") -> Path:
    """Where the results NAME of this machine go: results/PROCESSOR, or, if those there are of other
    cores, memory or environment variables, a folder that is named after ours too, and numbered if
    that one is also another machine's."""
    here = machine()
    folder = RESULTS / processor(device)

    def is_ours(folder: Path, keys: Sequence[str]) -> bool:
        there = {"variables": here["variables"], **_content(folder, name).get("machine", here)}
        return all(there.get(key) == here.get(key) for key in keys)

    variables = re.sub(r"[^a-z0-9]+", "-", here["variables"].lower()).strip("-")
    for keys, ending in (
        (_HARDWARE, f"{here['cores']}-cores-{here['memory_gib']}-gib"),
        (("variables",), variables or "no-variables"),
    ):
        if not is_ours(folder, keys):
            folder = folder.with_name(f"{folder.name}-{ending}")
    numbered = (folder.with_name(f"{folder.name}-{number}") for number in itertools.count(2))
    return next(f for f in itertools.chain([folder], numbered) if is_ours(f, _MACHINE))


def _content(folder: Path, name: str) -> Dict[str, Any]:
    path = folder / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def keep(
    name: str, rows: Dict[str, Dict[str, Any]], device: str = "cpu"
) -> Dict[str, Dict[str, Any]]:
    """Write rows into NAME.json of this machine's folder, in place of those of the same names only.
    `measured` has the day of each, and what then was not as `machine` says: another version of
    PyTorch. Returns all rows that the file now has."""
    folder, here = own_folder(name, device), machine()
    folder.mkdir(parents=True, exist_ok=True)
    content = {"machine": here, "rows": {}, "measured": {}, **_content(folder, name)}
    others = {key: value for key, value in here.items() if content["machine"].get(key) != value}
    content["rows"].update(rows)
    content["measured"].update(dict.fromkeys(rows, {"date": date.today().isoformat(), **others}))
    outputs.write_json(folder / f"{name}.json", content)
    return content["rows"]


def keep_table(
    name: str, title: str, heads: Sequence[str], lines: Sequence[Sequence[str]], device: str = "cpu"
) -> None:
    """Write NAME.md beside NAME.json, a table in Markdown with the machine above it; print it. The
    rows of the file, its first column or its heads, are told when each was measured."""
    folder = own_folder(name, device)
    content = _content(folder, name)
    facts = {key: value for key, value in content["machine"].items() if value is not None}
    described = ", ".join(f"{key} {value or 'none'}" for key, value in facts.items())
    when = {row: _told(measured) for row, measured in content.get("measured", {}).items()}
    if lines[0][0] in content["rows"]:
        heads, lines = [*heads, "measured"], [[*line, when.get(line[0], "-")] for line in lines]
    else:
        lines = [*lines, ["measured", *(when.get(head, "-") for head in heads[1:])]]
    table = [heads, ["---"] * len(heads), *lines]
    text = f"{title}\n\nMachine: {folder.name}, {described}.\n\n"
    text += "".join("| " + " | ".join(row) + " |\n" for row in table)
    outputs.write_text(folder / f"{name}.md", text)
    print(text)


def _told(measured: Dict[str, Any]) -> str:
    """The day, and what was another."""
    others = {key: value for key, value in measured.items() if key != "date"}
    return ", ".join(
        [measured["date"], *(f"{key} {value or 'none'}" for key, value in others.items())]
    )
