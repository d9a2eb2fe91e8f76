"""Checkpoints of stock fairseq: weights only, whole or refused in one line."""

import argparse
import io
import os
import re
from collections import OrderedDict
from pathlib import Path

import numpy
import pytest
import torch
from fairseq import checkpoint_utils

from fairseq_moe_ext.errors import UserError


def state(**more):
    """The least that fairseq calls a checkpoint."""
    history = [{"optimizer_name": "x", "lr_scheduler_state": {}, "num_updates": 1}]
    extra = {"train_iterator": {"epoch": 1}}
    return {"model": {}, "optimizer_history": history, "extra_state": extra, **more}


def test_a_checkpoint_with_settings_and_numpy_numbers_loads(tmp_path):
    path = str(tmp_path / "x.pt")
    args = argparse.Namespace(arch="transformer_lm", lr=[0.1])
    best = [numpy.float64(1.5), numpy.float32(2.5), numpy.int64(3)]
    counts = numpy.array([3, 2, 1, 0])  # stock's --eval-bleu logs such
    torch.save(state(note=args, best=best, counts=counts, names=OrderedDict(a=1)), path)
    loaded = checkpoint_utils.load_checkpoint_to_cpu(path)
    assert loaded["note"] == args
    assert loaded["best"] == best
    assert (loaded["counts"] == counts).all()


def test_an_array_of_objects_is_refused(tmp_path):
    torch.save(state(best=numpy.array([Touch(str(tmp_path / "made"))])), tmp_path / "x.pt")
    with pytest.raises(UserError, match="x.pt: "):
        checkpoint_utils.load_checkpoint_to_cpu(str(tmp_path / "x.pt"))
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("module", ["numpy.core.multiarray", "numpy._core.multiarray"])
def test_a_numpy_number_of_the_other_numpy_loads(tmp_path, module):
    torch.save(state(best=numpy.float64(1.5)), tmp_path / "x.pt", pickle_protocol=2)
    import zipfile

    with zipfile.ZipFile(tmp_path / "x.pt") as old, zipfile.ZipFile(tmp_path / "y.pt", "w") as new:
        for item in old.infolist():
            content = old.read(item)
            if item.filename.endswith("data.pkl"):
                names = rb"cnumpy\._?core\.multiarray\nscalar\n"
                content, count = re.subn(names, f"c{module}\nscalar\n".encode(), content)
                assert count == 1
            new.writestr(item, content)
    assert checkpoint_utils.load_checkpoint_to_cpu(str(tmp_path / "y.pt"))["best"] == 1.5


class Touch:
    """An object whose unpickling makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("new_format", [True, False])
def test_a_checkpoint_that_runs_code_is_refused_in_one_line(tmp_path, new_format):
    path = tmp_path / "bad.pt"
    torch.save(state(x=Touch(tmp_path / "ran")), path, _use_new_zipfile_serialization=new_format)
    with pytest.raises(UserError) as caught:
        checkpoint_utils.load_checkpoint_to_cpu(str(path))
    assert f"{path}: rejected" in str(caught.value) and ".system" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("length", [0, 10, 2000, -100])
def test_a_truncated_checkpoint_is_named(tmp_path, length):
    path = tmp_path / "cut.pt"
    torch.save(state(x=torch.zeros(1000)), path)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(UserError, match=re.escape(str(path))) as caught:
        checkpoint_utils.load_checkpoint_to_cpu(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"hello\n", b"12 lines\n", b"a\nb\n", b"(dp0\n.", b"u" * 50])
def test_a_file_that_is_no_checkpoint_is_named(tmp_path, content):
    path = tmp_path / "notes.pt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=re.escape(f"{path}: ")) as caught:
        checkpoint_utils.load_checkpoint_to_cpu(str(path))
    message = str(caught.value)
    assert "not a checkpoint" in message and f"{len(content)} bytes" in message
    assert "\n" not in message and "weights_only" not in message and len(message) < 300


def test_torch_load_itself_is_untouched(tmp_path):
    assert torch.load.__module__ == "torch.serialization"
    buffer = io.BytesIO()
    torch.save({1, 2}, buffer)
    buffer.seek(0)
    assert torch.load(buffer, weights_only=False) == {1, 2}


def test_a_copy_that_breaks_off_leaves_the_last_checkpoint_whole(tmp_path, monkeypatch):
    source, target = tmp_path / "checkpoint_best.pt", tmp_path / "checkpoint_last.pt"
    source.write_bytes(b"new")
    target.write_bytes(b"old")

    def killed(source, target):
        Path(target).write_bytes(b"n")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("shutil.copyfile", killed)
        with pytest.raises(KeyboardInterrupt):
            checkpoint_utils.PathManager.copy(str(source), str(target), overwrite=True)
    assert target.read_bytes() == b"old"
    assert {*tmp_path.iterdir()} == {source, target}, "half a copy may fill the disk"
    assert checkpoint_utils.PathManager.copy(str(source), str(target), overwrite=True)
    assert target.read_bytes() == b"new"
