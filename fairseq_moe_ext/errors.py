"""The exception for a user's mistake, and the one line for a flag that argparse refuses."""

import argparse
import difflib
import re
from typing import List, NoReturn

from fairseq_today.errors import UserError as UserError  # one class, with the plugin or without


class NotFinite(UserError):
    """NaN or infinity where a number should be."""


class Unfit(UserError):
    """An intact optimizer state that cannot be converted."""

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(reason, remedy)  # as they are, so that it can be pickled
        self.reason = reason

    def __str__(self) -> str:
        return " ".join("; ".join(self.args).splitlines())


# The remedy if a trained model yields NaN or infinity.
DAMAGED = "the checkpoint is damaged or its training diverged; use an earlier one"


def not_finite(layer: int, training: bool = True) -> NotFinite:
    """What to raise when the router of a layer, counted from 0, yields NaN or infinity."""
    remedy = "training diverged; lower --lr, lengthen --warmup-updates, or use "
    remedy += "--moe-gating-use-fp32 or --moe-z-loss-wt 0.001, from the last good checkpoint"
    if not training:
        remedy = DAMAGED
    return NotFinite(f"the router of layer {layer} (from 0) yields NaN or infinity: {remedy}")


def require_positive(args: argparse.Namespace, *flags: str) -> None:
    """Raise UserError for a flag that is below 1; those that are None pass."""
    for name in flags:
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value}: use 1 or more")


class OneLineParser(argparse.ArgumentParser):
    """An ArgumentParser that reports a mistake in one line instead of two to forty. So do the
    parsers of its subcommands."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {flag_mistake(self, message)}\n")


def flag_mistake(parser: argparse.ArgumentParser, message: str) -> str:
    """argparse's complaint about a command line as one line, with the flag or choice probably
    meant."""
    message = " ".join(message.split())
    wanted, there = None, []
    refused = re.search(r"invalid choice: '?(.+?)'? \(choose from (.+)\)", message)
    unknown = re.search(r"unrecognized arguments: (?:(?!--)\S+ )*(--[\w-]+)", message)
    if message.endswith("required: COMMAND"):
        message = f"no command given; there are {', '.join(_commands(parser))}"
    elif refused:
        wanted, there = refused[1], re.findall(r"[^',\s]+", refused[2])
    elif unknown:
        wanted, there = unknown[1], _flags(parser)
    close = difflib.get_close_matches(wanted or "", there, n=1)
    return message + (f"; did you mean {close[0]}?" if close else "") + " (flags: --help)"


def _commands(parser: argparse.ArgumentParser) -> List[str]:
    return [name for action in parser._actions for name in getattr(action, "choices", None) or ()]


def _flags(parser: argparse.ArgumentParser) -> List[str]:
    """The flags of a parser and of its subcommands."""
    flags = list(parser._option_string_actions)
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                flags += _flags(command)
    return flags
