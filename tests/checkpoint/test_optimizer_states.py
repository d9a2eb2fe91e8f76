"""The optimizer's state of each parameter: there again to the bit, or refused by name."""

from types import SimpleNamespace

import pytest
import torch
from fairseq import tasks
from fairseq.trainer import Trainer
from fairseq_cli import train as fairseq_train
from processes import run_processes
from training import (
    SAVED,
    SHARDED,
    TRAIN,
    USER_DIR,
    copy_of,
    error_of,
    fit_manifest,
    settings,
    train,
    train_on,
)

from fairseq_moe_ext.checkpoint.format import Piece
from fairseq_moe_ext.checkpoint.loading import _own_optimizer_state, count_updates_as_here
from fairseq_moe_ext.convert.readers import reader_of
from fairseq_moe_ext.convert.show import facts
from fairseq_moe_ext.errors import UserError
from fairseq_moe_ext.expert_parallel import placement


def loaded(rank, world, line, path):
    """Name -> parameter and what the optimizer remembers of it, after loading a checkpoint."""
    cfg = settings(f"{line} --batch-size 1", rank, world)
    task = tasks.setup_task(cfg.task)
    trainer = Trainer(cfg, task, task.build_model(cfg.model), task.build_criterion(cfg.criterion))
    assert trainer.load_checkpoint(path) is not None
    state = trainer.optimizer.state_dict()["state"]
    parameters = trainer.get_model().named_parameters()
    found = {name: {"": p.detach(), **state[i]} for i, (name, p) in enumerate(parameters)}
    return {
        **found,
        "scale": {"": torch.tensor(trainer.optimizer.state_dict().get("loss_scale", 0))},
    }


def joined(states, experts):
    """What all processes loaded, as one process has it."""
    whole = {}
    for name, of_first in states[0].items():
        whole[name] = {}
        for key, value in of_first.items():
            values = [state[name][key] for state in states]
            if ".experts." in name and isinstance(value, torch.Tensor) and value.numel() > 1:
                value = torch.cat(values[: min(experts, len(states))])
            else:
                assert all(torch.equal(torch.as_tensor(v), torch.as_tensor(value)) for v in values)
            whole[name][key] = value
    return whole


PRECISIONS = ["--memory-efficient-fp16", "--fp16 --fp16-no-flatten-grads", "--bf16"]


@pytest.mark.parametrize("precision", ["", *PRECISIONS])
def test_every_number_is_there_again(data, tmp_path, precision):
    """Parameters, optimizer state and loss scale; written by 1 and 2, loaded on 1, 2 and 4."""
    line = f"{data} {TRAIN} --moe-expert-count 4 {precision} --fp16-init-scale 4"
    for writers, readers in ((1, 2), (2, 4)):
        folder = tmp_path / str(writers)
        train_on(writers, f"{line} --max-update 2 --save-dir {folder}")
        path = str(folder / "checkpoint_last.pt")
        assert facts(path)["training"].get("bf16", False) is (precision == "--bf16")
        one = joined([loaded(0, 1, line, path)], 4)
        assert torch.all(one["decoder.layers.1.moe_layer.experts.fc1.bias"]["exp_avg"] != 0)
        seen = joined(run_processes(readers, loaded, readers, line, path), 4)
        assert seen.keys() == one.keys()
        for name, state in one.items():
            for key, value in state.items():
                found, value = torch.as_tensor(seen[name][key]), torch.as_tensor(value)
                assert torch.equal(found, value) and found.dtype == value.dtype


def test_joined_fp16_state_is_refused_by_name(data, tmp_path):
    line = f"{data} {TRAIN} --moe-expert-count 4 --fp16"
    train_on(1, f"{line} --max-update 2 --save-dir {tmp_path}")
    line += f" --fp16-no-flatten-grads --save-dir {tmp_path} --no-save"
    for message in run_processes(2, error_of, train, 2, line):
        assert "optimizer state has 1 tensors" in message
        assert "--reset-optimizer" in message
    assert len(train_on(2, f"{line} --reset-optimizer --max-update 4")) == 4


def test_an_optimizer_state_that_does_not_fit_is_told_in_one_line(data, runs):
    folder, _ = runs(2, 4)
    line = f"{data} {TRAIN} --moe-expert-count 4 --save-dir {folder} --no-save"
    assert "--reset-optimizer" in error_of(0, train, 1, f"{line} --optimizer sgd")
    assert "--reset-optimizer" in error_of(0, train, 1, f"{line} --fp16")
    assert "--moe-freeze" in error_of(0, train, 1, f"{line} --moe-freeze experts")
    for message in run_processes(2, error_of, train, 2, f"{line} --optimizer sgd"):
        assert "--reset-optimizer" in message


