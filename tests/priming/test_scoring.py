"""Each scoring rule on words whose log-probabilities are made up, with results worked out by hand.

A word's log-probability hangs on the word before it alone; the first one's on nothing.
"""

import numpy as np
import pytest
from own_imports import PACKAGE, own_imports

from fairseq_moe_ext.priming import choice
from fairseq_moe_ext.priming.protocol import Settings
from fairseq_moe_ext.priming.shots import Pool, draw
from fairseq_moe_ext.questions.formats import Item
from fairseq_moe_ext.questions.scoring import Row, common_prefix, cut, rows_of, value

LOG_PROBS = {
    # who: "it is a long one" against "it is short"
    ("is", "a"): -1.0,
    ("a", "long"): -2.0,
    ("long", "one"): -0.5,
    ("is", "short"): -3.0,
    # what fits: "the cup fits in it" against "the box fits in it"
    ("the", "cup"): -1.0,
    ("the", "box"): -4.0,
    ("cup", "fits"): -2.0,
    ("box", "fits"): -1.25,
    ("fits", "in"): -0.25,
    ("in", "it"): -0.25,
    # which answer: "warm ice" or "warm sun", and what each is worth by itself
    ("warm", "ice"): -2.0,
    ("warm", "sun"): -2.5,
    ("Answer:", "ice"): -1.0,
    ("Answer:", "sun"): -3.0,
}
WORDS = sorted({word for pair in LOG_PROBS for word in pair} | {"the", "it", "warm", "is"})


def encode(text):
    return [WORDS.index(word) for word in text.split()]


class FakeScorer:
    """Log-probabilities from the table, and -9 for what follows nothing known."""

    def __init__(self):
        self.rows = []

    def __call__(self, rows):
        self.rows += rows
        found = []
        for row in rows:
            words = [WORDS[token] if token < len(WORDS) else "\n" for token in row.tokens]
            pairs = zip([None, *words], words)
            found.append(np.array([LOG_PROBS.get(pair, -9.0) for pair in pairs])[row.start :])
        return found


def item(*candidates, right=0, alone=()):
    return Item(candidates, frozenset({right}), alone)


LENGTHS = item("it is a long one", "it is short")
BLANK = item("the cup fits in it", "the box fits in it")
ANSWERS = item("warm ice", "warm sun", alone=("Answer: ice", "Answer: sun"))


@pytest.mark.parametrize(
    "rule, question, expected",
    [
        ("sum", LENGTHS, [-1.0 - 2.0 - 0.5, -3.0]),  # the short one
        ("mean", LENGTHS, [-3.5 / 3, -3.0]),  # the long one
        ("sum", BLANK, [-1.0 - 2.0 - 0.5, -4.0 - 1.25 - 0.5]),  # cup, as it is the likelier word
        ("suffix", BLANK, [-2.0 - 0.5, -1.25 - 0.5]),  # box, as the rest follows it better
        ("sum", ANSWERS, [-2.0, -2.5]),  # ice
        ("unconditional", ANSWERS, [-2.0 + 1.0, -2.5 + 3.0]),  # sun
    ],
)
def test_rules(rule, question, expected):
    scorer = FakeScorer()
    questions = choice.in_tokens([question], encode)
    base = choice.baselines(rule, questions, scorer, context=20)
    scored = choice.scores(rule, [questions[0].candidates], scorer, context=20)
    np.testing.assert_allclose(scored[0] - base[0], expected, rtol=1e-12)
    outcome = choice.answer(rule, questions, base, [], scorer, context=20)
    assert outcome.chosen == [int(np.argmax(expected))]
    assert outcome.accuracy == float(np.argmax(expected) == 0)


def test_examples_stand_before_each_candidate_and_change_no_rule():
    scorer = FakeScorer()
    questions = choice.in_tokens([LENGTHS], encode)
    examples = [encode("warm sun"), encode("the box fits")]
    outcome = choice.answer("mean", questions, [0.0], examples, scorer, context=20)
    assert outcome.chosen == [0] and outcome.left_out == [0]
    newline = 2
    before = (*encode("warm sun"), newline, *encode("the box fits"), newline)
    assert [row.tokens[: len(before)] for row in scorer.rows] == [before, before]
    assert [len(row.tokens) - row.start for row in scorer.rows] == [3, 1], "after `it is`"


