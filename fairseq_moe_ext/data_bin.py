"""The layout of folders of data-bins, and the names that a corpus may have.

    DATA/dict.txt
    DATA/<corpus>/dict.txt                      the same bytes as DATA/dict.txt
    DATA/<corpus>/{train,valid,test}.{bin,idx}  one data-bin of fairseq's mmap format per split

Every DATA/<corpus> is an ordinary fairseq data-bin. A corpus that a model was not trained on,
because it has no train split or --train-corpora excludes it, is out of domain. `fairseq-moe
prepare` writes this layout and the task `mixture_language_modeling` reads it.
"""

import filecmp
import os
import re
from pathlib import Path
from typing import Dict, List, Optional, Sequence, Union

from fairseq.utils import split_paths

from .errors import UserError

DICTIONARY = "dict.txt"
# with which fairseq pads a dictionary (fairseq/data/dictionary.py:195@0.12.2)
FILLING = re.compile(r"madeupword[0-9]+")
COUNTS = "counts.json"  # of `fairseq-moe prepare`
TOKENIZER = ("encoder.json", "vocab.bpe")
SPLITS = ("train", "valid", "test")
PLAIN = "data"  # the corpus that a plain data-bin is
TRAINED = "trained_corpora"  # key of the state of the task in a checkpoint

_MAX_NAME = 100  # characters; a file's name has 255 bytes at most, and metrics and flags have more

# A name is a folder and part of log keys (<corpus>_ppl), flags (a=0.5,b=0.5) and subset names
# (valid/docs), so it has no character that means something in one of them.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
# in_domain_ppl and out_of_domain_ppl are the means in the log; a folder called valid1 looks
# like a forgotten validation set (fairseq/data/data_utils.py:581@0.12.2). The others are files
# of the data folder.
_RESERVED = re.compile(
    r"best|in_domain|out_of_domain|(train|valid*|test)[0-9]*(\..*)?"
    r"|" + "|".join(map(re.escape, (DICTIONARY, COUNTS, *TOKENIZER)))
)


def check_corpus_name(name: str, where: str) -> None:
    """Raise UserError unless a corpus may be called `name`; `where` begins the message."""
    if not _NAME.fullmatch(name):
        raise UserError(
            f"{where}: a corpus cannot be called {name!r}; use letters, digits, '_', '-' and '.', "
            "beginning with a letter or a digit"
        )
    if len(name) > _MAX_NAME:
        raise UserError(
            f"{where}: the name {name[:20]}... has {len(name)} characters; use {_MAX_NAME} at most"
        )
    if _RESERVED.fullmatch(name):
        raise UserError(
            f"{where}: the name {name!r} is reserved for splits, means or files; choose "
            "another name for the corpus"
        )


def has_split(folder: Path, split: str) -> bool:
    """Whether `folder` holds the data-bin `split`; UserError if one of its two files is missing."""
    index, tokens = folder / f"{split}.idx", folder / f"{split}.bin"
    if index.is_file() != tokens.is_file():
        there, missing = (index, tokens) if index.is_file() else (tokens, index)
        raise UserError(
            f"{missing}: missing, although {there.name} is there; a data-bin needs both files: "
            "prepare it again or copy the missing one"
        )
    return index.is_file()


def first_folder(data: str) -> Path:
    """Of the data folders of a setting, a:b, the one with the dictionary."""
    return Path(split_paths(data)[0])


def check_is_one(path: Union[str, Path], where: str = "") -> None:
    """Raise UserError for a folder, or a file in it, that fairseq would take for several: it
    separates those of a setting by os.pathsep (fairseq/utils.py:61@0.12.2). `where`: the beginning
    of the message, by default the path."""
    if len(split_paths(str(path))) > 1:
        raise UserError(
            f"{where or path}: '{os.pathsep}' separates paths in fairseq, which cannot read one "
            "with it in its name: use another name"
        )


