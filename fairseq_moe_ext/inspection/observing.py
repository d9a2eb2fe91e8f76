"""Runs a model over blocks of text: records what its gates choose, and the loss of every token."""

from typing import Any, Callable, List, NamedTuple, Optional, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from fairseq.models import FairseqLanguageModel
from torch import Tensor

from ..evaluation.loading import moe_layers
from ..evaluation.specialisation import choices_of, computing, joined, random_gates, routed_first
from ..evaluation.texts import batches
from ..models.token_scores import in_chunks, log_probs
from ..moe.router import TopKRouter
from .reading import Block

CANDIDATES = 4  # of a token that are shown, chosen or not
SAMPLE = 128  # inputs of a layer on which experts are compared


class LayerView(NamedTuple):
    """What a layer's gate did with T tokens; expert E means no choice, or a null expert."""

    layer: int
    experts: int
    chosen: np.ndarray  # (T, K) int16, best first
    probability: np.ndarray  # (T,) float16, of the first choice
    kept: np.ndarray  # (T, K) bool
    random: np.ndarray  # (T, R) int16: the first choices of gates that learned nothing
    entropy: np.ndarray  # (T,) float32, bits
    candidates: np.ndarray  # (T, C, 3) float32: expert, probability, how; (0, C, 3) unless asked
    inputs: Tensor  # (n, D): a sample of the layer's inputs
    null_experts: int = 0
    null_share: float = 0.0  # of the choices


class View(NamedTuple):
    """What a model did with T tokens, block after block."""

    loss: np.ndarray  # (T,) nats
    layers: List[LayerView]


class WatchedGate:
    """Records the choices of one layer's gate."""

    def __init__(self, layer: int, gate: TopKRouter, detailed: bool, generator: Any) -> None:
        self.layer, self.experts, self.detailed = layer, computing(gate), detailed
        self.null_experts, self.choices, self.nulls = gate.settings.null_experts, 0, 0
        self.random = random_gates(gate, generator)  # (RANDOM, E or E + 1, D)
        self.real: Optional[Tensor] = None  # (T,) which tokens of the next batch count
        self.parts: List[List[np.ndarray]] = []
        self.inputs: List[Tensor] = []
        self.sampled = 0
        self.handle = gate.register_forward_hook(self._see)

    def _see(self, gate: TopKRouter, args: Any, output: Any) -> None:
        x, routing = args[0][self.real], output[1]
        whole, experts = routing.probs[self.real].float(), routing.experts[self.real]
        routed, kept = routing.routed[self.real], routing.kept[self.real]
        how = torch.zeros_like(whole)  # 0: not chosen, 1: dropped, 2: kept
        how.scatter_(1, experts, routed.float() + kept.float())
        probs = whole[:, : self.experts]  # (T, E)
        if routing.chosen is not None:  # null experts, too
            self.choices += int(routing.chosen[self.real].sum())
            self.nulls += int((routing.chosen & ~routing.routed)[self.real].sum())
        order = routed_first(routed)
        chosen = experts.masked_fill(~routed, self.experts).gather(1, order)  # (T, K)
        ranked = F.pad(probs, (0, 1))  # (T, E + 1): the choices first, in their order
        ranks = probs.amax() + torch.arange(chosen.shape[1], 0, -1, device=probs.device)
        ranked.scatter_(1, chosen, ranks.expand(chosen.shape))
        shown = ranked[:, :-1].topk(min(CANDIDATES, self.experts), dim=1).indices
        shown = shown if self.detailed else shown[:0]
        rows = slice(0, len(shown))
        first = chosen[:, :1].clamp(max=self.experts - 1)
        others = choices_of(self.random, x, gate, 1)[..., 0]
        values = (
            chosen.to(torch.int16),
            probs.gather(1, first)[:, 0].half(),
            kept.gather(1, order),
            others.to(torch.int16),
            torch.special.entr(whole).sum(-1) / np.log(2),
            torch.stack(
                [shown.float(), probs[rows].gather(1, shown), how[rows].gather(1, shown)], dim=-1
            ),
        )
        self.parts.append([value.cpu().numpy() for value in values])
        if self.sampled < SAMPLE:
            few = x[:: max(1, len(x) // 16)][: SAMPLE - self.sampled]
            self.sampled += len(few)
            self.inputs.append(few)

    def view(self) -> LayerView:
        self.handle.remove()
        chosen, probability, kept, random, entropy, candidates = zip(*self.parts)
        probability, random, entropy, candidates = map(
            np.concatenate, (probability, random, entropy, candidates)
        )
        return LayerView(
            self.layer,
            self.experts,
            joined(chosen, self.experts),
            probability,
            joined(kept, False),
            random,
            entropy,
            candidates,
            torch.cat(self.inputs),
            self.null_experts,
            self.nulls / max(1, self.choices),
        )


def observe(
    model: FairseqLanguageModel,
    blocks: Sequence[Block],
    batch_size: int,
    progress: Callable[[int], Any] = lambda tokens: None,
    detailed: bool = False,
) -> View:
    """Run the model over the blocks. The token before a block is its context: it is neither scored
    nor counted.

    Args:
        progress: called with the number of tokens done since the last call.
        detailed: keep the candidates of every token.
    """
    generator = torch.Generator().manual_seed(1)
    gates = [WatchedGate(i, moe.gate, detailed, generator) for i, moe in moe_layers(model).items()]
    losses = []
    try:
        for rows in batches((block.row for block in blocks), len, batch_size):
            losses.append(_pass(model, torch.stack(rows), gates))
            progress(len(losses[-1]))
    finally:
        for gate in gates:
            gate.handle.remove()
    return View(np.concatenate(losses), [gate.view() for gate in gates])


def _pass(model: FairseqLanguageModel, tokens: Tensor, gates: Sequence[WatchedGate]) -> np.ndarray:
    """tokens (B, L) -> the losses of all but the first of each row, (B (L - 1),)."""
    tokens = tokens.to(next(model.parameters()).device)
    real = torch.ones_like(tokens, dtype=torch.bool)
    real[:, 0] = False
    for gate in gates:
        gate.real = real.flatten()
    with torch.no_grad():
        x, _ = model.decoder(tokens, features_only=True)  # (B, L, D)
        scores = in_chunks(
            log_probs, model.decoder, x[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()
        )
    return -torch.cat(scores).double().cpu().numpy()
