"""The numbers of `fairseq-moe inspect` against plain loops."""

import json
import math
import shutil
from collections import Counter
from types import SimpleNamespace

import branch_files
import numpy as np
import pytest
import torch
from fairseq.data import Dictionary
from small_models import MOE, build_model, random_tokens

from fairseq_moe_ext import cli
from fairseq_moe_ext.errors import UserError
from fairseq_moe_ext.evaluation.loading import moe_layers, set_gates
from fairseq_moe_ext.evaluation.specialisation import RANDOM, mutual_information
from fairseq_moe_ext.inspection import (
    cards,
    inspecting,
    knowing,
    observing,
    reading,
    relations,
    training,
)
from fairseq_moe_ext.inspection.inspecting import Settings, inspect
from fairseq_moe_ext.inspection.observing import LayerView
from fairseq_moe_ext.inspection.reading import read_own

EOS = 2


def blocks_of(rows, domains=None):
    return [
        reading.Block(domains[i] if domains else 0, row, np.arange(1, len(row)))
        for i, row in enumerate(rows)
    ]


@pytest.mark.parametrize("capacity", [1.0, 0.05])
def test_choices_and_losses_are_those_of_a_plain_pass(capacity):
    model = build_model(**MOE).double().eval()
    set_gates(model, eval_token_fraction=capacity)
    rows = random_tokens(4, 12)
    routings = {}
    for i, moe in moe_layers(model).items():
        moe.gate.register_forward_hook(
            lambda gate, args, output, i=i: routings.setdefault(i, output)
        )
    with torch.no_grad():
        logits = model(rows)[0]
    view = observing.observe(model, blocks_of(rows), batch_size=4, detailed=True)
    expected = [
        -float(torch.log_softmax(logits[b, i].double(), 0)[rows[b, i + 1]])
        for b in range(4)
        for i in range(11)
    ]
    assert view.loss == pytest.approx(expected, rel=1e-5)
    some_dropped = False
    for layer in view.layers:
        routing = routings[layer.layer][1]
        real = [b * 12 + i for b in range(4) for i in range(1, 12)]
        for at, token in enumerate(real):
            assert layer.chosen[at].tolist() == routing.experts[token].tolist()
            assert layer.kept[at].tolist() == routing.kept[token].tolist()
            some_dropped |= not layer.kept[at].all()
            expert, probability, how = layer.candidates[at][0]
            assert expert == layer.chosen[at][0] and how == (2 if layer.kept[at][0] else 1)
            assert probability == pytest.approx(float(routing.probs[token, int(expert)]), rel=1e-5)
            p = routing.probs[token].tolist()
            assert layer.entropy[at] == pytest.approx(-sum(x * math.log2(x) for x in p), rel=1e-5)
            assert {c[2] for c in layer.candidates[at][2:]} == {0}
    assert some_dropped == (capacity < 1)


@pytest.mark.parametrize(
    "flags",
    [
        dict(moe_balance="bias", moe_bias_update_rate=0.1),
        dict(moe_balance="bias", moe_bias_update_rate=0.1, moe_score="sigmoid", moe_top_k=5),
        dict(moe_router="hash", moe_balance="none", moe_top_k=3),
    ],
)
def test_candidates_are_the_choices_in_their_order_then_by_probability(flags):
    model = build_model(**{**MOE, **flags}).double().eval()
    set_gates(model, eval_token_fraction=1.0)
    for moe in moe_layers(model).values():
        if moe.gate.balance_bias is not None:
            moe.gate.balance_bias.copy_(torch.tensor([0.3, -0.2, 0.1, 0.5, -0.4, 0.0]))
    view = observing.observe(model, blocks_of(random_tokens(4, 12)), 4, detailed=True)
    unlike = 0
    for layer in view.layers:
        for chosen, candidates in zip(layer.chosen, layer.candidates):
            choices = [expert for expert in chosen.tolist() if expert < 6][:4]
            mine, rest = candidates[: len(choices)], candidates[len(choices) :, 1].tolist()
            assert mine[:, 0].tolist() == choices
            assert rest == sorted(rest, reverse=True)
            unlike += mine[:, 1].argmax() > 0
    assert unlike or "moe_router" in flags


