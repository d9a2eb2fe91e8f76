"""The files of each corpus, from --corpus, --heldout and --format."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Dict, Iterable, List, Optional, Tuple

from .. import data_bin
from ..errors import UserError
from ..wording import did_you_mean
from . import kinds
from .documents import list_files


@dataclass
class Corpus:
    """One corpus: its files per split; those under None are split by document."""

    name: str
    held_out: bool = False
    files: Dict[Optional[str], List[Path]] = field(default_factory=dict)
    groups: List[List[Path]] = field(default_factory=list)  # by the path, folder or glob
    format: Optional[str] = None  # of its files; None: as for all

    @property
    def flag(self) -> str:
        return f"{'--heldout' if self.held_out else '--corpus'} {self.name}"


def parse_corpora(corpora: List[str], heldout: List[str]) -> List[Corpus]:
    """The corpora that the flags --corpus and --heldout describe, their files listed. A file that
    one flag names twice, by a link or a glob, is listed once.

    Raises:
        UserError: a flag that cannot be read, a name used twice, a path without files, a file to
            train on that two flags name.
    """
    if not corpora and not heldout:
        raise UserError("--corpus: missing; give at least one, such as --corpus NAME=PATH")
    by_name: Dict[str, Corpus] = {}
    for flag, specs in (("--corpus", corpora), ("--heldout", heldout)):
        for spec in specs:
            name_and_split, equals, paths = spec.partition("=")
            name, colon, split = name_and_split.partition(":")
            if not equals or not name or not paths:
                raise UserError(f"{flag} {spec}: not of the form NAME=PATH[,PATH...]")
            data_bin.check_corpus_name(name, flag)
            held_out = flag == "--heldout"
            allowed = data_bin.SPLITS[1:] if held_out else data_bin.SPLITS
            if colon and split not in allowed:
                raise UserError(
                    f"{flag} {name_and_split}: the split {split!r} is not one of "
                    f"{', '.join(allowed)}"
                )
            corpus = by_name.setdefault(name, Corpus(name, held_out))
            key = split if colon else None
            if corpus.held_out != held_out or key in corpus.files or (None in corpus.files):
                raise UserError(f"{flag} {name_and_split}: the corpus is given twice; remove one")
            if key is None and corpus.files:
                raise UserError(
                    f"{flag} {name}: given both with and without a split; write {name}:train=..., "
                    f"{name}:valid=... for all its text"
                )
            where, remedy = f"{flag} {name_and_split}", "check the path"
            if "," in paths:
                remedy += "; commas separate paths, so write ? for one in a name (a glob)"
            groups = [list_files(path, where, remedy) for path in paths.split(",")]
            corpus.groups += groups
            once: Dict[str, Path] = {}
            for path in (path for group in groups for path in group):
                once.setdefault(os.path.realpath(path), path)
            corpus.files[key] = list(once.values())
    for corpus in by_name.values():
        if not corpus.held_out and not {None, "train"} & corpus.files.keys():
            raise UserError(
                f"--corpus {corpus.name}: no train split; give {corpus.name}:train=..., or use "
                "--heldout for a corpus that is only evaluated"
            )
    _refuse_shared_files(by_name.values())
    return list(by_name.values())


def _refuse_shared_files(corpora: Iterable[Corpus]) -> None:
    """Raise UserError for a file to train on that is also in another split or corpus: its text
    would be evaluated, or count twice."""
    seen: Dict[str, Tuple[str, bool]] = {}
    for corpus in corpora:
        for split, paths in corpus.files.items():
            flag = corpus.flag if split is None else f"{corpus.flag}:{split}"
            trained = not corpus.held_out and split in (None, "train")
            for path in paths:
                first, also_trained = seen.setdefault(os.path.realpath(path), (flag, trained))
                if first != flag and (trained or also_trained):
                    raise UserError(
                        f"{flag}: {path} is also a file of {first}, and text to train on must be "
                        "in no other split or corpus; leave it out of one of them"
                    )


def parse_formats(words: List[str], corpora: List[Corpus]) -> str:
    """The format of all files; those of single corpora are noted there. Raises UserError."""
    by_name = {corpus.name: corpus for corpus in corpora}
    of_all = "auto"
    for word in words:
        name, equals, form = word.rpartition("=")
        if form not in kinds.FORMATS:
            there = ", ".join(kinds.FORMATS) + did_you_mean(form, kinds.FORMATS)
            raise UserError(f"--format {word}: not one of {there}")
        if not equals:
            of_all = form
        elif name in by_name:
            by_name[name].format = form
        else:
            there = ", ".join(by_name) + did_you_mean(name, by_name)
            raise UserError(f"--format {word}: no corpus {name!r}; there are {there}")
    return of_all
