"""Checks before a run starts, so that no mistake in a flag ends it after hours.

patches/commands.py calls `check_command_line` and `check_run` as soon as the flags of a fairseq
command are parsed. What only a training has is checked in training_flags.py, what needs the task or
the model in trainer_checks.py.
"""

import glob
import importlib.util
import os
import re
from typing import Any, Dict, Mapping

import torch
from fairseq.criterions import CRITERION_REGISTRY
from fairseq.data.plasma_utils import PYARROW_AVAILABLE
from fairseq.models import ARCH_MODEL_REGISTRY, MODEL_REGISTRY, FairseqLanguageModel
from fairseq.tasks import TASK_REGISTRY

from fairseq_today.finding import checkpoint_names_it

from . import data_bin, files, literals, ours, outputs, ranges, training_flags, wording
from .errors import UserError
from .training_flags import Spell

# Stock's for language models
_CRITERIONS = ("cross_entropy", "label_smoothed_cross_entropy")
_TASKS = ("language_modeling", "multilingual_language_modeling")


def check_command_line(args: Any) -> None:
    """Raise UserError for flags of a fairseq command that cannot work.

    A training run that uses nothing of ours is not checked.
    """
    given = vars(args)
    training = "max_update" in given
    if not training or ours.are_named(given, optimizer=True):
        check(given, wording.flag, training)


def check_run(cfg: Mapping[str, Any]) -> None:
    """Like check_command_line, for the settings of fairseq-hydra-train, by group."""
    names = {"arch" if g == "model" else g: ours.name_of(inner) for g, inner in cfg.items()}
    if not ours.are_named(names, optimizer=True):
        return
    groups: Dict[str, str] = {}
    given: Dict[str, Any] = {}
    # First those that the user sets. A group below may refer to settings of others and of those
    # that stand before it here.
    order = ("distributed_training", "task", "criterion", "optimizer", "lr_scheduler", "model")
    for group, name, value in sorted(
        ranges.flatten(cfg),
        key=lambda setting: order.index(setting[0]) if setting[0] in order else -1,
    ):
        ranges.check({name: value}, f"{group}.{{}}".format)
        given.setdefault(name, value)
        groups.setdefault(name, group)
    check(
        {**given, **names}, lambda name: f"{groups[name]}.{name}" if name in groups else name, True
    )


def check(given: Mapping[str, Any], spell: Spell, training: bool) -> None:
    """Raise UserError for invalid or conflicting settings, given by name."""
    if not training and "path" in given and not given["path"]:
        raise UserError("--path is not given: name the checkpoint")
    ranges.check(given, spell)
    # fairseq-interactive may read its --input from a pipe
    files.check_named({k: v for k, v in given.items() if k not in ("log_file", "input")})
    outputs.check_of_fairseq(given, spell)
    _check_names_of_one(given, spell)
    for name in ("quantization_config_path", "ema_seed_model", "lm_path"):
        if given.get(name) is not None:
            _check_is_there(given[name], f"{spell(name)} {given[name]}")
    for name in ("model_overrides", "optimizer_overrides"):
        _check_overrides(given.get(name), spell(name))
    _check_what_is_not_here(given, spell)
    if training and ours.are_named(given):
        _check_kinds(given, spell)
    evaluating = "context_window" in given or "beam" in given  # not fairseq-validate
    if training or evaluating:  # fairseq-validate has the task of the checkpoint
        _check_data(given, spell)
    batch = given.get("batch_size"), given.get("max_tokens")
    if (training or not evaluating) and batch == (None, None):
        raise UserError(
            f"{spell('batch_size')} and {spell('max_tokens')} are both not given: set one of them"
        )
    for check_one in training_flags.CHECKS if training else _ELSEWHERE:
        check_one(given, spell)


def _check_names_of_one(given: Mapping[str, Any], spell: Spell) -> None:
    """Stock saves to a folder whose name it later takes for several."""
    if given.get("save_dir"):
        data_bin.check_is_one(given["save_dir"], f"{spell('save_dir')} {given['save_dir']}")
    for name, spelled in (("path", f"{spell('path')} "), ("data", "")):
        value = given.get(name)
        if isinstance(value, str) and os.path.exists(value):  # under the whole name
            data_bin.check_is_one(value, spelled + value)


def _check_data(given: Mapping[str, Any], spell: Spell) -> None:
    """Stock reads the data only after it has built the model."""
    named = given.get("data")
    if given.get("task") != "language_modeling" or not named or "buffer_size" in given:
        return  # fairseq-interactive reads nothing but the dictionary
    data = data_bin.first_folder(str(named))
    corpora = data_bin.corpora_in(data)
    if corpora:
        raise UserError(
            f"{spell('task')} language_modeling reads one data-bin, but {data} holds the corpora "
            f"{', '.join(corpora)}: name one, {data}/{corpora[0]}, or use {spell('task')} "
            "mixture_language_modeling"
        )


