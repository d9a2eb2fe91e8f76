"""Everything stock fairseq 0.12.2 needs to run with today's Python, torch, numpy and hydra.

First version: see PATCHES at the end. Each patch names what breaks, the place in fairseq, the
condition under which it is needed and when it may go.
"""

import contextlib
import dataclasses
import functools
import logging
import os
import sys
import types

from fairseq_moe_ext.errors import UserError

logger = logging.getLogger(__name__)
_applied = []


@contextlib.contextmanager
def relaxed_dataclass_defaults():
    """Let fairseq's dataclasses have dataclass instances as defaults while they are imported.

    Python 3.11 refuses any default whose class has no ``__hash__``; until 3.10 only list, dict and
    set were refused. fairseq/dataclass/configs.py:1080@0.12.2 and others use instances.
    """
    if sys.version_info < (3, 11):
        yield
        return
    strict = dataclasses._get_field

    def get_field(cls, name, annotation, *args):
        default = getattr(cls, name, None)
        if isinstance(default, dataclasses.Field):
            default = default.default
        kind = type(default)
        ours = cls.__module__.partition(".")[0] == "fairseq"
        if not (ours and dataclasses.is_dataclass(kind) and kind.__hash__ is None):
            return strict(cls, name, annotation, *args)
        kind.__hash__ = object.__hash__
        try:
            return strict(cls, name, annotation, *args)
        finally:
            kind.__hash__ = None

    dataclasses._get_field = get_field
    try:
        yield
    finally:
        dataclasses._get_field = strict


def wrap_loader(spec):
    """Make the loader of ``spec`` (fairseq's) import it relaxed and patched."""
    real = spec.loader

    class Loader:
        def create_module(self, spec):
            return real.create_module(spec)

        def exec_module(self, module):
            spec.loader = module.__loader__ = real
            with relaxed_dataclass_defaults():
                real.exec_module(module)
            apply()

    spec.loader = Loader()


def apply():
    """Patch the fairseq that is imported, or import it patched. Does nothing the second time."""
    if _applied:
        return
    if "fairseq" not in sys.modules:
        with relaxed_dataclass_defaults():
            import fairseq  # noqa: F401
    if _applied:  # the start-up hook was there
        return
    for patch in PATCHES:
        patch()
        _applied.append(patch.__name__)


class _View(types.ModuleType):
    """A module as one other module sees it: some names replaced, everything else passed on."""

    def __init__(self, module, **replacements):
        super().__init__(module.__name__, module.__doc__)
        self.__dict__.update(replacements)
        self._module = module

    def __getattr__(self, name):
        return getattr(self._module, name)


def numpy_aliases():
    import numpy as np

    from fairseq.data import data_utils, language_pair_dataset, token_block_dataset

    if not hasattr(np, "int"):
        view = _View(np, int=int, float=float, compat=types.SimpleNamespace(long=int))
        for module in (data_utils, language_pair_dataset, token_block_dataset):
            module.np = view


def checkpoints_without_code():
    import argparse
    import pickle

    import torch

    from fairseq import checkpoint_utils

    torch.serialization.add_safe_globals([argparse.Namespace])

    def load(file, map_location=None):
        try:
            return torch.load(file, map_location=map_location, weights_only=True)
        except pickle.UnpicklingError as error:
            raise UserError("checkpoint {}: {}".format(getattr(file, "name", file), error))

    checkpoint_utils.torch = _View(torch, load=load)


def broadcast_of_objects():
    import torch.distributed as dist

    from fairseq.distributed import utils

    def broadcast_object_slow(obj, src_rank, group, dist_device):
        box = [obj]
        dist.broadcast_object_list(box, src=src_rank, group=group, device=dist_device)
        return box[0]

    utils._broadcast_object_slow = broadcast_object_slow


def one_line_errors():
    from fairseq.distributed import utils

    stock = utils.call_main

    @functools.wraps(stock)
    def call_main(cfg, main, **kwargs):
        try:
            return stock(cfg, main, **kwargs)
        except Exception as error:
            mistake = find_mistake(error)
            if mistake is None or os.environ.get("LOGLEVEL", "").upper() == "DEBUG":
                raise
        print(f"error: {mistake}", file=sys.stderr)
        raise SystemExit(1)

    utils.call_main = call_main


def find_mistake(error):
    seen = error
    while seen is not None:
        if isinstance(seen, (UserError, FileNotFoundError)):
            return seen
        seen = seen.__cause__ or seen.__context__
    return None


PATCHES = (numpy_aliases, checkpoints_without_code, broadcast_of_objects, one_line_errors)
