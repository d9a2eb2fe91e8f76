"""Costs against the paper and built models; memory against what autograd keeps."""

import json
import math
import os
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from small_models import MOE, VOCABULARY, build_model, make_config
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from wide_experts import as_wide

from fairseq_moe_ext import cli
from fairseq_moe_ext.cost import (
    memory_per_device,
    parameters,
    training_flops_per_token,
    twin_difference,
)
from fairseq_moe_ext.evaluation import cost_table
from fairseq_moe_ext.shape import Shape, shape_of

DOCS = Path(__file__).parents[1] / "docs"


def test_a_twin_has_equal_flops_and_its_own_parameters():
    moe = Shape(4, 128, 512, vocabulary=5000, moe_freq=2, experts=8)
    twin = moe._replace(experts=0, alternate_ffn_dim=1024)
    assert training_flops_per_token(moe, 256) == training_flops_per_token(twin, 256)
    assert parameters(twin).expert == 0
    assert parameters(twin).active == parameters(twin).total
    # the gates (128 x 8) and the two experts' second output bias are all that differs
    difference = parameters(moe).active - parameters(twin).active
    assert difference == 2 * (128 * 8 + 128)


def test_table_1_as_printed():
    """Every row of the paper's table 1: name, hidden, ZFLOPs (paper.md, "Models")."""
    printed = {
        "125M": (768, "0.36"),
        "355M": (1024, "1.06"),
        "GPT-3 760M": (1536, "2.13"),
        "1.3B": (2048, "3.57"),
        "2.7B": (2560, "7.08"),
        "6.7B": (4096, "17.12"),
        "13B": (5120, "32.67"),
        "GPT-3 175B": (12288, "430.17"),
        "MoE 15B": (768, "0.43"),
        "MoE 52B": (1024, "1.30"),
        "MoE 207B": (2048, "4.53"),
        "MoE 1.1T": (4096, "22.27"),
    }
    rows = cost_table.table_1()
    assert {row[0]: (int(row[4]), row[6]) for row in rows} == printed
    counts = {row[0]: row[1] for row in rows}
    assert counts["13B"] == "12,847,728,640" and counts["MoE 1.1T"] == "1,104,219,021,312"


def counted_flops(tokens, **flags):
    """Training FLOPs a token by torch's counter.

    It knows nothing of addmm_, by which the loss adds up the projection's gradient, and nothing of
    the CPU's fused attention, so the one is taught and the other put aside.
    """
    model = build_model(vocabulary=400, **flags).train()
    torch.manual_seed(2)
    data = torch.randint(4, 400, (2, *tokens))

    def addmm_(own, a, b, **unused):
        return 2 * a[0] * a[1] * b[1]

    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: addmm_})
    with counter, sdpa_kernel(SDPBackend.MATH):
        model(data[0], target=data[1])[0].backward()
    return counter.get_total_flops() / data[0].numel()


@pytest.mark.parametrize("k", [0, 1, 2, 4])
def test_a_counting_run_agrees_with_the_formula(k):
    """To the last product: the formula leaves the router out, and PyTorch's recomputation stops
    before a dense layer's last product, whose result nothing needs."""
    dim, ffn, experts, context = 64, 256, 8, 32
    flags = dict(
        decoder_embed_dim=dim, decoder_ffn_embed_dim=ffn, share_decoder_input_output_embed=True
    )
    shape = Shape(4, dim, ffn, vocabulary=400)
    router = 0
    if k:
        flags.update(
            moe_freq=2,
            moe_expert_count=experts,
            moe_top_k=k,
            moe_dropless=True,
            moe_second_expert_policy="all",
        )
        shape = shape._replace(moe_freq=2, experts=experts, top_k=k)
        router = len(shape.sparse) * 2 * dim * experts  # one pass
    formula = training_flops_per_token(shape, context)
    counted = counted_flops((3, context), **flags)
    assert counted == formula + 3 * router
    assert counted == pytest.approx(formula, rel=0.02)

    dense_layers = shape.layers - len(shape.sparse)
    formula = training_flops_per_token(shape, context, recompute=True)
    counted = counted_flops((3, context), checkpoint_activations=True, **flags)
    assert counted == formula + 4 * router - dense_layers * 2 * dim * ffn


