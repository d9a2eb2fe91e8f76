"""A study: its file, its runs in small, its factors."""

import json
import math
import re
import shutil

import pytest
from fairseq.data.data_utils import batch_by_size
from study_results import STUDY

from fairseq_moe_ext import cli
from fairseq_moe_ext.errors import UserError
from fairseq_moe_ext.evaluation.speedup import in_words
from fairseq_moe_ext.study import finished, flags, page, plan, result, tables


def write(folder, change=lambda text: text):
    path = folder / "study.yaml"
    path.write_text(change(STUDY.format(data=folder / "data", out=folder / "out")))
    return path


@pytest.mark.parametrize(
    "old, new, words",
    [
        ("updates:", "updats:", "unknown key 'updats'; the keys are title, data"),
        ("updates:", "update:", "arms, reference; did you mean updates?"),
        ("batch-size: 4", "batch-sise: 4", "train: batch-sise: no such flag; did you mean batch-s"),
        ("batch-size: 4,", "batch-size-valid: 4,", "train: batch-size is missing: set the number"),
        (
            "batch-size: 4",
            "batch-size: 4, update-fre: 2",
            "--update-fre 2; did you mean --update-f",
        ),
        ("evaluate: {bootstrap", "evaluate: {boot", "evaluate: unknown key 'boot'"),
        ("context: 32", "", "the key 'context' is missing"),
        ("seeds: [1]", "seeds: [1, 1]", "seeds [1, 1]: give different"),
        ("/data", "/nowhere", "nowhere: no such data folder"),
        ("lr: 0.01", "--lr: 0.01", "'--lr': write flags without leading dashes"),
        ("lr: 0.01", "seed: 3", "train: seed: the study sets this itself"),
        ("context: 32", "context: many", "context: 'many' is not a whole number; write one"),
        ("batch-size: 4,", "", "train: batch-size is missing: set the number of blocks"),
        ("batch-size: 4", "batch-size: 12", "batch-size 12: fairseq would train on 8 blocks, a"),
        (
            *("batch-size: 4", "batch-size: 24, required-batch-size-multiple: 5"),
            "train: batch-size 24: fairseq would train on 20 blocks, a multiple of 5; use one",
        ),
        (
            *("batch-size: 4", "batch-size: 4, required-batch-size-multiple: '5'"),
            "train: required-batch-size-multiple '5': write a whole number",
        ),
        ("batch-size: 4", "batch-size: 4, update-freq: [2]", "update-freq [2]: write a whole"),
        *(
            ("batch-size: 4", f"batch-size: 4, {flag}: {value}", f"train: {flag}: remove it")
            for flag, value in (
                *(("max-sentences", 2), ("max-tokens", 64), ("sample-break-mode", "eos")),
                *(("max-epoch", 1), ("patience", 1), ("stop-time-hours", 0.1)),
                *(("stop-min-lr", 0.1), ("restore-file", "a.pt"), ("continue-once", "a.pt")),
                *(("log-format", "simple"), ("no-save", "true"), ("disable-validation", "true")),
                *(("add-bos-token", "true"), ("maximize-best-checkpoint-metric", "true")),
                *(("checkpoint-suffix", "x"), ("use-sharded-state", "true")),
                ("best-checkpoint-metric", "loss"),
            )
        ),
        (
            *("batch-size: 4", "batch-size: 4, validate-after-updates: 4"),
            "dense: sizes: s: validate-after-updates 4: is more than the 3 updates",
        ),
        *(
            (
                "batch-size: 4",
                f"batch-size: 4, log-interval: {value}",
                "s: log-interval 4: is more than",
            )
            for value in ("4", "'4'")
        ),
        (
            *("batch-size: 4", "batch-size: 4, distributed-world-size: 2"),
            "train: distributed-world-size: the study sets this itself",
        ),
        *(
            (old, f"{old}{flag}: 2, ", f"dense: sizes: s: {flag}: move it to train")
            for old in ("sizes: {s: {", "dense_lm_tiny, flags: {")
            for flag in ("batch-size", "update-freq", "required-batch-size-multiple")
        ),
        ("context: 32", "context: [", "not YAML"),
        ("context: 32", "context: 0", "context 0 is out of range: use a whole number from 1"),
        ("seeds: [1]", "seeds: [-1]", "seeds [-1] is out of range"),
        ("lr: 0.01", "lr: .nan", "train: lr nan is out of range"),
        ("lr: 0.01", "clip-norm: -1", "train: clip-norm -1 is out of range"),
        ("decoder-embed-dim: 8", "decoder-embed-dim: 0", "decoder-embed-dim 0 is out of range"),
        ("bootstrap: 20", "bootstrap: 0", "evaluate: bootstrap 0 is out of range"),
        ("{decoder-embed-dim: 8}", "{updates: 0}", "dense: sizes: s: updates 0 is out of range"),
        ("evaluate:", "priming: {folder: none}\nevaluate:", "priming: folder none: name a folder"),
        ("{decoder-embed-dim: 8}", "{updates: '4'}", "sizes: s: updates '4' is out of range"),
        ("sizes: {s:", "sizes: {on:", "sizes: True: YAML reads this name as a value"),
        ("sizes: {s:", "sizes: {m:", "not YAML (the key m appears twice"),
        ("{s: {decoder-embed-dim: 8}, m: {decoder-embed-dim: 16}}", "{}", "sizes is empty"),
        ("dense_lm_tiny", "dense_lm", "dense s: fairseq-train: argument --arch/-a: invalid choice"),
        ("optimizer: adam", "optimiser: adam", "unrecognized arguments: --optimiser adam"),
        ("optimizer: adam", "optimizer: null", "train: optimizer None: use a number, text"),
        ("optimizer: adam", "help: true", "dense s: fairseq-train: --help only prints the flags"),
        ("lr: 0.01", "lr: {1: 2}", "train: lr {1: 2}: use a number, text, true or"),
        (
            "decoder-attention-heads: 2",
            "decoder-attention-heads: 3",
            "dense s: --decoder-embed-dim 8 is not",
        ),
        ("context: 32", 'context: "a\\nb"', "'a\\nb' is not a whole number"),
        ("batch-size: 4", 'batch-size: "a\\nb"', "train: batch-size a b is out of range"),
        ("bootstrap: 20", "stride: 33", "evaluate: stride 33: is more than the context, 32"),
        ("seeds: [1]", "seeds: [true]", "seeds [True] is out of range"),
        ("evaluate:", "priming: {shots: [0]}\nevaluate:", "priming: folder missing: name a"),
        ("evaluate:", "priming: {folder: .}\nevaluate:", "none of its folders is a task"),
        (
            *("evaluate:", "priming: {folder: ., tasks: -x}\nevaluate:"),
            "priming: fairseq-moe priming: --tasks: its value -x begins with a minus",
        ),
        ("evaluate:", "priming: {shots: 3}\nevaluate:", "priming: shots: 3 is not a list"),
    ],
)
def test_mistakes_in_the_file(folder, old, new, words, capsys):
    path = write(folder, lambda text: text.replace(old, new, 1))
    assert cli.main(["study", str(path)]) == 1
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
    assert not (folder / "out").exists()


