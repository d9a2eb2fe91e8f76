"""The parameters of many experts."""

from typing import NamedTuple, Sequence, Union

from torch import Tensor

Stack = Union[Tensor, Sequence[Tensor]]


class Weights(NamedTuple):
    """Of E experts; stacked, or a sequence of each expert's, in any precision and place."""

    w1: Stack  # (E, F, D); (E, 2 F, D) with a gated activation
    b1: Stack  # (E, F), or (E, 2 F)
    w2: Stack  # (E, D, F)
    b2: Stack  # (E, D)
