"""How a command of fairseq starts and ends: its flags, its processes, its one line on a mistake."""

import argparse
import atexit
import datetime
import functools
import importlib.util
import inspect
import logging
import os
import sys
import time
from typing import Any, Callable

from fairseq_today.errors import UserError, first_line
from fairseq_today.registry import View

from .. import command_checks, expert_parallel
from ..checkpoint import folder_lock
from ..config_checks import refuse_both_of_layers
from ..errors import OneLineParser, flag_mistake, read_negative_numbers
from ..models.architectures import ARCHITECTURES
from ..wording import has_flag
from . import flag_owners
from .hydra import names_its_processes
from .messages import mistake_to_print

logger = logging.getLogger(__name__)


def parse_args_and_arch(stock, parser, input_args=None, *args, **kwargs):
    """argparse reports an unknown or invalid flag in two to forty lines; this takes one.

    fairseq-validate has no default task whose flags it could read
    (fairseq/options.py:79,155@0.12.2); its task is the checkpoint's.
    """
    words = list(sys.argv[1:] if input_args is None else input_args)

    def remedy(parser: argparse.ArgumentParser, flag: str) -> str:
        return flag_owners.remedy(parser, flag, words)

    def refuse(message: str) -> None:
        parser.exit(2, f"error: {flag_mistake(parser, message, words, remedy)}\n")

    parser.error = refuse
    read_negative_numbers(parser)
    if parser.get_default("task") is None and any(a.dest == "task" for a in parser._actions):
        parser.set_defaults(task="language_modeling")
    try:
        parsed = stock(parser, input_args, *args, **kwargs)
        flags = parsed[0] if isinstance(parsed, tuple) else parsed
        if has_flag(words, "--moe-freq"):
            refuse_both_of_layers(flags.moe_freq, getattr(flags, "moe_layers", None))
        command_checks.check_command_line(flags)
        return parsed
    except UserError as error:
        mistake = str(error)
    except RuntimeError as error:  # fairseq/options.py:153@0.12.2
        if str(error):
            raise
        mistake = f"--arch is not given: use one of {', '.join(ARCHITECTURES)}"
    parser.exit(1, f"error: {mistake}\n")


def with_one_line_parsers(argparse_: Any) -> Any:
    """argparse reports an unknown or invalid flag in many lines, also to fairseq-preprocess, which
    uses its parser itself; this takes one."""
    return View(argparse_, ArgumentParser=OneLineParser)


def eval_str_list(stock, x, x_type=float):
    """Stock makes [1] of --update-freq 1.5."""
    try:
        values = stock(x, x_type)
    except (SyntaxError, TypeError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"{x!r} is not a number or list of numbers") from error
    if x_type is int and values is not None and values != stock(x, float):
        raise argparse.ArgumentTypeError(f"{x!r} is not a whole number or list of whole numbers")
    return values


def import_user_module(stock, args):
    """For a --user-dir that is not a package stock raises ModuleNotFoundError without the folder,
    for one that is not there FileNotFoundError without the flag; a package that misses another or
    cannot be parsed is a traceback."""
    folder = getattr(args, "user_dir", None) or ""
    try:
        return stock(args)
    except FileNotFoundError as error:
        if error.args != (os.path.abspath(folder),):
            raise
        raise UserError(
            f"--user-dir {folder}: no such folder; `fairseq-moe user-dir` prints the plugin's"
        ) from None
    except (ModuleNotFoundError, ValueError) as error:
        name = os.path.basename(os.path.abspath(folder))
        if getattr(error, "name", "") in ("", name) and not (os.path.isdir(folder) and name):
            raise UserError(
                f"--user-dir {folder}: not the folder of a Python package; name one with "
                "__init__.py"
            ) from error
        if isinstance(error, ValueError):
            raise
        raise _not_imported(folder, error) from error
    except (ImportError, SyntaxError) as error:
        raise _not_imported(folder, error) from error


def _not_imported(folder: str, error: Exception) -> UserError:
    if isinstance(error, ModuleNotFoundError):
        remedy = "install that package, or correct its name there"
    else:
        remedy = "correct the package; LOGLEVEL=DEBUG shows where"
    return UserError(f"--user-dir {folder} cannot be imported: {error}; {remedy}")


def call_main(stock, cfg, main, **kwargs):
    """A user's mistake ends a command with one line on stderr and status 1, without a traceback.
    Settings are checked before any work, and the lock on the training's folder is released at the
    end.

    `mistake_to_print` says what a mistake is; LOGLEVEL=DEBUG keeps the traceback.
    fairseq-hydra-train catches exceptions but lets SystemExit through.
    """
    try:
        if _is_hydras(main):
            _check_run(cfg)
        use_one_process_on_a_cpu(
            cfg, names_its_processes if _is_hydras(main) else _flags_name_processes
        )
        check_processes(cfg)
        if _innermost(main).__module__ == "fairseq_cli.train":
            check_optimizer(cfg, _is_hydras(main))
        return stock(cfg, functools.partial(run_process, main), **kwargs)
    except (Exception, KeyboardInterrupt) as error:  # the latter by --heartbeat-timeout, too
        mistake = mistake_to_print(error)
        if mistake is None:
            raise
    print(f"error: {mistake}", file=sys.stderr, flush=True)
    _end_at_once_where_others_wait()
    raise SystemExit(1)


