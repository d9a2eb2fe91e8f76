"""Our models within lm-eval: its requests against plain loops, its scores against our rules."""

import contextlib
import functools
import json
import math
import os
from unittest.mock import patch

import numpy as np
import pytest
import torch
from processes import run_processes

from fairseq_moe_ext import cli
from fairseq_moe_ext.errors import UserError
from fairseq_moe_ext.models import search
from fairseq_moe_ext.priming import choice, lm_eval_command, lm_eval_device
from fairseq_moe_ext.priming.model import ModelScorer
from fairseq_moe_ext.questions.formats import Item
from fairseq_moe_ext.questions.vocabulary import EOS, PAD

QUESTIONS = [
    {"q": "w1 it was.\nw2 it", "choices": ["was.", "w3 it was w4.", "it"], "label": 1},
    {"q": "w5 it was", "choices": ["w6 it", "was.", "w7 it was w8 it was."], "label": 0},
    {"q": "it was.\n\nw9", "choices": ["it was w1.", "w2.", "was it"], "label": 2},
    {"q": "w10 it was w11", "choices": ["it was.", "w12", "w1 w1 w1"], "label": 0},
]
TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
output_type: {kind}
test_split: test
doc_to_text: "{{{{q}}}}"
{rest}
"""
CHOICE = """
doc_to_choice: "{{choices}}"
doc_to_target: "{{label}}"
metric_list:
  - metric: acc
  - metric: acc_norm
  - metric: acc_mutual_info
"""
ROLLING = """
doc_to_target: "{{q}}"
metric_list:
  - metric: byte_perplexity
"""


def test_without_lm_eval_there_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(lm_eval_command.importlib.util, "find_spec", lambda name: None)
    assert cli.main(["lm-eval", "--tasks", "piqa"]) == 1
    err = capsys.readouterr().err
    assert 'lm-eval is not installed: run pip install "lm-eval>=0.4.13,<0.5"' in err


@pytest.fixture(scope="module")
def lm(trained):
    """The model in float64, in lm-eval's hands."""
    pytest.importorskip("lm_eval", reason="the extra lm-eval is not installed")
    from fairseq_moe_ext.priming.harness import FairseqMoELM

    data, checkpoint = trained
    made = FairseqMoELM(str(checkpoint), str(data), batch_size=2, device="cpu")
    made.model.double()
    return made


def request(*args):
    from lm_eval.api.instance import Instance

    return Instance(request_type="", doc={}, arguments=args, idx=0)


def log_probs(lm, tokens, before=EOS):
    """(V,) after one token, </s> unless another is given, and the tokens."""
    with torch.no_grad():
        logits = lm.model(torch.tensor([[before, *tokens]]))[0][0, -1]
    return torch.log_softmax(logits, 0)


PAIRS = [
    ("w1 it", " was."),
    ("w1 it was.\n", "w2 it"),  # the newline goes with the continuation
    ("w1 it was.\n\nw2", " it\nwas"),
    ("w3 \n ", "it was"),
    ("w3 ", "it was"),  # the space is the word's
    ("", "w4 it"),
    ("", "\nw4"),
    ("w5", ""),
    ("w6 it was. " * 40, "w7 it"),  # longer than the context
    ("w8 it wa", "s"),  # as many tokens without the continuation
    ("w9 w1 it wa", "s"),
]


def test_loglikelihood_equals_a_plain_loop(lm, capsys):
    encode = lm.vocabulary.encode
    got = lm.loglikelihood([request(*pair) for pair in PAIRS])
    assert f"1 of {len(PAIRS)} requests do not fit into the context" in capsys.readouterr().err
    assert encode("\n") == [EOS]
    swallowed = 0
    for (context, continuation), (nats, greedy) in zip(PAIRS, got):
        whole = encode(context + continuation)
        wanted = len(whole) - len(encode(context.rstrip()))
        swallowed += wanted <= 0 < len(continuation)
        wanted = max(wanted, min(1, len(continuation)))
        before = [EOS, *whole][: -lm.context] or [EOS]
        whole = whole[-lm.context :]
        expected, likeliest = 0.0, True
        for i in range(len(whole) - wanted, len(whole)):
            found = log_probs(lm, whole[:i], before[-1])
            expected += float(found[whole[i]])
            likeliest &= int(found.argmax()) == whole[i]
        assert nats == pytest.approx(expected, rel=1e-9, abs=1e-12)
        assert greedy == likeliest
    assert swallowed == 2 and got[7] == (0.0, True)


