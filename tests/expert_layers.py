"""Layers whose experts are spread over processes, and what they give."""

import torch

from fairseq_moe_ext.expert_parallel import placement
from fairseq_moe_ext.moe.exchange import HERE
from fairseq_moe_ext.moe.layer import MoELayer
from fairseq_moe_ext.moe.router import GateSettings

DIM, FFN, TOKENS = 6, 10, 24


def build(experts, settings, exchange=HERE, **options):
    torch.manual_seed(5)
    options = {"grad_scale": 1.0, **options}
    return MoELayer.build(DIM, FFN, experts, settings, exchange=exchange, **options).double()


def inputs(tokens=TOKENS):
    """Tokens (T, D), a weight for each number of the output, and padding (T,)."""
    torch.manual_seed(6)
    x = torch.randn(tokens, DIM, dtype=torch.float64)
    # uneven use of the experts, so that capacity drops some
    return x + x[:, :1], torch.randn(tokens, DIM, dtype=torch.float64), torch.rand(tokens) < 0.2


def step(layer, x, weight, padding, share=1.0):
    """Forward and backward; `share` is this process's share of the scope's loss."""
    x = x.clone().requires_grad_()
    result = layer(x, padding)
    loss = (result.out * weight).sum() + share * (result.balance_loss + 0.1 * result.z_loss)
    loss.backward()
    return {
        "out": result.out.detach(),
        "balance_loss": result.balance_loss.detach(),
        "z_loss": result.z_loss.detach(),
        "stats": result.stats,
        "x": x.grad,
        "gate": layer.gate.wg.weight.grad,
        "experts": [p.grad for p in layer.experts.parameters()],
        "weights": [p.detach() for p in layer.experts.parameters()],
    }


def combined(results, experts):
    """The processes' results as one process would have them."""
    world = len(results)
    holders = placement(experts, world, 0).holders
    whole = {key: torch.cat([r[key] for r in results]) for key in ("out", "x")}
    for key in ("experts", "weights"):
        whole[key] = [torch.cat(parts) for parts in zip(*(results[r][key] for r in holders))]
    whole["gate"] = results[0]["gate"]
    for rank, result in enumerate(results):  # replicas agree
        twin = results[rank % len(holders)]
        for grad, same in zip(result["experts"], twin["experts"]):
            torch.testing.assert_close(grad, same, rtol=0, atol=0)
    return whole


def assert_same(one, many):
    for key in ("out", "x", "gate", "experts", "weights"):
        torch.testing.assert_close(many[key], one[key], rtol=1e-9, atol=1e-12, msg=key)


SETTINGS = {
    "dropless": GateSettings(dropless=True, second_expert_policy="all"),
    "capacity": GateSettings(capacity_factor=1.0, second_expert_policy="all"),
    "tight": GateSettings(capacity_factor=0.5, second_expert_policy="all"),
    "top1": GateSettings(top_k=1),
    "top4": GateSettings(top_k=4, capacity_factor=2.0, second_expert_policy="all"),
}
