"""What padding does to a model with experts, by --moe-pad-rule, against a plain loop."""

import math

import branch_files
import plain_decoder
import pytest
import reference
import torch
from branch_checkpoints import ADAM, change, make_data_bin, perplexities, write_small
from branch_checkpoints import SMALL as BRANCH_SMALL
from fairseq import checkpoint_utils
from fairseq.data.indexed_dataset import MMapIndexedDataset
from small_models import (
    MOE,
    PAD,
    VOCABULARY,
    build_model,
    build_stock_model,
    make_task,
    random_tokens,
)
from updates import as_sample, batches, configure, make_trainer, record
from waits import Waits

from fairseq_moe_ext.errors import UserError
from fairseq_moe_ext.moe.router import TopKRouter


def padded_tokens():
    lengths = 9, 4, 1, 7
    tokens = random_tokens(len(lengths), max(lengths))
    for row, length in zip(tokens, lengths):
        row[length:] = PAD
    return tokens


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data_bin(tmp_path_factory.mktemp("data"), make_task().source_dictionary)


def tenth(tokens):
    return reference.eval_capacity(tokens, 0.1)


RULES = {  # flags -> the plain loop's
    "none": ({}, dict(hide_padding=False)),
    "real": ({"use_moe_pad_mask": True}, dict(masked=True, count_padding=False)),
    "counted": ({"use_moe_pad_mask": True, "moe_pad_rule": "counted"}, dict(masked=True)),
    "branch": ({"moe_pad_rule": "branch"}, dict(hide_padding=True)),
    "branch, masked": (
        {"use_moe_pad_mask": True, "moe_pad_rule": "branch"},
        dict(hide_padding=True, masked=True),
    ),
}


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", RULES)
def test_padding_is_looked_for_once(name, padded):
    rule = build_model(**MOE, **RULES[name][0]).decoder.pad_rule
    tokens = padded_tokens() if padded else random_tokens(4, 9)
    with Waits() as waits:
        rule.attention_mask(tokens.eq(PAD), 9)
    assert waits.counts == {"__bool__": 1}


@pytest.mark.parametrize("top1", [False, True])
@pytest.mark.parametrize("name", RULES)
def test_the_model_is_the_plain_loop(name, top1):
    flags, rule = RULES[name]
    rule = {"hide_padding": False, **rule}
    flags = {**flags, "moe_top1_expert": top1, "moe_eval_capacity_token_fraction": 0.1}
    model = build_model(**MOE, **flags).double().eval()
    tokens = padded_tokens()
    real = tokens.ne(PAD)
    logits, outputs = plain_decoder.run(model, tokens, capacity=tenth, **rule)
    found, extra = model(tokens)
    torch.testing.assert_close(found[real], logits[real], rtol=1e-10, atol=1e-10)
    for one, true in zip(extra["moe"], outputs):
        torch.testing.assert_close(one.balance_loss, true.balance_loss, rtol=1e-10, atol=0)
        torch.testing.assert_close(one.z_loss, true.z_loss, rtol=1e-10, atol=0)
        for key, value in true.stats.items():
            assert float(one.stats[key]) == pytest.approx(value, rel=1e-6), key
    assert outputs[0].stats["overflow_expert1"] > 0


def test_the_rules_differ():
    """So that the test above tells them apart."""
    tokens = padded_tokens()
    found = []
    for flags, _ in RULES.values():
        model = build_model(**MOE, **flags).double().eval()
        logits, extra = model(tokens)
        found.append((float(logits[tokens.ne(PAD)].sum()), float(extra["moe"][1].balance_loss)))
    for pair in zip(*found):
        assert len(set(pair)) >= 4
    assert len(set(found)) == len(RULES)