def test_rolling_equals_a_plain_loop(lm):
    texts = ["w1 it was.\nw2 it", "it was.\n" * 70, ""]
    got = lm.loglikelihood_rolling([request(text) for text in texts])
    size = lm.context
    for text, nats in zip(texts, got):
        stream = [EOS, *lm.vocabulary.encode(text)]  # token i + 1 follows stream[..i]
        expected = 0.0
        count = len(stream) - 1
        for i in range(count):
            first = i // size * size  # of the block; the last one reaches back to be a whole one
            if first + size > count:
                first = max(0, count - size)
            with torch.no_grad():
                logits = lm.model(torch.tensor([stream[first : i + 1]]))[0][0, -1]
            expected += float(torch.log_softmax(logits, 0)[stream[i + 1]])
        assert nats == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_generation_stops_where_it_is_told(lm, capsys):
    decode, encode = lm.vocabulary.decode, lm.vocabulary.encode

    def plain(prompt, until, count):
        tokens = encode(prompt)[-(lm.context - count) :]
        new = []
        while len(new) < count and not any(stop in decode(new) for stop in [*until, "\n\n"]):
            found = log_probs(lm, [*tokens, *new])
            found[PAD] = -math.inf
            new.append(int(found.argmax()))
        text = decode(new)
        for stop in [*until, "\n\n"]:
            text = text.split(stop)[0]
        return text

    cases = [
        ("w1 it was.\nw2", ["\n"], 12),
        ("w3 it", [" ", "w"], 12),
        ("w4", ["never this"], 20),
        ("it was. " * 50, ["."], 7),
    ]
    requests = [request(p, {"until": until, "max_gen_toks": n}) for p, until, n in cases]
    assert lm.generate_until(requests) == [plain(*case) for case in cases]
    assert "1 of 4 requests do not fit into the context" in capsys.readouterr().err


def test_generation_writes_text_only(lm, monkeypatch):
    """Also where <s> and <unk> are the likeliest tokens."""
    requests = [request("w1 it was", {"until": ["."], "max_gen_toks": 8})]
    before, logits = lm.generate_until(requests), search.exact_logits
    likely = torch.tensor([lm.model.decoder.dictionary.bos(), lm.model.decoder.dictionary.unk()])
    monkeypatch.setattr(search, "exact_logits", lambda *of: logits(*of).index_fill_(1, likely, 1e4))
    assert all(before) and lm.generate_until(requests) == before


def test_sampling_and_a_full_context_are_refused(lm):
    from fairseq_moe_ext.errors import UserError

    with pytest.raises(UserError, match="do_sample"):
        lm.generate_until([request("w1", {"do_sample": True, "temperature": 0.7})])
    with pytest.raises(UserError, match="max_gen_toks 64: leaves no room"):
        lm.generate_until([request("w1", {"max_gen_toks": 64})])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two tasks of lm-eval and their data, all local."""
    path = tmp_path_factory.mktemp("lm_eval_tasks")
    lines = "".join(json.dumps(line) + "\n" for line in QUESTIONS)
    (path / "questions.jsonl").write_text(lines)
    for name, kind, rest in (
        ("local_choice", "multiple_choice", CHOICE),
        ("local_rolling", "loglikelihood_rolling", ROLLING),
    ):
        text = TASK.format(name=name, kind=kind, rest=rest, file=path / "questions.jsonl")
        (path / f"{name}.yaml").write_text(text)
    return path


def test_common_rules_equal_lm_evals(lm, folder):
    import lm_eval
    from lm_eval.tasks import TaskManager

    results = lm_eval.simple_evaluate(
        model=lm,
        tasks=["local_choice"],
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        log_samples=True,
        bootstrap_iters=0,
    )
    figures = results["results"]["local_choice"]
    items = [
        Item(
            tuple(f"{line['q']} {word}" for word in line["choices"]),
            frozenset({line["label"]}),
            tuple(f" {word}" for word in line["choices"]),  # after nothing
        )
        for line in QUESTIONS
    ]
    questions = choice.in_tokens(items, lm.vocabulary.encode)
    scorer = ModelScorer(lm.model, 100)
    for rule, metric in (("sum", "acc,none"), ("unconditional", "acc_mutual_info,none")):
        base = choice.baselines(rule, questions, scorer, lm.context)
        outcome = choice.answer(rule, questions, base, [], scorer, lm.context)
        assert outcome.accuracy == figures[metric]

    found = choice.scores("sum", [q.candidates for q in questions], scorer, lm.context)
    means = choice.scores("mean", [q.candidates for q in questions], scorer, lm.context)
    for line, sums, mean in zip(QUESTIONS, found, means):
        (sample,) = [s for s in results["samples"]["local_choice"] if s["doc"]["q"] == line["q"]]
        theirs = np.array([float(one[0][0]) for one in sample["resps"][:3]])
        np.testing.assert_allclose(theirs - theirs[0], sums - sums[0], rtol=1e-8, atol=1e-10)
        rows = [lm.vocabulary.encode(f"{line['q']} {word}") for word in line["choices"]]
        context = len(lm.vocabulary.encode(line["q"]))
        if choice.rows_of("mean", [tuple(row) for row in rows])[0].start == context:
            lengths = [len(row) - context for row in rows]
            np.testing.assert_allclose(theirs / lengths, mean, rtol=1e-8)


@contextlib.contextmanager
def nothing_but_local():
    """No network, and no search through lm-eval's own thousands of task files, which takes long."""
    import lm_eval.tasks

    local = functools.partial(lm_eval.tasks.TaskManager, include_defaults=False)
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    with patch("lm_eval.tasks.TaskManager", local), patch.dict(os.environ, offline):
        yield


