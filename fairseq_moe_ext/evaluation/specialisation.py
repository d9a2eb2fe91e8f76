"""How many bits a gate's choice tells about the text, beside what a gate tells that learnt nothing.

A figure of mutual information says little by itself. Hidden states differ by kind of text and by
token, so that any gate tells them apart, and finite counts tell something where there is nothing.
So there are two controls, on the same text and the same inputs of each layer:

- random gates: rows of random direction, each as long as that of the learnt gate, so that the
  logits have the same scale;
- shuffles: blocks of text get the kinds of other blocks, tokens the types of others. What is told
  then is the bias of finite counts, and is taken off, of the learnt gate and of the random ones.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Dict, List, Sequence, TypedDict, cast

import numpy as np
import torch

from .. import files
from ..errors import UserError

if TYPE_CHECKING:
    pass

RANDOM = 5  # gates
SHUFFLES = 5
TOKENS = 2**19  # that are looked at, an equal part of each data-bin
DEVIATIONS = 3  # above the random gates' mean; of five about the end of the 95 % range of a sixth
MEANING = (
    "Bits: what one choice of expert tells about where a token is from, without the bias of finite "
    f"counts; random: the mean and standard deviation of the same over {RANDOM} random gates of "
    "equal scale on the same inputs. Only what is above them was learnt. Of the type of token the "
    "first choice tells."
)


class Information(TypedDict):
    """Bits that the choices of one layer tell, beside the controls."""

    bits: float  # as counted
    bias: float  # of finite counts, from shuffles
    random: List[float]  # of each random gate, without its bias
    random_mean: float
    random_sd: float
    left: float  # bits - bias - random_mean
    above: bool  # whether that is more than the random gates' deviation explains


class LayerUse(TypedDict, total=False):
    """One MoE layer, as evaluation.expert_use writes it. Older files have the first three."""

    layer: int  # from 0
    tokens: Dict[str, int]  # by data-bin
    share: Dict[str, List[float]]  # data-bin -> (E,) shares that sum to 1
    among: List[str]  # the data-bins that `information` is taken over
    information: Dict[str, Information]  # "domain" (of several data-bins), "token"


def read(path: Path) -> List[LayerUse]:
    """What evaluation.expert_use wrote. Raises UserError for a file that holds something else."""
    remedy = "make it with evaluation.expert_use --json"
    try:
        found = files.read_json(path)
    except UserError as error:
        raise UserError(f"{error}: {remedy}") from None
    layers = found if isinstance(found, list) else [found]
    if not layers or not all(isinstance(x, dict) and {"layer", "share"} <= set(x) for x in layers):
        raise UserError(f"{path}: lacks layer and share: {remedy}")
    return cast(List[LayerUse], layers)


def mutual_information(joint: Any) -> float:
    """Bits that a column tells about the row, from counts or shares (rows, columns). Rows that sum
    to 1 each are equally likely: 0 where all use the columns alike, log2(rows) where a column gives
    the row away."""
    p = np.asarray(joint, dtype=np.float64)
    p = p / p.sum()
    independent = p.sum(1, keepdims=True) * p.sum(0)
    some = p > 0
    return float((p[some] * np.log2(p[some] / independent[some])).sum())


class Watch:
    """The choices of one layer's gate, and those of random gates on the same inputs."""

    def __init__(self, gate: Any, generator: torch.Generator) -> None:
        weight = gate.expert_vectors()  # (E, D)
        drawn = torch.randn(RANDOM, *weight.shape, generator=generator).to(weight.device)
        length = weight.norm(dim=-1, keepdim=True)  # 0 for a router without a gate
        drawn *= length.where(length > 0, 1.0) / drawn.norm(dim=-1, keepdim=True)
        self.experts = len(weight)
        self.random = drawn.flatten(0, 1)  # (RANDOM E, D)
        self.parts: List[np.ndarray] = []  # (T, 1 + RANDOM, K) each, the learnt gate's first
        self.on = True
        gate.register_forward_hook(self._see)

    def _see(self, gate: Any, args: Any, output: Any) -> None:
        if self.on:
            # a gate may rank all experts, and route to the first few
            learnt = output[1].experts[:, : gate.settings.top_k]  # (T, K)
            logits = (args[0].float() @ self.random.T).view(len(learnt), RANDOM, self.experts)
            others = logits.topk(learnt.size(1), dim=-1).indices
            every = torch.cat([learnt.unsqueeze(1), others], dim=1)
            self.parts.append(every.to(torch.int16).cpu().numpy())

    def choices(self) -> np.ndarray:
        """(T, 1 + RANDOM, K)."""
        return np.concatenate(self.parts)


