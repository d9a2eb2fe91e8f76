"""`fairseq-moe show`: what a checkpoint is: its model, its files, its training."""

from __future__ import annotations

import argparse
import json
import os
from typing import Any, Dict, List

from fairseq_today.torch_today import load_weights_only

from ..branch.files import find, flat_settings
from ..checkpoint import trained
from ..checkpoint.format import Manifest, last_history
from ..cost import parameters
from ..models.architectures import is_ours
from ..shape import shape_of
from ..wording import count
from .archive import dtype_of
from .readers import reader_of
from .source import best_metric

# Settings of the training to show, by fairseq's groups.
_TRAINING = {
    "optimization": ("lr", "max_update", "max_epoch", "update_freq", "clip_norm"),
    "dataset": ("batch_size", "max_tokens"),
    "task": ("data", "tokens_per_sample"),
    "common": ("seed", "fp16", "bf16", "memory_efficient_fp16", "memory_efficient_bf16"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Describe a checkpoint: its model, its files, its training, and what wrote it."
    )
    parser.add_argument("path", metavar="CKPT", help="checkpoint, as fairseq-eval-lm's --path")
    parser.add_argument("--settings", action="store_true", help="print all settings of the model")
    parser.add_argument("--json", action="store_true", help="print JSON, all settings in it")


def run(args: argparse.Namespace) -> None:
    """Raises UserError for what is no checkpoint of a language model."""
    content = facts(args.path)
    if args.json:
        print(json.dumps(content, indent=1, default=str))
        return
    width = max(map(len, content))
    for name, words in _table(content).items():
        print(f"{name:{width}}  {words}")
    if args.settings:
        for name, value in sorted(content["settings"].items()):
            print(f"  {name} = {value!r}")


def facts(path: str) -> Dict[str, Any]:
    """All that a checkpoint says of itself; weights stay on disk."""
    reader = reader_of(path)
    source = reader.open(path, True)
    files = [file for file, _ in reader.files(path)]
    shape = shape_of(source.settings, source.vocabulary)
    cost = parameters(shape)
    floats = (dtype_of(value) for value in source.model.values())
    precisions = {str(dtype)[6:] for dtype in floats if dtype.is_floating_point}
    return {
        "path": path,
        "model": {
            "layers": shape.layers,
            "dim": shape.dim,
            "types": shape.vocabulary,
            "sparse_layers": list(shape.sparse),
            "experts": shape.experts if shape.sparse else 0,
            "top_k": shape.top_k if shape.sparse else 0,
        },
        "parameters": {"total": cost.total, "shared": cost.shared, "active": cost.active},
        "precision": sorted(precisions - {"float32"}) or ["float32"],
        "files": {"count": len(files), "bytes": sum(map(os.path.getsize, files))},
        "training": _training(source.rest),
        "written_by": _writer(path, files),
        "settings": source.settings,
    }


def _training(rest: Dict[str, Any]) -> Dict[str, Any]:
    history = last_history(rest)
    extra = rest.get("extra_state") or {}
    updates = history.get("num_updates")
    if (
        not updates
    ):  # not trained since it was made, or weights only: the rest is fairseq's defaults
        corpora = (rest.get("task_state") or {}).get("trained_corpora")
        return {"updates": 0, **({"corpora": corpora} if corpora else {})}
    summary = {
        "updates": updates,
        "epoch": trained.epoch(extra, updates),
        "tokens": trained.tokens(extra, updates),
        "seconds": extra.get("previous_training_time"),
        "best_checkpoint_metric": best_metric(rest),
        "validation_loss": extra.get("val_loss"),  # a value of that metric
        "best": extra.get("best"),
        "optimizer": history.get("optimizer_name"),
        "criterion": history.get("criterion_name"),
        "corpora": (rest.get("task_state") or {}).get("trained_corpora"),
    }
    cfg = rest.get("cfg") or {}
    for group, names in _TRAINING.items():
        of_group = cfg.get(group) or {}
        summary.update({n: of_group.get(n) for n in names if of_group.get(n) not in (None, False)})
    return {name: value for name, value in summary.items() if value is not None}


def _writer(path: str, files: List[str]) -> str:
    if find(path) is not None:
        return f"fairseq's moe branch or in its format, {count(len(files), 'file')}"
    state = load_weights_only(path, map_location="cpu", mmap=True)
    manifest = Manifest.read(path, state)
    if manifest is not None:
        return manifest.code
    known = is_ours(flat_settings(state)) or "tokenizer" in (state.get("task_state") or {})
    known = known or "dictionary_fingerprint" in (state.get("task_state") or {})
    return "fairseq_moe_ext" if known else "fairseq, or an older fairseq_moe_ext"


def _table(summary: Dict[str, Any]) -> Dict[str, str]:
    model, training, size = summary["model"], summary["training"], summary["parameters"]
    words = f"{count(model['layers'], 'layer')}, {model['dim']} wide"
    words += f", a vocabulary of {model['types']:,}"
    if model["experts"]:
        listed = ", ".join(map(str, model["sparse_layers"]))
        words += f"; {model['experts']} experts in layers {listed}, top {model['top_k']}"
    table = {
        "path": summary["path"],
        "model": words,
        "parameters": f"{size['total']:,}, of which a token uses {size['active']:,}",
        "files": f"{count(summary['files']['count'], 'file')}, "
        f"{summary['files']['bytes']:,} bytes, " + ", ".join(summary["precision"]),
    }
    done = [count(training["updates"], "update")] if training.get("updates") else []
    done += [count(training["tokens"], "token")] if training.get("tokens") else []
    done += [f"epoch {training['epoch']}"] if training.get("epoch") else []
    done += [f"{training['seconds']:,.0f} s"] if training.get("seconds") else []
    for name, words in (("validation_loss", "validation"), ("best", "best")):
        if training.get(name) is not None:
            done.append(f"{words} {training['best_checkpoint_metric']} {training[name]:.4g}")
    table["training"] = ", ".join(done) or "not recorded"
    shown = {"updates", "tokens", "epoch", "seconds"}
    shown |= {"best_checkpoint_metric", "validation_loss", "best"}
    table["with"] = ", ".join(
        f"{name} {' '.join(map(str, value)) if isinstance(value, list) else value}"
        for name, value in training.items()
        if name not in shown
    )
    table["written by"] = summary["written_by"]
    return {name: words for name, words in table.items() if words}
