"""Try the plugin and stock fairseq's commands in a fresh environment, and record what happened.

    python tests/version_matrix.py --python python3.10 --torch 2.13.0 --pip newest

makes a temporary virtual environment with that interpreter, installs by the README's two lines
(with torch pinned), runs every console script of fairseq on a tiny corpus, with a stock model and
with moe_lm_tiny, and puts one row into docs/version_matrix.json and docs/version_matrix.md.
`--stock-pins` tries the other installation: fairseq's own dependencies, our folder as --user-dir.
Needs a package index, g++, and for some torch builds several GB of disk; a few minutes a row.
Not a test that pytest collects.
"""

import argparse
import datetime
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT / "docs" / "version_matrix.json"
TABLE = ROOT / "docs" / "version_matrix.md"
PACKAGES = ("pip", "torch", "numpy", "hydra-core", "omegaconf")

LM = "--task language_modeling --tokens-per-sample 32 --max-tokens 256 --num-workers 0"
FIT = "--optimizer adam --lr 0.001 --no-progress-bar"
MOE = "--user-dir {user_dir} --criterion moe_cross_entropy --arch moe_lm_tiny --decoder-layers 2"
MOE += " --decoder-embed-dim 16 --decoder-ffn-embed-dim 32 --decoder-attention-heads 2"
STOCK = "--arch transformer_lm_gpt2_tiny"
LOAD = "--task language_modeling --path"
GLOO = "torchrun --standalone --nproc_per_node 2 {bin}/fairseq-train"
HYDRA = "fairseq-hydra-train --config-dir . --config-name tiny"
HYDRA_MOE = "+common.user_dir={user_dir} model._name=moe_lm_tiny +model.decoder_attention_heads=2"
FILES = "--trainpref train.txt --validpref valid.txt --testpref test.txt --destdir bin"

# name -> (command, what its output must contain)
COMMANDS = {
    "preprocess": (f"fairseq-preprocess --only-source {FILES} --workers 2", "Wrote preprocessed"),
    "train": (
        f"fairseq-train bin {LM} {FIT} {STOCK} --max-update 3 --save-dir stock",
        "num_updates 3",
    ),
    "train MoE": (
        f"fairseq-train bin {LM} {FIT} {MOE} --max-update 3 --save-dir moe",
        "num_updates 3",
    ),
    "resume MoE": (f"fairseq-train bin {LM} {FIT} {MOE} --max-update 5 --save-dir moe", "@ 3 upd"),
    "bf16 MoE": (
        f"fairseq-train bin {LM} {FIT} {MOE} --bf16 --max-update 3 --no-save",
        "num_updates 3",
    ),
    "fp16 MoE": (
        f"fairseq-train bin {LM} {FIT} {MOE} --fp16 --max-update 3 --no-save",
        "num_updates 3",
    ),
    "eval-lm": (f"fairseq-eval-lm bin {LM} --path stock/checkpoint_best.pt", "Perplexity"),
    "eval-lm MoE": (
        f"fairseq-eval-lm bin {LM} --user-dir {{user_dir}} --path moe/checkpoint_best.pt",
        "Perplexity",
    ),
    "validate MoE": (
        f"fairseq-validate bin {LOAD} moe/checkpoint_best.pt --user-dir {{user_dir}} "
        "--max-tokens 256",
        "ppl",
    ),
    "generate MoE": (
        f"fairseq-generate bin {LOAD} moe/checkpoint_best.pt --user-dir {{user_dir}} --beam 2 "
        "--sample-break-mode eos --max-len-b 9 --max-tokens 256",
        "H-0",
    ),
    "interactive MoE": (
        f"fairseq-interactive bin {LOAD} moe/checkpoint_best.pt --user-dir {{user_dir}} --beam 1 "
        "--max-len-b 9 --input test.txt",
        "H-0",
    ),
    "hydra-train": (f"{HYDRA} model._name=transformer_lm_gpt2_tiny", "num_updates 3"),
    "hydra-train MoE": (f"{HYDRA} {HYDRA_MOE} criterion._name=moe_cross_entropy", "num_updates 3"),
    "hub MoE": ("python hub.py", "sampled: w1 w4"),
    "2 processes MoE": (
        f"{GLOO} bin {LM} {FIT} {MOE} --distributed-backend gloo --ddp-backend legacy_ddp "
        "--max-update 3 --save-dir two",
        "num_updates 3",
    ),
    "2 resume MoE": (
        f"{GLOO} bin {LM} {FIT} {MOE} --distributed-backend gloo --ddp-backend legacy_ddp "
        "--max-update 5 --save-dir two",
        "@ 3 upd",
    ),
}

