"""Translates the branch's settings into those of our model."""

from argparse import Namespace
from dataclasses import fields
from typing import Any, Dict

from fairseq.criterions import CRITERION_DATACLASS_REGISTRY
from fairseq.dataclass.configs import FairseqConfig
from fairseq.models import ARCH_MODEL_REGISTRY
from fairseq.models.transformer_lm import TransformerLanguageModelConfig
from fairseq.tasks import TASK_DATACLASS_REGISTRY
from omegaconf import OmegaConf

from ..checkpoint.settings import check_fields, not_registered
from ..config import MoETransformerLMConfig
from ..errors import UserError
from ..models.architectures import name_of
from ..models.language_model import MODEL_NAME
from ..wording import short

FIELDS = {field.name: field for field in fields(MoETransformerLMConfig)}

# Settings of the branch, and of later states of its code, that change what the model computes and
# that this plugin lacks, with the value that turns them off.
_UNSUPPORTED: Dict[str, Any] = {
    "adaptive_input": False,
    "adaptive_softmax_cutoff": None,
    "character_embeddings": False,
    "decoder_normalize_before": True,
    "decoder_layers_to_keep": None,
    "quant_noise_scalar": 0,
    "use_stable_embedding": False,
    "base_layers": 0,
    "dummy_a2a": False,
    "scale_fc": False,
    "scale_attn": False,
    "scale_heads": False,
    "scale_resids": False,
    "scale_heads_inside": False,
    "decoder_learned_sinusoidal": False,
    "alibi": False,
    "moe_cmr": False,
    "moe_eval_capacity_max_seqlen": False,
    # there the output is multiplied by 1 - p at evaluation, here divided by it in training
    "moe_eom": 0,
    "moe_fom": 0,
}

# Reading a checkpoint does not depend on how it was trained; fairseq-train uses its own flags.
ONE_PROCESS: Dict[str, Any] = {
    "ddp_backend": "legacy_ddp",
    "fp16": False,
    "memory_efficient_fp16": False,
    "fp16_no_flatten_grads": False,
    "bf16": False,
    "batch_size": None,
}
_OWN_SETTINGS: Dict[str, Any] = {
    **ONE_PROCESS,
    "moe_expert_ffn_dim": None,  # the branch has the flag and never reads it
    "moe_capacity_factor": None,
    "moe_dropless": False,
    "moe_routing_scope": "process",
    "moe_experts_on_disk": False,
    "moe_pad_rule": "branch",
}


class OtherModel(UserError):
    """A checkpoint of a model that this plugin does not have."""


