"""Data and a model by stock fairseq, and its commands in this process."""

import sys

import pytest
from stock_commands import TRAIN, run, succeeded


@pytest.fixture(scope="session")
def work(tmp_path_factory):
    """A folder with a data-bin `bin`, made by fairseq-preprocess with two workers."""
    folder = tmp_path_factory.mktemp("work")
    for split, lines in (("train", 120), ("valid", 20), ("test", 10)):
        text = [" ".join(f"w{(3 * i + j) % 23}" for j in range(5 + i % 7)) for i in range(lines)]
        (folder / f"{split}.txt").write_text("\n".join(text) + "\n")
    files = "--trainpref train.txt --validpref valid.txt --testpref test.txt"
    succeeded(run(f"fairseq-preprocess --only-source {files} --destdir bin --workers 2", folder))
    return folder


@pytest.fixture(scope="session")
def trained(work):
    """The same folder with checkpoints of three updates in `ck`."""
    result = run(f"fairseq-train bin {TRAIN} --max-update 3 --save-dir ck", work)
    assert "num_updates 3" in succeeded(result)
    return result


@pytest.fixture
def command(monkeypatch, work, capsys):
    """Run a command of fairseq within this process; its status, and what it wrote to stderr."""

    def call(name, line):
        module = __import__(f"fairseq_cli.{name}", fromlist=["cli_main"])
        monkeypatch.setattr(sys, "argv", [f"fairseq-{name}", *line.split()])
        monkeypatch.chdir(work)
        capsys.readouterr()
        try:
            module.cli_main()
            status = 0
        except SystemExit as stop:
            status = stop.code
        return status, capsys.readouterr().err

    return call
