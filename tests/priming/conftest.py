"""A small MoE model with a tokenizer, trained for a few updates, and files of every task."""

import random

import pytest
from training import fairseq

import fairseq_moe_ext
from fairseq_moe_ext.prepare.command import Options, parse_corpora, prepare

CONTEXT = 64


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """(folder with dict.txt, encoder.json and vocab.bpe, checkpoint)."""
    folder = tmp_path_factory.mktemp("priming")
    rng = random.Random(0)
    for split in ("train", "valid"):
        lines = [" ".join(f"w{rng.randint(0, 20)} it was" for _ in range(4)) for _ in range(60)]
        (folder / f"{split}.txt").write_text("\n".join(f"{line}.\n" for line in lines))
    corpora = parse_corpora([f"c:{split}={folder / split}.txt" for split in ("train", "valid")], [])
    prepare(folder / "data", Options(corpora=corpora, train_bpe=300))
    line = f"""fairseq-train {folder / "data"} --task mixture_language_modeling --arch moe_lm_tiny
        --user-dir {fairseq_moe_ext.__path__[0]} --criterion moe_cross_entropy
        --decoder-layers 2 --decoder-embed-dim 16 --decoder-ffn-embed-dim 32 --max-update 5
        --decoder-attention-heads 2 --tokens-per-sample {CONTEXT} --batch-size 4 --optimizer adam
        --lr 0.01 --cpu --num-workers 0 --save-dir {folder / "model"}"""
    fairseq(line)
    return folder / "data", folder / "model" / "checkpoint_best.pt"
