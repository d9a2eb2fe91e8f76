"""Validation and evaluation: each corpus on its own, its perplexity, and the means."""

import collections
import math
import shutil

import numpy as np
import pytest
import torch
from fairseq import metrics, tasks, utils
from fairseq.data import data_utils
from fairseq.data.indexed_dataset import MMapIndexedDatasetBuilder
from fairseq.trainer import Trainer
from fairseq_cli import train
from fairseq_cli.eval_lm import eval_lm
from mixture_data import CORPORA, HELD_OUT, configure, make_task, tokens_of
from omegaconf import OmegaConf

from fairseq_moe_ext.errors import UserError

ALL = sorted([*CORPORA, *HELD_OUT])


@pytest.fixture(scope="module")
def model(data):
    torch.manual_seed(1)
    cfg = configure(data)
    model = tasks.setup_task(cfg.task).build_model(cfg.model)
    for parameter in model.parameters():  # perplexities that differ from corpus to corpus
        parameter.data.mul_(2)
    model.eval()
    return model


def iterate(task, subset, **kwargs):
    task.load_dataset(subset)
    return task.get_batch_iterator(
        task.dataset(subset), max_sentences=4, seed=1, required_batch_size_multiple=1, **kwargs
    ).next_epoch_itr(shuffle=False)


def perplexity(data, corpus, model, split="valid"):
    """By stock fairseq alone: the stock task on the corpus's data-bin, and eval_lm."""
    task = make_task(data / corpus, task="language_modeling")
    task.load_dataset(split)
    loader = task.eval_lm_dataloader(task.dataset(split), batch_size=4, num_workers=0)
    result = eval_lm([model], task.source_dictionary, loader, device=torch.device("cpu"))
    return float(result["perplexity"])


def validate(data, model, *flags, subset="valid"):
    """The figures that fairseq-train logs after a validation, by its own code."""
    cfg = configure(data, "--valid-subset", subset, *flags)
    task = tasks.setup_task(cfg.task)
    for name in subset.split(","):
        task.load_dataset(name)
    trainer = Trainer(cfg, task, model, task.build_criterion(cfg.criterion))
    with metrics.aggregate(new_root=True) as figures:
        for sample in trainer.get_valid_iterator(subset).next_epoch_itr(shuffle=False):
            trainer.valid_step(sample)
    return train.get_valid_stats(cfg, trainer, figures.get_smoothed_values(), False)


def test_batches_are_of_one_corpus_and_hold_every_block_once(data):
    task = make_task(data)
    seen, labels = [], []
    for batch in iterate(task, "valid"):
        assert isinstance(batch["corpus"], int)
        labels.append(batch["corpus"])
        seen += batch["id"].tolist()
    assert sorted(seen) == list(range(len(task.dataset("valid"))))
    assert sorted(set(labels)) == list(range(len(ALL)))
    assert labels == sorted(labels)
    for index, name in enumerate(task.corpora):
        alone = [batch["target"] for batch in iterate(make_task(data), f"valid/{name}")]
        mine = [b["target"] for b in iterate(make_task(data), "valid") if b["corpus"] == index]
        assert len(alone) == len(mine) and all(map(torch.equal, alone, mine))


def test_perplexities_are_those_of_stock_fairseq_on_each_corpus(data, model):
    stats = validate(data, model)
    expected = {name: perplexity(data, name, model) for name in ALL}
    assert len(set(round(ppl, 3) for ppl in expected.values())) == len(ALL)
    for name in ALL:
        assert float(stats[f"{name}_ppl"]) == pytest.approx(expected[name], rel=1e-5)
    for key, names in (("in_domain_ppl", CORPORA), ("out_of_domain_ppl", HELD_OUT)):
        mean = sum(expected[name] for name in names) / len(names)
        assert stats[key] == pytest.approx(mean, rel=1e-5)
    assert not [key for key in stats if key.startswith("_")]


