"""The notebook, the batch script and the files that describe the project."""

import json
import os
import re
import shlex
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


def test_the_batch_script_has_flags_that_exist(monkeypatch):
    from fairseq import options

    text = (ROOT / "examples" / "slurm" / "train.sbatch").read_text(encoding="utf-8")
    command = re.search(r"srun (fairseq-train .*?)\n\n|srun (fairseq-train .*)", text, flags=re.S)
    line = (command[1] or command[2]).replace("\\\n", " ")
    line = re.sub(r"\$\(\(.*?\)\)", "12345", line).replace("$DATA", "data").replace("$SAVE", "runs")
    line = line.replace("$SLURM_NTASKS", "16").replace('"$@"', "")
    words = shlex.split(line)
    monkeypatch.setattr(sys, "argv", words)
    args = options.parse_args_and_arch(options.get_training_parser(), words[1:])
    assert args.arch == "moe_lm_15b" and args.distributed_port == 12345
    assert args.distributed_world_size == 16
    # the same training as of the Hydra config
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
    assert args.moe_gate_loss_wt == config["criterion/moe_cross_entropy"]["moe_gate_loss_wt"]
    assert args.batch_size * args.update_freq[0] * 16 * args.tokens_per_sample == 2**19


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
