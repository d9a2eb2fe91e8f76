"""Converts models to and from Hugging Face transformers: as XGLM if XGLM can represent them
(xglm.py), otherwise with a class whose code is in the folder (modeling_fairseq_moe.py)."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Dict, List, NamedTuple, Optional

from ..balance_flags import has_loss
from ..branch.settings import ONE_PROCESS, complete_cfg
from ..checkpoint.settings import check_fields
from ..config import MoETransformerLMConfig, defaults
from ..errors import UserError
from ..fingerprint import check_folder
from ..models.language_model import MODEL_NAME
from ..router_flags import gate_settings
from ..shape import context_length, has_gate, shape_of
from ..tokenizer_files import NAMES, files_of
from ..wording import flag
from . import model_card, xglm
from .archive import dtype_of
from .experts_fairseq_moe import ROUTERS
from .hf_folder import (
    CONFIG,
    SHARD,
    bytes_job,
    is_weights,
    our_names,
    read_config,
    read_weights,
    text_job,
    their_names,
    weight_jobs,
)
from .hf_tokenizer import tokenizer_files
from .source import Source, fresh_rest, set_order
from .targets import Job

MODEL_TYPE = "fairseq_moe"
CODE = ("modeling_fairseq_moe.py", "experts_fairseq_moe.py")  # the first has the classes
GENERATION = "generation_config.json"
CARD = "README.md"
# a folder's files besides the weights
FILES = (CONFIG, *CODE, GENERATION, CARD, "tokenizer.json", "tokenizer_config.json", *NAMES)

# What fine-tuning may change in config.json, and the Trainer does, without changing the model.
_FREE = {"auto_map", "use_cache", *xglm.SPECIAL}
_FREE |= {"dropout", "attention_dropout", "activation_dropout", "expert_dropout"}
_DEFAULTS = defaults()
# Settings that config.json has under other names, and those that change nothing outside fairseq's
# training, or nothing if no token is dropped.
_TRANSLATED = {
    "activation_dropout", "activation_fn", "alternate_decoder_ffn_embed_dim", "attention_dropout",
    "decoder_attention_heads", "decoder_embed_dim", "decoder_ffn_embed_dim", "decoder_layers",
    "decoder_learned_pos", "dropout", "layernorm_embedding", "max_target_positions",
    "moe_balance", "moe_dense_twin", "moe_expert_count", "moe_expert_dropout",
    "moe_expert_ffn_dim", "moe_null_experts",
    "moe_first_dense", "moe_freq", "moe_gating_fp32_product", "moe_gating_use_fp32", "moe_groups",
    "moe_latent_dim", "moe_layers", "moe_normalize_gate_prob_before_dropping",
    "moe_normalize_weights", "moe_route_scale", "moe_router", "moe_score",
    "moe_shared_expert_ffn_dim", "moe_shared_experts", "moe_top1_expert", "moe_top_groups",
    "moe_top_k", "no_decoder_final_norm", "no_scale_embedding", "no_token_positional_embeddings",
    "share_decoder_input_output_embed", "tokens_per_sample",
}  # fmt: skip
ELSEWHERE = {
    "checkpoint_activations", "compile", "min_params_to_wrap", "moe_balance_over",
    "moe_batch_prioritized_routing", "moe_bias_update_rate",
    "moe_capacity_factor", "moe_dropless", "moe_eom", "moe_eval_capacity_token_fraction",
    "moe_experts_on_disk", "moe_fom", "moe_freeze", "moe_input_jitter",
    "moe_normalize_expert_grad", "moe_pad_rule", "moe_routing_scope",
    "moe_second_expert_policy", "moe_threshold_decay", "record_a2a_perf_stats",
    "use_moe_pad_mask", *ONE_PROCESS,
}  # fmt: skip


_NORMALIZING = ("random", "sinkhorn", "topk")


class Extras(NamedTuple):
    """What is written to the folder with the model."""

    tokenizer: Optional[Path] = None  # folder with dict.txt and the rest
    license: str = "unknown"
    evaluation: Optional[Dict[str, Any]] = None  # as `fairseq-moe evaluate --json` wrote it
    shard: float = SHARD  # bytes of a file of weights


def hf_jobs(source: Source, folder: str, extras: Extras, only_xglm: bool = False) -> List[Job]:
    """The files of a folder, config.json the last.

    Args:
        only_xglm: raise UserError for what XGLM lacks, instead of using another class.
    """
    s = source.settings
    tied, learned = s["share_decoder_input_output_embed"], s["decoder_learned_pos"]
    config = config_of(source, only_xglm)
    ours = config["model_type"] == MODEL_TYPE
    dtype = str(dtype_of(source.model["decoder.embed_tokens.weight"]))[6:]
    whole = {**config, "torch_dtype": dtype, "fairseq": _provenance(source)}
    if not only_xglm and not ours:
        whole.update(xglm.SPECIAL)
    jobs = weight_jobs(their_names(source.model, tied, learned), folder, extras.shard)
    if ours:
        for name in CODE:
            code = Path(__file__).with_name(name).read_text(encoding="utf-8")
            jobs.append(text_job(folder, name, code))
    # Generation continues past </s>, which is a newline.
    generation = {"bos_token_id": 2, "pad_token_id": 1}
    jobs.append(text_job(folder, GENERATION, json.dumps(generation, indent=2) + "\n"))
    for name, text in tokenizer_of(source, extras).items():
        jobs.append(text_job(folder, name, text))
    if extras.tokenizer is not None:
        for name, file in files_of(extras.tokenizer).items():
            jobs.append(bytes_job(folder, name, file.read_bytes()))  # the checkpoint has digests
    card = model_card.write(source, config["model_type"], extras.license, extras.evaluation)
    jobs.append(text_job(folder, CARD, card))
    jobs.append(text_job(folder, CONFIG, json.dumps(whole, indent=2, default=str) + "\n"))
    return jobs


def config_of(source: Source, only_xglm: bool) -> Dict[str, Any]:
    """config.json, without what says where the model came from. Raises UserError for a model that
    cannot be represented."""
    lacking = xglm.lacking(source)
    if lacking and only_xglm:
        raise UserError(
            f"--to xglm: {source.path} has features that XGLM lacks: {', '.join(lacking)}: "
            "use --to hf"
        )
    return _config(source) if lacking else xglm.config_of(source)


def tokenizer_of(source: Source, extras: Extras) -> Dict[str, str]:
    """The files of transformers' tokenizer, by name. Raises UserError for files of another model,
    or that it cannot express."""
    if extras.tokenizer is None:
        return {}
    longest = context_length(source.settings)
    made = tokenizer_files(extras.tokenizer, source.vocabulary, longest)
    check_folder(source.path, source.rest, extras.tokenizer)
    return made


def files_there(folder: str) -> List[str]:
    """The files in a folder that an earlier conversion wrote. In a folder that also has checkpoints
    or data, the tokenizer's files are left out, because those need them, too. Raises UserError for
    such files in a folder without a converted model."""
    names = sorted(os.listdir(folder))
    found = [name for name in names if name in FILES or is_weights(name)]
    if found and CONFIG not in found and not any(map(is_weights, found)):
        raise UserError(
            f"{folder}: contains {found[0]}, but no model for transformers: choose another folder"
        )
    shared = any(name.endswith((".pt", ".idx")) for name in names)
    return [name for name in found if not (shared and name in NAMES)]


def open_hf(folder: str, only_xglm: bool = False) -> Source:
    """A transformers folder as a checkpoint. Raises UserError for a model of another kind, or for
    inconsistent files."""
    config = read_config(folder)
    path = os.path.join(folder, CONFIG)
    kind = config.get("model_type") if config else "nowhere"
    if kind == MODEL_TYPE and not only_xglm:
        settings = _settings(path, config)
    elif kind == "xglm":
        settings = xglm.settings_of(path, config)
    else:
        known = "xglm" if only_xglm else f"xglm or {MODEL_TYPE}"
        raise UserError(
            f"{path}: model_type is {kind}, not {known}; name the folder of such a model"
        )
    model = our_names(folder, read_weights(folder), settings, config["vocab_size"])
    task = {
        "_name": "language_modeling",
        "data": None,  # a key, so that from_pretrained can set it
        "tokens_per_sample": settings["tokens_per_sample"],
    }
    cfg = complete_cfg(settings, {"task": task, "criterion": {"_name": "cross_entropy"}})
    saved = config.get("fairseq")
    state = saved.get("task_state") if isinstance(saved, dict) else None
    rest = {**fresh_rest(cfg), "task_state": state if isinstance(state, dict) else {}}
    source = Source(folder, rest, settings, model, [], None)
    set_order(source)
    return source


def _config(source: Source) -> Dict[str, Any]:
    """config.json of our own class. Raises UserError for a setting that its code does not know."""
    s = source.settings
    unknown = [
        f"{flag(name)} {s[name]}"
        for name, default in _DEFAULTS.items()
        if name in s
        and str(s[name]) != str(default)
        and not str(s[name]).startswith("${")
        and name not in _TRANSLATED | ELSEWHERE
    ]
    if source.experts and s["moe_router"] not in ROUTERS:
        unknown.append(f"--moe-router {s['moe_router']}")
    if source.head:
        unknown.append("a head that scores candidates (--choice-scoring head)")
    if unknown:
        raise UserError(
            f"--to hf: {source.path} uses features that the code for transformers lacks: "
            f"{', '.join(unknown)}: run it with fairseq"
        )
    return _translated(s, source.vocabulary, _balance_weight(source))


def _translated(s: Dict[str, Any], vocabulary: int, balance_weight: float) -> Dict[str, Any]:
    shape = shape_of(s)
    widths = [shape.expert_width if width is None else width for width in shape.dense_widths]
    positions = "learned" if s["decoder_learned_pos"] else "sinusoidal"
    expert_dropout = s["moe_expert_dropout"]
    config = {
        "model_type": MODEL_TYPE,
        "architectures": ["FairseqMoeForCausalLM"],
        "auto_map": {
            "AutoConfig": f"{CODE[0][:-3]}.FairseqMoeConfig",
            "AutoModelForCausalLM": f"{CODE[0][:-3]}.FairseqMoeForCausalLM",
        },
        "vocab_size": vocabulary,
        "hidden_size": shape.dim,
        "intermediate_sizes": widths,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": s["decoder_attention_heads"],
        "max_position_embeddings": context_length(s),
        "activation": str(s["activation_fn"]),
        "dropout": s["dropout"],
        "attention_dropout": s["attention_dropout"],
        "activation_dropout": s["activation_dropout"],
        "expert_dropout": s["activation_dropout"] if expert_dropout is None else expert_dropout,
        "scale_embedding": not s["no_scale_embedding"],
        "positions": "none" if s["no_token_positional_embeddings"] else positions,
        "embedding_norm": bool(s["layernorm_embedding"]),
        "final_norm": not s["no_decoder_final_norm"],
        "tie_word_embeddings": shape.tied,
        "use_cache": True,
        "sparse_layers": list(shape.sparse),
        **xglm.SPECIAL,
    }
    if shape.sparse:
        gate = gate_settings(SimpleNamespace(**s))
        config = {
            **config,
            "num_experts": shape.experts,
            "num_experts_per_tok": gate.top_k,
            "shared_size": shape.shared_ffn_dim,
            "latent_size": shape.latent_dim,
            "router": s["moe_router"],
            "router_settings": {
                "score": gate.score,
                "normalize": gate.normalize if s["moe_router"] in _NORMALIZING else None,
                "scale": gate.route_scale,
                "groups": gate.groups,
                "top_groups": gate.top_groups,
                "float32": gate.use_fp32,
                "float32_product": gate.fp32_product,
                "null_experts": gate.null_experts,
                "bias": gate.bias_update_rate > 0,
            },
            "router_aux_loss_coef": balance_weight,
        }
    return config


def _settings(path: str, config: Dict[str, Any]) -> Dict[str, Any]:
    """Settings of our model. Raises UserError where config.json contradicts itself."""
    saved = config.get("fairseq")
    saved = saved.get("model") if isinstance(saved, dict) else None
    if not isinstance(saved, dict):
        raise UserError(
            f"{path}: has no settings under fairseq.model; use a folder that `fairseq-moe "
            "convert` wrote"
        )
    given = {name: value for name, value in saved.items() if name in _DEFAULTS}
    settings = {**_DEFAULTS, **given, **ONE_PROCESS, "_name": MODEL_NAME}
    check_fields(path, "fairseq.model", settings, MoETransformerLMConfig)
    vocabulary = config.get("vocab_size")
    if not isinstance(vocabulary, int):
        raise UserError(
            f"{path}: vocab_size is {vocabulary!r}, not a whole number; copy the file again"
        )
    expected = _translated(settings, vocabulary, config.get("router_aux_loss_coef", 0.0))
    for name, value in expected.items():
        if name in config and name not in _FREE and config[name] != value:
            raise UserError(
                f"{path}: {name} is {config[name]!r}, but the settings under fairseq.model give "
                f"{value!r}: copy the file that convert wrote"
            )
    return settings


def left_out(source: Source) -> List[str]:
    """Parts of the loss in training that training with transformers lacks."""
    if not source.experts:
        return []
    criterion = _criterion(source)
    parts = []
    if _neg_log(criterion) and _has_loss(source):
        parts.append("the balancing loss (--moe-gate-loss-transform neg_log)")
    if criterion.get("moe_z_loss_wt") and has_gate(source.settings["moe_router"]):
        parts.append(f"the z-loss (--moe-z-loss-wt {criterion['moe_z_loss_wt']})")
    if source.settings["moe_router"] == "relu":
        parts.append("the L1 loss of --moe-router relu")
    return parts


def _balance_weight(source: Source) -> float:
    """The factor on the mean of the sparse layers' balancing losses in training."""
    criterion = _criterion(source)
    weight = criterion.get("moe_gate_loss_wt")
    balances = source.experts and _has_loss(source)
    if not (isinstance(weight, (int, float)) and balances) or _neg_log(criterion):
        return 0.0
    summed = str(criterion.get("moe_gate_loss_combine_method")) == "sum"
    return float(weight) * (len(shape_of(source.settings).sparse) if summed else 1)


def _has_loss(source: Source) -> bool:
    """Whether a balancing loss trains anything."""
    return has_gate(source.settings["moe_router"]) and has_loss(source.settings)


def _criterion(source: Source) -> Dict[str, Any]:
    """Settings of the criterion in training; of an old checkpoint, all its settings."""
    criterion = (source.rest.get("cfg") or {}).get("criterion")
    args = source.rest.get("args")
    return {
        **(criterion if isinstance(criterion, dict) else {}),
        **(vars(args) if args is not None else {}),
    }


def _neg_log(criterion: Dict[str, Any]) -> bool:
    return str(criterion.get("moe_gate_loss_transform")) == "neg_log"


def _provenance(source: Source) -> Dict[str, Any]:
    """What the conversion back needs besides weights: settings, and the state of the task."""
    s = source.settings
    model = {
        name: value
        for name, value in s.items()
        if name in _DEFAULTS and name not in ONE_PROCESS and str(value) != str(_DEFAULTS[name])
    }
    task_state = {
        name: value
        for name, value in (source.rest.get("task_state") or {}).items()
        if isinstance(value, (str, int, float, list, dict, type(None)))
    }
    return {"model": model, "task_state": task_state}
