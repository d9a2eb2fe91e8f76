"""Fine-tune the quickstart's dense and MoE model on one task, MoE by several recipes, and compare.

    python examples/finetune/run.py

Every fine-tuning is a plain fairseq-train, its accuracy on the test questions fairseq-validate's.
What is finished is not done again: after Ctrl-C the same command goes on.
"""

import argparse
import functools
import math
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Dict, List, Sequence

import comparison
import questions
import recipes

from fairseq_moe_ext import files, outputs
from fairseq_moe_ext.accuracy import wilson_interval
from fairseq_moe_ext.branch.outline import settings_of
from fairseq_moe_ext.errors import OneLineParser, UserError, program_status
from fairseq_moe_ext.study import fine_tuning, logs
from fairseq_moe_ext.study.child import console_script
from fairseq_moe_ext.study.plan import FAMILIES, PACKAGE, typed
from fairseq_moe_ext.study.runner import Runner
from fairseq_moe_ext.wording import clock

QUICKSTART = Path(__file__).resolve().parents[1] / "quickstart" / "run.py"
PRETRAINED = ["--router", "topk"]  # some recipes need a learned gate

# What fairseq-train must be told of a checkpoint that it starts from.
SHAPE = (
    *("decoder_layers", "decoder_embed_dim", "decoder_attention_heads", "decoder_ffn_embed_dim"),
    *("alternate_decoder_ffn_embed_dim", "moe_freq", "moe_expert_count", "moe_expert_ffn_dim"),
)


def model_flags(checkpoint: Path) -> List[str]:
    """The flags of fairseq-train that give a model the shape of the checkpoint's."""
    settings, _ = settings_of(str(checkpoint))
    shape = {name: settings[name] for name in SHAPE if settings.get(name)}
    return ["--arch", settings["_name"], *recipes.as_flags(shape)]


