"""The training mixture: what an epoch holds, in what order, and that it resumes exactly."""

import collections
import gc
import multiprocessing

import numpy as np
import pytest
import torch
from fairseq import tasks
from fairseq.data import FairseqDataset
from fairseq.data.indexed_dataset import MMapIndexedDataset
from hypothesis import given, settings
from hypothesis import strategies as st
from mixture_data import BLOCK, CORPORA, configure, make_task, tokens_of

from fairseq_moe_ext.errors import UserError
from fairseq_moe_ext.tasks.mixture_dataset import MixtureDataset, apportion, release


class Numbers(FairseqDataset):
    """A corpus of blocks (name, i) of one token each."""

    def __init__(self, name, size):
        self.name, self.sizes = name, np.ones(size, dtype=np.int64)

    def __len__(self):
        return len(self.sizes)

    def __getitem__(self, index):
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self.name, index


def epoch_of(dataset, epoch):
    dataset.set_epoch(epoch)
    return [dataset[i] for i in range(len(dataset))]


def mixture(sizes, counts, seed=1):
    parts = {str(i): Numbers(str(i), size) for i, size in enumerate(sizes)}
    return MixtureDataset(parts, counts, seed)


SIZES = st.lists(st.integers(1, 12), min_size=1, max_size=4)


@settings(max_examples=200, deadline=None)
@given(sizes=SIZES, data=st.data(), epochs=st.integers(1, 6))
def test_no_block_is_drawn_again_before_all_of_its_corpus_were(sizes, data, epochs):
    counts = [data.draw(st.integers(1, 20)) for _ in sizes]
    dataset = mixture(sizes, counts)
    drawn = collections.Counter()
    for epoch in range(1, epochs + 1):
        blocks = epoch_of(dataset, epoch)
        assert [sum(name == str(i) for name, _ in blocks) for i in range(len(sizes))] == counts
        drawn.update(blocks)
    for i, (size, count) in enumerate(zip(sizes, counts)):
        times = [drawn[str(i), block] for block in range(size)]
        assert sum(times) == epochs * count
        assert max(times) - min(times) <= 1


def test_an_epoch_depends_on_its_number_and_the_seed_alone():
    sizes, counts = [50, 20, 10], [20, 40, 20]
    third = epoch_of(mixture(sizes, counts), 3)
    visited = mixture(sizes, counts)
    for epoch in (1, 5, 2):
        epoch_of(visited, epoch)
    assert epoch_of(visited, 3) == third
    assert epoch_of(visited, 4) != third
    assert epoch_of(mixture(sizes, counts, seed=2), 3) != third


def test_the_order_of_a_corpus_does_not_depend_on_the_others():
    alone = MixtureDataset({"b": Numbers("b", 30)}, [12], seed=1)
    both = MixtureDataset({"a": Numbers("a", 9), "b": Numbers("b", 30)}, [5, 12], seed=1)
    assert [block for block in epoch_of(both, 4) if block[0] == "b"] == epoch_of(alone, 4)


@settings(max_examples=200, deadline=None)
@given(shares=st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=8), total=st.integers(1, 10**9))
def test_apportioning_is_exact_and_within_one(shares, total):
    shares = np.array(shares)
    counts = apportion(shares, total)
    assert sum(counts) == total
    assert np.abs(np.array(counts) - shares / shares.sum() * total).max() < 1 + 1e-6 * total


def train_set(data, *flags):
    task = make_task(data, *flags)
    task.load_dataset("train", epoch=1, combine=True)
    return task, task.dataset("train")


@pytest.fixture(scope="module")
def own_tokens(data):
    """By corpus, the tokens that no other corpus has."""
    tokens = {
        name: set(torch.cat(list(MMapIndexedDataset(str(data / name / "train")))).tolist())
        for name in CORPORA
    }
    own = {
        name: mine.difference(*(tokens[other] for other in CORPORA if other != name))
        for name, mine in tokens.items()
    }
    assert all(own.values())
    return own


def corpora_of(dataset, own_tokens):
    """Blocks per corpus."""
    found = collections.Counter()
    for i in range(len(dataset)):
        block = dataset[i]["target"].tolist()
        found[max(CORPORA, key=lambda name: sum(token in own_tokens[name] for token in block))] += 1
    return found


