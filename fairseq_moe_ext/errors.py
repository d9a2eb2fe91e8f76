"""The exception for a user's mistake, and how a program ends with it: one line and an exit status.
The same for a flag that argparse refuses."""

import argparse
import difflib
import os
import re
import sys
from typing import Any, Callable, List, NoReturn, Optional, Sequence

from fairseq_today.errors import UserError as UserError  # one class, with the plugin or without

from .wording import did_you_mean, flag


class NotFinite(UserError):
    """NaN or infinity where a number should be."""


class UnknownRouter(UserError):
    """A model with a router that nobody has registered."""


class Unfit(UserError):
    """An intact optimizer state that cannot be converted."""

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(reason, remedy)  # as they are, so that it can be pickled
        self.reason = reason

    def __str__(self) -> str:
        return " ".join("; ".join(self.args).splitlines())


class ModelMisfit(UserError):
    """A checkpoint that does not fit the model. `of` says which one, where its file is known."""

    def __init__(self, what: str, remedy: str) -> None:
        super().__init__(f"the checkpoint {what}: {remedy}")
        self.what, self.remedy = what, remedy

    def of(self, file: str, other_remedy: str = "") -> UserError:
        return UserError(f"{file}: {self.what}: {self.remedy}{other_remedy}")


# The remedy if a trained model yields NaN or infinity.
DAMAGED = "the checkpoint is damaged or its training diverged; use an earlier one"


def not_finite(layer: int, training: bool = True) -> NotFinite:
    """What to raise when the router of a layer, counted from 0, yields NaN or infinity."""
    remedy = "training diverged; lower --lr, lengthen --warmup-updates, or use --clip-norm 1 or "
    remedy += "--moe-z-loss-wt 0.001, from the last good checkpoint"
    if not training:
        remedy = DAMAGED
    return NotFinite(f"the router of layer {layer} (from 0) yields NaN or infinity: {remedy}")


def require_positive(args: argparse.Namespace, *flags: str) -> None:
    """Raise UserError for a flag that is below 1; those that are None pass."""
    for name in flags:
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"{flag(name)} {value}: use 1 or more")


def out_of_memory(error: BaseException, remedy: str) -> Optional[str]:
    """One line where a tensor did not fit, else None."""
    text = str(error)
    of_torch = "DefaultCPUAllocator" in text or "out of memory" in text
    if not isinstance(error, MemoryError) and not (isinstance(error, RuntimeError) and of_torch):
        return None
    asked = re.search(r"tried to allocate ([\d.]+ \w+)", text, re.I)
    return f"out of memory{f', {asked[1]} were requested' if asked else ''}: {remedy}"


def less_memory(flags: Sequence[str] = (), on_disk: bool = False) -> str:
    """What to do about a lack of memory.

    Args:
        flags: which, if lower, take less.
        on_disk: whether the command can leave experts on disk.
    """
    lower = " or ".join(filter(None, [", ".join(flags[:-1]), *flags[-1:]]))
    other = "use a smaller model"
    if on_disk:
        other = "leave the experts of a sparse model on disk: --model-overrides "
        other += "\"{'moe_experts_on_disk': True}\""
    return f"{f'lower {lower}, or ' if lower else ''}{other}"


def status_of(
    work: Callable[[], Optional[int]], stopped: str = "", remedy: Optional[str] = None
) -> int:
    """The exit status of a command: what its work returns (None is 0), 1 for a user's mistake, a
    file that the system refuses or a lack of memory, 130 for Ctrl-C, of which the line is
    `stopped`. remedy: for a lack of memory."""
    try:
        return work() or 0
    except UserError as error:
        line, status = f"error: {error}", 1
    except OSError as error:
        if error.filename is None:
            raise
        line, status = f"error: {error.filename}: {error.strerror or error}", 1
    except (MemoryError, RuntimeError) as error:
        lacking = out_of_memory(error, remedy or less_memory())
        if lacking is None:
            raise
        line, status = f"error: {lacking}", 1
    except KeyboardInterrupt:
        line, status = stopped, 130
    if line:
        print(line, file=sys.stderr)
    return status


