"""A run whose training diverges does not end the study, and counts as infinitely bad."""

import json
import math
import sys

import pytest
from study_results import STUDY

from fairseq_moe_ext import diverging, errors
from fairseq_moe_ext.errors import UserError
from fairseq_moe_ext.study import arms, command, diverged, finished, plan, result
from fairseq_moe_ext.study.plan import Plan, Run

# what `python DATA ...` runs: a training that diverges, fails or ends
TRAINS = """
import sys
if "--bad" in sys.argv:
    sys.exit("gradients are Nan/Inf: training diverged; lower --lr or --clip-norm")
if "--ill" in sys.argv:
    sys.exit("!")
"""


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "__main__.py").write_text(TRAINS)
    (folder / "dict.txt").write_text("a 1\nb 1\n")
    return folder


def run(data, name, *flags):
    folder = data.parent / "out" / f"arm-{name}-1"
    evaluation = {"sets": {"x": {"perplexity": 9.0}}, "mean": {"in_domain": {"perplexity": 9.0}}}
    write = f"open({str(folder / 'evaluation.json')!r}, 'w').write({json.dumps(evaluation)!r})"
    train = [sys.executable, str(data), "--user-dir", "x", *flags]
    return Run("arm", name, 1, 3, folder, train, [sys.executable, "-c", write], [])


def do(data, *runs):
    command._Work(Plan("", data.parent / "out", 32, 128, list(runs), ""), 1).do()


def test_the_others_go_on(data, capsys):
    runs = [run(data, "a", "--bad"), run(data, "b")]
    do(data, *runs)
    assert [finished.done(one) for one in runs] == [True, True]
    assert diverged.noted(runs[0].folder) and not (runs[0].folder / "trained").exists()
    assert not (runs[0].folder / "evaluation.json").exists()
    assert (runs[1].folder / "evaluation.json").exists()
    said = capsys.readouterr().err
    assert f"arm a seed 1: its training diverged (the end of {runs[0].folder}/train.log)" in said
    log = (runs[0].folder / "train.log").read_text()
    do(data, *runs)
    assert (runs[0].folder / "train.log").read_text() == log, "not trained again"
    assert json.loads((runs[0].folder / "diverged.json").read_text())["vocabulary"] == 6


def test_another_failure_ends_the_study(data):
    runs = [run(data, "a", "--ill"), run(data, "b")]
    with pytest.raises(UserError, match="arm a seed 1: .* ended with status 1: !"):
        do(data, *runs)
    assert not diverged.noted(runs[0].folder) and not finished.done(runs[1])


def test_the_words_are_those_of_a_training_that_diverged():
    assert diverged.SAID in diverging.REMEDY and diverged.SAID in str(errors.not_finite(1))
    assert diverged.SAID not in errors.DAMAGED


def test_its_perplexities_are_infinite(folder, monkeypatch):
    """Its costs are those of its flags."""
    path = folder / "study.yaml"
    path.write_text(STUDY.format(data=folder / "data", out=folder / "out"))
    asked = plan.read(path)
    near = {"perplexity": 9.0, "tokens": 5, "in_domain": True, "dropped": None, "interval": [8, 10]}
    for one in asked.runs[:3]:
        one.folder.mkdir(parents=True)
        (one.folder / "train.log").touch()
    assert diverged.note(asked.runs[0], UserError(f"x: {diverged.SAID} --lr"))
    assert not diverged.note(asked.runs[2], UserError(errors.DAMAGED))
    with pytest.raises(UserError, match="no run is finished"):
        result.collect(asked)
    (asked.runs[1].folder / "evaluation.json").touch()
    like = {"family": "dense", "size": "m", "seed": 1, "flops": 1e9, "sets": {"near": near}}
    like.update(mean={"in_domain": near}, protocol={"context": 32, "stride": 32}, text="")
    like["priming"] = {"mean": {}, "tasks": []}
    monkeypatch.setattr(finished, "of_run", lambda *_: like)
    found, other = result.collect(asked)["runs"]
    assert other == like and (found["family"], found["size"], found["seed"]) == ("dense", "s", 1)
    assert (
        found["sets"]["near"]["perplexity"] == found["mean"]["in_domain"]["perplexity"] == math.inf
    )
    words = (folder / "data" / "dict.txt").read_text().count("\n") + 4  # fairseq's own
    by_hand = 2 * (8 * 8**2 + 4 * 8 * 32) + 2 * 2 * 8 * 2 * 32 + 2 * 8 * words
    assert found["flops"] == pytest.approx(3 * 3 * 4 * 32 * by_hand)
    assert found["seconds"] == 0.0 and found["experts"] == 1
    assert not arms.shared({1: found}, {1: other}, "in_domain")
    remark = result.factors([found, other])["near"]["remark"]
    assert "dense s diverged (infinite perplexity)" in remark
