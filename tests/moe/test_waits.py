"""A layer waits for its GPU once: to learn how many rows each expert has. Capacity by the number of
tokens that are not padding, and Sinkhorn's plan for these alone, are known after one wait more."""

import warnings

import pytest
import torch
from waits import Waits
from wide_experts import as_wide

from fairseq_moe_ext.moe.balance import Balance
from fairseq_moe_ext.moe.layer import MoELayer
from fairseq_moe_ext.moe.router import GateSettings

DROPLESS = GateSettings(dropless=True, second_expert_policy="all")
EXPERTS = 40  # of 12 tokens: experts without a row have gradients of their own
ROUTERS = {
    "topk": DROPLESS,
    "noise": DROPLESS._replace(second_expert_policy="sampling"),
    "random": DROPLESS._replace(second_expert_policy="random"),
    "bias": DROPLESS._replace(bias_update_rate=0.01, null_experts=2),
    "capacity": GateSettings(second_expert_policy="all"),
    "groups": DROPLESS._replace(groups=2),
    "relu": DROPLESS,
    "threshold": DROPLESS,
    "hash": DROPLESS,
    "sinkhorn": DROPLESS,
}


@pytest.mark.parametrize("over", ["micro_batch", "sequence"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", ROUTERS)
def test_a_layer_waits_once(name, padded, over):
    router = name if name in ("relu", "threshold", "hash", "sinkhorn") else "topk"
    layer = MoELayer.build(
        6, 5, EXPERTS, ROUTERS[name], router=router, token_counts=[5, 4, 3], balance=Balance(over)
    ).double()
    x = torch.randn(12, 6, dtype=torch.float64, requires_grad=True)
    padding = torch.arange(12) % 6 == 5 if padded else None
    with as_wide(), Waits() as waits:  # as on a GPU: not batched
        result = layer(x, padding, token_ids=torch.arange(12) % 3, length=6)
        losses = (result.balance_loss, result.z_loss, result.router_loss)
        (result.out.sum() + sum(loss for loss in losses if loss is not None)).backward()
    more = {"capacity": {"__int__": 1}, "sinkhorn": {"nonzero": 1}}
    assert waits.counts == {"tolist": 1, **(more.get(name, {}) if padded else {})}


@pytest.mark.parametrize("name", ["bias", "relu", "threshold"])
def test_a_router_updates_its_state_without_waiting(name):
    router = name if name in ("relu", "threshold") else "topk"
    layer = MoELayer.build(6, 5, 4, ROUTERS[name], router=router).double()
    observed = layer(torch.randn(12, 6, dtype=torch.float64)).observed
    with Waits() as waits:
        layer.gate.after_update(observed)
    assert observed and not waits.counts


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("name", ["topk", "noise", "capacity"])
def test_pytorch_counts_one_too(name):
    """Not yet run, for want of a GPU."""
    layer = MoELayer.build(16, 16, 4, ROUTERS[name]).to("cuda", torch.bfloat16)
    x = torch.randn(64, 16, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    layer(x).out.sum().backward()  # what happens at the first call only
    try:
        torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            result = layer(x)
            (result.out.sum() + result.balance_loss + result.z_loss).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len([w for w in seen if "called a synchronizing" in str(w.message)]) == 1
