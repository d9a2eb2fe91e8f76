"""Our models as a model type of EleutherAI's lm-eval, an optional extra.

A newline of lm-eval's texts is </s>, as everywhere with these models, and so is what stands before
the first token. On N processes, lm-eval sees one process: every process has all requests, and its
model takes its share of the batches.
"""

from argparse import Namespace
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple, Union

from fairseq import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model

from .. import tokenizer_files
from ..errors import UserError
from ..models.search import Generator, Prompt, no_text
from ..models.text_generation import cut_before
from ..questions.scoring import Row
from ..questions.vocabulary import EOS, Vocabulary
from ..wording import count, did_you_mean
from . import model
from .lm_eval_device import is_cpu
from .protocol import say

MODEL = "fairseq-moe"  # lm-eval's --model


@register_model(MODEL)
class FairseqMoELM(LM):
    """Built by lm-eval from `--model_args path=...,data=...` and its own flags.

    path, data, context, fp16, bf16, model_overrides, user_dir: as the flags of `fairseq-moe
    priming`.
    batch_size: rows of the whole context; of shorter ones a batch has more.
    device: cpu or cuda, of which each process has its own; by default a GPU if there is one.
    """

    def __init__(
        self,
        path: str = "",
        data: Optional[str] = None,
        batch_size: Union[int, str] = 1,
        max_batch_size: Optional[int] = None,
        device: Optional[str] = None,
        context: Optional[int] = None,
        fp16: bool = False,
        bf16: bool = False,
        model_overrides: Any = None,
        user_dir: Optional[str] = None,
        **others: Any,
    ) -> None:
        super().__init__()
        _check_args(path, context, {"fp16": fp16, "bf16": bf16}, others)
        on_cpu = is_cpu(device)
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise UserError(f"--batch_size {batch_size}: use a whole number, 1 or more")
        folder = tokenizer_files.folder_for(
            Path(path), None if data is None else Path(data), "data"
        )
        self.vocabulary = Vocabulary(folder)
        utils.import_user_module(Namespace(user_dir=user_dir))
        overrides = None if model_overrides is None else str(model_overrides)
        self.model, self.context = model.load_in_context(
            Path(path), folder, context, on_cpu, fp16, overrides, bf16
        )
        self.batch_tokens = int(batch_size) * self.context

    @property
    def tokenizer_name(self) -> str:
        """The key by which lm-eval distinguishes caches of requests."""
        return str(self.vocabulary.folder.resolve()).replace("/", "__")

    def loglikelihood(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> List[Tuple[float, bool]]:
        """(log-probability of the continuation in nats, whether it is what greedy search finds)."""
        whole = [self._row(*request.args) for request in requests]
        rows = [_cut(row, self.context) for row in whole]
        self._say_cut([len(row.tokens) - self.context for row in whole])
        scored = [i for i, row in enumerate(rows) if row.start < len(row.tokens)]
        scorer = model.ModelScorer(self.model, self.batch_tokens, "loglikelihood")
        answers = [(0.0, True)] * len(rows)  # of nothing
        for i, (nats, likeliest) in zip(scored, scorer.with_likeliest([rows[i] for i in scored])):
            answers[i] = (float(nats.sum()), bool(likeliest.all()))
        return answers

    def _row(self, context: str, continuation: str) -> Row:
        """White space at the end of the context goes with the continuation, newlines included, as
        in all that lm-eval scores by itself (lm_eval/api/model.py:415@0.4.13). At least the last
        token counts as the continuation's, even if it begins in the context ("num" + "ber")."""
        bare, text = context.rstrip(), context + continuation
        whole = self.vocabulary.encode(text)
        least = 1 if len(text) > len(bare) else 0
        return Row(tuple(whole), min(len(self.vocabulary.encode(bare)), len(whole) - least))

    @staticmethod
    def _say_cut(beyond: Sequence[int]) -> None:
        """Say how many requests lose their beginning, given each one's tokens beyond its room."""
        cut_off = sum(more > 0 for more in beyond)
        if cut_off:
            say(
                f"{cut_off:,} of {count(len(beyond), 'request')} do not fit into the context; the "
                "beginning is cut off"
            )

    def loglikelihood_rolling(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> List[float]:
        """Log-probability of whole texts. A long one is cut into blocks of the context, each of
        which follows the last token of the one before; the last block is as long as any, and only
        its new tokens count, as lm-eval has it."""
        rows: List[Row] = []
        owner: List[int] = []
        for i, request in enumerate(requests):
            blocks = self._blocks(tuple(self.vocabulary.encode(request.args[0])))
            rows += blocks
            owner += [i] * len(blocks)
        totals = [0.0] * len(requests)
        scorer = model.ModelScorer(self.model, self.batch_tokens, "loglikelihood_rolling")
        for i, nats in zip(owner, scorer(rows)):
            totals[i] += float(nats.sum())
        return totals

    def _blocks(self, tokens: Tuple[int, ...]) -> List[Row]:
        rows, done = [], 0
        while done < len(tokens):
            end = min(done + self.context, len(tokens))
            begin = max(0, end - self.context)
            follows = tokens[begin - 1] if begin else EOS
            rows.append(Row(tokens[begin:end], done - begin, follows=follows))
            done = end
        return rows

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> List[str]:
        """Greedy search up to one of the texts in `until`, or to a blank line, which is where a
        document ends. Raises UserError for sampling, which is not offered."""
        prompts, stops, beyond = [], [], []
        for context, settings in (request.args for request in requests):
            if settings.get("do_sample") and settings.get("temperature", 1.0) > 0:
                raise UserError(
                    "do_sample: true in a task's generation_kwargs: sampling is not supported; "
                    "use greedy search"
                )
            until = settings.get("until") or []
            until = [until] if isinstance(until, str) else list(until)
            max_new = int(settings.get("max_gen_toks", 256))
            room = self.context - max_new
            if room < 1:
                raise UserError(
                    f"max_gen_toks {max_new}: leaves no room for a prompt in the context of "
                    f"{self.context} tokens; set --gen_kwargs max_gen_toks=..."
                )
            tokens = tuple(self.vocabulary.encode(context))
            beyond.append(len(tokens) - room)
            stop = _Stop(self.vocabulary, [*filter(None, until), "\n\n"])
            prompts.append(Prompt(tokens[-room:], max_new, stop))
            stops.append(stop)
        self._say_cut(beyond)
        never = no_text(self.model, tokenizer=True)
        generator = Generator(self.model, 1, self.batch_tokens, "generate_until", never=never)
        return [stop.cut(new) for stop, new in zip(stops, generator(prompts))]


_ARGS = ("path", "data", "context", "fp16", "bf16", "model_overrides", "user_dir")


def _check_args(path: str, context: Any, switches: Dict[str, Any], others: Dict[str, Any]) -> None:
    """Raise UserError for --model_args of other names or types; lm-eval passes all on."""
    for name, value in others.items():
        raise UserError(
            f"--model_args {name}={value}: no such setting; use {', '.join(_ARGS)}"
            + did_you_mean(name, _ARGS)
        )
    if not path:
        raise UserError("--model_args: names no checkpoint; add path=CHECKPOINT")
    if context is not None and (type(context) is not int or context < 1):
        raise UserError(f"--model_args context={context}: use a whole number, 1 or more")
    for name, value in switches.items():
        if not isinstance(value, bool):
            raise UserError(f"--model_args {name}={value}: use True or False")


def _cut(row: Row, context: int) -> Row:
    """The last tokens of a row, as many as the model takes, after the one before them, as lm-eval
    has it (lm_eval/models/huggingface.py:1431@0.4.13)."""
    lost = len(row.tokens) - context
    if lost <= 0:
        return row
    return Row(row.tokens[lost:], max(0, row.start - lost), follows=row.tokens[lost - 1])


class _Stop:
    """Whether tokens end in or hold one of some texts."""

    def __init__(self, vocabulary: Vocabulary, texts: Sequence[str]) -> None:
        self._vocabulary = vocabulary
        self._texts = texts
        self._tail = max(len(text.encode("utf-8")) for text in texts)  # a token is a byte or more

    def __call__(self, new: Sequence[int]) -> bool:
        tail = self._vocabulary.decode(new[-self._tail :])
        return any(text in tail for text in self._texts)

    def cut(self, new: Sequence[int]) -> str:
        """The text before the first of the texts."""
        return cut_before(self._vocabulary.decode(new), self._texts)
