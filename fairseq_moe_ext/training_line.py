"""The line that training prints: progress, perplexity, speed and time left.

    14:44:26 | 100/200 ppl 311.3 lr 0.002 gate 1.277 17.2k tokens/s MFU 32 % left 0:00:12

MFU (model FLOPs utilisation, Chowdhery et al., arXiv 2204.02311, appendix B): the FLOPs that the
model's tokens need by cost.py, over those that the processors do at their peak: on a GPU by its
data sheet, if we have it, on a CPU as measured on a large product of matrices, by the library and
in the precision of the model's own.
"""

import logging
import re
import time
from typing import Any, Dict, Optional

import torch

from . import cost, shape
from .kernels.matmul import best_times, product
from .wording import duration, with_prefix

FIRST = 10  # updates after which the first line comes at the latest

# Peak of dense products in half precision, FLOP/s, from NVIDIA's data sheets, by the driver's name.
# Cards of one series have different peaks, and a part of one (MIG) has another name.
_PEAKS = {
    "H200": 989e12,
    "H200 NVL": 835.5e12,
    "GH200 480GB": 989e12,
    "H100 80GB HBM3": 989e12,
    "H100 NVL": 835.5e12,
    "H100 PCIe": 756.5e12,
    "A100-SXM4-40GB": 312e12,
    "A100-SXM4-80GB": 312e12,
    "A100-PCIE-40GB": 312e12,
    "A100 80GB PCIe": 312e12,
    "V100-SXM2-16GB": 125e12,
    "V100-SXM2-32GB": 125e12,
    "V100-PCIE-16GB": 112e12,
    "V100-PCIE-32GB": 112e12,
    "V100S-PCIE-32GB": 130e12,
    "L40S": 362e12,
}
_SIZE = 768  # of the product that is measured


class Speed:
    """How fast a model could train."""

    def __init__(
        self, settings: Any, vocabulary: int, processes: int, peak: Optional[float]
    ) -> None:
        """settings: of the model; peak: FLOP/s of each process's processor; None: not known."""
        self.flops = cost.training_flops_per_token(
            shape.shape_of(settings, vocabulary), settings.tokens_per_sample
        )
        self.processes = processes
        self.peak = peak

    def utilisation(self, tokens_per_second: float) -> Optional[float]:
        """Model FLOPs utilisation of all processes; None: the peak is not known."""
        if self.peak is None:
            return None
        return tokens_per_second * self.flops / (self.peak * self.processes)


def peak_of(device: torch.device, precision: torch.dtype) -> Optional[float]:
    """FLOP/s of a processor; None for a GPU that is not in the table.

    precision: of the model's products; a GPU's peak is that of half precision, whatever it is."""
    if device.type != "cpu":
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        return _PEAKS.get(re.sub(r"^(NVIDIA|Tesla) ", "", name))
    x = torch.ones(_SIZE, _SIZE, dtype=precision)
    (best,) = best_times([lambda: product(x, x)], 4, threads=torch.get_num_threads())
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
        parts.append(f"{with_prefix(rate)} tokens/s")
        utilisation = None if speed is None else speed.utilisation(rate)
        if utilisation is not None:
            parts.append(f"MFU {100 * utilisation:.0f} %")
    updates = float(stats.get("ups") or 0)
    if total and updates > 0:
        parts.append(f"left {duration((total - update) / updates)}")
    return " ".join(parts)


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
