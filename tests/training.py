"""Runs of fairseq-train and fairseq-eval-lm on tiny data, in this process and on several."""

import hashlib
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

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

GLOBAL_BATCH, SAVED, UPDATES = 8, 4, 14  # sentences; the updates before and after the checkpoint
MODEL = "--task language_modeling --arch moe_lm_tiny --criterion moe_cross_entropy --cpu"
MODEL += " --decoder-layers 2 --decoder-embed-dim 8 --decoder-ffn-embed-dim 12 --dropout 0"
MODEL += " --decoder-attention-heads 2 --tokens-per-sample 8 --attention-dropout 0"
MODEL += " --moe-gate-loss-wt 0.1 --moe-routing-scope world --ddp-backend legacy_ddp"
MODEL += f" --user-dir {Path(fairseq_moe_ext.__file__).parent}"
TRAIN = f"{MODEL} --optimizer adam --lr 0.01 --clip-norm 0.5 --max-update {UPDATES}"
TRAIN += " --required-batch-size-multiple 1 --num-workers 0 --curriculum 100"
TRAIN += " --no-progress-bar --log-format none --disable-validation"


def make_data(folder):
    """A data-bin of 1,000 tokens: 125 rows, 16 updates an epoch."""
    dictionary = Dictionary()
    for i in range(20):
        dictionary.add_symbol(f"w{i}", n=100 - i)
    dictionary.save(str(folder / "dict.txt"))
    for split, sentences in (("train", 100), ("valid", 8)):
        writer = indexed_dataset.make_builder(str(folder / f"{split}.bin"), "mmap", len(dictionary))
        for i in range(sentences):
            words = " ".join(f"w{(i * i + j * (1 + i % 3)) % 20}" for j in range(9))
            writer.add_item(dictionary.encode_line(words, add_if_not_exist=False))
        writer.finalize(str(folder / f"{split}.idx"))
    return str(folder)


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


def resume(data, folder, world, experts, options="", batch=None, save_dir=None):
    """Losses of a run that goes on from checkpoint_1_4.pt."""
    line = f"{data} {TRAIN} --moe-expert-count {experts} {options} --save-dir {save_dir or folder}"
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


EVAL = f"--user-dir {Path(fairseq_moe_ext.__file__).parent} --gen-subset valid --cpu"
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


def copy_of(runs, tmp_path, world=2, experts=4):
    folder, _ = runs(world, experts)
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
