"""A checkpoint is used with the dictionary that it was trained with, or is refused."""

import hashlib
import shutil
from pathlib import Path

import pytest
import torch
from fairseq.data import Dictionary
from training import USER_DIR, fairseq

from fairseq_moe_ext import cli
from fairseq_moe_ext.errors import UserError
from fairseq_moe_ext.fingerprint import KEY, fingerprint
from fairseq_moe_ext.models.language_model import MoETransformerLanguageModel

MODEL = """--decoder-layers 2 --decoder-embed-dim 16 --decoder-ffn-embed-dim 16
    --decoder-attention-heads 2"""
LM = """--criterion moe_cross_entropy --tokens-per-sample 32 --best-checkpoint-metric loss"""
RUN = """--optimizer adam --lr 0.01 --batch-size 8 --cpu --num-workers 0 --no-epoch-checkpoints"""


def raising(name, line):
    """Raises UserError for a mistake, whatever the command makes of it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOGLEVEL", "DEBUG")  # no one-line errors, but the exceptions
        fairseq(f"fairseq-{name} {line} --user-dir {USER_DIR}")


def train(data, folder, task="mixture_language_modeling", flags="", updates=1):
    line = f"{data} --task {task} --arch moe_lm_tiny --moe-expert-count 2 {MODEL} {LM} {RUN}"
    raising("train", f"{line} --max-update {updates} --save-dir {folder} {flags}")
    return folder / "checkpoint_last.pt"


@pytest.fixture(scope="module")
def checkpoint(data, tmp_path_factory):
    return train(data, tmp_path_factory.mktemp("fingerprint"))


def changed(data, folder, change):
    """A copy of the data folder with changed lines in every dict.txt."""
    shutil.copytree(data, folder)
    for file in folder.rglob("dict.txt"):
        lines = file.read_text(encoding="utf-8").splitlines()
        change(lines)
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def exchange(lines):
    lines[3], lines[4] = lines[4], lines[3]


@pytest.fixture(scope="module")
def other(data, tmp_path_factory):
    """The data with another dictionary of the same size."""
    return changed(data, tmp_path_factory.mktemp("other") / "data", exchange)


def test_the_fingerprint_is_of_the_symbols_in_their_order(data, checkpoint):
    lines = (data / "dict.txt").read_text(encoding="utf-8").splitlines()
    symbols = ["<s>", "<pad>", "</s>", "<unk>", *(line.rsplit(" ", 1)[0] for line in lines)]
    assert symbols[-1].startswith("madeupword"), "the data has filling"
    real = [symbol for symbol in symbols if not symbol.startswith("madeupword")]
    digest = hashlib.sha256("".join(f"{symbol}\n" for symbol in real).encode()).hexdigest()
    expected = {"sha256": digest, "types": len(real)}
    assert torch.load(checkpoint, weights_only=True)["task_state"][KEY] == expected
    assert fingerprint(Dictionary.load(str(data / "dict.txt"))) == expected


def test_every_task_saves_it(data, choices, tmp_path, checkpoint):
    expected = torch.load(checkpoint, weights_only=True)["task_state"][KEY]
    stock = train(data / "mid", tmp_path / "stock", "language_modeling")
    line = f"""{data} --task multiple_choice --choice-data {choices} --criterion multiple_choice
        --arch moe_lm_tiny --moe-expert-count 2 {MODEL} {RUN} --max-update 1 --tokens-per-sample 64
        --best-checkpoint-metric loss --save-dir {tmp_path / "choice"}"""
    raising("train", line)
    for path in (stock, tmp_path / "choice" / "checkpoint_last.pt"):
        assert torch.load(path, weights_only=True)["task_state"][KEY] == expected


def entry_points(checkpoint, tmp_path):
    lm = f"--path {checkpoint} --cpu --num-workers 0 --batch-size 4"
    part = "--task language_modeling --tokens-per-sample 32 --gen-subset valid"
    tune = f"--criterion moe_cross_entropy --finetune-from-model {checkpoint}"
    restore = f"--restore-file {checkpoint}"
    reset = f"{restore} --reset-optimizer --reset-dataloader --reset-meters"
    return {
        "eval-lm": lambda data: raising("eval_lm", f"{data / 'mid'} {lm} {part}"),
        "validate": lambda data: raising(
            "validate", f"{data} {lm} --task mixture_language_modeling --valid-subset valid/small"
        ),
        "generate": lambda data: raising(
            "generate",
            f"{data / 'small'} {lm} {part} --sample-break-mode eos --max-len-b 2 --beam 1 --quiet",
        ),
        "evaluate": lambda data: command(f"evaluate {data} --path {checkpoint} --cpu"),
        "from_pretrained": lambda data: MoETransformerLanguageModel.from_pretrained(
            str(checkpoint.parent), checkpoint.name, str(data)
        ),
        "finetune": lambda data: train(data, tmp_path / "t", flags=tune),
        "restore": lambda data: train(data, tmp_path / "r", flags=restore, updates=2),
        "reset": lambda data: train(data, tmp_path / "s", flags=reset, updates=2),
    }


def command(line):
    args = cli.parser_of(line.split()[0]).parse_args(line.split())
    args.run(args)


@pytest.mark.parametrize("name", list(entry_points(Path("x.pt"), Path("."))))
def test_another_dictionary_of_the_same_size_is_refused(name, data, other, checkpoint, tmp_path):
    run = entry_points(checkpoint, tmp_path)[name]
    with pytest.raises(UserError) as error:
        run(other)
    message = str(error.value)
    assert "dict.txt: not the dictionary of " in message and str(checkpoint) in message
    for folder in (data, other):  # both fingerprints
        assert fingerprint(Dictionary.load(str(folder / "dict.txt")))["sha256"][:12] in message
    run(data)


@pytest.fixture(scope="module")
def other_bpe(data, tmp_path_factory):
    """The data beside other BPE with the same dictionary: the merges in another order."""
    folder = changed(data, tmp_path_factory.mktemp("bpe") / "data", lambda lines: None)
    first, *merges = (data / "vocab.bpe").read_text().splitlines()
    (folder / "vocab.bpe").write_text("\n".join([first, *reversed(merges)]) + "\n")
    return folder


@pytest.mark.parametrize("name", list(entry_points(Path("x.pt"), Path("."))))
def test_other_bpe_with_the_same_dictionary_is_refused(name, other_bpe, checkpoint, tmp_path):
    """All BPEs of one size have the same symbols."""
    with pytest.raises(UserError) as error:
        entry_points(checkpoint, tmp_path)[name](other_bpe)
    message = f"{other_bpe}/vocab.bpe: does not belong to the tokenizer of {checkpoint} "
    assert str(error.value).startswith(message)


def test_so_is_that_of_a_second_folder(data, other_bpe, checkpoint, tmp_path):
    (tmp_path / "more").mkdir()
    for name in ("dict.txt", "encoder.json", "vocab.bpe"):
        shutil.copy(other_bpe / name, tmp_path / "more")
    shutil.copytree(other_bpe / "far", tmp_path / "more" / "new")
    with pytest.raises(UserError, match="more/vocab.bpe: does not belong to the tokenizer of"):
        command(f"evaluate {data} {tmp_path / 'more'} --path {checkpoint} --cpu")


@pytest.mark.parametrize("name", ["eval-lm", "validate", "evaluate", "finetune", "restore"])
def test_a_folder_without_bpe_is_accepted(name, data, checkpoint, tmp_path):
    alone = changed(data, tmp_path / "data", lambda lines: None)
    for file in ("encoder.json", "vocab.bpe"):
        (alone / file).unlink()
    entry_points(checkpoint, tmp_path)[name](alone)


@pytest.mark.parametrize("name", ["eval-lm", "evaluate", "finetune"])
def test_a_checkpoint_without_digests_is_used_with_any_bpe(name, other_bpe, checkpoint, tmp_path):
    state = torch.load(checkpoint, weights_only=False)
    del state["task_state"]["tokenizer"]
    torch.save(state, tmp_path / "old.pt")
    entry_points(tmp_path / "old.pt", tmp_path)[name](other_bpe)


def test_a_smaller_dictionary_is_another_one(data, checkpoint, tmp_path):
    """Padding it would only hide that."""
    small = changed(data, tmp_path / "data", lambda lines: lines.__delitem__(slice(50, None)))
    for name in ("evaluate", "from_pretrained"):
        with pytest.raises(UserError, match="not the dictionary of .*it has 54 symbols, the ") as e:
            entry_points(checkpoint, tmp_path)[name](small)
        assert str(small) in str(e.value) and str(checkpoint) in str(e.value)
        assert "madeupword" not in str(e.value)


def test_missing_padding_is_named(data, checkpoint, tmp_path):
    symbols = fingerprint(Dictionary.load(str(data / "dict.txt")))["types"] - 4  # of the file
    shorter = changed(
        data, tmp_path / "data", lambda lines: lines.__delitem__(slice(symbols, None))
    )
    with pytest.raises(UserError, match="has a vocabulary of .*, or append [0-9]+ lines: madeup"):
        entry_points(checkpoint, tmp_path)["evaluate"](shorter)


def test_priming_refuses_it(other, checkpoint):
    from fairseq_moe_ext.priming.model import load

    with pytest.raises(UserError, match="dict.txt: not the dictionary of "):
        load(checkpoint, other, cpu=True)


def test_a_run_does_not_go_on_with_it(data, tmp_path):
    copy = changed(data, tmp_path / "data", lambda lines: None)
    train(copy, tmp_path / "run")
    shutil.rmtree(copy)
    changed(data, copy, exchange)
    with pytest.raises(UserError, match="not the dictionary of .*run/checkpoint_last.pt"):
        train(copy, tmp_path / "run", updates=2)


def counts(lines):
    lines[:] = [f"{line.rsplit(' ', 1)[0]} 7" for line in lines]


def new_symbols_for_filling(lines):
    lines[-1] = "new 0"


def other_filling(lines):
    lines[-1] = "madeupword9999 0"


@pytest.mark.parametrize("change", [counts, new_symbols_for_filling, other_filling])
def test_what_changes_no_id_is_accepted(data, checkpoint, tmp_path, change):
    run = entry_points(checkpoint, tmp_path)["evaluate"]
    run(changed(data, tmp_path / "data", change))


def test_a_checkpoint_without_one_is_judged_by_its_size(other, checkpoint, tmp_path):
    state = torch.load(checkpoint, weights_only=False)
    del state["task_state"][KEY]
    torch.save(state, tmp_path / "old.pt")
    command(f"evaluate {other} --path {tmp_path / 'old.pt'} --cpu")
    del state["task_state"]
    torch.save(state, tmp_path / "older.pt")
    command(f"evaluate {other} --path {tmp_path / 'older.pt'} --cpu")


def test_converted_checkpoints_keep_it(data, other, checkpoint, tmp_path):
    spread, branch = tmp_path / "spread" / "x.pt", tmp_path / "branch" / "x.pt"
    command(f"convert {checkpoint} {spread} --expert-files 2")
    command(f"convert {checkpoint} {branch} --to branch --rank-files 2 --weights-only")
    command(f"convert {branch} {tmp_path / 'back.pt'} --weights-only")
    dense = tmp_path / "dense"
    line = f"{data} --task mixture_language_modeling --arch dense_lm_tiny {MODEL} {LM} {RUN}"
    raising("train", f"{line} --max-update 1 --save-dir {dense}")
    up = "--upcycle --moe-freq 2 --moe-expert-count 2"
    command(f"convert {dense / 'checkpoint_last.pt'} {tmp_path / 'up.pt'} {up}")
    for path in (spread, branch, tmp_path / "back.pt", tmp_path / "up.pt"):
        command(f"evaluate {data} --path {path} --cpu")
        with pytest.raises(UserError, match="not the dictionary of"):
            command(f"evaluate {other} --path {path} --cpu")
