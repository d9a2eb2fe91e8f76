"""`fairseq-moe report FOLDER`: a study's result.json as one HTML page and SVG figures."""

import argparse
from pathlib import Path
from typing import Dict, List, Mapping, NamedTuple, Optional, Sequence, cast

from ..errors import UserError
from ..evaluation import figures, paper, report, specialisation, study_result
from ..evaluation.specialisation import LayerUse
from ..evaluation.speedup import Points, in_words
from ..evaluation.study_result import StudyResult
from ..wording import count, flag
from . import fine_tuning, tables
from . import result as results
from .ladder import page as ladder_page
from .ladder import result as ladder_result
from .plan import FAMILIES
from .tables import LABELS, TITLES

_OURS, _PAPER = 2, 3  # styles of factors, beside 0 and 1, the families'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Write FOLDER/report.html and FOLDER/figures/*.svg from a study's result."
    parser.add_argument("folder", type=Path, help="the study's `out`, with result.json")
    parser.add_argument(
        "--expert-use",
        type=Path,
        help=f"also show this JSON file, written by `{specialisation.COMMAND}`",
    )
    parser.add_argument("--png", action="store_true", help="also write the charts as PNG")
    parser.add_argument(
        "--fine-tuning", type=Path, help="also show this result.json of examples/finetune"
    )


def run(args: argparse.Namespace) -> None:
    """Write the page. Raises UserError for files that are missing."""
    result = study_result.read(args.folder / "result.json")
    if ladder_result.is_result(result):
        _of_ladder(args, cast(ladder_result.LadderResult, result))
        return
    if result.get("reference"):
        raise UserError(
            f"{args.folder}: is a study of arms, which has no speed-up factors; its tables are in "
            f"{args.folder}/comparison.md"
        )
    use = None if args.expert_use is None else specialisation.read(args.expert_use)
    tuned = None if args.fine_tuning is None else fine_tuning.read(args.fine_tuning)
    read = filter(None, (args.folder / "result.json", args.expert_use, args.fine_tuning))
    with study_result.as_written(*read):
        charts = _charts(result)
        page = html(result, charts, use, tuned)
    drawn = {name: figure.chart for name, figure in charts.items()}
    report.write_with_charts(args.folder, page, drawn, args.png)
    _announce(args.folder, len(drawn))


def _announce(folder: Path, charts: int) -> None:
    print(f"{folder / 'report.html'}, and {charts} charts in {folder / report.FIGURES}")


def _of_ladder(args: argparse.Namespace, result: ladder_result.LadderResult) -> None:
    for name in ("expert_use", "fine_tuning"):
        if getattr(args, name) is not None:
            raise UserError(
                f"{flag(name)} {getattr(args, name)}: is for a study of two "
                f"families; {args.folder} is a ladder"
            )
    with study_result.as_written(args.folder / "result.json"):
        number = ladder_page.write(args.folder, result, args.png)
    _announce(args.folder, number)


class Figure(NamedTuple):
    """A figure, and the part of the page that it belongs to."""

    part: str  # "speedup", "performance", "sets" or "set speedups"
    chart: figures.Chart


def _charts(result: StudyResult) -> Dict[str, Figure]:
    """name of the file -> chart: the paper's figures 1 and 2 in our numbers, then the paper's."""
    charts = {}
    for group in results.groups(result["runs"]):
        single = group in result["runs"][0]["sets"]
        title = results.label(result["runs"], group, TITLES.get(group, group))
        charts[f"performance-{group}"] = Figure(
            "sets" if single else "performance",
            _against_compute(
                title,
                {f: results.points(result["runs"], f, group) for f in FAMILIES},
                accuracy=not single and group not in results.GROUPS,
                ends={f: results.intervals(result["runs"], f, group) for f in FAMILIES},
            ),
        )
        curve = [(p["dense_flops"], p["factor"]) for p in result["factors"][group]["curve"]]
        charts[f"speedup-{group}"] = Figure(
            "set speedups" if single else "speedup", _speedup(title, curve, "this study", _OURS)
        )
    costs = {"dense": paper.DENSE_ZFLOPS, "moe": paper.MOE_ZFLOPS}
    for group, read_off in {**paper.FIGURE_2, "0-shot": paper.ZERO_SHOT}.items():
        points = {f: [(1e21 * x, y) for x, y in zip(costs[f], read_off[f])] for f in FAMILIES}
        title = TITLES[group] + (" (paper)" if group in paper.FIGURE_2 else ", six tasks (paper)")
        charts[f"paper-performance-{group}"] = Figure(
            "performance", _against_compute(title, points, accuracy=group not in results.GROUPS)
        )
        curve = [(1e21 * x, y) for x, y in paper.FIGURE_1[group]]
        charts[f"paper-speedup-{group}"] = Figure(
            "speedup", _speedup(title, curve, "paper", _PAPER)
        )
    return charts


