"""Our settings, names and places in the data as the branch has them."""

from enum import Enum
from typing import Any, Dict, Iterable, List

from ..balance_flags import has_bias
from ..config import defaults
from ..errors import UserError
from ..expert_parallel import is_expert
from ..router_flags import RouterFlags, top_k
from ..shape import Shape, shape_of
from ..wording import flag
from .files import State
from .settings import FIELDS, complete_cfg

# `cfg.model` of the branch's transformer_lm beyond what we have.
_BRANCH_DEFAULTS: Dict[str, Any] = {
    "_name": "transformer_lm_gpt",
    "relu_dropout": 0.0,
    "decoder_normalize_before": True,
    "adaptive_softmax_cutoff": None,
    "adaptive_softmax_dropout": 0.0,
    "adaptive_softmax_factor": 4.0,
    "character_embeddings": False,
    "character_filters": "[(1, 64), (2, 128), (3, 192), (4, 256), (5, 256), (6, 256), (7, 256)]",
    "character_embedding_dim": 4,
    "char_embedder_highway_layers": 2,
    "adaptive_input": False,
    "adaptive_input_factor": 4.0,
    "adaptive_input_cutoff": None,
    "tie_adaptive_weights": False,
    "tie_adaptive_proj": False,
    "offload_activations": False,
    "decoder_layerdrop": 0.0,
    "decoder_layers_to_keep": None,
    "quant_noise_pq": 0.0,
    "quant_noise_pq_block_size": 8,
    "quant_noise_scalar": 0.0,
    "min_params_to_wrap": 100000000,
    "dummy_a2a": False,
    "use_stable_embedding": False,
    "base_layers": 0,
    "base_sublayers": 1,
    "base_shuffle": 0,
    "add_bos_token": False,
    "tpu": False,
    "world_size": 1,
    "distributed_rank": 0,
    "batch_size_valid": None,
}
# Flags that the branch lacks: translated to its own, or without effect on what its files hold.
_TRANSLATED = {
    *("bf16", "compile", "moe_experts_on_disk"),
    *("moe_dense_twin", "moe_first_dense", "moe_layers"),
    *("moe_normalize_weights", "moe_router", "moe_top_k"),
}
# Flags that the branch lacks: refused (_check_experts) or reported (left_out).
_NOT_KEPT = {
    "moe_balance",
    "moe_balance_over",
    "moe_bias_update_rate",
    "moe_capacity_factor",
    "moe_dropless",
    "moe_expert_dropout",
    "moe_freeze",
    "moe_latent_dim",
    "moe_null_experts",
    "moe_pad_rule",
    "moe_routing_scope",
    "moe_shared_expert_ffn_dim",
    "moe_shared_experts",
    *RouterFlags.__dataclass_fields__,
} - {"_name", *_TRANSLATED}
_GRAD_SCALE, _OTHER_RULE = "moe_normalize_expert_grad", "sqrt_num_experts"  # there, by that name
# What the branch does not have, with the value that means it is off.
_OFF_IN_THE_BRANCH: Dict[str, Any] = {
    "moe_shared_experts": 0,
    "moe_null_experts": 0,
    "moe_latent_dim": None,
    "moe_score": "softmax",
    "moe_route_scale": 1,
    "moe_groups": 1,
}


def branch_settings(path: str, settings: Dict[str, Any]) -> Dict[str, Any]:
    """The branch's `cfg.model` from our model's settings. UserError for settings with which
    the branch would compute other numbers even at evaluation on one process without padding;
    `left_out` names the others."""
    shape = shape_of(settings)
    if shape.gated:
        raise _lacking(path, f"--activation-fn {settings['activation_fn']}", "no gated networks")
    if shape.sparse:
        _check_experts(path, settings)
    kept = {
        key: str(value) if isinstance(value, Enum) else value
        for key, value in settings.items()
        if key in FIELDS and key not in _NOT_KEPT | _TRANSLATED
    }
    dim = settings["decoder_embed_dim"]
    made = {**_BRANCH_DEFAULTS, "decoder_input_dim": dim, "decoder_output_dim": dim, **kept}
    made.update(_name="transformer_lm_gpt", moe_expert_ffn_dim=None, **_layers(path, shape))
    normalize = str(settings.get("moe_normalize_weights"))
    if normalize != "None":
        made["moe_normalize_gate_prob_before_dropping"] = normalize == "before"
    made["moe_top1_expert"] = top_k(settings) == 1
    made["moe_gating_use_fp32"] |= settings["moe_gating_fp32_product"]
    if str(settings[_GRAD_SCALE]) == _OTHER_RULE:
        made[_GRAD_SCALE] = "world_size"
    if settings["moe_dropless"]:
        made["moe_eval_capacity_token_fraction"] = 1.0
    if made["max_target_positions"] is None:
        made["max_target_positions"] = made["tokens_per_sample"]
    return made


def left_out(settings: Dict[str, Any]) -> List[str]:
    """Flags that the branch's settings cannot hold, with their values: of training, and of
    evaluation where batches are padded, in half precision, or on several processes."""
    same = {
        **defaults(),
        "moe_capacity_factor": float(top_k(settings)),
        "moe_expert_dropout": settings["activation_dropout"],
        "moe_pad_rule": "branch",
    }
    if settings["moe_dropless"]:
        same["moe_pad_rule"] = settings["moe_pad_rule"]  # padding takes no place
    effective = {**settings, "moe_pad_rule": settings["moe_pad_rule"] or "real"}
    names = _NOT_KEPT | ({_GRAD_SCALE} if str(settings[_GRAD_SCALE]) == _OTHER_RULE else set())
    return [
        flag(name) if effective[name] is True else f"{flag(name)} {effective[name]}"
        for name in sorted(names & effective.keys())
        if effective[name] is not None and str(effective[name]) != str(same[name])
    ]