def test_flags_that_change_nothing_are_taken(folder):
    """So that a study that has them can go on."""
    more = "batch-size: 4, log-format: json, no-save: false, log-interval: 3, "
    more += "validate-after-updates: 3"
    path = write(folder, lambda text: text.replace("batch-size: 4", more))
    assert plan.read(path).runs[0].train.count("json") == 2


@pytest.mark.parametrize(
    "change, words",
    [
        ("no split", "test: {t}: has no data-bin for the split test"),
        ("same name", "test: {t}/far: a second set is called 'far'; leave one out"),
        ("dictionary", "test: {t}/new/dict.txt (0 entries) differs from"),
    ],
)
def test_test_sets_that_cannot_be_evaluated(folder, tmp_path, change, words, capsys):
    """What `fairseq-moe evaluate` would say behind the first training."""
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(folder / "data" / "dict.txt", other)
    name = "far" if change == "same name" else "new"
    shutil.copytree(folder / "data" / "far", other / name)
    if change == "no split":
        (other / name / "test.bin").rename(other / name / "valid2.bin")
        (other / name / "test.idx").rename(other / name / "valid2.idx")
    if change == "dictionary":
        (other / name / "dict.txt").write_text("")
    path = write(folder, lambda text: text.replace("context:", f"test: [{other}]\ncontext:"))
    assert cli.main(["study", str(path)]) == 1
    error = capsys.readouterr().err
    assert f"{path}: {words.format(t=other)}" in error and error.count("\n") == 1
    assert not (folder / "out").exists()


