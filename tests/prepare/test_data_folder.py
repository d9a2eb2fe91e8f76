"""DATA is the old data or the new, whole, whenever prepare is killed; nothing else is removed."""

import multiprocessing
import os
import signal
import time

import pytest

from fairseq_moe_ext import cli
from fairseq_moe_ext.errors import UserError
from fairseq_moe_ext.locks import Lock, beside
from fairseq_moe_ext.prepare import binarize, command, data_folder, encode, pipeline

LIMIT = 60  # seconds, for what takes one or two


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def line(tmp_path, documents, bpe_folder):
    """A command line that writes DATA in a second, without threads that a fork could not have."""
    (tmp_path / "a.txt").write_text("\n\n".join(documents[:150]), encoding="utf-8")
    line = f"prepare {tmp_path}/data --workers 1 --corpus a={tmp_path}/a.txt --valid-fraction 0.1"
    line += f" --test-fraction 0.1 --gpt2-encoder-json {bpe_folder}/encoder.json"
    return f"{line} --gpt2-vocab-bpe {bpe_folder}/vocab.bpe"


# stage -> what is about to be called, or has been called
STAGES = {
    "folder made": ("before", pipeline, "_prepare"),
    "tokenizer read": ("after", pipeline, "_tokenizer"),
    "a document read": ("after", encode, "encode_chunk"),
    "a split half-written": ("before", binarize, "_blocks"),
    "dictionary written": ("after", pipeline.dictionary, "write"),
    "all written": ("before", data_folder, "_put_in_place"),
    "before the exchange": ("before", data_folder, "exchange"),
    "after the exchange": ("after", data_folder, "exchange"),
    "old data half-removed": ("after", data_folder.Path, "unlink"),
    "old data removed": ("after", data_folder, "remove"),
}
RENAMES = {
    "between the renames": ("after", os, "rename"),
    "after the renames": ("before", data_folder, "remove"),
}


def killed_at(stage, line, no_exchange):
    """In a process of its own: the command, killed at the stage."""
    if no_exchange:
        data_folder.exchange = lambda one, other: False
    when, owner, name = {**STAGES, **RENAMES}[stage]
    stock = getattr(owner, name)

    def call(*args, **kwargs):
        if when == "after":
            stock(*args, **kwargs)
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(owner, name, call)
    cli.main(line)