def test_training_text_is_validated_in_full(data):
    """By fairseq-validate, whose task has the flags of the training."""
    task = make_task(data, "--corpus-weights", "big=1,mid=1,small=1")
    task.load_dataset("train", combine=False, epoch=1, task_cfg=task.args)
    batches = task.get_batch_iterator(task.dataset("train"), max_sentences=4)
    seen = collections.Counter()
    for batch in batches.next_epoch_itr(shuffle=False):
        seen[list(task.corpora)[batch["corpus"]]] += batch["ntokens"]
    assert seen == {name: tokens_of(data, name) for name in CORPORA}


def test_a_subset_of_one_corpus(data, model):
    stats = validate(data, model, subset="valid/small")
    expected = perplexity(data, "small", model)
    for key in ("small_ppl", "in_domain_ppl"):
        assert stats[key] == pytest.approx(expected, rel=1e-5)
    # stock rounds to two digits
    assert float(stats["ppl"]) == pytest.approx(expected, rel=1e-5, abs=0.006)
    assert "big_ppl" not in stats and "out_of_domain_ppl" not in stats


def test_corpora_not_trained_on_are_out_of_domain(data, model):
    stats = validate(data, model, "--train-corpora", "small,big")
    out = [stats[f"{name}_ppl"] for name in (*HELD_OUT, "mid")]
    assert stats["out_of_domain_ppl"] == pytest.approx(sum(out) / 3, rel=1e-9)


class GateLoss(torch.nn.Module):
    """A criterion whose loss is more than the language model's."""

    def __init__(self, stock):
        super().__init__()
        self.stock = stock

    def forward(self, model, sample):
        loss, sample_size, log = self.stock(model, sample)
        return loss + 100, sample_size, {**log, "inner_loss": log["loss"], "loss": loss + 100}


def test_perplexity_is_of_the_language_modelling_loss_alone(data, model):
    cfg = configure(data)
    task = tasks.setup_task(cfg.task)
    stock = task.build_criterion(cfg.criterion)
    sample = next(iter(iterate(task, "valid/far")))
    _, _, expected = task.valid_step(sample, model, stock)
    _, _, log = task.valid_step(sample, model, GateLoss(stock))
    assert log["corpus_nll/far"] == expected["corpus_nll/far"] == expected["loss"]
    assert log["loss"] == expected["loss"] + 100


@pytest.mark.parametrize(
    "name, flags",
    [("moe_cross_entropy", {}), ("label_smoothed_cross_entropy", {"label_smoothing": 0.1})],
)
def test_perplexity_is_of_the_likelihood_under_each_criterion(data, model, name, flags):
    cfg = configure(data)
    task = tasks.setup_task(cfg.task)
    sample = next(iter(iterate(task, "valid/far")))
    _, _, expected = task.valid_step(sample, model, task.build_criterion(cfg.criterion))
    criterion = task.build_criterion(OmegaConf.create({**cfg.criterion, "_name": name, **flags}))
    _, _, log = task.valid_step(sample, model, criterion)
    assert float(log["corpus_nll/far"]) == pytest.approx(float(expected["loss"]), rel=1e-6)


def test_sums_of_ranks_are_the_sums_of_the_whole(data, model):
    """Every output has the same keys, and they may be summed, as the trainer does over ranks."""
    cfg = configure(data)
    task = tasks.setup_task(cfg.task)
    criterion = task.build_criterion(cfg.criterion)
    assert type(task).logging_outputs_can_be_summed(criterion)
    outputs = [task.valid_step(batch, model, criterion)[2] for batch in iterate(task, "valid")]
    kinds = [{key: type(value) for key, value in log.items()} for log in outputs]
    assert all(kind == kinds[0] for kind in kinds)

    def figures(logs):
        with metrics.aggregate(new_root=True) as seen:
            for log in logs:
                task.reduce_metrics(log, criterion)
        return {key: float(v) for key, v in seen.get_smoothed_values().items() if "_ppl" in key}

    one_by_one = figures([[log] for log in outputs])
    two_ranks = [
        [{key: torch.as_tensor(sum(log[key] for log in pair)) for key in pair[0]}]
        for pair in (outputs[i : i + 2] for i in range(0, len(outputs), 2))
    ]
    assert figures(two_ranks) == pytest.approx(one_by_one, rel=1e-5)
    assert len(one_by_one) == len(ALL) + 2


