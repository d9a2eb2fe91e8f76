"""A study: its file, its runs in small, its factors."""

import json
import math
import random

import pytest

from fairseq_moe_ext import cli
from fairseq_moe_ext.prepare.command import Options, parse_corpora, prepare
from fairseq_moe_ext.study import plan, result

SMALL = """
data: {folder}/data
out: {folder}/out
context: 32
updates: 3
seeds: [1]
train: {{batch-size: 4, optimizer: adam, lr: 0.01, cpu: true, num-workers: 0,
  decoder-layers: 2, decoder-attention-heads: 2, decoder-ffn-embed-dim: 32}}
evaluate: {{bootstrap: 20}}
dense: {{arch: dense_lm_tiny, sizes: {{s: {{decoder-embed-dim: 8}}, m: {{decoder-embed-dim: 16}}}}}}
moe: {{arch: moe_lm_tiny, sizes: {{s: {{decoder-embed-dim: 8}}, m: {{decoder-embed-dim: 16}}}}}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    rng = random.Random(0)
    for name in ("near", "far"):
        lines = [" ".join(f"{name}{rng.randint(0, 20)}" for _ in range(8)) for _ in range(60)]
        (folder / f"{name}.txt").write_text("\n".join(f"{line}\n" for line in lines))
    text = [f"{name}={folder}/{name}.txt" for name in ("near", "far")]
    corpora = parse_corpora(text[:1], text[1:])
    options = Options(corpora=corpora, train_bpe=288, valid_fraction=0.2, test_fraction=0.3)
    prepare(folder / "data", options)
    return folder


def write(folder, change=lambda text: text):
    path = folder / "study.yaml"
    path.write_text(change(SMALL.format(folder=folder)))
    return path


@pytest.mark.parametrize(
    "old, new, words",
    [
        ("updates:", "updats:", "unknown key 'updats'; the keys are title, data"),
        ("evaluate: {bootstrap", "evaluate: {boot", "evaluate: unknown key 'boot'"),
        ("context: 32", "", "the key 'context' is missing"),
        ("seeds: [1]", "seeds: [1, 1]", "seeds [1, 1]: give different"),
        ("/data", "/nowhere", "nowhere: no such data folder"),
        ("lr: 0.01", "--lr: 0.01", "'--lr': write flags without dashes"),
        ("lr: 0.01", "seed: 3", "train: seed: the study sets this itself"),
        ("context: 32", "context: many", "context: 'many' is not a int"),
        ("batch-size: 4,", "", "batch-size None: say how many"),
        ("context: 32", "context: [", "not YAML"),
        ("evaluate:", "priming: {folder: none}\nevaluate:", "priming: folder none: name a folder"),
        ("evaluate:", "priming: {shots: 3}\nevaluate:", "priming: shots: 3 is not a list"),
    ],
)
def test_mistakes_in_the_file(folder, old, new, words, capsys):
    path = write(folder, lambda text: text.replace(old, new, 1))
    assert cli.main(["study", str(path)]) == 1
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
    assert not (folder / "out").exists()


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
    rows = result.table({"factors": found})
    assert rows[1][:2] == ["in domain", f"{expected:.2f}"] and "n = 3" in rows[1][2]


def test_accuracies_have_factors_too():
    runs = runs_of({"dense": [(1, 30), (4, 20), (16, 10)], "moe": [(1, 20), (4, 5)]})
    for run, accuracy in zip(runs, (0.4, 0.5, 0.6, 0.5, 0.7)):
        run["priming"]["mean"] = {"0": accuracy}
    found = result.factors(runs)
    assert list(found) == ["in_domain", "0-shot", "a"]
    # 50 % costs dense 4, MoE 1; 60 % dense 16, MoE half-way in ln from 1 to 4
    assert [p["factor"] for p in found["0-shot"]["curve"]] == pytest.approx([4, 16 / 2])


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
    found = result.factors(runs_of({"dense": [(1, 30), (4, 20)], "moe": [(1, 9), (4, 8)]}))
    assert found["a"]["remark"].startswith("no overlap") and not found["a"]["by_seed"]
    assert result.table({"factors": found})[1][1] == "-"
    (line,) = result.remarks({"factors": found})
    assert line.startswith("in domain, a: no overlap: dense models reach 20.02 to 30.03, MoE ")
    found = result.factors(runs_of({"dense": [(1, 30), (4, 20)], "moe": [(1, 1e9), (4, math.inf)]}))
    assert "performance inf: give" in found["a"]["remark"] and not found["a"]["curve"]


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
    write(folder, lambda text: text.replace("updates: 3", "updates: 4"))
    assert cli.main(["study", str(path)]) == 1
    assert "holds a run with other settings" in capsys.readouterr().err
    assert cli.main(["report", str(folder / "out")]) == 0
    assert "of 4 runs" not in (folder / "out" / "report.html").read_text()
