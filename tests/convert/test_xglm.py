"""To transformers' XGLM and back."""

import json
import os

import pytest
import torch
from converting import DENSE, convert, evaluated, load, logits, mistake, same
from pickles import RunsCode

from fairseq_moe_ext.convert.archive import read_safetensors

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
        ({"activation_function": "silu"}, "silu is not one of gelu"),
        ({"activation_function": ["gelu"]}, "['gelu'] is not one of gelu"),
        ({"dropout": None}, "dropout is None, not a number"),
        ({"model_type": "opt"}, "model_type is opt, not xglm"),
        ({"num_layers": 3}, "missing"),
        ({"ffn_dim": 20}, "does not fit"),
        ({"attention_heads": 3}, "decoder-attention-heads 3"),
        ({"tie_word_embeddings": False}, "lm_head.weight is missing"),
    ],
)
def test_an_xglm_that_does_not_fit(run, tmp_path, capsys, change, words):
    source, _ = run(DENSE)
    convert(source, tmp_path / "hf", "--to", "xglm")
    path = tmp_path / "hf" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    assert words in mistake(capsys, tmp_path / "hf", tmp_path / "x.pt", "--from", "xglm")
    assert not (tmp_path / "x.pt").exists()


def test_a_part_of_config_json_that_is_not_ours(run, tmp_path):
    source, _ = run(DENSE)
    convert(source, tmp_path / "hf", "--to", "xglm")
    path = tmp_path / "hf" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "fairseq": "x"}))
    convert(tmp_path / "hf", tmp_path / "x.pt", "--from", "xglm")
    assert load(tmp_path / "x.pt")["task_state"] == {}


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("config.json", "[]", "config.json: model_type is nowhere"),
        ("config.json", '{"model_type": "xglm", "vocab_size": "8"}', "missing"),
        ("model.safetensors.index.json", "{}", "contains no weight_map"),
        ("model.safetensors.index.json", "{", "contains no weight_map"),
        ("pytorch_model.bin", [1], "contains no named tensors"),
        (
            "pytorch_model.bin",
            {"model.embed_tokens.weight": RunsCode(os.system, "true")},
            "rejected",
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
