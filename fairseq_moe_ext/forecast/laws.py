"""Published scaling laws of Mixture-of-Experts language models. Numbers in, numbers out.

Each law gives the effective parameters of a sparse model: those of the dense model that reaches the
same loss on the same number of tokens.
"""

from __future__ import annotations

import math
from typing import Callable, Dict, List, NamedTuple, Optional, Tuple


class Model(NamedTuple):
    """A sparse model made from a dense base by replacing feed-forward layers."""

    base: float  # parameters of the dense base, without embeddings
    experts: int  # in each sparse layer, as wide as the base's; 1: the dense base itself
    tokens: float  # to train on
    top_k: int = 1  # such experts per token
    granularity: float = 1.0  # G: G times as many experts and choices, each expert 1/G as wide
    layers: float = 0.5  # share of the layers that are sparse
    idle: Optional[float] = None  # parameters of experts that a token leaves out; None: by `layers`

    @property
    def expert_share(self) -> float:
        """Share of the base's parameters that an expert of a sparse layer replaces: the
        feed-forward layers are 8 of a layer's 12 D^2 parameters."""
        return self.layers * 2 / 3

    @property
    def active(self) -> float:
        """Parameters that a token uses."""
        return self.base * (1 + self.expert_share * (self.top_k - 1))

    @property
    def total(self) -> float:
        if self.idle is not None:
            return self.active + self.idle
        return self.base * (1 + self.expert_share * (self.experts - 1))


class Range(NamedTuple):
    """Where a law was fitted, in one quantity."""

    quantity: str  # an attribute of Model
    low: float
    high: float


class Law(NamedTuple):
    name: str
    source: str
    effective: Callable[[Model], float]  # parameters
    ranges: Tuple[Range, ...]


class Clark(NamedTuple):
    """log L = a log N + b log Ê + c log N log Ê + d, logarithms to base 10; Ê is the number of
    experts, saturated between `start` and `most` (Clark et al., arXiv 2202.01169)."""

    a: float
    b: float
    c: float
    d: float
    start: float
    most: float

    def slope(self, experts: float) -> float:
        """d log L / d log N."""
        return self.a + self.c * math.log10(experts)

    def log_effective(self, size: float, experts: float) -> float:
        """log10 of the size of the dense model with the same loss as this size with this many
        experts."""
        saturated = saturate(experts, self.start, self.most)
        gain = self.b * math.log10(saturated / self.start)
        return (self.slope(saturated) * math.log10(size) + gain) / self.slope(self.start)

    def effective(self, model: Model) -> float:
        return 10 ** self.log_effective(model.base, model.experts)


def saturate(experts: float, start: float, most: float) -> float:
    """Clark et al.'s Ê: `start` for one expert, at most `most`."""
    return 1 / (1 / (experts - 1 + 1 / (1 / start - 1 / most)) + 1 / most)


S_BASE = Clark(-0.082, -0.108, 0.009, 1.104, 1.847, 314.478)
RL = Clark(-0.083, -0.126, 0.012, 1.111, 1.880, 469.982)
HASH = Clark(-0.087, -0.136, 0.012, 1.157, 4.175, 477.741)


def krajewski(model: Model) -> float:
    """Krajewski et al.'s laws of sparse and dense models; N counts all parameters."""
    fine = 2.1 / model.granularity**0.58 + 18.1
    loss = fine / model.total**0.115 + 30.8 / model.tokens**0.147
    return _solve(lambda n: 16.3 / n**0.126 + 26.7 / model.tokens**0.127, loss)


def ludziejewski(model: Model) -> float:
    """Ludziejewski et al.'s joint law of dense and sparse models."""

    def loss(active: float, experts: int) -> float:
        e = saturate(experts, 2.0732, 290.4521)
        log_e = math.log(e)
        by_size = 35.91 * e**-0.2285 * active ** (-0.1889 + 0.0098 * log_e)
        return by_size + 35.98 * e**0.5529 * model.tokens ** (-0.1775 - 0.0259 * log_e)

    return _solve(lambda n: loss(n, 1), loss(model.active, model.experts))


