"""The steps of `prepare`, in their order: text files -> a data folder."""

import json
import os
import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple, TypedDict

import numpy as np

from .. import data_bin, progress_bar
from ..errors import UserError
from ..wording import count
from . import data_folder, dictionary, encode, kinds
from .binarize import SplitWriter, dtype_of
from .corpora import Corpus
from .documents import Source, read_documents
from .encode import Deal, Duplicates, Encoders, chunks, training_documents
from .options import Options, check
from .splits import SplitRule
from .tokenizer import ENCODER_FILE, MERGES_FILE, ByteLevelBPE, train_bpe


@dataclass(frozen=True)
class WholeSplit:
    """Assigns every document to one split."""

    split: str

    def __call__(self, document: str) -> str:
        return self.split


class Report(TypedDict):
    """What counts.json holds."""

    bpe_types: int  # size of the tokenizer's vocabulary
    types: int  # size of the dictionary
    split: Dict[str, float]  # valid_fraction, test_fraction, split_seed
    corpora: Dict[str, Dict[str, Any]]  # name -> "held_out", and counts of each split


def prepare(dest: Path, options: Options) -> Report:
    """Create the data folder `dest`.

    Returns:
        What counts.json holds: the vocabulary sizes of tokenizer and dictionary, how documents
        were assigned to splits, and per corpus and split the documents, lines, tokens (each line's
        `</s>` counted), `<unk>` tokens and bytes (UTF-8, each line's newline counted, so tokens and
        bytes belong together in bits per byte).

    Raises:
        UserError: see the flags; `dest` is then as it was before.
    """
    data_bin.check_is_one(dest)
    check(options)
    _check_inputs_outside(dest, options)
    for corpus in options.corpora:
        source = _source(corpus, options)
        found = kinds.kinds_of(corpus.groups, source.format, source.field, corpus.flag, corpus.name)
        for path, kind in found:
            if kind.format != "text":  # whether the field is there
                next(read_documents(path, source), None)
        print(f"{corpus.name}: {kinds.listed(kind for _, kind in found)}", file=sys.stderr)
    with data_folder.new_folder(dest, options.overwrite) as scratch:
        return _prepare(scratch, options)


def _check_inputs_outside(dest: Path, options: Options) -> None:
    inside = os.path.realpath(dest) + os.sep
    for corpus in options.corpora:
        for path in (path for paths in corpus.files.values() for path in paths):
            if os.path.realpath(path).startswith(inside):
                raise UserError(
                    f"{path}: text of corpus {corpus.name}, but inside the output folder {dest}; "
                    "move it elsewhere"
                )


