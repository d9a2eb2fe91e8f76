"""`fairseq-moe verify`: check that a checkpoint's files are complete, undamaged and of one save."""

import argparse
import os
from typing import Dict, Iterator, Optional, Set, Tuple

from ..branch.files import find
from ..branch.settings import OtherModel
from ..checkpoint.cleanup import UnreadableCheckpoint, unused_files
from ..checkpoint.format import FOLDER
from ..checkpoint.intact import check_digest, check_records
from ..errors import Unfit, UnknownRouter, UserError
from .readers import reader_of

DESCRIPTION = """\
Check that each file of a checkpoint is as it was written: by the CRC of its records and, for
expert files, by the digest in the checkpoint. Then open the checkpoint as `convert` does, which
detects missing files, files of another save, and tensors that do not fit the settings. Of models
and routers that are not registered, only the bytes are checked. List expert files that no
checkpoint in the folder refers to.

Exits with status 1 if anything is damaged or not there.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = DESCRIPTION
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "paths", metavar="PATH", nargs="+",
        help="a checkpoint (X.pt stands for the moe branch's X-rank-R.pt and X-shared.pt), or a "
        "folder, to verify each *.pt in it",
    )  # fmt: skip


def run(args: argparse.Namespace) -> None:
    """Raises UserError if anything is damaged or not there."""
    checkpoints = [file for path in args.paths for file in _checkpoints(path)]
    damaged: Dict[str, str] = {}
    missing = [checkpoint for checkpoint in checkpoints if _is_missing(checkpoint)]
    done: Dict[str, Optional[str]] = {}  # by file, as several checkpoints may share some
    for checkpoint in checkpoints:
        if checkpoint in missing:
            print(f"{checkpoint}: no such checkpoint", flush=True)
            continue
        for file, reason in _judged(checkpoint, done):
            print(f"{file}: {'damaged: ' + reason if reason else 'ok'}", flush=True)
            if reason:
                damaged[file] = reason
    for folder in dict.fromkeys(os.path.dirname(os.path.realpath(c)) for c in checkpoints):
        unused = _unused(folder)
        if unused:
            print(unused, flush=True)
    if damaged:
        first = next(iter(damaged))
        raise UserError(f"{len(damaged)} of {len(done)} files are damaged: {damaged[first]}")
    if missing:
        raise UserError(f"{missing[0]}: no such checkpoint; check the path")


def _unused(folder: str, shown: int = 3) -> Optional[str]:
    """A line that lists the expert files in a folder that no checkpoint refers to; None if there
    are none."""
    try:
        unused = unused_files(folder)
    except UnreadableCheckpoint as error:
        return f"{os.path.join(folder, FOLDER)}: unused files are not listed, because {error}"
    if not unused:
        return None
    size = sum(map(os.path.getsize, unused))
    names = [os.path.basename(path) for path in unused]
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return (
        f"{os.path.join(folder, FOLDER)}: {len(names)} unused "
        f"{'file' if len(names) == 1 else 'files'} ({size:,} bytes), which no checkpoint in "
        f"{folder} refers to; the next save there deletes them, unless a training is writing them: "
        f"{', '.join(names[:shown])}{more}"
    )


def _checkpoints(path: str) -> Iterator[str]:
    if not os.path.isdir(path):
        yield path
        return
    seen: Set[str] = set()
    for name in sorted(os.listdir(path)):
        file = os.path.join(path, name)
        if not name.endswith(".pt"):
            continue
        try:
            base = reader_of(file).base(file)
        except UserError:
            base = file  # judged as it is
        if base is not None and base not in seen:
            seen.add(base)
            yield base
    if not seen:
        raise UserError(f"{path}: contains no *.pt; name a checkpoint")


def _is_missing(path: str) -> bool:
    try:
        return not os.path.lexists(path) and find(path) is None
    except UserError:
        return False  # there are parts of one of the branch


def _judged(path: str, done: Dict[str, Optional[str]]) -> Iterator[Tuple[str, Optional[str]]]:
    """Each file of a checkpoint not yet in `done`, and what is wrong with it."""
    wrong, new = False, path not in done
    try:
        reader = reader_of(path)
        files = reader.files(path)
    except UserError as error:
        done[path] = str(error)
        yield path, done[path]
        return
    for file, digest in files:
        if file not in done:
            done[file] = None
            try:
                if digest is not None:
                    check_digest(file, digest, path)
                check_records(file)
            except (UserError, OSError) as error:
                done[file] = str(error)
            if file != path:
                yield file, done[file]
        wrong = wrong or done[file] is not None
    only = ""
    try:
        try:
            if not wrong:
                reader.open(path, False)
        except Unfit as unfit:
            reader.open(path, True)
            only = f"{path}: only its weights can be converted: {unfit.reason}"
    except (OtherModel, UnknownRouter):
        pass  # the bytes are intact; the model cannot be built
    except UserError as error:
        done[path], new = str(error), True
    if new and path in done:  # not if it stands for several files of the branch
        yield path, done[path]
    if only:
        print(only, flush=True)
