"""How much information a router's choice carries about the text, in bits, with two controls.

Mutual information by itself means little. Hidden states differ by kind of text and by token, so any
router separates them, and finite counts suggest information where there is none. Hence two
controls, on the same text and the same inputs of each layer:

- random gates: rows of random direction, each as long as that of the learned gate, so that the
  logits have the same scale;
- shuffles: blocks of text get the kinds of other blocks, tokens the ids of others. The information
  that remains is the bias of finite counts. It is subtracted from all gates, learned and random.
"""

from pathlib import Path
from typing import Any, Callable, Dict, List, Sequence, Tuple, TypedDict, cast

import numpy as np
import torch
import torch.nn.functional as F

from .. import files
from ..errors import UserError

RANDOM = 5  # gates
SHUFFLES = 5
TOKENS = 2**19  # that are looked at, an equal part of each data-bin
COMMAND = "fairseq-moe expert-use"
DEVIATIONS = 3  # above the random gates' mean; of five about the end of the 95 % range of a sixth
MEANING = (
    "Bits: the information that one choice of expert carries about where a token is from, without "
    "the bias of finite counts; random: mean and standard deviation of the same for "
    f"{RANDOM} random gates of equal scale on the same inputs. Only information above theirs was "
    "learned, or comes from the table of a hash router. For the token itself, only the first "
    "choice counts."
)


class Information(TypedDict):
    """Mutual information of the choices in one layer, in bits, beside the controls."""

    bits: float  # as counted
    bias: float  # of finite counts, from shuffles
    random: List[float]  # of each random gate, without its bias
    random_mean: float
    random_sd: float
    left: float  # bits - bias - random_mean
    above: bool  # whether that is more than the random gates' deviation explains


class LayerUse(TypedDict, total=False):
    """One MoE layer, as `expert-use` writes it. Older files have the first three."""

    layer: int  # from 0
    tokens: Dict[str, int]  # by data-bin
    share: Dict[str, List[float]]  # data-bin -> (E,) shares that sum to 1
    among: List[str]  # the data-bins that `information` is taken over
    information: Dict[str, Information]  # "domain" (of several data-bins), "token"


def read(path: Path) -> List[LayerUse]:
    """Read what COMMAND wrote. Raises UserError for any other file."""
    remedy = f"create it with `{COMMAND} --json`"
    content = files.read_json(path, remedy=remedy)
    layers = content if isinstance(content, list) else [content]
    if not layers or not all(isinstance(x, dict) and {"layer", "share"} <= set(x) for x in layers):
        raise UserError(f"{path}: lacks layer and share: {remedy}")
    return cast(List[LayerUse], layers)


def mutual_information(joint: Any) -> float:
    """Bits of information that a column carries about the row, from counts or shares (rows,
    columns). Rows that sum to 1 each are equally likely: 0 where all use the columns alike,
    log2(rows) where a column gives the row away."""
    p = np.asarray(joint, dtype=np.float64)
    p = p / (p.sum() or 1)  # 0 of no choice at all
    independent = p.sum(1, keepdims=True) * p.sum(0)
    some = p > 0
    return float((p[some] * np.log2(p[some] / independent[some])).sum())


def computing(gate: Any) -> int:
    """The experts of a gate that compute: all but the null experts, the last ones."""
    return len(gate.expert_vectors()) - int(gate.settings.null_experts)


def random_gates(gate: Any, generator: torch.Generator) -> torch.Tensor:
    """RANDOM gates, (RANDOM, E, D). Each row has the norm of its row in the learned gate, or 1 if
    that is 0. All null experts, if there are any, share one more row, E, as in the learned gate."""
    weight = gate.expert_vectors()[: computing(gate) + 1]
    drawn = torch.randn(RANDOM, *weight.shape, generator=generator).to(weight.device)
    length = weight.norm(dim=-1, keepdim=True)  # 0 for a router without a gate
    drawn *= length.where(length > 0, 1.0) / drawn.norm(dim=-1, keepdim=True)
    return drawn


