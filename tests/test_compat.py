"""Stock fairseq on today's Python, torch, numpy and hydra: every patch, and every console script.

Only stock models are used here; ours have their own tests.
"""

import argparse
import dataclasses
import importlib.util
import io
import os
import pickle
import re
import shutil
import socket
import struct
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import numpy
import pytest
import torch
from fairseq import checkpoint_utils, utils
from fairseq.data import Dictionary, TokenBlockDataset, data_utils, indexed_dataset
from fairseq.dataclass.configs import FairseqConfig
from fairseq.distributed import utils as distributed_utils
from omegaconf import OmegaConf

import fairseq_moe_ext
import fairseq_today
from fairseq_moe_ext import patches
from fairseq_moe_ext.errors import UserError
from fairseq_moe_ext.patches.messages import mistake_to_print
from fairseq_today import imports, registry

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
PLUGIN = ROOT / "fairseq_moe_ext"
MODEL = "--task language_modeling --arch transformer_lm_gpt2_tiny --tokens-per-sample 32"
TRAIN = f"{MODEL} --optimizer adam --lr 0.001 --max-tokens 256 --num-workers 0 --no-progress-bar"
ENVIRONMENT = {key: value for key, value in os.environ.items() if key != "LOGLEVEL"}
ENVIRONMENT["OMP_NUM_THREADS"] = "1"

on_cpu_only = pytest.mark.skipif(torch.cuda.is_available(), reason="this is about a CPU alone")


def run(line, folder, **kwargs):
    """Run a console script of this environment as a user would."""
    script, *arguments = line.split()
    command = [str(BIN / script), *arguments]
    return subprocess.run(
        command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=120, **kwargs
    )


def succeeded(result):
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout + result.stderr


