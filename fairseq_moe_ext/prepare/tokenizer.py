"""GPT-2's byte-level BPE (Radford et al. 2019), with the ids of fairseq's `--bpe gpt2`.

Text is cut into words with the same pattern and the same `regex` module as fairseq's encoder, so
both agree on every character whatever Unicode version the module knows (the pattern built into
Hugging Face `tokenizers` has tables of its own: 17,480 code points are classed otherwise by
tokenizers 0.23.3 and regex 2026.11.15). `tokenizers` merges the words, in Rust; results are cached.
That is also 3 times as fast as a whole `tokenizers` pipeline: 7.5 against 2.3 MB/s of Python source
on one core.
"""

import json
import re
from itertools import chain
from pathlib import Path
from typing import Dict, Iterable, List, Tuple

import regex
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from .. import files, outputs
from ..data_bin import TOKENIZER
from ..errors import UserError

ENCODER_FILE, MERGES_FILE = TOKENIZER
NUM_BYTES = 256

# The pattern of fairseq/data/encoders/gpt2_bpe_utils.py:70@0.12.2, which is applied line by line,
# for many lines at once: a newline is a word of its own, and white space never runs across it.
_WORD = regex.compile(
    r"\n|'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|[^\S\n]+(?!\S)|[^\S\n]+"
)
_SPECIAL = re.compile(r"[<\[].*[>\]]")  # tokens that no text becomes
MAX_REMEMBERED_WORDS = 1 << 18
MAX_REMEMBERED_LENGTH = 64


def byte_symbols() -> List[str]:
    """GPT-2's printable stand-in for each of the 256 bytes.

    Printable Latin-1 characters represent themselves; the others, in order, for the code points
    from 256 on.
    """
    symbols = []
    for byte in range(NUM_BYTES):
        printable = 0x21 <= byte <= 0x7E or (0xA1 <= byte <= 0xFF and byte != 0xAD)
        symbols.append(chr(byte) if printable else "")
    free = iter(range(NUM_BYTES, 2 * NUM_BYTES))
    return [symbol or chr(next(free)) for symbol in symbols]


_SYMBOLS = frozenset(byte_symbols())


class ByteLevelBPE:
    """Encodes text. `len(bpe)` is N, the size of the vocabulary, whose ids are 0 to N-1.

    `bpe.newline` is N, an id of its own that `encode` gives for every newline; the caller makes
    it `</s>`.
    """

    def __init__(self, encoder: Dict[str, int], merges: List[Tuple[str, str]]):
        self._model = models.BPE(vocab=encoder, merges=merges)
        self._size = len(encoder)
        self._table = dict(enumerate(byte_symbols()))
        self._words = _Words(self)

    @classmethod
    def from_files(cls, encoder_json: Path, vocab_bpe: Path) -> "ByteLevelBPE":
        """Read GPT-2's two files.

        Raises:
            UserError: a file that cannot be read or is not of GPT-2's format, or two files that do
                not belong together.
        """
        encoder = files.read_json(encoder_json, f"--gpt2-encoder-json {encoder_json}")
        # fairseq drops the first line and what follows the last newline
        # (fairseq/data/encoders/gpt2_bpe_utils.py:136@0.12.2).
        lines = files.read_text(vocab_bpe, f"--gpt2-vocab-bpe {vocab_bpe}").split("\n")[1:-1]
        if (
            not isinstance(encoder, dict)
            or not all(type(i) is int for i in encoder.values())
            or set(encoder.values()) != set(range(len(encoder)))
        ):
            raise UserError(
                f"--gpt2-encoder-json {encoder_json}: not GPT-2's format, an object that gives "
                "each token an id, from 0 without gaps"
            )
        others = [token for token in encoder if not token or not set(token) <= _SYMBOLS]
        if others:
            raise UserError(
                f"--gpt2-encoder-json {encoder_json}: the token {others[0]!r} does not consist of "
                "GPT-2's symbols for bytes; this is not a byte-level vocabulary"
            )
        missing = [symbol for symbol in byte_symbols() if symbol not in encoder]
        if missing:
            raise UserError(
                f"--gpt2-encoder-json {encoder_json}: {len(missing)} of the 256 bytes have no "
                f"token (first: {missing[0]!r}); this is not a byte-level vocabulary"
            )
        merges = []
        for number, line in enumerate(lines, start=2):
            pair = tuple(line.split())
            if len(pair) != 2 or not {*pair, "".join(pair)} <= encoder.keys():
                raise UserError(
                    f"--gpt2-vocab-bpe {vocab_bpe}, line {number}: {line!r} is not a merge of two "
                    f"tokens of {encoder_json}; take both files from the same tokenizer"
                )
            merges.append((pair[0], pair[1]))
        _check_complete(encoder, merges, encoder_json, vocab_bpe)
        return cls(encoder, merges)

    def __len__(self) -> int:
        return self._size

    @property
    def newline(self) -> int:
        return self._size

    def encode(self, text: str) -> List[int]:
        """Ids of `text`: each line's as fairseq's encoder gives them, `newline` for each "\\n"."""
        if len(self._words) > MAX_REMEMBERED_WORDS:
            self._words.clear()
        return list(chain.from_iterable(map(self._words.__getitem__, _WORD.findall(text))))

    def encode_word(self, word: str) -> Tuple[int, ...]:
        """Ids of one word, as the pattern cuts them."""
        if word == "\n":
            return (self.newline,)
        symbols = word.encode("utf-8").decode("latin-1").translate(self._table)
        return tuple(token.id for token in self._model.tokenize(symbols))


