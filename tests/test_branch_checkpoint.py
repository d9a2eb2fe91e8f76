"""Checkpoints in the layout of fairseq's `moe` branch: one that it wrote, and synthetic ones."""

import copy
import json
import math
import os
import re
import shutil
import sys
from argparse import Namespace
from pathlib import Path

import branch_files
import fairseq_cli.eval_lm
import pytest
import torch
from fairseq import checkpoint_utils, options
from fairseq.data import Dictionary, indexed_dataset
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.trainer import Trainer
from processes import run_processes
from small_models import PAD, TYPES, build_model, make_task
from updates import (
    WORLD,
    as_sample,
    batches,
    configure,
    joined,
    make_trainer,
    whole_parameters,
)

import fairseq_moe_ext
from fairseq_moe_ext import cli
from fairseq_moe_ext.branch.files import find
from fairseq_moe_ext.branch.reading import read
from fairseq_moe_ext.branch.settings import translated_settings
from fairseq_moe_ext.errors import UserError
from fairseq_moe_ext.expert_parallel import placement
from fairseq_moe_ext.models.language_model import MoETransformerLanguageModel
from fairseq_moe_ext.priming import model as priming_model

USER_DIR = str(Path(fairseq_moe_ext.__file__).parent)
REFERENCE = Path(__file__).resolve().parents[2] / "shared" / "reference"
needs_reference = pytest.mark.skipif(
    not REFERENCE.is_dir(), reason=f"the branch's own checkpoint is not there: {REFERENCE}"
)