def test_examples_that_do_not_fit_are_left_out_whole_the_first_ones():
    questions = choice.in_tokens([LENGTHS, BLANK], encode)
    examples = [encode("warm sun"), encode("the box fits"), encode("it is")]  # 3, 4 and 3 tokens
    for context, left_out in ((15, 0), (14, 1), (12, 1), (11, 2), (8, 2), (7, 3), (5, 3)):
        scorer = FakeScorer()
        outcome = choice.answer("sum", questions, [0.0, 0.0], examples, scorer, context)
        assert outcome.left_out == [left_out, left_out]
        assert outcome.too_long == 0
        assert max(len(row.tokens) for row in scorer.rows) <= context
    scorer = FakeScorer()
    outcome = choice.answer("sum", questions, [0.0, 0.0], examples, scorer, context=4)
    assert outcome.too_long == 3, "three of the four candidates have five words"
    assert [row.tokens for row in scorer.rows][0] == tuple(encode("is a long one"))


def test_rows_of_candidates_that_are_alike():
    assert rows_of("sum", [(1, 2), (1, 2, 3)]) == [Row((1, 2), 1), Row((1, 2, 3), 1)]
    assert rows_of("sum", [(5,), (5,)]) == [Row((5,), 0), Row((5,), 0)]
    assert rows_of("suffix", [(1, 2), (1, 3)]) == [Row((1, 2), 1), Row((1, 3), 1)], "as sum"
    assert common_prefix([(1, 2), (1, 2)]) == 2


def test_a_row_longer_than_the_context_keeps_its_end():
    assert cut(Row((1, 2, 3, 4), 3), 2) == Row((3, 4), 1)
    assert cut(Row((1, 2, 3, 4), 1), 2) == Row((3, 4), 0)
    assert cut(Row((1, 2), 1), 2) == Row((1, 2), 1)
    assert value("mean", np.array([-1.0, -2.0])) == -1.5


def test_the_spread_is_that_of_the_draws():
    """The example decides: after `is` the first candidate wins, after `box` the second."""

    class Scorer(FakeScorer):
        def __call__(self, rows):
            lead = {encode("is")[0]: (-1.0, -2.0), encode("box")[0]: (-2.0, -1.0)}
            return [np.array([lead[row.tokens[0]][i % 2]]) for i, row in enumerate(rows)]

    questions = choice.in_tokens([item("it", "in")], encode)
    pool = [encode("is")] * 5 + [encode("box")] * 5
    found = choice.evaluate("sum", questions, pool, 1, Settings(draws=8), Scorer(), 20)
    assert len(found["draws"]) == 8 and set(found["draws"]) == {0.0, 1.0}
    mean = sum(found["draws"]) / 8
    assert found["accuracy"] == mean
    assert found["spread"] == pytest.approx((8 * mean * (1 - mean) / 7) ** 0.5)


def test_formats_and_rules_need_no_tokenizer():
    """The task multiple_choice imports them wherever the plugin is, also without `tokenizers`."""
    seen, todo = set(), ["questions.scoring", "questions.formats"]
    while todo:
        module = todo.pop()
        path = PACKAGE.joinpath(*module.split(".")).with_suffix(".py")
        found = set(own_imports(path)) if path.is_file() else set()
        todo += found - seen
        seen |= found
    assert "prepare.dictionary" in seen and "questions.records" in seen
    assert "prepare.tokenizer" not in seen


def test_related_examples_count_only_in_prompts_that_contain_them():
    """Of two examples, one of them related to the question, as many as fit precede it."""

    def item(words, *keys):
        return Item((words, words), frozenset([0]), (), keys)

    items, examples = [item("a long", b"p")], [item("the cup", b"p"), item("the box", b"q")]
    questions, pool = choice.in_tokens(items, encode), Pool(["the cup", "the box"], encode)
    settings = Settings(shots=[2], draws=20)
    last = [draw(2, 2, settings.seed, number)[-1] for number in range(20)]

    def count(context):
        return choice.related(items, questions, examples, pool, 2, settings, context)

    assert count(2 + 2 * 3) == 20  # tokens of the question, and of both examples
    assert count(2 + 3) == last.count(0) not in (0, 20)
    assert count(2) == 0
