"""`--upcycle`: experts made of a dense model, which start as it is."""

import pytest
import torch
from converting import DENSE, MOE, convert, evaluated, load, logits, same
from fairseq import checkpoint_utils
from fairseq_cli import train as fairseq_train
from training import TRAIN, settings, train_on

from fairseq_moe_ext.branch.writing import branch_settings
from fairseq_moe_ext.config import MoETransformerLMConfig
from fairseq_moe_ext.config_checks import validate
from fairseq_moe_ext.errors import UserError


@pytest.mark.parametrize("files", [[], ["--expert-files", 2]])
def test_upcycled_is_the_dense_model(data, run, tmp_path, files):
    source, _ = run(DENSE)
    up = "--upcycle", "--moe-freq", 2, "--moe-expert-count", 4
    convert(source, tmp_path / "x.pt", *up, *files)
    expected = logits(source, data)
    torch.testing.assert_close(logits(tmp_path / "x.pt", data), expected, rtol=1e-12, atol=1e-12)
    found, wanted = evaluated(data, tmp_path / "x.pt"), evaluated(data, source)
    assert found == pytest.approx(wanted, rel=1e-6)
    # training starts from the dense model's loss, counted from the first update
    line = f"{data} {TRAIN} --moe-gate-loss-wt 0 --max-update 1 --no-save --save-dir {tmp_path}/n"
    dense = train_on(1, f"{line} {DENSE} --finetune-from-model {source}")
    sparse = f"{line} {MOE} --moe-dropless --finetune-from-model {tmp_path}/x.pt"
    assert train_on(1, sparse) == pytest.approx(dense, rel=1e-6)


def test_noise_and_seed_of_upcycling(data, run, tmp_path):
    source, _ = run(DENSE)
    up = "--upcycle", "--moe-freq", 1, "--moe-expert-count", 4, "--noise", 0.5
    convert(source, tmp_path / "a.pt", *up)
    convert(source, tmp_path / "b" / "b.pt", *up, "--expert-files", 2)
    convert(tmp_path / "b" / "b.pt", tmp_path / "b.pt")
    convert(source, tmp_path / "c.pt", *up, "--seed", 2)
    a, b, c = (load(tmp_path / f"{name}.pt")["model"] for name in "abc")
    assert same(a, b)  # however it is spread
    dense = load(source)["model"]
    for layer in (0, 1):
        name = f"decoder.layers.{layer}."
        noise = a[name + "moe_layer.experts.fc1.weight"] - dense[name + "fc1.weight"]
        spread = float(noise.std() / dense[name + "fc1.weight"].std())
        assert 0.4 < spread < 0.6 and not torch.equal(noise[0], noise[1])
        assert not torch.equal(
            a[name + "moe_layer.gate.wg.weight"], c[name + "moe_layer.gate.wg.weight"]
        )
        biases = a[name + "moe_layer.experts.fc1.bias"]
        assert torch.equal(biases, dense[name + "fc1.bias"].expand(4, -1))


def test_upcycled_with_three_experts_a_token_starts_as_the_dense_model(data, run, tmp_path):
    source, _ = run(DENSE)
    up = "--upcycle", "--moe-expert-count", 4, "--moe-top-k", 3
    convert(source, tmp_path / "x.pt", *up)
    torch.testing.assert_close(logits(tmp_path / "x.pt", data), logits(source, data))
    with pytest.raises(
        UserError, match="3 experts per token; the branch has only top-1 and top-2 gates"
    ):
        branch_settings("x.pt", torch.load(tmp_path / "x.pt", weights_only=True)["cfg"]["model"])


def test_upcycled_with_one_expert_a_token_says_that_it_differs(data, run, tmp_path, capsys):
    source, _ = run(DENSE)
    up = "--upcycle", "--moe-freq", 2, "--moe-expert-count", 4, "--moe-top1-expert"
    convert(source, tmp_path / "x.pt", *up)
    assert "differ from the dense model's" in capsys.readouterr().out
    assert not torch.allclose(logits(tmp_path / "x.pt", data), logits(source, data))


@pytest.mark.parametrize("one", [("--moe-top1-expert",), ("--moe-top-k", 1)])
def test_upcycled_with_a_single_expert_is_the_same(data, run, tmp_path, capsys, one):
    source, _ = run(DENSE)
    convert(source, tmp_path / "x.pt", "--upcycle", "--moe-freq", 2, "--moe-expert-count", 1, *one)
    said = capsys.readouterr().out
    assert "differ" not in said and "continue with --moe-dropless" in said
    assert "x.pt: 1 expert per sparse layer, 1 file, " in said
    torch.testing.assert_close(logits(tmp_path / "x.pt", data), logits(source, data))


