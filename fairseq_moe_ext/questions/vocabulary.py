"""Text to the model's tokens and back, as `fairseq-moe prepare` made them: GPT-2's byte-level BPE,
line by line, and </s> for every newline, which these models never see as a character."""

from pathlib import Path
from typing import Callable, Iterable, List, TypeVar

import numpy as np

from ..errors import UserError
from ..files import read_json
from ..prepare import dictionary
from ..prepare.tokenizer import ByteLevelBPE, byte_symbols
from ..tokenizer_files import NAMES

EOS = dictionary.EOS
PAD = 1

Value = TypeVar("Value")


class Vocabulary:
    """The tokens of a folder with dict.txt, encoder.json and vocab.bpe.

    Raises:
        UserError: a file that is missing or of another format, or a dictionary that is not of these
            BPE ids.
    """

    def __init__(self, folder: Path) -> None:
        files = [folder / name for name in NAMES]
        for file in files:
            if not file.is_file():
                raise UserError(
                    f"{file}: missing; --data needs dict.txt, encoder.json and vocab.bpe, from "
                    "`fairseq-moe prepare` or, for released models, GPT-2's files from fairseq"
                )
        self.folder = folder
        self._bpe = _read(lambda: ByteLevelBPE.from_files(files[1], files[2]))
        lines = _read(lambda: dictionary.read(files[0], len(self._bpe)))
        self._table = dictionary.lookup(lines, len(self._bpe)).tolist()  # BPE id -> token
        symbols = read_json(files[1])
        byte_of = {symbol: byte for byte, symbol in enumerate(byte_symbols())}
        self._bytes = {
            self._table[i]: bytes(byte_of[c] for c in symbol) for symbol, i in symbols.items()
        }
        self._bytes[EOS] = b"\n"
        self._bytes[dictionary.UNK] = b"<unk>"
        self.size = dictionary.NUM_SPECIAL + len(lines)

    def encode(self, text: str) -> List[int]:
        """Tokens, </s> for each newline; none is put before or behind."""
        return [self._table[i] for i in self._bpe.encode(text)]

    def decode(self, tokens: Iterable[int]) -> str:
        """The text; bytes that are no UTF-8 become U+FFFD."""
        return b"".join(self._bytes.get(t, b"") for t in tokens).decode("utf-8", "replace")

    def piece(self, token: int) -> bytes:
        """The bytes of one token, which need not be UTF-8 by themselves."""
        return self._bytes.get(token, b"")

    def check(self, rows: Iterable[Iterable[int]], of: str) -> None:
        """Raise UserError if a tenth or more of the tokens are not in the dictionary."""
        tokens = np.concatenate([np.asarray(row, dtype=np.int64) for row in rows])
        unknown = float((tokens == dictionary.UNK).mean())
        if unknown >= 0.1:
            raise UserError(
                f"{self.folder}: {unknown:.0%} of the tokens of {of} are not in its dict.txt: "
                "the tokenizer and the dictionary belong to different models, or the text is in "
                "another language"
            )


def _read(read: Callable[[], Value]) -> Value:
    """What reads files for `prepare` names them by its flags, which are not those here."""
    try:
        return read()
    except UserError as error:
        flag, _, rest = str(error).partition(" ")
        raise UserError(rest if flag.startswith("--") else str(error)) from None