def one_error(result):
    """The one error line of a command that failed without a traceback."""
    assert result.returncode == 1, result.stderr[-3000:]
    assert "Traceback" not in result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == 1, result.stderr[-3000:]
    return lines[0]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with a data-bin `bin`, made by fairseq-preprocess with two workers."""
    folder = tmp_path_factory.mktemp("work")
    for split, lines in (("train", 120), ("valid", 20), ("test", 10)):
        text = [" ".join(f"w{(3 * i + j) % 23}" for j in range(5 + i % 7)) for i in range(lines)]
        (folder / f"{split}.txt").write_text("\n".join(text) + "\n")
    files = "--trainpref train.txt --validpref valid.txt --testpref test.txt"
    succeeded(run(f"fairseq-preprocess --only-source {files} --destdir bin --workers 2", folder))
    return folder


@pytest.fixture(scope="module")
def trained(work):
    """The same folder with checkpoints of three updates in `ck`."""
    result = run(f"fairseq-train bin {TRAIN} --max-update 3 --save-dir ck", work)
    assert "num_updates 3" in succeeded(result)
    return result


@pytest.fixture
def command(monkeypatch, work, capsys):
    """Run a command of fairseq within this process; its status, and what it wrote to stderr."""

    def call(name, line):
        module = __import__(f"fairseq_cli.{name}", fromlist=["cli_main"])
        monkeypatch.setattr(sys, "argv", [f"fairseq-{name}", *line.split()])
        monkeypatch.chdir(work)
        capsys.readouterr()
        try:
            module.cli_main()
            status = 0
        except SystemExit as stop:
            status = stop.code
        return status, capsys.readouterr().err

    return call


# --- The hook -----------------------------------------------------------------------------------


def python(code, *options):
    result = subprocess.run(
        [sys.executable, *options, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr
    return result


def test_without_fairseq_the_hook_loads_nothing():
    code = "import sys; before = set(sys.modules); import fairseq_moe_ext_hook as hook\n"
    code += "print(hook.FairseqFinder in sys.meta_path, sorted(set(sys.modules) - before))\n"
    code += "import dataclasses, fractions, http.client\n"  # whatever is not fairseq
    code += "late = ('fairseq_moe_ext.', 'fairseq_today', 'torch', 'numpy')\n"
    code += "print([m for m in sys.modules if m.startswith(late)])"
    first, second = python(code, "-S").stdout.splitlines()
    assert first == "True ['fairseq_moe_ext_hook']"
    assert second == "[]"


def test_the_hook_imports_nothing_else_at_the_start():
    """What would cost milliseconds; the time itself depends on what else the machine does."""
    code = "import sys; before = set(sys.modules); import fairseq_moe_ext_hook\n"
    code += "print(sorted(set(sys.modules) - before))"
    assert python(code, "-S").stdout.strip() == "['fairseq_moe_ext_hook']"


def test_the_hook_and_the_package_share_one_module_and_one_error_class():
    code = "import fairseq_moe_ext_hook, fairseq, sys\n"
    code += "early, before = sys.modules['fairseq_today'], fairseq.options.parse_args_and_arch\n"
    code += "assert 'fairseq_moe_ext' not in sys.modules and before.__wrapped__\n"
    code += "import fairseq_moe_ext, fairseq_moe_ext.errors\n"
    code += "assert fairseq_moe_ext.fairseq_today is early\n"
    code += "assert fairseq_moe_ext.errors.UserError is early.errors.UserError\n"
    code += "assert fairseq.options.parse_args_and_arch.__wrapped__ is before\n"
    code += "assert fairseq.__spec__.loader.__class__.__name__ == 'SourceFileLoader'"
    python(code)


def test_without_the_hook_the_package_patches_fairseq_itself():
    code = "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'Fairseq' not in repr(f)]\n"
    code += "import fairseq_moe_ext, fairseq.distributed.utils as u\n"
    code += "assert u.call_main.__wrapped__"
    python(code)


def test_patches_are_applied_once():
    before = registry.wrapped(), distributed_utils.call_main
    fairseq_today.apply()
    registry.apply(patches.PATCHES)
    assert (registry.wrapped(), distributed_utils.call_main) == before


# --- Importing fairseq --------------------------------------------------------------------------


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.11 made the check strict")
def test_dataclass_defaults_are_relaxed_for_fairseq_only():
    @dataclasses.dataclass
    class Inner:
        x: int = 0

    def declare(module):
        names = {"__module__": module, "__annotations__": {"inner": Inner}, "inner": Inner()}
        return dataclasses.dataclass(type("Outer", (), names))

    with pytest.raises(ValueError, match="mutable default"):
        declare("fairseq.x")  # fairseq is imported: the check is as strict as ever
    with imports.relaxed_dataclass_defaults():
        assert declare("fairseq.x")().inner == Inner()
        with pytest.raises(ValueError, match="mutable default"):
            declare("elsewhere")
    assert Inner.__hash__ is None


def test_no_known_warning_is_printed(trained):
    assert "Warning" not in trained.stderr


# --- Data ---------------------------------------------------------------------------------------


def test_numpy_aliases_reach_the_lines_that_use_them():
    blocks = TokenBlockDataset(
        [torch.tensor([4, 5, 2]), torch.tensor([6, 2])],
        [3, 2],
        None,
        pad=1,
        eos=2,
        break_mode="eos",
    )
    assert [block.tolist() for block in blocks] == [[4, 5, 2], [6, 2]]
    mask = data_utils.compute_mask_indices((1, 40), None, 0.5, 4, "uniform", 2, no_overlap=True)
    assert mask.any()
    from fairseq.modules import dynamic_crf_layer

    assert dynamic_crf_layer.np.float("inf") == float("inf")


def test_numpy_itself_stays_as_it_is():
    code = "import numpy; before = set(dir(numpy)); import fairseq; print(set(dir(numpy)) - before)"
    added = python(code).stdout.strip().splitlines()[-1]
    assert "'int'" not in added and "'compat'" not in added


def test_offsets_beyond_2_gib_are_right(tmp_path):
    builder = indexed_dataset.MMapIndexedDatasetBuilder(str(tmp_path / "x.bin"), dtype=numpy.uint16)
    builder._sizes = list(numpy.full(5, 2**30, dtype=numpy.int32))  # as merge_file_ collects them
    builder.finalize(str(tmp_path / "x.idx"))
    index = indexed_dataset.MMapIndexedDataset.Index(str(tmp_path / "x.idx"))
    assert index._pointers.tolist() == [i * 2**31 for i in range(5)]


def copy_of_data(work, folder):
    for name in ("train.bin", "train.idx"):
        (folder / name).write_bytes((work / "bin" / name).read_bytes())
    return str(folder / "train")


@pytest.mark.parametrize("lost", [1, 100])
@pytest.mark.parametrize("name", ["train.bin", "train.idx"])
@pytest.mark.filterwarnings("error")  # an exception in __del__, too
def test_a_truncated_data_bin_is_named_with_both_sizes(work, tmp_path, name, lost):
    path = copy_of_data(work, tmp_path)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[:-lost])
    with pytest.raises(UserError) as caught:
        data_utils.load_indexed_dataset(path)
    assert str(tmp_path / name) in str(caught.value)
    assert f"{len(content) - lost} bytes" in str(caught.value)
    assert str(len(content)) in str(caught.value)


@pytest.mark.parametrize("missing", ["train.bin", "train.idx"])
def test_half_a_data_bin_is_named(work, tmp_path, missing):
    path = copy_of_data(work, tmp_path)
    (tmp_path / missing).unlink()
    with pytest.raises(UserError, match=f"{missing}: missing"):
        data_utils.load_indexed_dataset(path)


@pytest.mark.parametrize("length", [0, 7, 20])
def test_a_header_cut_short_is_named(work, tmp_path, length):
    path = copy_of_data(work, tmp_path)
    content = Path(path + ".idx").read_bytes()
    Path(path + ".idx").write_bytes(content[:length])
    with pytest.raises(UserError, match=rf"train\.idx: .*{length} bytes"):
        data_utils.load_indexed_dataset(path)


def test_a_data_bin_without_tokens_is_named(tmp_path):
    builder = indexed_dataset.MMapIndexedDatasetBuilder(str(tmp_path / "x.bin"))
    builder.finalize(str(tmp_path / "x.idx"))
    with pytest.raises(UserError, match=r"x\.bin: holds no tokens"):
        data_utils.load_indexed_dataset(str(tmp_path / "x"))


def test_a_whole_data_bin_loads_and_pickles(work):
    dataset = data_utils.load_indexed_dataset(str(work / "bin" / "train"))
    assert len(dataset) == 120
    again = pickle.loads(pickle.dumps(dataset))  # as workers of a data loader get it
    assert again[7].tolist() == dataset[7].tolist()
    (work / "bin" / "train.idx").stat()


# --- Checkpoints --------------------------------------------------------------------------------


def state(**more):
    """The least that fairseq calls a checkpoint."""
    history = [{"optimizer_name": "x", "lr_scheduler_state": {}, "num_updates": 1}]
    extra = {"train_iterator": {"epoch": 1}}
    return {"model": {}, "optimizer_history": history, "extra_state": extra, **more}


def test_a_checkpoint_with_settings_and_numpy_numbers_loads(tmp_path):
    path = str(tmp_path / "x.pt")
    args = argparse.Namespace(arch="transformer_lm", lr=[0.1])
    best = [numpy.float64(1.5), numpy.float32(2.5), numpy.int64(3)]
    counts = numpy.array([3, 2, 1, 0])  # stock's --eval-bleu logs such
    torch.save(state(note=args, best=best, counts=counts, names=OrderedDict(a=1)), path)
    loaded = checkpoint_utils.load_checkpoint_to_cpu(path)
    assert loaded["note"] == args
    assert loaded["best"] == best
    assert (loaded["counts"] == counts).all()


def test_an_array_of_objects_is_refused(tmp_path):
    torch.save(state(best=numpy.array([Touch(str(tmp_path / "made"))])), tmp_path / "x.pt")
    with pytest.raises(UserError, match="x.pt: "):
        checkpoint_utils.load_checkpoint_to_cpu(str(tmp_path / "x.pt"))
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("module", ["numpy.core.multiarray", "numpy._core.multiarray"])
def test_a_numpy_number_of_the_other_numpy_loads(tmp_path, module):
    torch.save(state(best=numpy.float64(1.5)), tmp_path / "x.pt", pickle_protocol=2)
    import zipfile

    with zipfile.ZipFile(tmp_path / "x.pt") as old, zipfile.ZipFile(tmp_path / "y.pt", "w") as new:
        for item in old.infolist():
            content = old.read(item)
            if item.filename.endswith("data.pkl"):
                names = rb"cnumpy\._?core\.multiarray\nscalar\n"
                content, count = re.subn(names, f"c{module}\nscalar\n".encode(), content)
                assert count == 1
            new.writestr(item, content)
    assert checkpoint_utils.load_checkpoint_to_cpu(str(tmp_path / "y.pt"))["best"] == 1.5


class Touch:
    """An object whose unpickling makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("new_format", [True, False])
