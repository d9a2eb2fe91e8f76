"""`fairseq-moe convert`: the flags, and the order of the steps."""

import argparse
import os
from pathlib import Path
from typing import Any, Dict, List

import torch

from ..branch.files import check_name
from ..branch.writing import branch_settings
from ..config_checks import refuse_both_of_layers
from ..errors import UserError, require_positive
from ..evaluation.loading import check_path
from ..router_flags import top_k
from ..wording import count
from . import hf, hf_flags, readers, targets, upcycle, writing
from .hf import files_there
from .source import without

DESCRIPTION = """\
Convert a checkpoint: into one file, into expert files, to half precision, to weights only,
from dense to sparse, and to or from other layouts.

SRC may be a checkpoint of this plugin, of stock fairseq, or of the moe branch (X.pt stands for
X-rank-R.pt and X-shared.pt); the command detects which. Memory use stays small at any size: files
are memory-mapped, and written tensor by tensor. DST appears when everything is done.
"""

DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "float16": torch.float16,
    "fp16": torch.float16,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = DESCRIPTION
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "source", metavar="SRC", help="the checkpoint to read; with --from, its folder"
    )
    parser.add_argument("dest", metavar="DST", help="the X.pt to write; with --to hf, a folder")
    parser.add_argument(
        "--from",
        dest="layout",
        choices=hf_flags.FOLDERS,
        help="set this if SRC is not a fairseq checkpoint",
    )
    parser.add_argument(
        "--to",
        choices=["branch", *hf_flags.FOLDERS],
        help="write another layout: a folder for Hugging Face transformers (hf; xglm: its class "
        "XGLM alone), or the files of fairseq's moe branch (default: this plugin's)",
    )
    parser.add_argument(
        "--expert-files",
        type=int,
        metavar="N",
        help="distribute the experts over N files in experts/",
    )
    parser.add_argument(
        "--rank-files",
        type=int,
        metavar="N",
        help="number of files of experts for --to branch (default: 1)",
    )
    parser.add_argument(
        "--weights-only",
        action="store_true",
        help="do not write the optimizer state, nor --store-ema's second model",
    )
    parser.add_argument(
        "--dtype", metavar="TYPE",
        help="precision of the weights: float32, float16, bfloat16 (fp32, fp16, bf16); the "
        "optimizer state keeps its precision",
    )  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="replace DST if it exists")
    hf_flags.add_arguments(parser.add_argument_group("Hugging Face (--to hf, --to xglm)"))
    up = parser.add_argument_group("dense to sparse (--upcycle)")
    up.add_argument(
        "--upcycle", action="store_true",
        help="copy the feed-forward networks into experts, and add a fresh gate. With two or more "
        "experts per token and no noise the logits equal the dense model's as long as nothing is "
        "dropped: DST has moe_dropless set, and fairseq-train needs --moe-dropless to continue it. "
        "With --moe-top1-expert they differ, because the gate's probability weights a token's only "
        "expert",
    )  # fmt: skip
    up.add_argument("--moe-freq", type=int, help="make every N-th layer sparse (default: 2)")
    up.add_argument(
        "--moe-layers",
        help="the sparse layers, counted from 0, such as 1,3,5; instead of --moe-freq",
    )
    up.add_argument(
        "--moe-first-dense", type=int, default=0, metavar="N",
        help="keep the first N layers of the model dense, whatever --moe-freq selects (default: 0)",
    )  # fmt: skip
    up.add_argument("--moe-expert-count", type=int, help="experts in a sparse layer")
    up.add_argument("--moe-top-k", type=int, help="experts per token (default: 2)")
    up.add_argument("--moe-top1-expert", action="store_true", help="the same as --moe-top-k 1")
    up.add_argument(
        "--noise", type=float, default=0.0, metavar="S",
        help="add Gaussian noise to the experts' matrices, S times their standard deviation "
        "(default: 0)",
    )  # fmt: skip
    up.add_argument(
        "--seed", type=int, default=1, help="seed of the gate and the noise (default: 1)"
    )


def run(args: argparse.Namespace) -> None:
    """Raises UserError for what cannot be converted, with nothing written."""
    _check(args)
    with writing.alone(args.dest, args.to is None and writing.shares(args)):
        _refuse_existing(args)  # another convert may have written it since
        _convert(args)


