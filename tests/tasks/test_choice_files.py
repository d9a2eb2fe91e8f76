"""The published files of every data set that can be tuned on: which is which split, the right
answers, and what a head gets."""

import json
import logging
import random

import pytest
from choice_data import load, make_choice_task

from fairseq_moe_ext.errors import UserError
from fairseq_moe_ext.tasks.choice_files import NAMES, ChoiceFiles


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
    with pytest.raises(UserError, match=f"subset dev: not found; {name} has train, valid and test"):
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


# ---- What belongs together stays together


def winogrande(i):
    """Twins."""
    for number in (1, 2):
        line = {"qID": f"A{i}-Z-{number}", "sentence": f"n{i} met e{i} as _ was {number}."}
        yield {**line, "option1": "Ann", "option2": "Eve", "answer": str(number)}


def without_qid(i):
    for line in winogrande(i):
        yield {**line, "qID": None, "option1": f"n{i}", "option2": f"e{i}"}


def boolq(i):
    for number in range(3):
        yield {"question": f"is it {number}", "passage": f"Passage {i}.", "label": number == 1}


def hellaswag(i):
    for number in range(3):
        line = {"source_id": f"video~{i}", "activity_label": "Roof", "ctx_a": f"He sits {number}."}
        yield {**HELLASWAG, **line, "ctx_b": f"x{i}"}


def mnli(i):
    for label in ("neutral", "entailment", "contradiction"):
        yield {"sentence1": f"Premise {i}.", "sentence2": f"It is {label}.", "gold_label": label}


def piqa(i):
    for number in range(2):
        yield {"goal": f"Open {i}", "sol1": f"Twist {number}.", "sol2": "Eat.", "label": 1}


def openbookqa(i):
    for number in range(2):
        question = {**OPENBOOK["question"], "stem": f"Stem {i} {number}"}
        yield {"question": question, "answerKey": "B", "fact1": f"Fact {i}"}


def copa(i):
    yield {**COPA, "premise": f"It rained {i}.", "choice1": f"I left {i}.", "label": 0}
    yield {**COPA, "premise": f"It rained {i}.", "choice1": f"I sat {i}.", "label": 1}
    yield {**COPA, "premise": f"It poured {i}.", "choice1": f"I left {i}.", "label": 0}


def sst2(i):
    words = [f"w{i}x{number}" for number in range(8)]
    for part in (words, words[2:], words[:6], words[2:7]):
        yield {"sentence": " ".join(part) + " ", "label": "1"}


def storycloze(i):
    for number in (1, 2):
        line = {f"InputSentence{n}": f"Sentence {i} {n}." for n in range(1, 5)}
        line.update(RandomFifthSentenceQuiz1=f"End {number}.", RandomFifthSentenceQuiz2="A fish.")
        yield {**line, "AnswerRightEnding": "1"}


GROUPS = {  # of each data set, one after another: its training file, and group number i
    "winogrande": ("train_xs.jsonl", winogrande),
    "winogrande without qID": ("train_xl.jsonl", without_qid),
    "boolq": ("train.jsonl", boolq),
    "hellaswag": ("hellaswag_train.jsonl", hellaswag),
    "mnli": ("multinli_1.0_train.jsonl", mnli),
    "piqa": ("train.jsonl", piqa),
    "openbookqa": ("train_complete.jsonl", openbookqa),
    "copa": ("train.jsonl", copa),
    "sst2": ("train.tsv", sst2),
    "storycloze": ("spring2016.val.tsv", storycloze),
}


def write_groups(folder, kind, count, seed=0):
    """`count` groups, their lines in random order; the groups as sets of examples' texts."""
    name = kind.split()[0]
    file, make = GROUPS[kind]
    lines = [(i, line) for i in range(count) for line in make(i)]
    random.Random(seed).shuffle(lines)
    (folder / name).mkdir(exist_ok=True)
    with open(folder / name / file, "w", encoding="utf-8") as out:
        if file.endswith(".tsv"):
            out.write("\t".join(lines[0][1]) + "\n")
        for _, line in lines:
            text = "\t".join(line.values()) if file.endswith(".tsv") else json.dumps(line)
            out.write(text + "\n")
    return name, [i for i, _ in lines]