@pytest.mark.parametrize("batch, multiple", [(12, 8), (9, 8), (20, 8), (24, 5)])
def test_batches_that_fairseq_lowers(batch, multiple):
    train = {"batch-size": batch, "required-batch-size-multiple": multiple}
    with pytest.raises(UserError, match=f"train on {trained_on(batch, multiple)} blocks"):
        flags.blocks_per_update(train, "train")


@pytest.mark.parametrize("batch, multiple", [(8, 8), (6, 8), (16, 8), (12, 4), (12, 12), (9, 1)])
def test_batches_that_fairseq_keeps(batch, multiple):
    train = {"batch-size": batch, "update-freq": 2}
    if multiple != 8:
        train["required-batch-size-multiple"] = multiple
    assert flags.blocks_per_update(train, "train") == 2 * batch
    assert trained_on(batch, multiple) == batch


def trained_on(batch, multiple):
    """Blocks of stock fairseq's first batch."""
    return len(batch_by_size(range(99), len, [9] * 99, None, batch, multiple)[0])


def runs_of(costs, seeds=(1,)):
    """Runs with perplexities that are given by family and size as a function of the cost."""
    made = []
    for family, points in costs.items():
        for size, (flops, perplexity) in enumerate(points):
            for seed in seeds:
                value = {"perplexity": perplexity * (1 + 0.001 * seed)}
                run = {"family": family, "size": str(size), "seed": seed, "flops": flops}
                run["priming"] = {"mean": {}, "tasks": []}
                made.append({**run, "mean": {"in_domain": value}, "sets": {"a": value}})
    return made


def test_factors_and_their_spread():
    runs = runs_of({"dense": [(1, 30), (4, 20), (16, 10)], "moe": [(1, 20), (4, 5)]}, (1, 2, 3))
    found = result.factors(runs)
    assert set(found) == {"in_domain", "a"}
    assert [p["factor"] for p in found["a"]["curve"]] == pytest.approx([4, 16 / 4 ** (2 / 3)])
    expected = math.sqrt(4 * 16 / 4 ** (2 / 3))
    assert found["a"]["by_seed"] == {str(s): pytest.approx(expected) for s in (1, 2, 3)}
    rows = result.table({"factors": found, "runs": runs})
    assert rows[1][:2] == ["in domain", f"{expected:.2f}"]
    assert rows[1][2] == f"{expected:.2f} to {expected:.2f} over 3 seeds"


def test_a_size_that_diverged_is_named():
    costs = {"dense": [(1, 30), (4, 20), (16, 10)], "moe": [(1, 20), (4, math.inf)]}
    found = result.factors(runs_of(costs, (1, 2)))
    said = "moe 1 diverged (infinite perplexity): lower the learning rate, or remove the size from"
    assert result.remarks({"factors": found}) == [f"in domain, a: {said} the file"]


