"""A ladder's result as one page (report.html), tables for documentation (tables.md) and charts."""

from pathlib import Path
from typing import Dict, List, Optional, Sequence, Tuple

from ... import outputs
from ...evaluation import figures, paper, report
from ...evaluation.study_result import unlike
from ...forecast.laws import HASH, S_BASE, Clark, Model
from ...wording import count
from ..result import GROUPS, mean_flops, mean_performance
from ..tables import TITLES
from . import tables
from .result import Factor, LadderResult
from .tables import millions

_PAPER_SIZES = (125e6, 355e6, 1.3e9, 2.7e9, 6.7e9)
_PAPER_EXPERTS, _PAPER_TOP_K = 512, 2
SAVING_LEGEND = (
    "Clark et al.'s law at this study's models: hash, or else S-BASE",
    "S-BASE at the paper's models: 512 experts, two per token",
    "this study, the model that saves most",
    "the paper, figure 1",
)


def write(folder: Path, result: LadderResult, png: bool = False) -> int:
    """Write the page, tables.md and figures/*.svg; how many charts there are. Raises UserError for
    files that are another's."""
    check(folder)
    drawn = charts(result)
    report.write_with_charts(folder, html(result, drawn), drawn, png)
    outputs.write_text(folder / "tables.md", tables.page(result))
    return len(drawn)


def check(folder: Path) -> None:
    """Raise UserError before the work if `write` could not write to the folder, which is there."""
    outputs.check([("", folder / "tables.md")], overwrite=True)
    report.check_with_charts(folder)


def charts(result: LadderResult) -> Dict[str, figures.Chart]:
    """name of the file -> chart."""
    drawn = {"saving": saving_chart(result)}
    bases = _bases(result)
    for base in bases:
        drawn[f"experts-{base}"] = _over_experts(result, base)
        drawn[f"tokens-{base}"] = _over_tokens(result, base)
    for tokens in tables.budgets(result):
        drawn[f"perplexity-{millions(tokens)}"] = _perplexities(result, tokens, bases)
    return drawn


def _bases(result: LadderResult) -> List[str]:
    return sorted({result["ladder"]["arms"][name]["base"] for name in tables.sparse(result)})


def _in_domain(result: LadderResult) -> List[Factor]:
    """The factors in domain that are numbers."""
    return [f for f in result["factors"] if f["group"] == GROUPS[0] and not f["beyond"]]


def saving_chart(result: LadderResult) -> figures.Chart:
    """Of each number of tokens the arm that saves most, the paper's figure 1, and Clark et al.'s
    law at both sizes, over the training FLOPs of the dense model with the same perplexity. Where an
    arm is better than every dense model, the point is a lower bound: that arm may save more."""
    arms = result["ladder"]["arms"]
    ours, law = [], []
    best: Dict[int, Factor] = {}
    for found in result["factors"]:
        tokens = found["tokens"]
        if found["group"] == GROUPS[0] and found["beyond"] >= 0:
            if found["factor"] >= best.get(tokens, found)["factor"]:
                best[tokens] = found
    for found in best.values():
        cost = tables.flops_per_token(result, found)
        ours.append((cost * found["tokens"] * found["factor"], found["factor"]))
        arm = arms[found["arm"]]
        model = Model(cost / 6, arm["experts"], found["tokens"])
        law.append(_predicted(HASH if arm["router"] == "hash" else S_BASE, model))
    papers = [
        _predicted(S_BASE, Model(size, _PAPER_EXPERTS, paper.TOKENS, _PAPER_TOP_K))
        for size in _PAPER_SIZES
    ]
    figure_1 = [(1e21 * x, y) for x, y in paper.FIGURE_1[GROUPS[0]]]
    return figures.line_chart(
        "Saving, in domain",
        [
            figures.Series(name, points, style)
            for style, (name, points) in enumerate(
                zip(SAVING_LEGEND, (sorted(law), papers, sorted(ours), figure_1))
            )
        ],
        "training FLOPs of the dense model",
        "dense : MoE compute",
        log_x=True,
        log_y=True,
    )


def _predicted(law: Clark, model: Model) -> Tuple[float, float]:
    """Training FLOPs of the dense model with the same loss; the saving."""
    effective = law.effective(model)
    return 6 * effective * model.tokens, effective / model.active


def _plain(result: LadderResult, base: str) -> Dict[int, str]:
    """number of experts -> arm, of those of a base that differ in nothing else."""
    arms: Dict[int, str] = {}
    for name in tables.sparse(result):
        found = result["ladder"]["arms"][name]
        other = found["granularity"] > 1 or found["router"] != "topk" or found.get("float32_twin")
        if found["base"] == base and not other and not found.get("own_flags"):
            arms.setdefault(found["experts"], name)  # an older result lacks own_flags
    return arms


def _counts(result: LadderResult) -> List[int]:
    """The numbers of experts that have a line over tokens, the first four of them."""
    return sorted({experts for base in _bases(result) for experts in _plain(result, base)})[:4]


def _series(label: str, style: int, points: Sequence[Tuple[float, Factor]]) -> figures.Series:
    """Factors over something, with their intervals."""
    ordered = sorted(points, key=lambda point: point[0])
    ends: List[Optional[Tuple[float, float]]] = []
    for _, found in ordered:
        low, high = found["interval"] or (None, None)
        ends.append((low, high) if low is not None and high is not None else None)
    return figures.Series(label, [(x, f["factor"]) for x, f in ordered], style, ends)


