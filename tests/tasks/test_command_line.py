"""The task through fairseq-train and fairseq-eval-lm as they are, with our model and criterion."""

import re

import pytest
from console import fairseq, records
from mixture_data import CORPORA, HELD_OUT, tokens_of
from training import error_in


def train(data, folder, *flags, **kwargs):
    return fairseq(
        "train", data, "--task", "mixture_language_modeling", "--tokens-per-sample", 32,
        "--arch", "moe_lm_tiny", "--moe-expert-count", 4, "--decoder-layers", 2, "--moe-freq", 2,
        "--decoder-embed-dim", 16, "--decoder-ffn-embed-dim", 32, "--decoder-attention-heads", 2,
        "--criterion", "moe_cross_entropy", "--moe-gate-loss-wt", 0.01, "--dropout", 0.1,
        "--corpus-weights", "big=2,mid=1,small=1", "--batch-size", 4, "--update-freq", 2,
        "--optimizer", "adam", "--lr", 0.003, "--seed", 1, "--num-workers", 1,
        "--best-checkpoint-metric", "in_domain_ppl", "--no-epoch-checkpoints",
        "--log-format", "json", "--log-interval", 1, "--save-dir", folder, *flags, **kwargs,
    )  # fmt: skip


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """Nearly two epochs without a stop."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, train(data, folder, "--max-update", 34)


def updates(*runs):
    return [
        (entry["num_updates"], entry["loss"], entry["inner_loss"])
        for run in runs
        for entry in records(run, "train_inner")
    ]


def test_training_resumes_in_the_middle_of_an_epoch_exactly(data, trained, tmp_path):
    _, whole = trained
    blocks = sum(-(-tokens_of(data, name) // 32) for name in CORPORA)
    per_epoch = -(-blocks // 8)
    assert per_epoch < 28 < 34 < 2 * per_epoch, "stops in the second epoch"
    first = train(data, tmp_path, "--max-update", 28)
    second = train(data, tmp_path, "--max-update", 34)
    assert "Loaded checkpoint" in second.stdout and "(epoch 2 @ 28 updates)" in second.stdout
    assert len(updates(whole)) == 34
    assert updates(first, second) == updates(whole)
    for key in ("valid_loss", "valid_in_domain_ppl", "valid_out_of_domain_ppl"):
        assert records(second, "valid")[-1][key] == records(whole, "valid")[-1][key]


def test_the_log_has_a_perplexity_per_corpus_and_means_and_keeps_the_best_checkpoint(trained):
    folder, done = trained
    for record in records(done, "valid"):
        figures = {key: float(record[f"valid_{key}_ppl"]) for key in (*CORPORA, *HELD_OUT)}
        for mean, names in (("in_domain", CORPORA), ("out_of_domain", HELD_OUT)):
            expected = sum(figures[name] for name in names) / len(names)
            assert float(record[f"valid_{mean}_ppl"]) == pytest.approx(expected, rel=1e-4)
    best = float(records(done, "valid")[-1]["valid_best_in_domain_ppl"])
    assert best == min(float(r["valid_in_domain_ppl"]) for r in records(done, "valid"))
    assert (folder / "checkpoint_best.pt").exists()


@pytest.mark.slow
def test_two_processes_log_the_perplexities_of_one(data, tmp_path):
    """Same batches, an uneven number of them for validation; dense, so none depends on others."""
    flags = ["--arch", "dense_lm_tiny", "--dropout", 0, "--attention-dropout", 0]
    flags += ["--moe-freq", 0, "--moe-expert-count", 0]
    flags += ["--max-update", 6, "--no-save", "--valid-subset", "valid,test/small"]
    one = train(data, tmp_path, *flags)
    two = train(data, tmp_path, *flags, "--update-freq", 1, processes=2)
    for tag, number in (("valid", 7), ("test/small", 2)):
        figures = [
            {key: float(value) for key, value in records(run, tag)[-1].items() if "_ppl" in key}
            for run in (one, two)
        ]
        assert len(figures[0]) >= number
        assert figures[0] == pytest.approx(figures[1], rel=1e-4)


def evaluate(data, folder, subset, task="mixture_language_modeling", check=True):
    done = fairseq(
        "eval_lm", data, "--task", task, "--path", folder / "checkpoint_last.pt",
        "--gen-subset", subset, "--tokens-per-sample", 32, "--batch-size", 4, check=check,
    )  # fmt: skip
    found = re.search(r"Loss \(base 2\): [\d.]+, Perplexity: ([\d.]+)", done.stdout + done.stderr)
    return done if found is None else float(found[1])


def test_eval_lm_takes_all_corpora_or_one(data, trained):
    folder, done = trained
    last = records(done, "valid")[-1]
    one = evaluate(data, folder, "valid/far")
    assert one == pytest.approx(float(last["valid_far_ppl"]), abs=0.02)
    assert one == evaluate(data / "far", folder, "valid", task="language_modeling")
    everything = evaluate(data, folder, "valid")
    assert everything == pytest.approx(2 ** float(last["valid_inner_loss"]), rel=1e-3)
    assert everything != one


def test_a_mistake_is_one_line_of_the_command(data, tmp_path):
    done = train(data, tmp_path, "--train-corpora", "none", check=False)
    assert done.returncode == 1
    assert "--train-corpora none: " in error_in(done.stderr + done.stdout)
    assert not list(tmp_path.glob("*.pt"))
