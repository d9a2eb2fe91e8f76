"""Computes all numbers from a checkpoint and text; the command and notebooks call it."""

from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
import torch
from fairseq.models import FairseqLanguageModel
from torch import Tensor

from .. import progress_bar
from ..branch.outline import main_file
from ..checkpoint.format import last_history
from ..errors import UserError
from ..evaluation.loading import (
    check_path,
    language_modeling_task,
    load_model,
    moe_layers,
    most_tokens,
    on_device,
    parse_overrides,
    set_gates,
)
from ..tokenizer_files import folder_for
from . import reading, relations
from .cards import Counted, cards
from .knowing import knowledge, said
from .observing import CANDIDATES, View, observe
from .reading import Block, Tokens
from .result import Inspection, Layer, Saturation, ShownText
from .training import beside, read_log


class Settings(NamedTuple):
    """Settings of an inspection, the flags of the command."""

    subset: Optional[str] = None  # None: test, else valid
    tokens: int = 100_000  # that are counted, an equal part of each corpus
    show: int = 2_000  # tokens of a text that are shown
    context: Optional[int] = None  # tokens of a row; None: as trained
    batch_size: int = 16  # rows per batch
    capacity: Optional[float] = 1.0  # share of a batch that an expert takes; None: as in training
    overrides: Optional[str] = None  # settings of the model, a Python dictionary
    cpu: bool = False


DEFAULT = Settings()


def inspect(
    checkpoint: Path,
    data: Path,
    text: Sequence[Path] = (),
    *,
    twin: Optional[Path] = None,
    compare: Sequence[Path] = (),
    log: Optional[Path] = None,
    settings: Settings = DEFAULT,
) -> Inspection:
    """Compute all numbers about the experts of a checkpoint.

    Args:
        checkpoint: as fairseq-eval-lm's --path, Meta's released layout too.
        data: folder with the model's dict.txt, its tokenizer, and test sets, if there are any.
        text: files whose tokens are shown one by one; without test sets they are counted, too.
        twin: another checkpoint with the same dictionary, whose losses are shown too.
        compare: earlier checkpoints of the same training.
        log: of the training; by default the metrics.jsonl beside the checkpoint.

    Raises:
        UserError: for missing or mismatched files, if possible before the work.
    """
    others = [("--twin", twin)] if twin else []
    others += [("--compare", path) for path in compare]
    for flag, path in [("", checkpoint), *others]:
        check_path(path, flag)
        folder_for(path, data)
    model_of = _Loader(data, settings)
    training = read_log(log) if log else beside(checkpoint)
    tokens = Tokens(data, model_of.dictionary)
    own = reading.read_own(text, tokens)
    sets, subset = reading.read_sets(data, settings.subset, model_of.dictionary)
    sets = sets or own
    if not sets:
        raise UserError(
            f"--data {data}: contains no test sets; give a file of your own with --text"
        )
    if settings.context is not None:  # before the weights are read
        model_of.context(most_tokens(checkpoint, model_of.overrides) or settings.context)
    model = model_of(checkpoint)
    context = _check_models(f"{checkpoint}", model, others, model_of)
    blocks, shown = _blocks(sets, own, settings, model_of.dictionary.eos(), context)
    reading.check_enough(blocks, f"--data {data}")
    watch = partial(_watch, settings.batch_size)
    view = watch("counting choices", model, blocks)
    details = {name: watch(name, model, some, detailed=True) for name, some in shown.items()}
    names = list(sets)
    layers = _layers(model, view, _counted(blocks, names), tokens)
    del model
    twin_loss, twins = None, {}
    if twin is not None:
        other = model_of(twin)
        twin_loss = _per_set(names, blocks, watch("the twin", other, blocks).loss, np.mean)
        twins = {name: watch(f"the twin, {name}", other, some) for name, some in shown.items()}
        del other
    texts = []
    for name, detail in details.items():
        cut = len(own[name]) - len(detail.loss) if own else 0
        texts.append(_shown(name, shown[name], detail, twins.get(name), tokens, cut))
    return Inspection(
        checkpoint=str(checkpoint),
        twin=str(twin) if twin else None,
        subset=subset,
        capacity="training's" if settings.capacity is None else f"{settings.capacity:g}",
        tokens=_per_set(names, blocks, np.ones(len(view.loss), dtype=int), np.sum),
        loss=_per_set(names, blocks, view.loss, np.mean),
        twin_loss=twin_loss,
        positions=list(reading.POSITIONS),
        frequencies=list(reading.FREQUENCIES),
        layers=layers,
        texts=texts,
        saturation=[
            _saturation(path, watch(path.name, model_of(path), blocks), view) for path in compare
        ],
        training=training,
        said=said(layers),
    )


