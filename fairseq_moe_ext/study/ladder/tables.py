"""The tables of a ladder's result: rows of text, the first one the head."""

import math
from typing import Dict, List, Optional, Sequence, Tuple

from ... import data_bin
from ...evaluation.study_result import unlike
from ...text_table import markdown
from ...wording import signed
from ..arms import by_arm, difference, measured, percent, shared
from ..plan import FAMILIES
from ..result import GROUPS, computed_in, few_units, mean_flops, mean_performance, warning
from ..tables import TITLES
from .finished import LadderRun
from .forecast import Forecast
from .result import Factor, LadderResult
from .stages import LR

Rows = List[List[str]]
NOTE = (
    "Of a sparse model: how many times its training FLOPs a dense model needs for the same "
    "perplexity on as many tokens, between dense models on a line of ln FLOPs against ln "
    "perplexity. Nothing is extrapolated: > and < stand where the sparse model is better than "
    "every dense model, or worse. In brackets the 95 % interval: with two seeds or more over seeds "
    "(Student's t; none unless the dense models beside it have the same seeds); with one seed over "
    "units of test text (text between blank lines, joined to at least a context), drawn anew 1,000 "
    "times, the same ones for all models (or, where their losses were not written, from the "
    "intervals of the perplexities as if those were independent, which is too wide). An end of - "
    "is beyond the dense models. "
    "FLOPs are matrix products without the router; `router counted` has its products, too. `in "
    "seconds` is the same saving in the time of a training step on one machine, each model "
    "measured alone."
)


def note(result: LadderResult) -> str:
    """What the numbers are."""
    named = [{**run, "size": _among(result, run)} for run in result["runs"]]
    said = (NOTE, few_units(result["runs"]), computed_in(named))
    return " ".join(filter(None, said))


def _among(result: LadderResult, run: LadderRun) -> str:
    """An arm's name; of one beside which all compute in bfloat16, what they have in common."""
    tokens = _stage_tokens(result, run)
    return f"all on {millions(tokens)} tokens" if _precision(result, tokens) else run["size"]


def millions(tokens: float) -> str:
    return f"{tokens / 1e6:g}M"


def budget(result: LadderResult, tokens: int) -> str:
    """64M tokens; 64M tokens (bfloat16) if all its trainings computed in that."""
    return f"{millions(tokens)} tokens{_precision(result, tokens)}"


def _short(result: LadderResult, tokens: int) -> str:
    return f"{millions(tokens)}{_precision(result, tokens)}"


def _precision(result: LadderResult, tokens: int) -> str:
    runs = _trained_on(result, tokens)
    # older runs do not say; --bf16 computes in float32 on a CPU where that is as fast
    return " (bfloat16)" if {run.get("precision") for run in runs} == {"bfloat16"} else ""


def factor(found: Optional[Factor]) -> str:
    """2.13 (1.99 to 2.30)."""
    if found is None:
        return ""
    shown = f"{('', '> ', '< ')[found['beyond']]}{found['factor']:.2f}"
    interval = found["interval"]
    if interval is None or (found["beyond"] and not any(interval)):
        return shown
    low, high = ("-" if end is None else f"{end:.2f}" for end in interval)
    return f"{shown} ({low} to {high})"


def by_key(result: LadderResult) -> Dict[Tuple[str, int, str], Factor]:
    """(arm, tokens, group) -> factor."""
    return {(f["arm"], f["tokens"], f["group"]): f for f in result["factors"]}


def budgets(result: LadderResult) -> List[int]:
    return sorted({found["tokens"] for found in result["factors"]})


def flops_per_token(result: LadderResult, found: Factor) -> float:
    """Of the sparse arm's training."""
    runs = runs_of(result, found["arm"], found["tokens"])
    return mean_flops(runs) / runs[0]["tokens"]


def runs_of(result: LadderResult, arm: str, tokens: int) -> List[LadderRun]:
    """Of an arm on a number of tokens, without the search for its rate."""
    stages = {n for n, s in result["ladder"]["stages"].items() if s["tokens"] == tokens and n != LR}
    return [run for run in result["runs"] if run["size"] == arm and run["stage"] in stages]


def sparse(result: LadderResult) -> List[str]:
    """The sparse arms that have a factor: by base, then router, experts and granularity."""
    arms = result["ladder"]["arms"]
    named = {found["arm"] for found in result["factors"]}
    return sorted(
        [name for name in arms if name in named],
        key=lambda name: (
            arms[name]["base"],
            arms[name]["router"] == "hash",
            arms[name]["experts"],
            arms[name]["granularity"],
        ),
    )


def over_tokens(result: LadderResult, group: str) -> Rows:
    """A row an arm, a column a number of tokens."""
    found = by_key(result)
    head = ["", *(budget(result, tokens) for tokens in budgets(result))]
    rows = [
        [name, *(factor(found.get((name, tokens, group))) for tokens in budgets(result))]
        for name in sparse(result)
    ]
    return [head, *rows]


