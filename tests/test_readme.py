"""The README's commands and Python, as they stand there, on a little text and in small."""

import gzip
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")

# The commands are run as printed, with these flags behind them, of which the last count.
SMALL = """
SIZE="--decoder-layers 2 --decoder-embed-dim 16 --decoder-ffn-embed-dim 32"
SIZE="$SIZE --decoder-attention-heads 2 --tokens-per-sample 32 --batch-size 8 --max-update 3"
fairseq-train() { command fairseq-train "$@" $SIZE --cpu --num-workers 0; }
fairseq-eval-lm() { command fairseq-eval-lm "$@" --tokens-per-sample 32 --cpu --num-workers 0; }
fairseq-validate() { command fairseq-validate "$@" --cpu --num-workers 0; }
torchrun() { command torchrun "$@" $SIZE --cpu --num-workers 0; }
fairseq-moe() {
    case "$1" in
        evaluate) command fairseq-moe "$@" --cpu ;;
        study) command fairseq-moe study small.yaml --jobs 2 ;;
        *) command fairseq-moe "$@" ;;
    esac
}
fairseq-hydra-train() {
    command fairseq-hydra-train "$@" common.cpu=true common.fp16=false \
        common.memory_efficient_fp16=false model.decoder_layers=2 model.decoder_embed_dim=16 \
        model.decoder_ffn_embed_dim=32 model.decoder_attention_heads=2 task.tokens_per_sample=32 \
        model.moe_expert_count=4 optimization.max_update=3 optimization.update_freq=[1]
}
"""


def section(title):
    """The text of a section, without its heading."""
    assert f"\n## {title}\n" in README, title
    return re.split(r"^## ", README.split(f"\n## {title}\n")[1], flags=re.M)[0]


def blocks(title, language, part=slice(None)):
    found = re.findall(rf"^```{language}\n(.*?)^```", section(title), flags=re.M | re.S)[part]
    assert found, (title, language)
    return "".join(found)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the text that the README speaks of, and the repository's configs."""
    path = tmp_path_factory.mktemp("readme")
    rng = random.Random(0)

    def document():
        return "\n".join(
            " ".join(f"word{rng.randint(0, 200)}" for _ in range(10)) for _ in range(3)
        )

    (path / "text" / "code").mkdir(parents=True)
    for name in ("stories", "letters"):
        text = "\n\n".join(document() for _ in range(200))
        (path / "text" / f"{name}.txt").write_text(text)
    for i in range(100):
        (path / "text" / "code" / f"{i}.py").write_text("\n\n".join(document() for _ in range(2)))
    lines = "\n".join(json.dumps({"text": document()}) for _ in range(60))
    (path / "text" / "mail.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (path / "questions").mkdir()
    for split in ("train", "valid", "test"):
        lines = [
            {"context": document(), "choices": [f"\n{document()}", " yes"], "label": i % 2}
            for i in range(20)
        ]
        text = "\n".join(map(json.dumps, lines))
        (path / "questions" / f"{split}.jsonl").write_text(text)
    (path / "tasks" / "sst2").mkdir(parents=True)
    for split, count in (("train", 30), ("dev", 5)):
        rows = "".join(f"word{i} word{i + 1}\t{i % 2}\n" for i in range(count))
        (path / "tasks" / "sst2" / f"{split}.tsv").write_text("sentence\tlabel\n" + rows)
    return path


def run(folder, *command):
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, "PATH": path}, capture_output=True, text=True
    )
    output = done.stdout + done.stderr
    assert done.returncode == 0, output[-3000:]
    return output


def script(folder, title, part=slice(None)):
    """Run a section's commands; what they print."""
    return run(folder, "bash", "-euo", "pipefail", "-c", SMALL + blocks(title, "bash", part))


@pytest.fixture(scope="module")
def trained(folder):
    """What the sections after these two start from."""
    output = script(folder, "Prepare your own text")
    assert re.search(r"mail \(held out\) +test +\d+", output)
    assert (folder / "more" / "letters" / "test.bin").stat().st_size > 0

    output = script(folder, "Train")
    assert len(re.findall(r"done training", output)) == 2
    return folder


