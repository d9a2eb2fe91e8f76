"""`fairseq-moe convert`: every layout to every other, the numbers untouched."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

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
from fairseq import checkpoint_utils
from fairseq_cli import train as fairseq_train
from pickles import RunsCode
from small_models import TYPES, build_model
from training import SAVED, TRAIN, expert_files, make_data, settings, train_on

from fairseq_moe_ext.branch.files import BranchFiles, find
from fairseq_moe_ext.branch.optimizer import unfit
from fairseq_moe_ext.branch.settings import translated_settings
from fairseq_moe_ext.branch.writing import branch_settings
from fairseq_moe_ext.cli import main
from fairseq_moe_ext.convert import readers
from fairseq_moe_ext.convert.archive import Lazy, read_safetensors, write_torch
from fairseq_moe_ext.errors import UserError
from fairseq_moe_ext.moe.experts import TensorPerExpert

ALL = "{'moe_eval_capacity_token_fraction': 1.0}"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """flags -> checkpoint of an uninterrupted run on one process, and the losses after it."""
    made = {}

    def start(flags):
        if flags not in made:
            folder = tmp_path_factory.mktemp("run")
            line = f"{data} {TRAIN} {flags} --save-dir {folder} --keep-interval-updates -1"
            losses = train_on(1, f"{line} --save-interval-updates {SAVED}")
            made[flags] = folder / f"checkpoint_1_{SAVED}.pt", losses[SAVED:]
        return made[flags]

    return start


MOE = "--moe-expert-count 4"
DENSE = "--moe-freq 0 --moe-expert-count 0"


def convert(*arguments):
    assert main(["convert", *map(str, arguments)]) == 0


def mistake(capsys, *arguments):
    """The one line that a mistake ends in."""
    assert main(["convert", *map(str, arguments)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1, error
    return error


def same(a, b):
    """Whether two states are equal, tensors to the bit and in their precision."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b) and a.dtype == b.dtype
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def load(path):
    return torch.load(path, weights_only=True)


def next_losses(data, path, folder, world=1, flags=MOE):
    line = f"{data} {TRAIN} {flags} --restore-file {path} --save-dir {folder}/none --no-save"
    return train_on(world, line)


def evaluated(data, path, *more):
    return perplexities(1, data, "--path", path, "--tokens-per-sample", 8, "--batch-size", 4, *more)


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


def test_to_the_branch_and_back(data, run, tmp_path):
    source, losses = run(MOE)
    convert(source, tmp_path / "x.pt", "--to", "branch", "--rank-files", 2)
    names = ["x-rank-0.pt", "x-rank-1.pt", "x-shared.pt"]
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
    model = build_model(0, **{k: settings[k] for k in OF_MODEL}, types=len(numbers_of(state)))
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
        wanted = value if name == "decoder.version" else value.to(half)
        assert same(after["model"][name], wanted)
    assert after["last_optimizer_state"] is None
    convert(tmp_path / "x.pt", tmp_path / "z.pt")
    assert same(load(tmp_path / "z.pt")["last_optimizer_state"], before["last_optimizer_state"])
    evaluate = "--model-overrides", ALL
    (expected,) = evaluated(data, source, *evaluate)
    assert evaluated(data, tmp_path / "y.pt", *evaluate)[0] == pytest.approx(expected, rel=1e-2)


def model_of(path, data):
    from fairseq_moe_ext.models.language_model import MoETransformerLanguageModel

    path = Path(path)
    hub = MoETransformerLanguageModel.from_pretrained(str(path.parent), path.name, data)
    return hub.models[0]  # in evaluation mode


@torch.no_grad()
def logits(path, data, double=True):
    tokens = torch.randint(4, 24, (3, 8), generator=torch.Generator().manual_seed(1))
    model = model_of(path, data)
    return (model.double() if double else model)(tokens)[0]


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
    with pytest.raises(UserError, match="3 experts a token; the branch has top-1 and top-2 gates"):
        branch_settings("x.pt", torch.load(tmp_path / "x.pt", weights_only=True)["cfg"]["model"])


