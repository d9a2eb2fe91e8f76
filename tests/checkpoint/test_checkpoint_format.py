"""The format of checkpoints with expert files: what stands on disk, and that one file names it."""

import ast
from dataclasses import fields, replace
from pathlib import Path

import pytest

from fairseq_moe_ext.checkpoint.format import (
    MANIFEST,
    VERSION,
    ExpertFile,
    Manifest,
    Piece,
    file_name,
    is_piece,
    new_save,
)
from fairseq_moe_ext.errors import UserError

PACKAGE = Path(__file__).parents[2] / "fairseq_moe_ext"

# as it stands on disk since version 1
SAVED = {
    "format": 1,
    "save": "3-12-0123456789abcdef",
    "num_experts": 4,
    "indices": {"l.experts.fc1.weight": 2},
    "files": [
        {"name": "experts/a.pt", "first": 0, "count": 2, "bytes": 10, "sha256": "f"},
        {"name": "experts/b.pt", "first": 2, "count": 2, "bytes": 11},
    ],
    "world_size": 2,
    "code": "some version",
}


def test_a_manifest_is_read_and_written_as_on_disk():
    manifest = Manifest.read("x.pt", {"experts": SAVED, "model": {}})
    assert manifest == Manifest(
        "3-12-0123456789abcdef",
        4,
        {"l.experts.fc1.weight": 2},
        [ExpertFile("experts/a.pt", 0, 2, 10, "f"), ExpertFile("experts/b.pt", 2, 2, 11)],
        2,
        "some version",
    )
    assert manifest.write() == SAVED and MANIFEST == "experts"
    assert manifest.files[1].path("/runs/x.pt") == "/runs/experts/b.pt"


def test_what_has_no_manifest():
    assert Manifest.read("x.pt", {"model": {}}) is None


def test_later_keys_of_the_same_version_are_passed_over():
    assert Manifest.read("x.pt", {"experts": {**SAVED, "later": 1}}).write() == SAVED


def test_a_newer_version_is_refused():
    with pytest.raises(
        UserError, match="x.pt: has format 2.*reads formats up to 1: install the version"
    ):
        Manifest.read("x.pt", {"experts": {"format": VERSION + 1}})


@pytest.mark.parametrize(
    "saved",
    [{}, None, 3, [], {"format": "one"}, {"format": 1}, {**SAVED, "files": [{"name": "a"}]},
     {**SAVED, "files": 3}, {k: v for k, v in SAVED.items() if k != "indices"}],
    ids=str,
)  # fmt: skip
def test_a_damaged_manifest_is_one_line(saved):
    with pytest.raises(UserError, match="^x.pt: its list of expert files .* damaged") as caught:
        Manifest.read("x.pt", {"experts": saved})
    assert "\n" not in str(caught.value)


def test_a_piece_is_read_and_written_as_on_disk():
    saved = {"save": "s", "first": 2, "count": 2, "model": {"n": 0}, "optimizer": {"n": {}}}
    piece = Piece.read(saved)
    assert piece == Piece("s", 2, 2, {"n": 0}, {"n": {}}) and piece.write() == saved
    assert is_piece(saved) and not is_piece({"model": {}, "experts": SAVED})
    assert replace(piece, first=0).write()["first"] == 0


def test_each_save_has_a_name_of_its_own():
    state = {
        "optimizer_history": [{"num_updates": 1}, {"num_updates": 12}],
        "extra_state": {"train_iterator": {"epoch": 3}},
    }
    names = {new_save(state) for _ in range(3)} | {new_save({})}
    assert len(names) == 4
    assert sorted(name.rsplit("-", 1)[0] for name in names) == ["1-0", "3-12", "3-12", "3-12"]
    assert file_name("3-12-ab", 2, 4) == "experts/3-12-ab-2-4.pt"


# "model", "optimizer" and "name" have other meanings, too
KEYS = {f.name for kind in (ExpertFile, Manifest, Piece) for f in fields(kind)}
KEYS = (KEYS | {MANIFEST, "format"}) - {"model", "optimizer", "name"}


def keys_in(text):
    """String literals that stand where keys stand."""
    for node in ast.walk(ast.parse(text)):
        found = []
        if isinstance(node, ast.Subscript):
            found = [node.slice]
        elif isinstance(node, ast.Dict):
            found = node.keys
        elif isinstance(node, ast.Compare):
            found = [node.left]
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") in ("get", "pop"):
            found = node.args[:1]
        yield from (key.value for key in found if isinstance(key, ast.Constant))


ROOMS = [p for room in ("checkpoint", "branch", "convert") for p in (PACKAGE / room).glob("*.py")]


@pytest.mark.parametrize("path", ROOMS, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_no_other_file_names_the_keys(path):
    if path.name == "format.py":
        return
    others = {"branch/writing.py": {"world_size"}}  # a setting's value
    others["convert/archive.py"] = {"format"}  # of safetensors
    others["branch/parts.py"] = {"experts"}  # a regular expression's group
    others["convert/show.py"] = {"experts", "files", "bytes", "count"}  # of its own JSON
    others["checkpoint/trained.py"] = {"count"}  # of fairseq's meters
    others["convert/hf.py"] = {"num_experts"}  # of config.json
    allowed = others.get(f"{path.parent.name}/{path.name}", set())
    assert not KEYS & set(keys_in(path.read_text(encoding="utf-8"))) - allowed


def test_the_search_would_notice():
    lines = 'a["save"]', '{"first": 1}', '"experts" in a', 'a.get("files", ())', 'a.pop("count")'
    for line in lines:
        assert KEYS & set(keys_in(line))
