"""`fairseq-moe forecast`, and the law that it fits to a study."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest

from fairseq_moe_ext.cli import main
from fairseq_moe_ext.errors import UserError
from fairseq_moe_ext.forecast.fit import Point, fit
from fairseq_moe_ext.forecast.laws import S_BASE, Model, saturate
from fairseq_moe_ext.student_t import t_quantile

TRUE = S_BASE._replace(a=-0.2, b=-0.1, c=0.01, d=1.9)


def points(noise=0.0, experts=(1, 8, 64), sizes=(1e6, 2e6, 4e6), seeds=1, law=TRUE):
    """Of a known law."""
    random = np.random.default_rng(1)
    found = []
    for e in experts:
        for n in sizes:
            log_e = math.log10(saturate(e, law.start, law.most))
            log_loss = law.slope(10**log_e) * math.log10(n) + law.b * log_e + law.d
            found += [Point(n, e, 10 ** (log_loss + noise * random.normal())) for _ in range(seeds)]
    return found


def test_exact_points_give_their_law():
    found = fit(points())
    assert found.law == pytest.approx(TRUE, rel=1e-6)
    saving = found.saving(2e6, 32)
    assert saving.value == pytest.approx(TRUE.effective(Model(2e6, 32, 1)) / 2e6, rel=1e-6)
    assert saving.low == pytest.approx(saving.high, rel=1e-3)


def test_intervals_cover_the_truth_as_often_as_they_say():
    """95 of 100 sets of noisy points, give or take four standard deviations of that share."""
    true = TRUE.effective(Model(2e6, 64, 1)) / 2e6
    exact = points(seeds=3)
    random = np.random.default_rng(2)
    inside = 0
    for _ in range(400):
        noisy = [p._replace(loss=p.loss * 10 ** (0.002 * random.normal())) for p in exact]
        low, high = fit(noisy).saving(2e6, 64)[1:]
        inside += low <= true <= high
    assert abs(inside / 400 - 0.95) < 4 * math.sqrt(0.95 * 0.05 / 400)


@pytest.mark.parametrize(
    "few, words",
    [
        (points(experts=(1, 8)), "expert counts 1, 8; a law needs three"),
        (points(experts=(4, 8, 64)), "with dense models"),
        (points(sizes=(1e6,)), "only one size with 1 experts"),
        ([], "none"),
    ],
)
def test_too_few_points(few, words):
    with pytest.raises(UserError, match=words):
        fit(few)


def of_perplexities(dense, sizes=(1e6, 3e6)):
    """With experts that are better by the same at every size."""
    return [
        Point(size, e, math.log(perplexity * e**-0.1))
        for size, perplexity in zip(sizes, dense)
        for e in (1, 8, 32)
    ]


@pytest.mark.parametrize("dense", [(100, 104), (100, 100)])
def test_dense_models_that_do_not_get_better_give_no_law(dense, tmp_path, capsys):
    path = study(tmp_path / "result.json", of_perplexities(dense))
    assert run("--params", "2M", "--experts", "16", "--fit", path) == 1
    error = capsys.readouterr().err
    said = "its larger dense models are not better, and a saving is measured along them"
    assert f"--fit {path}: {said}" in error and error.count("\n") == 1


def test_equal_dense_models_give_no_law_in_any_order():
    found = of_perplexities((100, 100))
    for seed in range(6):
        order = np.random.default_rng(seed).permutation(len(found))
        with pytest.raises(UserError, match="its larger dense models are not better"):
            fit([found[place] for place in order])


def test_dense_models_that_hardly_get_better_are_doubtful(tmp_path, capsys):
    doubt = "its larger dense models are not better beyond doubt (95 % interval)"
    for dense, doubtful in (((100, 99.9), True), ((100, 80), False)):
        worse = [p._replace(loss=p.loss * 1.001) for p in of_perplexities(dense)[::2]]
        path = study(tmp_path / "result.json", of_perplexities(dense) + worse)
        assert run("--params", "2M", "--experts", "16", "--fit", path) == 0
        assert (doubt in capsys.readouterr().out) == doubtful


def test_the_slope_of_dense_models_has_the_interval_of_least_squares():
    """With Ê counted from the dense model's, the dense models' slope is one coefficient of plain
    least squares, whose interval has a formula."""
    exact = points()
    n = np.log10([p.size for p in exact])
    e = np.log10([saturate(p.experts, TRUE.start, TRUE.most) / TRUE.start for p in exact])
    inputs = np.stack([n, e, n * e, np.ones_like(n)], axis=1)
    inverse, freedom = np.linalg.inv(inputs.T @ inputs), len(exact) - 4
    random = np.random.default_rng(3)
    for _ in range(50):
        noisy = [p._replace(loss=p.loss * 10 ** (0.03 * random.normal())) for p in exact]
        loss = np.log10([p.loss for p in noisy])
        best = inverse @ inputs.T @ loss
        variance = ((loss - inputs @ best) ** 2).sum() / freedom
        wide = t_quantile(0.975, freedom) * math.sqrt(variance * inverse[0, 0])
        expected = (best[0], best[0] - wide, best[0] + wide)
        if best[0] >= 0:
            with pytest.raises(UserError, match="not better"):
                fit(noisy)
        else:
            assert fit(noisy).dense_slope == pytest.approx(expected)


def test_a_saving_beyond_numbers_has_no_number(tmp_path, capsys):
    """Here the loss falls with the size to the power of -0.00001, exactly."""
    flat = TRUE._replace(a=-1e-5, c=0)
    path = study(tmp_path / "result.json", points(law=flat))
    assert run("--params", "2M", "--experts", "32", "--fit", path) == 0
    out, err = capsys.readouterr()
    assert re.search(r"your study +more than any +- +-", out) and "inf" not in out and not err
    assert run("--params", "2M", "--experts", "32", "--fit", path, "--json") == 0
    answer = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert answer["fit"]["saving"] is None and answer["fit"]["interval"] == [None, None]


def study(path, found, **more):
    runs = [
        {
            "flops": 6 * p.size * 1e6,
            "tokens": 1e6,
            "experts": p.experts,
            "sets": {"near": {"perplexity": math.exp(p.loss), "tokens": 100}},
            "mean": {"in_domain": {"perplexity": math.exp(p.loss)}},
            "protocol": {"context": 32, "stride": 32},
            **more,
        }
        for p in found
    ]
    path.write_text(json.dumps({"runs": runs, "planned": len(runs), "factors": {}}))
    return str(path)


def run(*words):
    return main(["forecast", *words])


def test_forecast_of_a_study(tmp_path, capsys):
    path = study(tmp_path / "result.json", points(noise=0.001, seeds=3))
    assert run("--params", "2M", "--experts", "128", "--top-k", "2", "--fit", path) == 0
    out = capsys.readouterr().out
    assert "all rows: 1M tokens, the study's" in out
    assert "your study: has its own kind of model, without --top-k" in out
    assert "your study" in out and "95 % interval" in out
    assert "--experts 128 is outside its 1 to 64" in out
    assert run("--params", "2M", "--experts", "32", "--fit", path, "--json") == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["model"]["tokens"] == 1e6
    found = answer["fit"]
    low, high = found["interval"]
    assert low < found["saving"] < high and found["points"] == 27 and not found["outside"]


def test_the_paper_and_the_table(capsys):
    assert run("--params", "125M", "--experts", "512", "--top-k", "2", "--tokens", "300B") == 0
    out = capsys.readouterr().out
    assert "977M" in out and "7.82" in out
    assert "tokens 300B (fitted at 130B)" in out and "experts per token 2" in out
    assert run("--table", "--markdown") == 0
    assert "| 125M, S-BASE | 247 (2.0) |" in capsys.readouterr().out


def test_granularity_splits_experts_as_wide_as_the_base(capsys):
    """The published formulas for 256 experts of a quarter of the width, four per token, in every
    second layer: by bisection, a dense model of so many parameters has the same loss."""
    flags = ["--experts", "64", "--granularity", "4", "--law", "krajewski", "--json"]
    assert run("--params", "125M", "--tokens", "130B", *flags) == 0
    (found,) = json.loads(capsys.readouterr().out)["laws"]
    width = 0.5 * 125e6 * 8 / 12 / 4  # of the parameters, what a narrow expert has
    parameters = 125e6 - 4 * width + 256 * width
    loss = (2.1 / 4**0.58 + 18.1) / parameters**0.115 + 30.8 / 130e9**0.147
    assert 16.3 / found["effective"] ** 0.126 + 26.7 / 130e9**0.127 == pytest.approx(loss)
    assert found["saving"] == pytest.approx(found["effective"] / 125e6)
    with pytest.raises(SystemExit):
        run("--help")
    said = " ".join(capsys.readouterr().out.split())
    assert "G times as many experts in a layer and per token, each 1/G as wide" in said


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--experts", "0"], "--experts 0: use 1 or more"),
        (["--top-k", "9", "--experts", "8"], "--top-k 9 is more than --experts 8"),
        (["--granularity", "0"], "--granularity 0.0"),
        (["--moe-freq", "-1"], "--moe-freq -1"),
        (["--experts", "9" * 400], "99: use 1 or more, and at most 1,000,000,000"),
        (["--fit", "no-such.json"], "no-such.json"),
        (["--fit", "no-such.json", "--tokens", "16M"], "--tokens 16M: with --fit the tokens are"),
        (["--group", "books"], "--group books: is a study's; add --fit"),
        (["--table", "--params", "2M"], "--table has models of its own: drop it, or drop --params"),
    ],
)
def test_mistakes(flags, words, capsys):
    assert run(*flags) == 1
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "text", ["-1M", "0", "many", "1e999", "nan", "1..5M", "1e308T", "1e308", "101T"]
)
@pytest.mark.parametrize("flag", ["--params", "--tokens"])
def test_amounts(flag, text, capsys):
    with pytest.raises(SystemExit):
        run(flag, text)
    assert f"{flag}: {text!r}: use a number above 0 and at most 100T" in capsys.readouterr().err


def test_what_a_law_does_not_count_or_know_is_said(capsys):
    flags = ["--params", "125M", "--experts", "64", "--tokens", "1T", "--granularity", "4"]
    assert run(*flags) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    said = [line for line in lines if "granularity 4 (the law takes no account of it)" in line]
    laws = ("Clark, S-BASE", "Clark, RL-R", "Clark, hash", "Ludziejewski", "Abnar")
    assert [line.partition(" (arXiv")[0] for line in said] == [*laws]
    assert last == (
        "not checked, because the range is not known: Krajewski (size); "
        "Ludziejewski (smallest size, experts); Abnar (size, experts)"
    )
    assert run(*flags, "--law", "hash") == 0
    assert "not checked" not in capsys.readouterr().out


def test_a_loss_that_no_model_has_gives_no_number(capsys):
    """A model of a millionth of a parameter."""
    flags = ["--params", "0.000001", "--experts", "8", "--law", "abnar"]
    assert run(*flags) == 0
    assert re.search(r"Abnar +less than any +- +-\n", capsys.readouterr().out)
    assert run(*flags, "--json") == 0
    (found,) = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)["laws"]
    assert found["effective"] is found["times_base"] is found["saving"] is None
    assert found["bound"] == "less than any"


def test_studies_that_do_not_say_enough(tmp_path, capsys):
    path = study(tmp_path / "result.json", points())
    assert run("--fit", path, "--group", "books") == 1
    assert "--group books: not in" in capsys.readouterr().err
    result = json.loads(open(path).read())
    del result["runs"][0]["experts"]
    (tmp_path / "old.json").write_text(json.dumps(result))
    assert run("--fit", str(tmp_path / "old.json")) == 1
    assert "does not record how many experts" in capsys.readouterr().err
    (tmp_path / "ladder.json").write_text(json.dumps({**result, "ladder": {}}))
    assert run("--fit", str(tmp_path / "ladder.json")) == 1
    assert "ladder.json: is a ladder's, with several numbers" in capsys.readouterr().err
    (tmp_path / "none.json").write_text("[]")
    assert run("--fit", str(tmp_path / "none.json")) == 1
    assert "none.json: lacks factors and runs: run `fairseq-moe study`" in capsys.readouterr().err
    (tmp_path / "empty.json").write_text('{"runs": [], "planned": 1, "factors": {}}')
    assert run("--fit", str(tmp_path / "empty.json")) == 1
    assert "empty.json: contains no runs: run `fairseq-moe study`" in capsys.readouterr().err
    (tmp_path / "other.json").write_text('{"runs": ["x"], "planned": 1, "factors": {}}')
    assert run("--fit", str(tmp_path / "other.json")) == 1
    assert "other.json: not in the format that was written (TypeError: " in capsys.readouterr().err
    result = json.loads(open(path).read())
    result["runs"][0]["mean"]["in_domain"]["perplexity"] = 1.0  # a loss of 0 has no logarithm
    (tmp_path / "one.json").write_text(json.dumps(result))
    assert run("--fit", str(tmp_path / "one.json")) == 1
    assert "one.json: not in the format" in capsys.readouterr().err


def test_a_training_that_diverged_is_named(tmp_path, capsys):
    path = Path(study(tmp_path / "result.json", points(), family="moe", size="tiny", seed=1))
    result = json.loads(path.read_text())
    result["runs"][4].update(size="small", seed=2)
    result["runs"][4]["mean"]["in_domain"]["perplexity"] = None  # infinity, in JSON
    path.write_text(json.dumps(result))
    assert run("--fit", str(path)) == 1
    said = f"error: --fit {path}: moe small with seed 2 diverged (infinite perplexity): lower its"
    assert capsys.readouterr().err.startswith(said)
    assert run("--fit", str(path), "--group", "near") == 0


def test_a_study_of_too_few_models_is_named(tmp_path, capsys):
    path = study(tmp_path / "result.json", [p for p in points() if p.experts == 1])
    assert run("--fit", path) == 1
    assert f"error: --fit {path}: the points have the expert counts 1; " in capsys.readouterr().err


def test_runs_that_cannot_be_compared_are_not_fitted(tmp_path, capsys):
    path = Path(study(tmp_path / "result.json", points()))

    def answer(change):
        result = json.loads(path.read_text())
        change(result)
        (tmp_path / "changed.json").write_text(json.dumps(result))
        assert run("--fit", str(tmp_path / "changed.json")) == 1
        return capsys.readouterr().err

    words = "changed.json: not measured on the same text or questions in every run: run"
    assert words in answer(lambda result: result["runs"][-1]["protocol"].update(stride=8))
    assert words in answer(lambda result: result["runs"][-1]["sets"]["near"].update(tokens=99))
    assert "changed.json: is of a study of arms" in answer(
        lambda result: result.update(reference="top-2")
    )


def test_the_page(capsys):
    """The command of docs/forecast.md, and every number that the page says it prints."""
    page = (Path(__file__).parents[2] / "docs" / "forecast.md").read_text(encoding="utf-8")
    command = re.search(r"```bash\n(.*?)\n```", page, flags=re.S)[1].split()
    assert command[:2] == ["fairseq-moe", "forecast"] and main(command[1:]) == 0
    assert re.search(r"Clark, S-BASE +977M +7\.82 +5\.86", capsys.readouterr().out)
    words = " ".join(page.split())
    assert "dense base. Clark et al.'s S-BASE predicts 7.82." in words
    assert "so S-BASE predicts 5.86. The paper's Figure 1, which also divides" in words
    assert run("--params", "5M", "--experts", "64", "--tokens", "60M", "--moe-freq", "1") == 0
    savings = [line.split()[-1] for line in capsys.readouterr().out.splitlines()[1:7]]
    assert min(savings, key=float) == "0.69" and max(savings, key=float) == "12.85"
    assert "0.69 (Ludziejewski et al.) to 12.85 (Krajewski et al.)" in words