def _check_overrides(value: Any, spelled: str) -> None:
    """fairseq runs the value as Python (fairseq_cli/eval_lm.py:255@0.12.2,
    fairseq_cli/validate.py:57@0.12.2) or ends in a traceback
    (fairseq/checkpoint_utils.py:198@0.12.2)."""
    if value is None or isinstance(value, Mapping):
        return
    ranges.check(literals.overrides(value, spelled), lambda name: f"{spelled} {name!r}:")


def _check_is_there(path: str, where: str) -> None:
    """fairseq opens it late, without naming the flag (fairseq/checkpoint_utils.py:422@0.12.2)."""
    if not glob.glob(f"{glob.escape(re.sub('[.]pt$', '', path))}-*.pt"):  # written in parts
        files.check(path, where)


_NOT_FOR_US = {
    "tpu": "these models run on GPUs and CPUs",
    "self_target": "these models predict the next token",
    "past_target": "these models predict the next token",
    "pipeline_model_parallel": "these models cannot be split so; see --ddp-backend fully_sharded",
}


def _check_what_is_not_here(given: Mapping[str, Any], spell: Spell) -> None:
    for name, reason in _NOT_FOR_US.items():
        if given.get(name):
            raise UserError(f"{spell(name)}: {reason}: remove it")
    if given.get("profile") and not torch.cuda.is_available():
        raise UserError(f"{spell('profile')} needs a GPU, and there is none here: remove it")
    if given.get("use_plasma_view") and not PYARROW_AVAILABLE:
        raise UserError(
            f"{spell('use_plasma_view')} needs pyarrow below 12, as 12 has no plasma: remove it"
        )
    # fairseq_cli/train.py:77@0.12.2 logs it and ends with status 0
    later = given.get("write_checkpoints_asynchronously")
    if later and importlib.util.find_spec("iopath") is None:
        raise UserError(
            f"{spell('write_checkpoints_asynchronously')} needs the package iopath: pip install "
            "iopath, or remove it"
        )


def _check_window(given: Mapping[str, Any], spell: Spell) -> None:
    window, block = given.get("context_window"), given.get("tokens_per_sample")
    if window and block and window >= block:
        raise UserError(
            f"{spell('context_window')} {window} leaves no token to score in "
            f"{spell('tokens_per_sample')} {block}: use less than that"
        )


def _check_shards(given: Mapping[str, Any], spell: Spell) -> None:
    shard, shards = given.get("shard_id"), given.get("num_shards")
    if shard is not None and shards is not None and shard >= shards:
        raise UserError(
            f"{spell('shard_id')} {shard} is not one of {spell('num_shards')} {shards}: use 0 to "
            f"{shards - 1}"
        )


def _check_steps(given: Mapping[str, Any], spell: Spell) -> None:
    if given.get("max_valid_steps") is not None:
        raise UserError(
            f"{spell('max_valid_steps')} {given['max_valid_steps']} applies only to validation "
            "in training, and this command reads the whole subset: remove it"
        )
    if given.get("bf16") and "context_window" not in given and "beam" not in given:
        raise UserError(f"{spell('bf16')}: fairseq-validate computes in float32: remove it")


def _check_hypotheses(given: Mapping[str, Any], spell: Spell) -> None:
    best, beam = given.get("nbest"), given.get("beam")
    if best is None or beam is None:
        return
    if best > beam:
        raise UserError(
            f"{spell('nbest')} {best} is more than {spell('beam')} {beam}: lower it, or raise "
            f"{spell('beam')}"
        )
    if given.get("sampling") and best != beam:
        raise UserError(
            f"{spell('sampling')} draws {spell('beam')} {beam} hypotheses, but {spell('nbest')} "
            f"is {best}: set both to the same number"
        )
    groups, least, most = (given.get(k) for k in ("diverse_beam_groups", "min_len", "max_len_b"))
    if groups is not None and groups > 0 and beam % groups:
        raise UserError(
            f"{spell('diverse_beam_groups')} {groups} does not divide {spell('beam')} {beam}: "
            "change one of them"
        )
    fixed = not given.get("max_len_a")
    if fixed and least is not None and most is not None and least > most:
        raise UserError(
            f"{spell('min_len')} {least} is more than {spell('max_len_b')} {most}: lower it, or "
            f"raise {spell('max_len_b')}"
        )
    for name in ("sampling_topk", "sampling_topp"):
        if (given.get(name) or -1) > 0 and not given.get("sampling"):
            raise UserError(f"{spell(name)} {given[name]} needs {spell('sampling')}: add it")
    if given.get("score_reference") and "buffer_size" in given:  # fairseq-interactive
        raise UserError(f"{spell('score_reference')} works only in fairseq-generate: remove it")
    kind = TASK_REGISTRY.get(given.get("task"))
    others = kind is not None and given["task"] not in _TASKS and not ours.is_ours(kind)
    for name, reason in _NOT_IN_GENERATION.items() if not others else ():
        if given.get(name):
            raise UserError(f"{spell(name)}: {reason}: remove it")


