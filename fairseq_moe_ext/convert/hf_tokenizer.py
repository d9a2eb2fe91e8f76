r"""Our tokenizer as Hugging Face's tokenizer.json: the same ids for every text.

    words     cut by our pattern (prepare/tokenizer.py), whose \s, \p{L} and \p{N} are written out
              as ranges of code points, since `regex` and `tokenizers` use different versions of
              Unicode
    ids       those of dict.txt, not of encoder.json
    newline   a token of its own, "\n", which is </s> (2) and also what a text begins with; it is no
              special token, so that decoding keeps it, and no eos_token, which would be special
    the end   <s> (0), which these models never write, but fine-tuning may teach them
    <s>, <pad>, <unk>   have ids and are found in no text; `split_special_tokens` says so

Dictionaries of whole words become a WordLevel model, whose words are cut at white space.
"""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from typing import Any, Dict, List, Tuple

import numpy as np
import regex

from ..data_bin import DICTIONARY, FILLING, TOKENIZER
from ..errors import UserError
from ..prepare import dictionary
from ..prepare.tokenizer import ByteLevelBPE
from ..tokenizer_files import files_of

NEWLINE = "\n"
_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
# of sentencepiece, Hugging Face's byte-level BPE, BERT, subword-nmt and the first GPT
_PIECE = re.compile(r"[▁Ġ].*|##.+|.+(@@|</w>)")
SPECIAL = {"<s>": 0, "<pad>": 1, NEWLINE: dictionary.EOS, "<unk>": dictionary.UNK}


def tokenizer_files(data: Path, model_vocabulary: int, longest: int) -> Dict[str, str]:
    """File name -> content, of a data folder's tokenizer.

    Args:
        model_vocabulary: rows of the model's embedding.
        longest: tokens that the model takes.

    Raises:
        UserError: for another model's dictionary, or one that tokenizer.json cannot express.
    """
    files = files_of(data)
    if set(TOKENIZER) <= files.keys():
        model = _byte_level(files, model_vocabulary)
    else:
        model = _words(files[DICTIONARY], model_vocabulary)
    names = {token: word for word, token in model["model"]["vocab"].items()}
    newline = {"content": NEWLINE, "single_word": False, "lstrip": False, "rstrip": False}
    newline = {**newline, "normalized": False, "special": False}
    whole = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": dictionary.EOS, **newline}],
        "normalizer": None,
        **model,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [_special(0), _sequence("A", 0)],
            "pair": [_special(0), _sequence("A", 0), _special(1), _sequence("B", 1)],
            "special_tokens": {
                NEWLINE: {"id": NEWLINE, "ids": [dictionary.EOS], "tokens": [NEWLINE]}
            },
        },
    }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "added_tokens_decoder": {str(dictionary.EOS): newline},
        "eos_token": names[SPECIAL["<s>"]],
        "pad_token": names[SPECIAL["<pad>"]],
        "unk_token": names[SPECIAL["<unk>"]],
        "split_special_tokens": True,
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": longest,
    }
    return {
        "tokenizer.json": json.dumps(whole, ensure_ascii=False),
        "tokenizer_config.json": json.dumps(settings, indent=2) + "\n",
    }


def _special(kind: int) -> Dict[str, Any]:
    return {"SpecialToken": {"id": NEWLINE, "type_id": kind}}


def _sequence(name: str, kind: int) -> Dict[str, Any]:
    return {"Sequence": {"id": name, "type_id": kind}}


def _byte_level(files: Dict[str, Path], model_vocabulary: int) -> Dict[str, Any]:
    encoder_json, vocab_bpe = (files[name] for name in TOKENIZER)
    bpe = ByteLevelBPE.from_files(encoder_json, vocab_bpe)
    lines = dictionary.read(files[DICTIONARY], len(bpe))
    _check_vocabulary(files[DICTIONARY], len(lines), model_vocabulary)
    table = dictionary.lookup(lines, len(bpe)).tolist()
    encoder = json.loads(encoder_json.read_text(encoding="utf-8"))
    text = vocab_bpe.read_text(encoding="utf-8")
    merges = [line.split() for line in text.split("\n")[1:-1]]
    vocabulary = {symbol: table[number] for symbol, number in encoder.items()}
    unknown = {symbol for symbol, token in vocabulary.items() if token == dictionary.UNK}
    lost = [pair for pair in merges if unknown.intersection(pair)]
    if lost:
        raise UserError(
            f"{files[DICTIONARY]}: lacks tokens that others are merged from ({lost[0][0]!r} and "
            f"{lost[0][1]!r}), which tokenizer.json cannot express: use a dictionary with all "
            "tokens"
        )
    # Tokens of text consist only of byte symbols, so no text becomes one of these. If the
    # vocabulary has a token <pad>, the padding's name gets a space.
    special = {w.replace(">", " >") if w in vocabulary else w: i for w, i in SPECIAL.items()}
    fillers = _unused({*vocabulary.values(), *special.values()}, model_vocabulary)
    return {
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                _split(_word_pattern(), "Isolated"),
                _BYTES,
            ],
        },
        "decoder": _BYTES,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {**vocabulary, **special, **fillers},
            "merges": merges,
        },
    }  # fmt: skip


