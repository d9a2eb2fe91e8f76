"""Multiple-choice tasks: accuracy, zero-shot and over draws of examples."""

from functools import partial
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Sequence, Tuple

import numpy as np

from .. import accuracy
from ..errors import UserError
from ..evaluation import paper
from ..questions.formats import CLASSES, TASKS, Item, find_file, read_counted, read_items
from ..questions.scoring import Row, Scorer, cut, rows_of, value
from ..questions.vocabulary import EOS, Vocabulary
from ..wording import count, small
from .protocol import Job, Loaded, Result, Settings, say
from .shots import Pool, draw, fitting, joined, shortage, shortage_in_words, standard_deviation

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
    too_long: int  # candidates longer than the context, whose beginning was cut off
    cut: int  # questions with such a candidate


def prepare(name: str, folder: Path, settings: Settings, vocabulary: Vocabulary) -> List[Job]:
    """Read the files of a task. Raises UserError for missing files, or files not as published."""
    task = TASKS[name]
    rule = settings.rule or task.rule
    path = find_file(folder, task.evaluated, task.origin)
    items, unanswered = read_counted(task, path, settings.published_text)
    items, total = items[: settings.limit], len(items) + unanswered
    if rule == "unconditional" and not items[0].alone:
        raise UserError(
            f"--rule unconditional: only for openbookqa, not for {name}; remove it, or use "
            "--tasks openbookqa"
        )
    questions = in_tokens(items, vocabulary.encode)
    vocabulary.check((row for question in questions for row in question.candidates), str(path))
    read, examples = str(path), []
    if any(settings.shots):
        source = find_file(folder, task.examples, task.origin)
        examples = read_items(task, source, settings.published_text)
        if len(examples) < max(settings.shots):
            raise UserError(
                f"--shots {max(settings.shots)}: {source} has {count(len(examples), 'example')}; "
                "use fewer"
            )
        read += f", examples of {source}"
    pool = Pool([item.example for item in examples], vocabulary.encode)
    best = accuracy.majority([min(item.right) for item in items])

    def job(shots: int, loaded: Loaded) -> Result:
        head = f"{name}, {count(shots, 'shot')}"
        say(f"{head}: {read if shots else path}")
        result = evaluate(
            rule, questions, pool, shots, settings, loaded.scorer(head), loaded.context
        )
        result["majority"] = best if name in CLASSES else None
        result["questions_left_out"] = total - len(items)
        result["prompts_related"] = related(
            items, questions, examples, pool, shots, settings, loaded.context
        )
        _say(head, result, loaded.context)
        return {"task": name, **result}

    return [partial(job, shots) for shots in settings.shots]


def related(
    items: Sequence[Item],
    questions: Sequence[Question],
    examples: Sequence[Item],
    pool: Pool,
    shots: int,
    settings: Settings,
    context: int,
) -> int:
    """How many prompts contain an example that belongs to the question: the same passage, ..."""
    prompts = 0
    for number in range(settings.draws if shots else 0):
        drawn = draw(len(examples), shots, settings.seed, number)
        tokens = [pool[i] for i in drawn]
        for item, question in zip(items, questions):
            fit = _fitting(tokens, question, context)
            before = {key for i in drawn[shots - fit :] for key in examples[i].keys}
            prompts += not before.isdisjoint(item.keys)
    return prompts


def _fitting(examples: Sequence[Sequence[int]], question: Question, context: int) -> int:
    """The number of examples, counted from the last, that fit before a question."""
    return fitting(examples, max(map(len, question.candidates)), context)


def table(results: Sequence[Result]) -> List[List[str]]:
    """Rows of text, the head first, and the mean over tasks last."""
    head = ["task", "rule", "shots", "questions", "cut", "not asked", "accuracy %"]
    rows = [[*head, "95 % interval", "chance %", "sd of draws", "left out"]]
    for result in results:
        deviation, draws = result["spread"], len(result["draws"])
        rows.append(
            [
                result["task"],
                result["rule"],
                str(result["shots"]),
                f"{result['questions']:,}",
                f"{result['questions_cut']:,}",
                f"{result['questions_left_out']:,}",
                f"{100 * result['accuracy']:.1f}",
                accuracy.in_percent(*result["interval"]),
                guessing(result),
                "" if deviation is None else f"{100 * deviation:.1f} of {draws}",
                small(result["left_out"], 1) if result["shots"] else "",
            ]
        )
    if len({result["task"] for result in results}) > 1:
        for shots, mean in means(results).items():
            cells = [f"{100 * mean['accuracy']:.1f}", accuracy.in_percent(*mean["interval"])]
            cells += [f"{100 * mean['chance']:.1f}"]
            name = f"mean of {paper.tasks_in_words(mean['tasks'])}"
            rows.append([name, "", shots, "", "", "", *cells, "", ""])
    return rows


