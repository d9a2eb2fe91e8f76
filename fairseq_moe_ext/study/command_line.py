"""What fairseq-train and `fairseq-moe priming` would refuse, before any run starts."""

import argparse
import contextlib
import io
from typing import Any, List, Optional, Sequence

from fairseq import options

from ..config import MoETransformerLMConfig
from ..config_checks import validate
from ..errors import UserError
from ..models.architectures import ARCHITECTURES
from ..priming import command as priming


def check_priming(words: Sequence[str], where: str) -> None:
    """Raise UserError for unknown tasks, or values out of range."""
    parser = argparse.ArgumentParser()
    priming.add_arguments(parser)
    try:
        priming.checked(parser.parse_args(words))
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def check_training(words: Sequence[str], where: str) -> None:
    """Raise UserError for unknown flags, invalid values, or a model that cannot be built.

    Args:
        words: of the command line, without the command and --user-dir.
        where: begins the message.
    """
    parser = options.get_training_parser()
    said: List[str] = []

    def leave(status: int = 0, message: Optional[str] = None) -> None:
        said.append(message or "--help only prints the flags; remove help")
        raise SystemExit(status)

    parser.exit = leave
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            args = options.parse_args_and_arch(parser, list(words))
        if args.arch in ARCHITECTURES:
            validate(_model(args))
    except SystemExit:
        message = said[0].strip().replace("error: ", "", 1)
        raise UserError(f"{where}: fairseq-train: {message}") from None
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _model(args: Any) -> MoETransformerLMConfig:
    names = MoETransformerLMConfig.__dataclass_fields__.keys() & vars(args).keys()
    return MoETransformerLMConfig(**{name: getattr(args, name) for name in names})
