"""How much Adam's epsilon shortens the steps of experts: sqrt(v) / (sqrt(v) + epsilon), averaged
over each matrix of experts, at the end of a training.

    python examples/study/step_lengths.py CHECKPOINT [CHECKPOINT ...]

v is the second moment, divided by 1 - beta2^step as Adam does (Kingma & Ba 2015, algorithm 1).
1: a full step, whatever the size of the gradients.
"""

import sys
from pathlib import Path
from typing import List, Sequence

from fairseq_moe_ext.errors import OneLineParser, UserError, program_status
from fairseq_moe_ext.files import check_checkpoint
from fairseq_today.torch_today import load_weights_only


def step_lengths(checkpoint: Path) -> List[float]:
    """Of each matrix of experts. Raises UserError for a checkpoint without the state of Adam, or
    without experts."""
    check_checkpoint(checkpoint, str(checkpoint))
    state = load_weights_only(str(checkpoint), map_location="cpu", mmap=True)
    cfg = (state.get("cfg") or {}).get("optimizer") or {}
    saved = (state.get("last_optimizer_state") or {}).get("state", {}).values()
    moments = [of for of in saved if "exp_avg_sq" in of]
    if not moments or "adam_eps" not in cfg:
        raise UserError(f"{checkpoint}: has no state of Adam; name a checkpoint of a training")
    experts = [of for of in moments if of["exp_avg_sq"].dim() == 3]  # (E, ., .)
    if not experts:
        raise UserError(f"{checkpoint}: has no experts; name one of a sparse model")
    beta2 = float(str(cfg["adam_betas"]).strip("()[] ").split(",")[1])
    found = []
    for of in experts:
        root = (of["exp_avg_sq"].double() / (1 - beta2 ** of["step"])).sqrt()
        found.append(float((root / (root + cfg["adam_eps"])).mean()))
    return found


def run(paths: Sequence[Path]) -> None:
    for path in paths:
        steps = step_lengths(path)
        print(f"{path}: {min(steps):.3f} to {max(steps):.3f} in {len(steps)} matrices of experts")


def main(argv: Sequence[str]) -> int:
    parser = OneLineParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoints", type=Path, nargs="+", metavar="CHECKPOINT")
    paths = parser.parse_args(argv).checkpoints
    return program_status(lambda: run(paths))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
