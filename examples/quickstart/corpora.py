"""Text for the quickstart: what the Python installation already contains, torch included.

Four training domains and two held-out ones, as JSON lines, one document a line. Nothing is
downloaded. The choice is deterministic: candidates are ordered by the SHA-256 of their name, so the
same installation gives the same files. A document is a file (or, for docstrings, all docstrings of
one file), and whole documents go to test, valid and train in that order, so no document is in two
splits. A text that was already taken, by whatever domain, is not taken again.

The domains differ in the installed versions of Python, torch, numpy and sympy, so perplexities from
two installations are not comparable; those of two models of the same run are.
"""

import ast
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import sys
import sysconfig
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Dict, Iterator, List, Sequence, Tuple

from fairseq_moe_ext.errors import OneLineParser, UserError, program_status

SPLITS = ("test", "valid", "train")  # the order in which documents are dealt out
LARGEST_DOCUMENT = 40_000  # bytes; larger ones are mostly tables and would swamp a test set
SMALLEST_DOCUMENT = 300  # bytes

# Parts of the standard library that are tables, tests, or belong to another domain.
_STDLIB_LEFT_OUT = {
    "__pycache__",
    "dist-packages",
    "encodings",
    "idlelib",
    "lib2to3",
    "pydoc_data",
    "site-packages",
    "test",
    "tests",
}
# Thousands of near-identical files written by torch's code generators.
_GENERATED_HEADERS = (
    "ATen/ops/",
    "generated/",
    "Functions.h",
    "Plumbing.h",
    "RegistrationDeclarations.h",
    "MethodOperators.h",
    "NativeMetaFunctions.h",
)

# counts[domain][split] = {"documents": ..., "bytes": ...}
Counts = Dict[str, Dict[str, Dict[str, int]]]
Candidate = Tuple[str, Callable[[], str]]  # a document's name and the function that reads it


@dataclass(frozen=True)
class Domain:
    """One kind of text: its name on disk, words for the report, where its documents are."""

    name: str
    title: str
    source: str
    held_out: bool
    candidates: Callable[[], List[Candidate]]


def package_folder(name: str) -> Path:
    """The folder of an installed package, found without importing it."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"the quickstart takes text from the package {name!r}, which is not installed: "
            "run `make install`, or start run.py with the Python that has torch"
        )
    return Path(list(spec.submodule_search_locations)[0])


def _files(root: Path, name: str, suffixes: Tuple[str, ...]) -> List[Tuple[str, Path]]:
    """(name/relative/path, path) of every file below root with one of the suffixes."""
    found = []
    for folder, _, files in os.walk(root):
        for file in files:
            path = Path(folder, file)
            if path.suffix in suffixes:
                found.append((f"{name}/{path.relative_to(root).as_posix()}", path))
    return found


def _stdlib_files() -> List[Tuple[str, Path]]:
    root = Path(sysconfig.get_path("stdlib"))
    found = []
    for top in sorted(root.iterdir()):
        if top.is_dir() and top.name not in _STDLIB_LEFT_OUT and not top.name.startswith("config-"):
            found += _files(top, f"python/{top.name}", (".py",))
        elif top.suffix == ".py":
            found.append((f"python/{top.name}", top))
    return [(name, path) for name, path in found if not _STDLIB_LEFT_OUT & set(name.split("/"))]


def _parse(path: Path) -> Tuple[str, ast.Module]:
    source = path.read_text(encoding="utf-8")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escape sequences in other people's files
        return source, ast.parse(source)


def _documented(tree: ast.Module) -> Iterator[ast.AST]:
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            if ast.get_docstring(node, clean=False) is not None:
                yield node


def docstrings(path: Path) -> str:
    """All docstrings of one file, each with its name as a heading, in the file's order."""
    parts = []
    for node in sorted(_documented(_parse(path)[1]), key=lambda node: getattr(node, "lineno", 0)):
        heading = getattr(node, "name", "")
        parts.append((heading + "\n" if heading else "") + (ast.get_docstring(node) or ""))
    return "\n\n".join(parts)


def code_without_docstrings(path: Path) -> str:
    """The source of one file without its docstrings, so that code and docstrings share no text."""
    source, tree = _parse(path)
    lines = source.splitlines()
    for node in _documented(tree):
        first = node.body[0]
        start, end = first.lineno - 1, first.end_lineno
        lines[start:end] = [None] * (end - start)
    return "\n".join(line for line in lines if line is not None)