KINDS = {
    "gated": {**MOE, "activation_fn": "geglu"},
    "shared": {**MOE, "moe_shared_experts": 2, "moe_shared_expert_ffn_dim": 12},
    "latent": {**MOE, "moe_latent_dim": 5},
    "fine": {**MOE, "moe_expert_ffn_dim": 8, "moe_top_k": 4},
    "listed": {**MOE, "moe_layers": "0,3"},
    "hash": {**MOE, "moe_router": "hash"},
    "first dense": {**MOE, "moe_freq": 1, "moe_first_dense": 1},
    "all": {
        **MOE,
        "moe_layers": "1, 2",
        "activation_fn": "swiglu",
        "moe_shared_experts": 3,
        "moe_latent_dim": 6,
        "moe_top_k": 3,
        "moe_expert_ffn_dim": 24,
    },
}


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", KINDS)
def test_a_counting_run_of_each_kind(name, recompute):
    """Sparse, and as its dense twin, to the last product of the formula."""
    context, flags = 16, {**KINDS[name], "moe_dropless": True}
    shape = shape_of(vars(make_config(**flags)), vocabulary=400)
    counted = counted_flops((3, context), checkpoint_activations=recompute, **flags)
    router = 2 * shape.dim * shape.experts * len(shape.sparse) if shape.gates else 0
    formula = training_flops_per_token(shape, context, recompute)
    if recompute:
        # it stops before what nothing needs, the last product of a dense layer
        last = sum(width for width in shape.dense_widths if width is not None)
        assert counted == formula + 4 * router - 2 * shape.dim * last
        return
    assert counted == formula + 3 * router
    twin = shape_of(vars(make_config(**flags, moe_dense_twin=True)), vocabulary=400)
    flops = training_flops_per_token(twin, context)
    assert counted_flops((3, context), **flags, moe_dense_twin=True) == flops
    # equal where widths are whole numbers in all, else apart by less than one unit of width
    unit = 3 * 2 * (3 if shape.gated else 2) * shape.dim
    whole = (len(shape.sparse) * shape.twin_width).denominator == 1
    assert flops == formula if whole else abs(flops - formula) < unit


def test_null_experts_spend_what_the_metric_says():
    """The formula has them in equal use; each choice of one saves an expert's FLOPs."""
    context, flags = 16, {**MOE, "moe_null_experts": 3, "moe_top_k": 3, "moe_dropless": True}
    shape = shape_of(vars(make_config(**flags)), vocabulary=400)
    assert shape.used_experts == 2  # of 3, as 6 of 9 experts compute
    model = build_model(vocabulary=400, **flags).train()
    torch.manual_seed(2)
    data = torch.randint(4, 400, (2, 3, context))
    records = model(data[0])[1]["moe"]
    saved = sum(float(record.stats["null_share"]) / 100 * 3 for record in records)  # a token
    counted = counted_flops((3, context), **flags)
    expert, gate = 3 * 4 * shape.dim * shape.expert_width, 3 * 2 * shape.dim * (shape.experts + 1)
    all_computing = training_flops_per_token(shape._replace(null_experts=0), context)
    assert 0 < saved < 6
    assert counted == pytest.approx(all_computing + 2 * gate - saved * expert, rel=1e-12)
    used = sum(float(record.stats["experts_per_token"]) for record in records) / len(records)
    measured = training_flops_per_token(shape._replace(experts_per_token=used), context)
    assert counted == pytest.approx(measured + 2 * gate, rel=1e-12)
    balanced = training_flops_per_token(shape, context)
    assert balanced == pytest.approx(all_computing - 2 * expert, rel=1e-12)


