"""Dense models to and from Hugging Face's XGLM (transformers, models/xglm), which is fairseq's
dense language model: pre-norm, sinusoidal positions that start at 2, embeddings times sqrt(width).
Its first four types are fairseq's <s>, <pad>, </s>, <unk>, so rows need not be moved."""

from __future__ import annotations

import json
import os
from dataclasses import MISSING, fields
from typing import Any, Dict, List

import torch
from torch import Tensor

from fairseq_today.torch_today import load_weights_only

from ..branch.settings import ONE_PROCESS, complete_cfg
from ..checkpoint.intact import check_records
from ..config import MoETransformerLMConfig
from ..errors import UserError
from ..models.language_model import MODEL_NAME
from ..shape import shape_of
from .archive import AnyTensor, bytes_of, dtype_of, read_safetensors, write_safetensors
from .source import Source, fresh_rest, set_order
from .targets import Job

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
_ACTIVATIONS = {"gelu": "gelu", "relu": "relu", "gelu_accurate": "gelu_new", "tanh": "tanh"}
_SPECIAL = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
_OUTPUT = "decoder.output_projection.weight"


def xglm_jobs(source: Source, folder: str) -> List[Job]:
    """model.safetensors and config.json, the last. UserError for what XGLM does not have."""
    s = source.settings
    widths = shape_of(s).dense_widths
    lacking = []
    if source.experts:
        lacking.append(f"{source.experts} experts (--moe-expert-count)")
    elif len(set(widths)) > 1:
        lacking.append("layers of two widths (--alternate-decoder-ffn-embed-dim, --moe-dense-twin)")
    for name in (
        "decoder_learned_pos",
        "no_token_positional_embeddings",
        "layernorm_embedding",
        "no_decoder_final_norm",
    ):
        if s[name]:
            lacking.append("--" + name.replace("_", "-"))
    if str(s["activation_fn"]) not in _ACTIVATIONS:
        lacking.append(f"--activation-fn {s['activation_fn']}")
    if source.head:
        lacking.append("a head that scores candidates (--choice-scoring head)")
    if lacking:
        raise UserError(f"--to xglm: {source.path} has what XGLM has not: {', '.join(lacking)}")
    tied = s["share_decoder_input_output_embed"]
    config = {
        "architectures": ["XGLMForCausalLM"],
        "model_type": "xglm",
        "vocab_size": source.types,
        "max_position_embeddings": s["max_target_positions"] or s["tokens_per_sample"],
        "d_model": s["decoder_embed_dim"],
        "ffn_dim": widths[0],
        "num_layers": s["decoder_layers"],
        "attention_heads": s["decoder_attention_heads"],
        "activation_function": _ACTIVATIONS[str(s["activation_fn"])],
        "dropout": s["dropout"],
        "attention_dropout": s["attention_dropout"],
        "activation_dropout": s["activation_dropout"],
        "layerdrop": 0.0,
        "scale_embedding": not s["no_scale_embedding"],
        "tie_word_embeddings": bool(tied),
        "use_cache": True,
        **_SPECIAL,
        "decoder_start_token_id": 2,
        "torch_dtype": str(dtype_of(source.model["decoder.embed_tokens.weight"]))[6:],
    }
    tensors: Dict[str, AnyTensor] = {}
    for name, value in source.model.items():
        if name == "decoder.version" or name.startswith("decoder.embed_positions."):
            continue
        if name == _OUTPUT:
            if not tied:
                tensors["lm_head.weight"] = value
            continue
        tensors["model" + name[len("decoder") :]] = value

    def write_config(path: str, progress: Any) -> None:
        with open(path, "w", encoding="utf-8") as stream:
            stream.write(json.dumps(config, indent=2) + "\n")
            stream.flush()
            os.fsync(stream.fileno())

    size = sum(map(bytes_of, tensors.values()))
    weights = os.path.join(folder, WEIGHTS)
    return [
        Job(weights, size, lambda path, progress: write_safetensors(tensors, path, progress)),
        Job(os.path.join(folder, CONFIG), 0, write_config),
    ]


