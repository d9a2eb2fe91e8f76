"""The range of every numeric flag: one table for command lines, Hydra and --model-overrides.

It covers the flags of stock fairseq that language models can use. Without it, a number out of range
would silently mean something else (--batch-size 0: no limit), or raise an exception of fairseq that
does not name the flag, perhaps after hours (--log-interval 0).
"""

import math
from typing import Any, Callable, Dict, Iterator, Mapping, NamedTuple, Optional, Tuple

from .errors import UserError
from .literals import plain
from .wording import flag, short


def _short(number: float) -> str:
    return f"{number:,}" if number == int(number) else str(number)


class Range(NamedTuple):
    """Numbers from `low` to `high`."""

    low: float
    high: float
    whole: bool = False
    open: bool = False  # above low
    below: bool = False  # below high
    others: Tuple[float, ...] = ()  # values with a special meaning
    meaning: str = ""  # of these values, or the reason for a bound
    items: Optional[int] = 0  # 0: one number; None: a list of any length; N: of this length

    def __contains__(self, value: Any) -> bool:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return False
        if value in self.others:
            return True
        if not math.isfinite(value) or (self.whole and value != int(value)):
            return False
        above = value > self.low if self.open else value >= self.low
        return above and (value < self.high if self.below else value <= self.high)

    def __str__(self) -> str:
        words = "a whole number" if self.whole else "a number"
        if self.low > -math.inf:
            words += f" above {_short(self.low)}" if self.open else f" from {_short(self.low)}"
        if self.low == self.high:
            words = _short(self.low)
        elif self.high < _ANY:
            words += f" to below {_short(self.high)}" if self.below else f" to {_short(self.high)}"
        elif self.low > -math.inf and not self.open:
            words += " on"
        if self.items != 0:
            words = f"{self.items or 'one or more'} of them, each {words}"
        if self.others:
            words += f", or {' or '.join(map(_short, self.others))}"
        return words + (f" ({self.meaning})" if self.meaning else "")


_ANY = 2**53  # whole numbers that float64 holds
_TENSOR = 2**31 - 1  # more rows or columns than any batch has
_SIZE = 2**20  # of a model; a typing error would fill the memory
_SEED = 2**32 - 1

COUNT = Range(0, _ANY, whole=True)
POSITIVE_COUNT = COUNT._replace(low=1)
BATCH = Range(1, _TENSOR, whole=True)
SIZE = Range(1, _SIZE, whole=True)
WEIGHT = Range(0, math.inf)
POSITIVE = WEIGHT._replace(open=True)
SHARE = Range(0, 1)
BELOW_1 = Range(0, 1, below=True)
FINITE = Range(-math.inf, math.inf)
SEED = Range(0, _SEED, whole=True, meaning="numpy's seeds")


def _or(others: float, meaning: str, range: Range = POSITIVE_COUNT) -> Range:
    return range._replace(others=(others,), meaning=f"{_short(others)}: {meaning}")


