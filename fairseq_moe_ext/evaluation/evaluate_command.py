"""`fairseq-moe evaluate`: perplexity of one model on many test sets, with one load of the model."""

import argparse
import sys
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

from .. import outputs, tokenizer_files
from ..errors import UserError, require_positive
from ..models.precision import in_bfloat16
from ..text_table import markdown, plain
from ..wording import small
from . import capacity, evaluated
from .loading import (
    add_model_flags,
    check_context,
    check_path,
    corpora_of,
    language_modeling_task,
    load_model,
    most_tokens,
    naming,
    on_device,
    parse_overrides,
)
from .perplexity import Evaluation, UnitLosses, evaluate
from .texts import find_sets, read_texts


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Perplexity of a model on every test set of the given folders."
    parser.add_argument("data", type=Path, nargs="+", help="data-bins, or folders of data-bins")
    parser.add_argument(
        "--path", type=Path, required=True, help="checkpoint, as for fairseq-eval-lm"
    )
    parser.add_argument("--subset", default="test", help="split to read (default: test)")
    parser.add_argument("--context", type=int, help="tokens per block (default: as trained)")
    parser.add_argument(
        "--stride",
        type=int,
        help="new tokens per pass of a sliding window (default: the context, separate blocks)",
    )
    parser.add_argument("--batch-size", type=int, default=16, help="blocks per pass (default: 16)")
    parser.add_argument(
        "--bootstrap",
        type=int,
        default=1000,
        help="bootstrap draws for the intervals (default: 1000)",
    )
    parser.add_argument(
        "--capacity",
        type=float,
        help="share of a batch that one expert accepts (default: 1.0, nothing is dropped)",
    )
    parser.add_argument(
        "--sweep-capacity",
        metavar="F,F,...",
        help="evaluate at each of these capacities; draw perplexity and speed",
    )
    parser.add_argument(
        "--figure",
        type=Path,
        metavar="FILE",
        help="HTML page for the charts of --sweep-capacity (default: capacity.html)",
    )
    add_model_flags(parser, "--bf16")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="also write all metrics to this file"
    )
    parser.add_argument(
        "--unit-losses",
        type=Path,
        metavar="FILE",
        help="write the loss and tokens of each unit (text between blank lines, joined to at least "
        "a context) to this file, for intervals of differences between models",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace the files of --json, --unit-losses and --figure",
    )
    parser.add_argument("--markdown", action="store_true", help="print a Markdown table")


class _Asked(NamedTuple):
    """What the flags come to."""

    capacities: List[float]
    figure: Optional[Path]  # None: no page
    overrides: Dict[str, Any]


def run(args: argparse.Namespace) -> None:
    """Evaluate and print. Raises UserError for invalid flags or files."""
    asked = _check_flags(args)
    sets = find_sets(args.data, args.subset)
    task = language_modeling_task(next(iter(sets.values())), args.context or 1)
    with naming(args.path):
        if args.context or args.stride:  # before the weights are read
            _context_and_stride(args, most_tokens(args.path, asked.overrides))
        # before the evaluation, during which a training may replace the file
        state = None if args.json is None else evaluated.state_of(str(args.path))
        tokenizer_files.check(args.path, *sets.values())
        model, saved = load_model(args.path, task, asked.overrides)
    if args.sweep_capacity is not None:
        capacity.check_model(model, f"--sweep-capacity {args.sweep_capacity}")
    elif args.capacity is not None and args.capacity < 1:
        capacity.check_model(model, f"--capacity {args.capacity:g}")
    model = on_device(in_bfloat16(model, args.cpu) if args.bf16 else model, args.cpu)
    context, stride = _context_and_stride(args, model.max_positions())
    dictionary = task.source_dictionary
    trained_on = corpora_of(saved.task, task, args.data)
    texts = read_texts(sets, args.subset, context, dictionary, trained_on)
    how = (dictionary.eos(), context, stride, args.batch_size, args.bootstrap)
    losses: Dict[str, UnitLosses] = {}
    results: List[capacity.AtCapacity] = []
    for fraction in asked.capacities:
        capacity.set_capacity(model, fraction)
        results.append({"capacity": fraction, **evaluate(model, texts, *how, losses)})
    if args.unit_losses is not None:
        outputs.write_json(args.unit_losses, losses)
    head = {
        "path": str(args.path),
        evaluated.KEY: state,
        "model_overrides": args.model_overrides,
        "subset": args.subset,
        "protocol": "blocks" if stride == context else "sliding",
        "context": context,
        "stride": stride,
        "batch_size": args.batch_size,
    }
    _give_out(args, asked.figure, head, results)


