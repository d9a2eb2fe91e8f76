"""The truth of the MoE layer: a plain Python loop over tokens, read from top to bottom.

Nothing here is fast and nothing here is shared with the package; the tests compare the package with
it. Arithmetic is done on rows and scalars of torch tensors in the dtype of the inputs (float64 in
most tests), so autograd through the loop gives the gradients as well.

Semantics: GShard (arXiv 2006.16668, algorithm 1) as published with fairseq's `moe` branch, whose
own numbers (`tests/data/gates_and_layers.npz`) this file is held against in
`tests/moe/test_reference.py`.

Letters: T tokens, D model, F hidden, E experts, K choices per token.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, Optional

import torch
from torch import Tensor

# The branch adds it to every expert's percentage, so that its logarithm exists.
FLOAT32_TINY = 2.0**-126


class Choice(NamedTuple):
    """One of the K choices of one token."""

    expert: int
    weight: Tensor  # () factor of the expert's output; 0 where the token is not sent or is dropped
    routed: bool  # sent to the expert: not padding, not sampled away, not to a null expert
    slot: int  # place in the expert's queue, from 0; -1 where not routed
    kept: bool  # routed and slot < capacity
    chosen: bool  # routed, or would be if the expert were not null


class Routes(NamedTuple):
    probs: list[Tensor]  # T rows of (E,)
    choices: list[list[Choice]]  # T rows of K
    counts: list[bool]  # T: whether losses and statistics count the token
    null: int  # the last so many experts compute nothing


class Output(NamedTuple):
    out: Tensor  # (T, D)
    balance_loss: Tensor  # ()
    z_loss: Tensor  # ()
    stats: dict[str, float]
    expert_counts: list[list[int]]  # K rows of E


def train_capacity(tokens: int, experts: int, factor: float) -> int:
    """Slots per expert in training; the branch's factor is 1 for top-1 and 2 for top-2."""
    return int(factor * math.ceil(tokens / experts))


def eval_capacity(tokens: int, fraction: float) -> int:
    """Slots per expert at evaluation, as a fraction of all tokens."""
    return math.ceil(fraction * tokens)


def softmax(row: Tensor) -> Tensor:
    exponentials = torch.exp(row - row.max().detach())  # (E,)
    return exponentials / exponentials.sum()


def argmax(row: Tensor) -> int:
    """The first of the largest: a tie goes to the expert with the lower number."""
    values = row.tolist()
    return values.index(max(values))


def route(
    logits: Tensor,
    *,
    top_k: int,
    capacity: Optional[int],
    padding_mask: Optional[Sequence[bool]] = None,
    count_padding: bool = False,
    score: str = "softmax",
    bias: Optional[Sequence[float]] = None,
    second_expert_policy: str = "all",
    normalize_before_dropping: bool = False,
    batch_prioritized: bool = False,
    noise: Optional[Tensor] = None,
    null: int = 0,
) -> Routes:
    """Choose experts, weights and slots for every token.

    logits (T, E). capacity None drops nothing. count_padding is the branch's rule: padding is sent
    nowhere, and counts in losses and statistics all the same. bias (E,) is added to the scores for
    the choice alone. noise is (T, E) Gumbel numbers for
    the policy "sampling" and (T,) uniform numbers for "random". The last `null` experts compute
    nothing; a choice of one stands in its queue, and is neither routed nor kept.
    """
    tokens, experts = logits.shape
    padding = [False] * tokens if padding_mask is None else [bool(p) for p in padding_mask]
    eps = torch.finfo(logits.dtype).eps
    zero = logits.new_zeros(())

    # 1. what every token wants
    probs: list[Tensor] = []
    scores: list[Tensor] = []
    wanted: list[list[int]] = []  # T rows of K experts
    routed: list[list[bool]] = []
    weights: list[list[Tensor]] = []
    for t in range(tokens):
        gates = softmax(logits[t]) if score == "softmax" else 1 / (1 + torch.exp(-logits[t]))
        scores.append(gates)
        probs.append(gates if score == "softmax" else gates / gates.sum())
        liked = gates.detach().clone()
        rivals = logits[t].detach().clone()
        if bias is not None:
            for e in range(experts):
                liked[e] = liked[e] + bias[e]
            rivals = liked.clone()
        chosen = [argmax(liked)]
        if second_expert_policy == "sampling":
            rivals = rivals + noise[t]
        while len(chosen) < top_k:
            rivals[chosen[-1]] = -math.inf
            chosen.append(argmax(rivals))
        given = [gates[e] for e in chosen]
        if normalize_before_dropping:
            total = torch.clamp(sum(given), min=eps)
            given = [weight / total for weight in given]
        sent = [not padding[t]] * top_k
        if second_expert_policy == "random" and top_k == 2:
            sent[1] = sent[1] and bool(2 * given[1].detach() > noise[t])
        wanted.append(chosen)
        weights.append(given)
        routed.append(sent)

    # 2. who stands where in which queue: all first choices, then all second ones, ...
    order = list(range(tokens))
    if batch_prioritized:
        order.sort(key=lambda t: -max(scores[t].tolist()))  # stable: ties stay in token order
    queue = [0] * experts
    slots = [[-1] * top_k for _ in range(tokens)]
    for k in range(top_k):
        for t in order:
            if routed[t][k]:
                slots[t][k] = queue[wanted[t][k]]
                queue[wanted[t][k]] += 1

    # 3. drop what stands beyond the capacity, and settle the weights
    choices: list[list[Choice]] = []
    for t in range(tokens):
        chosen = routed[t]
        routed[t] = [sent and e < experts - null for sent, e in zip(chosen, wanted[t])]
        kept = [routed[t][k] and (capacity is None or slots[t][k] < capacity) for k in range(top_k)]
        final = [weights[t][k] if kept[k] else zero for k in range(top_k)]
        if top_k > 1 and not normalize_before_dropping:
            total = torch.clamp(sum(final), min=eps)
            final = [weight / total for weight in final]
        choices.append(
            [
                Choice(wanted[t][k], final[k], routed[t][k], slots[t][k], kept[k], chosen[k])
                for k in range(top_k)
            ]
        )
    return Routes(probs, choices, [count_padding or not p for p in padding], null)