def test_upcycled_with_one_expert_a_token_says_that_it_differs(data, run, tmp_path, capsys):
    source, _ = run(DENSE)
    up = "--upcycle", "--moe-freq", 2, "--moe-expert-count", 4, "--moe-top1-expert"
    convert(source, tmp_path / "x.pt", *up)
    assert "not the dense model's" in capsys.readouterr().out
    assert not torch.allclose(logits(tmp_path / "x.pt", data), logits(source, data))


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


XGLM = ["", "--activation-fn relu --no-scale-embedding"]


@pytest.mark.parametrize(
    "flags, weights", list(zip(XGLM, ["model.safetensors", "pytorch_model.bin"]))
)
def test_xglm(data, run, tmp_path, flags, weights):
    transformers = pytest.importorskip("transformers", reason="pip install transformers")
    source, _ = run(f"{DENSE} {flags}")
    folder = tmp_path / "hf"
    convert(source, folder, "--to", "xglm")
    theirs = transformers.XGLMForCausalLM.from_pretrained(folder).eval()
    tokens = torch.randint(4, 24, (3, 8), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = theirs(tokens).logits
    expected = logits(source, data, double=False)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    # what transformers itself saves comes back, too
    if weights == "pytorch_model.bin":
        torch.save(theirs.state_dict(), folder / weights)
        (folder / "model.safetensors").unlink()
    else:
        theirs.save_pretrained(tmp_path / "again")
        folder = tmp_path / "again"
    convert(folder, tmp_path / "back.pt", "--from", "xglm")
    before, after = load(source)["model"], load(tmp_path / "back.pt")["model"]
    assert same(after, before)
    assert torch.equal(logits(tmp_path / "back.pt", data, double=False), expected)
    assert evaluated(data, tmp_path / "back.pt") == evaluated(data, source)


def test_xglm_without_transformers(data, run, tmp_path):
    source, _ = run(DENSE)
    convert(source, tmp_path / "hf", "--to", "xglm", "--dtype", "bf16")
    tensors = read_safetensors(str(tmp_path / "hf" / "model.safetensors"))
    before = load(source)["model"]
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    for name, value in tensors.items():
        assert torch.equal(value, before[name.replace("model.", "decoder.", 1)].bfloat16())
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["torch_dtype"] == "bfloat16" and config["tie_word_embeddings"] is True


@pytest.mark.parametrize(
    "change, words",
    [
        ({"pad_token_id": 0}, "pad_token_id is 0"),
        ({"vocab_size": 7}, "vocab_size 7"),
        ({"activation_function": "silu"}, "silu is none of gelu"),
        ({"model_type": "opt"}, "model_type is opt, not xglm"),
        ({"num_layers": 3}, "missing"),
        ({"ffn_dim": 20}, "does not fit"),
        ({"attention_heads": 3}, "decoder-attention-heads 3"),
        ({"tie_word_embeddings": False}, "no lm_head.weight"),
    ],
)
def test_an_xglm_that_does_not_fit(run, tmp_path, capsys, change, words):
    source, _ = run(DENSE)
    convert(source, tmp_path / "hf", "--to", "xglm")
    path = tmp_path / "hf" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    assert words in mistake(capsys, tmp_path / "hf", tmp_path / "x.pt", "--from", "xglm")
    assert not (tmp_path / "x.pt").exists()


MISTAKES = [
    (MOE, "x.pt --dtype int4", "--dtype int4: not known"),
    (MOE, "x.pt --expert-files 3", "3 does not divide the 4 experts.*1, 2, 4 would do"),
    (MOE, "x.pt --to branch --rank-files 8", "8 does not divide the 4 experts"),
    (MOE, "x --to xglm", "has what XGLM has not: 4 experts"),
    (MOE, "x.pt --upcycle --moe-expert-count 2", "has 4 experts already"),
    (MOE, "x.pt --rank-files 2", "--rank-files goes with --to branch"),
    (MOE, "x.pt --moe-freq 2", "--moe-freq goes with --upcycle"),
    (MOE, "x", "ends in .pt"),
    (DENSE, "x.pt --upcycle", "add --moe-expert-count"),
    (DENSE, "x.pt --upcycle --moe-expert-count 1", "too few for top-2"),
    (DENSE, "x.pt --expert-files 2", "a dense model"),
    (DENSE, "x.pt --to branch", "a dense model"),
    (DENSE + " --decoder-learned-pos", "x --to xglm", "--decoder-learned-pos"),
    (DENSE, "there.pt", "there.pt: exists"),
    (MOE, "set.pt --to branch", "set-rank-0.pt: exists"),
    (MOE + " --fp16", "x.pt --expert-files 2", "joins all parameters.*--weights-only"),
]


@pytest.mark.parametrize("flags, line, words", MISTAKES)
def test_mistakes_end_in_one_line_and_nothing_is_written(run, tmp_path, capsys, flags, line, words):
    source, _ = run(flags)
    (tmp_path / "there.pt").write_text("kept")
    (tmp_path / "set-rank-0.pt").write_text("kept")
    before = sorted(tmp_path.rglob("*"))
    dest, *rest = line.split()
    assert re.search(words, mistake(capsys, source, tmp_path / dest, *rest))
    assert sorted(tmp_path.rglob("*")) == before
    assert all(path.read_text() == "kept" for path in before)


def test_a_missing_part_is_named(run, tmp_path, capsys):
    source, _ = run(MOE)
    convert(source, tmp_path / "x.pt", "--expert-files", 2)
    sorted((tmp_path / "experts").iterdir())[0].unlink()
    assert "missing; it holds experts" in mistake(capsys, tmp_path / "x.pt", tmp_path / "y.pt")
    assert "no such checkpoint" in mistake(capsys, tmp_path / "z.pt", tmp_path / "y.pt")
    assert not list(tmp_path.rglob("*.tmp")) and not (tmp_path / "y.pt").exists()


def test_sources_that_are_none(run, tmp_path, capsys):
    source, _ = run(MOE)
    convert(source, tmp_path / "x.pt", "--expert-files", 2)
    part = sorted((tmp_path / "experts").iterdir())[0]
    text, folder = tmp_path / "text.pt", tmp_path / "hf"
    text.write_text("12 lines\n")
    cases = [
        (tmp_path, [], f"{tmp_path}: is a folder"),
        (part, [], f"{part}: holds experts alone"),
        (text, [], f"{text}: not a checkpoint"),
        (folder, ["--from", "xglm"], f"{folder / 'config.json'}: cannot be read"),
    ]
    for path, flags, words in cases:
        assert words in mistake(capsys, path, tmp_path / "y.pt", *flags)
    assert not (tmp_path / "y.pt").exists()


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("config.json", "[]", "config.json: model_type is nowhere"),
        ("config.json", '{"model_type": "xglm", "vocab_size": "8"}', "missing"),
        ("model.safetensors.index.json", "{}", "there is no weight_map in it"),
        ("model.safetensors.index.json", "{", "there is no weight_map in it"),
        ("pytorch_model.bin", [1], "has no tensors by name"),
        (
            "pytorch_model.bin",
            {"model.embed_tokens.weight": RunsCode(os.system, "true")},
            "refused",
        ),
    ],
)
def test_an_xglm_whose_files_are_none(run, tmp_path, capsys, name, content, words):
    source, _ = run(DENSE)
    folder = tmp_path / "hf"
    convert(source, folder, "--to", "xglm")
    (folder / "model.safetensors").unlink()
    if isinstance(content, str):
        (folder / name).write_text(content)
    else:
        torch.save(content, folder / name)
    assert words in mistake(capsys, folder, tmp_path / "x.pt", "--from", "xglm")
    assert not (tmp_path / "x.pt").exists()


