"""What a study shows of its runs while they work."""

import io
import sys
from pathlib import Path

import pytest

from fairseq_moe_ext.study import command, runner
from fairseq_moe_ext.study.plan import Plan, Run

# prints as fairseq-train --log-format json, and works on
TRAIN = """
import sys, time
for update in range(0, 41, 10):
    print('time | INFO | train_inner | {"num_updates": "%d"}' % update, flush=True)
    time.sleep(0.05)
"""


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def work(tmp_path, monkeypatch):
    """The work of two runs, which is looked at 50 times a second."""
    call = runner.Runner.call
    monkeypatch.setattr(
        runner.Runner, "call", lambda self, words, log, threads, watch, every: call(
            self, words, log, threads, watch, every / 1000))  # fmt: skip
    runs = []
    for seed in (1, 2):
        done = tmp_path / "out" / f"{seed}" / "evaluation.json"
        evaluate = [sys.executable, "-c", f"open({str(done)!r}, 'w')"]
        train = [sys.executable, "-c", TRAIN]
        runs.append(Run("dense", "s", seed, 40, done.parent, train, evaluate, []))
    return command._Work(Plan("", tmp_path / "out", 32, 128, runs, ""), 1)


def test_on_a_terminal_a_bar_over_the_updates_of_all_runs(work, monkeypatch, capsys):
    shown = Terminal()
    monkeypatch.setattr(sys, "stderr", shown)
    work.do()
    assert work.bar.n == 80 and capsys.readouterr().out == ""
    assert "10/80" in shown.getvalue() and "80/80" in shown.getvalue()
    assert "[0/2] 2 runs, 1 at once" in shown.getvalue()


def test_elsewhere_lines(work, monkeypatch, capsys):
    monkeypatch.setattr(runner.Runner, "call", lambda *args: args[4]())  # looks once, too soon
    for one in work.plan.runs:
        one.folder.mkdir(parents=True)
        (one.folder / "train.log").write_text('{"num_updates": "10"}\n{"num_updates": "20"}\n')
        Path(one.folder / "evaluation.log").touch()
    work.do()
    captured = capsys.readouterr()
    assert captured.out == "" and "\r" not in captured.err
    assert "[0/2] dense s seed 1: 20 of 40 updates" in captured.err
