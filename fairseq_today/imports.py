"""What stock fairseq 0.12.2 needs to be imported by today's Python, and to find today's numpy."""

import contextlib
import dataclasses
import logging
import sys
import types
import warnings
from typing import Any, Iterator

from .registry import View


@contextlib.contextmanager
def fit_to_import() -> Iterator[None]:
    """What must hold while fairseq's own modules are imported, and only then."""
    quiet_warnings()
    if sys.version_info < (3, 11):
        yield
    else:
        with relaxed_dataclass_defaults():
            yield


@contextlib.contextmanager
def relaxed_dataclass_defaults() -> Iterator[None]:
    """Let fairseq's dataclasses have instances of dataclasses as defaults.

    Breaks: `import fairseq`, on Python 3.11 and later, which refuses a default whose class has no
    `__hash__`; until 3.10 only list, dict and set were refused.
    Where: fairseq/dataclass/configs.py:1106@0.12.2 and every other config within a config.
    How: for a class of fairseq's, such a default passes for hashable during that one check.
    Ends: with a fairseq that uses `default_factory`.
    """
    module: Any = dataclasses  # no type checker knows its private functions
    strict = module._get_field

    def get_field(cls, name, annotation, *rest):
        default = getattr(cls, name, None)
        if isinstance(default, dataclasses.Field):
            default = default.default
        kind = type(default)
        is_fairseq = cls.__module__.partition(".")[0] == "fairseq"
        if not (is_fairseq and dataclasses.is_dataclass(kind) and kind.__hash__ is None):
            return strict(cls, name, annotation, *rest)
        kind.__hash__ = object.__hash__
        try:
            return strict(cls, name, annotation, *rest)
        finally:
            kind.__hash__ = None

    module._get_field = get_field
    try:
        yield
    finally:
        module._get_field = strict


# What stock fairseq's own lines provoke at every start and a user can do nothing about: the start
# of the message, and of the module it is put down to.
_KNOWN_WARNINGS = (
    # fairseq/dataclass/utils.py:397,399@0.12.2
    (r"hydra\.experimental\.\w+\(\) is no longer", ""),
    (r"\nThe strict flag in the compose API", ""),
    # fairseq/config/config.yaml; fairseq/dataclass/initialize.py:19@0.12.2
    (r"In 'config': Usage of deprecated keyword in package header", ""),
    (r"\n'.*' is validated against ConfigStore schema", ""),
    # fairseq_cli/hydra_train.py:25@0.12.2
    (r"\nThe version_base parameter is not", r"hydra\.experimental|fairseq_cli"),
    (r"Future Hydra versions will no longer change working directory", ""),
    # fairseq/tasks/fairseq_task.py:514@0.12.2, fairseq/data/iterators.py:499@0.12.2,
    # fairseq/modules/multihead_attention.py:538@0.12.2
    (r"`torch\.cuda\.amp\.", "fairseq|fairscale"),
    (r"'pin_memory' argument is set as true but no acc", ""),
    (r"Support for mismatched key_padding_mask and attn_mask", ""),
)


def quiet_warnings() -> None:
    """Hide the known warnings about stock fairseq's own lines, unless the user set -W.

    Breaks: nothing; but some 30 lines of them at every start bury the lines that matter.
    Ends: with the lines of fairseq that are named above.
    """
    # fairseq/tasks/text_to_speech.py:35@0.12.2 asks everybody to install what two speech tasks use
    logging.getLogger("fairseq.tasks.text_to_speech").setLevel(logging.WARNING)
    # fairseq/data/iterators.py:496@0.12.2 sets one for the children of a training with workers
    if set(sys.warnoptions) - {"ignore:semaphore_tracker:UserWarning"}:
        return
    for message, module in _KNOWN_WARNINGS:
        warnings.filterwarnings("ignore", message=message, module=module)


def with_old_names(numpy: Any) -> Any:
    """`--sample-break-mode eos`, the hub's `score` and `sample` (np.compat.long, gone in numpy 2),
    masking and CRF layers (np.int, np.float, gone in numpy 1.24) use names that numpy has dropped.
    """
    return View(numpy, int=int, float=float, compat=types.SimpleNamespace(long=int))


def whole_offsets(stock, self, index_file):
    """`fairseq-preprocess --workers N` on 2 GiB or more writes wrong offsets, with no error.

    Merging the workers' parts collects sizes as np.int32, and since numpy 2 their sum stays
    np.int32, so the offsets written into the .idx wrap round (a RuntimeWarning, and other tokens
    are read). Here the sizes are whole numbers of Python.
    """
    self._sizes = [int(size) for size in self._sizes]
    stock(self, index_file)
