"""The cores that a process may use, and that all of this project asks for them in one way."""

import os
import re
import sys
from pathlib import Path

import pytest

from fairseq_moe_ext import cores
from fairseq_moe_ext.study import child

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    "affinity, quota, expected",
    [
        (range(8), None, 8),
        ({1, 5}, None, 2),
        (range(8), "max 100000", 8),
        (range(8), "200000 100000", 2),
        (range(8), "150000 100000", 2),
        (range(8), "10000 100000", 1),
        ({3}, "400000 100000", 1),
        (range(8), "", 8),
    ],
)
def test_affinity_and_the_container_s_quota(monkeypatch, tmp_path, affinity, quota, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(affinity), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(cores, "_QUOTA", tmp_path / "cpu.max")
    if quota is not None:
        (tmp_path / "cpu.max").write_text(quota + "\n")
    assert cores.usable() == expected


def test_without_affinity_all_are_counted(monkeypatch, tmp_path):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(cores, "_QUOTA", tmp_path / "cpu.max")
    for number, expected in ((6, 6), (None, 1)):
        monkeypatch.setattr(os, "cpu_count", lambda number=number: number)
        assert cores.usable() == expected


@pytest.mark.parametrize(
    "given, expected",
    [(None, 4), ("1", 1), ("4", 4), ("9", 4), ("2,1", 2), ("0", 4), ("x", 4), ("", 4)],
)
def test_a_command_takes_no_more_threads_than_are_set(monkeypatch, tmp_path, given, expected):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if given is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    assert cores.threads(4) == expected
    code = "import os; print(os.environ['OMP_NUM_THREADS'])"
    assert child.start([sys.executable, "-c", code], tmp_path / "log", threads=4).wait() == 0
    assert (tmp_path / "log").read_text() == f"{expected}\n"


def test_nothing_else_counts_cores():
    files = [*ROOT.glob("fairseq*/**/*.py"), *ROOT.glob("examples/**/*.py")]
    counting = [p.name for p in files if re.search(r"cpu_count|getaffinity", p.read_text("utf-8"))]
    assert counting == ["cores.py"]
