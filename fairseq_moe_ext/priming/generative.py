"""Translation and summarisation: answers that the model writes, scored with sacrebleu.

    translation     "SOURCE = TARGET", a line each
    summarization   "DOCUMENT", and on the next line "TL;DR: SUMMARY"

An answer ends at the first newline, which these models write as </s>. The paper has no generative
tasks; the formats are those that later models of its authors (XGLM, Lin et al. 2021) and GPT-2 were
primed with.
"""

from functools import partial
from pathlib import Path
from typing import Callable, Dict, List, NamedTuple, Sequence, Tuple

import numpy as np

from .. import files
from ..errors import UserError
from ..models.search import Generator, Prompt, no_text
from ..questions.formats import find_file
from ..questions.records import read_jsonl
from ..questions.vocabulary import EOS, Vocabulary
from ..wording import count, small
from .protocol import Job, Loaded, Result, Settings, say
from .shots import draw, fitting, joined, shortage, shortage_in_words, standard_deviation


class Text(NamedTuple):
    """A prompt, and its reference answer."""

    prompt: str
    answer: str  # begins with a space, to continue the prompt


def read_translation(folder: Path, settings: Settings, split: int) -> List[Text]:
    """Two files of a line each sentence. Raises UserError for files that do not belong together."""
    if settings.languages is None:
        raise UserError("--languages: translation needs them, for example --languages en-fr")
    paths = []
    for language in settings.languages:
        names = tuple(name.format(language) for name in _TRANSLATION[split])
        paths.append(find_file(folder, names, _TRANSLATION_ORIGIN))
    sides = []
    for path in paths:
        text = files.read_text(path, encoding="utf-8-sig").rstrip("\n")
        sides.append([line.strip() for line in text.split("\n")])
    if len(sides[0]) != len(sides[1]):
        raise UserError(
            f"{paths[0]} has {count(len(sides[0]), 'line')}, {paths[1]} {len(sides[1]):,}: "
            "they must be translations of each other, line by line; use the files as published"
        )
    for number, pair in enumerate(zip(*sides), start=1):
        if any(pair) and not all(pair):
            path = paths[0] if pair[1] else paths[1]
            raise UserError(
                f"{path}, line {number}: blank, but not in the other language; fill or drop it"
            )
    texts = [Text(f"{a} =", f" {b}") for a, b in zip(*sides) if a]
    if not texts:
        raise UserError(f"{paths[0]}: contains no sentence; use the file as published")
    return texts


def read_summarization(folder: Path, settings: Settings, split: int) -> List[Text]:
    """A JSON object a line, with the names of XSum's or CNN/DailyMail's fields. Raises UserError
    for a file that is missing, broken or empty."""
    path = find_file(folder, (("test.jsonl",), ("train.jsonl",))[split], _SUMMARIZATION_ORIGIN)
    texts = []
    for line in read_jsonl(path):
        names = ("article", "highlights") if "article" in line.values else ("document", "summary")
        document, summary = (" ".join(line.text(name).split()) for name in names)
        texts.append(Text(f"{document}\nTL;DR:", f" {summary}"))
    if not texts:
        raise UserError(f"{path}: contains no document; use the file as published")
    return texts


def prepare(name: str, folder: Path, settings: Settings, vocabulary: Vocabulary) -> List[Job]:
    """Read the files of a task. Raises UserError for missing files, or files not as published."""
    texts = _READ[name](folder, settings, 0)[: settings.limit]
    questions = [vocabulary.encode(text.prompt) for text in texts]
    vocabulary.check(questions, str(folder))
    examples: List[Text] = []
    if any(settings.shots):
        examples = _READ[name](folder, settings, 1)
        if len(examples) < max(settings.shots):
            raise UserError(
                f"--shots {max(settings.shots)}: {folder} has {len(examples)} examples to draw "
                "from; use fewer"
            )

    def job(shots: int, loaded: Loaded) -> Result:
        result = _evaluate(name, shots, texts, questions, examples, settings, loaded)
        return {"task": name, **result}

    return [partial(job, shots) for shots in settings.shots]


