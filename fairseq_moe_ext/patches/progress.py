"""What training logs: the line on the console, metrics.jsonl, and names in groups elsewhere."""

import logging
import re
import types
from pathlib import Path
from typing import Any, Dict, Iterator, Optional

import torch
from fairseq.logging import metrics
from fairseq.logging.progress_bar import (
    BaseProgressBar,
    SimpleProgressBar,
    TqdmProgressBar,
    rename_logger,
)
from fairseq.logging.progress_bar import logger as bar_logger

from .. import context, ours, training_line
from ..expert_parallel import process_count, process_rank
from ..metrics_file import MetricsFile
from ..moe.stats import METRICS
from ..trainer_checks import warn_of_decay
from .checkpoint_io import ended

logger = logging.getLogger(__name__)

_LAYER = re.compile(r"(layer\d+)_(.+)")
_SPEED = {"wps", "ups", "wpb", "bsz", "train_wall", "wall", "gb_free", "num_updates"}
_OPTIMIZER = {"lr", "gnorm", "clip", "loss_scale"}


def train(stock, cfg, trainer, task, epoch_itr):
    """One epoch; `progress_bar` within finds whose it is.

    Stock asks whether to stop only after an update, so a repeated command would train on from the
    checkpoint of a run that has ended (fairseq_cli/train.py:374@0.12.2). Here it does not begin;
    load_checkpoint has said so.
    """
    if ours.is_run(cfg) and ended(trainer, epoch_itr) is not None:
        return [None], True
    with context.during(context.training, context.Training(cfg, trainer)):
        return stock(cfg, trainer, task, epoch_itr)


def progress_bar(stock, iterator, *args, **kwargs):
    """For a training of our models: a short line, the first one early, and a file of all metrics.
    Stock prints some 20 metrics in a line of 600 characters, the first after --log-interval
    updates."""
    bar = stock(iterator, *args, **kwargs)
    running = context.training.get()
    # an attribute, which FSDP's wrapper hands on
    if running is None or not getattr(running.trainer.get_model(), "computes_loss", False):
        return bar
    validating = kwargs.get("prefix") is not None
    return Watched(bar, running.cfg, running.trainer, kwargs.get("epoch") or 1, validating)