def costs(result: LadderResult) -> Rows:
    """In domain: the saving in FLOPs, with the router's counted, and in seconds."""
    head = ["", "seeds", "saving", "router counted", "in seconds", "interval over"]
    rows = []
    order = sparse(result)
    for found in sorted(result["factors"], key=lambda f: (f["tokens"], order.index(f["arm"]))):
        if found["group"] == GROUPS[0]:
            seconds = found["in_seconds"]
            bound = ("", "> ", "< ")[found["beyond"]]
            rows.append(
                [
                    f"{found['arm']}, {_short(result, found['tokens'])}",
                    str(found["seeds"]),
                    f"{bound}{found['factor']:.2f}",
                    f"{bound}{found['with_router']:.2f}",
                    "-" if seconds is None else f"{bound}{seconds:.2f}",
                    found["interval_over"],
                ]
            )
    return [head, *rows]


def over_sets(result: LadderResult, tokens: int) -> Rows:
    """A row a set, a column an arm."""
    found = by_key(result)
    of_tokens = [f for f in result["factors"] if f["tokens"] == tokens]
    names = [name for name in sparse(result) if any(f["arm"] == name for f in of_tokens)]
    groups = list(dict.fromkeys(f["group"] for f in of_tokens))
    rows = []
    for group in groups:
        cells = []
        for name in names:
            one = found.get((name, tokens, group))
            cells.append(factor(None if one is None else {**one, "interval": None}))
        rows.append([TITLES.get(group, group), *cells])
    return [["", *names], *rows]


def perplexities(result: LadderResult, group: str) -> Rows:
    """A row an arm, dense ones first: FLOPs a token, and perplexity by tokens, mean over seeds."""
    runs, tokens = _trained(result), _trained_tokens(result)
    head = ["", "MFLOPs a token", "parameters, M", *(budget(result, t) for t in tokens)]
    rows = []
    for name in result["ladder"]["arms"]:
        mine = [run for run in runs if run["size"] == name]
        if not mine:
            continue
        row = [name, f"{mine[0]['flops'] / mine[0]['tokens'] / 1e6:.1f}"]
        row.append(f"{mine[0]['parameters'] / 1e6:.2f}")
        for number in tokens:
            of_budget = [run for run in mine if _stage_tokens(result, run) == number]
            mean = f"{mean_performance(of_budget, group):.2f}" if of_budget else ""
            row.append("different text" if unlike(of_budget, group) else mean)
        rows.append(row)
    return [head, *rows]


def warnings(result: LadderResult) -> List[str]:
    """Dense models that are worse in domain than smaller ones, a line each number of tokens."""
    lines = []
    for tokens in budgets(result):
        line = warning(_trained_on(result, tokens), FAMILIES[0])
        lines += [f"On {millions(tokens)} tokens {line}."] if line else []
    return lines


def remarks(result: LadderResult) -> List[str]:
    """What was left out, and which savings are missing, a line each."""
    return result.get("remarks", [])  # older results lack it


def _trained(result: LadderResult) -> List[LadderRun]:
    """Without the runs that tried learning rates."""
    return [run for run in result["runs"] if run["stage"] != LR]


def _trained_on(result: LadderResult, tokens: int) -> List[LadderRun]:
    return [run for run in _trained(result) if _stage_tokens(result, run) == tokens]


def _trained_tokens(result: LadderResult) -> List[int]:
    return sorted({_stage_tokens(result, run) for run in _trained(result)})


def _stage_tokens(result: LadderResult, run: LadderRun) -> int:
    return int(result["ladder"]["stages"][run["stage"]]["tokens"])


def in_bfloat16(result: LadderResult) -> Rows:
    """Arms that compute in bfloat16 against the same arm in float32: how much higher perplexity is,
    paired by seed."""
    groups = measured(result["runs"])
    rows = [["", "seeds", *(TITLES[group] for group in groups)]]
    twins = {
        name: arm["float32_twin"]
        for name, arm in result["ladder"]["arms"].items()
        if arm.get("float32_twin")  # a result of before it has none
    }
    for tokens in _trained_tokens(result):
        if _precision(result, tokens):
            continue
        runs = by_arm(_trained_on(result, tokens))
        for name, twin in twins.items():
            mine, base = runs.get(name, {}), runs.get(twin, {})
            seeds = [len(shared(mine, base, group)) for group in groups]
            if any(seeds):
                cells = [
                    percent(difference(mine, base, group)) if number else ""
                    for group, number in zip(groups, seeds)
                ]
                rows.append([f"{name}, {millions(tokens)}", str(max(seeds)), *cells])
    return rows


