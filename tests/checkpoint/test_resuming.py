"""Checkpoints on any number of processes: training goes on as if nothing had happened."""

import functools
import itertools

import pytest
import torch
from fairseq.data import iterators
from fairseq.optim.adam import FairseqAdam, FairseqAdamConfig
from fairseq.optim.lr_scheduler.reduce_lr_on_plateau import (
    ReduceLROnPlateauLRSchedule,
    ReduceLROnPlateauLRScheduleConfig,
)
from processes import run_processes
from training import (
    GLOBAL_BATCH,
    SAVED,
    SHARDED,
    TRAIN,
    error_of,
    first_run,
    resume,
    train,
    train_on,
)


@pytest.mark.parametrize(
    "experts, first, then",
    [
        (4, 2, 4),
        (2, 4, 2),
        *(
            pytest.param(*numbers, marks=pytest.mark.slow)
            for numbers in [(4, 1, 2), (4, 2, 1), (4, 2, 2), (2, 4, 4), (2, 4, 1), (2, 1, 4)]
        ),
    ],
)
def test_a_resumed_run_equals_the_uninterrupted_one(data, runs, experts, first, then):
    """experts < processes: with replicas."""
    goes_on(data, runs, experts, first, then)


@pytest.mark.slow
@pytest.mark.parametrize(
    "experts, first, then",
    [
        *((8, 8, then) for then in (1, 2, 4, 8)),
        *((8, first, 8) for first in (1, 2, 4)),
        *((4, 8, then) for then in (2, 8)),
        (2, 8, 1),
    ],
)
def test_eight_processes_too(data, runs, experts, first, then):
    goes_on(data, runs, experts, first, then)


def goes_on(data, runs, experts, first, then):
    folder, losses = runs(first, experts)
    resumed = resume(data, folder, then, experts)
    expected = losses[SAVED:]
    assert len(resumed) == len(expected) == 10
    if first == then:
        assert resumed == expected
    else:
        assert resumed == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_pytorch_ddp_goes_on(data, tmp_path):
    """From two processes to one and to four."""
    losses = first_run(data, tmp_path, 2, 4, "--ddp-backend pytorch_ddp")
    for then in (1, 4):
        resumed = resume(data, tmp_path, then, 4, "--ddp-backend pytorch_ddp")
        assert resumed == pytest.approx(losses[SAVED:], rel=1e-5)


def test_with_update_freq_instead_of_processes(data, runs, tmp_path):
    """Half the processes, twice the batches each: the place in the data is that of all."""
    options = "--moe-dropless --moe-gate-loss-wt 0"  # which treat each micro-batch by itself
    losses = first_run(data, tmp_path, 2, 4, options)
    resumed = resume(data, tmp_path, 1, 4, f"{options} --update-freq 2", batch=GLOBAL_BATCH // 2)
    assert resumed == pytest.approx(losses[SAVED:], rel=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        "--moe-freeze experts",
        pytest.param(f"--moe-freeze experts {SHARDED} 0", marks=pytest.mark.slow),
        pytest.param("--moe-freeze experts --bf16", marks=pytest.mark.slow),
        pytest.param("--moe-freeze gate_and_experts", marks=pytest.mark.slow),
    ],
)
def test_frozen_experts_have_no_optimizer_state(data, tmp_path, options):
    losses = first_run(data, tmp_path, 2, 4, options)
    assert resume(data, tmp_path, 2, 4, options) == losses[SAVED:]
    rel = 1e-2 if "bf16" in options else 1e-5
    alone = resume(data, tmp_path, 1, 4, options.split(SHARDED)[0])
    assert alone == pytest.approx(losses[SAVED:], rel=rel)
    line = f"{data} {TRAIN} --moe-expert-count 4 --no-save --save-dir {tmp_path}"
    assert "--reset-optimizer" in run_processes(2, error_of, train, 2, line)[0]


def test_adafactor_goes_on_where_its_factors_span_the_same_experts(data, tmp_path):
    options = "--optimizer adafactor"
    losses = first_run(data, tmp_path, 2, 4, options)
    assert resume(data, tmp_path, 2, 4, options) == losses[SAVED:]
    line = f"{data} {TRAIN} --moe-expert-count 4 {options} --no-save --save-dir {tmp_path}"
    assert "--reset-optimizer" in error_of(0, train, 1, line)


def test_a_run_goes_on_with_either_adam(data, runs, tmp_path):
    folder, losses = runs(2, 4)
    resumed = resume(data, folder, 2, 4, "--optimizer fused_adam")
    assert resumed == pytest.approx(losses[SAVED:], rel=1e-5)
    assert first_run(data, tmp_path, 1, 4, "--optimizer fused_adam") == pytest.approx(losses, 1e-5)
    assert resume(data, tmp_path, 1, 4) == pytest.approx(losses[SAVED:], rel=1e-5)


