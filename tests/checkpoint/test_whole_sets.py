"""Evaluation and validation on N processes are of the whole set, and read each file once."""

import os
import shutil
import sys

import pytest
import torch
from fairseq import options
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.logging import progress_bar
from fairseq.trainer import Trainer
from fairseq_cli import train as fairseq_train
from fairseq_cli import validate as fairseq_validate
from processes import run_processes
from training import (
    EVAL,
    TRAIN,
    error_of,
    eval_lm_command,
    manifest_of,
    perplexity,
    settings,
    train_on,
)

from fairseq_moe_ext import fingerprint
from fairseq_moe_ext.branch import files as branch_files
from fairseq_moe_ext.errors import UserError


@pytest.mark.parametrize("writers, experts", [(1, 4), (2, 4), (4, 2)])
def test_evaluation_on_any_number_of_processes(data, runs, writers, experts):
    folder, _ = runs(writers, experts)
    line = f"{data} {EVAL} --path {folder}/checkpoint_last.pt"
    line += " --model-overrides {'moe_eval_capacity_token_fraction':1.0}"
    one = perplexity(0, 1, line)
    assert 1 < one < 25
    for world in (2, 4):
        for many in run_processes(world, perplexity, world, line):
            assert many == pytest.approx(one, rel=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        "--batch-size 16",  # one batch: more processes than that
        "--batch-size 2 --context-window 3",
        "--add-bos-token --tokens-per-sample 6",
        "--remove-bpe",
    ],
)
def test_evaluation_counts_every_token_once(data, runs, tmp_path, monkeypatch, options):
    """As stock does on one process."""
    folder = shutil.copytree(data, tmp_path / "data")
    words = (folder / "dict.txt").read_text()
    (folder / "dict.txt").write_text(words.replace("w3 ", "w3@@ ").replace("w7 ", "w7@@ "))
    run = shutil.copytree(runs(2, 4)[0], tmp_path / "run")
    state = torch.load(run / "checkpoint_last.pt", weights_only=False)
    del state["task_state"][fingerprint.KEY]  # or that dictionary would be refused
    torch.save(state, run / "checkpoint_last.pt")
    line = f"{folder} {EVAL} --path {run}/checkpoint_last.pt {options}"
    line += " --model-overrides {'moe_eval_capacity_token_fraction':1.0}"
    one = perplexity(0, 1, line)
    for world in (2, 4):
        for many in run_processes(world, perplexity, world, line):
            assert many == pytest.approx(one, rel=1e-6)
    eval_lm = eval_lm_command()
    monkeypatch.setattr(eval_lm, "eval_lm", eval_lm.eval_lm.__wrapped__)
    assert one == pytest.approx(perplexity(0, 1, line), rel=1e-6)


def validated(rank, world, line):
    """inner_loss a token over the whole valid set, in nats, after one update."""
    sums = []
    stock = Trainer._reduce_and_log_stats

    def record(self, logs, sample_size, grad_norm=None):
        if grad_norm is None:
            sums.append((sum(float(log["inner_loss"]) for log in logs), float(sample_size)))
        return stock(self, logs, sample_size, grad_norm)

    with pytest.MonkeyPatch.context() as context:
        context.setattr(Trainer, "_reduce_and_log_stats", record)
        fairseq_train.main(settings(line, rank, world))
    loss, tokens = (sum(values) for values in zip(*sums))
    assert tokens == 80  # each once
    return loss / tokens


@pytest.mark.parametrize("backend", ["legacy_ddp", "pytorch_ddp", "fully_sharded"])
def test_validation_is_of_the_whole_set(data, tmp_path, backend):
    """In three batches, so that some processes have none."""
    line = f"{data} {TRAIN} --moe-expert-count 4 --save-dir {tmp_path} --no-save --max-update 1"
    line = line.replace(" --disable-validation", "") + " --batch-size 2 --batch-size-valid 4"
    line += " --lr 1e-30 --moe-eval-capacity-token-fraction 1.0"
    one = validated(0, 1, line)
    for world in (2, 4):
        many = run_processes(world, validated, world, f"{line} --ddp-backend {backend}")
        assert many == pytest.approx([one] * world, rel=1e-6)


