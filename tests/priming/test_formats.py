"""Each data set's published format, by a small file of its kind, and what becomes of it."""

import csv
import json
import os

import pytest
from task_files import BOOLQ, CASES, COPA, HELLASWAG, OPENBOOKQA, RECORD, jsonl, write

from fairseq_moe_ext.errors import UserError
from fairseq_moe_ext.questions.formats import TASKS, find_file, read_counted, read_items


def test_every_task_has_a_case():
    assert set(CASES) == set(TASKS)


@pytest.mark.parametrize("name", TASKS)
def test_format(name, tmp_path):
    files, expected = CASES[name]
    write(tmp_path / name, files)
    task = TASKS[name]
    items = read_items(task, find_file(tmp_path / task.name, task.evaluated, task.origin))
    assert [(item.candidates, set(item.right), item.alone) for item in items] == expected
    for item, (candidates, right, _) in zip(items, expected):
        assert item.example == candidates[min(right)]


def test_the_other_published_forms_mean_the_same(tmp_path):
    line = {"sentence1": "It rains.", "sentence2": "It snows.", "gold_label": "neutral"}
    write(tmp_path / "mnli", {"multinli_1.0_dev_matched.jsonl": jsonl(line)})
    task = TASKS["mnli"]
    found = read_items(task, find_file(tmp_path / task.name, task.evaluated, task.origin))
    assert found[0].candidates == CASES["mnli"][1][1][0]
    original = {
        "question": "is it raining",
        "title": "Rain",
        "answer": True,
        "passage": "It pours.",
    }
    write(tmp_path / "boolq", {"dev.jsonl": jsonl(original)})
    found = read_items(TASKS["boolq"], tmp_path / "boolq" / "dev.jsonl")
    assert found[0].candidates == CASES["boolq"][1][0][0] and found[0].right == {0}
    (content,) = CASES["storycloze"][0].values()
    lines = ["\t".join(row) for row in csv.reader(content.splitlines())]
    write(tmp_path / "storycloze", {"spring2016.test.tsv": "\n".join(lines) + "\n"})
    found = read_items(TASKS["storycloze"], tmp_path / "storycloze" / "spring2016.test.tsv")
    assert found[0].candidates == CASES["storycloze"][1][0][0]


def test_a_byte_order_mark_is_no_part_of_a_field(tmp_path):
    path = tmp_path / "dev.tsv"
    path.write_bytes(b"\xef\xbb\xbfsentence\tlabel\nfine\t1\n")
    assert len(read_items(TASKS["sst2"], path)) == 1


@pytest.mark.parametrize("name", TASKS)
def test_a_missing_file_is_named_with_where_it_comes_from(name, tmp_path):
    task = TASKS[name]
    with pytest.raises(UserError) as error:
        find_file(tmp_path / task.name, task.evaluated, task.origin)
    assert str(tmp_path / name / task.evaluated[0]) in str(error.value)
    assert task.origin in str(error.value) and "https://" in task.origin


def without(record, *keys):
    """A copy of a record without the field at the end of a way; a number is a place in a list."""
    copy = json.loads(json.dumps(record))
    inner = copy
    for key in keys[:-1]:
        inner = inner[key]
    del inner[keys[-1]]
    return copy