def _words(path: Path, model_vocabulary: int) -> Dict[str, Any]:
    from fairseq.data import Dictionary

    symbols = Dictionary.load(str(path)).symbols
    _check_words(path, symbols[dictionary.NUM_SPECIAL :])
    _check_vocabulary(path, len(symbols) - dictionary.NUM_SPECIAL, model_vocabulary)
    vocabulary = {word: i for i, word in enumerate(symbols)}
    fillers = _unused(set(vocabulary.values()), model_vocabulary)
    return {
        "pre_tokenizer": _split(f"[{_ranges(regex.compile(chr(92) + 's'))}]+", "Removed"),
        "decoder": None,
        "model": {
            "type": "WordLevel",
            "vocab": {**vocabulary, NEWLINE: dictionary.EOS, **fillers},
            "unk_token": "<unk>",
        },
    }


def _check_words(path: Path, symbols: List[str]) -> None:
    """Raise UserError for symbols that only the program which cut the text can find in it."""
    words = [symbol for symbol in symbols if not FILLING.fullmatch(symbol)]
    if 2 * sum(map(str.isdigit, words)) > len(words):
        raise UserError(
            f"{path}: seems to contain BPE ids, which need {' and '.join(TOKENIZER)}: copy the "
            "model's beside it, or add --no-tokenizer"
        )
    pieces = [word for word in words if _PIECE.fullmatch(word)]
    if 20 * len(pieces) > len(words):
        raise UserError(
            f"{path}: contains subwords, such as {pieces[0]!r}, which tokenizer.json would take "
            "for whole words: add --no-tokenizer, and tokenize text as for training"
        )


def _check_vocabulary(path: Path, lines: int, model_vocabulary: int) -> None:
    there = lines + dictionary.NUM_SPECIAL
    if there > model_vocabulary:
        raise UserError(
            f"{path}: has a vocabulary of {there:,}, but the model one of {model_vocabulary:,}: "
            "pass the folder with the model's own dictionary as --data"
        )


def _unused(used: set, model_vocabulary: int) -> Dict[str, int]:
    """Names for unused ids, because ids must have no gaps."""
    return {f"<unused {i}>": i for i in range(model_vocabulary) if i not in used}


def _split(pattern: str, behaviour: str) -> Dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": behaviour, "invert": False}


@functools.lru_cache(maxsize=1)  # seconds
def _word_pattern() -> str:
    """The pattern of prepare/tokenizer.py for text between newlines, in Oniguruma's syntax."""
    space, letter, number = (_ranges(regex.compile(rf"\{kind}")) for kind in ("s", "p{L}", "p{N}"))
    return (
        rf"'s|'t|'re|'ve|'m|'ll|'d| ?[{letter}]+| ?[{number}]+| ?[^{space}{letter}{number}]+"
        rf"|[{space}]+(?![^{space}])|[{space}]+"
    )


def _ranges(kind: Any) -> str:
    """The characters of a kind as ranges of code points."""
    every = [i for i in range(0x110000) if not 0xD800 <= i < 0xE000]
    members = [i for i in every if kind.match(chr(i))]
    runs: List[Tuple[int, int]] = []
    for group in np.split(np.array(members), np.flatnonzero(np.diff(members) > 1) + 1):
        runs.append((int(group[0]), int(group[-1])))
    return "".join(rf"\x{{{a:x}}}-\x{{{b:x}}}" if b > a else rf"\x{{{a:x}}}" for a, b in runs)
