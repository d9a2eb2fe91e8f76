"""The runner of child processes: one at a time in a folder, all ended together."""

import os
import signal
import subprocess
import sys
import time

import pytest

from fairseq_moe_ext.errors import UserError
from fairseq_moe_ext.study.runner import Ended, Runner


@pytest.fixture
def runner(tmp_path):
    made = Runner(tmp_path / "out", f"--out {tmp_path / 'out'}")
    made.open()
    yield made
    made.stop()


def python(code):
    return [sys.executable, "-c", code]


def test_one_that_fails_ends_all_and_the_rest_is_not_begun(runner):
    began = time.monotonic()

    def sleep():
        runner.call(python("import time; time.sleep(60)"), runner.out / "sleep.log")

    def fail():
        runner.call(python("print('so it was'); exit(3)"), runner.out / "fail.log")

    def touch():
        runner.call(python("print('begun')"), runner.out / "never.log")

    with pytest.raises(
        UserError, match=r"ended with status 3: so it was \(all of it in .*fail.log"
    ):
        list(runner.in_parallel([sleep, fail, touch], 2))
    assert time.monotonic() - began < 30
    assert not any(child.poll() is None for child in runner.children)
    with pytest.raises(Ended):
        touch()
    assert not (runner.out / "never.log").exists()


def test_results_come_in_order_and_watching_goes_on(runner):
    watched = []

    def work(number):
        command = python(f"import time; time.sleep({0.5 / number}); print({number})")
        runner.call(
            command, runner.out / f"{number}.log", 1, lambda: watched.append(number), every=0.05
        )
        return number

    works = [lambda number=number: work(number) for number in (1, 2, 3)]
    assert list(runner.in_parallel(works, 3)) == [1, 2, 3]
    assert set(watched) == {1, 2, 3}
    assert (runner.out / "2.log").read_text() == "2\n"


def test_a_folder_goes_on_with_the_same_settings_only(runner, tmp_path):
    with pytest.raises(UserError, match=r"--out .* is being worked on by PID"):
        Runner(runner.out, runner.what).open()
    runner.check_settings({"epochs": 1, "of": {"a": [1]}}, "an ablation", "ablation")
    runner.check_settings({"epochs": 1, "of": {"a": [1]}}, "an ablation", "ablation")
    with pytest.raises(UserError, match="holds an ablation with epochs 1, not 2: name another"):
        runner.check_settings({"epochs": 2, "of": {"a": [1]}}, "an ablation", "ablation")
    runner.stop()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").touch()
    other = Runner(tmp_path / "mine", "--out mine")
    other.open()
    with pytest.raises(UserError, match="--out mine is not empty and holds no ablation"):
        other.check_settings({}, "an ablation", "ablation")
    other.stop()
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["file"]


@pytest.mark.parametrize(
    "name, said",
    [
        ("file", "--out x: a file, not a folder: name another"),
        ("file/in", "--out x cannot be written"),
        ("c:d/run", "--out x: ':' separates paths in fairseq"),
    ],
)
def test_a_folder_that_cannot_be_one_is_not_made(tmp_path, name, said):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=said):
        Runner(tmp_path / name, "--out x").open()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


JOB = """
import sys
from pathlib import Path
from fairseq_moe_ext.study.runner import Runner
runner = Runner(Path(sys.argv[1]), "out")
try:
    runner.open()
    code = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    runner.call([sys.executable, "-c", code], runner.out / "log")
except KeyboardInterrupt:
    print("interrupted")
finally:
    runner.stop()
"""


def test_what_ends_the_job_ends_its_commands(tmp_path):
    """`kill` and a queue send SIGTERM."""
    job = subprocess.Popen([*python(JOB), str(tmp_path)], stdout=subprocess.PIPE, text=True)
    log = tmp_path / "log"
    while not (log.exists() and log.read_text().endswith("\n")):
        assert job.poll() is None
        time.sleep(0.05)
    job.terminate()
    assert job.communicate(timeout=30)[0] == "interrupted\n" and job.returncode == 0
    with pytest.raises(ProcessLookupError):
        os.kill(int(log.read_text()), 0)


def test_sigterm_is_as_before_when_a_job_has_ended(tmp_path):
    outer = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        made = Runner(tmp_path, "out")
        made.open()
        assert signal.getsignal(signal.SIGTERM) is not signal.SIG_IGN
        made.stop()
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, outer)
