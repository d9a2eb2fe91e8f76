"""`fairseq-moe priming`: a model on the paper's tasks, zero- and few-shot."""

import argparse
import contextlib
import os
from pathlib import Path
from types import ModuleType
from typing import Any, Callable, ContextManager, Dict, List, Optional, Tuple

from .. import outputs, tokenizer_files
from ..errors import UserError
from ..evaluation.loading import check_path, most_tokens, naming, parse_overrides
from ..expert_parallel import all_gather, process_rank
from ..locks import Lock, beside
from ..questions import formats, scoring
from ..questions.vocabulary import Vocabulary
from ..text_table import markdown, plain
from ..wording import count, did_you_mean, flag
from . import bias, choice, generative, model, resuming
from .protocol import Loaded, Result, Settings, say

# task -> the module with prepare(name, folder, settings, vocabulary) and table(results)
_KINDS: Dict[str, ModuleType] = {
    **dict.fromkeys(formats.TASKS, choice),
    **dict.fromkeys(bias.FILES, bias),
    **dict.fromkeys(generative.NAMES, generative),
}


_RANGES = {
    "draws": (1, 100_000),
    "limit": (1, 2**31),
    "context": (2, 2**20),
    "max_tokens": (1, 2**31),
    "beam": (1, 1024),
    "max_new_tokens": (1, 2**20),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Zero- and few-shot priming on the paper's tasks and more, from the sets' own files: "
        "FOLDER/TASK contains those of a task."
    )
    parser.add_argument(
        "folder", type=Path, metavar="FOLDER", help="folder that contains a folder for each task"
    )
    parser.add_argument(
        "--tasks",
        metavar="TASK,TASK,...",
        help=f"tasks to evaluate, of {', '.join(_KINDS)} (default: those with a folder in FOLDER; "
        "translation only with --languages)",
    )
    parser.add_argument(
        "--shots", default="0", metavar="N,N,...", help="examples before a question (default: 0)"
    )
    parser.add_argument("--draws", type=int, default=25, help="draws of examples (default: 25)")
    parser.add_argument("--seed", type=int, default=1, help="seed of the draws (default: 1)")
    parser.add_argument(
        "--limit", type=int, metavar="N", help="use only the first N questions of each task"
    )
    parser.add_argument(
        "--rule",
        choices=scoring.RULES,
        help="score all tasks by this rule (default: each by its own)",
    )
    parser.add_argument(
        "--published-text",
        action="store_true",
        help="keep HellaSwag as published, with WikiHow's markers ([header], [title], [step]) "
        "(default: remove them, as lm-eval does)",
    )
    parser.add_argument(
        "--languages", metavar="A-B", help="languages of the task translation, such as en-fr"
    )
    parser.add_argument(
        "--beam", type=int, default=1, help="beam width of generated answers (default: 1, greedy)"
    )
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        help="longest generated answer (default: 128, or half the context)",
    )
    model.add_arguments(parser)
    parser.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help="also write all metrics to this file, after each task and number of shots; the same "
        "command resumes from it",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the file of --json")
    parser.add_argument("--markdown", action="store_true", help="print Markdown tables")


def run(args: argparse.Namespace) -> None:
    with _hold(args.json):
        _run(args)


def checked(args: argparse.Namespace) -> Tuple[Settings, List[str]]:
    """The settings, and the names of the tasks. Raises UserError for invalid ones."""
    settings = _settings(args)
    names = _chosen(args.folder, args.tasks, settings)
    if settings.languages is not None and "translation" not in names:
        raise UserError(
            f"--languages {args.languages}: only the task translation uses it; add translation "
            "to --tasks, or remove --languages"
        )
    return settings, names


def _run(args: argparse.Namespace) -> None:
    """Evaluate and print. Raises UserError for invalid flags or files, if possible before the model
    is loaded."""
    settings, names = checked(args)
    check_path(args.path)
    given = args.data
    args.data = tokenizer_files.folder_for(args.path, given, check_bpe=False)
    asked = resuming.asked(args, settings, names)
    results = resuming.begun(args.json, asked, args.overwrite)
    if not results:
        inputs = [args.folder, args.path, args.data]
        outputs.check([("--json", args.json)], args.overwrite, inputs)
    if given is not None:  # after the checks that do not read the checkpoint
        tokenizer_files.check(args.path, given)
    vocabulary = Vocabulary(args.data)
    jobs = [
        job
        for name in names
        for job in _KINDS[name].prepare(name, args.folder / name, settings, vocabulary)
    ]
    with model.processes(args.cpu):
        results = all_gather(results)[0]  # the first process has the file
        if results:
            done = f"{len(results):,} of {count(len(jobs), 'result')}"
            say(f"--json {args.json}: has {done} of this command; resuming")
        if len(results) < len(jobs):
            loaded = _load(args, settings, names, vocabulary)
        for job in jobs[len(results) :]:
            results.append(job(loaded))
            if process_rank() == 0 and args.json is not None:  # so far, should the rest fail
                _write(args, loaded.context, results, asked, len(results) == len(jobs))
        if process_rank() == 0:
            print(_tables(results, markdown if args.markdown else plain))


