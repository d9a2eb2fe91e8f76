"""`make quickstart`: a dense and an MoE language model at equal FLOPs per token, from text that
every Python installation carries to a report, in less than ten minutes on two CPU cores.

Every step is a plain command of fairseq or of this package, run as a process of its own; README.md
beside this file has them one by one. A step that is finished is not done again: after Ctrl-C,
start the same command again and it goes on where it stopped.
"""

import argparse
import contextlib
import functools
import logging
import os
import platform
import re
import shlex
import signal
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Callable, Dict, Iterator, List, NamedTuple, Sequence

from progress import LogTail, Screen, TrainingProgress, clock, measurement

# fairseq says on import that a package of its speech tasks is missing.
logging.getLogger("fairseq.tasks.text_to_speech").setLevel(logging.WARNING)

from fairseq_moe_ext import cost, files, outputs  # noqa: E402
from fairseq_moe_ext.errors import UserError  # noqa: E402
from fairseq_moe_ext.evaluation import report  # noqa: E402
from fairseq_moe_ext.study.child import console_script  # noqa: E402
from fairseq_moe_ext.study.runner import Runner  # noqa: E402

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGE = REPOSITORY / "fairseq_moe_ext"

# The recipe. Chosen by experiment for ten minutes on two cores; README.md says what was tried.
UPDATES = 420
TEXT_BYTES = 1_500_000  # of training text per domain
VALID_BYTES, TEST_BYTES = 16_000, 100_000
VOCABULARY = 4096
CONTEXT = 256  # tokens a block
BLOCKS = 8  # blocks an update
LAYERS, DIM, HEADS = 4, 128, 4
EXPERTS = 8
EXPERT_FFN = 256  # hidden width; two experts a token do the work of one FFN of twice the width
LEARNING_RATE = 4e-3
BALANCE_WEIGHT = 0.01
SAVES = 8  # checkpoints, with validation, in one training

MODELS = ("dense", "moe")
SHORT_TITLES = {"dense": "dense", "moe": "MoE"}


class Stage(NamedTuple):
    """A step of the run, as stages.json has it."""

    title: str
    seconds: float = 0.0
    done: bool = False
    result: str = ""


class Run(Runner):
    """One output folder: what is asked of it, what is already done."""

    def __init__(self, out: Path, updates: int, text_bytes: int, screen: Screen) -> None:
        super().__init__(out, f"--out {out}")
        self.updates = updates
        self.text_bytes = text_bytes
        self.screen = screen

    @property
    def settings(self) -> Dict[str, object]:
        """What the result depends on; a folder is continued only with the same."""
        return {
            "updates": self.updates,
            "text_bytes": self.text_bytes,
            "vocabulary": VOCABULARY,
            "context": CONTEXT,
            "blocks": BLOCKS,
            "layers": LAYERS,
            "dim": DIM,
            "heads": HEADS,
            "experts": EXPERTS,
            "expert_ffn": EXPERT_FFN,
            "learning_rate": LEARNING_RATE,
            "balance_weight": BALANCE_WEIGHT,
            "python": platform.python_version(),
            "torch": version("torch"),
        }

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


def prepare_command(run: Run, held_out: Dict[str, bool]) -> List[str]:
    command = [sys.executable, "-m", "fairseq_moe_ext.cli", "prepare", str(run.out / "data")]
    for name, out_of_domain in held_out.items():
        flag = "--heldout" if out_of_domain else "--corpus"
        for split in ("valid", "test") if out_of_domain else ("train", "valid", "test"):
            command += [flag, f"{name}:{split}={run.out / 'text' / f'{name}.{split}.jsonl'}"]
    workers = min(os.cpu_count() or 1, 8)
    return command + ["--train-bpe", str(VOCABULARY), "--workers", str(workers)]


def shape_flags(model: str) -> List[str]:
    """The flags of fairseq-train that say what a model's parameters are."""
    ffn = str(2 * EXPERT_FFN)
    of_family = {
        "dense": ["--arch", "dense_lm_tiny", "--moe-freq", "1"]
        + ["--alternate-decoder-ffn-embed-dim", ffn],
        "moe": ["--arch", "moe_lm_tiny", "--moe-freq", "1", "--moe-expert-count", str(EXPERTS)]
        + ["--moe-expert-ffn-dim", str(EXPERT_FFN)],
    }[model]
    return [
        *of_family,
        *("--decoder-layers", str(LAYERS), "--decoder-embed-dim", str(DIM)),
        *("--decoder-attention-heads", str(HEADS), "--decoder-ffn-embed-dim", ffn),
    ]


