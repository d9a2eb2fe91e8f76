"""Updates the state of a model's routers, once per optimizer update, with what they have observed
in it."""

from __future__ import annotations

from typing import Dict, Mapping, Optional

import torch
from torch import Tensor

from ..expert_parallel import process_count, sum_over_processes
from ..moe.router import TopKRouter


class RouterUpdates:
    """Sums over the micro-batches of an update, and over processes; patches/trainer.py says when an
    update begins and ends. What is observed outside an update, for example in validation, does not
    count.
    """

    def __init__(self, routers: Mapping[int, TopKRouter]) -> None:
        """routers: by layer."""
        self.routers = routers
        self._sums: Optional[Dict[int, Dict[str, Tensor]]] = None  # None: no update is under way

    def begin(self) -> None:
        """Start from zero: an update begins, or the gradients so far were discarded."""
        self._sums = {}

    def add(self, layer: int, observed: Dict[str, Tensor]) -> None:
        """What the router of a layer has observed in a micro-batch of this process."""
        if self._sums is None or not observed:
            return
        sums = self._sums.setdefault(layer, {})
        for name, value in observed.items():
            value = value.detach().to(torch.float64)  # whole numbers beyond float32's 2**24
            sums[name] = sums[name] + value if name in sums else value

    def finish(self) -> None:
        """End an update that was not skipped. All processes call it at once, as they have all gone
        through the same layers."""
        sums, self._sums = self._sums, None
        if not sums:
            return
        places = [(layer, name) for layer in sorted(sums) for name in sorted(sums[layer])]
        parts = [sums[layer][name] for layer, name in places]
        whole = torch.cat([part.flatten() for part in parts])
        if process_count() > 1:
            whole = sum_over_processes(whole).to(whole.device)
        if not whole.any():  # no tokens
            return
        with torch.no_grad():
            for (layer, name), part in zip(places, whole.split([part.numel() for part in parts])):
                sums[layer][name] = part.view_as(sums[layer][name])
            for layer, observed in sums.items():
                self.routers[layer].after_update(observed)
