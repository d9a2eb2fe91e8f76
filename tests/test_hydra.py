"""hydra_conf/: every YAML composes, builds a model and has the paper's numbers; the command runs.

Run as a script (`python tests/test_hydra.py`), this file writes the option groups anew from the
dataclasses and from ARCHITECTURES; a test fails when a YAML differs from them.
"""

import os
import re
import subprocess
import sys
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, Dict

import numpy as np
import pytest
import torch
from fairseq import optim, tasks
from fairseq.criterions.cross_entropy import CrossEntropyCriterionConfig
from fairseq.optim import lr_scheduler
from fairseq.optim.adam import FairseqAdamConfig
from fairseq.optim.lr_scheduler.polynomial_decay_schedule import PolynomialDecayLRScheduleConfig
from fairseq.tasks.language_modeling import LanguageModelingConfig
from omegaconf import OmegaConf
from ready_configs import CONF, RECIPES, WARNINGS, composed, resolved
from training import words, write_data_bin

import fairseq_moe_ext
from fairseq_moe_ext import command_checks
from fairseq_moe_ext.config import MoETransformerLMConfig
from fairseq_moe_ext.config_checks import validate
from fairseq_moe_ext.criterions.moe_cross_entropy import MoECrossEntropyConfig
from fairseq_moe_ext.criterions.multiple_choice import MultipleChoiceConfig
from fairseq_moe_ext.errors import UserError
from fairseq_moe_ext.models.architectures import ARCHITECTURES
from fairseq_moe_ext.models.language_model import MODEL_NAME
from fairseq_moe_ext.moe.layer import MoELayer
from fairseq_moe_ext.optim import FusedAdamConfig
from fairseq_moe_ext.patches import hydra
from fairseq_moe_ext.router_flags import gate_settings
from fairseq_moe_ext.tasks.mixture_language_modeling import MixtureLanguageModelingConfig
from fairseq_moe_ext.tasks.multiple_choice import MultipleChoiceTaskConfig
from fairseq_today import finding

pytestmark = WARNINGS

