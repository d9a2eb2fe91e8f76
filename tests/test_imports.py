"""Who may import whom within the package; the mathematics knows no fairseq."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from own_imports import PACKAGE, own_imports, part_of

# what the mathematics may have of the standard library
STANDARD = set(
    "__future__ concurrent contextlib functools heapq math os threading time typing".split()
)

EVERYWHERE = set("context cores errors files locks outputs progress_bar text_table wording".split())


# A part of the package -> the parts that it may import. A part is a module or a subpackage; "moe.x"
# only where a part may not have all of moe. All but moe and kernels may import EVERYWHERE.
ALLOWED = {
    part: set(names.split())
    for part, names in {
        "__init__": "criterions models optim patches tasks",
        "moe": "moe kernels",
        "kernels": "kernels",
        "balance_flags": "moe",
        "config": "balance_flags moe.activations moe.routing router_flags",
        "router_flags": "balance_flags moe",
        "config_checks": "balance_flags config ranges router_flags shape",
        "shape": "balance_flags moe.activations moe.router router_flags",
        "ranges": "literals",
        "ours": "",
        "command_checks": "data_bin literals ours ranges training_flags",
        "training_flags": "config moe.router optim ours",
        "trainer_checks": "balance_flags expert_parallel moe.router moe.stats ours router_flags"
        " shape",
        "accuracy": "",
        "student_t": "",
        "cost": "kernels shape",
        "errors": "",
        "wording": "",
        "text_table": "",
        "progress_bar": "",
        "locks": "",
        "files": "",
        "outputs": "files",
        "data_bin": "",
        "tokenizer_files": "data_bin outputs",
        "generate": "generate evaluation models prepare tokenizer_files",
        "literals": "",
        "patches": """
            patches branch checkpoint command_checks config config_checks cost counted data_bin
            data_bin_files diverging expert_parallel fingerprint fully_sharded kernels.dtypes
            literals metrics_file models moe.balance moe.layer moe.stats ours shape
            tokenizer_files trainer_checks training_line
            """,
        "patch_list": "patches",
        "metrics_file": "outputs",
        "training_line": "cost kernels shape",
        "completion": "",
        "context": "",
        "cores": "",
        "data_bin_files": "",
        "expert_parallel": "kernels.first_order kernels.transfer moe.exchange moe.scope",
        "counted": "",
        "fingerprint": "data_bin tokenizer_files",
        "diverging": "",
        "optim": "",
        "fully_sharded": "",
        "checkpoint": """
            checkpoint balance_flags config data_bin diverging expert_parallel files fully_sharded
            literals models.precision moe.router ours router_flags shape
            """,
        "branch": """
            branch balance_flags checkpoint.format checkpoint.settings config expert_parallel
            fully_sharded models moe router_flags shape
            """,
        "models": """
            models balance_flags command_checks config config_checks data_bin expert_parallel
            fully_sharded kernels moe router_flags shape tokenizer_files
            """,
        "criterions": "criterions accuracy kernels.dtypes moe.stats ranges",
        "tasks": "tasks accuracy data_bin expert_parallel questions ranges",
        "prepare": "prepare data_bin tokenizer_files",
        "inspection": """
            inspection branch.outline checkpoint.format data_bin evaluation metrics_file models
            moe.layer moe.router prepare.documents questions student_t tokenizer_files
            """,
        "questions": "questions prepare tokenizer_files",
        "priming": """
            priming accuracy branch.files evaluation expert_parallel models questions
            tokenizer_files
            """,
        "forecast": "forecast evaluation student_t",
        "study": """
            study accuracy branch.outline cli config config_checks cost data_bin evaluation forecast
            models.architectures priming ranges shape student_t
            """,
        "convert": """
            convert balance_flags branch checkpoint config config_checks cost data_bin
            evaluation.capacity evaluation.evaluated evaluation.loading expert_parallel fingerprint
            models moe.experts prepare router_flags shape tokenizer_files
            """,
        "evaluation": """
            evaluation branch checkpoint.format checkpoint.intact config config_checks cost
            data_bin data_bin_files
            literals models router_flags shape tokenizer_files
            """,
    }.items()
}


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_import_directions(path):
    part = path.relative_to(PACKAGE).with_suffix("").parts[0]
    if part == "cli":  # a command may call anything
        return
    allowed = ALLOWED[part] | (EVERYWHERE if part not in ("moe", "kernels") else set())
    for module in own_imports(path):
        assert module in allowed or part_of(module) in allowed, f"{path.name} imports {module}"


def name_of(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def circles(graph):
    """Sets of nodes that lead to each other."""

    def reached(node):
        seen, todo = set(), [node]
        while todo:
            new = graph.get(todo.pop(), set()) - seen
            seen |= new
            todo += new
        return seen

    reach = {node: reached(node) for node in graph}
    return {frozenset(n for n in reach[node] if node in reach.get(n, ())) for node in graph} - {
        frozenset()
    }


def test_no_modules_import_each_other():
    """Also not in functions; and no two parts do by different modules."""
    modules = {name_of(path): set(own_imports(path)) - {name_of(path)} for path in FILES}
    parts = {}
    for module, imported in modules.items():
        others = {part_of(name) for name in imported} - {part_of(module)}
        parts.setdefault(part_of(module), set()).update(others)
    assert circles(modules) == circles(parts) == set()


def test_circles_are_found():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == {frozenset("bc")}
    assert circles({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == set()


def test_nothing_is_allowed_that_is_not_used():
    for part, allowed in ALLOWED.items():
        used = {
            name for path in FILES if part_of(name_of(path)) == part for name in own_imports(path)
        }
        assert {a for a in allowed - {part} if not any(_is_in(u, a) for u in used)} == set(), part


def _is_in(module, part):
    return module == part or module.startswith(part + ".")


MATHEMATICS = [
    path for room in ("moe", "kernels") for path in sorted((PACKAGE / room).rglob("*.py"))
]


@pytest.mark.parametrize("path", MATHEMATICS, ids=lambda p: p.name)
def test_the_mathematics_is_torch_only(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module]
        for name in names:
            assert name.split(".")[0] in STANDARD | {"torch"}


def test_no_command_waits_for_the_compiler_of_torch():
    """torch._dynamo takes 0.8 s and 70 MiB, and only --compile uses it."""
    modules = "fairseq_cli.train fairseq_cli.eval_lm fairseq_moe_ext fairseq_moe_ext.cli".split()
    code = f"import sys, {', '.join(modules)}\nprint('torch._dynamo' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
    assert done.stdout.split() == ["False"], done.stderr


def test_the_rules_would_notice():
    imports = list(own_imports(PACKAGE / "models" / "decoder.py"))
    assert {"config", "moe.scope", "moe.layer", "models.attention"} <= set(imports)


def test_every_part_has_its_rule():
    assert set(ALLOWED) >= {part.relative_to(PACKAGE).parts[0].split(".")[0] for part in FILES} - {
        "cli"
    }


ROOMS = [path for path in sorted(PACKAGE.glob("*/__init__.py"))]


@pytest.mark.parametrize("path", ROOMS, ids=lambda p: p.parent.name)
def test_the_map_of_a_room_is_complete(path):
    """Where a room has one."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    words = {word.strip(",;:()") for word in text.split() if "/" not in word}
    named = {word for word in words if word.endswith(".py")}
    if named:
        assert named == {p.name for p in path.parent.glob("*.py")} - {"__init__.py"}


TESTS = sorted(Path(__file__).parent.rglob("*.py"))


def imported_tests(path):
    """Test modules that a file of the tests imports; what tests share lies beside them."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [node.module or "", *(alias.name for alias in node.names)]
        yield from (name for name in names if name.split(".")[-1].startswith("test_"))


def test_no_test_module_is_imported():
    found = {path.name: list(imported_tests(path)) for path in TESTS}
    assert {name: tests for name, tests in found.items() if tests} == {}


def test_an_import_of_a_test_module_is_seen(tmp_path):
    path = tmp_path / "x.py"
    path.write_text("import os\nfrom test_a import data\ndef f():\n    import moe.test_b\n")
    assert list(imported_tests(path)) == ["test_a", "moe.test_b"]


def test_each_module_of_the_tests_has_a_name_of_its_own():
    """Since pytest and the processes that tests start find all of them by name alone."""
    names = [path.name for path in TESTS if path.name != "conftest.py"]
    assert sorted(names) == sorted(set(names))
