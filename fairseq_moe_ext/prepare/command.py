"""`fairseq-moe prepare`: the flags, and the order of the steps."""

import argparse
import json
import os
import shutil
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Dict, List, Optional, Tuple, Union

import numpy as np
from tqdm import tqdm

from fairseq_moe_ext import data_bin
from fairseq_moe_ext.errors import UserError
from fairseq_moe_ext.prepare import dictionary, kinds, place
from fairseq_moe_ext.prepare.binarize import SplitWriter, dtype_of
from fairseq_moe_ext.prepare.documents import SEPARATORS, Source, list_files
from fairseq_moe_ext.prepare.encode import Deal, Encoders, chunks, training_documents
from fairseq_moe_ext.prepare.splits import SplitRule
from fairseq_moe_ext.prepare.tokenizer import (
    ENCODER_FILE,
    MERGES_FILE,
    NUM_BYTES,
    ByteLevelBPE,
    train_bpe,
)

MAX_WORKERS = 1024  # each takes 265 MB

DESCRIPTION = """\
Turn your own text into a data folder for fairseq: byte-level BPE as GPT-2's, one data-bin per
corpus, split by document into train, valid and test.

  fairseq-moe prepare DATA --corpus wiki=wiki.txt --corpus code='src/**/*.py' \\
      --heldout mail=mail.jsonl.gz --train-bpe 8000

The text: a text file has one paragraph a line and a blank line between documents (--documents
says otherwise); JSON Lines have one document a line in the field "text" (--field). Which of the
two a file is, its content tells (--format says otherwise); other kinds are refused by name. A
folder stands for all files below it, without those that begin with a dot. Files may be packed
with gzip, bzip2 or xz and must be UTF-8.

What the model sees: every newline becomes </s>, a blank line stands between documents; lines are
otherwise kept as they are.

What is written: DATA/<corpus>/{train,valid,test}.{bin,idx}, each corpus an ordinary fairseq
data-bin; DATA/dict.txt; DATA/encoder.json and DATA/vocab.bpe for fairseq's --bpe gpt2;
DATA/counts.json, the counts that are printed at the end. DATA appears when all is done.
"""


@dataclass
class Corpus:
    """One corpus: its files per split, or under None those to be dealt out by document."""

    name: str
    held_out: bool = False
    files: Dict[Optional[str], List[Path]] = field(default_factory=dict)
    groups: List[List[Path]] = field(default_factory=list)  # by the path, folder or glob
    format: Optional[str] = None  # of its files; None: as for all

    @property
    def flag(self) -> str:
        return f"{'--heldout' if self.held_out else '--corpus'} {self.name}"


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


