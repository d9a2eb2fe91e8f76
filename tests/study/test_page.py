"""The study's page: its numbers, and how a browser opens it."""

import json
import math
import re
import shutil
import struct
import subprocess
from xml.etree import ElementTree

import pytest
from study_results import made_result

from fairseq_moe_ext import cli, outputs
from fairseq_moe_ext.evaluation import paper
from fairseq_moe_ext.study import result, tables


def test_the_page_shows_the_numbers_and_nothing_from_outside(tmp_path, capsys):
    found = made_result(tmp_path)
    use = [{"layer": 1, "tokens": {"near": 9}, "share": {"near": [0.25, 0.75], "far": [1.0, 0.0]}}]
    told = {"bits": 0.55, "bias": 0.05, "random": [0.61, 0.63], "random_mean": 0.62}
    told.update(random_sd=0.014, left=-0.12, above=False)
    use.append({**use[0], "layer": 2})
    use[0]["information"] = {"domain": told, "token": told}
    (tmp_path / "use.json").write_text(json.dumps(use))
    rows = {"dense": {"mean": 61.23, "deviation": 0.5}, "plain": {"mean": 50, "deviation": None}}
    rows["frozen gate"] = {"mean": 51.5, "deviation": 0.25, "difference": -1.5}
    before = {"dense": {"accuracy": 33.0}, "moe": {"accuracy": 34.0}}
    before["dense"].update(interval=[30.0, 36.0], chance=50.0)
    tuned = {"rows": rows, "before": before, "settings": {"questions": {"test": 400}}}
    tuned["runs"] = [{"row": "dense", "precision": "float32"}]
    (tmp_path / "tuned.json").write_text(json.dumps(tuned))
    line = ["report", str(tmp_path), "--expert-use", str(tmp_path / "use.json")]
    line += ["--fine-tuning", str(tmp_path / "tuned.json")]
    assert cli.main(line) == 0, capsys.readouterr().err
    html = (tmp_path / "report.html").read_text()
    assert "T &lt;b&gt;" in html and not re.search(r"https?:|<script|<link|<img|src=", html)
    for row in result.table(found)[1:]:
        assert f"<td>{row[1]}</td>" in html and f"<td>{row[2]}</td>" in html
    assert "30.15 ± 0.05" in html and "<td>2.00</td>" in html, "perplexity over seeds, dropped"
    assert "paper: 8 to 16" in html
    assert "Layer 1: 0.50 bits, random 0.62 ± 0.01" in html and "Layer 2</text>" in html
    assert "By set nothing can be said" in html, "of the second layer there is no control"
    # accuracy of copa, mean of 35 and 45; 1.96 standard errors are 0.96
    row = "<td>10,000</td><td>3</td><td>0</td><td>25.0</td><td>40.0 (39.0 to 41.0)</td>"
    assert "copa, 0 shots" in html and row in html
    assert "mean of 1 task, 0 shots" in html
    assert "drawn, mean of 1 task: not comparable with the paper&#39;s" in html
    assert "stereoset, ICAT" in html and "<td>82.5</td>" in html, "mean of 82 and 83"
    assert "stereoset intersentence, ICAT" in html and "<td>72.5</td>" in html, "of 72 and 73"
    assert 'only the rows "intersentence" are' in html
    assert "<td>77.4</td>" in html, "ICAT of the paper's 125M"
    assert "MoE, frozen gate" in html and "<td>−1.5</td>" in html
    assert "<td>50.0</td><td>33.0 (30.0 to 36.0)</td><td>61.2 (56.4 to 65.9)</td>" in html
    assert "95 % interval over questions. Trainings computed in float32.</p>" in html
    assert "<td>34.0 (interval not known)</td>" in html and "<td>one seed</td>" in html
    for mean in ("71.3", "75.1", "79.1", "84.3", "65.5", "68.8", "67.4"):  # shared/paper.md
        assert f"<td>{mean}</td>" in html, "the paper's mean of eight tasks"
    names = {path.name for path in (tmp_path / "figures").iterdir()}
    assert {"speedup-in_domain.svg", "performance-far.svg", "paper-speedup-0-shot.svg"} <= names
    for path in (tmp_path / "figures").iterdir():
        assert ElementTree.parse(path).getroot().tag == "{http://www.w3.org/2000/svg}svg"