SHAPE = dict(
    decoder_layers=4,
    decoder_embed_dim=16,
    decoder_ffn_embed_dim=32,
    decoder_attention_heads=2,
    dropout=0.0,
    attention_dropout=0.0,
    tokens_per_sample=64,
    max_target_positions=64,
    activation_fn="gelu",
    share_decoder_input_output_embed=True,
    moe_freq=2,
    moe_expert_count=4,
    moe_second_expert_policy="all",
    moe_gating_use_fp32=True,
    moe_normalize_expert_grad="world_size",
    moe_eval_capacity_token_fraction=-1.0,
)
SMALL = {"_name": "transformer_lm_gpt2_tiny", **SHAPE}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A data-bin of 12 sentences."""
    return make_data_bin(tmp_path_factory.mktemp("data"), make_task().source_dictionary)


def make_data_bin(folder, dictionary):
    dictionary.save(str(folder / "dict.txt"))
    generator = torch.Generator().manual_seed(3)
    for split in ("train", "valid"):
        writer = indexed_dataset.make_builder(str(folder / f"{split}.bin"), "mmap", len(dictionary))
        for length in range(5, 17):
            words = torch.randint(4, len(dictionary), (length,), generator=generator)
            writer.add_item(torch.cat([words, torch.tensor([dictionary.eos()])]).int())
        writer.finalize(str(folder / f"{split}.idx"))
    return str(folder)


def evaluate(rank, world, line):
    """fairseq-eval-lm in this process, one of those that tests/processes.py started."""
    sys.argv = ["fairseq-eval-lm", *line.split("|")]
    cfg = convert_namespace_to_omegaconf(options.parse_args_and_arch(options.get_eval_lm_parser()))
    cfg.distributed_training.distributed_world_size = world
    cfg.distributed_training.distributed_rank = rank
    return float(fairseq_cli.eval_lm.main(cfg)["perplexity"])


def perplexities(world, *arguments):
    """Of all processes."""
    common = "--user-dir", USER_DIR, "--gen-subset", "valid", "--cpu", "--num-workers", "0"
    line = "|".join([*map(str, arguments), *common, "--no-progress-bar"])
    return [evaluate(0, 1, line)] if world == 1 else run_processes(world, evaluate, world, line)


# What the branch's own code reported (README.md beside the checkpoint).
REPORTED = {-1.0: 133.9989, 0.25: 137.8824, 1.0: 133.9311}
QUICK = [(1, 1.0)]


@needs_reference
@pytest.mark.parametrize(
    "world, fraction",
    [
        pytest.param(w, f, marks=[] if (w, f) in QUICK else [pytest.mark.slow])
        for w in (1, 2, 4)
        for f in REPORTED
    ],
)
def test_perplexities_that_the_branch_reported(world, fraction):
    for perplexity in perplexities(
        world,
        REFERENCE / "wikitext2_valid_bin",
        *("--path", REFERENCE / "branch_moe_2ranks" / "checkpoint_last.pt"),
        *("--sample-break-mode", "none", "--tokens-per-sample", "128", "--batch-size", "1"),
        *("--model-overrides", f"{{'moe_eval_capacity_token_fraction': {fraction}}}"),
    ):
        assert perplexity == pytest.approx(REPORTED[fraction], rel=1e-5)


# Settings beside SMALL, ranks, how the files are written.
CHECKPOINTS = {
    "two ranks": ({}, 2, {}),
    "one rank": ({}, 1, {}),
    "a rank an expert": ({}, 4, {}),
    "experts on two ranks each": ({}, 8, {}),
    "old args": ({}, 2, {"old_args": True}),
    "FSDP": ({}, 2, {"fsdp": "state"}),
    "FSDP, one module, experts on two ranks each": ({}, 8, {"fsdp": "state", "wrapped": False}),
    "FSDP, weights too": (dict(moe_expert_count=6), 3, {"fsdp": "weights"}),
    "top-1": (dict(moe_top1_expert=True), 2, {}),
    "all layers": (dict(moe_freq=1), 2, {}),
    "learned positions": (dict(decoder_learned_pos=True), 2, {}),
    "own output": (dict(share_decoder_input_output_embed=False), 2, {}),
    "relu, normed": (dict(activation_fn="relu", layernorm_embedding=True), 2, {}),
    "unscaled": (dict(no_scale_embedding=True, no_decoder_final_norm=True), 2, {}),
    "dead width": (dict(moe_expert_ffn_dim=7, _name="transformer_lm_gpt3_small"), 2, {}),
    "top-1 on eight, old args": (dict(moe_top1_expert=True, moe_freq=1), 8, {"old_args": True}),
    "prioritized, masked": (
        dict(
            moe_batch_prioritized_routing=True,
            use_moe_pad_mask=True,
            moe_normalize_gate_prob_before_dropping=True,
        ),
        4,
        {},
    ),
    "gpt3, untied": (
        dict(
            _name="transformer_lm_gpt3_small",
            decoder_learned_pos=True,
            share_decoder_input_output_embed=False,
            moe_freq=1,
        ),
        8,
        {"fsdp": "weights", "wrapped": False},
    ),
    "before zip files": ({}, 2, {"zipped": False}),
}
NOT_OURS = ("_name", "moe_expert_ffn_dim")


def write_small(folder, case="two ranks", seed=0, **more):
    """A checkpoint of the branch and the model of ours with the same weights."""
    changes, ranks, how = CHECKPOINTS[case]
    settings = {**SMALL, **changes}
    flags = {key: value for key, value in settings.items() if key not in NOT_OURS}
    model = build_model(seed, **flags).eval()
    Path(folder).mkdir(exist_ok=True)
    branch_files.write(
        str(folder), settings, TYPES, ranks, branch_files.of_model(model), **how, **more
    )
    return model


def tokens():
    generator = torch.Generator().manual_seed(5)
    return torch.randint(4, TYPES, (2, 24), generator=generator)


def loaded_logits(rank, folder, data, overrides):
    lm = MoETransformerLanguageModel.from_pretrained(folder, "model.pt", data, **overrides)
    with torch.no_grad():
        return lm.models[0](tokens())[0]


AS_SAVED = {"moe_eval_capacity_token_fraction": -1.0}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_logits_are_those_of_the_weights(tmp_path, data, name):
    model = write_small(tmp_path / "run", name)
    expected = model(tokens())[0]
    for overrides in (AS_SAVED, {**AS_SAVED, "moe_experts_on_disk": True}):
        logits = loaded_logits(0, str(tmp_path / "run"), data, overrides)
        assert torch.equal(logits, expected)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_the_cost_is_that_of_the_model(tmp_path, name, capsys):
    model = write_small(tmp_path / "run", name)
    assert cli.main(["cost", "--path", str(tmp_path / "run" / "model.pt"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["parameters"]["total"] == sum(p.numel() for p in model.parameters())
    assert found["context"] == SMALL["tokens_per_sample"]


@pytest.mark.parametrize(
    "name, world",
    [
        pytest.param("two ranks", 4, marks=pytest.mark.slow),
        ("experts on two ranks each", 2),
        pytest.param("old args", 2, marks=pytest.mark.slow),
        ("top-1", 2),
        ("prioritized, masked", 2),
    ],
)
def test_logits_on_several_processes(tmp_path, data, name, world):
    model = write_small(tmp_path / "run", name)
    for overrides in (AS_SAVED, {**AS_SAVED, "moe_experts_on_disk": True}):
        for logits in run_processes(world, loaded_logits, str(tmp_path / "run"), data, overrides):
            torch.testing.assert_close(logits, model(tokens())[0], rtol=1e-5, atol=1e-6)


def test_weights_in_half_precision_stay_so_in_the_files(tmp_path, data):
    settings = {**SMALL, "memory_efficient_fp16": True}
    model = build_model(**SHAPE)
    branch_files.write(str(tmp_path), settings, TYPES, 2, branch_files.of_model(model))
    expected = model.half().float().eval()(tokens())[0]
    for on_disk in (False, True):
        overrides = {**AS_SAVED, "moe_experts_on_disk": on_disk}
        lm = MoETransformerLanguageModel.from_pretrained(
            str(tmp_path), "model.pt", data, **overrides
        )
        with torch.no_grad():
            assert torch.equal(lm.models[0](tokens())[0], expected)
    experts = lm.models[0].decoder.layers[1].moe_layer.experts
    assert {weight.dtype for weight in experts.fc1.weight} == {torch.float16}
    assert not list(experts.parameters())


def test_files_with_weights_and_settings_alone(tmp_path, data):
    model = write_small(tmp_path / "run")

    def strip(state):
        for key in set(state) - {"model", "cfg"}:
            del state[key]

    for path in (tmp_path / "run").glob("*.pt"):
        change(path, strip)
    logits = loaded_logits(0, str(tmp_path / "run"), data, AS_SAVED)
    assert torch.equal(logits, model(tokens())[0])


def test_experts_on_disk_are_not_trained(tmp_path, data):
    write_small(tmp_path / "run")
    lm = MoETransformerLanguageModel.from_pretrained(
        str(tmp_path / "run"), "model.pt", data, moe_experts_on_disk=True
    )
    with pytest.raises(RuntimeError, match="cannot be trained"):
        lm.models[0](tokens())
    with pytest.raises(UserError, match="--moe-experts-on-disk.*drop it"):
        make_trainer(configure(data, f"{ADAM} --moe-experts-on-disk"), "legacy_ddp", 1)


def test_what_the_files_may_be_called(tmp_path):
    for name in ("a-rank-0", "a-rank-1", "a-shared", "a-rank-0-x", "b-rank-0-shard0"):
        (tmp_path / f"{name}.pt").touch()
    (tmp_path / "b-shared-shard0.pt").touch()
    (tmp_path / "b-shared-shard1.pt").touch()
    for given in ("a.pt", "a-shared.pt", "a-rank-1.pt"):
        files = find(str(tmp_path / given))
        assert files.shared == str(tmp_path / "a-shared.pt")
        assert sorted(files.ranks) == [0, 1]
    files = find(str(tmp_path / "b.pt"))
    assert "b-shared-shard" in files.shared and len(files.ranks) == 1
    assert find(str(tmp_path / "c.pt")) is None
    whole = str(tmp_path / "a.pt")
    for own in ({"model": {"l.experts.fc1.weight": 0}}, {"model": {}, "experts": {}}):
        torch.save(own, whole)
        assert find(whole) is None  # a checkpoint of its own
    torch.save({"model": {"decoder.version": 0}}, whole)  # model-shared.pt, renamed
    assert find(whole).shared == whole
    (tmp_path / "a-shared.pt").unlink()
    (tmp_path / "a.pt").unlink()
    with pytest.raises(UserError, match="a-shared.pt: missing"):
        find(str(tmp_path / "a.pt"))


# Training on -------------------------------------------------------------------------------------

ADAM = "--optimizer adam --adam-betas (0.9,0.98) --lr 0.001 --tokens-per-sample 64"
ADAM += " --decoder-layers 4 --decoder-embed-dim 16 --decoder-ffn-embed-dim 32"
ADAM += " --moe-expert-count 4"


def remembered(name, shape):
    """A state of Adam that tells which parameter it is of."""
    generator = torch.Generator().manual_seed(sum(name.encode()) * 1000 + len(name))
    return {
        "step": 10,
        "exp_avg": torch.randn(shape, generator=generator),
        "exp_avg_sq": torch.rand(shape, generator=generator),
    }


# Flags of the models whose settings differ.
SETTINGS = {
    "top-1 on eight, old args": "--moe-top1-expert --moe-freq 1",
    "FSDP, weights too": "--moe-expert-count 6",
    "gpt3, untied": "--arch moe_transformer_lm --moe-freq 1 --decoder-learned-pos",
}


def restored(rank, folder, path, flags, world, reset=False):
    """Updates, and of each parameter of this process its value and the optimizer's exp_avg."""
    cfg = configure(folder, f"{ADAM} {flags}")
    trainer = make_trainer(cfg, "legacy_ddp", world, torch.float32)
    trainer.load_checkpoint(path, reset_optimizer=reset)
    state = trainer.optimizer.state_dict()["state"]
    named = trainer.get_model().named_parameters()
    found = {
        name: (parameter.detach().float().clone(), copy.deepcopy(state.get(i)))
        for i, (name, parameter) in enumerate(named)
    }
    updates = trainer.get_num_updates()
    trainer.train_step([as_sample(next(batches())[:2])])  # the state serves
    return updates, found


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
        TYPES,
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


