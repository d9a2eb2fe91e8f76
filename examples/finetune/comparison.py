"""The rows compared: means, deviations over seeds, differences from the plain row, in words."""

import math
import statistics
from typing import Dict, List

from fairseq_moe_ext.accuracy import wilson_interval
from fairseq_moe_ext.study.fine_tuning import Result, Row
from fairseq_moe_ext.study.paired import holm, paired
from fairseq_moe_ext.study.result import computed_in
from fairseq_moe_ext.wording import signed


def summary(rows: Dict[str, List[float]]) -> Dict[str, Row]:
    """By row the mean, the standard deviation over seeds (None of one) and the difference from the
    row plain, `beyond` if it is significant: by Student's t, paired by seed, with Holm's correction
    for all rows."""
    by_row: Dict[str, Row] = {}
    plain = rows.get("plain")
    p: Dict[str, float] = {}
    for row, values in rows.items():
        several = len(values) > 1
        by_row[row] = {
            "accuracy": values,
            "mean": statistics.mean(values),
            "deviation": statistics.stdev(values) if several else None,
        }
        if plain and row != "plain":
            difference = statistics.mean(values) - statistics.mean(plain)
            by_row[row]["difference"] = difference
            if several and len(values) == len(plain):
                p[row] = paired([one - other for one, other in zip(values, plain)]).p
    for row in p:
        by_row[row]["beyond"] = row in holm(p)
    return by_row


def table(result: Result) -> str:
    """The result as Markdown: accuracies in percent, with their 95 % intervals over questions."""
    lines = [
        "| | chance | before | after | spread over seeds | against plain | dropped in training |",
        "|---|---|---|---|---|---|---|",
    ]
    for row, entry in result["rows"].items():
        first = result["before"]["dense" if row == "dense" else "moe"]
        deviation = "one seed" if entry["deviation"] is None else f"± {entry['deviation']:.1f}"
        difference = signed(entry["difference"]) if "difference" in entry else ""
        difference += " *" if entry.get("beyond") else ""
        lost = entry.get("dropped", entry.get("overflow"))
        dropped = "" if lost is None else f"{lost:.1f}"
        name = row if row == "dense" else f"MoE, {row}"
        lines.append(
            f"| {name} | {first['chance']:.1f} | {with_interval(first['accuracy'], result)} "
            f"| {with_interval(entry['mean'], result)} | {deviation} | {difference} | {dropped} |"
        )
    said = f"{findings(result)} {computed_in(result['runs'], 'row')}".rstrip()
    return "\n".join(lines) + f"\n\n{said}\n"


def with_interval(percent: float, result: Result) -> str:
    """An accuracy on the test questions, with its interval over them."""
    low, high = interval(percent, result["settings"]["questions"]["test"])
    return f"{percent:.1f} ({low:.1f} to {high:.1f})"


def interval(percent: float, asked: int) -> List[float]:
    return [100 * end for end in wilson_interval(percent / 100 * asked, asked)]


def findings(result: Result) -> str:
    """What the table says, in sentences."""
    rows, started = result["rows"], result["before"]
    dense, plain = rows.get("dense"), rows.get("plain")
    if not dense or not plain:
        return "The rows dense and plain are needed to compare sparse with dense."
    gap = dense["mean"] - plain["mean"]
    seeds = len(plain["accuracy"])
    error = f"{'' if dense.get('beyond') else 'not '}significantly"
    if "beyond" not in dense:
        error = "with one seed, so noise is not measured"
    said = [
        f"Fine-tuning takes the dense model from {started['dense']['accuracy']:.1f} to "
        f"{dense['mean']:.1f} % and the plain MoE from {started['moe']['accuracy']:.1f} to "
        f"{plain['mean']:.1f} %: the {'dense' if gap > 0 else 'sparse'} one is {abs(gap):.1f} "
        f"points ahead, {error}."
    ]
    asked = result["settings"]["questions"]["test"]
    chance = started["moe"]["chance"]
    near = [row for row, entry in rows.items() if interval(entry["mean"], asked)[0] <= chance]
    if near:
        said.append(f"Not above chance ({chance:.1f} %) by more than noise: {', '.join(near)}.")
    if gap <= 0:
        said.append("So the paper's gap between sparse and dense does not show here.")
    for word, sign in (("better", 1), ("worse", -1)) if seeds > 1 else ():
        named = [
            f"{row} ({signed(entry['difference'])})"
            for row, entry in rows.items()
            if row != "dense" and entry.get("beyond") and sign * entry["difference"] > 0
        ]
        said.append(f"Significantly {word} than plain (*): {', '.join(named) or 'none'}.")
    if seeds > 1:
        said.append("(By Student's t, paired by seed, with Holm's correction for all rows.)")
    said.append(
        f"Seeds: {seeds}; test questions: {asked}, so the 95 % interval of one accuracy is about "
        f"± {196 * math.sqrt(0.25 / asked):.1f} points."
    )
    return " ".join(said)
