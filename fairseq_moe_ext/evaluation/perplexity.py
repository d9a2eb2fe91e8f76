"""Perplexity of a model on test sets: every token scored once, intervals by bootstrap.

The paper's protocol (blocks): a set's text is cut into blocks of `context` tokens, each scored on
its own, as fairseq-eval-lm does. The other (sliding): each token is scored with at least
`context - stride` tokens before it.
"""

import math
import time
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple, TypedDict

import numpy as np
import torch
from fairseq.models import FairseqLanguageModel
from torch import Tensor

from .. import progress_bar
from ..errors import DAMAGED, UserError
from ..models.token_scores import in_chunks, log_probs
from .texts import Text, batches

Interval = Tuple[float, float]


class SetResult(TypedDict, total=False):
    """One test set. A study's older files lack all but `perplexity` and `dropped`."""

    in_domain: bool
    tokens: int
    perplexity: float
    interval: Optional[Interval]  # None of a single unit
    units: int  # that the bootstrap draws: text between blank lines, joined to a context
    bits_per_byte: Optional[float]  # None where the size of the text is not known
    dropped: Optional[Sequence[float]]  # as Scores.dropped
    tokens_per_second: float


class MeanResult(TypedDict, total=False):
    """The plain mean over sets. A study's older files lack `interval`."""

    perplexity: float
    interval: Optional[Interval]


class Evaluation(TypedDict):
    """All test sets, and the means "in_domain", "out_of_domain" and "all" of those there are."""

    sets: Dict[str, SetResult]
    mean: Dict[str, MeanResult]


class UnitLosses(TypedDict):
    """What each unit of a test set adds to its loss."""

    nats: List[float]
    tokens: List[int]


class Scores(NamedTuple):
    """What one pass over a set gives."""

    nll: np.ndarray  # (N,) nats
    # Share of first, and of second, choices; of all where there are more; None: no experts.
    dropped: Optional[Tuple[float, ...]]
    seconds: float


def windows(length: int, context: int, stride: int) -> List[Tuple[int, int, int]]:
    """(begin, end, first new) of each pass over `length` tokens: [begin, end) is at most `context`
    tokens, and the tokens from `first new` on are scored. stride = context: blocks."""
    spans, done = [], 0
    while done < length:
        end = min(length, context if not done else done + stride)
        spans.append((max(0, end - context) if stride < context else done, end, done))
        done = end
    return spans


def score(
    model: FairseqLanguageModel,
    text: Text,
    eos: int,
    context: int,
    stride: int,
    batch_size: int,
    progress: Callable[[int], Any] = lambda tokens: None,
) -> Scores:
    """Negative log-likelihood of every token of a set, and how many choices of experts were dropped
    for capacity. Only windows of one length share a batch, so nothing is padding.

    Args:
        text: the set's tokens.
        eos: what stands before the first of them.
        context: tokens of a window, at most.
        stride: tokens from one window's end to the next's; the context for blocks, less for more
            tokens before each that is scored.
        batch_size: windows at once, at most.
        progress: called with the number of tokens scored since the last call.
    """
    device = next(model.parameters()).device
    inputs = torch.cat([torch.tensor([eos]), text.tokens])  # token i is predicted from inputs[i]
    nll = np.empty(len(text.tokens))
    dropped: List[Tensor] = []  # of each layer and batch, (K,) times its tokens
    positions = 0
    started = time.monotonic()
    spans = windows(len(text.tokens), context, stride)
    for batch in batches(spans, lambda span: span[1] - span[0], batch_size):
        rows = torch.stack([inputs[a:b] for a, b, _ in batch]).to(device)  # (B, L)
        targets = torch.stack([text.tokens[a:b] for a, b, _ in batch]).to(device)
        with torch.no_grad():
            x, extra = model.decoder(rows, features_only=True)  # (B, L, D)
            scores = in_chunks(log_probs, model.decoder, x.flatten(0, 1), targets.flatten())
            nats = -torch.cat(scores).view_as(targets).cpu().numpy()
        for (a, b, new), row in zip(batch, nats):
            nll[new:b] = row[new - a :]
        progress(sum(b - new for _, b, new in batch))
        positions += rows.numel()
        for record in extra.get("moe") or []:
            choices = len(record.expert_counts)
            names = [f"overflow_expert{i + 1}" for i in range(choices)]
            shares = [record.stats[k] for k in (names if choices <= 2 else ["overflow"])]
            dropped.append(torch.stack(shares).cpu() * rows.numel() / 100)
    seconds = time.monotonic() - started
    if not dropped:
        return Scores(nll, None, seconds)
    layers = len(extra["moe"])
    lost = torch.stack(dropped).sum(0) / (positions * layers)
    return Scores(nll, tuple(lost.tolist()), seconds)


