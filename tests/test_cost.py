"""Costs against the paper's Table 1 and against built models."""

import pytest

from fairseq_moe_ext.cost import Shape, parameters, training_flops_per_token

# layers, dim, ZFLOPs of 300e9 tokens: paper.md, "Models" and "Cost"
DENSE = [(12, 768, 0.36), (24, 1024, 1.06), (24, 2048, 3.57), (32, 2560, 7.08)]
DENSE += [(32, 4096, 17.12), (40, 5120, 32.67), (24, 1536, 2.13), (96, 12288, 430.17)]
SPARSE = [(12, 768, 0.43), (24, 1024, 1.30), (24, 2048, 4.53), (32, 4096, 22.27)]


@pytest.mark.parametrize("layers, dim, printed", DENSE)
def test_table_1_dense(layers, dim, printed):
    shape = Shape(layers, dim, 4 * dim, types=50_000)
    flops = 300e9 * training_flops_per_token(shape, context=2048, recompute=True)
    assert round(flops / 1e21, 2) == printed


@pytest.mark.parametrize("layers, dim, printed", SPARSE)
def test_table_1_sparse(layers, dim, printed):
    shape = Shape(layers, dim, 4 * dim, types=50_000, moe_freq=2, experts=512)
    flops = 300e9 * training_flops_per_token(shape, context=2048, recompute=True)
    assert round(flops / 1e21, 2) == printed


def test_a_twin_has_equal_flops_and_its_own_parameters():
    moe = Shape(4, 128, 512, types=5000, moe_freq=2, experts=8)
    twin = moe._replace(experts=0, alternate_ffn_dim=1024)
    assert training_flops_per_token(moe, 256) == training_flops_per_token(twin, 256)
    assert parameters(twin).expert == 0
    assert parameters(twin).active == parameters(twin).total
    # the gates (128 x 8) and the two experts' second output bias are all that differs
    difference = parameters(moe).active - parameters(twin).active
    assert difference == 2 * (128 * 8 + 128)
