"""The truth of each router: plain loops over tokens, read from top to bottom.

Each takes logits (T, E) in float64 and yields for each token the experts that it goes to, with
their weights, in the order of choice. Letters as in reference.py.
"""

import itertools
import math
from typing import Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

import torch
from reference import argmax, softmax
from torch import Tensor

Choices = List[List[Tuple[int, Tensor]]]  # T rows of (expert, weight)


class Case(NamedTuple):
    """What a router may look at, beside its logits."""

    k: int
    training: bool
    score: str = "softmax"
    scale: float = 1.0
    normalize: bool = False
    groups: int = 1
    top_groups: int = 1
    padding: Sequence[bool] = ()
    tokens: Sequence[int] = ()
    counts: Sequence[int] = ()  # how often a type occurs in the training data
    threshold: Optional[Sequence[float]] = None
    balanced_evaluation: bool = False

    def is_padding(self, t: int) -> bool:
        return bool(self.padding[t]) if len(self.padding) else False

    def real(self, tokens: int) -> List[int]:
        return [t for t in range(tokens) if not self.is_padding(t)]


def scored(row: Tensor, score: str) -> Tensor:
    return softmax(row) if score == "softmax" else 1 / (1 + torch.exp(-row))


def largest(values: Sequence[float], k: int) -> List[int]:
    """The k experts with the largest values, of equal ones the lower number first."""
    return sorted(range(len(values)), key=lambda e: (-values[e], e))[:k]


def weighed(scores: Tensor, experts: Sequence[int], case: Case) -> List[Tuple[int, Tensor]]:
    total = sum(scores[e] for e in experts) if case.normalize else 1.0
    return [(e, case.scale * scores[e] / total) for e in experts]


