"""Numbers written by fairseq's `moe` branch, to be met: see tests/data/README.md."""

import json
from pathlib import Path
from typing import NamedTuple, Optional

import numpy as np
import torch
from torch import Tensor

REPOSITORY = Path(__file__).resolve().parents[2]
COPIED = REPOSITORY / "tests" / "data" / "gates_and_layers.npz"
ALL = REPOSITORY.parent / "shared" / "reference" / "gates_and_layers.npz"

RTOL = {torch.float32: 1e-5, torch.float64: 1e-10}


class Case(NamedTuple):
    """One case; T tokens, D model, F hidden, E experts, C slots."""

    settings: dict
    fields: dict[str, Tensor]

    @property
    def top_k(self) -> int:
        return {"top1": 1, "top2": 2}[self.settings["kind"]]

    @property
    def experts(self) -> int:
        return self.settings["E"]

    @property
    def dtype(self) -> torch.dtype:
        return self.fields["x"].dtype

    @property
    def rtol(self) -> float:
        return RTOL[self.dtype]

    @property
    def eval_fraction(self) -> Optional[float]:
        """None in training mode; negative at evaluation with training's rule."""
        if self.settings["mode"] == "train":
            return None
        return self.settings["moe_eval_capacity_token_fraction"]

    @property
    def padding_mask(self) -> Optional[Tensor]:
        return self.fields.get("padding_mask")

    @property
    def normalize_before_dropping(self) -> bool:
        return self.settings.get("normalize_gate_prob_before_dropping", False)

    @property
    def batch_prioritized(self) -> bool:
        return self.settings.get("batch_prioritized_routing", False)

    @property
    def stats(self) -> dict[str, float]:
        prefix = "metadata::"
        return {
            name[len(prefix) :]: float(value)
            for name, value in self.fields.items()
            if name.startswith(prefix)
        }

    def stacked(self, group: str, name: str) -> Tensor:
        """A parameter ("params") or gradient ("grads") of all experts, (E, ...)."""
        return torch.stack(
            [self.fields[f"{group}::experts.{e}.{name}"] for e in range(self.experts)]
        )


def load(path: Path) -> dict[str, Case]:
    fields: dict[str, dict] = {}
    with np.load(path) as file:
        for key in file.files:
            case, field = key.split("::", 1)
            fields.setdefault(case, {})[field] = file[key]
    return {
        case: Case(
            json.loads(str(values.pop("settings"))),
            {name: torch.from_numpy(np.array(value)) for name, value in values.items()},
        )
        for case, values in fields.items()
    }


# The copied cases always; the others where the whole file lies beside the repository.
CASES = {**(load(ALL) if ALL.exists() else {}), **load(COPIED)}
GATES = [name for name in CASES if name.startswith("gate/")]
LAYERS = [name for name in CASES if name.startswith("layer/")]