def test_null_experts_are_no_experts():
    """They have no card, and the others' load is compared with the others' mean."""
    model = build_model(**{**MOE, "moe_null_experts": 4, "moe_top_k": 3, "moe_dropless": True})
    rows, routings = random_tokens(8, 60), {}
    for i, moe in moe_layers(model.eval()).items():
        moe.gate.register_forward_hook(
            lambda gate, args, output, i=i: routings.setdefault(i, output)
        )
    blocks = blocks_of(rows)
    view = observing.observe(model, blocks, batch_size=8, detailed=True)
    tokens = SimpleNamespace(piece=str, text=str)
    layers = inspecting._layers(model, view, inspecting._counted(blocks, ["a"]), tokens)
    for layer, seen in zip(layers, view.layers):
        load, nulls, first = [0] * 6, 0, []
        for b in range(8):
            for token in range(b * 60 + 1, b * 60 + 60):
                chosen = routings[layer.layer][1].experts[token].tolist()
                for expert in chosen:
                    if expert < 6:
                        load[expert] += 1
                    else:
                        nulls += 1
                first.append(next((expert for expert in chosen if expert < 6), 6))
        assert [card.share for card in layer.cards] == pytest.approx([n / sum(load) for n in load])
        assert layer.load_deviation == pytest.approx(np.std(load) / np.mean(load))
        assert layer.null_share == pytest.approx(nulls / (8 * 59 * 3)) and nulls > 0
        assert seen.chosen[:, 0].tolist() == first and layer.experts == 6
        assert (seen.candidates[..., 0] < 6).all() and len(layer.output_similarity) == 6


@pytest.mark.parametrize(
    "flags",
    [
        *(dict(moe_top_k=k) for k in (5, 6)),
        *(dict(moe_router=name, moe_top_k=3) for name in ("threshold", "relu")),
    ],
)
def test_all_choices_of_a_token_are_counted(flags):
    """Also if a token goes to more experts in one batch than in another."""
    model = build_model(**{**MOE, **flags}).double().eval()
    set_gates(model, eval_token_fraction=1.0)
    router = moe_layers(model)[1].gate
    if flags.get("moe_router") == "threshold":
        router.updates += 1
        router.threshold -= 2
    rows = random_tokens(4, 12)
    taken = []

    def see(gate, args, output):
        routing = output[1]
        for token in range(1, 12):
            mine = zip(routing.experts[token].tolist(), routing.routed[token].tolist())
            taken.append([expert for expert, routed in mine if routed])

    router.register_forward_hook(see)
    layer = observing.observe(model, blocks_of(rows), batch_size=1).layers[0]
    most = max(map(len, taken))
    assert layer.chosen.shape == layer.kept.shape == (44, most) and most > 4
    for token, experts in enumerate(taken):
        assert layer.chosen[token].tolist() == experts + [6] * (most - len(experts))
        assert layer.kept[token].tolist() == [True] * len(experts) + [False] * (most - len(experts))


def made_view(chosen, experts, random=None):
    chosen = np.asarray(chosen, dtype=np.int16)
    tokens = len(chosen)
    none = np.zeros((tokens, RANDOM), dtype=np.int16)
    return LayerView(
        0,
        experts,
        chosen,
        np.linspace(1, 0, tokens).astype(np.float16),
        chosen < experts,
        none if random is None else random,
        np.zeros(tokens),
        np.zeros((0, 4, 3)),
        torch.zeros(1, 2),
    )


def made_counted(token_ids, blocks=None, domains=None, positions=None):
    token_ids = np.asarray(token_ids)
    zeros = np.zeros(len(token_ids), dtype=int)
    return cards.Counted(
        token_ids=token_ids,
        domains=zeros if domains is None else np.asarray(domains),
        names=["a", "b"],
        blocks=zeros if blocks is None else np.asarray(blocks),
        positions=zeros if positions is None else np.asarray(positions),
        frequencies=zeros,
        previous=np.concatenate([[EOS], token_ids[:-1]]),
    )


