"""A ladder: its file, its stages, what is saved, its pages, and all of it in small."""

import json
import math
import os
import re
import time

import numpy as np
import pytest
import yaml
from small_ladder import STUDY, command, write

from fairseq_moe_ext import cli, outputs
from fairseq_moe_ext.errors import UserError
from fairseq_moe_ext.forecast import laws
from fairseq_moe_ext.study import finished as study_finished
from fairseq_moe_ext.study import plan
from fairseq_moe_ext.study.ladder import (
    finished,
    forecast,
    hours,
    needed,
    page,
    probe,
    progress,
    rates,
    result,
    running,
    saving,
    stages,
    tables,
)
from fairseq_moe_ext.study.ladder.saving import Saving
from fairseq_moe_ext.study.ladder.units import Units
from fairseq_moe_ext.study.result import GROUPS
from fairseq_moe_ext.text_table import markdown

REPOSITORY = STUDY.parents[1]
REAL = stages.read(STUDY / "ladder.yaml")


@pytest.mark.parametrize(
    "old, new, words",
    [
        ("bases: [a]", "bases: [c]", "moe: arms: E4: bases: c: not one of a, b"),
        ("a-E4: [1e-2]", "c: [1e-2]", "learning-rate: values: c: there is no such arm; use a,"),
        ("a-E4: [1e-2]", "b: [1e-2]", "learning-rate: values: name a moe arm too"),
        ("context:", "corpora: [1]\ncontext:", "corpora: 1: use names"),
        ("a-E4: [1e-2]", "a-E4: 1e-2", "values: a-E4: '1e-2': list one learning rate or more"),
        ("[1e-2, 1e-3]", "[fast]", "'fast' is no learning rate"),
        ("[1e-2, 1e-3]", "[.nan]", "nan is no learning rate; use a number above 0"),
        ("[1e-2, 1e-3]", "[-1e-3]", "'-1e-3' is no learning rate"),
        ("[1e-2, 1e-3]", "[true]", "True is no learning rate"),
        ("[1e-2, 1e-3]", "[1e-2, 0.01]", "a: ['1e-2', 0.01]: a learning rate appears twice"),
        ("screen: first", "screen: third", "screen third: not a stage before it: first"),
        ("tokens: 640", "tokens: 640, arms: [c*]", "stages: second: arms c*: there is no such arm"),
        ("experts: 4}}", "experts: 0}}", "moe: arms: E4: experts 0 is out of range"),
        ("first: {{tokens", "probe: {{tokens", "stages: probe: is the name of a folder"),
        ("first: {{tokens", "a/b: {{tokens", "stages: a/b: use letters, digits"),
        ("warmup", "warmup", ""),
        ("context: 32", "context: 32\nwarmup: 1", "warmup 1.0: use a share"),
        ("decoder-ffn-embed-dim: 64", "dropout: 0", "dense: b: decoder-ffn-embed-dim None: write"),
        ("stages:", "stage:", "unknown key 'stage'"),
        ("at-least: 0", "at-least: .nan", "second: at-least: nan is not a number; write one"),
        ("at-least: 0", "at-least: .inf", "second: at-least: inf is not a number; write one"),
        ("at-least: 0", "at-least: -1", "stages: second: at-least -1.0 is out of range"),
        ("at-least: 0", "at-least: true", "second: at-least: True is not a number; write one"),
        ("at-least: 0", "at-least: '2'", "second: at-least: '2' is not a number; write one"),
        ("at-least: 0", f"at-least: 1{400 * '0'}", "00 is not a number; write one"),
        ("screen: first, ", "", "stages: second: at-least has no effect without screen"),
        ("tokens: 640", "tokens: 640, bf16: 1", "second: bf16: 1 is not true or false; write one"),
        ("tokens: 640", "tokens: 384, bf16: true", "second: bf16 True: stage first, on as many"),
        ("tokens: 640", "tokens: 640, seeds: [true]", "stages: second: seeds [True] is out of"),
        ("tokens: 640", "tokens: 640, seeds: []", "stages: second: seeds []: give different"),
        ("tokens: 640", "tokens: 640, arms: []", "stages: second: arms is empty; list names"),
        ("tokens: 640", "tokens: 63", "second: tokens 63: less than an update, which has 128"),
        ("second:", "result.json:", "stages: result.json: is the name of a folder"),
        ("second:", "on:", "stages: True: YAML reads this name as a value; write it in quotes"),
        ("second:", "first:", "not YAML (the key first appears twice"),
        (
            "vocabulary: 280",
            "vocabulary: true",
            "vocabulary: True is not a whole number; write one",
        ),
        ("vocabulary: 280", "vocabulary: 300", "dict.txt has 280 entries, with fairseq's own; w"),
        ("vocabulary: 280", "vocabulary: 0", "vocabulary 0 is out of range"),
        ("context: 32", "context: 32\nwarmup: .nan", "warmup: nan is not a number; write one"),
        ("batch-size: 4", "batch-size: 4, update-freq: no", "train: update-freq False is out of"),
        ("batch-size: 4", "batch-size: 4, lr: 1", "train: lr: remove it; the ladder's key"),
        ("optimizer: adam", "optimiser: adam", "unrecognized arguments: --optimiser adam"),
        ("optimizer: adam", "optimizer: null", "train: optimizer None: use a number, text"),
        ("cpu: true", "cpu: .nan", "fairseq-train: unrecognized arguments: nan"),
        ("decoder-embed-dim: 16", "decoder-embed-dim: 0", "arms: b: decoder-embed-dim 0 is out"),
        ("moe-freq: 1", "moe-freq: '1'", "a-E4: moe-freq '1': write it without quotes"),
        ("cpu: true", "cpu: true, max-target-positions: '32'", "positions '32': write it without"),
        ("moe-freq: 1", "moe-freq: 1, updates: 9", "moe: flags: updates: remove it; the"),
        *(
            (
                "experts: 4}}",
                f"experts: 4, flags: {{{{{flag}: 2}}}}}}}}",
                f"flags: {flag}: remove it; the",
            )
            for flag in ("moe-expert-count", "moe-expert-ffn-dim", "moe-top-k")
        ),
        (
            "moe-freq: 1",
            "moe-freq: 1, moe-top-k: 2",
            "moe: flags: moe-top-k: remove it; the ladder",
        ),
        ("log-interval: 1", "log-interval: 5", "a: log-interval 5: is more than the 3 updates"),
        ("moe-freq: 1", "moe-freq: 2", "arm a-E4: --moe-freq 2 picks no layer"),
        ("granularity: 2", "granularity: 3", "granularity 3: does not divide the decoder-ffn-e"),
        ("bases: [a]", "bases: [a, a]", "moe: two arms are called a-E4; rename or remove one"),
        ("bases: [a]", "bases: [[1]]", "moe: arms: E4: bases: [1]: not one of a, b"),
        ("  a: {{dec", "  1: {{dec", "moe: arms: E4: bases: a: not one of 1, b"),
        ("bootstrap: 20", "stride: 64", "evaluate: stride 64: is more than the context, 32"),
        ("batch-size: 4", "batch-size: 12", "train: batch-size 12: fairseq would train on 8"),
        ("batch-size: 4", "batch-size: 4, max-tokens: 64", "train: max-tokens: remove it"),
        ("moe-freq: 1", "moe-freq: 1, update-freq: 2", "arms: a-E4: update-freq: move it to train"),
        ("decoder-layers: 2", "decoder-layers: 2, batch-size: 8", "arms: b: batch-size: move it"),
        ("batch-size: 4", "batch-size: 0", "train: batch-size 0 is out of range"),
    ],
)
def test_mistakes_in_the_file(folder, old, new, words, capsys):
    path = write(
        folder,
        lambda text: text.replace(
            *(word.replace("{{", "{").replace("}}", "}") for word in (old, new))
        ),
    )
    status = command().main([str(path), "--dry-run"])
    error = capsys.readouterr().err
    assert status == (1 if words else 0) and words in error
    assert error.count("\n") == (1 if words else 0)


def test_the_studies_of_the_ladder():
    """The flags of its arms, its updates, by hand."""
    assert [(s.name, s.updates) for s in REAL.stages] == [
        ("lr", 488),
        ("4M", 488),
        ("16M", 1953),
        ("16M-seeds", 1953),
        ("64M", 7813),
    ]
    study = yaml.safe_load(
        stages.study_file(
            REAL,
            REAL.stage("16M-seeds"),
            {arm.name: "4e-3" if arm.family == "dense" else "2e-3" for arm in REAL.arms},
        )
    )
    assert study["seeds"] == [2, 3] and study["train"]["warmup-updates"] == 195
    assert "d2" in study["arms"], "d1-256x4 lies between d2 and d3"
    assert "d1-hash64" not in study["arms"]
    assert study["arms"]["d1-256x4"] == {
        "arch": "moe_lm_tiny",
        "flags": {
            "decoder-layers": 4,
            "decoder-embed-dim": 160,
            "decoder-ffn-embed-dim": 640,
            "decoder-attention-heads": 5,
            "moe-freq": 1,
            "moe-dropless": True,
            "moe-normalize-expert-grad": "sqrt_num_experts",
            "moe-expert-count": 256,
            "moe-expert-ffn-dim": 160,
            "moe-top-k": 4,
            "lr": "2e-3",
        },
    }
    assert study["arms"]["d0-hash64"]["flags"]["moe-router"] == "hash"
    assert study["arms"]["d0"]["flags"]["lr"] == "4e-3"
    search = yaml.safe_load(stages.study_file(REAL, REAL.stages[0], None))
    assert search["arms"]["d0-E64-lr8"]["flags"]["lr"] == "8e-3" and len(search["arms"]) == 20