class Watched(BaseProgressBar):
    """A bar of fairseq's, of a training of ours."""

    def __init__(self, bar: Any, cfg: Any, trainer: Any, epoch: int, validating: bool) -> None:
        self.wrapped_bar, self.cfg, self.trainer, self.epoch = bar, cfg, trainer, epoch
        self.validating = validating
        self.file: Optional[MetricsFile] = None
        if process_rank() == 0 and not cfg.checkpoint.no_save:
            if not hasattr(trainer, "metrics_file"):
                folder = Path(cfg.checkpoint.save_dir)
                start = getattr(trainer, "started_from", None)
                trainer.metrics_file = MetricsFile(folder, trainer.get_num_updates(), start)
            self.file = trainer.metrics_file
        base = bar
        while hasattr(base, "wrapped_bar"):
            base = base.wrapped_bar
        self.base = base  # the only one of stock's that knows its length
        if process_rank() == 0 and not validating and not hasattr(trainer, "decay_is_checked"):
            trainer.decay_is_checked = True
            warn_of_decay(cfg, self._total() or 0)
        self.prints_lines = isinstance(base, (SimpleProgressBar, TqdmProgressBar))
        if self.prints_lines and not validating:
            training_line.be_brief()
            base.log = types.MethodType(self._line, base)

    def __len__(self) -> int:
        return len(self.base)

    def __iter__(self) -> Iterator[Any]:
        begun = self.trainer.get_num_updates()
        interval = self.cfg.common.log_interval
        soon = self.prints_lines and not self.validating and interval > training_line.FIRST
        for item in self.wrapped_bar:
            yield item
            update = self.trainer.get_num_updates()
            if update % interval == 0 and update > begun:
                self.trainer.has_printed = True
            elif soon and update - begun >= training_line.FIRST:
                soon = False
                if not getattr(self.trainer, "has_printed", False):
                    self.trainer.has_printed = True
                    self.log(metrics.get_smoothed_values("train_inner"), "train_inner", update)

    def log(self, stats: Any, tag: Any = None, step: Any = None) -> None:
        """As stock's; into the file, too."""
        self._keep(stats, tag, step)
        self.wrapped_bar.log(stats, tag=tag, step=step)

    def print(self, stats: Any, tag: Any = None, step: Any = None) -> None:
        """As stock's; into the file, too."""
        self._keep(stats, tag, step)
        self.wrapped_bar.print(stats, tag=tag, step=step)

    def update_config(self, config: Any) -> None:
        """As stock's."""
        self.wrapped_bar.update_config(config)

    def _keep(self, stats: Dict[str, Any], tag: Any, step: Any) -> None:
        if self.file is not None:
            self.file.add(tag or "train", int(step or 0), self.epoch, stats)

    def _line(self, base: Any, stats: Dict[str, Any], tag: Any = None, step: Any = None) -> None:
        """In place of a base's own `log`."""
        text = training_line.line(stats, step or 0, self._total(), self._speed())
        if isinstance(base, TqdmProgressBar):
            base.tqdm.set_postfix_str(text, refresh=False)
            return
        with rename_logger(bar_logger, tag):
            bar_logger.info(text, extra={"brief": True})

    def _total(self) -> Optional[int]:
        """Updates of the whole run, if flags set them."""
        flags = self.cfg.optimization
        limits = [flags.max_update] if flags.max_update else []
        if flags.max_epoch and len(set(flags.update_freq)) == 1:
            limits.append(flags.max_epoch * len(self))
        return int(min(limits)) if limits else None

    def _speed(self) -> training_line.Speed:
        if not hasattr(self.trainer, "speed"):
            model = self.trainer.get_model()
            vocabulary = model.decoder.embed_tokens.num_embeddings
            precision = getattr(model, "compute_dtype", next(model.parameters()).dtype)  # FSDP's
            if model.decoder.bfloat16_on_cpu:
                precision = torch.bfloat16
            peak = training_line.peak_of(self.trainer.device, precision)
            self.trainer.speed = training_line.Speed(
                self.cfg.model, vocabulary, process_count(), peak
            )
        return self.trainer.speed


def log_to_tensorboard(stock, self, stats, tag=None, step=None):
    """Charts in groups (losses, router, each layer, optimizer, speed) instead of one list of 20 and
    more names; and a histogram of each layer's expert loads in the last batch."""
    stock(self, _in_groups(stats), tag, step)
    writer = self._writer(tag or "")
    for layer, load in loads(tag).items() if writer is not None else ():
        writer.add_histogram(f"layer{layer}/expert_load", load, step)


def log_to_wandb(stock, self, stats, tag=None, step=None):
    """Charts in groups, and histograms of expert loads, as for TensorBoard."""
    stock(self, _in_groups(stats), tag, step)
    wandb = stock.__globals__["wandb"]
    for layer, load in loads(tag).items() if wandb is not None else ():
        wandb.log({f"{tag}/layer{layer}/expert_load": wandb.Histogram(load)}, step=step)


def _in_groups(stats: Dict[str, Any]) -> Dict[str, Any]:
    return {group_of(name): value for name, value in stats.items()}


def loads(tag: Optional[str]) -> Dict[int, Any]:
    """Layer -> (E,) choices of each expert over their mean, of the last batch of training."""
    running = context.training.get()
    if running is None or tag != "train_inner":
        return {}
    counts = getattr(running.trainer.get_criterion(), "last_counts", {})
    summed = {layer: layer_counts.sum(0).double() for layer, layer_counts in counts.items()}  # (E,)
    return {layer: (c / c.mean().clamp(min=1e-9)).cpu().numpy() for layer, c in summed.items()}


def group_of(name: str) -> str:
    """moe_gate_loss -> router/moe_gate_loss, layer3_load_max -> layer3/load_max."""
    of_layer = _LAYER.fullmatch(name)
    if of_layer:
        return f"{of_layer[1]}/{of_layer[2]}"
    for group, names in (("speed", _SPEED), ("optimizer", _OPTIMIZER), ("router", METRICS)):
        if name in names:
            return name if name == "num_updates" else f"{group}/{name}"
    return f"router/{name}" if name.startswith("moe_") else f"loss/{name}"
