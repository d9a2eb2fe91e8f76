"""Padding that is routed nowhere counts nowhere: as if it were not there. Or, by the branch's rule,
in capacity, means and figures."""

import math

import pytest
import reference
import torch
import torch.nn.functional as F
from closeness import assert_near, assert_stats_near
from processes import run_processes

from fairseq_moe_ext.expert_parallel import WorldScope
from fairseq_moe_ext.moe.balance import balance_loss
from fairseq_moe_ext.moe.layer import MoELayer
from fairseq_moe_ext.moe.router import GateSettings
from fairseq_moe_ext.moe.routing import route
from fairseq_moe_ext.moe.stats import routing_stats

EXPERTS = 4
SETTINGS = {
    "top-2": {},
    "top-2, factor": {"capacity_factor": 0.7},
    "top-2, prioritized": {"batch_prioritized": True},
    "top-2, normalized before": {"normalize_before_dropping": True},
    "top-2, dropless": {"dropless": True},
    "top-1": {"top_k": 1},
    "top-1, factor": {"top_k": 1, "capacity_factor": 1.5},
}
TRAINING = -1.0


def layer_of(settings, fraction, scope=None):
    torch.manual_seed(0)
    more = {} if scope is None else {"scope": scope}
    settings = GateSettings(
        **{"second_expert_policy": "all", "eval_token_fraction": fraction, **settings}
    )
    layer = MoELayer.build(6, 5, EXPERTS, settings, **more).double()
    return layer.train(fraction == TRAINING)


def batch(rows=5, length=9, dtype=torch.float64):
    """x (rows, length, 6) and a mask of rows that are padded on the right; one is all padding."""
    generator = torch.Generator().manual_seed(3)
    x = 2 * torch.randn(rows, length, 6, generator=generator, dtype=dtype) + 1.0
    lengths = torch.tensor([length, 4, 2, 0, 7])[:rows]
    return x, torch.arange(length) >= lengths.unsqueeze(1)


def results(layer, x, mask, real):
    """Output of the real tokens, losses, and gradients of their loss."""
    x = x.clone().requires_grad_()
    found = layer(x, mask)
    out = found.out[real]
    r = torch.linspace(-1, 1, out.numel(), dtype=x.dtype).view_as(out)
    loss = (out * r).sum() + 1.5 * found.balance_loss + 0.1 * found.z_loss
    grads = torch.autograd.grad(loss, [x, *layer.parameters()], allow_unused=True)
    grads = [grads[0][real], *(torch.zeros(()) if g is None else g for g in grads[1:])]
    return found, [out, found.balance_loss, found.z_loss, *grads]


@pytest.mark.parametrize("fraction", [TRAINING, 0.25, 1.0])
@pytest.mark.parametrize("name", SETTINGS)
def test_padding_is_as_if_it_were_not_there(name, fraction):
    """Whatever padding there is, however much: the same as of the real tokens alone."""
    x, mask = batch()
    layer = layer_of(SETTINGS[name], fraction)
    alone, expected = results(layer, x[~mask], None, slice(None))
    wide = F.pad(x, (0, 0, 0, 20), value=7.0)
    for values, padding in ((x, mask), (wide, F.pad(mask, (0, 20), value=True))):
        found, values = results(layer, values, padding, ~padding)
        for value, true in zip(values, expected):
            assert_near(value, true, 1e-12, scale=1.0)
        assert_stats_near(found.stats, {k: float(v) for k, v in alone.stats.items()}, 1e-12)
        assert found.expert_counts.tolist() == alone.expert_counts.tolist()
    if "dropless" not in name and fraction != 1.0:
        dropped = sum(v for key, v in alone.stats.items() if key.startswith("overflow"))
        assert dropped > 0  # so that capacity matters


