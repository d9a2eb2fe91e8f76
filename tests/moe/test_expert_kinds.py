"""Shared, latent, gated, fine-grained and null experts, one by one and together, against a loop."""

import pytest
import reference
import torch
import torch.nn.functional as F
from closeness import assert_near, assert_stats_near
from expert_kinds import (
    ACTIVATIONS,
    DIM,
    EXPERTS,
    FFN,
    KINDS,
    build,
    layer_by_loop,
    logits_of,
    loss_of,
    outputs,
)
from expert_layers import inputs
from router_loops import LOOPS, Case
from torch.utils.flop_counter import FlopCounterMode

from fairseq_moe_ext.kernels.batched_ffn import batched
from fairseq_moe_ext.kernels.expert_ffn import by_expert
from fairseq_moe_ext.kernels.grouped_ffn import grouped
from fairseq_moe_ext.kernels.stacks import Weights
from fairseq_moe_ext.moe.activations import geglu, swiglu
from fairseq_moe_ext.moe.balance import balance_loss
from fairseq_moe_ext.moe.experts import FeedForward, plain_expert_ffn
from fairseq_moe_ext.moe.layer import MoELayer
from fairseq_moe_ext.moe.router import ROUTERS, GateSettings

TOKENS = 22


@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_layer_equals_the_loop(kind, top_k):
    """Outputs, losses, metrics, and the gradient of everything."""
    layer = build(*kind, top_k=top_k)
    x, weight, padding = inputs(TOKENS)
    x.requires_grad_()
    output = layer(x, padding)
    parameters = dict(layer.named_parameters())
    found = torch.autograd.grad(loss_of(output, weight), [x, *parameters.values()])

    null = kind[-1]
    capacity = reference.train_capacity(int((~padding).sum()), EXPERTS + null, 1.0)
    options = {"top_k": top_k, "capacity": capacity, "padding_mask": padding, "null": null}
    truth = layer_by_loop(x, parameters, kind[0], **options)
    expected = torch.autograd.grad(loss_of(truth, weight), [x, *parameters.values()])
    assert truth.stats["overflow"] > 0 and (null == 0 or 0 < truth.stats["null_share"] < 100)
    assert_near(output.out, truth.out, 1e-12, "out")
    assert_near(output.balance_loss, truth.balance_loss, 1e-12, "balance loss")
    assert_stats_near(output.stats, truth.stats, 1e-12)
    assert output.expert_counts.tolist() == truth.expert_counts
    for name, mine, true in zip(["x", *parameters], found, expected):
        assert_near(mine, true, 1e-11, f"gradient of {name}")