def run_process(main: Callable, cfg: Any, **kwargs: Any) -> Any:
    """What one process runs. A spawned one reports its exception as text, of which
    `mistake_to_print` knows only UserError, so a mistake of any other class becomes one."""
    try:
        return folder_lock.then_release(main, cfg, **kwargs)
    except Exception as error:
        mistake = mistake_to_print(error)
        if mistake is None or type(error) is UserError:
            raise
        raise UserError(mistake) from error


def train_main(stock, cfg):
    """If the plugin is imported inside call_main, the folder is unlocked here."""
    return folder_lock.then_release(stock, cfg)


def excepthook(stock, kind, error, trace):
    """fairseq-generate and fairseq-preprocess do not use call_main."""
    ours = os.path.basename(sys.argv[0] if sys.argv else "").startswith("fairseq-")
    mistake = mistake_to_print(error) if ours else None
    if mistake is None:
        stock(kind, error, trace)
    else:
        print(f"error: {mistake}", file=sys.stderr, flush=True)


def _is_hydras(main: Callable) -> bool:
    """Whether it is what fairseq-hydra-train calls, as it is or wrapped."""
    hydras = getattr(sys.modules.get("fairseq_cli.hydra_train"), "pre_main", None)
    return hydras is not None and _innermost(main) is inspect.unwrap(hydras)


def _innermost(main: Callable) -> Callable:
    while isinstance(main, functools.partial) and main.args:
        main = main.args[0]
    return inspect.unwrap(main)


def check_optimizer(cfg, hydra: bool) -> None:
    """Raise UserError for a training without one: stock has no default, and says so after it has
    built the model."""
    if cfg["optimizer"] is None:
        raise UserError(
            "optimizer is not set: add optimizer=adam or optimizer=fused_adam"
            if hydra
            else "--optimizer is not given: use adam, fused_adam, or another that --help lists"
        )


def _check_run(cfg) -> None:
    """Raise UserError for invalid settings of fairseq-hydra-train."""
    from fairseq import utils

    utils.import_user_module(cfg.common)  # as fairseq_cli/train.py:48@0.12.2 does first
    command_checks.check_run(cfg)


def _end_at_once_where_others_wait() -> None:
    """End one of many processes with status 1. Python's own exit stops Gloo's threads during an
    exchange, and they abort (terminate called without an active exception, 134)."""
    import torch.distributed

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        logging.shutdown()
        sys.stdout.flush()
        os._exit(1)


# ---- Processes


def use_one_process_on_a_cpu(cfg, given: Callable[[], bool]) -> None:
    """fairseq-train and fairseq-hydra-train start a process for each GPU that they see, also under
    --cpu, if the number is not given (fairseq/dataclass/configs.py:257@0.12.2). NCCL refuses them,
    as all use the first GPU; over Gloo the batch would be as many times as large."""
    import torch

    settings = cfg.distributed_training
    gpus = torch.cuda.device_count()
    if (
        cfg.common.cpu
        and settings.distributed_world_size == gpus > 1
        and settings.distributed_init_method is None
        and _spawns(settings)
        and not given()
    ):
        logger.info(f"--cpu: one process, not one for each of {gpus} GPUs")
        settings.distributed_world_size = 1


def _flags_name_processes() -> bool:
    return has_flag(sys.argv[1:], "--distributed-world-size")


def _is_launched() -> bool:
    """Whether torchrun has started this process, as fairseq/distributed/utils.py:56@0.12.2 asks."""
    return {"MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK"} <= set(os.environ)


def _spawns(settings) -> bool:
    """Whether fairseq itself starts the processes, if there are several."""
    return not (_is_launched() or settings.distributed_no_spawn or settings.distributed_port > 0)


