"""Fine-tune the quickstart's dense and MoE model on one task, MoE by several recipes, and compare.

    python examples/finetune/run.py

Every fine-tuning is a plain fairseq-train, its accuracy on the test questions fairseq-validate's.
What is finished is not done again: after Ctrl-C the same command goes on.
"""

import argparse
import functools
import json
import math
import re
import statistics
import sys
import time
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

import yaml

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
sys.path.insert(0, str(HERE.parent / "quickstart"))
import questions  # noqa: E402
import run as quickstart  # noqa: E402
from progress import clock  # noqa: E402

from fairseq_moe_ext import files, outputs, wording  # noqa: E402
from fairseq_moe_ext.accuracy import wilson_interval  # noqa: E402
from fairseq_moe_ext.errors import UserError  # noqa: E402
from fairseq_moe_ext.study.child import console_script  # noqa: E402
from fairseq_moe_ext.study.plan import typed  # noqa: E402
from fairseq_moe_ext.study.runner import Runner  # noqa: E402

# The plain rows are tuned as the paper tuned: sparse models exactly as dense ones, capacity in
# training twice ceil(tokens / experts), and evaluation drops nothing.
BATCH, LEARNING_RATE, EPOCHS, SEEDS = 32, 5e-4, 3, 3
TRAIN, VALID, TEST = 800, 200, 800  # questions
TOKENS = 192  # longest sequence

# Row of a sparse model -> files of hydra_conf/recipe. The recipe small_batch is a quarter of the
# batch and twice the learning rate of hydra_conf/finetune.yaml; here it is so of the above.
RECIPES: Dict[str, List[str]] = {
    "plain": [],
    "dropless": ["dropless"],
    "equal capacity": ["equal_capacity"],
    "pad mask": ["pad_mask"],
    "no balance loss": ["no_balance_loss"],
    "z-loss": ["z_loss"],
    "expert dropout": ["expert_dropout"],
    "frozen gate": ["freeze_gate"],
    "frozen experts": ["freeze_experts"],
    "small batch": ["small_batch"],
    "together": ["dropless", "pad_mask", "z_loss", "expert_dropout", "freeze_gate"],
}
ROWS = ["dense", *RECIPES]


def recipe_settings(names: Sequence[str]) -> Dict[str, Any]:
    """The settings of recipe files."""
    found: Dict[str, Any] = {}
    for name in names:
        path = REPOSITORY / "hydra_conf" / "recipe" / f"{name}.yaml"
        for settings in yaml.safe_load(path.read_text(encoding="utf-8")).values():
            found.update(settings)
    if "lr" in found:
        found["lr"] = 2 * LEARNING_RATE
        found["batch_size"] = BATCH // 4
    return found


def as_flags(settings: Dict[str, Any]) -> List[str]:
    """As flags of fairseq-train."""
    flags = []
    for key, value in settings.items():
        flags.append("--" + key.replace("_", "-"))
        if value is not True:
            flags.append(str(value))
    return flags


