"""The command's help and its examples."""

import logging
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

import fairseq_moe_command as front
from fairseq_moe_ext import cli

ROOT = Path(front.__file__).parent


def run(*words):
    """What the command prints, and what it has imported of what takes long."""
    code = "import sys, fairseq_moe_command as c\ntry: c.main(sys.argv[1:])\nfinally:"
    code += " print([m for m in ('torch', 'fairseq', 'numpy') if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code, *words],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["user-dir"], ["config-dir"]])
def test_these_need_neither_torch_nor_fairseq(words):
    started = time.monotonic()
    *printed, imported = run(*words)
    assert time.monotonic() - started < 5, "0.1 s where nothing else runs"
    assert imported == "[]"
    expected = {
        "--help": "usage: fairseq-moe",
        "--version": "fairseq-moe 0.",
        "user-dir": str(ROOT / "fairseq_moe_ext"),
        "config-dir": str(ROOT / "hydra_conf"),
    }
    assert printed[0].startswith(expected[words[0]])
    if words == ["--help"]:
        assert all(any(line.split()[:1] == [name] for line in printed) for name in front.COMMANDS)


@pytest.mark.parametrize("name", front.COMMANDS)
def test_examples_are_command_lines_that_hold(name, capsys):
    assert len(front.examples(name)) >= 2
    if name == front.LM_EVAL:
        return
    with pytest.raises(SystemExit) as stop:
        cli.main([name, "--help"])
    shown = capsys.readouterr().out
    assert stop.value.code == 0
    for example in front.examples(name):
        assert example in shown
        words = shlex.split(example.split(">")[0])[1:]
        assert cli.parser_of(name).parse_args(words).run


@pytest.mark.parametrize("name", [name for name in front.COMMANDS if name != front.LM_EVAL])
def test_an_example_lacks_nothing_but_its_files(name, capsys, tmp_path, monkeypatch):
    """In an empty folder each runs, or stops at its first file."""
    monkeypatch.chdir(tmp_path)
    for example in front.examples(name):
        status = cli.main(shlex.split(example.split(">")[0])[1:])
        errors = capsys.readouterr().err
        assert status == 0 or re.search("[Nn]o such (file|folder|checkpoint)", errors), errors


def test_nobody_is_asked_for_tensorboard():
    import logging

    assert not logging.getLogger("fairseq.tasks.text_to_speech").isEnabledFor(logging.INFO)


def test_no_news_of_fairseq_while_a_command_runs(monkeypatch):
    """It would print all settings of every model that is loaded; afterwards it is as before."""
    logger = logging.getLogger("fairseq.models.fairseq_model")
    seen = []

    def run(args):
        seen.append(logger.isEnabledFor(logging.INFO))

    monkeypatch.setattr("fairseq_moe_ext.patch_list.run", run)
    monkeypatch.setattr(logging.getLogger("fairseq"), "level", logging.INFO)
    assert cli.main(["patches"]) == 0 and seen == [False]
    assert logging.getLogger("fairseq").level == logging.INFO


@pytest.mark.parametrize("words", ["--help", "patches", "cost --paper"])
def test_a_reader_that_has_enough_gets_no_traceback(words):
    """As of `fairseq-moe patches | head -1`; with a pipe that nobody reads from the start."""
    code = "import sys, fairseq_moe_command as c; sys.exit(c.main(sys.argv[1:]))"
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-c", code, *words.split()],
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
        # as a training with workers leaves it (fairseq/data/iterators.py)
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "PYTHONWARNINGS": "ignore:semaphore_tracker:UserWarning",
        },
        timeout=60,
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    "words, shell, status, err",
    [
        ("--version", ">&-", 0, ""),
        ("user-dir", ">&- 2>&-", 0, ""),
        ("user-dir", ">/dev/full", 1, "error: stdout: cannot be written"),
    ],
)
def test_a_stdout_that_takes_nothing(words, shell, status, err):
    code = "import sys, fairseq_moe_command as c; sys.exit(c.main(sys.argv[1:]))"
    done = subprocess.run(
        f"{shlex.quote(sys.executable)} -c '{code}' {words} {shell}",
        shell=True,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=60,
    )
    assert done.returncode == status and done.stderr.count("\n") == status
    assert done.stderr.startswith(err)


def test_an_interrupt_while_torch_is_imported_is_one_word(monkeypatch, capsys):
    def interrupted(argv):
        raise KeyboardInterrupt

    monkeypatch.setattr(front, "_run", interrupted)
    assert front.main(["show", "x.pt"]) == 130
    assert capsys.readouterr().err == "interrupted\n"