def _convert(args: argparse.Namespace) -> None:
    extras: Any = hf_flags.extras(args) if args.to in hf_flags.FOLDERS else None
    if args.layout is not None:
        source = hf.open_hf(args.source, args.layout == "xglm")
    else:
        _check_fit(args, extras)
        source = readers.open_checkpoint(args.source, args.weights_only or args.upcycle)
    if args.upcycle:
        settings = _sparse_settings(args, source.path, source.settings, source.vocabulary)
        source = upcycle.upcycle(source, settings, args.noise, args.seed)
    if args.weights_only:
        source.rest = without(source.rest, "ema")
    if args.dtype is not None:
        source.model = targets.cast(source.model, DTYPES[args.dtype])
    if args.to in hf_flags.FOLDERS:
        jobs = hf.hf_jobs(source, args.dest, extras, args.to == "xglm")
    elif args.to == "branch":
        jobs = targets.branch_jobs(source, args.dest, args.rank_files or 1)
    else:
        jobs = targets.fairseq_jobs(source, args.dest, args.expert_files)
    stale = [path for path in _existing(args) if path not in {job.path for job in jobs}]
    if args.to is None:
        writing.write_checkpoint(jobs, args, args.source)
    else:
        writing.write(jobs, stale)
        if args.to == "branch":
            writing.bring_tokenizer(args.source, os.path.dirname(args.dest) or ".")
    print(_report(args, source, jobs))
    missing = hf.left_out(source) if args.to in hf_flags.FOLDERS else []
    if missing:
        print(f"training with transformers leaves out {', '.join(missing)}")


def _check_fit(args: argparse.Namespace, extras: Any) -> None:
    """Raise UserError for flags that do not fit the model, before all its bytes are checked, which
    takes minutes."""
    if not args.upcycle and args.expert_files is None and args.to is None:
        return
    try:
        source = readers.outline(args.source)
    except UserError:
        return  # the reader says more of what is wrong with a file
    if args.upcycle:
        source.settings = _sparse_settings(args, source.path, source.settings, source.vocabulary)
    if args.expert_files is not None:
        targets.share(args.source, source.experts, "--expert-files", args.expert_files)
    if args.to == "branch":
        targets.share_of_rank(args.source, source.experts, args.rank_files or 1)
        branch_settings(args.source, source.settings)
    if args.to in hf_flags.FOLDERS:
        hf.config_of(source, args.to == "xglm")
        hf.tokenizer_of(source, extras)


def _sparse_settings(
    args: argparse.Namespace, path: str, settings: Dict[str, Any], vocabulary: int
) -> Dict[str, Any]:
    """Of the model that --upcycle makes."""
    layers = {
        "moe_freq": 2 if args.moe_freq is None else args.moe_freq,
        "moe_layers": args.moe_layers,
        "moe_first_dense": args.moe_first_dense,
    }
    experts = args.moe_expert_count
    return upcycle.sparse_settings(path, settings, vocabulary, layers, experts, top_k(args))