def test_finetune_and_reset(data, runs, tmp_path):
    folder, losses = runs(2, 4)
    line = f"{data} {TRAIN} --moe-expert-count 4 --no-save --max-update 2 --save-dir {tmp_path}"
    last = f"{folder}/checkpoint_1_{SAVED}.pt"
    tuned = {w: train_on(w, f"{line} --finetune-from-model {last}") for w in (1, 2)}
    assert len(tuned[2]) == 2  # updates are counted from 0
    assert tuned[2] == pytest.approx(tuned[1], rel=1e-5)
    assert tuned[2][0] < losses[0]
    reset = "--reset-optimizer --reset-lr-scheduler --reset-meters --reset-dataloader"
    again = train_on(2, f"{line} --restore-file {last} {reset}")
    assert again == tuned[2]


class Rows(torch.utils.data.Dataset):
    def __getitem__(self, index):
        return index


def iterator(size, shards, in_order=False, rows=range(100), **options):
    batches = [list(rows[i : i + size]) for i in range(0, 100, size)]
    return iterators.EpochBatchIterator(
        Rows(), list, batches, num_shards=shards, disable_shuffling=in_order, **options
    )


def test_other_place_in_the_data_for_other_batches(caplog):
    def next_rows(size, shards, state):
        itr = iterator(size, shards, in_order=True)
        itr.load_state_dict(state)
        return next(itr.next_epoch_itr(shuffle=False))

    first = iterator(4, 2, in_order=True)
    batches = first.next_epoch_itr(shuffle=False)
    for _ in range(6):
        next(batches)
    state = first.state_dict()  # 6 batches of 4 on 2 processes: 48 rows
    for size, shards, row in (
        (4, 2, 48),
        (8, 1, 48),
        (2, 4, 48),
        (4, 4, 48),
        (4, 5, 40),
        (7, 1, 42),
    ):
        assert next_rows(size, shards, state)[0] == row
    stock = {key: value for key, value in state.items() if key != "all_processes"}
    assert next_rows(4, 1, stock)[0] == 24  # what stock does, and what its own files still do
    assert not caplog.messages


@pytest.mark.parametrize("size, all_once", [(4, True), (5, False), (2, False)])
def test_other_batches_in_shuffled_order_are_warned_of(caplog, size, all_once):
    first = iterator(4, 1)
    batches = first.next_epoch_itr()
    seen = [row for _ in range(6) for row in next(batches)]
    then = iterator(size, 1)
    then.load_state_dict(first.state_dict())
    seen += [row for batch in then.next_epoch_itr() for row in batch]
    assert (sorted(seen) == list(range(100))) == all_once
    warned = [message for message in caplog.messages if "some sentences are seen twice" in message]
    assert len(warned) == (not all_once)
    state = first.state_dict()
    state["all_processes"]["of"] = None  # as of the branch's checkpoints
    then.load_state_dict(state)
    assert "into an unknown number of batches" in caplog.messages[-1]


BACKWARDS = range(99, -1, -1)


@pytest.mark.parametrize(
    "first, then, warnings",
    [
        ({}, {}, 0),
        ({"shards": 1}, {"shards": 2}, 0),
        ({"seed": 1}, {"seed": 2}, 1),
        ({}, {"rows": BACKWARDS}, 1),
        ({}, {"grouped_shuffling": True}, 1),
        ({"grouped_shuffling": True}, {"grouped_shuffling": True}, 0),
        ({"grouped_shuffling": True}, {"grouped_shuffling": True, "shards": 1}, 1),
        ({"in_order": True, "seed": 1}, {"in_order": True, "seed": 2}, 0),
        ({"in_order": True}, {"in_order": True, "size": 5}, 0),
        ({"in_order": True}, {"in_order": True, "rows": BACKWARDS}, 1),
        ({"in_order": True}, {"in_order": True, "rows": BACKWARDS, "size": 5}, 1),
    ],
)
def test_another_order_of_as_many_batches_is_warned_of(caplog, first, then, warnings):
    old, new = (iterator(**{"size": 4, "shards": 2, **options}) for options in (first, then))
    batches = old.next_epoch_itr(shuffle=not old.disable_shuffling)
    for _ in range(6):
        next(batches)
    new.load_state_dict(old.state_dict())
    new.next_epoch_itr()
    assert sum("some sentences are seen twice" in m for m in caplog.messages) == warnings
    state = old.state_dict()
    del state["all_processes"]["order"]  # older checkpoints
    new.load_state_dict(state)
    assert len(caplog.messages) == warnings


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("ahead", [0, 2])
def test_the_rest_of_an_epoch_is_seen_once_from_any_place(skip, ahead):
    """--update-freq, --skip-remainder-batch and --data-buffer-size; 8 batches of one row."""
    for place, each in itertools.product(range(8), (1, 2, 3, 4, 9)):
        itr = iterators.EpochBatchIterator(
            Rows(), list, [[i] for i in range(8)], buffer_size=ahead, skip_remainder_batch=skip
        )
        itr.load_state_dict({"epoch": 1, "iterations_in_epoch": place, "shuffle": False})
        updates = iterators.GroupedIterator(itr.next_epoch_itr(shuffle=False), each, skip)
        seen = [[row for batch in update for row in batch] for update in updates]
        rest = list(range(place, max(7, place + 1) if skip else 8))
        expected = [rest[i : i + each] for i in range(0, len(rest), each)]
        if skip:  # what does not fill an update; but an epoch has one
            expected = [rows for rows in expected if len(rows) == each] or expected
        assert seen == expected, (place, each)
        assert itr.next_epoch_idx == 2 and not updates.has_next(), (place, each)


