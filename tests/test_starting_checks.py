"""Flags that cannot be, or would silently do something else, end a command before it starts."""

import functools
import json
import re
import sys
from argparse import Namespace
from dataclasses import MISSING
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fairseq import tasks as fairseq_tasks
from fairseq.criterions import CRITERION_REGISTRY
from fairseq.criterions.cross_entropy import CrossEntropyCriterion
from fairseq.distributed import utils as distributed_utils
from fairseq.tasks import TASK_REGISTRY
from omegaconf import OmegaConf
from small_models import build_model
from training import USER_DIR, error_in, settings, status_of

import fairseq_moe_ext
from fairseq_moe_ext import cli, command_checks, ranges, trainer_checks
from fairseq_moe_ext.config import MoETransformerLMConfig
from fairseq_moe_ext.criterions.moe_cross_entropy import MoECrossEntropyCriterion
from fairseq_moe_ext.errors import UserError
from fairseq_moe_ext.models.language_model import MoETransformerLanguageModel
from fairseq_moe_ext.patches import commands, tasks
from fairseq_moe_ext.trainer_checks import _warn_of_schedule
from fairseq_moe_ext.wording import flag

OURS = dict(arch="moe_lm_tiny", max_update=9, batch_size=4, max_tokens=None)


@pytest.mark.parametrize(
    "name, good, bad",
    [
        ("batch_size", (1, 8, None), (0, -3, 1.5, float("nan"), "x", True)),
        ("max_update", (0, 10**9), (-1, float("inf"))),
        ("clip_norm", (0, 0.1), (-1, float("nan"), float("inf"))),
        ("lr", ([0.1], [0, 0.1]), ([], [-1], [0.1, float("nan")])),
        ("update_freq", ([1], [2, 4]), ([0], [], [1.5])),
        ("adam_betas", ("(0.9, 0.98)", [0.9, 0.98], (0, 0)), ("(0.9, 1)", "0.9", "", [0.9])),
        ("patience", (-1, 1), (0, -2)),
        ("keep_last_epochs", (-1, 3), (0, -5)),
        ("sampling_topp", (-1, 1, 0.5), (0, -0.5, 7)),
        ("warmup_init_lr", (-1, 0), (-0.5,)),
        ("dropout", (0, 0.99), (1, -0.1, float("nan"))),
        ("tokens_per_sample", (1, 2048, "${x}"), (0, 10**13)),
        ("seed", (0, 2**32 - 1), (-1, 2**32)),
        ("moe_eval_capacity_token_fraction", (-1.0, 0.25, 1), (1.5, float("nan"), "x")),
    ],
)
def test_numbers_in_and_out_of_range(name, good, bad):
    for value in good:
        ranges.check({name: value})
    for value in bad:
        with pytest.raises(UserError, match=f"^{flag(name)} .*: use "):
            ranges.check({name: value})


def test_every_number_of_ours_has_a_range():
    """And the default is in it; the twin of a flag of stock's has stock's default."""
    from fairseq_moe_ext.criterions.multiple_choice import MultipleChoiceConfig
    from fairseq_moe_ext.tasks.mixture_language_modeling import MixtureLanguageModelingConfig
    from fairseq_moe_ext.tasks.multiple_choice import MultipleChoiceTaskConfig

    kinds = MoETransformerLMConfig, MultipleChoiceConfig, MixtureLanguageModelingConfig
    for kind in (*kinds, MultipleChoiceTaskConfig):
        for name, field in kind.__dataclass_fields__.items():
            if any(word in str(field.type) for word in ("int", "float")):
                assert name in ranges.RANGES, name
                ranges.check({name: field.default})