_NOT_IN_GENERATION = {
    "constraints": "language models are not searched with constraints",
    "print_alignment": "language models have no source to align with",
    "match_source_len": "language models have no source",
    "replace_unk": "language models have no source to copy from",
    "print_step": "language models write token by token",
    "retain_iter_history": "language models write token by token",
    "decoding_format": "language models write token by token",
    "iter_decode_with_external_reranker": "language models write token by token",
    "iter_decode_force_max_iter": "language models write token by token",
    "eos_token": "language models end at </s>",
}


def _check_kinds(given: Mapping[str, Any], spell: Spell) -> None:
    """Other criterions and models of stock's end in an exception at the first batch, other tasks
    when a model is built."""
    name = given.get("task")
    kind = TASK_REGISTRY.get(name)
    if ours.is_stocks(kind) and name not in _TASKS:
        default = name == "translation"
        what = "is not given, or is translation (fairseq's default)" if default else name
        raise UserError(
            f"{spell('task')} {what}, which is not for these models: use {spell('task')} "
            "mixture_language_modeling or language_modeling"
        )
    name = given.get("criterion")
    kind = CRITERION_REGISTRY.get(name)
    adaptive = name == "adaptive_loss" and given.get("adaptive_softmax_cutoff")  # stock's models
    known = name in _CRITERIONS or adaptive
    if ours.is_stocks(kind) and not known:
        raise UserError(
            f"{spell('criterion')} {name} is not for these models: use moe_cross_entropy, or "
            f"{', '.join(_CRITERIONS)}"
        )
    name = given.get("arch")
    kind = ARCH_MODEL_REGISTRY.get(name) or MODEL_REGISTRY.get(name)
    if kind is not None and not issubclass(kind, FairseqLanguageModel):
        raise UserError(
            f"{spell('arch')} {name} is not a language model: use one that is, such as moe_lm_tiny"
        )


def _check_search(given: Mapping[str, Any], spell: Spell) -> None:
    """Settings of a search that fairseq refuses by an assertion, or that have no effect without
    another flag (fairseq/tasks/fairseq_task.py:412@0.12.2,
    fairseq_cli/interactive.py:125@0.12.2)."""
    if given.get("beam") is None:
        return
    groups = given.get("diverse_beam_groups") or -1
    kinds = groups > 0, (given.get("diversity_rate") or -1) > 0, bool(given.get("sampling"))
    if sum(kinds) > 1:
        raise UserError(
            f"{spell('sampling')}, {spell('diverse_beam_groups')} and {spell('diversity_rate')} "
            "are different kinds of search: use only one of them"
        )
    strength = given.get("diverse_beam_strength")
    if groups < 1 and strength not in (None, 0.5):
        raise UserError(
            f"{spell('diverse_beam_strength')} {strength} needs {spell('diverse_beam_groups')}: "
            "add it"
        )
    batch, buffer = given.get("batch_size"), given.get("buffer_size")
    if batch and buffer is not None and batch > max(buffer, 1):
        raise UserError(
            f"{spell('batch_size')} {batch} is more than {spell('buffer_size')} {buffer}, the "
            f"lines that are read at a time: lower it, or raise {spell('buffer_size')}"
        )


def _check_pieces(given: Mapping[str, Any], spell: Spell) -> None:
    """fairseq-eval-lm knows one kind, other commands more (fairseq_cli/eval_lm.py:98@0.12.2,
    fairseq/data/data_utils.py:368@0.12.2)."""
    kind = given.get("post_process")
    kinds = ["subword_nmt"]
    if "beam" in given:
        kinds += ["sentencepiece", "wordpiece", "letter", "silence", "_EOW", "none"]
    if kind is not None and kind not in [*kinds, "@@ ", "@@"][: None if "beam" in given else 2]:
        raise UserError(f"--remove-bpe {kind}: unknown; use {', '.join(kinds)}, or leave it out")


def _check_task(given: Mapping[str, Any], spell: Spell) -> None:
    """Stock's default for fairseq-generate and -interactive is to translate."""
    paths = str(given.get("path")).split(os.pathsep)
    if given.get("task") == "translation" and any(map(checkpoint_names_it, paths)):
        raise UserError(
            f"{spell('task')} is not given, or is translation (fairseq's default), but "
            f"{given['path']} is a language model: use {spell('task')} language_modeling"
        )


_ELSEWHERE = (
    _check_window,
    _check_shards,
    _check_hypotheses,
    _check_pieces,
    _check_task,
    _check_search,
    _check_steps,
)
