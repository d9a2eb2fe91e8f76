"""Damaged, compressed and mixed files of checkpoints: told, never taken for numbers."""

import re
import shutil
import zipfile

import pytest
import torch
from command_runs import EVAL, TRAIN
from command_runs import MOE as SPARSE
from fairseq import checkpoint_utils
from training import error_in

from fairseq_moe_ext.cli import main
from fairseq_moe_ext.convert import writing
from fairseq_moe_ext.errors import UserError
from fairseq_moe_ext.files import digest_of
from fairseq_moe_ext.locks import Lock, beside


def flip(path, record="data/0"):
    """Change one byte in the middle of a record."""
    with zipfile.ZipFile(path) as file:
        name = next(n for n in file.namelist() if n.endswith("/" + record))
        info = file.getinfo(name)
    with open(path, "r+b") as stream:
        stream.seek(info.header_offset + 26)
        lengths = stream.read(4)
        start = info.header_offset + 30 + lengths[0] + 256 * lengths[1]
        start += lengths[2] + 256 * lengths[3]
        stream.seek(start + info.file_size // 2)
        byte = stream.read(1)[0]
        stream.seek(-1, 1)
        stream.write(bytes([byte ^ 0x40]))


def rezip(source, target):
    """As `unzip` and `zip` do."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))


@pytest.fixture
def one(trained, tmp_path):
    return shutil.copy(trained / "checkpoint_last.pt", tmp_path / "one.pt")


@pytest.fixture
def spread(one, tmp_path):
    assert (
        main(["convert", str(one), str(tmp_path / "s" / "spread.pt"), "--expert-files", "4"]) == 0
    )
    return tmp_path / "s" / "spread.pt"


@pytest.fixture
def branch(one, tmp_path):
    target = tmp_path / "b" / "branch.pt"
    assert main(["convert", str(one), str(target), "--to", "branch", "--rank-files", "2"]) == 0
    return target


def pieces(spread):
    return sorted((spread.parent / "experts").iterdir())


def model_of(path):
    model = checkpoint_utils.load_checkpoint_to_cpu(str(path))["model"]
    return {name: value.clone() for name, value in model.items()}  # not the file's own memory


def test_a_compressed_file_has_the_same_numbers(one, spread, tmp_path):
    expected = model_of(one)
    rezip(one, tmp_path / "zip.pt")
    found = model_of(tmp_path / "zip.pt")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert main(["convert", str(tmp_path / "zip.pt"), str(tmp_path / "again.pt")]) == 0
    found = model_of(tmp_path / "again.pt")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("record", ["data/0", "data/5", "data.pkl"])
def test_a_flipped_bit_is_told(record, one, command, data, capsys):
    flip(one, record)
    for name, line in (
        ("eval_lm", f"{data} {EVAL} --path {one}"),
        ("train", f"{data} {TRAIN} {SPARSE} --no-save --save-dir {one}.d --restore-file {one}"),
    ):
        status, _, _, err = command(name, line)
        assert status == 1 and f"{one}: Bad CRC-32" in error_in(err)
    assert main(["convert", str(one), f"{one}.pt"]) == 1
    assert "Bad CRC-32" in capsys.readouterr().err


def test_a_flipped_bit_in_a_file_of_experts_is_told(spread, capsys):
    flip(pieces(spread)[2])
    with pytest.raises(UserError, match="not the bytes that .*spread.pt was saved with"):
        model_of(spread)
    assert main(["convert", str(spread), f"{spread}.pt"]) == 1
    assert pieces(spread)[2].name in capsys.readouterr().err


def without_digests(spread, change=lambda manifest: None):
    """As older versions wrote it."""
    state = torch.load(spread, weights_only=False)
    for file in state["experts"]["files"]:
        del file["sha256"]
    change(state["experts"])
    torch.save(state, spread)


def fit_sizes(spread, manifest):
    for file in manifest["files"]:
        file["bytes"] = (spread.parent / file["name"]).stat().st_size


def test_an_older_manifest_loads_and_its_files_are_checked_by_their_crc(spread):
    expected = model_of(spread)
    without_digests(spread)
    found = model_of(spread)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    flip(pieces(spread)[0])
    with pytest.raises(UserError, match="Bad CRC-32"):
        model_of(spread)


def test_a_file_of_experts_without_optimizer_state_is_told(spread, command, data):
    part = pieces(spread)[1]
    state = torch.load(part, weights_only=False)
    torch.save({**state, "optimizer": {}}, part)
    without_digests(spread, lambda manifest: fit_sizes(spread, manifest))
    train = f"{data} {TRAIN} {SPARSE} --no-save --save-dir {spread}.d --restore-file {spread}"
    status, _, _, err = command("train", train)
    assert status == 1 and "is missing for experts 2 to 3, but not for others" in err
    assert command("train", train + " --reset-optimizer")[0] == 0
    assert main(["convert", str(spread), f"{spread}.1.pt"]) == 1
    assert main(["convert", str(spread), f"{spread}.2.pt", "--weights-only"]) == 0


def judged(path, capsys):
    capsys.readouterr()
    status = main(["verify", str(path)])
    out, err = capsys.readouterr()
    lines = dict(line.split(": ", 1) for line in out.splitlines())
    return status, lines, err


@pytest.mark.parametrize("text", ["hello world\n", "just text\n", ""])
def test_verify_calls_what_is_no_checkpoint_damaged_and_never_ok(text, tmp_path, capsys):
    (tmp_path / "t.txt").write_text(text)
    assert main(["verify", str(tmp_path / "t.txt")]) == 1
    out, err = capsys.readouterr()
    assert ": ok" not in out and out.count("t.txt: damaged") == 1 and err.count("\n") == 1
    said = rf"\({len(text)} bytes\); copy it again, or name another$"
    assert re.search(said, err.strip())


def test_verify_says_of_each_file_how_it_is(one, spread, branch, capsys):
    for path, count in ((one, 1), (spread, 5), (branch, 3)):
        status, lines, err = judged(path, capsys)
        assert status == 0 and not err and set(lines.values()) == {"ok"} and len(lines) == count
    flip(one)
    assert judged(one, capsys)[:2] == (1, {str(one): judged(one, capsys)[1][str(one)]})
    damaged = [pieces(spread)[0], pieces(spread)[3]]
    for part in damaged:
        flip(part)
    status, lines, err = judged(spread, capsys)
    assert status == 1 and [n for n, line in lines.items() if line != "ok"] == list(
        map(str, damaged)
    )
    assert err.startswith("error: 2 of 5 files are damaged: ") and err.count("\n") == 1
    flip(branch.with_name("branch-rank-1.pt"))
    status, lines, err = judged(branch, capsys)
    assert status == 1
    assert [n for n, line in lines.items() if line != "ok"] == [
        str(branch.with_name("branch-rank-1.pt"))
    ]


def test_verify_tells_what_is_missing_cut_short_or_of_another_save(spread, one, tmp_path, capsys):
    other = tmp_path / "o" / "spread.pt"
    assert main(["convert", str(one), str(other), "--expert-files", "4"]) == 0
    part = pieces(spread)[1]
    kept = part.read_bytes()
    shutil.copy(pieces(other)[1], part)
    assert judged(spread, capsys)[0] == 1
    without_digests(spread)
    assert "the files come from two runs" in judged(spread, capsys)[2]
    part.write_bytes(kept[:-100])
    assert judged(spread, capsys)[0] == 1
    part.unlink()
    status, _, err = judged(spread, capsys)
    assert status == 1 and "missing; it holds experts 2 to 3" in err
    with open(one, "r+b") as stream:
        stream.truncate(1000)
    assert judged(one, capsys)[0] == 1


@pytest.mark.parametrize("name", ["nothing.pt", "nofolder", "nofolder/x"])
def test_verify_calls_a_wrong_path_no_damage(name, tmp_path, capsys):
    path = tmp_path / name
    err = f"error: {path}: no such checkpoint; check the path\n"
    assert judged(path, capsys) == (1, {str(path): "no such checkpoint"}, err)


@pytest.mark.parametrize("kind", ["composite", "one moment of all experts", "the branch's"])
def test_verify_calls_no_optimizer_state_damaged_that_cannot_be_converted(
    one, spread, branch, kind, capsys
):
    path = {"composite": one, "the branch's": branch}.get(kind, spread)
    if kind == "composite":
        state = torch.load(one, weights_only=False)
        state["last_optimizer_state"] = {"decoder": state["last_optimizer_state"]}
        torch.save(state, one)
    elif kind == "the branch's":
        shared = branch.with_name("branch-shared.pt")
        state = torch.load(shared, weights_only=False)
        state["last_optimizer_state"]["param_groups"] *= 2
        torch.save(state, shared)
    else:
        for file in pieces(spread):
            state = torch.load(file, weights_only=False)
            for moments in state["optimizer"].values():
                moments["exp_avg"] = torch.zeros(3)
            torch.save(state, file)
        without_digests(spread, lambda manifest: fit_sizes(spread, manifest))
    assert main(["convert", str(path), f"{one}.1.pt"]) == 1
    capsys.readouterr()
    assert main(["verify", str(path)]) == 0
    out, err = capsys.readouterr()
    assert "only its weights can be converted: " in out
    assert "add --" not in out and "damaged" not in out and not err
    assert main(["convert", str(path), f"{one}.2.pt", "--weights-only"]) == 0


@pytest.mark.parametrize(
    "settings", [{"_name": "transformer_lm", "decoder_normalize_before": False}, {"_name": "bart"}]
)
def test_verify_calls_no_other_model_damaged(one, settings, capsys):
    state = torch.load(one, weights_only=True)
    state["cfg"]["model"] = settings
    torch.save(state, one)
    assert main(["show", str(one)]) == 1
    assert judged(one, capsys)[:2] == (0, {str(one): "ok"})
    flip(one)
    assert judged(one, capsys)[0] == 1


def test_verify_takes_a_folder(trained, tmp_path, capsys):
    status, lines, _ = judged(trained, capsys)
    assert status == 0 and len(lines) == len(list(trained.glob("*.pt"))) > 1
    assert judged(tmp_path, capsys)[0] == 1


def test_verify_goes_on_after_a_checkpoint_that_is_not_there(one, branch, tmp_path, capsys):
    flip(one)
    branch.write_bytes(b"no checkpoint")  # beside branch-rank-0.pt
    missing, good = (
        tmp_path / "none" / "x.pt",
        shutil.copy(branch.parent / "branch-shared.pt", tmp_path / "c.pt"),
    )
    assert main(["verify", str(one), str(missing), str(good), str(branch.parent)]) == 1
    out, err = capsys.readouterr()
    lines = [line.split(": ")[:2] for line in out.splitlines()]
    assert lines[:2] == [[str(one), "damaged"], [str(missing), "no such checkpoint"]]
    assert lines[2][0] == str(good) and [str(branch), "damaged"] in lines
    assert re.match(r"error: \d of \d files are damaged: ", err) and err.count("\n") == 1


def test_verify_lists_files_of_experts_that_no_checkpoint_refers_to(spread, capsys):
    assert len(judged(spread, capsys)[1]) == 5
    folder = spread.parent / "experts"
    left = [f"1-2-{digit * 16}-0-2.pt" for digit in "abcd"]  # as a killed training leaves them
    for name in left:
        (folder / name).write_bytes(b"12345")
    (folder / "notes.txt").write_text("mine", encoding="utf-8")
    status, lines, err = judged(spread, capsys)
    assert status == 0 and not err and len(lines) == 6
    told = lines[str(folder)]
    assert told.startswith("4 unused files (20 bytes)") and told.endswith("and 1 more")
    assert all(name in told for name in left[:3]) and "notes.txt" not in told
    other = spread.with_name("other.pt")
    other.write_bytes(b"no checkpoint")
    status, lines, err = judged(spread, capsys)
    assert status == 0 and "not listed" in lines[str(folder)] and "other.pt" in lines[str(folder)]


def test_the_digest_is_that_of_the_bytes(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    # FIPS 180-2, appendix B.1
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert digest_of(str(tmp_path / "a")) == expected


def test_two_converts_do_not_mix(one, tmp_path, capsys):
    target = tmp_path / "t" / "x.pt"
    target.parent.mkdir()
    with Lock(beside(target), "it"):
        assert main(["convert", str(one), str(target)]) == 1
        assert f"{target} is being worked on by PID" in capsys.readouterr().err
        assert main(["convert", str(one), str(target.with_name("y.pt"))]) == 0
    assert sorted(path.name for path in target.parent.iterdir()) == ["dict.txt", "y.pt"]
    assert main(["convert", str(one), str(tmp_path / "no" / "folder" / "x.txt")]) == 1
    assert main(["convert", str(tmp_path / "none.pt"), str(tmp_path / "no" / "x.pt")]) == 1
    assert not (tmp_path / "no").exists()


def test_what_another_convert_wrote_meanwhile_stays(one, tmp_path, monkeypatch, capsys):
    target = tmp_path / "x.pt"
    stock = writing.alone

    def alone(*args):
        target.write_text("another's")
        return stock(*args)

    monkeypatch.setattr(writing, "alone", alone)
    assert main(["convert", str(one), str(target)]) == 1
    assert "exists; choose another name" in capsys.readouterr().err
    assert target.read_text() == "another's"


def test_files_of_experts_are_not_put_into_the_folder_of_a_running_training(one, tmp_path, capsys):
    with Lock(tmp_path / "lock", "it"):
        line = ["convert", str(one), str(tmp_path / "x.pt")]
        assert main([*line, "--expert-files", "2"]) == 1
        assert f"{tmp_path} is being worked on by PID" in capsys.readouterr().err
        assert not (tmp_path / "experts").exists()
        assert main(line) == 0