@pytest.mark.parametrize(
    "name, line, words",
    [
        ("record", without(RECORD, "passage", "text"), "no field 'passage.text'"),
        ("record", without(RECORD, "qas", 0, "query"), "no field 'query'"),
        ("record", without(RECORD, "passage", "entities", 0, "end"), "no field 'end'"),
        ("hellaswag", without(HELLASWAG, "endings"), "no field 'endings'"),
        ("hellaswag", {**HELLASWAG, "label": 4}, "field 'label' is '4'; use one of 0, 1, 2, 3"),
        ("hellaswag", {**HELLASWAG, "ctx_a": 5}, "field 'ctx_a' is 5, not text"),
        ("openbookqa", without(OPENBOOKQA, "question", "stem"), "no field 'question.stem'"),
        ("openbookqa", without(OPENBOOKQA, "answerKey"), "no field 'answerKey'"),
        (
            "copa",
            {**COPA, "question": "why"},
            "field 'question' is 'why'; use one of cause, effect",
        ),
        ("boolq", without(BOOLQ, "label"), "no field 'label'"),
        ("boolq", [1], "not a JSON object"),
        ("winogrande", {"sentence": "No blank.", "answer": "1"}, "has 0 blanks '_'"),
    ],
)
def test_a_line_that_is_not_as_published(name, line, words, tmp_path):
    good = {"record": RECORD, "hellaswag": HELLASWAG, "openbookqa": OPENBOOKQA, "copa": COPA}
    good.update(
        boolq=BOOLQ, winogrande=json.loads(CASES["winogrande"][0]["winogrande_1.1/dev.jsonl"])
    )
    path = tmp_path / "file.jsonl"
    path.write_text(jsonl(good[name]) + "\n" + jsonl(line))
    with pytest.raises(UserError) as error:
        read_items(TASKS[name], path)
    assert str(error.value).startswith(f"{path}, line 3: ") and words in str(error.value)


def test_a_table_without_a_column_or_with_a_short_line(tmp_path):
    path = tmp_path / "dev.tsv"
    path.write_text("sentence\tlabel\nfine\t1\nshort\n")
    with pytest.raises(UserError, match="line 3: no field 'label'"):
        read_items(TASKS["sst2"], path)
    path.write_text("text\tlabel\nfine\t1\n")
    with pytest.raises(UserError, match="line 1: the header is missing, or has no column 'sente"):
        read_items(TASKS["sst2"], path)
    path.write_text("fine\t1\nbad\t0\n")
    with pytest.raises(UserError, match="line 1: the header is missing, .* reads 'fine, 1'"):
        read_items(TASKS["sst2"], path)
    path.write_text("sentence\tlabel\nfine\t1\nfine\tstray\t1\n")
    with pytest.raises(UserError, match="line 3: 3 columns; the header has 2"):
        read_items(TASKS["sst2"], path)
    path = tmp_path / "cloze.csv"
    (content,) = CASES["storycloze"][0].values()
    header, row, _ = content.split("\r\n")
    path.write_text(f"{header}\n{row}\n{row.replace('He ran.', chr(34) + 'He ran.')}\n")
    with pytest.raises(UserError, match="cloze.csv, line 3: "):  # where the quote was opened
        read_items(TASKS["storycloze"], path)
    path.write_text(f"{header}\n{row.replace('twice.', 'one' + chr(10) + 'two.')}\n{row}5\n")
    with pytest.raises(UserError, match="cloze.csv, line 4: field 'AnswerRightEnding' is '25'"):
        read_items(TASKS["storycloze"], path)


@pytest.mark.parametrize("ends", ["\n", "\r\n"])
def test_blank_lines_and_line_ends_change_nothing(ends, tmp_path):
    lines = ["sentence\tlabel", 'a "fine" film \t1', "", "bad\t0", ""]
    path = tmp_path / "dev.tsv"
    path.write_bytes(b"\xef\xbb\xbf" + ends.join(lines).encode())
    items = read_items(TASKS["sst2"], path)
    assert [item.location for item in items] == ["line 2", "line 4"]
    assert items[0].example == 'a "fine" film All in all, it was good'
    path = tmp_path / "val.jsonl"
    path.write_bytes(ends.join([json.dumps(BOOLQ), "", json.dumps(BOOLQ), ""]).encode())
    assert [item.location for item in read_items(TASKS["boolq"], path)] == ["line 1", "line 3"]


