"""`fairseq-moe forecast`: the compute that sparsity should save, by published or fitted laws."""

import argparse
import math
import re
from argparse import Namespace
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path
from typing import Any, Dict, List, Tuple

from ..errors import UserError
from ..evaluation import study_result
from ..text_table import add_form_flags, formed
from ..wording import did_you_mean, flag
from .fit import COEFFICIENTS, Estimate, Point, fit
from .laws import HASH, LAWS, S_BASE, Model, number, outside, unknown

_UNITS = {"": 1, "k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9, "t": 1e12}
_MOST = 10**9  # experts
_MOST_AMOUNT = 1e14  # parameters, tokens
TABLE_SIZES = (1e6, 5e6, 15e6, 50e6, 125e6)
TABLE_EXPERTS = (8, 16, 32, 64, 128, 512)
_DEFAULTS = {
    **{"params": 125e6, "experts": 512, "top_k": 1, "tokens": 130e9, "granularity": 1.0},
    **{"moe_freq": 2, "group": "in_domain"},
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Compute from published scaling laws a sparse model's effective parameters (those of the "
        "dense model with the same loss) and the training FLOPs that it saves."
    )
    parser.add_argument(
        "--params", type=amount, help="parameters of the dense base (default: 125M)"
    )
    parser.add_argument(
        "--experts",
        type=int,
        help="experts in each sparse layer, as wide as the base's network (default: 512)",
    )
    parser.add_argument("--top-k", type=int, help="experts per token (default: 1)")
    parser.add_argument(
        "--tokens",
        type=amount,
        help="training tokens (default: 130B; with --fit those of the study)",
    )
    parser.add_argument(
        "--granularity",
        type=float,
        help="G: G times as many experts in a layer and per token, each 1/G as wide (default: 1)",
    )
    parser.add_argument("--moe-freq", type=int, help="every n-th layer is sparse (default: 2)")
    parser.add_argument("--law", choices=list(LAWS), help="one law (default: all)")
    parser.add_argument(
        "--table", action="store_true", help="print Clark et al.'s law for many sizes and stop"
    )
    parser.add_argument(
        "--fit",
        type=Path,
        metavar="RESULT.json",
        help="fit a law to the points of a study, and forecast with it; --params is then a sixth "
        "of the training FLOPs per token",
    )
    parser.add_argument(
        "--group",
        help="with --fit, the perplexity to fit: in_domain, out_of_domain, or a set "
        "(default: in_domain)",
    )
    add_form_flags(parser)


def amount(text: str) -> float:
    """A number with a letter behind it: 125M, 5.2B, 3e9. Raises argparse.ArgumentTypeError."""
    match = re.fullmatch(r"([\d.]+(?:e\+?\d+)?)([kKMBGT]?)", text)
    try:
        value = float(match[1]) * _UNITS[match[2].lower()] if match else math.nan
    except ValueError:
        value = math.nan
    if not 0 < value <= _MOST_AMOUNT:
        raise argparse.ArgumentTypeError(
            f"{text!r}: use a number above 0 and at most {number(_MOST_AMOUNT)}, "
            "such as 125M or 3e9"
        )
    return value


def run(args: Namespace) -> None:
    """Print what is asked for. Raises UserError for numbers that make no model."""
    given = [name for name in (*_DEFAULTS, "law", "fit") if getattr(args, name) is not None]
    if args.table:
        if given:
            raise UserError(f"--table has models of its own: drop it, or drop {flag(given[0])}")
        print(formed(args, table_as_dicts(), table()))
        return
    if args.fit is None and "group" in given:
        raise UserError(f"--group {args.group}: is a study's; add --fit RESULT.json, or drop it")
    if args.fit is not None and "tokens" in given:
        raise UserError(
            f"--tokens {number(args.tokens)}: with --fit the tokens are the study's; drop it"
        )
    for name in set(_DEFAULTS) - set(given):
        setattr(args, name, _DEFAULTS[name])
    points: List[Point] = []
    if args.fit is not None:
        points, args.tokens = study_points(args.fit, args.group)
    model = _model(args)
    forecasts = [_forecast(name, model) for name in LAWS if args.law in (None, name)]
    result: Dict[str, Any] = {"model": model._asdict(), "laws": forecasts}
    rows = [
        ["law", "effective", "of the base", "saving"],
        *(
            [f["name"], _parameters(f["effective"]), _factor(f["times_base"]), _factor(f["saving"])]
            for f in forecasts
        ),
    ]
    remarks = _remarks(forecasts)
    if args.fit is not None:
        try:
            of_study = _fitted(points, model)
        except UserError as error:
            raise UserError(f"--fit {args.fit}: {error}") from None
        result["fit"] = of_study
        low, high = map(_factor, of_study["interval"])
        rows.append(
            ["your study", _parameters(of_study["effective"]), "-", _factor(of_study["saving"])]
        )
        if math.isfinite(of_study["interval"][1]):
            remarks.append(f"your study: saving {low} to {high} (95 % interval)")
        remarks.append(f"all rows: {number(args.tokens)} tokens, the study's")
        unused = [flag(n) for n in ("top_k", "granularity", "moe_freq") if n in given]
        if unused:
            remarks.append(f"your study: has its own kind of model, without {', '.join(unused)}")
        remarks += [f"your study: {word}" for word in of_study["outside"]]
    print(formed(args, result, rows))
    if remarks and not args.json:
        print("\n" + "\n".join(remarks))


def _model(args: Namespace) -> Model:
    for name in ("experts", "top_k", "moe_freq"):
        value = getattr(args, name)
        if not 1 <= value <= _MOST:
            raise UserError(f"{flag(name)} {value}: use 1 or more, and at most {_MOST:,}")
    if args.top_k > args.experts:
        raise UserError(f"--top-k {args.top_k} is more than --experts {args.experts}; lower it")
    if not 0 < args.granularity < math.inf:
        raise UserError(f"--granularity {args.granularity}: use a number above 0")
    return Model(
        args.params, args.experts, args.tokens, args.top_k, args.granularity, 1 / args.moe_freq
    )


def _forecast(key: str, model: Model) -> Dict[str, Any]:
    law = LAWS[key]
    effective = law.effective(model)
    return {
        "law": key,
        "name": law.name,
        "source": law.source,
        "effective": effective,
        "times_base": effective / model.base,
        "saving": effective / model.active,
        "bound": None if math.isfinite(effective) else _parameters(effective),
        "outside": outside(law, model),
        "range_unknown": unknown(law),
    }


def _remarks(forecasts: List[Dict[str, Any]]) -> List[str]:
    lines = [
        f"{f['name']} ({f['source']}): outside its range by {'; '.join(f['outside'])}"
        for f in forecasts
        if f["outside"]
    ]
    unknown_of = [
        f"{f['name']} ({', '.join(f['range_unknown'])})" for f in forecasts if f["range_unknown"]
    ]
    if unknown_of:
        lines.append(f"not checked, because the range is not known: {'; '.join(unknown_of)}")
    return lines


def _parameters(value: float) -> str:
    if math.isfinite(value):
        return number(value)
    return "more than any" if value > 0 else "less than any"


def _factor(value: float) -> str:
    return f"{value:.2f}" if math.isfinite(value) else "-"


def _fitted(points: List[Point], model: Model) -> Dict[str, Any]:
    law = fit(points)
    saving = law.saving(model.base, model.experts)
    sizes = [point.size for point in points]
    experts = [point.experts for point in points]
    beyond = []
    if not min(sizes) <= model.base <= max(sizes):
        beyond.append(
            f"--params {number(model.base)} is outside its {number(min(sizes))} to "
            f"{number(max(sizes))}"
        )
    if not min(experts) <= model.experts <= max(experts):
        beyond.append(f"--experts {model.experts} is outside its {min(experts)} to {max(experts)}")
    if law.dense_slope.high >= 0:
        beyond.append(
            "its larger dense models are not better beyond doubt (95 % interval): do not rely on "
            "the saving"
        )
    named: Dict[str, Estimate] = dict(zip(COEFFICIENTS, law.intervals))
    return {
        "points": len(points),
        "coefficients": {name: estimate._asdict() for name, estimate in named.items()},
        "residual": law.residual,
        "effective": saving.value * model.base,
        "saving": saving.value,
        "interval": [saving.low, saving.high],
        "outside": beyond,
    }


def study_points(path: Path, group: str) -> Tuple[List[Point], float]:
    """The points of a study's result.json, and the tokens that each of its models was trained on.
    Raises UserError where it lacks what a law needs."""
    result = study_result.read(path, "--fit ")
    if "ladder" in result:
        raise UserError(
            f"--fit {path}: is a ladder's, with several numbers of tokens and tries of learning "
            "rates; give the result.json of a study of two families"
        )
    if result.get("reference"):
        raise UserError(
            f"--fit {path}: is of a study of arms, which differ in more than size and experts; "
            "give the result.json of a study with dense and moe families"
        )
    runs = result["runs"]
    with study_result.as_written(f"--fit {path}"):
        points = [_point(run, path, group) for run in runs]
        tokens = {run["tokens"] for run in runs}
        reason = study_result.unlike(runs, group)
    if reason == study_result.UNLIKE_TRAINING:
        raise UserError(f"--fit {path}: {reason}: give a study of one text")
    if reason:
        raise UserError(
            f"--fit {path}: {reason}: run the study's command again, without --only-result; if the "
            "text itself has changed, first delete evaluation.json of the older runs"
        )
    if len(tokens) > 1:
        raise UserError(
            f"--fit {path}: its models saw different numbers of tokens; a law needs the same "
            "number for all: give a study of such models"
        )
    return points, tokens.pop()


def _point(run: study_result.RunResult, path: Path, group: str) -> Point:
    measured = {**run["sets"], **run["mean"]}
    if group not in measured:
        there = ", ".join(measured) + did_you_mean(group, measured)
        raise UserError(f"--group {group}: not in {path}; it has {there}")
    if "experts" not in run:
        raise UserError(
            f"--fit {path}: does not record how many experts its models have; run the study's "
            "command again to rewrite it"
        )
    size, perplexity = run["flops"] / run["tokens"] / 6, measured[group]["perplexity"]
    if perplexity == math.inf:
        raise UserError(
            f"--fit {path}: {run['family']} {run['size']} with seed {run['seed']} diverged "
            "(infinite perplexity): lower its learning rate and train it again, or remove the size "
            "from the study's file"
        )
    if not (0 < size < math.inf and 1 < perplexity < math.inf):
        raise ValueError(f"perplexity {perplexity} of a model of size {size}")
    return Point(size, max(1, run["experts"]), math.log(perplexity))


def table() -> List[List[str]]:
    """Effective parameters by Clark et al., in millions, and what multiple of the base they are."""
    rows = [["base, method", *(f"{experts} experts" for experts in TABLE_EXPERTS)]]
    for entry in table_as_dicts():
        millions = [_digits(value / 1e6, 3) for value in entry["effective"]]
        base = entry["base"] / 1e6
        cells = (f"{value} ({_digits(float(value) / base, 2)})" for value in millions)
        rows.append([f"{number(entry['base'])}, {entry['method']}", *cells])
    return rows


def table_as_dicts() -> List[Dict[str, Any]]:
    return [
        {
            "base": base,
            "method": method,
            "experts": list(TABLE_EXPERTS),
            "effective": [law.effective(Model(base, e, 130e9)) for e in TABLE_EXPERTS],
        }
        for base in TABLE_SIZES
        for method, law in (("S-BASE", S_BASE), ("hash", HASH))
    ]


def _digits(value: float, count: int) -> str:
    """With this many significant digits, halves rounded up."""
    exact = Decimal(repr(value))
    rounded = exact.quantize(Decimal(1).scaleb(exact.adjusted() - count + 1), ROUND_HALF_UP)
    return f"{rounded:f}"
