"""Sphinx's settings, and the page of all flags, written from the dataclasses that define them.

`make docs` builds the site into build/site; a warning is an error. `python docs/conf.py` writes
docs/flags.md alone.
"""

from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, Dict, Iterator, List

project = "fairseq_moe_ext"
copyright = "the fairseq_moe_ext authors; MIT licence"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = "fairseq_moe_ext"
exclude_patterns = ["*_two_cores", "ladder_*"]  # results
myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence"]
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_default_options = {"members": True, "undoc-members": False, "show-inheritance": True}
napoleon_numpy_docstring = False
suppress_warnings = ["ref.python"]  # several NamedTuples have a field of the same name

FLAGS = Path(__file__).with_name("flags.md")
FLAGS_HEAD = """# Flags

`python docs/conf.py` writes this page. A flag `--moe-freq` is `model.moe_freq` in a Hydra override;
the other groups are `criterion.` and `task.`. `fairseq-train --help` lists stock fairseq's flags.

A flag that `--arch` sets has another default there: the column `moe_lm_*` has that of the sparse
[architectures](train.md#architectures), or "by size". The dense ones set the same flags, except
those that begin with `--moe`.
"""


def setup(app: Any = None) -> None:
    """Sphinx calls this first."""
    FLAGS.write_text("\n".join(flags_page()), encoding="utf-8")


def flags_page() -> Iterator[str]:
    """The lines of flags.md."""
    import fairseq_moe_ext  # noqa: F401  (registers with fairseq)
    from fairseq_moe_ext.config import MoETransformerLMConfig
    from fairseq_moe_ext.criterions.moe_cross_entropy import MoECrossEntropyConfig
    from fairseq_moe_ext.criterions.multiple_choice import MultipleChoiceConfig
    from fairseq_moe_ext.models.architectures import ARCHITECTURES
    from fairseq_moe_ext.tasks.mixture_language_modeling import MixtureLanguageModelingConfig
    from fairseq_moe_ext.tasks.multiple_choice import MultipleChoiceTaskConfig

    sparse = [sizes for name, sizes in ARCHITECTURES.items() if name.startswith("moe_lm_")]
    yield FLAGS_HEAD
    for title, dataclass in {
        "Models": MoETransformerLMConfig,
        "Criterion moe_cross_entropy": MoECrossEntropyConfig,
        "Criterion multiple_choice": MultipleChoiceConfig,
        "Task mixture_language_modeling": MixtureLanguageModelingConfig,
        "Task multiple_choice": MultipleChoiceTaskConfig,
    }.items():
        set_by_arch = sparse if title == "Models" else []
        heads = ["flag", "default", *(["`moe_lm_*`"] if set_by_arch else []), "meaning"]
        yield f"## {title}\n\n| {' | '.join(heads)} |\n{'|---' * len(heads)}|"
        for flag in fields(dataclass):
            text = flag.metadata.get("help")
            if text is not None and not flag.name.startswith("_"):
                yield flag_row(flag, text, set_by_arch)
        yield ""


def flag_row(flag: Any, text: str, set_by_arch: List[Dict[str, Any]]) -> str:
    """One flag as a row of its table, with what the architectures set, if there are any."""
    default = flag.default if flag.default is not MISSING else flag.default_factory()
    choices = getattr(flag.type, "__members__", ())
    if 0 < len(choices) < 8:
        text += ". One of " + ", ".join(f"`{name}`" for name in choices)
    others = {str(sizes[flag.name]) for sizes in set_by_arch if flag.name in sizes}
    cells = [
        f"`--{flag.name.replace('_', '-')}`",
        "" if default is None or default is False else f"`{getattr(default, 'value', default)}`",
    ]
    if set_by_arch:
        cells.append("by size" if len(others) > 1 else "".join(f"`{value}`" for value in others))
    text = text.replace("%%", "%").replace("|", "\\|").replace("<", "\\<")
    return f"| {' | '.join([*cells, text])} |"


if __name__ == "__main__":
    setup()
