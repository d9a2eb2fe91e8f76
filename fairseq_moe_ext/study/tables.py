"""The tables of a study's page: (head, rows) of text each."""

import math
from typing import Dict, Iterator, List, Optional, Sequence, Tuple

from ..accuracy import in_percent, wilson_interval
from ..evaluation import paper
from ..evaluation.cost_table import TABLE_1_HEAD, table_1
from ..evaluation.study_result import BiasResult, RunResult, StudyResult, TaskResult, unlike
from ..wording import count, signed, small, with_prefix
from . import fine_tuning
from . import result as results

LABELS = {"dense": "Dense", "moe": "MoE"}
TITLES = {
    "in_domain": "In domain, mean",
    "out_of_domain": "Out of domain, mean",
    "0-shot": "Zero-shot accuracy",
}
Runs = results.Runs
Table = Tuple[List[str], List[List[str]]]


def _by_model(runs: Runs) -> Dict[str, List[RunResult]]:
    """Name of a model -> its runs, one a seed."""
    by_model: Dict[str, List[RunResult]] = {}
    for run in runs:
        by_model.setdefault(f"{LABELS[run['family']]} {run['size']}", []).append(run)
    return by_model


def models(runs: Runs) -> Table:
    rows = []
    for name, model_runs in _by_model(runs).items():
        first = model_runs[0]
        rows.append(
            [
                name,
                with_prefix(first["parameters"]),
                with_prefix(first["active"]),
                with_prefix(first["tokens"]),
                f"{results.mean_flops(model_runs):.3g}",
                f"{sum(run['seconds'] for run in model_runs) / len(model_runs) / 60:.1f}",
                str(len(model_runs)),
            ]
        )
    head = ["", "Parameters", "Active", "Tokens", "FLOPs", "Minutes", "Seeds"]
    return head, rows


def perplexities(runs: Runs) -> Table:
    """Mean over seeds, and half the range over them; the choices that training dropped at its end
    (evaluation drops none) in the last row."""
    by_model = _by_model(runs)
    rows = []
    for group in [g for g in results.groups(runs) if g in runs[0]["mean"] or g in runs[0]["sets"]]:
        row = [TITLES.get(group, group)]
        for model_runs in by_model.values():
            values = [results.performance(run, group) for run in model_runs]
            cell = f"{sum(values) / len(values):.2f}"
            if len(values) > 1:
                cell += f" ± {small((max(values) - min(values)) / 2)}"
            if unlike(model_runs, group):
                cell = "different text"
            row.append("" if math.isnan(sum(values)) else cell)
        rows.append(row)
    row = ["Choices dropped in training, %"]
    for model_runs in by_model.values():
        routers = [run.get("router", {}) for run in model_runs]  # older files lack it
        lost = [router["overflow"] for router in routers if "overflow" in router]
        row.append(small(sum(lost) / len(lost)) if lost else "")
    return ["", *by_model], [*rows, row]


def paper_models() -> Table:
    """Table 1, as `fairseq-moe cost --paper`."""
    return list(TABLE_1_HEAD), table_1()


def priming(runs: Runs) -> Table:
    """Accuracy of each task and number of shots by model with its interval, then the means; what
    chance gives, and how many questions there were."""
    by_model = _by_model(runs)
    tasks = [task_result for run in runs for task_result in run["priming"]["tasks"]]
    rows = []
    for shots in sorted({task_result["shots"] for task_result in tasks}):
        of_shots = {
            task_result["task"]: task_result
            for task_result in tasks
            if task_result["shots"] == shots
        }
        for task in [*of_shots, None]:
            accuracies = [
                results.mean_accuracy(model_runs, str(shots), task)
                for model_runs in by_model.values()
            ]
            cells = [_accuracy(task_result) for task_result in accuracies]
            numbers = ["", "", ""] if task is None else _questions(of_shots[task])
            guesses = [task_result for task_result in accuracies if task_result.chance is not None]
            level = _chance(guesses[0]) if guesses else "not known"
            label = task or f"mean of {paper.tasks_in_words(of_shots)}"
            rows.append([f"{label}, {count(shots, 'shot')}", *numbers, level, *cells])
    return ["", "Questions", "Cut", "Not asked", "Chance", *by_model], rows


def _accuracy(accuracy: "results.Accuracy") -> str:
    if math.isnan(accuracy.mean):
        return ""
    return f"{100 * accuracy.mean:.1f} ({in_percent(accuracy.low, accuracy.high)})"


def _chance(accuracy: "results.Accuracy") -> str:
    """In per cent, and the accuracy of the most frequent answer where that is higher."""
    chance, floor = accuracy.chance or 0.0, accuracy.floor or 0.0
    return f"{100 * chance:.1f}" + (f" ({100 * floor:.1f})" if floor > chance else "")


def _questions(task: TaskResult) -> List[str]:
    numbers = (task.get("questions"), task.get("questions_cut"), task.get("questions_left_out"))
    return ["not known" if number is None else f"{number:,}" for number in numbers]