def translated_settings(path: str, saved: Dict[str, Any]) -> Dict[str, Any]:
    """Our model's settings from the branch's flat ones. OtherModel for settings that we do not
    have."""
    arch = name_of(saved)
    if saved.keys() & {"moe_router", "moe_dropless"}:  # our model's, which the branch lacks
        if arch not in ARCH_MODEL_REGISTRY:
            raise OtherModel(not_registered(path, "architecture", arch))
        raise OtherModel(
            f"{path}: has the architecture {short(repr(arch))} of the model "
            f"{ARCH_MODEL_REGISTRY[arch].__name__}; this command takes architectures of "
            "MoETransformerLanguageModel itself only"
        )
    if not arch.startswith("transformer_lm"):
        raise OtherModel(
            f"{path}: a model of the architecture {arch}; of the moe branch's architectures, "
            "only transformer_lm and its sizes can be read (transformer_lm_gpt, ..._gpt2_*, "
            "..._gpt3_*)"
        )
    unsupported = {name: off for name, off in _UNSUPPORTED.items() if saved.get(name, off) != off}
    unsupported = {name: saved[name] for name in unsupported if saved[name] or unsupported[name]}
    dim = saved.get("decoder_embed_dim")
    for name in ("decoder_input_dim", "decoder_output_dim"):
        if saved.get(name, dim) != dim:
            unsupported[name] = saved[name]
    if unsupported:
        listed = ", ".join(f"{name} {short(value)}" for name, value in unsupported.items())
        raise OtherModel(
            f"{path}: was trained with settings that this plugin lacks, so its results would "
            f"differ: {listed}"
        )
    stock = {field.name: field.default for field in fields(TransformerLanguageModelConfig)}
    settings: Dict[str, Any] = {}
    for name, field in FIELDS.items():
        value = saved.get(name, stock.get(name, field.default))  # old files lack newer settings
        if not str(value).startswith("${"):
            settings[name] = value
    settings.update(_OWN_SETTINGS)
    settings["activation_dropout"] = (
        saved.get("activation_dropout") or saved.get("relu_dropout") or 0.0
    )
    fraction = settings["moe_eval_capacity_token_fraction"]
    settings["moe_eval_capacity_token_fraction"] = min(fraction, 1.0) if fraction > 0 else -1.0
    # sqrt_num_experts is a later name of the same rule; any other is world_size in the branch
    rules = {"sqrt_world_size": "sqrt_world_size", "sqrt_num_experts": "sqrt_world_size"}
    rule = rules.get(str(settings["moe_normalize_expert_grad"]), "world_size")
    settings["moe_normalize_expert_grad"] = rule
    if settings["moe_top1_expert"]:
        settings["moe_batch_prioritized_routing"] = False  # of two experts only, in the branch
    if not settings["moe_freq"]:  # a dense model, whatever its command line said of experts
        settings["moe_freq"] = settings["moe_expert_count"] = 0
    settings.setdefault("tokens_per_sample", 1024)
    settings.setdefault("max_target_positions", None)
    check_fields(path, "model", settings, MoETransformerLMConfig)
    settings["_name"] = MODEL_NAME
    return settings


def complete_cfg(model: Dict[str, Any], saved: Dict[str, Any]) -> Dict[str, Any]:
    """fairseq's settings with the saved values, as far as this version knows them, and those of
    our model."""
    defaults = OmegaConf.to_container(OmegaConf.structured(FairseqConfig), enum_to_str=True)
    assert isinstance(defaults, dict)
    cfg: Dict[str, Any] = {str(group): settings for group, settings in defaults.items()}
    for group, default in cfg.items():
        value = saved.get(group)
        if isinstance(default, dict) and isinstance(value, dict):
            default.update({key: v for key, v in value.items() if key in default})
        elif group in saved:
            cfg[group] = value
    cfg["model"] = model
    cfg["task"] = _known(saved.get("task") or {}, TASK_DATACLASS_REGISTRY, "language_modeling")
    cfg["criterion"] = _known(
        saved.get("criterion") or {}, CRITERION_DATACLASS_REGISTRY, "moe_cross_entropy"
    )
    return cfg


def _known(saved: Dict[str, Any], registry: Dict[str, Any], default: str) -> Dict[str, Any]:
    """The saved settings that the dataclass of the saved name has, or of the default name if the
    saved one is not registered here."""
    name = saved.get("_name")
    name = name if name in registry else default
    allowed = {field.name for field in fields(registry[name])}
    return {**{key: value for key, value in saved.items() if key in allowed}, "_name": name}


def translated_args(path: str, saved: Namespace) -> Namespace:
    """The flat `args` with our model's settings in place of the branch's."""
    args = Namespace(**vars(saved))
    for name, value in translated_settings(path, vars(saved)).items():
        if name not in _OWN_SETTINGS or name.startswith("moe_"):  # the rest belongs to all groups
            setattr(args, name, value)
    args.arch = MODEL_NAME
    del args._name
    if args.task not in TASK_DATACLASS_REGISTRY:
        args.task = "language_modeling"
    if args.criterion not in CRITERION_DATACLASS_REGISTRY:
        args.criterion = "moe_cross_entropy"
    args.distributed_world_size = 1
    args.ddp_backend = "legacy_ddp"
    args.fp16 = args.memory_efficient_fp16 = False
    return args
