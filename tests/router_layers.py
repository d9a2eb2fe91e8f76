"""Layers with a router, and what they are given."""

import torch
from router_loops import LOOPS

from fairseq_moe_ext.moe.layer import MoELayer
from fairseq_moe_ext.moe.router import ROUTERS, GateSettings

NAMES = sorted(name for name in LOOPS)
DIM, FFN, VOCABULARY = 5, 7, 12
COUNTS = [1, 40, 3, 30, 17, 2, 2, 9, 0, 5, 11, 4]


def settings_of(name, k=2, **options):
    """GateSettings without dropping and without noise, as far as the router heeds them."""
    k = ROUTERS[name].default_top_k if k is None or name == "base" else k
    options = {o: v for o, v in options.items() if o in ROUTERS[name].heeds | {"top_groups"}}
    if "groups" not in options:
        options.pop("top_groups", None)
    return GateSettings(top_k=k, dropless=True, second_expert_policy="all", **options)


def layer_of(name, experts=4, seed=0, settings=None, **options):
    torch.manual_seed(seed)
    settings = settings or settings_of(name, **options)
    layer = MoELayer.build(DIM, FFN, experts, settings, router=name, token_counts=COUNTS).double()
    for p in layer.parameters():
        p.data.normal_(std=0.7)
    return layer


def batch(tokens=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, DIM, generator=generator).double()
    return x, torch.randint(VOCABULARY, (tokens,), generator=generator)


def adapted(layer, updates=1):
    """The layer after updates, on other batches."""
    for seed in range(100, 100 + updates):
        x, ids = batch(40, seed)
        layer.gate.after_update(observed(layer, x, ids))
    return layer


def observed(layer, x, ids, padding=None):
    logits, routing = layer.gate(x, padding, token_ids=ids)
    return layer.gate.observe(logits, routing, padding)
