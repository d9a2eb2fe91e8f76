"""Every figure says how much of the data it is over; over nothing, or NaN, there is none."""

import math
import re
import shutil
from collections import Counter, defaultdict
from types import SimpleNamespace

import fairseq_cli.eval_lm  # noqa: F401 - sets up logging, outside of capsys
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import training
from fairseq import tasks
from fairseq.data.indexed_dataset import MMapIndexedDataset
from fairseq.trainer import Trainer
from fairseq_cli import train
from mixture_data import configure, make_task, tokens_of
from omegaconf import OmegaConf
from training import error_in

import fairseq_moe_ext
from fairseq_moe_ext import cli, counted
from fairseq_moe_ext.criterions.moe_cross_entropy import MoECrossEntropyConfig
from fairseq_moe_ext.errors import UserError

CONTEXT = 32
SHAPE = f"""--arch moe_lm_tiny --moe-expert-count 2 --decoder-layers 2 --decoder-embed-dim 16
    --decoder-ffn-embed-dim 32 --decoder-attention-heads 2 --tokens-per-sample {CONTEXT}
    --criterion moe_cross_entropy --optimizer adam --lr 0.01 --batch-size 8"""
FIT = "with --sample-break-mode none or --shorten-method truncate"


def command(capsys, caplog, name, line):
    """Status, standard error and log of a command of fairseq within this process."""
    line += f" --user-dir {fairseq_moe_ext.__path__[0]} --cpu --num-workers 0"
    capsys.readouterr()
    caplog.clear()
    with caplog.at_level("INFO"):
        status = training.status_of(f"fairseq-{name} {line}")
    return status, capsys.readouterr().err, caplog.text


@pytest.fixture
def fairseq(capsys, caplog):
    return lambda name, line: command(capsys, caplog, name, line)


