"""`fairseq-moe study FILE.yaml`: train and evaluate what the file names; what is done is kept."""

import argparse
import functools
import os
import re
import sys
import time
from pathlib import Path
from typing import Dict, Iterator, List, Sequence, Tuple

from tqdm import tqdm

from .. import cores, files, outputs
from ..errors import UserError, require_positive
from ..evaluation import study_result
from ..text_table import plain
from ..wording import count
from . import arms, diverged, finished, stale, trained
from . import plan as plans
from . import result as results
from .plan import Plan, Run, matching
from .runner import Runner


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Train and evaluate a dense and a sparse family of models and compute speed-up factors, "
        "or arms that differ by flags, and compare them. After an interruption, the same "
        "command resumes."
    )
    parser.add_argument("file", type=Path, help="the study's YAML file")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once (default: 1)")
    parser.add_argument(
        "--runs",
        metavar="NAME,NAME",
        help="do only these, by the names of their folders; patterns such as 'arm-*-1' are allowed",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the commands and stop")
    parser.add_argument(
        "--only-result", action="store_true", help="collect the finished runs and stop"
    )


def run(args: argparse.Namespace) -> None:
    """Do the study. Raises UserError for an invalid study."""
    require_positive(args, "jobs")
    if args.dry_run and args.only_result:
        raise UserError("--dry-run and --only-result: use only one of them")
    if args.only_result and args.runs is not None:
        raise UserError(f"--runs {args.runs}: --only-result collects all runs; leave one out")
    plan = plans.read(args.file)
    wanted = plan.runs if args.runs is None else _named(plan, args.runs)
    if args.dry_run:
        for study_run in wanted:
            for command in study_run.commands:
                print(plans.typed(command))
        return
    _check_result(plan)
    if args.only_result:
        for study_run, step in _stale(plan):
            print(
                f"{study_run.folder / step.name}.json: its settings differ from the file's; run "
                "without --only-result to make it again"
            )
    else:
        _Work(plan._replace(runs=wanted), args.jobs).do()
    for line in results.left_out(plan):
        print(line)
    result = results.collect(plan)
    if plan.reference:
        result["reference"] = plan.reference
        result["comparison"] = arms.compare(result["runs"], plan.reference)
    outputs.write_json(plan.out / "result.json", result)
    if plan.reference:
        outputs.write_text(plan.out / "comparison.md", arms.page(result))
    print(plain(arms.table(result) if plan.reference else results.table(result)))
    for study_run in plan.runs:
        if diverged.noted(study_run.folder):
            print(diverged.line(study_run))
    for line in results.remarks(result):
        print(f"no factor for {line}")
    for line in results.warnings(result):
        print(line)
    done = f"{len(result['runs'])} of {count(result['planned'], 'run')}"
    print(f"{done}. All results: {plan.out}/result.json")


class _Work:
    """The runs that are still to do, several at once."""

    def __init__(self, plan: Plan, jobs: int) -> None:
        self.plan = plan
        self.jobs = jobs
        self.threads = max(1, cores.usable() // jobs)
        self.runner = Runner(plan.out, f"out: {plan.out}")
        self.done = 0
        self.updates: Dict[str, int] = {}  # of each run, as far as it is known

    def do(self) -> None:
        try:
            self.runner.open()
            for study_run in self.plan.runs:
                trained.check(study_run)
            for study_run, step in [*_stale(self.plan)]:
                kept = stale.put_aside(study_run, step)
                self._say(
                    f"{study_run.name}: repeating {step.name}, because its settings have changed; "
                    f"the old result is now {kept.name}"
                )
            number = count(len(self.plan.runs), "run")
            self._say(f"{number}, {self.jobs} at once, in {self.plan.out}")
            works = [
                functools.partial(self._train_and_evaluate, study_run)
                for study_run in self.plan.runs
            ]
            total = sum(study_run.updates for study_run in self.plan.runs)
            # without a terminal there are lines instead
            self.bar = tqdm(total=total, unit="update", leave=False, disable=None)
            with self.bar:
                for _ in self.runner.in_parallel(works, self.jobs):
                    pass
        finally:
            self.runner.stop()

    def _train_and_evaluate(self, study_run: Run) -> None:
        study_run.folder.mkdir(exist_ok=True)
        evaluation, priming = stale.steps(study_run)
        if not (study_run.folder / "evaluation.json").exists():
            started = time.monotonic()
            if not (study_run.folder / "trained").exists():
                if not diverged.noted(study_run.folder):
                    self._train(study_run)
                if diverged.noted(study_run.folder):
                    self._end(study_run)
                    return
            self._step(study_run, evaluation)
            self._say(f"{study_run.name}: {(time.monotonic() - started) / 60:.1f} min")
        if study_run.prime and not finished.primed(study_run.folder / "priming.json"):
            self._step(study_run, priming)
        self._end(study_run)

    def _train(self, study_run: Run) -> None:
        """Touches `trained`, or notes that it diverged."""
        trained.record(study_run)
        try:
            self._call(study_run, study_run.train, study_run.folder / "train.log")
            (study_run.folder / "trained").touch()
        except UserError as error:
            if not diverged.note(study_run, error):
                raise
            self._say(diverged.line(study_run))

    def _end(self, study_run: Run) -> None:
        self.done += 1
        self._show(study_run.name, study_run.updates)

    def _step(self, study_run: Run, step: stale.Step) -> None:
        stale.record(study_run, step)
        self._call(study_run, step.command, study_run.folder / f"{step.name}.log")

    def _call(self, study_run: Run, command: Sequence[str], log: Path) -> None:
        def watch() -> None:
            if not self.bar.disable:
                self._show(study_run.name, _updates(log))
            else:
                self._say(f"{study_run.name}: {_progress(study_run, log)}")

        every = 60.0 if self.bar.disable else 2.0
        try:
            self.runner.call(command, log, self.threads, watch, every)
        except UserError as error:
            raise UserError(f"{study_run.name}: {error}") from None

    def _say(self, text: str) -> None:
        total = len(self.plan.runs)
        line = f"{time.strftime('%H:%M:%S')} [{self.done}/{total}] {text}"
        tqdm.write(line, file=sys.stderr)  # above the bar
        sys.stderr.flush()

    def _show(self, name: str, updates: int) -> None:
        self.updates[name] = max(updates, self.updates.get(name, 0))
        self.bar.n = sum(self.updates.values())
        self.bar.refresh()


def _named(plan: Plan, patterns: str) -> List[Run]:
    """Those whose folder's name is one of the patterns, between commas. Raises UserError for a
    pattern that is the name of none."""
    names = [study_run.folder.name for study_run in plan.runs]
    wanted = matching(names, patterns.split(","), "--runs", "run")
    return [study_run for study_run in plan.runs if study_run.folder.name in wanted]


def _check_result(plan: Plan) -> None:
    """Raise UserError before any work unless the results can be made anew: result.json is missing,
    or a study's."""
    path = plan.out / "result.json"
    if not os.path.lexists(plan.out):
        return
    if not plan.out.is_dir():
        raise UserError(f"{plan.out}: `out` is not a folder; name another")
    written = [path, *([plan.out / "comparison.md"] if plan.reference else [])]
    outputs.check([("", name) for name in written], overwrite=True)
    if path.exists():
        content = files.read_json(path)
        if not study_result.is_result(content) or "ladder" in content:
            raise UserError(f"{path}: not a study's result; move it elsewhere")


def _stale(plan: Plan) -> Iterator[Tuple[Run, stale.Step]]:
    """The results that the file no longer asks for."""
    for study_run in plan.runs:
        for step in stale.steps(study_run):
            if stale.is_stale(study_run, step, plan.sets):
                yield study_run, step


def _progress(study_run: Run, log: Path) -> str:
    if log.name != "train.log":
        return log.stem  # evaluation, priming
    return f"{_updates(log)} of {study_run.updates} updates"


def _updates(log: Path) -> int:
    """The last that a log of training names; 0: none."""
    updates = re.findall(rb'"num_updates": "(\d+)"', _end(log))
    return int(updates[-1]) if updates else 0


def _end(log: Path) -> bytes:
    with open(log, "rb") as file:
        file.seek(max(0, log.stat().st_size - 65_536))
        return file.read()