@pytest.mark.parametrize(
    "flags",
    ["", "--activation-fn relu --no-scale-embedding", "--alternate-decoder-ffn-embed-dim 12"],
)
def test_a_dense_twin_can_be_upcycled(data, run, tmp_path, flags):
    twin = flags.startswith("--alternate")
    source, _ = run(f"{MOE} {flags}" if twin else f"{DENSE} {flags}")
    up = "--upcycle", "--moe-freq", 2, "--moe-expert-count", 2
    convert(source, tmp_path / "x.pt", *up)
    found = logits(tmp_path / "x.pt", data)
    torch.testing.assert_close(found, logits(source, data), rtol=1e-12, atol=1e-12)


TWIN = f"{MOE} --alternate-decoder-ffn-embed-dim 12"
OF_TWINS = [  # what a sparse model may have, and so its twin
    {"moe_balance": "bias", "moe_bias_update_rate": 0.01},
    {"moe_balance": "both"},
    {"moe_balance": "none"},
    {"moe_balance_over": "global_batch"},
    {"moe_balance_over": "sequence", "moe_top_k": 3},
    {"moe_router": "threshold", "moe_threshold_decay": 0.5},
    {"moe_router": "hash"},
    {"moe_router": "base"},
    {"moe_score": "sigmoid", "moe_route_scale": 2.0, "moe_normalize_weights": "before"},
    {"moe_groups": 4, "moe_top_groups": 2},
    {"moe_null_experts": 2},
    {"moe_shared_experts": 2, "moe_shared_expert_ffn_dim": 8},
    {"moe_latent_dim": 4},
    {"moe_batch_prioritized_routing": True},
    {"moe_second_expert_policy": "random"},
    {"moe_capacity_factor": 2.0},
    {"moe_eom": 0.1, "moe_fom": 0.1, "moe_input_jitter": 0.1},
    {"moe_gating_use_fp32": True, "moe_gating_fp32_product": True},
    {"moe_routing_scope": "world", "moe_pad_rule": "branch"},
    {"moe_first_dense": 1},
]


@pytest.mark.parametrize("flags", OF_TWINS, ids=str)
def test_flags_of_a_dense_twin_do_not_reach_the_sparse_model(data, run, tmp_path, flags):
    source, _ = run(TWIN)
    expected, state = logits(source, data), load(source)
    state["cfg"]["model"].update({"moe_second_expert_policy": "all", **flags})
    twin = MoETransformerLMConfig(**{**state["cfg"]["model"], "_name": "moe_transformer_lm"})
    validate(twin)  # fairseq-train takes them
    torch.save(state, tmp_path / "twin.pt")
    convert(tmp_path / "twin.pt", tmp_path / "x.pt", "--upcycle", "--moe-expert-count", 2)
    torch.testing.assert_close(logits(tmp_path / "x.pt", data), expected, rtol=1e-12, atol=1e-12)


STOCK = "--task language_modeling --arch transformer_lm_gpt --cpu --decoder-layers 2 --max-update 2"
STOCK += " --decoder-embed-dim 8 --decoder-ffn-embed-dim 12 --decoder-attention-heads 2"
STOCK += " --tokens-per-sample 8 --batch-size 4 --optimizer adam --lr 0.01 --num-workers 0"
STOCK += " --no-progress-bar --log-format none --disable-validation"


def test_a_model_of_stock_fairseq(data, tmp_path):
    fairseq_train.main(settings(f"{data} {STOCK} --save-dir {tmp_path}", 0, 1))
    source = tmp_path / "checkpoint_last.pt"
    models, _ = checkpoint_utils.load_model_ensemble([str(source)], {"data": data})
    tokens = torch.randint(4, 24, (3, 8), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = models[0].eval().double()(tokens)[0]
    up = "--upcycle", "--moe-freq", 2, "--moe-expert-count", 4
    convert(source, tmp_path / "sparse.pt", *up)
    convert(source, tmp_path / "hf", "--to", "xglm")
    convert(tmp_path / "hf", tmp_path / "dense.pt", "--from", "xglm")
    for name in ("sparse.pt", "dense.pt"):
        found = logits(tmp_path / name, data)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    convert(source, tmp_path / "again.pt")  # is still stock's
    assert same(load(tmp_path / "again.pt")["model"], load(source)["model"])
    optimizer = "last_optimizer_state"
    assert same(load(tmp_path / "again.pt")[optimizer], load(source)[optimizer])
    state = load(source)
    state["model"]["decoder.embed_positions._float_tensor"].fill_(1e30)  # stock leaves it unset
    torch.save(state, source)
    convert(source, tmp_path / "half.pt", "--dtype", "float16")
