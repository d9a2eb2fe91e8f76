"""Intervals and chance levels against other ways to compute them."""

import math

import pytest

from fairseq_moe_ext import accuracy


def test_the_interval_of_one_share():
    assert accuracy.wilson_interval(0, 10)[0] == 0 and accuracy.wilson_interval(10, 10)[1] == 1
    # The ends are those shares p from which the one seen is z standard errors away.
    for correct, examples in ((0, 10), (3, 10), (90, 100), (7.5, 20)):
        for end in accuracy.wilson_interval(correct, examples):
            if 0 < end < 1:
                error = math.sqrt(end * (1 - end) / examples)
                assert abs(correct / examples - end) == pytest.approx(1.959964 * error, rel=1e-6)


def test_the_interval_of_a_mean():
    assert accuracy.mean_interval([0.3], [10]) == pytest.approx(accuracy.wilson_interval(3, 10))
    low, high = accuracy.mean_interval([0.5, 0.5, 0.5, 0.5], [100] * 4)
    one, other = accuracy.wilson_interval(50, 100)
    assert high - low == pytest.approx((other - one) / 2), "four tasks, half the width"
    low, high = accuracy.mean_interval([1.0, 1.0], [10, 10])
    assert low < 1 and high == 1, "not of width 0, as by the variance of what was seen"


def test_chance_is_the_mean_over_questions():
    assert accuracy.chance([1, 1], [2, 4]) == pytest.approx((1 / 2 + 1 / 4) / 2)
    assert accuracy.chance([2], [5]) == pytest.approx(2 / 5), "two of five are right"
    assert accuracy.majority([0, 0, 1]) == pytest.approx(2 / 3)
    assert accuracy.floor({"chance": 0.5, "majority": 0.62}) == 0.62
    assert accuracy.floor({"chance": 0.5, "majority": None}) == 0.5
    assert accuracy.floor({"accuracy": 0.5}) is None