def test_infinite_perplexity_is_logged_as_such(data, model):
    task = make_task(data)
    task.load_dataset("valid")
    log = {"loss": 1e9, "ntokens": 1, "nsentences": 1, "sample_size": 1}
    log.update({"corpus_nll/far": torch.tensor(1e9), "corpus_tokens/far": 1})
    criterion = task.build_criterion(configure(data).criterion)
    with metrics.aggregate(new_root=True) as seen:
        task.reduce_metrics([log], criterion)
    assert seen.get_smoothed_values()["far_ppl"] == math.inf


def test_a_rank_without_a_batch_gets_an_empty_one(data):
    batches = list(iterate(make_task(data), "valid/small", num_shards=64, shard_id=63))
    assert batches == [{}]


def test_fairseq_does_not_take_corpora_for_forgotten_validation_sets(data):
    data_utils.raise_if_valid_subsets_unintentionally_ignored(configure(data))
    cfg = configure(data, "--valid-subset", "valid/small,test/far")
    data_utils.raise_if_valid_subsets_unintentionally_ignored(cfg)


def test_blocks_longer_than_the_model_takes_are_left_out(data):
    task = make_task(data, "--sample-break-mode", "eos")
    sizes = np.concatenate([batch["net_input"]["src_lengths"] for batch in iterate(task, "valid")])
    longest = int(np.median(sizes))
    kept = iterate(task, "valid", max_positions=longest, ignore_invalid_inputs=True)
    found = np.concatenate([batch["net_input"]["src_lengths"] for batch in kept])
    assert sorted(found) == sorted(sizes[sizes <= longest])


def test_a_plain_data_bin_is_a_mixture_of_one(data, model):
    stats = validate(data / "mid", model, "--best-checkpoint-metric", "in_domain_ppl")
    expected = perplexity(data, "mid", model)
    for key in ("data_ppl", "in_domain_ppl"):
        assert stats[key] == pytest.approx(expected, rel=1e-5)
    task = make_task(data / "mid")
    task.load_dataset("test/data")
    task.load_dataset("train", combine=True)


def test_split_in_pieces_is_combined(data, tmp_path):
    copy = tmp_path / "data"
    shutil.copytree(data, copy)
    for suffix in (".bin", ".idx"):
        shutil.copyfile(data / "mid" / f"train{suffix}", copy / "mid" / f"train1{suffix}")
    once, twice = make_task(data), make_task(copy)
    for task in (once, twice):
        task.load_dataset("train", combine=True)
    tokens = [task.dataset("train").dataset.datasets[1].sizes.sum() for task in (once, twice)]
    assert tokens[1] == 2 * tokens[0]


