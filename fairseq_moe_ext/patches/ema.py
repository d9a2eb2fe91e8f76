"""fairseq/models/ema/ema.py: the moving average of the weights (--store-ema)."""

import logging
from typing import Any, Dict

from fairseq.trainer import Trainer
from torch import Tensor

from fairseq_today.errors import UserError, first_line

logger = logging.getLogger(__name__)


def step(stock, self, new_model, updates=None):
    """Stock counts the updates since the last one of --ema-update-freq anew in a resumed run. Here
    their number follows from that of all updates."""
    if updates is not None and self.config.ema_update_freq > 1:
        self.update_freq_counter = (updates - 1) % self.config.ema_update_freq
    stock(self, new_model, updates)


def step_internal(stock, self, new_model, updates=None):
    """Stock walks over all names of the state: tied weights, which have two, decay twice an
    update, and whole numbers, such as a table of hash routing, cannot decay. Here each tensor
    decays once, and whole numbers are copied."""
    averages = self.fp32_params if self.config.ema_fp32 else self.model.state_dict()
    state, seen = {}, set()
    for name, value in new_model.state_dict().items():
        if isinstance(value, Tensor) and not value.is_floating_point():
            self.skip_keys = {*self.skip_keys, name}
        average = averages.get(name)
        if isinstance(average, Tensor):
            place = average.data_ptr(), average.shape
            if place in seen:
                continue
            seen.add(place)
        state[name] = value
    stock(self, _Model(state), updates)


class _Model:
    """A model of which only the state is read."""

    def __init__(self, state: Dict[str, Any]) -> None:
        self.state = state

    def state_dict(self) -> Dict[str, Any]:
        return self.state


def begin_from_the_model(trainer: Trainer, state: Dict[str, Any], path: str) -> None:
    """Give a checkpoint without an EMA that of its own weights, where the trainer wants one.

    Stock means to do so, but reads the weights after it has removed them
    (fairseq/trainer.py:572,649@0.12.2).
    """
    extra = state.get("extra_state")
    if trainer.cfg.ema.store_ema and extra is not None and "ema" not in extra:
        logger.warning(f"--store-ema: {path} has no EMA, so the average begins with its weights")
        extra["ema"] = state["model"]


def check_seed(trainer: Trainer) -> None:
    """Raise UserError if --ema-seed-model has no EMA of this model. Stock reads it after the first
    update, and does not say which flag is wrong."""
    settings = trainer.cfg.ema
    if not settings.store_ema or settings.ema_seed_model is None:
        return
    where = f"--ema-seed-model {settings.ema_seed_model}"
    try:
        trainer.ema  # noqa: B018 - is built now
    except KeyError as error:
        raise UserError(
            f"{where}: has no EMA: name a checkpoint of a run with --store-ema"
        ) from error
    except (RuntimeError, UserError) as error:
        raise UserError(f"{where}: its EMA is of another model: {first_line(error)}") from error