def test_the_twin_s_layers_share_what_a_width_leaves_over():
    """2 L / n + K L F / D is no whole number in a layer, but is in two of them."""
    flags = {**MOE, "decoder_layers": 16, "moe_latent_dim": 5, "moe_expert_ffn_dim": 20}
    shape = shape_of(vars(make_config(**flags, moe_dense_twin=True)))
    assert shape.twin_width == 5 + 2 * 5 * 20 / 16  # 17.5
    assert shape.dense_widths[1::2] == [18, 17] * 4 and set(shape.dense_widths[::2]) == {32}
    layers = build_model(**flags, moe_dense_twin=True).decoder.layers
    assert [layer.fc1.out_features for layer in layers] == shape.dense_widths
    dense, sparse = shape, shape._replace(dense_twin=False)
    assert training_flops_per_token(dense, 9) == training_flops_per_token(sparse, 9)
    # of an odd number of layers half a unit of width is left: 2 matrices, 2 D FLOPs, 3 passes
    odd = shape._replace(layers=14)
    assert twin_difference(odd, 9) == 0.5 * 3 * 2 * 2 * 16 and twin_difference(shape, 9) == 0


def test_the_old_twin_is_the_special_case():
    flags = {**MOE, "moe_expert_ffn_dim": 24}
    twin = shape_of(vars(make_config(**flags, moe_dense_twin=True)))
    old = shape_of(vars(make_config(**flags, alternate_decoder_ffn_embed_dim=48)))
    assert twin.dense_widths == old.dense_widths == [32, 48, 32, 48]
    assert shape_of(vars(make_config(**flags))).dense_widths == [32, None, 32, None]


# Flags; total and active parameters as published, in billions; and by how much our attention is
# larger: Mixtral's keys and values are 1024 wide (grouped-query attention). Biases, and LayerNorm
# in place of RMSNorm, are ours alone and below the last digit.
PUBLISHED = {
    "OLMoE-1B-7B (arXiv 2409.02060)": (
        "--decoder-layers 16 --decoder-embed-dim 2048 --decoder-attention-heads 16 --moe-freq 1 "
        "--moe-expert-count 64 --moe-top-k 8 --moe-expert-ffn-dim 1024 --activation-fn swiglu "
        "--types 50304",
        (6.9, 1.3),
        0,
    ),
    "DeepSeekMoE 16B (arXiv 2401.06066)": (
        "--decoder-layers 28 --decoder-embed-dim 2048 --decoder-attention-heads 16 --moe-freq 1 "
        "--moe-first-dense 1 --decoder-ffn-embed-dim 10944 --moe-expert-count 64 --moe-top-k 6 "
        "--moe-expert-ffn-dim 1408 --moe-shared-experts 2 --activation-fn swiglu --types 102400",
        (16.4, 2.8),
        0,
    ),
    "Mixtral 8x7B (arXiv 2401.04088)": (
        "--decoder-layers 32 --decoder-embed-dim 4096 --decoder-attention-heads 32 --moe-freq 1 "
        "--moe-expert-count 8 --decoder-ffn-embed-dim 14336 --activation-fn swiglu --types 32000",
        (46.7, 12.9),
        32 * 2 * 4096 * (4096 - 1024),
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_counts(name, capsys):
    flags, (total, active), more = PUBLISHED[name]
    assert cli.main(["cost", *flags.split(), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["parameters"]
    assert round((found["total"] - more) / 1e9, 1) == total
    assert round((found["active"] - more) / 1e9, 1) == active


OF_MEMORY = {
    "": {},
    "gated shared": {"activation_fn": "swiglu", "moe_shared_experts": 2},
    "latent": {"moe_latent_dim": 24},
    "gated twin": {"activation_fn": "geglu", "moe_dense_twin": True},
}


@pytest.mark.parametrize("moe, kind", [(False, ""), *((True, kind) for kind in OF_MEMORY)])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("kernels", [nullcontext, as_wide])
def test_memory_against_what_autograd_keeps(moe, kind, recompute, kernels):
    dim, ffn, vocabulary, tokens = 64, 256, 400, 256
    flags = dict(
        decoder_embed_dim=dim, decoder_ffn_embed_dim=ffn, share_decoder_input_output_embed=True
    )
    if moe:
        flags.update(**MOE, **OF_MEMORY[kind], moe_dropless=True)
    shape = shape_of(vars(make_config(**flags)), vocabulary)
    model = build_model(vocabulary=vocabulary, checkpoint_activations=recompute, **flags).train()
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    data = torch.randint(4, vocabulary, (2, 4, 64))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), kernels():
        model(data[0], target=data[1])
    measured = sum(size for size, _ in kept.values())
    memory = memory_per_device(shape, tokens, recompute=recompute)
    # the projection's gradient is made in the forward pass and counted under `working`; on a CPU
    # the weights of q, k and v are joined
    joined = 0 if recompute else 4 * 3 * dim**2 * shape.layers
    kept_here = memory.activations + 4 * vocabulary * dim + joined
    assert kept_here == pytest.approx(measured, rel=0.03)
    parameters_here = sum(p.numel() for p in model.parameters())
    assert (memory.parameters, memory.optimizer) == (4 * parameters_here, 8 * parameters_here)


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"decoder_learned_pos": True},
        {"decoder_learned_pos": True, "max_target_positions": 100},
        {"decoder_learned_pos": True, "no_token_positional_embeddings": True},
        {"layernorm_embedding": True, "no_decoder_final_norm": True},
        {"layernorm_embedding": True, "share_decoder_input_output_embed": True},
        {**MOE, "moe_expert_ffn_dim": 24},
        {**MOE, "moe_top1_expert": True, "decoder_learned_pos": True},
        {**MOE, "moe_top_k": 3},
        {"moe_freq": 3, "alternate_decoder_ffn_embed_dim": 48},
        {"activation_fn": "swiglu"},
        {**MOE, "moe_null_experts": 3},
        {**MOE, "moe_null_experts": 1, "moe_dense_twin": True},
        *KINDS.values(),
        *({**kind, "moe_dense_twin": True} for kind in KINDS.values()),
    ],
    ids=lambda flags: ",".join(flags) or "plain",
)
def test_parameters_are_those_of_the_model(flags):
    settings = vars(make_config(**flags))
    counts = parameters(shape_of(settings, VOCABULARY))
    held = list(build_model(**flags).parameters())
    assert counts.total == sum(p.numel() for p in held)
    assert counts.expert == sum(p.numel() for p in held if hasattr(p, "expert"))


