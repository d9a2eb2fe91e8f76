"""What each expert of a layer takes: which tokens, which text, where."""

import math
from dataclasses import dataclass
from typing import List, Sequence

import numpy as np

from ..evaluation.specialisation import counts
from .observing import LayerView
from .reading import FREQUENCIES, POSITIONS, Tokens
from .result import Card, Example, Word

WORDS = 12
EXAMPLES = 5
LEAST = 8  # times that a token id is seen, before its lift says anything
CHANCE = 0.05  # at most, that a card of an expert that takes tokens at random has a word
BEFORE, AFTER = 8, 4  # tokens of context


@dataclass
class Counted:
    """The tokens that are counted, and the classes they are in: arrays (T,)."""

    token_ids: np.ndarray
    domains: np.ndarray
    names: Sequence[str]  # of the domains
    blocks: np.ndarray
    positions: np.ndarray
    frequencies: np.ndarray
    previous: np.ndarray  # ids


def cards(view: LayerView, seen: Counted, tokens: Tokens) -> List[Card]:
    """A card for each expert of a layer."""
    number = view.experts
    total = max(1, int((view.chosen < number).sum()))
    share = _table(np.zeros(len(seen.token_ids), int), view, 1)[0]  # (E,)
    dropped = np.zeros(number + 1)
    np.add.at(dropped, view.chosen.ravel(), ~view.kept.ravel())
    in_blocks = _shares(_table(seen.blocks, view, seen.blocks.max() + 1))  # (blocks, E)
    deviation = in_blocks.std(axis=0, ddof=1) if len(in_blocks) > 1 else np.zeros(number)
    domains = _shares(_table(seen.domains, view, len(seen.names)))
    positions = _shares(_table(seen.positions, view, len(POSITIONS)))
    frequencies = _shares(_table(seen.frequencies, view, len(FREQUENCIES)))
    vocabulary, columns = np.unique(seen.token_ids, return_inverse=True)
    columns = columns.ravel()
    often = np.bincount(columns)  # (vocabulary,)
    examples = _examples(view, seen, tokens)
    return [
        Card(
            expert=e,
            share=float(share[e] / total),
            deviation=float(deviation[e]),
            dropped=float(dropped[e] / max(1, share[e])),
            words=_words(columns[(view.chosen == e).any(axis=1)], vocabulary, often, tokens),
            examples=examples[e],
            domains=domains[:, e].tolist(),
            positions=positions[:, e].tolist(),
            frequencies=frequencies[:, e].tolist(),
        )
        for e in range(number)
    ]


def _table(labels: np.ndarray, view: LayerView, rows: int) -> np.ndarray:
    """labels (T,) -> (rows, E): how often an expert is chosen for tokens of each label."""
    return counts(labels, view.chosen, rows, view.experts + 1)[:, :-1]  # the last: no choice


def _shares(table: np.ndarray) -> np.ndarray:
    return table / np.maximum(table.sum(axis=1, keepdims=True), 1)


def _words(
    own: np.ndarray, vocabulary: np.ndarray, often: np.ndarray, tokens: Tokens
) -> List[Word]:
    """Token ids by lift, those that chance does not explain. own: columns of `vocabulary` of the
    tokens that an expert takes.

    Of the many ids, some have a high lift by chance, the rare ones most. Where each token goes to
    the expert with the same probability p, a count of n q or more among n tokens has at most the
    probability exp(-n KL(q, p)) (Hoeffding 1963, theorem 1)."""
    if not len(own):
        return []
    counts = np.bincount(own, minlength=len(vocabulary))
    q, p = counts / often, len(own) / often.sum()
    with np.errstate(divide="ignore", invalid="ignore"):
        apart = q * np.log(q / p) + np.where(q < 1, (1 - q) * np.log((1 - q) / (1 - p)), 0)
    seen = often >= LEAST
    some = seen & (q > p) & (often * apart > math.log(max(1, seen.sum()) / CHANCE))
    order = np.lexsort((-counts, -q))
    return [
        Word(tokens.piece(int(vocabulary[i])), float(q[i] / p), int(counts[i]))
        for i in order[some[order]][:WORDS]
    ]


def _examples(view: LayerView, seen: Counted, tokens: Tokens) -> List[List[Example]]:
    """For each expert, the tokens that it gets with the highest probability, all different."""
    examples: List[List[Example]] = [[] for _ in range(view.experts)]
    taken: List[set] = [set() for _ in range(view.experts)]
    first = view.chosen[:, 0]
    for i in np.argsort(-view.probability.astype(np.float32), kind="stable"):
        e = first[i]
        if e == view.experts or len(examples[e]) == EXAMPLES or seen.token_ids[i] in taken[e]:
            continue
        taken[e].add(seen.token_ids[i])
        examples[e].append(_example(int(i), view, seen, tokens))
    return examples


def _example(i: int, view: LayerView, seen: Counted, tokens: Tokens) -> Example:
    low, high = max(0, i - BEFORE), min(len(seen.token_ids), i + AFTER + 1)
    own = np.flatnonzero(seen.blocks[low:high] == seen.blocks[i]) + low
    return Example(
        tokens.text(seen.token_ids[own[own < i]].tolist()),
        tokens.piece(int(seen.token_ids[i])),
        tokens.text(seen.token_ids[own[own > i]].tolist()),
        seen.names[seen.domains[i]],
        float(view.probability[i]),
    )
