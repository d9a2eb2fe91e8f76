"""Training goes on from the branch's checkpoints, with what its optimizer remembers."""

import branch_files
import pytest
import torch
from branch_checkpoints import (
    ADAM,
    CHECKPOINTS,
    NOT_OURS,
    REFERENCE,
    SMALL,
    TRAIN,
    needs_reference,
    remembered,
    restored,
    run,
    write_small,
)
from processes import run_processes
from small_models import VOCABULARY, build_model
from updates import WORLD, as_sample, batches, configure, joined, make_trainer, whole_parameters

from fairseq_moe_ext.branch.files import find
from fairseq_moe_ext.branch.reading import read
from fairseq_moe_ext.expert_parallel import placement

# Flags of the models whose settings differ.
SETTINGS = {
    "top-1 on eight, old args": "--moe-top1-expert --moe-freq 1",
    "FSDP, weights too": "--moe-expert-count 6",
    "gpt3, untied": "--arch moe_transformer_lm --moe-freq 1 --decoder-learned-pos",
}


@pytest.mark.parametrize(
    "name, world",
    [
        ("two ranks", 1),
        pytest.param("two ranks", 4, marks=pytest.mark.slow),
        pytest.param("experts on two ranks each", 2, marks=pytest.mark.slow),
        ("experts on two ranks each", 1),
        ("FSDP", 1),
        pytest.param("FSDP", 2, marks=pytest.mark.slow),
        ("FSDP, one module, experts on two ranks each", 2),
        ("FSDP, weights too", 2),
        pytest.param("old args", 1, marks=pytest.mark.slow),
        ("top-1 on eight, old args", 2),
        pytest.param("gpt3, untied", 4, marks=pytest.mark.slow),
    ],
)
def test_training_goes_on_with_the_optimizer_state(tmp_path, data, world, name):
    model = write_small(tmp_path / "run", name, optimizer=remembered)
    path = str(tmp_path / "run" / "model.pt")
    args = (data, path, SETTINGS.get(name, ""), world)
    results = run_processes(world, restored, *args) if world > 1 else [restored(0, *args)]
    whole = dict(model.named_parameters())
    experts = CHECKPOINTS[name][0].get("moe_expert_count", 4)
    for rank, (updates, found) in enumerate(results):
        assert updates == 10
        place = placement(experts, world, rank)
        for key, (value, state) in found.items():
            rows, expected = slice(None), remembered(key, whole[key].shape)
            if ".experts." in key:
                start, _, rest = key.partition(".experts.")
                rows = slice(place.first, place.first + place.local)
                each = [
                    remembered(f"{start}.experts.{e}.{rest}", whole[key].shape[1:])
                    for e in range(experts)
                ]
                expected = {
                    k: torch.stack([state[k] for state in each]) for k in ("exp_avg", "exp_avg_sq")
                }
            assert torch.equal(value, whole[key][rows])
            for k in ("exp_avg", "exp_avg_sq"):
                assert torch.equal(state[k], expected[k][rows]), key
            assert state["step"] == 10


@pytest.mark.parametrize(
    "flags, optimizer",
    [
        ("--memory-efficient-fp16", "MemoryEfficientFP16Optimizer"),
        ("--fp16 --fp16-no-flatten-grads", "FP16Optimizer"),
        ("--bf16", "FP16Optimizer"),
    ],
)
def test_training_goes_on_in_half_precision(tmp_path, data, flags, optimizer):
    write_small(tmp_path / "run", optimizer=remembered, optimizer_name=optimizer)
    updates, found = restored(0, data, str(tmp_path / "run" / "model.pt"), flags, 1)
    assert updates == 10 and all(state is not None for _, state in found.values())


def restored_sharded(rank, folder, path):
    trainer = make_trainer(configure(folder, f"{ADAM} --fp16"), "fully_sharded", 2, torch.float32)
    trainer.load_checkpoint(path)
    state = trainer.optimizer.state_dict()["state"]
    return trainer.get_num_updates(), [float(s["exp_avg"].abs().sum()) for s in state.values()]


def test_training_goes_on_in_half_precision_sharded(tmp_path, data):
    """With the flags of a run of the branch with --fp16 --ddp-backend fully_sharded."""
    name = "MemoryEfficientFP16Optimizer"
    write_small(tmp_path / "run", optimizer=remembered, optimizer_name=name)
    path = str(tmp_path / "run" / "model.pt")
    for updates, sums in run_processes(2, restored_sharded, data, path):
        assert updates == 10 and sums and all(value > 0 for value in sums)


RUN = f"{ADAM} {WORLD} --moe-dropless --adam-eps 1e-4"  # rounding in gradients does not show
RUN += " --moe-pad-rule real"  # as of the run, which its checkpoint does not tell


def after_an_update(rank, folder, path, backend, world):
    trainer = make_trainer(configure(folder, RUN), backend, world, torch.float32)
    trainer.load_checkpoint(path)
    trainer.train_step([as_sample(list(batches())[3].chunk(world)[rank])])
    return whole_parameters(trainer.get_model())