def drop_a_number(state):
    of = state["last_optimizer_state"]["state"][0]
    of["exp_avg"] = of["exp_avg"][1:]


def drop_a_flat_tensor(state):
    state["shard_metadata"]["param_metadata"].pop()


def add_a_number(state):
    of = state["last_optimizer_state"]["state"][0]
    of["exp_avg"] = torch.zeros(10**6)


BAD_PIECES = {
    "missing": ("shared-shard1", None, "model-shared-shard1.pt: missing; it holds a piece"),
    "replica missing": ("rank-5-shard5", None, "model-rank-5-shard5.pt: missing"),
    "cut": ("shared-shard1", 4000, r"model-shared-shard1.pt: truncated or not a checkpoint"),
    "of another save": ("shared-shard1", "updates", "num_updates 11 and 10"),
    "unequal": ("shared-shard1", drop_a_number, "unequal length.*--reset-optimizer"),
    "too long": ("shared-shard0", add_a_number, "1,000,000 numbers.*--reset-optimizer"),
    "other modules": ("shared-shard0", drop_a_flat_tensor, "FSDP made.*--reset-optimizer"),
    "gathered": (
        "shared-shard0",
        lambda state: state["last_optimizer_state"].update(param_id_map={}),
        "gathered it in one file; add --reset-optimizer",
    ),
}