def test_values_too_large_for_float16(run, tmp_path, capsys):
    source, _ = run(DENSE)
    state = load(source)
    state["model"]["decoder.layer_norm.weight"][0] = 1e5
    torch.save(state, tmp_path / "big.pt")
    error = mistake(capsys, tmp_path / "big.pt", tmp_path / "x.pt", "--dtype", "fp16")
    assert "decoder.layer_norm.weight has values up to 1e+05" in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["big.pt"]


def test_overwriting(run, tmp_path):
    source, _ = run(MOE)
    path = tmp_path / "x.pt"
    convert(source, path, "--expert-files", 4)
    convert(source, path, "--expert-files", 2, "--overwrite")
    assert len(expert_files(tmp_path)) == 2  # those of the first are gone
    convert(source, tmp_path / "set.pt", "--to", "branch", "--rank-files", 4)
    convert(source, tmp_path / "set.pt", "--to", "branch", "--rank-files", 2, "--overwrite")
    assert not (tmp_path / "set-rank-2.pt").exists()
    assert find(str(tmp_path / "set.pt")).ranks.keys() == {0, 1}


def test_a_full_disk_leaves_nothing(run, tmp_path, capsys, monkeypatch):
    source, _ = run(MOE)

    stock = os.fsync
    for suffix in (".tmp", ".lock"):

        def fsync(descriptor, suffix=suffix):
            if os.readlink(f"/proc/self/fd/{descriptor}").endswith(suffix):
                raise OSError(28, "No space left on device")
            stock(descriptor)

        monkeypatch.setattr(os, "fsync", fsync)
        error = mistake(capsys, source, tmp_path / "x.pt", "--expert-files", 2)
        assert "cannot be written (No space left on device)" in error
        assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_the_archive_is_what_torch_reads(tmp_path):
    a = torch.arange(12.0).view(3, 4)
    half = Lazy((2, 2), torch.float16, lambda: iter([torch.ones(2).half(), torch.zeros(2).half()]))
    state = {"a": a, "tied": a, "t": a.t(), "empty": a[:0], "scalar": torch.tensor(3)}
    state.update(stack=TensorPerExpert([a, a + 1]), half=half, rest=[None, (1, "x"), {2: True}])
    path = str(tmp_path / "x.pt")
    written = []
    write_torch(state, path, written.append)
    expected = {**state, "stack": torch.stack([a, a + 1])}
    expected["half"] = torch.tensor([[1.0, 1.0], [0.0, 0.0]]).half()
    for mapped in (False, True):
        found = torch.load(path, weights_only=True, mmap=mapped)
        assert same(found, expected)
        assert found["a"].data_ptr() == found["tied"].data_ptr()
        if mapped:
            assert all(found[k].data_ptr() % 64 == 0 for k in ("a", "half", "scalar"))
    assert sum(written) == 4 * 12 * 2 + 4 * 24 + 8 + 8