PACKAGE = Path(fairseq_moe_ext.__file__).resolve().parent
COMMAND = str(Path(sys.executable).parent / "fairseq-hydra-train")
ENVIRONMENT = {key: value for key, value in os.environ.items() if key != "LOGLEVEL"}
ENVIRONMENT.update(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")

# Option file -> (name in fairseq, its dataclass, what differs from the dataclass's defaults).
TASK = {"data": "???", "tokens_per_sample": 2048}
DEFAULTS = "model/_defaults"
OPTIONS = {
    "task/language_modeling": ("language_modeling", LanguageModelingConfig, TASK),
    "task/mixture_language_modeling": (
        "mixture_language_modeling",
        MixtureLanguageModelingConfig,
        TASK,
    ),
    "task/multiple_choice": ("multiple_choice", MultipleChoiceTaskConfig, {"data": "???"}),
    "criterion/moe_cross_entropy": (
        "moe_cross_entropy",
        MoECrossEntropyConfig,
        {"moe_gate_loss_wt": 0.01, "moe_gate_loss_combine_method": "sum"},
    ),
    "criterion/multiple_choice": (
        "multiple_choice",
        MultipleChoiceConfig,
        {"moe_gate_loss_wt": 0.01, "moe_gate_loss_combine_method": "sum"},
    ),
    "criterion/cross_entropy": ("cross_entropy", CrossEntropyCriterionConfig, {}),
    "optimizer/adam": (
        "adam",
        FairseqAdamConfig,
        {"adam_betas": "(0.9, 0.98)", "adam_eps": 1e-8, "weight_decay": 0.01},
    ),
    "optimizer/fused_adam": (
        "fused_adam",
        FusedAdamConfig,
        {"adam_betas": "(0.9, 0.98)", "adam_eps": 1e-8, "weight_decay": 0.01},
    ),
    "lr_scheduler/polynomial_decay": ("polynomial_decay", PolynomialDecayLRScheduleConfig, {}),
    DEFAULTS: (MODEL_NAME, MoETransformerLMConfig, {}),
    **{
        f"model/{name}": (MODEL_NAME, MoETransformerLMConfig, sizes)
        for name, sizes in ARCHITECTURES.items()
    },
}

# For fine-tuning sparse models: what each file of recipe/ changes, and to what.
RECIPE_FILES = {
    "recipe/dropless": {"model.moe_dropless": True},
    "recipe/equal_capacity": {
        "model.moe_capacity_factor": 4.0,
        "model.moe_eval_capacity_token_fraction": -1.0,
    },
    "recipe/pad_mask": {"model.use_moe_pad_mask": True},
    "recipe/no_balance_loss": {"criterion.moe_gate_loss_wt": 0.0},
    "recipe/z_loss": {"criterion.moe_z_loss_wt": 0.001},
    "recipe/expert_dropout": {"model.moe_expert_dropout": 0.4},
    "recipe/freeze_gate": {"model.moe_freeze": "gate"},
    "recipe/freeze_experts": {"model.moe_freeze": "experts"},
    "recipe/small_batch": {"dataset.batch_size": 8, "optimization.lr": [1.25e-4]},
}
SHRUNKEN = [
    *("model.decoder_layers=2", "model.decoder_embed_dim=16", "model.decoder_ffn_embed_dim=32"),
    *("model.decoder_attention_heads=2", "task.tokens_per_sample=8", "dataset.batch_size=2"),
]
ON_CPU = [
    *("common.cpu=true", "common.fp16=false", "common.memory_efficient_fp16=false"),
    *("distributed_training.distributed_world_size=1", "dataset.num_workers=0"),
]


def option(path: str) -> Dict[str, Any]:
    """What the YAML of an option must hold: every key of the dataclass."""
    name, dataclass, changes = OPTIONS[path]
    defaults = {f.name: f.default for f in fields(dataclass)}
    assert MISSING not in defaults.values() and set(changes) <= set(defaults)
    content = OmegaConf.create({**defaults, **changes, "_name": name})
    return OmegaConf.to_container(content, enum_to_str=True)


def content_of(path: str) -> Dict[str, Any]:
    """What the YAML of an option holds; a model's: what differs from model/_defaults."""
    if not path.startswith("model/") or path == DEFAULTS:
        return option(path)
    defaults = option(DEFAULTS)
    changes = {key: value for key, value in option(path).items() if defaults[key] != value}
    return {"defaults": ["_defaults", "_self_"], **changes}


def write_options() -> None:
    for path, (_, dataclass, changes) in OPTIONS.items():
        source = f"# From {dataclass.__module__}.{dataclass.__name__}"
        if path.startswith("model/") and changes:
            source = "# From ARCHITECTURES in fairseq_moe_ext/models/architectures.py"
        text = f"{source},\n# written by `python tests/test_hydra.py`.\n"
        text += OmegaConf.to_yaml(OmegaConf.create(content_of(path)))
        (CONF / f"{path}.yaml").write_text(text, encoding="utf-8")


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """A folder with the data-bin `data` and the mixture `corpora`, with a vocabulary of 20."""
    folder = tmp_path_factory.mktemp("hydra")
    rows = np.random.RandomState(1).randint(4, 20, size=(15, 11))
    for data_bin in ("data", "corpora", "corpora/docs", "corpora/code"):
        (folder / data_bin).mkdir()
        splits = {} if data_bin == "corpora" else {"train": rows[:12], "valid": rows[12:]}
        write_data_bin(folder / data_bin, splits, words(16))
    return folder


def test_the_groups_hold_every_key_of_the_dataclasses_and_the_architectures_values():
    there = {str(path.relative_to(CONF))[:-5].replace(os.sep, "/") for path in CONF.rglob("*.yaml")}
    assert there == {*OPTIONS, *ARCHITECTURES, "base", "finetune", *RECIPE_FILES}
    for path in OPTIONS:
        content = OmegaConf.to_container(OmegaConf.load(CONF / f"{path}.yaml"))
        assert content == content_of(path), f"{path}: run python tests/test_hydra.py"


@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_every_ready_config_composes_and_trains_a_shrunken_model(name, workplace):
    data = f"task.data={workplace / 'data'}"
    assert ARCHITECTURES[name].items() <= dict(composed(name, [data]).model).items()
    experts = ["model.moe_expert_count=4"] if name.startswith("moe") else []
    cfg = resolved(composed(name, [data, *SHRUNKEN, *experts]))
    assert cfg.common.user_dir == str(PACKAGE)
    assert cfg.model.batch_size == 2 and cfg.model.tokens_per_sample == 8

    task = tasks.setup_task(cfg.task)
    model, criterion = task.build_model(cfg.model), task.build_criterion(cfg.criterion)
    layers = [module for module in model.modules() if isinstance(module, MoELayer)]
    assert len(layers) == (1 if name.startswith("moe") else 0)
    optimizer = optim.build_optimizer(cfg.optimizer, model.parameters())
    scheduler = lr_scheduler.build_lr_scheduler(cfg.lr_scheduler, optimizer)
    rate = scheduler.step_update(cfg.lr_scheduler.warmup_updates)
    assert rate == cfg.optimization.lr[0]
    assert scheduler.step_update(cfg.optimization.max_update) == 0

    task.load_dataset("train")
    batch = task.dataset("train").collater([task.dataset("train")[i] for i in range(2)])
    model.train()
    loss, _, logged = task.train_step(batch, model, criterion, optimizer, update_num=0)
    assert torch.isfinite(loss) and ("moe_loss" in logged) == name.startswith("moe")
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    if name.startswith("moe"):  # the paper's balancing loss: the sum over layers, weight 0.01
        expected = logged["inner_loss"] + 0.01 * logged["moe_loss"]
        torch.testing.assert_close(logged["loss"], expected)


@pytest.mark.parametrize("name", list(RECIPES))
def test_the_recipes_are_the_papers(name):
    tokens, rate = RECIPES[name]
    cfg = composed(name, ["task.data=unused"])
    # The number of GPUs is the comment's alone: fairseq takes all that it sees.
    header = (CONF / f"{name}.yaml").read_text(encoding="utf-8").replace(",", "")
    found = re.search(
        r"batch_size (\d+) x update_freq (\d+) x (\d+) GPUs = (\d+) sequences of 2048 = "
        r"(\d+) tokens",
        header,
    )
    size, freq, gpus, sequences, in_header = map(int, found.groups())
    assert [size, [freq]] == [cfg.dataset.batch_size, cfg.optimization.update_freq]
    assert size * freq * gpus == sequences
    assert sequences * cfg.task.tokens_per_sample == in_header == tokens

    assert 0 <= 300e9 - cfg.optimization.max_update * tokens < tokens
    assert abs(375e6 - cfg.lr_scheduler.warmup_updates * tokens) <= tokens / 2
    assert list(cfg.optimization.lr) == [rate]
    assert (cfg.lr_scheduler.power, cfg.lr_scheduler.end_learning_rate) == (1, 0)
    adam = cfg.optimizer
    assert (adam.adam_betas, adam.adam_eps, adam.weight_decay) == ("(0.9, 0.98)", 1e-8, 0.01)
    assert cfg.optimization.clip_norm == 0 and cfg.model.dropout == 0.1
    assert cfg.task.sample_break_mode == "none" and not cfg.task.add_bos_token
    assert cfg.common.fp16
    if name not in ("dense_lm_125m", "dense_lm_355m"):
        assert cfg.common.memory_efficient_fp16 and cfg.model.checkpoint_activations


def test_base_and_the_ready_configs_set_no_key_twice():
    def keys(path: Path) -> set:
        tree = OmegaConf.to_container(OmegaConf.load(path))
        return {f"{group}.{key}" for group in tree if group != "defaults" for key in tree[group]}

    for name in (*ARCHITECTURES, "finetune"):
        assert not keys(CONF / "base.yaml") & keys(CONF / f"{name}.yaml"), name


@pytest.mark.parametrize("path", list(OPTIONS))
def test_every_option_can_be_chosen_in_a_ready_config(path, workplace):
    group, chosen = path.split("/")
    data = "corpora" if chosen.startswith("mixture") else "data"
    overrides = [f"task.data={workplace / data}", *SHRUNKEN, f"{group}={chosen}"]
    cfg = composed("dense_lm_tiny", overrides)
    own = {"warmup_updates", "tokens_per_sample", "data"}  # what dense_lm_tiny sets itself
    shrunken = {setting.partition("=")[0] for setting in SHRUNKEN}
    content = OmegaConf.to_container(cfg, enum_to_str=True)[group]
    for key, value in option(path).items():
        if key not in own and f"{group}.{key}" not in shrunken:
            assert content[key] == value, key
    if path.startswith("task") and chosen != "multiple_choice":
        task = tasks.setup_task(resolved(cfg).task)
        task.load_dataset("train")
        assert len(task.dataset("train")) == (18 if data == "data" else 36)  # 12 * 12 / 8 each


@pytest.mark.parametrize("path", list(RECIPE_FILES))
def test_a_recipe_changes_its_settings_and_no_others(path):
    def settings(*overrides: str) -> Dict[str, Any]:
        cfg = OmegaConf.to_container(composed("finetune", ["task.data=x", *overrides]))
        groups = {group: cfg[group] for group in cfg if isinstance(cfg[group], dict)}
        return {f"{group}.{key}": value for group in groups for key, value in cfg[group].items()}

    plain, changed = settings(), settings(f"+{path.replace('/', '=')}")
    assert {key: changed[key] for key in changed if changed[key] != plain[key]} == RECIPE_FILES[
        path
    ]
    assert all(plain[key] != value for key, value in RECIPE_FILES[path].items())


def test_recipes_combine():
    cfg = resolved(composed("finetune", ["task.data=x", "+recipe=[dropless,pad_mask,z_loss]"]))
    assert cfg.common.user_dir == str(PACKAGE)  # not cleared by fairseq's schema
    assert cfg.model.moe_dropless and cfg.model.use_moe_pad_mask
    assert cfg.criterion.moe_z_loss_wt == 0.001 and cfg.checkpoint.patience == 3
    assert cfg.checkpoint.best_checkpoint_metric == "accuracy"


@pytest.mark.parametrize(
    "router, given, expected",
    [
        (
            "topk",
            "moe_score=sigmoid moe_groups=2 moe_top_groups=1",
            dict(score="sigmoid", groups=2),
        ),
        ("topk", "moe_balance=both moe_bias_update_rate=0.01", dict(bias_update_rate=0.01)),
        ("topk", "moe_balance_over=sequence moe_null_experts=2", dict(null_experts=2)),
        ("threshold", "moe_threshold_decay=0.9", dict(threshold_decay=0.9)),
        ("base", "moe_base_evaluation=balanced", dict(top_k=1, balanced_evaluation=True)),
        ("sinkhorn", "moe_top_k=1", dict(top_k=1)),
        ("random", "moe_top_k=3", dict(top_k=3)),
        ("hash", "moe_route_scale=2.0", dict(route_scale=2.0)),
        ("relu", "moe_gating_fp32_product=true", dict(fp32_product=True)),
    ],
)
def test_overrides_reach_the_gate(router, given, expected):
    overrides = [f"model.{one}" for one in (f"moe_router={router}", *given.split())]
    policy = "" if router == "topk" else "model.moe_second_expert_policy=sampling"
    cfg = composed("moe_lm_tiny", ["task.data=x", *overrides, *filter(None, [policy])])
    model = MoETransformerLMConfig(**resolved(cfg).model)
    validate(model)
    assert {key: getattr(gate_settings(model), key) for key in expected} == expected


def start(folder: Path, *arguments: str) -> subprocess.Popen:
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen([COMMAND, *arguments], cwd=folder, env=ENVIRONMENT, **pipes)


def finish(process: subprocess.Popen) -> str:
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    return out


@pytest.mark.slow
def test_a_sweep_runs_each_job_by_itself_from_relative_paths(workplace, tmp_path):
    os.symlink(workplace / "data", tmp_path / "data")
    conf = os.path.relpath(CONF, tmp_path)
    sweep = ["--multirun", "optimization.lr=[1e-2],[1e-9]", "model.moe_expert_count=4"]
    steps = ["task.data=data", "optimization.max_update=2", "lr_scheduler.warmup_updates=1"]
    name = ["--config-dir", conf, "--config-name", "moe_lm_15b"]
    steps.append("optimization.update_freq=[1]")
    finish(start(tmp_path, *name, *sweep, *steps, *SHRUNKEN, *ON_CPU))
    [log_0, log_1] = sorted(tmp_path.glob("multirun/*/*/*/hydra_train.log"))
    scores = []
    for log in (log_0, log_1):
        # The second job's model is worse; were the first's best score kept, it would save none.
        assert (log.parent / "checkpoints" / "checkpoint_best.pt").is_file()
        text = log.read_text()
        assert "No existing checkpoint found" in text and "num_updates: 2" in text
        scores.append(float(re.search(r"checkpoint_best.pt .*score ([\d.]+)", text)[1]))
    assert scores[0] < scores[1]
    assert sorted(os.listdir(tmp_path)) == ["data", "multirun"]


@pytest.mark.slow
def test_the_same_command_goes_on_where_it_stopped(workplace, tmp_path):
    # As by one who has not installed the package: an absolute folder for the plugin.
    arguments = ["--config-dir", str(CONF), "--config-name", "dense_lm_tiny", *SHRUNKEN, *ON_CPU]
    arguments += [f"task.data={workplace / 'data'}", f"common.user_dir={PACKAGE}"]
    arguments += ["lr_scheduler.total_num_update=10"]
    finish(start(tmp_path, *arguments, "optimization.max_update=2"))
    checkpoints = tmp_path / "outputs" / "dense_lm_tiny" / "checkpoints"
    assert (checkpoints / "checkpoint_last.pt").is_file()
    log = finish(start(tmp_path, *arguments, "optimization.max_update=3"))
    assert "@ 2 updates" in log and "num_updates: 3 >= max_update: 3" in log


MISTAKES = {  # one for each place in which a mistake is noticed
    "--config-name=moe_lm_tini": "--config-name moe_lm_tini: not in ",
    "model.moe_expert_cuont=3": "model.moe_expert_cuont: no such setting; did you mean "
    "moe_expert_count?",
    "model.moe_second_expert_policy=smapling": "model.moe_second_expert_policy: Invalid value "
    "'smapling', expected one of [sampling, all, random]",
    "model.moe_expert_count=0": "--moe-expert-count 0 with --moe-freq 2: use 1 or more experts",
}


def test_a_mistake_ends_in_one_line(workplace, tmp_path):
    common = ["--config-dir", str(CONF), "--config-name", "moe_lm_tiny"]
    common += [f"task.data={workplace / 'data'}", *ON_CPU]
    waiting = list(MISTAKES.items())
    while waiting:  # two at a time
        pair, waiting = waiting[:2], waiting[2:]
        started = [start(tmp_path, *common, mistake) for mistake, _ in pair]
        for process, (mistake, expected) in zip(started, pair):
            _, err = process.communicate(timeout=200)
            lines = [line for line in err.splitlines() if " | INFO | " not in line]
            assert process.returncode == 1, mistake
            assert len(lines) == 1 and lines[0].startswith("error: "), (mistake, err)
            assert expected in lines[0]
    assert not list(tmp_path.rglob("*.pt"))


@pytest.mark.parametrize(
    "override, expected",
    [
        ("optimization.lr=fast", "optimization.lr: "),
        ("optimization.lr=3e-4", "write optimization.lr=[...]"),
        ("optimization.max_update=1.5", "optimization.max_update: Value '1.5' of type 'float'"),
        ("model=moe_lm_16b", "Could not find 'model/moe_lm_16b'; Available options in 'model': "),
        ("taks.data=data", "taks: no such setting; did you mean task?"),
        ("model.dropout", "Error parsing override 'model.dropout'; missing EQUAL"),
    ],
)
def test_what_hydra_refuses_is_told_in_one_line(override, expected):
    with pytest.raises(Exception) as refused:
        composed("moe_lm_tiny", [override])
    told = hydra.hydra_mistake_to_print(refused.value)
    assert expected in told and "\n" not in told and "full_key" not in told


@pytest.mark.parametrize(
    "line, words",
    [
        ("--config-name moe_lm_tiny", '; for ours add --config-dir "$(fairseq-moe config-dir)"'),
        ("--config-dir nowhere --config-name x", "--config-dir nowhere: no such folder"),
        (f"--config-dir {CONF}", f"--config-name is not given: {CONF} has base, "),
    ],
)
def test_which_config_is_meant(line, words, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["fairseq-hydra-train", *line.split()])
    name = line.split()[-1] if "--config-name" in line else "config"
    with pytest.raises(UserError) as refused:
        hydra._check_config_name(name)
    assert words in str(refused.value)
    assert finding._configs_name_it()


def test_a_folder_serves_where_the_overrides_choose_the_model(monkeypatch):
    monkeypatch.setattr(sys, "argv", f"x --config-dir {CONF} model=moe_lm_tiny".split())
    hydra._check_config_name("config")


def test_values_of_the_command_line_are_named(monkeypatch, capsys):
    words = "x optimization.lr=3e-4 hydra.run.dir=/proc/x".split()
    monkeypatch.setattr(sys, "argv", words)

    def fail():
        Path("/proc/x").mkdir()

    with pytest.raises(SystemExit):
        hydra._exit_on_mistake(fail)
    said = "error: hydra.run.dir=/proc/x: cannot be created (No such file or directory); name"
    assert capsys.readouterr().err.startswith(said)
    with pytest.raises(Exception) as refused:
        composed("moe_lm_tiny", words[1:2])
    told = hydra.hydra_mistake_to_print(refused.value)
    assert told.endswith("list or tuple: write optimization.lr=[3e-4]")


def test_settings_have_no_dashes(capsys):
    from hydra._internal import utils

    for word, example in (("--task", "task=..."), ("--max-update", "GROUP.max_update=...")):
        with pytest.raises(SystemExit):
            utils.get_args_parser().parse_args([f"{word}=x"])
        assert f"settings have no dashes here: write {example}" in capsys.readouterr().err


def test_a_number_out_of_range_is_named_where_it_was_set():
    groups = {"lr_scheduler": {"total_num_update": -4.0}, "optimizer": {"lr": [-1]}}
    for name, value in (("max_update", -4), ("lr", [-1])):
        cfg = {**groups, "optimization": {name: value}, "model": {"_name": MODEL_NAME}}
        with pytest.raises(UserError, match=rf"^optimization.{name} "):
            command_checks.check_run(cfg)


def test_the_data_must_be_given():
    with pytest.raises(UserError, match="task.data is not set: add task.data="):
        resolved(composed("moe_lm_tiny", []))


if __name__ == "__main__":
    write_options()
