"""Search through the cache, in batches and on processes, against a search that knows none."""

import json
import math

import pytest
import sacrebleu
import torch
from processes import run_processes
from small_models import MOE, VOCABULARY, build_model

from fairseq_moe_ext import cli
from fairseq_moe_ext.errors import UserError
from fairseq_moe_ext.models import search as search_module
from fairseq_moe_ext.models.search import Generator, Prompt
from fairseq_moe_ext.prepare.dictionary import UNK
from fairseq_moe_ext.priming import generative, model
from fairseq_moe_ext.priming.model import load
from fairseq_moe_ext.priming.protocol import Settings
from fairseq_moe_ext.questions.vocabulary import EOS, PAD, Vocabulary

BOS = 0
MODELS = {"dense": {}, "moe": dict(MOE, moe_dropless=True)}


def at_a_small_token(new):
    return new[-1] < 10


def never(new):
    return False


def prompts():
    """Of many lengths, one empty, one with newlines in it."""
    found = [
        Prompt(tuple(range(11, 11 + length)), 9, at_a_small_token) for length in (7, 0, 3, 12, 1)
    ]
    return [*found, Prompt((12, EOS, 13, EOS), 5, never), Prompt((30, 20), 1, never)]


def plain_search(model, prompt, beam):
    """All hypotheses' next tokens by whole forward passes, in lists."""
    live, ended = [(0.0, ())], []
    while live and len(ended) < beam:
        longer = []
        for score, new in live:
            with torch.no_grad():
                logits = model(torch.tensor([[EOS, *prompt.tokens, *new]]))[0][0, -1]
            logits[PAD] = -math.inf
            log_probs = torch.log_softmax(logits, 0).tolist()
            longer += [(score + log_probs[t], (*new, t)) for t in range(VOCABULARY)]
        longer.sort(reverse=True)
        live = []
        for rank, (score, new) in enumerate(longer[: 2 * beam if beam > 1 else 1]):
            if prompt.done(new) or len(new) == prompt.max_new:
                if rank < beam:
                    ended.append((score, new))
            elif len(live) < beam:
                live.append((score, new))
    return list(max(ended, key=lambda one: one[0] / len(one[1]))[1])


def search(rank, flags, beam, batch_tokens):
    model = build_model(**flags).double().eval()
    return Generator(model, beam, batch_tokens)(prompts())


@pytest.mark.parametrize("beam", [1, 3])
@pytest.mark.parametrize("kind", MODELS)
def test_search_equals_a_plain_one(kind, beam):
    model = build_model(**MODELS[kind]).double().eval()
    expected = [plain_search(model, prompt, beam) for prompt in prompts()]
    assert len({len(new) for new in expected}) > 2, "they end at different steps"
    for batch_tokens in (1, 60, 10_000):
        assert search(0, MODELS[kind], beam, batch_tokens) == expected


@pytest.mark.parametrize("beam", [1, 2])
def test_two_processes_equal_one(beam):
    one = search(0, MODELS["moe"], beam, 40)
    assert run_processes(2, search, MODELS["moe"], beam, 40) == [one, one]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "translation").mkdir()
    for split, count in (("dev", 6), ("devtest", 3)):
        for language, word in (("eng", "w"), ("fra", "it was ")):
            lines = "".join(f"{word}{i}.\n" for i in range(count))
            (tmp_path / "translation" / f"{language}.{split}").write_text(lines)
    (tmp_path / "summarization").mkdir()
    cnn = {"article": "w1 it\nwas.", "highlights": "w1\nwas.", "id": "1"}
    xsum = {"document": "w2 it was.", "summary": "w2 was."}
    lines = json.dumps(cnn) + "\n" + json.dumps(xsum) + "\n"
    (tmp_path / "summarization" / "test.jsonl").write_text(lines)
    return tmp_path


def test_prompts(folder):
    settings = Settings(languages=("eng", "fra"))
    found = generative.read_translation(folder / "translation", settings, 0)
    assert found[1] == generative.Text("w1. =", " it was 1.")
    assert len(generative.read_translation(folder / "translation", settings, 1)) == 6
    found = generative.read_summarization(folder / "summarization", settings, 0)
    assert found == [
        generative.Text("w1 it was.\nTL;DR:", " w1 was."),
        generative.Text("w2 it was.\nTL;DR:", " w2 was."),
    ]


def command(trained, folder, flags, out):
    data, checkpoint = trained
    line = f"priming {folder} --path {checkpoint} --data {data} --cpu --json {out} {flags}"
    return cli.main(line.split())


