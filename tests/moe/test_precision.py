"""Precisions, memory layouts and sizes that are legal and unusual."""

import math

import pytest
import torch
from closeness import assert_near

from fairseq_moe_ext.moe import experts
from fairseq_moe_ext.moe.layer import MoELayer
from fairseq_moe_ext.moe.router import GateSettings

PLAIN = {"second_expert_policy": "all", "dropless": True}


def run(layer, x, mask=None):
    output = layer(x, mask)
    (output.out.float().pow(2).sum() + output.balance_loss + output.z_loss).backward()
    return output


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("use_fp32", [False, True])
@pytest.mark.parametrize("dtype, rtol", [(torch.float16, 4e-3), (torch.bfloat16, 3e-2)], ids=str)
def test_half_precision_stays_near_double(dtype, rtol, use_fp32, top_k):
    torch.manual_seed(0)
    layer = MoELayer.build(16, 24, 4, GateSettings(top_k=top_k, use_fp32=use_fp32, **PLAIN)).to(
        dtype
    )
    with torch.no_grad():  # logits far apart: rounding turns no choice
        layer.gate.wg.weight.copy_(8 * torch.eye(4, 16))
    x = torch.randn(40, 16)
    # Distances between a token's logits of at least 0.5, by construction of its first 4 numbers.
    x[:, :4] = torch.stack([torch.randperm(4) / 8.0 for _ in range(40)])
    x = x.to(dtype).requires_grad_()
    double = MoELayer.build(16, 24, 4, GateSettings(top_k=top_k, **PLAIN)).double()
    double.load_state_dict(layer.state_dict())
    exact_x = x.detach().double().requires_grad_()
    exact = run(double, exact_x)
    output = run(layer, x)

    assert output.out.dtype == dtype
    assert output.expert_counts.tolist() == exact.expert_counts.tolist()
    assert_near(output.out, exact.out, rtol, "out")
    assert_near(output.balance_loss, exact.balance_loss, rtol, "balance loss")
    assert_near(output.z_loss, exact.z_loss, rtol, "z-loss")
    assert_near(x.grad, exact_x.grad, 4 * rtol, "gradient of x")
    ours = dict(layer.named_parameters())
    for name, parameter in double.named_parameters():
        assert ours[name].grad.dtype == dtype
        assert_near(ours[name].grad, parameter.grad, 4 * rtol, f"gradient of {name}")


def test_gate_in_float32_inside_a_half_precision_layer():
    """The softmax is taken in float32; the output is in the model's precision again."""
    torch.manual_seed(0)
    layer = MoELayer.build(8, 8, 4, GateSettings(use_fp32=True, **PLAIN)).to(torch.bfloat16)
    output = layer(torch.randn(5, 8, dtype=torch.bfloat16))
    assert output.out.dtype == torch.bfloat16
    assert output.balance_loss.dtype == output.z_loss.dtype == torch.float32
    # "At least" float32: a float64 layer is not rounded.
    x = torch.randn(5, 8, dtype=torch.float64)
    exact = layer.double()(x)
    layer.gate.settings = GateSettings(**PLAIN)
    assert torch.equal(exact.out, layer(x).out)


@pytest.mark.parametrize("dropout", ["activation_dropout", "dropout", None])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast(dropout, dtype):
    torch.manual_seed(0)
    rates = {dropout: 0.3} if dropout else {}
    layer = MoELayer.build(16, 16, 4, GateSettings(**PLAIN), **rates)
    x = torch.randn(20, 16, requires_grad=True)
    torch.manual_seed(1)
    exact = layer(x).out
    torch.manual_seed(1)
    with torch.autocast("cpu", dtype):
        output = layer(x)
    output.out.float().sum().backward()
    assert torch.isfinite(x.grad).all()
    assert_near(output.out, exact, 0.1, "out")


@pytest.mark.parametrize("dtype, within", [
    (torch.float32, torch.bfloat16), (torch.float64, torch.float64)
])  # fmt: skip
@pytest.mark.parametrize("tokens", [2, 20])
def test_autocast_gives_few_and_many_tokens_the_precision_of_its_products(tokens, dtype, within):
    """It leaves float64 as it is."""
    layer, linear = MoELayer.build(8, 8, 4, GateSettings(**PLAIN)).to(dtype), torch.nn.Linear(8, 8)
    layer.eval()
    x = torch.randn(tokens, 8, dtype=dtype)
    with torch.no_grad():
        exact = layer(x).out
        with torch.autocast("cpu", torch.bfloat16):
            assert linear.to(dtype)(x).dtype == within
            out = layer(x).out
    assert out.dtype == within
    assert_near(out, exact, 1e-12 if dtype == within else 0.05, "out")


def test_autocast_casts_rows_before_their_kernel_is_chosen(monkeypatch):
    """On a GPU there are grouped products for bfloat16 alone."""
    layer, found = MoELayer.build(8, 8, 4, GateSettings(**PLAIN)), []
    kernel_for = experts.kernel_for
    monkeypatch.setattr(
        experts, "kernel_for", lambda x, weights: found.append(x.dtype) or kernel_for(x, weights)
    )
    with torch.autocast("cpu", torch.bfloat16):
        layer.experts(torch.randn(20, 8), [5] * 4)
    assert found == [torch.bfloat16]


def test_a_gate_s_product_in_float32_on_meta():
    layer = MoELayer.build(8, 8, 4, GateSettings(fp32_product=True)).to("meta")
    assert layer.gate.logits(torch.empty(3, 8, device="meta")).shape == (3, 4)


