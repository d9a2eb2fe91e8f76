"""What the files of a checkpoint hold: experts in files of their own, each written once."""

from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from processes import run_processes
from training import (
    EVAL,
    GLOBAL_BATCH,
    SAVED,
    TRAIN,
    copy_of,
    error_of,
    expert_files,
    manifest_of,
    perplexity,
    referred_files,
    train,
    train_on,
)

from fairseq_moe_ext.checkpoint import cleanup
from fairseq_moe_ext.checkpoint.format import MANIFEST, VERSION, Manifest, Piece
from fairseq_moe_ext.kernels.stacks import scale_gradient
from fairseq_moe_ext.models import language_model
from fairseq_moe_ext.moe.experts import Experts, GroupedLinear


class WiderExperts(Experts):
    """Experts with a matrix more than ours."""

    def __init__(self, num_experts, dim, *args, first=0, **options):
        super().__init__(num_experts, dim, *args, first=first, **options)
        self.fc3 = GroupedLinear(num_experts, dim, dim, first)

    def forward(self, x, counts):
        stacks = (scale_gradient(p, self.grad_scale) for p in self.fc3.parameters())
        parts = zip(x.split(counts), *stacks)
        return super().forward(x, counts) + torch.cat([F.linear(*part) for part in parts])


def train_wider(rank, world, line):
    with mock.patch("fairseq_moe_ext.moe.layer.Experts", WiderExperts):
        return train(rank, world, line, GLOBAL_BATCH // world)


def test_a_matrix_more_of_the_experts_is_saved_with_them(data, tmp_path):
    """Trained, saved and loaded by one definition of what is an expert's."""
    line = f"{data} {TRAIN} --moe-expert-count 4 --save-dir {tmp_path}"
    often = f"--save-interval-updates {SAVED} --keep-interval-updates -1"
    losses = run_processes(2, train_wider, 2, f"{line} {often}")[0]
    path = tmp_path / f"checkpoint_1_{SAVED}.pt"
    assert "decoder.layers.1.moe_layer.experts.fc3.weight" in manifest_of(path).indices
    again = f"{line} --restore-file {path} --no-save"
    assert run_processes(2, train_wider, 2, again)[0] == losses[SAVED:]
    assert train_wider(0, 1, again) == pytest.approx(losses[SAVED:], rel=1e-5)


def save_marked_wrong(rank, line):
    with mock.patch.object(language_model, "mark_experts", lambda model: True):
        return error_of(rank, train, 2, line)


def test_what_is_named_and_what_is_marked_as_an_expert_s_agree(data, tmp_path):
    line = f"{data} {TRAIN} --moe-expert-count 4 --save-dir {tmp_path} --max-update 1"
    for error in run_processes(2, save_marked_wrong, line):
        assert "marked as an expert's parameter or named as one, not both" in error
    assert not list(tmp_path.glob("*.pt"))


def test_one_process_writes_the_file_of_stock(data, runs):
    folder, _ = runs(1, 4)
    state = torch.load(folder / "checkpoint_last.pt", weights_only=True)
    assert "experts" not in state and not (folder / "experts").exists()
    assert len(state["model"]["decoder.layers.1.moe_layer.experts.fc1.weight"]) == 4


def test_each_process_writes_its_own_experts_once(data, runs):
    for world, experts, files in ((2, 4, 2), (4, 2, 2)):
        folder, _ = runs(world, experts)
        state = torch.load(folder / "checkpoint_last.pt", weights_only=True)
        assert not any(".experts." in name for name in state["model"])
        manifest = Manifest.read("", state)
        assert len(manifest.files) == files and manifest.world_size == world
        saved = state["last_optimizer_state"]
        assert not set(manifest.indices.values()) & set(saved["state"])
        for i, file in enumerate(manifest.files):
            assert (file.first, file.count) == (i * experts // 2, experts // 2)
            piece = Piece.read(torch.load(folder / file.name, weights_only=True))
            assert piece.model.keys() == piece.optimizer.keys()
            assert {len(value) for value in piece.model.values()} == {experts // 2}
        assert expert_files(folder) == referred_files(folder)


def test_a_newer_format_is_refused(data, runs, tmp_path):
    path, _ = copy_of(runs, tmp_path)
    state = torch.load(path, weights_only=True)
    state[MANIFEST]["format"] = VERSION + 1
    torch.save(state, path)
    assert "install the version" in error_of(0, perplexity, 1, f"{data} {EVAL} --path {path}")


def test_stale_files_go_and_unreadable_checkpoints_keep_all(data, tmp_path, caplog):
    line = f"{data} {TRAIN} --moe-expert-count 4 --save-dir {tmp_path}"
    train_on(2, f"{line} --max-update 2")
    folder = tmp_path / "experts"
    stale = folder / "1-1-0123456789abcdef-0-2.pt"
    for path in (stale, stale.with_suffix(".pt.tmp"), folder / "notes.txt"):
        path.write_text("")
    (tmp_path / "other.pt").write_text("not a checkpoint")
    cleanup.remove_unused_files(str(tmp_path))
    assert stale.exists()
    assert "other.pt cannot be read (" in caplog.text
    (tmp_path / "other.pt").unlink()
    used = referred_files(tmp_path)
    cleanup.remove_unused_files(str(tmp_path))
    assert expert_files(tmp_path) == used | {"notes.txt"} and len(used) == 2
    train_on(1, f"{line} --max-update 4")  # a single file takes the place of theirs
    assert expert_files(tmp_path) == {"notes.txt"}
