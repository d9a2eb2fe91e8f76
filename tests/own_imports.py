"""What the files of the package import of it."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "fairseq_moe_ext"


def part_of(module):
    return module.split(".")[0] if module else "__init__"


def own_imports(path):
    """Modules of the package that a file imports, as 'moe.routing'."""
    here = path.relative_to(PACKAGE).with_suffix("").parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            if node.level:
                base = list(here[: len(here) - node.level])
            elif node.module and node.module.split(".")[0] == "fairseq_moe_ext":
                base, node.module = [], ".".join(node.module.split(".")[1:])
            else:
                continue
            base += node.module.split(".") if node.module else []
            for alias in node.names:
                full = PACKAGE.joinpath(*base, alias.name)
                is_module = full.is_dir() or full.with_suffix(".py").exists()
                yield ".".join(base + [alias.name] if is_module else base)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "fairseq_moe_ext":
                    yield ".".join(alias.name.split(".")[1:])