def test_a_checkpoint_that_runs_code_is_refused_in_one_line(tmp_path, new_format):
    path = tmp_path / "bad.pt"
    torch.save(state(x=Touch(tmp_path / "ran")), path, _use_new_zipfile_serialization=new_format)
    with pytest.raises(UserError) as caught:
        checkpoint_utils.load_checkpoint_to_cpu(str(path))
    assert f"{path}: refused" in str(caught.value) and ".system" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("length", [0, 10, 2000, -100])
def test_a_truncated_checkpoint_is_named(tmp_path, length):
    path = tmp_path / "cut.pt"
    torch.save(state(x=torch.zeros(1000)), path)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(UserError, match=re.escape(str(path))) as caught:
        checkpoint_utils.load_checkpoint_to_cpu(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"hello\n", b"12 lines\n", b"a\nb\n", b"(dp0\n.", b"u" * 50])
def test_a_file_that_is_no_checkpoint_is_named(tmp_path, content):
    path = tmp_path / "notes.pt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=re.escape(f"{path}: ")) as caught:
        checkpoint_utils.load_checkpoint_to_cpu(str(path))
    message = str(caught.value)
    assert "not a checkpoint" in message and f"{len(content)} bytes" in message
    assert "\n" not in message and "weights_only" not in message and len(message) < 300


