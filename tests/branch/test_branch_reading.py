"""Checkpoints in the layout of fairseq's `moe` branch: their logits, perplexities and costs."""

import json
import re
from argparse import Namespace
from pathlib import Path

import branch_files
import pytest
import torch
import torch.nn.functional as F
from branch_checkpoints import (
    ADAM,
    AS_SAVED,
    CHECKPOINTS,
    REFERENCE,
    REPORTED,
    SHAPE,
    SMALL,
    change,
    loaded_logits,
    needs_reference,
    perplexities,
    tokens,
    write_small,
)
from fairseq import checkpoint_utils
from processes import run_processes
from small_models import PAD, VOCABULARY, build_model
from updates import configure, make_trainer

from fairseq_moe_ext import cli
from fairseq_moe_ext.branch.files import find
from fairseq_moe_ext.branch.settings import OtherModel, translated_settings
from fairseq_moe_ext.errors import UserError
from fairseq_moe_ext.models.language_model import MoETransformerLanguageModel

QUICK = [(1, 1.0)]
PAGE = (Path(__file__).parents[2] / "docs" / "released_models.md").read_text(encoding="utf-8")


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
    branch_files.write(str(tmp_path), settings, VOCABULARY, 2, branch_files.of_model(model))
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
    with pytest.raises(UserError, match="--moe-experts-on-disk.*remove it"):
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
    settings = {"cfg": {"model": {"_name": "transformer_lm", "moe_freq": 2}}}
    torch.save({"model": {"decoder.version": 0}, **settings}, whole)  # model-shared.pt, renamed
    assert find(whole).shared == whole
    (tmp_path / "a-shared.pt").unlink()
    (tmp_path / "a.pt").unlink()
    with pytest.raises(UserError, match="a-shared.pt: missing"):
        find(str(tmp_path / "a.pt"))


UNKNOWN_HERE = [
    {"alibi": True},
    {"decoder_learned_sinusoidal": True},
    {"moe_cmr": True},
    {"moe_eom": 0.2},
    {"moe_eval_capacity_max_seqlen": True},
    {"moe_fom": 0.1},
    {"scale_heads_inside": True},
]


@pytest.mark.parametrize("saved", UNKNOWN_HERE, ids=lambda saved: "".join(saved))
def test_settings_of_later_states_of_the_branch_are_refused_by_name(saved):
    """Three of them leave no trace in the tensors."""
    settings = branch_files.complete(SMALL)
    ((name, value),) = saved.items()
    assert f"`{name}`" in PAGE.partition("Not supported, and rejected")[2]
    translated_settings("x.pt", {**settings, name: type(value)(0)})
    with pytest.raises(OtherModel, match=rf"^x.pt: .* plugin lacks, .*: {name} {value}$"):
        translated_settings("x.pt", {**settings, **saved})


def test_priority_with_one_expert_per_token_is_ignored_as_in_the_branch(tmp_path, data):
    """Nobody could remove the setting from the files."""
    model = write_small(tmp_path / "run", "top-1")

    def prioritize(state):
        state["cfg"]["model"]["moe_batch_prioritized_routing"] = True

    for path in (tmp_path / "run").glob("*.pt"):
        change(path, prioritize)
    logits = loaded_logits(0, str(tmp_path / "run"), data, AS_SAVED)
    assert torch.equal(logits, model(tokens())[0])


def test_the_tanh_approximation_of_gelu_by_an_override(tmp_path, data):
    """docs/released_models.md: the branch computes it on a GPU with Megatron."""
    ((override, name),) = re.findall(r"\"\{'(activation_fn)': '(\w+)'\}\"", PAGE)
    model = write_small(tmp_path / "run")
    exact = model(tokens())[0]
    for module in model.modules():
        if hasattr(module, "activation"):
            module.activation = lambda x: F.gelu(x, approximate="tanh")
    logits = loaded_logits(0, str(tmp_path / "run"), data, {**AS_SAVED, override: name})
    gap = (logits - exact).abs().max()
    assert (logits - model(tokens())[0]).abs().max() < 1e-5 < gap / 20


def test_old_args_are_left_as_they_were_saved():
    saved = Namespace(**branch_files.complete(SMALL), arch="transformer_lm_gpt", lr=[0.1])
    settings = translated_settings("x.pt", vars(saved))
    assert settings["moe_expert_count"] == 4 and settings["_name"] == "moe_transformer_lm"
    assert "lr" not in settings and PAD == 1
    assert checkpoint_utils.load_checkpoint_to_cpu.__wrapped__
