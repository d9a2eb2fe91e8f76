"""Every router equals its plain loop, and has the properties that docs/routers.md says it has.

Parametrised over the registered routers: a new one is tested once router_loops.py has its loop."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from closeness import assert_near
from router_layers import COUNTS, NAMES, VOCABULARY, adapted, batch, layer_of, observed, settings_of
from router_loops import LOOPS, Case, balance, best_assignment, l1

from fairseq_moe_ext.convert import experts_fairseq_moe
from fairseq_moe_ext.moe import routing
from fairseq_moe_ext.moe.balance import balance_loss, sequence_balance_loss
from fairseq_moe_ext.moe.router import ROUTERS
from fairseq_moe_ext.moe.routers.base import PRECISION
from fairseq_moe_ext.moe.stats import routing_stats


def test_every_router_has_a_loop():
    ours = {n for n, kind in ROUTERS.items() if kind.__module__.startswith("fairseq_moe_ext")}
    assert ours == set(LOOPS)


def truth(name, layer, x, case):
    """Output, balancing loss and router's loss by the loop, differentiable in x and the weights."""
    gate, experts = layer.gate, layer.experts
    if name == "hash":
        logits = x.new_zeros(len(x), gate.num_experts)
    else:
        logits = torch.stack([torch.stack([(row * w).sum() for w in gate.wg.weight]) for row in x])
    choices = LOOPS[name](logits, case)
    rows = []
    for t, row in enumerate(x):
        out = torch.zeros_like(row)
        for e, weight in choices[t]:
            hidden = F.gelu(experts.fc1.weight[e] @ row + experts.fc1.bias[e])
            out = out + weight * (experts.fc2.weight[e] @ hidden + experts.fc2.bias[e])
        rows.append(out)
    own = l1(logits, choices, case, float(gate.l1_weight)) if name == "relu" else None
    return torch.stack(rows), balance(name, logits, choices, case), own, choices


def clear_cut(name, layer, x, case):
    """Whether the best assignment is better than the second by more than the auction's step."""
    if name != "base" or not (case.training or case.balanced_evaluation):
        return True
    logits = layer.gate.wg(x).detach()[case.real(len(x))]
    first, second, _ = best_assignment(logits.tolist(), logits.size(1))
    return first - second > len(logits) * PRECISION * float(
        logits.max() - logits.min().clamp(max=0)
    )


OPTIONS = {
    "plain": {},
    "sigmoid": {"score": "sigmoid"},
    "scaled": {"route_scale": 2.5, "normalize_weights": "none"},
    "padding": {},
    "two experts": {"experts": 2},
}


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", NAMES)
def test_it_equals_its_loop(name, options, training):
    """Output, losses, loads, and the gradients of everything."""
    compared = 0
    for seed in range(8):
        for k in (1, 2, 3)[: OPTIONS[options].get("experts")] if name != "base" else (1,):
            layer = layer_of(name, seed=seed, k=k, **OPTIONS[options])
            if seed % 2:
                adapted(layer)
            if name == "relu":
                layer.gate.l1_weight.fill_(0.3)
            layer.train(training)
            x, ids = batch(6, seed)
            padding = torch.zeros(6, dtype=torch.bool)
            if options == "padding":
                padding[[1, 4]] = True
            s, learned = layer.gate.settings, name == "threshold" and seed % 2
            case = Case(
                k, training, s.score, s.route_scale,
                normalize=s.normalize == "after" and "normalize_weights" in layer.gate.heeds,
                padding=padding.tolist(), tokens=ids.tolist(), counts=COUNTS,
                threshold=layer.gate.threshold.tolist() if learned else None,
            )  # fmt: skip
            if not clear_cut(name, layer, x, case):
                continue
            compared += 1
            compare(name, layer, x, ids, padding, case)
    assert compared > 3


