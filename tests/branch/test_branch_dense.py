"""Dense models of the branch, all in one file."""

import math
from pathlib import Path

import branch_files
import pytest
import torch
from branch_checkpoints import (
    NOT_OURS,
    SMALL,
    TRAIN,
    USER_DIR,
    loaded_logits,
    remembered,
    run,
    tokens,
)
from fairseq.data import indexed_dataset
from fairseq.trainer import Trainer
from small_models import VOCABULARY, build_model

from fairseq_moe_ext.priming import model as priming_model


def write_dense(folder, **how):
    """A dense checkpoint of the branch and the model of ours with the same weights."""
    settings = {**SMALL, "moe_freq": 0, "moe_expert_count": 0}
    flags = {key: value for key, value in settings.items() if key not in NOT_OURS}
    model = build_model(**flags).eval()
    Path(folder).mkdir(exist_ok=True)
    branch_files.write_dense(
        str(folder), settings, VOCABULARY, branch_files.of_model(model), optimizer=remembered, **how
    )
    return model


@pytest.fixture(scope="module")
def log_probs(data):
    """Of the validation set, sentence by sentence, by a model: the truth, in a loop."""
    dataset = indexed_dataset.make_dataset(str(Path(data) / "valid"), "mmap")

    def mean(model):
        total, count = 0.0, 0
        for sentence in dataset:
            inputs = torch.cat([sentence[-1:], sentence[:-1]])[None].long()
            with torch.no_grad():
                found = model.double()(inputs)[0].log_softmax(-1)[0]
            total -= float(found[torch.arange(len(sentence)), sentence.long()].sum())
            count += len(sentence)
        return total / count / math.log(2)

    return mean


@pytest.mark.parametrize(
    "how",
    [
        {},
        *(
            pytest.param(how, marks=pytest.mark.slow)
            for how in ({"old_args": True}, {"zipped": False})
        ),
    ],
    ids=str,
)
def test_all_commands_read_a_dense_file(
    tmp_path, data, log_probs, capsys, monkeypatch, caplog, how
):
    model = write_dense(tmp_path / "run", **how)
    path = tmp_path / "run" / "model.pt"
    logits = loaded_logits(0, str(tmp_path / "run"), data, {})
    torch.testing.assert_close(logits, model(tokens())[0], rtol=1e-5, atol=1e-6)
    expected = log_probs(model)
    line = f"{data} --user-dir {USER_DIR} --path {path} --cpu --batch-size 1"
    evaluated = f"{line} --gen-subset valid --sample-break-mode eos --tokens-per-sample 64"
    with caplog.at_level("INFO"):
        assert run(capsys, "eval_lm", evaluated)[0] == 0
        assert f"Loss (base 2): {expected:.4f}" in caplog.text
    # without --task: the command goes by the checkpoint's
    monkeypatch.setattr("fairseq_cli.validate.reset_logging", lambda: None)
    status, err = run(capsys, "validate", f"{line} --num-workers 0")
    assert status == 0, err
    generated = f"{line} --gen-subset valid --sample-break-mode eos --beam 1 --prefix-size 2"
    generated += " --task language_modeling --max-len-b 5 --tokens-per-sample 64"
    status, err = run(capsys, "generate", generated)
    assert status == 0, err
    model_of_ours = priming_model.load(path, Path(data), cpu=True)
    torch.testing.assert_close(
        model_of_ours(tokens())[0], model.float()(tokens())[0], rtol=1e-5, atol=1e-6
    )


def test_training_goes_on_from_a_dense_file(tmp_path, data, capsys, monkeypatch):
    """With what the optimizer remembers of each parameter, though the branch numbers them in
    another order; its criterion must be the same, as stock asks."""
    model = write_dense(tmp_path / "run")
    names = [name for name, _ in model.named_parameters()]
    line = TRAIN.replace("moe_lm_tiny", "dense_lm_tiny").replace("--moe-expert-count 4", "")
    line = f"{data} {line} --tokens-per-sample 16"
    line += f" --max-target-positions 64 --restore-file {tmp_path / 'run' / 'model.pt'}"
    found = {}
    stock = Trainer.load_checkpoint

    def load_checkpoint(self, *args, **kwargs):
        stock(self, *args, **kwargs)
        found.update(self.optimizer.state_dict()["state"])
        raise SystemExit(0)

    monkeypatch.setattr(Trainer, "load_checkpoint", load_checkpoint)
    assert run(capsys, "train", f"{line} --save-dir {tmp_path / 'new'}") == (0, "")
    for number, name in enumerate(names):
        expected = remembered(name, dict(model.named_parameters())[name].shape)
        assert torch.equal(found[number]["exp_avg"], expected["exp_avg"]), name
