"""The published files of every data set that can be tuned on: which is which split, the right
answers, and what a head gets."""

import json

import pytest
from choice_data import load, make_choice_task

from fairseq_moe_ext.errors import UserError
from fairseq_moe_ext.tasks.choice_files import NAMES


def jsonl(**fields):
    return json.dumps(fields) + "\n"


def table(separator, **fields):
    return separator.join(fields) + "\n" + separator.join(fields.values()) + "\n"


STORY = {f"InputSentence{i}": f"sentence {i}." for i in range(1, 5)}
STORY.update(RandomFifthSentenceQuiz1="So it ended.", RandomFifthSentenceQuiz2="A fish.")
OPENBOOK = {
    "question": {
        "stem": "Rain is",
        "choices": [{"text": "dry", "label": "A"}, {"text": "wet", "label": "B"}],
    },
    "answerKey": "B",
}
MNLI = {"gold_label": "neutral", "sentence1": "It rains.", "sentence2": "It pours."}
PIQA = {"goal": "Open it", "sol1": "Twist.", "sol2": "Eat."}
HELLASWAG = {"activity_label": "Roof", "ctx_a": "A man sits.", "ctx_b": "he"}
HELLASWAG.update(endings=["sings.", "rips.", "eats.", "ends."], label=3)
WINOGRANDE = {"sentence": "Ann met Eve as _ was late.", "option1": "Ann", "option2": "Eve"}
BOOLQ = {"question": "is it wet", "passage": "It rains."}
COPA = {"premise": "It rained.", "choice1": "I left.", "choice2": "I ran.", "question": "effect"}

# name -> (file of train, of valid, of test, content beside the file's name, right answer,
# sequences for a head)
PUBLISHED = {
    "storycloze": (
        "cloze_test_val__spring2016 - cloze_test_ALL_val.csv",
        "cloze_test_test__spring2016 - cloze_test_ALL_test.csv",
        "cloze_test_test__spring2016 - cloze_test_ALL_test.csv",
        table(",", InputStoryid="1", **STORY, AnswerRightEnding="1"),
        0,
        2,
    ),
    "openbookqa": ("train.jsonl", "dev.jsonl", "test.jsonl", jsonl(**OPENBOOK), 1, 2),
    "boolq": ("train.jsonl", "val.jsonl", "val.jsonl", jsonl(**BOOLQ, label=False), 1, 1),
    "mnli": ("train.tsv", "dev_matched.tsv", "dev_matched.tsv", table("\t", **MNLI), 2, 1),
    "sst2": (
        "train.tsv", "dev.tsv", "dev.tsv", table("\t", sentence="a film", label="1"), 1, 1,
    ),
    "hellaswag": (
        "hellaswag_train.jsonl", "hellaswag_val.jsonl", "hellaswag_val.jsonl", jsonl(**HELLASWAG),
        3, 4,
    ),
    "piqa": ("train.jsonl", "valid.jsonl", "valid.jsonl", jsonl(**PIQA), 0, 2),
    "winogrande": (
        "train_xl.jsonl", "dev.jsonl", "dev.jsonl", jsonl(**WINOGRANDE, answer="2"), 1, 2,
    ),
    "copa": ("train.jsonl", "val.jsonl", "val.jsonl", jsonl(**COPA, label=0), 0, 2),
}  # fmt: skip


def test_every_data_set_is_here():
    assert sorted(PUBLISHED) == NAMES
    assert set(NAMES) - {"copa"} == {
        *("storycloze", "openbookqa", "boolq", "mnli"),
        *("sst2", "hellaswag", "piqa", "winogrande"),
    }  # the paper's eight


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_files_are_read(data, tmp_path, name):
    *files, content, right, sequences = PUBLISHED[name]
    folder = tmp_path / name
    folder.mkdir()
    for file in files:
        (folder / file).write_text(content, encoding="utf-8")
        if name == "piqa":
            (folder / file.replace(".jsonl", "-labels.lst")).write_text("0\n")
    head = make_choice_task(data, tmp_path, choice_task=name)
    assert [head.files.path(split).name for split in ("train", "valid", "test")] == files
    mean = make_choice_task(data, tmp_path, choice_task=name, choice_scoring="mean")
    for split in ("train", "valid", "test"):
        (item,) = load(head, split).items
        assert item.label == right and len(item.inputs) == sequences
        candidates = len(mean.files.read(split)[0].candidates)
        assert head.outputs * sequences == candidates == len(load(mean, split).items[0].inputs)
    with pytest.raises(UserError, match=f"subset dev: {name} has train, valid and test"):
        head.files.path("dev")


def test_a_head_that_chooses_a_class_sees_no_answer(data, tmp_path, vocabulary):
    folder = tmp_path / "boolq"
    folder.mkdir()
    (folder / "train.jsonl").write_text(jsonl(**BOOLQ, label=True), encoding="utf-8")
    (item,) = load(make_choice_task(data, tmp_path, choice_task="boolq"), "train").items
    text = vocabulary.decode(item.inputs[0].tolist())
    # this vocabulary cuts " yes" and " no" behind the space
    assert text == "\nIt rains.\nQuestion: is it wet?\nAnswer: \n"


def test_winogrande_scores_what_follows_the_names(data, tmp_path, vocabulary):
    folder = tmp_path / "winogrande"
    folder.mkdir()
    (folder / "train_xl.jsonl").write_text(jsonl(**WINOGRANDE, answer="1"), encoding="utf-8")
    task = make_choice_task(data, tmp_path, choice_task="winogrande", choice_scoring="sum")
    (item,) = load(task, "train").items
    for row, count in zip(item.targets, item.scored):
        assert vocabulary.decode(row[-count:].tolist()) == " was late."