def compare(name, layer, x, ids, padding, case):
    ours, true = x.clone().requires_grad_(), x.clone().requires_grad_()
    found = layer(ours, padding, token_ids=ids)
    out, loss, own, choices = truth(name, layer, true, case)
    if name == "random":
        loss = loss.detach()
    assert_near(found.out, out, 1e-9, "out")
    assert_near(found.balance_loss, loss, 1e-9, "balance loss")
    assert (found.router_loss is None) == (own is None)
    load = [sum(e == expert for c in choices for expert, _ in c)
            for e in range(layer.gate.num_experts)]  # fmt: skip
    sums = observed(layer, x, ids, padding)
    assert found.expert_counts.sum(dim=0).tolist() == load == sums["load"].tolist()
    assert sums["tokens"].item() == len(case.real(len(x)))

    r = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).double()
    total = (found.out * r).sum() + 0.7 * found.balance_loss
    true_total = (out * r).sum() + 0.7 * loss
    if own is not None:
        assert_near(found.router_loss, own, 1e-9, "router's loss")
        total, true_total = total + found.router_loss, true_total + own
    parameters = list(layer.parameters())
    given = {"retain_graph": True, "materialize_grads": True, "allow_unused": True}
    expected = torch.autograd.grad(true_total, [true, *parameters], **given)
    for grad, right in zip(torch.autograd.grad(total, [ours, *parameters], **given), expected):
        assert_near(grad, right, 1e-8, "gradient", scale=1 + float(right.abs().max()))


@pytest.mark.parametrize("normalize", ["before", "after", "none"])
@pytest.mark.parametrize("factor", [0.5, 1.0])
@pytest.mark.parametrize("name", ["topk", "sinkhorn", "hash", "random"])
def test_a_capacity_drops_who_comes_last(name, factor, normalize):
    """A queue for each expert: all first choices, then all second ones. Padding stands in none."""
    dropped = 0
    for k, training, seed in itertools.product((1, 2, 3), (True, False), range(2)):
        way = normalize if k > 1 and name != "hash" else "none"
        settings = settings_of(name, k, normalize_weights=way)
        settings = settings._replace(
            dropless=False, capacity_factor=factor, eval_token_fraction=-1.0
        )
        layer = layer_of(name, settings=settings, seed=seed).train(training)
        x, ids = batch(12, seed)
        padding = torch.zeros(12, dtype=torch.bool)
        padding[[1, 4, 7]] = True
        case = Case(
            k, training, normalize=way == "before", padding=padding.tolist(), tokens=ids.tolist(),
            counts=COUNTS,
        )  # fmt: skip
        logits = x.new_zeros(12, 4) if name == "hash" else layer.gate.wg(x).detach()
        choices = LOOPS[name](logits, case)
        room = [max(1, int(factor * math.ceil(9 / 4)))] * 4
        kept = [[] for _ in range(12)]
        for rank, token in itertools.product(range(k), range(12)):
            for e, weight in choices[token][rank : rank + 1]:
                room[e] -= 1
                if room[e] >= 0:
                    kept[token].append((e, weight))
                dropped += room[e] < 0
        found = layer(x, padding, token_ids=ids).out
        for token, mine in enumerate(kept):
            total = sum(weight for _, weight in mine) if way == "after" else 1.0
            out, experts = torch.zeros_like(x[token]), layer.experts
            for e, weight in mine:
                hidden = F.gelu(experts.fc1.weight[e] @ x[token] + experts.fc1.bias[e])
                out += weight / total * (experts.fc2.weight[e] @ hidden + experts.fc2.bias[e])
            assert_near(found[token], out, 1e-12, "out")
    assert dropped > 20


