"""examples/study/run.py and examples/routers/run.py, with nothing trained."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
FILE = EXAMPLES / "study" / "two_cores.yaml"


def load(name, file="run"):
    """examples/NAME/FILE.py."""
    spec = importlib.util.spec_from_file_location(f"{name}_{file}", EXAMPLES / name / f"{file}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def study(monkeypatch):
    """The example, the commands that it would run, and the studies that it would do."""
    module, calls, studies = load("study"), [], []
    monkeypatch.setattr(module.subprocess, "call", lambda words: calls.append(words) or 0)
    monkeypatch.setattr(module.cli, "main", lambda words: studies.append(words) or 0)
    return module, calls, studies


def test_the_text_goes_where_the_study_looks_for_it(study, tmp_path):
    module, calls, studies = study
    file = tmp_path / "study.yaml"
    text = FILE.read_text(encoding="utf-8")
    assert "data: runs/study-text/data" in text
    file.write_text(text.replace("runs/study-text/data", str(tmp_path / "data")))
    assert module.main(["--file", str(file), "--jobs", "3"]) == 0
    ((*_, flag, folder, _, _, _),) = calls
    assert (flag, folder) == ("--out", str(tmp_path))
    assert studies == [["study", str(file), "--jobs", "3"]]


@pytest.mark.parametrize(
    "words, change, error",
    [
        (["--jobs", "0"], ("", ""), "error: --jobs 0: use 1 or more"),
        ([], ("updates:", "update:"), "unknown key 'update'"),
        ([], ("study-text/data", "study-text/bins"), "use a folder called data"),
    ],
)
def test_mistakes_are_found_before_any_text_is_made(study, tmp_path, words, change, error, capsys):
    module, calls, studies = study
    file = tmp_path / "study.yaml"
    file.write_text(FILE.read_text(encoding="utf-8").replace(*change))
    assert module.main(["--file", str(file), *words]) == 1
    said = capsys.readouterr().err
    assert error in said and said.count("\n") == 1
    assert not calls and not studies


def test_the_routers_are_a_study(monkeypatch):
    module, calls = load("routers"), []
    monkeypatch.setattr(module.subprocess, "call", lambda words: calls.append(words) or 0)
    assert module.main(["--jobs", "1"]) == 0
    study = load("study")
    monkeypatch.setattr(study, "text_folder", lambda file: sys.exit(str(file)))
    with pytest.raises(SystemExit, match="routers/two_cores.yaml"):
        study.main(calls[0][2:])


def test_a_short_file_that_cannot_be_written_is_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "runs").touch()
    monkeypatch.chdir(tmp_path)
    assert load("routers").main(["--short"]) == 1
    assert capsys.readouterr().err == "error: runs/routers-short: Not a directory\n"


def test_how_much_epsilon_shortens_the_steps_of_experts(tmp_path, capsys):
    """By hand: roots of 1, 2, 3 and 4 beside an epsilon of 1. The shared matrix does not count."""
    v, step, beta2 = torch.tensor([[[1.0, 4.0]], [[9.0, 16.0]]]), 3, 0.9
    state = {"step": step, "exp_avg_sq": v * (1 - beta2**step)}
    shared = {"step": step, "exp_avg_sq": torch.zeros(2, 2)}
    cfg = {"optimizer": {"adam_betas": f"(0.8, {beta2})", "adam_eps": 1.0}}
    path = tmp_path / "x.pt"
    torch.save({"cfg": cfg, "last_optimizer_state": {"state": {0: shared, 1: state}}}, path)
    main = load("study", "step_lengths").main
    assert main([str(path)]) == 0
    mean = (1 / 2 + 2 / 3 + 3 / 4 + 4 / 5) / 4
    told = f"{path}: {mean:.3f} to {mean:.3f} in 1 matrices of experts"
    assert capsys.readouterr().out.strip() == told
    for content, words in (
        ({"cfg": cfg, "last_optimizer_state": {"state": {0: shared}}}, "has no experts"),
        ({"cfg": cfg, "last_optimizer_state": None}, "has no state of Adam"),
        ({"cfg": {}, "last_optimizer_state": {"state": {1: state}}}, "has no state of Adam"),
    ):
        torch.save(content, path)
        assert main([str(path)]) == 1
        assert words in capsys.readouterr().err
