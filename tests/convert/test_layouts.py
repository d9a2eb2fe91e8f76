"""`fairseq-moe convert`: every layout to every other, the numbers untouched."""

import re

import branch_files
import pytest
import torch
from branch_checkpoints import (
    REFERENCE,
    REPORTED,
    needs_reference,
    perplexities,
    remembered,
    write_small,
)
from converting import ALL, MOE, convert, evaluated, load, mistake, same
from small_models import build_model, make_config
from training import TRAIN, expert_files, train_on

from fairseq_moe_ext.branch.settings import translated_settings
from fairseq_moe_ext.branch.writing import branch_settings, left_out
from fairseq_moe_ext.config import defaults
from fairseq_moe_ext.errors import UserError
from fairseq_moe_ext.router_flags import top_k
from fairseq_moe_ext.wording import flag


def next_losses(data, path, folder, world=1, flags=MOE):
    line = f"{data} {TRAIN} {flags} --restore-file {path} --save-dir {folder}/none --no-save"
    return train_on(world, line)


def test_to_files_of_experts_and_back(data, run, tmp_path):
    source, losses = run(MOE)
    convert(source, tmp_path / "a" / "x.pt", "--expert-files", 2)
    convert(tmp_path / "a" / "x.pt", tmp_path / "b" / "x.pt", "--expert-files", 4)
    convert(tmp_path / "b" / "x.pt", tmp_path / "back.pt")
    assert [len(expert_files(tmp_path / name)) for name in "ab"] == [2, 4]
    assert same(load(tmp_path / "back.pt"), load(source))
    assert list(load(tmp_path / "back.pt")["model"]) == list(load(source)["model"])
    for file in (tmp_path / "a").glob("experts/*"):
        state = load(file)
        assert state["count"] == 2 and state["optimizer"].keys() == state["model"].keys()
        rows = slice(state["first"], state["first"] + 2)
        for name, value in state["model"].items():
            assert torch.equal(value, load(source)["model"][name][rows])
    assert next_losses(data, tmp_path / "a" / "x.pt", tmp_path) == losses
    assert next_losses(data, tmp_path / "b" / "x.pt", tmp_path, 2) == pytest.approx(losses, 1e-5)


@pytest.mark.parametrize("part", ["gate", "experts"])
def test_frozen_parameters_have_no_number_in_the_optimizer(data, run, tmp_path, capsys, part):
    frozen = f"{MOE} --moe-freeze {part}"
    source, losses = run(frozen)
    convert(source, tmp_path / "a" / "x.pt", "--expert-files", 2)
    convert(tmp_path / "a" / "x.pt", tmp_path / "back.pt")
    assert same(load(tmp_path / "back.pt"), load(source))
    assert next_losses(data, tmp_path / "a" / "x.pt", tmp_path, flags=frozen) == losses
    convert(source, tmp_path / "x.pt", "--to", "branch", "--rank-files", 2)
    assert next_losses(data, tmp_path / "x.pt", tmp_path, flags=frozen) == losses


def test_an_optimizer_state_of_other_parameters_is_refused(run, tmp_path, capsys):
    """Without the numbers of the parameters, the experts' part would be lost."""
    convert(run(MOE)[0], tmp_path / "a" / "x.pt", "--expert-files", 2)
    state = load(tmp_path / "a" / "x.pt")
    state["last_optimizer_state"]["param_groups"][0]["params"].append(99)
    torch.save(state, tmp_path / "a" / "more.pt")
    line = mistake(capsys, tmp_path / "a" / "more.pt", tmp_path / "one.pt")
    assert re.search("optimizer state has .* tensors.*add --weights-only", line)


