"""Fine-tuning through fairseq-train and fairseq-validate as they are."""

import re

import branch_files
import pytest
import torch
from choice_data import SIZES
from console import fairseq, records
from fairseq.data import Dictionary

SHAPE = (
    "--arch", "moe_lm_tiny", "--moe-expert-count", 4, "--decoder-layers", 2, "--moe-freq", 2,
    "--decoder-embed-dim", 16, "--decoder-ffn-embed-dim", 32, "--decoder-attention-heads", 2,
    "--share-decoder-input-output-embed",
)  # fmt: skip


def finetune(data, questions, folder, *flags, **kwargs):
    return fairseq(
        "train", data, "--task", "multiple_choice", "--choice-data", questions, *SHAPE,
        "--tokens-per-sample", 64, "--criterion", "multiple_choice", "--moe-gate-loss-wt", 0.01,
        "--batch-size", 8, "--optimizer", "adam", "--lr", 0.01, "--seed", 1, "--num-workers", 0,
        "--best-checkpoint-metric", "accuracy", "--maximize-best-checkpoint-metric",
        "--no-epoch-checkpoints", "--log-format", "json", "--log-interval", 1,
        "--save-dir", folder, *flags, **kwargs,
    )  # fmt: skip


def validate(data, path, *flags):
    done = fairseq(
        "validate", data, "--task", "multiple_choice", "--path", path, "--batch-size", 16,
        "--log-format", "json", "--num-workers", 0, *flags,
    )  # fmt: skip
    return done


@pytest.fixture(scope="module")
def pretrained(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretrained")
    fairseq(
        "train", data, "--task", "mixture_language_modeling", *SHAPE, "--tokens-per-sample", 64,
        "--criterion", "moe_cross_entropy", "--moe-gate-loss-wt", 0.01, "--batch-size", 8,
        "--optimizer", "adam", "--lr", 0.01, "--max-update", 10, "--num-workers", 0,
        "--best-checkpoint-metric", "in_domain_ppl", "--save-dir", folder,
    )  # fmt: skip
    return folder / "checkpoint_best.pt"


def test_it_learns_stops_early_and_validates_alike(data, classes, pretrained, tmp_path):
    flags = ["--finetune-from-model", pretrained, "--moe-dropless", "--max-epoch", 30]
    done = finetune(data, classes, tmp_path, *flags, "--patience", 2)
    assert "starting with a new head to score candidates" in done.stdout
    assert f"train: {SIZES['train']} questions; right answer: big " in done.stdout
    assert "early stop since valid performance hasn't improved for last 2 runs" in done.stdout
    found = [float(line["valid_accuracy"]) for line in records(done, "valid")]
    assert max(found) > 85 and len(found) < 30  # chance is a third
    best = records(done, "valid")[found.index(max(found))]
    assert float(best["valid_accuracy_low"]) < max(found) <= float(best["valid_accuracy_high"])
    assert "valid_moe_gate_loss" in best and "valid_entropy_gating" in best

    tested = validate(data, tmp_path / "checkpoint_best.pt", "--valid-subset", "valid,test")
    assert float(records(tested, "valid")[-1]["valid_accuracy"]) == max(found)
    assert "test_accuracy_low" in records(tested, "test")[-1]


@pytest.fixture(scope="module")
def of_branch(data, tmp_path_factory):
    """A checkpoint as two processes of fairseq's moe branch write it."""
    folder = tmp_path_factory.mktemp("branch")
    settings = dict(
        branch_files.RELEASED_15B,
        decoder_layers=2,
        decoder_embed_dim=16,
        decoder_ffn_embed_dim=32,
        decoder_attention_heads=2,
        moe_expert_count=4,
        memory_efficient_fp16=False,
        ddp_backend="legacy_ddp",
    )
    vocabulary = len(Dictionary.load(str(data / "dict.txt")))
    generator = torch.Generator().manual_seed(0)
    branch_files.write(
        folder,
        settings,
        vocabulary,
        2,
        lambda _, shape: torch.randn(shape, generator=generator) / 9,
    )
    return folder / "model.pt"


def test_a_checkpoint_in_the_branchs_layout(data, classes, of_branch, tmp_path):
    done = finetune(
        data, classes, tmp_path / "new", "--finetune-from-model", of_branch,
        "--max-update", 2, "--use-moe-pad-mask",
    )  # fmt: skip
    assert (
        "Loaded checkpoint" in done.stdout
        and "starting with a new head to score candidates" in (done.stdout)
    )
    assert re.search(r"valid: 40 questions; right answer: big [\d.]+ %, mid [\d.]+ %", done.stdout)
    saved = torch.load(tmp_path / "new" / "checkpoint_best.pt", weights_only=True)
    assert saved["model"]["choice_head.weight"].shape == (3, 16)
    assert saved["extra_state"]["tokens"] > 3 * 16  # not two updates of 8 questions


@pytest.mark.slow
@pytest.mark.parametrize(
    "scoring, start", [("head", "pretrained"), ("sum", "pretrained"), ("sum", "of_branch")]
)
def test_two_processes_train_as_one(data, choices, tmp_path, scoring, start, request):
    """The same batches, an uneven number of them; no figure of the gates in the loss, as those
    count each batch's padding."""
    flags = ["--finetune-from-model", request.getfixturevalue(start), "--moe-dropless"]
    flags += ["--dropout", 0, "--attention-dropout", 0, "--moe-gate-loss-wt", 0, "--max-epoch", 2]
    flags += ["--choice-scoring", scoring, "--moe-normalize-expert-grad", "world_size"]
    one = finetune(data, choices, tmp_path / "one", *flags, "--update-freq", 2)
    two = finetune(data, choices, tmp_path / "two", *flags, processes=2)
    for tag, key in (("train_inner", "loss"), ("valid", "valid_accuracy")):
        figures = [[float(line[key]) for line in records(run, tag)] for run in (one, two)]
        assert len(figures[0]) > 1 and figures[0] == pytest.approx(figures[1], abs=2e-3)
