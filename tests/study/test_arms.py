"""A study of arms: its file, its tables, and examples/routers."""

import importlib.util
import json
import math
import re
from pathlib import Path

import pytest

from fairseq_moe_ext import cli
from fairseq_moe_ext.config import MoETransformerLMConfig
from fairseq_moe_ext.config_checks import validate
from fairseq_moe_ext.cost import parameters, training_flops_per_token
from fairseq_moe_ext.models.architectures import ARCHITECTURES
from fairseq_moe_ext.shape import shape_of
from fairseq_moe_ext.student_t import t_quantile
from fairseq_moe_ext.study import arms, command, finished, logs, plan, result, yaml_file
from fairseq_moe_ext.study.paired import holm, paired
from fairseq_moe_ext.study.plan import Run
from fairseq_moe_ext.study.router_metrics import router_metrics

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "routers"

ARMS = """\
title: Arms
data: {folder}/data
out: {folder}/arms
context: 32
updates: 3
seeds: [1, 2]
reference: top-2
train: {{batch-size: 4, optimizer: adam, lr: 0.01, cpu: true, num-workers: 0, log-interval: 1,
  decoder-layers: 2, decoder-attention-heads: 2, decoder-embed-dim: 8, decoder-ffn-embed-dim: 32}}
evaluate: {{bootstrap: 20}}
arms:
  dense: {{arch: dense_lm_tiny}}
  top-2: {{arch: moe_lm_tiny, flags: {{moe-expert-ffn-dim: 16, moe-dropless: true}}}}
  biased: {{arch: moe_lm_tiny, flags: {{moe-expert-ffn-dim: 16, moe-dropless: true,
    moe-balance: bias, moe-score: sigmoid}}}}
"""


def write(folder, change=lambda text: text):
    path = folder / "arms.yaml"
    path.write_text(change(ARMS.format(folder=folder)))
    return path


@pytest.mark.parametrize(
    "old, new, words",
    [
        ("reference: top-2", "", "reference missing: name the arm"),
        ("reference: top-2", "reference: top-3", "one of dense, top-2, biased"),
        ("arms:", "dense: {arch: dense_lm_tiny, sizes: {}}\narms:", "arms and dense"),
        ("arch: dense_lm_tiny", "arc: dense_lm_tiny", "arms: dense: unknown key 'arc'"),
        ("{arch: dense_lm_tiny}", "{flags: {}}", "arms: dense: the key 'arch' is missing"),
        ("moe-dropless: true}", "lr: -1}", "arms: top-2: lr -1 is out of range"),
        (
            "moe-dropless: true}",
            "batch-size: 32}",
            "arms: top-2: batch-size: move it to train: all",
        ),
        ("moe-dropless: true}", "patience: 1}", "arms: top-2: patience: remove it: every run"),
        ("  dense:", "  den se:", "arms: den se: use letters"),
        ("arms:", "arm:", "unknown key 'arm'"),
    ],
)
def test_mistakes_in_the_file(folder, old, new, words, capsys):
    path = write(folder, lambda text: text.replace(old, new, 1))
    assert cli.main(["study", str(path)]) == 1
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def test_runs_of_a_file(folder):
    runs = plan.read(write(folder)).runs
    names = [(run.size, run.seed) for run in runs]
    assert names == [(arm, seed) for seed in (1, 2) for arm in ("dense", "top-2", "biased")]
    assert "--moe-balance bias" in " ".join(runs[2].train)


def run_of(arm, seed, perplexity, **router):
    one = {"perplexity": perplexity}
    run = {"family": "arm", "size": arm, "seed": seed, "flops": 2e12, "tokens": 10, "seconds": 60.0}
    run.update(sets={"near": one}, mean={"in_domain": one}, router=router)
    return run


