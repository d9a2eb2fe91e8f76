"""`fairseq-moe show`: what a checkpoint is: its model, its files, its training."""

from __future__ import annotations

import argparse
import os
from typing import Any, Dict, List

from fairseq_today.torch_today import load_weights_only

from .. import outputs
from ..branch.files import find, flat_settings
from ..checkpoint.format import Manifest
from ..cost import parameters
from ..models.architectures import is_ours
from ..shape import shape_of
from ..wording import count
from . import training
from .archive import dtype_of
from .readers import reader_of

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
        print(outputs.as_json(content, default=str))
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
    found = training.results(rest)
    if found["updates"]:
        named = [(group, name) for group, names in _TRAINING.items() for name in names]
        settings = {name: training.setting(rest, group, name) for group, name in named}
        found.update((k, value) for k, value in settings.items() if value not in (None, False))
    return found


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
    model, past, size = summary["model"], summary["training"], summary["parameters"]
    words = f"{count(model['layers'], 'layer')}, {model['dim']} wide"
    words += f", a vocabulary of {model['types']:,}"
    if model["experts"]:
        listed = ", ".join(map(str, model["sparse_layers"]))
        layers = f"layer{'s' * (len(model['sparse_layers']) > 1)} {listed}"
        words += f"; {count(model['experts'], 'expert')} in {layers}, top {model['top_k']}"
    table = {
        "path": summary["path"],
        "model": words,
        "parameters": f"{size['total']:,}, of which a token uses {size['active']:,}",
        "files": f"{count(summary['files']['count'], 'file')}, "
        f"{summary['files']['bytes']:,} bytes, " + ", ".join(summary["precision"]),
    }
    done = [count(past["updates"], "update")] if past.get("updates") else []
    done += [count(past["tokens"], "token")] if past.get("tokens") else []
    done += [f"epoch {past['epoch']}"] if past.get("epoch") else []
    done += [f"{past['seconds']:,.0f} s"] if past.get("seconds") else []
    for name, words in (("validation_loss", "validation"), ("best", "best")):
        if past.get(name) is not None:
            done.append(f"{words} {past['best_checkpoint_metric']} {past[name]:.4g}")
    table["training"] = ", ".join(done) or "not recorded"
    shown = {"updates", "tokens", "epoch", "seconds"}
    shown |= {"best_checkpoint_metric", "validation_loss", "best"}
    table["with"] = ", ".join(
        f"{name} {' '.join(map(str, value)) if isinstance(value, list) else value}"
        for name, value in past.items()
        if name not in shown
    )
    table["written by"] = summary["written_by"]
    return {name: words for name, words in table.items() if words}
