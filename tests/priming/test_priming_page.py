"""The commands of docs/priming.md, as they stand there, on files of every task."""

import json
import os
import re
import shlex
from pathlib import Path

import pytest
from bias_files import CROWS, STEREOSET
from processes import run_processes
from task_files import CASES, write

from fairseq_moe_ext import cli
from fairseq_moe_ext.priming import bias, generative
from fairseq_moe_ext.questions import formats
from fairseq_moe_ext.questions.scoring import RULES

PAGE = (Path(__file__).parents[2] / "docs" / "priming.md").read_text(encoding="utf-8")
TORCHRUN = ["torchrun", "--nproc_per_node", "2", "$(which fairseq-moe)"]


def commands():
    """Words of each command, line by line of the page's blocks; lm-eval's is not ours to run."""
    blocks = re.findall(r"^```text\n(.*?)^```", PAGE, flags=re.M | re.S)
    lines = "".join(blocks).replace("\\\n", "").splitlines()
    return [words for words in map(shlex.split, lines) if words[1] != "lm-eval"]


@pytest.fixture(scope="module")
def folder(trained, tmp_path_factory):
    """A folder with the tasks, the data and the checkpoint that the page speaks of."""
    data, checkpoint = trained
    path = tmp_path_factory.mktemp("page")
    (path / "runs" / "moe").mkdir(parents=True)
    (path / "data").symlink_to(data)
    (path / "runs" / "moe" / "checkpoint_best.pt").symlink_to(checkpoint)
    for name, (files, _) in CASES.items():
        write(path / "tasks" / name, files)
    for name in ("winogrande", "storycloze", "openbookqa"):
        task = formats.TASKS[name]
        (content,) = CASES[name][0].values()
        lines = content.splitlines(keepends=True)
        head = lines[:1] if name == "storycloze" else []
        write(path / "tasks" / name, {task.examples[0]: "".join(head + lines[-1:] * 100)})
    write(path / "tasks" / "stereoset", {"dev.json": json.dumps(STEREOSET)})
    write(path / "tasks" / "crows_pairs", {"crows_pairs_anonymized.csv": CROWS})
    for language in ("eng", "fra"):
        write(path / "tasks" / "translation", {f"{language}.devtest": "w1 it was.\nw2\n"})
    text = '{"document": "w1 it was.", "summary": "w1."}\n'
    write(path / "tasks" / "summarization", {"test.jsonl": text})
    return path


def in_folder(rank, folder, words):
    before = os.getcwd()
    os.chdir(folder)
    try:
        return cli.main(words)
    finally:
        os.chdir(before)


def test_the_page_has_commands():
    found = commands()
    assert len(found) >= 4 and sum(words[:4] == TORCHRUN for words in found) == 1


@pytest.mark.parametrize("number", range(len(commands())))
def test_commands(number, folder, capsys):
    words = commands()[number]
    if words[:4] == TORCHRUN:
        assert run_processes(2, in_folder, folder, words[4:]) == [0, 0]
        return
    assert words[0] == "fairseq-moe"
    assert in_folder(0, folder, words[1:]) == 0
    printed = capsys.readouterr().out
    wanted = words[words.index("--tasks") + 1].split(",") if "--tasks" in words else CASES
    assert all(re.search(rf"^{name}\b", printed, flags=re.M) for name in wanted)


def test_the_page_names_every_task_and_rule():
    for name in [*formats.TASKS, *bias.FILES, *generative.NAMES, *RULES]:
        assert f"`{name}`" in PAGE, name
    for task in formats.TASKS.values():
        row = re.search(rf"^\| `{task.name}` \|.*$", PAGE, flags=re.M).group(0)
        assert f"| {task.rule} |" in row
