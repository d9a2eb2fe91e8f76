"""What uses nothing of the plugin stays as stock fairseq has it, though the plugin is loaded."""

from argparse import Namespace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fairseq import checkpoint_utils
from fairseq.data import Dictionary
from fairseq.tasks import FairseqTask
from fairseq.tasks.language_modeling import LanguageModelingTask
from fairseq.tasks.translation import TranslationTask
from omegaconf import OmegaConf
from processes import run_processes

from fairseq_moe_ext import command_checks, ours, trainer_checks
from fairseq_moe_ext.criterions.moe_cross_entropy import MoECrossEntropyCriterion
from fairseq_moe_ext.errors import NotFinite, UserError
from fairseq_moe_ext.patches import PATCHES, checkpoint_io, commands
from fairseq_moe_ext.tasks.mixture_language_modeling import MixtureLanguageModelingTask
from fairseq_today.registry import ALWAYS

STOCK = {"model": "transformer", "task": "translation", "criterion": "cross_entropy"}
OURS = {"model": "moe_lm_tiny", "task": "multiple_choice", "criterion": "moe_cross_entropy"}


def settings(**changed):
    return {group: {"_name": name} for group, name in {**STOCK, **changed}.items()}


def test_which_runs_are_ours():
    assert not ours.is_run(settings())
    assert not ours.is_run({**settings(), "model": Namespace(arch="lstm_lm")})
    for group, name in OURS.items():
        assert ours.is_run(settings(**{group: name}))


def test_what_is_derived_from_ours_is_ours():
    assert ours.is_ours(type("Mine", (MixtureLanguageModelingTask,), {}))
    assert not ours.is_ours(TranslationTask)


def log_more(*args):
    """reduce_metrics of a class of somebody else's."""


def check_metric(task, criterion="cross_entropy"):
    cfg = settings(model="moe_lm_tiny", criterion=criterion)
    cfg["criterion"].update(sentence_avg=False, moe_z_loss_wt=0.0)
    best = {"best_checkpoint_metric": "bleu", "maximize_best_checkpoint_metric": True}
    cfg["checkpoint"] = best
    cfg["dataset"] = {"valid_subset": "valid"}
    trainer_checks._check_metric(OmegaConf.create(cfg), task.__new__(task))


def test_a_task_may_log_metrics_of_its_own():
    check_metric(TranslationTask)  # --eval-bleu
    check_metric(type("Mine", (MixtureLanguageModelingTask,), {"reduce_metrics": log_more}))
    check_metric(type("Old", (LanguageModelingTask,), {"aggregate_logging_outputs": log_more}))
    with pytest.raises(UserError, match="bleu: validation on valid does not report it"):
        check_metric(LanguageModelingTask)


def test_a_criterion_derived_from_ours_may_log_metrics_of_its_own(monkeypatch):
    registry = trainer_checks.CRITERION_REGISTRY
    mine = type("Mine", (MoECrossEntropyCriterion,), {"reduce_metrics": staticmethod(log_more)})
    with pytest.raises(UserError, match="bleu: validation on valid does not report it"):
        check_metric(LanguageModelingTask, "moe_cross_entropy")
    monkeypatch.setitem(registry, "moe_cross_entropy", mine)
    check_metric(LanguageModelingTask, "moe_cross_entropy")


class Infinite(torch.nn.Module):
    """A criterion whose loss overflows."""

    def forward(self, model, sample):
        return torch.tensor(float("inf")), 1, {}


def test_only_our_models_end_by_an_infinite_validation_loss():
    task, model = FairseqTask(None), torch.nn.Linear(2, 2)
    loss, _, _ = task.valid_step({"id": torch.zeros(1)}, model, Infinite())
    assert float(loss) == float("inf") and not hasattr(task, "last_sample")
    model.has_experts = False  # as a dense model of ours
    with pytest.raises(NotFinite):
        task.valid_step({"id": torch.zeros(1)}, model, Infinite())


def test_only_our_models_are_not_saved_with_infinity(tmp_path):
    """A buffer may be a mask."""
    state = {"model": {"mask": torch.tensor([0.0, float("-inf")])}, "cfg": settings()}
    checkpoint_utils.torch_persistent_save(state, str(tmp_path / "stock.pt"))
    assert (tmp_path / "stock.pt").stat().st_size > 0
    with pytest.raises(UserError, match="mask holds NaN or infinity"):
        state["cfg"] = settings(model="moe_lm_tiny")
        checkpoint_utils.torch_persistent_save(state, str(tmp_path / "ours.pt"))


def trainer(folder, **changed):
    cfg = OmegaConf.create(settings(**changed))
    cfg.checkpoint = {"restore_file": f"{folder}/none.pt", "finetune_from_model": None}
    cfg.checkpoint.update(save_dir=str(folder), no_save=True, reset_optimizer=False)
    return SimpleNamespace(cfg=cfg, checkpoint_suffix="-rank-0")


def test_only_our_runs_need_the_checkpoint_that_they_name(tmp_path, monkeypatch):
    """Stock trains from scratch."""
    monkeypatch.setattr(checkpoint_io, "ended", lambda *args: ("--max-update 1", ""))
    for changed in ({}, {"model": "moe_lm_tiny"}):
        made = trainer(tmp_path, **changed)
        load = lambda cfg, trainer: ({}, None)  # noqa: E731
        if not changed:
            assert checkpoint_io.load_checkpoint(load, made.cfg.checkpoint, made) == ({}, None)
            continue
        with pytest.raises(UserError, match="none.pt: no such file"):
            checkpoint_io.load_checkpoint(load, made.cfg.checkpoint, made)