_GROUPS = {
    # common
    "log_interval": POSITIVE_COUNT,
    "seed fixed_validation_seed": SEED,
    "fp16_init_scale amp_init_scale fp16_scale_window amp_scale_window": POSITIVE_COUNT,
    "fp16_scale_tolerance": SHARE,
    "min_loss_scale threshold_loss_scale": POSITIVE,
    "amp_batch_retries empty_cache_freq": COUNT,
    "all_gather_list_size": Range(1, _TENSOR, whole=True),
    "model_parallel_size": Range(
        1, 1, whole=True, meaning="these models do not support model parallelism"
    ),
    # distributed_training
    "distributed_world_size distributed_num_procs nprocs_per_node": Range(1, _SIZE, whole=True),
    "distributed_rank device_id": Range(0, _SIZE, whole=True),
    "distributed_port": _or(-1, "any", Range(1, 65535, whole=True)),
    "bucket_cap_mb localsgd_frequency": Range(1, _TENSOR, whole=True),
    "heartbeat_timeout": _or(-1, "no limit", Range(1, _TENSOR, whole=True)),
    "slowmo_momentum": BELOW_1,
    # dataset
    "num_workers data_buffer_size": Range(0, 4096, whole=True),
    "max_tokens max_tokens_valid batch_size batch_size_valid": BATCH,
    "required_batch_size_multiple required_seq_len_multiple": BATCH,
    "validate_interval max_valid_steps": POSITIVE_COUNT,
    "validate_interval_updates validate_after_updates curriculum": COUNT,
    "num_shards": Range(1, _TENSOR, whole=True),
    "shard_id": Range(0, _TENSOR, whole=True),
    # optimization
    "max_epoch max_update": COUNT._replace(meaning="0: no limit"),
    "stop_time_hours": WEIGHT._replace(meaning="0: no limit"),
    "clip_norm": WEIGHT._replace(meaning="0: no clipping"),
    "update_freq": Range(1, _TENSOR, whole=True, items=None),
    "lr": WEIGHT._replace(items=None),
    "stop_min_lr": _or(-1, "never", WEIGHT),
    # checkpoint; fairseq treats 0 as -1 in these, which is not what 0 suggests
    "keep_interval_updates keep_last_epochs keep_best_checkpoints": _or(-1, "keeps all"),
    "keep_interval_updates_pattern": _or(-1, "no pattern"),
    "patience": _or(-1, "never stops early"),
    "save_interval checkpoint_shard_count": POSITIVE_COUNT,
    "save_interval_updates": COUNT._replace(meaning="0: never"),
    # bmuf, ema
    "block_lr": POSITIVE,
    "block_momentum": BELOW_1,
    "global_sync_iter ema_update_freq": POSITIVE_COUNT,
    "warmup_iterations ema_start_update": COUNT,
    "ema_decay": SHARE,
    # generation, eval_lm, interactive
    "beam nbest": Range(1, _SIZE, whole=True),
    "max_len_a": WEIGHT,
    "max_len_b min_len prefix_size no_repeat_ngram_size": Range(0, _TENSOR, whole=True),
    "lenpen unkpen lm_weight diverse_beam_strength": FINITE,
    "sampling_topk": _or(-1, "all"),
    "sampling_topp": _or(-1, "all", Range(0, 1, open=True)),
    "temperature": POSITIVE,
    "diverse_beam_groups": _or(-1, "none"),
    "diversity_rate": _or(-1, "none", WEIGHT),
    "context_window buffer_size": Range(0, _TENSOR, whole=True),
    "softmax_batch": Range(1, 2**63, whole=True),
    # optimizers
    "adam_betas adamax_betas": BELOW_1._replace(items=2),
    "adam_eps adamax_eps adadelta_eps": POSITIVE,
    "weight_decay": WEIGHT,
    "momentum beta1": BELOW_1,
    "adadelta_rho": SHARE,
    "clip_threshold": POSITIVE,
    "decay_rate": FINITE,
    # learning rate schedules
    "warmup_updates warmup_steps hold_steps decay_steps lr_patience": COUNT,
    "warmup_init_lr": _or(-1, "by the schedule", WEIGHT),
    "min_lr end_learning_rate lr_threshold init_lr_scale": WEIGHT,
    "force_anneal lr_deacy_period": POSITIVE_COUNT,
    "power t_mult final_lr_scale max_lr lr_shrink": POSITIVE,
    "lr_decay": Range(0, 1, open=True),
    "total_num_update": Range(
        0, math.inf, open=True, meaning="default in Hydra: --max-update, which is then needed"
    ),
    "lr_period_updates": _or(-1, "--max-update", POSITIVE),
    "phase_ratio": SHARE._replace(items=3),
    # tasks
    "tokens_per_sample max_target_positions max_source_positions": SIZE,
    "output_dictionary_size": Range(
        -1, -1, whole=True, meaning="these models predict the whole vocabulary"
    ),
    "corpus_temperature": POSITIVE,
    "choice_valid_share": BELOW_1,
    # criterions
    "moe_gate_loss_wt moe_z_loss_wt": WEIGHT._replace(meaning="0: off"),
    "label_smoothing": BELOW_1,
    "ignore_prefix_size": COUNT,
    # the model
    "decoder_embed_dim decoder_ffn_embed_dim decoder_attention_heads moe_expert_ffn_dim": SIZE,
    "moe_shared_expert_ffn_dim moe_latent_dim": SIZE,
    "moe_shared_experts moe_null_experts": Range(0, _SIZE, whole=True, meaning="0: none"),
    "moe_first_dense": Range(0, 10_000, whole=True),
    "decoder_layers": Range(1, 10_000, whole=True),
    "dropout attention_dropout activation_dropout moe_expert_dropout": BELOW_1,
    "moe_freq": Range(0, 10_000, whole=True, meaning="0: a dense model"),
    "moe_expert_count": Range(0, _SIZE, whole=True, meaning="0: a dense model"),
    "moe_top_k moe_groups moe_top_groups": SIZE,
    "moe_route_scale moe_bias_update_rate": POSITIVE,
    "moe_input_jitter moe_eom moe_fom moe_threshold_decay": BELOW_1,
    "moe_capacity_factor": POSITIVE._replace(meaning="2 is usual, --moe-dropless sets no limit"),
    "moe_eval_capacity_token_fraction": Range(
        -math.inf, 1, meaning="negative: the rule of training"
    ),
    "alternate_decoder_ffn_embed_dim": Range(0, _SIZE, whole=True, meaning="0: experts"),
    "min_params_to_wrap": COUNT,
}
RANGES: Dict[str, Range] = {
    name: range for names, range in _GROUPS.items() for name in names.split()
}


def check(settings: Mapping[str, Any], spell: Callable[[str], str] = flag) -> None:
    """Raise UserError for a number out of its range; other settings and None pass.

    Args:
        settings: values by name, of a command line or a group of settings.
        spell: gives a name as the user has written it.
    """
    for name, value in settings.items():
        allowed = RANGES.get(name)
        if allowed is None or value is None or (isinstance(value, str) and "${" in value):
            continue  # the last refers to another setting
        if spell is flag and isinstance(value, list):
            value = ",".join(map(str, value))  # as it is written there
        require(allowed, value, spell(name))


def require(allowed: Range, value: Any, spelled: str) -> None:
    """Raise UserError unless a value is in the range."""
    if not _fits(allowed, value):
        shown = repr(value) if value == "" else str(value)
        raise UserError(f"{spelled} {short(shown)} is out of range: use {allowed}")


def _fits(allowed: Range, value: Any) -> bool:
    if isinstance(value, str):  # "(0.9, 0.98)", or a number if fairseq has no type for it
        try:
            value = plain(value)
        except ValueError:
            return False
    if allowed.items == 0:
        return value in allowed
    values = list(value) if hasattr(value, "__iter__") else [value]
    if len(values) != (allowed.items or max(len(values), 1)):
        return False
    return all(one in allowed for one in values)


def flatten(settings: Mapping[str, Any]) -> Iterator[Tuple[str, str, Any]]:
    """(group, name, value) of each setting in Hydra's groups."""
    for group, inner in settings.items():
        if isinstance(inner, Mapping):
            for name, value in inner.items():
                yield group, name, value
