"""A folder with all that good command lines name, and files that are something else."""

import hashlib
import os
import shlex
from pathlib import Path

from choice_data import write_choices
from command_lines import GOOD, filled
from forked_commands import PACKAGE
from mixture_data import make_data
from study_results import STUDY, made_result
from task_files import CASES, write

TASKS = ("sst2", "copa", "winogrande")


def make(root: Path, commands, device: str) -> dict:
    """Makes it in a new folder -> paths by name; `device` is one of them."""
    (root / "text").mkdir(parents=True)
    data = make_data(root / "data", root / "text")
    (root / "choices").mkdir()
    write_choices(root / "choices")
    for name in TASKS:
        write(root / "tasks" / name, CASES[name][0])
    rows = "".join(f"w{i} it was\t{i % 2}\n" for i in range(9))
    write(root / "tasks" / "sst2", {"SST-2/train.tsv": "sentence\tlabel\n" + rows})
    (root / "prompts").write_text("the big1\nof\n")
    (root / "study.yaml").write_text(STUDY.format(data=data, out=root / "study-out"))
    places = {
        "data": data,
        "corpus": data / "big",
        "text": root / "text",
        "choices": root / "choices",
        "tasks": root / "tasks",
        "prompts": root / "prompts",
        "study": root / "study.yaml",
        "package": PACKAGE,
        "conf": PACKAGE.parent / "hydra_conf",
        "missing": root / "nowhere",
        "file": root / "file",
        "folder": root / "folder",
        "empty": root / "empty",
        "empty_folder": root / "empty_folder",
        "fifo": root / "fifo",
        "device": device,
        "garbage": root / "garbage",
        "binary": root / "garbage",
        "truncated": root / "truncated.pt",
        "link": root / "link",
        "long": root / ("x" * 300),
    }
    for name in ("train", "train-lm"):
        argv = filled(shlex.split(GOOD[name]), {**places, "out": root / name})
        status, _, err = commands.run(argv, root / name)
        assert status == 0, err
    places["model"] = root / "train" / "run" / "checkpoint_last.pt"
    places["dense"] = root / "train-lm" / "run" / "checkpoint_last.pt"
    places["result"] = _result(root / "result")
    (root / "file").write_text("some text\n")
    (root / "empty").write_text("")
    (root / "folder").mkdir()
    (root / "folder" / "file").write_text("some text\n")
    (root / "empty_folder").mkdir()
    os.mkfifo(root / "fifo")
    (root / "garbage").write_bytes(bytes(range(256)) * 9)
    content = places["model"].read_bytes()
    (root / "truncated.pt").write_bytes(content[: len(content) // 2])
    (root / "link").symlink_to(root / "nowhere")
    return places


def _result(folder: Path) -> Path:
    folder.mkdir()
    made_result(folder)
    return folder


def digest(root: Path) -> str:
    """Of all that is in the workplace, but what the runs write."""
    found = hashlib.sha256()
    for path in sorted(root.rglob("*")):
        if path.relative_to(root).parts[0] not in ("runs", "result"):
            found.update(str(path).encode() + (path.read_bytes() if path.is_file() else b""))
    return found.hexdigest()
