"""The experts' own settings: initial values, dropout, and the scale of their gradients."""

import math

import pytest
import torch
from closeness import assert_near
from router_layers import NAMES, batch, layer_of

from fairseq_moe_ext.moe.activations import swiglu
from fairseq_moe_ext.moe.experts import Experts
from fairseq_moe_ext.moe.layer import MoELayer
from fairseq_moe_ext.moe.router import GateSettings

COUNTS = [5, 0, 3]


def test_experts_start_as_linear_layers_each_from_its_own_seed():
    torch.manual_seed(0)
    experts = Experts(6, 100, 200)
    for linear, bound in [(experts.fc1, 1 / math.sqrt(100)), (experts.fc2, 1 / math.sqrt(200))]:
        for values in [*linear.weight, *linear.bias]:
            assert float(values.detach().abs().max()) <= bound
        # Uniform on [-bound, bound]: standard deviation bound / sqrt(3).
        spread = linear.weight.detach().flatten(1).std(dim=1)
        assert spread.tolist() == pytest.approx([bound / math.sqrt(3)] * 6, rel=0.03)
        assert len({tuple(row.tolist()) for row in linear.weight.detach()[:, 0]}) == 6
    torch.manual_seed(0)
    assert torch.equal(Experts(6, 100, 200).fc1.weight, experts.fc1.weight)
    torch.manual_seed(1)
    assert not torch.equal(Experts(6, 100, 200).fc1.weight, experts.fc1.weight)


def test_gradient_scale_is_on_the_experts_parameters_alone():
    torch.manual_seed(0)
    plain = MoELayer.build(6, 5, 3, GateSettings(second_expert_policy="all")).double()
    options = {"grad_scale": 0.25}
    scaled = MoELayer.build(6, 5, 3, GateSettings(second_expert_policy="all"), **options).double()
    scaled.load_state_dict(plain.state_dict())
    x = torch.randn(9, 6, dtype=torch.float64)
    grads = []
    for layer in (plain, scaled):
        mine = x.clone().requires_grad_()
        out = layer(mine).out
        out.square().sum().backward()
        grads.append({"x": mine.grad, **{n: p.grad for n, p in layer.named_parameters()}})
    for name, grad in grads[0].items():
        factor = 0.25 if name.startswith("experts.") else 1.0
        assert_near(grads[1][name], factor * grad, 1e-14, name)


@pytest.mark.parametrize("place", ["activation_dropout", "dropout"])
def test_dropout_is_where_it_should_be_and_off_at_evaluation(place):
    """With all-ones hidden or output numbers, what is left of 1 is 0 or 1 / (1 - p)."""
    torch.manual_seed(0)
    experts = Experts(3, 50, 50, activation=lambda hidden: hidden, **{place: 0.25})
    with torch.no_grad():
        for linear in (experts.fc1, experts.fc2):
            linear.weight.zero_()
            linear.bias.fill_(1.0)
        experts.fc2.weight.copy_(torch.eye(50).expand(3, 50, 50))
        experts.fc2.bias.fill_(2.0)
    x = torch.zeros(sum(COUNTS), 50)
    values = experts(x, COUNTS).detach()
    # Numbers behind fc1 are 1; behind fc2 they are those plus 2.
    dropped, kept = (2.0, 2 + 4 / 3) if place == "activation_dropout" else (0.0, 3 * 4 / 3)
    zero = torch.isclose(values, torch.tensor(dropped))
    assert (zero | torch.isclose(values, torch.tensor(kept))).all()
    assert float(zero.float().mean()) == pytest.approx(0.25, abs=0.07)
    assert torch.equal(experts.eval()(x, COUNTS), torch.full((8, 50), 3.0))


@pytest.mark.parametrize("tokens", [1, 2])
@pytest.mark.parametrize("name", NAMES)
def test_a_token_or_two_are_computed_choice_by_choice(name, tokens, monkeypatch):
    """As all rows sorted by expert, which gradients want."""
    layer = layer_of(name).eval()
    x, ids = batch(tokens)
    _same(layer, x, monkeypatch, token_ids=ids)
    _same(layer, x, monkeypatch, token_ids=ids, padding_mask=torch.arange(tokens) > 0)


@pytest.mark.parametrize(
    "options",
    [
        {"activation": swiglu},
        {"latent_dim": 3, "shared_ffn_dim": 4},
        {"settings": GateSettings(top_k=3, second_expert_policy="all", null_experts=3)},
        {"settings": GateSettings(second_expert_policy="all", eval_token_fraction=0.5)},
    ],
    ids=["gated", "latent", "null", "dropped"],
)
def test_choice_by_choice_for_all_kinds_of_experts(options, monkeypatch):
    torch.manual_seed(0)
    options = {"settings": GateSettings(second_expert_policy="all"), **options}
    layer = MoELayer.build(6, 5, 3, **options).double().eval()
    _same(layer, torch.randn(2, 6).double(), monkeypatch)


class Doubled(Experts):
    """Experts with a `forward` of their own."""

    def forward(self, x, counts):
        return 2 * super().forward(x, counts)


def test_a_token_or_two_go_through_the_forward_of_a_subclass():
    layer = MoELayer.build(6, 5, 3, GateSettings(second_expert_policy="all"))
    layer.experts = Doubled(3, 6, 5)
    layer.double().eval()
    x = torch.randn(2, 6).double()
    with torch.no_grad():
        found = layer(x).out
    assert_near(found, layer(x).out.detach(), 1e-14)


def _same(layer, x, monkeypatch, **given):
    expected = layer(x, **given)
    calls = []
    choice_by_choice = Experts.choice_by_choice

    def watched(*arguments):
        calls.append(arguments)
        return choice_by_choice(*arguments)

    monkeypatch.setattr(Experts, "choice_by_choice", watched)
    with torch.no_grad():
        for found in (layer(x, **given), layer(x, **given, output_alone=True)):
            assert_near(found.out, expected.out.detach(), 1e-14)
    assert len(calls) == 2
    assert found.stats == {} and float(found.balance_loss) == 0