def prime(run, accuracy, questions=10_000, chance=0.25, majority=None, shots=0):
    """Give a run the accuracy of a task."""
    task = {"task": "copa", "shots": shots, "questions": questions, "accuracy": accuracy}
    task.update(chance=chance, majority=majority, questions_cut=0, questions_left_out=0)
    run["priming"] = {"mean": {str(shots): accuracy}, "tasks": [task]}


def test_no_factor_where_both_families_are_within_noise_of_chance():
    costs = {"dense": [(1, 30), (4, 20), (16, 10)], "moe": [(1, 20), (4, 5)]}
    runs = runs_of(costs)

    def zero_shot(*accuracies, **task):
        for run, accuracy in zip(runs, accuracies):
            prime(run, accuracy, **task)
        return result.factors(runs)["0-shot"]

    # 200 questions, chance 50 %: up to 56.9 % right is within the interval of a coin (binomial).
    noise = zero_shot(0.47, 0.5, 0.54, 0.48, 0.56, questions=200, chance=0.5)
    assert not noise["curve"] and not noise["by_seed"]
    assert "no model is above chance (50.0 %) by more than the noise" in noise["remark"]
    row = result.table({"factors": {"0-shot": noise}, "runs": runs})[1]
    assert row == ["0-shot, mean of 1 task", "-", "-", "-", "none"]
    assert zero_shot(0.47, 0.5, 0.54, 0.48, 0.56, questions=20_000, chance=0.5)["curve"]
    # one family beyond it, but where the two meet all is noise
    noise = zero_shot(0.47, 0.5, 0.54, 0.48, 0.9, questions=200, chance=0.5)
    assert not noise["curve"] and "where both families are, none is" in noise["remark"]
    # of those where they meet, the ones above chance alone
    some = zero_shot(0.47, 0.5, 0.7, 0.48, 0.9, questions=200, chance=0.5)
    assert [point["performance"] for point in some["curve"]] == [70.0]
    # the most frequent answer gets 62 %
    noise = zero_shot(0.5, 0.55, 0.62, 0.55, 0.6, chance=0.5, majority=0.62)
    assert not noise["curve"] and "(62.0 %)" in noise["remark"]
    assert "run priming again" in zero_shot(0.5, 0.6, 0.7, 0.5, 0.6, chance=None)["remark"]


def test_runs_that_were_measured_on_different_things_are_not_compared():
    runs = runs_of({"dense": [(1, 30), (4, 20), (16, 10)], "moe": [(1, 20), (4, 5)]})
    for run in runs:
        prime(run, 0.6)
        value = {"tokens": 9, "in_domain": True}
        run["sets"] = {"a": {**value, "perplexity": run["sets"]["a"]["perplexity"]}}
        run["protocol"] = {"context": 32, "stride": 32}
    prime(runs[1], 0.7, questions=9_999)
    runs[2]["sets"]["b"] = {**value, "perplexity": 9.0}
    found = result.factors(runs)
    for group in ("0-shot", "in_domain", "b"):
        assert "not measured on the same text" in found[group]["remark"], group
    assert found["a"]["curve"]
    runs[2]["protocol"] = {"context": 32, "stride": 16}  # as many tokens
    assert "not measured on the same text" in result.factors(runs)["a"]["remark"]


def test_runs_of_different_training_text_are_not_compared():
    runs = runs_of({"dense": [(1, 30), (4, 20), (16, 10)], "moe": [(1, 20), (4, 5)]})
    runs[0]["text"] = ""  # of an older folder
    for run in runs[1:]:
        run["text"] = "8f"
    assert result.factors(runs)["a"]["curve"]
    runs[2]["text"] = "9a"
    found = result.factors(runs)["a"]
    assert found["remark"] == "not trained on the same text in every run" and not found["curve"]


