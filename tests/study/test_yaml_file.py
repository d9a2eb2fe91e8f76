"""YAML that is no YAML, too deep or too large is one line."""

import os

import pytest

from fairseq_moe_ext.errors import UserError
from fairseq_moe_ext.study import yaml_file

BOMB = "a0: &a0 [x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 20)
)
MERGES = "a0: &a0 {x: 1}\n" + "".join(
    f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 20)
)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"a: [1", "not YAML "),
        (b"a: \xe9", r"not UTF-8 at byte 3 \(0xe9\)"),
        (b"\xff\xfea\0", r"not UTF-8 at byte 0 \(0xff\)"),
        (b"[" * 100_000, "nested too deep"),
        (b"a: &a [*a]", "nested too deeply, or contains itself"),
        (BOMB.encode(), "more than 100000 values after its aliases are expanded"),
        (MERGES.encode(), "more than 100000 values after its aliases are expanded"),
        (b"a: 2001-99-99", "not YAML .*month"),
        (b"a: !!int x", "not YAML "),
        (b"a: !!python/object/apply:os.system [x]", "not YAML .*python/object"),
        (b"a: 1\n---\nb: 2", "not YAML "),
        (b"a: \0", "not YAML "),
        (b"{[a]: 1}", "not YAML "),
        (b"{1: a, '1': b}", "not YAML .the key 1 appears twice"),
        (b"{01: b}", "not YAML .the key 01 means 1; write it in quotes"),
        (b"{1: a, 01: b}", "not YAML .the keys 1 and 01 are equal; write them in quotes"),
        (b"{1: a, 1.0: b}", "not YAML .the keys 1 and 1.0 are equal; write them in quotes"),
        (b"{1: a, on: b}", "not YAML .the keys 1 and on are equal; write them in quotes"),
        (b"{on: a, yes: b}", "not YAML .the keys on and yes are equal; write them in quotes"),
        (b"a: {010: b}", "not YAML .the key 010 means 8; write it in quotes"),
        (b"1.50: a", "not YAML .the key 1.50 means 1.5; write it in quotes"),
        (b"12:30: a", "not YAML .the key 12:30 means 750; write it in quotes"),
        (b"2001-99-99: a", "not YAML .*month"),
    ],
)
def test_what_is_not_read_is_named(tmp_path, content, message):
    (tmp_path / "a.yaml").write_bytes(content)
    with pytest.raises(UserError, match=rf"a\.yaml: {message}") as caught:
        yaml_file.read(tmp_path / "a.yaml")
    assert "\n" not in str(caught.value)


def test_what_is_no_file_is_named(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for name, message in (("fifo", "a FIFO"), ("none", "cannot be read"), (".", "a folder")):
        with pytest.raises(UserError, match=message):
            yaml_file.read(tmp_path / name)


def test_keys_are_read(tmp_path):
    text = "2: a\n'01': b\n1.5: c\n2001-02-03: d\n1e-2: e\non: f\n"
    (tmp_path / "a.yaml").write_text(text, encoding="utf-8")
    found = yaml_file.read(tmp_path / "a.yaml")
    assert list(map(str, found)) == ["2", "01", "1.5", "2001-02-03", "1e-2", "True"]


def test_aliases_are_read(tmp_path):
    (tmp_path / "a.yaml").write_text("a: &a {x: 1}\nb: *a\nc: {<<: *a, y: 2}\n", encoding="utf-8")
    found = yaml_file.read(tmp_path / "a.yaml")
    assert found == {"a": {"x": 1}, "b": {"x": 1}, "c": {"x": 1, "y": 2}}
    (tmp_path / "a.yaml").write_text("", encoding="utf-8")
    assert yaml_file.read(tmp_path / "a.yaml") is None
