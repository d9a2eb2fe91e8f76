"""How a line of each data set becomes a prompt with candidates.

The first six are the paper's tasks (Artetxe et al. 2021), in formats that follow GPT-3's (Brown et
al. 2020, appendix G), as the paper does. Of the other four, COPA and BoolQ have GPT-3's formats,
MNLI that of GPT-3's NLI tasks, SST-2 a cloze. docs/priming.md shows one of each, and where the
authors' own code differs.
"""

import hashlib
import re
import string
from pathlib import Path
from typing import Callable, Dict, FrozenSet, List, NamedTuple, Optional, Tuple

from ..errors import UserError
from .records import Reader, Record, read_csv, read_jsonl, read_jsonl_and_labels, read_tsv


class Item(NamedTuple):
    """One question."""

    candidates: Tuple[str, ...]  # the whole prompt with each candidate in it
    right: FrozenSet[int]  # empty: no candidate is right, and the question is skipped
    alone: Tuple[str, ...] = ()  # each candidate after "Answer: ", for the rule that wants it
    shared: Tuple[bytes, ...] = ()  # passage, ...: questions with one in common belong together
    location: str = ""  # in its file, as "line 3"

    @property
    def example(self) -> str:
        """The prompt with the right answer, to precede another question."""
        return self.candidates[min(self.right)]

    @property
    def keys(self) -> Tuple[bytes, ...]:
        """Keys that related questions have in common: `shared`, or being the same question."""
        return (*self.shared, group_key("same", *sorted(self.candidates)))


class Task(NamedTuple):
    """One data set."""

    name: str
    rule: str  # scoring.RULES
    items: Callable[[Record], List[Item]]  # of one line
    read: Dict[str, Reader]  # by the file name's ending
    evaluated: Tuple[str, ...]  # names of the published file; the first that is there is read
    examples: Tuple[str, ...]  # likewise, of what shots are drawn from
    origin: str
    published: Optional[Callable[[Record], List[Item]]] = None  # `items` of the text as published


def find_file(folder: Path, names: Tuple[str, ...], origin: str) -> Path:
    """The file with the first of the published names in a task's folder or below it.

    Raises:
        UserError: if there is none (the message says where to get it), or more than one.
    """
    for name in names:
        matches = sorted(folder.rglob(name))
        if len(matches) > 1:
            raise UserError(
                f"{matches[0]} and {matches[1]}: two files named {name}; remove or rename one"
            )
        if matches and not matches[0].is_file():
            raise UserError(
                f"{matches[0]}: not a regular file; replace it with the file of {origin}"
            )
        if matches:
            return matches[0]
    raise UserError(
        f"{folder / names[0]}: missing; get it from {origin}"
        + (f" (or {', '.join(names[1:])})" if len(names) > 1 else "")
    )


def read_items(task: Task, path: Path, published: bool = False) -> List[Item]:
    """All questions of a file that have a right answer, in order. `published`: in the text as
    published, where the task changes it. Raises UserError for a line that is not as published, and
    for a file without any question."""
    return read_counted(task, path, published)[0]


def read_counted(task: Task, path: Path, published: bool = False) -> Tuple[List[Item], int]:
    """As `read_items`, errors included, and how many questions have no right answer and are left
    out."""
    items = task.published if published and task.published else task.items
    every = []
    for record in task.read[path.suffix](path):
        for item in items(record):
            if not all(item.candidates):
                raise record.mistake("a candidate has no text")
            every.append(item._replace(location=record.location))
    answerable = [item for item in every if item.right]
    if not answerable:
        raise UserError(f"{path}: contains no question; use the file as published")
    return answerable, len(every) - len(answerable)


def group_key(kind: str, *texts: str) -> bytes:
    """Equal for texts that differ only in case and space; short, as there are millions."""
    text = " ".join(f"{kind}: {' '.join(texts)}".lower().split())
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def given_keys(line: Record, *names: str) -> Tuple[bytes, ...]:
    """A key of each field that the line has: some releases lack it."""
    return tuple(group_key(name, str(line.values[name])) for name in names if line.values.get(name))


