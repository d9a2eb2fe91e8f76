"""Cases in which the layer's answer is known without computing it."""

import pytest
import torch
import torch.nn.functional as F
from closeness import assert_near

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


@pytest.mark.parametrize("shape", [(6, DIM), (2, 3, DIM), (1, 2, 3, DIM)])
def test_identity_experts_are_the_identity(shape):
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64)
    layer = layer_of_factors(3, GateSettings(dropless=True))
    with torch.no_grad():
        layer.experts.fc2.weight.copy_(torch.eye(DIM).expand(3, DIM, DIM))
    assert_near(layer(x).out, x, 1e-14)


def test_one_call_can_set_the_capacity_aside():
    x = tokens_with([0.6, 0.3, 0.05, 0.05]).repeat(8, 1)
    layer = layer_of_factors(4, GateSettings(capacity_factor=1.0, second_expert_policy="all"))
    assert_near(layer(x, dropless=True).out, x * 4 / 3, 1e-14)
    layer = layer_of_factors(4, GateSettings(dropless=True, second_expert_policy="all"))
    for mode in (True, False):
        assert_near(layer.train(mode)(x).out, x * 4 / 3, 1e-14)


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


def test_balance_loss_bounds():
    """1 when all is even, E when all goes to one expert."""
    layer = layer_of_factors(4, GateSettings(top_k=1, dropless=True))
    even = layer(40.0 * torch.eye(4, dtype=torch.float64)).balance_loss
    assert float(even.detach()) == pytest.approx(1.0)
    one = layer(40.0 * torch.eye(4, dtype=torch.float64)[:1].repeat(6, 1)).balance_loss
    assert float(one.detach()) == pytest.approx(4.0)


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
