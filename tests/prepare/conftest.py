import random

import pytest

from fairseq_moe_ext.prepare.tokenizer import train_bpe

WORDS = (
    "the a of to and in language model models token tokens text corpus paper it's we're I'm don't "
    "expert experts gate router 2021 1984 3.14 def return import self None True naïve café über "
    "日本語 中文 привет мир שלום 😀 👩‍👩‍👧 e\u0301 \t x=1; // -- ... !? (a) [b] {c} <d>"
).split(" ")


def make_document(rng: random.Random, lines: int) -> str:
    """A few lines of words, some with white space at the ends, none of them blank."""
    made = []
    for _ in range(lines):
        words = rng.choices(WORDS, k=rng.randint(1, 12))
        made.append(rng.choice(["", " ", "    ", "\t"]) + " ".join(words) + rng.choice(["", " "]))
    return "\n".join(line if not line.isspace() else "x" for line in made).strip("\n")


@pytest.fixture(scope="session")
def documents():
    rng = random.Random(1)
    return [make_document(rng, rng.randint(1, 6)) for _ in range(400)]


@pytest.fixture(scope="session")
def bpe_folder(tmp_path_factory, documents):
    """A folder with encoder.json and vocab.bpe of 400 tokens, trained on `documents`."""
    folder = tmp_path_factory.mktemp("bpe")
    assert train_bpe(documents, 400, folder) == 400
    return folder
