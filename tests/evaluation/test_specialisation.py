"""What gates tell about text, beside random gates and the bias of finite counts."""

import math

import numpy as np
import pytest
import torch
from torch.nn.functional import one_hot

from fairseq_moe_ext.evaluation import specialisation as s
from fairseq_moe_ext.moe.router import GateSettings, TopKRouter

KINDS, EXPERTS, BLOCKS, LENGTH = 3, 4, 60, 20


def text(seed=0):
    """token_ids (T,), blocks (T,), kinds (blocks,): kinds have the same token_ids."""
    rng = np.random.default_rng(seed)
    blocks = np.repeat(np.arange(BLOCKS), LENGTH)
    return rng.integers(50, size=BLOCKS * LENGTH), blocks, np.arange(BLOCKS) % KINDS


def at_random(seed=1):
    """Choices that know nothing, two different ones a token: (T, 1 + RANDOM, 2)."""
    rng = np.random.default_rng(seed)
    return rng.random((BLOCKS * LENGTH, 1 + s.RANDOM, EXPERTS)).argsort(-1)[..., :2]


def information(choices, experts, token_ids, blocks, kinds):
    """Of choices (T, 1 + RANDOM, K)."""
    tables = s.by_block(choices, experts, blocks, len(kinds))
    return s.information(tables, choices[:, :, 0], token_ids, kinds)


def test_of_choices_at_random_nothing_is_left():
    token_ids, blocks, kinds = text()
    found = information(at_random(), EXPERTS, token_ids, blocks, kinds)
    for by, rows in (("domain", KINDS), ("token", 50)):
        one = found[by]
        # Miller and Madow: degrees of freedom / (2 n ln 2); of two choices a token n is twice that,
        # and as they differ the factor (E - K) / (E - 1) of drawing without replacement comes in
        n = BLOCKS * LENGTH
        bias = (rows - 1) * (EXPERTS - 1) / (2 * n * math.log(2))
        if by == "domain":
            bias *= (EXPERTS - 2) / (EXPERTS - 1) / 2
        assert one["bias"] == pytest.approx(bias, rel=0.5)
        assert one["bits"] < 4 * one["bias"] and abs(one["left"]) < 3 * bias
        assert len(one["random"]) == s.RANDOM
        assert one["random_mean"] == pytest.approx(sum(one["random"]) / s.RANDOM)
    every = [information(at_random(seed), EXPERTS, token_ids, blocks, kinds) for seed in range(12)]
    assert sum(found["domain"]["above"] for found in every) <= 2, "of twelve"
    below = [{"layer": 0, "information": f} for f in every if not f["domain"]["above"]]
    said = s.verdict(below, "domain", "domain")
    assert said.startswith("By domain nothing is above the control: 0.00 bits by layer, random")


def test_a_gate_that_knows_the_kind_is_above_the_control():
    token_ids, blocks, kinds = text()
    choices = at_random()
    choices[:, 0] = np.stack([kinds[blocks], np.full(len(blocks), 3)], axis=1)
    found = information(choices, EXPERTS, token_ids, blocks, kinds)
    # half of the choices give the kind away, half say nothing
    assert found["domain"]["bits"] == pytest.approx(math.log2(KINDS) / 2)
    assert found["domain"]["above"] and not found["token"]["above"]
    assert found["domain"]["left"] == pytest.approx(math.log2(KINDS) / 2, abs=0.02)
    layers = [{"layer": i, "information": found} for i in range(2)]
    said = s.verdict(layers, "domain", "domain")
    assert "By domain 2 of 2 layers are above the control, by 0.7" in said
    assert "random gates of equal scale" in said and "0.77 bits, random 0.00 ± 0.00" in s.heading(
        layers[0]
    )


def test_types_and_one_kind_alone():
    token_ids, blocks, kinds = text()
    choices = at_random()
    choices[:, 0] = np.stack([token_ids % 2, np.full(len(token_ids), 3)], axis=1)
    found = information(choices, EXPERTS, token_ids, blocks, np.zeros_like(kinds))
    assert set(found) == {"token"} and found["token"]["above"]
    assert found["token"]["bits"] == pytest.approx(1, abs=0.02), "odd or even"
    assert "all text is of one kind" in s.verdict(
        [{"layer": 0, "information": found}], "domain", "set"
    )
    assert s.heading({"layer": 4, "information": found}) == "Layer 4"