class Ablation(Runner):
    """One output folder."""

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__(args.out, f"--out {args.out}")
        self.base: Path = args.quickstart
        self.base_settings = settings_of_quickstart(self.base)
        self.args = args
        self.sizes = {"train": args.train, "valid": args.valid, "test": args.test}
        self.names = ["docs", "python", "cpp", "maths"]

    @property
    def settings(self) -> Dict[str, Any]:
        """What a result depends on; a folder is continued only with the same."""
        return {
            "questions": self.sizes,
            "epochs": self.args.epochs,
            "batch": recipes.BATCH,
            "learning_rate": recipes.LEARNING_RATE,
            "tokens": recipes.TOKENS,
            "quickstart": self.base_settings,
        }

    def open(self) -> None:
        """Make the folder or go on with it. Raises UserError for one of other settings."""
        super().open()
        self.check_settings(self.settings, "an ablation", "ablation")

    def command(self, row: str, seed: int, folder: Path) -> List[str]:
        """fairseq-train for one row and seed."""
        model = "dense" if row == "dense" else "moe"
        recipe = {} if model == "dense" else recipes.recipe_settings(recipes.RECIPES[row])
        flags = []
        if model == "moe":
            flags = ["--moe-eval-capacity-token-fraction", "1.0", *recipes.as_flags(recipe)]
        batch = recipe.get("batch_size", recipes.BATCH)
        updates = self.args.epochs * math.ceil(self.args.train / batch)
        return [
            console_script("fairseq-train"),
            str(self.base / "data"),
            *("--user-dir", str(PACKAGE), "--task", "multiple_choice"),
            *("--choice-data", str(self.out / "questions")),
            *("--tokens-per-sample", str(recipes.TOKENS)),
            *("--max-target-positions", str(self.base_settings["context"])),
            *model_flags(self.base / model / "checkpoint_best.pt"),
            *("--dropout", "0.1", "--attention-dropout", "0.1"),
            *("--finetune-from-model", str(self.base / model / "checkpoint_best.pt")),
            *("--criterion", "multiple_choice", "--moe-gate-loss-wt", "0.01"),
            *("--optimizer", "adam", "--adam-betas", "(0.9, 0.98)", "--weight-decay", "0.01"),
            *("--clip-norm", "1.0", "--batch-size", str(recipes.BATCH)),
            *("--lr", str(recipes.LEARNING_RATE)),
            *("--lr-scheduler", "polynomial_decay", "--warmup-updates", str(updates // 10)),
            *("--total-num-update", str(updates), "--max-epoch", str(self.args.epochs)),
            *("--seed", str(seed), "--cpu", "--num-workers", "0", "--save-dir", str(folder)),
            *("--best-checkpoint-metric", "accuracy", "--maximize-best-checkpoint-metric"),
            *("--no-epoch-checkpoints", "--log-format", "json", "--log-interval", "10"),
            *flags,  # of two equal flags the last counts
        ]

    def test_command(self, folder: Path) -> List[str]:
        return [
            console_script("fairseq-validate"),
            str(self.base / "data"),
            *("--user-dir", str(PACKAGE), "--task", "multiple_choice"),
            *("--choice-data", str(self.out / "questions"), "--valid-subset", "test"),
            *("--path", str(folder / "checkpoint_best.pt"), "--batch-size", "64", "--cpu"),
            *("--num-workers", "0", "--log-format", "json"),
        ]

    def folder(self, row: str, seed: int) -> Path:
        return self.out / "runs" / f"{row.replace(' ', '_')}-{seed}"

    def check_same(self, row: str, seed: int) -> None:
        """Raise UserError if other flags made, or began, the run. Paths may differ."""
        folder = self.folder(row, seed)
        for path in (folder / "result.json", folder / "command.json"):
            if path.exists():
                begun = files.read_json(path)["command"]
                if _flags(begun) != _flags(self.command(row, seed, folder)):
                    raise UserError(
                        f"{folder}: was trained with other flags than the recipe {row!r} has now: "
                        "name another --out, or delete this folder"
                    )

    def one(self, row: str, seed: int) -> fine_tuning.Run:
        """Fine-tune and test; what is done already is read."""
        folder = self.folder(row, seed)
        path = folder / "result.json"
        if path.exists():
            return files.read_json(path)
        folder.mkdir(parents=True, exist_ok=True)
        started = time.monotonic()
        command = self.command(row, seed, folder)
        outputs.write_json(folder / "command.json", {"command": command})
        self.call(command, folder / "train.log", threads=1)
        self.call(self.test_command(folder), folder / "test.log", threads=1)
        *_, tested = logs.measurements(folder / "test.log", "test")
        result = {
            "row": row,
            "seed": seed,
            "accuracy": float(tested["test_accuracy"]),
            "interval": [float(tested["test_accuracy_low"]), float(tested["test_accuracy_high"])],
            "chance": float(tested["test_chance"]),
            "cut": float(tested["test_cut"]),
            "valid": logs.by_epoch(folder / "train.log", "valid", "valid_accuracy"),
            "train": logs.by_epoch(folder / "train.log", "train", "train_accuracy"),
            "dropped": logs.by_epoch(folder / "train.log", "train", "train_overflow"),
            "precision": logs.precision(folder / "train.log"),
            "seconds": time.monotonic() - started,
            "command": command,
        }
        outputs.write_json(path, result)
        for checkpoint in folder.glob("*.pt"):
            checkpoint.unlink()
        return result


def _flags(command: Sequence[str]) -> List[str]:
    """The words of a command that are not paths."""
    return [word for word in command if os.sep not in word]


def before(ablation: Ablation, family: str) -> fine_tuning.Before:
    """Accuracy of the pretrained model on the test questions, by the mean log-probability of an
    ending's tokens."""
    import torch
    from fairseq import utils

    from fairseq_moe_ext.criterions.multiple_choice import (
        MultipleChoiceConfig,
        MultipleChoiceCriterion,
    )
    from fairseq_moe_ext.evaluation.loading import load_model
    from fairseq_moe_ext.tasks.multiple_choice import MultipleChoiceTask, MultipleChoiceTaskConfig

    utils.import_user_module(argparse.Namespace(user_dir=str(PACKAGE)))
    path = ablation.out / f"before_{family}.json"
    if path.exists() and "chance" in (found := files.read_json(path)):
        return found
    cfg = MultipleChoiceTaskConfig(
        data=str(ablation.base / "data"),
        choice_data=str(ablation.out / "questions"),
        choice_scoring="mean",
        tokens_per_sample=recipes.TOKENS,
        train_subset="train",
        best_checkpoint_metric="loss",
        maximize_best_checkpoint_metric=False,
    )
    task = MultipleChoiceTask.setup_task(cfg)
    checkpoint = ablation.base / family / "checkpoint_best.pt"
    model, _ = load_model(checkpoint, task)
    task.load_dataset("test")
    dataset = task.dataset("test")
    criterion = MultipleChoiceCriterion(MultipleChoiceConfig(sentence_avg=False), task)
    correct = 0
    for batch in dataset.batch_by_size(dataset.ordered_indices(), max_sentences=64):
        with torch.no_grad():
            scores, _ = criterion.scores(model, dataset.collater([dataset[i] for i in batch]))
        right = torch.tensor([dataset.items[i].label for i in batch])
        correct += int(scores.argmax(dim=1).eq(right).sum())
    low, high = wilson_interval(correct, len(dataset))
    chances = [1 / len(item.inputs) for item in dataset.items]
    result = {
        "accuracy": 100 * correct / len(dataset),
        "interval": [100 * low, 100 * high],
        "chance": 100 * statistics.mean(chances),
        "cut": 100 * statistics.mean(item.cut for item in dataset.items),
    }
    outputs.write_json(path, result)
    return result


def settings_of_quickstart(folder: Path) -> Dict[str, Any]:
    """Those of the run in a folder; {} if it is not begun. Raises UserError for a folder of
    something else, and for a run without a learned gate."""
    where, other = f"--quickstart {folder}", "name another folder; one that is missing is created"
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{where}: a file, not a folder: {other}")
    if not (folder / "settings.json").exists():
        if folder.exists() and any(entry.name != "lock" for entry in folder.iterdir()):
            raise UserError(f"{where}: is not empty and holds no quickstart run: {other}")
        return {}
    settings = files.read_json(folder / "settings.json")
    router = settings.get("router", "topk")
    if router != "topk":
        raise UserError(
            f"{where}: was trained with --router {router}, and recipes need the learned gate of "
            f"topk: {other}"
        )
    return settings


def check_out(out: Path) -> None:
    """Raise UserError before the quickstart's trainings if the folder cannot be made or held."""
    runner = Runner(out, f"--out {out}")
    try:
        runner.open()
    finally:
        runner.stop()


def main(argv: Sequence[str]) -> int:
    parser = OneLineParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/finetune"))
    parser.add_argument(
        "--quickstart",
        type=Path,
        default=Path("runs/quickstart-topk"),
        help="folder of the quickstart's run; created if missing",
    )
    parser.add_argument("--train", type=int, default=recipes.TRAIN, help="questions to train on")
    parser.add_argument(
        "--valid", type=int, default=recipes.VALID, help="questions to choose the epoch by"
    )
    parser.add_argument("--test", type=int, default=recipes.TEST, help="questions to test on")
    parser.add_argument("--epochs", type=int, default=recipes.EPOCHS)
    parser.add_argument("--seeds", type=int, default=recipes.SEEDS)
    parser.add_argument(
        "--rows", help=f"some of the rows, comma-separated: {', '.join(recipes.ROWS)}"
    )
    parser.add_argument("--jobs", type=int, default=2, help="fine-tuning runs at once (default: 2)")
    args = parser.parse_args(argv)
    stopped = "Stopped. Start the same command again to continue."
    return program_status(lambda: work(args), stopped)


def work(args: argparse.Namespace) -> int:
    """The exit status: 0, or that of the quickstart if it failed."""
    chosen = recipes.chosen_rows(args.rows)
    for name in ("train", "valid", "test", "epochs", "seeds", "jobs"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)}: use 1 or more")
    settings_of_quickstart(args.quickstart)
    if not all((args.quickstart / model / "finished").exists() for model in FAMILIES):
        check_out(args.out)
        command = [sys.executable, str(QUICKSTART), "--out", str(args.quickstart), *PRETRAINED]
        status = subprocess.call(command)
        if status:
            return status
    ablation = Ablation(args)
    try:
        ablation.open()
        if not (ablation.out / "questions" / "test.jsonl").exists():
            text = args.quickstart / "text"
            questions.write(text, ablation.names, ablation.sizes, ablation.out / "questions", 1)
        result = run_all(ablation, chosen)
    finally:
        ablation.stop()
    print(comparison.table(result))
    return 0


def run_all(ablation: Ablation, rows: List[str]) -> fine_tuning.Result:
    """Every row and seed, seed by seed; the result so far is on disk after each. Returns it."""
    plan = [(row, seed) for seed in range(1, ablation.args.seeds + 1) for row in rows]
    for row, seed in plan:
        ablation.check_same(row, seed)
    started = {model: before(ablation, model) for model in FAMILIES}
    for model, found in started.items():
        ends = "{:.1f} to {:.1f}".format(*found["interval"])
        chance = f"chance {found['chance']:.1f}"
        print(f"before: {model} {found['accuracy']:.1f} % ({ends}, {chance})", flush=True)
    results: List[fine_tuning.Run] = []
    begun = time.monotonic()
    works = [functools.partial(ablation.one, row, seed) for row, seed in plan]
    for last in ablation.in_parallel(works, ablation.args.jobs):
        results.append(last)
        found = gathered(ablation, started, results)
        outputs.write_json(ablation.out / "result.json", found)
        (ablation.out / "result.md").write_text(comparison.table(found), encoding="utf-8")
        left = (time.monotonic() - begun) / len(results) * (len(plan) - len(results))
        print(
            f"{len(results)}/{len(plan)} {last['row']}, seed {last['seed']}: "
            f"{comparison.with_interval(last['accuracy'], found)} %, {clock(last['seconds'])} min; "
            f"about {clock(left)} left",
            flush=True,
        )
    return found


def gathered(
    ablation: Ablation, started: Dict[str, fine_tuning.Before], results: List[fine_tuning.Run]
) -> fine_tuning.Result:
    """The runs so far as result.json has them."""
    accuracies: Dict[str, List[float]] = {}
    for result in sorted(results, key=lambda run: run["seed"]):  # rows are paired by seed
        accuracies.setdefault(result["row"], []).append(result["accuracy"])
    rows = comparison.summary(accuracies)
    for row, entry in rows.items():
        runs = [r for r in results if r["row"] == row]
        for key in ("dropped", "overflow"):  # runs of before `dropped` have the other
            shares = [share for r in runs for share in r.get(key, [])]
            if all(key in r for r in runs):
                entry[key] = statistics.mean(shares) if shares else None
        entry["interval"] = comparison.interval(entry["mean"], ablation.sizes["test"])
    return {
        "settings": ablation.settings,
        "before": started,
        "rows": rows,
        "runs": [{k: v for k, v in r.items() if k != "command"} for r in results],
        "commands": {r["row"]: typed(r["command"]) for r in results},
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
