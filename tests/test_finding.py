"""The plugin is found by itself where a command line or a checkpoint names it, and only there."""

import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from branch_checkpoints import SMALL
from branch_files import random_tensors, write, write_dense
from fairseq import options, utils
from training import words, write_data_bin

from fairseq_today import finding

ROOT = Path(__file__).resolve().parent.parent
CODE = """
import importlib, sys
name, *arguments = sys.argv[1:]
sys.argv = ["fairseq-" + name, *arguments]
importlib.import_module("fairseq_cli." + name).cli_main()
print("PLUGIN", "fairseq_moe_ext" in sys.modules)
"""
MODEL = "--decoder-layers 2 --decoder-embed-dim 16 --decoder-ffn-embed-dim 16"
MODEL += " --decoder-attention-heads 2"
TRAIN = "--task language_modeling --tokens-per-sample 16 --batch-size 4 --optimizer adam --lr 0.01"
TRAIN += " --max-update 2 --num-workers 0 --cpu --no-progress-bar --no-epoch-checkpoints"
EVAL = "--gen-subset valid --tokens-per-sample 16 --batch-size 4 --cpu --num-workers 0"


def fairseq(folder, line):
    """A command of fairseq in a process of its own: what it says, and whether it has the plugin."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-c", CODE, *line.split()],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout + result.stderr, "PLUGIN True" in result.stdout


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finding")
    (folder / "bin").mkdir()
    rows = [[4 + (i + j) % 30 for j in range(9)] for i in range(20)]
    write_data_bin(folder / "bin", {"train": rows, "valid": rows}, words(36))
    return folder


def test_stock_lines_import_nothing_and_ours_the_plugin(work):
    code = f"""
import sys
from fairseq import options
def parse(line):
    options.parse_args_and_arch(options.get_training_parser(), line.split())
    return "fairseq_moe_ext" in sys.modules
assert not parse("bin {TRAIN} --arch transformer_lm {MODEL}")
assert parse("bin {TRAIN} --arch moe_transformer_lm {MODEL} --moe-freq 2 --moe-expert-count 2")
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], cwd=work, env=environment, check=True, timeout=60)


@pytest.mark.slow
def test_commands_with_and_without_the_plugin(work):
    stock = f"train bin {TRAIN} --arch transformer_lm {MODEL} --save-dir stock"
    assert not fairseq(work, stock)[1]
    assert not fairseq(work, f"eval_lm bin {EVAL} --path stock/checkpoint_last.pt")[1]
    ours = f"train bin {TRAIN} --arch=moe_transformer_lm {MODEL} --criterion moe_cross_entropy"
    assert fairseq(work, f"{ours} --moe-freq 2 --moe-expert-count 2 --save-dir ours")[1]
    state = torch.load(work / "ours" / "checkpoint_last.pt", weights_only=True)
    assert state["cfg"]["common"]["user_dir"] == str(ROOT / "fairseq_moe_ext")
    for command in (f"eval_lm bin {EVAL}", "validate bin --batch-size 4 --cpu --num-workers 0"):
        assert fairseq(work, f"{command} --path ours/checkpoint_last.pt")[1]
    write(str(work), SMALL, 40, 2, random_tensors(), name="sparse")
    write_dense(str(work), SMALL, 40, random_tensors(), name="dense")
    for name in ("sparse", "dense"):  # of the branch
        told, found = fairseq(work, f"eval_lm bin {EVAL} --path {name}.pt")
        assert found and "Perplexity" in told


def test_from_pretrained_without_the_plugin(work):
    write(str(work), SMALL, 40, 2, random_tensors(), name="sparse")
    code = "from fairseq.models.transformer_lm import TransformerLanguageModel as Model\n"
    code += "lm = Model.from_pretrained('.', 'sparse.pt', 'bin')\n"
    code += "assert type(lm.models[0]).__name__ == 'MoETransformerLanguageModel'"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", code], cwd=work, env=environment, check=True, timeout=60)


