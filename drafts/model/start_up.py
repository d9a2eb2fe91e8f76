"""Start-up: `moe_lm_15b` on the meta device, and the rate at which a checkpoint is loaded.

    python benchmarks/start_up.py

The rate is set against reading the same file, both just written and hence from the page cache,
which is the harder floor to come near.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from fairseq import checkpoint_utils
from fairseq.data import Dictionary
from measure import in_turn, keep, keep_table, median

import fairseq_moe_ext  # noqa: F401 - registers the model
from fairseq_moe_ext.config import MoETransformerLMConfig
from fairseq_moe_ext.models.architectures import ARCHITECTURES
from fairseq_moe_ext.models.language_model import MoETransformerLanguageModel

SMALL = dict(ARCHITECTURES["moe_lm_15b"], moe_expert_count=8)


def build(types: int = 51_200, **sizes) -> MoETransformerLanguageModel:
    dictionary = Dictionary()
    for i in range(types - len(dictionary)):
        dictionary.add_symbol(f"w{i}")
    cfg = MoETransformerLMConfig(
        **{**sizes, "tokens_per_sample": 2048, "max_target_positions": None},
        max_tokens=None,
        batch_size=None,
        ddp_backend="legacy_ddp",
        distributed_world_size=1,
    )
    task = SimpleNamespace(source_dictionary=dictionary)
    return MoETransformerLanguageModel.build_model(cfg, task)


def main() -> None:
    start = time.perf_counter()
    with torch.device("meta"):
        model = build(**ARCHITECTURES["moe_lm_15b"])
    rows = {
        "moe_lm_15b on the meta device": {
            "seconds": round(time.perf_counter() - start, 3),
            "gb": sum(p.numel() for p in model.parameters()) * 4 / 1e9,
        }
    }
    model = build(**SMALL)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkpoint.pt"
        torch.save({"model": model.state_dict(), "args": None, "cfg": None}, path)
        size = path.stat().st_size / 1e9
        block = bytearray(2**24)

        def read() -> None:
            with path.open("rb", buffering=0) as stream:
                while stream.readinto(block):
                    pass

        def load() -> None:
            state = checkpoint_utils.torch.load(str(path), map_location="cpu")
            model.load_state_dict(state["model"])

        seconds = in_turn({"read": read, "load": load}, rounds=5, warmup=1)
    for name, what in (("read", "reading the file"), ("load", "loading it into the model")):
        took = median(seconds[name])
        rows[f"8-expert moe_lm_15b: {what}"] = {"seconds": round(took, 3), "gb": round(size, 3)}
    rows = keep("start_up", rows)
    keep_table(
        "start_up",
        "Start-up",
        ["what", "seconds", "GB", "GB/s"],
        [
            [name, f"{row['seconds']:.2f}", f"{row['gb']:.2f}", f"{row['gb'] / row['seconds']:.2f}"]
            for name, row in rows.items()
        ],
    )


if __name__ == "__main__":
    main()