def test_torch_load_itself_is_untouched(tmp_path):
    assert torch.load.__module__ == "torch.serialization"
    buffer = io.BytesIO()
    torch.save({1, 2}, buffer)
    buffer.seek(0)
    assert torch.load(buffer, weights_only=False) == {1, 2}


def test_a_copy_that_breaks_off_leaves_the_last_checkpoint_whole(tmp_path, monkeypatch):
    source, target = tmp_path / "checkpoint_best.pt", tmp_path / "checkpoint_last.pt"
    source.write_bytes(b"new")
    target.write_bytes(b"old")

    def killed(source, target):
        Path(target).write_bytes(b"n")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("shutil.copyfile", killed)
        with pytest.raises(KeyboardInterrupt):
            checkpoint_utils.PathManager.copy(str(source), str(target), overwrite=True)
    assert target.read_bytes() == b"old"
    assert checkpoint_utils.PathManager.copy(str(source), str(target), overwrite=True)
    assert target.read_bytes() == b"new"


# --- Training in this process -------------------------------------------------------------------


PRECISIONS = ["--fp16", "--memory-efficient-fp16", "--bf16", "--memory-efficient-bf16"]


@pytest.mark.parametrize(
    "precision",
    [pytest.param(p, marks=[pytest.mark.slow] if p in PRECISIONS[::3] else []) for p in PRECISIONS],
)
def test_half_precision_trains_and_resumes(command, work, tmp_path, precision):
    line = f"bin {TRAIN} {precision} --save-dir {tmp_path}"
    assert command("train", f"{line} --max-update 2")[0] == 0
    first = torch.load(tmp_path / "checkpoint_last.pt", weights_only=True)
    assert command("train", f"{line} --max-update 4")[0] == 0
    saved = torch.load(tmp_path / "checkpoint_last.pt", weights_only=True)
    assert saved["optimizer_history"][-1]["num_updates"] == 4
    weight = saved["model"]["decoder.layers.0.fc1.weight"]  # saved as float32 by fairseq
    half = torch.bfloat16 if "bf16" in precision else torch.float16
    assert weight.equal(weight.to(half).float())
    assert not weight.equal(first["model"]["decoder.layers.0.fc1.weight"])  # it did train