def test_the_names_are_those_that_the_plugin_registers():
    code = """
from fairseq.models import ARCH_MODEL_REGISTRY as models
from fairseq.tasks import TASK_REGISTRY as tasks
from fairseq.registry import REGISTRIES
import fairseq.criterions, fairseq.optim, fairseq.optim.lr_scheduler
from fairseq_today.finding import NAMES, import_plugin
kinds = {"arch": models, "task": tasks}
kinds.update({name: value["registry"] for name, value in REGISTRIES.items()})
before = {kind: set(registry) for kind, registry in kinds.items()}
import_plugin()
for kind, registry in kinds.items():
    new = {name for name in registry if kind in NAMES and NAMES[kind].fullmatch(name)}
    assert new == set(registry) - before[kind], (kind, new)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=60)


@pytest.fixture
def unfound(monkeypatch):
    """As if the plugin had not been imported, and what imports it."""
    imports = []
    monkeypatch.setattr(finding, "is_imported", lambda: bool(imports))
    monkeypatch.setattr(finding, "import_plugin", lambda *folder: imports.append(folder))
    return imports


@pytest.mark.parametrize("kind", ["eval_lm", "generation", "interactive_generation", "validation"])
def test_a_command_without_its_checkpoint_ends_in_one_line(kind, unfound, capsys):
    parser = getattr(options, f"get_{kind}_parser")()
    given = ["data", "--task", "language_modeling"]
    with pytest.raises(SystemExit) as stop:
        finding.parse_args_and_arch(None, parser, given)
    err = capsys.readouterr().err
    assert (stop.value.code, err) == (1, "error: --path is not given: name the checkpoint\n")


def test_a_folder_in_place_of_a_checkpoint_is_told_by_the_plugin(unfound, tmp_path):
    def lacks(*given):
        return finding._lacks_checkpoint(options.get_eval_lm_parser(), ["data", *given])

    assert lacks("--path", str(tmp_path)) and lacks(f"--path={tmp_path}") and lacks()
    assert not lacks("--path", str(tmp_path / "x.pt")) and not lacks("--help")
    assert not finding._lacks_checkpoint(options.get_training_parser(), ["data"])


@pytest.mark.parametrize("arch, named", [("moe_lm_tiny", True), ("transformer_lm", False)])
def test_a_user_dir_that_is_not_there(arch, named, unfound, monkeypatch):
    monkeypatch.setattr(sys, "argv", f"fairseq-train data --user-dir nodir -a {arch}".split())
    monkeypatch.setattr(utils, "import_user_module", lambda args: "the plugin's")
    told = finding.import_user_module(lambda args: "stock's", Namespace(user_dir="nodir"))
    assert told == ("the plugin's" if named else "stock's") and bool(unfound) is named


@pytest.mark.parametrize(
    "line, named",
    [
        ("data --arch moe_lm_tiny", True),
        ("data -a dense_lm_1_3b", True),
        ("data --task=mixture_language_modeling", True),
        ("data --criterion moe_cross_entropy", True),
        ("data --optimizer fused_adam", True),
        ("data --path a.pt:sparse.pt", True),
        ("data --finetune-from-model sparse-shared.pt", True),
        ("data --restore-file dense.pt", True),
        ("moe_lm_tiny --arch transformer_lm --save-dir moe_lm_tiny", False),
        ("data --path missing.pt", True),  # a model of the branch is beside it
        ("data --path elsewhere/missing.pt", False),
        ("data --arch moe_lm_tinny", True),
        ("data --arch=transformer_lm --moe-freq 2", True),
        ("data --path text.pt", False),
        ("data --arch", False),
    ],
)
def test_lines_that_name_it(tmp_path, monkeypatch, line, named):
    monkeypatch.chdir(tmp_path)
    write(".", SMALL, 40, 2, random_tensors(), name="sparse")
    write_dense(".", SMALL, 40, random_tensors(), name="dense")
    (tmp_path / "text.pt").write_text("no checkpoint")
    assert finding.line_names_it(line.split()) is named