def bootstrap(nll: np.ndarray, units: np.ndarray, draws: int, seed: int = 1) -> np.ndarray:
    """(draws,) perplexities, each of as many units as there are, drawn with replacement.

    Args:
        nll: (N,) nats of each token.
        units: (U,) where each unit begins; the first at 0.
        seed: of the draws.
    """
    rng = np.random.default_rng(seed)
    sums, sizes = _by_unit(nll, units)
    perplexities = np.empty(draws)
    for i in range(draws):
        drawn = np.bincount(rng.integers(len(units), size=len(units)), minlength=len(units))
        perplexities[i] = _perplexity(float(drawn @ sums) / float(drawn @ sizes))
    return perplexities


def _by_unit(nll: np.ndarray, units: np.ndarray) -> Tuple[np.ndarray, np.ndarray]:
    """(U,) nats and (U,) tokens of each unit."""
    return np.add.reduceat(nll, units), np.diff(np.append(units, len(nll)))


def evaluate(
    model: FairseqLanguageModel,
    texts: Sequence[Text],
    eos: int,
    context: int,
    stride: int,
    batch_size: int,
    draws: int,
    unit_losses: Optional[Dict[str, UnitLosses]] = None,
) -> Evaluation:
    """Perplexity of every set, with bootstrap intervals.

    Args:
        texts: the sets.
        eos, context, stride, batch_size: as for `score`.
        draws: of the bootstrap, of each set; set i, from 1, has seed i.
        unit_losses: receives those of each set, if given.

    Raises:
        UserError: for a model that gives a token a probability that is not a number.
    """
    sets: Dict[str, SetResult] = {}
    drawn: Dict[str, np.ndarray] = {}
    for i, text in enumerate(texts):
        with progress_bar.bar(
            f"{i + 1}/{len(texts)} {text.name}", len(text.tokens), "token"
        ) as bar:
            scores = score(model, text, eos, context, stride, batch_size, bar.update)
        if not np.isfinite(scores.nll).all():
            raise UserError(
                f"{text.name}: the model gives a token a probability that is not a number: "
                f"{DAMAGED}"
            )
        total, count = float(scores.nll.sum()), len(scores.nll)
        if unit_losses is not None:
            nats, tokens = _by_unit(scores.nll, text.units)
            unit_losses[text.name] = {"nats": nats.tolist(), "tokens": tokens.tolist()}
        drawn[text.name] = bootstrap(scores.nll, text.units, draws, seed=i + 1)
        sets[text.name] = {
            "in_domain": text.trained,
            "tokens": count,
            "perplexity": _perplexity(total / count),
            "interval": _interval(drawn[text.name]) if len(text.units) > 1 else None,
            "units": len(text.units),
            "bits_per_byte": total / math.log(2) / text.bytes if text.bytes else None,
            "dropped": scores.dropped,
            "tokens_per_second": count / max(scores.seconds, 1e-9),
        }
    means: Dict[str, MeanResult] = {}
    groups = {"in_domain": (True,), "out_of_domain": (False,), "all": (True, False)}
    for label, wanted in groups.items():
        names = [name for name, result in sets.items() if result["in_domain"] in wanted]
        if names:
            known = all(sets[name]["interval"] for name in names)
            means[label] = {
                "perplexity": float(np.mean([sets[name]["perplexity"] for name in names])),
                "interval": _interval(np.mean([drawn[name] for name in names], axis=0))
                if known
                else None,
            }
    return {"sets": sets, "mean": means}


def _perplexity(nats: float) -> float:
    try:
        return math.exp(nats)
    except OverflowError:  # of a training that went wrong
        return math.inf


def _interval(draws: np.ndarray) -> Interval:
    low, high = np.percentile(draws, [2.5, 97.5])
    return float(low), float(high)
