"""Generation by `from_pretrained(...).generate` against Hugging Face's: the same weights converted
by `fairseq-moe convert --to hf`, GPT-2 and OLMoE.

    python benchmarks/generate.py [--shapes wide 256] [--batches 1 16] [--cases NAME ...]
    python benchmarks/generate.py --one-thread       by the processor's time: for a busy machine

Greedy, with a cache of keys and values: 128 tokens after a prompt of 32, one process, in turn.
Calls with a part of the shapes or cases merge into one table, generate.md or
generate_one_thread.md.
"""

from __future__ import annotations

import argparse
import functools
import logging
import sys
import tempfile
from pathlib import Path
from typing import Callable, Dict, List
from unittest import mock

import measure
import peer_models
import peers
import torch
import train_step
from torch import Tensor, nn

import fairseq_moe_ext
from fairseq_moe_ext.cli import main as fairseq_moe
from fairseq_moe_ext.models.language_model import MoETransformerLanguageModel

PROMPT, NEW = 32, 128  # tokens
SHAPES = {"wide": peers.SHAPES["wide"], "256": peers.SHAPES["256"]}
DENSE, MOE = 0, 8  # experts
Generate = Callable[[Tensor], object]  # prompts (B, PROMPT) int64


class Trained:
    """A checkpoint after one update, and the folder that it converts to. Every layer is dense, or
    sparse with experts of half the width: as many FLOPs."""

    def __init__(self, folder: Path, shape: peer_models.Shape, experts: int) -> None:
        self.data, self.run, self.converted = folder / "data", folder / "run", folder / "hf"
        self.data.mkdir(parents=True)
        train_step.make_data(self.data, 4 * shape.context, shape.vocabulary)
        flags = f"""{self.data} --user-dir {Path(fairseq_moe_ext.__file__).parent}
            --task language_modeling --arch moe_transformer_lm --criterion moe_cross_entropy --cpu
            --decoder-layers {shape.layers} --decoder-embed-dim {shape.dim} --activation-fn gelu
            --decoder-ffn-embed-dim {shape.hidden} --decoder-attention-heads {shape.heads}
            --share-decoder-input-output-embed --tokens-per-sample {shape.context} --batch-size 1
            --optimizer sgd --lr 0.01 --max-update 1 --save-dir {self.run} --no-epoch-checkpoints
            --disable-validation --num-workers 0 --moe-expert-count {experts}
            --moe-freq {int(experts > 0)} --moe-expert-ffn-dim {shape.hidden // 2}"""
        from fairseq_cli import train

        with mock.patch.object(sys, "argv", ["fairseq-train", *flags.split()]):
            train.cli_main()
        checkpoint = str(self.run / "checkpoint_last.pt")
        assert fairseq_moe(["convert", checkpoint, str(self.converted), "--to", "hf"]) == 0


def ours(trained: Trained) -> Generate:
    lm = MoETransformerLanguageModel.from_pretrained(
        str(trained.run), "checkpoint_last.pt", str(trained.data)
    ).eval()

    def generate(prompts: Tensor) -> List[str]:
        return lm.generate([lm.tgt_dict.string(row) for row in prompts], max_tokens=NEW)

    return generate


def converted(trained: Trained) -> Generate:
    from transformers import AutoModelForCausalLM

    return _theirs(
        AutoModelForCausalLM.from_pretrained(str(trained.converted), trust_remote_code=True)
    )


def native(shape: peer_models.Shape, experts: int) -> Generate:
    return _theirs(peer_models.hugging_face(shape, experts).model)


def _theirs(model: nn.Module) -> Generate:
    model.eval()

    def generate(prompts: Tensor) -> Tensor:
        found = model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=NEW,
            min_new_tokens=NEW,
            do_sample=False,
            pad_token_id=1,
        )
        assert found.shape == (len(prompts), PROMPT + NEW)
        return found

    return generate


CASES = {
    f"{name}{', 8 experts' if experts else ''}": (experts, kind)
    for experts in (DENSE, MOE)
    for name, kind in (
        ("ours", "ours"),
        ("ours, converted, by transformers", "converted"),
        ("OLMoE" if experts else "GPT-2", "native"),
    )
}