def test_memory_is_divided_as_said():
    shape = Shape(4, 64, 256, vocabulary=400, moe_freq=2, experts=8)
    counts = parameters(shape)
    one = memory_per_device(shape, 100, precision="fp16")
    assert one.parameters == 2 * counts.total and one.master == 4 * counts.total
    four = memory_per_device(shape, 100, world_size=4, precision="fp16")
    assert four.parameters == 2 * (counts.shared + counts.expert // 4)
    many = memory_per_device(shape, 100, world_size=16, precision="fp16", sharding="full")
    # one expert a device, halved among its two replicas; in float32, of which there is no copy
    assert many.parameters == -(-4 * counts.shared // 16) + counts.expert // 8 // 2 * 4
    assert many.master == 0
    state = memory_per_device(shape, 100, world_size=4, sharding="optimizer")
    assert state.parameters == 4 * (counts.shared + counts.expert // 4)
    assert state.optimizer == 8 * counts.shared // 4 + 8 * counts.expert // 4


@pytest.mark.parametrize(
    "line, words",
    [
        ("", "use --arch, --path"),
        ("--arch moe_lm_16b", "--arch moe_lm_16b: use one of dense_lm_tiny"),
        ("--arch moe_lm_15b --world-size 3", "--world-size 3: must divide the 512 experts"),
        ("--path nowhere.pt", "--path nowhere.pt: no such checkpoint"),
        ("--path other.zip", "error: --path other.zip: truncated or not a checkpoint"),
        ("--path text.pt", "--path text.pt: truncated or not a checkpoint (12 bytes); copy it"),
        ("--path list.pt", "list.pt: not a fairseq checkpoint"),
        ("--arch moe_lm_15b --tokens inf", "--tokens inf: use a number above 0"),
        ("--path nowhere.pt --moe-freq 2", "--path with --moe-freq"),
        ("--arch dense_lm_tiny --moe-freq 9", "--moe-freq 9 picks no layer"),
        ("--arch dense_lm_tiny --types 0", "--types 0: use 1 or more"),
        (
            "--arch moe_lm_tiny --precision memory-efficient-bf16 --sharding full",
            "--precision memory-efficient-bf16 with --sharding full",
        ),
        ("--arch moe_lm_tiny --experts-per-token 9", "9.0: use 0 or more, at most the 8"),
        ("--arch dense_lm_tiny --experts-per-token 1", "1.0: use 0 or more, a model with experts"),
        ("--arch moe_lm_tiny --moe-freq 1 --moe-layers 1", "--moe-freq 1 with --moe-layers 1, wh"),
        ("--arch dense_lm_tiny --moe-layers 1,9", "--moe-layers 1,9: there is no layer 9"),
        ("--arch moe_lm_tiny --moe-latent-dim 500", "--moe-latent-dim 500 is wider than the model"),
    ],
)
def test_mistakes_are_told_in_one_line(line, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savez("other.npz", np.zeros(3))
    os.rename("other.npz", "other.zip")
    torch.save([1, 2], "list.pt")
    Path("text.pt").write_text("hello world\n")
    assert cli.main(["cost", *line.split()]) == 1
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def test_the_command(capsys, tmp_path):
    flags = "--arch moe_lm_tiny --decoder-layers 2 --moe-expert-count 4 --types 100 --context 64"
    assert cli.main(["cost", *flags.split(), "--json"]) == 0
    by_flags = json.loads(capsys.readouterr().out)
    shape = Shape(2, 128, 512, vocabulary=100, moe_freq=2, experts=4)
    assert by_flags["parameters"]["total"] == parameters(shape).total
    assert by_flags["plain"]["flops_per_token"] == training_flops_per_token(shape, 64)

    config = dict(decoder_layers=2, decoder_embed_dim=128, decoder_ffn_embed_dim=512, moe_freq=2)
    config.update(moe_expert_count=4, share_decoder_input_output_embed=True, dropout=0.1)
    model = {"decoder.embed_tokens.weight": torch.zeros(100, 128)}
    config.update(_name="moe_transformer_lm")
    path = tmp_path / "checkpoint.pt"
    torch.save({"cfg": {"model": config}, "args": None, "model": model, "experts": {}}, path)
    assert cli.main(["cost", "--path", str(path), "--context", "64", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == by_flags

    assert cli.main(["cost", "--paper", "--markdown"]) == 0
    assert "| 1.3B | 1,313,460,224 |  | 24 | 2048 | 32 | 3.57 |" in capsys.readouterr().out
    assert cli.main(["cost", "--paper", "--json"]) == 0
    row = json.loads(capsys.readouterr().out)[-1]
    assert row["model"] == "MoE 1.1T" and row["parameters"] == 1_104_219_021_312
    assert row["ZFLOPs"] == pytest.approx(22.27, abs=0.005)


def total_gb(flags, capsys, kind="plain"):
    assert cli.main(["cost", *flags.split(), "--json"]) == 0
    return json.loads(capsys.readouterr().out)[kind]["bytes_per_device"]["total"] / 1e9


def test_the_page_on_fine_tuning_shows_what_the_command_computes(capsys):
    text = (DOCS / "finetuning.md").read_text(encoding="utf-8").replace("\n", " ")
    alone = "--arch moe_lm_15b --types 50264 --context 512 --batch-size 8"
    flags = f"{alone} --world-size 16"
    assert f"needs {total_gb(flags, capsys):.1f} GB (`fairseq-moe cost {flags}`," in text
    assert f"one GPU alone would need {total_gb(alone, capsys):.1f} GB" in text
    assert "dataset.batch_size=2 optimization.max_update=3744" in text
    assert 3 * math.ceil(39_905 / (2 * 16)) == 3744


def test_the_page_on_scaling_shows_what_the_command_computes(capsys):
    text = (DOCS / "scaling.md").read_text(encoding="utf-8").replace("\\\n", "")
    flags = "--arch moe_lm_15b --world-size 16 --batch-size 4 --context 2048 "
    flags += "    --precision memory-efficient-fp16 --sharding full"
    assert f"fairseq-moe cost {flags}\n" in text
    plain, again = total_gb(flags, capsys), total_gb(flags, capsys, "recompute")
    assert f"prints {plain:.2f} GB in all, and {again:.2f} GB with" in text
