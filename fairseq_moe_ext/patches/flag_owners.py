"""Which --criterion, --optimizer, --arch, ... a flag is of: for a message about one that the chosen
ones do not have."""

import argparse
from typing import Any, Iterator, List, Mapping, Tuple

from fairseq.dataclass.utils import gen_parser_from_dataclass
from fairseq.models import ARCH_MODEL_REGISTRY, FairseqLanguageModel
from fairseq.registry import REGISTRIES
from fairseq.tasks import TASK_REGISTRY

_OURS = __package__.split(".")[0]
_SHOWN = 3  # names


def remedy(parser: argparse.ArgumentParser, flag: str) -> str:
    """What to do about a flag that a parser of fairseq does not have; "": nothing is known."""
    there = parser._option_string_actions
    if "--arch" not in there and flag in _flags(ARCH_MODEL_REGISTRY["moe_transformer_lm"]):
        if "--model-overrides" not in there:
            return f"{flag} is a setting of the model, which the checkpoint has: remove it"
        setting = flag[2:].replace("-", "_")
        return f"{flag} is a setting of the model: --model-overrides \"{{'{setting}': ...}}\""
    for kind, classes in _kinds():
        names = [name for name, cls in classes.items() if flag in _flags(cls)]
        ours = [name for name in names if classes[name].__module__.startswith(f"{_OURS}.")]
        names = ours or names
        if names and f"--{kind}" in there:
            listed = " or ".join(names[:_SHOWN]) + (", ..." if names[_SHOWN:] else "")
            return f"{flag} is a flag of --{kind} {listed}: add that, or remove {flag}"
    return ""


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
