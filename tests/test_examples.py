"""The notebook, the batch script and the files that describe the project."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

import fairseq_moe_command

ROOT = Path(__file__).parents[1]


def cells():
    notebook = json.loads((ROOT / "examples" / "notebook.ipynb").read_text(encoding="utf-8"))
    return ["".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code"]


def test_the_notebook_holds_python_and_no_outputs():
    notebook = json.loads((ROOT / "examples" / "notebook.ipynb").read_text(encoding="utf-8"))
    for source in cells():
        compile(source, "cell", "exec")
    assert all(not c.get("outputs") for c in notebook["cells"])


@pytest.mark.slow
def test_the_notebook_runs(tmp_path, monkeypatch, capsys):
    """Its cells, on little text and a small model."""
    lines = [f"def name{i % 7}(path):\n    return word{i % 11} + word{i % 5}\n" for i in range(300)]
    for i in range(60):
        (tmp_path / f"{i}.py").write_text("\n".join(lines[i : i + 40]))
    (tmp_path / "data").mkdir()
    (tmp_path / "my.txt").write_text("a text of the reader")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent) + os.pathsep + os.environ["PATH"])
    monkeypatch.setenv("MPLBACKEND", "agg")
    names = {}
    for number, source in enumerate(cells()):
        if number == 0:
            source += f'\nTEXT, UPDATES = "{tmp_path}/*.py", 40\nSIZE = "--cpu --decoder-layers 2'
            source += ' --decoder-embed-dim 16 --decoder-ffn-embed-dim 32"'
        exec(source.replace("--train-bpe 2000", "--train-bpe 300"), names)
    assert "By token" in capsys.readouterr().out and names["found"].html()
    assert (tmp_path / "my.txt").read_text() == "a text of the reader"
    assert not [*(tmp_path / "data").iterdir()]


def batch_script(tmp_path, tasks, **variables):
    """What the batch script gives to srun, as a list of words, and its exit status and messages."""
    srun = tmp_path / "srun"
    srun.write_text(f"#!/bin/bash\nprintf '%s\\0' \"$@\" > {tmp_path}/words\n")
    srun.chmod(0o755)
    done = subprocess.run(
        ["bash", str(ROOT / "examples" / "slurm" / "train.sbatch"), "--log-interval", "7"],
        env={
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            **{"SLURM_NTASKS": str(tasks), "SLURM_JOB_ID": "21", "SLURM_CPUS_PER_TASK": "8"},
            **variables,
        },
        capture_output=True,
        text=True,
    )
    words = tmp_path / "words"
    return words.read_text().split("\0")[:-1] if words.exists() else [], done


@pytest.mark.parametrize("tasks", (16, 64))
def test_the_batch_script_trains_as_the_hydra_config(tasks, tmp_path, monkeypatch):
    from fairseq import options

    words, done = batch_script(tmp_path, tasks)
    assert done.returncode == 0, done.stderr
    assert words[:3] == ["--cpus-per-task", "8", "fairseq-train"]
    monkeypatch.setattr(sys, "argv", words[2:])
    args = options.parse_args_and_arch(options.get_training_parser(), words[3:])
    assert args.arch == "moe_lm_15b" and args.distributed_port == 20021
    assert args.distributed_world_size == tasks and args.log_interval == 7
    config = {
        name: yaml.safe_load((ROOT / "hydra_conf" / f"{name}.yaml").read_text(encoding="utf-8"))
        for name in ("moe_lm_15b", "base", "optimizer/adam", "criterion/moe_cross_entropy")
    }
    optimization = config["moe_lm_15b"]["optimization"]
    assert args.lr == optimization["lr"] and args.max_update == optimization["max_update"]
    assert args.clip_norm == config["base"]["optimization"]["clip_norm"]
    for name in ("weight_decay", "adam_betas", "adam_eps"):
        assert getattr(args, name) == config["optimizer/adam"][name], name
    assert args.warmup_updates == config["moe_lm_15b"]["lr_scheduler"]["warmup_updates"]
    assert int(args.total_num_update) == args.max_update
    criterion = config["criterion/moe_cross_entropy"]
    for name in ("wt", "combine_method", "transform"):
        name = f"moe_gate_loss_{name}"
        assert getattr(args, name) == criterion[name], name
    assert args.moe_z_loss_wt == criterion["moe_z_loss_wt"]
    assert args.no_epoch_checkpoints == config["base"]["checkpoint"]["no_epoch_checkpoints"]
    assert args.best_checkpoint_metric.endswith("ppl")  # not the loss with the balancing loss
    assert args.batch_size * args.update_freq[0] * tasks * args.tokens_per_sample == 2**19


@pytest.mark.parametrize(
    "tasks, variables", ((12, {}), (512, {"BATCH": "1"}), (64, {"BATCH": "8"}))
)
def test_the_batch_script_refuses_another_batch(tasks, variables, tmp_path):
    words, done = batch_script(tmp_path, tasks, **variables)
    assert done.returncode == 1 and not words
    assert done.stderr.startswith("error: BATCH=") and done.stderr.count("\n") == 1
    assert "--nodes for 1, 2, 4, ... or 256 GPUs" in done.stderr  # on 512 no BATCH would help


def test_make_clean_keeps_what_cannot_be_made_again(tmp_path):
    """Downloaded text and results."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    kept = ["build/study/text/mail.jsonl", "runs/study/result.json"]
    gone = ["build/site/index.html", "build/bdist.linux-x86_64/x", "dist/x.whl", ".venv/bin/python"]
    for name in (*kept, *gone):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
    subprocess.run(["make", "clean"], cwd=tmp_path, check=True, capture_output=True)
    assert [name for name in (*kept, *gone) if (tmp_path / name).exists()] == kept


def test_the_citation_has_the_version():
    found = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert found["cff-version"] == "1.2.0" and found["license"] == "MIT"
    assert found["version"] == found["preferred-citation"]["version"]
    assert found["version"] == fairseq_moe_command.version()


def test_the_docker_file_installs_as_the_readme_does():
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    assert "--no-deps fairseq==0.12.2" in text
    for name in re.findall(r"/src/(\S+\.txt)", text):
        assert (ROOT / name).is_file()
    # a torch of another version would be replaced by PyPI's, with CUDA
    torch, *others = re.findall(r"pip install (.*?)(?:\n\n| \\\n)", text)
    assert torch.endswith("-c /tmp/torch.txt torch ${TORCH_INDEX}")
    assert all("-c /src/constraints.txt" in each or "--no-deps" in each for each in others)
    assert (
        "COPY constraints.txt /src/\nRUN grep ^torch== /src/constraints.txt > /tmp/torch.txt"
        in text
    )
    pins = re.findall("^torch==.*", (ROOT / "constraints.txt").read_text(), flags=re.M)
    image = {"python_version": re.search(r"FROM python:([\d.]+)", text)[1]}
    (pin,) = (p for p in map(Requirement, pins) if not p.marker or p.marker.evaluate(image))
    assert pin.specifier.contains(f"{str(pin.specifier)[2:]}+cpu")
