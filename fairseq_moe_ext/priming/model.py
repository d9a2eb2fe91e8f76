"""Log-probabilities of tokens from a checkpoint, on any number of processes.

Batches are distributed over the processes. All take the same number of steps, with an empty batch
where one has none, because experts may be distributed over them. No token is dropped, so a row's
numbers depend neither on other rows nor, up to rounding, on the number of processes.
"""

import argparse
import contextlib
import os
from functools import partial
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple

import numpy as np
import torch
import torch.distributed as dist
from fairseq.models import FairseqLanguageModel

from ..errors import UserError
from ..evaluation.loading import (
    add_model_flags,
    check_context,
    check_path,
    language_modeling_task,
    load_model,
    most_tokens,
    naming,
    on_device,
    parse_overrides,
    set_gates,
)
from ..expert_parallel import check_own_gpu, process_count
from ..models.language_model import MoETransformerLanguageModel
from ..models.precision import in_bfloat16
from ..models.search import by_batches
from ..models.token_scores import in_chunks, log_probs_and_likeliest
from ..questions.scoring import Row
from ..questions.vocabulary import PAD
from ..tokenizer_files import folder_for


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags for loading a model and its batches."""
    parser.add_argument(
        "--path", type=Path, required=True, help="the checkpoint, as for fairseq-eval-lm"
    )
    parser.add_argument(
        "--data",
        type=Path,
        metavar="DATA",
        help="folder with the model's dict.txt, encoder.json and vocab.bpe (default: those beside "
        "the checkpoint, or of the data that it was trained on)",
    )
    parser.add_argument(
        "--context", type=int, help="longest prompt in tokens (default: as trained)"
    )
    parser.add_argument(
        "--max-tokens",
        type=int,
        default=16384,
        help="tokens per batch and process (default: 16384)",
    )
    add_model_flags(parser, "--fp16", "--bf16")


@contextlib.contextmanager
def processes(cpu: bool, on_a_cpu: str = "--cpu") -> Iterator[None]:
    """Under torchrun, join the other processes, and leave them at the end.

    Raises UserError if they are more than the GPUs; `on_a_cpu` is the flag that uses none.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or process_count() > 1:
        yield
        return
    gpu = torch.cuda.is_available() and not cpu
    if gpu:
        number = int(os.environ.get("LOCAL_RANK", 0))
        check_own_gpu("LOCAL_RANK", number, on_a_cpu)
        torch.cuda.set_device(number)
    dist.init_process_group("nccl" if gpu else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def load(
    path: Path,
    data: Path,
    cpu: bool = False,
    fp16: bool = False,
    overrides: Optional[str] = None,
    bf16: bool = False,
) -> FairseqLanguageModel:
    """The model, for evaluation, without capacity.

    Args:
        data: folder with its dict.txt.
        overrides: a Python dictionary of settings.

    Raises:
        UserError: a file that is missing or does not fit.
    """
    check_path(path)
    if fp16 and bf16:
        raise UserError("--fp16 with --bf16: choose one precision")
    task = language_modeling_task(folder_for(path, data, check_bpe=False), 1)
    with naming(path):
        model, _ = load_model(path, task, parse_overrides(overrides))
    if not isinstance(model, MoETransformerLanguageModel):
        raise UserError(
            f"--path {path}: a {type(model).__name__} of fairseq's own; convert it first, with "
            "`fairseq-moe convert`"
        )
    set_gates(model, dropless=True)
    if fp16:
        model = model.half()
    if bf16:
        in_bfloat16(model, cpu)
    return on_device(model, cpu)


def load_in_context(
    path: Path,
    data: Path,
    context: Optional[int],
    cpu: bool = False,
    fp16: bool = False,
    overrides: Optional[str] = None,
    bf16: bool = False,
) -> Tuple[FairseqLanguageModel, int]:
    """The model, and the length of a prompt in tokens: `context`, or the longest that the model
    accepts. The other arguments: as of load."""
    if context is not None:  # before the weights are read
        with naming(path):
            check_context(context, most_tokens(path, parse_overrides(overrides)))
    model = load(path, data, cpu, fp16, overrides, bf16)
    check_context(context, model.max_positions())
    return model, context or model.max_positions()


class ModelScorer:
    """Rows -> the log-probabilities of their tokens; a scoring.Scorer.

    The first tokens that all rows of a batch share, examples above all, are computed once a batch.

    batch_tokens: of a batch on one process, padding included; a row longer than that has a batch of
    its own.
    """

    def __init__(self, model: FairseqLanguageModel, batch_tokens: int, progress: str = "") -> None:
        self.model = model
        self.batch_tokens = batch_tokens
        self.progress = progress

    def __call__(self, rows: Sequence[Row]) -> List[np.ndarray]:
        """(tokens - start,) nats of each row, in float64; rows in any order, each in the context,
        the same ones on all processes."""
        return [nats for nats, _ in self.with_likeliest(rows)]

    def with_likeliest(self, rows: Sequence[Row]) -> List[Tuple[np.ndarray, np.ndarray]]:
        """Like __call__, and (tokens - start,) bool: whether no token is more likely."""
        batches = self._batches(rows)
        share = any(rows[batch[0]].shared for batch in batches)
        return by_batches(rows, batches, partial(self._score, share=share), self.progress)

    def _batches(self, rows: Sequence[Row]) -> List[List[int]]:
        """Numbers of rows: those of a batch share their first tokens, if any do, and are of about
        one length, long ones first."""
        groups: Dict[Any, List[int]] = {}
        for i, row in enumerate(rows):
            key = (row.follows, row.tokens[: row.shared]) if row.shared else None
            groups.setdefault(key, []).append(i)
        batches: List[List[int]] = []
        for group in groups.values():
            room = 0
            for i in sorted(group, key=lambda i: -len(rows[i].tokens)):
                if not room:
                    batches.append([])
                    room = max(1, self.batch_tokens // len(rows[i].tokens))
                batches[-1].append(i)
                room -= 1
        return batches

    @torch.no_grad()
    def _score(self, rows: Sequence[Row], share: bool) -> List[Tuple[np.ndarray, np.ndarray]]:
        """`share`: some batch shares first tokens, so that all processes go two ways each time,
        both with a state: without one, layers may wait for sums over processes."""
        device = next(self.model.parameters()).device
        length = max((len(row.tokens) for row in rows), default=1)
        inputs = torch.full((len(rows), length), PAD)  # (B, S)
        for i, row in enumerate(rows):
            inputs[i, : len(row.tokens)] = torch.tensor((row.follows, *row.tokens[:-1]))
        inputs = inputs.to(device)
        shared = rows[0].shared if rows else 0
        state: Optional[Dict[str, Any]] = None
        if share:
            state = {}
            first = inputs[:1, :shared] if shared else inputs.new_zeros(0, 1)
            self.model.decoder(first, incremental_state=state, features_only=True)
            if shared:
                order = inputs.new_zeros(len(rows))
                self.model.decoder.reorder_incremental_state_scripting(state, order)
            else:
                state = {}
        x, _ = self.model.decoder(inputs, incremental_state=state, features_only=True)
        if not rows:
            return []
        wanted = [x[i, r.start - shared : len(r.tokens) - shared] for i, r in enumerate(rows)]
        targets = [token for row in rows for token in row.tokens[row.start :]]
        scored = in_chunks(
            log_probs_and_likeliest,
            self.model.decoder,
            torch.cat(wanted),
            torch.tensor(targets, device=device),
        )
        nats, likeliest = (torch.cat(parts).cpu() for parts in zip(*scored))  # (N,)
        ends = np.cumsum([len(row.tokens) - row.start for row in rows])[:-1]
        return list(zip(np.split(nats.double().numpy(), ends), np.split(likeliest.numpy(), ends)))
