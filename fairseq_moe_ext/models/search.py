"""Continue prompts by greedy search, beam search or sampling, through the model's cache of keys and
values.

fairseq's own search treats </s> as an end. Here it is a newline, which may occur in prompts and, if
the caller allows it, in generated text. All processes take the same number of steps, because
experts may be distributed over them.
"""

from random import Random
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .. import progress_bar
from ..data_bin import FILLING
from ..expert_parallel import all_gather, collective_device, process_count, process_rank
from .next_token import LIKELIEST, Choice
from .token_scores import exact_logits

# Whether the new tokens end a hypothesis; called once after each token.
Done = Callable[[Sequence[int]], bool]

Item = TypeVar("Item")
Result = TypeVar("Result")


class Prompt(NamedTuple):
    """A prompt to continue."""

    tokens: Tuple[int, ...]
    max_new: int  # tokens
    done: Done
    random: Optional[Random] = None  # for sampling: a row's draws do not depend on its batch


def no_text(model: Any, tokenizer: bool) -> List[int]:
    """The tokens of a model's dictionary that are not text: <s>, <pad>, the madeupword entries
    that pad it and, with a tokenizer, which can spell everything, <unk>."""
    dictionary = model.decoder.dictionary
    padding = {i for i, word in enumerate(dictionary.symbols) if FILLING.fullmatch(word)}
    unknown = {dictionary.unk()} if tokenizer else set()
    return sorted({dictionary.bos(), dictionary.pad()} | padding | unknown)


