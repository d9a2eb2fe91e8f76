"""The experts' own settings: initial values, dropout, and the scale of their gradients."""

import math

import pytest
import torch
import torch.nn.functional as F
from closeness import assert_near

from fairseq_moe_ext.moe import experts
from fairseq_moe_ext.moe.experts import Experts, GroupedLinear, _batches
from fairseq_moe_ext.moe.gate import GateSettings
from fairseq_moe_ext.moe.layer import MoELayer

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
    plain = MoELayer(6, 5, 3, GateSettings(second_expert_policy="all")).double()
    options = {"grad_scale": 0.25}
    scaled = MoELayer(6, 5, 3, GateSettings(second_expert_policy="all"), **options).double()
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


def test_experts_of_few_and_of_many_rows_equal_experts_one_by_one():
    """Neighbours are computed as one product with padded rows, experts of many rows alone."""
    torch.manual_seed(0)
    counts = [3, 9, 0, 200, 4, 4, 4, 0, 0, 150, 1, 70, 71, 72, *range(20)]
    rows = sum(counts)
    grouped = GroupedLinear(len(counts), 6, 5).double()
    x = torch.randn(rows, 6, dtype=torch.float64, requires_grad=True)
    r = torch.randn(rows, 5, dtype=torch.float64)
    (grouped(x, counts, 0.5) * r).sum().backward()

    batches = _batches(counts, torch.device("cpu"))
    sizes = [batch.shape[0] for batch in batches]
    assert sum(sizes) == len(counts) and 1 in sizes and max(sizes) > 2
    assert any(batch.slots is None for batch in batches)
    assert any(batch.slots is not None for batch in batches)

    weight, bias = (p.detach().clone().requires_grad_() for p in grouped.parameters())
    mine = x.detach().clone().requires_grad_()
    parts = [F.linear(p, w, b) for p, w, b in zip(mine.split(counts), weight, bias)]
    expected = torch.cat(parts)
    (expected * r).sum().backward()
    assert_near(grouped(x, counts), expected, 1e-13, "out")
    assert_near(x.grad, mine.grad, 1e-13, "gradient of x")
    assert_near(grouped.weight.grad, 0.5 * weight.grad, 1e-13, "gradient of weight")
    assert_near(grouped.bias.grad, 0.5 * bias.grad, 1e-13, "gradient of bias")


@pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="this torch has no grouped_mm")
@pytest.mark.parametrize(
    "device, dtype, rtol",
    [
        ("cpu", torch.float32, 1e-5),
        pytest.param("cuda", torch.bfloat16, 2e-2, marks=pytest.mark.gpu),
    ],
)
def test_one_kernel_for_all_experts_equals_the_batches(monkeypatch, device, dtype, rtol):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    torch.manual_seed(0)
    counts = [5, 0, 3, 40, 0]
    grouped = GroupedLinear(len(counts), 16, 32).to(device, dtype)
    x = torch.randn(48, 16, device=device, dtype=dtype)
    r = torch.randn(48, 32, device=device, dtype=dtype)
    results = []
    for serves in (False, True):
        monkeypatch.setattr(experts, "_grouped_mm_serves", lambda x, serves=serves: serves)
        grouped.zero_grad()
        mine = x.clone().requires_grad_()
        out = grouped(mine, counts, 0.5)
        (out * r).sum().backward()
        results.append([out, mine.grad, grouped.weight.grad.clone(), grouped.bias.grad.clone()])
    for batches, kernel in zip(*results):
        assert_near(kernel, batches, rtol)


def test_padding_takes_nothing_from_a_neighbour():
    """A NaN in one expert's row stays in that expert."""
    grouped = GroupedLinear(3, 4, 4)
    x = torch.randn(6, 4)
    x[0] = math.nan
    x.requires_grad_()
    out = grouped(x, [3, 2, 1])
    assert torch.isfinite(out[1:]).all() and out[0].isnan().all()
    out.sum().backward()
    assert torch.isfinite(grouped.weight.grad[1:]).all()
