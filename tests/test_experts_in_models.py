"""Kinds of experts in whole models: training on several processes, checkpoints, conversion, frozen
parts. tests/models/test_language_model.py has what one process computes."""

import pytest
import torch
from converting import convert, evaluated, load, logits, mistake, same
from processes import run_processes
from small_models import MOE, make_config
from training import SAVED, SHARDED, TRAIN, error_of, make_data, resume, train_on
from training import first_run as first_run_of
from updates import WORLD, assert_same, configure, one_process, processes, train

from fairseq_moe_ext.branch.writing import branch_settings
from fairseq_moe_ext.config_checks import validate
from fairseq_moe_ext.errors import UserError

# Kinds of experts of models with two layers.
LINES = {
    "gated": "--activation-fn swiglu --moe-layers 0",
    "shared": "--moe-shared-experts 2 --moe-expert-ffn-dim 5 --moe-freq 1",
    "null": "--moe-null-experts 3 --moe-router sinkhorn",
    "null bias": "--moe-null-experts 3 --moe-score sigmoid --moe-balance bias",
    "all": "--activation-fn geglu --moe-shared-experts 1 --moe-latent-dim 6 --moe-top-k 3"
    " --moe-null-experts 2 --moe-freq 1 --moe-first-dense 1",
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"))


def processes_errors(folder, flags):
    """The error that each of two processes ends with."""
    return run_processes(
        2, error_of, train, configure(folder, flags), "fully_sharded", 2, 1, None, 1
    )


OFTEN = [
    ("legacy_ddp", "gated"),
    ("legacy_ddp", "null bias"),
    ("pytorch_ddp", "shared"),
    ("fully_sharded", "all"),
]


@pytest.mark.parametrize(
    "backend, kind",
    [
        pytest.param(backend, kind, marks=[] if (backend, kind) in OFTEN else [pytest.mark.slow])
        for backend in ("legacy_ddp", "pytorch_ddp", "fully_sharded")
        for kind in LINES
    ],
)
def test_several_processes_equal_one(folder, backend, kind):
    """Losses, metrics, gradients, parameters and outputs of five updates."""
    for rule in ("--moe-dropless", "--moe-capacity-factor 1"):
        flags = f"--moe-expert-count 4 {LINES[kind]} {rule} {WORLD}"
        one = one_process(folder, flags)
        assert (one.figures[0]["overflow"] > 0) == ("factor" in rule)
        assert_same(one, processes(2, folder, flags, backend), 4)


@pytest.mark.slow
def test_four_processes_equal_one_where_they_are_more_than_experts(folder):
    flags = f"--moe-expert-count 2 {LINES['shared']} --moe-dropless {WORLD}"
    assert_same(one_process(folder, flags), processes(4, folder, flags), 2)


@pytest.mark.parametrize("first, then", [(2, 1), pytest.param(1, 4, marks=pytest.mark.slow)])
def test_a_resumed_run_equals_the_uninterrupted_one(data, tmp_path, first, then):
    losses = first_run_of(data, tmp_path, first, 4, LINES["all"])
    resumed = resume(data, tmp_path, then, 4, LINES["all"])
    assert resumed == pytest.approx(losses[SAVED:], rel=1e-5)
    assert resume(data, tmp_path, first, 4, LINES["all"]) == losses[SAVED:]
    from_disk = {"moe_experts_on_disk": True}
    plain, mapped = (
        perplexity_of(data, tmp_path / "checkpoint_last.pt", each) for each in ({}, from_disk)
    )
    assert mapped == plain


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["all", "null bias"])
def test_a_sharded_run_goes_on_sharded_and_not(data, tmp_path, kind):
    """From two processes under FSDP to four, and to one without it."""
    options = f"{LINES[kind]} {SHARDED} 0"
    losses = first_run_of(data, tmp_path, 2, 4, options)[SAVED:]
    assert resume(data, tmp_path, 4, 4, options) == pytest.approx(losses, rel=1e-5)
    assert resume(data, tmp_path, 1, 4, LINES[kind]) == pytest.approx(losses, rel=1e-5)