def test_stocks_defaults_are_in_range():
    from fairseq.dataclass.configs import FairseqConfig
    from fairseq.optim import OPTIMIZER_REGISTRY  # noqa: F401  (registers)
    from fairseq.registry import REGISTRIES

    groups = [field.type for field in FairseqConfig.__dataclass_fields__.values()]
    for name in ("optimizer", "lr_scheduler", "criterion"):
        groups += REGISTRIES[name]["dataclass_registry"].values()
    seen = set()
    for group in groups:
        for name, field in getattr(group, "__dataclass_fields__", {}).items():
            if field.default not in ("???", MISSING):
                ranges.check({name: field.default})
                seen.add(name)
    assert len(seen & ranges.RANGES.keys()) > 90


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(batch_size=None), "--batch-size and --max-tokens are both not given"),
        (dict(disable_validation=True, patience=3), "--patience 3 needs validation"),
        (
            dict(train_subset="train", valid_subset="valid,train"),
            "--valid-subset valid,train: training would skip data, as train is also --train-subset",
        ),
        (
            dict(combine_valid_subsets=True, valid_subset="valid,test"),
            "as one subset, valid, and --valid-subset is valid,test: remove one of them",
        ),
        (dict(use_plasma_view=True), "--use-plasma-view needs pyarrow below 12"),
        (
            dict(optimizer_overrides="{"),
            "--optimizer-overrides '{': use a Python dictionary of setting names and plain",
        ),
        (dict(optimizer_overrides="{'lr': [-1]}"), "--optimizer-overrides 'lr': [-1] is out of"),
        (
            dict(lr_scheduler="polynomial_decay", total_num_update=None),
            "--lr-scheduler polynomial_decay needs --total-num-update: add it, with the",
        ),
        (dict(lr_scheduler="inverse_sqrt", warmup_updates=0), "--warmup-updates 0"),
        (dict(criterion="ctc"), "--criterion ctc is not for these models: use moe_cross_entropy"),
        (
            dict(task="translation", batch_size=None),
            "--task is not given, or is translation (fairseq's default), which",
        ),
        (dict(task="masked_lm"), "--task masked_lm, which is not for these models: use --task"),
        (dict(lr=[-1e-3]), "--lr -0.001 is out of range: use one or more of them, each a number"),
        (dict(lr=[1e-3, -2.0]), "--lr 0.001,-2.0 is out of range"),
        (
            dict(lr_scheduler="cosine", warmup_updates=9, lr_period_updates=-1),
            "--warmup-updates 9 leaves --lr-scheduler cosine nothing of --max-update 9: lower it",
        ),
        (dict(stop_min_lr=1.0, lr=[0.1]), "--stop-min-lr 1.0 is not below --lr 0.1"),
        (
            dict(moe_eval_capacity_token_fraction=0.5, moe_router="relu"),
            "--moe-eval-capacity-token-fraction 0.5 has no effect with --moe-router relu:",
        ),
        (
            dict(moe_eval_capacity_token_fraction=0.5, moe_dropless=True),
            "--moe-eval-capacity-token-fraction 0.5 has no effect with --moe-dropless:",
        ),
        (
            dict(moe_batch_prioritized_routing=True, moe_dropless=True),
            "--moe-batch-prioritized-routing has no effect with --moe-dropless: no capacity",
        ),
        (dict(self_target=True), "--self-target: these models predict the next token"),
        (dict(write_checkpoints_asynchronously=True), "iopath"),
        (
            dict(optimizer="fused_adam", memory_efficient_fp16=True),
            "--memory-efficient-fp16 does not work with --optimizer fused_adam: use --fp16 "
            "--fp16-no-flatten-grads, or --optimizer adam",
        ),
        (dict(optimizer="sgd", memory_efficient_bf16=True), "use --bf16, or --optimizer adam"),
        (dict(amp=True, bf16=True), "--bf16 and --amp are different precisions: turn on only one"),
        (dict(amp=True, fp16=True), "--fp16 and --amp are different precisions"),
        (dict(ema_seed_model="no/x.pt"), "--ema-seed-model no/x.pt: cannot be read (No such file"),
        (dict(quantization_config_path="/"), "--quantization-config-path /: a folder, not a file"),
    ],
)
def test_flags_that_contradict_in_training(changes, words, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError) as error:
        command_checks.check_command_line(Namespace(**{**OURS, **changes}))
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "changes",
    [
        dict(train_subset="train", valid_subset="train/docs"),  # a dataset of its own
        dict(train_subset="valid", valid_subset="valid", disable_validation=True),
        dict(combine_valid_subsets=True, valid_subset="valid"),
        dict(lr_scheduler="cosine", warmup_updates=9, lr_period_updates=5),
        dict(lr_scheduler="cosine", warmup_updates=10, lr_period_updates=-1),  # with a warning
        dict(combine_valid_subsets=True, valid_subset="test", disable_validation=True),
    ],
)
def test_flags_that_go_together_in_training(changes):
    command_checks.check_command_line(Namespace(**{**OURS, **changes}))


def test_what_errors_suggest_of_stocks_exists():
    assert set(command_checks._CRITERIONS) <= set(CRITERION_REGISTRY)
    assert set(command_checks._TASKS) <= set(TASK_REGISTRY)


