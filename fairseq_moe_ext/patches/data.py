"""fairseq/data: complete files, valid batch sizes, and the position in the data."""

import itertools
import logging
import math
import os
import re
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Optional

import numpy
import torch
from fairseq.data import indexed_dataset

from fairseq_today.errors import UserError, first_line

from .. import counted, data_bin
from ..data_bin_files import check_data_bin, check_tokens
from ..files import read_text
from ..literals import literal

logger = logging.getLogger(__name__)


def add_from_file(stock, self, f):
    """An invalid dict.txt ends in a traceback that does not name the file."""
    if isinstance(f, str) and os.path.exists(f):
        read_text(f)  # stock would wait for a FIFO, and does not name a file in another encoding
    try:
        return stock(self, f)
    except (RuntimeError, ValueError) as error:
        if not isinstance(f, str):  # stock calls itself with the open file
            raise
        twice = re.search(r"loading Dictionary: ('.*')\. Duplicate", str(error))
        reason = f"{twice[1]} occurs twice" if twice else first_line(error)
        remedy = "use the dict.txt that the model was trained with"
        raise UserError(f"{f}: {reason}; {remedy}") from error


def get_encoder(stock, encoder_json_path, vocab_bpe_path):
    """An invalid tokenizer ends in a UnicodeDecodeError or JSONDecodeError that does not name the
    file."""
    try:
        return stock(encoder_json_path, vocab_bpe_path)
    except (ValueError, AttributeError) as error:  # of Unicode and JSON, too
        raise UserError(
            f"{encoder_json_path} and {vocab_bpe_path}: not a byte-level BPE "
            f"({first_line(error)}); copy both again from the model's folder"
        ) from error


def values_only(stock):
    """Stock runs settings that are Python expressions, and a checkpoint may contain any setting.
    This reads expressions of literals, with the same values, and runs nothing.

    A module's own `eval` hides Python's from its functions.
    """
    return literal


# Each module of fairseq with an `eval(` of a setting.
EVALUATING = (
    "fairseq.utils",  # eval_str_list, eval_str_dict, eval_bool
    "fairseq.criterions.ctc",
    "fairseq.data.audio.raw_audio_dataset",
    "fairseq.data.codedataset",
    "fairseq.models.fconv",
    "fairseq.models.fconv_lm",
    "fairseq.models.fconv_self_att",
    "fairseq.models.hubert.hubert",
    "fairseq.models.lightconv_lm",
    "fairseq.models.speech_to_text.s2t_wav_transformer",
    "fairseq.models.transformer_lm",
    "fairseq.models.wav2vec.wav2vec",
    "fairseq.models.wav2vec.wav2vec2",
    "fairseq.optim.adafactor",
    "fairseq.optim.adam",
    "fairseq.optim.adamax",
    "fairseq.optim.cpu_adam",
    "fairseq.optim.fused_lamb",
)


def make_dataset(stock, path, impl, fix_lua_indexing=False, dictionary=None):
    """Stock does not report a missing file, or tokens outside the dictionary, at once.

    It reads all of the .bin once (fairseq/data/indexed_dataset.py:385@0.12.2), so looking at the
    tokens costs little.
    """
    files = [path + ".idx", path + ".bin"]
    there = [os.path.isfile(file) for file in files]
    if any(there) and not all(there):
        raise UserError(
            f"{files[there.index(False)]}: missing, although {files[there.index(True)]} is "
            "there; a data-bin needs both files: copy it again or rebuild it"
        )
    if all(there) and os.path.getsize(files[0]) < 8:
        raise UserError(
            f"{files[0]}: only {os.path.getsize(files[0])} bytes; it is truncated: copy it again"
        )
    dataset = stock(path, impl, fix_lua_indexing, dictionary)
    if dictionary is not None and isinstance(dataset, indexed_dataset.MMapIndexedDataset):
        values = numpy.memmap(files[1], dtype=dataset._index.dtype, mode="r")
        check_tokens(files[1], values, dictionary)
    return dataset


def new_dataset(stock, cls, path=None, *args, **kwargs):
    """Stock reads a truncated .bin until a batch needs the missing part (buffer is smaller than
    requested size), and reports only a wrong format for a truncated .idx. This checks in __new__,
    because __del__ fails on an object that is not complete.
    """
    if path is not None:
        check_data_bin(path)
    return object.__new__(cls)


def batch_by_size(
    stock, indices, num_tokens_fn, num_tokens_vec=None, max_tokens=None, *args, **kwargs
):
    """Stock asserts that each sample fits into --max-tokens."""
    try:
        return stock(indices, num_tokens_fn, num_tokens_vec, max_tokens, *args, **kwargs)
    except AssertionError as error:
        longest = max(num_tokens_fn(index) for index in indices)
        raise UserError(
            f"--max-tokens (--max-tokens-valid) {max_tokens} is less than the longest sample, "
            f"of {longest} tokens: raise it to that, or {counted.shorter(max_tokens)}"
        ) from error


def raise_if_valid_subsets_unintentionally_ignored(stock, cfg):
    """Stock refuses valid1 and the like that --valid-subset does not name, by a plain exception,
    and does not look into the folders of corpora."""
    try:
        stock(cfg)
    except ValueError as error:
        raise UserError(str(error)) from error
    if getattr(cfg.task, "_name", None) != "mixture_language_modeling" or not cfg.task.data:
        return
    for name, folder in data_bin.find_corpora(Path(cfg.task.data)).items():
        subsets = cfg.dataset.valid_subset.replace(f"/{name}", "")
        dataset = SimpleNamespace(**{**cfg.dataset, "valid_subset": subsets})
        try:
            stock(SimpleNamespace(dataset=dataset, task=SimpleNamespace(data=str(folder))))
        except ValueError as error:
            raise UserError(f"{folder}: {error}") from error