def _without_markers(text: str) -> str:
    """By lm-eval's rule: WikiHow's [header], [title], [step], ... are no part of the text."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def _hellaswag(line: Record) -> List[Item]:
    """lm-eval's prompt, letter for letter (lm_eval/tasks/hellaswag/utils.py)."""
    context = f"{line.text('ctx_a')} {line.text('ctx_b').capitalize()}"
    prompt = _without_markers(f"{line.text('activity_label')}: {context}")
    return [_of_hellaswag(line, prompt, list(map(_without_markers, line.texts("endings"))))]


def _hellaswag_as_published(line: Record) -> List[Item]:
    begun = line.text("ctx_b").strip()
    context = f"{line.text('ctx_a').strip()} {begun[:1].upper()}{begun[1:]}"
    prompt = " ".join(f"{line.text('activity_label')}: {context}".split())
    return [_of_hellaswag(line, prompt, [end.strip() for end in line.texts("endings")])]


def _of_hellaswag(line: Record, prompt: str, endings: List[str]) -> Item:
    label = line.among("label", {str(i): i for i in range(len(endings))})
    shared = (*given_keys(line, "source_id"), group_key("prompt", prompt))
    candidates = tuple(f"{prompt} {end}" for end in endings)
    return Item(candidates, frozenset({label}), shared=shared)


def _piqa(line: Record) -> List[Item]:
    goal = line.text("goal").strip()
    candidates = tuple(f"{goal} {line.text(name).strip()}" for name in ("sol1", "sol2"))
    right = line.among("label", {"0": 0, "1": 1})
    return [Item(candidates, frozenset({right}), shared=(group_key("goal", goal),))]


def _winogrande(line: Record) -> List[Item]:
    """Twins, of which one word differs, have a qID in common but for its last part. Releases
    without it are held together by the two options."""
    sentence = line.text("sentence")
    if sentence.count("_") != 1:
        raise line.mistake(f"field 'sentence' has {sentence.count('_')} blanks '_', not one")
    options = [line.text(name) for name in ("option1", "option2")]
    stem = str(line.values.get("qID") or "").rpartition("-")[0]
    shared = group_key("qID", stem) if stem else group_key("options", *sorted(options))
    candidates = tuple(sentence.replace("_", option) for option in options)
    right = line.among("answer", {"1": 0, "2": 1})
    return [Item(candidates, frozenset({right}), shared=(shared,))]


def _storycloze(line: Record) -> List[Item]:
    story = " ".join(line.text(f"InputSentence{i}").strip() for i in range(1, 5))
    endings = (line.text(f"RandomFifthSentenceQuiz{i}").strip() for i in (1, 2))
    candidates = tuple(f"{story} {ending}" for ending in endings)
    right = line.among("AnswerRightEnding", {"1": 0, "2": 1})
    return [Item(candidates, frozenset({right}), shared=(group_key("story", story),))]


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
            (*given_keys(line, "fact1"), group_key("stem", stem)),
        )
    ]


def _record(line: Record) -> List[Item]:
    """A passage, its highlights as bullets, and the query as one more, with an entity in it. Where
    no entity is an answer, none is wrong, and the question has no right one."""
    passage = line.text("passage", "text")
    context = "\n".join(part.strip() for part in passage.split("@highlight") if part.strip())
    context = context.replace("\n", "\n- ")
    names: Dict[str, None] = {}  # in order, each once
    for entity in line.items("passage", "entities"):
        span = line.part(entity)
        start, end = span.number("start"), span.number("end")  # `end` is the last one
        if not 0 <= start <= end < len(passage):
            raise line.mistake(
                f"an entity spans {start} to {end}, but the passage has {len(passage)} characters"
            )
        names[passage[start : end + 1]] = None
    questions = []
    for part in line.items("qas"):
        question = line.part(part)
        query = question.text("query")
        answers = {_plain(line.part(a).text("text")) for a in question.items("answers")}
        right = frozenset(i for i, name in enumerate(names) if _plain(name) in answers)
        filled = (query.replace("@placeholder", name) for name in names)
        candidates = tuple(f"{context}\n- {text}" for text in filled)
        questions.append(Item(candidates, right, shared=(group_key("passage", passage),)))
    return questions


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
    shared = (group_key("premise", premise), group_key("choices", *sorted(choices)))
    right = line.among("label", {"0": 0, "1": 1})
    return [Item(candidates, frozenset({right}), shared=shared)]