@on_cpu_only
@pytest.mark.parametrize(
    "precision", [PRECISIONS[0], pytest.param(PRECISIONS[1], marks=pytest.mark.slow)]
)
def test_a_gradient_overflow_is_skipped_on_cpu(command, work, tmp_path, caplog, precision):
    line = f"bin {TRAIN} {precision} --save-dir {tmp_path} --max-update 2"
    with caplog.at_level("INFO"):
        status, _ = command("train", f"{line} --fp16-init-scale 1073741824")
    assert status == 0
    assert "gradient overflow detected" in caplog.text


def test_a_tpu_is_still_a_tpu(capsys):
    from fairseq import options

    parse = options.parse_args_and_arch
    arguments = ["bin", "--task", "language_modeling", "--arch", "transformer_lm_gpt2_tiny"]
    assert parse(options.get_training_parser(), [*arguments, "--bf16"]).tpu is False
    assert parse(options.get_training_parser(), [*arguments, "--bf16", "--tpu"]).tpu is True
    with pytest.raises(SystemExit):
        parse(options.get_training_parser(), [*arguments, "--bf16", "--fp16"])
    assert capsys.readouterr().err.startswith("error: --fp16 and --bf16")


def test_a_second_job_knows_nothing_of_the_first(command, work, tmp_path):
    good = f"bin {TRAIN} --max-update 3 --patience 1 --lr 0.01 --save-dir {tmp_path / 'good'}"
    bad = f"bin {TRAIN} --max-update 3 --patience 1 --lr 0.0000001 --save-dir {tmp_path / 'bad'}"
    assert command("train", good)[0] == 0
    assert command("train", bad)[0] == 0
    assert (tmp_path / "bad" / "checkpoint_best.pt").exists()
    best = [
        torch.load(tmp_path / run / "checkpoint_best.pt", weights_only=True)["extra_state"]
        for run in ("good", "bad")
    ]
    assert best[0]["best"] < best[1]["best"] == best[1]["val_loss"]
    import fairseq_cli.train

    assert fairseq_cli.train.should_stop_early.best == best[1]["best"]


def test_patience_goes_on_where_it_was(command, work, tmp_path):
    """Nothing is learned, so no validation after the first, at update 2, is better: with
    --patience 3 the run ends at update 8, also when it was killed after update 4."""
    flags = "--lr 1e-30 --max-update 20 --save-interval-updates 2 --batch-size 1 --patience 3"
    line = f"bin {TRAIN} {flags} --save-dir"

    def updates(folder):
        assert command("train", f"{line} {folder}")[0] == 0
        state = torch.load(folder / "checkpoint_last.pt", weights_only=True)
        return state["optimizer_history"][-1]["num_updates"], state["extra_state"]

    whole, last = updates(tmp_path / "whole")
    (tmp_path / "killed").mkdir()
    shutil.copy(
        tmp_path / "whole" / "checkpoint_1_4.pt", tmp_path / "killed" / "checkpoint_last.pt"
    )
    killed, resumed = updates(tmp_path / "killed")
    assert whole == killed == 8
    assert last["should_stop_early"] == resumed["should_stop_early"]
    assert last["should_stop_early"] == {"best": last["best"], "num_runs": 3}
    # of before, with the best loss alone: updates 6, 8 and 10 are no better
    old = torch.load(tmp_path / "whole" / "checkpoint_1_4.pt", weights_only=True)
    del old["extra_state"]["should_stop_early"]
    (tmp_path / "old").mkdir()
    torch.save(old, tmp_path / "old" / "checkpoint_last.pt")
    assert updates(tmp_path / "old")[0] == 10
    # without the meters: update 6 is the best anew
    killed = tmp_path / "whole" / "checkpoint_1_4.pt"
    new = f"{line} {tmp_path / 'new'} --reset-meters --restore-file {killed}"
    assert command("train", new)[0] == 0
    state = torch.load(tmp_path / "new" / "checkpoint_last.pt", weights_only=True)
    assert state["optimizer_history"][-1]["num_updates"] == 12


