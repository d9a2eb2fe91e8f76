"""Whether a run's folder holds the training that the study's file asks for."""

import json
import re

import pytest

from fairseq_moe_ext.errors import UserError
from fairseq_moe_ext.study import finished, plan, result, trained

COUNTS = {
    "types": 300,
    "corpora": {
        "a": {"held_out": False, "train": {"tokens": 70}, "valid": {"tokens": 7}},
        "b": {"held_out": False, "train": {"tokens": 50}},
        "c": {"held_out": True, "test": {"tokens": 9}},
    },
}


def run(folder, *flags, data="data", python="python", user_dir="here"):
    """A run of fairseq-train, with the data beside its folder."""
    command = [f"{python}/fairseq-train", str(folder.parent / data), "--user-dir", user_dir]
    command += ["--save-dir", str(folder), "--lr", "8e-3", "--bf16", *flags]
    return plan.Run("arm", "a", 1, 3, folder, command, [], [])


@pytest.fixture
def begun(tmp_path):
    """A run that has begun."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "counts.json").write_text(json.dumps(COUNTS))
    one = run(tmp_path / "arm-a-1", "--arch", "x", "--clip-norm", "1.0")
    one.folder.mkdir()
    trained.record(one)
    return one


def test_what_changes_no_training_is_the_same(begun):
    """The order of the flags, where things are, how numbers are written, how often is logged."""
    folder = begun.folder
    other = run(
        *(folder, "--clip-norm", "1", "--arch", "x", "--log-interval", "7"),
        **{"python": "/other", "user_dir": "/there", "data": f"{folder.name}/../data"},
    )
    trained.check(other)
    assert trained.differs(other) == ""
    moved = begun.folder.rename(folder.with_name("moved"))
    trained.check(run(moved, "--arch", "x", "--clip-norm", "1.0"))
    (moved / "command.json").unlink()
    trained.check(run(moved, "--arch", "y"))  # a folder that does not say


@pytest.mark.parametrize(
    "flags, data, words",
    [
        (["--arch", "x"], "data", "with --clip-norm 1.0, and the file now trains without --clip-"),
        (["--arch", "y"], "data", "with --arch x, and the file now trains with --arch y"),
        (
            ["--arch", "x", "--clip-norm", "1.0", "--cpu"],
            "data",
            "without --cpu, and the file now trains with --cpu$",
        ),
        (["--arch", "x", "--clip-norm", "1.0"], "data2", "with data .*/data, and .* data .*/data2"),
    ],
)
def test_the_first_setting_that_differs_is_named(begun, flags, data, words):
    other = run(begun.folder, *flags, data=data)
    assert re.search(f"^was trained {words}", trained.differs(other))
    with pytest.raises(
        UserError, match="arm-a-1: was trained .*: set another `out`, or delete this"
    ):
        trained.check(other)


def test_runs_with_other_validations_are_not_the_same(begun):
    """checkpoint_best.pt is the best of them: fairseq validates whenever it saves."""
    begun = begun._replace(train=[*begun.train, "--save-interval-updates", "90"])
    trained.record(begun)
    other = begun._replace(train=[*begun.train, "--save-interval-updates", "10"])
    said = "trained with --save-interval-updates 90, and the file now trains with --save-interval"
    assert said in trained.differs(other)


@pytest.mark.parametrize("content", ["8", "{}", "[1, 2]"])
def test_a_damaged_record_is_named(begun, content):
    (begun.folder / "command.json").write_text(content)
    with pytest.raises(UserError, match="command.json: not in the format that was written"):
        trained.differs(begun)


@pytest.mark.parametrize(
    "change, same",
    [
        (lambda counts: counts["corpora"].pop("c"), True),  # held out: not trained on
        (lambda counts: counts.update(split={"split_seed": 1}), True),
        (lambda counts: counts.update(corpora=dict(reversed(counts["corpora"].items()))), True),
        (lambda counts: counts["corpora"]["b"]["train"].update(tokens=51), False),
        (lambda counts: counts["corpora"]["a"]["valid"].update(tokens=8), False),
        (lambda counts: counts["corpora"].pop("b"), False),
        (lambda counts: counts.update(types=301), False),
    ],
)
def test_a_run_does_not_go_on_with_other_text(begun, change, same):
    counts = json.loads(json.dumps(COUNTS))
    change(counts)
    path = begun.folder.parent / "data" / "counts.json"
    path.write_text(json.dumps(counts))
    assert (trained.digest(path) == trained.digest(begun.folder / "text.json")) == same
    if same:
        trained.check(begun)
    else:
        with pytest.raises(UserError, match="arm-a-1: was trained on other text than .*/data now"):
            trained.check(begun)
    trained.record(begun)
    assert json.loads((begun.folder / "text.json").read_text()) == COUNTS, "of the first start"
    (begun.folder / "text.json").unlink()
    trained.check(begun)  # an older folder


def test_runs_of_another_file_are_left_out_of_the_result(begun, monkeypatch):
    """As `--only-result` collects."""
    (begun.folder / "evaluation.json").write_text("{}")
    monkeypatch.setattr(finished, "of_run", lambda one, *_: one.name)
    monkeypatch.setattr(result, "factors", lambda runs: {})
    asked = plan.Plan("", begun.folder.parent, 32, 128, [begun], "")
    assert result.collect(asked)["runs"] == ["arm a seed 1"] and not result.left_out(asked)
    asked = asked._replace(runs=[run(begun.folder, "--arch", "y"), begun])
    assert result.collect(asked)["runs"] == ["arm a seed 1"]
    (line,) = result.left_out(asked)
    assert line.startswith(f"{begun.folder}: left out: was trained with --arch x, and the file now")