def in_process(target, *args):
    """The exit code of a process forked from one that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    process = context.Process(target=target, args=args)
    process.start()
    process.join(LIMIT)
    assert not process.is_alive()
    return process.exitcode


@pytest.mark.parametrize("stage", [*STAGES, *RENAMES])
def test_a_kill_leaves_the_old_or_the_new_data_and_no_trouble(tmp_path, line, stage):
    argv = line.split()
    assert cli.main([*argv, "--split-seed", "2"]) == 0
    new = contents(tmp_path / "data")
    assert cli.main([*argv, "--overwrite"]) == 0
    old = contents(tmp_path / "data")
    assert old != new
    argv += ["--split-seed", "2", "--overwrite"]
    assert in_process(killed_at, stage, argv, stage in RENAMES) == -signal.SIGKILL
    if stage == "between the renames":
        assert not (tmp_path / "data").exists()  # the next run puts it back, whatever it does then
        assert cli.main(line.split()) == 1
        assert contents(tmp_path / "data") == old
    else:
        assert contents(tmp_path / "data") in (old, new)
    assert cli.main(argv) == 0
    assert contents(tmp_path / "data") == new
    assert sorted(os.listdir(tmp_path)) == ["a.txt", "data"]


def workers_of_a_killed_run(line, told):
    stock = encode.Encoders.encode

    def encode_all(self, todo):
        for found in stock(self, todo):
            told.send([child.pid for child in multiprocessing.active_children()])
            os.kill(os.getpid(), signal.SIGKILL)
            yield found

    encode.Encoders.encode = encode_all
    encode.WORKER_BYTES = 1  # worth workers
    cli.main(line)


def is_running(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="looks into /proc")
def test_workers_end_with_their_parent(tmp_path, line):
    told, sender = multiprocessing.Pipe(duplex=False)
    argv = [*line.split(), "--workers", "2"]
    assert in_process(workers_of_a_killed_run, argv, sender) == -signal.SIGKILL
    workers = told.recv()
    assert workers
    end = time.monotonic() + 10
    while any(map(is_running, workers)) and time.monotonic() < end:
        time.sleep(0.05)
    assert not any(map(is_running, workers))


def test_remains_of_older_versions_go_and_others_stay(tmp_path, line):
    for name in (".data.123.tmp", ".data.4.old", ".data.x.tmp", ".database.5.tmp"):
        (tmp_path / name / "a").mkdir(parents=True)
        (tmp_path / name / "a" / "train.ids.tmp").touch()
    assert cli.main(line.split()) == 0
    assert sorted(os.listdir(tmp_path)) == [".data.x.tmp", ".database.5.tmp", "a.txt", "data"]


@pytest.mark.parametrize(
    "name", ["notes.txt", "a/notes.txt", "b/train.bin", ".git/config", "a/train.bin.bak", "a/x/y"]
)
def test_what_prepare_did_not_write_is_named_and_stays(tmp_path, line, capsys, name):
    assert cli.main(line.split()) == 0
    (tmp_path / "data" / name).parent.mkdir(exist_ok=True)
    (tmp_path / "data" / name).write_text("mine", encoding="utf-8")
    before = contents(tmp_path)
    assert cli.main([*line.split(), "--overwrite"]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "which did not write " in error and name.split("/")[0] in error
    assert contents(tmp_path) == before


@pytest.mark.parametrize("counts", ["{}", '{"corpora": {"..": {}}}', '{"corpora": []}', "x", "[1]"])
def test_another_counts_json_does_not_make_a_folder_ours(tmp_path, line, counts):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "counts.json").write_text(counts, encoding="utf-8")
    (tmp_path / "data" / "thesis.tex").touch()
    before = contents(tmp_path)
    assert cli.main([*line.split(), "--overwrite"]) == 1
    assert contents(tmp_path) == before


def test_files_that_come_during_the_work_are_not_lost(tmp_path, line, monkeypatch, capsys):
    assert cli.main(line.split()) == 0
    stock = data_folder.exchange

    def late(*paths):
        (tmp_path / "data" / "late.txt").write_text("mine", encoding="utf-8")
        return stock(*paths)

    monkeypatch.setattr(data_folder, "exchange", late)
    assert cli.main([*line.split(), "--overwrite", "--split-seed", "2"]) == 0
    assert "kept, because it contains files that prepare did not write" in capsys.readouterr().err
    assert [path.read_text() for path in tmp_path.rglob("late.txt")] == ["mine"]


def test_a_link_stays_and_its_target_is_replaced(tmp_path, line, capsys):
    (tmp_path / "disk").mkdir()
    assert cli.main(line.replace("/data ", "/disk/real ").split()) == 0
    old = contents(tmp_path / "disk" / "real")
    (tmp_path / "data").symlink_to("disk/real")
    assert cli.main([*line.split(), "--overwrite", "--split-seed", "2"]) == 0
    assert (tmp_path / "data").is_symlink()
    assert old.keys() == contents(tmp_path / "disk" / "real").keys()
    assert old != contents(tmp_path / "disk" / "real")
    (tmp_path / "data").unlink()
    (tmp_path / "data").symlink_to("nowhere")
    for flags in ([], ["--overwrite"]):
        assert cli.main([*line.split(), *flags]) == 1
        assert "data: a dangling symbolic link" in capsys.readouterr().err


def test_places_that_cannot_be_replaced(tmp_path, line, capsys, monkeypatch):
    (tmp_path / "data").write_text("mine", encoding="utf-8")
    assert cli.main([*line.split(), "--overwrite"]) == 1
    assert "data: not a folder" in capsys.readouterr().err
    (tmp_path / "data").unlink()
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path / "data")
    assert cli.main([*line.split(), "--overwrite"]) == 1
    assert "data: is the current folder or a mount point" in capsys.readouterr().err
    assert cli.main(line.replace("/data ", f"/{'x' * 300} ").split()) == 1
    assert "File name too long" in capsys.readouterr().err
    assert cli.main(line.replace("/data ", f"/{'x' * 245} ").split()) == 0
    assert sorted(os.listdir(tmp_path)) == ["a.txt", "data", "x" * 245]


def test_text_within_the_folder_to_make_is_refused(tmp_path, line, capsys):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "b.txt").write_text("text", encoding="utf-8")
    assert cli.main([*line.split(), "--overwrite", "--corpus", f"b={tmp_path}/data/b.txt"]) == 1
    assert "data/b.txt: text of corpus b, but inside the output folder" in capsys.readouterr().err


def test_a_failure_leaves_no_folder_above(tmp_path, line):
    assert cli.main([*line.replace("/data ", "/x/y/data ").split(), "--dict-size", "8"]) == 1
    assert sorted(os.listdir(tmp_path)) == ["a.txt"]


def test_two_at_once_are_one_line_for_the_second(tmp_path, line, capsys):
    with Lock(beside(tmp_path / "data"), "data"):
        assert cli.main(line.split()) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "data is being worked on by PID" in error
    assert cli.main(line.split()) == 0


def test_without_a_step_of_the_kernel_there_are_two_renames(tmp_path, line, monkeypatch):
    assert cli.main(line.split()) == 0
    old = contents(tmp_path / "data")
    monkeypatch.setattr(data_folder, "exchange", lambda one, other: False)
    assert cli.main([*line.split(), "--overwrite", "--split-seed", "2"]) == 0
    assert contents(tmp_path / "data") != old
    assert sorted(os.listdir(tmp_path)) == ["a.txt", "data"]


@pytest.mark.parametrize("name", ["dict.txt", "encoder.json", "vocab.bpe", "counts.json"])
def test_a_corpus_is_not_called_like_a_file_of_the_folder(name):
    with pytest.raises(UserError, match=f"the name '{name}' is reserved"):
        command.parse_corpora([f"{name}=x"], [])
    with pytest.raises(UserError, match="has 101 characters; use 100 at most"):
        command.parse_corpora([f"{'x' * 101}=x"], [])


def test_a_killed_worker_ends_in_one_line(bpe_folder):
    chunk = encode.Chunk(["the cat"], len, 1)
    with encode.Encoders(bpe_folder / "encoder.json", bpe_folder / "vocab.bpe", 2) as encoders:
        results = encoders.encode([chunk] * 9)
        next(results)
        for worker in encoders._pool._processes:  # of the tests there may be others
            os.kill(worker, signal.SIGKILL)
        with pytest.raises(
            UserError, match="--workers: one of 2 .* was killed, .* use fewer than 2"
        ):
            list(results)
