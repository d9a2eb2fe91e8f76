"""Expert use: the information measure, and the command's answers to wrong input."""

import math

import pytest
from training import USER_DIR, fairseq, make_data

from fairseq_moe_ext.evaluation.expert_use import main
from fairseq_moe_ext.evaluation.specialisation import mutual_information


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
        (["missing.pt", "--bin", "a=."], "missing.pt does not exist"),
        (["x.pt", "--bin", "a"], "--bin a: give NAME=FOLDER"),
        (["x.pt", "--bin", "a=no/such/folder"], "--bin a=no/such/folder"),
        (["x.pt", "--bin", "a=.", "--among", "b"], "--among b: no --bin b; there are a"),
        (["x.pt", "--bin", "a=.", "--batch-size", "0"], "--batch-size 0: use 1 or more"),
    ],
)
def test_wrong_input_is_one_line(arguments, words, capsys):
    assert main(arguments) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and words in err and err.count("\n") == 1


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
    assert capsys.readouterr().err.startswith(f"error: checkpoint {path} has no MoE layer: ")