def test_stocks_adaptive_softmax_is_trained_with_its_criterion():
    ours = {**OURS, "arch": "transformer_lm", "task": "mixture_language_modeling"}
    given = {**ours, "criterion": "adaptive_loss"}
    command_checks.check_command_line(Namespace(**given, adaptive_softmax_cutoff="50,100"))
    with pytest.raises(UserError, match="--criterion adaptive_loss is not for these"):
        command_checks.check_command_line(Namespace(**given))


def test_the_end_of_a_schedule_may_be_its_own():
    """fairseq's parser gives --total-num-update as text (II default)."""
    given = {**OURS, "lr_scheduler": "polynomial_decay", "max_update": 0}
    command_checks.check_command_line(Namespace(**given, total_num_update="100"))


@pytest.mark.parametrize("arch, task", [("transformer", "mixture_language_modeling")])
def test_a_model_of_another_kind(arch, task):
    with pytest.raises(UserError, match="--arch transformer is not a language model"):
        command_checks.check_command_line(Namespace(**{**OURS, "arch": arch, "task": task}))


def test_what_fairseq_itself_says_is_one_line():
    from fairseq.optim.lr_scheduler.polynomial_decay_schedule import PolynomialDecayLRSchedule
    from fairseq.tasks.fairseq_task import FairseqTask

    from fairseq_moe_ext.patches.messages import mistake_to_print

    with pytest.raises(NotImplementedError) as raised:
        FairseqTask(None).source_dictionary  # noqa: B018
    line = raised.traceback[-1].lineno + 1
    told = mistake_to_print(raised.value)
    assert told == (
        f"raise NotImplementedError (fairseq/tasks/fairseq_task.py:{line}; LOGLEVEL=DEBUG shows "
        "more)"
    )
    with pytest.raises(NotImplementedError) as raised:
        try:
            raise UserError("why")
        except UserError:
            FairseqTask(None).source_dictionary  # noqa: B018
    assert mistake_to_print(raised.value) == "why"
    with pytest.raises(AttributeError) as raised:  # Python's own, within fairseq
        PolynomialDecayLRSchedule(None, None)
    assert mistake_to_print(raised.value) is None


def test_training_without_anything_of_ours_is_left_alone():
    given = dict(OURS, arch="transformer_lm", task="language_modeling", batch_size=0)
    command_checks.check_command_line(Namespace(**given))
    with pytest.raises(UserError):
        command_checks.check_command_line(
            Namespace(**dict(given, task="mixture_language_modeling"))
        )


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(context_window=32), "--context-window 32 leaves no token to score"),
        (dict(max_valid_steps=2), "--max-valid-steps 2 applies only to validation in training"),
        (dict(shard_id=2, num_shards=2), "--shard-id 2 is not one of --num-shards 2: use 0 to 1"),
        (dict(post_process="unknown"), "--remove-bpe unknown: unknown; use subword_nmt"),
        (dict(path=None), "--path is not given"),
        (
            dict(model_overrides="[]"),
            "--model-overrides '[]': use a Python dictionary of setting names and plain",
        ),
        (dict(model_overrides="{'dropout': 7}"), "--model-overrides 'dropout': 7 is out of range"),
        (dict(beam=2, nbest=3), "--nbest 3 is more than --beam 2"),
        (dict(beam=2, nbest=1, sampling=True), "--sampling draws --beam 2 hypotheses"),
        (dict(beam=2, nbest=1, sampling_topk=3), "--sampling-topk 3 needs --sampling"),
        (dict(beam=3, nbest=1, diverse_beam_groups=2), "2 does not divide --beam 3"),
        (dict(beam=3, nbest=1, min_len=9, max_len_b=4), "--min-len 9 is more than --max-len-b 4"),
        (dict(beam=3, nbest=1, constraints="ordered"), "--constraints: language models"),
        (dict(beam=2, arch="wav2vec2", save_dir="x", temperature=0.0), "--temperature 0.0"),
        (dict(beam=4, diverse_beam_strength=1.0), "--diverse-beam-strength 1.0 needs"),
        (dict(beam=4, nbest=4, sampling=True, diversity_rate=0.5), "different kinds"),
        (dict(beam=4, buffer_size=0, batch_size=2), "--batch-size 2 is more than --buffer-size 0"),
        (dict(beam=4, nbest=1, print_step=True), "--print-step: language models write token by"),
        (dict(beam=4, nbest=1, replace_unk="x"), "--replace-unk: language models have no source"),
    ],
)
def test_flags_that_contradict_in_evaluation(changes, words):
    given = dict(path="x.pt", context_window=0, tokens_per_sample=32, model_overrides="{}")
    command_checks.check_command_line(Namespace(**given))
    with pytest.raises(UserError) as error:
        command_checks.check_command_line(Namespace(**{**given, **changes}))
    assert words in str(error.value)


