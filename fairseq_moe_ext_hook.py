"""Start-up hook: load ``fairseq_moe_ext/compat.py`` when, and only when, fairseq is first imported.

A ``.pth`` line in site-packages imports this module at every start of the interpreter, because the
console scripts of fairseq import fairseq before they see ``--user-dir``. So it must cost next to
nothing: it imports only ``sys`` and leaves one object on ``sys.meta_path``, which takes itself off
as soon as it has done its work. ``compat.py`` is loaded by path, not by importing the package,
since the package's ``__init__`` imports fairseq.
"""

import sys


class FairseqFinder:
    """Finds nothing itself: wraps the loader of the top-level package ``fairseq``, once."""

    @classmethod
    def find_spec(cls, fullname, path=None, target=None):
        if fullname != "fairseq":
            return None
        sys.meta_path.remove(cls)

        import importlib.util

        spec = importlib.util.find_spec("fairseq")
        if spec is not None and spec.loader is not None:
            for name in ("errors", "files", "finding", "generation", "literals"):
                load(name)  # compat needs it, and must not import the package to get it
            load("compat").wrap_loader(spec)
        return spec


def load(name):
    """Return the module ``fairseq_moe_ext.<name>``, loaded from its file if it is not yet there.

    It is registered under its real name, so that a later ``import fairseq_moe_ext.<name>`` gets the
    same object and there is one class ``UserError``.
    """
    import importlib.util
    import os.path

    fullname = "fairseq_moe_ext." + name
    if fullname not in sys.modules:
        folder = os.path.join(os.path.dirname(os.path.abspath(__file__)), "fairseq_moe_ext")
        spec = importlib.util.spec_from_file_location(fullname, os.path.join(folder, name + ".py"))
        module = importlib.util.module_from_spec(spec)
        sys.modules[fullname] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[fullname]
            raise
    return sys.modules[fullname]


if "fairseq" not in sys.modules and FairseqFinder not in sys.meta_path:
    sys.meta_path.insert(0, FairseqFinder)
