"""The test sets of `fairseq-moe evaluate`: their tokens, and the units that the bootstrap draws."""

import itertools
import json
import sys
from pathlib import Path
from typing import (
    Any,
    Callable,
    Dict,
    Iterable,
    Iterator,
    List,
    Mapping,
    NamedTuple,
    Optional,
    Sequence,
    TypeVar,
)

import numpy as np
import torch
from torch import Tensor

from .. import data_bin
from ..data_bin_files import check_data_bin, check_tokens
from ..errors import UserError

_Row = TypeVar("_Row")


class Text(NamedTuple):
    """One test set."""

    name: str
    folder: Path
    trained: bool  # the model was trained on the corpus: in domain
    tokens: Tensor  # (N,) int64
    units: np.ndarray  # (U,) first token of each unit that the bootstrap draws
    bytes: Optional[int]  # UTF-8, as `fairseq-moe prepare` counted; None: not known


def find_sets(folders: Sequence[Path], subset: str) -> Dict[str, Path]:
    """The test sets below the folders, each a data-bin or a folder of data-bins, by name; a line
    names corpora without the subset. Raises UserError for a set that is missing or there twice."""
    sets = data_bin.sets_of(folders, subset, "--subset")
    for data in folders:
        corpora = data_bin.find_corpora(data)
        missing = [name for name, folder in corpora.items() if folder not in sets.values()]
        if missing:
            where = f"{', '.join(missing)} of {data}"
            print(f"{where}: no {subset} split: not evaluated", file=sys.stderr)
    return sets


def read_texts(
    sets: Mapping[str, Path],
    subset: str,
    context: int,
    dictionary: Any,
    trained_on: Optional[Sequence[str]] = None,
) -> List[Text]:
    """The texts of `find_sets`. Raises UserError for one that is empty or damaged.

    Args:
        trained_on: names of corpora that the model was trained on, as far as they are known.
    """
    texts = []
    for name, folder in sets.items():
        prefix = str(folder / subset)
        dtype = check_data_bin(prefix)
        tokens = np.fromfile(f"{prefix}.bin", dtype=dtype)
        check_tokens(f"{prefix}.bin", tokens, dictionary)
        tokens = tokens.astype(np.int64)
        text = Text(
            name,
            folder,
            bool(data_bin.trained_on({name: folder}, trained_on)),
            torch.from_numpy(tokens),
            unit_starts(tokens, dictionary.eos(), context),
            _bytes(folder, subset, len(tokens)),
        )
        texts.append(text)
    return texts


def unit_starts(tokens: np.ndarray, eos: int, least: int) -> np.ndarray:
    """Where the units of the bootstrap begin: (U,) positions, the first 0.

    Documents end at a blank line (two </s>), and a document with blank lines in it looks like
    several. So pieces are joined until a unit has at least `least` tokens, which keeps related text
    together.
    """
    starts = [0]
    for start in document_starts(tokens, eos).tolist():
        if start - starts[-1] >= least:
            starts.append(start)
    return np.array(starts)


def batches(rows: Iterable[_Row], length: Callable[[_Row], int], most: int) -> Iterator[List[_Row]]:
    """Consecutive rows of one length, `most` in a batch, so that nothing is padding."""
    for _, alike in itertools.groupby(rows, length):
        while batch := list(itertools.islice(alike, most)):
            yield batch


def document_starts(tokens: np.ndarray, eos: int) -> np.ndarray:
    """Positions after a blank line (two </s>), but for the end; without the first document's."""
    after = np.flatnonzero((tokens[1:] == eos) & (tokens[:-1] == eos)) + 2
    return after[after < len(tokens)]


def _bytes(folder: Path, subset: str, tokens: int) -> Optional[int]:
    path = folder.parent / data_bin.COUNTS
    if not path.is_file():
        return None
    try:
        counted = json.loads(path.read_text(encoding="utf-8"))["corpora"][folder.name][subset]
        return counted["bytes"] if counted["tokens"] == tokens else None
    except KeyError:
        return None
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(
            f"{path}: not a file that `fairseq-moe prepare` wrote ({type(error).__name__}); "
            "prepare the data again, or move the file away"
        ) from None
