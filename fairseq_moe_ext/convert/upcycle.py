"""A sparse model out of a dense one: every expert starts as the layer's feed-forward network.

Komatsuzaki et al., arXiv 2212.05055, section 3: the experts are copies, the router is new. With two
or more experts a token its weights sum to 1, so while nothing is dropped (--moe-dropless) the
sparse model computes what the dense one does. With top-1 a token's one weight is the gate's
probability, so there it does not.
"""

from __future__ import annotations

import math
import zlib
from copy import deepcopy
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, Dict, Iterator

import torch
from torch import Tensor

from ..branch.reading import BARE
from ..config import is_moe_layer
from ..errors import UserError
from ..models.language_model import MODEL_NAME
from ..moe.experts import TensorPerExpert
from .archive import Lazy, dtype_of
from .source import Source, build_on_meta, set_order, with_settings


def upcycle(
    source: Source, moe_freq: int, experts: int, top_k: int, noise: float, seed: int
) -> Source:
    """
    Args:
        moe_freq: layer i, from 0, becomes sparse when (i + 1) % moe_freq is 0.
        noise: standard deviation of what is added to each expert's matrices, as a multiple of that
            of the matrix.
    """
    old = source.settings
    if source.experts:
        raise UserError(
            f"{source.path}: has {source.experts} experts already, and --upcycle takes a dense "
            "model: drop --upcycle, or name a dense checkpoint"
        )
    settings: Dict[str, Any] = {
        **old,
        "_name": MODEL_NAME,
        "moe_freq": moe_freq,
        "moe_expert_count": experts,
        "moe_top_k": top_k,
        "moe_top1_expert": top_k == 1,
        "moe_dropless": True,
        "moe_capacity_factor": None,
        "moe_second_expert_policy": "all",
        "alternate_decoder_ffn_embed_dim": 0,
    }
    if old["moe_freq"] and old["alternate_decoder_ffn_embed_dim"]:  # wider in some layers
        if moe_freq != old["moe_freq"]:
            raise UserError(
                f"--moe-freq {moe_freq}: {source.path} has wider layers, those of --moe-freq "
                f"{old['moe_freq']}, which are the ones to be made sparse: use that"
            )
        settings["moe_expert_ffn_dim"] = old["alternate_decoder_ffn_embed_dim"]
    build_on_meta(settings, source.types)  # refuses settings that cannot be
    cfg = SimpleNamespace(**settings)
    model = dict(source.model)
    for layer in range(settings["decoder_layers"]):
        if not is_moe_layer(cfg, layer):
            continue
        prefix = f"decoder.layers.{layer}"
        for name in ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"):
            dense = model.pop(f"{prefix}.{name}")
            spread = noise * float(dense.float().std()) if noise and dense.dim() == 2 else 0.0
            model[f"{prefix}.moe_layer.experts.{name}"] = TensorPerExpert(
                _expert(dense, spread, seed, f"{prefix}.{name}.{expert}")
                for expert in range(experts)
            )
        dim = settings["decoder_embed_dim"]
        generator = _generator(seed, f"{prefix}.gate")
        gate = torch.empty(experts, dim).uniform_(-1, 1, generator=generator) / math.sqrt(dim)
        dtype = dtype_of(model[f"{prefix}.final_layer_norm.weight"])
        model[f"{prefix}.moe_layer.gate.wg.weight"] = gate.to(dtype)
    rest = with_settings({**source.rest, **deepcopy(BARE)}, settings)
    made = replace(source, rest=rest, settings=settings, model=model, optimizer=None)
    set_order(made)
    return made


def _expert(dense: Tensor, spread: float, seed: int, name: str):
    if not spread:
        return dense

    def pieces() -> Iterator[Tensor]:
        noise = torch.randn(dense.shape, generator=_generator(seed, name))
        yield (dense.float() + spread * noise).to(dense.dtype)

    return Lazy(tuple(dense.shape), dense.dtype, pieces)


def _generator(seed: int, name: str) -> torch.Generator:
    """Numbers of its own for every tensor, whichever file it goes to. The CPU's generator takes no
    more than the lower 32 bits of a seed, so seed and name are hashed together."""
    return torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