def break_data(copy, how):
    """Spoil a copy of the data folder; the message that is expected."""
    small = copy / "small"
    if how == "dictionary differs":
        with open(small / "dict.txt", "a", encoding="utf-8") as file:
            file.write("madeupword0100 0\n")
        return r"small/dict\.txt \(293 entries\) differs from .*data/dict\.txt \(292 entries\)"
    if how == "dictionary missing in a corpus":
        (small / "dict.txt").unlink()
        return r"small/dict\.txt: missing; it must be a copy"
    if how == "dictionary missing":
        (copy / "dict.txt").unlink()
        return r"data/dict\.txt: missing"
    if how == "bin missing":
        (small / "train.bin").unlink()
        return r"small/train\.bin: missing, although train\.idx is there"
    if how == "idx missing":
        (small / "train.idx").unlink()
        return r"small/train\.idx: missing, although train\.bin is there"
    if how == "truncated":
        with open(small / "train.bin", "r+b") as file:
            file.truncate(100)
        return r"small/train\.bin"
    if how == "empty":
        MMapIndexedDatasetBuilder(str(small / "train.bin"), np.uint16).finalize(
            str(small / "train.idx")
        )
        return r"small/train\.bin: holds no tokens"
    if how == "another format":
        (small / "train.idx").write_bytes(b"TNTIDX\x00\x00" + bytes(100))
        return r"small/train\.idx: not an index of fairseq's mmap format"
    if how == "nothing in it":
        for name in ALL:
            shutil.rmtree(copy / name)
        return r"data: contains no data-bin, nor do its folders"
    if how == "both layouts":
        shutil.copyfile(small / "train.idx", copy / "train.idx")
        shutil.copyfile(small / "train.bin", copy / "train.bin")
        return r"holds data-bins of its own .* and of corpora \(big/\)"
    if how == "a name that is taken":
        small.rename(copy / "valid2")
        return r"data/valid2: the name 'valid2' is reserved"
    if how == "no such folder":
        shutil.rmtree(copy)
        return r"data: no such data folder"
    raise AssertionError(how)


@pytest.mark.parametrize(
    "how",
    [
        "dictionary differs", "dictionary missing in a corpus", "dictionary missing", "bin missing",
        "idx missing", "truncated", "empty", "another format", "nothing in it", "both layouts",
        "a name that is taken", "no such folder",
    ],
)  # fmt: skip
def test_a_spoilt_data_folder_is_refused(data, tmp_path, how):
    copy = tmp_path / "data"
    shutil.copytree(data, copy)
    message = break_data(copy, how)
    with pytest.raises(UserError, match=message):
        make_task(copy).load_dataset("train", combine=True)


@pytest.mark.parametrize(
    "subset, message",
    [
        ("valid/none", r"subset valid/none: .* no corpus 'none'; it has big, far, further, mi"),
        ("dev", r"subset dev: no such data-bin .* far: test, valid"),
        ("train/far", r"subset train/far: no such data-bin .* far: test, valid$"),
    ],
)  # fmt: skip
def test_a_subset_that_cannot_be_is_refused(data, subset, message):
    with pytest.raises(UserError, match=message):
        make_task(data).load_dataset(subset)


def test_a_subset_may_lack_the_metric_by_which_checkpoints_were_chosen(data):
    """fairseq-validate sets the task up from the checkpoint's settings."""
    task = make_task(data, "--best-checkpoint-metric", "in_domain_ppl")
    task.load_dataset("valid/far")
    assert task.validation_metrics("valid/far") == ["far_ppl", "out_of_domain_ppl"]


def test_several_folders_are_refused(data):
    with pytest.raises(UserError, match="':' separates data folders, and .* takes one"):
        make_task(f"{data}:{data}")


def test_context_windows_work(data, model):
    """fairseq-eval-lm --context-window: later tokens of a block have more context."""
    task = make_task(data, "--tokens-per-sample", 16)
    task.load_dataset("valid/far")
    loader = task.eval_lm_dataloader(
        task.dataset("valid/far"), batch_size=1, num_workers=0, context_window=16
    )
    result = eval_lm([model], task.source_dictionary, loader, device=torch.device("cpu"))
    assert utils.item(result["perplexity"]) > 1


def test_a_context_window_stays_within_its_corpus(data):
    def batches(subset):
        task = make_task(data, "--tokens-per-sample", 16)
        task.load_dataset(subset)
        dataset = task.dataset(subset)
        return list(
            task.eval_lm_dataloader(dataset, batch_size=4, num_workers=0, context_window=16)
        )

    together = batches("valid")
    for index, name in enumerate(ALL):
        alone = batches(f"valid/{name}")
        own = [batch for batch in together if batch["corpus"] == index]
        assert len(own) == len(alone) > 0
        for one, other in zip(own, alone):
            assert one["start_indices"] == other["start_indices"]
            assert torch.equal(one["net_input"]["src_tokens"], other["net_input"]["src_tokens"])
            assert torch.equal(one["target"], other["target"])