def _plain(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def _reader(read: Callable[[Path], str], path: Path) -> Callable[[], str]:
    return lambda: read(path)


def _docs() -> List[Candidate]:
    files = _stdlib_files()
    for package in ("torch", "numpy", "sympy"):
        files += [
            (name, path)
            for name, path in _files(package_folder(package), package, (".py",))
            if "/tests/" not in name
        ]
    return [(name + " docstrings", _reader(docstrings, path)) for name, path in files]


def _python() -> List[Candidate]:
    return [(name, _reader(code_without_docstrings, path)) for name, path in _stdlib_files()]


def _cpp() -> List[Candidate]:
    files = _files(package_folder("torch") / "include", "torch/include", (".h", ".hpp", ".cuh"))
    return [
        (name, _reader(_plain, path))
        for name, path in files
        if not any(part in name for part in _GENERATED_HEADERS)
    ]


def _maths() -> List[Candidate]:
    files = _files(package_folder("sympy"), "sympy", (".py",))
    return [
        (name, _reader(code_without_docstrings, path)) for name, path in files if "/tests/" in name
    ]


def _reference() -> List[Candidate]:
    from pydoc_data.topics import topics

    return [(f"pydoc_data/{name}", lambda text=text: text) for name, text in topics.items()]


def _licences() -> List[Candidate]:
    found: List[Candidate] = []
    for distribution in importlib.metadata.distributions():
        name = distribution.metadata["Name"]
        if name is None or name.replace("-", "_") == "fairseq_moe_ext":
            continue  # a broken entry, or this project: its text changes with every commit
        readme = distribution.metadata.get_payload()
        if isinstance(readme, str):
            found.append((f"{name}/README", lambda readme=readme: readme))
        for file in distribution.files or []:
            if ".dist-info/" in str(file) and any(
                word in file.name.upper() for word in ("LICEN", "COPYING", "NOTICE")
            ):
                found.append(
                    (f"{name}/{file.as_posix()}", _reader(_plain, Path(str(file.locate()))))
                )
    return found


DOMAINS = (
    Domain(
        "docs",
        "Docstrings",
        "docstrings of the standard library, torch, numpy and sympy",
        False,
        _docs,
    ),
    Domain(
        "python",
        "Python code",
        "the standard library's source without its docstrings",
        False,
        _python,
    ),
    Domain("cpp", "C++ headers", "torch's C and C++ headers, generated ones left out", False, _cpp),
    Domain(
        "maths",
        "Symbolic maths",
        "sympy's tests: formulas and their expected results",
        False,
        _maths,
    ),
    Domain(
        "reference",
        "Language reference",
        "Python's language reference (pydoc_data)",
        True,
        _reference,
    ),
    Domain(
        "licences",
        "Licences, READMEs",
        "licences and READMEs of the installed packages",
        True,
        _licences,
    ),
)


def documents(domain: Domain, taken: set) -> Iterator[Tuple[str, str]]:
    """(name, text) of a domain's documents in their deterministic order.

    Left out are files that cannot be read as UTF-8 or parsed, texts outside the size limits, and
    texts whose digest is in `taken`; the digest of each text that is handed out is added there.
    """
    ordered = sorted(
        domain.candidates(), key=lambda found: hashlib.sha256(found[0].encode()).digest()
    )
    for name, read in ordered:
        try:
            text = "\n".join(line.rstrip() for line in read().strip().splitlines())
            encoded = text.encode()
        except (OSError, ValueError, SyntaxError, RecursionError):
            continue  # another package's file that this Python cannot read
        digest = hashlib.sha256(encoded).digest()
        size_fits = SMALLEST_DOCUMENT <= len(encoded) <= LARGEST_DOCUMENT
        if not size_fits or b"\0" in encoded or digest in taken:
            continue
        taken.add(digest)
        yield name, text


def gather(
    folder: Path,
    train_bytes: int,
    valid_bytes: int,
    test_bytes: int,
    progress: Callable[[str], None] = lambda line: None,
) -> Counts:
    """Write folder/<domain>.<split>.jsonl for every domain; returns counts[domain][split] =
    {documents, bytes}.

    Each split takes whole documents until it holds at least its number of bytes. Held-out domains
    have no train split. Raises UserError when a domain has too little text to train on, which
    would weigh less than the others', or none left for another split (a missing package, or sizes
    that are too large); a short split of test or validation text is reported.
    """
    targets = {"train": train_bytes, "valid": valid_bytes, "test": test_bytes}
    for split, target in targets.items():
        if target <= 0:
            raise UserError(f"the {split} split must hold at least one byte, not {target}")
    folder.mkdir(parents=True, exist_ok=True)
    taken: set = set()
    counts: Counts = {}
    for domain in DOMAINS:
        stream = documents(domain, taken)
        counts[domain.name] = {}
        for split in SPLITS:
            if domain.held_out and split == "train":
                continue
            count = {"documents": 0, "bytes": 0}
            path = folder / f"{domain.name}.{split}.jsonl"
            partial = path.with_name(path.name + ".partial")
            with open(partial, "w", encoding="utf-8") as out:
                for name, text in stream:
                    out.write(json.dumps({"id": name, "text": text}, ensure_ascii=False) + "\n")
                    count["documents"] += 1
                    count["bytes"] += len(text.encode())
                    if count["bytes"] >= targets[split]:
                        break
            if not count["documents"]:
                raise UserError(
                    f"domain {domain.name!r} ({domain.source}) has no text left for its {split} "
                    "split: ask for fewer bytes, or run `make install` again"
                )
            if count["bytes"] < targets[split]:
                short = f"{count['bytes']:,} of {targets[split]:,} bytes"
                if split == "train":
                    raise UserError(
                        f"domain {domain.name!r} ({domain.source}) has {short} for its train "
                        "split: ask for fewer bytes"
                    )
                progress(f"{domain.title}: {split} has only {short}, all there is")
            os.replace(partial, path)
            counts[domain.name][split] = count
        sizes = ", ".join(
            f"{split} {counts[domain.name][split]['bytes'] / 1e6:.2f} MB"
            for split in counts[domain.name]
        )
        progress(f"{domain.title}: {sizes}")
    return counts


def main(argv: Sequence[str]) -> int:
    parser = OneLineParser(description="Gather text from this Python installation.")
    parser.add_argument("folder", type=Path, help="where <domain>.<split>.jsonl are written")
    for split in SPLITS:
        parser.add_argument(
            f"--{split}-bytes", type=int, required=True, help=f"bytes of {split} text per domain"
        )
    args = parser.parse_args(argv)
    wanted = args.train_bytes, args.valid_bytes, args.test_bytes

    def work() -> None:
        gather(args.folder, *wanted, print)

    return program_status(work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