def _check_experts(path: str, settings: Dict[str, Any]) -> None:
    """Raise UserError for experts that the branch does not have."""
    ffn_dim = settings["decoder_ffn_embed_dim"]
    if settings["moe_expert_ffn_dim"] not in (None, ffn_dim):
        raise UserError(
            f"{path}: its experts are {settings['moe_expert_ffn_dim']} wide "
            f"(--moe-expert-ffn-dim) and its dense layers {ffn_dim}; the branch uses one width "
            "for both, so its layout cannot hold this model: convert without --to branch"
        )
    if settings["moe_router"] != "topk" or top_k(settings) > 2:
        raise UserError(
            f"{path}: --moe-router {settings['moe_router']}, {top_k(settings)} experts per "
            "token; the branch has only top-1 and top-2 gates, so its layout cannot hold this "
            "model: convert without --to branch"
        )
    if has_bias(settings):
        raise _lacking(
            path, f"--moe-balance {settings['moe_balance']}", "no bias in a gate's choice"
        )
    for name, off in _OFF_IN_THE_BRANCH.items():
        if settings.get(name) not in (off, None):
            theirs = "no such experts" if "expert" in name or "latent" in name else "no such gates"
            raise _lacking(path, f"{flag(name)} {settings[name]}", theirs)
    factor = settings["moe_capacity_factor"]
    fraction = settings["moe_eval_capacity_token_fraction"]
    if fraction < 0 and not settings["moe_dropless"] and factor not in (None, top_k(settings)):
        raise _lacking(
            path,
            f"--moe-capacity-factor {factor} at evaluation, too "
            f"(--moe-eval-capacity-token-fraction {fraction})",
            "no factor",
        )
    if str(settings.get("moe_normalize_weights")) == "none" and top_k(settings) > 1:
        raise _lacking(path, "--moe-normalize-weights none", "weights of two experts that sum to 1")


def _layers(path: str, shape: Shape) -> Dict[str, int]:
    """The branch's settings of which layers are sparse, or, in a dense twin, of another width."""
    if not shape.picked:
        return {}
    freq = shape.picked[0] + 1
    if shape.picked != tuple(range(freq - 1, shape.layers, freq)):
        raise _lacking(
            path,
            f"MoE layers {', '.join(map(str, shape.picked))} (--moe-layers, --moe-first-dense)",
            "only every n-th layer sparse",
        )
    widths = {shape.dense_widths[layer] for layer in shape.picked}
    if len(widths) > 1:
        raise _lacking(
            path,
            f"dense layers of widths {', '.join(map(str, sorted(filter(None, widths))))} "
            "(--moe-dense-twin)",
            "one width for them",
        )
    return {"moe_freq": freq, "alternate_decoder_ffn_embed_dim": widths.pop() or 0}


def _lacking(path: str, ours: str, theirs: str) -> UserError:
    return UserError(
        f"{path}: has {ours}; the branch has {theirs}, so its layout cannot hold this model: "
        "convert without --to branch"
    )


def branch_rest(rest: State, model: Dict[str, Any], ranks: int) -> State:
    """Everything in a file except model and optimizer, with the settings as `cfg` and the position
    in the data as one of this many processes counts it."""
    if rest.get("cfg") is not None:
        cfg = dict(rest["cfg"])
    else:
        cfg = complete_cfg({}, {})
    task = {"tokens_per_sample": model["tokens_per_sample"], "data": "???"}
    task.update({k: v for k, v in (cfg.get("task") or {}).items() if k in _TASK_FIELDS})
    cfg["task"] = {**task, "_name": "language_modeling"}
    cfg["model"] = model
    cfg["distributed_training"] = {
        **(cfg.get("distributed_training") or {}),
        "distributed_world_size": ranks,
    }
    extra = dict(rest.get("extra_state") or {})
    position = extra.get("train_iterator")
    if position is not None:
        position = dict(position)
        shared_position = position.pop("all_processes", None)
        batches = (
            shared_position["batches"]
            if shared_position
            else position.get("iterations_in_epoch", 0)
        )
        position["iterations_in_epoch"] = batches // ranks
        extra["train_iterator"] = position
    return {**rest, "args": None, "cfg": cfg, "extra_state": extra}


_TASK_FIELDS = {
    "data",
    "sample_break_mode",
    "tokens_per_sample",
    "output_dictionary_size",
    "self_target",
    "future_target",
    "past_target",
    "add_bos_token",
    "max_target_positions",
    "shorten_method",
    "shorten_data_split_list",
    "pad_to_fixed_length",
    "pad_to_fixed_bsz",
    "seed",
    "batch_size",
    "batch_size_valid",
    "dataset_impl",
    "data_buffer_size",
    "tpu",
    "use_plasma_view",
    "plasma_path",
}


def branch_order(names: Iterable[str]) -> List[str]:
    """The keys of the shared file from those of our model: a layer's final norm comes last."""
    order: List[str] = []
    held: List[str] = []  # the final norm of the layer that is being listed
    for name in names:
        if is_expert(name):
            continue
        if ".final_layer_norm." in name:
            held.append(name)
            continue
        if held and not name.startswith(held[0].split("final_layer_norm")[0]):
            order, held = order + held, []
        order.append(name)
    return order + held
