"""`fairseq-moe inspect`: one page on what the experts of a model do."""

import argparse
from pathlib import Path
from typing import Optional

from .. import outputs
from ..errors import UserError, require_positive
from ..evaluation.loading import add_model_flags
from ..evaluation.report import check_renewable
from .inspecting import DEFAULT, Settings, inspect


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Write one page that shows which expert takes which text, and what routing knows."
    )
    default = DEFAULT
    parser.add_argument("checkpoint", type=Path, help="checkpoint, as for fairseq-eval-lm's --path")
    parser.add_argument(
        "--data",
        type=Path,
        required=True,
        help="folder with the model's dict.txt and tokenizer, and test sets, if there are any",
    )
    parser.add_argument(
        "--text",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="your own text (UTF-8; also JSONL and the tables that `prepare` reads), shown token "
        "by token (default: the beginning of each set)",
    )
    parser.add_argument(
        "--twin",
        type=Path,
        metavar="CHECKPOINT",
        help="another model with the same dictionary, such as the dense twin, whose loss is also "
        "shown",
    )
    parser.add_argument(
        "--compare",
        type=Path,
        nargs="+",
        default=[],
        metavar="CHECKPOINT",
        help="earlier checkpoints of the same training: compare their choices",
    )
    parser.add_argument(
        "--log",
        type=Path,
        help="log of fairseq-train (default: metrics.jsonl beside the checkpoint, if it is there)",
    )
    parser.add_argument(
        "--subset", help="split to count (default: test, or valid if there is no test)"
    )
    parser.add_argument(
        "--tokens",
        type=int,
        default=default.tokens,
        help=f"tokens to count, an equal part of each set (default: {default.tokens:,})",
    )
    parser.add_argument(
        "--show",
        type=int,
        default=default.show,
        help=f"tokens of a text to show (default: {default.show:,})",
    )
    parser.add_argument(
        "--context", type=int, help="tokens per row (default: as trained, at most 1024)"
    )
    parser.add_argument(
        "--batch-size", type=int, default=default.batch_size, help="rows per batch (default: 16)"
    )
    parser.add_argument(
        "--capacity",
        default="1",
        metavar="F",
        help="share of a batch that an expert takes, or `training` for the rule of training "
        "(default: 1, nothing is dropped)",
    )
    add_model_flags(parser)
    parser.add_argument(
        "--page",
        type=Path,
        default=Path("inspect.html"),
        metavar="FILE",
        help="page to write (default: inspect.html; a page of this command is replaced)",
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="also write all numbers to this file"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the file of --json")


def run(args: argparse.Namespace) -> None:
    """Inspect and write. Raises UserError for invalid flags or files."""
    require_positive(args, "tokens", "show", "context", "batch_size")
    settings = Settings(
        args.subset,
        args.tokens,
        args.show,
        args.context,
        args.batch_size,
        _capacity(args.capacity),
        args.model_overrides,
        args.cpu,
    )
    read = [args.checkpoint, args.data, *args.text, *args.compare]
    read += [path for path in (args.twin, args.log) if path is not None]
    outputs.check([("--page", args.page), ("--json", args.json)], True, read)
    check_renewable(args.page)
    outputs.check([("--json", args.json)], args.overwrite)
    inspection = inspect(
        args.checkpoint,
        args.data,
        args.text,
        twin=args.twin,
        compare=args.compare,
        log=args.log,
        settings=settings,
    )
    if args.json is not None:
        inspection.write_json(args.json)
    inspection.write_page(args.page)
    print("\n".join(inspection.said))
    print(f"page: {args.page}")


def _capacity(text: str) -> Optional[float]:
    if text == "training":
        return None
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise UserError(
            f"--capacity {text}: use a share of a batch, above 0 up to 1, or `training`"
        )
    return share
