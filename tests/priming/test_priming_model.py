"""Scores in batches and on processes against one row at a time, in float64."""

import numpy as np
import pytest
import torch
from processes import run_processes
from small_models import MOE, VOCABULARY, build_model, build_stock_model

from fairseq_moe_ext.errors import UserError
from fairseq_moe_ext.models import precision
from fairseq_moe_ext.priming.model import ModelScorer, load, processes
from fairseq_moe_ext.questions.scoring import Row
from fairseq_moe_ext.questions.vocabulary import EOS, Vocabulary

MODELS = {"dense": {}, "moe": dict(MOE, moe_dropless=True)}


def rows():
    rng = np.random.default_rng(0)
    found = []
    for length in (5, 1, 9, 9, 2, 17, 30, 3):
        tokens = tuple(rng.integers(4, VOCABULARY, length).tolist())
        found.append(Row(tokens, int(rng.integers(length))))
    found.append(Row((7, EOS, 8, EOS), 0))  # newlines are scored, and seen, as any token
    before = (9, 5, EOS, 6, EOS)
    found += [Row((*before, *row.tokens), 5 + row.start, 5) for row in found]  # after examples
    found += [Row((5, 6, 7), 2, 2), Row((5, 6, 8, 9), 2, 2), Row((8, 8, 7), 1, 1)]
    found += [Row((5, 6, 7), 2, 2, follows=9), Row((5, 6, 8, 9), 0, follows=9)]
    return found


def plain_loop(model):
    """One row, one token at a time."""
    found = []
    for tokens, start, _, follows in rows():
        nats = []
        for i in range(start, len(tokens)):
            with torch.no_grad():
                logits = model(torch.tensor([[follows, *tokens[:i]]]))[0][0, -1].double()
            nats.append(float(torch.log_softmax(logits, 0)[tokens[i]]))
        found.append(np.array(nats))
    return found


def scores(rank, flags, batch_tokens):
    model = build_model(**flags).double().eval()
    return ModelScorer(model, batch_tokens)(rows())


@pytest.mark.parametrize("batch_tokens", [1, 20, 10_000])
@pytest.mark.parametrize("kind", MODELS)
def test_batches_equal_a_plain_loop(kind, batch_tokens):
    expected = plain_loop(build_model(**MODELS[kind]).double().eval())
    for got, want in zip(scores(0, MODELS[kind], batch_tokens), expected):
        np.testing.assert_allclose(got, want, rtol=1e-9)


@pytest.mark.parametrize(
    "flags",
    [
        {},
        MODELS["moe"],
        # Layers that sum losses and figures over processes wait for each other in each pass.
        {**MODELS["moe"], "moe_routing_scope": "world"},
        {**MODELS["moe"], "moe_balance_over": "global_batch"},
    ],
    ids=["dense", "moe", "world", "global_batch"],
)
def test_two_processes_equal_one(flags):
    """Some steps have rows with and without shared tokens, the last has none on one process."""
    one = scores(0, flags, 20)
    for process in run_processes(2, scores, flags, 20):
        for got, want in zip(process, one):
            np.testing.assert_allclose(got, want, rtol=1e-9)


def test_more_processes_than_gpus_are_an_error(monkeypatch):
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    words = "LOCAL_RANK 1: this process sees only 1 GPU; start one process for each, or add --cpu"
    with pytest.raises(UserError, match=words), processes(cpu=False):
        pass


def test_the_loss_of_logits_in_chunks(monkeypatch):
    whole = scores(0, {}, 100)
    monkeypatch.setattr("fairseq_moe_ext.models.token_scores.LOGITS_AT_A_TIME", 3 * VOCABULARY)
    for got, want in zip(scores(0, {}, 100), whole):
        np.testing.assert_allclose(got, want, rtol=1e-9)


def test_nothing_is_dropped_whatever_the_checkpoint_says(trained):
    data, checkpoint = trained
    overrides = "{'moe_eval_capacity_token_fraction': 0.01}"
    model = load(checkpoint, data, cpu=True, overrides=overrides)
    assert model.decoder.layers[1].moe_layer.gate.settings.dropless
    alone = ModelScorer(model, 1)(rows_in(data))
    together = ModelScorer(model, 1000)(rows_in(data))
    for a, b in zip(alone, together):
        np.testing.assert_allclose(a, b, rtol=1e-4)


