"""`fairseq-moe average`: the mean of several checkpoints' weights, experts in N files too."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
from copy import copy
from pathlib import Path
from typing import Any, Dict, Iterator, List, Sequence, Tuple

from torch import Tensor

from ..branch.files import check_name
from ..config import defaults
from ..errors import UserError, require_positive
from ..evaluation.loading import check_path
from ..moe.experts import TensorPerExpert
from ..router_flags import top_k
from . import command, readers, targets, writing
from .archive import Lazy, dtype_of, pieces_of
from .hf import ELSEWHERE
from .readers import outline
from .source import without

DESCRIPTION = """\
Average the weights of several checkpoints of one training: shared parameters and experts, even if
the experts are in separate files. (Stock's average_checkpoints.py then averages only the shared
parameters.) The optimizer state is left out. Memory stays small.
"""

# Settings of training in which averaged models may differ, besides hf.ELSEWHERE. A bias that
# balances is a tensor, and tensors are compared.
_TRAINING = {
    *("dropout", "attention_dropout", "activation_dropout", "moe_expert_dropout", "moe_balance"),
    *("tokens_per_sample", "max_target_positions"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = DESCRIPTION
    parser.add_argument(
        "inputs", metavar="CKPT", nargs="+", help="checkpoints, or with --last one folder of them"
    )
    parser.add_argument("--output", required=True, metavar="X.pt", help="the checkpoint to write")
    parser.add_argument(
        "--last",
        type=int,
        metavar="N",
        help="average the last N checkpoints in the folder, by update or, if there are none, by "
        "epoch",
    )
    parser.add_argument(
        "--expert-files",
        type=int,
        metavar="N",
        help="distribute the experts over N files in experts/ (default: all in the one file)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace X.pt if it exists")


def run(args: argparse.Namespace) -> None:
    """Raises UserError for what cannot be averaged, with nothing written."""
    paths = _paths(args)
    command.check_dest(args.output, "--output ")
    check_name(args.output, "--output ")
    require_positive(args, "expert_files")
    for path in paths:
        check_path(Path(path), "")
        if os.path.realpath(path) == os.path.realpath(args.output):
            raise UserError(f"--output {args.output}: is also an input; choose another name")
    outlines = _outlines(paths)
    for source in outlines:  # before all their bytes are read
        _check_settings(outlines[0], source)
        if args.expert_files is not None:
            targets.share(source.path, source.experts, "--expert-files", args.expert_files)
    with writing.alone(args.output, writing.shares(args)):
        if os.path.exists(args.output) and not args.overwrite:
            raise UserError(
                f"--output {args.output}: exists; choose another name, or add --overwrite"
            )
        source = mean_of([readers.open_checkpoint(path, True) for path in paths])
        jobs = targets.fairseq_jobs(source, args.output, args.expert_files)
        writing.write_checkpoint(jobs, args, paths[-1])
    print(f"{args.output}: the mean of {', '.join(paths)}")


def _paths(args: argparse.Namespace) -> List[str]:
    if args.last is None:
        paths = list(args.inputs)
        folders = [path for path in paths if os.path.isdir(path)]
        if folders:
            raise UserError(
                f"{folders[0]}: is a folder; add --last N to average its last N checkpoints"
            )
        if len({os.path.realpath(path) for path in paths}) < max(2, len(paths)):
            raise UserError("give two or more different checkpoints, or a folder with --last N")
        return paths
    if len(args.inputs) != 1:
        raise UserError(f"--last {args.last}: needs exactly one folder of checkpoints")
    if not os.path.isdir(args.inputs[0]):
        raise UserError(
            f"--last {args.last}: {args.inputs[0]}: no such folder; name that of the checkpoints"
        )
    if args.last < 2:
        raise UserError(f"--last {args.last}: use 2 or more")
    paths = [path for _, path in sorted(_numbered(args.inputs[0]))]
    if len(paths) < args.last:
        raise UserError(
            f"--last {args.last}: {args.inputs[0]} has {len(paths)} numbered checkpoints (by "
            "update or by epoch): use a smaller number"
        )
    return paths[-args.last :]


def _numbered(folder: str) -> Iterator[Tuple[int, str]]:
    """Updates and path of each checkpoint that was saved by update. If there are none, epochs and
    path of those saved by epoch."""
    by_update: List[Tuple[int, str]] = []
    by_epoch: List[Tuple[int, str]] = []
    for name in os.listdir(folder):
        match = re.fullmatch(r"checkpoint(?:_\d+_(\d+)|(\d+))\.pt", name)
        if match:
            chosen = by_update if match[1] else by_epoch
            chosen.append((int(match[1] or match[2]), os.path.join(folder, name)))
    yield from by_update or by_epoch


def mean_of(sources: Sequence[Any]) -> Any:
    """A Source of the mean weights. Everything else is from the last checkpoint, except what is
    true only of its weights: results, and --store-ema's second model. UserError if the models
    differ."""
    last = copy(sources[-1])
    for other in sources[:-1]:
        _check_settings(other, last)
        _check_tensors(other, last)
    made: Dict[int, Any] = {}  # tied tensors stay one
    last.model = {
        name: _mean(name, [source.model[name] for source in sources], made) for name in last.model
    }
    last.optimizer = None
    last.rest = without(last.rest, "val_loss", "best", "ema")
    return last


def _outlines(paths: Sequence[str]) -> List[Any]:
    """Of those checkpoints that can be opened; the reader says more of the others."""
    found = []
    for path in paths:
        with contextlib.suppress(UserError):
            found.append(outline(path))
    return found


def _check_settings(first: Any, second: Any) -> None:
    for name in sorted(defaults().keys() - _TRAINING - ELSEWHERE):
        a, b = (_spelled_alike(source.settings).get(name) for source in (first, second))
        if a != b:
            raise UserError(
                f"{first.path} and {second.path} are different models: {name} is {a} and {b}; "
                "average checkpoints of one training"
            )
    states = [(source.rest.get("task_state") or {}).get("tokenizer") for source in (first, second)]
    if None not in states and states[0] != states[1]:
        raise UserError(
            f"{first.path} and {second.path} have different tokenizers; average checkpoints of one "
            "training"
        )


def _spelled_alike(settings: Dict[str, Any]) -> Dict[str, Any]:
    """Settings, with experts per token as one number where two flags can give it."""
    return {**settings, "moe_top_k": top_k(settings), "moe_top1_expert": None}


def _check_tensors(first: Any, second: Any) -> None:
    shapes = [
        {n: f"{tuple(v.shape)} {str(dtype_of(v))[6:]}" for n, v in source.model.items()}
        for source in (first, second)
    ]
    for name in {**shapes[0], **shapes[1]}:
        if shapes[0].get(name) != shapes[1].get(name):
            raise UserError(
                f"{first.path} and {second.path} are different models: {name} is "
                f"{shapes[0].get(name, 'missing')} and {shapes[1].get(name, 'missing')}; average "
                "checkpoints of one training"
            )


def _mean(name: str, values: Sequence[Any], made: Dict[int, Any]) -> Any:
    """The mean, computed while it is written, summed in float64; for integers, the last value."""
    last = values[-1]
    if not dtype_of(last).is_floating_point or name == "decoder.version":
        return last
    if isinstance(last, TensorPerExpert):
        return TensorPerExpert(_mean(name, parts, made) for parts in zip(*values))
    key = last.data_ptr() if isinstance(last, Tensor) and last.numel() else id(last)
    if key not in made:
        made[key] = Lazy(tuple(last.shape), dtype_of(last), lambda: _pieces(values))
    return made[key]


def _pieces(values: Sequence[Any]) -> Iterator[Any]:
    for pieces in zip(*map(pieces_of, values)):
        total = sum(piece.double() for piece in pieces)
        yield (total / len(pieces)).to(pieces[-1].dtype)
