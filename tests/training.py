"""Tiny data, and runs of fairseq's commands on it, in this process and on several."""

import hashlib
import importlib
import random
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fairseq import checkpoint_utils, options
from fairseq.data import Dictionary, indexed_dataset
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.trainer import Trainer
from fairseq_cli import train as fairseq_train
from processes import run_processes

import fairseq_moe_ext
from fairseq_moe_ext.checkpoint.format import MANIFEST, Manifest
from fairseq_moe_ext.errors import UserError
from fairseq_moe_ext.prepare.command import Options, parse_corpora, prepare

USER_DIR = str(Path(fairseq_moe_ext.__file__).parent)
GLOBAL_BATCH, SAVED, UPDATES = 8, 4, 14  # sentences; the updates before and after the checkpoint
MODEL = "--task language_modeling --arch moe_lm_tiny --criterion moe_cross_entropy --cpu"
MODEL += " --decoder-layers 2 --decoder-embed-dim 8 --decoder-ffn-embed-dim 12 --dropout 0"
MODEL += " --decoder-attention-heads 2 --tokens-per-sample 8 --attention-dropout 0"
MODEL += " --moe-gate-loss-wt 0.1 --moe-routing-scope world --ddp-backend legacy_ddp"
MODEL += f" --user-dir {USER_DIR}"
TRAIN = f"{MODEL} --optimizer adam --lr 0.01 --clip-norm 0.5 --max-update {UPDATES}"
TRAIN += " --required-batch-size-multiple 1 --num-workers 0 --curriculum 100"
TRAIN += " --no-progress-bar --log-format none --disable-validation"


def words(number):
    """A dictionary of w0, w1, ..., which are 4, 5, ... in it."""
    dictionary = Dictionary()
    for i in range(number):
        dictionary.add_symbol(f"w{i}", n=100 - i)
    return dictionary


def write_data_bin(folder, splits, dictionary=None):
    """A data-bin of 20 words, or a dictionary's. splits: name -> rows of ids, without eos."""
    dictionary = dictionary or words(20)
    dictionary.save(str(folder / "dict.txt"))
    for split, rows in splits.items():
        writer = indexed_dataset.make_builder(str(folder / f"{split}.bin"), "mmap", len(dictionary))
        for row in rows:
            writer.add_item(torch.tensor([*row, dictionary.eos()]))
        writer.finalize(str(folder / f"{split}.idx"))
    return str(folder)


def make_data(folder):
    """A data-bin of 1,000 tokens: 125 rows, 16 updates an epoch."""
    rows = [[4 + (i * i + j * (1 + i % 3)) % 20 for j in range(9)] for i in range(100)]
    return write_data_bin(folder, {"train": rows, "valid": rows[:8]})


def prepare_text(folder, text, vocabulary=280):
    """folder/data, with a tokenizer, of one corpus `a`, whose splits are all the text."""
    specs = []
    for split in ("train", "valid", "test"):
        (folder / f"{split}.txt").write_text(text)
        specs.append(f"a:{split}={folder / split}.txt")
    prepare(folder / "data", Options(corpora=parse_corpora(specs, []), train_bpe=vocabulary))
    return folder / "data"


def prepare_near_and_far(folder, heldout=()):
    """Prepare folder/data from two corpora without a word in common."""
    rng = random.Random(0)
    specs, held = [], []
    for name in ("near", "far"):
        for split in ("train", "valid", "test")[name in heldout :]:
            lines = [" ".join(f"{name}{rng.randint(0, 20)}" for _ in range(8)) for _ in range(60)]
            path = folder / f"{name}.{split}.txt"
            path.write_text("\n".join(f"{line}\n" for line in lines), encoding="utf-8")
            (held if name in heldout else specs).append(f"{name}:{split}={path}")
    prepare(folder / "data", Options(corpora=parse_corpora(specs, held), train_bpe=288))


def fairseq(line):
    """A command of fairseq in this process, as `fairseq-train data --arch ...`."""
    words = line.split()
    module = importlib.import_module(f"fairseq_cli.{words[0][len('fairseq-') :].replace('-', '_')}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", words)
        # fairseq-validate sets up logging anew, on what capsys will have closed
        patch.setattr(module, "reset_logging", lambda: None, raising=False)
        module.cli_main()


def status_of(line):
    """As `fairseq`; the command's exit status."""
    try:
        fairseq(line)
    except SystemExit as stop:
        return stop.code or 0
    return 0