@pytest.fixture(scope="module")
def checkpoint(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("counted")
    line = f"""fairseq-train {data} --task mixture_language_modeling {SHAPE} --max-update 2
        --user-dir {fairseq_moe_ext.__path__[0]} --cpu --num-workers 0 --save-dir {folder}"""
    training.fairseq(line)
    return folder / "checkpoint_last.pt"


@pytest.fixture(scope="module")
def broken(checkpoint, tmp_path_factory):
    """The same with NaN behind the last router."""
    state = torch.load(checkpoint, weights_only=False)
    state["model"]["decoder.layer_norm.weight"][0] = float("nan")
    path = tmp_path_factory.mktemp("broken") / "nan.pt"
    torch.save(state, path)
    return path


def eval_lm(data, checkpoint, corpus="big", flags=""):
    return (
        f"{data / corpus} --path {checkpoint} --gen-subset valid --tokens-per-sample {CONTEXT} "
        f"--batch-size 4 {flags}"
    )


def sizes_of(data):
    stored = MMapIndexedDataset(str(data / "big" / "valid"))  # `sizes` lives only as long as it
    return stored.sizes.copy()


def blocks(sizes, limit):
    """What --sample-break-mode complete makes of sentences, by a plain loop."""
    found, now = [], 0
    for size in sizes:
        if now and now + size > limit:
            found.append(now)
            now = 0
        now += size
    return [*found, now] if now else found


def test_all_tokens_are_counted_without_a_word(fairseq, data, checkpoint):
    for flags in ("", "--context-window 8", "--add-bos-token", "--sample-break-mode complete"):
        status, _, log = fairseq("eval_lm", eval_lm(data, checkpoint, flags=flags))
        assert status == 0 and "Perplexity" in log, flags
        assert not re.search(r"counted [\d,]+ of", log), flags


@pytest.mark.parametrize("mode", ["none", "complete", "eos", "complete_doc"])
def test_eval_lm_refuses_samples_too_long_or_counts_them(fairseq, data, checkpoint, mode):
    sizes = sizes_of(data)
    whole = tokens_of(data, "big", "valid")
    asked, override = 3 * CONTEXT, ""
    if mode == "none":
        made = [asked] * (whole // asked) + ([whole % asked] if whole % asked else [])
    elif mode == "eos":
        made = list(sizes)
    elif mode == "complete":
        made = blocks(sizes, asked)
    else:
        made = None
    takes = CONTEXT
    if mode == "eos":  # of a model that takes less than some lines have
        takes = int(np.sort(sizes)[-3])
        override = f" --model-overrides {{'max_target_positions':{takes}}}"
    line = eval_lm(data, checkpoint).replace(f"sample {CONTEXT}", f"sample {asked}")
    line += f" --sample-break-mode {mode}{override}"
    status, err, log = fairseq("eval_lm", line)
    assert status == 1 and "Perplexity" not in log
    assert f"longer than {takes}" in error_in(err) and "--tokens-per-sample" in err
    if made is None:
        return
    fitting = sum(int(size) for size in made if size <= takes)
    if not fitting:
        assert "none is left" in err
        return
    assert f"{fitting:,} of {whole:,} tokens would be counted" in err
    status, err, log = fairseq("eval_lm", line + " --skip-invalid-size-inputs-valid-test")
    assert status == 0
    assert f"counted {fitting:,} of {whole:,} tokens" in log
    assert f"Evaluated {fitting:,} tokens" in log


def test_what_shorten_method_cuts_is_counted(fairseq, data, checkpoint):
    sizes = sizes_of(data)
    kept = int(np.minimum(sizes, 8).sum())
    line = eval_lm(data, checkpoint).replace(f"sample {CONTEXT}", "sample 8")
    for method in ("truncate", "random_crop"):
        status, _, log = fairseq("eval_lm", f"{line} --shorten-method {method}")
        assert status == 0 and f"Evaluated {kept:,} tokens" in log
        assert f"counted {kept:,} of {int(sizes.sum()):,} tokens" in log


def test_nothing_left_is_refused_though_asked_to_skip(fairseq, data, checkpoint):
    line = eval_lm(data, checkpoint, "small").replace(f"sample {CONTEXT}", "sample 100000")
    status, err, log = fairseq("eval_lm", line + " --skip-invalid-size-inputs-valid-test")
    assert status == 1 and "none is left" in error_in(err) and "Perplexity" not in log


def test_blank_lines_left_out_and_shares_are_reported(fairseq, data, checkpoint):
    sizes = sizes_of(data)
    line = eval_lm(data, checkpoint, flags="--sample-break-mode complete_doc")
    line += " --skip-invalid-size-inputs-valid-test"
    status, _, log = fairseq("eval_lm", line)
    counted = int(re.search(r"Evaluated ([\d,]+) tokens", log)[1].replace(",", ""))
    assert status == 0 and counted <= int(sizes[sizes > 1].sum())
    assert f"counted {counted:,} of {int(sizes.sum()):,} tokens" in log
    status, _, log = fairseq("eval_lm", eval_lm(data, checkpoint, flags="--num-shards 2"))
    assert status == 0 and re.search(r"counted [\d,]+ of .*other shares", log)
    line = eval_lm(data, checkpoint, "small", flags="--num-shards 64 --shard-id 63")
    status, err, _ = fairseq("eval_lm", line)
    assert status == 1 and "no token was scored" in error_in(err)


def test_a_context_window_counts_as_context(fairseq, data, checkpoint):
    line = eval_lm(data, checkpoint).replace(f"sample {CONTEXT}", f"sample {CONTEXT + 4}")
    status, err, _ = fairseq("eval_lm", line + " --context-window 8")
    assert status == 1 and f"use --tokens-per-sample {CONTEXT}" in error_in(err)
    longest = max(sizes_of(data))
    line = eval_lm(data, checkpoint, flags="--sample-break-mode eos --context-window 8")
    line += f" --model-overrides {{'max_target_positions':{longest}}}"
    status, err, _ = fairseq("eval_lm", line)
    remedy = f"use --tokens-per-sample {longest} or less {FIT}"
    assert status == 1 and f"sample of {longest} tokens" in err and remedy in error_in(err)
    line += f" --tokens-per-sample {longest} --shorten-method truncate"
    assert fairseq("eval_lm", line)[0] == 0


def test_training_names_the_flags_with_which_lines_fit(fairseq, data, tmp_path):
    """By --sample-break-mode eos a sample is a line, whatever --tokens-per-sample is."""
    line = f"{data / 'big'} --task language_modeling {SHAPE} --tokens-per-sample 8 --max-update 1"
    line += f" --no-save --save-dir {tmp_path}"
    lines = f"{line} --sample-break-mode eos"
    status, err, _ = fairseq("train", lines)
    need = max(sizes_of(data))
    words = f"use {FIT.removeprefix('with ')}, or raise --tokens-per-sample (and "
    words += f"--max-target-positions and --max-tokens, where they are lower) to {need}, or add"
    assert status == 1 and words in error_in(err)
    for limit in ("--max-target-positions", "--max-tokens"):
        status, err, _ = fairseq("train", f"{lines} {limit} 8")
        assert status == 1 and words in error_in(err)
        assert fairseq("train", f"{lines} --tokens-per-sample {need} {limit} {need}")[0] == 0
    enough = f"--tokens-per-sample {need}"
    for remedy in ("--sample-break-mode none", "--shorten-method truncate", enough):
        assert fairseq("train", f"{lines} {remedy}")[0] == 0, remedy
    status, err, _ = fairseq("train", f"{line} --max-target-positions 4")
    assert status == 1 and error_in(err).endswith("none is left: use --tokens-per-sample 4 or less")


def test_lines_that_may_be_left_out_are_not_measured_one_by_one(
    fairseq, data, tmp_path, monkeypatch
):
    monkeypatch.setattr(counted, "room_for", lambda *_: pytest.fail("measured"))
    line = f"{data / 'big'} --task language_modeling {SHAPE} --tokens-per-sample 8 --max-update 1"
    line += f" --no-save --save-dir {tmp_path} --sample-break-mode eos"
    status, _, log = fairseq("train", f"{line} --skip-invalid-size-inputs-valid-test")
    assert status == 0 and "are longer than 8" in log and "are left out: counted" in log


def test_validate_refuses_or_counts(fairseq, data, checkpoint):
    sizes = sizes_of(data)
    takes = int(np.sort(sizes)[-3])
    fitting = int(sizes[sizes <= takes].sum())
    line = f"{data} --path {checkpoint} --valid-subset valid/big --batch-size 4"
    line += " --task mixture_language_modeling --sample-break-mode eos --model-overrides "
    few = line + f"{{'max_target_positions':{takes}}}"
    status, err, _ = fairseq("validate", few)
    assert status == 1 and f"{fitting:,} of {sizes.sum():,} tokens" in error_in(err)
    status, err, log = fairseq("validate", few + " --skip-invalid-size-inputs-valid-test")
    assert status == 0 and f"counted {fitting:,} of {sizes.sum():,} tokens" in log


@pytest.mark.parametrize("name", ["eval_lm", "validate", "evaluate", "generate"])
def test_nan_is_error_in(fairseq, data, broken, capsys, name):
    if name == "evaluate":
        status = cli.main(f"evaluate {data} --path {broken} --cpu --subset valid".split())
        err, log = capsys.readouterr()[::-1]
    elif name == "eval_lm":
        status, err, log = fairseq(name, eval_lm(data, broken))
    elif name == "generate":
        line = f"{data / 'small'} --path {broken} --gen-subset valid --task language_modeling"
        with pytest.raises(UserError, match="use an earlier one"):
            fairseq(name, line + " --sample-break-mode eos --beam 2 --max-len-b 8 --batch-size 4")
        return
    else:
        line = f"{data} --path {broken} --valid-subset valid --batch-size 4"
        line += " --task mixture_language_modeling"
        status, err, log = fairseq(name, line)
    assert status == 1 and "use an earlier one" in error_in(err)
    assert "Perplexity: nan" not in log


def test_max_valid_steps_takes_that_many_batches_of_every_corpus(data, tmp_path):
    """The figures are those of the first two batches of each corpus, by the task's own steps."""
    cfg = configure(data, "--best-checkpoint-metric", "in_domain_ppl")
    task = tasks.setup_task(cfg.task)
    task.load_dataset("valid")
    torch.manual_seed(1)
    model = task.build_model(cfg.model)
    trainer = Trainer(cfg, task, model, task.build_criterion(cfg.criterion))
    every = list(trainer.get_valid_iterator("valid").next_epoch_itr(shuffle=False))
    nll, counts = defaultdict(float), defaultdict(int)
    taken = Counter()
    model.eval()
    for batch in every:
        name = list(task.corpora)[batch["corpus"]]
        taken[name] += 1
        if taken[name] <= 2:
            with torch.no_grad():
                logits = model(**batch["net_input"])[0].double()
            flat = F.cross_entropy(logits.flatten(0, 1), batch["target"].flatten(), ignore_index=1)
            nll[name] += float(flat) * batch["ntokens"]
            counts[name] += batch["ntokens"]
    assert max(taken.values()) > 3
    expected = {name: math.exp(nll[name] / counts[name]) for name in task.corpora}

    cfg.dataset.max_valid_steps = 2
    seen = []
    for processes in (1, 2, 3):  # of several, all shares are gone through one after the other
        seen.append(validated(trainer, task, processes))
    assert seen[0] == seen[1] == seen[2] and len(seen[0]) == 2 * len(task.corpora)

    for _ in range(2):  # the second time from the iterator that is kept
        (valid_loss,) = train.validate(cfg, trainer, task, SimpleNamespace(epoch=1), ["valid"])
    inside = [expected[name] for name in task.trained]
    assert valid_loss == pytest.approx(sum(inside) / len(inside), rel=1e-5)
    assert cfg.dataset.max_valid_steps == 2, "as it was, for the checkpoint"


def validated(trainer, task, processes):
    """The batches of a validation on so many processes."""
    task.dataset_to_epoch_iter.clear()
    batches = []
    for rank in range(processes):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Trainer, "data_parallel_world_size", processes)
            patch.setattr(Trainer, "data_parallel_rank", rank)
            iterator = trainer.get_valid_iterator("valid").next_epoch_itr(shuffle=False)
            batches += [batch["id"].tolist() for batch in iterator if batch]
        task.dataset_to_epoch_iter.clear()
    return sorted(batches)


@pytest.mark.parametrize("ours", [True, False])
def test_max_valid_steps_takes_as_many_batches_on_any_number_of_processes(data, ours):
    """In a training of ours. Stock counts the batches of each process."""
    cfg = configure(data / "big", "--max-valid-steps", 2, task="language_modeling")
    if ours:
        cfg.criterion = OmegaConf.structured(MoECrossEntropyConfig(_name="moe_cross_entropy"))
    task = tasks.setup_task(cfg.task)
    task.load_dataset("valid")
    model = task.build_model(cfg.model)
    trainer = Trainer(cfg, task, model, task.build_criterion(cfg.criterion))
    seen = []
    for processes in (1, 2, 4):
        seen.append(validated(trainer, task, processes))
    assert seen[0] == seen[1] == seen[2] and (len(seen[0]) == 3) == ours


def test_other_tasks_say_how_much_max_valid_steps_takes(fairseq, data, tmp_path):
    line = f"{data / 'big'} --task language_modeling {SHAPE} --max-update 1 --no-save"
    status, _, log = fairseq("train", f"{line} --save-dir {tmp_path} --max-valid-steps 1")
    samples = -(-tokens_of(data, "big", "valid") // CONTEXT)
    assert status == 0
    assert f"--max-valid-steps 1: 16 of {samples} samples of valid are counted" in log
    status, err, log = fairseq("train", f"{line} --save-dir {tmp_path} --max-valid-steps 0")
    assert status == 1 and "--max-valid-steps 0" in error_in(err)
    mixture = line.replace(str(data / "big"), str(data)).replace("language_m", "mixture_language_m")
    status, _, log = fairseq("train", f"{mixture} --save-dir {tmp_path} --max-valid-steps 1")
    assert status == 0 and re.search(r"--max-valid-steps 1: [\d,]+ of [\d,]+ samples of valid", log)
    for name in ("big", "mid", "small", "far", "further"):
        assert f"{name}_ppl" in log


def test_forgotten_validation_sets_of_a_corpus_are_refused_or_combined(fairseq, data, tmp_path):
    copy = tmp_path / "data"
    shutil.copytree(data, copy)
    for suffix in (".bin", ".idx"):
        shutil.copyfile(data / "mid" / f"test{suffix}", copy / "mid" / f"valid1{suffix}")
    line = f"{copy} --task mixture_language_modeling {SHAPE} --max-update 1 --no-save"
    status, err, _ = fairseq("train", f"{line} --save-dir {tmp_path}")
    assert status == 1 and "mid: Valid paths ['valid1'] will be ignored" in error_in(err)
    status, _, log = fairseq("train", f"{line} --save-dir {tmp_path} --combine-valid-subsets")
    assert status == 0
    task = make_task(copy)
    task.load_dataset("valid", combine=True)
    mid = list(task.corpora).index("mid")
    tokens = int(task.dataset("valid").dataset.datasets[mid].sizes.sum())
    assert tokens == tokens_of(data, "mid", "valid") + tokens_of(data, "mid", "test")
    status, _, _ = fairseq("train", f"{line} --save-dir {tmp_path} --valid-subset valid,valid1/mid")
    assert status == 0