def made_result():
    """c is 3 % below a in each seed, up to 0.1 %; b differs by chance alone."""
    runs = []
    for seed, of_seed in ((1, 100.0), (2, 120.0), (3, 90.0)):
        metrics = {"load_max": 2.0, "overflow": 0.0, "experts_per_token": 2.0}
        runs.append(run_of("a", seed, of_seed, **metrics, flops_per_token=1.5e11))
        runs.append(
            run_of(
                "b", seed, of_seed * (1 + 0.02 * (seed - 2)), **metrics | {"flops_per_token": 2e11}
            )
        )
        runs.append(run_of("c", seed, of_seed * 0.97 * (1 + 0.001 * (seed - 2))))
    result = {"title": "T", "planned": 12, "runs": runs, "reference": "a", "factors": {}}
    return {**result, "comparison": arms.compare(runs, "a")}


def test_differences_are_paired_by_seed():
    result = made_result()
    found = result["comparison"]["in_domain"]
    logs = [math.log(0.97 * (1 + 0.001 * d)) for d in (-1, 0, 1)]
    mean = sum(logs) / 3
    half = 4.302653 * math.sqrt(sum((x - mean) ** 2 for x in logs) / 2 / 3)
    assert found["c"]["difference"] == pytest.approx(100 * math.expm1(mean))
    ends = [100 * math.expm1(mean - half), 100 * math.expm1(mean + half)]
    assert found["c"]["interval"] == pytest.approx(ends, rel=1e-5)
    assert found["c"]["real"] and not found["b"]["real"]
    assert "a" not in found
    head, *rows = arms.table(result)
    assert [row[0] for row in rows] == ["c", "b", "a"]
    cells = {row[0]: dict(zip(head, row)) for row in rows}
    assert cells["a"]["against a, %"] == "reference" and cells["a"]["FLOPs"] == "1.5e+12"
    assert cells["c"]["significant"] == "yes" and cells["c"]["load"] == ""
    assert cells["c"]["FLOPs"] == "2e+12"
    assert cells["b"]["load"] == "2.00" and cells["b"]["dropped, %"] == "0.00"
    page = arms.page(result)
    assert "9 of 12 runs are finished" in page and "**−3.0**" in page and "**+3.1**" in page


def test_one_seed_has_no_interval():
    runs = [run_of("a", 1, 10.0), run_of("b", 1, 11.0)]
    found = arms.compare(runs, "a")["in_domain"]["b"]
    assert found["interval"] == [] and found["p"] is None and not found["real"]
    json.dumps(found, allow_nan=False)


def test_arms_with_one_seed_in_common_do_not_hide_others():
    """Of 25 arms one has one seed, so no p."""
    runs = [run_of("a", seed, 100.0 + seed) for seed in (1, 2, 3)]
    runs.append(run_of("once", 1, 90.0))
    for arm in range(24):
        for seed in (1, 2, 3):
            runs.append(run_of(f"b{arm}", seed, (100.0 + seed) * (0.5 + 1e-5 * seed)))
    found = arms.compare(runs, "a")["in_domain"]
    assert found.pop("once")["p"] is None
    assert all(compared["real"] for compared in found.values())


@pytest.mark.parametrize("diverged", ["a", "b"])
def test_an_arm_that_diverged_is_not_compared(diverged):
    """Its perplexity is infinite; the seeds that are left would flatter it."""
    runs = [
        run_of(arm, seed, math.inf if (arm, seed) == (diverged, 1) else 10.0 + seed)
        for arm in "abc"
        for seed in (1, 2)
    ]
    found = arms.compare(runs, "a")
    assert found["in_domain"].keys() == ({"c"} if diverged == "b" else set())
    result = {"title": "", "planned": 6, "runs": runs, "reference": "a", "comparison": found}
    rows = {row[0]: row for row in arms.table(result)}
    assert rows[diverged][2].startswith("inf") and "diverged" in rows["b"][3]
    assert "inf" in arms.page(result)