def choices_of(gates: torch.Tensor, x: torch.Tensor, gate: Any, most: int) -> torch.Tensor:
    """What random gates choose for x (T, D): (T, RANDOM, K) int64, best first. K is `most`; with
    null experts that of the learned gate, and E, no choice, comes last."""
    logits, null = torch.einsum("td,red->tre", x.float(), gates), gate.settings.null_experts
    if not null:
        return logits.topk(most, dim=-1).indices
    logits = torch.cat([logits, *[logits[..., -1:]] * (null - 1)], dim=-1)
    best = logits.topk(gate.settings.top_k, dim=-1).indices.clamp(max=computing(gate))
    last = (best == computing(gate)).to(torch.int8).argsort(dim=-1, stable=True)
    return best.gather(-1, last)


def routed_first(routed: torch.Tensor) -> torch.Tensor:
    """routed (T, N) bool, of ranked experts -> (T, K) int64: their places, the routed ones first. A
    gate may rank all experts and route to some of them: a token to K at most."""
    most = max(1, int(routed.sum(dim=1).max()))
    return (~routed).to(torch.int8).argsort(dim=1, stable=True)[:, :most]


def joined(parts: Sequence[np.ndarray], no_choice: Any) -> np.ndarray:
    """Parts (T, ..., K) of several widths K -> one array, filled up with `no_choice`."""
    most = max(part.shape[-1] for part in parts)
    missing = [[(0, 0)] * (part.ndim - 1) + [(0, most - part.shape[-1])] for part in parts]
    return np.concatenate(
        [np.pad(part, pad, constant_values=no_choice) for part, pad in zip(parts, missing)]
    )


class Watch:
    """The choices of one layer's gate, and as many of random gates on the same inputs. Counts are
    kept, and first choices alone: a router may choose many experts."""

    def __init__(self, gate: Any, generator: torch.Generator) -> None:
        self.experts, self.random = computing(gate), random_gates(gate, generator)
        # (1 + RANDOM, blocks, E) each, the learned gate's first
        self._tables: List[np.ndarray] = []
        self._first: List[np.ndarray] = []  # (T, 1 + RANDOM) each
        self.length = 1  # of the blocks in the next pass
        self.on = True
        gate.register_forward_hook(self._see)

    def _see(self, gate: Any, args: Any, output: Any) -> None:
        if self.on:
            routed, order = output[1].routed, routed_first(output[1].routed)
            chosen = output[1].experts.masked_fill(~routed, self.experts)
            learned = chosen.gather(1, order)  # (T, K)
            others = choices_of(self.random, args[0], gate, learned.size(1))
            if gate.settings.null_experts:  # the random gates choose how many of them
                missing = others.size(-1) - learned.size(1)
                learned = F.pad(learned, (0, missing), value=self.experts)
            else:
                others = others.masked_fill(learned.unsqueeze(1) == self.experts, self.experts)
            every = torch.cat([learned.unsqueeze(1), others], dim=1).cpu().numpy()
            blocks = np.arange(len(every)) // self.length
            self._tables.append(by_block(every, self.experts, blocks, int(blocks[-1]) + 1))
            self._first.append(every[:, :, 0].astype(np.int16))

    def counted(self) -> Tuple[np.ndarray, np.ndarray]:
        """The first two arguments of `information`."""
        return np.concatenate(self._tables, axis=1), np.concatenate(self._first)


def by_block(choices: np.ndarray, experts: int, blocks: np.ndarray, number: int) -> np.ndarray:
    """choices (T, G, K) of G gates, blocks (T,): the block of text that a token is in -> (G,
    number, E) int32: how often each gate chose each expert in each block. Expert `experts` means no
    choice."""
    tables = [counts(blocks, choices[:, i], number, experts + 1) for i in range(choices.shape[1])]
    return np.stack(tables)[:, :, :-1].astype(np.int32)


