"""The place in the data, for any number of processes."""

import functools
import itertools

from fairseq.data import iterators


def apply() -> None:
    """fairseq/data/iterators.py:431 counts the batches of one process. On another number of
    processes, or with another batch size, the run goes on behind the sentences that all have
    seen; where no number of updates ends there, a few are seen twice."""
    stock_save = iterators.EpochBatchIterator.state_dict
    stock_load = iterators.EpochBatchIterator.load_state_dict

    @functools.wraps(stock_save)
    def state_dict(self):
        state = stock_save(self)
        batches = state["iterations_in_epoch"] * self.num_shards
        sentences = sum(map(len, self.frozen_batches[:batches])) if batches else 0
        place = {"batches": batches, "of": len(self.frozen_batches), "sentences": sentences}
        return {**state, "all_processes": place}

    @functools.wraps(stock_load)
    def load_state_dict(self, state):
        place = state.get("all_processes")
        if place is not None and place["batches"] > 0:
            self.epoch = state["epoch"]  # some samplers make the batches of an epoch
            batches = place["batches"]
            if place["of"] != len(self.frozen_batches):
                ends = itertools.accumulate(map(len, self.frozen_batches))
                batches = sum(1 for _ in itertools.takewhile(place["sentences"].__ge__, ends))
            state = {**state, "iterations_in_epoch": batches // self.num_shards}
        stock_load(self, state)

    iterators.EpochBatchIterator.state_dict = state_dict
    iterators.EpochBatchIterator.load_state_dict = load_state_dict
