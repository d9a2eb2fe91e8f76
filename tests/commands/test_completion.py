"""Completion in the shells themselves, at the key Tab."""

import os
import pty
import select
import shutil
import subprocess
import time

import pytest

from fairseq_moe_ext import completion

CASES = [  # typed before Tab -> what then stands on the line
    ("fairseq-moe ins", "fairseq-moe inspect"),
    ("fairseq-moe --vers", "fairseq-moe --version"),
    ("fairseq-moe evaluate --sw", "evaluate --sweep-capacity"),
    ("fairseq-moe convert generate --upc", "convert generate --upcycle"),
    ("fairseq-moe convert a b --to h", "convert a b --to hf"),
    ("fairseq-moe completion z", "completion zsh"),
    ("fairseq-moe verify mod", r"verify model\ one.pt"),
    ("fairseq-moe verify --help run", "verify --help runs/"),
]
STARTS = {"bash": ["bash", "--norc", "--noprofile", "-i"], "zsh": ["zsh", "-f", "-i"]}


class Shell:
    """An interactive shell on a terminal of its own; a context manager."""

    def __init__(self, words, folder):
        master, slave = pty.openpty()
        env = {**os.environ, "TERM": "dumb", "PS1": "$ ", "HOME": str(folder)}
        self.process = subprocess.Popen(
            words, stdin=slave, stdout=slave, stderr=slave, cwd=folder, env=env,
            start_new_session=True,
        )  # fmt: skip
        os.close(slave)
        self.master = master

    def type(self, keys, wanted, seconds=20):
        """What is on the screen then, up to the wanted text."""
        os.write(self.master, keys.encode())
        seen, end = "", time.monotonic() + seconds
        while wanted not in seen and time.monotonic() < end:
            if select.select([self.master], [], [], 0.2)[0]:
                seen += os.read(self.master, 65536).decode(errors="replace")
        return seen

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.process.kill()
        self.process.wait()
        os.close(self.master)


@pytest.fixture(scope="module")
def flags():
    return completion.flags()


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "model one.pt").write_text("")
    (tmp_path / "runs").mkdir()
    (tmp_path / "inspect").mkdir()  # no folder is taken for a command
    return tmp_path


@pytest.mark.parametrize("shell", STARTS)
def test_tab(shell, folder, flags):
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    (folder / "complete.sh").write_text(completion.script(shell, flags))
    with Shell(STARTS[shell], folder) as screen:
        ready = screen.type("source ./complete.sh; echo rea''dy\n", "ready\r\n")
        assert "ready\r\n" in ready, ready
        for typed, wanted in CASES:
            seen = screen.type(f"{typed}\t", wanted)
            assert wanted in seen, (typed, seen)
            screen.type("\x15echo nex''t\n", "next\r\n")  # an empty line again


def test_tab_in_fish(folder, flags):
    if shutil.which("fish") is None:
        pytest.skip("fish is not installed")
    (folder / "complete.fish").write_text(completion.script("fish", flags))
    for typed, wanted in CASES:
        code = f"source complete.fish; complete -C '{typed}'"
        done = subprocess.run(
            ["fish", "--no-config", "-c", code], cwd=folder, capture_output=True, text=True
        )
        assert done.returncode == 0 and not done.stderr, done.stderr
        whole = typed.rsplit(" ", 1)[0] + " "
        found = [line.split("\t")[0] for line in done.stdout.splitlines()]
        words = [(whole + word).replace("model one", r"model\ one") for word in found]
        assert any(line.endswith(wanted) for line in words), (typed, found)