def _context_and_stride(args: argparse.Namespace, most: Optional[int]) -> Tuple[int, int]:
    """Raises UserError for what a model cannot take; most: tokens, None if that is not known."""
    check_context(args.context, most)
    context = args.context or most or sys.maxsize
    stride = args.stride or context
    if stride > context:
        raise UserError(
            f"--stride {stride} is above --context {context}: tokens would be skipped; lower it"
        )
    return context, stride


def _check_flags(args: argparse.Namespace) -> _Asked:
    if args.sweep_capacity is None:
        share = 1.0 if args.capacity is None else args.capacity
        capacities = capacity.parse("--capacity", [str(share)])
    elif args.capacity is not None:
        raise UserError("--capacity and --sweep-capacity: use only one of them")
    else:
        capacities = capacity.parse("--sweep-capacity", args.sweep_capacity.split(","))
    require_positive(args, "context", "stride", "batch_size", "bootstrap")
    if args.figure is not None and args.sweep_capacity is None:
        raise UserError(f"--figure {args.figure}: needs --sweep-capacity; add it")
    if args.unit_losses is not None and args.sweep_capacity is not None:
        raise UserError(
            f"--unit-losses {args.unit_losses}: needs one capacity; remove --sweep-capacity"
        )
    figure = (args.figure or Path("capacity.html")) if args.sweep_capacity else None
    files = [("--json", args.json), ("--unit-losses", args.unit_losses), ("--figure", figure)]
    outputs.check(files, args.overwrite, [args.path, *args.data])
    overrides = parse_overrides(args.model_overrides)
    check_path(args.path)
    return _Asked(capacities, figure, overrides)


def _give_out(
    args: argparse.Namespace,
    figure: Optional[Path],
    head: Dict[str, Any],
    results: Sequence[capacity.AtCapacity],
) -> None:
    """Write and print the result at each capacity."""
    sweep = bool(args.sweep_capacity)
    if args.json is not None:
        outputs.write_json(args.json, {**head, **({"sweep": results} if sweep else results[0])})
    form = markdown if args.markdown else plain
    print(form(capacity.table(results) if sweep else table(results[0])))
    if figure is not None:
        capacity.write_page(figure, args.path, results)
        print(f"charts: {figure}")


def table(evaluation: Evaluation) -> List[List[str]]:
    """A row per set and per mean, below a row of headings."""
    rows = [["set", "tokens", "perplexity", "95 % interval", "bits per byte", "dropped %"]]
    for name, result in evaluation["sets"].items():
        rows.append(
            [
                name + ("" if result["in_domain"] else " (held out)"),
                f"{result['tokens']:,}",
                f"{result['perplexity']:.2f}",
                _ends(result["interval"]),
                f"{result['bits_per_byte']:.3f}" if result["bits_per_byte"] else "",
                _percent(capacity.dropped([result])),
            ]
        )
    for label, mean in evaluation["mean"].items():
        label = "mean, " + label.replace("_", " ")
        rows.append([label, "", f"{mean['perplexity']:.2f}", _ends(mean["interval"]), "", ""])
    return rows


def _ends(interval: Optional[Sequence[float]]) -> str:
    return "one unit, none" if interval is None else "{:.2f} to {:.2f}".format(*interval)


def _percent(share: Optional[float]) -> str:
    return "" if share is None else small(100 * share)