def test_bfloat16_moves_scores_by_its_rounding(trained, monkeypatch):
    data, checkpoint = trained
    monkeypatch.setattr(precision, "bfloat16_pays", lambda: True)
    found = {}
    for bf16 in (False, True):
        model = load(checkpoint, data, cpu=True, bf16=bf16)
        assert next(model.parameters()).dtype == torch.float32
        found[bf16] = np.concatenate(ModelScorer(model, 1000)(rows_in(data)))
    assert not np.array_equal(found[True], found[False])
    # Seven roundings a layer and one of the logits, each by 2**-9 at most.
    bound = (7 * len(model.decoder.layers) + 1) * 2**-9
    np.testing.assert_allclose(found[True], found[False], rtol=bound)
    with pytest.raises(UserError, match="--fp16 with --bf16"):
        load(checkpoint, data, cpu=True, fp16=True, bf16=True)


def test_a_model_of_fairseqs_own_is_refused(trained, monkeypatch):
    from fairseq import checkpoint_utils

    stock = [build_stock_model()], None
    monkeypatch.setattr(checkpoint_utils, "load_model_ensemble", lambda *args, **kwargs: stock)
    with pytest.raises(UserError, match="TransformerLanguageModel of fairseq's own; convert it"):
        load(trained[1], trained[0], cpu=True)


def rows_in(data):
    vocabulary = Vocabulary(data)
    texts = ("w1 it was.\nw2 it was.", "w3 it", "it was. " * 5)
    return [Row(tuple(vocabulary.encode(text)), 0) for text in texts]


def test_text_to_tokens_and_back(trained):
    vocabulary = Vocabulary(trained[0])
    text = "w1 it was.\n\n Größe\t日本 \n"
    tokens = vocabulary.encode(text)
    assert vocabulary.decode(tokens) == text
    assert tokens.count(EOS) == 3 and tokens[-1] == EOS
    halves = [vocabulary.encode(part) for part in text.split("\n")]
    assert tokens == [*halves[0], EOS, *halves[1], EOS, *halves[2], EOS, *halves[3]]


def test_tokens_are_those_of_the_data_bin(trained):
    from fairseq.data import indexed_dataset

    data, _ = trained
    stored = np.concatenate(list(indexed_dataset.MMapIndexedDataset(str(data / "c" / "valid"))))
    text = (data.parent / "valid.txt").read_text()
    assert Vocabulary(data).encode(text.rstrip("\n") + "\n") == stored.tolist()


def test_a_tokenizer_that_does_not_fit(trained, tmp_path):
    data, _ = trained
    for name in ("encoder.json", "vocab.bpe"):
        (tmp_path / name).write_bytes((data / name).read_bytes())
    with pytest.raises(UserError, match=r"dict.txt: missing; --data needs dict.txt, encoder.json"):
        Vocabulary(tmp_path)
    lines = (data / "dict.txt").read_text().splitlines()
    (tmp_path / "dict.txt").write_text("\n".join([*lines, "70000 1"]) + "\n")
    with pytest.raises(UserError, match=r"dict.txt, line \d+: BPE id 70000, but the tokenizer has"):
        Vocabulary(tmp_path)
    (tmp_path / "dict.txt").write_text("5 1\nmadeupword0000 0\n")
    vocabulary = Vocabulary(tmp_path)
    with pytest.raises(UserError, match=r"100% of the tokens of f.jsonl are not in its dict.txt"):
        vocabulary.check([vocabulary.encode("w1 it was")], "f.jsonl")
    (tmp_path / "vocab.bpe").unlink()
    with pytest.raises(UserError, match=r"vocab.bpe: missing"):
        Vocabulary(tmp_path)


def test_the_likeliest_tokens_are_known():
    model = build_model(**MODELS["moe"]).double().eval()
    tokens = [7, 8]
    for _ in range(4):
        with torch.no_grad():
            tokens.append(int(model(torch.tensor([[EOS, *tokens]]))[0][0, -1].argmax()))
    other = 5 if tokens[4] != 5 else 6
    rows = [Row(tuple(tokens), 2), Row((*tokens[:4], other, tokens[5]), 2)]
    (_, all_of_them), (_, some) = ModelScorer(model, 100).with_likeliest(rows)
    assert all_of_them.tolist() == [True] * 4
    assert some.tolist()[:3] == [True, True, False]