def _prepare(folder: Path, options: Options) -> Report:
    todo = {corpus.name: _deals(corpus, options) for corpus in options.corpora}
    bpe = _tokenizer(folder, options, todo)
    existing = None if options.dict is None else dictionary.read(options.dict, len(bpe))
    if options.dict_size is not None:
        dictionary.check_size(options.dict_size, len(bpe))
    writers: Dict[str, Dict[str, SplitWriter]] = {}
    duplicates = Duplicates() if options.dedup else None
    left_out: Dict[str, int] = {}
    files = (folder / ENCODER_FILE, folder / MERGES_FILE)
    size = sum(_text_size(paths) for parts in todo.values() for paths, _, _ in parts)
    workers = min(options.workers, max(1, size // encode.WORKER_BYTES))
    with Encoders(*files, workers) as encoders:
        for corpus in _in_order(options, todo):
            (folder / corpus.name).mkdir()
            before = duplicates.number if duplicates else 0
            writers[corpus.name] = _encode(
                corpus, todo, folder, bpe.newline, encoders, options, duplicates
            )
            if duplicates:
                left_out[corpus.name] = duplicates.number - before
    lines = existing or dictionary.build(_training_counts(writers, bpe), options.dict_size)
    table = dictionary.lookup(lines, len(bpe))
    size = dictionary.NUM_SPECIAL + len(lines)
    split = {
        "valid_fraction": options.valid_fraction,
        "test_fraction": options.test_fraction,
        "split_seed": options.split_seed,
    }
    report: Report = {"bpe_types": len(bpe), "types": size, "split": split, "corpora": {}}
    for corpus in options.corpora:
        for writer in writers[corpus.name].values():
            writer.finish(table, dtype_of(size))
        report["corpora"][corpus.name] = {
            "held_out": corpus.held_out,
            **({"duplicates": left_out[corpus.name]} if duplicates else {}),
            **{split: _counts(writer, table) for split, writer in writers[corpus.name].items()},
        }
    for at in [folder, *(folder / name for name in writers)]:
        if options.dict is not None:
            shutil.copyfile(options.dict, at / data_bin.DICTIONARY)
        else:
            dictionary.write(lines, at / data_bin.DICTIONARY)
    (folder / data_bin.COUNTS).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return report


Parts = List[Tuple[List[Path], Source, Deal]]


def _in_order(options: Options, todo: Dict[str, Parts]) -> List[Corpus]:
    """The small corpora first, which may lack a split; with --dedup, where the first of two equal
    documents is kept, as given."""
    if options.dedup:
        return options.corpora
    sizes = {name: sum(_text_size(paths) for paths, _, _ in todo[name]) for name in todo}
    return sorted(options.corpora, key=lambda corpus: sizes[corpus.name])


def _source(corpus: Corpus, options: Options) -> Source:
    return replace(options.source, format=corpus.format or options.source.format)


def _deals(corpus: Corpus, options: Options) -> Parts:
    """A corpus's files, each list with the rule that splits its documents."""
    source = _source(corpus, options)
    rule = SplitRule(
        options.valid_fraction, options.test_fraction, options.split_seed, corpus.held_out
    )
    return [
        (files, source, rule if split is None else WholeSplit(split))
        for split, files in sorted(corpus.files.items(), key=lambda item: str(item[0]))
    ]


def _tokenizer(folder: Path, options: Options, todo: Dict[str, Parts]) -> ByteLevelBPE:
    """The tokenizer, read or trained; its two files are in `folder` afterwards."""
    encoder_json, vocab_bpe = folder / ENCODER_FILE, folder / MERGES_FILE
    if options.train_bpe is None:
        assert options.gpt2_encoder_json is not None and options.gpt2_vocab_bpe is not None
        bpe = ByteLevelBPE.from_files(options.gpt2_encoder_json, options.gpt2_vocab_bpe)
        shutil.copyfile(options.gpt2_encoder_json, encoder_json)
        shutil.copyfile(options.gpt2_vocab_bpe, vocab_bpe)
        return bpe
    sources = [
        part
        for corpus in options.corpora
        if not corpus.held_out
        for part in todo[corpus.name]
        if part[2] != WholeSplit("valid") and part[2] != WholeSplit("test")
    ]
    size = sum(_size(files) for files, _, _ in sources)
    text = sum(_text_size(files) for files, _, _ in sources)
    share = min(1.0, options.train_bpe_bytes / max(1, text))
    most = 1.25 * options.train_bpe_bytes / max(1, size)  # where packing saves more than expected
    with progress_bar.bar("reading for the BPE", size, "B") as bar:
        documents = training_documents(
            sources, share, most, bar.update, Duplicates() if options.dedup else None
        )
        size = train_bpe(documents, options.train_bpe, folder)
    if size < options.train_bpe:
        print(
            f"--train-bpe {options.train_bpe}: {size} tokens learned; no other pair of tokens "
            "occurs twice in the text",
            file=sys.stderr,
        )
    return ByteLevelBPE.from_files(encoder_json, vocab_bpe)


def _encode(
    corpus: Corpus,
    todo: Dict[str, Parts],
    folder: Path,
    newline: int,
    encoders: Encoders,
    options: Options,
    duplicates: Optional[Duplicates] = None,
) -> Dict[str, SplitWriter]:
    """Encode one corpus; its splits, each with at least one document."""
    writers: Dict[str, SplitWriter] = {}
    parts = todo[corpus.name]
    size = sum(_size(files) for files, _, _ in parts)
    with progress_bar.bar(f"encoding {corpus.name}", size, "B") as bar:
        for files, source, deal in parts:
            for encoded in encoders.encode(chunks(files, source, deal, duplicates)):
                for split, part in encoded.splits.items():
                    if split not in writers:
                        writers[split] = SplitWriter(folder / corpus.name / split, newline)
                    writers[split].add(part)
                bar.update(encoded.read)
    for writer in writers.values():
        writer.close()
    _check_splits(corpus, writers, options)
    return {split: writers[split] for split in data_bin.SPLITS if split in writers}


def _check_splits(corpus: Corpus, writers: Dict[str, SplitWriter], options: Options) -> None:
    """Raise UserError for a requested corpus or split without documents."""
    flag = corpus.flag
    documents = sum(writer.documents for writer in writers.values())
    if not documents:
        number = sum(len(files) for files in corpus.files.values())
        raise UserError(f"{flag}: empty; no document in its {count(number, 'file')}")
    for split in corpus.files:
        if split is not None and split not in writers:
            raise UserError(f"{flag}:{split}: empty; no document in its files")
    if None not in corpus.files:
        return
    none = f"of its {count(documents, 'document')} none"
    if not corpus.held_out and "train" not in writers:
        raise UserError(f"{flag}: {none} fell into train; add text")
    for split, fraction in (("valid", options.valid_fraction), ("test", options.test_fraction)):
        if fraction > 0 and split not in writers:
            raise UserError(
                f"{flag}: {none} fell into {split}; raise "
                f"--{split}-fraction ({fraction}), try another --split-seed, or set it to 0 to do "
                f"without; if the corpus has more documents than that, see --documents"
            )


def _training_counts(writers: Dict[str, Dict[str, SplitWriter]], bpe: ByteLevelBPE) -> np.ndarray:
    """(N,) occurrences of every BPE id in the train splits."""
    counts = np.zeros(len(bpe), dtype=np.int64)
    for splits in writers.values():
        if "train" in splits:
            counts += splits["train"].counts[:-1]
    return counts


def _counts(writer: SplitWriter, table: np.ndarray) -> Dict[str, int]:
    return {
        "documents": writer.documents,
        "lines": writer.lines,
        "tokens": writer.tokens,
        "unknown": int(writer.counts[table == dictionary.UNK].sum()),
        "bytes": writer.bytes,
    }


def _text_size(files: List[Path]) -> int:
    """About how many bytes of text the files hold; compression leaves a quarter."""
    packed = [path for path in files if kinds.is_packed(path) or path.suffix == ".parquet"]
    return _size(files) + 3 * _size(packed)


def _size(files: List[Path]) -> int:
    return sum(path.stat().st_size for path in files)
