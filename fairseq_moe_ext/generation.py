"""Faults of stock fairseq 0.12.2 in generating text: patches of compat.py, loaded with it."""

import contextlib
import functools
import sys
from typing import Any, Dict, Iterator

_NEVER = -1  # no token
_prompts_go_on = False


@contextlib.contextmanager
def prompts_go_on() -> Iterator[None]:
    """While this holds, an </s> that ends a prompt is a newline of it, behind which text goes on;
    else a prompt that ends so is a finished sentence."""
    global _prompts_go_on
    _prompts_go_on = True
    try:
        yield
    finally:
        _prompts_go_on = False


def repeated_ngrams() -> None:
    """Let --no-repeat-ngram-size do what it says.

    Breaks: the n-gram to compare with is read at the end of a row that is as long as the longest
    output, where there is padding, so nothing is ever banned; that of size 1 is empty. A token that
    a prompt or the longest length forces must not be banned, or all have a probability of 0.
    Where: fairseq/ngram_repeat_block.py:105.
    Ends: with a fairseq that reads it at the current step.
    """
    from fairseq.ngram_repeat_block import NGramRepeatBlock

    stock = NGramRepeatBlock.forward

    @functools.wraps(stock)
    def forward(self, tokens, lprobs, bsz, beam_size, step):
        before = lprobs.clone()
        if not self.use_extension:
            tokens = tokens[:, : step + 1]
        found = stock(self, tokens, lprobs, bsz, beam_size, step)
        if self.no_repeat_ngram_size == 1:
            found = found.scatter(1, tokens[:, 1 : step + 1], float("-inf"))
        forced = found.isneginf().all(-1)
        found[forced] = before[forced]
        return found

    NGramRepeatBlock.forward = forward


def prompts_with_ends() -> None:
    """Search on behind an </s> within a prompt, and end at one that ends it.

    Breaks: a prompt is forced token by token, and its </s> finishes a hypothesis like any other. Of
    a sentence that is over (an empty line, or one shorter than --prefix-size) the other beams have
    a probability of 0 then (`step < max_len`, an AssertionError); behind a newline, which is an
    </s> to language models, the prompt no longer fits (another one).
    Where: fairseq/sequence_generator.py:470, :558 and :611.
    How: such prompts are searched one by one; for an </s> within, no token ends the sentence, and
    a sentence that is over has one hypothesis.
    Ends: with a fairseq that reads a prompt at one go.
    """
    from fairseq.search import BeamSearch
    from fairseq.sequence_generator import SequenceGenerator

    stock, stock_prefix = SequenceGenerator._generate, SequenceGenerator._prefix_tokens

    @functools.wraps(stock)
    def _generate(self, sample, prefix_tokens=None, constraints=None, bos_token=None):
        if prefix_tokens is None or not prefix_tokens.eq(self.eos).any():
            return stock(self, sample, prefix_tokens, constraints, bos_token)
        found = []
        for row, prefix in enumerate(prefix_tokens):
            prefix = prefix[prefix.ne(self.pad)][None]
            some = None if constraints is None else constraints[row : row + 1]
            over = prefix.numel() > 0 and prefix[0, -1] == self.eos and not _prompts_go_on
            with one_hypothesis(self) if over else contextlib.nullcontext():
                with ends_passed(self):
                    found += stock(self, _row(sample, row), prefix, some, bos_token)
        return found

    @contextlib.contextmanager
    def one_hypothesis(self):
        before = self.beam_size, self.search
        self.beam_size, self.search = 1, BeamSearch(self.tgt_dict)
        try:
            yield
        finally:
            self.beam_size, self.search = before

    @contextlib.contextmanager
    def ends_passed(self):
        eos, update = self.eos, self.search.update_constraints

        def update_constraints(active_hypos):  # the last of a step that asks what ends a sentence
            self.eos = eos
            update(active_hypos)

        self.passed_eos, self.search.update_constraints = eos, update_constraints
        try:
            yield
        finally:
            self.eos, self.passed_eos = eos, None
            del self.search.update_constraints

    @functools.wraps(stock_prefix)
    def _prefix_tokens(self, step, lprobs, scores, tokens, prefix_tokens, beam_size):
        passed = getattr(self, "passed_eos", None)
        last = step + 1 == prefix_tokens.size(1) and not _prompts_go_on
        if passed is not None and prefix_tokens[0, step] == passed and not last:
            self.eos = _NEVER
        return stock_prefix(self, step, lprobs, scores, tokens, prefix_tokens, beam_size)

    SequenceGenerator._generate = _generate
    SequenceGenerator._prefix_tokens = _prefix_tokens