def perplexity_of(data, path, overrides):
    return evaluated(data, path, "--model-overrides", str(overrides).replace(" ", ""))


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """flags -> checkpoint of four updates on one process."""

    def start(flags):
        folder = tmp_path_factory.mktemp("run")
        line = f"{data} {TRAIN} {flags} --moe-expert-count 4 --save-dir {folder}"
        train_on(1, f"{line} --max-update 2")
        return folder / "checkpoint_last.pt"

    return start


def test_conversion(data, run, tmp_path, capsys):
    """To files of experts and back; what the branch and XGLM do not have is refused by name."""
    source = run(LINES["all"])
    convert(source, tmp_path / "x.pt", "--expert-files", 2)
    convert(tmp_path / "x.pt", tmp_path / "y.pt")
    assert same(load(tmp_path / "y.pt")["model"], load(source)["model"])
    torch.testing.assert_close(logits(tmp_path / "x.pt", data), logits(source, data))
    words = mistake(capsys, source, tmp_path / "b.pt", "--to", "branch")
    assert "--activation-fn geglu" in words
    assert "4 experts" in mistake(capsys, source, tmp_path / "hf", "--to", "xglm")


@pytest.mark.parametrize(
    "flags, words",
    [
        ({"moe_shared_experts": 2}, "has --moe-shared-experts 2; the branch has no such experts"),
        ({"moe_latent_dim": 4}, "has --moe-latent-dim 4; the branch has no such experts"),
        ({"moe_null_experts": 3}, "has --moe-null-experts 3; the branch has no such experts"),
        ({"moe_layers": "0,1"}, r"has MoE layers 0, 1 \(--moe-layers"),
        ({"activation_fn": "geglu"}, "has --activation-fn geglu; the branch has no gated"),
        (
            {"moe_dense_twin": True, "moe_latent_dim": 7, "moe_expert_ffn_dim": 5},
            "has dense layers of widths 11, 12 .--moe-dense-twin.; the branch has one width",
        ),
    ],
)
def test_what_the_branch_does_not_have(flags, words):
    with pytest.raises(UserError, match=words):
        branch_settings("x.pt", {**vars(make_config(**MOE)), **flags})


def test_layers_and_twins_that_the_branch_can_have():
    listed = branch_settings("x.pt", vars(make_config(**{**MOE, "moe_layers": "1,3"})))
    assert listed["moe_freq"] == 2 and "moe_layers" not in listed
    twin = branch_settings("x.pt", vars(make_config(**MOE, moe_dense_twin=True)))
    assert twin["alternate_decoder_ffn_embed_dim"] == 64


def test_gated_networks_are_upcycled_into_listed_layers(data, run, tmp_path, capsys):
    source = run("--activation-fn swiglu --alternate-decoder-ffn-embed-dim 20")
    up = "--upcycle", "--moe-expert-count", 4, "--moe-layers"
    convert(source, tmp_path / "x.pt", *up, "1")
    torch.testing.assert_close(
        logits(tmp_path / "x.pt", data), logits(source, data), rtol=1e-12, atol=1e-12
    )
    assert "experts have one width" in mistake(capsys, source, tmp_path / "y.pt", *up, "0,1")
    assert "there is no layer 2" in mistake(capsys, source, tmp_path / "y.pt", *up, "2")