def test_a_seed_counts_when_all_sizes_are_trained_with_it():
    """Of seed 2 the largest sparse model is missing, whose factor is the smallest."""
    costs = {"dense": [(1, 30), (4, 20), (16, 10)], "moe": [(1, 25), (4, 15), (16, 10)]}
    runs = runs_of(costs, (1,))
    alone = result.factors(runs)["a"]
    partial = [run for run in runs_of(costs, (2,)) if (run["family"], run["size"]) != ("moe", "2")]
    for run in partial:
        run["flops"] *= 3 if run["family"] == "dense" else 1
    found = result.factors(runs + partial)["a"]
    assert found == alone and list(found["by_seed"]) == ["1"]
    assert list(result.factors(partial)["a"]["by_seed"]) == ["2"], "as far as any seed is"
    other = [run for run in runs if (run["family"], run["size"]) != ("dense", "2")]
    found = result.factors(other + partial)["a"]
    assert found["curve"] and not found["by_seed"]
    assert result.over_seeds(found) == "no seed is complete"


def test_intervals_are_of_their_points():
    """Of sizes with equal FLOPs too, such as 8 and 64 experts with top-1."""
    runs = runs_of({"dense": [(1, 60)], "moe": [(4, 48), (4, 42), (1, 50)]})
    for run in runs:
        run["mean"]["in_domain"]["interval"] = [
            run["mean"]["in_domain"]["perplexity"] + d for d in (-1, 1)
        ]
    points = result.points(runs, "moe", "in_domain")
    ends = result.intervals(runs, "moe", "in_domain")
    assert [cost for cost, _ in points] == [1, 4, 4]
    assert ends == [(value - 1, value + 1) for _, value in points]


def test_no_mean_of_seeds_of_different_text():
    runs = runs_of({"dense": [(1, 60)], "moe": [(4, 48)]}, (1, 2))
    assert "different text" not in tables.perplexities(runs)[1][0]
    runs[0]["text"], runs[1]["text"] = "8f", "9a"
    head, rows = tables.perplexities(runs)
    assert rows[0][1] == "different text" and rows[0][2].startswith("48.")
    assert result.points(runs, "dense", "a") == [] != result.points(runs, "moe", "a")


def test_words_for_factors_and_seeds():
    assert in_words(1.3) == "1.30 times less compute than"
    assert in_words(0.93) == "1.08 times more compute than"
    assert in_words(0.996) == in_words(1.004) == "as much compute as"
    # 20: dense 4, MoE 8; 10: dense 16, MoE 8 * 8 ** (10 / 11); so 1 / 1.97 in the geometric mean
    runs = runs_of({"dense": [(1, 30), (4, 20), (16, 10)], "moe": [(8, 20), (64, 9)]}, (7,))
    mean = math.sqrt(4 / 8 * 16 / (8 * 8 ** (10 / 11)))
    found = {"runs": runs, "factors": result.factors(runs), "planned": 6}
    said = page.summary_of(found)
    assert f"In domain MoE needs {1 / mean:.2f} times more compute than dense" in said
    assert "one seed, no interval" in said and "nothing was measured out of domain" in said
    assert "seeds" not in said and said.endswith("5 of 6 runs finished.")
    assert result.table(found)[1][2] == "one seed, no interval"
    runs = runs_of({"dense": [(1, 30), (4, 20), (16, 10)], "moe": [(1, 30), (16, 9)]}, (1, 2))
    for run in runs:
        run["flops"] *= {("moe", 1): 0.5, ("moe", 2): 3}.get((run["family"], run["seed"]), 1)
    found = {"runs": runs, "factors": result.factors(runs), "planned": 10}
    assert "but the seeds disagree" in page.summary_of(found)