def _row(sample: Dict[str, Any], row: int) -> Dict[str, Any]:
    """One row of a batch."""
    import torch

    def of(value):
        return value[row : row + 1] if torch.is_tensor(value) and value.dim() else value

    inputs = {name: of(value) for name, value in sample["net_input"].items()}
    return {"net_input": inputs, **({"id": of(sample["id"])} if "id" in sample else {})}


def topk_of_a_small_dictionary() -> None:
    """Take all tokens where --sampling-topk asks for more than there are.

    Breaks: `selected index k out of range`, a RuntimeError.
    Where: fairseq/search.py:696.
    Ends: with a fairseq that takes the smaller number.
    """
    from fairseq.search import Sampling

    stock = Sampling.__init__

    @functools.wraps(stock)
    def __init__(self, tgt_dict, sampling_topk=-1, sampling_topp=-1.0):
        stock(self, tgt_dict, min(sampling_topk, len(tgt_dict)), sampling_topp)

    Sampling.__init__ = __init__


def overlong_lines() -> None:
    """Leave out a line of fairseq-interactive that the model cannot take, and say so.

    Breaks: a line longer than the model takes ends the session with a traceback; one of which no
    word is in the dictionary is answered as a row of <unk>.
    Where: fairseq/tasks/fairseq_task.py:172 and :631, fairseq_cli/interactive.py:89.
    Ends: with a fairseq that asks for another line.
    """
    from fairseq.tasks import FairseqTask

    stock, stock_filter = (
        FairseqTask.get_interactive_tokens_and_lengths,
        FairseqTask.filter_indices_by_size,
    )

    @functools.wraps(stock)
    def get_interactive_tokens_and_lengths(self, lines, encode_fn):
        tokens, lengths = stock(self, lines, encode_fn)
        first = getattr(self, "next_line", 1)
        self.next_line = first + len(lines)
        words = [row[row.ne(self.source_dictionary.eos())] for row in tokens]
        unknown = [
            len(row) > 0 and bool(row.eq(self.source_dictionary.unk()).all()) for row in words
        ]
        self.lines_read = first, unknown
        return tokens, lengths

    @functools.wraps(stock_filter)
    def filter_indices_by_size(self, indices, dataset, max_positions=None, ignore=False):
        if not hasattr(self, "lines_read"):
            return stock_filter(self, indices, dataset, max_positions, ignore)
        first, unknown = self.lines_read
        del self.lines_read
        kept, too_long = dataset.filter_indices_by_size(indices, max_positions)
        for index in sorted(too_long):
            _left_out(
                first + index, f"{dataset.size(index)} tokens; the model takes {max_positions}"
            )
        for index in sorted(i for i in kept if unknown[i]):
            _left_out(first + index, "nothing but <unk>: give --bpe and its files")
        return kept[[not unknown[i] for i in kept]] if len(kept) else kept

    FairseqTask.get_interactive_tokens_and_lengths = get_interactive_tokens_and_lengths
    FairseqTask.filter_indices_by_size = filter_indices_by_size


def _left_out(line: int, reason: str) -> None:
    print(f"error: line {line} is left out: {reason}", file=sys.stderr, flush=True)
