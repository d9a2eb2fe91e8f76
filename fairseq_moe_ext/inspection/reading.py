"""Reads the text to inspect: blocks of test sets and the user's own files; converts tokens to
text."""

from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
import torch
from torch import Tensor

from .. import data_bin, files
from ..errors import UserError
from ..evaluation.texts import document_starts, find_sets, read_texts
from ..models.hub import find_tokenizer
from ..prepare import documents
from ..questions.vocabulary import Vocabulary
from ..wording import count

POSITIONS = ("1", "2 to 4", "5 to 16", "17 to 64", "65 to 256", "above 256")
_POSITION_ENDS = np.array([1, 4, 16, 64, 256])
FREQUENCIES = (
    "the most frequent words, a quarter of the tokens",
    "second quarter",
    "third quarter",
    "rare words, the last quarter",
)


class Tokens:
    """Converts text to a model's tokens and back: with the tokenizer beside the dictionary,
    otherwise word by word."""

    def __init__(self, data: Path, dictionary: Any) -> None:
        self.dictionary = dictionary
        own = find_tokenizer(data)
        folder = own and Path(own["gpt2_encoder_json"]).parent
        self._vocabulary = Vocabulary(folder) if folder else None

    def encode(self, text: str, name: str) -> List[int]:
        """Raises UserError if a tenth or more of the text is not in the dictionary."""
        if self._vocabulary is not None:
            ids = self._vocabulary.encode(text)
            if ids:
                self._vocabulary.check([ids], name)
            return ids
        line_ends = self.dictionary.eos()
        ids = []
        for line in text.split("\n"):
            ids += [self.dictionary.index(word) for word in line.split()] + [line_ends]
        ids = ids[:-1]
        unknown = np.mean([token == self.dictionary.unk() for token in ids]) if ids else 0
        if unknown >= 0.1:
            raise UserError(
                f"--text {name}: {unknown:.0%} of its words are not in the dictionary: put the "
                "tokenizer's encoder.json and vocab.bpe beside dict.txt, or prepare the text in "
                "the same way as the data"
            )
        return ids

    def text(self, tokens: Sequence[int]) -> str:
        """In one line; a newline is ↵."""
        if self._vocabulary is not None:
            return self._vocabulary.decode(tokens).replace("\n", "↵")
        return "".join(map(self.piece, tokens))

    def piece(self, token: int) -> str:
        """One token's text; bytes that are no UTF-8 by themselves in hexadecimal."""
        if token == self.dictionary.eos():
            return "↵"
        if self._vocabulary is None:
            return self.dictionary[token] + " "
        return self._vocabulary.piece(token).decode("utf-8", "backslashreplace")


class Block(NamedTuple):
    """A stretch of text: a row of the model."""

    domain: int
    row: Tensor  # (L,) the token before the stretch (</s> before the first), then the stretch
    positions: np.ndarray  # (L - 1,) from 1, tokens since the last blank line


def positions(tokens: np.ndarray, eos: int) -> np.ndarray:
    """tokens (N,) -> (N,): 1 for the first token after a blank line (two </s>), 2, ..."""
    index = np.arange(len(tokens))
    starts = np.zeros(len(tokens), dtype=np.int64)
    begun = document_starts(tokens, eos)
    starts[begun] = begun
    return index - np.maximum.accumulate(starts) + 1


def position_classes(at: np.ndarray) -> np.ndarray:
    """Positions (N,) -> (N,), indices into POSITIONS."""
    return np.searchsorted(_POSITION_ENDS, at)


def frequency_classes(tokens: np.ndarray) -> np.ndarray:
    """tokens (N,) -> (N,), indices into FREQUENCIES, by how often a type is among them."""
    token_ids, inverse, counts = np.unique(tokens, return_inverse=True, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    before = np.cumsum(counts[order]) - counts[order]  # tokens of more frequent ids
    classes = np.empty(len(token_ids), dtype=np.int64)
    classes[order] = np.minimum(len(FREQUENCIES) * before // len(tokens), len(FREQUENCIES) - 1)
    return classes[inverse.ravel()]


def blocks_of(
    domain: int, tokens: Tensor, eos: int, context: int, wanted: Optional[int] = None
) -> List[Block]:
    """Stretches of context - 1 tokens, `wanted` tokens in all or a few less, evenly over the text;
    all of it by default."""
    size = context - 1
    number = -(-len(tokens) // size)
    chosen = np.arange(number)
    if wanted is not None and wanted < len(tokens):
        chosen = np.unique(
            np.linspace(0, len(tokens) // size - 1, max(1, wanted // size)).astype(int)
        )
    at = positions(tokens.numpy(), eos)
    stream = torch.cat([torch.tensor([eos]), tokens])
    blocks = []
    for i in np.maximum(chosen, 0):
        begin, end = i * size, min((i + 1) * size, len(tokens))
        blocks.append(Block(domain, stream[begin : end + 1], at[begin:end]))
    return blocks


def read_sets(data: Path, subset: Optional[str], dictionary: Any) -> Tuple[Dict[str, Tensor], str]:
    """The tokens of each corpus below a folder, and their split; none for a folder with a
    dictionary alone.

    subset: None: test where there is one, else valid.
    """
    corpora = data_bin.find_corpora(data)
    if not corpora:
        return {}, ""
    if subset is None:
        tested = any(data_bin.has_split(folder, "test") for folder in corpora.values())
        subset = "test" if tested else "valid"
    texts = read_texts(find_sets([data], subset), subset, 1, dictionary)
    return {text.name: text.tokens for text in texts}, subset


def read_own(paths: Sequence[Path], tokens: Tokens) -> Dict[str, Tensor]:
    """The user's files, with an empty line between the documents of one. Raises UserError for an
    empty file, or two of one name."""
    texts: Dict[str, Tensor] = {}
    for path in paths:
        files.check(path, f"--text {path}")
        read = documents.read_documents(path, documents.Source(separator="file"))
        text = "\n\n".join(document for document, _ in read)
        if not text:
            raise UserError(f"--text {path}: is empty; give a file with text in it")
        if path.name in texts:
            raise UserError(f"--text {path}: a second file is called {path.name}; rename it")
        texts[path.name] = torch.tensor(tokens.encode(text, str(path)), dtype=torch.int64)
    return texts


def check_enough(blocks: Sequence[Block], where: str) -> None:
    """Raise UserError for text with too few tokens to count."""
    tokens = sum(len(block.positions) for block in blocks)
    if tokens < 16:
        raise UserError(
            f"{where}: only {count(tokens, 'token')} to count; give 16 or more (--text)"
        )
