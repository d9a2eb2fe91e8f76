"""The tables of what is wrapped: complete, right about where, in force where they say and once."""

import ast
import importlib.util
import json
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import fairseq
import pytest
import torch
from fairseq.trainer import Trainer
from training import write_data_bin

import fairseq_today
from fairseq_moe_ext import cli, patch_list
from fairseq_moe_ext.patches import PATCHES
from fairseq_today import finding, registry

ROOT = Path(__file__).resolve().parent.parent
OURS = str(ROOT / "fairseq_moe_ext"), str(ROOT / "fairseq_today")
TABLES = (*fairseq_today.PATCHES, *finding.PATCHES, *PATCHES)
CITED = re.compile(r"(?:((?:fairseq|fairseq_cli|fairscale)/)?([\w/]+\.pyx?))?:(\d+)")


def test_a_function_is_wrapped_by_one_row_of_the_plugin():
    targets = [target for patch in PATCHES for target in patch.targets]
    assert len(set(targets)) == len(targets)


@pytest.mark.parametrize("patch", TABLES, ids=lambda patch: patch.targets[0])
def test_a_row_says_why_and_where(patch):
    assert len(patch.why) > 10 and patch.ends
    assert "@0.12.2" in patch.where or "@0.4.13" in patch.where
    parent = Path(fairseq.__file__).parents[1]
    folder = path = None
    for top, name, line in CITED.findall(patch.where):
        if name:
            if top == "fairscale/" and importlib.util.find_spec("fairscale") is None:
                return
            folder = parent / top if top else path.parent
            path = folder / name
            path = path if path.is_file() else parent / "fairseq" / name
        assert int(line) <= len(path.read_text().splitlines()), (path, line)
    assert path is not None, patch.where


def test_what_is_wrapped_is_there():
    """Had fairseq no such function, a row would make one that nobody calls."""
    for patch in TABLES:
        if not patch.condition.holds():
            continue
        for target in patch.targets:
            module, _, name = target.partition(":")
            found = importlib.import_module(module)
            if name == "eval":
                continue
            for part in name.split("."):
                found = getattr(found, part)
            assert getattr(found, "__wrapped__", True) is not None, target


# names of fairseq that are set while a function runs, and the group of its reductions
WITHIN = {"commands.py: utils.dist", "hydra.py: hydra_utils.run_and_report"}
WITHIN |= {"commands.py: utils.get_global_group._global_group"}


def test_nothing_else_is_wrapped():
    """No file sets a name of fairseq, fairscale, torch or hydra but by the tables."""
    found = set()
    for package in ("fairseq_moe_ext", "fairseq_today"):
        for path in sorted((ROOT / package).rglob("*.py")):
            tree = ast.parse(path.read_text())
            theirs = set()
            for node in ast.walk(tree):
                if isinstance(node, ast.ImportFrom):
                    top = (node.module or "").split(".")[0] if node.level == 0 else ""
                elif isinstance(node, ast.Import):
                    top = node.names[0].name.split(".")[0]
                else:
                    continue
                if top in ("fairseq", "fairseq_cli", "fairscale", "torch", "hydra", "omegaconf"):
                    theirs |= {alias.asname or alias.name.split(".")[0] for alias in node.names}
            for node in ast.walk(tree):
                targets = node.targets if isinstance(node, ast.Assign) else []
                for target in targets:
                    base = target
                    while isinstance(base, ast.Attribute):
                        base = base.value
                    if base is not target and isinstance(base, ast.Name) and base.id in theirs:
                        found.add(f"{path.name}: {ast.unparse(target)}")
    assert found - {"on_cpu.py: fp16_optimizer.torch.cuda.current_device"} == WITHIN


def test_a_row_is_put_in_force_once_and_where_it_is_needed(monkeypatch):
    module = types.ModuleType("wrapped_here")
    module.double = lambda x: 2 * x
    module.Kind = type("Kind", (), {"name": classmethod(lambda cls: cls.__name__)})
    monkeypatch.setitem(sys.modules, "wrapped_here", module)

    def more(stock, x):
        return stock(x) + 1

    def loud(stock, cls):
        return stock(cls).upper()

    table = (
        registry.wrap("wrapped_here:double", more, "here"),
        registry.wrap("wrapped_here:Kind.name", loud, "here"),
        registry.replace("wrapped_here:size", lambda stock: (stock, 3), "here"),
        registry.wrap(
            "wrapped_here:double", more, "here", "", registry.Condition("no", lambda: False)
        ),
    )
    for _ in range(2):
        registry.apply(table)
    assert module.double(5) == 11 and module.Kind.name() == "KIND" and module.size == (None, 3)
    assert [registry.is_in_force(p, p.targets[0]) for p in table] == [True, True, True, False]


