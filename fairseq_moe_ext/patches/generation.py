"""Faults of stock fairseq 0.12.2 in generating text."""

import contextlib
from typing import Any, Dict

import torch
from fairseq.search import BeamSearch

from .. import context

_NEVER = -1  # no token


def forward(stock, self, tokens, lprobs, bsz, beam_size, step):
    """In stock --no-repeat-ngram-size bans nothing: it takes the n-gram to compare from the end of
    the row, which is padding; for size 1 the n-gram is empty.

    A token that a prompt or the maximum length forces must not be banned, or all tokens would have
    probability 0.
    """
    before = lprobs.clone()
    if not self.use_extension:
        tokens = tokens[:, : step + 1]
    banned = stock(self, tokens, lprobs, bsz, beam_size, step)
    if self.no_repeat_ngram_size == 1:
        banned = banned.scatter(1, tokens[:, 1 : step + 1], float("-inf"))
    forced = banned.isneginf().all(-1)
    banned[forced] = before[forced]
    return banned


def generate(stock, self, sample, prefix_tokens=None, constraints=None, bos_token=None):
    """Stock forces a prompt token by token, and any </s> in it finishes a hypothesis. Here the
    search continues after an </s> inside a prompt, and ends at one that ends the prompt. If a
    sentence is over (an empty line, or one shorter than --prefix-size), its other beams have a
    probability of 0 (`step < max_len`, an AssertionError); behind a newline, which is an
    </s> to language models, the prompt no longer fits (another one). So such prompts are searched
    one by one; for an </s> within, no token ends the sentence, and a sentence that is over has one
    hypothesis.
    """
    if prefix_tokens is None or not prefix_tokens.eq(self.eos).any():
        return stock(self, sample, prefix_tokens, constraints, bos_token)
    goes_on, results = context.prompts_go_on.get(), []
    for row, prefix in enumerate(prefix_tokens):
        prefix = prefix[prefix.ne(self.pad)][None]
        some = None if constraints is None else constraints[row : row + 1]
        over = prefix.numel() > 0 and prefix[0, -1] == self.eos and not goes_on
        with _one_hypothesis(self) if over else contextlib.nullcontext():
            with _ends_passed(self):
                results += stock(self, _row(sample, row), prefix, some, bos_token)
    return results


@contextlib.contextmanager
def _one_hypothesis(generator):
    before = generator.beam_size, generator.search
    generator.beam_size, generator.search = 1, BeamSearch(generator.tgt_dict)
    try:
        yield
    finally:
        generator.beam_size, generator.search = before


@contextlib.contextmanager
def _ends_passed(generator):
    eos, update = generator.eos, generator.search.update_constraints

    def update_constraints(active_hypos):  # the last of a step that asks what ends a sentence
        generator.eos = eos
        update(active_hypos)

    generator.passed_eos = eos
    generator.search.update_constraints = update_constraints
    try:
        yield
    finally:
        generator.eos, generator.passed_eos = eos, None
        del generator.search.update_constraints


def steer_prefix(stock, self, step, lprobs, scores, tokens, prefix_tokens, beam_size):
    """In stock an </s> inside a prompt ends the sentence."""
    passed = getattr(self, "passed_eos", None)
    last = step + 1 == prefix_tokens.size(1) and not context.prompts_go_on.get()
    if passed is not None and prefix_tokens[0, step] == passed and not last:
        self.eos = _NEVER
    return stock(self, step, lprobs, scores, tokens, prefix_tokens, beam_size)


def _row(sample: Dict[str, Any], row: int) -> Dict[str, Any]:
    """One row of a batch."""

    def of(value):
        return value[row : row + 1] if torch.is_tensor(value) and value.dim() else value

    inputs = {name: of(value) for name, value in sample["net_input"].items()}
    return {"net_input": inputs, **({"id": of(sample["id"])} if "id" in sample else {})}


def sampling(stock, self, tgt_dict, sampling_topk=-1, sampling_topp=-1.0):
    """Stock raises `selected index k out of range` if --sampling-topk exceeds the vocabulary. Here
    it takes all tokens."""
    stock(self, tgt_dict, min(sampling_topk, len(tgt_dict)), sampling_topp)