def test_validation_ignores_bfloat16():
    given = dict(path="x.pt", arch="moe_lm_tiny", batch_size=4, bf16=True)
    with pytest.raises(UserError, match="^--bf16: fairseq-validate computes in float32"):
        command_checks.check_command_line(Namespace(**given))


def test_hydra_spells_group_and_key():
    settings = {"model": {"_name": "moe_transformer_lm"}, "dataset": {"batch_size": 0}}
    with pytest.raises(UserError, match="^dataset.batch_size 0 is out of range"):
        command_checks.check_run(OmegaConf.create(settings))
    command_checks.check_run(OmegaConf.create({**settings, "model": {"_name": "transformer_lm"}}))


SMALL = f"--user-dir {Path(fairseq_moe_ext.__file__).parent} --cpu --num-workers 0"
SMALL += " --decoder-layers 2 --decoder-embed-dim 16 --decoder-ffn-embed-dim 32"
SMALL += " --decoder-attention-heads 2 --tokens-per-sample 32 --optimizer adam --lr 0.01"


def train(capsys, line):
    status = status_of(f"fairseq-train {SMALL} {line}")
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    return status, errors


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    sys.path.append(str(Path(__file__).parent / "tasks"))
    from mixture_data import make_data

    return make_data(tmp_path_factory.mktemp("prepared") / "data", tmp_path_factory.mktemp("text"))


MIXTURE = "--task mixture_language_modeling --arch moe_lm_tiny --criterion moe_cross_entropy"
MIXTURE += " --moe-expert-count 2 --batch-size 4 --max-update 1"


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--batch-size 0", "--batch-size 0 is out of range: use a whole number from 1"),
        ("--lr -1", "--lr -1.0 is out of range: use one or more of them, each a number from 0"),
        ("--update-freq 1.5", "argument --update-freq: '1.5' is not a whole number"),
        ("--batch-size-valid 1.5", "--batch-size-valid 1.5 is out of range"),
        ("--best-checkpoint-metric los", "los: validation on valid does not report it; it reports"),
        ("--best-checkpoint-metric big_pppl", "in_domain_ppl, out_of_domain_ppl"),
        ("--best-checkpoint-metric nll_loss", "loss, inner_loss, ppl, moe_gate_loss"),
        (
            "--valid-subset valid/far --best-checkpoint-metric in_domain_ppl",
            "in_domain_ppl: validation on valid/far does not report it",
        ),
        ("--max-tokens-valid 8", "--max-tokens-valid) 8 is less than the longest sample, of 32"),
        ("--valid-subset vaild", "subset vaild: no such data-bin"),
        ("--zero-sharding os", "--zero-sharding os needs several processes"),
        ("--lr-scheduler polynomial_decay", "polynomial_decay needs --total-num-update: add it"),
        (
            "--stop-min-lr 1e-9 --lr-scheduler inverse_sqrt --warmup-updates 10",
            "--stop-min-lr 1e-09: the learning rate begins at 0, so nothing would be trained",
        ),
        (
            "--lr-scheduler polynomial_decay --total-num-update 9 --warmup-updates 1 "
            "--stop-min-lr 0",
            "--stop-min-lr 0: the learning rate begins at 0",
        ),
        (
            "--stop-min-lr 1e-3 --lr-scheduler tri_stage --warmup-steps 1 --decay-steps 1",
            "--stop-min-lr 0.001: the learning rate begins at 0.0001",
        ),
        (
            "--moe-router relu --criterion cross_entropy",
            "--criterion cross_entropy leaves out the loss that --moe-router relu adds",
        ),
    ],
)
def test_before_training(capsys, data, tmp_path, flags, words):
    status, errors = train(capsys, f"{data} {MIXTURE} --save-dir {tmp_path / 'run'} {flags}")
    assert status in (1, 2) and len(errors) == 1 and words in errors[0]
    assert not list(tmp_path.glob("run/*.pt"))