def abnar(model: Model) -> float:
    """Abnar et al.'s law; N counts all parameters, sparsity the share of idle experts."""

    def loss(total: float, used: float) -> float:  # used: 1 - sparsity
        by_size = 16612.5 / total**0.5962 + 17.26 / (used**0.1603 * total**0.1595)
        return by_size + 0.4598 * used**0.1666

    return _solve(lambda n: loss(n, 1.0), loss(model.total, model.top_k / model.experts))


def _solve(loss: Callable[[float], float], target: float) -> float:
    """The n at which a falling loss(n) equals target, by bisection; infinity where the target is
    lower than all losses, NaN where it is higher than that of a single parameter."""
    low, high = 1.0, 1e18
    if loss(high) > target:
        return math.inf
    if loss(low) < target:
        return math.nan
    for _ in range(200):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if loss(middle) > target else (low, middle)
    return high


BY_TOKENS = 1e9  # below so many, the laws contradict each other

_TOKENS = Range("tokens", BY_TOKENS, math.inf)
_WHOLE_EXPERTS = Range("granularity", 1, 1)
_CLARK_RANGES = (
    _WHOLE_EXPERTS,
    Range("base", 15e6, 1.3e9),
    Range("experts", 1, 512),
    Range("tokens", 130e9, 130e9),
    Range("top_k", 1, 1),
    Range("layers", 0.5, 0.5),
)

# The ranges are those that we found stated; where a quantity is missing we know none.
LAWS: Dict[str, Law] = {
    "s-base": Law("Clark, S-BASE", "arXiv 2202.01169", S_BASE.effective, _CLARK_RANGES),
    "rl": Law("Clark, RL-R", "arXiv 2202.01169", RL.effective, _CLARK_RANGES),
    "hash": Law("Clark, hash", "arXiv 2202.01169", HASH.effective, _CLARK_RANGES),
    "krajewski": Law(
        "Krajewski",
        "arXiv 2402.07871",
        krajewski,
        (Range("experts", 64, 64), Range("top_k", 1, 1), _TOKENS),
    ),
    "ludziejewski": Law(
        "Ludziejewski",
        "arXiv 2502.05172",
        ludziejewski,
        (
            *(Range("active", 0, 2.7e9), Range("total", 0, 5e9), Range("top_k", 1, 1)),
            *(_WHOLE_EXPERTS, _TOKENS),
        ),
    ),
    "abnar": Law("Abnar", "arXiv 2501.12370", abnar, (_WHOLE_EXPERTS, _TOKENS)),
}


def outside(law: Law, model: Model) -> List[str]:
    """Describes which quantities of a model are outside the range in which a law was fitted."""
    remarks = []
    for quantity, low, high in law.ranges:
        value = getattr(model, quantity)
        if not low <= value <= high:
            remarks.append(f"{_WORDS[quantity]} {number(value)} ({_words(quantity, low, high)})")
    return remarks


def unknown(law: Law) -> List[str]:
    """Of a model's size and experts, those of which we do not know where the law was fitted."""
    stated = {one.quantity: one.low for one in law.ranges}
    sizes = [stated[name] for name in ("base", "active", "total") if name in stated]
    missing = [] if sizes else ["size"]
    if sizes and not any(sizes):
        missing.append("smallest size")
    return missing if "experts" in stated else [*missing, "experts"]


def _words(quantity: str, low: float, high: float) -> str:
    if quantity == "granularity":
        return "the law takes no account of it"
    if low == high:
        return f"fitted at {number(low)}"
    if high == math.inf:
        return f"the laws contradict each other below {number(low)}"
    return f"fitted up to {number(high)}" if low == 0 else f"{number(low)} to {number(high)}"


_WORDS = {
    "base": "base parameters",
    "experts": "experts",
    "tokens": "tokens",
    "top_k": "experts per token",
    "granularity": "granularity",
    "layers": "share of sparse layers",
    "total": "total parameters",
    "active": "active parameters",
}


def number(value: float) -> str:
    """With three digits: 977M, 1.3B, 0.5."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if value >= size * 0.9995:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"
