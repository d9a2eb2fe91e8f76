"""`fairseq-moe generate`: prompts in, text out, and the tokenizer that travels with the model."""

import io
import json
import shutil
import sys
from argparse import Namespace

import pytest
import torch
from fairseq.tasks import TASK_DATACLASS_REGISTRY
from training import prepare_text, train_small

from fairseq_moe_ext import cli, outputs, tokenizer_files
from fairseq_moe_ext.errors import UserError
from fairseq_moe_ext.evaluation.loading import language_modeling_task, load_model
from fairseq_moe_ext.generate import command as generating
from fairseq_moe_ext.generate import prompts as reading
from fairseq_moe_ext.models.language_model import MoETransformerLanguageModel

TEXT = "the cat sat on the mat\nand saw a dog\n\n" * 20


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with data/, and two models in moe/ and dense/."""
    folder = tmp_path_factory.mktemp("generate")
    data = prepare_text(folder, TEXT)
    for name, flags in (("moe", "--moe-freq 2 --moe-expert-count 2"), ("dense", "--moe-freq 0")):
        flags += " --task mixture_language_modeling --max-update 20"
        train_small(data, folder / name, flags)
    return folder


@pytest.fixture(scope="module")
def lm(runs):
    return MoETransformerLanguageModel.from_pretrained(str(runs / "moe"), "checkpoint_last.pt")


@pytest.fixture
def generate(runs, capsys, monkeypatch):
    """Arguments, and what stdin has -> stdout and stderr."""

    def command(*arguments, stdin=None, status=0, path=runs / "moe" / "checkpoint_last.pt"):
        data = stdin if isinstance(stdin, bytes) else (stdin or "").encode()
        source = io.TextIOWrapper(io.BytesIO(data), encoding="utf-8")
        source.isatty = lambda: stdin is None
        monkeypatch.setattr(sys, "stdin", source)
        words = ["generate", *([str(path)] if path else []), "--cpu", *map(str, arguments)]
        assert cli.main(words) == status
        return capsys.readouterr()

    return command


def test_too_many_tokens_are_refused_before_the_weights_are_read(runs, generate, monkeypatch):
    monkeypatch.setattr(generating, "load", lambda *_: pytest.fail("read"))
    path = runs / "moe" / "checkpoint_last.pt"
    for flags in ((), ("--interactive",), ("--side-by-side", path)):
        prompt = ["the"] * ("--interactive" not in flags)
        (error,) = generate(*prompt, *flags, "--max-tokens", 64, status=1).err.splitlines()
        assert error == (
            f"error: --max-tokens 64: {path} takes 32 tokens, those of the prompt included; "
            "lower it"
        )


def test_a_text_from_its_beginning_may_have_all_tokens_of_the_context(generate):
    assert generate("", "--max-tokens", 32).out
    assert "--max-tokens 33: " in generate("", "--max-tokens", 33, status=1).err


@pytest.mark.parametrize("task", ["mixture_language_modeling", "language_modeling"])
def test_a_folder_that_fairseq_takes_for_two_is_named(runs, generate, tmp_path, task, capsys):
    """A run, or data, of before such names were refused."""
    shutil.copytree(runs / "moe", tmp_path / "co:lon")
    shutil.copytree(runs / "data", tmp_path / "da:ta")
    path = tmp_path / "co:lon" / "checkpoint_last.pt"
    state = torch.load(path, weights_only=True)
    known = TASK_DATACLASS_REGISTRY[task].__dataclass_fields__
    settings = {k: v for k, v in state["cfg"]["task"].items() if k in known}
    state["cfg"]["task"] = {**settings, "_name": task}
    torch.save(state, path)
    for folder, flags in (("co:lon", ()), ("da:ta", ("--data", tmp_path / "da:ta"))):
        (error,) = generate("the", *flags, path=path, status=1).err.splitlines()
        assert error.startswith(f"error: {tmp_path / folder}: ':' separates paths in fairseq")
    assert generate("the", "--data", runs / "data", "--max-tokens", 2, path=path).out
    assert cli.main(["evaluate", str(tmp_path / "da:ta"), "--path", str(path), "--cpu"]) == 1
    assert "da:ta/a: ':' separates paths in fairseq" in capsys.readouterr().err


def test_a_prompt_of_any_source(runs, generate, lm, tmp_path):
    prompt = "the cat\nand"
    text = prompt + lm.generate(prompt, max_tokens=6) + "\n"
    (tmp_path / "one.txt").write_text("\ufeff" + prompt + "\n")
    for arguments, stdin in (
        ((prompt,), None),
        (("--path", runs / "moe" / "checkpoint_last.pt", "--file", tmp_path / "one.txt"), None),
        ((), prompt + "\n"),
        ((), "\ufeff" + prompt.replace("\n", "\r") + "\r"),  # as files are read
        (("--file", "-"), prompt),
    ):
        path = {"path": None} if "--path" in arguments else {}
        out, err = generate(*arguments, "--max-tokens", 6, stdin=stdin, **path)
        assert out == text
        assert err.startswith("6 tokens in ") and err.rstrip().endswith("tokens/s")
    assert generate(prompt, "--max-tokens", 6, "--no-prompt").out == text[len(prompt) :]


def test_prompts_of_a_file(generate, lm, tmp_path):
    prompts = ["the cat", "a\ndog\u2028", ""]
    (tmp_path / "p.txt").write_text("the cat\n%\na\ndog\u2028\n%\n")
    (tmp_path / "p.jsonl").write_text(
        '\ufeff"the cat"\n{"prompt": "a\\ndog\u2028"}\n \n{"text": ""}\n'
    )
    (tmp_path / "q.JSONL").write_bytes((tmp_path / "p.jsonl").read_bytes())
    expected = lm.generate(prompts, max_tokens=5)
    for name, more in (("p.txt", ["--separator", "%"]), ("p.jsonl", []), ("q.JSONL", [])):
        out = tmp_path / f"{name}.json"
        flags = ("--max-tokens", 5, "--json", out)
        printed = generate("--file", tmp_path / name, *more, *flags).out
        found = json.loads(out.read_text())
        assert [one["prompt"] for one in found] == prompts
        assert [one["texts"] for one in found] == [[text] for text in expected]
        assert f"── prompt 2 of 3 ──\na\ndog\u2028{expected[1]}\n" in printed


@pytest.mark.parametrize(
    "text, expected",
    [
        ('{"prompt": "the"}\n{"text": "a"}\n', ["the", "a"]),
        ('{"other": "the"}\n', ['{"other": "the"}']),
        ('{"text":\n', ['{"text":']),
    ],
)
def test_a_json_file_is_json_lines_if_its_first_line_is(tmp_path, text, expected):
    (tmp_path / "a.json").write_text(text)
    assert reading.read([], [tmp_path / "a.json"], None) == expected


def test_a_line_without_a_prompt_names_each_form_of_one(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"other": "the"}\n')
    with pytest.raises(UserError) as error:
        reading.read([], [path], None)
    begin, _, forms = str(error.value).partition("no prompt; write ")
    assert begin == f"--file {path}, line 1: "
    path.write_text("\n".join(forms.replace(" or ", ", ").split(", ")))
    assert reading.read([], [path], None) == ["..."] * 3


def test_texts_are_shown_although_their_file_cannot_be_written(generate, monkeypatch, tmp_path):
    def fails(path, content):
        raise UserError(f"--json {path}: no space")

    monkeypatch.setattr(outputs, "write_json", fails)
    out, err = generate("a", "the", "--max-tokens", 3, "--json", tmp_path / "x.json", status=1)
    assert "prompt 2 of 2" in out and "x.json: no space" in err


def test_samples_are_repeated_by_their_seed(generate, lm):
    out, err = generate("the", "--n", 2, "--top-p", 0.9, "--max-tokens", 5)
    seed = err.split("--seed ")[1].strip()
    same = generate("the", "--n", 2, "--top-p", 0.9, "--max-tokens", 5, "--seed", seed)
    assert same.out == out and "--seed" not in same.err
    for text in lm.generate("the", n=2, top_p=0.9, max_tokens=5, seed=int(seed)):
        assert f"──\nthe{text}\n" in out
    newline = generate("the", "--stop", r"\n", "--max-tokens", 20).out
    assert newline == "the" + lm.generate("the", stop="\n", max_tokens=20) + "\n"


def test_two_models_side_by_side(runs, generate, lm, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    other = runs / "dense" / "checkpoint_last.pt"
    out, err = generate("the cat", "--side-by-side", other, "--max-tokens", 12)
    dense = MoETransformerLanguageModel.from_pretrained(str(other.parent), other.name)
    rows = [row.partition("│") for row in out.splitlines()]
    assert all(middle for _, middle, _ in rows) and max(map(len, out.splitlines())) <= 60
    for model, column in ((lm, 0), (dense, 2)):
        words = "".join(row[column].strip() for row in rows)
        whole = "the cat" + model.generate("the cat", max_tokens=12)
        assert words.replace(" ", "").endswith("".join(whole.split()))
    assert err.count("12 tokens in") == 2 and str(other) in err


def test_a_session_remembers(generate, lm):
    out, err = generate(
        "-i", "--max-tokens", 4, stdin="\ufeffthe cat\n\na \\\ndog\n/new\nthe\n/quit\n"
    )
    first = lm.generate("the cat", max_tokens=4)
    second = lm.generate("the cat" + first, max_tokens=4)
    so_far = "the cat" + first + second
    line = ("" if so_far.endswith("\n") else "\n") + "a \ndog"
    third = lm.generate(so_far + line, max_tokens=4)
    fresh = lm.generate("the", max_tokens=4)
    assert out == f"{first}\n{second}\n{third}\n{fresh}\n"
    assert err.startswith("16 tokens in ")


def test_a_session_does_not_repeat_its_draws_and_prints_its_seed(generate, lm):
    flags = ("-i", "--max-tokens", 8, "--temperature", 2)
    lines = "the cat\n/new\nthe cat\n/new\nthe cat\n"
    out, err = generate(*flags, stdin=lines)
    again = generate(*flags, "--seed", err.split("--seed ")[1].strip(), stdin=lines)
    assert again.out == out and "--seed" not in again.err
    out = generate(*flags, "--seed", 1, stdin=lines).out
    first = lm.generate("the cat", max_tokens=8, temperature=2, seed=1)
    assert out.startswith(first + "\n") and out.count(first) == 1
    assert "--seed" not in generate("-i", "--max-tokens", 2, stdin="the cat\n").err


def test_a_session_that_no_longer_fits_loses_its_beginning(generate):
    out, err = generate("-i", "--max-tokens", 8, stdin="the cat sat\n" * 6)
    assert out.count("\n") >= 6 and "no longer fit" in err


def test_the_tokenizer_travels_with_the_model(runs, generate, tmp_path, capsys):
    """Beside the checkpoint; of one alone where it was trained; digests tell those of others."""
    names = set(tokenizer_files.NAMES)
    moe = runs / "moe"
    assert all((moe / n).read_bytes() == (runs / "data" / n).read_bytes() for n in names)
    saved = torch.load(moe / "checkpoint_last.pt", weights_only=True)["task_state"]["tokenizer"]
    assert saved == tokenizer_files.digests(runs / "data") and saved.keys() == names

    shutil.copy(moe / "checkpoint_last.pt", tmp_path / "alone.pt")
    expected = generate("the cat", "--max-tokens", 6).out
    alone = {"path": tmp_path / "alone.pt"}
    assert generate("the cat", "--max-tokens", 6, **alone).out == expected

    for name in names:
        shutil.copy(moe / name, tmp_path)
    (tmp_path / "vocab.bpe").write_text("#version: 0.2\n")
    assert generate("the cat", "--max-tokens", 6, **alone).out == expected, "that beside is not it"
    with pytest.raises(UserError, match="vocab.bpe: does not belong to the tokenizer of"):
        MoETransformerLanguageModel.from_pretrained(str(moe), "checkpoint_last.pt", str(tmp_path))
    bpe = ("--gpt2-encoder-json", moe / "encoder.json", "--gpt2-vocab-bpe", moe / "vocab.bpe")
    flags = ("--max-tokens", 6, "--data", tmp_path, *bpe)
    assert generate("the cat", *flags, **alone).out == expected

    bpe = ("--gpt2-encoder-json", moe / "encoder.json", "--gpt2-vocab-bpe", tmp_path / "vocab.bpe")
    err = generate("the cat", *bpe, status=1, **alone).err
    assert "vocab.bpe: does not belong to the tokenizer of" in err and "or leave out bpe" in err
    given = {"gpt2_encoder_json": moe / "encoder.json", "gpt2_vocab_bpe": tmp_path / "vocab.bpe"}
    task = language_modeling_task(runs / "data", 1)
    load_model(tmp_path / "alone.pt", task)
    with pytest.raises(UserError, match="alone.pt .*: give the model's own file"):
        task.build_bpe(Namespace(_name="gpt2", **given))  # as fairseq-interactive does

    (tmp_path / "to").mkdir()
    assert cli.main(["convert", str(tmp_path / "alone.pt"), str(tmp_path / "to" / "x.pt")]) == 0
    assert names <= {path.name for path in (tmp_path / "to").iterdir()}
    capsys.readouterr()
    assert generate("the cat", "--max-tokens", 6, path=tmp_path / "to" / "x.pt").out == expected


def test_other_bpe_is_refused_where_text_is_encoded(runs, tmp_path, capsys):
    """With the model's dict.txt, which has the ids of the BPE alone."""
    data, path = tmp_path / "data", runs / "moe" / "checkpoint_last.pt"
    data.mkdir()
    for name in tokenizer_files.NAMES:
        shutil.copy(runs / "data" / name, data)
    first, *merges = (data / "vocab.bpe").read_text().splitlines()
    (data / "vocab.bpe").write_text("\n".join([first, *reversed(merges)]) + "\n")
    (tmp_path / "tasks" / "copa").mkdir(parents=True)
    (tmp_path / "my.txt").write_text("the cat sat on the mat " * 9)
    for line in (
        f"generate the --path {path}",
        f"priming {tmp_path}/tasks --path {path}",
        f"inspect {path} --text {tmp_path}/my.txt --page {tmp_path}/p.html",
        f"inspect {runs}/moe/checkpoint_best.pt --compare {path} --text {tmp_path}/my.txt",
        f"convert --to hf {path} {tmp_path}/hf",
    ):
        assert cli.main(f"{line} --data {data}".split()) == 1, line
        (error,) = capsys.readouterr().err.splitlines()
        assert error.startswith(f"error: {data}/vocab.bpe: does not belong to the tokenizer of")
    task = language_modeling_task(data, 1)
    load_model(path, task)  # as generate does, which may be given the model's BPE
    with pytest.raises(UserError, match="vocab.bpe: does not belong"):
        task.build_bpe(Namespace(_name=None))  # as fairseq-interactive does