def test_runs_that_were_evaluated_otherwise_are_not_compared():
    runs = [run_of(arm, seed, 10.0 + seed) for arm in "abc" for seed in (1, 2)]
    for run in runs:
        run["protocol"] = {"context": 32, "stride": 32}
    for run in runs[3:]:
        run["protocol"] = {"context": 32, "stride": 8}
    assert arms.compare(runs, "a")["in_domain"].keys() == {"b"}
    assert arms.compare(runs, "a")["in_domain"]["b"]["p"] is None, "of seed 1 alone"
    result = {"runs": runs, "reference": "a", "comparison": arms.compare(runs, "a")}
    rows = {row[0]: row for row in arms.table(result)}
    assert rows["c"][3] == "no seed in common on the same text, or diverged"
    assert arms.pairs(result, "in_domain")[0][1][3] == ""  # a and c
    runs[1]["sets"]["near"] = {"perplexity": 9.0, "tokens": 5}
    runs[4]["sets"]["near"] = {"perplexity": 9.0, "tokens": 6}
    assert arms.shared({1: runs[1]}, {1: runs[4]}, "in_domain") == []


def test_no_mean_of_runs_of_different_text():
    made = made_result()
    assert "different text" not in str(arms.table(made))
    name = made["runs"][0]["size"]
    mine = [run for run in made["runs"] if run["size"] == name]
    for run, text in zip(mine, ("8f", "9a")):
        run["text"] = text
    rows = {row[0]: row for row in arms.table(made)[1:]}
    assert rows[name][2] == "different text"
    assert all(row[2] != "different text" for arm, row in rows.items() if arm != name)


def test_pairs_without_an_interval_are_not_counted_among_the_bold():
    """Of 15 arms there are 105 pairs, and five are 5 % of them."""
    runs = [run_of(f"a{arm}", seed, 10.0 + arm + seed) for arm in range(15) for seed in (1, 2)]

    def page(runs):
        known = {"title": "", "planned": 1, "reference": "a0"}
        return arms.page({**known, "runs": runs, "comparison": arms.compare(runs, "a0")})

    assert "about 5 of these pairs would be bold" in page(runs)
    # seven have one seed, one is on other text: 21 pairs are left of the seven others
    for run in runs[:2]:
        run["sets"]["near"] = {"perplexity": 9.0, "tokens": 5}
    fewer = [run for i, run in enumerate(runs) if i < 16 or run["seed"] == 1]
    assert "about 1 of these pairs would be bold" in page(fewer)
    alone = page([run for run in runs if run["seed"] == 1])
    assert "Row against column, perplexity in %.\n" in alone and "bold" not in alone


def test_student_and_holm():
    """By a table of Student's t, and by hand."""
    for freedom, t in ((1, 12.7062), (2, 4.3027), (3, 3.1824), (9, 2.2622), (30, 2.0423)):
        assert t_quantile(0.975, freedom) == pytest.approx(t, abs=1e-4)
    one = paired([1.0, 2.0, 3.0])
    assert one.low == pytest.approx(2 - 4.3027 / math.sqrt(3), abs=1e-3)
    assert one.p == pytest.approx(0.07418, abs=1e-5)  # t = 2 sqrt(3)
    p = {"a": 0.01, "b": 0.03, "c": 0.02, "d": math.nan}
    assert holm(p) == ["a", "c", "b"], "d is no comparison"
    assert holm({**p, "d": 0.9}) == ["a"]  # 0.05 / 4; then 0.02 > 0.05 / 3
    assert holm({"a": 0.01, "b": 0.03, "c": 0.02}) == ["a", "c", "b"]


def write_line(log, tag, values):
    with open(log, "a") as file:
        file.write(f"now | INFO | {tag} | {json.dumps(values)}\n")


def test_a_validation_that_a_resumed_run_repeated_counts_once(tmp_path):
    log = tmp_path / "train.log"
    for epoch, updates, accuracy in ((1, 5, 0.5), (2, 10, 0.6), (2, 10, 0.7), (3, 15, 0.8)):
        values = {"valid_accuracy": str(accuracy), "valid_num_updates": str(updates)}
        write_line(log, "valid", {"epoch": epoch, **values})
    assert logs.by_epoch(log, "valid", "valid_accuracy") == [0.5, 0.7, 0.8]


FALLS_BACK = "now | INFO | fairseq_moe_ext.models.precision | --bf16: computing in float32, because"


