"""A data-bin for studies of small models."""

import random

import pytest

from fairseq_moe_ext.prepare.command import Options, parse_corpora, prepare


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    rng = random.Random(0)
    for name in ("near", "far"):
        lines = [" ".join(f"{name}{rng.randint(0, 20)}" for _ in range(8)) for _ in range(60)]
        (folder / f"{name}.txt").write_text("\n".join(f"{line}\n" for line in lines))
    text = [f"{name}={folder}/{name}.txt" for name in ("near", "far")]
    corpora = parse_corpora(text[:1], text[1:])
    options = Options(corpora=corpora, train_bpe=288, valid_fraction=0.2, test_fraction=0.3)
    prepare(folder / "data", options)
    return folder
