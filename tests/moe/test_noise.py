"""The random second-expert policies: right odds, the branch's numbers from its seed, silent at
evaluation."""

import pytest
import reference
import torch
import torch.nn.functional as F
from closeness import assert_near

from fairseq_moe_ext.moe.layer import MoELayer
from fairseq_moe_ext.moe.router import GateSettings
from fairseq_moe_ext.moe.routing import route


def branch_noise(policy, tokens, experts):
    """One draw in float32 over all tokens, as the branch makes it."""
    if policy == "random":
        return torch.rand(tokens)
    return torch.distributions.Gumbel(torch.tensor(0.0), torch.tensor(1.0)).rsample(
        (tokens, experts)
    )


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("policy", ["sampling", "random"])
def test_a_seed_gives_the_noise_it_gave_the_branch(policy, normalize):
    torch.manual_seed(0)
    settings = GateSettings(
        second_expert_policy=policy, normalize_before_dropping=normalize, count_padding=True
    )
    layer = MoELayer.build(6, 5, 4, settings)
    x = 3 * torch.randn(3, 7, 6)  # a gate so sure of itself that `random` drops some choices
    mask = torch.zeros(3, 7, dtype=torch.bool)
    mask[1, 3:] = True

    torch.manual_seed(1234)
    output = layer(x, mask)
    torch.manual_seed(1234)
    noise = branch_noise(policy, 21, 4)
    expected = reference.moe_layer(
        x.view(21, 6),
        layer.gate.wg.weight,
        layer.experts.fc1.weight,
        layer.experts.fc1.bias,
        layer.experts.fc2.weight,
        layer.experts.fc2.bias,
        F.gelu,
        top_k=2,
        capacity=reference.train_capacity(21, 4, 2),
        padding_mask=mask.view(21).tolist(),
        count_padding=True,
        second_expert_policy=policy,
        normalize_before_dropping=normalize,
        noise=noise,
    )
    assert output.expert_counts.tolist() == expected.expert_counts
    assert_near(output.out.view(21, 6), expected.out, 1e-5, "out")

    plain = route(layer.gate.wg(x.view(21, 6)), 2, padding_mask=mask.view(21))
    assert plain.counts.tolist() != expected.expert_counts, "the noise changed nothing"


@pytest.mark.parametrize("policy", ["sampling", "random"])
def test_evaluation_is_without_noise(policy):
    torch.manual_seed(0)
    noisy = MoELayer.build(6, 5, 4, GateSettings(second_expert_policy=policy))
    plain = MoELayer.build(6, 5, 4, GateSettings(second_expert_policy="all"))
    plain.load_state_dict(noisy.state_dict())
    x = torch.randn(21, 6)
    expected = plain.eval()(x).out
    noisy.train()
    assert not torch.equal(noisy(x).out, expected)
    noisy.eval()
    state = torch.get_rng_state()
    assert torch.equal(noisy(x).out, expected)
    assert torch.equal(torch.get_rng_state(), state)


PROBABILITIES = torch.tensor([0.5, 0.3, 0.15, 0.05])
TOKENS = 20_000  # standard error of a share below 0.004


def test_sampling_takes_the_second_expert_by_its_probability():
    """Gumbel noise makes the largest of the others a sample from their softmax."""
    torch.manual_seed(0)
    logits = PROBABILITIES.log().expand(TOKENS, 4)
    second = route(logits, 2, runner_up="sampling").experts[:, 1]
    share = torch.bincount(second, minlength=4) / TOKENS
    assert share.tolist() == pytest.approx([0.0, 0.6, 0.3, 0.1], abs=0.015)


@pytest.mark.parametrize("normalize, share", [(False, 2 * 0.3), (True, 2 * 0.3 / 0.8)])
def test_random_keeps_the_second_expert_by_twice_its_weight(normalize, share):
    torch.manual_seed(0)
    logits = PROBABILITIES.log().expand(TOKENS, 4)
    routing = route(logits, 2, runner_up="random", normalize="before" if normalize else "after")
    assert (routing.experts == torch.tensor([0, 1])).all()
    assert routing.routed[:, 0].all()
    assert float(routing.routed[:, 1].float().mean()) == pytest.approx(share, abs=0.015)


def test_jitter_in_bfloat16_is_that_of_float32():
    """A gate in float32 gets a factor around 1, though bfloat16 has none between 1 and 1.0078."""
    torch.manual_seed(0)
    layer = MoELayer.build(4, 4, 4, GateSettings(input_jitter=0.005, dropless=True))
    with torch.no_grad():
        layer.gate.wg.weight.copy_(torch.eye(4))
        factors, _ = layer.gate(torch.ones(5000, 4, dtype=torch.bfloat16))
    assert abs(float(factors.mean()) - 1) < 1e-4  # five standard deviations of the mean
    assert 0.995 <= float(factors.min()) < 0.9955 and 1.0045 < float(factors.max()) <= 1.005