# --- Errors -------------------------------------------------------------------------------------


@on_cpu_only
@pytest.mark.parametrize(
    "options, words",
    [
        ("--distributed-world-size 2", "--distributed-world-size 2: .*torchrun"),
        (
            "--distributed-world-size 2 --distributed-init-method tcp://localhost:23456",
            "--distributed-world-size 2: .*torchrun",
        ),
        (
            "--distributed-world-size 2 --distributed-no-spawn "
            "--distributed-init-method tcp://localhost:23456",
            "--distributed-backend nccl: .*gloo",
        ),
    ],
)
def test_processes_that_cannot_start_are_an_error(command, options, words):
    status, err = command("train", f"bin {TRAIN} --max-update 1 --no-save {options}")
    assert status == 1
    assert re.search(f"^error: {words}", err, flags=re.M)
    assert "Traceback" not in err


def test_a_mistake_is_found_behind_other_exceptions():
    def chained(inner, explicit):
        try:
            try:
                raise inner
            except Exception as error:
                raise Exception("outer") from (error if explicit else None)
        except Exception as error:
            return error

    find = mistake_to_print
    assert find(UserError("a")) == "a"
    assert find(chained(UserError("a"), explicit=True)) == "a"
    assert find(chained(FileNotFoundError("a"), explicit=True)) is None  # somebody dealt with it
    assert find(FileNotFoundError(2, "No such file", "x.txt")) == "x.txt: no such file or folder"
    assert find(ValueError("a bug")) is None


def test_what_is_missing_is_named_with_what_is_there(tmp_path):
    find = mistake_to_print
    model, data = tmp_path / "best.pt", tmp_path / "train"
    no_model = OSError(f"Model file not found: {model}")
    no_data = FileNotFoundError(f"Dataset not found: train ({data})")
    assert find(no_model) == f"{model}: no such checkpoint; there is no *.pt in {tmp_path}"
    assert find(no_data) == f"{data}.idx: no such data-bin; there is no *.idx in {tmp_path}"
    for name in (*(f"checkpoint{i}.pt" for i in range(7)), "test.idx"):
        (tmp_path / name).touch()
    there = ", ".join(f"checkpoint{i}.pt" for i in range(5))
    assert find(no_model) == f"{model}: no such checkpoint; {tmp_path} has {there} and 2 more"
    assert find(no_data) == f"{data}.idx: no such data-bin; {tmp_path} has test.idx"


def fail(rank):
    raise UserError("--moe-expert-count 0: too few")


def test_a_mistake_in_a_spawned_process_is_found():
    with pytest.raises(Exception) as caught:  # noqa: B017  (its class has moved between versions)
        torch.multiprocessing.spawn(fail, nprocs=1)
    assert mistake_to_print(caught.value) == "--moe-expert-count 0: too few"


def test_a_missing_dataset_is_one_line(command):
    status, err = command("train", f"nowhere {TRAIN} --max-update 1 --no-save")
    assert status == 1
    assert [line for line in err.splitlines() if line.startswith("error:")] == [
        "error: nowhere/dict.txt: no such file; "
        "a data folder is made by fairseq-preprocess or fairseq-moe prepare"
    ]
    assert "Traceback" not in err


