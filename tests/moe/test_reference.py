"""The reference is tested too: against the branch's numbers, and where the answer is known."""

import math

import golden
import pytest
import reference
import torch
import torch.nn.functional as F
from closeness import assert_near, assert_stats_near
from golden import CASES, GATES, LAYERS


def routing_options(case, tokens):
    if case.eval_fraction is None or case.eval_fraction <= 0:
        capacity = reference.train_capacity(tokens, case.experts, case.top_k)
    else:
        capacity = reference.eval_capacity(tokens, case.eval_fraction)
    mask = case.padding_mask
    return {
        "top_k": case.top_k,
        "capacity": capacity,
        "padding_mask": None if mask is None else mask.reshape(-1).tolist(),
        "count_padding": True,
        "normalize_before_dropping": case.normalize_before_dropping,
        "batch_prioritized": case.batch_prioritized,
    }


def branch_stats(case, stats):
    """Without ours: overflow, load and number of all choices, and the overflow of top-1."""
    ours = {"overflow", "load_max", "max_vio", "experts_per_token"}
    ours |= {"overflow_expert1"} if case.top_k == 1 else set()
    return {key: value for key, value in stats.items() if key not in ours}


@pytest.mark.skipif(not golden.ALL.exists(), reason=f"only 10 of 22 cases: no {golden.ALL}")
def test_all_cases_are_tested():
    assert len(GATES) == 14 and len(LAYERS) == 8


@pytest.mark.parametrize("name", GATES)
def test_gate_meets_the_branch(name):
    case = CASES[name]
    x = case.fields["x"].clone().requires_grad_()
    gate = case.fields["wg.weight"].clone().requires_grad_()
    options = routing_options(case, len(x))
    routes = reference.route(x @ gate.T, **options)
    loss = reference.balance_loss(routes)

    combine = torch.zeros_like(case.fields["combine_weights"])  # (T, E, C)
    assert combine.size(2) == options["capacity"]
    for token, choices in enumerate(routes.choices):
        for choice in choices:
            if choice.kept:
                combine[token, choice.expert, choice.slot] = choice.weight
    assert torch.equal(combine != 0, case.fields["dispatch_mask"])
    ((combine * case.fields["r"]).sum() + loss).backward()

    assert_near(combine, case.fields["combine_weights"], case.rtol, "combine_weights")
    assert_near(loss, case.fields["l_aux"], case.rtol, "l_aux")
    assert_near(x.grad, case.fields["grad.x"], case.rtol, "grad.x")
    assert_near(gate.grad, case.fields["grad.wg.weight"], case.rtol, "grad.wg.weight")
    assert_stats_near(branch_stats(case, reference.statistics(routes)), case.stats, case.rtol)


@pytest.mark.parametrize("name", LAYERS)
def test_layer_meets_the_branch(name):
    case = CASES[name]
    dim = case.fields["x"].size(-1)
    x = case.fields["x"].reshape(-1, dim).clone().requires_grad_()
    gate = case.fields["params::gate.wg.weight"].clone().requires_grad_()
    names = ["fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"]
    experts = [case.stacked("params", key).requires_grad_() for key in names]
    output = reference.moe_layer(
        x, gate, *experts, activation=F.gelu, **routing_options(case, len(x))
    )
    r = case.fields["r"].reshape(-1, dim)
    ((output.out * r).sum() + output.balance_loss).backward()

    assert_near(output.out, case.fields["out"].reshape(-1, dim), case.rtol, "out")
    assert_near(output.balance_loss, case.fields["l_aux"], case.rtol, "l_aux")
    assert_near(x.grad, case.fields["grad.x"].reshape(-1, dim), case.rtol, "grad.x")
    assert_near(gate.grad, case.fields["grads::gate.wg.weight"], case.rtol, "grad of the gate")
    for key, expert in zip(names, experts):
        assert_near(expert.grad, case.stacked("grads", key), case.rtol, f"grad of {key}")
    assert_stats_near(branch_stats(case, output.stats), case.stats, case.rtol)


def logits_of(*probabilities):
    return torch.log(torch.tensor(probabilities, dtype=torch.float64))


def test_slots_weights_and_dropping_by_hand():
    logits = logits_of([0.6, 0.3, 0.1], [0.6, 0.1, 0.3], [0.3, 0.6, 0.1])
    routes = reference.route(logits, top_k=2, capacity=2)
    experts = [[choice.expert for choice in choices] for choices in routes.choices]
    slots = [[choice.slot for choice in choices] for choices in routes.choices]
    weights = [[float(choice.weight) for choice in choices] for choices in routes.choices]
    assert experts == [[0, 1], [0, 2], [1, 0]]
    # Expert 0 gets tokens 0 and 1 as first choices, then token 2 as a second: one too many.
    assert slots == [[0, 1], [1, 0], [0, 2]]
    assert weights == [pytest.approx([2 / 3, 1 / 3])] * 2 + [pytest.approx([1.0, 0.0])]

    routes = reference.route(logits, top_k=2, capacity=2, normalize_before_dropping=True)
    assert [float(choice.weight) for choice in routes.choices[2]] == pytest.approx([2 / 3, 0.0])

    routes = reference.route(logits, top_k=1, capacity=1)
    assert [float(choice[0].weight) for choice in routes.choices] == pytest.approx([0.6, 0.0, 0.6])


