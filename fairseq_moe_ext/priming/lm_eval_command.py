"""`fairseq-moe lm-eval`: EleutherAI's lm-eval, with our models known to it."""

import argparse
import importlib.util
import os
import sys
from typing import List

import fairseq_moe_command

from ..errors import OneLineParser, UserError
from ..expert_parallel import process_rank
from ..wording import has_flag
from . import model

_OTHERS = ("ls", "validate", "-h", "--help")  # lm-eval's commands that load no model


def run(argv: List[str]) -> None:
    """Hand the command line to lm-eval. Raises UserError where it is not installed."""
    if argv in (["-h"], ["--help"]):
        print("examples:", *fairseq_moe_command.examples("lm-eval"), sep="\n  ", flush=True)
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(
            'lm-eval is not installed: run pip install "lm-eval>=0.4.13,<0.5" (from Python 3.10 on)'
        )
    from lm_eval.__main__ import cli_evaluate

    from . import harness

    if argv and argv[0] not in _OTHERS:
        words = argv[1:] if argv[0] == "run" else argv
        named = has_flag(words, "--model", "-M")
        argv = ["run", *([] if named else ["--model", harness.MODEL]), *words]
    sys.argv = ["lm-eval", *argv]
    # of lm-eval's own parsers
    argparse.ArgumentParser.error = OneLineParser.error  # type: ignore[method-assign, assignment]
    flags = argparse.ArgumentParser(add_help=False)
    flags.add_argument("--device")
    device = flags.parse_known_args(argv)[0].device
    with model.processes(device == "cpu", "--device cpu"):
        if process_rank():
            # each process has all results; lm-eval writes those of local rank 0
            # (lm_eval/evaluator.py:385@0.4.13), of which each machine has one
            os.environ["LOCAL_RANK"] = str(process_rank())
        cli_evaluate()
