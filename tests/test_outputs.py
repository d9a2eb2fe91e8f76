"""Nothing but a regular file is written over, and that only if told; known before the work."""

import json
import math
import os
import socket
import stat
import subprocess
from argparse import Namespace

import pytest
from fairseq.data import Dictionary
from study.study_results import made_result

from fairseq_moe_ext import cli, command_checks, outputs, text_table, tokenizer_files
from fairseq_moe_ext.errors import UserError
from fairseq_moe_ext.evaluation import report


@pytest.fixture
def places(tmp_path, monkeypatch):
    """A folder with one of each kind that is no new file."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "old.json").write_text("kept", encoding="utf-8")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("old.json")
    (tmp_path / "broken").symlink_to("nowhere")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dict.txt").write_text("0 1\n", encoding="utf-8")
    (tmp_path / "data" / "copa").mkdir()
    (tmp_path / "x.pt").write_text("no checkpoint", encoding="utf-8")
    os.mkfifo(tmp_path / "fifo")
    bound = socket.socket(socket.AF_UNIX)
    bound.bind("socket")
    yield tmp_path
    bound.close()


UNFIT = [
    ("{device}", "a device, not a file"),
    ("fifo", r"a FIFO \(named pipe\), not a file"),
    ("socket", "a socket, not a file"),
    ("link", "a symbolic link, not a file"),
    ("broken", "a symbolic link, not a file"),
    ("folder", "a folder, not a file"),
    (".", "a folder, not a file"),
    ("none/new.json", "no folder none; make it first"),
    ("old.json/new.json", "cannot be written: Not a directory"),
    ("x" * 300, "cannot be written: File name too long"),
    ("old.json", "exists; name another file or give --overwrite"),
]


@pytest.mark.parametrize("name, message", UNFIT)
def test_a_place_that_is_unfit_is_named_and_stays(places, device, name, message):
    name = name.format(device=device)
    before = sorted(os.listdir(places))
    with pytest.raises(UserError, match=f"^--json {name}: {message}"):
        outputs.check([("--json", places.__class__(name))], overwrite=False)
    assert sorted(os.listdir(places)) == before
    assert (places / "old.json").read_text() == "kept"


@pytest.mark.parametrize("name, message", UNFIT[:-1])
def test_overwriting_is_for_regular_files_alone(places, device, name, message):
    name = name.format(device=device)
    with pytest.raises(UserError, match=message):
        outputs.check([("--json", places.__class__(name))], overwrite=True)
    outputs.check([("--json", places / "old.json"), ("--figure", None)], overwrite=True)


def test_an_output_is_neither_an_input_nor_another_output(places):
    old, new, data = places / "old.json", places / "new.json", places / "data"
    with pytest.raises(UserError, match="old.json: is read by this command"):
        outputs.check([("--json", old)], overwrite=True, inputs=[places / "link"])
    with pytest.raises(UserError, match="dict.txt: is read by this command"):
        outputs.check([("--json", data / "dict.txt")], overwrite=True, inputs=[data])
    outputs.check([("--json", data / "new.json")], overwrite=False, inputs=[data])
    with pytest.raises(UserError, match="--figure .*: --json is the same file"):
        outputs.check([("--json", new), ("--figure", data / ".." / "new.json")], overwrite=True)


def test_a_file_is_written_whole_or_not_at_all(places, monkeypatch):
    outputs.write_text(places / "old.json", "renewed \udcff")
    assert (places / "old.json").read_text() == "renewed \\udcff"
    before = sorted(os.listdir(places))

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(UserError, match="old.json: cannot be written: No space left on device"):
        outputs.write_text(places / "old.json", "lost")
    assert (places / "old.json").read_text() == "renewed \\udcff"
    assert sorted(os.listdir(places)) == before  # and no temporary file


COMMANDS = {
    "evaluate --json": "evaluate data --path x.pt --json",
    "evaluate --figure": "evaluate data --path x.pt --sweep-capacity 1 --figure",
    "priming --json": "priming data --path x.pt --data data --json",
    "expert-use --json": "expert-use x.pt --bin a=data --json",
}


@pytest.mark.parametrize("name, message", UNFIT)
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_refuses_before_it_reads_a_model(
    places, device, capsys, command, name, message
):
    """x.pt is no checkpoint: a command that began with it would say so."""
    name = name.format(device=device)
    assert cli.main([*COMMANDS[command].split(), name]) == 1
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1 and errors[0].startswith(f"error: {command.split()[1]} {name}: ")
    assert stat.S_ISCHR(os.stat(device).st_mode)
    assert (places / "old.json").read_text() == "kept"


def test_a_figure_that_nothing_is_drawn_in_is_refused(places, capsys):
    assert cli.main("evaluate data --path x.pt --figure new.html".split()) == 1
    assert "--figure new.html: needs --sweep-capacity" in capsys.readouterr().err


def test_a_page_is_renewed_only_if_it_is_ours(places):
    page = places / "report.html"
    report.check_renewable(page)
    outputs.write_text(page, report.render("base.html", title="Title"))
    report.check_renewable(page)
    page.write_text("<html>mine", encoding="utf-8")
    with pytest.raises(UserError, match="report.html: is not a page of this command"):
        report.check_renewable(page)


def test_a_report_leaves_what_is_not_its_own(places, capsys):
    made_result(places)
    (places / "figures").write_text("mine", encoding="utf-8")
    assert cli.main(["report", "."]) == 1
    assert "error: figures: is not a folder; move it elsewhere" in capsys.readouterr().err
    (places / "figures").unlink()
    (places / "report.html").symlink_to("old.json")
    assert cli.main(["report", "."]) == 1
    assert "error: report.html: a symbolic link" in capsys.readouterr().err
    assert (places / "old.json").read_text() == "kept"


def made(**given):
    """A command line of training, parsed."""
    ours = {"task": "mixture_language_modeling", "max_update": 1, "batch_size": 1}
    return Namespace(**ours, **given)


@pytest.mark.parametrize(
    "flag, name, message",
    [
        ("save_dir", "old.json", "old.json is not a folder"),
        ("save_dir", "old.json/run/1", "old.json is not a folder"),
        ("save_dir", "broken", "broken is not a folder"),
        ("save_dir", "fifo", "a FIFO"),
        ("save_dir", "runs/09:29", "':' separates paths in fairseq"),
        ("tensorboard_logdir", "old.json", "old.json is not a folder"),
        ("results_path", "old.json", "old.json is not a folder"),
        ("log_file", "fifo", "a FIFO"),
        ("log_file", "folder", "a folder"),
        ("log_file", "none/log", "no folder none"),
        ("log_file", "old.json", "--restore-file is the same file"),
        ("restore_file", "fifo", "a FIFO"),
        ("data", "fifo", "a FIFO"),
    ],
)
def test_places_of_fairseqs_flags_are_judged_before_the_work(places, flag, name, message):
    given = {"restore_file": "old.json", flag: name}
    with pytest.raises(UserError) as error:
        command_checks.check_command_line(made(**given))
    assert str(error.value).startswith(f"--{flag.replace('_', '-')} {name}: ")
    assert message in str(error.value)


def test_places_of_fairseqs_flags_that_can_be_written(places):
    given = {"save_dir": "a/b", "tensorboard_logdir": "folder", "log_file": "/dev/stderr"}
    command_checks.check_command_line(made(**given, results_path=None))
    command_checks.check_command_line(made(log_file="new.log", save_dir="folder/new"))


def test_what_is_there_under_a_name_that_fairseq_divides(places):
    (places / "a:b").mkdir()
    (places / "a:b" / "x.pt").touch()
    for flag, name, said in (("data", "a:b", "a:b"), ("path", "a:b/x.pt", "--path a:b/x.pt")):
        with pytest.raises(UserError, match=f"^{said}: ':' separates paths in fairseq"):
            command_checks.check_command_line(made(**{flag: name}))
    command_checks.check_command_line(made(path="x.pt:y.pt", data="a:b/c:d"))  # several


def test_a_dictionary_is_a_file_of_utf8(places):
    (places / "latin.txt").write_bytes(b"caf\xe9 1\n")
    for name, message in (("fifo", "fifo: a FIFO"), ("latin.txt", "latin.txt: not UTF-8 at byte")):
        with pytest.raises(UserError, match=message):
            Dictionary.load(name)


def test_json_has_no_nan_and_no_infinity(tmp_path):
    path = tmp_path / "a.json"
    outputs.write_json(path, {"a": [1, math.nan, (2.5, -math.inf)], "b": True, "c": None})
    assert json.loads(path.read_text()) == {"a": [1, None, [2.5, None]], "b": True, "c": None}


def test_printed_json_has_no_nan_and_no_infinity():
    args = Namespace(json=True, markdown=False)
    for text in (
        text_table.formed(args, {"a": (1.5, math.inf)}, [["a"]]),
        outputs.as_json({"a": (1.5, math.nan)}),
    ):
        assert json.loads(text, parse_constant=pytest.fail) == {"a": [1.5, None]}


def test_what_killed_processes_left_is_removed(tmp_path):
    ended = subprocess.Popen(["true"])
    ended.wait()
    names = [f".{name}.{ended.pid}.tmp" for name in ("a.json", "dict.txt")]
    kept = [f".a.json.{os.getppid()}.tmp", f".b.json.{ended.pid}.tmp", ".a.json.x.tmp"]
    of_another_machine = f".a.json.0{ended.pid}.tmp"  # which writes to it
    for name in [*names, *kept, of_another_machine]:
        (tmp_path / name).write_text("half", encoding="utf-8")
    for name in [*names, *kept]:
        os.utime(tmp_path / name, times=(0, 0))
    outputs.write_text(tmp_path / "a.json", "whole")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dict.txt").write_text("0 1\n", encoding="utf-8")
    tokenizer_files.copy(tmp_path / "data", tmp_path)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {*kept, of_another_machine, "a.json", "data", "dict.txt"}