def test_to_the_branch_and_back(data, run, tmp_path):
    source, losses = run(MOE)
    convert(source, tmp_path / "x.pt", "--to", "branch", "--rank-files", 2)
    names = ["dict.txt", "x-rank-0.pt", "x-rank-1.pt", "x-shared.pt"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    convert(tmp_path / "x.pt", tmp_path / "back.pt")
    before, after = load(source), load(tmp_path / "back.pt")
    for part in ("model", "last_optimizer_state"):
        assert same(after[part], before[part])
    assert next_losses(data, tmp_path / "x.pt", tmp_path) == losses
    assert next_losses(data, tmp_path / "back.pt", tmp_path) == losses
    evaluate = "--model-overrides", ALL
    assert evaluated(data, tmp_path / "x.pt", *evaluate) == evaluated(data, source, *evaluate)


def test_written_as_the_branch_numbers_and_orders(tmp_path, run):
    """Against tests/branch_files.py, which writes the layout by itself."""
    source, _ = run(MOE)
    convert(source, tmp_path / "x.pt", "--to", "branch", "--rank-files", 2)
    state = load(source)
    settings = load(tmp_path / "x-shared.pt")["cfg"]["model"]
    remembered = {}
    numbers = iter(range(1000))
    model = build_model(0, **{k: settings[k] for k in OF_MODEL}, vocabulary=len(numbers_of(state)))
    for name, _ in model.named_parameters():
        remembered[name] = state["last_optimizer_state"]["state"][next(numbers)]

    def optimizer(name, shape):
        if ".experts." not in name:
            return remembered[name]
        stacked = remembered[re.sub(r"\.experts\.\d+", ".experts", name)]
        number = int(name.split(".experts.")[1].split(".")[0])
        return {k: v[number] if torch.is_tensor(v) and v.dim() else v for k, v in stacked.items()}

    (tmp_path / "by").mkdir()
    branch_files.write(
        str(tmp_path / "by"),
        settings,
        len(numbers_of(state)),
        2,
        lambda name, shape: branch_files.part_of(state["model"], name),
        name="x",
        optimizer=optimizer,
    )
    for part in ("shared", "rank-0", "rank-1"):
        ours, theirs = (load(folder / f"x-{part}.pt") for folder in (tmp_path, tmp_path / "by"))
        assert same(ours["model"], theirs["model"])
        assert list(ours["model"]) == list(theirs["model"])
        ours, theirs = (s["last_optimizer_state"] for s in (ours, theirs))
        assert same(ours["state"], theirs["state"])
        assert ours["param_groups"][0]["params"] == theirs["param_groups"][0]["params"]


OF_MODEL = ["decoder_layers", "decoder_embed_dim", "decoder_ffn_embed_dim", "moe_freq"]
OF_MODEL += ["decoder_attention_heads", "share_decoder_input_output_embed", "moe_expert_count"]


def numbers_of(state):
    return state["model"]["decoder.embed_tokens.weight"]


@needs_reference
@pytest.mark.slow
def test_the_branch_s_own_files(tmp_path):
    source = REFERENCE / "branch_moe_2ranks" / "checkpoint_last.pt"
    convert(source, tmp_path / "one.pt")
    convert(source, tmp_path / "some" / "x.pt", "--expert-files", 4, "--weights-only")
    (found,) = perplexities(
        1,
        REFERENCE / "wikitext2_valid_bin",
        *("--path", tmp_path / "some" / "x.pt", "--sample-break-mode", "none"),
        *("--tokens-per-sample", "128", "--batch-size", "1", "--model-overrides", ALL),
    )
    assert found == pytest.approx(REPORTED[1.0], rel=1e-5)
    convert(tmp_path / "one.pt", tmp_path / "x.pt", "--to", "branch", "--rank-files", 2)
    for part in ("shared", "rank-0", "rank-1"):
        theirs = load(str(source).replace(".pt", f"-{part}.pt"))
        ours = load(tmp_path / f"x-{part}.pt")
        for key in ("model", "last_optimizer_state"):
            assert same(ours[key], theirs[key]), (part, key)
        assert ours["cfg"]["model"].keys() == theirs["cfg"]["model"].keys()
        assert ours["extra_state"]["train_iterator"] == theirs["extra_state"]["train_iterator"]


@needs_reference
def test_the_settings_are_the_branch_s():
    """It takes no other."""
    path = str(REFERENCE / "branch_moe_2ranks" / "checkpoint_last-shared.pt")
    theirs = load(path)["cfg"]["model"]
    ours = branch_settings(path, translated_settings(path, theirs))
    assert ours.keys() == theirs.keys()


def test_from_the_branch_s_fsdp(tmp_path):
    """Sharded files and others of the same model become the same file."""
    states = []
    for case in ("two ranks", "FSDP", "FSDP, one module, experts on two ranks each"):
        folder = tmp_path / str(len(states))
        write_small(folder, case, optimizer=remembered)
        convert(folder / "model.pt", folder / "one.pt")
        states.append(load(folder / "one.pt"))
    assert len(states[0]["last_optimizer_state"]["state"]) > 0
    for state in states[1:]:
        assert state.keys() == states[0].keys()
        for key in ("model", "last_optimizer_state"):
            assert same(state[key], states[0][key])


@pytest.mark.parametrize("dtype", ["float16", "bf16"])
def test_half_precision(data, run, tmp_path, dtype):
    source, _ = run(MOE)
    convert(source, tmp_path / "x.pt", "--dtype", dtype, "--expert-files", 2)
    convert(tmp_path / "x.pt", tmp_path / "y.pt", "--weights-only")
    before, after = load(source), load(tmp_path / "y.pt")
    half = {"float16": torch.float16, "bf16": torch.bfloat16}[dtype]
    for name, value in before["model"].items():
        is_stocks = name.endswith(("version", "_float_tensor"))
        wanted = value if is_stocks else value.to(half)
        assert same(after["model"][name], wanted)
    assert after["last_optimizer_state"] is None
    convert(tmp_path / "x.pt", tmp_path / "z.pt")
    assert same(load(tmp_path / "z.pt")["last_optimizer_state"], before["last_optimizer_state"])
    evaluate = "--model-overrides", ALL
    (expected,) = evaluated(data, source, *evaluate)
    assert evaluated(data, tmp_path / "y.pt", *evaluate)[0] == pytest.approx(expected, rel=1e-2)


OTHER = {
    **{"activation_fn": "relu", "moe_router": "hash", "moe_score": "sigmoid", "moe_freeze": "gate"},
    **{"moe_second_expert_policy": "all", "moe_pad_rule": "counted", "moe_balance": "none"},
    **{"moe_routing_scope": "world", "moe_normalize_weights": "before", "moe_layers": "0"},
    **{"moe_normalize_expert_grad": "sqrt_world_size", "moe_balance_over": "sequence"},
    **{"moe_base_evaluation": "balanced", "moe_capacity_factor": 1.25, "moe_expert_dropout": 0.3},
    **{"moe_latent_dim": 4, "moe_bias_update_rate": 0.1, "moe_expert_ffn_dim": 5},
    **dict.fromkeys(("fp16", "fp16_no_flatten_grads", "memory_efficient_fp16"), True),
    **{"max_target_positions": 32, "moe_first_dense": 2},
    "moe_shared_expert_ffn_dim": 5,
}
NO_NUMBER = {"bf16", "compile", "moe_experts_on_disk"}
NO_NUMBER |= {"batch_size", "ddp_backend", "moe_dense_twin"}  # of another kind of model


def settings_of(**flags):
    return {**vars(make_config(moe_freq=2, moe_expert_count=4, **flags)), "moe_pad_rule": "branch"}


@pytest.mark.parametrize("name", sorted(defaults().keys() - NO_NUMBER))
def test_no_setting_is_lost_on_the_way_to_the_branch_in_silence(name):
    settings = settings_of()
    old = settings[name]
    new = OTHER[name] if name in OTHER else not old if isinstance(old, bool) else (old or 0) + 1
    assert str(new) != str(old)
    changed = {**settings, name: new}
    try:
        kept = branch_settings("x.pt", changed) != branch_settings("x.pt", settings)
    except UserError as error:
        assert re.search("--moe|gated", str(error))
    else:
        assert kept or flag(name) in " ".join(left_out(changed))
    assert left_out(settings) == []
    assert left_out({**settings, "moe_capacity_factor": float(top_k(settings))}) == []


def test_a_name_that_means_another_rule_in_the_branch_is_not_written():
    """NLLB's branch calls sqrt_world_size sqrt_num_experts, too; ours is smaller."""
    ours = {**settings_of(), "moe_normalize_expert_grad": "sqrt_num_experts"}
    assert branch_settings("x.pt", ours)["moe_normalize_expert_grad"] == "world_size"
    assert left_out(ours) == ["--moe-normalize-expert-grad sqrt_num_experts"]


def test_the_capacity_of_training_is_kept_at_evaluation_or_refused():
    by_training = {"moe_eval_capacity_token_fraction": -1.0}
    for factor in (None, 2.0):
        branch_settings("x.pt", settings_of(moe_capacity_factor=factor, **by_training))
    branch_settings("x.pt", settings_of(moe_capacity_factor=1.25))
    with pytest.raises(UserError, match="--moe-capacity-factor 1.25.*no factor"):
        branch_settings("x.pt", settings_of(moe_capacity_factor=1.25, **by_training))


def test_a_gate_in_float32_stays_one_in_the_branch():
    settings = settings_of(moe_gating_fp32_product=True)
    assert branch_settings("x.pt", settings)["moe_gating_use_fp32"] is True


def test_flags_that_the_branch_lacks_are_reported(run, tmp_path, caplog):
    convert(run(MOE)[0], tmp_path / "x.pt", "--to", "branch")
    assert "cannot record --moe-pad-rule real, --moe-routing-scope world: fairseq's" in caplog.text
