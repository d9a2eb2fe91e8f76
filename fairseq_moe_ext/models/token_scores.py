"""Log-probabilities of tokens from a decoder's features, without ever holding all logits."""

from typing import Callable, List, Tuple, TypeVar

import torch.nn.functional as F
from fairseq.models import FairseqDecoder
from torch import Tensor

from ..kernels.dtypes import at_least_float32
from ..kernels.linear_cross_entropy import LOGITS_AT_A_TIME

Score = TypeVar("Score")


def exact_logits(decoder: FairseqDecoder, features: Tensor) -> Tensor:
    """features (N, D) -> (N, V), for choices among tokens. The product is computed in float32 at
    least: in bfloat16, logits of about 16 are 1/8 apart, and the likeliest ones often equal. The
    decoder's projection takes any precision, as ours does (kernels/matmul.py)."""
    return decoder.output_layer(features.to(at_least_float32(features)))


def log_probs(
    decoder: FairseqDecoder, features: Tensor, target: Tensor, exact: bool = False
) -> Tensor:
    """features (N, D), target (N,) -> (N,) in nats, of all tokens at once; for sums over many, or
    of exact_logits, for comparing."""
    logits = exact_logits(decoder, features) if exact else decoder.output_layer(features)
    return -F.cross_entropy(logits.to(at_least_float32(logits)), target, reduction="none")


def log_probs_and_likeliest(
    decoder: FairseqDecoder, features: Tensor, target: Tensor
) -> Tuple[Tensor, Tensor]:
    """Like log_probs, of exact_logits, and (N,) bool: whether no token is more likely."""
    every = exact_logits(decoder, features).log_softmax(-1)  # (N, V)
    chosen = every.gather(1, target[:, None])[:, 0]
    return chosen, chosen == every.amax(-1)


def in_chunks(
    score: Callable[[FairseqDecoder, Tensor, Tensor], Score],
    decoder: FairseqDecoder,
    features: Tensor,
    target: Tensor,
) -> List[Score]:
    """The results of `score` for one chunk of tokens after another, each as large as
    LOGITS_AT_A_TIME allows.

    Args:
        features: (N, D).
        target: (N,).
    """
    chunk = max(1, LOGITS_AT_A_TIME // decoder.output_projection.weight.size(0))
    return [score(decoder, x, y) for x, y in zip(features.split(chunk), target.split(chunk))]
