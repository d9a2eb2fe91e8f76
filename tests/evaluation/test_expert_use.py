"""Expert use: the information measure, and the command's answers to wrong input."""

import math
import runpy
import sys
from pathlib import Path

import pytest
import torch
from fairseq.data import Dictionary
from training import MODEL, USER_DIR, fairseq, make_data, write_data_bin

from fairseq_moe_ext import cli
from fairseq_moe_ext.evaluation import loading
from fairseq_moe_ext.evaluation.expert_use import expert_use
from fairseq_moe_ext.evaluation.specialisation import mutual_information


def main(words):
    return cli.main(["expert-use", *words])


def test_an_expert_per_kind_gives_the_kind_away():
    assert mutual_information([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]) == 2.0


def test_equal_use_tells_nothing():
    assert mutual_information([[0.25, 0.75], [0.25, 0.75]]) == 0.0


def test_a_half_known_kind():
    # Kind 1 uses expert 0 alone, kind 2 both alike: I = H(3/4) - H(1/2) / 2.
    entropy = -(0.75 * math.log2(0.75) + 0.25 * math.log2(0.25))
    assert mutual_information([[1, 0], [0.5, 0.5]]) == pytest.approx(entropy - 0.5)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["missing.pt", "--bin", "a=."], "error: missing.pt: no such checkpoint"),
        (["x.pt", "--bin", "a"], "--bin a: give NAME=FOLDER"),
        (["x.pt", "--bin", "a=no/such/folder"], "--bin a=no/such/folder"),
        (["x.pt", "--bin", "a=.", "--bin", "a=/"], "--bin a=/: the name a is given twice"),
        (["x.pt", "--bin", "a=.", "--among", "b"], "--among b: no --bin b; there are a"),
        (["x.pt", "--bin", "a=.", "--batch-size", "0"], "--batch-size 0: use 1 or more"),
    ],
)
def test_wrong_input_is_one_line(arguments, words, capsys):
    assert main(arguments) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and words in err and err.count("\n") == 1


def test_its_earlier_name_still_works(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["expert_use.py", "missing.pt", "--bin", "a=."])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("fairseq_moe_ext.evaluation.expert_use", run_name="__main__")
    assert stop.value.code == 1
    assert capsys.readouterr().err == "error: missing.pt: no such checkpoint; check the path\n"


@pytest.mark.parametrize("flags", ["transformer_lm", f"dense_lm_tiny --user-dir {USER_DIR}"])
def test_a_model_without_experts_is_named(tmp_path, capsys, flags):
    data = make_data(tmp_path)
    fairseq(
        f"""fairseq-train {data} --arch {flags} --task language_modeling --decoder-layers 1 --cpu
        --decoder-embed-dim 8 --decoder-ffn-embed-dim 8 --decoder-attention-heads 2 --num-workers 0
        --tokens-per-sample 8 --batch-size 8 --optimizer sgd --lr 0.1 --max-update 1
        --disable-validation --save-dir {tmp_path}"""
    )
    path = tmp_path / "checkpoint_last.pt"
    capsys.readouterr()
    assert main([str(path), "--bin", f"a={data}", "--subset", "valid"]) == 1
    assert capsys.readouterr().err.startswith(f"error: {path}: has no experts; name an MoE")


@pytest.fixture(scope="module")
def with_capacity(tmp_path_factory):
    """A data-bin, and a model of two MoE layers whose capacity at evaluation is a quarter."""
    place = tmp_path_factory.mktemp("capacity")
    data = make_data(place)
    fairseq(
        f"""fairseq-train {data} {MODEL} --moe-freq 1 --moe-expert-count 8 --optimizer adam --lr 0.1
        --max-update 4 --batch-size 8 --num-workers 0 --disable-validation --no-progress-bar
        --log-format none --save-dir {place}"""
    )
    return data, place / "checkpoint_last.pt"


def test_no_choice_is_dropped_before_a_later_layer(with_capacity):
    """The plain loop: one block a pass, with room for all of it in every expert."""
    data, path = with_capacity
    task = loading.language_modeling_task(data, 8)
    task.load_dataset("valid")
    blocks = [row["source"] for row in task.dataset("valid")]

    def counts(**overrides):
        model, _ = loading.load_model(path, task, overrides)
        found = torch.zeros(2, 8)
        for block in blocks:
            with torch.no_grad():
                _, extra = model(block.unsqueeze(0))
            for record in extra["moe"]:
                found[record.layer] += record.expert_counts.sum(0)
        return found

    free = counts(moe_eval_capacity_token_fraction=1.0)
    assert not free.equal(counts()), "a quarter would have dropped some"
    layers = expert_use(path, {"a": Path(data)}, "valid", 8)
    found = torch.tensor([layer["share"]["a"] for layer in layers]) * free.sum(1, keepdim=True)
    assert found.round().equal(free)


@pytest.mark.parametrize("more", [["--subset", "test"], ["--tokens-per-sample", "99"]])
def test_what_the_data_or_the_model_lacks_is_one_line(with_capacity, capsys, more):
    data, path = with_capacity
    assert main([str(path), "--bin", f"a={data}", "--subset", "valid", *more]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert (
        f"error: --bin a={data}: lacks dict.txt or test.idx" in err
        or "99: the model takes at most 8" in err
    )


def test_blocks_are_as_long_as_the_model_takes(with_capacity, capsys):
    data, path = with_capacity
    capsys.readouterr()
    found = []
    for more in ([], ["--tokens-per-sample", "8"]):
        assert main([str(path), "--bin", f"a={data}", "--subset", "valid", *more]) == 0
        found.append(capsys.readouterr().out)
    assert found[0] == found[1] != ""


def test_data_bins_have_one_dictionary(with_capacity, tmp_path, capsys):
    """As many entries, another order: a model reads other words in the same ids."""
    data, path = with_capacity
    other = Dictionary()
    for i in reversed(range(20)):
        other.add_symbol(f"w{i}", n=100)
    write_data_bin(tmp_path, {"valid": [[4, 5, 6]]}, other)
    capsys.readouterr()
    bins = ["--bin", f"a={data}", "--bin", f"b={tmp_path}"]
    assert main([str(path), *bins, "--subset", "valid"]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert err.startswith(f"error: {tmp_path / 'dict.txt'} (20 entries) differs from {data}")
