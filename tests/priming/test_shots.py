import pytest

from fairseq_moe_ext.errors import UserError
from fairseq_moe_ext.priming.shots import draw, fitting, joined, shortage, shortage_in_words


def test_draws_differ_are_reproducible_and_have_no_example_twice():
    draws = [draw(100, 32, 1, number) for number in range(25)]
    assert draws == [draw(100, 32, 1, number) for number in range(25)]
    assert len({tuple(one) for one in draws}) == 25
    assert all(len(set(one)) == 32 and set(one) <= set(range(100)) for one in draws)
    assert draw(100, 32, 2, 0) != draws[0]
    assert any(one != sorted(one) for one in draws), "in random order"
    assert len({i for one in draws for i in one}) > 90, "of the whole pool"


def test_a_small_pool_is_refused():
    with pytest.raises(UserError, match="--shots 5: there are 4 examples"):
        draw(4, 5, 1, 0)


def test_only_whole_examples_fit():
    examples = [[7] * 4, [8] * 2, [9] * 3]  # 5, 3 and 4 with their newlines
    assert [fitting(examples, 10, 10 + room) for room in range(14)] == (
        [0] * 4 + [1] * 3 + [2] * 5 + [3] * 2
    )
    assert joined(examples[1:], 2) == (8, 8, 2, 9, 9, 9, 2)
    assert joined([], 2) == ()


def test_examples_left_out_in_words():
    def said(left_out, shots=4):
        return shortage_in_words({"shots": shots, **shortage(left_out)})

    assert said([0] * 179 + [1]) == "in 1 of 180 prompts, 1 example was left out"
    assert said([1, 0, 1]) == "in 2 of 3 prompts, 1 example was left out"
    assert said([2]) == "in 1 of 1 prompt, 2 of 4 examples were left out"
    assert said([0] * 99 + [1, 3]) == (
        "in 2 of 101 prompts, up to 3 of 4 examples were left out (mean of all: < 0.1)"
    )
    assert said([2, 3]) == (
        "in 2 of 2 prompts, up to 3 of 4 examples were left out (mean of all: 2.5)"
    )