def test_surest_token_goes_first_when_batch_prioritized():
    logits = logits_of([0.5, 0.3, 0.2], [0.6, 0.3, 0.1], [0.7, 0.2, 0.1])
    routes = reference.route(logits, top_k=2, capacity=1, batch_prioritized=True)
    assert [choices[0].slot for choices in routes.choices] == [2, 1, 0]
    assert [choices[1].slot for choices in routes.choices] == [2, 1, 0]
    assert [choices[0].kept for choices in routes.choices] == [False, False, True]


def test_second_expert_policies():
    logits = logits_of([0.6, 0.3, 0.1], [0.6, 0.3, 0.1])
    noise = torch.tensor([[0.0, 0.0, 5.0], [9.0, 0.0, 0.0]])
    routes = reference.route(
        logits, top_k=2, capacity=None, second_expert_policy="sampling", noise=noise
    )
    assert [[choice.expert for choice in choices] for choices in routes.choices] == [[0, 2], [0, 1]]

    uniform = torch.tensor([0.55, 0.65])  # around 2 * 0.3
    options = {"top_k": 2, "capacity": None, "second_expert_policy": "random", "noise": uniform}
    routes = reference.route(logits, **options)
    assert [choices[1].routed for choices in routes.choices] == [True, False]
    assert float(routes.choices[1][0].weight) == 1.0
    # Normalised, the second weight is 1/3, and 2/3 exceeds both numbers.
    routes = reference.route(logits, normalize_before_dropping=True, **options)
    assert [choices[1].routed for choices in routes.choices] == [True, True]


def test_losses_and_statistics_by_hand():
    even = reference.route(torch.zeros(8, 4, dtype=torch.float64), top_k=1, capacity=4)
    # Ties go to expert 0, so me = 1/4 each and ce = (1, 0, 0, 0): 16 * mean(me * ce) = 1.
    assert float(reference.balance_loss(even)) == pytest.approx(1.0)
    figures = reference.statistics(even)
    assert figures["entropy_gating"] == pytest.approx(math.log(4))
    assert figures["overflow_expert1"] == 50.0
    assert figures["unused_expert1_count"] == 3
    assert figures["expert1_balance_top"] == 100.0
    assert reference.expert_counts(even) == [[8, 0, 0, 0]]

    logits = torch.tensor([[0.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    log2 = math.log(2)
    assert float(reference.z_loss(logits, [True] * 2)) == pytest.approx(
        (log2**2 + (1 + log2) ** 2) / 2
    )


def test_padding_is_sent_nowhere_and_takes_no_slot():
    logits = torch.zeros(4, 2, dtype=torch.float64)
    routes = reference.route(logits, top_k=2, capacity=1, padding_mask=[True, False, True, False])
    assert [choices[0].slot for choices in routes.choices] == [-1, 0, -1, 1]
    assert [float(choices[0].weight) for choices in routes.choices] == [0.0, 0.5, 0.0, 0.0]
    assert reference.statistics(routes)["overflow_expert1"] == 50.0
    assert float(reference.balance_loss(routes)) == 1.0  # of a perfectly balanced gate
    counts = [False, True, False, True]
    assert routes.counts == counts
    assert float(reference.z_loss(torch.tensor([[9.0], [1], [9], [2]]), counts)) == 2.5
    nothing = reference.route(logits, top_k=2, capacity=1, padding_mask=[True] * 4)
    assert float(reference.balance_loss(nothing)) == 0.0
    assert reference.statistics(nothing)["overflow_expert1"] == 0.0
    assert float(reference.z_loss(logits, nothing.counts)) == 0.0


def test_padding_counts_by_the_rule_of_the_branch():
    """In the mean gate and in the number of tokens, but not as a first choice."""
    logits = torch.zeros(4, 2, dtype=torch.float64)
    mask = [True, False, True, False]
    routes = reference.route(logits, top_k=2, capacity=1, padding_mask=mask, count_padding=True)
    assert routes.counts == [True] * 4
    assert float(reference.balance_loss(routes)) == pytest.approx(4 * (0.5 * 0.5) / 2)
    assert reference.statistics(routes)["expert1_balance_top"] == pytest.approx(100.0)


def test_experts_that_scale_their_input():
    """Expert e is x -> (e + 1) x: the output is the weighted mean of the experts' factors."""
    dim, experts = 3, 2
    eye = torch.eye(dim, dtype=torch.float64).expand(experts, dim, dim)
    scale = torch.tensor([1.0, 2.0], dtype=torch.float64).view(-1, 1, 1)
    zeros = torch.zeros(experts, dim, dtype=torch.float64)
    gate = torch.zeros(experts, dim, dtype=torch.float64)
    gate[0, 0], gate[1, 1] = math.log(3), 0.0
    x = torch.eye(dim, dtype=torch.float64)[:1]  # logits (log 3, 0): probabilities 3/4, 1/4
    for top_k, factor in [(1, 0.75), (2, 0.75 * 1 + 0.25 * 2)]:
        output = reference.moe_layer(
            x, gate, eye, zeros, scale * eye, zeros, lambda h: h, top_k=top_k, capacity=None
        )
        assert_near(output.out, factor * x, 1e-14)