@pytest.mark.timeout(900)  # some two minutes on two cores
def test_commands(trained):
    """Section by section, each on what the one before left behind."""
    output = script(trained, "A mixture of corpora")
    for key in ("stories_ppl", "code_ppl", "mail_ppl", "in_domain_ppl", "out_of_domain_ppl"):
        assert re.search(rf"\b{key} [\d.]+", output), key

    output = script(trained, "Evaluate")
    assert re.search(r"Loss \(base 2\): [\d.]+, Perplexity: [\d.]+", output)
    output = run(trained, sys.executable, "-c", blocks("Evaluate", "python"))
    assert re.search(r"tensor\(\[-[\d.]+", output)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_commands_on_a_trained_model(trained):
    output = script(trained, "Scale out")
    assert re.search(r"training on 2 devices", output)
    assert (trained / "runs" / "two" / "experts").is_dir()

    output = script(trained, "Convert")
    assert output.count("experts a sparse layer") == 4
    assert len(list((trained / "spread" / "experts").glob("*.pt"))) == 4

    output = script(trained, "Study", slice(2))
    assert "GPT-3 175B" in output
    assert re.search(r"^letters +", output, flags=re.M) and "capacity" in output
    assert (trained / "capacity.html").is_file()

    output = script(trained, "Fine-tune")
    assert output.count("20 questions; right answer: 0 50.0 %, 1 50.0 %") == 3
    assert re.search(r"test \| .*accuracy [\d.]+", output)

    output = script(trained, "Prime")
    assert re.search(r"sst2 +sum +4 +5 +[\d.]+ +[\d.]+ of 25 +[\d.]+", output)

    script(trained, "Hydra")
    assert list((trained / "outputs").rglob("checkpoint_best.pt"))


STUDY = """
data: data
out: runs/study
context: 32
updates: 3
seeds: [1]
train: {batch-size: 4, optimizer: adam, lr: 0.01, cpu: true, num-workers: 0,
  decoder-layers: 2, decoder-attention-heads: 2, decoder-ffn-embed-dim: 32}
dense: {arch: dense_lm_tiny, sizes: {s: {decoder-embed-dim: 8}, m: {decoder-embed-dim: 16}}}
moe: {arch: moe_lm_tiny, sizes: {s: {decoder-embed-dim: 8}, m: {decoder-embed-dim: 16}}}
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_study(trained):
    """`fairseq-moe study`, with a smaller file than the one named, and `fairseq-moe report`."""
    (trained / "small.yaml").write_text(STUDY)
    output = script(trained, "Study", slice(2, None))
    assert "4 of 4 runs" in output
    assert (trained / "runs" / "study" / "report.html").is_file()


def test_the_page_on_fine_tuning_shows_the_same_commands():
    page = (REPOSITORY / "docs" / "finetuning.md").read_text(encoding="utf-8")
    assert re.findall(r"^```bash\n(.*?)^```", page, flags=re.M | re.S) == [
        blocks("Fine-tune", "bash")
    ]


def test_flags_of_the_tables_exist():
    from fairseq_moe_ext.config import MoETransformerLMConfig
    from fairseq_moe_ext.criterions.moe_cross_entropy import MoECrossEntropyConfig

    known = {*vars(MoETransformerLMConfig())} | {*vars(MoECrossEntropyConfig())}
    named = re.findall(r"`--([a-z0-9-]+)", section("Train"))
    stock = {"arch", "task", "fp16", "memory-efficient-fp16", "bf16", "update-freq"}
    stock |= {"best-checkpoint-metric", "optimizer"}
    assert len(named) > 15
    for flag in set(named) - stock:
        assert flag.replace("-", "_") in known, flag


def test_architectures_of_the_table_exist():
    from fairseq_moe_ext.models.architectures import ARCHITECTURES

    assert set(re.findall(r"^\| `(\w+)`", section("Architectures"), flags=re.M)) == set(
        ARCHITECTURES
    )


def test_make_has_the_targets_that_are_named():
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    for target in set(re.findall(r"(?:`|^)(?:\w+=\S+ )?make ([a-z-]+)", README, flags=re.M)):
        assert re.search(rf"^{target}:", makefile, flags=re.M), target


def test_the_map_names_files_that_exist():
    tree = re.search(r"```text\n(fairseq_moe_ext/.*?)```", section("The map of the code"), re.S)
    folder = ""
    for line in tree.group(1).splitlines():
        name = line.split()[0]
        if line.startswith("  "):
            assert (REPOSITORY / folder / name).exists(), name
        else:
            folder = name
            assert (REPOSITORY / name).exists(), name