class _Loader:
    """Loads models with one dictionary and the same settings."""

    def __init__(self, data: Path, settings: Settings) -> None:
        self.settings = settings
        self.overrides = parse_overrides(settings.overrides)
        self.task = language_modeling_task(data, 1)
        self.dictionary = self.task.source_dictionary

    def __call__(self, path: Path) -> FairseqLanguageModel:
        """For evaluation. The experts of a model in many files stay in them."""
        overrides = dict(self.overrides)
        if not path.is_file():
            overrides.setdefault("moe_experts_on_disk", True)
        model, _ = load_model(path, self.task, overrides)
        capacity = self.settings.capacity
        # below 0: the rule of training
        fraction = -1.0 if capacity is None else capacity
        set_gates(model, eval_token_fraction=fraction)
        if capacity is not None:
            set_gates(model, dropless=False)
        return on_device(model, self.settings.cpu)

    def context(self, longest: int) -> int:
        context = self.settings.context or min(longest, 1024)
        if not 2 <= context <= longest:
            raise UserError(
                f"--context {context}: use 2 to {longest} tokens, which the model takes"
            )
        return context


def _check_models(
    where: str, model: FairseqLanguageModel, others: Sequence[Tuple[str, Path]], model_of: _Loader
) -> int:
    """The tokens of a row. Raises UserError for models that cannot be inspected together."""
    if not moe_layers(model):
        raise UserError(f"{where}: a dense model, which has no experts; give an MoE checkpoint")
    context = model_of.context(model.max_positions())
    for flag, path in others:  # loaded again when it is their turn, so that one is in memory
        _check_other(f"{flag} {path}", model_of(path), model, context)
    return context