@pytest.mark.parametrize("relation", ["none", "kind"])
def test_a_token_without_a_choice_counts_nowhere_by_kind(relation):
    """Expert 4 of 4: no choice. Against the table of a plain loop."""
    token_ids, blocks, kinds = text()
    choices = at_random()
    choices[::3, :, 1] = EXPERTS
    if relation == "kind":
        choices[kinds[blocks] == 0, 0] = EXPERTS
    table = np.zeros((KINDS, EXPERTS))
    for token, block in enumerate(blocks):
        for expert in choices[token, 0]:
            if expert < EXPERTS:
                table[kinds[block], expert] += 1
    shares = table / np.maximum(table.sum(1, keepdims=True), 1)
    found = information(choices, EXPERTS, token_ids, blocks, kinds)
    assert found["domain"]["bits"] == pytest.approx(s.mutual_information(shares))


def test_random_gates_have_the_scale_of_the_learned_one_and_its_inputs():
    torch.manual_seed(0)
    gate = TopKRouter(8, 4, GateSettings(dropless=True)).eval()
    with torch.no_grad():
        gate.wg.weight *= torch.tensor([[1.0], [2.0], [3.0], [4.0]])
    watch = s.Watch(gate, torch.Generator().manual_seed(1))
    x = torch.randn(30, 8)
    routed = gate(x, None)[1].experts
    watch.on = False
    gate(x, None)
    tables, first = watch.counted()
    assert tables.shape == (1 + s.RANDOM, 30, 4) and first.shape == (30, 1 + s.RANDOM)
    assert first[:, 0].tolist() == routed[:, 0].tolist()
    assert (tables[0] == one_hot(routed, 4).sum(1).numpy()).all()
    lengths = watch.random.view(s.RANDOM, 4, 8).norm(dim=-1)
    torch.testing.assert_close(lengths, gate.wg.weight.norm(dim=-1).expand(s.RANDOM, 4))
    for i, row in enumerate(watch.random.view(s.RANDOM, 4, 8)):
        for token, chosen, best in zip(x, tables[1 + i], first[:, 1 + i]):
            expected = (row @ token).argsort(descending=True)[:2].tolist()
            assert best == expected[0] and chosen.nonzero()[0].tolist() == sorted(expected)


@pytest.mark.parametrize("null", [1, 3])
def test_random_gates_choose_null_experts_too(null):
    """All null experts have one logit, which counts as often as there are of them."""
    torch.manual_seed(0)
    gate = TopKRouter(8, 4, GateSettings(top_k=3, dropless=True, null_experts=null)).eval()
    watch = s.Watch(gate, torch.Generator().manual_seed(1))
    x = torch.randn(30, 8)
    routing = gate(x, None)[1]
    tables, first = watch.counted()
    assert tables.shape == (1 + s.RANDOM, 30, 4)
    gates = [routing.experts.tolist()]
    for rows in watch.random:
        logits = [[*(row @ rows.T).tolist()] for row in x]
        every = [one[:4] + [one[4]] * null for one in logits]
        gates.append([sorted(range(4 + null), key=lambda e: -one[e])[:3] for one in every])
    for table, firsts, choices in zip(tables, first.T, gates):
        for token, chosen in enumerate(choices):
            computing = [e for e in chosen if e < 4]
            assert table[token].nonzero()[0].tolist() == sorted(computing)
            assert firsts[token] == (computing[0] if computing else 4)


def test_a_gate_that_was_not_trained_is_not_above_random_ones():
    torch.manual_seed(3)
    token_ids, blocks, kinds = text()
    means = torch.randn(KINDS, 8)  # hidden states differ by kind, as in any model
    x = means[torch.from_numpy(kinds[blocks])] + torch.randn(len(blocks), 8)
    gate = TopKRouter(8, EXPERTS, GateSettings(dropless=True)).eval()
    watch = s.Watch(gate, torch.Generator().manual_seed(1))
    watch.length = LENGTH
    gate(x, None)
    found = s.information(*watch.counted(), token_ids, kinds)["domain"]
    assert found["bits"] > 0.05 and not found["above"], "bits, but none that were learned"
