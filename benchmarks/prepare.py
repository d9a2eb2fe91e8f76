"""`fairseq-moe prepare` against Hugging Face `tokenizers` alone and `fairseq-preprocess`.

    python benchmarks/prepare.py [--megabytes 24] [--rounds 3]

Python's library as text, a byte-level BPE of 8,000 tokens learned from it. Commands are timed as
they are called, start-up included; `tokenizers` without reading and writing, and in this process.
All may use two cores; `prepare` uses one for each 25 MB of text. Commands run under
OMP_NUM_THREADS=1.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Callable, Dict, List

import measure

VOCABULARY = 8000
CORES = 2
TRAINING = "learn a BPE: "  # cases that have their own floor, and are compared with each other


def megabytes(text: str) -> float:
    """For a flag. Raises argparse.ArgumentTypeError for text that is no such number."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.01 <= value <= 1000:
        raise argparse.ArgumentTypeError(f"{text!r}: use a number from 0.01 to 1000")
    return value


def make_text(path: Path, most: int) -> int:
    """Files of Python's library, blank lines between them, in one; returns its bytes."""
    size = 0
    with open(path, "wb") as out:
        for file in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
            text = file.read_bytes()
            if "site-packages" in file.parts or not _is_utf8(text):
                continue
            size += out.write(text + b"\n\n")
            if size >= most:
                break
    return size


def _is_utf8(data: bytes) -> bool:
    try:
        return bool(data.decode("utf-8"))
    except UnicodeDecodeError:
        return False


def command(name: str, *arguments: object) -> None:
    program = str(Path(sys.executable).parent / name)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [program, *map(str, arguments)], check=True, env=environment, capture_output=True
    )


class Work:
    """A text, its vocabulary, the same text in words for `fairseq-preprocess`, and what is done
    with them."""

    def __init__(self, folder: Path, most: int) -> None:
        self.folder, self.text = folder, folder / "text.txt"
        self.bytes = make_text(self.text, most)
        if self.bytes < most:
            there = f"Python's library has {self.bytes / 1e6:.1f}"
            raise SystemExit(f"--megabytes {most / 1e6:g}: {there}; use fewer")
        self.prepare("first", "--train-bpe", VOCABULARY)
        self.files = [folder / "first" / name for name in ("encoder.json", "vocab.bpe")]
        self.words, self.dictionary = folder / "words.txt", folder / "first" / "dict.txt"
        from fairseq_moe_ext.prepare.tokenizer import ByteLevelBPE

        bpe = ByteLevelBPE.from_files(*self.files)
        with open(self.words, "w", encoding="utf-8") as out:
            for line in self.text.read_text(encoding="utf-8").splitlines():
                out.write(" ".join(map(str, bpe.encode(line))) + "\n")
        self.documents = self.text.read_text(encoding="utf-8").split("\n\n")
        (self.bin,) = (folder / "first").rglob("train.bin")

    def prepare(self, name: str, *flags: object) -> None:
        data = self._new(name)
        command("fairseq-moe", "prepare", data, "--corpus", f"text:train={self.text}", *flags)

    def ours(self) -> None:
        encoder, merges = self.files
        flags = ("--gpt2-encoder-json", encoder, "--gpt2-vocab-bpe", merges, "--workers", CORES)
        self.prepare("ours", *flags)

    def tokenizers(self) -> List[List[int]]:
        """A batch of all documents; encode_batch_fast computes no offsets."""
        from tokenizers import Tokenizer, models, pre_tokenizers

        tokenizer = Tokenizer(models.BPE.from_file(*map(str, self.files)))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        encode = getattr(tokenizer, "encode_batch_fast", tokenizer.encode_batch)
        return [encoding.ids for encoding in encode(self.documents)]

    def preprocess(self) -> None:
        command(
            "fairseq-preprocess", "--only-source", "--trainpref", self.words,
            "--srcdict", self.dictionary, "--destdir", self._new("theirs"), "--workers", CORES,
        )  # fmt: skip

    def learn(self) -> None:
        self.prepare("learned", "--train-bpe", VOCABULARY, "--workers", CORES)

    def learn_by_tokenizers(self) -> None:
        from tokenizers import Tokenizer, models, pre_tokenizers, trainers

        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=VOCABULARY, initial_alphabet=alphabet, show_progress=False
        )
        tokenizer.train_from_iterator(self.documents, trainer)

    def copy(self) -> None:
        """The floor: read the text, write as many bytes as ours writes."""
        self.text.read_bytes()
        with open(self.folder / "copy", "wb") as out:
            out.write(bytes(self.bin.stat().st_size))

    def _new(self, name: str) -> Path:
        shutil.rmtree(self.folder / name, ignore_errors=True)
        return self.folder / name


def measured(most: int, rounds: int) -> Dict[str, Dict[str, float]]:
    with tempfile.TemporaryDirectory() as folder:
        work = Work(Path(folder), most)
        cases: Dict[str, Callable[[], object]] = {
            "tokenizers alone": work.tokenizers,
            "fairseq-moe prepare": work.ours,
            "fairseq-preprocess, of tokenised text": work.preprocess,
            "read and write": work.copy,
            f"{TRAINING}tokenizers alone": work.learn_by_tokenizers,
            f"{TRAINING}fairseq-moe prepare --train-bpe, encoding included": work.learn,
        }
        spent: Dict[str, List[float]] = {name: [] for name in cases}
        timed = {name: _counting(case, spent[name]) for name, case in cases.items()}
        seconds = measure.in_turn(timed, rounds, warmup=1)
    rows = {}
    for name in cases:
        base = f"{TRAINING}tokenizers alone" if TRAINING in name else "tokenizers alone"
        cpu = {each: found[1:] for each, found in spent.items()}  # without the warm-up
        rows[f"{most / 1e6:g} MB: {name}"] = {
            "mb_per_second": round(work.bytes / 1e6 / measure.median(seconds[name]), 2),
            "speed": round(1 / measure.ratio(seconds, name, base), 3),
            "mb_per_cpu_second": round(work.bytes / 1e6 / measure.median(cpu[name]), 2),
            "by_cpu": round(1 / measure.ratio(cpu, name, base), 3),
        }
    return measure.keep("prepare", rows)


def _counting(work: Callable[[], object], spent: List[float]) -> Callable[[], None]:
    """`work`, which adds to `spent` the processor's seconds that it and its processes took."""

    def run() -> None:
        before = sum(os.times()[:4])
        work()
        spent.append(max(0.01, sum(os.times()[:4]) - before))  # counted in hundredths

    return run


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.split("\n\n")[0])
    parser.add_argument("--megabytes", type=megabytes, default=24)
    parser.add_argument("--rounds", type=measure.count, default=3)
    args = parser.parse_args()
    rows = measured(int(args.megabytes * 1e6), args.rounds)
    measure.keep_table(
        "prepare",
        f"Text to tokens: so many MB of Python source, a vocabulary of {VOCABULARY}. MB of text a "
        "second; speed against `tokenizers` alone, which neither reads nor writes files. "
        "By CPU: the same of the processor's seconds, of all threads and processes.",
        ["case", "MB/s", "speed", "MB per CPU second", "speed by CPU"],
        [
            [k, f"{row['mb_per_second']:g}", f"{row['speed']:.2f}"]
            + [f"{row['mb_per_cpu_second']:g}", f"{row['by_cpu']:.2f}"]
            for k, row in rows.items()
        ],
    )


if __name__ == "__main__":
    main()