@pytest.mark.parametrize("kind", GROUPS)
def test_no_group_is_split_and_the_share_is_met(kind, tmp_path, caplog):
    name, groups = write_groups(tmp_path, kind, 120)
    size = len(groups) // 120
    files = ChoiceFiles(tmp_path, name, 0.1)
    with caplog.at_level(logging.INFO):
        sides = {split: files.read(split) for split in ("train", "valid")}
    of_line = {f"line {i}": group for i, group in enumerate(groups, 2 if name in TABLES else 1)}
    found = {split: [of_line[item.location] for item in items] for split, items in sides.items()}
    assert not set(found["train"]) & set(found["valid"])
    assert len(found["train"]) + len(found["valid"]) == len(groups)
    assert len(found["valid"]) == 12 * size  # a tenth of 120 groups of one size
    said = f"valid: {12 * size} of the {len(groups)} questions of {files.path('valid')} (10.0 %; "
    assert f"{said}--choice-valid-share 0.1), in 12 of the 120 groups" in caplog.text

    write_groups(tmp_path, kind, 120, seed=1)  # another order of lines
    again = ChoiceFiles(tmp_path, name, 0.1).read("valid")
    assert {item.candidates for item in again} == {item.candidates for item in sides["valid"]}


TABLES = ("sst2", "storycloze")


def own(folder, lines):
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "train.jsonl").write_text(text, encoding="utf-8")
    return folder


def question(context, first=" a", **more):
    return {"context": context, "choices": [first, " b"], "label": 0, **more}


def test_questions_of_ones_own_and_copies(tmp_path):
    lines = [question(f"context {i // 3}", f" a{i}") for i in range(60)]  # of one context, three
    lines += [question("", f" x{i % 10}") for i in range(20)]  # each twice, without context
    lines += [question(f"apart {i}", group=f"document {i // 2}") for i in range(40)]
    for shuffled in (lines, random.Random(0).sample(lines, len(lines))):
        files = ChoiceFiles(own(tmp_path, shuffled), None, 0.25)
        train, valid = files.read("train"), files.read("valid")
        assert not {k for item in train for k in item.keys} & {k for i in valid for k in i.keys}
        assert len(train) + len(valid) == 120 and 29 <= len(valid) <= 31


def test_groups_of_many_sizes_come_near_the_share(tmp_path):
    rng = random.Random(0)
    lines = []
    for i in range(100):
        lines += [question(f"context {i}", f" a{n}") for n in range(rng.choice([1, 1, 2, 5, 30]))]
    for share in (0.03, 0.1, 0.3, 0.5, 0.9):
        valid = ChoiceFiles(own(tmp_path, lines), None, share).read("valid")
        assert len(valid) == pytest.approx(share * len(lines), abs=1)


@pytest.mark.parametrize("contexts, share", [(1, 0.1), (2, 0.01), (40, 0.001)])
def test_a_share_that_cannot_be(contexts, share, tmp_path):
    lines = [question(f"context {i % contexts}", f" a{i}") for i in range(40)]
    files = ChoiceFiles(own(tmp_path, lines), None, share)
    for split in ("train", "valid"):
        with pytest.raises(UserError, match=f"--choice-valid-share {share}: the 40 questions of "):
            files.read(split)


def test_a_class_list_with_a_byte_order_mark_or_not_utf_8(tmp_path):
    (tmp_path / "labels.txt").write_bytes(b"\xef\xbb\xbfgood\r\nbad\r\n")
    assert ChoiceFiles(tmp_path, None, 0).classes == ("good", "bad")
    (tmp_path / "labels.txt").write_bytes(b"g\xf6\nbad\n")
    with pytest.raises(UserError, match="labels.txt: not UTF-8"):
        ChoiceFiles(tmp_path, None, 0)


def test_the_text_as_published(tmp_path):
    (tmp_path / "hellaswag").mkdir()
    line = {**HELLASWAG, "ctx_a": "[header] Roofs [title] Sit."}
    (tmp_path / "hellaswag" / "hellaswag_train.jsonl").write_text(jsonl(**line))
    (item,) = ChoiceFiles(tmp_path, "hellaswag", 0).read("train")
    assert item.candidates[0] == "Roof: Roofs. Sit. He sings."
    (item,) = ChoiceFiles(tmp_path, "hellaswag", 0, published=True).read("train")
    assert item.candidates[0] == "Roof: [header] Roofs [title] Sit. He sings."
