"""Assign a document to train, valid or test by its text."""

import hashlib
from dataclasses import dataclass


@dataclass(frozen=True)
class SplitRule:
    """Splits documents by a hash of their text.

    So a document's split depends neither on the order of the files nor on the number of workers,
    and stays the same when documents are added. Copies of a document that have one rule are
    always in one split.

    valid, test: the shares of documents, in expectation; the rest is train.
    held_out: no train split; the documents go to valid and test in the proportion of the two.
    """

    valid: float
    test: float
    seed: int
    held_out: bool = False

    def __call__(self, document: str) -> str:
        """The split ("train", "valid" or "test") of `document`."""
        total = self.valid + self.test if self.held_out else 1.0
        key = self.seed.to_bytes(8, "little", signed=True)
        digest = hashlib.blake2b(document.encode("utf-8"), digest_size=8, key=key).digest()
        draw = int.from_bytes(digest, "little") / 2**64 * total
        if draw < self.valid:
            return "valid"
        if self.held_out or draw < self.valid + self.test:
            return "test"
        return "train"
