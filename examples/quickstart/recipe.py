"""The quickstart's models and its commands of fairseq and of this package."""

import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Dict, List, NamedTuple

from fairseq_moe_ext import cores
from fairseq_moe_ext.study.child import console_script
from fairseq_moe_ext.study.plan import PACKAGE

# The recipe. Chosen by experiment for ten minutes on two cores; README.md says what was tried.
UPDATES = 440
TEXT_BYTES = 2_000_000  # of training text per domain
VALID_BYTES, TEST_BYTES = 16_000, 100_000
VOCABULARY = 4096
CONTEXT = 256  # tokens a block
BLOCKS = 24  # blocks an update
LAYERS, DIM, HEADS = 4, 128, 4
FFN = 512  # hidden width of the dense model, and of all experts of a token together
LEARNING_RATE = 1e-2
BALANCE_WEIGHT = 0.01
SAVES = 8  # checkpoints, with validation, in one training
# What both models go on from at the end: one of each training domain.
PROMPTS = ("Return the number of", "def __init__(self", "template <typename T>", "assert simplify(")

SHORT_TITLES = {"dense": "dense", "moe": "MoE"}


class Routing(NamedTuple):
    """How the MoE model's tokens choose experts; the FLOPs are those of one FFN of width FFN."""

    experts: int
    top_k: int

    @property
    def width(self) -> int:
        """Hidden width of an expert."""
        return FFN // self.top_k


ROUTERS = {
    "hash": Routing(256, 4),  # by the token's id alone, nothing is learned
    "topk": Routing(8, 2),  # by a learned gate
}
ROUTER = "hash"


def settings(updates: int, text_bytes: int, router: str = ROUTER) -> Dict[str, object]:
    """What the result depends on; with 0 updates the data alone."""
    data = {
        "updates": updates,
        "text_bytes": text_bytes,
        "vocabulary": VOCABULARY,
        "python": platform.python_version(),
        "torch": version("torch"),
    }
    if updates == 0:
        return data
    return {
        **data,
        "context": CONTEXT,
        "blocks": BLOCKS,
        "layers": LAYERS,
        "dim": DIM,
        "heads": HEADS,
        "ffn": FFN,
        "router": router,
        **ROUTERS[router]._asdict(),
        "expert_ffn": ROUTERS[router].width,
        "bf16": True,  # where it is faster
        "learning_rate": LEARNING_RATE,
        "balance_weight": BALANCE_WEIGHT,
    }


def prepare_command(out: Path, held_out: Dict[str, bool]) -> List[str]:
    command = [sys.executable, "-m", "fairseq_moe_ext.cli", "prepare", str(out / "data")]
    for name, out_of_domain in held_out.items():
        flag = "--heldout" if out_of_domain else "--corpus"
        for split in ("valid", "test") if out_of_domain else ("train", "valid", "test"):
            command += [flag, f"{name}:{split}={out / 'text' / f'{name}.{split}.jsonl'}"]
    workers = min(cores.usable(), 8)
    return command + ["--train-bpe", str(VOCABULARY), "--workers", str(workers)]


def shape_flags(model: str, router: str = ROUTER) -> List[str]:
    """The flags of fairseq-train that say what a model's parameters are."""
    ffn, routing = str(FFN), ROUTERS[router]
    of_family = {
        "dense": ["--arch", "dense_lm_tiny", "--moe-freq", "1"]
        + ["--alternate-decoder-ffn-embed-dim", ffn],
        "moe": ["--arch", "moe_lm_tiny", "--moe-freq", "1", "--moe-router", router]
        + ["--moe-expert-count", str(routing.experts), "--moe-top-k", str(routing.top_k)]
        + ["--moe-expert-ffn-dim", str(routing.width), "--moe-dropless"],
    }[model]
    return [
        *of_family,
        *("--decoder-layers", str(LAYERS), "--decoder-embed-dim", str(DIM)),
        *("--decoder-attention-heads", str(HEADS), "--decoder-ffn-embed-dim", ffn),
    ]


def train_command(out: Path, model: str, updates: int, router: str = ROUTER) -> List[str]:
    every = max(1, updates // SAVES)
    return [
        console_script("fairseq-train"),
        str(out / "data"),
        *("--user-dir", str(PACKAGE), "--task", "mixture_language_modeling"),
        *shape_flags(model, router),
        *("--dropout", "0", "--attention-dropout", "0"),
        *("--tokens-per-sample", str(CONTEXT), "--batch-size", str(BLOCKS)),
        *("--criterion", "moe_cross_entropy", "--moe-gate-loss-wt", str(BALANCE_WEIGHT)),
        *("--optimizer", "fused_adam", "--adam-betas", "(0.9, 0.98)", "--weight-decay", "0.01"),
        *("--clip-norm", "1.0", "--lr", str(LEARNING_RATE), "--lr-scheduler", "polynomial_decay"),
        *("--warmup-updates", str(max(1, updates // 10))),
        *("--total-num-update", str(updates), "--max-update", str(updates)),
        *("--seed", "1", "--cpu", "--bf16", "--num-workers", "0"),
        *("--save-dir", str(out / model), "--save-interval-updates", str(every)),
        *("--keep-interval-updates", "1", "--no-epoch-checkpoints"),
        *("--best-checkpoint-metric", "in_domain_ppl"),
        *("--log-format", "json", "--log-interval", str(min(10, every))),
    ]


def eval_command(out: Path, model: str, domain: str) -> List[str]:
    return [
        console_script("fairseq-eval-lm"),
        str(out / "data" / domain),
        *("--user-dir", str(PACKAGE), "--task", "language_modeling", "--gen-subset", "test"),
        *("--path", str(out / model / "checkpoint_best.pt")),
        *("--tokens-per-sample", str(CONTEXT), "--batch-size", "16", "--cpu"),
        *("--no-progress-bar",),
    ]


def expert_use_command(out: Path, held_out: Dict[str, bool]) -> List[str]:
    command = [sys.executable, "-m", "fairseq_moe_ext.cli", "expert-use"]
    command += [str(out / "moe" / "checkpoint_best.pt"), "--cpu"]
    for name in held_out:
        command += ["--bin", f"{name}={out / 'data' / name}"]
    command += ["--subset", "test", "--tokens-per-sample", str(CONTEXT)]
    command += ["--among", ",".join(name for name, held in held_out.items() if not held)]
    return command + ["--json", str(out / "expert_use.json"), "--overwrite"]


def samples_command(out: Path) -> List[str]:
    checkpoints = [str(out / model / "checkpoint_best.pt") for model in ("dense", "moe")]
    return [
        *(sys.executable, "-m", "fairseq_moe_ext.cli", "generate", checkpoints[0]),
        *("--side-by-side", checkpoints[1], *PROMPTS, "--max-tokens", "48"),
        *("--temperature", "0.7", "--top-k", "40", "--seed", "1", "--cpu"),
        *("--json", str(out / "samples.json"), "--overwrite"),
    ]
