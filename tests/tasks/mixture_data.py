"""A small data folder of several corpora, and tasks over it."""

import copy
import functools
import random
from pathlib import Path

from fairseq import options, tasks
from fairseq.data.indexed_dataset import MMapIndexedDataset
from fairseq.dataclass.utils import convert_namespace_to_omegaconf

import fairseq_moe_ext.tasks.mixture_language_modeling  # noqa: F401
from fairseq_moe_ext.prepare.command import Options, parse_corpora, prepare

BLOCK = 32
# sizes in documents: in domain, then held out
CORPORA = {"big": 120, "mid": 40, "small": 15}
HELD_OUT = {"far": 20, "further": 12}


def make_data(folder: Path, text: Path) -> Path:
    """A prepared data folder; every corpus has words of its own."""
    rng = random.Random(0)
    specs = {"corpus": [], "heldout": []}
    for flag, sizes in (("corpus", CORPORA), ("heldout", HELD_OUT)):
        for name, size in sizes.items():
            for split in ("train", "valid", "test")[flag == "heldout" :]:
                words = [f"{name}{i}" for i in range(30)] + ["the", "of", "and"] * 5
                documents = [
                    "\n".join(
                        " ".join(rng.choices(words, k=rng.randint(3, 12)))
                        for _ in range(rng.randint(1, 4))
                    )
                    for _ in range(size if split == "train" else size // 3)
                ]
                path = text / f"{name}.{split}.txt"
                path.write_text("\n\n".join(documents), encoding="utf-8")
                specs[flag].append(f"{name}:{split}={path}")
    corpora = parse_corpora(specs["corpus"], specs["heldout"])
    prepare(folder, Options(corpora=corpora, train_bpe=288))
    return folder


@functools.cache
def base_configuration(task):
    flags = [
        "DATA", "--task", task, "--tokens-per-sample", str(BLOCK), "--sample-break-mode", "none",
        "--arch", "transformer_lm_gpt2_tiny", "--criterion", "cross_entropy", "--cpu",
        "--batch-size", "4", "--optimizer", "adam", "--lr", "0.001", "--num-workers", "0",
    ]  # fmt: skip
    args = options.parse_args_and_arch(options.get_training_parser(), flags)
    return convert_namespace_to_omegaconf(args)


def configure(data, *flags, task="mixture_language_modeling"):
    """The configuration that fairseq-train would make of these flags.

    The command line is parsed once, which takes a second, and the flags are set afterwards;
    test_command_line.py parses them.
    """
    cfg = copy.deepcopy(base_configuration(task))
    cfg.task.data = str(data)
    for flag, value in zip(flags[::2], flags[1::2]):
        key = flag[2:].replace("-", "_")
        groups = [group for group in (cfg.dataset, cfg.checkpoint, cfg.task) if key in group]
        assert groups, flag
        for group in groups:
            group[key] = value
    return cfg


def make_task(data, *flags, path=None, **kwargs):
    """As training sets it up, or the evaluation of a checkpoint, its `path`."""
    cfg = configure(data, *flags, **kwargs)
    cfg.common_eval.path = path
    return tasks.setup_task(cfg.task)


def tokens_of(data, name, split="train"):
    stored = MMapIndexedDataset(str(data / name / split))  # `sizes` lives only as long as it
    return int(stored.sizes.sum())
