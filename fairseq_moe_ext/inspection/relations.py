"""Relates experts: of neighbouring layers, of one layer, and of earlier checkpoints."""

from typing import List, Optional, Sequence, Tuple

import numpy as np
import torch
import torch.nn.functional as F

from ..evaluation.specialisation import SHUFFLES
from ..moe.layer import MoELayer
from .knowing import bits
from .observing import LayerView
from .result import Pair

SHOWN = 64  # experts that a matrix has, the most used ones
PAIRS = 6


def most_used(view: LayerView) -> List[int]:
    """Up to SHOWN experts, by number."""
    counts = np.bincount(view.chosen.ravel(), minlength=view.experts + 1)[: view.experts]
    return sorted(np.argsort(-counts, kind="stable")[:SHOWN].tolist())


def together(view: LayerView, shown: Sequence[int]) -> Optional[List[List[float]]]:
    """Of the tokens that go to an expert (row), the share that go to another, too (column); None
    where a token goes to one expert only. The diagonal is 0."""
    if view.chosen.shape[1] == 1:
        return None
    member = _members(view.chosen, view.experts)[:, shown].astype(np.float32)  # (T, n)
    both = member.T @ member
    shares = both / np.maximum(np.diag(both), 1)[:, None]
    np.fill_diagonal(shares, 0)
    return shares.tolist()


def flow(
    view: LayerView, following: LayerView, shown: Sequence[int], columns: Sequence[int]
) -> Tuple[List[List[float]], float]:
    """Of the tokens whose first choice is an expert (row), the share with each first choice in the
    next MoE layer (column); and the bits of information that one carries about the other, without
    the bias of finite counts."""
    here, there = (some_view.chosen[:, 0].astype(np.int64) for some_view in (view, following))
    table = np.zeros((view.experts + 1, following.experts + 1))
    np.add.at(table, (here, there), 1)
    table = table[: view.experts]
    shares = table / np.maximum(table.sum(axis=1, keepdims=True), 1)
    experts, rng = following.experts + 1, np.random.default_rng(1)
    bias = np.mean([bits(rng.permutation(here), there, experts) for _ in range(SHUFFLES)])
    return shares[np.ix_(shown, columns)].tolist(), float(bits(here, there, experts) - bias)


@torch.no_grad()
def similarity(
    moe: MoELayer, view: LayerView, shown: Sequence[int]
) -> Tuple[List[List[float]], List[List[float]], List[Pair]]:
    """Cosines of the router's rows, mean cosines of the experts' outputs on the same inputs, and
    the pairs with the highest ones: those that are candidates for merging."""
    rows = F.normalize(moe.gate.expert_vectors()[list(shown)], dim=-1)  # (n, D)
    routers = (rows @ rows.T).cpu()
    inputs = view.inputs if moe.latent is None else moe.latent.down(view.inputs)  # (t, D)
    counts = [len(inputs) if e in set(shown) else 0 for e in range(view.experts)]
    outputs = moe.experts(inputs.repeat(len(shown), 1), counts).float()  # (n t, D)
    outputs = F.normalize(outputs.view(len(shown), len(inputs), -1), dim=-1)
    mean = (torch.einsum("atd,btd->ab", outputs, outputs) / len(inputs)).cpu()
    above = torch.triu_indices(len(shown), len(shown), offset=1)
    order = mean[above[0], above[1]].argsort(descending=True, stable=True)[:PAIRS]
    pairs = [
        Pair(shown[a], shown[b], float(mean[a, b]), float(routers[a, b]))
        for a, b in above[:, order].T.tolist()
    ]
    return routers.tolist(), mean.tolist(), pairs


def agreement(earlier: LayerView, last: LayerView) -> Tuple[float, float]:
    """The share of the last model's choices that the earlier one makes too (OLMoE's router
    saturation, arXiv 2409.02060, section 4.1), and the same for choices drawn by each model's
    loads."""
    if earlier.experts != last.experts:
        return float("nan"), float("nan")
    members_before, members_last = (_members(view.chosen, view.experts) for view in (earlier, last))
    number = max(1, int(members_last.sum()))
    chance = float(
        (members_before.mean(axis=0) * members_last.mean(axis=0)).sum()
        * len(members_before)
        / number
    )
    return float((members_before & members_last).sum() / number), chance


def _members(chosen: np.ndarray, experts: int) -> np.ndarray:
    """chosen (T, K) -> (T, E) bool."""
    members = np.zeros((len(chosen), experts + 1), dtype=bool)
    np.put_along_axis(members, chosen.astype(np.int64), True, axis=1)
    return members[:, :experts]