@pytest.mark.parametrize(
    "lines, precision",
    [
        ([], ""),
        (["'amp': False"], "float32"),
        (["'bf16': True"], "bfloat16"),
        (["'bf16': True", FALLS_BACK], "float32"),
        (["'memory_efficient_bf16': True"], "bfloat16"),
        (["'memory_efficient_fp16': True"], "float16"),
        (["'bf16': True", "'bf16': True", FALLS_BACK], "bfloat16 and float32"),
        (["'bf16': True", FALLS_BACK, "'bf16': True, 'x': 1", FALLS_BACK], "float32"),
    ],
)
def test_the_precision_of_a_training(tmp_path, lines, precision):
    """Other settings of fairseq have keys of the same names."""
    log = tmp_path / "train.log"
    starts = "now | INFO | fairseq_cli.train | {{'_name': None, 'common': {{'seed': 1, {}}}, {}}}\n"
    others = "'optimizer': {'fp16': True}, 'bf16': True"
    log.write_text(
        "".join(
            starts.format(line, others) if line != FALLS_BACK else line + "\n" for line in lines
        )
    )
    assert logs.precision(log) == precision


def test_a_result_says_in_what_trainings_computed():
    runs = [{"size": "a", "precision": "float32"}, {"size": "b", "precision": "bfloat16"}]
    assert result.computed_in(runs[:1] * 2) == "Trainings computed in float32."
    said = "Trainings computed in float32 a, c; in bfloat16 b."
    assert result.computed_in([*runs, {**runs[0], "size": "c"}]) == said
    assert result.computed_in([{"size": "a"}]) == "", "an older result"


def test_flops_are_those_that_were_computed(tmp_path):
    values = [dict(load_max=9, overflow=0, experts_per_token=4)] * 5
    values += [dict(load_max=3, overflow=50, experts_per_token=2)] * 5
    lines = [f"now | INFO | train_inner | {json.dumps(v)}\n" for v in values]
    (tmp_path / "train.log").write_text("".join(lines))
    shape = shape_of({**vars(MoETransformerLMConfig()), "moe_freq": 1, "moe_expert_count": 8}, 40)
    found = router_metrics(tmp_path / "train.log", shape, 32)
    assert found["load_max"] == 3 and found["overflow"] == 50 and found["experts_per_token"] == 3
    cost = [training_flops_per_token(shape._replace(top_k=k), 32) for k in (1, 4)]
    assert found["flops_per_token"] == pytest.approx(sum(cost) / 2)
    logged = [{**v, "epoch": 1, "num_updates": str(10 * i)} for i, v in enumerate(values)]
    for v in (*logged[:6], *logged[3:]):  # killed behind update 50, resumed at 20
        write_line(tmp_path / "resumed.log", "train_inner", v)
    assert router_metrics(tmp_path / "resumed.log", shape, 32) == found
    (tmp_path / "dense.log").write_text('now | INFO | train_inner | {"loss": 3}\n')
    assert router_metrics(tmp_path / "dense.log", shape, 32) == {}


@pytest.mark.parametrize("taken, counted", [((6, 3), 4.5), ((2, 2), 2), ((), 2)])
def test_factors_count_the_experts_that_the_router_took(tmp_path, monkeypatch, taken, counted):
    """For a run of a study or a ladder whose flags ask for two; without a log of it, these."""
    for number in taken:
        values = dict(load_max=9, overflow=50, experts_per_token=number)
        write_line(tmp_path / "train.log", "train_inner", values)
    write_line(tmp_path / "train.log", "train", {"epoch": 1, "train_train_wall": 9})
    measured = {"perplexity": 9.0}
    evaluation = {"sets": {"x": measured}, "mean": {"in_domain": measured}}
    (tmp_path / "evaluation.json").write_text(json.dumps(evaluation))
    settings = {**vars(MoETransformerLMConfig()), "moe_freq": 1, "moe_expert_count": 8}
    monkeypatch.setattr(finished, "settings_of", lambda path: (settings, 40))
    found = finished.of_run(Run("moe", "a", 1, 3, tmp_path, [], [], []), 32, 128)
    shape = shape_of({**settings, "moe_top_k": 1}, 40)._replace(experts_per_token=counted)
    assert found["flops"] == 3 * 128 * training_flops_per_token(shape, 32)
    assert found["active"] == parameters(shape).active
    more = {**found, "seed": 2, "flops": 2 * found["flops"]}
    assert result.points([found, more], "moe", "x") == [(1.5 * found["flops"], 9.0)]