def learning_rates(result: LadderResult) -> Rows:
    """A row a try: its perplexity, and for which arms it was taken."""
    rows = [["", "learning rate", "validation perplexity in domain", "taken for"]]
    for name, rate in result["rates"].items():
        for value, perplexity in rate["tried"] or [(rate["value"], math.nan)]:
            taken = ", ".join([name, *rate["also"]]) if value == rate["value"] else ""
            edge = " (at the edge of those tried)" if taken and rate["at_the_edge"] else ""
            shown = "none" if perplexity is None else f"{perplexity:.2f}"
            shown = "not tried" if shown == "nan" else shown
            rows.append([name, f"{value}{edge}", shown, taken])
    return rows


def text(result: LadderResult) -> Rows:
    """Tokens of each corpus by split, with the shares of documents; none of an older result."""
    counted = result.get("text") or {}
    split = counted.get("split", {})
    shares = (None, split.get("valid_fraction"), split.get("test_fraction"))
    head = [""]
    for name, share in zip(data_bin.SPLITS, shares):
        head.append(name if share is None else f"{name} ({share:.2%} of documents)")
    rows = []
    for name, corpus in counted.get("corpora", {}).items():
        tokens = [corpus.get(split, {}).get("tokens") for split in data_bin.SPLITS]
        held_out = " (held out)" if corpus.get("held_out") else ""
        rows.append([name + held_out, *("" if n is None else f"{n:,}" for n in tokens)])
    if rows:
        trained = sum(c.get("train", {}).get("tokens", 0) for c in counted["corpora"].values())
        rows.append(["together", f"{trained:,}", "", ""])
    return [head, *rows]


def against_forecast(result: LadderResult, forecasts: Sequence[Forecast]) -> Rows:
    """Measured in domain, beside what was forecast before."""
    found = by_key(result)
    laws = list(forecasts[0]["laws"]) if forecasts else []
    head = ["", "measured", "trend by tokens", "trend by updates", *laws]
    rows = []
    for one in forecasts:
        measured = found.get((one["arm"], one["tokens"], GROUPS[0]))
        if measured is None:
            continue
        numbers = [one["trend_tokens"], one["trend_updates"], *one["laws"].values()]
        cells = ["-" if value is None else f"{value:.2f}" for value in numbers]
        rows.append([f"{one['arm']}, {_short(result, one['tokens'])}", factor(measured), *cells])
    return [head, *rows]


def in_domain(result: LadderResult, arm: str) -> List[Factor]:
    """The factors of an arm in domain that are numbers, from the fewest tokens on."""
    mine = [f for f in result["factors"] if f["arm"] == arm and not f["beyond"]]
    return [f for f in mine if f["group"] == GROUPS[0]]


def growth(result: LadderResult) -> List[Tuple[str, float]]:
    """Of each sparse arm that has a number at its fewest and its most tokens: how many per cent the
    saving in domain grows each time the tokens double."""
    grown = []
    for name in sparse(result):
        mine = in_domain(result, name)
        if len(mine) > 1:
            first, last = mine[0], mine[-1]
            doublings = math.log2(last["tokens"] / first["tokens"])
            grown.append((name, 100 * ((last["factor"] / first["factor"]) ** (1 / doublings) - 1)))
    return grown


def page(result: LadderResult) -> str:
    """tables.md: all tables, for a page of documentation."""
    forecasts = result["forecasts"]
    parts = [note(result), *warnings(result), *remarks(result)]
    for group in GROUPS:
        if any(f["group"] == group for f in result["factors"]):
            parts += [f"## Saving, {TITLES[group]}", markdown(over_tokens(result, group))]
    parts += ["## FLOPs and seconds", markdown(costs(result))]
    for tokens in budgets(result):
        parts += [f"## By set, {budget(result, tokens)}", markdown(over_sets(result, tokens))]
    if forecasts:
        parts += ["## Against the forecast", markdown(against_forecast(result, forecasts))]
    grown = ", ".join(f"{name} {signed(by)} %" for name, by in growth(result))
    if grown:
        mixed = len({_precision(result, tokens) for tokens in budgets(result)}) > 1
        across = ", from float32 to bfloat16" * mixed
        parts += [f"The saving in domain grows with each doubling of tokens{across} by: {grown}."]
    for group in GROUPS:
        if any(group in run["mean"] for run in result["runs"]):
            parts += [f"## Perplexity, {TITLES[group]}", markdown(perplexities(result, group))]
    precisions = in_bfloat16(result)
    if precisions[1:]:
        parts += ["## bfloat16 against float32, perplexity, %", markdown(precisions)]
    if result["rates"]:
        parts += ["## Learning rates", markdown(learning_rates(result))]
    corpora = text(result)
    if corpora[1:]:
        parts += ["## Text, tokens", markdown(corpora)]
    return "\n\n".join(parts) + "\n"