@pytest.mark.parametrize(
    "model, warns",
    [
        ("--arch moe_lm_tiny", True),
        ("--arch moe_lm_tiny --moe-balance both --moe-second-expert-policy all", True),
        ("--arch moe_lm_tiny --moe-balance bias --moe-second-expert-policy all", False),
        ("--arch moe_lm_tiny --moe-router hash", False),
        ("--arch dense_lm_tiny", False),
    ],
)
def test_a_criterion_without_the_balancing_loss(caplog, data, model, warns):
    line = f"{data} --task mixture_language_modeling {model} --batch-size 4 --cpu"
    line += " --criterion cross_entropy --disable-validation"
    line += f" --user-dir {Path(fairseq_moe_ext.__file__).parent}"
    if "moe_lm" in model:
        line += " --moe-expert-count 4"
    cfg = settings(line, 0, 1)
    has_experts = SimpleNamespace(has_experts="moe_lm" in model)
    trainer_checks.check_trainer(cfg, has_experts)
    assert ("leaves out the balancing loss" in caplog.text) == warns


def test_a_criterion_of_one_s_own(caplog, data, monkeypatch):
    """One that is derived from stock's trains the experts without their losses as stock's does."""
    line = f"{data} --task mixture_language_modeling --arch moe_lm_tiny --moe-expert-count 4 --cpu"
    line += " --batch-size 4 --criterion moe_cross_entropy --disable-validation"
    cfg = settings(f"{line} --user-dir {Path(fairseq_moe_ext.__file__).parent}", 0, 1)
    warned = []
    for base in (MoECrossEntropyCriterion, CrossEntropyCriterion):
        own = type("Own", (base,), {})
        monkeypatch.setitem(trainer_checks.CRITERION_REGISTRY, "moe_cross_entropy", own)
        caplog.clear()
        trainer_checks.check_trainer(cfg, SimpleNamespace(has_experts=True))
        warned.append("unless it adds the experts' losses itself" in caplog.text)
    assert warned == [False, True]


@pytest.mark.parametrize(
    "experts, flags, drops",
    [
        (4, {}, True),
        (8, {}, True),  # no room above the mean
        (9, {}, False),
        (16, {"moe_top_k": 4}, True),
        (1, {"moe_top_k": 1}, True),
        (4, {"moe_eval_capacity_token_fraction": 1.0}, False),
        (4, {"moe_eval_capacity_token_fraction": -1.0}, False),
        (4, {"moe_dropless": True}, False),
        (4, {"moe_router": "relu"}, False),
    ],
)
def test_validation_that_drops_choices_is_warned_of(caplog, experts, flags, drops):
    """Where experts have no room for more than the mean load."""
    model = build_model(**{"moe_freq": 2, "moe_expert_count": experts, **flags})
    cfg = SimpleNamespace(
        common=SimpleNamespace(amp=False),
        dataset=SimpleNamespace(disable_validation=False),
        criterion=SimpleNamespace(_name="moe_cross_entropy"),
        model=SimpleNamespace(moe_router=flags.get("moe_router", "topk")),
    )
    trainer_checks.check_trainer(cfg, model)
    found = [line for line in caplog.messages if "moe-eval-capacity-token-fraction" in line]
    assert len(found) == drops
    if drops:
        load = "the mean load of 1 expert is 100 %"
        assert "25 %" in found[0] and (load in found[0]) == (experts == 1)
        assert found[0].endswith("add --moe-dropless, or set it to 1.0")

    def step(model):
        task = SimpleNamespace()
        tasks.valid_step(lambda *args: (torch.zeros(1), 1, {}), task, {"id": 1}, model, None)
        return [line for line in caplog.messages if "moe-eval-capacity-token-fraction" in line]

    assert step(model) == found, "it was said"
    fresh = build_model(**{"moe_freq": 2, "moe_expert_count": experts, **flags})
    again = [step(fresh)[len(found) :] for _ in range(2)]
    assert again[0] == again[1] and len(again[0]) == drops
    if drops:
        assert again[0][0].endswith("{'moe_eval_capacity_token_fraction': 1.0}\"")


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--train-corpora smal", "'smal' with a train split; those with one: big, mid, small; did"),
        ("--corpus-weights big=1,mid=1,smal=1", "'smal' is not among the training corpora"),
        ("--corpus-weights big=1,mid=1", "no weight for 'small'"),
        ("--best-checkpoint-metric in_domain_pl", "did you mean in_domain_ppl?"),
        ("--valid-subset valid/bgi", "no corpus 'bgi'; it has big, far, further, mid, small; did"),
        ("--restore-file nothere.pt", "--restore-file nothere.pt: no such file"),
        ("--continue-once nothere.pt", "--continue-once nothere.pt: no such file"),
        ("--finetune-from-model nothere.pt", "--finetune-from-model nothere.pt: no such file"),
        ("--finetune-from-model a.pt --restore-file b.pt", "both name what to start from: remove"),
        ("--finetune-from-model a.pt --reset-meters", "itself: remove --reset-meters"),
        ("--zero-sharding os", "--zero-sharding os needs several processes"),
        ("--task language_modeling", "holds the corpora big, far, further, mid, small: name one,"),
    ],
)
def test_before_the_model_is_built(capsys, data, tmp_path, monkeypatch, flags, words):
    def build_model(cfg, task):
        raise AssertionError("built")

    monkeypatch.setattr(MoETransformerLanguageModel, "build_model", build_model)
    status, errors = train(capsys, f"{data} {MIXTURE} --save-dir {tmp_path / 'run'} {flags}")
    assert status == 1 and len(errors) == 1 and words in errors[0]