TINY_YAML = """# @package _group_
task: {_name: language_modeling, data: %s, tokens_per_sample: 32}
model: {_name: "???", decoder_layers: 2, decoder_embed_dim: 16, decoder_ffn_embed_dim: 32}
criterion: {_name: cross_entropy}
dataset: {max_tokens: 256, num_workers: 0}
optimization: {max_update: 3, lr: [0.001]}
optimizer: {_name: adam}
lr_scheduler: {_name: fixed}
"""

HUB = """
import sys
sys.path.insert(0, %r)  # the folder of the package
import fairseq_moe_ext
from fairseq_moe_ext.models.language_model import MoETransformerLanguageModel as Model
hub = Model.from_pretrained("moe", "checkpoint_best.pt", "bin")
assert len(hub.score("w1 w4 w7")["positional_scores"]) == 3
print("sampled:", hub.sample("w1 w4", beam=1, max_len_b=6))
"""


def main() -> int:
    """Try one environment; return 0 if all of it worked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", default=sys.executable, help="interpreter of the environment")
    parser.add_argument("--torch", help="version of torch; without it, the newest")
    parser.add_argument("--pip", default="newest", help="version of pip; newest by default")
    parser.add_argument("--stock-pins", action="store_true", help="fairseq's own dependencies")
    parser.add_argument("--keep", type=Path, help="make the environment here and leave it")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        venv = args.keep or Path(scratch) / "venv"
        row = {
            "date": datetime.date.today().isoformat(),
            "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
            "way in": "--user-dir only, stock pins" if args.stock_pins else "README's two lines",
        }
        source = Path(scratch) / "source"  # a build leaves nothing behind in the project
        shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "runs", "build", "*.pyc"))
        start = time.monotonic()
        error = install(venv, source, args)
        row["install seconds"] = round(time.monotonic() - start)
        row.update(versions(venv))
        row["results"] = {"install": error or "ok"}
        if not error:
            package = source if args.stock_pins else installed_in(venv)
            row["results"].update(try_commands(venv, package, Path(scratch) / "work"))
    record(row)
    failed = {name: why for name, why in row["results"].items() if why != "ok"}
    print(json.dumps(failed, indent=1) if failed else "all ok")
    return bool(failed)


def install(venv, source, args):
    """Make the environment; the reason if that fails, else None."""
    python = venv / "bin" / "python"
    pip = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    torch = f"torch=={args.torch}" if args.torch else "torch"
    steps = [[args.python, "-m", "venv", venv]]
    steps.append([*pip, "-U", "pip" if args.pip == "newest" else f"pip=={args.pip}"])
    if args.stock_pins:
        steps.append([*pip, torch, torch.replace("torch", "torchaudio"), "numpy<2"])
        steps.append([*pip, "fairseq==0.12.2"])
    else:
        steps.append([*pip, torch, source])
        steps.append([*pip, "--no-deps", "fairseq==0.12.2"])
    for step in steps:
        step = [str(part) for part in step]
        print("+", " ".join(step), flush=True)
        result = subprocess.run(step, cwd=venv.parent, capture_output=True, text=True)
        if result.returncode:
            return f"{' '.join(step[3:])}: {reason(result.stdout + result.stderr)}"
    return None


def versions(venv):
    """The versions of the packages that matter, by name."""
    code = "import importlib.metadata as m, json, platform, sys\n"
    code += "found = {d.metadata['Name'].lower(): d.version for d in m.distributions()}\n"
    code += f"picked = {{n: found.get(n) for n in {PACKAGES!r}}}\n"
    code += "print(json.dumps({'python': platform.python_version(), **picked}))"
    result = subprocess.run([venv / "bin" / "python", "-c", code], capture_output=True, text=True)
    return json.loads(result.stdout.splitlines()[-1]) if result.returncode == 0 else {}


def installed_in(venv):
    """The folder that holds the installed package, by its own command."""
    command = [venv / "bin" / "fairseq-moe", "user-dir"]
    return Path(subprocess.check_output(command, text=True).strip()).parent


def try_commands(venv, package, work):
    """Run COMMANDS in a new folder; by name, "ok" or the reason of the failure."""
    work.mkdir()
    for split, lines in (("train", 120), ("valid", 20), ("test", 10)):
        text = [" ".join(f"w{(3 * i + j) % 23}" for j in range(5 + i % 7)) for i in range(lines)]
        (work / f"{split}.txt").write_text("\n".join(text) + "\n")
    (work / "tiny.yaml").write_text(TINY_YAML % (work / "bin"))
    (work / "hub.py").write_text(HUB % str(package))
    # A clean environment: the commands must need no variable.
    environment = {key: os.environ[key] for key in ("HOME", "LANG", "TMPDIR") if key in os.environ}
    environment.update(PATH=f"{venv / 'bin'}:/usr/bin:/bin", OMP_NUM_THREADS="1")
    results = {}
    for name, (line, expected) in COMMANDS.items():
        command, *arguments = line.format(
            bin=venv / "bin", user_dir=package / "fairseq_moe_ext"
        ).split()
        result = subprocess.run(
            [venv / "bin" / command, *arguments],
            cwd=work,
            env=environment,
            capture_output=True,
            text=True,
            timeout=600,
        )
        output = result.stdout + result.stderr
        if result.returncode == 0 and expected in output:
            results[name] = "ok"
        else:
            results[name] = f"exit {result.returncode}: {reason(output)}"
        print(f"  {name}: {results[name]}", flush=True)
    return results


def reason(output):
    """The line of an output that says most about a failure."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [
        line for line in lines if re.match(r"(\[rank\d\]: )?(\w+\.)*\w*(Error|error)\b", line)
    ]
    return (errors or lines or ["no output"])[-1][:300]