def _over_experts(result: LadderResult, base: str) -> figures.Chart:
    """A line a number of tokens, the first three of them."""
    experts = {name: number for number, name in _plain(result, base).items()}
    series = [
        _series(
            millions(tokens),
            style,
            [
                (experts[f["arm"]], f)
                for f in _in_domain(result)
                if f["tokens"] == tokens and f["arm"] in experts
            ],
        )
        for style, tokens in enumerate(tables.budgets(result)[:3])
    ]
    return figures.line_chart(
        f"Saving over experts, {base}", series, "experts", "dense : MoE FLOPs", log_x=True
    )


def _over_tokens(result: LadderResult, base: str) -> figures.Chart:
    """A line a number of experts."""
    arms = _plain(result, base)
    series = [
        _series(
            arms[experts],
            style,
            [(f["tokens"], f) for f in _in_domain(result) if f["arm"] == arms[experts]],
        )
        for style, experts in enumerate(_counts(result))
        if experts in arms
    ]
    return figures.line_chart(
        f"Saving over tokens, {base}", series, "training tokens", "dense : MoE FLOPs", log_x=True
    )


def _perplexities(result: LadderResult, tokens: int, bases: Sequence[str]) -> figures.Chart:
    """The dense models, and the sparse ones of each base above its FLOPs."""
    arms = result["ladder"]["arms"]
    points: Dict[str, List[Tuple[float, float]]] = {name: [] for name in ("dense", *bases)}
    for name, arm in arms.items():
        mine = tables.runs_of(result, name, tokens)
        if mine and not unlike(mine, GROUPS[0]):
            line = "dense" if arm["family"] == "dense" else arm["base"]
            points[line].append((mean_flops(mine), mean_performance(mine, GROUPS[0])))
    series = [
        figures.Series(name, sorted(of_name), style)
        for style, (name, of_name) in enumerate(points.items())
    ]
    title = f"Perplexity in domain, {tables.budget(result, tokens)}"
    return figures.line_chart(title, series, "training FLOPs", "perplexity", log_x=True, log_y=True)


def summary(result: LadderResult) -> str:
    """The saving at the most tokens, of the arm that saves most."""
    done = f"{len(result['runs'])} of {count(result['planned'], 'run')} are done."
    numbers = [f for f in result["factors"] if f["group"] == GROUPS[0]]
    if not numbers:
        return f"{done} There is no factor yet."
    most = max(found["tokens"] for found in numbers)
    best = max(
        (found for found in numbers if found["tokens"] == most),
        key=lambda found: (found["beyond"] >= 0, found["factor"]),  # "less than" is no saving
    )
    head = f"{best['arm']} saves most"
    if best["beyond"] < 0 or best["factor"] < 1:
        head = f"no sparse model is seen to save, and {best['arm']} comes nearest"
    shown = f"{('', 'more than ', 'less than ')[best['beyond']]}{best['factor']:.2f}"
    low, high = best["interval"] or (None, None)
    ends = ""
    if low is not None and high is not None:
        ends = f" ({low:.2f} to {high:.2f}, 95 % interval over {best['interval_over']})"
    others = [f["arm"] for f in numbers if f["tokens"] == most and f["beyond"] > 0 and f != best]
    more = f" {', '.join(others)} may save more: better than all dense models." if others else ""
    return (
        f"{done} On {tables.budget(result, most)} {head} in domain: the dense model needs {shown} "
        f"times its training FLOPs{ends}.{more}"
    )


def html(result: LadderResult, drawn: Dict[str, figures.Chart]) -> str:
    """report.html as a string."""
    forecasts = result["forecasts"]

    def table(rows: tables.Rows) -> report.Table:
        return report.table(rows[0], rows[1:])

    present = [g for g in GROUPS if any(f["group"] == g for f in result["factors"])]
    return report.render(
        "ladder.html",
        title=result["ladder"]["title"],
        summary=summary(result),
        warnings=[*tables.warnings(result), *tables.remarks(result)],
        note=tables.note(result).replace("`", ""),
        savings=[(TITLES[g], table(tables.over_tokens(result, g))) for g in present],
        costs=table(tables.costs(result)),
        sets=[
            (tables.budget(result, tokens), table(tables.over_sets(result, tokens)))
            for tokens in tables.budgets(result)
        ],
        forecast=table(tables.against_forecast(result, forecasts)) if forecasts else None,
        perplexities=[
            (TITLES[g], table(tables.perplexities(result, g)))
            for g in GROUPS
            if any(g in run["mean"] for run in result["runs"])
        ],
        precisions=table(tables.in_bfloat16(result)),
        rates=table(tables.learning_rates(result)),
        text=table(tables.text(result)),
        saving=drawn["saving"],
        saving_legend=figures.legend(SAVING_LEGEND, range(4)),
        over_experts=[chart for name, chart in drawn.items() if name.startswith("experts-")],
        experts_legend=figures.legend(
            [tables.budget(result, t) for t in tables.budgets(result)[:3]], range(3)
        ),
        over_tokens=[chart for name, chart in drawn.items() if name.startswith("tokens-")],
        tokens_legend=figures.legend([f"{n} experts" for n in _counts(result)], range(4)),
        curves=[chart for name, chart in drawn.items() if name.startswith("perplexity-")],
        curves_legend=_curves_legend(result),
    )


def _curves_legend(result: LadderResult) -> List[figures.Legend]:
    labels = ["dense", *(f"sparse, {base}" for base in _bases(result))]
    return figures.legend(labels, range(len(labels)))
