"""fairseq-hydra-train: one-line messages for mistakes in a command line or a YAML."""

import logging
import os
import re
import sys
from typing import Any, Callable, Dict, Optional, Set

from fairseq_today.errors import UserError

from ..errors import OneLineParser
from ..wording import did_you_mean
from .messages import debugging, in_one_line, mistake_to_print


def hydra_init(stock, cfg_name="config"):
    """A misspelt --config-name is not an error in stock: it stores its defaults under the given
    name and runs them.

    Hydra reports mistakes in a job's settings over several lines or with a traceback. This reports
    them in one line.
    """
    from hydra._internal import utils as hydra_utils

    command: Any = sys.modules.get("fairseq_cli.hydra_train")  # else another program with Hydra
    if command is not None:
        _check_config_name(cfg_name)
        report, job = hydra_utils.run_and_report, command._hydra_main
        hydra_utils.run_and_report = lambda func: report(lambda: _exit_on_mistake(func))
        command._hydra_main = lambda cfg: _exit_on_mistake(lambda: job(cfg))
    stock(cfg_name)


def names_its_processes() -> bool:
    """Whether the settings of this run name a number of processes, in a YAML or on the command
    line, rather than leave it to the default: if so, another default leaves it as it is."""
    from hydra import compose
    from hydra.core.config_store import ConfigStore
    from hydra.core.hydra_config import HydraConfig

    if not HydraConfig.initialized():  # the settings are another program's own
        return True
    run = HydraConfig.get()
    name = str(run.job.config_name)
    schema = ConfigStore.instance().repo[f"{name.removesuffix('.yaml')}.yaml"].node
    default = schema.distributed_training.distributed_world_size
    schema.distributed_training.distributed_world_size = -1
    try:
        folders = [word for word in run.overrides.hydra if word.startswith("hydra.searchpath=")]
        again = compose(name, overrides=[*folders, *run.overrides.task])
    finally:
        schema.distributed_training.distributed_world_size = default
    return again.distributed_training.distributed_world_size != -1


def merge_with_parent(stock, dc, cfg, *args, **kwargs):
    """Stock reports a wrong key or value without its group and the valid keys."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    group = cfg._key() if OmegaConf.is_config(cfg) else None
    if (
        group == "task"
        and "data" in cfg
        and (OmegaConf.is_missing(cfg, "data") or cfg.data in (None, ""))
    ):
        raise UserError("task.data is not set: add task.data=FOLDER, with your data-bin")
    try:
        return stock(dc, cfg, *args, **kwargs)
    except OmegaConfBaseException as error:
        if not isinstance(group, str):
            raise
        raise UserError(f"{group}.{_describe_setting(error)}") from error


_reported: Set[str] = set()
_CHOICES = ("task", "model", "criterion", "optimizer", "lr_scheduler")


def get_args_parser(stock):
    """Hydra's parser reports a mistake over many lines, and fairseq parses twice. This reports it
    once, in one line."""
    parser = stock()

    def error(message):
        if message in _reported:
            parser.exit(2)
        _reported.add(message)
        # fairseq_cli/hydra_train.py:83@0.12.2 warns of the exit
        logging.getLogger("fairseq_cli.hydra_train").setLevel(logging.ERROR)
        flag = re.search(r"unrecognized arguments: --([\w-]+)", message)
        if flag:
            key = {"arch": "model"}.get(flag[1], flag[1].replace("-", "_"))
            example = f"{key}=..." if key in _CHOICES else f"GROUP.{key}=..."
            message += f"; settings have no dashes here: write {example}"
        OneLineParser.error(parser, message)

    parser.error = error
    return parser


def _check_config_name(name: str) -> None:
    """Raise UserError if neither --config-dir nor fairseq's own folder has NAME.yaml."""
    import fairseq
    from hydra._internal.utils import get_args

    args = get_args()
    if args.config_path is not None:
        return
    folders = [os.path.join(os.path.dirname(fairseq.__file__), "config")]
    if args.config_dir is not None:
        if not os.path.isdir(args.config_dir):
            raise UserError(
                f"--config-dir {args.config_dir}: no such folder; `fairseq-moe config-dir` "
                "prints ours"
            )
        folders.insert(0, args.config_dir)
        _check_a_config_is_named(args)
    name = name[:-5] if name.endswith(".yaml") else name
    if not any(os.path.isfile(os.path.join(folder, name + ".yaml")) for folder in folders):
        there = sorted(file[:-5] for file in os.listdir(folders[0]) if file.endswith(".yaml"))
        known = ", ".join(there) + did_you_mean(name, there)
        if args.config_dir is None:
            known += '; for ours add --config-dir "$(fairseq-moe config-dir)"'
        raise UserError(f"--config-name {name}: not in {folders[0]}; there are {known}")