MEMORY = """
import sys, threading, time
from fairseq_moe_ext.cli import main

def own():
    with open("/proc/self/status") as stream:
        fields = dict(line.split(":", 1) for line in stream)
    return int(fields["RssAnon"].split()[0]) / 1024

import fairseq_moe_ext.convert.targets
before, peak, done = own(), [0.0], threading.Event()
def watch():
    while not done.wait(0.005):
        peak[0] = max(peak[0], own())
thread = threading.Thread(target=watch)
thread.start()
status = main(sys.argv[1:])
done.set()
thread.join()
print(status, peak[0] - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_memory_does_not_grow_with_the_model(tmp_path):
    """384 MB in 4 files to one of half the precision, by memory that is not a file's page."""
    settings = {**branch_files.RELEASED_15B, "decoder_layers": 2, "decoder_embed_dim": 256}
    settings.update(decoder_ffn_embed_dim=1024, moe_expert_count=128, decoder_attention_heads=4)
    settings.update(memory_efficient_fp16=False)
    ones = torch.ones(1)
    branch_files.write(str(tmp_path), settings, TYPES, 4, lambda name, shape: ones.expand(shape))
    size = sum(path.stat().st_size for path in tmp_path.glob("*.pt"))
    command = ["convert", str(tmp_path / "model.pt"), str(tmp_path / "x.pt"), "--dtype", "bf16"]
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, *command], capture_output=True, text=True, check=True
    )
    status, megabytes = done.stdout.splitlines()[-1].split()
    assert status == "0" and size > 250e6
    assert float(megabytes) < 100


def test_an_optimizer_state_of_the_branch_that_cannot_be_had_names_this_commands_flag(monkeypatch):
    files = BranchFiles("x.pt", "x-shared.pt", {}, {})

    def read(files, *args, **kwargs):
        raise unfit(files, "it is flat")

    monkeypatch.setattr(readers, "find", lambda path: files)
    monkeypatch.setattr(readers, "read", read)
    with pytest.raises(UserError) as error:
        readers.open_checkpoint("x.pt", weights_only=True)
    words = "x.pt: its optimizer state cannot be continued: it is flat; add --weights-only"
    assert str(error.value) == words
