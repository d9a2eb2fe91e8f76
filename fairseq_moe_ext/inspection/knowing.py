"""Information that a layer's first choice of expert carries about a token, beside random gates."""

from typing import Dict, List, Optional, Sequence, Tuple, cast

import numpy as np

from ..evaluation.specialisation import Information, LayerUse, beside_controls, verdict
from ..student_t import t_quantile
from .cards import Counted
from .observing import LayerView
from .result import Knowledge, Layer

GROUPS = 20  # parts of the text that the jackknife leaves out, one at a time
WORDS = {
    "domain": "domain",
    "token": "token",
    "previous": "the token before",
    "position": "position in the document",
}
_DENSE = 1 << 22  # cells of a table that is counted as a whole


def bits(
    labels: np.ndarray, chosen: np.ndarray, experts: int, use: Optional[np.ndarray] = None
) -> float:
    """Mutual information of labels (T,) and choices (T,), from 0, in bits, of the tokens in `use`
    (T,) bool. Equals specialisation.mutual_information of their table, which may be huge."""
    if use is not None:
        labels, chosen = labels[use], chosen[use]
    cells = labels.astype(np.int64) * experts + chosen
    number = int(labels.max()) + 1
    if number * experts < _DENSE:
        table = np.bincount(cells)
        cells = np.flatnonzero(table)
        table = table[cells]
    else:
        cells, table = np.unique(cells, return_counts=True)
    rows, columns = np.bincount(labels), np.bincount(chosen)
    expected = rows[cells // experts].astype(float) * columns[cells % experts] / len(labels)
    return float((table * np.log2(table / expected)).sum() / len(labels))


def knowledge(view: LayerView, seen: Counted) -> Dict[str, Knowledge]:
    """Knowledge of each variable in WORDS that has more than one value."""
    rng = np.random.default_rng(1)
    gates = [view.chosen[:, 0], *view.random.T]
    groups = _groups(seen.blocks)
    by_variable = {}
    for name, labels in (
        ("domain", seen.domains),
        ("token", seen.token_ids),
        ("previous", seen.previous),
        ("position", seen.positions),
    ):
        values, labels = np.unique(labels, return_inverse=True)
        if len(values) > 1:
            by = seen.blocks if name == "domain" else np.arange(len(labels))
            by_variable[name] = _knowledge_of(
                gates, labels.ravel(), by, view.experts + 1, groups, rng
            )
    return by_variable


def _knowledge_of(
    gates: Sequence[np.ndarray],
    labels: np.ndarray,
    by: np.ndarray,
    experts: int,
    groups: np.ndarray,
    rng: np.random.Generator,
) -> Knowledge:
    """by (T,): the units to shuffle for the bias: tokens, or whole blocks, whose tokens share a
    label."""
    firsts = np.unique(by, return_index=True)[1]

    def bits_of(gate: int, of_each: np.ndarray) -> float:
        return bits(of_each[by], gates[gate], experts)

    information = beside_controls(bits_of, range(len(gates)), labels[firsts], rng)
    return Knowledge(**information, interval=_interval(gates, labels, experts, groups, information))


def _interval(
    gates: Sequence[np.ndarray],
    labels: np.ndarray,
    experts: int,
    groups: np.ndarray,
    information: Information,
) -> Optional[Tuple[float, float]]:
    """95 % of the bits above the random gates: the delete-one jackknife over parts of the text
    (Efron and Stein 1981), and the error of the random gates' mean."""
    if groups.max() + 1 < GROUPS:
        return None
    left: List[float] = []
    for group in range(GROUPS):
        learned, *random = (bits(labels, gate, experts, groups != group) for gate in gates)
        left.append(learned - float(np.mean(random)))
    variance = (GROUPS - 1) * float(np.var(left))
    variance += information["random_sd"] ** 2 / len(information["random"])
    half = t_quantile(0.975, GROUPS - 1) * variance**0.5
    return information["left"] - half, information["left"] + half


def _groups(blocks: np.ndarray) -> np.ndarray:
    """(T,): the part of the text, of GROUPS, that a token is in; blocks in turn, so that each part
    has all domains, or stretches where there are few blocks."""
    if blocks.max() + 1 >= GROUPS:
        return blocks % GROUPS
    return np.arange(len(blocks)) * GROUPS // len(blocks)


def said(layers: Sequence[Layer]) -> List[str]:
    """A sentence on each variable."""
    tables = [
        LayerUse(information={k: cast(Information, vars(v)) for k, v in layer.knowledge.items()})
        for layer in layers
    ]
    return [verdict(tables, name, words) for name, words in WORDS.items()]
