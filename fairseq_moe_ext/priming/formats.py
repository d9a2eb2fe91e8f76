"""How a line of each data set becomes a prompt with candidates.

The first six are the paper's tasks (Artetxe et al. 2021), in formats after GPT-3's, which it
follows (Brown et al. 2020, appendix G). The paper does not prime on the other four; COPA and BoolQ
have GPT-3's formats, MNLI that of GPT-3's NLI tasks, SST-2 a cloze. docs/priming.md shows one of
each.
"""

import re
import string
from pathlib import Path
from typing import Callable, Dict, FrozenSet, List, NamedTuple, Tuple

from ..errors import UserError
from .records import Reader, Record, read_csv, read_jsonl, read_jsonl_and_labels, read_tsv


class Item(NamedTuple):
    """One question."""

    candidates: Tuple[str, ...]  # the whole prompt with each candidate in it
    right: FrozenSet[int]  # empty: no candidate is, and the question is left out
    alone: Tuple[str, ...] = ()  # each candidate after "Answer: ", for the rule that wants it

    @property
    def example(self) -> str:
        """The prompt with the right answer, as it stands before another question."""
        return self.candidates[min(self.right)]


class Task(NamedTuple):
    """One data set."""

    name: str
    rule: str  # scoring.RULES
    items: Callable[[Record], List[Item]]  # of one line
    read: Dict[str, Reader]  # by the file name's ending
    evaluated: Tuple[str, ...]  # names of the published file; the first that is there is read
    examples: Tuple[str, ...]  # likewise, of what shots are drawn from
    origin: str


def find_file(folder: Path, names: Tuple[str, ...], origin: str) -> Path:
    """The first of the published names that lies in a task's folder or below it.

    Raises:
        UserError: there is none, and where it comes from; or there are two.
    """
    for name in names:
        found = sorted(folder.rglob(name))
        if len(found) > 1:
            raise UserError(f"{found[0]} and {found[1]}: which {name}? Remove or rename one")
        if found:
            return found[0]
    raise UserError(
        f"{folder / names[0]}: missing; it is a file of {origin}"
        + (f" (or {', '.join(names[1:])})" if len(names) > 1 else "")
    )


def read_items(task: Task, path: Path) -> List[Item]:
    """All questions of a file that have a right answer, in order. Raises UserError for a line that
    is not as published, and for a file without any."""
    return read_counted(task, path)[0]


def read_counted(task: Task, path: Path) -> Tuple[List[Item], int]:
    """As `read_items`, and how many questions have no right answer and are left out."""
    every = [item for record in task.read[path.suffix](path) for item in task.items(record)]
    found = [item for item in every if item.right]
    if not found:
        raise UserError(f"{path}: no question in it; take the file as it was published")
    return found, len(every) - len(found)


def _hellaswag(line: Record) -> List[Item]:
    begun = line.text("ctx_b").strip()
    context = f"{line.text('ctx_a').strip()} {begun[:1].upper()}{begun[1:]}"
    prompt = " ".join(f"{line.text('activity_label')}: {context}".split())
    endings = line.items("endings")
    label = line.among("label", {str(i): i for i in range(len(endings))})
    return [Item(tuple(f"{prompt} {str(end).strip()}" for end in endings), frozenset({label}))]


def _piqa(line: Record) -> List[Item]:
    goal = line.text("goal").strip()
    candidates = tuple(f"{goal} {line.text(name).strip()}" for name in ("sol1", "sol2"))
    return [Item(candidates, frozenset({line.among("label", {"0": 0, "1": 1})}))]


def _winogrande(line: Record) -> List[Item]:
    sentence = line.text("sentence")
    if sentence.count("_") != 1:
        raise line.mistake(f"field 'sentence' has {sentence.count('_')} blanks '_', not one")
    candidates = tuple(sentence.replace("_", line.text(name)) for name in ("option1", "option2"))
    return [Item(candidates, frozenset({line.among("answer", {"1": 0, "2": 1})}))]


def _storycloze(line: Record) -> List[Item]:
    story = " ".join(line.text(f"InputSentence{i}").strip() for i in range(1, 5))
    endings = (line.text(f"RandomFifthSentenceQuiz{i}").strip() for i in (1, 2))
    candidates = tuple(f"{story} {ending}" for ending in endings)
    return [Item(candidates, frozenset({line.among("AnswerRightEnding", {"1": 0, "2": 1})}))]


def _openbookqa(line: Record) -> List[Item]:
    stem = line.text("question", "stem").strip()
    choices = [line.part(choice) for choice in line.items("question", "choices")]
    texts = [choice.text("text").strip() for choice in choices]
    texts = [text if text.endswith(".") else f"{text}." for text in texts]
    label = line.among("answerKey", {choice.text("label"): i for i, choice in enumerate(choices)})
    return [
        Item(
            tuple(f"{stem} {text}" for text in texts),
            frozenset({label}),
            tuple(f"Answer: {text}" for text in texts),
        )
    ]


def _record(line: Record) -> List[Item]:
    """A passage, its highlights as bullets, and the query as one more, with an entity in it."""
    passage = line.text("passage", "text")
    context = "\n".join(part.strip() for part in passage.split("@highlight") if part.strip())
    context = context.replace("\n", "\n- ")
    names: Dict[str, None] = {}  # in order, each once
    for entity in line.items("passage", "entities"):
        place = line.part(entity)
        names[passage[place.get("start") : place.get("end") + 1]] = None  # `end` is the last one
    found = []
    for part in line.items("qas"):
        question = line.part(part)
        query = question.text("query")
        answers = {_plain(line.part(a).text("text")) for a in question.items("answers")}
        right = frozenset(i for i, name in enumerate(names) if _plain(name) in answers)
        filled = (query.replace("@placeholder", name) for name in names)
        found.append(Item(tuple(f"{context}\n- {text}" for text in filled), right))
    return found


