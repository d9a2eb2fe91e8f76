"""Dense models to and from Hugging Face's XGLM (transformers, models/xglm), which is fairseq's
dense language model: pre-norm, sinusoidal positions that start at 2, embeddings times sqrt(width).
Its first four tokens are fairseq's <s>, <pad>, </s>, <unk>, so rows need not be moved."""

from __future__ import annotations

from typing import Any, Dict, List

from ..branch.settings import ONE_PROCESS
from ..config import defaults
from ..errors import UserError
from ..models.language_model import MODEL_NAME
from ..shape import context_length, shape_of
from ..wording import count, flag
from .source import Source

_ACTIVATIONS = {"gelu": "gelu", "relu": "relu", "gelu_accurate": "gelu_new", "tanh": "tanh"}
SPECIAL = {"bos_token_id": 2, "pad_token_id": 1, "eos_token_id": 2}  # </s> begins a text


def lacking(source: Source) -> List[str]:
    """What a model has and XGLM has not, as flags."""
    s = source.settings
    lacks = []
    if source.experts:
        lacks.append(f"{count(source.experts, 'expert')} (--moe-expert-count)")
    elif len(set(shape_of(s).dense_widths)) > 1:
        lacks.append("layers of two widths (--alternate-decoder-ffn-embed-dim, --moe-dense-twin)")
    for name in (
        "decoder_learned_pos",
        "no_token_positional_embeddings",
        "layernorm_embedding",
        "no_decoder_final_norm",
    ):
        if s[name]:
            lacks.append(flag(name))
    if str(s["activation_fn"]) not in _ACTIVATIONS:
        lacks.append(f"--activation-fn {s['activation_fn']}")
    if source.head:
        lacks.append("a head that scores candidates (--choice-scoring head)")
    return lacks


def config_of(source: Source) -> Dict[str, Any]:
    """config.json of a model of which nothing is lacking."""
    s = source.settings
    return {
        "architectures": ["XGLMForCausalLM"],
        "model_type": "xglm",
        "vocab_size": source.vocabulary,
        "max_position_embeddings": context_length(s),
        "d_model": s["decoder_embed_dim"],
        "ffn_dim": shape_of(s).dense_widths[0],
        "num_layers": s["decoder_layers"],
        "attention_heads": s["decoder_attention_heads"],
        "activation_function": _ACTIVATIONS[str(s["activation_fn"])],
        "dropout": s["dropout"],
        "attention_dropout": s["attention_dropout"],
        "activation_dropout": s["activation_dropout"],
        "layerdrop": 0.0,
        "scale_embedding": not s["no_scale_embedding"],
        "tie_word_embeddings": bool(s["share_decoder_input_output_embed"]),
        "use_cache": True,
        **SPECIAL,
        "decoder_start_token_id": 2,
    }


def settings_of(path: str, config: Dict[str, Any]) -> Dict[str, Any]:
    "Settings of our model. Raises UserError for a config.json that is not one of ours."
    needed = (
        *("vocab_size", "max_position_embeddings", "d_model", "ffn_dim", "num_layers"),
        *("attention_heads", "activation_function"),
    )
    missing = [name for name in needed if name not in config]
    if missing:
        raise UserError(f"{path}: {', '.join(missing)} missing; copy the file again")
    for name in needed[:-1]:
        if not isinstance(config[name], int):
            raise UserError(
                f"{path}: {name} is {config[name]!r}, not a whole number; copy the file again"
            )
    wanted = {**SPECIAL, "add_cross_attention": False}
    if config.get("bos_token_id") == 0:  # as XGLM's own
        del wanted["bos_token_id"]
    if "fairseq" in config:  # of our own making; transformers' trainer sets it to the tokenizer's
        del wanted["eos_token_id"]
    for name, value in wanted.items():
        if config.get(name, value) != value:
            raise UserError(
                f"{path}: {name} is {config[name]}, but fairseq's models need {value}, "
                "so it cannot be converted; name another model"
            )
    names = {theirs: ours for ours, theirs in _ACTIVATIONS.items()}
    if str(config["activation_function"]) not in names:
        raise UserError(
            f"{path}: activation_function {config['activation_function']} is not one of "
            f"{', '.join(names)}; name another model"
        )
    dropouts = {"dropout": 0.1, "attention_dropout": 0.1, "activation_dropout": 0.0}
    dropouts.update({name: config[name] for name in dropouts if name in config})
    for name, share in dropouts.items():
        if not isinstance(share, (int, float)):
            raise UserError(f"{path}: {name} is {share!r}, not a number; copy the file again")
    return {
        **defaults(),
        **ONE_PROCESS,
        "_name": MODEL_NAME,
        **{name: float(share) for name, share in dropouts.items()},
        "activation_fn": names[config["activation_function"]],
        "decoder_embed_dim": config["d_model"],
        "decoder_ffn_embed_dim": config["ffn_dim"],
        "decoder_layers": config["num_layers"],
        "decoder_attention_heads": config["attention_heads"],
        "no_scale_embedding": not config.get("scale_embedding", True),
        "share_decoder_input_output_embed": bool(config.get("tie_word_embeddings", True)),
        "tokens_per_sample": config["max_position_embeddings"],
        "max_target_positions": config["max_position_embeddings"],
    }
