"""The commands and Python of README and docs/, as they stand there, on little text and in small."""

import gzip
import importlib.util
import json
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]

# The commands are run as printed, with these flags behind them, of which the last count.
SMALL = """
SIZE="--decoder-layers 2 --decoder-embed-dim 16 --decoder-ffn-embed-dim 32"
SIZE="$SIZE --decoder-attention-heads 2 --tokens-per-sample 32 --batch-size 8 --max-update 3"
fairseq-train() { command fairseq-train "$@" $SIZE --cpu --num-workers 0; }
fairseq-eval-lm() { command fairseq-eval-lm "$@" --tokens-per-sample 32 --cpu --num-workers 0; }
fairseq-validate() { command fairseq-validate "$@" --cpu --num-workers 0; }
torchrun() { command torchrun "$@" $SIZE --cpu --num-workers 0; }
fairseq-interactive() { command fairseq-interactive "$@" --cpu; }
python() {
    case "$*" in
        *stdlib*) test -d "$(command python "$@")/email" && echo lib ;;
        *) command python "$@" ;;
    esac
}
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


def text_of(page):
    return (REPOSITORY / page).read_text(encoding="utf-8")


def section(page, title):
    """The text of a section of a page, without its heading."""
    assert f"\n## {title}\n" in text_of(page), (page, title)
    return re.split(r"^## ", text_of(page).split(f"\n## {title}\n")[1], flags=re.M)[0]


def blocks(page, language="bash", title=None):
    """The code blocks of a page, or of one of its sections."""
    text = section(page, title) if title else text_of(page)
    found = re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.M | re.S)
    assert found, (page, language, title)
    return "".join(found)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the files that README and docs name."""
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
    sets = ["Enron Emails", "Gutenberg (PG-19)"]
    of_the_pile = [{"text": document(), "meta": {"pile_set_name": sets[i % 2]}} for i in range(5)]
    (path / "test.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in of_the_pile))
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


def script(folder, page, title=None):
    """Run a page's commands, or those of one of its sections; what they print."""
    return run(folder, "bash", "-euo", "pipefail", "-c", SMALL + blocks(page, "bash", title))


@pytest.fixture(scope="module")
def trained(folder):
    """What the pages after these two start from."""
    run(folder, sys.executable, "-c", blocks("docs/prepare.md", "python", "The Pile"))
    output = script(folder, "docs/prepare.md")
    assert re.search(r"mail \(held out\) +test +\d+", output)
    assert re.search(r"Enron-Emails \(held out\) +test +3 ", output)
    assert re.search(r"Gutenberg-PG-19 \(held out\) +test +2 ", output)
    assert (folder / "more" / "letters" / "test.bin").stat().st_size > 0

    output = script(folder, "docs/train.md")
    assert len(re.findall(r"done training", output)) == 2
    return folder


@pytest.mark.timeout(900)
def test_the_readme(folder):
    """Its lines run, log the metrics that it shows, and print the table that it shows."""
    (folder / "readme").mkdir()
    (folder / "readme" / "lib").symlink_to(folder / "text" / "code")
    (folder / "text" / "code" / "email").mkdir()
    for i in range(10):
        shutil.copy(folder / "text" / "code" / f"{i}.py", folder / "text" / "code" / "email")
    output = script(folder / "readme", "README.md")
    shown, table, _ = re.findall(r"^```text\n(.*?)^```", section("README.md", "Train a model") +
                                 "```text\n```", flags=re.M | re.S)  # fmt: skip
    for line in shown.splitlines():
        assert re.fullmatch(r"[\d:]{8} \| \d+/200 ppl \S+ lr 0.002 gate \S+ .* left [\d:]+", line)
    metrics = {"inner_loss", "moe_gate_loss", "ppl", "lr", "wps", "ups"}
    logged = re.search(r"\| train \| (.*)", output)[1]
    assert metrics <= {part.split()[0] for part in logged.split(" | ")}
    assert table.split("\n")[0].split() in [line.split() for line in output.splitlines()]


@pytest.mark.timeout(900)  # some two minutes on two cores
def test_commands(trained):
    """Page by page, each on what the one before left behind."""
    output = script(trained, "docs/mixture.md")
    for key in ("stories_ppl", "code_ppl", "mail_ppl", "in_domain_ppl", "out_of_domain_ppl"):
        assert re.search(rf"\b{key} [\d.]+", output), key

    run(trained, sys.executable, "-c", blocks("docs/train.md", "python"))
    assert (trained / "perplexity.png").stat().st_size > 0

    output = script(trained, "docs/evaluate.md", "One set")
    assert re.search(r"Loss \(base 2\): [\d.]+, Perplexity: [\d.]+", output)
    (trained / "my.txt").write_text("word1 word2 word3\nword4 word5 word6\n" * 5)
    assert "By token" in script(trained, "docs/inspect.md")
    assert "By token" in run(trained, sys.executable, "-c", blocks("docs/inspect.md", "python"))
    output = run(trained, sys.executable, "-c", blocks("docs/generate.md", "python"))
    assert re.search(r"tensor\(\[-[\d.]+", output)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_commands_on_a_trained_model(trained):
    output = script(trained, "docs/scaling.md")
    assert re.search(r"training on 2 devices", output)
    assert (trained / "runs" / "two" / "experts").is_dir()

    output = script(trained, "docs/convert.md")
    assert output.count("experts per sparse layer") == 6
    if importlib.util.find_spec("transformers"):
        code = blocks("docs/convert.md", "python", "Hugging Face")
        assert "word1 word2" in run(trained, sys.executable, "-c", code)
    assert len(list((trained / "sharded" / "experts").glob("*.pt"))) == 4

    output = script(trained, "docs/experts.md")
    assert output.count("done training") == 2
    assert "dense twin: hidden width 480 instead of the MoE layers" in output
    for active in ("1,28", "2,83", "13,68"):  # millions; the first digits
        assert re.search(rf"parameters, active +{active}", output), active

    assert len(re.findall(r"loops?, best of", script(trained, "docs/performance.md"))) == 2
    assert "GPT-3 175B" in script(trained, "docs/cost.md")
    output = script(trained, "docs/evaluate.md", "Many sets at once")
    assert re.search(r"^letters +", output, flags=re.M) and "capacity" in output
    assert (trained / "capacity.html").is_file()

    output = script(trained, "docs/finetuning.md")
    assert output.count("20 questions; right answer: 0 50.0 %, 1 50.0 %") == 3
    assert re.search(r"test \| .*accuracy [\d.]+", output)

    output = script(trained, "docs/priming.md")
    assert re.search(r"^sst2 +sum +4 +5 .* to [\d.]+ +50\.0", output, flags=re.M)

    assert re.search(r"^H-\d+", script(trained, "docs/generate.md"), flags=re.M)

    script(trained, "docs/hydra.md")
    assert list((trained / "outputs").rglob("checkpoint_best.pt"))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_whether_the_routing_is_healthy(trained):
    """The page's commands, its table, and what it says may be changed when a run is resumed."""
    small = SMALL.replace('max-update 3"', 'max-update 3 --log-interval 1"')
    again = 'SIZE="$SIZE --max-update 5 --lr 5e-4 --moe-gate-loss-wt 0.1 --moe-z-loss-wt 0.001"\n'
    again += 'SIZE="$SIZE --moe-balance-over global_batch"\n'
    train, inspect = blocks("docs/balancing.md").split("fairseq-moe inspect")
    commands = f"{small}{train}{again}{train}fairseq-moe inspect{inspect}"
    output = run(trained, "bash", "-euo", "pipefail", "-c", commands)
    assert "Loaded checkpoint runs/health/checkpoint_last.pt" in output
    assert re.search(r"num_updates\D+5\b", output) and (trained / "health.html").is_file()
    printed = run(trained, sys.executable, "-c", blocks("docs/balancing.md", "python"))
    assert (trained / "load.png").stat().st_size > 0
    shown = re.findall(r"^\| (\d+), ([\d,]+) \|(.*)\|$", text_of("docs/balancing.md"), re.M)
    assert len(shown) == 4
    for (experts, tokens, cells), line in zip(shown, printed.splitlines()):
        numbers = [float(cell) for cell in (experts, tokens.replace(",", ""), *cells.split("|"))]
        assert numbers == pytest.approx([float(word) for word in line.split()], abs=0.051)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_routers(trained):
    """Every router, and that of the example."""
    assert len(re.findall(r"done training", script(trained, "docs/routers.md"))) == 7
    (trained / "examples").symlink_to(REPOSITORY / "examples")
    output = script(trained, "examples/add_a_router/README.md")
    assert re.search(r"Perplexity: [\d.]+", output)


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
    output = script(trained, "docs/study.md", "Compare two families")
    assert "4 of 4 runs" in output
    assert (trained / "runs" / "study" / "report.html").is_file()


RUN = {"README.md", "examples/add_a_router/README.md", "examples/quickstart/README.md"} | {
    f"docs/{name}.md"
    for name in (
        "balancing",
        "convert",
        "cost",
        "evaluate",
        "experts",
        "finetuning",
        "forecast",
        "generate",
        "hydra",
        "inspect",
        "mixture",
        "prepare",
    )
    + ("performance", "priming", "routers", "scaling", "study", "train")
}
NOT_RUN = {"docs/released_models.md"}  # commands on downloads of 29 GB
PAGES = [
    path.relative_to(REPOSITORY).as_posix()
    for pattern in ("*.md", "docs/*.md", "examples/*/README.md", "benchmarks/README.md")
    for path in sorted(REPOSITORY.glob(pattern))
]


def test_every_page_with_commands_is_run():
    """Here, or in test_quickstart.py."""
    assert {page for page in PAGES if "```bash\n" in text_of(page)} == RUN | NOT_RUN


def test_the_readme_is_short():
    assert len(text_of("README.md").splitlines()) <= 200


def anchors(page):
    """The names by which links reach the headings of a page, as GitHub and MyST make them."""
    headings = re.findall(r"^#+ (.*)", re.sub(r"```.*?```", "", text_of(page), flags=re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", text_of(page)):
        path, _, anchor = link.partition("#")
        target = (REPOSITORY / page).parent / path if path else REPOSITORY / page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.resolve().relative_to(REPOSITORY)), link


def test_flags_of_the_tables_exist():
    from fairseq.dataclass.configs import FairseqConfig

    from fairseq_moe_ext.config import MoETransformerLMConfig
    from fairseq_moe_ext.criterions.moe_cross_entropy import MoECrossEntropyConfig

    known = {*vars(MoETransformerLMConfig())} | {*vars(MoECrossEntropyConfig())}
    own, _ = text_of("docs/train.md").split("## Coming from")  # there: test_branch_commands.py
    named = re.findall(r"`--([a-z0-9-]+)", own)
    groups = vars(FairseqConfig()).values()  # stock's
    known |= {name for group in groups for name in getattr(group, "__dataclass_fields__", ())}
    assert len(named) > 15
    for flag in set(named) - {"arch", "task", "optimizer"}:
        assert flag.replace("-", "_") in known, flag


def test_architectures_of_the_table_exist():
    from fairseq_moe_ext.models.architectures import ARCHITECTURES

    table = section("docs/train.md", "Architectures")
    assert set(re.findall(r"^\| `(\w+)`", table, flags=re.M)) == set(ARCHITECTURES)


@pytest.mark.parametrize("page", PAGES)
def test_make_has_the_targets_that_are_named(page):
    makefile = text_of("Makefile")
    for target in set(re.findall(r"(?:`|^)(?:\w+=\S+ )?make\s([a-z-]+)", text_of(page), re.M)):
        assert re.search(rf"^{target}:", makefile, flags=re.M), target


def test_the_map_is_complete_and_names_what_exists():
    tree = section("CONTRIBUTING.md", "The map of the code").split("```text\n")[1].split("```")[0]
    named = {"": set()}
    folder = ""
    for line in tree.splitlines():
        name = line.split()[0]
        if not line.startswith("  "):
            folder = name
            named[""].add(name)
            named[folder] = set()
        else:
            named[folder].add(name)
        assert (REPOSITORY / (folder + name if line.startswith("  ") else name)).exists(), name

    def visible(folder, *hidden):
        return {
            path.name + "/" * path.is_dir()
            for path in folder.iterdir()
            if path.name[0] not in "._" and path.name not in hidden
        }

    assert named["fairseq_moe_ext/"] == visible(REPOSITORY / "fairseq_moe_ext", "py.typed")
    listed = run(REPOSITORY, "git", "ls-files") if (REPOSITORY / ".git").exists() else ""
    folders = {line.split("/")[0] + "/" for line in listed.splitlines() if "/" in line}
    assert {name for name in folders if name[0] != "."} <= named[""]
