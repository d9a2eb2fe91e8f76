"""What a training begins from, and that it has its --save-dir for itself."""

import os
from types import SimpleNamespace

import pytest
import torch
from command_runs import EVAL, MOE, TRAIN
from training import error_in

from fairseq_moe_ext.checkpoint.starting import check_inputs, named
from fairseq_moe_ext.errors import UserError
from fairseq_moe_ext.locks import Lock


@pytest.fixture
def train(command, data):
    def run(arguments):
        status, log, out, err = command("train", f"{data} {TRAIN} {MOE} {arguments}")
        return status, [line for line in err.splitlines() if line.startswith("error: ")], log

    return run


def test_a_second_training_in_a_folder_is_refused(train, tmp_path):
    with Lock(tmp_path / "lock", "it"):
        status, errors, _ = train(f"--save-dir {tmp_path}")
        assert status == 1 and len(errors) == 1
        assert f"--save-dir {tmp_path} is being worked on by PID {os.getpid()} on" in errors[0]
        assert [path.name for path in tmp_path.iterdir()] == ["lock"]
        assert train(f"--save-dir {tmp_path} --no-save")[0] == 0
    for _ in range(2):  # the same process may go on
        assert train(f"--save-dir {tmp_path}")[0] == 0
    assert not (tmp_path / "lock").exists()


def test_a_training_that_fails_lets_the_folder_go(train, tmp_path, monkeypatch):
    from fairseq.trainer import Trainer

    def fail(self, samples, **kwargs):
        assert (tmp_path / "lock").exists()
        raise ZeroDivisionError

    monkeypatch.setattr(Trainer, "train_step", fail)
    with pytest.raises(ZeroDivisionError):
        train(f"--save-dir {tmp_path}")
    assert not (tmp_path / "lock").exists()


def absent(folder):
    return folder / "typo.pt"


def broken_link(folder):
    (folder / "link.pt").symlink_to(folder / "nowhere.pt")
    return folder / "link.pt"


def fifo(folder):
    os.mkfifo(folder / "fifo.pt")
    return folder / "fifo.pt"


def a_folder(folder):
    (folder / "folder.pt").mkdir()
    return folder / "folder.pt"


@pytest.mark.parametrize("flag", ["--restore-file", "--finetune-from-model", "--continue-once"])
@pytest.mark.parametrize("make", [absent, broken_link, fifo, a_folder])
def test_a_named_file_that_is_none_stops_the_run(flag, make, train, tmp_path):
    path = make(tmp_path)
    status, errors, log = train(f"--save-dir {tmp_path}/run {flag} {path}")
    assert status == 1 and len(errors) == 1 and f"error: {flag} {path}: " in errors[0]
    assert "begin training epoch" not in log
    assert not list((tmp_path / "run").glob("*.pt"))


@pytest.mark.parametrize("make", [broken_link, fifo, a_folder])
def test_a_last_checkpoint_that_is_none_stops_the_run(make, train, tmp_path):
    os.rename(make(tmp_path), tmp_path / "checkpoint_last.pt")
    status, errors, _ = train(f"--save-dir {tmp_path}")
    assert status == 1 and len(errors) == 1 and "checkpoint_last.pt" in errors[0]


def test_what_is_there_is_used_and_the_default_may_be_absent(train, trained, tmp_path):
    last = trained / "checkpoint_last.pt"
    for number, flag in enumerate(("--restore-file", "--finetune-from-model", "--continue-once")):
        line = f"--save-dir {tmp_path}/{number} {flag} {last} --max-update 9"
        status, _, log = train(line)
        assert status == 0 and f"Loaded checkpoint {last}" in log
    # a start that went on does not need what it began from
    status, _, log = train(f"--save-dir {tmp_path}/1 --finetune-from-model {tmp_path}/removed.pt")
    assert status == 0 and f"Loaded checkpoint {tmp_path}/1/checkpoint_last.pt" in log
    assert train(f"--save-dir {tmp_path}/new --restore-file checkpoint_last.pt")[0] == 0