def by_batches(
    items: Sequence[Item],
    batches: Sequence[Sequence[int]],
    compute: Callable[[Sequence[Item]], Sequence[Result]],
    progress: str,
) -> List[Result]:
    """The result of each item, on all processes. Each takes its share of the batches, and all take
    the same number of steps: `compute` gets no items where a process has no batch left.

    batches: numbers of items. progress: what a bar says; "": there is none.
    """
    own = batches[process_rank() :: process_count()]
    steps = -(-len(batches) // process_count())
    results: Dict[int, Result] = {}
    with progress_bar.bar(progress, steps, "batch", bool(progress) and process_rank() == 0) as bar:
        for step in range(steps):
            batch = own[step] if step < len(own) else []
            results.update(zip(batch, compute([items[i] for i in batch])))
            bar.update()
    for other in all_gather(results):
        results.update(other)
    return [results[i] for i in range(len(items))]


class _Hypothesis(NamedTuple):
    score: float  # sum of the new tokens' log-probabilities
    new: Tuple[int, ...]
    row: int  # of the batch, whose keys and values it uses

    def mean(self) -> float:
        return self.score / len(self.new)


class Generator:
    """Continues prompts: returns the new tokens that a search finds, at most max_new, including the
    end.

    With a beam of 1, each token is the most likely one, or is sampled. A wider beam keeps that many
    unfinished hypotheses per prompt, ranked by the sum of their log-probabilities, until as many
    have ended. As in fairseq, one that ends counts only if it is among that many best ones of its
    step: of worse ends, `beam` soon come together. The answer is the hypothesis with the highest
    mean (fairseq's --lenpen 1).

    A prompt and its new tokens must fit into the model's context together.
    """

    def __init__(
        self,
        model: Any,  # language_model.MoETransformerLanguageModel
        beam: int,
        batch_tokens: int,
        progress: str = "",
        choice: Choice = LIKELIEST,
        never: Sequence[int] = (),
        starts_with: Optional[int] = None,
    ) -> None:
        """
        Args:
            batch_tokens: tokens per batch on one process, including padding; a longer row gets
                its own batch.
            choice: how to choose the next token; sampling needs a beam of 1.
            never: tokens that are never generated, besides padding.
            starts_with: the token before each prompt (default: </s>).
        """
        dictionary = model.decoder.dictionary
        self.model = model
        self.beam = beam
        self.batch_tokens = batch_tokens
        self.progress = progress
        self.choice = choice
        self.pad = dictionary.pad()
        self.never = torch.tensor([self.pad, *never])
        self.start = dictionary.eos() if starts_with is None else starts_with

    def __call__(self, prompts: Sequence[Prompt]) -> List[List[int]]:
        """The new tokens of each prompt. All processes pass the same prompts, in any order."""
        return [hypotheses[0] for hypotheses in self.best(prompts)]

    def best(self, prompts: Sequence[Prompt]) -> List[List[List[int]]]:
        """Like __call__, but returns all ended hypotheses of each prompt, the best first: as many
        as the beam is wide, or a few more."""
        return by_batches(prompts, self._batches(prompts), self._search, self.progress)

    def _batches(self, prompts: Sequence[Prompt]) -> List[List[int]]:
        """Indices of prompts in batches of similar length, long prompts first."""
        batches: List[List[int]] = []
        room = 0
        for i in sorted(range(len(prompts)), key=lambda i: -len(prompts[i].tokens)):
            if not room:
                batches.append([])
                whole = 1 + len(prompts[i].tokens) + prompts[i].max_new
                room = max(1, self.batch_tokens // (whole * self.beam))
            batches[-1].append(i)
            room -= 1
        return batches

    @torch.no_grad()
    def _search(self, prompts: Sequence[Prompt]) -> List[List[List[int]]]:
        device = next(self.model.parameters()).device
        length = 1 + max((len(prompt.tokens) for prompt in prompts), default=0)
        tokens = torch.full((len(prompts), length), self.pad, device=device)  # (B, L)
        for i, prompt in enumerate(prompts):
            tokens[i, length - 1 - len(prompt.tokens) :] = torch.tensor(
                (self.start, *prompt.tokens)
            )
        state: Dict[str, Any] = {}
        live = [[_Hypothesis(0.0, (), i)] for i in range(len(prompts))]
        ended: List[List[_Hypothesis]] = [[] for _ in prompts]
        while _on_any_process(any(live)):
            if not any(live):  # another process continues, and needs the experts of this one
                nothing = tokens.new_zeros(0, 1)
                self.model.decoder(nothing, incremental_state={}, features_only=True)
                continue
            x, _ = self.model.decoder(tokens, incremental_state=state, features_only=True)
            before = [
                (*prompt.tokens, *hypothesis.new)
                for prompt, hypotheses in zip(prompts, live)
                for hypothesis in hypotheses
            ]
            log_probs = self._log_probs(x[:, -1], before)  # (N, V)
            for i, prompt in enumerate(prompts):
                live[i] = self._step(prompt, live[i], ended[i], log_probs)
            rows = [hypothesis.row for hypotheses in live for hypothesis in hypotheses]
            last = [hypothesis.new[-1] for hypotheses in live for hypothesis in hypotheses]
            order = torch.tensor(rows, dtype=torch.long, device=device)
            column = torch.tensor(last, dtype=torch.long, device=device)
            if rows != list(range(len(tokens))):  # else a needless copy
                tokens = tokens[order]
                self.model.decoder.reorder_incremental_state_scripting(state, order)
            tokens = torch.cat([tokens, column[:, None]], dim=1)
            numbers = iter(range(len(rows)))
            live = [[h._replace(row=next(numbers)) for h in hypotheses] for hypotheses in live]
        order_of = [sorted(one, key=_Hypothesis.mean, reverse=True) for one in ended]
        return [[list(hypothesis.new) for hypothesis in one] for one in order_of]

    def _step(
        self,
        prompt: Prompt,
        live: Sequence[_Hypothesis],
        ended: List[_Hypothesis],
        log_probs: Tensor,
    ) -> List[_Hypothesis]:
        """Extend the hypotheses of one prompt by a token; append those that end to `ended`."""
        if not live:
            return []
        rows = torch.tensor([h.row for h in live], device=log_probs.device)
        scores = torch.tensor([h.score for h in live], dtype=torch.float64, device=log_probs.device)
        # In float32 the sum of a long text has no room for what its next tokens differ by.
        sums = log_probs[rows] + scores[:, None]  # (hypotheses, V)
        vocabulary = sums.size(1)
        longer: List[_Hypothesis] = []
        for rank, (score, index) in enumerate(self._candidates(prompt, sums)):
            before = live[index // vocabulary]
            hypothesis = _Hypothesis(score, (*before.new, index % vocabulary), before.row)
            if prompt.done(hypothesis.new) or len(hypothesis.new) == prompt.max_new:
                if rank < self.beam:
                    ended.append(hypothesis)
            elif len(longer) < self.beam:
                longer.append(hypothesis)
        return longer if len(ended) < self.beam else []

    def _candidates(self, prompt: Prompt, sums: Tensor) -> List[Tuple[float, int]]:
        """sums (hypotheses, V) -> the sum and the index, hypothesis * V + token, of the
        candidates, the best first."""
        if prompt.random is not None:
            token = self.choice.draw(sums[0], prompt.random)  # a constant changes no probability
            return [(float(sums[0, token]), token)]
        best = sums.flatten().topk(min(2 * self.beam, sums.numel()) if self.beam > 1 else 1)
        candidates = zip(best.values.tolist(), best.indices.tolist())
        return [(score, index) for score, index in candidates if score > -torch.inf]

    def _log_probs(self, x: Tensor, before: Sequence[Sequence[int]]) -> Tensor:
        """x (N, D), and the tokens before each row -> (N, V) in float32 at least."""
        logits = exact_logits(self.model.decoder, x)
        logits.index_fill_(1, self.never.to(logits.device), -torch.inf)
        return self.choice.penalized(logits, before).log_softmax(-1)


def _on_any_process(flag: bool) -> bool:
    if process_count() == 1:
        return flag
    flags = torch.tensor(int(flag), device=collective_device())
    dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    return bool(flags)
