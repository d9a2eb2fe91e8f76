"""The hook that makes stock fairseq run on today's Python, and importing fairseq."""

import dataclasses
import sys

import pytest
from fairseq.distributed import utils as distributed_utils
from stock_commands import python

import fairseq_today
from fairseq_moe_ext import patches
from fairseq_today import imports, registry


def test_without_fairseq_the_hook_loads_nothing():
    code = "import sys; before = set(sys.modules); import fairseq_moe_ext_hook as hook\n"
    code += "print(hook.FairseqFinder in sys.meta_path, sorted(set(sys.modules) - before))\n"
    code += "import dataclasses, fractions, http.client\n"  # whatever is not fairseq
    code += "late = ('fairseq_moe_ext.', 'fairseq_today', 'torch', 'numpy')\n"
    code += "print([m for m in sys.modules if m.startswith(late)])"
    first, second = python(code, "-S").stdout.splitlines()
    assert first == "True ['fairseq_moe_ext_hook']"
    assert second == "[]"


def test_the_hook_imports_nothing_else_at_the_start():
    """What would cost milliseconds; the time itself depends on what else the machine does."""
    code = "import sys; before = set(sys.modules); import fairseq_moe_ext_hook\n"
    code += "print(sorted(set(sys.modules) - before))"
    assert python(code, "-S").stdout.strip() == "['fairseq_moe_ext_hook']"


def test_the_hook_and_the_package_share_one_module_and_one_error_class():
    code = "import fairseq_moe_ext_hook, fairseq, sys\n"
    code += "early, before = sys.modules['fairseq_today'], fairseq.options.parse_args_and_arch\n"
    code += "assert 'fairseq_moe_ext' not in sys.modules and before.__wrapped__\n"
    code += "import fairseq_moe_ext, fairseq_moe_ext.errors\n"
    code += "assert fairseq_moe_ext.fairseq_today is early\n"
    code += "assert fairseq_moe_ext.errors.UserError is early.errors.UserError\n"
    code += "assert fairseq.options.parse_args_and_arch.__wrapped__ is before\n"
    code += "assert fairseq.__spec__.loader.__class__.__name__ == 'SourceFileLoader'"
    python(code)


def test_without_the_hook_the_package_patches_fairseq_itself():
    code = "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'Fairseq' not in repr(f)]\n"
    code += "import fairseq_moe_ext, fairseq.distributed.utils as u\n"
    code += "assert u.call_main.__wrapped__"
    python(code)


def test_patches_are_applied_once():
    before = list(registry._in_force), distributed_utils.call_main
    fairseq_today.apply()
    registry.apply(patches.PATCHES)
    assert (list(registry._in_force), distributed_utils.call_main) == before


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.11 made the check strict")
def test_dataclass_defaults_are_relaxed_for_fairseq_only():
    @dataclasses.dataclass
    class Inner:
        x: int = 0

    def declare(module):
        names = {"__module__": module, "__annotations__": {"inner": Inner}, "inner": Inner()}
        return dataclasses.dataclass(type("Outer", (), names))

    with pytest.raises(ValueError, match="mutable default"):
        declare("fairseq.x")  # fairseq is imported: the check is as strict as ever
    with imports.relaxed_dataclass_defaults():
        assert declare("fairseq.x")().inner == Inner()
        with pytest.raises(ValueError, match="mutable default"):
            declare("elsewhere")
    assert Inner.__hash__ is None


def test_no_known_warning_is_printed(trained):
    assert "Warning" not in trained.stderr
