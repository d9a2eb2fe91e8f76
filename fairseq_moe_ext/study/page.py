"""`fairseq-moe report FOLDER`: a study's result.json as one HTML page and SVG figures."""

import argparse
import json
import math
from pathlib import Path
from typing import Any, Dict, List, Sequence, Tuple

from ..errors import UserError
from ..evaluation import expert_use, figures, paper, report
from . import result as results
from .plan import FAMILIES

LABELS = {"dense": "Dense", "moe": "MoE"}
TITLES = {"in_domain": "In domain, mean", "out_of_domain": "Out of domain, mean"}
_OURS, _PAPER = 0, 1  # styles of factors


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Write FOLDER/report.html and FOLDER/figures/*.svg from a study's result."
    parser.add_argument("folder", type=Path, help="the study's `out`, with result.json")
    parser.add_argument(
        "--expert-use", type=Path, help="what evaluation.expert_use wrote as JSON, to show too"
    )


def run(args: argparse.Namespace) -> None:
    """Write the page. Raises UserError for files that are missing."""
    result = _read(args.folder / "result.json", "run `fairseq-moe study` first")
    use = None
    if args.expert_use is not None:
        use = _read(args.expert_use, "make it with evaluation.expert_use --json")
    charts = _charts(result)
    folder = args.folder / "figures"
    folder.mkdir(exist_ok=True)
    for name, svg in charts.items():
        report.write(folder / f"{name}.svg", figures.standalone(svg, report.STYLE))
    report.write(args.folder / "report.html", html(result, charts, use))
    print(f"{args.folder / 'report.html'}, and {len(charts)} figures in {folder}")


def _read(path: Path, remedy: str) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}): {remedy}") from None


def _charts(result: Dict[str, Any]) -> Dict[str, str]:
    """name -> SVG: the paper's figures 2 and 1 in our numbers, for each group and set."""
    charts = {}
    for group in results.groups(result["runs"]):
        series = [
            figures.Series(LABELS[family], results.points(result["runs"], family, group), style)
            for style, family in enumerate(FAMILIES)
        ]
        charts[f"perplexity-{group}"] = figures.line_chart(
            TITLES.get(group, group), series, "training FLOPs", "perplexity", log_x=True, log_y=True
        )
        curve = [(p["dense_flops"], p["factor"]) for p in result["factors"][group]["curve"]]
        charts[f"speedup-{group}"] = figures.line_chart(
            TITLES.get(group, group),
            [figures.Series("this study", curve, _OURS)],
            "training FLOPs of the dense model",
            "times less compute",
            log_x=True,
        )
    for group, curve in paper.FIGURE_1.items():
        charts[f"paper-speedup-{group}"] = figures.line_chart(
            TITLES[group] + " (paper)",
            [figures.Series("paper", [(1e21 * x, y) for x, y in curve], _PAPER)],
            "training FLOPs of the dense model",
            "times less compute",
            log_x=True,
        )
        of_paper = paper.FIGURE_2[group]
        costs = {"dense": paper.DENSE_ZFLOPS, "moe": paper.MOE_ZFLOPS}
        charts[f"paper-perplexity-{group}"] = figures.line_chart(
            TITLES[group] + " (paper)",
            [
                figures.Series(
                    LABELS[f], [(1e21 * x, y) for x, y in zip(costs[f], of_paper[f])], style
                )
                for style, f in enumerate(FAMILIES)
            ],
            "training FLOPs",
            "perplexity",
            log_x=True,
            log_y=True,
        )
    return charts


def html(result: Dict[str, Any], charts: Dict[str, str], use: Any) -> str:
    """report.html as a string."""
    legend = figures.legend([LABELS[f] for f in FAMILIES], [0, 1])
    of_kind = {
        kind: [svg for name, svg in charts.items() if name.startswith(kind)]
        for kind in ("perplexity", "paper-perplexity", "speedup", "paper-speedup")
    }
    runs = result["runs"]
    table = results.table(result)
    parts = [
        report.paragraph(_summary(result), "lead"),
        report.heading("Speed-up factors"),
        report.paragraph(
            "How many times more training compute the dense family needs for the same perplexity; "
            "linear in perplexity and in the logarithm of compute between neighbouring models, "
            "nothing extrapolated. Mean: geometric, over the observed points and over seeds."
        ),
        report.table([table[0][0], *table[0][1:]], table[1:]),
        report.grid(
            of_kind["speedup"] + of_kind["paper-speedup"],
            "Figure 1 of the paper in this study's numbers, over the compute of the dense model; "
            "the paper's own last (read off its figure).",
        ),
        report.heading("Perplexity against compute"),
        report.grid(
            of_kind["perplexity"] + of_kind["paper-perplexity"],
            "Figure 2 of the paper in this study's numbers: test perplexity, mean over seeds; both "
            "axes logarithmic. The paper's own last; its perplexities are of another text and "
            "tokenizer and compare with each other only.",
            legend,
        ),
        report.heading("Models"),
        report.table(*_models(runs)),
        report.heading("Perplexity of every set"),
        report.table(*_perplexities(runs)),
    ]
    if use is not None:
        parts += [report.heading("Which expert takes which text"), _use(use)]
    parts += [report.folded("The commands", report.code("\n\n".join(result["commands"])))]
    return report.page(result["title"], parts)


def _summary(result: Dict[str, Any]) -> str:
    words = []
    for group, of_paper in (("in_domain", "8 to 16"), ("out_of_domain", "2 to 4")):
        seeds = list(result["factors"].get(group, {}).get("by_seed", {}).values())
        where = group.replace("_", " ")
        if seeds:
            mean = math.exp(sum(map(math.log, seeds)) / len(seeds))
            words.append(
                f"{where} MoE needs {mean:.2f} times less compute than dense for the same "
                f"perplexity ({min(seeds):.2f} to {max(seeds):.2f} over {len(seeds)} seeds; paper: "
                f"{of_paper})"
            )
        else:
            remark = result["factors"].get(group, {}).get("remark", "not measured")
            words.append(f"{where} no factor: {remark}")
    text = "; ".join(words)
    done = len(result["runs"])
    left = "" if done == result["planned"] else f" {done} of {result['planned']} runs are finished."
    return text[0].upper() + text[1:] + "." + left


def _models(runs: Sequence[Dict[str, Any]]) -> Tuple[List[str], List[List[str]]]:
    rows = []
    for key in dict.fromkeys((run["family"], run["size"]) for run in runs):
        mine = [run for run in runs if (run["family"], run["size"]) == key]
        one = mine[0]
        rows.append(
            [
                f"{LABELS[key[0]]} {key[1]}",
                figures.short(one["parameters"]),
                figures.short(one["active"]),
                figures.short(one["tokens"]),
                f"{one['flops']:.3g}",
                f"{sum(run['seconds'] for run in mine) / len(mine) / 60:.1f}",
                str(len(mine)),
            ]
        )
    head = ["", "Parameters", "Active", "Tokens", "FLOPs", "Minutes", "Seeds"]
    return head, rows


def _perplexities(runs: Sequence[Dict[str, Any]]) -> Tuple[List[str], List[List[str]]]:
    """Mean over seeds, and half the range over them; dropped choices at the end."""
    keys = list(dict.fromkeys((run["family"], run["size"]) for run in runs))
    rows = []
    for group in results.groups(runs):
        row = [TITLES.get(group, group)]
        for key in keys:
            values = [
                results.performance(run, group)
                for run in runs
                if (run["family"], run["size"]) == key
            ]
            half = (max(values) - min(values)) / 2
            row.append(f"{sum(values) / len(values):.2f} ± {half:.2f}")
        rows.append(row)
    row = ["Choices dropped, %"]
    for key in keys:
        mine = [run for run in runs if (run["family"], run["size"]) == key]
        lost = [s["dropped"] for run in mine for s in run["sets"].values() if s["dropped"]]
        shares = [sum(choices) / len(choices) for choices in lost]
        row.append(f"{100 * sum(shares) / len(shares):.2f}" if shares else "")
    return ["", *(f"{LABELS[f]} {size}" for f, size in keys)], [*rows, row]


def _use(layers: Sequence[Dict[str, Any]]) -> str:
    names = list(layers[0]["share"])
    highest = max(max(share) for layer in layers for share in layer["share"].values())
    charts = []
    for layer in layers:
        shares = [layer["share"][name] for name in names]
        bits = expert_use.mutual_information(shares)
        title = f"Layer {layer['layer']}: {bits:.2f} bits"
        charts.append(figures.heatmap(title, names, shares, "expert", highest))
    return report.grid(
        charts,
        "Each expert's share of a set's choices, in per cent. Bits: what one choice of expert "
        "tells about the set that a token is from.",
    )
