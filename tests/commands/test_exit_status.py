"""Programs end with a status and at most one line: commands, and the programs of the examples."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fairseq_moe_ext import cli
from fairseq_moe_ext.errors import UserError, less_memory, program_status, status_of

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = [
    path for path in sorted((ROOT / "examples").glob("*/*.py")) if "__main__" in path.read_text()
]


def raising(error):
    def work():
        raise error

    return work


@pytest.mark.parametrize(
    "work, status, line",
    [
        (lambda: None, 0, ""),
        (lambda: 3, 3, ""),
        (raising(UserError("--jobs 0: use 1 or more")), 1, "error: --jobs 0: use 1 or more\n"),
        (lambda: open("/nowhere/x"), 1, "error: /nowhere/x: No such file or directory\n"),
        (raising(KeyboardInterrupt()), 130, "Stopped.\n"),
    ],
)
@pytest.mark.parametrize("of", [status_of, program_status])
def test_a_status_and_a_line(of, work, status, line, capsys):
    assert of(work, "Stopped.") == status
    assert capsys.readouterr().err == line


def test_a_lack_of_memory_names_the_flags_of_the_command(monkeypatch, capsys):
    run = "fairseq_moe_ext.evaluation.evaluate_command.run"
    monkeypatch.setattr(run, lambda args: torch.empty(10**15, dtype=torch.float32))
    assert cli.main(["evaluate", "data", "--path", "x.pt"]) == 1
    line = "error: out of memory, 4000000000000000 bytes were requested: lower --batch-size or "
    line += "--context, or leave the experts of a sparse model on disk: --model-overrides "
    assert capsys.readouterr().err == line + "\"{'moe_experts_on_disk': True}\"\n"
    assert status_of(
        raising(torch.cuda.OutOfMemoryError("Tried to allocate 2.00 GiB. out of memory"))
    )
    words = "out of memory, 2.00 GiB were requested: use a smaller model"
    assert capsys.readouterr().err == f"error: {words}\n"
    assert less_memory(["--a", "--b", "--c"]) == "lower --a, --b or --c, or use a smaller model"


def test_without_words_an_interrupt_prints_nothing(capsys):
    assert program_status(raising(KeyboardInterrupt())) == 130
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    "error", [OSError(12, "Cannot allocate memory"), ValueError("x"), RuntimeError("x")]
)
def test_what_is_no_mistake_of_the_user_keeps_its_traceback(error):
    with pytest.raises(type(error)):
        program_status(raising(error))


@pytest.mark.parametrize("file", PROGRAMS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_program_of_the_examples_ends_so(file):
    (main,) = (
        node
        for node in ast.parse(file.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef) and node.name == "main"
    )
    assert "program_status(" in ast.unparse(main)
    assert not any(isinstance(node, ast.ExceptHandler) and node.name for node in ast.walk(main))


def test_a_program_whose_reader_goes_away_ends_without_a_word():
    """As of `ladder.py ladder.yaml --needed | head -1`, for short output and long."""
    code = "import sys; from fairseq_moe_ext.errors import program_status\n"
    code += "sys.exit(program_status(lambda: print('x' * int(sys.argv[1]))))"
    for length in ("5", "99999"):
        reading, writing = os.pipe()
        os.close(reading)
        done = subprocess.run(
            [sys.executable, "-c", code, length],
            stdout=writing,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            timeout=60,
        )
        os.close(writing)
        assert (done.returncode, done.stderr) == (1, "")
