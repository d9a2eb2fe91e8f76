"""Which token comes next: penalties and bans on logits, and sampling.

They apply in this order: repetition penalty (Keskar et al. 2019, arXiv 1909.05858, section 4.1),
banned n-grams (Paulus et al. 2017, arXiv 1705.04304, section 2.5), temperature, top-k (Fan et al.
2018, arXiv 1805.04833) and top-p (Holtzman et al. 2019, arXiv 1904.09751).
"""

from __future__ import annotations

import math
from random import Random
from typing import Callable, List, NamedTuple, Sequence, Tuple

import torch
from torch import Tensor

from ..errors import UserError


class Choice(NamedTuple):
    """How the next token is chosen."""

    temperature: float = 0.0  # divides the logits; 0: the most likely token
    top_k: int = 0  # sample from this many tokens; 0: all
    top_p: float = 1.0  # sample from the most likely tokens that together have this probability
    repetition_penalty: float = 1.0  # makes tokens that already occur less likely
    no_repeat_ngram_size: int = 0  # no n-gram occurs twice; 0: off

    def check(self, spell: Callable[[str], str]) -> None:
        """Raise UserError for an invalid value; `spell`: a field as the user writes it."""
        for name, fits, words in (
            ("temperature", 0 <= self.temperature < math.inf, "0 (the most likely token) or more"),
            ("top_k", self.top_k >= 0, "0 (all tokens) or a whole number from 1"),
            ("top_p", 0 < self.top_p <= 1, "a probability above 0 up to 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "a number above 0"),
            ("no_repeat_ngram_size", self.no_repeat_ngram_size >= 0, "0 (off) or 1 and more"),
        ):
            if not fits:
                raise UserError(f"{spell(name)} {getattr(self, name)}: use {words}")
        for name, off in (("top_k", 0), ("top_p", 1.0)):
            if self.temperature == 0 and getattr(self, name) != off:
                raise UserError(
                    f"{spell(name)} {getattr(self, name)}: {spell('temperature')} 0 takes the "
                    "most likely token; remove one of them"
                )

    def penalized(self, logits: Tensor, before: Sequence[Sequence[int]]) -> Tensor:
        """logits (N, V), and the tokens before each row's next token -> (N, V)."""
        if self.repetition_penalty == 1 and self.no_repeat_ngram_size == 0:
            return logits
        logits = logits.clone()
        for row, tokens in zip(logits, before):
            if self.repetition_penalty != 1 and tokens:
                there = torch.tensor(sorted(set(tokens)), device=row.device)
                scores = row[there]
                factor = torch.where(
                    scores < 0, self.repetition_penalty, 1 / self.repetition_penalty
                )
                row[there] = scores * factor.to(scores)
            banned = _completing(tokens, self.no_repeat_ngram_size)
            left = row.clone()
            left[banned] = -math.inf
            if not left.isneginf().all():  # else no token could follow
                row.copy_(left)
        return logits

    def draw(self, logits: Tensor, random: Random) -> int:
        """Draw a token from logits (V,), some of which may be -inf."""
        if self.temperature == 0:
            return int(logits.argmax())
        tokens, probs = self.distribution(logits)
        cumulated = probs.cumsum(0)
        index = torch.searchsorted(cumulated, random.random() * cumulated[-1], right=True)
        return int(tokens[min(int(index), len(tokens) - 1)])

    def distribution(self, logits: Tensor) -> Tuple[Tensor, Tensor]:
        """logits (V,) -> the tokens (k,) that sampling may take, the most likely first, and their
        probabilities (k,) in float64, which need not sum to 1."""
        scores, tokens = (logits.double().cpu() / self.temperature).sort(
            descending=True, stable=True
        )
        scores = scores[: self.top_k or None]
        probs = scores.softmax(0)
        # as many as reach top_p together; rounding must not leave the last out
        count = 1 + int((probs.cumsum(0)[:-1] < self.top_p).sum())
        probs = probs[:count]
        probs = probs[probs > 0]
        return tokens[: len(probs)], probs


LIKELIEST = Choice()


def _completing(tokens: Sequence[int], size: int) -> List[int]:
    """Tokens that would complete an n-gram of this size that already occurs."""
    if size == 0:
        return []
    start = len(tokens) - size + 1
    if start < 0:
        return []
    last = tuple(tokens[start:])
    return [tokens[i + size - 1] for i in range(start) if tuple(tokens[i : i + size - 1]) == last]
