"""The computed figures of docs/scaling.md."""

import re
from pathlib import Path

import pytest

from fairseq_moe_ext.cost import Shape, parameters, training_flops_per_token
from fairseq_moe_ext.models.architectures import ARCHITECTURES

PAGE = (Path(__file__).parents[1] / "docs" / "scaling.md").read_text(encoding="utf-8")
GPUS, TOKENS = 512, 2048


def rows(start):
    """name -> the numbers of its row, in the table that follows some words."""
    table = PAGE[PAGE.index(start) :].split("\n\n")[2]
    found = {}
    for line in table.splitlines():
        name, *cells = [cell.strip() for cell in line.strip("| ").split("|")]
        if name.startswith("`"):
            found[name.strip("`")] = [float(re.match(r"[\d.]+", cell)[0]) for cell in cells]
    return found


def shape_of(name):
    flags = ARCHITECTURES[name]
    return Shape(
        flags["decoder_layers"],
        flags["decoder_embed_dim"],
        flags["decoder_ffn_embed_dim"],
        vocabulary=51_200,
        moe_freq=2,
        experts=512,
    )


def test_memory():
    table = rows("## Memory")
    assert len(table) == 4
    for name, (gpus, expert, expert_gb, shared, shared_gb, sharded_gb) in table.items():
        count = parameters(shape_of(name))
        assert gpus == GPUS
        assert expert == pytest.approx(count.expert / GPUS / 1e6, abs=0.05)
        assert expert_gb == pytest.approx(12 * count.expert / GPUS / 1e9, rel=0.03)
        assert shared == pytest.approx(count.shared / 1e6, abs=0.05)
        assert shared_gb == pytest.approx(12 * count.shared / 1e9, rel=0.03)
        assert sharded_gb == pytest.approx(12 * count.shared / GPUS / 1e9, abs=5e-4)


def test_sharding_of_the_largest():
    shape = shape_of("moe_lm_1_1t")
    shared = parameters(shape).shared
    layer = 4 * shape.dim * (shape.dim + 1) + shape.ffn_dim * (2 * shape.dim + 1) + 5 * shape.dim
    at_a_time = 2 * 2 * (51_200 * shape.dim + layer)  # parameters and gradients, 2 bytes each
    text = PAGE.replace("\n", " ")
    assert f"{at_a_time / 1e9:.1f} GB in `moe_lm_1_1t`" in text
    assert f"= {3 * 2 * shared / 1e9:.1f} GB for each batch" in text
    assert f"= {4 * shared / 1e9:.1f} GB for each update" in text
    assert f"{3 * 2 * shared / 20e9:.1f} s, as long as" in text


def test_bytes_and_flops():
    table = rows("## Bytes")
    assert len(table) == 4
    for name, (exchange, step, flops) in table.items():
        shape = shape_of(name)._replace(vocabulary=50_000)
        sent = TOKENS * 2 * shape.dim * 2
        assert exchange == pytest.approx(sent / 1e6, abs=0.06)
        assert step == pytest.approx(6 * len(shape.sparse) * sent / 1e9, abs=0.006)
        per_token = training_flops_per_token(shape, 2048, recompute=True)
        assert flops == pytest.approx(TOKENS * per_token / 1e12, abs=0.06)


@pytest.mark.parametrize("name", ["moe_lm_1_1t", "moe_lm_15b"])
def test_expectation(name):
    _, step, flops = rows("## Bytes")[name]
    compute, exchange = flops / 125, step / 20
    text = PAGE[PAGE.index("## What to expect") :].replace("\n", " ")
    digits = 2 if name == "moe_lm_1_1t" else 3
    share = round(100 * compute / (compute + exchange))
    assert f"{compute:.{digits}f} s and" in text or f"for {compute:.{digits}f} s" in text
    assert f"{exchange:.{digits}f} s" in text and f"{share} %" in text
