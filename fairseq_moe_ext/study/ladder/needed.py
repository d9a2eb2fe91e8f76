"""What saving 4 or 8 times would need, in tokens and hours: computed, not measured."""

import math
from pathlib import Path
from typing import Callable, List, Tuple

from ...evaluation.study_result import as_written
from ...text_table import markdown
from . import result, tables
from .forecast import CURVE_TOKENS_PER_UPDATE, CURVES, CURVES_UNLIKE, Curves, training_flops, trend
from .saving import tokens_for
from .stages import Ladder

TARGETS = (4.0, 8.0)
CORES_16 = 8.0  # times two cores, if all scale
EXPERTS = (64, 256)


def say(ladder: Ladder, measured: Path, gflops: float, gpu_gflops: float) -> None:
    """Print the table and what it rests on; `measured` is a folder with a ladder's result.json."""
    print(markdown(table(ladder, measured, gflops, gpu_gflops)))
    print(
        "\nComputed, not measured. Hours to train the sparse model and the dense one with so many "
        f"times its FLOPs, at {gflops:g} GFLOP/s on two cores, {CORES_16:g} times that on 16, and "
        f"{gpu_gflops:g} GFLOP/s on a GPU. `by tokens`: DeepMind's curves, ln factor linear in ln "
        f"tokens; `by updates`: the same, with {ladder.tokens_per_update:,} tokens an update in "
        f"place of their {CURVE_TOKENS_PER_UPDATE:,.0f}; the truth should lie between. `unlike "
        "text`: their curves on EuroParl. `measured`: a ladder's factors in domain at the "
        "fewest and the most tokens, continued in the same way."
    )


def table(ladder: Ladder, measured: Path, gflops: float, gpu_gflops: float) -> tables.Rows:
    head = ["", "saving", "tokens", "2 cores, hours", "16 cores, hours", "a GPU, hours"]
    rows = [head]
    for name, flops, factor_of in _trends(ladder) + _measured(measured):
        for target in TARGETS:
            tokens = tokens_for(target, factor_of)
            row = [name, f"{target:g}"]
            if tokens is None:
                rows.append([*row, "never by this curve", "", "", ""])
                continue
            hours = tokens * flops * (1 + target) / 3.6e12
            speeds = (gflops, CORES_16 * gflops, gpu_gflops)
            cells = [_two_digits(hours / speed) for speed in speeds]
            rows.append([*row, f"{tokens:.1e}", *cells])
    return rows


def _two_digits(value: float) -> str:
    """0.16, 3.9, 31, 4,100."""
    digits = 1 - math.floor(math.log10(value))
    return f"{round(value, digits):,.{max(0, digits)}f}"


_Curve = Callable[[float], float]  # factor by tokens


def _trends(ladder: Ladder) -> List[Tuple[str, float, _Curve]]:
    """(name, training FLOPs a token, factor by tokens)."""
    sparse = [arm for arm in ladder.arms if arm.family == "moe"]
    largest = max(sparse, key=lambda arm: training_flops(arm, ladder))
    flops = training_flops(largest, ladder)
    by_updates = CURVE_TOKENS_PER_UPDATE / ladder.tokens_per_update
    found: List[Tuple[str, float, _Curve]] = []
    for label, curves in (("", CURVES), (", unlike text", CURVES_UNLIKE)):
        for experts in EXPERTS:
            for how, times in (("by tokens", 1.0), ("by updates", by_updates)):
                name = f"{largest.base}, {experts} experts{label}, {how}"
                found.append((name, flops, _trend(experts, curves, times)))
    return found


def _trend(experts: int, curves: Curves, times: float) -> _Curve:
    return lambda tokens: trend(experts, tokens * times, curves) or 0.0


def _measured(folder: Path) -> List[Tuple[str, float, _Curve]]:
    """Of each arm with two numbers, the line through the first and the last."""
    found = result.read(folder)
    if found is None:
        return []
    curves = []
    with as_written(folder / "result.json"):
        for name, percent in tables.growth(found):
            last = tables.in_domain(found, name)[-1]
            curve = _line(last["tokens"], last["factor"], percent)
            curves.append((f"{name}, measured", tables.flops_per_token(found, last), curve))
    return curves


def _line(tokens: float, factor: float, percent: float) -> _Curve:
    """Through a point, growing by so many per cent with each doubling."""
    slope = math.log2(1 + percent / 100)
    return lambda at: factor * (at / tokens) ** slope
