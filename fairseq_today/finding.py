"""Finds the plugin, without --user-dir, for command lines and checkpoints that use it.

Put in force by the start-up hook alone, so only where the plugin is installed; nothing of the
plugin is imported unless a name below, or a setting of fairseq's `moe` branch, asks for it. Where
--user-dir is given, that is what counts.
"""

import argparse
import glob
import os
import re
import sys
import zipfile
from pathlib import Path
from typing import Any, Dict, Iterable, Iterator, List, Optional

from .registry import Condition, replace, wrap

# What the plugin registers with fairseq, by the flag that chooses it; a test holds them equal.
NAMES = {
    "arch": re.compile(r"moe_transformer_lm|(dense|moe)_lm_\w+"),  # misspelt, too
    "task": re.compile(r"mixture_language_modeling|multiple_choice"),
    "criterion": re.compile(r"moe_cross_entropy|multiple_choice"),
    "optimizer": re.compile(r"fused_adam"),
}
_CHECKPOINTS = ("path", "restore_file", "finetune_from_model", "continue_once", "lm_path")
_FOLDER = str(Path(os.path.abspath(__file__)).parent.parent / "fairseq_moe_ext")


def parse_args_and_arch(stock, parser, input_args=None, *args, **kwargs):
    """Without --user-dir, --arch moe_lm_tiny ends in a list of some 200 architectures.

    With it, stock imports the plugin from within this function; here it is there before, so that
    the plugin's own wrappers see the command line.
    """
    from fairseq import options

    given = list(sys.argv[1:] if input_args is None else input_args)
    folders = _values(given).get("user_dir")
    if is_imported() or not (
        line_names_it(given) or _names_ours(folders) or _lacks_checkpoint(parser, given)
    ):
        return stock(parser, input_args, *args, **kwargs)
    if folders is None:
        input_args = [*given, "--user-dir", _FOLDER]
    import_plugin(folders[-1] if folders and _names_ours(folders) else _FOLDER)
    return options.parse_args_and_arch(parser, input_args, *args, **kwargs)  # wrapped by it now


def import_user_module(stock, args):
    """Stock looks for --user-dir before it parses the rest, and ends in a traceback for one that is
    not there."""
    from fairseq import utils

    folder = getattr(args, "user_dir", None)
    if is_imported() or folder is None or os.path.exists(folder) or not line_names_it(sys.argv[1:]):
        return stock(args)
    import_plugin()
    return utils.import_user_module(args)


def load_checkpoint_to_cpu(stock, path, *args, **kwargs):
    """Without --user-dir, a checkpoint of ours ends in `KeyError: "'_name'"`."""
    from fairseq import checkpoint_utils

    if is_imported() or not checkpoint_names_it(path):
        return stock(path, *args, **kwargs)
    import_plugin()
    return checkpoint_utils.load_checkpoint_to_cpu(path, *args, **kwargs)


def load_model_ensemble_and_task(stock, filenames, *args, **kwargs):
    """Without --user-dir, the model of a checkpoint of ours is unknown when it is to be built."""
    from fairseq import checkpoint_utils

    if is_imported() or not any(map(checkpoint_names_it, filenames)):
        return stock(filenames, *args, **kwargs)
    import_plugin()
    return checkpoint_utils.load_model_ensemble_and_task(filenames, *args, **kwargs)


def hydra_init(stock, *args, **kwargs):
    """fairseq-hydra-train reads its settings first, and the plugin has a say in how."""
    from fairseq.dataclass import initialize

    if is_imported() or "fairseq_cli.hydra_train" not in sys.modules or not _configs_name_it():
        return stock(*args, **kwargs)
    import_plugin()
    return initialize.hydra_init(*args, **kwargs)


def add_defaults(stock, cfg):
    """Settings may name the plugin only when fairseq-hydra-train has put all of them together."""
    if not is_imported() and not cfg.common.user_dir and _settings_name_it(cfg):
        cfg.common.user_dir = _FOLDER  # for the processes that fairseq spawns, too
        import_plugin()
    stock(cfg)


def with_user_dir(omegaconf: Any) -> Any:
    """`${fairseq_moe_ext.user_dir:}` in a YAML is the plugin's folder.

    A plugin is known to fairseq by common.user_dir alone, also in the processes that it spawns,
    and a YAML cannot know where pip put it.
    """
    omegaconf.register_new_resolver("fairseq_moe_ext.user_dir", lambda: _FOLDER, replace=True)
    return omegaconf


NEW_RESOLVERS = Condition(
    "omegaconf >= 2.1", lambda: hasattr(sys.modules["omegaconf"].OmegaConf, "register_new_resolver")
)
USER_DIR = replace(
    "omegaconf:OmegaConf",
    with_user_dir,
    "fairseq/dataclass/configs.py:208@0.12.2",
    "a fairseq that finds plugins by their entry points",
    NEW_RESOLVERS,
)
_PLUGINS = "a fairseq that finds plugins by their entry points"

