"""What saving 4 or 8 times would need, in tokens and hours: computed, not measured."""

import math
from typing import Callable, Dict, List, Tuple

from ... import files
from ...text_table import markdown
from ..result import GROUPS
from . import result, tables
from .forecast import CURVES, training_flops, trend
from .saving import tokens_for
from .stages import Ladder

TARGETS = (4.0, 8.0)
CORES_16 = 8.0  # times two cores, if all scale
CURVES_BASE = 25e6  # parameters of the model of the curves


def say(ladder: Ladder, gflops: float, gpu_gflops: float) -> None:
    """Print the table and what it rests on."""
    print(markdown(table(ladder, gflops, gpu_gflops)))
    print(
        f"\nComputed. Hours of the sparse model's training alone, at {gflops:g} GFLOP/s on two "
        f"cores, {CORES_16:g} times that on 16, and {gpu_gflops:g} GFLOP/s on a GPU. `trend`: "
        "DeepMind's curves continued in ln tokens; `measured`: this ladder's factors in domain at "
        "the fewest and the most tokens, continued the same way, far outside what was measured."
    )


def table(ladder: Ladder, gflops: float, gpu_gflops: float) -> tables.Rows:
    head = ["", "saving", "tokens", "2 cores, hours", "16 cores, hours", "a GPU, hours"]
    rows = [head]
    for name, flops, factor_of in _curves(ladder):
        for target in TARGETS:
            tokens = tokens_for(target, factor_of)
            row = [name, f"{target:g}"]
            if tokens is None:
                rows.append([*row, "never by this curve", "", "", ""])
                continue
            hours = tokens * flops / 3.6e12
            speeds = (gflops, CORES_16 * gflops, gpu_gflops)
            cells = [f"{hours / speed:,.3g}" for speed in speeds]
            rows.append([*row, f"{tokens:.2g}", *cells])
    return rows


def _curves(ladder: Ladder) -> List[Tuple[str, float, Callable[[float], float]]]:
    """(name, training FLOPs a token, factor by tokens)."""
    found: List[Tuple[str, float, Callable[[float], float]]] = []
    largest = max(
        (arm for arm in ladder.arms if arm.family == "moe"),
        key=lambda a: a.flags["decoder-embed-dim"],
    )
    flops = training_flops(largest, ladder)
    for experts in CURVES:
        if experts > 8:
            found.append((f"trend, {experts} experts, {largest.base}", flops, _trend(experts)))
    for name, curve in _measured(ladder).items():
        arm = next(arm for arm in ladder.arms if arm.name == name)
        found.append((f"measured, {name}", training_flops(arm, ladder), curve))
    return found


def _trend(experts: int) -> Callable[[float], float]:
    return lambda tokens: trend(experts, tokens) or 0.0


def _measured(ladder: Ladder) -> Dict[str, Callable[[float], float]]:
    """Of each arm with two numbers, the line through the first and the last."""
    path = ladder.out / "result.json"
    if not path.is_file():
        return {}
    found: result.LadderResult = files.read_json(path)
    curves = {}
    for name, percent in tables.growth(found):
        mine = [
            f
            for f in found["factors"]
            if f["arm"] == name and f["group"] == GROUPS[0] and not f["beyond"]
        ]
        curves[name] = _line(mine[-1]["tokens"], mine[-1]["factor"], percent)
    return curves


def _line(tokens: float, factor: float, percent: float) -> Callable[[float], float]:
    """Through a point, growing by so many per cent with each doubling."""
    slope = math.log2(1 + percent / 100)
    return lambda at: factor * (at / tokens) ** slope
