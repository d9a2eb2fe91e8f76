"""Balancing: each loss and its gradient against a loop in float64, and the bias by its rule."""

import pytest
import reference
import torch
from closeness import assert_near

from fairseq_moe_ext.moe.balance import Balance, balance_loss, sequence_balance_loss
from fairseq_moe_ext.moe.layer import MoELayer
from fairseq_moe_ext.moe.router import GateSettings
from fairseq_moe_ext.moe.routing import RUNNER_UP_POLICIES, route

ROWS, LENGTH, EXPERTS = 5, 7, 6


def make_logits():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(ROWS * LENGTH, EXPERTS, generator=generator, dtype=torch.float64)
    padding = torch.rand(ROWS * LENGTH, generator=generator) < 0.3
    return logits + torch.linspace(-1, 1, EXPERTS), padding


def routed(logits, padding, k, score="softmax", count_padding=False, null_experts=0):
    return route(
        logits,
        k,
        score=score,
        normalize=None,
        padding_mask=padding,
        count_padding=count_padding,
        capacity=3,  # the loss counts choices before dropping
        null_experts=null_experts,
    )


def by_loop(logits, padding, k, score="softmax", count_padding=False, null_experts=0):
    return reference.route(
        logits,
        top_k=k,
        capacity=3,
        padding_mask=padding.tolist(),
        score=score,
        count_padding=count_padding,
        null=null_experts,
    )


def sequence_loss_by_loop(routes):
    """The loss of each sequence, weighted by its tokens that count."""
    total, tokens = 0.0, 0
    for start in range(0, len(routes.probs), LENGTH):
        row = slice(start, start + LENGTH)
        one = reference.Routes(
            routes.probs[row], routes.choices[row], routes.counts[row], routes.null
        )
        total = total + sum(one.counts) * reference.balance_loss(one)
        tokens += sum(one.counts)
    return total / max(tokens, 1)


CASES = [(1, "softmax"), (2, "softmax"), (3, "softmax"), (4, "sigmoid"), (1, "sigmoid")]


@pytest.mark.parametrize("count_padding, null", [(False, 0), (True, 0), (False, 2), (True, 2)])
@pytest.mark.parametrize("k, score", CASES)
def test_the_loss_over_each_sequence(k, score, count_padding, null):
    logits, padding = make_logits()
    padding[LENGTH : 2 * LENGTH] = True  # a row of padding alone
    mine, truth = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    options = k, score, count_padding, null
    loss = sequence_balance_loss(routed(mine, padding, *options), LENGTH)
    expected = sequence_loss_by_loop(by_loop(truth, padding, *options))
    assert_near(loss, expected, 1e-12, "loss")
    whole = balance_loss(routed(mine, padding, *options))
    assert abs(float(loss) - float(whole)) > 1e-3  # another loss
    (found,) = torch.autograd.grad(loss, mine)
    (true,) = torch.autograd.grad(expected, truth)
    assert_near(found, true, 1e-12, "gradient")


@pytest.mark.parametrize("null", [0, 2])
@pytest.mark.parametrize("policy", RUNNER_UP_POLICIES)
def test_the_loss_of_one_sequence_is_that_of_its_tokens(policy, null):
    """A second choice that the policy rejects counts in neither, also if it is a null expert."""
    logits, padding = make_logits()
    routing = route(logits, 2, runner_up=policy, padding_mask=padding, null_experts=null)
    assert (routing.counts[1].sum() < routing.counts[0].sum()) == (policy == "random")
    loss = sequence_balance_loss(routing, len(logits))
    assert_near(loss, balance_loss(routing), 1e-12, policy)


def test_without_tokens_the_loss_over_sequences_is_0():
    logits, padding = make_logits()
    assert float(sequence_balance_loss(routed(logits, torch.ones_like(padding), 2), LENGTH)) == 0


@pytest.mark.parametrize("k, score", CASES)
def test_parts_of_a_whole_batch_add_up(k, score):
    """Their losses and gradients are those of one batch of all their tokens."""
    logits, padding = make_logits()
    truth = logits.clone().requires_grad_()
    expected = reference.balance_loss(by_loop(truth, padding, k, score))
    (true,) = torch.autograd.grad(expected, truth)

    mine, balance = logits.clone().requires_grad_(), Balance("global_batch")
    cuts = [2 * LENGTH, 2 * LENGTH, LENGTH]
    parts = list(zip(mine.split(cuts), padding.split(cuts)))
    balance.counting = True
    for part, mask in parts:
        assert balance.loss(routed(part, mask, k, score)) == 0
    balance.counting = False
    losses = [balance.loss(routed(part, mask, k, score)) for part, mask in parts]
    assert_near(sum(losses), expected, 1e-12, "loss")
    (found,) = torch.autograd.grad(sum(losses), mine)
    assert_near(found, true, 1e-12, "gradient")


def test_low_sigmoid_scores_do_not_lower_the_loss():
    """It takes each token's scores divided by their sum."""
    logits, padding = make_logits()
    loss = balance_loss(routed(logits, padding, 2, "sigmoid"))
    lower = balance_loss(routed(logits - 8, padding, 2, "sigmoid"))
    softmax = balance_loss(routed(logits, padding, 2, "softmax"))
    # far below 0 the sigmoid is the exponential, and its distribution the softmax
    assert float(lower) == pytest.approx(float(softmax), rel=1e-2)
    assert float(lower) > float(loss) > 1


@pytest.mark.parametrize("k", [1, 2, 3])
def test_the_bias_goes_by_its_rule(k):
    """b_e += rate * sign(mean load - load_e); it chooses and does not
    weigh. The load comes to be even."""
    settings = GateSettings(
        top_k=k, second_expert_policy="all", capacity_factor=0.5, bias_update_rate=0.01
    )
    torch.manual_seed(0)
    layer = MoELayer.build(4, 3, EXPERTS, settings).double()
    x = torch.randn(120, 4, dtype=torch.float64) + 2.0  # so that all like some experts better
    bias, worst = [0.0] * EXPERTS, []
    for _ in range(60):
        output = layer(x)
        logits = x @ layer.gate.wg.weight.detach().t()
        routes = reference.route(logits, top_k=k, capacity=10, bias=bias)
        assert output.expert_counts.tolist() == reference.expert_counts(routes)
        loads = [sum(of_rank) for of_rank in zip(*reference.expert_counts(routes))]
        mean = sum(loads) / EXPERTS
        bias = [b + 0.01 * ((mean > load) - (mean < load)) for b, load in zip(bias, loads)]
        layer.gate.after_update(output.observed)
        assert layer.gate.balance_bias.tolist() == pytest.approx(bias, abs=1e-6)
        worst.append(float(output.stats["max_vio"]))
        assert worst[-1] == pytest.approx(max(loads) / mean - 1)
    assert max(worst[-5:]) < worst[0] / 2
    layer.eval()
    assert float(layer(x).stats["max_vio"]) < worst[0] / 2  # it chooses at evaluation, too