def _blocks(
    sets: Dict[str, Tensor], own: Dict[str, Tensor], settings: Settings, eos: int, context: int
) -> Tuple[List[Block], Dict[str, List[Block]]]:
    """What is counted, and the texts that are shown: by default the beginning of each set."""
    per_set = max(1, settings.tokens // len(sets))
    counted = [
        block
        for i, stream in enumerate(sets.values())
        for block in reading.blocks_of(i, stream, eos, context, per_set)
    ]
    texts = own or {name: stream[:400] for name, stream in sets.items()}
    return counted, {
        name: reading.blocks_of(0, stream[: settings.show], eos, context)
        for name, stream in texts.items()
    }


def _watch(
    batch_size: int,
    words: str,
    model: FairseqLanguageModel,
    blocks: Sequence[Block],
    detailed: bool = False,
) -> View:
    """A pass over text, with a bar on a terminal and a line elsewhere."""
    total = sum(len(block.positions) for block in blocks)
    with progress_bar.bar(words, total, "token") as bar:
        return observe(model, blocks, batch_size, bar.update, detailed)


def _counted(blocks: Sequence[Block], names: Sequence[str]) -> Counted:
    sizes = [len(block.positions) for block in blocks]
    token_ids = torch.cat([block.row[1:] for block in blocks]).numpy()
    return Counted(
        token_ids=token_ids,
        domains=np.repeat([block.domain for block in blocks], sizes),
        names=names,
        blocks=np.repeat(np.arange(len(blocks)), sizes),
        positions=reading.position_classes(np.concatenate([block.positions for block in blocks])),
        frequencies=reading.frequency_classes(token_ids),
        previous=torch.cat([block.row[:-1] for block in blocks]).numpy(),
    )


def _per_set(
    names: Sequence[str], blocks: Sequence[Block], values: np.ndarray, how: Callable
) -> Dict[str, Any]:
    """values (T,) -> `how` applied to each set's values."""
    of = np.repeat([block.domain for block in blocks], [len(b.positions) for b in blocks])
    return {name: how(values[of == i]).item() for i, name in enumerate(names) if (of == i).any()}


def _layers(model: FairseqLanguageModel, view: View, seen: Counted, tokens: Tokens) -> List[Layer]:
    layers = []
    moes = moe_layers(model)
    bar = progress_bar.bar("experts", len(view.layers), "layer")
    for i, layer_view in enumerate(view.layers):
        shown = relations.most_used(layer_view)
        following = view.layers[i + 1] if i + 1 < len(view.layers) else None
        flow_to = relations.most_used(following) if following else []
        flow: Tuple[Any, Any] = (None, None)
        if following:
            flow = relations.flow(layer_view, following, shown, flow_to)
        own = cards(layer_view, seen, tokens)
        shares = np.array([card.share for card in own])
        routers, outputs, alike = relations.similarity(moes[layer_view.layer], layer_view, shown)
        routed = layer_view.chosen < layer_view.experts
        layers.append(
            Layer(
                layer=layer_view.layer,
                experts=layer_view.experts,
                choices=layer_view.chosen.shape[1],
                load_deviation=float(shares.std() / max(shares.mean(), 1e-12)),
                dropped=float(1 - layer_view.kept[routed].mean()) if routed.any() else 0.0,
                entropy=float(layer_view.entropy.mean()),
                null_experts=layer_view.null_experts,
                null_share=layer_view.null_share,
                cards=own,
                knowledge=knowledge(layer_view, seen),
                shown=shown,
                together=relations.together(layer_view, shown),
                flow=flow[0],
                flow_to=flow_to,
                flow_bits=flow[1],
                router_similarity=routers,
                output_similarity=outputs,
                alike=alike,
            )
        )
        bar.update()
    bar.close()
    return layers


def _shown(
    name: str, blocks: Sequence[Block], view: View, twin: Optional[View], tokens: Tokens, cut: int
) -> ShownText:
    token_ids = torch.cat([block.row[1:] for block in blocks]).tolist()
    eos = tokens.dictionary.eos()
    return ShownText(
        name=name,
        tokens=[tokens.piece(token) for token in token_ids],
        newline=[token == eos for token in token_ids],
        loss=_rounded(view.loss),
        twin=_rounded(twin.loss) if twin else None,
        candidates=[
            [
                [(int(e), round(float(p), 4), int(how)) for e, p, how in row[:CANDIDATES]]
                for row in layer.candidates
            ]
            for layer in view.layers
        ],
        cut=cut,
    )


def _rounded(values: np.ndarray) -> List[float]:
    return [round(value, 4) for value in values.tolist()]


def _check_other(
    where: str, other: FairseqLanguageModel, model: FairseqLanguageModel, context: int
) -> None:
    """Raise UserError for a second model that cannot be looked at beside the first."""
    if context > other.max_positions():
        longest = other.max_positions()
        raise UserError(f"{where}: takes {longest} tokens; add --context {longest}")
    if where.startswith("--compare") and _experts(other) != _experts(model):
        raise UserError(
            f"{where}: has other layers or experts than the checkpoint; compare checkpoints of one "
            "training"
        )


def _experts(model: FairseqLanguageModel) -> Dict[int, int]:
    """Layer -> its number of experts."""
    return {i: len(moe.gate.expert_vectors()) for i, moe in moe_layers(model).items()}


def _saturation(path: Path, earlier: View, last: View) -> Saturation:
    both = [relations.agreement(a, b) for a, b in zip(earlier.layers, last.layers)]
    return Saturation(str(path), _updates(path), [a for a, _ in both], [b for _, b in both])


def _updates(path: Path) -> Optional[int]:
    """Updates after which a checkpoint was written."""
    return last_history(main_file(str(path))).get("num_updates")