def information(
    choices: np.ndarray,
    experts: int,
    types: np.ndarray,
    blocks: np.ndarray,
    kinds: np.ndarray,
) -> Dict[str, Information]:
    """What choices (T, 1 + RANDOM, K) of gates tell, "domain": any of them about the kind of text,
    all kinds being equally likely (left out where there is one only), "token": a token's first one
    about its type.

    types (T,): the tokens. blocks (T,): the block of text, from 0, that a token is in. kinds
    (blocks,): of each.
    """
    rng = np.random.default_rng(1)
    every = range(choices.shape[1])
    types = np.unique(types, return_inverse=True)[1].ravel()
    number = kinds.max() + 1
    found = {}
    if number > 1:
        tables = [_counts(blocks, choices[:, gate], len(kinds), experts) for gate in every]

        def of_kinds(gate: int, labels: np.ndarray) -> float:
            whole = (labels == np.arange(number)[:, None]) @ tables[gate]  # (kinds, experts)
            return mutual_information(whole / whole.sum(1, keepdims=True))

        found["domain"] = beside_controls(of_kinds, every, kinds, rng)

    def of_types(gate: int, labels: np.ndarray) -> float:
        return mutual_information(_counts(labels, choices[:, gate, :1], types.max() + 1, experts))

    found["token"] = beside_controls(of_types, every, types, rng)
    return found


def _counts(rows: np.ndarray, chosen: np.ndarray, number: int, experts: int) -> np.ndarray:
    """rows (T,), chosen (T, K) -> (number, experts): how often."""
    places = rows[:, None].astype(np.int64) * experts + chosen
    return np.bincount(places.ravel(), minlength=number * experts).reshape(number, experts)


def beside_controls(
    told: Callable[[int, np.ndarray], float],
    gates: Sequence[int],
    labels: np.ndarray,
    rng: np.random.Generator,
) -> Information:
    """What the gates tell about labels; the first gate is the learnt one."""
    raw, bias = [], []
    for gate in gates:
        raw.append(told(gate, labels))
        bias.append(np.mean([told(gate, rng.permutation(labels)) for _ in range(SHUFFLES)]))
    learnt, *random = (float(a - b) for a, b in zip(raw, bias))
    mean, deviation = float(np.mean(random)), float(np.std(random, ddof=1))
    return {
        "bits": raw[0],
        "bias": float(bias[0]),
        "random": random,
        "random_mean": mean,
        "random_sd": deviation,
        "left": learnt - mean,
        "above": bool(learnt - mean > DEVIATIONS * deviation),
    }


def verdict(layers: Sequence[LayerUse], by: str, words: str) -> str:
    """A sentence on what all layers tell by "domain" or "token", beside the controls."""
    if not all("information" in layer for layer in layers):
        return (
            f"By {words} nothing is said: the file has no controls, as older ones have none; count "
            "again with evaluation.expert_use."
        )
    found = [layer["information"][by] for layer in layers if by in layer["information"]]
    if len(found) < len(layers):
        return f"By {words} there is nothing to tell: all text is of one kind."
    bits = _range([one["bits"] - one["bias"] for one in found])
    random = _range([value for one in found for value in one["random"]])
    against = f"{bits} by layer, random gates of equal scale {random}"
    above = [one["left"] for one in found if one["above"]]
    if not above:
        return f"By {words} nothing is above the control: {against}."
    return (
        f"By {words} {len(above)} of {len(found)} layers are above the control, by {_range(above)} "
        f"({against})."
    )


def heading(layer: LayerUse) -> str:
    """A layer's bits by domain beside those of random gates; its number alone without controls."""
    one = layer.get("information", {}).get("domain")
    if one is None:
        return f"Layer {layer['layer']}"
    random = f"{_shown(one['random_mean'])} ± {_shown(one['random_sd'])}"
    return f"Layer {layer['layer']}: {_shown(one['bits'] - one['bias'])} bits, random {random}"


def _range(values: Sequence[float]) -> str:
    ends = map(_shown, (min(values), max(values)))
    return " to ".join(dict.fromkeys(ends)) + " bits"


def _shown(bits: float) -> str:
    return f"{bits:.2f}".replace("-0.00", "0.00").replace("-", "−")