# What the hook puts in force beside what fairseq needs to run.
PATCHES = (
    wrap(
        "fairseq.options:parse_args_and_arch",
        parse_args_and_arch,
        "fairseq/options.py:88,129@0.12.2",
        _PLUGINS,
    ),
    wrap(
        "fairseq.utils:import_user_module",
        import_user_module,
        "fairseq/options.py:234@0.12.2, fairseq/utils.py:480@0.12.2",
        _PLUGINS,
    ),
    wrap(
        "fairseq.checkpoint_utils:load_checkpoint_to_cpu",
        load_checkpoint_to_cpu,
        "fairseq/checkpoint_utils.py:281@0.12.2",
        _PLUGINS,
    ),
    wrap(
        "fairseq.checkpoint_utils:load_model_ensemble_and_task",
        load_model_ensemble_and_task,
        "fairseq/checkpoint_utils.py:394@0.12.2",
        _PLUGINS,
    ),
    wrap(
        "fairseq.dataclass.initialize:hydra_init",
        hydra_init,
        "fairseq_cli/hydra_train.py:86@0.12.2",
        _PLUGINS,
    ),
    wrap(
        "fairseq.dataclass.initialize:add_defaults",
        add_defaults,
        "fairseq_cli/hydra_train.py:31@0.12.2",
        _PLUGINS,
    ),
    USER_DIR,
)


def is_imported() -> bool:
    return "fairseq_moe_ext" in sys.modules


def import_plugin(folder: Optional[str] = None) -> None:
    """Import the plugin as --user-dir would."""
    from fairseq import utils

    utils.import_user_module(argparse.Namespace(user_dir=folder or _FOLDER))


def _names_ours(folders: Optional[List[str]]) -> bool:
    """Whether a --user-dir is a folder of the plugin, this one or another copy."""
    if not folders:
        return False
    same_name = os.path.basename(os.path.abspath(folders[-1])) == os.path.basename(_FOLDER)
    return same_name and os.path.isfile(os.path.join(folders[-1], "__init__.py"))


def _lacks_checkpoint(parser: argparse.ArgumentParser, given: List[str]) -> bool:
    """Whether a command has no --path, which it needs, or a folder. Stock ends in a traceback, the
    plugin in a line."""
    if not any(action.dest == "path" for action in parser._actions) or {"-h", "--help"} & {*given}:
        return False
    paths = _values(given).get("path")
    return not paths or any(map(os.path.isdir, paths))


def _configs_name_it() -> bool:
    """Whether the command line of fairseq-hydra-train uses the plugin: by an override, or by a
    folder of configs."""
    words = sys.argv[1:]
    for word in words:
        key, _, value = word.lstrip("+").partition("=")
        flag = {"model": "arch"}.get(key.split(".")[0], key)
        if flag in NAMES and NAMES[flag].fullmatch(value):
            return True
        if key == "common.user_dir" and _names_ours([value]):
            return True
    values = _values(words)
    named = [("arch", name) for flag in ("config_name", "cn") for name in values.get(flag, ())]
    named += [(flag, value) for flag in NAMES for value in values.get(flag, ())]
    if any(NAMES[flag].fullmatch(name) for flag, name in named):
        return True
    folders = [*values.get("config_dir", ()), *values.get("cd", ())]
    return not all(map(os.path.isdir, folders)) or any(
        b"fairseq_moe_ext" in file.read_bytes()
        for folder in folders
        for file in sorted(Path(folder).glob("**/*.yaml"))
    )


def _values(args: Iterable[str]) -> Dict[str, List[str]]:
    """The values of each flag of a command line, as far as that can be told without a parser."""
    by_flag: Dict[str, List[str]] = {}
    flag: Optional[str] = None
    for word in args:
        if word.startswith("-"):
            flag, equals, value = word.lstrip("-").partition("=")
            flag = {"a": "arch"}.get(flag, flag.replace("-", "_"))
            by_flag.setdefault(flag, []).extend([value] if equals else [])
        elif flag is not None:
            by_flag[flag].append(word)
            flag = None
    return by_flag


def line_names_it(args: List[str]) -> bool:
    values = _values(args)
    if any(name.fullmatch(v) for flag, name in NAMES.items() for v in values.get(flag, ())):
        return True
    if any(flag.startswith("moe_") for flag in values):
        return True
    paths = [
        path for flag in _CHECKPOINTS for value in values.get(flag, ()) for path in value.split(":")
    ]
    return any(map(checkpoint_names_it, paths))


def checkpoint_names_it(path: str) -> bool:
    """Whether a checkpoint is of the plugin, or of the branch, which it reads; one that is not
    there, by another of its folder. Of a file that cannot be read, stock fairseq says why."""
    if not os.path.isfile(path):
        beside = glob.glob(os.path.join(glob.escape(os.path.dirname(path) or "."), "*.pt"))
        if any(os.path.isfile(file) and checkpoint_names_it(file) for file in sorted(beside)[:1]):
            return True
        return bool(glob.glob(glob.escape(re.sub(r"\.pt$", "", path)) + "-rank-*.pt"))
    if not zipfile.is_zipfile(path):  # to look would be to read it whole
        return bool(re.search(r"-(shared|rank-\d+)\.pt$", path))
    from .errors import UserError
    from .torch_today import load_weights_only

    try:
        state = load_weights_only(path, map_location="cpu", mmap=True)
    except UserError:
        return False
    if not isinstance(state, dict):
        return False
    args = state.get("args")
    return "experts" in state or _settings_name_it(
        state.get("cfg") or {} if args is None else _groups(dict(vars(args)))
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
            value = group.get("_name") if hasattr(group, "get") else None
            yield isinstance(value, str) and name.fullmatch(value) is not None
        model = cfg.get("model")
        yield hasattr(model, "get") and model.get("moe_freq") is not None

    return any(names())