def test_a_twin_whose_layers_are_alike_is_any_dense_model(data, run, tmp_path):
    """Though its width is not that of --decoder-ffn-embed-dim."""
    source = run("--moe-freq 1 --moe-dense-twin --moe-expert-ffn-dim 10")  # K = 2: 20 wide
    convert(source, tmp_path / "hf", "--to", "xglm")
    convert(tmp_path / "hf", tmp_path / "dense.pt", "--from", "xglm")
    up = "--upcycle", "--moe-expert-count", 2, "--moe-freq"
    for freq in (1, 2):
        convert(source, tmp_path / f"{freq}.pt", *up, freq)
    for name in ("dense", "1", "2"):
        found = logits(tmp_path / f"{name}.pt", data)
        torch.testing.assert_close(found, logits(source, data), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("part", ["gate", "experts", "gate_and_experts"])
def test_what_is_frozen_stays(folder, part):
    flags = f"--moe-expert-count 4 {LINES['all']} --optimizer adam --lr 0.05 --weight-decay 0.1"
    cfg = configure(folder, f"{flags} --moe-freeze {part}")
    start, end = (
        train(0, cfg, "legacy_ddp", 1, updates=updates, dtype=torch.float32).parameters
        for updates in (0, 2)
    )
    for name in start:
        of_gate, of_layer = ".moe_layer.gate." in name, ".moe_layer." in name
        frozen = of_gate if part == "gate" else of_layer and not (part == "experts" and of_gate)
        assert torch.equal(start[name], end[name]) == frozen, name


def test_shared_experts_are_not_frozen_under_fsdp(folder):
    flags = f"--moe-expert-count 4 {LINES['shared']} --moe-freeze experts"
    refused = processes_errors(folder, flags)
    assert all("--moe-freeze experts and shared or latent experts with" in each for each in refused)


@pytest.mark.parametrize(
    "flags, words",
    [
        ({"moe_layers": "1,x"}, "--moe-layers 1,x: give layer numbers, counted from 0"),
        ({"moe_layers": "1,1"}, "--moe-layers 1,1: names a layer twice"),
        ({"moe_layers": ""}, "--moe-layers : give layer numbers"),
        ({"moe_layers": "4"}, "there is no layer 4; --decoder-layers 4 has 0 to 3"),
        ({"moe_layers": "1234567"}, "give layer numbers"),
        ({"moe_layers": "-1"}, "--moe-layers -1: give layer numbers"),
        ({"moe_layers": "1", "moe_first_dense": 1}, "--moe-first-dense 1 with --moe-layers 1"),
        ({"moe_first_dense": 4}, "--moe-first-dense 4 leaves no layer of --moe-freq 2"),
        ({"moe_first_dense": -1}, "--moe-first-dense -1 is out of range"),
        ({"moe_shared_experts": -1}, "--moe-shared-experts -1 is out of range"),
        ({"moe_shared_expert_ffn_dim": 8}, "--moe-shared-expert-ffn-dim 8 without shared experts"),
        ({"moe_latent_dim": 17}, "--moe-latent-dim 17 is wider than the model"),
        ({"moe_latent_dim": 0}, "--moe-latent-dim 0 is out of range"),
        ({"moe_null_experts": 2, "moe_router": "hash"}, "no effect with --moe-router hash: remove"),
        ({"moe_null_experts": 2, "moe_groups": 3, "moe_top_groups": 2}, "belong to no group"),
        (
            {"moe_dense_twin": True, "alternate_decoder_ffn_embed_dim": 8},
            "--moe-dense-twin with --alternate-decoder-ffn-embed-dim 8: both set",
        ),
        *(
            ({"alternate_decoder_ffn_embed_dim": 8, **flags}, words)
            for flags, words in [
                ({"moe_router": "x"}, "--moe-router x is unknown"),
                ({"moe_top_k": 9}, "too few for top-9"),
                ({"moe_score": "x"}, "--moe-score x is unknown"),
                ({"moe_latent_dim": 17}, "--moe-latent-dim 17 is wider than the model"),
                ({"moe_expert_count": 0, "moe_router": "hash"}, "--moe-router hash with --alt"),
                ({"moe_expert_count": 0, "moe_shared_experts": 1}, "has no experts to act on"),
            ]
        ),
        ({"moe_dense_twin": True, "moe_freeze": "gate"}, "a dense model has nothing to freeze"),
        ({"moe_dense_twin": True, "moe_expert_count": 1}, "too few for top-2"),
        *(
            ({"moe_freq": 0, "moe_expert_count": 0, name: value}, "has no layer to act on")
            for name, value in [
                ("moe_first_dense", 1),
                ("moe_shared_experts", 1),
                ("moe_null_experts", 1),
                ("moe_latent_dim", 4),
                ("moe_dense_twin", True),
            ]
        ),
    ],
    ids=str,
)
def test_settings_that_do_not_fit_together(flags, words):
    with pytest.raises(UserError, match=words) as error:
        validate(make_config(**{**MOE, **flags}))
    assert "\n" not in str(error.value)
