"""Published laws against numbers printed elsewhere or computed here by hand."""

import math

import pytest

from fairseq_moe_ext.evaluation import paper
from fairseq_moe_ext.forecast import command
from fairseq_moe_ext.forecast.laws import LAWS, Model, Range, number, outside, saturate, unknown

# millions of effective parameters, and multiple of the base, for 8, 16, 32, 64, 128, 512 experts
PRINTED = {
    "1M, S-BASE": "2.84 (2.8)  4.33 (4.3)  6.59 (6.6)  9.84 (9.8)  14.1 (14)  23.6 (24)",
    "1M, hash": "2.17 (2.2)  3.31 (3.3)  5.25 (5.3)  8.41 (8.4)  13.2 (13)  26.7 (27)",
    "5M, S-BASE": "12.6 (2.5)  18.2 (3.6)  26.4 (5.3)  37.7 (7.5)  51.8 (10)  81.6 (16)",
    "5M, hash": "9.81 (2.0)  14.1 (2.8)  21.1 (4.2)  31.8 (6.4)  47.0 (9.4)  86.9 (17)",
    "15M, S-BASE": "34.7 (2.3)  48.7 (3.2)  68.3 (4.6)  94.3 (6.3)  126 (8.4)  190 (13)",
    "15M, hash": "27.5 (1.8)  38.1 (2.5)  54.6 (3.6)  78.9 (5.3)  112 (7.5)  194 (13)",
    "50M, S-BASE": "106 (2.1)  143 (2.9)  193 (3.9)  258 (5.2)  333 (6.7)  482 (9.6)",
    "50M, hash": "84.8 (1.7)  113 (2.3)  155 (3.1)  213 (4.3)  290 (5.8)  469 (9.4)",
    "125M, S-BASE": "247 (2.0)  324 (2.6)  426 (3.4)  553 (4.4)  699 (5.6)  977 (7.8)",
    "125M, hash": "200 (1.6)  258 (2.1)  342 (2.7)  455 (3.6)  598 (4.8)  918 (7.3)",
}


def test_clark_table():
    _, *rows = command.table()
    assert {row[0]: "  ".join(row[1:]) for row in rows} == PRINTED


def test_the_papers_smallest_model():
    """Figure 1 of Artetxe et al. shows 7.9 for it: the dense model's FLOPs over its own, which have
    two experts per token. To compare is therefore the saving, not the multiple of the base."""
    model = Model(125e6, 512, 300e9, top_k=2)
    assert LAWS["s-base"].effective(model) / model.base == pytest.approx(7.82, abs=0.005)
    assert LAWS["s-base"].effective(model) / model.active == pytest.approx(5.86, abs=0.005)
    dense, factor = paper.FIGURE_1["in_domain"][0]
    assert dense / paper.MOE_ZFLOPS[0] == pytest.approx(factor, abs=0.05)
    assert dense / paper.DENSE_ZFLOPS[0] == pytest.approx(9.4, abs=0.05)


@pytest.mark.parametrize(
    "law, experts, saving",
    [
        ("ludziejewski", 8, 0.93),
        ("ludziejewski", 64, 0.69),
        ("abnar", 8, 3.4),
        ("abnar", 64, 8.4),
        ("krajewski", 64, 13),
    ],
)
def test_a_small_model_in_all_layers(law, experts, saving):
    """What the project's notes computed for 5M parameters and 60M tokens."""
    found = LAWS[law].effective(Model(5e6, experts, 60e6, layers=1.0)) / 5e6
    assert found == pytest.approx(saving, rel=0.02)


@pytest.mark.parametrize("law", ["s-base", "rl", "hash", "ludziejewski"])
def test_one_expert_is_the_dense_base(law):
    assert LAWS[law].effective(Model(125e6, 1, 130e9)) == pytest.approx(125e6)


def test_saturation():
    assert saturate(1, 1.847, 314.478) == pytest.approx(1.847)
    assert saturate(1e12, 1.847, 314.478) == pytest.approx(314.478, rel=1e-6)


def test_sizes_of_a_sparse_model():
    """Half the layers sparse, 512 experts, top-2, as in the paper's Table 1 without embeddings."""
    model = Model(base=12 * 12 * 768**2, experts=512, tokens=1, top_k=2)
    expert = 8 * 768**2
    assert model.total == pytest.approx(12 * 12 * 768**2 + 6 * 511 * expert)
    assert model.active == pytest.approx(12 * 12 * 768**2 + 6 * expert)


def test_what_lies_outside():
    law = LAWS["s-base"]
    assert outside(law, Model(125e6, 512, 130e9)) == []
    words = "; ".join(outside(law, Model(5e6, 1024, 60e6, top_k=2, layers=1.0)))
    for said in ("base parameters 5M", "experts 1,024", "tokens 60M", "experts per token 2"):
        assert said in words
    assert outside(law._replace(ranges=(Range("base", 0, 1e6),)), Model(5e6, 2, 1)) == [
        "base parameters 5M (fitted up to 1M)"
    ]


@pytest.mark.parametrize("law", LAWS)
def test_a_quantity_that_a_law_does_not_count_is_outside_its_range(law):
    """What it was fitted at, where no other value changes what it says."""
    model = Model(125e6, 64, 130e9)
    for quantity, other in (("granularity", 4.0), ("layers", 1.0), ("top_k", 2)):
        changed = model._replace(**{quantity: other})
        if LAWS[law].effective(changed) == LAWS[law].effective(model):
            assert len(outside(LAWS[law], changed)) == 1 + len(outside(LAWS[law], model)), quantity


def test_what_is_not_known_of_a_range():
    law = LAWS["abnar"]
    for ranges, missing in (
        ((), ["size", "experts"]),
        ((Range("total", 1, 2),), ["experts"]),
        ((Range("total", 0, 2), Range("active", 0, 2)), ["smallest size", "experts"]),
        ((Range("base", 0, 2), Range("active", 1, 2), Range("experts", 1, 2)), []),
    ):
        assert unknown(law._replace(ranges=ranges)) == missing


def test_numbers_in_words():
    assert [number(x) for x in (977e6, 999.9e6, 1.3e9, 3e12, 64, 0.5)] == [
        *("977M", "1B", "1.3B", "3T", "64", "0.5")
    ]
    assert math.isclose(command.amount("5.2B"), 5.2e9)
