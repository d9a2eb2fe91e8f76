"""Data, a trained model, and fairseq's commands in this process."""

import sys

import pytest
from command_runs import MOE, TRAIN
from fairseq.data import Dictionary, indexed_dataset


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A data-bin of 40 sentences over 20 words, each word likely followed by the next one."""
    folder = tmp_path_factory.mktemp("data")
    dictionary = Dictionary()
    for i in range(20):
        dictionary.add_symbol(f"w{i}", n=100 - i)
    dictionary.save(str(folder / "dict.txt"))
    for split, sentences in (("train", 40), ("valid", 10)):
        writer = indexed_dataset.make_builder(str(folder / f"{split}.bin"), "mmap", len(dictionary))
        for i in range(sentences):
            words = " ".join(f"w{(i + j) % 20}" for j in range(9))
            writer.add_item(dictionary.encode_line(words, add_if_not_exist=False))
        writer.finalize(str(folder / f"{split}.idx"))
    return folder


@pytest.fixture
def command(monkeypatch, caplog, capsys):
    """Run a command of fairseq in this process; its log and status."""

    def run(name, line):
        module = __import__(f"fairseq_cli.{name}", fromlist=["cli_main"])
        monkeypatch.setattr(sys, "argv", [f"fairseq-{name}", *line.split()])
        caplog.clear()
        with caplog.at_level("INFO"):
            try:
                module.cli_main()
                status = 0
            except SystemExit as stop:
                status = stop.code or 0
        out, err = capsys.readouterr()
        return status, caplog.text, out, err

    return run


@pytest.fixture(scope="session")
def trained(data, tmp_path_factory):
    """A folder with checkpoints of a small MoE model."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            sys, "argv", f"fairseq-train {data} {TRAIN} {MOE} --save-dir {folder}".split()
        )
        __import__("fairseq_cli.train", fromlist=["cli_main"]).cli_main()
    return folder
