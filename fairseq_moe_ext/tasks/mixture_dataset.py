"""The data of `mixture_language_modeling`: several corpora, mixed or one after the other."""

import zlib
from typing import Any, Dict, List, Optional, Sequence

import numpy as np
from fairseq.data import BaseWrapperDataset, ConcatDataset, FairseqDataset
from fairseq.data.iterators import EpochBatchIterator

from ..expert_parallel import process_count


class MixtureDataset(BaseWrapperDataset):
    """A fixed number of blocks of every corpus each epoch.

    Each corpus is read in random order again and again, and an epoch continues where the previous
    one stopped: no block repeats until its whole corpus has been seen. The content of an epoch
    depends only on its number and the seed, so training resumes exactly.
    """

    def __init__(self, parts: Dict[str, FairseqDataset], counts: List[int], seed: int):
        """`counts`: blocks of each of `parts` an epoch."""
        super().__init__(ConcatDataset(list(parts.values())))
        self._names = list(parts)
        self.counts = counts
        self._seed = seed
        self._epoch: Optional[int] = None
        self._all_sizes = np.concatenate([part.sizes for part in parts.values()])
        self.set_epoch(1)

    def set_epoch(self, epoch: int) -> None:
        super().set_epoch(epoch)
        if epoch == self._epoch:
            return
        self._epoch = epoch
        drawn, start = [], 0
        for name, part, count in zip(self._names, self.dataset.datasets, self.counts):
            drawn.append(start + self._draw(name, len(part), count, epoch))
            start += len(part)
        self.drawn = np.concatenate(drawn)  # (blocks of an epoch,) indices into the corpora

    def _draw(self, name: str, size: int, count: int, epoch: int) -> np.ndarray:
        """(count,) indices below `size`: the epoch's stretch of the endless shuffled sequence."""
        if count == size:
            return np.arange(size)  # all of it: batches are shuffled anyway
        first, stop = (epoch - 1) * count, epoch * count
        rounds = range(first // size, (stop - 1) // size + 1)
        shuffled = [
            np.random.RandomState(
                [self._seed % 2**32, zlib.crc32(name.encode()), round_]
            ).permutation(size)
            for round_ in rounds
        ]
        return np.concatenate(shuffled)[first - rounds[0] * size :][:count]

    @property
    def can_reuse_epoch_itr_across_epochs(self) -> bool:
        """Only if every epoch holds every block once."""
        return self.counts == [len(part) for part in self.dataset.datasets]

    def __len__(self) -> int:
        return len(self.drawn)

    def __getitem__(self, index: int) -> Dict[str, Any]:
        return self.dataset[int(self.drawn[index])]

    @property
    def sizes(self) -> np.ndarray:
        return self._all_sizes[self.drawn]

    def num_tokens(self, index: int) -> int:
        return self._all_sizes[self.drawn[index]]

    def num_tokens_vec(self, indices: np.ndarray) -> np.ndarray:
        return self.sizes[indices]

    def size(self, index: int) -> int:
        return self.num_tokens(index)

    def ordered_indices(self) -> np.ndarray:
        """All indices, shuffled, then by size, as MonolingualDataset orders one corpus."""
        return np.lexsort([np.random.permutation(len(self)), self.sizes])

    # not the wrapped dataset's, which would not see what was drawn
    batch_by_size = FairseqDataset.batch_by_size
    filter_indices_by_size = FairseqDataset.filter_indices_by_size


class SeparateCorporaDataset(BaseWrapperDataset):
    """Several corpora in turn; no batch mixes two.

    A batch names its corpus under the key "corpus". A corpus has the same batches as when it is
    loaded alone, so its perplexity does not depend on the others, even if a model looks at the
    whole batch.
    """

    def __init__(self, labels: List[int], parts: List[FairseqDataset]):
        """`labels`: the number that each of `parts` has under "corpus"."""
        super().__init__(ConcatDataset(parts))
        self._labels = labels
        self._ends = np.cumsum([len(part) for part in parts])  # (parts,)
        self._sizes = np.concatenate([part.sizes for part in parts])

    def _part(self, index):
        """Position in `parts` of the block(s) at `index`."""
        return np.searchsorted(self._ends, index, side="right")

    def __getitem__(self, index: int) -> Dict[str, Any]:
        label = self._labels[self._part(index)]
        return {**self.dataset[int(index)], "id": int(index), "corpus": label}

    def collater(self, samples: List[Dict[str, Any]]) -> Dict[str, Any]:
        if not samples:  # a rank without a batch
            return {}
        batch = super().collater(samples)
        (batch["corpus"],) = {sample["corpus"] for sample in samples}
        return batch

    @property
    def sizes(self) -> np.ndarray:
        return self._sizes

    def num_tokens(self, index: int) -> int:
        return self._sizes[index]

    def num_tokens_vec(self, indices: np.ndarray) -> np.ndarray:
        return self._sizes[indices]

    def size(self, index: int) -> int:
        return self._sizes[index]

    def ordered_indices(self) -> np.ndarray:
        state = np.random.get_state()
        orders, start = [], 0
        for part in self.dataset.datasets:
            np.random.set_state(state)  # the order that the corpus has alone
            orders.append(start + part.ordered_indices())
            start += len(part)
        return np.concatenate(orders)

    def batch_by_size(self, indices: np.ndarray, **limits: Any) -> List[Sequence[int]]:
        batches: List[Sequence[int]] = []
        for part in range(len(self._ends)):
            part_indices = indices[self._part(indices) == part]
            if len(part_indices):  # not all left out for their length
                batches += _whole_steps(FairseqDataset.batch_by_size(self, part_indices, **limits))
        return batches

    def first_of_each(self, batches: Sequence[Sequence[int]], count: int) -> List[Sequence[int]]:
        """The first `count` batches of every corpus (--max-valid-steps)."""
        kept: Dict[int, List[Sequence[int]]] = {}
        for batch in filter(len, batches):
            kept.setdefault(int(self._part(batch[0])), []).append(batch)
        return [
            batch
            for batches_of_corpus in kept.values()
            for batch in _whole_steps(batches_of_corpus[:count])
        ]

    filter_indices_by_size = FairseqDataset.filter_indices_by_size


def _whole_steps(batches: List[Sequence[int]]) -> List[Sequence[int]]:
    """Batches of a corpus, filled up with empty ones to whole steps of all processes. No process
    may begin a corpus while another ends the previous one, because they would then route together
    what one process routes apart."""
    return batches + [[]] * (-len(batches) % process_count())


def release(iterator: EpochBatchIterator) -> None:
    """End the workers of an iterator whose epoch is over; leave others alone.

    Iterator and data loader refer to one another (fairseq/data/iterators.py:482@0.12.2), so the
    workers would live until garbage collection, which then waits 5 seconds for each of them. This
    matters where every epoch has its own iterator.
    """
    if iterator._cur_epoch_itr is not None and iterator.end_of_epoch():
        iterator._cur_epoch_itr = iterator.dataloader = iterator.batch_sampler = None


def apportion(shares: np.ndarray, total: int) -> List[int]:
    """Whole numbers in proportion to `shares` that sum to `total` (largest remainders).

    Args:
        shares: (n,) positive, of any sum.
    """
    exact = shares / shares.sum() * total
    counts = np.floor(exact).astype(np.int64)
    missing = total - int(counts.sum())
    largest = np.argsort(-(exact - counts), kind="stable")[:missing]
    counts[largest] += 1
    return counts.tolist()
