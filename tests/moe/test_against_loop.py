"""The package equals the plain loop of tests/reference.py over a grid of shapes and settings."""

import math
from contextlib import nullcontext
from typing import NamedTuple, Optional

import pytest
import reference
import torch
import torch.nn.functional as F
from closeness import assert_near, assert_stats_near
from golden import RTOL
from hypothesis import assume, event, given, settings
from hypothesis import strategies as st
from torch import Tensor
from wide_experts import as_wide

from fairseq_moe_ext.moe.balance import balance_loss, z_loss
from fairseq_moe_ext.moe.layer import MoELayer
from fairseq_moe_ext.moe.router import GateSettings
from fairseq_moe_ext.moe.routing import route, token_capacity
from fairseq_moe_ext.moe.stats import routing_stats

# The same examples on every run; the loop is slow by design, so there is no deadline.
GRID = settings(derandomize=True, deadline=None, database=None, max_examples=120)

POLICIES = ("all", "sampling", "random")
DTYPES = (torch.float64, torch.float32)


class Example(NamedTuple):
    """T tokens, D model, F hidden, E experts."""

    x: Tensor  # (T, D)
    gate: Tensor  # (E, D)
    w1: Tensor  # (E, F, D)
    b1: Tensor  # (E, F)
    w2: Tensor  # (E, D, F)
    b2: Tensor  # (E, D)
    padding_mask: Optional[Tensor]  # (T,)
    count_padding: bool
    capacity: Optional[int]
    top_k: int
    score: str
    policy: str
    normalize_before_dropping: bool
    batch_prioritized: bool
    noise: Optional[Tensor]
    seed: int

    def options(self):
        """Keyword arguments of `reference.route`."""
        return {
            "top_k": self.top_k,
            "score": self.score,
            "capacity": self.capacity,
            "padding_mask": self.padding_mask,
            "count_padding": self.count_padding,
            "second_expert_policy": self.policy,
            "normalize_before_dropping": self.normalize_before_dropping,
            "batch_prioritized": self.batch_prioritized,
            "noise": self.noise,
        }


def on_grid(generator, *shape, steps, scale=1.0):
    """Normal numbers rounded to multiples of 1/steps, so that products and sums of a few of them
    are exact in float32 and float64 alike: both precisions then face the same logits, and equal
    rows give equal logits whatever the order of summation."""
    return torch.round(torch.randn(*shape, generator=generator).double() * scale * steps) / steps


@st.composite
def examples(draw):
    top_k = draw(st.sampled_from([2, 1, 2, 3, 4]))
    experts = draw(st.integers(top_k, 9))
    score = draw(st.sampled_from(["softmax", "softmax", "sigmoid"]))
    tokens = draw(st.integers(1, 40))
    dim = draw(st.integers(1, 8))
    hidden = draw(st.integers(1, 8))
    seed = draw(st.integers(0, 2**16))
    generator = torch.Generator().manual_seed(seed)

    x = on_grid(generator, tokens, dim, steps=32)
    gate = on_grid(generator, experts, dim, steps=32, scale=0.5)
    repeated = draw(st.booleans())
    if repeated:  # ties between tokens: they share their priority
        x = x[torch.randint(0, min(3, tokens), (tokens,), generator=generator)]
    if draw(st.booleans()):  # ties between experts: a few of them have the same logits
        gate = gate[torch.randint(0, experts, (experts,), generator=generator)]
    if draw(st.booleans()):  # most tokens want the same expert; others are empty
        gate[draw(st.integers(0, experts - 1))] += x.mean(dim=0).sign()

    mask = None
    padding = draw(st.sampled_from(["none", "some", "some", "none", "none", "some", "all"]))
    if padding != "none":
        share = {"some": 0.4, "all": 1.0}[padding]
        mask = torch.rand(tokens, generator=generator) < share
    count_padding = draw(st.booleans())
    counted = tokens if mask is None or count_padding else int((~mask).sum())
    limit = draw(st.sampled_from(["dropless", "one", "training", "evaluation", "any"]))
    capacity = {
        "dropless": None,
        "one": 1,
        "training": max(1, reference.train_capacity(counted, experts, top_k)),
        "evaluation": max(1, reference.eval_capacity(counted, 0.25)),
        "any": draw(st.integers(1, tokens)),
    }[limit]
    policy = draw(st.sampled_from(POLICIES if top_k == 2 else ["all", "all", "sampling"]))
    noise = None
    if policy == "sampling":
        uniform = torch.rand(tokens, experts, generator=generator).double().clamp_min(1e-6)
        noise = torch.round(-torch.log(-torch.log(uniform)) * 1024) / 1024
    elif policy == "random":
        noise = torch.rand(tokens, generator=generator).double()
    return Example(
        x=x,
        gate=gate,
        w1=torch.randn(experts, hidden, dim, generator=generator).double(),
        b1=torch.randn(experts, hidden, generator=generator).double(),
        w2=torch.randn(experts, dim, hidden, generator=generator).double(),
        b2=torch.randn(experts, dim, generator=generator).double(),
        padding_mask=mask,
        count_padding=count_padding,
        capacity=capacity,
        top_k=top_k,
        score=score,
        policy=policy,
        normalize_before_dropping=top_k > 1 and draw(st.booleans()),
        batch_prioritized=draw(st.booleans()),
        noise=noise,
        seed=seed,
    )