def test_lines_without_a_right_answer_are_counted(tmp_path):
    write(tmp_path, CASES["mnli"][0])
    assert read_counted(TASKS["mnli"], tmp_path / "dev_matched.tsv")[1] == 1
    lines = [without(RECORD, "qas", 0), RECORD]
    lines[0]["qas"][0]["answers"] = [{"text": "Paris"}]
    (tmp_path / "val.jsonl").write_text(jsonl(*lines))
    items, unanswered = read_counted(TASKS["record"], tmp_path / "val.jsonl")
    assert (len(items), unanswered) == (2, 1)


@pytest.mark.parametrize(
    "name, files, chosen",
    [
        ("winogrande", ["train_xs.jsonl"], "train_xs.jsonl"),
        ("winogrande", ["train_xs.jsonl", "train_s.jsonl"], "train_s.jsonl"),
        ("winogrande", ["train_s.jsonl", "train_m.jsonl"], "train_m.jsonl"),
        ("winogrande", ["train_m.jsonl", "train_debiased.jsonl"], "train_debiased.jsonl"),
        ("winogrande", ["train_debiased.jsonl", "train_l.jsonl"], "train_l.jsonl"),
        ("winogrande", ["train_l.jsonl", "train_xl.jsonl"], "train_xl.jsonl"),
        ("openbookqa", ["Main/train.jsonl", "Additional/train_complete.jsonl"],
         "train_complete.jsonl"),
        ("hellaswag", ["train.jsonl"], "train.jsonl"),
    ],
)  # fmt: skip
def test_of_several_training_files_the_largest_is_taken(name, files, chosen, tmp_path):
    write(tmp_path, {file: "" for file in files})
    assert find_file(tmp_path, TASKS[name].examples, "").name == chosen


@pytest.mark.parametrize(
    "name, file",
    [
        ("mnli", "dev_mismatched.tsv"),
        ("mnli", "multinli_1.0_dev_mismatched.jsonl"),
        ("piqa", "dev.jsonl"),
        ("hellaswag", "validation.jsonl"),
        ("copa", "dev.jsonl"),
        ("record", "dev.jsonl"),
        ("openbookqa", "Additional/test_complete.jsonl"),
    ],
)
def test_other_names_of_evaluated_files(name, file, tmp_path):
    write(tmp_path, {file: ""})
    assert find_file(tmp_path, TASKS[name].evaluated, "") == tmp_path / file


WIKIHOW = {
    "activity_label": "Personal Care and Style",
    "ctx_a": "[header] How to dye hair [title] Find a brush. [step] Take one  that is narrow.",
    "ctx_b": "",
    "source_id": "wikihow~3",
    "endings": [
        "[substeps] Ask at Boots [brackets in text] for it.",
        "You know. [title] Mix. [step] Stir well.",
        "[title] Wait.",
        "Rinse it.",
    ],
    "label": "1",
}


def test_hellaswag_is_lm_evals_prompt_by_letter(tmp_path):
    path = tmp_path / "hellaswag_val.jsonl"
    video = {**HELLASWAG, "ctx_b": "the Man in Rome"}
    path.write_text(jsonl(WIKIHOW, video))
    wikihow, found = read_items(TASKS["hellaswag"], path)
    # by hand, after lm_eval/tasks/hellaswag/utils.py: query + " " + choice
    context = "Personal Care and Style: How to dye hair. Find a brush. Take one that is narrow."
    assert wikihow.candidates == (
        f"{context}  Ask at Boots for it.",
        f"{context} You know.. Mix. Stir well.",  # two points are what the rule gives
        f"{context}  Wait.",
        f"{context} Rinse it.",
    )
    assert found.candidates[0] == (
        "Roof shingle removal: A man is sitting on a roof. The man in rome is using wrap."
    )
    published = read_items(TASKS["hellaswag"], path, published=True)
    assert published[0].candidates[2] == (
        "Personal Care and Style: [header] How to dye hair [title] Find a brush. [step] Take one "
        "that is narrow. [title] Wait."
    )
    assert published[1].candidates[0].endswith("on a roof. The Man in Rome is using wrap.")
    assert published[0].right == wikihow.right == {1}