def test_a_stage_in_bfloat16(folder, tmp_path):
    """All its trainings have --bf16; tables say so, and have no seconds of the float32 probe."""
    rates_of = {arm.name: "4e-3" for arm in REAL.arms}
    for name, flag in (("16M", None), ("64M", True)):
        study = yaml.safe_load(stages.study_file(REAL, REAL.stage(name), rates_of))
        assert study["train"].get("bf16") is flag
    made = made_result(tmp_path)
    assert "16M tokens |" in markdown(tables.over_tokens(made, GROUPS[0]))
    described = result._described(REAL)["stages"]
    assert [name for name, stage in described.items() if stage["bf16"]] == ["64M"]
    for run in made["runs"]:
        run["precision"] = "bfloat16"
        assert run["stage"].startswith("16M")
    for group in GROUPS:
        assert "16M tokens (bfloat16) |" in markdown(tables.over_tokens(made, group))
    said = tables.page(made)
    assert "## By set, 16M tokens (bfloat16)" in said and "bfloat16 against" not in said
    assert "On 16M tokens (bfloat16) d0-256x4 saves most" in page.summary(made)
    assert page.summary(made).endswith(" d1-E8 may save more: better than all dense models.")
    assert "Trainings computed in bfloat16." in tables.note(made)
    made["runs"].append({**made["runs"][0], "stage": "4M", "precision": "float32"})
    name = made["runs"][0]["size"]
    both = f"computed in bfloat16 all on 16M tokens; in float32 {name}."
    assert both in tables.note(made)
    assert "| d1-E8, 16M (bfloat16) | 1 | > 1.00 |" in markdown(tables.costs(made))
    made["runs"][0]["precision"] = "float32"  # where bfloat16 was not faster
    assert "16M tokens |" in markdown(tables.over_tokens(made, GROUPS[0]))

    ladder = REAL._replace(out=tmp_path)
    costs = [forecast.training_flops(arm, ladder) for arm in ladder.arms[:2]]
    probed = {"d0": 1.0, "d1": 4.0, "d0-E8": 1.5}
    for stage, seconds in (("16M", 2 / 1.5), ("64M", None)):
        runs = [made_run(stage, n, 1, c, p) for n, c, p in zip(("d0", "d1"), costs, (50.0, 40.0))]
        runs.append(made_run(stage, "d0-E8", 1, costs[0], math.sqrt(50 * 40)))
        assert result.savings(ladder, runs, probed)[0][0]["in_seconds"] == (
            seconds and pytest.approx(seconds)
        )
    runs[1]["precision"] = "bfloat16"
    assert (
        "some trainings with --bf16 computed in float32" in result.savings(ladder, runs, {})[1][0]
    )
    twins = [arm.name for arm in REAL.stage("16M").arms if stages.float32_twin(arm, REAL.arms)]
    assert twins == ["d0-256x4-bf16"]
    assert twins[0] not in [arm.name for arm in REAL.stage("64M").arms], "that is d0-256x4 there"


def test_every_stage_is_a_study_that_can_be_run(folder):
    ladder = stages.read(write(folder))
    for stage in ladder.stages:
        given = None if stage.name == "lr" else dict.fromkeys([a.name for a in ladder.arms], "1e-2")
        path = folder / f"{stage.name}.yaml"
        path.write_text(stages.study_file(ladder, stage, given))
        planned = plan.read(path)
        assert len(planned.runs) == len(stage.arms) * len(stage.seeds)
        assert [r.folder for r in planned.runs] == [ladder.folder(stage, a, 1) for a in stage.arms]
        assert planned.tokens_per_update == ladder.tokens_per_update == 128


def test_a_part_of_a_ladder():
    part = running.chosen(REAL, running.Chosen(["16M", "16M-seeds"], ["d0*"], [1, 2]))
    assert [(s.name, s.seeds, len(s.arms)) for s in part] == [
        ("16M", [1], 10),
        ("16M-seeds", [2], 10),
    ]
    for asked, words in (
        (running.Chosen(stages=["8M"]), "--stages 8M: not a stage"),
        (running.Chosen(arms=["d9"]), "--arms d9: there is no such arm"),
        (running.Chosen(stages=["4M"], seeds=[2]), "no run is in all of them"),
        (running.Chosen(seeds=[9]), "--seeds 9: not a seed; they are 1, 2, 3"),
    ):
        with pytest.raises(UserError, match=words):
            running.chosen(REAL, asked)


def validation(folder, *perplexities):
    """The log of a training that ended."""
    folder.mkdir(parents=True)
    (folder / "train.log").write_text(
        "".join(
            f't | INFO | valid | {{"epoch": 1, "valid_in_domain_ppl": "{p}"}}\n'
            for p in perplexities
        )
    )
    (folder / "trained").touch()


def test_the_best_learning_rate_on_validation_text_is_taken(folder, tmp_path):
    ladder = stages.read(write(folder))._replace(out=tmp_path)
    search = ladder.stages[0]
    one, two = search.arms
    validation(ladder.folder(search, one, 1), 40, 31)
    with pytest.raises(UserError, match="arm-a-lr1-1: not trained yet"):
        rates.choose(ladder)
    validation(ladder.folder(search, two, 1), "nan", 30.5, 32)
    found = rates.choose(ladder)
    assert found["a"].value == "1e-3" and found["a-E4"].value == "1e-2"
    assert found["a"].tried == [("1e-2", 31.0), ("1e-3", 30.5)]
    assert found["a"].at_the_edge and not found["a-E4"].at_the_edge
    values = {"a": "1e-3", "b": "1e-3", "a-E4": "1e-2", "a-4x2": "1e-2"}
    assert rates.of_arms(ladder, found) == values


def test_flags_are_checked_against_the_shortest_stage(folder):
    path = write(folder, lambda text: text.replace("log-interval: 1", "log-interval: 4"))
    longer = path.read_text().replace(
        "learning-rate:\n  tokens: 384", "learning-rate:\n  tokens: 640"
    )
    path.write_text(longer)
    with pytest.raises(UserError, match="log-interval 4: is more than the 3 updates"):
        stages.read(path)


def test_one_learning_rate_alone_is_not_tried(folder, tmp_path, capsys):
    path = write(folder, lambda text: text.replace("[1e-2, 1e-3]", "[1e-3]"))
    ladder = stages.read(path)._replace(out=tmp_path)
    assert [stage.name for stage in ladder.stages] == ["first", "second"]
    found = rates.of_arms(ladder, rates.choose(ladder))
    assert found == {"a": "1e-3", "b": "1e-3", "a-E4": "1e-2", "a-4x2": "1e-2"}
    assert [line.split(":")[0] for line in hours.said(ladder, ladder.stages, 1.0)[:-1]] == [
        *("first", "second")
    ]
    assert command().main([str(path), "--dry-run", "--stages", "lr"]) == 1
    assert "--stages lr: not a stage; they are first, second" in capsys.readouterr().err
    path = write(folder, lambda text: text.replace("[1e-2]", "[-1]"))
    assert command().main([str(path), "--dry-run"]) == 1, "it is checked all the same"


def test_a_try_that_diverged_is_not_chosen(folder, tmp_path):
    """However good it was before."""
    ladder = stages.read(write(folder))._replace(out=tmp_path)
    search = ladder.stages[0]
    one, two = (ladder.folder(search, arm, 1) for arm in search.arms)
    validation(one, 20)
    (one / "trained").unlink()
    (one / "diverged.json").write_text('{"error": "", "vocabulary": 300}')
    validation(two, 30)
    found = rates.choose(ladder)["a"]
    assert found.value == "1e-3" and found.tried == [("1e-2", math.inf), ("1e-3", 30.0)]
    assert progress.state(one, 3).word == "diverged"
    assert hours.left(ladder, search, {}, 1.0)[0] == 1


def test_no_rate_is_chosen_where_all_diverged(folder, tmp_path):
    ladder = stages.read(write(folder))._replace(out=tmp_path)
    search = ladder.stages[0]
    for arm in search.arms[:2]:
        validation(ladder.folder(search, arm, 1), "nan", "inf")
    found = rates.choose(ladder)
    with pytest.raises(UserError, match="values: a: no finite perplexity .* with any of 1e-2, 1e-"):
        rates.of_arms(ladder, found)
    made = result.collect(ladder)
    assert made["rates"]["a-E4"]["value"] == "1e-2", "the others have theirs"
    assert [row[1:] for row in tables.learning_rates(made)[1:3]] == [
        ["1e-2", "none", ""],
        ["1e-3", "none", ""],
    ]
    (ladder.folder(search, search.arms[1], 1) / "train.log").write_text(
        't | INFO | valid | {"epoch": 1, "valid_in_domain_ppl": "30"}\n'
    )
    assert rates.choose(ladder)["a"].value == "1e-3"
    made = result.collect(ladder)["rates"]["a"]["tried"]
    assert made == [("1e-2", None), ("1e-3", 30.0)]


def test_whose_learning_rate_an_arm_gets():
    """Its own, that of its base and family, or else of its family."""
    names = ("d2", "d1", "d0-hash64", "d0-E32", "d1-256x4")
    searched = {a.name: REAL.searched(a) for a in REAL.arms if a.name in names}
    assert searched == {
        **{"d2": "d2", "d1": "d1", "d0-hash64": "d0-hash64"},
        **{"d0-E32": "d0-E64", "d1-256x4": "d0-E64"},
    }
    moe = [arm for arm in REAL.arms if arm.name in ("d0-E8", "d1-E64")]
    other = REAL._replace(tried={**dict.fromkeys(["d0", "d1"], []), **{a.name: [] for a in moe}})
    searched = {a.name: other.searched(a) for a in REAL.arms if a.name in names}
    assert searched == {
        **{"d2": "d0", "d1": "d1", "d0-hash64": "d0-E8"},
        **{"d0-E32": "d0-E8", "d1-256x4": "d1-E64"},
    }