@pytest.mark.parametrize("case", BAD_PIECES)
def test_pieces_that_do_not_fit_are_told(tmp_path, data, case):
    write_small(
        tmp_path / "run", "FSDP, one module, experts on two ranks each", optimizer=remembered
    )
    part, damage, words = BAD_PIECES[case]
    path = tmp_path / "run" / f"model-{part}.pt"
    if damage is None:
        path.unlink()
    elif isinstance(damage, int):
        path.write_bytes(path.read_bytes()[:damage])
    else:
        change(path, updates if damage == "updates" else damage)
    with pytest.raises(Exception) as caught:
        restored(0, data, str(tmp_path / "run" / "model.pt"), "", 1)
    assert re.search(words, told(caught.value))


def test_an_optimizer_state_that_does_not_fit(tmp_path, data):
    path = str(tmp_path / "run" / "model.pt")
    write_small(tmp_path / "run", optimizer=remembered)
    with pytest.raises(UserError, match="--fp16-no-flatten-grads is given.*--reset-optimizer"):
        restored(0, data, path, "--fp16", 1)

    def cut(state):
        of_first = next(iter(state["last_optimizer_state"]["state"].values()))
        of_first["exp_avg"] = of_first["exp_avg"][:-1].clone()

    change(tmp_path / "run" / "model-rank-1.pt", cut)
    with pytest.raises(UserError, match="same shape for all experts; add --reset-optimizer"):
        restored(0, data, path, "", 1)

    def flat(state):
        state["last_optimizer_state"]["param_groups"][0]["params"] = [0]

    change(tmp_path / "run" / "model-shared.pt", flat)
    with pytest.raises(Exception) as caught:
        restored(0, data, path, "", 1)
    assert "is of 1 tensors" in told(caught.value) and "--reset-optimizer" in told(caught.value)
    updates, found = restored(0, data, path, "", 1, reset=True)
    assert updates == 0 and all(state is None for _, state in found.values())


