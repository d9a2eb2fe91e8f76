"""Examples before the question: their draws, and how many fit into the context."""

from typing import Callable, List, Optional, Sequence, Tuple

import numpy as np

from ..errors import UserError


def draw(pool: int, shots: int, seed: int, number: int) -> List[int]:
    """The `number`-th draw, from 0, of `shots` different examples out of a pool, in random order.
    All questions of an evaluation get the same ones, and so do all models.

    Raises UserError for a pool that is too small.
    """
    if shots > pool:
        raise UserError(f"--shots {shots}: there are {pool} examples to draw from; use fewer")
    drawn = np.random.default_rng([seed, shots, number]).choice(pool, size=shots, replace=False)
    return drawn.tolist()


def fitting(examples: Sequence[Sequence[int]], question: int, context: int) -> int:
    """How many of the examples, counted from the last, fit before a question of so many tokens. An
    example takes its tokens and the newline behind it, and is there whole or not at all."""
    room = context - question
    for count, example in enumerate(reversed(examples)):
        room -= len(example) + 1
        if room < 0:
            return count
    return len(examples)


def joined(examples: Sequence[Sequence[int]], newline: int) -> Tuple[int, ...]:
    """The examples as the beginning of a prompt, one newline behind each."""
    return tuple(token for example in examples for token in (*example, newline))


def spread(values: Sequence[float]) -> Optional[float]:
    """Standard deviation of a figure over draws; None of one."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


class Pool(Sequence[List[int]]):
    """Examples that are encoded when they are drawn: there may be hundreds of thousands."""

    def __init__(self, texts: Sequence[str], encode: Callable[[str], List[int]]) -> None:
        self._texts = texts
        self._encode = encode

    def __len__(self) -> int:
        return len(self._texts)

    def __getitem__(self, i: int) -> List[int]:
        return self._encode(self._texts[i])
