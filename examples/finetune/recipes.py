"""The rows of the comparison: a recipe of fine-tuning each, and its flags of fairseq-train."""

from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

import yaml

from fairseq_moe_ext.errors import UserError
from fairseq_moe_ext.wording import flag

REPOSITORY = Path(__file__).resolve().parents[2]

# The plain rows are tuned as the paper tuned: sparse models exactly as dense ones, capacity in
# training twice ceil(tokens / experts), and evaluation drops nothing.
BATCH, LEARNING_RATE, EPOCHS, SEEDS = 32, 5e-4, 3, 3
TRAIN, VALID, TEST = 800, 200, 800  # questions
TOKENS = 192  # longest sequence

# Row of a sparse model -> files of hydra_conf/recipe. The recipe small_batch is a quarter of the
# batch and twice the learning rate of hydra_conf/finetune.yaml; here it is so of the above.
RECIPES: Dict[str, List[str]] = {
    "plain": [],
    "dropless": ["dropless"],
    "equal capacity": ["equal_capacity"],
    "pad mask": ["pad_mask"],
    "no balance loss": ["no_balance_loss"],
    "z-loss": ["z_loss"],
    "expert dropout": ["expert_dropout"],
    "frozen gate": ["freeze_gate"],
    "frozen experts": ["freeze_experts"],
    "small batch": ["small_batch"],
    "together": ["dropless", "pad_mask", "z_loss", "expert_dropout", "freeze_gate"],
}
ROWS = ["dense", *RECIPES]


def recipe_settings(names: Sequence[str]) -> Dict[str, Any]:
    """The settings of recipe files."""
    settings_of_row: Dict[str, Any] = {}
    for name in names:
        path = REPOSITORY / "hydra_conf" / "recipe" / f"{name}.yaml"
        for settings in yaml.safe_load(path.read_text(encoding="utf-8")).values():
            settings_of_row.update(settings)
    if "lr" in settings_of_row:
        settings_of_row["lr"] = 2 * LEARNING_RATE
        settings_of_row["batch_size"] = BATCH // 4
    return settings_of_row


def as_flags(settings: Dict[str, Any]) -> List[str]:
    """As flags of fairseq-train."""
    flags = []
    for key, value in settings.items():
        flags.append(flag(key))
        if value is not True:
            flags.append(str(value))
    return flags


def chosen_rows(names: Optional[str]) -> List[str]:
    chosen = ROWS if names is None else [name.strip() for name in names.split(",")]
    for name in chosen:
        if name not in ROWS:
            raise UserError(f"--rows {names}: no row {name!r}; there are {', '.join(ROWS)}")
    return chosen