@pytest.mark.parametrize("policy", ["sampling", "random"])
def test_nor_with_noise(policy):
    x, mask = batch()
    logits, real = layer_of({}, TRAINING).gate.wg(x.flatten(0, 1)), ~mask.flatten()
    noise = torch.rand(logits.shape if policy == "sampling" else logits.shape[:1]).double()
    options = {"runner_up": policy, "capacity": 5}
    masked = route(logits, 2, padding_mask=~real, noise=noise, **options)
    alone = route(logits[real], 2, noise=noise[real], **options)
    assert torch.equal(masked.weights[real], alone.weights)
    assert_near(balance_loss(masked), balance_loss(alone), 1e-12)
    expected = {k: float(v) for k, v in routing_stats(alone).items()}
    assert_stats_near(routing_stats(masked), expected, 1e-12)


@pytest.mark.parametrize("padding", [0, 1, 90, 4000])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_a_perfectly_balanced_gate_shows_one(k, padding):
    logits = 9 * torch.eye(EXPERTS).repeat(3, 1)
    logits = torch.cat([logits, torch.randn(padding, EXPERTS)])
    mask = torch.arange(len(logits)) >= 12
    routing = route(logits, k, padding_mask=mask)
    assert float(balance_loss(routing)) == pytest.approx(1.0)
    figures = routing_stats(routing)
    assert figures["expert1_balance_top"] == pytest.approx(25.0)
    assert figures["unused_expert1_count"] == 0
    if padding and k <= 2:  # with more, shares are of the choices, and padding has none
        counted = balance_loss(route(logits, k, padding_mask=mask, count_padding=True))
        assert float(counted) < 0.95


@pytest.mark.parametrize("fraction", [TRAINING, 0.25])
@pytest.mark.parametrize("rule", [False, True])
def test_the_layer_takes_its_capacity_by_the_rule(rule, fraction):
    x, mask = batch()
    layer = layer_of({"count_padding": rule}, fraction)
    tokens = mask.numel() if rule else int((~mask).sum())
    assert (mask.numel(), int((~mask).sum())) == (45, 22)
    capacity = 2 * math.ceil(tokens / EXPERTS) if fraction < 0 else math.ceil(fraction * tokens)
    experts = layer.experts
    weights = experts.fc1.weight, experts.fc1.bias, experts.fc2.weight, experts.fc2.bias
    expected = reference.moe_layer(
        x.flatten(0, 1), layer.gate.wg.weight, *weights, F.gelu,
        top_k=2, capacity=capacity, padding_mask=mask.flatten().tolist(), count_padding=rule,
    )  # fmt: skip
    found = layer(x, mask)
    assert_near(found.out.flatten(0, 1), expected.out, 1e-12, "out")
    assert_near(found.balance_loss, expected.balance_loss, 1e-12, "balance loss")
    assert_near(found.z_loss, expected.z_loss, 1e-12, "z-loss")
    assert_stats_near(found.stats, expected.stats, 1e-10)


def of_a_share(rank, settings, fraction):
    """Of the rows of this process, padded to another length than the other's."""
    x, mask = batch()
    layer = layer_of(settings, fraction, WorldScope())
    rows, length = (slice(0, 1), 9) if rank == 0 else (slice(1, 5), 7)
    x, mask = x[rows, :length], mask[rows, :length]
    with torch.no_grad():
        found = layer(x, mask)
    return found.out[~mask], found.balance_loss, found.z_loss, found.stats


@pytest.mark.parametrize("fraction", [TRAINING, 0.25])
@pytest.mark.parametrize("name", [name for name in SETTINGS if "prioritized" not in name])
def test_nor_on_two_processes(name, fraction):
    x, mask = batch()
    alone = layer_of(SETTINGS[name], fraction)(x[~mask])
    outs, *rest = zip(*run_processes(2, of_a_share, SETTINGS[name], fraction))
    assert_near(torch.cat(outs), alone.out, 1e-12)
    for loss, z, stats in zip(*rest):
        assert_near(loss, alone.balance_loss, 1e-12)
        assert_near(z, alone.z_loss, 1e-12)
        assert_stats_near(stats, {k: float(v) for k, v in alone.stats.items()}, 1e-12)
