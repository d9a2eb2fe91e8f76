"""Start-up: building `moe_lm_15b` on the meta device, and how fast a checkpoint is loaded.

    python benchmarks/start_up.py

The checkpoint is that of moe_lm_15b with 8 experts, loaded into a model as every command does.
Before each round the system drops the file from memory: loading it comes from the disk, as reading.
"""

from __future__ import annotations

import gc
import logging
import os
import tempfile
import time
from pathlib import Path

import fairseq_cli.train  # noqa: F401 - before our package, as in the command
import torch
from fairseq import checkpoint_utils, options, tasks
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from measure import in_turn, keep, keep_table, language_model, median
from omegaconf import OmegaConf

import fairseq_moe_ext
from fairseq_moe_ext.models.architectures import ARCHITECTURES

VOCABULARY = 51_200
FLAGS = f"""--user-dir {Path(fairseq_moe_ext.__file__).parent} --task language_modeling
    --arch moe_lm_15b --moe-expert-count 8 --criterion moe_cross_entropy --tokens-per-sample 2048"""


def write_checkpoint(folder: Path) -> Path:
    """A checkpoint as fairseq-train writes it, without the state of an optimizer."""
    (folder / "dict.txt").write_text("".join(f"w{i} 1\n" for i in range(VOCABULARY - 4)))
    args = options.parse_args_and_arch(options.get_training_parser(), [str(folder), *FLAGS.split()])
    cfg = convert_namespace_to_omegaconf(args)
    state = {
        "args": None,
        "cfg": OmegaConf.to_container(cfg, resolve=True, enum_to_str=True),
        "model": tasks.setup_task(cfg.task).build_model(cfg.model).state_dict(),
        "optimizer_history": [
            {"optimizer_name": "FairseqAdam", "num_updates": 1, "lr_scheduler_state": {}}
        ],
        "extra_state": {"train_iterator": {"epoch": 1, "iterations_in_epoch": 0}},
    }
    checkpoint_utils.torch_persistent_save(state, str(folder / "checkpoint.pt"))
    return folder / "checkpoint.pt"


def forget(path: Path) -> None:
    """Have the system drop a file from memory; what is mapped somewhere it would keep."""
    gc.collect()
    with path.open("rb") as stream:
        os.fsync(stream.fileno())
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read(path: Path) -> None:
    block = bytearray(2**24)
    with path.open("rb", buffering=0) as stream:
        while stream.readinto(block):
            pass


def main() -> None:
    logging.disable(logging.INFO)
    torch.set_num_threads(2)
    start = time.perf_counter()
    with torch.device("meta"):
        model = language_model(VOCABULARY, tokens_per_sample=2048, **ARCHITECTURES["moe_lm_15b"])
    seconds = time.perf_counter() - start
    bytes_of_all = 4 * sum(parameter.numel() for parameter in model.parameters())
    rows = {"build moe_lm_15b on the meta device": (seconds, bytes_of_all)}
    del model
    with tempfile.TemporaryDirectory() as folder:
        path = write_checkpoint(Path(folder))
        both = in_turn(
            {
                "read": lambda: (forget(path), read(path)),
                "load": lambda: (forget(path), checkpoint_utils.load_model_ensemble([str(path)])),
            },
            rounds=5,
            warmup=1,
        )
        size = path.stat().st_size
    rows["read the file of moe_lm_15b with 8 experts"] = median(both["read"]), size
    rows["load it into a model"] = median(both["load"]), size
    rows = keep("start_up", {
        name: {"seconds": round(took, 3), "gb": round(size / 1e9, 3)}
        for name, (took, size) in rows.items()
    })  # fmt: skip
    keep_table(
        "start_up",
        "Start-up (float32)",
        ["what", "seconds", "GB", "GB/s"],
        [
            [name, f"{row['seconds']:.2f}", f"{row['gb']:.2f}", f"{row['gb'] / row['seconds']:.2f}"]
            for name, row in rows.items()
        ],
    )


if __name__ == "__main__":
    main()
