"""Makes a sparse model from a dense one: every expert starts as the layer's feed-forward network.

Komatsuzaki et al., arXiv 2212.05055, section 3: the experts are copies, the router is new. With two
or more experts a token its weights sum to 1, so while nothing is dropped (--moe-dropless) the
sparse model computes what the dense one does. With top-1 a token's one weight is the gate's
probability, so there it does not, unless a layer has one expert.
"""

from __future__ import annotations

import math
import zlib
from copy import deepcopy
from dataclasses import replace
from typing import Any, Dict, Iterator, List, Union

import torch
from torch import Tensor

from ..branch.reading import BARE
from ..config_checks import OF_MOE_LAYERS
from ..errors import UserError
from ..models.language_model import MODEL_NAME
from ..moe.experts import TensorPerExpert
from ..router_flags import DEFAULTS
from ..shape import shape_of
from ..wording import count
from .archive import Lazy, dtype_of
from .source import Source, build_on_meta, set_order, with_settings


def sparse_settings(
    path: str,
    old: Dict[str, Any],
    vocabulary: int,
    layers: Dict[str, Any],
    experts: int,
    top_k: int,
) -> Dict[str, Any]:
    """The settings of the sparse model. Raises UserError for those that cannot be.

    Args:
        path: the checkpoint of the dense model, whose settings are `old`.
        layers: the settings that say which layers become sparse: moe_freq, moe_layers,
            moe_first_dense.
    """
    if shape_of(old).sparse:
        raise UserError(
            f"{path}: has {count(old['moe_expert_count'], 'expert')} already, but --upcycle needs "
            "a dense model: remove --upcycle, or name a dense checkpoint"
        )
    settings: Dict[str, Any] = {
        **old,
        **DEFAULTS,  # a dense twin may have had the flags of a sparse model
        **OF_MOE_LAYERS,
        "_name": MODEL_NAME,
        **layers,
        "moe_expert_count": experts,
        "moe_top_k": top_k,
        "moe_top1_expert": top_k == 1,
        "moe_dropless": True,
        "moe_capacity_factor": None,
        "moe_second_expert_policy": "all",
        "moe_expert_ffn_dim": None,
        "alternate_decoder_ffn_embed_dim": 0,
    }
    _keep_widths(path, old, settings)
    build_on_meta(settings, vocabulary)  # refuses settings that cannot be
    return settings


def upcycle(source: Source, settings: Dict[str, Any], noise: float, seed: int) -> Source:
    """
    Args:
        settings: of the sparse model.
        noise: standard deviation of what is added to each expert's matrices, as a multiple of that
            of the matrix.
    """
    experts = settings["moe_expert_count"]
    model = dict(source.model)
    for layer in shape_of(settings).sparse:
        prefix = f"decoder.layers.{layer}"
        for name in ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"):
            dense = model.pop(f"{prefix}.{name}")
            assert isinstance(dense, Tensor)  # a dense model has no other kind
            std = noise * float(dense.float().std()) if noise and dense.dim() == 2 else 0.0
            copies: List[Any] = [
                _expert(dense, std, seed, f"{prefix}.{name}.{expert}") for expert in range(experts)
            ]
            model[f"{prefix}.moe_layer.experts.{name}"] = TensorPerExpert(copies)
        dim = settings["decoder_embed_dim"]
        generator = _generator(seed, f"{prefix}.gate")
        gate = torch.empty(experts, dim).uniform_(-1, 1, generator=generator) / math.sqrt(dim)
        dtype = dtype_of(model[f"{prefix}.final_layer_norm.weight"])
        model[f"{prefix}.moe_layer.gate.wg.weight"] = gate.to(dtype)
    rest = with_settings({**source.rest, **deepcopy(BARE)}, settings)
    made = replace(source, rest=rest, settings=settings, model=model, optimizer=None)
    set_order(made)
    return made


def _keep_widths(path: str, dense: Dict[str, Any], settings: Dict[str, Any]) -> None:
    """Give the experts the width of the networks that they copy. UserError if these networks have
    several widths, because experts have one."""
    old, new = shape_of(dense), shape_of(settings)
    widths = {old.dense_widths[layer] for layer in new.sparse}
    others = {old.dense_widths[layer] for layer in range(new.layers) if layer not in new.sparse}
    if len(widths) > 1 or len(others) > 1:
        raise UserError(
            f"{path}: its layers {', '.join(map(str, old.picked))} differ in width from "
            "the rest, but experts have one width: make exactly those layers sparse "
            "(--moe-freq, --moe-layers, --moe-first-dense)"
        )
    settings["decoder_ffn_embed_dim"] = next(iter(others), new.ffn_dim)
    if widths != {settings["decoder_ffn_embed_dim"]}:
        settings["moe_expert_ffn_dim"] = next(iter(widths), None)


def _expert(dense: Tensor, std: float, seed: int, name: str) -> Union[Tensor, Lazy]:
    if not std:
        return dense

    def pieces() -> Iterator[Tensor]:
        noise = torch.randn(dense.shape, generator=_generator(seed, name))
        yield (dense.float() + std * noise).to(dense.dtype)

    return Lazy(tuple(dense.shape), dense.dtype, pieces)


def _generator(seed: int, name: str) -> torch.Generator:
    """Independent numbers for every tensor, whichever file it goes to. The CPU's generator uses
    only the lower 32 bits of a seed, so seed and name are hashed together."""
    return torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