def _boolq(line: Record) -> List[Item]:
    """SuperGLUE's file has the answer in "label", the original one in "answer"."""
    question = line.text("question").strip().rstrip("?")
    passage = line.text("passage").strip()
    prompt = f"{passage}\nQuestion: {question}?\nAnswer:"
    key = "answer" if "answer" in line.values else "label"
    right = line.among(key, {"True": 0, "False": 1})
    shared = (group_key("passage", passage),)
    return [Item((f"{prompt} yes", f"{prompt} no"), frozenset({right}), shared=shared)]


def _mnli(line: Record) -> List[Item]:
    """Lines without a gold label ("-": the annotators disagreed) have no right answer."""
    words = {"entailment": {0}, "contradiction": {1}, "neutral": {2}, "-": set()}
    right = frozenset(line.among("gold_label", words))
    premise, hypothesis = line.text("sentence1").strip(), line.text("sentence2").strip()
    prompt = f"{premise}\nQuestion: {hypothesis} True, False, or Neither?\nAnswer:"
    candidates = tuple(f"{prompt} {word}" for word in ("True", "False", "Neither"))
    return [
        Item(
            candidates, right, shared=(*given_keys(line, "promptID"), group_key("premise", premise))
        )
    ]


def _sst2(line: Record) -> List[Item]:
    """Training lines are phrases of sentences: those with five words in a row in common are taken
    to be of one sentence."""
    sentence = line.text("sentence").strip()
    prompt = f"{sentence} All in all, it was"
    right = line.among("label", {"0": 0, "1": 1})
    words = sentence.split()
    shared = tuple(group_key("words", *words[i : i + 5]) for i in range(len(words) - 4))
    return [Item((f"{prompt} bad", f"{prompt} good"), frozenset({right}), shared=shared)]


_JSONL: Dict[str, Reader] = {".jsonl": read_jsonl}
_VALID = ("val.jsonl", "dev.jsonl", "valid.jsonl", "validation.jsonl")  # by all names in use
_TRAIN = ("train.jsonl",)
_SUPERGLUE = "SuperGLUE, https://super.gluebenchmark.com/tasks"
_GLUE = "GLUE, https://gluebenchmark.com/tasks"

TASKS: Dict[str, Task] = {
    task.name: task
    for task in (
        Task("record", "sum", _record, _JSONL, _VALID, _TRAIN, f"ReCoRD in {_SUPERGLUE}"),
        Task(
            "hellaswag",
            "mean",
            _hellaswag,
            _JSONL,
            ("hellaswag_val.jsonl", *_VALID),
            ("hellaswag_train.jsonl", *_TRAIN),
            "HellaSwag, https://github.com/rowanz/hellaswag (data/)",
            _hellaswag_as_published,
        ),
        Task(
            "piqa",
            "mean",
            _piqa,
            {".jsonl": read_jsonl_and_labels},
            ("valid.jsonl", "dev.jsonl", "val.jsonl", "validation.jsonl"),
            _TRAIN,
            "PIQA, https://yonatanbisk.com/piqa",
        ),
        Task(
            "winogrande",
            "suffix",
            _winogrande,
            _JSONL,
            ("dev.jsonl", "val.jsonl", "valid.jsonl", "validation.jsonl"),
            # by size: 40,398, 10,234, 9,248, 2,558, 640 and 160 questions
            tuple(f"train_{size}.jsonl" for size in ("xl", "l", "debiased", "m", "s", "xs")),
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
            ("test.jsonl", "test_complete.jsonl"),
            ("train_complete.jsonl", "train.jsonl"),  # the first says which questions share a fact
            "OpenBookQA, https://allenai.org/data/open-book-qa (Data/)",
        ),
        Task("copa", "sum", _copa, _JSONL, _VALID, _TRAIN, f"COPA in {_SUPERGLUE}"),
        Task("boolq", "sum", _boolq, _JSONL, _VALID, _TRAIN, f"BoolQ in {_SUPERGLUE}"),
        Task(
            "mnli",
            "sum",
            _mnli,
            {".tsv": read_tsv, ".jsonl": read_jsonl},
            (
                "dev_matched.tsv",
                "multinli_1.0_dev_matched.jsonl",
                "dev_mismatched.tsv",
                "multinli_1.0_dev_mismatched.jsonl",
            ),
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
