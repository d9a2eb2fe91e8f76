"""`make quickstart`: a dense and an MoE language model at equal FLOPs per token, from text that
the installation already contains to a report, in less than ten minutes on two CPU cores.

Every step is a plain command of fairseq or of this package, run as a process of its own; README.md
beside this file has them one by one. A step that is finished is not done again: after Ctrl-C,
start the same command again and it goes on where it stopped.
"""

import argparse
import functools
import logging
import sys
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, Sequence

# fairseq says on import that a package of its speech tasks is missing.
logging.getLogger("fairseq.tasks.text_to_speech").setLevel(logging.WARNING)

import recipe  # noqa: E402
import results  # noqa: E402
from progress import LogTail, Screen, TrainingProgress  # noqa: E402
from results import Stage  # noqa: E402

from fairseq_moe_ext import cores, data_bin, files, outputs  # noqa: E402
from fairseq_moe_ext.errors import OneLineParser, UserError, program_status  # noqa: E402
from fairseq_moe_ext.evaluation import report  # noqa: E402
from fairseq_moe_ext.study.plan import FAMILIES  # noqa: E402
from fairseq_moe_ext.study.runner import Runner  # noqa: E402
from fairseq_moe_ext.wording import clock  # noqa: E402


class Run(Runner):
    """One output folder: what is asked of it, what is already done."""

    def __init__(
        self, out: Path, updates: int, text_bytes: int, screen: Screen, router: str = recipe.ROUTER
    ) -> None:
        super().__init__(out, f"--out {out}")
        self.updates = updates
        self.text_bytes = text_bytes
        self.screen = screen
        self.router = router

    @property
    def settings(self) -> Dict[str, Any]:
        """What the result depends on; a folder is continued only with the same."""
        return recipe.settings(self.updates, self.text_bytes, self.router)

    def open(self) -> None:
        """Make the folder, or check that it is this run's; raise UserError if it is not."""
        super().open()
        self.check_settings(self.settings, "a run", "quickstart run")

    def stages(self) -> Dict[str, Stage]:
        path = self.out / "stages.json"
        found = files.read_json(path) if path.exists() else {}
        return {name: Stage(**stage) for name, stage in found.items()}

    def stage(self, name: str, title: str, work: Callable[[], str]) -> None:
        """Do a step unless it is done; work returns a line on its result."""
        stages = self.stages()
        before = stages.get(name, Stage(title))
        if before.done:
            self.screen.line(f"{title}: done before. {before.result}")
            return
        started = time.monotonic()
        self.screen.line(f"{title} ..." if not before.seconds else f"{title}: going on ...")
        try:
            before = before._replace(result=work(), done=True)
        finally:
            seconds = before.seconds + time.monotonic() - started
            stages[name] = before = before._replace(seconds=seconds)
            outputs.write_json(
                self.out / "stages.json", {key: one._asdict() for key, one in stages.items()}
            )
        self.screen.line(f"  {before.result} ({clock(before.seconds)} min)")