@dataclass(frozen=True)
class WholeSplit:
    """Deals every document to one split."""

    split: str

    def __call__(self, document: str) -> str:
        return self.split


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = DESCRIPTION
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("dest", metavar="DATA", type=Path, help="the data folder to make")
    text = parser.add_argument_group("text")
    text.add_argument(
        "--corpus", action="append", default=[], metavar="NAME[:SPLIT]=PATH[,PATH...]",
        help="a corpus to train on: files, folders or quoted globs; may be repeated. With :train, "
        ":valid or :test, the documents of these paths are that split; without, they are dealt "
        "out by the fractions below",
    )  # fmt: skip
    text.add_argument(
        "--heldout", action="append", default=[], metavar="NAME[:SPLIT]=PATH[,PATH...]",
        help="a corpus to evaluate on only (out of domain): all its documents go to valid and "
        "test; may be repeated",
    )  # fmt: skip
    text.add_argument(
        "--format", action="append", default=[], metavar="[NAME=]KIND",
        help="text or jsonl, whatever the files look like; NAME=KIND says so of one corpus; may "
        "be repeated (default: auto, what the content tells)",
    )  # fmt: skip
    text.add_argument(
        "--documents", choices=SEPARATORS, default="blank-line",
        help="what separates documents in text files: blank lines, every newline, or the end of "
        "the file (default: blank-line)",
    )  # fmt: skip
    text.add_argument(
        "--field", default="text", help="the JSONL field that holds the document (default: text)"
    )
    splits = parser.add_argument_group("splits (by a hash of the document's text)")
    splits.add_argument(
        "--valid-fraction", type=float, default=0.01, metavar="F",
        help="share of documents for valid (default: 0.01); held-out corpora are divided between "
        "valid and test in the proportion of the two fractions",
    )  # fmt: skip
    splits.add_argument(
        "--test-fraction", type=float, default=0.01, metavar="F",
        help="share of documents for test (default: 0.01)",
    )  # fmt: skip
    splits.add_argument(
        "--split-seed", type=int, default=1, metavar="N", help="another number, other splits"
    )
    bpe = parser.add_argument_group("tokenizer (one of the two) and dictionary")
    bpe.add_argument(
        "--gpt2-encoder-json", type=Path, metavar="FILE", help="GPT-2's encoder.json, with:"
    )
    bpe.add_argument("--gpt2-vocab-bpe", type=Path, metavar="FILE", help="GPT-2's vocab.bpe")
    bpe.add_argument(
        "--train-bpe", type=int, metavar="TYPES",
        help="train a byte-level BPE with this many types on the train documents; it is written "
        "as encoder.json and vocab.bpe",
    )  # fmt: skip
    bpe.add_argument(
        "--train-bpe-bytes", type=int, default=2_000_000_000, metavar="BYTES",
        help="train it on about this much text at most, taken evenly (default: 2000000000)",
    )  # fmt: skip
    bpe.add_argument(
        "--dict", type=Path, metavar="FILE",
        help="use this dict.txt, of an existing model, instead of making one",
    )  # fmt: skip
    bpe.add_argument(
        "--dict-size", type=int, metavar="TYPES",
        help="fill the dictionary up to this many types with madeupwordNNNN, the 4 special ones "
        "counted (the paper's models: 51200; default: the next multiple of 8)",
    )  # fmt: skip
    run = parser.add_argument_group("running")
    run.add_argument(
        "--workers", type=int, default=_cores(), metavar="N",
        help="processes (default: all cores, here %(default)s); the result does not depend on it",
    )  # fmt: skip
    run.add_argument(
        "--overwrite", action="store_true",
        help="replace DATA, if there is nothing in it but what this command wrote",
    )  # fmt: skip


def run(args: argparse.Namespace) -> None:
    """The command: prepare and print the table of counts."""
    corpora = parse_corpora(args.corpus, args.heldout)
    options = Options(
        corpora=corpora,
        source=Source(parse_formats(args.format, corpora), args.documents, args.field),
        valid_fraction=args.valid_fraction,
        test_fraction=args.test_fraction,
        split_seed=args.split_seed,
        gpt2_encoder_json=args.gpt2_encoder_json,
        gpt2_vocab_bpe=args.gpt2_vocab_bpe,
        train_bpe=args.train_bpe,
        train_bpe_bytes=args.train_bpe_bytes,
        dict=args.dict,
        dict_size=args.dict_size,
        workers=args.workers,
        overwrite=args.overwrite,
    )
    started = time.perf_counter()
    report = prepare(args.dest, options)
    seconds = time.perf_counter() - started
    print(format_table(report))
    print(f"{args.dest}: written in {seconds:.1f} s, dictionary of {report['types']:,} types")


def parse_corpora(corpora: List[str], heldout: List[str]) -> List[Corpus]:
    """The corpora that the flags --corpus and --heldout describe, their files listed.

    Raises:
        UserError: a flag that cannot be read, a name used twice, a path without files.
    """
    if not corpora and not heldout:
        raise UserError("--corpus: missing; give at least one, as --corpus NAME=PATH")
    found: Dict[str, Corpus] = {}
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
            corpus = found.setdefault(name, Corpus(name, held_out))
            key = split if colon else None
            if corpus.held_out != held_out or key in corpus.files or (None in corpus.files):
                raise UserError(f"{flag} {name_and_split}: the corpus is given twice")
            if key is None and corpus.files:
                raise UserError(
                    f"{flag} {name}: given with and without a split; "
                    f"write {name}:train=..., {name}:valid=... for all of it"
                )
            groups = [list_files(path, f"{flag} {name_and_split}") for path in paths.split(",")]
            corpus.groups += groups
            corpus.files[key] = [path for group in groups for path in group]
    for corpus in found.values():
        if not corpus.held_out and not {None, "train"} & corpus.files.keys():
            raise UserError(
                f"--corpus {corpus.name}: no train split; give {corpus.name}:train=..., or use "
                "--heldout for a corpus that is only evaluated"
            )
    return list(found.values())


