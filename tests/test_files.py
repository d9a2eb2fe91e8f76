"""What a command is told to read is a regular file: nothing waits for a FIFO, in no command."""

import os
import subprocess
import sys

import pytest

from fairseq_moe_ext import cli, files
from fairseq_moe_ext.errors import UserError


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("fifo")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dict.txt").write_text("0 1\n", encoding="utf-8")
    return tmp_path


LINES = [
    "evaluate fifo --path x.pt",
    "evaluate data --path fifo",
    "priming fifo --path x.pt --data data",
    "priming data --path fifo --data data",
    "priming data --path x.pt --data fifo",
    "study fifo",
    "report fifo",
    "report . --expert-use fifo",
    "report . --fine-tuning=fifo",
    "convert fifo new.pt",
    "cost --path fifo",
    "prepare new --corpus a=data/dict.txt --gpt2-encoder-json fifo --gpt2-vocab-bpe x",
    "prepare new --corpus a=data/dict.txt --gpt2-encoder-json x --gpt2-vocab-bpe fifo",
    "prepare new --corpus a=fifo --train-bpe 300",
    "prepare fifo --corpus a=data/dict.txt --train-bpe 300",
]


@pytest.mark.parametrize("line", LINES)
@pytest.mark.parametrize("name", ["fifo", "device"])
def test_no_command_waits_for_a_fifo_or_a_device(place, device, capsys, line, name):
    kind = "a FIFO (named pipe)" if name == "fifo" else "a device"
    name = {"fifo": name, "device": device}[name]
    line = line.replace("fifo", name)
    assert cli.main(line.split()) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert f"{name}: {kind}, not a f" in error


@pytest.mark.parametrize("line", LINES)
def test_a_name_that_is_too_long_is_one_line(place, capsys, line):
    assert cli.main(line.replace("fifo", "x" * 300).split()) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if " file of " not in line]
    assert len(errors) == 1 and errors[0].startswith("error: ")


def test_a_name_that_is_no_utf8_can_be_printed(place):
    """In a process of its own, whose output is strict."""
    name = b"\xff"
    command = [sys.executable, "-m", "fairseq_moe_ext.cli", "prepare", name]
    (place / "a.txt").write_text("text\n\n" * 9, encoding="utf-8")
    command += ["--corpus", "a:train=a.txt", "--train-bpe", "257", "--workers", "1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "\\udcff: written in" in done.stdout


@pytest.mark.parametrize(
    "content, message",
    [
        (b"\xff\xfe{\0}\0", r"not UTF-8 at byte 0 \(0xff\)"),
        (b"{", "not JSON: "),
        (b"[" * 100_000, "not JSON: nested too deep"),
        (b'["\\ud800"]', "not JSON: half of a surrogate pair"),
        (b'{"\\udfff": 1}', "not JSON: half of a surrogate pair"),
        (b"9" * 5000, "" if sys.version_info < (3, 11) else "not JSON: "),
    ],
)
def test_json_that_is_none_is_one_line(tmp_path, content, message):
    (tmp_path / "a.json").write_bytes(content)
    if message:
        with pytest.raises(UserError, match=f"a.json: {message}"):
            files.read_json(tmp_path / "a.json")
    (tmp_path / "a.json").write_bytes(b'["\\ud83d\\ude00"]\r\n')
    assert files.read_json(tmp_path / "a.json") == ["😀"]


def test_what_cannot_be_opened_is_named(tmp_path):
    for name, message in (
        ("none", "No such file"),
        ("x" * 300, "File name too long"),
        ("a\0b", "null"),
    ):
        with pytest.raises(UserError, match=message):
            files.read_text(tmp_path / name)
    with pytest.raises(UserError, match="--dict .*: a folder, not a file"):
        files.read_text(tmp_path, f"--dict {tmp_path}")


@pytest.mark.parametrize("read", [files.check, files.read_text, files.read_json])
def test_what_cannot_be_read_has_a_remedy(place, read):
    with pytest.raises(UserError, match="none: cannot be read .*; name a file that is there and"):
        read("none")


def test_a_remedy_of_its_own_replaces_it(place):
    with pytest.raises(UserError, match=r"none: cannot be read \(No such .*\): make it$"):
        files.read_json("none", remedy="make it")


@pytest.mark.parametrize(
    "line",
    [
        "evaluate data --path {}",
        "generate {} text",
        "generate --path {} text",
        "inspect {} --data data --text text",
        "cost --path {}",
        "show {}",
        "convert {} new.pt",
    ],
)
def test_a_folder_is_no_checkpoint(place, line, capsys):
    """It is there, so nobody is told to check the path, but what to name instead."""
    for folder in ("runs", "hf", "empty"):
        (place / folder).mkdir()
    (place / "hf" / "config.json").touch()
    for name in ("checkpoint_1_5.pt", "checkpoint_best.pt"):
        (place / "runs" / name).touch()
    (place / "text").touch()
    for folder, words in {
        "runs": "runs: is a folder: name a checkpoint in it: checkpoint_best.pt, checkpoint_1_5.pt",
        "hf": "convert it first, with `fairseq-moe convert hf model.pt --from hf`",
        "empty": "empty: is a folder: it has no *.pt; name a checkpoint",
    }.items():
        assert cli.main(line.format(folder).split()) == 1
        err = capsys.readouterr().err
        assert words in err and err.count("\n") == 1
