"""What long work shows on stderr."""

import io

import pytest

from fairseq_moe_ext import progress_bar


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    """now[0] is the time."""
    now = [100.0]
    monkeypatch.setattr(progress_bar.time, "monotonic", lambda: now[0])
    return now


def test_without_a_terminal_a_line_a_minute(clock, capsys):
    with progress_bar.bar("reading", 1000, "token") as bar:
        for _ in range(9):
            clock[0] += 9
            bar.update(100)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        "reading: 200 of 1,000 tokens (20%), 0:01:12 left",
        "reading: 900 of 1,000 tokens (90%), 0:00:09 left",
    ]


@pytest.mark.parametrize("total", [0, 50])
def test_quick_work_shows_nothing(clock, capsys, total):
    with progress_bar.bar("reading", total, "token") as bar:
        clock[0] += 5
        bar.update(total)
    assert capsys.readouterr().err == ""


def test_other_processes_show_nothing(clock, capsys):
    bar = progress_bar.bar("reading", 50, "token", shown=False)
    clock[0] += 500
    bar.update(10)
    bar.close()
    assert capsys.readouterr().err == ""


def test_on_a_terminal_a_bar_that_goes_when_all_is_done(monkeypatch):
    shown = Terminal()
    monkeypatch.setattr("sys.stderr", shown)
    with progress_bar.bar("reading", 50, "token") as bar:
        bar.update(50)
        bar.refresh()
    assert "reading: 100%" in shown.getvalue() and "50/50" in shown.getvalue()
    assert shown.getvalue().split("\r")[-2].strip() == ""