@functools.lru_cache(None)
def read_bandwidth(size: int) -> float:
    """Bytes a second of reading a tensor of so many, again and again: smaller ones may stay in the
    processor's cache."""
    x = torch.ones(size // 4)
    return size / min(measure.in_turn({"sum": x.sum}, 20, clock=measure.clock())["sum"])


def floor(shape: peer_models.Shape, experts: int, batch: int) -> float:
    """Seconds of the steps alone: the weights that a step needs, read once, or its FLOPs at the
    rate of a product of matrices, whichever takes longer."""
    experts_of_token, width = (2, shape.hidden // 2) if experts else (1, shape.hidden)
    read = experts * (1 - (1 - 2 / experts) ** batch) if experts else 1.0  # expected, if uniform
    attention, expert = 4 * shape.dim**2, 2 * shape.dim * width
    projection = shape.vocabulary * shape.dim
    weights = shape.layers * (attention + read * expert) + projection
    used = shape.layers * (attention + experts_of_token * expert) + projection
    threads = torch.get_num_threads()
    by_bytes = 4 * weights / read_bandwidth(int(4 * weights))
    return NEW * max(by_bytes, 2 * batch * used / measure.matrix_rate(9, torch.float32, threads))


def compare(file: str, name: str, batch: int, cases: List[str], rounds: int) -> Dict[str, Dict]:
    """Measure the cases of one shape and batch, and keep them in the results `file`."""
    shape = SHAPES[name]
    prompts = torch.randint(4, shape.vocabulary, (batch, PROMPT))
    runs: Dict[str, Callable[[], object]] = {}
    with tempfile.TemporaryDirectory() as folder:
        trained = {
            experts: Trained(Path(folder, str(experts)), shape, experts)
            for experts in {CASES[label][0] for label in cases}
        }
        for label in cases:
            experts, kind = CASES[label]
            make: Callable[[], Generate] = (
                functools.partial(native, shape, experts)
                if kind == "native"
                else functools.partial(ours if kind == "ours" else converted, trained[experts])
            )
            generate = measure.attempted(label, make, kind != "ours")
            if generate is not None:
                runs[label] = functools.partial(generate, prompts)
        theirs = [label for label in runs if CASES[label][1] != "ours"]
        seconds = measure.in_turn(runs, rounds, warmup=1, clock=measure.clock(), optional=theirs)
    rows = {}
    for label in seconds:
        best = floor(shape, CASES[label][0], batch)
        rows[f"{name}, batch {batch}: {label}"] = {
            "tokens_per_second": round(NEW * batch / measure.median(seconds[label]), 1),
            "of_the_floor": round(best / measure.median(seconds[label]), 3),
        }
        own = "ours, 8 experts" if CASES[label][0] else "ours"
        if own in seconds:
            speed = measure.ratio(seconds, label, own)
            rows[f"{name}, batch {batch}: {label}"]["ours_is_faster"] = round(speed, 3)
    return measure.keep(file, rows)


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.split("\n\n")[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--batches", type=measure.count, nargs="+", default=[1, 16])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="NAME")
    parser.add_argument("--rounds", type=measure.count, default=3)
    parser.add_argument("--one-thread", action="store_true", help="by the processor's time")
    args = parser.parse_args()
    torch.set_num_threads(1 if args.one_thread else 2)
    file = "generate_one_thread" if args.one_thread else "generate"
    logging.disable(logging.INFO)
    for name in args.shapes:
        for batch in args.batches:
            rows = compare(file, name, batch, args.cases, args.rounds)
    shapes = "; ".join(
        f"{name}: {s.layers} layers of width {s.dim}, vocabulary {s.vocabulary}"
        for name, s in SHAPES.items()
    )
    measure.keep_table(
        file,
        f"Greedy generation of {NEW} tokens after a prompt of {PROMPT}, float32 ({shapes}; sparse: "
        "every layer, 2 of 8 experts of half the hidden width). Floor: reading the weights of each "
        "step, or its FLOPs. Last column: how many times as fast as this ours is, in the same run.",
        ["case", "tokens/s", "of the floor", "ours is faster"],
        [
            [key, f"{row['tokens_per_second']:g}", f"{row['of_the_floor']:.2f}"]
            + [f"{row['ours_is_faster']:.2f}" if "ours_is_faster" in row else "-"]
            for key, row in sorted(rows.items())
        ],
    )


if __name__ == "__main__":
    main()