def run_command(rank, words, out):
    with nothing_but_local():
        assert cli.main([*words, "--output_path", str(out)]) == 0
    files = list(out.rglob("results_*.json")) if rank == 0 else []
    return [json.loads(file.read_text())["results"] for file in files]


def test_the_command_on_one_process_and_two(trained, folder, tmp_path, capsys):
    pytest.importorskip("lm_eval", reason="the extra lm-eval is not installed")
    data, checkpoint = trained
    words = ["lm-eval", "--model_args", f"path={checkpoint},data={data}", "--device", "cpu"]
    words += ["--tasks", "local_choice,local_rolling", "--include_path", str(folder)]
    words += ["--batch_size", "2"]
    (one,) = run_command(0, words, tmp_path / "one")
    printed = capsys.readouterr().out
    assert "local_choice" in printed and "acc_mutual_info" in printed
    (two,), nothing = run_processes(2, run_command, words, tmp_path / "two")
    assert nothing == [] and set(two) == {"local_choice", "local_rolling"}
    for name in two:
        numbers = {key: value for key, value in one[name].items() if isinstance(value, float)}
        assert numbers
        for key, number in numbers.items():
            assert two[name][key] == pytest.approx(number, rel=1e-5), key


@pytest.mark.parametrize(
    "flags, on_cpu", [("--device=cpu", True), ("--device cpu", True), ("--device cuda", False)]
)
def test_processes_join_for_the_device_of_the_command_line(flags, on_cpu, monkeypatch):
    pytest.importorskip("lm_eval", reason="the extra lm-eval is not installed")
    joined = []

    def processes(cpu, on_a_cpu):
        joined.append(cpu)
        raise UserError("enough")

    monkeypatch.setattr(lm_eval_command.model, "processes", processes)
    assert cli.main(["lm-eval", "--tasks", "cpu", *flags.split()]) == 1
    assert joined == [on_cpu]


@pytest.mark.parametrize(
    "device, gpus, words",
    [
        ("cuda:1", 2, "--device cuda:1: use cpu, or cuda; CUDA_VISIBLE_DEVICES=N chooses one"),
        ("mps", 0, "--device mps: use cpu, or cuda"),
        ("cuda", 0, "--device cuda: there is no GPU here; use cpu"),
    ],
)
def test_a_device_that_would_not_be_used_is_an_error(device, gpus, words, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    with pytest.raises(UserError, match=words):
        lm_eval_device.is_cpu(device)


@pytest.mark.parametrize("processes, gpus", [(1, 0), (1, 1), (2, 0), (2, 2)])
def test_lm_evals_default_is_any_device(processes, gpus, monkeypatch):
    """It says cuda:0 where the command line says nothing."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(lm_eval_device, "process_count", lambda: processes)
    assert not lm_eval_device.is_cpu("cuda:0")


def test_mistakes(trained, folder, capsys):
    pytest.importorskip("lm_eval", reason="the extra lm-eval is not installed")
    data, checkpoint = trained
    tasks = ["--tasks", "local_choice", "--include_path", str(folder), "--device", "cpu"]
    for args, words in (
        (f"path=no.pt,data={data}", "--path no.pt: no such checkpoint"),
        (f"path={checkpoint},data={folder}", f"data {folder}: contains no dict.txt"),
        (f"path={checkpoint},data={data},context=65", "--context 65: the model takes 64 at most"),
        (f"path={checkpoint},context=1k", "--model_args context=1k: use a whole number"),
        (f"path={checkpoint},dtype=bfloat16", "--model_args dtype=bfloat16: no such setting; use"),
        (f"path={checkpoint},fp16=1", "--model_args fp16=1: use True or False"),
        (f"path={checkpoint},user_dir=none", "--user-dir none: no such folder"),
        (f"data={data}", "--model_args: names no checkpoint; add path="),
    ):
        with nothing_but_local():
            assert cli.main(["lm-eval", "--model_args", args, *tasks]) == 1
        last = capsys.readouterr().err.strip().splitlines()[-1]
        assert last.startswith("error: ") and words in last