def gather_text(run: Run) -> str:
    import corpora

    counts = corpora.gather(
        run.out / "text",
        train_bytes=run.text_bytes,
        valid_bytes=min(recipe.VALID_BYTES, max(1, run.text_bytes // 8)),
        test_bytes=min(recipe.TEST_BYTES, max(1, run.text_bytes // 6)),
        progress=lambda line: run.screen.line("  " + line),
    )
    outputs.write_json(run.out / "text.json", counts)
    documents = sum(split["documents"] for domain in counts.values() for split in domain.values())
    size = sum(split["bytes"] for domain in counts.values() for split in domain.values())
    return f"{documents:,} documents, {size / 1e6:.1f} MB in {len(counts)} domains"


def prepare(run: Run, command: List[str]) -> str:
    log = run.out / "prepare.log"
    if (run.out / "data").exists():  # a killed run's, whole but not yet written down as done
        command = [*command, "--overwrite"]
    started = time.monotonic()

    def show() -> None:
        run.screen.show(f"  fairseq-moe prepare: {clock(time.monotonic() - started)}")

    run.call(command, log, watch=show, every=0.2)
    counts = files.read_json(run.out / "data" / data_bin.COUNTS)
    trained = sum(
        corpus["train"]["tokens"] for corpus in counts["corpora"].values() if "train" in corpus
    )
    return f"{trained:,} training tokens, a vocabulary of {counts['types']:,}"


def train(run: Run, commands: Dict[str, List[str]]) -> str:
    """Both trainings side by side, each with half of the cores.

    Small models do not fill two cores each, and so neither is timed on a busier machine than the
    other. One that is finished is not started again; the other goes on from its last checkpoint.
    """
    threads = max(1, cores.usable() // len(commands))
    trainings = {}
    for model, command in commands.items():
        if not (run.out / model / "finished").exists():
            (run.out / model).mkdir(exist_ok=True)
            log = run.out / model / "train.log"
            log.touch()
            shown = TrainingProgress(recipe.SHORT_TITLES[model], run.updates)
            trainings[model] = (LogTail(log), shown, run.start(command, log, threads))
    while trainings:
        for model, (tail, shown, child) in list(trainings.items()):
            ended = child.poll() is not None
            for line in tail.lines():
                shown.read(line)
            if ended:
                run.finish(child, commands[model], run.out / model / "train.log")
                (run.out / model / "finished").touch()
                tail.close()
                del trainings[model]
        left = max((shown.left for _, shown, _ in trainings.values()), default=0.0)
        live = " | ".join(str(shown) for _, shown, _ in trainings.values())
        run.screen.show(f"  {live}" + (f" | about {clock(left)} left" if left else ""))
        time.sleep(0.2)
    reached = []
    for model in commands:
        points = results.validations(run.out / model / "train.log")
        if not points:
            raise UserError(f"{run.out / model / 'train.log'} has no validation: delete {run.out}")
        reached.append(f"{recipe.SHORT_TITLES[model]} {points[-1]['in_domain']:.2f}")
    return f"in-domain validation perplexity: {', '.join(reached)}"


def evaluate(run: Run, commands: Dict[str, List[str]]) -> str:
    """All fairseq-eval-lm runs, as many at a time as there are cores; each has its own result."""
    folder = run.out / "evaluation"
    folder.mkdir(exist_ok=True)
    at_once = min(cores.usable(), 4)
    done: List[str] = []

    def one(name: str) -> None:
        result = folder / f"{name}.json"
        if not result.exists():
            log = folder / f"{name}.log"
            log.unlink(missing_ok=True)
            run.call(commands[name], log, max(1, cores.usable() // at_once))
            outputs.write_json(result, results.eval_result(log))
        done.append(name)
        run.screen.show(f"  fairseq-eval-lm: {len(done)}/{len(commands)}")

    for _ in run.in_parallel([functools.partial(one, name) for name in commands], at_once):
        pass
    return f"{len(commands)} test sets"


def count_experts(run: Run, command: List[str]) -> str:
    log = run.out / "expert_use.log"

    def show() -> None:
        run.screen.show("  reading the gates' choices")

    run.call(command, log, max(1, cores.usable() // 2), watch=show, every=0.2)
    return f"{len(files.read_json(run.out / 'expert_use.json'))} MoE layers"


def write_samples(run: Run, command: List[str]) -> str:
    log = run.out / "samples.log"
    run.call(command, log, max(1, cores.usable() // 2))
    return f"{len(recipe.PROMPTS)} prompts"


def work(run: Run, data_only: bool) -> None:
    """All steps, or those of the data."""
    import corpora
    import page
    import table

    run.open()
    report.check_renewable(run.out / "report.html")
    held_out = {domain.name: domain.held_out for domain in corpora.DOMAINS}
    preparing = recipe.prepare_command(run.out, held_out)
    training = {
        model: recipe.train_command(run.out, model, run.updates, run.router) for model in FAMILIES
    }
    testing = {
        f"{model}.{name}": recipe.eval_command(run.out, model, name)
        for name in held_out
        for model in FAMILIES
    }
    counting = recipe.expert_use_command(run.out, held_out)
    sampling = recipe.samples_command(run.out)

    run.stage("text", "1/6 Gather text from this Python installation", lambda: gather_text(run))
    run.stage("prepare", "2/6 Train a tokenizer and binarise", lambda: prepare(run, preparing))
    if data_only:
        return
    run.stage("train", "3/6 Train a dense and an MoE model", lambda: train(run, training))
    run.stage("evaluate", "4/6 Evaluate both on every domain", lambda: evaluate(run, testing))
    run.stage("experts", "5/6 Count which expert takes what", lambda: count_experts(run, counting))
    run.stage("samples", "6/6 Let both write", lambda: write_samples(run, sampling))

    commands = [preparing, *training.values(), *testing.values(), counting, sampling]
    result = results.gathered(run.out, run.settings, list(run.stages().values()), commands)
    outputs.write_json(run.out / "result.json", result)
    outputs.write_text(run.out / "report.html", page.html(result))
    seconds = sum(stage["seconds"] for stage in result["stages"])
    run.screen.line()
    run.screen.line(page.terminal_samples(result))
    run.screen.line(table.terminal_table(result))
    run.screen.line()
    run.screen.line(page.sentence(result))
    run.screen.line(f"\n{clock(seconds)} min in all. Figures: {run.out / 'report.html'}")


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = OneLineParser(
        description="Train a dense and an MoE language model at equal FLOPs per token on text of "
        "this Python installation, and compare them. Start it again after an interruption and it "
        "goes on."
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/quickstart"),
        help="folder for data, checkpoints and report (default: runs/quickstart)",
    )
    parser.add_argument(
        "--updates",
        type=int,
        default=recipe.UPDATES,
        help=f"updates of each training; fewer for a trial run (default: {recipe.UPDATES})",
    )
    parser.add_argument(
        "--text-bytes",
        type=int,
        default=recipe.TEXT_BYTES,
        help=f"training text of each domain in bytes (default: {recipe.TEXT_BYTES})",
    )
    parser.add_argument(
        "--router",
        choices=recipe.ROUTERS,
        default=recipe.ROUTER,
        help="how the MoE model's tokens choose experts: by their id (hash), or by a learned gate "
        f"(topk); default: {recipe.ROUTER}",
    )
    parser.add_argument(
        "--data-only", action="store_true", help="gather and prepare the text, and stop"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    args = arguments(argv)
    screen = Screen()
    updates = 0 if args.data_only else args.updates
    run = Run(args.out, updates, args.text_bytes, screen, args.router)

    def checked() -> None:
        what = "Text and data-bins" if args.data_only else "MoE against dense at equal FLOPs"
        screen.line(f"{what}; results go to {args.out}. Ctrl-C stops, the same command goes on.")
        try:
            if args.updates < 2:
                raise UserError(f"--updates {args.updates} is too few: use 2 or more")
            if args.text_bytes < 20_000:
                raise UserError(f"--text-bytes {args.text_bytes} is too little: use 20000 or more")
            work(run, args.data_only)
        except BaseException:
            screen.line()  # the line that says why comes below the live one
            raise

    try:
        return program_status(checked, "Stopped. Start the same command again to go on.")
    finally:
        run.stop()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
