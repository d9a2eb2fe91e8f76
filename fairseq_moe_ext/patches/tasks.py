"""fairseq/tasks: loading data, state in checkpoints, skipped samples, and steps."""

import contextlib
import logging
import math
import sys
from argparse import Namespace
from typing import Any, Dict, Iterator, Mapping, Optional

import torch
from fairseq import utils
from fairseq.data import Dictionary
from fairseq.tasks.language_modeling import LanguageModelingTask
from torch import Tensor

from fairseq_today.errors import UserError

from .. import context, counted, fingerprint, ours, tokenizer_files
from ..errors import DAMAGED, NotFinite
from ..expert_parallel import process_rank
from ..models.hub import find_tokenizer
from ..trainer_checks import check_task, warn_of_drops
from .checkpoint_io import check_inputs

logger = logging.getLogger(__name__)


def setup_task(stock, cfg, *args, **kwargs):
    """fairseq-train builds the model before it looks at the data and at the checkpoint to start
    from; here, for our models and tasks, mistakes in what names them are found before. It loads
    the validation data even with --disable-validation; this skips it.

    fairseq-validate sets up its task with the same setting, from the checkpoint, and needs the
    data. Only training passes `combine` without `task_cfg` (fairseq_cli/validate.py:87@0.12.2).
    """
    task = stock(cfg, *args, **kwargs)
    whole: Any = cfg._get_parent() if hasattr(cfg, "_get_parent") else None
    dataset = whole.get("dataset") if isinstance(whole, Mapping) else None
    training = dataset is not None and whole.common_eval.path is None
    new = context.building.get() is None  # not the task of a checkpoint
    if training and new and ours.is_run(whole):
        check_task(whole, task)
        if not whole.distributed_training.use_sharded_state:  # else the trainer knows the suffix
            check_inputs(whole.checkpoint, whole.checkpoint.checkpoint_suffix)
    if dataset is not None and dataset.get("disable_validation"):
        unused = {"valid", *dataset.valid_subset.split(",")} - {dataset.train_subset}
        load = task.load_dataset

        def load_dataset(split, *args, **kwargs):
            in_training = "combine" in kwargs and "task_cfg" not in kwargs
            return None if in_training and split in unused else load(split, *args, **kwargs)

        task.load_dataset = load_dataset
    return task


def state_dict(stock, self):
    """A checkpoint keeps the state of the task. This adds the fingerprint of its dictionary and the
    digests of its tokenizer's files."""
    state = stock(self)
    dictionary = getattr(self, "dictionary", None)
    if isinstance(dictionary, Dictionary):
        state = {**state, fingerprint.KEY: fingerprint.fingerprint(dictionary)}
        data = tokenizer_files.data_of(self)
        digests = tokenizer_files.digests(data) if data is not None else {}
        state.update({tokenizer_files.KEY: digests} if digests else {})
    return state


def load_state_dict(stock, self, state_dict):
    """Stock gives the state to the task before the model is built. This compares the dictionary."""
    rest = dict(state_dict)
    saved = rest.pop(fingerprint.KEY, None)
    rest.pop(tokenizer_files.KEY, None)
    fingerprint.check(self, saved)
    self.loaded_from = saved
    stock(self, rest)


def dataset(stock, self, split):
    """What fairseq-eval-lm, fairseq-validate and fairseq-generate read must be encoded with the
    BPE of the checkpoint that they have loaded."""
    fingerprint.check_tokenizer(self, getattr(self, "loaded_from", None) or {})
    return stock(self, split)


def build_bpe(stock, self, args):
    """fairseq-interactive reads text as words without --bpe, and with --bpe gpt2 fetches GPT-2's
    tokenizer from the network; for language models this uses the one beside the data. Files that
    are given must be the model's."""
    if not _of_language_models(self):
        return stock(self, args)
    name = getattr(args, "_name", None)
    elsewhere = name == "gpt2" and not str(args.gpt2_encoder_json).startswith("http")
    data = tokenizer_files.data_of(self)
    if elsewhere:
        given = {name: getattr(args, name, None) for name in tokenizer_files.GIVEN}
        fingerprint.check_bpe(given, getattr(self, "loaded_from", None) or {})
    if name in (None, "gpt2") and not elsewhere and data is not None:
        tokenizer = find_tokenizer(data)
        if tokenizer:
            fingerprint.check_tokenizer(self, getattr(self, "loaded_from", None) or {})
            args = Namespace(**tokenizer)
    return stock(self, args)


def build_generator(stock, self, models, args, *rest, **kwargs):
    """--sampling-topk samples from at most the whole dictionary."""
    most, vocabulary = getattr(args, "sampling_topk", -1), len(self.target_dictionary)
    if most > vocabulary:
        raise UserError(
            f"--sampling-topk {most}: the dictionary has {vocabulary} symbols: lower it"
        )
    return stock(self, models, args, *rest, **kwargs)


def get_interactive_tokens_and_lengths(stock, self, lines, encode_fn):
    """Stock answers a line without any word of the dictionary as a row of <unk>. For language
    models this notes the line, and filter_indices_by_size skips it."""
    if not _of_language_models(self):
        return stock(self, lines, encode_fn)
    tokens, lengths = stock(self, lines, encode_fn)
    first = getattr(self, "next_line", 1)
    self.next_line = first + len(lines)
    words = [row[row.ne(self.source_dictionary.eos())] for row in tokens]
    unknown = [len(row) > 0 and bool(row.eq(self.source_dictionary.unk()).all()) for row in words]
    self.lines_read = first, unknown
    return tokens, lengths