def test_many_tokens_in_float16():
    """Sums over tokens would overflow float16 (65504) where means do not."""
    layer = MoELayer.build(2, 2, 8, GateSettings(top_k=1, dropless=True)).half()
    with torch.no_grad():
        layer.gate.wg.weight.zero_()  # every probability 1/8; entropy log 8, z-loss log(8)^2
        output = layer(torch.ones(600_000, 2, dtype=torch.float16))
    assert_near(output.balance_loss, 1.0, 1e-3)
    assert_near(output.z_loss, math.log(8) ** 2, 1e-3)
    assert_near(output.stats["entropy_gating"], math.log(8), 1e-3)
    assert float(output.stats["expert1_balance_top"]) == 100.0


def test_extreme_logits_give_finite_losses_and_gradients():
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        layer = MoELayer.build(4, 4, 3, GateSettings(**PLAIN)).to(dtype)
        with torch.no_grad():
            layer.gate.wg.weight.fill_(0.0)[0] = 60.0
        x = torch.tensor([[1.0, 2.0, 3.0, 4.0], [-1.0, -2.0, -3.0, -4.0]], dtype=dtype)
        x.requires_grad_()
        output = layer(x)
        (output.out.sum() + output.balance_loss + output.z_loss).backward()
        assert all(torch.isfinite(value).all() for value in [output.out, x.grad])
        assert all(torch.isfinite(value) for value in output.stats.values())
        assert torch.isfinite(output.z_loss)


@pytest.mark.parametrize("top_k", [1, 2])
def test_layouts_of_the_input(top_k):
    torch.manual_seed(0)
    layer = MoELayer.build(6, 5, 3, GateSettings(top_k=top_k, second_expert_policy="all")).double()
    x = torch.randn(7, 2, 6, dtype=torch.float64)
    mask = torch.rand(7, 2) < 0.3
    for transform in (
        lambda t: t.transpose(0, 1),
        lambda t: t[::2],
        lambda t: t[:, :1].expand(7, 4, *t.shape[2:]),
    ):
        strided, compact = transform(x), transform(x).contiguous()
        rows = transform(mask)
        assert not strided.is_contiguous()
        ours = strided.detach().requires_grad_()
        plain = compact.detach().clone().requires_grad_()
        out, expected = run(layer, ours, rows), run(layer, plain, rows.contiguous())
        assert torch.equal(out.out, expected.out)
        assert torch.equal(ours.grad, plain.grad)


@pytest.mark.parametrize("top_k", [1, 2])
def test_gradient_of_the_output_may_be_expanded(top_k):
    """`out.sum()` hands a stride-0 gradient to the backward pass."""
    torch.manual_seed(0)
    layer = MoELayer.build(6, 5, 3, GateSettings(top_k=top_k, second_expert_policy="all")).double()
    x = torch.randn(7, 6, dtype=torch.float64, requires_grad=True)
    (expanded,) = torch.autograd.grad(layer(x).out.sum(), x)
    out = layer(x).out
    (compact,) = torch.autograd.grad(out, x, torch.ones_like(out))
    assert torch.equal(expanded, compact)


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("padding", ["none", "some", "all"])
def test_deterministic_algorithms(top_k, padding):
    """They are supported, and change nothing, although they fill new memory with NaN: nothing is
    read that was not written."""
    torch.manual_seed(0)
    layer = MoELayer.build(6, 5, 8, GateSettings(top_k=top_k, second_expert_policy="all"))
    x = torch.randn(30, 6, requires_grad=True)
    mask = {"none": None, "some": torch.rand(30) < 0.5, "all": torch.ones(30).bool()}[padding]

    def results():
        layer.zero_grad()
        x.grad = None
        out = run(layer, x, mask).out
        return [out, x.grad, *(parameter.grad for parameter in layer.parameters())]

    expected = results()
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory
        ours = results()
    finally:
        torch.use_deterministic_algorithms(before)
    for one, other in zip(ours, expected):
        assert torch.equal(one, other)


@pytest.mark.parametrize("settings", [{"top_k": 1}, {"top_k": 2}, {"top_k": 2, "dropless": True}])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_no_tokens_at_all(settings, mode):
    """A rank or a batch may have nothing: empty output, losses 0, gradients 0 and not NaN."""
    layer = MoELayer.build(6, 5, 3, GateSettings(**settings)).train(mode == "train")
    x = torch.zeros(0, 6, requires_grad=True)
    output = run(layer, x, torch.zeros(0, dtype=torch.bool))
    assert output.out.shape == (0, 6)
    assert float(output.balance_loss.detach()) == 0.0
    assert float(output.z_loss.detach()) == 0.0
    assert all(torch.isfinite(value) for value in output.stats.values())
    assert output.expert_counts.sum() == 0
    for parameter in layer.parameters():
        assert parameter.grad is None or not parameter.grad.any()


def test_without_gradients_nothing_is_kept():
    layer = MoELayer.build(6, 5, 3, GateSettings())
    with torch.no_grad():
        output = layer(torch.randn(4, 6))
    assert not output.out.requires_grad
    assert all(not value.requires_grad for value in output.stats.values())
    with torch.inference_mode():
        assert torch.isfinite(layer(torch.randn(4, 6)).out).all()


def test_frozen_parts():
    """Gradients are computed for what asks for them, and for the rest not."""
    torch.manual_seed(0)
    layer = MoELayer.build(6, 5, 3, GateSettings(second_expert_policy="all")).double()
    x = torch.randn(9, 6, dtype=torch.float64)
    run(layer, x)
    expected = {name: p.grad.clone() for name, p in layer.named_parameters()}
    for kept in expected:
        for name, parameter in layer.named_parameters():
            parameter.requires_grad_(name == kept)
            parameter.grad = None
        run(layer, x)
        for name, parameter in layer.named_parameters():
            assert (parameter.grad is not None) == (name == kept)
        assert torch.equal(dict(layer.named_parameters())[kept].grad, expected[kept])
