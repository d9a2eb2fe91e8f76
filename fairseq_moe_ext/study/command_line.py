"""What fairseq-train and `fairseq-moe priming` would refuse, before any run starts."""

import argparse
import contextlib
import io
from typing import Any, Iterator, List, Optional, Sequence

from fairseq import options

from ..config import MoETransformerLMConfig
from ..config_checks import validate
from ..errors import OneLineParser, UserError
from ..models.architectures import ARCHITECTURES
from ..priming import command as priming


def check_priming(words: Sequence[str], where: str) -> None:
    """Raise UserError for unknown tasks, or values out of range."""
    parser = OneLineParser()
    priming.add_arguments(parser)
    with _one_line(parser, where, "fairseq-moe priming"):
        priming.checked(parser.parse_args(words))


def check_training(words: Sequence[str], where: str) -> None:
    """Raise UserError for unknown flags, invalid values, or a model that cannot be built.

    Args:
        words: of the command line, without the command and --user-dir.
        where: begins the message.
    """
    parser = options.get_training_parser()
    with _one_line(parser, where, "fairseq-train"):
        args = options.parse_args_and_arch(parser, list(words))
        if args.arch in ARCHITECTURES:
            validate(_model(args))


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