def configs():
    """Each arm of the example, as a model's settings."""
    asked = yaml_file.read(EXAMPLE / "two_cores.yaml")
    for name, arm in asked["arms"].items():
        flags = {**asked["train"], **arm.get("flags", {})}
        flags = {key.replace("-", "_"): value for key, value in flags.items()}
        known = {key for key in vars(MoETransformerLMConfig())}
        settings = {**ARCHITECTURES[arm["arch"]], **{k: v for k, v in flags.items() if k in known}}
        task = dict(tokens_per_sample=256, max_target_positions=None)
        yield name, MoETransformerLMConfig(**{**settings, **task, "batch_size": 8})


def test_the_example_compares_at_equal_flops_and_parameters():
    flops, sizes = {}, {}
    for name, cfg in configs():
        validate(cfg)
        shape = shape_of(cfg, 4104)
        flops[name] = training_flops_per_token(shape, 256)
        sizes[name] = parameters(shape).total
    assert len(flops) == 12 and len(set(flops.values())) == 1, flops
    sparse = [size for name, size in sizes.items() if name != "dense"]
    assert max(sparse) < 1.01 * min(sparse), sizes  # gates differ, and biases of experts


def test_the_short_example_is_the_whole_one_with_less(tmp_path):
    spec = importlib.util.spec_from_file_location("routers_run", EXAMPLE / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    short, full = (yaml_file.read(f) for f in (module.short(tmp_path / "s"), module.FULL))
    assert short["arms"] == full["arms"] and short["updates"] == 20
    assert Path(short["out"]) == tmp_path / "s" and len(short["seeds"]) == 2


def test_a_comparison_that_cannot_be_written_is_found_before_the_first_run(
    folder, monkeypatch, capsys
):
    monkeypatch.setattr(command, "_Work", lambda *_: pytest.fail("a run began"))
    path = write(folder, lambda text: text.replace("/arms", "/taken"))
    (folder / "taken" / "comparison.md").mkdir(parents=True)
    assert cli.main(["study", str(path)]) == 1
    assert "taken/comparison.md: a folder, not a file" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_study_of_arms_from_file_to_table(folder, capsys):
    path = write(folder)
    assert cli.main(["study", str(path), "--jobs", "2"]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"^top-2 .*reference", shown, flags=re.M)
    found = json.loads((folder / "arms" / "result.json").read_text())
    assert {run["size"] for run in found["runs"]} == {"dense", "top-2", "biased"}
    for run in found["runs"]:
        assert bool(run["router"]) == (run["size"] != "dense")
    assert set(found["comparison"]["in_domain"]) == {"dense", "biased"}
    assert "## Every pair, in domain" in (folder / "arms" / "comparison.md").read_text()
    assert cli.main(["study", str(path)]) == 0, "again: nothing to do"
    assert cli.main(["report", str(folder / "arms")]) == 1
    assert "comparison.md" in capsys.readouterr().err


def test_the_committed_comparison_is_that_of_its_result():
    """examples/routers/two_cores.md; two arms computed more than the others."""
    routers = Path(__file__).resolve().parents[2] / "examples" / "routers"
    result = json.loads((routers / "two_cores.json").read_text(encoding="utf-8"))
    assert arms.page(result) == (routers / "two_cores.md").read_text(encoding="utf-8")
    assert arms.compare(result["runs"], "top-2") == result["comparison"]
    runs = arms.by_arm(result["runs"])
    flops = {
        name: [run["router"].get("flops_per_token", 0) for run in of.values()]
        for name, of in runs.items()
    }
    more = {name for name in flops if min(flops[name]) > max(flops["top-2"])}
    assert more == {"relu", "threshold"}
