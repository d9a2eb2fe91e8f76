"""The 95 % interval of a saving over units of test text, of one seed."""

import math
from pathlib import Path
from typing import Dict, Optional, Sequence, Tuple

import numpy as np

from ... import files
from ...errors import UserError
from ...evaluation.perplexity import UnitLosses
from ...evaluation.study_result import as_written, sets_of
from ..result import performance
from . import saving
from .finished import LadderRun
from .stages import Ladder, Stage

UNITS = "unit_losses.json"
OVER_UNITS = "units of test text"
OVER_INTERVALS = "perplexities, as if independent"


class Units:
    """The losses of units of test text in the runs on one number of tokens, read when needed."""

    def __init__(self, ladder: Ladder, stages: Sequence[Stage]) -> None:
        self.folders = {
            (stage.name, arm.name, seed): ladder.folder(stage, arm, seed)
            for stage in stages
            for arm in stage.arms
            for seed in stage.seeds
        }
        self._losses: Dict[Path, Optional[Dict[str, UnitLosses]]] = {}
        self._drawn: Dict[Tuple[Tuple[Path, ...], str], np.ndarray] = {}

    def interval(
        self, curve: Sequence[LadderRun], mine: LadderRun, group: str
    ) -> Tuple[Optional[saving.Ends], str]:
        """Of one seed, and over what it is."""
        runs = [*curve, mine]
        costs = [run["flops"] for run in runs]
        folders = [self.folders[run["stage"], run["size"], run["seed"]] for run in runs]
        losses = [self._of(folder) for folder in folders]
        if all(losses):
            names = sets_of(mine, group)
            by_set = [self._draws(folders, name, i) for i, name in enumerate(names)]
            units = losses[-1] or {}
            if any(len(units[name]["tokens"]) == 1 for name in names):  # nothing to draw
                return None, ""
            perplexities = np.mean(by_set, axis=0)  # (draws, M)
            return saving.ends_over_units(costs, perplexities), OVER_UNITS
        intervals = [
            where[group].get("interval")
            for run in runs
            for where in (run["mean"], run["sets"])
            if group in where
        ]
        width = saving.joint_width(intervals)
        if width is None:
            return None, ""
        ends = saving.ends_by_intervals(
            [(run["flops"], performance(run, group)) for run in curve],
            mine["flops"],
            performance(mine, group),
            width,
        )
        return ends, OVER_INTERVALS

    def _of(self, folder: Path) -> Optional[Dict[str, UnitLosses]]:
        if folder not in self._losses:
            path = folder / UNITS
            self._losses[folder] = _unit_losses(path) if path.is_file() else None
        return self._losses[folder]

    def _draws(self, folders: Sequence[Path], name: str, seed: int) -> np.ndarray:
        """(draws, M) perplexities on a set."""
        key = (tuple(folders), name)
        if key not in self._drawn:
            models = [(self._of(folder) or {}).get(name) for folder in folders]
            for folder, model in zip(folders, models):
                if model is None or model["tokens"] != (models[0] or model)["tokens"]:
                    raise UserError(
                        f"{folder / UNITS}: lacks {name}, or has other units of it than "
                        f"{folders[0] / UNITS}: delete this file, or evaluate both runs again"
                    )
            self._drawn[key] = saving.drawn_perplexities([m for m in models if m], seed)
        return self._drawn[key]


def _unit_losses(path: Path) -> Dict[str, UnitLosses]:
    """Raises UserError for a damaged file."""
    with as_written(path):
        found: Dict[str, UnitLosses] = files.read_json(path)
        for name, units in found.items():
            nats, tokens = units["nats"], units["tokens"]
            finite = all(0 <= n < math.inf for n in nats) and all(0 < n for n in tokens)
            if not (nats and len(nats) == len(tokens) and finite):
                raise ValueError(f"losses of {name}")
        return found
