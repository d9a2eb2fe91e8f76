"""The plugin for command lines and checkpoints that name something of it, without --user-dir.

Loaded with compat.py, whose patch `plugin_by_itself` puts it in force; it imports nothing of the
plugin unless a name below, or a setting of fairseq's `moe` branch, asks for it. Where --user-dir is
given, that is what counts.
"""

import argparse
import functools
import glob
import os
import re
import sys
import zipfile
from typing import Any, Dict, Iterable, Iterator, List, Optional

# What the plugin registers with fairseq, by the flag that chooses it; a test holds them equal.
NAMES = {
    "arch": re.compile(r"moe_transformer_lm|(dense|moe)_lm_(tiny|[\d_]+[mbt])"),
    "task": re.compile(r"mixture_language_modeling|multiple_choice"),
    "criterion": re.compile(r"moe_cross_entropy|multiple_choice"),
    "optimizer": re.compile(r"fused_adam"),
}
_CHECKPOINTS = ("path", "restore_file", "finetune_from_model", "continue_once", "lm_path")
_FOLDER = os.path.dirname(os.path.abspath(__file__))


def plugin_by_itself() -> None:
    """Import the plugin where a command line, a YAML or a checkpoint names something of it.

    Breaks: without --user-dir, a checkpoint of ours ends in `KeyError: "'_name'"`, and --arch
    moe_lm_tiny in a list of some 200 architectures.
    Where: fairseq/options.py:129, fairseq/checkpoint_utils.py:281 and :393, fairseq_cli/
    hydra_train.py:28.
    Ends: with a fairseq that finds plugins by their entry points.
    """
    from fairseq import checkpoint_utils, options
    from fairseq.dataclass import initialize

    stock_parse, stock_defaults = options.parse_args_and_arch, initialize.add_defaults

    @functools.wraps(stock_parse)
    def parse_args_and_arch(parser, input_args=None, *args, **kwargs):
        given = list(sys.argv[1:] if input_args is None else input_args)
        if not is_imported() and "user_dir" not in _values(given) and line_names_it(given):
            input_args = [*given, "--user-dir", _FOLDER]
        return stock_parse(parser, input_args, *args, **kwargs)

    options.parse_args_and_arch = parse_args_and_arch

    def finding(name: str) -> None:
        stock = getattr(checkpoint_utils, name)

        @functools.wraps(stock)
        def load(files, *args, **kwargs):
            paths = [files] if isinstance(files, str) else list(files)
            if is_imported() or not any(map(checkpoint_names_it, paths)):
                return stock(files, *args, **kwargs)
            import_plugin()
            return getattr(checkpoint_utils, name)(files, *args, **kwargs)  # wrapped by it now

        setattr(checkpoint_utils, name, load)

    finding("load_checkpoint_to_cpu")
    finding("load_model_ensemble_and_task")

    @functools.wraps(stock_defaults)
    def add_defaults(cfg):
        if not is_imported() and not cfg.common.user_dir and _settings_name_it(cfg):
            cfg.common.user_dir = _FOLDER  # for the processes that fairseq spawns, too
            import_plugin()
        stock_defaults(cfg)

    initialize.add_defaults = add_defaults


def is_imported() -> bool:
    return "fairseq_moe_ext" in sys.modules  # the package: its compat.py alone is no plugin


def import_plugin() -> None:
    """As --user-dir would."""
    from fairseq import utils

    utils.import_user_module(argparse.Namespace(user_dir=_FOLDER))


def _values(args: Iterable[str]) -> Dict[str, List[str]]:
    """The values of each flag of a command line, as far as that can be told without a parser."""
    found: Dict[str, List[str]] = {}
    flag: Optional[str] = None
    for word in args:
        if word.startswith("-"):
            flag, equals, value = word.lstrip("-").partition("=")
            flag = {"a": "arch"}.get(flag, flag.replace("-", "_"))
            found.setdefault(flag, []).extend([value] if equals else [])
        elif flag is not None:
            found[flag].append(word)
            flag = None
    return found


def line_names_it(args: List[str]) -> bool:
    values = _values(args)
    if any(name.fullmatch(v) for flag, name in NAMES.items() for v in values.get(flag, ())):
        return True
    paths = [
        path for flag in _CHECKPOINTS for value in values.get(flag, ()) for path in value.split(":")
    ]
    return any(map(checkpoint_names_it, paths))


def checkpoint_names_it(path: str) -> bool:
    """Whether a checkpoint is of the plugin, or of the branch, which it reads. Of a file that
    cannot be read, stock fairseq says why."""
    if not os.path.isfile(path):
        return bool(glob.glob(glob.escape(re.sub(r"\.pt$", "", path)) + "-rank-*.pt"))
    if not zipfile.is_zipfile(path):  # to look would be to read it whole
        return bool(re.search(r"-(shared|rank-\d+)\.pt$", path))
    from fairseq_moe_ext.compat import load_weights_only
    from fairseq_moe_ext.errors import UserError

    try:
        state = load_weights_only(path, map_location="cpu", mmap=True)
    except UserError:
        return False
    if not isinstance(state, dict):
        return False
    args = state.get("args")
    return "experts" in state or _settings_name_it(
        state.get("cfg") or {} if args is None else _groups(vars(args))
    )


def _groups(args: Dict[str, Any]) -> Dict[str, Any]:
    """Flat settings of old checkpoints as groups."""
    groups = {flag: {"_name": args.get(flag)} for flag in NAMES}
    return {**groups, "model": {**args, "_name": args.get("arch")}}


def _settings_name_it(cfg: Any) -> bool:
    """Whether a group of settings has a name of the plugin, or the model has the branch's."""

    if not hasattr(cfg, "get"):  # what is damaged, loading tells
        return False

    def names() -> Iterator[bool]:
        for flag, name in NAMES.items():
            group = cfg.get("model" if flag == "arch" else flag)
            value = getattr(group, "get", dict().get)("_name")
            yield isinstance(value, str) and name.fullmatch(value) is not None
        model = cfg.get("model")
        yield hasattr(model, "get") and model.get("moe_freq") is not None

    return any(names())
