"""What a study does again when its file asks for another evaluation or priming."""

import json
import sys

import pytest

from fairseq_moe_ext.errors import UserError
from fairseq_moe_ext.study import command, plan, stale
from fairseq_moe_ext.study.plan import Plan, Run

SETS = {"near", "far"}


def writes(path, content, *flags):
    """A command that writes a JSON file."""
    text = json.dumps(content)
    return [sys.executable, "-c", f"open({str(path)!r}, 'w').write({text!r})", *flags]


def run(folder, stride="32", shots="0"):
    """A run whose commands write their settings."""
    evaluation = {"sets": dict.fromkeys(SETS), "stride": int(stride)}
    priming = {"settings": {"shots": [int(shots)]}, "complete": True}
    return Run(
        *("arm", "a", 1, 3, folder),
        writes(folder / "training", 1),
        writes(folder / "evaluation.json", evaluation, "--context", "32", "--stride", stride),
        writes(folder / "priming.json", priming, "--shots", shots),
    )


def do(one, sets=SETS):
    """Do the study of one run; what its evaluation and priming then are."""
    command._Work(Plan("", one.folder.parent, 32, 128, [one], "", sets), 1).do()
    results = [
        json.loads((one.folder / f"{step.name}.json").read_text()) for step in stale.steps(one)
    ]
    return results[0]["stride"], results[1]["settings"]["shots"]


def times(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*.log")}


def test_only_what_the_file_changed_is_done_again(tmp_path, capsys):
    folder = tmp_path / "out" / "arm-a-1"
    assert do(run(folder)) == (32, [0])
    logs = times(folder)
    assert do(run(folder)) == (32, [0]) and times(folder) == logs
    capsys.readouterr()
    assert do(run(folder, stride="16")) == (16, [0])
    said = capsys.readouterr().err
    assert said.count("repeating") == 1 and "arm a seed 1: repeating evaluation, because" in said
    assert json.loads((folder / "evaluation.before.json").read_text())["stride"] == 32
    assert do(run(folder, stride="16", shots="8")) == (16, [8])
    assert json.loads((folder / "priming.before.json").read_text())["settings"]["shots"] == [0]
    (folder / "training").unlink()
    assert do(run(folder)) == (32, [0]) and not (folder / "training").exists(), "trained once"
    assert json.loads((folder / "evaluation.before.json").read_text())["stride"] == 32, "kept"
    assert json.loads((folder / "evaluation.before-2.json").read_text())["stride"] == 16


def test_words_that_change_no_result_do_nothing_again(tmp_path):
    """Such as the path of Python, or a flag of a newer plugin that writes more."""
    one = run(tmp_path / "out" / "arm-a-1")
    do(one)
    other = one._replace(
        evaluate=["python9", "-m", "x", *one.evaluate[3:], "--unit-losses", "x.json"],
        prime=["python9", "-m", "x", *one.prime[3:], "--cpu"],
    )
    assert not any(stale.is_stale(other, step, SETS) for step in stale.steps(other))
    for flag in ("--batch-size", "--bootstrap"):
        changed = one._replace(evaluate=[*one.evaluate, flag, "9"])
        assert [stale.is_stale(changed, step, SETS) for step in stale.steps(changed)] == [1, 0]
    first = ["python", "-m", "x", "evaluate", "data", f"{tmp_path}/a", "--context", "32"]
    stale.record(one._replace(evaluate=first), stale.Step("evaluation", first))
    for folder, again in ((f"{tmp_path}/b/../a", False), (f"{tmp_path}/b", True)):
        moved = one._replace(evaluate=[*first[:5], folder, *first[6:]])
        assert stale.is_stale(moved, stale.steps(moved)[0], SETS) == again


@pytest.mark.parametrize(
    "name, content",
    [
        ("priming.json", '{"settings": [8]}'),
        ("priming.json", '{"settings": {"shots": 8}}'),
        ("evaluation.json", '{"sets": 8}'),
        ("priming.command.json", "8"),
        ("evaluation.command.json", "[1, 2, 3, 4, 5]"),
    ],
)
def test_damaged_files_are_named(tmp_path, name, content):
    one = run(tmp_path / "out" / "arm-a-1")
    do(one)
    (one.folder / name).write_text(content)
    with pytest.raises(UserError, match=f"{name}: not in the format"):
        [stale.is_stale(one, step, SETS) for step in stale.steps(one)]


def test_a_step_that_failed_is_done_the_next_time(tmp_path):
    folder = tmp_path / "out" / "arm-a-1"
    do(run(folder))
    broken = run(folder, stride="16")._replace(evaluate=[sys.executable, "-c", "exit(3)"])
    with pytest.raises(UserError, match="status 3"):
        do(broken)
    assert not (folder / "evaluation.json").exists(), "the old one is not the result"
    assert do(run(folder, stride="16")) == (16, [0])


def test_results_without_a_record_are_kept_if_they_fit(tmp_path):
    """Folders of older studies."""
    folder = tmp_path / "out" / "arm-a-1"
    do(run(folder))

    def asked_again(one, sets=SETS):
        return [step.name for step in stale.steps(one) if stale.is_stale(one, step, sets)]

    for record in folder.glob("*.command.json"):
        if record.name != "command.json":
            record.unlink()
    assert asked_again(run(folder)) == []
    assert asked_again(run(folder, stride="16")) == ["evaluation"]
    assert asked_again(run(folder, shots="8")) == ["priming"]
    assert asked_again(run(folder), SETS | {"new"}) == ["evaluation"]
    (folder / "evaluation.json").write_text('{"sets": {"near": 1, "far": 1}}')  # older still
    assert asked_again(run(folder, stride="16")) == []
    (folder / "trained").unlink()
    (folder / "training").unlink()
    do(run(folder), SETS | {"new"})
    assert not (folder / "training").exists(), "what was evaluated is trained"


def test_a_file_names_the_sets_that_are_evaluated(folder):
    path = folder / "few.yaml"
    path.write_text(
        f"{{data: {folder}/data, out: {folder}/few, context: 32, updates: 3, seeds: [1],"
        "reference: a, train: {batch-size: 4}, arms: {a: {arch: dense_lm_tiny}}}"
    )
    assert plan.read(path).sets == SETS
