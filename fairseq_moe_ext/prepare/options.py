"""The options of `prepare`, and their checks before any text is read."""

import filecmp
import re
from dataclasses import dataclass
from pathlib import Path
from typing import List, Optional

from ..data_bin import DICTIONARY, TOKENIZER
from ..errors import UserError
from ..tokenizer_files import files_of
from . import dictionary
from .corpora import Corpus
from .documents import Source
from .tokenizer import NUM_BYTES

MAX_WORKERS = 1024  # each takes 265 MB


@dataclass
class Options:
    """What `prepare` does; the flags of the same names explain the fields."""

    corpora: List[Corpus]
    source: Source = Source()
    valid_fraction: float = 0.01
    test_fraction: float = 0.01
    split_seed: int = 1
    gpt2_encoder_json: Optional[Path] = None
    gpt2_vocab_bpe: Optional[Path] = None
    train_bpe: Optional[int] = None
    train_bpe_bytes: int = 2_000_000_000
    dict: Optional[Path] = None
    dict_size: Optional[int] = None
    workers: int = 1
    overwrite: bool = False
    dedup: bool = False


def check(options: Options) -> None:
    """Raise UserError for invalid or conflicting flags."""
    if options.train_bpe is not None:
        _check_training(options, options.train_bpe)
    elif None in (options.gpt2_encoder_json, options.gpt2_vocab_bpe):
        raise UserError(
            "tokenizer: give --gpt2, or --gpt2-encoder-json and --gpt2-vocab-bpe, or --train-bpe "
            "VOCAB_SIZE to train one"
        )
    _check_dictionary(options)
    _check_splits(options)
    _check_patterns(options.source)
    if not 1 <= options.workers <= MAX_WORKERS:
        raise UserError(f"--workers {options.workers}: must be at least 1, at most {MAX_WORKERS}")
    if not -(2**63) <= options.split_seed < 2**63:
        raise UserError(f"--split-seed {options.split_seed}: must fit into 64 bits")


def _check_patterns(source: Source) -> None:
    given = {"--separator": source.ends, "--document-start": source.starts}
    if None not in given.values():
        raise UserError("--separator and --document-start: use only one of them")
    for flag, pattern in given.items():
        if pattern is None:
            continue
        if source.separator != "blank-line":
            raise UserError(
                f"{flag} {pattern}: cannot be combined with --documents {source.separator}; "
                "remove one of them"
            )
        try:
            found = re.compile(pattern)
        except re.error as error:
            raise UserError(
                f"{flag} {pattern}: not a regular expression ({error}); put \\ before characters "
                "like ( [ * that mean themselves"
            ) from None
        if all(found.search(line) for line in ("", "Any line, as 1.")):
            raise UserError(f"{flag} {pattern!r}: matches every line; begin it with ^ and be exact")


def _check_training(options: Options, vocabulary: int) -> None:
    if options.gpt2_encoder_json or options.gpt2_vocab_bpe:
        raise UserError(
            "--train-bpe: cannot be combined with --gpt2-encoder-json, --gpt2-vocab-bpe"
        )
    if options.dict is not None:
        raise UserError(
            "--dict: cannot be combined with --train-bpe, because a dictionary belongs to the "
            "tokenizer it was made with; give its --gpt2-encoder-json and --gpt2-vocab-bpe"
        )
    if vocabulary <= NUM_BYTES:
        raise UserError(
            f"--train-bpe {vocabulary}: too small, because {NUM_BYTES} tokens are the bytes; use "
            f"a vocabulary of more than {NUM_BYTES}"
        )
    if vocabulary > dictionary.MAX_VOCABULARY:
        raise UserError(f"--train-bpe {vocabulary}: must be at most {dictionary.MAX_VOCABULARY}")
    if all(corpus.held_out for corpus in options.corpora):
        raise UserError("--train-bpe: there is no --corpus to train it on")
    if options.train_bpe_bytes <= 0:
        raise UserError(f"--train-bpe-bytes {options.train_bpe_bytes}: must be above 0")


def _check_dictionary(options: Options) -> None:
    if options.dict is not None and options.dict_size is not None:
        raise UserError("--dict-size: cannot be combined with --dict, which has its own size")
    if options.dict_size is not None:  # and of the tokenizer, when it is known
        dictionary.check_size(options.dict_size, options.train_bpe or NUM_BYTES)
    if options.dict is None and all(corpus.held_out for corpus in options.corpora):
        raise UserError(
            "--dict: missing; without a --corpus to train on, give the model's dict.txt"
        )
    if options.dict is not None:
        _check_tokenizer(options.dict, options)


def _check_tokenizer(path: Path, options: Options) -> None:
    """Raise UserError for other BPE files than those beside a dictionary. All BPEs of one size have
    the same symbols, so their dictionaries look alike."""
    own = files_of(path.parent)
    if not own or not path.is_file() or not filecmp.cmp(path, own[DICTIONARY], shallow=False):
        return
    for name, flag, file in zip(
        TOKENIZER,
        ("--gpt2-encoder-json", "--gpt2-vocab-bpe"),
        (options.gpt2_encoder_json, options.gpt2_vocab_bpe),
    ):
        belongs = own.get(name)
        if belongs is None or file is None or not file.is_file():
            continue
        if not filecmp.cmp(file, belongs, shallow=False):
            raise UserError(
                f"{flag} {file}: differs from {belongs}, which belongs to --dict {path}: "
                "give that file, or the dict.txt of this tokenizer"
            )


def _check_splits(options: Options) -> None:
    for flag, value in (
        ("--valid-fraction", options.valid_fraction),
        ("--test-fraction", options.test_fraction),
    ):
        if not 0 <= value < 1:
            raise UserError(f"{flag} {value}: must be at least 0 and below 1")
    total = options.valid_fraction + options.test_fraction
    if total >= 1:
        raise UserError(f"--valid-fraction and --test-fraction: together {total}, must be below 1")
    if total == 0 and any(c.held_out and None in c.files for c in options.corpora):
        raise UserError("--heldout: --valid-fraction and --test-fraction cannot both be 0")
