"""`fairseq-moe report FOLDER`: a study's result.json as one HTML page and SVG figures."""

import argparse
import shutil
import subprocess
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Sequence, Set

from .. import files, outputs
from ..errors import UserError
from ..evaluation import figures, paper, report, specialisation
from ..evaluation.speedup import Points, in_words
from ..wording import count
from . import result as results
from . import tables
from .plan import FAMILIES
from .tables import LABELS, TITLES

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
_OURS, _PAPER = 2, 3  # styles of factors, beside 0 and 1, the families'
_PRIMING = (
    "Accuracy in %, mean over seeds and draws, in brackets the 95 % interval over questions. "
    "Chance: a guess among the candidates; in brackets what the most frequent answer gets, where "
    "all questions have the same ones and it is more. Cut: questions longer than the context, "
    "whose beginning is left out. Not asked: without a right answer among the candidates, or "
    "beyond a limit."
)
_PIXELS = 420  # width of a figure as PNG


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Write FOLDER/report.html and FOLDER/figures/*.svg from a study's result."
    parser.add_argument("folder", type=Path, help="the study's `out`, with result.json")
    parser.add_argument(
        "--expert-use", type=Path, help="what evaluation.expert_use wrote as JSON, to show too"
    )
    parser.add_argument(
        "--png", action="store_true", help="figures as PNG, too (by a Chromium on PATH)"
    )
    parser.add_argument(
        "--fine-tuning", type=Path, help="result.json of examples/finetune, to show too"
    )


def run(args: argparse.Namespace) -> None:
    """Write the page. Raises UserError for files that are missing."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if args.png and browser is None:
        raise UserError(f"--png: none of {', '.join(BROWSERS)} is on PATH: install one")
    result = _read(
        args.folder / "result.json", {"runs", "factors"}, "run `fairseq-moe study` first"
    )
    if not result["runs"]:
        raise UserError(f"{args.folder / 'result.json'}: no run in it: run `fairseq-moe study`")
    use = None
    if args.expert_use is not None:
        use = _read(
            args.expert_use, {"layer", "share"}, "make it with evaluation.expert_use --json"
        )
    tuned = None
    if args.fine_tuning is not None:
        tuned = _read(args.fine_tuning, {"rows", "before"}, "make it with examples/finetune/run.py")
    try:
        charts = _charts(result)
        page = html(result, charts, use, tuned)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, ArithmeticError) as error:
        read = filter(None, (args.folder / "result.json", args.expert_use, args.fine_tuning))
        raise UserError(
            f"{', '.join(map(str, read))}: not as it was written ({type(error).__name__}: {error})"
            f": make it again"
        ) from error
    folder = args.folder / "figures"
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be made: {files.reason(error)}") from None
    report.check_renewable(args.folder / "report.html")
    drawn = [folder / f"{name}{suffix}" for name in charts for suffix in (".svg", ".png")]
    outputs.check([("", path) for path in drawn], overwrite=True)
    for name, chart in charts.items():
        report.write(folder / f"{name}.svg", figures.standalone(chart.svg, report.STYLE))
    report.write(args.folder / "report.html", page)
    if args.png:
        for name in charts:
            _photograph(browser, folder / f"{name}.svg")
    print(f"{args.folder / 'report.html'}, and {len(charts)} figures in {folder}")


def _photograph(browser: str, svg: Path) -> None:
    """An SVG figure as a PNG beside it, two dots a pixel."""
    height = round(_PIXELS * figures.HEIGHT / figures.WIDTH)
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += [f"--window-size={_PIXELS},{height}", "--force-device-scale-factor=2"]
    command += [f"--screenshot={svg.with_suffix('.png').resolve()}", svg.resolve().as_uri()]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0 or not svg.with_suffix(".png").is_file():
        words = done.stderr.strip().splitlines()[-1:]
        raise UserError(f"--png: {browser} could not draw {svg}: {' '.join(words)}")


def _read(path: Path, keys: Set[str], remedy: str) -> Any:
    """A JSON file: an object with the keys, or a list of such."""
    try:
        found = files.read_json(path)
    except UserError as error:
        raise UserError(f"{error}: {remedy}") from None
    parts = found if isinstance(found, list) else [found]
    if not parts or not all(isinstance(part, dict) and keys <= set(part) for part in parts):
        raise UserError(f"{path}: lacks {' and '.join(sorted(keys))}: {remedy}")
    return found


class Chart(NamedTuple):
    """A figure, and the part of the page that it belongs to."""

    part: str  # "speedup", "performance", "sets" or "set speedups"
    svg: str


def _charts(result: Dict[str, Any]) -> Dict[str, Chart]:
    """name of the file -> chart: the paper's figures 1 and 2 in our numbers, then the paper's."""
    charts = {}
    for group in results.groups(result["runs"]):
        single = group in result["runs"][0]["sets"]
        charts[f"performance-{group}"] = Chart(
            "sets" if single else "performance",
            _against_compute(
                TITLES.get(group, group),
                {f: results.points(result["runs"], f, group) for f in FAMILIES},
                accuracy=not single and group not in results.GROUPS,
            ),
        )
        curve = [(p["dense_flops"], p["factor"]) for p in result["factors"][group]["curve"]]
        charts[f"speedup-{group}"] = Chart(
            "set speedups" if single else "speedup",
            _speedup(
                TITLES.get(group, group),
                curve,
                "this study",
                _OURS,
            ),
        )
    costs = {"dense": paper.DENSE_ZFLOPS, "moe": paper.MOE_ZFLOPS}
    for group, read_off in {**paper.FIGURE_2, "0-shot": paper.ZERO_SHOT}.items():
        points = {f: [(1e21 * x, y) for x, y in zip(costs[f], read_off[f])] for f in FAMILIES}
        charts[f"paper-performance-{group}"] = Chart(
            "performance",
            _against_compute(
                TITLES[group] + " (paper)", points, accuracy=group not in results.GROUPS
            ),
        )
        curve = [(1e21 * x, y) for x, y in paper.FIGURE_1[group]]
        charts[f"paper-speedup-{group}"] = Chart(
            "speedup", _speedup(TITLES[group] + " (paper)", curve, "paper", _PAPER)
        )
    return charts


def _against_compute(title: str, points: Dict[str, Points], accuracy: bool) -> str:
    series = [figures.Series(LABELS[f], points[f], style) for style, f in enumerate(FAMILIES)]
    label = "accuracy, %" if accuracy else "perplexity"
    return figures.line_chart(
        title, series, "training FLOPs", label, log_x=True, log_y=not accuracy
    )


def _speedup(title: str, curve: Points, label: str, style: int) -> str:
    return figures.line_chart(
        title,
        [figures.Series(label, curve, style)],
        "training FLOPs of the dense model",
        "dense : MoE compute",
        log_x=True,
    )


def html(result: Dict[str, Any], charts: Dict[str, Chart], use: Any, tuned: Any) -> str:
    """report.html as a string."""
    legend = figures.legend([LABELS[f] for f in FAMILIES], [0, 1])
    of_part: Dict[str, List[str]] = {}
    for chart in charts.values():
        of_part.setdefault(chart.part, []).append(chart.svg)
    runs = result["runs"]
    table = results.table(result)
    parts = [
        report.paragraph(_summary(result), "lead"),
        report.heading("Speed-up factors"),
        report.paragraph(
            "The dense family's training compute divided by that which MoE needs for the same "
            "performance: above 1 MoE needs less, below 1 more. Linear in performance and in the "
            "logarithm of compute between neighbouring models, nothing extrapolated. Mean: "
            "geometric, over the observed points and over seeds. A model is its checkpoint with "
            "the best in-domain validation perplexity; its compute is that of the whole training. "
            "Accuracies count where their 95 % interval is above chance."
        ),
        report.table(table[0], table[1:]),
        *(report.paragraph(f"No factor for {line}.") for line in results.remarks(result)),
        report.grid(
            of_part["speedup"],
            "Figure 1 of the paper in this study's numbers, over the compute of the dense model; "
            "the paper's own last (read off its figure).",
        ),
        report.heading("Performance against compute"),
        report.grid(
            of_part["performance"],
            "Figure 2 of the paper in this study's numbers: test perplexity, mean over seeds, both "
            "axes logarithmic; and the mean accuracy of primed tasks where it was measured. The "
            "paper's own last; its perplexities are of another text and tokenizer and compare "
            "with each other only.",
            legend,
        ),
        report.heading("Models"),
        report.table(*tables.models(runs)),
        report.folded("The paper's models (its table 1)", report.table(*tables.paper_models())),
        report.heading("Every set"),
        report.table(*tables.perplexities(runs)),
        report.paragraph(
            "Mean over seeds ± half their range. Without ± it is of one seed: no interval.", "soft"
        ),
        report.grid(of_part["sets"], "Perplexity of each set.", legend),
        report.grid(of_part["set speedups"], "Speed-up factor on each set."),
    ]
    if runs[0]["priming"]["tasks"]:
        parts += [report.heading("Priming"), report.table(*tables.priming(runs))]
        parts += [report.paragraph(_PRIMING, "soft")]
    parts += [report.heading("Bias")]
    if tables.bias(runs)[1]:
        parts += [report.table(*tables.bias(runs))]
        parts += [report.paragraph("All domains, mean over seeds. A guess gives 50.", "soft")]
    else:
        parts += [report.paragraph("This study measured none.", "soft")]
    parts += [
        report.folded("StereoSet of the released models", report.table(*tables.paper_stereoset()))
    ]
    if use is not None:
        parts += [report.heading("Which expert takes which text"), _use(use)]
    parts += [report.heading("Fine-tuning")]
    if tuned is not None:
        parts += [report.table(*tables.tuned(tuned))]
        parts += [report.paragraph("In brackets: 95 % interval over questions.", "soft")]
    else:
        parts += [report.paragraph("None was given.", "soft")]
    parts += [report.folded("The paper's fine-tuning", report.table(*tables.paper_tuned()))]
    parts += [
        report.heading("What of the paper is here"),
        report.table(*tables.contents(result, use is not None, tuned is not None), css="words"),
        report.paragraph(
            "The paper's text was not at hand when this was made: its other figures and tables are "
            "named by what they show.",
            "soft",
        ),
    ]
    parts += [report.folded("The commands", report.code("\n\n".join(result["commands"])))]
    return report.page(result["title"], parts)


def _summary(result: Dict[str, Any]) -> str:
    words = []
    for group, of_paper in (("in_domain", "8 to 16"), ("out_of_domain", "2 to 4")):
        found = result["factors"].get(group)
        where = group.replace("_", " ")
        if found is None:
            words.append(f"{where} nothing was measured")
        elif not found["by_seed"]:
            words.append(f"{where} there is no factor")
        else:
            seeds = found["by_seed"].values()
            torn = min(seeds) < 1 < max(seeds)
            words.append(
                f"{where} MoE needs {in_words(results.seeds_mean(found))} dense for the same "
                f"perplexity (factor {results.over_seeds(found)}"
                f"{', which do not agree on which family needs less' * torn}; paper: {of_paper})"
            )
    text = "; ".join(words)
    done = len(result["runs"])
    left = ""
    if done != result["planned"]:
        left = f" {done} of {count(result['planned'], 'run')} finished."
    return text[0].upper() + text[1:] + "." + left


def _use(layers: Sequence[Dict[str, Any]]) -> str:
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
        specialisation.verdict(layers, "token", "type of token"),
    ]
    caption = "Each expert's share of a set's choices, in per cent."
    if "information" in layers[0]:
        caption += " " + specialisation.MEANING
    else:
        said = said[:1]
    return report.bullets(said) + report.grid(charts, caption)
