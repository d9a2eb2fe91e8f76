"""A checkpoint that was tuned on candidates is a language model for every other command."""

import json

import pytest
import torch
from choice_data import batch_of
from console import PACKAGE
from converting import load, same
from fairseq import checkpoint_utils
from training import fairseq

from fairseq_moe_ext import cli
from fairseq_moe_ext.models.language_model import MoETransformerLanguageModel

SHAPE = """--arch moe_lm_tiny --moe-expert-count 4 --decoder-layers 2 --decoder-embed-dim 16
    --decoder-ffn-embed-dim 32 --decoder-attention-heads 2 --share-decoder-input-output-embed"""


@pytest.fixture(scope="module", params=["choices-head", "classes-head", "choices-mean"])
def tuned(request, data, choices, classes, tmp_path_factory):
    """(what was asked of, checkpoint after two updates)."""
    kind, scoring = request.param.split("-")
    folder = tmp_path_factory.mktemp("tuned")
    questions = {"choices": choices, "classes": classes}[kind]
    fairseq(
        f"""fairseq-train {data} --user-dir {PACKAGE} --task multiple_choice {SHAPE}
        --choice-data {questions}
        --choice-scoring {scoring} --tokens-per-sample 64 --criterion multiple_choice --cpu
        --batch-size 8 --optimizer adam --lr 0.01 --max-update 2 --num-workers 0
        --best-checkpoint-metric accuracy --maximize-best-checkpoint-metric --save-dir {folder}
        --no-epoch-checkpoints --no-last-checkpoints"""
    )
    return scoring, folder / "checkpoint_best.pt"


def convert(*arguments):
    return cli.main(["convert", *map(str, arguments)])


def scores(path):
    """Of the candidates of all questions, by a checkpoint as fairseq-validate loads it."""
    (model,), cfg, task = checkpoint_utils.load_model_ensemble_and_task([str(path)])
    task.load_dataset("test")
    dataset = task.dataset("test")
    criterion = task.build_criterion(cfg.criterion)
    with torch.no_grad():
        return criterion.scores(model.eval(), batch_of(dataset, range(len(dataset))))[0]


def test_it_is_converted_with_its_head(tuned, tmp_path):
    scoring, path = tuned
    assert convert(path, tmp_path / "spread" / "x.pt", "--expert-files", 2) == 0
    assert convert(tmp_path / "spread" / "x.pt", tmp_path / "back.pt") == 0
    assert same(load(tmp_path / "back.pt"), load(path))
    assert ("choice_head.weight" in load(path)["model"]) == (scoring == "head")
    before = scores(path)
    assert torch.equal(scores(tmp_path / "spread" / "x.pt"), before)
    assert convert(path, tmp_path / "half.pt", "--dtype", "fp16", "--weights-only") == 0
    half = load(tmp_path / "half.pt")
    assert half["last_optimizer_state"] is None
    assert all(v.dtype == torch.float16 for n, v in half["model"].items() if "weight" in n)
    torch.testing.assert_close(scores(tmp_path / "half.pt"), before, rtol=0, atol=0.01)


def test_other_layouts_have_no_place_for_a_head(tuned, tmp_path, capsys):
    scoring, path = tuned
    status = convert(path, tmp_path / "branch.pt", "--to", "branch")
    error = capsys.readouterr().err
    if scoring == "head":
        assert status == 1 and not list(tmp_path.iterdir())
        assert "--to branch: " in error and "has a head that scores candidates" in error
    else:
        assert status == 0 and (tmp_path / "branch-shared.pt").is_file()


def test_it_scores_and_samples_as_a_language_model(data, tuned):
    lm = MoETransformerLanguageModel.from_pretrained(
        str(tuned[1].parent),
        tuned[1].name,
        str(data),
        bpe="gpt2",
        gpt2_encoder_json=str(data / "encoder.json"),
        gpt2_vocab_bpe=str(data / "vocab.bpe"),
    ).eval()
    tokens = lm.encode("big1 big2")
    found = lm.score("big1 big2")["positional_scores"]
    with torch.no_grad():
        inputs = torch.cat([torch.tensor([2]), tokens[:-1]])
        logits = lm.models[0](inputs[None])[0][0].log_softmax(-1)
    expected = logits.gather(1, tokens[:, None])[:-1, 0]  # </s> at the end is not scored
    torch.testing.assert_close(found, expected)
    assert lm.sample("big1", beam=1, max_len_b=5).startswith("big1")


def test_other_commands_take_it(data, tuned, tmp_path, capsys):
    scoring, path = tuned
    bare = load(path)
    bare["model"] = {n: v for n, v in bare["model"].items() if not n.startswith("choice_head")}
    torch.save(bare, tmp_path / "bare.pt")
    found = []
    for one in (path, tmp_path / "bare.pt"):
        out = tmp_path / "out.json"
        assert cli.main(f"evaluate {data} --path {one} --cpu --json {out} --overwrite".split()) == 0
        sets = json.loads(out.read_text())["sets"]
        found.append({name: entry["perplexity"] for name, entry in sets.items()})
        capsys.readouterr()
        assert cli.main(f"cost --path {one} --json".split()) == 0
        found[-1]["cost"] = json.loads(capsys.readouterr().out)
    assert found[0] == found[1]
    assert found[0]["cost"]["context"] == 64