# Every function of fairseq and fairscale in whose place stands one of a file of ours.
WRAPPED = """
import json, sys, types
found = set()
def look(name, owner, attribute):
    value = vars(owner).get(attribute)
    value = getattr(value, "__func__", value)
    code = getattr(value, "__code__", None)
    if code is not None and code.co_filename.startswith(OURS):
        found.add(name + attribute)
for module in list(sys.modules.values()):
    name = getattr(module, "__name__", "")
    if not name.split(".")[0] in ("fairseq", "fairseq_cli", "fairscale"):
        continue
    for attribute, value in list(vars(module).items()):
        if isinstance(value, types.FunctionType):
            look(value.__module__ + ":", module, attribute)
        elif isinstance(value, type) and value.__module__ == name:
            for inner in list(vars(value)):
                look(f"{name}:{value.__name__}.", value, inner)
"""
STOCK = (
    """
import sys
sys.argv = ["fairseq-train", *sys.argv[1:]]
from fairseq_cli import train
train.cli_main()
"""
    + WRAPPED
    + """
views = [m.__name__ for m in list(sys.modules.values()) if "torch" in vars(m)
         and type(vars(m)["torch"]).__name__ == "View"]
print(json.dumps([sorted(found), sorted(views), "fairseq_moe_ext" in sys.modules,
                  sys.excepthook is sys.__excepthook__]))
"""
)


def test_a_training_of_fairseqs_own_has_only_what_it_needs_to_run(tmp_path):
    """Where the plugin is installed, and the command line names nothing of it."""
    rows = [range(4, 11)] * 8
    write_data_bin(tmp_path, {"train": rows, "valid": rows})
    line = f"{tmp_path} --task language_modeling --arch transformer_lm --decoder-layers 1"
    line += " --decoder-embed-dim 8 --decoder-ffn-embed-dim 8 --decoder-attention-heads 1"
    line += " --tokens-per-sample 8 --batch-size 4 --optimizer adam --lr 0.01 --max-update 1"
    line += " --num-workers 0 --cpu --no-save --log-format none"
    result = subprocess.run(
        [sys.executable, "-c", f"import fairseq_moe_ext_hook; OURS = {OURS!r}" + STOCK]
        + line.split(),
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    found, views, plugin, quiet = json.loads(result.stdout.splitlines()[-1])
    assert not plugin and quiet
    allowed = {
        target.split(":")[1]
        for patch in (*fairseq_today.PATCHES, *finding.PATCHES)
        for target in patch.targets
    }
    assert {name.split(":")[1] for name in found} <= allowed
    assert {"parse_args_and_arch", "load_checkpoint_to_cpu", "add_defaults"} <= {
        name.split(":")[1] for name in found
    }
    assert "fairseq.checkpoint_utils" in views and "fairseq.trainer" in views


def test_the_command_prints_every_row(capsys):
    assert cli.main(["patches"]) == 0
    told = capsys.readouterr().out
    for patch in TABLES:
        for target in patch.targets:
            assert target in told
    assert told.count("needed: ") == len(TABLES)
    assert "fairseq.distributed.utils:call_main\n" in told
    row = next(p for p in PATCHES if p.targets == ("fairseq.utils:clip_grad_norm_",))
    assert patch_list.state(row) == "in force"
    late = next(p for p in PATCHES if p.targets == ("fairseq_cli.train:main",))
    assert patch_list.state(late) in ("in force", "when the command is imported")


def test_each_reason_can_be_read_alone():
    """Names in references such as "Like generate" are our own, and no row has them."""
    whys = [patch.why for _, table in patch_list.TABLES for patch in table]
    assert len(whys) > 60
    assert [why for why in whys if re.match(r"(As|Like|See) |For `", why)] == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="stock's own function runs there")
@pytest.mark.parametrize("update", [0, 7])
def test_an_update_has_the_random_numbers_of_stock(update, monkeypatch):
    """Without torch.manual_seed, which takes milliseconds where there is no GPU."""
    torch.manual_seed(3 + update)
    expected = torch.rand(5)
    common = types.SimpleNamespace(seed=3)
    trainer = types.SimpleNamespace(
        device=torch.device("cpu"),
        tpu=False,
        cfg=types.SimpleNamespace(common=common),
        get_num_updates=lambda: update,
    )
    monkeypatch.setattr(torch, "manual_seed", None)
    Trainer._set_seed(trainer)
    assert torch.equal(torch.rand(5), expected)


def test_a_bias_that_is_off_is_not_shared():
    """Only what is tied is named, as stock names it."""
    from fairseq.trainer import _catalog_shared_params
    from torch import nn

    model = nn.ModuleDict({name: nn.Linear(2, 2, bias=False) for name in "abc"})
    assert _catalog_shared_params(model) == []
    model["c"].weight = model["a"].weight
    assert _catalog_shared_params(model) == [["a.weight", "c.weight"]]