def test_the_command(trained, folder, tmp_path, capsys):
    out = tmp_path / "out.json"
    flags = "--languages eng-fra --max-new-tokens 8 --shots 0,2,6 --draws 2 --tasks translation"
    assert command(trained, folder, flags, out) == 0
    zero, two, six = json.loads(out.read_text())["results"]
    printed = capsys.readouterr()
    references = [f"it was {i}." for i in range(3)]
    bleu = sacrebleu.metrics.BLEU()
    score = bleu.corpus_score(zero["answers"], [references]).score
    assert zero["scores"]["BLEU"]["mean"] == pytest.approx(score)
    assert zero["scores"]["BLEU"]["spread"] is None and two["scores"]["BLEU"]["spread"] is not None
    signature = str(bleu.get_signature())
    assert f"BLEU: {signature}" in printed.out and "tok:13a" in signature
    assert "chrF2: " in printed.out
    assert 0 < six["left_out"] < 6
    assert "translation, 6 shots: in 6 of 6 prompts, 2 of 6 examples were left" in printed.err

    data, checkpoint = trained
    vocabulary = Vocabulary(data)
    prompt = Prompt(tuple(vocabulary.encode("w0. =")), 8, lambda new: new[-1] == EOS)
    new = Generator(load(checkpoint, data, cpu=True), 1, 100)([prompt])[0]
    assert zero["answers"][0] == vocabulary.decode(new).strip()


def test_a_beam_and_summaries(trained, folder, tmp_path, capsys):
    out = tmp_path / "out.json"
    flags = "--tasks summarization --max-new-tokens 5 --beam 2"
    assert command(trained, folder, flags, out) == 0
    (found,) = json.loads(out.read_text())["results"]
    assert found["beam"] == 2 and len(found["answers"]) == 2
    assert "summarization" in capsys.readouterr().out


def test_only_text_is_written(trained, folder, tmp_path, monkeypatch):
    """A model to which <s> and <unk> are the likeliest tokens writes the best of the others."""
    flags = "--languages eng-fra --max-new-tokens 8 --shots 0 --beam 2"
    flags += " --tasks translation,summarization"

    def answers(out):
        assert command(trained, folder, flags, tmp_path / out) == 0
        return [one["answers"] for one in json.loads((tmp_path / out).read_text())["results"]]

    before, logits = answers("before.json"), search_module.exact_logits
    likely = torch.tensor([BOS, UNK])
    monkeypatch.setattr(
        search_module, "exact_logits", lambda *of: logits(*of).index_fill_(1, likely, 1e4)
    )
    assert answers("after.json") == before
    assert not any("<unk>" in answer for task in before for answer in task)


@pytest.mark.parametrize(
    "flags, words",
    [
        (
            "--tasks translation",
            "--languages: translation needs them, for example --languages en-fr",
        ),
        ("--languages en", "--languages en: use two with a dash between"),
        ("--languages eng-deu", "test.deu: missing; get it from a test set of two text files"),
        ("--languages eng-fra --shots 7", "has 6 examples to draw from; use fewer"),
        ("--languages eng-fra --beam 0", "--beam 0: use a whole number from 1 to 1,024"),
        ("--languages eng-fra --max-new-tokens 64", "leaves no room for a prompt"),
    ],
)
def test_mistakes(trained, folder, tmp_path, flags, words, capsys):
    assert command(trained, folder, flags, tmp_path / "out.json") == 1
    assert words in capsys.readouterr().err


def test_too_long_answers_are_refused_before_the_weights_are_read(
    trained, folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(model, "load_in_context", lambda *_: pytest.fail("read"))
    flags = "--languages eng-fra --max-new-tokens 64"
    assert command(trained, folder, flags, tmp_path / "out.json") == 1
    assert "--max-new-tokens 64: leaves no room for a prompt" in capsys.readouterr().err


def test_files_that_do_not_belong_together(folder):
    path = folder / "translation" / "fra.devtest"
    path.write_text("one line\n")
    with pytest.raises(UserError, match="fra.devtest 1: they must be translations"):
        generative.read_translation(folder / "translation", Settings(languages=("eng", "fra")), 0)


def test_blank_lines_and_empty_files(folder):
    def read():
        languages = Settings(languages=("eng", "fra"))
        texts = generative.read_translation(folder / "translation", languages, 0)
        return [text.prompt for text in texts]

    english, french = (folder / "translation" / f"{name}.devtest" for name in ("eng", "fra"))
    english.write_bytes(b"\xef\xbb\xbfw1\r\n\r\nw2\r\n")
    french.write_bytes(b"it 1\n \nit 2\n\n")
    assert read() == ["w1 =", "w2 ="]
    french.write_bytes(b"it 1\nit\nit 2\n")
    with pytest.raises(UserError, match="eng.devtest, line 2: blank, but not in the other"):
        read()
    for path in (english, french):
        path.write_bytes(b"\n")
    with pytest.raises(UserError, match="eng.devtest: contains no sentence"):
        read()
    french.write_bytes(b"\xff\n")
    with pytest.raises(UserError, match="fra.devtest: not UTF-8"):
        read()
