"""Cases in which the layer's answer is known without computing it."""

import math

import pytest
import torch
import torch.nn.functional as F
from closeness import assert_near
from torch.utils.checkpoint import checkpoint

from fairseq_moe_ext.moe.layer import MoELayer
from fairseq_moe_ext.moe.router import GateSettings

DIM = 4


def layer_of_factors(experts, settings):
    """Expert e is x -> (e + 1) x, and token x has the logits x (as far as there are experts)."""
    layer = MoELayer.build(DIM, DIM, experts, settings, activation=lambda hidden: hidden).double()
    with torch.no_grad():
        layer.gate.wg.weight.copy_(torch.eye(experts, DIM))
        layer.experts.fc1.weight.copy_(torch.eye(DIM).expand(experts, DIM, DIM))
        factors = torch.arange(1.0, experts + 1).view(-1, 1, 1)
        layer.experts.fc2.weight.copy_(torch.eye(DIM) * factors)
        layer.experts.fc1.bias.zero_()
        layer.experts.fc2.bias.zero_()
    return layer


def tokens_with(*rows):
    """Tokens that are the logarithms of the router's probabilities for them."""
    return torch.log(torch.tensor(rows, dtype=torch.float64))


def test_top1_scales_by_probability_and_factor():
    x = tokens_with([0.7, 0.1, 0.1, 0.1], [0.1, 0.1, 0.6, 0.2], [0.1, 0.2, 0.2, 0.5])
    out = layer_of_factors(4, GateSettings(top_k=1, dropless=True))(x).out
    factors = torch.tensor([0.7 * 1, 0.6 * 3, 0.5 * 4], dtype=torch.float64)
    assert_near(out, factors[:, None] * x, 1e-14)


def test_top2_is_the_weighted_mean_of_two_factors():
    x = tokens_with([0.6, 0.3, 0.05, 0.05], [0.1, 0.2, 0.1, 0.6])
    settings = GateSettings(dropless=True, second_expert_policy="all")
    out = layer_of_factors(4, settings)(x).out
    factors = torch.tensor([(2 * 1 + 1 * 2) / 3, (3 * 4 + 1 * 2) / 4], dtype=torch.float64)
    assert_near(out, factors[:, None] * x, 1e-14)


@pytest.mark.parametrize("shape", [(6, DIM), (2, 3, DIM), (1, 2, 3, DIM)])
def test_identity_experts_are_the_identity(shape):
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64)
    layer = layer_of_factors(3, GateSettings(dropless=True))
    with torch.no_grad():
        layer.experts.fc2.weight.copy_(torch.eye(DIM).expand(3, DIM, DIM))
    assert_near(layer(x).out, x, 1e-14)


def test_overflow_leaves_tokens_without_an_expert():
    """8 tokens want expert 0 first and expert 1 second; each takes 2 in order of the tokens."""
    x = tokens_with([0.6, 0.3, 0.05, 0.05]).repeat(8, 1)
    settings = GateSettings(capacity_factor=1.0, second_expert_policy="all")
    output = layer_of_factors(4, settings)(x)
    assert_near(output.out[:2], x[:2] * 4 / 3, 1e-14)
    assert torch.equal(output.out[2:], torch.zeros(6, DIM, dtype=torch.float64))
    assert float(output.stats["overflow_expert1"]) == 75.0
    assert float(output.stats["overflow_expert2"]) == 75.0
    assert output.expert_counts.tolist() == [[8, 0, 0, 0], [0, 8, 0, 0]]
    # me = (0.6, ...), ce = (1, 0, 0, 0): 16 * mean = 16 * 0.6 / 4.
    assert float(output.balance_loss.detach()) == pytest.approx(2.4, rel=1e-12)
    assert float(output.z_loss.detach()) == pytest.approx(0.0, abs=1e-12)


def test_one_call_can_set_the_capacity_aside():
    x = tokens_with([0.6, 0.3, 0.05, 0.05]).repeat(8, 1)
    layer = layer_of_factors(4, GateSettings(capacity_factor=1.0, second_expert_policy="all"))
    assert_near(layer(x, dropless=True).out, x * 4 / 3, 1e-14)
    layer = layer_of_factors(4, GateSettings(dropless=True, second_expert_policy="all"))
    for mode in (True, False):
        assert_near(layer.train(mode)(x).out, x * 4 / 3, 1e-14)


def test_a_second_choice_alone_gets_all_the_weight_or_its_share():
    x = tokens_with([0.6, 0.3, 0.05, 0.05], [0.6, 0.05, 0.3, 0.05])
    for before, factor in [(False, 3.0), (True, 3.0 / 3)]:
        settings = GateSettings(
            capacity_factor=1.0, second_expert_policy="all", normalize_before_dropping=before
        )
        out = layer_of_factors(4, settings)(x).out
        assert_near(out[0], x[0] * 4 / 3, 1e-14)
        assert_near(out[1], x[1] * factor, 1e-14)


def test_batch_prioritized_serves_the_surest_token():
    x = tokens_with([0.6, 0.3, 0.05, 0.05], [0.8, 0.1, 0.05, 0.05])
    settings = GateSettings(capacity_factor=1.0, second_expert_policy="all", batch_prioritized=True)
    out = layer_of_factors(4, settings)(x).out
    assert torch.equal(out[0], torch.zeros(DIM, dtype=torch.float64))
    assert_near(out[1], x[1] * (8 * 1 + 1 * 2) / 9, 1e-14)