def test_fused_adam_trains_any_model():
    given = dict(arch="transformer", task="translation", criterion="label_smoothed_cross_entropy")
    given.update(optimizer="fused_adam", max_update=9, batch_size=4, max_tokens=None)
    command_checks.check_command_line(Namespace(**given))
    with pytest.raises(UserError, match="--batch-size 0"):  # it is checked as our runs are
        command_checks.check_command_line(Namespace(**{**given, "batch_size": 0}))
    with pytest.raises(UserError, match="--task"):
        command_checks.check_command_line(Namespace(**{**given, "arch": "moe_lm_tiny"}))


class OtherTask(FairseqTask):
    """Of a model that is no language model."""

    source_dictionary = Dictionary()


class Sentences:
    """Of 3 and 9 tokens."""

    supports_prefetch = False
    sizes = np.array([3, 9])

    def size(self, index):
        return self.sizes[index]

    def filter_indices_by_size(self, indices, max_sizes):
        return indices[self.sizes[indices] <= max_sizes], indices[self.sizes[indices] > max_sizes]


def test_other_tasks_read_their_lines_and_samples_as_stock_does(monkeypatch):
    from fairseq_moe_ext.patches import tasks

    monkeypatch.setattr(tasks, "find_tokenizer", lambda folder: {"_name": "gpt2"})
    task = OtherTask(Namespace())
    task.args = Namespace(data="data")
    assert task.build_bpe(Namespace(_name=None)) is None  # not the one beside the data
    task.get_interactive_tokens_and_lengths(["unknown words"], lambda line: line)
    everything = np.arange(2)
    assert task.filter_indices_by_size(everything, Sentences(), 9, True).tolist() == [0, 1]
    with pytest.raises(Exception, match="^Size of sample #1 is invalid") as raised:
        task.filter_indices_by_size(everything, Sentences(), 3)
    assert not isinstance(raised.value, UserError)  # it would name --tokens-per-sample


def test_translations_may_use_their_source():
    given = dict(path="x.pt", beam=4, nbest=1, replace_unk="x", model_overrides="{}")
    command_checks.check_command_line(Namespace(**given, task="translation"))
    for task in ("language_modeling", "mixture_language_modeling"):
        with pytest.raises(UserError, match="--replace-unk: language models have no source"):
            command_checks.check_command_line(Namespace(**given, task=task))


def gathered(rank):
    """More than fairseq's buffer holds, through what fairseq-validate gathers with."""
    stock = SimpleNamespace(__name__="utils", __doc__=None)  # its own function would raise
    data = [{"rank": rank, "text": "x" * 20000}]
    return commands.gathering_any_size(stock).all_gather_list(data, max_size=16384)


def test_validation_gathers_logs_of_any_size():
    for logs in run_processes(2, gathered):
        assert [log[0]["rank"] for log in logs] == [0, 1]
    assert any("fairseq_cli.validate:distributed_utils" in patch.targets for patch in PATCHES)


def test_a_checkpoint_is_copied_under_another_name_first(tmp_path):
    """With iopath, too, which knows addresses that no file system has."""
    copied = []
    manager = SimpleNamespace(
        path_requires_pathmanager=lambda path: "://" in path,
        copy=lambda *args, **kwargs: copied.append(args) or True,
    )
    manager = type("Manager", (), {k: staticmethod(v) for k, v in vars(manager).items()})
    copy = checkpoint_io.copying_whole(manager).copy
    (tmp_path / "a").write_text("x")
    assert copy("a", "s3://b", overwrite=True) and copied == [("a", "s3://b")]
    assert copy(str(tmp_path / "a"), str(tmp_path / "b")) and len(copied) == 1
    assert (tmp_path / "b").read_text() == "x"
    row = next(p for p in PATCHES if p.function is checkpoint_io.copying_whole)
    assert row.condition is ALWAYS


def test_weights_that_are_nan_are_not_saved_later_either():
    """With --write-checkpoints-asynchronously."""
    state = {"model": {"w": torch.tensor(float("nan"))}, "cfg": settings(model="moe_lm_tiny")}
    with pytest.raises(UserError, match="w holds NaN or infinity"):
        checkpoint_utils.torch_persistent_save(state, "x.pt", async_write=True)


def test_a_failed_update_of_ours_writes_no_checkpoint(monkeypatch):
    """A run from it would begin with the data of an epoch 0."""
    from fairseq_moe_ext.patches import trainer as patch

    monkeypatch.setattr(patch.saving, "takes_part", lambda trainer: True)
    written = []

    def stock(self, filename, extra_state):
        written.append(filename)

    for changed in ({}, {"model": "moe_lm_tiny"}):
        made = SimpleNamespace(cfg=settings(**changed))
        for name in ("crash.pt", "checkpoint_last.pt"):
            patch.save_checkpoint(stock, made, f"runs/{len(changed)}/{name}", {})
    every = [f"runs/{n}/{name}" for n in (0, 1) for name in ("crash.pt", "checkpoint_last.pt")]
    assert written == [path for path in every if path != "runs/1/crash.pt"]