def _against_compute(
    title: str,
    points: Mapping[str, Points],
    accuracy: bool,
    ends: Optional[Dict[str, List[results.Interval]]] = None,
) -> figures.Chart:
    """`ends`: of the error bars at the points of a family."""
    series = [
        figures.Series(LABELS[f], points[f], style, ends[f] if ends else ())
        for style, f in enumerate(FAMILIES)
    ]
    label = "accuracy, %" if accuracy else "perplexity"
    return figures.line_chart(
        title, series, "training FLOPs", label, log_x=True, log_y=not accuracy
    )


def _speedup(title: str, curve: Points, label: str, style: int) -> figures.Chart:
    return figures.line_chart(
        title,
        [figures.Series(label, curve, style)],
        "training FLOPs of the dense model",
        "dense : MoE compute",
        log_x=True,
    )


def html(
    result: StudyResult,
    charts: Dict[str, Figure],
    use: Optional[Sequence[LayerUse]],
    tuned: Optional[fine_tuning.Result],
) -> str:
    """report.html as a string."""
    runs = result["runs"]
    of_part: Dict[str, List[figures.Chart]] = {}
    for figure in charts.values():
        of_part.setdefault(figure.part, []).append(figure.chart)
    factors = results.table(result)
    drawn = {
        "factors": report.table(factors[0], factors[1:]),
        "models": report.table(*tables.models(runs)),
        "paper_models": report.table(*tables.paper_models()),
        "sets": report.table(*tables.perplexities(runs)),
        "priming": report.table(*tables.priming(runs)) if _primed(runs) else None,
        "bias": report.table(*tables.bias(runs)),
        "paper_stereoset": report.table(*tables.paper_stereoset()),
        "tuned": None if tuned is None else report.table(*tables.tuned(tuned)),
        "paper_tuned": report.table(*tables.paper_tuned()),
        "contents": report.table(
            *tables.contents(result, use is not None, tuned is not None), css="words"
        ),
    }
    return report.render(
        "study.html",
        title=result["title"],
        summary=summary_of(result),
        remarks=results.remarks(result),
        few_units=results.few_units(runs),
        precision=results.computed_in(runs),
        tuned_in=results.computed_in((tuned or {}).get("runs", []), "row"),
        warnings=results.warnings(result),
        commands=result["commands"],
        tables=drawn,
        charts=of_part,
        legend=figures.legend([LABELS[f] for f in FAMILIES], [0, 1]),
        use=None if use is None else _use(use),
    )


def _primed(runs: results.Runs) -> bool:
    return bool(runs[0]["priming"]["tasks"])


def summary_of(result: StudyResult) -> str:
    words = []
    for group, of_paper in (("in_domain", "8 to 16"), ("out_of_domain", "2 to 4")):
        factors = result["factors"].get(group)
        where = group.replace("_", " ")
        if factors is None:
            words.append(f"nothing was measured {where}")
        elif not factors["by_seed"]:
            words.append(f"there is no factor {where}")
        else:
            seeds = factors["by_seed"].values()
            split = min(seeds) < 1 < max(seeds)
            words.append(
                f"{where} MoE needs {in_words(results.seeds_mean(factors))} dense for the same "
                f"perplexity ({'factor ' * (len(seeds) > 1)}"
                f"{results.over_seeds(factors)}{', but the seeds disagree' * split}; "
                f"paper: {of_paper})"
            )
    text = "; ".join(words)
    done = len(result["runs"])
    left = ""
    if done != result["planned"]:
        left = f" {done} of {count(result['planned'], 'run')} finished."
    return text[0].upper() + text[1:] + "." + left


class Use(NamedTuple):
    """Which expert takes which text."""

    said: List[str]
    charts: List[figures.Chart]
    caption: str


def _use(layers: Sequence[LayerUse]) -> Use:
    names = list(layers[0]["share"])
    highest = max(max(share) for layer in layers for share in layer["share"].values())
    charts = [
        figures.heatmap(
            specialisation.heading(layer),
            names,
            [layer["share"][name] for name in names],
            "expert",
            highest,
        )
        for layer in layers
    ]
    said = [
        specialisation.verdict(layers, "domain", "set"),
        specialisation.verdict(layers, "token", "token"),
    ]
    caption = "Each expert's share of a set's choices, in per cent."
    if "information" in layers[0]:
        return Use(said, charts, f"{caption} {specialisation.MEANING}")
    return Use(said[:1], charts, caption)