def test_equal_experts_are_a_dense_layer():
    torch.manual_seed(0)
    x = torch.randn(10, DIM, dtype=torch.float64)
    for experts, top_k in [(1, 1), (5, 2)]:
        layer = MoELayer.build(DIM, 7, experts, GateSettings(top_k=top_k, dropless=True)).double()
        with torch.no_grad():
            for parameter in layer.experts.parameters():
                parameter.copy_(torch.randn_like(parameter[:1]).expand_as(parameter))
        fc1, fc2 = layer.experts.fc1, layer.experts.fc2
        hidden = F.gelu(F.linear(x, fc1.weight[0], fc1.bias[0]))
        assert_near(layer(x).out, F.linear(hidden, fc2.weight[0], fc2.bias[0]), 1e-13)


def test_padding_gets_nothing_and_changes_nothing():
    torch.manual_seed(0)
    layer = MoELayer.build(
        DIM, 7, 3, GateSettings(dropless=True, second_expert_policy="all")
    ).double()
    x = torch.randn(2, 5, DIM, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[0, 0, 0, 1, 1], [0, 0, 0, 0, 1]]).bool()
    out = layer(x, mask).out
    assert not out[mask].any()
    assert_near(out[~mask], layer(x[~mask]).out, 1e-13)
    out.sum().backward()
    assert not x.grad[mask].any()


def test_a_dropless_token_does_not_see_the_others():
    torch.manual_seed(0)
    layer = MoELayer.build(
        DIM, 7, 3, GateSettings(dropless=True, second_expert_policy="all")
    ).double()
    x = torch.randn(9, DIM, dtype=torch.float64)
    whole = layer(x).out
    for t in range(9):
        assert_near(layer(x[t : t + 1]).out, whole[t : t + 1], 1e-13)
    order = torch.randperm(9)
    assert_near(layer(x[order]).out, whole[order], 1e-13)


def test_balance_loss_bounds():
    """1 when all is even, E when all goes to one expert."""
    layer = layer_of_factors(4, GateSettings(top_k=1, dropless=True))
    even = layer(40.0 * torch.eye(4, dtype=torch.float64)).balance_loss
    assert float(even.detach()) == pytest.approx(1.0)
    one = layer(40.0 * torch.eye(4, dtype=torch.float64)[:1].repeat(6, 1)).balance_loss
    assert float(one.detach()) == pytest.approx(4.0)


def test_z_loss_is_the_square_of_the_log_partition():
    layer = layer_of_factors(4, GateSettings(top_k=1, dropless=True))
    z = layer(torch.full((3, DIM), 2.0, dtype=torch.float64)).z_loss
    assert float(z.detach()) == pytest.approx((2 + math.log(4)) ** 2)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("policy", ["all", "sampling", "random"])
def test_losses_reach_the_gate_under_activation_checkpointing(reentrant, policy):
    torch.manual_seed(0)
    layer = MoELayer.build(DIM, 7, 3, GateSettings(second_expert_policy=policy)).double()
    x = torch.randn(12, DIM, dtype=torch.float64, requires_grad=True)

    def losses(x):
        output = layer(x)
        return output.out, output.balance_loss, output.z_loss

    def gradients(call):
        torch.manual_seed(1)
        out, balance, z = call(x)
        wanted = [layer.gate.wg.weight, layer.experts.fc1.weight, x]
        total = out.pow(2).sum() + balance + z
        layer.zero_grad()
        x.grad = None
        total.backward()
        return [tensor.grad.clone() for tensor in wanted]

    def balance_alone(call):
        layer.zero_grad()
        torch.manual_seed(1)
        call(x)[1].backward()
        return layer.gate.wg.weight.grad.clone()

    def checkpointed(x):
        return checkpoint(losses, x, use_reentrant=reentrant)

    for ours, plain in zip(gradients(checkpointed), gradients(losses)):
        assert torch.equal(ours, plain)
    assert balance_alone(losses).abs().max() > 0
    assert torch.equal(balance_alone(checkpointed), balance_alone(losses))


@pytest.mark.parametrize("top_k", [1, 2])
def test_gradients_are_those_of_finite_differences(top_k):
    torch.manual_seed(0)
    settings = GateSettings(top_k=top_k, second_expert_policy="all", capacity_factor=1.0)
    layer = MoELayer.build(3, 5, 4, settings).double()
    x = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in layer.named_parameters()]

    def function(x, *parameters):
        output = torch.func.functional_call(layer, dict(zip(names, parameters)), (x,))
        return output.out, output.balance_loss, output.z_loss

    parameters = [p.detach().clone().requires_grad_() for p in layer.parameters()]
    assert torch.autograd.gradcheck(function, (x, *parameters))


@pytest.mark.parametrize(
    "changes",
    [
        dict(top_k=0),
        dict(top_k=5),
        dict(second_expert_policy="smapling"),
        dict(capacity_factor=0),
        dict(capacity_factor=math.nan),
        dict(eval_token_fraction=1.5),
        dict(eval_token_fraction=math.nan),
    ],
)
def test_settings_that_would_be_others_are_refused(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        layer_of_factors(4, GateSettings(**changes))


def test_a_token_needs_as_many_experts_as_it_goes_to():
    with pytest.raises(ValueError, match="top_k 2: a token can go to 1 to all 1 experts"):
        layer_of_factors(1, GateSettings())