STOCK = f"--user-dir {USER_DIR} --task language_modeling --arch transformer_lm --cpu"
STOCK += " --decoder-layers 1 --decoder-embed-dim 8 --decoder-ffn-embed-dim 12 --optimizer adam"
STOCK += " --decoder-attention-heads 2 --tokens-per-sample 8 --num-workers 0 --disable-validation"
DENSE = f"{TRAIN} --arch dense_lm_tiny --moe-freq 0"
WEIGHTS_ALONE = {
    "sparse": (1, f"{TRAIN} --moe-expert-count 4 --fp16"),
    "reset": (1, f"{TRAIN} --moe-expert-count 4 --fp16 --reset-optimizer"),
    "dense": (2, f"{DENSE} --fp16"),
    "sharded": (2, f"{DENSE} --fp16 {SHARDED} 0"),
    "stock": (1, f"{STOCK} --fp16"),
    "stock, bfloat16": (1, f"{STOCK} --bf16"),  # as our models on a GPU
}


@pytest.mark.parametrize("kind", WEIGHTS_ALONE)
def test_an_update_of_half_precision_begins_from_the_weights_of_a_file(data, tmp_path, kind):
    """fairseq's optimizers copy the weights in float32 when they are built, and an update writes
    the copies back. From a file without optimizer state stock builds it once."""
    world, line = WEIGHTS_ALONE[kind]
    line = f"{data} {line} --batch-size 4 --max-update 1 --fp16-init-scale 4"
    run(world, f"{line} --lr 0.01 --no-save-optimizer-state --save-dir {tmp_path}/first")
    path = f"{tmp_path}/first/checkpoint_last.pt"
    run(world, f"{line} --lr 1e-9 --seed 7 --restore-file {path} --save-dir {tmp_path}/then")
    before, after = (
        torch.load(tmp_path / folder / "checkpoint_last.pt", weights_only=False)["model"]
        for folder in ("first", "then")
    )
    assert before.keys() == after.keys()
    rounding = 2**-8 if "--bf16" in line else 2**-10
    for name, value in before.items():
        if not name.endswith("._float_tensor"):  # of stock, which never fills it
            torch.testing.assert_close(after[name], value, rtol=rounding, atol=1e-7)


def run(world, line):
    if world == 1:
        return of_process(0, 1, line)
    run_processes(world, of_process, world, line)


def of_process(rank, world, line):
    fairseq_train.main(settings(line, rank, world))


@pytest.mark.parametrize("part", ["shared", "experts"])
def test_an_optimizer_state_of_other_shapes_is_told_in_one_line(data, runs, tmp_path, part):
    path, files = copy_of(runs, tmp_path)
    if part == "shared":
        state = torch.load(path, weights_only=True)
        next(iter(state["last_optimizer_state"]["state"].values()))["exp_avg"] = torch.zeros(3, 3)
        torch.save(state, path)
    else:
        content = torch.load(files[1], weights_only=True)
        of_first = next(iter(content["optimizer"].values()))
        of_first["exp_avg"] = of_first["exp_avg"][:, :-1].clone()
        torch.save(content, files[1])
        fit_manifest(path, files)
    line = f"{data} {TRAIN} --moe-expert-count 4 --save-dir {path.parent} --no-save"
    messages = [error_of(0, train, 1, line), *run_processes(2, error_of, train, 2, line)]
    for message in messages:
        assert f"{path}: " in message and "optimizer" in message and "\n" not in message
        assert "--reset-optimizer" in message


def test_a_state_that_is_nan_is_refused(data, tmp_path):
    line = f"{data} {TRAIN} --moe-expert-count 4"
    train_on(1, f"{line} --max-update 1 --save-dir {tmp_path}")
    path = tmp_path / "checkpoint_last.pt"
    state = torch.load(path, weights_only=False)
    state["last_optimizer_state"]["state"][0]["exp_avg"].view(-1)[0] = float("nan")
    torch.save(state, path)
    words = f"{path}: its optimizer state (exp_avg) holds NaN or infinity"
    assert words in error_of(0, loaded, 1, line, str(path))


@pytest.mark.parametrize("kind", ["adam", "fused_adam"])
def test_a_state_of_apex_is_resumed(data, runs, tmp_path, kind):
    """It counts the updates of a group, not of each parameter."""
    folder, losses = runs(1, 4)
    state = torch.load(folder / f"checkpoint_1_{SAVED}.pt", weights_only=True)
    entries = state["last_optimizer_state"]["state"].values()
    assert {entry.pop("step") for entry in entries} == {SAVED}
    state["last_optimizer_state"]["param_groups"][0].update(step=SAVED, bias_correction=True)
    torch.save(state, tmp_path / f"checkpoint_1_{SAVED}.pt")
    options = f"--optimizer {kind} --save-interval-updates 6 --keep-interval-updates -1"
    line = f"{data} {TRAIN} --moe-expert-count 4 {options} --save-dir {tmp_path}/2"
    resumed = train(0, 1, f"{line} --restore-file {tmp_path}/checkpoint_1_{SAVED}.pt")
    assert resumed == pytest.approx(losses[SAVED:], rel=1e-5)
    saved = torch.load(tmp_path / "2" / "checkpoint_1_6.pt", weights_only=True)
    assert {entry["step"] for entry in saved["last_optimizer_state"]["state"].values()} == {6}
    assert "step" not in saved["last_optimizer_state"]["param_groups"][0]


