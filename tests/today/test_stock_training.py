"""Stock fairseq trains in half precision, resumes, and keeps its patience."""

import shutil

import pytest
import torch
from stock_commands import TRAIN, on_cpu_only

import fairseq_moe_ext  # noqa: F401 - it keeps stock's patience, and prints errors
from fairseq_today.torch_today import load_weights_only as load

PRECISIONS = ["--fp16", "--memory-efficient-fp16", "--bf16", "--memory-efficient-bf16"]


@pytest.mark.parametrize(
    "precision",
    [pytest.param(p, marks=[pytest.mark.slow] if p in PRECISIONS[::3] else []) for p in PRECISIONS],
)
def test_half_precision_trains_and_resumes(command, work, tmp_path, precision):
    line = f"bin {TRAIN} {precision} --save-dir {tmp_path}"
    assert command("train", f"{line} --max-update 2")[0] == 0
    first = torch.load(tmp_path / "checkpoint_last.pt", weights_only=True)
    assert command("train", f"{line} --max-update 4")[0] == 0
    saved = torch.load(tmp_path / "checkpoint_last.pt", weights_only=True)
    assert saved["optimizer_history"][-1]["num_updates"] == 4
    weight = saved["model"]["decoder.layers.0.fc1.weight"]  # saved as float32 by fairseq
    half = torch.bfloat16 if "bf16" in precision else torch.float16
    assert weight.equal(weight.to(half).float())
    assert not weight.equal(first["model"]["decoder.layers.0.fc1.weight"])  # it did train


@on_cpu_only
@pytest.mark.parametrize(
    "precision", [PRECISIONS[0], pytest.param(PRECISIONS[1], marks=pytest.mark.slow)]
)
def test_a_gradient_overflow_is_skipped_on_cpu(command, work, tmp_path, caplog, precision):
    line = f"bin {TRAIN} {precision} --save-dir {tmp_path} --max-update 2"
    with caplog.at_level("INFO"):
        status, _ = command("train", f"{line} --fp16-init-scale 1073741824")
    assert status == 0
    assert "gradient overflow detected" in caplog.text


def test_a_tpu_is_still_a_tpu(capsys):
    from fairseq import options

    parse = options.parse_args_and_arch
    arguments = ["bin", "--task", "language_modeling", "--arch", "transformer_lm_gpt2_tiny"]
    assert parse(options.get_training_parser(), [*arguments, "--bf16"]).tpu is False
    assert parse(options.get_training_parser(), [*arguments, "--bf16", "--tpu"]).tpu is True
    with pytest.raises(SystemExit):
        parse(options.get_training_parser(), [*arguments, "--bf16", "--fp16"])
    assert capsys.readouterr().err.startswith("error: --fp16 and --bf16")


def test_a_second_job_knows_nothing_of_the_first(command, work, tmp_path):
    good = f"bin {TRAIN} --max-update 3 --patience 1 --lr 0.01 --save-dir {tmp_path / 'good'}"
    bad = f"bin {TRAIN} --max-update 3 --patience 1 --lr 0.0000001 --save-dir {tmp_path / 'bad'}"
    assert command("train", good)[0] == 0
    assert command("train", bad)[0] == 0
    assert (tmp_path / "bad" / "checkpoint_best.pt").exists()
    best = [
        torch.load(tmp_path / run / "checkpoint_best.pt", weights_only=True)["extra_state"]
        for run in ("good", "bad")
    ]
    assert best[0]["best"] < best[1]["best"] == best[1]["val_loss"]
    import fairseq_cli.train

    assert fairseq_cli.train.should_stop_early.best == best[1]["best"]


def test_patience_goes_on_where_it_was(command, work, tmp_path):
    """Nothing is learned, so no validation after the first, at update 2, is better: with
    --patience 3 the run ends at update 8, also when it was killed after update 4."""
    flags = "--lr 1e-30 --max-update 20 --save-interval-updates 2 --batch-size 1 --patience 3"
    line = f"bin {TRAIN} {flags} --save-dir"

    def updates(folder):
        assert command("train", f"{line} {folder}")[0] == 0
        state = torch.load(folder / "checkpoint_last.pt", weights_only=True)
        return state["optimizer_history"][-1]["num_updates"], state["extra_state"]

    whole, last = updates(tmp_path / "whole")
    (tmp_path / "killed").mkdir()
    shutil.copy(
        tmp_path / "whole" / "checkpoint_1_4.pt", tmp_path / "killed" / "checkpoint_last.pt"
    )
    killed, resumed = updates(tmp_path / "killed")
    assert whole == killed == 8
    assert last["should_stop_early"] == resumed["should_stop_early"]
    assert last["should_stop_early"] == {"best": last["best"], "num_runs": 3}
    # of before, with the best loss alone: updates 6, 8 and 10 are no better
    old = torch.load(tmp_path / "whole" / "checkpoint_1_4.pt", weights_only=True)
    del old["extra_state"]["should_stop_early"]
    (tmp_path / "old").mkdir()
    torch.save(old, tmp_path / "old" / "checkpoint_last.pt")
    assert updates(tmp_path / "old")[0] == 10
    # without the meters: update 6 is the best anew
    killed = tmp_path / "whole" / "checkpoint_1_4.pt"
    new = f"{line} {tmp_path / 'new'} --reset-meters --restore-file {killed}"
    assert command("train", new)[0] == 0
    state = torch.load(tmp_path / "new" / "checkpoint_last.pt", weights_only=True)
    assert state["optimizer_history"][-1]["num_updates"] == 12


@pytest.mark.parametrize("precision", ["", pytest.param("--bf16", marks=pytest.mark.slow)])
def test_a_model_without_a_dataclass_saves_and_resumes(command, work, tmp_path, precision):
    """Its settings are an argparse.Namespace, which has no items."""
    model = "--arch lstm_lm --decoder-embed-dim 8 --decoder-hidden-size 8 --decoder-layers 1"
    model += " --decoder-out-embed-dim 8 --decoder-attention 0 --task language_modeling"
    flags = f"--optimizer adam --lr 0.01 --max-tokens 256 --num-workers 0 {precision}"
    line = f"bin {model} --tokens-per-sample 32 {flags} --save-dir {tmp_path} --disable-validation"
    for updates in (1, 2):
        status, err = command("train", f"{line} --max-update {updates}")
        assert status == 0, err
    cfg = load(tmp_path / "checkpoint_last.pt")["cfg"]
    assert cfg["model"].bf16 is cfg["common"]["bf16"] is bool(precision)