def train_command(run: Run, model: str) -> List[str]:
    every = max(1, run.updates // SAVES)
    return [
        console_script("fairseq-train"),
        str(run.out / "data"),
        *("--user-dir", str(PACKAGE), "--task", "mixture_language_modeling"),
        *shape_flags(model),
        *(["--moe-dropless"] if model == "moe" else []),
        *("--dropout", "0", "--attention-dropout", "0"),
        *("--tokens-per-sample", str(CONTEXT), "--batch-size", str(BLOCKS)),
        *("--criterion", "moe_cross_entropy", "--moe-gate-loss-wt", str(BALANCE_WEIGHT)),
        *("--optimizer", "adam", "--adam-betas", "(0.9, 0.98)", "--weight-decay", "0.01"),
        *("--clip-norm", "1.0", "--lr", str(LEARNING_RATE), "--lr-scheduler", "polynomial_decay"),
        *("--warmup-updates", str(max(1, run.updates // 10))),
        *("--total-num-update", str(run.updates), "--max-update", str(run.updates)),
        *("--seed", "1", "--cpu", "--num-workers", "0"),
        *("--save-dir", str(run.out / model), "--save-interval-updates", str(every)),
        *("--keep-interval-updates", "1", "--no-epoch-checkpoints"),
        *("--best-checkpoint-metric", "in_domain_ppl"),
        *("--log-format", "json", "--log-interval", str(min(10, every))),
    ]


def eval_command(run: Run, model: str, domain: str) -> List[str]:
    return [
        console_script("fairseq-eval-lm"),
        str(run.out / "data" / domain),
        *("--user-dir", str(PACKAGE), "--task", "language_modeling", "--gen-subset", "test"),
        *("--path", str(run.out / model / "checkpoint_best.pt")),
        *("--tokens-per-sample", str(CONTEXT), "--batch-size", "16", "--cpu"),
        *("--no-progress-bar",),
    ]


def expert_use_command(run: Run, held_out: Dict[str, bool]) -> List[str]:
    command = [sys.executable, "-m", "fairseq_moe_ext.evaluation.expert_use"]
    command += [str(run.out / "moe" / "checkpoint_best.pt")]
    for name in held_out:
        command += ["--bin", f"{name}={run.out / 'data' / name}"]
    command += ["--subset", "test", "--tokens-per-sample", str(CONTEXT)]
    command += ["--among", ",".join(name for name, held in held_out.items() if not held)]
    return command + ["--json", str(run.out / "expert_use.json"), "--overwrite"]


def gather_text(run: Run) -> str:
    import corpora

    counts = corpora.gather(
        run.out / "text",
        train_bytes=run.text_bytes,
        valid_bytes=min(VALID_BYTES, max(1, run.text_bytes // 8)),
        test_bytes=min(TEST_BYTES, max(1, run.text_bytes // 6)),
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
    counts = files.read_json(run.out / "data" / "counts.json")
    trained = sum(
        corpus["train"]["tokens"] for corpus in counts["corpora"].values() if "train" in corpus
    )
    return f"{trained:,} training tokens, dictionary of {counts['types']:,} types"


def train(run: Run, commands: Dict[str, List[str]]) -> str:
    """Both trainings side by side, each with half of the cores.

    Small models do not fill two cores each, and so neither is timed on a busier machine than the
    other. One that is finished is not started again; the other goes on from its last checkpoint.
    """
    threads = max(1, (os.cpu_count() or 1) // len(commands))
    trainings = {}
    for model, command in commands.items():
        if not (run.out / model / "finished").exists():
            (run.out / model).mkdir(exist_ok=True)
            log = run.out / model / "train.log"
            log.touch()
            shown = TrainingProgress(SHORT_TITLES[model], run.updates)
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
        points = validation(run.out / model / "train.log")
        if not points:
            raise UserError(f"{run.out / model / 'train.log'} has no validation: delete {run.out}")
        reached.append(f"{SHORT_TITLES[model]} {points[-1]['in_domain']:.2f}")
    return f"in-domain validation perplexity: {', '.join(reached)}"


def validation(log: Path) -> List[Dict]:
    """The validations in a training's log: {"update", "in_domain", "perplexity": {domain: ...}}.

    Updates that were repeated after an interruption count once, the later time.
    """
    import corpora

    measured: Dict[int, Dict] = {}
    with open(log, encoding="utf-8", errors="replace") as file:
        for line in file:
            tagged = measurement(line)
            if tagged is None or tagged[0] != "valid":
                continue
            figures = tagged[1]
            update = int(figures["valid_num_updates"])
            perplexity = {
                found.group(1): float(value)
                for key, value in figures.items()
                for found in [re.fullmatch(r"valid_(\w+)_ppl", key)]
                if found
            }
            measured[update] = {
                "update": update,
                "in_domain": perplexity["in_domain"],
                "perplexity": {d.name: perplexity[d.name] for d in corpora.DOMAINS},
            }
    return [measured[update] for update in sorted(measured)]


def training_seconds(log: Path) -> float:
    """Seconds spent in training steps, without validation and saving, as fairseq counted them.

    The stopwatch is saved in checkpoints, so that of an epoch in several parts is whole.
    """
    epochs: Dict[str, float] = {}
    with open(log, encoding="utf-8", errors="replace") as file:
        for line in file:
            tagged = measurement(line)
            if tagged is not None and tagged[0] == "train":
                epochs[str(tagged[1]["epoch"])] = float(tagged[1]["train_train_wall"])
    return sum(epochs.values())


def evaluate(run: Run, commands: Dict[str, List[str]]) -> str:
    """All fairseq-eval-lm runs, as many at a time as there are cores; each has its own result."""
    folder = run.out / "evaluation"
    folder.mkdir(exist_ok=True)
    cores = os.cpu_count() or 1
    at_once = min(cores, 4)
    done: List[str] = []

    def one(name: str) -> None:
        result = folder / f"{name}.json"
        if not result.exists():
            log = folder / f"{name}.log"
            log.unlink(missing_ok=True)
            run.call(commands[name], log, max(1, cores // at_once))
            outputs.write_json(result, eval_result(log))
        done.append(name)
        run.screen.show(f"  fairseq-eval-lm: {len(done)}/{len(commands)}")

    for _ in run.in_parallel([functools.partial(one, name) for name in commands], at_once):
        pass
    return f"{len(commands)} test sets"


def eval_result(log: Path) -> Dict[str, float]:
    """What fairseq-eval-lm printed: tokens and loss (base 2, per token)."""
    text = log.read_text(encoding="utf-8", errors="replace")
    tokens = re.findall(r"Evaluated ([\d,]+) tokens", text)
    loss = re.findall(r"Loss \(base 2\): ([\d.]+)", text)
    if not tokens or not loss:
        raise UserError(f"{log} has no result of fairseq-eval-lm: start the quickstart again")
    return {"tokens": int(tokens[-1].replace(",", "")), "loss": float(loss[-1])}


def count_experts(run: Run, command: List[str]) -> str:
    log = run.out / "expert_use.log"

    def show() -> None:
        run.screen.show("  reading the gates' choices")

    run.call(command, log, max(1, (os.cpu_count() or 1) // 2), watch=show, every=0.2)
    return f"{len(files.read_json(run.out / 'expert_use.json'))} MoE layers"


def result(run: Run, commands: Sequence[Sequence[str]]) -> Dict:
    """Everything the report shows, from the files of the run."""
    import corpora

    counts = files.read_json(run.out / "data" / "counts.json")
    text = files.read_json(run.out / "text.json")
    common = {"layers": LAYERS, "dim": DIM, "ffn_dim": 2 * EXPERT_FFN, "types": counts["types"]}
    shapes = {
        "dense": cost.Shape(**common, moe_freq=1, alternate_ffn_dim=2 * EXPERT_FFN),
        "moe": cost.Shape(**common, moe_freq=1, experts=EXPERTS, expert_ffn_dim=EXPERT_FFN),
    }
    tokens = run.updates * CONTEXT * BLOCKS
    models = {}
    for model, shape in shapes.items():
        parameters = cost.parameters(shape)
        flops = cost.training_flops_per_token(shape, CONTEXT)
        log = run.out / model / "train.log"
        tested = {
            domain.name: files.read_json(run.out / "evaluation" / f"{model}.{domain.name}.json")
            for domain in corpora.DOMAINS
        }
        models[model] = {
            "parameters": parameters.total,
            "active_parameters": parameters.active,
            "flops_per_token": flops,
            "training_flops": flops * tokens,
            "training_tokens": tokens,
            "training_seconds": training_seconds(log),
            "perplexity": {name: 2 ** found["loss"] for name, found in tested.items()},
            "test_tokens": {name: found["tokens"] for name, found in tested.items()},
            "validation": validation(log),
        }
    domains = [
        {
            "name": domain.name,
            "title": domain.title,
            "source": domain.source,
            "held_out": domain.held_out,
            "counts": text[domain.name],
            "tokens": counts["corpora"][domain.name],
        }
        for domain in corpora.DOMAINS
    ]
    environment = {"Python": platform.python_version(), "processors": str(os.cpu_count())}
    for package in ("torch", "numpy", "sympy", "fairseq", "fairseq-moe-ext"):
        with contextlib.suppress(PackageNotFoundError):
            environment[package] = version(package)
    return {
        "settings": {
            **run.settings,
            "tokens_per_update": CONTEXT * BLOCKS,
            "dictionary": counts["types"],
        },
        "domains": domains,
        "models": models,
        "expert_use": files.read_json(run.out / "expert_use.json"),
        "commands": [shlex.join(as_typed(command)) for command in commands],
        "stages": [stage._asdict() for stage in run.stages().values()],
        "environment": environment,
    }


def as_typed(command: Sequence[str]) -> List[str]:
    """A command as one would type it: without the folders of the programs."""
    words = [Path(command[0]).name, *command[1:]]
    if words[1:4] == ["-m", "fairseq_moe_ext.cli", "prepare"]:
        return ["fairseq-moe", *words[3:]]
    return [os.path.relpath(word) if word == str(PACKAGE) else word for word in words]


def work(run: Run) -> None:
    import corpora
    import page

    run.open()
    report.check_renewable(run.out / "report.html")
    held_out = {domain.name: domain.held_out for domain in corpora.DOMAINS}
    preparing = prepare_command(run, held_out)
    training = {model: train_command(run, model) for model in MODELS}
    testing = {
        f"{model}.{name}": eval_command(run, model, name) for name in held_out for model in MODELS
    }
    counting = expert_use_command(run, held_out)

    run.stage("text", "1/5 Gather text from this Python installation", lambda: gather_text(run))
    run.stage("prepare", "2/5 Train a tokenizer and binarise", lambda: prepare(run, preparing))
    run.stage("train", "3/5 Train a dense and an MoE model", lambda: train(run, training))
    run.stage("evaluate", "4/5 Evaluate both on every domain", lambda: evaluate(run, testing))
    run.stage("experts", "5/5 Count which expert takes what", lambda: count_experts(run, counting))

    found = result(run, [preparing, *training.values(), *testing.values(), counting])
    outputs.write_json(run.out / "result.json", found)
    report.write(run.out / "report.html", page.html(found))
    seconds = sum(stage["seconds"] for stage in found["stages"])
    run.screen.line()
    run.screen.line(page.terminal_table(found))
    run.screen.line()
    run.screen.line(page.sentence(found))
    run.screen.line(f"\n{clock(seconds)} min in all. Figures: {run.out / 'report.html'}")


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """SIGTERM ends the run as Ctrl-C does."""

    def interrupt(number, frame):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train a dense and an MoE language model at equal FLOPs per token on text of "
        "this Python installation, and compare them. Start it again after an interruption and it "
        "goes on.",
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
        default=UPDATES,
        help=f"updates of each training; fewer for a trial run (default: {UPDATES})",
    )
    parser.add_argument(
        "--text-bytes",
        type=int,
        default=TEXT_BYTES,
        help=f"training text of each domain in bytes (default: {TEXT_BYTES})",
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    args = arguments(argv)
    screen = Screen()
    screen.line(
        f"MoE against dense at equal FLOPs; results go to {args.out}. Ctrl-C stops, the same "
        "command goes on."
    )
    run = Run(args.out, args.updates, args.text_bytes, screen)
    try:
        if args.updates < 2:
            raise UserError(f"--updates {args.updates} is too few: use 2 or more")
        if args.text_bytes < 20_000:
            raise UserError(f"--text-bytes {args.text_bytes} is too little: use 20000 or more")
        with interruptible():
            work(run)
    except UserError as error:
        screen.line()
        print(f"error: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # what reads the output has gone, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        screen.line("\nStopped. Start the same command again to go on.")
        return 130
    finally:
        run.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
