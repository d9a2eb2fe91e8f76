"""The parameters of experts, and their numbers in the optimizer."""

from __future__ import annotations

import itertools
from typing import Dict, List

from fairseq.trainer import Trainer

from .. import fully_sharded
from ..expert_parallel import is_expert, process_count


def expert_indices(trainer: Trainer) -> Dict[str, int]:
    """Name of each parameter of experts -> its number in a saved optimizer state. The optimizer
    gets the parameters in this order (fairseq/trainer.py:293@0.12.2) unless they are sharded."""
    names = trained_parameters(trainer)
    return {name: i for i, name in enumerate(names) if is_expert(name)}


def trained_parameters(trainer: Trainer) -> List[str]:
    locations = fully_sharded.locations(trainer.get_model())
    parameters = itertools.chain(
        ((name, location.parameter) for name, location in locations.items()),
        trainer.get_criterion().named_parameters(),
    )
    return [name for name, parameter in parameters if parameter.requires_grad]


def saves_together(trainer: Trainer) -> bool:
    """Whether all processes take part in saving and loading."""
    sharded = fully_sharded.is_sharded(trainer.get_model())
    return has_sharded_experts(trainer) or (process_count() > 1 and sharded)


def has_sharded_experts(trainer: Trainer) -> bool:
    return process_count() > 1 and getattr(trainer.get_model(), "has_experts", False)
