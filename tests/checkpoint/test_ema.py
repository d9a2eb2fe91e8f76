"""The moving average of the weights (--store-ema) against a loop over the saved checkpoints."""

import pytest
import torch
from training import TRAIN, error_of, train

EMA = "--moe-expert-count 4 --store-ema --ema-decay 0.5"


def saved(path):
    return torch.load(path, weights_only=True)


def averages(folder, updates):
    """decay 0.5, begun with the weights after the first update."""
    models = [saved(folder / f"checkpoint_1_{update}.pt")["model"] for update in updates]
    average = {name: value.clone() for name, value in models[0].items()}
    for model in models[1:]:
        for name, value in model.items():
            number = value.is_floating_point()
            average[name] = 0.5 * average[name] + 0.5 * value if number else value
    return average


def assert_same(left, right):
    assert left.keys() == right.keys()
    for name, value in left.items():
        torch.testing.assert_close(value, right[name], rtol=1e-6, atol=1e-7, msg=name)


@pytest.mark.parametrize(
    "flags",
    [
        "",  # tied embeddings
        "--ema-fp32 --moe-router hash",
        "--moe-router threshold --moe-balance none --moe-gate-loss-wt 0",
    ],
)
def test_the_average_decays_once_an_update(data, tmp_path, flags):
    line = f"{data} {TRAIN} {EMA} {flags} --save-dir {tmp_path}"
    train(0, 1, f"{line} --max-update 4 --save-interval-updates 1")
    average = saved(tmp_path / "checkpoint_1_4.pt")["extra_state"]["ema"]
    assert_same(average, averages(tmp_path, range(1, 5)))


def test_the_update_frequency_is_resumed(data, tmp_path):
    line = f"{data} {TRAIN} {EMA} --ema-update-freq 3"
    train(0, 1, f"{line} --max-update 9 --save-interval-updates 4 --save-dir {tmp_path}")
    resumed = tmp_path / "resumed"
    line += f" --restore-file {tmp_path}/checkpoint_1_4.pt --max-update 9 --save-dir {resumed}"
    train(0, 1, line)
    averages = [
        saved(folder / "checkpoint_last.pt")["extra_state"]["ema"] for folder in (tmp_path, resumed)
    ]
    for name, value in averages[0].items():
        assert torch.equal(value, averages[1][name]), name


@pytest.mark.parametrize(
    "flag, more", [("--restore-file", ""), ("--finetune-from-model", "--ema-fp32")]
)
def test_a_checkpoint_without_an_average_begins_one(data, tmp_path, caplog, flag, more):
    line = f"{data} {TRAIN} --moe-expert-count 4"
    train(0, 1, f"{line} --max-update 1 --save-dir {tmp_path}")
    first = tmp_path / "checkpoint_last.pt"
    line = f"{data} {TRAIN} {EMA} {more} {flag} {first} --save-dir {tmp_path}/2"
    updates = 2 if flag == "--restore-file" else 1
    train(0, 1, f"{line} --max-update {updates}")
    assert f"--store-ema: {first} has no EMA" in caplog.text
    state = saved(tmp_path / "2" / "checkpoint_last.pt")
    expected = {n: 0.5 * v + 0.5 * state["model"][n] for n, v in saved(first)["model"].items()}
    assert_same(state["extra_state"]["ema"], expected)


def test_the_seed_model_must_have_an_average_of_this_model(data, tmp_path):
    line = f"{data} {TRAIN} --max-update 1"
    ordinary, other = tmp_path / "ordinary", tmp_path / "other"
    train(0, 1, f"{line} --moe-expert-count 4 --save-dir {ordinary}")
    train(0, 1, f"{line} {EMA} --moe-expert-count 2 --save-dir {other}")
    for folder, words in ((ordinary, "has no EMA"), (other, "of another model")):
        seed = f"--ema-seed-model {folder}/checkpoint_last.pt"
        message = error_of(0, train, 1, f"{line} {EMA} {seed} --save-dir {tmp_path}/run")
        assert message.startswith(f"{seed}: ") and words in message
    seed = f"--ema-seed-model {other}/checkpoint_last.pt --moe-expert-count 2"
    train(0, 1, f"{line} {EMA} {seed} --save-dir {tmp_path}/run")
    state = saved(tmp_path / "run" / "checkpoint_last.pt")
    seeds = saved(other / "checkpoint_last.pt")["extra_state"]["ema"]
    expected = {name: 0.5 * v + 0.5 * state["model"][name] for name, v in seeds.items()}
    assert_same(state["extra_state"]["ema"], expected)
