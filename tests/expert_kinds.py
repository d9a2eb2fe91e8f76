"""Kinds of experts, and the truth of a sparse layer that has them: a plain loop over tokens."""

import itertools

import reference
import torch

from fairseq_moe_ext.moe.activations import GATED
from fairseq_moe_ext.moe.layer import MoELayer
from fairseq_moe_ext.moe.router import GateSettings

DIM, FFN, EXPERTS = 6, 5, 4

# Of MoELayer.build; what is off comes first.
ACTIVATIONS = {"gelu": torch.nn.functional.gelu, **GATED}
SHARED = (0, 7)  # hidden width of the shared experts together
LATENT = (0, 3)
NULL = (0, 1, 3)
KINDS = list(itertools.product(ACTIVATIONS, SHARED, LATENT, NULL))


def gelu(x):
    return 0.5 * x * (1 + torch.erf(x / 2**0.5))


def silu(x):
    return x / (1 + torch.exp(-x))


def network(row, w1, b1, w2, b2, activation):
    """One feed-forward network on one vector, with its two or three matrices written out."""
    if activation == "gelu":
        return w2 @ gelu(w1 @ row + b1) + b2
    width = len(w1) // 2
    gate, linear = w1[:width] @ row + b1[:width], w1[width:] @ row + b1[width:]
    return w2 @ ((silu if activation == "swiglu" else gelu)(gate) * linear) + b2


def logits_of(x, p, null=0):
    """x (T, D) -> (T, E), in which null experts share the gate's last row."""
    gate = p["gate.wg.weight"]
    if null:
        gate = torch.stack([*gate[:-1], *[gate[-1]] * null])
    return torch.stack([torch.stack([(row * w).sum() for w in gate]) for row in x])


def outputs(x, p, activation, choices):
    """x (T, D), p the layer's parameters by name, choices of each token: (expert, weight), ... of
    those that compute -> (T, D)."""
    names = ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")
    rows = []
    for row, chosen in zip(x, choices):
        given = p["latent.down.weight"] @ row if "latent.down.weight" in p else row
        out = torch.zeros_like(given)
        for expert, weight in chosen:
            of_expert = [p[f"experts.{name}"][expert] for name in names]
            out = out + weight * network(given, *of_expert, activation)
        if "latent.up.weight" in p:
            out = p["latent.up.weight"] @ out
        if "shared.fc1.weight" in p:
            out = out + network(row, *(p[f"shared.{name}"] for name in names), activation)
        rows.append(out)
    return torch.stack(rows)


def layer_by_loop(x, p, activation, **routing):
    """x (T, D), p the layer's parameters by name -> reference.Output."""
    logits = logits_of(x, p, routing.get("null", 0))
    routes = reference.route(logits, **routing)
    kept = [[(c.expert, c.weight) for c in choices if c.kept] for choices in routes.choices]
    return reference.Output(
        outputs(x, p, activation, kept),
        reference.balance_loss(routes),
        reference.z_loss(logits, routes.counts),
        reference.statistics(routes),
        reference.expert_counts(routes),
    )


def build(activation, shared, latent, null=0, top_k=2, **options):
    """A layer of this kind in float64, of the same numbers every time."""
    torch.manual_seed(5)
    settings = GateSettings(
        top_k=top_k,
        second_expert_policy="all",
        capacity_factor=options.pop("factor", 1.0),
        null_experts=null,
    )
    return MoELayer.build(
        DIM,
        FFN,
        EXPERTS,
        settings,
        activation=ACTIVATIONS[activation],
        shared_ffn_dim=shared,
        latent_dim=latent,
        **options,
    ).double()


def loss_of(output, weight):
    return (output.out * weight).sum() + output.balance_loss + 0.1 * output.z_loss
