"""Files inside the packages that text.py fetches: wheels, Debian packages, npm tarballs."""

import gzip
import io
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import BinaryIO, Callable, Dict, Iterator, List, Tuple
from urllib.parse import unquote

from fairseq_moe_ext.errors import UserError

File = Tuple[str, bytes]  # name inside the package, content; .gz and .dz are unpacked

_FETCH: Dict[str, Callable[[str], List[str]]] = {
    "pip": lambda package: [
        *(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"),
        *("--only-binary", ":all:", package),
    ],
    "apt": lambda package: ["apt-get", "download", "-q", package],
    "npm": lambda package: ["npm", "pack", "--silent", package],
}
_VERSION = {"pip": "==", "apt": "=", "npm": "@"}


def fetch(kind: str, name: str, version: str, folder: Path) -> Path:
    """The package's archive in folder, fetched unless that version is there ("": any of Debian's).
    Raises UserError where the tool or the package is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    there = [path for path in sorted(folder.iterdir()) if _is_of(path, kind, name, version)]
    if there:
        return there[-1]
    package = f"{name}{_VERSION[kind]}{version}" if version else name
    command = _FETCH[kind](package)
    if shutil.which(command[0]) is None:
        raise UserError(f"{command[0]} is not installed")
    work = folder / "fetching"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    done = subprocess.run(command, cwd=work, capture_output=True, text=True)
    got = [path for path in work.iterdir() if _is_of(path, kind, name, version)]
    if done.returncode != 0 or not got:
        last = (done.stderr.strip() or done.stdout.strip() or "nothing came").splitlines()[-1]
        raise UserError(f"{kind} cannot fetch {package}: {last}")
    archive = got[0].replace(folder / got[0].name)
    shutil.rmtree(work)
    return archive


def _is_of(path: Path, kind: str, name: str, version: str) -> bool:
    """Whether a file is named as this version of a package is."""
    patterns = {"pip": f"*-{version}-*.whl", "apt": f"{name}_*.deb", "npm": f"*-{version}.tgz"}
    return path.is_file() and path.match(patterns[kind])


def version_of(package: Path) -> str:
    """Of a Debian package, by its name: package_version_architecture.deb."""
    return unquote(package.name.split("_")[1])


def files(archive: Path, wanted: Callable[[str], bool]) -> Iterator[File]:
    """The files whose name is wanted, in the archive's order."""
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as wheel:
            for name in wheel.namelist():
                if wanted(name):
                    yield name, _unpacked(name, wheel.read(name))
        return
    with open(archive, "rb") as stream:
        if archive.suffix == ".deb":
            yield from _of_tar(_member(stream, "data.tar"), wanted)
        else:
            yield from _of_tar(stream, wanted)


def _of_tar(stream: BinaryIO, wanted: Callable[[str], bool]) -> Iterator[File]:
    with tarfile.open(fileobj=stream, mode="r:*") as tar:
        for member in tar:
            if not member.isfile():
                continue
            inside = tar.extractfile(member)
            assert inside is not None  # it is a file
            if member.name.endswith(".tar.xz"):  # the kernel's sources
                yield from _of_tar(inside, wanted)
            elif wanted(member.name):
                yield member.name, _unpacked(member.name, inside.read())


def _member(stream: BinaryIO, prefix: str) -> BinaryIO:
    """A member of a Debian package, which is an `ar` archive: headers of 60 bytes, the name in the
    first 16, the size in ten from 48."""
    if stream.read(8) != b"!<arch>\n":
        raise UserError(f"{stream.name}: not a Debian package; remove it to fetch it again")
    while header := stream.read(60):
        size = int(header[48:58])
        name = header[:16].decode().strip()
        if name.startswith(prefix):
            if name.endswith(".zst") and "zst" not in tarfile.TarFile.OPEN_METH:
                raise UserError(
                    f"{stream.name}: packed with zstd, which needs Python 3.14 or later"
                )
            return io.BytesIO(stream.read(size))
        stream.seek(size + size % 2, io.SEEK_CUR)
    raise UserError(f"{stream.name}: has no {prefix}; remove it to fetch it again")


def _unpacked(name: str, content: bytes) -> bytes:
    return gzip.decompress(content) if name.endswith((".gz", ".dz")) else content