def is_decided(example, logits, routes):
    """Whether rounding cannot turn a choice: ties are exact, everything else is well apart.

    The grid makes ties of logits exact. Two other comparisons are of rounded numbers: the priority
    of tokens, which must differ clearly unless the rows of logits are the same, and the uniform
    number of the policy "random"."""
    scores = (logits.sigmoid() if example.score == "sigmoid" else logits.softmax(-1)).detach()
    if example.score == "sigmoid" and example.top_k < logits.size(1):
        firsts = scores.topk(2).values
        if ((firsts[:, 0] - firsts[:, 1]) < 1e-5).any():
            return False
    if example.batch_prioritized:
        order = sorted(range(len(logits)), key=lambda t: float(scores[t].max()))
        for a, b in zip(order, order[1:]):
            gap = float(scores[b].max() - scores[a].max())
            # the sigmoid of equal numbers may differ by where they are in a vector of the CPU
            tied = example.score == "softmax" and torch.equal(logits[a], logits[b])
            if gap < 1e-5 and not tied:
                return False
    if example.policy == "random":
        for t, choices in enumerate(routes.choices):
            first, second = (scores[t][choice.expert] for choice in choices)
            total = first + second if example.normalize_before_dropping else 1.0
            if abs(2 * second / total - example.noise[t]) < 1e-5:
                return False
    return True


def note_kind(example, routes):
    """What the grid covers, shown by `pytest --hypothesis-show-statistics`."""
    event(f"top-{example.top_k} {example.score} {example.policy}")
    choices = [choice for choices in routes.choices for choice in choices]
    event("a choice is dropped", any(c.routed and not c.kept for c in choices))
    event("an expert is empty", 0 in reference.expert_counts(routes)[0])
    event("nothing is routed", not any(c.routed for c in choices))


def column(routes, field):
    return torch.tensor([[getattr(c, field) for c in choices] for choices in routes.choices])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@GRID