def error_in(err):
    """The one error line of what a command wrote to stderr, without a traceback."""
    errors = [line for line in err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and "Traceback" not in err and "UserError" not in err, err
    return errors[0]


def train_small(data, folder, flags):
    """fairseq-train of two layers of width 16, in this process -> the checkpoint."""
    fairseq(
        f"""fairseq-train {data} --user-dir {USER_DIR} --save-dir {folder} --cpu --num-workers 0
        --arch moe_transformer_lm --decoder-layers 2 --decoder-embed-dim 16
        --decoder-ffn-embed-dim 16 --decoder-attention-heads 2 --criterion moe_cross_entropy
        --tokens-per-sample 32 --batch-size 4 --optimizer adam --lr 0.02 {flags}"""
    )
    return folder / "checkpoint_last.pt"


def settings(line, rank, world):
    parser = options.get_training_parser()
    line += f" --distributed-world-size {world} --distributed-rank {rank}"
    sys.argv[1:] = line.split()  # the first, partial parse reads these
    return convert_namespace_to_omegaconf(options.parse_args_and_arch(parser, line.split()))


def train(rank, world, line, batch=None):
    """fairseq-train in this process; returns the loss of each update, over all processes."""
    losses = []
    stock = Trainer._reduce_and_log_stats

    def record(self, logs, sample_size, grad_norm=None):
        losses.append(float(sum(log["inner_loss"] for log in logs)) / float(sample_size))
        return stock(self, logs, sample_size, grad_norm)

    vars(checkpoint_utils.save_checkpoint).pop("best", None)
    Trainer._reduce_and_log_stats = record
    try:
        line += f" --batch-size {batch or GLOBAL_BATCH // world}"
        fairseq_train.main(settings(line, rank, world))
    finally:
        Trainer._reduce_and_log_stats = stock
    return losses


def train_on(world, line, batch=None):
    """Losses of a run on so many processes."""
    if world == 1:
        return train(0, 1, line, batch)
    results = run_processes(world, train, world, line, batch)
    assert all(result == results[0] for result in results)
    return results[0]


def first_run(data, folder, world, experts, options=""):
    """An uninterrupted run that leaves checkpoint_1_4.pt; returns its losses."""
    line = f"{data} {TRAIN} --moe-expert-count {experts} {options} --save-dir {folder}"
    losses = train_on(world, f"{line} --save-interval-updates {SAVED} --keep-interval-updates -1")
    assert len(losses) == UPDATES
    return losses


def resume(data, folder, world, experts, options="", batch=None):
    """Losses of a run that goes on from checkpoint_1_4.pt."""
    line = f"{data} {TRAIN} --moe-expert-count {experts} {options} --save-dir {folder}"
    line += f" --restore-file {folder}/checkpoint_1_{SAVED}.pt --no-save"
    return train_on(world, line, batch)


def launch(world, line, name="fairseq-train"):
    """A command of fairseq, as a user starts it."""
    command = Path(sys.executable).parent / name
    start = f"-m torch.distributed.run --standalone --nproc_per_node {world}".split()
    return subprocess.Popen(
        [sys.executable, *start, str(command), *line.split(), "--distributed-backend", "gloo"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def error_of(rank, function, *args):
    try:
        function(rank, *args)
    except UserError as error:
        return str(error)
    return "no error"


def expert_files(folder):
    return {path.name for path in (Path(folder) / "experts").glob("*")}


def referred_files(folder):
    """Expert files that the checkpoints of a folder refer to."""
    found = set()
    for path in Path(folder).glob("*.pt"):
        manifest = manifest_of(path)
        found |= {Path(file.name).name for file in manifest.files} if manifest else set()
    return found


def manifest_of(path):
    return Manifest.read(str(path), torch.load(path, weights_only=True))


SHARDED = "--ddp-backend fully_sharded --min-params-to-wrap"


EVAL = f"--user-dir {USER_DIR} --gen-subset valid --cpu"
EVAL += " --tokens-per-sample 8 --num-workers 0 --batch-size 4 --log-format none"


def eval_lm_command():
    from fairseq_cli import eval_lm

    return eval_lm


def perplexity(rank, world, line):
    eval_lm = eval_lm_command()
    parser = options.get_eval_lm_parser()
    line += f" --distributed-world-size {world} --distributed-rank {rank}"
    sys.argv[1:] = line.split()
    cfg = convert_namespace_to_omegaconf(options.parse_args_and_arch(parser, line.split()))
    return float(eval_lm.main(cfg)["perplexity"])


def copy_of(runs, tmp_path):
    """Of a run on 2 processes with 4 experts."""
    folder, _ = runs(2, 4)
    shutil.copytree(folder, tmp_path / "copy")
    path = tmp_path / "copy" / "checkpoint_last.pt"
    return path, [path.parent / file.name for file in manifest_of(path).files]


def fit_manifest(path, files):
    """Let the checkpoint's entry for files[1] be of that file as it is now."""
    manifest = manifest_of(path)
    size, digest = files[1].stat().st_size, hashlib.sha256(files[1].read_bytes()).hexdigest()
    manifest.files[1] = replace(manifest.files[1], bytes=size, sha256=digest)
    state = torch.load(path, weights_only=True)
    torch.save({**state, MANIFEST: manifest.write()}, path)