def record(row):
    """Put the row into the JSON file, in place of one for the same versions, and the table."""
    RECORD.parent.mkdir(exist_ok=True)
    rows = json.loads(RECORD.read_text()) if RECORD.exists() else []
    key = ("way in", "python", *PACKAGES)

    def same(other):
        return all(other.get(name) == row.get(name) for name in key)

    rows = [other for other in rows if not same(other)] + [row]
    rows.sort(
        key=lambda r: [r["way in"] != "README's two lines", *map(numbers, map(r.get, key[1:]))]
    )
    write(RECORD, json.dumps(rows, indent=1) + "\n")
    write(TABLE, table(rows))


def table(rows):
    """The rows as Markdown: versions, and how many commands worked or which failed."""
    head = ["Python", "torch", "numpy", "hydra / omegaconf", "pip", "installed by", "worked", "on"]
    lines = [
        "# Tested versions",
        "",
        "Written by `tests/version_matrix.py`, which makes a fresh environment for every row. Each",
        f"row is one installation and these {len(COMMANDS)} commands: {', '.join(COMMANDS)}.",
        f"With the installation, that makes {len(COMMANDS) + 1}.",
        "Each row describes the code of its date, the last column.",
        "",
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
    ]
    for row in rows:
        results = row["results"]
        failed = [f"{name}: {why}" for name, why in results.items() if why != "ok"]
        worked = f"{len(results) - len(failed)} of {len(COMMANDS) + 1}"
        cells = [row.get("python"), row.get("torch"), row.get("numpy")]
        cells += [f"{row.get('hydra-core')} / {row.get('omegaconf')}", row.get("pip")]
        cells += [row["way in"], "; ".join([worked, *failed]), row["date"]]
        lines.append("| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def numbers(version):
    """A key that sorts version strings as versions."""
    return [int(part) for part in re.findall(r"\d+", version or "0")]


def write(path, text):
    """Write a file whole or not at all."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text)
    shutil.move(temporary, path)


if __name__ == "__main__":
    sys.exit(main())
