"""The flags of `fairseq-moe convert` for Hugging Face, and what they come to."""

import argparse
from pathlib import Path
from typing import Any, List, Optional, Tuple

from .. import files, tokenizer_files
from ..errors import UserError
from . import model_card
from .hf import Extras
from .hf_folder import SHARD

FOLDERS = ("hf", "xglm")  # values of --to and --from that are a folder


def add_arguments(group: Any) -> None:
    group.add_argument(
        "--data", type=Path, metavar="FOLDER",
        help="folder with dict.txt and the tokenizer's files (default: those beside the "
        "checkpoint, or of the data that it was trained on)",
    )  # fmt: skip
    group.add_argument("--no-tokenizer", action="store_true", help="write no tokenizer")
    group.add_argument(
        "--license",
        metavar="NAME",
        help="license for the model card, such as mit or cc-by-4.0 (default: unknown)",
    )
    group.add_argument(
        "--evaluation", type=Path, metavar="FILE",
        help="results for the model card: a file that `fairseq-moe evaluate --json` wrote",
    )  # fmt: skip
    group.add_argument(
        "--shard-size", type=float, metavar="GB", help="largest file of weights (default: 5)"
    )


def given(args: argparse.Namespace) -> List[Tuple[str, bool]]:
    """Each flag, and whether it is given."""
    return [
        ("--data", args.data is not None),
        ("--no-tokenizer", args.no_tokenizer),
        ("--license", args.license is not None),
        ("--evaluation", args.evaluation is not None),
        ("--shard-size", args.shard_size is not None),
    ]


def check(args: argparse.Namespace) -> None:
    """Raise UserError for invalid values."""
    if args.shard_size is not None and not 0 < args.shard_size < float("inf"):
        raise UserError(f"--shard-size {args.shard_size}: use a number of GB above 0")
    if args.no_tokenizer and args.data is not None:
        raise UserError(f"--data {args.data} with --no-tokenizer: remove one of them")
    if args.license is not None and (not args.license or not args.license.isprintable()):
        raise UserError(f"--license {args.license!r}: use a name, such as mit or cc-by-4.0")


def extras(args: argparse.Namespace) -> Any:
    """What goes into the folder beside the model. Raises UserError where there is no tokenizer, or
    for an --evaluation of another kind."""
    evaluation = None
    if args.evaluation is not None:
        where = f"--evaluation {args.evaluation}"
        evaluation = files.read_json(args.evaluation, where)
        model_card.check(evaluation, args.source, where)
    return Extras(
        None if args.no_tokenizer else _tokenizer(args),
        args.license or "unknown",
        evaluation,
        SHARD if args.shard_size is None else args.shard_size * 1e9,
    )


def _tokenizer(args: argparse.Namespace) -> Optional[Path]:
    """The folder with the tokenizer of SRC; None: there is none, and --to xglm needs none."""
    if args.data is not None:
        return tokenizer_files.folder_for(Path(args.source), args.data)
    folder = own(args.source)
    if folder is None and args.to != "xglm":
        raise UserError(
            f"{args.source}: its tokenizer ({', '.join(tokenizer_files.NAMES)}) is neither "
            "beside it nor with its training data: add --data FOLDER, or --no-tokenizer"
        )
    return folder


def own(source: str) -> Optional[Path]:
    """The folder with the tokenizer that travels with SRC, a checkpoint or a folder."""
    path = Path(source)
    if not path.is_dir():
        return tokenizer_files.of_checkpoint(path)
    return path if tokenizer_files.files_of(path) else None