def test_an_old_checkpoint_takes_flags(runs, generate, tmp_path):
    """One without digests, whose data folder is gone."""
    state = torch.load(runs / "moe" / "checkpoint_last.pt", weights_only=True)
    del state["task_state"]["tokenizer"]
    state["cfg"]["task"]["data"] = "/nowhere"
    torch.save(state, tmp_path / "old.pt")
    old = {"path": tmp_path / "old.pt"}
    err = generate("the cat", status=1, **old).err
    assert "old.pt: its tokenizer (dict.txt, encoder.json, vocab.bpe) is neither" in err
    expected = generate("the cat", "--max-tokens", 6).out
    data = runs / "data"
    assert generate("the cat", "--max-tokens", 6, "--data", data, **old).out == expected
    (tmp_path / "words").mkdir()
    shutil.copy(data / "dict.txt", tmp_path / "words")
    bpe = ("--gpt2-encoder-json", data / "encoder.json", "--gpt2-vocab-bpe", data / "vocab.bpe")
    flags = ("--max-tokens", 6, "--data", tmp_path / "words", "--bpe", "gpt2", *bpe)
    assert generate("the cat", *flags, **old).out == expected


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], 'no prompt given: pass one ("" for a text from its beginning), or use --file FILE'),
        (["a", "--file", "none.txt"], "--file none.txt: cannot be read"),
        (["a", "--top-p", "2"], "--top-p 2.0: use a probability"),
        (["a cat", "--max-tokens", "31"], "--max-tokens 31: prompt 1 of 1 has "),
        (["a", "--beams", "2", "--temperature", "1"], "--beams 2: a beam search takes"),
        (["-i", "a"], "--interactive: cannot be combined with a prompt"),
        (["-i", "--side-by-side", "x.pt"], "cannot be combined with --side-by-side"),
        (["a", "--side-by-side", "x.pt"], "x.pt: no such checkpoint"),
        (["a", "--data", "nowhere"], "--data nowhere: contains no dict.txt"),
        (["a", "--bpe", "gpt2"], "--bpe gpt2: no installed package brings"),
        (["a", "--gpt2-vocab-bpe", "x"], "go together: give both"),
        (["a", "--overwrite"], "--overwrite: without --json"),
        (["a", "--model-overrides", "{"], "use a Python dictionary"),
        (["a", "--model-overrides", "{[]: 1}"], "use a Python dictionary"),
        (["a", "--model-overrides", "{1: 2}"], "use a Python dictionary"),
        (["a", "--separator", "%"], "--separator: separates prompts"),
        (["--separator", "%", "--file", "a.jsonl"], "--separator: separates prompts"),
        (["-i", "--separator", "%"], "cannot be combined with --separator"),
        (["-i", "--no-prompt"], "cannot be combined with --no-prompt"),
        (["a", "--json", "no/x.json"], "no folder no"),
        (["a\udcff"], ": not UTF-8; convert it"),
        (["木" * 3 + "the " * 40], "but the model takes 31"),
    ],
)
def test_a_mistake_is_one_line(generate, monkeypatch, tmp_path, arguments, words):
    monkeypatch.chdir(tmp_path)
    out, err = generate(*arguments, status=1)
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and words in err, err
    assert list(tmp_path.iterdir()) == []


