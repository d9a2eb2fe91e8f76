"""What docs/hydra.md and the first lines of the ready configs say of them."""

import json
import re
from pathlib import Path

import pytest
from fairseq.data import data_utils
from omegaconf import OmegaConf
from ready_configs import CONF, RECIPES, WARNINGS, composed, resolved

from fairseq_moe_ext import cli, command_checks
from fairseq_moe_ext.errors import UserError
from fairseq_moe_ext.moe.routing import token_capacity

pytestmark = WARNINGS

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "hydra.md").read_text(encoding="utf-8")
EXPERTS = 512


def rows(head):
    """The cells of a table of the page, by its first line."""
    lines = PAGE.split(f"{head}\n")[1].split("\n\n")[0].splitlines()[1:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_table_shows_the_settings_of_the_configs():
    checked = 0
    for configs, settings, here, there in rows(
        "| config | setting | here, as printed | by the run's name |"
    ):
        assert float(here) != float(there)
        for config in re.findall(r"`(\w+)`", configs):
            cfg = composed(config, ["task.data=unused"])
            for setting in re.findall(r"`([\w.]+)`", settings):
                value = OmegaConf.select(cfg, setting)
                assert (value[0] if setting == "optimization.lr" else value) == float(here), config
                checked += 1
    assert checked == 14


@pytest.mark.parametrize("row", rows("| config | here | by the run's name |"), ids=lambda r: r[0])
def test_the_table_shows_the_batch_of_one_gpu_and_what_an_expert_takes(row):
    cfg = composed(row[0].strip("`"), ["task.data=unused"])
    assert cfg.model.moe_expert_count == EXPERTS
    sizes = []
    for cell in row[1:]:
        size, tokens = map(int, re.match(r"(\d+): (\d+) tokens", cell).groups())
        assert tokens == token_capacity(size * cfg.task.tokens_per_sample, EXPERTS, factor=2)
        sizes.append(size)
    assert sizes[0] == cfg.dataset.batch_size != sizes[1]
    assert cfg.model.moe_capacity_factor is None  # the number of experts per token: 2


def test_the_warm_ups_of_late_2021_are_375_million_tokens_of_2_to_the_20():
    """As the page says of 750 and 187; the earlier runs' 357 and our own have a million of 10^6."""
    found = {
        config: int(there)
        for configs, setting, _, there in rows(
            "| config | setting | here, as printed | by the run's name |"
        )
        if "warmup_updates" in setting and there != "2000"
        for config in re.findall(r"`(\w+)`", configs)
    }
    late = {"dense_lm_6_7b", "dense_lm_13b", "moe_lm_15b", "moe_lm_1_1t"}
    for config, there in found.items():
        tokens = 375 * (2**20 if config in late else 10**6)
        assert there == tokens // RECIPES[config][0], config
        cfg = composed(config, ["task.data=unused"])
        assert cfg.lr_scheduler.warmup_updates == round(375e6 / RECIPES[config][0])
    assert found.keys() == late | {"dense_lm_1_3b", "dense_lm_2_7b"}


@pytest.mark.parametrize("name", [name for name in RECIPES if name.startswith("moe")])
def test_the_table_of_the_run_scripts_shows_the_settings_of_the_configs(name):
    cfg = composed(name, ["task.data=unused"])
    table = rows("| setting | here | by the run scripts |")
    assert len(table) == 4
    for setting, here, _ in table:
        value = OmegaConf.select(cfg, setting.strip("`"))
        if setting == "`dataset.batch_size_valid`":
            assert here == "as `dataset.batch_size`" and value == cfg.dataset.batch_size
        else:
            assert str(value).lower() == here


def test_the_tokens_of_an_expert_in_validation():
    block, here = re.search(
        r"an expert took (\d+) tokens, its mean load, .* up to ([\d,]+)\s+of 8 blocks", PAGE, re.S
    ).groups()
    cfg = composed("moe_lm_15b", ["task.data=unused"])
    length = cfg.task.tokens_per_sample
    assert int(block) == token_capacity(length, EXPERTS, factor=2) == 2 * length / EXPERTS
    share = cfg.model.moe_eval_capacity_token_fraction
    assert int(here.replace(",", "")) == share * cfg.dataset.batch_size * length
    assert cfg.dataset.batch_size == 8


def test_a_batch_is_as_large_as_its_setting():
    """fairseq's own multiple of 8 cuts 12 to 8."""
    cfg = composed("moe_lm_15b", ["task.data=unused", "dataset.batch_size=12"])
    sizes = [
        [
            len(batch)
            for batch in data_utils.batch_by_size(
                range(48),
                lambda _: 1,
                max_sentences=cfg.dataset.batch_size,
                required_batch_size_multiple=multiple,
            )
        ]
        for multiple in (cfg.dataset.required_batch_size_multiple, 8)
    ]
    assert sizes == [[12] * 4, [8] * 6]


def gigabytes(capsys, command):
    assert cli.main([*command.split()[1:], "--json"]) == 0
    return json.loads(capsys.readouterr().out)["recompute"]["bytes_per_device"]["total"] / 1e9


@pytest.mark.parametrize("name", list(RECIPES))
def test_what_does_not_fit_on_a_gpu_of_80_gb_names_the_remedy(name, capsys):
    text = (CONF / f"{name}.yaml").read_text(encoding="utf-8").split("\ndefaults:")[0]
    head = " ".join(line.lstrip("# ") for line in text.splitlines())
    size, gpus = re.search(r"batch_size (\d+) x update_freq \d+ x (\d+) GPUs", head).groups()
    shared = f"--batch-size {size} --precision memory-efficient-fp16"
    plain = f"fairseq-moe cost --arch {name} --world-size {gpus} {shared}"
    remedy = re.search(r"=fully_sharded each of (\d+) GPUs needs ([\d.]+) GB, by `(.*)`\.", head)
    assert bool(remedy) == (gigabytes(capsys, plain) > 80)
    if remedy:
        gpus, needed, command = remedy.groups()
        sharded = f"fairseq-moe cost --arch {name} --world-size {gpus} {shared} --sharding full"
        assert command == f"{sharded} --checkpoint-activations"
        assert needed == f"{gigabytes(capsys, command):.1f}" and float(needed) < 80
        cfg = composed(name, ["task.data=x", "distributed_training.ddp_backend=fully_sharded"])
        assert cfg.distributed_training.ddp_backend == "fully_sharded"


@pytest.mark.parametrize("name", list(RECIPES))
def test_every_recipe_trains_in_bfloat16_as_the_page_says(name):
    overrides = re.search(r"\*\*bfloat16\.\*\*[^`]* Add `([^`]*)`", PAGE)[1].split()
    assert "common.bf16=true" in overrides
    cfg = resolved(composed(name, ["task.data=x", *overrides]))
    assert cfg.common.bf16 and not (cfg.common.fp16 or cfg.common.memory_efficient_fp16)
    command_checks.check_run(cfg)
    cfg = resolved(composed(name, ["task.data=x", "common.bf16=true"]))
    with pytest.raises(UserError, match="^common.fp16 and common.bf16 are different"):
        command_checks.check_run(cfg)
