"""dict.txt in the convention of fairseq's `--bpe gpt2`: the words are BPE ids, written as numbers.

fairseq puts 4 special symbols before the file's lines (fairseq/data/dictionary.py:34@0.12.2): line
i, counted from 0, is index 4 + i.
"""

import re
from pathlib import Path
from typing import List, Optional, Tuple

import numpy as np

from .. import files
from ..data_bin import FILLING
from ..errors import UserError

NUM_SPECIAL = 4
MAX_VOCABULARY = 1 << 20  # four times the largest published ones
EOS = 2
UNK = 3
PADDING_FACTOR = 8  # fairseq-preprocess --padding-factor

Lines = List[Tuple[str, int]]  # (symbol, count)

_BPE_ID = re.compile(r"0|[1-9][0-9]{0,9}")


def build(counts: np.ndarray, size: Optional[int]) -> Lines:
    """Dictionary of all BPE ids, the frequent ones first.

    Ids with the same count are in the order of their digits, as fairseq-preprocess sorts them
    (fairseq/data/dictionary.py:195@0.12.2); ids that never occurred are in it too, so that any text
    can be encoded. It is filled up with madeupword0000, madeupword0001, ...

    Args:
        counts: (N,) how often each BPE id occurs in the training text.
        size: size to fill up to, the 4 special symbols included; by default the next multiple of
            8, as fairseq does.

    Raises:
        UserError: `size` is too small for the BPE ids.
    """
    needed = NUM_SPECIAL + len(counts)
    if size is None:
        size = -(-needed // PADDING_FACTOR) * PADDING_FACTOR
    check_size(size, len(counts))
    order = sorted(range(len(counts)), key=lambda i: (-counts[i], str(i)))
    lines = [(str(i), int(counts[i])) for i in order]
    return lines + [(f"madeupword{i:04d}", 0) for i in range(size - needed)]


def check_size(size: int, bpe_size: int) -> None:
    """Raise UserError unless `size` symbols hold `bpe_size` BPE ids and the special symbols."""
    if size > MAX_VOCABULARY:
        raise UserError(f"--dict-size {size}: must be at most {MAX_VOCABULARY}")
    if size < NUM_SPECIAL + bpe_size:
        raise UserError(
            f"--dict-size {size}: too small for {bpe_size} BPE tokens and {NUM_SPECIAL} special "
            f"symbols; use at least {NUM_SPECIAL + bpe_size}"
        )


def read(path: Path, bpe_size: int) -> Lines:
    """Read an existing dict.txt.

    Raises:
        UserError: not a dictionary, or not one of BPE ids below `bpe_size`.
    """
    text = files.read_text(path, f"--dict {path}")
    lines: Lines = []
    for number, line in enumerate(text.removesuffix("\n").split("\n") if text else [], start=1):
        symbol, _, count = line.rstrip().rpartition(" ")
        if not symbol or not (count.isascii() and count.isdigit() and len(count) < 20):
            raise UserError(
                f"--dict {path}, line {number}: {line!r} is not '<symbol> <count>'; name a dict.txt"
            )
        lines.append((symbol, int(count)))
        if _BPE_ID.fullmatch(symbol) and int(symbol) >= bpe_size:
            raise UserError(
                f"--dict {path}, line {number}: BPE id {symbol}, but the tokenizer has only "
                f"{bpe_size} tokens; give the encoder.json and vocab.bpe that belong to it"
            )
        if not _BPE_ID.fullmatch(symbol) and not FILLING.fullmatch(symbol):
            raise UserError(
                f"--dict {path}, line {number}: {symbol!r} is not a BPE id; a dictionary for "
                "--bpe gpt2 is needed"
            )
    symbols = [symbol for symbol, _ in lines]
    if len(set(symbols)) < len(symbols):
        raise UserError(f"--dict {path}: a symbol occurs twice; use the model's own dict.txt")
    if not lines:
        raise UserError(f"--dict {path}: empty; use the model's own dict.txt")
    return lines


def lookup(lines: Lines, bpe_size: int) -> np.ndarray:
    """(N + 1,) dictionary index of every BPE id, and of the newline id N, which is `</s>`.

    BPE ids that are not in the dictionary are `<unk>`.
    """
    table = np.full(bpe_size + 1, UNK, dtype=np.int64)
    for index, (symbol, _) in enumerate(lines, start=NUM_SPECIAL):
        if symbol.isdigit():
            table[int(symbol)] = index
    table[bpe_size] = EOS
    return table


def write(lines: Lines, path: Path) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(f"{symbol} {count}\n" for symbol, count in lines)
