"""examples/finetune: its questions, its flags, its table; and, slow, all of it in small."""

import argparse
import contextlib
import importlib.util
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
from fairseq import options

import fairseq_moe_ext  # noqa: F401 - registers the task
from fairseq_moe_ext.errors import UserError

FOLDER = Path(__file__).parents[1] / "examples" / "finetune"


def load(name):
    """A module of the folder; `run` under a name of its own, as the quickstart has one, too."""
    sys.path.insert(0, str(FOLDER))
    spec = importlib.util.spec_from_file_location(f"finetune_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


questions, recipes, comparison = load("questions"), load("recipes"), load("comparison")


@pytest.fixture
def text(tmp_path):
    """Two kinds of text; every line names its document and its place in it."""
    rng = random.Random(0)
    for kind in ("docs", "python"):
        for split in ("train", "valid", "test"):
            with open(tmp_path / f"{kind}.{split}.jsonl", "w", encoding="utf-8") as file:
                for document in range(12):
                    lines = [
                        f"{kind} {split} {document} {i} " + "x" * rng.randint(25, 60)
                        for i in range(40)
                    ]
                    file.write(json.dumps({"text": "\n".join(lines)}) + "\n")
    return tmp_path


def test_the_right_ending_goes_on_and_the_wrong_one_is_of_another_document(text, tmp_path):
    sizes = {"train": 31, "valid": 10, "test": 20}
    for folder in ("one", "two"):
        questions.write(text, ["docs", "python"], sizes, tmp_path / folder, seed=1)
    labels, documents = [], {split: set() for split in sizes}
    for split, size in sizes.items():
        path = tmp_path / "one" / f"{split}.jsonl"
        assert path.read_bytes() == (tmp_path / "two" / f"{split}.jsonl").read_bytes()
        found = [json.loads(line) for line in path.read_text().splitlines()]
        assert len(found) == size
        for question in found:
            kind, of, document, place = question["context"].split("\n")[-1].split()[:4]
            ways = [choice.strip().split()[:4] for choice in question["choices"]]
            right, wrong = ways[question["label"]], ways[1 - question["label"]]
            assert right == [kind, of, document, str(int(place) + 1)]
            assert of == ("test" if split == "test" else "train")
            assert wrong[:2] == [kind, of] and wrong[2] != document
            documents[split] |= {(kind, of, document), (kind, of, wrong[2])}
            assert 40 <= len(question["choices"][0].strip()) <= 100
            labels.append(question["label"])
    assert 0.3 < sum(labels) / len(labels) < 0.7
    assert not documents["train"] & documents["valid"]
    with pytest.raises(UserError, match="docs.test.jsonl: has text for .* lower --test"):
        questions.write(text, ["docs"], {"test": 10**6}, tmp_path / "three", seed=1)


def test_every_recipe_becomes_flags_that_fairseq_train_takes(tmp_path):
    plain = recipes.as_flags(recipes.recipe_settings([]))
    assert plain == []
    for row, names in recipes.RECIPES.items():
        flags = recipes.as_flags(recipes.recipe_settings(names))
        assert bool(flags) == (row != "plain")
        command = f"{tmp_path} --task multiple_choice --arch moe_lm_tiny".split()
        command += ["--criterion", "multiple_choice", "--lr", "0.1", "--batch-size", "32", *flags]
        args = options.parse_args_and_arch(options.get_training_parser(), command)
        assert args.moe_freeze == {"frozen experts": "experts"}.get(
            row, "gate" if "freeze_gate" in names else "none"
        )
    assert recipes.as_flags(recipes.recipe_settings(["small_batch"])) == [
        "--batch-size",
        "8",
        "--lr",
        "0.001",
    ]


def made_up(**rows):
    summed = comparison.summary(rows)
    for entry in summed.values():
        entry["overflow"] = None
    before = {"dense": {"accuracy": 55.0}, "moe": {"accuracy": 56.0}}
    for entry in before.values():
        entry.update(chance=50.0)
    runs = [{"row": row, "precision": "float32"} for row in rows]
    settings = {"questions": {"test": 800}}
    return {"rows": summed, "before": before, "runs": runs, "settings": settings}


def test_the_table_says_what_was_found():
    result = made_up(
        dense=[70.0, 71.0, 72.0],
        plain=[65.0, 66.0, 67.0],
        good=[70.0, 69.0, 71.0],
        bad=[60.0] * 3,
        noise=[66.0, 69.0, 67.5],
    )
    # +1.5 with a standard error of 0.8, of which 4.3 make the 95 % of Student's t
    assert not result["rows"]["noise"]["beyond"]
    assert result["rows"]["good"]["difference"] == 4 and result["rows"]["good"]["beyond"]
    said = comparison.table(result)
    # Wilson 1927: of 440 of 800, and of 568
    cells = "50.0 | 55.0 (51.5 to 58.4) | 71.0 (67.8 to 74.0) | ± 1.0 | +5.0 * |  |"
    assert f"| dense | {cells}" in said and "Not above chance" not in said
    assert "the dense one is 5.0 points ahead, significantly." in said
    assert "Significantly better than plain (*): good (+4.0)." in said
    assert "Significantly worse than plain (*): bad (−6.0)." in said
    end = "95 % interval of one accuracy is about ± 3.5 points."
    assert said.endswith(f"{end} Trainings computed in float32.\n")
    result["runs"][0]["precision"] = "bfloat16"
    assert "computed in bfloat16 dense; in float32 plain, good, bad, noise." in comparison.table(
        result
    )
    result["runs"] = [{"row": "dense"}]  # as older files have it
    assert comparison.table(result).endswith(f"{end}\n")


def test_the_table_says_if_it_was_nothing():
    said = comparison.table(made_up(dense=[65.2, 65.8], plain=[66.0, 67.0], same=[66.0, 68.0]))
    assert "the sparse one is 1.0 points ahead, not significantly." in said
    assert "So the paper's gap between sparse and dense does not show here." in said
    assert "Significantly better than plain (*): none." in said
    one = comparison.table(made_up(dense=[65.0], plain=[66.0]))
    assert "±  " not in one and "Seeds: 1;" in one and "| one seed |" in one
    assert "1.0 points ahead, with one seed, so noise is not measured." in one
    assert "than plain" not in one, "which one seed cannot say"
    said = comparison.table(made_up(dense=[53.0, 53.2], plain=[60.0, 60.1]))
    assert "Not above chance (50.0 %) by more than noise: dense." in said
    assert comparison.signed(-0.04) == "0.0"


def test_all_dropped_choices_are_shown():
    """Runs of earlier versions have first choices only, under another name."""
    finetune = load("run")
    sizes = {"test": 800}
    ablation = argparse.Namespace(sizes=sizes, settings={"questions": sizes})
    run = {"seed": 1, "accuracy": 60.0, "command": ["fairseq-train"]}
    results = [
        {**run, "row": "plain", "dropped": [10.0, 20.0]},
        {**run, "row": "z-loss", "overflow": [4.0, 6.0]},
        {**run, "row": "dense", "dropped": []},
    ]
    before = {name: {"accuracy": 55.0, "chance": 50.0} for name in ("dense", "moe")}
    said = comparison.table(finetune.gathered(ablation, before, results))
    assert "| one seed |  | 15.0 |" in said and "| one seed | 0.0 | 5.0 |" in said
    assert "| one seed | 0.0 |  |" in said


def test_rows_that_there_are_not():
    assert recipes.chosen_rows("dense, frozen gate") == ["dense", "frozen gate"]
    with pytest.raises(UserError, match="--rows dense,gate: no row 'gate'; there are dense, plain"):
        recipes.chosen_rows("dense,gate")


def test_a_quickstart_without_learned_gates_is_refused_before_any_work(tmp_path, capsys):
    """Today's default routes by hash; folders of before the flag do not name a router."""
    base, out = tmp_path / "quickstart", tmp_path / "out"
    for model in ("dense", "moe"):
        (base / model).mkdir(parents=True)
        (base / model / "finished").touch()
    finetune = load("run")
    (base / "settings.json").write_text('{"router": "hash"}')
    assert finetune.main(["--quickstart", str(base), "--out", str(out)]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "was trained with --router hash" in error
    assert not out.exists()
    (base / "dense" / "finished").unlink()  # a run that has not ended is refused likewise
    assert finetune.main(["--quickstart", str(base), "--out", str(out)]) == 1
    assert "was trained with --router hash" in capsys.readouterr().err and not out.exists()
    for settings in ({"router": "topk"}, {}):
        (base / "settings.json").write_text(json.dumps({**settings, "context": 256}))
        finetune.Ablation(argparse.Namespace(out=out, quickstart=base, train=1, valid=1, test=1))


@pytest.mark.parametrize(
    "name, said",
    [("other", "is not empty and holds no quickstart run"), ("other/file", "a file, not a folder")],
)
def test_what_is_no_quickstart_is_named_with_its_flag(tmp_path, capsys, name, said):
    finetune, path = load("run"), tmp_path / name
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    assert finetune.main(["--quickstart", str(path), "--out", str(tmp_path / "out")]) == 1
    remedy = "name another folder; one that is missing is created"
    assert capsys.readouterr().err == f"error: --quickstart {path}: {said}: {remedy}\n"
    assert [entry.name for entry in tmp_path.iterdir()] == ["other"]


def test_a_folder_that_cannot_be_made_is_found_before_any_work(tmp_path, monkeypatch, capsys):
    finetune = load("run")
    monkeypatch.setattr(finetune.subprocess, "call", lambda _: pytest.fail("the quickstart began"))
    (tmp_path / "file").touch()
    out = tmp_path / "file" / "out"
    assert finetune.main(["--quickstart", str(tmp_path / "none"), "--out", str(out)]) == 1
    error = capsys.readouterr().err
    assert error == f"error: --out {out} cannot be written (Not a directory): name another folder\n"


@pytest.mark.parametrize("interrupted", [False, True])
def test_runs_of_a_recipe_that_has_changed_are_refused(tmp_path, monkeypatch, interrupted):
    """The folder may have moved: of the command, flags count, not paths."""
    base, run = tmp_path / "quickstart", load("run")
    base.mkdir()
    (base / "settings.json").write_text('{"router": "topk", "context": 256}')
    sizes = dict(train=64, valid=1, test=1, epochs=1, seeds=1)

    def call(self, command, log, threads=0):
        if interrupted:
            raise KeyboardInterrupt
        log.write_text(f"| fairseq_cli.train | {{'common': {{'bf16': {log.stem == 'train'}}}}}\n")

    tested = dict.fromkeys(["accuracy", "accuracy_low", "accuracy_high", "chance", "cut"], 50)
    tested = {f"test_{name}": value for name, value in tested.items()}
    monkeypatch.setattr(run.Ablation, "call", call)
    monkeypatch.setattr(run, "model_flags", lambda _: ["--arch", "moe_lm_tiny"])
    monkeypatch.setattr(run.logs, "measurements", lambda *_: [tested])
    monkeypatch.setattr(run, "before", lambda *_: pytest.fail("work before the check"))

    def ablation(out):
        return run.Ablation(argparse.Namespace(out=out, quickstart=base, jobs=1, **sizes))

    with contextlib.suppress(KeyboardInterrupt):
        assert ablation(tmp_path / "out").one("z-loss", 1)["precision"] == "bfloat16"
    (tmp_path / "out").rename(tmp_path / "moved")
    ablation(tmp_path / "moved").check_same("z-loss", 1)
    ablation(tmp_path / "moved").check_same("plain", 1)
    changed = {"moe_z_loss_wt": 0.5}
    monkeypatch.setattr(run.recipes, "recipe_settings", lambda _: changed)
    with pytest.raises(UserError, match="moved/runs/z-loss-1: was trained with other flags"):
        run.run_all(ablation(tmp_path / "moved"), ["plain", "z-loss"])


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_all_of_it_in_small_and_again(tmp_path):
    base = tmp_path / "quickstart"
    subprocess.run(
        [sys.executable, str(FOLDER.parent / "quickstart" / "run.py"), "--out", str(base)]
        + ["--router", "topk", "--updates", "6", "--text-bytes", "200000"],
        check=True,
    )
    command = [sys.executable, str(FOLDER / "run.py"), "--out", str(tmp_path / "out")]
    command += ["--quickstart", str(base), "--train", "64", "--valid", "16", "--test", "32"]
    command += ["--epochs", "1", "--seeds", "1", "--rows", "dense,plain,frozen gate"]
    first = subprocess.run(command, check=True, capture_output=True, text=True)
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert set(result["rows"]) == {"dense", "plain", "frozen gate"}
    assert all(0 <= e["accuracy"][0] <= 100 for e in result["rows"].values())
    assert all(run["chance"] == 50 for run in [*result["before"].values(), *result["runs"]])
    assert all(e["interval"][0] <= e["mean"] <= e["interval"][1] for e in result["rows"].values())
    assert (tmp_path / "out" / "result.md").read_text() in first.stdout
    logs = {path: path.stat().st_mtime_ns for path in tmp_path.glob("out/runs/*/*.log")}
    again = subprocess.run(command, check=True, capture_output=True, text=True)
    assert {path: path.stat().st_mtime_ns for path in logs} == logs
    assert (tmp_path / "out" / "result.md").read_text() in again.stdout
    other = subprocess.run([*command, "--epochs", "2"], capture_output=True, text=True)
    assert other.returncode == 1 and "holds an ablation with epochs 1, not 2" in other.stderr
