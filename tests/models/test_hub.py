"""`from_pretrained`: text to scores and to text, with the tokenizer in the data's folder."""

from copy import deepcopy

import pytest
import torch
from fairseq import checkpoint_utils, hub_utils
from training import USER_DIR, fairseq, prepare_text, train_small

from fairseq_moe_ext.errors import UserError
from fairseq_moe_ext.models import precision
from fairseq_moe_ext.models.language_model import MoETransformerLanguageModel
from fairseq_moe_ext.questions.vocabulary import Vocabulary

TEXT = "the cat sat on the mat\nand saw a dog\n\n" * 20
SHAPE = "--decoder-layers 2 --decoder-embed-dim 16 --decoder-ffn-embed-dim 16"
SHAPE += " --decoder-attention-heads 2 --moe-freq 2 --moe-expert-count 2"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A prepared corpus `a` in `data`, and a model in `run`."""
    folder = tmp_path_factory.mktemp("hub")
    flags = "--task language_modeling --moe-freq 2 --moe-expert-count 2 --max-update 5 --lr 0.01"
    train_small(prepare_text(folder, TEXT) / "a", folder / "run", flags)
    return folder


@pytest.fixture(scope="module")
def lm(folder):
    return load(folder, folder / "data")


def load(folder, data):
    return MoETransformerLanguageModel.from_pretrained(
        str(folder / "run"), "checkpoint_last.pt", str(data)
    )


@pytest.mark.parametrize("text", ["the cat", "the cat\nsat", "cat\n", " a  b\n\nc ", "é 木\n\n"])
def test_scores_are_those_of_the_tokens(folder, lm, text):
    """The model's log-probability of each token, as priming encodes the text: newlines are </s>."""
    tokens = Vocabulary(folder / "data").encode(text)
    assert lm.encode(text).tolist() == [*tokens, 2]
    assert lm.decode(lm.encode(text)) == text
    with torch.no_grad():
        scores = lm.models[0](torch.tensor([[2, *tokens[:-1]]]))[0].log_softmax(-1)[0]
    expected = scores[torch.arange(len(tokens)), torch.tensor(tokens)]
    for found in (lm.score(text), lm.score(["the", text, "a dog sat"])[1]):
        torch.testing.assert_close(found["positional_scores"], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("adds_bos, first", [(False, 2), (True, 0)])
def test_texts_begin_with_the_token_that_training_put_before_them(lm, monkeypatch, adds_bos, first):
    """Scored or generated."""
    cfg = deepcopy(lm.cfg)
    cfg.task.add_bos_token = adds_bos
    monkeypatch.setattr(lm, "cfg", cfg)

    def scores(tokens):
        with torch.no_grad():
            return lm.models[0](torch.tensor([[first, *tokens]]))[0].log_softmax(-1)[0]

    tokens = lm.encode("the cat sat").tolist()[:-1]
    expected = scores(tokens[:-1])[torch.arange(len(tokens)), torch.tensor(tokens)]
    found = lm.score("the cat sat")["positional_scores"]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    started = []
    hook = lm.models[0].decoder.register_forward_pre_hook(
        lambda _, given: started.append(int(given[0][0, 0]))
    )
    lm.generate("the cat", max_tokens=2)
    hook.remove()
    assert started[0] == lm.first_token == first


def test_a_training_with_bf16_is_no_wish_for_it_today(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(precision, "bfloat16_pays", lambda: True)
    state = torch.load(folder / "run" / "checkpoint_last.pt", weights_only=True)
    for group in ("common", "model"):
        state["cfg"][group]["bf16"] = True
    torch.save(state, tmp_path / "x.pt")
    for wish in ({}, {"bf16": True}):
        model = MoETransformerLanguageModel.from_pretrained(
            str(tmp_path), "x.pt", str(folder / "data"), **wish
        ).models[0]
        assert model.decoder.bfloat16_on_cpu is bool(wish)
        loaded = hub_utils.from_pretrained(str(tmp_path), "x.pt", str(folder / "data"), **wish)
        hub = hub_utils.GeneratorHubInterface(loaded["args"], loaded["task"], loaded["models"])
        assert hub.models[0].decoder.bfloat16_on_cpu is bool(wish)


def test_the_tokenizer_is_found_in_the_corpus_above_it_and_by_a_relative_path(folder, lm):
    for data in (folder / "data" / "a", "../data"):
        same = load(folder, data)
        assert torch.equal(same.encode("the cat sat"), lm.encode("the cat sat"))


def test_prompts_go_on_behind_their_newlines(lm):
    """Greedily, token by token, until </s>."""
    prompts = ["the cat", "", "the\ncat", "the cat\n"]
    for prompt, text in zip(prompts, lm.sample(prompts, beam=1, max_len_b=12)):
        tokens = lm.encode(prompt).tolist()[:-1]
        while len(tokens) < 12:
            with torch.no_grad():
                scores = lm.models[0](torch.tensor([[2, *tokens]]))[0][0, -1]
            scores[1] = -torch.inf  # no padding
            if not tokens:
                scores[2] = -torch.inf  # --min-len 1
            tokens.append(int(scores.argmax()))
            if tokens[-1] == 2:
                tokens.pop()
                break
        assert text == lm.decode([*tokens, 2]) and text.startswith(prompt)
    assert lm.sample(prompts, beam=3, max_len_b=12)[2].startswith("the\ncat")
    assert lm.sample([]) == lm.score([]) == []


def test_text_that_cannot_be_scored_is_reported(folder, lm, caplog):
    for texts, words in (
        ("", "text is empty"),
        (["a", " \t"], "text 2 of 2 is empty"),
        (["a", "the " * 40], "text 2 of 2 has 41 tokens; the model takes 31"),
    ):
        with pytest.raises(UserError, match=words):
            lm.score(texts)
    with pytest.raises(UserError, match="beam 0 is out of range"):
        lm.sample("a", beam=0)
    (folder / "words").mkdir()
    (folder / "words" / "dict.txt").write_bytes((folder / "data" / "dict.txt").read_bytes())
    without = load(folder, folder / "words")
    for call in (without.score, without.sample):
        with pytest.raises(UserError, match="contains only <unk>; there is no encoder.json"):
            call("the cat")
    word = without.src_dict[4]
    caplog.clear()  # of what loading told, where an earlier test has set the level to INFO
    without.encode(f"{word} " * 10 + "cat")
    assert not caplog.messages
    for _ in "ab":
        without.encode(f"{word} cat")
    assert len(caplog.messages) == 1 and "1 of its 2 words are not in the" in caplog.messages[0]


@pytest.mark.parametrize("flags", ["", "--bpe gpt2"])
def test_interactive_takes_the_same_tokenizer(folder, lm, monkeypatch, capsys, flags):
    (folder / "input").write_text("the cat\n" + "the " * 40 + "\ndog\n")
    monkeypatch.setattr(
        checkpoint_utils, "load_model_ensemble", lambda *args, **kwargs: (list(lm.models), None)
    )
    line = f"fairseq-interactive {folder / 'data' / 'a'} --task language_modeling --path x.pt"
    line += f" --beam 1 --max-len-b 12 --input {folder / 'input'} --user-dir {USER_DIR}"
    fairseq(f"{line} --cpu {flags}")
    out, err = capsys.readouterr()
    found = {row.split("\t")[0]: row.split("\t")[-1] for row in out.splitlines()}
    assert found["D-0"] == lm.sample("the cat", beam=1, max_len_b=12)
    assert found["D-2"] == lm.sample("dog", beam=1, max_len_b=12)
    assert "error: line 2 is left out: 41 tokens; the model takes 32" in err and "D-1" not in found
