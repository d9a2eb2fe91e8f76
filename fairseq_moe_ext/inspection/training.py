"""Routing over training: the metrics of the gates from a log of fairseq-train."""

import json
import re
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional

from .. import files, metrics_file
from ..errors import UserError
from .result import Training

# metric -> its mean over layers in the log; that of layer 3 is layer3_<metric>
METRICS = {
    "load_max": "load_max",
    "entropy_gating": "entropy_gating",
    "overflow": "overflow",
    "gate_loss": "moe_gate_loss",
}
_LAYER = re.compile(rf"layer(\d+)_({'|'.join(METRICS)})")
_PAIR = re.compile(r"([A-Za-z_][\w./]*)=([^,\s]+)")
MOST = 300  # points of a line; of longer logs every second, third, ... is taken


def read_log(path: Path) -> Training:
    """The gate metrics in a log of fairseq-train (--log-format simple, json or tqdm without a bar)
    or in a metrics.jsonl. Raises UserError if there are none."""
    rows: Dict[int, Dict[str, Any]] = {}
    for record in _records(files.read_text(path, f"--log {path}")):
        try:
            rows[int(float(record["num_updates"]))] = record  # of a resumed run, the later one
        except (KeyError, TypeError, ValueError):
            continue
    updates = sorted(rows)
    updates = updates[:: max(1, -(-len(updates) // MOST))]
    metrics: Dict[str, Dict[str, List[Optional[float]]]] = {}
    for name, mean in METRICS.items():
        keys = {m[1]: m[0] for m in map(_LAYER.fullmatch, _keys(rows)) if m and m[2] == name}
        keys = dict(sorted(keys.items(), key=lambda item: int(item[0])))
        lines = {
            layer: [_number(rows[update].get(key)) for update in updates]
            for layer, key in {"all": mean, **keys}.items()
        }
        lines = {layer: line for layer, line in lines.items() if any(v is not None for v in line)}
        if lines:
            metrics[name] = lines
    if not metrics:
        raise UserError(
            f"--log {path}: contains no gate metrics (load_max, entropy_gating, ...); give the "
            "log of fairseq-train with --criterion moe_cross_entropy, or its metrics.jsonl"
        )
    return Training(str(path), updates, metrics)


def beside(checkpoint: Path) -> Optional[Training]:
    """The metrics.jsonl beside a checkpoint, if it has the metrics."""
    path = checkpoint.parent / metrics_file.NAME
    try:
        return read_log(path) if path.is_file() else None
    except UserError:  # of a few updates, or of a dense model
        return None


def _keys(rows: Dict[int, Dict[str, Any]]) -> Dict[str, None]:
    return dict.fromkeys(key for row in rows.values() for key in row)


def _records(text: str) -> Iterator[Dict[str, Any]]:
    """Training's records: those of validation and of whole epochs have other keys."""
    for line in text.splitlines():
        start = line.find("{")
        if start >= 0:
            try:
                record = json.loads(line[start:])
            except ValueError:
                continue
            # metrics.jsonl has a tag, too
            if isinstance(record, dict) and record.get("tag", "train_inner") == "train_inner":
                yield record
        elif "num_updates=" in line:
            yield dict(_PAIR.findall(line))


def _number(value: Any) -> Optional[float]:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if number == number and abs(number) != float("inf") else None
