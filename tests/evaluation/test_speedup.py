"""The speed-up factor against the paper's figures and against hand-computed cases."""

import math

import pytest

from fairseq_moe_ext.errors import UserError
from fairseq_moe_ext.evaluation import paper
from fairseq_moe_ext.evaluation.speedup import cost_to_reach, overlap, speedup_factors

# paper.md, "Speed-up factor": perplexities of figure 2, factors of figure 1
DENSE_COST = [0.36, 1.06, 3.57, 7.08, 17.12, 32.67]
MOE_COST = [0.43, 1.30, 4.53, 22.27]
PERPLEXITY = {
    "in_domain": (
        [20.63, 15.13, 12.46, 10.90, 9.81, 8.96],
        [12.56, 9.58, 8.74, 6.79],
        [(3.4, 7.9), (7.1, 8.9), (17.1, 14.4), (20.4, 15.8), (32.7, 10.0)],
    ),
    "out_of_domain": (
        [21.21, 15.48, 12.36, 10.97, 10.04, 9.37],
        [13.96, 11.39, 10.27, 9.09],
        [(1.9, 4.4), (3.6, 4.2), (7.1, 3.4), (17.1, 2.75), (32.7, 2.2)],
    ),
}


def assert_factors(dense, moe, printed, rising=False):
    """That performances of the paper's models give its printed (cost, factor)."""
    found = speedup_factors(list(zip(DENSE_COST, dense)), list(zip(MOE_COST, moe)), rising)
    for cost, factor in printed:
        nearest = min(found, key=lambda f: abs(math.log(f.dense_cost / cost)))
        assert nearest.dense_cost == pytest.approx(cost, rel=0.04)
        assert nearest.factor == pytest.approx(factor, rel=0.04)


@pytest.mark.parametrize("where", PERPLEXITY)
def test_figure_2_gives_figure_1(where):
    dense, moe, printed = PERPLEXITY[where]
    assert_factors(dense, moe, printed)
    assert paper.FIGURE_2[where] == {"dense": dense, "moe": moe}
    assert paper.FIGURE_1[where] == printed
    assert (paper.DENSE_ZFLOPS, paper.MOE_ZFLOPS) == (DENSE_COST, MOE_COST)


def test_zero_shot_means_give_their_curve_of_figure_1():
    """paper.md, "Priming protocol" and "Speed-up factor"."""
    dense, moe = [53.6, 60.4, 66.8, 69.6, 72.2, 74.2], [62.4, 68.2, 70.8, 75.0]
    printed = [(1.55, 3.6), (5.05, 3.9), (7.1, 2.8), (17.1, 2.3), (32.7, 2.05)]
    assert_factors(dense, moe, printed, rising=True)
    assert paper.ZERO_SHOT == {"dense": dense, "moe": moe}
    assert paper.FIGURE_1["0-shot"] == printed


def test_half_way_in_performance_is_half_way_in_the_logarithm_of_cost():
    family = [(1.0, 30.0), (100.0, 10.0)]
    assert cost_to_reach(family, 20.0) == pytest.approx(10.0)
    assert cost_to_reach(family, 30.0) == 1.0 and cost_to_reach(family, 10.0) == 100.0
    assert cost_to_reach(family, 9.9) is None and cost_to_reach(family, 30.1) is None
    accuracy = [(1.0, 50.0), (100.0, 70.0)]
    assert cost_to_reach(accuracy, 60.0, rising=True) == pytest.approx(10.0)


def test_a_larger_model_that_is_worse_costs_no_one_anything():
    assert cost_to_reach([(1, 30.0), (4, 10.0), (16, 20.0), (64, 5.0)], 20.0) == pytest.approx(2.0)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(
    "family, reached, cost",
    [
        ([(1, 90), (2, 95), (10, 80)], 92, None),  # the cheapest is better already
        ([(1, 90), (2, 95), (10, 80)], 95, None),
        ([(1, 90), (2, 95), (10, 80)], 90, 1),
        ([(1, 90), (2, 95), (100, 80)], 85, 10),  # half way between 1 and 100
        ([(1, 90), (4, 70), (9, 80), (64, 50)], 60, 16),  # half way between 4 and 64
        ([(1, 90), (4, 70), (9, 80), (64, 50)], 75, 4**0.75),
        ([(1, 90), (1, 80), (16, 60)], 70, 4),  # of two that cost as much, the better one
        ([(1, 90), (1, 80), (16, 60)], 85, None),
    ],
)
def test_a_model_that_a_cheaper_one_beats_is_left_out(sign, family, reached, cost):
    """In perplexity, and turned round as an accuracy."""
    found = cost_to_reach([(c, sign * t) for c, t in family], sign * reached, rising=sign < 0)
    assert found == (None if cost is None else pytest.approx(cost))


@pytest.mark.parametrize("sign", [1, -1])
def test_no_factor_where_a_family_is_better_at_less_cost(sign):
    """MoE models of 94 and 92 against [90 at a cost of 1]: nothing that the dense family needs."""
    dense = [(c, sign * t) for c, t in ((1, 90), (2, 95), (10, 80))]
    moe = [(c, sign * t) for c, t in ((1, 94), (4, 92))]
    for families in ((dense, moe), (moe, dense)):
        assert speedup_factors(*families, rising=sign < 0) == []
        assert overlap(*families, rising=sign < 0).startswith("no overlap: dense models reach")


def test_a_point_for_every_observation_inside_the_overlap():
    found = speedup_factors([(1, 30.0), (4, 20.0), (16, 10.0)], [(1, 20.0), (4, 5.0)])
    assert [(f.performance, f.dense_cost) for f in found] == [(20.0, 4), (10.0, 16)]
    assert found[0].factor == 4
    assert found[1].factor == pytest.approx(16 / 4 ** (2 / 3))


def test_too_few_points_and_no_overlap():
    with pytest.raises(UserError, match="MoE family has 1 point: .* at least two"):
        speedup_factors([(1, 3.0), (2, 2.0)], [(1, 2.0)])
    with pytest.raises(UserError, match="cost 0, performance"):
        speedup_factors([(0, 3.0), (2, 2.0)], [(1, 2.0), (2, 1.0)])
    assert speedup_factors([(1, 9.0), (2, 8.0)], [(1, 7.0), (2, 6.0)]) == []
    words = overlap([(1, 9.0), (2, 8.0)], [(1, 7.0), (2, 6.0)])
    assert words.startswith("no overlap: dense models reach 8.00 to 9.00, MoE models 6.00 to 7.00")
    assert "MoE models 1e+30 to 2e+40" in overlap([(1, 9.0), (2, 8.0)], [(1, 2e40), (2, 1e30)])