@pytest.mark.parametrize("scales, joins", [((0.5, 0.5), True), ((0.5, 0.25), False)])
def test_files_that_count_in_units_of_their_own_are_not_joined(scales, joins):
    """fairseq's fused Adam with --fp16-adam-stats: float16 moments times a number."""
    pieces = [
        Piece("", first, 2, {"w": torch.zeros(2, 3)}, {"w": {"exp_avg": torch.ones(2, 3), "s": s}})
        for first, s in zip((0, 2), map(torch.tensor, scales))
    ]
    if joins:
        own = _own_optimizer_state("x.pt", placement(4, 1, 0), "w", pieces)
        assert own["exp_avg"].shape == (4, 3) and float(own["s"]) == 0.5
        return
    with pytest.raises(UserError, match="^x.pt: the optimizer's s of w .*--reset-optimizer"):
        _own_optimizer_state("x.pt", placement(4, 1, 0), "w", pieces)


def test_apex_resumes_other_states():
    class FusedAdamV2:
        """That of fairseq, which needs apex and a GPU."""

    entries = {0: {"step": 7, "exp_avg": torch.zeros(2)}, 1: {}}
    saved = {"state": entries, "param_groups": [{"params": [0, 1, 2], "lr": 1.0}]}
    state = {"last_optimizer_state": saved}
    trainer = SimpleNamespace(optimizer=SimpleNamespace(optimizer=FusedAdamV2()))
    count_updates_as_here(state, trainer)
    found = state["last_optimizer_state"]
    assert found["param_groups"] == [{"params": [0, 1, 2], "lr": 1.0, "step": 7}]
    assert found["state"][0].keys() == {"exp_avg"} and entries[0]["step"] == 7


def test_a_state_of_several_optimizers_is_left_to_stock(data, runs, tmp_path):
    """It has that of each optimizer by name; stock's message names the remedy."""
    folder, _ = runs(1, 4)
    state = torch.load(folder / f"checkpoint_1_{SAVED}.pt", weights_only=True)
    state["last_optimizer_state"] = {"default": state["last_optimizer_state"]}
    state["optimizer_history"][-1]["optimizer_name"] = "FairseqCompositeOptimizer"
    torch.save(state, tmp_path / "composite.pt")
    line = f"{data} {TRAIN} --moe-expert-count 4 --no-save --restore-file {tmp_path}/composite.pt"
    with pytest.raises(UserError, match="Optimizer does not match; .*--reset-optimizer"):
        train(0, 1, line)
    for message in run_processes(2, error_of, train, 2, line):
        assert message.endswith("add --reset-optimizer")
    with pytest.raises(UserError, match="composite.* --weights-only"):
        reader_of(str(tmp_path / "composite.pt")).open(str(tmp_path / "composite.pt"), False)


def test_settings_that_a_resumed_run_keeps_are_named(data, runs, caplog):
    folder, losses = runs(1, 4)
    line = f"{data} {TRAIN} --moe-expert-count 4 --no-save --save-dir {folder} --lr 0.02"
    line += f" --restore-file {folder}/checkpoint_1_{SAVED}.pt --max-update {SAVED + 1}"
    changed = "--weight-decay 0.5 --adam-betas (0.8,0.9)"
    assert train(0, 1, f"{line} {changed}")[0] == losses[SAVED]
    warned = [m for m in caplog.messages if "--optimizer-overrides" in m]
    assert len(warned) == 2
    assert warned[0].startswith("--adam-betas (0.8, 0.9): ") and "(0.9, 0.999)" in warned[0]
    assert warned[1].startswith("--weight-decay 0.5: ")
    assert warned[1].endswith("add --optimizer-overrides \"{'weight_decay': 0.5}\" to change it")
    caplog.clear()
    overrides = "{'betas':(0.8,0.9),'weight_decay':0.5}"
    for flags in ("", f"{changed} --optimizer-overrides {overrides}", "--optimizer adafactor"):
        if flags.endswith("adafactor"):
            flags += " --reset-optimizer"
        train(0, 1, f"{line} {flags}")
    assert 'optimizer-overrides "' not in caplog.text
    words = "--optimizer-overrides 'adam_betas': the optimizer has no such setting; use lr, betas, "
    with pytest.raises(UserError, match=words + ".*; did you mean betas"):
        train(0, 1, f"{line} --optimizer-overrides {{'adam_betas':(0.8,0.9)}}")
