"""What a checkpoint says of its training, for `show` and model cards."""

from typing import Any, Dict, Mapping

from ..checkpoint import trained
from ..checkpoint.format import last_history

_METRIC = "best_checkpoint_metric"


def results(rest: Mapping[str, Any]) -> Dict[str, Any]:
    """What is known of these, by name. A checkpoint that was not trained since it was made, or has
    weights only, has fairseq's defaults in place of them."""
    history, extra = last_history(rest), rest.get("extra_state") or {}
    updates = history.get("num_updates") or 0
    found: Dict[str, Any] = {"updates": updates}
    if updates:
        found.update(
            epoch=trained.epoch(extra, updates),
            tokens=trained.tokens(extra, updates),
            seconds=extra.get("previous_training_time"),
            best_checkpoint_metric=str(setting(rest, "checkpoint", _METRIC) or "loss"),
            validation_loss=extra.get("val_loss"),  # a value of that metric
            best=extra.get("best"),
            optimizer=history.get("optimizer_name"),
            criterion=history.get("criterion_name"),
        )
    found["corpora"] = (rest.get("task_state") or {}).get("trained_corpora") or None
    return {name: value for name, value in found.items() if value is not None}


def setting(rest: Mapping[str, Any], group: str, name: str) -> Any:
    """A setting of the training; None if it is not known. `_name`: the optimizer, for example."""
    of_group = (rest.get("cfg") or {}).get(group)
    of_group = of_group if isinstance(of_group, Mapping) else {}
    flat = vars(rest["args"]) if rest.get("args") is not None else {}
    return of_group.get(name, flat.get(group if name == "_name" else name))
