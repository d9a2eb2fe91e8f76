"""A checkpoint keeps the rule for padding that it was trained with (--moe-pad-rule). Evaluation and
further training use it unless the command says otherwise."""

import logging
from typing import Any, Dict, Optional

from omegaconf import DictConfig, open_dict

from ..balance_flags import validate_balance
from ..config import saved_pad_rule
from ..models.padding import set_pad_rule
from ..router_flags import top_k

logger = logging.getLogger(__name__)

_KEY = "moe_pad_rule"


def note(state: Dict[str, Any]) -> None:
    """Write the rule that a loaded checkpoint was trained with into its settings, if they lack it,
    and into `extra_state`, which is all that a trainer sees."""
    model = getattr(state.get("cfg"), "model", None)
    if isinstance(model, DictConfig):
        rule = saved_pad_rule(model)
    else:  # flat settings, of the branch alone: settings.py translates them
        rule = getattr(state.get("args"), _KEY, None)
    if rule is None:
        return
    if isinstance(model, DictConfig):
        with open_dict(model):
            model[_KEY] = rule
    if state.get("extra_state") is not None:
        state["extra_state"][_KEY] = str(rule)


def train_on(trainer: Any, extra_state: Optional[Dict[str, Any]]) -> None:
    """Set the rule of a checkpoint that a trainer has loaded: it is a part of the model, too.

    Raises UserError where it conflicts with a flag.
    """
    rule = (extra_state or {}).pop(_KEY, None)
    model, cfg = trainer.get_model(), trainer.cfg.model
    takes = hasattr(getattr(model, "decoder", None), "pad_rule")
    if rule is not None and takes and cfg.moe_pad_rule is None:
        cfg.moe_pad_rule = rule  # for the checkpoints to come
        set_pad_rule(model, rule)
        logger.info(f"padding counts by the checkpoint's rule: --moe-pad-rule {rule}")
        validate_balance(cfg, top_k(cfg))