def _plain(text: str) -> str:
    """As ReCoRD's own exact match compares: no case, punctuation, articles, extra space."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def _copa(line: Record) -> List[Item]:
    premise = line.text("premise").strip()
    premise = premise[:-1] if premise.endswith(".") else premise
    link = line.among("question", {"cause": "because", "effect": "so"})
    choices = []
    for name in ("choice1", "choice2"):
        first, space, rest = line.text(name).strip().partition(" ")
        choices.append((first if first == "I" else first.lower()) + space + rest)
    candidates = tuple(f"{premise} {link} {choice}" for choice in choices)
    return [Item(candidates, frozenset({line.among("label", {"0": 0, "1": 1})}))]


def _boolq(line: Record) -> List[Item]:
    """SuperGLUE's file has the answer in "label", the original one in "answer"."""
    question = line.text("question").strip().rstrip("?")
    prompt = f"{line.text('passage').strip()}\nQuestion: {question}?\nAnswer:"
    key = "answer" if "answer" in line.values else "label"
    right = line.among(key, {"True": 0, "False": 1})
    return [Item((f"{prompt} yes", f"{prompt} no"), frozenset({right}))]


def _mnli(line: Record) -> List[Item]:
    """Lines without a gold label ("-": the annotators disagreed) are left out, as is usual."""
    words = {"entailment": 0, "contradiction": 1, "neutral": 2, "-": -1}
    label = line.among("gold_label", words)
    premise, hypothesis = line.text("sentence1").strip(), line.text("sentence2").strip()
    prompt = f"{premise}\nQuestion: {hypothesis} True, False, or Neither?\nAnswer:"
    candidates = tuple(f"{prompt} {word}" for word in ("True", "False", "Neither"))
    return [Item(candidates, frozenset({label} if label >= 0 else ()))]


def _sst2(line: Record) -> List[Item]:
    prompt = f"{line.text('sentence').strip()} All in all, it was"
    right = line.among("label", {"0": 0, "1": 1})
    return [Item((f"{prompt} bad", f"{prompt} good"), frozenset({right}))]


_JSONL = {".jsonl": read_jsonl}
_SUPERGLUE = "SuperGLUE, https://super.gluebenchmark.com/tasks"
_GLUE = "GLUE, https://gluebenchmark.com/tasks"

TASKS: Dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            "record",
            "sum",
            _record,
            _JSONL,
            ("val.jsonl",),
            ("train.jsonl",),
            f"ReCoRD in {_SUPERGLUE}",
        ),
        Task(
            "hellaswag",
            "mean",
            _hellaswag,
            _JSONL,
            ("hellaswag_val.jsonl",),
            ("hellaswag_train.jsonl",),
            "HellaSwag, https://github.com/rowanz/hellaswag (data/)",
        ),
        Task(
            "piqa",
            "mean",
            _piqa,
            {".jsonl": read_jsonl_and_labels},
            ("valid.jsonl",),
            ("train.jsonl",),
            "PIQA, https://yonatanbisk.com/piqa",
        ),
        Task(
            "winogrande",
            "suffix",
            _winogrande,
            _JSONL,
            ("dev.jsonl",),
            ("train_xl.jsonl",),
            "WinoGrande 1.1, https://winogrande.allenai.org",
        ),
        Task(
            "storycloze",
            "mean",
            _storycloze,
            {".csv": read_csv, ".tsv": read_tsv},
            (
                "cloze_test_test__spring2016 - cloze_test_ALL_test.csv",
                "cloze_test_test__spring2016.csv",
                "spring2016.test.tsv",
            ),
            (
                "cloze_test_val__spring2016 - cloze_test_ALL_val.csv",
                "cloze_test_val__spring2016.csv",
                "spring2016.val.tsv",
            ),
            "StoryCloze, spring 2016, given on request: https://cs.rochester.edu/nlp/rocstories",
        ),
        Task(
            "openbookqa",
            "unconditional",
            _openbookqa,
            _JSONL,
            ("test.jsonl",),
            ("train.jsonl",),
            "OpenBookQA, https://allenai.org/data/open-book-qa (Data/Main/)",
        ),
        Task(
            "copa",
            "sum",
            _copa,
            _JSONL,
            ("val.jsonl",),
            ("train.jsonl",),
            f"COPA in {_SUPERGLUE}",
        ),
        Task(
            "boolq",
            "sum",
            _boolq,
            _JSONL,
            ("val.jsonl", "dev.jsonl"),
            ("train.jsonl",),
            f"BoolQ in {_SUPERGLUE}",
        ),
        Task(
            "mnli",
            "sum",
            _mnli,
            {".tsv": read_tsv, ".jsonl": read_jsonl},
            ("dev_matched.tsv", "multinli_1.0_dev_matched.jsonl"),
            ("train.tsv", "multinli_1.0_train.jsonl"),
            f"MNLI in {_GLUE}",
        ),
        Task(
            "sst2",
            "sum",
            _sst2,
            {".tsv": read_tsv},
            ("dev.tsv",),
            ("train.tsv",),
            f"SST-2 in {_GLUE}",
        ),
    )
}
# Every question has the same answers: what they are called, in the order of the candidates.
CLASSES: Dict[str, Tuple[str, ...]] = {
    "boolq": ("yes", "no"),
    "mnli": ("entailment", "contradiction", "neutral"),
    "sst2": ("negative", "positive"),
}
PAPER = ("record", "hellaswag", "piqa", "winogrande", "storycloze", "openbookqa")