def find_corpora(data: Path) -> Dict[str, Path]:
    """The corpora of a data folder by name, in alphabetical order; none if it has no data-bin.

    A folder that is itself a plain data-bin (dict.txt and, say, train.idx side by side) is one
    corpus called "data".

    Raises:
        UserError: no such folder, no dict.txt, both layouts at once, or a name that a corpus
            cannot have.
    """
    if not data.is_dir():
        raise UserError(f"{data}: no such data folder; make one with `fairseq-moe prepare`")
    if not (data / DICTIONARY).is_file():
        raise UserError(
            f"{data / DICTIONARY}: missing; {data} is not a prepared data folder; make one with "
            "`fairseq-moe prepare`"
        )
    plain, folders = _data_bin_files(data), _folders(data)
    if plain and folders:
        raise UserError(
            f"{data}: holds data-bins of its own ({plain[0]}) and of corpora "
            f"({folders[0].name}/); move one of the two elsewhere"
        )
    if plain:
        return {PLAIN: data}
    for folder in folders:
        check_corpus_name(folder.name, str(folder))
    return {folder.name: folder for folder in folders}


def sets_of(folders: Sequence[Path], split: str, flag: str = "the split") -> Dict[str, Path]:
    """The data-bins of a split in data folders, by their own names.

    Args:
        flag: that names the split.

    Raises:
        UserError: for a folder without one, other dictionaries than that of the first folder, or
            two of one name; and as find_corpora.
    """
    found: Dict[str, Path] = {}
    for data in folders:
        corpora = find_corpora(data)
        if not corpora:
            raise UserError(f"{data}: contains no data-bin; make some with `fairseq-moe prepare`")
        check_dictionaries(data, corpora)
        if data != folders[0]:
            check_dictionaries(folders[0], {data.name: data})
        having = {own_name(n, f): f for n, f in corpora.items() if has_split(f, split)}
        if not having:
            raise UserError(
                f"{data}: has no data-bin for {flag} {split}; prepare it, or name another split or "
                "folder"
            )
        for name in having.keys() & found.keys():
            raise UserError(
                f"{having[name]}: a second set is called {name!r}; leave one out, or rename its "
                "folder"
            )
        found.update(having)
    return found


def corpora_in(data: Path) -> List[str]:
    """The names of a data folder's corpora; none if it is a data-bin itself, or no data folder."""
    if not (data / DICTIONARY).is_file() or _data_bin_files(data):
        return []
    return [folder.name for folder in _folders(data)]


def _folders(data: Path) -> List[Path]:
    """Those in a data folder that are data-bins."""
    return sorted(path for path in data.iterdir() if path.is_dir() and _data_bin_files(path))


def check_dictionaries(data: Path, corpora: Dict[str, Path]) -> None:
    """Raise UserError unless every corpus has the dictionary of the data folder, byte for byte."""
    expected = data / DICTIONARY
    for folder in corpora.values():
        copy = folder / DICTIONARY
        if not copy.is_file():
            raise UserError(f"{copy}: missing; it must be a copy of {expected}")
        if os.path.samefile(copy, expected):
            continue
        if not filecmp.cmp(copy, expected, shallow=False):
            raise UserError(
                f"{copy} ({_count_lines(copy)} entries) differs from {expected} "
                f"({_count_lines(expected)} entries); prepare all corpora with one dictionary "
                "(`fairseq-moe prepare --dict`)"
            )


def trained_on(
    corpora: Dict[str, Path], names: Optional[Sequence[str]], split: str = "train"
) -> List[str]:
    """The corpora in domain: those that a model was trained on.

    Args:
        names: the corpora that its checkpoint lists, by their own names. None if it lists none:
            then those with the split that is trained on.
    """
    if names is None:
        return [name for name, folder in corpora.items() if has_split(folder, split)]
    inside = [name for name, folder in corpora.items() if own_name(name, folder) in names]
    # a plain data-bin in its own training, and in checkpoints of before they had its own name
    plain = list(names) == list(corpora) == [PLAIN] and has_split(corpora[PLAIN], split)
    return [PLAIN] if plain else inside


def own_name(corpus: str, folder: Path) -> str:
    """The name of a corpus; that of its folder for a plain data-bin."""
    return os.path.basename(os.path.abspath(folder)) if corpus == PLAIN else corpus


def splits_of(folder: Path) -> List[str]:
    """The names of all data-bins in one corpus folder (train, valid, test, valid1, ...)."""
    return sorted(path.stem for path in folder.glob("*.idx"))


def _data_bin_files(folder: Path) -> List[str]:
    return sorted(path.name for path in folder.iterdir() if path.suffix in (".idx", ".bin"))


def _count_lines(path: Path) -> int:
    with open(path, "rb") as file:
        return sum(1 for _ in file)