class Ablation(Runner):
    """One output folder."""

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__(args.out, f"--out {args.out}")
        self.base: Path = args.quickstart
        self.args = args
        self.sizes = {"train": args.train, "valid": args.valid, "test": args.test}
        self.names = ["docs", "python", "cpp", "maths"]

    @property
    def settings(self) -> Dict[str, Any]:
        """What a result depends on; a folder is continued only with the same."""
        return {
            "questions": self.sizes,
            "epochs": self.args.epochs,
            "batch": BATCH,
            "learning_rate": LEARNING_RATE,
            "tokens": TOKENS,
            "quickstart": files.read_json(self.base / "settings.json"),
        }

    def open(self) -> None:
        """Make the folder or go on with it. Raises UserError for one of other settings."""
        super().open()
        self.check_settings(self.settings, "an ablation", "ablation")

    def command(self, row: str, seed: int, folder: Path) -> List[str]:
        """fairseq-train for one row and seed."""
        model = "dense" if row == "dense" else "moe"
        recipe = {} if model == "dense" else recipe_settings(RECIPES[row])
        flags = []
        if model == "moe":
            flags = ["--moe-eval-capacity-token-fraction", "1.0", *as_flags(recipe)]
        batch = recipe.get("batch_size", BATCH)
        updates = self.args.epochs * math.ceil(self.args.train / batch)
        return [
            console_script("fairseq-train"),
            str(self.base / "data"),
            *("--user-dir", str(quickstart.PACKAGE), "--task", "multiple_choice"),
            *("--choice-data", str(self.out / "questions"), "--tokens-per-sample", str(TOKENS)),
            *("--max-target-positions", str(quickstart.CONTEXT)),
            *quickstart.shape_flags(model),
            *("--dropout", "0.1", "--attention-dropout", "0.1"),
            *("--finetune-from-model", str(self.base / model / "checkpoint_best.pt")),
            *("--criterion", "multiple_choice", "--moe-gate-loss-wt", "0.01"),
            *("--optimizer", "adam", "--adam-betas", "(0.9, 0.98)", "--weight-decay", "0.01"),
            *("--clip-norm", "1.0", "--batch-size", str(BATCH), "--lr", str(LEARNING_RATE)),
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
            *("--user-dir", str(quickstart.PACKAGE), "--task", "multiple_choice"),
            *("--choice-data", str(self.out / "questions"), "--valid-subset", "test"),
            *("--path", str(folder / "checkpoint_best.pt"), "--batch-size", "64", "--cpu"),
            *("--num-workers", "0", "--log-format", "json"),
        ]

    def one(self, row: str, seed: int) -> Dict[str, Any]:
        """Fine-tune and test; what is done already is read."""
        folder = self.out / "runs" / f"{row.replace(' ', '_')}-{seed}"
        path = folder / "result.json"
        if path.exists():
            return files.read_json(path)
        folder.mkdir(parents=True, exist_ok=True)
        started = time.monotonic()
        command = self.command(row, seed, folder)
        self.call(command, folder / "train.log", threads=1)
        self.call(self.test_command(folder), folder / "test.log", threads=1)
        tested = json_lines(folder / "test.log", "test")[-1]
        result = {
            "row": row,
            "seed": seed,
            "accuracy": float(tested["test_accuracy"]),
            "interval": [float(tested["test_accuracy_low"]), float(tested["test_accuracy_high"])],
            "chance": float(tested["test_chance"]),
            "cut": float(tested["test_cut"]),
            "valid": figures(folder / "train.log", "valid", "valid_accuracy"),
            "train": figures(folder / "train.log", "train", "train_accuracy"),
            "overflow": figures(folder / "train.log", "train", "train_overflow_expert1"),
            "seconds": time.monotonic() - started,
            "command": command,
        }
        outputs.write_json(path, result)
        for checkpoint in folder.glob("*.pt"):
            checkpoint.unlink()
        return result


def json_lines(log: Path, tag: str) -> List[Dict]:
    """fairseq's figures of `--log-format json` under a tag."""
    text = log.read_text(encoding="utf-8", errors="replace")
    return [json.loads(found) for found in re.findall(rf"\| {tag} \| (\{{.*\}})", text)]


def figures(log: Path, tag: str, key: str) -> List[float]:
    """A figure of every epoch; none where it is not in the log."""
    return [float(line[key]) for line in json_lines(log, tag) if key in line]


