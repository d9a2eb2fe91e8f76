"""Files of the branch that are damaged, mixed or of what we have not: told in one line."""

import os
import re
import shutil

import branch_files
import pytest
import torch
from branch_checkpoints import (
    AS_SAVED,
    SHAPE,
    SMALL,
    USER_DIR,
    change,
    loaded_logits,
    remembered,
    restored,
    run,
    tokens,
    write_small,
)
from pickles import RunsCode
from processes import run_processes
from small_models import VOCABULARY, build_model
from training import error_in

from fairseq_moe_ext.errors import UserError


def drop_a_number(state):
    of = state["last_optimizer_state"]["state"][0]
    of["exp_avg"] = of["exp_avg"][1:]


def drop_a_flat_tensor(state):
    state["shard_metadata"]["param_metadata"].pop()


def add_a_number(state):
    of = state["last_optimizer_state"]["state"][0]
    of["exp_avg"] = torch.zeros(10**6)


def damage_file(path, damage):
    """None: remove it; a number: cut it to so many bytes; a function of its state: change it."""
    if damage is None:
        path.unlink()
    elif isinstance(damage, int):
        path.write_bytes(path.read_bytes()[:damage])
    else:
        change(path, damage)


BAD_PIECES = {
    "missing": ("shared-shard1", None, "model-shared-shard1.pt: missing; it holds a shard"),
    "replica missing": ("rank-5-shard5", None, "model-rank-5-shard5.pt: missing"),
    "cut": ("shared-shard1", 4000, r"model-shared-shard1.pt: truncated or not a checkpoint"),
    "of another save": ("shared-shard1", "updates", "num_updates 11 and 10"),
    "unequal": ("shared-shard1", drop_a_number, "differ in length.*--reset-optimizer"),
    "too long": ("shared-shard0", add_a_number, "1,000,000 numbers.*--reset-optimizer"),
    "other modules": ("shared-shard0", drop_a_flat_tensor, "FSDP made.*--reset-optimizer"),
    "gathered": (
        "shared-shard0",
        lambda state: state["last_optimizer_state"].update(param_id_map={}),
        "gathered it in one file; add --reset-optimizer",
    ),
}


@pytest.mark.parametrize("case", BAD_PIECES)
def test_pieces_that_do_not_fit_are_reported(tmp_path, data, case):
    write_small(
        tmp_path / "run", "FSDP, one module, experts on two ranks each", optimizer=remembered
    )
    part, damage, words = BAD_PIECES[case]
    path = tmp_path / "run" / f"model-{part}.pt"
    damage_file(path, updates if damage == "updates" else damage)
    with pytest.raises(Exception) as caught:
        restored(0, data, str(tmp_path / "run" / "model.pt"), "", 1)
    assert re.search(words, told(caught.value))


def test_an_optimizer_state_that_does_not_fit(tmp_path, data):
    path = str(tmp_path / "run" / "model.pt")
    write_small(tmp_path / "run", optimizer=remembered)
    with pytest.raises(UserError, match="--fp16-no-flatten-grads is set.*--reset-optimizer"):
        restored(0, data, path, "--fp16", 1)

    def cut(state):
        of_first = next(iter(state["last_optimizer_state"]["state"].values()))
        of_first["exp_avg"] = of_first["exp_avg"][:-1].clone()

    change(tmp_path / "run" / "model-rank-1.pt", cut)
    with pytest.raises(UserError, match="in shape between experts; add --reset-optimizer"):
        restored(0, data, path, "", 1)

    def flat(state):
        state["last_optimizer_state"]["param_groups"][0]["params"] = [0]

    change(tmp_path / "run" / "model-shared.pt", flat)
    with pytest.raises(Exception) as caught:
        restored(0, data, path, "", 1)
    assert "has 1 tensors" in told(caught.value) and "--reset-optimizer" in told(caught.value)
    updates, found = restored(0, data, path, "", 1, reset=True)
    assert updates == 0 and all(state is None for _, state in found.values())


def told(error):
    """What a user would see of it."""
    from fairseq_moe_ext.patches.messages import mistake_to_print

    mistake = mistake_to_print(error)
    assert mistake is not None and "\n" not in mistake, error
    return mistake


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
    "other ranks": ("rank-1", halve_experts, "has 1 expert per layer.*has 2"),
    "three experts": ("shared", setting("moe_expert_count", 3), "different runs|does not divide"),
    "system": ("rank-1", put(RunsCode(os.system, "true")), "rank-1.pt: rejected.*system"),
    "eval": ("rank-0", put(RunsCode(eval, "1 + 1")), "rank-0.pt: rejected.*eval"),
    "class": ("shared", put(Stranger()), "shared.pt: rejected.*Stranger"),
    "adaptive": ("all", setting("adaptive_softmax_cutoff", [10]), "adaptive_softmax_cutoff"),
    "characters": ("all", setting("character_embeddings", True), "character_embeddings"),
    "post-norm": ("all", setting("decoder_normalize_before", False), "decoder_normalize_before"),
    "alibi": ("all", setting("alibi", True), "this plugin lacks, .*alibi True"),
    "projected": ("all", setting("decoder_input_dim", 8), "decoder_input_dim 8"),
    "other model": ("all", setting("_name", "transformer"), "architecture transformer"),
    "not a checkpoint": ("rank-0", lambda state: state.pop("model"), "contains no model"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_end_in_one_line(tmp_path, data, case, capsys, monkeypatch):
    write_small(tmp_path / "run")
    part, damage, words = BAD[case]
    paths = list((tmp_path / "run").glob("*.pt" if part == "all" else f"model-{part}.pt"))
    assert paths
    for path in paths:
        damage_file(path, damage)
    line = f"{data} --path {tmp_path}/run/model.pt --user-dir {USER_DIR} --gen-subset valid --cpu"
    status, err = run(capsys, "eval_lm", line)
    assert status == 1 and re.search(words, error_in(err)), err


def refusal(rank, folder, data):
    try:
        loaded_logits(rank, folder, data, AS_SAVED)
    except UserError as error:
        return str(error)
    return ""


def test_processes_that_cannot_hold_the_experts(tmp_path, data):
    settings = {**SMALL, "moe_expert_count": 3}
    model = build_model(**{**SHAPE, "moe_expert_count": 3})
    branch_files.write(str(tmp_path), settings, VOCABULARY, 3, branch_files.of_model(model))
    for message in run_processes(2, refusal, str(tmp_path), data):
        assert "3 cannot be sharded over 2 processes" in message


def test_stale_files_of_more_ranks_are_not_mixed_in(tmp_path, data, caplog):
    """The branch, resumed on fewer ranks, writes its rank-0 beside the old rank-1."""
    write_small(tmp_path / "old", "two ranks", seed=1)
    model = write_small(tmp_path / "run", "one rank")
    shutil.copy(tmp_path / "old" / "model-rank-1.pt", tmp_path / "run")
    logits = loaded_logits(0, str(tmp_path / "run"), data, AS_SAVED)
    assert torch.equal(logits, model(tokens())[0])
    assert "model-rank-1.pt is ignored" in caplog.text