def test_files_that_are_none(generate, tmp_path):
    (tmp_path / "x.jsonl").write_text('"a"\n3\n')
    (tmp_path / "bytes").write_bytes(b"a\xff")
    folder = {"path": tmp_path}
    assert "is a folder" in generate("a", status=1, **folder).err
    missing = {"path": tmp_path / "x.pt"}
    assert "no such checkpoint" in generate("a", status=1, **missing).err
    assert "x.jsonl, line 2: no prompt" in generate("-f", tmp_path / "x.jsonl", status=1).err
    (tmp_path / "empty.txt").touch()
    assert "empty.txt is empty: pass" in generate("-f", tmp_path / "empty.txt", status=1).err
    assert "no prompt given: stdin is empty: pass one" in generate(stdin="", status=1).err
    assert generate("", "--max-tokens", 2).out  # a text from its beginning
    assert "not UTF-8 at byte 1" in generate("-f", tmp_path / "bytes", status=1).err
    assert "no model given" in generate(status=1, path=None).err


def test_a_session_without_text(generate, monkeypatch, runs, capsys):
    assert "error: stdin: not UTF-8" in generate("-i", stdin=b"caf\xe9\n", status=1).err
    monkeypatch.setattr(sys, "stdin", None)  # as by `<&-`
    assert cli.main(["generate", str(runs / "moe" / "checkpoint_last.pt"), "-i"]) == 1
    assert "error: --interactive: stdin is closed" in capsys.readouterr().err