@pytest.mark.parametrize("experts", [2, 4])
@pytest.mark.parametrize("name", ["threshold", "relu"])
def test_with_any_number_of_experts_per_token(name, experts):
    """Loss of sequences, metrics, and transformers' model, where some tokens have no expert."""
    for seed in range(8):
        layer = adapted(layer_of(name, experts, seed))
        x, _ = batch(12, seed)
        routing = layer.gate(x)[1]
        parts = [balance_loss(layer.gate(part)[1]) for part in x.split(3)]
        assert_near(sequence_balance_loss(routing, 3), sum(parts) / 4, 1e-12, "sequences")
        config = SimpleNamespace(
            num_experts=experts, num_experts_per_tok=2, hidden_size=x.size(1), router_settings={}
        )
        theirs = experts_fairseq_moe.ROUTERS[name](config).double()
        theirs.load_state_dict(layer.gate.state_dict())
        loss = experts_fairseq_moe.balance_loss(theirs(x, None), 0)
        assert_near(loss, balance_loss(routing), 1e-6, "transformers")
        stats = routing_stats(routing)
        assert (
            stats["expert1_balance_top"] <= 100 * routing.routed.any(dim=1).double().mean() + 1e-9
        )
        unused = experts - len(routing.experts[:, 1][routing.routed[:, 1]].unique())
        assert stats["unused_expert2_count"] == unused


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("groups, top_groups, k", [(4, 1, 2), (4, 2, 3), (2, 1, 4), (4, 2, 4)])
def test_groups_limit_the_choice(groups, top_groups, k, score):
    options = {"groups": groups, "top_groups": top_groups, "score": score}
    limited = 0
    for seed in range(5):
        layer = layer_of("topk", experts=8, seed=seed, k=k, **options)
        x, ids = batch(6, seed)
        case = Case(k, True, score, normalize=k > 1, groups=groups, top_groups=top_groups)
        out, _, _, choices = truth("topk", layer, x, case)
        assert_near(layer(x).out, out, 1e-9, "out")
        assert all(len({e // (8 // groups) for e, _ in c}) <= top_groups for c in choices)
        plain = layer_of("topk", experts=8, seed=seed, k=k, score=score)
        limited += not torch.equal(plain(x).out, layer(x).out)
    assert limited > 0


@pytest.mark.parametrize("when", ["training", "evaluation"])
@pytest.mark.parametrize("name", NAMES)
def test_no_token_sees_the_future(name, when):
    """Unless the router says so, and then it does: the test would notice."""
    seen = 0
    for seed in range(10):
        layer = adapted(layer_of(name, seed=seed)).train(when == "training")
        x, ids = batch(8, seed)
        before = layer(x, token_ids=ids).out
        for t in range(1, 8):
            other, other_ids = x.clone(), ids.clone()
            other[t:], other_ids[t:] = -3 * other[t:], (ids[t:] + 1) % VOCABULARY
            after = layer(other, token_ids=other_ids).out
            seen += not torch.allclose(before[:t], after[:t], rtol=1e-10, atol=1e-12)
    leaks = when == "training" and not ROUTERS[name].causal
    assert (seen > 0) == leaks


@pytest.mark.parametrize("name", NAMES)
def test_at_evaluation_a_row_does_not_depend_on_its_batch(name):
    layer = adapted(layer_of(name)).eval()
    x, ids = batch(12)
    whole = layer(x, token_ids=ids).out
    for t in range(12):
        alone = layer(x[t : t + 1], token_ids=ids[t : t + 1]).out
        assert_near(alone, whole[t : t + 1], 1e-12, "row")


def test_balanced_evaluation_of_base_sees_the_batch():
    layer = layer_of("base", balanced_evaluation=True).eval()
    x, _ = batch(12)
    assert layer(x).expert_counts.tolist() == [[3, 3, 3, 3]]
    layer.gate.settings = layer.gate.settings._replace(balanced_evaluation=False)
    assert (
        layer(x).expert_counts[0].tolist()
        == torch.bincount(layer.gate.wg(x).argmax(1), minlength=4).tolist()
    )


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("name", [n for n in NAMES if ROUTERS[n].learned])
def test_the_gradient_of_the_gate_is_that_of_finite_differences(name, score):
    """With one expert a token, where a normalised weight would be 1 whatever the gate says."""
    layer = adapted(layer_of(name, k=1, score=score))
    x, ids = batch(8)
    weight = layer.gate.wg.weight
    r = torch.randn(x.shape, dtype=torch.float64)

    def loss():
        return (layer(x, token_ids=ids).out * r).sum()

    (grad,) = torch.autograd.grad(loss(), weight)
    assert grad.abs().max() > 1e-3
    step = 1e-6
    for index in [(0, 0), (1, 2), (2, 4), (3, 1)]:
        with torch.no_grad():
            weight[index] += step
            above = loss()
            weight[index] -= 2 * step
            below = loss()
            weight[index] += step
        assert_near(grad[index], (above - below) / (2 * step), 1e-5, "gradient", scale=1.0)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_observed_sums_over_batches(name):
    """Two micro-batches, or two processes, give what one of both gives, where each token is routed
    by itself."""
    if not ROUTERS[name].causal:
        pytest.skip("routes batches, not tokens")
    layer = adapted(layer_of(name))
    x, ids = batch(10)
    whole = observed(layer, x, ids)
    parts = [observed(layer, x[p], ids[p]) for p in (slice(0, 4), slice(4, 10))]
    assert whole.keys() == parts[0].keys()
    for key in whole:
        torch.testing.assert_close(parts[0][key] + parts[1][key], whole[key])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_it_runs_in_half_precision_and_keeps_its_state(name, dtype):
    layer = adapted(layer_of(name), updates=2)
    state = {name: value.clone() for name, value in layer.gate.state.items()}
    layer.to(dtype)
    x, ids = batch(10)
    x = x.to(dtype).requires_grad_()
    found = layer(x, token_ids=ids)
    loss = found.out.float().sum() + found.balance_loss
    (loss if found.router_loss is None else loss + found.router_loss).backward()
    assert found.out.dtype == dtype and x.grad.isfinite().all()
    for n, before in state.items():
        assert layer.gate.state[n].dtype == before.dtype
        assert torch.equal(layer.gate.state[n], before)


def test_a_state_survives_fsdp_s_cast_by_assignment():
    gate = layer_of("relu").gate
    gate.l1_weight.fill_(3e-9)
    gate.l1_weight = gate.l1_weight.half()  # 0 in float16
    assert gate.l1_weight.dtype == torch.float64 and float(gate.l1_weight) == 3e-9


@pytest.mark.parametrize("name", NAMES)
def test_its_state_survives_a_state_dict(name):
    layer = adapted(layer_of(name), updates=3)
    other = layer_of(name, seed=9)
    if name == "hash":
        other.gate.set_token_counts(COUNTS[::-1])
    other.load_state_dict(layer.state_dict())
    x, ids = batch(10)
    found, wanted = (one(x, token_ids=ids) for one in (other.eval(), layer.eval()))
    assert torch.equal(found.out, wanted.out)


@pytest.mark.parametrize("name", NAMES)
def test_z_loss_is_that_of_the_logits(name):
    """In training a router may rearrange a copy of them, but not them."""
    layer, (x, ids) = layer_of(name).train(), batch()
    logits = torch.zeros(len(x), 4) if name == "hash" else x @ layer.gate.wg.weight.t()
    loss = layer(x, token_ids=ids).z_loss
    assert_near(loss, logits.double().exp().sum(dim=1).log().square().mean(), 1e-12, "z-loss")


def test_the_queues_of_a_single_token():
    """As those of two tokens of which the other goes nowhere."""
    torch.manual_seed(0)
    for k in (1, 2, 3, 6):
        experts = torch.randint(4, (1, k))  # an expert may be there more than once
        routed = torch.rand(1, k) < 0.7
        nowhere = torch.zeros(1, k, dtype=torch.bool)
        counts, local, slots = routing.queue(experts, routed, 4, routing.PROCESS)
        expected = routing.queue(
            torch.cat([experts, experts]), torch.cat([routed, nowhere]), 4, routing.PROCESS
        )
        assert torch.equal(counts, expected[0])
        for found, true in ((local, expected[1]), (slots, expected[2])):
            assert found.shape == (1, k) and torch.equal(found[routed], true[:1][routed])