def test_padding_looks_where_stocks_does():
    """By the branch's rule: its attention is stock's (fairseq/models/transformer/
    transformer_decoder.py:extract_features_scriptable@0.12.2), which hides padding as a key."""
    tokens = padded_tokens()
    stock = build_stock_model(0, activation_fn="gelu")
    expected = stock.decoder.extract_features(tokens, None)[0]
    same = {}
    for rule in ("real", "branch"):
        ours = build_model(seed=1, moe_pad_rule=rule).double().eval()
        ours.load_state_dict(stock.state_dict())
        ours.decoder.pad_rule.experts = True  # dense models need no mask
        features = ours.decoder.extract_features(tokens)[0]
        same[rule] = torch.isclose(features, expected, atol=1e-10).all(dim=-1)
    assert same["branch"].all()
    assert torch.equal(same["real"], tokens.ne(PAD))


@pytest.mark.parametrize("mask", ["", "--use-moe-pad-mask"])
@pytest.mark.parametrize("rows", [5, 8])
def test_the_branch_fills_short_batches_in_training_and_validation(data, rows, mask):
    """Up to --batch-size rows, 8, and to --batch-size-valid."""
    flags = f"--moe-expert-count 4 --moe-second-expert-policy all --batch-size-valid {rows + 1}"
    flags += " --moe-eval-capacity-token-fraction 0.1"
    trainer = make_trainer(
        configure(data, f"{flags} {mask} --moe-pad-rule branch"), "legacy_ddp", 1
    )
    model = trainer.get_model()
    sample = as_sample(next(batches())[:rows])
    tokens = sample["net_input"]["src_tokens"]
    rule = dict(hide_padding=True, masked=bool(mask))

    def losses(capacity, full_rows):
        _, outputs = plain_decoder.run(
            model, tokens, capacity=capacity, full_rows=full_rows, **rule
        )
        return sum(float(o.balance_loss) for o in outputs) / len(outputs), outputs[0].stats

    train = losses(lambda n: reference.train_capacity(n, 4, 2), 8)
    valid = losses(tenth, rows + 1)
    alone = losses(tenth, 0)
    assert valid[0] != alone[0]
    model.eval()
    found = [float(layer.balance_loss) for layer in model(tokens)[1]["moe"]]  # as eval-lm does
    assert sum(found) / len(found) == pytest.approx(alone[0], rel=1e-9)
    figures, _ = record(trainer)
    trainer.valid_step(sample)
    trainer.train_step([sample])
    for found, (loss, stats) in zip(figures, (valid, train)):
        assert found["moe_loss"] == pytest.approx(loss, rel=1e-9)
        assert found["overflow_expert2"] == pytest.approx(stats["overflow_expert2"], rel=1e-9)


def expected_perplexity(model, data, width, rows):
    """Of each sentence behind an end of sentence, in batches by length, each row padded to width;
    by the branch's rule, a quarter of the batch an expert."""
    sentences = sorted(map(list, MMapIndexedDataset(f"{data}/valid")), key=len)
    nll, count = 0.0, 0
    for start in range(0, len(sentences), rows):
        targets = torch.full((len(sentences[start : start + rows]), width), PAD)
        for row, sentence in zip(targets, sentences[start : start + rows]):
            row[: len(sentence)] = torch.tensor(sentence)
        real = targets.ne(PAD)
        eos = torch.full_like(targets[:, :1], 2)
        tokens = torch.cat([eos, targets[:, :-1]], dim=1).where(real, PAD)
        logits, _ = plain_decoder.run(
            model, tokens, capacity=lambda n: reference.eval_capacity(n, 0.25), hide_padding=True
        )
        for scores, target in zip(logits[real], targets[real]):
            nll -= float(torch.log(reference.softmax(scores)[target]))
            count += 1
    return math.exp(nll / count)


