"""A training that diverges ends in one line with the last good checkpoint, which stays good."""

import pytest
import torch
from fairseq.trainer import Trainer
from training import USER_DIR, fairseq

from fairseq_moe_ext.diverging import REMEDY, check_weights, what_is_wrong
from fairseq_moe_ext.errors import UserError

NAN, INFINITY = float("nan"), float("inf")
DENSE = "--arch dense_lm_tiny"
MOE = "--arch moe_lm_tiny --moe-expert-count 2"
STOCK = "--arch transformer_lm"
RUN = """--task mixture_language_modeling --criterion moe_cross_entropy --tokens-per-sample 32
    --decoder-layers 2 --decoder-embed-dim 16 --decoder-ffn-embed-dim 16 --batch-size 8
    --decoder-attention-heads 2 --optimizer sgd --lr 0.01 --cpu --num-workers 0
    --no-epoch-checkpoints"""


def train(data, folder, flags):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOGLEVEL", "DEBUG")  # no one-line errors, but the exceptions
        fairseq(f"fairseq-train {data} {RUN} --save-dir {folder} {flags} --user-dir {USER_DIR}")


def poison(monkeypatch, after, name, value=NAN):
    """After so many updates a weight goes bad, as an update that is too large makes it."""
    stock = Trainer.train_step

    def train_step(self, *args, **kwargs):
        found = stock(self, *args, **kwargs)
        if self.get_num_updates() == after:
            with torch.no_grad():
                next(p for n, p in self.model.named_parameters() if name in n).view(-1)[0] = value
        return found

    monkeypatch.setattr(Trainer, "train_step", train_step)


def finite(path):
    state = torch.load(path, weights_only=False)
    return all(
        value.isfinite().all()
        for name, value in state["model"].items()
        if not name.endswith("_float_tensor")
    )


@pytest.mark.parametrize("architecture", [DENSE, MOE, STOCK])
def test_nan_in_a_weight_ends_the_next_update(data, tmp_path, monkeypatch, architecture):
    poison(monkeypatch, 4, "layers.0.fc1.weight")
    flags = f"{architecture} --max-update 9 --save-interval-updates 2"
    with pytest.raises(UserError) as error:
        train(data, tmp_path, flags)
    message = str(error.value)
    last = tmp_path / "checkpoint_last.pt"
    state = torch.load(last, weights_only=False)
    assert state["optimizer_history"][-1]["num_updates"] == 2 and finite(last)
    assert "NaN or infinity" in message or "is nan" in message, "saving or validating found it"
    assert "the last good checkpoint is " in message and "\n" not in message
    assert all(finite(path) for path in tmp_path.glob("checkpoint*.pt"))


@pytest.mark.parametrize("architecture", [DENSE, MOE, STOCK])
def test_a_loss_that_is_nan_ends_training(data, tmp_path, monkeypatch, architecture):
    poison(monkeypatch, 3, "layers.0.fc1.weight")
    flags = f"{architecture} --max-update 9 --save-interval-updates 2"
    with pytest.raises(UserError, match="diverged") as error:
        train(data, tmp_path, flags)
    assert f"the last good checkpoint is {tmp_path}/checkpoint_" in str(error.value)
    assert "\n" not in str(error.value)
    assert finite(tmp_path / "checkpoint_last.pt")


NORMS = (
    "Fatal error: gradients are inconsistent between workers. Try --ddp-backend=legacy_ddp. Or\n"
)
NORMS += "-" * 80 + "\ngrad_norm across the workers:\n"


def test_gradients_that_differ_between_gpus_are_no_divergence():
    text = NORMS + "rank   0 = 1.25000000\nrank   1 = 1.50000000\n\n"
    assert what_is_wrong(text).endswith("norm is 1.25000000 on process 0, 1.50000000 on process 1)")
    text = NORMS + "rank   0 = nan\nrank   1 = inf\n\n"
    assert what_is_wrong(text) == f"the gradients are NaN or infinite: {REMEDY}"
    assert (
        what_is_wrong("\nMinimum loss scale reached: \n") == f"Minimum loss scale reached: {REMEDY}"
    )


def test_there_may_be_no_checkpoint_yet(data, tmp_path, monkeypatch):
    poison(monkeypatch, 1, "layers.0.fc1.weight")
    with pytest.raises(UserError, match=f"there is no checkpoint in {tmp_path} yet"):
        train(data, tmp_path, f"{DENSE} --max-update 9")


def test_weights_are_looked_at_where_nothing_validates(data, tmp_path, monkeypatch):
    poison(monkeypatch, 4, "embed_tokens", INFINITY)
    flags = f"{DENSE} --max-update 9 --save-interval-updates 2 --disable-validation"
    with pytest.raises(UserError, match="so .*checkpoint_1_4.pt is not written: .*_1_2.pt|_last"):
        train(data, tmp_path, flags)
    assert not (tmp_path / "checkpoint_1_4.pt").exists()
    assert finite(tmp_path / "checkpoint_last.pt")


def test_a_checkpoint_with_nan_is_not_gone_on_from(data, tmp_path):
    train(data, tmp_path, f"{DENSE} --max-update 1")
    last = tmp_path / "checkpoint_last.pt"
    state = torch.load(last, weights_only=False)
    state["model"]["decoder.layer_norm.weight"][3] = NAN
    torch.save(state, last)
    for flags in ("", f"--restore-file {last} --reset-optimizer", f"--finetune-from-model {last}"):
        folder = tmp_path / "tuned" if "finetune" in flags else tmp_path
        with pytest.raises(UserError, match="checkpoint_last.pt: decoder.layer_norm.weight holds"):
            train(data, folder, f"{DENSE} --max-update 2 {flags}")


def test_what_counts_as_a_weight():
    good = {"a": torch.ones(3), "n": torch.tensor(3), "e": torch.ones(0), "h": torch.ones(2).half()}
    marker = {"embed_positions._float_tensor": torch.tensor([NAN])}
    check_weights({**good, **marker}.items(), "x.pt", saving=True)
    for bad in (NAN, INFINITY, -INFINITY):
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            weights = {**good, "w": torch.tensor([1.0, bad], dtype=dtype)}
            with pytest.raises(UserError, match="^w holds NaN or infinity, so x.pt is not"):
                check_weights(weights.items(), "x.pt", saving=True)
