"""The rule for padding that a checkpoint was trained by (--moe-pad-rule) goes with it: evaluating
and training on keep it, unless the command says otherwise."""

import functools
import logging
from typing import Any, Callable, Dict

from fairseq import trainer
from fairseq.tasks import FairseqTask
from omegaconf import DictConfig, open_dict

from ..config import saved_pad_rule
from ..models.padding import set_pad_rule

logger = logging.getLogger(__name__)

_KEY = "moe_pad_rule"


def apply() -> None:
    """Put the wrappers in place."""
    _train_on_by_the_rule()
    _tell_what_a_full_batch_is()


def note(state: Dict[str, Any], overrides: Dict[str, Any]) -> None:
    """Write into a loaded checkpoint the rule that it was trained by, where it lacks it, and for
    trainers, which see no more of it than `extra_state`."""
    model = getattr(state.get("cfg"), "model", None)
    if isinstance(model, DictConfig):
        rule = overrides.get(_KEY) or saved_pad_rule(model)
    else:  # flat settings, of the branch alone: settings.py translates them
        rule = getattr(state.get("args"), _KEY, None)
    if rule is None:
        return
    if isinstance(model, DictConfig):
        with open_dict(model):
            model[_KEY] = rule
    if state.get("extra_state") is not None:
        state["extra_state"][_KEY] = str(rule)


def _train_on_by_the_rule() -> None:
    """fairseq/trainer.py:448 takes the weights; how padding counts is a part of the model, too."""
    stock = trainer.Trainer.load_checkpoint

    @functools.wraps(stock)
    def load_checkpoint(self, *args, **kwargs):
        extra_state = stock(self, *args, **kwargs)
        rule = (extra_state or {}).pop(_KEY, None)
        takes = hasattr(getattr(self.get_model(), "decoder", None), "pad_rule")
        if rule is not None and takes and self.cfg.model.moe_pad_rule is None:
            self.cfg.model.moe_pad_rule = rule  # for the checkpoints to come
            set_pad_rule(self.get_model(), rule)
            logger.info(f"padding counts by the checkpoint's rule: --moe-pad-rule {rule}")
        return extra_state

    trainer.Trainer.load_checkpoint = load_checkpoint


def _tell_what_a_full_batch_is() -> None:
    """fairseq/tasks/fairseq_task.py:488, 522: the steps of training and validation, which the
    branch's rule fills; eval-lm takes none."""

    def telling(stock: Callable, setting: str) -> Callable:
        @functools.wraps(stock)
        def step(self, sample, model, *args, **kwargs):
            rule = getattr(getattr(model, "decoder", None), "pad_rule", None)
            if rule is None:
                return stock(self, sample, model, *args, **kwargs)
            rule.full_rows = getattr(getattr(self, "args", None), setting, None)
            try:
                return stock(self, sample, model, *args, **kwargs)
            finally:
                rule.full_rows = 0

        return step

    FairseqTask.train_step = telling(FairseqTask.train_step, "batch_size")
    FairseqTask.valid_step = telling(FairseqTask.valid_step, "batch_size_valid")