def information(
    tables: np.ndarray, first: np.ndarray, token_ids: np.ndarray, kinds: np.ndarray
) -> Dict[str, Information]:
    """The information that choices of gates carry, "domain": any of them about the kind of text,
    all kinds being equally likely (left out where there is one only), "token": a token's first one
    about its type.

    tables (1 + RANDOM, blocks, E): `by_block`. first (T, 1 + RANDOM): first choices; E: none.
    token_ids (T,): the tokens. kinds (blocks,): of the blocks of text.
    """
    rng = np.random.default_rng(1)
    every, experts = range(len(tables)), tables.shape[-1]
    token_ids = np.unique(token_ids, return_inverse=True)[1].ravel()
    number = kinds.max() + 1
    result = {}
    if number > 1:

        def of_kinds(gate: int, labels: np.ndarray) -> float:
            whole = (labels == np.arange(number)[:, None]) @ tables[gate]  # (kinds, experts)
            return mutual_information(whole / np.maximum(whole.sum(1, keepdims=True), 1))

        result["domain"] = beside_controls(of_kinds, every, kinds, rng)

    def of_tokens(gate: int, labels: np.ndarray) -> float:
        return mutual_information(
            counts(labels, first[:, gate, None], token_ids.max() + 1, experts + 1)
        )

    result["token"] = beside_controls(of_tokens, every, token_ids, rng)
    return result


def counts(rows: np.ndarray, chosen: np.ndarray, number: int, experts: int) -> np.ndarray:
    """rows (T,), chosen (T, K) -> (number, experts): how often."""
    places = rows[:, None].astype(np.int64) * experts + chosen
    return np.bincount(places.ravel(), minlength=number * experts).reshape(number, experts)


def beside_controls(
    bits_of: Callable[[int, np.ndarray], float],
    gates: Sequence[int],
    labels: np.ndarray,
    rng: np.random.Generator,
) -> Information:
    """Information of the gates' choices about labels; the first gate is the learned one."""
    raw, bias = [], []
    for gate in gates:
        raw.append(bits_of(gate, labels))
        bias.append(np.mean([bits_of(gate, rng.permutation(labels)) for _ in range(SHUFFLES)]))
    learned, *random = (float(a - b) for a, b in zip(raw, bias))
    mean, deviation = float(np.mean(random)), float(np.std(random, ddof=1))
    return {
        "bits": raw[0],
        "bias": float(bias[0]),
        "random": random,
        "random_mean": mean,
        "random_sd": deviation,
        "left": learned - mean,
        "above": bool(learned - mean > DEVIATIONS * deviation),
    }


def verdict(layers: Sequence[LayerUse], by: str, words: str) -> str:
    """A sentence on the information about "domain" or "token" in all layers, and the controls."""
    if not all("information" in layer for layer in layers):
        return (
            f"By {words} nothing can be said: the file has no controls; count again with {COMMAND}."
        )
    information = [layer["information"][by] for layer in layers if by in layer["information"]]
    if len(information) < len(layers):
        return f"By {words} there is nothing to distinguish: all text is of one kind."
    bits = _range([layer["bits"] - layer["bias"] for layer in information])
    random = _range([value for layer in information for value in layer["random"]])
    against = f"{bits} by layer, random gates of equal scale {random}"
    above = [layer["left"] for layer in information if layer["above"]]
    if not above:
        return f"By {words} nothing is above the control: {against}."
    return (
        f"By {words} {len(above)} of {len(information)} layers are above the control, by "
        f"{_range(above)} ({against})."
    )


def heading(layer: LayerUse) -> str:
    """A layer's bits by domain beside those of random gates; its number alone without controls."""
    information = layer.get("information", {}).get("domain")
    if information is None:
        return f"Layer {layer['layer']}"
    random = f"{_shown(information['random_mean'])} ± {_shown(information['random_sd'])}"
    bits = _shown(information["bits"] - information["bias"])
    return f"Layer {layer['layer']}: {bits} bits, random {random}"


def _range(values: Sequence[float]) -> str:
    ends = map(_shown, (min(values), max(values)))
    return " to ".join(dict.fromkeys(ends)) + " bits"


def _shown(bits: float) -> str:
    return f"{bits:.2f}".replace("-0.00", "0.00").replace("-", "−")