def told(error):
    """What a user would see of it."""
    from fairseq_moe_ext import compat

    mistake = compat._mistake_to_print(error)
    assert mistake is not None and "\n" not in mistake, error
    return mistake


@needs_reference
def test_the_branch_s_optimizer_state_fits_ours(tmp_path):
    """All of it, by shape: in its numbering, a neighbour's state would rarely fit."""
    files = find(str(REFERENCE / "branch_moe_2ranks" / "checkpoint_last.pt"))
    model = build_model(
        types=4000,
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


def run(capsys, monkeypatch, name, line):
    """A command of fairseq in this process; its status and what it says on stderr."""
    module = __import__(f"fairseq_cli.{name}", fromlist=["cli_main"])
    monkeypatch.setattr(sys, "argv", [f"fairseq-{name}", *line.split()])
    try:
        module.cli_main()
        status = 0
    except SystemExit as stop:
        status = stop.code or 0
    return status, capsys.readouterr().err


TRAIN = f"--user-dir {USER_DIR} --task language_modeling --criterion moe_cross_entropy --cpu"
TRAIN += f" --arch moe_lm_tiny {ADAM} --decoder-attention-heads 2 --batch-size 2 --num-workers 0"
TRAIN += " --no-progress-bar --no-epoch-checkpoints"


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
        status, err = run(capsys, monkeypatch, "train", line)
    assert status == 0, err
    assert "Loaded checkpoint" in caplog.text
    saved = torch.load(target / "checkpoint_last.pt", weights_only=True)
    assert saved["optimizer_history"][-1]["num_updates"] == before + 2


# Dense models, all in one file --------------------------------------------------------------------


def write_dense(folder, **how):
    """A dense checkpoint of the branch and the model of ours with the same weights."""
    settings = {**SMALL, "moe_freq": 0, "moe_expert_count": 0}
    flags = {key: value for key, value in settings.items() if key not in NOT_OURS}
    model = build_model(**flags).eval()
    Path(folder).mkdir(exist_ok=True)
    branch_files.write_dense(
        str(folder), settings, TYPES, branch_files.of_model(model), optimizer=remembered, **how
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
        assert run(capsys, monkeypatch, "eval_lm", evaluated)[0] == 0
        assert f"Loss (base 2): {expected:.4f}" in caplog.text
    # without --task: the command goes by the checkpoint's
    monkeypatch.setattr("fairseq_cli.validate.reset_logging", lambda: None)
    status, err = run(capsys, monkeypatch, "validate", f"{line} --num-workers 0")
    assert status == 0, err
    generated = f"{line} --gen-subset valid --sample-break-mode eos --beam 1 --prefix-size 2"
    generated += " --task language_modeling --max-len-b 5 --tokens-per-sample 64"
    status, err = run(capsys, monkeypatch, "generate", generated)
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
    assert run(capsys, monkeypatch, "train", f"{line} --save-dir {tmp_path / 'new'}") == (0, "")
    for number, name in enumerate(names):
        expected = remembered(name, dict(model.named_parameters())[name].shape)
        assert torch.equal(found[number]["exp_avg"], expected["exp_avg"]), name


# Bad input ---------------------------------------------------------------------------------------


def change(path, edit):
    state = torch.load(path, weights_only=False)
    edit(state)
    torch.save(state, path)


class RunsCode:
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


class Stranger:
    pass


def put(value):
    return lambda state: state.update(extra=value)


def setting(name, value):
    return lambda state: state["cfg"]["model"].update({name: value})


def updates(state):
    state["optimizer_history"][-1]["num_updates"] = 11


def halve_experts(state):
    state["model"] = {k: v for k, v in state["model"].items() if ".experts.1." not in k}


BAD = {
    "missing": ("rank-1", None, r"model-rank-1.pt missing: its 4 experts are in 2 files"),
    "no shared": ("shared", None, "model-shared.pt: missing"),
    "cut": ("rank-1", 4000, r"model-rank-1.pt: truncated or not a checkpoint \(4,000 bytes"),
    "empty": ("shared", 0, "model-shared.pt: truncated"),
    "other updates": ("rank-1", updates, "num_updates 11 and 10"),
    "other run": ("rank-0", setting("dropout", 0.3), "belongs to another checkpoint"),
    "other ranks": ("rank-1", halve_experts, "has 1 experts a layer.*has 2"),
    "three experts": ("shared", setting("moe_expert_count", 3), "different runs|do not divide"),
    "system": ("rank-1", put(RunsCode(os.system, "true")), "rank-1.pt: refused.*system"),
    "eval": ("rank-0", put(RunsCode(eval, "1 + 1")), "rank-0.pt: refused.*eval"),
    "class": ("shared", put(Stranger()), "shared.pt: refused.*Stranger"),
    "adaptive": ("all", setting("adaptive_softmax_cutoff", [10]), "adaptive_softmax_cutoff"),
    "characters": ("all", setting("character_embeddings", True), "character_embeddings"),
    "post-norm": ("all", setting("decoder_normalize_before", False), "decoder_normalize_before"),
    "projected": ("all", setting("decoder_input_dim", 8), "decoder_input_dim 8"),
    "other model": ("all", setting("_name", "transformer"), "architecture transformer"),
    "not a checkpoint": ("rank-0", lambda state: state.pop("model"), "no model in it"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_end_in_one_line(tmp_path, data, case, capsys, monkeypatch):
    write_small(tmp_path / "run")
    part, damage, words = BAD[case]
    paths = list((tmp_path / "run").glob("*.pt" if part == "all" else f"model-{part}.pt"))
    assert paths
    for path in paths:
        if damage is None:
            path.unlink()
        elif isinstance(damage, int):
            path.write_bytes(path.read_bytes()[:damage])
        else:
            change(path, damage)
    line = f"{data} --path {tmp_path}/run/model.pt --user-dir {USER_DIR} --gen-subset valid --cpu"
    status, err = run(capsys, monkeypatch, "eval_lm", line)
    errors = [line for line in err.splitlines() if line.startswith("error:")]
    assert status == 1 and len(errors) == 1, err
    assert re.search(words, errors[0]), errors
    assert "Traceback" not in err


def refusal(rank, folder, data):
    try:
        loaded_logits(rank, folder, data, AS_SAVED)
    except UserError as error:
        return str(error)
    return ""


def test_processes_that_cannot_hold_the_experts(tmp_path, data):
    settings = {**SMALL, "moe_expert_count": 3}
    model = build_model(**{**SHAPE, "moe_expert_count": 3})
    branch_files.write(str(tmp_path), settings, TYPES, 3, branch_files.of_model(model))
    for message in run_processes(2, refusal, str(tmp_path), data):
        assert "3 cannot be spread over 2 processes" in message


def test_stale_files_of_more_ranks_are_not_mixed_in(tmp_path, data, caplog):
    """The branch, resumed on fewer ranks, writes its rank-0 beside the old rank-1."""
    write_small(tmp_path / "old", "two ranks", seed=1)
    model = write_small(tmp_path / "run", "one rank")
    shutil.copy(tmp_path / "old" / "model-rank-1.pt", tmp_path / "run")
    logits = loaded_logits(0, str(tmp_path / "run"), data, AS_SAVED)
    assert torch.equal(logits, model(tokens())[0])
    assert "model-rank-1.pt is left unread" in caplog.text


# The released models -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """A folder laid out as en_moe_lm_15b, of small width."""
    folder = tmp_path_factory.mktemp("released")
    settings = {
        **branch_files.RELEASED_15B,
        "decoder_embed_dim": 24,
        "decoder_ffn_embed_dim": 32,
    }
    branch_files.write(str(folder), settings, 50264, 64, branch_files.random_tensors())
    return folder


def gpt2_dictionary(lines, padding=0):
    dictionary = Dictionary()
    for i in range(lines):
        dictionary.add_symbol(str(i), n=1)
    for i in range(padding):
        dictionary.add_symbol(f"madeupword{1000 + i}", n=0)
    return dictionary


@pytest.mark.parametrize("world", [1, 2])
def test_the_released_layout_goes_all_the_way(released, tmp_path, world):
    data = make_data_bin(tmp_path, gpt2_dictionary(50260))
    assert len((tmp_path / "dict.txt").read_text().splitlines()) == 50260
    results = [
        perplexities(
            world,
            data,
            *("--path", released / "model.pt", "--batch-size", "1", "--tokens-per-sample", "32"),
            *("--sample-break-mode", "eos"),
            "--model-overrides",
            "{'world_size': 4, 'moe_eval_capacity_token_fraction': 1.0, "
            f"'moe_experts_on_disk': {on_disk}}}",
        )
        for on_disk in (False, True)
    ]
    assert results[0] == results[1] and 1e3 < results[0][0] < 1e6


def test_a_dictionary_of_another_size_is_told_with_its_remedy(
    released, tmp_path, capsys, monkeypatch
):
    data = make_data_bin(tmp_path, gpt2_dictionary(50257))
    line = f"{data} --path {released}/model.pt --user-dir {USER_DIR} --gen-subset valid --cpu"
    status, err = run(capsys, monkeypatch, "eval_lm", line)
    errors = [line for line in err.splitlines() if line.startswith("error:")]
    assert status == 1 and len(errors) == 1
    assert "50264" in errors[0] and "50261" in errors[0] and "madeupword" in errors[0]


def test_a_padded_dictionary_fits_a_padded_vocabulary(tmp_path):
    settings = {**SMALL, "moe_freq": 4, "memory_efficient_fp16": True}
    branch_files.write(str(tmp_path), settings, 51200, 2, branch_files.random_tensors())
    (tmp_path / "data").mkdir()
    data = make_data_bin(tmp_path / "data", gpt2_dictionary(50260, 51200 - 50264))
    lm = MoETransformerLanguageModel.from_pretrained(str(tmp_path), "model.pt", data)
    assert len(lm.src_dict) == 51200


def test_old_args_are_left_as_they_were_saved():
    saved = Namespace(**branch_files.complete(SMALL), arch="transformer_lm_gpt", lr=[0.1])
    settings = translated_settings("x.pt", vars(saved))
    assert settings["moe_expert_count"] == 4 and settings["_name"] == "moe_transformer_lm"
    assert "lr" not in settings and PAD == 1
    assert checkpoint_utils.load_checkpoint_to_cpu.reads_branch
