"""lm-eval's --device. Its default is cuda:0, with a GPU or without
(lm_eval/config/evaluate_config.py:88@0.4.13), so this says nothing of the device."""

from typing import Optional

import torch

from ..errors import UserError
from ..expert_parallel import collective_device, process_count


def is_cpu(device: Optional[str]) -> bool:
    """Whether the model stays on the CPU beside a GPU. Raises UserError for a device that it would
    not use."""
    if device not in (None, "cpu", "cuda", "cuda:0"):
        raise UserError(
            f"--device {device}: use cpu, or cuda; CUDA_VISIBLE_DEVICES=N chooses one of several "
            "GPUs"
        )
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device {device}: there is no GPU here; use cpu")
    if device == "cpu" and process_count() > 1 and collective_device().type == "cuda":
        raise UserError(  # of a --config
            "device cpu: with several processes give --device cpu on the command line"
        )
    return device == "cpu"