def open_xglm(folder: str) -> Source:
    """A folder with config.json and the weights, as safetensors or torch's, in one file or some."""
    path = os.path.join(folder, CONFIG)
    try:
        with open(path, encoding="utf-8") as stream:
            config = json.load(stream)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: cannot be read ({error}); --from xglm takes a folder of it"
        ) from error
    settings = _settings(path, config)
    weights = _weights(folder)
    tied = settings["share_decoder_input_output_embed"]
    model: Dict[str, AnyTensor] = {"decoder.version": torch.tensor([3.0])}
    for name, value in weights.items():
        if name.startswith("model.embed_positions."):
            continue  # the sinusoids, in old files
        if name.startswith("model."):
            model["decoder" + name[len("model") :]] = value
        elif name == "lm_head.weight" and not tied:
            model[_OUTPUT] = value
    embedding = model.get("decoder.embed_tokens.weight")
    if embedding is None:
        raise UserError(f"{folder}: there is no model.embed_tokens.weight in its weights")
    if embedding.shape[0] != config["vocab_size"]:
        raise UserError(
            f"{path}: vocab_size {config['vocab_size']}, but the weights have "
            f"{embedding.shape[0]} rows: they do not belong together"
        )
    model["decoder.embed_positions._float_tensor"] = torch.zeros(1, dtype=dtype_of(embedding))
    if tied:
        model[_OUTPUT] = embedding
    elif _OUTPUT not in model:
        raise UserError(f"{folder}: tie_word_embeddings is false, and there is no lm_head.weight")
    task = {
        "_name": "language_modeling",
        "data": None,  # a key, so that from_pretrained can set it
        "tokens_per_sample": settings["tokens_per_sample"],
    }
    cfg = complete_cfg(settings, {"task": task, "criterion": {"_name": "cross_entropy"}})
    source = Source(folder, fresh_rest(cfg), settings, model, [], None)
    set_order(source)
    return source


def _settings(path: str, config: Dict[str, Any]) -> Dict[str, Any]:
    kind = config.get("model_type") if isinstance(config, dict) else "nowhere"
    if kind != "xglm":
        raise UserError(f"{path}: model_type is {kind}, not xglm")
    needed = (
        *("vocab_size", "max_position_embeddings", "d_model", "ffn_dim", "num_layers"),
        *("attention_heads", "activation_function"),
    )
    missing = [name for name in needed if name not in config]
    if missing:
        raise UserError(f"{path}: {', '.join(missing)} missing")
    for name in needed[:-1]:
        if not isinstance(config[name], int):
            raise UserError(f"{path}: {name} is {config[name]!r}, not a whole number")
    wanted = {**_SPECIAL, "add_cross_attention": False}
    for name, value in wanted.items():
        if config.get(name, value) != value:
            raise UserError(
                f"{path}: {name} is {config[name]}, and fairseq's models have {value}, so it "
                "cannot be one of them"
            )
    names = {theirs: ours for ours, theirs in _ACTIVATIONS.items()}
    if config["activation_function"] not in names:
        raise UserError(
            f"{path}: activation_function {config['activation_function']} is none of "
            f"{', '.join(names)}"
        )
    defaults = {f.name: f.default for f in fields(MoETransformerLMConfig) if f.default != MISSING}
    return {
        **defaults,
        **ONE_PROCESS,
        "_name": MODEL_NAME,
        "activation_fn": names[config["activation_function"]],
        "dropout": float(config.get("dropout", 0.1)),
        "attention_dropout": float(config.get("attention_dropout", 0.1)),
        "activation_dropout": float(config.get("activation_dropout", 0.0)),
        "decoder_embed_dim": config["d_model"],
        "decoder_ffn_embed_dim": config["ffn_dim"],
        "decoder_layers": config["num_layers"],
        "decoder_attention_heads": config["attention_heads"],
        "no_scale_embedding": not config.get("scale_embedding", True),
        "share_decoder_input_output_embed": bool(config.get("tie_word_embeddings", True)),
        "tokens_per_sample": config["max_position_embeddings"],
        "max_target_positions": config["max_position_embeddings"],
    }


def _weights(folder: str) -> Dict[str, Tensor]:
    for name in ("model.safetensors", "pytorch_model.bin"):
        path = os.path.join(folder, name)
        if os.path.isfile(path):
            return _read(path)
        index = path + ".index.json"
        if os.path.isfile(index):
            try:
                with open(index, encoding="utf-8") as stream:
                    parts = sorted(set(json.load(stream)["weight_map"].values()))
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                raise UserError(f"{index}: there is no weight_map in it; copy it again") from error
            found: Dict[str, Tensor] = {}
            for part in parts:
                file = os.path.join(folder, os.path.basename(part))
                if not os.path.isfile(file):
                    raise UserError(f"{file}: missing; {index} names it: copy the folder again")
                found.update(_read(file))
            return found
    raise UserError(f"{folder}: has neither {WEIGHTS} nor pytorch_model.bin")


def _read(path: str) -> Dict[str, Tensor]:
    if path.endswith(".safetensors"):
        return read_safetensors(path)
    check_records(path)
    state = load_weights_only(path, map_location="cpu", mmap=True)
    if not isinstance(state, dict):
        raise UserError(f"{path}: has no tensors by name; copy it again")
    return state