def before(ablation: Ablation, family: str) -> Dict[str, Any]:
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

    utils.import_user_module(argparse.Namespace(user_dir=str(quickstart.PACKAGE)))
    path = ablation.out / f"before_{family}.json"
    if path.exists() and "chance" in (found := files.read_json(path)):
        return found
    cfg = MultipleChoiceTaskConfig(
        data=str(ablation.base / "data"),
        choice_data=str(ablation.out / "questions"),
        choice_scoring="mean",
        tokens_per_sample=TOKENS,
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


def summary(rows: Dict[str, List[float]]) -> Dict[str, Dict[str, Any]]:
    """By row the mean, the standard deviation over seeds (None of one) and the difference from the
    row plain, `beyond` if it is more than twice its standard error."""
    found: Dict[str, Dict[str, Any]] = {}
    plain = rows.get("plain")
    for row, values in rows.items():
        several = len(values) > 1
        found[row] = {
            "accuracy": values,
            "mean": statistics.mean(values),
            "deviation": statistics.stdev(values) if several else None,
        }
        if plain and row != "plain":
            difference = statistics.mean(values) - statistics.mean(plain)
            found[row]["difference"] = difference
            if several and len(plain) > 1:
                squares = [statistics.variance(each) / len(each) for each in (values, plain)]
                found[row]["beyond"] = abs(difference) > 2 * math.sqrt(sum(squares))
    return found


def table(result: Dict[str, Any]) -> str:
    """The result as Markdown: accuracies in percent, with their 95 % intervals over questions."""
    lines = [
        "| | chance | before | after | spread over seeds | against plain | dropped in training |",
        "|---|---|---|---|---|---|---|",
    ]
    for row, entry in result["rows"].items():
        first = result["before"]["dense" if row == "dense" else "moe"]
        deviation = "one seed" if entry["deviation"] is None else f"± {entry['deviation']:.1f}"
        difference = signed(entry["difference"]) if "difference" in entry else ""
        difference += " *" if entry.get("beyond") else ""
        dropped = "" if entry["overflow"] is None else f"{entry['overflow']:.1f}"
        name = row if row == "dense" else f"MoE, {row}"
        lines.append(
            f"| {name} | {first['chance']:.1f} | {with_interval(first['accuracy'], result)} "
            f"| {with_interval(entry['mean'], result)} | {deviation} | {difference} | {dropped} |"
        )
    return "\n".join(lines) + "\n\n" + findings(result) + "\n"


def with_interval(percent: float, result: Dict[str, Any]) -> str:
    """An accuracy on the test questions, with its interval over them."""
    low, high = interval(percent, result["settings"]["questions"]["test"])
    return f"{percent:.1f} ({low:.1f} to {high:.1f})"


def interval(percent: float, asked: int) -> List[float]:
    return [100 * end for end in wilson_interval(percent / 100 * asked, asked)]


def signed(points: float) -> str:
    return wording.signed(points)


def findings(result: Dict[str, Any]) -> str:
    """What the table says, in sentences."""
    rows, started = result["rows"], result["before"]
    dense, plain = rows.get("dense"), rows.get("plain")
    if not dense or not plain:
        return "Not all of dense and plain are there, so there is no gap to speak of."
    gap = dense["mean"] - plain["mean"]
    seeds = len(plain["accuracy"])
    error = f"{'' if dense.get('beyond') else 'not '}more than twice the standard error"
    if "beyond" not in dense:
        error = "of one seed, so nothing is said about noise"
    said = [
        f"Fine-tuning takes the dense model from {started['dense']['accuracy']:.1f} to "
        f"{dense['mean']:.1f} % and the plain MoE from {started['moe']['accuracy']:.1f} to "
        f"{plain['mean']:.1f} %: the {'dense' if gap > 0 else 'sparse'} one is {abs(gap):.1f} "
        f"points ahead, {error}."
    ]
    asked = result["settings"]["questions"]["test"]
    chance = started["moe"]["chance"]
    near = [row for row, entry in rows.items() if interval(entry["mean"], asked)[0] <= chance]
    if near:
        said.append(f"Not above chance ({chance:.1f} %) by more than noise: {', '.join(near)}.")
    if gap <= 0:
        said.append("So the paper's gap between sparse and dense does not show here.")
    for word, sign in (("Better", 1), ("Worse", -1)) if seeds > 1 else ():
        named = [
            f"{row} ({signed(entry['difference'])})"
            for row, entry in rows.items()
            if row != "dense" and entry.get("beyond") and sign * entry["difference"] > 0
        ]
        said.append(f"{word} than plain by more than that (*): {', '.join(named) or 'none'}.")
    said.append(
        f"Seeds: {seeds}; test questions: {asked}, so the 95 % interval of one accuracy is about "
        f"± {196 * math.sqrt(0.25 / asked):.1f} points."
    )
    return " ".join(said)


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/finetune"))
    parser.add_argument(
        "--quickstart",
        type=Path,
        default=Path("runs/quickstart"),
        help="folder of the quickstart's run; made if it is not there",
    )
    parser.add_argument("--train", type=int, default=TRAIN, help="questions to train on")
    parser.add_argument("--valid", type=int, default=VALID, help="questions to choose the epoch by")
    parser.add_argument("--test", type=int, default=TEST, help="questions to compare by")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--rows", help=f"some of the rows, comma-separated: {', '.join(ROWS)}")
    parser.add_argument("--jobs", type=int, default=2, help="fine-tunings at once (default: 2)")
    args = parser.parse_args(argv)
    ablation: Optional[Ablation] = None
    try:
        chosen = chosen_rows(args.rows)
        for name in ("train", "valid", "test", "epochs", "seeds", "jobs"):
            if getattr(args, name) < 1:
                raise UserError(f"--{name} {getattr(args, name)}: use 1 or more")
        if not all((args.quickstart / model / "finished").exists() for model in quickstart.MODELS):
            status = quickstart.main(["--out", str(args.quickstart)])
            if status:
                return status
        ablation = Ablation(args)
        ablation.open()
        if not (ablation.out / "questions" / "test.jsonl").exists():
            text = args.quickstart / "text"
            questions.write(text, ablation.names, ablation.sizes, ablation.out / "questions", 1)
        result = run_all(ablation, chosen)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Stopped. Start the same command again and it goes on.", file=sys.stderr)
        return 130
    finally:
        if ablation is not None:
            ablation.stop()
    print(table(result))
    return 0


def chosen_rows(names: Optional[str]) -> List[str]:
    chosen = ROWS if names is None else [name.strip() for name in names.split(",")]
    for name in chosen:
        if name not in ROWS:
            raise UserError(f"--rows {names}: no row {name!r}; there are {', '.join(ROWS)}")
    return chosen


def run_all(ablation: Ablation, rows: List[str]) -> Dict[str, Any]:
    """Every row and seed, seed by seed; the result so far is on disk after each. Returns it."""
    started = {model: before(ablation, model) for model in quickstart.MODELS}
    for model, found in started.items():
        ends = "{:.1f} to {:.1f}".format(*found["interval"])
        chance = f"chance {found['chance']:.1f}"
        print(f"before: {model} {found['accuracy']:.1f} % ({ends}, {chance})", flush=True)
    plan = [(row, seed) for seed in range(1, ablation.args.seeds + 1) for row in rows]
    results: List[Dict[str, Any]] = []
    begun = time.monotonic()
    works = [functools.partial(ablation.one, row, seed) for row, seed in plan]
    for last in ablation.in_parallel(works, ablation.args.jobs):
        results.append(last)
        found = gathered(ablation, started, results)
        outputs.write_json(ablation.out / "result.json", found)
        (ablation.out / "result.md").write_text(table(found), encoding="utf-8")
        left = (time.monotonic() - begun) / len(results) * (len(plan) - len(results))
        print(
            f"{len(results)}/{len(plan)} {last['row']}, seed {last['seed']}: "
            f"{with_interval(last['accuracy'], found)} %, {clock(last['seconds'])} min; "
            f"about {clock(left)} left",
            flush=True,
        )
    return found


def gathered(
    ablation: Ablation, started: Dict[str, Dict], results: List[Dict[str, Any]]
) -> Dict[str, Any]:
    """The runs so far as result.json has them."""
    accuracies: Dict[str, List[float]] = {}
    for result in results:
        accuracies.setdefault(result["row"], []).append(result["accuracy"])
    rows = summary(accuracies)
    for row, entry in rows.items():
        dropped = [share for r in results if r["row"] == row for share in r["overflow"]]
        entry["overflow"] = statistics.mean(dropped) if dropped else None
        entry["interval"] = interval(entry["mean"], ablation.sizes["test"])
    return {
        "settings": ablation.settings,
        "before": started,
        "rows": rows,
        "runs": [{k: v for k, v in r.items() if k != "command"} for r in results],
        "commands": {r["row"]: typed(r["command"]) for r in results},
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
