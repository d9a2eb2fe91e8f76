"""Examples before the question: their draws, and how many fit into the context."""

from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple, Union, overload

import numpy as np

from .. import wording
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
    """The number of examples, counted from the last, that fit before a question of `question`
    tokens. An example takes its tokens and the newline behind it, and is there whole or not at
    all."""
    room = context - question
    for count, example in enumerate(reversed(examples)):
        room -= len(example) + 1
        if room < 0:
            return count
    return len(examples)


def joined(examples: Sequence[Sequence[int]], newline: int) -> Tuple[int, ...]:
    """The examples as the beginning of a prompt, one newline behind each."""
    return tuple(token for example in examples for token in (*example, newline))


def shortage(left_out: Sequence[int]) -> Dict[str, Any]:
    """Metrics of how many examples did not fit, per prompt."""
    return {
        "left_out": float(np.mean(left_out)),
        "left_out_most": int(max(left_out)),
        "prompts": len(left_out),
        "prompts_short": sum(map(bool, left_out)),
    }


def shortage_in_words(result: Dict[str, Any]) -> str:
    """As "in 1 of 180 prompts, 1 example was left out"."""
    short, most, shots = result["prompts_short"], result["left_out_most"], result["shots"]
    sentence = f"in {short:,} of {wording.count(result['prompts'], 'prompt')}, "
    if round(result["left_out"] * result["prompts"]) == short * most:
        omitted = "1 example was" if most == 1 else f"{most} of {shots} examples were"
        return f"{sentence}{omitted} left out"
    mean = wording.small(result["left_out"], 1)
    return f"{sentence}up to {most} of {shots} examples were left out (mean of all: {mean})"


def standard_deviation(values: Sequence[float]) -> Optional[float]:
    """Standard deviation of a metric over draws; None for one draw."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


class Pool(Sequence[List[int]]):
    """Examples, encoded only when they are drawn, as there may be hundreds of thousands."""

    def __init__(self, texts: Sequence[str], encode: Callable[[str], List[int]]) -> None:
        self._texts = texts
        self._encode = encode

    def __len__(self) -> int:
        return len(self._texts)

    @overload
    def __getitem__(self, i: int) -> List[int]: ...

    @overload
    def __getitem__(self, i: slice) -> List[List[int]]: ...

    def __getitem__(self, i: Union[int, slice]) -> Union[List[int], List[List[int]]]:
        if isinstance(i, slice):
            return [self._encode(text) for text in self._texts[i]]
        return self._encode(self._texts[i])
