"""`fairseq-moe verify`: whether the files of a checkpoint are whole, undamaged and of one save."""

import argparse
import os
from typing import Dict, Iterator, Optional, Tuple

from fairseq_moe_ext.errors import UserError

DESCRIPTION = """\
Say of each file of a checkpoint whether it is as it was written: the CRC of its records, and of
files of experts the digest that the checkpoint has of them. Then open it as `convert` does, which
tells missing files, files of another save, and tensors that do not fit the settings.

  fairseq-moe verify runs/moe/checkpoint_best.pt
  fairseq-moe verify runs/moe                      (each *.pt in the folder)
  fairseq-moe verify en_moe_lm_15b/model.pt        (X-rank-R.pt and X-shared.pt of the moe branch)

Ends with status 1 if anything is damaged.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = DESCRIPTION
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "paths", metavar="PATH", nargs="+", help="a checkpoint, or a folder of checkpoints"
    )


def run(args: argparse.Namespace) -> None:
    """Raises UserError if anything is damaged."""
    checkpoints = [found for path in args.paths for found in _checkpoints(path)]
    damaged: Dict[str, str] = {}
    done: Dict[str, Optional[str]] = {}  # by file, as several checkpoints may share some
    for checkpoint in checkpoints:
        for file, reason in _judged(checkpoint, done):
            print(f"{file}: {'damaged: ' + reason if reason else 'ok'}", flush=True)
            if reason:
                damaged[file] = reason
    if damaged:
        first = next(iter(damaged))
        raise UserError(f"{len(damaged)} of {len(done)} files are damaged: {damaged[first]}")


def _checkpoints(path: str) -> Iterator[str]:
    if not os.path.isdir(path):
        yield path
        return
    from .readers import reader_of

    seen = set()
    for name in sorted(os.listdir(path)):
        file = os.path.join(path, name)
        if not name.endswith(".pt"):
            continue
        base = reader_of(file).base(file)
        if base not in seen:
            seen.add(base)
            yield base
    if not seen:
        raise UserError(f"{path}: there is no *.pt in it; name a checkpoint")


def _judged(path: str, done: Dict[str, Optional[str]]) -> Iterator[Tuple[str, Optional[str]]]:
    """Each file of a checkpoint that was not judged before, and what is wrong with it."""
    from fairseq_moe_ext.checkpoint.intact import check_digest, check_records

    from .readers import reader_of

    reader, wrong = reader_of(path), False
    for file, digest in reader.files(path):
        if file not in done:
            done[file] = None
            try:
                if digest is not None:
                    check_digest(file, digest, path)
                check_records(file)
            except (UserError, OSError) as error:
                done[file] = str(error)
            yield file, done[file]
        wrong = wrong or done[file] is not None
    if wrong:
        return
    try:
        reader.open(path, False)
    except UserError as error:
        done[path] = str(error)
        yield path, str(error)
