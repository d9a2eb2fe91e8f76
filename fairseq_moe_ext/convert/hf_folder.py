"""Reads and writes a model's folder for Hugging Face transformers: config.json, weights, and
more."""

from __future__ import annotations

import json
import os
from typing import Any, Dict, List

import torch
from torch import Tensor

from fairseq_today.torch_today import load_weights_only

from .. import files
from ..checkpoint.intact import check_records
from ..errors import UserError
from ..expert_parallel import is_expert
from ..moe.experts import TensorPerExpert
from .archive import AnyTensor, bytes_of, read_safetensors, write_safetensors
from .targets import Job

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
OUTPUT = "decoder.output_projection.weight"
SHARD = 5e9  # bytes of a file of weights, as transformers has it


def is_weights(name: str) -> bool:
    """Whether transformers would take a file for weights or their index."""
    return name.startswith(("model", "pytorch_model")) and name.endswith(
        (".safetensors", ".bin", ".index.json")
    )


def text_job(folder: str, name: str, text: str) -> Job:
    """A small file."""
    return bytes_job(folder, name, text.encode("utf-8"))


def bytes_job(folder: str, name: str, content: bytes) -> Job:
    def write(path: str, progress: Any) -> None:
        with open(path, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())

    return Job(os.path.join(folder, name), 0, write)


def weight_jobs(tensors: Dict[str, AnyTensor], folder: str, most: float) -> List[Job]:
    """Files of at most `most` bytes, if no tensor is larger, and their index if there are
    several."""
    shards: List[Dict[str, AnyTensor]] = [{}]
    size = 0
    for name, value in tensors.items():
        if shards[-1] and size + bytes_of(value) > most:
            shards.append({})
            size = 0
        shards[-1][name] = value
        size += bytes_of(value)
    if len(shards) == 1:
        return [_weight_job(tensors, os.path.join(folder, WEIGHTS))]
    names = [
        f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)
    ]
    index = {
        "metadata": {"total_size": sum(map(bytes_of, tensors.values()))},
        "weight_map": {n: file for file, shard in zip(names, shards) for n in shard},
    }
    jobs = [_weight_job(s, os.path.join(folder, name)) for name, s in zip(names, shards)]
    return [*jobs, text_job(folder, WEIGHTS + ".index.json", json.dumps(index, indent=2) + "\n")]


def _weight_job(tensors: Dict[str, AnyTensor], path: str) -> Job:
    size = sum(map(bytes_of, tensors.values()))
    return Job(path, size, lambda temporary, bar: write_safetensors(tensors, temporary, bar))


def their_names(model: Dict[str, AnyTensor], tied: bool, learned: bool) -> Dict[str, AnyTensor]:
    """Tensors of our model by transformers' names, without computed and duplicate ones."""
    renamed: Dict[str, AnyTensor] = {}
    for name, value in model.items():
        if name == "decoder.version" or name.endswith("._float_tensor"):
            continue
        if name.startswith("decoder.embed_positions.") and not learned:
            continue
        if name != OUTPUT:
            renamed["model" + name[len("decoder") :]] = value
        elif not tied:
            renamed["lm_head.weight"] = value
    return renamed


def our_names(
    folder: str, weights: Dict[str, Tensor], settings: Dict[str, Any], vocabulary: int
) -> Dict[str, AnyTensor]:
    """The inverse. Raises UserError for weights that do not match the settings.

    Args:
        vocabulary: rows that the embedding should have.
    """
    tied = settings["share_decoder_input_output_embed"]
    learned = settings["decoder_learned_pos"]
    model: Dict[str, AnyTensor] = {"decoder.version": torch.tensor([3.0])}
    for name, value in weights.items():
        if name.startswith("model.embed_positions.") and not learned:
            continue  # the sinusoids, in old files
        if name.startswith("model."):
            ours = "decoder" + name[len("model") :]
            model[ours] = TensorPerExpert(value) if is_expert(ours) else value
        elif name == "lm_head.weight" and not tied:
            model[OUTPUT] = value
    embedding = model.get("decoder.embed_tokens.weight")
    if embedding is None:
        raise UserError(
            f"{folder}: its weights lack model.embed_tokens.weight; copy the folder again"
        )
    if embedding.shape[0] != vocabulary:
        raise UserError(
            f"{os.path.join(folder, CONFIG)}: vocab_size {vocabulary}, but the weights have "
            f"{embedding.shape[0]} rows: copy both files from one folder"
        )
    if not learned and not settings["no_token_positional_embeddings"]:
        dtype = weights["model.embed_tokens.weight"].dtype
        model["decoder.embed_positions._float_tensor"] = torch.zeros(1, dtype=dtype)
    if tied:
        model[OUTPUT] = embedding
    elif OUTPUT not in model:
        raise UserError(
            f"{folder}: tie_word_embeddings is false, but lm_head.weight is missing; copy the "
            "folder again"
        )
    return model


def read_config(folder: str) -> Dict[str, Any]:
    """Read config.json. Raises UserError if it cannot be read."""
    path = os.path.join(folder, CONFIG)
    config = files.read_json(path, remedy="--from needs a folder that contains it")
    return config if isinstance(config, dict) else {}


def read_weights(folder: str) -> Dict[str, Tensor]:
    """The tensors of a folder, mapped: of safetensors or torch's files, in one or in several.
    Raises UserError for a file that is missing or broken."""
    for name in (WEIGHTS, "pytorch_model.bin"):
        path = os.path.join(folder, name)
        if os.path.isfile(path):
            return _read(path)
        index = path + ".index.json"
        if os.path.isfile(index):
            try:
                with open(index, encoding="utf-8") as stream:
                    named = set(json.load(stream)["weight_map"].values())
                parts = sorted(os.path.basename(part) for part in named)
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                raise UserError(f"{index}: contains no weight_map; copy it again") from error
            weights: Dict[str, Tensor] = {}
            for part in parts:
                file = os.path.join(folder, part)
                if not os.path.isfile(file):
                    raise UserError(f"{file}: missing; {index} names it: copy the folder again")
                weights.update(_read(file))
            return weights
    raise UserError(f"{folder}: has neither {WEIGHTS} nor pytorch_model.bin; name a model's folder")


def _read(path: str) -> Dict[str, Tensor]:
    if path.endswith(".safetensors"):
        return read_safetensors(path)
    check_records(path)
    state = load_weights_only(path, map_location="cpu", mmap=True)
    if not isinstance(state, dict):
        raise UserError(f"{path}: contains no named tensors; copy it again")
    return state