@pytest.mark.parametrize("kind", KINDS[:: len(KINDS) // 7], ids=str)
def test_gradients_against_finite_differences(kind):
    layer = build(*kind)
    x, weight, padding = inputs(TOKENS)
    x, weight, padding = x[:6], weight[:6], padding[:6]
    names = [name for name, _ in layer.named_parameters()]

    def loss(*values):
        output = torch.func.functional_call(layer, dict(zip(names, values)), (x, padding))
        return loss_of(output, weight)

    values = [p.detach().clone().requires_grad_() for p in layer.parameters()]
    assert torch.autograd.gradcheck(loss, values, fast_mode=True)


@pytest.mark.parametrize("activation", [swiglu, geglu])
@pytest.mark.parametrize("way", [batched, by_expert, plain_expert_ffn, grouped])
def test_every_kernel_computes_gated_experts(way, activation):
    """Each row through its expert, with a mask for dropout."""
    if way is grouped and not hasattr(F, "grouped_mm"):
        pytest.skip("this torch has no grouped_mm")
    dtype, near = (torch.float32, 1e-5) if way is grouped else (torch.float64, 1e-12)
    torch.manual_seed(0)
    counts, dim, width = [3, 0, 4], 8, 4
    shapes = (3, 2 * width, dim), (3, 2 * width), (3, dim, width), (3, dim)
    weights = Weights(*(torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes))
    x = torch.randn(7, dim, dtype=dtype, requires_grad=True)
    mask = torch.randint(0, 2, (7, width)).to(dtype)
    expected = []
    for row, expert in enumerate([0, 0, 0, 2, 2, 2, 2]):
        h = weights.w1[expert] @ x[row] + weights.b1[expert]
        gate = F.silu(h[:width]) if activation is swiglu else F.gelu(h[:width])
        expected.append(weights.w2[expert] @ (gate * h[width:] * mask[row]) + weights.b2[expert])
    expected = torch.stack(expected)
    found = way(x, counts, weights, activation, mask)
    assert_near(found, expected, near, "out")
    inputs = [x, *weights]
    grads = torch.autograd.grad(found.square().sum(), inputs)
    for mine, true in zip(grads, torch.autograd.grad(expected.square().sum(), inputs)):
        assert_near(mine, true, near, "gradient")


def test_at_granularity_1_fine_grained_experts_are_the_others_to_the_bit():
    """m E experts of width F / m, of which a token uses m K; m = 1."""

    def made(granularity):
        torch.manual_seed(3)
        settings = GateSettings(top_k=2 * granularity, dropless=True, second_expert_policy="all")
        return MoELayer.build(DIM, 12 // granularity, 4 * granularity, settings).double()

    x, _, _ = inputs(TOKENS)
    torch.manual_seed(3)
    plain = MoELayer.build(DIM, 12, 4, GateSettings(dropless=True, second_expert_policy="all"))
    assert torch.equal(made(1)(x).out, plain.double()(x).out)
    fine = made(3)
    assert fine.experts.fc1.weight.shape == (12, 4, DIM)
    assert (fine(x).expert_counts.sum(dim=1) == len(x)).all()


def test_split_experts_add_up_to_the_whole():
    """A network of width 3 F is the sum of three of width F, which is what makes grains fine."""
    torch.manual_seed(0)
    whole = FeedForward(DIM, 3 * FFN, swiglu).double()
    x, _, _ = inputs(TOKENS)
    total = -2 * whole.fc2.bias
    for part in range(3):
        rows = slice(part * FFN, (part + 1) * FFN)
        grain = FeedForward(DIM, FFN, swiglu).double()
        with torch.no_grad():
            for half in range(2):
                of_whole = slice(half * 3 * FFN + rows.start, half * 3 * FFN + rows.stop)
                of_grain = slice(half * FFN, (half + 1) * FFN)
                grain.fc1.weight[of_grain] = whole.fc1.weight[of_whole]
                grain.fc1.bias[of_grain] = whole.fc1.bias[of_whole]
            grain.fc2.weight.copy_(whole.fc2.weight[:, rows])
            grain.fc2.bias.copy_(whole.fc2.bias)
        total = total + grain(x)
    assert_near(total, whole(x), 1e-12)


def test_a_token_that_no_expert_takes_gets_the_shared_ones_alone():
    layer = build("swiglu", 7, 3, factor=0.2)
    x, _, _ = inputs(TOKENS)
    with torch.no_grad():
        out, shared = layer(x).out, layer.shared(x)
    dropped = (out == shared).all(dim=1)
    assert 0 < int(dropped.sum()) < len(x)


def test_null_experts_as_published():
    """2 real experts, 2 null ones, K = 2: weights are shared among the real choices alone."""
    layer = build("gelu", 0, 0, 2, factor=9.0)
    logits = torch.tensor([[3.0, 2.0, 0, 0, 1], [2.0, 0, 0, 0, 1], [1.0, 0, 0, 0, 3]]).double()
    logits = layer.gate.of_every_expert(logits, dim=1)
    assert logits.shape == (3, EXPERTS + 2) and torch.equal(logits[:, -1], logits[:, -2])
    routing = layer.gate.route(logits, None, None)
    assert routing.experts.tolist() == [[0, 1], [0, 4], [4, 5]]
    assert routing.kept.tolist() == [[True, True], [True, False], [False, False]]
    p = logits.softmax(dim=1)
    first = p[0, 0] / (p[0, 0] + p[0, 1])
    assert_near(routing.weights, torch.tensor([[first, 1 - first], [1, 0], [0, 0]]).double(), 1e-12)
    assert routing.counts.sum(dim=0).tolist() == [2, 1, 0, 0, 2, 1]
    # balanced when a quarter of all choices, not of first ones, is each expert's
    even = build("gelu", 0, 0, 4, top_k=4, factor=9.0)
    share = torch.zeros(8, EXPERTS + 4).double()
    loss = balance_loss(even.gate.route(share, None, None))
    assert float(loss) == pytest.approx(1.0)


def test_rows_that_reach_null_experts_are_not_computed():
    """Their FLOPs are not spent, which the metric says."""
    layer = build("gelu", 0, 0, 3, top_k=3, factor=9.0)
    x, _, _ = inputs(TOKENS)
    with FlopCounterMode(display=False) as counter:
        output = layer(x)
    rows = round(3 * len(x) * (1 - float(output.stats["null_share"]) / 100))
    assert rows < 3 * len(x)
    gate = 2 * len(x) * DIM * (EXPERTS + 1)
    assert counter.get_total_flops() == gate + rows * 4 * DIM * FFN


COUNTS = [3, 1, 7, 2, 2, 5, 4, 1]  # of the tokens of a vocabulary, for the router hash


ROUTED = [(name, 0) for name in sorted(LOOPS)]
ROUTED += [(name, 3) for name in sorted(LOOPS) if "null_experts" in ROUTERS[name].heeds]


@pytest.mark.parametrize("shared, latent", [(7, 0), (0, 3), (7, 3)])
@pytest.mark.parametrize("activation", ["swiglu", "geglu"])
@pytest.mark.parametrize("name, null", ROUTED)
def test_every_router_with_every_kind(name, activation, shared, latent, null):
    """By the routers' own loops: outputs, and the gradients of everything but their losses."""
    router, k = ROUTERS[name], 1 if name == "base" else 2
    settings = GateSettings(k, dropless=True, second_expert_policy="all", null_experts=null)
    torch.manual_seed(4)
    layer = MoELayer.build(
        DIM, FFN, EXPERTS, settings, router=name, token_counts=COUNTS, shared_ffn_dim=shared,
        latent_dim=latent, activation=ACTIVATIONS[activation],
    ).double()  # fmt: skip
    x, ids = torch.randn(9, DIM).double().requires_grad_(), torch.arange(9) % len(COUNTS)
    p = {**dict(layer.named_buffers()), **dict(layer.named_parameters())}
    normalize = settings.normalize == "after" and "normalize_weights" in router.heeds
    case = Case(
        k, True, "softmax", 1.0, normalize=normalize and not null, padding=[False] * 9,
        tokens=ids.tolist(), counts=COUNTS,
    )  # fmt: skip
    logits = x.new_zeros(9, EXPERTS) if name == "hash" else logits_of(x, p, null)
    choices = LOOPS[name](logits, case)
    if null:
        choices = [[(e, w) for e, w in chosen if e < EXPERTS] for chosen in choices]
        sums = [sum(w for _, w in chosen) for chosen in choices]
        choices = [[(e, w / total) for e, w in chosen] for chosen, total in zip(choices, sums)]
    expected = outputs(x, p, activation, choices)
    found = layer(x, token_ids=ids).out
    assert_near(found, expected, 1e-9, "out")
    inputs = [x, *layer.parameters()]
    given = {"materialize_grads": True, "allow_unused": True}
    weight = torch.randn(x.shape, dtype=x.dtype)
    grads = torch.autograd.grad((expected * weight).sum(), inputs, **given)
    for mine, true in zip(torch.autograd.grad((found * weight).sum(), inputs, **given), grads):
        assert_near(mine, true, 1e-8, "gradient", scale=1 + float(true.abs().max()))
