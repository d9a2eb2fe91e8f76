"""`fairseq-moe` behind fairseq_moe_command.py: each subcommand is one call into the package."""

import argparse
import contextlib
import importlib
import logging
import sys
from typing import Iterator, List, Optional

from fairseq import utils

import fairseq_moe_command
from fairseq_moe_command import LM_EVAL

from . import files
from .errors import OneLineParser, less_memory, status_of
from .wording import flag

_SIZES = ("batch_size", "max_tokens", "batch_tokens", "context")  # lower takes less memory


def main(argv: Optional[List[str]] = None) -> int:
    """Run the command line; returns the exit status (0, 1 for a user's mistake, 130 for Ctrl-C).

    The parser itself exits with 2 for flags that it does not know, with one line.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = parser_of(next((word for word in argv if not word.startswith("-")), None))
    # lm-eval parses the rest itself
    handed_on = argv[1:] if argv[:1] == [LM_EVAL] else None
    args, rest = parser.parse_known_args(argv if handed_on is None else argv[:1])
    if rest and not _takes_words(args, rest):
        parser.error("unrecognized arguments: " + " ".join(rest))
    if hasattr(sys.stdout, "reconfigure"):  # a file's name may have bytes that are no UTF-8
        sys.stdout.reconfigure(errors="backslashreplace")

    def work() -> None:
        files.check_named(vars(args), argv)
        if getattr(args, "user_dir", None) is not None:
            utils.import_user_module(args)
        with _without_news():
            args.run(args if handed_on is None else handed_on)

    sizes = [flag(name) for name in _SIZES if hasattr(args, name)]
    remedy = less_memory(sizes, on_disk=hasattr(args, "model_overrides"))
    return status_of(work, stopped="interrupted", remedy=remedy)


@contextlib.contextmanager
def _without_news() -> Iterator[None]:
    """Suppress what fairseq logs for every model it loads: all settings, on one line."""
    logger = logging.getLogger("fairseq")
    before = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(before)


def _takes_words(args: argparse.Namespace, rest: List[str]) -> bool:
    """Give words after flags, where argparse no longer expects any, to a command that takes any
    number of `words`. Returns whether it does."""
    flags = [word for word in rest if word.startswith("-") and " " not in word and word != "--"]
    if flags or not hasattr(args, "words"):
        return False
    args.words += [word for word in rest if word != "--"]
    return True


def parser_of(chosen: Optional[str]) -> argparse.ArgumentParser:
    parser, commands = fairseq_moe_command.parser(OneLineParser)
    if chosen in commands:  # some take seconds to import
        command = importlib.import_module(
            f"fairseq_moe_ext.{fairseq_moe_command.COMMANDS[chosen].module}"
        )
        if chosen != LM_EVAL:
            command.add_arguments(commands[chosen])
        commands[chosen].set_defaults(run=command.run)
    return parser


if __name__ == "__main__":
    sys.exit(main())
