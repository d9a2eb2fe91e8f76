"""Start-up hook: import ``fairseq_today`` when, and only when, fairseq is first imported.

A ``.pth`` line in site-packages imports this module at every start of the interpreter, because the
console scripts of fairseq import fairseq before they see ``--user-dir``. So it must cost next to
nothing: it imports only ``sys`` and leaves one object on ``sys.meta_path``, which takes itself off
as soon as it has done its work.
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
            import fairseq_today

            fairseq_today.wrap_loader(spec)
        return spec


if "fairseq" not in sys.modules and FairseqFinder not in sys.meta_path:
    sys.meta_path.insert(0, FairseqFinder)
