"""What is asked of a checkpoint before its weights are read."""

from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fairseq_moe_ext.errors import UserError
from fairseq_moe_ext.evaluation.loading import check_path, most_tokens
from fairseq_moe_ext.inspection import inspecting
from fairseq_moe_ext.priming import protocol, resuming

PARTS = ("X[1]-rank-0.pt", "X[1]-shared.pt")


@pytest.fixture
def branch(tmp_path):
    """X[1].pt, as the branch's processes write it."""
    for name in PARTS:
        torch.save({"model": {}}, tmp_path / name)
    return tmp_path / "X[1].pt"


def test_a_name_may_have_any_character(branch):
    check_path(branch)
    settings = protocol.Settings()
    args = SimpleNamespace(path=branch, data=branch.parent, folder=branch.parent, json=None)
    args.context = args.fp16 = args.bf16 = args.model_overrides = None
    assert [*resuming.asked(args, settings, [])["checkpoint"]] == [*PARTS]


@pytest.mark.parametrize("beside", ["Y-notes.txt", "Y-notes.pt"])
def test_other_files_are_no_part_of_a_checkpoint(tmp_path, beside):
    (tmp_path / beside).write_text("x")
    with pytest.raises(UserError, match=r"^--path .*Y\.pt: no such checkpoint"):
        check_path(tmp_path / "Y.pt")


def test_a_file_of_something_else_is_refused(tmp_path):
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(UserError, match="list.pt: not a fairseq checkpoint"):
        most_tokens(tmp_path / "list.pt", {})


@pytest.mark.parametrize("saved, overrides, most", [
    ({"tokens_per_sample": 8, "max_target_positions": 16}, {}, 16),
    ({"tokens_per_sample": 8, "max_target_positions": None}, {}, 8),
    ({"tokens_per_sample": 8}, {"max_target_positions": 4}, 4),
    ({"decoder_layers": 2}, {}, None),
])  # fmt: skip
def test_the_context_is_read_without_the_weights(tmp_path, monkeypatch, saved, overrides, most):
    monkeypatch.setattr("fairseq.checkpoint_utils.load_checkpoint_to_cpu", pytest.fail)
    torch.save({"model": {}, "args": Namespace(**saved)}, tmp_path / "a.pt")
    assert most_tokens(tmp_path / "a.pt", overrides) == most


def test_updates_are_read_without_the_weights(tmp_path, monkeypatch):
    monkeypatch.setattr("fairseq.checkpoint_utils.load_checkpoint_to_cpu", pytest.fail)
    torch.save({"model": {}, "optimizer_history": [{"num_updates": 7}]}, tmp_path / "a.pt")
    assert inspecting._updates(Path(tmp_path / "a.pt")) == 7