SCHEDULES = {
    "fixed": "--warmup-updates 9",
    "polynomial_decay": "--total-num-update 100",
    "inverse_sqrt": "--warmup-updates 9",
    "cosine": "--lr-period-updates 100",
    "tri_stage": "--warmup-steps 9 --hold-steps 2 --decay-steps 3",
    "triangular": "--max-lr 0.02 --lr-period-updates 30",
    "step": "--min-lr 0.001 --lr-deacy-period 5 --lr-decay 0.5",
    "reduce_lr_on_plateau": "--lr-patience 1",
}
SCHEDULES = {name: f"--lr-scheduler {name} {flags}" for name, flags in SCHEDULES.items()}


@pytest.fixture(scope="module")
def scheduled(data, tmp_path_factory):
    """Name of a schedule -> folder and losses of a run with it; each is made once."""

    @functools.cache
    def run(name):
        folder = tmp_path_factory.mktemp(name)
        return folder, first_run(data, folder, 1, 4, SCHEDULES[name])

    return run


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_goes_on_as_if_nothing_had_happened(data, scheduled, name, caplog):
    folder, losses = scheduled(name)
    assert resume(data, folder, 1, 4, SCHEDULES[name]) == losses[SAVED:]
    assert "was trained with" not in caplog.text


@pytest.mark.parametrize(
    "before, now",
    [*(("fixed", name) for name in SCHEDULES if name != "fixed"), ("polynomial_decay", "fixed")],
)
def test_another_schedule_goes_on_at_its_update_and_says_so(data, scheduled, before, now, caplog):
    """fairseq's default does not write what the others read."""
    folder, _ = scheduled(before)
    losses = resume(data, folder, 1, 4, SCHEDULES[now])
    said = f"--lr-scheduler {now}: {folder}/checkpoint_1_{SAVED}.pt was trained with {before}: "
    assert caplog.text.count(said) == 1 and f"from update {SAVED} on" in caplog.text
    assert losses == resume(data, folder, 1, 4, f"{SCHEDULES[now]} --reset-lr-scheduler")
    assert caplog.text.count(said) == 1, "who asks for a new schedule needs no warning"


def test_the_best_of_another_metric_is_not_missed(data, scheduled):
    """What a schedule wants to read is what a run of another metric forgets."""
    name = "polynomial_decay"
    folder, losses = scheduled(name)
    resumed = resume(data, folder, 1, 4, f"{SCHEDULES[name]} --best-checkpoint-metric ppl")
    assert resumed == losses[SAVED:]


def test_the_patience_of_reduce_lr_on_plateau_is_resumed():
    """--lr-patience 2: the third validation that is not better lowers the rate, resumed or not."""

    def schedule():
        weight = torch.nn.Parameter(torch.zeros(1))
        optimizer = FairseqAdam(FairseqAdamConfig(lr=[1.0], adam_betas="(0.9, 0.98)"), [weight])
        config = ReduceLROnPlateauLRScheduleConfig(lr=[1.0], lr_patience=2, lr_shrink=0.5)
        return ReduceLROnPlateauLRSchedule(config, optimizer)

    first, resumed = schedule(), schedule()
    rates = [first.step(epoch, loss) for epoch, loss in enumerate((3.0, 3.0, 3.0), 1)]
    resumed.load_state_dict(first.state_dict())
    assert rates == [1.0, 1.0, 1.0] and resumed.step(4, 3.0) == first.step(4, 3.0) == 0.5


def test_reduce_lr_on_plateau_counts_the_validation_at_the_end_of_an_epoch(data, tmp_path):
    """Stock saves the checkpoint of an epoch before its loss lowers the rate."""
    line = f"{data} {TRAIN} --moe-expert-count 4 --lr-scheduler reduce_lr_on_plateau"
    line = line.replace(" --disable-validation", "") + " --lr-patience 0 --lr-shrink 0.01"
    line += " --lr-threshold 0.5"  # so the falling loss is no better
    whole = train(0, 1, f"{line} --max-update 40 --save-dir {tmp_path}")  # 2 of validation an epoch
    resumed = f"{line} --max-update 40 --no-save --save-dir {tmp_path}"
    assert train(0, 1, f"{resumed} --restore-file {tmp_path}/checkpoint2.pt") == whole[36:]
    flags = f"{line} --max-update 99 --stop-min-lr 1e-7 --save-dir {tmp_path / 'low'}"
    assert len(train(0, 1, flags)) == 72
    assert train(0, 1, flags) == []