def _check_a_config_is_named(args: Any) -> None:
    """Raise UserError for a folder without a name, unless the overrides choose a model."""
    there = sorted(file[:-5] for file in os.listdir(args.config_dir) if file.endswith(".yaml"))
    chosen = any(word.lstrip("+").startswith("model") for word in args.overrides)
    if args.config_name is None and "config" not in there and not chosen:
        raise UserError(
            f"--config-name is not given: {args.config_dir} has {', '.join(there) or 'no *.yaml'}"
        )


def _exit_on_mistake(task: Callable):
    """Run a Hydra job or sweep; end on a mistake in its settings with one line and status 1."""
    try:
        return task()
    except Exception as error:
        mistake = _unusable_folder(error) or mistake_to_print(error)
        mistake = mistake or hydra_mistake_to_print(error)
        if mistake is None:
            raise
    print(f"error: {mistake}", file=sys.stderr, flush=True)
    raise SystemExit(1)


def _overrides() -> Dict[str, str]:
    """The settings of the command line, as written."""
    return dict(word.lstrip("+").split("=", 1) for word in sys.argv[1:] if "=" in word)


def _unusable_folder(error: Exception) -> Optional[str]:
    """A line about a folder for the run or sweep that Hydra cannot create, else None."""
    for key in ("hydra.run.dir", "hydra.sweep.dir"):
        folder = _overrides().get(key)
        if folder and isinstance(error, OSError) and str(error.filename or "").startswith(folder):
            return f"{key}={folder}: cannot be created ({error.strerror}); name another folder"
    return None


def hydra_mistake_to_print(error: BaseException) -> Optional[str]:
    """The mistake in the command line or the YAMLs; None for other errors, or with LOGLEVEL=DEBUG.

    Other errors of omegaconf are programming errors, which need the traceback.
    """
    from hydra.errors import HydraException
    from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException

    if debugging():
        return None
    if isinstance(error, InterpolationResolutionError):
        return _describe_setting(error)
    if isinstance(error, ValueError) and "override must be" in str(error):
        return in_one_line(str(error))
    if not isinstance(error, HydraException):
        return None
    if isinstance(error.__cause__, OmegaConfBaseException):
        return _describe_setting(error.__cause__)
    return in_one_line(str(error))


def _describe_setting(error) -> str:
    """omegaconf's complaint about a key or its value: the key, and the valid ones."""
    from omegaconf.errors import ConfigAttributeError, ConfigKeyError

    if isinstance(error, (ConfigAttributeError, ConfigKeyError)) and error.parent_node is not None:
        there = [str(key) for key in error.parent_node if key != "_name"]
        remedy = did_you_mean(error.key, there) or f"; there are {', '.join(sorted(there))}"
        return f"{error.full_key}: no such setting{remedy}"
    said = in_one_line(str(error.msg or error))
    if "is not a ListConfig" in said:
        value = _overrides().get(str(error.full_key), "...")
        said = f"{said.rstrip('.')}: write {error.full_key}=[{value}]"
    return f"{error.full_key}: {said}"
