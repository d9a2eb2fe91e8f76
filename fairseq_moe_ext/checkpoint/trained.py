"""How far a checkpoint's training has come: epochs, and tokens in all of its runs.

fairseq's meters begin anew where a run continues at the start of an epoch
(fairseq/trainer.py:627@0.12.2), so checkpoints keep the sum as `extra_state["tokens"]`.
"""

from typing import Any, Dict, Optional

from fairseq.logging import metrics

KEY = "tokens"


def epoch(extra_state: Dict[str, Any], updates: Optional[int]) -> Optional[int]:
    """The epoch of the last update: at its end, fairseq saves the next one."""
    place = extra_state.get("train_iterator") or {}
    number = place.get("epoch")
    ended = updates and place.get("iterations_in_epoch") == 0
    return max(1, number - 1) if number and ended else number


def tokens(extra_state: Dict[str, Any], updates: Optional[int]) -> Optional[int]:
    """The tokens of a checkpoint's updates; None: not known. Checkpoints without the sum have the
    meter of tokens per batch, which may lack updates."""
    if KEY in extra_state:
        return extra_state[KEY]
    for _, name, _, state in (extra_state.get("metrics") or {}).get("default", ()):
        if name == "wpb" and state["count"] == updates:
            return int(state["sum"])
    return None


def metered() -> int:
    """The tokens in this process's meter."""
    meter = metrics.get_meter("default", "wpb")
    return 0 if meter is None else int(meter.sum)
