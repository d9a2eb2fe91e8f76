"""The line that training prints: progress, perplexity, speed and time left.

    22:10:03 | 200/1000 ppl 138.5 lr 0.002 gate 1.073 2.76k tokens/s MFU 41 % left 0:04:51

MFU (model FLOPs utilisation, Chowdhery et al., arXiv 2204.02311, appendix B): the FLOPs that the
model's tokens need by cost.py, over those that the processors do at their peak: on a GPU by its
data sheet, on a CPU as measured on a product of matrices.
"""

import logging
import math
import time
from typing import Any, Dict, Optional

import torch

from . import cost, shape

FIRST = 10  # updates after which the first line comes at the latest

# Peak of dense products in half precision, FLOP/s: NVIDIA's data sheets.
_PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "V100": 125e12, "L40S": 362e12}
_SIZE = 768  # of the product that is measured


class Speed:
    """How fast a model could train."""

    def __init__(
        self, settings: Any, vocabulary: int, processes: int, peak: Optional[float] = None
    ) -> None:
        """settings: of the model."""
        self.flops = cost.training_flops_per_token(
            shape.shape_of(settings, vocabulary), settings.tokens_per_sample
        )
        self.processes = processes
        self.peak = peak  # FLOP/s of a process's processor; measured when first needed

    def utilisation(self, tokens_per_second: float) -> float:
        """Model FLOPs utilisation of all processes."""
        if self.peak is None:
            self.peak = peak()
        return tokens_per_second * self.flops / (self.peak * self.processes)


def peak() -> float:
    """FLOP/s of one process's processor."""
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        known = [rate for part, rate in _PEAKS.items() if part in name]
        if known:
            return known[0]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = torch.ones(_SIZE, _SIZE, device=device)
    best = math.inf
    for _ in range(4):
        started = time.perf_counter()
        float((x @ x)[0, 0])  # waits for a GPU
        best = min(best, time.perf_counter() - started)
    return 2 * _SIZE**3 / best


def line(stats: Dict[str, Any], update: int, total: Optional[int], speed: Optional[Speed]) -> str:
    """At most 89 characters, with the time before it 100.

    Args:
        stats: metrics of the log interval, by fairseq's names.
        total: updates of the whole run, if its flags set them.
    """
    parts = [f"{update}/{total}" if total else f"update {update}"]
    for name, key, form in (
        ("ppl", "ppl", "{:.4g}"),
        ("lr", "lr", "{:.3g}"),
        ("gate", "moe_gate_loss", "{:.4g}"),
    ):
        if stats.get(key) is not None:
            parts.append(f"{name} {form.format(float(stats[key]))}")
    rate = float(stats.get("wps") or 0)
    if rate > 0:
        parts.append(f"{_short(rate)} tokens/s")
        if speed is not None:
            parts.append(f"MFU {100 * speed.utilisation(rate):.0f} %")
    updates = float(stats.get("ups") or 0)
    if total and updates > 0:
        parts.append(f"left {_duration((total - update) / updates)}")
    return " ".join(parts)


def _short(value: float) -> str:
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{value / unit:.3g}{name}"
    return f"{value:.3g}"


def _duration(seconds: float) -> str:
    seconds = max(0, round(seconds))
    if seconds >= 100 * 3600:
        return f"{seconds / 86400:.0f} d"
    return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"


class BriefFormatter(logging.Formatter):
    """Like another formatter, but prints only the time of day and the message of records that are
    `brief`."""

    def __init__(self, other: logging.Formatter) -> None:
        super().__init__()
        self.other = other

    def format(self, record: logging.LogRecord) -> str:
        if not getattr(record, "brief", False):
            return self.other.format(record)
        return (
            f"{time.strftime('%H:%M:%S', time.localtime(record.created))} | {record.getMessage()}"
        )


def be_brief() -> None:
    """Let the handlers of all logs print brief records so, from now on."""
    for handler in logging.getLogger().handlers:
        if not isinstance(handler.formatter, BriefFormatter):
            handler.setFormatter(BriefFormatter(handler.formatter or logging.Formatter()))