def test_saving_by_hand():
    """Dense: ln p falls by 1 from cost 1 to cost 16. Half way, the dense model costs 4."""
    dense = [(1.0, 100.0), (16.0, 100.0 / math.e)]
    assert saving.saving(dense, 1.0, 100 * math.exp(-0.5)).factor == pytest.approx(4)
    assert saving.saving(dense, 2.0, 100 * math.exp(-0.25)).factor == pytest.approx(1)
    assert saving.saving(dense, 2.0, 30) == Saving(8, 1)
    assert saving.saving([*dense, (64.0, 60.0)], 2.0, 30) == Saving(8, 1), "not 32: that is worse"
    assert saving.saving(dense, 2.0, 101) == Saving(0.5, -1)
    uneven = [(1.0, 90.0), (2.0, 95.0), (10.0, 80.0)]
    assert saving.saving(uneven, 1.0, 92.0) == Saving(1, -1), "the dense one of its cost is better"
    assert saving.saving(uneven, 1.0, math.sqrt(90 * 80)).factor == pytest.approx(math.sqrt(10))
    assert saving.ends_over_seeds([Saving(2.0)]) is None
    assert saving.ends_over_seeds([Saving(2.0), Saving(8, 1)]) is None
    low, high = saving.ends_over_seeds([Saving(2.0), Saving(3.0), Saving(4.0)])
    logs = np.log([2, 3, 4])
    half = 4.302653 * logs.std(ddof=1) / math.sqrt(3)
    assert low == pytest.approx(math.exp(logs.mean() - half), rel=1e-6)
    assert high == pytest.approx(math.exp(logs.mean() + half), rel=1e-6)
    assert saving.ends_of([Saving(9, -1)] * 2 + [Saving(2.0)] * 36 + [Saving(9, 1)] * 2) == (
        None,
        None,
    )
    assert saving.ends_by_intervals(dense, 1.0, 100 * math.exp(-0.5), 0.25) == pytest.approx((2, 8))
    assert saving.joint_width([(1, 1), (1, math.exp(0.6)), (1, math.exp(0.8))]) == pytest.approx(
        0.5
    )
    assert saving.joint_width([None, (1, 2)]) is None


def test_documents_are_drawn_alike_for_all_models():
    """A model that is a nat better on every document is so in every draw."""
    nats = np.array([10.0, 90.0, 30.0, 400.0])
    tokens = [10, 20, 10, 100]
    one = {"nats": nats.tolist(), "tokens": tokens}
    other = {"nats": (nats - tokens).tolist(), "tokens": tokens}
    drawn = saving.drawn_perplexities([one, other], 1, 50)
    assert np.allclose(drawn[:, 0] / drawn[:, 1], math.e) and len(set(drawn[:, 0])) > 10
    ends = saving.ends_over_units([1.0, 16.0, 2.0], np.stack([*drawn.T, drawn[:, 0] ** 1]).T)
    assert ends == pytest.approx((0.5, 0.5))


def made_run(stage, arm, seed, flops, perplexity):
    one = {"perplexity": perplexity, "interval": [perplexity / 1.01, perplexity * 1.01]}
    return {
        **{
            "stage": stage,
            "family": "moe" if "-" in arm else "dense",
            "size": arm,
            "seed": seed,
            "parameters": 10**6,
        },
        **{"active": 10**5, "experts": 1, "tokens": 16e6, "flops": flops, "seconds": 60.0},
        "sets": {"kernel": {**one, "in_domain": True, "tokens": 9, "dropped": None}},
        "mean": {"in_domain": one},
        "priming": {"mean": {}, "tasks": [], "bias": []},
        "router": {},
    }


def made_result(tmp_path):
    """d0-256x4 is half way between d0 and d1 with seed 1, and at d1 with seed 2; d1-E8 is better
    than d1, the largest that is done."""
    ladder = REAL._replace(out=tmp_path)
    low, high = (16e6 * forecast.training_flops(arm, ladder) for arm in ladder.arms[:2])
    runs = [
        made_run("16M", "d0", 1, low, 50.0),
        made_run("16M", "d1", 1, high, 40.0),
        made_run("16M-seeds", "d0", 2, low, 50.0),
        made_run("16M-seeds", "d1", 2, high, 40.0),
        made_run("16M", "d0-256x4", 1, low, math.sqrt(50 * 40)),
        made_run("16M-seeds", "d0-256x4", 2, low, 40.0),
        made_run("16M", "d1-E8", 1, high, 39.0),
        made_run("16M", "d0-E64", 1, low, math.sqrt(50 * 40)),
        made_run("16M", "d0-256x4-bf16", 1, low, math.sqrt(50 * 40) * 1.01),
        made_run("16M-seeds", "d0-256x4-bf16", 2, low, 40.0 * 1.02),
    ]
    probed = {"d0": 1e-4, "d1": 4e-4, "d0-256x4": 2e-4, "d1-E8": 8e-4}
    return {
        "ladder": result._described(ladder),
        "rates": {
            "d0": {"value": "4e-3", "tried": [["4e-3", 30.0]], "at_the_edge": False, "also": ["d1"]}
        },
        "seconds_per_token": probed,
        "forecasts": forecast.forecasts(ladder),
        "text": {
            "split": {"valid_fraction": 0.02, "test_fraction": 0.01, "split_seed": 1},
            "corpora": {
                "news": {"held_out": True, "valid": {"tokens": 70}, "test": {"tokens": 80}},
                "mail": {"held_out": False, "train": {"tokens": 5000}, "test": {"tokens": 60}},
                "code": {"held_out": False, "train": {"tokens": 3000}},
            },
        },
        "planned": 50,
        "runs": runs,
        "factors": result.savings(ladder, runs, probed)[0],
    }


@pytest.mark.parametrize(
    "train, flags, matrices, sparse, logits",
    [
        ("", "moe-freq: 1", 2, 2, 4),
        ("activation-fn: swiglu, ", "moe-freq: 1, moe-null-experts: 3", 3, 2, 5),
        ("", "moe-freq: 1, moe-first-dense: 1", 2, 1, 4),
        ("", "moe-layers: '1'", 2, 1, 4),
        ("", "moe-dropless: true", 2, 1, 4),  # every second layer, as of the architecture
        ("", "moe-freq: 1, moe-router: hash, moe-balance: none", 2, 2, 0),
        ("", "moe-freq: 1, moe-router: random, moe-balance: none", 2, 2, 0),
    ],
)
def test_costs_follow_all_flags(folder, train, flags, matrices, sparse, logits):
    path = write(folder, lambda text: text.replace("bases: [a]", "bases: [b]"))
    path.write_text(
        path.read_text()
        .replace("a-E4", "b-E4")
        .replace("batch-size: 4, ", f"batch-size: 4, {train}")
        .replace("moe-freq: 1, moe-dropless: true", flags)
    )
    ladder = stages.read(path)
    arm = next(arm for arm in ladder.arms if arm.name == "b-E4")
    null_share = 3 / 7 if "null" in flags else 0  # of the choices, if all are used alike
    width = (2 - sparse) * 64 + sparse * 64 * (1 - null_share)
    by_hand = 2 * (8 * 16**2 + 4 * 16 * 32) + 2 * matrices * 16 * width + 2 * 16 * 280
    assert forecast.training_flops(arm, ladder) == pytest.approx(3 * by_hand)
    assert forecast.router_flops(arm, ladder) == 6 * sparse * 16 * logits
    assert forecast.model_of(arm, ladder, 1e6).layers == sparse / 2
    named = result._described(ladder)["arms"]["b-E4"]["router"]
    assert named == ("topk" if logits else flags.split()[3].rstrip(","))
    assert forecast.router_flops(ladder.arms[0], ladder) == 0, "dense"


def test_factors_of_runs(tmp_path):
    found = tables.by_key(made_result(tmp_path))
    ratio = 13.27872 / 6.19776
    many = found["d0-256x4", 16_000_000, "in_domain"]
    assert many["factor"] == pytest.approx(math.sqrt(math.sqrt(ratio) * ratio))
    assert many["seeds"] == 2 and many["interval_over"] == "seeds"
    assert many["with_router"] / many["factor"] == pytest.approx(6.19776 / (6.19776 + 4 * 0.147456))
    assert many["in_seconds"] == pytest.approx(math.sqrt((2 / 2) * (4 / 2)))
    one = found["d0-E64", 16_000_000, "kernel"]
    assert one["factor"] == pytest.approx(math.sqrt(ratio)) and one["in_seconds"] is None
    # each is known to 1 % either way: together to 1.4 %, of 22.3 % between the dense models
    assert one["interval_over"] == "perplexities, as if independent"
    wide = ratio ** (math.log(1.01) * math.sqrt(2) / math.log(50 / 40))
    assert one["interval"] == pytest.approx((one["factor"] / wide, one["factor"] * wide))
    better = found["d1-E8", 16_000_000, "in_domain"]
    assert better["beyond"] == 1 and better["factor"] == pytest.approx(1.0)
    assert tables.factor(better) == "> 1.00" and better["in_seconds"] == pytest.approx(0.5)


def test_seconds_need_only_the_dense_models_beside_the_saving(tmp_path):
    ladder = REAL._replace(out=tmp_path)
    costs = [16e6 * forecast.training_flops(arm, ladder) for arm in ladder.arms[:3]]
    dense = zip(ladder.arms[:3], costs, (50.0, 40.0, 30.0))
    runs = [made_run("16M", arm.name, 1, cost, perplexity) for arm, cost, perplexity in dense]
    runs.append(made_run("16M", "d0-E8", 1, costs[0], math.sqrt(50 * 40)))
    probed = {"d0": 1.0, "d1": 4.0, "d2": 9.0, "d0-E8": 1.5}

    def in_seconds(*names):
        found = result.savings(ladder, runs, {name: probed[name] for name in names})[0]
        return found[0]["in_seconds"]

    assert in_seconds(*probed) == pytest.approx(2 / 1.5)
    assert in_seconds("d0", "d1", "d0-E8") == pytest.approx(2 / 1.5)
    assert in_seconds("d0", "d2", "d0-E8") is None
    assert in_seconds("d0", "d0-E8") is None and in_seconds("d0", "d1", "d2") is None


def test_bounds_over_seeds(tmp_path):
    """A mean of bounds is a bound without an interval; above one and below another is nothing."""
    ladder = REAL._replace(out=tmp_path)
    low, high = (16e6 * forecast.training_flops(arm, ladder) for arm in ladder.arms[:2])
    dense = [made_run("16M", "d0", 1, low, 50.0), made_run("16M", "d1", 1, high, 40.0)]

    def found(*perplexities):
        runs = [
            made_run("16M-seeds", "d0-E64", seed, low, perplexity)
            for seed, perplexity in enumerate(perplexities, 2)
        ]
        return [f for f in result.savings(ladder, dense + runs, {})[0] if f["group"] == "in_domain"]

    (bound,) = found(39.0, math.sqrt(50 * 40))
    assert bound["beyond"] == 1 and bound["interval"] is None and not bound["interval_over"]
    assert bound["factor"] == pytest.approx((high / low) ** 0.75)
    assert tables.factor(bound) == f"> {bound['factor']:.2f}"
    assert found(39.0, 51.0) == []