def guessing(result: Result) -> str:
    """Chance in percent, with the most frequent answer's accuracy where all questions have the
    same answers."""
    chance = f"{100 * result['chance']:.1f}"
    return chance if result["majority"] is None else f"{chance} ({100 * result['majority']:.1f})"


def notes(results: Sequence[Result]) -> List[str]:
    """Notes below the table."""
    note = "95 % interval: over questions, not over draws. chance: a guess among the candidates"
    if any(result["majority"] is not None for result in results):
        note += "; in brackets, always the most frequent answer"
    lines = [note]
    tasks = list(dict.fromkeys(result["task"] for result in results))
    if len(tasks) > 1:
        lines.append(f"mean of {paper.tasks_in_words(tasks)}: {', '.join(tasks)}")
        if set(tasks) != set(paper.SIX_TASKS):
            lines[-1] += f"; the paper's mean is over {', '.join(paper.SIX_TASKS)}"
    return lines


def means(results: Sequence[Result]) -> Dict[str, Result]:
    """Number of shots -> the plain means of the tasks' accuracies and chances, with the interval of
    the former, and the tasks."""
    by_shots: Dict[str, List[Result]] = {}
    for result in results:
        by_shots.setdefault(str(result["shots"]), []).append(result)
    averages = {}
    for shots, tasks in by_shots.items():
        accuracies = [result["accuracy"] for result in tasks]
        averages[shots] = {
            "accuracy": float(np.mean(accuracies)),
            "interval": list(
                accuracy.mean_interval(accuracies, [result["questions"] for result in tasks])
            ),
            "chance": float(np.mean([result["chance"] for result in tasks])),
            "tasks": [result["task"] for result in tasks],
        }
    return averages


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
    """Metrics for one number of shots; `pool` contains the examples in tokens."""
    base = baselines(rule, questions, scorer, context)
    outcomes = []
    for number in range(settings.draws if shots else 1):
        drawn = draw(len(pool), shots, settings.seed, number) if shots else []
        outcomes.append(answer(rule, questions, base, [pool[i] for i in drawn], scorer, context))
    accuracies = [outcome.accuracy for outcome in outcomes]
    total, mean = len(questions), float(np.mean(accuracies))
    right = [len(question.right) for question in questions]
    return {
        "rule": rule,
        "shots": shots,
        "questions": total,
        "accuracy": mean,
        "interval": list(accuracy.wilson_interval(mean * total, total)),
        "chance": accuracy.chance(right, [len(question.candidates) for question in questions]),
        "spread": standard_deviation(accuracies),
        "draws": accuracies,
        **shortage([left for outcome in outcomes for left in outcome.left_out]),
        "too_long": max(outcome.too_long for outcome in outcomes),
        "questions_cut": max(outcome.cut for outcome in outcomes),
    }


def baselines(rule: str, questions: Sequence[Question], scorer: Scorer, context: int) -> List[Any]:
    """What to subtract from the candidates' scores of each question: (candidates,) or 0."""
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
        fit = _fitting(examples, question, context)
        before = joined(examples[len(examples) - fit :], EOS)
        prompts.append([before + candidate for candidate in question.candidates])
        left_out.append(len(examples) - fit)
        shared.append(len(before))
    long = [sum(len(row) > context for row in rows) for rows in prompts]
    candidate_scores = scores(rule, prompts, scorer, context, shared)
    chosen = [int(np.argmax(score - baseline)) for score, baseline in zip(candidate_scores, base)]
    right = [choice in question.right for choice, question in zip(chosen, questions)]
    return Outcome(chosen, float(np.mean(right)), left_out, sum(long), sum(map(bool, long)))


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
        candidate_rows = rows_of(rule, candidates)
        examples = shared[i] if shared else 0
        if len(candidates) >= _MANY:
            examples = min(row.start for row in candidate_rows)
        rows.extend(cut(row._replace(shared=examples), context) for row in candidate_rows)
    values = iter([value(rule, log_probs) for log_probs in scorer(rows)])
    return [np.array([next(values) for _ in candidates]) for candidates in questions]


def _say(head: str, result: Result, context: int) -> None:
    """One line, and one more each for prompts that do not fit and for examples that belong to the
    question."""
    say(
        f"{head}: {100 * result['accuracy']:.1f} % (95 % interval "
        f"{accuracy.in_percent(*result['interval'])}, chance {100 * result['chance']:.1f})"
    )
    if result["left_out"]:
        say(f"{head}: {shortage_in_words(result)}, because the context has {context} tokens")
    if result["too_long"]:
        say(
            f"{head}: {count(result['too_long'], 'candidate')} of "
            f"{count(result['questions_cut'], 'question')} (of {result['questions']:,}) "
            f"{'is' if result['too_long'] == 1 else 'are'} longer than the context of {context} "
            "tokens even without examples; the beginning is cut off"
        )
    if result["prompts_related"]:
        say(
            f"{head}: in {result['prompts_related']:,} of {count(result['prompts'], 'prompt')}, "
            "an example is related to the question: the same passage, premise, twin, ..., or "
            "the same question"
        )
