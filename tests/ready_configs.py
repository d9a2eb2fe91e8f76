"""The ready configs of hydra_conf/, composed as the command does."""

from pathlib import Path
from typing import List

import pytest
from fairseq.dataclass.initialize import add_defaults, hydra_init
from fairseq.dataclass.utils import omegaconf_no_object_check
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

WARNINGS = [  # fairseq leans on these, and Hydra says that they will go
    pytest.mark.filterwarnings(r"ignore:\s*'.*' is validated against ConfigStore schema"),
    pytest.mark.filterwarnings(r"ignore:\s*version_base=.1.1. selects Hydra 1.1"),
]
CONF = Path(__file__).resolve().parents[1] / "hydra_conf"
# The paper: tokens a batch as GPT-3's, peak learning rate; for models with 300B tokens.
RECIPES = {
    "dense_lm_125m": (2**19, 6e-4),
    "dense_lm_355m": (2**19, 3e-4),
    "dense_lm_1_3b": (2**20, 2e-4),
    "dense_lm_2_7b": (2**20, 1.6e-4),
    "dense_lm_6_7b": (2**21, 1.2e-4),
    "dense_lm_13b": (2**21, 1e-4),
    "moe_lm_15b": (2**19, 6e-4),
    "moe_lm_52b": (2**19, 3e-4),
    "moe_lm_207b": (2**20, 2e-4),
    "moe_lm_1_1t": (2**21, 1.2e-4),
}


def composed(name: str, overrides: List[str]) -> DictConfig:
    """The settings of `fairseq-hydra-train --config-dir hydra_conf --config-name NAME ...`."""
    hydra_init(name)  # stores fairseq's schema under that name, as the command does
    with initialize_config_dir(str(CONF), version_base="1.1"):
        return compose(name, overrides)


def resolved(cfg: DictConfig) -> DictConfig:
    """As fairseq_cli/hydra_train.py:44@0.12.2 hands them to the trainer."""
    cfg.checkpoint.save_dir = "unused"  # else from Hydra's run, and there is none here
    add_defaults(cfg)
    with omegaconf_no_object_check():
        return OmegaConf.create(OmegaConf.to_container(cfg, resolve=True, enum_to_str=True))