def test_every_saving_that_is_missing_has_a_reason(tmp_path):
    ladder = REAL._replace(out=tmp_path)
    low, high = (16e6 * forecast.training_flops(arm, ladder) for arm in ladder.arms[:2])
    dense = [made_run("16M", "d0", 1, low, 50.0), made_run("16M", "d1", 1, high, 40.0)]

    def said(*runs):
        return result.savings(ladder, [*dense, *runs], {})[1]

    sparse = made_run("16M", "d0-E64", 1, low, 45.0)
    seeds = [made_run("16M-seeds", "d0-E64", seed, low, p) for seed, p in ((2, 39.0), (3, 51.0))]
    assert said(sparse) == []
    (line,) = said(made_run("16M", "d0-E64", 1, low, math.inf))
    assert line == "d0-E64 on 16,000,000 tokens: no saving (in domain, kernel): it diverged."
    (line,) = said(*seeds)
    assert line.endswith(": one seed is better than every dense model, another worse.")
    (line,) = said({**sparse, "protocol": {"context": 256, "stride": 64}})
    assert line.endswith(": not measured on the same text or questions in every run.")
    dense[0]["text"], sparse["text"] = "8f", ""
    assert said(sparse) == [], "an older run does not say"
    sparse["text"] = "9a"
    assert said(sparse)[0].endswith(": not trained on the same text in every run.")
    dense[1]["mean"]["in_domain"]["perplexity"] = math.inf
    assert "(in domain): all dense models but one diverged." in said(sparse)[0]
    del dense[1]
    (line,) = said(sparse)
    assert line == "On 16,000,000 tokens no saving: fewer than two dense models are done."


def test_means_are_of_runs_of_the_same_text(tmp_path):
    made = made_result(tmp_path)
    assert tables.perplexities(made, "in_domain")[1][3:] == ["50.00"]
    made["runs"][0]["text"], made["runs"][2]["text"] = "8f", "9a"  # d0, seeds 1 and 2
    assert tables.perplexities(made, "in_domain")[1][3:] == ["different text"]
    drawn = page._perplexities(made, 16_000_000, ["d0", "d1"])
    made["remarks"] = ["d0-E64 on 16,000,000 tokens: no saving."]
    assert made["remarks"][0] in page.html(made, page.charts(made))
    assert made["remarks"][0] in tables.page(made)
    assert drawn != page._perplexities(made_result(tmp_path), 16_000_000, ["d0", "d1"])


def test_runs_of_another_file_are_left_out(folder, tmp_path, monkeypatch):
    """By command.json; a folder without it, as older ones, counts."""
    ladder = stages.read(write(folder))._replace(out=tmp_path)
    stage = ladder.stage("first")
    given = {arm.name: ladder.tried[ladder.searched(arm)][0].flags["lr"] for arm in ladder.arms}
    for arm, run in zip(stage.arms, stages.runs_of(ladder, stage, given)):
        run.folder.mkdir(parents=True)
        (run.folder / "evaluation.json").write_text("{}")
        if arm.name != "a-E4":
            (run.folder / "command.json").write_text(json.dumps(["/elsewhere", *run.train[1:]]))
    monkeypatch.setattr(
        study_finished, "of_run", lambda run, *_: {"size": run.size, "of": run.family}
    )

    def collected(ladder):
        runs, left_out = finished.collect(ladder)
        return [(run["size"], run["of"], run["stage"]) for run in runs], left_out

    every = [("a", "dense"), ("b", "dense"), ("a-E4", "moe"), ("a-4x2", "moe")]
    assert collected(ladder) == ([(*one, "first") for one in every], []), "rates not chosen yet"
    validation(ladder.folder(ladder.stages[0], ladder.tried["a"][0], 1), 30)
    validation(ladder.folder(ladder.stages[0], ladder.tried["a"][1], 1), 20)  # another than given
    runs, left_out = collected(ladder)
    assert [run[0] for run in runs] == ["a-E4", "a-4x2"]
    words = "with --lr 1e-2, and the file now trains with --lr 1e-3"
    assert left_out[0] == f"{tmp_path}/first/arm-a-1: left out: was trained {words}"
    longer = ladder._replace(stages=[s._replace(updates=9) for s in ladder.stages])
    runs, left_out = collected(longer)
    assert [run[0] for run in runs] == ["a-E4"] and "with --max-update 3, and" in left_out[0]


def test_a_rate_is_chosen_from_tries_with_the_settings_of_the_file(folder, tmp_path):
    ladder = stages.read(write(folder))._replace(out=tmp_path)
    for run in stages.runs_of(ladder, ladder.stages[0], None):
        validation(run.folder, 30)
        (run.folder / "command.json").write_text(json.dumps(run.train))
    assert rates.choose(ladder)["a"].value == "1e-2"
    longer = ladder._replace(stages=[s._replace(updates=9) for s in ladder.stages])
    with pytest.raises(UserError, match="arm-a-lr10-1: was trained with --max-update 3, and"):
        rates.choose(longer)


def test_runs_that_diverged_have_no_factor(tmp_path):
    ladder = REAL._replace(out=tmp_path)
    flops = [16e6 * forecast.training_flops(arm, ladder) for arm in ladder.arms[:3]]
    names = [arm.name for arm in ladder.arms[:3]]

    def found(dense, sparse):
        runs = [made_run("16M", n, 1, *of) for n, *of in zip(names, flops, dense)]
        runs.append(made_run("16M", "d0-E64", 1, flops[0], sparse))
        return [f for f in result.savings(ladder, runs, {})[0] if f["group"] == "in_domain"]

    assert found((50.0, 40.0, 30.0), math.inf) == []
    assert found((50.0, math.inf, math.inf), 45.0) == []
    (one,) = found((50.0, 40.0, math.inf), 45.0)
    assert [one] == found((50.0, 40.0, 80.0), 45.0), "the others are enough"


def test_an_infinite_perplexity_is_collected(folder, tmp_path):
    """As `fairseq-moe evaluate` writes it of a training that diverged."""
    evaluation = {"sets": {"x": {"perplexity": math.inf}}, "mean": {"in_domain": {}}}
    evaluation["mean"]["in_domain"]["perplexity"] = math.inf
    outputs.write_json(tmp_path / "evaluation.json", evaluation)
    run = plan.Run("dense", "a", 1, 3, tmp_path, [], [], [])
    with pytest.raises(UserError, match="checkpoint_best.pt"):  # which is read next
        study_finished.of_run(run, 32, 128)


def test_the_text_is_noted_and_stays_so(tmp_path):
    ladder = REAL._replace(out=tmp_path / "out", data=str(tmp_path / "data"))
    assert result._text(ladder) == {}
    ladder = ladder._replace(corpora=["a", "b", "c"])
    assert result._without(ladder, {}) == [], "none is known"
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "counts.json").write_text('{"corpora": {"a": {}}}')
    noted = result._text(ladder)
    said = ["The text has no b, c: means are over the other sets."]
    assert result._without(ladder, noted) == said
    assert result.collect(ladder)["remarks"][:1] == said
    assert noted == {"corpora": {"a": {}}}
    (tmp_path / "data" / "counts.json").unlink()
    ladder.out.mkdir()
    (ladder.out / "result.json").write_text(json.dumps({**made_result(tmp_path), "text": noted}))
    assert result._text(ladder) == noted
    folder = ladder.folder(ladder.stage("4M"), ladder.arms[0], 1)
    folder.mkdir(parents=True)
    (folder / "text.json").write_text('{"corpora": {"b": {}}}')
    assert result._text(ladder) == {"corpora": {"b": {}}}, "what a run was trained on"