def validated_by_command(rank, world, line):
    """What fairseq-validate prints at the end."""
    printed = []
    parser = options.get_validation_parser()
    line += f" --distributed-world-size {world} --distributed-rank {rank}"
    sys.argv[1:] = line.split()
    cfg = convert_namespace_to_omegaconf(options.parse_args_and_arch(parser, line.split()))
    with pytest.MonkeyPatch.context() as context:
        context.setattr(
            progress_bar.NoopProgressBar, "print", lambda self, stats, **kw: printed.append(stats)
        )
        fairseq_validate.main(cfg)
    return float(printed[0]["inner_loss"]), float(printed[0]["ppl"])


@pytest.mark.parametrize("model", ["--moe-expert-count 4", "--arch dense_lm_tiny --moe-freq 0"])
def test_fairseq_validate_is_of_the_whole_set(data, tmp_path, model):
    """In three batches, so that some processes have one less, or none."""
    line = f"{data} {TRAIN} {model} --max-update 1 --moe-eval-capacity-token-fraction 1.0"
    train_on(1, f"{line} --save-dir {tmp_path}")
    line = f"{data} {EVAL.replace('--gen-subset', '--valid-subset')}"
    line = line.replace("--tokens-per-sample 8", "--task language_modeling")
    line += f" --path {tmp_path}/checkpoint_last.pt"
    one = validated_by_command(0, 1, line)
    for world in (2, 4):
        many = run_processes(world, validated_by_command, world, line)
        assert many == [pytest.approx(one, rel=1e-3)] * world  # as printed


def files_read(rank, world, path, line):
    """Names of the files that an evaluation loads, in this process."""
    branch_files.find(path)  # whether it is the branch's: kept for as long as the process lives
    names, stock = [], torch.load

    def load(file, *args, **kwargs):
        names.append(os.path.basename(getattr(file, "name", file)))
        return stock(file, *args, **kwargs)

    with pytest.MonkeyPatch.context() as context:
        context.setattr(torch, "load", load)
        perplexity(rank, world, f"{line} --path {path}")
    return sorted(names)


def test_each_file_is_read_once(data, runs):
    """And on two processes, no process reads the other's experts."""
    folder, _ = runs(2, 4)
    path, line = str(folder / "checkpoint_last.pt"), f"{data} {EVAL}"
    files = manifest_of(folder / "checkpoint_last.pt").files
    experts = [os.path.basename(file.name) for file in files]
    assert files_read(0, 1, path, line) == sorted(["checkpoint_last.pt", *experts])
    for rank, names in enumerate(run_processes(2, files_read, 2, path, line)):
        assert names == sorted(["checkpoint_last.pt", experts[rank]])


def test_from_pretrained(data, runs):
    """The same numbers from a checkpoint of two processes as from its experts in one file."""
    from fairseq_moe_ext.models.language_model import MoETransformerLanguageModel

    folder, _ = runs(2, 4)
    hub = MoETransformerLanguageModel.from_pretrained(str(folder), "checkpoint_last.pt", data)
    state = hub.models[0].state_dict()
    manifest = manifest_of(folder / "checkpoint_last.pt")
    pieces = [torch.load(folder / file.name, weights_only=True) for file in manifest.files]
    for name in manifest.indices:
        assert torch.equal(state[name], torch.cat([piece["model"][name] for piece in pieces]))
    assert hub.score("w1 w2 w3")["positional_scores"].shape == (3,)
    with pytest.raises(UserError, match="nowhere: no such folder"):
        type(hub.models[0]).from_pretrained("nowhere")


def test_experts_that_the_processes_cannot_hold(data, runs):
    folder, _ = runs(1, 3)
    line = f"{data} {EVAL} --path {folder}/checkpoint_last.pt"
    for message in run_processes(2, error_of, perplexity, 2, line):
        assert "3 cannot be sharded over 2 processes" in message