def filter_indices_by_size(
    stock, self, indices, dataset, max_positions=None, ignore_invalid_inputs=False
):
    """Stock reports how many samples it skips as too long for the model, but not their share of the
    data, and it does not stop if none is left. If it must not skip any, it raises a plain
    Exception. A line that is too long ends a session of fairseq-interactive; here it is reported
    and skipped. What to do is said in flags of language models, so other tasks are left to stock.
    """
    if not _of_language_models(self):
        return stock(self, indices, dataset, max_positions, ignore_invalid_inputs)
    if hasattr(self, "lines_read"):
        return _lines_that_fit(self, indices, dataset, max_positions)
    kept = stock(self, indices, dataset, max_positions, True)
    by_line = hasattr(self, "next_line")  # fairseq-interactive's, reported one by one
    if len(kept) == len(indices) or by_line:
        return kept
    some, whole = counted.tokens(dataset, kept), counted.tokens(dataset, indices)
    longest = counted.longest(max_positions)
    report = (
        f"{len(indices) - len(kept):,} of {len(indices):,} samples are longer than {longest}, the "
        "longest that the model takes (or --max-tokens)"
    )
    if len(kept) and ignore_invalid_inputs:
        logger.warning(f"{report}, and are left out: counted {some:,} of {whole:,} tokens")
        return kept
    settings = getattr(self, "args", None)
    mode, given = (getattr(settings, n, None) for n in ("sample_break_mode", "tokens_per_sample"))
    remedy = counted.shorter(longest, mode)
    new = not hasattr(self, "loaded_from")  # a model to be trained
    if new and given == longest and counted.by_lines(mode):
        remedy = counted.room_for(dataset, indices)
    if not len(kept):
        raise UserError(f"{report}, and none is left: {remedy}")
    raise UserError(
        f"{report}: {remedy}, or add {counted.SKIP}, with which {some:,} of {whole:,} tokens are "
        "counted"
    )


def _of_language_models(task: Any) -> bool:
    return isinstance(task, LanguageModelingTask) or ours.is_ours(type(task))


def _lines_that_fit(task, indices, dataset, max_positions):
    first, unknown = task.lines_read
    del task.lines_read
    kept, too_long = dataset.filter_indices_by_size(indices, max_positions)
    for index in sorted(too_long):
        _leave_out(first + index, f"{dataset.size(index)} tokens; the model takes {max_positions}")
    for index in sorted(i for i in kept if unknown[i]):
        _leave_out(first + index, "only <unk>: add --bpe and its files")
    return kept[[not unknown[i] for i in kept]] if len(kept) else kept


def _leave_out(line: int, reason: str) -> None:
    print(f"error: line {line} is left out: {reason}", file=sys.stderr, flush=True)


def train_step(stock, self, sample, model, *args, **kwargs):
    """The branch's padding rule fills up batches; this sets how many rows a full batch has in a
    training step."""
    with full_rows(model, getattr(getattr(self, "args", None), "batch_size", None)):
        return stock(self, sample, model, *args, **kwargs)


def valid_step(stock, self, sample, model, criterion):
    """fairseq-validate gives a process whose share has a batch less than others' nothing at all,
    over which the criterion trips (here it joins with no sentences), and goes on with a loss that
    is no number.

    The branch's rule for padding is told how many rows a full batch has. fairseq-validate warns of
    a capacity that drops choices; in training the trainer has.
    """
    if not ours.in_step(self, model, criterion):
        return stock(self, sample, model, criterion)
    if process_rank() == 0 and getattr(model, "has_experts", False):
        warn_of_drops(model)
    if not sample:
        data = next(iter(self.datasets.values()))  # all sets of a task have batches alike
        sample = no_sentences(data.collater([data[0]]))
        if next(model.parameters()).is_cuda:
            sample = utils.move_to_cuda(sample)
    with full_rows(model, getattr(getattr(self, "args", None), "batch_size_valid", None)):
        loss, sample_size, logging_output = stock(self, sample, model, criterion)
    if not math.isfinite(float(loss.sum())):
        raise NotFinite(f"the validation loss is {float(loss.sum())}: {DAMAGED}")
    return loss, sample_size, logging_output


@contextlib.contextmanager
def full_rows(model, rows: Optional[int]) -> Iterator[None]:
    """While a step is taken, how many rows a full batch has; eval-lm takes none."""
    rule = getattr(getattr(model, "decoder", None), "pad_rule", None)
    if rule is None:
        yield
        return
    rule.full_rows = rows
    try:
        yield
    finally:
        rule.full_rows = 0


def no_sentences(sample: Dict[str, Any]) -> Dict[str, Any]:
    """A batch, cut to its first zero rows."""
    empty = {
        key: value[:0] if isinstance(value, Tensor) and value.dim() > 0 else value
        for key, value in sample.items()
    }
    return {
        **empty,
        "net_input": {key: value[:0] for key, value in sample["net_input"].items()},
        "ntokens": 0,
        "nsentences": 0,
    }


def nothing(device: Optional[torch.device] = None) -> Dict[str, Any]:
    """A batch of language modelling with no sentences."""
    none = torch.zeros(0, 1, dtype=torch.long, device=device)
    inputs = {"src_tokens": none, "src_lengths": none[:, 0]}
    counts = {"ntokens": 0, "nsentences": 0}
    return {"id": none[:, 0], "net_input": inputs, "target": none, **counts}