def test_no_interval_of_one_seed():
    runs = runs_of({"dense": [(1, 30)], "moe": [(1, 20)]}, (0,))
    (row, *_) = tables.perplexities(runs)[1]
    assert row == ["In domain, mean", "30.00", "20.00"]
    runs = runs_of({"dense": [(1, 40)], "moe": [(1, 1)]}, (1, 2))
    for run in runs:
        run["sets"]["a"]["dropped"] = [0.0, 0.0] if run["family"] == "moe" else None
        run["router"] = {"overflow": 0.001} if run["family"] == "moe" else {}
    rows = tables.perplexities(runs)[1]
    assert rows[0][1:] == ["40.06 ± 0.02", "1.00 ± < 0.01"], "half of 40.04 to 40.08"
    assert rows[-1] == ["Choices dropped in training, %", "", "< 0.01"], "not 0.00"


def test_accuracies_have_factors_too():
    runs = runs_of({"dense": [(1, 30), (4, 20), (16, 10)], "moe": [(1, 20), (4, 5)]})
    for run, accuracy in zip(runs, (0.4, 0.5, 0.6, 0.5, 0.7)):
        prime(run, accuracy)
    found = result.factors(runs)
    assert list(found) == ["in_domain", "0-shot", "a"]
    # 50 % costs dense 4, MoE 1; 60 % dense 16, MoE half-way in ln from 1 to 4
    assert [p["factor"] for p in found["0-shot"]["curve"]] == pytest.approx([4, 16 / 2])


def test_runs_are_chosen_by_the_names_of_their_folders(folder, capsys):
    path = str(write(folder))
    assert cli.main(["study", path, "--dry-run", "--runs", "moe-*,dense-s-1"]) == 0
    trained = re.findall(r"--save-dir \S*/(\S+)", capsys.readouterr().out)
    assert trained == ["dense-s-1", "moe-s-1", "moe-m-1"]
    for words, error in (
        (["--runs", "moe-x"], "--runs moe-x: there is no such run; use dense-s-1, dense-m-1"),
        (["--runs", ""], "--runs : there is no such run"),
        (["--runs", "moe-*", "--only-result"], "--runs moe-*: --only-result collects all runs"),
    ):
        assert cli.main(["study", path, *words]) == 1
        said = capsys.readouterr().err
        assert said.startswith(f"error: {error}") and said.count("\n") == 1
    assert not (folder / "out").exists()


def test_priming_is_a_command_of_the_study(folder):
    path = write(
        folder, lambda text: text + f"priming: {{folder: {folder}, shots: [0, 8], tasks: copa}}\n"
    )
    typed = [plan.typed(one.prime) for one in plan.read(path).runs]
    assert typed[0] == (
        f"fairseq-moe priming {folder} --path {folder}/out/dense-s-1/checkpoint_best.pt "
        f"--data {folder}/data --tasks copa --shots 0,8 --draws 25 "
        f"--json {folder}/out/dense-s-1/priming.json --cpu"
    )
    assert '--user-dir "$(fairseq-moe user-dir)" ' in plan.typed(plan.read(path).runs[0].train)
    assert not plan.read(write(folder)).runs[0].prime


def test_one_point_and_no_overlap_are_said():
    found = result.factors(runs_of({"dense": [(1, 30), (4, 20)], "moe": [(1, 20)]}))
    assert "the MoE family has 1 point" in found["a"]["remark"] and not found["a"]["curve"]
    runs = runs_of({"dense": [(1, 30), (4, 20)], "moe": [(1, 9), (4, 8)]})
    found = result.factors(runs)
    assert found["a"]["remark"].startswith("no overlap") and not found["a"]["by_seed"]
    assert result.table({"factors": found, "runs": runs})[1][1] == "-"
    (line,) = result.remarks({"factors": found})
    assert line.startswith("in domain, a: no overlap: dense models reach 20.02 to 30.03, MoE ")
    found = result.factors(runs_of({"dense": [(1, 30), (4, 20)], "moe": [(1, 1e9), (4, math.inf)]}))
    assert found["a"]["remark"].startswith("moe 1 diverged") and not found["a"]["curve"]


