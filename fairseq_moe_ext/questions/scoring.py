"""Which of a question's candidates the model finds most likely (the paper's rules).

Each candidate is put into the whole prompt; all candidates' prompts are compared token by token:

    sum            log-probability of what follows the candidates' common prefix
    mean           the same, divided by the number of its tokens
    suffix         log-probability of the candidates' common suffix: how well the rest of the
                   sentence follows each of them
    unconditional  `sum`, less the same of the candidate after "Answer: " alone: how much more
                   likely the question makes it

The common prefix has the same probability for all, so leaving it out changes no `sum`.
"""

from typing import Callable, List, NamedTuple, Sequence, Tuple

import numpy as np

from ..prepare.dictionary import EOS

RULES = ("sum", "mean", "suffix", "unconditional")


class Row(NamedTuple):
    """A sequence of which the log-probabilities from one token on are wanted."""

    tokens: Tuple[int, ...]
    start: int
    shared: int = 0  # first tokens, `start` at most, that other rows are likely to have too
    follows: int = EOS  # the token before the first one


Scorer = Callable[[Sequence[Row]], List[np.ndarray]]  # (tokens - start,) nats of each row


def common_prefix(rows: Sequence[Sequence[int]]) -> int:
    """The number of first tokens that all rows share."""
    count = 0
    for column in zip(*rows):
        if len(set(column)) > 1:
            break
        count += 1
    return count


def rows_of(rule: str, candidates: Sequence[Tuple[int, ...]]) -> List[Row]:
    """What has to be scored for each of a question's candidates, (tokens,) each.

    A candidate that is a prefix of another one still has one token; and where there is no common
    suffix, the text after the prefix is scored instead.
    """
    if rule == "suffix":
        shared = common_prefix([row[::-1] for row in candidates])
        if shared:
            return [Row(row, len(row) - shared) for row in candidates]
    start = min(common_prefix(candidates), min(map(len, candidates)) - 1)
    return [Row(row, start) for row in candidates]


def value(rule: str, log_probs: np.ndarray) -> float:
    """A candidate's score from the log-probabilities of its row."""
    return float(log_probs.mean() if rule == "mean" else log_probs.sum())


def cut(row: Row, context: int) -> Row:
    """The last tokens of a row, as many as the model accepts."""
    lost = len(row.tokens) - context
    return row if lost <= 0 else Row(row.tokens[lost:], max(0, row.start - lost))