def _check_complete(
    encoder: Dict[str, int], merges: List[Tuple[str, str]], encoder_json: Path, vocab_bpe: Path
) -> None:
    """Raise UserError unless every token is a byte, comes from a merge, or is a special one, as
    <|endoftext|>: of a vocab.bpe that was cut short the last merges are missing."""
    made = {"".join(pair) for pair in merges}.union(byte_symbols())
    orphans = [token for token in encoder if token not in made and not _SPECIAL.fullmatch(token)]
    if orphans:
        raise UserError(
            f"--gpt2-vocab-bpe {vocab_bpe}: {len(merges)} merges, but {len(orphans)} more tokens "
            f"of {encoder_json} come from none ({orphans[0]!r}); the file is cut short, lacks its "
            "first line (#version) or its last newline, or belongs to another encoder.json"
        )


class _Words(Dict[str, Tuple[int, ...]]):
    """Words already encoded; long ones come once and are not kept."""

    def __init__(self, bpe: ByteLevelBPE):
        super().__init__()
        self._bpe = bpe

    def __missing__(self, word: str) -> Tuple[int, ...]:
        ids = self._bpe.encode_word(word)
        if len(word) <= MAX_REMEMBERED_LENGTH:
            self[word] = ids
        return ids


def train_bpe(documents: Iterable[str], vocabulary_size: int, folder: Path) -> int:
    """Train a vocabulary and write encoder.json and vocab.bpe of GPT-2's format into `folder`.

    Words are counted as they stream by: memory grows with the number of different words.

    Args:
        documents: the text to learn from; newlines never become part of a token.
        vocabulary_size: how many tokens to learn, the 256 bytes included.

    Returns:
        The number of tokens learned: fewer than wanted once no pair occurs twice.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\n", "removed"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[],
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    encoder = model["vocab"]
    # text before tokenizers 0.20, then pairs
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    # ASCII, because fairseq opens encoder.json in the locale's encoding
    # (fairseq/data/encoders/gpt2_bpe_utils.py:132@0.12.2).
    outputs.write_text(folder / ENCODER_FILE, json.dumps(encoder, ensure_ascii=True))
    lines = ["#version: 0.2", *merges]
    outputs.write_text(folder / MERGES_FILE, "".join(f"{line}\n" for line in lines))
    return len(encoder)