def test_debugging_keeps_the_traceback(command, monkeypatch):
    monkeypatch.setenv("LOGLEVEL", "DEBUG")
    with pytest.raises(FileNotFoundError):
        command("train", f"nowhere {TRAIN} --max-update 1 --no-save")


# --- The console scripts ------------------------------------------------------------------------


def test_eval_lm(work, trained):
    line = "--task language_modeling --path ck/checkpoint_best.pt --tokens-per-sample 32"
    output = succeeded(run(f"fairseq-eval-lm bin {line} --gen-subset test --max-tokens 256", work))
    perplexity = float(re.search(r"Perplexity: ([\d.]+)", output).group(1))
    assert 1 < perplexity < 64  # at worst about that of guessing among 32 types


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


# --- Several processes --------------------------------------------------------------------------

RANKS = """
import sys, time
import torch, torch.distributed as dist
dist.init_process_group("gloo")
from types import SimpleNamespace
from fairseq.distributed import utils
from fairseq.models import DistributedFairseqModel
rank = dist.get_rank()
assert utils.all_gather_list({"rank": rank}) == [{"rank": 0}, {"rank": 1}]
sent = {"t": torch.arange(3), "n": [1.5, "text"]} if rank == 0 else None
got = utils.broadcast_object(sent, src_rank=0, group=utils.get_global_group())
assert got["t"].tolist() == [0, 1, 2] and got["n"] == [1.5, "text"], got
args = SimpleNamespace(tpu=False, ddp_backend="pytorch_ddp", device_id=rank,
    broadcast_buffers=False, bucket_cap_mb=25, find_unused_parameters=False,
    gradient_as_bucket_view=False, ddp_comm_hook="none", heartbeat_timeout=-1)
layer = torch.nn.Linear(2, 1, bias=False)
model = DistributedFairseqModel(args, layer, utils.get_global_group(), torch.device("cpu"))
model(torch.full((1, 2), float(rank))).sum().backward()
assert layer.weight.grad.tolist() == [[0.5, 0.5]], layer.weight.grad
time.sleep(0.1)  # as commands.py's _part
"""


@on_cpu_only
def test_objects_and_gradients_go_between_processes(tmp_path):
    (tmp_path / "ranks.py").write_text(RANKS)
    succeeded(run("torchrun --nproc_per_node 2 --master_port 29631 ranks.py", tmp_path))


LOSS = """
import os, pathlib, sys, time
import torch, torch.distributed as dist
from fairseq.dataclass.configs import FairseqConfig
from fairseq.distributed import utils
from omegaconf import OmegaConf
import fairseq_moe_ext

def main(cfg):
    dist.all_reduce(torch.zeros(1))
    if dist.get_rank() == 1:
        if sys.argv[1] == "killed":
            os.kill(os.getpid(), 9)
        time.sleep(60)
    dist.all_reduce(torch.zeros(1))

pathlib.Path("ready" + os.environ["RANK"]).touch()
while sys.argv[1] != "alone" and len(list(pathlib.Path().glob("ready*"))) < 2:
    time.sleep(0.01)  # imports take long on a busy machine: the limit is to count from here
cfg = OmegaConf.structured(FairseqConfig)
cfg.model = {}
cfg.distributed_training.distributed_backend = "gloo"
cfg.distributed_training.heartbeat_timeout = 60 if sys.argv[1] == "killed" else 5
utils.call_main(cfg, main)
"""


def start_rank(rank, tmp_path, how, port, world=2):
    """A process as SLURM or torchrun starts it, but alone."""
    (tmp_path / "loss.py").write_text(LOSS)
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return subprocess.Popen(
        [BIN / "python", "loss.py", how],
        cwd=tmp_path,
        env={**os.environ, **where, "WORLD_SIZE": str(world), "RANK": str(rank)},
        stderr=subprocess.PIPE,
        text=True,
    )