@pytest.mark.parametrize("apart", [1, 1 << 20])
def test_bits_are_the_mutual_information_of_the_table(apart):
    """Also of labels so far apart that most of the table is empty."""
    rng = np.random.default_rng(0)
    labels, chosen = rng.integers(0, 7, 500), rng.integers(0, 5, 500)
    table = np.zeros((7, 5))
    for a, b in zip(labels, chosen):
        table[a, b] += 1
    assert knowing.bits(labels * apart, chosen, 6) == pytest.approx(mutual_information(table))
    use = rng.random(500) < 0.5
    table = np.zeros((7, 5))
    for a, b in zip(labels[use], chosen[use]):
        table[a, b] += 1
    assert knowing.bits(labels * apart, chosen, 6, use) == pytest.approx(mutual_information(table))


def test_what_is_planted_is_known_and_nothing_else_is():
    """The expert is the token's type: 2 bits of it, and of a position that is drawn, none."""
    rng = np.random.default_rng(0)
    token_ids = rng.integers(0, 4, 4000)
    random = rng.integers(0, 4, (4000, RANDOM)).astype(np.int16)
    seen = made_counted(token_ids, np.arange(4000) // 40, np.arange(4000) // 40 % 2)
    seen.positions = rng.integers(0, 6, 4000)
    found = knowing.knowledge(made_view(token_ids[:, None], 4, random), seen)
    assert set(found) == {"domain", "token", "previous", "position"}
    token = found["token"]
    assert token.above and token.left == pytest.approx(2, abs=0.02)
    assert token.interval[0] < token.left < token.interval[1] < token.left + 0.05
    for name in ("domain", "previous", "position"):
        assert not found[name].above and abs(found[name].left) < 0.01, name
        assert found[name].interval[0] < 0 < found[name].interval[1], name


def test_the_interval_is_as_wide_as_texts_differ():
    """Against many texts drawn anew: nearly all of their values are in intervals around 95 %."""
    held, true = 0, None
    lefts = []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        token_ids = rng.integers(0, 4, 1500)
        chosen = np.where(rng.random(1500) < 0.5, token_ids, rng.integers(0, 4, 1500))
        random = rng.integers(0, 4, (1500, RANDOM)).astype(np.int16)
        seen = made_counted(token_ids, np.arange(1500) // 30)
        found = knowing.knowledge(made_view(chosen[:, None], 4, random), seen)["token"]
        lefts.append(found)
    p = np.full((4, 4), 0.5 / 4) + np.eye(4) * 0.5
    true = mutual_information(p)
    held = sum(one.interval[0] < true < one.interval[1] for one in lefts)
    assert 52 <= held <= 60


def test_a_card_counts_as_a_plain_loop_does():
    rng = np.random.default_rng(1)
    chosen = np.stack([rng.permutation(3)[:2] for _ in range(300)])
    chosen[::7, 1] = 3  # no second choice
    token_ids = rng.integers(4, 9, 300)
    chosen[token_ids == 5] = [1, 3]
    chosen[token_ids == 6] = [0, 2]
    seen = made_counted(token_ids, np.arange(300) // 50, np.arange(300) // 150, np.arange(300) % 6)
    tokens = SimpleNamespace(piece=str, text=lambda some: " ".join(map(str, some)))
    found = cards.cards(made_view(chosen, 3), seen, tokens)
    total, planted = int((chosen < 3).sum()), []
    for e, card in enumerate(found):
        mine = [i for i in range(300) if e in chosen[i]]
        assert card.share == pytest.approx(len(mine) / total)
        assert card.dropped == 0
        for d in (0, 1):
            there = [i for i in range(300) if seen.domains[i] == d]
            own = sum(e in chosen[i] for i in there)
            assert card.domains[d] == pytest.approx(own / (chosen[there] < 3).sum())
        often, own = Counter(seen.token_ids.tolist()), Counter(seen.token_ids[mine].tolist())
        lifts = {t: own[t] / len(mine) / (often[t] / 300) for t in often}
        p, by_chance = len(mine) / 300, {}
        for t, n in often.items():  # as many or more of n
            tail = (math.comb(n, m) * p**m * (1 - p) ** (n - m) for m in range(own[t], n + 1))
            by_chance[t] = sum(tail)
        assert {int(w.token): w.lift for w in card.words} == pytest.approx(
            {t: lifts[t] for t in often if by_chance[t] < 0.01 / len(often)}
        )
        assert [w.count for w in card.words] == [own[int(w.token)] for w in card.words]
        planted += [(e, int(w.token)) for w in card.words]
        assert [w.lift for w in card.words] == sorted((w.lift for w in card.words), reverse=True)
        each = [
            np.mean([e == c for c in chosen[50 * b : 50 * b + 50].ravel() if c < 3])
            for b in range(6)
        ]
        assert card.deviation == pytest.approx(np.std(each, ddof=1))
        assert len({x.token for x in card.examples}) == len(card.examples) > 0
        first = next(i for i in range(300) if chosen[i, 0] == e)
        assert card.examples[0].token == str(seen.token_ids[first]), "the surest first"
    assert {(1, 5), (0, 6), (2, 6)} <= set(planted)


@pytest.mark.parametrize("experts", [8, 64, 512])
def test_experts_that_take_tokens_at_random_have_no_words(experts):
    """Rare tokens have high lifts by chance."""
    rng, number = np.random.default_rng(0), 20_000
    share = 1 / np.arange(1, 3001)  # Zipf's law
    token_ids = rng.choice(3000, number, p=share / share.sum())
    chosen = rng.integers(0, experts, (number, 1))
    chosen[token_ids == 100] = experts - 1  # and one that does not
    seen = made_counted(token_ids)
    tokens = SimpleNamespace(piece=str, text=str)
    *random, last = cards.cards(made_view(chosen, experts), seen, tokens)
    assert sum(map(len, (card.words for card in random))) <= 0.05 * experts
    assert [word.token for word in last.words] == ["100"]


def test_positions_and_frequencies():
    tokens = np.array([5, 6, EOS, EOS, 7, 7, EOS, 8, EOS, EOS, EOS, 9])
    assert reading.positions(tokens, EOS).tolist() == [1, 2, 3, 4, 1, 2, 3, 4, 5, 6, 1, 1]
    assert reading.position_classes(np.array([1, 2, 4, 5, 16, 17, 256, 257])).tolist() == [
        *(0, 1, 1, 2, 2, 3, 4, 5)
    ]
    tokens = np.array([1] * 4 + [2] * 4 + [3, 4, 5, 6, 7, 8, 9, 10])
    assert reading.frequency_classes(tokens).tolist() == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4


def test_blocks_are_spread_over_the_text():
    stream = torch.arange(100) + 10
    whole = reading.blocks_of(0, stream, EOS, 11)
    assert [len(block.row) for block in whole] == [11] * 10
    assert torch.cat([block.row[1:] for block in whole]).equal(stream)
    assert whole[0].row[0] == EOS and whole[1].row[0] == stream[9]
    some = reading.blocks_of(0, stream, EOS, 11, 30)
    assert [int(block.row[1]) for block in some] == [10, 50, 100]
    assert len(reading.blocks_of(0, stream, EOS, 200, 30)) == 1


def test_flow_and_company_by_hand():
    here = made_view([[0, 1], [0, 2], [1, 0], [2, 0]] * 1000, 3)
    there = made_view([[1, 0], [1, 0], [0, 1], [0, 1]] * 1000, 3)
    shares, bits = relations.flow(here, there, [0, 1, 2], [0, 1])
    assert shares == [[0, 1], [1, 0], [1, 0]] and bits == pytest.approx(1, abs=0.002)
    assert relations.together(here, [0, 1, 2]) == [[0, 0.5, 0.5], [1, 0, 0], [1, 0, 0]]
    assert relations.together(made_view([[0], [1]], 2), [0, 1]) is None
    # Token by token 2, 1, 2 and 1 of 2 choices.
    assert relations.agreement(here, there)[0] == pytest.approx(6 / 8)
    assert relations.agreement(here, here)[0] == 1.0


def test_independent_choices_tell_nothing_about_each_other():
    """Their table alone suggests 3 bits: it has four cells for each token."""
    rng = np.random.default_rng(0)
    here, there = (made_view(rng.integers(0, 128, (4000, 1)), 128) for _ in range(2))
    assert abs(relations.flow(here, there, [0], [0])[1]) < 0.03


def test_experts_with_the_same_weights_are_alike():
    model = build_model(**MOE).eval()
    moe = moe_layers(model)[1]
    with torch.no_grad():
        for part in (moe.experts.fc1, moe.experts.fc2):
            part.weight[4], part.bias[4] = part.weight[2], part.bias[2]
    view = observing.observe(model, blocks_of(random_tokens(4, 12)), 4).layers[0]
    routers, outputs, pairs = relations.similarity(moe, view, [0, 2, 3, 4])
    assert (pairs[0].first, pairs[0].second) == (2, 4)
    assert pairs[0].outputs == pytest.approx(1, abs=1e-5) == outputs[1][3]
    rows = moe.gate.wg.weight.detach()
    cosine = torch.nn.functional.cosine_similarity(rows[2], rows[4], dim=0)
    assert pairs[0].routers == pytest.approx(float(cosine), abs=1e-5) == routers[1][3]
    x = view.inputs
    with torch.no_grad():
        one, other = (
            torch.nn.functional.gelu(x @ moe.experts.fc1.weight[e].T + moe.experts.fc1.bias[e])
            @ moe.experts.fc2.weight[e].T
            + moe.experts.fc2.bias[e]
            for e in (0, 3)
        )
    cosine = torch.nn.functional.cosine_similarity(one, other).mean()
    assert outputs[0][2] == pytest.approx(float(cosine), abs=1e-5)


LOGS = {
    "simple": "x | INFO | train_inner | epoch 001: 2 / 9 loss=5, load_max=1.5, layer1_load_max=1.2,"
    " num_updates=2\nepoch 001: 4 / 9 loss=5, load_max=1.25, layer1_load_max=nan, num_updates=4\n"
    "x | INFO | valid | epoch 001 | valid on 'valid' subset | loss 4 | load_max 9 | num_updates 4",
    "json": '2026 | INFO | train_inner | {"load_max": "1.5", "layer1_load_max": "1.2", '
    '"num_updates": "2"}\n{"load_max": "1.25", "num_updates": "4"}\n'
    '2026 | INFO | valid | {"valid_load_max": "9", "valid_num_updates": "4"}',
    "metrics": '{"num_updates": 2, "load_max": 1.5, "layer1_load_max": 1.2}\nnot json {\n'
    '{"num_updates": 4, "load_max": 7}\n{"num_updates": 4, "load_max": 1.25}\n',
}


@pytest.mark.parametrize("kind", LOGS)
def test_logs_of_each_kind(tmp_path, kind):
    (tmp_path / "log").write_text(LOGS[kind])
    found = training.read_log(tmp_path / "log")
    assert found.updates == [2, 4]
    assert found.metrics == {"load_max": {"all": [1.5, 1.25], "1": [1.2, None]}}


def test_a_log_from_fairseq_train(trained):
    found = training.read_log(trained / "moe.log")
    assert found.updates == [2, 4, 6]
    assert set(found.metrics) == set(training.METRICS)
    assert all(set(lines) == {"all", "1", "3"} for lines in found.metrics.values())


def test_the_metrics_beside_a_checkpoint_are_found_if_they_say_something(trained, tmp_path):
    found = training.beside(trained / "moe" / "checkpoint_last.pt")
    assert found.updates == [2, 4, 6] and set(found.metrics["load_max"]) == {"all", "1", "3"}
    assert training.beside(trained / "dense" / "checkpoint_last.pt") is None
    assert training.beside(tmp_path / "checkpoint_last.pt") is None


def test_the_whole(trained, found):
    """Sums and shapes."""
    assert [layer.layer for layer in found.layers] == [1, 3] and list(found.tokens) == [
        *("far", "near")
    ]
    for layer in found.layers:
        assert sum(card.share for card in layer.cards) == pytest.approx(1)
        for i in (0, 1):
            assert sum(card.domains[i] for card in layer.cards) == pytest.approx(1)
        assert layer.dropped == 0
    assert [sum(row) for row in found.layers[0].flow] == pytest.approx([1] * 4)
    assert found.layers[1].flow is None
    text = found.texts[0]
    whole = (trained / "my.txt").read_text().strip("\n")
    ascii_only = "".join(t for t in text.tokens if "\\x" not in t)
    assert ascii_only.replace("↵", "\n") == whole.replace("Ä", "").replace("中", "")
    assert len(text.loss) == len(text.twin) == len(text.tokens) == len(text.candidates[0])
    assert set(found.twin_loss) == {"far", "near"}
    (earlier,) = found.saturation
    assert earlier.updates == 3
    assert all(chance < agreed <= 1 for agreed, chance in zip(earlier.agreement, earlier.chance))
    assert len(found.said) == 4
    again = json.loads(json.dumps(found.to_dict()))
    assert again["layers"][0]["cards"][0]["share"] == found.layers[0].cards[0].share
    assert found._repr_html_().startswith("<iframe")


@pytest.mark.parametrize(
    "tested, asked, used", [(1, None, "test"), (0, None, "valid"), (1, *["valid"] * 2)]
)
def test_the_split_that_is_counted_is_named(trained, tmp_path, tested, asked, used):
    without = shutil.ignore_patterns("test.*") if not tested else None
    data = shutil.copytree(trained / "data", tmp_path / "data", ignore=without)
    found = inspect(
        trained / "moe" / "checkpoint_last.pt", data, settings=Settings(asked, tokens=64, show=8)
    )
    assert found.subset == used and f"({used})" in found.html()


def test_the_command_writes_page_and_numbers(trained, tmp_path, capsys):
    line = f"inspect {trained}/moe/checkpoint_last.pt --data {trained}/data --cpu --tokens 2000"
    line += f" --page {tmp_path}/p.html --json {tmp_path}/p.json --capacity training"
    assert cli.main(line.split()) == 0
    assert "By token" in capsys.readouterr().out
    numbers = json.loads((tmp_path / "p.json").read_text())
    assert len(numbers["layers"]) == 2 and numbers["capacity"] == "training's"
    assert 1000 < sum(numbers["tokens"].values()) <= 2000
    assert {text["name"] for text in numbers["texts"]} == {"far", "near"}
    assert cli.main(line.split()) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert cli.main([*line.split(), "--overwrite"]) == 0


@pytest.mark.parametrize(
    "change, words",
    [
        ("--text {t}/none.txt", "--text {t}/none.txt: cannot be read"),
        ("--text {t}/empty.txt", "--text {t}/empty.txt: is empty"),
        ("--twin {t}/none.pt", "--twin {t}/none.pt: no such checkpoint"),
        ("--compare {t}/none.pt", "--compare {t}/none.pt: no such checkpoint"),
        ("--compare {t}/dense/checkpoint_last.pt", "has other layers or experts than"),
        ("--twin {t}/my.txt", "{t}/my.txt: not a checkpoint, or damaged"),
        ("--log {t}/none.log", "--log {t}/none.log: cannot be read"),
        ("--log {t}/my.txt", "--log {t}/my.txt: contains no gate metrics"),
        ("--tokens 0", "--tokens 0: use 1 or more"),
        ("--tokens 1 --context 4", "give 16 or more"),
        ("--context 33", "--context 33: use 2 to 32"),
        ("--capacity 2", "--capacity 2: use a share"),
        ("--subset never", "no data-bin for --subset never"),
        ("--data {t}", "--data {t}: contains no dict.txt; name the folder"),
        ("--page {t}/my.txt", "my.txt: is not a page of this command"),
        ("--page {t}/no/p.html", "no folder"),
        ("--json {t}/moe/checkpoint_last.pt", "is read by this command"),
        ("--model-overrides x", "--model-overrides 'x': use a Python dictionary"),
    ],
)
def test_mistakes_are_one_line(trained, tmp_path, capsys, change, words):
    (trained / "empty.txt").write_text("\n\n")
    line = f"inspect {trained}/moe/checkpoint_last.pt --data {trained}/data --cpu"
    line += f" --page {tmp_path}/p.html " + change.format(t=trained)
    assert cli.main(line.split()) == 1
    err = capsys.readouterr().err.splitlines()
    assert err[-1].startswith("error: ") and words.format(t=trained) in err[-1]
    assert not (tmp_path / "p.html").exists()


def test_the_context_is_checked_before_weights_are_read(trained, monkeypatch):
    monkeypatch.setattr(inspecting, "load_model", None)
    path = trained / "moe" / "checkpoint_last.pt"
    with pytest.raises(UserError, match="--context 33: use 2 to 32 tokens"):
        inspecting.inspect(path, trained / "data", settings=inspecting.Settings(context=33))


def test_other_models_are_checked_before_the_work(trained, monkeypatch):
    """The work can take minutes."""
    monkeypatch.setattr(inspecting, "observe", None)
    path, dense = (trained / name / "checkpoint_last.pt" for name in ("moe", "dense"))
    with pytest.raises(UserError, match="--compare .* has other layers or experts"):
        inspect(path, trained / "data", compare=[dense])
    short = SimpleNamespace(max_positions=lambda: 16)
    with pytest.raises(UserError, match="--twin x.pt: takes 16 tokens; add --context 16"):
        inspecting._check_other("--twin x.pt", short, short, 17)


def test_a_dense_model_has_no_experts(trained, tmp_path, capsys):
    line = f"inspect {trained}/dense/checkpoint_last.pt --data {trained}/data --cpu"
    assert cli.main([*line.split(), "--page", f"{tmp_path}/p.html"]) == 1
    assert "a dense model" in capsys.readouterr().err


def test_experts_stay_in_the_files_of_the_released_layout(tmp_path):
    """Files of many ranks, a dictionary and no test set: the user's text alone is counted."""
    dictionary = Dictionary()
    for i in range(20):
        dictionary.add_symbol(f"w{i}")
    settings = {
        **branch_files.RELEASED_15B,
        **dict(decoder_layers=2, decoder_embed_dim=24, decoder_ffn_embed_dim=32),
        "moe_expert_count": 96,
    }
    vocabulary = len(dictionary)
    branch_files.write(str(tmp_path), settings, vocabulary, 4, branch_files.random_tensors())
    (tmp_path / "data").mkdir()
    dictionary.save(str(tmp_path / "data" / "dict.txt"))
    (tmp_path / "my.txt").write_text("\n".join(f"w{i % 7} w{i % 11} w3" for i in range(40)))
    found = inspect(tmp_path / "model.pt", tmp_path / "data", [tmp_path / "my.txt"])
    assert found.tokens == {"my.txt": 159} and found.texts[0].tokens[:4] == [
        *("w0 ", "w0 ", "w3 ", "↵")
    ]
    (layer,) = found.layers
    assert layer.experts == 96 and len(layer.shown) == relations.SHOWN
    assert len(layer.output_similarity) == relations.SHOWN
    assert "By domain there is nothing to distinguish" in found.said[0]


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "my.txt").write_bytes(b"\xef\xbb\xbfthe cat\r\n")
    tokens = SimpleNamespace(encode=lambda text, where: list(text.encode()))
    (found,) = read_own([tmp_path / "my.txt"], tokens).values()
    assert bytes(found.tolist()) == b"the cat"


def test_own_text_may_be_what_prepare_reads(tmp_path):
    """The field of a JSONL file, document by document, not its braces."""
    lines = [json.dumps({"text": text, "source": "x"}) + "\n" for text in ("one\n\ntwo", "three")]
    (tmp_path / "my.jsonl").write_text("".join(lines))
    (tmp_path / "my.txt").write_bytes(b"\none\r\n\r\ntwo\n\nthree\n")
    tokens = SimpleNamespace(encode=lambda text, name: [ord(letter) for letter in text])
    found = read_own([tmp_path / "my.jsonl", tmp_path / "my.txt"], tokens)
    for name in ("my.jsonl", "my.txt"):
        assert "".join(map(chr, found[name])) == "one\n\ntwo\n\nthree"
    (tmp_path / "bad.jsonl").write_text('{"text": 1}\n')
    with pytest.raises(UserError, match="bad.jsonl, line 1: field"):
        read_own([tmp_path / "bad.jsonl"], tokens)