@pytest.mark.parametrize("name", ["eval-lm", "generate"])
def test_the_data_of_several_corpora_are_no_data_bin(capsys, data, name):
    """Before the checkpoint is read, which is none."""
    line = f"{data} --path {data}/dict.txt --user-dir {USER_DIR} --batch-size 4"
    assert status_of(f"fairseq-{name} {line} --task language_modeling") == 1
    error = error_in(capsys.readouterr().err)
    assert f"name one, {data}/big, or use --task mixture_language_modeling" in error


@pytest.mark.parametrize(
    "warmup, decay, last, words",
    [
        (
            10,
            5.0,
            20,
            "10 is not less than --total-num-update 5: after the warm-up the learning rat",
        ),
        (10, None, 5, "--warmup-updates 10 is more than --max-update 5: the learning rate never"),
        (10, 20.0, 5, "--warmup-updates 10 is more than --max-update 5: the learning rate never"),
        (5, 10.0, 10, ""),
        (5, None, 5, ""),
        (5, None, 0, ""),
        (0, 10.0, 10, ""),
    ],
)
def test_a_warm_up_that_does_not_end_is_warned_of(caplog, warmup, decay, last, words):
    schedule = {"warmup_updates": warmup, "total_num_update": decay, "end_learning_rate": 0.0}
    optimization = SimpleNamespace(max_update=last)
    _warn_of_schedule(SimpleNamespace(lr_scheduler=schedule, optimization=optimization))
    assert words in caplog.text and len(caplog.records) == (words != "")


def test_a_warm_up_above_the_lowest_rate_is_trained(capsys, data, tmp_path):
    """The flags of fairseq's own recipes."""
    flags = "--stop-min-lr 1e-9 --lr-scheduler inverse_sqrt --warmup-updates 10"
    line = f"{data} {MIXTURE} --save-dir {tmp_path} {flags} --warmup-init-lr 1e-7"
    assert train(capsys, line) == (0, [])
    assert (tmp_path / "checkpoint_last.pt").exists()


@pytest.mark.parametrize("metric", ["big_ppl", "out_of_domain_ppl", "ppl", "entropy_gating"])
def test_metrics_that_validation_gives(capsys, data, tmp_path, metric):
    line = f"{data} {MIXTURE} --save-dir {tmp_path} --best-checkpoint-metric {metric}"
    assert train(capsys, line) == (0, [])
    assert (tmp_path / "checkpoint_best.pt").exists()


@pytest.mark.parametrize("validates", [True, False])
def test_a_rate_that_waits_for_validation_is_warned_of_without_any(caplog, validates):
    schedule = {"_name": "reduce_lr_on_plateau"}
    cfg = SimpleNamespace(
        lr_scheduler=schedule,
        optimization=SimpleNamespace(max_update=9),
        dataset=SimpleNamespace(disable_validation=not validates),
    )
    _warn_of_schedule(cfg)
    assert ("which --disable-validation turns off" in caplog.text) == (not validates)


