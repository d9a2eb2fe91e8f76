"""`fairseq-moe priming`, as a user types it."""

import json
import os
import shutil

import pytest
from processes import run_processes
from task_files import BOOLQ, CASES, jsonl, write

from fairseq_moe_ext import cli
from fairseq_moe_ext.locks import Lock
from fairseq_moe_ext.priming import choice, model
from fairseq_moe_ext.questions.formats import TASKS


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder with a file of every task, and examples for three."""
    folder = tmp_path_factory.mktemp("tasks")
    for name, (files, _) in CASES.items():
        write(folder / name, files)
    stories = CASES["storycloze"][0]["cloze_test_test__spring2016 - cloze_test_ALL_test.csv"]
    head, line, _ = stories.split("\r\n")
    examples = "\r\n".join([head] + [line.replace("Rick", f"w{i}") for i in range(6)])
    write(folder / "storycloze", {"cloze_test_val__spring2016 - cloze_test_ALL_val.csv": examples})
    rows = "".join(f"w{i} it was\t{i % 2}\n" for i in range(9))
    write(folder / "sst2", {"SST-2/train.tsv": "sentence\tlabel\n" + rows})
    return folder


def priming(rank, line, out):
    assert cli.main(line.split()) == 0
    return json.loads(out.read_text()) if rank == 0 else None


@pytest.fixture
def command(trained, tasks, tmp_path):
    data, checkpoint = trained
    return f"priming {tasks} --path {checkpoint} --data {data} --cpu --json {tmp_path / 'out.json'}"


def test_all_tasks_without_examples(command, tmp_path, capsys):
    found = priming(0, command, tmp_path / "out.json")
    assert [one["task"] for one in found["results"]] == list(TASKS)
    for one in found["results"]:
        assert one["rule"] == TASKS[one["task"]].rule
        assert one["questions"] == len(CASES[one["task"]][1])
        assert one["draws"] == [one["accuracy"]] and one["spread"] is None
        assert one["accuracy"] * one["questions"] == pytest.approx(
            round(one["accuracy"] * one["questions"])
        )
    by = {one["task"]: one for one in found["results"]}
    for name, one in by.items():
        items = CASES[name][1]
        shares = [len(right) / len(candidates) for candidates, right, _ in items]
        assert one["chance"] == pytest.approx(sum(shares) / len(shares)), name
        low, high = one["interval"]
        assert 0 <= low <= one["accuracy"] <= high <= 1 and low < high
        assert (one["majority"] is not None) == (name in ("boolq", "mnli", "sst2"))
        assert 0 <= one["questions_cut"] <= one["questions"]
    assert by["record"]["questions_cut"] == 1 and by["copa"]["questions_cut"] == 0
    assert by["mnli"]["questions_left_out"] == 1, "without a gold label"
    accuracies = [one["accuracy"] for one in found["results"]]
    assert found["mean"]["0"] == pytest.approx(sum(accuracies) / len(accuracies))
    out, err = capsys.readouterr()
    assert all(name in out for name in TASKS) and "mean of 10 tasks" in out
    assert (
        f"mean of 10 tasks: {', '.join(TASKS)}; the paper's mean is over record, hellaswag, " in out
    )
    assert found["mean_of"]["0"]["tasks"] == list(TASKS)
    for one in found["results"]:
        row = next(line for line in out.splitlines() if line.startswith(one["task"]))
        low, high = (f"{100 * end:.1f}" for end in one["interval"])
        assert f"{low} to {high}" in row and f"{100 * one['chance']:.1f}" in row
    assert "record, 0 shots: " in err and "longer than the context of 64 tokens even" in err


def test_the_mean_is_called_the_papers_only_over_its_six_tasks():
    def last_row_and_note(*names):
        one = {"rule": "sum", "shots": 0, "questions": 9, "questions_cut": 0, "draws": [0.5]}
        one.update(questions_left_out=0, accuracy=0.5, interval=[0.4, 0.6], chance=0.5)
        results = [{**one, "task": name, "spread": None, "majority": None} for name in names]
        return choice.table(results)[-1][0], choice.notes(results)[-1]

    six = ("openbookqa", "storycloze", "winogrande", "piqa", "hellaswag", "record")
    head = "mean of the paper's six tasks"
    assert last_row_and_note(*six) == (head, f"{head}: {', '.join(six)}")
    head, note = last_row_and_note(*six, "copa")
    assert head == "mean of 7 tasks" and "the paper's mean is over record" in note
    assert last_row_and_note("copa")[0] == "copa"


def test_examples_that_do_not_fit_are_counted(command, tmp_path, capsys):
    line = f"{command} --tasks sst2,storycloze --shots 0,1,6 --draws 3"
    found = priming(0, line, tmp_path / "out.json")
    by = {(one["task"], one["shots"]): one for one in found["results"]}
    assert len(by) == 6
    assert len(by["sst2", 6]["draws"]) == 3 and len(by["sst2", 0]["draws"]) == 1
    assert by["sst2", 1]["spread"] is not None and by["sst2", 1]["left_out"] == 0
    out, err = capsys.readouterr()
    assert 0 < by["sst2", 6]["left_out"] < 6
    # two questions, three draws
    assert by["sst2", 6]["prompts"] == 6 == by["sst2", 6]["prompts_short"]
    assert "sst2, 6 shots: in 6 of 6 prompts, " in err and "of 6 examples were left out" in err
    assert "sst2, 1 shot: in" not in err and "examples of " in err


def without_times(found):
    """Of a file of results, what does not tell when its inputs were written."""
    return {key: value for key, value in found.items() if key != "settings"}


def test_a_command_that_was_ended_goes_on(command, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out.json"
    line = f"{command} --tasks sst2,storycloze --shots 0,1 --draws 2"
    whole = priming(0, line, out)
    assert whole["complete"] and len(whole["results"]) == 4
    printed = capsys.readouterr().out
    out.unlink()

    evaluate, calls = choice.evaluate, []

    def ending(*args):
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return evaluate(*args)

    monkeypatch.setattr(choice, "evaluate", ending)
    assert cli.main(line.split()) != 0
    partial = json.loads(out.read_text())
    assert not partial["complete"] and partial["results"] == whole["results"][:3]
    capsys.readouterr()
    # with other flags it is neither taken for their result nor replaced
    for flags, words in (
        ("--draws 3", "draws: 2, now 3"),
        ("--shots 0,2", "shots: [0, 1], now [0, 2]"),
        ("--seed 2", "seed: 1, now 2"),
        ("--tasks sst2", "tasks: ['sst2', 'storycloze'], now ['sst2']"),
        ("--context 60", "context: None, now 60"),
        ("--published-text", "published_text: False, now True"),
    ):
        assert cli.main(f"{line} {flags}".split()) == 1
        said = f"error: --json {out}: holds results of another command ({words}); name another"
        assert said in capsys.readouterr().err, flags
        assert json.loads(out.read_text()) == partial
    assert priming(0, f"{line} --max-tokens 500", out) == whole  # which changes no result
    assert len(calls) == 5
    found = capsys.readouterr()
    assert found.out == printed
    assert f"--json {out}: has 3 of 4 results of this command; resuming" in found.err
    monkeypatch.setattr(model, "load_in_context", lambda *_: pytest.fail("nothing is left to do"))
    assert priming(0, line, out) == whole
    assert capsys.readouterr().out == printed and len(calls) == 5


def test_two_commands_do_not_share_a_file(command, tmp_path, capsys):
    with Lock(tmp_path / "out.json.lock", "the first"):
        assert cli.main(f"{command} --tasks sst2".split()) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: --json {tmp_path / 'out.json'} is being worked on by PID")
    assert not list(tmp_path.glob("out*"))


def test_results_in_bfloat16_are_not_taken_for_those_in_float32(command, tmp_path, capsys):
    out, line = tmp_path / "out.json", f"{command} --tasks sst2"
    assert cli.main(f"{line} --bf16".split()) == 0
    for flags, words in (("", "bf16: True, now False"), ("--fp16", "fp16: False, now True")):
        assert cli.main(f"{line} {flags}".split()) == 1
        assert f"another command ({words}); name another" in capsys.readouterr().err
    found = priming(0, f"{line} --overwrite", out)
    del found["settings"]["bf16"]  # as files of before the flag
    out.write_text(json.dumps(found))
    assert without_times(priming(0, line, out)) == without_times(found)
    assert cli.main(f"{line} --bf16".split()) == 1
    assert "(bf16: False, now True)" in capsys.readouterr().err


def test_results_of_other_files_are_not_taken(trained, tasks, tmp_path, capsys):
    data, checkpoint = trained
    out, folder = tmp_path / "out.json", tmp_path / "tasks"
    shutil.copytree(tasks / "copa", folder / "copa")
    shutil.copy(checkpoint, tmp_path / "m.pt")
    line = f"priming {folder} --path {tmp_path / 'm.pt'} --data {data} --cpu --json {out}"
    first = priming(0, line, out)
    os.utime(tmp_path / "m.pt", (1, 1))
    assert cli.main(line.split()) == 1
    assert "(checkpoint: other or changed files); name another" in capsys.readouterr().err
    assert without_times(priming(0, f"{line} --overwrite", out)) == without_times(first)
    (folder / "copa" / "val.jsonl").write_text(CASES["copa"][0]["val.jsonl"] * 2)
    assert cli.main(line.split()) == 1
    assert "(files: other or changed files); name another" in capsys.readouterr().err
    for content in ("", "{}", "[1]", "words"):
        out.write_text(content)
        assert cli.main(line.split()) == 1
        assert f"--json {out}: exists; name another file or give" in capsys.readouterr().err
        assert out.read_text() == content


def test_examples_that_belong_to_a_question_are_counted(trained, tmp_path, capsys):
    data, checkpoint = trained
    questions = [{**BOOLQ, "passage": f"w{i}.", "question": "it"} for i in (1, 2, 3)]
    examples = [{**BOOLQ, "passage": f"w{i}.", "question": "it"} for i in (2, 3)]
    files = {"val.jsonl": jsonl(*questions), "train.jsonl": jsonl(*examples)}
    write(tmp_path / "boolq", files)
    line = f"priming {tmp_path} --path {checkpoint} --data {data} --cpu --shots 2 --draws 5"
    assert cli.main(line.split()) == 0
    err = capsys.readouterr().err
    assert "in 15 of 15 prompts, 1 example was left out" in err
    assert "boolq, 2 shots: in 5 of 15 prompts, an example is related to the question" in err


def test_two_processes_equal_one(command, tmp_path):
    line = f"{command} --tasks sst2,mnli,record,openbookqa,winogrande"
    few = f"{command} --tasks sst2 --shots 2 --draws 3 --overwrite"
    for text in (line, few):
        one = priming(0, text, tmp_path / "out.json")
        (tmp_path / "out.json").unlink()
        assert run_processes(2, priming, text, tmp_path / "out.json")[0] == one


def test_another_rule_and_a_limit(command, tmp_path):
    found = priming(0, f"{command} --tasks copa --rule mean --limit 1", tmp_path / "out.json")
    assert found["results"][0]["rule"] == "mean" and found["results"][0]["questions"] == 1
    assert found["results"][0]["questions_left_out"] == len(CASES["copa"][1]) - 1


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--tasks copa,nothing", "--tasks nothing: no such task; use one of record,"),
        ("--tasks copa --shots 1", "train.jsonl: missing; get it from COPA in SuperGLUE"),
        ("--tasks sst2 --shots 10", "--shots 10: "),
        ("--shots 1,x", "--shots 1,x: use whole numbers"),
        ("--shots \u00b2", "--shots \u00b2: use whole numbers"),
        (f"--draws {10**13}", "use a whole number from 1 to 100,000"),
        ("--context 1", "--context 1: use a whole number from 2"),
        ("--languages en-en-fr", "--languages en-en-fr: use two with a dash"),
        ("--languages en-fr", "--languages en-fr: only the task translation uses it"),
        ("--draws 0", "--draws 0: use a whole number from 1 to 100,000"),
        ("--seed -1", "--seed -1: use 0 or more"),
        ("--context 65", "--context 65: the model takes 64 at most"),
        ("--path nothing.pt", "--path nothing.pt: no such checkpoint"),
        ("--data .", "--data .: contains no dict.txt"),
        ("--rule unconditional", "--rule unconditional: only for openbookqa, not for record"),
        ("--json no/out.json", "--json no/out.json: no folder no; make it first"),
        ("--overwrite --json DEVICE", "--json DEVICE: a device, not a file"),
        ("--model-overrides 5", "--model-overrides '5': use a Python dictionary"),
    ],
)
def test_mistakes(command, device, flags, words, capsys, tmp_path):
    flags, words = (text.replace("DEVICE", device) for text in (flags, words))
    assert cli.main(f"{command} {flags}".split()) == 1
    err = capsys.readouterr().err
    assert words in err and "Traceback" not in err
    assert not (tmp_path / "out.json").exists()


def test_the_context_is_checked_before_weights_are_read(command, capsys, monkeypatch):
    monkeypatch.setattr(model, "load_model", None)
    assert cli.main(f"{command} --context 65".split()) == 1
    assert "--context 65: the model takes 64 at most" in capsys.readouterr().err


def test_a_folder_without_tasks(trained, tmp_path, capsys):
    data, checkpoint = trained
    flags = ["--path", str(checkpoint), "--data", str(data)]
    assert cli.main(["priming", str(tmp_path), *flags]) == 1
    assert "none of its folders is a task; the tasks are record, " in capsys.readouterr().err
    assert cli.main(["priming", str(tmp_path / "no"), *flags]) == 1
    assert "no such folder" in capsys.readouterr().err
    os.mkdir(tmp_path / "copa")
    assert cli.main(["priming", str(tmp_path), *flags]) == 1
    assert "copa/val.jsonl: missing; get it from COPA in SuperGLUE" in capsys.readouterr().err