def balance_loss(routes: Routes) -> Tensor:
    """E^2 * mean over experts of (mean gate) * (share of tokens whose first choice it is).

    With more than two choices a token, or null experts, the share is of all choices. Shares are
    those before dropping. Tokens that do not count are as if they were not there; padding that does
    counts in the mean gate and in the number of tokens, and not as a first
    choice.
    """
    experts = len(routes.probs[0])
    counted = [gates for gates, counts in zip(routes.probs, routes.counts) if counts]
    tokens = max(len(counted), 1)
    loss = 0.0 * routes.probs[0].sum()
    for e in range(experts):
        mean_gate = sum(gates[e] for gates in counted) / tokens
        if len(routes.choices[0]) <= 2 and routes.null == 0:
            share = sum(c[0].routed and c[0].expert == e for c in routes.choices) / tokens
        else:
            sent = [c.expert for choices in routes.choices for c in choices if c.chosen]
            share = sent.count(e) / max(len(sent), 1)
        loss = loss + mean_gate * share
    return loss / experts * experts**2


def z_loss(logits: Tensor, counts: Sequence[bool]) -> Tensor:
    """Mean over the tokens that count of logsumexp(logits)^2 (ST-MoE, arXiv 2202.08906, equation
    5)."""
    total = 0.0 * logits.sum()
    for row, counted in zip(logits, counts):
        if counted:
            highest = row.max().detach()
            total = total + (highest + torch.log(torch.exp(row - highest).sum())) ** 2
    return total / max(sum(counts), 1)


def statistics(routes: Routes) -> dict[str, float]:
    """The branch's figures, in percent, nats and experts, of the first two choices; overflow and
    the largest load over the mean load, of all.

    Balance, unused and entropy are of the tokens that count, and count every second choice, also
    one that the policy "random" sampled away; overflow is a percentage of what was routed. Null
    experts are left out of all but the entropy, and their share of the choices stands beside.
    """
    experts = len(routes.probs[0]) - routes.null
    counted = [t for t, counts in enumerate(routes.counts) if counts]
    tokens = max(len(counted), 1)
    stats = {}
    entropy = 0.0
    for t in counted:
        gates = routes.probs[t]
        entropy += sum(-p * math.log(p) for p in gates.tolist() if p > 0)
    stats["entropy_gating"] = entropy / tokens
    everything = [choice for choices in routes.choices for choice in choices if choice.routed]
    dropped = sum(not choice.kept for choice in everything)
    loads = [sum(choice.expert == e for choice in everything) for e in range(experts)]
    stats["overflow"] = 100 * dropped / max(len(everything), 1)
    stats["load_max"] = max(loads) * experts / max(len(everything), 1)
    stats["max_vio"] = max(stats["load_max"] - 1, 0)
    if routes.null:
        chosen = sum(choice.chosen for choices in routes.choices for choice in choices)
        stats["null_share"] = 100 * (chosen - len(everything)) / max(chosen, 1)
    stats["experts_per_token"] = len(everything) / tokens
    group = math.ceil(0.2 * experts)
    for k in range(min(len(routes.choices[0]), 2)):
        name = f"expert{k + 1}"
        sent = sum(choices[k].routed for choices in routes.choices)
        dropped = sum(choices[k].routed and not choices[k].kept for choices in routes.choices)
        stats[f"overflow_{name}"] = 100 * dropped / sent if sent else 0.0
        share = [0.0] * experts  # % of tokens
        for t in counted:
            if routes.choices[t][k].expert < experts:
                share[routes.choices[t][k].expert] += 100 / tokens
        stats[f"unused_{name}_count"] = share.count(0.0)
        share = sorted(percent + FLOAT32_TINY for percent in share)
        stats[f"{name}_balance_top"] = sum(share[-group:])
        stats[f"{name}_balance_bottom"] = sum(share[:group])
    return stats


def expert_counts(routes: Routes) -> list[list[int]]:
    """How many tokens each choice sends to each expert, null ones too, before dropping."""
    counts = []
    for k in range(len(routes.choices[0])):
        counts.append([0] * len(routes.probs[0]))
        for choices in routes.choices:
            counts[k][choices[k].expert] += choices[k].chosen
    return counts


def moe_layer(
    x: Tensor,
    gate: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    activation: Callable[[Tensor], Tensor],
    **routing,
) -> Output:
    """x (T, D), gate (E, D), w1 (E, F, D), b1 (E, F), w2 (E, D, F), b2 (E, D); rest as `route`."""
    logits = torch.stack([torch.stack([(row * g).sum() for g in gate]) for row in x])  # (T, E)
    routes = route(logits, **routing)
    rows = []
    for t in range(len(x)):
        row = torch.zeros_like(x[t])
        for choice in routes.choices[t]:
            if choice.kept:
                e = choice.expert
                hidden = activation(w1[e] @ x[t] + b1[e])  # (F,)
                row = row + choice.weight * (w2[e] @ hidden + b2[e])
        rows.append(row)
    return Output(
        torch.stack(rows),
        balance_loss(routes),
        z_loss(logits, routes.counts),
        statistics(routes),
        expert_counts(routes),
    )