def test_an_interval_over_seeds_needs_dense_runs_of_these_seeds(tmp_path):
    """d2 has seed 1 alone."""
    ladder = REAL._replace(out=tmp_path)
    d0, d1, d2 = (16e6 * forecast.training_flops(arm, ladder) for arm in ladder.arms[:3])
    runs = [made_run("16M", "d2", 1, d2, 20.0)]
    for seed, base, larger, sparse in ((1, 50.0, 40.0, 45.0), (2, 51.0, 41.0, 44.0)):
        stage = "16M" if seed == 1 else "16M-seeds"
        runs += [made_run(stage, "d0", seed, d0, base), made_run(stage, "d1", seed, d1, larger)]
        runs += [made_run(stage, "d0-E64", seed, d0, sparse)]

    def found(runs):
        (one,) = [f for f in result.savings(ladder, runs, {})[0] if f["group"] == "in_domain"]
        return one

    one = math.log(d1 / d0) * math.log(50 / 45) / math.log(50 / 40)
    two = math.log(d1 / d0) * math.log(51 / 44) / math.log(51 / 41)
    made = found(runs)
    assert made["interval_over"] == "seeds" and made["seeds"] == 2
    assert made["factor"] == pytest.approx(math.exp((one + two) / 2))
    half = 12.7062 * abs(one - two) / 2  # t of 0.975 with one degree of freedom
    ends = math.exp((one + two) / 2 - half), math.exp((one + two) / 2 + half)
    assert made["interval"] == pytest.approx(ends, rel=1e-4)

    lacking = found([run for run in runs if (run["size"], run["seed"]) != ("d1", 2)])
    assert lacking["interval"] is None and lacking["interval_over"] == ""
    assert lacking["seeds"] == 2 and 1 < lacking["factor"] < d1 / d0

    runs[-1] = made_run("16M-seeds", "d0-E64", 2, d0, 39.0)  # between d1 and d2
    beyond = found(runs)
    assert beyond["interval"] is None and not beyond["beyond"]


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("result.json", '{"runs": [], "planned": 1, "factors": {}}', "is not a ladder's result"),
        ("probe.json", "{}", "probe.json: not in the format .*seconds_per_token"),
        ("probe.json", '{"seconds_per_token": {"a": NaN}}', "probe.json: .* nan seconds of a"),
        (
            "probe.json",
            '{"seconds_per_token": {"a": 1}, "timed_with": {"a": 2}}',
            "probe.json: not in the format",
        ),
        ("first/arm-a-1/evaluation.json", '{"sets": ', "evaluation.json: not JSON"),
        ("first/arm-a-1/evaluation.json", "[]", "arm-a-1: not in the format that was written"),
        (
            "first/arm-a-1/evaluation.json",
            '{"sets": {"x": {"perplexity": NaN}}, "mean": {"in_domain": {"perplexity": 2}}}',
            "arm-a-1: not in the format .* perplexity nan of x",
        ),
        ("first/arm-a-1/evaluation.json", '{"sets": {}, "mean": {}}', "names no set"),
        ("first/arm-a-1/text.json", "8", "text.json: not in the format that was written"),
        ("first/arm-a-1/text.json", '{"corpora": {"x": 8}}', "text.json: not in the format"),
    ],
)
def test_damaged_files_are_named(folder, tmp_path, name, content, words, capsys):
    path = write(folder, lambda text: text.replace(f"out: {folder}/ladder", f"out: {tmp_path}"))
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text(content)
    assert command().main([str(path), "--only-result"]) == 1 or name == "probe.json"
    if name == "probe.json":
        assert command().main([str(path), "--dry-run"]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and re.search(words, error)
    assert (tmp_path / name).read_text() == content


def test_losses_of_other_documents_are_not_compared(folder, tmp_path):
    ladder = stages.read(write(folder))._replace(out=tmp_path)
    stage = ladder.stage("first")
    folders = [ladder.folder(stage, arm, 1) for arm in stage.arms[:3]]
    for one, tokens in zip(folders, ([5, 6], [5, 6], [6, 5])):
        one.mkdir(parents=True)
        units = {"kernel": {"nats": [1.0, 2.0], "tokens": tokens}}
        (one / "unit_losses.json").write_text(json.dumps(units))
    runs = [made_run("first", arm.name, 1, 1.0, 9.0) for arm in stage.arms[:3]]
    units = Units(ladder, [stage])
    with pytest.raises(UserError, match="arm-a-E4-1/unit_losses.json: lacks ker"):
        units.interval(runs[:2], runs[2], "in_domain")
    (folders[2] / "unit_losses.json").write_text('{"kernel": {"nats": [NaN], "tokens": [11]}}')
    with pytest.raises(UserError, match="unit_losses.json: not in the format .*losses of kernel"):
        Units(ladder, [stage]).interval(runs[:2], runs[2], "in_domain")


@pytest.mark.parametrize("units, known", [(([11], [5, 6]), 0), (([5, 6], [5, 6]), 1)])
def test_a_set_of_one_unit_has_no_interval(folder, tmp_path, units, known):
    """As in `fairseq-moe evaluate`, and so has no mean with it."""
    ladder = stages.read(write(folder))._replace(out=tmp_path)
    stage = ladder.stage("first")
    runs = [made_run("first", arm.name, 1, 1.0, 9.0) for arm in stage.arms[:3]]
    for run, arm in zip(runs, stage.arms):
        run["sets"]["other"] = run["sets"]["kernel"]
        losses = {
            name: {"nats": [1.0, 2.0][: len(tokens)], "tokens": tokens}
            for name, tokens in zip(run["sets"], units)
        }
        path = ladder.folder(stage, arm, 1) / "unit_losses.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(losses))
    found = Units(ladder, [stage])
    for group, has_one in (("kernel", known), ("other", 1), ("in_domain", known)):
        interval, over = found.interval(runs[:2], runs[2], group)
        assert (interval is not None, over) == (has_one, "units of test text" if has_one else "")


def test_only_arms_that_saved_enough_go_on(tmp_path, monkeypatch, capsys):
    made = made_result(tmp_path)
    stage = REAL.stage("64M")
    passed = result.passing(REAL, stage._replace(at_least=1.5), made)
    assert [arm.name for arm in passed] == ["d0-256x4"]
    monkeypatch.setattr(result, "collect", lambda ladder: made)
    assert [a.name for a in running.screened(REAL, stage._replace(at_least=1.4)).arms] == [
        *("d0", "d1", "d2", "d3"),
        *("d0-E64", "d0-256x4"),
    ]
    said = capsys.readouterr().out
    assert said.startswith("stage 64M: not run, because they have no saving at 16M: d0-E8, d0-E128")
    assert "d0-E64," not in said and "d1-E8," not in said
    assert running.screened(REAL, stage).arms == []
    monkeypatch.setattr(result, "collect", lambda ladder: {**made, "factors": []})
    with pytest.raises(UserError, match="stage 64M: .* in the stage 16M, which has no factor yet"):
        running.screened(REAL, stage)


def test_pages(tmp_path, capsys):
    made = made_result(tmp_path)
    (tmp_path / "result.json").write_text(json.dumps(made, allow_nan=False))
    assert cli.main(["report", str(tmp_path), "--fine-tuning", "x"]) == 1
    assert "--fine-tuning x: is for a study of two families" in capsys.readouterr().err
    (tmp_path / "figures").write_text("mine")
    assert cli.main(["report", str(tmp_path)]) == 1
    assert "figures: is not a folder; move it elsewhere" in capsys.readouterr().err
    (tmp_path / "figures").unlink()
    (tmp_path / "tables.md").mkdir()
    assert cli.main(["report", str(tmp_path)]) == 1
    assert "tables.md: " in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()
    (tmp_path / "tables.md").rmdir()
    assert cli.main(["report", str(tmp_path)]) == 0
    html = (tmp_path / "report.html").read_text()
    assert "d0-256x4 saves most in domain" in html and "10 of 50 runs are done" in html
    text = (tmp_path / "tables.md").read_text()
    assert "| d1-E8, 16M | 1 | > 1.00 | > 1.00 | > 0.50 |" in text
    assert "| d0-E64 | 1.46 (1." in text and "d0-256x4, 16M | 1.77" in text
    # ln 1.01 and ln 1.02: t of 0.975 with one degree of freedom is 12.706
    assert "| d0-256x4-bf16, 16M | 2 | +1.50 (−4.66 to +8.05) |" in text and "+1.50 (−" in html
    assert (tmp_path / "figures" / "saving.svg").is_file()
    assert "| d0 | 4e-3 | 30.00 | d0, d1 |" in text and "a higher perplexity" not in html + text
    assert "|  | train | valid (2.00% of documents) | test (1.00% of documents) |" in text
    for row in ("news (held out) |  | 70 | 80 |", "mail | 5,000 |  | 60 |", "together | 8,000 |"):
        assert f"| {row}" in text
    assert "are rough" not in text
    made["runs"][0]["sets"]["kernel"]["units"] = 8
    said = "Intervals over test text are rough for sets with fewer than 20 units of it: kernel (8)."
    assert said in tables.page(made) and said in page.html(made, page.charts(made))
    made["runs"][-2]["protocol"] = {"context": 256, "stride": 64}  # bf16, seed 1
    assert tables.in_bfloat16(made)[1] == ["d0-256x4-bf16, 16M", "1", "+2.00"]
    made["runs"][-1]["protocol"] = {"context": 256, "stride": 64}
    assert tables.in_bfloat16(made)[1:] == [], "evaluated in another way"
    for run in made["runs"]:
        if run["size"] == "d1":
            run["mean"]["in_domain"]["perplexity"] = 51.0
    assert tables.warnings(made)[0].startswith("On 16M tokens d1 has a higher perplexity than a")
    assert "On 16M tokens d1 has" in page.html(made, page.charts(made))
    best, other = [f for f in made["factors"] if f["group"] == "in_domain"][:2]
    worse = {**other, "factor": 9.0, "beyond": -1}
    assert f"{best['arm']} saves most" in page.summary({**made, "factors": [best, worse]})
    none = f"no sparse model is seen to save, and {best['arm']} comes nearest in domain: the dense"
    for factor, beyond, shown in ((0.9, 0, "needs 0.90"), (1.0, -1, "needs less than 1.00")):
        below = {**best, "factor": factor, "beyond": beyond}
        assert f"{none} model {shown} times" in page.summary({**made, "factors": [below]})


@pytest.fixture
def points(monkeypatch):
    """A chart is the points of its lines."""
    monkeypatch.setattr(
        page.figures,
        "line_chart",
        lambda title, series, *words, **flags: [s.points for s in series],
    )


def test_the_point_of_a_model_better_than_all_dense_ones_is_a_lower_bound(tmp_path, points):
    made = made_result(tmp_path)
    (bound,) = (f for f in made["factors"] if f["group"] == "in_domain" and f["beyond"] > 0)
    assert bound["arm"] == "d1-E8"
    law, _, ours, _ = page.saving_chart(made)
    most = max(f["factor"] for f in made["factors"] if f["arm"] != "d1-E8")
    assert bound["factor"] < most and [y for _, y in ours] == [most] and len(law) == 1
    bound["factor"] = 2 * most
    assert [y for _, y in page.saving_chart(made)[2]] == [2 * most]
    for found in made["factors"]:
        if found["arm"] == "d1-E8":
            found["beyond"] = -1  # worse than all: it does not save most
    law, _, ours, _ = page.saving_chart(made)
    assert [y for _, y in ours] == [most] and len(law) == 1
    for found in made["factors"]:
        if found["arm"] == "d1-E8" and found["group"] != "in_domain":
            found["beyond"] = 1
    assert page.saving_chart(made)[2] == ours, "out of domain says nothing"


def test_the_law_in_the_chart_is_that_of_the_model(tmp_path, points):
    """A token of the paper's models takes two experts; a hash is no learned choice."""
    made = made_result(tmp_path)
    made["factors"] = [f for f in made["factors"] if f["arm"] == "d0-256x4"]
    learned, papers, _, _ = page.saving_chart(made)
    assert [f"{y:.2f}" for _, y in papers] == ["5.86", "4.62", "3.43", "2.90", "2.36"]
    forecast = (REPOSITORY / "docs" / "forecast.md").read_text(encoding="utf-8")
    assert "so S-BASE predicts 5.86." in forecast
    made["ladder"]["arms"]["d0-256x4"]["router"] = "hash"
    hashed, *_ = page.saving_chart(made)
    cost = tables.flops_per_token(made, made["factors"][0])
    for drawn, law in ((learned, laws.S_BASE), (hashed, laws.HASH)):
        effective = 10 ** law.log_effective(cost / 6, 64)
        tokens = made["factors"][0]["tokens"]
        assert drawn == [pytest.approx((6 * effective * tokens, 6 * effective / cost))]


@pytest.mark.parametrize("records_flags", [True, False])
def test_a_line_is_of_arms_that_differ_in_the_number_of_experts_alone(
    tmp_path, monkeypatch, records_flags
):
    made = made_result(tmp_path)
    one = next(f for f in made["factors"] if f["arm"] == "d0-E64" and f["group"] == "in_domain")
    names = ["E8", "E32", "E64", "E64-sigmoid", "E128", "256x4", "256x4-bf16", "hash64"]
    made["factors"] = [
        {**one, "arm": arm, "tokens": tokens, "factor": 1 + i}
        for tokens in (4_000_000, 16_000_000)
        for i, arm in enumerate([*(f"d0-{name}" for name in names), "d1-E32", "d1-E128"])
    ]
    arms = {found["arm"] for found in made["factors"]}
    made["runs"] += [
        {**made["runs"][0], "size": arm, "family": "moe", "stage": stage}
        for arm in arms
        for stage in ("4M", "16M")
    ]
    if not records_flags:  # an older file
        for arm in made["ladder"]["arms"].values():
            del arm["own_flags"]
    drawn = {}

    def line_chart(title, series, *words, **flags):
        drawn[title] = {(line.label, line.style): line.points for line in series}

    def legend(labels, styles):
        return list(zip(labels, styles))

    monkeypatch.setattr(page.figures, "line_chart", line_chart)
    monkeypatch.setattr(page.figures, "legend", legend)
    monkeypatch.setattr(page.report, "render", lambda template, **values: values)
    shown = page.html(made, page.charts(made))
    experts = [(8, 1), (32, 2), (64, 3), (128, 5)]
    assert drawn["Saving over experts, d0"] == {("4M", 0): experts, ("16M", 1): experts}
    assert shown["tokens_legend"] == [(f"{n} experts", i) for i, (n, _) in enumerate(experts)]
    assert list(drawn["Saving over tokens, d0"]) == [
        *(("d0-E8", 0), ("d0-E32", 1), ("d0-E64", 2), ("d0-E128", 3))
    ]
    assert list(drawn["Saving over tokens, d1"]) == [("d1-E32", 1), ("d1-E128", 3)]


def test_the_forecast_that_is_committed_is_of_this_ladder():
    committed = json.loads((STUDY / "ladder_forecast.json").read_text())["forecasts"]
    assert committed == json.loads(json.dumps(forecast.forecasts(REAL)))
    found = {(f["arm"], f["tokens"]): f for f in committed}
    page = (STUDY / "ladder_forecast.md").read_text(encoding="utf-8")
    assert markdown(forecast.table(committed)) in page
    # science: E = 64, continued in tokens
    assert found["d0-E64", 16_000_000]["trend_tokens"] == pytest.approx(1.45, abs=0.005)
    assert found["d0-E64", 64_000_000]["trend_tokens"] == pytest.approx(1.7, abs=0.05)
    assert forecast.trend(512, 1e9) is None and forecast.trend(64, 5.2e9) == pytest.approx(3.15)
    with pytest.raises(UserError, match=r"ladder_forecast.json: exists"):
        forecast.write(REAL)


def test_the_laws_count_the_parameters_that_arms_have():
    """All of a sparse model, from its widths; the dense model of the saving has the same loss."""
    arms = {arm.name: arm for arm in REAL.arms}
    found = {(f["arm"], f["tokens"]): f["laws"] for f in forecast.forecasts(REAL)}
    for name, layers, dim, ffn, left_out in (
        *(("d0-E64", 4, 96, 384, 63), ("d0-E8", 4, 96, 384, 7), ("d0-hash64", 4, 96, 384, 63)),
        *(("d0-256x4", 4, 96, 96, 252), ("d1-E64", 4, 160, 640, 63)),
    ):
        base = forecast.training_flops(arms[name], REAL) / 6
        total = base + layers * left_out * (2 * dim * ffn + dim + ffn)
        assert forecast.model_of(arms[name], REAL, 4e6).total == total
        fine = 2.1 / arms[name].granularity ** 0.58 + 18.1
        loss = fine / total**0.115 + 30.8 / 4e6**0.147
        dense = found[name, 4_000_000]["krajewski"] * base
        assert 16.3 / dense**0.126 + 26.7 / 4e6**0.127 == pytest.approx(loss, rel=1e-9)
        used = arms[name].granularity / arms[name].flags["moe-expert-count"]
        loss = (
            16612.5 / total**0.5962 + 17.26 / (used**0.1603 * total**0.1595) + 0.4598 * used**0.1666
        )
        dense = found[name, 4_000_000]["abnar"] * base
        assert 16612.5 / dense**0.5962 + 17.26 / dense**0.1595 + 0.4598 == pytest.approx(
            loss, rel=1e-9
        )


def test_arms_that_a_law_tells_apart_are_forecast(folder):
    """Skipped: what differs in precision or score alone."""
    arms = """{E4: {experts: 4}, bf16: {experts: 4, flags: {bf16: true}},
    score: {experts: 4, flags: {moe-score: sigmoid}}, half: {experts: 4, flags: {moe-freq: 2}},
    random: {experts: 4, flags: {moe-router: random, moe-balance: none}},
    hash: {experts: 4, flags: {moe-router: hash, moe-balance: none}}}"""
    path = write(folder, lambda text: re.sub("arms: {E4.*", f"arms: {arms}", text))
    path.write_text(path.read_text().replace("bases: [a]", "bases: [b]").replace("a-E4", "b-E4"))
    ladder = stages.read(path)
    found = [f for f in forecast.forecasts(ladder) if f["tokens"] == 384]
    assert [f["arm"] for f in found] == ["b-E4", "b-half", "b-random", "b-hash"]
    ladder = ladder._replace(arms=[arm._replace(experts=64) for arm in ladder.arms])
    found = [f for f in forecast.forecasts(ladder) if f["tokens"] == 384]
    assert [f["trend_tokens"] is None for f in found] == [False, False, True, True]


def test_what_would_be_needed(tmp_path, capsys):
    ladder = REAL._replace(out=tmp_path)
    rows = needed.table(ladder, tmp_path, 100.0, 10_000.0)
    found = {(row[0], row[1]): [float(x.replace(",", "")) for x in row[2:]] for row in rows[1:]}
    tokens = 5.2e9 * (4 / 3.15) ** (math.log(126 / 5.2) / math.log(4.83 / 3.15))
    hours = tokens * 13.27872e6 * (1 + 4) / 1e11 / 3600
    expected = [tokens, hours, hours / 8, hours / 100]
    assert found["d1, 64 experts, by tokens", "4"] == pytest.approx(expected, rel=0.06)
    fewer = [x * 8192 / 520_000 for x in expected]
    assert found["d1, 64 experts, by updates", "4"] == pytest.approx(fewer, rel=0.06)
    tokens = 5.2e9 * (8 / 6.01) ** (math.log(126 / 5.2) / math.log(12.3 / 6.01))
    assert found["d1, 256 experts, unlike text, by tokens", "8"][0] == pytest.approx(tokens, 0.06)
    made = made_result(tmp_path)
    wide = next(f for f in made["factors"] if f["arm"] == "d0-256x4" and f["group"] == "in_domain")
    bound = {**wide, "tokens": 64_000_000, "factor": 3.9, "beyond": 1}  # no number, so left out
    factors = [{**wide, "tokens": 4_000_000, "factor": 1.5}, wide, bound]
    (tmp_path / "result.json").write_text(json.dumps({**made, "factors": factors}))
    four = [
        row for row in needed.table(ladder, tmp_path, 100.0, 1e4) if row[0] == "d0-256x4, measured"
    ][0]
    doublings = 2 * math.log(4 / wide["factor"]) / math.log(wide["factor"] / 1.5)
    assert float(four[2]) == pytest.approx(16e6 * 2**doublings, rel=0.06)
    needed.say(ladder, tmp_path, 100.0, 10_000.0)
    assert "Computed, not measured." in capsys.readouterr().out


def test_what_would_be_needed_by_the_result_that_is_committed(capsys):
    """Of docs/ladder.md, by its own command."""
    docs = STUDY.parents[1] / "docs"
    text = (docs / "ladder.md").read_text(encoding="utf-8")
    words = re.search(r"`python examples/study/ladder.py (--needed .*?)`", text)[1].split()
    assert words.pop() == "docs/ladder_fixed_rates"
    assert command().main([*words, str(docs / "ladder_fixed_rates")]) == 0
    rows = capsys.readouterr().out.split("\n\n")[0].splitlines()
    printed = re.findall(r"^\| d\d.*, (?:measured|by tokens|by updates) \|.*", text, flags=re.M)
    assert len(printed) == 12 and {*printed} <= {*rows}
    left_out = [row for row in rows if row not in text]
    assert all(row.startswith("| d1, 64 experts") for row in left_out), left_out


def test_the_result_that_is_committed():
    """docs/ladder_two_cores, and what docs/earlier_studies.md says of it."""
    docs = STUDY.parents[1] / "docs"
    found = json.loads((docs / "ladder_two_cores" / "result.json").read_text(encoding="utf-8"))
    assert tables.page(found) == (docs / "ladder_two_cores" / "tables.md").read_text("utf-8")
    text = (docs / "earlier_studies.md").read_text(encoding="utf-8")
    for group in GROUPS:
        assert markdown(tables.over_tokens(found, group)).strip() in text
    plain = " ".join(text.split())
    best, other = (
        tables.by_key(found)[arm, 16_000_000, "in_domain"] for arm in ("d0-256x4", "d0-hash64")
    )
    assert f"by a factor of {tables.factor(best)} in domain" in plain
    assert f"chosen by hash, by {tables.factor(other)} and" in plain
    assert f"{best['factor']:.2f} becomes {best['with_router']:.2f}." in plain
    said = f"`d0-hash64` cuts the time by a factor of {other['in_seconds']:.2f}, and `d0-256x4`"
    assert said in plain
    assert f": {best['in_seconds']:.2f}." in plain
    committed = json.loads((STUDY / "ladder_forecast.json").read_text("utf-8"))["forecasts"]
    later = "hash256x4"  # this arm came after these runs
    assert found["forecasts"] == [f for f in committed if not f["arm"].endswith(later)]
    laws = {name: f"{value:.2f}" for name, value in committed[0]["laws"].items()}
    said = (
        "(`d0-E64` on 4M: {s-base} times by Clark et al., {krajewski} by Krajewski et al., {abnar}"
    )
    assert said.format(**laws) in plain
    _, (name, seeds, inside, outside) = tables.in_bfloat16(found)
    assert (name, seeds) == ("d0-256x4-bf16, 16M", "3")
    assert f"differs by {inside} % in domain and {outside} % out of domain" in plain
    assert f"{inside} %" in (docs / "performance.md").read_text(encoding="utf-8")


def test_the_result_with_fixed_rates_that_is_committed():
    """docs/ladder_fixed_rates: its file, and what docs/ladder.md says of it."""
    folder = STUDY.parents[1] / "docs" / "ladder_fixed_rates"
    searched = json.loads((folder.parent / "ladder_two_cores" / "result.json").read_text("utf-8"))
    file, whole = (
        yaml.safe_load(path.read_text("utf-8"))
        for path in (folder / "ladder.yaml", STUDY / "ladder.yaml")
    )
    rates = file["learning-rate"].pop("values")
    assert rates.keys() == whole["learning-rate"].pop("values").keys()
    assert file.pop("out") != whole.pop("out"), "one would replace the other's result"
    for name, (rate,) in rates.items():
        assert float(rate) == float(searched["rates"][name]["value"])
    assert file == whole
    found = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    assert tables.page(found) == (folder / "tables.md").read_text("utf-8")
    text = (folder.parent / "ladder.md").read_text(encoding="utf-8")
    for group in GROUPS:
        assert markdown(tables.over_tokens(found, group)).strip() in text
    assert markdown(tables.costs(found)).strip() in text
    by_stage = {name: stage["tokens"] for name, stage in found["ladder"]["stages"].items()}
    for name, tokens in {(run["size"], by_stage[run["stage"]]) for run in found["runs"]}:
        runs = tables.runs_of(found, name, tokens)
        runs.sort(key=lambda run: run["seed"])
        cells = [name, ", ".join(str(run["seed"]) for run in runs)]
        for group in GROUPS:
            cells.append(", ".join(f"{run['mean'][group]['perplexity']:.1f}" for run in runs))
        assert f"| {' | '.join(cells)} |" in text
    plain = " ".join(text.split())
    for name in ("d0-hash256x4", "d1-256x4"):
        assert re.search(rf"`{name}` cuts .{{0,25}}by (a factor of )?{cuts(found, name)}", plain)


@pytest.fixture
def fixed_rates():
    """The result in docs/ladder_fixed_rates, and docs/ladder.md on one line."""
    docs = STUDY.parents[1] / "docs"
    found = json.loads((docs / "ladder_fixed_rates" / "result.json").read_text(encoding="utf-8"))
    return found, " ".join((docs / "ladder.md").read_text(encoding="utf-8").split())


def test_what_the_pages_say_of_most_tokens(fixed_rates):
    found, plain = fixed_rates
    factors = tables.by_key(found)
    name, tokens = "d0-hash256x4", 64_000_000
    longest = {group: f for (arm, at, group), f in factors.items() if (arm, at) == (name, tokens)}
    inside, outside = (tables.factor(longest.pop(group)) for group in GROUPS)
    for path in ("docs/ladder.md", "docs/study.md"):
        said = " ".join((REPOSITORY / path).read_text(encoding="utf-8").split())
        assert f"cuts them by {inside} in domain and {outside} out of domain" in said
    readme = " ".join((REPOSITORY / "README.md").read_text(encoding="utf-8").split())
    assert f"and of {inside} times on 64M, one seed" in readme
    of_sets, bound = plain.split(f"On 64M tokens `{name}` saves ")[1].split(", and more than ")
    within = [f"{f['factor']:.2f}" for f in longest.values() if not f["beyond"]]
    assert sorted(re.findall(r"\d\.\d\d", of_sets)) == sorted(within)
    (best,) = (f for f in longest.values() if f["beyond"])
    assert bound.startswith(f"{best['factor']:.2f} times on the {best['group']}")
    flops = [tables.runs_of(found, size, tokens)[0]["flops"] for size in ("d0", "d1", "d2")]
    ratios = f"{flops[1] / flops[0]:.2f} and {flops[2] / flops[0]:.2f}"
    assert f"d1 and d2, which take {ratios} times its FLOPs" in plain
    before, after = (factors[name, at, GROUPS[0]]["factor"] for at in (tokens // 4, tokens))
    assert f"grows by {100 * ((after / before) ** 0.5 - 1):.1f} % with each doubling" in plain


def test_what_the_page_says_of_seconds(fixed_rates):
    found, plain = fixed_rates

    def saved(name, group):
        return f"{tables.by_key(found)[name, 16_000_000, group]['in_seconds']:.2f}"

    best, narrow, wide = (
        saved(name, GROUPS[0]) for name in ("d0-hash256x4", "d1-256x4", "d0-hash64")
    )
    assert (
        f"`d0-hash256x4` saves a factor of {best} in domain on 16M tokens, `d1-256x4` and "
        f"`d0-hash64` save {narrow} and {wide}."
    ) in plain
    best, narrow = (saved(name, GROUPS[1]) for name in ("d0-hash256x4", "d1-256x4"))
    assert f"`d0-hash256x4` saves {best}, and `d1-256x4` loses: {narrow}." in plain
    for name in ("d0-E64", "d0-256x4", "d1-E64"):
        assert float(saved(name, GROUPS[0])) < 1
    seconds = found["seconds_per_token"]
    longer = [
        f"{seconds[name] / seconds[name[:2]]:.2f}"
        for name in ("d0-hash256x4", "d0-256x4", "d1-256x4", "d1-E64", "d1-E8")
    ]
    assert "take {} and {} times as long as those of d0".format(*longer) in plain
    assert "{}, {} and {} times as long as those of d1".format(*longer[2:]) in plain


def cuts(found, name):
    """What the pages say of an arm on 16M tokens, as a pattern."""
    inside, outside = (tables.by_key(found)[name, 16_000_000, group] for group in GROUPS)
    said = f"{tables.factor(inside)} in domain and {tables.factor(outside)} out of domain"
    return re.escape(said)


def test_the_best_results_are_said_in_short():
    """At the top of docs/study.md, and in README."""
    docs = STUDY.parents[1] / "docs"
    text = (docs / "study.md").read_text("utf-8").split("## In short\n")[1].split("\n## ")[0]
    plain = " ".join(text.split())
    readme = (docs.parent / "README.md").read_text("utf-8")
    found, before = (
        json.loads((docs / name / "result.json").read_text("utf-8"))
        for name in ("ladder_fixed_rates", "ladder_two_cores")
    )
    best, earlier = (
        max(
            (
                f
                for (_, tokens, group), f in tables.by_key(made).items()
                if tokens == 16_000_000 and group == GROUPS[0] and not f["beyond"]
            ),
            key=lambda factor: factor["factor"],
        )
        for made in (found, before)
    )
    for factor, made in ((best, found), (earlier, before)):
        assert f"It is `{factor['arm']}`" in plain
        assert re.search(f"factor of {cuts(made, factor['arm'])}", plain)
    assert f"a dense one of {tables.factor(best)} times its training FLOPs" in readme
    learned = (
        tables.by_key(before)[f"d0-{n}", 16_000_000, GROUPS[0]] for n in ("E8", "E32", "E64")
    )
    said = "a factor of {:.2f} with 8, {:.2f} with 32, {:.2f} with 64"
    assert said.format(*(factor["factor"] for factor in learned)) in plain
    by_hash = tables.by_key(before)["d0-hash64", 16_000_000, GROUPS[0]]
    assert f"by a factor of {by_hash['in_seconds']:.2f} (64 experts by hash)" in plain
    assert by_hash["in_seconds"] == max(
        f["in_seconds"] or 0
        for made in (found, before)
        for f in made["factors"]
        if f["tokens"] == 16_000_000 and f["group"] == GROUPS[0]
    )


def inner(update, loss=5.0):
    return (
        f't | INFO | train_inner | {{"num_updates": "{update}", "inner_loss": "{loss}", '
        '"train_wall": "30", "wps": "100"}\n'
    )


def test_progress_of_every_run(folder, tmp_path):
    ladder = stages.read(write(folder))._replace(out=tmp_path)
    stage = ladder.stage("first")
    folders = [ladder.folder(stage, arm, 1) for arm in stage.arms]
    for one in folders[:3]:
        one.mkdir(parents=True)
        (one / "train.log").write_text(inner(1, 6) + inner(2))
    (folders[0] / "evaluation.json").write_text('{"mean": {"in_domain": {"perplexity": 31.25}}}')
    long_ago = time.time() - 3600
    os.utime(folders[2] / "train.log", (long_ago, long_ago))
    found = [progress.state(one, 3) for one in folders]
    assert [s.word for s in found] == ["done", "running", "stopped", "to do"]
    assert found[1].updates == 2 and found[1].minutes == 1.0
    assert found[1].curve == [(1.0, 64.0), (2.0, 32.0)]
    with open(folders[1] / "train.log", "a") as file:
        file.write(inner(2, 4))  # resumed at update 1
    again = progress.state(folders[1], 3)
    assert again.minutes == 1.0 and again.curve == [(1.0, 64.0), (2.0, 16.0)]
    progress.write(ladder, 100.0)
    html = (tmp_path / "progress.html").read_text()
    assert '<meta http-equiv="refresh" content="60">' in html
    assert "1 of 10 runs are done, 1 at work" in html and "31.25" in html and "2 of 3" in html
    assert "first: 3 runs left" in html
    assert not list(tmp_path.glob("*.tmp*"))


def test_progress_of_a_run_that_diverged_or_has_another_criterion(folder, tmp_path):
    ladder = stages.read(write(folder))._replace(out=tmp_path)
    stage = ladder.stage("first")
    logs = [
        inner(1, 6) + inner(2, "nan") + inner(3, 5000),
        inner(1, "nan"),
        inner(1, 6).replace("inner_loss", "loss"),
        inner(1, 6).replace("inner_loss", "nll_loss").replace("{", '{"loss": "7", '),
    ]
    curves = []
    for arm, log in zip(stage.arms, logs):
        one = ladder.folder(stage, arm, 1)
        one.mkdir(parents=True)
        (one / "train.log").write_text(log)
        curves.append([y for _, y in progress.state(one, 3).curve])
    assert curves[0][0] == 64.0 and all(map(math.isnan, curves[0][1:] + curves[1]))
    assert list(map(len, curves)) == [3, 1, 1, 1] and curves[2:] == [[64.0], [64.0]]
    progress.write(ladder, 100.0)
    html = (tmp_path / "progress.html").read_text()
    assert "0 of 10 runs are done, 4 at work" in html


def test_hours_are_of_what_is_left(folder, tmp_path):
    ladder = stages.read(write(folder))._replace(out=tmp_path)
    stage = ladder.stage("first")
    probed = {"a": 2.0, "b": 1.0, "a-E4": 3.0}
    flops = forecast.training_flops(stage.arms[3], ladder)
    left, found = hours.left(ladder, stage, probed, 1e-9 * flops)  # one second a token
    assert left == 4 and found == pytest.approx(384 * (2 + 1 + 3 + 1) / 3600)
    named = stage.arms[0]._replace(name="b-lr1")  # only those of the stage lr end in their rate
    assert hours.left(ladder, stage._replace(arms=[named]), {"b-lr1": 1.0}, 1.0)[1] * 3600 == 384
    done = ladder.folder(stage, stage.arms[2], 1)
    done.mkdir(parents=True)
    (done / "evaluation.json").touch()
    assert hours.left(ladder, stage, probed, 1e-9 * flops)[0] == 3


@pytest.mark.parametrize(
    "probed, words",
    [
        ([], "machine, at 100 GFLOP/s (--probe measures it)"),
        (
            ["a", "gone"],
            "1 of 4 arms by the probe, the others at 100 GFLOP/s (--probe measures it)",
        ),
        (["a", "b", "a-E4", "a-4x2"], "machine, by the probe"),
    ],
)
def test_hours_say_what_they_are_computed_by(folder, tmp_path, probed, words):
    ladder = stages.read(write(folder))._replace(out=tmp_path)
    content = {"seconds_per_token": dict.fromkeys(probed, 1.0)}
    (tmp_path / "probe.json").write_text(json.dumps(content))
    assert hours.said(ladder, ladder.stages, 100.0)[-1].endswith(words)


@pytest.fixture
def timing(monkeypatch):
    """Time arms without training: a second a token, one more each; once, on two cores. Returns the
    names of the arms that were timed."""
    timed = []
    monkeypatch.setattr(probe, "ROUNDS", 1)
    monkeypatch.setattr(probe, "_command", lambda _, arm, folder: timed.append(arm.name) or [])
    monkeypatch.setattr(probe, "_logged", lambda _: float(len(timed)))
    monkeypatch.setattr(probe.Runner, "call", lambda *_: None)
    monkeypatch.setattr(probe.cores, "usable", lambda: 2)
    monkeypatch.delenv("OMP_NUM_THREADS")  # of conftest.py: one
    return timed


def test_arms_are_timed_in_turn(folder, tmp_path, timing, monkeypatch, capsys):
    ladder = stages.read(write(folder))._replace(out=tmp_path)
    monkeypatch.setattr(probe, "ROUNDS", 3)
    probe.run(ladder, ladder.arms[:2])
    assert timing == ["a", "b"] * 3
    assert probe.seconds_per_token(ladder) == {"a": 3.0, "b": 4.0}, "the medians"
    written = json.loads((tmp_path / "probe.json").read_text())
    assert [how["rounds"] for how in written["timed_with"].values()] == [3, 3]
    assert "a: 0 (0 to 1) tokens/s" in capsys.readouterr().out
    monkeypatch.setattr(probe, "UPDATES", probe.UPDATES + 1)
    probe.run(ladder, ladder.arms[:1])
    assert "timing a, b again: their settings, or the number of" in capsys.readouterr().out
    monkeypatch.setattr(probe, "ROUNDS", 2)
    probe.run(ladder, ladder.arms[:1])
    assert timing[6:] == ["a", "b"] * 3 + ["a", "b"] * 2


def test_arms_are_timed_again_on_other_cores_or_with_other_settings(folder, tmp_path, timing):
    ladder = stages.read(write(folder))._replace(out=tmp_path)
    a, b, e4, narrow = ladder.arms
    probe.run(ladder, [a, b])
    probe.run(ladder, [a, b, e4])
    assert timing == ["a", "b", "a-E4"], "each once"
    before = probe.seconds_per_token(ladder)
    assert before == {"a": 1.0, "b": 2.0, "a-E4": 3.0}
    changed = ladder._replace(arms=[a, b._replace(flags={**b.flags, "decoder-layers": 3}), e4])
    assert probe.seconds_per_token(changed) == {"a": 1.0, "a-E4": 3.0}, "b has changed since"
    probe.run(changed, [a])
    assert timing[3:] == ["b"] and probe.seconds_per_token(changed) == {**before, "b": 4.0}


def test_times_on_different_cores_are_not_mixed(folder, tmp_path, timing, monkeypatch, capsys):
    ladder = stages.read(write(folder))._replace(out=tmp_path)
    a, b, e4, narrow = ladder.arms
    probe.run(ladder, [a, b])
    monkeypatch.setattr(probe.cores, "usable", lambda: 16)
    stop = iter([None, KeyboardInterrupt])

    def call(*_):
        if error := next(stop, None):
            raise error

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(probe.Runner, "call", call)
        probe.run(ladder, [e4])
    assert "timing a, b again" in capsys.readouterr().out
    assert probe.seconds_per_token(ladder) == {"a": 3.0}, "b was timed on two cores"
    probe.run(ladder, [e4])
    assert probe.seconds_per_token(ladder).keys() == {"a", "b", "a-E4"}
    assert timing[-2:] == ["b", "a-E4"]


def test_a_probe_that_does_not_say_how_it_timed_counts_as_it_is(folder, tmp_path, timing):
    ladder = stages.read(write(folder))._replace(out=tmp_path)
    old = {"seconds_per_token": {"a": 5.0, "gone": 6.0}, "updates": 10, "threads": 2}
    (tmp_path / "probe.json").write_text(json.dumps(old))
    assert probe.seconds_per_token(ladder) == old["seconds_per_token"]
    probe.run(ladder, ladder.arms[:2])
    assert timing == ["b"] and probe.seconds_per_token(ladder)["a"] == 5.0
    (tmp_path / "probe.json").write_text('{"seconds_per_token": {"a": 5.0}}')
    probe.run(ladder, ladder.arms[:1])
    assert timing == ["b"]


def test_only_the_best_checkpoint_of_an_evaluated_run_is_kept(folder, tmp_path):
    ladder = stages.read(write(folder))._replace(out=tmp_path)
    folders = [ladder.folder(ladder.stages[1], arm, 1) for arm in ladder.arms[:2]]
    names = {"checkpoint_best.pt", "checkpoint_last.pt", "checkpoint_1_5.pt", "train.log"}
    for one in folders:
        one.mkdir(parents=True)
        for name in names:
            (one / name).touch()
    (folders[0] / "evaluation.json").touch()
    running.tidy(ladder)
    left = {path.name for path in folders[0].iterdir()}
    assert left == {"checkpoint_best.pt", "train.log", "evaluation.json"}
    assert {path.name for path in folders[1].iterdir()} == names


@pytest.mark.slow
def test_a_small_ladder_goes_on_where_it_was_killed(folder, monkeypatch, capsys):
    """The probe, all stages, a stop in the second, and the same command once more."""
    fewer = ", arms: [a, b, a-E4]"
    path = write(
        folder, lambda text: re.sub(r"(first|second): {tokens: \d+", lambda m: m[0] + fewer, text)
    )
    out, main = folder / "ladder", command().main
    assert main([str(path), "--probe", "--arms", "a-E4"]) == 0
    speeds = json.loads((out / "probe.json").read_text())["seconds_per_token"]
    assert set(speeds) == {"a", "a-E4"}  # with its base
    assert all(1e-7 < speed < 0.1 for speed in speeds.values())
    assert main([str(path), "--stages", "first"]) == 1
    assert "learning rates are chosen when the stage lr is done" in capsys.readouterr().err
    calls = []
    one = running.cli.main

    def killed(words):
        calls.append(words)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return one(words)

    monkeypatch.setattr(running.cli, "main", killed)
    assert main([str(path), "--jobs", "2"]) == 130
    first = (out / "lr" / "arm-a-lr10-1" / "train.log").read_text()
    assert main([str(path), "--jobs", "2"]) == 0
    assert (out / "lr" / "arm-a-lr10-1" / "train.log").read_text() == first
    found = json.loads((out / "result.json").read_text())
    assert len(found["runs"]) == found["planned"] == 8
    assert {f["tokens"] for f in found["factors"]} == {384, 640}
    assert {f["interval_over"] for f in found["factors"]} == {"units of test text"}
    assert "8 of 8 runs are done" in (out / "report.html").read_text()
    assert re.search(r"^\| a \| 1e-[23] .* \| a, b \|$", (out / "tables.md").read_text(), re.M)
