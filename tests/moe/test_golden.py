"""The package meets the numbers of fairseq's `moe` branch."""

import pytest
import torch
from closeness import assert_near, assert_stats_near
from golden import CASES, GATES, LAYERS

from fairseq_moe_ext.moe.balance import balance_loss
from fairseq_moe_ext.moe.layer import MoELayer
from fairseq_moe_ext.moe.router import GateSettings, TopKRouter
from fairseq_moe_ext.moe.stats import routing_stats


def gate_settings(case):
    return GateSettings(
        top_k=case.top_k,
        use_fp32=case.settings["use_fp32"],
        second_expert_policy=case.settings.get("second_expert_policy", "all"),
        normalize_before_dropping=case.normalize_before_dropping,
        batch_prioritized=case.batch_prioritized,
        count_padding=True,
        eval_token_fraction=-1.0 if case.eval_fraction is None else case.eval_fraction,
    )


def assert_branch_stats(case, stats, rtol):
    ours = {"overflow", "load_max", "max_vio", "experts_per_token"}
    ours |= {"overflow_expert1"} if case.top_k == 1 else set()
    stats = {key: value for key, value in stats.items() if key not in ours}
    assert_stats_near(stats, case.stats, rtol)


@pytest.mark.parametrize("name", GATES)
def test_gate(name):
    case = CASES[name]
    x = case.fields["x"].clone().requires_grad_()
    gate = TopKRouter(x.size(1), case.experts, gate_settings(case)).to(case.dtype)
    gate.train(case.eval_fraction is None)
    with torch.no_grad():
        gate.wg.weight.copy_(case.fields["wg.weight"])
    capacity = gate.capacity(len(x))
    _, routing = gate(x, case.padding_mask)
    loss = balance_loss(routing)

    expected = case.fields["combine_weights"]  # (T, E, C)
    assert expected.size(2) == capacity
    combine = torch.zeros_like(expected)
    token, rank = routing.kept.nonzero(as_tuple=True)
    place = (token, routing.experts[token, rank], routing.slots[token, rank])
    combine = combine.index_put(place, routing.weights[token, rank])
    assert torch.equal(combine != 0, case.fields["dispatch_mask"])
    ((combine * case.fields["r"]).sum() + loss).backward()

    assert_near(combine, expected, case.rtol, "combine_weights")
    assert_near(loss, case.fields["l_aux"], case.rtol, "l_aux")
    assert_near(x.grad, case.fields["grad.x"], case.rtol, "grad.x")
    assert_near(gate.wg.weight.grad, case.fields["grad.wg.weight"], case.rtol, "grad of the gate")
    assert_branch_stats(case, routing_stats(routing), case.rtol)


@pytest.mark.parametrize("name", LAYERS)
def test_layer(name):
    case = CASES[name]
    x = case.fields["x"].clone().requires_grad_()
    layer = MoELayer.build(x.size(-1), case.settings["F"], case.experts, gate_settings(case))
    layer.train(case.eval_fraction is None)
    experts = {
        "fc1.weight": layer.experts.fc1.weight,
        "fc1.bias": layer.experts.fc1.bias,
        "fc2.weight": layer.experts.fc2.weight,
        "fc2.bias": layer.experts.fc2.bias,
    }
    with torch.no_grad():
        layer.gate.wg.weight.copy_(case.fields["params::gate.wg.weight"])
        for key, parameter in experts.items():
            parameter.copy_(case.stacked("params", key))
    output = layer(x, case.padding_mask)
    ((output.out * case.fields["r"]).sum() + output.balance_loss).backward()

    assert_near(output.out, case.fields["out"], case.rtol, "out")
    assert_near(output.balance_loss, case.fields["l_aux"], case.rtol, "l_aux")
    assert_near(x.grad, case.fields["grad.x"], case.rtol, "grad.x")
    gate_grad = layer.gate.wg.weight.grad
    assert_near(gate_grad, case.fields["grads::gate.wg.weight"], case.rtol, "grad of the gate")
    for key, parameter in experts.items():
        assert_near(parameter.grad, case.stacked("grads", key), case.rtol, f"grad of {key}")
    assert_branch_stats(case, output.stats, case.rtol)