@pytest.mark.parametrize("wrapped", [True, False])
def test_the_update_after_an_fsdp_run_s_is_that_without_a_stop(tmp_path, data, wrapped):
    trainer = make_trainer(configure(data, RUN), "legacy_ddp", 1, torch.float32)
    for tokens in list(batches())[:3]:
        trainer.train_step([as_sample(tokens)])
    model, saved = trainer.get_model(), trainer.optimizer.state_dict()
    stacked = {
        key: {n: saved["state"][i][key] for i, (n, _) in enumerate(model.named_parameters())}
        for key in ("exp_avg", "exp_avg_sq")
    }

    def of_run(name, shape):
        return {"step": 3, **{k: branch_files.part_of(of, name) for k, of in stacked.items()}}

    branch_files.write(
        str(tmp_path),
        SMALL,
        VOCABULARY,
        2,
        branch_files.of_model(model),
        fsdp="state",
        wrapped=wrapped,
        optimizer=of_run,
        updates=3,
        group=saved["param_groups"][0],
    )
    before = whole_parameters(model)
    trainer.train_step([as_sample(list(batches())[3])])
    expected, path = whole_parameters(model), str(tmp_path / "model.pt")
    moved = [n for n in expected if (expected[n] - before[n]).abs().max() > 1e-4]
    assert len(moved) > len(expected) - 8  # but the biases of keys, which change nothing
    one = after_an_update(0, data, path, "legacy_ddp", 1)
    assert all(torch.equal(one[name], expected[name]) for name in expected)
    for backend in ("legacy_ddp", "fully_sharded"):
        found = joined(run_processes(2, after_an_update, data, path, backend, 2), 4)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=0, atol=1e-6, msg=name)


@needs_reference
def test_the_branch_s_optimizer_state_fits_ours(tmp_path):
    """All of it, by shape: in its numbering, a neighbour's state would rarely fit."""
    files = find(str(REFERENCE / "branch_moe_2ranks" / "checkpoint_last.pt"))
    model = build_model(
        vocabulary=4000,
        decoder_embed_dim=64,
        decoder_ffn_embed_dim=128,
        share_decoder_input_output_embed=True,
        moe_freq=2,
        moe_expert_count=4,
    )
    parameters = dict(model.named_parameters())
    optimizer = read(files, None, parameters)["last_optimizer_state"]
    assert len(optimizer["state"]) == len(parameters) == 53 + 2 * 4 + 8
    for number, (name, parameter) in enumerate(parameters.items()):
        state = optimizer["state"][number]
        assert state["step"] == 200
        assert state["exp_avg"].shape == state["exp_avg_sq"].shape == parameter.shape, name
        # A norm's gain and its bias have one shape; which is which shows in the size of the step.
        ratio = state["exp_avg"].abs().sum() / state["exp_avg_sq"].sqrt().sum()
        assert 0 < ratio < 3


@pytest.mark.parametrize(
    "option, before", [("--restore-file", 10), ("--finetune-from-model", 0), ("--save-dir", 10)]
)
def test_fairseq_train_starts_from_it(tmp_path, data, capsys, monkeypatch, caplog, option, before):
    target = tmp_path / "run"
    name = "checkpoint_last" if option == "--save-dir" else "model"
    write_small(target, optimizer=remembered, name=name)
    line = f"{data} {TRAIN} --max-update {before + 2} --tokens-per-sample 16"
    if option != "--save-dir":
        line += f" {option} {target / 'model.pt'} --save-dir {tmp_path / 'new'}"
        target = tmp_path / "new"
    else:  # goes on where the branch stopped, in its folder
        line += f" --save-dir {target}"
    line += " --max-target-positions 64"
    with caplog.at_level("INFO"):
        status, err = run(capsys, "train", line)
    assert status == 0, err
    assert "Loaded checkpoint" in caplog.text
    saved = torch.load(target / "checkpoint_last.pt", weights_only=True)
    assert saved["optimizer_history"][-1]["num_updates"] == before + 2


def test_a_dense_twin_goes_on_in_its_folder_again(tmp_path, data, capsys):
    """Beside the branch's files lies a checkpoint of ours, which has no experts either."""
    settings = {**SMALL, "moe_expert_count": 0, "alternate_decoder_ffn_embed_dim": 48}
    flags = {key: value for key, value in settings.items() if key not in NOT_OURS}
    of_model = branch_files.of_model(build_model(0, **flags))
    names = {"name": "checkpoint_last", "optimizer": remembered}
    tmp_path.joinpath("run").mkdir()
    branch_files.write(str(tmp_path / "run"), settings, VOCABULARY, 1, of_model, **names)
    line = f"{data} {TRAIN} --save-dir {tmp_path / 'run'} --tokens-per-sample 16"
    line += " --max-target-positions 64 --moe-expert-count 0 --alternate-decoder-ffn-embed-dim 48"
    for updates in (12, 14):
        status, err = run(capsys, "train", f"{line} --max-update {updates}")
        assert status == 0, err
        saved = torch.load(tmp_path / "run" / "checkpoint_last.pt", weights_only=True)
        assert saved["optimizer_history"][-1]["num_updates"] == updates