def test_a_checkpoint_of_the_branch_is_evaluated_as_there(tmp_path, data):
    model = write_small(tmp_path / "run")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)  # so that it matters where a token goes
    settings = {**BRANCH_SMALL, "moe_eval_capacity_token_fraction": 0.25}
    branch_files.write(str(tmp_path / "run"), settings, VOCABULARY, 2, branch_files.of_model(model))
    line = data, "--path", tmp_path / "run" / "model.pt", "--sample-break-mode", "eos"
    line += "--tokens-per-sample", "24", "--batch-size", "5"
    expected = expected_perplexity(model.double(), data, 24, 5)
    assert perplexities(1, *line) == [pytest.approx(expected, rel=2e-5)]
    for other in ("{'moe_pad_rule': 'real'}", "{'pad_to_fixed_length': False}"):
        assert perplexities(1, *line, "--model-overrides", other)[0] != pytest.approx(
            expected, rel=1e-3
        )


def rule_of(trainer):
    """Of the model, its gates and the checkpoints to come, which agree."""
    rule = trainer.get_model().decoder.pad_rule.rule
    gates = [m for m in trainer.get_model().modules() if isinstance(m, TopKRouter)]
    assert gates and {gate.settings.count_padding for gate in gates} == {rule != "real"}
    assert str(trainer.cfg.model.moe_pad_rule or "real") == rule
    return rule


def trainer_from(data, path, flags=""):
    trainer = make_trainer(configure(data, f"{ADAM} {flags}"), "legacy_ddp", 1, torch.float32)
    if path is not None:
        trainer.load_checkpoint(str(path))
    return trainer


def save(trainer, path):
    """As fairseq-train does; returns the path."""
    trainer.consolidate_optimizer()
    trainer.save_checkpoint(str(path), {"train_iterator": {"epoch": 1}})
    return path


def test_training_on_keeps_the_rule(tmp_path, data):
    write_small(tmp_path / "run")
    path = tmp_path / "run" / "model.pt"
    assert rule_of(trainer_from(data, None)) == "real"
    assert rule_of(trainer_from(data, path, "--moe-pad-rule real")) == "real"
    trainer = trainer_from(data, path)
    assert rule_of(trainer) == "branch"
    own = save(trainer, tmp_path / "own.pt")
    assert rule_of(trainer_from(data, own)) == "branch"
    assert rule_of(trainer_from(data, own, "--moe-pad-rule counted")) == "counted"
    model, cfg, _ = checkpoint_utils.load_model_ensemble_and_task([str(own)], {"data": data})
    assert model[0].decoder.pad_rule.rule == cfg.model.moe_pad_rule == "branch"


def test_a_checkpoints_rule_is_refused_where_the_flag_would_be(tmp_path, data):
    write_small(tmp_path / "run")
    path, flags = tmp_path / "run" / "model.pt", "--moe-balance-over sequence"
    for source, rule in ((path, ""), (None, "--moe-pad-rule branch")):
        with pytest.raises(
            UserError, match="--moe-balance-over sequence with --moe-pad-rule branch"
        ):
            trainer_from(data, source, f"{flags} {rule}")
    assert rule_of(trainer_from(data, path, f"{flags} --moe-pad-rule real")) == "real"


@pytest.mark.parametrize("mask, rule", [("--use-moe-pad-mask", "counted"), ("", "real")])
def test_checkpoints_from_before_the_rule_mean_what_they_meant(tmp_path, data, mask, rule):
    """With the mask padding counted then; without, there is but one rule."""
    own = save(trainer_from(data, None, mask), tmp_path / "old.pt")
    assert rule_of(trainer_from(data, own, mask)) == "real"  # it is of today
    change(own, lambda state: state["cfg"]["model"].pop("moe_pad_rule"))
    assert rule_of(trainer_from(data, own, mask)) == rule
    for overrides, expected in (({}, rule), ({"moe_pad_rule": "real"}, "real")):
        (model,), _, _ = checkpoint_utils.load_model_ensemble_and_task(
            [str(own)], {"data": data, **overrides}
        )
        assert model.decoder.pad_rule.rule == expected
