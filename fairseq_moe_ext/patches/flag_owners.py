"""Which --criterion, --optimizer, --arch, ... a flag is of: for a message about one that the chosen
ones do not have."""

import argparse
from dataclasses import fields
from typing import Any, Iterator, List, Mapping, Sequence, Tuple

from fairseq.dataclass.utils import gen_parser_from_dataclass
from fairseq.models import ARCH_CONFIG_REGISTRY, ARCH_MODEL_REGISTRY, FairseqLanguageModel
from fairseq.models.transformer_lm import TransformerLanguageModel, TransformerLanguageModelConfig
from fairseq.registry import REGISTRIES
from fairseq.tasks import TASK_REGISTRY

from ..config import defaults
from ..errors import read_negative_numbers
from ..models.language_model import MODEL_NAME
from ..wording import flag as flag_of

_OURS = __package__.split(".")[0]
_SHOWN = 3  # names
# Flags of the moe branch beside those of the model, for which nothing stands here.
BRANCH_ONLY = {
    *("--is-moe", "--num-workers-valid", "--dummy-a2a", "--stats-path", "--log-nvidia-smi"),
    *("--no-best-checkpoints", "--no-save-optimizer-state-on-training-finished"),
    *("--symlink", "--symlink-best-and-last-checkpoints", "--s3-upload-path", "--s3-dir"),
}


def remedy(parser: argparse.ArgumentParser, flag: str, words: Sequence[str]) -> str:
    """What to do about a flag of a command line, by its words, that a parser of fairseq does not
    have; "": nothing is known."""
    there = parser._option_string_actions
    if flag in BRANCH_ONLY:
        return f"{flag} of fairseq's moe branch has no counterpart here: remove it"
    if "--arch" not in there and flag in _flags(ARCH_MODEL_REGISTRY[MODEL_NAME]):
        if "--model-overrides" not in there:
            return f"{flag} is a setting of the model, which the checkpoint has: remove it"
        setting = flag[2:].replace("-", "_")
        return f"{flag} is a setting of the model: --model-overrides \"{{'{setting}': ...}}\""
    for kind, classes in _kinds():
        names = [name for name, cls in classes.items() if flag in _flags(cls)]
        ours = [name for name in names if classes[name].__module__.startswith(f"{_OURS}.")]
        stocks = _in_place_of_stocks(words) if kind == "arch" and MODEL_NAME in ours else ""
        if stocks:
            return f"{flag} is a flag of --arch {MODEL_NAME}: {stocks}"
        names = ours or names
        if names and f"--{kind}" in there:
            listed = " or ".join(names[:_SHOWN]) + (", ..." if names[_SHOWN:] else "")
            return f"{flag} is a flag of --{kind} {listed}: add that, or remove {flag}"
    return ""


def _in_place_of_stocks(words: Sequence[str]) -> str:
    """How to write the --arch of a command line with our model, whose other defaults differ; "":
    it is no transformer_lm of fairseq's, or one with adaptive input, which ours lacks."""
    chosen = argparse.ArgumentParser(
        add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS
    )
    chosen.add_argument("--arch", "-a")
    gen_parser_from_dataclass(chosen, TransformerLanguageModelConfig(), delete_default=True)
    read_negative_numbers(chosen)
    settings = chosen.parse_known_args(list(words))[0]
    arch, given = vars(settings).pop("arch", None), {*vars(settings)}
    if not issubclass(ARCH_MODEL_REGISTRY.get(arch, object), TransformerLanguageModel):
        return ""
    ARCH_CONFIG_REGISTRY[arch](settings)
    if getattr(settings, "adaptive_input", False):
        return ""
    stock = {field.name: field.default for field in fields(TransformerLanguageModelConfig)}
    stock.update(vars(settings))
    more = [f"--arch {MODEL_NAME}"]
    for name, default in defaults().items():
        value = stock.get(name, default)
        if value != default and name not in given:
            more.append(flag_of(name) if value is True else f"{flag_of(name)} {value}")
    return f"in place of --arch {arch} write {' '.join(more)}"


def _kinds() -> Iterator[Tuple[str, Mapping[str, Any]]]:
    """The flag that chooses one of several classes, and these by name."""
    models = ARCH_MODEL_REGISTRY.items()
    yield "arch", {name: cls for name, cls in models if issubclass(cls, FairseqLanguageModel)}
    yield "task", TASK_REGISTRY
    for name, registry in REGISTRIES.items():
        yield name.replace("_", "-"), registry["registry"]


def _flags(cls: Any) -> List[str]:
    """The flags that a class adds, as fairseq/options.py:140,165@0.12.2 asks for them."""
    parser = argparse.ArgumentParser(add_help=False)
    try:
        if hasattr(cls, "add_args"):
            cls.add_args(parser)
        elif getattr(cls, "__dataclass", None) is not None:
            gen_parser_from_dataclass(parser, getattr(cls, "__dataclass")())
    except Exception:  # one that cannot list its flags has none to offer
        return []
    return list(parser._option_string_actions)