def its_error(process):
    _, stderr = process.communicate(timeout=200)
    errors = [line for line in stderr.splitlines() if line.startswith("error:")]
    assert process.returncode == 1 and len(errors) == 1 and "Traceback" not in stderr, stderr
    return errors[0]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@on_cpu_only
@pytest.mark.parametrize("how", ["killed", pytest.param("silent", marks=pytest.mark.slow)])
def test_a_process_that_is_gone_ends_the_others_with_one_line(tmp_path, how):
    port = free_port()
    first, second = (start_rank(rank, tmp_path, how, port) for rank in (0, 1))
    try:
        assert "another process has stopped or no longer answers" in its_error(first)
    finally:
        second.kill()
        second.communicate()


@on_cpu_only
def test_a_port_in_use_is_told(tmp_path):
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = taken.getsockname()[1]
        message = its_error(start_rank(0, tmp_path, "alone", port))
    assert f"127.0.0.1:{port}: the port is in use" in message and "--distributed-port" in message


@on_cpu_only
@pytest.mark.slow
def test_processes_that_cannot_meet_say_so(tmp_path):
    message = its_error(start_rank(1, tmp_path, "alone", free_port()))
    assert "not all 2 processes met" in message


@on_cpu_only
@pytest.mark.slow
@pytest.mark.parametrize("backend", ["pytorch_ddp", "legacy_ddp"])
def test_two_processes_train_and_resume(work, tmp_path, backend):
    line = f"torchrun --nproc_per_node 2 --master_port 29632 {BIN / 'fairseq-train'} bin {TRAIN}"
    line += f" --distributed-backend gloo --ddp-backend {backend} --save-dir {tmp_path}"
    succeeded(run(f"{line} --max-update 2", work))
    output = succeeded(run(f"{line} --max-update 4", work))
    assert re.search(r"Loaded checkpoint .*@ 2 updates", output)
    assert "num_updates 4" in output


@pytest.mark.parametrize("flag", ["--ddp-backend fully_sharded", "--zero-sharding os"])
def test_missing_fairscale_is_named_before_any_work(flag, monkeypatch, capsys):
    cfg = OmegaConf.structured(FairseqConfig)
    cfg.distributed_training.ddp_backend = "fully_sharded" if "ddp" in flag else "legacy_ddp"
    cfg.distributed_training.zero_sharding = "os" if "zero" in flag else "none"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None)
    with pytest.raises(SystemExit):
        distributed_utils.call_main(cfg, lambda cfg: None)
    expected = f"error: {flag}: needs fairscale, which is not installed: pip install fairscale\n"
    assert capsys.readouterr().err == expected


# --- What the other tests lean on ---------------------------------------------------------------


def test_the_header_of_an_index_is_as_check_data_bin_reads_it(work):
    head = (work / "bin" / "train.idx").read_bytes()[:26]
    assert struct.unpack("<9sQBQ", head) == (b"MMIDIDX\x00\x00", 1, 8, 120)


def test_user_dir_of_an_imported_package_is_accepted():
    package = Path(fairseq_moe_ext.__file__).parent
    utils.import_user_module(argparse.Namespace(user_dir=str(package)))


@pytest.mark.parametrize(
    "lines, words",
    [
        ("5 1\n6 1\n5 1\n", "dict.txt: '5' stands in it twice; use the dict.txt that the model"),
        ("5 1\nsix\n", "dict.txt: Incorrect dictionary format, expected"),
    ],
)
def test_a_dictionary_that_is_none_is_named(tmp_path, lines, words):
    (tmp_path / "dict.txt").write_text(lines)
    with pytest.raises(UserError) as error:
        Dictionary.load(str(tmp_path / "dict.txt"))
    assert f"{tmp_path}/{words}" in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError):
        Dictionary.load(str(tmp_path / "none.txt"))
