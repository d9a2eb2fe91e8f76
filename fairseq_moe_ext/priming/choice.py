"""Tasks of choice: accuracy, zero-shot and over draws of examples."""

import sys
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Sequence, Tuple

import numpy as np

from ..errors import UserError
from ..expert_parallel import process_rank
from .formats import TASKS, Item, find_file, read_items
from .protocol import Job, Loaded, Result, Settings
from .scoring import Row, Scorer, cut, rows_of, value
from .shots import Pool, draw, fitting, joined, spread
from .vocabulary import EOS, Vocabulary

_MANY = 8  # candidates of one question, from which on their common prefix is computed once


class Question(NamedTuple):
    """An item in tokens."""

    candidates: Tuple[Tuple[int, ...], ...]
    right: Sequence[int]
    alone: Tuple[Tuple[int, ...], ...]


class Outcome(NamedTuple):
    """Of one draw."""

    chosen: List[int]  # a candidate of each question
    accuracy: float
    left_out: List[int]  # examples that did not fit before each question
    too_long: int  # candidates longer than the context, of which the beginning was cut off


def prepare(name: str, folder: Path, settings: Settings, vocabulary: Vocabulary) -> Job:
    """Read the files of a task. Raises UserError for what is missing or not as published."""
    task = TASKS[name]
    rule = settings.rule or task.rule
    path = find_file(folder, task.evaluated, task.origin)
    items = read_items(task, path)[: settings.limit]
    if rule == "unconditional" and not items[0].alone:
        raise UserError(f"--rule unconditional: not for {name}, only for openbookqa")
    questions = in_tokens(items, vocabulary.encode)
    vocabulary.check((row for question in questions for row in question.candidates), str(path))
    examples: List[str] = []
    if any(settings.shots):
        source = find_file(folder, task.examples, task.origin)
        examples = [item.example for item in read_items(task, source)]
        if len(examples) < max(settings.shots):
            raise UserError(
                f"--shots {max(settings.shots)}: {source} has {len(examples)} examples; use fewer"
            )

    def job(loaded: Loaded) -> List[Result]:
        results = []
        for shots in settings.shots:
            head = f"{name}, {shots} shots"
            pool, scorer = Pool(examples, vocabulary.encode), loaded.scorer(head)
            found = evaluate(rule, questions, pool, shots, settings, scorer, loaded.context)
            if process_rank() == 0:
                _say(head, found, loaded.context)
            results.append({"task": name, **found})
        return results

    return job


def table(results: Sequence[Result]) -> List[List[str]]:
    """Rows of text, the head first, and the mean over tasks last."""
    rows = [["task", "rule", "shots", "questions", "accuracy %", "sd of draws", "left out"]]
    for one in results:
        spread, draws = one["spread"], len(one["draws"])
        rows.append(
            [
                one["task"],
                one["rule"],
                str(one["shots"]),
                f"{one['questions']:,}",
                f"{100 * one['accuracy']:.1f}",
                "" if spread is None else f"{100 * spread:.1f} of {draws}",
                f"{one['left_out']:.1f}" if one["shots"] else "",
            ]
        )
    if len({one["task"] for one in results}) > 1:
        for shots, mean in means(results).items():
            rows.append(["mean", "", shots, "", f"{100 * mean:.1f}", "", ""])
    return rows


def means(results: Sequence[Result]) -> Dict[str, float]:
    """Number of shots -> the plain mean of the tasks' accuracies."""
    found: Dict[str, List[float]] = {}
    for one in results:
        found.setdefault(str(one["shots"]), []).append(one["accuracy"])
    return {shots: float(np.mean(accuracies)) for shots, accuracies in found.items()}


def in_tokens(items: Sequence[Item], encode: Any) -> List[Question]:
    return [
        Question(
            tuple(tuple(encode(text)) for text in item.candidates),
            sorted(item.right),
            tuple(tuple(encode(text)) for text in item.alone),
        )
        for item in items
    ]


def evaluate(
    rule: str,
    questions: Sequence[Question],
    pool: Sequence[Sequence[int]],
    shots: int,
    settings: Settings,
    scorer: Scorer,
    context: int,
) -> Result:
    """Figures for one number of shots; `pool` are the examples in tokens."""
    base = baselines(rule, questions, scorer, context)
    outcomes = []
    for number in range(settings.draws if shots else 1):
        drawn = draw(len(pool), shots, settings.seed, number) if shots else []
        outcomes.append(
            answer(rule, questions, base, [pool[i] for i in drawn], scorer, context),
        )
    found = [outcome.accuracy for outcome in outcomes]
    return {
        "rule": rule,
        "shots": shots,
        "questions": len(questions),
        "accuracy": float(np.mean(found)),
        "spread": spread(found),
        "draws": found,
        "left_out": float(np.mean([outcome.left_out for outcome in outcomes])),
        "too_long": max(outcome.too_long for outcome in outcomes),
    }


def baselines(rule: str, questions: Sequence[Question], scorer: Scorer, context: int) -> List[Any]:
    """What is taken off the candidates' scores of each question: (candidates,) or 0."""
    if rule != "unconditional":
        return [0.0] * len(questions)
    return scores("sum", [question.alone for question in questions], scorer, context)


def answer(
    rule: str,
    questions: Sequence[Question],
    base: Sequence[Any],
    examples: Sequence[Sequence[int]],
    scorer: Scorer,
    context: int,
) -> Outcome:
    """Answer all questions after the same examples; each gets those that fit, the last ones."""
    prompts, left_out, shared = [], [], []
    for question in questions:
        count = fitting(examples, max(map(len, question.candidates)), context)
        before = joined(examples[len(examples) - count :], EOS)
        prompts.append([before + candidate for candidate in question.candidates])
        left_out.append(len(examples) - count)
        shared.append(len(before))
    too_long = sum(len(row) > context for rows in prompts for row in rows)
    found = scores(rule, prompts, scorer, context, shared)
    chosen = [int(np.argmax(one - less)) for one, less in zip(found, base)]
    right = [choice in question.right for choice, question in zip(chosen, questions)]
    return Outcome(chosen, float(np.mean(right)), left_out, too_long)


def scores(
    rule: str,
    questions: Sequence[Sequence[Tuple[int, ...]]],
    scorer: Scorer,
    context: int,
    shared: Sequence[int] = (),
) -> List[np.ndarray]:
    """(candidates,) of each question. `shared`: the tokens of the examples before each."""
    rows: List[Row] = []
    for i, candidates in enumerate(questions):
        found = rows_of(rule, candidates)
        examples = shared[i] if shared else 0
        if len(candidates) >= _MANY:
            examples = min(row.start for row in found)
        rows.extend(cut(row._replace(shared=examples), context) for row in found)
    values = iter([value(rule, log_probs) for log_probs in scorer(rows)])
    return [np.array([next(values) for _ in candidates]) for candidates in questions]


def _say(head: str, found: Result, context: int) -> None:
    """One line on stderr, and one more for prompts that do not fit."""
    print(f"{head}: {100 * found['accuracy']:.1f} %", file=sys.stderr, flush=True)
    if found["left_out"]:
        print(
            f"{head}: prompts are longer than the context of {context} tokens; "
            f"{found['left_out']:.1f} of {found['shots']} examples are left out (mean)",
            file=sys.stderr,
        )
    if found["too_long"]:
        print(
            f"{head}: {found['too_long']} candidates are longer than the context of {context} "
            "tokens even without examples; their beginning is cut off",
            file=sys.stderr,
        )