def test_sets_with_too_few_units_for_an_interval_are_named(tmp_path):
    found = made_result(tmp_path)
    said = "Intervals over test text are rough for sets with fewer than 20 units of it: near (19)."
    for units, there in ((19, True), (20, False)):
        for run in found["runs"]:
            run["sets"] = {"near": {**run["sets"]["near"], "units": units}, "far": {"units": 30}}
            run["sets"]["far"].update(perplexity=9.0, dropped=None)
        (tmp_path / "result.json").write_text(json.dumps(found))
        assert cli.main(["report", str(tmp_path)]) == 0
        assert (said in (tmp_path / "report.html").read_text()) == there
        assert result.few_units(found["runs"]) == (said if there else "")
    assert result.few_units([{"sets": {"near": {"perplexity": 9.0}}}]) == "", "an older result"


def test_what_of_the_paper_is_not_on_the_page_is_said(tmp_path):
    found = made_result(tmp_path)
    rows = {row[0]: row[1:] for row in tables.contents(found, False, True)[1]}
    assert rows["Speed-up factors, figure 1"][0] == "drawn"
    zero_shot = "Zero-shot accuracy against compute"
    assert rows[zero_shot][0] == "drawn, mean of 1 task: not comparable with the paper's"
    for run in found["runs"]:
        (copa,) = run["priming"]["tasks"]
        run["priming"]["tasks"] = [{**copa, "task": task} for task in paper.SIX_TASKS]
    six = {row[0]: row[1] for row in tables.contents(found, False, True)[1]}
    assert six[zero_shot] == "drawn, mean of the paper's six tasks"
    assert rows["Few-shot accuracy"][0].startswith("not measured")
    assert rows["Use of experts by layer and set"][0] == "not given: --expert-use"
    assert rows["Fine-tuning"] == ["table", "table"]
    for run in found["runs"]:
        run["priming"] = {"mean": {}, "tasks": []}  # as older files have it
    found["factors"] = result.factors(found["runs"])
    (tmp_path / "result.json").write_text(json.dumps(found))
    assert cli.main(["report", str(tmp_path)]) == 0
    html = (tmp_path / "report.html").read_text()
    assert "not measured: `priming` in the study" in html
    assert "This study did not measure bias." in html


def test_a_model_that_diverged_has_no_factor(tmp_path):
    made = made_result(tmp_path, moe=((1e12, math.inf), (4e12, 5.0)))
    outputs.write_json(tmp_path / "result.json", made)
    assert made["factors"]["in_domain"]["curve"] == []
    assert cli.main(["report", str(tmp_path)]) == 0
    page = (tmp_path / "report.html").read_text()
    assert "there is no factor in domain" in page.replace("There", "there") and "inf" in page


def test_a_family_of_one_point_is_drawn_and_said(tmp_path):
    made_result(tmp_path, moe=((1e12, 20.0),))
    assert cli.main(["report", str(tmp_path)]) == 0
    html = (tmp_path / "report.html").read_text()
    assert "<td>no factor</td>" in html and "<td>drawn, 0 of 2 sets</td>" in html
    assert "the MoE family has 1 point" in html and "no measurements" in html
    svg = (tmp_path / "figures" / "performance-near.svg").read_text()
    (drawn,) = re.findall(r'<g class="line s1">(.*?)</g></g>', svg)
    assert drawn.count("<use ") == 1