@given(example=examples())
def test_routing(dtype, example):
    """Choices, slots and weights; losses and statistics; gradients of the logits."""
    truth = (example.x @ example.gate.T).requires_grad_()  # (T, E)
    routes = reference.route(truth, **example.options())
    assume(is_decided(example, truth, routes))
    note_kind(example, routes)

    logits = truth.detach().to(dtype).requires_grad_()
    normalize = "before" if example.normalize_before_dropping else "after"
    routing = route(
        logits,
        example.top_k,
        score=example.score,
        runner_up=example.policy,
        normalize=normalize if example.top_k > 1 else None,
        prioritized=example.batch_prioritized,
        capacity=example.capacity,
        padding_mask=example.padding_mask,
        count_padding=example.count_padding,
        noise=None if example.noise is None else example.noise.to(dtype),
    )

    rtol = RTOL[dtype]
    routed = column(routes, "routed")
    assert torch.equal(routing.experts, column(routes, "expert"))
    assert torch.equal(routing.routed, routed)
    assert torch.equal(routing.kept, column(routes, "kept"))
    assert torch.equal(routing.slots[routed], column(routes, "slot")[routed])
    assert routing.counts.tolist() == reference.expert_counts(routes)
    weights = torch.stack([torch.stack([c.weight for c in choices]) for choices in routes.choices])
    assert_near(routing.weights, weights, rtol, "weights", scale=1.0)
    assert_near(routing.probs, torch.stack(routes.probs), rtol, "probs")
    assert_stats_near(routing_stats(routing), reference.statistics(routes), rtol)

    balance, z = balance_loss(routing), z_loss(logits, routing.counted)
    true_balance = reference.balance_loss(routes)
    true_z = reference.z_loss(truth, routes.counts)
    assert_near(balance, true_balance, rtol, "balance loss")
    assert_near(z, true_z, rtol, "z-loss", scale=max(1.0, float(true_z.detach())))

    generator = torch.Generator().manual_seed(example.seed)
    r = torch.randn(weights.shape, generator=generator).double()
    kinds = {
        "weights": ((routing.weights * r.to(dtype)).sum(), (weights * r).sum()),
        "balance loss": (balance, true_balance),
        "z-loss": (z, true_z),
    }
    for kind, (ours, true) in kinds.items():
        (grad,) = torch.autograd.grad(ours, logits, retain_graph=True)
        expected = torch.zeros_like(truth)
        if true.requires_grad:  # all tokens padding: no weight depends on the logits
            (expected,) = torch.autograd.grad(
                true, truth, retain_graph=True, materialize_grads=True
            )
        # Against the size of the terms that the gradient is a difference of.
        assert_near(grad, expected, rtol, f"gradient of {kind}", scale=1.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@GRID
@given(
    example=examples(),
    activation=st.sampled_from([F.relu, F.gelu]),
    kernels=st.sampled_from([nullcontext, as_wide]),
)
def test_layer(dtype, example, activation, kernels):
    """Outputs, losses, statistics, counts and the gradients of everything."""
    # The layer draws its own noise (test_noise.py), and its router scores by softmax.
    example = example._replace(policy="all", noise=None, score="softmax")
    names = ["x", "gate", "w1", "b1", "w2", "b2"]
    truth = {name: getattr(example, name).clone().requires_grad_() for name in names}
    expected = reference.moe_layer(**truth, activation=activation, **example.options())
    logits = example.x @ example.gate.T
    routes = reference.route(logits, **example.options())
    assume(is_decided(example, logits, routes))
    note_kind(example, routes)

    x = example.x.to(dtype).requires_grad_()
    layer, parameters = layer_of(example, activation, dtype)
    with kernels():
        output = layer(x, example.padding_mask)
    ours = {"x": x, **parameters}

    rtol = RTOL[dtype]
    assert_near(output.out, expected.out, rtol, "out", scale=1.0 + max_abs(expected.out))
    assert_near(output.balance_loss, expected.balance_loss, rtol, "balance loss")
    assert_near(output.z_loss, expected.z_loss, rtol, "z-loss", scale=1 + max_abs(expected.z_loss))
    assert_stats_near(output.stats, expected.stats, rtol)
    assert output.expert_counts.tolist() == expected.expert_counts

    generator = torch.Generator().manual_seed(example.seed)
    r = torch.randn(example.x.shape, generator=generator).double()
    total = (output.out * r.to(dtype)).sum() + 1.5 * output.balance_loss + 0.1 * output.z_loss
    true_total = (expected.out * r).sum() + 1.5 * expected.balance_loss + 0.1 * expected.z_loss
    with kernels():
        total.backward()
    true_total.backward()
    largest = max([1.0, *(max_abs(p.grad) for p in truth.values() if p.grad is not None)])
    for name in names:
        true_grad = truth[name].grad
        if true_grad is None:
            true_grad = torch.zeros_like(truth[name])
        assert_near(ours[name].grad, true_grad, rtol, f"gradient of {name}", scale=largest)
        # An expert without tokens gets exactly zero, not a small number.
        if name in ("w1", "b1", "w2", "b2"):
            idle = true_grad.flatten(1).abs().amax(dim=1) == 0
            assert not ours[name].grad[idle].any()


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("k", [1, 2, 3, 6])
def test_a_bias_enters_the_choice_and_not_the_weights(k, score):
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        logits = torch.randn(30, 6, generator=generator).double().requires_grad_()
        bias = 0.3 * torch.randn(6, generator=generator).double()
        routes = reference.route(logits, top_k=k, capacity=8, score=score, bias=bias.tolist())
        normalize = "after" if k > 1 else None
        routing = route(logits, k, score=score, bias=bias, capacity=8, normalize=normalize)
        assert torch.equal(routing.experts, column(routes, "expert"))
        assert torch.equal(routing.kept, column(routes, "kept"))
        weights = [torch.stack([c.weight for c in choices]) for choices in routes.choices]
        assert_near(routing.weights, torch.stack(weights), 1e-12, "weights", scale=1.0)
        plain = route(logits, k, score=score, capacity=8, normalize=normalize)
        assert k == 6 or not torch.equal(routing.experts, plain.experts)


@pytest.mark.parametrize(
    "k, options, words",
    [
        (0, {}, "k = 0"),
        (5, {}, "k = 5: a token takes at least 1 expert and at most 4"),
        (2, {"score": "cosine"}, "score 'cosine'"),
        (2, {"runner_up": "some"}, "runner_up 'some'"),
        (3, {"runner_up": "random"}, "for the second of 2 experts, not for 3"),
        (2, {"normalize": "never"}, "normalize 'never'"),
    ],
)
def test_what_cannot_be_routed(k, options, words):
    with pytest.raises(ValueError, match=words):
        route(torch.zeros(3, 4), k, **options)


def max_abs(tensor):
    return float(tensor.detach().abs().max())


def layer_of(example, activation, dtype):
    """The package's layer with the example's weights, and its parameters by the loop's names."""
    experts, hidden, dim = example.w1.shape
    # An evaluation fraction is the way to an arbitrary capacity; the layer is in evaluation mode.
    tokens = len(example.x)
    if example.padding_mask is not None and not example.count_padding:
        tokens = max(1, int((~example.padding_mask).sum()))
    fraction = 1.0
    if example.capacity is not None:  # beyond all tokens it is no limit
        fraction = min(1.0, (example.capacity - 0.5) / tokens)
    layer = MoELayer.build(
        dim,
        hidden,
        experts,
        GateSettings(
            top_k=example.top_k,
            second_expert_policy=example.policy,
            normalize_before_dropping=example.normalize_before_dropping,
            batch_prioritized=example.batch_prioritized,
            eval_token_fraction=fraction,
            count_padding=example.count_padding,
            dropless=example.capacity is None,
        ),
        activation=activation,
    )
    layer.to(dtype).eval()
    parameters = {
        "gate": layer.gate.wg.weight,
        "w1": layer.experts.fc1.weight,
        "b1": layer.experts.fc1.bias,
        "w2": layer.experts.fc2.weight,
        "b2": layer.experts.fc2.bias,
    }
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(getattr(example, name))
    return layer, parameters


@given(
    tokens=st.integers(1, 500),
    experts=st.integers(1, 64),
    factor=st.floats(1.0, 4.0),
    fraction=st.floats(0.001, 1.0),
)
@GRID
def test_capacity(tokens, experts, factor, fraction):
    trained = min(reference.train_capacity(tokens, experts, factor), tokens)
    assert token_capacity(tokens, experts, factor=factor) == trained
    assert token_capacity(tokens, experts, fraction=fraction) == math.ceil(fraction * tokens)


def test_capacity_is_never_zero():
    """A batch of a few tokens under a factor below 1 still gets one slot an expert."""
    assert token_capacity(3, 8, factor=0.5) == 1


@pytest.mark.parametrize("factor", [1e19, 1e30, 1e308])
def test_a_huge_capacity_factor_is_no_limit(factor):
    """A number that int64, or float64 times the mean load, does not hold."""
    logits = torch.randn(40, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    logits[:, 0] += 9  # so that one expert is a choice of nearly every token
    capacity = token_capacity(40, 4, factor=factor)
    assert capacity == 40 and token_capacity(0, 4, factor=factor) == 1
    routing, free = (route(logits, 2, capacity=c) for c in (capacity, None))
    assert routing.kept.all() and free.counts[:, 0].sum() > 30
    assert torch.equal(routing.weights, free.weights)