def parse_formats(words: List[str], corpora: List[Corpus]) -> str:
    """The format of all files; those of single corpora are noted there. Raises UserError."""
    by_name = {corpus.name: corpus for corpus in corpora}
    of_all = "auto"
    for word in words:
        name, equals, form = word.rpartition("=")
        if form not in kinds.FORMATS:
            raise UserError(f"--format {word}: not one of {', '.join(kinds.FORMATS)}")
        if not equals:
            of_all = form
        elif name in by_name:
            by_name[name].format = form
        else:
            raise UserError(f"--format {word}: no corpus {name!r}; there are {', '.join(by_name)}")
    return of_all


Report = Dict[str, Union[int, Dict]]


def prepare(dest: Path, options: Options) -> Report:
    """Make the data folder `dest`.

    Returns:
        What is written to counts.json: the number of BPE types and of dictionary types, and per
        corpus and split the documents, lines, tokens (each line's `</s>` counted), `<unk>` tokens
        and bytes (UTF-8, each line's newline counted, so tokens and bytes belong together in bits
        per byte).

    Raises:
        UserError: see the flags; `dest` is then as it was before.
    """
    _check(options)
    _check_inputs_outside(dest, options)
    for corpus in options.corpora:
        source = _source(corpus, options)
        found = kinds.check_corpus(
            corpus.groups, source.format, source.field, corpus.flag, corpus.name
        )
        print(f"{corpus.name}: {found}", file=sys.stderr)
    with place.new_folder(dest, options.overwrite) as scratch:
        return _prepare(scratch, options)


def _check_inputs_outside(dest: Path, options: Options) -> None:
    inside = os.path.realpath(dest) + os.sep
    for corpus in options.corpora:
        for path in (path for paths in corpus.files.values() for path in paths):
            if os.path.realpath(path).startswith(inside):
                raise UserError(
                    f"{path}: text of corpus {corpus.name}, but in the folder {dest} that is to "
                    "be made; move it elsewhere"
                )


def _check(options: Options) -> None:
    """Everything that can be wrong with the flags alone."""
    given = (options.gpt2_encoder_json, options.gpt2_vocab_bpe)
    if options.train_bpe is None and None in given:
        raise UserError(
            "tokenizer: give --gpt2-encoder-json and --gpt2-vocab-bpe, or --train-bpe TYPES to "
            "train one"
        )
    if options.train_bpe is not None:
        if any(given):
            raise UserError("--train-bpe: not together with --gpt2-encoder-json, --gpt2-vocab-bpe")
        if options.dict is not None:
            raise UserError(
                "--dict: not together with --train-bpe; a dictionary belongs to the tokenizer it "
                "was made with: give its --gpt2-encoder-json and --gpt2-vocab-bpe"
            )
        if options.train_bpe <= NUM_BYTES:
            raise UserError(
                f"--train-bpe {options.train_bpe}: the {NUM_BYTES} bytes come first; more than "
                f"{NUM_BYTES} types are needed"
            )
        if options.train_bpe > dictionary.MAX_TYPES:
            raise UserError(
                f"--train-bpe {options.train_bpe}: {dictionary.MAX_TYPES} types at most"
            )
        if all(corpus.held_out for corpus in options.corpora):
            raise UserError("--train-bpe: there is no --corpus to train it on")
        if options.train_bpe_bytes <= 0:
            raise UserError(f"--train-bpe-bytes {options.train_bpe_bytes}: must be above 0")
    if options.dict is not None and options.dict_size is not None:
        raise UserError("--dict-size: not together with --dict, which has its own size")
    if options.dict_size is not None:  # and of the tokenizer, when it is known
        dictionary.check_types(options.dict_size, NUM_BYTES)
    if options.dict is None and all(corpus.held_out for corpus in options.corpora):
        raise UserError(
            "--dict: missing; without a --corpus to train on, give the model's dict.txt"
        )
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
    if not 1 <= options.workers <= MAX_WORKERS:
        raise UserError(f"--workers {options.workers}: must be at least 1, at most {MAX_WORKERS}")
    if not -(2**63) <= options.split_seed < 2**63:
        raise UserError(f"--split-seed {options.split_seed}: must fit into 64 bits")


