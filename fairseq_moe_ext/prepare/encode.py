"""Documents to token ids per split, on all cores, in order.

The main process reads documents and distributes them in chunks. Workers assign a chunk's documents
to splits and encode them; results come back in the order of the chunks. So the output does not
depend on the number of workers, and only a few chunks are in memory.
"""

import hashlib
import multiprocessing
import os
import signal
import threading
from collections import deque
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path
from typing import Callable, Deque, Dict, Iterable, Iterator, List, Optional, Set, Tuple

import numpy as np

from ..errors import UserError
from .documents import Source, read_documents
from .tokenizer import ByteLevelBPE

CHUNK_CHARACTERS = 1 << 20
WORKER_BYTES = 25_000_000  # encoding them takes twice as long as starting a process

Deal = Callable[[str], str]  # document -> split


@dataclass
class Chunk:
    """Documents on their way to a worker."""

    documents: List[str]
    deal: Deal
    read: int  # bytes of files read since the chunk before, for the progress bar


@dataclass
class EncodedSplit:
    """The documents of one chunk that belong to one split, joined with blank lines.

    ids: (tokens,) uint32 BPE ids, with the newline id N wherever a line ends, the last one too.
    sizes: (lines,) int32, tokens per line, its newline counted.
    """

    ids: np.ndarray
    sizes: np.ndarray
    documents: int
    bytes: int  # UTF-8, a newline after every line


@dataclass
class EncodedChunk:
    splits: Dict[str, EncodedSplit]
    read: int


class Duplicates:
    """Which documents were there before, exactly; 16 bytes are kept of each."""

    def __init__(self) -> None:
        self._seen: Set[bytes] = set()
        self.number = 0

    def has(self, document: str) -> bool:
        """Whether the document was asked for before."""
        digest = hashlib.blake2b(document.encode("utf-8"), digest_size=16).digest()
        if digest in self._seen:
            self.number += 1
            return True
        self._seen.add(digest)
        return False


def chunks(
    files: Iterable[Path], source: Source, deal: Deal, duplicates: Optional[Duplicates] = None
) -> Iterator[Chunk]:
    """The documents of `files`, CHUNK_CHARACTERS or a little more of them at a time, without those
    that `duplicates` has."""
    documents: List[str] = []
    characters = 0
    counted = 0  # bytes of files already reported
    finished = 0  # bytes of the files before this one
    for path in files:
        for document, position in read_documents(path, source):
            if duplicates is not None and duplicates.has(document):
                continue
            documents.append(document)
            characters += len(document)
            if characters >= CHUNK_CHARACTERS:
                yield Chunk(documents, deal, finished + position - counted)
                counted = finished + position
                documents, characters = [], 0
        finished += path.stat().st_size
    yield Chunk(documents, deal, finished - counted)


def encode_chunk(bpe: ByteLevelBPE, chunk: Chunk) -> EncodedChunk:
    """Assign the chunk's documents to splits and encode them."""
    dealt: Dict[str, List[str]] = {}
    for document in chunk.documents:
        dealt.setdefault(chunk.deal(document), []).append(document)
    splits = {}
    for split, documents in dealt.items():
        text = "\n\n".join(documents) + "\n"
        ids = np.array(bpe.encode(text), dtype=np.uint32)  # (tokens,)
        ends = np.flatnonzero(ids == bpe.newline)  # (lines,)
        sizes = np.diff(ends, prepend=-1).astype(np.int32)  # (lines,)
        splits[split] = EncodedSplit(ids, sizes, len(documents), len(text.encode("utf-8")))
    return EncodedChunk(splits, chunk.read)


class Encoders:
    """Worker processes that encode chunks; with one worker, this process does it.

    A context manager: leaving it, also by an exception, ends the workers.
    """

    def __init__(self, encoder_json: Path, vocab_bpe: Path, workers: int):
        self._files = (encoder_json, vocab_bpe)
        self._workers = workers
        self._pool: Optional[ProcessPoolExecutor] = None
        self._bpe: Optional[ByteLevelBPE] = None

    def __enter__(self) -> "Encoders":
        if self._workers > 1:
            # spawn: this process may have threads (the progress bar's, those that trained the
            # BPE), and a fork of it could hang
            self._pool = ProcessPoolExecutor(
                self._workers,
                mp_context=multiprocessing.get_context("spawn"),
                initializer=_start_worker,
                initargs=self._files,
            )
        else:
            self._bpe = ByteLevelBPE.from_files(*self._files)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def encode(self, todo: Iterable[Chunk]) -> Iterator[EncodedChunk]:
        """The chunks encoded, in order. Raises UserError if a worker was killed."""
        if self._pool is None:
            assert self._bpe is not None, "Encoders is used as a context manager"
            for chunk in todo:
                yield encode_chunk(self._bpe, chunk)
            return
        try:
            yield from self._by_workers(self._pool, todo)
        except BrokenProcessPool as error:
            raise UserError(
                f"--workers: one of {self._workers} processes was killed, probably for lack of "
                f"memory: use fewer than {self._workers}"
            ) from error

    def _by_workers(
        self, pool: ProcessPoolExecutor, todo: Iterable[Chunk]
    ) -> Iterator[EncodedChunk]:
        running: Deque[Future[EncodedChunk]] = deque()
        for chunk in todo:
            running.append(pool.submit(_work, chunk))
            if len(running) > 2 * self._workers:  # bounds memory
                yield running.popleft().result()
        while running:
            yield running.popleft().result()


_worker_bpe: List[ByteLevelBPE] = []  # one, in a worker process


def _start_worker(encoder_json: Path, vocab_bpe: Path) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C: the main process ends the workers
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker_bpe.append(ByteLevelBPE.from_files(encoder_json, vocab_bpe))


def _end_with_parent() -> None:
    """End this worker if the main process was killed. The queues between them do not notice,
    because the workers hold both ends."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)


def _work(chunk: Chunk) -> EncodedChunk:
    return encode_chunk(_worker_bpe[0], chunk)


def training_documents(
    parts: Iterable[Tuple[Iterable[Path], Source, Deal]],
    share: float,
    most: float,
    progress: Callable[[int], object],
    duplicates: Optional[Duplicates] = None,
) -> Iterator[str]:
    """The train documents of several corpora to learn a BPE from: an even sample of the share
    `share`, and at most about `most` bytes of text per byte of the files, which may be
    compressed."""
    due, left = 0.0, 0.0
    for files, source, deal in parts:
        for chunk in chunks(files, source, deal, duplicates):
            documents = [document for document in chunk.documents if deal(document) == "train"]
            sizes = [len(document.encode("utf-8")) for document in documents]
            left += most * chunk.read
            rate = min(share, max(0.0, left) / max(1, sum(sizes)))
            for document, size in zip(documents, sizes):
                due += rate
                if due >= 1:
                    due -= 1
                    left -= size
                    yield document
            progress(chunk.read)