def by_scores(logits: Tensor, case: Case) -> Choices:
    """topk, random; and sinkhorn at evaluation."""
    found: Choices = []
    for t, row in enumerate(logits):
        scores = scored(row, case.score)
        liked = scores.tolist()
        size = len(liked) // case.groups
        parts = [liked[g * size : (g + 1) * size] for g in range(case.groups)]
        each = math.ceil(case.k / case.top_groups)
        sums = [sum(sorted(part, reverse=True)[:each]) for part in parts]
        allowed = largest(sums, case.top_groups)
        liked = [v if e // size in allowed else -1.0 for e, v in enumerate(liked)]
        found.append([] if case.is_padding(t) else weighed(scores, largest(liked, case.k), case))
    return found


def plan(logits: List[List[float]], steps: int = 32) -> List[List[float]]:
    """Sinkhorn's plan: rows and columns divided in turn, the rows last."""
    p = [[math.exp(v) for v in row] for row in logits]
    for _ in range(steps):
        p = [[v / sum(row) for v in row] for row in p]
        columns = [sum(column) for column in zip(*p)]
        p = [[v / columns[e] for e, v in enumerate(row)] for row in p]
    return [[v / sum(row) for v in row] for row in p]


def by_sinkhorn(logits: Tensor, case: Case) -> Choices:
    if not case.training:
        return by_scores(logits, case)
    real = case.real(len(logits))
    planned = plan([logits[t].tolist() for t in real])
    found: Choices = [[] for _ in logits]
    for t, row in zip(real, planned):
        found[t] = weighed(scored(logits[t], case.score), largest(row, case.k), case)
    return found


def best_assignment(values: List[List[float]], experts: int) -> Tuple[float, float, List[int]]:
    """The largest sum over all assignments with at most ceil(T / E) tokens an expert, the second
    largest, and the assignment of the largest."""
    places = math.ceil(len(values) / experts)
    sums = []
    for chosen in itertools.product(range(experts), repeat=len(values)):
        if max(chosen.count(e) for e in range(experts)) <= places:
            sums.append((sum(values[t][e] for t, e in enumerate(chosen)), list(chosen)))
    sums.sort(key=lambda found: -found[0])
    return sums[0][0], sums[1][0], sums[0][1]


def by_assignment(logits: Tensor, case: Case) -> Choices:
    found: Choices = [[] for _ in logits]
    real = case.real(len(logits))
    if case.training or case.balanced_evaluation:
        values = [logits[t].tolist() for t in real]
        chosen = best_assignment(values, logits.size(1))[2]
    else:
        chosen = [argmax(logits[t]) for t in real]
    for t, e in zip(real, chosen):
        found[t] = [(e, case.scale * scored(logits[t], "sigmoid")[e])]
    return found


def table(counts: Sequence[int], experts: int, k: int) -> List[List[int]]:
    loads, found = [0.0] * experts, [[0]] * len(counts)
    drawn = torch.rand(len(counts), k, generator=torch.Generator().manual_seed(0)).tolist()
    for token in sorted(range(len(counts)), key=lambda token: -counts[token]):
        found[token] = largest([-load for load in loads], k)
        for i, e in enumerate(found[token]):
            loads[e] += max(1, counts[token]) * (1 if k == 1 else 1 + 0.01 * drawn[token][i])
    return found


def by_token(logits: Tensor, case: Case) -> Choices:
    experts = table(case.counts, logits.size(1), case.k)
    one = logits.new_ones(())
    return [
        [] if case.is_padding(t) else [(e, case.scale * one / case.k) for e in experts[token]]
        for t, token in enumerate(case.tokens)
    ]


def by_threshold(logits: Tensor, case: Case) -> Choices:
    found: Choices = []
    for t, row in enumerate(logits):
        scores = scored(row, case.score)
        taken = largest(row.tolist(), case.k)
        if case.threshold is not None:
            odds = [float(s / (1 - s)) for s in scores]
            taken = [e for e in range(len(row)) if math.log(odds[e]) > case.threshold[e]]
        taken.sort(key=lambda e: -float(scores[e]))
        found.append([] if case.is_padding(t) else [(e, case.scale * scores[e]) for e in taken])
    return found


def by_relu(logits: Tensor, case: Case) -> Choices:
    found: Choices = []
    for t, row in enumerate(logits):
        taken = [] if case.is_padding(t) else [e for e in range(len(row)) if row[e] > 0]
        taken.sort(key=lambda e: -float(row[e]))
        found.append([(e, case.scale * row[e]) for e in taken])
    return found


LOOPS: Dict[str, Callable[[Tensor, Case], Choices]] = {
    "topk": by_scores,
    "random": by_scores,
    "sinkhorn": by_sinkhorn,
    "base": by_assignment,
    "hash": by_token,
    "threshold": by_threshold,
    "relu": by_relu,
}


def distributions(name: str, logits: Tensor, case: Case) -> List[Tensor]:
    """What balances: scores of each token, (E,) that sum to 1, or 0 where there are none."""
    found = []
    for t, row in enumerate(logits):
        if name == "hash":
            experts = table(case.counts, len(row), case.k)[case.tokens[t]]
            found.append(
                torch.stack([row.new_tensor((e in experts) / case.k) for e in range(len(row))])
            )
            continue
        scores = {
            "base": scored(row, "sigmoid"),
            "relu": torch.stack([v if v > 0 else 0 * v for v in row]),
        }.get(name, scored(row, case.score))
        total = scores.sum()
        found.append(scores / total if total > 0 else scores)
    return found


def balance(name: str, logits: Tensor, choices: Choices, case: Case) -> Tensor:
    """E * sum over experts of (mean probability) * (share of choices: of the first ones where a
    token has one or two, of all where it may have more)."""
    probs, experts = distributions(name, logits, case), logits.size(1)
    real = case.real(len(logits))
    variable = name in ("threshold", "relu")
    counted = [c for t in real for c in (choices[t] if variable or case.k > 2 else choices[t][:1])]
    loss = 0.0 * logits.sum()
    for e in range(experts):
        share = sum(expert == e for expert, _ in counted) / max(len(counted), 1)
        loss = loss + sum(probs[t][e] for t in real) / len(real) * share
    return experts * loss


def l1(logits: Tensor, choices: Choices, case: Case, weight: float) -> Tensor:
    """ReMoE's loss: the positive logits of each token, those of an expert with many tokens more."""
    real, experts = case.real(len(logits)), logits.size(1)
    loss = 0.0 * logits.sum()
    for e in range(experts):
        taken = sum(expert == e for t in real for expert, _ in choices[t])
        share = experts / (case.k * len(real)) * taken
        loss = loss + share * sum(torch.relu(logits[t][e]) for t in real) / len(real)
    return weight * loss