def _evaluate(
    name: str,
    shots: int,
    texts: Sequence[Text],
    questions: Sequence[Sequence[int]],
    examples: Sequence[Text],
    settings: Settings,
    loaded: Loaded,
) -> Result:
    """Scores of one number of shots, over draws; the answers of the first draw."""
    max_new = settings.max_new_tokens or min(128, loaded.context // 2)
    room = loaded.context - max_new
    head = f"{name}, {count(shots, 'shot')}"
    never = no_text(loaded.model, tokenizer=True)
    generator = Generator(loaded.model, settings.beam, loaded.max_tokens, head, never=never)
    by_draw, left_out = [], []
    answers: List[str] = []
    too_long = sum(len(question) > room for question in questions)
    for number in range(settings.draws if shots else 1):
        drawn = draw(len(examples), shots, settings.seed, number) if shots else []
        before = [loaded.vocabulary.encode("".join(examples[i])) for i in drawn]
        prompts = []
        for question in questions:
            fit = fitting(before, len(question), room)
            left_out.append(shots - fit)
            tokens = joined(before[len(before) - fit :], EOS) + tuple(question)
            prompts.append(Prompt(tokens[-room:], max_new, _ends_the_line))
        written = [loaded.vocabulary.decode(new).strip() for new in generator(prompts)]
        answers = answers or written
        by_draw.append(scores(written, [text.answer.strip() for text in texts]))
    result = {
        "shots": shots,
        "questions": len(texts),
        "beam": settings.beam,
        "scores": {
            metric: {
                "mean": float(np.mean([draw_scores[metric][0] for draw_scores in by_draw])),
                "spread": standard_deviation([draw_scores[metric][0] for draw_scores in by_draw]),
                "signature": by_draw[0][metric][1],
            }
            for metric in by_draw[0]
        },
        **shortage(left_out),
        "too_long": too_long,
        "answers": answers,
    }
    _say(head, result, room)
    return result


def check_room(settings: Settings, context: int) -> None:
    """Raise UserError if an answer may fill the whole context."""
    if settings.max_new_tokens is not None and settings.max_new_tokens >= context:
        raise UserError(
            f"--max-new-tokens {settings.max_new_tokens}: leaves no room for a prompt in the "
            f"context of {context} tokens; lower it"
        )


def scores(written: Sequence[str], references: Sequence[str]) -> Dict[str, Tuple[float, str]]:
    """Metric -> its score of the whole set, 0 to 100, and sacrebleu's signature."""
    from sacrebleu.metrics import BLEU, CHRF

    by_metric = {}
    for metric in (BLEU(), CHRF()):
        score = metric.corpus_score(list(written), [list(references)])
        by_metric[score.name] = (float(score.score), str(metric.get_signature()))
    return by_metric


def table(results: Sequence[Result]) -> List[List[str]]:
    """Rows of text, the head first."""
    names = list(results[0]["scores"])
    rows = [["task", "shots", "texts", *names, "left out"]]
    for result in results:
        cells = []
        for score in result["scores"].values():
            deviation = score["spread"]
            cells.append(
                f"{score['mean']:.2f}" + ("" if deviation is None else f" sd {deviation:.2f}")
            )
        omitted = small(result["left_out"], 1) if result["shots"] else ""
        rows.append(
            [result["task"], str(result["shots"]), f"{result['questions']:,}", *cells, omitted]
        )
    return rows


def notes(results: Sequence[Result]) -> List[str]:
    """Notes below the table: sacrebleu's signatures."""
    return [
        f"{name}: {score['signature']}"
        for result in results[:1]
        for name, score in result["scores"].items()
    ]


def _ends_the_line(new: Sequence[int]) -> bool:
    return new[-1] == EOS


def _say(head: str, result: Result, room: int) -> None:
    """Lines for prompts that do not fit."""
    whose = f"the {room} tokens that --max-new-tokens leaves of the context"
    if result["left_out"]:
        say(f"{head}: {shortage_in_words(result)}, because they must fit into {whose}")
    if result["too_long"]:
        say(
            f"{head}: {result['too_long']:,} of {count(result['questions'], 'question')} "
            f"{'is' if result['too_long'] == 1 else 'are'} longer than {whose}, even without "
            "examples; the beginning is cut off"
        )


_TRANSLATION = (("test.{}", "{}.devtest"), ("train.{}", "valid.{}", "{}.dev"))
_TRANSLATION_ORIGIN = (
    "a test set of two text files with one sentence per line: FLORES-101's LANGUAGE.devtest and "
    ".dev, or test.LANGUAGE of `sacrebleu -t wmt14 -l en-fr --echo src` and `ref`"
)
_SUMMARIZATION_ORIGIN = (
    "XSum (fields document, summary) or CNN/DailyMail (article, highlights), one JSON object "
    "per line"
)
_READ: Dict[str, Callable[[Path, Settings, int], List[Text]]] = {
    "translation": read_translation,
    "summarization": read_summarization,
}
NAMES = tuple(_READ)
