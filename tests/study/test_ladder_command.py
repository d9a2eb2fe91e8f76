"""The flags of examples/study/ladder.py, and what it says before it trains."""

import pytest
from small_ladder import command, write

from fairseq_moe_ext.study import plan
from fairseq_moe_ext.study.ladder import forecast, probe, running


@pytest.mark.parametrize(
    "words, error",
    [
        (["--dry-run", "--only-result"], "--only-result: not allowed with argument --dry-run"),
        (["--forecast", "--dry-run"], "--dry-run: not allowed with argument --forecast"),
        (["--probe", "--write"], "--write: not allowed with argument --probe"),
        (["--arms", ""], "--arms: '': name one or more, or leave it out"),
        (["--stages", ","], "--stages: ',': name one or more, or leave it out"),
        (["--seeds", ""], "--seeds: '': name one or more, or leave it out"),
        (["--seeds", "a"], "--seeds: invalid numbers value: 'a'"),
    ],
)
def test_flags_that_cannot_be(words, error, capsys):
    with pytest.raises(SystemExit):
        command().main(words)
    said = capsys.readouterr().err
    assert error in said and said.count("\n") == 1


@pytest.mark.parametrize("action", ["--forecast", "--only-result", "--needed"])
def test_what_is_of_the_whole_ladder_refuses_a_part(action, folder, capsys):
    path = write(folder)
    assert command().main([str(path), action, "--arms", "a"]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"error: {action} is of the whole ladder: leave out --stages")
    assert not path.with_name("ladder_forecast.json").exists()


@pytest.mark.parametrize(
    "words, said",
    [
        (["--measured", "x"], "--measured x: is of --needed; add it, or leave this out"),
        (["--gpu-gflops", "5"], "--gpu-gflops 5.0: is of --needed; add it, or leave this out"),
        (["--needed", "--gflops", "1e308"], "--gflops 1e+308: use a number from 0.001 to 1e9"),
        (["--needed", "--gpu-gflops", "nan"], "--gpu-gflops nan: use a number from 0.001 to 1e9"),
        (["--gflops", "0"], "--gflops 0: use a number from 0.001 to 1e9"),
    ],
)
def test_flags_of_another_action_or_out_of_range_start_nothing(
    words, said, folder, monkeypatch, capsys
):
    monkeypatch.setattr(running, "do", lambda *of: pytest.fail("the trainings began"))
    assert command().main([str(write(folder)), *words]) == 1
    assert capsys.readouterr().err == f"error: {said}\n"


def test_the_models_of_tries_are_probed(folder, monkeypatch):
    timed = []
    monkeypatch.setattr(probe, "run", lambda ladder, arms: timed.extend(arm.name for arm in arms))
    path = write(folder, lambda text: text.replace("a-E4: [1e-2]", "a-E4: [1e-2, 2e-3]"))
    assert command().main([str(path), "--probe", "--stages", "lr"]) == 0
    assert timed == ["a", "a-E4"]


def test_results_of_another_format_or_no_result_are_one_line(folder, tmp_path, capsys):
    """For --needed --measured."""
    path, main = write(folder), command().main
    assert main([str(path), "--needed", "--measured", str(tmp_path)]) == 1
    assert "has no result.json; name another folder" in capsys.readouterr().err
    (tmp_path / "result.json").write_text('{"ladder": {}, "factors": [{}]}')
    assert main([str(path), "--needed", "--measured", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert f"{tmp_path / 'result.json'}: not in the format" in said and said.count("\n") == 1


@pytest.mark.parametrize(
    "name, error",
    [
        ("report.html", "is not a page of this command; move it elsewhere"),
        ("tables.md/x", "a folder, not a file"),
        ("figures", "is not a folder; move it elsewhere"),
    ],
)
def test_a_page_of_another_is_found_before_the_first_training(
    folder, name, error, monkeypatch, capsys
):
    monkeypatch.setattr(running.cli, "main", lambda words: pytest.fail("a stage began"))
    path = write(folder, lambda text: text.replace("/ladder", f"/{name[:5]}"))
    there = folder / name[:5] / name
    there.parent.mkdir(parents=True)
    there.write_text("mine")
    assert command().main([str(path)]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"error: {folder / name[:5]}/{name.split('/')[0]}: {error}")
    assert said.count("\n") == 1 and there.read_text() == "mine"


def test_a_part_of_a_stage_keeps_its_whole_file(folder, monkeypatch):
    """Else the stage's result would be of that part alone."""
    calls = []
    monkeypatch.setattr(running.cli, "main", lambda words: calls.append(words) or 1)
    fixed = "a: [1e-2], a-E4: [1e-2]"
    path = write(folder, lambda text: text.replace("a: [1e-2, 1e-3], a-E4: [1e-2]", fixed))
    assert command().main([str(path), "--stages", "first", "--arms", "b,a-*"]) == 1
    file = folder / "ladder" / "first.yaml"
    runs = "arm-b-1,arm-a-E4-1,arm-a-4x2-1"
    assert calls == [["study", str(file), "--jobs", "2", "--runs", runs]]
    assert [r.size for r in plan.read(file).runs] == ["a", "b", "a-E4", "a-4x2"]
    assert plan.read(file).reference == "a"


def test_a_forecast_replaces_nothing(folder, tmp_path, capsys):
    path, main = write(folder).rename(tmp_path / "small.yaml"), command().main
    mine = tmp_path / "small_forecast.md"
    mine.write_text("mine")
    assert main([str(path), "--forecast"]) == 1
    assert f"{mine}: exists; delete it to forecast anew" in capsys.readouterr().err
    assert mine.read_text() == "mine" and not mine.with_suffix(".json").exists()
    mine.unlink()
    assert main([str(path), "--forecast"]) == 0
    assert mine.is_file() and forecast.read(mine.with_suffix(".json"))


@pytest.mark.parametrize("remarks", [[], ["4 experts (8 to 64)"]])
def test_a_forecast_says_which_laws_are_outside_their_range(folder, tmp_path, remarks, monkeypatch):
    monkeypatch.setattr(forecast, "outside", lambda law, model: remarks)
    path = write(folder).rename(tmp_path / "small.yaml")
    assert command().main([str(path), "--forecast"]) == 0
    text = (tmp_path / "small_forecast.md").read_text()
    assert ("These laws are used outside the range" in text) == bool(remarks)
    assert text.count("4 experts (8 to 64)") == (len(forecast.LAWS) if remarks else 0)