def _prepare(folder: Path, options: Options) -> Report:
    todo = {corpus.name: _deals(corpus, options) for corpus in options.corpora}
    bpe = _tokenizer(folder, options, todo)
    given = None if options.dict is None else dictionary.read(options.dict, len(bpe))
    if options.dict_size is not None:
        dictionary.check_types(options.dict_size, len(bpe))
    writers: Dict[str, Dict[str, SplitWriter]] = {}
    files = (folder / ENCODER_FILE, folder / MERGES_FILE)
    with Encoders(*files, options.workers) as encoders:
        for corpus in options.corpora:
            (folder / corpus.name).mkdir()
            writers[corpus.name] = _encode(corpus, todo, folder, bpe.newline, encoders, options)
    lines = given or dictionary.build(_training_counts(writers, bpe), options.dict_size)
    table = dictionary.lookup(lines, len(bpe))
    types = dictionary.NUM_SPECIAL + len(lines)
    report: Report = {"bpe_types": len(bpe), "types": types, "corpora": {}}
    for corpus in options.corpora:
        for writer in writers[corpus.name].values():
            writer.finish(table, dtype_of(types))
        report["corpora"][corpus.name] = {
            "held_out": corpus.held_out,
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


def _source(corpus: Corpus, options: Options) -> Source:
    return replace(options.source, format=corpus.format or options.source.format)


def _deals(corpus: Corpus, options: Options) -> Parts:
    """A corpus's files, each list with the rule that deals its documents out."""
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
    share = min(1.0, options.train_bpe_bytes / max(1, size))
    with _progress("reading for the BPE", size) as bar:
        documents = training_documents(sources, share, bar.update)
        types = train_bpe(documents, options.train_bpe, folder)
    if types < options.train_bpe:
        print(
            f"--train-bpe {options.train_bpe}: {types} types learned; no other pair of tokens "
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
) -> Dict[str, SplitWriter]:
    """Encode one corpus; its splits, each with at least one document."""
    found: Dict[str, SplitWriter] = {}
    parts = todo[corpus.name]
    with _progress(f"encoding {corpus.name}", sum(_size(files) for files, _, _ in parts)) as bar:
        for files, source, deal in parts:
            for encoded in encoders.encode(chunks(files, source, deal)):
                for split, part in encoded.splits.items():
                    if split not in found:
                        found[split] = SplitWriter(folder / corpus.name / split, newline)
                    found[split].add(part)
                bar.update(encoded.read)
    for writer in found.values():
        writer.close()
    _check_splits(corpus, found, options)
    return {split: found[split] for split in data_bin.SPLITS if split in found}


def _check_splits(corpus: Corpus, found: Dict[str, SplitWriter], options: Options) -> None:
    """Raise UserError for a corpus or a split that was asked for and has no document."""
    flag = corpus.flag
    documents = sum(writer.documents for writer in found.values())
    if not documents:
        number = sum(len(files) for files in corpus.files.values())
        raise UserError(f"{flag}: empty; no document in its {number} file(s)")
    for split in corpus.files:
        if split is not None and split not in found:
            raise UserError(f"{flag}:{split}: empty; no document in its files")
    if None not in corpus.files:
        return
    if not corpus.held_out and "train" not in found:
        raise UserError(f"{flag}: none of its {documents} document(s) fell into train; add text")
    for split, fraction in (("valid", options.valid_fraction), ("test", options.test_fraction)):
        if fraction > 0 and split not in found:
            raise UserError(
                f"{flag}: none of its {documents} document(s) fell into {split}; raise "
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


def format_table(report: Report) -> str:
    """The counts as a table; a column for `<unk>` only if there are any."""
    columns = ["documents", "lines", "tokens", "unknown", "bytes"]
    rows = []
    for name, corpus in report["corpora"].items():
        for split in data_bin.SPLITS:
            if split in corpus:
                note = " (held out)" if corpus["held_out"] else ""
                rows.append((name + note, split, corpus[split]))
    if not any(counts["unknown"] for _, _, counts in rows):
        columns.remove("unknown")
    cells = [["corpus", "split", *columns, "bytes/token"]]
    for name, split, counts in rows:
        numbers = [f"{counts[column]:,}" for column in columns]
        cells.append([name, split, *numbers, f"{counts['bytes'] / counts['tokens']:.2f}"])
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    lines = []
    for row in cells:
        left = [cell.ljust(width) for cell, width in zip(row[:2], widths[:2])]
        right = [cell.rjust(width) for cell, width in zip(row[2:], widths[2:])]
        lines.append("  ".join(left + right).rstrip())
    return "\n".join(lines)


def _progress(what: str, total: int) -> tqdm:
    # shown on a terminal only: in a log file it would be one line after the other
    if not sys.stderr.isatty():
        print(f"{what}: {total / 1e6:.1f} MB", file=sys.stderr, flush=True)
    return tqdm(total=total, desc=what, unit="B", unit_scale=True, disable=None)


def _size(files: List[Path]) -> int:
    return sum(path.stat().st_size for path in files)


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