def program_status(work: Callable[[], Optional[int]], stopped: str = "") -> int:
    """The same of a program that prints as it works: 1, without a word, if what reads its output
    goes away, as `| head` does."""
    try:
        status = status_of(work, stopped)
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


class OneLineParser(argparse.ArgumentParser):
    """An ArgumentParser that reports a mistake in one line instead of two to forty, and takes no
    beginning of a flag for the flag. So do the parsers of its subcommands."""

    words: Sequence[str] = ()  # of the command line

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})
        read_negative_numbers(self)

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def, override]
        self.words = list(sys.argv[1:] if args is None else args)
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        words = getattr(self, "words", ())  # parsers of Hydra and lm-eval use this as their own
        self.exit(2, f"error: {flag_mistake(self, message, words)}\n")


_SHOWN = 20  # names of a choice; fairseq has 200 architectures


def read_negative_numbers(parser: argparse.ArgumentParser) -> None:
    """Let -1e-3 and -125M be values, as Python 3.14 does, not unknown flags."""
    parser._negative_number_matcher = re.compile(r"-\.?\d")


def flag_mistake(
    parser: argparse.ArgumentParser,
    message: str,
    words: Sequence[str] = (),
    remedy: Callable[[argparse.ArgumentParser, str], str] = lambda parser, flag: "",
) -> str:
    """argparse's complaint about a command line as one line, with the flag or choice probably
    meant.

    Args:
        words: of the command line.
        remedy: what to do about an unknown flag; "" where the function does not know.
    """
    message = " ".join(message.split())
    like_flag = _value_like_a_flag(parser, message, words)
    if like_flag:
        return like_flag
    wanted, there = "", []
    refused = re.search(r"invalid choice: '?(.+?)'? \(choose from (.+)\)", message)
    unknown = re.search(r"unrecognized arguments: (?:(?!--)\S+ )*(--[\w-]+)", message)
    known = remedy(parser, unknown[1]) if unknown else ""
    if message.endswith("required: COMMAND"):
        message = f"no command given; there are {', '.join(_commands(parser))}"
    elif refused:
        wanted, there = refused[1], re.findall(r"[^',\s]+", refused[2])
        if len(there) > _SHOWN:
            like = difflib.get_close_matches(wanted, there, n=_SHOWN, cutoff=0)
            few = "" if did_you_mean(wanted, there) else f"; most like it: {', '.join(like)}"
            message = message.replace(f"choose from {refused[2]}", f"of {len(there)}{few}")
    elif known:
        return f"{message}; {known}"
    elif unknown:
        wanted, there = unknown[1], _flags(parser)
        begun = [flag for flag in there if flag.startswith(unknown[1])]
        there = begun if len(begun) == 1 else there
    else:
        there = re.findall(r"--[\w-]+", message.partition("required: ")[2])
        given = (word.partition("=")[0] for word in words if word.startswith("--"))
        near = (f for f in given if f not in there and difflib.get_close_matches(f, there))
        wanted = next(near, "")
        message += f"; {wanted} is given" if wanted else ""
    return message + did_you_mean(wanted, there) + " (flags: --help)"


def _value_like_a_flag(parser: argparse.ArgumentParser, message: str, words: Sequence[str]) -> str:
    """What to write for a value that argparse took for a flag, as it begins with a minus; "": none
    did."""
    lacking = re.match(r"argument (\S+): expected ", message)
    flags = lacking[1].split("/") if lacking else []
    for word, value in zip(words, words[1:]):
        if word in flags and re.match("-[^-]", value) and value not in _flags(parser):
            return (
                f"{word}: its value {value} begins with a minus, as flags do: write {word}={value}"
            )
    return ""


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