def blocks_of(data, name):
    return -(-tokens_of(data, name) // BLOCK)


def test_by_default_an_epoch_is_every_block_once(data):
    _, dataset = train_set(data)
    assert len(dataset) == sum(blocks_of(data, name) for name in CORPORA)
    seen = torch.cat([dataset[i]["target"] for i in range(len(dataset))])
    stored = torch.cat(
        [torch.cat(list(MMapIndexedDataset(str(data / name / "train")))) for name in CORPORA]
    )
    assert seen.tolist() == stored.tolist()
    assert dataset.can_reuse_epoch_itr_across_epochs
    assert not torch.equal(torch.as_tensor(dataset.ordered_indices()), torch.arange(len(dataset)))


def test_data_stay_on_disk(data):
    _, dataset = train_set(data)
    blocks = [part.dataset for part in dataset.dataset.datasets]
    assert all(isinstance(block.dataset, MMapIndexedDataset) for block in blocks)


def test_weights_set_the_shares_and_not_the_length(data, own_tokens):
    _, dataset = train_set(data, "--corpus-weights", "big=1,mid=1,small=2")
    total = sum(blocks_of(data, name) for name in CORPORA)
    assert len(dataset) == total
    found = corpora_of(dataset, own_tokens)
    # a corpus's last block is shorter, so shares of tokens are those of blocks within a percent
    assert found["small"] / total == pytest.approx(0.5, abs=0.02)
    assert found["mid"] / total == found["big"] / total == pytest.approx(0.25, abs=0.02)
    tokens = sum(len(dataset[i]["target"]) for i in range(total))
    assert tokens == dataset.sizes.sum()
    assert not dataset.can_reuse_epoch_itr_across_epochs


def test_weights_are_shares_of_tokens_even_if_blocks_differ_in_length(data):
    flags = ["--sample-break-mode", "eos", "--corpus-weights", "big=1,mid=1,small=1"]
    _, dataset = train_set(data, *flags)
    tokens = collections.Counter()
    for epoch in range(1, 30):  # whole passes over every corpus, on average
        dataset.set_epoch(epoch)
        sizes = dataset.sizes
        start = 0
        for name, count in zip(CORPORA, dataset.counts):
            tokens[name] += int(sizes[start : start + count].sum())
            start += count
    shares = {name: tokens[name] / sum(tokens.values()) for name in CORPORA}
    assert shares == pytest.approx(dict.fromkeys(CORPORA, 1 / 3), abs=0.005)


def test_temperature_goes_from_proportional_to_even(data):
    total = sum(blocks_of(data, name) for name in CORPORA)
    proportional = train_set(data)[1].counts
    assert train_set(data, "--corpus-temperature", 1)[1].counts == proportional
    hot = train_set(data, "--corpus-temperature", 1e9)[1].counts
    assert hot == pytest.approx([total / 3] * 3, rel=0.05)
    warm = train_set(data, "--corpus-temperature", 2)[1].counts
    roots = np.sqrt([tokens_of(data, name) for name in CORPORA])
    assert warm == pytest.approx((roots / roots.sum() * total).tolist(), rel=0.05)


def test_a_choice_of_corpora(data, own_tokens):
    task, dataset = train_set(data, "--train-corpora", "small,mid")
    assert len(dataset) == blocks_of(data, "mid") + blocks_of(data, "small")
    assert set(corpora_of(dataset, own_tokens)) == {"mid", "small"}
    assert task.trained == ["mid", "small"]


def batches(task, epoch=1, state=None, shards=1, shard=0, workers=0, note=None):
    """(batches to the end of an epoch, state after `note` of them), as the trainer gets them."""
    task.load_dataset("train", epoch=epoch, combine=True)
    iterator = task.get_batch_iterator(
        task.dataset("train"), max_sentences=4, required_batch_size_multiple=1, seed=1,
        num_shards=shards, shard_id=shard, num_workers=workers, epoch=epoch, data_buffer_size=2,
    )  # fmt: skip
    if state is not None:
        iterator.load_state_dict(state)
    found, noted = [], None
    for batch in iterator.next_epoch_itr(shuffle=True):
        found.append(batch["target"].tolist() if batch else None)
        if len(found) == note:
            noted = iterator.state_dict()
    release(iterator)
    return found, noted


@pytest.mark.parametrize("flags", [[], ["--corpus-weights", "big=1,mid=1,small=1"]])
@pytest.mark.parametrize("epoch, workers, shards", [(1, 0, 1), (2, 0, 3), (3, 2, 1)])
def test_batches_after_resuming_in_an_epoch_are_those_of_a_run_without_a_stop(
    data, flags, epoch, workers, shards
):
    cfg = configure(data, *flags)
    setting = {"epoch": epoch, "workers": workers, "shards": shards, "shard": shards - 1}
    whole, state = batches(tasks.setup_task(cfg.task), note=5, **setting)
    assert state["iterations_in_epoch"] == 5 and state["epoch"] == epoch
    rest, _ = batches(tasks.setup_task(cfg.task), state=state, **setting)
    assert rest == whole[5:]
    assert len(rest) > 2


def test_epochs_differ_when_corpora_are_weighted(data):
    flags = ["--corpus-weights", "big=1,mid=1,small=1"]
    first, _ = batches(make_task(data, *flags))
    second, _ = batches(make_task(data, *flags), epoch=2)
    assert sorted(map(str, first)) != sorted(map(str, second))


def test_workers_of_an_epoch_end_with_it(data):
    task = make_task(data, "--corpus-weights", "big=1,mid=1,small=1")
    task.load_dataset("train", combine=True)
    gc.collect()
    others = set(multiprocessing.active_children())  # pools of other tests
    gc.disable()  # as between two runs of the garbage collector
    try:
        for epoch in (1, 2, 3):
            iterator = task.get_batch_iterator(
                task.dataset("train"), max_sentences=4, num_workers=1, epoch=epoch
            )
            assert len(list(iterator.next_epoch_itr())) == len(iterator)
            assert len(set(multiprocessing.active_children()) - others) == 1
        release(iterator)
        assert not set(multiprocessing.active_children()) - others
    finally:
        gc.enable()


def test_an_iterator_in_use_is_not_released(data):
    task = make_task(data, "--corpus-weights", "big=1,mid=1,small=1")
    task.load_dataset("train", combine=True)
    iterator = task.get_batch_iterator(task.dataset("train"), max_sentences=4)
    batches = iterator.next_epoch_itr()
    next(batches)
    task.get_batch_iterator(task.dataset("train"), max_sentences=4)
    assert len(list(batches)) == len(iterator) - 1


def test_another_mixture_in_the_middle_of_an_epoch_is_warned_of(data, caplog):
    def iterator(weights):
        task, train = train_set(data, "--corpus-weights", weights)
        return task.get_batch_iterator(train, max_sentences=4)

    first = iterator("big=2,mid=1,small=1")
    next(first.next_epoch_itr())
    for weights, warnings in (("big=2,mid=1,small=1", 0), ("big=1,mid=2,small=1", 1)):
        iterator(weights).load_state_dict(first.state_dict())
        assert caplog.text.count("sentences of epoch 1 in another order") == warnings


MISTAKES = [
    (["--train-corpora", "big,none"], r"--train-corpora big,none: .* no corpus 'none'.* big, mid"),
    (["--train-corpora", "far"], r"no corpus 'far' with a train split; those with one: big, mid"),
    (["--train-corpora", "big,,mid"], r"--train-corpora 'big,,mid': not a list"),
    (["--train-corpora", "big,big"], r"not a list of different corpora"),
    (["--corpus-weights", "big=1,mid=1,small=0"], r"'small=0' is not NAME=WEIGHT .* above 0"),
    (["--corpus-weights", "big=1,mid=1,small=-1"], r"'small=-1' is not NAME=WEIGHT"),
    (["--corpus-weights", "big=1,mid=1,small=nan"], r"'small=nan' is not NAME=WEIGHT"),
    (["--corpus-weights", "big=1,mid"], r"'mid' is not NAME=WEIGHT"),
    (["--corpus-weights", "big=1,big=1"], r"'big=1' is not NAME=WEIGHT .* each corpus once"),
    (["--corpus-weights", "big=1,mid=1"], r"no weight for 'small'; add one, or exclude"),
    (
        ["--corpus-weights", "big=1,mid=1,small=1,far=1"],
        r"'far' is not among the training corpora: big, mid, small",
    ),
    (["--corpus-weights", "big=1,mid=1,small=1e-9"], r"the share of 'small' is less than one bl"),
    (
        ["--corpus-temperature", "0"],
        r"--corpus-temperature 0\.0 is out of range: use a number above 0",
    ),
    (["--corpus-temperature", "nan"], r"--corpus-temperature nan is out of range"),
    (
        ["--corpus-weights", "big=1,mid=1,small=1", "--corpus-temperature", "2"],
        r"--corpus-weights and --corpus-temperature both set",
    ),
    (["--dataset-impl", "raw"], r"--dataset-impl raw: .* mmap"),
    (["--shorten-data-split-list", "train"], r"--shorten-data-split-list train: not supported"),
]


@pytest.mark.parametrize("flags, message", MISTAKES)
def test_mistakes_in_the_flags_are_named(data, flags, message):
    with pytest.raises(UserError, match=message):
        train_set(data, *flags)