@pytest.mark.parametrize(
    "flags",
    [
        "--moe-log-per-layer",
        "--moe-log-per-layer --moe-router relu --moe-balance none",
        "--moe-log-per-layer --moe-null-experts 1",
    ],
)
def test_every_metric_of_experts_may_choose_the_best_checkpoint(capsys, data, tmp_path, flags):
    """As metrics.jsonl has it after a validation; other numbers of layers may not."""
    line = f"{data} {MIXTURE} {flags} --save-dir {tmp_path}"
    assert train(capsys, line) == (0, [])
    records = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    valid = next(record for record in records if record["tag"] == "valid")
    names = [key.removeprefix("valid_") for key in valid]
    names = [key for key in names if re.match("layer|moe_|null|load|over|entropy", key)]
    assert len(names) > 15 and any(name.startswith("layer1_") for name in names)
    cfg = settings(f"{line} {SMALL}", 0, 1)
    for metric in names:
        cfg.checkpoint.best_checkpoint_metric = metric
        fairseq_tasks.setup_task(cfg.task)
    for metric in ("layer0_load_max", "layer2_load_max"):  # no layers of experts
        cfg.checkpoint.best_checkpoint_metric = metric
        with pytest.raises(UserError, match=f"{metric}: validation on valid does not report it"):
            fairseq_tasks.setup_task(cfg.task)


def test_an_unknown_router_is_named_before_what_it_logs_is_asked_for(data):
    cfg = settings(f"{data} {MIXTURE} {SMALL} --moe-router best", 0, 1)
    with pytest.raises(UserError, match="^--moe-router best is unknown: use "):
        fairseq_tasks.setup_task(cfg.task)


@pytest.mark.parametrize(
    "flags, words",
    [
        ("loss --maximize-best-checkpoint-metric", "loss: the best is the smallest: remove"),
        ("big_ppl --maximize-best-checkpoint-metric", "big_ppl: the best is the smallest: remove"),
        ("ppl", ""),
        ("load_max --maximize-best-checkpoint-metric", ""),
        (
            "accuracy --criterion label_smoothed_cross_entropy --report-accuracy",
            "accuracy: the best is the largest: add --maximize-best-checkpoint-metric",
        ),
    ],
)
def test_the_best_checkpoint_is_not_the_worst(data, flags, words):
    cfg = settings(f"{data} {MIXTURE} {SMALL} --best-checkpoint-metric {flags}", 0, 1)
    if not words:
        fairseq_tasks.setup_task(cfg.task)
        return
    with pytest.raises(UserError, match=f"^--best-checkpoint-metric {words}"):
        fairseq_tasks.setup_task(cfg.task)


@pytest.mark.parametrize("task", ["language_modeling", "mixture_language_modeling"])
def test_without_validation_no_valid_split_is_needed(capsys, data, tmp_path, task):
    place = data / "big" if task == "language_modeling" else data
    line = f"{place} {MIXTURE} --task {task} --save-dir {tmp_path} --valid-subset none"
    assert train(capsys, f"{line} --disable-validation --best-checkpoint-metric x") == (0, [])
    assert (tmp_path / "checkpoint_last.pt").exists()


@pytest.mark.parametrize("wrapped", [False, True])
def test_hydras_settings_are_checked_however_its_main_is_wrapped(wrapped, monkeypatch, capsys):
    def pre_main(cfg):
        raise AssertionError("called")

    command = SimpleNamespace(pre_main=pre_main)
    monkeypatch.setitem(sys.modules, "fairseq_cli.hydra_train", command)
    main = functools.partial(lambda main, cfg: main(cfg), pre_main) if wrapped else pre_main
    settings = {"model": {"_name": "moe_transformer_lm"}, "optimization": {"lr": [-1]}}
    settings["common"] = {"user_dir": None}
    with pytest.raises(SystemExit):
        distributed_utils.call_main(OmegaConf.create(settings), main)
    assert capsys.readouterr().err.startswith("error: optimization.lr [-1] is out of range")


@pytest.mark.parametrize("hydra", [False, True])
def test_a_training_without_an_optimizer(hydra):
    cfg = OmegaConf.create({"optimizer": None})
    spelled = "add optimizer=adam" if hydra else "--optimizer is not given: use adam, fused_adam,"
    with pytest.raises(UserError, match=spelled):
        commands.check_optimizer(cfg, hydra)
    commands.check_optimizer({"optimizer": {"_name": "adam"}}, hydra)


def test_the_command_asks_for_the_optimizer(capsys, data):
    folder = Path(fairseq_moe_ext.__file__).parent
    line = f"fairseq-train {data} {MIXTURE} --user-dir {folder} --cpu --tokens-per-sample 32"
    assert status_of(line) == 1
    assert re.search("^error: .*optimizer is not .*fused_adam", capsys.readouterr().err, re.M)