def test_a_start_from_weights_alone_is_warned_of(train, trained, tmp_path):
    """Where the count of updates and the rate begin anew."""
    state = torch.load(trained / "checkpoint_last.pt", weights_only=False)
    weights = tmp_path / "weights.pt"
    torch.save({**state, "last_optimizer_state": None}, weights)
    for number, flag in enumerate(("--restore-file", "--finetune-from-model")):
        line = f"--save-dir {tmp_path}/{number} {flag} {weights} --max-update 7"
        status, _, log = train(f"{line} --lr-scheduler polynomial_decay --total-num-update 99")
        assert status == 0 and "was trained with fixed" not in log
        said = f"{weights}: has no optimizer state: the optimizer and the schedule start anew, at "
        assert (said in log) == (flag == "--restore-file")


OTHER = "--decoder-attention-heads 4 --moe-score sigmoid --no-scale-embedding"
TOLD = "trained with other model flags: --moe-score softmax (here sigmoid), "
TOLD += "--decoder-attention-heads 2 (here 4), --no-scale-embedding False (here True): its weights"


@pytest.mark.parametrize("flag", ["--finetune-from-model", "--restore-file", "--continue-once"])
def test_a_start_from_other_model_flags_is_warned_of_once(train, trained, tmp_path, flag):
    last = trained / "checkpoint_last.pt"
    free = "--dropout 0.3 --moe-dropless --moe-balance none --checkpoint-activations"
    free += " --tokens-per-sample 8 --batch-size 2 --moe-top-k 2 --moe-second-expert-policy all"
    line = f"--save-dir {tmp_path}/run {flag} {last} --max-update 7 {free}"
    status, _, log = train(f"{line} {OTHER}")
    assert status == 0 and log.count(TOLD) == 1 and f"{last}: {TOLD}" in log
    status, _, log = train(f"--save-dir {tmp_path}/run {free} --max-update 8")  # resumes it
    assert status == 0 and log.count("trained with other model flags") == 1
    assert "--decoder-attention-heads 4 (here 2)" in log
    status, _, log = train(f"--save-dir {tmp_path}/free {flag} {last} --max-update 7 {free}")
    assert status == 0 and f"Loaded checkpoint {last}" in log and "other model flags" not in log


def test_other_gradients_of_experts_are_warned_of_where_their_optimizer_goes_on(
    train, trained, tmp_path
):
    last = trained / "checkpoint_last.pt"
    saved = torch.load(last, weights_only=False)["cfg"]["model"]
    before, experts = saved["moe_normalize_expert_grad"], saved["moe_expert_count"]
    other = "--moe-normalize-expert-grad sqrt_num_experts"
    told = f"{other}: {last} was trained with {before} on one process: the experts' gradients"
    for number, (flags, words) in enumerate(
        (
            (f"--restore-file {last} {other}", f"{told} are {experts**-0.5:.3g} times as large"),
            (f"--restore-file {last} --reset-optimizer {other}", ""),
            (f"--finetune-from-model {last} {other}", ""),
            (f"--restore-file {last}", ""),
            # one process: the mean and the sum by its root are one
            (f"--restore-file {last} --moe-normalize-expert-grad sqrt_world_size", ""),
        )
    ):
        status, _, log = train(f"--save-dir {tmp_path}/{number} {flags} --max-update 7")
        assert status == 0 and log.count("the experts' gradients are") == bool(words)
        assert words in log


def test_the_suffix_of_a_shard_counts(tmp_path):
    cfg = SimpleNamespace(save_dir=str(tmp_path), restore_file=f"{tmp_path}/x.pt")
    cfg.finetune_from_model, cfg.no_save = None, False
    (tmp_path / "x-shard0.pt").touch()
    check_inputs(cfg, "-shard0")
    with pytest.raises(UserError, match="--restore-file .*/x.pt: no such file"):
        check_inputs(cfg)
    assert named(cfg, "-shard0") == ("--restore-file", f"{tmp_path}/x.pt")
    cfg.restore_file = f"{tmp_path}/checkpoint_last.pt"  # the shard of the run's own
    assert named(cfg, "-shard0") is None


@pytest.mark.parametrize("make", [absent, broken_link, fifo, a_folder])
def test_evaluation_of_what_is_no_file(make, command, data, tmp_path):
    path = make(tmp_path)
    status, _, _, err = command("eval_lm", f"{data} {EVAL} --path {path}")
    assert status == 1 and str(path) in error_in(err)
