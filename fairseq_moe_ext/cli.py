"""`fairseq-moe`: a thin front; every subcommand is one call into the package."""

import argparse
import importlib
import logging
import sys
from pathlib import Path
from typing import List, Optional

from fairseq_moe_ext import files
from fairseq_moe_ext.errors import OneLineParser, UserError


def main(argv: Optional[List[str]] = None) -> int:
    """Run the command line; returns the exit status (0, 1 for a user's mistake, 130 for Ctrl-C).

    The parser itself exits with 2 for flags that it does not know, with one line.
    """
    argv = sys.argv[1:] if argv is None else argv
    # fairseq says on import that a package of its speech tasks is missing
    logging.getLogger("fairseq.tasks.text_to_speech").setLevel(logging.WARNING)
    parser = _parser(next((word for word in argv if not word.startswith("-")), None))
    # lm-eval parses what follows by itself
    handed_on = argv[1:] if argv[:1] == [_LM_EVAL] else None
    args, rest = parser.parse_known_args(argv if handed_on is None else argv[:1])
    if rest and not _takes_words(args, rest):
        parser.error("unrecognized arguments: " + " ".join(rest))
    if hasattr(sys.stdout, "reconfigure"):  # a file's name may have bytes that are no UTF-8
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        files.check_named(vars(args), argv)
        args.run(args if handed_on is None else handed_on)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        if error.filename is None:
            raise
        print(f"error: {error.filename}: {files.reason(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def _takes_words(args: argparse.Namespace, rest: List[str]) -> bool:
    """Give words that stand behind flags, where argparse no longer expects any, to a command that
    takes any number of `words`; whether it does."""
    flags = [word for word in rest if word.startswith("-") and " " not in word and word != "--"]
    if flags or not hasattr(args, "words"):
        return False
    args.words += [word for word in rest if word != "--"]
    return True


# name -> what it does, and the module with its add_arguments(parser) and run(args)
_COMMANDS = {
    "prepare": ("turn your own text into data-bins", "prepare.command"),
    "evaluate": ("perplexity of a model on many test sets", "evaluation.evaluate_command"),
    "inspect": ("a page on what each expert of a model does", "inspection.command"),
    "generate": ("let a model go on with prompts", "generate.command"),
    "priming": ("zero- and few-shot accuracy on the paper's tasks", "priming.command"),
    "study": ("train and compare a dense and a sparse family of models", "study.command"),
    "report": ("a study's page and figures", "study.page"),
    "convert": ("checkpoints to other layouts and precisions", "convert.command"),
    "verify": ("whether the files of a checkpoint are undamaged", "convert.verify"),
    "cost": ("parameters, FLOPs and memory of a model", "evaluation.cost_table"),
    "forecast": ("the compute that sparsity should save, by scaling laws", "forecast.command"),
    "patches": ("which functions of fairseq are wrapped, and why", "patch_list"),
}


_LM_EVAL = "lm-eval"


def _parser(chosen: Optional[str]) -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="fairseq-moe", description="Mixture-of-experts language models for fairseq 0.12.2."
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    user_dir = commands.add_parser("user-dir", help="print the folder for fairseq's --user-dir")
    user_dir.set_defaults(run=lambda args: print(Path(__file__).resolve().parent))

    config_dir = commands.add_parser(
        "config-dir", help="print the folder for fairseq-hydra-train's --config-dir"
    )
    config_dir.set_defaults(run=lambda args: print(_config_dir()))

    lm_eval = commands.add_parser(_LM_EVAL, help="run EleutherAI's lm-eval on our models")
    if chosen == _LM_EVAL:
        command = importlib.import_module("fairseq_moe_ext.priming.lm_eval_command")
        lm_eval.set_defaults(run=command.run)

    for name, (words, module) in _COMMANDS.items():
        sub = commands.add_parser(name, help=words)
        if chosen == name:  # some take seconds to import
            command = importlib.import_module(f"fairseq_moe_ext.{module}")
            command.add_arguments(sub)
            sub.set_defaults(run=command.run)
    return parser


def _config_dir() -> Path:
    """hydra_conf/: inside the installed package, beside it in a checkout."""
    package = Path(__file__).resolve().parent
    for folder in (package / "hydra_conf", package.parent / "hydra_conf"):
        if folder.is_dir():
            return folder
    raise UserError(
        f"{package}: has no hydra_conf, inside or beside it: install the package again, or copy "
        "hydra_conf from its source"
    )


if __name__ == "__main__":
    sys.exit(main())
