"""What fairseq-train and `fairseq-moe priming` would refuse, before any run starts."""

import argparse
import contextlib
import io
from typing import Any, Iterable, Iterator, List, Optional, Sequence

from fairseq import options

from ..config import MoETransformerLMConfig
from ..config_checks import validate
from ..errors import OneLineParser, UserError
from ..models.architectures import ARCHITECTURES
from ..priming import command as priming
from ..wording import did_you_mean


def check_priming(words: Sequence[str], where: str) -> None:
    """Raise UserError for unknown tasks, or values out of range."""
    parser = OneLineParser()
    priming.add_arguments(parser)
    with _one_line(parser, where, "fairseq-moe priming"):
        priming.checked(parser.parse_args(words))


def check_training(words: Sequence[str], where: str) -> argparse.Namespace:
    """The parsed flags. Raises UserError for unknown ones, invalid values, or a model that cannot
    be built.

    Args:
        words: of the command line, without the command and --user-dir.
        where: begins the message.
    """
    parser = options.get_training_parser()
    parser.allow_abbrev = False  # update-fr would escape the study's own checks of update-freq
    with _one_line(parser, where, "fairseq-train"):
        args = options.parse_args_and_arch(parser, list(words))
        if args.arch in ARCHITECTURES:
            validate(_model(args))
    return args


def no_batch_size(flags: Iterable[str], where: str) -> UserError:
    """What to raise for flags without batch-size; one that fairseq-train lacks may mean it."""
    known = options.get_training_parser()._option_string_actions
    for flag in flags:
        if f"--{flag}" not in known and did_you_mean(flag, ["batch-size"]):
            return UserError(f"{where}: {flag}: no such flag; did you mean batch-size?")
    return UserError(f"{where}: batch-size is missing: set the number of blocks per update")


@contextlib.contextmanager
def _one_line(parser: argparse.ArgumentParser, where: str, command: str) -> Iterator[None]:
    """Raise UserError, which begins with `where`, in place of what a parser prints and its exit."""
    said: List[str] = []

    def leave(status: int = 0, message: Optional[str] = None) -> None:
        said.append(message or "--help only prints the flags; remove help")
        raise SystemExit(status)

    parser.exit = leave  # type: ignore[method-assign, assignment]
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    except SystemExit:
        message = said[0].strip().replace("error: ", "", 1)
        raise UserError(f"{where}: {command}: {message}") from None
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _model(args: Any) -> MoETransformerLMConfig:
    names = MoETransformerLMConfig.__dataclass_fields__.keys() & vars(args).keys()
    return MoETransformerLMConfig(**{name: getattr(args, name) for name in names})