def _hold(path: Optional[Path]) -> ContextManager:
    """Lock the file of --json for this command."""
    outputs.check([("--json", path)], overwrite=True)
    # Under torchrun the processes have not joined yet, so RANK identifies the first.
    first = process_rank() == 0 and int(os.environ.get("RANK", 0)) == 0
    if path is None or not first:
        return contextlib.nullcontext()
    return Lock(beside(path), f"--json {path}")


def _settings(args: argparse.Namespace) -> Settings:
    """Raises UserError for a value out of range."""
    for name, (low, high) in _RANGES.items():
        number = getattr(args, name)
        if number is not None and not low <= number <= high:
            raise UserError(f"{flag(name)} {number}: use a whole number from {low} to {high:,}")
    if args.seed < 0:
        raise UserError(f"--seed {args.seed}: use 0 or more")
    if args.overwrite and args.json is None:
        raise UserError("--overwrite: without --json there is nothing to replace; remove it")
    return Settings(
        _shots(args.shots),
        args.draws,
        args.seed,
        args.limit,
        args.rule,
        _languages(args.languages),
        args.beam,
        args.max_new_tokens,
        args.published_text,
    )


def _load(
    args: argparse.Namespace, settings: Settings, names: List[str], vocabulary: Vocabulary
) -> Loaded:
    writes = any(_KINDS[name] is generative for name in names)
    if writes:  # before the weights are read
        with naming(args.path):
            most = args.context or most_tokens(args.path, parse_overrides(args.model_overrides))
        if most is not None:
            generative.check_room(settings, most)
    loaded_model, context = model.load_in_context(
        args.path, args.data, args.context, args.cpu, args.fp16, args.model_overrides, args.bf16
    )
    if writes:
        generative.check_room(settings, context)
    return Loaded(loaded_model, context, vocabulary, args.max_tokens)


def _chosen(folder: Path, names: Optional[str], settings: Settings) -> List[str]:
    """Raises UserError for an unknown name, or if there is nothing to do."""
    if not folder.is_dir():
        raise UserError(
            f"{folder}: no such folder; name the one that contains a folder for each task"
        )
    if names is None:
        present = [name for name in _KINDS if (folder / name).is_dir()]
        if settings.languages is None:
            present = [name for name in present if name != "translation"]
        if not present:
            raise UserError(
                f"{folder}: none of its folders is a task; the tasks are {', '.join(_KINDS)}"
            )
        return present
    for name in names.split(","):
        if name not in _KINDS:
            known = f"use one of {', '.join(_KINDS)}{did_you_mean(name, _KINDS)}"
            raise UserError(f"--tasks {name}: no such task; {known}")
    return list(dict.fromkeys(names.split(",")))


def _shots(text: str) -> Tuple[int, ...]:
    words = text.split(",")
    if not all(word.isdecimal() and len(word) < 7 for word in words):
        raise UserError(f"--shots {text}: use whole numbers from 0, such as 0,1,32")
    return tuple(dict.fromkeys(map(int, words)))


def _languages(text: Optional[str]) -> Optional[Tuple[str, str]]:
    if text is None:
        return None
    languages = text.split("-")
    if len(languages) != 2 or not all(languages):
        raise UserError(f"--languages {text}: use two with a dash between them, such as en-fr")
    return languages[0], languages[1]


def _write(
    args: argparse.Namespace,
    context: int,
    results: List[Result],
    asked: Dict[str, Any],
    complete: bool,
) -> None:
    means = choice.means([result for result in results if _KINDS[result["task"]] is choice])
    whole = {
        "path": str(args.path),
        "context": context,
        "seed": args.seed,
        "complete": complete,
        "results": results,
        "mean": {shots: mean.pop("accuracy") for shots, mean in means.items()},
        "mean_of": means,  # its tasks, its interval, and the mean of chance
        "settings": asked,
    }
    outputs.write_json(args.json, whole)


def _tables(results: List[Result], form: Callable[[List[List[str]]], str]) -> str:
    """A table for each kind of task, with its notes."""
    parts = []
    for kind in dict.fromkeys(_KINDS[result["task"]] for result in results):
        of_kind = [result for result in results if _KINDS[result["task"]] is kind]
        parts.append(form(kind.table(of_kind)))
        parts.append("\n".join(kind.notes(of_kind)))
    return "\n\n".join(parts)