def test_a_user_dir_that_is_no_package(tmp_path):
    from fairseq import utils

    (tmp_path / "file").write_text("x")
    for folder in (tmp_path / "file", "/"):
        with pytest.raises(
            UserError, match=f"^--user-dir {folder}: not the folder of a Python package"
        ):
            utils.import_user_module(Namespace(user_dir=str(folder)))


def test_a_user_dir_that_is_not_there(tmp_path):
    from fairseq import utils

    with pytest.raises(UserError, match=f"^--user-dir {tmp_path}/nodir: no such folder; `fairseq-"):
        utils.import_user_module(Namespace(user_dir=f"{tmp_path}/nodir"))
    (tmp_path / "module").mkdir()
    (tmp_path / "module" / "__init__.py").write_text("open('/no/such/file')")
    with pytest.raises(FileNotFoundError):  # the module's own
        utils.import_user_module(Namespace(user_dir=f"{tmp_path}/module"))


@pytest.mark.parametrize(
    "text, wrong, remedy",
    [
        ("import no_such_package", "No module named 'no_such_package'", "install that package"),
        ("from os import no_such_name", "cannot import name 'no_such_name'", "correct the package"),
        ("x = = 1", "invalid syntax (__init__.py, line 1)", "correct the package"),
    ],
)
def test_a_user_dir_that_cannot_be_imported(tmp_path, text, wrong, remedy, capsys):
    folder = tmp_path / "plugin_that_fails"
    folder.mkdir()
    (folder / "__init__.py").write_text(text)
    line = re.escape(f"--user-dir {folder} cannot be imported: {wrong}") + f".*; {remedy}"
    assert cli.main(["verify", "model.pt", "--user-dir", str(folder)]) == 1
    assert re.fullmatch(f"error: {line}.*\n", capsys.readouterr().err)


def test_a_setting_is_named_where_it_was_set():
    """task.batch_size of Hydra is a reference to dataset.batch_size."""
    cfg = {
        "task": {"batch_size": 0},
        "model": {"_name": "moe_lm_tiny"},
        "dataset": {"batch_size": 0},
    }
    with pytest.raises(UserError, match="^dataset.batch_size 0 is out of range"):
        command_checks.check_run(cfg)


@pytest.mark.parametrize(
    "common, words",
    [
        (
            dict(fp16=True, bf16=True),
            "^common.fp16 and common.bf16 are different precisions: turn on only one$",
        ),
        (
            dict(memory_efficient_fp16=True, bf16=True),
            "^common.memory_efficient_fp16 is on, but common.fp16 is off: turn both on, or both",
        ),
        (dict(memory_efficient_fp16=True, amp=True), "^common.memory_efficient_fp16 is on, but"),
        (dict(memory_efficient_bf16=True), "^common.memory_efficient_bf16 is on, but common.bf16"),
        (dict(memory_efficient_fp16=True, fp16=True), ""),
        (dict(memory_efficient_bf16=True, bf16=True), ""),
        (dict(amp=True), ""),
    ],
)
def test_hydra_trains_in_one_precision(common, words):
    """fairseq-hydra-train does not go through the checks of fairseq's command line."""
    off = ("fp16", "bf16", "amp", "memory_efficient_fp16", "memory_efficient_bf16")
    cfg = {
        "common": {**dict.fromkeys(off, False), **common},
        "dataset": {"batch_size": 4, "max_tokens": None},
        "model": {"_name": "moe_lm_tiny", "tokens_per_sample": 8},
        "optimizer": {"_name": "adam"},
    }
    if not words:
        command_checks.check_run(cfg)
        return
    with pytest.raises(UserError, match=words):
        command_checks.check_run(cfg)


def test_a_conflict_names_the_setting_and_not_what_refers_to_it():
    """distributed_training.memory_efficient_fp16 of Hydra is a reference to common's."""
    half = {"fp16": True, "memory_efficient_fp16": True}
    cfg = {
        "common": {**half, "bf16": False},
        "distributed_training": {**half, "memory_efficient_fp16": False},
        "dataset": {"batch_size": 4, "max_tokens": None},
        "model": {"_name": "moe_lm_tiny", "tokens_per_sample": 8},
        "optimizer": {"_name": "fused_adam"},
    }
    for copy in (True, False):
        cfg["distributed_training"]["memory_efficient_fp16"] = copy
        with pytest.raises(UserError, match="^common.memory_efficient_fp16 does not work"):
            command_checks.check_run(cfg)
