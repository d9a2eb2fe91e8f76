"""Every console script of stock fairseq, with a stock model."""

import re

import pytest
from stock_commands import PLUGIN, one_error, run, succeeded


def test_eval_lm(work, trained):
    line = "--task language_modeling --path ck/checkpoint_best.pt --tokens-per-sample 32"
    output = succeeded(run(f"fairseq-eval-lm bin {line} --gen-subset test --max-tokens 256", work))
    perplexity = float(re.search(r"Perplexity: ([\d.]+)", output).group(1))
    assert 1 < perplexity < 64  # at worst about that of guessing among 32 tokens


def test_validate(work, trained):
    line = "--task language_modeling --path ck/checkpoint_best.pt --valid-subset test"
    assert "ppl" in succeeded(run(f"fairseq-validate bin {line} --max-tokens 256", work))


def test_generate(work, trained):
    line = "--task language_modeling --path ck/checkpoint_best.pt --sample-break-mode eos"
    line += " --gen-subset test --beam 2 --max-len-b 9 --max-tokens 256"
    output = succeeded(run(f"fairseq-generate bin {line}", work))
    assert len(re.findall(r"^H-\d+\t", output, flags=re.M)) == 10


def test_generate_tells_of_a_missing_model_in_one_line(work):
    line = f"--user-dir {PLUGIN} --task language_modeling --path none.pt --gen-subset test"
    assert "none.pt" in one_error(run(f"fairseq-generate bin {line}", work))


def test_interactive(work, trained):
    line = "--task language_modeling --path ck/checkpoint_best.pt --beam 1 --max-len-b 9"
    output = succeeded(run(f"fairseq-interactive bin {line}", work, input="w1 w4\nw2\n"))
    assert re.search(r"^H-0\t-?[\d.]+\tw1 w4", output, flags=re.M)
    assert re.search(r"^H-1\t-?[\d.]+\tw2", output, flags=re.M)


@pytest.mark.parametrize(
    "flags, words",
    [
        ("", "BLEU4 = 68.87, 90.0/75.0/66.7/50.0"),
        ("--sacrebleu", "BLEU = 68.87 90.0/75.0/66.7/50.0"),
        ("--sentence-bleu", "1 BLEU4 = 100.00"),
    ],
)
def test_score(tmp_path, flags, words):
    """Unigrams 9 of 10, bigrams 6 of 8, trigrams 4 of 6, of four words 2 of 4."""
    (tmp_path / "sys").write_text("the cat sat on a mat\na b c d\n")
    (tmp_path / "ref").write_text("the cat sat on the mat\na b c d\n")
    output = succeeded(run(f"fairseq-score --sys sys --ref ref {flags}", tmp_path))
    assert words in output


def test_hub_interface(work, trained):
    from fairseq.models.transformer_lm import TransformerLanguageModel

    hub = TransformerLanguageModel.from_pretrained(
        str(work / "ck"), "checkpoint_best.pt", str(work / "bin")
    )
    assert len(hub.score("w1 w4 w7")["positional_scores"]) == 3
    assert hub.sample("w1 w4", beam=1, max_len_b=5).startswith("w1 w4")


HYDRA = """
task: {_name: language_modeling, data: "???", tokens_per_sample: 32}
model: {_name: transformer_lm_gpt2_tiny, decoder_layers: 1, decoder_embed_dim: 16,
        decoder_input_dim: 16, decoder_output_dim: 16, decoder_attention_heads: 1}
criterion: cross_entropy
dataset: {max_tokens: 256, num_workers: 0}
optimization: {max_update: 3, lr: [0.001]}
optimizer: {_name: adam}
lr_scheduler: {_name: fixed}
"""


def test_hydra_train(work):
    (work / "small.yaml").write_text("# @package _group_\n" + HYDRA)
    line = f"fairseq-hydra-train --config-dir . --config-name small task.data={work / 'bin'}"
    output = succeeded(run(f"{line} hydra.run.dir=hydra", work))
    assert "num_updates 3" in output
    assert (work / "hydra" / "checkpoints" / "checkpoint_best.pt").exists()
    missing = f"fairseq-hydra-train --config-dir . --config-name small task.data={work / 'none'}"
    missing += f" common.user_dir={PLUGIN}"
    assert "none" in one_error(run(f"{missing} hydra.run.dir=hydra", work))


@pytest.mark.slow
def test_hydra_multirun_saves_the_best_of_every_job(work):
    (work / "small.yaml").write_text("# @package _group_\n" + HYDRA)
    line = "fairseq-hydra-train --multirun --config-dir . --config-name small"
    line += f" common.user_dir={PLUGIN}"
    line += f" hydra.sweep.dir=sweep task.data={work / 'bin'} optimization.lr=[0.01],[0.0000001]"
    succeeded(run(line, work))
    for job in ("0", "1"):
        assert (work / "sweep" / job / "checkpoints" / "checkpoint_best.pt").exists()
