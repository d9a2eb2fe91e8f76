"""Writes the files of a conversion: all of them or none, under locks that keep out other converts
and, where checkpoints share expert files, trainings."""

from __future__ import annotations

import argparse
import contextlib
import errno
import logging
import os
import shutil
import time
from pathlib import Path
from typing import ContextManager, Iterator, List, Optional, Sequence

from .. import progress_bar, tokenizer_files
from ..checkpoint.cleanup import remove_unused_files
from ..checkpoint.writing import sync_folder
from ..errors import UserError
from ..locks import Lock, beside
from . import hf_flags
from .targets import Job, partial

logger = logging.getLogger(__name__)


def shares(args: argparse.Namespace) -> bool:
    """Whether expert files are written or removed, in a folder that other checkpoints share."""
    return args.overwrite or args.expert_files is not None


@contextlib.contextmanager
def alone(dest: str, shared: bool) -> Iterator[None]:
    """Lock DST against another convert. Create missing folders, and remove them if they stay
    empty. With `shared`, raise UserError if a training saves to the folder."""
    folder = Path(os.path.realpath(dest)).parent
    created = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{dest}: cannot be written ({error.strerror}); choose another place"
        ) from None
    try:
        with Lock(beside(dest), dest):
            with experts_alone(os.path.dirname(dest)) if shared else contextlib.nullcontext():
                pass  # before the work
            yield
    finally:
        for path in created:
            with contextlib.suppress(OSError):
                path.rmdir()


@contextlib.contextmanager
def experts_alone(folder: str) -> Iterator[None]:
    """Lock a folder, whose checkpoints share expert files, against a training that saves to it and,
    briefly, against other converts."""
    end = time.monotonic() + 5
    while True:
        try:
            lock = Lock(Path(folder) / "lock", folder or ".")
            break
        except UserError:
            if time.monotonic() > end:
                raise
            time.sleep(0.1)
    with lock:
        yield


def write_checkpoint(jobs: Sequence[Job], args: argparse.Namespace, source: str) -> None:
    """Write a checkpoint of ours, the tokenizer of SRC beside it."""
    folder = os.path.dirname(jobs[-1].path) or "."
    write(jobs, [], experts_alone(folder) if shares(args) else None)
    bring_tokenizer(source, folder)
    if args.overwrite:
        with experts_alone(folder):
            remove_unused_files(folder)


def bring_tokenizer(source: str, folder: str) -> None:
    """Copy the tokenizer that travels with SRC, if there is one, beside DST. DST is complete
    without it, so where that fails there is a warning."""
    try:
        data = hf_flags.own(source)
        if data is not None:
            tokenizer_files.copy(data, Path(folder))
    except (UserError, OSError) as error:
        logger.warning(f"{folder}: without the tokenizer of {source}: {error}")


def write(jobs: Sequence[Job], stale: List[str], lock: Optional[ContextManager] = None) -> None:
    """Write all files in folders of their own, then rename them. The file that identifies the set
    is renamed last, and the old one is removed first, so that no mixture of two sets can be read.

    Args:
        lock: entered for the renaming.

    Raises:
        UserError: where they cannot be written.
    """
    # not *.tmp: a training in this folder removes those
    scratch = f".{os.path.basename(jobs[-1].path)}.converting"
    made = [partial(job.path, scratch) for job in jobs]
    folders = {os.path.dirname(path) for path in made}
    try:
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)  # what a killed process left
            os.makedirs(folder)
        total = sum(job.size for job in jobs)
        with progress_bar.bar("converting", total, "B") as bar:
            for job, path in zip(jobs, made):
                job.write(path, bar.update)
        replaced = [job.path for job in jobs[:-1] if os.path.exists(job.path)]
        with lock or contextlib.nullcontext():
            if replaced or stale:
                for path in [jobs[-1].path, *stale]:
                    with contextlib.suppress(FileNotFoundError):
                        os.remove(path)
            for job, path in zip(jobs, made):
                os.replace(path, job.path)
        for folder in {os.path.dirname(job.path) or "." for job in jobs}:
            sync_folder(folder)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise UserError(
            f"{error.filename or jobs[-1].path}: cannot be written ({error.strerror or error}); "
            f"{'free some disk space, or ' if full else ''}choose another place"
        ) from error
    finally:
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