@pytest.mark.slow
def test_hellaswag_against_lm_eval_itself(tmp_path):
    pytest.importorskip("lm_eval", reason="the extra lm-eval is not installed")
    datasets = pytest.importorskip("datasets")
    from lm_eval.tasks.hellaswag import utils

    lines = [WIKIHOW, {**HELLASWAG, "source_id": "activitynet~v_1", "label": "3"}]
    fields = list(WIKIHOW)
    (tmp_path / "val.jsonl").write_text(jsonl(*lines))
    items = read_items(TASKS["hellaswag"], tmp_path / "val.jsonl")
    given = datasets.Dataset.from_list([{name: line[name] for name in fields} for line in lines])
    for item, doc in zip(items, utils.process_docs(given)):
        assert item.candidates == tuple(f"{doc['query']} {choice}" for choice in doc["choices"])
        assert item.right == {doc["gold"]}


def test_what_is_not_text_or_a_number_is_said(tmp_path):
    path = tmp_path / "file.jsonl"
    for name, line, words in (
        ("hellaswag", {**HELLASWAG, "endings": ["a", 5]}, "field 'endings' is 5, not text"),
        ("boolq", {**BOOLQ, "passage": "\ud800"}, "not JSON .half of a surrogate pair"),
        ("winogrande", {"sentence": "_", "option1": "", "option2": "a", "answer": "1"},
         "a candidate has no text"),
    ):  # fmt: skip
        path.write_text(jsonl(line))
        with pytest.raises(UserError, match=f"file.jsonl, line 1: {words}"):
            read_items(TASKS[name], path)
    entity = RECORD["passage"]["entities"][0]
    for start, words in (
        ("0", "field 'start' is '0', not a whole number"),
        (900, "spans 900 to 2"),
    ):
        line = {
            **RECORD,
            "passage": {**RECORD["passage"], "entities": [{**entity, "start": start}]},
        }
        path.write_text(jsonl(line))
        with pytest.raises(UserError, match=words):
            read_items(TASKS["record"], path)
    path.write_text("[" * 100_000)
    with pytest.raises(UserError, match="line 1: not JSON"):
        read_items(TASKS["boolq"], path)


def test_files_that_are_not_whole(tmp_path):
    path = tmp_path / "valid.jsonl"
    path.write_text(jsonl({"goal": "a", "sol1": "b", "sol2": "c"}))
    with pytest.raises(UserError, match="valid-labels.lst: missing"):
        read_items(TASKS["piqa"], path)
    (tmp_path / "valid-labels.lst").write_text("\n2\n")
    with pytest.raises(UserError, match="valid-labels.lst, line 2: '2'; use 0 or 1"):
        read_items(TASKS["piqa"], path)
    (tmp_path / "valid-labels.lst").write_text("0\n1\n")
    with pytest.raises(UserError, match="2 labels for the 1 lines of valid.jsonl"):
        read_items(TASKS["piqa"], path)
    path.write_text('{"goal": ')
    with pytest.raises(UserError, match="line 1: not JSON"):
        read_items(TASKS["hellaswag"], path)
    path.write_bytes(b'{"goal": "\xff"}\n')
    with pytest.raises(UserError, match="not UTF-8"):
        read_items(TASKS["hellaswag"], path)
    path.write_text("\n")
    with pytest.raises(UserError, match="contains no question"):
        read_items(TASKS["hellaswag"], path)


def test_two_files_of_one_name(tmp_path):
    write(tmp_path / "sst2", {"a/dev.tsv": "", "b/dev.tsv": ""})
    with pytest.raises(UserError, match="two files named dev.tsv"):
        find_file(tmp_path / "sst2", TASKS["sst2"].evaluated, "GLUE")


def test_what_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "dev.tsv")
    with pytest.raises(UserError, match="dev.tsv: not a regular file"):
        find_file(tmp_path, TASKS["sst2"].evaluated, "GLUE")