def item_with_index(stock, self, index):
    """Stock's samples do not say where they stand, which `collate_with_context` needs."""
    return {**stock(self, index), "index": int(index)}


def collate_with_context(stock, self, samples):
    """Stock takes a batch's --context-window from the batch that was collated before. With several
    processes or workers, that is not the preceding text, and with several corpora (tasks/) it may
    be another one's. It also fails on an empty batch."""
    if not samples:
        return {}
    before, missing = samples[0]["index"], self.context_window
    tokens_before = [torch.zeros(0, dtype=torch.long)]
    while before > 0 and missing > 0:
        before -= 1
        sample = self.dataset[before]
        if sample.get("corpus") != samples[0].get("corpus"):
            break
        tokens_before.insert(0, sample["source"])
        missing -= len(tokens_before[0])
    self.prev_tokens = torch.cat(tokens_before)[-self.context_window :].numpy()
    return stock(self, samples)


def save_position(stock, self):
    """Stock counts the batches of one process; here those of all are saved, too."""
    state = stock(self)
    batches = state["iterations_in_epoch"] * self.num_shards
    sentences = sum(map(len, self.frozen_batches[:batches])) if batches else 0
    position = {"batches": batches, "of": len(self.frozen_batches), "sentences": sentences}
    if batches:
        position["order"] = _order(self, state["shuffle"])
    return {**state, "all_processes": position}


def _order(iterator: Any, shuffle: bool) -> Optional[int]:
    """A CRC of the order in which all processes see the sentences of an epoch; None for sentences
    that are not known by a number."""
    batches = iterator.frozen_batches
    try:
        sentences = numpy.concatenate(batches).astype(numpy.int64)
    except (TypeError, ValueError):
        return None
    drawn = getattr(iterator.dataset, "drawn", None)  # of a mixture, for this epoch
    order = [sentences if drawn is None else drawn[sentences]]
    if shuffle:
        group = iterator.num_shards if iterator.grouped_shuffling else 0
        order += [numpy.array([*map(len, batches), group, iterator.seed])]
    return zlib.crc32(numpy.concatenate(order).astype("<i8").tobytes())


def load_position(stock, self, state):
    """With another number of processes, the run continues after the batches that all processes have
    seen; if no update ends exactly there, a few are seen twice.

    Another batch size divides the epoch differently: the run continues after the same number of
    sentences. If batches are shuffled, these are other sentences, so in the rest of the epoch some
    are seen twice and some not at all. So they are if another --seed orders them.
    """
    position = state.get("all_processes")
    if position is not None and position["batches"] > 0:
        self.epoch = state["epoch"]  # some samplers make the batches of an epoch
        batches, shuffle = position["batches"], state.get("shuffle", True)
        other = position["of"] != len(self.frozen_batches)
        if other and shuffle:
            of = position["of"]  # None in the branch's checkpoints
            theirs = "an unknown number of" if of is None else f"{of:,}"
            _warn_of_another_order(
                f"the checkpoint divides epoch {self.epoch} into {theirs} batches, "
                f"this run into {len(self.frozen_batches):,}, in another shuffled order",
                "--batch-size and --max-tokens",
            )
        elif position.get("order") not in (None, _order(self, shuffle)):
            _warn_of_another_order(
                f"this run has the sentences of epoch {self.epoch} in another order than the "
                "checkpoint",
                "--seed, --corpus-weights and, with --grouped-shuffling, number of processes",
            )
        if other:
            ends = itertools.accumulate(map(len, self.frozen_batches))
            batches = sum(1 for _ in itertools.takewhile(position["sentences"].__ge__, ends))
        state = {**state, "iterations_in_epoch": batches // self.num_shards}
    stock(self, state)


def _warn_of_another_order(what: str, flags: str) -> None:
    logger.warning(
        f"{what}: until the epoch ends, some sentences are seen twice and others not at all; to "
        f"avoid that, use the {flags} of the checkpoint"
    )


def iterate_rest(stock, self, epoch, shuffle, fix_batches_to_gpus=False, offset=0):
    """For --skip-remainder-batch stock compares a place in the epoch with the number of batches
    after the place where a run continues, and drops most of them. An epoch without any batch ends
    in a traceback, so one is kept."""
    skips, self.skip_remainder_batch = self.skip_remainder_batch, False
    try:
        iterator = stock(self, epoch, shuffle, fix_batches_to_gpus, offset)
    finally:
        self.skip_remainder_batch = skips
    if skips and iterator is not None:
        iterator.take(offset + max(1, len(self.batch_sampler) - 1))
    return iterator


def group(stock, self, iterable, chunk_size, skip_remainder_batch=False):
    """Stock rounds up both the updates before the place where a run continues and those of the
    epoch. If that place is in the middle of an update of --update-freq batches, as after a change
    of that number, it leaves batches over and repeats the epoch, or finds no update."""
    first = getattr(iterable, "n", 0)
    rest = len(iterable) - first
    stock(self, iterable, chunk_size)
    updates = math.ceil(rest / chunk_size)
    if skip_remainder_batch and rest >= chunk_size:
        updates = rest // chunk_size
        iterable.take(first + updates * chunk_size)  # so that the epoch ends there
    self.total = self.n + updates