@pytest.mark.parametrize(
    "flags, content, words",
    [
        (
            [],
            None,
            "result.json: cannot be read (No such file or directory): "
            "run `fairseq-moe study` first",
        ),
        ([], "{", "result.json: not JSON: "),
        ([], "{}", "result.json: lacks factors and runs: run `fairseq-moe study` first"),
        (
            ["--expert-use"],
            "[]",
            "other.json: lacks layer and share: create it with `fairseq-moe expert-use",
        ),
        (
            ["--fine-tuning"],
            '{"rows": 1}',
            "other.json: lacks before and rows: create it with exampl",
        ),
    ],
)
def test_files_that_are_others(tmp_path, flags, content, words, capsys):
    if flags:
        made_result(tmp_path)
    file = tmp_path / ("other.json" if flags else "result.json")
    if content is not None:
        file.write_text(content)
    assert cli.main(["report", str(tmp_path), *flags, *([str(file)] if flags else [])]) == 1
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


FRAME = """<iframe src="report.html" style="width: 375px; height: 800px; border: 0"></iframe><p></p>
<script>onload = () => {
  const page = document.querySelector("iframe").contentDocument.documentElement;
  page.querySelectorAll("details").forEach(part => part.open = true);
  document.querySelector("p").textContent = `width ${page.scrollWidth} of ${page.clientWidth}`;
}</script>"""
BROWSER = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)


@pytest.mark.slow
@pytest.mark.skipif(not BROWSER, reason="no chromium or google-chrome on PATH")
def test_chromium_opens_it_on_a_phone(tmp_path):
    made_result(tmp_path)
    assert cli.main(["report", str(tmp_path)]) == 0
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=390,844"]
    command += [f"--screenshot={tmp_path / 'page.png'}", f"file://{tmp_path / 'report.html'}"]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    assert (tmp_path / "page.png").stat().st_size > 10_000
    # Only tables scroll sideways. A window of Chromium is 500 wide at least, a frame is not.
    (tmp_path / "frame.html").write_text(FRAME)
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    command += ["--allow-file-access-from-files", f"file://{tmp_path / 'frame.html'}"]
    dom = subprocess.run(command, check=True, capture_output=True, timeout=120, text=True).stdout
    width, room = map(int, re.search(r"width (\d+) of (\d+)", dom).groups())
    assert 300 < width <= room <= 375


def test_error_bars_are_the_range_of_seeds_or_the_interval(tmp_path):
    runs = made_result(tmp_path)["runs"]
    expected = [(30.1, 30.2), (20.1, 20.2), (10.1, 10.2)]
    found = result.intervals(runs, "dense", "in_domain")
    assert found == [pytest.approx(ends) for ends in expected]
    one = [
        {**run, "mean": {"in_domain": {"perplexity": 5.0, "interval": [4.0, 6.0]}}} for run in runs
    ]
    one = [run for run in one if run["seed"] == 1]
    assert result.intervals(one, "moe", "in_domain") == [(4.0, 6.0)] * 2
    assert result.intervals([run for run in runs if run["seed"] == 1], "moe", "near") == [None] * 2
    # 40 % of 10,000 questions, the mean of two seeds: 1.96 standard errors
    low, high = result.intervals(runs, "dense", "0-shot")[0]
    assert (low, high) == (pytest.approx(39.0, abs=0.1), pytest.approx(41.0, abs=0.1))


def test_png_needs_no_browser(tmp_path, monkeypatch):
    made_result(tmp_path)
    monkeypatch.setenv("PATH", "")
    assert cli.main(["report", str(tmp_path), "--png"]) == 0
    drawn = list((tmp_path / "figures").glob("*.png"))
    assert len(drawn) == len(list((tmp_path / "figures").glob("*.svg"))) >= 8
    for path in drawn:
        assert struct.unpack(">II", path.read_bytes()[16:24]) == (900, 580)


@pytest.mark.parametrize("key, value", [("factors", 3), ("runs", ["x"]), ("runs", [{"a": 1}])])
def test_a_result_with_something_else_in_it(tmp_path, capsys, key, value):
    whole = {**made_result(tmp_path), key: value}
    (tmp_path / "result.json").write_text(json.dumps(whole))
    assert cli.main(["report", str(tmp_path)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        f"error: {tmp_path / 'result.json'}: not in the format that was written ("
    )
    assert not (tmp_path / "report.html").exists() and not (tmp_path / "figures").exists()