def test_a_model_that_is_worse_than_a_smaller_one_is_named():
    runs = runs_of({"dense": [(1, 30), (4, 31), (9, 29)], "moe": [(1, 20), (4, 19)]})
    (line,) = result.warnings({"runs": runs})
    assert line.startswith("In domain dense") and "has a higher perplexity than a smaller" in line
    assert not result.warnings({"runs": runs_of({"dense": [(1, 30), (4, 30)], "moe": [(1, 2)]})})
    as_large = {"dense": [(4, 30), (4, 31)], "moe": [(1, 2)]}
    assert not result.warnings({"runs": runs_of(as_large)}), "not smaller"
    runs[1]["protocol"] = {"context": 32, "stride": 8}
    assert not result.warnings({"runs": runs}), "not measured in the same way"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_study_from_file_to_factors_and_again(folder, capsys):
    path = write(folder)
    assert cli.main(["study", str(path), "--jobs", "2"]) == 0
    found = json.loads((folder / "out" / "result.json").read_text())
    assert [(r["family"], r["size"]) for r in found["runs"]] == [
        (run.family, run.size) for run in plan.read(path).runs
    ]
    for run in found["runs"]:
        assert run["tokens"] == 3 * 4 * 32
        assert set(run["sets"]) == {"near", "far"} and run["mean"]["out_of_domain"]
    dense, moe = found["runs"][0], found["runs"][2]
    assert moe["parameters"] > dense["parameters"] and moe["flops"] > dense["flops"]
    logs = {p: p.stat().st_mtime_ns for p in (folder / "out").glob("*/*.log")}
    assert cli.main(["study", str(path)]) == 0, "again: nothing to do"
    assert {p: p.stat().st_mtime_ns for p in (folder / "out").glob("*/*.log")} == logs
    write(folder, lambda text: text.replace("bootstrap: 20", "stride: 16"))
    assert cli.main(["study", str(path), "--only-result"]) == 0
    assert "evaluation.json: its settings differ from the file's" in capsys.readouterr().out
    assert cli.main(["study", str(path)]) == 0
    assert "dense s seed 1: repeating evaluation" in capsys.readouterr().err
    again = json.loads((folder / "out" / "result.json").read_text())["runs"]
    assert {run["protocol"]["stride"] for run in found["runs"]} == {32}
    assert {run["protocol"]["stride"] for run in again} == {16}
    before = json.loads((folder / "out" / "dense-s-1" / "evaluation.before.json").read_text())
    assert before["sets"] == found["runs"][0]["sets"]
    write(folder, lambda text: text.replace("updates: 3", "updates: 4"))
    assert cli.main(["study", str(path)]) == 1
    said = (
        f"{folder}/out/dense-s-1: was trained with --max-update 3, and the file now trains with -"
    )
    assert said in capsys.readouterr().err
    assert cli.main(["study", str(path), "--only-result"]) == 1
    shown = capsys.readouterr()
    assert shown.out.count(": left out: was trained with --max-update 3") == 4
    assert "no run is finished" in shown.err
    assert cli.main(["report", str(folder / "out")]) == 0
    assert "of 4 runs" not in (folder / "out" / "report.html").read_text()


def test_priming_that_was_ended_is_not_taken_for_finished(tmp_path):
    path = tmp_path / "priming.json"
    assert not finished.primed(path)
    found = {"mean": {"0": 0.5}, "results": [{"task": "copa", "shots": 0, "accuracy": 0.5}]}
    for said, ended in (({}, True), ({"complete": True}, True), ({"complete": False}, False)):
        path.write_text(json.dumps({**found, **said}))
        assert finished.primed(path) == ended
        run = plan.Run("moe", "s", 1, 3, tmp_path, [], [], ["fairseq-moe", "priming"])
        assert finished.priming_of(run)["mean"] == (found["mean"] if ended else {})
        no_longer = run._replace(prime=[])
        assert finished.priming_of(no_longer)["mean"] == {}, "the file no longer asks for it"