def bias(runs: Runs) -> Table:
    """Metrics of each bias set over all domains, by model, mean over seeds; no rows without such a
    set."""
    by_model = _by_model(runs)
    table_rows: Dict[str, Dict[str, List[float]]] = {}
    for name, model_runs in by_model.items():
        for run in model_runs:
            for bias_set in run["priming"].get("bias", []):  # older files lack it
                for label, value in _bias_metrics(bias_set):
                    table_rows.setdefault(label, {}).setdefault(name, []).append(value)
    rows = [
        [label, *(f"{sum(v) / len(v):.1f}" if (v := row.get(n)) else "" for n in by_model)]
        for label, row in table_rows.items()
    ]
    return ["", *by_model], rows


def _bias_metrics(bias_set: BiasResult) -> Iterator[Tuple[str, float]]:
    """Of a bias set over all domains: label, value."""
    found = {bias_set["task"]: bias_set["domains"]}
    if "intersentence" in bias_set:  # of StereoSet; older files lack it
        found[f"{bias_set['task']} intersentence"] = bias_set["intersentence"]
    for title, domains in found.items():
        for key, value in domains["overall"].items():
            if key not in ("questions", "intervals"):
                yield f"{title}, {key.upper() if key in ('lms', 'ss', 'icat') else key}", value


def paper_stereoset() -> Table:
    """Of the released models' card, over all domains."""
    rows = [[name, *(f"{x:.1f}" for x in three)] for name, three in paper.STEREOSET.items()]
    return ["", "LMS", "SS", "ICAT"], rows


def contents(result: StudyResult, use: bool, fine_tuned: bool) -> Table:
    """What the paper shows, and where it is on the page, in our numbers and in the paper's."""
    runs = result["runs"]
    curves = {group for group, factors in result["factors"].items() if factors["curve"]}
    sets = len(curves & set(runs[0]["sets"]))
    shots = [int(n) for n in runs[0]["priming"]["mean"]]
    few = ", ".join(str(n) for n in shots if n)
    primed = "not measured: `priming` in the study's file"
    absent = "numbers not at hand"
    over = results.primed_tasks(runs, "0-shot")
    zero = f"drawn, mean of {paper.tasks_in_words(over)}"
    if set(over) != set(paper.SIX_TASKS):
        zero += ": not comparable with the paper's"
    rows = [
        [
            "Speed-up factors, figure 1",
            "drawn" if curves & set(results.GROUPS) else "no factor",
            "drawn, read off",
        ],
        ["Perplexity against compute, figure 2", "drawn", "drawn, read off"],
        ["Speed-up on single sets", f"drawn, {sets} of {len(runs[0]['sets'])} sets", absent],
        [
            "Zero-shot accuracy against compute",
            zero if 0 in shots else primed,
            "drawn, mean of six tasks, as remembered",
        ],
        ["Zero-shot accuracy of each task", "table" if 0 in shots else primed, "with fine-tuning"],
        ["Few-shot accuracy", f"drawn and table, {few} shots" if few else primed, absent],
        ["Models, table 1", "table", "table"],
        ["Fine-tuning", "table" if fine_tuned else "not given: --fine-tuning", "table"],
        ["StereoSet", "table" if bias(runs)[1] else primed, "table, of the models' card"],
        ["Use of experts by layer and set", "drawn" if use else "not given: --expert-use", ""],
        ["Choices dropped for capacity", "table, of the end of training", ""],
    ]
    return ["In the paper or beside it", "This study", "The paper's numbers"], rows


def paper_tuned() -> Table:
    """The paper's accuracies before and after fine-tuning, and the mean of the latter."""
    rows = [
        [task, *(f"{before:.1f} / {after:.1f}" for before, after in values)]
        for task, values in paper.FINE_TUNED.items()
    ]
    columns = zip(*paper.FINE_TUNED.values())
    means = [sum(after for _, after in column) / len(column) for column in columns]
    # a half is rounded up, as on paper, not to the even digit
    rows.append(["Mean, fine-tuned", *(f"{mean + 1e-9:.1f}" for mean in means)])
    return ["zero-shot / fine-tuned, %", *paper.FINE_TUNED_MODELS], rows


def tuned(result: fine_tuning.Result) -> Table:
    """What examples/finetune/run.py found: accuracies in %, mean over seeds, with the 95 % interval
    over questions."""
    rows = []
    questions = result.get("settings", {}).get("questions", {}).get("test")
    for name, entry in result["rows"].items():
        before = result["before"]["dense" if name == "dense" else "moe"]
        deviation, difference, chance = (
            entry["deviation"],
            entry.get("difference"),
            before.get("chance"),
        )
        interval = None
        if questions:
            low, high = wilson_interval(entry["mean"] / 100 * questions, questions)
            interval = [100 * low, 100 * high]
        rows.append(
            [
                "Dense" if name == "dense" else f"MoE, {name}",
                "not known" if chance is None else f"{chance:.1f}",
                _with_interval(before["accuracy"], before.get("interval")),
                _with_interval(entry["mean"], interval),
                "one seed" if deviation is None else f"± {deviation:.1f}",
                "" if difference is None else signed(difference),
            ]
        )
    head = ["", "Chance", "Before, %", "Fine-tuned, %", "sd of seeds", "Against plain MoE"]
    return head, rows


def _with_interval(percent: float, interval: Optional[Sequence[float]]) -> str:
    """In per cent, as examples/finetune has them."""
    ends = "interval not known" if interval is None else f"{interval[0]:.1f} to {interval[1]:.1f}"
    return f"{percent:.1f} ({ends})"