def check_processes(cfg) -> None:
    """Raise UserError for a number of processes that fairseq cannot start.

    fairseq starts one process per GPU (fairseq/distributed/utils.py:142,344@0.12.2). On CPU,
    `--distributed-world-size 2` with an init method starts none and exits with status 0; without
    one, it raises AssertionError. NCCL needs GPUs, a process that uses GPUs one of its own.
    """
    import torch

    gpus = torch.cuda.device_count()
    settings = cfg.distributed_training
    launched, spawns = _is_launched(), _spawns(settings)
    size = int(os.environ["WORLD_SIZE"]) if launched else settings.distributed_world_size
    _check_sharding(cfg, gpus, size == 1 and (launched or spawns))
    if cfg.common.tpu:
        return
    one_machine = settings.distributed_init_method is None
    if spawns and size > 1 and (gpus == 0 or (one_machine and size > gpus)):
        raise UserError(
            f"--distributed-world-size {size}: fairseq starts one process per GPU, but there are "
            f"{gpus} here; on a CPU, start them with `torchrun --nproc_per_node {size} $(which "
            "fairseq-train) ... --distributed-backend gloo`"
        )
    on_cpu = gpus == 0 or cfg.common.cpu
    joins = size > 1 or (launched and gpus == 0)  # NCCL of one process wants a GPU, and is not used
    if joins and on_cpu and settings.distributed_backend == "nccl":
        raise UserError(
            "--distributed-backend nccl: needs GPUs, but "
            f"{'there are none here' if gpus == 0 else '--cpu uses none'}; add "
            "--distributed-backend gloo"
        )
    if not on_cpu and not spawns:
        source, number = "--device-id", settings.device_id
        if not launched and one_machine and settings.distributed_port > 0:
            source, number = "SLURM_LOCALID", os.environ.get("SLURM_LOCALID", 0)
        elif os.environ.get("LOCAL_RANK") == str(number):  # the flag's default
            source = "LOCAL_RANK"
        expert_parallel.check_own_gpu(source, number, "--cpu and --distributed-backend gloo")


def _check_sharding(cfg, gpus: int, alone: bool) -> None:
    """fairscale's FSDP on one process needs a module that fairscale 0.4.13 no longer has, and uses
    GPUs if there are any (fairscale/nn/data_parallel/fully_sharded_data_parallel.py:113@0.4.13)."""
    settings = cfg.distributed_training
    sharded = settings.ddp_backend == "fully_sharded"
    wants_fairscale = {
        "--ddp-backend fully_sharded": sharded,
        "--zero-sharding os": settings.zero_sharding == "os",
    }
    for flag, wanted in wants_fairscale.items():
        if wanted and importlib.util.find_spec("fairscale") is None:
            raise UserError(
                f"{flag}: needs fairscale, which is not installed: pip install fairscale"
            )
    trains = cfg.common_eval.path is None
    if sharded and trains and alone:
        raise UserError(
            "--ddp-backend fully_sharded: one process has nothing to shard; use legacy_ddp, "
            "which resumes from the same checkpoints"
        )
    if sharded and trains and cfg.common.cpu and gpus > 0:
        raise UserError(
            "--cpu with --ddp-backend fully_sharded: fairscale uses every GPU that it sees; "
            "hide them (CUDA_VISIBLE_DEVICES=), or use legacy_ddp"
        )


def distributed_init(stock, cfg):
    """A --distributed-port in use, or a missing process, ends in a traceback. For a process that no
    longer answers the others wait half an hour.

    That is torch's timeout on Gloo (a stopped machine, a broken network). --heartbeat-timeout
    interrupts Python, which does not end the others. Here it is also the timeout of every
    collective: of the first group of processes, of fairseq's own and of the experts'.
    """
    import torch.distributed
    from fairseq.distributed import utils

    settings = getattr(cfg, "distributed_training", cfg)
    seconds = getattr(settings, "heartbeat_timeout", -1)
    limit = datetime.timedelta(seconds=seconds) if seconds > 0 else None
    start: Callable[..., None] = torch.distributed.init_process_group
    if limit is not None:
        start = functools.partial(start, timeout=limit)
    utils.dist = View(torch.distributed, init_process_group=start)
    try:
        rank = stock(cfg)
        atexit.register(_part)
        if limit is not None:  # a group has a limit of its own, torch's unless it is given one
            utils.get_global_group._global_group = torch.distributed.new_group(timeout=limit)
        expert_parallel.limit_groups(limit)
        return rank
    except RuntimeError as error:
        where = settings.distributed_init_method
        if where == "env://":
            where = "{MASTER_ADDR}:{MASTER_PORT}".format(**os.environ)
        if "EADDRINUSE" in str(error) or "address already in use" in str(error):
            raise UserError(
                f"{where}: the port is in use; choose another with --distributed-port (torchrun: "
                "--master_port), or end the run that uses it"
            ) from error
        if isinstance(error, torch.distributed.DistError):
            raise UserError(
                f"{where}: not all {settings.distributed_world_size} processes connected "
                f"({first_line(error)}); start them all, with the same address, port and world "
                "size"
            ) from error
        raise
    finally:
        utils.dist = torch.distributed


def gathering_any_size(utils: Any) -> Any:
    """On GPUs fairseq-validate gathers the logs of all batches of a process in
    --all-gather-list-size bytes, into which three of our models' fit; it ends where they do not,
    after all its work. Here torch's own function does it."""
    from fairseq_today import on_cpu

    def all_gather_list(data, group=None, max_size=0):
        return on_cpu.gather(None, data, group)

    return View(utils, all_gather_list=all_gather_list)


def _part() -> None:
    """Let Gloo's threads finish before Python ends. One that lets go of a tensor after that asks
    for the interpreter's lock, and aborts a process that is done."""
    from torch import distributed

    if distributed.is_initialized() and distributed.get_backend() == "gloo":
        distributed.destroy_process_group()
        time.sleep(0.1)  # a model under DDP may keep them