def _check(args: argparse.Namespace) -> None:
    if args.dtype is not None and args.dtype not in DTYPES:
        raise UserError(f"--dtype {args.dtype}: not known; use float32, float16 or bfloat16")
    to_folder = args.to in hf_flags.FOLDERS
    if not to_folder:
        check_dest(args.dest)
    check_name(args.dest)
    for flag, given, needs, there in (
        ("--expert-files", args.expert_files is not None, "no --to", args.to is None),
        ("--rank-files", args.rank_files is not None, "--to branch", args.to == "branch"),
        *((flag, there, "--to hf", to_folder) for flag, there in hf_flags.given(args)),
        ("--moe-expert-count", args.moe_expert_count is not None, "--upcycle", args.upcycle),
        ("--moe-freq", args.moe_freq is not None, "--upcycle", args.upcycle),
        ("--moe-layers", args.moe_layers is not None, "--upcycle", args.upcycle),
        ("--moe-first-dense", args.moe_first_dense != 0, "--upcycle", args.upcycle),
        ("--moe-top1-expert", args.moe_top1_expert, "--upcycle", args.upcycle),
        ("--moe-top-k", args.moe_top_k is not None, "--upcycle", args.upcycle),
        ("--noise", args.noise != 0, "--upcycle", args.upcycle),
        ("--seed", args.seed != 1, "--upcycle", args.upcycle),
    ):
        if given and not there:
            remedy = f"add it, or remove {flag}" if needs != "no --to" else f"remove --to or {flag}"
            raise UserError(f"{flag} needs {needs}: {remedy}")
    require_positive(args, "expert_files", "rank_files", "moe_expert_count", "moe_top_k")
    if args.upcycle:
        _check_upcycling(args)
    if os.path.realpath(args.source) == os.path.realpath(args.dest):
        raise UserError(f"{args.dest}: is also SRC; choose another name")
    if args.to == "branch" and os.path.exists(args.dest):
        raise UserError(
            f"{args.dest}: exists, and would be read instead of the -rank- and -shared files "
            "beside it: choose another name, or move it away"
        )
    _refuse_existing(args)
    if args.layout is None:
        check_path(Path(args.source), "")
    hf_flags.check(args)
    folder = args.dest if to_folder else os.path.dirname(args.dest)
    if os.path.isfile(folder):
        raise UserError(f"{folder}: is a file, not a folder; name a folder")


def check_dest(path: str, flag: str = "") -> None:
    """Raise UserError for a name that a checkpoint to be written cannot have. `flag`: what names
    it, with a space."""
    if not path.endswith(".pt"):
        raise UserError(f"{flag}{path}: a checkpoint's name must end in .pt")
    if os.path.isdir(path):
        raise UserError(f"{flag}{path}: is a folder; name a file in it, or another one")
    if os.path.islink(path):  # it would be replaced, and what it names kept
        raise UserError(
            f"{flag}{path}: is a link to {os.path.realpath(path)}; name that file, or remove the "
            "link"
        )


def _check_upcycling(args: argparse.Namespace) -> None:
    freq, top_k = args.moe_freq, args.moe_top_k
    if args.moe_expert_count is None:
        raise UserError("--upcycle: the number of experts is missing; add --moe-expert-count")
    if freq is not None and freq < 1:
        raise UserError(f"--moe-freq {freq}: use 1 (every layer) or more")
    refuse_both_of_layers(freq, args.moe_layers)
    if args.moe_top1_expert and top_k not in (None, 1):
        raise UserError(f"--moe-top-k {top_k} with --moe-top1-expert: remove one of them")
    if not 0 <= args.noise < float("inf"):
        raise UserError(f"--noise {args.noise}: use 0 or more")


def _refuse_existing(args: argparse.Namespace) -> None:
    existing = _existing(args)
    if existing and not args.overwrite:
        raise UserError(f"{existing[0]}: exists; choose another name, or add --overwrite")


def _existing(args: argparse.Namespace) -> List[str]:
    """Files that are, or are parts of, an earlier DST."""
    if args.to in hf_flags.FOLDERS:
        if not os.path.isdir(args.dest):
            return []
        return [os.path.join(args.dest, name) for name in files_there(args.dest)]
    if args.to == "branch":
        return sorted(targets.branch_files_in_the_way(args.dest))
    return [args.dest] if os.path.exists(args.dest) else []


def _report(args, source, jobs) -> str:
    size = sum(os.path.getsize(job.path) for job in jobs)
    files = f"{len(jobs)} files" if len(jobs) > 1 else "1 file"
    kind = f"{count(source.experts, 'expert')} per sparse layer" if source.experts else "dense"
    optimizer = (
        "with" if source.optimizer is not None and args.to not in hf_flags.FOLDERS else "without"
    )
    text = f"{args.dest}: {kind}, {files}, {size:,} bytes, {optimizer} optimizer state"
    if args.upcycle and source.experts > top_k(source.settings) == 1:  # an only one's weight is 1
        text += (
            "\nwith one expert per token the logits differ from the dense model's: the gate's "
            "probability weights an expert's output"
        )
    elif args.upcycle:
        text += "\ncontinue with --moe-dropless, so that it starts equal to the dense model"
    return text
